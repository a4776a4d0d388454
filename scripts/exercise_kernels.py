"""Calls every kernel once, on small odd shapes, forward and backward: what compute-sanitizer watches.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python scripts/exercise_kernels.py

Without PyTorch's cache every tensor is an allocation of its own, and a step over its end shows. Results are compared
with the float64 reference on the CPU, but loosely, so that no exercise is of garbage: close bounds are the tests'
business. With --device cpu the CPU's kernels run, which tests the calls themselves where there is no GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import rankernel
from rankernel import BlockLayout, backends
from rankernel.listwise import KINDS

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 2e-2}

# Several lists, an empty document and an empty tail; the far range of the long list's tail is attended to in parts.
LENGTHS = [(5, [17, 0, 33, 1], 9), (0, [40], 3), (20, [7], 0), (3, [600, 130, 500], 2)]
HEADS, KV_HEADS = 8, 2


@dataclass(frozen=True)
class Exercise:
    """One call: ``call`` of the leaves, in any dtype and on any device; ``leaves`` are float64 on the CPU."""

    name: str
    call: Callable[..., torch.Tensor | Sequence[torch.Tensor]]
    leaves: tuple[torch.Tensor, ...]
    dtypes: tuple[torch.dtype, ...] = tuple(TOLERANCES)

    def run(self, dtype: torch.dtype, rounded_to: torch.dtype, device: str, backend: str) -> list[torch.Tensor]:
        """Outputs and the gradients of all leaves, float64 on the CPU."""
        leaves = [leaf.to(rounded_to).to(device, dtype).requires_grad_() for leaf in self.leaves]
        with backends.use(backend=backend):
            out = self.call(*leaves)
            outputs = [out] if isinstance(out, torch.Tensor) else list(out)
            generator = torch.Generator().manual_seed(1)
            upstream = [torch.randn(out.shape, generator=generator).to(out) for out in outputs]
            gradients = torch.autograd.grad(outputs, leaves, upstream)
        return [result.detach().cpu().double() for result in (*outputs, *gradients)]


def normal(*shape: int) -> torch.Tensor:
    """The same numbers for the same shape."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def block_attention() -> Iterator[Exercise]:
    """Both patterns, two head sizes; window, softcap and sinks together."""

    def call(layout: BlockLayout, options: dict[str, Any], *leaves: torch.Tensor) -> Any:
        query, key, value, *sinks = leaves
        options = options | {"sinks": sinks[0] if sinks else None, "return_lse": True}
        return rankernel.block_attention(query, key, value, layout.to(query.device), **options)

    block, causal = BlockLayout.from_lengths(LENGTHS), BlockLayout.from_lengths(LENGTHS, "causal")
    all_three = {"window": 70, "softcap": 3.0}  # and sinks
    for layout, size, options in ((block, 64, {}), (block, 128, {}), (causal, 64, {}), (block, 64, all_three)):
        query, key = (normal(layout.num_tokens, heads, size) for heads in (HEADS, KV_HEADS))
        sinks = (normal(HEADS),) if options else ()
        name = f"{layout.pattern}, {size}{', window, softcap and sinks' if options else ''}"
        yield Exercise(name, partial(call, layout, options), (query, key, key.flip(0), *sinks))


def document_scores() -> Iterator[Exercise]:
    """Both scores, for the last rows of every list and some inside."""
    layout = BlockLayout.from_lengths(LENGTHS)
    rows = torch.tensor([last - n for *_, (_, last, _) in layout.segments() for n in (1, 2, 5)] + [0, 30])

    def call(name: str, softcap: float | None, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        on_device = layout.to(query.device), rows.to(query.device)
        return getattr(rankernel, name)(query, key, *on_device, softcap=softcap)

    for name in ("document_logsumexp", "token_attention_mass"):
        for size, softcap in ((64, None), (128, 3.0)):
            leaves = normal(len(rows), HEADS, size), normal(layout.num_tokens, KV_HEADS, size)
            yield Exercise(f"{name}, {size}{', softcap' if softcap else ''}", partial(call, name, softcap), leaves)


def candidate_logits() -> Iterator[Exercise]:
    """One row, a few and many, aligned and not; candidates of all rows, and with bias and softcap of each."""

    def call(candidates: torch.Tensor, log_probs: bool, *leaves: torch.Tensor) -> torch.Tensor:
        hidden, weight, *bias = leaves
        options: dict[str, Any] = {"bias": bias[0], "softcap": 3.0} if bias else {}
        return rankernel.candidate_logits(hidden, weight, candidates.to(hidden.device), log_probs=log_probs, **options)

    generator = torch.Generator().manual_seed(0)
    for rows, vocabulary, width, shape in ((1, 333, 264, (7,)), (5, 333, 71, (5, 3)), (70, 300, 72, (9,))):
        candidates = torch.randint(vocabulary, shape, generator=generator)
        bias = (normal(vocabulary),) if candidates.dim() == 2 else ()
        leaves = (normal(rows, width), normal(vocabulary, width) / width**0.5, *bias)
        for log_probs in (False, True):
            name = f"{rows} rows{', log-probabilities' if log_probs else ''}"
            yield Exercise(name, partial(call, candidates, log_probs), leaves)


def listwise_loss() -> Iterator[Exercise]:
    """Every kind; lists without items, of one, and of more than a block has. The dtype matters to loads alone."""
    lengths = torch.tensor([3, 0, 1, 17, 530, 130])
    offsets, count = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]), int(lengths.sum())
    labels = torch.randint(4, (count,), generator=torch.Generator().manual_seed(0)).float()
    where = torch.arange(count) % 11 != 5

    def call(kind: str, scores: torch.Tensor) -> torch.Tensor:
        y, bounds, valid = (tensor.to(scores.device) for tensor in (labels, offsets, where))
        return rankernel.listwise_loss(scores, y, bounds, kind, where=valid)

    for kind in (kind for kind in KINDS if kind != "groco"):  # which has no kernel for GPUs
        dtypes = tuple(TOLERANCES) if kind == "ranknet" else (torch.float32,)
        yield Exercise(kind, partial(call, kind), (normal(count),), dtypes)


def lora_linear() -> Iterator[Exercise]:
    """All four functions, of one row and of many; ranks from 0 to more than a tile, gates, dropout."""
    size, outputs = 136, 75

    def adapter(rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        return normal(rank, size) / size**0.5, normal(outputs, rank)

    def single(*leaves: torch.Tensor) -> torch.Tensor:
        x, weight, a, b, gate, bias = leaves
        generator = torch.Generator().manual_seed(0)
        return rankernel.lora_linear(x, weight, a, b, 0.5, gate=gate, bias=bias, dropout_p=0.25, generator=generator)

    def update(base: torch.Tensor, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return rankernel.lora_update(base, x, a, b, 0.5)

    def several(x: torch.Tensor, *rest: torch.Tensor) -> list[torch.Tensor]:
        return rankernel.multi_lora_linear(x, rest[:2], rest[2::2], rest[3::2], [0.5, 2.0])

    def segmented(x: torch.Tensor, weight: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        adapters = [(a, b, 0.5) for a, b in zip(factors[::2], factors[1::2], strict=True)]
        offsets, numbers = torch.tensor([0, 1, 1, 30, 37, len(x)]), torch.tensor([1, 0, 0, -1, 2])
        return rankernel.segment_lora_linear(x, weight, adapters, offsets.to(x.device), numbers.to(x.device))

    weight = normal(outputs, size) / size**0.5
    for rows in (1, 70):
        x = normal(rows, size)
        rest = (*adapter(16), normal(16), normal(outputs))
        yield Exercise(f"lora_linear, {rows} rows", single, (x, weight, *rest))
        yield Exercise(f"lora_update, {rows} rows", update, (normal(rows, outputs), x, *adapter(5)))
        layers = (weight, weight.flip(0), *adapter(8), *adapter(5))
        yield Exercise(f"multi_lora_linear, {rows} rows", several, (x, *layers))
    factors = (*adapter(5), *adapter(40), *adapter(0))
    yield Exercise("segment_lora_linear", segmented, (normal(70, size), weight, *factors))


OPS = {
    function.__name__: function
    for function in (block_attention, document_scores, candidate_logits, listwise_loss, lora_linear)
}


def main() -> int:
    """Runs the exercises of the ops on every backend that is there; returns 1 where a result is another one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--op", type=lambda text: text.split(","), default=list(OPS), help=f"of {', '.join(OPS)}")
    arguments = parser.parse_args()
    if unknown := set(arguments.op) - OPS.keys():
        parser.error(f"--op: expected some of {', '.join(OPS)}, got {', '.join(unknown)}")
    good, count = True, 0
    for op in arguments.op:
        for backend in backends.GPU_KERNELS[op] if arguments.device == "cuda" else ("cpu",):
            if why_not := backends.why_no_module(backend):
                print(f"{op} {backend}: not run, {why_not}")
                continue
            for exercise in OPS[op]():
                for dtype in exercise.dtypes:
                    print(f"{op} {backend} {str(dtype).removeprefix('torch.')}: {exercise.name}", end=": ", flush=True)
                    try:
                        ours = exercise.run(dtype, dtype, arguments.device, backend)
                    except NotImplementedError as reason:  # a kind of loss, say
                        print(f"not run, {reason}")
                        continue
                    truth = exercise.run(torch.float64, dtype, "cpu", "reference")
                    errors = [relative_error(*pair) for pair in zip(ours, truth, strict=True)]
                    print("errors", *(f"{error:.1e}" for error in errors))
                    good &= max(errors) <= TOLERANCES[dtype]
                    count += 1
    print(f"{count} calls, {'all' if good else 'NOT all'} as the reference has it")
    return 0 if good and count else 1


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    """Norm of the difference over that of the truth; infinite where a NaN is, or infinities stand elsewhere."""
    finite = truth.isfinite()
    if not torch.equal(ours[~finite], truth[~finite]) or not ours[finite].isfinite().all():
        return float("inf")
    return float((ours - truth)[finite].norm() / (truth[finite].norm() + 1e-3))


if __name__ == "__main__":
    sys.exit(main())
