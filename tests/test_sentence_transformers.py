"""The drop-in losses against those of sentence-transformers: same value and gradients on a tiny CrossEncoder."""

from __future__ import annotations

import itertools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as theirs
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from rankernel.training import sentence_transformers as ours

WORDS = ["read", "write", "file", "socket", "path", "copy", "list", "open", "close", "thread"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
LOSSES = ["LambdaLoss", "RankNetLoss", "ListNetLoss", "PListMLELoss", "ListMLELoss"]
SCHEMES = {
    "none": theirs.NoWeightingScheme(),
    "ndcg1": theirs.NDCGLoss1Scheme(),
    "ndcg2": theirs.NDCGLoss2Scheme(),
    "lambdarank": theirs.LambdaRankScheme(),
    "ndcg2pp": theirs.NDCGLoss2PPScheme(),
    "ndcg2pp_mu": theirs.NDCGLoss2PPScheme(mu=3.0),
}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A BERT cross-encoder of two layers with random weights and a vocabulary of ten words."""
    where = tmp_path_factory.mktemp("cross_encoder")
    vocabulary = {word: number for number, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=64, **names).save_pretrained(where)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, initializer_range=0.5,
        num_labels=1,
    )  # fmt: skip
    BertForSequenceClassification(config).save_pretrained(where)
    return where


@pytest.fixture(scope="module")
def model(directory: Path) -> CrossEncoder:
    return CrossEncoder(str(directory), device="cpu")


def documents(count: int, start: int = 0) -> list[str]:
    """Different ones, so that no two scores tie."""
    return [" ".join(pair) for pair in itertools.islice(itertools.permutations(WORDS, 2), start, start + count)]


def batch(*labels: list[float]) -> tuple[list[Any], list[torch.Tensor]]:
    """One query a list of labels."""
    starts = [0, *itertools.accumulate(len(y) for y in labels)]
    docs = [documents(len(y), start) for y, start in zip(labels, starts, strict=False)]
    return [WORDS[: len(labels)], docs], [torch.tensor(y) for y in labels]


RAGGED = batch([2, 0, 1, 0, 3, 1], [0, 1], [1, 0, 0, 2])
DEGENERATE = batch([0, 1, 2], [1, 1, 1], [0, 0, 0], [1], [-1.5, -0.5, -1.0], [0])


def value_and_gradients(loss: Any, inputs: Any, labels: Any) -> list[torch.Tensor]:
    loss.zero_grad()
    value = loss(inputs, labels)
    value.backward()
    return [value.detach(), *(p.grad.clone() for p in loss.model.parameters() if p.grad is not None)]


def assert_same(our: Any, their: Any, data: Any, rtol: float = 1e-5) -> None:
    found, expected = (value_and_gradients(loss, *data) for loss in (our, their))
    assert len(found) == len(expected) > 1
    scale = max(gradient.abs().max().item() for gradient in expected[1:])
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=rtol, atol=rtol * max(scale, 1e-6))


@pytest.fixture
def parent_forbidden(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Call it once the parent's values are known: from then on its forward fails, so that ours must have run."""

    def forbid() -> None:
        for name in ("LambdaLoss", "ListNetLoss", "PListMLELoss"):
            monkeypatch.setattr(getattr(theirs, name), "forward", None)

    return forbid


def pair_of(name: str, model: CrossEncoder, **options: Any) -> tuple[Any, Any]:
    return getattr(ours, name)(model, **options), getattr(theirs, name)(model, **options)


class TestLambdaLoss:
    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("k", [None, 1, 3])
    @pytest.mark.parametrize("reduction_log", ["natural", "binary"])
    def test_schemes(self, model: CrossEncoder, scheme: str, k: int | None, reduction_log: str) -> None:
        options = {"weighting_scheme": SCHEMES[scheme], "k": k, "reduction_log": reduction_log, "sigma": 0.7}
        assert_same(*pair_of("LambdaLoss", model, **options), RAGGED)

    @pytest.mark.parametrize("scheme", SCHEMES)
    @pytest.mark.parametrize("k", [None, 2])
    def test_lists_that_rank_nothing(self, model: CrossEncoder, scheme: str, k: int | None) -> None:
        assert_same(*pair_of("LambdaLoss", model, weighting_scheme=SCHEMES[scheme], k=k), DEGENERATE)
        assert_same(*pair_of("LambdaLoss", model, weighting_scheme=SCHEMES[scheme], k=k), batch([0, 1], [0, 0, 0]))

    @pytest.mark.parametrize("k", [None, 1])
    def test_ranknet(self, model: CrossEncoder, k: int | None) -> None:
        assert_same(*pair_of("RankNetLoss", model, k=k), RAGGED)
        assert_same(*pair_of("RankNetLoss", model, k=k), DEGENERATE)

    def test_no_pair_at_all(self, model: CrossEncoder) -> None:
        loss = ours.LambdaLoss(model)
        value, *gradients = value_and_gradients(loss, *batch([1, 1], [0]))
        assert value == 0
        assert not any(gradient.any() for gradient in gradients)

    def test_a_scheme_of_the_user_runs_the_parent(self, model: CrossEncoder) -> None:
        class Doubled(theirs.NDCGLoss2Scheme):
            def forward(self, *args: Any) -> torch.Tensor:
                return 2 * super().forward(*args)

        assert_same(*pair_of("LambdaLoss", model, weighting_scheme=Doubled()), RAGGED)

    def test_an_epsilon_of_the_user_runs_the_parent(self, model: CrossEncoder) -> None:
        assert_same(*pair_of("LambdaLoss", model, eps=10.0), RAGGED)

    @pytest.mark.parametrize("scheme", SCHEMES)
    def test_our_kernel_runs(self, model: CrossEncoder, parent_forbidden: Any, scheme: str) -> None:
        parent_forbidden()
        k = None if scheme == "none" else 3
        value_and_gradients(ours.LambdaLoss(model, weighting_scheme=SCHEMES[scheme], k=k), *RAGGED)


class TestListLosses:
    def test_listnet(self, model: CrossEncoder, parent_forbidden: Any) -> None:
        assert_same(*pair_of("ListNetLoss", model), RAGGED)
        assert_same(*pair_of("ListNetLoss", model), DEGENERATE)
        parent_forbidden()
        value_and_gradients(ours.ListNetLoss(model), *RAGGED)

    @pytest.mark.parametrize("name", ["ListMLELoss", "PListMLELoss"])
    @pytest.mark.parametrize("respect_input_order", [True, False])
    def test_listmle(self, model: CrossEncoder, parent_forbidden: Any, name: str, respect_input_order: bool) -> None:
        our, their = pair_of(name, model, respect_input_order=respect_input_order)
        assert_same(our, their, RAGGED)
        assert_same(our, their, DEGENERATE)
        parent_forbidden()
        value_and_gradients(our, *RAGGED)

    def test_weights_of_the_user_run_the_parent(self, model: CrossEncoder) -> None:
        weight = theirs.PListMLELambdaWeight(lambda mask: mask / torch.arange(1, mask.shape[1] + 1))
        assert_same(*pair_of("PListMLELoss", model, lambda_weight=weight), RAGGED)

    def test_no_weights(self, model: CrossEncoder) -> None:
        assert_same(*pair_of("PListMLELoss", model, lambda_weight=None), RAGGED)

    def test_an_empty_list_is_no_nan(self, model: CrossEncoder) -> None:
        full, one_empty = batch([1.0, 0.0]), batch([1.0, 0.0], [])
        for name in ("ListNetLoss", "ListMLELoss", "PListMLELoss"):
            loss = getattr(ours, name)(model)
            assert loss(*one_empty).item() == pytest.approx(loss(*full).item() / 2)


@pytest.mark.parametrize("name", LOSSES)
class TestEveryLoss:
    @pytest.mark.parametrize("mini_batch_size", [None, 1, 5, 100, -1])
    def test_mini_batches_and_activation(self, model: CrossEncoder, name: str, mini_batch_size: int | None) -> None:
        options = {"mini_batch_size": mini_batch_size, "activation_fn": torch.nn.Tanh()}
        assert_same(*pair_of(name, model, **options), RAGGED)

    def test_a_wrong_order_far_apart_keeps_its_gradient(self, directory: Path, name: str) -> None:
        model = CrossEncoder(str(directory), device="cpu")
        with torch.no_grad():
            model.model.classifier.weight.mul_(1e4)
        our, their = pair_of(name, model)
        value, *gradients = value_and_gradients(our, *RAGGED)
        assert math.isfinite(value)
        assert any(gradient.any() for gradient in gradients)
        # Theirs is float32 logcumsumexp for ListMLE, whose gradients at scores of 1e4 are off by its rounding, 5e-4.
        assert_same(our, their, RAGGED, rtol=5e-3 if "MLE" in name else 1e-5)

    def test_integer_labels(self, model: CrossEncoder, name: str) -> None:
        inputs, labels = RAGGED
        assert_same(*pair_of(name, model), (inputs, [y.long() for y in labels]))

    def test_prompts_reach_the_model(self, model: CrossEncoder, name: str) -> None:
        our, their = pair_of(name, model)
        prompted = our(*RAGGED, prompt="copy thread ")
        assert prompted.item() == pytest.approx(their(*RAGGED, prompt="copy thread ").item(), rel=1e-5)
        assert prompted.item() != pytest.approx(our(*RAGGED).item(), rel=1e-3)

    def test_is_the_parent_to_the_outside(self, model: CrossEncoder, name: str) -> None:
        our, their = pair_of(name, model, mini_batch_size=3)
        assert isinstance(our, type(their))
        assert our.get_config_dict() == their.get_config_dict()
        assert our.citation == their.citation
        assert our.model is model
        assert type(our).__name__ == name

    def test_errors(self, model: CrossEncoder, name: str) -> None:
        loss = getattr(ours, name)(model)
        inputs, labels = RAGGED
        with pytest.raises(ValueError, match="one tensor a query"):
            loss(inputs, torch.zeros(3))
        with pytest.raises(ValueError, match="expects two"):
            loss([*inputs, inputs[1]], labels)
        with pytest.raises(ValueError, match="labels: expected one a document"):
            loss(inputs, labels[::-1])


def test_the_model_sees_the_same_mini_batches(model: CrossEncoder, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    preprocess = model.preprocess

    def counted(pairs: Any, **options: Any) -> Any:
        sizes.append(len(pairs))
        return preprocess(pairs, **options)

    monkeypatch.setattr(model, "preprocess", counted)
    for mini_batch_size, expected in ((None, [3, 3, 3, 3]), (5, [5, 5, 2]), (-1, [12])):
        for loss in pair_of("LambdaLoss", model, mini_batch_size=mini_batch_size):
            sizes.clear()
            loss(*RAGGED)
            assert sizes == expected


def test_the_trainer_learns(directory: Path, tmp_path: Path) -> None:
    model = CrossEncoder(str(directory), device="cpu")
    columns = {"query": WORDS[:6], "docs": [documents(4, 4 * i) for i in range(6)], "labels": [[3, 2, 1, 0]] * 6}
    arguments = CrossEncoderTrainingArguments(
        str(tmp_path), max_steps=12, per_device_train_batch_size=6, learning_rate=1e-2, warmup_steps=0,
        use_cpu=True, report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
    )  # fmt: skip
    trainer = CrossEncoderTrainer(
        model=model, args=arguments, train_dataset=Dataset.from_dict(columns), loss=ours.LambdaLoss(model)
    )
    trainer.train()
    history = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert history[-1] < 0.8 * history[0]


def test_more_than_one_output_label_is_refused(directory: Path) -> None:
    model = CrossEncoder(str(directory), device="cpu", num_labels=2, model_kwargs={"ignore_mismatched_sizes": True})
    for name in LOSSES:
        with pytest.raises(ValueError, match="1 output label"):
            getattr(ours, name)(model)
