"""Document scores of one layer as CUDA graphs: a whole model is launched at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch

from rankernel.layout import BlockLayout, moved_to
from rankernel.models.attach import decoder_of
from rankernel.models.attention import ScoreRequest, model_inputs
from rankernel.models.early_exit import layer_scores


class LayerScoreGraphs:
    """:func:`layer_scores` on a GPU without its launches: recorded once for every bucket of layouts, then replayed.

    Launching the kernels of a small model, or of a short list, takes longer than they run; a CUDA graph launches all
    of them at once. Graphs are recorded for shapes, so every list is filled up with empty documents and the row with
    a list of padding tokens: to the next size with four significant bits, at most an eighth more. What is filled up
    is seen by nobody. A new bucket runs the model twice and records it, which takes as long as several calls; its
    graph is kept as long as this object.

    A graph reads the weights where they were when it was recorded, with the adapters and under the autocast of that
    time. Weights that are changed in place count, replaced ones (``model.to``, merged adapters) need a new object.
    One object serves one stream at a time.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        layer: int,
        *,
        position_scheme: Literal["shared", "sequential"] = "shared",
        tail_offset: int = 16384,
    ) -> None:
        """
        Args:
            model: an attached model on a CUDA device.
            layer, position_scheme, tail_offset: see :func:`layer_scores`.

        Raises:
            ValueError: a model whose rotary positions depend on the length of its input, which waits for the GPU.
        """
        types = getattr(getattr(decoder_of(model), "rotary_emb", None), "rope_type", "default")
        for rope_type in types.values() if isinstance(types, dict) else [types]:
            if "dynamic" in rope_type or rope_type == "longrope":
                raise ValueError(
                    f"model: expected rotary positions that are the same for every length, got {rope_type!r}, for "
                    "which Transformers reads the positions back from the GPU"
                )
        self.model = model
        self.layer = layer
        self.position_scheme: Literal["shared", "sequential"] = position_scheme
        self.tail_offset = tail_offset
        self._graphs: dict[tuple[int, ...], _Graph] = {}
        self._shared: Any = None

    @torch.no_grad()
    def __call__(self, input_ids: torch.Tensor, layout: BlockLayout, rows: torch.Tensor) -> torch.Tensor:
        """Scores of a packed row; after the first call of a bucket it returns before the GPU is done.

        Args:
            input_ids: [T] or [1, T] integers on the CPU, the packed tokens.
            layout: where the lists lie, on the CPU.
            rows: [R] integers on the CPU, packed positions of the query rows.

        Returns:
            float32 [R, Hq, max_documents] on the model's device, as :func:`layer_scores` gives them.

        Raises:
            ValueError: a model that is not attached or not on a CUDA device, or inputs that do not fit.
        """
        request = ScoreRequest([self.layer], rows)
        inputs = model_inputs(
            input_ids, layout, position_scheme=self.position_scheme, tail_offset=self.tail_offset, scores=request
        )
        padded = _padded(layout)
        padding = (0, padded.num_tokens - layout.num_tokens)
        tokens = [torch.nn.functional.pad(inputs[name][0], padding) for name in ("input_ids", "position_ids")]
        numbers = torch.cat([*tokens, request.rows, padded.cu_seqlens])
        key = padded.num_tokens, padded.num_lists, padded.max_documents, rows.numel(), padded.causal
        if key not in self._graphs:
            self._graphs[key] = self._record(numbers, padded, rows.numel())
        graph = self._graphs[key]
        graph.numbers.copy_(moved_to(numbers, graph.numbers.device, non_blocking=True))
        graph.replay()
        return graph.scores[..., : layout.max_documents].clone()

    def _record(self, numbers: torch.Tensor, padded: BlockLayout, num_rows: int) -> _Graph:
        device = decoder_of(self.model).device
        numbers, padded = numbers.to(device), padded.to(device)
        sizes = (padded.num_tokens, padded.num_tokens, num_rows, padded.cu_seqlens.numel())
        input_ids, position_ids, rows, cu_seqlens = numbers.split(sizes)

        def run() -> torch.Tensor:
            padded.cu_seqlens.copy_(cu_seqlens)  # in a bucket all else of a layout is the same
            return layer_scores(self.model, input_ids, padded, self.layer, rows, position_ids=position_ids)

        scores, replay, self._shared = record(run, device, self._shared)
        return _Graph(numbers, padded, scores, replay)


class _Graph(NamedTuple):
    """What a graph reads, which it does not keep itself, what it writes, and how to run it."""

    numbers: torch.Tensor
    layout: BlockLayout
    scores: torch.Tensor
    replay: Callable[[], None]


def record(
    run: Callable[[], torch.Tensor], device: torch.device, shared: Any
) -> tuple[torch.Tensor, Callable[[], None], Any]:
    """A CUDA graph of ``run``: its result, which every replay writes anew, the replay, and what the next may share.

    That is a stream to record on, and with it the workspace of cuBLAS, and a pool of memory: the result of one graph
    has to be read before another is replayed.
    """
    if device.type != "cuda":
        raise ValueError(f"model: expected one on a CUDA device to record graphs of it, got {device}")
    # Autocast would keep the weights that the first run casts, outside of the graph.
    autocast = torch.autocast(
        "cuda", torch.get_autocast_dtype("cuda"), torch.is_autocast_enabled("cuda"), cache_enabled=False
    )
    with torch.cuda.device(device), autocast:
        stream, pool = shared or (torch.cuda.Stream(), torch.cuda.graph_pool_handle())
        # Compiling kernels and making workspaces cannot be recorded; capturing asks for another stream.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            result = run()
    return result, graph.replay, (stream, pool)


def _padded(layout: BlockLayout) -> BlockLayout:
    """The layout of the bucket: its lists with empty documents behind theirs, and the padding as one more list."""
    num_documents, num_tokens = _bucket(layout.max_documents), _bucket(layout.num_tokens)
    lists = [
        (prefix, [*documents, *[0] * (num_documents - len(documents))], tail)
        for prefix, documents, tail in layout.lengths
    ]
    share, rest = divmod(num_tokens - layout.num_tokens, num_documents)
    padding = [share + 1] * rest + [share] * (num_documents - rest)
    return BlockLayout.from_lengths([*lists, (0, padding, 0)], layout.pattern)


def _bucket(size: int) -> int:
    """The next positive number with at most four significant bits."""
    step = 1 << max(0, size.bit_length() - 4)
    return max(1, -(-size // step) * step)
