"""Protocol of a rule: its answers in a form that can be used, and its slips named with their step."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from lightning_modules.em import ParameterTable, SufficientStatistics, TableValues
from lightning_modules.em.rules import Rule, RuleState


def answer(rule: Rule, question: str, table: ParameterTable, *arguments: Any, step: int = 0) -> Any:
    """Returns what a method of the rule does, in a form that can be used.

    Args:
        rule: The rule.
        question: Name of the method.
        table: Its first argument.
        arguments: The others.
        step: Optimizer step, for the message; 0 before the first.

    Raises:
        RuntimeError: If the method raises.
        TypeError: If what it returns is of another kind, shape or precision than `Rule` says.
    """
    where = f"{type(rule).__name__}.{question}"
    when = f" at step {step}" if step else ""
    try:
        found = getattr(rule, question)(table, *arguments)
    except Exception as error:
        raise RuntimeError(f"{where} failed{when}: {type(error).__name__}: {error}") from error
    expected, is_right = _EXPECTED[question]
    if not is_right(found, table, *arguments):
        sizes = f"P = {len(table.shared)}, K = {len(table.row_names)}, on {table.shared.device}"
        raise TypeError(f"{where} must return {expected} ({sizes}), got {_outline(found)}{when}")
    return found


def next_values(
    rule: Rule, table: ParameterTable, statistics: SufficientStatistics, state: RuleState, step: int
) -> tuple[TableValues, RuleState]:
    """Returns the rule's proposal and its next state.

    Args:
        rule: The rule.
        table: The table as it is.
        statistics: Sums over all images of the step.
        state: State of the rule before the step.
        step: Optimizer step, for messages.

    Raises:
        RuntimeError: If the rule raises, or writes to what it was given.
        TypeError: If it returns anything else.
    """
    given = {"table": [*table.state], "statistics": [statistics.sums, statistics.latent], "state": [*state.values()]}
    versions = {name: [tensor._version for tensor in tensors] for name, tensors in given.items()}
    found: tuple[TableValues, RuleState] = answer(rule, "m_step", table, statistics, state, step=step)
    for name, tensors in given.items():
        if [tensor._version for tensor in tensors] != versions[name]:
            raise RuntimeError(
                f"{type(rule).__name__}.m_step wrote to its argument `{name}` at step {step}: return new tensors, so "
                "that a step can be left out"
            )
    return found


def _is_values(found: Any, table: ParameterTable) -> bool:
    return isinstance(found, TableValues) and all(map(_are_alike, found, table.state))


def _is_step(found: Any, table: ParameterTable, statistics: SufficientStatistics, state: RuleState) -> bool:
    if not (isinstance(found, tuple) and len(found) == 2 and _is_values(found[0], table) and _is_state(found[1])):
        return False
    return found[1].keys() == state.keys() and all(_are_alike(found[1][name], old) for name, old in state.items())


def _is_state(found: Any) -> bool:
    return isinstance(found, dict) and all(isinstance(tensor, Tensor) for tensor in found.values())


def _is_deviation(found: Any, table: ParameterTable) -> bool:
    shape = (len(table.row_names) + 1, len(table.shared))
    return found is None or (isinstance(found, Tensor) and found.shape == shape and found.is_floating_point())


def _are_alike(found: Any, tensor: Tensor) -> bool:
    if not isinstance(found, Tensor):
        return False
    return (found.shape, found.dtype, found.device) == (tensor.shape, tensor.dtype, tensor.device)


_VALUES = "TableValues(shared: float64 [P], offsets: float64 [K, P])"
_EXPECTED: dict[str, tuple[str, Callable[..., bool]]] = {
    "initial_state": ("a dictionary of tensors", lambda found, table: _is_state(found)),
    "m_step": (f"a tuple of {_VALUES} and a state of the names, shapes and types of the one before", _is_step),
    "sampled_values": (
        f"{_VALUES} or None",
        lambda found, table, state: found is None or _is_values(found, table),
    ),
    "pair_distance": (
        "a float64 tensor [P] or None",
        lambda found, table, state: found is None or _are_alike(found, table.shared),
    ),
    "standard_deviation": (
        "a float tensor [K + 1, P] or None",
        lambda found, table, state: _is_deviation(found, table),
    ),
}


def _outline(found: Any) -> str:
    """Kinds, precisions and shapes, without the numbers."""
    if isinstance(found, Tensor):
        return f"{str(found.dtype).removeprefix('torch.')} {list(found.shape)} on {found.device}"
    if isinstance(found, TableValues):
        return f"TableValues({_outline(found.shared)}, {_outline(found.offsets)})"
    if isinstance(found, dict):
        return "{" + ", ".join(f"{name}: {_outline(value)}" for name, value in found.items()) + "}"
    if isinstance(found, tuple | list):
        return "(" + ", ".join(map(_outline, found)) + ")"
    return type(found).__name__
