"""The shortcuts of a data set: trained on its training images, judged on the images that a detector was tested on."""

from collections.abc import Callable
from typing import Any

import torch
from sklearn.pipeline import Pipeline
from torch import Tensor

from callbacks.detector_report.evaluation import DetectorData, Files
from callbacks.detector_report.probe_features import (
    file_features,
    fit_linear,
    predict_linear,
    spread,
    thumbnail_features,
)

SHORTCUTS = ("file", "thumbnail", "semantic")

_CLEAN = "clean"


class Shortcuts:
    """Linear classifiers that look at a file's format and size, at its colours, and at what an image shows.

    They are trained when they are made, and so read the training images then.

    Args:
        data: Images to train and test on.
        most: Images to train on, and images to test on, at the most.
        semantic: Describes what an image shows; None where nothing can.
    """

    def __init__(self, data: DetectorData, most: int, semantic: Callable[[Tensor], Any] | None) -> None:
        self.not_run: dict[str, str] = {}
        self._data, self._most = data, most
        self._models: dict[str, Pipeline] = {}
        self._views: dict[str, Callable[[Tensor], Any]] = {"thumbnail": thumbnail_features}
        if semantic is None:
            self.not_run["semantic"] = "no semantic_weights are given"
        else:
            self._views["semantic"] = semantic
        if _CLEAN not in data.conditions:
            self.not_run["file"] = f"it looks at the files as they are, and {_CLEAN} is not among the conditions"
        try:
            files = data.files("train")
        except (OSError, ValueError) as error:
            self.not_run = dict.fromkeys(SHORTCUTS, f"there is nothing to train it on. {error}")
            return
        chosen = spread(files.labels, most)
        for name, features in self._features(files, chosen, _CLEAN).items():
            self._models[name] = fit_linear(features, files.labels[chosen])

    def judge(self, condition: str, index: Tensor) -> dict[str, Tensor]:
        """Returns each shortcut's probabilities for test images, NaN for those beyond the limit.

        Format and size of the file mean something for the files as they are alone.

        Shape:
            - index: [N], int64, positions in the list of test files
            - values of the result: [N], float64
        """
        if not self._models:
            return {}
        files = self._data.files("test")
        chosen = spread(files.labels[index], self._most)
        result = {}
        for name, features in self._features(files, index[chosen], condition).items():
            result[name] = torch.full((len(index),), torch.nan, dtype=torch.float64)
            result[name][chosen] = predict_linear(self._models[name], features)
        return result

    def _features(self, files: Files, chosen: Tensor, condition: str) -> dict[str, list[Any]]:
        features: dict[str, list[Any]] = {name: [] for name in SHORTCUTS if name in self._views}
        looks_at_files = condition == _CLEAN and "file" not in self.not_run
        if looks_at_files:
            features["file"] = []
        for i in chosen.tolist():
            image = self._data.read(files.paths[i], condition)
            for name, view in self._views.items():
                features[name].append(view(image))
            if looks_at_files:
                features["file"].append(file_features(files.paths[i]))
        return features
