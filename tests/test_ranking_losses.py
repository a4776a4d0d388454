"""The loss modules: each is its op, on padded, jagged and single lists, eager, compiled, checkpointed and copied."""

from __future__ import annotations

import copy
import inspect
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from rankernel import listwise_loss
from rankernel.listwise import KINDS
from rankernel.training import (
    ApproxNDCGLoss,
    LambdaRankLoss,
    ListMLELoss,
    ListwiseLoss,
    PGRankLoss,
    RankNetLoss,
    ranking_losses,
)

LOSSES: list[type[ListwiseLoss]] = [
    getattr(ranking_losses, name) for name in ranking_losses.__all__ if name != "ListwiseLoss"
]
RANDOM = [PGRankLoss, lambda **options: ListMLELoss(ties="shuffle", **options)]

every_loss = pytest.mark.parametrize("loss_class", LOSSES, ids=lambda loss_class: loss_class.__name__)
every_random_loss = pytest.mark.parametrize("random_loss", RANDOM, ids=["PGRankLoss", "ListMLELoss"])


def batch(lists: int = 5, items: int = 11, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Padded scores and labels with a mask whose holes are anywhere; a single item and an empty list among them."""
    generator = torch.Generator().manual_seed(seed)
    scores = 2 * torch.randn(lists, items, generator=generator)
    labels = torch.randint(0, 4, (lists, items), generator=generator).float()
    mask = torch.rand(lists, items, generator=generator) < 0.8
    mask[1], mask[2] = False, torch.arange(items) == 3
    return scores, labels, mask


def value_and_gradient(
    loss: Any, scores: torch.Tensor, *args: Any, **options: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    scores = scores.detach().clone().requires_grad_()
    value = loss(scores, *args, **options)
    value.sum().backward()
    return value.detach(), scores.grad


def assert_same(ours: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...]) -> None:
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other.reshape(one.shape))


def test_every_kind_has_one_module() -> None:
    assert sorted(loss_class.kind for loss_class in LOSSES) == sorted(KINDS)


@every_loss
class TestEveryLoss:
    @pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
    def test_is_the_op(self, loss_class: type[ListwiseLoss], reduction: str) -> None:
        scores, labels, _ = batch()
        offsets = torch.tensor([0, 4, 4, 5, 30, 55])

        def op(s: torch.Tensor) -> torch.Tensor:
            return listwise_loss(s, labels.flatten(), offsets, loss_class.kind, reduction=reduction)

        ours = value_and_gradient(
            loss_class(reduction=reduction).eval(), scores.flatten(), labels.flatten(), offsets=offsets
        )
        assert ours[1].any()
        assert_same(ours, value_and_gradient(op, scores.flatten()))

    def test_padded_is_jagged_is_one_by_one(self, loss_class: type[ListwiseLoss]) -> None:
        scores, labels, mask = batch()
        seed = {"seed": 5} if KINDS[loss_class.kind].seeded else {}
        loss = loss_class(reduction="none", **seed)
        padded, gradient = value_and_gradient(loss, scores, labels, mask)
        lengths = mask.sum(dim=1)
        jagged = value_and_gradient(loss, scores[mask], labels[mask], lengths=lengths)
        assert_same((padded, gradient[mask]), jagged)
        for number, (s, y, m) in enumerate(zip(scores, labels, mask, strict=True)):
            shifted = {"seed": 5 + number} if seed else {}
            single = value_and_gradient(loss_class(reduction="none", **shifted), s[m], y[m])
            assert_same((padded[number], gradient[number][m]), single)

    def test_pads_hold_anything_and_get_exactly_zero(self, loss_class: type[ListwiseLoss]) -> None:
        scores, labels, mask = batch()
        loss = loss_class().eval()
        expected, gradient = value_and_gradient(loss, scores, labels, mask)
        for pad in (float("nan"), float("inf"), -float("inf"), 1e30):
            value, ours = value_and_gradient(loss, scores.masked_fill(~mask, pad), labels.masked_fill(~mask, pad), mask)
            assert torch.equal(value, expected)
            assert torch.equal(ours, gradient)
            assert not ours[~mask].any()

    def test_one_compiled_graph(self, loss_class: type[ListwiseLoss]) -> None:
        torch._dynamo.reset()  # all losses share one forward, and Dynamo compiles it for eight classes at most
        loss = loss_class().eval()
        compiled = torch.compile(loss, fullgraph=True)
        for seed in (0, 1):
            args = batch(seed=seed)
            assert_same(value_and_gradient(compiled, *args), value_and_gradient(loss, *args))

    def test_autocast_gives_low_precision_scores(self, loss_class: type[ListwiseLoss]) -> None:
        scores, labels, mask = batch()
        head = torch.nn.Linear(1, 1)
        loss = loss_class().eval()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = head(scores[..., None])[..., 0]
            value = loss(logits, labels, mask)
        assert logits.dtype == torch.bfloat16
        assert value.dtype == torch.float32
        value.backward()
        assert head.weight.grad.isfinite().all()
        assert torch.equal(value, loss(logits.float(), labels, mask))

    def test_copies(self, loss_class: type[ListwiseLoss]) -> None:
        args = batch()
        loss = loss_class(reduction="sum").eval()
        for other in (copy.deepcopy(loss), pickle.loads(pickle.dumps(loss))):
            assert repr(other) == repr(loss) == f"{loss_class.__name__}(reduction='sum')"
            assert_same(value_and_gradient(other, *args), value_and_gradient(loss, *args))

    def test_signature_shows_the_published_values(self, loss_class: type[ListwiseLoss]) -> None:
        shown = {name: p.default for name, p in inspect.signature(loss_class).parameters.items()}
        assert KINDS[loss_class.kind].defaults.items() <= shown.items()
        assert set(shown) - set(KINDS[loss_class.kind].defaults) <= {"reduction", "convention", "seed"}
        loss_class(**{name: value for name, value in shown.items() if name != "pair_reduction"})
        assert "scores" in inspect.signature(loss_class().forward).parameters


@given(
    lengths=st.lists(st.integers(0, 9), max_size=6),
    loss_class=st.sampled_from([RankNetLoss, ApproxNDCGLoss, ListMLELoss]),
    dtype=st.sampled_from([torch.int64, torch.int32]),
)
def test_offsets_are_lengths_added_up(lengths: list[int], loss_class: type[ListwiseLoss], dtype: torch.dtype) -> None:
    scores, labels, _ = batch()
    n = sum(lengths)
    scores, labels, lengths_ = scores.flatten()[:n], labels.flatten()[:n], torch.tensor(lengths, dtype=dtype)
    offsets = torch.tensor([0, *torch.tensor(lengths).cumsum(0).tolist()], dtype=dtype)
    assert_same(
        value_and_gradient(loss_class(), scores, labels, lengths=lengths_),
        value_and_gradient(loss_class(), scores, labels, offsets=offsets),
    )


@pytest.mark.parametrize("shape", [(0,), (0, 4), (4, 0)])
def test_nothing_to_rank(shape: tuple[int, ...]) -> None:
    value, gradient = value_and_gradient(RankNetLoss(), torch.zeros(shape), torch.zeros(shape))
    assert value.item() == 0
    assert gradient.shape == shape


def test_options_and_convention_reach_the_op() -> None:
    scores, labels, _ = batch()
    loss = LambdaRankLoss(sigma=0.5, k=3, convention="allrank")
    offsets = 11 * torch.arange(6)
    expected = listwise_loss(
        scores.flatten(), labels.flatten(), offsets, "lambdarank", sigma=0.5, k=3, convention="allrank"
    )
    assert torch.equal(loss(scores, labels), expected)
    assert repr(loss) == "LambdaRankLoss(sigma=0.5, k=3, convention='allrank')"


def test_transposed_scores() -> None:
    scores, labels, mask = batch()
    loss = RankNetLoss()
    turned = (scores.T.contiguous().T, labels.T.contiguous().T, mask.T.contiguous().T)
    assert_same(value_and_gradient(loss, *turned), value_and_gradient(loss, scores, labels, mask))


@every_random_loss
class TestSeeds:
    def test_training_draws_anew_and_repeats_after_manual_seed(self, random_loss: Any) -> None:
        args, loss = batch(), random_loss()
        torch.manual_seed(0)
        first, second = value_and_gradient(loss, *args), value_and_gradient(loss, *args)
        torch.manual_seed(0)
        assert_same(value_and_gradient(loss, *args), first)
        assert not torch.equal(first[1], second[1])

    def test_a_given_seed_and_evaluation_leave_the_generator_alone(self, random_loss: Any) -> None:
        args, state = batch(), torch.get_rng_state()
        seeded = random_loss(seed=7)
        assert_same(value_and_gradient(seeded, *args), value_and_gradient(seeded, *args))
        assert_same(value_and_gradient(random_loss().eval(), *args), value_and_gradient(random_loss(seed=0), *args))
        assert torch.equal(torch.get_rng_state(), state)

    def test_checkpointing_recomputes_the_same_draws(self, random_loss: Any) -> None:
        scores, labels, mask = batch()
        loss = random_loss()

        def checkpointed(s: torch.Tensor) -> torch.Tensor:
            return checkpoint(lambda x: loss(torch.tanh(x), labels, mask), s, use_reentrant=False)

        torch.manual_seed(0)
        expected = value_and_gradient(lambda s: loss(torch.tanh(s), labels, mask), scores)
        torch.manual_seed(0)
        assert_same(value_and_gradient(checkpointed, scores), expected)

    def test_one_compiled_graph_draws_anew(self, random_loss: Any) -> None:
        torch._dynamo.reset()
        args, compiled = batch(), torch.compile(random_loss(), fullgraph=True)
        torch.manual_seed(0)
        first, second = value_and_gradient(compiled, *args), value_and_gradient(compiled, *args)
        torch.manual_seed(0)
        assert_same(value_and_gradient(compiled, *args), first)
        assert not torch.equal(first[1], second[1])


def test_losses_that_draw_nothing_leave_the_generator_alone() -> None:
    state = torch.get_rng_state()
    for loss in (RankNetLoss(), ListMLELoss()):
        loss(*batch())
    assert torch.equal(torch.get_rng_state(), state)


def test_gradient_checkpointing_of_a_scorer() -> None:
    _, labels, mask = batch()
    head = torch.nn.Linear(8, 1)
    features = torch.randn(5, 11, 8)
    plain, again = (
        torch.autograd.grad(loss, head.weight)[0]
        for loss in (
            RankNetLoss()(head(features)[..., 0], labels, mask),
            checkpoint(lambda x: RankNetLoss()(head(x)[..., 0], labels, mask), features, use_reentrant=False),
        )
    )
    assert torch.equal(plain, again)


class TestErrors:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"sigma": -1.0}, "sigma: expected a positive"),
            ({"temperature": 1.0}, "temperature: ranknet takes sigma"),
            ({"reduction": "median"}, "reduction: expected one of"),
            ({"convention": "lightgbm"}, "convention: ranknet has"),
            ({"seed": 1}, "seed: expected None"),
        ],
    )
    def test_constructor(self, options: dict[str, Any], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RankNetLoss(**options)

    @pytest.mark.parametrize("seed", [1.5, True, "1"])
    def test_seed_is_an_integer(self, seed: Any) -> None:
        with pytest.raises(ValueError, match="seed: expected an integer"):
            PGRankLoss(seed=seed)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"scores": torch.zeros(2, 3, 4)}, "scores: expected shape"),
            ({"scores": torch.tensor(1.0)}, "scores: expected shape"),
            ({"labels": torch.zeros(5, 10)}, "labels: expected the shape of scores"),
            ({"mask": torch.ones(11, dtype=torch.bool)}, "mask: expected the shape of scores"),
            ({"offsets": torch.tensor([0, 55])}, "offsets: expected None with padded"),
            ({"lengths": torch.tensor([55])}, "lengths: expected None with padded"),
        ],
    )
    def test_padded(self, change: dict[str, torch.Tensor], message: str) -> None:
        scores, labels, mask = batch()
        with pytest.raises(ValueError, match=message):
            RankNetLoss()(**{"scores": scores, "labels": labels, "mask": mask, **change})

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"lengths": torch.tensor([2, 2])}, "lengths: expected .* add up to 5"),
            ({"lengths": torch.tensor([[5]])}, "lengths: expected .* add up to 5"),
            ({"lengths": torch.tensor([5]), "offsets": torch.tensor([0, 5])}, "lengths: expected None with offsets"),
            ({"offsets": torch.tensor([0, 6])}, "offsets: expected rising"),
            ({"lengths": torch.tensor([6, -1])}, "offsets: expected rising"),
        ],
    )
    def test_jagged(self, change: dict[str, torch.Tensor], message: str) -> None:
        with pytest.raises(ValueError, match=message):
            RankNetLoss()(torch.zeros(5), torch.zeros(5), **change)

    def test_a_mask_is_boolean(self) -> None:
        scores, labels, mask = batch()
        with pytest.raises(TypeError, match=r"mask: expected torch\.bool"):
            RankNetLoss()(scores, labels, mask.float())
