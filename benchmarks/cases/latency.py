"""Reranking the list of one query with whole models: milliseconds per query.

The models have random weights, made on the device and in the dtype that they run in, in the configurations of
Mistral-7B-v0.3, Qwen3-0.6B and Qwen3-8B. A list has a prefix of 96 tokens, documents of 160 and a tail of 48, whose
last two rows score. A call makes the layout of its list, as every query has its own, and returns the log-sum-exps of
the documents in one layer in the middle, counted from 0. Token ids lie on the device, for the CUDA graph on the CPU.
Early exit runs the layers below the score layer and of that one the keys and the scoring rows' queries. Its operations
are the useful ones of all rows but the matrix products alone.

What the log-sum-exps should be comes from the stock model with a prefix cache: it runs the prefix, then the documents
as a batch behind it, then the tail behind the keys and values of all. That is the block mask by causal SDPA, in time
linear in the documents; a dense mask would make float32 attention over the 80,144 tokens of 500 documents the longest
part of the benchmark. It is also what a stock model could do about its documents, so it has a row.

The stock dense prefill is an ordinary prompt in all layers. Its documents see each other, so it has no speed-up and of
its hidden states only those of the prefix are compared. It runs where the prompt fits in the context of the model,
which that of 500 documents does not. Of the matrix products alone the last one is compared: keys of the score layer.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

from cases.document_scores import grouped_logits
from cases.model import OP, QWEN3_06B, SIGNAL_ROWS, TINY, Shape, capture, configuration
from measure import Case, Expected, Finding, Implementation, Problem
from rankernel import BlockLayout, models
from workloads import attention_flops, in_words, visible_pairs

BACKENDS = {"cpu": "cpu", "cuda": "triton"}
DENSE, PREFIX_CACHE = "stock dense prefill", "stock prefix cache"
EARLY_EXIT, GRAPH, MATMULS = "attached early exit", "attached early exit CUDA graph", "its matmuls alone"

Run = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Decoder:
    """A model: its family in Transformers, its sizes, and the tokens that it was made for."""

    family: str
    shape: Shape
    context: int


@dataclass(frozen=True)
class Lengths:
    """Tokens of the prefix, of every one of the documents, and of the tail."""

    prefix: int
    documents: int
    document: int
    tail: int

    def layout(self) -> BlockLayout:
        return BlockLayout.from_lengths([(self.prefix, [self.document] * self.documents, self.tail)])


_held: dict[tuple[Decoder, str, torch.dtype], Any] = {}


def stock(decoder: Decoder, device: str, dtype: torch.dtype) -> Any:
    """The unchanged model, with SDPA. The last one is kept for the next case; two never are."""
    key = decoder, device, dtype
    if key not in _held:
        from transformers import AutoModel

        _held.clear()
        # Mistral's window of 4096 tokens is that of version 0.1.
        config = configuration(decoder.shape, decoder.family, sliding_window=None)
        with torch.random.fork_rng(), torch.device(device):
            torch.manual_seed(0)
            _held[key] = AutoModel.from_config(config, dtype=dtype, attn_implementation="sdpa").eval()
    return _held[key]


class Inputs:
    """The token ids of a list, and a model's work on them. Holds no model, so that the next one finds room."""

    def __init__(self, decoder: Decoder, lengths: Lengths, device: str, dtype: torch.dtype) -> None:
        self.decoder, self.lengths, self.device, self.dtype = decoder, lengths, device, dtype
        self.shape = decoder.shape
        self.layout = lengths.layout()
        # As in ``cases.model``: a wider dtype adds nothing where the implementations round to 8 or 11 bits.
        self.wide = torch.float64 if dtype == torch.float32 else torch.float32

    @cached_property
    def input_ids(self) -> torch.Tensor:
        """int64 [T] on the CPU."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.shape.vocabulary, (self.layout.num_tokens,), generator=generator)

    def model(self, dtype: torch.dtype | None = None) -> Any:
        """A model of its own, which shares the weights of the stock one or has copies of them in ``dtype``."""
        model = stock(self.decoder, self.device, self.dtype)
        if dtype is not None:
            return copy.deepcopy(model).to(dtype)
        return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})

    def attached(self) -> Any:
        model = self.model()
        models.attach(model)
        return model

    @property
    def matmul_flops(self) -> int:
        """Of the matrices that early exit needs: whole layers, then keys of all tokens and queries of the rows."""
        query_heads, kv_heads, head_size = self.shape.heads
        tokens = self.layout.num_tokens
        score_layer = self.shape.hidden * head_size * (kv_heads * tokens + query_heads * SIGNAL_ROWS)
        return 2 * (self.shape.layer * self.shape.layer_weights * tokens + score_layer)

    @property
    def flops(self) -> int:
        """The same with attention."""
        query_heads, _, head_size = self.shape.heads
        attention = self.shape.layer * attention_flops(visible_pairs(self.layout), query_heads, head_size)
        pairs = SIGNAL_ROWS * self.lengths.documents * self.lengths.document
        return self.matmul_flops + attention + 2 * head_size * query_heads * pairs


def dense_prefill(inputs: Inputs, tokens: int | None = None, dtype: torch.dtype | None = None) -> Run:
    """Stock causal SDPA over the first ``tokens`` or all: hidden states [prefix, hidden] of the prefix."""
    model, prefix = inputs.model(dtype), inputs.lengths.prefix
    ids = inputs.input_ids[None, :tokens].to(inputs.device)
    return lambda: model(input_ids=ids, use_cache=False).last_hidden_state[0, :prefix]


def prefix_cache_scores(inputs: Inputs, dtype: torch.dtype | None = None) -> Run:
    """Stock SDPA, documents as a batch behind the cached prefix, up to the score layer: [rows, Hq, documents]."""
    from transformers import DynamicCache

    model, lengths, layer = inputs.model(dtype), inputs.lengths, inputs.shape.layer
    model.layers = model.layers[: layer + 1]
    captured = capture(model, layer)
    sizes = lengths.prefix, lengths.documents * lengths.document, lengths.tail
    ids, positions = (
        tensor.to(inputs.device).split(sizes) for tensor in (inputs.input_ids, inputs.layout.position_ids())
    )
    prefix, documents, tail = (
        {"input_ids": ids[part].view(batch, -1), "position_ids": positions[part].view(batch, -1)}
        for part, batch in enumerate((1, lengths.documents, 1))
    )

    def joined(kept: torch.Tensor) -> torch.Tensor:
        """From [documents, Hkv, prefix + document, D] to [1, Hkv, T - tail, D]."""
        of_documents = kept[:, :, lengths.prefix :].transpose(0, 1).flatten(1, 2)
        return torch.cat((kept[0, :, : lengths.prefix], of_documents), dim=1)[None]

    def call() -> torch.Tensor:
        cache = DynamicCache()
        model(**prefix, past_key_values=cache)
        cache.batch_repeat_interleave(lengths.documents)
        model(**documents, past_key_values=cache)
        for kept in cache.layers:
            kept.keys, kept.values = joined(kept.keys), joined(kept.values)
        model(**tail, past_key_values=cache)
        query, key = (tensor[0].transpose(0, 1) for tensor in captured)
        captured.clear()
        logits = grouped_logits(query[-SIGNAL_ROWS:], key[lengths.prefix : -lengths.tail])
        return logits.unflatten(-1, (lengths.documents, -1)).logsumexp(dim=-1).flatten(0, 1).transpose(0, 1)

    return call


def exact_scores(inputs: Inputs) -> torch.Tensor:
    """The log-sum-exps in a wider dtype.

    For bfloat16 that is float32 with products in TF32, which take a GPU a fraction of the time: they round activations
    eight times finer than bfloat16, and the weights not at all.
    """
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if inputs.dtype == torch.bfloat16 else "highest")
    try:
        return prefix_cache_scores(inputs, inputs.wide)()
    finally:
        torch.set_float32_matmul_precision(precision)


def attached_scores(inputs: Inputs) -> Run:
    """The attached model with all layers, scores on the way."""
    model, ids = inputs.attached(), inputs.input_ids.to(inputs.device)

    def call() -> torch.Tensor:
        layout = inputs.lengths.layout()
        request = models.ScoreRequest([inputs.shape.layer], layout.tail_positions(last=SIGNAL_ROWS))
        return model(**models.model_inputs(ids, layout, scores=request)).attentions[0]

    return call


def early_exit_scores(inputs: Inputs) -> Run:
    """The attached model up to the score layer's queries and keys."""
    model, ids = inputs.attached(), inputs.input_ids.to(inputs.device)

    def call() -> torch.Tensor:
        layout = inputs.lengths.layout()
        return models.layer_scores(model, ids, layout, inputs.shape.layer, layout.tail_positions(last=SIGNAL_ROWS))

    return call


def graph_scores(inputs: Inputs) -> Run:
    """The same as a CUDA graph, which the first call records."""
    from rankernel.models import LayerScoreGraphs

    graphs = LayerScoreGraphs(inputs.attached(), inputs.shape.layer)

    def call() -> torch.Tensor:
        layout = inputs.lengths.layout()
        return graphs(inputs.input_ids, layout, layout.tail_positions(last=SIGNAL_ROWS))

    return call


def activations(inputs: Inputs, width: int) -> torch.Tensor:
    """Random [T, width] on the device."""
    generator = torch.Generator(inputs.device).manual_seed(width)
    size = inputs.layout.num_tokens, width
    return torch.randn(size, generator=generator, device=inputs.device, dtype=inputs.dtype)


def matmuls_alone(inputs: Inputs) -> Run:
    """The products of early exit with the model's own matrices and nothing between them; returns the last one."""
    model, layer, tokens = inputs.model(), inputs.shape.layer, inputs.layout.num_tokens
    products = []
    for below in model.layers[:layer]:
        attention, mlp = below.self_attn, below.mlp
        projections = attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj
        products += [(linear.weight, tokens) for linear in (*projections, mlp.gate_proj, mlp.up_proj, mlp.down_proj)]
    attention = model.layers[layer].self_attn
    products += [(attention.q_proj.weight, SIGNAL_ROWS), (attention.k_proj.weight, tokens)]
    x = {width: activations(inputs, width) for width in {weight.shape[1] for weight, _ in products}}

    def call() -> torch.Tensor:
        for weight, rows in products:
            out = F.linear(x[weight.shape[1]][:rows], weight)
        return out

    return call


def last_product(inputs: Inputs, dtype: torch.dtype) -> torch.Tensor:
    """Keys [T, Hkv * D] of the score layer, as :func:`matmuls_alone` computes them last."""
    layers = stock(inputs.decoder, inputs.device, inputs.dtype).layers
    weight = layers[inputs.shape.layer].self_attn.k_proj.weight
    return F.linear(activations(inputs, inputs.shape.hidden).to(dtype), weight.to(dtype))


def problem(decoder: Decoder, lengths: Lengths, device: str, dtype: torch.dtype) -> Problem:
    """One query from token ids to the log-sum-exps of its documents."""
    inputs = Inputs(decoder, lengths, device, dtype)
    of_prefix = Expected(
        lambda: dense_prefill(inputs, lengths.prefix, inputs.wide)(), lambda: dense_prefill(inputs, lengths.prefix)()
    )
    scores = Expected(lambda: exact_scores(inputs), lambda: prefix_cache_scores(inputs)())
    keys = Expected(lambda: last_product(inputs, inputs.wide), lambda: last_product(inputs, dtype))
    own: dict[str, Callable[[Inputs], Run]] = {"attached": attached_scores, EARLY_EXIT: early_exit_scores}
    if device == "cuda":
        own[GRAPH] = graph_scores
    rows = [
        Implementation(PREFIX_CACHE, partial(prefix_cache_scores, inputs), scores, inputs.flops),
        *(
            Implementation(name, partial(build, inputs), scores, inputs.flops, native_op=OP, backend=BACKENDS[device])
            for name, build in own.items()
        ),
        Implementation(MATMULS, partial(matmuls_alone, inputs), keys, inputs.matmul_flops, compare=False),
    ]
    if inputs.layout.num_tokens <= decoder.context:
        rows.insert(0, Implementation(DENSE, partial(dense_prefill, inputs), of_prefix, compare=False))
    over_matmuls = (
        Finding("over_matmuls", f"{name} takes {{}} times {MATMULS}", name, MATMULS) for name in (EARLY_EXIT, GRAPH)
    )
    text = f"{DENSE}, where documents see each other, takes {{}} times as long as {EARLY_EXIT}"
    return Problem(tuple(rows), (*over_matmuls, Finding("over_early_exit", text, DENSE, EARLY_EXIT)))


def _case(name: str, decoder: Decoder, lengths: Lengths, seconds: float, on_cpu: bool, **options: Any) -> Case:
    shape = decoder.shape
    tokens = in_words(lengths.layout(), *shape.heads)
    words = f"{decoder.family}, {shape.layers} layers of {shape.hidden}, scores of layer {shape.layer}, {tokens}"
    on = partial(problem, decoder, lengths)
    build = partial(on, "cpu") if on_cpu else None
    return Case(name, words, build, seconds=seconds, build_on_gpu=partial(on, "cuda"), **options)


TINY_LIST = Lengths(8, 3, 6, 4)
TINY_DECODERS = {"tiny": "qwen3", "tiny-mistral": "mistral"}
DECODERS = {
    "mistral-7b": Decoder("mistral", Shape(32, 20, 4096, 14336, (32, 8, 128), 32768), 32768),
    "qwen3-0.6b": Decoder("qwen3", replace(QWEN3_06B, layers=28, layer=14), 40960),
    "qwen3-8b": Decoder("qwen3", Shape(36, 20, 4096, 12288, (32, 8, 128), 151936), 40960),
}
DOCUMENTS = (10, 20, 50, 100, 200, 500)

CASES = (
    *(
        _case(name, Decoder(family, TINY, 64), TINY_LIST, 0.1, on_cpu=True, dtypes=(torch.float32, torch.bfloat16))
        for name, family in TINY_DECODERS.items()
    ),
    *(
        _case(
            f"{name}-{documents}",
            decoder,
            Lengths(96, documents, 160, 48),
            seconds=2.0 if documents < 100 else 6.0,
            on_cpu=False,
            dtypes=(torch.bfloat16,),
        )
        for name, decoder in DECODERS.items()
        for documents in DOCUMENTS
    ),
)
