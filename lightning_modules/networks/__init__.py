"""Networks: plain modules that know nothing of Lightning."""

from lightning_modules.networks.residual_denoiser import ResidualDenoiser

__all__ = ["ResidualDenoiser"]
