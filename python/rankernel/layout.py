"""Where the prefix, documents and tail of every list lie in one packed row of tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Literal

import torch

PREFIX, DOCUMENT, TAIL = 0, 1, 2
PATTERNS = ("block", "causal")

Pattern = Literal["block", "causal"]
ListLengths = tuple[int, Sequence[int], int]


class BlockLayout:
    """Boundaries of the lists ``[prefix][document]...[document][tail]`` packed in one row of T tokens.

    Under ``pattern="block"`` a document sees its list's prefix and, causally, itself; the tail sees everything
    before it in its list; the prefix sees itself causally (BlockRank, arXiv 2510.05396, section 3).
    Under ``pattern="causal"`` each list is an ordinary causal sequence. Lists never see each other.

    Every list has its prefix and its tail as segments even where they are empty, so list ``l`` always consists of
    the segments ``list_offsets[l] .. list_offsets[l + 1]``, the first a prefix and the last a tail.

    Made by :meth:`from_lengths`. This is a plain class, neither dataclass nor dict, because FSDP's mixed precision
    rebuilds those for every layer. It is immutable by convention: kernels check the boundaries on every call.

    Attributes:
        cu_seqlens: int32 [S + 1], first token of each of the S segments, then T.
        roles: int32 [S], ``PREFIX``, ``DOCUMENT`` or ``TAIL``.
        list_offsets: int32 [L + 1], first segment of each list, then S.
        document_offsets: int32 [L + 1], number of documents before each list, then all.
        lengths: the tuples the layout was made from.
        num_tokens, num_lists, num_documents, max_documents: Python ints.
        pattern: ``"block"`` or ``"causal"``.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        lengths: tuple[tuple[int, tuple[int, ...], int], ...],
        pattern: Pattern,
    ) -> None:
        self.cu_seqlens, self.roles, self.list_offsets, self.document_offsets = tensors
        self.lengths = lengths
        self.pattern = pattern
        self.causal = pattern == "causal"
        self.num_tokens = sum(prefix + sum(documents) + tail for prefix, documents, tail in lengths)
        self.num_lists = len(lengths)
        self.num_documents = sum(len(documents) for _, documents, _ in lengths)
        self.max_documents = max((len(documents) for _, documents, _ in lengths), default=0)
        self._on_device: dict[torch.device, BlockLayout] = {self.cu_seqlens.device: self}
        # A compiled graph shall serve any number of segments from its first layout on. Not imported for eager users:
        # whoever compiles has it.
        if "torch._dynamo" in sys.modules:
            for tensor in tensors:
                torch._dynamo.maybe_mark_dynamic(tensor, 0)

    @classmethod
    def from_lengths(cls, lengths: Sequence[ListLengths], pattern: Pattern = "block") -> BlockLayout:
        """Builds the layout of several lists packed one after the other.

        Args:
            lengths: one ``(prefix_len, [doc_len, ...], tail_len)`` per list, in tokens. Zero documents and
                zero-length segments are valid.
            pattern: ``"block"`` or ``"causal"``.

        Raises:
            ValueError: a negative length, an unknown pattern, or 2**31 tokens or more.
            TypeError: a length that is not an integer.
        """
        if pattern not in PATTERNS:
            raise ValueError(f"pattern: expected one of {PATTERNS}, got {pattern!r}")
        cleaned = tuple(_clean(index, entry) for index, entry in enumerate(lengths))
        boundaries, roles, list_offsets, document_offsets = [0], [], [0], [0]
        for prefix, documents, tail in cleaned:
            for length in (prefix, *documents, tail):
                boundaries.append(boundaries[-1] + length)
            roles += [PREFIX, *[DOCUMENT] * len(documents), TAIL]
            list_offsets.append(len(roles))
            document_offsets.append(document_offsets[-1] + len(documents))
        if boundaries[-1] >= 2**31:
            raise ValueError(f"lengths: expected fewer than 2**31 tokens in all, got {boundaries[-1]}")
        tensors = [torch.tensor(v, dtype=torch.int32) for v in (boundaries, roles, list_offsets, document_offsets)]
        return cls(tensors, cleaned, pattern)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> BlockLayout:
        """The same layout with its tensors on ``device``; copied once per device and remembered.

        With ``non_blocking`` a copy to a GPU is work of the current stream, which other streams have to wait for.
        """
        device = torch.empty(0, device=device).device
        if device not in self._on_device:
            tensors = (self.cu_seqlens, self.roles, self.list_offsets, self.document_offsets)
            moved = BlockLayout([moved_to(t, device, non_blocking) for t in tensors], self.lengths, self.pattern)
            moved._on_device = self._on_device
            self._on_device[device] = moved
        return self._on_device[device]

    def segments(self) -> list[list[tuple[int, int, int]]]:
        """Per list, its segments as ``(first token, end token, role)``."""
        lists, token = [], 0
        for prefix, documents, tail in self.lengths:
            rows = []
            for length, role in ((prefix, PREFIX), *((d, DOCUMENT) for d in documents), (tail, TAIL)):
                rows.append((token, token + length, role))
                token += length
            lists.append(rows)
        return lists

    def position_ids(
        self, scheme: Literal["shared", "sequential"] = "shared", tail_offset: int = 16384
    ) -> torch.Tensor:
        """Position of every packed token, int64 [T].

        ``"shared"`` starts every document right after its prefix and the tail at ``tail_offset``, so scores do not
        depend on the order of the documents (BlockRank, arXiv 2510.05396, section 3; the offset is that of the
        published code). ``"sequential"`` counts the tokens of each list.

        Raises:
            ValueError: an unknown scheme, or a list whose prefix and longest document reach past ``tail_offset``.
        """
        if scheme not in ("shared", "sequential"):
            raise ValueError(f"scheme: expected 'shared' or 'sequential', got {scheme!r}")
        positions = torch.empty(self.num_tokens, dtype=torch.int64)
        for index, rows in enumerate(self.segments()):
            prefix_length = rows[0][1] - rows[0][0]
            longest = max((end - begin for begin, end, _ in rows[1:-1]), default=0)
            if scheme == "shared" and prefix_length + longest > tail_offset:
                raise ValueError(
                    f"tail_offset: expected at least {prefix_length + longest}, the prefix plus the longest document "
                    f"of list {index}, got {tail_offset}"
                )
            for begin, end, role in rows:
                start = begin - rows[0][0]
                if scheme == "shared":
                    start = (0, prefix_length, tail_offset)[role]
                positions[begin:end] = torch.arange(start, start + end - begin)
        return moved_to(positions, self.cu_seqlens.device, non_blocking=True)

    def tail_positions(self, last: int = 1) -> torch.Tensor:
        """Packed positions of the last ``last`` tail tokens of every list, int64 [num_lists * last].

        Raises:
            ValueError: a list whose tail is shorter than ``last``.
        """
        positions: list[int] = []
        for index, rows in enumerate(self.segments()):
            begin, end, _ = rows[-1]
            if end - begin < last:
                raise ValueError(f"last: expected at most the tail length, {end - begin} in list {index}, got {last}")
            positions += range(end - last, end)
        return moved_to(torch.tensor(positions, dtype=torch.int64), self.cu_seqlens.device, non_blocking=True)

    def dense_mask(self, window: int | None = None) -> torch.Tensor:
        """Bool [T, T], True where row i sees key j. For references and tests: quadratic memory.

        ``window`` keeps only keys with ``i - j < window``, counted in packed tokens as Transformers does.
        """
        device = self.cu_seqlens.device
        mask = torch.zeros(self.num_tokens, self.num_tokens, dtype=torch.bool, device=device)
        for rows in self.segments():
            first, last = rows[0][0], rows[-1][1]
            for begin, end, role in rows:
                mask[begin:end, begin:end] = True
                if role == DOCUMENT:
                    mask[begin:end, first : rows[0][1]] = True
                if role == TAIL or self.causal:
                    mask[begin:end, first:last] = True
        index = torch.arange(self.num_tokens, device=device)
        distance = index[:, None] - index[None, :]
        mask &= distance >= 0
        if window is not None:
            mask &= distance < window
        return mask

    def __repr__(self) -> str:
        return (
            f"BlockLayout(num_tokens={self.num_tokens}, num_lists={self.num_lists}, "
            f"num_documents={self.num_documents}, pattern={self.pattern!r})"
        )


def moved_to(tensor: torch.Tensor, device: torch.device | str | int, non_blocking: bool = False) -> torch.Tensor:
    """As ``Tensor.to``; ``non_blocking`` counts only towards a GPU, which then is given pinned memory: other blocks."""
    non_blocking = non_blocking and torch.device(device).type == "cuda"
    if non_blocking and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=non_blocking)


def _clean(index: int, entry: ListLengths) -> tuple[int, tuple[int, ...], int]:
    try:
        prefix, documents, tail = entry
        documents = tuple(documents)
    except (TypeError, ValueError):
        raise ValueError(f"lengths[{index}]: expected (prefix_len, [doc_len, ...], tail_len), got {entry!r}") from None
    for length in (prefix, *documents, tail):
        if not isinstance(length, int) or isinstance(length, bool):
            raise TypeError(f"lengths[{index}]: expected integers, got {length!r} of type {type(length).__name__}")
        if length < 0:
            raise ValueError(f"lengths[{index}]: expected lengths of at least 0, got {length}")
    return prefix, documents, tail
