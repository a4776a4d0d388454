"""BlockRank: documents scored by the attention they receive in one middle layer (arXiv 2510.05396).

Every document is a block that sees the prompt's prefix and itself; the tail sees everything. The score of a document
is its share of the attention that the last tail tokens, the signal rows, pay to all documents in layer l*, so nothing
after that layer runs, and of l* itself only the keys of all tokens and the queries of the signal rows.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from rankernel.layout import BlockLayout, Pattern, moved_to
from rankernel.models import LayerScoreGraphs, attach, layer_scores
from rankernel.models.attach import decoder_of
from rankernel.rerankers.loading import file_of, load, source_of
from rankernel.rerankers.prompts import BLOCKRANK, BlockPrompt, PromptBlocks, build_blocks
from rankernel.rerankers.protocol import BATCH_TOKENS, ListScores, Reranker, check_batch_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SETTINGS_FILE = "rankernel.json"
"""File in a model directory that says how the model was trained to rank."""

PositionScheme = Literal["shared", "sequential"]


@dataclass(frozen=True)
class BlockRankSettings:
    """What a model directory's ``rankernel.json`` holds beside ``"method": "blockrank"``.

    Attributes:
        layer: index from 0 of the layer l* whose attention scores the documents.
        prompt: templates of the blocks.
        max_document_tokens: the text of a document with a longer block is cut; 384 is the published evaluation's.
        tail_offset: position of the first tail token under shared positions.
        position_scheme: ``"shared"`` (every document starts where the prefix ends) or ``"sequential"``.
        pattern: ``"block"``, or ``"causal"`` for documents that see those before them, plain in-context ranking.
        rank_prior: for candidates that come in the order of a first stage: the share of the n-th document is divided by
            n to this power, and the shares by their sum. So both rankings count, the attention as evidence and the
            first stage as prior (first stages are worth that: Wang et al., ICTIR 2021, doi 10.1145/3471158.3472233).
            0 leaves the order of the candidates without a meaning.
    """

    layer: int
    prompt: BlockPrompt = BLOCKRANK
    max_document_tokens: int = 384
    tail_offset: int = 16384
    position_scheme: PositionScheme = "shared"
    pattern: Pattern = "block"
    rank_prior: float = 0.0

    @classmethod
    def read(cls, path: str | Path) -> BlockRankSettings:
        """Reads a ``rankernel.json``.

        Raises:
            ValueError: the file is not JSON, is of another method, or has an unknown or unfit entry.
        """
        try:
            entries = json.loads(Path(path).read_text(encoding="utf-8"))
            if not isinstance(entries, dict) or entries.pop("method", None) != "blockrank":
                raise ValueError('expected an object with "method": "blockrank"')
            if "prompt" in entries:
                entries["prompt"] = BlockPrompt(**entries["prompt"])
            return cls(**entries)
        except (TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from None


def relevance(logsumexp: torch.Tensor, num_lists: int) -> torch.Tensor:
    """Scores of all documents from what the signal rows attend to (METHODS.md section 1.5).

    ``S_d`` is the mean over heads and signal rows of a row's softmax over the tokens of all documents, summed over the
    tokens of document d; so the scores of a list add up to 1. Differentiable.

    Args:
        logsumexp: [num_lists * signal rows, heads, max_documents], rows list by list, as
            :func:`rankernel.document_logsumexp` gives it; -inf where a list has fewer documents or a document is empty.
        num_lists: how many lists the rows belong to.

    Returns:
        [num_lists, max_documents]; 0 for a document without tokens and where a list has fewer documents.
    """
    nothing_seen = logsumexp.isneginf().all(dim=-1, keepdim=True)
    shares = logsumexp.masked_fill(nothing_seen, 0.0).softmax(dim=-1).masked_fill(nothing_seen, 0.0)
    return shares.unflatten(0, (num_lists, -1)).mean(dim=(1, 2))


def with_rank_prior(shares: torch.Tensor, rank_prior: float) -> torch.Tensor:
    """Shares [lists, signal rows, documents], the n-th document's over ``n ** rank_prior``, normalized.

    Those of a list again add up to 1 in the mean over its rows, unless all are 0.
    """
    if not rank_prior:
        return shares
    places = torch.arange(1, shares.shape[-1] + 1, device=shares.device)
    weighted = shares * places**-rank_prior
    return weighted / weighted.mean(dim=1, keepdim=True).sum(dim=-1, keepdim=True).clamp(min=torch.finfo().tiny)


class BlockRank(Reranker):
    """Reranks with a decoder-only Transformers model that was trained for BlockRank.

    A score is relative to the list that a document was ranked in: the scores of one list add up to 1, those of
    different lists do not compare. Equal scores keep the order in which the documents came.

    Args:
        model: a Transformers causal language model. It is attached, set to evaluation mode and stays attached.
        tokenizer: its tokenizer.
        layer: index from 0 of the layer l* whose attention scores the documents.
        prompt: templates of the blocks.
        max_document_tokens: the texts of documents with longer blocks are cut, and the result says so.
        tail_offset: position of the first tail token under shared positions.
        position_scheme: ``"shared"`` or ``"sequential"``.
        pattern: ``"block"`` or ``"causal"``.
        rank_prior: how much the order of the candidates counts, see :class:`BlockRankSettings`.
        cuda_graphs: whether to replay CUDA graphs, see :class:`rankernel.models.LayerScoreGraphs`: worth it where
            launching takes longer than running, so for small models and short lists.

    Raises:
        ValueError: ``layer`` is not one of the model's, or an argument is out of range.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        layer: int,
        prompt: BlockPrompt = BLOCKRANK,
        max_document_tokens: int = 384,
        tail_offset: int = 16384,
        position_scheme: PositionScheme = "shared",
        pattern: Pattern = "block",
        rank_prior: float = 0.0,
        cuda_graphs: bool = False,
    ) -> None:
        num_layers = len(decoder_of(model).layers)
        if not 0 <= layer < num_layers:
            raise ValueError(f"layer: expected one of the model's {num_layers}, 0 to {num_layers - 1}, got {layer}")
        if max_document_tokens < 1:
            raise ValueError(f"max_document_tokens: expected a positive integer, got {max_document_tokens}")
        if position_scheme not in ("shared", "sequential"):
            raise ValueError(f"position_scheme: expected 'shared' or 'sequential', got {position_scheme!r}")
        if pattern not in ("block", "causal"):
            raise ValueError(f"pattern: expected 'block' or 'causal', got {pattern!r}")
        if not 0 <= rank_prior < math.inf:
            raise ValueError(f"rank_prior: expected a finite number of at least 0, got {rank_prior}")
        attach(model)
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.settings = BlockRankSettings(
            layer, prompt, max_document_tokens, tail_offset, position_scheme, pattern, rank_prior
        )
        self._graphs: LayerScoreGraphs | None = None
        if cuda_graphs:
            self._graphs = LayerScoreGraphs(model, layer, position_scheme=position_scheme, tail_offset=tail_offset)

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path | PreTrainedModel,
        *,
        layer: int | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        prompt: BlockPrompt | None = None,
        max_document_tokens: int | None = None,
        tail_offset: int | None = None,
        position_scheme: PositionScheme | None = None,
        pattern: Pattern | None = None,
        rank_prior: float | None = None,
        cuda_graphs: bool = False,
        dtype: torch.dtype | Literal["auto"] = "auto",
        device: torch.device | str | None = None,
    ) -> BlockRank:
        """Loads a model, or takes one that is loaded, and attaches the kernels to it.

        What is left None comes from the model's ``rankernel.json`` if it has one, else from the defaults of
        :class:`BlockRankSettings`.

        Args:
            model: directory, name on the Hugging Face Hub, or a loaded Transformers model.
            layer: index from 0 of the scoring layer; has to be given where there is no ``rankernel.json``.
            tokenizer: by default the one saved with the model.
            prompt, max_document_tokens, tail_offset, position_scheme, pattern, rank_prior: see
                :class:`BlockRankSettings`.
            cuda_graphs: see :class:`BlockRank`.
            dtype: type of the weights, by default the one they were saved in; not for a loaded model.
            device: where to run, by default where the model is loaded to; not for a loaded model.

        Raises:
            ValueError: no ``layer`` is given or found, or a setting is unfit.
            OSError: there is no such model.
            ImportError: Transformers is not installed.
        """
        found = file_of(model, SETTINGS_FILE)
        settings: dict[str, Any] = vars(BlockRankSettings.read(found)).copy() if found else {}
        given = {
            "layer": layer,
            "prompt": prompt,
            "max_document_tokens": max_document_tokens,
            "tail_offset": tail_offset,
            "position_scheme": position_scheme,
            "pattern": pattern,
            "rank_prior": rank_prior,
        }
        settings.update({name: value for name, value in given.items() if value is not None})
        if "layer" not in settings:
            raise ValueError(
                "layer: expected the index of the layer whose attention scores the documents, as "
                f"{source_of(model) or 'the model'} has no {SETTINGS_FILE} to take it from"
            )
        model, tokenizer = load(model, tokenizer, dtype=dtype, device=device)
        return cls(model, tokenizer, cuda_graphs=cuda_graphs, **settings)

    def score_lists(
        self, lists: Iterable[tuple[str, Sequence[str]]], *, batch_tokens: int = BATCH_TOKENS
    ) -> Iterator[ListScores]:
        """See :meth:`Reranker.score_lists`; a score is the mean of its parts, those of the single signal rows."""
        check_batch_tokens(batch_tokens)
        row: list[PromptBlocks] = []
        for query, documents in lists:
            blocks = build_blocks(
                self.tokenizer, self.settings.prompt, query, documents, self.settings.max_document_tokens
            )
            self._check_positions(query, blocks)
            if row and sum(len(other.input_ids) for other in row) + len(blocks.input_ids) > batch_tokens:
                yield from self._score_row(row)
                row = []
            row.append(blocks)
        yield from self._score_row(row)

    def _check_positions(self, query: str, blocks: PromptBlocks) -> None:
        """Said here already, where the query is known, and not of a whole row."""
        prefix, documents, _ = blocks.lengths
        end = prefix + max(documents, default=0)
        if self.settings.position_scheme == "shared" and end > self.settings.tail_offset:
            shown = query if len(query) <= 40 else f"{query[:37]}..."
            raise ValueError(
                f"query: expected a prefix and a longest document of at most tail_offset={self.settings.tail_offset} "
                f"tokens together, got {end} for {shown!r}"
            )

    @torch.no_grad()
    def _score_row(self, row: list[PromptBlocks]) -> Iterator[ListScores]:
        lists = [blocks for blocks in row if blocks.truncated]
        shares = iter(self._shares_of_row(lists).tolist() if lists else [])
        for blocks in row:
            per_row = next(shares) if blocks.truncated else []
            of_documents = [values for values, _ in zip(zip(*per_row, strict=True), blocks.truncated, strict=False)]
            yield ListScores(
                [math.fsum(values) / len(values) for values in of_documents],
                blocks.truncated,
                [{f"signal row {place}": share for place, share in enumerate(values)} for values in of_documents],
            )

    def _shares_of_row(self, lists: list[PromptBlocks]) -> torch.Tensor:
        """Float32 [lists, signal rows, max_documents], means over heads; every list has at least one document."""
        settings, device = self.settings, decoder_of(self.model).device
        layout = BlockLayout.from_lengths([blocks.lengths for blocks in lists], settings.pattern)
        rows = layout.tail_positions(settings.prompt.signal_tokens)
        input_ids = torch.tensor([token for blocks in lists for token in blocks.input_ids])
        if self._graphs is not None:
            logsumexp = self._graphs(input_ids, layout, rows)
        else:
            logsumexp = layer_scores(
                self.model,
                moved_to(input_ids, device, non_blocking=True),
                layout.to(device, non_blocking=True),
                settings.layer,
                rows,
                position_scheme=settings.position_scheme,
                tail_offset=settings.tail_offset,
            )
        shares = relevance(logsumexp, len(rows))
        if not shares.isfinite().all():
            raise FloatingPointError(f"the attention logits of layer {settings.layer} are not finite")
        return with_rank_prior(shares.unflatten(0, (len(lists), -1)), settings.rank_prior)
