"""Networks: plain modules that know nothing of Lightning."""

from lightning_modules.networks.clip_embedding import ClipEmbedding
from lightning_modules.networks.conv_autoencoder import ConvAutoencoder
from lightning_modules.networks.patch_prior import PatchPrior
from lightning_modules.networks.perceptual_loss import PerceptualLoss
from lightning_modules.networks.residual_denoiser import ResidualDenoiser

__all__ = ["ClipEmbedding", "ConvAutoencoder", "PatchPrior", "PerceptualLoss", "ResidualDenoiser"]
