"""E2Rank against hidden states of the stock model, one text at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from rankernel.demo import RANKER_DIRECTORY
from rankernel.rerankers.embedding import LISTWISE_QUERY, PLAIN_QUERY, E2Rank
from tiny_models import make_model
from tiny_ranker import tiny_model, tiny_tokenizer

QUERY = "how to read a file"
DOCUMENTS = ["open a file and read it", "", "the path of a file " * 9, "read", "x {query}", "open a file and write"]
# Without a padding token, whose embedding is zero: it would be that of "</s>".
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: make_model("llama", vocab_size=400, pad_token_id=None),
    "qwen3": lambda: make_model("qwen3", vocab_size=400, pad_token_id=None),
    "gemma2": lambda: make_model("gemma2", vocab_size=400, pad_token_id=None),
    "granite": lambda: make_model("granite", vocab_size=400, pad_token_id=None),
    "tiny": tiny_model,
    "bundled": lambda: AutoModelForCausalLM.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32).eval(),
}


pytestmark = pytest.mark.usefixtures("one_thread")


def qwen_like_tokenizer() -> PreTrainedTokenizerFast:
    """With a chat template, and an end of text that is not the end of a sequence."""
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|endoftext|>"]})
    assert len(tokenizer) <= 400
    return tokenizer


def stock_embedding(model: Any, tokenizer: Any, text: str) -> torch.Tensor:
    ids = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0, -1].double()
    return hidden / hidden.norm()


def stock_scores(model: Any, tokenizer: Any, end: str, pseudo_query: str, documents: list[str]) -> list[float]:
    of_query = stock_embedding(model, tokenizer, pseudo_query)
    return [float(of_query @ stock_embedding(model, tokenizer, document + end)) for document in documents]


def check(ranker: E2Rank, expected: list[float], in_prompt: int) -> None:
    ranking = ranker.rank(QUERY, DOCUMENTS)
    by_index = sorted(ranking, key=lambda row: row.index)
    np.testing.assert_allclose([row.score for row in by_index], expected, atol=1e-4)
    assert [row.index for row in ranking] == sorted(range(len(expected)), key=lambda index: -expected[index])
    assert [row.parts for row in by_index] == [
        {"in prompt": float(index < in_prompt)} for index in range(len(expected))
    ]
    packed = ranker.rank_many([QUERY, "path", QUERY], [DOCUMENTS, ["a"], DOCUMENTS], batch_tokens=150)
    for row in (packed[0], packed[2]):
        np.testing.assert_allclose([one.score for one in sorted(row, key=lambda one: one.index)], expected, atol=1e-4)


@pytest.mark.parametrize("num_feedback", [1, 4, 20])
@pytest.mark.parametrize("name", MODELS)
def test_cosines_with_the_pseudo_query(name: str, num_feedback: int) -> None:
    listed = "\n".join(f"[{place + 1}] {text}" for place, text in enumerate(DOCUMENTS[:num_feedback]))
    query = LISTWISE_QUERY.replace("{query}", QUERY).replace("{documents}", listed)
    expected = stock_scores(MODELS[name](), tiny_tokenizer(), "</s>", query, DOCUMENTS)
    check(E2Rank(MODELS[name](), tiny_tokenizer(), num_feedback=num_feedback), expected, num_feedback)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_chat_template_and_end_of_text(name: str) -> None:
    tokenizer = qwen_like_tokenizer()
    listed = f"[1] {DOCUMENTS[0]}\n[2] {DOCUMENTS[1]}"
    query = (
        "<user>Given a web search query and some relevant documents, rerank the documents that answer the query:\n"
        f"Documents:\n{listed}\nSearch Query: {QUERY}</s><assistant>"
    )
    expected = stock_scores(MODELS[name](), tokenizer, "<|endoftext|>", query, DOCUMENTS)
    check(E2Rank(MODELS[name](), tokenizer, num_feedback=2), expected, 2)


@pytest.mark.parametrize("name", ["llama", "qwen3", "bundled"])
def test_plain_query(name: str) -> None:
    tokenizer = qwen_like_tokenizer()
    query = (
        "Instruct: Given a web search query, retrieve relevant passages that answer the query\n"
        f"Query:{QUERY}<|endoftext|>"
    )
    expected = stock_scores(MODELS[name](), tokenizer, "<|endoftext|>", query, DOCUMENTS)
    check(E2Rank(MODELS[name](), tokenizer, listwise=False), expected, 0)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_embeddings_are_those_of_every_text_alone(name: str) -> None:
    ranker, stock = E2Rank(MODELS[name](), tiny_tokenizer()), MODELS[name]()
    expected = np.array([stock_embedding(stock, tiny_tokenizer(), f"{text}</s>").numpy() for text in DOCUMENTS])
    for batch_tokens in (1, 60, 10**6):
        embeddings = ranker.embed(DOCUMENTS, batch_tokens=batch_tokens)
        assert embeddings.dtype == np.float32
        np.testing.assert_allclose(embeddings, expected, atol=1e-5)
    assert ranker.embed([]).shape == (0, 64)
    with pytest.raises(TypeError, match="texts: expected a sequence of strings, got a string"):
        ranker.embed("one text")


def test_embeddings_rank_as_the_plain_query_does() -> None:
    ranker = E2Rank(tiny_model(), tiny_tokenizer(), listwise=False)
    documents, (query,) = ranker.embed(DOCUMENTS), ranker.embed([PLAIN_QUERY.format(query=QUERY)])
    scores = [row.score for row in sorted(ranker.rank(QUERY, DOCUMENTS), key=lambda row: row.index)]
    np.testing.assert_allclose(documents @ query, scores, atol=1e-5)


def test_half_precision_gives_float32_of_length_one() -> None:
    embeddings = E2Rank(tiny_model().to(torch.bfloat16), tiny_tokenizer()).embed(DOCUMENTS)
    assert embeddings.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(embeddings, axis=1), 1.0, atol=1e-6)


def test_head_does_not_run() -> None:
    model = tiny_model()
    expected = E2Rank(model, tiny_tokenizer()).rank(QUERY, DOCUMENTS)
    model.lm_head.weight.data = torch.full_like(model.lm_head.weight, float("nan"))
    assert E2Rank(model, tiny_tokenizer()).rank(QUERY, DOCUMENTS) == expected


def test_long_documents_are_cut_in_their_embedding_and_in_the_query() -> None:
    tokenizer = tiny_tokenizer()
    ranker = E2Rank(tiny_model(), tokenizer, max_document_tokens=8)
    ranking = ranker.rank(QUERY, DOCUMENTS)
    tokens = [tokenizer(document)["input_ids"] for document in DOCUMENTS]
    too_long = [index for index, ids in enumerate(tokens) if len(ids) > 8]
    assert 0 < len(too_long) < len(DOCUMENTS)
    assert sorted(row.index for row in ranking if row.truncated) == too_long
    uncut, shortened = E2Rank(tiny_model(), tokenizer), [tokenizer.decode(ids[:8]) for ids in tokens]
    np.testing.assert_array_equal(ranker.embed(DOCUMENTS), uncut.embed(shortened))
    of_cut = uncut.rank(QUERY, shortened)
    assert [(row.index, row.score) for row in of_cut] == [(row.index, row.score) for row in ranking]


def test_the_protocol() -> None:
    ranker = E2Rank(tiny_model(), tiny_tokenizer())
    assert list(ranker.rank(QUERY, [])) == []
    (only,) = ranker.rank(QUERY, ["read"])
    assert -1.0 <= only.score <= 1.0
    assert only.parts == {"in prompt": 1.0}
    assert [row.index for row in ranker.rank(QUERY, ["read"] * 3)] == [0, 1, 2]
    assert ranker.rank(QUERY, DOCUMENTS) == ranker.rank(QUERY, DOCUMENTS)


def test_unfit_arguments() -> None:
    with pytest.raises(ValueError, match="num_feedback: expected a positive integer, got 0"):
        E2Rank(tiny_model(), tiny_tokenizer(), num_feedback=0)
    with pytest.raises(ValueError, match="max_document_tokens: expected a positive integer or None, got 0"):
        E2Rank(tiny_model(), tiny_tokenizer(), max_document_tokens=0)
    with pytest.raises(ValueError, match=r"tokenizer: expected one with <\|endoftext\|> or an end-of-sequence token"):
        E2Rank(MODELS["bundled"](), AutoTokenizer.from_pretrained(RANKER_DIRECTORY))


def test_known_embeddings_are_not_computed_again(monkeypatch: pytest.MonkeyPatch):
    ranker = E2Rank(tiny_model(), qwen_like_tokenizer())
    expected = ranker.rank(QUERY, DOCUMENTS)
    known = dict(zip(DOCUMENTS[1:], ranker.embed(DOCUMENTS[1:]), strict=True))
    informed = E2Rank(tiny_model(), qwen_like_tokenizer(), embeddings=known)
    asked: list[int] = []
    run = informed._run

    def counted(groups: Any, *rest: Any) -> Any:
        asked.append(sum(map(len, groups)))
        return run(groups, *rest)

    monkeypatch.setattr(informed, "_run", counted)
    ranking = informed.rank(QUERY, DOCUMENTS)
    np.testing.assert_allclose([row.score for row in ranking], [row.score for row in expected], atol=1e-6)
    assert asked == [2], "the document that is not known, and the query"
    known |= {DOCUMENTS[0]: ranker.embed(DOCUMENTS[:1])[0]}
    informed = E2Rank(tiny_model(), qwen_like_tokenizer(), embeddings=known)
    assert [row.index for row in informed.rank(QUERY, DOCUMENTS)] == [row.index for row in expected]
