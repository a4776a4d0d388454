"""Block-sparse attention against what PyTorch offers for the same mask.

Peers: SDPA with the dense mask, SDPA causal (which attends to everything before, so its result is another one), one
SDPA call per document, FlexAttention compiled, and the padded blocks of the published BlockRank code. Forward and
backward: one SDPA call per document. On a GPU also variable-length attention, BlockRank's own kernel, every kernel of
SDPA and two block sizes of FlexAttention, tuned.
"""

from __future__ import annotations

import contextlib
import inspect
import itertools
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

import rankernel
from cases.lora_linear import expected_of
from measure import Call, Case, Expected, Finding, Implementation, Problem
from rankernel import _C, BlockLayout, reference
from rankernel.layout import DOCUMENT, PREFIX, TAIL
from workloads import attention_flops, causal_pairs, in_words, matmul, padded_index, ranking_list, visible_pairs

Lengths = Sequence[tuple[int, list[int], int]]
Packed = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""query, key and value; [T, heads, D] each"""
Segments = list[tuple[int, int, int]]
"""begin, end and role of those of one list"""
Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
OP = "block_attention"
DENSE_TOKENS = 20_000  # at most, for the rows with a mask of T x T
LOOPED_DOCUMENTS = 100  # at most, for the row with a call for each on a GPU
MASK_PIECE = 2**30  # pairs of tokens that one call of create_block_mask looks at
FLEX = {
    "cpu": {"FlexAttention compiled": 128},
    "triton": {"FlexAttention compiled 128": 128, "FlexAttention compiled 64": 64},
}
"""Rows and their block sizes by the backend of rankernel's rows."""
CAUSAL: dict[str, dict[str, SDPBackend | None]] = {
    "cpu": {"SDPA causal (other mask)": None},
    "triton": {
        "SDPA causal flash (other mask)": SDPBackend.FLASH_ATTENTION,
        "SDPA causal cuDNN (other mask)": SDPBackend.CUDNN_ATTENTION,
        "SDPA causal efficient (other mask)": SDPBackend.EFFICIENT_ATTENTION,
    },
}
"""Rows and the kernel that SDPA is held to, likewise."""


class Inputs:
    """Random query, key and value over a layout, made when first used; the same numbers on every device.

    The backend of rankernel's rows also says which peers there are and how they run: ``"cpu"`` or ``"triton"``.
    """

    def __init__(
        self,
        lengths: Lengths,
        heads: tuple[int, int, int],
        dtype: torch.dtype,
        device: str = "cpu",
        backend: str = "cpu",
    ) -> None:
        self.layout = BlockLayout.from_lengths(lengths).to(device)
        self.query_heads, self.kv_heads, self.head_size = heads
        self.group = self.query_heads // self.kv_heads
        self.dtype, self.device, self.backend = dtype, device, backend
        self.expected = Expected(lambda: self._reference(torch.float64), lambda: self._reference(dtype))

    @property
    def flops(self) -> int:
        return attention_flops(visible_pairs(self.layout), self.query_heads, self.head_size)

    @cached_property
    def packed(self) -> Packed:
        """query [T, Hq, D], key and value [T, Hkv, D]."""
        generator = torch.Generator().manual_seed(0)
        query, key, value = (
            torch.randn(self.layout.num_tokens, heads, self.head_size, generator=generator).to(self.device, self.dtype)
            for heads in (self.query_heads, self.kv_heads, self.kv_heads)
        )
        return query, key, value

    @cached_property
    def repeated(self) -> Packed:
        """The same with a key and a value for every query head, which SDPA's efficient kernel needs up to PyTorch 2.13.

        Flash takes no mask, so that a mask over grouped heads would be left to cuDNN or to full logits.
        """
        query, key, value = self.packed
        return query, key.repeat_interleave(self.group, dim=1), value.repeat_interleave(self.group, dim=1)

    @property
    def for_masks(self) -> Packed:
        """What SDPA gets together with a mask."""
        return self.packed if self.backend == "cpu" else self.repeated

    @cached_property
    def upstream(self) -> torch.Tensor:
        """[T, Hq, D], a gradient of the result."""
        generator = torch.Generator().manual_seed(1)
        return torch.randn(self.packed[0].shape, generator=generator).to(self.device, self.dtype)

    @property
    def loops(self) -> bool:
        """Whether there is a row with one call per document: a GPU would mostly wait for many."""
        return self.backend == "cpu" or self.layout.num_documents <= LOOPED_DOCUMENTS

    @cached_property
    def compiled_flex(self) -> Callable[..., torch.Tensor]:
        """FlexAttention compiled by inductor with static shapes, for all block sizes.

        On a GPU tuned: the one configuration that is tried else has tiles of 128, which do not fit in blocks of 64. Not
        in float32, where that one fits and large tiles of IEEE products take long to compile.
        """
        torch._dynamo.reset()  # else the recompile limit, reached over many cases, falls back to eager
        tuned = self.backend != "cpu" and self.dtype != torch.float32
        options = {"max_autotune": True} if tuned else None
        return torch.compile(flex_attention, dynamic=False, fullgraph=True, options=options)

    def by_kv_head(self, dtype: torch.dtype) -> Iterator[Packed]:
        """One KV head with its query heads at a time, which bounds the memory of the reference."""
        query, key, value = (tensor.detach().to(dtype) for tensor in self.packed)
        return zip(query.split(self.group, dim=1), key.split(1, dim=1), value.split(1, dim=1), strict=True)

    def _reference(self, dtype: torch.dtype) -> torch.Tensor:
        """Time and memory are linear in the documents."""
        parts = [reference.block_attention(*head, self.layout)[0] for head in self.by_kv_head(dtype)]
        return torch.cat(parts, dim=1)


def _batched(packed: Packed) -> Packed:
    """As [1, heads, T, D] views, as SDPA and FlexAttention take them."""
    query, key, value = (tensor.transpose(0, 1)[None] for tensor in packed)
    return query, key, value


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
    query, key, value = _batched(inputs.for_masks)
    mask = inputs.layout.dense_mask()
    return lambda: _unbatched(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True))


def _only(kernel: SDPBackend | None) -> contextlib.AbstractContextManager[None]:
    """Holds SDPA to a kernel; None leaves it the choice."""
    return contextlib.nullcontext() if kernel is None else sdpa_kernel(kernel)


def sdpa_causal(inputs: Inputs, kernel: SDPBackend | None) -> Call:
    """One causal SDPA call: every token attends to all documents before it, which is another result.

    Heads of keys and values are repeated before the call for the one kernel that cannot share them.
    """
    query, key, value = _batched(inputs.repeated if kernel == SDPBackend.EFFICIENT_ATTENTION else inputs.packed)

    def call() -> torch.Tensor:
        with _only(kernel):
            return _unbatched(F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True))

    return call


def _steps(layout: BlockLayout) -> Iterator[tuple[int, int, list[tuple[int, int]]]]:
    """Rows ``begin, end`` of every segment that has any, and the ranges of tokens that its last row sees."""
    for segments in layout.segments():
        first, prefix_end, _ = segments[0]
        for begin, end, role in segments:
            if begin < end:
                yield begin, end, [(first, prefix_end), (begin, end)] if role == DOCUMENT else [(first, end)]


def _size(ranges: list[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def sdpa_per_segment(inputs: Inputs) -> Call:
    """One SDPA call per prefix, document and tail; the small masks are made beforehand.

    On a GPU by the efficient kernel: cuDNN would make a plan for every length.
    """
    query, key, value = _batched(inputs.for_masks)
    kernel = None if inputs.backend == "cpu" else SDPBackend.EFFICIENT_ATTENTION
    steps = []
    for begin, end, seen in _steps(inputs.layout):
        rows, columns = end - begin, _size(seen)
        mask = torch.ones(rows, columns, dtype=torch.bool, device=inputs.device).tril(columns - rows)
        steps.append((begin, end, seen, mask))

    def visible(tensor: torch.Tensor, seen: list[tuple[int, int]]) -> torch.Tensor:
        parts = [tensor[:, :, start:stop] for start, stop in seen]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)

    def call() -> torch.Tensor:
        parts = []
        with _only(kernel):
            for begin, end, seen, mask in steps:
                rows, keys, values = query[:, :, begin:end], visible(key, seen), visible(value, seen)
                parts.append(F.scaled_dot_product_attention(rows, keys, values, attn_mask=mask, enable_gqa=True))
        return _unbatched(torch.cat(parts, dim=2))

    return call


def varlen(inputs: Inputs) -> Call:
    """PyTorch's variable-length flash attention, one call: a sequence for every segment.

    Causal masks end in the bottom right corner, so the keys of a document are those of the prefix and its own. They are
    gathered in the call, by an index made beforehand. PyTorch 2.11 has no ``enable_gqa``: there its kernel takes
    grouped heads unasked.
    """
    from torch.nn.attention.varlen import varlen_attn

    query, key, value = inputs.packed
    steps = list(_steps(inputs.layout))
    rows, columns = [end - begin for begin, end, _ in steps], [_size(seen) for _, _, seen in steps]
    index = torch.cat([torch.arange(*place) for _, _, seen in steps for place in seen]).to(inputs.device)
    offsets = [
        torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=inputs.device)
        for lengths in (rows, columns)
    ]
    attend = partial(varlen_attn, window_size=(-1, 0))
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:
        attend = partial(attend, enable_gqa=True)

    def call() -> torch.Tensor:
        keys, values = key.index_select(0, index), value.index_select(0, index)
        return attend(query, keys, values, *offsets, max(rows), max(columns))

    return call


def build_block_mask(layout: BlockLayout, block_size: int = 128) -> BlockMask:
    """The block mask of a layout for FlexAttention, from the segment, role and list of every token.

    ``create_block_mask`` goes by way of the mask of T x T: of long rows it gets some at a time.
    """
    tokens, device = layout.num_tokens, layout.cu_seqlens.device
    lengths = layout.cu_seqlens.diff().long()
    segment = torch.arange(lengths.numel(), device=device).repeat_interleave(lengths)
    role = layout.roles.repeat_interleave(lengths)
    lists = torch.arange(layout.num_lists, device=device)
    owner = lists.repeat_interleave(layout.list_offsets.diff().long())[segment]

    def visible(_batch: torch.Tensor, _head: torch.Tensor, row: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        block = (segment[row] == segment[key]) | (role[key] == PREFIX) | (role[row] == TAIL)
        return (row >= key) & (owner[row] == owner[key]) & block

    create = partial(create_block_mask, B=None, H=None, KV_LEN=tokens, device=device, BLOCK_SIZE=block_size)
    height = max(MASK_PIECE // (tokens * block_size), 1) * block_size
    if height >= tokens:
        return create(visible, Q_LEN=tokens)
    pieces = [
        create(lambda b, h, row, key, begin=begin: visible(b, h, row + begin, key), Q_LEN=min(height, tokens - begin))
        for begin in range(0, tokens, height)
    ]
    fields = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")
    blocks = [torch.cat([getattr(piece, field) for piece in pieces], dim=2) for field in fields]
    return BlockMask.from_kv_blocks(*blocks, BLOCK_SIZE=block_size, mask_mod=visible, seq_lengths=(tokens, tokens))


def flex(inputs: Inputs, block_size: int) -> Call:
    """FlexAttention compiled."""
    query, key, value = _batched(inputs.packed)
    block_mask = build_block_mask(inputs.layout, block_size)
    compiled = inputs.compiled_flex
    return lambda: _unbatched(compiled(query, key, value, block_mask=block_mask, enable_gqa=True))


def padded_blocks(inputs: Inputs, of_list: Callable[[Segments, Inputs], Attend]) -> Call:
    """The formulation of the published BlockRank code: all blocks of a list padded to one width, then batched.

    Masks and indices are made beforehand, the gather from packed rows to blocks and back is part of the call.
    """
    lists = [of_list(segments, inputs) for segments in inputs.layout.segments()]
    query, key, value = inputs.for_masks
    return lambda: torch.cat([attend(query, key, value) for attend in lists])


def _padded(segments: Segments, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens of the blocks of a list and which of them exist, [blocks, width], and what they see of their own block.

    The width is the longest block rounded up to 16.
    """
    index, valid = padded_index(segments, device, multiple=16)
    offset = torch.arange(index.shape[1], device=device)
    return index, valid, (offset[:, None] >= offset) & valid[:, None, :]


def sdpa_on_blocks(segments: Segments, inputs: Inputs) -> Attend:
    """Documents are one batch of SDPA over ``[prefix; own]`` keys, prefix and tail one call each (arXiv 2510.05396)."""
    index, valid, own = _padded(segments, inputs.device)
    documents, width, places = len(segments) - 2, index.shape[1], valid.nonzero(as_tuple=True)
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
        return torch.cat(out).transpose(1, 2)[places]

    return attend


def published_kernel(segments: Segments, inputs: Inputs) -> Attend:
    """The Triton kernel of github.com/nilesh2797/BlockRank, which pip installs from there; it has no backward pass."""
    from blockrank.blockrank_triton_kernel_attention import blockrank_attention_with_mask

    index, valid, own = _padded(segments, inputs.device)
    mask = torch.zeros(own.shape, dtype=inputs.dtype, device=inputs.device)
    mask = mask.masked_fill(~own, torch.finfo(inputs.dtype).min / 2)[None, None]  # [1, 1, blocks, width, width]
    (blocks, width), index, places = index.shape, index.flatten(), valid.flatten().nonzero()[:, 0]

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        q, k, v = _batched((query[index], key[index], value[index]))
        out, _ = blockrank_attention_with_mask(q, k, v, mask, blocks, width, inputs.head_size**-0.5)
        return _unbatched(out)[places]

    return attend


def attention_problem(
    lengths: Lengths,
    heads: tuple[int, int, int],
    with_matmul: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    backend: str = "cpu",
) -> Problem:
    """rankernel and all peers on one shape."""
    inputs = Inputs(lengths, heads, dtype, device, backend)
    causal_flops = attention_flops(causal_pairs(inputs.layout.num_tokens), inputs.query_heads, inputs.head_size)
    row = partial(Implementation, expected=inputs.expected, work=inputs.flops)
    rows = [row("rankernel", partial(native, inputs), native_op=OP, backend=backend)]
    rows += [row(name, partial(flex, inputs, size)) for name, size in FLEX[backend].items()]
    rows.append(
        Implementation("FlexAttention mask building", lambda: lambda: _discard(build_block_mask(inputs.layout)))
    )
    if inputs.layout.num_tokens <= DENSE_TOKENS:
        rows.append(row("SDPA dense mask", partial(sdpa_dense, inputs)))
        rows.append(Implementation("dense mask building", lambda: inputs.layout.dense_mask))
    for name, kernel in CAUSAL[backend].items():
        if kernel in (None, SDPBackend.EFFICIENT_ATTENTION) or dtype != torch.float32:
            rows.append(row(name, partial(sdpa_causal, inputs, kernel), work=causal_flops))
    if inputs.loops:
        rows.append(row("SDPA per document", partial(sdpa_per_segment, inputs)))
    rows.append(row("padded blocks (BlockRank)", partial(padded_blocks, inputs, sdpa_on_blocks)))
    if backend != "cpu":
        rows.append(row("published BlockRank kernel", partial(padded_blocks, inputs, published_kernel)))
        if dtype != torch.float32:
            rows.append(row("torch varlen", partial(varlen, inputs)))
    if with_matmul:
        rows.append(matmul(dtype, device))
    return Problem(tuple(rows))


def _discard(_: object) -> None:
    """For calls whose result is no tensor."""


def backward_problem(
    lengths: Lengths,
    heads: tuple[int, int, int],
    with_matmul: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    backend: str = "cpu",
) -> Problem:
    """Forward and backward by rankernel and by the peers that have gradients; results are dQ, dK and dV."""
    inputs = Inputs(lengths, heads, dtype, device, backend)

    def gradients(build: Callable[[Inputs], Call]) -> Callable[[], tuple[torch.Tensor, ...]]:
        with torch.enable_grad():
            leaves = [tensor.requires_grad_() for tensor in inputs.packed]
            forward = build(inputs)

        def call() -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                return torch.autograd.grad(forward(), leaves, inputs.upstream)

        return call

    def by_autograd(wide: torch.dtype) -> tuple[torch.Tensor, ...]:
        gradients = []
        for head, upstream in zip(inputs.by_kv_head(wide), inputs.upstream.split(inputs.group, dim=1), strict=True):
            with torch.enable_grad():
                leaves = [tensor.requires_grad_() for tensor in head]
                out, _ = reference.block_attention(*leaves, inputs.layout)
                gradients.append(torch.autograd.grad(out, leaves, upstream.to(wide)))
        return tuple(torch.cat(heads, dim=1) for heads in zip(*gradients, strict=True))

    builds: dict[str, Callable[[Inputs], Call]] = {}
    if backend != "cpu":  # FlexAttention has no gradients there
        builds |= {name: partial(flex, block_size=size) for name, size in FLEX[backend].items()}
        if dtype != torch.float32:
            builds["torch varlen"] = varlen
    if inputs.loops:
        builds["SDPA per document"] = sdpa_per_segment
    expected = expected_of(partial(by_autograd, torch.float64), partial(by_autograd, dtype), 3)
    # Beside the forward pass's two products there are five of their size.
    row = partial(Implementation, expected=expected, work=7 * inputs.flops // 2)
    rows = [row("rankernel", partial(gradients, native), native_op=OP, backend=backend)]
    rows += [row(name, partial(gradients, build)) for name, build in builds.items()]
    if with_matmul:
        rows.append(matmul(dtype, device))
    return Problem(tuple(rows))


def scaling_problem(
    small: Lengths,
    large: Lengths,
    heads: tuple[int, int, int],
    dtype: torch.dtype,
    device: str = "cpu",
    backend: str = "cpu",
) -> Problem:
    """rankernel on two sizes in the same rounds."""
    rows = []
    for lengths in (small, large):
        inputs = Inputs(lengths, heads, dtype, device, backend)
        name = f"rankernel {inputs.layout.num_documents} documents"
        build = partial(native, inputs)
        rows.append(Implementation(name, build, inputs.expected, inputs.flops, native_op=OP, backend=backend))
    sizes = [sum(len(documents) for _, documents, _ in lengths) for lengths in (large, small)]
    text = f"{sizes[0]} documents cost {{}} times as much as {sizes[1]}"
    return Problem((*rows, matmul(dtype, device)), (Finding("cost_ratio", text, of=rows[1].name, over=rows[0].name),))


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
    name: str,
    shape: str,
    problem: Callable[..., Problem],
    seconds: float = 20.0,
    default: bool = False,
) -> Case:
    return Case(name, shape, problem, seconds=seconds, default=default, build_on_gpu=_on_gpu(problem))


def _gpu_case(name: str, shape: str, problem: Callable[..., Problem], default: bool = False) -> Case:
    """In the dtype that models have there."""
    return Case(name, shape, None, (torch.bfloat16,), 5.0, default, _on_gpu(problem))


def _on_gpu(problem: Callable[..., Problem]) -> Callable[..., Problem]:
    return partial(problem, device="cuda", backend="triton")


def _forward(
    name: str, lengths: Lengths, heads: tuple[int, int, int], seconds: float = 20.0, default: bool = False
) -> Case:
    shape = in_words(BlockLayout.from_lengths(lengths), *heads)
    return _case(name, shape, partial(attention_problem, lengths, heads, name != "tiny"), seconds, default)


QWEN3_HEADS = (16, 8, 128)  # of the model with 0.6B parameters
MISTRAL_HEADS = (32, 8, 128)  # also of Qwen3-4B and 8B


def gpu_lists(documents: int, shortest: int, longest: int) -> Lengths:
    return [ranking_list(documents, shortest, longest, prefix=96)]


def _gpu_cases() -> Iterator[Case]:
    sizes = itertools.product((10, 50, 100, 500), ((80, 160), (160, 160), (256, 384)))
    models = {"mistral": MISTRAL_HEADS, "qwen3-0.6b": QWEN3_HEADS}
    for (model, heads), (documents, (shortest, longest)) in itertools.product(models.items(), sizes):
        tokens = f"{shortest}" if shortest == longest else f"{shortest}-{longest}"
        name, lengths = f"{model}-{documents}x{tokens}", gpu_lists(documents, shortest, longest)
        shape = in_words(BlockLayout.from_lengths(lengths), *heads)
        default = name == "mistral-100x80-160"
        yield _gpu_case(name, shape, partial(attention_problem, lengths, heads, True), default)
        if documents == 100:
            backward = partial(backward_problem, lengths, heads, True)
            yield _gpu_case(f"{name}-backward", f"{shape}, forward and backward", backward, default)


TINY = [(8, [5, 1, 12], 4), (3, [7], 2)]

CASES = (
    _forward("tiny", TINY, (4, 2, 16), seconds=0.1),
    _forward("20-documents", [ranking_list(20)], QWEN3_HEADS, seconds=5.0, default=True),
    _forward("100-documents", [ranking_list(100)], QWEN3_HEADS),
    _forward("100-snippets", [ranking_list(100, shortest=8, longest=24, prefix=24, tail=8)], QWEN3_HEADS),
    _forward("30-passages-mistral", [ranking_list(30, shortest=256, longest=384, prefix=96)], MISTRAL_HEADS),
    _forward("8-lists-of-20", [ranking_list(20)] * 8, QWEN3_HEADS),
    *(
        _case(
            name,
            in_words(BlockLayout.from_lengths(lengths), *heads) + ", forward and backward",
            partial(backward_problem, lengths, heads, name != "tiny-backward"),
            seconds,
        )
        for name, lengths, heads, seconds in (
            ("tiny-backward", TINY, (4, 2, 16), 0.1),
            ("30-documents-backward", [(32, [160] * 30, 48)], QWEN3_HEADS, 20.0),
        )
    ),
    _case(
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
    *_gpu_cases(),
    _gpu_case(
        "500-vs-100",
        "mistral-100x80-160 against the same with 500 documents",
        partial(scaling_problem, gpu_lists(100, 80, 160), gpu_lists(500, 80, 160), MISTRAL_HEADS),
    ),
)
