"""ICR: documents scored by the attention that a query pays to their tokens, zero-shot (arXiv 2410.02642).

The prompt is a plain causal one: all documents, then the query. What every token of a document receives from the query,
summed over heads and layers, is corrected by what it receives from a query without content in the same place, and the
tokens of a document that fall far below its others are dropped. QRHead (arXiv 2506.09944) is the same with a few heads
that were found to retrieve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from rankernel.layout import BlockLayout
from rankernel.models import MassRequest, early_exit, model_inputs
from rankernel.models.attach import decoder_of
from rankernel.rerankers.loading import ModelReranker
from rankernel.rerankers.prompts import around_user_turn
from rankernel.rerankers.protocol import BATCH_TOKENS, ListScores, check_batch_tokens, check_texts

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

QA_INSTRUCTION = "Please answer the following question based on the information in the paragraphs above."
"""For queries that are questions; the published code uses it for most sets."""

IE_INSTRUCTION = "Please find information that are relevant to the following query in the paragraphs above."
"""For other queries, and always with QRHead."""

CONTENT_FREE = "N/A"
"""The query whose attention is subtracted."""

Heads = tuple[tuple[int, int], ...]
"""Pairs of layer and query head, both from 0."""

QRHEAD_LLAMA_3_1_8B_LME: Heads = (
    (13, 18), (13, 21), (8, 11), (14, 13), (17, 29), (13, 1), (13, 13), (14, 29),
    (14, 31), (13, 8), (16, 1), (17, 21), (13, 3), (10, 31), (13, 4), (14, 22),
)  # fmt: skip
"""Published heads of Llama-3.1-8B-Instruct, found on LongMemEval (METHODS.md section 2.2), best first."""

QRHEAD_LLAMA_3_1_8B_NQ: Heads = (
    (14, 22), (13, 16), (14, 28), (14, 31), (16, 19), (14, 1), (16, 26), (17, 24),
    (14, 0), (13, 0), (16, 25), (13, 12), (13, 1), (13, 10), (17, 27), (20, 14),
)  # fmt: skip
"""The same, found on Natural Questions."""


class _Prompt(NamedTuple):
    """Tokens of one list.

    Attributes:
        prefix: all that comes before the late instruction.
        tails: from the late instruction on, with the query and with the content-free one.
        shared: whether both tails follow one copy of the prefix.
        places: places in the prefix of the tokens of all documents, document by document.
        lengths: tokens in every document, in the order of the prompt.
        truncated: whether tokens were cut off it, in the first stage's order.
    """

    prefix: list[int]
    tails: tuple[list[int], list[int]]
    shared: bool
    places: list[int]
    lengths: list[int]
    truncated: list[bool]

    @property
    def num_tokens(self) -> int:
        return len(self.prefix) * (1 if self.shared else 2) + sum(map(len, self.tails))


def kept_sums(query: np.ndarray, calibration: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
    """Sums over the tokens of every document that its outlier filter keeps (METHODS.md section 2.1).

    Of the differences ``c = query - calibration`` a document keeps those with ``c > mean - 2 std``, strictly, std with
    n - 1 in the denominator; so none of a single token, and none where all are equal.

    Args:
        query: float64 [..., T], what the tokens of all documents, one after the other, receive from the query.
        calibration: float64 [..., T], what they receive from the content-free query.
        lengths: tokens in every document, at least 1 each, T in all.

    Returns:
        float64 [3, ..., documents]: query, calibration and number of the kept tokens. A score is the first less the
        second.
    """
    counts = np.asarray(lengths)
    starts = np.cumsum(counts) - counts

    def totals(values: np.ndarray) -> np.ndarray:
        return np.add.reduceat(values, starts, axis=-1)

    def spread(values: np.ndarray) -> np.ndarray:
        return np.repeat(values, counts, axis=-1)

    difference = query - calibration
    # From the first token's difference on, so that equal differences have a deviation of exactly zero.
    deviation = difference - spread(difference[..., starts])
    deviation -= spread(totals(deviation) / counts)
    with np.errstate(invalid="ignore"):  # 0 / 0 for a single token: nothing is greater than NaN
        std = np.sqrt(totals(deviation**2) / (counts - 1))
    kept = deviation > -2 * spread(std)
    return np.stack([totals(kept * query), totals(kept * calibration), totals(kept.astype(np.float64))])


class ICR(ModelReranker):
    """Scores documents by calibrated attention from the query, without training (arXiv 2410.02642, METHODS.md 2.1).

    A token of a document gets ``u(query)``: the mean over the rows from the late instruction to the prompt's end of
    their attention probability, over all that they see, summed over heads and layers; the score of a document is the
    sum of ``u(query) - u("N/A")`` over the tokens that :func:`kept_sums` keeps. The documents are computed once for
    both queries, which follow them as two blocks that do not see each other. A score is relative to the list that a
    document was ranked in. With ``heads`` this is QRHead (arXiv 2506.09944, METHODS.md 2.2).

    The prompt is that of the paper in the tokenizer's own chat template, which also brings the token that begins a
    sequence. Its pieces (beginning, separators, documents, end) are tokenised apart, so the tokens of a document and of
    the query are known exactly; the published code tokenises all at once and can only differ where pieces meet. Layers
    after the last that counts do not run. Attention is taken without sliding windows and attention sinks, as the
    published code recomputes it; the hidden states follow the model's own windows, so where a prompt is longer than
    such a window the documents are computed once for each query.

    Parts of a score: ``query`` and ``calibration``, sums of u over the kept tokens, and ``kept tokens``.

    Args:
        model: a causal language model; attached, and set to evaluation mode.
        tokenizer: its tokenizer.
        instruction: text between documents and query.
        separator: text between the pieces of the prompt; published are two line feeds, after a space for Llama.
        reverse: whether the documents stand in reverse order, so that the first stage's best is nearest to the query.
        layers: indices from 0 of the layers that count; None counts all.
        heads: pairs of layer and query head that count, instead of ``layers``.
        max_document_tokens: longer documents, with their number, keep their first so many tokens; None keeps all.

    Raises:
        ValueError: layers or heads that the model does not have, an argument out of range, or an unfit model.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        instruction: str = QA_INSTRUCTION,
        separator: str = "\n\n",
        reverse: bool = True,
        layers: Sequence[int] | None = None,
        heads: Sequence[tuple[int, int]] | None = None,
        max_document_tokens: int | None = 384,
    ) -> None:
        decoder = decoder_of(model)
        num_layers, num_heads = len(decoder.layers), decoder.config.num_attention_heads
        of_layers: dict[int, list[int]] | None = None
        if heads is not None:
            if layers is not None:
                raise ValueError("layers: expected None together with heads, which name theirs")
            of_layers = {layer: sorted({head for at, head in heads if at == layer}) for layer, _ in heads}
            layers = list(of_layers)
        elif layers is None:
            layers = range(num_layers)
        if not layers or not 0 <= min(layers) <= max(layers) < num_layers:
            name = "layers" if heads is None else "heads"
            raise ValueError(f"{name}: expected at least one, layers in [0, {num_layers}), got {list(heads or layers)}")
        if not all(0 <= head < num_heads for _, head in heads or ()):
            raise ValueError(f"heads: expected pairs of layer and head in [0, {num_heads}), got {list(heads or ())}")
        super().__init__(model, tokenizer, max_document_tokens=max_document_tokens)
        self._around = around_user_turn(tokenizer)
        self.instruction = instruction
        self.separator = separator
        self.reverse = reverse
        self.layers = sorted(set(layers))
        self.heads = of_layers

    def score_lists(
        self, lists: Iterable[tuple[str, Sequence[str]]], *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[ListScores]:
        """See :meth:`Reranker.score_lists`.

        Raises:
            FloatingPointError: the model's attention is not finite.
        """
        check_batch_tokens(batch_tokens)
        row: list[_Prompt] = []
        for query, documents in lists:
            prompt = self._prompt(query, documents)
            if sum(other.num_tokens for other in row) + prompt.num_tokens > batch_tokens:
                yield from self._score_row(row)
                row = []
            row.append(prompt)
        yield from self._score_row(row)

    def _prompt(self, query: str, documents: Sequence[str]) -> _Prompt:
        check_texts(query, documents)
        before, after = self._around
        ends = [f"{self.instruction}{self.separator}Query: {text}{after}" for text in (query, CONTENT_FREE)]
        in_order = documents[::-1] if self.reverse else documents
        texts = [f"[{number}] {text}" for number, text in enumerate(in_order, start=1)]
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
        ids = self.tokenizer([f"{before} Here are some paragraphs:", self.separator, *ends, *texts], **options)
        prefix, separator, of_query, of_none, *whole = ids["input_ids"]
        bodies = [body[: self.max_document_tokens] for body in whole]
        places: list[int] = []
        for body in bodies:
            prefix += separator
            places += range(len(prefix), len(prefix) + len(body))
            prefix += body
        prefix += separator
        fits = self.sliding_window is None or len(prefix) + len(of_query) + len(of_none) <= self.sliding_window
        truncated = [len(body) < len(uncut) for body, uncut in zip(bodies, whole, strict=True)]
        return _Prompt(
            prefix,
            (of_query, of_none),
            fits,
            places,
            [len(body) for body in bodies],
            truncated[::-1] if self.reverse else truncated,
        )

    def _score_row(self, row: list[_Prompt]) -> Iterator[ListScores]:
        sums = self._sums([prompt for prompt in row if prompt.lengths])
        for prompt in row:
            if not prompt.lengths:
                yield ListScores([], [], [])
                continue
            of_query, calibration, kept = next(sums)
            yield ListScores(
                (of_query - calibration).tolist(),
                prompt.truncated,
                [
                    {"query": u, "calibration": u_none, "kept tokens": number}
                    for u, u_none, number in zip(of_query.tolist(), calibration.tolist(), kept.tolist(), strict=True)
                ],
            )

    @torch.no_grad()
    def _sums(self, prompts: Sequence[_Prompt], *, per_head: bool = False) -> Iterator[np.ndarray]:
        """Per list its :func:`kept_sums`, [3, documents] or [3, layers * heads, documents], in first-stage order."""
        if not prompts:
            return
        tokens: list[int] = []
        lengths: list[tuple[int, list[int], int]] = []
        rows: tuple[list[int], list[int]] = ([], [])
        begins: list[list[int]] = []  # of the prefix that each of the two tails sees
        for prompt in prompts:
            begins.append([])
            for which, tail in enumerate(prompt.tails):
                if which == 0 or not prompt.shared:
                    begin = len(tokens)
                    lengths.append((len(prompt.prefix), [], 0))
                    tokens += prompt.prefix
                begins[-1].append(begin)
                lengths[-1][1].append(len(tail))
                rows[which].extend(range(len(tokens), len(tokens) + len(tail)))
                tokens += tail
        decoder = decoder_of(self.model)
        request = MassRequest(self.layers, [torch.tensor(group) for group in rows], heads=self.heads, per_head=per_head)
        inputs = model_inputs(
            torch.tensor(tokens, device=decoder.device),
            BlockLayout.from_lengths(lengths),
            tail_offset=len(tokens),  # there are no tails
            scores=request,
        )
        with early_exit(self.model, self.layers[-1]):
            found = [masses.to("cpu", torch.float64) for masses in decoder(**inputs).attentions]
        masses = (torch.cat(found, dim=1) if per_head else torch.stack(found).sum(dim=0)).numpy()
        if not np.isfinite(masses).all():
            raise FloatingPointError(f"the attention of layers {self.layers} is not finite")
        for prompt, of_tails in zip(prompts, begins, strict=True):
            of_query, of_none = (
                masses[which][..., np.add(begin, prompt.places)] for which, begin in enumerate(of_tails)
            )
            sums = kept_sums(of_query, of_none, prompt.lengths)
            yield sums[..., ::-1] if self.reverse else sums


def select_heads(
    reranker: ICR,
    queries: Sequence[str],
    documents: Sequence[Sequence[str]],
    relevance: Sequence[Sequence[float]],
    k: int = 16,
) -> list[tuple[int, int]]:
    """The heads whose attention alone ranks best, by mean nDCG@10 (QRHead's detection, METHODS.md section 2.2).

    Every head's own differences go through the filter. Published are 128 queries of Natural Questions, or 70 of
    LongMemEval, with :data:`IE_INSTRUCTION` and shuffled documents.

    Args:
        reranker: made without ``heads``; its layers are those to choose from.
        queries: text of every query.
        documents: the documents of every query.
        relevance: grades, at least 0, of the documents of every query; queries without a grade above 0 do not count.
        k: how many heads.

    Returns:
        ``heads`` of :class:`ICR`, best first; equally good ones in the order of the model.

    Raises:
        ValueError: a reranker with heads, no query that counts, or arguments that differ in length.
    """
    if reranker.heads is not None:
        raise ValueError("reranker: expected one made without heads, of whose heads to choose")
    discounts = 1 / np.log2(np.arange(2, 12))
    ndcg = []
    for query, texts, of_texts in zip(queries, documents, relevance, strict=True):
        grades = np.asarray(of_texts, dtype=np.float64)
        if len(grades) != len(texts):
            raise ValueError(f"relevance: expected {len(texts)} grades for {query!r}, got {len(grades)}")
        best = np.sort(grades)[:-11:-1]
        if not best.any():
            continue
        of_query, calibration, _ = next(reranker._sums([reranker._prompt(query, texts)], per_head=True))
        order = np.argsort(calibration - of_query, axis=-1, kind="stable")[:, :10]
        ndcg.append(grades[order] @ discounts[: len(best)] / (best @ discounts[: len(best)]))
    if not ndcg:
        raise ValueError("relevance: expected a grade above 0 for at least one query")
    means = np.mean(ndcg, axis=0)
    num_heads = len(means) // len(reranker.layers)
    chosen = np.argsort(-means, kind="stable")[:k].tolist()
    return [(reranker.layers[index // num_heads], index % num_heads) for index in chosen]
