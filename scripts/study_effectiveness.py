"""What makes a small BlockRank model rank well: losses, scores, the query's place, the mask, the layer.

Trains small models on the train split of the bundled corpus with `rankernel train`, ranks the held-out queries with
each and writes the table of docs/effectiveness.md and docs/effectiveness.png. What is finished is kept: a study that
was stopped goes on.

    python scripts/study_effectiveness.py --work /tmp/study
"""

from __future__ import annotations

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
import yaml
from rich.console import Console

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from rankernel import BlockLayout
from rankernel.corpus import Candidates, Corpus, bm25_candidates, load_stdlib
from rankernel.models import ScoreRequest, model_inputs
from rankernel.rerankers import BlockRank
from rankernel.rerankers.blockrank import BlockRankSettings, relevance
from rankernel.rerankers.prompts import build_blocks
from rankernel.run_files import scores_in_order
from rankernel.training.run import run_training
from train_stdlib_ranker import (
    PROMPT,
    SETTINGS,
    build_model,
    ndcg_at_10,
    save,
    task_files,
    train_tokenizer,
    write_data,
)

DOCS = Path(__file__).resolve().parents[1] / "docs"
DEPTH = 20
LAYER = 3
SHAPE = {
    "hidden_size": 128,
    "intermediate_size": 352,
    "num_hidden_layers": 6,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
BOTH = {"language_model": 0.1, "ranking_weight": 1.0, "score": "log_share"}
QUERY_FREE = replace(PROMPT, prefix="Documents:")
DENSE = {"pattern": "causal", "position_scheme": "sequential"}
# Name: what is changed of the loss, and of the settings with which is trained and ranked.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "both losses": ({}, {}),
    "attention loss only": ({"language_model": 0.0}, {}),
    "language-model loss only": ({"language_model": 1.0, "ranking_weight": 0.0}, {}),
    "query not in the prefix": ({}, {"prompt": QUERY_FREE}),
    "dense mask": ({}, DENSE),
}


def settings_of(changes: Mapping[str, Any]) -> BlockRankSettings:
    return replace(SETTINGS, layer=LAYER, **changes)


def train(work: Path, data: Path, tokenizer: Any, name: str, seed: int, steps: int) -> Path:
    """The directory of a trained model; trains what is not there yet."""
    loss, changes = VARIANTS[name]
    settings = settings_of(changes)
    folder = work / f"{name} {seed}"
    config = folder / "config.yaml"
    if not config.exists():
        save(build_model(tokenizer, seed, shape=SHAPE, layer=LAYER), tokenizer, folder / "start", settings)
        content = {
            "model": "start",
            "output": "run",
            "seed": seed,
            "train": {**task_files(data / "train"), "documents_per_list": DEPTH, "hard_negatives": 0.7},
            "validation": {**task_files(data / "validation"), "depth": DEPTH, "limit": 100},
            "loss": BOTH | loss,
            "training": {
                "learning_rate": 3e-4,
                "weight_decay": 0.01,
                "warmup_steps": 50,
                "lr_scheduler_type": "cosine",
                "max_steps": steps,
                "per_device_train_batch_size": 8,
                "bf16": True,
                "torch_compile": True,
                "logging_steps": 50,
                "eval_steps": steps,
            },
        }
        config.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    run_training(Console(), config, resume=True)
    return folder / "run" / "model"


Scores = dict[str, list[float]]


@torch.no_grad()
def scores_of(ranker: BlockRank, lists: Sequence[tuple[str, list[str]]], batch: int = 8) -> Iterator[Scores]:
    """Per list, the documents' scores by the attention of each layer, and by the first token of the answer."""
    settings, model = ranker.settings, ranker.model
    layers = range(len(model.model.layers))
    numbers = torch.tensor([ranker.tokenizer(str(index))["input_ids"][0] for index in range(DEPTH)])
    for begin in range(0, len(lists), batch):
        blocks = [
            build_blocks(ranker.tokenizer, settings.prompt, query, documents, settings.max_document_tokens)
            for query, documents in lists[begin : begin + batch]
        ]
        layout = BlockLayout.from_lengths([block.lengths for block in blocks], settings.pattern)
        rows = layout.tail_positions(settings.prompt.signal_tokens)
        inputs = model_inputs(
            torch.tensor([token for block in blocks for token in block.input_ids]),
            layout,
            position_scheme=settings.position_scheme,
            tail_offset=settings.tail_offset,
            scores=ScoreRequest(layers, rows),
        )
        outputs = model(**inputs, logits_to_keep=layout.tail_positions(1))
        shares = [relevance(logsumexp, len(blocks)) for logsumexp in outputs.attentions]
        first = outputs.logits[0][:, numbers]
        for index, block in enumerate(blocks):
            count = len(block.truncated)
            yield {f"layer {layer}": shares[layer][index, :count].tolist() for layer in layers} | {
                "first token": first[index, :count].tolist()
            }


def evaluate(model: Path, corpus: Corpus, candidates: Mapping[str, list[str]], changes: Mapping[str, Any]) -> Any:
    """Mean nDCG@10 on the held-out queries of every score."""
    ranker = BlockRank.from_pretrained(model, **changes)
    lists = [(corpus.queries[query], [corpus.documents[name] for name in ids]) for query, ids in candidates.items()]
    runs: dict[str, dict[str, dict[str, float]]] = defaultdict(dict)
    for (query, ids), found in zip(candidates.items(), scores_of(ranker, lists), strict=True):
        for score, values in found.items():
            runs[score][query] = dict(zip(ids, values, strict=True))
    return {score: float(np.mean(list(ndcg_at_10(corpus.qrels, run).values()))) for score, run in runs.items()}


def study(work: Path, seeds: Sequence[int], steps: int) -> dict[str, dict[int, dict[str, float]]]:
    """Results by model and how it ranked, by seed, by score."""
    data = work / "data"
    if not (data / "validation").exists():
        write_data(data, 0, editions=12)
    corpus, tokenizer = load_stdlib("heldout"), train_tokenizer()
    candidates = shuffled(bm25_candidates(corpus.queries, corpus.documents, depth=DEPTH))
    results: dict[str, dict[int, dict[str, float]]] = defaultdict(dict)
    for seed in seeds:
        for name in VARIANTS:
            model = train(work, data, tokenizer, name, seed, steps)
            ranked_with: dict[str, Mapping[str, Any]] = {name: {}}
            if name == "both losses":
                ranked_with["both losses, ranks with the dense mask"] = DENSE
            if name == "dense mask":
                block = {key: getattr(SETTINGS, key) for key in DENSE}
                ranked_with["dense mask, ranks with the block mask"] = block
            for how, changes in ranked_with.items():
                kept = model.parent / f"{how}.json"
                if not kept.exists():
                    kept.write_text(json.dumps(evaluate(model, corpus, candidates, changes)), encoding="utf-8")
                results[how][seed] = json.loads(kept.read_text(encoding="utf-8"))
    return results


def shuffled(candidates: Mapping[str, Candidates]) -> dict[str, list[str]]:
    """The first stage's order must not help."""
    generator = random.Random(0)
    return {query: generator.sample(found.document_ids, len(found.document_ids)) for query, found in candidates.items()}


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{np.mean(values):.3f} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else f"{values[0]:.3f}"


def write_table(path: Path, results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """docs/effectiveness.md, whose text above the table is kept."""
    corpus = load_stdlib("heldout")
    candidates = {
        query: found.document_ids
        for query, found in bm25_candidates(corpus.queries, corpus.documents, depth=DEPTH).items()
    }
    bm25 = float(np.mean(list(ndcg_at_10(corpus.qrels, scores_in_order(candidates)).values())))
    rows = [f"| BM25 | {bm25:.3f} | |"]
    for how, by_seed in results.items():
        attention, token = (
            spread([found[score] for found in by_seed.values()]) for score in (f"layer {LAYER}", "first token")
        )
        rows.append(f"| {how} | {attention} | {token} |")
    table = "\n".join(
        [
            f"| nDCG@10, {len(corpus.queries)} held-out queries | attention of layer {LAYER} | first token |",
            "|---|---|---|",
            *rows,
        ]
    )
    above, begin, rest = path.read_text(encoding="utf-8").partition("<!-- table -->")
    _, end, below = rest.partition("<!-- end -->")
    path.write_text(f"{above}{begin}\n{table}\n{end}{below}", encoding="utf-8")


def draw_layers(path: Path, results: Mapping[str, Mapping[int, Mapping[str, float]]]) -> None:
    """nDCG@10 by the attention of each layer, a line per model, a band from the lowest to the highest seed."""
    figure, axes = plt.subplots(figsize=(7, 4), constrained_layout=True)
    layers = range(SHAPE["num_hidden_layers"])
    for name in VARIANTS:
        values = np.array([[found[f"layer {layer}"] for layer in layers] for found in results[name].values()])
        (line,) = axes.plot(layers, values.mean(axis=0), marker="o", label=name)
        axes.fill_between(layers, values.min(axis=0), values.max(axis=0), color=line.get_color(), alpha=0.2)
    axes.axvline(LAYER, color="grey", linestyle=":", label="trained layer")
    axes.set(xlabel="layer whose attention scores", ylabel="nDCG@10, held-out queries", xticks=list(layers))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=400)
    arguments = parser.parse_args()
    results = study(arguments.work, arguments.seeds, arguments.steps)
    write_table(DOCS / "effectiveness.md", results)
    draw_layers(DOCS / "effectiveness.png", results)


if __name__ == "__main__":
    main()
