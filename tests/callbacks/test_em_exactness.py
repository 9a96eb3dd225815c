"""The same run, shared out, accumulated, in half precision, killed and resumed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from em_runs import SmoothImages, make_module, make_rule, make_trainer, real_float16, run
from launching import launch

from callbacks import EMParameterCallback

SCRIPT = Path(__file__).with_name("em_runs.py")
# Rules; and what is compared in float64: assignments that learn on their own (regimes without clean images, prototypes
# of classes), and rules that divide by differences of gradients.
RULES, ASSIGNMENTS, CURVATURES = ("gradient", "sign"), ("mixture", "similarity"), ("newton", "bayesian", "spsa")
DOUBLES = ASSIGNMENTS + CURVATURES
KINDS = RULES + DOUBLES


@pytest.fixture(scope="module")
def single(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    return {kind: run(tmp_path_factory.mktemp(kind), kind) for kind in KINDS}


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """In float64: posteriors, probes and curvatures magnify what is rounding in float32 to 1e-6 in 21 steps."""
    return {kind: run(tmp_path_factory.mktemp(kind), kind, precision="64-true") for kind in DOUBLES}


def assert_same_path(found: dict[str, Any], expected: dict[str, Any], tolerance: float) -> None:
    assert found["global_step"] == expected["global_step"] == 21
    path, wanted = (torch.tensor(each["parameters"], dtype=torch.float64) for each in (found, expected))
    assert path.shape == wanted.shape
    assert (wanted[-1] - wanted[0]).abs().max() > 0.01  # something was learned
    assert ((path - wanted).abs() / wanted.abs()).max() < tolerance
    torch.testing.assert_close(found["table"], expected["table"], rtol=tolerance, atol=0)


def test_rows_and_unlabelled_images_learn(single: dict[str, dict[str, Any]]) -> None:
    for name in KINDS:
        offsets = single[name]["weights"]["em_parameters.offsets"]
        assert offsets.any(dim=1).all(), f"a row of {name} has learned nothing: {offsets}"
        # The sign rule moves rows in whole steps, so that two of them may well meet.
        assert len({tuple(row) for row in offsets.tolist()}) >= 2, f"the rows of {name} do not differ: {offsets}"


def test_two_processes_equal_one(single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    done = launch(SCRIPT, "--devices", 2, "--batch-size", 8, "--rules", *RULES, "--out", tmp_path / "ddp.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    shared_out = torch.load(tmp_path / "ddp.pt", weights_only=True)
    for rule in RULES:
        assert_same_path(shared_out[rule], single[rule], 1e-6)
        # that of all ranks, and not of the first
        assert shared_out[rule]["train_loss"] == pytest.approx(single[rule]["train_loss"], rel=1e-6)
        for name, weight in single[rule]["weights"].items():
            torch.testing.assert_close(shared_out[rule]["weights"][name], weight, rtol=1e-4, atol=1e-6)


def test_two_processes_equal_one_in_float64(double: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    words = ("--devices", 2, "--batch-size", 8, "--precision", "64-true", "--rules", *DOUBLES)
    done = launch(SCRIPT, *words, "--out", tmp_path / "ddp.pt")
    assert done.returncode == 0, done.stderr[-3000:]
    shared_out = torch.load(tmp_path / "ddp.pt", weights_only=True)
    for kind in DOUBLES:
        # the loaders' weights are float32 in any precision
        assert_same_path(shared_out[kind], double[kind], 1e-6 if kind in CURVATURES else 1e-7)
        learned = {n: w for n, w in double[kind]["weights"].items() if n.startswith("assignment.")}
        assert kind in CURVATURES or any(weight.abs().sum() > 0 for weight in learned.values())
        for name, weight in learned.items():
            torch.testing.assert_close(shared_out[kind]["weights"][name], weight, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", DOUBLES)
def test_accumulation_equals_large_batches_in_float64(
    double: dict[str, dict[str, Any]], kind: str, tmp_path: Path
) -> None:
    accumulated = run(tmp_path, kind, batch_size=8, accumulate_grad_batches=2, precision="64-true")
    assert_same_path(accumulated, double[kind], 1e-6 if kind in CURVATURES else 1e-7)


@pytest.mark.parametrize("rule", RULES)
def test_accumulation_equals_large_batches(single: dict[str, dict[str, Any]], rule: str, tmp_path: Path) -> None:
    accumulated = run(tmp_path, rule, batch_size=8, accumulate_grad_batches=2)
    assert_same_path(accumulated, single[rule], 1e-6)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_half_precision_with_a_real_scaler(single: dict[str, dict[str, Any]], accumulate: int, tmp_path: Path) -> None:
    half = run(
        tmp_path,
        batch_size=16 // accumulate,
        accumulate_grad_batches=accumulate,
        plugins=[real_float16()],
        precision=None,
    )
    assert half["skipped"] == 0
    path, wanted = (torch.tensor(each["parameters"], dtype=torch.float64) for each in (half, single["gradient"]))
    # float16 has eleven bits: the first gradient agrees to three digits, and Adam carries the difference along.
    assert ((path[0] - wanted[0]).abs() / wanted[0]).max() < 1e-3
    assert ((path - wanted).abs() / wanted).max() < 0.05


def test_steps_that_the_scaler_rejects_are_neither_taken_nor_counted(tmp_path: Path) -> None:
    module, callback = make_module(), EMParameterCallback(make_rule("gradient"))
    before = module.em_parameters.values().clone()
    plugins = [real_float16(init_scale=2.0**60)]
    trainer = make_trainer(tmp_path, callback, max_steps=3, plugins=plugins, precision=None)
    trainer.fit(module, SmoothImages(16))
    assert trainer.global_step == 3
    assert torch.equal(module.em_parameters.values(), before)
    assert callback.skipped_steps == 0
    assert not callback.state_dict()["rule_state"]["steps"].any()


def test_bfloat16_mixed_runs_close_to_float32(single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    mixed = run(tmp_path, precision="bf16-mixed")
    path, wanted = (torch.tensor(each["parameters"], dtype=torch.float64) for each in (mixed, single["gradient"]))
    assert ((path - wanted).abs() / wanted).max() < 0.15
    assert mixed["table"].dtype == torch.float64


@pytest.mark.parametrize("kind", ["gradient", *CURVATURES, "mixture", "similarity"])
def test_killed_and_resumed_equals_uninterrupted(kind: str, single: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    killed = launch(SCRIPT, "--kill", 4, "--rules", kind, "--out", tmp_path / "never.pt")
    assert killed.returncode == -9, killed.stderr[-3000:]
    assert not (tmp_path / "never.pt").exists()
    resumed = run(tmp_path / "resumed", kind, ckpt=tmp_path / kind / "epoch=3.ckpt")
    expected = single[kind]
    assert resumed["global_step"] == expected["global_step"]
    assert torch.equal(resumed["table"], expected["table"])
    assert resumed["parameters"] == expected["parameters"]
    assert resumed["loss"] == expected["loss"]
    for group in ("weights", "rule"):
        assert resumed[group].keys() == expected[group].keys()
        for name, tensor in expected[group].items():
            assert torch.equal(resumed[group][name], tensor), name
    moments = zip(resumed["optimizer"]["state"].values(), expected["optimizer"]["state"].values(), strict=True)
    assert all(torch.equal(one[name], other[name]) for one, other in moments for name in other)


@pytest.mark.parametrize("backbone", [True, False])
def test_torch_compile_follows_eager(backbone: bool, tmp_path: Path) -> None:
    tables = []
    for compiled in (False, True):
        torch.set_num_threads(1)
        module, callback = make_module(backbone), EMParameterCallback(make_rule("gradient"))
        trainer = make_trainer(tmp_path / str(compiled), callback, max_steps=3)
        # "aot_eager" traces forward and backward as inductor does, without the minutes of code generation.
        trainer.fit(torch.compile(module, backend="aot_eager") if compiled else module, SmoothImages(16))
        tables.append(module.em_parameters.values().clone())
    torch.testing.assert_close(tables[1], tables[0], rtol=1e-4, atol=0)
