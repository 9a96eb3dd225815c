"""Verdicts: unsure where they change or nothing explains the image, alike in any order, and one line a file."""

import csv
import io
import math
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules import (
    FullResolutionResNet,
    GeneratedImageDetector,
    GraphDiffusion,
    NeighborDifferences,
    RawPixels,
    RestorationResidual,
    TraceNetwork,
)
from lightning_modules.checkpoints.file import CheckpointError
from lightning_modules.cli import main
from lightning_modules.detection import CHANGES, UNSURE, Calibration, changed_views, decide
from lightning_modules.detection.inputs import DetectorInput

CROP = 32


class Grain(DetectorInput):
    """What a blur takes away: nothing of a smooth image."""

    def featurize(self, images: torch.Tensor) -> torch.Tensor:
        return (images - torch.nn.functional.avg_pool2d(images, 3, 1, 1, count_include_pad=False)).abs()


class Mean(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.mean((2, 3))


def detector(auroc: float = 0.9) -> GeneratedImageDetector:
    """Takes bright images for generated, and grainy ones too, whose grain goes when they are saved again."""
    module = GeneratedImageDetector([RawPixels(1.0), Grain()], Mean(), num_directions=2)
    module.head.weight.data = torch.tensor([[30.0, 0, 0, 100.0, 0, 0]])
    module.head.bias.data.zero_()
    module.crops.copy_(torch.tensor([2, CROP]))
    module.calibration.auroc.fill_(auroc)
    return module.eval()


def pixels(level: int, grain: int = 0, seed: int = 0) -> np.ndarray:
    noise = np.random.default_rng(seed).integers(-grain, grain + 1, (70, 60, 3)) if grain else 0
    return np.clip(level + noise + np.zeros((70, 60, 3)), 0, 255).astype(np.uint8)


IMAGES = {"bright": pixels(200), "dark": pixels(20), "grainy": pixels(110, 12)}
LABELS = {"bright": "generated", "dark": "photographic", "grainy": "unsure"}


class TestDecisions:
    def test_a_verdict_that_changes_is_unsure_and_the_change_is_named(self) -> None:
        logits = torch.tensor([[2.0] * 5, [2.0, 1, -1, 1, -1], [-2.0] * 5, [-2.0] * 5])
        ood_score = torch.tensor([-1.0, -1.0, 0.5, torch.nan])
        verdict, reasons = decide(logits, Calibration(), ood_score)
        assert verdict.tolist() == [1, UNSURE, UNSURE, 0]
        assert reasons == ["", "changes under jpeg 75; changes under blur 0.7", "unlike either class", ""]

    def test_the_threshold_is_that_of_the_calibration(self) -> None:
        calibration = Calibration()
        calibration.boundary.fill_(4.0)
        verdict, _ = decide(torch.tensor([[2.0] * 5]), calibration, torch.tensor([torch.nan]))
        assert verdict.tolist() == [0]

    def test_what_is_too_close_to_the_threshold_is_unsure(self) -> None:
        calibration = Calibration()
        calibration.temperature.fill_(2.0)
        calibration.boundary.fill_(1.0)
        edge = 2 * math.log(3)  # at temperature 2 the odds are three to one
        logits = 1 + torch.tensor([edge + 0.01, edge - 0.01, 0.01 - edge, -edge - 0.01])[:, None].expand(-1, 5)
        verdict, reasons = decide(logits, calibration, torch.full((4,), torch.nan))
        assert verdict.tolist() == [1, UNSURE, UNSURE, 0]
        assert reasons == ["", "too close to the threshold", "too close to the threshold", ""]

    def test_at_chance_it_is_unsure_of_everything(self) -> None:
        logit = torch.randn(400, generator=torch.Generator().manual_seed(0)) * 5
        calibration = Calibration()
        calibration.fit(logit, torch.arange(400) % 2)
        assert calibration.at_chance
        verdict, _ = decide(logit[:, None].expand(-1, 5), calibration, torch.full((400,), torch.nan))
        assert (verdict == UNSURE).float().mean() > 0.99

    def test_the_changes_are_those_that_are_named(self) -> None:
        crops = torch.from_numpy(pixels(100, 40)[:CROP, :CROP]).permute(2, 0, 1)[None]
        views = changed_views(crops)
        assert len(views) == len(CHANGES)
        assert [view.shape[-1] for view in views] == [CROP, CROP, 24, CROP]
        file = io.BytesIO()
        Image.fromarray(crops[0].permute(1, 2, 0).numpy()).save(file, "JPEG", quality=75)
        assert torch.equal(views[1][0], torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))

    @pytest.mark.parametrize("name", IMAGES)
    def test_of_an_image(self, name: str) -> None:
        module = detector()
        verdict = module.verdict(IMAGES[name])
        assert verdict.label == LABELS[name]
        assert bool(verdict.reason) == (verdict.label == "unsure")
        assert verdict.probability == pytest.approx(module.predict_image(IMAGES[name]), abs=1e-6)


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(GeneratedImageDetector, "load_from_checkpoint", lambda *args, **kwargs: detector())
    return tmp_path / "any.ckpt"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos" / "sub").mkdir(parents=True)
    for name, image in IMAGES.items():
        Image.fromarray(image).save(tmp_path / "photos" / f"{name}.png")
    Image.fromarray(pixels(5)[:3]).save(tmp_path / "photos" / "sub" / "small, and ü.png")
    return tmp_path / "photos"


def rows(out: Path) -> dict[str, dict[str, str]]:
    with (out / "predictions.csv").open(newline="", encoding="utf-8") as file:
        return {row["path"]: row for row in csv.DictReader(file)}


class TestCommand:
    def test_each_image_has_a_line_with_a_number(self, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
        main(["detect", str(folder), "-o", str(tmp_path / "out"), "--model", str(checkpoint)])
        table = rows(tmp_path / "out")
        assert list(table) == ["bright.png", "dark.png", "grainy.png", "sub/small, and ü.png"]
        assert {name: table[f"{name}.png"]["label"] for name in IMAGES} == LABELS
        assert all(0 <= float(row["probability"]) <= 1 for row in table.values())
        assert list(table["dark.png"])[:3] == ["path", "label", "probability"]

    def test_verdicts_depend_on_no_other_file(self, folder: Path, checkpoint: Path, tmp_path: Path) -> None:
        words = ["--model", str(checkpoint)]
        main(["detect", str(folder), "-o", str(tmp_path / "all"), *words])
        names = [str(folder / f"{name}.png") for name in ("grainy", "bright")]
        main(["detect", *names, "-o", str(tmp_path / "two"), *words])
        every, two = rows(tmp_path / "all"), rows(tmp_path / "two")
        assert list(two) == names
        for name in names:
            assert {**two[name], "path": ""} == {**every[Path(name).name], "path": ""}

    def test_one_bad_file_ends_nothing(
        self, folder: Path, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (folder / "broken.png").write_bytes(b"no image")
        with pytest.raises(SystemExit) as ended:
            main(["detect", str(folder), "-o", str(tmp_path / "out"), "--model", str(checkpoint)])
        assert ended.value.code == 1
        assert len(rows(tmp_path / "out")) == 4
        said = capsys.readouterr().err
        assert "1 have no verdict:" in said
        assert "broken.png" in said

    def test_what_is_worth_little_is_said(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(GeneratedImageDetector, "load_from_checkpoint", lambda *a, **k: detector(0.52))
        (tmp_path / "photos").mkdir()
        for number in range(12):
            Image.fromarray(pixels(10 + number)).save(tmp_path / "photos" / f"{number}.png")
        main(["detect", str(tmp_path / "photos"), "-o", str(tmp_path / "out"), "--model", "x.ckpt"])
        said = capsys.readouterr().err
        assert "AUROC of 0.52: it is at chance" in said
        assert "all 12 images are labelled photographic" in said

    @pytest.mark.parametrize(
        ("words", "message"),
        [
            (["{folder}", "-o", "{out}"], "no weights come with this package"),
            (["{folder}", "-o", "{out}", "--model", "nowhere.ckpt"], "nowhere.ckpt"),
            (["{folder}/nothing", "-o", "{out}", "--model", "x.ckpt"], "nothing: no such file"),
            (["{folder}", "-o", "{folder}/dark.png", "--model", "x.ckpt"], "dark.png is a file: name a folder"),
        ],
    )
    def test_what_is_refused(
        self, folder: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        with pytest.raises(SystemExit) as ended:
            main(["detect", *(word.format(folder=folder, out=tmp_path / "out") for word in words)])
        assert ended.value.code == 1
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1
        assert not (tmp_path / "out").exists()


class Inverted(RawPixels):
    """One of the user's own."""


class Noisy(DetectorInput):
    """Whose argument is nowhere to be found."""

    def __init__(self, sigma: float) -> None:
        super().__init__()

    def featurize(self, images: torch.Tensor) -> torch.Tensor:
        return images


class TestBuiltInPython:
    """The command opens what was trained without it."""

    @staticmethod
    def saved(path: Path, *parts: object) -> GeneratedImageDetector:
        module = GeneratedImageDetector(*parts)  # type: ignore[arg-type]
        module.crops.copy_(torch.tensor([2, CROP]))
        trainer = L.Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
        trainer.strategy.connect(module)
        trainer.save_checkpoint(path)
        return module.eval()

    @pytest.mark.parametrize(
        "make",
        [
            lambda: [[NeighborDifferences(3, 5.0)]],
            lambda: [[RestorationResidual(scale=10.0), NeighborDifferences(), RawPixels()]],
            lambda: [None, TraceNetwork(3, (8, 16), (1, 2), "group")],
            lambda: [[RawPixels(2.0), RawPixels()], FullResolutionResNet(6, "resnet18", "group")],
        ],
        ids=["differences", "three", "narrow", "resnet"],
    )
    def test_whatever_parts_it_has(self, folder: Path, tmp_path: Path, make) -> None:
        module = self.saved(tmp_path / "any.ckpt", *make())
        image = str(folder / "grainy.png")
        main(["detect", image, "-o", str(tmp_path / "out"), "--model", str(tmp_path / "any.ckpt")])
        found = float(rows(tmp_path / "out")[image]["probability"])
        assert found == pytest.approx(module.predict_image(image), abs=1e-6)

    def test_what_a_caller_has_to_bring(self, tmp_path: Path) -> None:
        path = tmp_path / "any.ckpt"
        for inputs in ([Inverted()], [Noisy(0.1)], [RestorationResidual(GraphDiffusion(patch_size=5))]):
            module = self.saved(path, [*inputs, RawPixels()])
            with pytest.raises(CheckpointError, match=r"any\.ckpt"):
                GeneratedImageDetector.load_from_checkpoint(path)
            loaded = GeneratedImageDetector.load_from_checkpoint(path, inputs=[*inputs, RawPixels()]).eval()
            assert loaded.predict_image(IMAGES["grainy"]) == module.predict_image(IMAGES["grainy"])
        self.saved(path, [Inverted()])
        loaded = GeneratedImageDetector.load_from_checkpoint(path, allow=[__name__])
        assert type(loaded.inputs[0]).__qualname__ == "Inverted"


def test_prediction_and_command_agree(folder: Path, tmp_path: Path) -> None:
    from callbacks import PredictionWriter
    from datamodules import GeneratedImagesDataModule

    quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[PredictionWriter(str(tmp_path / "out"))], **quiet)
    data = GeneratedImagesDataModule(str(folder), crop_size=CROP, eval_crops=2, batch_size=3)
    module = detector()
    trainer.predict(module, data)
    for path, row in rows(tmp_path / "out").items():
        expected = module.verdict(folder / path)
        assert (row["label"], row["reason"]) == (expected.label, expected.reason)
        assert float(row["probability"]) == pytest.approx(expected.probability, abs=1e-6)


def test_a_checkpoint_of_before_has_no_area(tmp_path: Path) -> None:
    state = detector().state_dict()
    del state["calibration.auroc"]
    module = detector()
    module.load_state_dict(state)
    assert not module.calibration.at_chance
    assert module.warning is None


def test_it_is_calibrated_on_sources_that_are_not_trained_on() -> None:
    from lightning_modules.detection import PredictionBuffer

    buffer = PredictionBuffer()
    count = torch.arange(40)
    unseen = count >= 20
    label = count % 2
    logit = torch.where(unseen, 1.0 - 2 * label, 2.0 * label - 1)  # wrong on what is not trained on
    buffer.update(count, logit, label, torch.zeros(40, 2), torch.ones(40), unseen)
    seen = buffer.compute()
    assert torch.equal(seen.calibrating.logit, seen.logit[20:])
    calibration = Calibration()
    calibration.fit(seen.calibrating.logit, seen.calibrating.label)
    assert float(calibration.auroc) == 0
    assert calibration.at_chance
    assert seen.select(count < 21).calibrating.label.shape == (21,), "one class: nothing to calibrate by"
