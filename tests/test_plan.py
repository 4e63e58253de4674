import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

import attnlab
from bench import plan
from bench.inputs import Source, check_corpus, corpus_bytes
from bench.timing import Ceilings
from tests.test_rows import POINT


@pytest.mark.parametrize(
    "text, tokens", [("4M", 4194304), ("64K", 65536), ("1048576", 1048576), (" 1k ", 1024)]
)
def test_lengths_are_read(text, tokens):
    assert plan.parse_length(text) == tokens


@pytest.mark.parametrize("text", ["", "4G", "-1", "1.5K", "0", "4 M tokens"])
def test_what_is_no_length_is_refused(text):
    with pytest.raises(ValueError, match="expected a length such as 64K, 4M or 1048576, got"):
        plan.parse_length(text)


def test_lengths_double_up_to_the_longest():
    assert plan.lengths(1024, 5000) == [1024, 2048, 4096]
    with pytest.raises(ValueError, match="expected --min-len <= --max-len"):
        plan.lengths(2, 1)


def test_one_length_is_shuffled_by_its_seed_alone():
    points = [replace(POINT, backend=str(n)) for n in range(10)]
    assert plan.shuffled(points, 0) == plan.shuffled(points, 0)
    assert plan.shuffled(points, 0) != plan.shuffled(points, 1)
    assert sorted(p.backend for p in plan.shuffled(points, 0)) == sorted(p.backend for p in points)


def predictor():
    return plan.Predictor({"float32": Ceilings(copy_gbps=10.0, matmul_tflops=0.1)})


def test_a_prediction_scales_the_last_measured_time_with_the_counted_work():
    known = predictor()
    soft = replace(POINT, op="softmax", backend="sdpa")
    for point, ms in ((POINT, 1.0), (soft, 4.0)):
        known.learn(point, {"status": "ok", "ms_median": ms, "limit": "compute"})
    assert known.predict(replace(POINT, q_len=4096))[0] == pytest.approx(4.0)
    assert known.predict(replace(soft, q_len=4096))[0] == pytest.approx(64.0, rel=1e-2)


def test_one_disturbed_point_does_not_spoil_the_prediction():
    known = predictor()
    for length, ms in ((1024, 1.0), (2048, 2.0), (4096, 400.0)):
        row = {"status": "ok", "ms_median": ms, "limit": "compute"}
        known.learn(replace(POINT, q_len=length), row)
    assert known.predict(replace(POINT, q_len=8192))[0] == pytest.approx(8.0)


def test_what_does_not_fit_is_skipped_with_its_prediction():
    known = predictor()
    known.learn(POINT, {"status": "ok", "ms_median": 1000.0, "limit": "compute"})
    longer = replace(POINT, q_len=1 << 20)
    room = {"free_bytes": 1 << 40, "point_budget_s": 10, "left_s": 100}
    by_time = known.skip(longer, [], **room)
    assert by_time["status"] == "skipped_budget" and by_time["pred_ms"] == pytest.approx(1024e3)
    assert known.skip(replace(POINT, q_len=2048), [], **room) is None
    by_total = known.skip(replace(POINT, q_len=2048), [], **room | {"left_s": 1})
    assert by_total["status"] == "skipped_budget" and "of the 1 s left" in by_total["reason"]
    by_memory = known.skip(longer, [], **room | {"free_bytes": 1 << 20})
    assert by_memory["status"] == "skipped_memory" and by_memory["pred_bytes"] == 4 * 64 * 4 << 20


def test_the_budget_is_kept_for_cheaper_points_that_come_later():
    known = predictor()
    soft = replace(POINT, op="softmax", backend="sdpa")
    for point, ms in ((POINT, 1000.0), (soft, 10_000.0)):
        known.learn(point, {"status": "ok", "ms_median": ms, "limit": "compute"})
    room = {"free_bytes": 1 << 40, "point_budget_s": 1000, "left_s": 170}
    dear, cheap = replace(soft, q_len=2048), [replace(POINT, q_len=n << 10) for n in (2, 4, 8)]
    assert known.skip(dear, [], **room) is None
    found = known.skip(dear, cheap, **room)
    assert found["status"] == "skipped_budget" and "cheaper points need" in found["reason"]
    assert all(known.skip(point, [dear], **room) is None for point in cheap)


def test_beyond_an_out_of_memory_everything_is_dominated():
    known = predictor()
    known.learn(POINT, {"status": "out_of_memory", "q_len": 1024})
    found = known.skip(
        replace(POINT, q_len=2048), [], free_bytes=1 << 40, point_budget_s=10, left_s=100
    )
    assert found["status"] == "skipped_dominated" and "1024 tokens" in found["reason"]


def test_a_changed_source_is_another_point(tmp_path, monkeypatch):
    source = tmp_path / "attnlab"
    source.mkdir()
    for name in ("chunked.py", "reference.py"):
        (source / name).write_text("a = 1\n")
    monkeypatch.setattr(plan, "ROOT", tmp_path)
    before = plan.fingerprint("torch")
    assert plan.fingerprint("torch") == before
    (source / "chunked.py").write_text("a = 2\n")
    assert plan.fingerprint("torch") != before


def test_every_backend_has_sources_that_exist():
    backends = attnlab.list_backends()
    assert set(backends) <= set(plan.SOURCES)
    for name in itertools.chain.from_iterable(plan.SOURCES[b] for b in backends):
        assert (plan.ROOT / name).exists()


def test_the_default_corpus_has_four_million_bytes():
    assert len(corpus_bytes(None)) >= 4 << 20


def test_a_short_or_missing_corpus_is_refused(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"abc" * 100)
    with pytest.raises(ValueError, match="at least 1000 bytes, got 300"):
        check_corpus(str(file), 1000)
    with pytest.raises(ValueError, match="expected a readable corpus"):
        corpus_bytes(str(tmp_path / "none"))


def test_text_inputs_follow_the_bytes(tmp_path):
    file = tmp_path / "text"
    file.write_bytes(b"the cat and the cat" + bytes(range(200)))
    source = Source("text", str(file))
    first, again = (source.tensors(("key",), (1, 2, 19, 8), torch.float32, "cpu")[0] for _ in "ab")
    assert torch.equal(first, again)
    assert torch.equal(first[:, :, 3:7], first[:, :, 15:19])  # " cat" after "the" both times
    assert not torch.equal(first[:, :, 0], first[:, :, 1])
    other = source.tensors(("value",), (1, 2, 19, 8), torch.float32, "cpu")[0]
    assert not torch.equal(first, other)


def test_text_inputs_have_unit_variance():
    x = Source("text").tensors(("query",), (1, 1, 20_000, 64), torch.float32, "cpu")[0]
    assert np.isclose(x.std().item(), 1.0, atol=0.3)
