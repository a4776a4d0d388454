"""Pairwise ranking prompting: documents sorted by a model that is asked which of two is more relevant."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Sequence
from itertools import combinations, groupby
from typing import TYPE_CHECKING, Literal

import numpy as np

from rankernel.rerankers.prompted import PromptReranker, Steps
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import ListScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

PRP_PROMPT = (
    'Given a query "{query}", which of the following two passages is more relevant to the query?\n\n'
    'Passage A: "{first}"\n\nPassage B: "{second}"\n\nOutput Passage A or Passage B:'
)
"""The published wording (METHODS.md section 5)."""

_Pair = tuple[int, int]

Comparisons = Generator[list[_Pair], list[int], list[float]]
"""Yields pairs of documents that may be compared at once, is sent 1 for each pair whose first document wins, -1 where
the second one does and 0 for a tie, and returns the documents' scores."""


def allpair(num_documents: int) -> Comparisons:
    """Compares everything with everything; a win counts 1, a tie one half."""
    pairs = list(combinations(range(num_documents), 2))
    scores = [0.0] * num_documents
    for (one, other), outcome in zip(pairs, (yield pairs) if pairs else [], strict=True):
        scores[one] += (1 + outcome) / 2
        scores[other] += (1 - outcome) / 2
    return scores


def heapsort(num_documents: int, k: int) -> Comparisons:
    """Takes the best k from a heap; the others follow in their first order. Scores are minus the ranks."""
    heap = list(range(num_documents))
    for depth in reversed(range(num_documents.bit_length())):
        yield from _together(_sift(heap, node) for node in range(2**depth - 1, 2 ** (depth + 1) - 1))
    best: list[int] = []
    while heap and len(best) < k:
        best.append(heap[0])
        heap[0] = heap[-1]
        heap.pop()
        if len(best) < k:
            yield from _together([_sift(heap, 0)])
    return _minus_ranks(best, num_documents)


def _sift(heap: list[int], node: int) -> Generator[_Pair, int, None]:
    """Moves a node of a heap down until no child wins against it; of tied documents the earlier one wins."""
    while True:
        best = node
        for child in (2 * node + 1, 2 * node + 2):
            if child < len(heap):
                outcome = yield heap[child], heap[best]
                if outcome > 0 or (outcome == 0 and heap[child] < heap[best]):
                    best = child
        if best == node:
            return
        heap[node], heap[best] = heap[best], heap[node]
        node = best


def _together(sifts: Iterable[Generator[_Pair, int, None]]) -> Generator[list[_Pair], list[int], None]:
    """Sifts in disjoint subtrees do not depend on each other: all make their next comparison at once."""
    asked = {sift: pair for sift in sifts if (pair := next(sift, None)) is not None}
    while asked:
        outcomes = yield list(asked.values())
        following = {}
        for sift, outcome in zip(asked, outcomes, strict=True):
            try:
                following[sift] = sift.send(outcome)
            except StopIteration:
                continue
        asked = following


def sliding(num_documents: int, k: int) -> Comparisons:
    """Makes k bubble passes from the back to the front; the others follow in their first order. Scores as heapsort's.

    A pass may start when the one before is two comparisons ahead, as from there on they touch different documents:
    so up to k comparisons are made at once, with the outcome of passes made one after the other.
    """
    order = list(range(num_documents))
    passes = min(k, num_documents - 1)
    for time in range(num_documents + passes - 2):
        places = [num_documents - 1 - time + 2 * number for number in range(passes)]
        lower = [place for number, place in enumerate(places) if number < place < num_documents]
        outcomes = yield [(order[place], order[place - 1]) for place in lower]
        for place, outcome in zip(lower, outcomes, strict=True):
            if outcome > 0:
                order[place - 1], order[place] = order[place], order[place - 1]
    return _minus_ranks(order[:k], num_documents)


def _minus_ranks(best: list[int], num_documents: int) -> list[float]:
    order = best + sorted(set(range(num_documents)) - set(best))
    return (-1.0 - np.argsort(order)).tolist()


_OUTCOMES = ("ties", "wins", "losses")  # indexed by 0, 1 and -1


class Pairwise(PromptReranker):
    """Pairwise ranking prompting (PRP, arXiv 2306.17563; METHODS.md section 5).

    Every pair is read in both orders, the logits of " A" and " B" after ``Passage:`` say which passage is preferred,
    and a document wins if it is in both; otherwise it is a tie. No pair is read twice.

    ``"allpair"`` scores a document with its wins and half its ties, in n(n - 1) prompts that share all up to their
    first passage. ``"heapsort"`` and ``"sliding"`` find the best k only, and their score is minus the rank; where two
    documents tie, the earlier one in the first stage's order counts as better. Sliding takes at most
    ``2 sum_{i<k} (n - 1 - i)`` prompts, heapsort ``4 (n + k log2 n)``.

    Parts of a score: ``wins``, ``ties`` and ``losses`` among the comparisons that were made.

    Args:
        model: a causal language model; attached, and set to evaluation mode.
        tokenizer: its tokenizer; " A" and " B" have to be tokens.
        method: which comparisons are made.
        k: how many documents heapsort extracts, or how many passes sliding makes.
        max_document_tokens: longer documents keep their first so many tokens.

    Raises:
        ValueError: an unknown ``method``, a number out of range, a label that is no token, or an unfit model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        method: Literal["allpair", "heapsort", "sliding"] = "allpair",
        k: int = 10,
        max_document_tokens: int | None = None,
    ) -> None:
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        if method not in ("allpair", "heapsort", "sliding"):
            raise ValueError(f"method: expected 'allpair', 'heapsort' or 'sliding', got {method!r}")
        if k < 1:
            raise ValueError(f"k: expected a positive integer, got {k}")
        self.method, self.k = method, k
        self.use_candidates([" A", " B"])
        chat = bool(getattr(tokenizer, "chat_template", None))
        self._around = around_user_turn(tokenizer, "Passage:" if chat else " Passage:")

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        documents, truncated = self.cut(documents)
        comparisons = self._comparisons(len(documents))
        outcomes: dict[_Pair, int] = {}
        try:
            pairs = next(comparisons)
            while True:
                new = [pair for pair in pairs if pair not in outcomes]
                if new:
                    orders = sorted(order for one, other in new for order in ((one, other), (other, one)))
                    logits = yield self._groups(query, documents, orders)
                    margins = dict(zip(orders, (logits[:, 0] - logits[:, 1]).tolist(), strict=True))
                    for one, other in new:
                        wins = margins[one, other] > 0 > margins[other, one]
                        loses = margins[one, other] < 0 < margins[other, one]
                        outcomes[one, other], outcomes[other, one] = wins - loses, loses - wins
                pairs = comparisons.send([outcomes[pair] for pair in pairs])
        except StopIteration as stop:
            scores = stop.value
        parts = [dict.fromkeys(("wins", "ties", "losses"), 0.0) for _ in documents]
        for (one, _), outcome in outcomes.items():
            parts[one][_OUTCOMES[outcome]] += 1
        return ListScores(scores, truncated, [*parts])

    def _comparisons(self, num_documents: int) -> Comparisons:
        if self.method == "allpair":
            return allpair(num_documents)
        return (heapsort if self.method == "heapsort" else sliding)(num_documents, self.k)

    def _groups(self, query: str, documents: Sequence[str], orders: Sequence[_Pair]) -> list[list[list[int]]]:
        """Prompts that share their first passage where there are many such, and else what comes before it."""
        before, after = self._around
        prompts = self.tokenize(
            [
                before + PRP_PROMPT.format(query=query, first=documents[one], second=documents[other]) + after
                for one, other in orders
            ]
        )
        if self.method != "allpair":
            return [prompts]
        by_first = groupby(zip(orders, prompts, strict=True), key=lambda entry: entry[0][0])
        return [[prompt for _, prompt in group] for _, group in by_first]
