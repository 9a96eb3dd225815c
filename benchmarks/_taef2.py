"""The small autoencoder `taef2` of https://github.com/madebyollin/taesd (MIT), for its published weights."""

from pathlib import Path

import torch
from torch import Tensor, nn

_CODE, _WIDTH, _POOLED = 32, 64, 256


class Block(nn.Module):
    """Three convolutions beside a skip; some begin with a branch that looks at groups of channels."""

    def __init__(self, pools: bool = False) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(), nn.ReLU(), _conv(), nn.ReLU(), _conv())
        self.pool = (
            nn.Sequential(
                nn.Conv2d(_WIDTH, _POOLED, 1, bias=False),
                nn.GroupNorm(4, _POOLED),
                nn.ReLU(),
                nn.Conv2d(_POOLED, _WIDTH, 1, bias=False),
            )
            if pools
            else None
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x if self.pool is None else x + self.pool(x)
        return torch.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """Keeps codes within ±3."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x / 3) * 3


class TAEF2(nn.Module):
    """Encoder and decoder, 8 pixels a code.

    Args:
        folder: Folder with `taef2_encoder.pth` and `taef2_decoder.pth`.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, _WIDTH, 3, padding=1), Block())
        for pools in (False, False, True):
            self.encoder.extend([_conv(stride=2, bias=False), *(Block(pools) for _ in range(3))])
        self.encoder.append(nn.Conv2d(_WIDTH, _CODE, 3, padding=1))
        self.decoder = nn.Sequential(Clamp(), nn.Conv2d(_CODE, _WIDTH, 3, padding=1), nn.ReLU())
        for count, pools in ((3, True), (3, False), (3, False)):
            self.decoder.extend([*(Block(pools) for _ in range(count)), nn.Upsample(scale_factor=2), _conv(bias=False)])
        self.decoder.extend([Block(), nn.Conv2d(_WIDTH, 3, 3, padding=1)])
        for name, half in (("encoder", self.encoder), ("decoder", self.decoder)):
            half.load_state_dict(torch.load(folder / f"taef2_{name}.pth", weights_only=True, map_location="cpu"))

    def encode(self, images: Tensor) -> Tensor:
        return self.encoder(images)

    def decode(self, codes: Tensor) -> Tensor:
        return self.decoder(codes)


def _conv(stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(_WIDTH, _WIDTH, 3, stride, 1, bias=bias)
