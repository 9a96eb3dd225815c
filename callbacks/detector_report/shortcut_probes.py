"""Shortcut probes: linear classifiers that look at nothing that a detector should look at."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from sklearn.pipeline import Pipeline
from torch import Tensor

from callbacks.detector_report.evaluation import DetectorData, Files
from callbacks.detector_report.probe_features import (
    file_features,
    fit_linear,
    predict_linear,
    stratified_subset,
    thumbnail_features,
)

PROBES = ("file", "thumbnail", "semantic")

_CLEAN = "clean"


class ShortcutProbes:
    """Probes of a file's format and size, of its colours, and of what an image shows.

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
        self._functions: dict[str, Callable[[Path, Tensor], Any]] = {
            "file": lambda path, image: file_features(path),
            "thumbnail": lambda path, image: thumbnail_features(image),
        }
        if semantic is None:
            self.not_run["semantic"] = "no semantic_weights are given"
        else:
            self._functions["semantic"] = lambda path, image: semantic(image)
        if _CLEAN not in data.conditions:
            self.not_run["file"] = f"it looks at the files as they are, and {_CLEAN} is not among the conditions"
            del self._functions["file"]
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

        Format and size of the file mean something only for the files as they are.

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
        functions = {name: f for name, f in self._functions.items() if name != "file" or condition == _CLEAN}
        features: dict[str, list[Any]] = {name: [] for name in functions}
        for i in chosen.tolist():
            image = self._data.read(files.paths[i], condition)
            for name, function in functions.items():
                features[name].append(function(files.paths[i], image))
        return features
