"""Training: the losses against golden values, the collator against inference, and the joint loss end to end."""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path

import pytest
import torch

import rankernel
from rankernel.corpus import bm25_candidates, load_stdlib
from rankernel.rerankers import COMPACT, BlockRank
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.prompts import build_blocks
from rankernel.training import (
    RankingBatch,
    RankingCollator,
    RankingExample,
    answer_loss,
    attention_contrastive_loss,
    document_scores_from_logsumexp,
    joint_loss,
)
from tiny_ranker import tiny_model, tiny_tokenizer

SETTINGS = BlockRankSettings(layer=1, prompt=COMPACT, max_document_tokens=32, tail_offset=128)
EXAMPLES = [
    RankingExample("copy a file", ["copy the file", "read a socket", "", "path of a file"], [3]),
    RankingExample("socket", ["read a socket", "the query"], [0, 1]),
]


@pytest.fixture
def batch() -> RankingBatch:
    return RankingCollator(tiny_tokenizer(), SETTINGS)(EXAMPLES)


class TestContrastiveLoss:
    # METHODS.md, appendix A, `blockrank_infonce_tau0.05`: documents 1 and 3 are relevant.
    scores = torch.tensor([[0.1, 0.3, 0.05, 0.35, 0.2]], dtype=torch.float64)
    positives = torch.tensor([[False, True, False, True, False]])
    loss = 0.04223080369929999
    gradient = (
        0.09444286621261949,
        -0.22242264836313974,
        0.034743588844927745,
        -0.6046074432832604,
        0.6978436365888475,
    )

    def test_golden_value_and_gradient(self) -> None:
        scores = self.scores.clone().requires_grad_()
        loss = attention_contrastive_loss(scores, self.positives, torch.ones_like(self.positives))
        loss.backward()
        torch.testing.assert_close(loss.item(), self.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(scores.grad[0].tolist(), list(self.gradient), rtol=1e-12, atol=1e-14)

    def test_padding_and_lists_without_a_positive_change_nothing(self) -> None:
        scores = torch.full((3, 7), float("nan"), dtype=torch.float64)
        scores[0, :5], scores[1, :2] = self.scores[0], 0.5
        scores.requires_grad_()
        positives, present = torch.zeros(3, 7, dtype=torch.bool), torch.zeros(3, 7, dtype=torch.bool)
        positives[0, :5], present[0, :5], present[1, :2] = self.positives[0], True, True
        loss = attention_contrastive_loss(scores, positives, present)
        loss.backward()
        torch.testing.assert_close(loss.item(), self.loss, rtol=1e-12, atol=0)
        torch.testing.assert_close(scores.grad[0, :5].tolist(), list(self.gradient), rtol=1e-12, atol=1e-14)
        assert not scores.grad[0, 5:].any()
        assert not scores.grad[1:].any()

    def test_no_positive_at_all(self) -> None:
        scores = torch.rand(2, 3, requires_grad=True)
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        loss = attention_contrastive_loss(scores, nothing, ~nothing)
        loss.backward()
        assert loss.item() == 0
        assert not scores.grad.any()

    def test_wrong_arguments(self) -> None:
        present = torch.ones_like(self.positives)
        with pytest.raises(ValueError, match="one shape"):
            attention_contrastive_loss(self.scores, self.positives[:, :4], present)
        with pytest.raises(ValueError, match="temperature"):
            attention_contrastive_loss(self.scores, self.positives, present, temperature=0.0)
        with pytest.raises(ValueError, match="present"):
            attention_contrastive_loss(self.scores, self.positives, ~present)


def test_document_scores_are_the_mean_share_of_heads_and_rows() -> None:
    logsumexp = torch.randn(4, 3, 5, dtype=torch.float64)
    logsumexp[2:, :, 3:] = float("-inf")
    scores = document_scores_from_logsumexp(logsumexp, 2)
    torch.testing.assert_close(scores[0], logsumexp[:2].exp().div(logsumexp[:2].exp().sum(-1, True)).mean((0, 1)))
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert not scores[1, 3:].any()


class TestCollator:
    def test_blocks_are_those_of_inference_with_the_answer_behind(self, batch: RankingBatch) -> None:
        tokenizer = tiny_tokenizer()
        start = 0
        for row, (example, (prefix, documents, tail)) in enumerate(zip(EXAMPLES, batch.layout.lengths, strict=True)):
            blocks = build_blocks(tokenizer, COMPACT, example.query, example.documents, 32)
            answer = tokenizer(f"{example.positives[0]}]")["input_ids"]
            assert (prefix, list(documents)) == blocks.lengths[:2]
            assert tail == blocks.lengths[2] + len(answer)
            end = start + len(blocks.input_ids)
            assert batch.input_ids[start : end + len(answer)].tolist() == blocks.input_ids + answer
            rows = batch.signal_rows[row * COMPACT.signal_tokens : (row + 1) * COMPACT.signal_tokens]
            assert rows.tolist() == list(range(end - COMPACT.signal_tokens, end))
            start = end + len(answer)
        assert start == batch.layout.num_tokens == batch.input_ids.numel()

    def test_every_answer_row_is_followed_by_its_token(self, batch: RankingBatch) -> None:
        assert batch.input_ids[batch.answer_rows + 1].tolist() == batch.answer_ids.tolist()
        assert tiny_tokenizer().decode(batch.answer_ids) == "3]0]"

    def test_labels(self, batch: RankingBatch) -> None:
        assert batch.positives.tolist() == [[False, False, False, True], [True, True, False, False]]
        assert batch.present.tolist() == [[True] * 4, [True, True, False, False]]

    def test_documents_are_truncated(self) -> None:
        settings = BlockRankSettings(layer=1, prompt=COMPACT, max_document_tokens=5, tail_offset=128)
        batch = RankingCollator(tiny_tokenizer(), settings)([RankingExample("a", ["read " * 50, "a"], [0])])
        assert batch.layout.lengths[0][1][0] == 5

    def test_a_list_without_a_positive_has_no_answer(self) -> None:
        batch = RankingCollator(tiny_tokenizer(), SETTINGS)([RankingExample("a", ["b", "c"], [])])
        assert batch.answer_rows.numel() == batch.answer_ids.numel() == 0
        assert not batch.positives.any()

    def test_a_positive_outside_the_list(self) -> None:
        with pytest.raises(ValueError, match=r"examples\[0\]\.positives"):
            RankingCollator(tiny_tokenizer(), SETTINGS)([RankingExample("a", ["b", "c"], [2])])

    def test_moving_keeps_everything(self, batch: RankingBatch) -> None:
        moved = batch.to("cpu")
        assert moved.layout.lengths == batch.layout.lengths
        assert all(torch.equal(getattr(moved, name), t) for name, t in vars(batch).items() if torch.is_tensor(t))


class TestJointLoss:
    def test_scores_are_those_of_the_reranker(self, batch: RankingBatch) -> None:
        model = tiny_model()
        ranker = BlockRank(model, tiny_tokenizer(), **vars(SETTINGS))
        scores = joint_loss(model, batch, SETTINGS).scores
        expected = ranker.score_lists([(example.query, example.documents) for example in EXAMPLES])
        for row, (listed, *_) in zip(scores.tolist(), expected, strict=True):
            assert row[: len(listed)] == pytest.approx(listed, abs=1e-6)

    def test_parts_add_up(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        result = joint_loss(model, batch, SETTINGS, weight=0.5, temperature=0.1)
        contrastive = attention_contrastive_loss(result.scores, batch.positives, batch.present, 0.1)
        assert result.contrastive.item() == pytest.approx(contrastive.item())
        assert result.total.item() == pytest.approx(result.language_model.item() + 0.5 * contrastive.item())

    def test_answer_loss_is_that_of_the_whole_row(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        inputs = rankernel.model_inputs(batch.input_ids, batch.layout, tail_offset=SETTINGS.tail_offset)
        hidden = model.model(**inputs).last_hidden_state[0]
        log_probabilities = model.lm_head(hidden).log_softmax(dim=-1)
        expected = -log_probabilities[batch.answer_rows, batch.answer_ids].mean()
        assert answer_loss(model, hidden, batch).item() == pytest.approx(expected.item(), rel=1e-5)

    def test_gradient_against_finite_differences(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        weight = model.model.layers[0].self_attn.k_proj.weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        result = joint_loss(model, batch, SETTINGS, weight=2.0)
        result.total.backward()
        losses = []
        for step in (1e-3, -1e-3):
            shifted = copy.deepcopy(model)
            with torch.no_grad():
                shifted.model.layers[0].self_attn.k_proj.weight.add_(step * direction)
                losses.append(joint_loss(shifted, batch, SETTINGS, weight=2.0).total.item())
        assert (weight.grad * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2)

    def test_training_learns_a_batch(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        first = joint_loss(model, batch, SETTINGS, weight=1.0)
        for _ in range(20):
            optimizer.zero_grad()
            result = joint_loss(model, batch, SETTINGS, weight=1.0)
            result.total.backward()
            optimizer.step()
        assert result.contrastive < 0.5 * first.contrastive
        assert result.language_model < 0.5 * first.language_model


def test_the_bundled_ranker_orders_real_documents() -> None:
    """Mean reciprocal rank on 40 validation queries, BM25's candidates given in a shuffled order."""
    directory = Path(rankernel.__file__).parent / "assets" / "ranker"
    ranker = BlockRank.from_pretrained(directory, dtype=torch.float32)
    pool = load_stdlib("validation")
    queries = dict(list(pool.queries.items())[:40])
    generator = random.Random(0)
    given, ranked = 0.0, 0.0
    for query_id, found in bm25_candidates(queries, pool.documents).items():
        ids = generator.sample(found.document_ids, len(found.document_ids))
        result = ranker.rank(queries[query_id], [pool.documents[d] for d in ids], document_ids=ids)
        order = [document.document_id for document in result]
        given += _reciprocal_rank(ids, pool.qrels[query_id])
        ranked += _reciprocal_rank(order, pool.qrels[query_id])
    assert ranked > 2 * given
    assert (directory / "model.safetensors").stat().st_size <= 8 * 2**20


def _reciprocal_rank(ids: list[str | None], grades: dict[str, int]) -> float:
    return 1 / next((rank for rank, document in enumerate(ids, start=1) if document in grades), math.inf)
