"""Document log-sum-exp and token attention mass against PyTorch on the same rows.

The published codes of BlockRank and ICR compute the full logits of the rows and reduce them, as the PyTorch rows do;
SDPA's log-sum-exp, one call per document, is what a user could do without them; it has no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, cached_property, partial

import torch

import rankernel
from cases.lora_linear import NATIVE
from measure import Call, Case, Expected, Implementation, Problem
from rankernel import BlockLayout, reference
from workloads import in_words, padded_index, ranking_list

Lengths = tuple[int, list[int], int]
OP = "document_scores"


Scores = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]  # of query and key


class Inputs:
    """Random keys over one list, and queries of the last ``rows`` tokens of its tail; made when first used."""

    def __init__(
        self, lengths: Lengths, heads: tuple[int, int, int], rows: int, dtype: torch.dtype, backward: bool, device: str
    ) -> None:
        self.layout = BlockLayout.from_lengths([lengths]).to(device)
        self.heads = heads
        self.rows = self.layout.tail_positions(last=rows)
        self.dtype, self.device = dtype, device
        self.backward = backward

    @property
    def key_bytes(self) -> int:
        """What any implementation must read, and with a backward pass read again and write."""
        _, kv_heads, head_size = self.heads
        passes = 3 if self.backward else 1
        return self.layout.num_tokens * kv_heads * head_size * self.dtype.itemsize * passes

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
        return torch.randn(tokens, heads, self.heads[2], generator=generator).to(self.device, self.dtype)

    def call(self, scores: Scores) -> Call:
        """The scores, or with a backward pass the gradients of query and key for a random gradient of the scores."""
        return self._call(scores, self.dtype)

    def _call(self, scores: Scores, dtype: torch.dtype) -> Call:
        query, key = self.query.to(dtype), self.key.to(dtype)
        if not self.backward:
            return partial(scores, query, key)
        leaves = query.detach().requires_grad_(), key.detach().requires_grad_()
        # Times the tokens, so that errors of the gradients stand above the absolute part of the tolerance.
        shape = scores(*leaves).shape
        upstream = torch.randn(shape, generator=torch.Generator().manual_seed(2)).to(self.device)
        upstream *= self.layout.num_tokens

        @torch.enable_grad()
        def step() -> tuple[torch.Tensor, ...]:
            out = scores(*leaves)
            return torch.autograd.grad(out, leaves, upstream.to(out.dtype))

        return step

    def expected(self, function: Callable[..., torch.Tensor], eager: Scores) -> Expected | tuple[Expected, ...]:
        """What :meth:`call` returns: exactly by a reference, and by PyTorch in the dtype of the inputs."""

        @cache
        def compute(dtype: torch.dtype) -> torch.Tensor | tuple[torch.Tensor, ...]:
            def exact(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
                return function(query, key, self.layout, self.rows)

            return self._call(exact if dtype == torch.float64 else eager, dtype)()

        def part(dtype: torch.dtype, index: int) -> torch.Tensor:
            return compute(dtype)[index] if self.backward else compute(dtype)

        parts = [Expected(partial(part, torch.float64, index), partial(part, self.dtype, index)) for index in range(2)]
        return tuple(parts) if self.backward else parts[0]


def grouped_logits(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """Scaled logits of query [R, Hq, D] on key [T, Hkv, D], float32 [Hkv, group, R, T]; keys are not repeated."""
    rows, query_heads, head_size = query.shape
    kv_heads = key.shape[1]
    grouped = query.view(rows, kv_heads, -1, head_size).permute(1, 2, 0, 3).reshape(kv_heads, -1, head_size)
    logits = grouped @ key.permute(1, 2, 0)
    return (logits.float() * head_size**-0.5).view(kv_heads, query_heads // kv_heads, rows, -1)


def document_index(layout: BlockLayout) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens of the documents of the only list, padded to the longest: index and valid, [documents, longest]."""
    return padded_index(layout.segments()[0][1:-1], layout.cu_seqlens.device)


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


def _compiled(function: Scores) -> Scores:
    torch._dynamo.reset()  # else the recompile limit, reached over many cases, falls back to eager
    return torch.compile(function, dynamic=False, fullgraph=True)


def sdpa_logsumexp_per_document(inputs: Inputs) -> Call:
    """SDPA's own log-sum-exp, one call per document, all query heads of a KV head as rows."""
    rows, query_heads, head_size = inputs.query.shape
    kv_heads = inputs.heads[1]
    query = inputs.query.view(rows, kv_heads, -1, head_size).permute(1, 2, 0, 3).reshape(1, kv_heads, -1, head_size)
    key = inputs.key.transpose(0, 1)[None]
    documents = inputs.layout.segments()[0][1:-1]
    sdpa = torch.ops.aten._scaled_dot_product_flash_attention
    if inputs.device == "cpu":
        sdpa = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu

    def call() -> torch.Tensor:
        lse = [sdpa(query, key[:, :, begin:end], key[:, :, begin:end])[1] for begin, end, _ in documents]
        return torch.stack(lse, dim=-1).view(query_heads, rows, -1).transpose(0, 1)

    return call


def logsumexp_problem(
    lengths: Lengths,
    heads: tuple[int, int, int],
    rows: int,
    backward: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    backends: Mapping[str, str] = NATIVE["cpu"],
) -> Problem:
    """document_logsumexp, by every backend of rankernel that is named, and its peers."""
    inputs = Inputs(lengths, heads, rows, dtype, backward, device)
    index, valid = document_index(inputs.layout)

    def native(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return rankernel.document_logsumexp(query, key, inputs.layout, inputs.rows)

    def pytorch(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return logsumexp_in_pytorch(query, key, index, valid)

    expected, work = inputs.expected(reference.document_logsumexp, pytorch), inputs.key_bytes
    rows_of_table = [
        *_native_rows(backends, lambda: inputs.call(native), expected, work),
        Implementation("PyTorch logits and logsumexp", lambda: inputs.call(pytorch), expected, work),
        Implementation("the same compiled", lambda: inputs.call(_compiled(pytorch)), expected, work),
    ]
    if not backward and (device == "cpu" or dtype != torch.float32):  # the flash kernel of GPUs has no float32
        sdpa = Implementation("SDPA lse per document", lambda: sdpa_logsumexp_per_document(inputs), expected, work)
        rows_of_table.append(sdpa)
    return Problem(tuple(rows_of_table), unit="B")


def _native_rows(
    backends: Mapping[str, str], build: Callable[[], Call], expected: Expected | tuple[Expected, ...], work: float
) -> list[Implementation]:
    return [
        Implementation(name, build, expected, work, native_op=OP, backend=backend) for name, backend in backends.items()
    ]


def mass_problem(
    lengths: Lengths,
    heads: tuple[int, int, int],
    rows: int,
    backward: bool,
    dtype: torch.dtype,
    device: str = "cpu",
    backends: Mapping[str, str] = NATIVE["cpu"],
) -> Problem:
    """token_attention_mass, likewise."""
    inputs = Inputs(lengths, heads, rows, dtype, backward, device)
    visible = torch.arange(inputs.layout.num_tokens, device=device) <= inputs.rows[:, None]

    def native(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return rankernel.token_attention_mass(query, key, inputs.layout, inputs.rows)

    def pytorch(query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        return mass_in_pytorch(query, key, visible)

    expected, work = inputs.expected(reference.token_attention_mass, pytorch), inputs.key_bytes
    rows_of_table = (
        *_native_rows(backends, lambda: inputs.call(native), expected, work),
        Implementation("PyTorch softmax and mean", lambda: inputs.call(pytorch), expected, work),
        Implementation("the same compiled", lambda: inputs.call(_compiled(pytorch)), expected, work),
    )
    return Problem(rows_of_table, unit="B")


def _case(
    problem: Callable[..., Problem],
    name: str,
    lengths: Lengths,
    heads: tuple[int, int, int],
    rows: int,
    seconds: float = 3.0,
    default: bool = False,
    backward: bool = False,
) -> Case:
    shape = f"{in_words(BlockLayout.from_lengths([lengths]), *heads)}, {rows} query rows"
    shape += ", forward and backward" * backward
    on_cpu = partial(problem, lengths, heads, rows, backward)
    on_gpu = partial(on_cpu, device="cuda", backends=NATIVE["cuda"])
    return Case(name, shape, on_cpu, seconds=seconds, default=default, build_on_gpu=on_gpu)


QWEN3_HEADS = (16, 8, 128)
MISTRAL_HEADS = (32, 8, 128)
LONG = ranking_list(500, shortest=80, longest=160, prefix=96)
TINY = (8, [5, 1, 12], 4)

CASES = (
    _case(logsumexp_problem, "tiny-logsumexp", TINY, (4, 2, 16), 2, seconds=0.1),
    _case(mass_problem, "tiny-mass", TINY, (4, 2, 16), 3, seconds=0.1),
    _case(logsumexp_problem, "tiny-logsumexp-backward", TINY, (4, 2, 16), 2, seconds=0.1, backward=True),
    _case(mass_problem, "tiny-mass-backward", TINY, (4, 2, 16), 3, seconds=0.1, backward=True),
    _case(logsumexp_problem, "logsumexp-100-documents", ranking_list(100), QWEN3_HEADS, 2, default=True),
    _case(mass_problem, "mass-100-documents", ranking_list(100), QWEN3_HEADS, 24, default=True),
    _case(logsumexp_problem, "logsumexp-30-documents-backward", ranking_list(30), QWEN3_HEADS, 2, backward=True),
    _case(mass_problem, "mass-30-documents-backward", ranking_list(30), QWEN3_HEADS, 24, backward=True),
    _case(logsumexp_problem, "logsumexp-500-documents", LONG, MISTRAL_HEADS, 2),
)
