"""Guard of checkpoints: the classes that one names are asked about before anything of theirs is imported."""

from __future__ import annotations

import inspect
import re
import sys
from argparse import ArgumentError
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Self

from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from lightning_modules._version import __version__
from lightning_modules.checkpoints.file import CheckpointError, file_name, read_checkpoint

# Where a checkpoint may take classes from; functions, and the rest of torch, open files, download and run code.
_NETWORKS = ("torch.nn", "torch.optim", "torchvision.models", "torchvision.ops")
_COMMAND = "lightning_modules.cli"
# What no one is advised to allow: parts of Python that reach files and programs, and functions named for doing so.
_SYSTEM = (
    *("builtins", "code", "codecs", "ctypes", "importlib", "io", "marshal", "multiprocessing", "nt", "os", "pathlib"),
    *("pickle", "posix", "pty", "runpy", "shelve", "shutil", "socket", "subprocess", "sys", "tempfile", "urllib"),
)
_ACTION = re.compile(
    "(load|save|open|exec|eval|run|system|popen|spawn|compile|download|remove|unlink|rmtree|urlopen)(_.*)?"
)
# Entry of a checkpoint with the version that wrote it, and the classes of module and operator.
ORIGIN = "lightning-em"
_SHOWN = 3


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
        if not all(part.isidentifier() for part in name.split(".")):
            remedy = "it is not the name of a class"
        elif name.partition(".")[0] in _SYSTEM or _ACTION.fullmatch(name.rpartition(".")[2]):
            remedy = "it reads, writes or runs files"
        else:
            remedy = self.remedy.format(name=name)
        return f"{self.file} asks for {name!r}, which it may not build: {remedy}"


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
            CheckpointError: If the file is damaged, or that of something else.
        """
        if isinstance(allow, str):
            raise TypeError(f"allow must be a list of names, such as [{allow!r}], got a string")
        options.setdefault("weights_only", True)
        content: dict[str, Any] = {}
        if not is_remote(checkpoint_path):
            content = read_checkpoint(checkpoint_path, "meta", options["weights_only"])
            cls._check_content(content, file_name(checkpoint_path))
        name = file_name(checkpoint_path)
        trust = building_from(name, allow, names_in(options), cls.__module__)
        theirs = stored_class(content, getattr(cls, "CHECKPOINT_HYPER_PARAMS_KEY", ""))
        kind = theirs.__name__ if theirs and theirs is not cls and issubclass(theirs, cls) else ""
        hint = kind and f"; it is the checkpoint of a {kind}: load it with {kind}.load_from_checkpoint"
        with trust, fitting(name, content, hint):
            if theirs and not issubclass(theirs, cls) and not issubclass(cls, theirs):
                raise CheckpointError(f"the checkpoint is that of a {theirs.__name__}, expected {cls.__name__}")
            try:
                loaded: Self = super().load_from_checkpoint(checkpoint_path, *args, **options)  # type: ignore[misc]
                return loaded
            except ValueError as error:
                # Lightning's own refusals, of the outermost class
                if "was blocked to prevent arbitrary code execution" in str(error):
                    raise UntrustedCheckpointError(f"{name}: {error}") from None
                raise

    @classmethod
    def _check_content(cls, content: dict[str, Any], path: Any) -> None:
        """Refuses a file that holds something else; names it."""
        check_entries(content, path, getattr(cls, "CHECKPOINT_HYPER_PARAMS_KEY", ""))


def check_entries(content: Mapping[str, Any], path: Any, hyper_parameters: str) -> None:
    """Refuses a checkpoint whose version or hyperparameters Lightning could not read.

    Args:
        content: What the file holds.
        path: The file.
        hyper_parameters: Entry of the hyperparameters, which may be absent.

    Raises:
        CheckpointError: With the name of the file.
    """
    version = content.get("pytorch-lightning_version")
    if not isinstance(version, str) or not re.match(r"\d+\.\d+", version):
        raise CheckpointError(
            f"{path} is no checkpoint of Lightning: its pytorch-lightning_version is "
            + ("missing" if version is None else repr(version)[:40])
        )
    for entry in (hyper_parameters, ORIGIN):
        own = content.get(entry, {})
        if not isinstance(own, Mapping):
            raise CheckpointError(f"{path} is malformed: its {entry} is a {type(own).__name__}, expected a dict")


def stored_class(content: Mapping[str, Any], hyper_parameters: str) -> type | None:
    """The class that wrote a checkpoint, of a module or, by the entry of its hyperparameters, a DataModule."""
    name = content.get(hyper_parameters, {}).get("_class_path", "")
    if hyper_parameters == "hyper_parameters":
        name = content.get(ORIGIN, {}).get("class", name)
    return find_class(name) if isinstance(name, str) else None


def find_class(name: str) -> type | None:
    """A class that is imported already: a checkpoint's word imports nothing."""
    module, _, attribute = name.rpartition(".")
    found = getattr(sys.modules.get(module), attribute, None)
    return found if isinstance(found, type) else None


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


@contextmanager
def fitting(path: Any, checkpoint: dict[str, Any], hint: str = "") -> Iterator[None]:
    """Turns what a checkpoint that does not fit raises into one line with the file's name and version."""
    try:
        yield
    except UntrustedCheckpointError:  # has said all there is
        raise
    except (RuntimeError, ValueError, TypeError, ArgumentError) as error:
        written = checkpoint.get(ORIGIN, {}).get("version", __version__)
        version = "" if written == __version__ else f" (lightning-em {written} wrote it, {__version__} reads it)"
        raise CheckpointError(f"{path} does not fit{version}: {differences(str(error))}{hint}") from error


def differences(text: str) -> str:
    """Returns what a list of keys and sizes of torch, or of reasons of jsonargparse, comes to in one line."""
    parts = []
    for line in text.splitlines():
        names = re.findall(r'"([^"]+)"', line)
        sizes = re.search(r"size mismatch for (\S+): .*?\[([\d, ]*)\].*?\[([\d, ]*)\]", line)
        if "Missing key" in line:
            parts.append(f"it lacks {_few(names)}")
        elif "Unexpected key" in line:
            parts.append(f"it has {_few(names)} too many")
        elif sizes:
            parts.append(f"{sizes[1]} is [{sizes[2]}] in it and [{sizes[3]}] here")
    if parts:
        return "; ".join(parts[:_SHOWN]) + (f"; and {len(parts) - _SHOWN} more" if len(parts) > _SHOWN else "")
    if "Does not validate" not in text:
        return " ".join(text.split())
    keys, cause = complaint(text)
    where = f"hyperparameter {'.'.join(keys[1:])}: " if keys[1:] else ""
    return where + cause


def complaint(text: str) -> tuple[list[str], str]:
    """Returns the keys, from the outermost in, and the cause that a message of jsonargparse names."""
    # It nests what it has tried; the cause has the deepest indent.
    noise = re.compile(
        "NoneType|Given value|Subtypes:|Errors:|Does not validate|Subclass types expect|- a (class|dict)"
    )
    lines = [line for line in text.splitlines() if line.strip() and not noise.search(line)] or [text]
    keys = re.findall('Parser key "([^"]+)"', text)
    return keys, max(lines, key=lambda line: len(line) - len(line.lstrip())).strip(" -")


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def is_remote(path: Any) -> bool:
    """Whether a path is that of another machine."""
    return "://" in str(path)
