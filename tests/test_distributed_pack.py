"""Plans of packs, meshes of ranks, and the convolution's halo."""

import itertools

import pytest
import torch
from distributed_cases import (
    OPS,
    PACKS,
    plans,
    run_agreement,
    run_convolution,
    run_mesh,
    run_op,
    simulated_weights,
)

from attnlab.distributed.mesh import Layout
from attnlab.distributed.pack import PackPlan, pad_to_block
from attnlab.distributed.volumes import halo_bytes

CASES = [*itertools.product(PACKS, [1, 2, 3, 8])]


def documents(plan):
    """Number of each token's document."""
    starts = torch.tensor(plan.cu_seqlens)
    return torch.searchsorted(starts, torch.arange(plan.num_tokens), right=True)


@pytest.mark.parametrize("name, size", CASES)
def test_every_token_lies_on_one_rank_and_comes_back(name, size):
    for plan in plans(name, size).values():
        x = torch.arange(plan.num_tokens)
        parts = [plan.shard(x, rank) for rank in range(size)]
        assert [len(part) for part in parts] == [plan.local_len(rank) for rank in range(size)]
        assert torch.equal(plan.join(parts), x)


@pytest.mark.parametrize("name, size", CASES)
def test_local_bounds_and_positions_are_those_of_the_documents(name, size):
    for plan in plans(name, size).values():
        numbers = documents(plan)
        starts = torch.tensor(plan.cu_seqlens)[numbers - 1]
        for rank in range(size):
            places = plan.positions(rank)
            wanted = places - starts[places]
            assert torch.equal(plan.document_positions(rank), wanted)
            bounds = plan.local_cu_seqlens(rank).tolist()
            assert bounds[0] == 0 and bounds[-1] == len(places)
            for start, stop in itertools.pairwise(bounds):
                inside = places[start:stop]
                assert len(numbers[inside].unique()) <= 1
                assert (inside.diff() == 1).all()


@pytest.mark.parametrize("name, size", CASES)
def test_rectangles_are_the_causal_mask_of_the_documents(name, size):
    for plan in plans(name, size).values():
        numbers, token = documents(plan), torch.arange(plan.num_tokens)
        mask = (token[:, None] >= token) & (numbers[:, None] == numbers)
        active = set()
        for one, other in itertools.product(range(size), range(size)):
            wanted = mask[plan.positions(one)][:, plan.positions(other)]
            found = torch.zeros_like(wanted, dtype=torch.int64)
            for rows, keys, causal in plan.rectangles(one, other):
                part = torch.ones(rows.length, keys.length, dtype=torch.int64)
                found[slice(*rows), slice(*keys)] += part.tril() if causal else part
            assert torch.equal(found, wanted.long())
            active |= {(one - other) % size} if wanted.any() else set()
        assert plan.hops == max(active, default=0)
        assert sum(plan.num_pairs(rank) for rank in range(size)) == mask.sum()


def random_plan(seed):
    """Any documents, also empty ones, any chunks, also empty ones, on any ranks."""
    generator = torch.Generator().manual_seed(seed)

    def draw(high, count):
        return sorted(torch.randint(high + 1, (count,), generator=generator).tolist())

    tokens, chunks, ranks = (
        int(torch.randint(1, n, (1,), generator=generator)) for n in (90, 65, 9)
    )
    cu = (0, *draw(tokens, int(torch.randint(12, (1,), generator=generator))), tokens)
    bounds = (0, *draw(tokens, chunks - 1), tokens)
    owners = torch.randint(ranks, (chunks,), generator=generator).tolist()
    return PackPlan(cu, bounds, tuple(owners), ranks)


@pytest.mark.parametrize("seed", range(60))
def test_any_plan_has_the_weights_and_the_mask_of_its_definition(seed):
    plan, decay = random_plan(seed), torch.tensor(-0.1, dtype=torch.float64)
    found = plan.combination([decay.item()], range(plan.num_chunks))[..., 0]
    torch.testing.assert_close(found, simulated_weights(plan, decay), rtol=1e-12, atol=0)
    numbers, token = documents(plan), torch.arange(plan.num_tokens)
    mask = (token[:, None] >= token) & (numbers[:, None] == numbers)
    for one, other in itertools.product(range(plan.world_size), repeat=2):
        seen = torch.zeros(plan.local_len(one), plan.local_len(other), dtype=torch.int64)
        for rows, keys, causal in plan.rectangles(one, other):
            part = torch.ones(rows.length, keys.length, dtype=torch.int64)
            seen[slice(*rows), slice(*keys)] += part.tril() if causal else part
        wanted = mask[plan.positions(one)][:, plan.positions(other)]
        assert torch.equal(seen, wanted.long())


def test_zigzag_shares_out_the_pairs_of_one_document_better():
    shares = {}
    for plan in (PackPlan.contiguous((0, 800), 8), PackPlan.zigzag((0, 800), 8)):
        pairs = [plan.num_pairs(rank) for rank in range(8)]
        shares[plan.num_chunks] = max(pairs) * 8 / sum(pairs)
    assert shares[8] > 1.8 and shares[16] == pytest.approx(1.0, abs=1e-9)


def test_padding_to_blocks_keeps_documents_apart():
    padded, places = pad_to_block((0, 3, 8, 8, 12), 4)
    assert padded == (0, 4, 12, 12, 16)
    assert places.tolist() == [0, 1, 2, 4, 5, 6, 7, 8, 12, 13, 14, 15]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: PackPlan.contiguous((0, 3), 4), "at least 4 tokens, one for each of the ranks"),
        (lambda: PackPlan.zigzag((0, 7), 4), "at least 8 tokens, one for each of the chunks"),
        (lambda: PackPlan.contiguous((0, 5, 4), 2), "cu_seqlens sorted"),
        (lambda: PackPlan.contiguous((1, 5), 2), "cu_seqlens that start at 0"),
        (lambda: PackPlan.contiguous_with((0, 8), [4, 3]), "chunks that end at the 8 tokens"),
        (lambda: PackPlan((0, 8), (0, 4, 8), (0, 2), 2), r"owners in \[0, 2\)"),
        (lambda: Layout(world_size=8, dp=3, cp=2), "8 ranks as dp 3 x cp 2 x tp 1"),
        (lambda: Layout(world_size=8, cp=8, ep=3), "ep x etp that divides the 8 ranks"),
        (lambda: Layout(world_size=8, cp=4, pp=2), "pp of 1"),
    ],
)
def test_what_does_not_fit_is_refused_with_words(make, words):
    with pytest.raises(ValueError, match=words):
        make()


def test_a_model_has_to_divide_among_the_ranks():
    layout = Layout(world_size=8, cp=4, tp=2, ep=4, etp=2)
    fits = {"num_heads": 4, "num_kv_heads": 2, "num_experts": 8, "width": 64}
    layout.check_model(**fits)
    for name, words in (
        ("num_kv_heads", "key heads that tp 2"),
        ("num_experts", "experts that ep 4"),
    ):
        with pytest.raises(ValueError, match=words):
            layout.check_model(**fits | {name: 1})


def test_ranks_with_other_documents_all_raise_the_same_error(worlds):
    same, other = PackPlan.contiguous((0, 5, 9), 2), PackPlan.contiguous((0, 6, 9), 2)
    assert worlds(2).call(run_agreement, [same, same]) == [None, None]
    first, second = worlds(2).call(run_agreement, [same, other])
    assert first == second and "the same cu_seqlens on all ranks" in first


SAME = PackPlan.contiguous((0, 5, 9), 2)
OTHERS = {
    "other documents": PackPlan.contiguous((0, 6, 9), 2),
    "nothing to send": PackPlan.contiguous((0, 4, 9), 2),
    "other chunks": PackPlan.contiguous_with((0, 5, 9), [3, 6]),
    "zigzag": PackPlan.zigzag((0, 5, 9), 2),
    "another length": PackPlan.contiguous((0, 5, 12), 2),
}


@pytest.mark.parametrize("other", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("op", OPS)
def test_an_op_refuses_a_plan_that_one_rank_has_alone_on_all_ranks(worlds, op, other):
    answers = worlds(2).call(run_op, op, [[SAME, SAME, other], [other, SAME, other]])
    words = "expected the same cu_seqlens and chunks on all ranks of cp, got others on ranks [1]"
    for (first, *rest), checks in answers:
        assert first == words and checks == 3
        assert all(isinstance(found, float) for found in rest)


@pytest.mark.parametrize("op", OPS)
def test_ranks_check_a_plan_once(worlds, op):
    again = PackPlan.contiguous(SAME.cu_seqlens, 2)
    for found, checks in worlds(2).call(run_op, op, [[SAME, SAME, again, SAME]] * 2):
        assert checks == 1 and len(set(found)) == 1
    for _, checks in worlds(1).call(run_op, op, [[PackPlan.contiguous((0, 5), 1)]]):
        assert checks == 0


def test_both_views_number_the_same_ranks_inner_axis_first(worlds):
    found = worlds(4).call(run_mesh, {"dp": 2, "cp": 2, "ep": 2, "etp": 2})
    assert [x["cp"] for x in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [x["dp"] for x in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert [x["etp"] for x in found] == [(0, 2), (1, 2), (0, 2), (1, 2)]
    assert [x["ep"] for x in found] == [(0, 2), (0, 2), (1, 2), (1, 2)]
    assert {x["edp"] for x in found} == {(0, 1)}


def convolved(x, weight, cu):
    """The definition, token by token."""
    rows = []
    for start, stop in itertools.pairwise(cu):
        for t in range(start, stop):
            taps = range(min(weight.shape[1], t - start + 1))
            rows.append(sum(weight[:, -1 - n] * x[t - n] for n in taps))
    return torch.stack(rows)


def check_halo_bytes(plan, gap, events_by_rank):
    """One exchange each way, of the tokens that some chunk's taps reach on another rank."""
    home = {t: r for r in range(plan.world_size) for t in plan.positions(r).tolist()}
    rows = torch.zeros(plan.world_size, plan.world_size, dtype=torch.int64)  # [to, from]
    for chunk, rank in enumerate(plan.owners):
        lo, hi = plan.span(chunk)
        taps = {t - n for t in range(lo, hi) for n in range(gap + 1)}
        for t in taps & set(range(plan.document_start(lo) if lo < hi else lo, lo)):
            rows[rank, home[t]] += 1
    rows.fill_diagonal_(0)
    exchanges = plan.world_size > 1 and any(map(plan.continues, range(plan.num_chunks)))
    for rank, events in enumerate(events_by_rank):
        moved = [halo_bytes(int(x.sum()), 3, 8) for x in (rows[rank], rows[:, rank])]
        assert [e.op for e in events] == ["all_to_all"] * (2 * exchanges)
        assert [e.received_bytes for e in events] == moved * exchanges


@pytest.mark.parametrize("size", [1, 2, 4])
def test_the_convolution_reaches_across_ranks(worlds, size):
    generator = torch.Generator().manual_seed(0)
    # One-token chunks: a halo of three tokens lies on as many ranks.
    found = [p for name in ("over many ranks", "single tokens") for p in plans(name, size).values()]
    found.append(PackPlan.contiguous_with((0, 2, 9), [9 - (size - 1), *[1] * (size - 1)]))
    # Chunks whose halos come from ranks in another order than theirs.
    owners = tuple((n * 3 + n // 4) % size for n in range(8))
    found.append(PackPlan((0, 9, 33), (0, 4, 4, 11, 20, 22, 23, 26, 33), owners, size))
    jobs = []
    for plan in found:
        x, grad = (
            torch.randn(plan.num_tokens, 3, generator=generator, dtype=torch.float64) for _ in "xg"
        )
        jobs.append((x, torch.randn(3, 4, generator=generator, dtype=torch.float64), grad, plan))
    answers = worlds(size).call(run_convolution, jobs)
    for number, (x, weight, grad, plan) in enumerate(jobs):
        leaves = x.clone().requires_grad_(), weight.clone().requires_grad_()
        output = convolved(*leaves, plan.cu_seqlens)
        wanted = torch.autograd.grad(output, leaves, grad)
        parts = [results[number] for results in answers]
        check_halo_bytes(plan, weight.shape[1] - 1, [p[3] for p in parts])
        close = {"rtol": 0, "atol": 1e-12}  # sums of float64 in another order
        torch.testing.assert_close(plan.join([p[0] for p in parts]), output.detach(), **close)
        torch.testing.assert_close(plan.join([p[1] for p in parts]), wanted[0], **close)
        torch.testing.assert_close(sum(p[2] for p in parts), wanted[1], **close)
