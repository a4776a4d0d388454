"""Block-sparse attention against what PyTorch offers for the same mask.

Peers: SDPA with the dense mask, SDPA causal (which attends to everything before, so its result is another one), one
SDPA call per document, FlexAttention compiled, and the padded blocks of the published BlockRank code. Forward and
backward: one SDPA call per document.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import rankernel
from cases.lora_linear import expected_of
from measure import Call, Case, Expected, Finding, Implementation, Problem
from rankernel import _C, BlockLayout, reference
from rankernel.layout import DOCUMENT, PREFIX, TAIL
from workloads import attention_flops, causal_pairs, in_words, matmul, ranking_list, visible_pairs

Lengths = Sequence[tuple[int, list[int], int]]
OP = "block_attention"


class Inputs:
    """Random query, key and value over a layout, made when first used."""

    def __init__(self, lengths: Lengths, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
        self.layout = BlockLayout.from_lengths(lengths)
        self.query_heads, self.kv_heads, self.head_size = heads
        self.dtype = dtype
        self.expected = Expected(lambda: self._reference(torch.float64), lambda: self._reference(dtype))

    @property
    def flops(self) -> int:
        return attention_flops(visible_pairs(self.layout), self.query_heads, self.head_size)

    @cached_property
    def packed(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """query [T, Hq, D], key and value [T, Hkv, D]."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(self.layout.num_tokens, heads, self.head_size, generator=generator).to(self.dtype)
            for heads in (self.query_heads, self.kv_heads, self.kv_heads)
        )
        return query, key, value

    @property
    def batched(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """The same as [1, heads, T, D] views, as SDPA and FlexAttention take them."""
        query, key, value = (tensor.transpose(0, 1)[None] for tensor in self.packed)
        return query, key, value

    @cached_property
    def block_mask(self) -> BlockMask:
        return build_block_mask(self.layout)

    def _reference(self, dtype: torch.dtype) -> torch.Tensor:
        """The reference, one KV head at a time to bound its memory."""
        group = self.query_heads // self.kv_heads
        query, key, value = (tensor.to(dtype) for tensor in self.packed)
        parts = []
        for head in range(self.kv_heads):
            rows, columns = slice(head * group, (head + 1) * group), slice(head, head + 1)
            out, _ = reference.block_attention(query[:, rows], key[:, columns], value[:, columns], self.layout)
            parts.append(out)
        return torch.cat(parts, dim=1)


def _unbatched(out: torch.Tensor) -> torch.Tensor:
    """[1, H, T, D] as [T, H, D], without a copy."""
    return out[0].transpose(0, 1)


def native(inputs: Inputs) -> Call:
    """rankernel."""
    query, key, value = inputs.packed

    def call() -> torch.Tensor:
        out = rankernel.block_attention(query, key, value, inputs.layout)
        assert isinstance(out, torch.Tensor)
        return out

    return call


def sdpa_dense(inputs: Inputs) -> Call:
    """One SDPA call with the mask as a bool [T, T] tensor."""
    query, key, value = inputs.batched
    mask = inputs.layout.dense_mask()
    return lambda: _unbatched(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True))


def sdpa_causal(inputs: Inputs) -> Call:
    """One causal SDPA call: every token attends to all documents before it, which is another result."""
    query, key, value = inputs.batched
    return lambda: _unbatched(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))


def sdpa_per_segment(inputs: Inputs) -> Call:
    """One SDPA call per prefix, document and tail; the small masks are made beforehand."""
    query, key, value = inputs.batched
    steps = []
    for segments in inputs.layout.segments():
        first, prefix_end, _ = segments[0]
        for begin, end, role in segments:
            if begin < end:
                seen = [(first, prefix_end), (begin, end)] if role == DOCUMENT else [(first, end)]
                columns = sum(stop - start for start, stop in seen)
                mask = torch.ones(end - begin, columns, dtype=torch.bool).tril(columns - (end - begin))
                steps.append((begin, end, seen, mask))

    def visible(tensor: torch.Tensor, seen: list[tuple[int, int]]) -> torch.Tensor:
        parts = [tensor[:, :, start:stop] for start, stop in seen]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def call() -> torch.Tensor:
        parts = []
        for begin, end, seen, mask in steps:
            rows, keys, values = query[:, :, begin:end], visible(key, seen), visible(value, seen)
            parts.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, enable_gqa=True))
        return _unbatched(torch.cat(parts, dim=2))

    return call


def build_block_mask(layout: BlockLayout) -> BlockMask:
    """The block mask of a layout for FlexAttention, from the segment, role and list of every token."""
    lengths = layout.cu_seqlens.diff().long()
    segment = torch.arange(lengths.numel()).repeat_interleave(lengths)
    role = layout.roles.repeat_interleave(lengths)
    owner = torch.arange(layout.num_lists).repeat_interleave(layout.list_offsets.diff().long())[segment]

    def visible(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        block = (segment[row] == segment[key]) | (role[key] == PREFIX) | (role[row] == TAIL)
        return (row >= key) & (owner[row] == owner[key]) & block

    return create_block_mask(visible, None, None, layout.num_tokens, layout.num_tokens, device="cpu")


def flex(inputs: Inputs) -> Call:
    """FlexAttention compiled by inductor with static shapes."""
    query, key, value = inputs.batched
    block_mask = inputs.block_mask
    torch._dynamo.reset()  # else the recompile limit, reached over many cases, falls back to eager
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    return lambda: _unbatched(compiled(query, key, value, block_mask=block_mask, enable_gqa=True))


def padded_blocks(inputs: Inputs) -> Call:
    """The formulation of the published BlockRank code: all blocks of a list padded to one width, then batched.

    The width is the longest block rounded up to 16; documents are one batch of SDPA over ``[prefix; own]`` keys,
    prefix and tail one call each (arXiv 2510.05396). Masks and indices are made beforehand, the gather from packed
    rows to blocks and back is part of the call.
    """
    lists = [_padded_list(segments) for segments in inputs.layout.segments()]
    query, key, value = inputs.packed
    return lambda: torch.cat([attend(query, key, value) for attend in lists])


def _padded_list(segments: list[tuple[int, int, int]]) -> Callable[..., torch.Tensor]:
    begins = torch.tensor([begin for begin, _, _ in segments])
    lengths = torch.tensor([end - begin for begin, end, _ in segments])
    width = -(-int(lengths.max()) // 16) * 16
    offset = torch.arange(width)
    valid = offset < lengths[:, None]
    index = torch.where(valid, begins[:, None] + offset, segments[0][0])
    own = (offset[:, None] >= offset) & valid[:, None, :]
    documents = len(segments) - 2
    document_mask = torch.cat([valid[0].expand(documents, width, width), own[1:-1]], dim=-1)[:, None]
    tail_mask = torch.cat([valid[:-1].flatten().expand(width, -1), own[-1]], dim=-1)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        sdpa = partial(F.scaled_dot_product_attention, enable_gqa=True)
        q, k, v = (tensor[index].transpose(1, 2) for tensor in (query, key, value))  # [blocks, heads, width, D]
        keys, values = (torch.cat([t[:1].expand(documents, -1, -1, -1), t[1:-1]], dim=2) for t in (k, v))
        all_keys, all_values = (t.transpose(0, 1).flatten(1, 2)[None] for t in (k, v))
        out = [
            sdpa(q[:1], k[:1], v[:1], attn_mask=own[0]),
            sdpa(q[1:-1], keys, values, attn_mask=document_mask),
            sdpa(q[-1:], all_keys, all_values, attn_mask=tail_mask),
        ]
        return torch.cat(out).transpose(1, 2)[valid]

    return attend


def attention_problem(lengths: Lengths, heads: tuple[int, int, int], with_matmul: bool, dtype: torch.dtype) -> Problem:
    """rankernel and all peers on one shape."""
    inputs = Inputs(lengths, heads, dtype)
    expected, flops = inputs.expected, inputs.flops
    causal_flops = attention_flops(causal_pairs(inputs.layout.num_tokens), inputs.query_heads, inputs.head_size)
    rows = (
        Implementation("rankernel", lambda: native(inputs), expected, flops, native_op=OP),
        Implementation("FlexAttention compiled", lambda: flex(inputs), expected, flops),
        Implementation("FlexAttention mask building", lambda: lambda: _discard(build_block_mask(inputs.layout))),
        Implementation("SDPA dense mask", lambda: sdpa_dense(inputs), expected, flops),
        Implementation("dense mask building", lambda: inputs.layout.dense_mask),
        Implementation("SDPA causal (other mask)", lambda: sdpa_causal(inputs), expected, causal_flops),
        Implementation("SDPA per document", lambda: sdpa_per_segment(inputs), expected, flops),
        Implementation("padded blocks (BlockRank)", lambda: padded_blocks(inputs), expected, flops),
    )
    return Problem((*rows, matmul(dtype)) if with_matmul else rows)


def _discard(_: object) -> None:
    """For calls whose result is no tensor."""


def backward_problem(lengths: Lengths, heads: tuple[int, int, int], with_matmul: bool, dtype: torch.dtype) -> Problem:
    """Forward and backward by rankernel and by one SDPA call per segment; results are dQ, dK and dV."""
    inputs = Inputs(lengths, heads, dtype)
    upstream = torch.randn(inputs.packed[0].shape, generator=torch.Generator().manual_seed(1)).to(dtype)

    def gradients(build: Callable[[Inputs], Call]) -> Callable[[], tuple[torch.Tensor, ...]]:
        with torch.enable_grad():
            leaves = [tensor.requires_grad_() for tensor in inputs.packed]
            forward = build(inputs)

        def call() -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(forward(), leaves, upstream)

        return call

    def by_autograd(wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            leaves = [tensor.detach().to(wide).requires_grad_() for tensor in inputs.packed]
            out, _ = reference.block_attention(*leaves, inputs.layout)
            return torch.autograd.grad(out, leaves, upstream.to(wide))

    expected = expected_of(partial(by_autograd, torch.float64), partial(by_autograd, dtype), 3)
    work = 7 * inputs.flops // 2  # five products of the size of the forward pass's two
    rows = (
        Implementation("rankernel", lambda: gradients(native), expected, work, native_op=OP),
        Implementation("SDPA per document", lambda: gradients(sdpa_per_segment), expected, work),
    )
    return Problem((*rows, matmul(dtype)) if with_matmul else rows)


def scaling_problem(small: Lengths, large: Lengths, heads: tuple[int, int, int], dtype: torch.dtype) -> Problem:
    """rankernel on two sizes in the same rounds."""
    rows = []
    for lengths in (small, large):
        inputs = Inputs(lengths, heads, dtype)
        name = f"rankernel {inputs.layout.num_documents} documents"
        build = partial(native, inputs)
        rows.append(Implementation(name, build, inputs.expected, inputs.flops, native_op=OP))
    sizes = [sum(len(documents) for _, documents, _ in lengths) for lengths in (large, small)]
    text = f"{sizes[0]} documents cost {{}} times as much as {sizes[1]}"
    return Problem((*rows, matmul(dtype)), (Finding("cost_ratio", text, of=rows[1].name, over=rows[0].name),))


def overhead_problem(lengths: Lengths, heads: tuple[int, int, int], dtype: torch.dtype) -> Problem:
    """An eager call on next to no work, and the same call of the native function alone."""
    inputs = Inputs(lengths, heads, dtype)
    rows = (
        Implementation("rankernel", lambda: native(inputs), inputs.expected, native_op=OP),
        Implementation(
            "rankernel._C alone", lambda: native_alone(inputs), inputs.expected, native_op=OP, compare=False
        ),
        Implementation("SDPA dense mask", lambda: sdpa_dense(inputs), inputs.expected),
    )
    text = "Python overhead of an eager call: {}"
    return Problem(rows, (Finding("python_overhead", text, rows[0].name, rows[1].name, "s"),))


def native_alone(inputs: Inputs) -> Call:
    """The native function with the arguments that an eager call passes to it."""
    query, key, value = inputs.packed
    function = _C.block_attention
    with mock.patch.object(_C, "block_attention", side_effect=function) as spy:
        out, lse = rankernel.block_attention(query, key, value, inputs.layout, return_lse=True)
    arguments = spy.call_args.args

    def call() -> torch.Tensor:
        function(*arguments)
        return out

    call.keep_alive = (query, key, value, lse)  # type: ignore[attr-defined]  # the arguments are addresses
    return call


def _case(
    name: str, lengths: Lengths, heads: tuple[int, int, int], seconds: float = 20.0, default: bool = False
) -> Case:
    shape = in_words(BlockLayout.from_lengths(lengths), *heads)
    build = partial(attention_problem, lengths, heads, name != "tiny")
    return Case(name, shape, build, seconds=seconds, default=default)


QWEN3_HEADS = (16, 8, 128)
MISTRAL_HEADS = (32, 8, 128)

CASES = (
    _case("tiny", [(8, [5, 1, 12], 4), (3, [7], 2)], (4, 2, 16), seconds=0.1),
    _case("20-documents", [ranking_list(20)], QWEN3_HEADS, seconds=5.0, default=True),
    _case("100-documents", [ranking_list(100)], QWEN3_HEADS),
    _case("100-snippets", [ranking_list(100, shortest=8, longest=24, prefix=24, tail=8)], QWEN3_HEADS),
    _case("30-passages-mistral", [ranking_list(30, shortest=256, longest=384, prefix=96)], MISTRAL_HEADS),
    _case("8-lists-of-20", [ranking_list(20)] * 8, QWEN3_HEADS),
    *(
        Case(
            name,
            in_words(BlockLayout.from_lengths(lengths), *heads) + ", forward and backward",
            partial(backward_problem, lengths, heads, name != "tiny-backward"),
            seconds=seconds,
        )
        for name, lengths, heads, seconds in (
            ("tiny-backward", [(8, [5, 1, 12], 4), (3, [7], 2)], (4, 2, 16), 0.1),
            ("30-documents-backward", [(32, [160] * 30, 48)], QWEN3_HEADS, 20.0),
        )
    ),
    Case(
        "400-vs-100",
        "100-documents against the same with 400 documents",
        partial(scaling_problem, [ranking_list(100)], [ranking_list(400)], QWEN3_HEADS),
        seconds=10.0,
    ),
    Case(
        "call-overhead",
        in_words(BlockLayout.from_lengths([(0, [8], 0)]), 2, 2, 8),
        partial(overhead_problem, [(0, [8], 0)], (2, 2, 8)),
        dtypes=(torch.float32,),
        seconds=2.0,
        default=True,
    ),
)
