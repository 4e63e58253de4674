# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#       jupytext_version: 1.19.6
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Retrieval decay
#
# How far back does a model find what it has read? This notebook takes the question apart. First the
# ops alone, without any training: how many pairs a lightning state can hold, how far back it recalls
# them, and among how many keys softmax attention finds one, each beside a closed form. Then trained
# models: softmax, lightning and hybrid stacks of equal size, asked for needles in ever longer
# contexts. It measures nothing itself; every number below is computed from rows that
# `python bench/sweep.py` and `python bench/retrieval.py` wrote (`results/README.md` explains them).

# %%
import io
import math
import sys
from pathlib import Path

sys.path.insert(
    0, next(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "bench").is_dir())
)

import pandas as pd
import PIL.Image
from IPython.display import Image, Markdown
from matplotlib import rc_context

from attnlab.retrieval import theory
from attnlab.retrieval.plans import trained_in
from bench import retrieval_report
from bench.document import Bullets, Table
from bench.fit import format_len
from bench.plan import ROOT
from bench.recall_axes import STYLE, recall
from bench.retrieval_figures import FIGURES
from bench.rows import load_rows
from bench.units import settled

# %% [markdown]
# `RUN` names a folder of rows, relative to the repository or absolute. With None the trained models are
# those of the committed run on a GPU, and the probe is the sample from two CPU cores.

# %% tags=["parameters"]
RUN = None

# %%
COMMITTED = ("results/h200/retrieval", "results/sample-recall")
every = {
    name: settled(load_rows(ROOT / name / "rows.jsonl")) for name in ([RUN] if RUN else COMMITTED)
}
rows = []
for suite in ("probe", "retrieval"):
    found = {
        name: [row for row in group if row.get("suite") == suite] for name, group in every.items()
    }
    rows += next((group for group in found.values() if group), [])


def show(block: Table | Bullets) -> Markdown:
    """A table or sentences of the report."""
    return Markdown(block.markdown())


def draw(name: str) -> Image | Markdown:
    """A figure of the report, with few colours so that this file stays small."""
    with rc_context(STYLE):
        figure = FIGURES[name](rows)
        if figure is None:
            return Markdown("*No row has it.*")
        png = io.BytesIO()
        figure.savefig(png, dpi=80)
    small = io.BytesIO()
    PIL.Image.open(png).convert("RGB").quantize(128).save(small, "png", optimize=True)
    return Image(small.getvalue())


facts = pd.DataFrame(rows)[["suite", "device"]].value_counts()
Markdown("; ".join(f"{n} rows of {suite}, {device}" for (suite, device), n in facts.items()))

# %% [markdown]
# ## What an op can recall
#
# A lightning head keeps a sum of outer products, each a little smaller with every token:
#
# $$S_N = \sum_i e^{-s(N-i)}\, k_i v_i^\top .$$
#
# Asked with a stored key it answers with that key's value, shrunk by $e^{-sD}$ at distance $D$, and
# with everything else it holds as noise. If keys are random directions of $K$ channels and values come
# from a codebook of $C$ directions of $V$ channels, that noise has a variance of
# $W\,(1/V + 1/C)\,/\,K$, where $W$ is the sum of $e^{-2sD}$ over all other writes. The answer is right
# if the value's product with the output exceeds those of the $C-1$ other entries: one integral over
# normal distributions, `attnlab.retrieval.theory.top_one_probability`, gives the chance.
#
# Softmax gives the matched key the weight $1/(1 + (N-1)\,e^{-b + b^2/2K})$ for logits of scale $b$.
# Distance plays no part; the number of keys does.
#
# In the figure markers are measured: random pairs, streamed through the real ops in chunks. Lines are
# the closed form. Nothing is fitted.

# %%
draw("recall")

# %%
show(Bullets(retrieval_report.probe_findings(rows)))

# %% [markdown]
# Three things limit a head, and each has its own look. Where it decays fast the curve falls steeply at
# a distance that is short. Where it decays slowly and every token writes, the state holds more pairs
# than it can tell apart: recall is poor at any distance, and falls late. Without decay only their number
# counts. Between the first two lies a best slope; with it a head of the dims below reaches this far, and
# no farther, when every token writes:

# %%
pd.DataFrame(
    [
        {
            "head dim": dim,
            "pairs without decay": round(theory.capacity(dim, dim)),
            "longest horizon, every token writes": round(theory.capacity(dim, dim) / math.e),
            "one token in 256 writes": format_len(round(256 * theory.capacity(dim, dim) / math.e)),
        }
        for dim in (32, 64, 128)
    ]
).set_index("head dim")

# %% [markdown]
# ## What that says of MiniMax-01
#
# Its slopes fall from head to head and from layer to layer, so the horizon of every lightning head
# follows. The picture is generous, with one token in 256 writing anything at all:

# %%
draw("horizon")

# %% [markdown]
# No lightning head of it reaches a hundred thousand tokens, so that what MiniMax-01 finds in a million
# must pass through its ten softmax layers. That is an inference from the slopes, not a statement of the
# paper.
#
# ## What trained models find
#
# Small models of equal size, trained on short sequences of symbols: keys and values as needles in noise
# of other symbols. Eight needles lie in a context, one in each eighth of its depth, and all of them are
# asked for at its end. Every answer counts that is the likeliest of all symbols.

# %%
draw("decay")

# %%
show(Bullets(retrieval_report.findings(rows)))

# %% [markdown]
# Whether a model fails with length or with distance shows by depth and by distance:

# %%
draw("depth")

# %%
draw("distance")

# %% [markdown]
# Lightning forgets with distance: near needles are found in contexts of any length, far ones in none, and
# a second seed does the same. The dashed line of the first figure is no fit to that fall. It takes from
# contexts of the training length how strongly each trained head writes needles and noise, and leaves the
# rest to the closed form at the top: a decay that is fixed, and noise of all that was written since. So
# the probe's reason, a horizon that follows from the slope, is that of the trained model too.
#
# ## What each part of the recipe does
#
# The right panel of the first figure leaves out parts of the recipe: one seed each, at the learning rate
# that was best for the whole. Softmax layers also show why. Behind each share stands the largest weight
# that any of their heads gives to the token that tells the answer, in the mean of the items; the first
# line is the weight of every token if attention were spread evenly.

# %%
whole = {m: r for m, r in retrieval_report.by_length(rows).items() if "-seed" not in m}
bases = {model.partition(".")[0] for model in whole if "." in model}
lengths = sorted({length for by_len in whole.values() for length in by_len})[::3]


def cell(group: list[dict]) -> str:
    """Share found, and the weight on the answer where the model has softmax layers."""
    weights = [row.get("attention") for row in group]
    weight = "" if None in weights else f", {sum(weights) / len(weights):.2g}"
    return f"{recall(group)[0]:.0%}{weight}"


table = {"even spread": {format_len(n): f"{1 / n:.2g}" for n in lengths}}
for model, by_len in whole.items():
    if model.partition(".")[0] in bases:
        table[model] = {format_len(n): cell(by_len[n]) if n in by_len else "" for n in lengths}
pd.DataFrame(table).transpose()

# %% [markdown]
# - **The ramp** keeps linear mixers out at first and fades them in while the model trains. Without it
#   the hybrid finds what is near, and of all else about two needles in three, at any depth and as far as
#   it was asked. Its slowest linear head falls to 1/e in less than 2K tokens, so what is far must come
#   through the softmax layer, yet next to no weight lies on the token that tells the answer. The layer
#   has learned in part, to read what the mixers below have carried to other tokens.
# - **The place** of the softmax layer: put first in its group, without a ramp either, it gives the answer
#   the weight of an even spread. It looks nowhere, and the hybrid falls where pure lightning falls: a
#   linear model in disguise.
# - **The ln(length) scale** on queries holds the weight up as contexts grow. Without it the weight in a
#   softmax model halves with each doubling in the end, as the probe's does. It finds less than nine in ten
#   from 32K on, the hybrid from 1M on.
# - **Positions**: half of each head rotated, in place of the scale, costs a hybrid few needles, though more
#   of other tasks (last table). Softmax in every layer doesn't learn the needles with it in as many steps.
# - **MiniMax-01's own recipe** (half rotary, no convolution, no norms of heads, no scale, no ramp) doesn't
#   learn them at this size and number of steps. Up to 4K it finds one in eight, which is a guess among
#   the eight values of the context: its softmax layer gives each needle about an eighth of its weight,
#   and can't tell them apart. That says nothing of a model two hundred thousand times as large.
#
# ## What it costs
#
# Memory is what a model pays. A lightning model's state doesn't grow: it moves straight down as
# contexts grow. Softmax keeps every token in every layer and finds what it kept.

# %%
draw("state")

# %%
best = [
    (model, length, *recall(group), group[0]["state_bytes"])
    for model, by_len in retrieval_report.by_length(rows).items()
    for length, group in by_len.items()
]
table = pd.DataFrame(best, columns=["model", "tokens", "found", "lo", "hi", "bytes"])
table = table.sort_values("tokens").groupby("model", sort=False).tail(1).set_index("model")
table["tokens"] = table.tokens.map(format_len)
table[["found", "lo", "hi"]] = (100 * table[["found", "lo", "hi"]]).round(1)
table.rename(columns={"tokens": "longest measured", "found": "found, %", "bytes": "bytes kept"})

# %% [markdown]
# ## Other tasks
#
# Harder ones than needles: distractors, lists of keys, several values under a key, nothing but pairs,
# chains of assignments, and counting, at which a state of fixed size is good.

# %%
draw("tasks")

# %%
tasks = pd.DataFrame([row for row in rows if row.get("suite") == "retrieval"])
tasks = tasks[(tasks.status == "ok") & (tasks.seed == 0) & (tasks.input != "text")]
shortest = tasks.groupby("task").q_len.transform("min")
tasks = tasks[(tasks.task != "needle") & (tasks.q_len == shortest)]
tasks = tasks.assign(model=tasks.model.str.removesuffix("-mqar"))
counts = tasks.groupby(["task", "q_len", "model"])[["correct", "n"]].sum()
(100 * counts.correct / counts.n).round(0).unstack()

# %% [markdown]
# These are percentages at the shortest length. Hybrids keep what softmax keeps, and with several values
# under a key they are ahead of it. Where there is nothing but pairs (`haystack`; at 256K there would be more
# than there are keys) all fall, as they were trained on 1K tokens of them at most, and the hybrid with fewest
# softmax layers first. Lightning falls everywhere but in counting (`frequent`), which needs no more than a
# sum. Zoology's MQAR is solved by softmax and by the hybrid; lightning's state holds 16 pairs, and
# of 64 loses two in five. Chains of assignments (`tracking`) were not learned: every model guesses
# among the eight values of the context, so that task tells no architecture from another.
#
# ## In text
#
# One hybrid was trained on bytes of text with sentences that hide numbers. It learned in part to tell
# them apart. Half of the needles in 512 bytes are found at the end of training, when the loss still falls;
# of eight needles it finds two or three, where a guess finds one, and the same up to 64K bytes, 32 times
# the longest it was trained on. At twice the learning rate it learned nothing.

# %%
draw("text")

# %% [markdown]
# ## Beside published figures
#
# Averages of RULER as the MiniMax-01 report gives them. These are large language models on text: they
# stand here for orientation, and no line above may be compared with them.

# %%
draw("ruler")

# %% [markdown]
# ## How they were trained
#
# Every architecture at every learning rate of a sweep; the rate with the best mean over all tasks and
# lengths is the one evaluated above. Where the rate is too high nothing is learned at all: the accuracy is
# that of a guess, and softmax fails at lower rates than the hybrids. MQAR is the other way round: softmax
# and lightning learn it in so many steps at the highest of three rates alone.

# %%
trained = trained_in(ROOT / (RUN or COMMITTED[0]))
show(retrieval_report.run_table(trained)) if trained else Markdown("*No runs lie beside the rows.*")

# %% [markdown]
# ## What that says of the claim
#
# MiniMax-01's report has the hybrid surpass softmax attention in retrieval and extrapolation, and finds
# linear layers alone unfit for it. One half shows here too: with a single softmax layer among eight, a
# hybrid that was trained on a thousand tokens finds nine needles in ten among four million, and its
# second seed all but one of 64, where linear layers alone, as the probe predicts, forget after a few
# thousand. It took a recipe that is not MiniMax-01's. The other half doesn't show with needles: softmax in
# every layer finds all of them as far as it was run, 1M tokens, where the hybrid misses a few. What a
# hybrid saves is memory, and the time to read. In its favour at this size: it learns at higher rates, and
# it finds several values under a key, of which softmax misses some.
