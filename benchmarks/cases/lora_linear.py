"""Linear layers with LoRA adapters of rank 16 against PEFT's layers and against the frozen layer without adapters.

Weights are frozen, adapters learn, and x needs a gradient, as behind the first layer of a model. Every call returns
the layer's results and, with a backward pass, the gradients of x and of all adapters. The values of the adapters are
those of the dtype of x, whichever dtype they are stored in.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import rankernel
from measure import Call, Case, Expected, Finding, Implementation, Problem
from rankernel.reference.lora_linear import Dropout, keep_mask

OP = "lora_linear"
FROZEN = "frozen linear"
RANK, SCALING = 16, 2.0
NUM_ADAPTERS = 16  # of a mixed batch
NATIVE = {"cpu": {"rankernel": "cpu"}, "cuda": {"rankernel triton": "triton", "rankernel cuda": "cuda"}}
"""Names and backends of rankernel's rows by device."""

Layer = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Of x; the results of one or several linear layers."""
Results = Callable[[], tuple[torch.Tensor, ...]]
Adapters = Sequence[tuple[torch.Tensor, torch.Tensor]]
"""lora_A [r, I] and lora_B [O, r] of each layer."""


@dataclass(frozen=True)
class Shape:
    """Rows of x, its size, and the sizes of the layers that share it."""

    rows: int
    inputs: int
    outputs: tuple[int, ...]
    backward: bool = True
    dropout: float = 0.0

    @property
    def base_work(self) -> int:
        """Floating-point operations of the frozen layers, with dx where there is a backward pass."""
        return 2 * self.rows * self.inputs * sum(self.outputs) * (2 if self.backward else 1)

    @property
    def work(self) -> int:
        """The same with the adapters: x A^T and its product with B^T, backward dS, dB, dA and their part of dx."""
        products = sum(self.inputs + size for size in self.outputs)
        return self.base_work + 2 * self.rows * RANK * products * (3 if self.backward else 1)

    def __str__(self) -> str:
        sizes = ", ".join(map(str, self.outputs))
        passes = "forward and backward" if self.backward else "forward"
        dropout = f", dropout {self.dropout}" if self.dropout else ""
        return f"{self.rows} x {self.inputs} -> {sizes}, rank {RANK}{dropout}, {passes}"


def normal(seed: int, *size: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """Normal numbers, the same on every device."""
    return torch.randn(size, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def adapter_dtypes(dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What the adapters may be stored in, by the end of a row's name: float32, PEFT's default, or the dtype of x."""
    return {"": torch.float32} | ({} if dtype == torch.float32 else {f" {str(dtype)[6:]} adapters": dtype})


def expected_of(exact: Results, eager: Results, count: int) -> tuple[Expected, ...]:
    """One for each of ``count`` tensors; both functions are called once."""
    exact, eager = cache(exact), cache(eager)

    def one(place: int) -> Expected:
        return Expected(lambda: exact()[place], lambda: eager()[place])

    return tuple(map(one, range(count)))


class Inputs:
    """x, frozen weights, adapters, and gradients of the results; made when first used."""

    def __init__(self, shape: Shape, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._normal = partial(normal, device=device, dtype=dtype)

    @cached_property
    def x(self) -> torch.Tensor:
        """[N, I]"""
        return self._normal(0, self.shape.rows, self.shape.inputs)

    @cached_property
    def weights(self) -> list[torch.Tensor]:
        """[O, I] each"""
        size = self.shape.inputs
        return [self._normal(10 + place, out, size) / size**0.5 for place, out in enumerate(self.shape.outputs)]

    @cached_property
    def grads(self) -> list[torch.Tensor]:
        """[N, O] each, of the results"""
        return [self._normal(20 + place, self.shape.rows, out) for place, out in enumerate(self.shape.outputs)]

    @cached_property
    def _factors(self) -> Adapters:
        size = self.shape.inputs
        return [
            (self._normal(30 + place, RANK, size) / size**0.5, self._normal(40 + place, out, RANK) / RANK**0.5)
            for place, out in enumerate(self.shape.outputs)
        ]

    def adapters(self, dtype: torch.dtype) -> Adapters:
        """New leaves."""
        return [
            (lora_A.detach().to(dtype).requires_grad_(), lora_B.detach().to(dtype).requires_grad_())
            for lora_A, lora_B in self._factors
        ]

    def call(self, layer: Layer, leaves: Iterable[torch.Tensor], dtype: torch.dtype | None = None) -> Results:
        """One forward and, where asked, one backward pass: results, gradient of x, gradients of ``leaves``."""
        x = self.x.detach().to(dtype or self.dtype).requires_grad_()
        learning, grads = [x, *leaves], [grad.to(x.dtype) for grad in self.grads]

        def call() -> tuple[torch.Tensor, ...]:
            if self.shape.dropout:
                self.generator.manual_seed(0)
            with torch.enable_grad():
                outs = layer(x)
                if not self.shape.backward:
                    return tuple(outs)
                return (*outs, *torch.autograd.grad(outs, learning, grads))

        return call

    @property
    def generator(self) -> torch.Generator:
        """The default one, which dropout draws from."""
        return torch.default_generator if self.device == "cpu" else torch.cuda.default_generators[0]

    def _mask(self, adapter_dtype: torch.dtype | None, of_peft: bool) -> torch.Tensor | float:
        """What dropout multiplies x with: rankernel's own, or PyTorch's on x in the dtype of the adapters."""
        if not self.shape.dropout or adapter_dtype is None:
            return 1.0
        self.generator.manual_seed(0)
        if of_peft:
            return F.dropout(torch.ones_like(self.x, dtype=adapter_dtype), self.shape.dropout)
        seed = torch.randint(2**63 - 1, (1,), device=self.device)
        return keep_mask(self.shape.rows, self.shape.inputs, Dropout(self.shape.dropout, seed))

    def expected(self, adapter_dtype: torch.dtype | None, of_peft: bool = False) -> tuple[Expected, ...]:
        """Of all tensors that ``call`` returns; ``None``: without adapters."""

        def results(dtype: torch.dtype, stored: torch.dtype) -> tuple[torch.Tensor, ...]:
            adapters = [] if adapter_dtype is None else self.adapters(stored)
            weights = [weight.to(dtype) for weight in self.weights]
            layer = partial(in_pytorch, weights, adapters, self._mask(adapter_dtype, of_peft))
            return self.call(layer, itertools.chain(*adapters), dtype)()

        layers = len(self.shape.outputs)
        gradients = 1 if adapter_dtype is None else 1 + 2 * layers
        return expected_of(
            lambda: results(torch.float64, torch.float64),
            lambda: results(self.dtype, adapter_dtype or self.dtype),
            layers + gradients if self.shape.backward else layers,
        )


def in_pytorch(
    weights: Sequence[torch.Tensor], adapters: Adapters, mask: torch.Tensor | float, x: torch.Tensor
) -> list[torch.Tensor]:
    """What PEFT computes, with a given dropout mask; the frozen layers where there are no adapters."""
    outs = [F.linear(x, weight) for weight in weights]
    for place, (lora_A, lora_B) in enumerate(adapters):
        dropped = (x.to(lora_A.dtype) * mask).to(lora_A.dtype)
        outs[place] = (outs[place] + F.linear(F.linear(dropped, lora_A), lora_B) * SCALING).to(x.dtype)
    return outs


def peft_model(weights: Sequence[torch.Tensor], adapters: Mapping[str, Adapters], dropout: float = 0.0) -> Any:
    """A ``PeftModel`` of frozen linear layers, each with an adapter of each name; ``layers_of`` gives the layers."""
    from peft import LoraConfig, get_peft_model

    linears = []
    for weight in weights:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linears.append(linear)
    config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), lora_dropout=dropout, target_modules=r"\d+")
    first, *others = adapters
    in_float32 = adapters[first][0][0].dtype == torch.float32
    model = get_peft_model(nn.Sequential(*linears), config, first, autocast_adapter_dtype=in_float32)
    for name in others:
        model.add_adapter(name, config, autocast_adapter_dtype=in_float32)
    for name, factors in adapters.items():
        for layer, (lora_A, lora_B) in zip(layers_of(model), factors, strict=True):
            layer.lora_A[name].weight.data.copy_(lora_A.detach())
            layer.lora_B[name].weight.data.copy_(lora_B.detach())
    return model


def layers_of(model: Any) -> list[Any]:
    return list(model.base_model.model)


def frozen(inputs: Inputs) -> Call:
    """The layers without adapters."""
    return inputs.call(lambda x: [F.linear(x, weight) for weight in inputs.weights], ())


def ours(inputs: Inputs, adapter_dtype: torch.dtype, together: bool) -> Call:
    """rankernel, all layers in one call or each in its own."""
    weights, dropout = inputs.weights, inputs.shape.dropout
    adapters = inputs.adapters(adapter_dtype)
    lora_A, lora_B = (list(factors) for factors in zip(*adapters, strict=True))
    scalings = [SCALING] * len(weights)

    def in_one_call(x: torch.Tensor) -> list[torch.Tensor]:
        return rankernel.multi_lora_linear(x, weights, lora_A, lora_B, scalings, dropout_p=dropout)

    def one_by_one(x: torch.Tensor) -> list[torch.Tensor]:
        layers = zip(weights, lora_A, lora_B, scalings, strict=True)
        return [rankernel.lora_linear(x, *layer, dropout_p=dropout) for layer in layers]

    return inputs.call(in_one_call if together else one_by_one, itertools.chain(*adapters))


def peft_layers(inputs: Inputs, adapter_dtype: torch.dtype, fuse: bool = False, compiled: bool = False) -> Call:
    """PEFT's layers, as they are, after ``fuse_lora`` or compiled."""
    model = peft_model(inputs.weights, {"default": inputs.adapters(adapter_dtype)}, inputs.shape.dropout)
    if fuse:
        rankernel.fuse_lora(model)
    layers = layers_of(model)
    leaves = [factor["default"].weight for layer in layers for factor in (layer.lora_A, layer.lora_B)]
    if compiled:
        torch._dynamo.reset()  # else the recompile limit, reached over many cases, falls back to eager
        layers = [torch.compile(layer, dynamic=False) for layer in layers]
    return inputs.call(lambda x: [layer(x) for layer in layers], leaves)


def layer_problem(shape: Shape, device: str, dtype: torch.dtype) -> Problem:
    """One layer, or several on one x."""
    inputs = Inputs(shape, dtype, device)
    several = len(shape.outputs) > 1
    kinds = adapter_dtypes(dtype)
    expected = {kind: inputs.expected(kind) for kind in kinds.values()}
    of_peft = {kind: inputs.expected(kind, of_peft=True) for kind in expected} if shape.dropout else expected
    rows = [Implementation(FROZEN, partial(frozen, inputs), inputs.expected(None), shape.base_work, compare=False)]
    for name, backend in NATIVE[device].items():
        native = partial(Implementation, work=shape.work, native_op=OP, backend=backend)
        for end, kind in kinds.items():
            rows.append(native(name + end, partial(ours, inputs, kind, together=several), expected[kind]))
        default = expected[torch.float32]
        if several:
            apart = partial(ours, inputs, torch.float32, together=False)
            rows.append(native(f"{name} one by one", apart, default))
        rows.append(native(f"{name} fuse_lora", partial(peft_layers, inputs, torch.float32, fuse=True), default))
    for end, kind in kinds.items():
        peer = partial(Implementation, expected=of_peft[kind], work=shape.work)
        rows.append(peer(f"PEFT{end}", partial(peft_layers, inputs, kind)))
        if kind == torch.float32 and not shape.dropout:  # compiled, dropout draws another mask
            rows.append(peer("the same compiled", partial(peft_layers, inputs, kind, compiled=True)))
    x_has = f"; x has {shape.rows * shape.inputs * dtype.itemsize / 1e6:.1f} MB"
    return Problem(tuple(rows), (*overheads(rows), *extra_memory(rows, x_has)))


def overheads(rows: Sequence[Implementation]) -> list[Finding]:
    """How much longer than the first row, the frozen one, the others take."""
    over = rows[0].name
    return [Finding("overhead", f"{row.name}: {{}} over the {over}", row.name, over, "%") for row in rows[1:]]


def extra_memory(rows: Sequence[Implementation], beside: str = "") -> list[Finding]:
    """How much more memory than the first row, the frozen one, rankernel's rows need."""
    over = rows[0].name
    return [
        Finding("extra_memory", f"{row.name}: peak {{}} above the {over}{beside}", row.name, over, "B")
        for row in rows
        if row.native_op
    ]


@dataclass(frozen=True)
class Mixed:
    """A batch of samples of x that use ``NUM_ADAPTERS`` adapters, in order or at random."""

    batch: tuple[int, ...]
    inputs: int
    outputs: int
    at_random: bool

    @property
    def numbers(self) -> list[int]:
        """The adapter of each sample."""
        samples = self.batch[0]
        if self.at_random:
            return torch.randint(NUM_ADAPTERS, (samples,), generator=torch.Generator().manual_seed(0)).tolist()
        return [sample * NUM_ADAPTERS // samples for sample in range(samples)]

    def __str__(self) -> str:
        how = "at random" if self.at_random else "in order"
        sizes = " x ".join(map(str, (*self.batch, self.inputs)))
        return f"{sizes} -> {self.outputs}, {NUM_ADAPTERS} adapters of rank {RANK} {how}, forward, no gradients"


class MixedInputs:
    """x, the frozen weight and the adapters; made when first used."""

    def __init__(self, shape: Mixed, dtype: torch.dtype, device: str) -> None:
        self.shape, self.dtype, self.device = shape, dtype, device
        self._normal = partial(normal, device=device, dtype=dtype)

    @cached_property
    def x(self) -> torch.Tensor:
        """[..., I]"""
        return self._normal(0, *self.shape.batch, self.shape.inputs)

    @cached_property
    def weight(self) -> torch.Tensor:
        """[O, I]"""
        return self._normal(1, self.shape.outputs, self.shape.inputs) / self.shape.inputs**0.5

    def adapters(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        inputs, outputs = self.shape.inputs, self.shape.outputs
        return [
            (
                (self._normal(100 + number, RANK, inputs) / inputs**0.5).to(dtype),
                (self._normal(200 + number, outputs, RANK) / RANK**0.5).to(dtype),
            )
            for number in range(NUM_ADAPTERS)
        ]

    def expected(self, adapter_dtype: torch.dtype | None) -> Expected:
        """Sample by sample; ``None``: without adapters."""

        def result(dtype: torch.dtype, adapter_dtype: torch.dtype | None) -> torch.Tensor:
            x, weight = self.x.to(dtype), self.weight.to(dtype)
            if adapter_dtype is None:
                return F.linear(x, weight)
            adapters = self.adapters(adapter_dtype)
            samples = zip(x, self.shape.numbers, strict=True)
            return torch.stack([in_pytorch([weight], [adapters[n]], 1.0, sample)[0] for sample, n in samples])

        wide = None if adapter_dtype is None else torch.float64
        return Expected(lambda: result(torch.float64, wide), lambda: result(self.dtype, adapter_dtype))


def frozen_batch(inputs: MixedInputs) -> Call:
    """The layer without adapters."""
    x, weight = inputs.x, inputs.weight
    return lambda: F.linear(x, weight)


def segments(inputs: MixedInputs, adapter_dtype: torch.dtype) -> Call:
    """rankernel, neighbours of one adapter in one segment."""
    shape = inputs.shape
    rows = inputs.x.view(-1, shape.inputs)
    runs = [(number, len(list(samples))) for number, samples in itertools.groupby(shape.numbers)]
    per_sample = len(rows) // shape.batch[0]
    offsets = torch.tensor([0, *itertools.accumulate(count * per_sample for _, count in runs)], device=inputs.device)
    numbers = torch.tensor([number for number, _ in runs], device=inputs.device)
    adapters = [(*pair, SCALING) for pair in inputs.adapters(adapter_dtype)]
    weight, batch = inputs.weight, shape.batch
    return lambda: rankernel.segment_lora_linear(rows, weight, adapters, offsets, numbers).view(*batch, -1)


def adapter_names(inputs: MixedInputs, adapter_dtype: torch.dtype, fuse: bool = False) -> Call:
    """PEFT's mixed batch, with or without ``fuse_lora``."""
    named = {f"adapter{number}": [pair] for number, pair in enumerate(inputs.adapters(adapter_dtype))}
    model = peft_model([inputs.weight], named).eval()
    if fuse:
        rankernel.fuse_lora(model)
    (layer,) = layers_of(model)
    x, names = inputs.x, [f"adapter{number}" for number in inputs.shape.numbers]
    return lambda: layer(x, adapter_names=names)


def mixed_problem(shape: Mixed, device: str, dtype: torch.dtype) -> Problem:
    """A batch whose samples use different adapters, in evaluation: PEFT has no other."""
    inputs = MixedInputs(shape, dtype, device)
    kinds = adapter_dtypes(dtype)
    expected = {kind: inputs.expected(kind) for kind in kinds.values()}
    rows = [Implementation(FROZEN, partial(frozen_batch, inputs), inputs.expected(None), compare=False)]
    for name, backend in NATIVE[device].items():
        native = partial(Implementation, native_op=OP, backend=backend)
        for end, kind in kinds.items():
            rows.append(native(name + end, partial(segments, inputs, kind), expected[kind]))
        fused = partial(adapter_names, inputs, torch.float32, fuse=True)
        rows.append(native(f"{name} fuse_lora", fused, expected[torch.float32]))
    for end, kind in kinds.items():
        rows.append(Implementation(f"PEFT{end}", partial(adapter_names, inputs, kind), expected[kind]))
    return Problem(tuple(rows), tuple(overheads(rows)))


def _case(
    problem: Callable[[Any, str, torch.dtype], Problem],
    name: str,
    shape: Shape | Mixed,
    seconds: float = 4.0,
    default: bool = False,
) -> Case:
    on = partial(problem, shape)
    return Case(
        name, str(shape), partial(on, "cpu"), seconds=seconds, default=default, build_on_gpu=partial(on, "cuda")
    )


LAYERS = ((2048, 1024, 1024), (1024, 4096, 4096), (2048, 1024, 3072), (2048, 4096, 1024))

CASES = (
    _case(layer_problem, "tiny-forward", Shape(5, 24, (40,), backward=False), 0.1),
    _case(layer_problem, "tiny-backward", Shape(5, 24, (40,)), 0.1),
    _case(layer_problem, "tiny-dropout", Shape(5, 24, (40,), dropout=0.5), 0.1),
    _case(layer_problem, "tiny-qkv", Shape(5, 24, (40, 8, 8)), 0.1),
    _case(mixed_problem, "tiny-mixed", Mixed((12, 2), 24, 40, at_random=True), 0.1),
    *(
        _case(
            layer_problem,
            f"{rows}x{inputs}x{outputs}-{'backward' if backward else 'forward'}",
            Shape(rows, inputs, (outputs,), backward),
            default=(rows, inputs, outputs) == LAYERS[0],
        )
        for rows, inputs, outputs in LAYERS
        for backward in (False, True)
    ),
    _case(layer_problem, "dropout", Shape(2048, 1024, (1024,), dropout=0.1)),
    _case(layer_problem, "qkv", Shape(2048, 1024, (2048, 1024, 1024))),
    *(
        _case(
            mixed_problem,
            f"mixed-{'random-' if at_random else ''}{size}",
            Mixed(batch, size, size, at_random),
            default=size == 1024 and not at_random,
        )
        for size in (1024, 4096)
        for batch, at_random in (((512,), False), ((64, 8), True))
    ),
)
