"""PredictionWriter: one line an image, in the order of the files, whole or not at all."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from detector_runs import Stub, WithOODScore, module, paint, trainer, two_processes
from torch.utils.data import DataLoader

from callbacks import PredictionWriter

NAMES = ["Zoë's photo.png", "a.jpg", "b.png", "c.png", "sub/d.png"]


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for i, name in enumerate(NAMES):
        paint(tmp_path / "images" / name, red=10 + 50 * i, size=(5 + 9 * i, 40 - 7 * i), seed=i)
    return tmp_path / "images"


def lines(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_one_line_an_image_in_the_order_of_the_files(images: Path, tmp_path: Path) -> None:
    result = trainer(tmp_path, PredictionWriter()).predict(Stub(), module(images))
    table = lines(tmp_path / "predictions.csv")
    assert result is None
    assert list(table[0]) == ["path", "label", "probability"]
    assert [line["path"] for line in table] == NAMES
    assert [float(line["probability"]) for line in table] == pytest.approx(
        [(10 + 50 * i) / 255 for i in range(5)], abs=0.02
    )
    assert [line["label"] for line in table] == ["photographic"] * 3 + ["generated"] * 2


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no such names")
def test_a_name_that_is_no_text_is_written_as_it_is(images: Path, tmp_path: Path) -> None:
    (images / "a.jpg").rename(images / os.fsdecode(b"caf\xe9.jpg"))
    trainer(tmp_path, PredictionWriter()).predict(Stub(), module(images))
    assert b"\ncaf\xe9.jpg,photographic," in (tmp_path / "predictions.csv").read_bytes()


def test_two_processes_write_what_one_writes(images: Path, tmp_path: Path) -> None:
    trainer(tmp_path, PredictionWriter(str(tmp_path / "one"))).predict(WithOODScore(), module(images))
    two_processes(tmp_path, PredictionWriter(str(tmp_path / "two"))).predict(WithOODScore(), module(images))
    one, two = ((tmp_path / name / "predictions.csv").read_text() for name in ("one", "two"))
    assert one == two
    assert len(one.splitlines()) == 6  # the repeat that fills up the second process is not among them


@pytest.mark.parametrize(("given", "own", "generated"), [(None, 0.3, 3), (0.7, 0.3, 1), (0.0, 0.3, 5), (None, None, 2)])
def test_the_threshold_is_the_modules_unless_one_is_given(
    images: Path, tmp_path: Path, given: float | None, own: float | None, generated: int
) -> None:
    class Chosen(Stub):
        threshold = torch.tensor(own) if own is not None else 0.5

    trainer(tmp_path, PredictionWriter(threshold=given)).predict(Chosen(), module(images))
    assert sum(line["label"] == "generated" for line in lines(tmp_path / "predictions.csv")) == generated


def test_certain_images_keep_their_order(images: Path, tmp_path: Path) -> None:
    class Certain(Stub):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            return self.predict(batch) | {"probability": torch.sigmoid(20 + batch["index"].double() / 10)}

    trainer(tmp_path, PredictionWriter()).predict(Certain(), module(images))
    written = [float(line["probability"]) for line in lines(tmp_path / "predictions.csv")]
    assert written == torch.sigmoid(20 + torch.arange(5).double() / 10).tolist()
    assert len(set(written)) == 5


def test_the_ood_score_is_a_column_where_it_is_known(images: Path, tmp_path: Path) -> None:
    data = module(images, class_names=("real", "fake"))
    trainer(tmp_path, PredictionWriter()).predict(WithOODScore(), data)
    table = lines(tmp_path / "predictions.csv")
    assert [float(line["ood_score"]) for line in table] == [0, 0.5, 1, 1.5, 2]
    assert {line["label"] for line in table} == {"real", "fake"}


def test_an_interrupted_run_leaves_the_earlier_table(images: Path, tmp_path: Path) -> None:
    trainer(tmp_path, PredictionWriter()).predict(Stub(), module(images))
    before = (tmp_path / "predictions.csv").read_text()
    (images / "c.png").write_bytes(b"")
    with pytest.raises(ValueError, match=r"c\.png cannot be read"):
        trainer(tmp_path, PredictionWriter()).predict(Stub(), module(images))
    assert (tmp_path / "predictions.csv").read_text() == before
    assert [path.name for path in tmp_path.iterdir() if "part" in path.name] == []


def test_what_is_left_out_has_no_line(images: Path, tmp_path: Path) -> None:
    (images / "b.png").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"1 of 5 files cannot be read and are left out: b\.png"):
        trainer(tmp_path, PredictionWriter()).predict(Stub(), module(images, on_error="skip"))
    assert [line["path"] for line in lines(tmp_path / "predictions.csv")] == [name for name in NAMES if name != "b.png"]


def test_predictions_are_kept_on_request(images: Path, tmp_path: Path) -> None:
    result: Any = trainer(tmp_path, PredictionWriter(keep_predictions=True)).predict(Stub(), module(images))
    assert [len(batch["probability"]) for batch in result] == [2, 2, 1]


def test_what_is_missing_is_named(images: Path, tmp_path: Path) -> None:
    class Silent(Stub):
        def predict_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
            return {"probability": batch["weight"]}

    with pytest.raises(TypeError, match=r"Silent\.predict_step; got \['probability'\]"):
        trainer(tmp_path, PredictionWriter()).predict(Silent(), module(images))
    with pytest.raises(TypeError, match="a DataModule whose class_names are two"):
        trainer(tmp_path, PredictionWriter()).predict(Stub(), DataLoader([1]))
    with pytest.raises(ValueError, match="threshold must be between 0 and 1, got 2"):
        PredictionWriter(threshold=2)
    with pytest.raises(ValueError, match="output_dir must name a directory, got ''"):
        PredictionWriter(output_dir="")
