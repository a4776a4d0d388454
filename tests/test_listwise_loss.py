"""listwise_loss: golden values, float64 truth, every instruction set, edges, and what PyTorch asks of an op."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounter

import rankernel
from attention_cases import assert_close
from listwise_cases import EVERY_VARIANT, GOLDEN, VARIANTS, Golden, Lists, lists, random_lists
from rankernel import backends
from rankernel.listwise import KINDS
from rankernel.reference.listwise_loss import philox

every_kind = pytest.mark.parametrize("kind", list(KINDS))
every_variant = pytest.mark.parametrize(
    ("kind", "parameters"), EVERY_VARIANT, ids=[f"{kind}-{i}" for i, (kind, _) in enumerate(EVERY_VARIANT)]
)


@pytest.fixture(autouse=True)
def _no_reference_warning() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*running the PyTorch reference.*")
        yield


def loss_and_grad(
    data: Lists, kind: str, dtype: torch.dtype = torch.float32, backend: str | None = None, **parameters: object
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss, and the gradient of the sum of the losses."""
    scores = data.scores.to(dtype).requires_grad_()
    with backends.use(backend=backend):
        loss = rankernel.listwise_loss(scores, data.labels, data.offsets, kind, where=data.where, **parameters)
    (grad,) = torch.autograd.grad(loss.sum(), scores)
    return loss.detach(), grad


def one_list(scores: list[float], labels: list[float]) -> Lists:
    return Lists(
        torch.tensor(scores, dtype=torch.float64),
        torch.tensor(labels, dtype=torch.float64),
        torch.tensor([0, len(scores)]),
        None,
    )


@pytest.mark.parametrize("golden", GOLDEN.values(), ids=GOLDEN)
def test_golden_values(golden: Golden, isa: str) -> None:
    data = one_list(golden.scores, golden.labels)
    for dtype in (torch.float32, torch.float64):
        loss, grad = loss_and_grad(data, golden.kind, dtype, **golden.parameters)
        assert loss.item() == pytest.approx(golden.loss, rel=1e-6, abs=golden.digits)
        if golden.grad is not None:
            torch.testing.assert_close(grad, torch.tensor(golden.grad, dtype=dtype), rtol=1e-6, atol=1e-6)


@every_variant
def test_float64_gradient_by_finite_differences(kind: str, parameters: dict[str, object]) -> None:
    """Scores far enough apart that no step changes an order, and with it a constant weight."""
    scores = torch.linspace(-1.5, 1.7, 9, dtype=torch.float64)[torch.tensor([4, 0, 7, 2, 8, 5, 1, 3, 6])]
    data = one_list(scores.tolist(), [2, 0, 1, 0, 1, 3, 0, 0, 1])
    if kind == "neural_ndcg":  # a fixed number of scalings; stopping early is a step in the function
        parameters = {"tolerance": 0.0, "max_iterations": 5, **parameters}
    _, grad = loss_and_grad(data, kind, torch.float64, **parameters)
    step = 1e-5
    for i in range(len(scores)):
        moved = []
        for sign in (step, -step):
            shifted = scores.clone()
            shifted[i] += sign
            moved.append(
                loss_and_grad(one_list(shifted.tolist(), data.labels.tolist()), kind, torch.float64, **parameters)[0]
            )
        assert (moved[0] - moved[1]).item() / (2 * step) == pytest.approx(grad[i].item(), rel=1e-6, abs=1e-8)


@every_variant
@given(
    data=lists(),
    dtype=st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float16]),
    reduction=st.sampled_from(["none", "sum", "mean", "pair_mean"]),
    isa=st.sampled_from(backends.available_isas()),
)
def test_every_isa_and_dtype(
    kind: str, parameters: dict[str, object], data: Lists, dtype: torch.dtype, reduction: str, isa: str
) -> None:
    if reduction == "pair_mean" and (not KINDS[kind].pairwise or "pair_reduction" in parameters):
        reduction = "none"
    if dtype == torch.float16:
        data.scores.clamp_(-6e4, 6e4)
    data.scores = data.scores.to(dtype).double()  # the truth is that of the scores as stored
    truth = loss_and_grad(data, kind, torch.float64, reduction=reduction, **parameters)
    eager = loss_and_grad(data, kind, torch.float32, "reference", reduction=reduction, **parameters)
    with backends.use(isa=isa):
        ours = loss_and_grad(data, kind, dtype, "cpu", reduction=reduction, **parameters)
    assert ours[0].dtype == torch.float32
    assert ours[1].dtype == dtype
    # Sinkhorn stops within its tolerance of a doubly stochastic matrix, not at the same iteration for every rounding.
    magnitude = 5.0 if kind == "neural_ndcg" else 0.0
    assert_close(ours[0], eager[0], truth[0], "loss", magnitude)
    assert_close(ours[1], eager[1].to(dtype), truth[1], "grad", magnitude)
    if data.where is not None:
        assert (ours[1][~data.where] == 0).all()


@every_kind
@pytest.mark.usefixtures("poisoned_memory", "isa")
def test_every_output_is_written(kind: str) -> None:
    data = random_lists([3, 0, 5, 1], seed=1, masked=True)
    data.offsets += torch.tensor([0, 0, 0, 0, -1])  # the last item belongs to no list
    for reduction in ("none", "mean"):
        loss, grad = loss_and_grad(data, kind, reduction=reduction)
        assert torch.isfinite(loss).all()
        assert torch.isfinite(grad).all()


@every_kind
def test_a_batch_is_its_lists_bit_by_bit(kind: str, isa: str) -> None:
    data = random_lists([5, 20, 0, 1, 100, 33, 5000, 7], seed=2, masked=True)
    if kind in ("neural_ndcg", "groco"):  # minutes at 5,000 items
        data = random_lists([5, 20, 0, 1, 100, 33, 7], seed=2, masked=True)
    loss, grad = loss_and_grad(data, kind, reduction="none")
    for number in range(len(loss)):
        alone = data.alone(number)
        more = {"seed": number} if KINDS[kind].seeded else {}
        alone_loss, alone_grad = loss_and_grad(alone, kind, reduction="none", **more)
        begin, end = data.offsets[number : number + 2].tolist()
        assert torch.equal(alone_loss[0], loss[number])
        assert torch.equal(alone_grad, grad[begin:end])


@every_kind
def test_threads_do_not_change_a_bit(kind: str) -> None:
    long = 300 if kind in ("neural_ndcg", "groco") else 40_000 if KINDS[kind].seeded else 9_000
    data = random_lists([50, long, 70, 3], seed=3)
    results = []
    threads = torch.get_num_threads()
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(loss_and_grad(data, kind))
    torch.set_num_threads(threads)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert torch.equal(grad, results[0][1])


@every_variant
def test_order_of_items_does_not_matter(kind: str, parameters: dict[str, object]) -> None:
    """Without ties, and without random draws, which belong to positions."""
    if KINDS[kind].seeded and ("seed" in parameters or kind == "pg_rank"):
        pytest.skip("draws belong to positions")
    generator = torch.Generator().manual_seed(4)
    data = one_list(torch.randn(40, generator=generator).tolist(), torch.randperm(40, generator=generator).tolist())
    data.labels = data.labels / 10 - 0.5
    order = torch.randperm(40, generator=generator)
    if kind == "margin_mse":
        order = torch.cat([torch.zeros(1, dtype=torch.int64), 1 + torch.randperm(39, generator=generator)])
    loss, grad = loss_and_grad(data, kind, **parameters)
    moved = Lists(data.scores[order], data.labels[order], data.offsets, None)
    moved_loss, moved_grad = loss_and_grad(moved, kind, **parameters)
    torch.testing.assert_close(moved_loss, loss, rtol=2e-6, atol=1e-6)
    torch.testing.assert_close(moved_grad, grad[order], rtol=1e-5, atol=2e-6)


@every_variant
def test_a_shift_changes_nothing_and_gradients_sum_to_zero(kind: str, parameters: dict[str, object]) -> None:
    data = random_lists([30], seed=5)
    data.scores = (256 * data.scores).round() / 256  # so that the shift is exact
    loss, grad = loss_and_grad(data, kind, **parameters)
    data.scores = data.scores + 128
    shifted_loss, shifted_grad = loss_and_grad(data, kind, **parameters)
    scale = grad.abs().max().item()
    torch.testing.assert_close(shifted_loss, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(shifted_grad, grad, rtol=1e-4, atol=2e-5 * max(scale, 1e-3))
    assert abs(grad.double().sum().item()) <= 1e-5 * grad.abs().sum().item() + 1e-9


@every_variant
@pytest.mark.usefixtures("isa")
def test_lists_that_rank_nothing(kind: str, parameters: dict[str, object]) -> None:
    """Empty, single, all masked, all labels equal: 0, no gradient, and not in the mean."""
    mask = torch.tensor([True, False, False, False, True, True, True, True, True])
    data = Lists(
        torch.tensor([1.0, torch.nan, torch.inf, -torch.inf, 0.3, -0.7, 0.5, 0.1, -0.4], dtype=torch.float64),
        torch.tensor([1.0, 1.0, torch.nan, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0], dtype=torch.float64),
        torch.tensor([0, 0, 1, 2, 4, 6, 9]),
        mask,
    )
    losses, grad = loss_and_grad(data, kind, reduction="none", **parameters)
    nothing = 4 if KINDS[kind].distillation else 5
    assert (losses[:nothing] == 0).all()
    assert (grad[: 4 if KINDS[kind].distillation else 6] == 0).all()
    mean, _ = loss_and_grad(data, kind, reduction="mean", **parameters)
    counted = losses[nothing:] if kind != "soft_topk" or parameters else losses[:0]
    assert mean.item() == pytest.approx(counted.mean().item() if len(counted) else 0.0, rel=1e-6, abs=1e-7)
    only_nothing = Lists(data.scores[:4], data.labels[:4], torch.tensor([0, 0, 1, 2, 4]), mask[:4])
    for reduction in ("sum", "mean"):
        loss, grad = loss_and_grad(only_nothing, kind, reduction=reduction, **parameters)
        assert loss.item() == 0
        assert (grad == 0).all()
    empty = Lists(torch.zeros(0), torch.zeros(0), torch.tensor([0]), None)
    assert loss_and_grad(empty, kind, reduction="none", **parameters)[0].shape == (0,)
    assert loss_and_grad(empty, kind, **parameters)[0].item() == 0


@every_variant
@pytest.mark.usefixtures("isa")
def test_huge_scores(kind: str, parameters: dict[str, object]) -> None:
    data = random_lists([12, 30], seed=6, spread=1e4)
    truth = loss_and_grad(data, kind, torch.float64, reduction="none", **parameters)
    eager = loss_and_grad(data, kind, torch.float32, "reference", reduction="none", **parameters)
    ours = loss_and_grad(data, kind, reduction="none", **parameters)
    assert torch.isfinite(ours[0]).all()
    if kind == "groco":  # the network's swaps are steep there, and eager float32 is off by more
        return
    assert_close(ours[0], eager[0], truth[0], "loss", 5.0)
    assert_close(ours[1], eager[1], truth[1], "grad", 5.0)


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("distance", [30.0, 1e4])
def test_a_wrong_pair_far_apart_keeps_its_gradient(distance: float) -> None:
    """log(clamp(sigmoid(d), 1e-10)) of allRank and of sentence-transformers up to 6.1 has none beyond d = -23."""
    data = one_list([0.0, distance], [1.0, 0.0])
    for kind in ("ranknet", "lambdarank", "ndcg_loss2", "ndcg_loss2pp", "lipo", "dcg_lambda", "soft_ranknet"):
        near = loss_and_grad(one_list([0.0, 22.0], [1.0, 0.0]), kind)[1]
        loss, grad = loss_and_grad(data, kind)
        torch.testing.assert_close(grad, near, rtol=1e-5, atol=0)
        assert grad[0] < -0.1
        assert loss > 0.1 * distance
    clamped = torch.tensor([0.0, distance], requires_grad=True)
    torch.log(torch.sigmoid(clamped[0] - clamped[1]).clamp(min=1e-10)).backward()
    assert clamped.grad is not None
    assert (clamped.grad == 0).all()


@pytest.mark.usefixtures("isa")
def test_logistic_functions_within_their_bounds() -> None:
    """RankNet of two items is softplus(-x) and its slope sigmoid(-x): 4 ulp, for every size of x, by both paths."""
    for sizes in (torch.linspace(-103, 103, 20_001), torch.logspace(-30, 4, 2_000), -torch.logspace(-30, 4, 2_000)):
        scores = torch.stack([sizes, torch.zeros_like(sizes)], dim=1).flatten()
        labels, offsets = torch.tensor([1.0, 0.0]).repeat(len(sizes)), torch.arange(0, scores.numel() + 1, 2)
        loss, grad = loss_and_grad(Lists(scores, labels, offsets, None), "ranknet", reduction="none")
        x = sizes.double()
        for ours, truth in ((loss, torch.nn.functional.softplus(-x)), (-grad[::2], torch.sigmoid(-x))):
            normal = truth > 2.0**-126
            error = ((ours.double() - truth).abs() / truth)[normal].max()
            assert error <= 4 * 2.0**-23


def test_philox_is_philox() -> None:
    """The known answers of the Random123 library for Philox4x32-10."""
    assert philox(0, 0, 1)[0] == 0x6627E8D5
    key = 0xFFFFFFFFFFFFFFFF
    assert philox(key, 0, 3).dtype == "uint32"
    assert len(set(philox(7, 1, 1000).tolist())) == 1000


def test_shuffled_ties_depend_on_the_seed_and_nothing_else() -> None:
    data = random_lists([30], seed=7, labels="binary")
    losses = [loss_and_grad(data, "listmle", ties="shuffle", seed=seed)[0].item() for seed in (0, 0, 1, 2**63 - 1)]
    assert losses[0] == losses[1]
    assert len(set(losses)) == 3
    untied = one_list(data.scores.tolist(), list(range(30)))
    assert loss_and_grad(untied, "listmle", ties="shuffle", seed=3)[0] == loss_and_grad(untied, "listmle")[0]


def test_policy_gradient_is_that_of_expected_ndcg() -> None:
    """The mean over many seeds against the exact gradient, over all orders of four items."""
    scores, labels = torch.tensor([0.3, -0.4, 0.9, 0.0], dtype=torch.float64), torch.tensor([1.0, 0.0, 0.0, 2.0])
    s = scores.clone().requires_grad_()
    expected = s.new_zeros(())
    gains = 2 ** labels.double() - 1
    discounts = 1 / torch.log2(torch.arange(2, 6, dtype=torch.float64))
    ideal = (gains.sort(descending=True).values * discounts).sum()
    for order in torch.cartesian_prod(*[torch.arange(4)] * 4):
        if len(set(order.tolist())) == 4:
            ordered = s[order]
            log_probability = sum(ordered[k] - ordered[k:].logsumexp(0) for k in range(4))
            expected = expected - log_probability.exp() * (gains[order] * discounts).sum() / ideal
    (exact,) = torch.autograd.grad(expected, s)
    repeat = 4000
    data = Lists(scores.repeat(repeat), labels.repeat(repeat), torch.arange(0, 4 * repeat + 1, 4), None)
    _, grad = loss_and_grad(data, "pg_rank", reduction="mean", num_samples=4)
    per_item = grad.view(repeat, 4).double() * repeat
    spread = per_item.std(dim=0) / repeat**0.5
    assert ((per_item.mean(dim=0) - exact).abs() < 5 * spread).all()


def _extra_memory(script: str) -> float:
    import subprocess
    import sys

    code = f"""
import resource, torch, rankernel
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def run(n, kind):
    torch.manual_seed(0)
    scores = torch.randn(n, requires_grad=True)
    rankernel.listwise_loss(scores, torch.rand(n), torch.tensor([0, n]), kind).backward()
run(1000, "ranknet"); run(1000, "listmle")
before = peak()
{script}
print(peak() - before)
"""
    return float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)


def test_memory_is_linear() -> None:
    """A matrix of 50,000 x 50,000 floats would be 9,537 MiB."""
    assert _extra_memory('run(50_000, "ranknet")') < 120
    assert _extra_memory('run(200_000, "listmle")') < 120


def test_long_lists() -> None:
    """Several parts of a scan and of the pairs, against PyTorch formulas that fit in memory."""
    generator = torch.Generator().manual_seed(8)
    n = 70_000
    scores, labels = 30 * torch.randn(n, generator=generator), torch.rand(n, generator=generator)
    data = Lists(scores.double(), labels.double(), torch.tensor([0, n]), None)
    for kind in ("listmle", "p_listmle", "softmax", "skip_ranknet"):
        truth = loss_and_grad(data, kind, torch.float64)
        eager = loss_and_grad(data, kind, torch.float32, "reference")
        ours = loss_and_grad(data, kind)
        assert_close(ours[0], eager[0], truth[0], kind)
        assert_close(ours[1], eager[1], truth[1], kind)
    short = Lists(data.scores[:6000], data.labels[:6000], torch.tensor([0, 6000]), None)
    for spread in (0.2, 1.0):
        short.scores = data.scores[:6000] * spread
        truth = loss_and_grad(short, "ranknet", torch.float64)
        ours = loss_and_grad(short, "ranknet")
        torch.testing.assert_close(ours[0].double(), truth[0], rtol=1e-6, atol=0)
        torch.testing.assert_close(ours[1].double(), truth[1], rtol=0, atol=1e-6 * truth[1].abs().max().item())


# What PyTorch asks of an op.


@every_kind
def test_opcheck(kind: str) -> None:
    data = random_lists([4, 0, 3], seed=9, masked=True)
    op = torch.ops.rankernel.listwise_loss.default
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for reduction in (0, 2):
            settings = rankernel.listwise.settings_of(KINDS[kind], None, None, {})[1]
            scores = data.scores.to(dtype).nan_to_num(0.5).requires_grad_()
            labels = data.labels.nan_to_num(1.0)
            inputs = (scores, labels, data.offsets, data.where, KINDS[kind].index, reduction, list(settings), 3)
            torch.library.opcheck(op, inputs)


def test_compiled_in_one_graph_for_any_lists() -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()

    @torch.compile(backend=graphs, fullgraph=True, dynamic=True)
    def step(x: torch.Tensor, labels: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
        return (
            rankernel.listwise_loss(2 * x, labels, offsets, "ranknet")
            + rankernel.listwise_loss(x, labels, offsets, "listmle", reduction="none").sum()
        )

    for lengths in ([3, 4, 5], [7, 2, 9], [30, 1, 4, 6]):
        data = random_lists(lengths, seed=10)
        x = data.scores.float().requires_grad_()
        step(x, data.labels, data.offsets).backward()
        y = data.scores.float().requires_grad_()
        ranknet = rankernel.listwise_loss(2 * y, data.labels, data.offsets, "ranknet")
        losses = rankernel.listwise_loss(y, data.labels, data.offsets, "listmle", reduction="none")
        (ranknet + losses.sum()).backward()
        assert torch.equal(x.grad, y.grad)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inductor_gradients(dtype: torch.dtype) -> None:
    torch._dynamo.reset()
    data = random_lists([6, 9], seed=11)

    def step(x: torch.Tensor) -> torch.Tensor:
        return rankernel.listwise_loss(x.sin(), data.labels, data.offsets, "lambdarank", convention="allrank")

    grads = []
    for function in (step, torch.compile(step, fullgraph=True)):
        x = data.scores.to(dtype).requires_grad_()
        function(x).backward()
        grads.append(x.grad)
    torch.testing.assert_close(*grads)


def test_autocast_and_checkpointing() -> None:
    data = random_lists([8, 8], seed=12)
    weight = torch.randn(16, 16, generator=torch.Generator().manual_seed(0), requires_grad=True)
    inputs = torch.randn(16, 16, generator=torch.Generator().manual_seed(1))

    def loss(x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            scores = (x @ weight).sum(dim=1)
            return rankernel.listwise_loss(scores, data.labels, data.offsets, "ndcg_loss2pp")

    direct = loss(inputs)
    assert direct.dtype == torch.float32
    (expected,) = torch.autograd.grad(direct, weight)
    again = torch.utils.checkpoint.checkpoint(loss, inputs, use_reentrant=False)
    (recomputed,) = torch.autograd.grad(again, weight)
    assert torch.equal(recomputed, expected)


def test_strides_and_integer_labels() -> None:
    data = random_lists([6, 10], seed=13)
    plain, plain_grad = loss_and_grad(data, "lambdarank")
    wide = torch.stack([data.scores.float(), data.scores.float()], dim=1).requires_grad_()
    loss = rankernel.listwise_loss(wide[:, 0], data.labels.long().to(torch.uint8), data.offsets.int(), "lambdarank")
    loss.backward()
    assert torch.equal(loss, plain)
    assert torch.equal(wide.grad[:, 0], plain_grad)


def test_gradient_of_none_follows_each_list() -> None:
    data = random_lists([4, 6], seed=14)
    scores = data.scores.float().requires_grad_()
    losses = rankernel.listwise_loss(scores, data.labels, data.offsets, "ranknet", reduction="none")
    (losses * torch.tensor([2.0, -3.0])).sum().backward()
    for number, factor in ((0, 2.0), (1, -3.0)):
        begin, end = data.offsets[number : number + 2].tolist()
        _, grad = loss_and_grad(data.alone(number), "ranknet")
        torch.testing.assert_close(scores.grad[begin:end], factor * grad)


def test_conventions() -> None:
    data = random_lists([5, 9, 3], seed=15)
    pooled = loss_and_grad(data, "ranknet", convention="rax")[0]
    assert pooled == loss_and_grad(data, "ranknet", reduction="pair_mean")[0]
    assert pooled != loss_and_grad(data, "ranknet")[0]
    bits = loss_and_grad(data, "lambdarank", convention="allrank")[0]
    nats = loss_and_grad(data, "lambdarank", convention="tfr")[0]
    assert bits.item() == pytest.approx(3 * nats.item() / 0.6931471805599453, rel=1e-5)
    assert loss_and_grad(data, "approx_ndcg", convention="rax")[0] == loss_and_grad(data, "approx_ndcg")[0]


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"kind": "pairwise"}, ValueError, "kind"),
        ({"reduction": "batchmean"}, ValueError, "reduction"),
        ({"reduction": "pair_mean", "kind": "listnet"}, ValueError, "pair_mean"),
        ({"reduction": "pair_mean", "pair_reduction": "mean"}, ValueError, "pair_reduction"),
        ({"convention": "xgboost"}, ValueError, "convention"),
        ({"temperature": 1.0}, ValueError, "temperature"),
        ({"sigma": 0.0}, ValueError, "sigma"),
        ({"sigma": float("nan")}, ValueError, "sigma"),
        ({"sigma": [1.0]}, ValueError, "sigma"),
        ({"kind": "lambdarank", "k": 0}, ValueError, "k"),
        ({"kind": "lambdarank", "k": True}, ValueError, "k"),
        ({"kind": "soft_topk", "k": None}, ValueError, "k"),
        ({"log_base": 1.0}, ValueError, "log_base"),
        ({"scores": torch.zeros(2, 3)}, ValueError, "scores"),
        ({"scores": torch.zeros(6, dtype=torch.int64)}, TypeError, "scores"),
        ({"labels": torch.zeros(5)}, ValueError, "labels"),
        ({"labels": torch.zeros(6, dtype=torch.complex64)}, TypeError, "labels"),
        ({"where": torch.ones(6)}, TypeError, "where"),
        ({"where": torch.ones(5, dtype=torch.bool)}, ValueError, "where"),
        ({"offsets": torch.tensor([0.0, 6.0])}, TypeError, "offsets"),
        ({"offsets": torch.zeros(0, dtype=torch.int64)}, ValueError, "offsets"),
        ({"offsets": torch.tensor([[0, 6]])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 4, 3, 6])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([-1, 6])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 7])}, ValueError, "offsets"),
        ({"offsets": torch.tensor([0, 7]), "scores": torch.zeros(6, dtype=torch.float64)}, ValueError, "offsets"),
        ({"offsets": torch.tensor([2**62, 2**63 - 1])}, ValueError, "offsets"),
        ({"kind": "pg_rank", "seed": -1}, ValueError, "seed"),
        ({"kind": "pg_rank", "seed": 2**63}, ValueError, "seed"),
    ],
)
def test_bad_input(change: dict[str, object], error: type[Exception], match: str) -> None:
    arguments: dict[str, object] = {
        "scores": torch.zeros(6), "labels": torch.arange(6), "offsets": torch.tensor([0, 6]), "kind": "ranknet",
    }  # fmt: skip
    with pytest.raises(error, match=match):
        rankernel.listwise_loss(**{**arguments, **change})


@every_kind
@pytest.mark.usefixtures("isa")
def test_nan_and_infinite_scores_do_not_crash(kind: str) -> None:
    for bad in (torch.nan, torch.inf, -torch.inf):
        data = random_lists([40, 5], seed=16)
        data.scores[::3] = bad
        data.labels[::4] = bad
        loss_and_grad(data, kind)


def test_every_kind_has_its_variants() -> None:
    assert set(VARIANTS) == set(KINDS)
    assert {golden.kind for golden in GOLDEN.values()} <= set(KINDS)


def test_the_readme_lists_every_kind_with_its_defaults_and_conventions() -> None:
    rows = {}
    for line in (Path(__file__).parents[1] / "README.md").read_text().splitlines():
        if match := re.match(r"\| `(\w+)` \w+Loss \|", line):
            rows[match[1]] = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
    assert set(rows) == set(KINDS)
    for kind in KINDS.values():
        parameters, conventions = rows[kind.name][2:4]
        assert [p.split()[0] for p in parameters.split(", ") if p != "-"] == list(kind.defaults)
        assert [c for c in conventions.split(", ") if c != "-"] == list(kind.conventions)
