"""A small network that sees a bank of graph diffusions: the denoiser whose weights ship with the package."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.graph import GraphDiffusion
from lightning_modules.networks.gated_unet import GatedUNet
from lightning_modules.operators.operator import (
    Noise,
    ParameterSpec,
    RestorationOperator,
    check_images,
    noise_level,
    per_image,
)

WEIGHTS = Path(__file__).parent / "weights"
# Names under which shipped weights are found, in either spelling.
_SHIPPED = {"color": "color", "colour": "color", "gray": "gray", "grey": "gray", "camera": "camera"}
_FILE = "graph_denoiser.safetensors"
_FORMAT = "lightning-em graph denoiser 1"

_BANK: dict[str, list[float]] = {
    "sigma": [0.8, 0.3, 1.8],
    "tau": [0.3, 0.3, 0.3],
    "sigma_s": [1.5, 1.5, 1.5],
    "sigma_f": [1.2, 0.5, 2.2],
}
_BOUNDS = {"sigma": (0.02, 10.0), "tau": (0.001, 0.9), "sigma_s": (0.1, 200.0), "sigma_f": (0.005, 10.0)}
_UNITS = {"sigma": "noise", "tau": "", "sigma_s": "pixels", "sigma_f": "noise"}
# Constants of the bank's diffusions: side of the patches, radius in pixels, and number of steps.
_PATCH_SIZE, _RADIUS, _STEPS = 3, 3.0, 2


def has_weights(name: str) -> bool:
    """Whether weights of this name ship with the package.

    Args:
        name: As `GraphDenoiser.from_pretrained` takes it.
    """
    return (WEIGHTS / _SHIPPED[name] / _FILE).is_file()


class GraphDenoiser(RestorationOperator):
    r"""The noisy image y is diffused K times, and a network refines what it sees.

    .. math:: d_k = \text{diffuse}(y;\ \sigma_k, \tau_k, \sigma_{s,k}, \sigma_{f,k}), \qquad
        x = d_1 + \text{network}([\,y, d_1, \dots, d_K\,],\ \sigma_n)

    The widths of the bank are in units of the noise level; they are parameters of shape `[K]`, which
    `callbacks.EMParameterCallback` learns while the optimizer trains the network.

    Args:
        channels: Channels of the images: 3 for color, 1 for gray.
        bank: Start values of `sigma`, `tau`, `sigma_s` and `sigma_f`, one for each diffusion of the bank; also what
            `forward` uses where it is given no parameters.
        widths: See `GatedUNet`.
        depths: See `GatedUNet`.
        up_depths: See `GatedUNet`.
        weights: Trained weights to start from, named as `from_pretrained` does; their bank too, unless one is given.

    Raises:
        ValueError: If the lists of the bank are of different lengths, a parameter is missing, or the weights are those
            of another network.

    Example:
        >>> denoiser = GraphDenoiser(widths=(8, 16), depths=(1, 1), up_depths=(1,))
        >>> denoiser(torch.rand(1, 3, 37, 31), noise=0.1).shape
        torch.Size([1, 3, 37, 31])
    """

    #: how far, in pixels, a restored pixel looks: beyond, the weights of what it sees have died away
    halo = 48
    #: whether it has learned to know correlated noise by its level, and not only white noise
    knows_correlation = False

    def __init__(
        self,
        channels: int = 3,
        bank: Mapping[str, Sequence[float]] | None = None,
        widths: Sequence[int] = (24, 48, 96),
        depths: Sequence[int] = (2, 2, 3),
        up_depths: Sequence[int] = (2, 2),
        weights: str | None = None,
    ) -> None:
        super().__init__()
        trained = None if weights is None else GraphDenoiser.from_pretrained(weights)
        if bank is None:
            bank = _BANK if trained is None else trained.bank
        if bank.keys() != _BANK.keys() or len({len(values) for values in bank.values()}) != 1:
            raise ValueError(
                f"bank needs {', '.join(_BANK)}, each with one value for each diffusion, got "
                f"{ {name: len(values) for name, values in bank.items()} }"
            )
        self.channels = channels
        self.bank: dict[str, tuple[float, ...]] = {name: tuple(float(value) for value in bank[name]) for name in _BANK}
        self.architecture = {"widths": tuple(widths), "depths": tuple(depths), "up_depths": tuple(up_depths)}
        self.diffusion = GraphDiffusion(patch_size=_PATCH_SIZE, widths="noise", tile_size=None)
        self.network = GatedUNet((1 + self.size) * channels, channels, **self.architecture)
        if trained is not None:
            own, theirs = ((d.channels, d.size, d.architecture) for d in (self, trained))
            if own != theirs:
                raise ValueError(
                    f"{weights} has channels, diffusions and network {theirs}, not {own}: give it the same"
                )
            self.load_state_dict(trained.state_dict())
            self.knows_correlation = trained.knows_correlation

    @property
    def size(self) -> int:
        """Number K of diffusions in the bank."""
        return len(self.bank["sigma"])

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        """The bank's widths and steps, `[K]` each."""
        return tuple(
            ParameterSpec(name, start, _BOUNDS[name], (self.size,), _UNITS[name]) for name, start in self.bank.items()
        )

    def unit_factor(self, name: str, channels: int) -> float:
        """That of the diffusion; see `RestorationOperator.unit_factor`."""
        return self.diffusion.unit_factor(name, channels)

    def forward(self, noisy: Tensor, *, noise: Noise, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        """Restored images; see `RestorationOperator.forward`. A guide is refused: the network knows none.

        Shape:
            - noisy: `[B, C, H, W]`
            - noise: scalar, `[1]`, `[B]` or `[B, 1 or C, H, W]`
            - parameters: `[K]` or `[B, K]`; those of the bank where they are left out
            - output: `[B, C, H, W]`
        """
        check_images(noisy)
        if noisy.shape[1] != self.channels:
            raise ValueError(
                f"this GraphDenoiser restores images of {self.channels} channels, got {list(noisy.shape)}: load the "
                f"{'color' if noisy.shape[1] == 3 else 'gray'} one, or convert the images"
            )
        if guide is not None:
            raise ValueError("GraphDenoiser takes no guide: leave it out")
        level = noise_level(noise, noisy)
        height, width = noisy.shape[-2:]
        if min(height, width) < _PATCH_SIZE:  # narrower than a patch
            padding = (0, max(_PATCH_SIZE - width, 0), 0, max(_PATCH_SIZE - height, 0))
            noisy, level = (F.pad(p, padding, mode="replicate") if p.ndim == 4 else p for p in (noisy, level))
            return self(noisy, noise=level, **parameters)[..., :height, :width]
        bank = {
            name: per_image(name, parameters.get(name, start), noisy, self.size) for name, start in self.bank.items()
        }
        diffused = [
            self.diffusion(
                noisy,
                noise=noise if not isinstance(noise, Tensor | float | int) else level,
                radius=_RADIUS,
                smooth_steps=_STEPS,
                **{name: values[:, index] for name, values in bank.items()},
            )
            for index in range(self.size)
        ]
        shown = level if level.ndim == 1 else level.mean(1, keepdim=True)
        restored = diffused[0] + self.network(torch.cat([noisy, *diffused], dim=1), shown)
        return torch.where((shown.view(-1, 1, 1, 1) if shown.ndim == 1 else shown) > 0, restored, noisy)

    def save_pretrained(self, folder: str | Path, bank: Mapping[str, Sequence[float]] | None = None) -> Path:
        """Write the weights, at half precision, and their configuration beside them.

        Args:
            folder: Where to write `graph_denoiser.safetensors` and `graph_denoiser.json`, made where it is missing; or
                a path that ends in `.safetensors`, for files of that name.
            bank: The bank's values, such as those that a table has learned; the start values by default.

        Returns:
            Path of the weights, which `from_pretrained` reads.
        """
        path = Path(folder).expanduser()
        path = path if path.suffix == ".safetensors" else path / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        weights = save_safetensors({name: value.half().cpu().contiguous() for name, value in self.state_dict().items()})
        chosen = self.bank if bank is None else {name: tuple(bank[name]) for name in self.bank}
        config = {
            "format": _FORMAT,
            "sha256": hashlib.sha256(weights).hexdigest(),
            "channels": self.channels,
            "bank": chosen,
            **self.architecture,
            **({"knows_correlation": True} if self.knows_correlation else {}),
        }
        path.write_bytes(weights)
        path.with_suffix(".json").write_text(json.dumps(config, indent=1) + "\n")
        return path

    @classmethod
    def from_pretrained(cls, name: str | Path) -> "GraphDenoiser":
        """A trained denoiser, ready for use.

        Args:
            name: `"color"`, `"gray"` or `"camera"` for weights that ship with the package, or the path of a file
                of weights or of the folder that `save_pretrained` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If the file is damaged, or of another kind.
        """
        path = WEIGHTS / _SHIPPED[str(name)] if str(name) in _SHIPPED else Path(name).expanduser()
        path = path / _FILE if path.is_dir() or str(name) in _SHIPPED else path
        config_path = path.with_suffix(".json")
        for needed in (path, config_path):
            if not needed.is_file():
                raise FileNotFoundError(
                    f"{needed} does not exist: give 'color' or 'gray', or a file that save_pretrained has written"
                )
        try:
            config = json.loads(config_path.read_text())
            kind = config.pop("format", None) if isinstance(config, dict) else None
        except ValueError as error:
            raise ValueError(f"{config_path} is damaged ({error}): fetch or train the model again") from error
        if kind != _FORMAT:
            raise ValueError(f"{config_path} describes {kind or 'something else'}, expected {_FORMAT!r}")
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != config.pop("sha256", None):
            raise ValueError(f"{path} is damaged: its checksum differs from that in {config_path.name}; fetch it again")
        try:
            if "weights" in config:
                raise ValueError("it names weights of another file")
            knows = bool(config.pop("knows_correlation", False))
            denoiser = cls(**config)
            denoiser.load_state_dict({key: value.float() for key, value in load_safetensors(content).items()})
        except (SafetensorError, RuntimeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} does not fit {config_path.name}: {error}") from error
        denoiser.knows_correlation = knows or path.parent == WEIGHTS / "camera"
        return denoiser.eval().requires_grad_(False)
