"""The module between table, diffusion and network."""

from typing import Any

import lightning as L
import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_modules import (
    BilateralFilter,
    GraphDiffusion,
    GraphDiffusionReconstruction,
    ParameterSpec,
    ParameterTable,
    Reconstruction,
    ResidualDenoiser,
    RestorationOperator,
    TotalVariation,
)
from lightning_modules.em import LabelAssignment


def make(**options: Any) -> GraphDiffusionReconstruction:
    table = options.pop(
        "em_parameters",
        ParameterTable(
            initial={"radius": 3.0, "smooth_steps": 2},
            bounds={"radius": (1.5, 3.0)},
            learned=["sigma"],
            per_row=["sigma"],
            row_names=["cat", "dog"],
            initial_rows={"dog": {"sigma": 0.45}},
        ),
    )
    return GraphDiffusionReconstruction(options.pop("diffusion", GraphDiffusion(3)), table, **options)


def make_batch(size: int = 4, weight: list[float] | None = None) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    image = nn.functional.avg_pool2d(torch.rand(size, 3, 41, 35, generator=generator), 5, 1)
    return {
        "image": image,
        "label": torch.arange(size) % 3 - 1,
        "index": torch.arange(size),
        "weight": torch.tensor(weight or [1.0] * size),
        "key": torch.randint(2**62, (size,), generator=generator),
    }


@pytest.fixture(autouse=True)
def no_trainer(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps are called without a Trainer here; there is nobody to log to."""
    for name in ("log", "log_dict"):
        monkeypatch.setattr(Reconstruction, name, lambda self, *args, **options: None)


def test_training_step_is_the_e_step_of_each_image() -> None:
    module, batch = make(assignment=LabelAssignment(), smoothness_weight=0.1), make_batch(weight=[1.0, 1.0, 1.0, 0.0])
    output = module.train().training_step(batch, 0)
    step = output["em"]
    assert step.responsibilities.tolist() == [[0, 0], [1, 0], [0, 1], [0, 0]]
    noisy, level = module._observe(batch)
    sigma = torch.tensor([0.3, 0.3, 0.45, 0.3])
    others = {"tau": 0.1, "radius": 3.0, "sigma_s": 10.0, "sigma_f": 0.3, "smooth_steps": 2}
    restored = module.diffusion(noisy, sigma=sigma, **others, noise=level)
    expected = (restored - batch["image"]).square().mean((1, 2, 3))
    torch.testing.assert_close(step.reconstruction, expected)
    smoothness = module.diffusion.smoothness(restored, sigma=sigma)
    torch.testing.assert_close(step.smoothness, smoothness.score)
    torch.testing.assert_close(step.similarity, smoothness.similarity)
    weight = batch["weight"]
    loss = (weight * (expected - 0.1 * smoothness.score)).mean()
    torch.testing.assert_close(output["loss"], loss)
    output["loss"].backward()
    gradient = module.em_parameters.pop_gradient()
    assert gradient is not None
    assert gradient[:3, 0].all()
    assert not gradient[3].any()


def test_the_logarithm_of_the_error_is_that_of_each_image() -> None:
    batch = make_batch(weight=[1.0, 1.0, 1.0, 0.0])
    plain, logarithm = make(), make(loss="log_mse", data_range=2.0)
    error = plain.train().training_step(batch, 0)["em"].reconstruction
    output = logarithm.train().training_step(batch, 0)
    torch.testing.assert_close(output["em"].reconstruction, (error + 1e-6).log())
    torch.testing.assert_close(output["loss"], ((error + 1e-6).log() * batch["weight"]).mean())


def test_smoothness_bonus_moves_the_table_and_not_the_network() -> None:
    gradients = []
    for alpha in (0.0, 0.5):
        torch.manual_seed(0)
        module = make(backbone=ResidualDenoiser(width=4, depth=4, graph_on="features"), smoothness_weight=alpha)
        module.train().training_step(make_batch(), 0)["loss"].backward()
        assert module.backbone is not None
        network = torch.cat([parameter.grad.flatten() for parameter in module.backbone.parameters()])
        gradients.append((network, module.em_parameters.pop_gradient()))
    torch.testing.assert_close(gradients[0][0], gradients[1][0])
    assert not torch.equal(gradients[0][1], gradients[1][1])


def test_noise_is_a_function_of_the_key() -> None:
    module, batch = make(noise_std=(0.02, 0.2)), make_batch()
    noisy, level = module._observe(batch)
    alone = {name: value[2:3] for name, value in batch.items()}
    single, single_level = module._observe(alone)
    assert torch.equal(single[0], noisy[2])
    assert torch.equal(single_level[0], level[2])
    assert ((level >= 0.02) & (level <= 0.2)).all()
    assert len(set(level.tolist())) == 4
    measured = (noisy - batch["image"]).flatten(1).std(1)
    torch.testing.assert_close(measured, level, rtol=0.05, atol=0)


def test_unknown_noise_is_estimated() -> None:
    batch = make_batch()
    noisy, told = make(noise_std=0.1, estimate_noise=True)._observe(batch)
    assert not torch.equal(told, torch.full((4,), 0.1))
    torch.testing.assert_close(told, torch.full((4,), 0.1), rtol=0.15, atol=0)
    module = make(noise_std=0.1).eval()
    torch.testing.assert_close(module(noisy), module(noisy, noise_std=told))


def test_metrics_equal_scikit_image_and_leave_out_padded_repeats() -> None:
    module, batch = make().eval(), make_batch(weight=[1.0, 2.0, 1.0, 0.0])
    with torch.no_grad():
        output = module.validation_step(batch, 0)
    values = {name: float(value) for name, value in module.val_metrics.compute().items()}
    clean, noisy, restored = (output[name][:3].double().clamp(0, 1).numpy() for name in ("clean", "noisy", "restored"))
    psnr = [peak_signal_noise_ratio(*pair, data_range=1) for pair in zip(clean, restored, strict=True)]
    before = [peak_signal_noise_ratio(*pair, data_range=1) for pair in zip(clean, noisy, strict=True)]
    assert values["val/psnr"] == pytest.approx(sum(psnr) / 3, abs=1e-3)
    assert values["val/psnr_noisy"] == pytest.approx(sum(before) / 3, abs=1e-3)
    assert values["val/psnr_gain"] == pytest.approx((sum(psnr) - sum(before)) / 3, abs=1e-3)
    gauss = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "channel_axis": 0, "data_range": 1}
    ssim = [structural_similarity(*pair, **gauss) for pair in zip(clean, restored, strict=True)]
    assert values["val/ssim"] == pytest.approx(sum(ssim) / 3, abs=0.01)  # scikit-image crops the border


class Blur(nn.Module):
    def forward(self, noisy: Tensor) -> Tensor:
        return nn.functional.avg_pool2d(noisy, 3, 1, 1, count_include_pad=False)


def test_a_plain_network_is_diffused_as_free_of_noise_and_the_perceptual_loss_is_added() -> None:
    class Mean(nn.Module):
        def forward(self, restored: Tensor, clean: Tensor) -> Tensor:
            return (restored - clean).abs().mean((1, 2, 3))

    module, batch = make(backbone=Blur(), perceptual=Mean(), perceptual_weight=0.5, data_range=2.0), make_batch()
    output = module.train().training_step(batch, 0)
    noisy, _ = module._observe(batch)
    others = {"sigma": 0.3, "tau": 0.1, "radius": 3.0, "sigma_s": 10.0, "sigma_f": 0.3, "smooth_steps": 2}
    restored = module.diffusion(Blur()(noisy), **others)
    torch.testing.assert_close(output["em"].reconstruction, 4 * (restored - batch["image"]).square().mean((1, 2, 3)))
    torch.testing.assert_close(output["em"].perceptual, 0.5 * Mean()(restored, batch["image"]))


def test_predict_restores_images_as_they_are_unless_the_batch_says_that_they_are_clean() -> None:
    module, batch = make().eval(), {**make_batch(1), "name": ["a.png"]}
    with torch.no_grad():
        demonstration = module.predict_step({**batch, "clean": True}, 0)
        restored = module.predict_step({**batch, "noise_std": torch.tensor([0.07])}, 0)
    assert torch.equal(demonstration["clean"], batch["image"])
    assert not torch.equal(demonstration["noisy"], batch["image"])
    assert "clean" not in restored
    assert torch.equal(restored["noisy"], batch["image"])
    assert restored["noise_std"].tolist() == [pytest.approx(0.07)]
    assert set(restored["parameters"]) == {"sigma", "tau", "radius", "sigma_s", "sigma_f", "smooth_steps"}
    bad = {**batch, "image": batch["image"].clone()}
    bad["image"][0, 0, 3, 3] = torch.nan
    with pytest.raises(ValueError, match=r"a\.png: the image has NaN or infinite pixels"):
        module.predict_step(bad, 0)


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (30, 1), (2, 2)])
def test_predict_leaves_images_that_are_too_small_as_they_are(size: tuple[int, int]) -> None:
    module = make().eval()
    image = torch.rand(1, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), pytest.warns(UserWarning, match=r"a\.png: left as it is: .*pixels"):
        restored = module.predict_step({"image": image, "name": ["a.png"], "label": torch.tensor([-1])}, 0)
    assert torch.equal(restored["restored"], image)
    assert (restored["noise_std"].tolist(), restored["parameters"]) == ([0], {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"noise_std": -0.1}, "noise_std must be a number ≥ 0"),
        ({"noise_std": (0.2, 0.1)}, "noise_std must be a number ≥ 0 or a range"),
        ({"data_range": 0}, "data_range must be positive, got 0"),
        ({"smoothness_weight": -1}, "smoothness_weight must not be negative"),
        (
            {
                "diffusion": GraphDiffusion(8, 6, "patches"),
                "em_parameters": ParameterTable(bounds={"radius": (6.0, 20.0)}),
            },
            "the nearest patches are 6 pixels",
        ),
        (
            {"em_parameters": ParameterTable(initial={"g": 1.0}, bounds={"g": (0.5, 2.0)})},
            "initial names 'g', but the operator's parameters are sigma",
        ),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_image_smaller_than_a_patch() -> None:
    with pytest.raises(ValueError, match="smaller than a patch"):
        make()(torch.rand(1, 3, 2, 9), noise_std=0.1)


class Halved(RestorationOperator):
    """Returns images of half the size."""

    @property
    def parameter_specs(self) -> tuple[ParameterSpec, ...]:
        return (ParameterSpec("share", 0.5, (0.1, 1.0)),)

    def forward(self, noisy: Tensor, *, noise: Any, guide: Tensor | None = None, **parameters: Any) -> Tensor:
        return noisy[..., ::2, ::2]


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda: Reconstruction(TotalVariation(), backbone=Blur()),
            "TotalVariation has parameters in units of the noise",
        ),
        (
            lambda: make(diffusion=GraphDiffusion(3, widths="noise"), backbone=Blur()),
            "choose an operator with absolute parameters",
        ),
        (
            lambda: Reconstruction(TotalVariation(), smoothness_weight=0.1),
            "TotalVariation has no measure of smoothness",
        ),
        (lambda: Reconstruction(TotalVariation(), add_noise=False), "choose objective='sure'"),
        (lambda: Reconstruction(TotalVariation(), noise_std=25), "25 of 255 is 0.0980"),
        (
            lambda: Reconstruction(TotalVariation(), ParameterTable(initial={"wieght": 1.0})),
            "initial names 'wieght', but the operator's parameters are weight",
        ),
        (
            lambda: Reconstruction(TotalVariation(), ParameterTable(initial={"weight": 100.0})),
            r"'weight' starts at 100.0, outside its bounds \[0.02, 20.0\]",
        ),
        (lambda: Reconstruction(Halved())(torch.rand(1, 3, 8, 8), 0.1), r"Halved returned \[1, 3, 4, 4\] for images"),
    ],
)
def test_what_would_not_work_is_refused_by_name(build: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_an_operator_that_declares_a_name_twice_is_refused() -> None:
    spec = ParameterSpec("share", 0.5, (0.1, 1.0))
    with pytest.raises(ValueError, match="the operator declares 'share' twice"):
        ParameterTable().declare([spec, spec])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"key": None}, ValueError, r"no entry 'key', which is needed.*\n.*key_stream.*\n.*batch\[\"key\"\]"),
        ({"image": torch.zeros(4, 3, 8, 8, dtype=torch.uint8)}, TypeError, "divide bytes by 255"),
        ({"image": torch.zeros(0, 3, 8, 8)}, ValueError, "the batch is empty"),
        ({"noise_std": torch.tensor(25.0)}, ValueError, "25 of 255 is 0.0980"),
        ({"noise_std": torch.zeros(3)}, ValueError, "noise_std must be one number for each of the 4 images"),
    ],
)
def test_the_first_batch_of_a_run_is_held_against_the_contract(change: Any, error: type, message: str) -> None:
    batch = {name: value for name, value in {**make_batch(), **change}.items() if value is not None}
    with pytest.raises(error, match=message):
        make().train().training_step(batch, 0)


def test_validation_needs_the_index() -> None:
    batch = {name: value for name, value in make_batch().items() if name != "index"}
    with pytest.raises(ValueError, match="no entry 'index'"):
        make().eval().validation_step(batch, 0)


def test_plain_batches_get_keys_by_position_and_the_last_small_one_goes_on() -> None:
    module = Reconstruction(TotalVariation(4)).train()
    image, label = torch.rand(9, 3, 8, 8), torch.arange(9)
    keys = []
    for number, part in enumerate((slice(0, 4), slice(4, 8), slice(8, 9))):
        batch = module._checked_batch((image[part], label[part]), number, "train")
        assert batch["index"].tolist() == list(range(9))[part]
        assert batch["label"].tolist() == list(range(9))[part]
        keys += batch["key"].tolist()
    assert len(set(keys)) == 9
    again = module._checked_batch((image[:4], label[:4]), 0, "val")
    assert not set(again["key"].tolist()) & set(keys)
    output = module.training_step((image[:4], label[:4]), 0)
    assert output["em"].weight.tolist() == [1.0] * 4


def test_a_map_of_levels_restores_each_part_at_its_own() -> None:
    module = Reconstruction(GraphDiffusion(3, widths="noise")).eval()
    noisy = make_batch(1)["image"] + 0.1 * torch.randn(1, 3, 37, 31, generator=torch.Generator().manual_seed(2))
    level = torch.full((1, 1, 37, 31), 0.1)
    torch.testing.assert_close(module(noisy, level), module(noisy, 0.1), atol=1e-5, rtol=1e-4)
    level[..., 16:] = 0
    assert torch.equal(module(noisy, level)[..., 16:], noisy[..., 16:])


DOORS: dict[str, Any] = {
    "module": lambda level: Reconstruction(TotalVariation())(torch.rand(2, 3, 9, 8), level),
    "graph": lambda level: GraphDiffusionReconstruction(GraphDiffusion(3))(torch.rand(2, 3, 9, 8), level),
    "operator": lambda level: BilateralFilter()(torch.rand(2, 3, 9, 8), noise=level, sigma_space=1.0, sigma_range=1.0),
    "argument": lambda level: Reconstruction(TotalVariation(), noise_std=level),
    "range": lambda level: Reconstruction(TotalVariation(), noise_std=(0.1, level)),
    "levels": lambda level: Reconstruction(TotalVariation(), noise_levels=[0.1, level]),
}


@pytest.mark.parametrize("door", DOORS)
def test_a_level_of_255_is_refused_at_every_door_with_what_was_meant(door: str) -> None:
    with pytest.raises(ValueError, match=r"must lie between 0 and 1, where white is 1, got 25.*; 25 of 255 is 0\.0980"):
        DOORS[door](25)


@pytest.mark.parametrize("operator", [TotalVariation, BilateralFilter, lambda: GraphDiffusion(3)])
def test_whole_numbers_and_empty_batches_are_refused_by_name(operator: Any) -> None:
    module = Reconstruction(operator())
    with pytest.raises(ValueError, match=r"images must be floating-point, got torch\.uint8: divide by 255"):
        module(torch.zeros(2, 3, 9, 8, dtype=torch.uint8), 0.1)
    for shape in ((0, 3, 9, 8), (2, 3, 0, 8)):
        with pytest.raises(ValueError, match="images are empty, got"):
            module(torch.zeros(shape), 0.1)


def test_a_validated_module_can_be_trained() -> None:
    """`validate` runs in inference mode, whose tensors a later validation within `fit` could not add to."""
    module = Reconstruction(TotalVariation())
    data = DataLoader(TensorDataset(torch.rand(4, 3, 16, 16), torch.zeros(4, dtype=torch.long)), 2)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "num_sanity_val_steps": 0}
    trainer = L.Trainer(accelerator="cpu", max_epochs=1, enable_model_summary=False, **quiet)
    trainer.validate(module, data, verbose=False)
    trainer.fit(module, data, data)
    assert trainer.state.finished
    assert module.val_metrics["psnr"].weight.item() == 4  # all images, once


@pytest.mark.parametrize(("operator", "no_grad"), [(TotalVariation, False), (lambda: GraphDiffusion(3), True)])
def test_a_module_in_evaluation_compiles_as_one_graph(operator: Any, no_grad: bool) -> None:
    torch.compiler.reset()
    module = Reconstruction(operator(), noise_std=0.1).eval()
    images = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.set_grad_enabled(not no_grad):
        compiled = torch.compile(module, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(images, noise_std=0.1), module(images, noise_std=0.1))
