"""The table: bounds, rows, leaves, projection, precision, checkpoints."""

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lightning_modules import GraphDiffusion, ParameterSpec
from lightning_modules.em import EStep, LabelAssignment, ParameterTable, SufficientStatistics, TableValues

CLASSES = ["cat", "dog", "owl"]


def table(**options: Any) -> ParameterTable:
    options = {"per_row": ["sigma", "smooth_steps"], "row_names": CLASSES, **options}
    return ParameterTable(**options).declare(GraphDiffusion().parameter_specs)


def test_responsibilities_blend_offsets_in_log_space_and_clamp_where_read() -> None:
    t = table(initial_rows={"cat": {"sigma": 0.15}, "dog": {"sigma": 0.45}})
    responsibilities = torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 0.5, 0], [0, 2, 0]])
    sigma = t(responsibilities)["sigma"]
    expected = [0.3, 0.15, math.sqrt(0.15 * 0.45), 0.5]  # the last would be 0.675 and is clamped
    torch.testing.assert_close(sigma, torch.tensor(expected))
    assert t.get_parameters(0)["sigma"] == pytest.approx(0.15)
    assert t.get_parameters()["sigma"] == pytest.approx(0.3)


def test_gradient_of_each_image_arrives_with_the_backward_pass() -> None:
    t = table()
    theta = t(torch.eye(3)[:2])
    weight = torch.tensor([2.0, 5.0])
    (weight * theta["sigma"] ** 2 + theta["tau"]).sum().backward()
    gradient = t.pop_gradient()
    assert gradient is not None
    columns = dict(zip(t.names, gradient.unbind(1), strict=True))
    torch.testing.assert_close(columns["sigma"], 2 * weight.double() * 0.09, rtol=1e-6, atol=0)  # dℓ/d log θ = θ ℓ'
    torch.testing.assert_close(columns["tau"], torch.full((2,), 0.1, dtype=torch.float64), rtol=1e-6, atol=0)
    assert not columns["radius"].any()
    assert t.pop_gradient() is None
    assert t.anchor.grad is not None
    assert t.anchor.grad.item() == 0


def test_two_forwards_of_a_step_add_up_and_uncollected_leaves_do_not_pile_up() -> None:
    t = table()
    for _ in range(5):  # nobody collects
        t(torch.zeros(2, 3))["sigma"].sum().backward()
    (t(torch.zeros(2, 3))["sigma"].sum() + t(torch.zeros(2, 3))["sigma"].sum()).backward()
    gradient = t.pop_gradient()
    assert gradient is not None
    torch.testing.assert_close(gradient[:, 0], torch.full((2,), 0.6, dtype=torch.float64), rtol=1e-6, atol=0)
    with torch.no_grad():
        t(torch.zeros(2, 3))
    assert not t._leaves
    for _ in range(3):  # somebody restores images without `no_grad`
        t.eval()(torch.zeros(2, 3))
    assert not t._leaves


def test_integers_round_half_up_stay_whole_and_are_plain_where_nobody_learns_them() -> None:
    t = table(initial_rows={"cat": {"smooth_steps": 6}, "dog": {"smooth_steps": 9}})
    steps = t(torch.tensor([[0.0, 0, 0], [1, 0, 0], [0.5, 0, 0], [0, 0.5, 0]]))["smooth_steps"]
    assert steps.tolist() == [5, 6, 6, 7]  # 5.5 and 7.0
    assert steps.dtype == torch.long
    fixed = table(learned=["sigma"], per_row=["sigma"])
    assert fixed(torch.zeros(1, 3))["smooth_steps"] == 5
    assert (fixed.upper_bound("radius"), fixed.lower_bound("radius"), fixed.upper_bound("sigma")) == (10.0, 10.0, 0.5)


@given(st.integers(0, 10**6), st.floats(0.1, 5))
def test_projection_keeps_bounds_and_what_a_row_has_learned(seed: int, size: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    t = table(learned=["sigma", "smooth_steps"])
    for _ in range(4):
        before = TableValues(t.shared.clone(), t.offsets.clone())
        proposal = TableValues(
            t.shared + size * torch.randn(6, generator=generator, dtype=torch.float64),
            t.offsets + size * torch.randn(3, 6, generator=generator, dtype=torch.float64),
        )
        after = t.project(proposal)
        assert (after.shared >= t.lower).all()
        assert (after.shared <= t.upper).all()
        moved = t.mask(["sigma", "smooth_steps"])
        assert torch.equal(after.shared[~moved], before.shared[~moved])
        assert torch.equal(after.offsets[:, ~moved], before.offsets[:, ~moved])
        # No row is carried further out of the bounds than it was by its own step.
        excess_after, excess_before = (
            torch.relu(row - t.upper) + torch.relu(t.lower - row)
            for row in (after.shared + after.offsets, after.shared + before.offsets)
        )
        assert (excess_after <= excess_before + 1e-12).all()
        # A proposal that leaves the offsets alone leaves them alone, wherever the global set goes.
        unchanged = t.project(TableValues(proposal.shared, before.offsets))
        torch.testing.assert_close(unchanged.offsets, before.offsets, rtol=0, atol=0)
        t.write(after)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_state_keeps_float64_whatever_the_module_is_cast_to(dtype: torch.dtype) -> None:
    t = table().to(dtype)
    assert {buffer.dtype for buffer in t.buffers()} == {torch.float64}
    assert t.get_parameters()["sigma"] == pytest.approx(0.3, abs=1e-15)
    assert t(torch.zeros(1, 3))["sigma"].dtype == dtype


def test_state_dict_round_trip_and_a_table_of_another_size(tmp_path: Any) -> None:
    t = table()
    t.write(TableValues(t.shared + 0.1, t.offsets + 0.01))
    torch.save(t.state_dict(), tmp_path / "table.pt")
    other = table()
    other.load_state_dict(torch.load(tmp_path / "table.pt", weights_only=True))
    assert torch.equal(other.values(), t.values())
    assert other.initial_parameters()["sigma"] == pytest.approx(0.3)
    with pytest.raises(ValueError, match=r"has 3 rows and 6 parameters, this one has 2 rows \(cat, dog\)"):
        table(row_names=["cat", "dog"]).load_state_dict(t.state_dict())
    swapped = table(row_names=["dog", "cat", "owl"])
    before = swapped.values().clone()
    with pytest.raises(ValueError, match="values would land under other names"):
        swapped.load_state_dict(t.state_dict())
    assert torch.equal(swapped.values(), before)


def test_constants_follow_a_checkpoint() -> None:
    source, target = (
        table(initial={"smooth_steps": steps}, learned=["sigma"], per_row=None, row_names=None) for steps in (7, 5)
    )
    target.load_state_dict(source.state_dict())
    assert target(torch.zeros(1, 0))["smooth_steps"] == 7


def test_parameters_of_ones_own() -> None:
    t = ParameterTable(initial={"gain": 2.0}, bounds={"gain": (1.0, 4.0)})
    assert t.names == ("gain",)
    assert t(torch.zeros(3, 0))["gain"].tolist() == [2.0, 2.0, 2.0]
    with pytest.raises(ValueError, match=r"no parameters yet: pass it to Reconstruction.* \(gain has only one\)"):
        ParameterTable(initial={"gain": 2.0})(torch.zeros(3, 0))


def test_a_bank_is_one_parameter_of_several_columns() -> None:
    specs = [ParameterSpec("width", [0.2, 0.4, 0.8], (0.1, 1.0), shape=(3,)), ParameterSpec("gain", 2.0, (1.0, 4.0))]
    t = ParameterTable(per_row=["width"], row_names=["a", "b"], initial_rows={"b": {"width": [0.1, 0.4, 1.0]}})
    t.declare(specs)
    assert t.column_names == ("width[0]", "width[1]", "width[2]", "gain")
    assert t.get_parameters() == {"width": [0.2, 0.4, 0.8], "gain": 2.0}
    assert t.get_parameters(1)["width"] == pytest.approx([0.1, 0.4, 1.0])
    theta = t(torch.tensor([[0.0, 0.0], [0.0, 1.0]]))
    assert theta["width"].shape == (2, 3)
    weight = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    (weight * theta["width"]).sum().backward()
    gradient = t.pop_gradient()
    assert gradient is not None
    expected = weight.double() * torch.tensor([[0.2, 0.4, 0.8], [0.1, 0.4, 1.0]], dtype=torch.float64)
    torch.testing.assert_close(gradient[:, :3], expected, rtol=1e-6, atol=0)  # dℓ/d log θ = θ ℓ'
    assert t.mask(["width"]).tolist() == [True, True, True, False]
    assert t.vector({"gain": 5.0}, default=1.0).tolist() == [1, 1, 1, 5]
    other = ParameterTable(per_row=["width"], row_names=["a", "b"]).declare(specs)
    other.load_state_dict(t.state_dict())
    assert torch.equal(other.values(), t.values())
    with pytest.raises(ValueError, match="values would land under other names"):
        ParameterTable(per_row=["gain"], row_names=["a", "b"]).declare(specs[::-1]).load_state_dict(t.state_dict())


def test_state_holds_tensors_only_and_names_survive_an_average() -> None:
    t = table()
    averaged = {name: 0.999 * value + 0.001 * value for name, value in t.state_dict().items()}
    assert all(torch.is_tensor(value) for value in averaged.values())
    table().load_state_dict(averaged)


def test_units_are_part_of_the_names_and_a_learned_table_keeps_its_values() -> None:
    absolute, noise = (
        ParameterTable().declare(GraphDiffusion(widths=w).parameter_specs) for w in ("absolute", "noise")
    )
    with pytest.raises(ValueError, match="values would land under other names"):
        absolute.load_state_dict(noise.state_dict())
    noise.write(TableValues(noise.shared + 0.1, noise.offsets))
    learned = noise.values().clone()
    assert torch.equal(noise.declare(GraphDiffusion(widths="noise").parameter_specs).values(), learned)
    with pytest.raises(ValueError, match="of another operator: make a table for each operator"):
        noise.declare(GraphDiffusion().parameter_specs)


def test_a_partial_table_waits_for_its_operator() -> None:
    t = ParameterTable({"sigma": 0.2}, {"sigma": (0.1, 0.4)}, learned=["sigma", "tau"])
    assert t.declare(GraphDiffusion().parameter_specs).learned == ("sigma", "tau")
    with pytest.raises(ValueError, match="learned names 'tua', but the table's parameters are gain"):
        ParameterTable({"gain": 0.2}, {"gain": (0.1, 0.4)}, learned=["tua"])(torch.zeros(1, 0))


def test_a_checkpoint_of_version_0_1_loads() -> None:
    t = table()
    state = {name: value for name, value in t.state_dict().items() if name != "layout"}
    state["_extra_state"] = {"names": list(t.names), "rows": CLASSES}
    table().load_state_dict(state)
    state["_extra_state"]["rows"] = CLASSES[::-1]
    with pytest.raises(ValueError, match="values would land under other names"):
        table().load_state_dict(state)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bounds": {"sigma": (0.5, 0.1)}}, r"bounds of 'sigma' must be finite with lower ≤ upper, got \(0.5, 0.1\)"),
        ({"bounds": {"sigma": (0.0, 0.5)}}, "must be positive"),
        ({"bounds": {"tau": (0.1, math.inf)}}, "must be finite"),
        ({"initial": {"sigma": 0.9}}, r"'sigma' starts at 0.9, outside its bounds \[0.1, 0.5\]"),
        ({"initial": {"smooth_steps": 2.5}}, "'smooth_steps' and its bounds must be whole numbers, got 2.5"),
        ({"initial": {"gain": 1.0}}, "initial names 'gain', but the operator's parameters are sigma, tau"),
        ({"learned": ["sgima"]}, "learned names 'sgima'"),
        ({"per_row": ["sgima"]}, "per_row names 'sgima'"),
        ({"row_names": ["cat", "cat"]}, "row_names must differ"),
        ({"initial_rows": {"cow": {"sigma": 0.2}}}, "names 'cow', which is no row"),
        ({"initial_rows": {"cat": {"tau": 0.2}}}, "add it to per_row"),
        ({"initial_rows": {"cat": {"sigma": 0.9}}}, "outside its bounds"),
    ],
)
def test_bad_arguments(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table(**options)


def test_bad_rows() -> None:
    with pytest.raises(ValueError, match="row 3 is not in the table: it has 3 rows"):
        table().get_parameters(3)
    with pytest.raises(ValueError, match=r"must be \[B, 3\]"):
        table()(torch.zeros(2, 4))


def test_statistics_are_exact_sums_over_any_partition_and_leave_out_weight_zero() -> None:
    generator = torch.Generator().manual_seed(0)
    responsibilities = torch.softmax(torch.randn(11, 3, generator=generator), dim=1)
    weight = torch.tensor([1.0] * 9 + [0.0, 0.0])
    values = [torch.rand(11, generator=generator) for _ in range(4)]
    values[0][10] = torch.nan  # a padded repeat must not spoil the sums
    gradient = torch.randn(11, 2, generator=generator, dtype=torch.float64)
    step = EStep(responsibilities, weight, *values, smoothness_weight=0.1)

    def add(statistics: SufficientStatistics, rows: slice) -> None:
        parts = (part[rows] if torch.is_tensor(part) else part for part in step)
        statistics.add(EStep(*parts), gradient[rows])

    whole, parts = SufficientStatistics(3, 2), SufficientStatistics(3, 2)
    add(whole, slice(0, 11))
    for begin in range(0, 11, 4):
        add(parts, slice(begin, begin + 4))
    torch.testing.assert_close(parts.sums, whole.sums)
    assert whole.finite
    share = responsibilities[:9].double()
    torch.testing.assert_close(whole.count, torch.cat([torch.tensor([9.0]).double(), share.sum(0)]))
    mean = (share * values[0][:9, None]).sum(0) / share.sum(0)
    torch.testing.assert_close(whole.mean("reconstruction")[1:], mean)
    proxy = values[0] + values[1] - 0.1 * values[2]
    torch.testing.assert_close(whole.mean("proxy")[0], proxy[:9].double().mean(), rtol=1e-6, atol=0)
    expected = (share.T @ gradient[:9]) / share.sum(0)[:, None]
    torch.testing.assert_close(whole.mean_gradient[1:], expected)


def test_labels() -> None:
    assignment, images = LabelAssignment(), torch.rand(3, 3, 4, 4)
    labels = torch.tensor([2, -1, 0])
    expected = [[0, 0, 1], [0, 0, 0], [1, 0, 0]]
    assert assignment(images, labels, torch.zeros(3), 3).tolist() == expected
    assert not assignment.eval()(images, labels, torch.zeros(3), 3).any()  # a score does not peek
    assert LabelAssignment(evaluate_with_labels=True).eval()(images, labels, torch.zeros(3), 3).tolist() == expected
    for label in (3, -2):
        with pytest.raises(ValueError, match=rf"label {label} has no row: the parameter table has 3 rows"):
            assignment.train()(images[:1], torch.tensor([label]), torch.zeros(1), 3)
