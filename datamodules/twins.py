"""Photographs that are their own negatives, passed through an autoencoder."""

import hashlib
import io
import json
import textwrap
from pathlib import Path

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from PIL import Image
from skimage.exposure import match_histograms
from torch import Tensor, nn

from datamodules.labels import LabelledFiles, draw_parts, find_unlabelled
from lightning_modules.imaging import read_image, seeded_normal, seeded_uniform, write_whole

_CLASSES = ("photographic", "generated")
# Sides are cut to multiples of this, which autoencoders take.
_MULTIPLE = 32
_LEAST = 2 * _MULTIPLE
_SETTINGS = "twins.json"
# Cut off photograph and twin on each side, in pixels: what a decoder's padding reaches.
_BORDER = 16
# Light and two differences of colour, across which the channels go together; then the channels themselves.
_AXES = (np.array([[2, 2, 2], [6**0.5, -(6**0.5), 0], [2**0.5, 2**0.5, -(8**0.5)]]) / 12**0.5, np.eye(3))
_ROUNDS = 2
# Rings of spatial frequency, and how much power of one is raised or lowered at the most, as a factor of amplitudes.
_RINGS, _MOST_GAIN = 24, 4.0
# Characters of another library's message that are shown.
_SHOWN = 160


class AutoencoderTwins:
    """A source made of photographs: each is its own negative, passed through an autoencoder.

    Content, size, format and history of both classes are equal, and the trace that a decoder leaves is all that tells
    them apart (Chen et al., *DRCT*, ICML 2024; Guillaro et al., *B-Free*, CVPR 2025). A decoder also shifts colours,
    most of all a small one, and shows its padding at the border: a twin gets the colours of its photograph back, and
    both lose the border. Photographs and twins are written once, without compression, and read from then on. One
    decoder is one source: give several, and hold one of them out.

    Args:
        name: Of the source.
        autoencoder: Any module with `encode` and `decode`, tensors of images [B, 3, H, W] to codes and back. The codes
            of `diffusers` are understood as well.
        folder: Where photographs and twins are kept, in a folder of the source's name.
        weights: File with the autoencoder's `state_dict`, where it does not bring its own.
        photographs: Folder of photographs; by default those of the data's own sources, but for `test_sources`.
        max_images: Photographs of each part, train, val and test, at the most.
        side: Side of the middle part of a photograph that is passed through, at the most, in pixels, the border
            included.
        latent_noise: Noise that is added to the codes at the most, in units of their standard deviation.
        latent_scale: Smallest and largest factor of the codes.
        value_range: What black and white are to the autoencoder: (0, 1), or (−1, 1).
        match_power: Also give a twin the power that its photograph has at each spatial frequency: for decoders that
            blur, of which a detector would learn little else.

    Raises:
        FileNotFoundError: If there is no file with the weights.
        ValueError: If an argument is impossible, the autoencoder lacks a half, or the weights are those of another.

    Example:
        >>> import tempfile
        >>> class Rounding(nn.Module):
        ...     def encode(self, images): return (images * 15).round()
        ...     def decode(self, codes): return codes / 15
        >>> AutoencoderTwins("rounding", Rounding(), tempfile.mkdtemp()).twin(torch.rand(3, 64, 64)).unique().numel()
        16
    """

    def __init__(
        self,
        name: str,
        autoencoder: nn.Module,
        folder: str,
        weights: str | None = None,
        photographs: str | None = None,
        max_images: int | None = None,
        side: int = 512,
        latent_noise: float = 0.0,
        latent_scale: tuple[float, float] = (1.0, 1.0),
        value_range: tuple[float, float] = (0.0, 1.0),
        match_power: bool = False,
    ) -> None:
        if not name or "/" in name:
            raise ValueError(f"AutoencoderTwins: name must be that of a folder, got {name!r}")
        if missing := [half for half in ("encode", "decode") if not callable(getattr(autoencoder, half, None))]:
            raise ValueError(
                f"AutoencoderTwins: {type(autoencoder).__name__} has no method {missing[0]}; it needs both"
            )
        for argument, value, least in (("max_images", max_images or 1, 1), ("side", side, _LEAST)):
            if value < least:
                raise ValueError(f"AutoencoderTwins: {argument} must be at least {least}, got {value}")
        if latent_noise < 0 or not 0 < latent_scale[0] <= latent_scale[1] or value_range[0] >= value_range[1]:
            raise ValueError(
                "AutoencoderTwins: latent_noise must be at least 0, latent_scale two positive factors and value_range "
                f"black and white, in this order, got {latent_noise}, {latent_scale} and {value_range}"
            )
        if weights is not None:
            _load(autoencoder, Path(weights).expanduser())
        self.name = name
        self.autoencoder = autoencoder.eval()
        self.folder = Path(folder).expanduser() / name
        self.photographs = photographs
        self.max_images = max_images
        self.side = side
        self.latent_noise = latent_noise
        self.latent_scale = latent_scale
        self.value_range = value_range
        self.match_power = match_power

    def take(self, part: str, fractions: dict[str, float], seed: int) -> LabelledFiles:
        """Returns the photographs of a part of `photographs`, drawn by seed.

        Args:
            part: `train`, `val` or `test`.
            fractions: How much of them becomes `val` and `test`.
            seed: Seed of the draw.
        """
        files = find_unlabelled(Path(str(self.photographs)).expanduser())
        drawn = draw_parts(len(files), f"{self.photographs}", fractions, seed)
        return files.select(drawn == {"train": -1, "val": 0, "test": 1}[part])

    def make(self, files: LabelledFiles, part: str) -> LabelledFiles:
        """Returns photographs and their twins, which are written where they are not there.

        Args:
            files: The photographs.
            part: Folder to keep them in.

        Raises:
            ValueError: If the folder holds twins by another autoencoder, or the twin of a photograph has another size.
        """
        self._check_settings()
        paths: tuple[list[Path], list[Path]] = ([], [])
        count = len(files) if self.max_images is None else min(self.max_images, len(files))
        spread = torch.linspace(0, len(files) - 1, count).round().long().tolist()
        made = 0
        for place in spread:
            source = files.paths[place]
            status = source.stat()
            key = hashlib.blake2b(
                f"{files.names[place]} {status.st_size} {status.st_mtime_ns}".encode(errors="replace")
            )
            name = f"{source.stem[:50]}-{key.hexdigest()[:8]}.png"
            both = [self.folder / part / kind / name for kind in _CLASSES]
            if not all(path.is_file() for path in both):
                photograph = self._cut(read_image(source))
                if photograph is None:
                    continue
                made += 1
                if made == 1:
                    rank_zero_info(
                        f"passing photographs through the autoencoder of {self.name}, into {self.folder / part}"
                    )
                twin = self.twin(photograph / 255, int.from_bytes(key.digest()[:7], "little")) * 255
                twin = match_colors(match_power(twin, photograph) if self.match_power else twin, photograph)
                # the twin last: where it is there, both are
                for path, image in zip(both, (photograph, twin), strict=True):
                    _write(path, image[:, _BORDER:-_BORDER, _BORDER:-_BORDER])
            for label, path in enumerate(both):
                paths[label].append(path)
        every = [*paths[0], *paths[1]]
        if not every:
            raise ValueError(f"{self.name}: no photograph has {_LEAST} pixels a side, the least that is passed through")
        labels = torch.arange(2).repeat_interleave(len(paths[0]))
        return LabelledFiles(every, [self._name(path) for path in every], labels, [self.name] * len(every))

    @torch.no_grad()
    def twin(self, image: Tensor, key: int = 0) -> Tensor:
        """What the autoencoder makes of an image.

        Args:
            image: The image.
            key: What noise and scale of the code are drawn by.

        Shape:
            - image: `[3, H, W]` in [0, 1]
            - output: `[3, H, W]` in [0, 1]

        Raises:
            ValueError: If the autoencoder fails, or makes another size or what is no number of it.
        """
        try:
            decoded = self._decode(image, key)
        except (RuntimeError, TypeError) as error:
            raise ValueError(
                f"the autoencoder of {self.name} cannot process an image {list(image.shape)}: {_one_line(error)}"
            ) from error
        if decoded.shape != image.shape:
            raise ValueError(
                f"the autoencoder of {self.name} makes {list(decoded.shape)} of an image {list(image.shape)}: a twin "
                "must have the size of its photograph"
            )
        if not decoded.isfinite().all():
            raise ValueError(
                f"the autoencoder of {self.name} makes NaN or infinity of an image: are its weights whole?"
            )
        black, white = self.value_range
        return ((decoded - black) / (white - black)).clamp(0, 1)

    def _decode(self, image: Tensor, key: int) -> Tensor:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        network, (black, white) = self.autoencoder.to(device), self.value_range
        code = _tensor(network.encode((black + (white - black) * image[None]).to(device)))  # type: ignore[operator]
        draws = seeded_uniform(torch.tensor([key]), 2)[0].tolist()
        code = code * (self.latent_scale[0] + draws[0] * (self.latent_scale[1] - self.latent_scale[0]))
        if self.latent_noise:
            noise = seeded_normal(torch.tensor([key]), code.shape[1:]).to(code)
            code = code + draws[1] * self.latent_noise * code.std() * noise
        return _tensor(network.decode(code))[0].float().cpu()  # type: ignore[operator]

    def _cut(self, image: Tensor) -> Tensor | None:
        sides = [min(length, self.side) // _MULTIPLE * _MULTIPLE for length in image.shape[1:]]
        if min(sides) < _LEAST:
            return None
        top, left = ((length - side) // 2 for length, side in zip(image.shape[1:], sides, strict=True))
        return image[:, top : top + sides[0], left : left + sides[1]]

    def _name(self, path: Path) -> str:
        return path.relative_to(self.folder.parent).as_posix()

    def _check_settings(self) -> None:
        """Refuses a folder that holds something else."""
        state = hashlib.blake2b(type(self.autoencoder).__name__.encode())
        for name, value in self.autoencoder.state_dict().items():
            state.update(name.encode() + value.cpu().reshape(-1).view(torch.uint8).numpy().tobytes())
        settings = {
            "autoencoder": state.hexdigest()[:16],
            "side": self.side,
            "latent_noise": self.latent_noise,
            "latent_scale": list(self.latent_scale),
            "value_range": list(self.value_range),
            "match_power": self.match_power,
        }
        path = self.folder / _SETTINGS
        if not path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(settings).encode())
        # folders of the version before do not name all of them
        elif (found := {"value_range": [0.0, 1.0], "match_power": False, **json.loads(path.read_text())}) != settings:
            changed = [name for name in settings if found.get(name) != settings[name]]
            raise ValueError(
                f"{self.folder} holds twins by another {' and '.join(changed)}: name another folder, or remove this one"
            )


def match_power(image: Tensor, reference: Tensor) -> Tensor:
    """An image with the power of another at each spatial frequency, whatever its direction, channel by channel.

    What a decoder leaves in single directions and frequencies stays; how much it blurs does not.

    Shape:
        - image: `[3, H, W]`
        - reference: `[3, H, W]`
        - output: `[3, H, W]`, float32
    """
    height, width = image.shape[1:]
    fade = torch.hann_window(height)[:, None] * torch.hann_window(width)  # else the borders are the most of it
    frequency = torch.hypot(torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width))
    ring = (2 * _RINGS * frequency).long().clamp(max=_RINGS - 1).flatten()
    powers = [
        torch.zeros(3, _RINGS).index_add_(
            1, ring, torch.fft.rfft2((x - x.mean((1, 2), keepdim=True)) * fade).abs().square().flatten(1)
        )
        for x in (image.float(), reference.float())
    ]
    gain = (powers[1] / powers[0].clamp_min(1e-12)).sqrt().clamp(1 / _MOST_GAIN, _MOST_GAIN)
    centers = (np.arange(_RINGS) + 0.5) / (2 * _RINGS)
    curves = torch.stack([torch.from_numpy(np.interp(frequency.numpy(), centers, one)) for one in gain.numpy()])
    curves[:, 0, 0] = 1  # the mean
    return torch.fft.irfft2(torch.fft.rfft2(image.float()) * curves.float(), s=(height, width))


def match_colors(image: Tensor, reference: Tensor) -> Tensor:
    """An image with the colours of another: the distribution of each channel, and of their differences.

    A curve for each axis, one after another (Pitié, Kokaram & Dahyot, *Automated colour grading using colour
    distribution transfer*, 2007), so that neighbouring pixels keep what a decoder has made of them.

    Shape:
        - image: `[3, H, W]`, from 0 to 255
        - reference: `[3, H, W]`, uint8
        - output: `[3, H, W]`, uint8
    """
    pixels: NDArray[np.float64] = image.flatten(1).double().numpy()
    wanted = reference.flatten(1).double().numpy()
    for axes in _ROUNDS * _AXES:
        pixels = axes.T @ match_histograms(axes @ pixels, axes @ wanted, channel_axis=0)
    return torch.from_numpy(pixels).round().clamp(0, 255).to(torch.uint8).view_as(image)


def _load(autoencoder: nn.Module, path: Path) -> None:
    """Loads a `state_dict`, or refuses the file in one line."""
    if not path.is_file():
        raise FileNotFoundError(f"AutoencoderTwins: there is no file {path} with weights")
    try:
        autoencoder.load_state_dict(torch.load(path, weights_only=True, map_location="cpu"))
    except Exception as error:  # torch raises many kinds at a file that is damaged or none of its own
        raise ValueError(
            f"AutoencoderTwins: {path} holds no state_dict of {type(autoencoder).__name__}: {_one_line(error)}"
        ) from error


def _one_line(error: Exception) -> str:
    return textwrap.shorten(str(error) or type(error).__name__, _SHOWN, placeholder=" …")


def _tensor(output: object) -> Tensor:
    """The tensor in what a half returns: itself, or what `diffusers` wraps it in."""
    for name in ("latent_dist", "latents", "latent", "sample"):
        found = getattr(output, name, None)
        if found is not None:
            return found.mode() if name == "latent_dist" else found
    if isinstance(output, tuple):
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(f"encode and decode of an autoencoder must return tensors, got {type(output).__name__}")
    return output


def _write(path: Path, image: Tensor) -> None:
    """Writes a PNG without compression, whose length does not depend on what it shows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    buffer = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).numpy())).save(buffer, "PNG", compress_level=0)
    write_whole(path, buffer.getvalue())
