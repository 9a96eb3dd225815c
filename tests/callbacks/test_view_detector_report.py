"""DetectorReport: scores against other libraries, probes that find what is planted, files and pictures."""

import csv
import io
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detector_runs import Stub, module, paint, trainer, two_processes
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from rich.console import Console
from sklearn.metrics import average_precision_score, roc_auc_score
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import DetectorReport
from callbacks.detector_report.evaluation import Evaluation, score, slices, top_losses
from callbacks.detector_report.figures import beside_residual, reliability, tile
from callbacks.detector_report.probe_features import (
    file_features,
    fit_linear,
    predict_linear,
    semantic_features,
    stratified_subset,
    thumbnail_features,
)
from callbacks.detector_report.shortcut_probes import shortcuts_of_sources
from callbacks.detector_report.tables import report_table
from lightning_modules import RestorationResidual
from lightning_modules.detection.calibration import best_threshold
from lightning_modules.detection.scores import accuracy
from lightning_modules.imaging import read_image

CONDITIONS = ["clean", "jpeg 50", "rescale 0.5"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class TestScores:
    @pytest.fixture(params=[2, 40])
    def evaluated(self, request: pytest.FixtureRequest) -> tuple[torch.Tensor, torch.Tensor]:
        """Probabilities, many of which are equal, or almost none."""
        label = torch.randint(0, 2, (61,), generator=generator())
        probability = torch.sigmoid(label + 2 * torch.randn(61, generator=generator(1), dtype=torch.float64))
        return (probability * 2**request.param).round() / 2**request.param, label

    def test_equal_scikit_learn(self, evaluated: Any) -> None:
        probability, label = evaluated
        scores = score(probability, label, threshold=0.3)
        assert scores["auroc"] == pytest.approx(roc_auc_score(label, probability), abs=1e-6)
        assert scores["average_precision"] == pytest.approx(average_precision_score(label, probability), abs=1e-6)
        assert scores["accuracy"] == np.mean((probability.numpy() > 0.5) == label.numpy())
        assert scores["accuracy_at_threshold"] == np.mean((probability.numpy() > 0.3) == label.numpy())
        assert (scores["n"], scores["positive"]) == (61, int(label.sum()))

    def test_the_best_threshold_is_the_best_of_all(self, evaluated: Any) -> None:
        probability, label = evaluated
        best, where = map(float, best_threshold(probability, label, neutral=0.5))
        tried = torch.cat([torch.linspace(0, 1, 1001, dtype=torch.float64), probability, probability - 1e-9])
        assert best == max(accuracy(probability, label, float(t)) for t in tried)
        assert accuracy(probability, label, where) == best

    @pytest.mark.parametrize(
        ("probability", "label"), [([0.0, 0.0], [1, 1]), ([1.0, 1.0], [0, 0]), ([0.0, 1.0], [0, 1])]
    )
    def test_thresholds_at_the_ends(self, probability: list[float], label: list[int]) -> None:
        evaluated = torch.tensor(probability), torch.tensor(label)
        best, where = map(float, best_threshold(*evaluated, neutral=0.5))
        assert best == 1
        assert accuracy(*evaluated, where) == 1

    def test_calibration_error_of_a_known_case(self) -> None:
        """Bins 0.2 and 0.8, of which the first is right and the second off by 0.3."""
        probability, label = torch.tensor([0.2] * 10 + [0.8] * 10), torch.tensor([1, 1] + [0] * 8 + [1] * 5 + [0] * 5)
        assert score(probability, label)["ece"] == pytest.approx(0.15)
        said, true, count = reliability(probability, label)
        assert count.tolist() == [0, 0, 10, 0, 0, 0, 0, 0, 10, 0]
        assert (float(said[8]), float(true[8]), float(true[2])) == pytest.approx((0.8, 0.5, 0.2))

    def test_one_class_has_an_accuracy_and_no_ranking(self) -> None:
        scores = score(torch.tensor([0.2, 0.8]), torch.tensor([1, 1]))
        assert scores["accuracy"] == 0.5
        assert math.isnan(scores["auroc"])
        assert math.isnan(scores["average_precision"])

    def test_slices_cover_all_images_once(self) -> None:
        sizes = [(63, 900), (512, 512), (640, 480), (4000, 3000), (64, 64)]
        parts = slices(sizes, ["PNG", "JPEG", "JPEG", "JPEG", "PNG"])
        assert list(parts) == [
            "all", "side 0 to 63", "side 64 to 127", "side 256 to 511", "side 512 to 1023", "side 1024 and more",
            "format JPEG", "format PNG",
        ]  # fmt: skip
        for kind in ("side", "format"):
            assert sum(part.int() for name, part in parts.items() if name.startswith(kind)).tolist() == [1] * 5

    def test_the_top_losses_come_first_and_are_mistakes(self) -> None:
        evaluation = Evaluation(
            torch.arange(5), torch.tensor([0.1, 0.9, 0.6, 0.45, 0.02]).double(), torch.tensor([0, 0, 0, 1, 1])
        )
        assert top_losses(evaluation, 0.5, 9) == [4, 1, 2, 3]
        assert top_losses(evaluation, 0.5, 2) == [4, 1]
        assert top_losses(evaluation, 0.4, 9) == [4, 1, 2]


class TestShortcutProbes:
    def labelled(self, count: int = 40) -> torch.Tensor:
        return torch.arange(count) % 2

    def test_a_fixed_size_is_found_among_sizes_on_both_sides_of_it(self, tmp_path: Path) -> None:
        features = []
        for i, label in enumerate(self.labelled().tolist()):
            size = (64, 64) if label else ((49 + i, 64) if i % 4 else (64, 91 - i))
            paint(tmp_path / f"{i}.png", 0, size)
            features.append(file_features(tmp_path / f"{i}.png", read_image(tmp_path / f"{i}.png")))
        probability = predict_linear(fit_linear(features, self.labelled()), features)
        assert accuracy(probability, self.labelled()) == 1

    def test_format_and_bytes_are_found(self, tmp_path: Path) -> None:
        features = []
        for i, label in enumerate(self.labelled(20).tolist()):
            path = tmp_path / f"{i}.{'jpg' if label else 'png'}"
            paint(path, 0, (40, 40), i)
            features.append(file_features(path, read_image(path)))
        assert {feature["format"] for feature in features} == {"JPEG", "PNG"}
        model = fit_linear(features[:10], self.labelled(10))
        assert accuracy(predict_linear(model, features[10:]), self.labelled(10)) == 1

    def test_thumbnails_are_means_of_blocks(self) -> None:
        image = torch.randint(0, 256, (3, 32, 16), dtype=torch.uint8, generator=generator())
        features = thumbnail_features(image)
        assert features[:3] == pytest.approx((image / 255).mean((1, 2)).numpy(), abs=1e-6)
        blocks = image.unflatten(1, (8, 4)).unflatten(3, (8, 2)).double().mean((2, 4)) / 255
        assert features[3:] == pytest.approx(blocks.flatten().numpy())
        assert thumbnail_features(image[:, :1, :1]).shape == (195,)

    def test_semantic_features_look_at_the_middle_reduced(self, tmp_path: Path) -> None:
        from torchvision.models import squeezenet1_0

        torch.manual_seed(0)
        network = squeezenet1_0(weights=None).eval()
        torch.save(network.state_dict(), tmp_path / "weights.pth")
        features = semantic_features(str(tmp_path / "weights.pth"))
        image = torch.randint(0, 256, (3, 256, 300), dtype=torch.uint8, generator=generator())
        result = features(image)
        mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
        crop = (image[:, 16:240, 38:262] / 255 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            assert result == pytest.approx(network.features(crop[None]).mean((0, 2, 3)).numpy(), rel=1e-3, abs=1e-5)
        assert features(image[:, :1, :1]).shape == (512,)

    @pytest.mark.parametrize(
        ("counts", "max_count", "expected"),
        [
            ((100, 100), 30, (15, 15)),
            ((100, 4), 30, (26, 4)),
            ((3, 100), 31, (3, 28)),
            ((5, 6), 30, (5, 6)),
        ],
    )
    def test_a_part_of_the_images_has_both_classes(self, counts: Any, max_count: int, expected: Any) -> None:
        labels = torch.tensor([0] * counts[0] + [1] * counts[1])
        chosen = stratified_subset(labels, max_count)
        assert len(chosen.unique()) == len(chosen)
        assert tuple(labels[chosen].bincount().tolist()) == expected


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Red is low in photographs and high in generated images; two test images are the wrong way round."""
    for i in range(8):
        paint(tmp_path / "data" / "train" / "photographic" / f"{i}.png", 40 + i, seed=i)
        paint(tmp_path / "data" / "train" / "generated" / f"{i}.png", 200 + i, seed=20 + i)
    for i in range(5):
        red = 230 if i == 3 else 30
        paint(
            tmp_path / "data" / "test" / "photographic" / f"{i}.{'png' if i else 'jpg'}", red, (70 * (i % 2) + 20, 30)
        )
        paint(tmp_path / "data" / "test" / "generated" / f"ü {i}.png", 20 if i == 1 else 220, seed=40 + i)
    return tmp_path / "data"


def table(folder: Path) -> list[dict[str, str]]:
    with (folder / "detector_report.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


class TestReport:
    def test_every_condition_and_part_has_a_line(self, root: Path, tmp_path: Path, capsys: Any) -> None:
        trainer(tmp_path, DetectorReport()).test(Stub(), module(root, conditions=CONDITIONS), verbose=False)
        lines = table(tmp_path)
        parts = ["all", "side 0 to 63", "format JPEG", "format PNG"]
        assert [(line["condition"], line["slice"]) for line in lines] == [
            (c, part) for c in CONDITIONS for part in parts
        ]
        assert [line["n"] for line in lines[:4]] == ["10", "10", "1", "9"]
        assert float(lines[0]["accuracy"]) == pytest.approx(0.8)
        assert float(lines[4]["auroc"]) == pytest.approx(
            roc_auc_score([0] * 5 + [1] * 5, [3, 3, 3, 9, 3, 8, 2, 8, 8, 8])
        )
        assert lines[2]["auroc"] == ""  # one image
        # The thumbnail has the red too, and the same mistakes: it must come out as good as the detector.
        assert float(lines[0]["thumbnail_accuracy"]) == pytest.approx(0.8)
        assert lines[0]["thumbnail_n"] == "10"
        assert lines[0]["file_accuracy"] != ""
        assert lines[4]["file_accuracy"] == lines[0]["semantic_accuracy"] == ""
        printed = capsys.readouterr().out
        assert "the shortcut probe semantic was not run: no semantic_weights are given" in printed
        assert "thumbnail by itself reaches an accuracy of 0.800, the detector 0.800 on the same images" in printed
        assert "jpeg 50" in printed

    def test_top_losses_are_shown_with_their_residuals(self, root: Path, tmp_path: Path) -> None:
        trainer(tmp_path, DetectorReport()).test(Stub(), module(root, conditions=CONDITIONS), verbose=False)
        folder = tmp_path / "top_losses"
        with (folder / "top_losses.csv").open(newline="", encoding="utf-8") as file:
            lines = list(csv.DictReader(file))
        assert [line["path"] for line in lines] == ["test/generated/ü 1.png", "test/photographic/3.png"]
        assert [line["label"] for line in lines] == ["generated", "photographic"]
        picture = np.asarray(Image.open(folder / lines[0]["picture"]))
        source = np.asarray(Image.open(root / lines[0]["path"]))
        assert np.array_equal(picture[:, :20], source)
        residual = source - source.mean((0, 1))
        corner = np.argmax(residual[..., 1]), np.argmin(residual[..., 1])
        shown = picture[:, 20:, 1].flatten()
        assert shown[corner[0]] > 230
        assert shown[corner[1]] < 25
        assert len(list(folder.glob("*.png"))) == 2

    def test_a_mistake_too_small_for_a_residual_is_shown_alone(self, root: Path, tmp_path: Path) -> None:
        class Particular(Stub):
            def residual(self, images: torch.Tensor) -> torch.Tensor:
                return RestorationResidual().featurize(images)

        paint(root / "test" / "photographic" / "dot.png", 250, (1, 1))
        trainer(tmp_path, DetectorReport()).test(Particular(), module(root, conditions=["clean"]), verbose=False)
        sizes = {path.stem[3:]: Image.open(path).size for path in (tmp_path / "top_losses").glob("*.png")}
        assert sizes == {"dot": (1, 1), "3": (60, 90), "ü 1": (40, 24)}

    def test_figures_go_to_tensorboard(self, root: Path, tmp_path: Path) -> None:
        logger = TensorBoardLogger(tmp_path, name="run")
        trainer(tmp_path, DetectorReport(), logger=logger).test(
            Stub(), module(root, conditions=CONDITIONS), verbose=False
        )
        events = EventAccumulator(logger.log_dir).Reload()
        assert sorted(events.Tags()["images"]) == ["test/calibration", "test/roc", "test/top_losses"]
        (event,) = events.Tensors("test/report/text_summary")
        text = event.tensor_proto.string_val[0].decode()
        assert re.search(r"clean +10 +0\.800 ", text)
        assert "thumbnail by itself reaches an accuracy of 0.800" in text
        assert "1. `test/generated/ü 1.png`: generated, said 0.078" in text
        assert (Path(logger.log_dir) / "detector_report.csv").is_file()

    def test_without_training_images_probes_are_not_run(self, root: Path, tmp_path: Path, capsys: Any) -> None:
        (root / "train").rename(root.parent / "aside")
        trainer(tmp_path, DetectorReport()).test(Stub(), module(root, conditions=["clean"]), verbose=False)
        assert float(table(tmp_path)[0]["accuracy"]) == pytest.approx(0.8)
        assert table(tmp_path)[0]["thumbnail_accuracy"] == ""
        assert "the shortcut probe file was not run: there is nothing to train it on" in capsys.readouterr().out

    def test_a_part_of_the_data_is_reported_as_such(self, root: Path, tmp_path: Path) -> None:
        data = module(root, conditions=CONDITIONS)
        report = DetectorReport(probe_images=4)
        trainer(tmp_path, report, limit_test_batches=3).test(Stub(), data, verbose=False)
        line = table(tmp_path)[0]
        assert (line["n"], line["positive"], line["thumbnail_n"]) == ("6", "1", "4")

    def test_probes_are_compared_on_their_own_images(self, root: Path, tmp_path: Path, capsys: Any) -> None:
        """Three images a class are looked at, the first, the middle and the last: among them no mistake."""
        report = DetectorReport(probe_images=6)
        trainer(tmp_path, report).test(Stub(), module(root, conditions=["clean"]), verbose=False)
        line = table(tmp_path)[0]
        assert (line["accuracy"], line["thumbnail_n"]) == ("0.8", "6")
        assert line["accuracy_beside_probes"] == "1.0"
        assert "the detector 1.000 on the same images" in capsys.readouterr().out

    def test_a_training_image_that_cannot_be_read_ends_the_run_before_the_test(
        self, root: Path, tmp_path: Path
    ) -> None:
        class Counting(Stub):
            steps = 0

            def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
                self.steps += 1
                return super().test_step(batch, batch_idx, dataloader_idx)

        (root / "train" / "generated" / "3.png").write_bytes(b"")
        stub = Counting()
        with pytest.raises(ValueError, match=r"train/generated/3\.png cannot be read as an image"):
            trainer(tmp_path, DetectorReport()).test(stub, module(root), verbose=False)
        assert stub.steps == 0

    def test_images_smaller_than_a_crop_are_counted_by_class(self, root: Path, tmp_path: Path, capsys: Any) -> None:
        """Shorter sides are 20 or 30 in photographs and 20 in generated images: at half of 20, a crop does not fit."""
        data = module(root, conditions=["clean", "rescale 0.5"], crop_size=12)
        trainer(tmp_path, DetectorReport()).test(Stub(), data, verbose=False)
        counts = {line["condition"]: (line["mirrored"], line["mirrored_positive"]) for line in table(tmp_path)[::4]}
        assert counts == {"clean": ("0", "0"), "rescale 0.5": ("8", "5")}
        printed = capsys.readouterr().out
        assert "! rescale 0.5: 3 of 5 photographic and 5 of 5 generated images are smaller than a crop" in printed
        assert "! clean" not in printed

    def test_files_cannot_be_looked_at_where_all_are_degraded(self, root: Path, tmp_path: Path, capsys: Any) -> None:
        trainer(tmp_path, DetectorReport()).test(Stub(), module(root, conditions=["jpeg 50"]), verbose=False)
        line = table(tmp_path)[0]
        assert (line["file_accuracy"], line["thumbnail_n"]) == ("", "10")
        assert "the shortcut probe file was not run: it looks at the files as they are" in capsys.readouterr().out

    def test_verdicts_and_where_a_probe_errs(self, root: Path, tmp_path: Path) -> None:
        class Sure(Stub):
            def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> dict[str, Any]:
                output = self.predict(batch)
                verdict = (output["probability"] > 0.5).long().where((output["probability"] - 0.5).abs() < 0.39, -1)
                return output | {"verdict": verdict}

        trainer(tmp_path, DetectorReport()).test(Sure(), module(root, conditions=["clean"]), verbose=False)
        line = table(tmp_path)[0]
        assert (line["unsure"], line["accuracy_sure"], line["accuracy_verdict"]) == ("0.2", "1.0", "0.8"), (
            "the mistakes are unsure"
        )
        # the thumbnail errs where the detector does: it is of no use there
        assert line["thumbnail_wrong_accuracy"] == "0.0"

    def test_shortcuts_are_named_before_a_fit(self, root: Path, tmp_path: Path) -> None:
        for i in range(8):
            for label, kind in enumerate(("photographic", "generated")):
                paint(tmp_path / "two" / "fair" / "train" / kind / f"{i}.png", 50, seed=100 + 2 * i + label)
        (root).rename(tmp_path / "two" / "red")
        (message,) = shortcuts_of_sources(module(tmp_path / "two"), 100, None)
        assert message.startswith("red: its classes can be told apart without a trace of a generator (")
        assert "color 1.00" in message
        assert "twins" in message

    def test_without_mistakes_there_are_no_pictures(self, root: Path, tmp_path: Path) -> None:
        for wrong in ("photographic/3.png", "generated/ü 1.png"):
            (root / "test" / wrong).unlink()
        trainer(tmp_path, DetectorReport()).test(Stub(), module(root, conditions=["clean"]), verbose=False)
        assert not list((tmp_path / "top_losses").glob("*.png"))
        assert float(table(tmp_path)[0]["accuracy"]) == 1

    def test_two_processes_report_what_one_reports(self, root: Path, tmp_path: Path) -> None:
        (root / "test" / "generated" / "ü 4.png").unlink()  # nine images: one is repeated
        data = module(root, conditions=CONDITIONS)
        trainer(tmp_path / "one", DetectorReport()).test(Stub(), data, verbose=False)
        two_processes(tmp_path / "two", DetectorReport()).test(
            Stub(), module(root, conditions=CONDITIONS), verbose=False
        )
        assert (tmp_path / "one" / "detector_report.csv").read_text() == (
            tmp_path / "two" / "detector_report.csv"
        ).read_text()
        assert table(tmp_path / "one")[0]["n"] == "9"

    def test_what_is_missing_is_named(self, root: Path, tmp_path: Path) -> None:
        class Silent(Stub):
            def test_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
                return None

        class Data(type(module(root))):  # type: ignore[misc]
            read = property()  # an attribute that cannot be had

        with pytest.raises(TypeError, match=r"Silent\.test_step; got NoneType"):
            trainer(tmp_path, DetectorReport()).test(Silent(), module(root), verbose=False)
        with pytest.raises(TypeError, match="Data has no read"):
            trainer(tmp_path, DetectorReport()).test(Stub(), Data(str(root)), verbose=False)
        with pytest.raises(ValueError, match="semantic_weights must be an existing file, got 'nowhere'"):
            DetectorReport(semantic_weights="nowhere")
        torch.save({"weight": torch.zeros(1)}, tmp_path / "other.pth")
        with pytest.raises(ValueError, match=r"other\.pth' is of another network"):
            trainer(tmp_path, DetectorReport(semantic_weights=str(tmp_path / "other.pth"))).test(Stub(), module(root))
        with pytest.raises(ValueError, match="probe_images must be at least 4, got 1"):
            DetectorReport(probe_images=1)


def test_nothing_is_cut_off_on_a_narrow_screen() -> None:
    names = ["clean", "rescale 0.75"], ["side 64 to 127", "side 1024 and more", "format JPEG2000"]
    scores = {
        "n": 45000,
        "positive": 20000,
        "accuracy": 0.975,
        "accuracy_at_threshold": 0.98,
        "auroc": 1.0,
        "ece": 0.04,
    }
    scores |= {f"{name}_accuracy": 0.5 for name in ("file", "thumbnail", "color", "semantic")}
    scores |= {"accuracy_sure": 0.99, "unsure": 0.125}
    scores |= {"mirrored": 0, "mirrored_positive": 0, "accuracy_beside_probes": 0.975}
    lines = [{"condition": name, "slice": "all", **scores} for name in names[0]]
    lines += [{"condition": "clean", "slice": name, **scores} for name in names[1]]
    console = Console(width=80, file=io.StringIO(), record=True)
    console.print(report_table(lines))
    text = console.export_text()
    assert "…" not in text
    assert all(name in text for name in (*names[0], *names[1]))


def test_pictures() -> None:
    image = torch.rand(3, 10, 20, generator=generator())
    flat = beside_residual(image, torch.zeros(3, 10, 20))
    assert flat[..., 20:].unique().tolist() == [0.5]
    assert tile([image, flat, torch.rand(3, 500, 2, generator=generator())]).isfinite().all()


@pytest.mark.slow
def test_real_images_are_told_apart_by_shortcut_probes(shared_data: Path, tmp_path: Path) -> None:
    """The data are confounded: all generated images have one size, and show people."""
    weights = shared_data / "weights" / "squeezenet1_0-imagenet-pruned.pth"
    if not (shared_data / "aigc").is_dir() or not weights.is_file():
        pytest.skip(f"no aigc or no SqueezeNet weights in {shared_data}")
    data = module(shared_data / "aigc", conditions=["clean"], crop_size=32)
    report = DetectorReport(probe_images=40, semantic_weights=str(weights))
    trainer(tmp_path, report).test(Stub(), data, verbose=False)
    line = table(tmp_path)[0]
    assert line["semantic_n"] == "40"
    assert float(line["file_accuracy"]) > 0.9
    assert float(line["semantic_accuracy"]) > 0.9
