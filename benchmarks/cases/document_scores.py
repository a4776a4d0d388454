"""Document log-sum-exp and token attention mass against PyTorch on the same rows.

The published codes of BlockRank and ICR compute the full logits of the rows and reduce them, as the PyTorch rows do;
SDPA's log-sum-exp, one call per document, is what a user could do without them.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import torch

import rankernel
from measure import Call, Case, Expected, Implementation, Problem
from rankernel import BlockLayout, reference
from workloads import in_words, ranking_list

Lengths = tuple[int, list[int], int]
OP = "document_scores"


class Inputs:
    """Random keys over one list, and queries of the last ``rows`` tokens of its tail; made when first used."""

    def __init__(self, lengths: Lengths, heads: tuple[int, int, int], rows: int, dtype: torch.dtype) -> None:
        self.layout = BlockLayout.from_lengths([lengths])
        self.heads = heads
        self.rows = self.layout.tail_positions(last=rows)
        self.dtype = dtype

    @property
    def key_bytes(self) -> int:
        """What any implementation must read."""
        _, kv_heads, head_size = self.heads
        return self.layout.num_tokens * kv_heads * head_size * self.dtype.itemsize

    @cached_property
    def query(self) -> torch.Tensor:
        """[R, Hq, D]"""
        return self._random(self.rows.numel(), self.heads[0], seed=0)

    @cached_property
    def key(self) -> torch.Tensor:
        """[T, Hkv, D]"""
        return self._random(self.layout.num_tokens, self.heads[1], seed=1)

    def _random(self, tokens: int, heads: int, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(tokens, heads, self.heads[2], generator=generator).to(self.dtype)

    def expected(self, function: Callable[..., torch.Tensor]) -> Expected:
        def compute(dtype: torch.dtype) -> torch.Tensor:
            return function(self.query.to(dtype), self.key.to(dtype), self.layout, self.rows)

        return Expected(lambda: compute(torch.float64), lambda: compute(self.dtype))


def grouped_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled logits of query [R, Hq, D] on key [T, Hkv, D], float32 [Hkv, group, R, T]; keys are not repeated."""
    rows, query_heads, head_size = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(rows, kv_heads, -1, head_size).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_size)
    logits = grouped @ key.permute(1, 2, 0)
    return (logits.float() * head_size**-0.5).view(kv_heads, query_heads // kv_heads, rows, -1)


def document_index(layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the documents of the only list, padded to the longest: index and valid, [documents, longest]."""
    documents = layout.segments()[0][1:-1]
    begins = torch.tensor([begin for begin, _, _ in documents])
    lengths = torch.tensor([end - begin for begin, end, _ in documents])
    offset = torch.arange(int(lengths.max()))
    valid = offset < lengths[:, None]
    return torch.where(valid, begins[:, None] + offset, 0), valid


def logsumexp_in_pytorch(
    query: torch.Tensor, key: torch.Tensor, index: torch.Tensor, valid: torch.Tensor
) -> torch.Tensor:
    """Document log-sum-exp [R, Hq, documents] of tail rows by full logits and a gather."""
    logits = grouped_logits(query, key)[..., index].masked_fill(~valid, float("-inf"))
    return torch.logsumexp(logits, dim=-1).flatten(0, 1).transpose(0, 1)


def mass_in_pytorch(query: torch.Tensor, key: torch.Tensor, visible: torch.Tensor) -> torch.Tensor:
    """Token attention mass [T] by the full attention probabilities of the rows; visible is bool [R, T]."""
    probabilities = torch.softmax(grouped_logits(query, key).masked_fill(~visible, float("-inf")), dim=-1)
    return probabilities.mean(dim=2).sum(dim=(0, 1))


def _compiled(function: Callable[..., torch.Tensor], *arguments: torch.Tensor) -> Call:
    torch._dynamo.reset()  # else the recompile limit, reached over many cases, falls back to eager
    return partial(torch.compile(function, dynamic=False, fullgraph=True), *arguments)


def sdpa_logsumexp_per_document(inputs: Inputs) -> Call:
    """SDPA's own log-sum-exp, one call per document, all query heads of a KV head as rows."""
    rows, query_heads, head_size = inputs.query.shape
    kv_heads = inputs.heads[1]
    query = inputs.query.view(rows, kv_heads, -1, head_size).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, head_size)
    key = inputs.key.transpose(0, 1)[None]
    documents = inputs.layout.segments()[0][1:-1]
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def call() -> torch.Tensor:
        lse = [sdpa(query, key[:, :, begin:end], key[:, :, begin:end])[1] for begin, end, _ in documents]
        return torch.stack(lse, dim=-1).view(query_heads, rows, -1).transpose(0, 1)

    return call


def logsumexp_problem(lengths: Lengths, heads: tuple[int, int, int], rows: int, dtype: torch.dtype) -> Problem:
    """document_logsumexp and its peers."""
    inputs = Inputs(lengths, heads, rows, dtype)
    expected, work = inputs.expected(reference.document_logsumexp), inputs.key_bytes

    def native() -> Call:
        return partial(rankernel.document_logsumexp, inputs.query, inputs.key, inputs.layout, inputs.rows)

    def pytorch() -> Call:
        return partial(logsumexp_in_pytorch, inputs.query, inputs.key, *document_index(inputs.layout))

    def compiled() -> Call:
        return _compiled(logsumexp_in_pytorch, inputs.query, inputs.key, *document_index(inputs.layout))

    rows_of_table = (
        Implementation("rankernel", native, expected, work, native_op=OP),
        Implementation("PyTorch logits and logsumexp", pytorch, expected, work),
        Implementation("the same compiled", compiled, expected, work),
        Implementation("SDPA lse per document", lambda: sdpa_logsumexp_per_document(inputs), expected, work),
    )
    return Problem(rows_of_table, unit="B")


def mass_problem(lengths: Lengths, heads: tuple[int, int, int], rows: int, dtype: torch.dtype) -> Problem:
    """token_attention_mass and its peers."""
    inputs = Inputs(lengths, heads, rows, dtype)
    expected, work = inputs.expected(reference.token_attention_mass), inputs.key_bytes
    visible = torch.arange(inputs.layout.num_tokens) <= inputs.rows[:, None]

    def native() -> Call:
        return partial(rankernel.token_attention_mass, inputs.query, inputs.key, inputs.layout, inputs.rows)

    rows_of_table = (
        Implementation("rankernel", native, expected, work, native_op=OP),
        Implementation(
            "PyTorch softmax and mean", lambda: partial(mass_in_pytorch, inputs.query, inputs.key, visible),
            expected, work,
        ),
        Implementation(
            "the same compiled", lambda: _compiled(mass_in_pytorch, inputs.query, inputs.key, visible), expected, work
        ),
    )  # fmt: skip
    return Problem(rows_of_table, unit="B")


def _case(
    problem: Callable[[Lengths, tuple[int, int, int], int, torch.dtype], Problem],
    name: str,
    lengths: Lengths,
    heads: tuple[int, int, int],
    rows: int,
    seconds: float = 3.0,
    default: bool = False,
) -> Case:
    shape = f"{in_words(BlockLayout.from_lengths([lengths]), *heads)}, {rows} query rows"
    return Case(name, shape, partial(problem, lengths, heads, rows), seconds=seconds, default=default)


QWEN3_HEADS = (16, 8, 128)
TINY = (8, [5, 1, 12], 4)

CASES = (
    _case(logsumexp_problem, "tiny-logsumexp", TINY, (4, 2, 16), 2, seconds=0.1),
    _case(mass_problem, "tiny-mass", TINY, (4, 2, 16), 3, seconds=0.1),
    _case(logsumexp_problem, "logsumexp-100-documents", ranking_list(100), QWEN3_HEADS, 2, default=True),
    _case(mass_problem, "mass-100-documents", ranking_list(100), QWEN3_HEADS, 24, default=True),
)
