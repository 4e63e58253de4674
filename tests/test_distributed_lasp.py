"""Lightning attention over ranks against one process, and its messages against their formulas.

Decays are slow and chunks short: with fast decays and long chunks nothing crosses two ranks, and a
wrong combination passes.
"""

import itertools
from dataclasses import replace

import pytest
import torch
from distributed_cases import (
    PACKS,
    largest,
    plans,
    run_lasp,
    run_lasp_on_host,
    run_traced_lasp,
    simulated_weights,
    worst,
)
from distributed_mutations import LASP_MUTATIONS

from attnlab import registry, testing
from attnlab.distributed.comm import Group
from attnlab.distributed.lasp import lasp_attention
from attnlab.distributed.pack import UNREACHED, PackPlan
from attnlab.distributed.volumes import gather_bytes, state_bytes
from attnlab.functional import lightning_attention_varlen
from attnlab.problem import Problem
from kernels_cuda import module
from tests.cuda_on_host import HostLoader

HEADS, KEY_DIM, VALUE_DIM = 3, 4, 5
LOG_DECAY = torch.tensor([0.999, 0.9, 0.4], dtype=torch.float64).log()
TOLERANCE = 1e-12  # sums of float64 in another order
STATE_BYTES = state_bytes(HEADS, KEY_DIM, VALUE_DIM, itemsize=8)

few = pytest.mark.parametrize("size", [1, 2, 4])


def tensors_for(plan, dtype=torch.float64):
    """Query, key, value and the output's gradient, `[1, H, T, D]`."""
    generator = torch.Generator().manual_seed(plan.num_tokens)
    dims = KEY_DIM, KEY_DIM, VALUE_DIM, VALUE_DIM
    shape = 1, HEADS, plan.num_tokens
    return [
        torch.randn(*shape, d, generator=generator, dtype=torch.float64).to(dtype) for d in dims
    ]


def varlen_problem(plan, dtype):
    """A call of one process with a head without decay, of head dims that all backends have."""
    return Problem(
        op="lightning_attention_varlen",
        batch=1,
        heads=2,
        kv_heads=2,
        q_len=plan.num_tokens,
        kv_len=plan.num_tokens,
        key_dim=64,
        value_dim=64,
        dtype=dtype,
        device="cpu",
        requires_grad=True,
        num_documents=len(plan.cu_seqlens) - 1,
    )


def job(plan, **flags):
    return tensors_for(plan), LOG_DECAY, plan, flags


def oracle(plan, tensors):
    """Output and gradients of one process."""
    leaves = [x.clone().requires_grad_() for x in tensors[:3]]
    bounds = torch.tensor(plan.cu_seqlens)
    output = lightning_attention_varlen(*leaves, LOG_DECAY, bounds, backend="reference").output
    return output.detach(), *torch.autograd.grad(output, leaves, tensors[3])


def check(world, names, **flags):
    """Every sharding of the packs, in one call of the world."""
    found = [plan for name in names for plan in plans(name, world.size).values()]
    answers = world.call(run_lasp, [job(plan, **flags) for plan in found])
    for number, plan in enumerate(found):
        expected = oracle(plan, tensors_for(plan))
        for rank, results in enumerate(answers):
            assert worst(plan, rank, results[number][:4], expected) < TOLERANCE, (plan, rank)
    return found, answers


@few
@pytest.mark.parametrize("method", ["gather", "serial", "pruned"])
def test_outputs_and_gradients_are_those_of_one_process(worlds, size, method):
    check(
        worlds(size),
        ["one document", "over many ranks"],
        method=method,
        backend="torch",
        epsilon=0.0,
    )


@pytest.mark.distributed_full
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("overlap", [True, False], ids=["overlap", "initial state"])
@pytest.mark.parametrize("method", ["gather", "serial", "pruned"])
def test_all_packs_are_those_of_one_process(worlds, size, method, overlap):
    flags = {"method": method, "overlap": overlap, "epsilon": 0.0, "backend": "reference"}
    check(worlds(size), PACKS, **flags)


def test_an_op_that_starts_from_the_state_gives_the_same(worlds):
    check(worlds(4), ["over many ranks", "long and tiny"], overlap=False, backend="torch")


def test_ranks_without_tokens_take_part(worlds):
    plan = PackPlan.contiguous_with((0, 20), [0, 7, 0, 13])
    answers = worlds(4).call(run_lasp, [job(plan, backend="torch")])
    for rank, (results,) in enumerate(answers):
        assert worst(plan, rank, results[:4], oracle(plan, tensors_for(plan))) < TOLERANCE


def test_chunks_may_lie_on_any_ranks(worlds):
    plan = PackPlan((0, 9, 33), (0, 4, 4, 11, 20, 26, 33), (2, 0, 3, 2, 0, 2), 4)
    for method in ("gather", "serial", "pruned"):
        answers = worlds(4).call(run_lasp, [job(plan, method=method, epsilon=0.0)])
        for rank, (results,) in enumerate(answers):
            assert worst(plan, rank, results[:4], oracle(plan, tensors_for(plan))) < TOLERANCE


@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_gather_moves_what_its_formula_says(worlds, size):
    found, answers = check(worlds(size), ["one document", "over many ranks"], backend="torch")
    for number, plan in enumerate(found):
        expected = gather_bytes(size, plan.max_chunks, STATE_BYTES)
        for results in answers:
            events = results[number][4]
            assert [e.op for e in events] == ["all_gather"] * 2
            assert [e.received_bytes for e in events] == [expected] * 2
            assert events == answers[0][number][4]  # the same on every rank


def test_a_chain_sends_a_state_across_every_edge_each_way(worlds):
    plan = PackPlan.contiguous((0, 40), 4)
    answers = worlds(4).call(run_lasp, [job(plan, method="serial")])
    sent = [sum(e.sent_bytes for e in results[4]) for (results,) in answers]
    assert sum(sent) == 2 * 3 * STATE_BYTES
    assert sum(e.messages for (results,) in answers for e in results[4]) == 2 * 3


def test_pruning_sends_the_neighbour_and_slow_heads(worlds):
    plan, epsilon = PackPlan.contiguous((0, 64), 4), 1e-5
    answers = worlds(4).call(run_lasp, [job(plan, method="pruned", epsilon=epsilon)])
    weights = plan.combination(LOG_DECAY.tolist(), range(4))
    kept = int((weights > epsilon).sum())  # of a chunk a rank, all pairs but none with itself
    assert 0 < kept < 6 * HEADS
    one_state = STATE_BYTES // HEADS
    sent = sum(e.sent_bytes for (results,) in answers for e in results[4])
    assert sent == 2 * kept * one_state


def test_pruning_is_off_by_no_more_than_its_bound(worlds):
    plan, epsilon = PackPlan.contiguous((0, 64), 4), 0.05
    tensors = tensors_for(plan)
    answers = worlds(4).call(run_lasp, [job(plan, method="pruned", epsilon=epsilon)])
    output = plan.join([results[0] for (results,) in answers], 2)
    error = (output - oracle(plan, tensors)[0]).norm(dim=-1)  # [1, H, T]
    query, key, value, _ = tensors
    # |E_j| is at most the sum of |k| |v|, and a token multiplies what is missing by |q| at most.
    states = (key.norm(dim=-1) * value.norm(dim=-1)).sum(-1, keepdim=True)
    assert (error <= epsilon * states * query.norm(dim=-1)).all()
    assert error.max() > 1e-9  # something was left out


@pytest.mark.parametrize("size", [1, 4])
def test_documents_that_end_at_rank_edges_send_nothing(worlds, size):
    plan = PackPlan.contiguous((0, 12, 24, 30, 36, 48), size)
    answers = worlds(size).call(run_lasp, [job(plan, backend="torch")])
    for rank, (results,) in enumerate(answers):
        assert results[4] == []
        assert worst(plan, rank, results[:4], oracle(plan, tensors_for(plan))) < TOLERANCE


def test_the_exchange_runs_beside_the_op_in_both_passes(worlds):
    plan = PackPlan.contiguous((0, 40), 4)
    forward, backward = ["start", "op", "wait"], ["start", "op's backward", "wait"]
    for notes in worlds(4).call(run_traced_lasp, tensors_for(plan), LOG_DECAY, plan):
        assert notes == forward + backward


def test_the_same_ranks_give_the_same_bits(worlds):
    plan = PackPlan.contiguous((0, 5, 64), 4)
    jobs = [(tensors_for(plan, torch.float32), LOG_DECAY.float(), plan, {"backend": "torch"})] * 2
    for first, second in worlds(4).call(run_lasp, jobs):
        assert all(torch.equal(a, b) for a, b in zip(first[:4], second[:4], strict=True))


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precisions_stay_near(worlds, dtype, tolerance):
    plan = PackPlan.contiguous((0, 5, 64), 4)
    tensors = tensors_for(plan, dtype)
    jobs = [(tensors, LOG_DECAY.float(), plan, {"backend": "torch", "precision": "high"})]
    expected = oracle(plan, [x.double() for x in tensors])
    for rank, (results,) in enumerate(worlds(4).call(run_lasp, jobs)):
        for part, whole in zip(results[:4], expected, strict=True):
            error = (part.double() - plan.shard(whole, rank, 2)).abs().max()
            assert error < tolerance * whole.abs().max()  # two or three roundings


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("backend", registry.list_backends("lightning_attention_varlen"))
def test_every_backend_is_as_accurate_over_ranks_as_in_one_process(
    worlds, monkeypatch, backend, dtype
):
    """CUDA's kernels are built for the CPU; Triton's run where this process interprets them.

    Over ranks the op either starts from what enters, or that is added to its 16-bit output: a second
    rounding, for which twice the baseline's error is room.
    """
    monkeypatch.setattr(module, "loader", HostLoader())
    # Two chunks a rank, of a document longer than the baseline's chunks and a short one before it.
    plan, scale = PackPlan.zigzag((0, 5, 80), 2), 0.125
    problem, ops = varlen_problem(plan, dtype), ("lightning_attention_varlen", "lightning_state")
    for op in ops:
        reason = registry.why_not(op, backend, replace(problem, op=op))
        if reason is not None:
            pytest.skip(f"{backend}: {reason}")
    inputs = testing.make_inputs(problem, with_state=False)
    inputs = replace(inputs, grad_state=torch.zeros_like(inputs.grad_state))
    call = {"cu_seqlens": torch.tensor(plan.cu_seqlens), "scale": scale}
    oracle = testing.lightning_oracle(inputs, **call)
    baseline = testing.lightning_baseline(inputs, **call)
    tensors = [inputs.query, inputs.key, inputs.value, inputs.grad_output]
    log_decay = inputs.log_decay.to(torch.promote_types(dtype, torch.float32))
    flags = [{"backend": backend, "scale": scale, "overlap": x} for x in (True, False)]
    jobs = [(tensors, log_decay, plan, each) for each in flags]
    answers = worlds(2).call(run_lasp_on_host, jobs)
    for _, reached in answers:
        assert reached == {(op, backend) for op in ops}
    names = "output", "grad_query", "grad_key", "grad_value"
    for number, (place, name) in itertools.product(range(2), enumerate(names)):
        whole = plan.join([results[number][place] for results, _ in answers], 2)
        if dtype == torch.float64:  # the baseline is a float32 one
            assert largest([whole - oracle[name]]) < TOLERANCE
        else:
            testing.assert_as_accurate(whole, oracle[name], baseline[name], name)


@pytest.mark.parametrize("mutation", LASP_MUTATIONS)
def test_a_planted_defect_is_seen(worlds, mutation):
    # Both edges are needed: a document over all ranks, and one that ends where a rank does.
    plans_ = [PackPlan.contiguous((0, 64), 4), PackPlan.contiguous((0, 5, 16, 64), 4)]
    jobs = [job(plan, backend="torch") for plan in plans_]
    answers = worlds(4).call(run_lasp, jobs, mutation=mutation)
    errors = [
        worst(plan, rank, answers[rank][number][:4], oracle(plan, tensors_for(plan)))
        for number, plan in enumerate(plans_)
        for rank in range(4)
    ]
    assert max(errors) > 1e3 * TOLERANCE


def test_a_backend_without_the_state_op_can_be_named(monkeypatch):
    varlen = registry._impls["lightning_attention_varlen"]
    only = replace(varlen["reference"], backend="only-attention")
    both = registry._impls | {"lightning_attention_varlen": varlen | {only.backend: only}}
    monkeypatch.setattr(registry, "_impls", both)
    plan = PackPlan.zigzag((0, 5, 40), 1)
    query, key, value, _ = tensors = tensors_for(plan)
    flags = {"plan": plan, "group": Group(None), "backend": only.backend}
    output = lasp_attention(query, key, value, LOG_DECAY, **flags)
    torch.testing.assert_close(output, oracle(plan, tensors)[0], rtol=0, atol=TOLERANCE)


def test_wrong_arguments_are_refused_with_words():
    plan = PackPlan.contiguous((0, 8), 1)
    query, key, value, _ = tensors_for(plan)
    with pytest.raises(ValueError, match="expected a method among"):
        lasp_attention(query, key, value, LOG_DECAY, plan, Group(None), method="ring")
    with pytest.raises(ValueError, match="this rank's 8 tokens"):
        lasp_attention(query[:, :, 1:], key, value, LOG_DECAY, plan, Group(None))
    with pytest.raises(ValueError, match="a group of 2 ranks, got 1"):
        lasp_attention(query, key, value, LOG_DECAY, PackPlan.contiguous((0, 8), 2), Group(None))
    with pytest.raises(ValueError, match="without gradient"):
        decay = LOG_DECAY.clone().requires_grad_()
        lasp_attention(query, key, value, decay, plan, Group(None))


@pytest.mark.parametrize("name, size", [*itertools.product(PACKS, [1, 3, 8])])
def test_the_matrix_is_that_of_a_simulated_recurrence(name, size):
    decay = torch.tensor(-0.05, dtype=torch.float64)
    for plan in plans(name, size).values():
        found = plan.combination([decay.item()], range(plan.num_chunks))[..., 0]
        torch.testing.assert_close(found, simulated_weights(plan, decay), rtol=1e-12, atol=0)
        transposed = plan.absorption([decay.item()], range(plan.num_chunks))[..., 0]
        assert torch.equal(transposed, found.mT)
        assert ((plan.distances == UNREACHED) == (found == 0)).all()
