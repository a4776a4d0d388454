"""The Triton kernels of lora_linear against the reference in float64."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankernel.triton_kernels import lora_linear as kernels

from attention_cases import DTYPES, assert_close
from rankernel.reference.lora_linear import Dropout, Segments, keep_mask, lora_expand, lora_shrink

pytestmark = pytest.mark.usefixtures("poisoned_memory", "interpreted_dot")

RANKS = (0, 1, 5, 16, 48, 130)


@pytest.fixture
def few_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs take several tiles, and small problems still have parts."""
    monkeypatch.setattr(kernels, "PROGRAMS", 3)
    monkeypatch.setattr(kernels, "WIDE_PROGRAMS", 3)


@dataclass
class Problem:
    """Float64 tensors; with segments a row's coefficients beyond its rank are NaN."""

    x: torch.Tensor
    factors: list[torch.Tensor]
    scales: list[float]
    columns: list[int]
    coefficients: torch.Tensor
    segments: Segments | None = None
    dropout: Dropout | None = None
    turned: bool = False  # factors and gradients as the transpose of a contiguous tensor
    dtype: torch.dtype = torch.float32
    factor_dtype: torch.dtype = torch.float32

    def laid_out(self, factor: torch.Tensor) -> torch.Tensor:
        return factor.T.contiguous().T if self.turned else factor.contiguous()

    def arguments(self, wide: torch.dtype | None = None) -> tuple[object, ...]:
        """What follows x and coefficients; of the values that the types leave, in ``wide`` for the reference."""
        factors = [self.laid_out(factor.to(self.factor_dtype).to(wide or self.factor_dtype)) for factor in self.factors]
        return factors, self.scales, self.columns, self.segments, self.dropout


def padded(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Between NaN that belong to no row."""
    return torch.nn.functional.pad(tensor, (3, 2, 1, 2), value=torch.nan).to(dtype)


def inner(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[1:-2, 3:-2]


def assert_padding_is_untouched(tensor: torch.Tensor) -> None:
    rest = torch.ones(tensor.shape, dtype=torch.bool)
    inner(rest).zero_()
    assert tensor[rest].isnan().all()


def check_shrink(p: Problem, sums: bool = True, gradients: bool = True) -> tuple[torch.Tensor, list[torch.Tensor]]:
    x, found = padded(p.x, p.dtype), padded(torch.full_like(p.coefficients, torch.nan), torch.float32)
    coefficients = padded(p.coefficients, torch.float32)
    grads = [p.laid_out(torch.full_like(factor, torch.nan, dtype=p.factor_dtype)) for factor in p.factors]
    kernels.lora_shrink(
        inner(x), *p.arguments(), sums=inner(found) if sums else None,
        coefficients=inner(coefficients) if gradients else None, gradients=grads if gradients else (),
    )  # fmt: skip
    expected = []
    for wide in (torch.float32, torch.float64):
        # Eager, too, multiplies 16-bit tensors by coefficients of their type.
        narrow = p.factor_dtype if wide == torch.float32 else torch.float32
        true_sums = torch.empty_like(p.coefficients, dtype=wide)
        true_grads = [torch.empty_like(factor, dtype=wide) for factor in p.factors]
        lora_shrink(
            inner(x).to(wide), *p.arguments(wide), sums=true_sums,
            coefficients=inner(coefficients).to(narrow).to(wide), gradients=true_grads,
        )  # fmt: skip
        expected.append((true_sums, true_grads))
    (eager_sums, eager_grads), (true_sums, true_grads) = expected
    what = f"{list(p.x.shape)} {[len(f) for f in p.factors]} {p.dtype} {p.factor_dtype} {p.segments} {p.dropout}"
    if sums:
        assert_close(inner(found), eager_sums, true_sums, f"sums {what}")
        assert_padding_is_untouched(found)
    for grad, eager, truth in zip(grads, eager_grads, true_grads, strict=True) if gradients else ():
        assert_close(grad, eager.to(p.factor_dtype), truth, f"gradient {what}")
    return inner(found), grads


def check_expand(p: Problem) -> torch.Tensor:
    out, coefficients = padded(p.x, p.dtype), padded(p.coefficients, torch.float32)
    expected = []
    for wide in (torch.float32, torch.float64):
        narrow = p.factor_dtype if wide == torch.float32 else torch.float32
        expected.append(inner(out).to(wide, copy=True))
        lora_expand(expected[-1], inner(coefficients).to(narrow).to(wide), *p.arguments(wide))
    kernels.lora_expand(inner(out), inner(coefficients), *p.arguments())
    what = f"{list(p.x.shape)} {[len(f) for f in p.factors]} {p.dtype} {p.factor_dtype} {p.segments} {p.dropout}"
    assert_close(inner(out), expected[0].to(p.dtype), expected[1], f"expand {what}")
    assert_padding_is_untouched(out)
    return inner(out)


def check(p: Problem) -> None:
    check_shrink(p)
    check_shrink(p, gradients=False)
    check_shrink(p, sums=False)
    check_expand(p)


def problem(
    num_rows: int, size: int, ranks: tuple[int, ...], lengths: tuple[int, ...] | None = None,
    adapters: tuple[int, ...] = (), seed: int = 0, dropout: float = 0.0, one_scale: bool = True, **options: object,
) -> Problem:  # fmt: skip
    """With segments of the given lengths, or side by side."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    columns = [0] * len(ranks) if lengths is not None else [sum(ranks[:i]) for i in range(len(ranks))]
    width = max((*ranks, 0)) if lengths is not None else sum(ranks)
    coefficients = normal(num_rows, width)
    segments = None
    if lengths is not None:
        offsets = torch.tensor([0, *lengths]).cumsum(0)
        assert offsets[-1] == num_rows
        segments = Segments(offsets, torch.tensor(adapters, dtype=torch.int64))
        for begin, end, adapter in zip(offsets[:-1], offsets[1:], adapters, strict=True):
            coefficients[begin:end, 0 if adapter < 0 else ranks[adapter] :] = torch.nan
    scales = [0.75] * len(ranks) if one_scale else [0.5 + 0.3 * i for i in range(len(ranks))]
    factors = [normal(rank, size) / size**0.5 for rank in ranks]
    mask = Dropout(dropout, torch.tensor([seed * 0x1234567F1])) if dropout else None
    return Problem(normal(num_rows, size), factors, scales, columns, coefficients, segments, mask, **options)


@st.composite
def problems(draw: st.DrawFn) -> Problem:
    ranks = tuple(draw(st.lists(st.sampled_from(RANKS), min_size=1, max_size=4)))
    lengths, adapters = None, ()
    num_rows = draw(st.one_of(st.integers(1, 40), st.integers(1, 150)))
    if draw(st.booleans()):
        lengths = tuple(draw(st.lists(st.sampled_from([0, 1, 1, 5, 31, 32, 70]), min_size=1, max_size=6)))
        adapters = tuple(draw(st.integers(-1, len(ranks) - 1)) for _ in lengths)
        num_rows = sum(lengths)
    dtype = draw(st.sampled_from(DTYPES))
    return problem(
        num_rows,
        draw(st.one_of(st.integers(1, 40), st.integers(1, 600), st.sampled_from([128, 256]))),
        ranks, lengths, adapters,
        seed=draw(st.integers(0, 2**31)),
        dropout=draw(st.sampled_from([0, 0, 0.1, 0.5])),
        one_scale=draw(st.booleans()),
        turned=draw(st.booleans()),
        dtype=dtype,
        factor_dtype=draw(st.sampled_from([dtype, torch.float32])),
    )  # fmt: skip


@pytest.mark.usefixtures("few_programs")
@settings(max_examples=25)
@given(p=problems())
def test_random_problems(p: Problem) -> None:
    check(p)


SEGMENTS = {"lengths": (0, 33, 1, 0, 40, 2, 1), "adapters": (0, 2, -1, 1, 1, 2, 3)}  # 3 has rank 0, 0 no row


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dropout", [0, 0.3])
@pytest.mark.parametrize("factor_dtype", ["own", "float32"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_types(dtype: torch.dtype, factor_dtype: str, dropout: float) -> None:
    options = {"dtype": dtype, "factor_dtype": dtype if factor_dtype == "own" else torch.float32, "dropout": dropout}
    check(problem(70, 300, (5, 7), **options))
    check(problem(77, 140, (48, 5, 16, 0), **SEGMENTS, **options))


def test_as_many_programs_as_on_a_gpu() -> None:
    check(problem(70, 300, (16, 5), dtype=torch.bfloat16))
    check_shrink(problem(77, 140, (20, 5, 16, 0), **SEGMENTS))


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("dtype", DTYPES)
def test_factors_apart(dtype: torch.dtype) -> None:
    """Each of its own scale, in other columns than side by side; columns of no factor become 0."""
    p = problem(40, 150, (5, 0, 16), one_scale=False, dtype=dtype)
    p.columns = [20, 3, 2]
    p.coefficients = torch.randn(40, 30, dtype=torch.float64)
    check(p)
    p.scales = [0.5] * 3
    p.columns = [4, 9, 9]
    check(p)


@pytest.mark.usefixtures("few_programs")
def test_more_adapters_than_one_launch_describes() -> None:
    count = kernels.ENTRIES // 3 + 2
    ranks = tuple(1 + i % 4 for i in range(count))
    check(problem(2 * count, 30, ranks, (2,) * count, tuple(reversed(range(count))), one_scale=False))


@pytest.mark.usefixtures("few_programs")
def test_an_adapter_without_rows_has_no_gradient() -> None:
    p = problem(77, 40, (48, 5, 16, 0), **SEGMENTS)
    sums, grads = check_shrink(p)
    assert (grads[0] == 0).all()
    assert (sums[33] == 0).all()
    assert (sums[76] == 0).all()


@pytest.mark.parametrize("wanted", [(True, False, True), (False, False, False)])
def test_gradients_left_out(wanted: tuple[bool, ...]) -> None:
    p = problem(20, 40, (3, 5, 2))
    _, every = check_shrink(p, sums=False)
    grads = [torch.empty_like(grad) if want else None for grad, want in zip(every, wanted, strict=True)]
    kernels.lora_shrink(p.x.float(), *p.arguments(), coefficients=p.coefficients.float(), gradients=grads)
    for grad, expected in zip(grads, every, strict=True):
        assert grad is None or torch.equal(grad, expected)


@pytest.mark.usefixtures("few_programs")
@pytest.mark.parametrize("seed", [0, 2**32 - 2, 2**63 - 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_mask_is_that_of_the_reference(dtype: torch.dtype, seed: int) -> None:
    num_rows, size = 40, 150
    dropout = Dropout(0.4, torch.tensor([seed]))
    truth = keep_mask(num_rows, size, dropout)
    out, ones = torch.zeros(num_rows, size, dtype=dtype), torch.ones(num_rows, size, dtype=dtype)
    kernels.lora_expand(out, torch.ones(num_rows, 1), [torch.ones(1, size)], [1.0], [0], None, dropout)
    torch.testing.assert_close(out, truth.to(dtype))
    identity = torch.eye(num_rows)
    for factor_dtype in (dtype, torch.float32):
        grad = torch.empty(num_rows, size, dtype=factor_dtype)
        factors = [torch.empty(num_rows, size, dtype=factor_dtype)]
        kernels.lora_shrink(ones, factors, [1.0], [0], None, dropout, coefficients=identity, gradients=[grad])
        torch.testing.assert_close(grad, truth.to(factor_dtype))
        sums, factors = torch.empty(num_rows, size), [torch.eye(size, dtype=factor_dtype)]
        kernels.lora_shrink(ones, factors, [1.0], [0], None, dropout, sums=sums)
        torch.testing.assert_close(sums, truth.float())


def test_float32_factors_keep_their_bits() -> None:
    """All 24, beside bfloat16 x, where two parts would hold 16."""
    factor = torch.full((1, 1), 1 / 3)
    for sums, c in ((torch.empty(1, 1), None), (None, factor)):
        grads = [torch.empty(1, 1)]
        x = torch.ones(1, 1, dtype=torch.bfloat16)
        kernels.lora_shrink(x, [factor], [1.0], [0], sums=sums, coefficients=c, gradients=grads)
        assert torch.equal(factor, grads[0] if sums is None else sums)


@pytest.mark.usefixtures("few_programs")
def test_nan_stays_in_its_row() -> None:
    for p in (problem(77, 150, (5, 16)), problem(77, 150, (48, 5, 16, 0), **SEGMENTS)):
        clean, _ = check_shrink(p, gradients=False)
        clean_out = check_expand(p)
        others = torch.arange(77) != 35  # in segments, the first row of the adapter 1
        p.x[35] = torch.nan
        sums = torch.empty_like(clean)
        kernels.lora_shrink(p.x.float(), *p.arguments(), sums=sums)
        assert torch.equal(sums[others], clean[others])
        assert sums[35].isnan().any()
        if p.segments is not None:
            grads = [torch.empty_like(factor, dtype=torch.float32) for factor in p.factors]
            kernels.lora_shrink(p.x.float(), *p.arguments(), coefficients=p.coefficients.float(), gradients=grads)
            assert [bool(grad.isnan().any()) for grad in grads] == [False, True, False, False]
        out = p.x.float()
        kernels.lora_expand(out, p.coefficients.float(), *p.arguments())
        assert torch.equal(out[others], clean_out[others])


@pytest.mark.usefixtures("few_programs")
def test_the_same_bits_again() -> None:
    for p in (problem(77, 300, (5, 7), dropout=0.2), problem(77, 140, (48, 5, 16, 0), **SEGMENTS)):
        (sums, grads), (again, grads_again) = check_shrink(p), check_shrink(p)
        assert torch.equal(sums, again)
        assert all(map(torch.equal, grads, grads_again))
        assert torch.equal(check_expand(p), check_expand(p))


@pytest.mark.parametrize("offsets", [[-9, 7, 2**40], [15, 3, 9], [2**40, -(2**40), 5], [25, 30, 35], [40, 60, 90]])
@pytest.mark.parametrize("adapters", [[0, 1], [2, -2], [2**40, -(2**40)]])
def test_segments_are_not_trusted(offsets: list[int], adapters: list[int]) -> None:
    """Nothing outside is written; what far numbers would read crashes."""
    p = problem(20, 40, (3, 5), (10, 10), (0, 1))
    p = replace(p, segments=Segments(torch.tensor(offsets), torch.tensor(adapters)))
    x, found, coefficients = padded(p.x, torch.float32), *(padded(torch.ones(20, 5), torch.float32) for _ in range(2))
    grads = [torch.empty_like(factor, dtype=torch.float32) for factor in p.factors]
    kernels.lora_shrink(inner(x), *p.arguments(), sums=inner(found), coefficients=inner(coefficients), gradients=grads)
    kernels.lora_expand(inner(x), inner(coefficients), *p.arguments())
    for tensor in (x, found):
        assert_padding_is_untouched(tensor)
        assert torch.isfinite(inner(tensor)).all()
    assert all(torch.isfinite(grad).all() for grad in grads)


def test_empty() -> None:
    for num_rows, size, ranks in ((0, 5, (3, 2)), (4, 0, (3,)), (4, 5, (0, 0)), (4, 5, ()), (0, 0, ())):
        check(problem(num_rows, size, ranks))
        check(problem(num_rows, size, ranks, (num_rows,), (-1,)))
    check(problem(0, 5, (3, 2), (), ()))
