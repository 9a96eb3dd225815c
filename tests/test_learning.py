"""`learn_parameters` against exhaustive grids, on every form of images, and on what cannot be learned from."""

import importlib.util
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import ndimage
from torch import Tensor

from callbacks import EMParameterCallback, NewtonRule, SPSARule
from datamodules import ImageSetDataModule
from lightning_modules import FunctionOperator, Reconstruction, TotalVariation, learn_parameters
from lightning_modules.cli import build
from lightning_modules.operators import ParameterSpec

NOISE_STD = 0.1


def pictures(count: int = 48, seed: int = 0, channels: int = 1) -> Tensor:
    """Smooth images with an edge."""
    generator = torch.Generator().manual_seed(seed)
    waves = ndimage.gaussian_filter(torch.rand(count, channels, 20, 17, generator=generator).numpy(), (0, 0, 2, 2))
    edges = (torch.rand(count, 1, 1, 1, generator=generator) > torch.linspace(0, 1, 17)).float()
    return (torch.from_numpy(waves).float() * 1.5 - 0.4 + 0.3 * edges).clamp(0, 1)


def blur(noisy: Tensor, *, width: Tensor) -> Tensor:
    """A Gaussian filter of differentiable width."""
    place = torch.arange(-6, 7)
    kernel = torch.exp(-(place**2) / (2 * width.view(-1, 1).square()))
    kernel = kernel / kernel.sum(1, keepdim=True)
    padded = torch.nn.functional.pad(noisy, (6, 6, 6, 6), mode="reflect")
    rows = torch.einsum("bchwk,bk->bchw", padded.unfold(3, 13, 1), kernel)
    return torch.einsum("bchwk,bk->bchw", rows.unfold(2, 13, 1), kernel)


def blur_array(image: np.ndarray, *, width: float) -> np.ndarray:
    """The same by SciPy, of one image [H, W] or [H, W, C], without a gradient."""
    sigma = (width, width) if image.ndim == 2 else (width, width, 0)
    return ndimage.gaussian_filter(image, sigma, mode="mirror", radius=6)  # type: ignore[no-any-return]


def noisy(clean: Tensor, seed: int = 5) -> Tensor:
    return clean + NOISE_STD * torch.randn(clean.shape, generator=torch.Generator().manual_seed(seed))


def gap(
    restore: Callable[..., Tensor], found: float, bounds: tuple[float, float], clean: Tensor | None = None
) -> float:
    """How far from the optimum of an exhaustive grid a value is, in dB of the mean squared error of fresh noise."""
    clean = pictures() if clean is None else clean

    def error(value: float) -> float:
        return float((restore(noisy(clean), value) - clean).square().mean())

    best = min(error(float(value)) for value in np.geomspace(*bounds, 150))
    return 10 * math.log10(error(found) / best)


def by_blur(images: Tensor, value: float) -> Tensor:
    return blur(images, width=torch.full((len(images),), value))


BOUNDS = (0.05, 50.0)


@pytest.mark.parametrize("start", [None, *BOUNDS])
@pytest.mark.parametrize("objective", ["supervised", "sure"])
def test_ten_batches_find_the_optimum_of_a_grid_a_thousandfold_wide(start: float | None, objective: Any) -> None:
    images = pictures() if objective == "supervised" else noisy(pictures())
    learned = learn_parameters(
        blur,
        {"width": BOUNDS},
        images,
        noise_std=NOISE_STD,
        objective=objective,
        start=None if start is None else {"width": start},
        progress=False,
    )
    assert len(learned.history) == 10
    assert gap(by_blur, learned.parameters["width"], BOUNDS) < 0.02
    assert 0 < learned.errors["width"] < learned.parameters["width"]
    restored = learned.operator(noisy(pictures()))
    torch.testing.assert_close(restored, by_blur(noisy(pictures()), learned.parameters["width"]))


def test_a_function_of_arrays_needs_no_gradient() -> None:
    """And at most sixty evaluations of an image."""
    calls = 0

    def counted(image: np.ndarray, *, width: float) -> np.ndarray:
        nonlocal calls
        calls += 1
        return blur_array(image, width=width)

    images = pictures(16)
    learned = learn_parameters(counted, {"width": BOUNDS}, images, noise_std=NOISE_STD, arrays=True, progress=False)
    assert calls <= 60 * 16
    assert gap(by_blur, learned.parameters["width"], BOUNDS, images) < 0.02


def test_the_noise_need_not_be_gaussian() -> None:
    """Uniform noise of a level that nobody knows."""
    clean = pictures(64)
    uniform = clean + math.sqrt(12) * NOISE_STD * (
        torch.rand(clean.shape, generator=torch.Generator().manual_seed(2)) - 0.5
    )
    learned = learn_parameters(blur, {"width": BOUNDS}, uniform, objective="j_invariant", progress=False)
    # What a hidden pixel is replaced by is not what the filter sees later: the optimum is near, and not the same.
    assert gap(by_blur, learned.parameters["width"], BOUNDS, clean) < 0.25


def test_whole_numbers_and_choices() -> None:
    def boxes(image: np.ndarray, *, side: int, passes: int) -> np.ndarray:
        assert isinstance(side, int)
        for _ in range(passes):
            image = ndimage.uniform_filter(image, side, mode="mirror")
        return image

    clean = pictures(32)
    learned = learn_parameters(
        boxes, {"side": [1, 3, 5, 9], "passes": range(1, 6)}, clean, noise_std=NOISE_STD, arrays=True, progress=False
    )

    def error(side: int, passes: int) -> float:
        pairs = zip(noisy(clean)[:, 0].numpy(), clean[:, 0].numpy(), strict=True)
        return float(np.mean([(boxes(y, side=side, passes=passes) - x) ** 2 for y, x in pairs]))

    errors = {(side, passes): error(side, passes) for side in (1, 3, 5, 9) for passes in range(1, 6)}
    found = errors[learned.parameters["side"], learned.parameters["passes"]]
    assert 10 * math.log10(found / min(errors.values())) < 0.1


def test_each_parameter_arrives_as_one_number_an_image() -> None:
    shapes = set()

    def shrink(noisy: Tensor, *, weight: Tensor, power: Tensor, bank: Tensor, noise_std: Tensor) -> Tensor:
        shapes.add((tuple(weight.shape), tuple(power.shape), tuple(bank.shape), tuple(noise_std.shape)))
        mean = noisy.mean((2, 3), keepdim=True)
        share = (weight**power + bank.mean(1)).view(-1, 1, 1, 1)
        return noisy - share * (noisy - mean)

    bank = ParameterSpec("bank", 0.0, (-0.3, 0.3), (3,), scale=0.1)
    parameters = {"weight": (0.01, 1.0), "power": (0.5, 2.0), "bank": bank}
    learned = learn_parameters(shrink, parameters, pictures(8), noise_std=0.2, batch_size=8, progress=False)
    assert shapes == {((8,), (8,), (8, 3), (8,)), ((2,), (2,), (2, 3), (2,))}
    assert len(learned.parameters["bank"]) == len(learned.errors["bank"]) == 3


def test_pairs_lists_folders_and_data_modules_are_images_too(tmp_path: Path) -> None:
    clean = pictures(12)
    for name, side in (("noisy", noisy(clean)), ("clean", clean)):
        (tmp_path / name).mkdir()
        for index, image in enumerate(side):
            pixels = (image[0].clamp(0, 1) * 255).round().byte().numpy()
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
    ragged = [image[:, :, : 17 - index % 3] for index, image in enumerate(clean)]
    options: dict[str, Any] = {"crop_size": 15, "progress": False}
    forms: list[tuple[Any, dict[str, Any]]] = [
        ((noisy(clean), clean), {}),
        ((str(tmp_path / "noisy"), tmp_path / "clean"), {}),
        (ragged, {"noise_std": NOISE_STD}),
        ([image[0].numpy() for image in ragged], {"noise_std": NOISE_STD}),
        (str(tmp_path / "clean"), {"noise_std": NOISE_STD}),
        (ImageSetDataModule(clean, batch_size=12), {"noise_std": NOISE_STD}),
        (str(tmp_path / "noisy"), {"objective": "sure", "noise_std": NOISE_STD}),
    ]
    widths = [
        learn_parameters(blur, {"width": (0.3, 3.0)}, images, **options, **more).parameters["width"]
        for images, more in forms
    ]
    assert max(widths) < 1.35 * min(widths)


def test_the_same_run_by_yaml(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "mine.py").write_text(
        "def shrink(noisy, *, weight):\n"
        "    return noisy - weight.view(-1, 1, 1, 1) * (noisy - noisy.mean((2, 3), keepdim=True))\n"
    )
    (tmp_path / "images").mkdir()
    for index, image in enumerate(pictures(6)):
        Image.fromarray((image[0] * 255).byte().numpy()).save(tmp_path / "images" / f"{index}.png")
    (tmp_path / "mine.yaml").write_text(
        """
trainer:
  accelerator: cpu
  max_steps: 10
  max_epochs: -1
  limit_val_batches: 0
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: callbacks.EMParameterCallback
      init_args: {rule: callbacks.NewtonRule, sweep: 8}
model:
  class_path: lightning_modules.Reconstruction
  init_args:
    operator:
      class_path: lightning_modules.FunctionOperator
      init_args: {function: mine.shrink, parameters: {weight: [0.001, 1.0]}}
    noise_std: 0.1
data:
  class_path: datamodules.ImageSetDataModule
  init_args: {images: images, crop_size: 16, seed: 0}
"""
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    command = build(["-c", "mine.yaml"])
    command.trainer.fit(command.model, command.datamodule)
    from mine import shrink  # type: ignore[import-not-found]

    learned = learn_parameters(shrink, {"weight": (0.001, 1.0)}, "images", noise_std=0.1, crop_size=16, progress=False)
    assert command.model.em_parameters.get_parameters() == learned.parameters


def test_an_operator_learns_what_is_named_and_keeps_the_rest() -> None:
    learned = learn_parameters(
        TotalVariation(10), {"weight": (0.002, 2.0)}, pictures(8), noise_std=NOISE_STD, progress=False
    )
    assert 0.1 < learned.parameters["weight"] < 2.0
    assert learned.operator.parameter_specs[0].start == learned.parameters["weight"]


def test_global_random_numbers_are_left_alone() -> None:
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with warnings.catch_warnings(record=True, action="always") as seen:
        learned = learn_parameters(blur, {"width": (0.3, 3.0)}, pictures(4), noise_std=0.1, steps=1, progress=False)
    assert torch.equal(torch.rand(2), expected)
    assert not [str(each.message) for each in seen if "LeafSpec" in str(each.message)], "that is Lightning's"
    assert repr(learned) == f"LearnedParameters(parameters={learned.parameters}, errors={learned.errors})"


class Counter:
    """A function that keeps state."""

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, noisy: Tensor, *, weight: Tensor) -> Tensor:
        self.calls += 1
        return noisy * weight.view(-1, 1, 1, 1) * self.calls


def root(noisy: Tensor, *, weight: Tensor) -> Tensor:
    return noisy * (weight - 0.1).sqrt().view(-1, 1, 1, 1)


BAD: dict[str, tuple[Callable[..., Any], dict[str, Any], str]] = {
    "shape": (
        lambda noisy, *, weight: noisy[:, :, 1:] * weight.view(-1, 1, 1, 1),
        {},
        r"returned float32 \[2, 1, 19, 17\]",
    ),
    "an array": (lambda noisy, *, weight: noisy.numpy(), {}, "say arrays=True"),
    "idle": (lambda noisy, *, weight: 0.5 * noisy, {}, "does not depend on weight"),
    "NaN": (root, {}, "NaN or infinite pixels under weight = 0.0316.*narrow the bounds"),
    "state": (Counter(), {}, "keeps state or draws random numbers"),
    "random": (lambda noisy, *, weight: noisy * weight.mean() + torch.rand_like(noisy), {}, "keeps state"),
    "name": (lambda noisy, *, width: noisy, {}, "has no argument 'weight': its arguments are noisy, width"),
    "reversed": (blur, {"parameters": {"width": (1.0, 0.1)}}, "lower ≤ upper"),
    "zero": (blur, {"parameters": {"width": (0.0, 1.0)}}, "must be positive"),
    "three": (blur, {"parameters": {"width": (0.1, 0.2, 0.3)}}, "must have two bounds"),
    "one choice": (blur, {"parameters": {"width": [0.1]}}, "at least two values"),
    "none": (blur, {"parameters": {}}, "give at least one parameter"),
    "no function": (3, {}, "must be a function or a RestorationOperator, got int"),  # type: ignore[dict-item]
    "no level": (blur, {"parameters": {"width": BOUNDS}, "noise_std": None}, "noise_std is missing"),
    "level of 255": (blur, {"parameters": {"width": BOUNDS}, "noise_std": 25}, "where white is 1, got 25"),
    "no images": (blur, {"parameters": {"width": BOUNDS}, "images": []}, "has no image"),
    "one image": (
        blur,
        {"parameters": {"width": BOUNDS}, "images": torch.rand(3, 8, 8)},
        r"put a single image into a list",
    ),
    "bytes as floats": (
        blur,
        {"parameters": {"width": BOUNDS}, "images": 255 * torch.rand(2, 1, 9, 9)},
        "divide by 255",
    ),
    "NaN pixels": (blur, {"parameters": {"width": BOUNDS}, "images": torch.full((2, 1, 9, 9), math.nan)}, "has NaN"),
    "sides": (
        blur,
        {"parameters": {"width": BOUNDS}, "images": (torch.rand(2, 1, 9, 9), torch.rand(3, 1, 9, 9))},
        "as many clean",
    ),
    "sizes": (
        blur,
        {"parameters": {"width": BOUNDS}, "images": (torch.rand(2, 1, 9, 9), torch.rand(2, 1, 9, 8))},
        "differ",
    ),
    "steps": (blur, {"parameters": {"width": BOUNDS}, "steps": 0}, "steps must be at least 1, got 0"),
    "a value for each image": (
        lambda noisy, *, weight: noisy * weight,
        {},
        r"with weight \[\d+\]: .* weight\.view\(-1, 1, 1, 1\) is multiplied with images",
    ),
    "rule": (
        lambda noisy, *, weight: blur(noisy, width=weight.detach()),
        {"rule": NewtonRule()},
        "NewtonRule needs gradients, and weight has none: choose rule=SPSARule",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_what_cannot_be_learned_from_is_named_before_anything_is(case: str) -> None:
    function, more, message = BAD[case]
    options = {"parameters": {"weight": (0.001, 1.0)}, "images": pictures(4), "noise_std": 0.1, "progress": False}
    with pytest.raises(ValueError, match=message):
        learn_parameters(function, **{**options, **more})


def test_bounds_without_a_useful_value_are_named() -> None:
    with pytest.warns(UserWarning, match=r"width ended on its lower bound 8") as found:
        learn_parameters(blur, {"width": (8.0, 80.0)}, pictures(), noise_std=0.05, progress=False)
    assert any("no better than the noisy ones" in str(warning.message) for warning in found)


def test_a_gradient_that_is_cut_off_is_noticed_and_done_without() -> None:
    learned = learn_parameters(
        lambda noisy, *, width: blur(noisy, width=width.detach()),
        {"width": BOUNDS},
        pictures(),
        noise_std=0.1,
        progress=False,
    )
    assert len(learned.history) == 20  # SPSARule
    assert gap(by_blur, learned.parameters["width"], BOUNDS) < 0.02


def test_a_module_that_evaluates_no_pairs_is_named() -> None:
    class Plain(Reconstruction):
        def training_step(self, batch: Any, batch_idx: int) -> dict[str, Any]:
            self.em_parameters.pair_distance, kept = None, self.em_parameters.pair_distance
            result = super().training_step(batch, batch_idx)
            self.em_parameters.pair_distance = kept
            return result

    import lightning as L

    module = Plain(FunctionOperator(blur, {"width": BOUNDS}), noise_std=0.1)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        callbacks=[EMParameterCallback(SPSARule())],
        logger=False,
        limit_val_batches=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with pytest.raises(Exception, match=r"SPSARule learns from pairs, and training_step handed in no EStep\.gradient"):
        trainer.fit(module, datamodule=ImageSetDataModule(pictures(4), batch_size=4))


def test_the_python_of_its_page_runs() -> None:
    """One block after the other, as they are read; those of libraries that are not installed are left out."""
    page = (Path(__file__).parents[1] / "docs" / "site" / "learning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"<!-- run(?:: (\w+))? -->\n```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 3
    names: dict[str, Any] = {}
    torch.manual_seed(0)
    for library, block in blocks:
        if not library or importlib.util.find_spec(library):
            exec(compile(block, "learning.md", "exec"), names)
            assert len(names["learned"].history) in (10, 20)
    assert 0.1 < names["learned"].parameters.get("h", 0.2) < 1.0


def test_values_that_fail_between_the_bounds_are_named() -> None:
    """NaN where the start and both bounds are sound, met on the way."""

    def gapped(noisy: Tensor, *, width: Tensor) -> Tensor:
        inside = ((width > 0.1) & (width < 0.5)).view(-1, 1, 1, 1)
        return torch.where(inside, torch.nan, blur(noisy, width=width))

    with pytest.raises(ValueError, match=r"gapped returned NaN or infinite pixels under width = 0\.\d+: narrow"):
        learn_parameters(gapped, {"width": BOUNDS}, pictures(8), noise_std=0.1, progress=False)


def test_a_parameter_that_changes_nothing_is_named_and_stays() -> None:
    def half(noisy: Tensor, *, width: Tensor, unused: Tensor) -> Tensor:
        return blur(noisy, width=width)

    with pytest.warns(UserWarning, match="does not depend on unused"):
        learned = learn_parameters(
            half, {"width": BOUNDS, "unused": (0.1, 10.0)}, pictures(), noise_std=0.1, progress=False
        )
    assert gap(by_blur, learned.parameters["width"], BOUNDS) < 0.05
