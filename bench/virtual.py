"""The experts' work on ranks in virtual time: the real program over gloo, with clocks that repeat.

Used by `notebooks/05_scaling_out.py`, and by the README's test. The ranks are processes of this
machine, ep 2 by etp 2; every rank has the same number of tokens, which choose the experts in turn.
The unit of time is what all of a rank's rows take to their experts' ranks; over etp, which every
row crosses, it is twice that.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

from attnlab.distributed.mesh import Layout, Meshes
from attnlab.distributed.moe import mix_experts, shard_experts
from attnlab.distributed.routing import Routing
from attnlab.distributed.streams import Interval, Step
from attnlab.distributed.timing import VirtualTime

RANKS, TOKENS, EXPERTS, HIDDEN, WIDTH = 4, 96, 8, 4, 4
Run = tuple[float, dict[Step, Interval]]  # end, and when each stage ran on rank 0


def run_in_virtual_time(
    products: Sequence[float], groups: Sequence[int]
) -> dict[tuple[float, int], Run]:
    """The experts' work, of which the products alone take each of `products`, in each of `groups`."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found"
        cases = [(time, number) for time in products for number in groups]
        args = str(Path(folder) / "store"), str(found), cases
        multiprocessing.spawn(_work, args=args, nprocs=RANKS)
        return torch.load(found, weights_only=False)


def _work(rank: int, store: str, found: str, cases: list[tuple[float, int]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS)
    meshes = Meshes(Layout(world_size=RANKS, dp=RANKS, ep=2, etp=2), "cpu")
    ep, etp = meshes.group("ep"), meshes.group("etp")
    chosen = (torch.arange(2 * TOKENS) % EXPERTS).view(TOKENS, 2)
    routing = Routing(chosen, torch.full(chosen.shape, 0.5), chosen >= 0)
    x = torch.ones(TOKENS, HIDDEN)
    gate_up, down = torch.ones(EXPERTS, 2 * WIDTH, HIDDEN), torch.ones(EXPERTS, HIDDEN, WIDTH)
    shard = shard_experts(gate_up, down, ep, etp)
    sent = TOKENS * x[0].nbytes  # of two rows a token, half leave a rank
    runs: dict[tuple[float, int], Run] = {}
    for time, number in cases:
        # A rank computes the rows of both ranks that share its experts: four times its tokens.
        clock = VirtualTime(row_time=time / (4 * TOKENS), latency=0.0, rate=sent)
        mix_experts(x, routing, shard, ep, etp, num_groups=number, clock=clock)
        runs[time, number] = clock.end, clock.intervals
    if rank == 0:
        torch.save(runs, found)
    dist.destroy_process_group()
