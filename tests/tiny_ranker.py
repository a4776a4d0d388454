"""A model with random weights and a tokenizer, both made in a moment, for tests."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from rankernel.rerankers.prompts import COMPACT

CHAT_TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}{% if not loop.last %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}</s><assistant>{% endif %}"
)


def tiny_tokenizer(chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level, so that every string can be written and read back."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(["Query: how to read a file Documents: Answer: the path of the file"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


def word_tokenizer(*, chat: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level, at most 330 tokens, among them the words that rerankers read."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=["</s>", "<s>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["yes", "no", " true", " false", " A", " B", " file"] * 9, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", bos_token="<s>")
    if chat:
        fast.chat_template = CHAT_TEMPLATE
    return fast


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
