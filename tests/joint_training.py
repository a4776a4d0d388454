"""Fifty joint steps: one small task, trained by ``BlockRankTrainer`` and, written out, by dense eager PyTorch.

As a script it is one process of several: ``python joint_training.py OUTPUT`` with ``RANK`` and ``WORLD_SIZE``.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import DistributedType, PartialState
from accelerate.state import AcceleratorState
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainerCallback

from rankernel.rerankers import COMPACT
from rankernel.rerankers.blockrank import BlockRankSettings
from rankernel.training import (
    BlockRankTrainer,
    RankingArguments,
    RankingBatch,
    RankingCollator,
    RankingExample,
    RankingTask,
    RankingTrainer,
    TokenBudgetSampler,
)
from tiny_ranker import tiny_tokenizer

STEPS = 50
LEARNING_RATE = 1e-3
MAX_TOKENS = 260
SETTINGS = BlockRankSettings(layer=1, prompt=COMPACT, max_document_tokens=24, tail_offset=128)
WORDS = (
    "copy", "read", "write", "open", "file", "path", "socket", "query", "answer", "how", "to", "the", "of", "a",
    "list", "close", "bytes", "text",
)  # fmt: skip


def make_examples(count: int = 64, *, seed: int = 0, teacher: bool = False) -> list[RankingExample]:
    """Lists of 2 to 6 documents, of which one or two hold the query's words."""
    generator = random.Random(seed)

    def text(least: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(least, most)))

    examples = []
    for _ in range(count):
        query = text(2, 4)
        documents = [text(1, 9) for _ in range(generator.randint(2, 6))]
        relevant = generator.sample(range(len(documents)), min(generator.randint(1, 2), len(documents) - 1))
        for index in relevant:
            documents[index] += f" {query}"
        labels = [float(index in relevant) for index in range(len(documents))]
        scores = [round(generator.uniform(-3, 3), 3) for _ in documents] if teacher else None
        examples.append(RankingExample(query, documents, labels, scores))
    return examples


def make_task(examples: Sequence[RankingExample]) -> RankingTask:
    """The same lists to rank."""
    names = {f"q{i}": [f"d{i}.{j}" for j in range(len(e.documents))] for i, e in enumerate(examples)}
    return RankingTask(
        queries={f"q{i}": e.query for i, e in enumerate(examples)},
        documents={f"d{i}.{j}": text for i, e in enumerate(examples) for j, text in enumerate(e.documents)},
        candidates=names,
        qrels={f"q{i}": {f"d{i}.{j}": int(y) for j, y in enumerate(e.labels) if y} for i, e in enumerate(examples)},
    )


def make_model(attention: str = "sdpa") -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=400, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, initializer_range=0.1, attn_implementation=attention,
        eos_token_id=0, bos_token_id=None,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)


def with_lora(model: Any) -> Any:
    """Adapters of PEFT that begin with an effect."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(
        model, LoraConfig(r=4, lora_alpha=16, target_modules=targets, task_type="CAUSAL_LM", init_lora_weights=False)
    )


def make_arguments(output: str | Path, **given: Any) -> RankingArguments:
    """Without whatever the dense loop does not do."""
    return RankingArguments(
        **{
            "output_dir": str(output), "use_cpu": True, "report_to": "none", "disable_tqdm": True, "logging_steps": 1,
            "save_strategy": "no", "max_steps": STEPS, "learning_rate": LEARNING_RATE, "lr_scheduler_type": "constant",
            "optim": "adamw_torch", "max_grad_norm": 0.0, "max_tokens": MAX_TOKENS, "seed": 3, "ranking_weight": 0.5,
            **given,
        }
    )  # fmt: skip


def make_trainer(
    model: Any, arguments: RankingArguments, *, trainer_class: type[RankingTrainer] = BlockRankTrainer, **given: Any
) -> RankingTrainer:
    options = {"settings": SETTINGS, "processing_class": tiny_tokenizer(), "train_dataset": make_examples(), **given}
    return trainer_class(model, arguments, **options)


def logged_losses(trainer: Any) -> list[float]:
    return [row["loss"] for row in trainer.state.log_history if "loss" in row]


def dense_losses(model: Any) -> list[float]:
    """The loss of every step: two rows, with stock eager attention under a dense mask, float32."""
    sampler = TokenBudgetSampler(
        [RankingCollator(tiny_tokenizer(), SETTINGS).num_tokens(example) for example in make_examples()],
        MAX_TOKENS, max_lists=8, seed=3,
    )  # fmt: skip
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], LEARNING_RATE, weight_decay=0.0)
    collator, examples, losses, epoch = RankingCollator(tiny_tokenizer(), SETTINGS), make_examples(), [], 0
    while len(losses) < STEPS:
        sampler.set_epoch(epoch)
        epoch += 1
        batches = [collator([examples[index] for index in indices]) for indices in sampler]
        assert len(batches) % 2 == 0, "an epoch of one process would end with half a step"
        for begin in range(0, len(batches), 2):
            rows = batches[begin : begin + 2]
            num_lists = sum(row.layout.num_lists for row in rows)
            loss = sum(dense_loss(model, row) * row.layout.num_lists / num_lists for row in rows)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return losses[:STEPS]


def dense_loss(model: Any, batch: RankingBatch) -> torch.Tensor:
    """Language-model loss of the answers + 0.5 * InfoNCE of the documents' shares of attention in layer 1."""
    mask = torch.where(batch.layout.dense_mask(), 0.0, torch.finfo(torch.float32).min)
    outputs = model(
        input_ids=batch.input_ids[None],
        position_ids=batch.layout.position_ids(tail_offset=SETTINGS.tail_offset)[None],
        attention_mask=mask[None, None],
        output_attentions=True,
    )
    attention = outputs.attentions[SETTINGS.layer][0]  # [heads, T, T]
    ranking = torch.zeros(())
    for number, segments in enumerate(batch.layout.segments()):
        rows = batch.signal_rows[2 * number : 2 * number + 2]
        mass = torch.stack([attention[:, rows, begin:end].sum(dim=-1) for begin, end, _ in segments[1:-1]], dim=-1)
        shares = (mass / mass.sum(dim=-1, keepdim=True)).mean(dim=(0, 1))
        positive = batch.labels[number, : len(shares)] > 0
        logits = shares / 0.05
        ranking = ranking + logits.logsumexp(0) - logits[positive].logsumexp(0)
    log_probabilities = outputs.logits[0, batch.answer_rows].log_softmax(dim=-1)
    language_model = -log_probabilities.gather(1, batch.answer_ids[:, None]).mean()
    return language_model + 0.5 * ranking / batch.layout.num_lists


class Counter(TrainerCallback):
    """How many lists this process has evaluated."""

    def __init__(self) -> None:
        self.lists = 0

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.lists += 1


def train_distributed(output: Path, *, fsdp: bool) -> None:
    """Trains in this process and its peers; the first one leaves the model and ``found.json`` in the directory."""
    given: dict[str, Any] = {"eval_strategy": "steps", "eval_steps": STEPS // 2, "eval_on_start": True}
    if not fsdp:
        given |= {"save_strategy": "steps", "save_steps": 35}  # within the third epoch
    else:
        given |= {"fsdp": True, "fsdp_config": {"transformer_layer_cls_to_wrap": ["Qwen3DecoderLayer"]}}
    arguments = make_arguments(output / "run", ddp_backend="gloo", **given)
    if fsdp:
        # Accelerate shards on accelerators alone; all that comes after this check runs on CPUs too.
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_XPU
    counter = Counter()
    task = make_task(make_examples(11, seed=5))
    trainer = make_trainer(make_model(), arguments, eval_dataset=task, callbacks=[counter])
    trainer.train()
    trainer.save_model(str(output / "model"))
    found = {
        "losses": logged_losses(trainer),
        "ndcg": [row["eval_ndcg_at_10"] for row in trainer.state.log_history if "eval_ndcg_at_10" in row],
        "evaluated": counter.lists,
        "wrapper": type(trainer.model_wrapped).__name__,
    }
    if not fsdp:
        resumed = make_trainer(make_model(), arguments, eval_dataset=task)
        resumed.train(resume_from_checkpoint=str(output / "run" / "checkpoint-35"))
        found["resumed"] = logged_losses(resumed)
    if trainer.is_world_process_zero():
        (output / "found.json").write_text(json.dumps(found))


def main(output: Path) -> None:
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    train_distributed(output / "ddp", fsdp=False)
    AcceleratorState._reset_state(reset_partial_state=True)
    train_distributed(output / "fsdp", fsdp=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
