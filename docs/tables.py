"""Writes the tables of the pages from the records in docs/results.

    python docs/tables.py          # rewrites the pages that differ
    python docs/tables.py --check  # names them instead, and fails

In a page, `<!-- table: NAME -->` and `<!-- end -->` enclose what the function NAME below makes. A record that has no
function is a table already: `<!-- table: RECORD -->` shows its rows as they are, a column for each plain value.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from statistics import fmean, median
from typing import Any

PROJECT = Path(__file__).resolve().parents[1]
RESULTS = PROJECT / "docs" / "results"
_MARKED = re.compile(r"(<!-- table: (?P<name>\w+) -->\n).*?(<!-- end -->)", re.DOTALL)

Row = dict[str, Any]
Columns = tuple[list[str], Iterable[list[str]]]  # the header and the lines of a table
Make = Callable[[list[Row]], Columns]  # from the rows of a record
TABLES: dict[str, Callable[[], str]] = {}


def pages() -> list[Path]:
    """Every page whose figures are held to records."""
    cards = sorted(PROJECT.glob("lightning_modules/weights/*/README.md"))
    return [PROJECT / "README.md", *sorted((PROJECT / "docs").glob("**/*.md")), *cards]


def generate(text: str) -> str:
    """A page with its tables made anew."""
    return _MARKED.sub(lambda found: f"{found[1]}{_table(found['name'])}\n{found[3]}", text)


def without_tables(text: str) -> str:
    """What was written by hand."""
    return _MARKED.sub("", text)


def read(name: str) -> tuple[list[Row], Row]:
    """Rows of a record, and what made them; a record of an early version has rows only."""
    record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
    return (record, {}) if isinstance(record, list) else (record.pop("rows"), record)


def rows(name: str) -> list[Row]:
    return read(name)[0]


def _table(name: str) -> str:
    if name in TABLES:
        return TABLES[name]()
    if not (RESULTS / f"{name}.json").is_file():
        raise SystemExit(f"docs/tables.py has no table {name}, and docs/results no record of that name")
    found = rows(name)
    columns = list(
        dict.fromkeys(key for row in found for key, value in row.items() if not isinstance(value, dict | list))
    )
    return markdown(columns, ([_plain(row.get(column)) for column in columns] for row in found), name)


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def table(record: str) -> Callable[[Make], None]:
    """Registers a function from a record's rows to a header and lines."""

    def register(make: Make) -> None:
        TABLES[make.__name__] = lambda: _made(make, record)

    return register


def _made(make: Make, record: str) -> str:
    if not (RESULTS / f"{record}.json").is_file():
        return f"*No record yet: `python benchmarks/{record}.py --json docs/results/{record}.json`.*"
    return markdown(*make(rows(record)), record)


def markdown(header: list[str], lines: Iterable[list[str]], record: str) -> str:
    """A table, and below it what made it."""
    made = read(record)[1]
    text = [header, ["---"] * len(header), *lines]
    table = "\n".join(f"| {' | '.join(line)} |".replace("|  |", "| |").replace("|  |", "| |") for line in text)
    source = f"`docs/results/{record}.json`"
    if not made:
        return f"{table}\n\n*{source}, from before records held more than their rows.*"
    threads = "one thread" if made["threads"] == 1 else f"{made['threads']} threads"
    where = f"{threads} of {made['processor']}, torch {made['versions']['torch'].partition('+')[0]}"
    written = Path(made["command"].partition("--json ")[2].partition(" ")[0]).stem
    of = ":" if written == record else ": in part by"  # put together of several runs, or a part of one
    earlier = dict.fromkeys(
        row["commit"][:8] for row in rows(record) if row.get("commit", made["commit"]) != made["commit"]
    )
    others = f"; other rows at {', '.join(earlier)}" if earlier else ""
    return f"{table}\n\n*{source}{of} `{made['command']}`\nat {made['commit'][:8]}, {where}{others}.*"


def ms(value: float) -> str:
    """A time in milliseconds to three digits, in the unit that suits it."""
    value, unit = (1e3 * value, "µs") if value < 0.1 else (value, "ms") if value < 1000 else (value / 1000, "s")
    return f"{_digits(value)} {unit}"


def _digits(value: float, count: int = 2) -> str:
    """So many significant digits, without an exponent."""
    return f"{value:.{max(count - 1 - math.floor(math.log10(abs(value))), 0)}f}" if value else "0"


def db(value: float, digits: int = 2) -> str:
    return f"{value:.{digits}f}"


# Learned parameters


@table("recovery")
def recovery(found: list[Row]) -> Columns:
    header = ["start (σ, τ, σ_s, σ_f)", "at the start", "after 15 batches", "after 50", "to the oracle"]
    return header, (
        [
            ", ".join(f"{value:g}" for value in row["start"].values()),
            *(db(row[f"psnr_{when}"]) for when in ("start", "15")),
            db(row["psnr_50"], 3),
            f"{row['psnr_50'] - row['psnr_oracle']:+.3f}",
        ]
        for row in found
    )


@table("operators")
def operators(found: list[Row]) -> Columns:
    header = ["operator", "learned, worst start, with clean images", "without", "oracle", "ms an image"]
    lines = []
    for name in dict.fromkeys(row["operator"] for row in found):
        own = [row for row in found if row["operator"] == name]
        if "failed" in own[0]:
            lines.append([name, f"failed: {own[0]['failed']}", "", "", ""])
            continue
        time = _digits(median(row["ms_per_image"] for row in own))
        if "objective" in own[0]:
            worst = [min(r["psnr"] for r in own if r["objective"] == o) for o in ("supervised", "sure")]
            lines.append([f"`{name}`", *(db(value, 3) for value in (*worst, own[0]["psnr_oracle"])), time])
        else:
            tried = f", best of {own[0]['settings_tried']} settings" if "settings_tried" in own[0] else ""
            lines.append([f"{name}{tried}", db(own[0]["psnr"], 3), "", "", time])
    return header, lines


@table("anyones")
def anyones(found: list[Row]) -> Columns:
    header = [
        "restoration",
        "images",
        "learned, worse end, with clean images",
        "without",
        "grid",
        "evaluations an image",
    ]
    own = [row for row in found if row["part"] == "finding"]
    lines = []
    for name, data in dict.fromkeys((row["restorer"], row["data"]) for row in own):
        those = [row for row in own if (row["restorer"], row["data"]) == (name, data)]
        worst = [
            min((r["psnr"] for r in those if r["objective"] == o), default=math.nan) for o in ("supervised", "sure")
        ]
        apart = [f"{db(value)} ({value - those[0]['psnr_grid']:+.3f})" for value in worst]
        spent = " and ".join(dict.fromkeys(f"{row['evaluations']:.0f}" for row in those))
        lines.append([name, data, *apart, db(those[0]["psnr_grid"]), spent])
    return header, lines


@table("anyones")
def anyones_search(found: list[Row]) -> Columns:
    own = [row for row in found if row["part"] == "search"]
    lines = []
    for key in dict.fromkeys((row["method"], row.get("objective"), str(row.get("setting"))) for row in own):
        those = [r for r in own if (r["method"], r.get("objective"), str(r.get("setting"))) == key]
        first = those[0]
        words = [f"{name} {value}" for name, value in first.get("setting", {}).items()]
        words += ["noisy images only"] if first.get("objective") == "sure" else []
        name = first["method"] + (f" ({', '.join(words)})" if words else "")
        spent = ["", ""]
        if "seconds" in first:
            spent = [f"{first['restorations']:,}", f"{median(r['seconds'] for r in those):.1f}"]
        scores = ", ".join(db(row["psnr"], 3) for row in those)
        lines.append([name, *spent, scores])
    return ["", "images restored", "seconds", "PSNR of the test images, by seed"], lines


@table("anyones_bank")
def anyones_bank(found: list[Row]) -> Columns:
    header = ["numbers learned", "batches", "seconds", "noisy", "total variation, best weight", "bank", "gain"]
    return header, (
        [
            f"{row['numbers']:,}",
            str(row["batches"]),
            f"{row['seconds']:.0f}",
            *map(db, (row["psnr_noisy"], row["psnr_total_variation"], row["psnr"])),
            f"{row['psnr'] - row['psnr_total_variation']:+.2f} dB",
        ]
        for row in found
        if row["part"] == "bank"
    )


@table("graph_gain")
def graph_gain(found: list[Row]) -> Columns:
    header = ["weights of the network", "seed", "without graph", "with graph", "gain"]
    lines, gains = [], dict[int, list[float]]()
    for on, off in zip(found[::2], found[1::2], strict=False):
        gains.setdefault(on["weights"], []).append(on["psnr"] - off["psnr"])
        gain = f"{gains[on['weights']][-1]:+.2f}"
        lines.append([f"{on['weights']:,}", str(on["seed"]), db(off["psnr"]), db(on["psnr"]), gain])
    means = [[f"**{weights:,}, mean**", "", "", "", f"**{fmean(g):+.2f}**"] for weights, g in gains.items() if g[1:]]
    return header, [*lines, *means]


@table("em_regimes")
def em_regimes(found: list[Row]) -> Columns:
    header = ["learned by", "parameters", "mean", "5", "15", "25", "50"]
    names = {"supervised": "squared error", "sure": "risk estimate, no clean image"}
    lines = []
    for row in found:
        objective, _, work = row["work"].partition(", ")
        if "psnr" in row:
            parts = [db(row["psnr"]), *(db(row[f"psnr_{level}"]) for level in (5, 15, 25, 50))]
            lines.append([names[objective], work.replace("colour", "color"), *parts])
    return header, lines


def _rules(noise: str) -> Make:
    def make(found: list[Row]) -> Columns:
        header = ["learns from", "rule", "within 0.05 dB after, median", "worst", "never"]
        header += ["distance to the oracle at the end, median (worst)", "ms a step of the rule"]

        def batches(value: float | None) -> str:
            return "–" if value is None else f"{value:.0f}"

        return header, (
            [
                "the error" if row["objective"] == "supervised" else "the risk",
                f"`{row['rule'].partition('(')[0]}`" + (f", lr {row['rule'][13:-1]}" if "(" in row["rule"] else ""),
                *map(batches, (row["batches_median"], row["batches_worst"])),
                f"{row['never']} of {row['starts']}",
                f"{row['final_gap_median']:.3f} ({row['final_gap_worst']:.3f}) dB",
                _digits(row["rule_ms"]),
            ]
            for row in found
            if row["noise"] == noise
        )

    make.__name__ = "em_rules" if noise == "25/255" else "em_rules_blind"
    return make


table("em_rules")(_rules("25/255"))
table("em_rules")(_rules("blind"))


@table("em_vs_search")
def em_vs_search(found: list[Row]) -> Columns:
    header = ["", "images restored", "seconds", "PSNR of the test images, by seed"]
    lines = []
    for work, trials in dict.fromkeys((row["work"], row.get("trials")) for row in found):
        own = [row for row in found if (row["work"], row.get("trials")) == (work, trials)]
        if "failed" in own[0]:
            lines.append([work, "", "", f"failed: {own[0]['failed']}"])
            continue
        for count in (len(own[0]["psnr"]),) if trials else (5, 10, 15, 50):
            name = f"`{work}`, {count} batches"
            if trials:
                name = f"{work}, {trials} trials of {own[0]['batches']} batch{'' if own[0]['batches'] == 1 else 'es'}"
            at = [min(count, len(row["psnr"])) - 1 for row in own]
            seconds = median(row["seconds"][where] for row, where in zip(own, at, strict=True))
            scores = ", ".join(db(row["psnr"][where], 3) for row, where in zip(own, at, strict=True))
            lines.append([name, f"{count * own[0]['images']:,}", f"{seconds:.2f}", scores])
    return header, [*lines, ["oracle, on the test images", "", "", db(found[0]["psnr_oracle"], 3)]]


@table("em_impact")
def em_impact(found: list[Row]) -> Columns:
    header = ["setting", "parameters", "MSE ·10³", "PSNR", "lower MSE, mean (range) of the seeds"]
    header += ["steps to the fixed run's final MSE"]
    ends = {(r["setting"], r["variant"], r["seed"]): r for r in found if r["final"]}
    lines = []
    for setting in dict.fromkeys(row["setting"] for row in found):
        variants = list(dict.fromkeys(row["variant"] for row in found if row["setting"] == setting))
        whole = [s for s in range(100) if all((setting, variant, s) in ends for variant in variants)]
        for variant in variants:
            fixed, own = ([ends[setting, v, seed] for seed in whole] for v in ("fixed", variant))
            lower = [1 - two["mse"] / one["mse"] for one, two in zip(fixed, own, strict=True)]
            gain = f"**{fmean(lower):.1%}** ({min(lower):.1%} to {max(lower):.1%}, {len(whole)} seeds)"
            steps = ", ".join(_reached(found, one, two) for one, two in zip(fixed, own, strict=True))
            lines.append(
                [setting if variant == "fixed" else "", variant]
                + [f"{1e3 * fmean(row['mse'] for row in own):.3f}", db(fmean(row["psnr"] for row in own))]
                + (["", ""] if variant == "fixed" else [gain, steps if fixed[0]["step"] else ""])
            )
    return header, lines


def _reached(found: list[Row], fixed: Row, end: Row) -> str:
    same = ("setting", "variant", "seed")
    course = [row for row in found if all(row[key] == end[key] for key in same)]
    step = next((row["step"] for row in course if row["mse"] <= fixed["mse"]), None)
    return "never" if step is None else f"{step} of {fixed['step']}"


@table("textbook")
def textbook(found: list[Row]) -> Columns:
    header = ["rule", "seed", "noisy", "untrained", "after epochs 1, 2, …"]
    return header, (
        [
            f"`{row['rule']}`",
            str(row["seed"]),
            *map(db, (row["psnr_noisy"], row["psnr"][0])),
            ", ".join(map(db, row["psnr"][1:])),
        ]
        for row in found
    )


@table("textbook")
def textbook_classes(found: list[Row]) -> Columns:
    sign, gradient = (next(row for row in found if row["rule"] == rule) for rule in ("SignRule", "GradientRule"))
    header = ["class"]
    lines = [[name] for name in ("global set", *sign["rows"])]
    for row in (sign, gradient):
        header += [f"`{row['rule']}`: σ", "τ", "smooth_steps", "loss"]
        for line, theta in zip(lines, (row["parameters"], *row["rows"].values()), strict=True):
            loss = row["class_loss"].get(line[0])
            steps = theta["smooth_steps"]
            line += [db(theta["sigma"], 3), db(theta["tau"], 3), f"{steps:.3g}", "" if loss is None else f"{loss:.4f}"]
    return header, lines


@table("reliability")
def reliability(found: list[Row]) -> Columns:
    header = ["campaign", "tries", "exact, whole or named", "before the first checkpoint, or harmless", "lost"]
    good, other = ("exact", "whole", "named", "ended"), ("before_the_first", "harmless")
    return header, (
        [row["campaign"], str(row["tries"])]
        + [str(sum(row.get(name, 0) for name in names)) for names in (good, other, ("lost",))]
        for row in found
    )


# Photographs


@table("photographs")
def photographs(found: list[Row]) -> Columns:
    return ["noise, of 255", "noisy", "level told", "level estimated", "SSIM"], _restored(found, stored=False)


def _restored(found: list[Row], stored: bool) -> Iterable[list[str]]:
    own = [row for row in found if row.get("method") == "GraphDenoiser" and row["stored"] == stored]
    for level in dict.fromkeys(row["level"] for row in own):
        told, estimated = (
            next(r for r in own if r["level"] == level and r["told"] == known) for known in (True, False)
        )
        numbers = [told["psnr_noisy"], told["psnr"], estimated["psnr"]]
        yield [f"σ = {level}", *map(db, numbers), f"{estimated['ssim']:.3f}"]


@table("photographs_peers")
def photographs_peers(found: list[Row]) -> Columns:
    measured = [row for row in found if "failed" not in row]
    levels = dict.fromkeys((row["level"], row["told"], row["stored"]) for row in measured)
    header = ["method", "weights"]
    for level, told, stored in levels:
        known = "8-bit files, estimated" if stored else "told" if told else "estimated"
        header.append(f"σ = {level}, {known}")
    lines = []
    for method in dict.fromkeys(row["method"] for row in measured):
        own = [row for row in measured if row["method"] == method]
        weights = f"{own[0]['weights']:,}" if own[0]["weights"] else ""
        by_level = {(row["level"], row["told"], row["stored"]): row for row in own}
        milliseconds = fmean(row["ms_per_megapixel"] for row in own)
        lines.append([method, weights, *(db(by_level[key]["psnr"]) for key in levels), _digits(milliseconds / 1000)])
    failed = [[row["method"], "", f"failed: {row['failed']}"] + [""] * len(levels) for row in found if "failed" in row]
    return [*header, "seconds a megapixel"], [*lines, *failed]


@table("bank_gain")
def bank_gain(found: list[Row]) -> Columns:
    levels = ("15", "25", "50")
    header = ["diffusions", "seed", "weights", *(f"σ = {level}" for level in levels), "seconds a step"]
    return header, (
        [str(row["bank"]), str(row["seed"]), f"{row['weights']:,}"]
        + [db(row[f"psnr_{level}"]) for level in levels]
        + [_digits(row["seconds_a_step"])]
        for row in found
    )


@table("cameras")
def cameras(found: list[Row]) -> Columns:
    header = ["images", "noisy", "read as white", "`auto`", "told", "CBM3D, told", "median error of the level", "clean"]
    return header, (_camera_row(row) for row in found if row["image"] == "mean")


def _camera_row(row: Row) -> list[str]:
    names = ("psnr noisy", "psnr as white", "psnr", "psnr told", "psnr CBM3D")
    error = f"{100 * row['median error of level']:.0f} %" if "median error of level" in row else ""
    figures = [db(row[name]) if name in row and row[name] < 99 else "" for name in names]
    return [f"{row['set']} ({row['images']})", *figures, error, str(row["clean"])]


@table("patch_prior")
def patch_prior(found: list[Row]) -> Columns:
    return ["set", "PSNR", "SSIM", "seconds a photograph"], (
        [row["set"], f"{row['mean']['psnr']:.2f} dB", f"{row['mean']['ssim']:.3f}", _digits(row["mean"]["seconds"])]
        for row in found
        if "mean" in row
    )


# The detector

PROBES = ("file", "thumbnail", "color", "semantic")
# What was asked of a detector before any run: the folds that it is about, what is averaged over them, and the bound;
# where it is negative, the most.
_ASKED: tuple[tuple[str, str, str, float], ...] = (
    ("held-out decoders: AUROC", "decoders", "history auroc", 0.85),
    ("other left-out sources: AUROC", "others", "history auroc", 0.75),
    ("own sources: accuracy, unsure counted as wrong", "own", "history accuracy_verdict", 0.90),
    ("own sources: accuracy of the sure", "own", "history accuracy_sure", 0.97),
    ("own sources: unsure", "own", "history unsure", -0.20),
    ("left-out sources: accuracy of the sure", "left out", "history accuracy_sure", 0.75),
    ("left-out sources: unsure", "left out", "history unsure", -0.60),
    ("sure verdicts that flip when saved again", "all", "flips", -0.05),
    ("denoised photographs called generated", "all", "denoised called generated", -0.10),
    ("sharpened photographs called generated", "all", "sharpened called generated", -0.10),
    ("photographs in the dark called generated", "all", "night called generated", -0.10),
)
_FILES = ("portraits", "diffusiondb")


@table("detector_sources")
def detector_left_out(found: list[Row]) -> Columns:
    columns = ("auroc", "accuracy_verdict", "accuracy_sure", "unsure", *(f"{probe}_auroc" for probe in PROBES))
    header = ["left out", "images", "AUROC", "accuracy", "of the sure", "unsure", *PROBES]
    return header, (
        [row["left out"], f"{row['history n']:.0f}", *(_share(row, f"history {column}") for column in columns)]
        for row in found
    )


@table("detector_sources")
def detector_asked(found: list[Row]) -> Columns:
    return ["what", "must", "mean", "worst", ""], _asked(found)


@table("detector_trace")
def detector_trace(found: list[Row]) -> Columns:
    steps = (100, 200, 300)
    header = ["history", "batches", "images", *(f"after {count} steps" for count in steps), "loss then"]
    return header, (
        [
            f"{row['history']}, after none" if row["after none"] else row["history"],
            "of pairs" if row["pairs"] else "at random",
            f"{row['images']:.0f}",
            *(f"{row[f'auroc {count}']:.2f}" for count in steps),
            f"{row[f'loss {steps[-1]}']:.2f}",
        ]
        for row in found
    )


def _asked(found: list[Row]) -> Iterable[list[str]]:
    left_out = [row for row in found if row["left out"] != "none"]
    groups = {
        "decoders": [row for row in left_out if row["left out"] not in _FILES],
        "others": [row for row in left_out if row["left out"] in _FILES],
        "own": [row for row in found if row["left out"] == "none"],
        "left out": left_out,
        "all": found,
    }
    for name, group, column, bound in _ASKED:
        values = [row[column] for row in groups[group] if column in row]
        if not values:
            continue
        mean, at_most = fmean(values), bound < 0
        met = mean <= -bound if at_most else mean >= bound
        must = f"{'at most' if at_most else 'at least'} {abs(bound):.2f}"
        worst = max(values) if at_most else min(values)
        yield [name, must, f"{mean:.2f}", f"{worst:.2f}", "met" if met else "**missed**"]


def _share(row: Row, column: str) -> str:
    return f"{row[column]:.2f}" if column in row else ""


# Point clouds

# Luo & Hu, "Score-based point cloud denoising", ICCV 2021, tables 1 and 2: 10,000 points of the shapes of PU-Net.
_SCORE_DENOISE = ["ScoreDenoise, as published, on other shapes", "2.52", "3.69", "4.71", "0.46", "1.07", "1.94", ""]


@table("point_clouds")
def point_clouds(found: list[Row]) -> Columns:
    own = [row for row in found if "level" in row]
    levels = sorted({row["level"] for row in own})
    lines = []
    for size, method in dict.fromkeys((row["points"], row["method"]) for row in own):
        those = [row for row in own if (row["points"], row["method"]) == (size, method)]
        by_level = [next((row for row in those if row["level"] == level), {}) for level in levels]
        values = [db(row[name]) if name in row else "" for name in ("chamfer", "surface") for row in by_level]
        seconds = [row["seconds"] for row in those if "seconds" in row and method != "noisy"]
        name = method if len({row["points"] for row in own}) == 1 else f"{method}, {size:,} points"
        lines.append([name, *values, _digits(median(seconds)) if seconds else ""])
    header = [f"{name}, {level:.0%}" for name in ("Chamfer", "surface") for level in levels]
    return ["", *header, "seconds"], [*lines, _SCORE_DENOISE]


@table("point_clouds")
def point_cloud_costs(found: list[Row]) -> Columns:
    rows = {row["method"]: row for row in found}
    time, memory = rows["ours, time"], rows["ours, memory"]
    return ["points", "ours, on one core", "peak memory of the process, peers and all"], [
        [f"{time['points']:,}", ms(1e3 * time["seconds"]), ""],
        [f"{memory['points']:,}", "", f"{memory['peak'] / 1024:,.0f} MiB"],
    ]


# Mixtures


@table("mixtures")
def mixtures(found: list[Row]) -> Columns:
    lines = []
    for row in (row for row in found if "library" in row):
        work = row["work"] + (f", {row['iterations']}" if row["work"].endswith("rest") else "")
        objective = row.get("log_likelihood") or row.get("inertia")
        measured = (
            [ms(1e3 * row["seconds"]), _digits(row["times_ours"])] if "seconds" in row else ["failed", row["failed"]]
        )
        lines.append([work, row["library"], *measured, f"{objective:.8g}" if objective else ""])
    return ["work", "library", "time", "times ours", "mean log-likelihood, or inertia"], lines


@table("mixtures")
def mixture_stream(found: list[Row]) -> Columns:
    lines = []
    for row in (row for row in found if "library" not in row):
        if row["work"] == "stream":
            each = f"{_digits(row['microseconds_per_row'])} µs"
            lines.append(["an iteration", f"{row['rows']:,}", each, f"{row['peak_mib_above_start']:.0f} MiB more"])
        else:
            lines.append([f"`{row['work']}`", f"{row['rows']:,}", "", f"{row['peak_mib']:.0f} MiB, imports included"])
    return ["work", "rows", "time a row", "peak memory"], lines


# Speed


def _speed(name: str, *works: str) -> None:
    """A table of those rows of `speed.json` whose work begins so."""

    def make(found: list[Row]) -> Columns:
        lines, last = [], None
        for row in (row for row in found if row["work"].startswith(works)):
            ours = ms(row["ours_ms"]) + (f", {db(row['psnr'])} dB" if "psnr" in row else "")
            ours += f", {row['peak_mib']:.0f} MiB" if "peak_mib" in row else ""
            peer, ratio = row.get("peer", ""), ""
            if "failed" in row:
                peer += f" failed: {row['failed']}"
            elif peer:
                peer += f": {ms(row['peer_ms'])}" + (f", {db(row['peer_psnr'])} dB" if "peer_psnr" in row else "")
                ratio = f"{row['share']:.1%} of it" if "share" in row else _digits(row["ratio"])
            if setting := row.get("peer_setting"):
                peer += f" ({', '.join(f'{key} {value}' for key, value in setting.items())})"
            lines.append([*(["", ""] if row["work"] == last else [row["work"], ours]), peer, ratio])
            last = row["work"]
        return ["work", "ours", "peer", "times as fast"], lines

    make.__name__ = name
    table("speed")(make)


_speed("speed_image", "image operator")
_speed("speed_photograph", "photograph")
_speed("speed_patches", "textbook graph")
_speed("speed_training", "CIFAR-10", "EM callback")
_speed("speed_sizes", *(f"{side}×{side}" for side in (512, 1024, 2048)))


@table("speed")
def speed_growth(found: list[Row]) -> Columns:
    series: dict[str, list[Row]] = {}
    for row in found:
        if row["work"].startswith("scaling with "):
            series.setdefault(row["work"].partition(":")[0].removeprefix("scaling with "), []).append(row)
    return ["with", "from", "to"], (
        [name, *(f"{row['work'].partition(': ')[2]}: {ms(row['ours_ms'])}" for row in (own[0], own[-1]))]
        for name, own in series.items()
    )


@table("starting")
def starting(found: list[Row]) -> Columns:
    return ["whole process", "time", "ratio", "time of that"], (
        [
            row["start"],
            f"{row['seconds']:.1f} s",
            f"{row['ratio']:.2f} × `{row['beside']}`",
            f"{row['peer_seconds']:.1f} s",
        ]
        for row in found
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="change nothing; fail where a page differs")
    options = parser.parse_args()
    differing = [page for page in pages() if generate(text := page.read_text(encoding="utf-8")) != text]
    for page in differing:
        print(f"{page.relative_to(PROJECT)} {'differs from its records' if options.check else 'made anew'}")
        if not options.check:
            page.write_text(generate(page.read_text(encoding="utf-8")), encoding="utf-8")
    if options.check and differing:
        sys.exit("run: python docs/tables.py")


if __name__ == "__main__":
    main()
