"""Labelled lists of documents to one packed row of tokens, with the prompt blocks that inference uses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rankernel.layout import BlockLayout
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.rerankers.prompts import build_blocks


@dataclass(frozen=True)
class RankingExample:
    """One labelled list.

    Attributes:
        query: text of the query.
        documents: text of every document, in the order in which the prompt shows them.
        positives: indices of the relevant documents; may be empty, which leaves the list out of the losses.
    """

    query: str
    documents: Sequence[str]
    positives: Sequence[int]


class RankingBatch:
    """L packed lists of T tokens in all.

    The answer, ``{index of the first positive}]``, stands at the end of the tail, behind the signal rows. A plain
    class for the reason :class:`rankernel.BlockLayout` is one.

    Attributes:
        input_ids: int64 [T].
        layout: where the lists lie.
        signal_rows: int64 [L * signal tokens], packed positions of the signal rows, list by list.
        positives: bool [L, max_documents], True for relevant documents.
        present: bool [L, max_documents], True for documents and False for what only fills up shorter lists.
        answer_rows: int64 [A], packed positions whose next token is one of an answer.
        answer_ids: int64 [A], those next tokens.
    """

    def __init__(
        self,
        input_ids: torch.Tensor,
        layout: BlockLayout,
        signal_rows: torch.Tensor,
        positives: torch.Tensor,
        present: torch.Tensor,
        answer_rows: torch.Tensor,
        answer_ids: torch.Tensor,
    ) -> None:
        self.input_ids = input_ids
        self.layout = layout
        self.signal_rows = signal_rows
        self.positives = positives
        self.present = present
        self.answer_rows = answer_rows
        self.answer_ids = answer_ids

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> RankingBatch:
        """The same batch on ``device``."""
        moved = {
            name: tensor.to(device, non_blocking=non_blocking)
            for name, tensor in vars(self).items()
            if isinstance(tensor, torch.Tensor)
        }
        return RankingBatch(layout=self.layout.to(device, non_blocking), **moved)


class RankingCollator:
    """Turns labelled lists into a :class:`RankingBatch`; use as ``collate_fn`` of a ``DataLoader``.

    Args:
        tokenizer: a Transformers tokenizer.
        settings: prompt and truncation, the same with which the model will rank.
    """

    def __init__(self, tokenizer: Any, settings: BlockRankSettings) -> None:
        self.tokenizer = tokenizer
        self.settings = settings

    def __call__(self, examples: Sequence[RankingExample]) -> RankingBatch:
        """
        Raises:
            ValueError: a positive that is not an index of its list, or a prompt that :func:`build_blocks` refuses.
            TypeError: a text that is not a string.
        """
        signal_tokens = self.settings.prompt.signal_tokens
        max_documents = max((len(example.documents) for example in examples), default=0)
        positives = torch.zeros(len(examples), max_documents, dtype=torch.bool)
        present = torch.zeros_like(positives)
        ids: list[int] = []
        signal_rows: list[int] = []
        answer_rows: list[int] = []
        answer_ids: list[int] = []
        lengths = []
        for row, example in enumerate(examples):
            outside = [index for index in example.positives if not 0 <= index < len(example.documents)]
            if outside:
                raise ValueError(
                    f"examples[{row}].positives: expected indices of its {len(example.documents)} documents, "
                    f"got {outside}"
                )
            blocks = build_blocks(
                self.tokenizer,
                self.settings.prompt,
                example.query,
                example.documents,
                self.settings.max_document_tokens,
            )
            ids += blocks.input_ids
            signal_rows += range(len(ids) - signal_tokens, len(ids))
            prefix, documents, tail = blocks.lengths
            if example.positives:
                answer = self._answer(example.positives[0])
                answer_rows += range(len(ids) - 1, len(ids) - 1 + len(answer))
                answer_ids += answer
                ids += answer
                tail += len(answer)
            lengths.append((prefix, documents, tail))
            present[row, : len(example.documents)] = True
            positives[row, list(example.positives)] = True
        return RankingBatch(
            torch.tensor(ids, dtype=torch.int64),
            BlockLayout.from_lengths(lengths),
            torch.tensor(signal_rows, dtype=torch.int64),
            positives,
            present,
            torch.tensor(answer_rows, dtype=torch.int64),
            torch.tensor(answer_ids, dtype=torch.int64),
        )

    def _answer(self, index: int) -> list[int]:
        ids: list[int] = self.tokenizer(f"{index}]", add_special_tokens=False)["input_ids"]
        return ids
