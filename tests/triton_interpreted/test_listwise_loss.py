"""The Triton kernels of listwise_loss against the reference in float64."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rankernel.triton_kernels import listwise_loss as kernels

from attention_cases import DTYPES, assert_close
from listwise_cases import GOLDEN, VARIANTS
from rankernel import reference
from rankernel.listwise import KINDS, REDUCTIONS, Settings, settings_of
from rankernel.reference.listwise_loss import philox

pytestmark = pytest.mark.usefixtures("poisoned_memory")

LENGTHS = (5, 0, 1, 20, 50, 3, 3, 2)
SHORT = (5, 0, 1, 18, 2)


@dataclass
class Problem:
    """Items before, between and after the lists; with where, the items that it leaves out hold NaN and infinities."""

    scores: torch.Tensor
    labels: torch.Tensor
    offsets: torch.Tensor
    where: torch.Tensor | None


def problem(lengths: Sequence[int], seed: int, scale: float = 1.5, masked: bool = False) -> Problem:
    generator = torch.Generator().manual_seed(seed)
    offsets = 2 + torch.tensor([0, *lengths]).cumsum(0)
    n = int(offsets[-1]) + 3
    scores = scale * torch.randn(n, generator=generator, dtype=torch.float64)
    labels = torch.randint(-1, 4, (n,), generator=generator).float()
    scores[::7] = scores[0]  # ties
    if len(lengths) > 5:
        labels[offsets[5] : offsets[6]] = 1  # a list of equal labels
    where = None
    if masked:
        where = torch.rand(n, generator=generator) < 0.7
        where[offsets[-2] : offsets[-1]] = False
        holes = torch.tensor([torch.nan, torch.inf, -torch.inf], dtype=torch.float64)
        scores = torch.where(where, scores, holes[torch.arange(n) % 3])
        labels = torch.where(where, labels, torch.nan)
    return Problem(scores, labels, offsets, where)


def arguments(
    p: Problem, kind: str, reduction: str, parameters: dict[str, object], seed: int
) -> tuple[torch.Tensor | str | Settings | int | None, ...]:
    """Everything but scores and labels, as the kernels and the reference take it."""
    parameters = dict(parameters)
    seed, convention = parameters.pop("seed", seed), parameters.pop("convention", None)
    if reduction == "pair_mean":
        parameters.pop("pair_reduction", None)
    settings = Settings(*settings_of(KINDS[kind], reduction, convention, parameters)[1])
    return p.offsets, p.where, kind, reduction, settings, seed


def run(
    p: Problem, kind: str, reduction: str, parameters: dict[str, object], dtype: torch.dtype = torch.float32,
    seed: int = 7,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return kernels.listwise_loss(p.scores.to(dtype), p.labels, *arguments(p, kind, reduction, parameters, seed))


def check(
    p: Problem, kind: str, reduction: str, parameters: dict[str, object], dtype: torch.dtype = torch.float32,
    magnitude: float = 0.0, seed: int = 7,
) -> None:  # fmt: skip
    """Against the reference; ``magnitude`` as in assert_close, for the loss."""
    if kind == "pg_rank":  # a difference of sums over the items
        magnitude += 30
    expected = []
    for wide in (torch.float32, torch.float64):
        scores = p.scores.to(dtype).to(wide).requires_grad_()
        loss = reference.listwise_loss(scores, p.labels.to(wide), *arguments(p, kind, reduction, parameters, seed))
        expected.append((loss.detach(), torch.autograd.grad(loss.sum(), scores)[0]))
    (eager, eager_grad), (truth, true_grad) = expected
    loss, grad = run(p, kind, reduction, parameters, dtype, seed)
    assert loss.dtype == grad.dtype == torch.float32
    what = f"{kind} {parameters} {reduction} {dtype}"
    assert_close(loss, eager, truth, what, magnitude)
    assert_close(grad, eager_grad, true_grad, f"gradient of {what}")
    inside = torch.zeros_like(grad, dtype=torch.bool)
    inside[p.offsets[0] : p.offsets[-1]] = True
    if p.where is not None:
        inside &= p.where
    assert (grad[~inside] == 0).all()
    if reduction == "none":
        assert (loss[truth == 0] == 0).all()


@pytest.mark.parametrize("name", GOLDEN)
def test_golden(name: str) -> None:
    golden = GOLDEN[name]
    scores, labels = torch.tensor(golden.scores).float(), torch.tensor(golden.labels).float()
    p = Problem(scores, labels, torch.tensor([0, len(scores)]), None)
    parameters = dict(golden.parameters)
    loss, grad = run(p, golden.kind, parameters.pop("reduction", "sum"), parameters)
    torch.testing.assert_close(loss.item(), golden.loss, rtol=1e-6, atol=golden.digits)
    if golden.grad is not None:
        torch.testing.assert_close(grad, torch.tensor(golden.grad), rtol=1e-6, atol=1e-6)


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lists of a few dozen items take several steps, at little cost."""
    monkeypatch.setattr(kernels, "BLOCK", 32)


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("kind", kernels.KINDS_COVERED)
def test_against_float64(kind: str) -> None:
    lengths = SHORT if kind == "neural_ndcg" else LENGTHS  # many steps in the interpreter
    p, masked = problem(lengths, 0), problem(lengths, 1, masked=True)
    for number, parameters in enumerate(VARIANTS[kind]):
        check(p, kind, "none", parameters, DTYPES[number % 3])
        check(masked, kind, "mean", parameters, DTYPES[(number + 1) % 3])
    check(masked, kind, "none", {})


@pytest.mark.usefixtures("short_steps")
@settings(max_examples=50)
@given(
    kind=st.sampled_from(kernels.KINDS_COVERED),
    lengths=st.lists(st.one_of(st.integers(0, 4), st.integers(5, 40)), min_size=0, max_size=4),
    seed=st.integers(0, 2**31),
    scale=st.sampled_from([0.0, 0.1, 3.0, 30.0]),
    masked=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    data=st.data(),
)
def test_random_problems(kind, lengths, seed, scale, masked, dtype, data) -> None:
    reduction = data.draw(st.sampled_from(REDUCTIONS if KINDS[kind].pairwise else REDUCTIONS[:-1]))
    parameters = data.draw(st.sampled_from(VARIANTS[kind]))
    check(problem(lengths or [0], seed, scale, masked), kind, reduction, parameters, dtype, 30 * scale, seed)


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("kind", kernels.KINDS_COVERED)
def test_huge_scores(kind: str) -> None:
    """Pairs 1e4 apart, right and wrong."""
    check(problem(SHORT, 3, 1e4), kind, "none", VARIANTS[kind][0], magnitude=1e5)


def test_a_wrong_pair_keeps_its_gradient() -> None:
    p = Problem(torch.tensor([-1e4, 1e4]), torch.tensor([1.0, 0.0]), torch.tensor([0, 2]), None)
    loss, grad = run(p, "ranknet", "mean", {})
    assert loss == 2e4
    assert grad.tolist() == [-1, 1]


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", kernels.KINDS_COVERED)
def test_a_batch_equals_its_lists(kind: str, masked: bool) -> None:
    p = problem((5, 0, 38, 3, 20), 4, masked=masked)
    parameters = VARIANTS[kind][-1]
    seed = int(parameters.get("seed", 7))
    losses, grad = run(p, kind, "none", parameters)
    for number, (begin, end) in enumerate(zip(p.offsets[:-1], p.offsets[1:], strict=True)):
        where = None if p.where is None else p.where[begin:end]
        alone = Problem(p.scores[begin:end], p.labels[begin:end], torch.tensor([0, end - begin]), where)
        loss, part = run(alone, kind, "none", parameters | {"seed": seed + number})
        assert torch.equal(loss, losses[number : number + 1])
        assert torch.equal(part, grad[begin:end])


@pytest.mark.parametrize("kind", ["ndcg_loss2pp", "listmle", "softmax"])
def test_steps_as_on_a_gpu(kind: str) -> None:
    check(problem((40, 3), 5), kind, "mean", {})


@pytest.mark.usefixtures("short_steps")
@pytest.mark.parametrize(
    ("kind", "parameters"),
    [("listmle", {}), ("listmle", {"ties": "shuffle"}), ("p_listmle", {}), ("pg_rank", {"num_samples": 3})],
)
@pytest.mark.parametrize("masked", [False, True])
def test_sorting_orders_as_counting_does(monkeypatch, kind: str, parameters: dict[str, object], masked: bool) -> None:
    p = problem(LENGTHS, 6, masked=masked)
    counted = run(p, kind, "none", parameters)
    monkeypatch.setattr(kernels, "COUNTING_LIMIT", 0)
    for one, other in zip(counted, run(p, kind, "none", parameters), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("seed", [0, 2**32 - 2, 2**63 - 1])
def test_draws_are_those_of_the_reference(seed: int) -> None:
    lengths = (3, 9, 2)
    p = problem(lengths, 8, masked=True)
    draws = torch.zeros(2, len(p.scores), dtype=torch.int64)
    kernels._draw_kernel[(3, 2)](
        p.scores.float(), p.offsets, p.where.view(torch.uint8), draws, len(p.scores), seed, GUMBEL=False, BLOCK=4
    )
    for number in range(3):
        items = torch.arange(*p.offsets[number : number + 2].tolist())
        items = items[p.where[items]]
        for sample in range(2):
            expected = philox(seed + number, sample, len(items)).astype("int64")
            assert draws[sample, items].tolist() == expected.tolist()


@pytest.mark.parametrize("kind", kernels.KINDS_COVERED)
def test_offsets_are_not_trusted(kind: str) -> None:
    """Lists are cut to the items, which lie between NaN here."""
    memory = torch.full((40,), torch.nan)
    scores, labels = memory.clone()[10:30], memory.clone()[10:30]
    scores.copy_(torch.randn(20, generator=torch.Generator().manual_seed(9)))
    labels.copy_(torch.arange(20) % 3)
    cut = run(Problem(scores, labels, torch.tensor([0, 7, 20]), None), kind, "mean", VARIANTS[kind][0])
    wide = run(Problem(scores, labels, torch.tensor([-9, 7, 2**40]), None), kind, "mean", VARIANTS[kind][0])
    assert torch.equal(cut[0], wide[0])
    assert torch.equal(cut[1], wide[1])
    for offsets in ([15, 3, 9], [2**40, -(2**40), 5], [25, 30, 35], [0, 20, 0, 20]):
        loss, grad = run(Problem(scores, labels, torch.tensor(offsets), None), kind, "mean", VARIANTS[kind][0])
        assert torch.isfinite(loss)
        assert torch.isfinite(grad).all()


@pytest.mark.parametrize("kind", kernels.KINDS_COVERED)
def test_nothing_to_rank(kind: str) -> None:
    for num_lists, num_items in ((0, 0), (0, 2), (2, 0)):
        p = Problem(torch.ones(num_items), torch.ones(num_items), torch.zeros(num_lists + 1, dtype=torch.int64), None)
        for reduction, shape in (("none", (num_lists,)), ("mean", ())):
            loss, grad = run(p, kind, reduction, VARIANTS[kind][0])
            assert loss.shape == shape
            assert (loss == 0).all()
            assert grad.tolist() == [0] * num_items


def test_a_kind_without_a_kernel_is_named() -> None:
    p = problem(SHORT, 0)
    for kind in KINDS.keys() - set(kernels.KINDS_COVERED):
        with pytest.raises(NotImplementedError, match=kind):
            run(p, kind, "mean", {})
