"""lora_shrink and lora_expand: against float64 on random problems, for every instruction set and pair of dtypes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import accumulate

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attention_cases import assert_close
from rankernel import backends
from rankernel.ops.lora_linear import _Kernels
from rankernel.reference.lora_linear import Dropout, Segments, keep_mask

NAN = float("nan")
PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float16),
    (torch.float16, torch.float32),
]
"""dtypes of x and of the factors."""


def rows_apart(values: torch.Tensor, padding: int) -> torch.Tensor:
    """The same values with rows ``padding`` elements apart, NaN between them."""
    memory = values.new_full((values.shape[0], values.shape[1] + padding), NAN)
    memory[:, padding // 2 :][:, : values.shape[1]] = values
    return memory[:, padding // 2 :][:, : values.shape[1]]


def in_order(values: torch.Tensor, order: str) -> torch.Tensor:
    """The same values: as lora_A is stored, as the transpose of lora_B, or with both strides above 1."""
    if order == "transposed":
        return values.T.contiguous().T
    if order == "spread":
        memory = values.new_full((2 * values.shape[0], 3 * values.shape[1]), NAN)
        memory[::2, ::3] = values
        return memory[::2, ::3]
    return values.contiguous()


@dataclass
class Problem:
    """Float64 values; methods give them in the dtypes under test."""

    x: torch.Tensor
    factors: list[torch.Tensor]
    scales: list[float]
    orders: list[str]
    coefficients: torch.Tensor
    """NaN where a row has no such rank."""
    segments: Segments | None
    dropout: Dropout | None
    padding: int

    @property
    def columns(self) -> list[int]:
        if self.segments is not None:
            return [0] * len(self.factors)
        return list(accumulate((len(f) for f in self.factors), initial=0))[:-1]

    def kernels(self, implementation: str = "cpu") -> _Kernels:
        return _Kernels(implementation, self.segments, self.dropout)

    def shrink(
        self,
        kernels: _Kernels,
        x: torch.Tensor,
        factors: list[torch.Tensor],
        coefficients: torch.Tensor,
        wanted: str = "sums gradients",
    ) -> list[torch.Tensor]:
        """The sums if wanted and the gradients if wanted, their memory NaN before."""
        sums = rows_apart(torch.full_like(coefficients, NAN), self.padding) if "sums" in wanted else None
        gradients = [
            in_order(torch.full_like(f, NAN), order) for f, order in zip(factors, reversed(self.orders), strict=True)
        ]
        learns = "gradients" in wanted
        kernels.shrink(
            x, factors, self.scales, self.columns, dropout=True, sums=sums,
            coefficients=coefficients if learns else None, gradients=gradients if learns else (),
        )  # fmt: skip
        return ([] if sums is None else [sums]) + (gradients if learns else [])

    def expand(
        self, kernels: _Kernels, x: torch.Tensor, factors: list[torch.Tensor], coefficients: torch.Tensor
    ) -> torch.Tensor:
        """``x`` plus the update."""
        out = rows_apart(x, self.padding)
        kernels.expand(out, coefficients, factors, self.scales, self.columns, dropout=True)
        if self.padding and len(out):
            where = out.storage_offset() + out.shape[1]
            gaps = out.as_strided((len(out) - 1, self.padding), out.stride(), where)
            assert gaps.isnan().all(), "written between the rows"
        return out

    def inputs(
        self, dtype: torch.dtype, factor_dtype: torch.dtype
    ) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
        factors = [in_order(f.to(factor_dtype), order) for f, order in zip(self.factors, self.orders, strict=True)]
        return rows_apart(self.x.to(dtype), self.padding), factors, rows_apart(self.coefficients.float(), self.padding)

    def rows(self, number: int) -> torch.Tensor:
        """Those that use a factor."""
        if self.segments is None:
            return torch.arange(len(self.x))
        return (torch.repeat_interleave(self.segments.adapters, self.segments.offsets.diff()) == number).nonzero()[:, 0]


def random_problem(
    num_rows: int, size: int, ranks: list[int], *, num_segments: int | None = None, dropout_p: float = 0.0,
    orders: tuple[str, ...] = ("rows",), padding: int = 0, seed: int = 0,
) -> Problem:  # fmt: skip
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    segments = None
    if num_segments is not None:
        inner = torch.randint(num_rows + 1, (max(num_segments - 1, 0),), generator=generator).sort()[0]
        offsets = torch.cat((torch.tensor([0]), inner, torch.tensor([num_rows])))
        segments = Segments(offsets, torch.randint(-1, len(ranks), (num_segments,), generator=generator))
    dropout = Dropout(dropout_p, torch.randint(2**63 - 1, (1,), generator=generator)) if dropout_p else None
    factors = [random(rank, size) for rank in ranks]
    scales = [0.5 + 0.75 * i for i in range(len(ranks))]
    problem = Problem(
        random(num_rows, size), factors, scales, [orders[i % len(orders)] for i in range(len(ranks))],
        torch.full((num_rows, sum(ranks) if segments is None else max(ranks)), NAN, dtype=torch.float64),
        segments, dropout, padding,
    )  # fmt: skip
    for number, (rank, column) in enumerate(zip(ranks, problem.columns, strict=True)):
        rows = problem.rows(number)
        problem.coefficients[rows, column : column + rank] = random(len(rows), rank)
    return problem


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    """Sizes around those of vectors, tiles and chunks; factors and gradients of any strides, segments, dropout."""
    rank = st.one_of(st.integers(0, 70), st.sampled_from([1, 4, 8, 16]))
    segmented = draw(st.booleans())
    num_rows = draw(st.one_of(st.integers(0, 70), st.sampled_from([96, 127, 128, 129, 200, 300])))
    return random_problem(
        num_rows,
        draw(st.one_of(st.integers(1, 300), st.sampled_from([127, 128, 129, 256, 1030]))),
        draw(st.lists(rank, min_size=1, max_size=3)),
        num_segments=draw(st.integers(0 if num_rows == 0 else 1, 9)) if segmented else None,
        dropout_p=draw(st.sampled_from([0.0, 0.0, 0.1, 0.7])),
        orders=draw(st.permutations(["rows", "transposed", "spread"])),
        padding=draw(st.sampled_from([0, 5])),
        seed=draw(st.integers(0, 2**31)),
    )


def eager(
    problem: Problem, x: torch.Tensor, factors: list[torch.Tensor], coefficients: torch.Tensor
) -> list[torch.Tensor]:
    """As PEFT computes it, in the dtype of the factors; sums, which the kernels keep in float32, in float32."""
    dtype = factors[0].dtype
    mask = 1.0 if problem.dropout is None else keep_mask(*x.shape, problem.dropout)
    dropped = x.to(dtype) * (mask if problem.dropout is None else mask.to(dtype))
    sums = torch.zeros_like(coefficients)
    update = torch.zeros_like(x, dtype=dtype)
    gradients = []
    for number, (factor, scale, column) in enumerate(zip(factors, problem.scales, problem.columns, strict=True)):
        rows, own = problem.rows(number), slice(column, column + len(factor))
        weights = coefficients[rows, own]
        wide = x[rows].float() * (mask if problem.dropout is None else mask[rows].float())
        sums[rows, own] = scale * (wide @ factor.float().T)
        update[rows] += scale * (weights.to(dtype) @ factor)
        gradients.append(scale * (weights.to(dtype).T @ dropped[rows]))
    out = x + (update * (mask if problem.dropout is None else mask.to(dtype))).to(x.dtype)
    return [sums, *gradients, out]


def magnitudes(problem: Problem, factor_dtype: torch.dtype, *wide: torch.Tensor) -> list[float]:
    """Root of the sum of squares of the terms of every result, with which their rounding errors grow.

    With factors of low precision the coefficients are rounded to it as in eager, though not in the same place.
    """
    x, factors, coefficients = wide
    kept = 1.0 if problem.dropout is None else 1 / (1 - problem.dropout.probability)
    squares = replace(problem, scales=[(kept * scale) ** 2 for scale in problem.scales], padding=0)
    kernels = _Kernels("reference", problem.segments, None)
    arguments = ([f**2 for f in factors], coefficients**2)
    sums = squares.shrink(kernels, x**2, *arguments)
    largest = [float(t.max().sqrt()) if t.numel() else 0.0 for t in (*sums, squares.expand(kernels, 0 * x, *arguments))]
    units = torch.finfo(factor_dtype).eps / torch.finfo(torch.float32).eps
    return [largest[0], *(units * magnitude for magnitude in largest[1:])]


def check(problem: Problem, dtype: torch.dtype, factor_dtype: torch.dtype) -> None:
    """Every result of every instruction set."""
    inputs = problem.inputs(dtype, factor_dtype)
    x, factors, coefficients = inputs
    wide = (x.double(), [f.double() for f in factors], coefficients.double())
    reference = problem.kernels("reference")
    truth = [*problem.shrink(reference, *wide), problem.expand(reference, *wide)]
    bounds = [eager(problem, *inputs), truth, magnitudes(problem, factor_dtype, *wide)]
    names = ["sums", *(f"gradient {i}" for i in range(len(factors))), "out"]
    for isa in backends.available_isas():
        with backends.use(isa=isa):
            kernels = problem.kernels()
            ours = [*problem.shrink(kernels, *inputs), problem.expand(kernels, *inputs)]
            alone = problem.shrink(kernels, *inputs, "sums") + problem.shrink(kernels, *inputs, "gradients")
        for found, what, *others in zip(ours, names, *bounds, strict=True):
            assert_close(found, others[0], others[1], f"{isa} {dtype} {factor_dtype} {what}", others[2])
        for found, what, *others in zip(alone, names, *bounds, strict=False):
            assert_close(found, others[0], others[1], f"{isa} {dtype} {factor_dtype} {what} alone", others[2])
        for row in problem.rows(-1) if problem.segments else ():
            assert torch.equal(ours[-1][row], x[row]), "a row without adapter was changed"


@settings(max_examples=60)
@given(problems(), st.sampled_from(PAIRS))
def test_every_isa_and_dtype(problem: Problem, pair: tuple[torch.dtype, torch.dtype]) -> None:
    check(problem, *pair)


@pytest.mark.parametrize(
    "problem",
    [
        random_problem(150, 200, [128], orders=("transposed",)),
        random_problem(40, 131, [256], dropout_p=0.2),
        random_problem(140, 60, [300], num_segments=3),
        random_problem(300, 140, [16, 16], padding=3, orders=("rows", "transposed")),
        random_problem(5, 2100, [16]),
        random_problem(64, 70, [8] * 20, num_segments=30, dropout_p=0.05),
    ],
    ids=["r128", "r256", "r300", "chunks", "wide", "adapters"],
)
@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_shapes(problem: Problem, pair: tuple[torch.dtype, torch.dtype]) -> None:
    check(problem, *pair)


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_mask_is_that_of_the_reference(isa: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Ones times ones are the mask itself, by both kernels, also where rows are gathered; the seed has 63 bits."""
    dtype, factor_dtype = pair
    num_rows, size = 70, 389
    segments = Segments(torch.tensor([0, 3, 9, num_rows]), torch.tensor([0, 1, 0]))
    for chosen in (None, segments):
        dropout = Dropout(0.5, torch.tensor([2**62 + 987654321987]))
        mask = keep_mask(num_rows, size, dropout)
        problem = random_problem(num_rows, size, [num_rows, num_rows])
        problem.segments, problem.dropout, problem.scales = chosen, dropout, [1.0, 1.0]
        factors = [torch.ones(num_rows, size, dtype=factor_dtype)] * 2
        identity = torch.eye(num_rows).repeat(1, 1 if chosen else 2)
        x = torch.ones(num_rows, size, dtype=dtype)
        sums, *gradients = problem.shrink(problem.kernels(), x, factors, identity)
        assert torch.equal(sums[:, :1].double(), mask.sum(dim=1, keepdim=True))
        for number, gradient in enumerate(gradients):
            rows = problem.rows(number)
            assert torch.equal(gradient[rows].double(), mask[rows])
        out = problem.expand(problem.kernels(), torch.zeros_like(x), factors, identity)
        assert torch.equal(out.double(), mask * (1 if chosen else 2))


def many_rows(**options: object) -> Problem:
    """Enough work that several threads share it."""
    return random_problem(300, 400, [16, 16], dropout_p=0.3, orders=("rows", "transposed"), **options)


@pytest.fixture
def threads() -> Callable[[int], None]:
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.mark.parametrize("pair", PAIRS[:3], ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
@pytest.mark.parametrize("num_segments", [None, 4])
def test_threads_do_not_show(
    isa: str, pair: tuple[torch.dtype, torch.dtype], num_segments: int | None, threads: Callable[[int], None]
) -> None:
    problem = many_rows(num_segments=num_segments)
    inputs = problem.inputs(*pair)
    results = []
    for count in (1, 2, 5):
        threads(count)
        kernels = problem.kernels()
        both, apart = problem.shrink(kernels, *inputs), problem.shrink(kernels, *inputs, "gradients")
        results.append([*both, *apart, problem.expand(kernels, *inputs)])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("pair", PAIRS[:3], ids=lambda pair: "-".join(str(dtype)[6:] for dtype in pair))
def test_rows_do_not_depend_on_each_other(isa: str, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Bit by bit, and neither does it show how rows came to a factor. Without dropout, which counts rows."""
    x, factors, coefficients = random_problem(300, 400, [23], seed=3).inputs(*pair)
    sums, out = torch.empty(300, 23), x.clone()
    plain = _Kernels("cpu", None, None)
    plain.shrink(x, factors, [0.7], [0], dropout=False, sums=sums)
    plain.expand(out, coefficients, factors, [0.7], [0], dropout=False)
    for begin, end in ((0, 1), (299, 300), (17, 45), (1, 34)):
        part, changed = torch.empty(end - begin, 23), x[begin:end].clone()
        plain.shrink(x[begin:end], factors, [0.7], [0], dropout=False, sums=part)
        plain.expand(changed, coefficients[begin:end], factors, [0.7], [0], dropout=False)
        assert torch.equal(part, sums[begin:end])
        assert torch.equal(changed, out[begin:end])
    segments = Segments(torch.tensor([0, 5, 6, 170, 300]), torch.tensor([1, -1, 0, 1]))
    by_segments = _Kernels("cpu", segments, None)
    part, changed = torch.empty(300, 23), x.clone()
    by_segments.shrink(x, factors * 2, [0.7, 0.7], [0, 0], dropout=False, sums=part)
    by_segments.expand(changed, coefficients, factors * 2, [0.7, 0.7], [0, 0], dropout=False)
    used = torch.arange(300) != 5
    assert torch.equal(part[used], sums[used])
    assert torch.equal(changed[used], out[used])
    assert not part[5].any()
    assert torch.equal(changed[5], x[5])


def test_gradient_of_an_adapter_without_rows_is_zero(isa: str) -> None:
    for num_rows, offsets, adapters in ((4, [0, 4], [1]), (0, [0], []), (0, [0, 0], [2])):
        problem = random_problem(num_rows, 150, [3, 16, 40])
        problem.segments = Segments(torch.tensor(offsets), torch.tensor(adapters, dtype=torch.int64))
        coefficients = torch.randn(num_rows, 40)
        for wanted in ("sums gradients", "gradients"):
            x, factors, _ = problem.inputs(torch.float32, torch.float32)
            gradients = problem.shrink(problem.kernels(), x, factors, coefficients, wanted)[-3:]
            for number, gradient in enumerate(gradients):
                assert bool(gradient.any()) == (number in adapters and num_rows > 0)
                assert not gradient.isnan().any()


def test_only_the_gradients_that_are_wanted(isa: str) -> None:
    problem = random_problem(200, 150, [5, 9])
    x, factors, coefficients = problem.inputs(torch.bfloat16, torch.float32)
    _, *both = problem.shrink(problem.kernels(), x, factors, coefficients)
    one = torch.full_like(factors[1], NAN)
    sums = torch.empty_like(coefficients)
    problem.kernels().shrink(
        x, factors, problem.scales, problem.columns, dropout=True, sums=sums, coefficients=coefficients,
        gradients=[None, one],
    )  # fmt: skip
    assert torch.equal(one, both[1])


@pytest.mark.parametrize(
    ("offsets", "adapters"),
    [
        ([0, 3], [0]),
        ([0, 5], [0]),
        ([1, 4], [0]),
        ([0, 3, 2, 4], [0, 0, 0]),
        ([0, 2**62, 4], [0, 0]),
        ([0, -1, 4], [0, 0]),
        ([0, 4], [2]),
        ([0, 4], [-2]),
        ([0], []),
    ],
)
def test_bad_segments_raise_and_nothing_is_written(isa: str, offsets: list[int], adapters: list[int]) -> None:
    problem = random_problem(4, 20, [2, 3])
    problem.segments = Segments(torch.tensor(offsets), torch.tensor(adapters, dtype=torch.int64))
    x, factors = problem.x.float(), [f.float() for f in problem.factors]
    sums, coefficients = torch.full((4, 3), NAN), torch.randn(4, 3)
    gradients = [torch.full_like(f, NAN) for f in factors]
    out = x.clone()
    with pytest.raises(ValueError, match="segment_offsets, segment_adapters: expected offsets that rise from 0 to 4"):
        problem.kernels().shrink(
            x, factors, [1.0, 1.0], [0, 0], dropout=False, sums=sums, coefficients=coefficients, gradients=gradients
        )
    with pytest.raises(ValueError, match="segment_offsets, segment_adapters: expected offsets that rise from 0 to 4"):
        problem.kernels().expand(out, coefficients, factors, [1.0, 1.0], [0, 0], dropout=False)
    assert torch.equal(out, x)
    assert all(t.isnan().all() for t in (sums, *gradients))
