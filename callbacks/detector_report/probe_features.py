"""Features of the shortcut probes, and the linear classifiers on them."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import tifffile
import torch
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.networks import PerceptualLoss

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

_THUMBNAIL = 8  # pixels
_BINS = 7  # of a histogram of one colour
_SEMANTIC_SIDES = 256, 224  # pixels: the middle square is reduced to the one and cut to the other, as is the custom


def file_format(path: Path) -> tuple[str, tuple[int, int]]:
    """Returns a file's format (`JPEG`) and its image's width and height, without decoding it."""
    try:
        with Image.open(path) as image:
            return image.format or "unknown", image.size
    except UnidentifiedImageError:  # colour with 16 bits or floating point, which Pillow does not know
        with tifffile.TiffFile(path) as file:
            page: Any = file.pages[0]
            return "TIFF", (page.imagewidth, page.imagelength)


def file_features(path: Path, image: Tensor) -> dict[str, Any]:
    """Describes a file by its format and its bytes a pixel, and its image by the size at which it is looked at.

    Shape:
        - image: `[3, H, W]`
    """
    name, (stored_width, stored_height) = file_format(path)
    height, width = image.shape[1:]
    return {
        "format": name,
        "size": f"{width}×{height}",  # as a name: one fixed size need not be larger or smaller than the others
        "width": math.log2(width),
        "height": math.log2(height),
        "bytes": math.log2(max(path.stat().st_size, 1) / (stored_width * stored_height)),
    }


def thumbnail_features(image: Tensor) -> NDArray[np.float64]:
    """Describes an image by its mean colour and a thumbnail of 8×8 pixels.

    Shape:
        - image: `[3, H, W]`, uint8
        - output: `[195]`
    """
    pixels = image[None].double() / 255
    thumbnail = F.interpolate(pixels, (_THUMBNAIL, _THUMBNAIL), mode="area")
    return torch.cat([pixels.mean((0, 2, 3)), thumbnail.flatten()]).numpy()


def color_features(image: Tensor) -> NDArray[np.float64]:
    """Describes an image by its colours: mean, spread and skewness of each, how they go together, and a histogram.

    Shape:
        - image: `[3, H, W]`, uint8
        - output: `[34]`
    """
    pixels = image.double().flatten(1) / 255
    mean, spread = pixels.mean(1), pixels.std(1, correction=0)
    standard = (pixels - mean[:, None]) / spread.clamp_min(1e-6)[:, None]
    together = (standard @ standard.T / pixels.shape[1])[torch.triu_indices(3, 3, 1).unbind()]
    saturation = (pixels.amax(0) - pixels.amin(0)).mean()[None]
    histogram = torch.stack([torch.histc(channel, _BINS, 0, 1) for channel in pixels]) / pixels.shape[1]
    return torch.cat([mean, spread, standard.pow(3).mean(1), together, saturation, histogram.flatten()]).numpy()


def semantic_features(weights: str) -> Callable[[Tensor], NDArray[np.float64]]:
    """Returns a function that describes an image by what a network trained on ImageNet recognises in it.

    The network, SqueezeNet (Iandola et al., 2016), sees the image reduced to 256 pixels: no trace of the single pixels.

    Args:
        weights: Path of a `state_dict` of torchvision's `squeezenet1_0`.

    Shape:
        - image: `[3, H, W]`, uint8
        - output: `[512]`
    """
    network = PerceptualLoss("squeezenet1_0", "fire9", weights)

    @torch.no_grad()
    def features(image: Tensor) -> NDArray[np.float64]:
        square = _middle(image, min(image.shape[1:]))[None].float() / 255
        pixels = F.interpolate(square, (_SEMANTIC_SIDES[0],) * 2, mode="bilinear", antialias=True)
        pooled = network.features(_middle(pixels, _SEMANTIC_SIDES[1])).mean((0, 2, 3))
        return pooled.double().numpy()

    return features


def fit_linear(features: Sequence[Any], labels: Tensor) -> "Pipeline":
    """Fits logistic regression to standardised features: vectors, or dicts of numbers and names.

    Shape:
        - labels: `[N]`, int64, 0 or 1
    """
    from sklearn.feature_extraction import DictVectorizer  # takes a while, and few are asked for a report
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    steps = [StandardScaler(), LogisticRegression(max_iter=2000)]
    if isinstance(features[0], dict):
        steps.insert(0, DictVectorizer(sparse=False))
    return make_pipeline(*steps).fit(_table(features), labels.numpy())


def predict_linear(model: "Pipeline", features: Sequence[Any]) -> Tensor:
    """Returns the probabilities of class 1.

    Shape:
        - output: `[N]`, float64
    """
    return torch.from_numpy(model.predict_proba(_table(features))[:, 1])


def stratified_subset(labels: Tensor, max_count: int) -> Tensor:
    """Returns positions of at most so many images, as many of either class as there are, spread evenly over the list.

    Shape:
        - labels: `[N]`, int64
        - output: `[M]`, int64, ascending
    """
    classes = [(labels == label).nonzero()[:, 0] for label in (0, 1)]
    first = min(len(classes[0]), max(max_count // 2, max_count - len(classes[1])))
    counts = first, min(len(classes[1]), max_count - first)
    chosen = [
        members[torch.linspace(0, len(members) - 1, count).round().long()]
        for members, count in zip(classes, counts, strict=True)
    ]
    return torch.cat(chosen).sort().values


def _middle(image: Tensor, side: int) -> Tensor:
    top, left = ((length - side) // 2 for length in image.shape[-2:])
    return image[..., top : top + side, left : left + side]


def _table(features: Sequence[Any]) -> Any:
    return list(features) if isinstance(features[0], dict) else np.stack(features)
