"""The site's sources, without building it: every public name is in the reference, every page in the contents."""

import importlib
import inspect
import re
from pathlib import Path

import pytest

SITE = Path(__file__).parents[1] / "docs" / "site"
EXAMPLES = Path(__file__).parents[1] / "examples"
PACKAGES = (
    "lightning_modules",
    "lightning_modules.detection",
    "lightning_modules.em",
    "lightning_modules.em.rules",
    "lightning_modules.graph",
    "lightning_modules.imaging",
    "lightning_modules.mixtures",
    "lightning_modules.networks",
    "lightning_modules.noise",
    "lightning_modules.operators",
    "lightning_modules.point_clouds",
    "callbacks",
    "datamodules",
)


def documented() -> set[int]:
    """The objects that the reference describes."""
    found = set()
    for page in (SITE / "reference").glob("*.rst"):
        for block in re.split(r"(?=\.\. automodule::)", page.read_text(encoding="utf-8"))[1:]:
            module = importlib.import_module(block.split()[2])
            left_out = re.search(r":exclude-members: (.*)", block)
            names = getattr(module, "__all__", None) or [
                name for name, value in vars(module).items() if getattr(value, "__module__", "") == module.__name__
            ]
            seen = {*names} & {*dir(module)}  # Sphinx asks for no others, whatever can be had by name
            found |= {id(getattr(module, name)) for name in seen - set((left_out or "  ")[1].split(", "))}
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_in_the_reference(package: str) -> None:
    module, known = importlib.import_module(package), documented()
    objects = {name: getattr(module, name) for name in module.__all__}
    missing = [
        name
        for name, value in objects.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and id(value) not in known
    ]
    assert not missing, f"{package}: {missing} in no page of docs/site/reference"


def test_every_page_is_in_the_contents() -> None:
    listed = set()
    for page in (SITE / "index.md", SITE / "reference" / "index.md"):
        for block in re.findall(r"```\{toctree\}\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            entries = [line for line in block.splitlines() if line and not line.startswith(":")]
            listed |= {(page.parent / entry).relative_to(SITE).as_posix() for entry in entries}
    pages = {page.relative_to(SITE).with_suffix("").as_posix() for page in [*SITE.glob("*.md"), *SITE.glob("*/*.rst")]}
    assert {page for page in pages if not page.startswith("gallery/")} - {"index"} == listed - {
        "gallery/index",
        "reference/index",
    }


def test_examples_say_what_they_show() -> None:
    scripts = sorted(EXAMPLES.glob("plot_*.py"))
    assert len(scripts) >= 10
    for script in scripts:
        docstring = inspect.cleandoc(re.match(r'"""(.*?)"""', script.read_text(encoding="utf-8"), re.DOTALL)[1])
        title, line, *rest = docstring.splitlines()
        assert line == "=" * len(title), script.name
        assert "".join(rest).strip(), script.name


# Words of the glossary that mean nothing else on any page, with their plurals.
TERMS = {
    term: rf"(?<![\w-]){term}s?(?![\w-])"
    for term in (
        *("assignment", "bank", "E-step", "error bar", "global set", "M-step", "noise model", "overlay"),
        *("parameter table", "pooling", "proxy", "regime", "smoothness"),
    )
} | {"responsibilities": r"(?<!\w)responsibilit(?:y|ies)\b", "units of noise": r"\bunits of (?:the )?noise\b"}
# What is no prose: blocks of code, tables, comments, headings, roles, code, links, formulas.
APART = re.compile(
    r"```.*?```|<!-- table:.*?<!-- end -->|<!--.*?-->|^#[^\n]*$|^\|[^\n]*$|`[^`\n]*`|!?\[[^\]]*\]\([^)]*\)|\$[^$]*\$",
    re.DOTALL | re.MULTILINE,
)


def unlinked(page: str) -> list[str]:
    """Terms of the glossary that a page has in its prose before it has linked them."""
    missing = []
    for term, pattern in TERMS.items():
        link = re.search(rf"\{{term\}}`(?:[^`<]*<)?{term}>?`", page)
        before = page[: link.start()] if link else page
        if re.search(pattern, APART.sub(" ", before), re.IGNORECASE):
            missing.append(term)
    return missing


@pytest.mark.parametrize("page", sorted({*SITE.glob("*.md")} - {SITE / "glossary.md"}), ids=lambda page: page.stem)
def test_the_first_mention_of_a_term_is_linked_to_the_glossary(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert unlinked(text) == []
    glossary = (SITE / "glossary.md").read_text(encoding="utf-8")
    defined = set(re.findall(r"^\w.*$", glossary.partition("{glossary}")[2], re.MULTILINE))  # each on a line of its own
    for shown, term in re.findall(r"\{term\}`([^`<]*?)(?: <([^>`]*)>)?`", text):
        assert (term or shown) in defined


def test_a_term_without_its_link_is_found() -> None:
    assert unlinked("The E-steps, and\nthen the {term}`E-step`; in `E-step`, no word") == ["E-step"]
    assert unlinked("{term}`Regimes <regime>` found by EM, then regimes; ## Bank\n") == ["bank"]
    assert unlinked("## Banks\n\n{term}`banks <bank>` of banks") == []
