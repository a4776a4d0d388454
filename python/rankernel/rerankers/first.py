"""FIRST: a window of passages ordered by the letters' logits where the first identifier would be generated."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from rankernel.rerankers.blockrank import SETTINGS_FILE
from rankernel.rerankers.loading import file_of
from rankernel.rerankers.prompted import PromptReranker, Steps, tokenize
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import ListScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = string.ascii_uppercase
"""Identifiers of the passages of a window."""

SYSTEM = "You are RankLLM, an intelligent assistant that can rank passages based on their relevancy to the query"
PREFIX = (
    "I will provide you with {num} passages, each indicated by an alphabetical identifier []. "
    "Rank the passages based on their relevance to the search query: {query}.\n"
)
SUFFIX = (
    "Search Query: {query}.\nRank the {num} passages above based on their relevance to the search query. "
    "All the passages should be included and listed using identifiers, in descending order of relevance. "
    "The output format should be [] > [], e.g., [B] > [A], "
    "Only respond with the ranking results, do not say any word or explain."
)
"""The published wording (METHODS.md section 3.1); a line ``[A] passage`` for each passage goes between the two."""


@dataclass(frozen=True)
class FirstSettings:
    """How a model reads lists; see :class:`FIRST`."""

    window: int | None = 20
    step: int = 10
    max_document_tokens: int | None = 384


def around_passages(tokenizer: Any) -> tuple[str, str]:
    """What the chat template puts before and after the request, the beginning ``[`` of the answer included."""
    return around_user_turn(tokenizer, "[", system=SYSTEM)


def window_prompt(tokenizer: Any, around: tuple[str, str], query: str, passages: Sequence[str]) -> list[int]:
    """Token ids of the prompt of one window, up to and including the answer's ``[``.

    Args:
        tokenizer: a Transformers tokenizer.
        around: from :func:`around_passages`.
        query: text of the query.
        passages: at most 26, cut already; ``[1]`` in a passage becomes ``(1)``, as it could be taken for an identifier.
    """
    before, after = around
    shown = [re.sub(r"\[(\d+)\]", r"(\1)", passage) for passage in passages]
    lines = "".join(f"[{letter}] {passage}\n" for letter, passage in zip(LETTERS, shown, strict=False))
    fields = {"num": len(passages), "query": query}
    return tokenize(tokenizer, before + PREFIX.format(**fields) + lines + SUFFIX.format(**fields) + after)


def windows(num_documents: int, window: int, step: int) -> list[tuple[int, int]]:
    """Begin and end of the windows that slide over a list, from its back to its front (METHODS.md section 3.2).

    A list no longer than a window is one window; the published loop skips lists of ``window - step`` documents.

    Args:
        num_documents: length of the list, at least 1.
        window: documents in a window; the first ones of the list may be fewer.
        step: by how much a window moves, 1 to ``window``.
    """
    last = min(window - step, num_documents - 1)  # a window that ends no later than at window has reached the front
    return [(max(0, end - window), end) for end in range(num_documents, last, -step)]


class FIRST(PromptReranker):
    """Orders windows of passages by the logits of their letters as the answer's first identifier (arXiv 2406.15657).

    The prompt lists a window's passages as ``[A] ...``, ``[B] ...`` and so on and ends where the answer has begun with
    ``[``; one forward pass orders the window, best letter first. Windows slide from the back of the list to its front,
    so the best documents move up. The score is minus the rank, because logits of different windows do not compare.

    Parts of a score, of the last window that the document was read in: ``logit``; ``window``, which one that was, from
    0 for the window at the back; ``letter``, from 0 for A.

    Args:
        model: a causal language model, trained for the method; attached, and set to evaluation mode.
        tokenizer: its tokenizer; every letter that a window needs has to be a token.
        window: passages in a window, at most 26; None reads the whole list at once.
        step: by how many passages a window moves.
        max_document_tokens: longer documents keep their first so many tokens; the default is about the published 300
            words.

    Raises:
        ValueError: a number out of range, a letter that is no token, or an unfit model; when ranking, more than 26
            documents with ``window=None``.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int | None = 20,
        step: int = 10,
        max_document_tokens: int | None = 384,
    ) -> None:
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        if window is not None and not 1 <= window <= len(LETTERS):
            raise ValueError(f"window: expected 1 to {len(LETTERS)}, as there are letters, or None, got {window}")
        if window is not None and not 1 <= step <= window:
            raise ValueError(f"step: expected 1 to {window}, the window, got {step}")
        self.settings = FirstSettings(window, step, max_document_tokens)
        self.use_candidates(LETTERS[:window])
        self._around = around_passages(tokenizer)

    @classmethod
    def from_pretrained(cls, model: str | Path | PreTrainedModel, **options: Any) -> Self:
        """See :meth:`ModelReranker.from_pretrained`; the model's ``rankernel.json`` may say more, if it is FIRST's."""
        found = file_of(model, SETTINGS_FILE)
        saved: dict[str, Any] = json.loads(Path(found).read_text(encoding="utf-8")) if found else {}
        if saved.pop("method", None) == "first":
            options = {**saved, **options}
        return super().from_pretrained(model, **options)

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        if self.settings.window is None and len(documents) > len(LETTERS):
            raise ValueError(
                f"documents: expected at most {len(LETTERS)} with window=None, as there are letters, "
                f"got {len(documents)}"
            )
        passages, truncated = self.cut(documents)
        order = list(range(len(passages)))
        parts: list[Mapping[str, float]] = [{}] * len(passages)
        window = self.settings.window or len(passages)
        for number, (begin, end) in enumerate(windows(len(passages), window, min(self.settings.step, window))):
            read = order[begin:end]
            shown = [passages[index] for index in read]
            logits = yield [[window_prompt(self.tokenizer, self._around, query, shown)]]
            for letter, (index, logit) in enumerate(zip(read, logits[0].tolist(), strict=False)):
                parts[index] = {"logit": logit, "window": float(number), "letter": float(letter)}
            order[begin:end] = sorted(read, key=lambda index: -parts[index]["logit"])
        return ListScores((-1.0 - np.argsort(order)).tolist(), truncated, parts)
