"""Experts over ranks against a loop over experts in one process; messages; virtual time."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from distributed_cases import largest, plans, run_clock, run_kept, run_moe
from distributed_mutations import MOE_MUTATIONS
from distributed_world import RankFailed

from attnlab.distributed.comm import Group
from attnlab.distributed.moe import ExpertShard, mix_experts, shard_experts
from attnlab.distributed.pack import PackPlan, Span
from attnlab.distributed.routing import Routing, route
from attnlab.distributed.streams import makespan, moe_backward_schedule
from attnlab.distributed.volumes import dispatch_bytes, expert_count_bytes, expert_gather_bytes

EXPERTS, CHOSEN, HIDDEN, WIDTH = 24, 2, 6, 24  # what all numbers of ranks divide
TOLERANCE = 1e-12  # sums of float64 in another order
ROW_BYTES = HIDDEN * 8


def tensors_for(num_tokens):
    """Tokens, router, the experts' weights, and the output's gradient."""
    generator = torch.Generator().manual_seed(num_tokens)
    shapes = (
        (num_tokens, HIDDEN),
        (EXPERTS, HIDDEN),
        (EXPERTS, 2 * WIDTH, HIDDEN),
        (EXPERTS, HIDDEN, WIDTH),
        (num_tokens, HIDDEN),
    )
    return [torch.randn(*s, generator=generator, dtype=torch.float64) for s in shapes]


def loop(x, router, gate_up, down, capacity):
    """The definition, slot by slot in the order of the tokens; the balancing loss beside it."""
    logits = x @ router.T
    best, experts = logits.topk(CHOSEN, dim=-1)
    weights, room = best.softmax(-1), [capacity] * EXPERTS
    rows, counts = [], torch.zeros(EXPERTS, dtype=torch.float64)
    for n in range(x.shape[0]):
        row = torch.zeros(HIDDEN, dtype=torch.float64)
        for slot in range(CHOSEN):
            e = int(experts[n, slot])
            counts[e] += 1
            if room[e] > 0:
                room[e] -= 1
                gate, up = (gate_up[e] @ x[n]).chunk(2)
                row = row + weights[n, slot] * (down[e] @ (torch.nn.functional.silu(gate) * up))
        rows.append(row)
    share = counts / x.shape[0] * logits.softmax(-1).mean(0)
    return torch.stack(rows), EXPERTS * share.sum()


def oracle(tensors, factor):
    x, router, gate_up, down, grad = tensors
    leaves = [y.clone().requires_grad_() for y in (x, router, gate_up, down)]
    capacity = x.shape[0] * CHOSEN
    if factor is not None:
        capacity = -int(-(capacity * factor) // EXPERTS)
    output, balance = loop(*leaves, capacity)
    return output.detach(), *torch.autograd.grad((output * grad).sum() + balance, leaves)


def factorisations(size):
    """All (ep, etp) whose product divides the ranks."""
    ways = [n for n in (1, 2, 3, 4, 8) if size % n == 0]
    pairs = [(ep, etp) for ep in ways for etp in ways if size % (ep * etp) == 0]
    return [{"dp": size, "ep": ep, "etp": etp} for ep, etp in pairs]


def lengths_for(size, num_tokens):
    """Uneven shares of the tokens; a rank in the middle has none."""
    shares = [n + 1 for n in range(size)]
    if size > 2:
        shares[1] = 0
    lengths = [num_tokens * share // sum(shares) for share in shares]
    lengths[-1] += num_tokens - sum(lengths)
    return lengths


def errors(answers, number, job):
    """Largest error of each rank's output, and of all gradients, against one process."""
    tensors, _, layout, _, factor = job
    output, dx, drouter, dgate_up, ddown = oracle(tensors, factor)
    parts = [results[number] for results in answers]
    found = [
        torch.cat([p[0] for p in parts]) - output,
        torch.cat([p[1] for p in parts]) - dx,
        sum(p[2] for p in parts) - drouter,
    ]
    for place in {p[5] for p in parts}:
        ep, etp = (
            SimpleNamespace(rank=r, size=layout[axis])
            for r, axis in zip(place, ("ep", "etp"), strict=True)
        )
        wanted = shard_experts(dgate_up, ddown, ep, etp)
        for index, whole in enumerate(wanted):  # ranks of edp hold the same experts
            total = sum(p[3 + index] for p in parts if p[5] == place)
            found.append(total - whole)
    return largest(found)


def jobs_for(size, num_groups, factors=(None, 0.75)):
    tokens = 24
    return [
        (tensors_for(tokens), lengths_for(size, tokens), layout, groups, factor)
        for layout in factorisations(size)
        for groups in num_groups
        for factor in factors
    ]


def check(world, jobs):
    answers = world.call(run_moe, jobs)
    for number, job in enumerate(jobs):
        assert errors(answers, number, job) < TOLERANCE, job[1:]
    return answers


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_outputs_and_gradients_are_those_of_one_process(worlds, size):
    check(worlds(size), jobs_for(size, [2]))


@pytest.mark.distributed_full
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
def test_all_factorisations_and_numbers_of_groups_are_those_of_one_process(worlds, size):
    check(worlds(size), jobs_for(size, [1, 2, 3, 4]))


def room_left(x, router, factor):
    """Which slots have room, counted one by one in the order of the tokens."""
    experts = (x @ router.T).topk(CHOSEN, dim=-1).indices
    capacity, counts = -int(-(x.shape[0] * CHOSEN * factor) // EXPERTS), [0] * EXPERTS
    kept = torch.zeros_like(experts, dtype=torch.bool)
    for n, slot in itertools.product(range(x.shape[0]), range(CHOSEN)):
        expert = int(experts[n, slot])
        kept[n, slot] = counts[expert] < capacity
        counts[expert] += 1
    return kept


def test_drops_follow_the_order_of_the_tokens_whatever_ranks_they_lie_on(worlds):
    found = [
        plan for name in ("over many ranks", "long and tiny") for plan in plans(name, 4).values()
    ]
    found.append(PackPlan((0, 9, 33), (0, 4, 4, 11, 20, 26, 33), (2, 0, 3, 2, 0, 2), 4))
    jobs = [(*tensors_for(plan.num_tokens)[:2], plan, 0.6) for plan in found]
    answers = worlds(4).call(run_kept, jobs)
    for number, (x, router, plan, factor) in enumerate(jobs):
        wanted = room_left(x, router, factor)
        assert torch.equal(plan.join([kept[number] for kept in answers]), wanted), plan
        assert 0 < wanted.sum() < wanted.numel()


def rows_by_group(experts, lengths, num_groups):
    """Rows `[G, 4, 2]` of each rank of ep 2 x etp 2 for the two halves of the experts, by brute force."""
    rows = torch.zeros(num_groups, 4, 2, dtype=torch.int64)
    for rank, own in enumerate(experts.split(lengths)):
        for group, part in enumerate(own.tensor_split(num_groups)):
            for expert in part.flatten().tolist():
                rows[group, rank, expert // (EXPERTS // 2)] += 1
    return rows


@pytest.mark.parametrize("lengths", [[8] * 4, lengths_for(4, 32)], ids=str)
@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_rows_and_counts_move_as_the_formulas_say(worlds, num_groups, lengths):
    layout, tokens = {"dp": 4, "ep": 2, "etp": 2}, 32
    job = tensors_for(tokens), lengths, layout, num_groups, None
    answers = check(worlds(4), [job])
    experts = (job[0][0] @ job[0][1].T).topk(CHOSEN, dim=-1).indices
    rows = rows_by_group(experts, lengths, num_groups)
    over_ep, over_etp = expert_count_bytes(EXPERTS, num_groups, 2, 2)
    for rank, (results,) in enumerate(answers):
        ep, etp = divmod(rank, 2)
        events = [e for e in results[6] if e != "backward"]
        found = {
            op: [e.received_bytes for e in events if (e.op, e.group) == op]
            for op in (("all_to_all", "ep"), ("all_gather", "etp"), ("reduce_scatter", "etp"))
        }
        # From the other rank of ep forward D and backward Y, from this one's other half D's and Y's.
        away = int(rows[:, 2 * (1 - ep) + etp, ep].sum() + rows[:, rank, 1 - ep].sum())
        assert sum(found["all_to_all", "ep"]) == 2 * away * ROW_BYTES + over_ep
        assert len(found["all_to_all", "ep"]) == 4 * num_groups + 1
        # Rows of this half of the experts at each rank of etp; the one that has most counts.
        most = (rows[:, 0:2, ep] + rows[:, 2:4, ep]).amax(1).tolist()
        shared = [expert_gather_bytes(n, HIDDEN, 8, 2) for n in most]
        first, *gathered = found["all_gather", "etp"]
        assert first == over_etp
        assert sorted(gathered) == sorted(found["reduce_scatter", "etp"]) == sorted(2 * shared)
        router = [e.received_bytes for e in events if (e.op, e.group) == ("all_gather", "world")]
        assert router == [3 * EXPERTS * 8]


@pytest.mark.parametrize("size", [2, 4])
def test_all_ranks_make_the_same_collectives(worlds, size):
    jobs = jobs_for(size, [3])
    answers = worlds(size).call(run_moe, jobs)
    for number in range(len(jobs)):
        orders = [[_named(e) for e in results[number][6]] for results in answers]
        assert all(order == orders[0] for order in orders)


def _named(event):
    return event if isinstance(event, str) else (event.op, event.group)


def test_the_backward_issues_the_collectives_of_its_schedule(worlds):
    layout = {"dp": 4, "ep": 2, "etp": 2}
    job = tensors_for(32), [8] * 4, layout, 3, None
    gradient = {"D": ("all_to_all", "ep"), "A": ("reduce_scatter", "etp")}
    gradient |= {"Y": ("all_to_all", "ep"), "R": ("all_gather", "etp")}
    wanted = [gradient[stage] for stage, _ in moe_backward_schedule(3) if stage != "X"]
    for (results,) in worlds(4).call(run_moe, [job]):
        named = [_named(e) for e in results[6]]
        found = named[named.index("backward") + 1 :]
        assert [x for x in found if x[1] in ("ep", "etp")] == wanted


def clock_job(world, num_groups, row_time):
    """End of the virtual time, and what the simulation of equal groups says.

    96 tokens a rank, experts chosen in turn, rows of 16 bytes at 1 byte a second.
    """
    layout, tokens = {"dp": 4, "ep": 2, "etp": 2}, 96
    answers = world.call(run_clock, layout, tokens, num_groups, (row_time, 0.0, 1.0))
    sent = dispatch_bytes(tokens, CHOSEN, 4, 4, 2)
    shared = expert_gather_bytes(tokens * CHOSEN, 4, 4, 2)
    total = {"D": sent, "A": shared, "R": shared, "Y": sent}
    return answers, total | {"X": 2 * tokens * CHOSEN * row_time}


@pytest.mark.parametrize("num_groups", [1, 2, 3, 4, 6])
@pytest.mark.parametrize("row_time", [80.0, 4.0], ids=["long products", "short products"])
def test_virtual_time_is_that_of_the_simulation(worlds, num_groups, row_time):
    answers, total = clock_job(worlds(4), num_groups, row_time)
    for end, intervals in answers:
        assert end == pytest.approx(makespan(total, num_groups), rel=1e-12)
        assert len(intervals) == 5 * num_groups


def test_two_groups_hide_half_of_the_communication_of_long_products(worlds):
    left = {}
    for groups in (1, 2, 4):
        answers, total = clock_job(worlds(4), groups, 80.0)
        sent = sum(time for stage, time in total.items() if stage != "X")
        left[groups] = (answers[0][0] - total["X"]) / sent
    assert left == pytest.approx({1: 1.0, 2: 0.5, 4: 0.25})


def test_groups_over_etp_run_beside_those_over_ep(worlds):
    answers, _ = clock_job(worlds(4), 4, 4.0)
    _, intervals = answers[0]
    over_ep, over_etp = (
        [i for step, i in intervals.items() if step.stage in stages] for stages in ("DY", "AR")
    )
    assert any(a.start < b.end and b.start < a.end for a in over_ep for b in over_etp)


STOPPED = {"splits swapped": r"ValueError: expected splits of the \d+ rows, got"}
"""What ends the ranks before there is a wrong number."""


@pytest.mark.parametrize("mutation", MOE_MUTATIONS)
def test_a_planted_defect_is_seen(worlds, mutation):
    layout = {"dp": 4, "ep": 2, "etp": 2}
    job = tensors_for(24), lengths_for(4, 24), layout, 2, 0.75
    if mutation in STOPPED:
        with pytest.raises(RankFailed, match=STOPPED[mutation]):
            worlds(4).call(run_moe, [job], mutation=mutation)
        return
    answers = worlds(4).call(run_moe, [job], mutation=mutation)
    assert errors(answers, 0, job) > 1e3 * TOLERANCE


def test_one_process_without_torch_distributed_can_run_it():
    x, router, gate_up, down, _ = tensors_for(5)
    alone = Group(None)
    chosen, load = route(x, router, CHOSEN, alone)
    shard = shard_experts(gate_up, down, alone, alone)
    output = mix_experts(x, chosen, shard, alone, alone, num_groups=3)
    wanted, _ = loop(x, router, gate_up, down, 100)
    torch.testing.assert_close(output, wanted, rtol=0, atol=TOLERANCE)
    assert load.fraction.sum() == pytest.approx(CHOSEN)
    assert load.probability.sum() == pytest.approx(1)


def test_what_does_not_divide_is_refused_with_words():
    _, _, gate_up, down, _ = tensors_for(4)
    five, one = SimpleNamespace(rank=0, size=5), SimpleNamespace(rank=0, size=1)
    with pytest.raises(ValueError, match="experts that ep 5 divides, got 24"):
        shard_experts(gate_up, down, five, one)
    with pytest.raises(ValueError, match="a width that etp 5 divides, got 24"):
        shard_experts(gate_up, down, one, five)
    empty = Routing(*(torch.zeros(0, 2) for _ in range(3)))
    for runs, words in (([], "runs of 1 ranks, got 0"), ([[Span(0, 3)]], "this rank's 4 tokens")):
        with pytest.raises(ValueError, match=words):
            route(torch.zeros(4, 6), torch.zeros(8, 6), 2, Group(None), runs=runs)
    with pytest.raises(ValueError, match="at least one group"):
        mix_experts(
            torch.zeros(0, 6),
            empty,
            ExpertShard(gate_up, down),
            Group(None),
            Group(None),
            num_groups=0,
        )
