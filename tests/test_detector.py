"""The detector as a module: training, calibration under averaged weights, processes, resumption, prediction."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import lightning as L
import pytest
import torch
from detector_training import (
    CONDITIONS,
    SIDE,
    TRAINING,
    VALIDATION,
    TextureData,
    Textures,
    make_module,
    make_trainer,
    run,
)
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

import lightning_modules
from datamodules import SampleBatch
from lightning_modules import (
    FullResolutionResNet,
    GeneratedImageDetector,
    RawPixels,
    RestorationResidual,
    TraceNetwork,
    detection,
)
from lightning_modules.detection import DetectorInput

SCRIPT = Path(__file__).with_name("detector_training.py")
PROJECT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    folder = tmp_path_factory.mktemp("single")
    return run(folder, precision="64-true"), folder


def batch_of(count: int) -> dict:
    index = torch.arange(count)
    return Textures(count, 0)[SampleBatch(index, torch.ones(count), index)]


class TestTheLoss:
    def loss(self, batch: dict, **options) -> torch.Tensor:
        module = make_module(**options)
        module.log = lambda *args, **kwargs: None
        return module.training_step(batch, 0)["loss"]

    def test_it_is_the_cross_entropy_with_smoothed_labels(self) -> None:
        batch = batch_of(20)
        logit, _ = make_module()(batch["image"])
        known = batch["label"] >= 0
        target = torch.where(batch["label"] == 1, 0.95, 0.05)
        p = logit.sigmoid()
        expected = -(target * p.log() + (1 - target) * (1 - p).log())[known].sum() / 20
        torch.testing.assert_close(self.loss(batch, label_smoothing=0.1), expected)

    def test_images_of_weight_zero_and_without_a_label_count_nowhere(self) -> None:
        batch = batch_of(20)
        batch["weight"][3:5] = 0
        loss = self.loss(batch)
        for i in (0, 3, 4, 7, 14):  # unlabelled, weight 0
            batch["image"][i] = torch.rand(2, 3, SIDE, SIDE)
        torch.testing.assert_close(self.loss(batch), loss)

    def test_the_logit_of_an_image_is_the_mean_over_its_crops(self) -> None:
        module, image = make_module(), batch_of(5)["image"]
        crops = torch.stack([module(image[:, i : i + 1])[0] for i in range(2)])
        torch.testing.assert_close(module(image)[0], crops.mean(0))


def test_what_the_run_reports(single: tuple[dict, Path]) -> None:
    result, _ = single
    names = {"loss", "accuracy", "accuracy_at_threshold", "average_precision", "auroc", "ece", "generative_accuracy"}
    assert {f"val/{name}" for name in names | {"ood_fraction", "temperature", "threshold"}} <= set(result["val"])
    assert {f"test/{name}" for name in names} | {f"test/{CONDITIONS[1]}/{name}" for name in names} <= set(
        result["test"]
    )
    assert result["test"]["test/auroc"] > 0.75, "something was learned"
    assert result["test"]["test/generative_accuracy"] > 0.6
    assert result["test"][f"test/{CONDITIONS[1]}/auroc"] < result["test"]["test/auroc"]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, dict]:
    out = tmp_path_factory.mktemp("two") / "results.pt"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), "--devices", "2", "--batch-size", "8", "--out", str(out)],
        cwd=PROJECT,
        env={**os.environ, "PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


@pytest.mark.parametrize("learn", [False, True], ids=["fixed restoration", "learned restoration"])
def test_two_processes_equal_one(learn: bool, two_processes: dict[bool, dict], tmp_path: Path) -> None:
    alone, two = run(tmp_path, learn=learn, precision="64-true"), two_processes[learn]
    for stage in ("val", "test"):
        found = {name: value for name, value in two[stage].items() if name != "train/loss"}  # that of a rank's batch
        expected = {name: value for name, value in alone[stage].items() if name != "train/loss"}
        assert set(found) == set(expected)
        for name, value in expected.items():
            assert found[name] == pytest.approx(value, abs=1e-6), name
    for name, value in alone["weights"].items():
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-6, atol=1e-7, equal_nan=True, msg=name)
    start = make_module().em_parameters.shared
    moved = (alone["weights"]["inputs.0.em_parameters.shared"] - start).abs().max()
    assert moved > 0.05 if learn else moved < 1e-9


def test_resumed_equals_uninterrupted(single: tuple[dict, Path], tmp_path: Path) -> None:
    whole, folder = single
    resumed = run(tmp_path, ckpt=folder / "epoch=1.ckpt", precision="64-true")
    assert resumed["test"] == whole["test"]
    for name, value in whole["weights"].items():
        torch.testing.assert_close(resumed["weights"][name], value, rtol=0, atol=0, equal_nan=True, msg=name)


class Hooks(L.Callback):
    def __init__(self) -> None:
        self.seen: list[tuple[str, int]] = []

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("start", trainer.current_epoch))

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("validation", trainer.current_epoch))

    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.seen.append(("end", trainer.current_epoch))


@pytest.mark.parametrize("every", [1, 2])
def test_resumed_after_the_last_step_of_an_epoch_it_is_validated_and_ended(every: int, tmp_path: Path) -> None:
    def fit(root: Path, ckpt: Path | None = None) -> tuple[list[tuple[str, int]], dict[str, torch.Tensor], L.Trainer]:
        torch.set_num_threads(1)
        options = {"check_val_every_n_epoch": every, "num_sanity_val_steps": 0}
        trainer, hooks, module = make_trainer(root, 4, **options), Hooks(), make_module()
        steps = ModelCheckpoint(dirpath=root, filename="{step}", every_n_train_steps=1, save_top_k=-1)
        trainer.callbacks = [hooks, *trainer.callbacks, steps]
        trainer.fit(module, TextureData(16), ckpt_path=ckpt, weights_only=True if ckpt else None)
        return hooks.seen, module.state_dict(), trainer

    seen, whole, _ = fit(tmp_path / "whole")
    for step, epoch in ((3, 0), (6, 1), (12, 3)):  # the last of the three steps of an epoch; 12 is the end
        again, state, trainer = fit(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        assert again == seen[seen.index(("start", epoch)) + 1 :]
        for name, value in whole.items():
            torch.testing.assert_close(state[name], value, rtol=0, atol=0, equal_nan=True, msg=name)
        assert trainer.fit_loop.epoch_loop._batches_that_stepped == 12
    # and a checkpoint of the resumed run is like any other
    again, state, _ = fit(tmp_path / "twice", tmp_path / "3" / "epoch=1.ckpt")
    assert again[-4:] == seen[-4:] if every == 1 else again[-3:] == seen[-3:]
    assert all(torch.equal(state[name].nan_to_num(), value.nan_to_num()) for name, value in whole.items())


class TestCalibrationUnderAveragedWeights:
    """Weights are averaged, what is fitted in closed form is not: it belongs to the averaged weights as it is."""

    def test_the_checkpoint_and_the_module_hold_the_last_fit(self, single: tuple[dict, Path]) -> None:
        result, folder = single
        stored = torch.load(folder / "epoch=5.ckpt", weights_only=True)["state_dict"]
        assert float(stored["calibration.temperature"]) == pytest.approx(result["val"]["val/temperature"])
        assert bool(stored["densities.fitted"])
        for name, value in result["weights"].items():
            # the averages are float32 whatever the precision of the module
            torch.testing.assert_close(stored[name], value, rtol=0, atol=0, equal_nan=True, check_dtype=False, msg=name)

    def test_it_is_the_fit_to_what_the_stored_weights_say(self, single: tuple[dict, Path]) -> None:
        _, folder = single
        for epoch in (1, 5):
            module = make_module().double()
            module.load_state_dict(torch.load(folder / f"epoch={epoch}.ckpt", weights_only=True)["state_dict"])
            temperature = float(module.calibration.temperature)
            data = Textures(VALIDATION, 1)
            known = data.label >= 0
            with torch.no_grad():
                logit, features = module(data.image[known].double())
            module.calibration.fit(logit, data.label[known])
            assert float(module.calibration.temperature) == pytest.approx(temperature, rel=1e-6)
            floor = float(module.densities.floor)
            module.densities.fit(features, data.label[known])
            assert float(module.densities.floor) == pytest.approx(floor, rel=1e-4)

    def test_validate_reports_what_the_fit_reported(self, single: tuple[dict, Path], tmp_path: Path) -> None:
        result, folder = single
        module, trainer = make_module(), make_trainer(tmp_path, precision="64-true")
        path = folder / "epoch=5.ckpt"
        (found,) = trainer.validate(module, TextureData(16), ckpt_path=path, weights_only=True, verbose=False)
        assert found == pytest.approx({name: result["val"][name] for name in found}, abs=1e-6)


def test_one_class_in_validation_calibrates_nothing(tmp_path: Path) -> None:
    class OneClass(TextureData):
        def load_split(self, split):
            data = super().load_split(split)
            data.label.fill_(1)
            return data

    module = make_module()
    with pytest.warns(UserWarning, match="all of one class: nothing can be calibrated"):
        make_trainer(tmp_path, epochs=1).fit(module, OneClass(16))
    assert float(module.calibration.temperature) == 1


def test_predictions(single: tuple[dict, Path], tmp_path: Path) -> None:
    module = make_module()
    path = single[1] / "epoch=5.ckpt"
    parts = make_trainer(tmp_path).predict(module, TextureData(16), ckpt_path=path, weights_only=True)
    assert [name for part in parts for name in part["name"]] == [f"{i}.png" for i in range(VALIDATION)]
    joined = {name: torch.cat([part[name] for part in parts]) for name in ("logit", "probability", "ood_score")}
    scaled = joined["logit"].double() / module.calibration.temperature
    torch.testing.assert_close(joined["probability"], torch.sigmoid(scaled))
    assert 0 < float((joined["ood_score"] > 0).double().mean()) < 0.2
    strange = module.densities.ood_score(module(torch.rand(4, 2, 3, SIDE, SIDE))[1] + 50)
    assert (strange > 0).all()


def test_other_crops_than_those_of_the_calibration_are_a_warning(single: tuple[dict, Path], tmp_path: Path) -> None:
    class OneCrop(Textures):
        def __getitem__(self, item):
            batch = super().__getitem__(item)
            return batch | {"image": batch["image"][:, :1]}

    class OtherData(TextureData):
        def load_split(self, split):
            return OneCrop(VALIDATION, 1)

    options = {"ckpt_path": single[1] / "epoch=5.ckpt", "weights_only": True}
    message = "calibrated on 2 crops of 12 pixels an image and now sees 1 of 12"
    with pytest.warns(UserWarning, match=message) as caught:
        make_trainer(tmp_path).predict(make_module(), OtherData(16), **options)
    assert sum(message in str(warning.message) for warning in caught) == 1
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*calibrated on")
        make_trainer(tmp_path).predict(make_module(), TextureData(16), **options)
        make_trainer(tmp_path).test(make_module(), TextureData(16), verbose=False, **options)
        make_trainer(tmp_path).predict(make_module(), OtherData(16))  # never calibrated


def test_too_few_validation_images_are_a_warning(tmp_path: Path) -> None:
    class Few(TextureData):
        def load_split(self, split):
            return Textures(TRAINING, 0) if split == "train" else Textures(14, 1)

    with pytest.warns(UserWarning, match="val/generative_accuracy, val/ood_fraction are not defined"):
        make_trainer(tmp_path, epochs=1).fit(make_module(), Few(16))


class TestOneImage:
    def test_a_path_an_image_and_a_tensor_of_any_size(self, tmp_path: Path) -> None:
        module = make_module()
        module.crops.copy_(torch.tensor([5, SIDE]))
        for height, width in ((40, 33), (7, 50), (1, 1)):
            pixels = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, generator=torch.Generator())
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(tmp_path / "a photo é.png")
            probability = module.predict_image(str(tmp_path / "a photo é.png"))
            assert 0 < probability < 1
            assert module.predict_image(pixels) == probability
            assert module.predict_image(pixels / 255) == pytest.approx(probability, abs=1e-6)

    def test_it_says_what_predict_says(self, tmp_path: Path) -> None:
        from datamodules import GeneratedImagesDataModule

        generator = torch.Generator().manual_seed(0)
        for number in range(3):
            pixels = torch.randint(0, 256, (30 + number, 40, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).save(tmp_path / f"{number}.png")
        module = make_module()
        module.crops.copy_(torch.tensor([40, SIDE]))  # more than are looked at at once
        data = GeneratedImagesDataModule(str(tmp_path), crop_size=SIDE, eval_crops=40, batch_size=2)
        quiet = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False}
        trainer = L.Trainer(accelerator="cpu", devices=1, **quiet)
        parts = trainer.predict(module, data)
        for name, probability in zip(
            [name for part in parts for name in part["name"]],
            torch.cat([part["probability"] for part in parts]).tolist(),
            strict=True,
        ):
            assert module.predict_image(tmp_path / name) == pytest.approx(probability, abs=1e-6)

    def test_the_residual_of_whole_images(self) -> None:
        module, image = make_module(), torch.rand(1, 3, 23, 37)
        part = module.inputs[0]
        torch.testing.assert_close(module.residual(image), part(image) / part.scale)

    @pytest.mark.parametrize("channels", [1, 5])
    def test_an_input_of_other_channels_is_shown_in_grey(self, channels: int) -> None:
        class Powers(DetectorInput):
            def featurize(self, images: torch.Tensor) -> torch.Tensor:
                return torch.cat([images[:, :1] ** power for power in range(1, channels + 1)], dim=1)

        module, image = GeneratedImageDetector([Powers()], TraceNetwork(channels)), torch.rand(1, 3, 23, 37)
        shown = module.residual(image)
        assert shown.shape == image.shape
        torch.testing.assert_close(shown[:, 2], module.inputs[0].featurize(image).mean(1))


def test_any_restoration_may_learn_but_one_alone() -> None:
    residuals = [RestorationResidual(learn=learn) for learn in (False, True, True)]
    detector = GeneratedImageDetector(residuals[:2])
    assert detector.em_parameters is residuals[1].em_parameters
    with pytest.raises(ValueError, match="one restoration can learn its parameters, got 2 inputs with learn=True"):
        GeneratedImageDetector(residuals)


def test_any_backbone_fits() -> None:
    torch.manual_seed(0)
    pool = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    for backbone, width in ((pool, 12), (FullResolutionResNet(3), 512)):
        detector = GeneratedImageDetector([RawPixels()], backbone)
        logit, features = detector(torch.rand(2, 2, 3, 16, 16))
        assert features.shape == (2, width)
        assert logit.shape == (2,)
        assert detector.backbone.training, "looking at the backbone leaves it as it was"
    assert detector.em_parameters is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_smoothing": 1.0}, r"label_smoothing must lie in \[0, 1\), got 1.0"),
        ({"backbone": TraceNetwork(6)}, "the backbone cannot process"),
        ({"backbone": torch.nn.Identity()}, r"to features \[B, F\], got \[1, 3, 32, 32\]"),
        ({"num_directions": 0}, "num_directions must be at least 1"),
        ({"inlier_quantile": 1.0}, "inlier_quantile must lie between 0 and 1"),
        ({"inputs": []}, "inputs is empty"),
    ],
)
def test_impossible_arguments_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GeneratedImageDetector(**({"inputs": [RawPixels()]} | options))


def test_images_that_are_not_crops_are_refused() -> None:
    with pytest.raises(ValueError, match=r"as crops \[B, V, 3, S, S\], got \[2, 3, 16, 16\]"):
        make_module()(torch.rand(2, 3, 16, 16))


def test_weights_of_the_version_before_are_loaded() -> None:
    module = make_module()
    before = {name.replace("inputs.0.", "inputs.views.0."): value for name, value in make_module().state_dict().items()}
    assert "inputs.views.0.em_parameters.shared" in before
    before["inputs.views.0.em_parameters.shared"] = before["inputs.views.0.em_parameters.shared"] * 1.01
    module.load_state_dict(before)
    assert torch.equal(module.em_parameters.shared, before["inputs.views.0.em_parameters.shared"])


def test_names_of_the_version_before_warn() -> None:
    for package, old, new in (
        (lightning_modules, "Colours", RawPixels),
        (detection, "Colours", RawPixels),
        (detection, "judge", detection.evaluate),
        (detection, "cross_judge", detection.cross_fit),
        (detection, "Evaluated", detection.BufferedPredictions),
        (detection, "Predictions", detection.PredictionBuffer),
    ):
        with pytest.warns(FutureWarning, match=f"{old} is now .*{new.__name__}"):
            assert getattr(package, old) is new


def test_every_tensor_is_in_the_checkpoint() -> None:
    module = make_module()
    stored = set(module.state_dict())
    # bounds are arguments of the table
    derived = (".lower", ".upper")
    assert [name for name, _ in module.named_buffers() if name not in stored and not name.endswith(derived)] == []
