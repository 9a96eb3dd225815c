"""The report notebook is what its source says, executed, without errors and without traces of a machine."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

DOCS = Path(__file__).parents[1] / "docs"
LARGEST = 1.5 * 2**20  # bytes


@pytest.fixture(scope="module")
def builder(docs_script: Callable[[str], ModuleType]) -> ModuleType:
    return docs_script("build_notebook")


@pytest.fixture(scope="module")
def notebook() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((DOCS / "detector_report.ipynb").read_text(encoding="utf-8"))
    return content


def test_its_cells_are_those_of_the_source(builder: ModuleType, notebook: dict[str, Any]) -> None:
    found = [(cell["cell_type"], "".join(cell["source"])) for cell in notebook["cells"]]
    wanted = builder.cells((DOCS / "detector_report.py").read_text(encoding="utf-8"))
    assert found == wanted, "rebuild it: python docs/build_notebook.py --run RUN --data DATA"


def test_every_code_cell_ran_in_order_and_without_an_error(notebook: dict[str, Any]) -> None:
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert code
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [output for output in outputs if output["output_type"] == "error"]
    assert not [output["text"] for output in outputs if output.get("name") == "stderr"]
    assert any("image/png" in output.get("data", {}) for output in outputs)


def test_it_is_small_and_names_no_path_of_a_machine(builder: ModuleType, notebook: dict[str, Any]) -> None:
    assert (DOCS / "detector_report.ipynb").stat().st_size < LARGEST
    assert builder.machine_paths(notebook) == []


def test_cells_of_a_script(builder: ModuleType) -> None:
    script = (
        "# %% [markdown]\n# # Title\n#\n# Text with a # and 5 %%.\n\n# %%\n# a comment\nx = 1\n\n\ny = 2\n\n# %%\nx\n"
    )
    assert builder.cells(script) == [
        ("markdown", "# Title\n\nText with a # and 5 %%."),
        ("code", "# a comment\nx = 1\n\n\ny = 2"),
        ("code", "x"),
    ]


def test_paths_of_a_machine_are_found_and_nothing_else(builder: ModuleType) -> None:
    def paths(text: str) -> list[str]:
        cell = {"outputs": [{"text": ["a line\n", text]}, {"data": {"text/html": text, "image/png": "/a/b/c"}}]}
        return list(builder.machine_paths({"cells": [cell]}))

    assert paths("see /home/someone/run_1.csv") == ["/home/someone/run_1.csv"] * 2
    for text in (
        "https://example.org/a/b",
        "val/photographic/0001.jpg",
        "</td></tr>",
        "residual, 1/255",
        "AUROC / ECE",
    ):
        assert paths(text) == []


def test_the_report_is_found_in_the_run_or_beside_it(builder: ModuleType, tmp_path: Path) -> None:
    run, test = tmp_path / "version_0", tmp_path / "version_1"
    run.mkdir()
    test.mkdir()
    with pytest.raises(SystemExit, match="lightning-em test"):
        builder.report_folder(run)
    (test / "detector_report.csv").touch()
    assert builder.report_folder(run) == test
    (run / "detector_report.csv").touch()
    assert builder.report_folder(run) == run
