"""Candidate scores of a causal language model: its last hidden state at a few positions, a few rows of its head."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rankernel.models.attach import decoder_of, unwrap
from rankernel.models.early_exit import family_of
from rankernel.ops import candidate_logits
from rankernel.ops._checks import check_candidates


@dataclass(frozen=True, eq=False)
class Head:
    """What a model does behind its final norm; made by :func:`head_of`.

    Attributes:
        module: the head itself, with whatever wraps it.
        weight: [V, E] where the head is a plain linear layer, so that single rows can be taken; None where it is
            wrapped (a LoRA adapter on the head), in which case it runs in full, on the scored positions alone.
        bias: [V] or None.
        scale: multiplies the logits: ``logit_scale`` (Cohere), 1 / ``logits_scaling`` (Granite).
        softcap: ``final_logit_softcapping`` (Gemma).
    """

    module: torch.nn.Module
    weight: torch.Tensor | None
    bias: torch.Tensor | None
    scale: float
    softcap: float | None

    def candidate_logits(
        self, hidden: torch.Tensor, candidates: torch.Tensor, *, log_probs: bool = False
    ) -> torch.Tensor:
        """Logits of a few tokens, as slices of the model's own logits.

        Args:
            hidden: [N, E], final hidden states.
            candidates: [C] or [N, C] integers, token ids, on any device.
            log_probs: log-probabilities over the vocabulary instead.

        Returns:
            float32 [N, C], differentiable.

        Raises:
            ValueError: a candidate that is not in the vocabulary.
        """
        candidates = candidates.to(hidden.device)
        weight, bias = self.weight, self.bias
        if weight is None:
            # What a wrapper adds to single rows is not known, so it says all logits, and the rest is as in the op.
            logits = self.module(hidden).float() * self.scale
            check_candidates(candidates, logits.shape[-1])
            if self.softcap is not None:
                logits = self.softcap * torch.tanh(logits / self.softcap)
            if log_probs:
                logits = logits.log_softmax(dim=-1)
            return logits.gather(1, candidates.to(torch.int64).expand(len(hidden), candidates.shape[-1]))
        return candidate_logits(
            hidden.to(weight.dtype), weight, candidates, bias=bias, scale=self.scale, softcap=self.softcap,
            log_probs=log_probs,
        )  # fmt: skip


def head_of(model: torch.nn.Module) -> Head:
    """The output embedding of a causal language model, or the score layer of a sequence classifier.

    Wrappers (DistributedDataParallel, torch.compile, PEFT) are looked through. What a family does to its logits is
    known for those that :func:`rankernel.attach` is tested with; of any other model the logits of one token are
    compared with this head's.

    Raises:
        ValueError: there is no head, or the model does something else to its logits.
    """
    inner = unwrap(model)
    module = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    classifier = module is None
    if classifier:
        module = getattr(inner, "score", None)
    if not isinstance(module, torch.nn.Module):
        raise ValueError(f"model: expected a language-model head or a score layer, {type(inner).__name__} has none")
    plain = _plain_linear(module)
    config = decoder_of(inner).config
    scale = 1.0 if classifier else getattr(inner, "logit_scale", 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    head = Head(
        module,
        None if plain is None else plain.weight,
        None if plain is None else plain.bias,
        float(scale),
        None if classifier else getattr(config, "final_logit_softcapping", None),
    )
    if not classifier and family_of(decoder_of(inner).layers[-1]) is None:
        _check_against(inner, head)
    return head


def _plain_linear(module: Any) -> torch.nn.Linear | None:
    """The linear layer whose rows are the logits' weights, or None where something is added to it."""
    if type(module).__name__ == "ModulesToSaveWrapper":
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        module = module.modules_to_save[active[0]] if active and not module.disable_adapters else module.original_module
    unhooked = not (module._forward_hooks or module._forward_pre_hooks)
    plain = isinstance(module, torch.nn.Linear) and type(module).forward is torch.nn.Linear.forward
    return module if plain and unhooked and "forward" not in vars(module) else None


@torch.no_grad()
def _check_against(model: Any, head: Head) -> None:
    token = torch.zeros(1, 1, dtype=torch.int64, device=decoder_of(model).device)
    expected = model(input_ids=token, use_cache=False).logits[0].float()
    hidden = final_hidden_states(model, torch.zeros(1, dtype=torch.int64), input_ids=token, use_cache=False)
    actual = head.candidate_logits(hidden, torch.arange(expected.shape[-1]))
    precision = 8 * torch.finfo(hidden.dtype).eps * float(expected.abs().max())
    if not torch.allclose(actual, expected, rtol=0, atol=precision):
        raise ValueError(
            f"model: {type(model).__name__} does something to its logits that is not known here (neither a bias, "
            "logit_scale, logits_scaling nor final_logit_softcapping)"
        )


def final_hidden_states(model: torch.nn.Module, rows: torch.Tensor, **inputs: Any) -> torch.Tensor:
    """Hidden states behind the final norm, at a few positions; the head does not run.

    Without gradients the last layer projects queries, and computes its output projection and MLP, for ``rows`` alone,
    through the layer's own modules, where the family is one that :func:`rankernel.attach` is tested with.

    Args:
        model: a causal language model of Transformers, attached or stock.
        rows: [R] integers, positions in the flattened tokens [B * T].
        inputs: of the model: ``input_ids`` and what goes with it, such as :func:`rankernel.model_inputs`.

    Returns:
        [R, E], dtype of the model; differentiable where gradients are enabled.

    Raises:
        ValueError: positions that there are not.
    """
    decoder = decoder_of(model)
    tokens = inputs["input_ids"] if inputs.get("input_ids") is not None else inputs["inputs_embeds"][..., 0]
    if rows.numel() and not 0 <= int(rows.min()) <= int(rows.max()) < tokens.numel():
        raise ValueError(f"rows: expected positions in [0, {tokens.numel()}), got {rows.tolist()}")
    rows = rows.to(tokens.device)
    trimmed = contextlib.nullcontext() if torch.is_grad_enabled() else _only_rows(decoder.layers[-1], rows)
    with trimmed:
        hidden = decoder(**inputs).last_hidden_state
    return hidden.flatten(0, 1)[rows]


@contextlib.contextmanager
def _only_rows(layer: Any, rows: torch.Tensor) -> Iterator[None]:
    """Inside, the layer's outputs are right at ``rows`` alone: modules that treat every token by itself skip the rest.

    Not with gradients: checkpointing would run the layer again without these hooks.
    """

    def take(module: torch.nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        places.append(args[0].shape[:-1])
        return (args[0].flatten(0, -2)[rows.to(args[0].device)][None], *args[1:])

    def put_back(module: torch.nn.Module, args: Any, output: Any) -> Any:
        found = output[0] if isinstance(output, tuple) else output
        full = found.new_zeros(*places.pop(), found.shape[-1])
        full.view(-1, found.shape[-1])[rows.to(found.device)] = found[0]
        return (full, *output[1:]) if isinstance(output, tuple) else full

    places: list[torch.Size] = []
    modules: list[torch.nn.Module] = []
    if family_of(layer) is not None:
        attention = layer.self_attn
        modules = [layer.mlp, *(m for m in (getattr(attention, "q_proj", None), attention.o_proj) if m is not None)]
    handles = []
    for module in modules:
        handles += [module.register_forward_pre_hook(take), module.register_forward_hook(put_back)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
