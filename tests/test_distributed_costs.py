"""The cost model against published figures, its own formulas, and bounds that hold for any."""

import itertools
import random
from dataclasses import replace

import pytest

from attnlab import cli
from attnlab.distributed.anchors import (
    GPUS,
    ZECO_GATHER,
    anchors,
    fit_line,
    ideal_gather_time,
)
from attnlab.distributed.balance import MIXES, draw_documents, mean_imbalance
from attnlab.distributed.costs import (
    H800,
    Job,
    exchange_time,
    forward,
    measured_gather_time,
    ring_time,
)
from attnlab.distributed.pack import PackPlan
from attnlab.distributed.planning import best_job, parse_range, parse_size, step_time
from attnlab.distributed.streams import Op, Step, exposed, makespan, moe_schedule, simulate
from attnlab.model.config import HybridConfig

LONG = {"D": 1.0, "A": 0.4, "X": 3.0, "R": 0.4, "Y": 1.0}
SHORT = LONG | {"X": 1.0}


@pytest.mark.parametrize("anchor", anchors(), ids=lambda a: a.name)
def test_a_published_figure_is_reproduced(anchor):
    assert anchor.agrees, f"published {anchor.published}, modelled {anchor.modelled}"


def test_a_line_is_fitted_with_its_quality():
    assert fit_line([0, 1, 2], [1, 3, 5]) == pytest.approx((1, 2, 1))
    assert fit_line([0, 1, 2], [1, 0, 1])[2] == pytest.approx(0)


def test_nccls_constants_give_the_ideal_gather_which_is_four_times_too_fast():
    # 0.07 to 2.20 ms: what a model without contention gives for 8 to 256 GPUs.
    assert ideal_gather_time(8) == pytest.approx(0.072, abs=0.002)
    assert ideal_gather_time(256) == pytest.approx(2.18, abs=0.03)
    assert all(ideal_gather_time(gpus) < 0.34 + 0.0322 * (gpus - 1) for gpus in GPUS)


def test_the_measured_gather_is_the_line_through_its_anchors():
    start, slope, _ = fit_line([n - 1 for n in GPUS], ZECO_GATHER)
    shard = 32 * 128 * 128 * 4  # bytes of a rank's states there
    assert 1e3 * measured_gather_time(0) == pytest.approx(start, rel=0.01)
    more = measured_gather_time(shard) - measured_gather_time(0)
    assert 1e3 * more == pytest.approx(slope, rel=0.01)


def test_an_operation_waits_for_its_stream_and_for_what_it_needs():
    a, b, c = (Step(stage, 0) for stage in "DAX")
    ops = [Op(a, "ep", 2.0), Op(b, "ep", 1.0), Op(c, "compute", 1.0, (a,))]
    assert simulate(ops) == {a: (0, 2), b: (2, 3), c: (2, 3)}
    assert simulate(ops, launch=1.5)[c] == (4.5, 5.5)


@pytest.mark.parametrize("groups, share", [(1, 1.0), (2, 0.5), (4, 0.25), (8, 0.125)])
@pytest.mark.parametrize("one_queue", [True, False], ids=["one queue", "ep and etp"])
def test_long_products_leave_one_part_in_so_many_groups_exposed(groups, share, one_queue):
    assert exposed(LONG, groups, one_queue=one_queue) == pytest.approx(share)
    # The backward has twice the products.
    twice = LONG | {"X": 2 * LONG["X"]}
    backward = exposed(twice, groups, one_queue=one_queue, backward=True)
    assert share <= backward + 1e-12 and (one_queue or backward == pytest.approx(share))


def test_short_products_need_queues_that_overlap_each_other():
    assert [exposed(SHORT, g, one_queue=True) for g in (2, 4)] == pytest.approx([1.8 / 2.8] * 2)
    assert [exposed(SHORT, g) for g in (2, 4, 8)] == pytest.approx([0.5, 1 / 2.8, 1 / 2.8])


def test_many_groups_cost_launches_and_smaller_products():
    times = {g: makespan(LONG, g, launch=0.02, loss=0.03) for g in range(1, 13)}
    assert 3 <= min(times, key=times.get) <= 6
    assert times[12] > times[6]


@pytest.mark.parametrize("groups", [1, 2, 3, 5])
@pytest.mark.parametrize("lookahead", [1, 2])
def test_a_schedule_issues_every_stage_once_after_what_it_needs(groups, lookahead):
    order = moe_schedule(groups, lookahead)
    assert sorted(order) == sorted(Step(s, g) for s in "DAXRY" for g in range(groups))
    for g in range(groups):
        places = [order.index(Step(stage, g)) for stage in "DAXRY"]
        assert places == sorted(places)


@pytest.mark.parametrize("groups", [1, 2, 3, 4, 8])
def test_no_schedule_beats_the_busiest_stream(groups):
    for total in (LONG, SHORT):
        busiest = max(total["X"], total["D"] + total["Y"], total["A"] + total["R"])
        assert busiest - 1e-12 <= makespan(total, groups) <= sum(total.values()) + 1e-12


def test_collectives_take_longer_between_nodes_and_nothing_alone():
    assert ring_time(H800, 1, 1e9) == exchange_time(H800, 1, 1e9) == 0
    assert ring_time(H800, 8, 1e9, stride=8) > ring_time(H800, 8, 1e9) > 1e9 / H800.nvlink_rate
    assert exchange_time(H800, 16, 1e9) > exchange_time(H800, 8, 1e9)


def job(**changes):
    fields = {"gpus": 64, "seq_len": 131_072, "tp": 8, "cp": 8, "ep": 32, "etp": 2, "groups": 2}
    return Job(config=HybridConfig.minimax_01(), hardware=H800, **fields | changes)


def test_a_layer_of_the_planning_table_is_that_of_the_formulas():
    parts = forward(job())
    # 16K tokens a rank over tp 8 at 400 TFLOPS: 2 n x 252e6 and 2 n x 113e6 weights, attention.
    assert parts.lightning == pytest.approx(2.6, abs=0.05)
    assert parts.softmax == pytest.approx(12.2, abs=0.1)
    assert parts.experts == pytest.approx(3.5, abs=0.05)
    assert parts.dispatch == pytest.approx(1.00, abs=0.02)
    assert parts.expert_gather == pytest.approx(0.34, abs=0.02)
    assert parts.moe_exposed == pytest.approx(1.34, abs=0.03)
    assert forward(job(groups=4)).moe_exposed == pytest.approx(0.67, abs=0.02)


def test_a_ring_is_seen_where_its_steps_outlast_their_attention():
    assert forward(job()).ring == 0
    slow = replace(H800, nic_rate=1e9)
    short = replace(job(seq_len=16_384), hardware=slow)
    # 2048 tokens of one key head, keys and values in 2 bytes; attention of a rank's share in 8 steps.
    hop = 14e-6 + 2048 * 2 * 128 * 2 / 1e9
    hidden = 4 * (16_384**2 / 2 / 8) * 8 * 128 / 400e12 / 8
    assert forward(short).ring == pytest.approx(7e3 * (hop - hidden))


def test_imbalance_slows_the_softmax_layers_alone():
    even, uneven = forward(job()), forward(job(imbalance=1.7))
    assert uneven.softmax > 1.5 * even.softmax and uneven.lightning == even.lightning


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"cp": 3}, "tp x cp that divides 64"),
        ({"ep": 3}, "ep x etp that divides 64"),
        ({"tp": 16, "cp": 4}, "tp that divides the 8 key heads"),
        ({"ep": 64, "etp": 1}, "ep that divides the 32 experts"),
    ],
)
def test_a_layout_that_does_not_factor_is_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        job(**changes)


def test_the_best_layout_keeps_the_limit_and_no_other_is_faster():
    found = best_job(64, 131_072, H800, packs=4, groups=2)
    assert found.tokens // found.tp <= 8192
    for by_hand in (job(), job(tp=1, cp=64, ep=32, etp=1), job(tp=2, cp=16, ep=8, etp=1)):
        times = [step_time(x, forward(x), 4) for x in (found, by_hand)]
        assert times[0] <= times[1] + 1e-9
    crowded = best_job(8, 2**20, H800)
    assert crowded.tokens // crowded.tp == 2**20 // 8


def test_a_step_takes_its_packs_in_turns():
    parts = forward(job())
    assert step_time(job(), parts, 3) == pytest.approx(3 * 3 * 80 * parts.layer / 1e3)
    assert step_time(job(gpus=128), parts, 3) == pytest.approx(2 * 3 * 80 * parts.layer / 1e3)


def test_zigzag_evens_out_long_documents_and_not_short_ones(capsys):
    one = [PackPlan.contiguous((0, 2**12), 8), PackPlan.zigzag((0, 2**12), 8)]
    # The last of 8 chunks sees 7.5 of the 32 blocks that there are.
    assert one[0].imbalance() == pytest.approx(7.5 * 8 / 32, rel=1e-3)
    assert one[1].imbalance() == pytest.approx(1)
    for mix, ranks in itertools.product(("35/35/30 %", "30/30/40 %"), (8, 32)):
        plain, zigzag = (mean_imbalance(MIXES[mix], ranks, x) for x in ("contiguous", "zigzag"))
        assert zigzag < 0.8 * plain and plain > 1.8
    assert mean_imbalance(MIXES["short alone"], 128, "zigzag") > 1.5
    assert cli.main(["plan", "--balance"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(MIXES) and lines[-1].startswith("30/30/40 %")


def test_documents_fill_a_pack_with_lengths_of_their_classes():
    bounds = draw_documents(MIXES["30/70/0 %"], 2**20, random.Random(1))
    lengths = [b - a for a, b in itertools.pairwise(bounds)]
    assert bounds[0] == 0 and bounds[-1] == 2**20
    assert all(2**10 <= n <= 2**17 for n in lengths[:-1]) and max(lengths) > 2**15


def test_sizes_and_ranges_are_read():
    assert [parse_size(x) for x in ("1000", "64K", "1M")] == [1000, 65_536, 2**20]
    assert parse_range("8..40") == [8, 16, 32] and parse_range("12") == [12]
    for wrong in ("", "0", "1G", "-8"):
        with pytest.raises(ValueError, match="expected a number of tokens"):
            parse_size(wrong)
    for wrong in ("8..", "0", "8-16"):
        with pytest.raises(ValueError, match="expected a number of GPUs"):
            parse_range(wrong)


def test_the_command_prints_a_row_for_each_number_of_gpus(capsys, tmp_path):
    chart = tmp_path / "plan.png"
    assert cli.main(["plan", "--gpus", "64..256", "--seq", "1M", "--chart", str(chart)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["64", "128", "256"]
    assert "16384!" in lines[2] and "!" not in lines[3]
    assert chart.read_bytes().startswith(b"\x89PNG")


def test_the_command_prints_the_anchors(capsys):
    assert cli.main(["plan", "--anchors"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(anchors())


def test_wrong_options_of_the_command_end_with_code_2(capsys):
    assert cli.main(["plan", "--seq", "many"]) == 2
    assert "expected a number of tokens" in capsys.readouterr().err
