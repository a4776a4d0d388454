"""What the rerankers have in common that read a few logits at the end of prompts.

A method is a generator: for one list it yields the prompts that it wants read, gets one row of numbers per prompt back,
and so on until it returns the list's scores. Many lists advance together, so that prompts of all of them share packed
rows, and prompts that begin alike are computed from where they differ (:func:`rankernel.models.pack_prompts`).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, cast

import numpy as np
import torch

from rankernel.models import final_hidden_states, head_of, model_inputs, pack_prompts
from rankernel.models.attach import decoder_of
from rankernel.models.packing import packed_tokens
from rankernel.rerankers.loading import ModelReranker, token_ids
from rankernel.rerankers.protocol import BATCH_TOKENS, ListScores, check_batch_tokens, check_texts

if TYPE_CHECKING:
    pass

Groups = list[list[list[int]]]
"""Token ids of prompts, in groups of prompts that begin alike."""

Steps = Generator[Groups, np.ndarray, ListScores]
"""Yields prompts, is sent float32 [prompts, C] (or [prompts, read_tokens, C]), returns the scores."""


class _Running(NamedTuple):
    place: int
    steps: Steps
    wanted: Groups
    num_tokens: int


def _nothing() -> Steps:
    """The steps of a list without documents."""
    yield from ()
    return ListScores([], [], [])


class PromptReranker(ModelReranker):
    """Base of the methods that read logits of a few tokens at the end of prompts; made as :class:`ModelReranker`."""

    read_tokens = 1
    """How many of a prompt's last tokens are read."""
    log_probs = False
    """Whether log-probabilities over the vocabulary are read instead of logits."""

    @abstractmethod
    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """The method on one list of at least one document."""

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [N, C] from final hidden states [N, E]: by default what the head says of :attr:`candidates`."""
        return self.head.candidate_logits(hidden, self.candidates, log_probs=self.log_probs)

    def use_candidates(self, texts: Sequence[str]) -> None:
        """Resolves the tokens whose logits :meth:`read` gives, in this order; for constructors.

        Raises:
            ValueError: a text that is not one token of its own, or a model without a head that is known.
        """
        self.candidates = token_ids(self.tokenizer, texts)
        self.head = head_of(self.model)

    def score_lists(
        self, lists: Iterable[tuple[str, Sequence[str]]], *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[ListScores]:
        """See :meth:`Reranker.score_lists`."""
        check_batch_tokens(batch_tokens)
        waiting = enumerate(lists)
        running: list[_Running] = []
        finished: dict[int, ListScores] = {}
        following, exhausted = 0, False

        def advance(place: int, steps: Steps, numbers: np.ndarray | None) -> None:
            try:
                wanted = steps.send(cast(np.ndarray, numbers))
            except StopIteration as stop:
                finished[place] = stop.value
            else:
                running.append(_Running(place, steps, wanted, packed_tokens(wanted)))

        while True:
            while following in finished:
                yield finished.pop(following)
                following += 1
            while not exhausted and sum(one.num_tokens for one in running) < batch_tokens:
                entry = next(waiting, None)
                exhausted = entry is None
                if entry is not None:
                    place, (query, documents) = entry
                    check_texts(query, documents)
                    advance(place, self.steps(query, documents) if documents else _nothing(), None)
            if running:
                numbers = self._run([group for one in running for group in one.wanted], batch_tokens)
                answered, running = running, []
                begin = 0
                for one in answered:
                    end = begin + sum(len(group) for group in one.wanted)
                    advance(one.place, one.steps, numbers[begin:end])
                    begin = end
            elif following not in finished:
                return

    @torch.no_grad()
    def _run(self, groups: Groups, batch_tokens: int) -> np.ndarray:
        """Float32 [prompts, C], or [prompts, read_tokens, C] where several tokens of a prompt are read."""
        device, last = decoder_of(self.model).device, self.read_tokens
        found = []
        for row in pack_prompts(groups, batch_tokens=batch_tokens, window=self.sliding_window, last=last):
            inputs = model_inputs(row.input_ids.to(device), row.layout, position_ids=row.position_ids.to(device))
            rows = (row.ends[:, None] + torch.arange(1 - last, 1)).flatten()
            found.append(self.read(final_hidden_states(self.model, rows, **inputs)).float().cpu())
        numbers = torch.cat(found)
        if not numbers.isfinite().all():
            raise FloatingPointError("the model's logits are not finite")
        return (numbers if last == 1 else numbers.unflatten(0, (-1, last))).numpy()

    def tokenize(self, text: str | Sequence[str]) -> Any:
        """See :func:`tokenize`."""
        return tokenize(self.tokenizer, text)

    def cut(self, documents: Sequence[str]) -> tuple[list[str], list[bool]]:
        """See :func:`cut`."""
        return cut(self.tokenizer, documents, self.max_document_tokens)


def tokenize(tokenizer: Any, text: str | Sequence[str]) -> Any:
    """Token ids of a text, or of several, without special tokens."""
    texts = [text] if isinstance(text, str) else list(text)
    options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
    ids = tokenizer(texts, **options)["input_ids"] if texts else []
    return ids[0] if isinstance(text, str) else ids


def cut(tokenizer: Any, documents: Sequence[str], limit: int | None) -> tuple[list[str], list[bool]]:
    """The documents with at most ``limit`` tokens each, and whether that cut them."""
    if limit is None:
        return list(documents), [False] * len(documents)
    ids = tokenize(tokenizer, documents)
    too_long = [len(tokens) > limit for tokens in ids]
    return [
        tokenizer.decode(tokens[:limit]) if shorten else text
        for text, tokens, shorten in zip(documents, ids, too_long, strict=True)
    ], too_long
