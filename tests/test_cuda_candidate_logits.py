"""The CUDA C++ kernels of candidate_logits on the host, by tests/native/cuda_on_host.h; and both GPU backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import rankernel
from attention_cases import assert_close
from rankernel import backends, reference
from test_cuda import DTYPES, GPU_BACKENDS, Host, build_on_host


@dataclass
class Problem:
    """Float64 inputs; in memory, ``offset`` and ``gap`` elements of NaN lie before and after every row."""

    hidden: torch.Tensor
    weight: torch.Tensor
    candidates: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    offset: int = 0
    gap: int = 0

    def inputs(
        self, dtype: torch.dtype, device: str = "cpu"
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        # A copy to another dtype or device would close the gaps.
        hidden, weight = (
            F.pad(x, (self.offset, self.gap), value=math.nan).to(device, dtype)[:, self.offset :][:, : x.shape[1]]
            for x in (self.hidden, self.weight)
        )
        return hidden, weight, self.candidates.to(device), None if self.bias is None else self.bias.to(device, dtype)

    def expected(self, dtype: torch.dtype, log_probs: bool, wide: torch.dtype) -> torch.Tensor:
        hidden, weight, candidates, bias = self.inputs(dtype)
        return reference.candidate_logits(
            hidden.to(wide), weight.to(wide), candidates, bias=None if bias is None else bias.to(wide),
            scale=self.scale, softcap=self.softcap, log_probs=log_probs,
        )  # fmt: skip

    def row(self, number: int) -> Problem:
        """One row alone."""
        candidates = self.candidates if self.candidates.dim() == 1 else self.candidates[number : number + 1]
        return replace(self, hidden=self.hidden[number : number + 1], candidates=candidates)


def make_problem(
    num_rows: int, vocabulary: int, hidden_size: int, num_candidates: int, shared: bool = True, bias: bool = False,
    scale: float = 1.0, softcap: float | None = None, layout: tuple[int, int] = (0, 0), spread: float = 1.0,
    seed: int = 0,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Problem(
        normal(num_rows, hidden_size),
        spread * normal(vocabulary, hidden_size) / max(hidden_size, 1) ** 0.5,
        torch.randint(vocabulary, (num_candidates,) if shared else (num_rows, num_candidates), generator=generator),
        spread * normal(vocabulary) if bias else None,
        scale,
        softcap,
        *layout,
    )


# Up to 8 rows share a warp, 4 entries of the vocabulary too, 64 a block; a step of the dot product is 32 vectors.
problems = st.builds(
    make_problem,
    num_rows=st.sampled_from([1, 2, 3, 4, 5, 7, 8, 9, 17]),
    vocabulary=st.one_of(st.integers(1, 20), st.sampled_from([63, 64, 65, 130, 193])),
    hidden_size=st.one_of(st.integers(1, 40), st.sampled_from([8, 16, 64, 128, 136, 256, 264, 300])),
    num_candidates=st.sampled_from([1, 2, 3, 4, 5, 20]),
    shared=st.booleans(),
    bias=st.booleans(),
    scale=st.sampled_from([1.0, 0.125, -3.0]),
    softcap=st.sampled_from([None, None, 2.0]),
    layout=st.sampled_from([(0, 0), (0, 0), (8, 8), (0, 1), (1, 7)]),
    spread=st.sampled_from([1.0, 1.0, 100.0]),
    seed=st.integers(0, 2**31),
)


def on_host(host: Host, p: Problem, dtype: torch.dtype, log_probs: bool) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, weight, candidates, bias = p.inputs(dtype)
    num_rows, vocabulary, num_candidates = len(hidden), len(weight), candidates.shape[-1]
    out, lse = host.run(
        (4 * num_rows * num_candidates, 4 * num_rows if log_probs else 0),
        host.module.candidate_logits_workspace(num_rows, vocabulary, log_probs),
        lambda out, lse, workspace: host.module.candidate_logits(
            DTYPES[dtype],
            (hidden.data_ptr(), hidden.stride(0)),
            (weight.data_ptr(), weight.stride(0)),
            (candidates.data_ptr(), 0 if candidates.dim() == 1 else num_candidates),
            0 if bias is None else bias.data_ptr(),
            (num_rows, vocabulary, hidden.shape[1], num_candidates),
            p.scale,
            p.softcap or 0.0,
            out,
            lse if log_probs else 0,
            workspace,
            0,
        ),
    )
    return out.view(torch.float32).reshape(num_rows, num_candidates), lse.view(torch.float32)


def check(host: Host, p: Problem, dtype: torch.dtype, log_probs: bool) -> None:
    out, lse = on_host(host, p, dtype, log_probs)
    every = replace(p, candidates=torch.arange(len(p.weight)))
    logits = [every.expected(dtype, False, wide) for wide in (torch.float32, torch.float64)]
    # Rounding of the logits does not show in log-probabilities near 0.
    finite = logits[1][torch.isfinite(logits[1])]
    magnitude = float(finite.abs().max()) if log_probs and finite.numel() else 0.0
    eager, truth = (p.expected(dtype, log_probs, wide) for wide in (torch.float32, torch.float64))
    what = f"{dtype} {list(p.hidden.shape)} {list(p.weight.shape)}"
    assert_close(out, eager, truth, what, magnitude)
    if log_probs:
        assert_close(lse, *(z.logsumexp(dim=-1) for z in logits), f"log-sum-exp {what}", magnitude)


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Host:
    return Host(build_on_host(tmp_path_factory.getbasetemp()))


@pytest.mark.parametrize("log_probs", [False, True])
@given(p=problems)
def test_every_dtype(host: Host, log_probs: bool, p: Problem) -> None:
    for dtype in DTYPES:
        check(host, p, dtype, log_probs)


# All aligned; an odd size, base, and stride.
@pytest.mark.parametrize(("hidden_size", "layout"), [(64, (8, 8)), (61, (0, 3)), (64, (1, 7)), (64, (0, 1))])
def test_alignment(host: Host, hidden_size: int, layout: tuple[int, int]) -> None:
    for dtype in DTYPES:
        check(host, make_problem(3, 70, hidden_size, 2, layout=layout), dtype, True)


@pytest.mark.parametrize("layout", [(0, 0), (1, 0)])
def test_large_hidden_size(host: Host, layout: tuple[int, int]) -> None:
    check(host, make_problem(3, 9, 16384, 2, layout=layout), torch.bfloat16, True)


@pytest.mark.parametrize("layout", [(0, 0), (1, 0)])
@pytest.mark.parametrize("shared", [False, True])
def test_batch_is_its_rows_one_by_one(host: Host, shared: bool, layout: tuple[int, int]) -> None:
    p = make_problem(13, 150, 264, 5, shared, bias=True, layout=layout)
    for dtype in DTYPES:
        out, lse = on_host(host, p, dtype, True)
        logits, _ = on_host(host, p, dtype, False)
        for number in range(13):
            alone = p.row(number)
            assert torch.equal(logits[number], on_host(host, alone, dtype, False)[0][0])
            for batched, one in zip((out, lse), on_host(host, alone, dtype, True), strict=True):
                assert torch.equal(batched[number], one[0])


@pytest.mark.parametrize("log_probs", [False, True])
def test_candidates_out_of_range_are_nan(host: Host, log_probs: bool) -> None:
    ids = torch.tensor([3, -1, 0, 70, 69, 2**31, -(2**40), 2**62])
    for candidates in (ids, torch.stack([ids, ids.flip(0), ids.roll(3)])):
        p = replace(make_problem(3, 70, 64, 1), candidates=candidates)
        inside = ((candidates >= 0) & (candidates < 70)).expand(3, len(ids))
        out, _ = on_host(host, p, torch.bfloat16, log_probs)
        assert torch.equal(out.isnan(), ~inside)
        expected = replace(p, candidates=candidates * (candidates >= 0) * (candidates < 70))
        good, _ = on_host(host, expected, torch.bfloat16, log_probs)
        assert torch.equal(out[inside], good[inside])


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("bad", [0, 4, 9])
def test_nan_stays_in_its_row(host: Host, bad: int, value: float) -> None:
    p = make_problem(10, 70, 64, 3)
    expected = on_host(host, p, torch.float32, True)
    p.hidden[bad, 5] = value
    others = torch.arange(10) != bad
    for ours, clean in zip(on_host(host, p, torch.float32, True), expected, strict=True):
        assert not torch.isfinite(ours[bad]).any()
        assert torch.equal(ours[others], clean[others])


def test_entries_masked_by_their_bias(host: Host) -> None:
    p = make_problem(3, 200, 64, 200)
    p.candidates = torch.arange(200)
    p.bias = torch.zeros(200).double()
    p.bias[:70] = p.bias[100:] = -math.inf  # the first block knows no finite logit
    for dtype in DTYPES:
        check(host, p, dtype, True)


def test_huge_logits(host: Host) -> None:
    p = make_problem(2, 150, 64, 5, bias=True)
    assert p.bias is not None
    p.bias += 1e4
    check(host, p, torch.float32, True)


@pytest.mark.parametrize("empty", ["rows", "hidden size", "candidates", "vocabulary"])
def test_empty(host: Host, empty: str) -> None:
    sizes = {"rows": 3, "vocabulary": 70, "hidden size": 64, "candidates": 2} | {empty: 0}
    if empty == "vocabulary":
        p = make_problem(*(sizes | {"vocabulary": 1}).values())
        p.weight = p.weight[:0]
        out, lse = on_host(host, p, torch.float32, True)
        assert out.isnan().all()
        assert (lse == -math.inf).all()
        return
    for log_probs in (False, True):
        check(host, make_problem(*sizes.values(), bias=True), torch.bfloat16, log_probs)


# A device.

DEVICE_PROBLEMS = {
    "one row": make_problem(1, 5003, 1024, 2),
    "a few rows": make_problem(5, 1000, 264, 20, shared=False, bias=True),
    "unaligned": make_problem(9, 513, 100, 7, scale=0.5, layout=(1, 2)),
    "many rows": make_problem(70, 3000, 256, 40, bias=True, softcap=2.0),
}
every_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)


def in_pytorch(
    hidden: torch.Tensor, weight: torch.Tensor, candidates: torch.Tensor, *, bias: torch.Tensor | None, scale: float,
    softcap: float | None, log_probs: bool,
) -> torch.Tensor:  # fmt: skip
    """What models do, in the dtype of the weights up to the softmax."""
    logits = F.linear(hidden, weight, bias) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if log_probs:
        logits = logits.log_softmax(dim=-1)
    return logits.gather(1, candidates.expand(len(hidden), candidates.shape[-1]))


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize("log_probs", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", DEVICE_PROBLEMS)
def test_device_forward_and_gradients(backend: str, name: str, dtype: torch.dtype, log_probs: bool) -> None:
    p = DEVICE_PROBLEMS[name]
    hidden, weight, candidates, bias = p.inputs(dtype, "cuda")

    def run(function: Callable[..., torch.Tensor], dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [x.to(dtype).detach().requires_grad_() for x in (hidden, weight, bias) if x is not None]
        options = {"scale": p.scale, "softcap": p.softcap, "log_probs": log_probs}
        out = function(*leaves[:2], candidates, bias=None if bias is None else leaves[2], **options)
        upstream = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=out.dtype).reshape(out.shape)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream)]

    truth = run(reference.candidate_logits, torch.float64)
    eager = run(in_pytorch, dtype)
    # The result is float32, and held to the error of float32.
    eager[0] = run(reference.candidate_logits, torch.float32)[0]
    with backends.use(backend=backend):
        ours = run(rankernel.candidate_logits, dtype)
        again = run(rankernel.candidate_logits, dtype)
    assert torch.equal(ours[0], again[0])
    for number, what in enumerate(["forward", "hidden", "weight", "bias"][: len(ours)]):
        assert_close(ours[number], eager[number], truth[number], f"{backend} {name} {what}")


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize("log_probs", [False, True])
def test_device_candidates_out_of_range_are_nan(backend: str, log_probs: bool) -> None:
    p = make_problem(3, 70, 64, 1)
    ids = torch.tensor([3, -1, 0, 70, 69, 2**62])
    with backends.use(backend=backend):
        for candidates in (ids, ids.expand(3, -1)):
            arguments = (p.hidden.float().cuda(), p.weight.float().cuda(), candidates.cuda())
            out = rankernel.candidate_logits(*arguments, log_probs=log_probs)
            assert torch.equal(out.isnan().cpu(), ((ids < 0) | (ids >= 70)).expand(3, -1))


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize("log_probs", [False, True])
def test_graph_replay_sees_new_inputs(backend: str, log_probs: bool) -> None:
    first, second = (make_problem(4, 1000, 256, 3, seed=seed) for seed in (0, 1))
    hidden, weight, candidates = first.hidden.bfloat16().cuda(), first.weight.bfloat16().cuda(), first.candidates.cuda()

    def call() -> torch.Tensor:
        return rankernel.candidate_logits(hidden, weight, candidates, log_probs=log_probs)

    with backends.use(backend=backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            before = call()  # compiles and loads before capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        hidden.copy_(second.hidden)
        candidates.copy_(second.candidates)
        graph.replay()
        assert torch.equal(captured, call())
        assert not torch.equal(captured, before)


@pytest.mark.gpu
@every_backend
def test_runs_on_the_current_stream(backend: str) -> None:
    p = make_problem(8, 5000, 1024, 2)
    source, weight, candidates = p.hidden.bfloat16().cuda(), p.weight.bfloat16().cuda(), p.candidates.cuda()
    with backends.use(backend=backend):
        expected = rankernel.candidate_logits(source, weight, candidates, log_probs=True)
        side, hidden = torch.cuda.Stream(), torch.zeros_like(source)
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            torch.cuda._sleep(50_000_000)  # hidden arrives late, on this stream
            hidden.copy_(source)
            ours = rankernel.candidate_logits(hidden, weight, candidates, log_probs=True)
        side.synchronize()
    assert torch.equal(ours, expected)
