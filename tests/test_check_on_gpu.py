"""scripts/check_on_gpu.py and scripts/exercise_kernels.py, as far as they can be tested without a GPU."""

from __future__ import annotations

import argparse
import fnmatch
import importlib
import os
import re
import shlex
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import pytest

from rankernel import BlockLayout, backends

ROOT = Path(__file__).parents[1]


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("check_on_gpu")
    monkeypatch.setattr(module, "why_nothing_is_built", lambda: "")
    monkeypatch.setattr(module, "GRACE_SECONDS", 0.5)
    monkeypatch.setattr(os, "environ", os.environ.copy())
    monkeypatch.chdir(ROOT)
    return module


def run(check: ModuleType, monkeypatch: pytest.MonkeyPatch, stages: Sequence, out: Path, *arguments: str) -> int:
    monkeypatch.setattr(check, "STAGES", tuple(stages))
    monkeypatch.setattr(sys, "argv", ["check_on_gpu.py", "--out", str(out), *arguments])
    return check.main()


def in_python(check: ModuleType, name: str, seconds: float, script: str, **options: str) -> object:
    return check.Stage(name, seconds, f"{{python}} -S -c {shlex.quote(script)}", **options)


def test_stages_and_summary(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "open('{out}/part.csv', 'w').write('a,b\\n1,{row}\\n')"
    stages = (
        in_python(check, "rows", 9, rows.replace("{row}", "2") + "; print('two'); print('lines')"),
        in_python(check, "broken", 9, "import sys; sys.exit('no good')"),
        in_python(check, "rows-slow", 1, rows.replace("{row}", "3") + "; import time; time.sleep(60)"),
        in_python(check, "long", 90, "print('not reached')"),
        check.Stage("absent", 1, "no-such-program", needs="no-such-program"),
        in_python(check, "reader", 9, "print(open('{out}/rows.csv').read())", needs="rows.csv"),
    )
    assert run(check, monkeypatch, stages, tmp_path, "--minutes", "1", "--commit", "abc") == 1
    summary = (tmp_path / "summary.txt").read_text()
    outcomes = {line.split()[0]: line for line in summary.splitlines() if line.split()[:1]}
    assert "passed " in outcomes["rows"]
    assert outcomes["rows"].endswith(" lines")
    assert "failed " in outcomes["broken"]
    assert outcomes["broken"].endswith(" no good")
    assert "out of time " in outcomes["rows-slow"]
    assert "skipped " in outcomes["long"]
    assert "takes up to 90 s of the" in outcomes["long"]
    assert outcomes["absent"].endswith("there is no no-such-program")
    assert "passed " in outcomes["reader"]
    assert (tmp_path / "rows.csv").read_text() == "a,b\n1,2\n1,3\n"
    assert {path.name for path in tmp_path.iterdir()} == {"log.txt", "summary.txt", "rows.csv"}
    log = (tmp_path / "log.txt").read_text()
    assert "two\nlines\n" in log
    assert "not reached" not in log.replace(str(stages[3].command), "")
    for text in ("GPU: ", "driver ", "torch ", "triton ", "commit: "):
        assert text in summary
    printed = capsys.readouterr().out
    assert printed.endswith(summary)
    assert printed.index("rows ") < printed.index("broken ") < printed.index("rows-slow ")


def test_skipped_stages_are_no_failure(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    stages = in_python(check, "short", 5, ""), in_python(check, "long", 90, "")
    assert run(check, monkeypatch, stages, tmp_path, "--minutes", "0.5") == 0
    with pytest.raises(SystemExit):  # the folder is not empty
        run(check, monkeypatch, stages, tmp_path)


def test_a_slow_stage_is_killed_with_its_children(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = "import os, time; child = os.fork(); child and print('child', child, flush=True); time.sleep(60)"
    assert run(check, monkeypatch, [in_python(check, "fork", 1, script)], tmp_path) == 1
    (child,) = re.findall(r"^child (\d+)$", (tmp_path / "log.txt").read_text(), flags=re.MULTILINE)
    deadline = time.monotonic() + 5
    while is_running(int(child)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not is_running(int(child))


def is_running(process: int) -> bool:
    try:
        return Path(f"/proc/{process}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_nothing_runs_where_nothing_is_built(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "why_nothing_is_built", lambda: "a reason")
    stages = in_python(check, "build", 5, "print('built')"), in_python(check, "bench", 5, "print('measured')")
    assert run(check, monkeypatch, stages, tmp_path) == 1
    summary = (tmp_path / "summary.txt").read_text()
    assert summary.splitlines()[-2].split()[:2] == ["build", "passed"]
    assert summary.splitlines()[-1].endswith("nothing is built: a reason")


@pytest.mark.parametrize(("fails", "outcome"), [("never", "passed"), ("RANKERNEL_CUDA=ON", "failed")])
def test_build(check: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fails: str, outcome: str) -> None:
    """Where the CUDA extension does not build, the stage fails, and the package is installed without it."""
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\necho "RANKERNEL_CUDA=$RANKERNEL_CUDA $*"\ntest "RANKERNEL_CUDA=$RANKERNEL_CUDA" != {fails}\n'
    )
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(check, "_architecture", lambda: "90a-real")
    result = check.run_stage(check.STAGES[0], tmp_path)
    assert result.outcome == outcome
    calls = [line for line in (tmp_path / "log.txt").read_text().splitlines() if line.startswith("RANKERNEL_CUDA=")]
    calls = [call for call in calls if "{" not in call and "&&" not in call]
    assert "uninstall --yes rankernel" in calls[0]
    assert calls[1].startswith("RANKERNEL_CUDA=ON -m pip install")
    assert "=cmake.define.CMAKE_CUDA_ARCHITECTURES=90a-real ." in calls[1]
    assert len(calls) == (3 if outcome == "failed" else 2)
    assert (result.words == "installed without the CUDA extension") == (outcome == "failed")


def test_help_names_the_stages(
    check: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["check_on_gpu.py", "--help"])
    with pytest.raises(SystemExit):
        check.main()
    printed = capsys.readouterr().out
    assert ", ".join(stage.name for stage in check.STAGES) in printed
    assert "RANKERNEL_COMMIT" in printed


def test_commands_name_what_is_there(check: ModuleType) -> None:
    places = {"python": "python", "out": "/out", "tests": check._tests(), "architecture": "90a-real"}
    words = [shlex.split(stage.command.format_map(places)) for stage in check.STAGES]
    files = [word for command in words for word in command if word.endswith(".py")]
    assert all((ROOT / file).is_file() for file in files)
    assert {"tests/test_cuda.py", "tests/test_block_attention.py", "benchmarks/run.py"} <= set(files)
    outputs = {f"{stage.name.partition('-')[0]}.csv" for stage in check.STAGES if "part.csv" in stage.command}
    outputs |= {Path(word).name for command in words for word in command if "/out/" in word}
    outputs |= {"log.txt", "summary.txt"}
    assert len(outputs - {"part.csv"}) <= 8  # that are copied back from the machine; part.csv is gone by then
    assert {"tests.xml", "latency.csv", "latency.png"} < outputs


def test_benchmark_stages_select_cases(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("run")
    parser = argparse.ArgumentParser()
    parser.add_argument("--op", type=bench._names)
    parser.add_argument("--case", type=bench._names)
    selected = []
    for stage in check.STAGES:
        if "benchmarks/run.py" in stage.command:
            arguments, _ = parser.parse_known_args(shlex.split(stage.command))
            given = argparse.Namespace(op=arguments.op, case=arguments.case, device="cuda", all=False, list=False)
            cases = bench._cases(given)
            selected += [(op, case.name) for op, of_op in cases.items() for case in of_op]
            assert all(cases.values()), f"{stage.name}: {cases}"
            for pattern in arguments.case or ():
                assert any(fnmatch.filter((case.name for case in of_op), pattern) for of_op in cases.values()), pattern
    assert len(set(selected)) == len(selected)
    assert {("block_attention", "mistral-100x80-160-backward"), ("latency", "mistral-7b-500")} < set(selected)


def test_benchmarks_know_driver_and_commit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    bench = importlib.import_module("run")
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    monkeypatch.setenv("RANKERNEL_COMMIT", "abc")
    assert bench._git_hash() == "abc"
    assert bench._driver_version() == "unknown"
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 580.1\necho 580.1\n")
    program.chmod(0o755)
    assert bench._driver_version() == "580.1"


# What compute-sanitizer runs.


@pytest.fixture
def exercise(one_thread: None, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    module = importlib.import_module("exercise_kernels")
    monkeypatch.setattr(module, "LENGTHS", [*module.LENGTHS[:3], (3, [20], 2)])  # the reference is slow on long ones
    monkeypatch.setattr(sys, "argv", ["exercise_kernels.py", "--device", "cpu"])
    return module


def test_exercise(exercise: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert set(exercise.OPS) == set(backends.GPU_KERNELS) == set(importlib.import_module("check_on_gpu").OPS)
    assert exercise.main() == 0
    printed = capsys.readouterr().out
    assert "not run" not in printed
    for op in backends.GPU_KERNELS:
        assert f"{op} cpu float32" in printed
        assert f"{op} cpu bfloat16" in printed


def test_exercise_notices_a_wrong_result(
    exercise: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--op", "candidate_logits"])
    right = exercise.rankernel.candidate_logits

    def wrong(hidden, *arguments, **options):
        return right(1.01 * hidden if hidden.dtype == exercise.torch.float32 else hidden, *arguments, **options)

    monkeypatch.setattr(exercise.rankernel, "candidate_logits", wrong)
    assert exercise.main() == 1
    assert "NOT all" in capsys.readouterr().out


def test_relative_error_of_infinities(exercise: ModuleType) -> None:
    tensor, infinity = exercise.torch.tensor, float("inf")
    truth = tensor([1.0, -infinity])
    assert exercise.relative_error(truth, truth) == 0
    for other in ([1.0, 1.0], [1.0, infinity], [float("nan"), -infinity], [-infinity, -infinity]):
        assert exercise.relative_error(tensor(other), truth) == infinity


def test_exercise_attends_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longest list has a far range of more than one part, forward (its tail) and backward (its prefix)."""
    kernels = pytest.importorskip("triton") and importlib.import_module("rankernel.triton_kernels.block_attention")
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    (segments,) = BlockLayout.from_lengths(importlib.import_module("exercise_kernels").LENGTHS[-1:]).segments()
    begin, end, _ = segments[-1]
    assert begin > kernels.CHUNK
    assert end // (kernels.SHARE * max(end - begin, segments[0][1])) > 1
