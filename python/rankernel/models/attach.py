"""Switches a Hugging Face model to rankernel's attention, and back without a trace."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from rankernel.models.attention import NAME, STOCK_ATTRIBUTE, Stock, register

_HOOK_ATTRIBUTE = "_rankernel_hook"
_LAYER_TYPES = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class AttachReport:
    """What :func:`attach` patched; print it.

    Attributes:
        model_class: class of the Hugging Face model under all wrappers.
        attention_class: class of its attention modules.
        previous: implementation that it had, ``"sdpa"`` or ``"eager"``, and still runs without a layout.
        windows: per layer its sliding window in tokens, or None where it sees everything.
    """

    model_class: str
    attention_class: str
    previous: str
    windows: tuple[int | None, ...]

    def __str__(self) -> str:
        lines = [
            f"{self.model_class}: {len(self.windows)} layers of {self.attention_class} run rankernel when called with "
            f"a block_layout, {self.previous} as before when not"
        ]
        for window in sorted({window for window in self.windows if window is not None}):
            layers = ", ".join(str(layer) for layer, other in enumerate(self.windows) if other == window)
            lines.append(
                f"  sliding window of {window} tokens on layers {layers}: counted in the packed row, so documents far "
                "from the prefix do not see it there; scores of these layers are computed without the window"
            )
        return "\n".join(lines)


def unwrap(model: torch.nn.Module) -> Any:
    """The Hugging Face model inside DistributedDataParallel, torch.compile and PEFT wrappers."""
    inner: Any = model
    while True:
        wrapped = next((getattr(inner, name) for name in ("module", "_orig_mod") if hasattr(inner, name)), None)
        if isinstance(wrapped, torch.nn.Module):
            inner = wrapped
        elif hasattr(inner, "get_base_model"):
            inner = inner.get_base_model()
        else:
            return inner


def decoder_of(model: torch.nn.Module) -> Any:
    """The module that holds the decoder layers: the text tower of a multimodal model.

    Raises:
        ValueError: there is none.
    """
    inner = unwrap(model)
    decoder = inner.get_decoder() if hasattr(inner, "get_decoder") else inner
    if not isinstance(getattr(decoder, "layers", None), torch.nn.ModuleList) or not hasattr(decoder, "config"):
        raise ValueError(f"model: expected a Hugging Face decoder with layers, got {type(inner).__name__}")
    return decoder


def is_attached(model: torch.nn.Module) -> bool:
    """Whether the model runs rankernel: attached, and not switched to something else since."""
    decoder = decoder_of(model)
    return hasattr(decoder, _HOOK_ATTRIBUTE) and decoder.config._attn_implementation == NAME


def attach(model: torch.nn.Module) -> AttachReport:
    """Makes a model compute block-sparse attention when it is called with a ``block_layout``.

    Without a layout it behaves as before: padding, ``generate`` and static caches run the implementation it had.
    Weights, class and saved configuration stay as they are; :func:`detach` undoes the rest. A second call changes
    nothing and gives the same report. Wrappers (DistributedDataParallel, torch.compile, PEFT) are looked through; of
    a multimodal model only the text tower is switched.

    Args:
        model: a causal language model of Transformers whose layers all are full or sliding-window attention.

    Returns:
        What was patched.

    Raises:
        ValueError: a model whose attention cannot be switched, saying why. Nothing is changed then.
    """
    decoder = decoder_of(model)
    if not is_attached(model):
        _check_supported(decoder)
        name = decoder.config._attn_implementation
        stock = [Stock(name, _stock_forward(layer.self_attn, name)) for layer in decoder.layers]
        register()
        decoder.set_attn_implementation(NAME)
        if decoder.config._attn_implementation != NAME:
            raise ValueError(
                f"model: {type(decoder).__name__} does not route its attention through Transformers' "
                "AttentionInterface, so it cannot be switched"
            )
        _forget(decoder)
        for layer, previous in zip(decoder.layers, stock, strict=True):
            setattr(layer.self_attn, STOCK_ATTRIBUTE, previous)
        setattr(decoder, _HOOK_ATTRIBUTE, decoder.register_forward_hook(_check_scores, with_kwargs=True))
    attentions = [layer.self_attn for layer in decoder.layers]
    return AttachReport(
        model_class=type(unwrap(model)).__name__,
        attention_class=type(attentions[0]).__name__,
        previous=getattr(attentions[0], STOCK_ATTRIBUTE).name,
        windows=tuple(_window(attention) for attention in attentions),
    )


def detach(model: torch.nn.Module) -> None:
    """Gives a model back the attention it had before :func:`attach`, leaving nothing behind on it.

    Raises:
        ValueError: the model is not attached.
    """
    decoder = decoder_of(model)
    if not hasattr(decoder, _HOOK_ATTRIBUTE):
        raise ValueError(f"model: expected an attached model, got a {type(decoder).__name__} that is not")
    if is_attached(model):
        decoder.set_attn_implementation(getattr(decoder.layers[0].self_attn, STOCK_ATTRIBUTE).name)
    _forget(decoder)


@contextlib.contextmanager
def attached(model: torch.nn.Module) -> Iterator[AttachReport]:
    """The model is attached inside; after it, it is as it was before, attached or not."""
    was_attached = is_attached(model)
    report = attach(model)
    try:
        yield report
    finally:
        if not was_attached:
            detach(model)


def _forget(decoder: Any) -> None:
    if hasattr(decoder, _HOOK_ATTRIBUTE):
        getattr(decoder, _HOOK_ATTRIBUTE).remove()
        delattr(decoder, _HOOK_ATTRIBUTE)
        for layer in decoder.layers:
            delattr(layer.self_attn, STOCK_ATTRIBUTE)


def _check_supported(decoder: Any) -> None:
    name = type(decoder).__name__
    config = decoder.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"model: expected a decoder-only model, got the encoder-decoder {name}")
    foreign = sorted(set(getattr(config, "layer_types", None) or ()) - _LAYER_TYPES)
    without = [index for index, layer in enumerate(decoder.layers) if not hasattr(layer, "self_attn")]
    if foreign or without:
        what = f"layers of type {', '.join(foreign)}" if foreign else f"no self_attn in layers {without}"
        raise ValueError(
            f"model: {name} has {what}. Linear attention, convolution, state-space and chunked layers mix tokens "
            "outside the attention function, so documents would see each other whatever the layout says"
        )
    if not all(getattr(layer.self_attn, "is_causal", True) for layer in decoder.layers):
        raise ValueError(f"model: {name} attends in both directions; a block layout is causal within each segment")
    if config._attn_implementation not in ("sdpa", "eager"):
        raise ValueError(
            f"model: expected attention implementation 'sdpa' or 'eager', got {config._attn_implementation!r}, which "
            "cannot run under another name without a layout; call model.set_attn_implementation('sdpa') first"
        )


def _stock_forward(attention: torch.nn.Module, name: str) -> Callable[..., Any]:
    if name == "eager":
        return from_model_file(attention, "eager_attention_forward")
    return from_model_file(attention, "ALL_ATTENTION_FUNCTIONS")[name]


def from_model_file(attention: torch.nn.Module, name: str) -> Any:
    """What the file that defines the attention class calls ``name``, also where FSDP has derived a class from that.

    Raises:
        ValueError: there is nothing of that name.
    """
    for cls in type(attention).__mro__:
        found = getattr(sys.modules[cls.__module__], name, None)
        if found is not None:
            return found
    raise ValueError(
        f"model: expected {name} in the file of {type(attention).__name__}, found none, so this model does not route "
        "its attention as Transformers' AttentionInterface prescribes and cannot be switched"
    )


def _window(attention: Any) -> int | None:
    config = attention.config
    return getattr(attention, "sliding_window", getattr(config, "sliding_window", None))


def _check_scores(decoder: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    """Forward hook of the decoder: every requested score is there, with its gradient if there is one to lose.

    Reentrant gradient checkpointing runs the layers without gradients and gives them back only to the layers' own
    output, so a loss on the scores would silently train nothing.
    """
    request = kwargs.get("block_scores")
    scores = getattr(output, "attentions", None)
    if request is None or scores is None:
        return
    if len(scores) != len(request.layers):
        raise ValueError(
            f"block_scores: expected layers below {len(decoder.layers)}, the number of layers that run, got "
            f"{list(request.layers)}"
        )
    if torch.is_grad_enabled() and not all(score.requires_grad for score in scores):
        below = decoder.layers[: request.layers[-1] + 1]
        if any(parameter.requires_grad for parameter in below.parameters()):
            raise RuntimeError(
                "block_scores: the scores carry no gradient although gradients are enabled, as happens under "
                "reentrant gradient checkpointing; enable it with use_reentrant=False, or score under torch.no_grad()"
            )
