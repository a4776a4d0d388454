"""Labelled lists of documents to one packed row of tokens, with the prompts that inference uses."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from rankernel.layout import BlockLayout, ListLengths, Pattern
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.first import LETTERS, FirstSettings, around_passages, window_prompt
from rankernel.rerankers.loading import token_id, token_ids
from rankernel.rerankers.prompted import cut, tokenize
from rankernel.rerankers.prompts import build_blocks
from rankernel.training.data import RankingExample

__all__ = ["FirstCollator", "RankingBatch", "RankingCollator"]


class RankingBatch:
    """L packed lists of T tokens in all, N documents in the longest.

    A plain class for the reason :class:`rankernel.BlockLayout` is one.

    Attributes:
        input_ids: int64 [T].
        layout: where the lists lie.
        signal_rows: int64 [L * signal tokens], packed positions of the signal rows, list by list.
        labels: float32 [L, N], relevance, the higher the better; 0 where ``present`` is False.
        teacher_scores: float32 [L, N], likewise, or None where no list has a teacher.
        present: bool [L, N], True for documents and False for what only fills up shorter lists.
        answer_rows: int64 [A], ascending, packed positions whose next token is one of an answer.
        answer_ids: int64 [A], those next tokens.
        answer_weights: float32 [A], what the loss of each is multiplied by.
    """

    def __init__(
        self,
        *,
        input_ids: torch.Tensor,
        layout: BlockLayout,
        signal_rows: torch.Tensor,
        labels: torch.Tensor,
        teacher_scores: torch.Tensor | None,
        present: torch.Tensor,
        answer_rows: torch.Tensor,
        answer_ids: torch.Tensor,
        answer_weights: torch.Tensor,
    ) -> None:
        self.input_ids = input_ids
        self.layout = layout
        self.signal_rows = signal_rows
        self.labels = labels
        self.teacher_scores = teacher_scores
        self.present = present
        self.answer_rows = answer_rows
        self.answer_ids = answer_ids
        self.answer_weights = answer_weights

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RankingBatch:
        """The same batch on ``device``."""
        return self._map(lambda part: part.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> RankingBatch:
        """The same batch in pinned memory, for a ``DataLoader``; the layout's few integers stay where they are."""
        return self._map(lambda part: part if isinstance(part, BlockLayout) else part.pin_memory())

    def _map(self, function: Callable[[Any], Any]) -> RankingBatch:
        parts: dict[str, Any] = {name: None if part is None else function(part) for name, part in vars(self).items()}
        return RankingBatch(**parts)


class _PackedList(NamedTuple):
    """One list.

    Attributes:
        input_ids: of the prompt and the answer.
        lengths: as ``BlockLayout.from_lengths`` takes them.
        signal: places of the signal rows among ``input_ids``.
        answer_begin: place of the first token of the answer, which goes on to the end.
        answer_weights: one per token of the answer.
    """

    input_ids: list[int]
    lengths: ListLengths
    signal: range
    answer_begin: int
    answer_weights: list[float]


class _Collator(ABC):
    """What the methods' collators share: use them as ``collate_fn`` of a ``DataLoader``."""

    pattern: Pattern

    @abstractmethod
    def pack(self, example: RankingExample) -> _PackedList:
        """The tokens of one list."""

    def num_tokens(self, example: RankingExample) -> int:
        """How many tokens of a row a list takes."""
        return len(self.pack(example).input_ids)

    def __call__(self, examples: Sequence[RankingExample]) -> RankingBatch:
        """
        Raises:
            ValueError: labels or teacher scores that are not one per document, a teacher for some lists only, or a list
                that does not fit the method's prompt.
            TypeError: a text that is not a string.
        """
        ids: list[int] = []
        signal_rows: list[int] = []
        answer_rows: list[int] = []
        answer_ids: list[int] = []
        answer_weights: list[float] = []
        lengths = []
        for packed in map(self.pack, examples):
            begin, answer = len(ids), packed.input_ids[packed.answer_begin :]
            ids += packed.input_ids
            signal_rows += [begin + place for place in packed.signal]
            answer_rows += range(len(ids) - len(answer) - 1, len(ids) - 1)
            answer_ids += answer
            answer_weights += packed.answer_weights
            lengths.append(packed.lengths)
        taught = [example.teacher_scores is not None for example in examples]
        if any(taught) and not all(taught):
            raise ValueError("teacher_scores: expected in all lists of a batch or in none")
        teacher = _padded("teacher_scores", examples) if any(taught) else None
        return RankingBatch(
            input_ids=torch.tensor(ids, dtype=torch.int64),
            layout=BlockLayout.from_lengths(lengths, self.pattern),
            signal_rows=torch.tensor(signal_rows, dtype=torch.int64),
            labels=_padded("labels", examples),
            teacher_scores=teacher,
            present=_rows([[True] * len(example.documents) for example in examples], torch.bool),
            answer_rows=torch.tensor(answer_rows, dtype=torch.int64),
            answer_ids=torch.tensor(answer_ids, dtype=torch.int64),
            answer_weights=torch.tensor(answer_weights, dtype=torch.float32),
        )


class RankingCollator(_Collator):
    """BlockRank's :class:`RankingBatch`: documents as blocks, and behind the signal rows the answer.

    The answer is ``{index of the document with the best label}]``, the first one among equals (METHODS.md section 1.2);
    a list in which no label is above 0 has none.

    Args:
        tokenizer: a Transformers tokenizer.
        settings: prompt and truncation, the same with which the model will rank.
    """

    def __init__(self, tokenizer: Any, settings: BlockRankSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings
        self.pattern = settings.pattern

    def pack(self, example: RankingExample) -> _PackedList:
        prompt = self.settings.prompt
        blocks = build_blocks(
            self.tokenizer, prompt, example.query, example.documents, self.settings.max_document_tokens
        )
        best = max(example.labels, default=0.0)
        answer = tokenize(self.tokenizer, f"{list(example.labels).index(best)}]") if best > 0 else []
        end = len(blocks.input_ids)
        prefix, documents, tail = blocks.lengths
        return _PackedList(
            blocks.input_ids + answer,
            (prefix, documents, tail + len(answer)),
            range(end - prompt.signal_tokens, end),
            end,
            [1.0] * len(answer),
        )


class FirstCollator(_Collator):
    """FIRST's :class:`RankingBatch`: causal prompts, and the answer ``[B] > [A] > ...``, best passage first.

    The order is the teacher's where there is one, else that of the labels, the earlier passage first among equals. The
    signal row of a list is that of the ``[`` whose next token is the first identifier (METHODS.md section 3.3).

    Args:
        tokenizer: a Transformers tokenizer, in which every letter that a window needs is a token.
        settings: window and truncation, the same with which the model will rank.
        importance_weighted: whether to weight the answer's tokens as FullRank does (METHODS.md section 4):
            ``1 + 1 / log2(rank + 1)``, and 1 for the separator behind every rank.

    Attributes:
        letters: int64 [window], token ids of the identifiers.

    Raises:
        ValueError: a letter that is no token of its own.
    """

    pattern = "causal"

    def __init__(
        self, tokenizer: Any, settings: FirstSettings | None = None, *, importance_weighted: bool = False
    ) -> None:
        self.tokenizer = tokenizer
        self.settings = settings or FirstSettings()
        self.importance_weighted = importance_weighted
        self.letters = token_ids(tokenizer, LETTERS[: self.settings.window])
        self._around = around_passages(tokenizer)
        shown = tokenize(tokenizer, "[A] > [B]")
        try:
            first, second = (shown.index(token_id(tokenizer, letter)) for letter in "AB")
        except ValueError:
            raise ValueError(
                f"tokenizer: expected '[A] > [B]' to hold its letters as tokens, got {tokenizer.batch_decode(shown)}"
            ) from None
        self._between, self._end = shown[first + 1 : second], shown[second + 1 :]
        self._separators = {token for token in self._between if ">" in tokenizer.decode([token])}

    def pack(self, example: RankingExample) -> _PackedList:
        count = len(example.documents)
        if not 1 <= count <= len(self.letters):
            raise ValueError(f"documents: expected 1 to {len(self.letters)}, the window, got {count}")
        passages, _ = cut(self.tokenizer, example.documents, self.settings.max_document_tokens)
        prompt = window_prompt(self.tokenizer, self._around, example.query, passages)
        target = example.labels if example.teacher_scores is None else example.teacher_scores
        order = sorted(range(count), key=lambda index: -target[index])
        ids, letters = list(prompt), self.letters.tolist()
        for rank, index in enumerate(order):
            ids += [*(self._between if rank else []), letters[index]]
        ids += self._end
        # The completion begins with the "[" that the prompt ends with.
        signal = len(prompt) - 1
        return _PackedList(ids, (0, [], len(ids)), range(signal, signal + 1), signal, self._weights(ids[signal:]))

    def _weights(self, answer: Sequence[int]) -> list[float]:
        if not self.importance_weighted:
            return [1.0] * len(answer)
        weights, rank = [], 1
        for token in answer:
            separates = token in self._separators
            weights.append(1.0 if separates else 1.0 + 1.0 / math.log2(rank + 1))
            rank += separates
        return weights


def _padded(name: str, examples: Sequence[RankingExample]) -> torch.Tensor:
    rows = [getattr(example, name) for example in examples]
    for row, (values, example) in enumerate(zip(rows, examples, strict=True)):
        if len(values) != len(example.documents):
            raise ValueError(
                f"examples[{row}].{name}: expected {len(example.documents)}, one per document, got {len(values)}"
            )
    return _rows(rows, torch.float32)


def _rows(rows: Sequence[Sequence[float]], dtype: torch.dtype) -> torch.Tensor:
    longest = max(map(len, rows), default=0)
    padded = [[*row, *[0.0] * (longest - len(row))] for row in rows]
    return torch.tensor(padded, dtype=dtype).reshape(len(rows), longest)
