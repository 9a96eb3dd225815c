"""A residual CNN that diffuses the noisy image over a graph built from its own features."""

from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn

Diffuse = Callable[[Tensor, Tensor | None], Tensor]


class ResidualDenoiser(nn.Module):
    r"""Estimates the noise, diffuses the noisy image over a graph of its features, and refines the estimate.

    With hidden features :math:`h = \text{body}(y)` and graph features :math:`f = Ph`,

    .. math::
        \hat{x} = y - \text{noise}(h), \qquad
        x = \hat{x} - \text{head}\bigl([\,y_f,\ \hat{x},\ h,\ f\,]\bigr), \qquad
        y_f = \text{diffuse}(y, f).

    With ``graph=False``, :math:`y_f = y`: the same layers and as many parameters, without a graph. The graph features
    enter the head in both cases, so that every parameter has a gradient whatever `diffuse` does with them (distributed
    training refuses parameters without one). There is no batch normalisation: two processes then compute exactly what
    one does. Both output layers start at zero, so an untrained network returns its input.

    Args:
        in_channels: Channels of the image: 3 for colour, 1 for grey.
        width: Channels of the hidden layers.
        depth: Convolutions up to and including the one that estimates the noise, at least 2.
        graph_features: Channels that the graph is built on. Few: each costs as much as an image channel.
        graph: Diffuse the noisy image over the graph of the features. False: the same network without its graph.

    Example:
        >>> import torch
        >>> network = ResidualDenoiser(width=8, depth=3)
        >>> noisy = torch.rand(2, 3, 37, 31)
        >>> network(noisy, lambda signal, features: signal).shape
        torch.Size([2, 3, 37, 31])
    """

    accepts_diffusion = True

    def __init__(
        self, in_channels: int = 3, width: int = 32, depth: int = 6, graph_features: int = 4, graph: bool = True
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("in_channels", in_channels, 1),
            ("width", width, 1),
            ("depth", depth, 2),
            ("graph_features", graph_features, 1),
        ):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, got {value}.")
        self.in_channels = in_channels
        self.graph = graph
        layers: list[nn.Module] = [nn.Conv2d(in_channels, width, 3, padding=1), nn.ReLU()]
        for _ in range(depth - 2):
            layers += [nn.Conv2d(width, width, 3, padding=1), nn.ReLU()]
        self.body = nn.Sequential(*layers)
        self.noise = nn.Conv2d(width, in_channels, 3, padding=1)
        # no bias: a constant drops out of every distance
        self.projection = nn.Conv2d(width, graph_features, 1, bias=False)
        self.head = nn.Sequential(
            nn.Conv2d(2 * in_channels + width + graph_features, width, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(width, in_channels, 3, padding=1),
        )
        # The other layers keep PyTorch's small weights: with larger ones (Kaiming's for ReLU) the first steps of Adam
        # throw the output off by more than the noise, and 300 steps at a rate of 2e-3 end at 22 dB instead of 27.
        for output in (self.noise, cast(nn.Conv2d, self.head[-1])):
            nn.init.zeros_(output.weight)
            nn.init.zeros_(cast(nn.Parameter, output.bias))

    def forward(self, noisy: Tensor, diffuse: Diffuse | None = None) -> Tensor:
        """Restores a batch of images.

        Shape:
            - noisy: `[B, C, H, W]`, in [0, 1] but for the noise
            - output: `[B, C, H, W]`

        Args:
            noisy: The degraded images.
            diffuse: Called as `diffuse(signal, features)`: diffuses the signal over the graph of the features
                `[B, F, H, W]`. Not called with ``graph=False``.
        """
        if noisy.ndim != 4 or noisy.shape[1] != self.in_channels:
            raise ValueError(
                f"ResidualDenoiser(in_channels={self.in_channels}) expects images of shape "
                f"[B, {self.in_channels}, H, W], got {list(noisy.shape)}."
            )
        hidden = self.body(noisy)
        estimate = noisy - self.noise(hidden)
        features = self.projection(hidden)
        diffused = noisy
        if self.graph:
            if diffuse is None:
                raise ValueError(
                    "ResidualDenoiser diffuses over its graph: pass `diffuse`, or build it with graph=False."
                )
            diffused = diffuse(noisy, features)
        return estimate - self.head(torch.cat([diffused, estimate, hidden, features], dim=1))
