"""Times RankNet, forward and backward, against the length of the lists, and draws docs/listwise_loss.png.

    python scripts/plot_listwise_loss.py

takes about ten minutes on two idle cores and writes benchmarks/results/listwise_loss-length.csv, one row a length and
implementation, and the picture. Batches have 16 lists; the implementations are those of
benchmarks/cases/listwise_loss.py and take turns as benchmarks/measure.py has it. PyTorch stops at 1,000 items: its
n x n matrices grow to gigabytes. So do those of the reference, and results of longer lists are not compared.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import torch
from matplotlib import pyplot
from matplotlib.ticker import FuncFormatter

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

from cases.listwise_loss import problem  # noqa: E402
from measure import run  # noqa: E402
from run import machine  # noqa: E402

LISTS = 16
LONGEST_OF_PEERS = 1000
COLORS = {"eager PyTorch": "#b2182b", "the same compiled": "#d6604d", "rankernel": "#2166ac"}
LABELS = {"eager PyTorch": "PyTorch", "the same compiled": "compiled", "rankernel": "rankernel"}
FIELDS = ("length", "implementation", "median", "p20", "p80", "samples", "peak_memory", "match")

Row = dict[str, float | str]


def main() -> int:
    """Measures, writes the CSV and draws; returns 1 where a result is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000], help="of lists"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="to measure a length")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks/results/listwise_loss-length.csv")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs/listwise_loss.png")
    arguments = parser.parse_args()
    header = machine(argparse.Namespace(threads=torch.get_num_threads(), device="cpu"))
    header["command"] = f"python scripts/plot_listwise_loss.py {' '.join(sys.argv[1:])}".rstrip()
    rows = [row for length in arguments.lengths for row in measure(length, arguments.seconds)]
    with arguments.csv.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*header, *FIELDS])
        writer.writeheader()
        writer.writerows(header | row for row in rows)
    draw(arguments.chart, rows, f"{header['cpu'].split(' (')[0]}, {header['threads']} threads")
    return 1 if any(row["match"] == 0 for row in rows) else 0


def measure(length: int, seconds: float) -> list[Row]:
    """One row an implementation; those of PyTorch only up to their longest lists."""
    everything = problem("ranknet", (LISTS, length), False, "cpu", torch.float32).implementations
    selected = [row for row in everything if row.name in COLORS]
    if length > LONGEST_OF_PEERS:
        selected = [replace(row, expected=None) for row in selected if row.native_op]
    rows: list[Row] = []
    for result in run(selected, seconds):
        if result.failed:
            raise RuntimeError(f"{result.implementation.name}, lists of {length} items: {result.failed}")
        p20, median, p80 = result.percentiles
        peak = "" if result.peak_bytes is None else result.peak_bytes
        match = "" if result.error is None else int(result.matches)
        values = (length, result.implementation.name, median, p20, p80, len(result.samples), peak, match)
        rows.append(dict(zip(FIELDS, values, strict=True)))
        print(f"{length:6} {result.implementation.name:20} {1e3 * median:10.3f} ms", flush=True)
    return rows


def draw(path: Path, rows: Sequence[Row], machine_in_words: str) -> None:
    """Time against length on logarithmic axes, every line labelled at its end."""
    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, color in COLORS.items():
        points = [(float(row["length"]), 1e3 * float(row["median"])) for row in rows if row["implementation"] == name]
        axes.loglog(*zip(*points, strict=True), marker="o", color=color)
        axes.annotate(
            LABELS[name], points[-1], (10, 0), textcoords="offset points",
            color=color, fontsize=12, fontweight="bold", va="center",
        )  # fmt: skip
    lengths = sorted({float(row["length"]) for row in rows})
    axes.set_xlim(lengths[0] / 1.3, lengths[-1] * 4)  # room for the labels
    axes.set_xlabel("items in each of the 16 lists", fontsize=12)
    axes.set_ylabel("milliseconds", fontsize=12)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axes.tick_params(labelsize=11)
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(f"RankNet loss, forward and backward, float32; {machine_in_words}", fontsize=12, loc="left")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


if __name__ == "__main__":
    sys.exit(main())
