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
# # Linear versus softmax attention, measured
#
# This notebook reads the rows that `python bench/sweep.py` (or `make sweep`) wrote and looks at them
# from all sides: complexity, throughput, share of what the machine allows, memory, crossover, and
# error. It measures nothing itself, and no number below is typed in: run it again on another
# folder and every table, figure and sentence follows. What each field of a row means is written in
# `results/README.md`.

# %%
import io
import json
import sys
from pathlib import Path

sys.path.insert(
    0, next(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "bench").is_dir())
)

import pandas as pd
import PIL.Image
from IPython.display import Image, Markdown
from matplotlib import rc_context

from bench import findings
from bench.document import Table
from bench.fit import format_len
from bench.lines import (
    PASSES,
    by_configuration,
    describe,
    fastest,
    format_bytes,
    format_count,
    format_digits,
    format_ms,
    lines_of,
)
from bench.plan import ROOT
from bench.plots import STYLE, make_figure
from bench.rows import load_rows

pd.set_option("display.max_colwidth", None, "display.max_rows", None)

# %% [markdown]
# `RUN` names the folder, relative to the repository or absolute. None takes the newest run under
# `results/runs`, and where there is none the sample that the repository carries.

# %% tags=["parameters"]
RUN = None

# %%
if RUN is not None:
    folder = ROOT / RUN
else:
    written = [p for p in ROOT.glob("results/runs/*/rows.jsonl") if p.stat().st_size]
    newest = max(written, key=lambda p: p.stat().st_mtime, default=None)
    folder = newest.parent if newest else ROOT / "results" / "sample"

configurations = by_configuration(load_rows(folder / "rows.jsonl"))
rows = configurations[0]  # one shape, type and device; the largest set if there are several
data = pd.DataFrame(rows)
if "ok" not in set(data.status):
    raise ValueError(f"expected a run with a measured point, got {len(data)} without in {folder}")
manifest = json.loads((folder / "manifest.json").read_text())
ceilings = manifest["ceilings"][rows[0]["dtype"]]


def show(table: Table) -> Markdown:
    """A table of the report."""
    return Markdown(table.markdown())


def bullets(sentences: list[str]) -> Markdown:
    """Sentences, each computed from the rows."""
    return Markdown("\n".join(f"* {sentence}" for sentence in sentences))


def draw(name: str) -> Image | Markdown:
    """A figure of the report, with few colours so that this file stays small."""
    png = io.BytesIO()
    with rc_context(STYLE):
        figure = make_figure(name, rows)
        if figure is None:
            return Markdown("*No row has it.*")
        figure.savefig(png, dpi=90)
    small = io.BytesIO()
    PIL.Image.open(png).convert("RGB").quantize(64).save(small, "png", optimize=True)
    return Image(small.getvalue())


def by_length(field: str, text) -> pd.DataFrame:
    """Measured values of a field as text, a row a length and a column a backend and pass."""
    measured = data[(data.status == "ok") & data[field].notna()]
    wide = measured.pivot_table(field, "q_len", ["pass", "op", "backend"])
    wide = wide.reindex(columns=[name for name in PASSES if name in wide.columns], level="pass")
    wide = wide.rename(columns=PASSES, level="pass").rename(index=format_len)
    return wide.rename_axis(index="tokens").map(lambda x: text(x) if pd.notna(x) else findings.NONE)


shown = folder.relative_to(ROOT) if folder.is_relative_to(ROOT) else folder
others = f" ({len(configurations) - 1} more in this folder)" if configurations[1:] else ""
Markdown(
    f"`{shown}`, measured with {describe(rows)}{others}, torch {manifest['versions']['torch']}, "
    f"{manifest['machine']['threads']} CPU threads. Measured ceilings in the same run: "
    f"{format_digits(1e3 * ceilings['matmul_tflops'])} GFLOP/s in a matrix product and "
    f"{format_digits(ceilings['copy_gbps'])} GB/s in a copy. {findings.status_counts(rows)}"
)

# %% [markdown]
# ## What was measured, and what was not
#
# Before a point runs, its time and memory are predicted, and it is left out if they exceed the
# budgets. Such a point is still a row, with the prediction in it. A point counts as measured only if
# its result was within the accuracy gate at its own length. The naive form, softmax with all its scores in
# memory (`reference`), takes part so that its wall is visible.

# %%
words = {"ok": "measured"} | {s: s.replace("_", " ") for s in data.status.unique() if s != "ok"}
longest = data[data.status == "ok"].groupby(["op", "backend", "pass"]).q_len.max()
counts = data.groupby(["op", "backend", "pass"]).status.value_counts().unstack(fill_value=0)
counts.insert(0, "longest measured", longest.map(format_len))
counts.reindex(list(PASSES), level="pass").rename(columns=words, index=PASSES).rename_axis(
    columns=None
)

# %% [markdown]
# The points that were left out, with what they would have taken:

# %%
skipped = data[data.status != "ok"].sort_values(["op", "backend", "pass", "q_len"])
pd.DataFrame(
    {
        "series": skipped.op + " " + skipped.backend,
        "pass": skipped["pass"].map(PASSES),
        "tokens": skipped.q_len.map(format_len),
        "status": skipped.status.map(words),
        "predicted time": skipped.pred_ms.map(format_ms, na_action="ignore"),
        "predicted memory": skipped.pred_bytes.map(format_bytes, na_action="ignore"),
        "reason": skipped.reason,
    }
).set_index(["series", "pass", "tokens"])

# %% [markdown]
# ## Complexity
#
# A linear op takes twice as long for twice the tokens, a quadratic one four times: the exponent of
# time in length, taken octave by octave, should come to 1 and 2. Short lengths tell nothing about it,
# because there the cost of a call hides the cost of its tokens. An exponent is therefore fitted to
# the longest lengths only, with a 95 % interval and with the window it used.

# %%
draw("exponent")

# %%
show(findings.exponent_table(rows))

# %% [markdown]
# In sentences:

# %%
bullets(findings.findings(rows))

# %% [markdown]
# ## Time, and where the lines cross
#
# Filled markers are measurements, hollow ones on dashed lines the predictions of skipped points. The
# dotted line is the crossover: the length from which lightning is the faster of the two ops, each
# with its fastest backend. Its interval comes from resampling the timed calls. A crossover that
# was not seen is given as lying beyond the measured range, never extrapolated.

# %%
draw("time")

# %%
show(findings.crossover_table(rows))


# %%
def at_the_longest_length(pass_name: str) -> list[str]:
    """How softmax compares with lightning at the longest length that lightning was measured at."""
    lines = lines_of(rows, pass_name)
    soft, light = fastest(lines, "softmax"), fastest(lines, "lightning")
    if soft is None or light is None:
        return []
    last = max(light.points(), key=lambda p: p.q_len)
    row = next((row for row in soft.rows if row["q_len"] == last.q_len), {})
    ms, verb = (row.get("ms_median"), "takes") if row.get("status") == "ok" else (None, "")
    if ms is None and row.get("pred_ms"):
        ms, verb = row["pred_ms"], "would by its prediction take"
    if ms is None:
        return []
    return [
        f"{PASSES[pass_name].capitalize()} at {format_len(last.q_len)} tokens: {light.name} takes "
        f"{format_ms(last.ms_median)}; {soft.name} {verb} {format_ms(ms)}, "
        f"{format_digits(ms / last.ms_median)} times as much."
    ]


bullets([sentence for name in PASSES for sentence in at_the_longest_length(name)])

# %% [markdown]
# All times; a number in italics with a ~ is a prediction of a skipped point.

# %%
tables = [
    f"**{words}**\n\n{findings.time_table(lines).markdown()}"
    for words, lines in findings.passes_of(rows)
]
Markdown("\n\n".join(tables))

# %% [markdown]
# ## Throughput
#
# The same times as tokens a second. A linear op holds its level however long the text; a quadratic
# one loses half of it with each octave. A decode step makes one token, so there it is steps a second.

# %%
draw("throughput")

# %%
by_length("tokens_per_s", format_count)

# %% [markdown]
# ## Share of the limit
#
# An exponent says how an op grows, not whether its code is good. For that, each row carries the
# least time that its counted operations and its least traffic would take at the ceilings measured on
# the same machine. 100 % is a call at that limit.

# %%
draw("share")

# %%
measured = data[(data.status == "ok") & data.share_of_limit.notna()]
best = measured.loc[measured.groupby(["op", "backend", "pass"]).share_of_limit.idxmax()]
best = best.set_index(["op", "backend", "pass"]).reindex(list(PASSES), level="pass")
pd.DataFrame(
    {
        "best share": best.share_of_limit.map("{:.0%}".format),
        "at": best.q_len.map(format_len),
        "bound by": best.limit,
    }
).rename(index=PASSES)

# %% [markdown]
# ## Memory
#
# Peak memory of a call, inputs included. A steep line is a score matrix, a line as steep as the
# inputs' own is linear, and lightning's decode state does not grow at all.

# %%
draw("memory")

# %%
by_length("peak_bytes", format_bytes)

# %% [markdown]
# ## Error
#
# Every timed call was compared with float64 first. Where rounding piles up over the sequence a
# line would rise with the length.

# %%
draw("error")

# %%
checked = data[(data.status == "ok") & data.error_ratio.notna()]
worst = checked.loc[checked.groupby(["op", "backend", "pass"]).error_ratio.idxmax()]
worst = worst.set_index(["op", "backend", "pass"]).reindex(list(PASSES), level="pass")
pd.DataFrame(
    {
        "largest error / gate's limit": worst.error_ratio.map("{:.2f}".format),
        "at": worst.q_len.map(format_len),
        "rms error": worst.error_rms.map("{:.1e}".format),
    }
).rename(index=PASSES)

# %% [markdown]
# ## Your own machine
#
# `make sweep` writes a folder under `results/runs`; run this notebook again and it shows that one.
# `python bench/compare.py RUN_A RUN_B` says point by point whether two runs differ.
