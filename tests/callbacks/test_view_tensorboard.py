"""ImageGrid and EMDashboard: what TensorBoard finds in the event files."""

import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from tables import bank_table, textbook_table
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.plugins.custom_scalar import layout_pb2
from tensorboard.plugins.hparams import plugin_data_pb2
from torch import Tensor
from torch.utils.data import DataLoader

from callbacks._course import Course, draw_course
from callbacks._display import is_drawn
from callbacks.em_dashboard import EMDashboard, bank_map, custom_scalars_layout, heat_map, hyperparameters, render
from callbacks.em_parameter import _is_logged
from callbacks.image_grid import ImageGrid, image_grid
from lightning_modules.cli import main
from lightning_modules.em import ParameterTable, TableValues


class Duck(LightningModule):
    """Hands out images and drifting parameters; restores nothing."""

    def __init__(self, table: ParameterTable | None = None) -> None:
        super().__init__()
        self.save_hyperparameters({"width": 3})
        if table is not None:
            self.em_parameters = table
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.seen: list[Tensor] = []

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        return (self.weight * batch["image"]).mean()

    def on_train_batch_end(self, *args: Any) -> None:
        if hasattr(self, "em_parameters"):
            state = self.em_parameters.state
            self.em_parameters.write(TableValues(state.shared + 0.01, state.offsets))
            for name, value in self.em_parameters.get_parameters().items():
                self.log(f"em/{name}", float(value))

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        for name, value in (("psnr", 28.0), ("psnr_noisy", 20.5), ("psnr_gain", 7.5)):
            self.log(f"val/{name}", value, batch_size=len(batch["image"]))
        clean = batch["image"]
        return {"clean": clean, "noisy": clean + 0.5, "restored": clean * self.weight, "index": batch["index"]}

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def table(rows: int = 2) -> ParameterTable:
    names = [f"class {k}" for k in range(rows)]
    return textbook_table(
        initial={"sigma": 0.5, "radius": 10},
        learned=["sigma", "tau", "sigma_s", "smooth_steps"],
        per_row=["sigma", "tau", "smooth_steps"],
        row_names=names,
        initial_rows={names[k]: {"tau": 0.05 + 0.25 * k / rows} for k in range(rows)},
    )


def loader(size: int = 7) -> DataLoader:
    images = torch.rand(size, 3, 13, 11, generator=torch.Generator().manual_seed(0))
    return DataLoader([{"image": image, "index": i} for i, image in enumerate(images)], batch_size=3)


def fit(
    tmp_path: Path, module: LightningModule, callback: Callback, **arguments: Any
) -> tuple[Trainer, EventAccumulator]:
    logger = TensorBoardLogger(str(tmp_path), name="", version="run", default_hp_metric=False)
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=[CSVLogger(str(tmp_path), name="csv"), logger],
        callbacks=[callback],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **arguments,
    )
    trainer.fit(module, loader(), loader())
    events = EventAccumulator(logger.log_dir, size_guidance={"images": 0})
    events.Reload()
    return trainer, events


def test_the_grid_shows_the_same_samples_every_time(tmp_path: Path) -> None:
    _, events = fit(tmp_path, Duck(), ImageGrid(num_images=5, every_n_epochs=2), num_sanity_val_steps=2)
    drawn = events.Images("val/clean_noisy_restored")
    assert [event.step for event in drawn] == [3, 9], "epochs 0 and 2, and nothing from the sanity check"
    factor = 96 // 13
    assert (drawn[0].width, drawn[0].height) == (5 * (11 * factor + 2) + 2, 3 * (13 * factor + 2) + 2)


def test_of_large_images_the_grid_shows_the_middle(tmp_path: Path) -> None:
    image = torch.zeros(1, 3, 301, 450)
    image[..., 86:214, 161:289] = 1
    batch = {"image": image, "index": torch.zeros(1)}
    drawer = ImageGrid(num_images=5)
    trainer = Trainer(
        logger=TensorBoardLogger(str(tmp_path), name="", version="run"),
        callbacks=[drawer],
        accelerator="cpu",
        enable_progress_bar=False,
    )
    trainer.validate(Duck(), DataLoader([batch], batch_size=None), verbose=False)
    (drawn,) = EventAccumulator(trainer.log_dir).Reload().Images("val/clean_noisy_restored")
    assert (drawn.width, drawn.height) == (128 + 4, 3 * (128 + 2) + 2)
    pixels = np.asarray(Image.open(io.BytesIO(drawn.encoded_image_string)))
    assert (pixels[2:130, 2:130] == 255).all(), "the part that is white is the middle, and no more is drawn"


def test_a_long_run_draws_more_and_more_rarely() -> None:
    assert [epoch for epoch in range(50) if is_drawn(epoch, 1)] == [0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48]
    assert [epoch for epoch in range(50) if is_drawn(epoch, 5)] == [0, 5, 10, 15, 20, 30, 40]
    assert sum(is_drawn(epoch, 1) for epoch in range(10_000)) < 30


def test_the_grid_holds_the_first_images_in_rows(tmp_path: Path) -> None:
    samples = [tuple(torch.full((1, 4, 6), value) for value in (k / 10, 0.5, 2.0)) for k in range(3)]
    grid = image_grid(samples)
    assert grid.shape == (3, 3 * (64 + 2) + 2, 3 * (96 + 2) + 2)
    centres = grid[0, 34::66, 50::98]
    expected = torch.tensor([[0.0, 0.1, 0.2], [0.5, 0.5, 0.5], [1.0, 1.0, 1.0]])
    torch.testing.assert_close(centres, expected)


def test_images_of_several_sizes_fit_one_grid() -> None:
    samples = [tuple(torch.ones(3, *size) for _ in range(3)) for size in ((100, 150), (150, 100))]
    assert image_grid(samples).shape == (3, 3 * 152 + 2, 2 * 152 + 2)


def test_the_grid_is_drawn_by_validate_as_well(tmp_path: Path) -> None:
    logger = TensorBoardLogger(str(tmp_path), name="", version="run", default_hp_metric=False)
    trainer = Trainer(logger=logger, callbacks=[ImageGrid(4)], accelerator="cpu", enable_progress_bar=False)
    trainer.validate(Duck(), loader(), verbose=False)
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    assert len(events.Images("val/clean_noisy_restored")) == 1


def test_the_grid_names_what_a_module_does_not_return(tmp_path: Path) -> None:
    class Silent(Duck):
        def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
            return {"clean": batch["image"]}

    with pytest.raises(TypeError, match=r"clean, noisy, restored; Silent\.validation_step returned \['clean'\]"):
        fit(tmp_path, Silent(), ImageGrid(), num_sanity_val_steps=0)


def test_the_page_of_curves_names_tags_that_exist(tmp_path: Path) -> None:
    layout = custom_scalars_layout(table())
    assert layout["learned parameters"]["sigma"] == ["Multiline", ["em/sigma$"]]
    assert layout["learned parameters"]["sigma_s"] == ["Multiline", ["em/sigma_s$"]]
    assert "radius" not in layout["learned parameters"], "it is not learned"
    _, events = fit(tmp_path, Duck(table()), EMDashboard())
    ((event),) = events.Tensors("custom_scalars__config__")
    written = layout_pb2.Layout.FromString(event.tensor_proto.string_val[0])
    assert [category.title for category in written.category] == ["learned parameters", "objective"]
    assert [chart.title for chart in written.category[0].chart] == ["sigma", "tau", "sigma_s", "smooth_steps"]


def test_the_heat_map_is_drawn_each_epoch_once(tmp_path: Path) -> None:
    _, events = fit(tmp_path, Duck(table()), EMDashboard(every_n_epochs=2))
    assert [event.step for event in events.Images("em/table")] == [3, 9]


def test_the_course_tells_the_rows_apart(tmp_path: Path) -> None:
    _, events = fit(tmp_path, Duck(table()), EMDashboard(every_n_epochs=2))
    assert [event.step for event in events.Images("em/course")] == [3, 9]
    course, gain = Course(), Course()
    values = table(12).values()
    for step in range(5):
        course.add(step, values * (1 + step / 10))
        gain.add(step, torch.tensor(step / 10))
    figure = draw_course(table(12), course, gain)
    sigma, _, sigma_s, _, gained, unused = figure.axes
    curves = [line for line in sigma.lines if len(line.get_xdata()) == 5]
    assert len(curves) == len({str(line.get_color()) for line in curves}) == 13
    assert curves[-1].get_linewidth() > curves[0].get_linewidth(), "the global set, above the rows"
    np.testing.assert_allclose(curves[-1].get_ydata(), [0.5 * (1 + step / 10) for step in range(5)], rtol=1e-6)
    (bound,) = [line for line in sigma.lines if len(line.get_xdata()) == 2]
    assert bound.get_ydata()[0] == 0.5, "the upper one, on which it has begun; the lower is far"
    assert len(sigma_s.lines) == 1, "it has no rows"
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()][:2] == ["global", "class 0"]
    assert len(legend.get_texts()) == 1 + 12 + 1
    assert "above the start values" in gained.get_title()
    assert max(gained.get_ylim()) < 1
    assert not unused.axison
    many = draw_course(table(100), _course_of(table(100)), Course())
    assert [text.get_text() for text in many.legends[0].get_texts()][:2] == ["global", "100 rows"]
    bank = bank_table(40, per_row=["weight"], row_names=["cat", "dog"])
    axes = draw_course(bank, _course_of(bank), Course()).axes[0]
    assert len(axes.lines) == 3, "the least, the middle and the largest"
    assert max(render(many).shape[:2]) < 2200


def _course_of(table: ParameterTable) -> Course:
    course = Course()
    for step in range(2):
        course.add(step, table.values())
    return course


def test_a_course_stays_short_and_goes_on_as_if_nothing_had_happened() -> None:
    whole, first = Course(), Course()
    for step in range(3000):
        whole.add(step, torch.tensor(float(step)))
        assert len(whole.steps) <= 256
        if step < 700:
            first.add(step, torch.tensor(float(step)))
    gaps = {after - before for before, after in zip(whole.steps, whole.steps[1:], strict=False)}
    assert whole.steps[0] == 0
    assert gaps == {16}, "evenly spread"
    assert [float(value) for value in whole.values] == whole.steps
    resumed = Course()
    resumed.load_state_dict(first.state_dict())
    for step in range(700, 3000):
        resumed.add(step, torch.tensor(float(step)))
    assert resumed.steps == whole.steps
    assert torch.equal(torch.stack(resumed.values), torch.stack(whole.values))
    resumed.add(3000, torch.zeros(3))
    assert resumed.steps == [3000], "of another table"


def test_the_course_is_resumed(tmp_path: Path) -> None:
    dashboard, resumed, other = EMDashboard(), EMDashboard(), EMDashboard()
    trainer, _ = fit(tmp_path, Duck(table()), dashboard)
    assert dashboard.state_dict()["parameters"]["steps"] == [*range(10)]
    fit(tmp_path, Duck(table()), dashboard)
    assert dashboard.state_dict()["parameters"]["steps"] == [*range(10)], "of the second run only"
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    longer = Trainer(
        max_epochs=4,
        accelerator="cpu",
        logger=False,
        callbacks=[resumed],
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    longer.fit(Duck(table()), loader(), loader(), ckpt_path=tmp_path / "a.ckpt")
    assert resumed.state_dict()["parameters"]["steps"] == [*range(13)]
    other.load_state_dict({})  # of a version before


def test_events_of_a_long_run_stay_small(tmp_path: Path) -> None:
    """Bytes by logged step and by picture, and what they make of an hour of the demo: as many steps and epochs."""
    events = fit_demo(tmp_path)
    sizes: dict[str, list[int]] = {"scalars": [], "images": []}
    for raw in RawEventFileLoader(str(next(events.glob("events*")))).Load():
        event = Event.FromString(raw)
        for value in event.summary.value:
            sizes["images" if value.HasField("image") else "scalars"].append(len(raw))
    steps, epochs = 8, 2
    by_step, by_epoch = sum(sizes["scalars"]) / steps, sum(sizes["images"]) / epochs
    assert by_step < 4096, "with ten rows of two parameters"
    assert by_epoch < 600_000, "three photographs, the course and the heat map"
    steps_an_hour, epochs_an_hour = 50_000 / 5, 800  # twice as fast as two cores are
    logged = sum(_is_logged(number) for number in range(int(steps_an_hour)))
    drawn = sum(is_drawn(epoch, 1) for epoch in range(epochs_an_hour))
    assert logged * by_step + drawn * by_epoch < 20e6


def fit_demo(folder: Path) -> Path:
    """Runs two epochs of the demo, four steps each, and returns the folder of the run."""
    words = [f"--trainer.logger.save_dir={folder}", "--trainer.max_epochs=2", "--trainer.log_every_n_steps=1"]
    words += ["--trainer.enable_progress_bar=false", "--data.train_crops=40", "--data.batch_size=10"]
    main(["fit", "-c", str(Path(__file__).parents[2] / "configs" / "demo.yaml"), *words])
    return folder / "demo" / "version_0"


def test_the_run_is_entered_among_the_hyperparameters(tmp_path: Path) -> None:
    duck = Duck(table())
    trainer, events = fit(tmp_path, duck, EMDashboard())
    data = events.summary_metadata["_hparams_/session_start_info"].plugin_data.content
    hparams = plugin_data_pb2.HParamsPluginData.FromString(data).session_start_info.hparams
    assert hparams["em_start/sigma"].number_value == pytest.approx(0.5)
    assert hparams["width"].number_value == 3
    for name, value in {
        "val/psnr": 28.0,
        "val/psnr_gain": 7.5,
        "em_end/tau": duck.em_parameters.get_parameters()["tau"],
    }.items():
        last = events.Scalars(name)[-1]
        assert last.step == trainer.global_step - 1, "where the last validation has its own point"
        assert last.value == pytest.approx(value, rel=1e-6)
    assert all(event.step > 0 for event in events.Scalars("val/psnr")), "no stray point at step 0"
    assert "em_start" not in (Path(trainer.loggers[1].log_dir) / "hparams.yaml").read_text()


def test_metrics_are_left_out_where_there_was_no_validation() -> None:
    start, metrics = hyperparameters(table(), {})
    assert set(start) == {f"em_start/{name}" for name in ("sigma", "tau", "sigma_s", "smooth_steps")}
    assert set(metrics) == {f"em_end/{name}" for name in ("sigma", "tau", "sigma_s", "smooth_steps")}


@pytest.mark.parametrize("rows", [0, 10, 100])
def test_the_heat_map_shows_every_number(rows: int) -> None:
    figure = heat_map(table(rows))
    axes, _ = figure.axes
    texts = [text.get_text() for text in axes.texts]
    assert len(texts) == 6 + 3 * rows
    assert texts[0] == "0.5↑", "the global sigma rests on its upper bound"
    if rows:
        assert [label.get_text() for label in axes.get_yticklabels()][:2] == ["global", "class 0"]
    pixels = render(figure)
    assert pixels.dtype == np.uint8
    assert pixels.shape[2] == 3
    assert min(pixels.shape[:2]) > 150
    assert max(pixels.shape[:2]) < 2200


@pytest.mark.parametrize(("size", "texts"), [(3, 2 + 3 * 3 - 1), (40, 1 + 3 * 3)])
def test_a_bank_is_shown_whole_or_by_its_spread_and_a_picture(size: int, texts: int, tmp_path: Path) -> None:
    bank = bank_table(size, per_row=["weight"], row_names=["cat", "dog"])
    figure = heat_map(bank)
    assert len(figure.axes[0].texts) == texts
    assert max(render(figure).shape[:2]) < 2200
    layout = custom_scalars_layout(bank, with_bars=True)
    _, patterns = layout["learned parameters"]["weight"]
    tags = [f"em/{name}" for name in ("weight[0]", "weight[0]/cat", "weight/min", "weight/max/dog", "weight_decay")]
    shown = [tag for tag in tags if any(re.match(pattern, tag) for pattern in patterns)]
    assert shown == [tags[0] if size == 3 else tags[2]]
    assert ("weight[2]" in layout["90 % intervals"]) == (size == 3)
    start, _ = hyperparameters(bank, {})
    assert set(start) == {"em_start/gain", *(f"em_start/{tag[3:]}" for tag in em_tags(bank))}

    class Bank(Duck):
        def on_train_batch_end(self, *args: Any) -> None:
            self.em_parameters.write(self.em_parameters.state)

    _, events = fit(tmp_path, Bank(bank), EMDashboard(every_n_epochs=3))
    assert ("em/table/weight" in events.Tags()["images"]) == (size == 40)
    assert bank_map(bank, "weight").axes[0].images[0].get_array().shape == (3, size)


def em_tags(bank: ParameterTable) -> list[str]:
    """Tags of the bank's global values."""
    labels = bank.column_names[bank.columns("weight")]
    return (
        [f"em/{label}" for label in labels]
        if len(labels) <= 16
        else [f"em/weight/{p}" for p in ("min", "median", "max")]
    )


def test_a_module_without_parameters_is_told_so(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="Duck has no em_parameters"):
        _, events = fit(tmp_path, Duck(), EMDashboard())
    assert not events.Tags()["images"]


def test_other_loggers_are_skipped(tmp_path: Path) -> None:
    callbacks = [ImageGrid(), EMDashboard()]
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=CSVLogger(str(tmp_path)),
        callbacks=callbacks,
        enable_progress_bar=False,
        enable_checkpointing=False,
    )
    trainer.fit(Duck(table()), loader(), loader())
    assert not list(tmp_path.rglob("events.out*"))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: ImageGrid(num_images=0), "ImageGrid: num_images must be at least 1, got 0"),
        (lambda: ImageGrid(every_n_epochs=-1), "ImageGrid: every_n_epochs must be at least 1, got -1"),
        (lambda: EMDashboard(every_n_epochs=0), "EMDashboard: every_n_epochs must be at least 1, got 0"),
    ],
)
def test_bad_arguments_are_named(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
