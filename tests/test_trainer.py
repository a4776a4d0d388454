"""The trainers: steps against dense eager PyTorch, evaluation against the rerankers, and what they save and log."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import rankernel
from joint_training import (
    SETTINGS,
    STEPS,
    dense_losses,
    logged_losses,
    make_arguments,
    make_examples,
    make_model,
    make_task,
    make_trainer,
    with_lora,
)
from rankernel.rerankers import FIRST, BlockRank
from rankernel.rerankers.first import FirstSettings
from rankernel.training import FirstTrainer, RankingArguments, RankingExample
from test_first import prompt_tokenizer
from tiny_ranker import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module", autouse=True)
def few_threads() -> Any:
    """These models are too small for more than one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return dense_losses(make_model("eager"))


class TestFiftySteps:
    """Language-model and contrastive loss, AdamW, steps of two rows with different numbers of lists."""

    @pytest.mark.parametrize("checkpointing", [False, True])
    def test_accumulated(self, checkpointing: bool, expected: list[float], tmp_path: Path) -> None:
        arguments = make_arguments(tmp_path, gradient_accumulation_steps=2, activation_checkpointing=checkpointing)
        trainer = make_trainer(make_model(), arguments)
        trainer.train()
        assert trainer.model.is_activation_checkpointing == checkpointing
        assert len(logged_losses(trainer)) == STEPS
        assert logged_losses(trainer) == pytest.approx(expected, rel=1e-4)

    def test_lora(self, tmp_path: Path) -> None:
        expected = dense_losses(with_lora(make_model("eager")))
        model = with_lora(make_model())
        assert all(layer.fused for layer in rankernel.fuse_lora(model))
        trainer = make_trainer(model, make_arguments(tmp_path, gradient_accumulation_steps=2))
        trainer.train()
        assert logged_losses(trainer) == pytest.approx(expected, rel=1e-4)

    @pytest.mark.slow
    def test_compiled(self, expected: list[float], tmp_path: Path) -> None:
        torch.compiler.reset()
        arguments = make_arguments(tmp_path, gradient_accumulation_steps=2, torch_compile=True)
        trainer = make_trainer(make_model(), arguments)
        trainer.train()
        assert type(trainer.model_wrapped).__name__ == "OptimizedModule"
        assert logged_losses(trainer) == pytest.approx(expected, rel=1e-4)


def test_every_list_weighs_the_same_however_rows_are_made(tmp_path: Path) -> None:
    """Lists with equally long answers: four rows of one, two of two and one of four are the same step."""
    losses = []
    for lists in (1, 2, 4):
        arguments = make_arguments(
            tmp_path, max_tokens=None, per_device_train_batch_size=lists, gradient_accumulation_steps=4 // lists,
            max_steps=10, train_sampling_strategy="sequential",
        )  # fmt: skip
        trainer = make_trainer(make_model(), arguments, train_dataset=make_examples(40))
        trainer.train()
        losses.append(logged_losses(trainer))
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert losses[2] == pytest.approx(losses[0], rel=1e-5)


def test_bf16_autocast(expected: list[float], tmp_path: Path) -> None:
    arguments = make_arguments(tmp_path, gradient_accumulation_steps=2, bf16=True, max_steps=20)
    trainer = make_trainer(make_model(), arguments, eval_dataset=make_task(make_examples(5)))
    trainer.train()
    losses = logged_losses(trainer)
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[0] == pytest.approx(expected[0], rel=0.01)
    assert losses[0] != pytest.approx(expected[0], rel=1e-5)
    assert losses[-1] < 0.5 * losses[0]
    assert next(trainer.model.parameters()).dtype == torch.float32
    assert trainer.evaluate()["eval_ndcg_at_10"] > 0


class Epochs(list[RankingExample]):
    """A dataset that changes with the epoch."""

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __getitem__(self, index: Any) -> Any:
        example = super().__getitem__(index)
        documents = [f"{text}{' again' * (self.epoch % 3)}" for text in example.documents]
        return RankingExample(example.query, documents, example.labels)


@pytest.mark.parametrize("max_tokens", [260, None])
def test_a_resumed_run_goes_on_as_it_would_have(max_tokens: int | None, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "max_tokens": max_tokens, "per_device_train_batch_size": 2, "max_steps": 14, "save_strategy": "steps",
        "save_steps": 8, "ranking_loss": "pg_rank", "ranking_parameters": {"num_samples": 2},
        "lr_scheduler_type": "cosine",
    }  # fmt: skip
    dataset = Epochs(make_examples(10))
    whole = make_trainer(make_model(), make_arguments(tmp_path, **given), train_dataset=dataset)
    whole.train()
    assert len(whole.get_train_dataloader()) in (5, 6)  # so that step 8 is within the second epoch
    resumed = make_trainer(make_model(), make_arguments(tmp_path, **given), train_dataset=Epochs(make_examples(10)))
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert logged_losses(resumed) == logged_losses(whole)


class TestArguments:
    def test_reentrant_checkpointing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="use_reentrant=False"):
            RankingArguments(output_dir=str(tmp_path), gradient_checkpointing_kwargs={"use_reentrant": True})
        kept = RankingArguments(output_dir=str(tmp_path), activation_checkpointing_kwargs={"preserve_rng_state": True})
        assert kept.activation_checkpointing_kwargs == {"use_reentrant": False, "preserve_rng_state": True}

    def test_what_does_not_fit_the_model_or_the_data(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="layer: expected one of"):
            make_trainer(tiny_model(1), make_arguments(tmp_path))
        with pytest.raises(ValueError, match="kind: expected one of"):
            make_trainer(make_model(), make_arguments(tmp_path, ranking_loss="lambda"))
        with pytest.raises(ValueError, match="max_tokens: expected at least"):
            make_trainer(make_model(), make_arguments(tmp_path, max_tokens=20)).train()
        with pytest.raises(ValueError, match="train_dataset"):
            make_trainer(make_model(), make_arguments(tmp_path), train_dataset=None).train()
        with pytest.raises(ValueError, match="eval_dataset"):
            make_trainer(make_model(), make_arguments(tmp_path)).evaluate()

    def test_several_gpus_in_one_process(self, tmp_path: Path) -> None:
        arguments = make_arguments(tmp_path)
        arguments._n_gpu = 2
        with pytest.raises(ValueError, match="torchrun"):
            make_trainer(make_model(), arguments)


def test_parts_are_logged(tmp_path: Path) -> None:
    arguments = make_arguments(
        tmp_path, max_steps=3, language_model_weight=0.7, ranking_loss="listnet", ranking_weight=0.3,
        teacher_loss="kl_distillation", teacher_weight=0.2, score="log_share",
    )  # fmt: skip
    trainer = make_trainer(make_model(), arguments, train_dataset=make_examples(teacher=True))
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    for row in rows:
        total = 0.7 * row["language_model"] + 0.3 * row["ranking"] + 0.2 * row["teacher"]
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert min(row["ranking"], row["teacher"], row["tokens_per_second"]) > 0


def test_parts_are_means_over_the_lists_since_the_last_time(tmp_path: Path) -> None:
    """Weights of 0 leave the model as it is, so that its means are known."""
    examples = make_examples(9)
    arguments = make_arguments(
        tmp_path, max_steps=3, logging_steps=3, max_tokens=None, per_device_train_batch_size=4,
        language_model_weight=0.0, ranking_weight=0.0,
    )  # fmt: skip
    trainer = make_trainer(make_model(), arguments, train_dataset=examples)
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    ranker = trainer.reranker(trainer.model)
    hits, losses = 0, []
    for example in examples:
        shares = torch.tensor(next(ranker.score_lists([(example.query, example.documents)])).scores)
        hits += example.labels[int(shares.argmax())] == max(example.labels)
        logits = shares / 0.05
        losses.append(logits.logsumexp(0) - logits[torch.tensor(example.labels) > 0].logsumexp(0))
    assert row["loss"] == 0
    assert row["first_place"] == pytest.approx(hits / 9)
    assert 0 < hits < 9
    assert row["ranking"] == pytest.approx(torch.stack(losses).mean().item(), rel=1e-4)


def ndcg(ranking: Any, grades: dict[str, int]) -> float:
    gains = [grades.get(row.document_id, 0) / math.log2(row.rank + 1) for row in ranking if row.rank <= 10]
    return sum(gains) / sum(g / math.log2(rank + 2) for rank, g in enumerate(sorted(grades.values(), reverse=True)))


class TestEvaluation:
    @pytest.mark.parametrize("method", ["blockrank", "first"])
    def test_it_is_the_rerankers(self, method: str, tmp_path: Path) -> None:
        task = make_task(make_examples(12, seed=5))
        model, arguments = tiny_model(), make_arguments(tmp_path, eval_batch_tokens=500)
        if method == "blockrank":
            trainer = make_trainer(model, arguments, eval_dataset=task)
            ranker: Any = BlockRank(tiny_model(), tiny_tokenizer(), **vars(SETTINGS))
        else:
            settings = FirstSettings(window=4, step=2)
            trainer = make_trainer(
                model, arguments, eval_dataset=task, settings=settings, processing_class=prompt_tokenizer(),
                trainer_class=FirstTrainer,
            )  # fmt: skip
            ranker = FIRST(tiny_model(), prompt_tokenizer(), **vars(settings))
        metrics = trainer.evaluate(metric_key_prefix="test")
        found = [
            ndcg(
                ranker.rank(task.queries[query], [task.documents[name] for name in names], document_ids=names),
                task.qrels[query],
            )
            for query, names in task.candidates.items()
        ]
        assert metrics["test_ndcg_at_10"] == pytest.approx(sum(found) / len(found), abs=1e-9)
        assert 0 < metrics["test_mrr_at_10"] < 1
        assert trainer.state.log_history[-1]["test_ndcg_at_10"] == metrics["test_ndcg_at_10"]

    def test_the_best_model_is_known(self, tmp_path: Path) -> None:
        arguments = make_arguments(
            tmp_path, max_steps=6, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=2,
            metric_for_best_model="eval_ndcg_at_10", load_best_model_at_end=True,
        )  # fmt: skip
        trainer = make_trainer(make_model(), arguments, eval_dataset=make_task(make_examples(12, seed=5)))
        trainer.train()
        found = [row["eval_ndcg_at_10"] for row in trainer.state.log_history if "eval_ndcg_at_10" in row]
        assert len(found) == 3
        assert trainer.state.best_metric == max(found)
        assert trainer.evaluate()["eval_ndcg_at_10"] == max(found)


class TestSaving:
    def test_a_ranker_can_be_loaded(self, tmp_path: Path) -> None:
        trainer = make_trainer(make_model(), make_arguments(tmp_path / "run", max_steps=2))
        trainer.train()
        trainer.save_model(str(tmp_path / "model"))
        ranker = BlockRank.from_pretrained(tmp_path / "model")
        assert ranker.settings == SETTINGS
        example = make_examples(1, seed=7)[0]
        ours = trainer.reranker(trainer.model).rank(example.query, example.documents)
        assert list(ranker.rank(example.query, example.documents)) == list(ours)

    def test_adapters_can_be_loaded(self, tmp_path: Path) -> None:
        make_model().save_pretrained(tmp_path / "base")
        model = with_lora(type(make_model()).from_pretrained(tmp_path / "base"))
        trainer = make_trainer(model, make_arguments(tmp_path / "run", max_steps=2))
        trainer.train()
        trainer.save_model(str(tmp_path / "model"))
        assert not (tmp_path / "model" / "model.safetensors").exists()
        ranker = BlockRank.from_pretrained(tmp_path / "model")
        example = make_examples(1, seed=7)[0]
        ours = trainer.reranker(trainer.model).rank(example.query, example.documents)
        scores = [row.score for row in ranker.rank(example.query, example.documents)]
        assert scores == pytest.approx([row.score for row in ours], abs=1e-6)


def test_first(tmp_path: Path) -> None:
    """Trains towards the teacher's order, in rows within a budget, and saves how it ranks."""
    settings = FirstSettings(window=6, step=3, max_document_tokens=50)
    arguments = make_arguments(tmp_path, max_steps=30, max_tokens=1200, ranking_weight=None, importance_weighted=True)
    trainer = make_trainer(
        make_model(), arguments, settings=settings, processing_class=prompt_tokenizer(),
        train_dataset=make_examples(12, teacher=True), trainer_class=FirstTrainer,
    )  # fmt: skip
    trainer.train()
    rows = [row for row in trainer.state.log_history if "loss" in row]
    assert rows[0]["loss"] == pytest.approx(rows[0]["language_model"] + 10 * rows[0]["ranking"], rel=1e-5)
    assert rows[-1]["language_model"] < 0.5 * rows[0]["language_model"]
    assert rows[-1]["ranking"] < rows[0]["ranking"]
    trainer.save_model(str(tmp_path / "model"))
    saved = json.loads((tmp_path / "model" / "rankernel.json").read_text())
    assert saved == {"method": "first", "window": 6, "step": 3, "max_document_tokens": 50}
    assert FIRST.from_pretrained(tmp_path / "model").settings == settings
    assert FIRST.from_pretrained(tmp_path / "model", step=2).settings == FirstSettings(6, 2, 50)
