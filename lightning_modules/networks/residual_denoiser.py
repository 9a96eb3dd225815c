"""Residual CNN that diffuses the noisy image over a graph and refines the result."""

from collections.abc import Callable
from itertools import pairwise
from typing import Literal, cast

import torch
from torch import Tensor, nn

Diffuse = Callable[[Tensor, Tensor | None], Tensor]


class ResidualDenoiser(nn.Module):
    r"""Features of the noisy image build a graph, the noisy image is diffused over it, and a CNN refines the result.

    With hidden layers :math:`h = \text{stem}(y)` of the noisy image y and features :math:`f = P h`,

    .. math:: d = \text{diffuse}(y, f), \qquad x = d - \text{body}([\,y,\ d,\ h,\ f\,]).

    The diffusion comes early, so that all deeper layers work on its result, and the noisy image stays beside it, so
    that nothing is lost by it. `graph_on="patches"` builds the graph on the patches of the noisy image instead, whose
    distances have the noise's share taken off; there is no f then. With `graph=False`, d = y: the same layers and as
    many parameters, without a graph.

    The features enter the body as well, so that every parameter has a gradient in every case (distributed training
    refuses parameters without one). There is no batch normalisation: two processes then compute exactly what one does.
    The output layer starts at zero, so an untrained network returns the diffused image.

    Args:
        in_channels: Channels of the image: 3 for colour, 1 for grey.
        width: Channels of the hidden layers.
        depth: Number of 3×3 convolutions, at least 4; two of them are the stem.
        graph_features: Channels of the features of `graph_on="features"`. Few: each costs as much as an image channel.
        graph: Diffuse the noisy image over the graph. False: the same network without it.
        graph_on: What distances are measured on: learned `features`, or the `patches` of the noisy image.

    Raises:
        ValueError: If a size is too small.

    Example:
        >>> import torch
        >>> network = ResidualDenoiser(width=8, depth=4)
        >>> noisy = torch.rand(2, 3, 37, 31)
        >>> network(noisy, lambda signal, features: signal).shape
        torch.Size([2, 3, 37, 31])
    """

    accepts_operator = True

    def __init__(
        self,
        in_channels: int = 3,
        width: int = 32,
        depth: int = 8,
        graph_features: int = 4,
        graph: bool = True,
        graph_on: Literal["features", "patches"] = "patches",
    ) -> None:
        super().__init__()
        sizes = {"in_channels": in_channels, "width": width, "depth": depth, "graph_features": graph_features}
        for name, value in sizes.items():
            if value < (least := 4 if name == "depth" else 1):
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        if graph_on not in ("features", "patches"):
            raise ValueError(f"graph_on must be 'features' or 'patches', got {graph_on!r}.")
        self.in_channels = in_channels
        self.graph = graph
        self.graph_on = graph_on
        self.stem = nn.Sequential(*_convolutions(in_channels, width, 2))
        # no bias: a constant drops out of every distance
        self.projection = nn.Conv2d(width, graph_features, 1, bias=False) if graph_on == "features" else None
        extra = graph_features if graph_on == "features" else 0
        self.body = nn.Sequential(
            *_convolutions(2 * in_channels + width + extra, width, depth - 3),
            nn.Conv2d(width, in_channels, 3, padding=1),
        )
        # The other layers keep PyTorch's small weights: with larger ones (Kaiming's for ReLU) the first steps of Adam
        # throw the output off by more than the noise, and 300 steps at a rate of 2e-3 end at 22 dB instead of 27.
        output = cast(nn.Conv2d, self.body[-1])
        nn.init.zeros_(output.weight)
        nn.init.zeros_(cast(nn.Parameter, output.bias))

    def forward(self, noisy: Tensor, diffuse: Diffuse | None = None) -> Tensor:
        """Restores a batch of images.

        Args:
            noisy: The degraded images.
            diffuse: Called as `diffuse(signal, features)`: diffuses the signal over the graph of the features
                `[B, F, H, W]`, or of its own patches where they are None. Not called with `graph=False`.

        Shape:
            - noisy: `[B, C, H, W]`, in [0, 1] but for the noise
            - output: `[B, C, H, W]`
        """
        if noisy.ndim != 4 or noisy.shape[1] != self.in_channels:
            raise ValueError(
                f"ResidualDenoiser(in_channels={self.in_channels}) expects images of shape "
                f"[B, {self.in_channels}, H, W], got {list(noisy.shape)}."
            )
        hidden = self.stem(noisy)
        features = None if self.projection is None else self.projection(hidden)
        diffused = noisy
        if self.graph:
            if diffuse is None:
                raise ValueError(
                    "ResidualDenoiser diffuses over its graph: pass `diffuse`, or build it with graph=False."
                )
            diffused = diffuse(noisy, features)
        known = [noisy, diffused, hidden, *([] if features is None else [features])]
        return diffused - self.body(torch.cat(known, dim=1))


def _convolutions(in_channels: int, width: int, count: int) -> list[nn.Module]:
    channels = [in_channels] + [width] * count
    convolutions = (nn.Conv2d(first, second, 3, padding=1) for first, second in pairwise(channels))
    return [layer for convolution in convolutions for layer in (convolution, nn.ReLU())]
