"""Jobs under torchrun: steps beside one process's trainer, and what happens when a rank is lost."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from distributed_model_cases import run_losses, run_trainer
from test_distributed_model import packs, small

from attnlab.distributed.checkpoint import list_sharded
from attnlab.distributed.launch import LOST
from attnlab.model.hybrid import HybridLM
from attnlab.training.packing import Pack
from attnlab.training.trainer import Trainer

SCRIPT = Path(__file__).with_name("distributed_job.py")


def data():
    return [
        Pack(ids, targets, torch.tensor(cu, dtype=torch.int32), int((targets >= 0).sum()))
        for ids, targets, cu in packs()
    ]


def alone(dtype, steps=2):
    """Losses and norms of the trainer of one process."""
    torch.manual_seed(0)
    model = HybridLM(small(), dtype=torch.float32).use_backend(lightning="torch")
    trainer = Trainer(model, dtype=dtype, weight_decay=0.1, clip_norm=1.0)
    return [
        [x.item() for x in trainer.step(data(), learning_rate=1e-3, multiplier=1.0)]
        for _ in range(steps)
    ]


@pytest.mark.parametrize("zigzag", [False, True], ids=["contiguous", "zigzag"])
# In bfloat16 a token whose best experts are nearly alike can go to another one.
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
def test_steps_are_those_of_the_trainer_of_one_process(worlds, dtype, tolerance, zigzag):
    answers = worlds(2).call(run_trainer, small(), {"cp": 2}, data(), dtype, zigzag)
    for found in answers:
        for step, wanted in zip(found, alone(dtype), strict=True):
            assert step == pytest.approx(wanted, rel=tolerance)


def test_packs_that_do_not_fit_are_refused_on_all_ranks(worlds):
    one = data()[:1]
    words = worlds(2).call(run_trainer, small(), {"dp": 2}, one, torch.float32, False)
    assert words == ["expected packs in a multiple of dp 2, got 1"] * 2
    short = [
        Pack(
            torch.zeros(1, 1, dtype=torch.int64),
            torch.zeros(1, dtype=torch.int64),
            torch.tensor([0, 1]),
            1,
        )
    ]
    words = worlds(2).call(run_trainer, small(), {"cp": 2}, short, torch.float32, False)
    assert words == ["expected at least 2 tokens, one for each of the ranks, got 1"] * 2


DIFFER = "expected the same cu_seqlens and zigzag on all ranks of world, got others on ranks [{}]"


def test_losses_of_packs_with_other_bounds_are_refused_on_all_ranks(worlds):
    one, other = data()
    first, second = worlds(2).call(run_losses, small(), {"cp": 2}, [[one, one], [other, one]])
    assert first[0] == second[0] == DIFFER.format(1)
    assert first[1] > 0 < second[1]
    words = worlds(2).call(run_losses, small(), {"cp": 2}, [[one]] * 2, [False, True])
    assert words == [[DIFFER.format(1)]] * 2


def test_losses_of_packs_that_are_the_same_within_replicas_alone_are_computed(worlds):
    one, other = data()
    layout, mixed = {"dp": 2, "cp": 2}, [[one, one], [one, one], [other, one], [other, other]]
    answers = worlds(4).call(run_losses, small(), layout, mixed)
    assert all(found[0] > 0 for found in answers)
    assert [found[1] for found in answers] == [DIFFER.format(3)] * 4


def test_steps_on_packs_with_other_bounds_or_fewer_of_them_are_refused_on_all_ranks(worlds):
    one, other = data()
    for packs_ in ([other, one], [one]):
        answers = worlds(2).call(
            run_trainer, small(), {"dp": 2}, [[one, other], packs_], torch.float32, False
        )
        assert answers == [DIFFER.format(1)] * 2


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "2", str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.distributed_full
def test_a_lost_rank_ends_the_job_with_one_message_and_it_goes_on_from_the_checkpoint(tmp_path):
    lost = torchrun(tmp_path, 3, 2, 1, 3)
    assert lost.returncode != 0
    assert lost.stderr.count(LOST) == 1
    assert [path.name[-1] for path in list_sharded(tmp_path / "checkpoints")] == ["1", "2"]
    resumed = torchrun(tmp_path, 3, 2)
    assert resumed.returncode == 0, resumed.stderr
    steps = [line for line in resumed.stdout.splitlines() if line.startswith("step")]
    assert [line.split(":")[0] for line in steps] == ["step 3"]
    assert HybridLM.from_pretrained(tmp_path / "model").config == small()


@pytest.mark.distributed_full
def test_a_wrong_layout_ends_the_job_with_one_message(tmp_path):
    wrong = torchrun(tmp_path, 1, 3)
    assert wrong.returncode != 0
    assert wrong.stderr.count("error: expected 2 ranks as dp 1 x cp 3 x tp 1, got 3") == 1
