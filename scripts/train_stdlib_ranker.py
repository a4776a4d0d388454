"""Train the bundled ranker from scratch: a small Qwen3 on docstrings of Python's standard library, on one CPU thread.

Everything is made here: the tokenizer, the weights and the files in python/rankernel/assets/ranker. Only the train
split is trained on; the checkpoint is chosen on the validation split; the held-out split is ranked once, at the end.
The model runs through rankernel's own ops (``attach``, ``layer_scores``, ``joint_loss``).

    MALLOC_MMAP_THRESHOLD_=33554432 MALLOC_TRIM_THRESHOLD_=17179869184 python scripts/train_stdlib_ranker.py

The two variables keep glibc from returning large blocks to the system after every step; they save time, no more.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import random
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

import rankernel
from rankernel.corpus import Candidates, Corpus, bm25_candidates, load_stdlib
from rankernel.models import layer_scores
from rankernel.rerankers import COMPACT, BlockRank
from rankernel.rerankers.blockrank import SETTINGS_FILE, BlockRankSettings
from rankernel.training import (
    RankingBatch,
    RankingCollator,
    RankingExample,
    document_scores_from_logsumexp,
    joint_loss,
)

REPOSITORY = Path("/work/main")
DEFAULT_OUTPUT = REPOSITORY / "python" / "rankernel" / "assets" / "ranker"

# What BM25 gives to a document for a handful of its own words, about.
WORDS_SCORE = 20.0

CLAUSE_END = re.compile(r"(?<=[.!?:;])\s+")


@dataclass(frozen=True)
class Recipe:
    """All numbers of a training run.

    Attributes:
        layer: scoring layer l*.
        max_document_tokens: tokens of a document's block.
        tail_offset: position of the first tail token.
        lists, documents: lists per step, documents per list.
        warmup_steps: steps on the scoring layer alone, with BM25 as a teacher; the layers behind it do not run.
        joint_steps: steps on the joint loss that follow.
        joint_lists: lists per step then.
        weight, temperature: of the contrastive loss in the joint loss.
        teacher_share: weight of the teacher in the warm-up, falling linearly to 0.
        teacher_temperature: BM25 scores are divided by it before their softmax.
        synthetic: share of queries made from a document's own words and clauses.
        hard: share of negatives taken from BM25's best.
    """

    vocabulary: int = 5120
    hidden: int = 192
    intermediate: int = 512
    layers: int = 4
    heads: int = 6
    head_dim: int = 32
    rope_theta: float = 1e6
    gain: float = 1.3
    embedding_std: float = 0.2
    layer: int = 3
    max_document_tokens: int = 64
    tail_offset: int = 256
    lists: int = 8
    documents: int = 10
    warmup_steps: int = 4800
    joint_steps: int = 600
    joint_lists: int = 8
    weight: float = 10.0
    temperature: float = 0.05
    teacher_share: float = 0.5
    teacher_temperature: float = 1.0
    synthetic: float = 0.5
    hard: float = 0.7
    learning_rate: float = 5e-4
    weight_decay: float = 0.01
    seed: int = 0


def train_tokenizer(texts: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Byte-pair encoding of lower-cased words.

    Names are split at underscores and capitals, and punctuation other than square brackets is dropped, so that the
    words of a sentence and the parts of an identifier meet as equal tokens. Digits stand alone.
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
        [
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.Punctuation("isolated"),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<unk>", "<pad>"],
        initial_alphabet=list("abcdefghijklmnopqrstuvwxyz0123456789[]"),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>")


def build_model(recipe: Recipe, vocabulary: int) -> Qwen3ForCausalLM:
    """A Qwen3 whose attention begins as a comparison of tokens.

    From Gaussian weights thousands of steps pass before equal tokens find each other. Here half of a layer's queries
    begin as its keys, so that a token attends to its like, and an attention's output begins as a mean of the tokens it
    attends to, in the spirit of mimetic initialisation (arXiv 2305.09828).
    """
    torch.manual_seed(recipe.seed)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=recipe.hidden,
        intermediate_size=recipe.intermediate,
        num_hidden_layers=recipe.layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads // 2,
        head_dim=recipe.head_dim,
        tie_word_embeddings=True,
        max_position_embeddings=2 * recipe.tail_offset,
        rope_theta=recipe.rope_theta,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=1,
    )
    model = Qwen3ForCausalLM(config)
    shape = (recipe.heads // 2, 1, recipe.head_dim, recipe.hidden)
    with torch.no_grad():
        model.model.embed_tokens.weight.normal_(0, recipe.embedding_std)
        for layer in model.model.layers:
            attention = layer.self_attn
            torch.nn.init.orthogonal_(attention.k_proj.weight)
            queries = attention.q_proj.weight.view(recipe.heads // 2, 2, recipe.head_dim, recipe.hidden)
            queries[:, :1].copy_(attention.k_proj.weight.view(shape))
            torch.nn.init.orthogonal_(attention.v_proj.weight)
            values = attention.v_proj.weight.view(shape).expand(-1, 2, -1, -1).flatten(0, 2)
            attention.o_proj.weight.copy_(values.T * recipe.embedding_std / 2)
            attention.q_norm.weight.fill_(recipe.gain)
            attention.k_norm.weight.fill_(recipe.gain)
            layer.mlp.down_proj.weight.mul_(0.3)
    return model


@dataclass(frozen=True)
class Source:
    """A training query.

    Attributes:
        query: its text.
        positives: text of every relevant document.
        own: ids of the documents that must not become negatives.
        candidates: BM25's ranking.
    """

    query: str
    positives: list[str]
    own: set[str]
    candidates: Candidates


def clause_queries(documents: Mapping[str, str], generator: random.Random) -> list[tuple[str, str, str]]:
    """(query, document id, the document without the query): every clause of a document asks for the rest of it."""
    found = []
    for document_id, text in documents.items():
        clauses = CLAUSE_END.split(text)
        for index, clause in enumerate(clauses[1:], start=1):
            words = clause.split()
            if len(words) > 20:
                start = generator.randrange(len(words) - 12)
                words = words[start : start + generator.randint(6, 14)]
            rest = " ".join(clauses[:index] + clauses[index + 1 :])
            if len(re.findall(r"[A-Za-z]{2,}", " ".join(words))) >= 3 and len(re.findall(r"\w+", rest)) >= 4:
                found.append((" ".join(words), document_id, rest))
    return found


class Sampler:
    """Draws labelled lists from the train split: real queries, clauses, and handfuls of a document's words."""

    def __init__(self, recipe: Recipe, corpus: Corpus) -> None:
        self.recipe = recipe
        self.documents = corpus.documents
        self.ids = list(corpus.documents)
        self.generator = random.Random(recipe.seed)
        ranked = bm25_candidates(corpus.queries, corpus.documents, depth=100)
        self.real = [
            Source(text, [corpus.documents[d] for d in corpus.qrels[q]], set(corpus.qrels[q]), ranked[q])
            for q, text in corpus.queries.items()
        ]
        clauses = clause_queries(corpus.documents, self.generator)
        ranked = bm25_candidates({str(i): c[0] for i, c in enumerate(clauses)}, corpus.documents, depth=100)
        self.clauses = [
            Source(query, [rest], {document_id}, ranked[str(i)]) for i, (query, document_id, rest) in enumerate(clauses)
        ]

    def draw(self, progress: float) -> tuple[RankingExample, list[float]]:
        """Return a list and the BM25 score of each of its documents.

        ``progress`` runs from 0 to 1. The first tenth has nothing but handfuls of words against random documents, from
        which the model learns to match; they fade out, and negatives grow harder, up to two fifths.
        """
        recipe, generator = self.recipe, self.generator
        early = min(1.0, max(0.0, (0.4 - progress) / 0.3))
        if generator.random() < early:
            document_id = generator.choice(self.ids)
            words = re.findall(r"[A-Za-z]+", self.documents[document_id])[:64]
            query = " ".join(generator.sample(words, min(len(words), generator.randint(4, 10))))
            source = Source(
                query, [self.documents[document_id]], {document_id}, Candidates([document_id], [WORDS_SCORE])
            )
        else:
            pool = self.clauses if generator.random() < recipe.synthetic else self.real
            source = generator.choice(pool)
        scores = dict(zip(source.candidates.document_ids, source.candidates.scores, strict=True))
        ranked = [d for d in source.candidates.document_ids if d not in source.own]
        negatives: dict[str, None] = {}
        for _ in range(recipe.documents - 1):
            if ranked and generator.random() < recipe.hard * (1.0 - early):
                # Half of the hard negatives come from BM25's best fifth.
                negatives[ranked[int(len(ranked) * generator.random() ** 2.3)]] = None
        while len(negatives) < recipe.documents - 1:
            document_id = generator.choice(self.ids)
            if document_id not in source.own:
                negatives[document_id] = None
        texts = [self.documents[d] for d in negatives]
        teacher = [scores.get(d, 0.0) for d in negatives]
        place = generator.randrange(recipe.documents)
        texts.insert(place, generator.choice(source.positives))
        teacher.insert(place, max((scores.get(d, 0.0) for d in source.own), default=0.0))
        return RankingExample(source.query, texts, [place]), teacher


class MasterWeights:
    """AdamW on float32 copies of a bfloat16 model, whose own weights could not take steps this small."""

    def __init__(self, model: torch.nn.Module, start: torch.nn.Module, recipe: Recipe) -> None:
        self.weights = list(model.parameters())
        self.masters = [p.detach().clone().float().requires_grad_() for p in start.parameters()]
        names = [name for name, _ in model.named_parameters()]
        matrices = [w for n, w in zip(names, self.masters, strict=True) if w.dim() == 2 and "embed" not in n]
        others = [w for n, w in zip(names, self.masters, strict=True) if w.dim() != 2 or "embed" in n]
        groups = [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98))

    def step(self, learning_rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        for weight, master in zip(self.weights, self.masters, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_([m for m in self.masters if m.grad is not None], 1.0)
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)


def warmup_loss(
    model: Any, batch: RankingBatch, settings: BlockRankSettings, teacher: torch.Tensor, share: float, recipe: Recipe
) -> tuple[torch.Tensor, torch.Tensor]:
    """(loss, document scores): cross-entropy of S_d, a distribution over documents, with label and teacher mixed.

    Unlike the contrastive loss it does not vanish for a document that has hardly any attention yet.
    """
    logsumexp = layer_scores(
        model, batch.input_ids, batch.layout, settings.layer, batch.signal_rows, tail_offset=settings.tail_offset
    )
    scores = document_scores_from_logsumexp(logsumexp, batch.layout.num_lists)
    # The logarithm of a mean of softmaxes without leaving the logarithm: S_d itself may round to 0.
    votes = logsumexp.log_softmax(dim=-1).unflatten(0, (batch.layout.num_lists, -1)).flatten(1, 2)
    log_scores = votes.logsumexp(dim=1) - math.log(votes.shape[1])
    target = (1 - share) * batch.positives.float() + share * (teacher / recipe.teacher_temperature).softmax(dim=1)
    return -(target * log_scores).sum(dim=1).mean(), scores


def ndcg_at_10(ranking: Sequence[str], grades: Mapping[str, int]) -> float:
    """nDCG@10 with linear gains, as ir-measures computes it; here so that training does not need it."""
    gain = sum(grades.get(d, 0) / math.log2(rank + 2) for rank, d in enumerate(ranking[:10]))
    ideal = sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(grades.values(), reverse=True)[:10]))
    return gain / ideal


def evaluate(ranker: BlockRank, corpus: Corpus, candidates: Mapping[str, Candidates], limit: int | None) -> float:
    """Mean nDCG@10 of the BM25 candidates in the ranker's order, over all queries or the first ``limit``.

    The ranker gets the candidates in a shuffled order, so that equal scores cannot fall back on BM25's.
    """
    generator = random.Random(0)
    queries = list(corpus.queries)[:limit]
    shuffled = [generator.sample(candidates[q].document_ids, len(candidates[q].document_ids)) for q in queries]
    lists = [(corpus.queries[q], [corpus.documents[d] for d in ids]) for q, ids in zip(queries, shuffled, strict=True)]
    total = 0.0
    for query_id, ids, (scores, *_) in zip(queries, shuffled, ranker.score_lists(lists), strict=True):
        order = sorted(range(len(ids)), key=lambda i: -scores[i])
        total += ndcg_at_10([ids[i] for i in order], corpus.qrels[query_id])
    return total / len(queries)


def save(output: Path, model: Any, tokenizer: Any, settings: BlockRankSettings) -> None:
    """Write a model directory beside its place, then move it there file by file."""
    scratch = output.with_name(output.name + ".partial")
    shutil.rmtree(scratch, ignore_errors=True)
    saved = copy.deepcopy(model)
    rankernel.detach(saved)
    saved.save_pretrained(scratch)
    (scratch / "generation_config.json").unlink(missing_ok=True)
    tokenizer.save_pretrained(scratch)
    content = json.dumps({"method": "blockrank", **asdict(settings)}, indent=2) + "\n"
    (scratch / SETTINGS_FILE).write_text(content, encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    for path in scratch.iterdir():
        path.replace(output / path.name)
    scratch.rmdir()


def steps_of(recipe: Recipe) -> Iterator[tuple[int, bool, float, float]]:
    """Yield (step, joint, progress from 0 to 1, learning rate)."""
    total = recipe.warmup_steps + recipe.joint_steps
    for step in range(total):
        progress = step / total
        decay = 1.0 if progress < 0.3 else max(0.02, (1.0 - progress) / 0.7)
        yield step, step >= recipe.warmup_steps, progress, recipe.learning_rate * min(1.0, (step + 1) / 100) * decay


def train(recipe: Recipe, output: Path, checkpoint_seconds: float, validation_limit: int | None) -> None:
    """Train and leave the best checkpoint by validation nDCG@10 in ``output``."""
    train_corpus, validation = load_stdlib("train"), load_stdlib("validation")
    tokenizer = train_tokenizer([*train_corpus.documents.values(), *train_corpus.queries.values()], recipe.vocabulary)
    settings = BlockRankSettings(recipe.layer, COMPACT, recipe.max_document_tokens, recipe.tail_offset)
    collator = RankingCollator(tokenizer, settings)
    start = build_model(recipe, len(tokenizer))
    model = copy.deepcopy(start).to(torch.bfloat16)
    optimizer = MasterWeights(model, start, recipe)
    ranker = BlockRank(model, tokenizer, **vars(settings))
    sampler = Sampler(recipe, train_corpus)
    candidates = bm25_candidates(validation.queries, validation.documents)
    print(json.dumps(asdict(recipe)))
    print(
        f"{sum(p.numel() for p in model.parameters())} parameters, {len(sampler.real)} + {len(sampler.clauses)} queries"
    )
    bm25 = [ndcg_at_10(candidates[q].document_ids, validation.qrels[q]) for q in validation.queries]
    initial = evaluate(ranker, validation, candidates, validation_limit)
    print(f"validation nDCG@10: BM25 {sum(bm25) / len(bm25):.4f}, untrained {initial:.4f}", flush=True)

    best, losses, hits, tokens = 0.0, [], [], 0
    began = last = time.monotonic()
    for step, joint, progress, learning_rate in steps_of(recipe):
        model.train()
        drawn = [sampler.draw(progress) for _ in range(recipe.joint_lists if joint else recipe.lists)]
        batch = collator([example for example, _ in drawn])
        if joint:
            result = joint_loss(model, batch, settings, weight=recipe.weight, temperature=recipe.temperature)
            loss, scores, shown = result.total, result.scores, result.contrastive
            detail = f"answer {result.language_model.item():.3f}"
        else:
            teacher = torch.tensor([scores for _, scores in drawn])
            share = recipe.teacher_share * (1.0 - step / recipe.warmup_steps)
            loss, scores = warmup_loss(model, batch, settings, teacher, share, recipe)
            shown, detail = loss, f"teacher {share:.2f}"
        loss.backward()
        optimizer.step(learning_rate)
        losses.append(shown.item())
        hits.append(batch.positives.gather(1, scores.argmax(dim=1, keepdim=True)).float().mean().item())
        tokens += batch.layout.num_tokens
        final = step + 1 == recipe.warmup_steps + recipe.joint_steps
        if final or time.monotonic() - last > checkpoint_seconds:
            score = evaluate(ranker, validation, candidates, None if final else validation_limit)
            print(
                f"{time.monotonic() - began:6.0f} s  step {step + 1}"
                f"  {tokens / (time.monotonic() - began):.0f} tokens/s"
                f"  loss {sum(losses[-200:]) / len(losses[-200:]):.3f}  first {sum(hits[-200:]) / len(hits[-200:]):.3f}"
                f"  {detail}  validation nDCG@10 {score:.4f}",
                flush=True,
            )
            if score > best:
                best = score
                save(output, model, tokenizer, settings)
            last = time.monotonic()


def report_heldout(directory: Path) -> dict[str, float]:
    """nDCG@10 on the held-out queries of BM25's order, of a shuffled order and of the ranker's."""
    corpus = load_stdlib("heldout")
    candidates = bm25_candidates(corpus.queries, corpus.documents)
    generator = random.Random(0)
    bm25 = shuffled = ceiling = 0.0
    for query_id, found in candidates.items():
        grades = corpus.qrels[query_id]
        bm25 += ndcg_at_10(found.document_ids, grades)
        shuffled += ndcg_at_10(generator.sample(found.document_ids, len(found.document_ids)), grades)
        ceiling += ndcg_at_10(sorted(found.document_ids, key=lambda d: -grades.get(d, 0)), grades)
    count = len(candidates)
    ranker = BlockRank.from_pretrained(directory, dtype=torch.float32)
    return {
        "queries": count,
        "shuffled": shuffled / count,
        "bm25": bm25 / count,
        "ranker": evaluate(ranker, corpus, candidates, None),
        "best possible": ceiling / count,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=DEFAULT_OUTPUT)
    parser.add_argument("--checkpoint-seconds", type=float, default=180.0)
    parser.add_argument("--validation-limit", type=int, default=None, help="queries per checkpoint; default all")
    parser.add_argument("--heldout", action="store_true", help="evaluate the model in --output instead of training")
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="change a number of the recipe")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.heldout:
        print(json.dumps(report_heldout(arguments.output), indent=2))
        return
    changes = {name: json.loads(value) for name, value in (item.split("=", 1) for item in arguments.set)}
    train(Recipe(**changes), arguments.output, arguments.checkpoint_seconds, arguments.validation_limit)


if __name__ == "__main__":
    main()
