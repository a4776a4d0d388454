"""ICR and QRHead against a dense eager computation of the published recipe: eleven families, the bundled model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from rankernel.demo import RANKER_DIRECTORY
from rankernel.layout import BlockLayout
from rankernel.models import MassRequest, attach, model_inputs
from rankernel.rerankers.icr import (
    ICR,
    IE_INSTRUCTION,
    QA_INSTRUCTION,
    QRHEAD_LLAMA_3_1_8B_LME,
    QRHEAD_LLAMA_3_1_8B_NQ,
    kept_sums,
    select_heads,
)
from rankernel.rerankers.protocol import Ranking
from tiny_models import FAMILIES, make_model
from tiny_ranker import tiny_model, tiny_tokenizer

QUERY = "how to read a file"
DOCUMENTS = ["open a file and read it", "a much longer text about the path of a file " * 3, "", "read", "x"]
LISTS = [(QUERY, DOCUMENTS), ("", ["a"]), ("path", DOCUMENTS[::-1]), ("N/A", ["b " * 50, ""])]
TOKENIZER = tiny_tokenizer()


def family_model(family: str, **overrides: Any) -> Any:
    return make_model(family, **{"vocab_size": 400, "sliding_window": 4096, **overrides})


def scores_of(ranking: Ranking) -> list[float]:
    """In the order of the documents."""
    return [row.score for row in sorted(ranking, key=lambda row: row.index)]


def ranked(reranker: ICR, query: str = QUERY, documents: Sequence[str] = DOCUMENTS) -> list[float]:
    return scores_of(reranker.rank(query, documents))


def filtered(differences: Sequence[float]) -> tuple[float, float]:
    """Threshold and score of one document, by the formula."""
    count = len(differences)
    mean = sum(differences) / count
    if count == 1:
        return math.nan, 0.0
    threshold = mean - 2 * math.sqrt(sum((c - mean) ** 2 for c in differences) / (count - 1))
    return threshold, sum(c for c in differences if c > threshold)


def dense_scores(
    stock: Any,
    tokenizer: Any,
    query: str,
    documents: Sequence[str],
    *,
    instruction: str = QA_INSTRUCTION,
    around: tuple[str, str] = ("", ""),
    separator: str = "\n\n",
    reverse: bool = True,
    layers: Sequence[int] | None = None,
    heads: Sequence[tuple[int, int]] | None = None,
    limit: int = 384,
) -> list[float]:
    """The published recipe: one pass per query over the whole prompt, all attention matrices, plain loops."""

    def ids(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    tokens = ids(around[0] + " Here are some paragraphs:")
    spans = []
    for number, text in enumerate(documents[::-1] if reverse else documents, start=1):
        tokens += ids(separator)
        body = ids(f"[{number}] {text}")[:limit]
        spans.append((len(tokens), len(tokens) + len(body)))
        tokens += body
    tokens += ids(separator)

    def attention_to_tokens(text: str) -> torch.Tensor:
        prompt = tokens + ids(f"{instruction}{separator}Query: {text}{around[1]}")
        with torch.no_grad():
            attentions = stock(torch.tensor([prompt]), output_attentions=True).attentions
        total = torch.zeros(len(prompt), dtype=torch.float64)
        for layer, of_layer in enumerate(attentions):
            for head, weights in enumerate(of_layer[0].double()):
                if (layer in layers if layers is not None else True) and (heads is None or (layer, head) in heads):
                    weights = weights / weights.sum(dim=-1, keepdim=True)  # without the sinks of gpt_oss
                    total += weights[len(tokens) :].mean(dim=0)
        return total[: len(tokens)]

    difference = attention_to_tokens(query) - attention_to_tokens("N/A")
    scores = [filtered(difference[begin:end].tolist())[1] for begin, end in spans]
    return scores[::-1] if reverse else scores


def assert_same(ours: Sequence[float], theirs: Sequence[float]) -> None:
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-6)
    assert np.argsort(ours, kind="stable").tolist() == np.argsort(theirs, kind="stable").tolist()


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def ranker() -> ICR:
    return ICR(tiny_model(), TOKENIZER, max_document_tokens=30)


# The filter


def test_golden_value_of_the_filter() -> None:
    """METHODS.md's ``icr_filter`` gives threshold and score; these differences have both."""
    differences = [0.02, 0.03, 0.01, 0.025, 0.015, 0.02, 0.03, 0.01, 0.02, -1.0]
    assert filtered(differences) == pytest.approx((-0.7272596376653354, 0.18), abs=1e-15)
    query, calibration, kept = kept_sums(np.array(differences), np.zeros(10), [10])
    assert query - calibration == pytest.approx([0.18], abs=1e-15)
    assert kept == [9]


@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(0, 2**32 - 1))
def test_filter_is_that_of_plain_loops(lengths: list[int], seed: int) -> None:
    query, calibration = np.random.default_rng(seed).standard_t(2, (2, 3, sum(lengths)))  # with outliers
    of_query, of_none, kept = kept_sums(query, calibration, lengths)
    for head in range(3):
        end = 0
        for document, length in enumerate(lengths):
            begin, end = end, end + length
            differences = query[head, begin:end] - calibration[head, begin:end]
            threshold, score = filtered(differences.tolist())
            assert of_query[head, document] - of_none[head, document] == pytest.approx(score, abs=1e-12)
            assert of_query[head, document] == pytest.approx(query[head, begin:end][differences > threshold].sum())
            assert kept[head, document] == (differences > threshold).sum()


@pytest.mark.parametrize("value", [0.0, 0.1, -1e-9])
def test_filter_keeps_nothing_of_one_token_or_of_equal_ones(value: float) -> None:
    differences = np.array([value, value, value, value, 2.0, 1.0, 3.0])
    assert kept_sums(differences, np.zeros(7), [1, 3, 3]).tolist() == [[0, 0, 6], [0, 0, 0], [0, 0, 3]]


# Scores


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_are_those_of_the_published_recipe(family: str) -> None:
    stock = family_model(family)
    stock.set_attn_implementation("eager")
    reranker = ICR(family_model(family), TOKENIZER)
    for query, documents in LISTS:
        assert_same(ranked(reranker, query, documents), dense_scores(stock, TOKENIZER, query, documents))


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gemma2", "gemma3", "gpt_oss", "cohere2", "olmo3"])
def test_hidden_states_follow_the_model_s_sliding_windows(family: str) -> None:
    """Eager attention shows full rows on layers 0 and 3 alone, behind 1 and 2 with their windows."""
    stock = family_model(family, sliding_window=9)
    stock.set_attn_implementation("eager")
    reranker = ICR(family_model(family, sliding_window=9), TOKENIZER, layers=[0, 3])
    expected = dense_scores(stock, TOKENIZER, QUERY, DOCUMENTS, layers=[0, 3])
    assert_same(ranked(reranker), expected)
    whole = ICR(family_model(family), TOKENIZER, layers=[0, 3])
    assert np.abs(np.subtract(ranked(whole), expected)).max() > 1e-4


@pytest.mark.parametrize("missing", [0, 1])
def test_documents_are_shared_where_both_queries_lie_within_the_window(missing: int) -> None:
    prefix, tails, *_ = ICR(tiny_model(), TOKENIZER)._prompt(QUERY, DOCUMENTS)
    window = len(prefix) + sum(map(len, tails)) - missing
    stock = family_model("qwen3", sliding_window=window)
    stock.set_attn_implementation("eager")
    reranker = ICR(family_model("qwen3", sliding_window=window), TOKENIZER)
    assert reranker._prompt(QUERY, DOCUMENTS).shared is not bool(missing)
    assert_same(ranked(reranker), dense_scores(stock, TOKENIZER, QUERY, DOCUMENTS))


def test_scores_on_the_bundled_ranker() -> None:
    ranker = ICR.from_pretrained(RANKER_DIRECTORY, dtype=torch.float32)
    stock = transformers.AutoModelForCausalLM.from_pretrained(
        RANKER_DIRECTORY, dtype=torch.float32, attn_implementation="eager"
    )
    documents = ["Return a list of files in a directory.", "Open a file.", "Read up to n bytes.", "Close the socket."]
    assert_same(ranked(ranker, QUERY, documents), dense_scores(stock, ranker.tokenizer, QUERY, documents))


@pytest.mark.parametrize(
    "change",
    [
        {"instruction": IE_INSTRUCTION},
        {"separator": " \n\n"},
        {"reverse": False},
        {"layers": [2, 1]},
        {"layers": [0]},
        {"heads": [(1, 3), (0, 0), (1, 0), (1, 3)]},
        {"heads": [(2, head) for head in range(4)]},
    ],
    ids=str,
)
def test_settings(change: dict[str, Any]) -> None:
    stock = family_model("llama")
    stock.set_attn_implementation("eager")
    expected = dense_scores(stock, TOKENIZER, QUERY, DOCUMENTS, **change)
    assert np.abs(np.subtract(expected, dense_scores(stock, TOKENIZER, QUERY, DOCUMENTS))).max() > 1e-4
    assert_same(ranked(ICR(family_model("llama"), TOKENIZER, **change)), expected)


def test_prompt_is_the_published_one() -> None:
    reranker = ICR(tiny_model(), tiny_tokenizer(chat=True))
    prefix, (of_query, of_none), *_ = reranker._prompt("how?", ["best", "second"])
    assert TOKENIZER.decode(prefix) == "<user> Here are some paragraphs:\n\n[1] second\n\n[2] best\n\n"
    assert TOKENIZER.decode(of_query) == f"{QA_INSTRUCTION}\n\nQuery: how?</s><assistant>"
    assert TOKENIZER.decode(of_none) == f"{QA_INSTRUCTION}\n\nQuery: N/A</s><assistant>"


def test_scores_within_a_chat_template() -> None:
    stock = tiny_model()
    stock.set_attn_implementation("eager")
    around = ("<user>", "</s><assistant>")
    chat = tiny_tokenizer(chat=True)
    assert_same(ranked(ICR(tiny_model(), chat)), dense_scores(stock, chat, QUERY, DOCUMENTS, around=around))


def test_long_documents_are_cut(ranker: ICR) -> None:
    stock = tiny_model()
    stock.set_attn_implementation("eager")
    ranking = ranker.rank(QUERY, DOCUMENTS)
    assert [row.index for row in ranking if row.truncated] == [1]
    assert_same(scores_of(ranking), dense_scores(stock, TOKENIZER, QUERY, DOCUMENTS, limit=30))
    assert not any(row.truncated for row in ICR(tiny_model(), TOKENIZER, max_document_tokens=None).rank("", DOCUMENTS))


def test_parts_make_up_the_score(ranker: ICR) -> None:
    ranking = ranker.rank(QUERY, DOCUMENTS)
    for row in ranking:
        assert list(row.parts) == ["query", "calibration", "kept tokens"]
        assert row.score == pytest.approx(row.parts["query"] - row.parts["calibration"], abs=1e-12)
        length = min(30, len(TOKENIZER(f"[{5 - row.index}] {DOCUMENTS[row.index]}")["input_ids"]))
        assert 0 < row.parts["kept tokens"] <= length
        assert 0 < row.parts["query"] < 12


def test_a_document_of_one_token_scores_nothing() -> None:
    one = ICR(tiny_model(), TOKENIZER, max_document_tokens=1)
    assert [(row.index, row.score, row.parts["kept tokens"]) for row in one.rank("q", ["a", "b"])] == [
        (0, 0.0, 0.0),
        (1, 0.0, 0.0),
    ]


def test_layers_after_the_last_that_counts_do_not_run() -> None:
    model = tiny_model()
    expected = ranked(ICR(model, TOKENIZER, layers=[0, 1]))
    with torch.no_grad():
        for parameter in [*model.model.layers[2].parameters(), model.lm_head.weight]:
            parameter.fill_(math.nan)
    model.model.layers[2].register_forward_pre_hook(lambda *_: pytest.fail("runs"))
    assert ranked(ICR(model, TOKENIZER, layers=[0, 1])) == expected
    assert ranked(ICR(model, TOKENIZER, heads=[(1, head) for head in range(4)] + [(0, 0)])) != expected


def test_fewer_layers_first_and_all_later() -> None:
    """Transformers looks for the modules whose attention it collects only once."""
    model = tiny_model()
    for layers in ([0], None, [1]):
        assert ranked(ICR(model, TOKENIZER, layers=layers)) == ranked(ICR(tiny_model(), TOKENIZER, layers=layers))


def test_attention_that_is_not_finite_is_refused() -> None:
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match=r"the attention of layers \[0, 1, 2\] is not finite"):
        ICR(model, TOKENIZER).rank("q", ["a", "b"])


# Lists


@pytest.mark.parametrize("sliding_window", [None, 9])
@pytest.mark.parametrize("batch_tokens", [1, 400, 10**6])
def test_lists_in_one_row_do_not_meet(batch_tokens: int, sliding_window: int | None) -> None:
    reranker = ICR(family_model("mistral", sliding_window=sliding_window), TOKENIZER)
    lists = [*LISTS, ("nothing", []), (QUERY, ["a", "b"])]
    packed = list(reranker.score_lists(lists, batch_tokens=batch_tokens))
    assert packed[4] == ([], [], [])
    for (query, documents), found in zip(lists, packed, strict=True):
        np.testing.assert_allclose(found.scores, ranked(reranker, query, documents), atol=2e-6)


@settings(max_examples=10)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.lists(st.text(max_size=30), max_size=6)), max_size=4),
    st.integers(1, 1000),
)
def test_any_texts_and_packing(ranker: ICR, lists: list[tuple[str, list[str]]], batch_tokens: int) -> None:
    scored = list(ranker.score_lists(lists, batch_tokens=batch_tokens))
    assert [len(found.scores) for found in scored] == [len(documents) for _, documents in lists]
    for (query, documents), found in zip(lists, scored, strict=True):
        (alone,) = ranker.score_lists([(query, documents)])
        assert found.truncated == alone.truncated
        for score, parts, alone_score, alone_parts in zip(
            found.scores, found.parts, alone.scores, alone.parts, strict=True
        ):
            # What lies within rounding of the filter's threshold may fall on either side of it.
            if parts["kept tokens"] == alone_parts["kept tokens"]:
                assert score == pytest.approx(alone_score, abs=5e-6)


@pytest.mark.parametrize("sliding_window", [None, 9])
def test_row_of_tokens_holds_at_most_batch_tokens(sliding_window: int | None) -> None:
    reranker = ICR(family_model("mistral", sliding_window=sliding_window), TOKENIZER)
    lengths: list[int] = []
    reranker.model.model.register_forward_pre_hook(
        lambda _, args, inputs: lengths.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    alone = reranker._prompt(QUERY, DOCUMENTS).num_tokens
    list(reranker.score_lists([(QUERY, DOCUMENTS)] * 5, batch_tokens=2 * alone))
    assert lengths == [2 * alone, 2 * alone, alone]


def test_lists_are_read_only_as_far_as_needed(ranker: ICR) -> None:
    def lists() -> Any:
        yield "q", DOCUMENTS
        yield "q", DOCUMENTS
        raise AssertionError("read too far")

    assert len(next(ranker.score_lists(lists(), batch_tokens=1)).scores) == len(DOCUMENTS)


def test_same_call_same_bits(ranker: ICR) -> None:
    assert ranker.rank(QUERY, DOCUMENTS) == ranker.rank(QUERY, DOCUMENTS)


def test_no_documents_give_an_empty_ranking(ranker: ICR) -> None:
    assert list(ranker.rank("q", [])) == []
    assert ranker.rank_many([], []) == []
    assert ranker.predict([("q", "a"), ("q", "b")]).shape == (2,)


# QRHead


def test_published_heads() -> None:
    for heads in (QRHEAD_LLAMA_3_1_8B_LME, QRHEAD_LLAMA_3_1_8B_NQ):
        assert len(set(heads)) == 16
        assert all(0 <= layer < 32 and 0 <= head < 32 for layer, head in heads)
    assert max(QRHEAD_LLAMA_3_1_8B_LME) == (17, 29)
    assert max(QRHEAD_LLAMA_3_1_8B_NQ) == (20, 14)


def test_heads_are_selected_by_the_ndcg_of_each_alone() -> None:
    model = family_model("qwen3")
    queries, documents = [QUERY, "path", "x"], [DOCUMENTS, DOCUMENTS[:3], [f"{word} file" for word in "abcdefghijklm"]]
    relevance = [[0, 0, 0.02, 0.01, 0], [0, 0, 0], [0, 1, 0, 3, 0, 0, 0, 0, 0, 2, 0, 0, 1]]

    def ndcg(ranking: Ranking, grades: Sequence[float]) -> float:
        gained = sum(grades[row.index] / math.log2(row.rank + 1) for row in ranking[:10])
        ideal = sum(grade / math.log2(rank + 1) for rank, grade in enumerate(sorted(grades)[:-11:-1], start=1))
        return gained / ideal

    quality = {}
    for pair in [(layer, head) for layer in (1, 3) for head in range(4)]:
        alone = ICR(model, TOKENIZER, heads=[pair])
        quality[pair] = ndcg(alone.rank(queries[0], documents[0]), relevance[0])
        quality[pair] += ndcg(alone.rank(queries[2], documents[2]), relevance[2])
    assert len({round(value, 9) for value in quality.values()}) > 4
    expected = sorted(quality, key=lambda pair: (-round(quality[pair], 9), pair))
    reranker = ICR(model, TOKENIZER, layers=[1, 3])
    assert select_heads(reranker, queries, documents, relevance, k=5) == expected[:5]
    assert sorted(select_heads(reranker, queries, documents, relevance)) == sorted(expected)


def test_heads_cannot_be_selected(ranker: ICR) -> None:
    with pytest.raises(ValueError, match="reranker: expected one made without heads"):
        select_heads(ICR(tiny_model(), TOKENIZER, heads=[(0, 0)]), ["q"], [["a"]], [[1]])
    with pytest.raises(ValueError, match="relevance: expected 2 grades for 'q', got 1"):
        select_heads(ranker, ["q"], [["a", "b"]], [[1]])
    with pytest.raises(ValueError, match="relevance: expected a grade above 0"):
        select_heads(ranker, ["q"], [["a", "b"]], [[0, 0]])
    with pytest.raises(ValueError, match="shorter"):
        select_heads(ranker, ["q", "r"], [["a", "b"]], [[0, 0]])


# Arguments


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layers": []}, r"layers: expected at least one, layers in \[0, 3\), got \[\]"),
        ({"layers": [0, 3]}, r"layers: expected at least one, layers in \[0, 3\), got \[0, 3\]"),
        ({"layers": [-1]}, "layers: expected"),
        ({"heads": []}, r"heads: expected at least one, layers in \[0, 3\), got \[\]"),
        ({"heads": [(3, 0)]}, r"heads: expected at least one, layers in \[0, 3\), got \[\(3, 0\)\]"),
        ({"heads": [(0, 4)]}, r"heads: expected pairs of layer and head in \[0, 4\), got \[\(0, 4\)\]"),
        ({"heads": [(0, -1)]}, "heads: expected pairs of layer and head"),
        ({"heads": [(0, 0)], "layers": [0]}, "layers: expected None together with heads"),
        ({"max_document_tokens": 0}, "max_document_tokens: expected a positive integer or None, got 0"),
    ],
)
def test_unfit_settings_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ICR(tiny_model(), TOKENIZER, **change)


def test_unfit_lists_are_refused(ranker: ICR) -> None:
    with pytest.raises(TypeError, match="query: expected a string, got NoneType"):
        ranker.rank(None, ["a"])
    with pytest.raises(TypeError, match="documents: expected a sequence of strings, got a string"):
        ranker.rank("q", "text")
    with pytest.raises(TypeError, match=r"documents\[1\]: expected a string, got int"):
        ranker.rank("q", ["a", 3])
    with pytest.raises(ValueError, match="batch_tokens: expected a positive integer, got 0"):
        ranker.rank_many(["q"], [["a"]], batch_tokens=0)


# What the model is asked for

LAYOUT = BlockLayout.from_lengths([(4, [7, 2], 6), (3, [6], 5)])
TOKENS = torch.randint(3, 400, (LAYOUT.num_tokens,), generator=torch.Generator().manual_seed(0))
GROUPS = [torch.tensor([2, 9, 18, 17]), torch.tensor([11, 12]), torch.tensor([24, 32, 28])]


def masses(family: str, request: MassRequest) -> tuple[torch.Tensor, ...]:
    model = family_model(family)
    attach(model)
    with torch.no_grad():
        return model(**model_inputs(TOKENS, LAYOUT, scores=request)).attentions


@pytest.mark.parametrize("family", ["llama", "gemma2", "phi3"])
def test_masses_of_rows_in_every_kind_of_segment(family: str) -> None:
    """Rows of the prefix, documents and tails, on a layer's own masked probabilities."""
    stock = family_model(family)
    stock.set_attn_implementation("eager")
    mask = torch.where(LAYOUT.dense_mask(), 0.0, torch.finfo(torch.float32).min)[None, None]
    by_type = {"full_attention": mask, "sliding_attention": mask} if family == "gemma2" else mask
    with torch.no_grad():
        probabilities = stock(
            TOKENS[None], attention_mask=by_type, position_ids=LAYOUT.position_ids()[None], output_attentions=True
        ).attentions
    owners = torch.arange(LAYOUT.num_tokens) >= 19
    expected = torch.zeros(2, 3, 4, LAYOUT.num_tokens)
    for place, layer in enumerate((0, 2)):
        for group, rows in enumerate(GROUPS):
            for of_list in (rows[~owners[rows]], rows[owners[rows]]):
                if len(of_list):
                    expected[place, group] += probabilities[layer][0][:, of_list].mean(dim=1)
    together, apart, three, one = (
        masses(family, MassRequest([2, 0], GROUPS, **options))
        for options in (
            {},
            {"per_head": True},
            {"heads": {0: [3, 0, 1], 2: [2, 0, 3]}},
            {"heads": {0: [1], 2: [2, 0]}, "per_head": True},
        )
    )
    for place in range(2):
        assert together[place].dtype == torch.float32
        torch.testing.assert_close(together[place], expected[place].sum(dim=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(apart[place], expected[place], atol=1e-5, rtol=0)
        chosen = expected[place][:, [[3, 0, 1], [2, 0, 3]][place]]
        torch.testing.assert_close(three[place], chosen.sum(dim=1), atol=1e-5, rtol=0)
        torch.testing.assert_close(one[place], expected[place][:, [[1], [2, 0]][place]], atol=1e-5, rtol=0)


def test_masses_carry_gradients() -> None:
    model = family_model("llama")
    attach(model)
    inputs = model_inputs(TOKENS, LAYOUT, scores=MassRequest([1], GROUPS, heads={1: [2]}))
    model(**inputs).attentions[0][:, 0].sum().backward()
    gradient = model.model.layers[1].self_attn.q_proj.weight.grad.unflatten(0, (4, 16)).abs().amax(dim=(1, 2))
    assert [bool(value) for value in gradient] == [False, False, True, False]


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (([], GROUPS), {}, "layers: expected at least one index"),
        (([-1], GROUPS), {}, "layers: expected at least one index"),
        (([0], []), {}, "row_groups: expected at least one group"),
        (([0], [torch.zeros(1, 1, dtype=torch.int64)]), {}, "rows: expected one dimension"),
        (([0], [*GROUPS, torch.tensor([0.5])]), {}, "rows: expected integers"),
        (([0, 1], GROUPS), {"heads": {0: [1]}}, r"heads: expected some for each of the layers \[0, 1\]"),
        (([0], GROUPS), {"heads": {0: []}}, "heads: expected some for each"),
        (([0], GROUPS), {"heads": {0: [4]}}, r"heads: expected indices in \[0, 4\), got \[4\] for layer 0"),
        (([0], GROUPS), {"heads": {0: [-1]}}, "heads: expected indices"),
        (([0], [*GROUPS, torch.tensor([33])]), {}, r"scores: expected rows in \[0, 33\), got \[33\]"),
        (([4], GROUPS), {}, "block_scores: expected layers below 4"),
    ],
)
def test_unfit_mass_requests_are_refused(arguments: Any, options: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        masses("llama", MassRequest(*arguments, **options))
