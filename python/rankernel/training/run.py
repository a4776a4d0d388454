"""``rankernel train``: a run in a directory of its own, which goes on where it was when it was stopped.

What the directory holds::

    config.yaml     the config, as it was given
    run.json        what may not change when the run goes on, and whether it is finished
    checkpoint-*    the last and the best: model, optimiser, scheduler, random states
    history.jsonl   losses and validation results, a line each time they are logged
    tensorboard/    the same for TensorBoard
    curves.png      the same as a picture, at the end
    model/          the best model with its card, at the end
"""

from __future__ import annotations

import datetime
import importlib
import importlib.metadata
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import TrainerCallback, TrainerControl, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_callback import PrinterCallback, TrainerState

from rankernel import run_files
from rankernel.cli import digest, effectiveness_table, fingerprint, load_reranker, progress_bar, run_scores
from rankernel.rerankers.blockrank import SETTINGS_FILE
from rankernel.rerankers.loading import load
from rankernel.run_files import FileError
from rankernel.training import trainer as trainers
from rankernel.training.checkpoints import (
    INCOMPLETE,
    WholeCheckpoints,
    checkpoint_path,
    checkpoint_steps,
    put_in_place,
    remove_incomplete,
)
from rankernel.training.config import Config, TrainLists, read_config
from rankernel.training.data import (
    RankingDataset,
    RankingExample,
    RankingTask,
    judged_queries,
    read_lists,
    read_task,
)

if TYPE_CHECKING:
    from rich.console import Console

METRICS = {"nDCG@10": "eval_ndcg_at_10", "MRR@10": "eval_mrr_at_10"}
STATE_FILE = "run.json"
MAY_CHANGE = frozenset({"training.max_steps", "training.num_train_epochs"})
"""A run may be made longer; the learning rate's schedule is then that of the new length."""
NOT_OF_A_MODEL = ("optimizer*", "scheduler.pt", "scaler.pt", "rng_state*", TRAINER_STATE_NAME, "training_args.bin")
LOSSES = {"loss": "total", "language_model": "language model", "ranking": "ranking", "teacher": "teacher"}
"""What the trainers log, and what the picture calls it."""
PACKAGES = ("rankernel", "torch", "transformers")
CARD = """# {title}

A reranker for `rankernel.rerankers.{class_name}`, trained from `{model}` by `rankernel train`.

{header}
{rows}

The checkpoint was chosen on these queries, so its numbers flatter it a little; measure it on others. Equal seeds, data
and versions give equal weights on equal machines. Made with {versions}, and this config:

```yaml
{config}
```
"""
LOSS_ARGUMENTS = {
    "language_model": "language_model_weight",
    "ranking": "ranking_loss",
    "parameters": "ranking_parameters",
    "teacher": "teacher_loss",
}
"""Keys of the section ``loss`` that the training arguments call otherwise."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C; the message says how to go on."""


def run_training(console: Console, path: Path, *, resume: bool) -> None:
    """Trains what a config file says, or goes on with it.

    Args:
        console: where progress and results go.
        path: the config file.
        resume: whether to continue a run that is in the output directory; without one, it starts.

    Raises:
        FileError: the config or a file that it names is unfit, the output directory holds a run and ``resume`` is not
            asked for, holds something else or a run of another config, or a loss is not finite.
        Interrupted: Ctrl-C while training.
        ImportError: a package of the extra ``train`` is not installed.
    """
    for needed_later in ("matplotlib", "torch.utils.tensorboard"):  # so that they are not missed only after the work
        importlib.import_module(needed_later)
    console.quiet = os.environ.get("RANK", "0") != "0"  # torchrun sets it; one process speaks and writes for all
    config = read_config(path)
    output = config.output
    identity = _identity(config)
    before = _read_state(output, identity, resume)
    if before == {"finished": True, "config": identity}:
        line = f"{output}: finished already, after {checkpoint_steps(output)[-1]} steps; nothing to do"
        console.print(line, soft_wrap=True)
        return
    trainer, first_stage = _build(console, path, config)
    done = max(checkpoint_steps(output), default=0)
    planned = _planned_steps(trainer) if done else math.inf
    if done > planned:
        raise FileError(f"{path}:training", None, f"expected at least the {done} steps of the run, got {planned}")
    writes = trainer.is_world_process_zero()
    if writes:
        remove_incomplete(output)
        _write_state(output, identity, finished=False)
        shutil.copyfile(path, output / "config.yaml")
    if done < planned:
        _train(console, path, trainer, first_stage, done)
    if writes:
        _finish(console, config, first_stage)
        _write_state(output, identity, finished=True)


def _planned_steps(trainer: Any) -> int:
    args = trainer.args
    if args.max_steps > 0:
        return args.max_steps
    batches = len(trainer.get_train_dataloader())
    return math.ceil(args.num_train_epochs * math.ceil(batches / args.gradient_accumulation_steps))


def _identity(config: Config) -> dict[str, Any]:
    """Every setting under its full name; of a file its digest, so that it may move but not change."""
    found: dict[str, Any] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                add(f"{name}.{key}" if name else key, inner)
        else:
            found[name] = _digest(value) if isinstance(value, Path) else value

    add("", config.model_dump(exclude={"output"}) | {"model": fingerprint(config.model)})
    found["number of processes"] = os.environ.get("WORLD_SIZE", "1")
    return json.loads(json.dumps(found, default=str))


def _digest(path: Path) -> str:
    try:
        return digest(path)
    except OSError as error:
        raise FileError(path, None, error.strerror or str(error)) from None


def _read_state(output: Path, identity: Mapping[str, Any], resume: bool) -> dict[str, Any] | None:
    """What ``run.json`` says of a run that may go on; None where there is none."""
    state_file = output / STATE_FILE
    if not state_file.exists():
        if output.is_dir() and any(not path.name.startswith(".") for path in output.iterdir()):
            raise FileError(output, None, "expected a new or empty directory, or that of a run")
        return None
    if not resume:
        raise FileError(output, None, "a run is there; continue it with --resume or name another output")
    try:
        state: dict[str, Any] = json.loads(state_file.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise FileError(state_file, None, f"not the state of a run ({error})") from None
    names = sorted((state["config"].keys() | identity.keys()) - MAY_CHANGE)
    changed = [name for name in names if state["config"].get(name) != identity.get(name)]
    if changed:
        raise FileError(output, None, f"the run was made with another {' and another '.join(changed)}")
    return state


def _write_state(output: Path, identity: Mapping[str, Any], *, finished: bool) -> None:
    state = {"finished": finished, "config": identity}
    run_files.write_atomically(output / STATE_FILE, json.dumps(state, indent=1) + "\n")


def _build(console: Console, path: Path, config: Config) -> tuple[Any, dict[str, float]]:
    """The trainer, and the effectiveness of the first stage's order on the validation queries."""
    with console.status("reading the files"):
        validation = _validation_task(config)
        dataset = _training_lists(console, path, config)
    _check_teacher(path, config, dataset[0])
    transformers.set_seed(config.seed)  # adapters begin at random
    with console.status("loading the model"):
        reranker: Any = load_reranker(config.model, config.method, {**config.settings, "dtype": _dtype(config)})
    try:
        model = reranker.model if config.lora is None else _with_adapters(reranker.model, config.lora)
        trainer_class = trainers.BlockRankTrainer if config.method == "blockrank" else trainers.FirstTrainer
        trainer = type("Trainer", (WholeCheckpoints, trainer_class), {})(
            model,
            _arguments(config),
            settings=reranker.settings,
            processing_class=reranker.tokenizer,
            train_dataset=dataset,
            eval_dataset=validation,
        )
        trainer.collator([dataset[0]])
    except ValueError as error:
        raise FileError(path, None, str(error).strip().splitlines()[0]) from None
    trainer.remove_callback(PrinterCallback)
    return trainer, run_files.effectiveness(validation.qrels, run_files.scores_in_order(validation.candidates))


def _check_teacher(path: Path, config: Config, example: RankingExample) -> None:
    if config.loss.teacher is not None and example.teacher_scores is None:
        raise FileError(f"{path}:loss.teacher", None, "expected a teacher in the section train, got none")
    if config.loss.teacher is None and example.teacher_scores is not None and config.method == "blockrank":
        raise FileError(f"{path}:loss.teacher", None, "expected a kind of loss for the teacher's scores, got none")


def _dtype(config: Config) -> Any:
    return config.dtype if config.dtype == "auto" else getattr(torch, config.dtype)


def _validation_task(config: Config) -> RankingTask:
    files = config.validation
    task = read_task(files.queries, files.documents, files.qrels, files.run, depth=files.depth, whole_pool=False)
    return judged_queries(task, files.limit, config.seed)


def _training_lists(console: Console, path: Path, config: Config) -> Sequence[RankingExample] | RankingDataset:
    files = config.train
    if isinstance(files, TrainLists):
        return read_lists(files.lists)
    task = read_task(files.queries, files.documents, files.qrels, files.run)
    teacher = None if files.teacher is None else run_files.read_run(files.teacher)
    try:
        dataset = RankingDataset(
            task,
            documents_per_list=files.documents_per_list,
            hard_negatives=files.hard_negatives,
            order=files.order,
            seed=config.seed,
            teacher=None if teacher is None else run_scores(teacher),
        )
    except ValueError as error:
        raise FileError(f"{path}:train", None, str(error)) from None
    if dataset.num_left_out:
        console.print(f"{dataset.num_left_out} training queries have no relevant document and are left out")
    return dataset


def _with_adapters(model: torch.nn.Module, lora: Mapping[str, Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    from rankernel.models import fuse_lora

    adapted = get_peft_model(model, LoraConfig(**{"task_type": "CAUSAL_LM", **lora}))
    fuse_lora(adapted)
    return adapted


def _arguments(config: Config) -> Any:
    loss = config.loss.model_dump(exclude_unset=True)
    eval_steps = config.training.get("eval_steps", 100)
    defaults = {"logging_steps": 10, "eval_steps": eval_steps, "save_steps": eval_steps}
    # Without these Transformers refuses bf16 on a CPU, and the loader warns.
    gpu = torch.cuda.is_available()
    defaults |= {"use_cpu": not gpu, "dataloader_pin_memory": gpu}
    return trainers.RankingArguments(
        output_dir=str(config.output),
        seed=config.seed,
        data_seed=config.seed,
        eval_strategy="steps",
        eval_on_start=not checkpoint_steps(config.output),
        save_strategy="steps",
        metric_for_best_model=METRICS["nDCG@10"],
        greater_is_better=True,
        train_sampling_strategy="random" if config.train.shuffle else "sequential",
        logging_nan_inf_filter=False,
        report_to="none",
        disable_tqdm=True,
        **{LOSS_ARGUMENTS.get(name, name): value for name, value in loss.items()},
        **{**defaults, **config.training},
    )


def _train(console: Console, path: Path, trainer: Any, first_stage: Mapping[str, float], done: int) -> None:
    from torch.utils.tensorboard import SummaryWriter
    from transformers.integrations import TensorBoardCallback

    output = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        # Steps behind the checkpoint were logged before the run was stopped, and come again.
        writer = SummaryWriter(str(output / "tensorboard"), purge_step=done + 1 if done else None)
        trainer.add_callback(TensorBoardCallback(writer))
    with progress_bar(console) as progress:
        trainer.add_callback(_Reporter(console, progress, output, first_stage))
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint_path(output, done)) if done else None)
        except KeyboardInterrupt:
            saved = checkpoint_steps(output)
            place = f"from step {saved[-1]}" if saved else "from the beginning, as nothing is saved yet"
            raise Interrupted(
                f"interrupted after step {trainer.state.global_step}; rankernel train --config {path} --resume "
                f"continues {place}"
            ) from None
        except (FloatingPointError, ValueError) as error:
            raise FileError(output, None, str(error)) from None


class _Reporter(TrainerCallback):
    """Shows and keeps what is logged, and lets every evaluated model be saved."""

    def __init__(self, console: Console, progress: Any, output: Path, first_stage: Mapping[str, float]) -> None:
        self.console = console
        self.progress = progress
        self.history = output / "history.jsonl"
        self.first_stage = first_stage["nDCG@10"]
        self.ranking: Any = None  # the bar of an evaluation

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero:
            run_files.write_atomically(self.history, (json.dumps(row) + "\n" for row in state.log_history))
        self.task = self.progress.add_task("training", total=state.max_steps, completed=state.global_step)
        self.began, self.first = time.monotonic(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.progress.update(self.task, completed=state.global_step)
        control.should_save |= control.should_evaluate  # so that the best model is there
        control.should_log |= control.should_save  # so that means over steps begin anew where a resumed run begins

    def on_prediction_step(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        eval_dataloader: Any = None,
        **kwargs: Any,
    ) -> None:
        if self.ranking is None:
            self.ranking = self.progress.add_task("validation", total=len(eval_dataloader))
        self.progress.advance(self.ranking)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: Any = None, **kwargs: Any
    ) -> None:
        step = state.global_step
        if METRICS["nDCG@10"] in logs:
            if self.ranking is not None:
                self.progress.remove_task(self.ranking)
                self.ranking = None
            ours = logs[METRICS["nDCG@10"]]
            line = f"step {step}: validation nDCG@10 {ours:.4f}, first stage {self.first_stage:.4f}"
            self.console.print(line, soft_wrap=True)
        elif "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise FloatingPointError(f"the loss of step {step} is not finite")
            parts = [f"{name} {logs[name]:.4f}" for name in LOSSES if logs.get(name)]
            shown = f"{'  '.join(parts)}  {logs['tokens_per_second']:.0f} tokens/s"
            self.progress.update(self.task, description=shown)
            if not self.console.is_terminal:
                left = (time.monotonic() - self.began) / (step - self.first) * (state.max_steps - step)
                rest = datetime.timedelta(seconds=round(left))
                self.console.print(f"step {step}/{state.max_steps}  {shown}  left {rest}", soft_wrap=True)
        else:
            return
        if state.is_world_process_zero:
            with self.history.open("a", encoding="utf-8") as file:
                file.write(json.dumps(state.log_history[-1]) + "\n")


def _finish(console: Console, config: Config, first_stage: Mapping[str, float]) -> None:
    """Makes of the checkpoints what is there at the end; can be done again."""
    output = config.output
    last = checkpoint_steps(output)[-1]
    state = TrainerState.load_from_json(str(checkpoint_path(output, last) / TRAINER_STATE_NAME))
    best = state.best_global_step
    found = {row["step"]: {name: row[key] for name, key in METRICS.items()} for row in evaluations(state.log_history)}
    results = {
        "first stage": first_stage,
        "before training": found[0],
        f"best, step {best}": found[best],
        f"last, step {last}": found[last],
    }
    draw_curves(output / "curves.png", state.log_history, first_stage["nDCG@10"])
    written = output / INCOMPLETE / "model"
    _export(config, checkpoint_path(output, best), written)
    (written / "README.md").write_text(_card(config, results), encoding="utf-8")
    put_in_place(written, output / "model")
    remove_incomplete(output)
    console.print(effectiveness_table(results))
    if found[best]["nDCG@10"] <= found[0]["nDCG@10"]:
        console.print("no step ranks the validation queries better than the model did before training")
    console.print(f"{output}: model, curves.png, history.jsonl, tensorboard", soft_wrap=True)


def evaluations(history: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of a trainer's history that hold validation results."""
    return [row for row in history if METRICS["nDCG@10"] in row]


def _export(config: Config, checkpoint: Path, place: Path) -> None:
    """The model of a checkpoint as a directory to load; adapters are merged into its weights."""
    if config.lora is None:
        shutil.copytree(checkpoint, place, ignore=shutil.ignore_patterns(*NOT_OF_A_MODEL))
        return
    from peft import PeftModel

    model, tokenizer = load(config.model, dtype=_dtype(config))
    PeftModel.from_pretrained(model, checkpoint).merge_and_unload().save_pretrained(place)
    tokenizer.save_pretrained(place)
    shutil.copy(checkpoint / SETTINGS_FILE, place)


def _card(config: Config, results: Mapping[str, Mapping[str, float]]) -> str:
    names = list(next(iter(results.values())))
    cells = {name: " | ".join(f"{value:.4f}" for value in values.values()) for name, values in results.items()}
    class_name = {"blockrank": "BlockRank", "first": "FIRST"}[config.method]
    versions = ", ".join(f"{package} {importlib.metadata.version(package)}" for package in PACKAGES)
    return CARD.format(
        title=config.output.name,
        class_name=class_name,
        model=Path(config.model).name if Path(config.model).is_dir() else config.model,
        header=f"| {' | '.join(['validation queries', *names])} |\n|{'---|' * (len(names) + 1)}",
        rows="\n".join(f"| {name} | {row} |" for name, row in cells.items()),
        config=(config.output / "config.yaml").read_text(encoding="utf-8").strip(),
        versions=versions,
    )


def draw_curves(path: Path, history: Sequence[Mapping[str, Any]], first_stage: float) -> None:
    """Draws the parts of the loss, and nDCG@10 beside the first stage's, over the steps, as a PNG.

    Args:
        path: where to.
        history: rows as a trainer logs them, with ``step``.
        first_stage: nDCG@10 of the candidates in their first order.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (losses, effectiveness) = pyplot.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    for (name, label), color in zip(LOSSES.items(), ("#252525", "#2166ac", "#b2182b", "#1b7837"), strict=True):
        rows = [row for row in history if row.get(name)]
        if rows:
            losses.plot([row["step"] for row in rows], [row[name] for row in rows], color=color, label=label)
    losses.set(xlabel="step", ylabel="training loss", xlim=(0, None), ylim=(0, None))
    rows = evaluations(history)
    values = [row[METRICS["nDCG@10"]] for row in rows]
    effectiveness.plot([row["step"] for row in rows], values, marker="o", color="#2166ac", label="ranker")
    effectiveness.axhline(first_stage, color="#b2182b", linestyle="--", label="first stage")
    best = max(values)
    place = (rows[values.index(best)]["step"], best)
    effectiveness.annotate(f"{best:.3f}", place, xytext=(0, 6), textcoords="offset points", ha="center")
    top = 1.15 * max(best, first_stage) or 1.0
    effectiveness.set(xlabel="step", ylabel="validation nDCG@10", xlim=(0, None), ylim=(0, top))
    for panel in (losses, effectiveness):
        panel.legend(frameon=False)
        panel.grid(alpha=0.3)
        panel.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
