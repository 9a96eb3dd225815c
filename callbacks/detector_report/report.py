"""Report of a detector's test: scores by condition, size and format, beside those of shortcut probes."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich import get_console
from torch import Tensor

from callbacks._display import run_directory, tensorboard_loggers
from callbacks._predictions import decision_threshold, prediction_lines, two_classes
from callbacks._tables import Line, gather, write_table
from callbacks.detector_report.evaluation import (
    DetectorData,
    Evaluation,
    evaluations,
    score,
    slices,
    top_losses,
    verdict_scores,
)
from callbacks.detector_report.figures import beside_residual, reliability_figure, roc_figure, tile
from callbacks.detector_report.probe_features import file_format, semantic_features
from callbacks.detector_report.shortcut_probes import PROBES, ShortcutProbes, shortcuts_of_sources
from callbacks.detector_report.tables import markdown, remarks, report_table
from callbacks.em_dashboard import render
from lightning_modules.detection.scores import accuracy
from lightning_modules.imaging import write_png

TABLE_NAME = "detector_report.csv"
LOSSES_NAME = "top_losses"

_NUM_TOP_LOSSES = 16
_LONGEST_NAME = 50  # letters of up to four bytes; file systems take 255 bytes
_LARGEST_SIDE = 512  # pixels of an image that are shown, from its middle
_NO_VERDICTS = dict.fromkeys(("unsure", "accuracy_sure", "accuracy_verdict"), math.nan)


class DetectorReport(Callback):
    """Writes an honest account of `test`: `detector_report.csv`, `top_losses/`, a table on the screen, TensorBoard.

    The CSV has a line for each condition of the test and each part of the images: all, by shorter side, by file format.
    Beside the detector's scores are those of four *shortcut probes*, linear classifiers trained on the same training
    images, which look at nothing that a detector should look at: at format and size of the file (`file`); at a
    thumbnail of 8×8 pixels (`thumbnail`); at the statistics of the colours (`color`); and at what an ImageNet network
    recognises (`semantic`). `file_wrong_accuracy` is the detector's accuracy on the images that the probe of the file
    mistakes, and so on. Where a probe comes near the detector on the same images (`accuracy_beside_probes`), the data
    cannot show whether the detector has learned more than it. `mirrored` counts the images that are smaller than a crop
    and were continued by their mirror image, `mirrored_positive` those of them that are generated: a seam that can give
    a class away. `unsure` is the share of such verdicts, `accuracy_sure` the accuracy of the others, and
    `accuracy_verdict` that of all, where unsure counts as wrong.

    Before a fit the probes are fitted to each training source, and what they tell apart is named with its remedy.

    It takes what `test_step` returns, `{"probability", "label", "index", "weight": [B], "name": list[str]}`, one
    loader for each of the DataModule's `conditions`, and the DataModule's `files`, `read` and `mirrors`. Pictures show
    the module's `residual`, and the CSV the accuracy at its `threshold`, where it has them.

    Args:
        probe_images: Images on which probes are trained, and images on which they are tested, at the most.
        semantic_weights: File with weights of torchvision's `squeezenet1_0`, for the third probe; without, the report
            notes that it was not run.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DetectorReport()], logger=False)
    """

    def __init__(self, probe_images: int = 500, semantic_weights: str | None = None) -> None:
        if probe_images < 4:
            raise ValueError(f"DetectorReport: probe_images must be at least 4, got {probe_images}.")
        if semantic_weights is not None and not Path(semantic_weights).is_file():
            raise ValueError(f"DetectorReport: semantic_weights must be an existing file, got {semantic_weights!r}.")
        self.probe_images = probe_images
        self.semantic_weights = semantic_weights
        self._directory = Path()
        self._probes: ShortcutProbes | None = None
        self._lines: list[Line] = []

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Names the sources whose classes differ in more than a generator's traces, before hours are spent on them."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if trainer.is_global_zero and hasattr(data, "files") and hasattr(data, "read"):
            for remark in shortcuts_of_sources(data, self.probe_images, self._semantic()):
                rank_zero_warn(remark)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory, on every rank, checks that the data can be reported on, and trains the probes."""
        self._directory = Path(run_directory(trainer) or trainer.default_root_dir)
        self._lines = []
        two_classes(self, trainer)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if missing := [name for name in ("conditions", "files", "read", "mirrors") if not hasattr(data, name)]:
            raise TypeError(
                f"DetectorReport needs a DataModule with conditions, files, read and mirrors, such as "
                f"GeneratedImagesDataModule; {type(data).__name__} has no {missing[0]}."
            )
        # now: weights or a training image that cannot be read must not be found out after an hour of testing
        if trainer.is_global_zero:
            rank_zero_info("training the shortcut probes, to which the detector is compared")
            self._probes = ShortcutProbes(data, self.probe_images, self._semantic())

    def _semantic(self) -> Callable[[Tensor], Any] | None:
        return None if self.semantic_weights is None else semantic_features(self.semantic_weights)

    def on_test_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keeps a few numbers an image."""
        self._lines += prediction_lines(self, f"{type(pl_module).__name__}.test_step", outputs, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects what all processes have seen."""
        self._lines = gather(self._lines)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints."""
        lines, self._lines = self._lines, []
        probes, self._probes = self._probes, None
        if probes is None or not lines:  # not the first process, or nothing tested
            return
        data = cast(DetectorData, trainer.datamodule)  # type: ignore[attr-defined]
        evaluated = evaluations(lines, data.conditions)
        rank_zero_info("testing the shortcut probes")
        by_probe = {name: probes.predict(name, one.index) for name, one in evaluated.items()}
        table = report_lines(data, evaluated, by_probe, decision_threshold(pl_module))
        write_table(table, self._directory / TABLE_NAME, list(table[0]))
        losses, pictures = self._write_top_losses(data, pl_module, next(iter(evaluated.values())))
        self._draw(trainer, data, evaluated, by_probe, pictures)
        notes = remarks(table, probes.not_run, data.class_names)
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text("test/report", markdown(table, notes, losses), trainer.global_step)
        console = get_console()  # that of the progress bar, which moves out of the way
        console.print(report_table(table))
        for line in (*notes, f"report: {self._directory / TABLE_NAME}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _write_top_losses(
        self, data: DetectorData, pl_module: LightningModule, evaluation: Evaluation
    ) -> tuple[list[Line], list[Tensor]]:
        """Writes the top losses as pictures beside their residuals, with a table about them."""
        files, threshold = data.files("test"), decision_threshold(pl_module)
        lines, pictures = [], []
        for number, i in enumerate(top_losses(evaluation, threshold, _NUM_TOP_LOSSES), 1):
            index, probability = int(evaluation.index[i]), float(evaluation.probability[i])
            label = data.class_names[int(evaluation.label[i])]
            pictures.append(_picture(data.read(files.paths[index]), pl_module))
            name = f"{number:02d}_{files.paths[index].stem[:_LONGEST_NAME]}.png"
            write_png(pictures[-1], self._directory / LOSSES_NAME / name)
            lines.append({"picture": name, "path": files.names[index], "label": label, "probability": probability})
        table = self._directory / LOSSES_NAME / f"{LOSSES_NAME}.csv"
        write_table(lines, table, ["picture", "path", "label", "probability"])
        return lines, pictures

    def _draw(
        self,
        trainer: Trainer,
        data: DetectorData,
        evaluated: dict[str, Evaluation],
        by_probe: dict[str, dict[str, Tensor]],
        pictures: list[Tensor],
    ) -> None:
        positive = data.class_names[1]
        curves = {name: (one.probability, one.label) for name, one in evaluated.items()}
        first, evaluation = next(iter(evaluated.items()))
        dashed = {
            f"{name} only, {first}": (probability[probability.isfinite()], evaluation.label[probability.isfinite()])
            for name, probability in by_probe[first].items()
        }
        images = {
            "roc": render(roc_figure(curves, dashed, positive)),
            "calibration": render(reliability_figure(curves, positive)),
        }
        for logger in tensorboard_loggers(trainer):
            for name, image in images.items():
                logger.experiment.add_image(f"test/{name}", image, trainer.global_step, dataformats="HWC")
            if pictures:
                logger.experiment.add_image(f"test/{LOSSES_NAME}", tile(pictures), trainer.global_step)


def report_lines(
    data: DetectorData,
    evaluated: dict[str, Evaluation],
    by_probe: dict[str, dict[str, Tensor]],
    threshold: float,
) -> list[Line]:
    """Returns the lines of the report; a score that does not exist is an empty string."""
    kinds = {int(i): file_format(data.files("test").paths[i]) for one in evaluated.values() for i in one.index}
    lines = []
    for condition, one in evaluated.items():
        formats, sizes = zip(*(kinds[i] for i in one.index.tolist()), strict=True)
        mirrored = torch.tensor([data.mirrors(height, width, condition) for width, height in sizes])
        for name, part in slices(sizes, formats).items():
            line: Line = {"condition": condition, "slice": name}
            line |= score(one.probability[part], one.label[part], threshold)
            line |= _NO_VERDICTS if one.verdict is None else verdict_scores(one.verdict[part], one.label[part])
            line |= {"mirrored": int(mirrored[part].sum()), "mirrored_positive": int(one.label[part & mirrored].sum())}
            line |= _beside(one, by_probe[condition], part)
            lines.append({column: _entry(value) for column, value in line.items()})
    return lines


def _beside(evaluation: Evaluation, by_probe: dict[str, Tensor], part: Tensor) -> Line:
    """Returns the probes' scores on a part of the images, and the detector's accuracy on the same images."""
    line: Line = {"accuracy_beside_probes": math.nan}
    for name in PROBES:
        line |= {f"{name}_{column}": math.nan for column in ("n", "accuracy", "auroc", "wrong_accuracy")}
    for name, probability in by_probe.items():
        tested = part & probability.isfinite()  # the same for each of them
        scores = score(probability[tested], evaluation.label[tested])
        line |= {f"{name}_{column}": scores[column] for column in ("n", "accuracy", "auroc")}
        wrong = tested & ((probability > 0.5) != (evaluation.label == 1))
        line[f"{name}_wrong_accuracy"] = float(accuracy(evaluation.probability[wrong], evaluation.label[wrong]))
        line["accuracy_beside_probes"] = float(accuracy(evaluation.probability[tested], evaluation.label[tested]))
    return line


def _picture(image: Tensor, pl_module: LightningModule) -> Tensor:
    height, width = (min(length, _LARGEST_SIDE) for length in image.shape[1:])
    top, left = (image.shape[1] - height) // 2, (image.shape[2] - width) // 2
    shown = image[:, top : top + height, left : left + width].float() / 255
    if not hasattr(pl_module, "residual"):
        return shown
    try:
        with torch.no_grad():
            residual = pl_module.residual(shown[None].to(pl_module.device))[0]  # type: ignore[operator]
    except ValueError:  # an image smaller than a patch has no residual, and must not end the report after the test
        return shown
    return beside_residual(shown, residual.float().cpu())


def _entry(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else round(value, 6)
