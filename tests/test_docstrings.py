"""Docstrings in one dialect, in every package."""

import ast
import inspect
import re
from collections.abc import Callable, Iterator
from dataclasses import is_dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import callbacks
import datamodules
import lightning_modules

ROOT = Path(lightning_modules.__file__).parents[1]
ROOTS = ("callbacks", "datamodules", "lightning_modules")
SHAPE = re.compile(r"^ *Shape:\n((?: *- \w[^:\n]*: .*`.*\n?(?: {6,}(?!- ).*\n?)*)+)", re.MULTILINE)
REFERENCE = re.compile(r"\bsee `\w+\.\w+`", re.IGNORECASE)
ROLE = re.compile(r":(?:class|meth|func|attr|mod|obj|data|exc|ref):`")


def packages() -> list[str]:
    """The packages that export names."""
    found = []

    def visit(package: ModuleType) -> None:
        found.append(package.__name__)
        for module in iter_modules(package.__path__, f"{package.__name__}."):
            if module.ispkg:
                visit(import_module(module.name))

    for root in (callbacks, datamodules, lightning_modules):
        visit(root)
    return found


def folders() -> list[Path]:
    """Folders with product code."""
    return sorted({path.parent for root in ROOTS for path in (ROOT / root).rglob("*.py")})


def mentions_tensor(annotation: Any) -> bool:
    """As text, for an annotation may be a string."""
    return re.search(r"\bTensor\b", str(annotation)) is not None


def is_described(function: Callable[..., Any], text: str, inherited: bool) -> bool:
    """Whether a function has no tensor, or a `Shape:` block; an override may name the method that has it."""
    notes = dict(function.__annotations__)
    if not any(map(mentions_tensor, notes.values())) or (inherited and REFERENCE.search(text)):
        return True
    block = SHAPE.search(text)
    return block is not None and ("- output:" in block[1] or not mentions_tensor(notes.get("return")))


@cache
def undescribed(package: ModuleType) -> dict[Any, str]:
    """Exported functions, constructors and public methods whose tensors have no shape, and where they are."""
    found = {}
    for name in getattr(package, "__all__", []):
        exported = getattr(package, name)
        members = vars(exported) if inspect.isclass(exported) else {"": exported}
        for attribute, member in members.items():
            function = getattr(member, "__func__", member)  # of a class method
            hidden = attribute.startswith("_") and attribute != "__init__"
            if hidden or not inspect.isfunction(function) or not function.__module__.startswith(ROOTS):
                continue
            if attribute == "__init__" and is_dataclass(exported):  # its class describes the fields
                continue
            if inspect.isclass(exported) and function.__name__ != attribute:  # the default value of a field
                continue
            text = (exported if attribute == "__init__" else function).__doc__ or ""
            inherited = inspect.isclass(exported) and any(attribute in vars(base) for base in exported.__mro__[1:])
            if not is_described(function, text, inherited):
                found[function] = f"{function.__module__}: {function.__qualname__}"
    return found


def docstrings(path: Path) -> Iterator[tuple[str, str]]:
    """Place and text of every docstring of a file, private ones too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield f"{path.relative_to(ROOT)}: {getattr(node, 'name', 'module')}", text


@pytest.mark.parametrize("package", packages())
def test_every_public_callable_with_a_tensor_has_its_shape_block(package: str) -> None:
    offenders = undescribed(import_module(package))
    for other in packages():
        if other.startswith(f"{package}."):  # named there
            offenders = {f: place for f, place in offenders.items() if f not in undescribed(import_module(other))}
    assert not offenders, "\n".join(offenders.values())


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_docstrings_have_single_backticks_and_no_roles(folder: Path) -> None:
    offenders = [
        place
        for path in sorted(folder.glob("*.py"))
        for place, text in docstrings(path)
        if "``" in text or ROLE.search(text)
    ]
    assert not offenders, "\n".join(offenders)


@pytest.mark.parametrize("folder", folders(), ids=lambda folder: str(folder.relative_to(ROOT)))
def test_a_module_docstring_is_what_the_module_is(folder: Path) -> None:
    offenders = [
        f"{place}: {text.splitlines()[0]}"
        for path in sorted(folder.glob("*.py"))
        for place, text in docstrings(path)
        if place.endswith(": module") and re.match(r"(?:What|How)\b", text)
    ]
    assert not offenders, "\n".join(offenders)


def test_what_is_wrong_is_found() -> None:
    def plain(x: Tensor) -> Tensor:
        """Doubles."""
        return 2 * x

    class Base(torch.nn.Module):
        """A class.

        Shape:
            - weight: `[K]`
        """

        def __init__(self, weight: Tensor) -> None:
            super().__init__()
            self.weight = weight

        def forward(self, x: Tensor) -> Tensor:
            """Doubles; see `Other.forward`."""
            return 2 * x

        def own(self, x: Tensor) -> Tensor:
            """Doubles; see `Other.forward`."""
            return 2 * x

        def bare(self, x: Tensor) -> None:
            """Takes a tensor.

            Shape:
                - x: [B]
            """

        def no_output(self, x: Tensor) -> "Tensor | None":
            """Halves.

            Shape:
                - x: `[B]`, of which the
                    text goes on
            """

        def whole(self, x: Tensor) -> Tensor:
            """Halves.

            Shape:
                - x: `[B]`, of which the
                    text goes on
                - output: `[B]`
            """
            return x / 2

        def count(self) -> int:
            """Counts."""
            return 0

    package = ModuleType("example")
    package.plain, package.Base, package.__all__ = plain, Base, ["Base", "plain"]  # type: ignore[attr-defined]
    for function in (plain, *vars(Base).values()):
        if inspect.isfunction(function):
            function.__module__ = "lightning_modules.example"
    assert [place.rpartition(".")[2] for place in undescribed(package).values()] == [
        "own",
        "bare",
        "no_output",
        "plain",
    ]
