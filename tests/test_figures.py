"""Every figure of README and docs is in a table that is made from a record, or is no measurement and is named here."""

import json
import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

PROJECT = Path(__file__).parents[1]


tables = SimpleNamespace(**runpy.run_path(str(PROJECT / "docs" / "tables.py")))
PAGES = {str(page.relative_to(PROJECT)): page.read_text(encoding="utf-8") for page in tables.pages()}
RECORDS = sorted((PROJECT / "docs" / "results").glob("*.json"))

NUMBER = r"(?<![\w.,/·^])\d+(?:,\d{3})*(?:\.\d+)?"
WORD = (
    r"\b(?:half an?|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty|fifty|"
    r"sixty|hundred|thousand|dozens?(?: of)?)\b"
)
UNIT = (
    r"(?:dB|decibels?|[mµn]?s|milliseconds?|microseconds?|seconds?|minutes?|hours?|days?|[KMG]i?B|[mg]igabytes?|"
    r"megapixels?|MP|GFLOP/s|GB/s|%|percent(?:age points?)?|times|fold)(?![\w/])"
)
PART = (
    r"\b(?:an?|one|two|three|four|five|nine|nineteen) "
    r"(?:half|third|quarter|fifth|sixth|seventh|eighth|ninth|tenth|twentieth|hundredth|thousandth)s?\b"
)
METRIC = r"\b(?:AUROC|accuracy|PSNR|SSIM|gain|ratio|exponent)s?(?: (?:of|is|was|reaches|to|by))? "
FIGURE = re.compile(
    rf"{NUMBER}[\s-]*{UNIT}"  # 26.9 dB, 12 minutes, 40 %, 3 times
    rf"|{NUMBER}\s?×(?!\s?\d)(?<!\d×\d)"  # 4× as fast, but not 8×8 pixels
    rf"|{METRIC}{NUMBER}"  # an accuracy of 1
    r"|(?<![\w.,/×^])\d+\.\d+(?![\w.])(?!\.\d)"  # whatever has decimals
    r"|(?<![\w.,/])\d{1,3}(?:,\d{3})+"  # 313,164
    rf"|{WORD}[\s-]+{UNIT}"  # nine times, half a minute
    rf"|{PART}"  # a seventh of scikit-learn's time
    r"|\btwice as \w+|\bhalf (?:of )?(?:the|its) (?:time|steps|batches|memory|error)"
)
# What a page may say by hand, and why: it is no result of a measurement.
DEFINITIONS: dict[str, dict[str, str]] = {
    "README.md": {"Python 3.11 or later": "a version"},
    "docs/site/index.md": {"Python 3.11 or later": "a version"},
    "docs/site/restore.md": {"Python 3.11 or later": "a version"},
    "docs/site/tuning.md": {
        "σ from 0.1 to 0.5, τ from 0.05 to 0.3": "bounds",
        "0.1 suits a diffusion alone, 0.05 one beside a network": "learning rates of the configurations",
        "a page of 90 % bands": "what the page shows",
    },
    "docs/site/benchmarks.md": {
        "8,068 training images": "size of the data set",
        "σ, σ_f in [0.1, 0.5], τ in [0.05, 0.3]": "bounds",
        "1,200 steps of 32": "length of the run",
        "400,000 patches of 8×8": "size of the data set",
        "29.69 dB for EPLL": "published (Zoran and Weiss, 2011)",
        "29.97 dB for BM3D; on CBSD68 30.71 dB for CBM3D": "published (Zhang et al., 2017)",
    },
    "docs/site/detector.md": {
        "a mean AUROC of 0.85 over left-out sources, and 0.75 on the worst": "what weights must reach to ship",
        "rescaled by 0.5 to 1.0": "bounds of the history",
        "ROC curve above 0.6": "a threshold of the code",
        "rescaling by 0.75": "a change that verdicts are tried by",
        "45,000 training and 5,000 test images": "size of a data set",
    },
    "docs/site/cameras.md": {
        "CBM3D 35.19, CBDNet 36.44, MCWNNM 37.70, TWSC 37.81": "published (Nam et al., 2016; Xu et al., 2018)",
    },
    "docs/site/em.md": {"narrower than a thousandth of the data": "a threshold of the code"},
    "docs/site/em_study.md": {
        "8,068 training images": "size of the data set",
        "stays within 0.05 dB of the oracle": "when a start counts as arrived",
        "settings within 0.01 dB of the best": "how settings are chosen",
        "σ 0.3, τ 0.1, radius 10, σ_s 10, σ_f 0.3": "defaults",
    },
    "docs/site/learning.md": {"to end within 0.02 dB": "the aim"},
    "docs/site/point_clouds.md": {"noise of 1, 2 and 3 % of the bounding": "what the benchmark adds"},
    "docs/site/performance.md": {"every 4 KiB": "size of a page of memory"},
}


def handwritten(text: str) -> str:
    """A page without tables from records, addresses and code; comments in code and figures in code spans are kept."""
    text = tables.without_tables(text)
    text = re.sub(r"```.*?```", lambda block: "\n".join(re.findall(r"# (.*)", block[0])), text, flags=re.DOTALL)
    text = re.sub(r"`([^`\n]+)`", lambda span: span[1] if FIGURE.fullmatch(span[1]) else " ", text)
    return " ".join(re.sub(r"<!--.*?-->|\]\([^)]*\)", " ", text, flags=re.DOTALL).split())


def figures(text: str, definitions: dict[str, str]) -> list[str]:
    """What is left of a page's figures without its definitions, each with its surroundings."""
    text = handwritten(text)
    for definition in definitions:
        text = text.replace(definition, "")
    return [text[max(found.start() - 40, 0) : found.end() + 20] for found in FIGURE.finditer(text)]


@pytest.mark.parametrize("page", [page for page in PAGES if not page.startswith("lightning_modules")])
def test_no_figure_is_written_by_hand(page: str) -> None:
    assert figures(PAGES[page], DEFINITIONS.get(page, {})) == []


@pytest.mark.parametrize("page", DEFINITIONS)
def test_no_definition_is_left_over(page: str) -> None:
    for definition in DEFINITIONS[page]:
        assert definition in handwritten(PAGES[page]), (page, definition)
        assert FIGURE.search(definition), f"{definition!r} needs no definition"


@pytest.mark.parametrize("page", PAGES)
def test_tables_are_those_of_the_records(page: str) -> None:
    assert tables.generate(PAGES[page]) == PAGES[page], "run: python docs/tables.py"


@pytest.mark.parametrize(
    "claim",
    [
        "restores at 28.94 dB in the mean",
        "takes 12 ms an image",
        "ends in 0.30 s, one thread",
        "is 4× as fast",
        "is 7 times as fast",
        "nine times as fast",
        "has an AUROC of 0.97",
        "peaks at 1,079 MiB",
        "asks for 40 % of the steps",
        "asks for 40% of the steps",
        "takes a seventh of scikit-learn's time",
        "is there in half a minute",
        "is a network of 313,164 weights",
        "| ours | 26.41 |",
        "takes between 3 and 5 hours",
        "is a 30-fold gain",
        "is twice as fast",
        "reaches an accuracy of 1",
        "reaches `30.8 dB`",
    ],
)
def test_a_figure_by_hand_is_found(claim: str) -> None:
    page, definitions = PAGES["README.md"], DEFINITIONS["README.md"]
    assert len(figures(f"{page}\n\nIt {claim}.\n", definitions)) > len(figures(page, definitions))


@pytest.mark.parametrize(
    "plain", ["noise of 25/255", "patches of 8×8 pixels", "in two sentences", "version 0.1.0", "CIFAR-10"]
)
def test_what_measures_nothing_is_left_alone(plain: str) -> None:
    assert figures(f"With {plain}, as ever.", {}) == []


def test_a_table_that_was_edited_is_found() -> None:
    page = PAGES["docs/site/benchmarks.md"]
    edited = page.replace("26.955", "26.995")
    assert edited != page
    assert tables.generate(edited) == page


@pytest.mark.parametrize("path", RECORDS, ids=lambda path: path.stem)
def test_a_record_says_what_made_it(path: Path) -> None:
    record = json.loads(path.read_text(encoding="utf-8"))
    assert {"command", "commit", "processor", "threads", "versions", "rows"} <= set(record)
    assert re.fullmatch(r"[0-9a-f]{40}", record["commit"]), "run from a commit, with nothing changed"
    assert re.search(r"python (benchmarks|tests/campaigns)/\w", record["command"])
    assert record["versions"]["torch"]
    assert record["rows"]
