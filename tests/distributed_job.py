"""A job for torchrun: trains a tiny model for some steps, and can lose a rank on the way.

FOLDER STEPS CP [RANK STEP]: the rank that ends without a word before that step.
"""

import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
from test_distributed_model import packs, small

from attnlab.distributed.launch import job
from attnlab.distributed.trainer import ParallelTrainer
from attnlab.model.hybrid import HybridLM
from attnlab.training.packing import Pack


def main(folder, steps, cp, lost_rank=-1, lost_step=-1):
    torch.set_num_threads(1)
    data = [
        Pack(ids, targets, torch.tensor(cu, dtype=torch.int32), int((targets >= 0).sum()))
        for ids, targets, cu in packs()
    ]
    with job(timeout=timedelta(seconds=60)) as ranks:
        meshes = ranks.meshes(cp=cp)
        torch.manual_seed(0)
        trainer = ParallelTrainer(HybridLM(small()), meshes)
        checkpoints = Path(folder) / "checkpoints"
        for step in range(trainer.load(checkpoints) + 1, steps + 1):
            if (meshes.group("world").rank, step) == (lost_rank, lost_step):
                os._exit(9)
            loss, _ = trainer.step(data, learning_rate=1e-2)
            trainer.save(checkpoints, step)
            if meshes.group("world").rank == 0:
                print(f"step {step}: {loss.item():.6f}", flush=True)
        trainer.export(Path(folder) / "model")


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
