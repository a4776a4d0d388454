"""Rows of as many lists as fit in a number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from torch.utils.data import Sampler

__all__ = ["TokenBudgetSampler"]

OPEN = 16
"""How many batches a list is tried to fit in: fuller rows, whose number varies less from epoch to epoch."""


class TokenBudgetSampler(Sampler[list[int]]):
    """Batches of indices whose lists have at most ``max_tokens`` tokens together; a ``batch_sampler``.

    Lists are taken in order, or shuffled anew in each epoch; each goes to the first of the last batches where it fits,
    or begins the next. What an epoch gives depends on ``seed``, the epoch and the lengths alone. Every epoch has as
    many batches as the first, so that steps and epochs can be counted when training goes on: an epoch that needs fewer
    has its largest batches halved, one that needs more leaves its last batches out.

    Args:
        lengths: tokens of every list; read anew for each epoch, so that they may follow a dataset that draws anew.
        max_tokens: of a batch.
        max_lists: of a batch; None for as many as fit.
        shuffle: whether each epoch has an order of its own.
        seed: of the order.
        multiple_of: the number of batches is a multiple of this, so that every process gets the same number.

    Raises:
        ValueError: a list that alone exceeds ``max_tokens``, naming it, a number that is not positive, or fewer lists
            than ``multiple_of``. For a later epoch the first comes when it is iterated over.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        max_tokens: int,
        *,
        max_lists: int | None = None,
        shuffle: bool = True,
        seed: int = 0,
        multiple_of: int = 1,
    ) -> None:
        for name, value in (("max_tokens", max_tokens), ("max_lists", max_lists), ("multiple_of", multiple_of)):
            if value is not None and value < 1:
                raise ValueError(f"{name}: expected a positive integer, got {value}")
        if len(lengths) < multiple_of:
            raise ValueError(f"lengths: expected at least {multiple_of} lists, one per process, got {len(lengths)}")
        self.lengths = lengths
        self.max_tokens = max_tokens
        self.max_lists = max_lists
        self.shuffle = shuffle
        self.seed = seed
        self.epoch = 0
        needed = len(self._filled())
        self._num_batches = min(-(-needed // multiple_of) * multiple_of, len(lengths) // multiple_of * multiple_of)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch that is iterated over next."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self._num_batches

    def __iter__(self) -> Iterator[list[int]]:
        batches = self._filled()
        while len(batches) < self._num_batches:
            place = max(range(len(batches)), key=lambda place: len(batches[place]))
            largest = batches[place]
            batches[place : place + 1] = [largest[: len(largest) // 2], largest[len(largest) // 2 :]]
        yield from batches[: self._num_batches]

    def _filled(self) -> list[list[int]]:
        order = list(range(len(self.lengths)))
        if self.shuffle:
            np.random.default_rng([self.seed, self.epoch]).shuffle(order)
        batches: list[list[int]] = []
        room: list[int] = []
        for index in order:
            length = self.lengths[index]
            if length > self.max_tokens:
                raise ValueError(f"max_tokens: expected at least the {length} tokens of list {index}")
            recent = range(max(0, len(batches) - OPEN), len(batches))
            fitting = (place for place in recent if length <= room[place] and len(batches[place]) != self.max_lists)
            place = next(fitting, len(batches))
            if place == len(batches):
                batches.append([])
                room.append(self.max_tokens)
            batches[place].append(index)
            room[place] -= length
        return batches
