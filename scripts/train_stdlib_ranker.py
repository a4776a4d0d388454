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
import math
import random
import re
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ir_measures
import numpy as np
import torch
import yaml
from rich.console import Console
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rankernel.corpus import Corpus, bm25_candidates, load_stdlib
from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers import BlockPrompt, BlockRank
from rankernel.rerankers.blockrank import SETTINGS_FILE, BlockRankSettings
from rankernel.run_files import scores_in_order, write_task
from rankernel.training.run import run_training

DEPTH = 50
PROMPT = BlockPrompt(
    prefix="Query: {query}\nDocuments:",
    document="\n[{index}] {text} [{index}]",
    tail="\nWhich of the documents answers this query: {query}\nAnswer: ",
    answer="[",
    signal_tokens=12,
)
SETTINGS = BlockRankSettings(layer=3, prompt=PROMPT, max_document_tokens=96, tail_offset=256)
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
EDITIONS = 4

CLAUSE_END = re.compile(r"(?<=[.!?:;])\s+")


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding of the lower-cased words of the train split.

    Names are split at underscores and capitals, and punctuation other than square brackets is dropped, so that the
    words of a sentence and the parts of an identifier meet as equal tokens. Numbers up to 99 are tokens: documents are
    counted with them.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Replace(Regex(r"(?<=[a-z0-9])(?=[A-Z])"), " "),
            normalizers.Replace(Regex(r"[^A-Za-z0-9\[\]]+"), " "),
            normalizers.Lowercase(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Split(Regex(r"[0-9]{1,2}|[\[\]]"), "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<unk>", "<pad>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789[]"),
        show_progress=False,
    )
    corpus = load_stdlib("train")
    numbers = " ".join(map(str, range(100)))
    texts = [*corpus.documents.values(), *corpus.queries.values(), *[numbers] * 2000]
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def build_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, *, shape: Mapping[str, int] = SHAPE, layer: int = SETTINGS.layer
) -> Qwen3ForCausalLM:
    """A Qwen3 whose attention begins as a comparison of tokens.

    From Gaussian weights thousands of steps pass before equal tokens find each other. Here half of a layer's queries,
    and all of the scoring layer's, begin as its keys, so that a token attends to its like, and an attention's output
    begins as a mean of what it attends to, in the spirit of mimetic initialisation (arXiv 2305.09828). Three
    coordinates of the residual stream have a meaning: 0 is constant, 1 marks numbers, 2 is higher for lower ones.

    Args:
        tokenizer: whose numbers up to 99 are tokens.
        seed: of the weights.
        shape: sizes in the names of ``Qwen3Config``.
        layer: the scoring layer.
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
        embedding = model.get_input_embeddings().weight
        embedding.normal_(0, STD)
        embedding[:, 0], embedding[:, 1:3] = 4 * STD, 0
        for number in range(100):
            (token,) = tokenizer(str(number))["input_ids"]
            embedding[token, 1], embedding[token, 2] = 8 * STD, (6 - 2 * math.log2(1 + number)) * STD
        for index, decoder_layer in enumerate(model.model.layers):
            attention = decoder_layer.self_attn
            queries, keys, values = projections(attention, config)
            torch.nn.init.orthogonal_(attention.k_proj.weight)
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            keys[..., :3] = queries[..., :3] = 0
            queries[:, : group if index == layer else 1] = keys[:, None]
            attention.o_proj.weight.copy_(values[:, None].expand(-1, group, -1, -1).flatten(0, 2).T * 0.1)
            attention.o_proj.weight[:3] = 0
            attention.q_norm.weight.fill_(1.7)
            attention.k_norm.weight.fill_(1.7)
            decoder_layer.mlp.down_proj.weight.mul_(0.1)
    return model


def projections(attention: Any, config: Qwen3Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of the weights: queries [KV heads, group, head size, hidden], keys and values without the group."""
    heads, size = config.num_key_value_heads, config.head_dim
    queries = attention.q_proj.weight.view(heads, -1, size, config.hidden_size)
    return queries, *(p.weight.view(heads, size, -1) for p in (attention.k_proj, attention.v_proj))


def read_ranks(model: Qwen3ForCausalLM, layer: int = SETTINGS.layer) -> None:
    """Lets :func:`build_model` begin with the first stage's order, which the numbers of the documents tell.

    A head of the first layer carries coordinate 2 from a document's number to all its tokens, and the scoring layer's
    last head dimension, which RoPE hardly turns, compares it with the constant.
    """
    first, scoring = (model.model.layers[index].self_attn for index in (0, layer))
    with torch.no_grad():
        queries, keys, values = projections(first, model.config)
        queries, keys, values = queries[0], keys[0], values[0]
        keys *= 0.1
        queries *= 0.1
        keys[-1], queries[:, -1], values[0] = 0, 0, 0
        keys[-1, 1], queries[:, -1, 0], values[0, 2] = 1, 1, 1
        for head in range(len(queries)):
            first.o_proj.weight[:, head * len(values)] = 0
            first.o_proj.weight[2, head * len(values)] = STD / len(queries)
        queries, keys, _ = projections(scoring, model.config)
        keys *= 0.5
        queries *= 0.5
        keys[:, -1], queries[:, :, -1] = 0, 0
        keys[:, -1, 2], queries[:, :, -1, 0] = 1, 1


def clauses_of(text: str, generator: random.Random) -> list[tuple[str, str]]:
    """(clause, the text without it) for every clause but the first that can be asked for."""
    found = []
    clauses = CLAUSE_END.split(text)
    for index, clause in enumerate(clauses[1:], start=1):
        words = clause.split()
        if len(words) > 20:
            start = generator.randrange(len(words) - 12)
            words = words[start : start + generator.randint(6, 14)]
        rest = " ".join(clauses[:index] + clauses[index + 1 :])
        if len(re.findall(r"[A-Za-z]{2,}", " ".join(words))) >= 3 and len(re.findall(r"\w+", rest)) >= 4:
            found.append((" ".join(words), rest))
    return found


def training_task(corpus: Corpus, generator: random.Random) -> tuple[dict[str, str], dict[str, str], Any, Any]:
    """Queries, documents, qrels and BM25's run of several editions of the train split.

    In each edition every document lacks one of its clauses, another one each time, which becomes a query for it. BM25
    never sees the clause in the document, so that such queries are about as hard as real ones.
    """
    queries: dict[str, str] = {}
    documents: dict[str, str] = {}
    qrels: dict[str, dict[str, int]] = {}
    run: dict[str, list[tuple[str, float]]] = {}
    clauses = {name: clauses_of(text, generator) for name, text in corpus.documents.items()}
    for found in clauses.values():
        generator.shuffle(found)
    for edition in range(EDITIONS):
        texts = {f"{name}.{edition}": text for name, text in corpus.documents.items()}
        asked = {f"{query}.{edition}": text for query, text in corpus.queries.items()}
        qrels |= {
            f"{query}.{edition}": {f"{name}.{edition}": grade for name, grade in grades.items()}
            for query, grades in corpus.qrels.items()
        }
        for name, found in clauses.items():
            if edition < len(found):
                key = f"{name}.{edition}"
                asked[f"c{key}"], texts[key] = found[edition]
                qrels[f"c{key}"] = {key: 1}
        queries |= asked
        documents |= texts
        run |= {query: best.ranked for query, best in bm25_candidates(asked, texts, depth=DEPTH).items()}
    return queries, documents, qrels, run


def write_data(folder: Path, seed: int) -> None:
    """Writes the training and validation data."""
    write_task(folder / "train", *training_task(load_stdlib("train"), random.Random(seed)))
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


def config_of(seed: int, steps: int) -> dict[str, Any]:
    """What ``rankernel train`` is told."""
    return {
        "model": "start",
        "output": "run",
        "seed": seed,
        "train": {**task_files("train"), "documents_per_list": DEPTH, "order": "run"},
        "validation": {**task_files("validation"), "depth": DEPTH},
        "loss": {"language_model": 0.05, "ranking_weight": 1.0, "score": "log_share"},
        "training": {
            "learning_rate": 5e-4,
            "weight_decay": 0.01,
            "warmup_steps": 100,
            "lr_scheduler_type": "cosine",
            "max_steps": steps,
            "per_device_train_batch_size": 4,
            "bf16": True,
            "torch_compile": True,
            "logging_steps": 50,
            "eval_steps": 750,
        },
    }


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
    difference = np.array([ours[query] - bm25[query] for query in corpus.queries])
    signs = np.random.default_rng(0).choice([-1.0, 1.0], (100_000, len(difference)))
    extreme = np.abs(signs @ difference) >= abs(difference.sum())
    return {
        "queries": len(difference),
        "bm25": np.mean(list(bm25.values())),
        "ranker": np.mean(list(ours.values())),
        "p": (extreme.sum() + 1) / (len(signs) + 1),
        "better, equal, worse": [int((np.sign(difference) == sign).sum()) for sign in (1, 0, -1)],
        "ranker, candidates shuffled": np.mean(list(per_query(ranker, corpus, shuffled).values())),
        "best possible": np.mean(list(ndcg_at_10(corpus.qrels, best).values())),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="directory of the run, about 300 MB")
    parser.add_argument("--output", type=Path, default=RANKER_DIRECTORY)
    parser.add_argument("--steps", type=int, default=12000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heldout", action="store_true", help="evaluate the model in --output instead of training")
    arguments = parser.parse_args()
    if not arguments.heldout:
        config = arguments.work / "config.yaml"
        if not config.exists():
            tokenizer = train_tokenizer()
            model = build_model(tokenizer, arguments.seed)
            read_ranks(model)
            save(model, tokenizer, arguments.work / "start")
            write_data(arguments.work, arguments.seed)
            content = yaml.safe_dump(config_of(arguments.seed, arguments.steps), sort_keys=False)
            config.write_text(content, encoding="utf-8")
        run_training(Console(), config, resume=True)
        trained = arguments.work / "run" / "model"
        model = AutoModelForCausalLM.from_pretrained(trained, dtype=torch.bfloat16)
        save(model, PreTrainedTokenizerFast.from_pretrained(trained), arguments.output)
        shutil.copyfile(arguments.work / "run" / "curves.png", arguments.output / "curves.png")
    ranker = BlockRank.from_pretrained(arguments.output, dtype=torch.float32)
    print(json.dumps(report_heldout(ranker), indent=2))


if __name__ == "__main__":
    main()
