"""The DataModules under a real Trainer: samplers left alone, every sample once, interrupted runs continued."""

import itertools
import json
import logging
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch import nn

from datamodules import CIFAR10DataModule, ImageFolderDataModule, PhotoCropsDataModule
from datamodules._sampler import EpochBatches, FixedBatches


@pytest.fixture(autouse=True)
def quiet():
    logger = logging.getLogger("lightning.pytorch")
    level = logger.level
    logger.setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore",
            ".*(LeafSpec|does not have many workers|logging interval|callbacks used to create the checkpoint).*",
        )
        yield
    logger.setLevel(level)


class Recorder(L.LightningModule):
    """Notes which samples it is given; its one weight drifts to the mean of the images."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: dict[str, list] = {"train": [], "val": [], "test": [], "predict": []}

    def note(self, stage, batch):
        if self.trainer.sanity_checking:
            return
        entry = {name: batch[name].tolist() for name in ("index", "weight", "key") if name in batch}
        entry |= {"epoch": self.current_epoch, "step": self.global_step, "mean": float(batch["image"].mean())}
        self.seen[stage].append(entry)

    def training_step(self, batch):
        self.note("train", batch)
        return ((self.weight - batch["image"].mean((1, 2, 3))) ** 2 * batch["weight"]).mean()

    def validation_step(self, batch):
        self.note("val", batch)

    def test_step(self, batch):
        self.note("test", batch)

    def predict_step(self, batch):
        self.note("predict", batch)
        return batch["name"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(tmp_path, **options) -> L.Trainer:
    quietly = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quietly["enable_checkpointing"] = "callbacks" in options
    return L.Trainer(accelerator="cpu", default_root_dir=tmp_path, **quietly, **options)


def indices(entries) -> list[list[int]]:
    return [entry["index"] for entry in entries]


def flat(lists) -> list:
    return list(itertools.chain.from_iterable(lists))


def cifar(root, **options) -> CIFAR10DataModule:
    return CIFAR10DataModule(str(root), **({"batch_size": 4, "val_size": 2} | options))


def test_fit_leaves_the_sampler_alone_and_tells_it_the_epoch(fake_cifar, tmp_path):
    data, module = cifar(fake_cifar(rows=3)), Recorder()
    fit = trainer(tmp_path, max_epochs=3)
    fit.fit(module, data)
    assert type(fit.train_dataloader.sampler) is EpochBatches
    assert type(fit.val_dataloaders.sampler) is FixedBatches
    orders = [flat(indices(e for e in module.seen["train"] if e["epoch"] == epoch)) for epoch in range(3)]
    assert all(sorted(order) == list(range(13)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert indices(module.seen["val"]) == [[0, 1]] * 3
    assert len({tuple(entry["key"]) for entry in module.seen["val"]}) == 1


@pytest.mark.parametrize(
    "make",
    [
        lambda root: cifar(root),
        lambda _: PhotoCropsDataModule(train_crops=13, val_crops=6, batch_size=4),
        lambda _: ImageFolderDataModule("to be set", crop_size=8, val_fraction=0.5),
    ],
    ids=["cifar10", "photo_crops", "image_folder"],
)
def test_all_stages(make, fake_cifar, tmp_path):
    data = make(fake_cifar())
    if isinstance(data, ImageFolderDataModule):
        data.root = str(tmp_path / "images")
        (tmp_path / "images").mkdir()
        for size in (8, 9, 20):
            Image.new("RGB", (size, 10)).save(tmp_path / "images" / f"{size}.png")
    module, run = Recorder(), trainer(tmp_path, max_epochs=1)
    run.fit(module, data)
    run.validate(module, data)
    run.test(module, data)
    names = run.predict(module, data)
    assert all(module.seen.values())
    assert flat(indices(module.seen["predict"])) == list(range(len(flat(names))))


def test_limits_are_honoured_and_known_to_the_weights(fake_cifar, tmp_path):
    module = Recorder()
    run = trainer(tmp_path, max_epochs=1, limit_train_batches=3, limit_val_batches=1, accumulate_grad_batches=2)
    run.fit(module, cifar(fake_cifar(rows=4)))
    assert [entry["step"] for entry in module.seen["train"]] == [0, 0, 1]
    assert [entry["weight"][0] for entry in module.seen["train"]] == [1, 1, 2]
    assert run.global_step == 2
    run.predict(module, cifar(fake_cifar()))


def test_overfitting_repeats_the_same_batches(fake_cifar, tmp_path, recwarn):
    module = Recorder()
    run = trainer(tmp_path, max_epochs=3, overfit_batches=2)
    run.fit(module, cifar(fake_cifar(rows=4)))
    assert type(run.train_dataloader.sampler) is FixedBatches
    assert indices(module.seen["train"]) == [[0, 1, 2, 3], [4, 5, 6, 7]] * 3
    assert len({entry["mean"] for entry in module.seen["train"]}) == 2
    assert not [warning for warning in recwarn if "shuffling" in str(warning.message)]


def test_accumulation_follows_one_large_batch(fake_cifar, tmp_path):
    weights = []
    for batch_size, accumulate in ((8, 1), (4, 2), (2, 4)):
        module = Recorder()
        data = cifar(fake_cifar(rows=5), batch_size=batch_size)  # 23 images: the last group is not complete
        trainer(tmp_path, max_epochs=3, accumulate_grad_batches=accumulate).fit(module, data)
        weights.append(float(module.weight.detach()))
    assert weights == pytest.approx([weights[0]] * 3, rel=1e-6)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("every", [3, 5])  # in the middle of an epoch of five batches, and at its end
def test_a_resumed_run_equals_an_uninterrupted_one(fake_cifar, tmp_path, every, workers):
    root, path = fake_cifar(rows=4), tmp_path / "checkpoints"
    keep = ModelCheckpoint(path, filename="{step}", every_n_train_steps=every, save_top_k=-1)
    whole = Recorder()
    trainer(tmp_path, max_epochs=3, callbacks=[keep]).fit(whole, cifar(root, num_workers=workers))
    resumed = Recorder()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*dataloader is not resumable.*")
        trainer(tmp_path, max_epochs=3, callbacks=[ModelCheckpoint(path / "more")]).fit(
            resumed, cifar(root, num_workers=workers), ckpt_path=path / f"step={2 * every}.ckpt", weights_only=True
        )
    expected = whole.seen["train"][2 * every :]
    assert [entry["key"] for entry in resumed.seen["train"]] == [entry["key"] for entry in expected]
    assert torch.equal(resumed.weight, whole.weight)


def test_two_processes_follow_one(fake_cifar, tmp_path):
    root = fake_cifar(rows=5, test_rows=5)
    one = Recorder()
    trainer(tmp_path, max_epochs=2, accumulate_grad_batches=2).fit(one, cifar(root, batch_size=4))

    # a process of its own, which forks: this one may hold threads or a GPU, and two that start afresh import twice
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, __file__, str(root), str(tmp_path)]
    subprocess.run(command, env=os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}, check=True, timeout=240)

    fit, predict = (
        [json.loads((tmp_path / f"{stage}_{rank}.json").read_text()) for rank in range(2)]
        for stage in ("fit", "predict")
    )
    for record in fit:
        assert record["sampler"] == "EpochBatches"
        assert record["weight"] == pytest.approx(float(one.weight.detach()), rel=1e-6)
    for records, stage, epoch, length in (
        (fit, "train", 0, 23),
        (fit, "train", 1, 23),
        (fit, "val", 1, 2),
        (predict, "predict", 0, 5),
    ):
        entries = [entry for record in records for entry in record["seen"][stage] if entry["epoch"] == epoch]
        valid = Counter(i for e in entries for i, w in zip(e["index"], e["weight"], strict=True) if w > 0)
        assert valid == Counter(range(length)), stage


class Writer(L.Callback):
    """Writes what a rank has seen."""

    def __init__(self, folder: str) -> None:
        self.folder = Path(folder)

    def on_fit_end(self, trainer, pl_module):
        self.write("fit", trainer.global_rank, pl_module, type(trainer.train_dataloader.sampler).__name__)

    def on_predict_end(self, trainer, pl_module):
        self.write("predict", trainer.global_rank, pl_module)

    def write(self, stage, rank, module, sampler=None):
        record = {"seen": module.seen, "weight": float(module.weight.detach()), "sampler": sampler}
        (self.folder / f"{stage}_{rank}.json").write_text(json.dumps(record))


def main(root: str, folder: str) -> None:
    """Trains and predicts in two processes."""
    options = {"max_epochs": 2, "accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp_fork"}
    run = trainer(Path(folder), callbacks=[Writer(folder)], **options)
    run.fit(Recorder(), cifar(root, batch_size=2))
    run.predict(Recorder(), cifar(root, batch_size=2), return_predictions=False)


if __name__ == "__main__":
    main(*sys.argv[1:])
