"""Rules against plain Python, and on functions whose best parameters are known."""

from typing import Any

import pytest
import torch

from callbacks import GradientRule, Rule, SignRule
from lightning_modules.em import EStep, ParameterTable, SufficientStatistics, TableValues


def table(rows: int = 2, **options: Any) -> ParameterTable:
    return ParameterTable(
        initial={"a": 1.0, "b": 2.0, "steps": 5},
        bounds={"a": (0.01, 100.0), "b": (0.01, 100.0), "steps": (2, 10)},
        per_row=["a", "steps"],
        row_names=[f"row{row}" for row in range(rows)],
        integers=["steps"],
        **options,
    )


def statistics(
    loss: list[float], labels: list[int], gradient: list[list[float]], smoothness: float = 0.5, rows: int = 2
) -> SufficientStatistics:
    one_hot = torch.zeros(len(loss), rows)
    for image, label in enumerate(labels):
        if label >= 0:
            one_hot[image, label] = 1
    result = SufficientStatistics(rows, 3)
    step = EStep(one_hot, None, torch.tensor(loss), smoothness=torch.full((len(loss),), smoothness))
    result.add(step, torch.tensor(gradient, dtype=torch.float64))
    return result


def apply(rule: Rule, t: ParameterTable, stats: SufficientStatistics, state: Any) -> Any:
    proposal, state = rule.m_step(t, stats, state)
    t.write(t.project(proposal))
    return state


def test_gradient_rule_equals_torch_adam_on_the_global_set() -> None:
    t, rule = table(), GradientRule(lr=0.05, eps=1e-8)
    state = rule.initial_state(t)
    leaf = t.shared.clone().requires_grad_()
    adam = torch.optim.Adam([leaf], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(10):
        gradient = torch.randn(4, 3, generator=generator, dtype=torch.float64)
        gradient[:, 2] = 0
        leaf.grad = gradient.mean(0)
        adam.step()
        state = apply(rule, t, statistics([1.0] * 4, [-1] * 4, gradient.tolist()), state)
    torch.testing.assert_close(t.shared, leaf.detach(), rtol=1e-9, atol=1e-12)
    assert not t.offsets.any()  # nobody had a label


def test_gradient_rule_pools_rows() -> None:
    t, rule = table(), GradientRule(lr=0.1, pseudo_count=20)
    state = apply(rule, t, statistics([1.0] * 5, [0] * 4 + [-1], [[1.0, 0, 0]] * 5), rule.initial_state(t))
    own = 4 / 24
    expected = -0.1 * own * (1 - 0.1 * (1 - own))
    assert (t.shared + t.offsets)[0, 0].item() == pytest.approx(-0.1 + expected)
    assert t.shared[0].item() == pytest.approx(-0.1 + expected)  # the mean of the rows that have had images
    assert t.offsets[1, 0].item() == 0  # no image: offset and moments stay
    assert state["steps"].flatten().tolist() == [1, 1, 0]
    kept = {name: tensor[2].clone() for name, tensor in state.items()}
    state = apply(rule, t, statistics([1.0], [0], [[1.0, 0, 0]]), state)
    assert all(torch.equal(state[name][2], value) for name, value in kept.items())


def test_gradient_rule_without_pooling_gives_rows_full_steps() -> None:
    t, rule = table(), GradientRule(lr=0.1, pseudo_count=0)
    apply(rule, t, statistics([1.0], [1], [[1.0, 0, 0]]), rule.initial_state(t))
    assert (t.shared + t.offsets)[1, 0].item() == pytest.approx(-0.2)  # the global step, and its own


def test_gradient_rule_leaves_integers_to_others() -> None:
    t, rule = table(), GradientRule(pseudo_count=20)
    t.write(TableValues(t.shared, t.offsets + torch.tensor([0.0, 0.0, 3.0])))
    state = rule.initial_state(t)
    for _ in range(30):
        state = apply(rule, t, statistics([1.0], [0], [[0.0, 0, 0]]), state)
    assert t.get_parameters(0)["steps"] == 8


@pytest.mark.parametrize("start", [0.02, 1.0, 50.0])
def test_gradient_rule_finds_the_minimum_of_each_row(start: float) -> None:
    best = torch.tensor([0.5, 3.0], dtype=torch.float64).log()
    t = ParameterTable(
        initial={"a": start},
        bounds={"a": (0.01, 100.0)},
        per_row=["a"],
        row_names=["low", "high"],
    )
    rule = GradientRule(lr=0.1, pseudo_count=1)
    state = rule.initial_state(t)
    for _ in range(400):
        coordinate = (t.shared + t.offsets)[:, 0].repeat_interleave(50)
        gradient = 2 * (coordinate - best.repeat_interleave(50))
        one_hot = torch.eye(2).repeat_interleave(50, dim=0)
        stats = SufficientStatistics(2, 1)
        stats.add(EStep(one_hot, None, torch.zeros(100)), gradient[:, None])
        state = apply(rule, t, stats, state)
    found = [t.get_parameters(row)["a"] for row in range(2)]
    assert found == pytest.approx([0.5, 3.0], rel=0.15)  # partial pooling keeps them a little towards each other


def plain_sign_rule(losses: list[float], window: int, rate: float) -> list[float]:
    """The rule as one would write it down, for one global parameter that starts at 1."""
    theta, scale, last, previous, seen, path = 1.0, 1.0, 0, None, [], []
    for loss in losses:
        seen = [*seen, loss][-window:]
        smoothed = sum(seen) / len(seen)
        direction = 0 if previous is None else (smoothed > previous) - (smoothed < previous)
        scale = scale / 2 if direction * last < 0 else min(1.0, scale * 2)
        theta *= 1 - rate * scale * direction
        last, previous = direction, smoothed
        path.append(theta)
    return path


@pytest.mark.parametrize("window", [1, 3])
def test_sign_rule_equals_its_plain_form(window: int) -> None:
    losses = torch.rand(30, generator=torch.Generator().manual_seed(4)).tolist()
    t, rule = table(), SignRule(rates={"a": 0.05, "b": 0.01}, window=window)
    state, path = rule.initial_state(t), []
    for loss in losses:
        state = apply(rule, t, statistics([loss], [-1], [[0.0] * 3]), state)
        path.append(t.get_parameters())
    losses = torch.tensor(losses).double().tolist()
    assert [values["a"] for values in path] == pytest.approx(plain_sign_rule(losses, window, 0.05))
    assert [values["b"] / 2 for values in path] == pytest.approx(plain_sign_rule(losses, window, 0.01))
    assert path[0] == {"a": 1.0, "b": pytest.approx(2.0), "steps": 5}  # nothing at the first step


def test_sign_rule_damps_oscillation_and_recovers() -> None:
    t, rule = table(), SignRule(window=1)
    state, scales = rule.initial_state(t), []
    for loss in [1, 2, 1, 2, 1, 2, 3, 4, 5, 6, 7]:
        state = apply(rule, t, statistics([float(loss)], [-1], [[0.0] * 3]), state)
        scales.append(state["scale"].item())
    assert scales == [1, 1, 0.5, 0.25, 0.125, 0.0625, 0.125, 0.25, 0.5, 1, 1]


@pytest.mark.parametrize(("smoothness", "factor"), [(0.8, 1.02), (0.5, 1.0), (0.2, 0.98)])
@pytest.mark.parametrize(("loss", "steps"), [(0.6, 6), (0.3, 5), (0.1, 4)])
def test_sign_rule_moves_rows_by_their_own_smoothness_and_loss(
    smoothness: float, factor: float, loss: float, steps: int
) -> None:
    t, rule = table(), SignRule(row_parameters=("a",))
    apply(rule, t, statistics([loss], [1], [[0.0] * 3], smoothness), rule.initial_state(t))
    assert t.get_parameters(1) == {"a": pytest.approx(factor), "b": pytest.approx(2.0), "steps": steps}
    assert t.get_parameters(0) == {"a": 1.0, "b": pytest.approx(2.0), "steps": 5}  # no image
    assert t.get_parameters()["steps"] == 5


@pytest.mark.parametrize("images", [1, 3, 7])
@pytest.mark.parametrize("smoothness", [0.3, 0.0])
def test_sign_rule_leaves_rows_of_a_dead_graph_and_of_no_measure_alone(smoothness: float, images: int) -> None:
    """A dense graph without any similarity scores 0.3, the lower threshold; 0 is what no measure adds up to."""
    t, rule = table(), SignRule()
    stats = statistics([0.3] * images, [1] * images, [[0.0] * 3] * images, smoothness)
    apply(rule, t, stats, rule.initial_state(t))
    assert not t.offsets.any()


def test_sign_rule_moves_every_learned_parameter_of_a_row_but_whole_numbers() -> None:
    t, rule = table(learned=["a", "b"]), SignRule(rates={"b": 0.01})
    apply(rule, t, statistics([0.6], [1], [[0.0] * 3], 0.9), rule.initial_state(t))
    assert t.get_parameters(1) == {"a": pytest.approx(1.02), "b": pytest.approx(2.0), "steps": 5}
    with pytest.raises(ValueError, match="'sigma', but the table's parameters are a, b, steps"):
        apply(SignRule(rates={"sigma": 0.01}), t, statistics([0.6], [1], [[0.0] * 3]), rule.initial_state(t))


@pytest.mark.parametrize("rule", [GradientRule(), SignRule(window=2)])
def test_rules_write_nothing_and_are_repeatable(rule: Rule) -> None:
    t = table()
    state, stats = rule.initial_state(t), statistics([1.0, 2.0], [0, 1], [[1.0, 2.0, 0.0]] * 2)
    before = (t.values().clone(), {name: tensor.clone() for name, tensor in state.items()}, stats.sums.clone())
    first, second = rule.m_step(t, stats, state), rule.m_step(t, stats, state)
    assert isinstance(first[0], TableValues)
    for one, other in zip(first[0], second[0], strict=True):
        assert torch.equal(one, other)
    assert torch.equal(t.values(), before[0])
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())
    assert torch.equal(stats.sums, before[2])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GradientRule(lr=0.0), "lr must be between 0 and 1, got 0"),
        (lambda: GradientRule(betas=(0.9, 1.0)), "betas"),
        (lambda: GradientRule(pseudo_count=-1), "pseudo_count must not be negative, got -1"),
        (lambda: GradientRule(eps=0), "eps must be positive"),
        (lambda: SignRule(window=0), "window must be at least 1 step, got 0"),
        (lambda: SignRule(rates={"sigma": 1.5}), r"rate of sigma must be in \[0, 1\), got 1.5"),
        (lambda: SignRule(loss_thresholds=(0.5, 0.2)), "loss_thresholds must be"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


class Old(Rule):
    """A rule of the version before, whose M-step was called `step`."""

    def initial_state(self, table: ParameterTable) -> Any:
        return {}

    def m_step(self, table: ParameterTable, statistics: SufficientStatistics, state: Any) -> Any:
        return table.state, {"called": torch.ones(1)}


def test_a_rule_that_defines_step_works_and_is_told_the_new_name() -> None:
    members = {"initial_state": Old.initial_state, "step": Old.__dict__["m_step"]}
    with pytest.warns(FutureWarning, match=r"Mine\.step is now called m_step"):
        mine = type("Mine", (Rule,), members)()
    assert "called" in mine.m_step(table(), statistics([1.0], [0], [[0.0] * 3]), {})[1]


def test_step_of_a_rule_and_of_its_base_may_still_be_called() -> None:
    t, stats = table(), statistics([1.0], [0], [[1.0, 0, 0]])
    rule = GradientRule()
    with pytest.warns(FutureWarning, match=r"Rule\.step is now Rule\.m_step"):
        proposal, _ = rule.step(t, stats, rule.initial_state(t))
    assert torch.equal(proposal.shared, rule.m_step(t, stats, rule.initial_state(t))[0].shared)
    with pytest.warns(FutureWarning, match="Half.step is now called m_step"):

        class Half(GradientRule):
            """Overrides `step` and calls that of its base, as was right in the version before."""

            def step(self, table: ParameterTable, statistics: SufficientStatistics, state: Any) -> Any:
                values, state = super().step(table, statistics, state)
                return TableValues(table.shared + (values.shared - table.shared) / 2, values.offsets), state

    with pytest.warns(FutureWarning, match=r"Rule\.step is now"):
        half, _ = Half().m_step(t, stats, rule.initial_state(t))
    torch.testing.assert_close(half.shared - t.shared, (proposal.shared - t.shared) / 2)


def test_a_rule_without_an_m_step_is_abstract() -> None:
    with pytest.raises(TypeError, match="abstract"):
        type("Empty", (Rule,), {"initial_state": Old.initial_state})()


@pytest.mark.parametrize("name", ["BayesianRule", "GradientRule", "NewtonRule", "Rule", "SignRule"])
def test_callbacks_rules_is_importable_for_one_version(name: str) -> None:
    import callbacks
    import callbacks.rules as old

    with pytest.warns(FutureWarning, match=rf"callbacks\.rules\.{name} is now lightning_modules\.em\.rules\.{name}"):
        assert getattr(old, name) is getattr(callbacks, name)
