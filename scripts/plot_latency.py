"""Draws milliseconds per query against the number of documents from what the benchmarks measured.

    python benchmarks/run.py --op latency --case 'mistral-*,qwen3-*' --device cuda --csv rows.csv
    python scripts/plot_latency.py rows.csv --chart docs/latency-gpu.png

One panel a model, one line an implementation with the band from p20 to p80. The dashed line beside Mistral-7B is what
the BlockRank paper gives for the same model and documents on other hardware.
"""

from __future__ import annotations

import argparse
import csv
import itertools
import sys
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

MODELS = {"mistral-7b": "Mistral-7B", "qwen3-0.6b": "Qwen3-0.6B", "qwen3-8b": "Qwen3-8B"}
LINES = {
    "its matmuls alone": ("matmuls alone", "#888888"),
    "stock dense prefill": ("stock dense", "#b2182b"),
    "stock prefix cache": ("stock prefix cache", "#e08214"),
    "attached": ("attached", "#4393c3"),
    "attached early exit": ("early exit", "#053061"),
    "attached early exit CUDA graph": ("CUDA graph", "#1b7837"),
}
"""By implementation, its label and color; later ones are drawn over earlier ones."""
PUBLISHED = {10: 32, 20: 52, 50: 112, 100: 226, 200: 448, 500: 1150}
"""Milliseconds of BlockRank on 8 chips of TPU v6e, arXiv 2510.05396, figure 4; of 500 documents, from the text."""
PUBLISHED_LABEL = "BlockRank paper,\n8 chips TPU v6e"
FONT_SIZE = 10.5
LINE_HEIGHT = 12.5  # points

Points = dict[int, dict[str, float]]  # by number of documents, milliseconds by percentile


def main() -> int:
    """Reads the CSV and draws; returns 1 where it has no measurement to draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("csv", type=Path, help="written by benchmarks/run.py")
    parser.add_argument("--chart", type=Path, required=True, help="PNG to write")
    arguments = parser.parse_args()
    with arguments.csv.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["op"] == "latency" and row["dtype"] == "bfloat16"]
    panels = read(rows)
    if not panels:
        print(
            f"{arguments.csv}: expected bfloat16 measurements of latency/{', latency/'.join(MODELS)}, found none",
            file=sys.stderr,
        )
        return 1
    machine = rows[0]["device"] if rows[0]["device"] != "cpu" else rows[0]["cpu"].split(" (")[0]
    draw(arguments.chart, panels, f"{machine}, {rows[0]['date'][:10]}")
    return 0


def read(rows: list[dict[str, str]]) -> dict[str, dict[str, Points]]:
    """The points of every model and implementation."""
    panels: dict[str, dict[str, Points]] = {model: {} for model in MODELS}
    for row in rows:
        model, _, documents = row["case"].rpartition("-")
        if model in MODELS and row["implementation"] in LINES and row["metric"] in ("p20", "median", "p80"):
            points = panels[model].setdefault(row["implementation"], defaultdict(dict))
            points[int(documents)][row["metric"]] = 1e3 * float(row["value"])
    return {model: lines for model, lines in panels.items() if lines}


def draw(path: Path, panels: Mapping[str, Mapping[str, Points]], machine: str) -> None:
    """Panels side by side on common axes, every line labelled where it ends."""
    figure, row = pyplot.subplots(
        1, len(panels), figsize=(4 * len(panels), 5), sharex=True, sharey=True, squeeze=False, layout="constrained"
    )
    documents = sorted({number for lines in panels.values() for points in lines.values() for number in points})
    ends: dict[Any, list[tuple[int, float, str, str]]] = {}
    for axes, (model, lines) in zip(row[0], panels.items(), strict=True):
        ends[axes] = []
        axes.set(xscale="log", yscale="log")
        for name, (label, color) in LINES.items():
            if name not in lines:
                continue
            x = sorted(lines[name])
            p20, median, p80 = ([lines[name][number][key] for number in x] for key in ("p20", "median", "p80"))
            axes.fill_between(x, p20, p80, color=color, alpha=0.25, linewidth=0)
            axes.plot(x, median, marker="o", markersize=4, color=color)
            ends[axes].append((x[-1], median[-1], label, color))
        if model == "mistral-7b":
            axes.plot(list(PUBLISHED), list(PUBLISHED.values()), "--", color="black", linewidth=1.2)
            ends[axes].append((max(PUBLISHED), PUBLISHED[max(PUBLISHED)], PUBLISHED_LABEL, "black"))
        axes.set_title(MODELS[model], fontsize=13, loc="left")
        axes.set_xlabel("documents", fontsize=12)
        axes.xaxis.set(major_locator=FixedLocator(documents), minor_locator=NullLocator())
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.tick_params(labelsize=11)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        room = (documents[-1] / documents[0]) ** 0.85  # for the labels
        axes.set_xlim(documents[0] / 1.15, documents[-1] * room)
    row[0][0].set_ylabel("milliseconds per query", fontsize=12)
    figure.suptitle(f"Reranking one query, documents of 160 tokens, bfloat16; {machine}", fontsize=13)
    figure.draw_without_rendering()  # now the axes have their places
    for axes, of_lines in ends.items():
        label_ends(axes, of_lines, documents[-1])
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def label_ends(axes: Any, ends: list[tuple[int, float, str, str]], last: int) -> None:
    """Writes each label beside the end of its line, moved apart where lines end together; above it where one stops."""
    beside = []
    for documents, milliseconds, text, color in ends:
        style = {"color": color, "fontsize": FONT_SIZE, "textcoords": "offset points"}
        if documents < last:
            axes.annotate(text, (documents, milliseconds), (0, 6), ha="right", **style)
        else:
            height = axes.transData.transform((documents, milliseconds))[1] * 72 / axes.figure.dpi
            beside.append([height, height, text, (documents, milliseconds), style])
    beside.sort(key=lambda entry: entry[0])
    for _ in range(200):
        for lower, upper in itertools.pairwise(beside):
            needed = LINE_HEIGHT * (2 + lower[2].count("\n") + upper[2].count("\n")) / 2
            overlap = max(0.0, needed - (upper[0] - lower[0]))
            lower[0] -= overlap / 2
            upper[0] += overlap / 2
    for moved, height, text, end, style in beside:
        line = {"arrowstyle": "-", "color": style["color"], "linewidth": 0.7, "shrinkB": 3, "relpos": (0, 0.5)}
        axes.annotate(text, end, (18, moved - height), va="center", arrowprops=line, **style)


if __name__ == "__main__":
    sys.exit(main())
