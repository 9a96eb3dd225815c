"""Rules that learn a curvature, on functions whose best parameters are known."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from callbacks import BayesianRule, GradientRule, NewtonRule, Rule
from lightning_modules.em import EStep, ParameterTable, SufficientStatistics, TableValues
from lightning_modules.em.rules import kalman_curvature as model
from lightning_modules.em.rules.rule import centered
from lightning_modules.em.rules.trust_region import magnitude, optimum_variance, step_within

NAMES = ["a", "b", "c"]
# Curvatures 100, 1 and 0.05 along directions that are no axes.
ROTATED = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64))[0]
HESSIAN = ROTATED @ torch.diag(torch.tensor([100.0, 1.0, 0.05], dtype=torch.float64)) @ ROTATED.T


def table(start: float = 1.0, names: list[str] = NAMES, bound: float = 100.0, **options: Any) -> ParameterTable:
    return ParameterTable(
        initial=dict.fromkeys(names, start), bounds=dict.fromkeys(names, (1 / bound, bound)), **options
    )


def follow(
    rule: Rule, t: ParameterTable, gradient: Any, steps: int, images: int = 1, noise: float = 0.0
) -> tuple[list[Tensor], Any]:
    """Coordinates before each step, from `images` gradients a step with independent noise; and the last state."""
    generator = torch.Generator().manual_seed(0)
    state, path = rule.initial_state(t), []
    for _ in range(steps):
        path.append(t.shared.clone())
        each = gradient(t.shared).repeat(images, 1)
        each = each + noise * torch.randn(each.shape, generator=generator, dtype=torch.float64)
        stats = SufficientStatistics(0, len(t.names))
        stats.add(EStep(torch.zeros(images, 0), None, torch.zeros(images)), each)
        proposal, state = rule.m_step(t, stats, state)
        t.write(t.project(proposal))
    return [*path, t.shared.clone()], state


def distance(path: list[Tensor], best: Tensor) -> list[float]:
    return [float((theta - best).abs().max()) for theta in path]


def test_the_minimum_of_a_rotated_ill_conditioned_quadratic() -> None:
    best = torch.tensor([0.7, -1.0, 0.4], dtype=torch.float64)
    errors = distance(follow(NewtonRule(), table(), lambda x: HESSIAN @ (x - best), 60)[0], best)
    assert errors[60] < 1e-6
    plain = distance(follow(GradientRule(lr=0.1), table(), lambda x: HESSIAN @ (x - best), 60)[0], best)
    assert plain[60] > 0.1  # what curvature is for


def test_a_separable_quadratic_takes_few_steps() -> None:
    best = torch.tensor([0.7, -1.0, 0.4], dtype=torch.float64)
    errors = distance(follow(NewtonRule(), table(), lambda x: 3 * (x - best), 12)[0], best)
    assert errors[6] < 0.02
    assert errors[12] < 1e-5


def test_the_scale_of_the_loss_does_not_matter() -> None:
    best = torch.tensor([0.7, -1.0, 0.4], dtype=torch.float64)
    paths = [
        torch.stack(follow(NewtonRule(), table(), lambda x, s=scale: s * (HESSIAN @ (x - best)), 15, 8, 0.3 * scale)[0])
        for scale in (1.0, 1e-6, 1e5)
    ]
    for path in paths[1:]:
        torch.testing.assert_close(path, paths[0], rtol=1e-6, atol=1e-9)


def test_a_saddle_repels() -> None:
    """x² − y² + y⁴/4: a saddle at y = 0, minima at y = ±√2."""

    def gradient(x: Tensor) -> Tensor:
        return torch.stack([2 * x[0], -2 * x[1] + x[1] ** 3])

    t = table(names=["x", "y"])
    t.write(TableValues(torch.tensor([1.0, 0.05], dtype=torch.float64), t.offsets))
    path, _ = follow(NewtonRule(), t, gradient, 30)
    assert path[-1].tolist() == pytest.approx([0.0, math.sqrt(2)], abs=1e-3)


def test_a_coordinate_on_its_bound_is_left_out_of_the_solve() -> None:
    """The optimum of a coupled quadratic over the box differs from the clipped optimum without it."""
    hessian = torch.tensor([[2.0, 1.5], [1.5, 2.0]], dtype=torch.float64)
    free = torch.tensor([2.0, -0.2], dtype=torch.float64)
    t = table(names=["x", "y"], bound=math.e)  # the bound is 1 in log units
    path, _ = follow(NewtonRule(), t, lambda x: hessian @ (x - free), 25)
    constrained = free[1] - hessian[1, 0] / hessian[1, 1] * (1 - free[0])  # the best y at x = 1
    assert path[-1].tolist() == pytest.approx([1.0, float(constrained)], abs=1e-4)


def test_noise_is_averaged_out() -> None:
    """With 16 images a step, 60 steps leave about 1/√(16·60) of one image's noise over the curvature."""
    best = torch.tensor([0.7, -1.0, 0.4], dtype=torch.float64)
    path, _ = follow(NewtonRule(), table(), lambda x: 2 * (x - best), 60, images=16, noise=2.0)
    assert distance(path, best)[-1] < 4 * 1.0 / math.sqrt(16 * 60)


def test_without_a_gradient_nothing_moves() -> None:
    path, _ = follow(NewtonRule(), table(), torch.zeros_like, 3)
    assert all(torch.equal(theta, path[0]) for theta in path)


def test_a_first_step_is_as_long_as_the_radius_at_most() -> None:
    path, _ = follow(NewtonRule(trust_radius=0.3), table(), lambda x: torch.tensor([5.0, -1e-9, 0.0]).double(), 1)
    assert path[1].tolist() == pytest.approx([-0.3, 0.3, 0.0], rel=0.01)


def test_noise_of_single_images_is_noise() -> None:
    """One image a step does not show how far images differ; to take its gradient as exact is to follow the noise."""
    path, _ = follow(NewtonRule(), table(names=["a"]), lambda x: 2 * (x - 1), 60, images=1, noise=1.0)
    exact = 0.5 / math.sqrt(60)
    assert distance(path[-20:], torch.ones(1))[-1] < 3 * exact
    t, rule = table(names=["a"]), BayesianRule()
    _, state = follow(rule, t, lambda x: 2 * (x - 1), 60, images=1, noise=1.0)
    assert exact / 4 < float(rule.standard_deviation(t, state)) < 8 * exact


@pytest.mark.parametrize("rule", [NewtonRule(), BayesianRule(exploration=0)])
@pytest.mark.parametrize("noise", [0.0, 1.0])
def test_a_gradient_that_comes_later(rule: Rule, noise: float) -> None:
    """A network that begins with zeros after the diffusion gives the parameters no gradient in its first steps."""
    generator, t = torch.Generator().manual_seed(0), table(names=["a", "b"])
    state = rule.initial_state(t)
    for step in range(40):
        each = 2 * (t.shared - 1) + noise * torch.randn(16, 2, generator=generator, dtype=torch.float64)
        each = each * (step > 2)
        stats = SufficientStatistics(0, 2)
        stats.add(EStep(torch.zeros(16, 0), None, torch.zeros(16)), each)
        proposal, state = rule.m_step(t, stats, state)
        t.write(t.project(proposal))
    assert t.shared.tolist() == pytest.approx([1.0, 1.0], abs=0.1)


@pytest.mark.parametrize("size", [1, 3, 6])
def test_magnitude_equals_the_eigendecomposition(size: int) -> None:
    generator = torch.Generator().manual_seed(size)
    matrix = torch.randn(5, size, size, generator=generator, dtype=torch.float64)
    matrix = matrix + matrix.mT
    values, vectors = torch.linalg.eigh(matrix)
    expected = vectors @ torch.diag_embed((values.square() + 0.01).sqrt()) @ vectors.mT
    torch.testing.assert_close(magnitude(matrix, 0.1), expected, rtol=1e-9, atol=1e-10)


def row_steps(rule: Rule, t: ParameterTable, bests: Tensor, steps: int, shares: list[int], noise: float = 0.0) -> Any:
    """Steps on one quadratic for each row, with the given numbers of images in every step; a rule may explore."""
    generator = torch.Generator().manual_seed(1)
    state, labels = rule.initial_state(t), torch.repeat_interleave(torch.arange(len(shares)), torch.tensor(shares))
    rows = torch.eye(len(shares))[labels]
    for _ in range(steps):
        read = rule.sampled_values(t, state) or t.state
        theta = read.shared + rows.double() @ read.offsets
        each = 2 * (theta - bests[labels])
        each = each + noise * torch.randn(each.shape, generator=generator, dtype=torch.float64)
        stats = SufficientStatistics(len(shares), len(t.names))
        stats.add(EStep(rows, None, torch.zeros(len(labels))), each)
        proposal, state = rule.m_step(t, stats, state)
        t.write(t.project(proposal))
    return state


def test_each_row_finds_its_minimum() -> None:
    bests = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    t = table(names=["a"], per_row=["a"], row_names=["low", "high"])
    row_steps(NewtonRule(pseudo_count=1), t, bests, 40, [10, 10])
    found = t.shared + t.offsets
    torch.testing.assert_close(found, bests, rtol=0, atol=0.02)


def test_rows_without_images_keep_everything() -> None:
    bests = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    t = table(names=["a"], per_row=["a"], row_names=["low", "high"], initial_rows={"high": {"a": 1.5}})
    before = t.offsets[1].clone()
    rule = NewtonRule()
    state, fresh = row_steps(rule, t, bests, 5, [4, 0]), rule.initial_state(t)
    assert torch.equal(t.offsets[1], before)
    assert all(torch.equal(state[name][2], fresh[name][2]) for name in fresh)


def test_rows_with_few_images_stay_near_the_global_set() -> None:
    bests = torch.tensor([[0.5], [-1.0]], dtype=torch.float64)
    apart = []
    for pseudo_count in (0.0, 1000.0):
        t = table(names=["a"], per_row=["a"], row_names=["low", "high"])
        row_steps(NewtonRule(pseudo_count=pseudo_count), t, bests, 12, [2, 2])
        apart.append(float(t.offsets[0, 0] - t.offsets[1, 0]))
    assert apart[0] == pytest.approx(1.5, abs=0.05)
    assert 0 < apart[1] < 0.5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NewtonRule(trust_radius=0), "trust_radius must be a positive distance in log units, got 0"),
        (
            lambda: NewtonRule(curvature_length_scale=-1),
            "curvature_length_scale must be a positive .* got -1",
        ),
        (lambda: NewtonRule(pseudo_count=-1), "pseudo_count must not be negative, got -1"),
        (lambda: BayesianRule(trust_radius=0), "trust_radius must be a positive distance in log units, got 0"),
        (lambda: BayesianRule(exploration=-1), "exploration must not be negative, got -1"),
    ],
)
def test_bad_arguments(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# BayesianRule ----------------------------------------------------------------------------------------------------


def intervals(size: int, images: int, soft: bool) -> tuple[list[float], list[float]]:
    """200 repetitions side by side, each with its own quadratic, optimum and noise between the images of each step.

    With soft responsibilities uniform in [0, 1].

    Returns:
        After each of 40 steps, how many of the 90 % intervals hold the optimum, and how wide the middle one is, beside
        what the same gradients would allow if the curvature were known.
    """
    repetitions, radius = 200, 0.5
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    names = [f"p{column}" for column in range(size)]
    t = table(names=names, bound=math.exp(4), row_names=[f"repetition {i}" for i in range(repetitions)])
    turn = torch.linalg.qr(draw(repetitions, size, size))[0]
    curvature = torch.rand(repetitions, size, generator=generator, dtype=torch.float64) * 2 + 0.5
    hessian = turn @ torch.diag_embed(curvature) @ turn.mT
    spread, best = 0.15 * draw(repetitions, size, size), draw(repetitions, size)
    inverse = torch.linalg.inv(hessian)
    of_one = (inverse @ spread @ spread.mT @ inverse).diagonal(dim1=1, dim2=2).sqrt()
    theta = mean = torch.zeros(repetitions + 1, size, dtype=torch.float64)
    owner = torch.eye(repetitions).repeat_interleave(images, 0)
    state, covered, width = model.initial_state(t, radius), [], []
    total = squares = torch.zeros(repetitions)
    for _ in range(40):
        each = (hessian @ (theta[1:] - best)[..., None]).mT + draw(repetitions, images, size) @ spread.mT
        share = torch.rand(repetitions, images, generator=generator) if soft else torch.ones(repetitions, images)
        total, squares = total + share.sum(1), squares + share.square().sum(1)
        stats = SufficientStatistics(repetitions, size)
        stats.add(EStep(owner * share.view(-1, 1), None, torch.zeros(len(owner))), each.reshape(-1, size))
        found, state = model.observe(state, stats, theta, mean, radius, 0.5, cautious=True)
        back = found.curvature @ (mean - theta)[..., None]
        found = found._replace(gradient=found.gradient + back[..., 0])
        lower, upper = (
            torch.maximum(-found.trust_radius, t.lower - mean),
            torch.minimum(found.trust_radius, t.upper - mean),
        )
        mean = mean + step_within(found, lower, upper, radius)
        deviation = optimum_variance(found, t.upper - t.lower).sqrt()
        theta = mean + (deviation * draw(repetitions + 1, size)).clamp(-0.1, 0.1)
        covered.append(((mean[1:] - best).abs() < 1.6449 * deviation[1:]).double().mean().item())
        ideal = of_one * (squares.sqrt() / total)[:, None]
        width.append((deviation[1:] / ideal).median().item())
    return covered, width


@pytest.mark.parametrize(("size", "images", "soft"), [(1, 16, False), (3, 16, False), (1, 4, False), (3, 16, True)])
def test_ninety_percent_intervals_cover_the_optimum(size: int, images: int, soft: bool) -> None:
    covered, width = intervals(size, images, soft)
    assert 0.85 <= covered[-1] <= 0.95
    assert width[-1] < 1.5  # not by being wide


@pytest.mark.parametrize("size", [1, 3])
def test_intervals_of_single_images_are_wide_and_never_narrow(size: int) -> None:
    """One image a step leaves open for long whether its gradient is noise."""
    covered, width = intervals(size, images=1, soft=False)
    assert min(covered[4:]) >= 0.9
    assert width[-1] < 8
    assert width[-1] < 0.5 * width[19]


def test_the_covariance_of_a_mean_under_soft_responsibilities() -> None:
    """Against 4,000 draws: images that rows share are worth less than their number, and the scatter is unbiased."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.tensor([[1.0, 0.25], [0.7, 0.25], [0.1, 0.25], [0.05, 0.25], [0.0, 0.25]]).double()
    factor = torch.tensor([[1.0, 0.0], [0.8, 0.6]], dtype=torch.float64)
    draws = torch.randn(4_000, 5, 2, generator=generator, dtype=torch.float64) @ factor.T + 3
    means, estimates = [], []
    for gradient in draws.split(1):
        stats = SufficientStatistics(2, 2)
        stats.add(EStep(rows, None, torch.zeros(5)), gradient[0])
        means.append(stats.mean_gradient)
        estimates.append(stats.gradient_scatter / (stats.freedom * stats.count)[:, None, None])
    mean, estimate = torch.stack(means), torch.stack(estimates).mean(0)
    for row in range(3):
        torch.testing.assert_close(estimate[row], torch.cov(mean[:, row].T), rtol=0.1, atol=0.01)
    assert stats.freedom[[0, 2]].tolist() == pytest.approx([4, 1])  # equal parts of five images: n − 1 of such parts
    assert stats.effective_count.tolist() == pytest.approx([5, 1.85**2 / 1.5025, 5])


def test_the_rule_finds_a_minimum_and_says_how_well_it_is_known() -> None:
    best = torch.tensor([0.7, -1.0, 0.4], dtype=torch.float64)
    t, rule = table(), BayesianRule(exploration=0)
    path, state = follow(rule, t, lambda x: 2 * (x - best), 60, images=16, noise=2.0)
    deviation = rule.standard_deviation(t, state)
    assert deviation.shape == (1, 3)
    assert (deviation[0] < 0.3).all()
    assert ((path[-1] - best).abs() < 4 * deviation[0]).all()


def test_what_is_not_learned_has_no_deviation_and_a_flat_loss_that_of_its_bounds() -> None:
    t, rule = table(learned=["a", "b"]), BayesianRule()
    _, state = follow(rule, t, lambda x: torch.tensor([1.0, 0.0, 0.0]).double() * x, 5, images=4, noise=0.0)
    deviation = rule.standard_deviation(t, state)[0]
    assert deviation[2].isnan()
    assert deviation[1].item() == pytest.approx(2 * math.log(100) / math.sqrt(12), rel=1e-6)


def test_exploration_is_the_same_twice_and_stays_within_a_fifth_of_the_radius() -> None:
    t, rule = table(), BayesianRule(trust_radius=0.5)
    state = rule.initial_state(t)
    first, second = rule.sampled_values(t, state), rule.sampled_values(t, state)
    assert first is not None
    assert second is not None
    assert torch.equal(first.shared, second.shared)
    noise = first.shared - t.shared
    assert 0 < noise.abs().max() <= 0.1 + 1e-12
    later = rule.sampled_values(t, {**state, "steps": state["steps"] + 1})
    assert later is not None
    assert not torch.equal(later.shared, first.shared)
    assert BayesianRule(exploration=0).sampled_values(t, state) is None


def test_exploration_follows_the_seed_of_the_run_and_a_resumed_run_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t, rule = table(), BayesianRule()
    drawn, states = {}, {}
    for seed in ("1", "2", "4294967295"):  # the largest that seed_everything takes
        monkeypatch.setenv("PL_GLOBAL_SEED", seed)
        states[seed] = {**rule.initial_state(t), "deviation": torch.full((1, 3), 0.01, dtype=torch.float64)}
        drawn[seed] = rule.sampled_values(t, states[seed]).shared
    assert len({tuple(values.tolist()) for values in drawn.values()}) == 3
    again = BayesianRule().sampled_values(t, states["1"])  # from a checkpoint, in a run with another seed
    assert torch.equal(again.shared, drawn["1"])
    monkeypatch.setenv("PL_GLOBAL_SEED", "1")
    torch.manual_seed(99)  # what one process has drawn since is no matter: all must draw alike
    fresh = {**rule.initial_state(t), "deviation": states["1"]["deviation"]}
    assert torch.equal(rule.sampled_values(t, fresh).shared, drawn["1"])


def test_training_is_perturbed_and_evaluation_is_not() -> None:
    t = table()
    none = torch.zeros(1, 0)
    t.perturb(TableValues(t.shared + 0.5, t.offsets))
    assert t(none)["a"].item() == pytest.approx(math.exp(0.5))
    with torch.no_grad():
        assert t(none)["a"].item() == pytest.approx(1.0)
    assert t.eval()(none)["a"].item() == pytest.approx(1.0)
    assert t.get_parameters()["a"] == 1.0
    t.train().perturb(None)
    assert t(none)["a"].item() == pytest.approx(1.0)


def test_pooling_variance_is_learned_from_the_rows() -> None:
    """Rows that differ keep what they learn; rows that do not are drawn together."""
    apart = torch.tensor([[1.0], [-1.0], [0.6], [-0.6]], dtype=torch.float64)
    found = {}
    for name, bests in (("apart", apart), ("alike", 0 * apart)):
        t = table(names=["a"], per_row=["a"], row_names=["k", "l", "m", "n"])
        state = row_steps(BayesianRule(exploration=0), t, bests, 40, [4, 4, 4, 4], noise=0.5)
        found[name] = (t, float(state["pooling_variance"]))
    torch.testing.assert_close(found["apart"][0].shared + found["apart"][0].offsets, apart, rtol=0, atol=0.15)
    assert found["apart"][1] == pytest.approx(0.68, abs=0.3)  # mean square of the rows' optima
    assert found["alike"][1] < 0.1  # the prior counts as one row of four and one
    assert found["alike"][0].offsets.abs().max() < 0.15


def test_rows_walk_to_optima_that_are_far_and_not_well_known() -> None:
    """Drawn to the global set in every step, rows whose curvature is unknown would never leave it to learn it."""
    bests = torch.tensor([[1.5], [-1.5], [1.0], [-1.0]], dtype=torch.float64)
    t = table(names=["a"], per_row=["a"], row_names=["k", "l", "m", "n"])
    row_steps(BayesianRule(), t, bests, 80, [4, 4, 4, 4], noise=1.0)
    torch.testing.assert_close(t.shared + t.offsets, bests, rtol=0, atol=0.15)


def common_and_rare(rule: Rule, every: int, steps: int, rare: int = 1, seed: int = 0) -> tuple[ParameterTable, Any]:
    """A row of most images whose optimum is 0.5, and one of few, −0.6, which come at every so many steps; noise 0.3."""
    generator = torch.Generator().manual_seed(seed)
    t = table(names=["a"], bound=20.0, row_names=["common", "rare"], per_row=["a"])
    state, optimum = rule.initial_state(t), torch.tensor([[0.5], [-0.6]], dtype=torch.float64)
    for step in range(steps):
        sampled = rule.sampled_values(t, state) or t.state
        row = torch.zeros(16, dtype=torch.long)
        row[: rare if step % every == 0 else 0] = 1
        each = sampled.shared + sampled.offsets[row] - optimum[row]
        each = each + 0.3 * torch.randn(16, 1, generator=generator, dtype=torch.float64)
        stats = SufficientStatistics(2, 1)
        stats.add(EStep(torch.eye(2)[row], None, torch.ones(16)), each)
        proposal, state = rule.m_step(t, stats, state)
        t.write(t.project(proposal))
    return t, state


def test_a_row_met_one_image_at_a_time_is_learned_and_its_interval_holds_the_truth() -> None:
    rule = BayesianRule()
    t, state = common_and_rare(rule, every=10, steps=400)
    found = float(t.shared + t.offsets[1])
    deviation = float(rule.standard_deviation(t, state)[2])
    assert abs(found + 0.6) < 2.5 * deviation
    assert deviation < 0.2  # 40 images of noise 0.3 and curvature 1 know it to 0.05
    assert float(t.shared + t.offsets[0]) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("rule", [NewtonRule(), BayesianRule(), GradientRule()])
@pytest.mark.parametrize("rare", [1, 4])
def test_the_global_set_is_the_mean_of_the_rows_by_their_images(rule: Rule, rare: int) -> None:
    for seed in range(2):
        t, state = common_and_rare(rule, every=1, steps=60, rare=rare, seed=seed)
        images = state["images"][1:]
        assert float((images * t.offsets).sum().abs()) < 1e-9 * float(images.sum())
        if not isinstance(rule, GradientRule):  # which is on its way
            best = (0.5 * (16 - rare) - 0.6 * rare) / 16  # the best single value for all images
            assert float(t.shared) == pytest.approx(best, abs=0.12)


def test_centering_keeps_rows_and_those_without_images_their_offsets() -> None:
    t = table(names=["a", "b"], per_row=["a"], row_names=["k", "l", "m"])
    proposal = TableValues(t.shared + 0.1, torch.tensor([[1.0, 0], [-0.5, 0], [0.7, 0]], dtype=torch.float64))
    images = torch.tensor([[4.0], [3.0], [1.0], [0.0]], dtype=torch.float64)
    shared, offsets = centered(t, proposal, images)
    mean = (3 * 1.0 + 1 * -0.5) / 4
    assert shared.tolist() == pytest.approx([0.1 + mean, 0.1])
    assert offsets[:, 0].tolist() == pytest.approx([1.0 - mean, -0.5 - mean, 0.7])
    assert not offsets[:, 1].any()


@pytest.mark.parametrize("rule", [NewtonRule(), BayesianRule()])
def test_rules_write_nothing_and_are_repeatable(rule: Rule) -> None:
    t = table(per_row=["a"], row_names=["k", "l"])
    state, stats = rule.initial_state(t), SufficientStatistics(2, 3)
    stats.add(EStep(torch.eye(2), None, torch.ones(2)), torch.tensor([[1.0, 2.0, 0.0], [0.5, 0.0, 1.0]]))
    _, state = rule.m_step(t, stats, state)
    before = (t.values().clone(), {name: tensor.clone() for name, tensor in state.items()}, stats.sums.clone())
    (first, one), (second, other) = rule.m_step(t, stats, state), rule.m_step(t, stats, state)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert torch.equal(t.values(), before[0])
    assert all(torch.equal(state[name], tensor) for name, tensor in before[1].items())
    assert torch.equal(stats.sums, before[2])


def test_statistics_sum_how_far_the_gradients_differ() -> None:
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    rows, weight = torch.rand(7, 2, generator=generator), torch.tensor([1.0, 1, 0, 1, 1, 1, 1])
    stats = SufficientStatistics(2, 3)
    for part in (slice(0, 3), slice(3, 7)):
        stats.add(EStep(rows[part], weight[part], torch.zeros(len(rows[part]))), gradient[part])
    stats = stats.reduced(lambda flat: 2 * flat)  # two processes alike
    used = [image for image in range(7) if image != 2] * 2
    for row, share in enumerate([torch.ones(7), rows[:, 0], rows[:, 1]]):
        share, images = share.double()[used], gradient[used]
        mean = (share[:, None] * images).sum(0) / share.sum()
        expected = sum(s**2 * torch.outer(g - mean, g - mean) for s, g in zip(share, images, strict=True))
        torch.testing.assert_close(stats.gradient_scatter[row], expected)
        square = (share.square()[:, None] * images.square()).sum(0) / share.square().sum()
        torch.testing.assert_close(stats.mean_square_gradient[row], square)
        assert stats.count[row].item() == pytest.approx(float(share.sum()))


@pytest.mark.parametrize("rule", [NewtonRule, BayesianRule])
def test_old_names_of_the_distances_are_told_the_new_ones(rule: type[NewtonRule] | type[BayesianRule]) -> None:
    with pytest.warns(FutureWarning, match="radius is now called trust_radius"):
        assert rule(radius=0.3).trust_radius == 0.3
    with pytest.warns(FutureWarning, match="reach is now called curvature_length_scale"):
        assert rule(reach=0.2).curvature_length_scale == 0.2
    with pytest.warns(FutureWarning), pytest.raises(ValueError, match="trust_radius must be a positive distance"):
        rule(radius=0)


def blocks_of(size: int, curvature_seed: int) -> Tensor:
    """A curvature of eigenvalues 1 to 5 along directions that are no axes."""
    generator = torch.Generator().manual_seed(curvature_seed)
    directions = torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64))[0]
    return directions @ torch.diag(torch.linspace(1, 5, size, dtype=torch.float64)) @ directions.T


def test_blocks_of_many_parameters_are_as_many_rules_of_few() -> None:
    """Forty parameters whose curvature joins the first and the last twenty: what each twenty do by themselves."""
    hessian = torch.block_diag(blocks_of(20, 1), blocks_of(20, 2))
    best = 0.4 * torch.randn(40, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    names = [f"p{index}" for index in range(40)]
    together, _ = follow(NewtonRule(), table(names=names), lambda x: hessian @ (x - best), 12)
    for half in (slice(0, 20), slice(20, 40)):
        alone, _ = follow(NewtonRule(), table(names=names[half]), lambda x, h=half: hessian[h, h] @ (x - best[h]), 12)
        for both, own in zip(together, alone, strict=True):
            torch.testing.assert_close(both[half], own, rtol=1e-9, atol=1e-10)


def test_a_block_that_is_filled_up_finds_the_optimum_of_a_dense_solve() -> None:
    """33 parameters in blocks of 17, of which one is none."""
    hessian = torch.block_diag(blocks_of(17, 1), blocks_of(16, 2))
    slope = torch.randn(33, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    best = -torch.linalg.solve(hessian, slope)
    names = [f"p{index}" for index in range(33)]
    path, _ = follow(NewtonRule(), table(names=names), lambda x: hessian @ x + slope, 50)
    errors = distance(path, best)
    assert errors[50] < 1e-3 < 0.3 < errors[0]
