"""lora_linear and its forms: values and every gradient against float64, and what PyTorch asks of an op."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from attention_cases import DTYPES, assert_close
from rankernel import backends, lora_linear, lora_update, multi_lora_linear, reference, segment_lora_linear
from rankernel.reference.lora_linear import Dropout

ADAPTER_DTYPES = [(dtype, factor) for dtype in DTYPES for factor in dict.fromkeys((dtype, torch.float32))]
Leaves = dict[str, torch.Tensor]


def normal(generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@dataclass
class Problem:
    """Float64 leaves that every dtype is tried on; ``apply`` computes ours, ``eager`` what PEFT does."""

    leaves: Leaves
    apply: Callable[[Leaves], torch.Tensor]
    eager: Callable[[Leaves], torch.Tensor]

    def rounded(self, dtype: torch.dtype, adapters: torch.dtype) -> Leaves:
        of_adapter = ("lora_A", "lora_B", "gate")
        return {name: x.to(adapters if name.startswith(of_adapter) else dtype) for name, x in self.leaves.items()}


def results(
    function: Callable[[Leaves], torch.Tensor], leaves: Leaves, of_grad: Callable[..., torch.Tensor] = torch.clone
) -> dict[str, torch.Tensor]:
    """The result, and the gradients of all leaves for a random gradient of it."""
    leaves = {name: x.detach().clone().requires_grad_() for name, x in leaves.items()}
    out = function(leaves)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(7)).bfloat16().to(out.dtype)
    grads = torch.autograd.grad(out, list(leaves.values()), of_grad(grad))
    return {"out": out.detach(), **dict(zip(leaves, grads, strict=True))}


def check(problem: Problem, dtype: torch.dtype, adapters: torch.dtype) -> None:
    leaves = problem.rounded(dtype, adapters)
    wide = {name: x.double() for name, x in leaves.items()}
    truth, eager = results(problem.eager, wide), results(problem.eager, leaves)
    # What the terms of each sum add up to before they cancel.
    sizes = results(problem.eager, {name: x.abs() for name, x in wide.items()}, torch.abs)
    for isa in backends.available_isas():
        with backends.use(backend="cpu", isa=isa):
            ours = results(problem.apply, leaves)
        for name, found in ours.items():
            assert found.dtype == eager[name].dtype
            magnitude = float(sizes[name].abs().max()) if found.numel() else 0.0
            assert_close(found, eager[name], truth[name], f"{isa} {dtype} {adapters} {name}", magnitude)


def eager_linear(x: torch.Tensor, leaves: Leaves, scaling: float, dropout: Dropout | None = None) -> torch.Tensor:
    """PEFT's lora.Linear, with our dropout mask for its own and the gate that it lacks."""
    base = F.linear(x, leaves["weight"], leaves.get("bias"))
    rows = x.to(leaves["lora_A"].dtype)
    if dropout is not None:
        rows = rows * reference.keep_mask(x[..., 0].numel(), x.shape[-1], dropout).to(rows.dtype).view_as(rows)
    sums = F.linear(rows, leaves["lora_A"])
    if "gate" in leaves:
        sums = sums * leaves["gate"]
    return (base + F.linear(sums, leaves["lora_B"]) * scaling).to(base.dtype)


SIZES = st.one_of(st.integers(1, 40), st.sampled_from([64, 100, 129, 257]))
RANKS = st.one_of(st.integers(1, 20), st.sampled_from([32, 33, 64, 128, 256]))


@st.composite
def linear_problems(draw: st.DrawFn) -> Problem:
    rows = draw(st.sampled_from([(1,), (3,), (17,), (2, 5), (0,), (2, 33), (300,)]))
    size, out, rank = draw(SIZES), draw(SIZES), draw(RANKS)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leaves = {
        "x": normal(generator, *rows, size),
        "weight": normal(generator, out, size) / size**0.5,
        "lora_A": normal(generator, rank, size) / size**0.5,
        "lora_B": normal(generator, out, rank) / rank**0.5,
    }
    if draw(st.booleans()):
        leaves["bias"] = normal(generator, out)
    gate = draw(st.sampled_from([None, (rank,), (*rows, rank)]))
    if gate is not None:
        leaves["gate"] = normal(generator, *gate)
    scaling = draw(st.sampled_from([1.0, 0.25, -2.0]))
    dropout_p = draw(st.sampled_from([0.0, 0.0, 0.1, 0.6]))

    def apply(own: Leaves) -> torch.Tensor:
        return lora_linear(
            own["x"], own["weight"], own["lora_A"], own["lora_B"], scaling, bias=own.get("bias"),
            gate=own.get("gate"), dropout_p=dropout_p, generator=torch.Generator().manual_seed(5),
        )  # fmt: skip

    seed = torch.randint(2**63 - 1, (1,), generator=torch.Generator().manual_seed(5))
    dropout = Dropout(dropout_p, seed) if dropout_p else None
    return Problem(leaves, apply, lambda own: eager_linear(own["x"], own, scaling, dropout))


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=30)
@given(linear_problems(), st.sampled_from(ADAPTER_DTYPES))
def test_every_isa_and_dtype(problem: Problem, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(problem, *dtypes)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "size"), [(20000, 40), (40, 20000)])
def test_long_sums(rows: int, size: int, dtype: torch.dtype) -> None:
    """Of positive terms. A chain of so many additions, as PyTorch's own here, is off by 46 units; ours by up to 5."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"x": (rows, size), "weight": (40, size), "lora_A": (3, size), "lora_B": (40, 3)}
    wide = {name: torch.rand(shape, generator=generator, dtype=torch.float64) for name, shape in shapes.items()}
    leaves = {name: x.to(torch.float32 if name.startswith("lora") else dtype) for name, x in wide.items()}
    exact = {name: x.double() for name, x in leaves.items()}
    truth = results(lambda own: eager_linear(own["x"], own, 2.0), exact, torch.abs)

    def apply(own: Leaves) -> torch.Tensor:
        return lora_linear(own["x"], own["weight"], own["lora_A"], own["lora_B"], 2.0)

    for isa in backends.available_isas():
        with backends.use(isa=isa):
            for name, found in results(apply, leaves, torch.abs).items():
                error = (found.double() - truth[name]).abs().max() / truth[name].abs().max()
                assert error <= 8 * torch.finfo(found.dtype).eps, f"{isa} {name}"


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "adapters"), ADAPTER_DTYPES)
def test_update_of_a_given_base(dtype: torch.dtype, adapters: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    leaves = {
        "base": normal(generator, 2, 21, 30), "x": normal(generator, 2, 21, 37),
        "lora_A": normal(generator, 5, 37) / 6, "lora_B": normal(generator, 30, 5),
    }  # fmt: skip

    def apply(own: Leaves) -> torch.Tensor:
        return lora_update(own["base"] * 2, own["x"], own["lora_A"], own["lora_B"], -0.5)

    def eager(own: Leaves) -> torch.Tensor:
        rows = own["x"].to(own["lora_A"].dtype)
        return (own["base"] * 2 - F.linear(F.linear(rows, own["lora_A"]), own["lora_B"]) / 2).to(own["base"].dtype)

    check(Problem(leaves, apply, eager), dtype, adapters)
    with pytest.raises(ValueError, match=r"base: expected shape \[2, 'O'\]"):
        lora_update(torch.ones(3, 30), torch.ones(2, 37), torch.ones(5, 37), torch.ones(30, 5), 1.0)


@st.composite
def segment_problems(draw: st.DrawFn) -> Problem:
    """Adapters of different rank, some of rank 0, some without rows; segments of no, one and many rows."""
    size, out = draw(SIZES), draw(SIZES)
    ranks = draw(st.lists(st.one_of(st.integers(0, 20), st.just(64)), min_size=1, max_size=5))
    lengths = draw(st.lists(st.sampled_from([0, 1, 1, 2, 7, 40]), max_size=8))
    adapters = torch.tensor([draw(st.integers(-1, len(ranks) - 1)) for _ in lengths], dtype=torch.int64)
    offsets = torch.tensor([0, *lengths], dtype=draw(st.sampled_from([torch.int32, torch.int64]))).cumsum(0)
    scalings = [1.0, 0.5, -2.0, 3.0, 0.25][: len(ranks)]
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    leaves = {"x": normal(generator, sum(lengths), size), "weight": normal(generator, out, size) / size**0.5}
    for number, rank in enumerate(ranks):
        leaves[f"lora_A{number}"] = normal(generator, rank, size) / size**0.5
        leaves[f"lora_B{number}"] = normal(generator, out, rank) / max(rank, 1) ** 0.5
    gate = draw(st.sampled_from([None, (max(ranks),), (sum(lengths), max(ranks))]))
    if gate is not None:
        leaves["gate"] = normal(generator, *gate)

    def together(own: Leaves) -> list[tuple[torch.Tensor, torch.Tensor, float]]:
        return [(own[f"lora_A{n}"], own[f"lora_B{n}"], scalings[n]) for n in range(len(ranks))]

    def apply(own: Leaves) -> torch.Tensor:
        return segment_lora_linear(own["x"], own["weight"], together(own), offsets, adapters, gate=own.get("gate"))

    def eager(own: Leaves) -> torch.Tensor:
        """PEFT's mixed batch."""
        parts = []
        for begin, end, adapter in zip(offsets[:-1], offsets[1:], adapters, strict=True):
            rows = own["x"][begin:end]
            if adapter < 0:
                parts.append(F.linear(rows, own["weight"]))
                continue
            lora_A, lora_B, scaling = together(own)[adapter]
            picked = {"weight": own["weight"], "lora_A": lora_A, "lora_B": lora_B}
            if "gate" in own:
                picked["gate"] = (own["gate"] if own["gate"].dim() == 1 else own["gate"][begin:end])[..., : len(lora_A)]
            parts.append(eager_linear(rows, picked, scaling))
        # Every leaf takes part, if only with a gradient of zero.
        return torch.cat([*parts, own["x"][:0] @ own["weight"].T]) + sum(0 * leaf.sum() for leaf in own.values())

    return Problem(leaves, apply, eager)


@pytest.mark.usefixtures("poisoned_memory")
@settings(max_examples=30)
@given(segment_problems(), st.sampled_from(ADAPTER_DTYPES))
def test_segments(problem: Problem, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    check(problem, *dtypes)


@pytest.mark.usefixtures("poisoned_memory")
@pytest.mark.parametrize(("dtype", "adapters"), ADAPTER_DTYPES)
def test_several_layers_on_one_input(dtype: torch.dtype, adapters: torch.dtype) -> None:
    """Layers with two adapters, one and none."""
    generator = torch.Generator().manual_seed(0)
    sizes, projections, ranks, scalings = [48, 16, 31], [0, 0, 2], [5, 16, 1], [1.0, -2.0, 0.5]
    leaves = {"x": normal(generator, 2, 21, 37)}
    leaves |= {f"weight{p}": normal(generator, size, 37) / 6 for p, size in enumerate(sizes)}
    leaves |= {"bias1": normal(generator, 16)}
    for t, (projection, rank) in enumerate(zip(projections, ranks, strict=True)):
        leaves[f"lora_A{t}"] = normal(generator, rank, 37) / 6
        leaves[f"lora_B{t}"] = normal(generator, sizes[projection], rank) / rank**0.5

    def apply(own: Leaves) -> torch.Tensor:
        outs = multi_lora_linear(
            own["x"], [own[f"weight{p}"] for p in range(3)], [own[f"lora_A{t}"] for t in range(3)],
            [own[f"lora_B{t}"] for t in range(3)], scalings, biases=[None, own["bias1"], None], projections=projections,
        )  # fmt: skip
        return torch.cat(outs, dim=-1)

    def eager(own: Leaves) -> torch.Tensor:
        outs = []
        for p in range(3):
            base = F.linear(own["x"], own[f"weight{p}"], own.get(f"bias{p}"))
            out = base
            for t in range(3):
                if projections[t] == p:
                    rows = own["x"].to(own[f"lora_A{t}"].dtype)
                    out = out + F.linear(F.linear(rows, own[f"lora_A{t}"]), own[f"lora_B{t}"]) * scalings[t]
            outs.append(out.to(base.dtype))
        return torch.cat(outs, dim=-1)

    check(Problem(leaves, apply, eager), dtype, adapters)


def random_adapter(size: int, out: int, rank: int, seed: int = 0) -> Leaves:
    generator = torch.Generator().manual_seed(seed)
    return {
        "weight": normal(generator, out, size).float() / size**0.5,
        "lora_A": normal(generator, rank, size).float() / size**0.5,
        "lora_B": normal(generator, out, rank).float(),
    }


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_do_not_depend_on_the_batch(dtype: torch.dtype) -> None:
    """Bit by bit, the base product aside, which is PyTorch's; gradients of an adapter neither."""
    generator = torch.Generator().manual_seed(0)
    adapters = []
    for number, rank in enumerate((16, 3, 40)):
        own = random_adapter(70, 50, rank, number)
        adapters.append((own["lora_A"].requires_grad_(), own["lora_B"].requires_grad_(), 0.5))
    weight = torch.zeros(50, 70, dtype=dtype)
    x = normal(generator, 90, 70).to(dtype).requires_grad_()
    offsets, chosen = torch.tensor([0, 20, 21, 60, 90]), torch.tensor([2, 0, 1, 2])

    def run(rows: torch.Tensor, offsets: torch.Tensor, chosen: torch.Tensor) -> list[torch.Tensor]:
        out = segment_lora_linear(rows, weight, adapters, offsets, chosen)
        grad = torch.linspace(-1, 1, 50).to(dtype).expand_as(out)
        leaves = [rows, *(leaf for a, b, _ in adapters for leaf in (a, b))]
        return [out, *torch.autograd.grad(out, leaves, grad)]

    together = run(x, offsets, chosen)
    for begin, end, adapter in zip(offsets[:-1].tolist(), offsets[1:].tolist(), chosen.tolist(), strict=True):
        alone = run(x.detach()[begin:end].requires_grad_(), torch.tensor([0, end - begin]), torch.tensor([adapter]))
        assert torch.equal(alone[0], together[0][begin:end])
        assert torch.equal(alone[1], together[1][begin:end])
        if adapter != 2:  # whose rows are in two segments
            for place in (2 + 2 * adapter, 3 + 2 * adapter):
                assert torch.equal(alone[place], together[place])


@pytest.mark.usefixtures("isa")
def test_repeatable_and_gate_of_ones() -> None:
    own = random_adapter(100, 80, 24)
    x = torch.randn(130, 100, generator=torch.Generator().manual_seed(1)).bfloat16()
    leaves = {"x": x, **own, "weight": own["weight"].bfloat16()}

    def plain(own: Leaves, **options: object) -> torch.Tensor:
        return lora_linear(own["x"], own["weight"], own["lora_A"], own["lora_B"], 0.5, **options)

    first = results(plain, leaves)
    for gate in (None, torch.ones(24), torch.ones(130, 24)):
        again = results(lambda own, gate=gate: plain(own, gate=gate), leaves)
        for name, found in first.items():
            assert torch.equal(found, again[name]), name


def test_dropout_is_seeded_and_unbiased() -> None:
    own = random_adapter(256, 40, 8)
    x = torch.ones(4000, 256)
    weight = torch.zeros(40, 256)

    def run(generator: torch.Generator | None = None) -> torch.Tensor:
        return lora_linear(x, weight, own["lora_A"], own["lora_B"], 1.0, dropout_p=0.3, generator=generator)

    torch.manual_seed(3)
    first, second = run(), run()
    torch.manual_seed(3)
    assert torch.equal(run(), first)
    assert not torch.equal(first, second)
    assert torch.equal(run(torch.Generator().manual_seed(1)), run(torch.Generator().manual_seed(1)))
    exact = lora_linear(x, weight, own["lora_A"], own["lora_B"], 1.0)[0]
    spread = first.std(dim=0) / 4000**0.5
    assert ((first.mean(dim=0) - exact).abs() < 5 * spread).all()
    dropped = reference.keep_mask(500, 1000, Dropout(0.3, torch.tensor([12]))) == 0
    assert abs(dropped.double().mean() - 0.3) < 0.003


def test_philox_known_answer() -> None:
    """Random123's kat_vectors: philox4x32-10 of counter 0 and key 0 is 6627e8d5 e169c58d bc57ac4c 9b00dbd8."""
    with_bits = [reference.keep_mask(1, 128, Dropout(t / 65536, torch.tensor([0]))) for t in (0xE8D5, 0xE8D6)]
    assert with_bits[0][0, 0] > 0
    assert with_bits[1][0, 0] == 0  # low half of the first word
    with_bits = [reference.keep_mask(1, 128, Dropout(t / 65536, torch.tensor([0]))) for t in (0x9B00, 0x9B01)]
    assert with_bits[0][0, 112] > 0
    assert with_bits[1][0, 112] == 0  # high half of the last


def test_gradients_in_float64() -> None:
    with backends.use(backend="reference"):
        generator = torch.Generator().manual_seed(0)
        shapes = [(2, 5, 7), (9, 7), (3, 7), (9, 3), (9,), (2, 5, 3)]
        leaves = [normal(generator, *shape).requires_grad_() for shape in shapes]

        def function(x: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *rest: torch.Tensor):
            seed = torch.Generator().manual_seed(2)
            return lora_linear(x, weight, a, b, 0.7, bias=rest[0], gate=rest[1], dropout_p=0.3, generator=seed)

        assert torch.autograd.gradcheck(function, leaves)


def test_weight_made_when_needed() -> None:
    """Once in each pass, never kept: quantised weights."""
    own = random_adapter(64, 32, 4)
    made: list[int] = []

    def make() -> torch.Tensor:
        made.append(1)
        return own["weight"].clone()

    x = torch.randn(10, 64)
    lora_A, lora_B = own["lora_A"], own["lora_B"]
    found = results(lambda leaves: lora_linear(leaves["x"], make, leaves["a"], leaves["b"], 2.0),
                    {"x": x, "a": lora_A, "b": lora_B})  # fmt: skip
    assert len(made) == 2
    expected = results(lambda leaves: lora_linear(leaves["x"], own["weight"], leaves["a"], leaves["b"], 2.0),
                       {"x": x, "a": lora_A, "b": lora_B})  # fmt: skip
    for name, value in expected.items():
        assert torch.equal(found[name], value)
    learning = own["weight"].clone().requires_grad_()
    for step in (lora_linear, torch.compile(lora_linear, backend="aot_eager")):
        step(x, lambda: learning * 2, lora_A.requires_grad_(), lora_B, 2.0).sum().backward()
        assert learning.grad is None


@pytest.mark.usefixtures("isa")
def test_strides_and_gradients_not_wanted() -> None:
    """Transposed adapters and prefixes of ranks, inputs with gaps, only some leaves that learn."""
    own = random_adapter(40, 30, 8)
    x = torch.randn(25, 90)[:, ::2][:, :40]
    lora_A, lora_B = own["lora_A"].T.contiguous().T[:5], own["lora_B"].T.contiguous().T[:, :5]
    expected = F.linear(x, own["weight"]) + F.linear(F.linear(x, lora_A), lora_B)
    torch.testing.assert_close(lora_linear(x, own["weight"], lora_A, lora_B, 1.0), expected)
    for wanted in ("lora_A", "lora_B", "x", "weight"):
        leaves = {"x": x, "weight": own["weight"], "lora_A": lora_A, "lora_B": lora_B}
        leaf = leaves[wanted] = leaves[wanted].detach().clone().requires_grad_()
        out = lora_linear(leaves["x"], leaves["weight"], leaves["lora_A"], leaves["lora_B"], 1.0)
        truth = F.linear(leaves["x"], leaves["weight"]) + leaves["x"] @ leaves["lora_A"].T @ leaves["lora_B"].T
        (found,), (right,) = (torch.autograd.grad(y.square().sum(), leaf) for y in (out, truth))
        torch.testing.assert_close(found, right, atol=1e-3, rtol=1e-4)


def test_expanded_gradient_and_unused_layers() -> None:
    own, other = random_adapter(20, 30, 4), random_adapter(20, 10, 2, 1)
    x = torch.randn(6, 20).requires_grad_()
    first, second = multi_lora_linear(
        x, [own["weight"], other["weight"]], [own["lora_A"], other["lora_A"].requires_grad_()],
        [own["lora_B"], other["lora_B"]], [1.0, 1.0],
    )  # fmt: skip
    first.sum().backward(retain_graph=True)
    expected = own["weight"].sum(0) + own["lora_B"].sum(0) @ own["lora_A"]
    torch.testing.assert_close(x.grad, expected.expand(6, 20))
    assert not other["lora_A"].grad.any()
    second.sum().backward()
    assert other["lora_A"].grad.any()


def test_empty() -> None:
    for backend in ("cpu", "reference"):
        with backends.use(backend=backend):
            for rows, size, out, rank in ((0, 4, 5, 2), (3, 0, 5, 2), (3, 4, 0, 2), (3, 4, 5, 0)):
                leaves = {
                    "x": torch.randn(rows, size), "weight": torch.randn(out, size), "lora_A": torch.randn(rank, size),
                    "lora_B": torch.randn(out, rank),
                }  # fmt: skip
                found = results(lambda own: lora_linear(own["x"], own["weight"], own["lora_A"], own["lora_B"], 1.0),
                                leaves)  # fmt: skip
                expected = results(lambda own: eager_linear(own["x"], own, 1.0), leaves)
                for name, value in expected.items():
                    torch.testing.assert_close(found[name], value, msg=f"{name} {rows, size, out, rank}")
            out = segment_lora_linear(
                torch.randn(0, 4), torch.randn(5, 4), [], torch.tensor([0]), torch.tensor([], dtype=torch.int64)
            )
            assert out.shape == (0, 5)


BAD = {
    "x: expected a floating-point": (TypeError, {"x": torch.zeros(3, 8, dtype=torch.int64)}),
    "weight: expected the dtype of x": (TypeError, {"weight": torch.zeros(6, 8, dtype=torch.bfloat16)}),
    r"weight: expected shape \[O, 8\]": (ValueError, {"weight": torch.zeros(6, 7)}),
    "lora_A: expected torch.float32 as x or torch.float32": (
        TypeError, {"lora_A": torch.zeros(2, 8, dtype=torch.bfloat16)},
    ),
    r"lora_A: expected shape \[r, 8\]": (ValueError, {"lora_A": torch.zeros(2, 9)}),
    "lora_B: expected the dtype of lora_A": (TypeError, {"lora_B": torch.zeros(6, 2, dtype=torch.bfloat16)}),
    r"lora_B: expected shape \[6, 2\]": (ValueError, {"lora_B": torch.zeros(6, 3)}),
    "scaling: expected a finite number": (ValueError, {"scaling": float("nan")}),
    "bias: expected the dtype of x": (TypeError, {"bias": torch.zeros(6, dtype=torch.float64)}),
    r"bias: expected shape \[6\]": (ValueError, {"bias": torch.zeros(5)}),
    r"gate: expected shape \[2\] or \[3, 2\]": (ValueError, {"gate": torch.zeros(5)}),
    "gate: expected a floating-point": (TypeError, {"gate": torch.zeros(2, dtype=torch.bool)}),
    r"gate: expected shape \[r\] or \[3, 'r'\]": (ValueError, {"gate": torch.zeros(4, 2)}),
    r"dropout_p: expected a probability in \[0, 1\)": (ValueError, {"dropout_p": 1.0}),
}  # fmt: skip


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_bad_input(message: str, backend: str) -> None:
    error, changes = BAD[message]
    arguments = {
        "x": torch.ones(3, 8), "weight": torch.ones(6, 8), "lora_A": torch.ones(2, 8), "lora_B": torch.ones(6, 2),
        "scaling": 1.0,
    } | changes  # fmt: skip
    with backends.use(backend=backend), pytest.raises(error, match=message):
        lora_linear(**arguments)


@pytest.mark.parametrize(
    ("offsets", "chosen", "message"),
    [
        ([0, 3], [0, 1], "segment_offsets: expected 3 numbers"),
        ([0.0, 3.0], [0], "segment_offsets: expected int64 or int32"),
        ([[0, 3]], [0], "segment_offsets: expected 1 dimension"),
        ([0, 2], [0], "offsets that rise from 0 to 3"),
        ([1, 3], [0], "offsets that rise from 0 to 3"),
        ([0, 4, 3], [0, 0], "offsets that rise from 0 to 3"),
        ([0, 3], [2], r"adapters in \[-1, 2\)"),
        ([0, 3], [-2], r"adapters in \[-1, 2\)"),
    ],
)
def test_bad_segments(offsets: list[int], chosen: list[int], message: str) -> None:
    own = random_adapter(8, 6, 2)
    adapters = [(own["lora_A"], own["lora_B"], 1.0)] * 2
    error = TypeError if "int32" in message else ValueError
    with pytest.raises(error, match=message):
        segment_lora_linear(torch.ones(3, 8), own["weight"], adapters, torch.tensor(offsets), torch.tensor(chosen))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scalings": [1.0]}, "scalings: expected 2"),
        ({"lora_A": []}, "lora_A: expected 2"),
        ({"biases": [None]}, "biases: expected 2"),
        ({"projections": [1, 0]}, "projections: expected rising numbers"),
        ({"projections": [0, 2]}, "projections: expected rising numbers"),
    ],
)
def test_bad_lists(changes: dict[str, object], message: str) -> None:
    own = random_adapter(8, 6, 2)
    arguments = {name: [tensor] * 2 for name, tensor in own.items()}
    arguments["weights"] = arguments.pop("weight")
    with pytest.raises(ValueError, match=message):
        multi_lora_linear(torch.ones(3, 8), **(arguments | {"scalings": [1.0, 1.0]} | changes))


# What PyTorch asks of an op.


def test_opcheck() -> None:
    op = torch.ops.rankernel.lora_linear.default
    own, other = random_adapter(16, 10, 3), random_adapter(16, 6, 2, 1)
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(7, 16).to(dtype).requires_grad_()
        weights = [own["weight"].to(dtype).requires_grad_(), other["weight"].to(dtype)]
        lora_A = [adapter["lora_A"].requires_grad_() for adapter in (own, other)]
        lora_B = [adapter["lora_B"].requires_grad_() for adapter in (own, other)]
        biases = [torch.randn(10).to(dtype).requires_grad_(), x.new_empty(0)]
        torch.library.opcheck(
            op,
            (x, weights, biases, lora_A, lora_B, None, [0.5, 2.0], [0, 1], None, None, 0.2, torch.tensor([9]), False),
        )
        gate = torch.rand(7, 3).requires_grad_()
        segments = torch.tensor([0, 2, 7]), torch.tensor([0, -1])
        torch.library.opcheck(
            op, (x, weights[:1], biases[:1], lora_A[:1], lora_B[:1], gate, [0.5], [0], *segments, 0.0, None, False)
        )
        base = torch.randn(7, 10).to(dtype).requires_grad_()
        torch.library.opcheck(
            op, (x, [base], [x.new_empty(0)], lora_A[:1], lora_B[:1], None, [0.5], [0], None, None, 0.0, None, True)
        )


def test_compiled_in_one_graph_for_any_batch() -> None:
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend("aot_eager")
    own = random_adapter(16, 10, 3)
    gate = torch.rand(3)

    def step(x: torch.Tensor, lora_A: torch.Tensor, lora_B: torch.Tensor) -> torch.Tensor:
        y = lora_linear(x.sin(), own["weight"], lora_A, lora_B, 0.5, gate=gate)
        offsets, chosen = torch.tensor([0, 2, x.shape[0]]), torch.tensor([0, -1])
        return y.square() + segment_lora_linear(x, own["weight"], [(lora_A, lora_B, 1.0)], offsets, chosen)

    compiled = torch.compile(step, backend=graphs, fullgraph=True)
    for rows in (3, 5, 9):
        found = []
        for function in (step, compiled):
            leaves = {"x": torch.arange(rows * 16.0).view(rows, 16), "a": own["lora_A"], "b": own["lora_B"]}
            found.append(results(lambda own, function=function: function(own["x"], own["a"], own["b"]), leaves))
        for name, value in found[0].items():
            assert torch.equal(found[1][name], value), name
    assert graphs.frame_count == 2  # the first number of rows, then any


def test_inductor_with_dropout() -> None:
    torch._dynamo.reset()
    own = random_adapter(16, 10, 3)
    x = torch.randn(5, 16)

    def step(lora_A: torch.Tensor) -> torch.Tensor:
        return lora_linear(x, own["weight"], lora_A, own["lora_B"], 0.5, dropout_p=0.5)

    compiled = torch.compile(step, fullgraph=True)
    lora_A = own["lora_A"].requires_grad_()
    first = compiled(lora_A)
    assert not torch.equal(first, compiled(lora_A))
    (grad,) = torch.autograd.grad(first.sum(), lora_A)
    mask = grad / (0.5 * own["lora_B"].sum(0))[:, None]  # dA = dS^T (mask * x), and dS has equal rows
    torch.testing.assert_close(mask[0], mask[2])


def test_autocast_and_checkpointing() -> None:
    own = random_adapter(16, 10, 3)
    x = torch.randn(5, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = lora_linear(x, own["weight"], own["lora_A"], own["lora_B"], 0.5, bias=torch.ones(10))
    narrow = lora_linear(
        x.bfloat16(), own["weight"].bfloat16(), own["lora_A"], own["lora_B"], 0.5, bias=torch.ones(10).bfloat16()
    )
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, narrow)

    def step(leaves: Leaves) -> torch.Tensor:
        return lora_linear(leaves["x"], own["weight"], leaves["a"], own["lora_B"], 0.5, dropout_p=0.4)

    leaves = {"x": x, "a": own["lora_A"]}
    torch.manual_seed(0)
    plain = results(step, leaves)
    torch.manual_seed(0)
    saved = results(lambda own: torch.utils.checkpoint.checkpoint(step, own, use_reentrant=False), leaves)
    for name, value in plain.items():
        assert torch.equal(saved[name], value)


def test_float64_runs_the_reference() -> None:
    own = {name: x.double() for name, x in random_adapter(8, 6, 2).items()}
    x = torch.ones(3, 8, dtype=torch.float64)
    with pytest.warns(UserWarning, match="no kernel for torch.float64"):
        out = lora_linear(x, own["weight"], own["lora_A"], own["lora_B"], 1.0)
    assert out.dtype == torch.float64
    with backends.use(backend="cpu"), pytest.raises(NotImplementedError, match="no kernel for"):
        lora_linear(x, own["weight"], own["lora_A"], own["lora_B"], 1.0)


def test_memory_is_that_of_the_results() -> None:
    """x is 64 MiB. Beside the results (64 MiB forward, dx backward) there are only sums and parts of gradients."""
    script = """
import torch, rankernel
from torch.profiler import profile, ProfilerActivity
x = torch.randn(16384, 2048).bfloat16().requires_grad_()
weight = torch.randn(2048, 2048).bfloat16()
a, b = torch.randn(16, 2048, requires_grad=True), torch.randn(2048, 16, requires_grad=True)
import resource
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
def step(rows):
    out = rankernel.lora_linear(rows, weight, a, b, 1.0, dropout_p=0.1)
    return torch.autograd.grad(out, (x, a, b), out.detach())
base = torch.nn.functional.linear(x, weight)
torch.autograd.grad(base, x, base.detach())
del base
before = peak()
step(x)
print(peak() - before)
"""
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert float(output) < 64
