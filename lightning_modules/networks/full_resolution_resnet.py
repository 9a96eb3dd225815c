"""ResNets of torchvision with a stem that throws no pixel away."""

from typing import Literal

from torch import Tensor, nn

ResNetName = Literal["resnet18", "resnet34", "resnet50"]


class FullResolutionResNet(nn.Module):
    """A ResNet whose stem is a 3×3 convolution of stride 1, without pooling, and which ends at its features.

    The usual stem, 7×7 with stride 2 and a maximum over 3×3 pixels, averages away what a generator leaves between
    neighbouring pixels. Keeping the resolution costs 16 times the arithmetic: it belongs on an accelerator.

    Args:
        in_channels: Channels of the input.
        network: Which ResNet.
        normalization: `batch` normalises over the batch, as published; `group` over groups of 32 channels of each
            image, by which several processes compute exactly what one does.

    Example:
        >>> import torch
        >>> FullResolutionResNet(in_channels=6)(torch.rand(2, 6, 33, 20)).shape
        torch.Size([2, 512])
    """

    def __init__(
        self,
        in_channels: int = 3,
        network: ResNetName = "resnet18",
        normalization: Literal["batch", "group"] = "batch",
    ) -> None:
        from torchvision import models  # takes as long as torch

        super().__init__()
        if network not in ("resnet18", "resnet34", "resnet50"):
            raise ValueError(f"network must be resnet18, resnet34 or resnet50, got {network!r}")
        if normalization not in ("batch", "group"):
            raise ValueError(f"normalization must be 'batch' or 'group', got {normalization!r}")
        self.in_channels = in_channels
        self.normalization = normalization
        #: the name of the network, whose attribute is the network itself
        self.given = {"network": network}
        norm = nn.BatchNorm2d if normalization == "batch" else _group_norm
        self.network = getattr(models, network)(weights=None, norm_layer=norm)
        self.network.conv1 = nn.Conv2d(in_channels, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(self.network.conv1.weight, mode="fan_out", nonlinearity="relu")
        self.network.maxpool = nn.Identity()
        self.network.fc = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Features of each image.

        Shape:
            - x: `[B, C, H, W]`, of any size
            - output: `[B, 512]`, or `[B, 2048]` of `resnet50`
        """
        if x.ndim != 4 or x.shape[1] != self.in_channels:
            raise ValueError(
                f"FullResolutionResNet(in_channels={self.in_channels}) expects [B, {self.in_channels}, H, W], got "
                f"{list(x.shape)}"
            )
        features: Tensor = self.network(x)
        return features


def _group_norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels)
