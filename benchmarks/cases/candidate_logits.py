"""Logits and log-probabilities of a few tokens against the ways that PyTorch has to them.

The head is that of Qwen3-0.6B: 151,936 tokens of 1,024 numbers, 311 MB in bfloat16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial

import torch
import torch.nn.functional as F

import rankernel
from measure import Call, Case, Expected, Finding, Implementation, Problem
from rankernel import reference

OP = "candidate_logits"
FULL = "full logits and log_softmax"
GATHERED = "F.linear of gathered rows"


@dataclass(frozen=True)
class Shape:
    """Rows of hidden states, candidates, and the head."""

    rows: int
    candidates: int
    vocabulary: int = 151936
    hidden: int = 1024

    def __str__(self) -> str:
        return f"{self.rows} x {self.hidden} hidden, {self.candidates} of {self.vocabulary} tokens"


class Inputs:
    """Hidden states and a head whose logits are as wide apart as a model's; made when first used."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device

    def _normal(self, seed: int, *size: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size, generator=generator).to(self.device, self.dtype)

    @cached_property
    def hidden(self) -> torch.Tensor:
        """[B, E]"""
        return self._normal(0, self.shape.rows, self.shape.hidden)

    @cached_property
    def weight(self) -> torch.Tensor:
        """[V, E]"""
        return self._normal(1, self.shape.vocabulary, self.shape.hidden) * (3 / self.shape.hidden**0.5)

    @cached_property
    def candidates(self) -> torch.Tensor:
        """[C]"""
        generator = torch.Generator().manual_seed(2)
        return torch.randint(self.shape.vocabulary, (self.shape.candidates,), generator=generator).to(self.device)

    def expected(self, log_probs: bool) -> Expected:
        def exact() -> torch.Tensor:
            wide = [tensor.double() for tensor in (self.hidden, self.weight)]
            return reference.candidate_logits(*wide, self.candidates, log_probs=log_probs)

        return Expected(exact, full(self) if log_probs else gathered(self))


def ours(inputs: Inputs, log_probs: bool) -> Call:
    """rankernel."""
    hidden, weight, candidates = inputs.hidden, inputs.weight, inputs.candidates
    return lambda: rankernel.candidate_logits(hidden, weight, candidates, log_probs=log_probs)


def full(inputs: Inputs) -> Call:
    """All logits, log_softmax, then the candidates' columns."""
    hidden, weight, candidates = inputs.hidden, inputs.weight, inputs.candidates
    return lambda: F.linear(hidden, weight).log_softmax(dim=-1)[:, candidates]


def full_in_float32(inputs: Inputs) -> Call:
    """The same with the logits brought to float32, as training code does."""
    hidden, weight, candidates = inputs.hidden, inputs.weight, inputs.candidates
    return lambda: F.linear(hidden, weight).float().log_softmax(dim=-1)[:, candidates]


def logits_to_keep(inputs: Inputs) -> Call:
    """What Transformers does with ``logits_to_keep=1``: all logits of the last position, then the columns."""
    hidden, weight, candidates = inputs.hidden, inputs.weight, inputs.candidates
    return lambda: F.linear(hidden, weight)[:, candidates]


def gathered(inputs: Inputs) -> Call:
    """By hand: the candidates' rows of the weight, then a product."""
    hidden, weight, candidates = inputs.hidden, inputs.weight, inputs.candidates
    return lambda: F.linear(hidden, weight[candidates])


def linear_cross_entropy(inputs: Inputs) -> Call:
    """PyTorch's chunked loss, of one target."""
    hidden, weight = inputs.hidden, inputs.weight
    target = inputs.candidates.expand(inputs.shape.rows).contiguous()
    return lambda: -F.linear_cross_entropy(hidden, weight, target, reduction="none")[:, None]


def logits_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu", backend: str = "cpu") -> Problem:
    """Logits of the candidates."""
    inputs = Inputs(shape, dtype, device)
    expected = inputs.expected(log_probs=False)
    of_log_probs = inputs.expected(log_probs=True)
    return Problem(
        (
            Implementation("rankernel", lambda: ours(inputs, False), expected, native_op=OP, backend=backend),
            Implementation(GATHERED, lambda: gathered(inputs), expected),
            Implementation("logits_to_keep", lambda: logits_to_keep(inputs), expected),
            # Another result, in the same order: what scoring code computes that does not know better.
            Implementation(FULL, lambda: full(inputs), of_log_probs),
        ),
        findings=(Finding("over_gathered", f"rankernel takes {{}} more than {GATHERED}", "rankernel", GATHERED, "s"),),
    )


def log_probs_problem(shape: Shape, dtype: torch.dtype, device: str = "cpu", backend: str = "cpu") -> Problem:
    """Log-probabilities of the candidates; the work is reading the weights once."""
    inputs = Inputs(shape, dtype, device)
    expected = inputs.expected(log_probs=True)
    work = shape.vocabulary * shape.hidden * dtype.itemsize
    peers = [(FULL, full)]
    if dtype != torch.float32:
        peers.append(("full logits and float32 log_softmax", full_in_float32))
    if shape.candidates == 1 and hasattr(F, "linear_cross_entropy"):  # not in PyTorch 2.11
        peers.append(("torch linear_cross_entropy", linear_cross_entropy))
    return Problem(
        (
            Implementation("rankernel", lambda: ours(inputs, True), expected, work, native_op=OP, backend=backend),
            *(Implementation(name, partial(build, inputs), expected, work) for name, build in peers),
        ),
        unit="B",
    )


def _case(
    build: Callable[..., Problem], name: str, shape: Shape, what: str, seconds: float = 4.0, default: bool = False
) -> Case:
    return Case(
        name,
        f"{what}, {shape}",
        partial(build, shape),
        (torch.bfloat16, torch.float32),
        seconds,
        default,
        partial(build, shape, device="cuda", backend="triton"),
    )


LOGITS, LOG_PROBS = "logits", "log-probabilities"
CASES = (
    _case(logits_problem, "tiny", Shape(3, 2, 100, 24), LOGITS, 0.1),
    _case(log_probs_problem, "tiny-log-probs", Shape(3, 1, 100, 24), LOG_PROBS, 0.1),
    _case(logits_problem, "2-of-1", Shape(1, 2), LOGITS, default=True),
    _case(logits_problem, "2-of-50", Shape(50, 2), LOGITS),
    _case(logits_problem, "26-of-9", Shape(9, 26), LOGITS),
    _case(log_probs_problem, "log-probs-1", Shape(1, 1), LOG_PROBS),
    _case(log_probs_problem, "log-probs-32", Shape(32, 1), LOG_PROBS),
    _case(log_probs_problem, "log-probs-256", Shape(256, 11), LOG_PROBS),
)
