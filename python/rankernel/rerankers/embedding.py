"""E2Rank: an embedding model whose query embedding has read the best documents of the first stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch

from rankernel.models.attach import decoder_of
from rankernel.rerankers.prompted import PromptReranker, Steps
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import BATCH_TOKENS, ListScores

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LISTWISE_QUERY = (
    "Given a web search query and some relevant documents, rerank the documents that answer the query:\n"
    "Documents:\n{documents}\nSearch Query: {query}"
)
"""User turn of the pseudo-query, the published wording for web search (METHODS.md section 7)."""

PLAIN_QUERY = "Instruct: Given a web search query, retrieve relevant passages that answer the query\nQuery:{query}"
"""Query of the retrieval stage, likewise."""

END_OF_TEXT = "<|endoftext|>"


class E2Rank(PromptReranker):
    """Cosine of a document's embedding and that of a query which quotes the first documents (arXiv 2510.22733).

    An embedding is the final hidden state of the last token, of length 1. A document is embedded by itself, with the
    end-of-text token behind it; the query as a user turn that lists the first ``num_feedback`` documents, up to where
    the answer would begin, so it knows what there is to choose from (pseudo-relevance feedback). All documents are
    scored, also those not listed. Parts of a score: ``in prompt``, whether the query quotes the document (1) or not.

    Args:
        model: a causal language model; attached, and set to evaluation mode. Its head never runs.
        tokenizer: its tokenizer. The end-of-text token is ``<|endoftext|>`` where there is one, else the end of
            sequence.
        listwise: whether the query quotes documents; if not, it is that of the paper's retrieval stage.
        num_feedback: how many documents it quotes; 20 is the published number.
        embeddings: embeddings of documents that are known already, by text, as :meth:`embed` gives them; only other
            documents are embedded, so with those of a whole collection a query costs its own prompt alone.
        max_document_tokens: longer documents keep their first so many tokens; the published limit is 1024 words.

    Raises:
        ValueError: ``num_feedback`` is not positive, a tokenizer without an end-of-text token, or an unfit model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        listwise: bool = True,
        num_feedback: int = 20,
        embeddings: Mapping[str, np.ndarray] | None = None,
        max_document_tokens: int | None = 1500,
    ) -> None:
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        if num_feedback < 1:
            raise ValueError(f"num_feedback: expected a positive integer, got {num_feedback}")
        end = self.tokenizer.get_vocab().get(END_OF_TEXT, self.tokenizer.eos_token_id)
        if end is None:
            raise ValueError(f"tokenizer: expected one with {END_OF_TEXT} or an end-of-sequence token")
        self.listwise = listwise
        self.num_feedback = num_feedback
        self.embeddings: Mapping[str, np.ndarray] = {} if embeddings is None else embeddings
        self._end: int = end
        self._around = around_user_turn(tokenizer)

    def read(self, hidden: torch.Tensor) -> torch.Tensor:
        """Float32 [N, E], of length 1."""
        return torch.nn.functional.normalize(hidden.float(), dim=-1)

    def embed(self, texts: Sequence[str], *, batch_tokens: int = BATCH_TOKENS) -> np.ndarray:
        """Embeddings of documents, or of queries written as :data:`PLAIN_QUERY`, for a first stage.

        Args:
            texts: cut to ``max_document_tokens``.
            batch_tokens: texts are packed while they stay within so many tokens.

        Returns:
            float32 [n, E], each of length 1: their inner products are cosines.

        Raises:
            TypeError: ``texts`` is a single string.
        """
        if isinstance(texts, str):
            raise TypeError("texts: expected a sequence of strings, got a string")
        if not texts:
            return np.empty((0, decoder_of(self.model).config.hidden_size), dtype=np.float32)
        return self._run([self._ended(self.cut(texts)[0])], batch_tokens)

    def steps(self, query: str, documents: Sequence[str]) -> Steps:
        """See :class:`PromptReranker`."""
        texts, (documents, truncated) = documents, self.cut(documents)
        quoted = documents[: self.num_feedback] if self.listwise else []
        unknown = [index for index, text in enumerate(texts) if text not in self.embeddings]
        found = yield [self._ended([documents[index] for index in unknown]), [self._query_tokens(query, quoted)]]
        embeddings = np.empty((len(texts), found.shape[1]), dtype=np.float32)
        embeddings[unknown] = found[:-1]
        for index in set(range(len(texts))) - set(unknown):
            embeddings[index] = self.embeddings[texts[index]]
        return ListScores(
            (embeddings @ found[-1]).tolist(),
            truncated,
            [{"in prompt": float(index < len(quoted))} for index in range(len(documents))],
        )

    def _query_tokens(self, query: str, quoted: Sequence[str]) -> list[int]:
        if not quoted:
            return self._ended([PLAIN_QUERY.format(query=query)])[0]
        before, after = self._around
        listed = "\n".join(f"[{number}] {document}" for number, document in enumerate(quoted, start=1))
        return self.tokenize(before + LISTWISE_QUERY.format(documents=listed, query=query) + after)

    def _ended(self, texts: Sequence[str]) -> list[list[int]]:
        return [[*tokens, self._end] for tokens in self.tokenize(texts)]
