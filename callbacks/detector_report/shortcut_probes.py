"""Shortcut probes: linear classifiers that look at nothing that a detector should look at."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from callbacks.detector_report.evaluation import DetectorData, Files
from callbacks.detector_report.probe_features import (
    color_features,
    file_features,
    fit_linear,
    predict_linear,
    stratified_subset,
    thumbnail_features,
)

if TYPE_CHECKING:
    from sklearn.pipeline import Pipeline

PROBES = ("file", "thumbnail", "color", "semantic")

_CLEAN = "clean"
_AS_THEY_ARE = {_CLEAN, "history"}
# Area under the ROC curve above which a probe tells the classes of a source apart, and what then helps.
_SHORTCUT = 0.6
_REMEDIES = {
    "file": "match_sizes and match_formats",
    "thumbnail": "twins",
    "color": "twins",
    "semantic": "twins, or generated images of what the photographs show",
}
_FOLDS = 5


class ShortcutProbes:
    """Probes of a file's format and size, of its thumbnail, of its colours, and of what an image shows.

    They are trained when they are made, and so read the training images then.

    Args:
        data: Images to train and test on.
        max_count: Images to train on, and images to test on, at the most.
        semantic: Describes what an image shows; None where nothing can.
    """

    def __init__(self, data: DetectorData, max_count: int, semantic: Callable[[Tensor], Any] | None) -> None:
        self.not_run: dict[str, str] = {}
        self._data, self._max_count = data, max_count
        self._models: dict[str, Pipeline] = {}
        self._functions = _functions(semantic)
        if semantic is None:
            self.not_run["semantic"] = "no semantic_weights are given"
        if not _AS_THEY_ARE & {*data.conditions}:
            self.not_run["file"] = (
                f"it looks at the files as they are; {' or '.join(sorted(_AS_THEY_ARE))} is no condition"
            )
        try:
            files = data.files("train")
        except (OSError, ValueError) as error:
            self.not_run = dict.fromkeys(PROBES, f"there is nothing to train it on. {error}")
            return
        chosen = stratified_subset(files.labels, max_count)
        for name, features in self._features(files, chosen, _CLEAN).items():
            self._models[name] = fit_linear(features, files.labels[chosen])

    def predict(self, condition: str, index: Tensor) -> dict[str, Tensor]:
        """Returns each probe's probabilities for test images, NaN for those beyond the limit.

        Format and size of the file mean something only for the files as they are, or as all have passed them.

        Shape:
            - index: `[N]`, int64, positions in the list of test files
            - output: `[N]` each, float64
        """
        if not self._models:
            return {}
        files = self._data.files("test")
        chosen = stratified_subset(files.labels[index], self._max_count)
        result = {}
        for name, features in self._features(files, index[chosen], condition).items():
            result[name] = torch.full((len(index),), torch.nan, dtype=torch.float64)
            result[name][chosen] = predict_linear(self._models[name], features)
        return result

    def _features(self, files: Files, chosen: Tensor, condition: str) -> dict[str, list[Any]]:
        paths = [files.paths[i] for i in chosen.tolist()]
        functions = {n: f for n, f in self._functions.items() if n != "file" or condition in _AS_THEY_ARE}
        return _describe(functions, paths, (self._data.read(path, condition) for path in paths))


def shortcuts_of_sources(data: DetectorData, max_count: int, semantic: Callable[[Tensor], Any] | None) -> list[str]:
    """Returns a remark for each training source whose classes a probe tells apart, with what helps.

    A probe is fitted to four fifths of a source's images and scored on the rest, in turn.

    Args:
        data: Its training images.
        max_count: Images of each source that are looked at, at the most.
        semantic: Describes what an image shows; None where nothing can.
    """
    files, remarks = data.files("train"), []
    for source in dict.fromkeys(files.sources):
        places = torch.tensor([place for place, name in enumerate(files.sources) if name == source])
        places = places[stratified_subset(files.labels[places], max_count)]
        labels, paths = files.labels[places], [files.paths[i] for i in places.tolist()]
        if int(labels.bincount(minlength=2).min()) < _FOLDS:
            remarks.append(f"{source}: too few images of a class for the shortcut probes")
            continue
        features = _describe(_functions(semantic), paths, map(data.read, paths))
        found = {name: _cross_validated(columns, labels) for name, columns in features.items()}
        if told := {name: area for name, area in found.items() if area > _SHORTCUT}:
            areas = ", ".join(f"{name} {area:.2f}" for name, area in told.items())
            remedies = "; ".join(dict.fromkeys(_REMEDIES[name] for name in told))
            remarks.append(
                f"{source}: its classes can be told apart without a trace of a generator ({areas}): {remedies}"
            )
    return remarks


def _cross_validated(features: list[Any], labels: Tensor) -> float:
    from sklearn.model_selection import StratifiedKFold

    probability = torch.zeros(len(labels), dtype=torch.float64)
    for fitted, scored in StratifiedKFold(_FOLDS, shuffle=True, random_state=0).split(features, labels.numpy()):
        model = fit_linear([features[i] for i in fitted], labels[fitted])
        probability[scored] = predict_linear(model, [features[i] for i in scored])
    return float(binary_auroc(probability, labels))


def _functions(semantic: Callable[[Tensor], Any] | None) -> dict[str, Callable[[Path, Tensor], Any]]:
    functions: dict[str, Callable[[Path, Tensor], Any]] = {
        "file": file_features,
        "thumbnail": lambda path, image: thumbnail_features(image),
        "color": lambda path, image: color_features(image),
    }
    return functions if semantic is None else {**functions, "semantic": lambda path, image: semantic(image)}


def _describe(
    functions: dict[str, Callable[[Path, Tensor], Any]], paths: list[Path], images: Iterable[Tensor]
) -> dict[str, list[Any]]:
    features: dict[str, list[Any]] = {name: [] for name in functions}
    for path, image in zip(paths, images, strict=True):
        for name, function in functions.items():
            features[name].append(function(path, image))
    return features
