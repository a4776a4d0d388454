"""The CUDA C++ kernels of lora_linear on the host, by tests/native/cuda_on_host.h; and both GPU backends."""

from __future__ import annotations

import contextlib
import importlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rankernel
from attention_cases import assert_close
from rankernel import backends, reference
from rankernel.reference.lora_linear import Dropout, Segments, keep_mask
from test_cuda import GPU_BACKENDS, Host, build_on_host

# Of x, of the factors.
DTYPES = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
every_dtype = pytest.mark.parametrize(("dtype", "factor_dtype"), DTYPES, ids=str)

ops: Any = importlib.import_module("rankernel.ops.lora_linear")  # rankernel.ops names the function

GUARD = 64
LAYOUTS = {  # strides of [rows, columns], and where the first element stands
    "rows": lambda rows, columns: ((columns, 1), GUARD),
    "aligned rows": lambda rows, columns: ((-(-columns // 8) * 8 + 8, 1), GUARD),
    "odd rows": lambda rows, columns: ((columns + 3, 1), GUARD + 1),
    "columns": lambda rows, columns: ((1, rows), GUARD),
    "odd columns": lambda rows, columns: ((1, rows + 3), GUARD + 1),
    "spread": lambda rows, columns: ((2 * columns + 1, 2), GUARD),
}
OF_ROWS = [name for name in LAYOUTS if name.endswith("rows")]


def placed(values: torch.Tensor, layout: str, dtype: torch.dtype, device: str = "cpu") -> torch.Tensor:
    """A copy with the strides of the layout, amid NaN."""
    strides, offset = LAYOUTS[layout](*values.shape)
    end = offset + sum(max(size - 1, 0) * stride for size, stride in zip(values.shape, strides, strict=True)) + 1
    memory = torch.full((end + GUARD,), math.nan, dtype=dtype, device=device)
    return memory.as_strided(values.shape, strides, offset).copy_(values)


def assert_nan_around(view: torch.Tensor) -> None:
    """Nothing beside the view was written."""
    memory = view._base
    assert memory is not None
    around = torch.ones_like(memory, dtype=torch.bool)
    around.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(False)
    assert memory[around].isnan().all()


@dataclass
class Problem:
    """Float64 inputs; coefficients that no factor of the row has are NaN."""

    x: torch.Tensor
    out: torch.Tensor
    factors: list[torch.Tensor]
    scales: list[float]
    columns: list[int]
    coefficients: torch.Tensor
    segments: Segments | None = None
    dropout: Dropout | None = None
    layouts: list[str] = field(default_factory=lambda: ["rows"])
    x_layout: str = "rows"
    with_sums: bool = True
    learns: list[bool] = field(default_factory=lambda: [True])
    device: str = "cpu"

    def on(self, device: str) -> Problem:
        segments = None if self.segments is None else Segments(*(t.to(device) for t in self.segments))
        dropout = None if self.dropout is None else Dropout(self.dropout.probability, self.dropout.seed.to(device))
        return replace(self, segments=segments, dropout=dropout, device=device)

    def place(self, dtype: torch.dtype, factor_dtype: torch.dtype) -> tuple[torch.Tensor, list[torch.Tensor]]:
        factors = [
            placed(factor, layout, factor_dtype, self.device)
            for factor, layout in zip(self.factors, itertools.cycle(self.layouts), strict=False)
        ]
        return placed(self.x, self.x_layout, dtype, self.device), factors

    def row(self, number: int) -> Problem:
        """One row alone."""
        own = slice(number, number + 1)
        alone = replace(self, x=self.x[own], out=self.out[own], coefficients=self.coefficients[own])
        if self.segments is None:
            return alone
        adapter = torch.repeat_interleave(self.segments.adapters, self.segments.offsets.diff())[own]
        return replace(alone, segments=Segments(torch.tensor([0, 1]), adapter))


def make_problem(
    rows: int | list[tuple[int, int]], size: int, ranks: list[int], gap: int = 0, probability: float = 0.0,
    layouts: tuple[str, ...] = ("rows",), x_layout: str = "rows", with_sums: bool = True,
    learns: tuple[bool, ...] = (True,), seed: int = 0,
) -> Problem:  # fmt: skip
    """``rows``: how many, or (length, adapter) of each segment. ``gap`` columns without a rank follow each factor."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    factors = [normal(rank, size) / max(size, 1) ** 0.5 for rank in ranks]
    scales = [0.5 + number for number in range(len(ranks))]
    segments = None
    if isinstance(rows, int):
        num_rows = rows
        columns = list(itertools.accumulate((rank + gap for rank in ranks), initial=0))
        width = columns.pop()
        own = [list(range(len(ranks)))] * num_rows
    else:
        num_rows = sum(length for length, _ in rows)
        columns, width = [0] * len(ranks), max(ranks, default=0) + gap
        adapters = [adapter % (len(ranks) + 1) - 1 for _, adapter in rows]
        offsets = torch.tensor([0, *(length for length, _ in rows)]).cumsum(0)
        segments = Segments(offsets, torch.tensor(adapters, dtype=torch.int64))
        own = [[a] * (a >= 0) for (length, _), a in zip(rows, adapters, strict=True) for _ in range(length)]
    coefficients = torch.full((num_rows, width), math.nan, dtype=torch.float64)
    for row, numbers in enumerate(own):
        for f in numbers:
            coefficients[row, columns[f] : columns[f] + ranks[f]] = normal(ranks[f])
    key = torch.randint(-(2**62), 2**62, (1,), generator=generator)
    dropout = Dropout(probability, key) if probability else None
    return Problem(
        normal(num_rows, size), normal(num_rows, size), factors, scales, columns, coefficients, segments, dropout,
        list(layouts), x_layout, with_sums, list(learns),
    )  # fmt: skip


# A tile is 4 ranks and 256 columns, a block's step 1024 columns, and up to 4 rows of a segment share a block.
problems = st.builds(
    make_problem,
    rows=st.one_of(
        st.integers(1, 10),
        st.lists(st.tuples(st.sampled_from([0, 1, 1, 2, 3, 5, 9]), st.integers(0, 9)), min_size=1, max_size=6),
    ),
    size=st.one_of(st.integers(1, 40), st.sampled_from([64, 128, 250, 256, 264, 300, 1024, 1032])),
    ranks=st.lists(st.sampled_from([0, 1, 2, 4, 5, 8, 16, 64]), min_size=1, max_size=4),
    gap=st.sampled_from([0, 0, 3]),
    probability=st.sampled_from([0.0, 0.0, 0.25]),
    layouts=st.one_of(
        st.just(("aligned rows",)), st.just(("columns",)), st.lists(st.sampled_from(list(LAYOUTS)), min_size=1)
    ),
    x_layout=st.sampled_from(OF_ROWS),
    with_sums=st.sampled_from([True, True, False]),
    learns=st.sampled_from([(True,), (False,), (True, False), (False, True)]),
    seed=st.integers(0, 2**31),
)


class Results:
    """What one implementation makes of a problem; outputs were NaN before."""

    def __init__(self, p: Problem, implementation: str, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
        """In float64 from inputs rounded to their dtypes where implementation is "truth"."""
        x, factors = p.place(dtype, factor_dtype)
        out = placed(p.out, p.x_layout, dtype, p.device)
        exact = implementation == "truth"
        if exact:
            x, out, factors = x.double(), out.double(), [factor.double() for factor in factors]
        wide = torch.float64 if exact else torch.float32

        def outputs(shape: torch.Size, layout: str, dtype: torch.dtype) -> torch.Tensor:
            return placed(torch.full(shape, math.nan), layout, torch.float64 if exact else dtype, p.device)

        kernels = ops._Kernels("reference" if exact else implementation, p.segments, p.dropout)
        coefficients = placed(p.coefficients.float(), "odd rows", wide, p.device)
        learns = itertools.islice(itertools.cycle(p.learns), len(factors))
        layouts = itertools.cycle(reversed(p.layouts))
        gradients = [
            outputs(factor.shape, layout, factor_dtype) if learn else None
            for factor, layout, learn in zip(factors, layouts, learns, strict=False)
        ]
        sums = outputs(coefficients.shape, "odd rows", torch.float32) if p.with_sums else None
        common = (factors, p.scales, p.columns)
        kernels.shrink(x, *common, dropout=True, sums=sums, coefficients=coefficients, gradients=gradients)
        kernels.expand(out, coefficients, *common, dropout=True)
        self.sums, self.gradients, self.out = sums, gradients, out
        if not exact:
            for output in self.named().values():
                assert_nan_around(output)

    def named(self) -> dict[str, torch.Tensor]:
        every = {"sums": self.sums, "out": self.out} | {f"gradient {n}": g for n, g in enumerate(self.gradients)}
        return {what: output for what, output in every.items() if output is not None}


def check(p: Problem, results: Results, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    truth, eager = (Results(p, name, dtype, factor_dtype).named() for name in ("truth", "reference"))
    for what, output in results.named().items():
        assert_close(output, eager[what], truth[what], f"{what} {dtype} {factor_dtype} {list(p.x.shape)}")


# The kernels on the host.


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """``_Kernels("cuda", ...)`` runs on the host's memory."""
    host = Host(build_on_host(tmp_path_factory.getbasetemp()))

    def check_error(error: int) -> None:
        assert error == 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops._checks, "gpu_kernels", lambda op, implementation: host.module)
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "device", contextlib.nullcontext)
        patch.setattr(torch.cuda, "check_error", check_error)
        yield host


def on_host(host: Host, p: Problem, dtype: torch.dtype, factor_dtype: torch.dtype) -> Results:
    """Runs the threads of a block in both orders."""
    every = []
    for descending in (False, True):
        host.descending.value = descending
        every.append(Results(p, "cuda", dtype, factor_dtype))
    for one, other in zip(*(results.named().values() for results in every), strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7)), "depends on the order of the threads"
    return every[0]


@every_dtype
@given(p=problems)
def test_every_dtype(host: Host, dtype: torch.dtype, factor_dtype: torch.dtype, p: Problem) -> None:
    check(p, on_host(host, p, dtype, factor_dtype), dtype, factor_dtype)


# Vectors along the columns of a factor, along its ranks, and neither; one row and several.
@pytest.mark.parametrize("rows", [1, 6])
@pytest.mark.parametrize("layout", ["aligned rows", "odd rows", "columns", "odd columns"])
@pytest.mark.parametrize("x_layout", OF_ROWS)
@every_dtype
def test_alignment(
    host: Host, dtype: torch.dtype, factor_dtype: torch.dtype, x_layout: str, layout: str, rows: int
) -> None:
    p = make_problem(rows, 264, [8, 5], layouts=(layout,), x_layout=x_layout)
    check(p, on_host(host, p, dtype, factor_dtype), dtype, factor_dtype)


@pytest.mark.parametrize("layout", ["rows", "odd rows", "columns"])
@pytest.mark.parametrize("rows", [1, 3])
def test_large_size(host: Host, rows: int, layout: str) -> None:
    p = make_problem(rows, 5008, [5], layouts=(layout,))
    for dtypes in DTYPES[:2]:
        check(p, on_host(host, p, *dtypes), *dtypes)


def test_large_rank(host: Host) -> None:
    p = make_problem([(3, 1), (2, 2)], 40, [300, 257], layouts=("columns", "rows"))
    for dtypes in DTYPES[:2]:
        check(p, on_host(host, p, *dtypes), *dtypes)


# More than a launch takes.
@pytest.mark.parametrize("rows", [3, [(1, n) for n in (5, 60, 0, 50, 101, 48, 49)]], ids=["all", "segments"])
def test_many_factors(host: Host, rows: Any) -> None:
    p = make_problem(rows, 20, [n % 3 for n in range(101)], gap=1)
    check(p, on_host(host, p, *DTYPES[0]), *DTYPES[0])


@pytest.mark.parametrize("size", [5, 300])
@pytest.mark.parametrize("probability", [2**-16, 0.3, 1 - 2**-17])
def test_dropout_is_keep_mask(host: Host, probability: float, size: int) -> None:
    for key in (0, 2**62 + 3, -1):
        dropout = Dropout(probability, torch.tensor([key]))
        ones, each = torch.ones(6, size).double(), torch.eye(6).double()
        mask = keep_mask(6, size, dropout).float()
        p = Problem(ones, ones, [ones], [1.0], [0], each, dropout=dropout)
        results = on_host(host, p, torch.float32, torch.float32)
        assert torch.equal(results.out, 1 + mask)
        assert results.gradients[0] is not None
        assert torch.equal(results.gradients[0], mask)
        p = Problem(ones, ones, [torch.eye(size).double()], [1.0], [0], ones, dropout=dropout)
        assert torch.equal(on_host(host, p, torch.float32, torch.float32).named()["sums"], mask)


@pytest.mark.parametrize("layout", ["rows", "odd rows", "columns"])
@pytest.mark.parametrize("rows", [7, [(2, 0), (5, 2), (0, 1), (1, 3), (1, 1), (6, 2)]], ids=["all", "segments"])
def test_batch_is_its_rows_one_by_one(host: Host, rows: Any, layout: str) -> None:
    p = make_problem(rows, 1304, [4, 1, 16], layouts=(layout,))
    for dtypes in DTYPES:
        batch = on_host(host, p, *dtypes)
        for number in range(len(p.x)):
            alone = on_host(host, replace(p.row(number), learns=[False]), *dtypes)
            for what in ("sums", "out"):
                assert torch.equal(batch.named()[what][number], alone.named()[what][0])


@pytest.mark.parametrize(
    "p",
    [
        make_problem(0, 40, [3, 5]),
        make_problem([], 40, [3, 5]),
        make_problem([(0, 1), (0, 0)], 40, [3, 5]),
        make_problem(3, 0, [3, 5], gap=1),
        make_problem(3, 40, [0, 0], gap=1),
        make_problem([(3, 0), (2, 1)], 40, [0], gap=3),
    ],
)
def test_empty(host: Host, p: Problem) -> None:
    check(p, on_host(host, p, torch.bfloat16, torch.float32), torch.bfloat16, torch.float32)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_nan_stays_in_its_row_and_adapter(host: Host, value: float) -> None:
    p = make_problem([(3, 1), (4, 2), (2, 0)], 300, [5, 6])
    clean = on_host(host, p, torch.float32, torch.float32)
    p.x[1, 7] = p.factors[1][5, 9] = value
    found = on_host(host, p, torch.float32, torch.float32)
    others = torch.tensor([0, 2])
    for what in ("sums", "out"):
        assert torch.equal(found.named()[what][others], clean.named()[what][others])
        assert torch.equal(found.named()[what][-2:], clean.named()[what][-2:])
        assert not torch.isfinite(found.named()[what][3:7]).all(dim=1).any()
    assert torch.equal(found.named()["gradient 1"], clean.named()["gradient 1"])
    assert not torch.isfinite(found.named()["gradient 0"][:, 7]).any()


@pytest.mark.parametrize(
    "offsets", [[0, 9, 4, 12], [-(2**40), 3, 2**40], [12, 0], [2**63 - 1, -(2**63), 2**62], [0, 0], [5, 5, 5], [0]]
)
@pytest.mark.parametrize("adapter", [0, 1, 2, 2**62, -(2**63)])
def test_bad_segments_touch_nothing_outside(host: Host, adapter: int, offsets: list[int]) -> None:
    adapters = torch.full((len(offsets) - 1,), adapter)
    p = replace(make_problem(12, 40, [3, 5]), columns=[0, 0], segments=Segments(torch.tensor(offsets), adapters))
    # Results, which outside is checked of, may depend on the order of the threads.
    for descending in (False, True):
        host.descending.value = descending
        Results(p, "cuda", torch.float32, torch.float32)


def trained(function: Callable[..., torch.Tensor], leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    leaves = [leaf.detach().requires_grad_() for leaf in leaves]
    out = function(*leaves)
    upstream = torch.linspace(-1, 1, out.numel(), device=out.device, dtype=torch.float64).reshape(out.shape)
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]


def check_public(segmented: bool, dtype: torch.dtype, factor_dtype: torch.dtype, device: str, what: str) -> None:
    """lora_linear or segment_lora_linear with every gradient, gate and dropout, against the reference."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    rows, size, out_size, ranks = 11, 264, 136, [8, 5] if segmented else [8]
    x, weight, bias, gate = normal(rows, size), normal(out_size, size) / size**0.5, normal(out_size), normal(rows, 8)
    adapters = [t for r in ranks for t in (normal(r, size) / size**0.5, normal(out_size, r))]
    segments = Segments(torch.tensor([0, 1, 7, 7, 9, rows]), torch.tensor([1, 0, 1, -1, 1]))
    leaves = [t.to(device, dtype) for t in (x, weight, bias)] + [gate.to(device, torch.float32)]
    leaves += [t.to(device, factor_dtype) for t in adapters]
    segments = Segments(*(t.to(device) for t in segments))

    def run(module: Any, *leaves: torch.Tensor, **dropout: Any) -> torch.Tensor:
        x, weight, bias, gate, *adapters = leaves
        if not segmented:
            return module.lora_linear(x, weight, *adapters, 0.7, bias=bias, gate=gate, **dropout)
        pairs = [(adapters[0], adapters[1], 0.7), (adapters[2], adapters[3], -1.5)]
        return module.segment_lora_linear(x, weight, pairs, *segments, bias=bias, gate=gate)

    # The seed as lora_linear draws it.
    probability = 0.0 if segmented else 0.25
    seeds = torch.Generator(device).manual_seed(5)
    seed = torch.randint(2**63 - 1, (1,), generator=seeds, device=device)
    expected = {} if segmented else {"dropout": Dropout(probability, seed)}
    options = {} if segmented else {"dropout_p": probability, "generator": seeds.manual_seed(5)}
    truth = trained(lambda *t: run(reference, *t, **expected), [t.double() for t in leaves])

    def in_pytorch(*leaves: torch.Tensor) -> torch.Tensor:
        """What PEFT does: adapters in their own dtype."""
        wide = [t.to(factor_dtype) for t in leaves]
        return run(reference, *wide, **expected).to(dtype)

    eager = trained(in_pytorch, leaves)
    ours = trained(lambda *t: run(rankernel, *t, **options), leaves)
    names = ["out", "x", "weight", "bias", "gate", *(f"lora_{'AB'[n % 2]} {n // 2}" for n in range(len(adapters)))]
    for number, name in enumerate(names):
        assert_close(ours[number], eager[number], truth[number], f"{what} {name} {dtype} {factor_dtype}")


@pytest.mark.parametrize("segmented", [False, True])
@every_dtype
def test_public_functions(
    host: Host, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, factor_dtype: torch.dtype, segmented: bool
) -> None:
    monkeypatch.setattr(ops, "_kernels", lambda x, call: ops._Kernels("cuda", call.segments, call.dropout))
    check_public(segmented, dtype, factor_dtype, "cpu", "host")


# A device.

DEVICE_PROBLEMS = {
    "one row": make_problem(1, 4096, [16]),
    "one row, transposed": make_problem(1, 4096, [16], layouts=("columns",)),
    "an adapter a row": make_problem([(1, n) for n in range(9)], 1024, [16, 8, 64, 0, 5], layouts=("rows", "columns")),
    "a few rows": make_problem(19, 1032, [16, 16, 5], probability=0.1, layouts=("rows", "odd rows", "columns")),
    "segments": make_problem([(30, 1), (0, 2), (17, 0), (50, 2), (3, 1)], 700, [64, 5], x_layout="odd rows"),
    "many rows": make_problem(600, 520, [32], probability=0.5),
    "many factors": make_problem([(2, 7 * n) for n in range(30)], 256, [n % 20 for n in range(101)]),
}
every_backend = pytest.mark.parametrize("backend", GPU_BACKENDS)


@pytest.mark.gpu
@every_backend
@every_dtype
@pytest.mark.parametrize("name", DEVICE_PROBLEMS)
def test_device_kernels(backend: str, name: str, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    p = DEVICE_PROBLEMS[name].on("cuda")
    ours = Results(p, backend, dtype, factor_dtype)
    check(p, ours, dtype, factor_dtype)
    for one, other in zip(
        ours.named().values(), Results(p, backend, dtype, factor_dtype).named().values(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.gpu
@every_backend
def test_device_dropout_is_keep_mask(backend: str) -> None:
    ones, each = torch.ones(40, 300).double(), torch.eye(40).double()
    p = Problem(ones, ones, [ones], [1.0], [0], each, dropout=Dropout(0.3, torch.tensor([2**62 + 3]))).on("cuda")
    assert p.dropout is not None
    mask = keep_mask(40, 300, p.dropout).float()
    results = Results(p, backend, torch.float32, torch.float32)
    assert torch.equal(results.out, 1 + mask)
    assert torch.equal(results.named()["gradient 0"], mask)


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize("segmented", [False, True])
@every_dtype
def test_device_public_functions(backend: str, dtype: torch.dtype, factor_dtype: torch.dtype, segmented: bool) -> None:
    with backends.use(backend=backend):
        check_public(segmented, dtype, factor_dtype, "cuda", backend)


@pytest.mark.gpu
@every_backend
def test_graph_replay_sees_new_inputs(backend: str) -> None:
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    x, weight = normal(6, 512), normal(256, 512)
    adapters = [(normal(rank, 512), normal(256, rank), 0.5) for rank in (16, 8)]
    offsets, numbers = torch.tensor([0, 2, 6], device="cuda"), torch.tensor([0, 1], device="cuda")

    def call() -> torch.Tensor:
        return rankernel.segment_lora_linear(x, weight, adapters, offsets, numbers)

    with backends.use(backend=backend):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            before = call()  # compiles and loads before capture
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = call()
        x.copy_(normal(6, 512))
        offsets[1] = 5
        numbers.copy_(numbers.flip(0))
        graph.replay()
        assert torch.equal(captured, call())
        assert not torch.equal(captured, before)
