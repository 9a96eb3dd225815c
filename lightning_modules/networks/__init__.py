"""Networks: plain modules that know nothing of Lightning."""

from lightning_modules.networks.clip_embedding import ClipEmbedding
from lightning_modules.networks.conv_autoencoder import ConvAutoencoder
from lightning_modules.networks.full_resolution_resnet import FullResolutionResNet
from lightning_modules.networks.gated_unet import GatedUNet
from lightning_modules.networks.patch_prior import PatchPrior
from lightning_modules.networks.perceptual_loss import PerceptualLoss
from lightning_modules.networks.residual_denoiser import ResidualDenoiser
from lightning_modules.networks.trace_network import TraceNetwork

__all__ = [
    "ClipEmbedding",
    "ConvAutoencoder",
    "FullResolutionResNet",
    "GatedUNet",
    "PatchPrior",
    "PerceptualLoss",
    "ResidualDenoiser",
    "TraceNetwork",
]
