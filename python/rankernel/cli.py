"""The command line: ``rankernel demo | rerank | train | info``."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import platform
import re
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

try:
    import typer
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )
    from rich.table import Table
except ImportError as missing:
    print(f'the command line needs {missing.name}: pip install "rankernel[cli]"', file=sys.stderr)
    raise SystemExit(2) from None

import torch

import rankernel
from rankernel import backends, run_files
from rankernel.models.packing import BATCH_TOKENS
from rankernel.rerankers import METHODS, Ranking, Reranker
from rankernel.run_files import FileError

app = typer.Typer(
    help="Fast LLM rerankers: compiled kernels for block-sparse in-context-ranking attention.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
_out = Console(highlight=False, markup=False)
_err = Console(stderr=True)


@contextlib.contextmanager
def _one_line_faults(extra: str = "cli") -> Iterator[None]:
    try:
        yield
    except (FileError, ImportError) as fault:
        missing = fault.name if isinstance(fault, ModuleNotFoundError) else None
        print(f'this needs {missing}: pip install "rankernel[{extra}]"' if missing else fault, file=sys.stderr)
        raise typer.Exit(2) from None


@app.command()
def demo(
    queries: Annotated[int, typer.Option(min=1, help="How many held-out queries to rank.")] = 200,
) -> None:
    """Rank real documents with the bundled model, and measure it attached and stock.

    Writes ./demo_output/: the chart latency.png and all files for a `rankernel rerank` of your own.
    """
    with _one_line_faults():
        from rankernel.demo import run_demo

        run_demo(_out, queries)


def _known_method(name: str) -> str:
    if name not in METHODS:
        raise typer.BadParameter(f"expected one of {', '.join(METHODS)}, got {name!r}")
    return name


@app.command()
def rerank(
    model: Annotated[str, typer.Option(help="Model directory, or name on the Hugging Face Hub.")],
    queries: Annotated[Path, typer.Option(help="Lines of query id, tab, text.")],
    documents: Annotated[Path, typer.Option(help='A JSON object per line with "id" and "text".')],
    run: Annotated[Path, typer.Option(help="First-stage candidates, a TREC run.")],
    output: Annotated[Path, typer.Option(help="Where to write the reranked TREC run.")],
    method: Annotated[
        str, typer.Option(callback=_known_method, help=f"How the model ranks: {', '.join(METHODS)}.")
    ] = "blockrank",
    top_k: Annotated[int | None, typer.Option(min=1, help="Documents to write per query; all by default.")] = None,
    layer: Annotated[
        int | None,
        typer.Option(min=0, help="Of blockrank: layer that scores, from 0; by default as rankernel.json says."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(min=1, help="Tokens to pack in one row.")] = BATCH_TOKENS,
    qrels: Annotated[Path | None, typer.Option(help="TREC judgements, to measure both runs with.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an interrupted run.")] = False,
    explain: Annotated[bool, typer.Option("--explain", help="Print every score and what it was made of.")] = False,
) -> None:
    """Rerank the candidates of a TREC run.

    A bad file ends it with one line that names the file, the line and the fault, and with exit code 2. An interrupted
    run keeps its finished queries in OUTPUT.partial for --resume.
    """
    if layer is not None and method != "blockrank":
        raise typer.BadParameter(f"{method} has no scoring layer to choose", param_hint="--layer")
    with _one_line_faults():
        with _err.status("reading the files"):
            texts = run_files.read_queries(queries)
            candidates = run_files.read_candidates(run, texts, queries)
            judged = run_files.read_qrels(qrels) if qrels else {}
            before = run_files.effectiveness(judged, run_scores(candidates)) if judged else {}
            contents = _read_contents(documents, run, candidates)
            settings: dict[str, str | int | None] = {
                "--model": fingerprint(model),
                "--queries": digest(queries),
                "--documents": digest(documents),
                "--run": digest(run),
                "--top-k": top_k,
                "--method": method,
                "--layer": layer,
            }
        expected = {query: min(len(found), top_k or len(found)) for query, found in candidates.items()}
        with contextlib.closing(run_files.ResumableRun(output, settings, expected, resume)) as writer:
            with _err.status("loading the model"):
                reranker = load_reranker(model, method, {} if layer is None else {"layer": layer})
            resumed = len(writer.finished)
            begin = time.perf_counter()
            try:
                truncated = _rerank(reranker, texts, contents, candidates, writer, top_k, batch_tokens, explain)
            except KeyboardInterrupt:
                done = (
                    f"{len(writer.finished)} of {len(candidates)} queries are in {writer.partial}; --resume continues"
                )
                print(f"interrupted: {done}" if writer.finished else "interrupted", file=sys.stderr)
                raise typer.Exit(130) from None
            except ValueError as error:
                writer.discard()
                raise FileError(queries, None, str(error)) from None
            except FloatingPointError as error:
                writer.discard()
                raise FileError(model, None, str(error)) from None
            seconds = time.perf_counter() - begin
            writer.complete()
        ranked = len(candidates) - resumed
        _out.print(f"{output}: {len(candidates)} queries" + (f", {resumed} of them from before" if resumed else ""))
        if ranked:
            _out.print(f"{seconds / ranked * 1e3:.1f} ms per query; {truncated} documents were cut")
        if len(texts) > len(candidates):
            _out.print(f"{len(texts) - len(candidates)} queries have no candidates in {run}")
        if judged:
            after = run_files.effectiveness(judged, run_scores(run_files.read_run(output)))
            _out.print(f"{len(judged)} judged queries")
            _out.print(effectiveness_table({"first stage": before, "reranked": after}))


@app.command()
def train(
    config: Annotated[Path, typer.Option(help="A YAML file; docs/train.md lists its keys.")],
    resume: Annotated[bool, typer.Option("--resume", help="Continue a run that was stopped.")] = False,
) -> None:
    """Train a reranker on lists of documents.

    A bad config ends it with one line that names the file, the key and the fault, and with exit code 2. A run that was
    stopped, killed even, goes on from its last checkpoint with --resume, as if nothing had happened.
    """
    with _one_line_faults("train"):
        from rankernel.training.run import Interrupted, run_training

        try:
            run_training(_out, config, resume=resume)
        except Interrupted as interrupted:
            print(interrupted, file=sys.stderr)
            raise typer.Exit(130) from None


def run_scores(run: Mapping[str, list[run_files.Candidate]]) -> dict[str, dict[str, float]]:
    """Score by document id, by query id."""
    return {query: {row.document_id: row.score for row in found} for query, found in run.items()}


def _read_contents(documents: Path, run: Path, candidates: Mapping[str, list[run_files.Candidate]]) -> dict[str, str]:
    contents = run_files.read_documents(documents, {row.document_id for found in candidates.values() for row in found})
    run_files.check_documents(run, candidates, contents, documents)
    return contents


def digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def fingerprint(model: str) -> str:
    """What changes when another model is at the same place: names, sizes and times of its files."""
    if not Path(model).is_dir():
        return model
    stats = {path.name: path.stat() for path in sorted(Path(model).iterdir()) if path.is_file()}
    listing = [f"{name} {stat.st_size} {stat.st_mtime_ns}" for name, stat in stats.items()]
    return hashlib.sha256("\n".join(listing).encode()).hexdigest()


def load_reranker(model: str, method: str, given: Mapping[str, Any]) -> Reranker:
    """The reranker of a method, without a word from the libraries below.

    Raises:
        FileError: there is no such model, or it or a setting is unfit.
    """
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    if not Path(model).is_dir() and not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", model):
        raise FileError(model, None, "no such directory")
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    hub_logging.set_verbosity_error()
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")
    try:
        reranker, settings = METHODS[method]
        return reranker.from_pretrained(model, **settings, **given)
    except (OSError, ValueError) as error:
        raise FileError(model, None, str(error).strip().splitlines()[0]) from None


def progress_bar(console: Console) -> Progress:
    """A bar that says how many are done and how long the rest takes; nothing where no one watches."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    )


def _rerank(
    reranker: Reranker,
    texts: Mapping[str, str],
    contents: Mapping[str, str],
    candidates: Mapping[str, list[run_files.Candidate]],
    writer: run_files.ResumableRun,
    top_k: int | None,
    batch_tokens: int,
    explain: bool,
) -> int:
    """Ranks what is not finished; returns how many documents were truncated."""
    finished = set(writer.finished)
    remaining = {query: found for query, found in candidates.items() if query not in finished}
    lists = ((texts[query], [contents[row.document_id] for row in found]) for query, found in remaining.items())
    num_truncated = 0
    with progress_bar(_err) as progress:
        task = progress.add_task("reranking", total=len(candidates), completed=len(finished))
        scored = reranker.score_lists(lists, batch_tokens=batch_tokens)
        for (query, found), scores in zip(remaining.items(), scored, strict=True):
            identifiers = [row.document_id for row in found]
            ranking = Ranking.from_scores(texts[query], *scores, document_ids=identifiers, top_k=top_k)
            writer.add(query, [(identifiers[row.index], row.score) for row in ranking])
            if explain:
                _out.print(_explanation(query, ranking))
            num_truncated += sum(scores.truncated)
            progress.advance(task)
    return num_truncated


def _explanation(query: str, ranking: Ranking) -> Table:
    names = list(dict.fromkeys(name for row in ranking for name in row.parts))
    table = Table("", "document", "score", *names, title=f"{query}: {ranking.query}", title_justify="left")
    for column in (table.columns[0], *table.columns[2:]):
        column.justify = "right"
    for row in ranking:
        parts = [f"{row.parts[name]:.6g}" if name in row.parts else "" for name in names]
        cut = " (cut)" if row.truncated else ""
        table.add_row(str(row.rank), f"{row.document_id}{cut}", f"{row.score:.6g}", *parts)
    return table


def effectiveness_table(rows: Mapping[str, Mapping[str, float]]) -> Table:
    """One row per run, one column per measure."""
    table = Table("", *next(iter(rows.values())))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.4f}" for value in values.values()))
    return table


@app.command()
def info() -> None:
    """Show this machine and what rankernel runs on it."""
    machine = Table(show_header=False, title="machine", title_justify="left")
    packages = {name: _version(name) for name in ("torch", "transformers", "peft", "bm25s", "ir-measures")}
    for name, value in {
        "rankernel": rankernel.__version__,
        "Python": f"{platform.python_version()} on {platform.platform()}",
        **packages,
        "processor": _processor(),
        "threads": str(torch.get_num_threads()),
        "OpenMP runtimes": "\n".join(_openmp_runtimes()) or "none",
    }.items():
        machine.add_row(name, value)
    kernels = Table("op", "implementation", "dtypes", "runs here", title="kernels", title_justify="left")
    for row in backends.table():
        kernels.add_row(row.op, row.name, row.dtypes, "yes" if row.available else f"no: {row.why_not}")
    chosen = Table("op", "float32", "bfloat16", "float16", title="what a call on CPU runs", title_justify="left")
    for op in backends.OPS:
        dtypes = (torch.float32, torch.bfloat16, torch.float16)
        chosen.add_row(op, *(backends.active_isa(op, dtype) for dtype in dtypes))
    for table in (machine, kernels, chosen):
        _out.print(table)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        names = re.findall(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        names = []
    return f"{names[0]}, {len(names)} logical" if names else platform.processor() or platform.machine()


def _openmp_runtimes() -> list[str]:
    """Libraries of this process that are OpenMP runtimes; more than one means two thread pools."""
    try:
        maps = Path("/proc/self/maps").read_text(encoding="utf-8")
    except OSError:
        return []
    return sorted(set(re.findall(r"/(lib[gi]?omp\d*[-.]\S*)$", maps, re.MULTILINE)))
