"""Hugging Face's ``Trainer`` for rankers: packed rows in, joint losses out, evaluated by ranking.

One step costs one forward pass of the wrapped model, so mixed precision, gradient accumulation and checkpointing,
PEFT, ``torch.compile``, DistributedDataParallel and FSDP2 work as ``transformers.Trainer`` and accelerate set them up.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import time
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import speed_metrics

from rankernel import run_files
from rankernel.models.packing import BATCH_TOKENS
from rankernel.rerankers.blockrank import SETTINGS_FILE, BlockRank, BlockRankSettings
from rankernel.rerankers.first import FIRST, FirstSettings
from rankernel.rerankers.protocol import Ranking, Reranker
from rankernel.training.collator import FirstCollator, RankingBatch, RankingCollator
from rankernel.training.data import RankingExample, RankingTask
from rankernel.training.losses import JointLoss, RankingObjective, Score, first_loss, joint_loss
from rankernel.training.sampler import TokenBudgetSampler

__all__ = ["BlockRankTrainer", "FirstTrainer", "RankingArguments", "RankingTrainer"]


@dataclasses.dataclass
class RankingArguments(TrainingArguments):
    """``transformers.TrainingArguments`` and what :class:`RankingObjective` takes, None for the method's own value.

    ``train_sampling_strategy="sequential"`` keeps the order of the lists, anything else shuffles them anew each epoch.
    Gradient checkpointing is non-reentrant.

    Attributes:
        max_tokens: tokens of a row; None for rows of ``per_device_train_batch_size`` lists. With it, that many lists
            are a row's most. Every list is tokenized once at the beginning of each epoch to learn its length.
        eval_batch_tokens: tokens of a row in evaluation; see :meth:`Reranker.rank_many`.
        importance_weighted: of :class:`FirstCollator`.

    Raises:
        ValueError: reentrant gradient checkpointing, under which scores have no gradient.
    """

    remove_unused_columns: bool | None = False
    gradient_checkpointing_kwargs: dict[str, Any] | None = None
    language_model_weight: float | None = None
    ranking_loss: str | None = None
    ranking_weight: float | None = None
    ranking_parameters: dict[str, Any] | None = None
    teacher_loss: str | None = None
    teacher_weight: float | None = None
    teacher_parameters: dict[str, Any] | None = None
    temperature: float | None = None
    score: Score | None = None
    max_tokens: int | None = None
    eval_batch_tokens: int = BATCH_TOKENS
    importance_weighted: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        checkpointing = {"use_reentrant": False, **(self.gradient_checkpointing_kwargs or {})}
        if checkpointing["use_reentrant"]:
            raise ValueError(
                "gradient_checkpointing_kwargs: expected use_reentrant=False, got True, which gives gradients to a "
                "layer's output alone, so that a loss on document scores would train nothing"
            )
        self.gradient_checkpointing_kwargs = checkpointing
        self.activation_checkpointing_kwargs = checkpointing  # its name from Transformers 6 on

    def objective(self) -> dict[str, Any]:
        """The arguments of :class:`RankingObjective` that are given."""
        names = inspect.signature(RankingObjective).parameters
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


class _Epochs(TrainerCallback):
    """Tells sampler and dataset the epoch; accelerate forgets one or the other in some processes and resumed runs."""

    def __init__(self, trainer: RankingTrainer) -> None:
        self.trainer = trainer

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.trainer.set_epoch(int(state.epoch or 0))


class _Lengths(Sequence[int]):
    """Tokens of every list of a dataset, read when they are asked for."""

    def __init__(self, dataset: Sequence[RankingExample], collator: Any) -> None:
        self.dataset = dataset
        self.collator = collator

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        return self.collator.num_tokens(self.dataset[index])


class RankingTrainer(Trainer):
    """What :class:`BlockRankTrainer` and :class:`FirstTrainer` share.

    Every list weighs the same in a step, whichever row, accumulated batch or process it is in: the loss of a row, its
    mean over lists and answer tokens, counts by its share of the step's lists. Logged beside ``loss``, as means over
    the lists since the last time and over all processes: its parts ``language_model``, ``ranking`` and ``teacher``;
    ``first_place``, how often the document with the highest score had the best label; and ``tokens_per_second``.

    Args:
        model: a causal language model of Transformers, with or without adapters of PEFT; it stays attached.
        args: what to train how.
        settings: with which the model ranks, here and once it is loaded again.
        processing_class: the tokenizer.
        train_dataset: :class:`RankingExample` by index; ``set_epoch`` is called if there is one.
        eval_dataset: what :meth:`evaluate` ranks.
        options: of ``transformers.Trainer``, such as ``callbacks`` and ``optimizers``.

    Raises:
        ValueError: settings or arguments that are unfit, or several GPUs in one process.
    """

    control: Any
    method: str
    published: Mapping[str, Any] = {}
    loss_is_scaled_for_ga = True

    def __init__(
        self,
        model: Any,
        args: RankingArguments,
        *,
        settings: Any,
        processing_class: Any,
        train_dataset: Any = None,
        eval_dataset: RankingTask | None = None,
        **options: Any,
    ) -> None:
        if args.n_gpu > 1:
            raise ValueError(
                f"args: expected one GPU per process, got {args.n_gpu}; start one process for each with torchrun or "
                "accelerate launch, or set CUDA_VISIBLE_DEVICES"
            )
        self.settings = settings
        self.objective = RankingObjective(**{**self.published, **args.objective()})
        self.processing_class = processing_class
        self.reranker(model)  # attaches the model, and checks that it fits the settings
        self.collator = self.make_collator(args)
        self._sums: torch.Tensor | None = None
        self._since = time.monotonic()
        super().__init__(
            model=model,
            args=args,
            data_collator=functools.partial(_as_inputs, self.collator),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            **options,
        )
        self.add_callback(_Epochs(self))
        # Sharded layers cannot be run one by one, as rerankers do; a copy without weights takes them for an evaluation.
        self._skeleton = _without_weights(model) if self.is_fsdp_enabled else None

    @abstractmethod
    def make_collator(self, args: RankingArguments) -> Any:
        """What makes batches of examples."""

    @abstractmethod
    def batch_loss(self, model: Any, batch: RankingBatch) -> JointLoss:
        """The loss of a batch, through the wrapped model."""

    @abstractmethod
    def reranker(self, model: Any) -> Reranker:
        """The method on a model."""

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch of the training data."""
        self._sampler.set_epoch(epoch)
        if hasattr(self.train_dataset, "set_epoch"):
            self.train_dataset.set_epoch(epoch)

    def get_train_dataloader(self) -> DataLoader:
        """Rows of lists, within ``max_tokens`` where that is given; the same number for every process."""
        if self.train_dataset is None:
            raise ValueError("train_dataset: expected one, got None")
        dataset: Any = self.train_dataset
        if hasattr(dataset, "set_epoch"):
            dataset.set_epoch(0)
        args, lists = self.args, self._train_batch_size
        by_tokens = args.max_tokens is not None
        self._sampler = TokenBudgetSampler(
            _Lengths(dataset, self.collator) if by_tokens else [1] * len(dataset),
            args.max_tokens if by_tokens else lists,
            max_lists=lists,
            shuffle=args.train_sampling_strategy != "sequential",
            seed=args.seed if args.data_seed is None else args.data_seed,
            multiple_of=self.accelerator.num_processes,
        )
        # No persistent workers: theirs would be the dataset of the first epoch.
        loader = DataLoader(
            dataset,
            batch_sampler=self._sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The batches of a step of this process, and the lists of that step in all processes."""
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        lists = sum(inputs["batch"].layout.num_lists for inputs in batches)
        return batches, self.accelerator.reduce(torch.tensor(lists, device=device))

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """The loss of one row, weighted by its share of the step's lists; see the class."""
        batch: RankingBatch = inputs["batch"]
        loss = self.batch_loss(model, batch)
        self._add(loss, batch)
        total = loss.total
        if num_items_in_batch is not None:
            # The mean over processes that follows is undone.
            total = total * (batch.layout.num_lists * self.accelerator.num_processes / num_items_in_batch)
        return (total, loss) if return_outputs else total

    @torch.no_grad()
    def _add(self, loss: JointLoss, batch: RankingBatch) -> None:
        lists, ranked = batch.layout.num_lists, batch.labels.amax(dim=1) > 0
        first = loss.scores.masked_fill(~batch.present, -torch.inf).argmax(dim=1, keepdim=True)
        hits = (batch.labels.gather(1, first)[:, 0] == batch.labels.amax(dim=1)) & ranked
        parts = torch.stack([loss.language_model, loss.ranking, loss.teacher]) * lists
        counts = parts.new_tensor([lists, batch.layout.num_tokens])
        sums = torch.cat([parts, counts, torch.stack([hits.sum(), ranked.sum()]).to(parts.dtype)])
        self._sums = sums if self._sums is None else self._sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Logs; a training loss together with its parts."""
        if "loss" in logs and self._sums is not None:
            *parts, lists, tokens, hits, ranked = self.accelerator.reduce(self._sums).tolist()
            now = time.monotonic()
            logs |= {name: part / lists for name, part in zip(JointLoss._fields[1:4], parts, strict=True)}
            logs |= {"first_place": hits / ranked} if ranked else {}
            logs["tokens_per_second"] = tokens / (now - self._since)
            self._sums, self._since = None, now
        super().log(logs, start_time)

    def evaluate(
        self, eval_dataset: RankingTask | None = None, ignore_keys: Any = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Ranks the candidates of a task, given in its order, with the method's own reranker.

        Args:
            eval_dataset: the task; None for that of the constructor.
            ignore_keys: not used.
            metric_key_prefix: begins the names of the metrics.

        Returns:
            ``eval_ndcg_at_10`` and ``eval_mrr_at_10``, the means over the task's judged queries, and the time it took.

        Raises:
            ValueError: there is no task.
            FloatingPointError: scores that are not finite.
            ImportError: ``ir-measures`` is not installed.
        """
        task: Any = self.eval_dataset if eval_dataset is None else eval_dataset
        if task is None:
            raise ValueError("eval_dataset: expected a RankingTask, got None")
        began, paused = time.time(), time.monotonic()
        accelerator = self.accelerator
        queries = list(task.candidates)[accelerator.process_index :: accelerator.num_processes]
        lists = [(task.queries[query], [task.documents[name] for name in task.candidates[query]]) for query in queries]
        self.callback_handler.eval_dataloader = lists  # whose length is that of the progress bar
        found = []
        with accelerator.autocast():
            scored = self.reranker(self._whole_model()).score_lists(lists, batch_tokens=self.args.eval_batch_tokens)
            for query, scores in zip(queries, scored, strict=True):
                ranking = Ranking.from_scores(query, *scores, document_ids=task.candidates[query])
                found.append((query, {row.document_id: -float(row.rank) for row in ranking}))
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        run = dict(gather_object(found))
        judged = {query: task.qrels[query] for query in task.queries if query in task.qrels}
        metrics = {
            f"{metric_key_prefix}_{name.lower().replace('@', '_at_')}": mean
            for name, mean in run_files.effectiveness(judged, run).items()
        }
        metrics |= speed_metrics(metric_key_prefix, began, num_samples=len(run))
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._since += time.monotonic() - paused
        return metrics

    def _whole_model(self) -> Any:
        """The model without the wrappers of training; under FSDP a copy with all weights."""
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        if self._skeleton is None:
            return model
        whole = copy.deepcopy(self._skeleton)
        weights = {
            name: weight.full_tensor() if isinstance(weight, DTensor) else weight
            for name, weight in model.named_parameters(remove_duplicate=False)
        }
        whole.load_state_dict(weights, strict=False, assign=True)
        return whole.to(self.args.device)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the model, and beside it the ``rankernel.json`` that says how it ranks."""
        super().save_model(output_dir, _internal_call)
        if self.args.should_save:
            content = json.dumps({"method": self.method, **dataclasses.asdict(self.settings)}, indent=2) + "\n"
            run_files.write_atomically(Path(output_dir or self.args.output_dir, SETTINGS_FILE), content)


class BlockRankTrainer(RankingTrainer):
    """Trains for :class:`rankernel.rerankers.BlockRank`; see :class:`RankingTrainer`.

    Args:
        settings: :class:`BlockRankSettings`.
    """

    method = "blockrank"

    def make_collator(self, args: RankingArguments) -> RankingCollator:
        """See :class:`RankingTrainer`."""
        return RankingCollator(self.processing_class, self.settings)

    def batch_loss(self, model: Any, batch: RankingBatch) -> JointLoss:
        """See :func:`joint_loss`."""
        return joint_loss(model, batch, self.settings, self.objective)

    def reranker(self, model: Any) -> BlockRank:
        """See :class:`RankingTrainer`."""
        settings: BlockRankSettings = self.settings
        return BlockRank(model, self.processing_class, **vars(settings))


class FirstTrainer(RankingTrainer):
    """Trains for :class:`rankernel.rerankers.FIRST`; see :class:`RankingTrainer`.

    Args:
        settings: :class:`FirstSettings`.
    """

    method = "first"
    published = RankingObjective.FIRST

    def make_collator(self, args: RankingArguments) -> FirstCollator:
        """See :class:`RankingTrainer`."""
        return FirstCollator(self.processing_class, self.settings, importance_weighted=args.importance_weighted)

    def batch_loss(self, model: Any, batch: RankingBatch) -> JointLoss:
        """See :func:`first_loss`."""
        return first_loss(model, batch, self.collator.letters, self.objective)

    def reranker(self, model: Any) -> FIRST:
        """See :class:`RankingTrainer`."""
        settings: FirstSettings = self.settings
        return FIRST(model, self.processing_class, **vars(settings))


def _as_inputs(collator: Any, examples: Sequence[RankingExample]) -> dict[str, Any]:
    """A batch as ``Trainer`` takes it: it looks for names in it, and counts ``input_ids``."""
    batch = collator(examples)
    return {"input_ids": batch.input_ids, "batch": batch}


def _without_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A copy whose parameters are on the meta device."""
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(p.detach().to("meta")) for p in model.parameters()})
