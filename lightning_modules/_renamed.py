"""Names of the version before, which warn and keep working for one version."""

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any


def renamed(package: str, names: dict[str, str]) -> Callable[[str], Any]:
    """The `__getattr__` of a package some of whose names have changed.

    Args:
        package: Name of the package, `__name__`.
        names: New home of each old name, such as `{"Statistics": "lightning_modules.em.SufficientStatistics"}`.
    """

    def attribute(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, new = names[name].rsplit(".", 1)
        warnings.warn(f"{package}.{name} is now {names[name]}", FutureWarning, stacklevel=2)
        return getattr(import_module(home), new)

    return attribute
