"""GroupRank: documents graded from 0 to 10 with others of their group in sight."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rankernel.rerankers.pointwise import expected_integers, integer_probabilities, integer_texts
from rankernel.rerankers.prompted import PromptReranker, Steps
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import ListScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

GROUPWISE_PROMPT = (
    "Compare the documents and judge how relevant each of them is to the query, with an integer from 0 (not relevant "
    "at all) to 10 (answers it fully).\n{documents}\nQuery: {query}\n"
    "Give one line for every document, its number in brackets, a colon and the integer, such as [1]: 5."
)
"""Wording of our own; GroupRank's reasoning before the answer is left out."""


class Groupwise(PromptReranker):
    """Grades documents group by group, from 0 to 10 (GroupRank, METHODS.md section 6.4), without generating.

    GroupRank generates reasoning and then the scores of a group one after the other. Here nothing is generated: the
    text of a group is read once, and one block for every document begins the answer with ``[i]: ``, so that all scores
    come from one pass and do not depend on the scores given before. A score is the expected integer
    ``sum k P(k) / sum P(k)``, averaged over rounds that shuffle the documents into groups anew.

    Parts of a score: ``round 0``, ``round 1`` and so on, what the rounds gave.

    Args:
        model: a causal language model; attached, and set to evaluation mode.
        tokenizer: its tokenizer; every digit has to be a token.
        group_size: documents in a group; the last group of a round may have fewer.
        rounds: how often every document is graded.
        seed: of the shuffles, which depend on nothing else but the number of documents.
        max_document_tokens: longer documents keep their first so many tokens; the default is about the published 3000
            characters.

    Raises:
        ValueError: a number out of range, a digit that is no token, or an unfit model.
    """

    read_tokens = 2
    log_probs = True

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        group_size: int = 20,
        rounds: int = 2,
        seed: int = 0,
        max_document_tokens: int | None = 768,
    ) -> None:
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        if group_size < 1 or rounds < 1:
            raise ValueError(f"group_size, rounds: expected positive integers, got {group_size} and {rounds}")
        self.group_size, self.rounds, self.seed = group_size, rounds, seed
        self.use_candidates(integer_texts(tokenizer))
        self._around = around_user_turn(tokenizer, "[")

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        documents, truncated = self.cut(documents)
        num_documents = len(documents)
        shuffler = random.Random(self.seed)
        orders = [shuffler.sample(range(num_documents), num_documents) for _ in range(self.rounds)]
        groups = [
            order[begin : begin + self.group_size]
            for order in orders
            for begin in range(0, len(order), self.group_size)
        ]
        log_probs = yield [self._prompts(query, [documents[index] for index in group]) for group in groups]
        expected = expected_integers(integer_probabilities(log_probs))
        by_round = np.empty((self.rounds, num_documents))
        np.put_along_axis(by_round, np.array(orders), expected.reshape(by_round.shape), axis=1)
        names = [f"round {number}" for number in range(self.rounds)]
        return ListScores(
            by_round.mean(axis=0).tolist(),
            truncated,
            [dict(zip(names, scores, strict=True)) for scores in by_round.T.tolist()],
        )

    def _prompts(self, query: str, documents: Sequence[str]) -> list[list[int]]:
        """One for every document of a group; they differ only in the number that the answer begins with."""
        before, after = self._around
        lines = "\n".join(f"[{number}] {document}" for number, document in enumerate(documents, start=1))
        shared = before + GROUPWISE_PROMPT.format(documents=lines, query=query) + after
        one = int(self.candidates[1])
        return [[*ids, one] for ids in self.tokenize([f"{shared}{n}]: " for n in range(1, len(documents) + 1)])]
