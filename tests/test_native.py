"""The extension itself: dispatch, one OpenMP runtime, object files, what is installed."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import rankernel
from rankernel import _C, BlockLayout, backends, block_attention

ROOT = Path(__file__).parents[1]
ISA_SOURCES = sorted((ROOT / "csrc/cpu").glob("*_*.cpp"))
ISA_SOURCES = [p for p in ISA_SOURCES if p.stem.rsplit("_", 1)[1] in backends.ISAS]


def python(script: str, **environment: str) -> subprocess.CompletedProcess:
    # -P: the repository's folder triton_kernels/ must not be importable by accident.
    return subprocess.run(
        [sys.executable, "-P", "-c", script], env=os.environ | environment, capture_output=True, text=True
    )


def test_forcing_an_isa_takes_effect() -> None:
    for isa in backends.available_isas():
        with backends.use(isa=isa):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                chosen = backends.active_isa("block_attention", dtype)
                rows = [row for row in backends.table() if row.op == "block_attention" and row.name in backends.ISAS]
                covered = [row.name for row in rows if str(dtype).removeprefix("torch.") in row.dtypes.split(", ")]
                assert chosen == [name for name in covered if backends.ISAS.index(name) <= backends.ISAS.index(isa)][-1]


def test_isas_compute_differently() -> None:
    """Otherwise the switch might do nothing: the orders of additions differ, so some bits do."""
    layout = BlockLayout.from_lengths([(20, [60, 70], 20)])
    torch.manual_seed(0)
    query, key, value = (torch.randn(170, h, 64) for h in (4, 2, 2))
    results = {}
    for isa in ("scalar", "avx2"):
        if isa in backends.available_isas():
            with backends.use(isa=isa):
                results[isa] = block_attention(query, key, value, layout)
    assert len(results) < 2 or not torch.equal(results["scalar"], results["avx2"])


def test_environment_caps_and_forces() -> None:
    show = "import torch; from rankernel import backends; print(backends.active_isa('block_attention', torch.float32))"
    assert python(show, RANKERNEL_ISA="scalar").stdout.strip() == "scalar"
    assert python(show, RANKERNEL_BACKEND="reference").stdout.strip() == "reference"
    wrong = python(show, RANKERNEL_ISA="sse9")
    assert "RANKERNEL_ISA: expected one of scalar, avx2" in wrong.stderr
    assert "RANKERNEL_BACKEND: expected one of reference, cpu" in python(show, RANKERNEL_BACKEND="x").stderr


def test_an_isa_that_cannot_run_raises() -> None:
    missing = [isa for isa in backends.ISAS if isa not in backends.available_isas()]
    for isa in missing:
        with pytest.raises(RuntimeError, match=f"isa: {isa} cannot run here, this processor or system lacks"):
            backends.use(isa=isa).__enter__()
    with pytest.raises(ValueError, match="isa: expected one of"):
        backends.use(isa="neon").__enter__()
    with pytest.raises(ValueError, match="backend: expected one of"):
        backends.use(backend="cuda9").__enter__()


def test_table_names_every_kernel() -> None:
    rows = {(row.op, row.name) for row in backends.table()}
    for source in ISA_SOURCES:
        op, isa = source.stem.rsplit("_", 1)
        assert (op, isa) in rows, f"{source.name} is not in the table of csrc/cpu/dispatch.cpp"


def test_tests_cover_amx() -> None:
    """On software tiles where the processor has none."""
    assert {"amx", "amx_emulated"} & set(backends.available_isas()), "build with RANKERNEL_AMX_EMULATED=ON to test"


def test_detection_agrees_with_the_kernel() -> None:
    flags = set(re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.M).group(1).split())
    available = set(backends.available_isas())
    assert ("avx2" in available) == ({"avx2", "fma", "f16c"} <= flags)
    assert ("avx512" in available) == ({"avx2", "fma", "f16c", "avx512f", "avx512dq", "avx512bw", "avx512vl"} <= flags)
    assert ("amx" in available) <= ({"amx_tile", "amx_bf16"} <= flags)


def test_one_openmp_runtime() -> None:
    script = """
import rankernel, torch
layout = rankernel.BlockLayout.from_lengths([(4, [50] * 8, 5)])
torch.set_num_threads(2)
rankernel.block_attention(*(torch.randn(409, 2, 16) for _ in range(3)), layout)
import re
maps = open("/proc/self/maps").read()
print(len(set(re.findall(r"\\\\S*lib(?:gomp|iomp5|omp)[^/\\\\s]*\\\\.so\\\\S*", maps))))
"""
    run = python(script.replace("\\\\", "\\"))
    assert run.stdout.strip() == "1", run.stdout + run.stderr


def objects() -> list[Path]:
    names = {source.name + ".o" for source in ISA_SOURCES}
    found = [path for path in (ROOT / "build").rglob("*.o") if path.name in names]
    assert {path.name for path in found} == names, "the build folder lacks objects: install from the repository"
    return found


def test_isa_objects_export_nothing_that_the_linker_could_share() -> None:
    """A weak symbol compiled for AVX-512 could replace the baseline's copy of the same inline function."""
    for path in objects():
        symbols = subprocess.run(["nm", "-C", str(path)], capture_output=True, text=True, check=True).stdout
        weak = [line for line in symbols.splitlines() if re.search(r" [WVu] ", line)]
        assert not weak, f"{path.name}: {weak[:3]}"
        exported = [line for line in symbols.splitlines() if " T " in line]
        assert exported
        assert all(re.search(r"rankernel::\w+::\w+_kernels\(", line) for line in exported), exported


def test_baseline_objects_hold_no_vector_code() -> None:
    """Dispatch must run on any x86-64: no VEX or EVEX instruction in files that are compiled at baseline."""
    baseline = [path for path in (ROOT / "csrc" / "cpu").glob("*.cpp") if path not in ISA_SOURCES]
    names = {path.name + ".o" for path in baseline} | {"bindings.cpp.o"}
    found = [path for path in (ROOT / "build").rglob("*.o") if path.name in names]
    assert {path.name for path in found} == names
    for path in found:
        code = subprocess.run(["objdump", "-d", str(path)], capture_output=True, text=True, check=True).stdout
        assert not re.search(r"%[yz]mm", code), path.name


def test_nothing_top_level_but_the_package() -> None:
    files = [str(file) for file in importlib.metadata.files("rankernel") or []]
    assert not [file for file in files if file.startswith("triton_kernels")]
    script = "import importlib.util; print(importlib.util.find_spec('triton_kernels'))"
    spec = python(script).stdout.strip()
    assert str(ROOT) not in spec
    assert importlib.util.find_spec("rankernel.triton_kernels") is not None


def test_importing_is_light() -> None:
    loaded = python("import sys, rankernel; print(*sys.modules)").stdout.split()
    assert "rankernel" in loaded
    assert not {"transformers", "typer", "matplotlib", "peft"} & set(loaded)


def test_version_is_that_of_the_distribution() -> None:
    assert rankernel.__version__ == importlib.metadata.version("rankernel")


def test_bindings_release_the_gil() -> None:
    import threading

    layout = BlockLayout.from_lengths([(200, [400] * 6, 50)])
    inputs = [torch.randn(layout.num_tokens, 4, 64) for _ in range(3)]
    ticks, done = 0, threading.Event()

    def work() -> None:
        with backends.use(isa="scalar"):
            block_attention(*inputs, layout)
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    while not done.is_set():
        ticks += 1
        done.wait(0.001)
    thread.join()
    assert ticks > 2


def test_extension_documents_itself() -> None:
    assert "block_attention" in _C.__doc__


@pytest.mark.parametrize("op", ["block_attention", "candidate_logits", "document_logsumexp", "lora_linear"])
def test_backward_passes_run_what_was_forced_forward(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in another thread, as PyTorch runs them for CUDA tensors."""
    layout = BlockLayout.from_lengths([(2, [3, 4], 2)])
    x = torch.randn(11, 2, 8, requires_grad=True)
    rows = x.flatten(1)
    with backends.use(isa="scalar"):
        out = {
            "block_attention": lambda: rankernel.block_attention(x, x, x, layout),
            "candidate_logits": lambda: rankernel.candidate_logits(rows, rows, torch.arange(3), log_probs=True),
            "document_logsumexp": lambda: rankernel.document_logsumexp(x[-2:], x, layout, torch.tensor([9, 10])),
            "lora_linear": lambda: rankernel.lora_linear(rows, rows, rows[:4], rows[:, :4], 2.0),
        }[op]()
    seen = []
    level = backends.isa_level
    monkeypatch.setattr(backends, "isa_level", lambda: seen.append(backends.ISAS[level()]) or level())
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    assert x.grad is not None
    assert set(seen) == {"scalar"}
