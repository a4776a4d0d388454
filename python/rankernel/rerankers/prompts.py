"""Prompts cut into blocks, and their tokens: what training and inference share.

A prompt is a prefix, one block per document and a tail, each tokenised by itself and without special tokens
(BlockRank, arXiv 2510.05396), so that the tokens of a document never depend on its neighbours.
"""

from __future__ import annotations

import contextlib
import string
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rankernel.rerankers.protocol import check_texts

_SENTINEL = "RANKERNELCONTENT"


@dataclass(frozen=True)
class BlockPrompt:
    """Templates of the blocks, in the syntax of ``str.format``.

    Attributes:
        prefix: text before the documents; may hold ``{query}``.
        document: text of one document; holds ``{text}`` and may hold ``{index}``, its place in the list from 0.
        tail: text after the documents; may hold ``{query}``.
        answer: beginning of the model's answer. It ends the tail, after the end of the user's turn where the tokenizer
            has a chat template.
        signal_tokens: how many of the last tokens of the tail are signal rows, whose attention scores the documents.
    """

    prefix: str
    document: str
    tail: str
    answer: str = ""
    signal_tokens: int = 2

    def __post_init__(self) -> None:
        for name, allowed in (("prefix", {"query"}), ("document", {"index", "text"}), ("tail", {"query"})):
            fields = _fields(name, getattr(self, name))
            if not fields <= allowed:
                raise ValueError(f"{name}: expected no fields but {sorted(allowed)}, got {sorted(fields - allowed)}")
            if name == "document" and "text" not in fields:
                raise ValueError(f"document: expected a template with {{text}}, got {self.document!r}")
        if not isinstance(self.answer, str):
            raise TypeError(f"answer: expected a string, got {type(self.answer).__name__}")
        if not isinstance(self.signal_tokens, int) or self.signal_tokens < 1:
            raise ValueError(f"signal_tokens: expected a positive integer, got {self.signal_tokens!r}")


def _fields(name: str, template: str) -> set[str]:
    if not isinstance(template, str):
        raise TypeError(f"{name}: expected a string, got {type(template).__name__}")
    try:
        return {field for _, field, _, _ in string.Formatter().parse(template) if field is not None}
    except ValueError as error:
        raise ValueError(f"{name}: expected a template for str.format, got {template!r} ({error})") from None


BLOCKRANK = BlockPrompt(
    prefix=(
        "You will be given a query and a list of documents. Each document will be formatted as "
        "ID: <id> | CONTENT: <content> | END ID: <id>. You need to read carefully and understand all of them. "
        "Your goal is to find all document(s) from the list that can help answer the query.\n"
        "Query: {query}\n\nDocuments:"
    ),
    document="\nID: {index} | CONTENT: {text} | END ID: {index}",
    tail=(
        "\n====== Now let's start! ======\n"
        "Which document is most relevant to answer the query? Print out the ID of the document.\n"
        "Query: {query}\nThe following document(s) can help answer the query:"
    ),
    answer="Final Answer: [",
)
"""The published format (METHODS.md section 1.2), the query in the prefix and again in the tail."""

BLOCKRANK_QUERY_FREE = BlockPrompt(
    prefix=BLOCKRANK.prefix.replace("\nQuery: {query}\n\n", "\n"),
    document=BLOCKRANK.document,
    tail=BLOCKRANK.tail,
    answer=BLOCKRANK.answer,
)
"""The same with nothing of the query before the documents, so that their keys can be computed without it."""

COMPACT = BlockPrompt(
    prefix="Query: {query}\nDocuments:",
    document="\n[{index}] {text}",
    tail="\nQuery: {query}\nAnswer: ",
    answer="[",
)
"""A few words only, for small models such as the bundled one."""


class PromptBlocks(NamedTuple):
    """The tokens of one list, ``[prefix][document]...[document][tail]``.

    Attributes:
        input_ids: token ids, all blocks one after the other.
        lengths: tokens in the prefix, in every document and in the tail, as ``BlockLayout.from_lengths`` takes them.
        truncated: per document, whether tokens were cut off its block.
    """

    input_ids: list[int]
    lengths: tuple[int, list[int], int]
    truncated: list[bool]


def build_blocks(
    tokenizer: Any,
    prompt: BlockPrompt,
    query: str,
    documents: Sequence[str],
    max_document_tokens: int | None = None,
) -> PromptBlocks:
    """Write out the prompt of one list and tokenise each of its blocks.

    Where the tokenizer has a chat template the blocks are one user turn, and the prefix and the tail hold what the
    template puts around it; otherwise they are plain text.

    Args:
        tokenizer: a Transformers tokenizer.
        prompt: the templates.
        query: text of the query.
        documents: text of every document; an empty one is valid.
        max_document_tokens: a longer block loses the end of the document's text, not that of the template, which tells
            models where a document ends and which it was; None keeps all.

    Raises:
        TypeError: the query or a document is not a string, or ``documents`` is one.
        ValueError: ``max_document_tokens`` is not positive, the tail has fewer tokens than signal rows, or the chat
            template does not give the user's turn back as it was.
    """
    check_texts(query, documents)
    if max_document_tokens is not None and max_document_tokens < 1:
        raise ValueError(f"max_document_tokens: expected a positive integer, got {max_document_tokens}")
    before, after = around_user_turn(tokenizer, prompt.answer)
    texts = [before + prompt.prefix.format(query=query)]
    texts += [prompt.document.format(index=index, text=text) for index, text in enumerate(documents)]
    texts += [prompt.tail.format(query=query) + after]

    def tokenize(texts: Sequence[str]) -> list[list[int]]:
        options = {"add_special_tokens": False, "return_attention_mask": False, "return_token_type_ids": False}
        ids: list[list[int]] = tokenizer(texts, **options, verbose=False)["input_ids"]
        return ids

    blocks = tokenize(texts)
    if len(blocks[-1]) < prompt.signal_tokens:
        raise ValueError(f"signal_tokens: expected at most {len(blocks[-1])}, the tail, got {prompt.signal_tokens}")
    truncated = [False] * len(documents)
    if max_document_tokens is not None:
        truncated = [len(block) > max_document_tokens for block in blocks[1:-1]]
        after_text = prompt.document.partition("{text}")[2]
        for index in [index for index, cut in enumerate(truncated) if cut]:
            ending = tokenize([after_text.format(index=index)])[0]
            kept = blocks[1 + index][: max(max_document_tokens - len(ending), 0)]
            blocks[1 + index] = (kept + ending)[:max_document_tokens]
    lengths = (len(blocks[0]), [len(block) for block in blocks[1:-1]], len(blocks[-1]))
    return PromptBlocks([token for block in blocks for token in block], lengths, truncated)


def around_user_turn(tokenizer: Any, answer: str = "", system: str = "") -> tuple[str, str]:
    """What a chat template puts before and after one user turn; plain text where the tokenizer has no template.

    Args:
        tokenizer: a Transformers tokenizer.
        answer: beginning of the model's answer; the second text ends with it.
        system: the system turn; templates without such a turn get it at the beginning of the user's.

    Raises:
        ValueError: the chat template does not give the user's turn back as it was.
    """
    folded = f"{system}\n " if system else ""
    if not getattr(tokenizer, "chat_template", None):
        return folded, answer
    turns = [{"role": "user", "content": _SENTINEL}]
    if answer:
        turns.append({"role": "assistant", "content": answer})

    def rendered(turns: list[dict[str, str]]) -> str:
        return tokenizer.apply_chat_template(
            turns,
            tokenize=False,
            add_generation_prompt=not answer,
            continue_final_message=bool(answer),
            enable_thinking=False,
        )

    text = ""
    if system:
        with contextlib.suppress(Exception):  # templates raise what they like when they know no system role
            text = rendered([{"role": "system", "content": system}, *turns])
    if system and system in text:
        folded = ""
    else:
        text = rendered(turns)
    before, found, after = text.partition(_SENTINEL)
    if not found or _SENTINEL in after:
        raise ValueError(f"tokenizer: expected a chat template that repeats the user's turn once, got {text!r}")
    return before + folded, after
