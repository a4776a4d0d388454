"""The bundled corpus: complete, free of leaks, and ranked the same on every run by the first stage."""

from __future__ import annotations

import builtins
from typing import Any, get_args

import pytest

from rankernel import corpus
from rankernel.corpus import Split, bm25_candidates, load_stdlib, split_identifiers

SPLITS = get_args(Split)


@pytest.mark.parametrize("split", SPLITS)
def test_every_query_has_relevant_documents_in_its_own_pool(split: Split) -> None:
    pool = load_stdlib(split)
    assert len(pool.documents) > 500
    assert len(pool.queries) > 300
    for query_id in pool.queries:
        assert pool.qrels[query_id]
        assert set(pool.qrels[query_id]) <= set(pool.documents)
        assert set(pool.qrels[query_id].values()) == {1}


@pytest.mark.parametrize("split", SPLITS)
def test_no_query_is_quoted_by_its_document(split: Split) -> None:
    pool = load_stdlib(split)
    for query_id, text in pool.queries.items():
        sentence = text.lower().rstrip(".!?")
        assert all(sentence not in pool.documents[document_id].lower() for document_id in pool.qrels[query_id])


def test_splits_share_nothing() -> None:
    pools = [load_stdlib(split) for split in SPLITS]
    for kind in ("documents", "queries"):
        texts = [text for pool in pools for text in getattr(pool, kind).values()]
        ids = [identifier for pool in pools for identifier in getattr(pool, kind)]
        assert len(set(texts)) == len(texts)
        assert len(set(ids)) == len(ids)


def test_the_licence_names_its_owner() -> None:
    text = (corpus.STDLIB_DIRECTORY / "LICENSE.txt").read_text(encoding="utf-8")
    assert "Python Software Foundation" in text
    assert "PYTHON SOFTWARE FOUNDATION LICENSE VERSION 2" in text


def test_unknown_split() -> None:
    with pytest.raises(ValueError, match="split must be one of"):
        load_stdlib("test")  # type: ignore[arg-type]


def test_identifiers_are_split() -> None:
    assert split_identifiers("os.makeDirs(exist_ok)") == "os.make Dirs(exist ok)"


DOCUMENTS = {"a": "shutil.copy_file(src)", "b": "read a socket", "c": "copy", "d": "nothing of the kind"}


class TestBM25:
    def test_parts_of_names_match(self) -> None:
        found = bm25_candidates({"q": "copyFile"}, DOCUMENTS)["q"]
        assert found.document_ids[:2] == ["a", "c"]
        assert found.scores == sorted(found.scores, reverse=True)

    def test_depth_cuts_the_same_ranking(self) -> None:
        pool = load_stdlib("validation")
        queries = dict(list(pool.queries.items())[:20])
        deep, shallow = (bm25_candidates(queries, pool.documents, depth=depth) for depth in (50, 7))
        for query_id in queries:
            assert deep[query_id].document_ids[:7] == shallow[query_id].document_ids
            assert len(deep[query_id].document_ids) == 50

    def test_equal_scores_keep_the_order_of_the_documents(self) -> None:
        found = bm25_candidates({"q": "unknown"}, DOCUMENTS)["q"]
        assert found.document_ids == list(DOCUMENTS)
        assert found.scores == [0.0] * 4

    @pytest.mark.parametrize("query", ["", "the", "?!"])
    def test_a_query_without_terms(self, query: str) -> None:
        assert bm25_candidates({"q": query}, DOCUMENTS)["q"].scores == [0.0] * 4

    def test_documents_without_terms(self) -> None:
        assert bm25_candidates({"q": "copy"}, {"a": "", "b": "the"})["q"].document_ids == ["a", "b"]

    def test_nothing_to_rank(self) -> None:
        assert bm25_candidates({}, DOCUMENTS) == {}
        assert bm25_candidates({"q": "copy"}, {})["q"].document_ids == []

    def test_depth_has_to_be_positive(self) -> None:
        with pytest.raises(ValueError, match="depth"):
            bm25_candidates({"q": "copy"}, DOCUMENTS, depth=0)

    def test_a_missing_package_is_named(self, monkeypatch: pytest.MonkeyPatch) -> None:
        real_import = builtins.__import__

        def without_bm25s(name: str, *args: Any, **kwargs: Any) -> Any:
            if name == "bm25s":
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", without_bm25s)
        with pytest.raises(ImportError, match=r'pip install "rankernel\[cli\]"'):
            bm25_candidates({"q": "copy"}, DOCUMENTS)

    def test_first_stage_is_neither_trivial_nor_hopeless(self) -> None:
        pool = load_stdlib("heldout")
        found = bm25_candidates(pool.queries, pool.documents)
        hits = [bool(set(found[q].document_ids) & set(pool.qrels[q])) for q in pool.queries]
        assert 0.7 < sum(hits) / len(hits) < 0.95
