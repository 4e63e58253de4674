"""What each rank runs for the tests of whole training runs, and of the sweep on ranks."""

import time
from unittest import mock

import torch
import torch.distributed as dist
from distributed_mutations import mutated

from attnlab.distributed.comm import Group
from attnlab.distributed.launch import Job
from attnlab.training.config import TrainConfig
from attnlab.training.guard import NonFiniteError
from attnlab.training.ranks import RankTrainer
from attnlab.training.train import resume, train
from bench import rank_calls, ranks
from bench.inputs import Source

EXPECTED = (ValueError, NonFiniteError, OSError)


class Planted(Exception):
    """Ends a run in its midst."""


def run_train(rank, size, settings, model_config, *, fails_at=None, nan_at=None):
    """The result of a run on these ranks, or the words of its error.

    fails_at: step before which all ranks end; nan_at: rank and step from which on a norm gives NaN.
    """
    settings = settings[rank] if isinstance(settings, list) else settings
    plain, calls = RankTrainer.step, []

    def step(trainer, *args, **kwargs):
        calls.append(1)
        if len(calls) == fails_at:
            raise Planted
        if nan_at == (rank, len(calls)):
            norm = trainer.model.lm.model.layers[2].input_layernorm
            norm.register_forward_hook(lambda module, args, output: output * torch.nan)
        return plain(trainer, *args, **kwargs)

    with mock.patch.object(RankTrainer, "step", step):
        try:
            return train(TrainConfig(**settings), model_config=model_config, job=Job("cpu"))
        except EXPECTED as error:
            return f"{type(error).__name__}: {error}"
        except Planted:
            return None


def run_resume(rank, size, out, **place):
    """The result of a run that goes on on these ranks, or the words of its error."""
    try:
        return resume(out, job=Job("cpu"), **place)
    except EXPECTED as error:
        return f"{type(error).__name__}: {error}"


def run_gate(rank, size, point, *, mutation=None):
    """The worst result of this rank's part of a point, and its error over its budget."""
    with mutated(mutation):
        call = rank_calls.prepare(point, Source("text"), Group(dist.group.WORLD), "cpu")
        found = call.check()
    return found.name, found.worst.ratio


def run_measure(rank, size, seconds):
    """Samples of a call that takes the last rank so long, and the others nothing."""

    def call():
        time.sleep(seconds if rank == size - 1 else 0.0)

    return ranks.measure(call, Group(dist.group.WORLD), "cpu", 10.0).samples
