"""The demonstration: real documents ranked by the bundled model, and what the kernels gain over stock PyTorch.

The documents are held-out docstrings of Python's standard library (:mod:`rankernel.corpus`), the first stage is BM25.
Time and memory of the same weights are measured in one process per variant, so that one does not hide the peak of
another, and the processes take turns query by query, so that all meet the same machine:

- stock, all layers: SDPA with the equivalent dense mask, as a user of plain Transformers would run it;
- stock, up to the scoring layer: the same but stopped after layer l*, so that early exit is not credited to the kernel;
- rankernel: attached.
"""

from __future__ import annotations

import random
import signal
import statistics
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, suppress
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from rankernel import corpus, models, run_files
from rankernel.cli import effectiveness_table, progress_bar
from rankernel.layout import DOCUMENT, BlockLayout
from rankernel.models.attach import decoder_of
from rankernel.rerankers import BlockRank, Ranking
from rankernel.rerankers.blockrank import with_rank_prior
from rankernel.rerankers.prompts import build_blocks

if TYPE_CHECKING:
    from rich.console import Console

RANKER_DIRECTORY = Path(__file__).resolve().parent / "assets" / "ranker"
OUTPUT_DIRECTORY = Path("demo_output")
DEPTH = 50
SIZES = (10, 20, 50, 100, 150)
TIMED_QUERIES = 3
VARIANTS = {
    "stock": "stock, all layers",
    "stock-exit": "stock, to layer l*",
    "rankernel": "rankernel",
}


class Measurement(NamedTuple):
    """One list ranked by one variant.

    Attributes:
        seconds: from texts to scores.
        peak_bytes: most memory that the process has held so far above that of the loaded model, in bytes.
        scores: of every document, in the order given.
    """

    seconds: float
    peak_bytes: int
    scores: list[float]


class _Task(NamedTuple):
    """The queries of the demonstration, with the whole pool of documents behind them."""

    queries: dict[str, str]
    documents: dict[str, str]
    qrels: dict[str, dict[str, int]]
    candidates: dict[str, corpus.Candidates]

    @classmethod
    def load(cls, num_queries: int, depth: int) -> _Task:
        pool = corpus.load_stdlib("heldout")
        chosen = random.Random(0).sample(list(pool.queries), min(num_queries, len(pool.queries)))
        queries = {query_id: pool.queries[query_id] for query_id in chosen}
        qrels = {query_id: pool.qrels[query_id] for query_id in chosen}
        return cls(queries, pool.documents, qrels, corpus.bm25_candidates(queries, pool.documents, depth=depth))

    def best(self, query_id: str, depth: int = DEPTH) -> list[str]:
        """Ids of BM25's best documents, best first."""
        return self.candidates[query_id].document_ids[:depth]

    def texts(self, query_id: str, depth: int = DEPTH) -> list[str]:
        return [self.documents[document_id] for document_id in self.best(query_id, depth)]


def run_demo(
    console: Console,
    num_queries: int,
    *,
    ranker: Path = RANKER_DIRECTORY,
    output: Path = OUTPUT_DIRECTORY,
    sizes: Sequence[int] = SIZES,
) -> None:
    """Runs the demonstration and writes its files.

    Args:
        console: where tables, examples and progress go.
        num_queries: how many held-out queries to rank; all if there are fewer.
        ranker: directory of the model.
        output: directory to write to; made if it is not there.
        sizes: numbers of documents to measure time and memory with, ascending.

    Raises:
        FileError: the bundled model is not there, or the files cannot be written.
        ImportError: a package of the extra ``cli`` is not installed.
    """
    import matplotlib  # noqa: F401  so that it is not missed only after the work

    if not (ranker / "config.json").is_file():
        raise run_files.FileError(ranker, None, "the bundled model is not there")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise run_files.FileError(output, None, error.strerror or str(error)) from None
    task = _Task.load(num_queries, max(DEPTH, *sizes))
    rankings = _rank(console, ranker, task)
    _show_examples(console, task, rankings)
    _show_effectiveness(console, task, rankings)
    _write_files(output, task, rankings)
    measured = _measure_variants(console, ranker, task, sizes)
    _show_measurements(console, measured)
    draw_chart(output / "latency.png", measured)
    files = {
        "queries": "queries.tsv",
        "documents": "documents.jsonl",
        "run": "bm25.trec",
        "qrels": "qrels.txt",
        "output": "out.trec",
    }
    command = " ".join(f"--{name} {output / file}" for name, file in files.items())
    console.print(f"wrote {output / 'latency.png'}, and the files to rerank yourself:")
    console.print(f"rankernel rerank --model {ranker} {command}", soft_wrap=True, highlight=False)


def _load(ranker: Path) -> BlockRank:
    from transformers.utils import logging

    logging.disable_progress_bar()
    return BlockRank.from_pretrained(ranker, dtype=torch.float32)


def _rank(console: Console, ranker: Path, task: _Task) -> dict[str, Ranking]:
    reranker = _load(ranker)
    rankings = {}
    with progress_bar(console) as progress:
        for query_id, query in progress.track(task.queries.items(), description=f"ranking {DEPTH} documents a query"):
            rankings[query_id] = reranker.rank(query, task.texts(query_id), document_ids=task.best(query_id))
    return rankings


def _show_examples(console: Console, task: _Task, rankings: Mapping[str, Ranking]) -> None:
    from rich.table import Table
    from rich.text import Text

    console.print("\nExamples; * marks the docstring whose first sentence the query is")
    for query_id, query in list(task.queries.items())[:3]:
        console.print(Text(f"\n{query}", style="bold"))
        table = Table("", "rank", "BM25", "score", "document", box=None, padding=(0, 2, 0, 0))
        for row in rankings[query_id][:3]:
            document_id = str(row.document_id)
            mark = "*" if document_id in task.qrels[query_id] else ""
            text = Text(_clipped(task.documents[document_id]))
            table.add_row(mark, str(row.rank), str(row.index + 1), f"{row.score:.3f}", text)
        console.print(table)


def _clipped(text: str) -> str:
    return text if len(text) <= 100 else f"{text[:97]}..."


def _show_effectiveness(console: Console, task: _Task, rankings: Mapping[str, Ranking]) -> None:
    shuffler = random.Random(0)
    bm25 = {query_id: task.best(query_id) for query_id in task.queries}
    orders = {
        "shuffled": {query_id: shuffler.sample(best, len(best)) for query_id, best in bm25.items()},
        "BM25": bm25,
        "rankernel": {query_id: [str(row.document_id) for row in ranking] for query_id, ranking in rankings.items()},
    }
    rows = {
        name: run_files.effectiveness(task.qrels, run_files.scores_in_order(order)) for name, order in orders.items()
    }
    console.print(f"\n{len(task.queries)} held-out queries, the {DEPTH} best documents of BM25 in three orders")
    console.print(effectiveness_table(rows))


def _write_files(output: Path, task: _Task, rankings: Mapping[str, Ranking]) -> None:
    bm25 = {query_id: found.ranked[:DEPTH] for query_id, found in task.candidates.items()}
    pool = {name: task.documents[name] for query_id in task.queries for name in task.best(query_id)}
    run_files.write_task(output, task.queries, pool, task.qrels, bm25)
    ranked = {query_id: [(str(row.document_id), row.score) for row in rows] for query_id, rows in rankings.items()}
    lines = (run_files.run_lines(query_id, rows) for query_id, rows in ranked.items())
    run_files.write_atomically(output / "run.trec", lines)


def _measure_variants(
    console: Console, ranker: Path, task: _Task, sizes: Sequence[int]
) -> dict[str, dict[int, list[Measurement]]]:
    """Per variant and number of documents, one measurement for each of the timed queries."""
    timed = list(task.queries.items())[:TIMED_QUERIES]
    measured: dict[str, dict[int, list[Measurement]]] = {variant: {size: [] for size in sizes} for variant in VARIANTS}
    with ExitStack() as stack, progress_bar(console) as progress:
        bar = progress.add_task("measuring time and memory", total=len(sizes) * len(timed) * len(VARIANTS))
        workers = {
            variant: stack.enter_context(
                ProcessPoolExecutor(1, get_context("spawn"), _start_worker, (variant, ranker, torch.get_num_threads()))
            )
            for variant in VARIANTS
        }
        for started in [worker.submit(int) for worker in workers.values()]:
            started.result()
        for size in sizes:
            for query_id, query in timed:
                documents = task.texts(query_id, size)
                for variant, worker in workers.items():
                    measured[variant][size].append(worker.submit(_measure, query, documents).result())
                    progress.advance(bar)
    return measured


class _Worker:
    """State of a measuring process."""

    rank: Any
    resident: int


def _start_worker(variant: str, ranker: Path, threads: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # an interrupted demo ends at once and without their tracebacks
    torch.set_num_threads(threads)
    reranker = _load(ranker)
    if variant == "rankernel":
        _Worker.rank = lambda query, documents: next(reranker.score_lists([(query, documents)]))[0]
    else:
        _Worker.rank = StockBlockRank(reranker, all_layers=variant == "stock")
    _Worker.rank("what is loaded or built once", ["is so before", "anything is measured"])
    with suppress(OSError):  # not writable in every container; the peak then includes loading
        Path("/proc/self/clear_refs").write_text("5")
    _Worker.resident = _memory("VmRSS")


def _measure(query: str, documents: list[str]) -> Measurement:
    begin = time.perf_counter()
    scores = _Worker.rank(query, documents)
    return Measurement(time.perf_counter() - begin, _memory("VmHWM") - _Worker.resident, scores)


def _memory(entry: str) -> int:
    """``VmRSS``, resident memory, or ``VmHWM``, its peak since ``clear_refs`` was written 5, in bytes (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"/proc/self/status has no {entry}")


class StockBlockRank:
    """The same reranker in plain Transformers: SDPA, a dense mask, scores as METHODS.md section 1.5 writes them.

    Args:
        reranker: whose model, tokenizer and settings to take; its model is detached.
        all_layers: whether to run all layers, or stop after the scoring layer.
    """

    def __init__(self, reranker: BlockRank, *, all_layers: bool) -> None:
        from transformers import AttentionInterface
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        models.detach(reranker.model)
        self.tokenizer, self.settings = reranker.tokenizer, reranker.settings
        self.model = reranker.model
        self.last_layer = len(decoder_of(self.model).layers) - 1 if all_layers else self.settings.layer

        def sdpa_that_keeps_scores(
            module: Any, query: torch.Tensor, key: torch.Tensor, *args: Any, **kwargs: Any
        ) -> tuple[torch.Tensor, None]:
            if module.layer_idx == self.settings.layer:
                self.scores = self._document_scores(query[0], key[0], kwargs["scaling"])
            return sdpa_attention_forward(module, query, key, *args, **kwargs)

        AttentionInterface.register("rankernel_demo_stock", sdpa_that_keeps_scores)
        self.model.set_attn_implementation("rankernel_demo_stock")

    @torch.no_grad()
    def __call__(self, query: str, documents: Sequence[str]) -> list[float]:
        """Scores of all documents of one list."""
        settings = self.settings
        blocks = build_blocks(self.tokenizer, settings.prompt, query, documents, settings.max_document_tokens)
        self.layout = BlockLayout.from_lengths([blocks.lengths], settings.pattern)
        decoder = decoder_of(self.model)
        with models.early_exit(self.model, self.last_layer):
            decoder(
                input_ids=torch.tensor([blocks.input_ids]),
                attention_mask=additive_mask(self.layout, decoder.dtype),
                position_ids=self.layout.position_ids(settings.position_scheme, settings.tail_offset)[None],
                use_cache=False,
            )
        return with_rank_prior(self.scores[None, None], settings.rank_prior)[0, 0].tolist()

    def _document_scores(self, query: torch.Tensor, key: torch.Tensor, scale: float) -> torch.Tensor:
        """[documents] from query [Hq, T, D] and key [Hkv, T, D]."""
        (segments,) = self.layout.segments()
        documents = [segment for segment in segments if segment[2] == DOCUMENT]
        owners = torch.repeat_interleave(torch.tensor([end - begin for begin, end, _ in documents]))
        rows = query[:, -self.settings.prompt.signal_tokens :].float()
        keys = key[:, documents[0][0] : documents[-1][1]].repeat_interleave(len(query) // len(key), dim=0).float()
        shares = torch.softmax(rows @ keys.transpose(1, 2) * scale, dim=-1).mean(dim=(0, 1))
        return torch.zeros(len(documents)).index_add(0, owners, shares)


def additive_mask(layout: BlockLayout, dtype: torch.dtype) -> torch.Tensor:
    """``layout.dense_mask()`` as [1, 1, T, T], 0 where a row sees a key and the lowest number elsewhere.

    It is written without temporaries of its own size, so that stock memory is that of the mask and the model.
    """
    mask = torch.full((layout.num_tokens, layout.num_tokens), torch.finfo(dtype).min, dtype=dtype)
    for segments in layout.segments():
        for begin, end, role in segments:
            end_of_seen = segments[0][1] if role == DOCUMENT and not layout.causal else begin
            mask[begin:end, segments[0][0] : end_of_seen] = 0
            mask[begin:end, begin:end].triu_(1)
    return mask[None, None]


def _largest_difference(measured: Mapping[str, Mapping[int, Sequence[Measurement]]]) -> float:
    return max(
        abs(ours - stock)
        for variant in ("stock", "stock-exit")
        for size, results in measured["rankernel"].items()
        for result, other in zip(results, measured[variant][size], strict=True)
        for ours, stock in zip(result.scores, other.scores, strict=True)
    )


def _milliseconds(results: Sequence[Measurement]) -> float:
    return statistics.median(result.seconds for result in results) * 1e3


def _megabytes(results: Sequence[Measurement]) -> float:
    return max(result.peak_bytes for result in results) / 1e6


def _conditions() -> str:
    return f"float32, CPU threads: {torch.get_num_threads()}"


def _show_measurements(console: Console, measured: Mapping[str, Mapping[int, Sequence[Measurement]]]) -> None:
    from rich.table import Table

    sizes = list(measured["rankernel"])
    console.print(
        f"\nMilliseconds per query (median of {TIMED_QUERIES}) and peak memory above the loaded model; {_conditions()}"
    )
    table = Table("documents", *VARIANTS.values())
    for column in table.columns:
        column.justify = "right"
    for size in sizes:
        cells = [measured[variant][size] for variant in VARIANTS]
        table.add_row(str(size), *(f"{_milliseconds(cell):.0f} ms {_megabytes(cell):5.0f} MB" for cell in cells))
    console.print(table)
    console.print(
        "stock is SDPA with the equivalent dense mask; l* is the layer that scores, after which rankernel stops"
    )
    console.print(f"largest score difference between them: {_largest_difference(measured):.1e}\n")


def draw_chart(path: Path, measured: Mapping[str, Mapping[int, Sequence[Measurement]]]) -> None:
    """Draws time and memory against the number of documents, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    colors = {"stock": "#b2182b", "stock-exit": "#ef8a62", "rankernel": "#2166ac"}
    figure, panels = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for panel, of, label in zip(
        panels, (_milliseconds, _megabytes), ("milliseconds per query", "peak memory above the model, MB"), strict=True
    ):
        for variant, name in VARIANTS.items():
            values = [of(results) for results in measured[variant].values()]
            panel.plot(list(measured[variant]), values, marker="o", color=colors[variant], label=name)
        panel.set(xlabel="documents per query", ylabel=label, xlim=(0, None), ylim=(0, None))
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].legend(frameon=False)
    figure.suptitle(f"Reranking with the bundled model; {_conditions()}")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
