"""Two processes with gloo: the steps are those of one process, whether weights are replicated or sharded."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import joint_training
from joint_training import STEPS, dense_losses, make_examples, make_model, make_task
from rankernel import run_files
from rankernel.rerankers import BlockRank


@pytest.fixture(scope="module")
def expected() -> list[float]:
    return dense_losses(make_model("eager"))


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes left."""
    directory = tmp_path_factory.mktemp("distributed")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [sys.executable, joint_training.__file__, str(directory)],
            env={**os.environ, **shared, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        errors = [process.communicate(timeout=300)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], "\n".join(errors)
    return directory


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "wrapper"), [("ddp", "DistributedDataParallel"), ("fsdp", "FSDPQwen3ForCausalLM")])
def test_two_processes(kind: str, wrapper: str, output: Path, expected: list[float]) -> None:
    found = json.loads((output / kind / "found.json").read_text())
    assert found["wrapper"] == wrapper
    assert len(found["losses"]) == STEPS
    assert found["losses"] == pytest.approx(expected, rel=1e-4)
    if kind == "ddp":
        assert found["resumed"] == found["losses"]
    # Three evaluations, of six of the eleven lists by the first process.
    assert found["evaluated"] == 3 * 6
    task = make_task(make_examples(11, seed=5))
    ranker = BlockRank.from_pretrained(output / kind / "model", dtype=torch.float32)
    run = {}
    for query, names in task.candidates.items():
        ranking = ranker.rank(task.queries[query], [task.documents[name] for name in names], document_ids=names)
        run[query] = {row.document_id: -float(row.rank) for row in ranking}
    assert found["ndcg"][-1] == pytest.approx(run_files.effectiveness(task.qrels, run)["nDCG@10"], abs=1e-9)
    assert len(found["ndcg"]) == 3
    assert found["ndcg"][0] < found["ndcg"][-1]
