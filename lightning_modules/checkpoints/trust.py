"""Guard of checkpoints: the classes that one names are asked about before anything of theirs is imported."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules.checkpoints.file import CheckpointError

# Where a checkpoint may take classes from; functions, and the rest of torch, open files, download and run code.
_NETWORKS = ("torch.nn", "torch.optim", "torchvision.models", "torchvision.ops")
_COMMAND = "lightning_modules.cli"


class UntrustedCheckpointError(CheckpointError):
    """A checkpoint names something that it may not build."""


class _Refusal(BaseException):
    """Passes through the parser, which takes an exception for a value of another type and goes on trying."""


class _Trust:
    """What the caller allows a file to build.

    Args:
        file: The file, for messages.
        allow: Modules, classes and functions that the caller allows; a module with all that is in it.
        named: Full names that the caller has used; allowed as they are.
        home: The module of the caller's own class, whose classes are allowed.
        remedy: What to do about a refusal, with a place for the name.
    """

    def __init__(self, file: object, allow: Iterable[str], named: Iterable[str], home: str, remedy: str) -> None:
        if isinstance(allow, str):
            raise TypeError(f"allow must be a list of names, such as [{allow!r}], got a string")
        self.file, self.allow, self.named, self.remedy = file, tuple(allow), frozenset(named), remedy
        self.own = (*_own_packages(), home)
        self.odd_name: str | None = None

    def check_name(self, name: object) -> None:
        """Refuse a name before it is looked up."""
        if name in self.named or not isinstance(name, str) or "." not in name:
            return
        if not all(part.isidentifier() for part in name.split(".")):
            # perhaps a path, where a file may be given in place of a class
            self.odd_name = name
            raise ValueError(f"{name!r} is not the name of a class")
        if not _within(name, (*self.allow, *_NETWORKS, *self.own)):
            root = name.partition(".")[0]
            if root not in sys.modules and find_spec(root) is None:
                return  # no module, but the name of a file: there is nothing to import
            raise self._refusal(name)

    def check_found(self, name: str, found: Any) -> None:
        """Refuse what a name leads to: a class or function that comes from elsewhere, or what is neither."""
        if name in self.named or name in self.allow:
            return
        origin = getattr(found, "__module__", None)
        whole = f"{origin}.{getattr(found, '__qualname__', '')}"
        if inspect.isclass(found):
            part = issubclass(found, nn.Module | Optimizer | LRScheduler)
            trusted = (*self.allow, *self.own, *(_NETWORKS if part else ()))
        else:
            trusted = self.allow if inspect.isroutine(found) else ()
        if not _within(whole, trusted) or (_within(whole, [_COMMAND]) and not _within(whole, self.allow)):
            raise self._refusal(name)

    def _refusal(self, name: str) -> _Refusal:
        return _Refusal(self.message(name))

    def message(self, name: str) -> str:
        """What came, and what to do."""
        return f"{self.file} asks for {name!r}, which it may not build: {self.remedy.format(name=name)}"


_TRUST: ContextVar[_Trust | None] = ContextVar("trust", default=None)


@contextmanager
def building_from(
    file: object,
    allow: Iterable[str] = (),
    named: Iterable[str] = (),
    home: str = "lightning_modules",
    remedy: str = "if you trust it, load with allow=[{name!r}]",
) -> Iterator[None]:
    """A block in which nothing is built or imported by name but what this package, torch, torchvision or the caller
    brings.

    Args:
        file: The file that names what to build.
        allow: Modules, classes and functions that the caller allows.
        named: Full names that the caller has used.
        home: The module of the caller's own class.
        remedy: What to do about a refusal, with a place for the name.

    Raises:
        UntrustedCheckpointError: If the file names anything else.
    """
    _ask_first()
    trust = _Trust(file, allow, named, home, remedy)
    token = _TRUST.set(trust)
    try:
        yield
    except _Refusal as refusal:
        raise UntrustedCheckpointError(str(refusal)) from None
    except (Exception, SystemExit):
        if trust.odd_name is not None:
            raise UntrustedCheckpointError(trust.message(trust.odd_name)) from None
        raise
    finally:
        _TRUST.reset(token)


class GuardedCheckpoint:
    """Mixin of modules and DataModules: `load_from_checkpoint` builds only what the caller trusts."""

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, allow: Iterable[str] = (), **options: Any) -> Self:
        """As Lightning's `load_from_checkpoint`, for files of others too.

        The file is read with `weights_only=True`. What it names is built where it is a class of this package, of
        `torch.nn`, `torch.optim` or torchvision's models, or what you allow; nothing else is imported.

        Args:
            checkpoint_path: File to load.
            *args: As Lightning has them.
            allow: Names of modules, classes and functions that the file may use as well, such as `["timm.models"]`.
            **options: As Lightning has them; what they name is allowed.

        Raises:
            UntrustedCheckpointError: If the file names anything else.
        """
        options.setdefault("weights_only", True)
        with building_from(checkpoint_path, allow, names_in(options), cls.__module__):
            try:
                loaded: Self = super().load_from_checkpoint(checkpoint_path, *args, **options)  # type: ignore[misc]
                return loaded
            except ValueError as error:
                # Lightning's own refusals, of the outermost class
                if "was blocked to prevent arbitrary code execution" in str(error):
                    raise UntrustedCheckpointError(f"{checkpoint_path}: {error}") from None
                raise


def names_in(value: Any) -> set[str]:
    """Every string in a configuration, however deep, and the full names of its classes and functions."""
    if isinstance(value, str):
        return {value}
    if inspect.isclass(value) or inspect.isroutine(value):
        return {f"{value.__module__}.{value.__qualname__}"}
    if isinstance(value, list | tuple | set):
        return set().union(*(names_in(item) for item in value))
    items = value if isinstance(value, dict) else vars(value) if type(value).__name__ == "Namespace" else {}
    return set().union(*(names_in(item) for item in items.values()))


def _own_packages() -> list[str]:
    """This package, and that of the data where it is the one that came along and no folder of the same name."""
    here = _folder("lightning_modules")
    return [name for name in ("lightning_modules", "datamodules") if name in sys.modules and _folder(name) == here]


def _folder(package: str) -> Path:
    return Path(str(sys.modules[package].__file__)).resolve().parent.parent


def _within(name: str, places: Iterable[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def _ask_first() -> None:
    """Let jsonargparse, which builds what a checkpoint names by one function, ask before it imports."""
    from jsonargparse import _util

    look_up = _util.import_object
    if hasattr(look_up, "asks_first"):
        return

    def import_object(name: Any, *args: Any, **options: Any) -> Any:
        trust = _TRUST.get()
        # without `check_path` the name comes from code, such as an annotation
        if trust is None or not options.get("check_path", True):
            return look_up(name, *args, **options)
        trust.check_name(name)
        found = look_up(name, *args, **options)
        trust.check_found(name, found)
        return found

    import_object.asks_first = True  # type: ignore[attr-defined]
    for module in [module for name, module in sys.modules.items() if _within(name, ["jsonargparse"])]:
        if vars(module).get("import_object") is look_up:
            setattr(module, "import_object", import_object)  # noqa: B010
