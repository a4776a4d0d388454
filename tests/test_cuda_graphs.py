"""CUDA graphs of a model's document scores; on the CPU a stand-in replays by running again what was recorded."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankernel import BlockLayout
from rankernel.models import LayerScoreGraphs, ScoreRequest, attach, graphs, layer_scores, model_inputs
from rankernel.rerankers import COMPACT, BlockRank
from tiny_models import make_model, random_tokens
from tiny_ranker import tiny_model, tiny_tokenizer

LAYER = 2


def attached_model(family: str = "qwen3", **overrides: Any) -> Any:
    model = make_model(family, **overrides)
    attach(model)
    return model


class Recorder:
    """In place of ``graphs.record``: what a graph would hold still is held still, and what it runs is counted."""

    def __init__(self) -> None:
        self.shared: list[Any] = []
        self.replayed = 0
        self.read: list[weakref.ref[torch.Tensor]] = []

    def __call__(
        self, run: Callable[[], torch.Tensor], device: torch.device, shared: Any
    ) -> tuple[torch.Tensor, Callable[[], None], Any]:
        self.shared.append(shared)
        (layout,) = (cell.cell_contents for cell in run.__closure__ if isinstance(cell.cell_contents, BlockLayout))
        self.read += [weakref.ref(tensor) for tensor in (layout.cu_seqlens, layout.list_offsets)]
        result = torch.full_like(run(), torch.nan)

        def replay() -> None:
            self.replayed += 1
            result.copy_(run())

        return result, replay, "stream and pool"


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    recorder = Recorder()
    monkeypatch.setattr(graphs, "record", recorder)
    return recorder


layouts = st.lists(
    st.tuples(st.integers(0, 5), st.lists(st.integers(0, 9), max_size=6), st.integers(1, 4)), min_size=1, max_size=3
).map(BlockLayout.from_lengths)


@pytest.mark.usefixtures("recorder")
@settings(max_examples=20)
@given(st.lists(layouts, min_size=1, max_size=3), st.sampled_from(["shared", "sequential"]))
def test_scores_are_those_without_graphs(row_layouts: list[BlockLayout], scheme: Any) -> None:
    model = attached_model()
    replayed = LayerScoreGraphs(model, LAYER, position_scheme=scheme, tail_offset=300)
    for seed, layout in enumerate(row_layouts * 2):
        tokens, rows = random_tokens(layout.num_tokens, seed=seed), layout.tail_positions()
        with torch.no_grad():
            expected = layer_scores(model, tokens, layout, LAYER, rows, position_scheme=scheme, tail_offset=300)
        torch.testing.assert_close(replayed(tokens, layout, rows), expected, atol=2e-5, rtol=1e-5)


@given(layouts, st.sampled_from(["block", "causal"]))
def test_padding_is_seen_by_nobody(layout: BlockLayout, pattern: Any) -> None:
    layout = BlockLayout.from_lengths(layout.lengths, pattern)
    padded, tokens = graphs._padded(layout), layout.num_tokens
    mask = padded.dense_mask()
    assert torch.equal(mask[:tokens, :tokens], layout.dense_mask())
    assert not mask[:tokens, tokens:].any()
    assert not mask[tokens:, :tokens].any()


@given(st.integers(0, 10**6))
def test_buckets_are_at_most_an_eighth_larger(size: int) -> None:
    bucket = graphs._bucket(size)
    assert max(1, size) <= bucket <= max(1, size + size // 8)
    assert graphs._bucket(bucket) == bucket
    assert bucket.bit_length() - 4 <= (bucket & -bucket).bit_length() - 1


def test_one_graph_for_a_bucket(recorder: Recorder) -> None:
    model = attached_model()
    replayed = LayerScoreGraphs(model, LAYER)
    for documents in ([30] * 17, [31] * 17, [33, *[29] * 17], [500, 12]):
        layout = BlockLayout.from_lengths([(9, documents, 5)])
        tokens, rows = random_tokens(layout.num_tokens), layout.tail_positions(2)
        with torch.no_grad():
            expected = layer_scores(model, tokens, layout, LAYER, rows)
        torch.testing.assert_close(replayed(tokens, layout, rows), expected, atol=2e-5, rtol=1e-5)
    assert recorder.replayed == 4
    assert recorder.shared == [None, "stream and pool"]  # 17 and 18 documents are of one bucket, 2 are not


def test_blockrank(recorder: Recorder) -> None:
    lists = [("how to", ["read a file", "", "write"]), ("path", ["a b c"] * 4), ("q", [])]
    scores = []
    for cuda_graphs in (False, True):
        ranker = BlockRank.from_pretrained(
            tiny_model(), tokenizer=tiny_tokenizer(), layer=1, prompt=COMPACT, cuda_graphs=cuda_graphs
        )
        found = ranker.score_lists(lists * 2, batch_tokens=1)
        scores.append(torch.tensor([score for entry in found for score in entry.scores]))
    torch.testing.assert_close(*scores, atol=2e-6, rtol=1e-5)
    assert (len(recorder.shared), recorder.replayed) == (2, 4)


def test_a_graph_keeps_what_it_reads(recorder: Recorder, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real one knows addresses alone."""

    def record(run: Callable[[], torch.Tensor], *rest: Any) -> tuple[torch.Tensor, Callable[[], None], Any]:
        result, _, shared = recorder(run, *rest)
        return result, lambda: None, shared

    monkeypatch.setattr(graphs, "record", record)
    replayed = LayerScoreGraphs(attached_model(), LAYER)
    layout = BlockLayout.from_lengths([(1, [2, 9], 1)])
    replayed(random_tokens(layout.num_tokens), layout, layout.tail_positions())
    gc.collect()
    assert len(recorder.read) == 2
    assert all(tensor() is not None for tensor in recorder.read)


def test_positions_that_depend_on_the_length_are_refused() -> None:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}
    with pytest.raises(ValueError, match="rotary positions that are the same for every length, got 'dynamic'"):
        LayerScoreGraphs(attached_model("llama", rope_parameters=rope), LAYER)


def test_needs_a_gpu() -> None:
    layout = BlockLayout.from_lengths([(1, [2], 1)])
    with pytest.raises(ValueError, match="model: expected one on a CUDA device to record graphs of it, got cpu"):
        LayerScoreGraphs(attached_model(), LAYER)(random_tokens(4), layout, layout.tail_positions())


@pytest.mark.usefixtures("recorder")
def test_unfit_inputs_are_refused() -> None:
    layout = BlockLayout.from_lengths([(1, [2], 1)])
    replayed = LayerScoreGraphs(attached_model(), LAYER)
    with pytest.raises(ValueError, match="input_ids: expected shape"):
        replayed(random_tokens(3), layout, layout.tail_positions())
    with pytest.raises(ValueError, match=r"rows in \[0, 4\), got \[4\]"):
        replayed(random_tokens(4), layout, torch.tensor([4]))
    with pytest.raises(ValueError, match=r"layer: expected an index in \[0, 4\), got 9"):
        LayerScoreGraphs(attached_model(), 9)(random_tokens(4), layout, layout.tail_positions())


# On a GPU

SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def on_gpu(dtype: torch.dtype) -> Any:
    return attached_model("llama", **SIZES).to("cuda", dtype)


@pytest.mark.gpu
@dtypes
def test_graphs_on_a_gpu(dtype: torch.dtype) -> None:
    model = on_gpu(dtype)
    replayed = LayerScoreGraphs(model, LAYER)
    for seed, documents in enumerate([[90] * 17, [70, *[91] * 16], [160] * 40, [90] * 17]):
        layout = BlockLayout.from_lengths([(40, documents, 20)])
        tokens, rows = random_tokens(layout.num_tokens, seed=seed), layout.tail_positions(2)
        with torch.no_grad():
            expected = layer_scores(model, tokens.cuda(), layout, LAYER, rows)
        torch.testing.assert_close(replayed(tokens, layout, rows), expected, atol=2e-2, rtol=2e-2)


@pytest.mark.gpu
def test_blockrank_on_a_gpu() -> None:
    lists = [("how to", ["read a file", "", "write"]), ("path", ["a b c"] * 4), ("q", [])] * 2
    scores = []
    for device, cuda_graphs in (("cpu", False), ("cuda", False), ("cuda", True)):
        ranker = BlockRank(tiny_model().to(device), tiny_tokenizer(), layer=1, prompt=COMPACT, cuda_graphs=cuda_graphs)
        found = ranker.score_lists(lists, batch_tokens=300)
        scores.append(torch.tensor([score for entry in found for score in entry.scores]))
    for other in scores[1:]:
        torch.testing.assert_close(other, scores[0], atol=1e-4, rtol=1e-3)


@pytest.mark.gpu
@dtypes
def test_nothing_waits_for_the_gpu(dtype: torch.dtype) -> None:
    """Neither the forward pass with its scores nor the first copy of a layout."""
    model = on_gpu(dtype)
    layout = BlockLayout.from_lengths([(40, [90, 160, 3], 20)])
    tokens = random_tokens(layout.num_tokens).cuda()
    with torch.no_grad():
        layer_scores(model, tokens, layout, LAYER, layout.tail_positions(2))  # compiles
        torch.cuda.set_sync_debug_mode("error")
        try:
            there = BlockLayout.from_lengths(layout.lengths).to("cuda", non_blocking=True)
            model(**model_inputs(tokens, there, scores=ScoreRequest([LAYER], there.tail_positions(2))))
            layer_scores(model, tokens, there, LAYER, layout.tail_positions(2))
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_several_streams() -> None:
    """Calls that run at once do not meet in scratch memory."""
    model = on_gpu(torch.float32)
    calls = []
    for seed in range(4):
        layout = BlockLayout.from_lengths([(40, [90 + seed] * 30, 20)])
        calls.append(model_inputs(random_tokens(layout.num_tokens, seed=seed).cuda(), layout))
    with torch.no_grad():
        expected = [model(**call).logits for call in calls]
        torch.cuda.synchronize()
        for _ in range(5):
            streams = [torch.cuda.Stream() for _ in calls]
            found = []
            for stream, call in zip(streams, calls, strict=True):
                with torch.cuda.stream(stream):
                    found.append(model(**call).logits)
            torch.cuda.synchronize()
            assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_compiled_model_serves_other_layouts(device: str) -> None:
    """With all sizes dynamic from the start; the default is tested in ``test_models.py``."""
    model = attached_model("llama", **SIZES).to(device)
    torch._dynamo.reset()
    compiled = torch.compile(
        model.model, dynamic=True, fullgraph=True, backend="aot_eager" if device == "cpu" else "inductor"
    )
    with torch.no_grad():
        for documents in ([90, 100, 80], [60, 17], [33] * 9):
            layout = BlockLayout.from_lengths([(40, documents, 20)])
            call = model_inputs(random_tokens(layout.num_tokens).to(device), layout)
            expected = model.model(**call).last_hidden_state
            torch.testing.assert_close(compiled(**call).last_hidden_state, expected, atol=1e-3, rtol=1e-3)
    torch._dynamo.reset()
