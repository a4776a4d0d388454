"""Pointwise rerankers against one prompt at a time through the stock model."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForSequenceClassification,
)

from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers import METHODS, MONOT5, QWEN3_RERANKER, ERank, Pointwise, PointwisePrompt, RankLLaMA, Reranker
from rankernel.rerankers.loading import token_id, token_ids
from rankernel.rerankers.pointwise import ERANK_PROMPT, INSTRUCTION
from tiny_models import make_model
from tiny_ranker import word_tokenizer

QUERY = "how to read a file"
DOCUMENTS = ["open a file and read it", "", "the path " * 30, "write", "no", "open a file and write it"]
FAMILIES = ["llama", "qwen3", "gemma2", "granite"]
LETTERS = PointwisePrompt("Judge.\n", "{query}: {document}", "\nAnswer:", ("y", "Y"), ("n", "N"))


def tiny(family: str) -> Any:
    return make_model(family, vocab_size=330, **({"final_logit_softcapping": 3.0} if family == "gemma2" else {}))


def scores_of(ranking: Any) -> list[float]:
    return [row.score for row in sorted(ranking, key=lambda row: row.index)]


def last_logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double()


def check(ranker: Reranker, expected: list[float]) -> None:
    ranking = ranker.rank(QUERY, DOCUMENTS)
    np.testing.assert_allclose(scores_of(ranking), expected, atol=1e-4)
    assert [row.index for row in ranking] == sorted(range(len(expected)), key=lambda index: -expected[index])
    packed = ranker.rank_many([QUERY, "path", QUERY], [DOCUMENTS, ["a"], DOCUMENTS[::-1]], batch_tokens=200)
    np.testing.assert_allclose(scores_of(packed[0]), expected, atol=1e-4)
    np.testing.assert_allclose(scores_of(packed[2]), expected[::-1], atol=1e-4)
    assert list(ranker.rank(QUERY, [])) == []
    assert ranker.rank(QUERY, DOCUMENTS) == ranking
    pairs = [(QUERY, document) for document in DOCUMENTS]
    np.testing.assert_allclose(ranker.predict(pairs), expected, atol=1e-4)


@pytest.mark.parametrize("prompt", [QWEN3_RERANKER, MONOT5, LETTERS], ids=["qwen3", "monot5", "letters"])
@pytest.mark.parametrize("family", FAMILIES)
def test_probability_of_yes_against_no(family, prompt):
    tokenizer, stock = word_tokenizer(), tiny(family)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    expected = []
    for document in DOCUMENTS:
        body = prompt.body.format(instruction=INSTRUCTION, query=QUERY, document=document)
        logits = last_logits(stock, encode(prompt.prefix) + encode(body) + encode(prompt.suffix))
        positive, negative = (
            logits[token_ids(tokenizer, texts)].logsumexp(0) for texts in (prompt.positive, prompt.negative)
        )
        expected.append(float(torch.sigmoid(positive - negative)))
    check(Pointwise(tiny(family), tokenizer, prompt=prompt), expected)


def test_parts_are_the_logits_and_long_bodies_are_cut():
    tokenizer = word_tokenizer()
    ranker = Pointwise(tiny("qwen3"), tokenizer, prompt=LETTERS, max_length=60)
    ranking = ranker.rank(QUERY, DOCUMENTS)
    assert [row.index for row in ranking if row.truncated] == [2]
    for row in ranking:
        assert list(row.parts) == ["y", "Y", "n", "N"]
        odds = math.exp(row.parts["y"]) + math.exp(row.parts["Y"]), math.exp(row.parts["n"]) + math.exp(row.parts["N"])
        assert row.score == pytest.approx(odds[0] / sum(odds))
    prefix, suffix = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (LETTERS.prefix, LETTERS.suffix)
    )
    body = tokenizer(f"{QUERY}: {DOCUMENTS[2]}", add_special_tokens=False)["input_ids"]
    ids = prefix + body[: 60 - len(prefix) - len(suffix)] + suffix
    assert len(ids) == 60
    logits = last_logits(tiny("qwen3"), ids)
    cut = next(row for row in ranking if row.index == 2)
    assert cut.parts["Y"] == pytest.approx(float(logits[token_id(tokenizer, "Y")]), abs=1e-5)


def test_equal_documents_keep_their_order():
    ranking = Pointwise(tiny("llama"), word_tokenizer(), prompt=LETTERS).rank(QUERY, ["a", "b", "a", "b"])
    better = ranking[0].index % 2
    assert [row.index for row in ranking] == [better, better + 2, 1 - better, 3 - better]


@pytest.mark.parametrize("bos", [False, True])
def test_rankllama_scores_the_end_of_the_sequence(bos):
    config = LlamaConfig(
        vocab_size=330, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_labels=1,
        pad_token_id=3, initializer_range=0.2,
    )  # fmt: skip
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(LlamaForSequenceClassification(config).eval())
    tokenizer = word_tokenizer()
    if bos:
        from tokenizers.processors import TemplateProcessing

        tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    expected = []
    for document in DOCUMENTS:
        ids = [1] * bos
        ids += tokenizer(f"query: {QUERY}", add_special_tokens=False)["input_ids"][:12]
        ids += [*tokenizer(f" document: {document}", add_special_tokens=False)["input_ids"][:40], 0]
        with torch.no_grad():
            expected.append(float(models[0](input_ids=torch.tensor([ids])).logits))
    ranker = RankLLaMA(models[1], tokenizer, max_query_tokens=12, max_document_tokens=40)
    check(ranker, expected)
    assert [row.index for row in ranker.rank(QUERY, DOCUMENTS) if row.truncated] == [2]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_erank_weighs_integers(family, chat):
    tokenizer, stock = word_tokenizer(chat=chat), tiny(family)
    digits = token_ids(tokenizer, list("0123456789"))
    top, expected = [], []
    for document in DOCUMENTS:
        text = ERANK_PROMPT.format(query=QUERY, document=document)
        text = f"<user>{text}</s><assistant><answer>" if chat else f"{text}<answer>"
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        first = last_logits(stock, ids).softmax(-1)[digits]
        zero = last_logits(stock, [*ids, int(digits[1])]).softmax(-1)[digits[0]]
        probabilities = [*first.tolist(), float(first[1] * zero)]
        probabilities[1] -= probabilities[10]
        best = max(range(11), key=probabilities.__getitem__)
        top.append(best * probabilities[best])
        expected.append(sum(k * p for k, p in enumerate(probabilities)) / sum(probabilities))
    check(ERank(tiny(family), tokenizer, score="expected"), expected)
    check(ERank(tiny(family), tokenizer), top)


def test_bundled_ranker_judges_letters():
    tokenizer = AutoTokenizer.from_pretrained(RANKER_DIRECTORY)
    model, stock = (
        AutoModelForCausalLM.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32).eval() for _ in range(2)
    )
    prompt = PointwisePrompt("", "Query: {query}\nDocument: {document}", "\nAnswer: [", ("1",), ("0",))
    one, zero = (token_id(tokenizer, text) for text in "10")
    expected = []
    for document in DOCUMENTS:
        body = tokenizer(prompt.body.format(query=QUERY, document=document), add_special_tokens=False)["input_ids"]
        logits = last_logits(stock, body + tokenizer(prompt.suffix, add_special_tokens=False)["input_ids"])
        expected.append(float(torch.sigmoid(logits[one] - logits[zero])))
    check(Pointwise(model, tokenizer, prompt=prompt), expected)


def test_single_tokens():
    tokenizer = word_tokenizer()
    assert tokenizer.decode([token_id(tokenizer, " true")]) == " true"
    with pytest.raises(ValueError, match="tokenizer: expected a single token for 'maybe', got"):
        token_id(tokenizer, "maybe")
    with pytest.raises(ValueError, match="a token of its own for each of"):
        token_ids(tokenizer, ["yes", "yes"])


def test_unfit_arguments():
    tokenizer = word_tokenizer()
    with pytest.raises(ValueError, match=r"max_length: expected more than \d+, got 5"):
        Pointwise(tiny("llama"), tokenizer, prompt=LETTERS, max_length=5)
    with pytest.raises(ValueError, match="score: expected 'top' or 'expected', got 'mean'"):
        ERank(tiny("llama"), tokenizer, score="mean")
    with pytest.raises(ValueError, match="max_document_tokens: expected a positive integer or None, got 0"):
        ERank(tiny("llama"), tokenizer, max_document_tokens=0)
    with pytest.raises(ValueError, match="plain score layer with one output"):
        RankLLaMA(tiny("llama"), tokenizer)
    ranker = Pointwise(tiny("llama"), tokenizer, prompt=LETTERS)
    with pytest.raises(TypeError, match=r"documents\[1\]: expected a string, got int"):
        ranker.rank("q", ["a", 3])
    with pytest.raises(TypeError, match="documents: expected a sequence of strings"):
        ranker.rank_many(["q"], ["abc"])
    with pytest.raises(ValueError, match="batch_tokens: expected a positive integer, got 0"):
        ranker.rank_many(["q"], [["a"]], batch_tokens=0)


def test_lists_are_read_only_as_far_as_needed():
    ranker = Pointwise(tiny("llama"), word_tokenizer(), prompt=LETTERS)

    def lists() -> Any:
        yield "q", ["a"]
        yield "q", []
        yield "q", ["b"]
        raise AssertionError("read too far")

    scored = ranker.score_lists(lists(), batch_tokens=1)
    assert [len(next(scored).scores) for _ in range(3)] == [1, 0, 1]


def test_not_a_number_is_an_error():
    model = tiny("llama")
    model.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="logits are not finite"):
        Pointwise(model, word_tokenizer(), prompt=LETTERS).rank("q", ["a"])


def test_methods_load_from_a_directory(tmp_path: Path):
    tiny("qwen3").save_pretrained(tmp_path)
    word_tokenizer().save_pretrained(tmp_path)
    method = METHODS["qwen3-reranker"]
    ranker = method.reranker.from_pretrained(tmp_path, **method.settings)
    again = Pointwise(tiny("qwen3"), word_tokenizer())
    assert scores_of(ranker.rank(QUERY, DOCUMENTS)) == scores_of(again.rank(QUERY, DOCUMENTS))
