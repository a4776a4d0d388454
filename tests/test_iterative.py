"""IRanker against the stock model with a dense mask, which runs the whole prompt for every answer."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankernel.demo import RANKER_DIRECTORY
from rankernel.layout import BlockLayout
from rankernel.models import attach
from rankernel.rerankers import iterative
from rankernel.rerankers.iterative import IRANKER, LETTERS, Exclusion, IRanker, exclusion_order
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import ListScores
from tiny_models import dense_inputs, make_model
from tiny_ranker import tiny_model, tiny_tokenizer

QUERY = "how to read a file"
DOCUMENTS = ["open a file and read it", "", "the path of a file " * 3, "read", "x", "Query: {text}", "write [B] it"]
MODELS = {
    "llama": lambda: make_model("llama", vocab_size=400),
    "granite": lambda: make_model("granite", vocab_size=400),
    "qwen3": lambda: make_model("qwen3", vocab_size=400),
    "gemma2": lambda: make_model("gemma2", vocab_size=400),
    "gemma2-wide": lambda: make_model("gemma2", vocab_size=400, sliding_window=4096),
    "tiny": tiny_model,
    "bundled": lambda: AutoModelForCausalLM.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32).eval(),
}


pytestmark = pytest.mark.usefixtures("one_thread")


# The order of exclusion


def one_by_one(values: list[float], window: int, step: int) -> list[int]:
    """The document of the highest value goes, of equal ones the last; one document per turn."""
    above, pool, order, since_refill = list(range(len(values))), [], [], 0
    while above or len(pool) > 1:
        if since_refill == step or not pool:
            while above and len(pool) < window:
                pool.insert(0, above.pop())
            since_refill = 0
        if len(pool) == 1:
            break
        worst = max(pool, key=lambda document: (values[document], document))
        pool.remove(worst)
        order.append(worst)
        since_refill += 1
    return order


@given(st.lists(st.integers(0, 9), max_size=60), st.integers(2, 12), st.integers(1, 11))
@example([0] * 100, 12, 6)
def test_exclusion_is_that_of_one_at_a_time(values: list[int], window: int, step: int) -> None:
    step = min(step, window - 1)
    pools = []

    def exclude(pool: list[int], count: int) -> Iterator[Exclusion]:
        assert pool == sorted(pool)
        assert 0 < count < len(pool) <= window
        pools.append(pool)
        worst_first = sorted(pool, key=lambda document: (values[document], document), reverse=True)
        return ((document, float(values[document])) for document in worst_first[:count])

    excluded = exclusion_order(len(values), window, step, exclude)
    assert [document for document, _ in excluded] == one_by_one(values, window, step)
    assert len(excluded) == max(0, len(values) - 1)
    assert [logit for _, logit in excluded] == [values[document] for document, _ in excluded]
    if pools:
        assert pools[0] == list(range(len(values)))[-window:]
        assert all(len(pool) == window for pool in pools[:-1])


def test_the_reference_by_hand() -> None:
    values = [3.0, 1.0, 3.0, 0.0, 2.0]
    assert one_by_one(values, 5, 2) == [2, 0, 4, 1]
    assert one_by_one(values, 3, 1) == [2, 4, 0, 1]


# Scores


def stock_scores(
    model: Any, tokenizer: Any, query: str, documents: list[str], window: int, step: int, limit: int | None
) -> ListScores:
    """The whole prompt for every answer, stock attention, all logits."""

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    before, after = around_user_turn(tokenizer, "[")
    prefix, tail = encode(before + IRANKER.prefix.format(query=query)), encode(IRANKER.tail.format(query=query) + after)
    bodies = [encode(f" {document}") for document in documents]
    truncated = [limit is not None and len(body) > limit for body in bodies]
    bodies = [body[:limit] for body in bodies]
    longest = max(map(len, bodies)) + max(len(encode(f"\n[{letter}]")) for letter in LETTERS[:window])
    scores, parts, done = [-1.0] * len(documents), [{} for _ in documents], 0
    above, pool = list(range(len(documents))), []
    while done < len(documents) - 1:
        begin = max(0, len(above) - (window - len(pool)))
        pool, above = above[begin:] + pool, above[:begin]
        letters = dict(zip(pool, LETTERS, strict=False))
        for _ in range(step if above else len(pool) - 1):
            blocks = [encode(f"\n[{letters[document]}]") + bodies[document] for document in pool]
            layout = BlockLayout.from_lengths([(len(prefix), [len(block) for block in blocks], len(tail))])
            inputs = dense_inputs(model, torch.tensor([*prefix, *chain(*blocks), *tail]), layout)
            inputs["position_ids"] = layout.position_ids("shared", len(prefix) + longest)[None]
            with torch.no_grad():
                logits = model(**inputs).logits[0, -1]
            of_pool = [float(logits[tokenizer.convert_tokens_to_ids(letters[document])]) for document in pool]
            worst = max(range(len(pool)), key=lambda place: (of_pool[place], place))
            document = pool.pop(worst)
            done += 1
            scores[document] = float(done - 1 - len(documents))
            parts[document] = {"logit": of_pool[worst], "round": done}
    return ListScores(scores, truncated, parts)


def check(ranker: IRanker, stock: Any, documents: list[str]) -> None:
    (found,) = ranker.score_lists([(QUERY, documents)])
    expected = stock_scores(
        stock, ranker.tokenizer, QUERY, documents, ranker.window, ranker.step, ranker.max_document_tokens
    )
    assert found.scores == expected.scores
    assert found.truncated == expected.truncated
    assert [list(of_one) for of_one in found.parts] == [list(of_one) for of_one in expected.parts]
    for ours, theirs in zip(found.parts, expected.parts, strict=True):
        np.testing.assert_allclose(list(ours.values()), list(theirs.values()), atol=1e-4)
    assert sorted(found.scores) == [-float(rank) for rank in range(len(documents), 0, -1)]


@pytest.mark.parametrize(
    "settings",
    [{}, {"window": 3, "step": 1}, {"window": 4, "step": 2, "max_document_tokens": 8}],
    ids=["one", "longest above", "cut"],
)
@pytest.mark.parametrize("name", MODELS)
def test_ranking_is_that_of_stock_attention_with_a_dense_mask(name: str, settings: dict[str, Any]) -> None:
    stock = MODELS[name]()
    stock.set_attn_implementation("eager")
    check(IRanker(MODELS[name](), tiny_tokenizer(), **settings), stock, DOCUMENTS)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_chat_template(name: str) -> None:
    stock = MODELS[name]()
    stock.set_attn_implementation("eager")
    check(IRanker(MODELS[name](), tiny_tokenizer(chat=True), window=5, step=3), stock, DOCUMENTS)


def test_more_candidates_than_capital_letters() -> None:
    stock = MODELS["llama"]()
    stock.set_attn_implementation("eager")
    documents = [f"file {number} {'read ' * (number % 4)}" for number in range(30)]
    check(IRanker(MODELS["llama"](), tiny_tokenizer(), window=28, step=4), stock, documents)


# What runs


class Counted:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.prefills, self.tails, self.prompts = 0, 0, 0
        prefill, tail, repeated = iterative.prefill, iterative.DocumentContext.tail, iterative._RepeatedPrompt.tail

        def counted_prefill(*args: Any, **kwargs: Any) -> Any:
            self.prefills += 1
            return prefill(*args, **kwargs)

        def counted_tail(context: Any, ids: Any) -> Any:
            self.tails += 1
            return tail(context, ids)

        def counted_prompt(prompt: Any, ids: Any) -> Any:
            self.prompts += 1
            return repeated(prompt, ids)

        monkeypatch.setattr(iterative, "prefill", counted_prefill)
        monkeypatch.setattr(iterative.DocumentContext, "tail", counted_tail)
        monkeypatch.setattr(iterative._RepeatedPrompt, "tail", counted_prompt)


class EqualLogits:
    def candidate_logits(self, hidden: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        return torch.full((len(hidden), len(candidates)), 0.5)


@pytest.mark.parametrize(("num_documents", "prefills"), [(1, 0), (2, 1), (6, 1), (7, 2), (9, 2), (10, 3), (23, 7)])
def test_a_pool_runs_once_and_an_answer_costs_a_tail(
    monkeypatch: pytest.MonkeyPatch, num_documents: int, prefills: int
) -> None:
    counted = Counted(monkeypatch)
    ranker = IRanker(tiny_model(num_layers=1), tiny_tokenizer(), window=6, step=3)
    ranker.rank("q", ["a"] * num_documents)
    assert (counted.prefills, counted.tails, counted.prompts) == (prefills, num_documents - 1, 0)


def test_prompts_run_again_where_a_window_acts(monkeypatch: pytest.MonkeyPatch) -> None:
    counted = Counted(monkeypatch)
    IRanker(MODELS["gemma2"](), tiny_tokenizer()).rank("q", DOCUMENTS)
    assert (counted.prefills, counted.tails, counted.prompts) == (0, 0, len(DOCUMENTS) - 1)


@pytest.mark.parametrize("num_documents", [2, 5, 6, 17])
def test_of_equal_candidates_the_last_goes_first(monkeypatch: pytest.MonkeyPatch, num_documents: int) -> None:
    ranker = IRanker(tiny_model(num_layers=1), tiny_tokenizer(), window=5, step=2)
    monkeypatch.setattr(ranker, "_head", EqualLogits())
    ranking = ranker.rank("q", [f"{number}" for number in range(num_documents)])
    assert [row.index for row in ranking] == list(range(num_documents))
    assert [dict(row.parts) for row in ranking] == [
        {},
        *({"logit": 0.5, "round": done} for done in range(num_documents - 1, 0, -1)),
    ]


# The rest of the protocol


@pytest.fixture(scope="module")
def ranker() -> IRanker:
    return IRanker(tiny_model(), tiny_tokenizer(), window=4, step=2, max_document_tokens=12)


def test_few_documents(ranker: IRanker) -> None:
    assert list(ranker.rank("q", [])) == []
    (only,) = ranker.rank("q", ["the path of a file " * 3])
    assert (only.score, only.rank, only.truncated, only.parts) == (-1.0, 1, True, {})
    ranking = ranker.rank("q", ["", ""])
    assert [row.score for row in ranking] == [-1.0, -2.0]


def test_long_documents_are_cut_and_said_to_be(ranker: IRanker) -> None:
    tokens = [ranker.tokenizer(f" {document}")["input_ids"] for document in DOCUMENTS]
    shortened = [ranker.tokenizer.decode(ids[:12])[1:] for ids in tokens]
    ranking, of_cut = ranker.rank_many([QUERY] * 2, [DOCUMENTS, shortened])
    too_long = [index for index, ids in enumerate(tokens) if len(ids) > 12]
    assert 0 < len(too_long) < len(DOCUMENTS)
    assert sorted(row.index for row in ranking if row.truncated) == too_long
    assert [row.index for row in ranking] == [row.index for row in of_cut]
    np.testing.assert_allclose(
        [row.parts.get("logit", 0.0) for row in ranking], [row.parts.get("logit", 0.0) for row in of_cut], atol=1e-5
    )


def test_same_bits_in_any_company(ranker: IRanker) -> None:
    alone = [ranker.rank(query, documents) for query, documents in ((QUERY, DOCUMENTS), ("path", DOCUMENTS[::-1]))]
    together = ranker.rank_many([QUERY, "none", "path"], [DOCUMENTS, [], DOCUMENTS[::-1]], batch_tokens=1)
    assert [together[0], together[2]] == alone
    assert [[row.parts for row in ranking] for ranking in (together[0], together[2])] == [
        [row.parts for row in ranking] for ranking in alone
    ]
    assert ranker.predict([(QUERY, document) for document in DOCUMENTS]).tolist() == [
        row.score for row in sorted(alone[0], key=lambda row: row.index)
    ]


def test_lists_are_read_one_at_a_time(ranker: IRanker) -> None:
    def lists() -> Iterator[tuple[str, list[str]]]:
        yield "q", DOCUMENTS
        raise AssertionError("read too far")

    assert len(next(ranker.score_lists(lists())).scores) == len(DOCUMENTS)


def test_loads_a_directory(tmp_path: Any) -> None:
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    loaded = IRanker.from_pretrained(tmp_path, window=4, step=2, max_document_tokens=12)
    assert loaded.rank(QUERY, DOCUMENTS) == IRanker(
        tiny_model(), tiny_tokenizer(), window=4, step=2, max_document_tokens=12
    ).rank(QUERY, DOCUMENTS)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"window": 1}, "window: expected from 2 to 52, got 1"),
        ({"window": 53}, "window: expected from 2 to 52, got 53"),
        ({"step": 0}, "step: expected from 1 to 19, less than window, got 0"),
        ({"step": 20}, "step: expected from 1 to 19, less than window, got 20"),
        ({"max_document_tokens": 0}, "max_document_tokens: expected a positive integer or None, got 0"),
    ],
)
def test_unfit_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        IRanker(tiny_model(), tiny_tokenizer(), **settings)


def test_unfit_inputs(ranker: IRanker) -> None:
    with pytest.raises(TypeError, match=r"documents\[1\]: expected a string, got int"):
        ranker.rank("q", ["a", 1])
    with pytest.raises(TypeError, match="query: expected a string, got NoneType"):
        ranker.rank(None, ["a"])
    with pytest.raises(ValueError, match="batch_tokens: expected a positive integer, got 0"):
        ranker.rank_many(["q"], [["a"]], batch_tokens=0)


def test_a_tokenizer_without_capital_letters() -> None:
    with pytest.raises(ValueError, match="tokenizer: expected a single token for 'A'"):
        IRanker(MODELS["bundled"](), AutoTokenizer.from_pretrained(RANKER_DIRECTORY))


def test_logits_that_are_not_finite() -> None:
    model = tiny_model()
    attach(model)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="the model's logits are not finite"):
        IRanker(model, tiny_tokenizer()).rank("q", ["a", "b"])
