"""Level of a camera's noise from the flattest blocks, calibrated on simulated cameras."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_modules.noise.blocks import Blocks, frequency_bands
from lightning_modules.noise.estimate import COLORS

# Shares of the blocks, the flattest, whose energies are averaged; and by which energies of single rings are ranked.
_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
_QUANTILES = (0.02, 0.1, 0.25, 0.5)
_MAX_BLOCKS = 1024
_LEAST_ENERGY = (0.05 / 255) ** 2
_FINE = 3  # of the rings of frequencies, those by which blocks are ranked begin here
_NUM_RINGS, _HIDDEN = 9, 48
NUM_FEATURES = 3 * _NUM_RINGS * (len(_SHARES) + len(_QUANTILES)) + 3
LEAST_LEVEL = 0.3 / 255  # that clean photographs are given


class CameraLevel(nn.Module):
    """The logarithm of the level of a camera's noise, and its standard error, from what the blocks of an image show.

    Texture and noise that a camera has smoothed look alike in a single block. What tells them apart, how the energies
    of light and colors fall with the frequency from the flattest blocks to the others, was learned on photographs under
    `CameraNoise`, and on clean ones, by benchmarks/train_camera_level.py.
    """

    center: Tensor  # mean of the features, [D]
    scale: Tensor  # their standard deviation, [D]

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("center", torch.zeros(NUM_FEATURES))
        self.register_buffer("scale", torch.ones(NUM_FEATURES))
        self.layers = nn.Sequential(
            nn.Linear(NUM_FEATURES, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, _HIDDEN), nn.GELU(), nn.Linear(_HIDDEN, 2)
        )

    def forward(self, features: Tensor) -> tuple[Tensor, Tensor]:
        """Mean of the level's logarithm, and its standard deviation.

        Shape:
            - features: `[N, D]`
            - output: `[N]` and `[N]`
        """
        unit = ((features - self.center) / self.scale).clamp(-4, 4)
        mean, spread = self.layers(unit).unbind(1)
        return mean - 4.5, nn.functional.softplus(spread) + 0.02


@cache
def trained_camera_level() -> CameraLevel:
    """The one that comes with the package."""
    model = CameraLevel()
    weights = load_file(Path(__file__).with_suffix(".safetensors"))
    model.load_state_dict({name: value.float() for name, value in weights.items()})
    return model.eval().requires_grad_(False)


def describe_blocks(blocks: Blocks) -> Tensor:
    """What the blocks of a color image show: energies of light and colors in rings of frequencies, in logarithms.

    Averaged over the flattest shares of the blocks, and each ring's own quantiles; and the mean color.

    Shape:
        - output: `[D]`
    """
    chosen = torch.linspace(0, len(blocks.means) - 1, min(len(blocks.means), _MAX_BLOCKS)).long()
    coefficients = blocks.coefficients[chosen]
    axes = torch.tensor(COLORS).to(coefficients)
    mixed = Blocks(blocks.means[chosen], torch.einsum("kc,ncuv->nkuv", axes, coefficients))
    bands = frequency_bands(coefficients.shape[-1], coefficients.device, coefficients.dtype)
    energies = mixed.energies(bands) + _LEAST_ENERGY  # [N, 3, F]
    order = energies[:, 0, _FINE:].log().mean(1).argsort(stable=True)
    running = energies[order].cumsum(0)
    counts = [max(round(share * len(order)), 1) for share in _SHARES]
    means = torch.stack([running[count - 1] / count for count in counts])
    quantiles = energies.quantile(torch.tensor(_QUANTILES).to(energies), dim=0)
    return torch.cat([means.log().flatten(), quantiles.log().flatten(), blocks.means.mean(0).to(energies)]).float()
