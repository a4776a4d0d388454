"""A Hugging Face model with and without rankernel attached: prefill, document scores of one layer, training steps.

The model has random weights in the configuration of Qwen3-0.6B, cut to 4 of its 28 layers. A training step is
BlockRank's: forward, language-model loss of an answer's tokens plus the contrastive loss on the document scores,
backward, and AdamW on all weights, with a learning rate of 0, so that every step is the same. Only steps have a
language-model head, on the answer's rows; it shares the embedding's weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from cases.document_scores import document_index, logsumexp_in_pytorch
from cases.lora_linear import Results, expected_of
from measure import Call, Case, Expected, Implementation, Problem
from rankernel import BlockLayout, models
from rankernel.training import document_scores_from_logsumexp
from workloads import attention_flops, in_words, ranking_list, visible_pairs

Lengths = tuple[int, list[int], int]
OP = "block_attention"
SIGNAL_ROWS = 2  # BlockRank scores by the last two tokens
ANSWER_TOKENS = 3
Forward = Callable[[], tuple[torch.Tensor, torch.Tensor]]  # hidden states [T, hidden] and log-sum-exp of the documents


@dataclass(frozen=True)
class Shape:
    """Sizes of a Qwen3 model; ``layer`` is the one that gives the scores, counted from 0."""

    layers: int
    layer: int
    hidden: int
    intermediate: int
    heads: tuple[int, int, int]
    vocabulary: int

    @property
    def layer_weights(self) -> int:
        """Entries of the matrices of one layer."""
        query_heads, kv_heads, head_size = self.heads
        return self.hidden * (2 * query_heads * head_size + 2 * kv_heads * head_size + 3 * self.intermediate)


QWEN3_06B = Shape(layers=4, layer=2, hidden=1024, intermediate=3072, heads=(16, 8, 128), vocabulary=151936)
TINY = Shape(layers=3, layer=1, hidden=32, intermediate=48, heads=(4, 2, 16), vocabulary=64)


def configuration(shape: Shape, family: str = "qwen3", **more: Any) -> Any:
    """Of Qwen3-0.6B but for its sizes and, if given, its family."""
    from transformers import AutoConfig

    query_heads, kv_heads, head_size = shape.heads
    return AutoConfig.for_model(
        family,
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=head_size,
        max_position_embeddings=40960,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        **more,
    )


class Inputs:
    """The model, its tokens and its layout, made when first used."""

    def __init__(self, lengths: Lengths, shape: Shape, dtype: torch.dtype) -> None:
        self.layout = BlockLayout.from_lengths([lengths])
        self.shape = shape
        self.dtype = dtype
        # SDPA in float64 takes twice as long again and adds nothing where the implementations round to 8 or 11 bits.
        self.wide = torch.float64 if dtype == torch.float32 else torch.float32

    @property
    def flops(self) -> int:
        query_heads, _, head_size = self.shape.heads
        attention = attention_flops(visible_pairs(self.layout), query_heads, head_size)
        return self.shape.layers * (2 * self.shape.layer_weights * self.layout.num_tokens + attention)

    @cached_property
    def stock(self) -> Any:
        """The unchanged model, with SDPA."""
        from transformers import Qwen3Model

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model: Any = Qwen3Model(configuration(self.shape))
        model.set_attn_implementation("sdpa")
        return model.to(self.dtype).eval()

    @cached_property
    def attached(self) -> Any:
        """A copy of the model with rankernel attached."""
        model = copy.deepcopy(self.stock)
        models.attach(model)
        return model

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """[1, T]"""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.shape.vocabulary, (1, self.layout.num_tokens), generator=generator)

    @property
    def rows(self) -> torch.Tensor:
        return self.layout.tail_positions(last=SIGNAL_ROWS)


def stock_arguments(inputs: Inputs, causal: bool) -> dict[str, Any]:
    """What stock SDPA takes: the dense mask and the layout's positions, or, causal, a plain sequence."""
    positions = inputs.layout.position_ids("sequential" if causal else "shared")
    return {
        "input_ids": inputs.input_ids,
        "attention_mask": None if causal else inputs.layout.dense_mask()[None, None],
        "position_ids": positions[None],
        "use_cache": False,
    }


def stock_prefill(inputs: Inputs, causal: bool = False, dtype: torch.dtype | None = None) -> Call:
    """Stock SDPA: hidden states [T, hidden]."""
    model = inputs.stock if dtype is None else copy.deepcopy(inputs.stock).to(dtype)
    arguments = stock_arguments(inputs, causal)
    return lambda: model(**arguments).last_hidden_state[0]


def attached_prefill(inputs: Inputs) -> Call:
    """The attached model: hidden states [T, hidden]."""
    arguments = models.model_inputs(inputs.input_ids, inputs.layout)
    return lambda: inputs.attached(**arguments).last_hidden_state[0]


def stock_scores(
    inputs: Inputs, causal: bool = False, early_exit: bool = False, dtype: torch.dtype | None = None
) -> Call:
    """Stock SDPA with query and key of the score layer captured, and document log-sum-exp from them in PyTorch.

    With ``early_exit`` the layers after the score layer are cut off. Returns [rows, Hq, documents].
    """
    model = copy.deepcopy(inputs.stock)
    if dtype is not None:
        model.to(dtype)
    if early_exit:
        model.layers = model.layers[: inputs.shape.layer + 1]
    forward = stock_forward(inputs, model, causal)
    return lambda: forward()[1]


def stock_forward(inputs: Inputs, model: Any, causal: bool = False) -> Forward:
    """Hidden states and document log-sum-exp of stock SDPA."""
    captured = capture(model, inputs.shape.layer)
    arguments = stock_arguments(inputs, causal)
    index, valid = document_index(inputs.layout)
    rows = inputs.rows

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        hidden = model(**arguments).last_hidden_state[0]
        query, key = (tensor[0].transpose(0, 1) for tensor in captured)
        captured.clear()
        return hidden, logsumexp_in_pytorch(query[rows], key, index, valid)

    return call


def capture(model: Any, layer: int) -> list[torch.Tensor]:
    """Switches the model to SDPA that puts query and key [1, heads, T, D] of ``layer`` in the returned list."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    captured: list[torch.Tensor] = []

    def attention(module: Any, query: torch.Tensor, key: torch.Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx == layer:
            captured[:] = query, key
        return sdpa_attention_forward(module, query, key, *rest, **options)

    name = f"benchmark_capture_{id(captured)}"
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.set_attn_implementation(name)
    return captured


def attached_scores(inputs: Inputs) -> Call:
    """All layers of the attached model, scores on the way: [rows, Hq, documents]."""
    forward = attached_forward(inputs, inputs.attached)
    return lambda: forward()[1]


def attached_forward(inputs: Inputs, model: Any) -> Forward:
    """Hidden states and document log-sum-exp of an attached model."""
    request = models.ScoreRequest([inputs.shape.layer], inputs.rows)
    arguments = models.model_inputs(inputs.input_ids, inputs.layout, scores=request)

    def call() -> tuple[torch.Tensor, torch.Tensor]:
        outputs = model(**arguments)
        return outputs.last_hidden_state[0], outputs.attentions[0]

    return call


def training_step(inputs: Inputs, attached: bool, dtype: torch.dtype | None = None) -> Results:
    """A step of a copy of the model; gradients of the matrices that make queries, keys and values, layer by layer."""
    model = copy.deepcopy(inputs.stock).to(dtype or inputs.dtype).train()
    if attached:
        models.attach(model)
    forward = attached_forward(inputs, model) if attached else stock_forward(inputs, model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    answer_rows = inputs.layout.tail_positions(last=ANSWER_TOKENS)
    answer_ids = inputs.input_ids[0, :ANSWER_TOKENS]
    relevant = torch.zeros(1, dtype=torch.long)

    def call() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            hidden, logsumexp = forward()
            logits = F.linear(hidden[answer_rows], model.embed_tokens.weight)
            scores = document_scores_from_logsumexp(logsumexp, 1) / 0.05
            loss = F.cross_entropy(logits.float(), answer_ids) + 0.1 * F.cross_entropy(scores, relevant)
            loss.backward()
        matrices = [
            projection.weight
            for layer in model.layers
            for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj)
        ]
        gradients = tuple(matrix.grad for matrix in matrices)
        optimizer.step()
        optimizer.zero_grad()
        return gradients

    return call


def training_problem(lengths: Lengths, shape: Shape, dtype: torch.dtype) -> Problem:
    """Training steps of the attached model and of stock SDPA with the dense mask."""
    inputs = Inputs(lengths, shape, dtype)
    expected = expected_of(
        lambda: training_step(inputs, False, inputs.wide)(), lambda: training_step(inputs, False)(), 3 * shape.layers
    )
    return Problem(
        (
            Implementation("attached", lambda: training_step(inputs, True), expected, native_op=OP),
            Implementation("stock SDPA dense mask", lambda: training_step(inputs, False), expected),
        )
    )


def early_exit_scores(inputs: Inputs) -> Call:
    """The attached model up to the score layer, of which only the keys and the signal rows' queries are computed."""
    ids, layout, layer, rows = inputs.input_ids, inputs.layout, inputs.shape.layer, inputs.rows
    return lambda: models.layer_scores(inputs.attached, ids, layout, layer, rows)


def prefill_problem(lengths: Lengths, shape: Shape, dtype: torch.dtype) -> Problem:
    """Hidden states of all tokens after all layers."""
    inputs = Inputs(lengths, shape, dtype)
    expected = Expected(lambda: _once(stock_prefill(inputs, dtype=inputs.wide)), lambda: _once(stock_prefill(inputs)))
    flops = inputs.flops
    return Problem(
        (
            Implementation("attached", lambda: attached_prefill(inputs), expected, flops, native_op=OP),
            Implementation("stock SDPA dense mask", lambda: stock_prefill(inputs), expected, flops),
            Implementation("stock SDPA causal (other mask)", lambda: stock_prefill(inputs, causal=True), expected),
        )
    )


def scores_problem(lengths: Lengths, shape: Shape, dtype: torch.dtype) -> Problem:
    """Document log-sum-exp of the signal rows in one layer."""
    inputs = Inputs(lengths, shape, dtype)
    expected = Expected(lambda: _once(stock_scores(inputs, dtype=inputs.wide)), lambda: _once(stock_scores(inputs)))
    stock: Sequence[tuple[str, dict[str, Any]]] = (
        ("stock SDPA dense mask", {}),
        ("stock SDPA dense mask early exit", {"early_exit": True}),
        ("stock SDPA causal (other mask)", {"causal": True}),
    )
    return Problem(
        (
            Implementation("attached", lambda: attached_scores(inputs), expected, native_op=OP),
            Implementation("attached early exit", lambda: early_exit_scores(inputs), expected, native_op=OP),
            *(Implementation(name, partial(stock_scores, inputs, **options), expected) for name, options in stock),
        )
    )


def _once(call: Call) -> torch.Tensor:
    result = call()
    assert isinstance(result, torch.Tensor)
    return result


def _case(
    problem: Callable[[Lengths, Shape, torch.dtype], Problem],
    name: str,
    what: str,
    lengths: Lengths,
    shape: Shape,
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,),
    seconds: float = 6.0,
    default: bool = False,
) -> Case:
    tokens = in_words(BlockLayout.from_lengths([lengths]), *shape.heads)
    words = f"{what}, {shape.layers} layers of {shape.hidden}, {tokens}"
    return Case(name, words, partial(problem, lengths, shape), dtypes, seconds, default)


PREFILL = "Qwen3-0.6B prefill"
SCORES = f"Qwen3-0.6B scores of layer {QWEN3_06B.layer}"
STEP = f"Qwen3-0.6B training step, scores of layer {QWEN3_06B.layer}"
TINY_LIST = (8, [5, 1, 12], 4)
TINY_DTYPES = (torch.float32, torch.bfloat16)

CASES = (
    _case(prefill_problem, "tiny", "Qwen3 prefill", TINY_LIST, TINY, TINY_DTYPES, seconds=0.1),
    _case(scores_problem, "tiny-scores", f"Qwen3 scores of layer {TINY.layer}", TINY_LIST, TINY, TINY_DTYPES, 0.1),
    _case(
        training_problem,
        "tiny-step",
        f"Qwen3 training step, scores of layer {TINY.layer}",
        TINY_LIST,
        TINY,
        TINY_DTYPES,
        0.1,
    ),
    _case(prefill_problem, "20-documents", PREFILL, ranking_list(20), QWEN3_06B, default=True),
    _case(scores_problem, "20-documents-scores", SCORES, ranking_list(20), QWEN3_06B),
    _case(prefill_problem, "100-documents", PREFILL, ranking_list(100), QWEN3_06B),
    _case(scores_problem, "100-documents-scores", SCORES, ranking_list(100), QWEN3_06B),
    _case(training_problem, "30-documents-step", STEP, (64, [160] * 30, 48), QWEN3_06B, seconds=40.0),
)
