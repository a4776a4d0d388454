"""Builds rankernel for the NVIDIA GPU of this machine, then tests, sanitizes and benchmarks it.

    python scripts/check_on_gpu.py --out results [--minutes 9] [--stages build,tests] [--commit HASH]

Every stage is a process with a time limit of its own; one that does not fit in what is left of the minutes is skipped.
This script needs the standard library alone, the stages what `pip install '.[dev]'` needs, nvcc and compute-sanitizer.
It installs into the Python that runs it, in place of the rankernel that is there. The folder --out gets log.txt with
the output of all stages, summary.txt, tests.xml, CSV files and a figure. In a copy of the repository without
.git, --commit says what it is a copy of; the benchmarks read that as RANKERNEL_COMMIT. Exits with 1 where a stage
failed or ran out of time.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
OPS = ("block_attention", "document_scores", "candidate_logits", "listwise_loss", "lora_linear")
GRACE_SECONDS = 10.0  # in which pytest writes the results of the tests that ran


@dataclass(frozen=True)
class Stage:
    """A process.

    Attributes:
        name: of --stages. Up to the first dash, also of the CSV file that collects the rows of {out}/part.csv.
        seconds: at most.
        command: with {python}, {out}, {tests} and {architecture}.
        needs: a program, or a file in --out, without which it is skipped.
    """

    name: str
    seconds: float
    command: str
    needs: str = ""


# Where the extension does not build, the stage has failed, but the Triton kernels can still be tested.
_PIP = "{python} -m pip install --no-index --no-deps --no-build-isolation"
_BUILD = f"""sh -c '{{python}} -m pip uninstall --yes rankernel
RANKERNEL_CUDA=ON {_PIP} --config-settings=cmake.define.CMAKE_CUDA_ARCHITECTURES={{architecture}} . && exit
{_PIP} . && echo installed without the CUDA extension
exit 1'"""
# Without PyTorch's cache every tensor is an allocation of its own, and a step over its end shows. The runtime probes
# for functions that the driver may lack: such API errors are no news, and those that matter are exceptions.
_SANITIZE = "env PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --report-api-errors no --error-exitcode 9 --tool"
_EXERCISE = "{python} scripts/exercise_kernels.py"
# At once, which compiles: the sanitizer then finds the Triton kernels in their cache.
_WARM = f"sh -c 'echo {' '.join(OPS)} | xargs -n 1 -P {len(OPS)} {_EXERCISE} --op'"
_BENCH = "{python} benchmarks/run.py --device cuda --csv {out}/part.csv"
_LISTS = "mistral-10x*,mistral-50x*,mistral-100x160*,mistral-100x256*,mistral-500x*"
_MODELS = "mistral-7b-20,mistral-7b-50,mistral-7b-[25]00,qwen3-*"
_CHART = "{python} scripts/plot_latency.py {out}/latency.csv --chart {out}/latency.png"

STAGES = (  # the most important first
    Stage("build", 150, _BUILD),
    Stage("tests", 180, "{python} -P -m pytest -m gpu --junit-xml={out}/tests.xml {tests}"),
    Stage("exercise", 150, _WARM),
    Stage("memcheck", 90, f"{_SANITIZE} memcheck {_EXERCISE}", needs="compute-sanitizer"),
    Stage("racecheck", 90, f"{_SANITIZE} racecheck {_EXERCISE}", needs="compute-sanitizer"),
    Stage("attention", 210, f"{_BENCH} --op block_attention --case 'mistral-100x80-160*,500-vs-100'"),
    Stage("scores", 100, f"{_BENCH} --op document_scores --case 'logsumexp-*,mass-*'"),
    Stage("latency", 100, f"{_BENCH} --op latency --case mistral-7b-10,mistral-7b-100"),
    Stage("kernels", 90, f"{_BENCH} --op listwise_loss,candidate_logits,lora_linear"),
    Stage("kernels-training", 60, f"{_BENCH} --op lora_training --case 4x512"),
    Stage("attention-mistral", 300, f"{_BENCH} --op block_attention --case '{_LISTS}'"),
    Stage("attention-qwen3", 300, f"{_BENCH} --op block_attention --case '20-documents,qwen3-*'"),
    Stage("latency-models", 300, f"{_BENCH} --op latency --case '{_MODELS}'"),
    Stage("latency-chart", 20, _CHART, needs="latency.csv"),
    Stage("synccheck", 60, f"{_SANITIZE} synccheck {_EXERCISE}", needs="compute-sanitizer"),
    Stage("initcheck", 60, f"{_SANITIZE} initcheck {_EXERCISE}", needs="compute-sanitizer"),
)


@dataclass(frozen=True)
class Result:
    """How a stage ended: "passed", "failed", "out of time" or "skipped"; after how long, and why or its last line."""

    stage: str
    outcome: str
    seconds: float
    words: str

    def __str__(self) -> str:
        return f"{self.stage:17} {self.outcome:12} {self.seconds:5.0f} s  {self.words}".rstrip()


def main() -> int:
    """Runs the stages, prints and writes the summary; returns 1 where one failed or ran out of time."""
    begin = time.monotonic()
    names = [stage.name for stage in STAGES]
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"stages, in this order: {', '.join(names)}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--out", type=Path, required=True, help="an empty folder, made where there is none")
    parser.add_argument("--minutes", type=float, default=9.0, help="for everything (default: %(default)g)")
    parser.add_argument("--stages", default=",".join(names), help="comma-separated (default: all)")
    parser.add_argument("--commit", default="unknown", help="of this tree, where git cannot tell")
    arguments = parser.parse_args()
    selected = arguments.stages.split(",")
    if unknown := [name for name in selected if name not in names]:
        parser.error(f"--stages: expected some of {', '.join(names)}, got {', '.join(unknown)}")
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    if any(out.iterdir()):
        parser.error(f"--out: expected an empty folder, got {out}")
    os.chdir(ROOT)
    os.environ["PATH"] += ":/usr/local/cuda/bin"
    os.environ |= {"PYTHONUNBUFFERED": "1", "RANKERNEL_COMMIT": arguments.commit}
    lines = describe_machine(arguments.commit)
    print("\n".join(lines), flush=True)
    results = run_stages([stage for stage in STAGES if stage.name in selected], out, begin + 60 * arguments.minutes)
    summary = "\n".join([*lines, "", *map(str, results), ""])
    (out / "summary.txt").write_text(summary)
    print(f"\n{summary}", end="")
    return int(any(result.outcome in ("failed", "out of time") for result in results))


def run_stages(stages: Sequence[Stage], out: Path, deadline: float) -> list[Result]:
    """Runs the stages in turn until ``deadline``, of ``time.monotonic``; prints every result when it is there."""
    results = []
    for stage in stages:
        left = deadline - time.monotonic()
        if stage.seconds > left:
            words = f"takes up to {stage.seconds:.0f} s of the {max(left, 0):.0f} s left"
            result = Result(stage.name, "skipped", 0, words)
        elif stage.needs and not (shutil.which(stage.needs) or (out / stage.needs).exists()):
            result = Result(stage.name, "skipped", 0, f"there is no {stage.needs}")
        elif stage.name != "build" and (why_not := why_nothing_is_built()):
            result = Result(stage.name, "failed", 0, f"nothing is built: {why_not}")
        else:
            result = run_stage(stage, out)
        print(result, flush=True)
        results.append(result)
    return results


def run_stage(stage: Stage, out: Path) -> Result:
    """Runs one stage, kills what is left of it at its time limit, and keeps what it wrote."""
    places = {
        "python": sys.executable,
        "out": shlex.quote(str(out)),
        "tests": _tests(),
        "architecture": _architecture(),
    }
    command = stage.command.format_map(places)
    begin = time.monotonic()
    with (out / "log.txt").open("a") as log:
        print(f"\n== {stage.name}: {command}", file=log, flush=True)
        start = log.tell()
        process = subprocess.Popen(
            shlex.split(command), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        try:
            outcome = "failed" if process.wait(stage.seconds) else "passed"
        except subprocess.TimeoutExpired:
            outcome = "out of time"
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_SECONDS)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    if (part := out / "part.csv").exists():
        rows = part.read_text().splitlines(keepends=True)
        with (out / f"{stage.name.partition('-')[0]}.csv").open("a") as file:
            file.writelines(rows[1:] if file.tell() else rows)  # one header
        part.unlink()
    said = (out / "log.txt").read_bytes()[start:].decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(said) if line.strip()), "")
    return Result(stage.name, outcome, time.monotonic() - begin, last[:100])


@functools.cache  # the build is the first stage
def why_nothing_is_built() -> str:
    """Why rankernel cannot be imported; empty where it can."""
    command = [sys.executable, "-P", "-c", "import torch, rankernel"]
    done = subprocess.run(command, capture_output=True, text=True)
    return done.stderr.strip().rpartition("\n")[2] if done.returncode else ""


def describe_machine(commit: str) -> list[str]:
    """What a result depends on, and what is missing; the versions that the build needs are those of pyproject.toml."""
    packages = ("torch", "triton", "scikit-build-core", "pybind11", "pytest")
    versions = {"python": platform.python_version()} | {name: _version(name) for name in packages}
    missing = [name for name, version in versions.items() if version == "none"]
    missing += [program for program in ("nvidia-smi", "nvcc", "compute-sanitizer") if not shutil.which(program)]
    nvcc = re.search(r"release ([\d.]+)", _output("nvcc", "--version"))
    return [
        f"GPU: {_gpu('name')}, driver {_gpu('driver_version')}, nvcc {nvcc[1] if nvcc else 'none'}",
        ", ".join(f"{name} {version}" for name, version in versions.items()),
        f"commit: {_output('git', 'describe', '--always', '--dirty') or commit}",
        *([f"MISSING: {', '.join(missing)}"] if missing else []),
    ]


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _output(*command: str) -> str:
    """What a command prints, or nothing where it fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


def _gpu(field: str) -> str:
    """Of the first GPU."""
    return _output("nvidia-smi", f"--query-gpu={field}", "--format=csv,noheader").partition("\n")[0] or "unknown"


def _architecture() -> str:
    """Of the first GPU, as CMAKE_CUDA_ARCHITECTURES has it."""
    digits = _gpu("compute_cap").replace(".", "")
    return {"90": "90a-real", "unknown": "native"}.get(digits, f"{digits}-real")


def _tests() -> str:
    """The test files with a test for GPUs, and options: others may need packages that are not there."""
    files = [path for path in sorted(Path("tests").glob("test_*.py")) if "mark.gpu" in path.read_text()]
    options = ["--timeout=150"] if importlib.util.find_spec("pytest_timeout") else []
    options += ["-n 8"] if importlib.util.find_spec("xdist") else []  # the CPU, which compiles, is what they wait for
    return " ".join(map(str, [*files, *options]))


if __name__ == "__main__":
    sys.exit(main())
