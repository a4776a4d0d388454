"""Training: the losses against golden values, the collators against inference, and the joint losses end to end."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import rankernel
from rankernel.corpus import bm25_candidates, load_stdlib
from rankernel.rerankers import COMPACT, BlockRank
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.first import FirstSettings
from rankernel.rerankers.prompts import build_blocks
from rankernel.training import (
    FirstCollator,
    JointLoss,
    RankingBatch,
    RankingCollator,
    RankingExample,
    RankingObjective,
    TokenBudgetSampler,
    answer_loss,
    document_scores_from_logsumexp,
    first_loss,
    joint_loss,
    log_document_scores_from_logsumexp,
)
from test_first import prompt_text, prompt_tokenizer
from tiny_ranker import tiny_model, tiny_tokenizer

SETTINGS = BlockRankSettings(layer=1, prompt=COMPACT, max_document_tokens=32, tail_offset=128)
EXAMPLES = [
    RankingExample("copy a file", ["copy the file", "read a socket", "", "path of a file"], [0, 0, 0, 1]),
    RankingExample("socket", ["read a socket", "the query"], [1, 1]),
]


@pytest.fixture
def batch() -> RankingBatch:
    return RankingCollator(tiny_tokenizer(), SETTINGS)(EXAMPLES)


def objective_on(
    scores: torch.Tensor,
    labels: torch.Tensor,
    present: torch.Tensor | None = None,
    teacher: torch.Tensor | None = None,
    **given: Any,
) -> JointLoss:
    """The objective on scores [L, N], with a language-model loss of 2."""
    batch: Any = RankingBatch.__new__(RankingBatch)
    batch.present = torch.ones_like(labels, dtype=torch.bool) if present is None else present
    batch.teacher_scores = teacher
    return RankingObjective(**given)(torch.tensor(2.0), scores, labels.float(), batch)


class TestObjective:
    # METHODS.md, appendix A, `blockrank_infonce_tau0.05`: documents 1 and 3 are relevant.
    scores = torch.tensor([[0.1, 0.3, 0.05, 0.35, 0.2]], dtype=torch.float64)
    labels = torch.tensor([[0, 1, 0, 1, 0]])
    loss = 0.04223080369929999
    gradient = (
        0.09444286621261949,
        -0.22242264836313974,
        0.034743588844927745,
        -0.6046074432832604,
        0.6978436365888475,
    )

    def test_golden_value_and_gradient_of_the_default(self) -> None:
        scores = self.scores.clone().requires_grad_()
        loss = objective_on(scores, self.labels)
        loss.ranking.backward()
        assert loss.ranking.item() == pytest.approx(self.loss, rel=1e-12)
        assert loss.total.item() == pytest.approx(2 + 0.1 * self.loss, rel=1e-6)
        assert loss.teacher.item() == 0
        torch.testing.assert_close(scores.grad[0].tolist(), list(self.gradient), rtol=1e-12, atol=1e-14)

    def test_padding_and_lists_without_a_positive_change_nothing(self) -> None:
        scores = torch.full((3, 7), float("nan"), dtype=torch.float64)
        scores[0, :5], scores[1, :2] = self.scores[0], 0.5
        scores.requires_grad_()
        labels, present = torch.zeros(3, 7), torch.zeros(3, 7, dtype=torch.bool)
        labels[0, :5], present[0, :5], present[1, :2] = self.labels[0].float(), True, True
        loss = objective_on(scores, labels, present).ranking
        loss.backward()
        assert loss.item() == pytest.approx(self.loss, rel=1e-12)
        torch.testing.assert_close(scores.grad[0, :5].tolist(), list(self.gradient), rtol=1e-12, atol=1e-14)
        assert not scores.grad[0, 5:].any()
        assert not scores.grad[1:].any()

    def test_a_kind_has_no_second_temperature_unless_it_is_given(self) -> None:
        once = objective_on(self.scores, self.labels, temperature=0.5).ranking
        log_shares = objective_on(2 * self.scores, self.labels, score="log_share").ranking
        twice = objective_on(self.scores, self.labels, temperature=1.0, ranking_parameters={"temperature": 0.5}).ranking
        assert once.item() == pytest.approx(log_shares.item()) == pytest.approx(twice.item())

    def test_golden_weighted_ranknet_of_first(self) -> None:
        """METHODS.md, appendix A, `first_weighted_ranknet`."""
        scores = torch.tensor([[0.5, -0.2, 1.3, 0.0, 0.8]], dtype=torch.float64)
        loss = objective_on(scores, -torch.tensor([[2, 5, 1, 4, 3]]), **RankingObjective.FIRST)
        assert loss.ranking.item() == pytest.approx(0.0790103891197, rel=1e-10)
        assert loss.total.item() == pytest.approx(2 + 10 * 0.0790103891197, rel=1e-6)

    @pytest.mark.parametrize("kind", ["kl_distillation", "margin_mse", "soft_ranknet", "weighted_ranknet"])
    def test_distillation(self, kind: str) -> None:
        scores = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        teacher = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        present = torch.arange(6) < torch.tensor([[6], [4], [5]])
        labels = (torch.arange(6) == 1).expand(3, 6)
        loss = objective_on(
            scores, labels, present, teacher.masked_fill(~present, torch.nan), temperature=0.5, ranking_weight=0.0,
            language_model_weight=0.0, teacher_loss=kind, teacher_weight=3.0,
        )  # fmt: skip
        expected = torch.stack(
            [distilled(kind, s[p] / 0.5, t[p]) for s, t, p in zip(scores, teacher, present, strict=True)]
        ).mean()
        assert loss.teacher.item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss.total.item() == pytest.approx(3 * expected.item(), rel=1e-6)

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="temperature"):
            RankingObjective(temperature=0.0)
        with pytest.raises(ValueError, match="score"):
            RankingObjective(score="logit")
        with pytest.raises(ValueError, match="kind"):
            RankingObjective(ranking_loss="lambda")
        with pytest.raises(ValueError, match="sigma"):
            RankingObjective(ranking_parameters={"sigma": 1.0})
        with pytest.raises(ValueError, match="teacher_loss"):
            objective_on(self.scores, self.labels, teacher_loss="margin_mse")


def distilled(kind: str, scores: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """One list, by the formulas of METHODS.md sections 3.3, 6.6 and 8."""
    differences, wanted = scores[:, None] - scores, teacher[:, None] - teacher
    upper = torch.ones_like(wanted, dtype=torch.bool).triu(diagonal=1)
    if kind == "kl_distillation":
        target = (teacher / 2).softmax(0)
        return 4 * (target * (target.log() - (scores / 2).log_softmax(0))).sum()
    if kind == "margin_mse":
        return ((differences - wanted)[1, torch.arange(len(scores)) != 1] ** 2).mean()  # document 1 is relevant
    if kind == "soft_ranknet":
        return F.binary_cross_entropy_with_logits(differences[upper], wanted[upper].sigmoid())
    ranks = 1.0 + (teacher[:, None] < teacher).sum(dim=1)
    better = ranks[:, None] < ranks
    return (F.softplus(-differences) / (ranks[:, None] + ranks))[better].mean()


def test_document_scores_are_the_mean_share_of_heads_and_rows() -> None:
    logsumexp = torch.randn(4, 3, 5, dtype=torch.float64)
    logsumexp[2:, :, 3:] = float("-inf")
    scores = document_scores_from_logsumexp(logsumexp, 2)
    torch.testing.assert_close(scores[0], logsumexp[:2].exp().div(logsumexp[:2].exp().sum(-1, True)).mean((0, 1)))
    torch.testing.assert_close(scores.sum(dim=1), torch.ones(2, dtype=torch.float64))
    assert not scores[1, 3:].any()


def test_log_document_scores_do_not_round_to_zero() -> None:
    logsumexp = torch.randn(4, 3, 5, generator=torch.Generator().manual_seed(0))
    logsumexp[2:, :, 3:] = float("-inf")
    logsumexp[0, :, 2] = logsumexp[1, :, 2] = -500.0
    logsumexp.requires_grad_()
    scores = log_document_scores_from_logsumexp(logsumexp, 2)
    shares = document_scores_from_logsumexp(logsumexp.double(), 2)
    expected = shares.log()
    torch.testing.assert_close(scores[0], expected[0].float(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(scores[1, :3], expected[1, :3].float(), rtol=1e-5, atol=1e-5)
    assert document_scores_from_logsumexp(logsumexp, 2)[0, 2] == 0
    scores[0, 2].backward()
    assert logsumexp.grad[0, :, 2].sum() + logsumexp.grad[1, :, 2].sum() == pytest.approx(1, abs=1e-4)
    assert logsumexp.grad.isfinite().all()


class TestCollator:
    def test_blocks_are_those_of_inference_with_the_answer_behind(self, batch: RankingBatch) -> None:
        tokenizer = tiny_tokenizer()
        start = 0
        for row, (example, (prefix, documents, tail)) in enumerate(zip(EXAMPLES, batch.layout.lengths, strict=True)):
            blocks = build_blocks(tokenizer, COMPACT, example.query, example.documents, 32)
            answer = tokenizer(f"{[*example.labels].index(1)}]")["input_ids"]
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
        assert batch.labels.tolist() == [[0, 0, 0, 1], [1, 1, 0, 0]]
        assert batch.labels.dtype == torch.float32
        assert batch.teacher_scores is None
        assert batch.present.tolist() == [[True] * 4, [True, True, False, False]]

    def test_documents_are_truncated(self) -> None:
        settings = BlockRankSettings(layer=1, prompt=COMPACT, max_document_tokens=5, tail_offset=128)
        batch = RankingCollator(tiny_tokenizer(), settings)([RankingExample("a", ["read " * 50, "a"], [1, 0])])
        assert batch.layout.lengths[0][1][0] == 5

    def test_the_pattern_is_that_of_the_settings(self) -> None:
        settings = dataclasses.replace(SETTINGS, pattern="causal", position_scheme="sequential")
        assert RankingCollator(tiny_tokenizer(), settings)(EXAMPLES).layout.causal

    def test_the_answer_is_the_best_label(self) -> None:
        examples = [RankingExample("a", ["b", "c", "d"], [1, 3, 3]), RankingExample("a", ["b", "c"], [0, 0])]
        batch = RankingCollator(tiny_tokenizer(), SETTINGS)(examples)
        assert tiny_tokenizer().decode(batch.answer_ids) == "1]"
        assert batch.answer_weights.tolist() == [1, 1]

    def test_teacher_scores(self) -> None:
        taught = [dataclasses.replace(EXAMPLES[0], teacher_scores=[1, 2, 3, -4]), EXAMPLES[1]]
        with pytest.raises(ValueError, match="teacher_scores"):
            RankingCollator(tiny_tokenizer(), SETTINGS)(taught)
        taught[1] = dataclasses.replace(EXAMPLES[1], teacher_scores=[0.5, 0.25])
        batch = RankingCollator(tiny_tokenizer(), SETTINGS)(taught)
        assert batch.teacher_scores.tolist() == [[1, 2, 3, -4], [0.5, 0.25, 0, 0]]

    def test_numbers_that_are_not_one_per_document(self) -> None:
        with pytest.raises(ValueError, match=r"examples\[0\]\.labels: expected 2"):
            RankingCollator(tiny_tokenizer(), SETTINGS)([RankingExample("a", ["b", "c"], [1])])
        with pytest.raises(ValueError, match=r"examples\[0\]\.teacher_scores: expected 2"):
            RankingCollator(tiny_tokenizer(), SETTINGS)([RankingExample("a", ["b", "c"], [1, 0], [1, 2, 3])])

    def test_num_tokens(self, batch: RankingBatch) -> None:
        collator = RankingCollator(tiny_tokenizer(), SETTINGS)
        assert sum(map(collator.num_tokens, EXAMPLES)) == batch.layout.num_tokens

    def test_moving_keeps_everything(self, batch: RankingBatch) -> None:
        moved = batch.to("cpu")
        assert moved.layout.lengths == batch.layout.lengths
        assert all(torch.equal(getattr(moved, name), t) for name, t in vars(batch).items() if torch.is_tensor(t))


TAUGHT = [
    RankingExample("copy a {file}", ["copy [1] it", "read " * 50, ""], [0, 1, 0], [0.1, -2.0, 3.0]),
    RankingExample("socket", ["a", "b"], [0, 1], [1.0, 0.5]),
]


class TestFirstCollator:
    def test_prompt_and_completion(self) -> None:
        tokenizer = prompt_tokenizer(chat=True)
        batch = FirstCollator(tokenizer, FirstSettings(window=4, step=2, max_document_tokens=30))(TAUGHT)
        cut = tokenizer.decode(tokenizer("read " * 50)["input_ids"][:30])
        prompts = [
            prompt_text("copy a {file}", ["copy (1) it", cut, ""], True),
            prompt_text("socket", ["a", "b"], True),
        ]
        texts = [prompts[0] + "C] > [A] > [B]", prompts[1] + "A] > [B]"]
        ids = [tokenizer(text)["input_ids"] for text in texts]
        assert batch.input_ids.tolist() == ids[0] + ids[1]
        assert batch.layout.causal
        assert [sum(documents) + tail for _, documents, tail in batch.layout.lengths] == [len(row) for row in ids]
        assert batch.input_ids[batch.answer_rows + 1].tolist() == batch.answer_ids.tolist()
        assert tokenizer.decode(batch.answer_ids) == "[C] > [A] > [B][A] > [B]"
        assert tokenizer.decode(batch.input_ids[batch.signal_rows]) == "[["
        assert tokenizer.decode(batch.input_ids[batch.signal_rows + 1]) == "CA"
        assert batch.labels.tolist() == [[0, 1, 0], [0, 1, 0]]
        assert batch.present.tolist() == [[True] * 3, [True, True, False]]

    def test_labels_order_the_completion_where_there_is_no_teacher(self) -> None:
        example = RankingExample("a", ["b", "c", "d", "e"], [0, 2, 0, 1])
        batch = FirstCollator(prompt_tokenizer(), FirstSettings(window=4, step=2))([example])
        assert prompt_tokenizer().decode(batch.answer_ids) == "[B] > [D] > [A] > [C]"

    def test_importance_weights(self) -> None:
        """METHODS.md, appendix A, `fullrank_w_rank1..5`; the separator behind a rank counts 1."""
        tokenizer = prompt_tokenizer()
        collator = FirstCollator(tokenizer, FirstSettings(window=5, step=2), importance_weighted=True)
        batch = collator([RankingExample("q", ["a", "b", "c", "d", "e"], [5, 4, 3, 2, 1])])
        expected, rank = [], 0
        golden = [2.0, 1.6309297535714575, 1.5, 1.4306765580733931, 1.3868528072345416]
        for token in batch.answer_ids.tolist():
            separates = ">" in tokenizer.decode([token])
            expected.append(1.0 if separates else golden[rank])
            rank += separates
        assert rank == 4
        assert batch.answer_weights.tolist() == pytest.approx(expected, rel=1e-6)
        logits = torch.randn(len(expected), 400, generator=torch.Generator().manual_seed(0))
        losses = [-row.log_softmax(0)[token] for row, token in zip(logits, batch.answer_ids, strict=True)]
        mean = sum(weight * loss for weight, loss in zip(expected, losses, strict=True)) / len(expected)
        assert answer_loss(logits, batch).item() == pytest.approx(mean.item(), rel=1e-5)

    def test_lists_that_do_not_fit_the_window(self) -> None:
        collator = FirstCollator(prompt_tokenizer(), FirstSettings(window=2, step=1))
        for count in (0, 3):
            with pytest.raises(ValueError, match="documents: expected 1 to 2"):
                collator([RankingExample("q", ["a"] * count, [1] * count)])


class TestSampler:
    @given(
        st.lists(st.integers(1, 9), min_size=1, max_size=60),
        st.integers(9, 30),
        st.none() | st.integers(1, 4),
        st.booleans(),
        st.integers(1, 3),
    )
    def test_budget_and_count(
        self, lengths: list[int], max_tokens: int, max_lists: int | None, shuffle: bool, multiple_of: int
    ) -> None:
        if len(lengths) < multiple_of:
            lengths = lengths * multiple_of
        options: dict[str, Any] = {"max_lists": max_lists, "shuffle": shuffle, "multiple_of": multiple_of}
        sampler = TokenBudgetSampler(lengths, max_tokens, seed=5, **options)
        assert len(sampler) % multiple_of == 0
        for epoch in range(4):
            sampler.set_epoch(epoch)
            batches = list(sampler)
            assert len(batches) == len(sampler)
            assert all(batch and sum(lengths[index] for index in batch) <= max_tokens for batch in batches)
            assert all(len(batch) <= (max_lists or len(lengths)) for batch in batches)
            drawn = [index for batch in batches for index in batch]
            assert len(set(drawn)) == len(drawn)
            if epoch == 0 and multiple_of == 1:
                assert len(drawn) == len(lengths)
            again = TokenBudgetSampler(lengths, max_tokens, seed=5, **options)
            again.set_epoch(epoch)
            assert list(again) == batches

    def test_epochs_and_seeds_differ(self) -> None:
        def order(seed: int, epoch: int) -> list[int]:
            sampler = TokenBudgetSampler([1] * 50, 1, seed=seed)
            sampler.set_epoch(epoch)
            return [index for (index,) in sampler]

        orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
        assert all(sorted(found) == list(range(50)) for found in orders)
        assert len({tuple(found) for found in orders}) == 4

    def test_rows_are_filled(self) -> None:
        assert list(TokenBudgetSampler([4, 7, 6, 3, 2], 10, shuffle=False)) == [[0, 2], [1, 3], [4]]
        assert list(TokenBudgetSampler([1] * 5, 2, shuffle=False)) == [[0, 1], [2, 3], [4]]
        assert list(TokenBudgetSampler([1] * 5, 2, shuffle=False, multiple_of=2)) == [[0], [1], [2, 3], [4]]

    def test_wrong_arguments(self) -> None:
        with pytest.raises(ValueError, match="max_tokens: expected at least the 11 tokens of list 1"):
            TokenBudgetSampler([5, 11], 10)
        with pytest.raises(ValueError, match="max_lists"):
            TokenBudgetSampler([5], 10, max_lists=0)
        with pytest.raises(ValueError, match="lengths"):
            TokenBudgetSampler([5], 10, multiple_of=2)


class TestJointLoss:
    def test_scores_are_those_of_the_reranker(self, batch: RankingBatch) -> None:
        model = tiny_model()
        ranker = BlockRank(model, tiny_tokenizer(), **vars(SETTINGS))
        scores = joint_loss(model, batch, SETTINGS).scores
        expected = ranker.score_lists([(example.query, example.documents) for example in EXAMPLES])
        for row, (listed, *_) in zip(scores.tolist(), expected, strict=True):
            assert row[: len(listed)] == pytest.approx(listed, abs=1e-6)

    def test_log_scores_are_the_logarithm(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        shares = joint_loss(model, batch, SETTINGS).scores
        result = joint_loss(model, batch, SETTINGS, RankingObjective(score="log_share"))
        present = batch.present & (shares > 0)
        torch.testing.assert_close(result.scores[present], shares[present].log(), rtol=1e-4, atol=1e-5)
        # The first list ranks something: softmax(log S) = S.
        positive = shares[0][batch.labels[0] > 0].sum()
        assert result.ranking.item() == pytest.approx(-math.log(positive.item()), rel=1e-5)

    def test_language_model_loss_is_that_of_the_whole_row(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        inputs = rankernel.model_inputs(batch.input_ids, batch.layout, tail_offset=SETTINGS.tail_offset)
        log_probabilities = model(**inputs).logits[0].log_softmax(dim=-1)
        expected = -log_probabilities[batch.answer_rows, batch.answer_ids].mean()
        assert joint_loss(model, batch, SETTINGS).language_model.item() == pytest.approx(expected.item(), rel=1e-5)

    def test_a_batch_without_answers(self) -> None:
        model = tiny_model()
        rankernel.attach(model)
        batch = RankingCollator(tiny_tokenizer(), SETTINGS)([RankingExample("a", ["b", "c"], [0, 0])])
        result = joint_loss(model, batch, SETTINGS)
        result.total.backward()
        assert result.total.item() == 0
        assert not any(parameter.grad.any() for parameter in model.parameters() if parameter.grad is not None)

    def test_gradient_against_finite_differences(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        weight = model.model.layers[0].self_attn.k_proj.weight
        direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
        result = joint_loss(model, batch, SETTINGS, RankingObjective(ranking_weight=2.0))
        result.total.backward()
        losses = []
        for step in (1e-3, -1e-3):
            shifted = copy.deepcopy(model)
            with torch.no_grad():
                shifted.model.layers[0].self_attn.k_proj.weight.add_(step * direction)
                losses.append(joint_loss(shifted, batch, SETTINGS, RankingObjective(ranking_weight=2.0)).total.item())
        assert (weight.grad * direction).sum().item() == pytest.approx((losses[0] - losses[1]) / 2e-3, rel=1e-2)

    def test_training_learns_a_batch(self, batch: RankingBatch) -> None:
        model = tiny_model()
        rankernel.attach(model)
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        first = joint_loss(model, batch, SETTINGS, RankingObjective(ranking_weight=1.0))
        for _ in range(20):
            optimizer.zero_grad()
            result = joint_loss(model, batch, SETTINGS, RankingObjective(ranking_weight=1.0))
            result.total.backward()
            optimizer.step()
        assert result.ranking < 0.5 * first.ranking
        assert result.language_model < 0.5 * first.language_model


@pytest.mark.parametrize("with_teacher", [True, False])
def test_first_loss_is_that_of_the_stock_model_list_by_list(with_teacher: bool) -> None:
    tokenizer, stock = prompt_tokenizer(), tiny_model()
    examples = TAUGHT if with_teacher else [dataclasses.replace(e, teacher_scores=None) for e in TAUGHT]
    model = copy.deepcopy(stock)
    rankernel.attach(model)
    collator = FirstCollator(tokenizer, FirstSettings(window=4, step=2))
    result = first_loss(model, collator(examples), collator.letters)
    result.total.backward()

    language_model, ranking = [], []
    for example in examples:
        passages = [text.replace("[1]", "(1)") for text in example.documents]
        prompt = tokenizer(prompt_text(example.query, passages, False))["input_ids"]
        target = torch.tensor(example.teacher_scores or example.labels)
        best_first = sorted(range(len(passages)), key=lambda index: -target[index])
        completion = " > ".join(f"[{chr(65 + index)}]" for index in best_first)
        ids = torch.tensor([prompt[:-1] + tokenizer(completion)["input_ids"]])
        logits = stock(input_ids=ids, use_cache=False).logits[0]
        begin = len(prompt) - 1
        language_model.append(F.cross_entropy(logits[begin - 1 : -1], ids[0, begin:], reduction="none"))
        letters = [tokenizer.get_vocab()[chr(65 + index)] for index in range(len(passages))]
        scores = logits[begin, letters]
        ranking.append(distilled("weighted_ranknet", scores, target))
    expected = torch.cat(language_model).mean() + 10 * torch.stack(ranking).mean()
    expected.backward()
    assert result.total.item() == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in model.named_parameters():
        reference = stock.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, reference, rtol=1e-3, atol=1e-4 * reference.abs().max().item())


def test_importing_stays_cheap() -> None:
    """Transformers and accelerate come with the trainers alone."""
    code = "import sys, rankernel.training; assert not {'transformers', 'accelerate'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


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
