"""Groupwise grades against one prompt for each of them through the stock model."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers.groupwise import GROUPWISE_PROMPT, Groupwise
from rankernel.rerankers.pointwise import integer_probabilities, integer_texts
from tiny_models import make_model
from tiny_ranker import byte_tokenizer, tiny_model

QUERY = "how to read a {file}"
DOCUMENTS = ["open a file and read it", "", "the path " * 20, "write", "read [1] {x}", "close", "list files"]


def prompt_tokenizer(*, chat: bool = False, ten: bool = False) -> PreTrainedTokenizerFast:
    """With the words of the prompt, so that prompts are short."""
    return byte_tokenizer([GROUPWISE_PROMPT.replace("10", ""), *["10"] * 9 * ten], chat)


def stock_grades(
    model: Any, tokenizer: Any, documents: list[str], group_size: int, rounds: int, seed: int, chat: bool
) -> np.ndarray:
    """[rounds, documents]: every grade from two prompts of its own."""
    grades = np.zeros((rounds, len(documents)))
    shuffler = random.Random(seed)

    def next_token(ids: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].double().softmax(-1)

    vocabulary = tokenizer.get_vocab()
    digits = [vocabulary[digit] for digit in "0123456789"]
    for number in range(rounds):
        order = shuffler.sample(range(len(documents)), len(documents))
        while order:
            group, order = order[:group_size], order[group_size:]
            lines = "\n".join(f"[{place + 1}] {documents[index]}" for place, index in enumerate(group))
            text = GROUPWISE_PROMPT.format(documents=lines, query=QUERY)
            text = f"<user>{text}</s><assistant>" if chat else text
            for place, index in enumerate(group):
                ids = tokenizer(f"{text}[{place + 1}]: ", add_special_tokens=False)["input_ids"]
                first = next_token(ids)
                probabilities = first[digits].tolist()
                ten = probabilities[1] * float(next_token([*ids, digits[1]])[digits[0]])
                probabilities[1] -= ten
                probabilities.append(ten + (float(first[vocabulary["10"]]) if "10" in vocabulary else 0.0))
                grades[number, index] = np.average(np.arange(11), weights=probabilities)
    return grades


def scores_of(ranking: Any) -> list[float]:
    return [row.score for row in sorted(ranking, key=lambda row: row.index)]


def check(model: Any, stock: Any, tokenizer: Any, *, chat: bool = False, rounds: int = 2, **settings: int) -> None:
    ranker = Groupwise(model, tokenizer, rounds=rounds, **settings)
    grades = stock_grades(
        stock, tokenizer, DOCUMENTS, settings.get("group_size", 20), rounds, settings.get("seed", 0), chat
    )
    expected = grades.mean(axis=0)
    ranking = ranker.rank(QUERY, DOCUMENTS)
    np.testing.assert_allclose(scores_of(ranking), expected, rtol=0, atol=1e-4)
    assert [row.index for row in ranking] == sorted(range(len(DOCUMENTS)), key=lambda index: -expected[index])
    assert 0 < min(expected) < max(expected) < 10
    assert np.ptp(expected) > 1e-3
    for row in ranking:
        assert list(row.parts) == [f"round {number}" for number in range(rounds)]
        np.testing.assert_allclose(list(row.parts.values()), grades[:, row.index], rtol=0, atol=1e-4)
        assert all(type(part) is float for part in row.parts.values())
        assert row.score == pytest.approx(sum(row.parts.values()) / rounds)


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "tiny"])
def test_grades_are_those_of_single_prompts(family, chat):
    overrides = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    model, stock = (
        tiny_model() if family == "tiny" else make_model(family, vocab_size=400, **overrides) for _ in range(2)
    )
    check(model, stock, prompt_tokenizer(chat=chat), chat=chat, group_size=3)


@pytest.mark.parametrize(
    "settings", [{}, {"group_size": 1}, {"group_size": 4, "rounds": 3, "seed": 5}, {"group_size": 7, "rounds": 1}]
)
def test_groups_rounds_and_seeds(settings):
    check(tiny_model(), tiny_model(), prompt_tokenizer(), **settings)


def test_numbers_of_two_digits():
    documents = [f"{number} files" for number in range(13)]
    ranker = Groupwise(tiny_model(), prompt_tokenizer(), rounds=1)
    grades = stock_grades(tiny_model(), ranker.tokenizer, documents, 20, 1, 0, False)
    np.testing.assert_allclose(scores_of(ranker.rank(QUERY, documents)), grades[0], rtol=0, atol=1e-4)


def test_ten_as_a_token_of_its_own():
    tokenizer = prompt_tokenizer(ten=True)
    assert integer_texts(prompt_tokenizer()) == list("0123456789")
    assert integer_texts(tokenizer) == [*"0123456789", "10"]
    check(tiny_model(), tiny_model(), tokenizer, group_size=4)


@pytest.mark.parametrize("num_texts", [10, 11])
def test_probabilities_of_the_integers(num_texts):
    generator = np.random.default_rng(0)
    after = generator.dirichlet(np.ones(num_texts + 2), size=(50, 2))  # [.., 0] first, [.., 1] after a 1
    log_probs = np.log(after[..., :num_texts]).astype(np.float32)
    integers = integer_probabilities(log_probs)
    assert integers.shape == (50, 11)
    for row, (first, second) in zip(integers, after, strict=True):
        expected = [first[0], first[1] * (1 - second[0]), *first[2:10], first[1] * second[0]]
        expected[10] += first[10] if num_texts == 11 else 0
        np.testing.assert_allclose(row, expected, rtol=1e-5)


def test_bundled_ranker():
    tokenizer = AutoTokenizer.from_pretrained(RANKER_DIRECTORY)
    pair = [AutoModelForCausalLM.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32).eval() for _ in range(2)]
    check(*pair, tokenizer, group_size=4)


def test_a_group_is_read_once(monkeypatch):
    ranker = Groupwise(tiny_model(), prompt_tokenizer(), group_size=3)
    wanted = []

    def run(groups: list[list[list[int]]], batch_tokens: int) -> np.ndarray:
        wanted.append(groups)
        return np.full((sum(len(group) for group in groups), 2, len(ranker.candidates)), -3.0, dtype=np.float32)

    monkeypatch.setattr(ranker, "_run", run)
    ranker.rank(QUERY, DOCUMENTS)
    (groups,) = wanted  # all groups of all rounds in one request
    assert [len(group) for group in groups] == [3, 3, 1] * 2
    for group in groups:
        texts = [ranker.tokenizer.decode(prompt) for prompt in group]
        assert [text[-6:] for text in texts] == [f"[{place}]: 1" for place in range(1, len(group) + 1)]
        assert len({text[:-5] for text in texts}) == 1
    shown = [sum(f"] {document}\n" in ranker.tokenizer.decode(group[0]) for group in groups) for document in DOCUMENTS]
    assert min(shown) >= 2


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_lists_in_one_row_do_not_meet(batch_tokens):
    ranker = Groupwise(make_model("qwen3", vocab_size=400), prompt_tokenizer(), group_size=3)
    queries = [QUERY, "", "path", "q", QUERY]
    lists = [DOCUMENTS, DOCUMENTS[:3], [], ["a"], DOCUMENTS[::-1]]
    for query, documents, ranking in zip(
        queries, lists, ranker.rank_many(queries, lists, batch_tokens=batch_tokens), strict=True
    ):
        alone = ranker.rank(query, documents)
        assert [row.index for row in ranking] == [row.index for row in alone]
        np.testing.assert_allclose(scores_of(ranking), scores_of(alone), rtol=0, atol=1e-4)


def test_long_documents_are_cut_and_the_result_says_so():
    tokenizer = prompt_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    ranking = Groupwise(tiny_model(), tokenizer, max_document_tokens=12).rank(QUERY, DOCUMENTS)
    cut = [index for index, tokens in enumerate(ids) if len(tokens) > 12]
    assert sorted(row.index for row in ranking if row.truncated) == cut
    assert 1 <= len(cut) < len(DOCUMENTS)
    whole = Groupwise(tiny_model(), tokenizer)
    shortened = whole.rank(QUERY, [tokenizer.decode(tokens[:12]) for tokens in ids])
    np.testing.assert_allclose(scores_of(ranking), scores_of(shortened), rtol=0, atol=1e-6)
    assert not any(row.truncated for row in whole.rank(QUERY, DOCUMENTS))


def test_equal_grades_keep_the_order_of_the_first_stage():
    model = make_model("llama", vocab_size=400)
    model.model.norm.weight.data.zero_()  # every token is as probable as every other
    ranking = Groupwise(model, prompt_tokenizer(), group_size=3).rank(QUERY, DOCUMENTS)
    assert [row.index for row in ranking] == list(range(len(DOCUMENTS)))
    probabilities = [1 / 400] * 10 + [1 / 400**2]
    probabilities[1] -= 1 / 400**2
    assert ranking[0].score == pytest.approx(np.average(range(11), weights=probabilities), abs=1e-5)


def test_same_call_same_result_and_the_best_k():
    ranker = Groupwise(tiny_model(), prompt_tokenizer(), group_size=3)
    ranking = ranker.rank(QUERY, DOCUMENTS)
    assert ranker.rank(QUERY, DOCUMENTS) == ranking
    assert list(ranker.rank(QUERY, DOCUMENTS, top_k=3)) == list(ranking)[:3]
    assert list(ranker.rank(QUERY, [])) == []
    assert len(ranker.rank(QUERY, ["a"])) == 1
    np.testing.assert_allclose(ranker.predict([(QUERY, text) for text in DOCUMENTS]), scores_of(ranking), rtol=1e-6)
    other = Groupwise(ranker.model, ranker.tokenizer, group_size=3, seed=1).rank(QUERY, DOCUMENTS)
    assert scores_of(other) != scores_of(ranking)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"group_size": 0}, "group_size, rounds: expected positive integers, got 0 and 2"),
        ({"rounds": 0}, "group_size, rounds: expected positive integers, got 20 and 0"),
        ({"max_document_tokens": 0}, "max_document_tokens: expected a positive integer or None, got 0"),
    ],
)
def test_unfit_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Groupwise(tiny_model(), prompt_tokenizer(), **settings)
