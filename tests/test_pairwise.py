"""Pairwise ranking prompting: its sorts against literal ones, its scores against single prompts of the stock model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AddedToken, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers.pairwise import PRP_PROMPT, Comparisons, Pairwise, allpair, heapsort, sliding
from tiny_models import make_model
from tiny_ranker import byte_tokenizer, tiny_model, tiny_tokenizer

QUERY = "how to read a {file}"
DOCUMENTS = ["open a file and read it", "", "the path " * 20, "write", 'read [x] "now"', "close", "list files"]

Compare = Callable[[int, int], int]


# Sorts, with comparators made up


def run(comparisons: Comparisons, compare: Compare) -> tuple[list[float], list[list[tuple[int, int]]]]:
    """The scores, and the batches of pairs."""
    batches = []
    try:
        pairs = next(comparisons)
        while True:
            batches.append(pairs)
            pairs = comparisons.send([compare(*pair) for pair in pairs])
    except StopIteration as stop:
        return stop.value, batches


def order_of(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda index: -scores[index])


def literal_heapsort(num_documents: int, k: int, beats: Callable[[int, int], bool]) -> list[int]:
    """Swap the root behind the end, k times."""
    heap = list(range(num_documents))

    def sift(size: int, node: int) -> None:
        largest = node
        for child in (2 * node + 1, 2 * node + 2):
            if child < size and beats(heap[child], heap[largest]):
                largest = child
        if largest != node:
            heap[node], heap[largest] = heap[largest], heap[node]
            sift(size, largest)

    for node in range(num_documents // 2, -1, -1):
        sift(num_documents, node)
    for extracted, end in enumerate(range(num_documents - 1, 0, -1), start=1):
        heap[0], heap[end] = heap[end], heap[0]
        if extracted == k:
            break
        sift(end, 0)
    best = heap[::-1][:k]
    return best + [document for document in range(num_documents) if document not in best]


def literal_sliding(num_documents: int, k: int, beats: Callable[[int, int], bool], *, shorten: bool) -> list[int]:
    """Bubble passes; the published ones leave out the end of the list as far as nothing has changed there."""
    order = list(range(num_documents))
    last = num_documents - 1
    for number in range(min(k, num_documents)):
        first_change = None
        for place in range(last, number, -1):
            if beats(order[place], order[place - 1]):
                order[place - 1], order[place] = order[place], order[place - 1]
                first_change = first_change or place
        if shorten:
            last = number if first_change is None else min(first_change + 1, num_documents - 1)
    best = order[:k]
    return best + [document for document in range(num_documents) if document not in best]


@st.composite
def tournaments(draw: st.DrawFn) -> tuple[int, Compare]:
    """Any outcomes at all, cycles included."""
    num_documents = draw(st.integers(1, 24))
    kinds = draw(st.sampled_from([(-1, 0, 1), (-1, 1), (0,), (0, 0, 0, 1, -1)]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    outcome = np.triu(random.choice(kinds, (num_documents, num_documents)), 1)
    outcome = outcome - outcome.T
    return num_documents, lambda one, other: int(outcome[one, other])


@given(tournaments())
def test_allpair_counts_wins_and_half_the_ties(tournament):
    num_documents, compare = tournament
    scores, batches = run(allpair(num_documents), compare)
    expected = [
        sum({1: 1.0, 0: 0.5, -1: 0.0}[compare(one, other)] for other in range(num_documents) if other != one)
        for one in range(num_documents)
    ]
    assert scores == expected
    assert len(batches) == (num_documents > 1)  # all prompts in one request
    compared = [frozenset(pair) for batch in batches for pair in batch]
    assert len(compared) == len(set(compared)) == num_documents * (num_documents - 1) // 2


@given(tournaments(), st.integers(1, 30), st.booleans())
def test_sorts_make_the_comparisons_of_literal_ones(tournament, k, heap):
    num_documents, compare = tournament
    expected_pairs = []

    def beats(one: int, other: int) -> bool:
        expected_pairs.append((one, other))
        return compare(one, other) > (0 if not heap or one > other else -1)

    if heap:
        expected = literal_heapsort(num_documents, k, beats)
    else:
        expected = literal_sliding(num_documents, k, beats, shorten=False)
    scores, batches = run((heapsort if heap else sliding)(num_documents, k), compare)
    assert order_of(scores) == expected
    assert sorted(scores, reverse=True) == [-1.0 - place for place in range(num_documents)]
    assert sorted(pair for batch in batches for pair in batch) == sorted(expected_pairs)
    for batch in batches:  # comparisons that wait for each other are not made at once
        touched = [document for pair in batch for document in pair]
        assert len(touched) == len(set(touched)) > 0


@given(st.permutations(range(40)), st.integers(1, 45), st.integers(1, 40), st.booleans())
def test_sorts_find_the_best_k_of_a_total_order(relevance, k, num_documents, heap):
    relevance = relevance[:num_documents]
    scores, batches = run(
        (heapsort if heap else sliding)(num_documents, k),
        lambda one, other: 1 if relevance[one] > relevance[other] else -1,
    )
    best = sorted(range(num_documents), key=lambda index: -relevance[index])[:k]
    assert order_of(scores) == best + [index for index in range(num_documents) if index not in best]
    num_compared = sum(len(batch) for batch in batches)
    extracted = min(k, num_documents)
    if heap:
        assert num_compared <= 2 * num_documents + 2 * extracted * math.log2(num_documents)
    else:
        assert num_compared == sum(num_documents - 1 - number for number in range(extracted))
        assert len(batches) <= num_documents + extracted - 2 or num_documents == 1


@given(tournaments(), st.integers(1, 30))
def test_a_pair_read_once_is_the_published_shortening(tournament, k):
    num_documents, compare = tournament
    published = []

    def beats(one: int, other: int) -> bool:
        published.append((one, other))
        return compare(one, other) > 0

    expected = literal_sliding(num_documents, k, beats, shorten=True)
    scores, batches = run(sliding(num_documents, k), compare)
    assert order_of(scores) == expected
    assert len({frozenset(pair) for batch in batches for pair in batch}) <= len(published)


def test_everything_tied_changes_nothing():
    for sort in (heapsort, sliding):
        assert run(sort(9, 4), lambda one, other: 0)[0] == [-1.0 - place for place in range(9)]
    assert run(allpair(4), lambda one, other: 0)[0] == [1.5] * 4


def test_lists_of_one_document():
    assert run(allpair(1), lambda one, other: 1) == ([0.0], [])
    assert run(heapsort(1, 10), lambda one, other: 1) == run(sliding(1, 10), lambda one, other: 1) == ([-1.0], [])


# Scores


def label_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """With " A" and " B" as tokens."""
    return byte_tokenizer([PRP_PROMPT, " A", " B"] * 4, chat)


def stock_outcomes(model: Any, tokenizer: Any, documents: list[str], chat: bool = False) -> Compare:
    """Every pair in both orders, a prompt at a time, written out."""
    labels = [tokenizer(f"Passage:{label}", add_special_tokens=False)["input_ids"][-1] for label in (" A", " B")]
    prefers_first = {}
    for one, first in enumerate(documents):
        for other, second in enumerate(documents):
            if one != other:
                text = (
                    f'Given a query "{QUERY}", which of the following two passages is more relevant to the query?\n\n'
                    f'Passage A: "{first}"\n\nPassage B: "{second}"\n\nOutput Passage A or Passage B:'
                )
                text = f"<user>{text}</s><assistant>Passage:" if chat else f"{text} Passage:"
                ids = tokenizer(text, add_special_tokens=False)["input_ids"]
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1]
                prefers_first[one, other] = bool(logits[labels[0]] > logits[labels[1]])

    def outcome(one: int, other: int) -> int:
        if prefers_first[one, other] and not prefers_first[other, one]:
            return 1
        return -1 if prefers_first[other, one] and not prefers_first[one, other] else 0

    return outcome


def scores_of(ranking: Any) -> list[float]:
    return [row.score for row in sorted(ranking, key=lambda row: row.index)]


def check(model: Any, stock: Any, tokenizer: Any, chat: bool = False) -> None:
    compare = stock_outcomes(stock, tokenizer, DOCUMENTS, chat)
    everything = range(len(DOCUMENTS))
    outcomes = [[compare(one, other) for other in everything if other != one] for one in everything]
    assert sum(outcome != 0 for row in outcomes for outcome in row) >= 6  # or the order would show nothing
    expected = [row.count(1) + row.count(0) / 2 for row in outcomes]
    ranking = Pairwise(model, tokenizer).rank(QUERY, DOCUMENTS)
    assert scores_of(ranking) == expected
    assert [row.index for row in ranking] == sorted(everything, key=lambda index: -expected[index])
    for row in ranking:
        counts = outcomes[row.index]
        assert row.parts == {"wins": counts.count(1), "ties": counts.count(0), "losses": counts.count(-1)}
        assert all(type(part) is float for part in row.parts.values())
    for k in (2, 10):
        heap = Pairwise(model, tokenizer, method="heapsort", k=k).rank(QUERY, DOCUMENTS)
        assert [row.index for row in heap] == literal_heapsort(
            len(DOCUMENTS), k, lambda one, other: compare(one, other) > (0 if one > other else -1)
        )
        bubbled = Pairwise(model, tokenizer, method="sliding", k=k).rank(QUERY, DOCUMENTS)
        assert [row.index for row in bubbled] == literal_sliding(
            len(DOCUMENTS), k, lambda one, other: compare(one, other) > 0, shorten=False
        )
        for found in (heap, bubbled):
            assert [row.score for row in found] == [-float(row.rank) for row in found]
            for row in found:
                assert row.parts["wins"] <= outcomes[row.index].count(1)
                assert row.parts["ties"] <= outcomes[row.index].count(0)
                assert row.parts["losses"] <= outcomes[row.index].count(-1)
            assert sum(row.parts["wins"] for row in found) == sum(row.parts["losses"] for row in found)


# Most random models answer to the place in the prompt alone; these seeds make some that read the passages, too.
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
@pytest.mark.parametrize(("family", "seed"), [("llama", 5), ("qwen3", 3), ("olmo3", 7), ("tiny", 5)])
def test_scores_and_orders_are_those_of_single_prompts(family, seed, chat):
    model, stock = (
        tiny_model(seed=seed) if family == "tiny" else make_model(family, seed, vocab_size=400, initializer_range=0.2)
        for _ in range(2)
    )
    check(model, stock, label_tokenizer(chat), chat)


def test_bundled_ranker():
    """Its tokenizer knows no capitals, so the labels are added as new tokens, with the weights of two others."""
    tokenizer = AutoTokenizer.from_pretrained(RANKER_DIRECTORY)
    pair = [AutoModelForCausalLM.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32).eval() for _ in range(2)]
    with pytest.raises(ValueError, match="tokenizer: expected a single token for ' A'"):
        Pairwise(pair[0], tokenizer)
    twins = [tokenizer.get_vocab()[word] for word in ("return", "the")]
    tokenizer.add_tokens([AddedToken(label, normalized=False) for label in (" A", " B")])
    for model in pair:
        embeddings = model.resize_token_embeddings(len(tokenizer), mean_resizing=False).weight
        embeddings.data[-2:] = embeddings.data[twins]
    check(*pair, tokenizer)


# Prompts


def counted(ranker: Pairwise, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Number of prompts in every group, request by request; the model still answers."""
    groups, answer = [], ranker._run

    def run(wanted: list[list[list[int]]], batch_tokens: int) -> np.ndarray:
        groups.append([len(group) for group in wanted])
        return answer(wanted, batch_tokens)

    monkeypatch.setattr(ranker, "_run", run)
    return groups


def test_allpair_asks_once_and_groups_by_the_first_passage(monkeypatch):
    ranker = Pairwise(tiny_model(seed=5), label_tokenizer())
    groups = counted(ranker, monkeypatch)
    ranker.rank(QUERY, DOCUMENTS)
    assert groups == [[len(DOCUMENTS) - 1] * len(DOCUMENTS)]


@pytest.mark.parametrize("method", ["heapsort", "sliding"])
def test_sorts_read_no_pair_twice(monkeypatch, method):
    ranker = Pairwise(tiny_model(seed=5), label_tokenizer(), method=method, k=4)
    groups = counted(ranker, monkeypatch)
    ranking = ranker.rank(QUERY, DOCUMENTS)
    compared = sum(sum(row.parts.values()) for row in ranking)  # every comparison is in the parts of two documents
    assert sum(sum(request) for request in groups) == compared
    assert compared <= 2 * sum(len(DOCUMENTS) - 1 - number for number in range(4))
    assert all(len(request) == 1 for request in groups)
    groups.clear()
    ranker.rank_many([QUERY] * 3, [DOCUMENTS] * 3)
    assert all(len(request) == 3 for request in groups)  # the lists advance together


# Lists


@pytest.mark.parametrize("method", ["allpair", "heapsort", "sliding"])
@pytest.mark.parametrize("batch_tokens", [1, 1000])
def test_lists_that_advance_together_do_not_meet(method, batch_tokens):
    ranker = Pairwise(
        make_model("qwen3", 3, vocab_size=400, initializer_range=0.2), label_tokenizer(), method=method, k=3
    )
    queries = [QUERY, "", "path", "q", QUERY]
    lists = [DOCUMENTS[:4], DOCUMENTS[:3], [], ["a"], DOCUMENTS[:2:-1]]
    for query, documents, ranking in zip(
        queries, lists, ranker.rank_many(queries, lists, batch_tokens=batch_tokens), strict=True
    ):
        alone = ranker.rank(query, documents)
        assert ranking == alone
        assert [row.parts for row in ranking] == [row.parts for row in alone]


def test_long_documents_are_cut_and_the_result_says_so():
    tokenizer = label_tokenizer()
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in DOCUMENTS]
    ranking = Pairwise(tiny_model(seed=5), tokenizer, max_document_tokens=12).rank(QUERY, DOCUMENTS)
    assert sorted(row.index for row in ranking if row.truncated) == [i for i, text in enumerate(ids) if len(text) > 12]
    assert 0 < sum(row.truncated for row in ranking) < len(DOCUMENTS)
    shortened = [tokenizer.decode(text[:12]) for text in ids]
    assert scores_of(ranking) == scores_of(Pairwise(tiny_model(seed=5), tokenizer).rank(QUERY, shortened))


@pytest.mark.parametrize("method", ["allpair", "heapsort", "sliding"])
def test_ties_keep_the_order_of_the_first_stage(method):
    model = make_model("llama", vocab_size=400)
    model.model.norm.weight.data.zero_()
    ranking = Pairwise(model, label_tokenizer(), method=method, k=3).rank(QUERY, DOCUMENTS)
    assert [row.index for row in ranking] == list(range(len(DOCUMENTS)))
    assert all(row.parts["wins"] == row.parts["losses"] == 0 < row.parts["ties"] for row in ranking)


@pytest.mark.parametrize("method", ["allpair", "heapsort", "sliding"])
def test_same_call_same_result_and_the_best_k(method):
    ranker = Pairwise(tiny_model(seed=5), label_tokenizer(), method=method)
    ranking = ranker.rank(QUERY, DOCUMENTS)
    assert ranker.rank(QUERY, DOCUMENTS) == ranking
    assert list(ranker.rank(QUERY, DOCUMENTS, top_k=3)) == list(ranking)[:3]
    assert list(ranker.rank(QUERY, [])) == []
    (single,) = ranker.rank(QUERY, ["a"])
    assert single.score == (0.0 if method == "allpair" else -1.0)
    assert single.parts == {"wins": 0.0, "ties": 0.0, "losses": 0.0}
    assert ranker.predict([(QUERY, document) for document in DOCUMENTS]).tolist() == scores_of(ranking)


def test_unfit_arguments_are_refused():
    with pytest.raises(ValueError, match="method: expected 'allpair', 'heapsort' or 'sliding', got 'quicksort'"):
        Pairwise(tiny_model(seed=5), label_tokenizer(), method="quicksort")
    with pytest.raises(ValueError, match="k: expected a positive integer, got 0"):
        Pairwise(tiny_model(seed=5), label_tokenizer(), method="sliding", k=0)
    with pytest.raises(ValueError, match="tokenizer: expected a single token for ' A'"):
        Pairwise(tiny_model(seed=5), tiny_tokenizer())
    with pytest.raises(ValueError, match="max_document_tokens: expected a positive integer or None, got -1"):
        Pairwise(tiny_model(seed=5), label_tokenizer(), max_document_tokens=-1)
