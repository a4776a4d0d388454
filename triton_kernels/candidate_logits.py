# ruff: noqa: N803  compile-time arguments are in capitals, as is usual with Triton
"""Logits of a few vocabulary entries; python/rankernel/reference/candidate_logits.py has the formula.

A few logits are a program each: a dot product, which waits for its loads and little else. From MATRIX_FROM logits on,
where the rows share their candidates, and for the log-sum-exp, a program multiplies a tile of weights with 16, 32 or
64 rows. The weights are the long side of that product: a small batch pads little, and up to 64 rows read them once.

Every tile leaves its part of the log-sum-exp as exp(peak) total, and a last kernel adds the parts of a row up: no
atomics, and the same bits on every call.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl

from ._common import CompileCase, tanh

ENTRIES = 128  # of the vocabulary in a tile
TILE_BYTES = 128  # of every weight and hidden row that one step multiplies: a line of shared memory
BLOCK = 2048  # elements of a lone dot product that one step takes
PARTS = 1024  # partial sums that one step adds up
WARPS, TILE_WARPS = 4, 8
MATRIX_FROM = 1 << 14  # logits; fewer would leave most of a GPU without a tile

_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # exp(_LOWEST - anything) is 0, and never NaN as with -inf


@triton.jit
def _finish(x, ids, valid, bias, scale, softcap):
    """The logits z made of products x; ids and valid are broadcast against x."""
    if bias is not None:
        x += tl.load(bias + ids, mask=valid, other=0).to(tl.float32)
    x *= scale
    if softcap is not None:
        x = softcap * tanh(x / softcap)
    return x


@triton.jit
def _tile(num_rows, ROWS: tl.constexpr):
    """Rows and number of this program's tile. One weight's programs run together, while the L2 cache holds it."""
    blocks = tl.cdiv(num_rows, ROWS)
    return tl.program_id(0) % blocks * ROWS + tl.arange(0, ROWS), tl.program_id(0) // blocks


@triton.jit
def _tile_logits(
    hidden, weight, bias, rows, ids, valid, num_rows, hidden_size, hidden_stride, weight_stride, scale, softcap,
    ROWS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Logits [ENTRIES, ROWS], unspecified for ids that are not valid and rows beyond the last."""
    # These read the first entry and row: a mask that varied from row to row would make loads shorter than 16 bytes.
    ids, rows = tl.where(valid, ids, 0), tl.where(rows < num_rows, rows, 0)
    w = weight + ids.to(tl.int64)[:, None] * weight_stride
    h = hidden + rows.to(tl.int64)[None, :] * hidden_stride
    products = tl.zeros([ENTRIES, ROWS], tl.float32)
    for first in range(0, hidden_size, BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        weights = tl.load(w + columns[None, :], mask=inside[None, :], other=0)
        states = tl.load(h + columns[:, None], mask=inside[:, None], other=0)
        products = tl.dot(weights, states, products, input_precision="ieee")
    return _finish(products, ids[:, None], valid[:, None], bias, scale, softcap)


@triton.jit(do_not_specialize=["num_candidates", "vocabulary"])
def _dot_kernel(
    hidden, weight, candidates, bias, out, num_candidates, vocabulary, hidden_size, hidden_stride, weight_stride,
    scale, softcap, SHARED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One logit."""
    place = tl.program_id(0)
    row = place // num_candidates
    entry = tl.load(candidates + (place - row * num_candidates if SHARED else place))
    valid = (entry >= 0) & (entry < vocabulary)
    w = weight + entry * weight_stride
    h = hidden + row.to(tl.int64) * hidden_stride
    products = tl.zeros([BLOCK], tl.float32)
    for first in range(0, tl.where(valid, hidden_size, 0), BLOCK):
        columns = first + tl.arange(0, BLOCK)
        inside = columns < hidden_size
        weights = tl.load(w + columns, mask=inside, other=0).to(tl.float32)
        products += weights * tl.load(h + columns, mask=inside, other=0).to(tl.float32)
    z = _finish(tl.sum(products, axis=0), entry, valid, bias, scale, softcap)
    tl.store(out + place, tl.where(valid, z, float("nan")))


@triton.jit(do_not_specialize=["num_rows", "num_candidates", "vocabulary"])
def _matrix_kernel(
    hidden, weight, candidates, bias, out, num_rows, num_candidates, vocabulary, hidden_size, hidden_stride,
    weight_stride, scale, softcap, ROWS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A tile of logits of candidates that all rows share."""
    rows, tile = _tile(num_rows, ROWS)
    places = tile * ENTRIES + tl.arange(0, ENTRIES)
    ids = tl.load(candidates + places, mask=places < num_candidates, other=-1)
    valid = (ids >= 0) & (ids < vocabulary)
    z = _tile_logits(
        hidden, weight, bias, rows, ids, valid, num_rows, hidden_size, hidden_stride, weight_stride, scale, softcap,
        ROWS, ENTRIES, BLOCK,
    )  # fmt: skip
    place = rows.to(tl.int64)[None, :] * num_candidates + places[:, None]
    inside = (rows < num_rows)[None, :] & (places < num_candidates)[:, None]
    tl.store(out + place, tl.where(valid[:, None], z, float("nan")), mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_parts", "vocabulary"])
def _part_kernel(
    hidden, weight, bias, peaks, totals, num_rows, num_parts, vocabulary, hidden_size, hidden_stride, weight_stride,
    scale, softcap, ROWS: tl.constexpr, ENTRIES: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """exp(peak) total = sum of exp(z) over a tile of the vocabulary, [B, parts]."""
    rows, tile = _tile(num_rows, ROWS)
    ids = tile * ENTRIES + tl.arange(0, ENTRIES)
    valid = ids < vocabulary
    z = _tile_logits(
        hidden, weight, bias, rows, ids, valid, num_rows, hidden_size, hidden_stride, weight_stride, scale, softcap,
        ROWS, ENTRIES, BLOCK,
    )  # fmt: skip
    z = tl.where(valid[:, None], z, float("-inf"))
    # Above -inf also where a bias of -inf rules out the whole tile. A NaN comes out of the sum.
    peak = tl.maximum(tl.max(z, axis=0), _LOWEST)
    place = rows.to(tl.int64) * num_parts + tile
    tl.store(peaks + place, peak, mask=rows < num_rows)
    tl.store(totals + place, tl.sum(tl.exp(z - peak[None, :]), axis=0), mask=rows < num_rows)


@triton.jit(do_not_specialize=["num_parts", "num_candidates"])
def _combine_kernel(peaks, totals, out, lse, num_parts, num_candidates, BLOCK: tl.constexpr):
    """Log-sum-exp of a row from its parts, taken off the row's logits."""
    row = tl.program_id(0).to(tl.int64)
    peak, total = tl.full([BLOCK], _LOWEST, tl.float32), tl.zeros([BLOCK], tl.float32)
    for first in range(0, num_parts, BLOCK):
        parts = first + tl.arange(0, BLOCK)
        part_peak = tl.load(peaks + row * num_parts + parts, mask=parts < num_parts, other=_LOWEST)
        part_total = tl.load(totals + row * num_parts + parts, mask=parts < num_parts, other=0)
        top = tl.maximum(peak, part_peak)
        total = total * tl.exp(peak - top) + part_total * tl.exp(part_peak - top)
        peak = top
    top = tl.max(peak, axis=0)
    log_sum = top + tl.log(tl.sum(total * tl.exp(peak - top), axis=0))
    tl.store(lse + row, log_sum)
    for first in range(0, num_candidates, BLOCK):
        places = first + tl.arange(0, BLOCK)
        z = out + row * num_candidates + places
        tl.store(z, tl.load(z, mask=places < num_candidates) - log_sum, mask=places < num_candidates)


def candidate_logits(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    candidates: torch.Tensor,
    bias: torch.Tensor | None,
    scale: float,
    softcap: float | None,
    log_probs: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits or log-probabilities; see :func:`rankernel.candidate_logits`. Never waits for the device.

    Work memory of log-probabilities is two numbers a row and 128 vocabulary entries.

    Args:
        hidden: [B, E], float32, bfloat16 or float16, last dimension contiguous.
        weight: [V, E], dtype of hidden, last dimension contiguous.
        candidates: [C] or [B, C], int64, contiguous; out of [0, V) gives NaN.
        bias: [V], dtype of weight, contiguous, or None.
        scale: multiplies the logits.
        softcap: positive, or None.
        log_probs: subtract the log-sum-exp over the vocabulary.

    Returns:
        The result, float32 [B, C], and the log-sum-exp, float32 [B], or [0] without ``log_probs``.
    """
    num_rows, hidden_size = hidden.shape
    vocabulary, num_candidates = weight.shape[0], candidates.shape[-1]
    shared = candidates.dim() == 1
    out = hidden.new_empty((num_rows, num_candidates), dtype=torch.float32)
    lse = hidden.new_empty(num_rows if log_probs else 0, dtype=torch.float32)
    last = (vocabulary, hidden_size, hidden.stride(0), weight.stride(0), scale, softcap)
    plain = {"num_warps": WARPS, "enable_fp_fusion": True}
    # Few sizes, so that batches of every size share three compilations.
    rows = min(max(triton.next_power_of_2(num_rows), 16), 64)
    tile = {"ROWS": rows, "ENTRIES": ENTRIES, "BLOCK": TILE_BYTES // hidden.element_size()}
    tile |= plain | {"num_warps": TILE_WARPS}
    row_blocks = triton.cdiv(num_rows, rows)
    if shared and vocabulary and out.numel() >= MATRIX_FROM:
        _matrix_kernel[(row_blocks * triton.cdiv(num_candidates, ENTRIES),)](
            hidden, weight, candidates, bias, out, num_rows, num_candidates, *last, **tile
        )
    else:
        _dot_kernel[(out.numel(),)](
            hidden, weight, candidates, bias, out, num_candidates, *last, SHARED=shared, BLOCK=BLOCK, **plain
        )
    if log_probs:
        num_parts = triton.cdiv(vocabulary, ENTRIES)
        peaks, totals = hidden.new_empty((2, num_rows, num_parts), dtype=torch.float32)
        _part_kernel[(row_blocks * num_parts,)](hidden, weight, bias, peaks, totals, num_rows, num_parts, *last, **tile)
        _combine_kernel[(num_rows,)](peaks, totals, out, lse, num_parts, num_candidates, BLOCK=PARTS, **plain)
    return out, lse


_TYPES = {
    "candidates": "*i64", "out": "*fp32", "lse": "*fp32", "peaks": "*fp32", "totals": "*fp32", "num_rows": "i32",
    "num_candidates": "i32", "vocabulary": "i32", "num_parts": "i32", "hidden_size": "i32", "hidden_stride": "i32",
    "weight_stride": "i32", "scale": "fp32", "softcap": "fp32",
}  # fmt: skip
_NO_BIAS, _NO_SOFTCAP = {"bias": None}, {"softcap": None}
_PLAIN = _NO_BIAS | _NO_SOFTCAP


def _case(kernel: Any, dtype: str, constants: dict[str, object]) -> CompileCase:
    types = _TYPES | dict.fromkeys(("hidden", "weight", "bias"), f"*{dtype}")
    signature = {name: "constexpr" if name in constants else types[name] for name in kernel.arg_names}
    return CompileCase(kernel, signature, constants, TILE_WARPS if "ROWS" in constants else WARPS)


def _tile_case(kernel: Any, dtype: str, rows: int, constants: dict[str, object]) -> CompileCase:
    block = TILE_BYTES // (4 if dtype == "fp32" else 2)
    return _case(kernel, dtype, {"ROWS": rows, "ENTRIES": ENTRIES, "BLOCK": block} | constants)


COMPILE_CASES = (
    _case(_dot_kernel, "fp32", {"SHARED": True, "BLOCK": BLOCK}),
    _case(_dot_kernel, "bf16", {"SHARED": True, "BLOCK": BLOCK} | _PLAIN),
    _case(_dot_kernel, "fp16", {"SHARED": False, "BLOCK": BLOCK} | _NO_BIAS),
    _tile_case(_matrix_kernel, "fp32", 64, {}),
    _tile_case(_matrix_kernel, "bf16", 16, _PLAIN),
    _tile_case(_matrix_kernel, "bf16", 64, _NO_BIAS),
    _tile_case(_matrix_kernel, "fp16", 64, _NO_SOFTCAP),
    _tile_case(_part_kernel, "fp32", 16, _PLAIN),
    _tile_case(_part_kernel, "fp32", 64, {}),
    _tile_case(_part_kernel, "bf16", 16, _PLAIN),
    _tile_case(_part_kernel, "bf16", 32, _NO_BIAS),
    _tile_case(_part_kernel, "bf16", 64, {}),
    _tile_case(_part_kernel, "fp16", 64, _NO_SOFTCAP),
    _case(_combine_kernel, "fp32", {"BLOCK": PARTS}),
)
