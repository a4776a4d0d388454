"""IRanker: asks again and again for the least likely candidate, and removes it."""

from __future__ import annotations

import math
import string
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from rankernel.layout import BlockLayout
from rankernel.models import final_hidden_states, head_of, model_inputs
from rankernel.models.attach import decoder_of
from rankernel.models.documents import DocumentContext, obstacle, prefill
from rankernel.rerankers.loading import ModelReranker, token_ids
from rankernel.rerankers.prompts import BlockPrompt, build_blocks
from rankernel.rerankers.protocol import BATCH_TOKENS, ListScores, check_batch_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LETTERS = string.ascii_uppercase + string.ascii_lowercase
"""Identifiers of the candidates in a pool, in their order."""

IRANKER = BlockPrompt(
    prefix=(
        "You will be given a query and candidate documents, each marked with a letter in brackets.\n"
        "Query: {query}\n\nCandidates:"
    ),
    document=" {text}",
    tail=(
        "\n\nQuery: {query}\nWhich candidate is the least likely to answer the query? Give its letter in brackets.\n"
        "Least likely candidate: "
    ),
    answer="[",
    signal_tokens=1,
)
"""Wording of our own, for one letter as the answer; in front of a document stands its mark, such as ``[A]``."""

Exclusion = tuple[int, float]
"""A document's place in the list, and the logit with which it was excluded."""


def exclusion_order(
    num_documents: int, window: int, step: int, exclude: Callable[[list[int], int], Iterable[Exclusion]]
) -> list[Exclusion]:
    """All documents but the one that remains, those excluded first at the beginning.

    A pool of at most ``window`` documents starts at the end of the list; whenever ``step`` of it are excluded, the
    documents next above fill it up. Once there are none above, the pool is excluded down to one.

    Args:
        num_documents: length of the list.
        window: documents in a pool.
        step: exclusions from a pool while documents wait above it, less than ``window``.
        exclude: is given a pool, ascending, and how many of it to exclude; returns them in the order of exclusion.
    """
    excluded: list[Exclusion] = []
    pool: list[int] = []
    waiting = num_documents
    while len(excluded) < num_documents - 1:
        begin = max(0, waiting - (window - len(pool)))
        pool = [*range(begin, waiting), *pool]
        waiting = begin
        excluded += exclude(pool, step if waiting else len(pool) - 1)
        gone = {document for document, _ in excluded}
        pool = [document for document in pool if document not in gone]
    return excluded


class IRanker(ModelReranker):
    """Ranks by excluding the least likely candidate, one after the other (IRanker, METHODS.md section 6.5).

    The candidates of a pool are marked ``[A]``, ``[B]``, ...; the answer begins with ``[``, and of the letters still
    there the one with the highest logit is excluded, of equal ones the last. What is excluded first is ranked last.
    That is n - 1 answers for n documents. Lists longer than ``window`` are worked off from their end
    (:func:`exclusion_order`).

    Documents are blocks that see the prefix and themselves and all start behind the prefix, the tail starts behind the
    longest of the list. So a pool's documents run once, and each answer costs its tail alone
    (:func:`rankernel.models.documents.prefill`). Where a sliding window is shorter than the prompt, or a RoPE depends
    on its length, the prompt of the documents that are left runs again for each answer.

    Scores are minus the rank. Parts of a score: ``logit``, with which the document was excluded, and ``round``, how
    many were excluded up to and with it; the document that remains has none.

    Args:
        model: a causal language model; attached, and set to evaluation mode.
        tokenizer: its tokenizer; a letter has to be a token.
        window: candidates in a pool, at most 52, the number of letters.
        step: how many are excluded before documents from further up join the pool.
        max_document_tokens: longer documents keep their first so many tokens; None keeps all.

    Raises:
        ValueError: an argument out of range, a letter that is no token, or an unfit model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        window: int = 20,
        step: int = 10,
        max_document_tokens: int | None = None,
    ) -> None:
        if not 2 <= window <= len(LETTERS):
            raise ValueError(f"window: expected from 2 to {len(LETTERS)}, got {window}")
        if not 1 <= step < window:
            raise ValueError(f"step: expected from 1 to {window - 1}, less than window, got {step}")
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        self.window, self.step = window, step
        self._head = head_of(model)
        self._letters = token_ids(tokenizer, LETTERS[:window])
        marks = self.tokenizer([f"\n[{letter}]" for letter in LETTERS[:window]], add_special_tokens=False)["input_ids"]
        self._marks = [torch.tensor(mark) for mark in marks]

    def score_lists(
        self, lists: Iterable[tuple[str, Sequence[str]]], *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[ListScores]:
        """See :meth:`Reranker.score_lists`. List by list: every answer waits for the one before it.

        So rows are pools of one list, whatever ``batch_tokens`` is.
        """
        check_batch_tokens(batch_tokens)
        for query, documents in lists:
            yield self._score_list(query, documents)

    @torch.no_grad()
    def _score_list(self, query: str, documents: Sequence[str]) -> ListScores:
        blocks = build_blocks(self.tokenizer, IRANKER, query, documents, self.max_document_tokens)
        prefix_length, lengths, tail_length = blocks.lengths
        prefix, *texts, tail = torch.tensor(blocks.input_ids).split([prefix_length, *lengths, tail_length])
        longest = max(map(len, self._marks)) + max(lengths, default=0)

        def exclude(pool: list[int], count: int) -> Iterator[Exclusion]:
            marked = [torch.cat([mark, texts[document]]) for mark, document in zip(self._marks, pool, strict=False)]
            prompt = _Prompt(prefix, marked, tail, prefix_length + longest)
            return ((pool[place], logit) for place, logit in self._exclude(prompt, count))

        excluded = exclusion_order(len(texts), self.window, self.step, exclude)
        scores = [-1.0] * len(texts)
        parts: list[Mapping[str, float]] = [{} for _ in texts]
        for done, (document, logit) in enumerate(excluded):
            scores[document] = float(done - len(texts))
            parts[document] = {"logit": logit, "round": done + 1}
        return ListScores(scores, blocks.truncated, parts)

    def _exclude(self, prompt: _Prompt, count: int) -> Iterator[Exclusion]:
        """Places in the prompt of the ``count`` documents excluded first."""
        context = prompt.context(self.model)
        for _ in range(count):
            left = context.documents
            logits = self._head.candidate_logits(context.tail(prompt.tail), self._letters[left])[0].tolist()
            if not all(map(math.isfinite, logits)):
                raise FloatingPointError("the model's logits are not finite")
            logit, place = max(zip(logits, left, strict=True))
            yield place, logit
            context.remove(place)


class _Prompt(NamedTuple):
    """Token ids of the prompt of one pool, and the position of the first tail token."""

    prefix: torch.Tensor
    documents: list[torch.Tensor]
    tail: torch.Tensor
    tail_offset: int

    def context(self, model: torch.nn.Module) -> DocumentContext | _RepeatedPrompt:
        lengths = [len(document) for document in self.documents]
        num_tokens = len(self.prefix) + sum(lengths) + len(self.tail)
        if obstacle(model, num_tokens, self.tail_offset + len(self.tail)) is not None:
            return _RepeatedPrompt(model, self)
        return prefill(
            model,
            torch.cat([self.prefix, *self.documents]).to(decoder_of(model).device),
            BlockLayout.from_lengths([(len(self.prefix), lengths, 0)]),
            tail_room=len(self.tail),
            tail_offset=self.tail_offset,
        )


class _RepeatedPrompt:
    """Stands in for a :class:`DocumentContext` by running the whole prompt for every tail."""

    def __init__(self, model: torch.nn.Module, prompt: _Prompt) -> None:
        self._model, self._prompt = model, prompt
        self.documents = list(range(len(prompt.documents)))

    def remove(self, document: int) -> None:
        self.documents.remove(document)

    def tail(self, input_ids: torch.Tensor) -> torch.Tensor:
        prefix, documents, _, tail_offset = self._prompt
        left = [documents[document] for document in self.documents]
        layout = BlockLayout.from_lengths([(len(prefix), [len(tokens) for tokens in left], len(input_ids))])
        tokens = torch.cat([prefix, *left, input_ids]).to(decoder_of(self._model).device)
        last = torch.tensor([layout.num_tokens - 1])
        return final_hidden_states(self._model, last, **model_inputs(tokens, layout, tail_offset=tail_offset))
