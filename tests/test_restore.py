"""`restore` and `lightning-em restore`: any kind of image in, the same kind out; folders survive their worst file."""

import csv
import errno
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lightning_modules import restore
from lightning_modules.cli import main
from lightning_modules.cli import restore as command
from lightning_modules.imaging import read_picture
from lightning_modules.noise import NoiseModel
from lightning_modules.operators import RestorationOperator, TotalVariation
from lightning_modules.restoration import load_operator

PROJECT = Path(__file__).parents[1]
LEVEL = 25 / 255


class Mean(RestorationOperator):
    """The mean of a neighborhood, which shows whether tiles have seams."""

    halo = 5
    parameter_specs = ()

    def forward(self, noisy: torch.Tensor, **others: Any) -> torch.Tensor:
        return torch.nn.functional.avg_pool2d(noisy, 11, 1, 5, count_include_pad=False)


class Channels(TotalVariation):
    """Total variation that restores images of so many channels only, as a trained denoiser does."""

    def __init__(self, channels: int) -> None:
        super().__init__(5)
        self.channels = channels

    def forward(self, noisy: torch.Tensor, **others: Any) -> torch.Tensor:
        assert noisy.shape[1] == self.channels
        return super().forward(noisy, **others)


def noisy(height: int = 61, width: int = 47, channels: int = 3) -> np.ndarray:
    """A photograph's worth of bytes: a disk on a ramp, with noise of 25/255."""
    rows, columns = np.mgrid[:height, :width]
    clean = 60 + 80 * columns / width + 60 * ((rows - height / 2) ** 2 + (columns - width / 2) ** 2 < (width / 4) ** 2)
    noise = np.random.default_rng(0).normal(0, 25, (height, width, channels))
    return np.rint((clean[..., None] + noise).clip(0, 255)).astype(np.uint8)


def roughness(image: Any) -> float:
    numbers = np.asarray(image, np.float64)
    return float(np.abs(np.diff(numbers, axis=0)).mean() / (numbers.max() - numbers.min()))


KINDS = {
    "gray bytes": lambda: noisy()[..., 0],
    "color bytes": noisy,
    "planes": lambda: np.ascontiguousarray(noisy().transpose(2, 0, 1)),
    "opacity": lambda: np.dstack([noisy(), np.arange(61 * 47).reshape(61, 47) % 256]).astype(np.uint8),
    "16 bits": lambda: noisy().astype(np.uint16) * 257,
    "float": lambda: noisy().astype(np.float32) / 255,
    "double": lambda: noisy() / 255,
    "float to 255": lambda: noisy().astype(np.float32),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("noise", ["auto", LEVEL])
def test_arrays_come_back_as_they_are(kind: str, noise: float | str) -> None:
    array = KINDS[kind]()
    kept = array.copy()
    restored = restore(array, noise=noise, model=TotalVariation())
    assert isinstance(restored, np.ndarray)
    assert (restored.shape, restored.dtype) == (array.shape, array.dtype)
    assert np.array_equal(array, kept)
    colors = (..., slice(0, 3)) if kind == "opacity" else ...
    axis = 1 if kind == "planes" else 0
    change = np.abs(np.diff(restored[colors].astype(float), axis=axis)).mean()
    assert change < 0.7 * np.abs(np.diff(array[colors].astype(float), axis=axis)).mean()
    assert restored[colors].mean() == pytest.approx(array[colors].mean(), rel=0.02)  # the range, too
    if kind == "opacity":
        assert np.array_equal(restored[..., 3], array[..., 3])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", [(61, 47), (1, 61, 47), (3, 61, 47), (2, 3, 61, 47)])
def test_tensors_come_back_as_they_are(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    image = (0.5 + 0.1 * torch.randn(shape, generator=generator)).clamp(0, 1)
    image = (255 * image).to(dtype) if dtype == torch.uint8 else image.to(dtype)
    restored = restore(image, noise=0.1, model=TotalVariation())
    assert (restored.shape, restored.dtype) == (image.shape, dtype)
    assert restored.double().std() < 0.5 * image.double().std()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "F"])
def test_pil_images_come_back_as_they_are(mode: str) -> None:
    image = Image.fromarray(noisy())
    image = Image.fromarray(noisy()[..., 0].astype(np.uint16) * 257) if mode == "I;16" else image.convert(mode)
    restored = restore(image, noise=LEVEL, model=TotalVariation())
    assert isinstance(restored, Image.Image)
    assert restored.size == image.size
    assert restored.mode == ("RGB" if mode == "P" else mode)
    if mode != "1":
        assert roughness(restored.convert("F")) < roughness(image.convert("F"))


def test_a_profile_of_other_colors_does_not_come_back() -> None:
    image = Image.fromarray(noisy()).convert("CMYK")
    image.info |= {"icc_profile": b"\0" * 16 + b"CMYK" + b"\0" * 108, "kept": 0}
    with pytest.warns(UserWarning, match="converted from CMYK to RGB"):
        restored = restore(image, noise=LEVEL, model=TotalVariation())
    assert (restored.mode, restored.info) == ("RGB", {"kept": 0})


def test_a_told_level_of_zero_is_the_identity() -> None:
    assert np.array_equal(restore(noisy(), noise=0, model=TotalVariation()), noisy())


@pytest.mark.parametrize("size", [(3, 511, 530), (1, 1100, 513)])
def test_tiles_leave_no_seam_and_progress_is_told(size: tuple[int, int, int]) -> None:
    image = torch.rand(size, generator=torch.Generator().manual_seed(0))
    parts: list[float] = []
    restored = restore(image, noise=0.1, model=Mean(), progress=parts.append)
    assert torch.allclose(restored, Mean()(image[None])[0], atol=1e-6)
    assert parts == sorted(parts)
    assert parts[-1] == 1
    assert len(parts) >= 2


@pytest.mark.parametrize("side", [1, 3])
def test_noise_that_follows_the_light_leaves_no_seam_either(side: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a transform where the noise is independent, by a map of its levels where it is not."""
    image = torch.rand(3, 70, 90, generator=torch.Generator().manual_seed(0))
    white = NoiseModel.white(torch.tensor([0.05]), 3)
    kernel = white.kernel.expand(-1, -1, -1, side, side) / side
    noise = NoiseModel(white.slope + 0.02, white.intercept, white.brightness, kernel)
    whole = restore(image, noise=noise, model=TotalVariation(2))
    monkeypatch.setattr("lightning_modules.restoration._TILE_SIZE", 32)
    assert torch.allclose(restore(image, noise=noise, model=TotalVariation(2)), whole, atol=1e-6)


@pytest.mark.parametrize(("model", "channels"), [(3, 1), (1, 3), (3, 3), (1, 1)])
def test_a_denoiser_of_other_channels_is_adapted(model: int, channels: int) -> None:
    array = noisy(channels=channels)
    restored = restore(array, noise=LEVEL, model=Channels(model))
    assert restored.shape == array.shape
    assert roughness(restored) < roughness(array)


def test_the_level_of_a_large_picture_is_read_from_all_over_it() -> None:
    half = np.full((1500, 1500, 1), 128.0)
    noise = np.random.default_rng(0).normal(0, 10, half.shape)
    assert restore_level(np.rint(half + noise).astype(np.uint8)) == pytest.approx(10 / 255, rel=0.05)


def restore_level(array: np.ndarray) -> float:
    levels: list[float] = []

    class Spy(TotalVariation):
        def forward(self, noisy: torch.Tensor, *, noise: Any, **others: Any) -> torch.Tensor:
            levels.append(noise)
            return noisy

    restore(array, model=Spy())
    return levels[0]


@pytest.mark.parametrize("shape", [(1, 1, 3), (1, 1), (1, 5000, 3), (5000, 1), (2, 2, 3)])
def test_the_smallest_and_the_longest_images(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    if min(shape[:2]) == 1:
        with pytest.warns(UserWarning, match="left as it is"):
            assert np.array_equal(restore(array, model=TotalVariation()), array)
    assert restore(array, noise=LEVEL, model=TotalVariation()).shape == shape


@pytest.mark.parametrize(
    ("source", "arguments", "message"),
    [
        (np.full((9, 9), np.nan), {}, "the image has the pixel value nan; pixels must be finite"),
        (np.full((9, 9), 1e6), {}, r"expected a range within \[0, 1\] or \[0, 255\]"),
        (np.zeros((9, 9, 5), np.uint8), {}, "one to four channels"),
        (np.zeros((0, 9, 3), np.uint8), {}, r"got \[0, 9, 3\]"),
        (torch.rand(9), {}, r"got \[9\]"),
        ({}, {}, "got dict"),
        (np.zeros((9, 9), np.uint8), {"noise": 25}, "25 of 255 is 0.0980"),
        (np.zeros((9, 9), np.uint8), {"noise": float("nan")}, "must lie between 0 and 1"),
        (np.zeros((9, 9), np.uint8), {"noise": "much"}, "must be a number or 'auto', 'white' or 'camera', got 'much'"),
        (np.zeros((9, 9), np.uint8), {"output": "a.png"}, "output is for files"),
        *((np.zeros((9, 9), np.uint8), {"noise": level}, "must be a number or 'auto'") for level in (True, None, [])),
        *((np.zeros((9, 9), np.uint8), {"quality": each}, "from 1 to 100") for each in (500, 0, -1, True, "9", 2.5)),
        (np.full((9, 9), "a"), {}, "whole numbers or floating point, got <U1"),
        (np.zeros((9, 9), complex), {}, "whole numbers or floating point, got complex"),
        (torch.zeros(0, 3, 9, 9), {}, r"got \[0, 3, 9, 9\]"),
    ],
)
def test_bad_input_is_named(source: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        restore(source, model=TotalVariation(), **arguments)


@pytest.mark.parametrize("model", [3, None, ["auto"]])
def test_a_model_of_another_type_is_named(model: Any) -> None:
    with pytest.raises(ValueError, match="model must be 'auto', the path of a GraphDenoiser or an operator, got"):
        restore(noisy(), noise=LEVEL, model=model)


def save(path: Path, array: np.ndarray | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(noisy() if array is None else array).save(path, **options)
    return path


def test_a_path_gives_the_path_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "photo.jpg", quality=90)
    written = restore(str(tmp_path / "photo.jpg"), model=TotalVariation())
    assert written == tmp_path / "photo.restored.jpg"
    with Image.open(written) as image, Image.open(tmp_path / "photo.jpg") as source:
        assert image.quantization == source.quantization
        assert roughness(image) < roughness(source)
    with pytest.raises(FileExistsError, match="overwrite=True"):
        restore(tmp_path / "photo.jpg", model=TotalVariation())
    restore(tmp_path / "photo.jpg", model=TotalVariation(), overwrite=True)
    assert restore(tmp_path / "photo.jpg", model=TotalVariation(), output=tmp_path / "new.png").name == "new.png"
    assert Image.open(tmp_path / "new.png").format == "PNG"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert restore("~/photo.jpg", model=TotalVariation(), output="~/home.jpg") == tmp_path / "home.jpg"
    with pytest.raises(FileNotFoundError, match="is not a file"):
        restore(tmp_path / "none.jpg")


def test_an_operator_is_its_own_model() -> None:
    operator = TotalVariation()
    assert load_operator(operator, 3) is operator


def test_restoring_loads_neither_lightning_nor_pyg_nor_a_compiler() -> None:
    code = """
import sys, numpy as np
from lightning_modules import restore
from lightning_modules.operators import TotalVariation
restore(np.zeros((9, 9, 3), np.uint8), model=TotalVariation())
from lightning_modules.cli import main
try:
    main(["restore", "--help"])
except SystemExit:
    pass
unwanted = {"lightning", "pytorch_lightning", "torch_geometric", "torchvision", "torch._dynamo"}
print("loaded:", *sys.modules.keys() & unwanted)
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=PROJECT, capture_output=True, text=True, check=True)
    assert "usage: lightning-em restore" in run.stdout
    assert run.stdout.strip().splitlines()[-1] == "loaded:"


@pytest.mark.slow
@pytest.mark.parametrize("noise", ["auto", "line", "camera"])
def test_memory_grows_by_few_pictures(noise: str, tmp_path: Path) -> None:
    """From 2.25 to 6 megapixels, and on in a line: at most 1.5 GB for 24, whatever the kind of the noise."""
    save(tmp_path / "a.jpg", np.tile(noisy(200, 300), (10, 10, 1)))
    code = """
import sys
import torch
from lightning_modules import restore
from lightning_modules.noise import NoiseModel
from lightning_modules.operators import TotalVariation
def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024
white = NoiseModel.white(torch.tensor([0.05]), 3)
line = white.slope + 0.01, white.intercept, white.brightness
noise = {
    "auto": "auto",
    "line": NoiseModel(*line, white.kernel),
    "camera": NoiseModel(*line, white.kernel.expand(-1, -1, -1, 3, 3) / 3),
}[sys.argv[3]]
restore(sys.argv[2], noise=noise, model=TotalVariation(2))
before = peak()
restore(sys.argv[1], noise=noise, model=TotalVariation(2))
print(before, peak())
"""
    small = save(tmp_path / "b.jpg", np.tile(noisy(150, 150), (10, 10, 1)))
    command = [sys.executable, "-c", code, str(tmp_path / "a.jpg"), str(small), noise]
    run = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True, check=True)
    before, after = map(float, run.stdout.split())
    assert after + (24 - 6) / (6 - 2.25) * (after - before) < 1500


@pytest.fixture
def total_variation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Total variation in place of the denoiser."""
    monkeypatch.setattr(command, "load_operator", lambda model, channels, camera=False: TotalVariation(5))


@pytest.fixture
def folder(tmp_path: Path, total_variation: None) -> Path:
    """Seven photographs of several kinds, in a folder and below."""
    root = tmp_path / "in"
    save(root / "a.jpg")
    save(root / "a.png")
    save(root / "deep/er/b.TIF", noisy()[..., 0])
    save(root / "deep/c.webp")
    save(root / "d.gif", noisy()[..., 0])
    save(root / "e.png", np.dstack([noisy(), noisy()[..., :1]]))
    save(root / "f.png", noisy()[..., 0].astype(np.uint16) * 257)
    return root


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "restored.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        return list(csv.DictReader(file))


def files(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


RESULTS = ["a.jpg", "a.png", "d.gif.png", "deep/c.webp", "deep/er/b.TIF", "e.png", "f.png"]


def failing(*words: str | Path) -> int | str | None:
    with pytest.raises(SystemExit) as caught:
        main(["restore", *map(str, words)])
    return caught.value.code


def test_a_folder_is_mirrored_and_described(folder: Path, tmp_path: Path) -> None:
    main(["restore", str(folder), "-o", str(tmp_path / "out")])
    assert files(tmp_path / "out") == sorted([*RESULTS, "restored.csv"])
    table = rows(tmp_path / "out")
    assert [row["output"] for row in table] == RESULTS
    columns = ("name", "output", "noise", "noise_std", "slope", "intercept", "correlation", "seconds", "size", "note")
    assert list(table[0]) == [*columns, "source"]
    assert {row["noise"] for row in table} <= {"white", "camera"}
    assert table[0]["name"] == "a.jpg"
    assert table[0]["size"] == "47x61"
    assert float(table[1]["noise_std"]) == pytest.approx(LEVEL, rel=0.25)
    for name in ("a.jpg", "f.png", "e.png"):
        before, after = read_picture(folder / name), read_picture(tmp_path / "out" / name)
        assert (after.dtype, after.pixels.shape) == (before.dtype, before.pixels.shape)
        assert roughness(after.pixels.permute(1, 2, 0)) < roughness(before.pixels.permute(1, 2, 0))
        assert np.array_equal(after.alpha, before.alpha) if before.alpha is not None else after.alpha is None


def test_the_worst_file_is_listed_and_the_others_are_done(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    content = (folder / "a.png").read_bytes()
    (folder / "0.png").write_bytes(content[:900])
    (folder / "1.png").write_bytes(b"")
    (folder / "2.tif").write_bytes(b"II*\0\xff\xff\xff\xff")
    assert failing(folder, "-o", tmp_path / "out") == 1
    assert [row["output"] for row in rows(tmp_path / "out")] == RESULTS
    printed = capsys.readouterr().err.splitlines()
    assert "restored 7 of 10" in printed
    assert "3 failed:" in printed
    for name in ("0.png", "1.png", "2.tif"):
        assert sum(name in line for line in printed) == 1


def test_a_rerun_skips_what_is_there(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["restore", str(folder), "-o", str(tmp_path / "out")]
    main(words)
    times = {name: (tmp_path / "out" / name).stat().st_mtime_ns for name in RESULTS}
    before = rows(tmp_path / "out")
    (tmp_path / "out" / "a.png").unlink()
    capsys.readouterr()
    main(words)
    changed = [name for name in RESULTS if (tmp_path / "out" / name).stat().st_mtime_ns != times[name]]
    assert changed == ["a.png"]
    assert "restored 1 of 7, 6 there already (--overwrite restores them again)" in capsys.readouterr().err
    assert [{**row, "seconds": ""} for row in rows(tmp_path / "out")] == [{**row, "seconds": ""} for row in before]
    main([*words, "--overwrite"])
    assert all((tmp_path / "out" / name).stat().st_mtime_ns != times[name] for name in RESULTS)


def test_a_table_that_was_cut_off_is_mended(folder: Path, tmp_path: Path) -> None:
    words = ["restore", str(folder), "-o", str(tmp_path / "out")]
    main(words)
    before = rows(tmp_path / "out")
    table = tmp_path / "out" / "restored.csv"
    table.write_bytes(table.read_bytes()[:-60])
    main(words)
    after = rows(tmp_path / "out")
    for column in ("name", "output", "noise_std", "size"):
        assert [row[column] for row in after] == [row[column] for row in before]
    assert after[-1]["note"] == "was there before"
    table.write_text("something,else\n1,2\n")
    assert failing(*words[1:]) == 1
    assert table.read_text() == "something,else\n1,2\n"


def test_the_output_inside_the_input_is_not_restored_again(folder: Path) -> None:
    for _ in range(2):
        main(["restore", str(folder), "-o", str(folder / "restored")])
    assert [row["output"] for row in rows(folder / "restored")] == RESULTS
    assert failing(folder, "-o", folder) == 1
    assert failing(folder, "-o", folder / "deep" / "..") == 1


def test_files_go_beside_their_sources_and_are_not_restored_again(folder: Path) -> None:
    sources = [folder / "a.jpg", folder / "d.gif"]
    main(["restore", *map(str, sources)])
    assert (folder / "a.restored.jpg").is_file()
    assert (folder / "d.gif.restored.png").is_file()
    main(["restore", *map(str, [*sources, folder / "a.restored.jpg"])])
    assert not (folder / "a.restored.restored.jpg").exists()


def test_one_file_goes_where_it_is_sent(folder: Path, tmp_path: Path) -> None:
    main(["restore", str(folder / "a.jpg"), "-o", str(tmp_path / "b.png")])
    assert Image.open(tmp_path / "b.png").format == "PNG"
    main(["restore", str(folder / "a.jpg"), "-o", str(tmp_path / "folder")])
    assert files(tmp_path / "folder") == ["a.jpg", "restored.csv"]
    main(["restore", str(folder / "a.jpg"), "-o", str(tmp_path / "c.jpg"), "--quality", "20", "--noise", "25/255"])
    assert (tmp_path / "c.jpg").stat().st_size < (tmp_path / "folder" / "a.jpg").stat().st_size


def test_links_loops_and_home(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "store" / "g.png")
    (folder / "album").symlink_to(tmp_path / "store")
    (folder / "album2").symlink_to(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    main(["restore", "~/in", "-o", "~/out"])
    assert [row["output"] for row in rows(tmp_path / "out")] == ["a.jpg", "a.png", "album/g.png", *RESULTS[2:]]


def test_names_that_collide_or_are_too_long(folder: Path, tmp_path: Path) -> None:
    save(folder / "d.gif.png")
    save(folder / "A.jpg")
    save(folder / ("x" * 251 + ".gif"), noisy()[..., 0])
    odd = os.fsdecode(b"odd\xff [bold]\n.png")
    save(folder / odd)
    main(["restore", str(folder), "-o", str(tmp_path / "out")])
    outputs = [row["output"] for row in rows(tmp_path / "out")]
    assert len(outputs) == len({output.casefold() for output in outputs}) == 11
    assert all((tmp_path / "out" / output).is_file() for output in outputs)
    assert odd in outputs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["in"], "in is a folder: name one for the results with -o"),
        (["nowhere"], "nowhere: no such file"),
        (["empty", "-o", "out"], "empty holds no images"),
        (["in/a.jpg", "-o", "in/a.png/below"], "Not a directory: in/a.png/below"),
        (["in/a.jpg", "-o", "out.heic"], "out.heic: files of this kind are not written"),
        (["in/e.png", "-o", "out.jpg"], "it holds no transparency; choose PNG"),
    ],
)
def test_what_cannot_be_done_is_one_line(
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(folder.parent)
    Path("empty").mkdir()
    assert failing(*words) == 1
    printed = capsys.readouterr().err
    assert message in printed
    assert sum(message in line for line in printed.splitlines()) == 1
    assert "Traceback" not in printed


def test_what_is_left_out_is_said(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (folder / "z.heic").touch()
    main(["restore", str(folder), "-o", str(tmp_path / "out")])
    assert "1 .heic left out, which cannot be read" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("level", "message"), [("25", "25 of 255 is 0.0980"), ("-1", "between 0 and 1"), ("much", "neither a number")]
)
def test_levels_on_another_scale_are_refused_with_a_hint(
    folder: Path, capsys: pytest.CaptureFixture[str], level: str, message: str
) -> None:
    assert failing(folder / "a.jpg", "--noise", level) == 2
    assert message in capsys.readouterr().err


def test_a_model_that_cannot_be_read_is_one_error(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def damaged(model: str, channels: int) -> RestorationOperator:
        raise ValueError(f"{model} is damaged")

    monkeypatch.setattr(command, "load_operator", damaged)
    assert failing(folder, "-o", tmp_path / "out", "--model", "m.safetensors") == 1
    assert capsys.readouterr().err == "lightning-em restore: m.safetensors is damaged\n"


def test_a_full_disk_ends_the_run_and_names_the_space(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace, count = os.replace, 0

    def full(source: Path, target: Path) -> None:
        nonlocal count
        count += Path(target).suffix != ".csv"
        if count > 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    assert failing(folder, "-o", tmp_path / "out") == 1
    assert [name for name in files(tmp_path / "out") if name != "restored.csv"] == RESULTS[:2]
    printed = capsys.readouterr().err
    assert "the disk is full: " in printed
    assert " MB are left" in printed


def test_stopping_leaves_whole_files_and_a_table(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    restore_file, count = command.restore_file, 0

    def stop(*arguments: Any, **others: Any) -> dict[str, Any]:
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return restore_file(*arguments, **others)

    monkeypatch.setattr(command, "restore_file", stop)
    assert failing(folder, "-o", tmp_path / "out") == 130
    assert files(tmp_path / "out") == sorted([*RESULTS[:3], "restored.csv"])
    assert [row["output"] for row in rows(tmp_path / "out")] == RESULTS[:3]
    assert "stopped: the same command goes on" in capsys.readouterr().err
    main(["restore", str(folder), "-o", str(tmp_path / "out")])
    assert [row["output"] for row in rows(tmp_path / "out")] == RESULTS


def test_results_may_go_above_the_photographs(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["restore", str(folder), "-o", str(tmp_path)])
    assert [row["output"] for row in rows(tmp_path)] == RESULTS
    capsys.readouterr()
    main(["restore", str(folder), "-o", str(tmp_path)])
    assert "restored 0 of 7, 7 there already" in capsys.readouterr().err


def test_results_never_replace_photographs(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    save(folder / "in/a.jpg")
    before = {name: (folder / name).read_bytes() for name in files(folder)}
    for words in (
        ["a.jpg", "-o", "."],
        ["a.jpg", "-o", "a.jpg"],
        ["a.jpg", "-o", "../in/a.jpg", "--overwrite"],
        ["a.jpg", "e.png", "-o", ".", "--overwrite"],
        ["in", "a.jpg", "-o", "."],
    ):
        assert failing(*words) == 1
        printed = capsys.readouterr().err
        assert "would replace the photograph" in printed
        assert "--overwrite" not in printed
    with pytest.raises(FileExistsError, match="would replace the photograph"):
        restore("a.jpg", output="a.jpg", model=TotalVariation(), overwrite=True)
    assert {name: (folder / name).read_bytes() for name in files(folder)} == before


@pytest.mark.parametrize("folders", [False, True])
def test_another_photograph_of_the_same_name_is_not_done(
    folders: bool, tmp_path: Path, total_variation: None, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = (save(tmp_path / day / "p.png") for day in ("day1", "day2"))
    out = tmp_path / "out"
    sources = [path.parent if folders else path for path in (first, second)]
    main(["restore", str(sources[0]), "-o", str(out)])
    content = (out / "p.png").read_bytes()
    capsys.readouterr()
    assert failing(sources[1], "-o", out) == 1
    assert "p.png is made of" in capsys.readouterr().err
    assert (out / "p.png").read_bytes() == content
    main(["restore", str(sources[1]), "-o", str(out), "--overwrite"])
    assert [row["source"] for row in rows(out)] == ["../day2/p.png"]
    assert failing(sources[0], "-o", out) == 1
    os.rename(tmp_path / "day2", tmp_path / "day3")
    save(tmp_path / "day1" / "mine.png")
    save(out / "mine.png")
    os.utime(out / "mine.png", (0, 0))
    capsys.readouterr()
    assert failing(tmp_path / "day1" / "mine.png", "-o", out) == 1
    assert "mine.png exists and is not in" in capsys.readouterr().err


def test_what_is_at_the_target_is_no_result(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out/a.jpg").mkdir(parents=True)
    (folder / "a.restored.png").mkdir()
    save(tmp_path / "there.png")
    for words in (
        [folder, "-o", tmp_path / "out"],
        [folder / "a.png"],
        [folder, "-o", tmp_path / "out", "--overwrite"],
    ):
        assert failing(*words) == 1
        assert "is a folder: " in capsys.readouterr().err
    assert [row["output"] for row in rows(tmp_path / "out")] == RESULTS[1:]
    assert failing(folder / "a.png", "-o", tmp_path / "there.png") == 1
    assert "there.png exists: name another file with -o" in capsys.readouterr().err


def test_a_link_to_itself_ends_no_folder(folder: Path, tmp_path: Path) -> None:
    (folder / "loop.png").symlink_to("loop.png")
    (folder / "deep/circle").symlink_to("circle")
    (tmp_path / "out").mkdir()
    (tmp_path / "out/a.jpg").symlink_to("a.jpg")
    main(["restore", str(folder), "-o", str(tmp_path / "out")])
    assert not (tmp_path / "out/a.jpg").is_symlink()
    assert [row["output"] for row in rows(tmp_path / "out")] == RESULTS


def test_a_suffix_that_is_asked_for_is_the_format(folder: Path, tmp_path: Path) -> None:
    (folder / "a.jpg").rename(folder / "b.png")  # still a JPEG file
    main(["restore", str(folder / "b.png"), "-o", str(tmp_path / "c.png")])
    assert Image.open(tmp_path / "c.png").format == "PNG"
    assert Image.open(restore(folder / "b.png", output=tmp_path / "d.PNG", model=TotalVariation())).format == "PNG"
    assert Image.open(restore(folder / "b.png", model=TotalVariation())).format == "JPEG"
    save(folder / "e.JPG", quality=30)
    with (
        Image.open(folder / "e.JPG") as source,
        Image.open(restore(folder / "e.JPG", output=tmp_path / "e.jpg", model=TotalVariation())) as image,
    ):
        assert image.quantization == source.quantization
