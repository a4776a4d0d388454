"""rankernel._C_cuda: its kernels run on the host by tests/native/cuda_on_host.h, its build, and a real device."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import itertools
import math
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pybind11
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rankernel
from attention_cases import assert_close
from listwise_cases import GOLDEN, VARIANTS, Golden, Lists
from rankernel import backends
from rankernel.listwise import KINDS, REDUCTIONS, Settings, settings_of
from rankernel.reference import listwise_loss as reference

ROOT = Path(__file__).parents[1]
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NOT_COVERED = {"neural_ndcg", "groco"}
COVERED = [kind for kind in KINDS if kind not in NOT_COVERED]
SOFTMAX = {"listnet", "softmax", "infonce", "decoupled_softmax", "kl_distillation"}


def make_batch(lengths: list[int], scores: str, labels: str, masked: bool, seed: int) -> Lists:
    """Float64 scores; items before the first list, after the last, and where ``where`` is False are NaN."""
    generator = torch.Generator().manual_seed(seed)
    begin, n = 3, sum(lengths) + 5
    noise = torch.randn(n, generator=generator, dtype=torch.float64)
    s = {
        "spread": 2 * noise,
        "tied": noise.round(),
        "equal": torch.full((n,), 0.5, dtype=torch.float64),
        "huge": noise + 1e4 * torch.randint(-1, 2, (n,), generator=generator),
    }[scores]
    y = {
        "grades": torch.randint(0, 5, (n,), generator=generator).float(),
        "binary": (torch.rand(n, generator=generator) < 0.2).float(),
        "real": torch.randn(n, generator=generator),
        "equal": torch.ones(n),
    }[labels]
    offsets = begin + torch.tensor([0, *lengths]).cumsum(0)
    inside = torch.zeros(n, dtype=torch.bool)
    inside[begin : begin + sum(lengths)] = True
    where = None
    if masked:
        where = torch.rand(n, generator=generator) < 0.7
        inside &= where
    s[~inside], y[~inside] = math.nan, math.inf
    return Lists(s, y, offsets, where)


# Lists of a few items share a block of 128 threads; lists of more than 128 need several tiles.
_lengths = st.one_of(
    st.lists(st.integers(0, 12), min_size=1, max_size=12),
    st.lists(st.sampled_from([0, 1, 2, 5, 40, 127, 128, 129, 200]), min_size=1, max_size=3),
)
batches = st.builds(
    make_batch,
    _lengths,
    st.sampled_from(["spread", "spread", "tied", "equal", "huge"]),
    st.sampled_from(["grades", "grades", "binary", "real", "equal"]),
    st.booleans(),
    st.integers(0, 2**31),
)

Loss = Callable[..., tuple[torch.Tensor, torch.Tensor]]


def in_pytorch(
    batch: Lists, kind: str, reduction: int, settings: tuple[float, ...], seed: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = batch.scores.to(dtype, copy=True).requires_grad_()
    labels, offsets, where = batch.labels, batch.offsets, batch.where
    loss = reference(scores, labels, offsets, where, kind, REDUCTIONS[reduction], Settings(*settings), seed)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), grad


def numbers_of(kind: str, reduction: str, parameters: dict[str, Any]) -> tuple[int, tuple[float, ...], int]:
    """Index of the reduction, settings and seed; ``parameters`` may name a convention and another reduction."""
    rest = dict(parameters)
    convention, seed, reduction = rest.pop("convention", None), rest.pop("seed", 0), rest.pop("reduction", reduction)
    if reduction == "pair_mean":
        rest.pop("pair_reduction", None)
    return *settings_of(KINDS[kind], reduction, convention, rest), seed


def check(
    loss_of: Loss, batch: Lists, kind: str, reduction: str, parameters: dict[str, Any], magnitude: float = 0.0
) -> None:
    """Compares with the reference in float64, and with it in float32 for the bound, for scores of every dtype.

    ``magnitude`` is that of ``assert_close``.
    """
    index, settings, seed = numbers_of(kind, reduction, parameters)
    for dtype in DTYPES:
        rounded = Lists(batch.scores.to(dtype).double(), batch.labels, batch.offsets, batch.where)
        truth = in_pytorch(rounded, kind, index, settings, seed, torch.float64)
        eager = in_pytorch(rounded, kind, index, settings, seed, torch.float32)
        ours = loss_of(rounded, kind, index, settings, seed, dtype)
        # Logits are rounded quotients.
        scale = 1 / settings[Settings._fields.index("temperature")]
        logits = scale * float(rounded.scores.nan_to_num().abs().max()) if kind in SOFTMAX else 0.0
        what = f"{kind} {parameters} {reduction} {dtype}"
        assert_close(ours[0], eager[0], truth[0], f"{what} loss", logits + magnitude)
        assert_close(ours[1], eager[1], truth[1], f"{what} grad", scale * logits + magnitude)
        assert (ours[1][~torch.isfinite(rounded.scores)] == 0).all()


def reductions_of(kind: str) -> list[str]:
    return list(REDUCTIONS) if KINDS[kind].pairwise else list(REDUCTIONS[:3])


# The kernels on the host.


class Host:
    """``_C_cuda`` built for the host: addresses are those of CPU tensors."""

    GUARD = 64

    def __init__(self, path: Path) -> None:
        spec = importlib.util.spec_from_file_location("_C_cuda", path)
        assert spec is not None
        assert spec.loader is not None
        self.module: Any = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.module)
        self.descending = ctypes.c_bool.in_dll(ctypes.CDLL(str(path)), "cuda_on_host_descending")

    def __call__(
        self, batch: Lists, kind: str, reduction: int, settings: tuple[float, ...], seed: int, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        n, num_lists, number = batch.scores.numel(), batch.offsets.numel() - 1, KINDS[kind].index
        scores = batch.scores.to(dtype)
        tensors = (scores, batch.labels, batch.where, batch.offsets)
        inputs = tuple(0 if t is None else t.data_ptr() for t in tensors)
        loss_size = 1 if reduction else num_lists
        workspace = self.module.listwise_loss_workspace((n, num_lists), number, settings)
        loss, grad = self.run(
            (4 * loss_size, 4 * n),
            workspace,
            lambda loss, grad, workspace: self.module.listwise_loss(
                DTYPES[dtype], inputs, (n, num_lists), (number, reduction), settings, seed, (loss, grad), workspace, 0
            ),
        )
        return loss.view(torch.float32).reshape(() if reduction else (num_lists,)), grad.view(torch.float32)

    def run(self, outputs: tuple[int, ...], workspace: int, call: Callable[..., int]) -> list[torch.Tensor]:
        """Runs the threads of a block in both orders, in poisoned memory between guards.

        ``call`` gets the addresses of as many bytes as ``outputs`` and ``workspace`` say; the outputs' bytes return.
        """
        results = []
        for descending in (False, True):
            self.descending.value = descending
            # All bits set is NaN, and -1.
            memory = [
                torch.full((self.GUARD + size + self.GUARD,), 0xFF, dtype=torch.uint8) for size in (*outputs, workspace)
            ]
            assert call(*(m.data_ptr() + self.GUARD for m in memory)) == 0
            for m in memory:
                assert (m[: self.GUARD] == 0xFF).all()
                assert (m[-self.GUARD :] == 0xFF).all()
            results.append([m[self.GUARD : -self.GUARD].clone() for m in memory[:-1]])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one, other), "depends on the order of the threads"
        return results[0]


@functools.cache
def build_on_host(base: Path) -> Path:
    folder = base / "cuda_on_host"
    folder.mkdir()
    path = folder / f"_C_cuda{sysconfig.get_config_var('EXT_SUFFIX')}"
    compiler = [*os.environ.get("CXX", "c++").split(), "-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden"]
    include = [f"-I{d}" for d in (ROOT / "csrc", pybind11.get_include(), sysconfig.get_path("include"))]
    # x86 would load from any address.
    trap = ["-fsanitize=alignment", "-fsanitize-undefined-trap-on-error"]
    on_host = ["-Wall", "-Wextra", "-Werror", "-DRANKERNEL_CUDA_ON_HOST", *trap,
               "-include", str(ROOT / "tests/native/cuda_on_host.h")]  # fmt: skip
    for suffix, options in {".cu": on_host, ".cpp": []}.items():
        for source in (ROOT / "csrc/cuda").glob(f"*{suffix}"):
            command = [*compiler, *options, *include, "-x", "c++", "-c", str(source)]
            subprocess.run([*command, "-o", str(folder / f"{source.name}.o")], check=True)
    objects = [str(p) for p in folder.glob("*.o")]
    subprocess.run([*compiler, "-shared", *objects, "-o", str(path)], check=True)
    return path


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build_on_host(tmp_path_factory.getbasetemp()))


def test_covered_kinds(host: Host) -> None:
    assert host.module.covered_kinds() == [KINDS[kind].index for kind in COVERED]


@pytest.mark.parametrize("golden", [g for g in GOLDEN.values() if g.kind in COVERED])
def test_golden_values(host: Host, golden: Golden) -> None:
    scores, labels = torch.tensor(golden.scores).double(), torch.tensor(golden.labels).float()
    batch = Lists(scores, labels, torch.tensor([0, len(scores)]), None)
    loss, grad = host(batch, golden.kind, *numbers_of(golden.kind, "sum", golden.parameters), torch.float32)
    assert loss.item() == pytest.approx(golden.loss, rel=1e-6, abs=golden.digits)
    if golden.grad is not None:
        assert grad.tolist() == pytest.approx(golden.grad, rel=1e-6, abs=golden.digits)


@pytest.mark.parametrize("kind", COVERED)
@given(data=st.data(), batch=batches)
def test_every_kind_and_reduction(host: Host, kind: str, data: st.DataObject, batch: Lists) -> None:
    reduction, parameters = st.sampled_from(reductions_of(kind)), st.sampled_from(VARIANTS[kind])
    check(host, batch, kind, data.draw(reduction), data.draw(parameters))


@pytest.mark.parametrize("kind", COVERED)
def test_batch_is_its_lists_one_by_one(host: Host, kind: str) -> None:
    batch = make_batch([3, 0, 1, 17, 130, 2, 2, 40, 128, 9], "tied", "grades", True, 7)
    for parameters in VARIANTS[kind]:
        _, settings, seed = numbers_of(kind, "none", parameters)
        loss, grad = host(batch, kind, 0, settings, seed, torch.float32)
        for number in range(len(loss)):
            alone, slopes = host(batch.alone(number), kind, 0, settings, seed + number, torch.float32)
            begin, end = batch.offsets[number : number + 2].tolist()
            assert torch.equal(loss[number], alone[0])
            assert torch.equal(grad[begin:end], slopes)


@pytest.mark.parametrize("kind", COVERED)
def test_mean_leaves_out_lists_that_rank_nothing(host: Host, kind: str) -> None:
    # All equal, one item, no positive, only positives, a sum of 0, and one that every kind ranks.
    labels = [[2, 2, 2], [1], [-1, -2, -3], [1, 2, 3], [-1, 0, 1], [3, 0, 1, 0, 0, 1, 0]]
    offsets = torch.tensor([0, *(len(y) for y in labels)]).cumsum(0)
    scores = torch.linspace(-2, 2, int(offsets[-1]), dtype=torch.float64)
    batch = Lists(scores, torch.tensor([y for ys in labels for y in ys]).float(), offsets, None)
    for parameters in VARIANTS[kind]:
        check(host, batch, kind, "mean", parameters)


@pytest.mark.parametrize("kind", COVERED)
def test_no_items_or_no_lists(host: Host, kind: str) -> None:
    for batch in (make_batch([], "spread", "grades", False, 0), make_batch([0, 0], "spread", "grades", True, 0)):
        for items in (slice(None), slice(0)):
            cut = Lists(
                batch.scores[items], batch.labels[items], batch.offsets - 3 * (items.stop == 0),
                None if batch.where is None else batch.where[items],
            )  # fmt: skip
            for reduction in reductions_of(kind):
                index, settings = settings_of(KINDS[kind], reduction, None, {})
                loss, grad = host(cut, kind, index, settings, 0, torch.float32)
                assert (loss == 0).all()
                assert (grad == 0).all()


@pytest.mark.parametrize("offsets", [[0, 9, 4, 12], [-(2**40), 3, 2**40], [12, 0], [7, 7, -(2**50), 3, 12, 2**62]])
@pytest.mark.parametrize("kind", COVERED)
def test_bad_offsets_touch_nothing_outside(host: Host, kind: str, offsets: list[int]) -> None:
    n = 12
    labels = torch.arange(n).float() % 3
    batch = Lists(torch.linspace(-1, 1, n).double(), labels, torch.tensor(offsets), None)
    _, settings = settings_of(KINDS[kind], "sum", None, {})
    loss, grad = host(batch, kind, 1, settings, 0, torch.float32)
    assert torch.isfinite(loss).all()
    assert torch.isfinite(grad).all()


def test_wrong_pair_keeps_its_gradient(host: Host) -> None:
    batch = Lists(torch.tensor([-1e4, 1e4]).double(), torch.tensor([1.0, 0.0]), torch.tensor([0, 2]), None)
    _, settings = settings_of(KINDS["ranknet"], "sum", None, {})
    loss, grad = host(batch, "ranknet", 1, settings, 0, torch.float32)
    assert loss.item() == 2e4
    assert grad.tolist() == [-1, 1]


# The build for devices.

ARCHITECTURES = {"sm_80", "sm_90a", "sm_100"}


def test_builds_for_every_architecture_without_spills(tmp_path: Path) -> None:
    cmake = shutil.which("cmake", path=f"{sysconfig.get_path('scripts')}{os.pathsep}{os.environ['PATH']}")
    nvcc = shutil.which("nvcc")
    if nvcc is None or cmake is None:
        pytest.skip("no nvcc" if nvcc is None else "no cmake")
    subprocess.run(
        [cmake, "-S", ROOT, "-B", tmp_path, "-DRANKERNEL_CUDA=ON", f"-DCMAKE_CUDA_COMPILER={nvcc}",
         "-DCMAKE_CUDA_FLAGS=-Xptxas=-v -Werror=all-warnings -Xcompiler=-Werror",
         f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DPython_EXECUTABLE={sys.executable}"],
        check=True, capture_output=True,
    )  # fmt: skip
    build = subprocess.run(
        [cmake, "--build", tmp_path, "--target", "_C_cuda"], check=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    ).stdout  # fmt: skip
    assert set(re.findall(r"for '(sm_\w+)'", build)) == ARCHITECTURES
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", build)
    assert spills
    assert set(spills) == {("0", "0")}

    # No driver, no CUDA library beside it.
    (extension,) = tmp_path.glob("_C_cuda*.so")
    script = "import _C_cuda, pathlib; print(_C_cuda.covered_kinds(), pathlib.Path('/proc/self/maps').read_text())"
    environment = os.environ | {"PYTHONPATH": str(extension.parent)}
    run = subprocess.run([sys.executable, "-c", script], env=environment, check=True, capture_output=True, text=True)
    assert run.stdout.startswith(str([KINDS[kind].index for kind in COVERED]))
    assert "libcudart" not in run.stdout
    if not torch.cuda.is_available():
        call = "_C_cuda.listwise_loss(0, (0, 0, 0, 0), (0, 0), (0, 1), [1] * 10, 0, (0, 0), 0, 0)"
        subprocess.run([sys.executable, "-c", f"import _C_cuda; assert {call} != 0"], env=environment, check=True)


# A device.

LENGTHS = [3, 0, 1, 17, 130, 2, 2, 40, 128, 9, 300]
GPU_BACKENDS = ("cuda", "triton")


def on_device(
    batch: Lists, kind: str, reduction: str, dtype: torch.dtype, parameters: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = batch.scores.to("cuda", dtype).requires_grad_()
    labels, offsets = batch.labels.cuda(), batch.offsets.cuda()
    where = None if batch.where is None else batch.where.cuda()
    if reduction == "pair_mean":
        parameters = {k: v for k, v in parameters.items() if k != "pair_reduction"}
    loss = rankernel.listwise_loss(scores, labels, offsets, kind, where=where, reduction=reduction, **parameters)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), grad


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("kind", COVERED)
def test_device_agrees_with_the_reference(backend: str, kind: str) -> None:
    magnitude = 0.0
    if backend == "triton":  # its exponentials are 2 ulp off; logarithms of draws are as in the interpreter's test
        magnitude = 30.0 if kind == "pg_rank" else 2.0
    for number, scores in enumerate(["spread", "tied", "equal", "huge"]):
        batch = make_batch(LENGTHS, scores, ["grades", "binary", "real", "grades"][number], number % 2 == 1, number)
        for reduction, parameters in itertools.product(reductions_of(kind), VARIANTS[kind]):

            def loss_of(
                rounded: Lists, kind: str, index: int, settings: Any, seed: int, dtype: torch.dtype,
                parameters: dict[str, Any] = parameters,
            ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
                with backends.use(backend=backend):
                    loss, grad = on_device(rounded, kind, REDUCTIONS[index], dtype, parameters)
                return loss.cpu(), grad.cpu()

            check(loss_of, batch, kind, reduction, parameters, magnitude)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("kind", COVERED)
def test_device_batch_is_its_lists_one_by_one(backend: str, kind: str) -> None:
    batch, seeded = make_batch(LENGTHS, "tied", "grades", True, 7), KINDS[kind].seeded
    with backends.use(backend=backend):
        loss, grad = on_device(batch, kind, "none", torch.float32, {})
        for number in range(len(loss)):
            parameters = {"seed": number} if seeded else {}
            alone, slopes = on_device(batch.alone(number), kind, "none", torch.float32, parameters)
            begin, end = batch.offsets[number : number + 2].tolist()
            assert torch.equal(loss[number], alone[0])
            assert torch.equal(grad[begin:end], slopes)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
@pytest.mark.parametrize("kind", ["ranknet", "lambdarank", "softmax", "listmle", "pg_rank", "approx_ndcg", "soft_topk"])
def test_graph_replay_sees_new_scores_and_lengths(backend: str, kind: str) -> None:
    first, second = (make_batch(lengths, "spread", "grades", False, 3) for lengths in ([20, 100, 7], [100, 7, 20]))
    scores, labels, offsets = first.scores.float().cuda(), first.labels.cuda(), first.offsets.cuda()

    def call() -> torch.Tensor:
        return rankernel.listwise_loss(scores, labels, offsets, kind, reduction="none")

    with backends.use(backend=backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            call()  # compiles and loads before capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        for tensor, new in ((scores, second.scores.float()), (labels, second.labels), (offsets, second.offsets)):
            tensor.copy_(new)
        graph.replay()
        assert torch.equal(captured, call())


@pytest.mark.gpu
@pytest.mark.parametrize("backend", GPU_BACKENDS)
def test_runs_on_the_current_stream(backend: str) -> None:
    batch = make_batch([2000] * 8, "spread", "grades", False, 1)
    labels, offsets = batch.labels.cuda(), batch.offsets.cuda()
    source = batch.scores.float().cuda()
    with backends.use(backend=backend):
        expected = rankernel.listwise_loss(source, labels, offsets, "ranknet", reduction="none")
        side, scores = torch.cuda.Stream(), torch.zeros_like(source)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # the scores arrive late, on this stream
            scores.copy_(source)
            ours = rankernel.listwise_loss(scores, labels, offsets, "ranknet", reduction="none")
        side.synchronize()
    assert torch.equal(ours, expected)
