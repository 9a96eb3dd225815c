"""Parts of a module by class and arguments, as a configuration has them, so that a checkpoint alone can make them."""

import inspect
from typing import Any

_PLAIN = bool | int | float | str | None


def configuration(part: object) -> dict[str, Any] | None:
    """Class path and arguments of a part, where its arguments are plain and it keeps each under its own name.

    What it keeps otherwise it names in a dict `given`.

    Returns:
        None where an argument is not known or not plain: such a part is made by whoever loads the checkpoint.

    Example:
        >>> from lightning_modules import NeighborDifferences
        >>> configuration(NeighborDifferences(3))["init_args"]
        {'cell': 3, 'scale': 10.0}
    """
    kind, given = type(part), getattr(part, "given", {})
    names = inspect.signature(kind).parameters
    found = {name: given.get(name, getattr(part, name, part)) for name in names}  # the part itself is not plain
    if not all(map(_is_plain, found.values())):
        return None
    return {
        "class_path": f"{kind.__module__}.{kind.__qualname__}",
        "init_args": {n: _listed(v) for n, v in found.items()},
    }


def _is_plain(value: object) -> bool:
    return isinstance(value, _PLAIN) or (isinstance(value, list | tuple) and all(map(_is_plain, value)))


def _listed(value: Any) -> Any:
    return [_listed(each) for each in value] if isinstance(value, list | tuple) else value
