"""Builds docs/detector_report.ipynb from docs/detector_report.py and executes it.

python benchmarks/detector_sources.py --own --json docs/results/detector_sources.json --work logs/detector_sources
python docs/build_notebook.py --run logs/detector_sources/FOLD --data logs/detector_sources/sources.csv
"""

import argparse
import os
import re
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parent
SOURCE = DOCS / "detector_report.py"
NOTEBOOK = DOCS / "detector_report.ipynb"
TABLE = "detector_report.csv"  # what the test writes

_HEADER = re.compile(r"^# %%(?P<markdown> \[markdown\])?$", re.MULTILINE)
_ABSOLUTE = re.compile(r"(?<![\w./:<])/(?:[\w.-]+/)+[\w.-]*")  # a path of this machine; not a URL, fraction or tag


def cells(text: str) -> list[tuple[str, str]]:
    """Kind (`markdown` or `code`) and text of each cell of a script in the percent format."""
    headers = list(_HEADER.finditer(text))
    ends = [header.start() for header in headers[1:]] + [len(text)]
    found = []
    for header, end in zip(headers, ends, strict=True):
        body = text[header.end() : end].strip("\n")
        if header["markdown"]:
            found.append(("markdown", "\n".join(line.removeprefix("#").removeprefix(" ") for line in body.split("\n"))))
        else:
            found.append(("code", body))
    return found


def machine_paths(notebook: Any) -> list[str]:
    """Absolute paths in the outputs of a notebook, which belong to the machine that executed it."""
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", [])]
    texts = [output.get("text", "") for output in outputs]
    texts += [text for output in outputs for kind, text in output.get("data", {}).items() if kind.startswith("text/")]
    return [path for text in texts for path in _ABSOLUTE.findall("".join(text))]


def report_folder(run: Path) -> Path:
    """The run itself where it has a report, or else the newest run beside it that does."""
    tables = [run / TABLE] if (run / TABLE).is_file() else list(run.parent.glob(f"*/{TABLE}"))
    if not tables:
        raise SystemExit(f"no {TABLE} in {run} or beside it: run `lightning-em test` first, or name a folder by --test")
    return max(tables, key=lambda path: path.stat().st_mtime).parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder that the fit has written, with checkpoints/")
    parser.add_argument("--test", type=Path, help=f"folder that the test has written, with {TABLE}; found beside --run")
    parser.add_argument("--data", type=Path, required=True, help="folder or table with the images")
    options = parser.parse_args()
    import nbformat  # here: who reads the cells above needs neither
    from nbclient import NotebookClient

    test = options.test or report_folder(options.run)
    for name, path in (("RUN", options.run), ("TEST", test), ("DATA", options.data)):
        os.environ[f"DETECTOR_{name}"] = str(path.resolve())
    os.environ["PYTHONWARNINGS"] = "ignore"  # what libraries owe to each other is not part of a report
    notebook = nbformat.v4.new_notebook(
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    )
    for number, (kind, text) in enumerate(cells(SOURCE.read_text(encoding="utf-8"))):
        make = nbformat.v4.new_markdown_cell if kind == "markdown" else nbformat.v4.new_code_cell
        notebook.cells.append(make(text, id=f"cell-{number}"))
    NotebookClient(
        notebook, timeout=None, record_timing=False, resources={"metadata": {"path": str(DOCS.parent)}}
    ).execute()
    if paths := machine_paths(notebook):
        raise SystemExit(f"the outputs name paths of this machine: {', '.join(sorted(set(paths)))}")
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK.name}: {len(notebook.cells)} cells, {NOTEBOOK.stat().st_size / 2**10:.0f} kB")


if __name__ == "__main__":
    main()
