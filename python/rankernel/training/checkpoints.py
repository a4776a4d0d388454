"""Checkpoints that are whole or absent, whenever the process is killed.

A checkpoint is written to a directory beside its place, brought to disk and renamed. What is deleted is renamed away
first, so a ``checkpoint-*`` in a run's directory is never half written nor half deleted.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from transformers import Trainer
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

INCOMPLETE = ".incomplete"
"""Directory inside a run's directory for what is not whole yet, or not any more."""


def checkpoint_path(output: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return output / f"{PREFIX_CHECKPOINT_DIR}-{step}"


def checkpoint_steps(output: Path) -> list[int]:
    """Steps of the checkpoints in a run's directory, ascending."""
    names = [path.name.removeprefix(f"{PREFIX_CHECKPOINT_DIR}-") for path in output.glob(f"{PREFIX_CHECKPOINT_DIR}-*")]
    return sorted(int(name) for name in names if name.isdecimal())


def put_in_place(written: Path, place: Path) -> None:
    """Brings a directory to disk, then renames it; what was at ``place`` is gone."""
    for path in (*written.rglob("*"), written):
        _to_disk(path)
    remove(place)
    written.rename(place)
    _to_disk(place.parent)


def remove(place: Path) -> None:
    """Deletes a directory of a run if it is there."""
    if place.exists():
        doomed = place.parent / INCOMPLETE / f"removed-{place.name}"
        doomed.parent.mkdir(exist_ok=True)
        place.rename(doomed)
        shutil.rmtree(doomed)


def remove_incomplete(output: Path) -> None:
    """Deletes what a killed process left."""
    shutil.rmtree(output / INCOMPLETE, ignore_errors=True)


def _to_disk(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class WholeCheckpoints(Trainer):
    """A trainer whose checkpoints are whole; keeps the last and the best one. A mixin: inherit from it first."""

    def _get_output_dir(self, trial: Any) -> str:
        return os.path.join(self.args.output_dir, INCOMPLETE)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            output, state = Path(self.args.output_dir), self.state
            kept = {step for step in (state.global_step, state.best_global_step) if step is not None}
            written = checkpoint_path(output / INCOMPLETE, state.global_step)
            if state.best_global_step is not None:  # Transformers has noted where it was written
                state.best_model_checkpoint = str(checkpoint_path(output, state.best_global_step))
                state.save_to_json(str(written / TRAINER_STATE_NAME))
            put_in_place(written, checkpoint_path(output, state.global_step))
            for step in checkpoint_steps(output):
                if step not in kept:
                    remove(checkpoint_path(output, step))
        self.accelerator.wait_for_everyone()
