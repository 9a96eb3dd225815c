"""What a detector is worth: scores by condition, size and format, and what shortcuts reach on the same images."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from rich import get_console
from torch import Tensor

from callbacks._display import require_positive, run_directory, tensorboard_loggers
from callbacks._tables import Row, gather, write_table
from callbacks.detector_report.evaluation import (
    DetectorData,
    Judgements,
    decision_threshold,
    image_rows,
    judgements,
    two_classes,
    worst_mistakes,
)
from callbacks.detector_report.figures import beside_residual, reliability_figure, roc_figure, tile
from callbacks.detector_report.probe_features import file_format, semantic_features
from callbacks.detector_report.scores import accuracy, score, slices
from callbacks.detector_report.shortcut_probes import SHORTCUTS, Shortcuts
from callbacks.detector_report.tables import markdown, remarks, report_table
from callbacks.em_dashboard import render
from lightning_modules.imaging import write_png

TABLE_NAME = "detector_report.csv"
MISTAKES_NAME = "worst_mistakes"

_LONGEST_NAME = 50  # letters of up to four bytes; file systems take 255 bytes
_LARGEST_SIDE = 512  # pixels of a mistake that are shown, from its middle


class DetectorReport(Callback):
    """Writes an honest account of `test`: `detector_report.csv`, `worst_mistakes/`, a table on the screen, TensorBoard.

    The CSV has a row for each condition of the test and each part of the images: all, by shorter side, by file format.
    Beside the detector's scores stand those of three *shortcuts*, linear classifiers trained on the training images,
    which look at nothing that a detector should look at: at format and size of the file (`file`); at mean colour and a
    thumbnail of 8×8 pixels (`thumbnail`); and at what an ImageNet network recognises (`semantic`). Where a shortcut
    comes near the detector on the same images (`accuracy_beside_shortcuts`), the data cannot tell whether the detector
    has learned more than it. `mirrored` counts the images that are smaller than a crop and were continued by their
    mirror image, `mirrored_positive` those of them that are generated: a seam that can give a class away.

    It takes what `test_step` returns, `{"probability", "label", "index", "weight": [B], "name": list[str]}`, one
    loader for each of the DataModule's `conditions`, and the DataModule's `files`, `read` and `mirrors`. Pictures show
    the module's `residual`, and the accuracy at its `threshold` is told, where it has them.

    Args:
        baseline_images: Images on which shortcuts are trained, and images on which they are tested, at the most.
        semantic_weights: File with weights of torchvision's `squeezenet1_0`, for the third shortcut; without, the
            report says that it was not run.
        num_mistakes: Worst mistakes to show.

    Example:
        >>> from lightning.pytorch import Trainer
        >>> trainer = Trainer(callbacks=[DetectorReport()], logger=False)
    """

    def __init__(self, baseline_images: int = 500, semantic_weights: str | None = None, num_mistakes: int = 16) -> None:
        require_positive(self, num_mistakes=num_mistakes)
        if baseline_images < 4:
            raise ValueError(f"DetectorReport: baseline_images must be at least 4, got {baseline_images}.")
        if semantic_weights is not None and not Path(semantic_weights).is_file():
            raise ValueError(f"DetectorReport: semantic_weights must be an existing file, got {semantic_weights!r}.")
        self.baseline_images = baseline_images
        self.semantic_weights = semantic_weights
        self.num_mistakes = num_mistakes
        self._directory = Path()
        self._shortcuts: Shortcuts | None = None
        self._rows: list[Row] = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Finds the directory, on every rank, checks that the data can be reported on, and trains the shortcuts."""
        self._directory = Path(run_directory(trainer) or trainer.default_root_dir)
        self._rows = []
        two_classes(self, trainer)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if missing := [name for name in ("conditions", "files", "read", "mirrors") if not hasattr(data, name)]:
            raise TypeError(
                f"DetectorReport needs a DataModule with conditions, files, read and mirrors, such as "
                f"GeneratedImagesDataModule; {type(data).__name__} has no {missing[0]}."
            )
        # now: weights or a training image that cannot be read must not be found out after an hour of testing
        if trainer.is_global_zero:
            rank_zero_info("training the shortcuts, to which the detector is compared")
            semantic = None if self.semantic_weights is None else semantic_features(self.semantic_weights)
            self._shortcuts = Shortcuts(data, self.baseline_images, semantic)

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
        self._rows += image_rows(self, f"{type(pl_module).__name__}.test_step", outputs, dataloader_idx)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Collects what all processes have seen."""
        self._rows = gather(self._rows)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes and prints."""
        rows, self._rows = self._rows, []
        shortcuts, self._shortcuts = self._shortcuts, None
        if shortcuts is None or not rows:  # not the first process, or nothing tested
            return
        data = cast(DetectorData, trainer.datamodule)  # type: ignore[attr-defined]
        judged = judgements(rows, data.conditions)
        rank_zero_info("testing the shortcuts")
        by_shortcut = {name: shortcuts.judge(name, one.index) for name, one in judged.items()}
        table = report_rows(data, judged, by_shortcut, decision_threshold(pl_module))
        write_table(table, self._directory / TABLE_NAME, list(table[0]))
        mistakes, pictures = self._write_mistakes(data, pl_module, next(iter(judged.values())))
        self._draw(trainer, data, judged, by_shortcut, pictures)
        lines = remarks(table, shortcuts.not_run, data.class_names)
        for logger in tensorboard_loggers(trainer):
            logger.experiment.add_text("test/report", markdown(table, lines, mistakes), trainer.global_step)
        console = get_console()  # that of the progress bar, which moves out of the way
        console.print(report_table(table))
        for line in (*lines, f"report: {self._directory / TABLE_NAME}"):
            console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _write_mistakes(
        self, data: DetectorData, pl_module: LightningModule, judged: Judgements
    ) -> tuple[list[Row], list[Tensor]]:
        """Writes the worst mistakes as pictures beside their residuals, with a table about them."""
        files, threshold = data.files("test"), decision_threshold(pl_module)
        rows, pictures = [], []
        for number, i in enumerate(worst_mistakes(judged, threshold, self.num_mistakes), 1):
            place, probability = int(judged.index[i]), float(judged.probability[i])
            label = data.class_names[int(judged.label[i])]
            pictures.append(_picture(data.read(files.paths[place]), pl_module))
            name = f"{number:02d}_{files.paths[place].stem[:_LONGEST_NAME]}.png"
            write_png(pictures[-1], self._directory / MISTAKES_NAME / name)
            rows.append({"picture": name, "path": files.names[place], "label": label, "probability": probability})
        table = self._directory / MISTAKES_NAME / f"{MISTAKES_NAME}.csv"
        write_table(rows, table, ["picture", "path", "label", "probability"])
        return rows, pictures

    def _draw(
        self,
        trainer: Trainer,
        data: DetectorData,
        judged: dict[str, Judgements],
        by_shortcut: dict[str, dict[str, Tensor]],
        pictures: list[Tensor],
    ) -> None:
        positive = data.class_names[1]
        curves = {name: (one.probability, one.label) for name, one in judged.items()}
        first = next(iter(judged))
        dashed = {
            f"{name} only, {first}": (probability[probability.isfinite()], judged[first].label[probability.isfinite()])
            for name, probability in by_shortcut[first].items()
        }
        images = {
            "roc": render(roc_figure(curves, dashed, positive)),
            "calibration": render(reliability_figure(curves, positive)),
        }
        for logger in tensorboard_loggers(trainer):
            for name, image in images.items():
                logger.experiment.add_image(f"test/{name}", image, trainer.global_step, dataformats="HWC")
            if pictures:
                logger.experiment.add_image(f"test/{MISTAKES_NAME}", tile(pictures), trainer.global_step)


def report_rows(
    data: DetectorData,
    judged: dict[str, Judgements],
    by_shortcut: dict[str, dict[str, Tensor]],
    threshold: float,
) -> list[Row]:
    """Returns the rows of the report; a score that does not exist is an empty string."""
    kinds = {int(i): file_format(data.files("test").paths[i]) for one in judged.values() for i in one.index}
    rows = []
    for condition, one in judged.items():
        formats, sizes = zip(*(kinds[i] for i in one.index.tolist()), strict=True)
        mirrored = torch.tensor([data.mirrors(height, width, condition) for width, height in sizes])
        for name, part in slices(sizes, formats).items():
            row = {"condition": condition, "slice": name, **score(one.probability[part], one.label[part], threshold)}
            row |= {"mirrored": int(mirrored[part].sum()), "mirrored_positive": int(one.label[part & mirrored].sum())}
            row |= _beside(one, by_shortcut[condition], part)
            rows.append({column: _entry(value) for column, value in row.items()})
    return rows


def _beside(judged: Judgements, by_shortcut: dict[str, Tensor], part: Tensor) -> Row:
    """Returns the shortcuts' scores on a part of the images, and the detector's accuracy on the same images."""
    row: Row = {"accuracy_beside_shortcuts": math.nan}
    for shortcut in SHORTCUTS:
        row |= {f"{shortcut}_{column}": math.nan for column in ("n", "accuracy", "auroc")}
    for shortcut, probability in by_shortcut.items():
        tested = part & probability.isfinite()  # the same for each of them
        scores = score(probability[tested], judged.label[tested])
        row |= {f"{shortcut}_{column}": scores[column] for column in ("n", "accuracy", "auroc")}
        row["accuracy_beside_shortcuts"] = accuracy(judged.probability[tested], judged.label[tested])
    return row


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
