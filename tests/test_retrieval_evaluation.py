"""Evaluation: cells, chosen runs, units that resume, and the figures and tables of their rows."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from attnlab.model import HybridLM, placement
from attnlab.retrieval import evaluate, train
from attnlab.retrieval.attention import watched
from attnlab.retrieval.evaluate import Loaded, cells_of, chosen_runs, load, tasks_of
from attnlab.retrieval.horizon import TrainedHead, predicted_recall, trained_heads
from attnlab.retrieval.mixture import Curriculum
from attnlab.retrieval.plans import PLANS
from attnlab.retrieval.runs import Run
from attnlab.retrieval.streaming import streamed_logits
from attnlab.retrieval.symbols import Shape
from attnlab.retrieval.tasks import make_batch
from bench import (
    document,
    findings,
    probe_suite,
    published,
    report,
    retrieval,
    retrieval_figures,
    retrieval_report,
    retrieval_suite,
    sweep,
    units,
)
from bench.rows import append_row, load_rows
from tests.test_retrieval_training import TINY, made_up

pytestmark = pytest.mark.usefixtures("one_thread")
SHORT = replace(TINY, name="softmax-short", model="softmax", steps=1)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with two finished runs of one step each, of two models."""
    folder = tmp_path_factory.mktemp("runs")
    for model in ("softmax", "hybrid-3to1"):
        run = replace(SHORT, name=model, model=model)
        train.train(run, folder / model, device="cpu")
    return folder


def test_a_needle_column_has_eight_cells_of_eight():
    batch = make_batch("needle", rows=8, length=1024, seed=0)
    right = batch.depth > 0.5  # found where it lies in the second half
    cells = cells_of(batch, right, torch.ones_like(batch.depth))
    assert [cell.depth for cell in cells] == [(i + 0.5) / 8 for i in range(8)]
    assert [cell.n for cell in cells] == [8] * 8
    assert [cell.correct for cell in cells] == [0] * 4 + [8] * 4
    distances = [cell.distance for cell in cells]
    assert distances == sorted(distances, reverse=True)
    assert distances[0] == pytest.approx(1024 * (1 - 1 / 16), abs=64)


def test_what_lies_nowhere_is_one_cell_without_depth():
    batch = make_batch("frequent", rows=22, length=256, seed=0)
    (cell,) = cells_of(batch, torch.ones(22, 1, 3, dtype=torch.bool), torch.zeros(22, 1, 3))
    assert (cell.depth, cell.distance, cell.n, cell.correct) == (None, None, 66, 66)


def oracle(batch):
    """Logits of a model that knows all answers of a batch."""
    logits = torch.zeros(*batch.input_ids.shape, 776)
    rows = torch.arange(len(batch.input_ids))[:, None, None]
    logits[rows, batch.asked[..., None], batch.answers] = 5.0
    return logits[:, -batch.tail_len :]


@pytest.mark.parametrize("task", ["needle", "multi_value", "haystack", "tracking", "frequent"])
def test_a_model_that_knows_all_answers_finds_all(task, monkeypatch):
    loaded = Loaded(trained=made_up(PLANS["full"].base, 1.0), model=HybridLM(SHORT.build().config))
    batch = evaluate.evaluation_batch(loaded, task, 1024, "cpu")
    answers = iter(oracle(batch))
    monkeypatch.setattr(
        evaluate,
        "streamed_logits",
        lambda m, ids, n, chunk: torch.stack([next(answers) for _ in ids]),
    )
    cells = evaluate.evaluate(loaded, task, 1024, chunk=3000)
    assert sum(cell.n for cell in cells) >= 64
    assert all(cell.correct == cell.n and cell.margin == 5.0 for cell in cells)


def test_chunks_change_no_cell(runs):
    loaded = load(runs / "hybrid-3to1", device="cpu")
    one, other = (evaluate.evaluate(loaded, "needle", 600, chunk=c) for c in (100, 5000))
    assert [(c.n, c.correct, c.distance) for c in one] == [
        (c.n, c.correct, c.distance) for c in other
    ]
    margins = [[cell.margin for cell in cells] for cells in (one, other)]
    assert np.allclose(*margins, atol=1e-4)


def test_a_question_whose_answer_is_told_nowhere_has_no_weight():
    """Not even where it is asked in the last token, behind which there is no slot."""
    run = replace(PLANS["full"].base, model="softmax", size="small")
    loaded = Loaded(trained=made_up(run, 1.0), model=HybridLM(run.build().config).eval())
    batch = evaluate.evaluation_batch(loaded, "frequent", 1024, "cpu")
    assert (batch.asked[:, 0] == batch.input_ids.shape[1] - 1).all()
    (cell,) = evaluate.evaluate(loaded, "frequent", 1024, chunk=8192)
    assert (cell.n, cell.attention) == (66, None)


def test_attention_on_the_needle_is_its_softmax_weight():
    """Of the last layer, in float64: weights from the definition, whatever the chunks."""
    torch.manual_seed(0)
    config = replace(SHORT, model="hybrid-3to1").build().config
    model = HybridLM(config, dtype=torch.float64).eval()
    batch = make_batch(
        "needle",
        rows=2,
        length=120,
        seed=0,
        vocabulary=TINY.vocabulary,
        shape=Shape(num_questions=3),
    )
    seen = {}
    mixer = model.model.layers[-1].self_attn
    original = mixer._attend

    def attend(query, key, value, place, cache):
        if cache is None:
            seen.update(query=query, key=key)
        return original(query, key, value, place, cache)

    mixer._attend = attend
    with torch.no_grad():
        model(batch.input_ids)
    del mixer._attend
    scores = seen["query"] @ seen["key"].mT / 32**0.5
    scores = scores.masked_fill(torch.ones(120, 120).triu(1).bool(), -torch.inf).softmax(-1)
    rows = torch.arange(2)[:, None]
    told = batch.asked - batch.distance[:, :, 0]
    expected = scores.transpose(1, 2)[rows, batch.asked].transpose(1, 2)  # [B, H, Q, S]
    expected = expected.gather(3, told[:, None, :, None].expand(2, 2, 3, 1))[..., 0]
    with watched(model, batch) as weights:
        streamed_logits(model, batch.input_ids, batch.tail_len, chunk=50)
    assert len(weights) == 1 and torch.allclose(weights[0].double(), expected, rtol=1e-4, atol=1e-7)
    assert "_attend" not in vars(mixer)


def lightning_alone():
    torch.manual_seed(0)
    config = replace(SHORT, model="lightning").build().config
    return HybridLM(config, dtype=torch.float64).eval()


def test_a_trained_heads_key_dim_is_its_signal_over_its_noise():
    """Of layer 0, from its weights alone: squared q k |v|, the asked one over the mean of the others."""
    model = lightning_alone()
    batch = make_batch(
        "needle",
        rows=3,
        length=100,
        seed=0,
        vocabulary=TINY.vocabulary,
        shape=Shape(num_questions=2),
    )
    heads = trained_heads(model, batch)
    assert [(h.layer, h.head) for h in heads] == [(i, j) for i in range(4) for j in range(2)]
    assert heads[1].slope == pytest.approx(2.0**-8 * (1 + 1e-5))
    layer = model.model.layers[0]
    with torch.no_grad():
        x = layer.input_layernorm(model.model.embed_tokens(batch.input_ids))
        place = placement.dense(batch.input_ids, None)
        qkv = layer.self_attn.qkv_proj(layer.self_attn.conv(x, place, None))
        qkv = torch.nn.functional.silu(qkv).unflatten(-1, (2, 3, 32))  # [B, T, H, 3, K]
    query, key, value = (qkv[:, :, 1, i] for i in range(3))  # of head 1
    own, others = [], []
    for row in range(3):
        for question in range(2):
            asked = int(batch.asked[row, question])
            told = asked - int(batch.distance[row, question, 0])
            power = ((key[row] @ query[row, asked]) * value[row].norm(dim=-1)) ** 2
            own.append(power[told])
            body = power[: 100 - batch.tail_len]
            others.append((body.sum() - power[told]) / (len(body) - 1))
    expected = float(sum(own) / sum(others))
    assert heads[1].key_dim == pytest.approx(expected, rel=1e-4)
    assert all("_attend" not in vars(layer.self_attn) for layer in model.model.layers)


def test_the_best_head_is_what_is_predicted():
    near = TrainedHead(layer=0, head=0, slope=0.1, key_dim=500.0, value_dim=32)
    far = replace(near, slope=0.001, key_dim=900.0)
    flags = {"num_tokens": 1 << 16, "codebook": 32}
    for distance in (4, 300, 20_000):
        alone = [predicted_recall([h], distance=distance, **flags) for h in (near, far)]
        assert predicted_recall([near, far], distance=distance, **flags) == max(alone)
    shares = [predicted_recall([near, far], distance=d, **flags) for d in (4, 300, 20_000)]
    assert shares[0] > 0.99 and shares == sorted(shares, reverse=True) and shares[2] < 0.1


def test_models_without_softmax_layers_have_predictions():
    trained = made_up(replace(SHORT, model="lightning"), 1.0)
    trained = replace(
        trained, run=replace(trained.run, curriculum=Curriculum(shortest=64, stages=((1.0, 64),)))
    )
    cells = evaluate.cells_of(
        make_batch("needle", rows=8, length=1024, seed=0),
        torch.ones(8, 8, 1, dtype=torch.bool),
        torch.ones(8, 8, 1),
    )
    shares = evaluate.predictions(Loaded(trained=trained, model=lightning_alone()), 1024, cells)
    assert len(shares) == 8 and all(0 <= share <= 1 for share in shares)
    other = HybridLM(SHORT.build().config)
    assert evaluate.predictions(Loaded(trained=trained, model=other), 1024, cells) is None


def test_unfinished_runs_and_weights_of_another_config_are_refused(runs, tmp_path):
    with pytest.raises(ValueError, match="expected a finished run in"):
        load(tmp_path, device="cpu")
    record = json.loads((runs / "softmax" / "run.json").read_text())
    record["run"]["model"] = "softmax.half-rotary"
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "model").symlink_to(runs / "softmax" / "model")
    with pytest.raises(ValueError, match="weights of the config of softmax, got rotary_dim 0"):
        load(tmp_path, device="cpu")


def test_the_runs_at_the_best_rate_are_evaluated_with_all_their_seeds(tmp_path):
    scores = {("a", 1e-3, 0): 0.5, ("b", 2e-3, 0): 0.7, ("c", 2e-3, 1): 0.1, ("d", 4e-3, 1): 0.9}
    for (name, rate, seed), score in scores.items():
        run = replace(SHORT, name=name, learning_rate=rate, seed=seed)
        record = {**vars(made_up(run, score)), "run": run.to_json()}
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "run.json").write_text(json.dumps(record))
        (tmp_path / name / "model" / "config.json").write_text("{}")
    assert [path.name for path in chosen_runs(tmp_path)] == ["b", "c"]


def test_needles_alone_are_asked_beyond_256k_of_second_seeds_and_of_variants():
    full = made_up(PLANS["full"].base, 1.0)
    assert len(tasks_of(full, 1 << 18)) == 7 and tasks_of(full, 1 << 19) == ["needle"]
    assert tasks_of(made_up(replace(full.run, seed=1), 1.0), 1024) == ["needle"]
    variant = replace(full.run, model="softmax.half-rotary")
    assert tasks_of(made_up(variant, 1.0), 1024) == ["needle"]
    text = made_up(PLANS["full"].text, 1.0)
    assert tasks_of(text, 1024) == ["number", "pass_key"] and tasks_of(text, 1 << 22) == ["number"]
    assert tasks_of(made_up(PLANS["full"].mqar, 1.0), 512) == ["mqar"]
    assert tasks_of(made_up(PLANS["full"].mqar, 1.0), 1024) == []


def test_text_is_evaluated_on_held_out_bytes():
    text = made_up(PLANS["full"].text, 1.0)
    corpus = torch.randint(97, 122, (5000,), dtype=torch.uint8)
    model = HybridLM(text.run.build().config)
    loaded = Loaded(trained=text, model=model, corpus=corpus)
    batch = evaluate.evaluation_batch(loaded, "number", 2048, "cpu")
    assert batch.answers.shape == (8, 56, 1) and batch.joint == 7


def test_a_last_softmax_layer_costs_no_quadratic_work():
    """Twice the length, twice the operations, up to the head and 1 in 1,000."""
    config = replace(PLANS["full"].base, model="hybrid-7to1").build().config
    long, longer = (evaluate.streaming_flops(config, n) for n in (1 << 20, 1 << 21))
    assert longer / long == pytest.approx(2, rel=1e-3)
    full = replace(PLANS["full"].base, model="softmax").build().config
    ratio = evaluate.streaming_flops(full, 1 << 21) / evaluate.streaming_flops(full, 1 << 20)
    assert ratio > 3.9


def evaluated(folder, *options, in_process=True):
    """Exit code and rows of the command on finished runs."""
    options = ["--plan", "none", "--device", "cpu", "--max-len", "2K", *options]
    code = retrieval.main([*options, "--out", str(folder)], in_process=in_process)
    return code, load_rows(folder / "rows.jsonl")


@pytest.fixture(scope="module")
def evaluation(runs):
    code, rows = evaluated(runs, in_process=False)
    assert code == 0
    return rows


def test_rows_of_retrieval_say_all_that_is_documented(evaluation):
    assert len(evaluation) == 2 * 2 * 2 * 8  # models, lengths, tasks, depths
    for row in evaluation:
        assert row["suite"] == "retrieval" and row["model"].startswith(("softmax", "hybrid"))
        assert row["wilson_lo"] <= row["correct"] / row["n"] <= row["wilson_hi"]
        assert 0 < row["depth"] < 1 and 0 < row["distance"] < row["q_len"]
    text = (units.ROOT / "results" / "README.md").read_text()
    fields = {name for row in evaluation for name in row}
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []
    fields = set(probe_suite.units(1024, "float32")[0].measure("cpu")[0])
    assert [name for name in sorted(fields) if f"`{name}`" not in text] == []


def test_a_killed_evaluation_goes_on_with_whole_units(evaluation, runs, tmp_path):
    """Cut anywhere, also within a line, and resumed, a file of rows ends with the keys of a whole one."""
    whole = (runs / "rows.jsonl").read_bytes()
    for path in ("softmax", "hybrid-3to1"):
        (tmp_path / path).symlink_to(runs / path)
    for _ in range(2):
        cut = random.Random(0).randint(len(whole) // 4, len(whole) - 2)
        (tmp_path / "rows.jsonl").write_bytes(whole[:cut])
        kept = len(load_rows(tmp_path / "rows.jsonl"))
        code, rows = evaluated(tmp_path)
        assert code == 0 and {r["key"] for r in rows} == {r["key"] for r in evaluation}
        old = {r["key"]: r["ts_utc"] for r in evaluation}
        assert sum(r["ts_utc"] == old[r["key"]] for r in rows) >= kept // 8 * 8 - 8
    before = (tmp_path / "rows.jsonl").read_bytes()
    evaluated(tmp_path)
    assert (tmp_path / "rows.jsonl").read_bytes() == before


def test_a_budget_that_is_used_up_skips_with_a_reason(runs, tmp_path):
    for path in ("softmax", "hybrid-3to1"):
        (tmp_path / path).symlink_to(runs / path)
    code, rows = evaluated(tmp_path, "--evaluate-minutes", "1e-9")
    assert code == 1 and {row["status"] for row in rows} == {"skipped_budget"}
    assert all("of the suite's time" in row["reason"] and "n" not in row for row in rows)
    code, rows = evaluated(tmp_path)
    assert code == 0
    blocks = retrieval_report.blocks(rows, {})
    assert "skipped" not in document.to_markdown(blocks)  # what was skipped has been measured


def test_rows_that_were_skipped_give_way_to_measured_ones(tmp_path):
    """A skipped unit has one row of its own key: the report counts it no more once it is measured."""
    unit = {"suite": "retrieval", "unit": "u", "op": "softmax", "model": "softmax"}
    skipped = {**unit, "key": "all", "status": "skipped_budget", "cell": "all"}
    for row in (skipped, {**unit, "key": "0.5", "status": "ok", "cell": "0.5"}):
        append_row(tmp_path / "rows.jsonl", row)
    assert [r["key"] for r in units.settled(load_rows(tmp_path / "rows.jsonl"))] == ["0.5"]


def test_work_that_does_not_fit_the_memory_is_skipped(runs):
    unit = next(iter(retrieval_suite.units(1024, "", runs)))

    class NoMemory:
        def call(self, action, *arguments):
            return unit.memory_bytes("cpu")

    skipped = units._skip(unit, NoMemory(), "cpu", None, 100.0)
    assert skipped["status"] == "skipped_memory" and "75% of the" in skipped["reason"]


def test_an_evaluation_without_memory_measures_nothing(runs, tmp_path, monkeypatch):
    (tmp_path / "softmax").symlink_to(runs / "softmax")
    monkeypatch.setattr(units, "MEMORY_SHARE", 0.0)
    code, rows = evaluated(tmp_path)
    assert code == 1 and {row["status"] for row in rows} == {"skipped_memory"}


def test_tasks_that_do_not_fit_a_vocabulary_are_unsupported(runs):
    unit = replace(next(iter(retrieval_suite.units(1024, "", runs))), task="tracking")
    (row,) = unit.measure("cpu")
    assert row["status"] == "unsupported" and "num_keys >= 40, got 16" in row["reason"]


def test_without_models_the_report_says_so(tmp_path, monkeypatch):
    assert list(retrieval_suite.units(1 << 20, "", tmp_path)) == []
    monkeypatch.setattr(retrieval_suite, "SHIPPED", tmp_path)
    assert "No trained models" in retrieval_suite.notice(tmp_path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--plan", "huge"], "a plan among full, small, got 'huge'"),
        (["--max-len", "4G"], "expected a length such as"),
        (["--minutes", "0"], "expected --minutes > 0"),
        (["--jobs", "0"], "expected --jobs > 0"),
    ],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)
def test_bad_options_end_with_one_line_and_code_2(options, message, tmp_path, capsys):
    assert retrieval.main(["--device", "cpu", "--out", str(tmp_path), *options]) == 2
    assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def probed(tmp_path_factory):
    """Rows of a sweep of the suite probe alone, twice into one folder."""
    folder = tmp_path_factory.mktemp("probe")
    options = ["--suites", "probe", "--max-len", "32K", "--device", "cpu", "--out", str(folder)]
    arguments = sweep.parse_arguments(options)
    assert sweep.execute(arguments, sweep.plan_points, in_process=True, ceiling_rounds=1) == 0
    before = (folder / "rows.jsonl").read_bytes()
    arguments = sweep.parse_arguments([*options, "--resume"])
    assert sweep.execute(arguments, sweep.plan_points, in_process=True, ceiling_rounds=1) == 0
    assert (folder / "rows.jsonl").read_bytes() == before
    return folder


def test_the_probe_is_in_the_sweeps_report(probed):
    rows = load_rows(probed / "rows.jsonl")
    assert {row["suite"] for row in rows} == {"probe"}
    assert {row["op"] for row in rows} == {"lightning", "softmax"}
    text = (probed / "summary.md").read_text()
    assert "is predicted within a factor of" in text and "figures/recall.png" in text
    factor = float(text.split("within a factor of ")[1].split()[0])
    assert 1 <= factor < 2
    for name in ("recall", "horizon"):
        picture = imread(probed / "figures" / f"{name}.png")
        assert picture[..., :3].std() > 0.05


def shares_row(model, length, depth, correct, **fields):
    op = model.partition("-")[0].partition(".")[0]
    return {
        "key": f"{model}{length}{depth}{fields.get('task')}", "suite": "retrieval", "status": "ok",
        "op": op, "model": model, "task": "needle", "q_len": length, "depth": depth,
        "distance": int(length * (1 - (depth or 0))), "n": 8, "correct": correct, "seed": 0,
        "train_max_len": 1024, "parameters": 2_300_000, "state_bytes": 1000 * length,
        "input": "symbols", "wilson_lo": 0.0, "wilson_hi": 1.0,
    } | fields  # fmt: skip


def made_up_rows():
    """A hybrid that finds all, a lightning model that loses half of the depths at 4K."""
    rows = []
    for length in (1024, 2048, 4096):
        for i in range(8):
            depth = (i + 0.5) / 8
            rows.append(shares_row("hybrid-7to1", length, depth, 8))
            lost = length == 4096 and i < 4
            rows.append(shares_row("lightning", length, depth, 0 if lost else 8))
            rows.append(shares_row("hybrid-7to1", length, depth, 4, task="tracking"))
            rows.append(shares_row("hybrid-7to1.no-ramp", length, depth, 2))
    return [*rows, shares_row("softmax", 4096, None, None, status="skipped_budget")]


def test_findings_say_how_far_each_architecture_reaches():
    items = retrieval_report.findings(made_up_rows())
    assert items == [
        "lightning finds 90 % or more up to 2K; at 4K, the longest length measured, 50.0% "
        "(95 % interval 38.1% to 61.9%).",
        "hybrid-7to1 finds 90 % or more up to 4K; at 4K, the longest length measured, 100.0% "
        "(95 % interval 94.3% to 100.0%).",
    ]


def test_findings_compare_a_fall_with_its_prediction():
    """Measured 1, 0.5, 0: half at 2K. Predicted 1, 0.75, 0.25: half in the middle of the octave."""
    shares = {1024: (8, 1.0), 2048: (4, 0.75), 4096: (0, 0.25)}
    rows = [
        shares_row("lightning", n, 0.5, correct, predicted=share)
        for n, (correct, share) in shares.items()
    ]
    items = retrieval_report.findings(rows)
    assert items[1] == "lightning finds half of the needles up to 2K; predicted: 2.83K."
    figure = retrieval_figures.make_decay_figure(rows)
    dashed = [line for line in figure.axes[0].lines if "predicted" in str(line.get_label())]
    assert [list(line.get_ydata()) for line in dashed] == [[1.0, 0.75, 0.25]]


def test_the_table_holds_every_length_and_says_what_was_skipped():
    rows = [*made_up_rows(), *(shares_row("softmax", 1024, d / 8, 8) for d in range(8))]
    table = retrieval_report.needle_table(rows)
    assert table.header == ["tokens", "softmax", "lightning", "hybrid-7to1", "hybrid-7to1.no-ramp"]
    assert table.rows[0][:2] == ["1K", "100.0% (94% to 100%)"]
    assert table.rows[2][:3] == ["4K", "skipped", "50.0% (38% to 62%)"]


def test_published_curves_are_as_long_as_published():
    lengths = {model: len(values) for model, values in published.RULER.items()}
    assert lengths["MiniMax-Text-01"] == lengths["Gemini 1.5 Pro"] == len(published.RULER_LENGTHS)
    assert published.RULER["MiniMax-Text-01"][-1] == 0.910
    assert "2501.08313" in published.RULER_SOURCE


def test_rows_of_recall_leave_the_other_tables_alone(tmp_path):
    rows = made_up_rows()
    for row in rows:
        append_row(tmp_path / "rows.jsonl", row)
    report.write_report(tmp_path)
    text = (tmp_path / "summary.md").read_text()
    assert "Needles found, by length" in text and "softmax" in text
    assert findings.not_measured(rows).rows[0][0] == "softmax"


def test_every_training_run_is_in_the_report():
    runs = [replace(SHORT, learning_rate=rate) for rate in (2e-3, 1e-3)]
    trained = [
        replace(made_up(run, 0.5), accuracies={"needle@256": 1.0, "needle@1024": 0.5})
        for run in runs
    ]
    table = retrieval_report.run_table(trained)
    assert [row[2] for row in table.rows] == ["0.001", "0.002"]
    assert table.rows[0][4:6] == ["75.0%", "256: 100.0%, 1K: 50.0%"]
    text = document.to_markdown(retrieval_report.blocks(made_up_rows(), {}, trained))
    assert "All training runs" in text


def test_a_run_knows_its_architecture_and_seed():
    names = [
        retrieval_suite.model_name(made_up(run, 1.0))
        for run in (
            Run(name="x", model="softmax", seed=1),
            PLANS["full"].text,
            replace(PLANS["full"].mqar, model="lightning"),
        )
    ]
    assert names == ["softmax-seed1", "hybrid-3to1-text", "lightning-mqar"]


def test_one_disturbed_unit_does_not_spoil_the_prediction():
    class Sized:
        def work(self):
            return 8.0

    assert units.predicted_s(Sized(), []) is None
    assert units.predicted_s(Sized(), [(1.0, 1.0), (2.0, 90.0), (4.0, 4.0)]) == 8.0
