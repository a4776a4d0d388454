"""Rerankers that judge one document at a time; the prompts of one query share all that comes before the document."""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from rankernel.models import head_of
from rankernel.rerankers.prompted import PromptReranker, Steps
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import ListScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class PointwisePrompt:
    """Templates of a prompt that one token answers; prefix, body and suffix are tokenised apart.

    Attributes:
        prefix: text before the body, never cut.
        body: holds ``{query}`` and ``{document}`` and may hold ``{instruction}``; cut at its end where it is too long.
        suffix: text after the body, never cut.
        positive: tokens that say yes.
        negative: tokens that say no.
    """

    prefix: str
    body: str
    suffix: str
    positive: tuple[str, ...]
    negative: tuple[str, ...]


QWEN3_RERANKER = PointwisePrompt(
    prefix=(
        "<|im_start|>system\nJudge whether the Document meets the requirements based on the Query and the Instruct "
        'provided. Note that the answer can only be "yes" or "no".<|im_end|>\n<|im_start|>user\n'
    ),
    body="<Instruct>: {instruction}\n<Query>: {query}\n<Document>: {document}",
    suffix="<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    positive=("yes",),
    negative=("no",),
)
"""The published template of Qwen3-Reranker (METHODS.md section 6.1)."""

MONOT5 = PointwisePrompt("", "Query: {query} Document: {document}", " Relevant:", (" true",), (" false",))
"""The form of monoT5 (arXiv 2003.06713), for causal language models (METHODS.md section 6.2)."""

INSTRUCTION = "Given a web search query, retrieve relevant passages that answer the query"
"""Default instruction of Qwen3-Reranker."""


class Pointwise(PromptReranker):
    """Probability of "yes" against "no" as the next token, document by document (Qwen3-Reranker, monoT5).

    ``score = P(yes) / (P(yes) + P(no)) = sigmoid(LSE(positive logits) - LSE(negative logits))``. Scores of different
    lists compare. Parts of a score: the logits of the tokens.

    Args:
        model: a causal language model; attached, and set to evaluation mode.
        tokenizer: its tokenizer.
        prompt: the templates.
        instruction: what the prompt's ``{instruction}`` says.
        max_length: tokens of a whole prompt.

    Raises:
        ValueError: an answer that is no single token, templates longer than ``max_length``, or an unfit model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prompt: PointwisePrompt = QWEN3_RERANKER,
        instruction: str = INSTRUCTION,
        max_length: int = 8192,
    ) -> None:
        super().__init__(model, tokenizer)
        self.prompt = prompt
        self.instruction = instruction
        self.use_candidates([*prompt.positive, *prompt.negative])
        self._around = self.tokenize([prompt.prefix, prompt.suffix])
        self._body_tokens = max_length - sum(len(ids) for ids in self._around)
        if self._body_tokens < 1:
            raise ValueError(f"max_length: expected more than {max_length - self._body_tokens}, got {max_length}")

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        prefix, suffix = self._around
        bodies = self.tokenize(
            [
                self.prompt.body.format(instruction=self.instruction, query=query, document=document)
                for document in documents
            ]
        )
        logits = yield [[prefix + body[: self._body_tokens] + suffix for body in bodies]]
        wide = logits.astype(np.float64)
        num_positive = len(self.prompt.positive)
        log_odds = _logsumexp(wide[:, :num_positive]) - _logsumexp(wide[:, num_positive:])
        names = [*self.prompt.positive, *self.prompt.negative]
        return ListScores(
            (0.5 * (1 + np.tanh(log_odds / 2))).tolist(),
            [len(body) > self._body_tokens for body in bodies],
            [dict(zip(names, row, strict=True)) for row in logits.tolist()],
        )


def _logsumexp(rows: np.ndarray) -> np.ndarray:
    largest = rows.max(axis=1)
    return largest + np.log(np.exp(rows - largest[:, None]).sum(axis=1))


class RankLLaMA(PromptReranker):
    """A sequence classifier's score of the last token of ``query: ... document: ...</s>`` (arXiv 2310.08319).

    Args:
        model: a Transformers model with a ``score`` layer; attached, and set to evaluation mode.
        tokenizer: its tokenizer, with an end-of-sequence token.
        max_query_tokens, max_document_tokens: tokens kept of each; 32 and 164 are the published lengths.

    Raises:
        ValueError: a tokenizer without an end-of-sequence token, a model without a score layer of one output.
    """

    model_head = "SequenceClassification"

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_query_tokens: int = 32,
        max_document_tokens: int = 164,
    ) -> None:
        super().__init__(model, tokenizer)
        if max_query_tokens < 1 or max_document_tokens < 1:
            raise ValueError(
                "max_query_tokens, max_document_tokens: expected positive integers, got "
                f"{max_query_tokens} and {max_document_tokens}"
            )
        if self.tokenizer.eos_token_id is None:
            raise ValueError("tokenizer: expected one with an end-of-sequence token, which is what is scored")
        self.max_query_tokens, self.max_body_tokens = max_query_tokens, max_document_tokens
        self.head = head_of(model)
        if self.head.weight is None or self.head.weight.shape[0] != 1:
            raise ValueError("model: expected a plain score layer with one output")
        self.candidates = torch.zeros(1, dtype=torch.int64)
        start = self.tokenizer("")["input_ids"][:1]
        self._start = start if start == [self.tokenizer.bos_token_id] else []

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        beginning = self._start + self.tokenize(f"query: {query}")[: self.max_query_tokens]
        bodies = self.tokenize([f" document: {document}" for document in documents])
        limit = self.max_body_tokens
        scores = yield [[beginning + body[:limit] + [self.tokenizer.eos_token_id] for body in bodies]]
        return ListScores(scores[:, 0].tolist(), [len(body) > limit for body in bodies], [{} for _ in bodies])


ERANK_PROMPT = (
    "Judge how relevant the document is to the query, with an integer from 0 (not relevant at all) to 10 (answers it "
    "fully).\nQuery: {query}\nDocument: {document}\nGive the integer alone, between <answer> and </answer>."
)
"""Wording of our own; ERank's reasoning before the answer is left out."""


def integer_texts(tokenizer: Any) -> list[str]:
    """The digits, and ``10`` where the tokenizer has a token for it (Llama 3, gpt-oss)."""
    return [*string.digits, *(["10"] if "10" in tokenizer.get_vocab() else [])]


def integer_probabilities(log_probs: np.ndarray) -> np.ndarray:
    """Probabilities of the integers 0 to 10 as an answer, float64 [N, 11].

    Args:
        log_probs: [N, 2, number of texts], of :func:`integer_texts` as the answer's first token and after a ``1``.
    """
    probabilities = np.exp(log_probs.astype(np.float64))
    first, zero_after_one = probabilities[:, 0], probabilities[:, 1, 0]
    one_and_zero = first[:, 1] * zero_after_one
    ten = one_and_zero + first[:, 10:].sum(axis=1)
    return np.column_stack([first[:, :1], first[:, 1] - one_and_zero, first[:, 2:10], ten])


def expected_integers(probabilities: np.ndarray) -> np.ndarray:
    """``sum k P(k) / sum P(k)``, float64 [N], of :func:`integer_probabilities`."""
    return probabilities @ np.arange(11) / probabilities.sum(axis=1)


class ERank(PromptReranker):
    """An integer from 0 to 10, weighed with its probability (ERank, METHODS.md section 6.3).

    The answer starts at ``<answer>``, without reasoning. A prompt is read with one more token, ``1``, at its end: the
    distribution before it is that of the first digit, the one at it says how probable ``10`` is after that ``1``,
    so one pass gives the probabilities of all eleven integers over the full vocabulary.

    Args:
        model: a causal language model; attached, and set to evaluation mode.
        tokenizer: its tokenizer; every digit has to be a token.
        score: ``"top"`` is ``k P(k)`` of the most probable integer k, as published; ``"expected"`` is
            ``sum k P(k) / sum P(k)``.
        max_document_tokens: longer documents keep their first so many tokens.

    Raises:
        ValueError: an unknown ``score``, a digit that is no token, or an unfit model.
    """

    read_tokens = 2
    log_probs = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        score: Literal["top", "expected"] = "top",
        max_document_tokens: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        if score not in ("top", "expected"):
            raise ValueError(f"score: expected 'top' or 'expected', got {score!r}")
        self.score = score
        self.use_candidates(integer_texts(tokenizer))
        self._around = around_user_turn(tokenizer, "<answer>")

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        documents, truncated = self.cut(documents)
        before, after = self._around
        prompts = self.tokenize(
            [before + ERANK_PROMPT.format(query=query, document=document) + after for document in documents]
        )
        one = int(self.candidates[1])
        log_probs = yield [[[*prompt, one] for prompt in prompts]]
        integers = integer_probabilities(log_probs)
        best = integers.argmax(axis=1)
        top = best * integers[np.arange(len(best)), best]
        expected = expected_integers(integers)
        return ListScores(
            (top if self.score == "top" else expected).tolist(),
            truncated,
            [
                {"integer": int(k), "probability": row[k], "expected": mean}
                for k, row, mean in zip(best, integers.tolist(), expected.tolist(), strict=True)
            ],
        )
