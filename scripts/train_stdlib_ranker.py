"""Train the bundled ranker, a small Qwen3 on docstrings of Python's standard library, with `rankernel train`.

Everything is made here: tokenizer, weights, training data. Only the train split is trained on; the checkpoint is chosen
on the validation split; the held-out split is ranked once, at the end. A run that was stopped goes on when started
again.

    python scripts/train_stdlib_ranker.py --work /tmp/ranker
    python scripts/train_stdlib_ranker.py --work /tmp/ranker --heldout  # the shipped ranker on the held-out queries
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from enum import IntEnum, auto
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rankernel.corpus import Corpus, bm25_candidates, load_stdlib
from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers import BlockPrompt, BlockRank
from rankernel.rerankers.blockrank import SETTINGS_FILE, BlockRankSettings
from rankernel.run_files import scores_in_order, write_task

DEPTH = 50
PROMPT = BlockPrompt(
    prefix="Query: {query}\nDocuments:",
    document="\n{text} [{index}]",
    tail="\nWhich of the documents answers this query: {query}\nAnswer: ",
    answer="[",
    signal_tokens=12,
)
SETTINGS = BlockRankSettings(layer=3, prompt=PROMPT, max_document_tokens=96, tail_offset=256)
RANK_PRIOR = 1.75
"""Of 0, 0.25, ..., 3, what ranks the validation queries best."""
SHAPE = {
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 32,
}
VOCABULARY = 6144
STD = 0.2
"""Of the embedding."""
EDITIONS = 100
EDITION_DOCUMENTS = 800
PROCESSES = 2
"""Of one thread each: on two cores half as fast again as one process of two."""
RARE = 0.05
"""Rarer words are in a smaller share of the texts."""
WORD = re.compile(r"[A-Z]+[a-z]*|[a-z]+")
MODULE = re.compile(r"(?:module |class )?(\w+)")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the lower-cased words of the train split.

    Names are split at underscores and capitals, and punctuation other than brackets is dropped, so that the words of a
    sentence and the parts of an identifier meet as equal tokens. The opening parenthesis stays: a name ends there.
    Numbers up to 99 are tokens, and so are ``[0]`` to ``[99]``, which number documents.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " "),
            normalizers.Replace(Regex(r"[^A-Za-z0-9\[\](]+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Split(Regex(r"\[[0-9]{1,2}\]|[0-9]{1,2}|[\[\](]"), "isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<pad>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789[]("),
        show_progress=False,
    )
    corpus = load_stdlib("train")
    numbers = " ".join(f"{number} [{number}]" for number in range(100))
    texts = [*corpus.documents.values(), *corpus.queries.values(), *[numbers] * 2000]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, shape: Mapping[str, int] = SHAPE, layer: int = SETTINGS.layer
) -> Qwen3ForCausalLM:
    """A Qwen3 whose attention begins as a comparison of the words of query and documents.

    From Gaussian weights thousands of steps pass before equal tokens find each other. Here half of a layer's queries
    begin as its keys, so that a token attends to its like, and an attention's output begins as a mean of what it
    attends to, in the spirit of mimetic initialisation (arXiv 2305.09828). The first coordinates of the residual stream
    have a meaning, see :class:`Coordinate`, and one KV head or two of the first three layers compute some of them from
    others: then the token that ends a document knows how many of its words, and of those of its name, are the query's,
    and the scoring layer begins by looking there. All of it is trained.

    Args:
        tokenizer: of :func:`train_tokenizer`.
        seed: of the weights.
        shape: sizes in the names of ``Qwen3Config``; at least three KV heads.
        layer: the scoring layer, at least 3.
    """
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        tie_word_embeddings=True,
        max_position_embeddings=2 * SETTINGS.tail_offset,
        rope_theta=1e12,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
        **shape,
    )
    model = Qwen3ForCausalLM(config)
    group = config.num_attention_heads // config.num_key_value_heads
    with torch.no_grad():
        model.model.norm.weight.fill_(0.05)  # logits of tied embeddings would be far too large
        mark_tokens(model.get_input_embeddings().weight, tokenizer)
        for decoder_layer in model.model.layers:
            attention = decoder_layer.self_attn
            queries, keys, values = projections(attention, config)
            torch.nn.init.orthogonal_(attention.k_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            for weight in (queries, keys, values):
                weight[..., : len(Coordinate)] = 0
            queries[:, 0] = keys
            attention.o_proj.weight.copy_(values[:, None].expand(-1, group, -1, -1).flatten(0, 2).T * 0.1)
            attention.o_proj.weight[: len(Coordinate)] = 0
            attention.q_norm.weight.fill_(1.7)
            attention.k_norm.weight.fill_(1.7)
            decoder_layer.mlp.down_proj.weight.mul_(0.1)
            decoder_layer.mlp.down_proj.weight[: len(Coordinate)] = 0
        model.model.layers[1].self_attn.q_norm.weight.fill_(2.4)  # equal tokens shall win clearly there
        model.model.layers[1].self_attn.k_norm.weight.fill_(2.4)
        c, always = Coordinate, {Coordinate.ONE: 1.0}
        scale = ({}, {c.ONE: 2.0})
        wire(model, 0, 1, 0.1, [(always, {c.DOCUMENTS: 1})], {c.DOCUMENTS: (c.INSIDE, 1)})
        wire(model, 0, 2, 0.1, [(always, {c.PARENTHESIS: 2, c.START: 1})], {c.PARENTHESIS: (c.AFTER_NAME, 1)})
        wire(model, 1, 1, 1.0, [(always, {c.INSIDE: -2, c.START: 4})], {c.WORD: (c.MATCH, 4)})
        of_document = {c.INSIDE: 4, c.START: 4}
        means = {c.MATCH: (c.MATCHES, 4), c.START: (c.SHORTNESS, 4)}
        wire(model, 2, 1, 0.1, [(always, of_document), scale], means)
        of_name = of_document | {c.AFTER_NAME: -6}
        means = {c.MATCH: (c.NAME_MATCHES, 4), c.START: (c.NAME_SHORTNESS, 4)}
        wire(model, 2, 2, 0.1, [(always, of_name), scale], means)
        looks_at = [(always, {c.RELEVANCE: 4}), (always, {c.MATCHES: 2}), (always, {c.END: 4}), ({}, {c.ONE: 8})]
        for head in range(config.num_key_value_heads):
            wire(model, layer, head, 0.3, looks_at)
    return model


class Coordinate(IntEnum):
    """What the first coordinates of the residual stream tell of a token when training begins."""

    ONE = 0
    WORD = auto()
    """1 for tokens other than those of the next five."""
    END = auto()
    """The number that ends a document."""
    RELEVANCE = auto()
    """0; the scoring layer looks at what training writes here."""
    DOCUMENTS = auto()
    """The last word of the prefix."""
    START = auto()
    """The first word of the prefix; what finds nothing else attends to it."""
    PARENTHESIS = auto()
    INSIDE = auto()
    """From layer 0: of tokens behind the prefix."""
    AFTER_NAME = auto()
    """From layer 0: of tokens behind a document's first parenthesis."""
    MATCH = auto()
    """From layer 1: of tokens that the prefix has too."""
    MATCHES = auto()
    """From layer 2: the mean of MATCH over START and the document so far."""
    SHORTNESS = auto()
    """From layer 2: falls with the number of tokens in that mean."""
    NAME_MATCHES = auto()
    """The same of a document's name."""
    NAME_SHORTNESS = auto()


def mark_tokens(embedding: torch.Tensor, tokenizer: PreTrainedTokenizerFast) -> None:
    """Gaussian embeddings but for the coordinates that have a meaning."""
    embedding.normal_(0, STD)
    embedding[:, : len(Coordinate)] = 0
    embedding[:, Coordinate.ONE] = embedding[:, Coordinate.WORD] = 4 * STD

    def mark(text: str, marks: Mapping[Coordinate, float]) -> None:
        (token,) = tokenizer(text)["input_ids"]
        embedding[token, Coordinate.WORD] = 0
        for coordinate, value in marks.items():
            embedding[token, coordinate] = value * STD

    for number in range(100):
        tokens = tokenizer(f"{number} [{number}]")["input_ids"]
        embedding[tokens[1]] = embedding[tokens[0]]  # the number of a document and the answer that names it
        mark(f"[{number}]", {Coordinate.END: 8})
    mark("Documents", {Coordinate.DOCUMENTS: 8})
    mark("Query", {Coordinate.START: 8})
    mark("(", {Coordinate.PARENTHESIS: 8})


Reads = Mapping[Coordinate, float]


def wire(
    model: Qwen3ForCausalLM,
    layer: int,
    head: int,
    content: float,
    terms: Sequence[tuple[Reads, Reads]],
    means: Mapping[Coordinate, tuple[Coordinate, float]] = {},
) -> None:
    """Sets what the queries and keys of a KV head compare in their last dimensions, which RoPE hardly turns.

    Args:
        model: of :func:`build_model`.
        layer: index of the decoder layer.
        head: index of the KV head.
        content: factor of the other dimensions, in which equal tokens find each other.
        terms: of the attention logit: the coordinates that a query and that a key reads for one dimension.
        means: coordinate of the tokens attended to, to the coordinate that gets its mean times a factor.
    """
    attention = model.model.layers[layer].self_attn
    queries, keys, values = (projection[head] for projection in projections(attention, model.config))
    keys *= content
    queries.copy_(keys.expand_as(queries))
    for dimension, (of_query, of_key) in enumerate(terms, start=1):
        keys[-dimension] = queries[:, -dimension] = 0
        for coordinate, weight in of_key.items():
            keys[-dimension, coordinate] = weight
        for coordinate, weight in of_query.items():
            queries[:, -dimension, coordinate] = weight
    for row, (source, (target, factor)) in enumerate(means.items()):
        values[row], values[row, source] = 0, 1
        for query_head in range(head * len(queries), (head + 1) * len(queries)):
            column = attention.o_proj.weight[:, query_head * len(values) + row]
            column.zero_()
            column[target] = factor * STD / len(queries)


def projections(attention: Any, config: Qwen3Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the weights: queries [KV heads, group, head size, hidden], keys and values without the group."""
    heads, size = config.num_key_value_heads, config.head_dim
    queries = attention.q_proj.weight.view(heads, -1, size, config.hidden_size)
    return queries, *(p.weight.view(heads, size, -1) for p in (attention.k_proj, attention.v_proj))


def renamed(texts: Mapping[str, str], generator: random.Random) -> dict[str, str]:
    """The texts after their rarer words changed places with others about as frequent, the same ones everywhere."""
    frequency = Counter(word for text in texts.values() for word in {part.lower() for part in WORD.findall(text)})
    rare = sorted(
        (word for word, count in frequency.items() if count < RARE * len(texts)),
        key=lambda word: (-frequency[word], len(word), word),
    )
    new_name: dict[str, str] = {}
    for begin in range(0, len(rare), 200):
        alike = rare[begin : begin + 200]
        new_name |= zip(alike, generator.sample(alike, len(alike)), strict=True)

    def rename(match: re.Match[str]) -> str:
        word = match[0]
        new = new_name.get(word.lower(), word)
        return new.capitalize() if word[0].isupper() else new

    return {key: WORD.sub(rename, text) for key, text in texts.items()}


def training_task(
    corpus: Corpus, generator: random.Random, editions: int
) -> tuple[dict[str, str], dict[str, str], Any, Any]:
    """Queries, documents, qrels and BM25's run of several editions of the train split.

    An edition holds some modules, drawn anew until it is as large as the other splits are, and its words have changed
    places. So a query comes again among other candidates, at other places and in other words, and what can be learnt
    is how the words of a query and of its documents meet, and not by heart which document answers which query.
    """
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, list[tuple[str, float]]] = {}
    modules: dict[str, list[str]] = defaultdict(list)
    for name, text in corpus.documents.items():
        modules[MODULE.findall(text)[0]].append(name)
    for edition in range(editions):
        kept: set[str] = set()
        for module in generator.sample(sorted(modules), len(modules)):
            if len(kept) < EDITION_DOCUMENTS:
                kept.update(modules[module])
        answered = {query: grades for query, grades in corpus.qrels.items() if kept.issuperset(grades)}
        texts = {name: text for name, text in corpus.documents.items() if name in kept}
        texts = renamed(texts | {query: corpus.queries[query] for query in answered}, generator)
        asked = {f"{query}.{edition}": texts[query] for query in answered}
        found = {f"{name}.{edition}": text for name, text in texts.items() if name in kept}
        for query, grades in answered.items():
            qrels[f"{query}.{edition}"] = {f"{name}.{edition}": grade for name, grade in grades.items()}
        queries |= asked
        documents |= found
        run |= {query: best.ranked for query, best in bm25_candidates(asked, found, depth=DEPTH).items()}
    return queries, documents, qrels, run


def write_data(folder: Path, seed: int, editions: int = EDITIONS) -> None:
    """Writes the training and validation data."""
    write_task(folder / "train", *training_task(load_stdlib("train"), random.Random(seed), editions))
    corpus = load_stdlib("validation")
    found = bm25_candidates(corpus.queries, corpus.documents, depth=DEPTH)
    run = {query: best.ranked for query, best in found.items()}
    write_task(folder / "validation", corpus.queries, corpus.documents, corpus.qrels, run)


def task_files(folder: Path | str) -> dict[str, str]:
    """What ``write_task`` wrote to a folder, as ``rankernel train`` is told."""
    names = {"queries": "queries.tsv", "documents": "documents.jsonl", "qrels": "qrels.txt", "run": "bm25.trec"}
    return {key: f"{folder}/{name}" for key, name in names.items()}


def save(model: Any, tokenizer: Any, folder: Path, settings: BlockRankSettings = SETTINGS) -> None:
    """A model directory that ``BlockRank.from_pretrained`` reads."""
    model.save_pretrained(folder)
    (folder / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(folder)
    content = json.dumps({"method": "blockrank", **asdict(settings)}, indent=2) + "\n"
    (folder / SETTINGS_FILE).write_text(content, encoding="utf-8")


def config_of(model: Path, work: Path, seed: int) -> dict[str, Any]:
    """What ``rankernel train`` is told: shuffled lists, from which only the words help."""
    return {
        "model": str(model.absolute()),
        "output": "run",
        "seed": seed,
        "train": {**task_files(work.absolute() / "train"), "documents_per_list": DEPTH},
        "validation": {**task_files(work.absolute() / "validation"), "depth": DEPTH},
        "loss": {"language_model": 0.0, "ranking_weight": 1.0, "score": "log_share"},
        "training": {
            "max_steps": 5000,
            "learning_rate": 3e-4,
            "weight_decay": 0.01,
            "warmup_steps": 100,
            "lr_scheduler_type": "cosine",
            "per_device_train_batch_size": 8 // PROCESSES,
            "bf16": True,
            "torch_compile": True,
            "logging_steps": 50,
            "eval_steps": 500,
        },
    }


def train(model: Path, work: Path, seed: int) -> Path:
    """The directory of the trained run; goes on with a run that was stopped."""
    config = work / "config.yaml"
    if not config.exists():
        config.write_text(yaml.safe_dump(config_of(model, work, seed), sort_keys=False), encoding="utf-8")
    command = ["torchrun", "--nproc-per-node", str(PROCESSES), str(shutil.which("rankernel"))]
    threads = {"OMP_NUM_THREADS": "1"}
    subprocess.run([*command, "train", "--config", str(config), "--resume"], env=os.environ | threads, check=True)
    return work / "run"


def ndcg_at_10(qrels: Mapping[str, Mapping[str, int]], run: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """By query id."""
    return {row.query_id: row.value for row in ir_measures.iter_calc([ir_measures.nDCG @ 10], qrels, run)}


def per_query(ranker: BlockRank, corpus: Corpus, candidates: Mapping[str, list[str]]) -> dict[str, float]:
    """nDCG@10 of the candidates in the ranker's order, by query id."""
    lists = [(corpus.queries[q], [corpus.documents[d] for d in ids]) for q, ids in candidates.items()]
    run = {
        query: dict(zip(ids, scores, strict=True))
        for (query, ids), (scores, *_) in zip(candidates.items(), ranker.score_lists(lists), strict=True)
    }
    return ndcg_at_10(corpus.qrels, run)


def report_heldout(ranker: BlockRank) -> dict[str, Any]:
    """nDCG@10 on the held-out queries; paired randomisation test of ranker against BM25 (Smucker et al., CIKM 2007)."""
    corpus = load_stdlib("heldout")
    first_stage = {
        q: found.document_ids for q, found in bm25_candidates(corpus.queries, corpus.documents, DEPTH).items()
    }
    generator = random.Random(0)
    shuffled = {query: generator.sample(ids, len(ids)) for query, ids in first_stage.items()}
    best = {q: {d: float(corpus.qrels[q].get(d, 0)) for d in ids} for q, ids in first_stage.items()}
    ours, bm25 = per_query(ranker, corpus, first_stage), ndcg_at_10(corpus.qrels, scores_in_order(first_stage))
    by_words = BlockRank(ranker.model, ranker.tokenizer, **vars(replace(ranker.settings, rank_prior=0.0)))
    difference = np.array([ours[query] - bm25[query] for query in corpus.queries])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (100_000, len(difference)))
    extreme = np.abs(signs @ difference) >= abs(difference.sum())
    return {
        "queries": len(difference),
        "bm25": np.mean(list(bm25.values())),
        "ranker": np.mean(list(ours.values())),
        "p": (extreme.sum() + 1) / (len(signs) + 1),
        "better, equal, worse": [int((np.sign(difference) == sign).sum()) for sign in (1, 0, -1)],
        "ranker without prior, shuffled": np.mean(list(per_query(by_words, corpus, shuffled).values())),
        "best possible": np.mean(list(ndcg_at_10(corpus.qrels, best).values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory of the run, about 300 MB")
    parser.add_argument("--output", type=Path, default=RANKER_DIRECTORY)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", action="store_true", help="evaluate the model in --output instead of training")
    arguments = parser.parse_args()
    if not arguments.heldout:
        work, tokenizer = arguments.work, train_tokenizer()
        if not (work / "validation").exists():
            save(build_model(tokenizer, arguments.seed), tokenizer, work / "start")
            write_data(work, arguments.seed)
        run = train(work / "start", work, arguments.seed)
        model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.bfloat16)
        save(model, tokenizer, arguments.output, replace(SETTINGS, rank_prior=RANK_PRIOR))
        shutil.copyfile(run / "curves.png", arguments.output / "curves.png")
    ranker = BlockRank.from_pretrained(arguments.output, dtype=torch.float32)
    print(json.dumps(report_heldout(ranker), indent=2))


if __name__ == "__main__":
    main()
