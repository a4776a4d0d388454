from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankernel import models
from rankernel.demo import StockBlockRank, additive_mask
from rankernel.layout import BlockLayout
from rankernel.rerankers import BLOCKRANK, BLOCKRANK_QUERY_FREE, COMPACT, BlockPrompt, BlockRank, Ranking, Reranker
from rankernel.rerankers.blockrank import BlockRankSettings, relevance, with_rank_prior
from rankernel.rerankers.prompts import build_blocks
from tiny_ranker import save_tiny_ranker, tiny_model, tiny_tokenizer

DOCUMENTS = ["open a file and read it", "", "a much longer text about the path of a file " * 3, "read", "x"]
UNNUMBERED = BlockPrompt(prefix="Query: {query}\n", document=" {text}", tail="\nQuery: {query}", answer=": [")


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def ranker(tokenizer):
    return BlockRank(tiny_model(), tokenizer, layer=1, prompt=COMPACT, max_document_tokens=30)


def scores_of(ranking: Ranking) -> list[float]:
    """In the order of the documents."""
    return [row.score for row in sorted(ranking, key=lambda row: row.index)]


# Prompts


def test_blocks_are_the_parts_of_the_published_prompt(tokenizer):
    blocks = build_blocks(tokenizer, BLOCKRANK, "how?", ["first", "second {text}"])
    layout = BlockLayout.from_lengths([blocks.lengths])
    texts = [tokenizer.decode(blocks.input_ids[begin:end]) for begin, end, _ in layout.segments()[0]]
    assert texts[0].endswith("\nQuery: how?\n\nDocuments:")
    assert texts[1] == "\nID: 0 | CONTENT: first | END ID: 0"
    assert texts[2] == "\nID: 1 | CONTENT: second {text} | END ID: 1"
    assert texts[3].startswith("\n====== Now let's start! ======\nWhich document is most relevant")
    assert texts[3].endswith("\nThe following document(s) can help answer the query:Final Answer: [")
    assert blocks.truncated == [False, False]


def test_query_free_prefix_has_nothing_of_the_query(tokenizer):
    one = build_blocks(tokenizer, BLOCKRANK_QUERY_FREE, "zebra", DOCUMENTS)
    other = build_blocks(tokenizer, BLOCKRANK_QUERY_FREE, "something else", DOCUMENTS)
    before_tail = one.lengths[0] + sum(one.lengths[1])
    assert one.input_ids[:before_tail] == other.input_ids[:before_tail]
    assert "zebra" in tokenizer.decode(one.input_ids[before_tail:])


def test_a_block_does_not_depend_on_its_neighbours(tokenizer):
    alone = build_blocks(tokenizer, UNNUMBERED, "q", ["the file"])
    among = build_blocks(tokenizer, UNNUMBERED, "q", ["e", "the file", "th"])
    begin = among.lengths[0] + among.lengths[1][0]
    assert (
        among.input_ids[begin : begin + among.lengths[1][1]]
        == alone.input_ids[alone.lengths[0] :][: alone.lengths[1][0]]
    )


def test_chat_template_goes_around_the_blocks():
    tokenizer = tiny_tokenizer(chat=True)
    blocks = build_blocks(tokenizer, COMPACT, "how?", ["one"])
    layout = BlockLayout.from_lengths([blocks.lengths])
    texts = [tokenizer.decode(blocks.input_ids[begin:end]) for begin, end, _ in layout.segments()[0]]
    assert texts == ["<user>Query: how?\nDocuments:", "\n[0] one", "\nQuery: how?\nAnswer: </s><assistant>["]
    without_answer = build_blocks(tokenizer, replace(COMPACT, answer=""), "how?", ["one"])
    assert tokenizer.decode(without_answer.input_ids).endswith("Answer: </s><assistant>")


def test_chat_template_that_loses_the_turn_is_refused():
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{% if m.role == 'assistant' %}{{ m.content }}{% endif %}{% endfor %}"
    )
    with pytest.raises(ValueError, match="chat template"):
        build_blocks(tokenizer, COMPACT, "how?", ["one"])


def test_long_documents_lose_the_end_of_their_text(tokenizer):
    closed = replace(COMPACT, document="\n[{index}] {text} [end of {index}]")
    for ending, prompt in (("", COMPACT), (" [end of 2]", closed)):
        whole = build_blocks(tokenizer, prompt, "q", DOCUMENTS)
        cut = build_blocks(tokenizer, prompt, "q", DOCUMENTS, max_document_tokens=20)
        assert cut.truncated == [length > 20 for length in whole.lengths[1]]
        assert cut.truncated[2]
        assert cut.lengths[1] == [min(length, 20) for length in whole.lengths[1]]
        begin, cut_begin = whole.lengths[0] + sum(whole.lengths[1][:2]), cut.lengths[0] + sum(cut.lengths[1][:2])
        end = tokenizer(ending, add_special_tokens=False)["input_ids"] if ending else []
        expected = whole.input_ids[begin : begin + 20 - len(end)] + end
        assert cut.input_ids[cut_begin : cut_begin + 20] == expected
    shortest = build_blocks(tokenizer, closed, "q", DOCUMENTS, max_document_tokens=1)
    assert shortest.lengths[1] == [1] * len(DOCUMENTS)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"document": "no text"}, "document: expected a template with {text}"),
        ({"document": "{text} {query}"}, r"document: expected no fields but \['index', 'text'\], got \['query'\]"),
        ({"prefix": "{}"}, "prefix: expected no fields"),
        ({"tail": "{query"}, "tail: expected a template"),
        ({"signal_tokens": 0}, "signal_tokens: expected a positive integer"),
    ],
)
def test_unfit_prompts_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(COMPACT, **change)


def test_unfit_texts_are_refused(tokenizer):
    with pytest.raises(TypeError, match="query: expected a string, got NoneType"):
        build_blocks(tokenizer, COMPACT, None, [])
    with pytest.raises(TypeError, match=r"documents\[1\]: expected a string, got int"):
        build_blocks(tokenizer, COMPACT, "q", ["a", 3])
    with pytest.raises(TypeError, match="documents: expected a sequence of strings, got a string"):
        build_blocks(tokenizer, COMPACT, "q", "one text")
    with pytest.raises(ValueError, match="max_document_tokens: expected a positive integer, got 0"):
        build_blocks(tokenizer, COMPACT, "q", ["a"], 0)
    with pytest.raises(ValueError, match="signal_tokens: expected at most 1, the tail, got 2"):
        build_blocks(tokenizer, BlockPrompt("p", "{text}", "", "["), "q", ["a"])


# Scores


def test_relevance_is_the_share_of_attention_over_document_tokens():
    generator = torch.Generator().manual_seed(0)
    lengths = [[3, 1, 5], [2, 4]]
    logits = [torch.randn(2, 4, sum(documents), generator=generator, dtype=torch.float64) for documents in lengths]
    logsumexp = torch.full((4, 4, 3), -math.inf, dtype=torch.float64)
    expected = torch.zeros(2, 3, dtype=torch.float64)
    for index, (documents, of_list) in enumerate(zip(lengths, logits, strict=True)):
        shares = of_list.softmax(dim=-1).mean(dim=(0, 1))
        for document, (part, share) in enumerate(
            zip(of_list.split(documents, dim=-1), shares.split(documents), strict=True)
        ):
            logsumexp[2 * index : 2 * index + 2, :, document] = part.logsumexp(dim=-1)
            expected[index, document] = share.sum()
    torch.testing.assert_close(relevance(logsumexp, 2), expected)


def test_relevance_of_nothing_is_zero_with_zero_gradient():
    logsumexp = torch.full((2, 4, 3), -math.inf, requires_grad=True)
    scores = relevance(logsumexp, 1)
    assert scores.tolist() == [[0.0, 0.0, 0.0]]
    scores.sum().backward()
    assert logsumexp.grad is not None
    assert not logsumexp.grad.isnan().any()


@pytest.mark.parametrize(
    ("pattern", "scheme"), [("block", "shared"), ("block", "sequential"), ("causal", "sequential")]
)
@pytest.mark.parametrize(
    "prompt", [BLOCKRANK, BLOCKRANK_QUERY_FREE, COMPACT], ids=["published", "query_free", "compact"]
)
@pytest.mark.parametrize("chat", [False, True], ids=["plain", "chat"])
def test_scores_are_those_of_stock_attention_with_a_dense_mask(prompt, pattern, scheme, chat):
    settings = {"prompt": prompt, "max_document_tokens": 60, "position_scheme": scheme, "pattern": pattern}
    ranker = BlockRank(tiny_model(), tiny_tokenizer(chat), layer=1, **settings)
    ours = scores_of(ranker.rank("how to read a file", DOCUMENTS))
    stock = StockBlockRank(ranker, all_layers=False)("how to read a file", DOCUMENTS)
    np.testing.assert_allclose(ours, stock, rtol=0, atol=2e-6)
    assert sum(ours) == pytest.approx(1, abs=1e-5)
    assert max(ours) > 1.2 * min(ours)


@pytest.mark.parametrize("pattern", ["block", "causal"])
@pytest.mark.parametrize("lengths", [(3, [2, 0, 5, 1], 4), (0, [3], 2), (5, [], 0), (2, [1, 1], 0)])
def test_stock_mask_is_the_dense_mask_of_the_layout(lengths, pattern):
    layout = BlockLayout.from_lengths([lengths], pattern)
    mask = additive_mask(layout, torch.float32)[0, 0]
    assert torch.equal(mask == 0, layout.dense_mask())
    assert (mask[mask != 0] == torch.finfo(torch.float32).min).all()


def test_nothing_after_the_scoring_layer_s_keys_and_queries_counts(tokenizer):
    model = tiny_model()
    expected = scores_of(BlockRank(model, tokenizer, layer=1, prompt=COMPACT).rank("q", DOCUMENTS))
    scoring = model.model.layers[1]
    with torch.no_grad():
        for module in (scoring.self_attn.v_proj, scoring.self_attn.o_proj, scoring.mlp, model.model.layers[2]):
            for parameter in module.parameters():
                parameter.fill_(math.nan)
    assert scores_of(BlockRank(model, tokenizer, layer=1, prompt=COMPACT).rank("q", DOCUMENTS)) == expected


def test_order_of_the_documents_does_not_change_their_scores(tokenizer):
    ranker = BlockRank(tiny_model(), tokenizer, layer=2, prompt=UNNUMBERED)
    order = [3, 0, 4, 1, 2]
    shuffled = scores_of(ranker.rank("q", [DOCUMENTS[index] for index in order]))
    straight = scores_of(ranker.rank("q", DOCUMENTS))
    np.testing.assert_allclose(shuffled, [straight[index] for index in order], atol=2e-6)


def test_rank_prior_weighs_the_shares_by_the_given_order(tokenizer):
    plain = BlockRank(tiny_model(), tokenizer, layer=1, prompt=COMPACT)
    expected = np.array(scores_of(plain.rank("q", DOCUMENTS)))
    expected /= np.arange(1, len(DOCUMENTS) + 1) ** 1.5
    expected /= expected.sum()
    with_prior = BlockRank(tiny_model(), tokenizer, layer=1, prompt=COMPACT, rank_prior=1.5)
    (found,) = with_prior.score_lists([("q", DOCUMENTS)])
    np.testing.assert_allclose(found.scores, expected, rtol=1e-5)
    np.testing.assert_allclose(found.scores, [np.mean(list(parts.values())) for parts in found.parts], rtol=1e-6)
    assert with_rank_prior(torch.zeros(1, 2, 3), 1.5).tolist() == [[[0.0] * 3] * 2]


def test_query_in_the_prefix_changes_what_documents_are(tokenizer):
    model = tiny_model()
    scores = [
        scores_of(BlockRank(model, tokenizer, layer=1, prompt=prompt).rank("how to", DOCUMENTS))
        for prompt in (BLOCKRANK, BLOCKRANK_QUERY_FREE)
    ]
    assert not np.allclose(*scores, atol=1e-4)


def test_scores_that_are_not_finite_are_refused(tokenizer):
    model = tiny_model()
    with torch.no_grad():
        model.model.embed_tokens.weight.fill_(math.inf)
    with pytest.raises(FloatingPointError, match="layer 1 are not finite"):
        BlockRank(model, tokenizer, layer=1, prompt=COMPACT).rank("q", ["a", "b"])


# Rankings


def test_ranking_is_sorted_and_says_what_was_cut(ranker):
    ranking = ranker.rank("how to read a file", DOCUMENTS, document_ids=list("abcde"))
    assert [row.rank for row in ranking] == [1, 2, 3, 4, 5]
    assert [row.score for row in ranking] == sorted((row.score for row in ranking), reverse=True)
    assert sorted(row.index for row in ranking) == [0, 1, 2, 3, 4]
    assert all(row.document_id == "abcde"[row.index] for row in ranking)
    assert [row.index for row in ranking if row.truncated] == [2]
    assert "c  (truncated)" in repr(ranking)
    assert isinstance(ranker, Reranker)


def test_top_k_keeps_the_best(ranker):
    whole = ranker.rank("q", DOCUMENTS)
    assert list(ranker.rank("q", DOCUMENTS, 2)) == list(whole[:2])
    assert list(ranker.rank("q", DOCUMENTS, top_k=99)) == list(whole)
    assert len(ranker.rank("q", DOCUMENTS, top_k=0)) == 0


def test_equal_scores_keep_the_first_stage_order():
    ranking = Ranking.from_scores("q", [0.2, 0.5, 0.2, 0.5, 0.2], [False] * 5)
    assert [row.index for row in ranking] == [1, 3, 0, 2, 4]


def test_documents_without_tokens_score_nothing(tokenizer):
    bare = BlockPrompt(prefix="{query}", document="{text}", tail="{query}", answer=" [")
    ranker = BlockRank(tiny_model(), tokenizer, layer=1, prompt=bare)
    assert scores_of(ranker.rank("q", ["", "a", ""]))[::2] == [0.0, 0.0]
    assert [(row.index, row.score) for row in ranker.rank("q", ["", ""])] == [(0, 0.0), (1, 0.0)]


def test_no_documents_give_an_empty_ranking(ranker):
    assert list(ranker.rank("q", [])) == []
    assert repr(ranker.rank("q", [])) == "Ranking('q', 0 documents)"
    assert ranker.rank_many([], []) == []


@pytest.mark.parametrize("batch_tokens", [1, 100, 10**6])
def test_lists_in_one_row_do_not_meet(ranker, batch_tokens):
    queries = ["how to read", "", "path", "the path of a file", "q"]
    lists = [DOCUMENTS, [], ["a"], DOCUMENTS[::-1], ["", "b " * 50]]
    packed = ranker.rank_many(queries, lists, batch_tokens=batch_tokens)
    for query, documents, ranking in zip(queries, lists, packed, strict=True):
        assert ranking.query == query
        np.testing.assert_allclose(scores_of(ranking), scores_of(ranker.rank(query, documents)), atol=2e-6)


@settings(max_examples=15)
@given(
    st.lists(st.tuples(st.text(max_size=12), st.lists(st.text(max_size=30), max_size=6)), max_size=5),
    st.integers(1, 400),
)
def test_any_texts_and_packing(ranker, lists, batch_tokens):
    scored = list(ranker.score_lists(lists, batch_tokens=batch_tokens))
    assert [len(found.scores) for found in scored] == [len(documents) for _, documents in lists]
    for (query, documents), (scores, truncated, _) in zip(lists, scored, strict=True):
        ranking = ranker.rank(query, documents)
        np.testing.assert_allclose(scores, scores_of(ranking), atol=2e-6)
        assert truncated == [row.truncated for row in sorted(ranking, key=lambda row: row.index)]


def test_lists_are_read_only_as_far_as_needed(ranker):
    def lists():
        yield "q", DOCUMENTS
        yield "q", DOCUMENTS
        raise AssertionError("read too far")

    scored = ranker.score_lists(lists(), batch_tokens=1)
    assert len(next(scored).scores) == len(DOCUMENTS)


def test_same_call_same_bits(ranker):
    assert ranker.rank("how", DOCUMENTS) == ranker.rank("how", DOCUMENTS)


def test_predict_scores_pairs_in_the_order_given(ranker):
    pairs = [("a", "one"), ("b", "x"), ("a", "two"), ("b", "y"), ("a", "three"), ("c", "alone")]
    scores = ranker.predict(pairs)
    assert scores.dtype == np.float32
    np.testing.assert_allclose(scores[[0, 2, 4]], scores_of(ranker.rank("a", ["one", "two", "three"])), atol=2e-6)
    np.testing.assert_allclose(scores[[1, 3]], scores_of(ranker.rank("b", ["x", "y"])), atol=2e-6)
    assert scores[5] == pytest.approx(1)
    assert ranker.predict([]).shape == (0,)
    assert ranker.predict(("a", "b")) == pytest.approx(1)
    assert np.shape(ranker.predict(["a", "b"])) == ()


def test_unfit_arguments_are_refused(ranker, tokenizer):
    with pytest.raises(ValueError, match="documents: expected one list for each of 2 queries, got 1"):
        ranker.rank_many(["a", "b"], [["x"]])
    with pytest.raises(ValueError, match="document_ids: expected one for every document"):
        ranker.rank("a", ["x"], document_ids=["1", "2"])
    with pytest.raises(ValueError, match="top_k: expected 0 or more, got -1"):
        ranker.rank("a", ["x"], top_k=-1)
    with pytest.raises(ValueError, match="batch_tokens: expected a positive integer, got 0"):
        ranker.rank_many(["a"], [["x"]], batch_tokens=0)
    with pytest.raises(ValueError, match="layer: expected one of the model's 3, 0 to 2, got 3"):
        BlockRank(tiny_model(), tokenizer, layer=3)
    with pytest.raises(ValueError, match="position_scheme: expected"):
        BlockRank(tiny_model(), tokenizer, layer=1, position_scheme="none")
    with pytest.raises(ValueError, match="pattern: expected 'block' or 'causal', got 'dense'"):
        BlockRank(tiny_model(), tokenizer, layer=1, pattern="dense")
    with pytest.raises(ValueError, match="rank_prior: expected a finite number of at least 0, got -1"):
        BlockRank(tiny_model(), tokenizer, layer=1, rank_prior=-1)


def test_a_query_too_long_for_the_positions_is_named(tokenizer):
    ranker = BlockRank(tiny_model(), tokenizer, layer=1, prompt=COMPACT, tail_offset=64)
    with pytest.raises(ValueError, match=r"tail_offset=64 tokens together, got \d+ for 'zzz"):
        ranker.rank("z" * 100, ["a"])


# Loading


def test_settings_come_from_the_model_directory(tmp_path, ranker):
    directory = save_tiny_ranker(tmp_path)
    loaded = BlockRank.from_pretrained(directory)
    assert loaded.settings == BlockRankSettings(1, COMPACT, 48, 256)
    changed = BlockRank.from_pretrained(
        str(directory), layer=2, max_document_tokens=30, rank_prior=2.0, dtype=torch.float64
    )
    assert changed.settings == BlockRankSettings(2, COMPACT, 30, 256, rank_prior=2.0)
    assert changed.model.dtype == torch.float64
    again = BlockRank.from_pretrained(loaded.model, max_document_tokens=30, tail_offset=16384)
    np.testing.assert_allclose(
        scores_of(again.rank("how", DOCUMENTS)), scores_of(ranker.rank("how", DOCUMENTS)), atol=2e-6
    )


def test_loaded_model_is_attached_and_can_be_detached(tokenizer):
    model = tiny_model()
    ranker = BlockRank.from_pretrained(model, layer=1, tokenizer=tokenizer)
    assert ranker.model is model
    assert model.config._attn_implementation == "rankernel"
    models.detach(model)
    assert model.config._attn_implementation == "sdpa"
    with pytest.raises(ValueError, match="attach"):
        ranker.rank("q", ["a"])


def test_layer_has_to_come_from_somewhere(tmp_path, tokenizer):
    directory = save_tiny_ranker(tmp_path)
    (directory / "rankernel.json").unlink()
    with pytest.raises(ValueError, match=r"layer: expected the index .* has no rankernel.json"):
        BlockRank.from_pretrained(directory)
    with pytest.raises(ValueError, match="layer: expected the index"):
        BlockRank.from_pretrained(tiny_model(), tokenizer=tokenizer)
    with pytest.raises(ValueError, match="tokenizer: expected one"):
        BlockRank.from_pretrained(tiny_model(), layer=1)
    assert BlockRank.from_pretrained(directory, layer=1).settings == BlockRankSettings(1)


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "[]",
        json.dumps({"layer": 1}),
        json.dumps({"method": "first", "layer": 1}),
        json.dumps({"method": "blockrank"}),
        json.dumps({"method": "blockrank", "layer": 1, "depth": 3}),
        json.dumps({"method": "blockrank", "layer": 1, "prompt": {"prefix": "", "document": "", "tail": ""}}),
        json.dumps({"method": "blockrank", "layer": 1, "prompt": 3}),
    ],
)
def test_unfit_settings_name_the_file(tmp_path, content):
    path = tmp_path / "rankernel.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"rankernel\.json: "):
        BlockRankSettings.read(path)
