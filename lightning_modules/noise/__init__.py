"""Noise of images: its level."""

from lightning_modules.noise.estimate import estimate_noise_std

__all__ = ["estimate_noise_std"]
