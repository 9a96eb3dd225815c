"""What a detector's report says in words and tables."""

from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from callbacks._tables import Row
from callbacks.detector_report.shortcut_probes import SHORTCUTS

_NEAR = 0.05  # of accuracy, or of a class: a shortcut that comes so near the detector is pointed out
_WIDTH = 80  # letters
_COLUMNS = {
    "n": "images",
    "accuracy": "accuracy",
    "accuracy_at_threshold": "own",
    "auroc": "AUROC",
    "ece": "ECE",
    **{f"{name}_accuracy": name for name in SHORTCUTS},
}


def report_table(rows: list[Row]) -> Table:
    """Builds the table for the screen: every condition, then the parts of the first."""
    table = Table(
        title="What the detector is worth",
        caption="accuracy above one half, and above the detector's own threshold; then the accuracy that looking at "
        "file, thumbnail or content alone reaches. More is in the CSV.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,  # on a screen of 80 letters nothing is cut off
    )
    table.add_column("", no_wrap=True)
    for header in _COLUMNS.values():
        table.add_column(header, justify="right", no_wrap=True)
    first = rows[0]["condition"]
    for part in (
        [(row["condition"], row) for row in rows if row["slice"] == "all"],
        [(row["slice"], row) for row in rows if row["slice"] != "all" and row["condition"] == first],
    ):
        for name, row in part:
            table.add_row(escape(name), *(_cell(row[column]) for column in _COLUMNS))
        table.add_section()
    return table


def markdown(rows: list[Row], lines: list[str], mistakes: list[Row]) -> str:
    """Says the same as the screen, for TensorBoard: remarks first, and a list of the mistakes as they are pictured."""
    screen = Console(width=_WIDTH, file=StringIO(), record=True)
    screen.print(report_table(rows))
    # as it stands: in a table of Markdown TensorBoard breaks the numbers in two
    text = [*lines, f"```\n{screen.export_text()}```"]
    if mistakes:
        text += [f"The worst of {rows[0]['condition']}, as they are pictured, row by row:"]
        text += ["\n".join(f"1. `{row['path']}`: {row['label']}, said {row['probability']:.3f}" for row in mistakes)]
    return "\n\n".join(text)


def remarks(rows: list[Row], not_run: dict[str, str], class_names: list[str]) -> list[str]:
    """Returns what has to be said beside the numbers."""
    lines = [f"the shortcut {name} was not run: {reason}" for name, reason in not_run.items()]
    whole = rows[0]
    for name in SHORTCUTS:
        reached, own = whole[f"{name}_accuracy"], whole["accuracy_beside_shortcuts"]
        if reached != "" and reached >= own - _NEAR:
            lines.append(
                f"! {name} alone reaches an accuracy of {reached:.3f}, the detector {own:.3f} on the same images: "
                "these data cannot tell whether the detector has learned more than that"
            )
    for row in rows:
        counts = (row["n"] - row["positive"], row["positive"])
        small = (row["mirrored"] - row["mirrored_positive"], row["mirrored_positive"])
        if row["slice"] == "all" and all(counts) and abs(small[0] / counts[0] - small[1] / counts[1]) > _NEAR:
            parts = [f"{few} of {all_} {name}" for few, all_, name in zip(small, counts, class_names, strict=True)]
            lines.append(
                f"! {row['condition']}: {' and '.join(parts)} images are smaller than a crop and were continued by "
                "their mirror image, which may give the label away: choose a smaller crop_size"
            )
    return lines


def _cell(value: str | float) -> str:
    return "" if value == "" else str(value) if isinstance(value, int) else f"{value:.3f}"
