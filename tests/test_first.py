"""FIRST against a sliding window of single prompts through the stock model."""

from __future__ import annotations

import string
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers.first import FIRST, PREFIX, SUFFIX, SYSTEM, windows
from tiny_models import make_model
from tiny_ranker import byte_tokenizer, tiny_model

QUERY = "how to read a {file}"
DOCUMENTS = [
    "open a file and read it", "", "the path " * 20, "write", "as [12] says, read [x]", "close", "read a file by path",
    "open a file and write it", "a", "list files", "no", "the answer: read(path)",
]  # fmt: skip


def prompt_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """With the words of the prompt, so that prompts are short."""
    return byte_tokenizer([SYSTEM, PREFIX, SUFFIX], chat)


def prompt_text(query: str, passages: list[str], chat: bool) -> str:
    """The published prompt, written out."""
    system = "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the query"
    num, lines = len(passages), ""
    for number, passage in enumerate(passages):
        lines += f"[{chr(65 + number)}] {passage}\n"
    user = (
        f"I will provide you with {num} passages, each indicated by an alphabetical identifier []. Rank the passages "
        f"based on their relevance to the search query: {query}.\n{lines}Search Query: {query}.\nRank the {num} "
        "passages above based on their relevance to the search query. All the passages should be included and listed "
        "using identifiers, in descending order of relevance. The output format should be [] > [], e.g., [B] > [A], "
        "Only respond with the ranking results, do not say any word or explain."
    )
    return f"<system>{system}</s><user>{user}</s><assistant>[" if chat else f"{system}\n {user}["


def stock_first(
    model: Any, tokenizer: Any, documents: list[str], window: int, step: int, chat: bool = False
) -> tuple[list[int], dict[int, tuple[float, int, int]]]:
    """The order, and every document's last logit, window and letter."""
    passages = [text.replace("[12]", "(12)") for text in documents]
    letters = [tokenizer.get_vocab()[letter] for letter in string.ascii_uppercase]
    order, read = list(range(len(passages))), {}
    end, number = len(order), 0
    while True:
        begin = max(0, end - window)
        shown = order[begin:end]
        text = prompt_text(QUERY, [passages[index] for index in shown], chat)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
        for place, index in enumerate(shown):
            read[index] = (float(logits[letters[place]]), number, place)
        order[begin:end] = sorted(shown, key=lambda index: -read[index][0])
        if begin == 0:
            return order, read
        end, number = end - step, number + 1


def check(
    ranker: FIRST, stock: Any, window: int, step: int, chat: bool = False, documents: list[str] = DOCUMENTS
) -> None:
    order, read = stock_first(stock, ranker.tokenizer, documents, window, step, chat)
    ranking = ranker.rank(QUERY, documents)
    assert [row.index for row in ranking] == order
    assert [row.score for row in ranking] == [-float(row.rank) for row in ranking]
    for row in ranking:
        logit, number, place = read[row.index]
        assert row.parts == {"logit": pytest.approx(logit, abs=1e-4), "window": number, "letter": place}
        assert all(type(part) is float for part in row.parts.values())


def counted(ranker: FIRST, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Number of prompts in every group, step by step; answered with random logits instead of the model's."""
    generator, groups = np.random.default_rng(0), []

    def run(wanted: list[list[list[int]]], batch_tokens: int) -> np.ndarray:
        groups.append([len(group) for group in wanted])
        return generator.standard_normal((sum(groups[-1]), len(ranker.candidates)), dtype=np.float32)

    monkeypatch.setattr(ranker, "_run", run)
    return groups


# Windows


@given(st.integers(1, 130), st.integers(1, 26), st.data())
def test_windows_slide_as_published(num_documents, window, data):
    step = data.draw(st.integers(1, window))
    published = []
    begin, end = num_documents - window, num_documents
    while end > 0 and begin + step != 0:
        begin = max(begin, 0)
        published.append((begin, end))
        begin, end = begin - step, end - step
    # The published loop starts as if it had ended for lists of just this length, and leaves them as they are.
    assert windows(num_documents, window, step) == (published or [(0, num_documents)])
    assert published or num_documents == window - step


def test_known_windows():
    assert len(windows(100, 20, 10)) == 9
    assert windows(25, 20, 10) == [(5, 25), (0, 15)]
    assert windows(20, 20, 10) == windows(20, 26, 1) == [(0, 20)]
    assert windows(10, 20, 10) == [(0, 10)]
    assert windows(3, 1, 1) == [(2, 3), (1, 2), (0, 1)]


@pytest.mark.parametrize(("settings", "expected"), [({}, 9), ({"window": 10, "step": 5}, 19), ({"step": 20}, 5)])
def test_a_window_is_one_prompt(monkeypatch, settings, expected):
    ranker = FIRST(tiny_model(), prompt_tokenizer(), **settings)
    groups = counted(ranker, monkeypatch)
    assert sorted(row.index for row in ranker.rank("q", ["a"] * 100)) == list(range(100))
    assert groups == [[1]] * expected
    groups.clear()
    ranker.rank_many(["q"] * 3, [["a"] * 100, ["a"] * 100, ["a"]])
    assert groups == [[1, 1, 1]] + [[1, 1]] * (expected - 1)


# Scores


@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize(("window", "step"), [(5, 2), (4, 4), (20, 10)])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "tiny"])
def test_order_and_logits_are_those_of_single_prompts(family, window, step, chat):
    overrides = {"final_logit_softcapping": 3.0} if family == "gemma2" else {}
    model, stock = (
        tiny_model() if family == "tiny" else make_model(family, vocab_size=400, **overrides) for _ in range(2)
    )
    check(FIRST(model, prompt_tokenizer(chat), window=window, step=step), stock, window, step, chat)


def test_the_whole_list_at_once():
    ranker = FIRST(tiny_model(), prompt_tokenizer(), window=None)
    check(ranker, tiny_model(), 26, 26)
    check(ranker, tiny_model(), 26, 26, documents=DOCUMENTS[:3])
    assert len(ranker.rank(QUERY, ["a"] * 26)) == 26
    with pytest.raises(ValueError, match=r"documents: expected at most 26 with window=None, .*, got 27"):
        ranker.rank(QUERY, ["a"] * 27)


def test_bundled_ranker():
    """Its tokenizer knows no capitals, so the letters are added as new tokens."""
    tokenizer = AutoTokenizer.from_pretrained(RANKER_DIRECTORY)
    pair = [AutoModelForCausalLM.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32).eval() for _ in range(2)]
    with pytest.raises(ValueError, match="tokenizer: expected a single token for 'A'"):
        FIRST(pair[0], tokenizer)
    tokenizer.add_tokens([AddedToken(letter, normalized=False, single_word=True) for letter in string.ascii_uppercase])
    for model in pair:
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    ranker = FIRST(pair[0], tokenizer, window=5, step=2)
    check(ranker, pair[1], 5, 2)
    assert len({row.parts["logit"] for row in ranker.rank(QUERY, DOCUMENTS)}) == len(DOCUMENTS)


# Lists


@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_lists_that_advance_together_do_not_meet(batch_tokens):
    ranker = FIRST(make_model("qwen3", vocab_size=400), prompt_tokenizer(), window=4, step=2)
    queries = [QUERY, "", "path", "q", QUERY]
    lists = [DOCUMENTS, DOCUMENTS[:5], [], ["a"], DOCUMENTS[::-1]]
    for query, documents, ranking in zip(
        queries, lists, ranker.rank_many(queries, lists, batch_tokens=batch_tokens), strict=True
    ):
        alone = ranker.rank(query, documents)
        assert ranking == alone
        for row, other in zip(ranking, alone, strict=True):
            assert row.parts == pytest.approx(other.parts, abs=1e-4)


def test_long_documents_are_cut_and_the_result_says_so():
    tokenizer = prompt_tokenizer()
    ranker = FIRST(tiny_model(), tokenizer, max_document_tokens=12)
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    ranking = ranker.rank(QUERY, DOCUMENTS)
    cut = [index for index, tokens in enumerate(ids) if len(tokens) > 12]
    assert sorted(row.index for row in ranking if row.truncated) == cut
    assert 1 < len(cut) < len(DOCUMENTS)
    check(ranker, tiny_model(), 20, 10, documents=[tokenizer.decode(tokens[:12]) for tokens in ids])
    again = ranker.rank(QUERY, [tokenizer.decode(tokens[:12]) for tokens in ids])
    assert [row.index for row in ranking] == [row.index for row in again]


def test_equal_logits_keep_the_order_of_the_first_stage():
    model = make_model("llama", vocab_size=400)
    model.model.norm.weight.data.zero_()
    ranking = FIRST(model, prompt_tokenizer(), window=4, step=2).rank(QUERY, DOCUMENTS)
    assert [row.index for row in ranking] == list(range(len(DOCUMENTS)))
    assert {row.parts["logit"] for row in ranking} == {0.0}


def test_same_call_same_result_and_the_best_k():
    ranker = FIRST(tiny_model(), prompt_tokenizer())
    ranking = ranker.rank(QUERY, DOCUMENTS)
    assert list(ranker.rank(QUERY, DOCUMENTS, top_k=3)) == list(ranking)[:3]
    assert list(ranker.rank(QUERY, [])) == []
    assert [(row.index, row.score) for row in ranker.rank(QUERY, ["a"])] == [(0, -1.0)]
    scores = ranker.predict([(QUERY, document) for document in DOCUMENTS])
    assert scores.tolist() == [row.score for row in sorted(ranking, key=lambda row: row.index)]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 27}, r"window: expected 1 to 26, .*, got 27"),
        ({"window": 0}, r"window: expected 1 to 26, .*, got 0"),
        ({"window": 4}, r"step: expected 1 to 4, the window, got 10"),
        ({"step": 0}, r"step: expected 1 to 20, the window, got 0"),
        ({"max_document_tokens": 0}, "max_document_tokens: expected a positive integer or None, got 0"),
    ],
)
def test_unfit_arguments_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        FIRST(tiny_model(), prompt_tokenizer(), **settings)
