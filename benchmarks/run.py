"""Runs the benchmarks of rankernel: ``python benchmarks/run.py --help``."""

from __future__ import annotations

import argparse
import csv
import datetime
import fnmatch
import importlib
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import rankernel
from cases import MODULES
from measure import Case, Finding, Problem, Result, for_isas, run, speed_up
from rankernel import backends

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
EPILOG = """Names may be given as a comma-separated list; cases as patterns (100-*), implementations as parts of names.
Exits with 1 where an implementation of rankernel fails or gives a result that does not match the reference."""


@dataclass(frozen=True)
class Row:
    """One measurement, as the CSV has it after the header's fields."""

    op: str
    case: str
    dtype: str
    implementation: str
    isa: str
    metric: str
    peer: str
    value: float | str
    unit: str


def main() -> int:
    """Parses the arguments, runs the selected cases, prints tables and writes the CSV; returns the exit status."""
    arguments = _parse()
    if arguments.list:
        _list(arguments)
        return 0
    torch.set_num_threads(arguments.threads)
    selected = [(op, case) for op, cases in _cases(arguments).items() for case in cases]
    header = machine(arguments)
    _print_header(header)
    rows: list[Row] = []
    good = True
    for op, case in selected:
        for dtype in arguments.dtype or [_name(dtype) for dtype in case.dtypes]:
            problem = _build(case, dtype, arguments)
            results = _run_case(f"{op}/{case.name} {dtype}", problem, case, arguments)
            print(f"\n{op}/{case.name} {dtype}: {case.shape}")
            if not results:
                print("no implementation of this case is selected")
                continue
            _print_table(problem, results)
            for finding, of, _, value in _findings(problem, results):
                isa = of.implementation.isa
                print(finding.text.format(_with_unit(value, finding.unit)) + (f" [{isa}]" if isa else ""))
            rows += _rows(op, case, dtype, problem, results)
            if arguments.csv:
                _write_csv(arguments.csv, header, rows)  # after every case: what a killed run measured is there
            good &= all(result.matches for result in results if result.implementation.native_op)
    if arguments.csv and rows:
        print(f"\n{len(rows)} measurements written to {arguments.csv}")
    if not good:
        print("\na result of rankernel is missing or does not match the reference", file=sys.stderr)
    return 0 if good else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Benchmarks of rankernel against named peers.", epilog=EPILOG)
    parser.add_argument("--op", type=_names, help=f"of {', '.join(MODULES)}")
    parser.add_argument("--case", type=_names, help="by default those that --list marks with *")
    parser.add_argument("--all", action="store_true", help="run all cases of the ops")
    parser.add_argument("--impl", type=_names, help="by default all")
    parser.add_argument("--dtype", type=_names, help=f"of {', '.join(DTYPES)}; by default those of the case")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), default="cpu", help="cuda runs only the ops that have GPU kernels"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of all libraries")
    parser.add_argument("--isa", type=_names, default=[], help="to run the kernels with; by default the best")
    parser.add_argument("--csv", type=Path, help="file to write, one measurement a row")
    parser.add_argument("--list", action="store_true", help="show cases and implementations and stop")
    arguments = parser.parse_args()
    for option, given, known in (
        ("--op", arguments.op, MODULES),
        ("--dtype", arguments.dtype, DTYPES),
        ("--isa", arguments.isa, backends.available_isas()),
    ):
        if unknown := [name for name in given or () if name not in known]:
            parser.error(f"{option}: expected some of {', '.join(known)}, got {', '.join(unknown)}")
    if arguments.threads < 1:
        parser.error(f"--threads: expected at least 1, got {arguments.threads}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device: cuda is asked for, and PyTorch sees no CUDA device")
    if not any(_cases(arguments).values()):
        parser.error(f"--case: no case matches {', '.join(arguments.case or ['*'])}; --list shows all")
    return arguments


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _cases(arguments: argparse.Namespace) -> dict[str, list[Case]]:
    """The selected cases of every selected op."""

    def wanted(case: Case) -> bool:
        if _build_of(case, arguments.device) is None:
            return False
        if arguments.case is None:
            return case.default or arguments.all or arguments.list
        return any(fnmatch.fnmatchcase(case.name, pattern) for pattern in arguments.case)

    return {
        op: [case for case in importlib.import_module(f"cases.{op}").CASES if wanted(case)]
        for op in arguments.op or MODULES
    }


def _build_of(case: Case, device: str) -> Callable[[torch.dtype], Problem] | None:
    return case.build_on_gpu if device == "cuda" else case.build


def _build(case: Case, dtype: str, arguments: argparse.Namespace) -> Problem:
    build = _build_of(case, arguments.device)
    assert build is not None, case.name  # _cases leaves such cases out
    return build(DTYPES[dtype])


def _list(arguments: argparse.Namespace) -> None:
    for op, cases in _cases(arguments).items():
        for case in cases:
            dtypes = ", ".join(_name(dtype) for dtype in case.dtypes)
            print(f"{op}/{case.name}{' *' if case.default else ''}  ({dtypes})\n    {case.shape}")
            names = [
                implementation.name for implementation in _build(case, _name(case.dtypes[0]), arguments).implementations
            ]
            print(f"    {', '.join(names)}")
    print("\n* runs when no case is asked for")


def _run_case(title: str, problem: Problem, case: Case, arguments: argparse.Namespace) -> list[Result]:
    implementations = [
        implementation
        for implementation in for_isas(problem.implementations, arguments.isa)
        if arguments.impl is None
        or implementation.yardstick
        or any(part.lower() in implementation.label.lower() for part in arguments.impl)
    ]
    if all(implementation.yardstick for implementation in implementations):
        return []

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r\033[K{f'{title}: {text}' if text else ''}", end="", file=sys.stderr, flush=True)

    return run(implementations, case.seconds, progress)


def machine(arguments: argparse.Namespace) -> dict[str, str]:
    """What a measurement depends on: the header of the output and the first columns of the CSV."""
    kernels = [f"{op} {name} {backends.active_isa(op, dtype)}" for op in backends.OPS for name, dtype in DTYPES.items()]
    command = ["python", "benchmarks/run.py", *sys.argv[1:]]
    if not any(argument.startswith("--threads") for argument in sys.argv[1:]):
        command += ["--threads", str(arguments.threads)]
    forced = [f"{name}={os.environ[name]}" for name in ("RANKERNEL_BACKEND", "RANKERNEL_ISA") if name in os.environ]
    on_gpu = arguments.device == "cuda"
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_model(),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "cpus": str(os.cpu_count()),
        "threads": str(arguments.threads),
        "load": f"{os.getloadavg()[0]:.2f}",
        "kernels": "; ".join(kernels),
        "rankernel": rankernel.__version__,
        "git": _git_hash(),
        "torch": torch.__version__,
        **({"triton": _triton_version(), "driver": _driver_version()} if on_gpu else {}),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "command": " ".join([*forced, shlex.join(command)]),
    }


def _print_header(header: dict[str, str]) -> None:
    print(f"{header['cpu']}, {header['cpus']} CPUs, {header['threads']} threads, load {header['load']}")
    if header["device"] != "cpu":
        print(f"on the GPU: {header['device']}, driver {header['driver']}, triton {header['triton']}")
    versions = ", ".join(f"{name} {header[name]}" for name in ("rankernel", "git", "torch", "python"))
    print(f"{versions}, {header['system']}, {header['date']}")
    for op in backends.OPS:
        kernels = [kernel.removeprefix(f"{op} ") for kernel in header["kernels"].split("; ") if kernel.startswith(op)]
        print(f"kernels of {op}: {', '.join(kernels)}")
    print(f"reproduce: {header['command']}", flush=True)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if "model name" not in fields:
        return platform.machine()
    return f"{fields['model name']} (family {fields.get('cpu family')}, model {fields.get('model')})"


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except ImportError:
        return "none"


def _driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _git_hash() -> str:
    """Short hash of the checkout that holds this file, with -dirty where tracked files differ.

    A copy without the checkout is told of it by RANKERNEL_COMMIT.
    """
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("RANKERNEL_COMMIT", "unknown")


def _print_table(problem: Problem, results: Sequence[Result]) -> None:
    measured = [result for result in results if not result.failed]
    yardstick = next((result for result in measured if result.implementation.yardstick), None)
    subjects = _subjects(measured)
    columns = [("", "implementation"), ("", "median"), ("", "p20"), ("", "p80"), ("", "samples")]
    with_rate = any(result.rate for result in measured)
    if with_rate:
        columns.append(("useful", f"G{problem.unit}/s"))
    if yardstick:
        columns.append(("of", "matmul"))
    columns += [("peak", "MB"), ("largest", "error"), ("", "match")]
    columns += [("speed-up of", subject.implementation.label) for subject in subjects]
    table: list[list[str]] = []
    for result in measured:
        p20, median, p80 = result.percentiles
        cells = [result.implementation.label, *map(_seconds, (median, p20, p80)), str(len(result.samples))]
        if with_rate:
            cells.append("-" if result.rate is None else f"{result.rate / 1e9:.2f}")
        if yardstick:
            fraction = _fraction(result, yardstick)
            cells.append("-" if fraction is None else f"{fraction:.2f}")
        cells.append("n/a" if result.peak_bytes is None else f"{result.peak_bytes / 1e6:.1f}")
        compared = result.error is not None
        cells.append(f"{result.error:.1e}" if compared else "-")
        cells.append(("yes" if result.matches else "NO") if compared else "-")
        for subject in subjects:
            ratio = None if result is subject else speed_up(subject, result)
            cells.append("-" if ratio is None else f"{ratio:.2f}x")
        table.append(cells)
    lines = [list(line) for line in zip(*columns, strict=True)] + table
    widths = [max(len(line[column]) for line in lines) for column in range(len(columns))]
    for line in lines:
        cells = [line[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        print("  ".join(cells).rstrip())
    for result in results:
        if result.failed:
            print(f"{result.implementation.label}: not measured, {result.failed}")
        elif result.error is not None and not result.matches:
            allowed = f"its error {result.error:.1e} exceeds {result.allowed:.1e}"
            print(f"{result.implementation.label}: no speed-up, its result is another one ({allowed})")


def _subjects(results: Sequence[Result]) -> list[Result]:
    """Rows of rankernel that get a speed-up column: all, where there is anything to be faster than."""
    peers = [result for result in results if not result.implementation.native_op]
    if not any(peer.implementation.expected for peer in peers):
        return []
    return [result for result in results if result.implementation.native_op and result.implementation.compare]


def _fraction(result: Result, yardstick: Result) -> float | None:
    if result is yardstick or result.rate is None or yardstick.rate is None:
        return None
    return result.rate / yardstick.rate


def _seconds(value: float) -> str:
    """A duration with about three digits."""
    scale, unit = next((entry for entry in ((1.0, "s"), (1e3, "ms")) if abs(value) * entry[0] >= 0.9995), (1e6, "us"))
    scaled = value * scale
    return f"{scaled:.{2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0}f} {unit}"


def _with_unit(value: float, unit: str) -> str:
    if unit == "s":
        return _seconds(value)
    return {"": f"{value:.2f}", "%": f"{value:.1f} %", "B": f"{value / 1e6:.1f} MB"}[unit]


def _findings(problem: Problem, results: Sequence[Result]) -> Iterator[tuple[Finding, Result, Result, float]]:
    """The findings of a problem, once per instruction set, where both rows were measured and are right."""
    rows = {(result.implementation.name, result.implementation.isa): result for result in results if result.matches}
    for finding in problem.findings:
        for (name, isa), of in rows.items():
            over = rows.get((finding.over, isa)) or rows.get((finding.over, None))
            if name == finding.of and over and (value := finding.value(of, over)) is not None:
                yield finding, of, over, value


def _rows(op: str, case: Case, dtype: str, problem: Problem, results: Sequence[Result]) -> list[Row]:
    """Everything that was measured, in long form."""
    rows: list[Row] = []
    measured = [result for result in results if not result.failed]
    yardstick = next((result for result in measured if result.implementation.yardstick), None)
    for result in results:
        implementation = result.implementation
        isa = ""
        if implementation.native_op and implementation.backend != "cpu":
            isa = implementation.backend
        elif implementation.native_op:
            with implementation.context():
                isa = backends.active_isa(implementation.native_op, DTYPES[dtype])
        rows += [
            Row(op, case.name, dtype, implementation.label, isa, metric, peer, value, unit)
            for metric, peer, value, unit in _metrics(result, problem, measured, yardstick)
            if value is not None
        ]
    for finding, of, over, value in _findings(problem, results):
        names = of.implementation.label, over.implementation.label
        isa = of.implementation.isa or ""
        rows.append(Row(op, case.name, dtype, names[0], isa, finding.metric, names[1], value, finding.unit))
    return rows


def _metrics(
    result: Result, problem: Problem, measured: Sequence[Result], yardstick: Result | None
) -> Iterator[tuple[str, str, float | str | None, str]]:
    """Metric, peer, value and unit of everything known of one row; None where it is not."""
    if result.failed:
        yield "failed", "", result.failed, ""
        return
    p20, median, p80 = result.percentiles
    yield "median", "", median, "s"
    yield "p20", "", p20, "s"
    yield "p80", "", p80, "s"
    yield "first_call", "", result.first_call, "s"
    yield "samples", "", len(result.samples), ""
    yield "calls_per_sample", "", result.calls_per_sample, ""
    yield "useful_rate", "", result.rate, f"{problem.unit}/s"
    if yardstick:
        yield "fraction_of_rate", yardstick.implementation.label, _fraction(result, yardstick), ""
    yield "peak_memory", "", result.peak_bytes, "B"
    yield "error", "", result.error, ""
    yield "allowed_error", "", result.allowed, ""
    if result.error is not None:
        yield "match", "", int(result.matches), ""
    for peer in measured if result.implementation.native_op else ():
        if not peer.implementation.native_op:
            yield "speed_up", peer.implementation.label, speed_up(result, peer), ""


def _write_csv(path: Path, header: dict[str, str], rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [*header, *Row.__dataclass_fields__])
        writer.writeheader()
        writer.writerows(header | vars(row) for row in rows)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


if __name__ == "__main__":
    sys.exit(main())
