"""A model with random weights and a tokenizer, both made in a moment, for tests."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rankernel.rerankers.prompts import COMPACT

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if not loop.last %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}</s><assistant>{% endif %}"
)


def byte_tokenizer(
    texts: Sequence[str],
    chat: bool = False,
    *,
    vocab_size: int = 400,
    special_tokens: Sequence[str] = ("</s>",),
    **names: str,
) -> PreTrainedTokenizerFast:
    """Byte-level, so that every string can be written and read back, with the words of ``texts`` as tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[*special_tokens], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", **names)
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """With the words of a few prompts."""
    return byte_tokenizer(["Query: how to read a file Documents: Answer: the path of the file"] * 4, chat)


def word_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """At most 330 tokens, among them the words that rerankers read."""
    words = ["yes", "no", " true", " false", " A", " B", " file"] * 9
    special_tokens = ["</s>", "<s>", "<|im_start|>", "<|im_end|>"]
    return byte_tokenizer(words, chat, vocab_size=330, special_tokens=special_tokens, bos_token="<s>")


def tiny_model(num_layers: int = 3, seed: int = 0) -> Qwen3ForCausalLM:
    """Weights are large enough that attention, and so scores, differ clearly between documents."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=400,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
    )
    return Qwen3ForCausalLM(config).eval()


def save_tiny_ranker(directory: Path) -> Path:
    """A model directory with a ``rankernel.json``."""
    tiny_model().save_pretrained(directory)
    tiny_tokenizer().save_pretrained(directory)
    settings = {
        "method": "blockrank",
        "layer": 1,
        "prompt": dataclasses.asdict(COMPACT),
        "max_document_tokens": 48,
        "tail_offset": 256,
    }
    (directory / "rankernel.json").write_text(json.dumps(settings))
    return directory
