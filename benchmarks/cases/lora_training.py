"""Training steps of a whole model whose linear layers all have LoRA adapters of rank 16.

The model has random weights in the configuration of Qwen3-0.6B, cut to 4 of its 28 layers. Its input is the output of
the embedding, which needs a gradient, and the loss is the mean squared distance of the last hidden states to given
ones: what a vocabulary of 151,936 tokens costs is left out. A step is forward, loss and backward; it returns the
gradients of the input and of all adapters, times the number of hidden states' entries.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F

import rankernel
from cases.lora_linear import (
    NATIVE,
    OP,
    RANK,
    SCALING,
    Results,
    adapter_dtypes,
    expected_of,
    extra_memory,
    normal,
    overheads,
)
from cases.model import QWEN3_06B, TINY, Shape, configuration
from measure import Case, Implementation, Problem

LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


@dataclass(frozen=True)
class Batch:
    """Rows of as many tokens, and the model."""

    rows: int
    tokens: int
    model: Shape

    def __str__(self) -> str:
        adapters = f"adapters of rank {RANK} on {len(LAYERS)} matrices a layer"
        return f"{self.rows} x {self.tokens} tokens, {self.model.layers} layers of {self.model.hidden}, {adapters}"


class Inputs:
    """The model without adapters, its input and the hidden states it should give; made when first used."""

    def __init__(self, batch: Batch, device: str, dtype: torch.dtype) -> None:
        self.batch, self.device, self.dtype = batch, device, dtype
        # As in ``cases.model``: a wider dtype adds nothing where the implementations round to 8 or 11 bits.
        self.wide = torch.float64 if dtype == torch.float32 else torch.float32

    @cached_property
    def stock(self) -> Any:
        """The model without adapters and, but for its input, without gradients."""
        from transformers import Qwen3Model

        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            model: Any = Qwen3Model(configuration(self.batch.model))
        model.set_attn_implementation("sdpa")
        return model.to(self.device, self.dtype).requires_grad_(False)

    def _hidden(self, seed: int, dtype: torch.dtype) -> torch.Tensor:
        size = (self.batch.rows, self.batch.tokens, self.batch.model.hidden)
        return normal(seed, *size, device=self.device, dtype=dtype)

    def step(self, model: Any) -> Results:
        """Gradients of the input, then of what learns in ``model``, in its order."""
        x = self._hidden(0, self.dtype).to(next(model.parameters()).dtype).requires_grad_()
        wanted = self._hidden(1, torch.promote_types(x.dtype, torch.float32))
        learning = [x, *(parameter for parameter in model.parameters() if parameter.requires_grad)]
        scale = torch.tensor(float(x.numel()), dtype=wanted.dtype, device=self.device)

        def call() -> tuple[torch.Tensor, ...]:
            with torch.enable_grad():
                hidden = model(inputs_embeds=x, use_cache=False).last_hidden_state
                return torch.autograd.grad(F.mse_loss(hidden.to(wanted.dtype), wanted), learning, scale)

        return call

    def with_adapters(self, adapter_dtype: torch.dtype, dtype: torch.dtype | None = None, fuse: bool = False) -> Any:
        """A copy of the model in ``dtype`` with PEFT's adapters, whose values are those of the dtype of the inputs."""
        from peft import LoraConfig, get_peft_model

        config = LoraConfig(r=RANK, lora_alpha=int(SCALING * RANK), target_modules=list(LAYERS))
        stock = copy.deepcopy(self.stock).to(dtype or self.dtype)
        model = get_peft_model(stock, config, autocast_adapter_dtype=adapter_dtype == torch.float32)
        factors = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for seed, factor in enumerate(factors):
            factor.data.copy_(0.02 * normal(2 + seed, *factor.shape, device=self.device, dtype=self.dtype))
        if fuse:
            rankernel.fuse_lora(model)
        return model


def problem(batch: Batch, device: str, dtype: torch.dtype) -> Problem:
    """PEFT with adapters of both dtypes, the same after ``fuse_lora``, and the model without adapters."""
    inputs = Inputs(batch, device, dtype)

    def step(adapter_dtype: torch.dtype, dtype: torch.dtype | None = None, fuse: bool = False) -> Results:
        return inputs.step(inputs.with_adapters(adapter_dtype, dtype, fuse))

    def stock(dtype: torch.dtype) -> Results:
        return inputs.step(copy.deepcopy(inputs.stock).to(dtype))

    def once(adapter_dtype: torch.dtype, dtype: torch.dtype | None = None) -> tuple[torch.Tensor, ...]:
        return step(adapter_dtype, dtype)()

    frozen = expected_of(lambda: stock(inputs.wide)(), lambda: stock(dtype)(), 1)
    exact = cache(partial(once, inputs.wide, inputs.wide))
    rows = [Implementation("frozen model", lambda: stock(dtype), frozen, compare=False)]
    peers = []
    for end, kind in adapter_dtypes(dtype).items():
        expected = expected_of(exact, partial(once, kind), 1 + 2 * len(LAYERS) * batch.model.layers)
        for name, backend in NATIVE[device].items():
            fused = partial(step, kind, fuse=True)
            rows.append(Implementation(f"{name} fuse_lora{end}", fused, expected, native_op=OP, backend=backend))
        peers.append(Implementation(f"PEFT{end}", partial(step, kind), expected))
    rows += peers
    return Problem(tuple(rows), (*overheads(rows), *extra_memory(rows)))


def _case(name: str, batch: Batch, dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,), seconds: float = 6.0) -> Case:
    on = partial(problem, batch)
    return Case(name, str(batch), partial(on, "cpu"), dtypes, seconds, build_on_gpu=partial(on, "cuda"))


CASES = (
    _case("tiny", Batch(2, 9, TINY), (torch.float32, torch.bfloat16), 0.1),
    _case("4x512", Batch(4, 512, QWEN3_06B)),
)
