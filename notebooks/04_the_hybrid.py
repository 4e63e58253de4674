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
# # The hybrid: what it costs by length
#
# MiniMax-Text-01 has ten softmax layers among eighty; the others are lightning attention. This notebook
# counts what that saves: operations and bytes by length of the context, for the released config and for
# two stacks of the same number of parameters, softmax alone and lightning alone. It ends with money:
# what a million tokens cost on rented GPUs under assumptions that are written down, beside the price
# that MiniMax published. All of it is counted from the config (`attnlab.model.costs`); nothing is
# measured here, and what a real kernel reaches is in notebook 02.

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
import torch
from IPython.display import Image, Markdown
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from attnlab.model import HybridConfig, costs
from attnlab.model.config_json import FULL, LINEAR
from bench.fit import format_len
from bench.lines import format_bytes
from bench.published import MINIMAX_PRICES
from bench.recall_axes import STYLE, length_axis

# %% [markdown]
# The assumptions, all of them: change them and run the notebook again. The price of a GPU hour is in
# yuan; rates and memory are those of one H200 (dense 16 bits). The shares that a server reaches of them
# are assumed: in a prefill the 75 % that the report claims, in decoding half of the memory's rate.

# %% tags=["parameters"]
GPU_HOUR_YUAN = 20.0
PEAK_TFLOPS = 989.0
PEAK_GBPS = 4800.0
PREFILL_MFU = 0.75
DECODE_SHARE = 0.5  # of peak memory bandwidth
GPU_GB = 141.0
GPUS = 8  # that hold the model
MAX_BATCH = 512  # sequences that decode together, where their caches fit beside the weights

# %%
base = HybridConfig.minimax_01()
MODELS = {
    "softmax": (base.all_softmax(), "#D55E00"),
    "hybrid 7:1": (base, "#009E73"),
    "lightning": (base.all_lightning(), "#0072B2"),
}
LENGTHS = [1 << power for power in range(10, 23)]


def draw(title: str, label: str, curves: dict[str, list[float]], text, base: int = 10) -> Image:
    """Curves over LENGTHS, one a model, and dashed what isn't one; `base` of the axis, 0 for linear.

    Few colours, so that this file stays small.
    """
    with rc_context(STYLE):
        figure = Figure((8.0, 4.6), layout="constrained")
        axes = figure.subplots()
        length_axis(axes, LENGTHS)
        for (name, values), marker in zip(curves.items(), "osv^DP", strict=False):
            style = {"color": "#333333", "linestyle": "--"}
            if name in MODELS:
                style = {"color": MODELS[name][1], "marker": marker, "markersize": 4}
            axes.plot(LENGTHS, values, label=name, **style)
        if base:
            axes.set_yscale("log", base=base)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: text(y)))
        axes.set_xlabel("tokens in the context")
        axes.set_ylabel(label)
        axes.legend()
        figure.suptitle(title)
        png = io.BytesIO()
        figure.savefig(png, dpi=90)
    small = io.BytesIO()
    PIL.Image.open(png).convert("RGB").quantize(64).save(small, "png", optimize=True)
    return Image(small.getvalue())


pd.DataFrame(
    {
        name: {
            "softmax layers": config.layer_types.count(FULL),
            "lightning layers": config.layer_types.count(LINEAR),
            "parameters, billions": round(config.num_parameters() / 1e9, 1),
            "active, billions": round(config.num_active_parameters() / 1e9, 1),
        }
        for name, (config, _) in MODELS.items()
    }
).transpose()

# %% [markdown]
# A lightning layer has more than twice the parameters of a softmax layer whose heads share keys; the
# width of the experts makes up for it, of which a token meets two in 32. So the stacks are equal in all
# parameters, and unequal in active ones.
#
# ## Operations
#
# A prefill's operations per token of the prompt. Where a curve is flat the experts and projections make
# up the cost; where it rises, each token pays for all tokens before it.

# %%
per_token = {
    name: [costs.prefill_flops(config, n) / n for n in LENGTHS]
    for name, (config, _) in MODELS.items()
}
draw("Operations of a prefill", "per token of the prompt", per_token, lambda y: f"{y / 1e9:g}G")

# %%
last = {name: values[-1] for name, values in per_token.items()}
first = {name: values[0] for name, values in per_token.items()}
Markdown(
    "\n".join(
        f"* {name}: {last[name] / first[name]:.2f} times the operations per token at "
        f"{format_len(LENGTHS[-1])} as at {format_len(LENGTHS[0])}."
        for name in MODELS
    )
)

# %% [markdown]
# What part of them is softmax attention between its projections, in the hybrid and in the softmax stack?

# %%
shares = {
    name: [
        costs._attention_flops(config, FULL, n, n) / costs.prefill_flops(config, n) for n in LENGTHS
    ]
    for name, (config, _) in MODELS.items()
    if FULL in config.layer_types
}
draw(
    "Softmax attention's share of a prefill",
    "of all operations",
    shares,
    "{:.0%}".format,
    base=0,
)

# %%
half = {
    name: next((n for n, share in zip(LENGTHS, values, strict=True) if share > 0.5), None)
    for name, values in shares.items()
}
Markdown(
    "\n".join(
        f"* {name}: softmax attention is more than half of the work "
        + (f"from {format_len(n)} on." if n else f"at no length up to {format_len(LENGTHS[-1])}.")
        for name, n in half.items()
    )
)

# %% [markdown]
# ## Memory
#
# Bytes that a sequence occupies: keys and values of the softmax layers in bfloat16, states of the
# lightning layers in float32.

# %%
held = {
    name: [costs.cache_bytes(config, n, 1, torch.bfloat16) for n in LENGTHS]
    for name, (config, _) in MODELS.items()
}
draw("Bytes that a sequence occupies", "cache of one sequence", held, format_bytes, base=2)

# %%
pd.DataFrame(
    {name: {format_len(n): format_bytes(b) for n, b in zip(LENGTHS, values, strict=True)}
     for name, values in held.items()}
).iloc[::3]  # fmt: skip

# %% [markdown]
# At 4M tokens it is the softmax layers that fill a GPU, in the hybrid too.
#
# ## Money
#
# A prompt costs its operations. A decoding step reads the weights once for the whole batch, and the cache
# of every sequence in it; or it takes as long as its operations. The batch is as large as memory allows:
# long contexts make it small, and the weights are then read for few tokens. In a large batch every
# expert is busy, so all weights are read. Where not even one sequence fits, there is no price.


# %%
def yuan_per_million(seconds_per_token: float) -> float:
    """Price of a million tokens on the assumed GPUs."""
    return 1e6 * seconds_per_token * GPUS * GPU_HOUR_YUAN / 3600


def input_price(config: HybridConfig, length: int) -> float:
    """Yuan for a million tokens of prompts of some length."""
    rate = GPUS * PEAK_TFLOPS * 1e12 * PREFILL_MFU
    return yuan_per_million(costs.prefill_flops(config, length) / length / rate)


def batch_of(config: HybridConfig, length: int) -> int:
    """Sequences of some length whose caches fit beside bfloat16 weights, at most MAX_BATCH."""
    room = GPUS * GPU_GB * 1e9 - 2 * config.num_parameters()
    return min(MAX_BATCH, int(room // costs.cache_bytes(config, length, 1, torch.bfloat16)))


def output_price(config: HybridConfig, length: int) -> float:
    """Yuan for a million tokens behind contexts of some length; NaN where not one of them fits."""
    batch = batch_of(config, length)
    if batch < 1:
        return math.nan
    read = 2 * config.num_parameters()
    read += batch * costs.cache_bytes(config, length, 1, torch.bfloat16)
    by_memory = read / (GPUS * PEAK_GBPS * 1e9 * DECODE_SHARE)
    work = batch * costs.decode_flops(config, length)
    by_compute = work / (GPUS * PEAK_TFLOPS * 1e12 * PREFILL_MFU)
    return yuan_per_million(max(by_memory, by_compute) / batch)


def priced(kind: str, price) -> Image:
    """The price by length of every stack, with the published one."""
    published = 1000 * MINIMAX_PRICES[kind]
    curves = {name: [price(config, n) for n in LENGTHS] for name, (config, _) in MODELS.items()}
    curves |= {f"published price: {published:g} yuan": [published] * len(LENGTHS)}
    title = f"Cost of a million {kind} tokens at {GPU_HOUR_YUAN:g} yuan a GPU hour (assumed rates)"
    return draw(title, "yuan", curves, "{:g}".format)


priced("input", input_price)

# %%
priced("output", output_price)

# %% [markdown]
# The published prices are those of MiniMax-Text-01's API: 0.001 yuan for a thousand tokens of input and
# 0.008 for output, whatever their place in the context. A flat price is only possible where the curve is
# flat, and this is how far it is:

# %%
rows = []
for name, (config, _) in MODELS.items():
    for kind, price in (("input", input_price), ("output", output_price)):
        paid = [n for n in LENGTHS if price(config, n) <= 1000 * MINIMAX_PRICES[kind]]
        rows.append(
            {
                "stack": name,
                "tokens": kind,
                "covered by the price up to": format_len(max(paid)) if paid else "nowhere",
            }
        )
pd.DataFrame(rows).pivot(index="stack", columns="tokens", values="covered by the price up to")

# %% [markdown]
# Where a batch has to shrink is where output tokens get dear:

# %%
pd.DataFrame(
    {
        name: {format_len(n): batch_of(config, n) for n in LENGTHS}
        for name, (config, _) in MODELS.items()
    }
).iloc[::2].rename_axis("tokens in each context")
