"""Level of a camera's noise from the flattest blocks, calibrated on simulated cameras."""

from functools import cache
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lightning_modules._cached import cached_tensors
from lightning_modules.noise.blocks import Blocks, frequency_bands, read_blocks
from lightning_modules.noise.estimate import COLORS

# Shares of the blocks, the flattest, whose energies are averaged; and by which energies of single rings are ranked.
_SHARES = (0.02, 0.05, 0.1, 0.25, 0.5)
_QUANTILES = (0.05, 0.2, 0.5, 0.8)
_SIZE, _MAX_BLOCKS, _MIN_BLOCKS = 16, 1024, 24
_LEAST_ENERGY = (0.05 / 255) ** 2
# Rings of frequencies as `frequency_bands` has them, and the shading under them, where a camera's colors have most of
# their noise. Blocks are ranked by those of them that begin at a number, and sparse or not in groups of some.
_LOW_EDGES = (0.5 / 16, 1.6 / 16, 2.5 / 16)
_FINE, _GROUPS = 5, ((0, 3), (3, 6), (6, 9))
_NUM_RINGS, _HIDDEN = 11, 96
_PER_SCALE = 3 * _NUM_RINGS * (len(_SHARES) + len(_QUANTILES)) + len(_SHARES) * len(_GROUPS)
NUM_FEATURES = 2 * _PER_SCALE + 3
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


def describe_image(image: Tensor) -> Tensor | None:
    """What the blocks of a color image show at full and at half its resolution; None if they are too few.

    Energies of light and colors in rings of frequencies, in logarithms, averaged over the flattest shares of the
    blocks, and each ring's own quantiles; how sparse the light is, which noise is not; and the mean color.

    Shape:
        - image: `[3, H, W]`
        - output: `[D]`
    """
    height, width = (side // 2 * 2 for side in image.shape[1:])
    half = torch.zeros_like(image[:, :height:2, :width:2])
    for down in (0, 1):  # pooling would copy large images
        for right in (0, 1):
            half.add_(image[:, down:height:2, right:width:2], alpha=0.25)
    scales = [image, half]
    if min(scales[-1].shape[-2:]) < _SIZE:
        return None
    blocks = [read_blocks(each, _SIZE, _MAX_BLOCKS) for each in scales]
    if any(len(each.means) < _MIN_BLOCKS for each in blocks):
        return None
    return torch.cat([*(_describe(each) for each in blocks), blocks[0].means.mean(0)]).float()


def _describe(blocks: Blocks) -> Tensor:
    coefficients = blocks.coefficients.flatten(2)
    mixed = torch.tensor(COLORS).to(coefficients) @ coefficients
    member = _rings(coefficients.device, coefficients.dtype)
    count = member.sum(0)
    energies = mixed.square() @ member / count + _LEAST_ENERGY  # [N, 3, F]
    size = mixed[:, 0].abs() @ member / count + _LEAST_ENERGY**0.5
    order = energies[:, 0, _FINE:].log().mean(1).argsort(stable=True)
    counts = [max(round(share * len(order)), 1) for share in _SHARES]

    def flattest(values: Tensor) -> Tensor:
        running = values[order].cumsum(0)
        return torch.stack([running[number - 1] / number for number in counts])

    sparse = size.square().log() - energies[:, 0].log()
    sparse = torch.stack([sparse[:, first:last].mean(1) for first, last in _GROUPS], 1)
    quantiles = energies.quantile(torch.tensor(_QUANTILES).to(energies), dim=0)
    return torch.cat([flattest(energies).log().flatten(), quantiles.log().flatten(), flattest(sparse).flatten()])


@cached_tensors(maxsize=8)
def _rings(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Which frequencies belong to which ring, `[n², F]`."""
    step = torch.arange(_SIZE, dtype=torch.float64)
    distance = (step.square() + step[:, None].square()).sqrt() / _SIZE
    low = torch.bucketize(distance, torch.tensor(_LOW_EDGES, dtype=torch.float64)).to(device)
    lowest = torch.nn.functional.one_hot(low, len(_LOW_EDGES) + 1)[..., 1:-1].to(dtype)
    bands = frequency_bands(_SIZE, device, dtype)
    return torch.cat([lowest, bands.member], -1).flatten(0, 1)
