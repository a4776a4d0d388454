"""The Triton kernels without a GPU: run by the interpreter, and compiled ahead of time for GPUs that are not here."""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pkgutil
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import rankernel.triton_kernels

triton = pytest.importorskip("triton")

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
INTERPRETED = sorted((Path(__file__).parent / "triton_interpreted").glob("test_*.py"))
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
MODULES = [
    importlib.import_module(f"rankernel.triton_kernels.{found.name}")
    for found in pkgutil.iter_modules(rankernel.triton_kernels.__path__)
    if not found.name.startswith("_")
]
CASES = [(module.__name__, number) for module in MODULES for number in range(len(module.COMPILE_CASES))]


def usage_of(module: str, number: int, target: str, **constants: object) -> tuple[str, str, int]:
    """Compiles one case; its name, registers and shared memory, and its spills: bytes of memory used as registers.

    On AMD registers that are kept in other registers are shown: vector ones in accumulators, scalar ones in lanes.
    """
    case = importlib.import_module(module).COMPILE_CASES[number]
    aligned = {(list(case.signature).index(name),): [["tt.divisibility", 16]] for name in case.aligned}
    warps = case.num_warps * 32 // TARGETS[target][2] if case.same_threads else case.num_warps
    compiled = triton.compile(
        triton.compiler.ASTSource(case.kernel, dict(case.signature), {**case.constants, **constants}, aligned),
        target=triton.backends.compiler.GPUTarget(*TARGETS[target]),
        options={"num_warps": warps, "num_stages": case.num_stages, "enable_fp_fusion": True},
    )
    name = f"{module.rpartition('.')[2]}.{case.kernel.__name__} {case.constants}"
    if TARGETS[target][0] == "hip":
        found = dict(re.findall(r"\.(\w+):\s*(\d+)", compiled.asm["amdgcn"]))
        registers = " ".join(f"{key}={found[key]}" for key in ("vgpr_count", "vgpr_spill_count", "sgpr_spill_count"))
        spilled = int(found["private_segment_fixed_size"])
    else:
        cubin = Path(os.environ["TRITON_CACHE_DIR"]) / f"{compiled.hash}.cubin"
        cubin.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([CUOBJDUMP, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True)
        found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", usage.stdout))
        registers, spilled = found["REG"], int(found["STACK"]) + int(found["LOCAL"])
    return name, f"registers {registers}, shared memory {compiled.metadata.shared}", spilled


@pytest.fixture(scope="module")
def compilers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ProcessPoolExecutor]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("triton")))
        with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
            yield pool


@pytest.mark.parametrize("target", TARGETS)
def test_kernels_compile_without_spills(target: str, compilers: ProcessPoolExecutor) -> None:
    """Prints what the kernels use: ``pytest tests/test_triton.py -k spills -rP`` shows it."""
    found = list(compilers.map(usage_of, *zip(*CASES, strict=True), [target] * len(CASES)))
    for name, usage, _ in found:
        print(f"{target} {name}: {usage}")
    assert not [(name, spilled) for name, _, spilled in found if spilled]


@pytest.mark.parametrize(("target", "block"), [("sm_90", 16384), ("gfx942", 32768)])
def test_spills_are_seen(target: str, block: int, compilers: ProcessPoolExecutor) -> None:
    module = "rankernel.triton_kernels.listwise_loss"
    cases = importlib.import_module(module).COMPILE_CASES
    number = next(i for i, case in enumerate(cases) if case.kernel.__name__ == "_softmax_kernel")
    _, _, spilled = compilers.submit(usage_of, module, number, target, BLOCK=block).result()
    assert spilled > 100


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_kernel_has_a_case(module: object) -> None:
    kernels = {name for name in vars(module) if name.endswith("_kernel")}
    assert {case.kernel.__name__ for case in module.COMPILE_CASES} == kernels
    for case in module.COMPILE_CASES:
        assert None not in case.signature.values(), f"{case.kernel.__name__}: {case.signature}"


@pytest.mark.parametrize("file", INTERPRETED, ids=lambda file: file.stem.removeprefix("test_"))
def test_in_the_interpreter(file: Path) -> None:
    """In a process of its own: triton chooses between compiler and interpreter when it is imported."""
    run = subprocess.run(
        [sys.executable, "-P", "-m", "pytest", "-q", str(file)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout + run.stderr


def test_importing_the_package_does_not_import_triton() -> None:
    subprocess.run(
        [sys.executable, "-P", "-c", "import sys, rankernel; assert 'triton' not in sys.modules"], check=True
    )
