"""Tables and remarks of a detector's report."""

from io import StringIO

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from callbacks._tables import Line
from callbacks.detector_report.shortcut_probes import PROBES

_NEAR = 0.05  # of accuracy, or of a class: a probe that comes so near the detector is pointed out
_WIDTH = 80  # letters
_COLUMNS = {
    "n": "images",
    "accuracy": "accuracy",
    "accuracy_sure": "sure",
    "unsure": "unsure",
    "auroc": "AUROC",
    **{f"{name}_accuracy": {"thumbnail": "thumb", "semantic": "scene"}.get(name, name) for name in PROBES},
}


def report_table(lines: list[Line]) -> Table:
    """Builds the table for the screen: every condition, then the parts of the first."""
    table = Table(
        title="What the detector is worth",
        caption="accuracy above one half, and of verdicts that are sure; then that of probes of nothing but file, "
        "thumbnail, color or what is shown. More is in the CSV.",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=0,  # on a screen of 80 letters nothing is cut off
    )
    table.add_column("", no_wrap=True)
    for header in _COLUMNS.values():
        table.add_column(header, justify="right", no_wrap=True)
    first = lines[0]["condition"]
    for part in (
        [(line["condition"], line) for line in lines if line["slice"] == "all"],
        [(line["slice"], line) for line in lines if line["slice"] != "all" and line["condition"] == first],
    ):
        for name, line in part:
            table.add_row(escape(name), *(_cell(line[column]) for column in _COLUMNS))
        table.add_section()
    return table


def markdown(lines: list[Line], notes: list[str], losses: list[Line]) -> str:
    """Writes the same for TensorBoard: remarks first, and a list of the top losses as they are pictured."""
    screen = Console(width=_WIDTH, file=StringIO(), record=True)
    screen.print(report_table(lines))
    # as text: in a table of Markdown TensorBoard breaks the numbers in two
    text = [*notes, f"```\n{screen.export_text()}```"]
    if losses:
        text += [f"The top losses of {lines[0]['condition']}, as they are pictured, row by row:"]
        text += ["\n".join(f"1. `{line['path']}`: {line['label']}, said {line['probability']:.3f}" for line in losses)]
    return "\n\n".join(text)


def remarks(lines: list[Line], not_run: dict[str, str], class_names: list[str]) -> list[str]:
    """Returns what has to be known beside the numbers."""
    notes = [f"the shortcut probe {name} was not run: {reason}" for name, reason in not_run.items()]
    whole = lines[0]
    for name in PROBES:
        reached, own = whole[f"{name}_accuracy"], whole["accuracy_beside_probes"]
        if reached != "" and reached >= own - _NEAR:
            notes.append(
                f"! {name} by itself reaches an accuracy of {reached:.3f}, the detector {own:.3f} on the same images: "
                "these data cannot show whether the detector has learned more than that"
            )
    for line in lines:
        counts = (line["n"] - line["positive"], line["positive"])
        small = (line["mirrored"] - line["mirrored_positive"], line["mirrored_positive"])
        if line["slice"] == "all" and all(counts) and abs(small[0] / counts[0] - small[1] / counts[1]) > _NEAR:
            parts = [f"{few} of {all_} {name}" for few, all_, name in zip(small, counts, class_names, strict=True)]
            notes.append(
                f"! {line['condition']}: {' and '.join(parts)} images are smaller than a crop and were continued by "
                "their mirror image, which may give the label away: choose a smaller crop_size"
            )
    return notes


def _cell(value: str | float) -> str:
    return "" if value == "" else str(value) if isinstance(value, int) else f"{value:.3f}"
