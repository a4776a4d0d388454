"""Models, tokenizers and single tokens for the rerankers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

import torch

from rankernel.models import attach
from rankernel.rerankers.protocol import Reranker

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def source_of(model: str | Path | PreTrainedModel) -> str:
    """Directory or name that a model was or will be loaded from; empty if there is none."""
    return str(model) if isinstance(model, (str, Path)) else getattr(model, "name_or_path", "")


def file_of(model: str | Path | PreTrainedModel, name: str) -> str | None:
    """Path of a file that lies with the model, or None.

    Raises:
        OSError: there is no such model.
    """
    from transformers.utils import cached_file

    source = source_of(model)
    if not source:
        return None
    cached_file(source, "config.json")
    return cached_file(source, name, _raise_exceptions_for_missing_entries=False)


def load(
    model: str | Path | PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    dtype: torch.dtype | Literal["auto"] = "auto",
    device: torch.device | str | None = None,
    head: Literal["CausalLM", "SequenceClassification"] = "CausalLM",
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer; what is loaded already is taken as it is.

    Args:
        model: directory, name on the Hugging Face Hub, or a loaded Transformers model.
        tokenizer: by default the one saved with the model.
        dtype: type of the weights, by default the one they were saved in; not for a loaded model.
        device: where to run, by default where the model is loaded to; not for a loaded model.
        head: which of Transformers' classes to load.

    Raises:
        ValueError: a loaded model without a directory to take the tokenizer from.
        OSError: there is no such model.
        ImportError: Transformers is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError('rerankers need transformers: pip install "rankernel[hf]"') from error
    source = source_of(model)
    if tokenizer is None:
        if not source:
            raise ValueError("tokenizer: expected one, as the model was not loaded from a directory")
        tokenizer = transformers.AutoTokenizer.from_pretrained(source)
    if isinstance(model, (str, Path)):
        model = getattr(transformers, f"AutoModelFor{head}").from_pretrained(source, dtype=dtype)
        if device is not None:
            model = model.to(device)
    return model, tokenizer


class ModelReranker(Reranker):
    """Base of the rerankers that are a model, a tokenizer and settings.

    Args:
        model: a Transformers causal language model. It is attached, set to evaluation mode and stays attached.
        tokenizer: its tokenizer.
        max_document_tokens: longer documents keep their first so many tokens, and the result says so; None keeps all.

    Raises:
        ValueError: an argument out of range, or a model that cannot be attached.
    """

    model_head: Literal["CausalLM", "SequenceClassification"] = "CausalLM"
    """Which of Transformers' classes to load."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_document_tokens: int | None = None,
    ) -> None:
        if max_document_tokens is not None and max_document_tokens < 1:
            raise ValueError(f"max_document_tokens: expected a positive integer or None, got {max_document_tokens}")
        windows = [window for window in attach(model).windows if window is not None]
        self.model = model.eval()
        self.tokenizer: Any = tokenizer
        self.max_document_tokens = max_document_tokens
        self.sliding_window = min(windows, default=None)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
        **settings: Any,
    ) -> Self:
        """Loads a model, or takes one that is loaded, and attaches the kernels to it.

        Args:
            model: directory, name on the Hugging Face Hub, or a loaded Transformers model.
            tokenizer: by default the one saved with the model.
            dtype: type of the weights, by default the one they were saved in; not for a loaded model.
            device: where to run, by default where the model is loaded to; not for a loaded model.
            **settings: of the class.

        Raises:
            ValueError: a setting is unfit, or the tokenizer lacks a token that the method reads.
            OSError: there is no such model.
            ImportError: Transformers is not installed.
        """
        model, tokenizer = load(model, tokenizer, dtype=dtype, device=device, head=cls.model_head)
        return cls(model, tokenizer, **settings)


def token_id(tokenizer: Any, text: str) -> int:
    """The one token that is ``text`` exactly, with its leading space if it has one.

    The vocabulary is asked first, because many tokenizers put a space before a text that they encode.

    Raises:
        ValueError: there is no such token.
    """
    vocabulary = tokenizer.get_vocab()
    spellings = [mark + text[1:] for mark in ("\u0120", "\u2581")] if text.startswith(" ") else [text]
    for spelling in spellings:
        if spelling in vocabulary:
            return vocabulary[spelling]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1 or tokenizer.decode(ids) != text:
        raise ValueError(f"tokenizer: expected a single token for {text!r}, got {ids}")
    return ids[0]


def token_ids(tokenizer: Any, texts: Sequence[str]) -> torch.Tensor:
    """:func:`token_id` of several texts, int64 [C].

    Raises:
        ValueError: one of them is no single token, or two are the same.
    """
    ids = [token_id(tokenizer, text) for text in texts]
    if len(set(ids)) < len(ids):
        raise ValueError(f"tokenizer: expected a token of its own for each of {list(texts)}, got {ids}")
    return torch.tensor(ids)
