"""Figures of trained models: what their lines hold, and that a reader can tell them apart."""

import math

import pytest
from matplotlib.image import imread

from bench import retrieval_figures
from tests.test_retrieval_evaluation import made_up_rows, shares_row


def text_rows():
    fields = {"task": "number", "input": "text", "train_max_len": 2048, "parameters": 2_100_000}
    return [shares_row("hybrid-3to1-text", n, 0.5, 1, **fields) for n in (1024, 4096)]


def seeded(line):
    return line.get_linewidth() < 1 and len(line.get_xdata()) > 0


@pytest.mark.parametrize("name", ["decay", "text", "depth", "distance", "state", "tasks", "ruler"])
def test_every_figure_of_trained_models_is_drawn(name, tmp_path):
    rows = [*made_up_rows(), *text_rows()]
    paths = retrieval_figures.write_figures(rows, tmp_path)
    assert imread(paths[name])[..., :3].std() > 0.05


def test_a_line_holds_the_pooled_shares_of_its_length():
    figure = retrieval_figures.make_decay_figure(made_up_rows())
    axes = figure.axes[0]
    lines = {c.get_label(): c.lines[0].get_ydata() for c in axes.containers}
    assert lines["lightning"].tolist() == [1.0, 1.0, 0.5]
    assert lines["hybrid-7to1"].tolist() == [1.0, 1.0, 1.0]
    assert len(figure.axes) == 2  # the ablation has a panel of its own


def test_needles_in_text_have_a_figure_of_their_own():
    assert retrieval_figures.make_text_figure(made_up_rows()) is None
    rows = [*made_up_rows(), *text_rows()]
    (axes,) = retrieval_figures.make_text_figure(rows).axes
    lines = {c.get_label(): c.lines[0].get_ydata().tolist() for c in axes.containers}
    assert lines == {"hybrid-3to1: number": [1 / 8, 1 / 8]}
    figure = retrieval_figures.make_decay_figure(rows)
    assert len(figure.axes) == 2
    assert figure.get_suptitle().endswith("2.3M parameters, trained on at most 1K tokens")


def test_second_seeds_are_thin_lines_named_once():
    seeds = [
        shares_row(f"{kind}-seed1", n, 0.5, correct, seed=1)
        for kind, correct in (("lightning", 2), ("hybrid-7to1", 4))
        for n in (1024, 4096)
    ]
    main, ablations = retrieval_figures.make_decay_figure([*made_up_rows(), *seeds]).axes
    thin = {line.get_color(): list(line.get_ydata()) for line in main.lines if seeded(line)}
    assert thin == {"#0072B2": [0.25, 0.25], "#009E73": [0.5, 0.5]}
    words = [text.get_text() for text in main.get_legend().get_texts()]
    assert words == ["lightning", "hybrid-7to1", "thin: second seeds"]
    assert not any(seeded(line) for line in ablations.lines)


def test_legends_of_the_decay_figure_cover_no_data():
    figure = retrieval_figures.make_decay_figure(made_up_rows())
    figure.draw_without_rendering()
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        words = axes.xaxis.get_tightbbox()
        assert not legend.overlaps(axes.get_window_extent()) and not legend.overlaps(words)
        assert figure.bbox.y0 <= legend.y0 and legend.y1 <= figure.bbox.y1


@pytest.mark.parametrize("lengths", [(1024,), (1024, 2048), tuple(2**n for n in range(10, 23))])
def test_markers_of_one_length_stay_together_and_inside(lengths):
    """Whatever the axis spans, models at one length lie within half an octave and 6 % of it."""
    rows = [
        shares_row(model, n, 0.5, 8, task="frequent")
        for model in retrieval_figures.MODELS
        for n in lengths
    ]
    figure = retrieval_figures.make_task_figure(rows)
    (axes,) = (axes for axes in figure.axes if axes.get_visible())
    low, high = (math.log2(end) for end in axes.get_xlim())
    places = [[math.log2(x) for x in c.lines[0].get_xdata()] for c in axes.containers]
    assert len(places) == 5
    for at, length in zip(zip(*places, strict=True), lengths, strict=True):
        assert low < min(at) < math.log2(length) < max(at) < high
        assert max(at) - min(at) < min(0.5, 0.06 * (high - low))
        assert len(set(at)) == 5
