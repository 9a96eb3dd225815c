"""The callbacks that show results, on the real module, data and command."""

import re
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from callbacks import EMParameterCallback, GradientRule
from callbacks.em_dashboard import EMDashboard, custom_scalars_layout
from callbacks.em_report import FILE_NAME, EMReport
from callbacks.image_grid import ImageGrid
from callbacks.restored_image_writer import RestoredImageWriter
from datamodules import PhotoCropsDataModule
from lightning_modules import GraphDiffusion, GraphDiffusionReconstruction, ParameterTable, ResidualDenoiser
from lightning_modules.cli import build
from lightning_modules.em import LabelAssignment

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[L.Trainer, GraphDiffusionReconstruction]:
    folder = tmp_path_factory.mktemp("run")
    data = PhotoCropsDataModule(batch_size=4, val_crops=8)
    table = ParameterTable(
        initial={"radius": 2.0, "smooth_steps": 2},
        bounds={"radius": (1.0, 2.0)},
        learned=["sigma", "tau"],
        per_row=["sigma", "tau"],
        row_names=data.class_names,
    )
    module = GraphDiffusionReconstruction(
        GraphDiffusion(patch_size=3), table, backbone=ResidualDenoiser(width=4, depth=4), assignment=LabelAssignment()
    )
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=2,
        limit_train_batches=3,
        limit_val_batches=2,
        limit_predict_batches=2,
        log_every_n_steps=1,
        logger=TensorBoardLogger(str(folder), name="", version="run", default_hp_metric=False),
        callbacks=[EMParameterCallback(GradientRule()), EMDashboard(), ImageGrid(4), EMReport(), RestoredImageWriter()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    trainer.predict(module, data)
    return trainer, module


def test_every_curve_of_the_page_has_a_tag_or_none_was_written(run: tuple) -> None:
    trainer, module = run
    events = EventAccumulator(trainer.log_dir)
    events.Reload()
    tags = events.Tags()["scalars"]
    layout = custom_scalars_layout(module.em_parameters)
    patterns = [p for charts in layout.values() for _, names in charts.values() for p in names]
    silent = {p for p in patterns if not any(re.match(p, tag) for tag in tags)}
    assert silent <= {"em/perceptual$"}, "this run has no perceptual loss"
    rows = [tag for tag in tags if re.match("em/sigma/.+", tag)]
    assert len(rows) == len(module.em_parameters.row_names)
    assert {"val/clean_noisy_restored", "em/table"} <= set(events.Tags()["images"])


def test_the_exported_file_starts_the_next_run_from_the_command_line(run: tuple) -> None:
    trainer, module = run
    exported = Path(trainer.log_dir) / FILE_NAME
    following = build(["-c", str(DEMO), "-c", str(exported), "--trainer.logger=false"]).model
    torch.testing.assert_close(following.em_parameters.values(), module.em_parameters.values(), rtol=1e-11, atol=0)
    assert isinstance(following, GraphDiffusionReconstruction)
    assert following.em_parameters.learned == ("sigma", "tau"), "those of the run, not the demo's"
    assert following.em_parameters.bounds == module.em_parameters.bounds
    assert following.em_parameters.per_row == module.em_parameters.per_row
    assert (
        yaml.safe_load(exported.read_text())["model"]["class_path"] == "lightning_modules.GraphDiffusionReconstruction"
    )


def test_predict_writes_images_and_their_parameters(run: tuple) -> None:
    trainer, _ = run
    folder = Path(trainer.log_dir) / "restored"
    lines = (folder / "restored.csv").read_text().splitlines()
    assert lines[0].startswith("name,output,width,height,noise_std,sigma,tau,")
    assert lines[0].endswith("psnr_noisy,psnr")
    assert len(list(folder.rglob("*.png"))) == len(lines) - 1 == 8
