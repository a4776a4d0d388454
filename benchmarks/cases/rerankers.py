"""Whole rerankers against their plain Transformers form: one padded batch of prompts, stock SDPA.

Prompts are random tokens of realistic lengths, so no tokenizer is timed. The model has random weights in the
configuration of Qwen3-0.6B, cut to 4 of its 28 layers, with its head of 151,936 tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch

from cases.model import QWEN3_06B, TINY, Shape, configuration
from measure import Call, Case, Expected, Implementation, Problem
from rankernel import BlockLayout, models
from rankernel.models.packing import shared_length
from workloads import ranking_list

OP = "block_attention"
Groups = list[list[list[int]]]


@dataclass(frozen=True)
class Workload:
    """Prompts, and how many of the vocabulary's logits are read behind each; 0 reads the hidden state itself."""

    groups: Groups
    candidates: int

    @property
    def prompts(self) -> list[list[int]]:
        return [prompt for group in self.groups for prompt in group]

    @property
    def shared(self) -> int:
        """Tokens that the prompts of the first group begin with."""
        return shared_length(self.groups[0])

    def __str__(self) -> str:
        lengths = [len(prompt) for prompt in self.prompts]
        packed = sum(row.layout.num_tokens for row in models.pack_prompts(self.groups))
        return (
            f"{len(lengths)} prompts of {min(lengths)}-{max(lengths)} tokens, {packed} packed, {sum(lengths)} alone, "
            f"{len(lengths) * max(lengths)} padded"
        )


def _tokens(seed: int, length: int, vocabulary: int) -> list[int]:
    return torch.randint(vocabulary, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def pointwise(documents: int, prefix: int, shape: Shape) -> Workload:
    """One prompt per document: instruction and query, document, the end of the turn (yes or no)."""
    beginning, end = _tokens(0, prefix, shape.vocabulary), _tokens(1, 9, shape.vocabulary)
    lengths = ranking_list(documents)[1]
    bodies = [_tokens(2 + place, length, shape.vocabulary) for place, length in enumerate(lengths)]
    return Workload([[beginning + body + end for body in bodies]], 2)


def pairwise(documents: int, shape: Shape) -> Workload:
    """All ordered pairs (PRP), those with the same first passage in a group."""
    beginning, end = _tokens(0, 40, shape.vocabulary), _tokens(1, 12, shape.vocabulary)
    lengths = ranking_list(documents)[1]
    passages = [_tokens(2 + place, length, shape.vocabulary) for place, length in enumerate(lengths)]
    groups = [
        [beginning + first + second + end for other, second in enumerate(passages) if other != place]
        for place, first in enumerate(passages)
    ]
    return Workload(groups, 2)


def embedding(documents: int, shape: Shape) -> Workload:
    """Texts without anything in common, of which the last hidden state is read (E2Rank)."""
    lengths = ranking_list(documents)[1]
    return Workload([[_tokens(place, length, shape.vocabulary) for place, length in enumerate(lengths)]], 0)


def groupwise(documents: int, shape: Shape) -> Workload:
    """A question about each document of a group behind all of them (GroupRank)."""
    beginning = _tokens(0, 60, shape.vocabulary)
    lengths = ranking_list(documents)[1]
    for place, length in enumerate(lengths):
        beginning += _tokens(2 + place, length, shape.vocabulary)
    return Workload([[beginning + _tokens(1000 + place, 8, shape.vocabulary) for place in range(documents)]], 10)


def listwise(documents: int, shape: Shape) -> Workload:
    """One prompt with all documents, behind which their letters are read (FIRST)."""
    return Workload([[_tokens(0, 120 + sum(ranking_list(documents)[1]), shape.vocabulary)]], documents)


def icr(documents: int, shape: Shape) -> Workload:
    """All documents and a query, and the same with one without content (ICR)."""
    beginning = _tokens(0, 20 + sum(ranking_list(documents)[1]), shape.vocabulary)
    return Workload([[beginning + _tokens(1, 45, shape.vocabulary), beginning + _tokens(2, 35, shape.vocabulary)]], 0)


class Inputs:
    """The model and the prompts, made when first used."""

    def __init__(self, workload: Workload, shape: Shape, dtype: torch.dtype) -> None:
        self.workload, self.shape, self.dtype = workload, shape, dtype
        self.wide = torch.float64 if dtype == torch.float32 else torch.float32
        self.candidates = torch.arange(100, 100 + workload.candidates) % shape.vocabulary

    @cached_property
    def stock(self) -> Any:
        from transformers import Qwen3ForCausalLM

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model: Any = Qwen3ForCausalLM(configuration(self.shape, tie_word_embeddings=True, pad_token_id=0))
        model.set_attn_implementation("sdpa")
        return model.to(self.dtype).eval()

    @cached_property
    def attached(self) -> Any:
        model = copy.deepcopy(self.stock)
        models.attach(model)
        return model

    def expected(self) -> Expected:
        return Expected(lambda: _once(one_by_one(self, self.wide)), lambda: _once(one_by_one(self)))


def rankernel_packed(inputs: Inputs, share: bool = True) -> Call:
    """Attached model, prompts packed; without ``share`` every prompt keeps its own beginning."""
    model, candidates = inputs.attached, inputs.candidates
    groups = inputs.workload.groups if share else [[prompt] for prompt in inputs.workload.prompts]
    head = models.head_of(model)

    def call() -> torch.Tensor:
        found = []
        for row in models.pack_prompts(groups):
            arguments = models.model_inputs(row.input_ids, row.layout, position_ids=row.position_ids)
            hidden = models.final_hidden_states(model, row.ends, **arguments)
            found.append(head.candidate_logits(hidden, candidates) if len(candidates) else hidden)
        return torch.cat(found)

    return call


def padded_batch(inputs: Inputs, batch: int | None = None) -> Call:
    """Stock model, left padding, ``logits_to_keep=1``, then the columns; in batches of ``batch`` prompts or one."""
    prompts = inputs.workload.prompts
    size = batch or len(prompts)
    parts = []
    for begin in range(0, len(prompts), size):
        part = prompts[begin : begin + size]
        longest = max(map(len, part))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in part])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in part])
        parts.append({"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)})
    model, candidates = inputs.stock, inputs.candidates

    def call() -> torch.Tensor:
        found = []
        for part in parts:
            if len(candidates):
                found.append(model(**part, use_cache=False, logits_to_keep=1).logits[:, -1, candidates])
            else:
                found.append(model.model(**part, use_cache=False).last_hidden_state[:, -1])
        return torch.cat(found)

    return call


def one_by_one(inputs: Inputs, dtype: torch.dtype | None = None) -> Call:
    """Stock model, every prompt alone: what the results should be."""
    model = inputs.stock if dtype is None else copy.deepcopy(inputs.stock).to(dtype)
    candidates = inputs.candidates

    def call() -> torch.Tensor:
        found = []
        for prompt in inputs.workload.prompts:
            hidden = model.model(input_ids=torch.tensor([prompt]), use_cache=False).last_hidden_state[:, -1]
            found.append(hidden @ model.lm_head.weight[candidates].T if len(candidates) else hidden)
        return torch.cat(found)

    return call


def _once(call: Call) -> torch.Tensor:
    result = call()
    assert isinstance(result, torch.Tensor)
    return result


def prompts_problem(build: Callable[[Shape], Workload], shape: Shape, dtype: torch.dtype) -> Problem:
    """Scores of all prompts."""
    inputs = Inputs(build(shape), shape, dtype)
    expected = inputs.expected()
    return Problem(
        (
            Implementation("rankernel packed", lambda: rankernel_packed(inputs), expected, native_op=OP),
            Implementation(
                "rankernel packed without sharing",
                lambda: rankernel_packed(inputs, False),
                expected,
                native_op=OP,
            ),
            Implementation("stock one padded batch", lambda: padded_batch(inputs), expected),
            Implementation("stock padded batches of 8", lambda: padded_batch(inputs, 8), expected),
            Implementation("stock one by one", lambda: one_by_one(inputs), expected),
        )
    )


def icr_packed(inputs: Inputs) -> Call:
    """Attached model: documents once, both queries behind them; attention mass of the documents' tokens [2, P]."""
    model, (query, none) = inputs.attached.model, inputs.workload.prompts
    shared = inputs.workload.shared
    layout = BlockLayout.from_lengths([(shared, [len(query) - shared, len(none) - shared], 0)])
    tokens = torch.tensor(query + none[shared:])
    rows = [torch.arange(shared, len(query)), torch.arange(len(query), len(tokens))]
    request = models.MassRequest(range(inputs.shape.layers), rows)
    arguments = models.model_inputs(tokens, layout, scores=request)
    return lambda: torch.stack(model(**arguments).attentions).sum(dim=0)[:, :shared]


def icr_in_transformers(inputs: Inputs, dtype: torch.dtype | None = None) -> Call:
    """Stock eager attention with ``output_attentions``, the prompt of each query in full."""
    model = copy.deepcopy(inputs.stock.model)
    model.set_attn_implementation("eager")
    model.to(dtype or inputs.dtype)
    shared = inputs.workload.shared

    def mass(prompt: list[int]) -> torch.Tensor:
        found = model(input_ids=torch.tensor([prompt]), use_cache=False, output_attentions=True).attentions
        return torch.stack([weights[0, :, shared:, :shared].float().mean(dim=1).sum(dim=0) for weights in found]).sum(0)

    return lambda: torch.stack([mass(prompt) for prompt in inputs.workload.prompts])


def icr_problem(build: Callable[[Shape], Workload], shape: Shape, dtype: torch.dtype) -> Problem:
    """Attention that the documents' tokens receive from a query and from one without content, over all layers."""
    inputs = Inputs(build(shape), shape, dtype)
    expected = Expected(
        lambda: _once(icr_in_transformers(inputs, inputs.wide)), lambda: _once(icr_in_transformers(inputs))
    )
    return Problem(
        (
            Implementation("rankernel packed", lambda: icr_packed(inputs), expected, native_op=OP),
            Implementation("stock eager attentions twice", lambda: icr_in_transformers(inputs), expected),
        )
    )


def _case(
    name: str,
    what: str,
    build: Callable[[Shape], Workload],
    shape: Shape,
    seconds: float = 10.0,
    problem: Callable[[Callable[[Shape], Workload], Shape, torch.dtype], Problem] = prompts_problem,
    **options: Any,
) -> Case:
    words = f"{what}, {shape.layers} layers of {shape.hidden}, {build(shape)}"
    return Case(name, words, partial(problem, build, shape), seconds=seconds, **options)


BFLOAT16 = {"dtypes": (torch.bfloat16,)}
CASES = (
    _case("tiny", "pointwise", partial(pointwise, 3, 5), TINY, 0.1),
    _case("tiny-embedding", "embeddings", partial(embedding, 3), TINY, 0.1),
    _case("tiny-icr", "attention of two queries", partial(icr, 3), TINY, 0.1, icr_problem),
    _case("pointwise-50", "pointwise", partial(pointwise, 50, 200), QWEN3_06B, default=True, **BFLOAT16),
    _case("pairwise-10", "all pairs", partial(pairwise, 10), QWEN3_06B, **BFLOAT16),
    _case("groupwise-10", "a group of 10", partial(groupwise, 10), QWEN3_06B, **BFLOAT16),
    _case("embedding-50", "embeddings", partial(embedding, 50), QWEN3_06B, **BFLOAT16),
    _case("first-20", "one window", partial(listwise, 20), QWEN3_06B, **BFLOAT16),
    _case("icr-20", "attention of two queries", partial(icr, 20), QWEN3_06B, problem=icr_problem, **BFLOAT16),
)
