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
# # Lightning attention from scratch
#
# Lightning attention is the linear attention of MiniMax-01
# ([arXiv 2501.08313](https://arxiv.org/abs/2501.08313), kernels in
# [arXiv 2401.04658](https://arxiv.org/abs/2401.04658)). This notebook builds it from its
# definition: the recurrence, the mask that it hides, the chunked form that hardware likes, and
# what a chunk costs. Each form is checked against the one before it. At the end stand the decay
# rates of MiniMax-01 itself, and how far back each of its heads can look.
#
# Shapes in the comments: `H` heads, `T` tokens, `K` key dim, `V` value dim, `C` tokens a chunk.
# Where key and value have the same dimension it is `D`.

# %%
import math
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(
    0, next(str(p) for p in (Path.cwd(), *Path.cwd().parents) if (p / "bench").is_dir())
)

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch
from IPython.display import Markdown
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle
from torch import Tensor

import attnlab
from attnlab import testing
from bench.fit import format_len
from bench.lines import format_bytes

# %matplotlib inline
plt.rcParams |= {"figure.dpi": 80, "font.size": 10, "figure.constrained_layout.use": True}
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#777777"

# %% [markdown]
# ## The recurrence
#
# A head keeps a matrix $S$ of shape $K \times V$. Each token fades it by a fixed factor
# $\lambda = e^{g}$, $g \le 0$, writes one outer product into it, and reads it with its query:
#
# $$S_t = \lambda\, S_{t-1} + k_t v_t^\top \qquad o_t = S_t^\top q_t$$
#
# There is no softmax, no normaliser and no $1/\sqrt{D}$, and a token reads what it has just
# written. The decay belongs to the head: it depends neither on the token nor on the channel. That
# sentence is already a program.


# %%
def recurrence(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """Output `[H, T, V]` and final state `[H, K, V]` of `[H, T, K]`, `[H, T, V]` and `[H]`."""
    state = q.new_zeros(len(g), q.shape[2], v.shape[2])
    outputs = []
    for t in range(q.shape[1]):
        state = torch.exp(g)[:, None, None] * state + k[:, t, :, None] * v[:, t, None, :]
        outputs.append(torch.einsum("hk,hkv->hv", q[:, t], state))
    return torch.stack(outputs, dim=1), state


# %% [markdown]
# Inputs to try it on: four heads with the decays that MiniMax-01's first layer would give them, and
# a length that no power of two divides. `attnlab.reference` holds the definitions that every
# backend of this repository is judged by; in float64 it is the oracle.

# %%
problem = attnlab.Problem(
    op="lightning_attention",
    batch=1,
    heads=4,
    kv_heads=4,
    q_len=300,
    kv_len=300,
    key_dim=64,
    value_dim=64,
    dtype=torch.float32,
    device="cpu",
)
inputs = testing.make_inputs(problem, with_state=False)
inputs = replace(inputs, log_decay=attnlab.minimax_log_decay(4, layer=0, num_layers=80))
exact = testing.lightning_oracle(inputs)

# One sequence, so the batch dimension is left out below.
q, k, v, g = inputs.query[0], inputs.key[0], inputs.value[0], inputs.log_decay
output, state = recurrence(*(x.double() for x in (q, k, v, g)))
torch.testing.assert_close(output, exact["output"][0])
torch.testing.assert_close(state, exact["final_state"][0])
print("decay factors:", np.round(torch.exp(g).numpy(), 4))

# %% [markdown]
# ## Unrolled, it is attention with a mask that fades
#
# Put the recurrence into itself until only $k_j v_j^\top$ are left:
#
# $$o_t = \sum_{j \le t} \lambda^{t-j} \, (q_t \cdot k_j) \, v_j
# \qquad\Longleftrightarrow\qquad
# O = \big(QK^\top \odot M\big) V, \quad M_{tj} = \begin{cases}\lambda^{t-j} & j \le t\\ 0 & j > t\end{cases}$$
#
# This is causal attention whose scores are used as they are, times a mask that depends on the
# distance alone. With $\lambda = 1$ the mask is the usual lower triangle of ones; a fast head sees
# a narrow band along the diagonal.


# %%
def decay(g: Tensor, distance: Tensor) -> Tensor:
    """exp(g * distance), and 0 for negative distances: `[H, *distance.shape]`."""
    g = g.view(-1, *[1] * distance.ndim)
    return torch.where(distance >= 0, torch.exp(g * distance.clamp(min=0)), 0.0)


t = torch.arange(96)
slopes = -attnlab.minimax_log_decay(64, layer=0, num_layers=80)[[15, 31, 63]]  # of 64 heads
figure, axes = plt.subplots(1, 3, figsize=(9.5, 3.6), sharey=True)
for ax, slope, mask in zip(axes, slopes, decay(-slopes, t[:, None] - t), strict=True):
    image = ax.imshow(mask, cmap="viridis", vmin=0, vmax=1)
    ax.set_title(f"g = -{slope:.3g}\n1/e after {1 / slope:.0f} tokens", fontsize=10)
    ax.set_xlabel("key j")
axes[0].set_ylabel("query t")
figure.colorbar(image, ax=axes, label="weight of the score")
figure.suptitle("The mask of three heads of MiniMax-01's first layer, 96 tokens")
plt.show()

# %%
scores = (q @ k.mT).double() * decay(g.double(), torch.arange(300)[:, None] - torch.arange(300))
torch.testing.assert_close(scores @ v.double(), exact["output"][0], rtol=1e-5, atol=1e-4)

# %% [markdown]
# So there are two programs for one function. The recurrence needs $T$ steps one after the other,
# each a sliver of work; the mask form is all matrix products but has $T^2$ scores.
#
# ## Chunks: both at once
#
# Cut the sequence into chunks of $C$ tokens. For a token in some chunk, the sum over $j$ falls into
# two parts: keys in its own chunk, and everything before. The second part is exactly what the state
# at the chunk's start holds, because $\lambda^{t-j}$ splits at the border:
#
# $$\lambda^{t-j} = \underbrace{\lambda^{i+1}}_{\text{border to query}} \cdot
# \underbrace{\lambda^{\text{border}-j}}_{\text{inside } S}
# \qquad\Rightarrow\qquad
# o_i = \underbrace{\sum_{j \le i} \lambda^{i-j} (q_i \cdot k_j)\, v_j}_{\text{own chunk: } C \times C \text{ scores}}
# \;+\; \underbrace{\lambda^{i+1}\, S^\top q_i}_{\text{all earlier chunks}}$$
#
# with $i, j$ counted from 0 inside the chunk and $S$ the state after the last token before it.
# Softmax has no such split: its normaliser ties every score to every other. In the picture only
# the blue tiles are ever computed as scores. The orange rest of a row of tiles, however long, is one
# product of the chunk's queries with one $K \times V$ matrix: the state after the chunk before.

# %%
num_tokens, chunk = 64, 16
t = torch.arange(num_tokens)
mask = decay(torch.tensor([-0.03]), t[:, None] - t)[0].numpy()
own_chunk = (t[:, None] // chunk == t // chunk).numpy()

figure, ax = plt.subplots(figsize=(6.2, 5.2))
for tiles, cmap in ((own_chunk, "Blues"), (~own_chunk, "Oranges")):
    shown = np.ma.masked_where(~tiles | (mask == 0), 0.25 + 0.75 * mask)
    ax.imshow(shown, cmap=cmap, vmin=0, vmax=1.25, extent=(0, num_tokens, num_tokens, 0))
for n, start in enumerate(range(0, num_tokens, chunk)):
    ax.add_patch(Rectangle((start, start), chunk, chunk, fill=False, lw=1.5, ec=BLUE))
    ax.text(start + chunk - 1, start + 2, f"scores {n}", ha="right", va="top", color=BLUE)
    if n:
        ax.add_patch(Rectangle((0, start), start, chunk, fill=False, lw=1.5, ec=ORANGE))
        label = f"queries {n} ×\nstate {n - 1}"
        ax.text(start / 2, start + chunk / 2, label, ha="center", va="center")
ax.text(45, 8, "not visible (causal)", ha="center", va="center", color=GREY)
ticks = range(0, num_tokens + 1, chunk)
ax.set(xlabel="key j", ylabel="query t", xticks=ticks, yticks=ticks)
ax.set_title(f"{num_tokens} tokens in chunks of {chunk} (darker: weighs more)", fontsize=11)
plt.show()

# %% [markdown]
# The state moves from border to border in one step, fading by $\lambda^C$ and taking in the chunk's
# writes, each faded by its distance to the chunk's end. That is all there is to the algorithm:


# %%
def chunked(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int) -> tuple[Tensor, Tensor]:
    """What `recurrence` returns, `chunk` tokens a step."""
    state = q.new_zeros(len(g), q.shape[2], v.shape[2])  # [H, K, V]
    outputs = []
    for qc, kc, vc in zip(*(x.split(chunk, dim=1) for x in (q, k, v)), strict=True):
        i = torch.arange(qc.shape[1])
        inside = decay(g, i[:, None] - i)  # [H, C, C]
        since_start = decay(g, i + 1)[..., None]  # [H, C, 1]
        until_end = decay(g, len(i) - 1 - i)[..., None]  # [H, C, 1]
        outputs.append((qc @ kc.mT * inside) @ vc + since_start * (qc @ state))
        state = torch.exp(g * len(i))[:, None, None] * state + (until_end * kc).mT @ vc
    return torch.cat(outputs, dim=1), state


# %% [markdown]
# Is it right? "Close" needs a yardstick. `attnlab.testing` takes the float64 oracle and a plain
# float32 baseline with chunks of 64, and allows twice the baseline's largest and rms error and a few
# roundings on top, so no loose tolerance is needed that would let a lost decay step through.
# `accuracy` measures, `assert_as_accurate` insists.

# %%
baseline = testing.lightning_baseline(inputs)
found = {}
for size in (1, 4, 16, 64, 100, 300):
    output, state = chunked(q, k, v, g, size)
    if size > 1:
        testing.assert_as_accurate(output[None], exact["output"], baseline["output"])
        testing.assert_as_accurate(state[None], exact["final_state"], baseline["final_state"])
    found[size] = testing.accuracy(output[None], exact["output"], baseline["output"])
table = {
    "rms error": [f"{x.rms:.1e}" for x in found.values()],
    "error / allowed": [f"{x.ratio:.2f}" for x in found.values()],
}
pd.DataFrame(table, index=pd.Index(found, name="chunk"))

# %% [markdown]
# Any chunk size gives the same function, from the recurrence (1) to the whole mask (300). In float32
# it does not give the same error: the recurrence rounds the whole state at every token and is the
# one row that would not pass as an implementation, which is why the loop does not ask it to. Chunks
# touch the state less often. They are not only the faster form but also the more exact one.
#
# A result that lacks one decay step at each border does not pass either:


# %%
def chunked_with_a_bug(q: Tensor, k: Tensor, v: Tensor, g: Tensor, chunk: int) -> Tensor:
    """As `chunked`, but the state reaches token i with exp(g i): one step is missing."""
    output, _ = chunked(q, k, v, g, chunk)
    for start in range(chunk, q.shape[1], chunk):
        own = slice(start, start + chunk)
        _, state = chunked(q[:, :start], k[:, :start], v[:, :start], g, chunk)
        i = torch.arange(q[:, own].shape[1])
        missing = decay(g, i) - decay(g, i + 1)
        output[:, own] += missing[..., None] * (q[:, own] @ state)
    return output


try:
    wrong = chunked_with_a_bug(q, k, v, g, 64)[None]
    testing.assert_as_accurate(wrong, exact["output"], baseline["output"])
except AssertionError as error:
    print("caught:", error)

# %% [markdown]
# ### Why every exponent above is negative
#
# It is tempting to split $\lambda^{i-j}$ into $\lambda^{i} \cdot \lambda^{-j}$, multiply queries
# and keys by these once, and be left with ordinary causal linear attention. But $\lambda^{-j}$
# grows without bound, and a fast head leaves the range of float32 within a hundred tokens. The
# chunked form only takes $\lambda$ to powers of at least zero, so nothing can overflow at any length;
# what underflows to zero has in truth been forgotten.

# %%
fastest_slope = -attnlab.minimax_log_decay(64, layer=0, num_layers=80)[0].double()
last = math.floor(math.log(torch.finfo(torch.float32).max) / fastest_slope)
print(f"largest j with a finite float32 exp({fastest_slope:.3f} j): {last}")
print("at the next token:", torch.exp(fastest_slope * (last + 1)).float().item())

# %% [markdown]
# ## What a token costs, and the choice of C
#
# Count multiplications and additions of one token and head, $K = V = D$:
#
# * its chunk: $q k^\top$ and scores times $v$, $2CD$ each (the blue tile is computed whole)
# plt.show()
# * the state: $q S$ and $k v^\top$, $2D^2$ each.
#
# Together $4CD + 4D^2$, whatever the length. Causal softmax costs $4D$ for each visible key, on
# average $2TD$ a token. The two are equal at $T = 2C + 2D$: from there on, counted work favours
# lightning, and the gap doubles with each doubling of the length.


# %%
def lightning_flops(chunk: np.ndarray | int, dim: int) -> np.ndarray | int:
    """Operations of one token and head, forward."""
    return 4 * chunk * dim + 4 * dim**2


# The counting that all of this repository's measurements use is the same, with C = 64.
one_head = replace(problem, heads=1, kv_heads=1, key_dim=128, value_dim=128)
assert one_head.flops("fwd") == one_head.q_len * lightning_flops(64, 128)

dim, sizes = 128, 2 ** np.arange(0, 13)
figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.9))
left.stackplot(
    sizes,
    np.full(len(sizes), 4 * dim**2) / 1e3,
    4 * sizes * dim / 1e3,
    labels=["state: 4D²", "own chunk: 4CD"],
    colors=["#F3C9A5", "#A8CCE4"],
)
left.axvline(dim, color="black", lw=1, ls=":")
left.annotate(" C = D: equal parts", (dim, 900), fontsize=9)
left.set(ylabel="thousand operations per token and head", ylim=(0, 1000), xlim=(1, 2048))
left.set_title("Work: small chunks are cheap ...")
left.legend(loc="upper left")
traffic = 2 * 4 * dim**2 / sizes  # the state is read and written once a chunk, in float32
right.plot(sizes, traffic / 4 / (4 * dim), color=ORANGE, marker="o", ms=4)
right.axhline(1, color="black", lw=1, ls=":")
right.annotate("as much as q, k, v and o themselves", (1.2, 0.55), va="top", fontsize=9)
right.set_yscale("log")
right.yaxis.set_major_formatter("{x:g}")
right.set(ylabel="state traffic / traffic of q, k, v, o", xlim=(1, 2048))
right.set_title("... but touch the state too often")
for ax in (left, right):
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes[:12:2], [format_len(n) for n in sizes[:12:2]])
    ax.set_xlabel("chunk size C")
figure.suptitle(f"One token of one head, D = {dim}, float32")
plt.show()

# %% [markdown]
# The left picture would say $C = 1$. It leaves out that a state that does not stay on the chip is
# read and written once a chunk (right), and that a matrix unit wants tiles of at least 16 rows.
# Chunks of 64 to 256 are where the state's traffic has become small and the blue part has not yet
# taken over. The right picture is also why generating one token at a time, $C = 1$ by nature, is
# bound by memory and not by arithmetic.
#
# ## The same through the public API
#
# `attnlab.lightning_attention` does all this for `[B, H, T, D]` tensors, with a backward pass. Its
# chunk size is the backend's business. The state goes in and comes out, so a long text can be read
# in pieces, and generation goes on from where reading stopped.

# %%
state, pieces = None, []
for start, stop in ((0, 150), (150, 290)):  # read in two pieces
    piece = (x[:, :, start:stop] for x in (inputs.query, inputs.key, inputs.value))
    result = attnlab.lightning_attention(*piece, g, initial_state=state, return_final_state=True)
    pieces.append(result.output)
    state = result.final_state
for n in range(290, 300):  # then one token at a time; `state` is overwritten in place
    token = (x[:, :, n : n + 1] for x in (inputs.query, inputs.key, inputs.value))
    pieces.append(attnlab.lightning_decode_(*token, g, state))
testing.assert_as_accurate(torch.cat(pieces, dim=2), exact["output"], baseline["output"])
testing.assert_as_accurate(state, exact["final_state"], baseline["final_state"])

backends = attnlab.list_backends("lightning_attention")
reasons = [attnlab.why_not("lightning_attention", name, problem) or "runs" for name in backends]
pd.Series(reasons, index=backends, name="lightning_attention on this machine").to_frame()

# %% [markdown]
# What a sequence leaves behind differs as much as the arithmetic does. A lightning head keeps its
# state, a softmax head keeps every key and value:

# %%
state_bytes = 4 * 128 * 128
lengths = [2**10, 2**15, 2**20, 2**22]
cache = [2 * 128 * 2 * n for n in lengths]  # key and value in 16 bits
pd.DataFrame(
    {
        "lightning state (float32)": [format_bytes(state_bytes)] * len(lengths),
        "softmax cache (16 bits)": [format_bytes(n) for n in cache],
    },
    index=pd.Index([format_len(n) for n in lengths], name="tokens so far, one head, D = 128"),
)

# %% [markdown]
# ## How far back MiniMax-01's heads can see
#
# The decays are not learned. In MiniMax-01 head $h = 1 \dots 64$ of layer $l = 0 \dots 79$ has
#
# $$g_{h,l} = -2^{-8h/64} \left(1 - \frac{l}{79} + 10^{-5}\right)$$
#
# so a write has faded to $1/e$ after $1/|g|$ tokens. Every eighth layer (7, 15, ..., 79) is a
# softmax layer and has no decay. The formula alone gives the memory of all lightning heads:

# %%
num_layers, num_heads = 80, 64
decays = torch.stack(
    [attnlab.minimax_log_decay(num_heads, n, num_layers) for n in range(num_layers)]
)
is_softmax = torch.arange(num_layers) % 8 == 7
horizon = attnlab.decay_horizon(decays, remaining=math.exp(-1)).numpy()  # [layers, heads], tokens

figure, ax = plt.subplots(figsize=(8, 5.4))
shown = np.ma.masked_where(is_softmax.numpy()[:, None] & np.ones_like(horizon, dtype=bool), horizon)
extent = (0.5, num_heads + 0.5, num_layers - 0.5, -0.5)
image = ax.imshow(shown, norm=LogNorm(1, 3e4), cmap="viridis", extent=extent, aspect="auto")
for layer in np.flatnonzero(is_softmax):
    ax.add_patch(
        Rectangle((0.5, layer - 0.5), num_heads, 1, fc="white", ec=GREY, lw=0, hatch="/////")
    )
ax.set(xlabel="head", ylabel="layer", xticks=[1, 16, 32, 48, 64])
ax.set_yticks(range(7, num_layers, 8))
ax.set_title("Memory of MiniMax-01's heads (hatched: softmax layers, no decay)")
figure.colorbar(image, label="tokens until a write has faded to 1/e", format="{x:,.0f}")
plt.show()

# %% [markdown]
# The slow heads sit in the late layers: the layer factor falls to almost nothing at the very end. The
# layer where it would reach $10^{-5}$ is the last one, and that one is a softmax layer.

# %%
lightning = decays[~is_softmax].double()  # [70 layers, heads]
slowest = lightning.max()
layer = int(np.flatnonzero(~is_softmax)[lightning.max(dim=1).values.argmax()])


def tokens_until(remaining: float) -> str:
    """Tokens after which the slowest lightning head has faded to `remaining`."""
    return f"{attnlab.decay_horizon(slowest, remaining).item():,.0f}"


relay = attnlab.decay_horizon(lightning.max(dim=1).values, math.exp(-1)).sum().item()
Markdown(
    f"""
* The slowest lightning head of the whole model (layer {layer}) is down to 1/e after
  **{tokens_until(math.exp(-1))}** tokens, to 1 % after **{tokens_until(0.01)}**, and below the
  rounding of float32 beside a fresh write after **{tokens_until(2.0**-24)}**.
* Half of the {lightning.numel():,} lightning heads are down to 1/e within
  **{attnlab.decay_horizon(lightning.median(), math.exp(-1)).item():,.0f}** tokens.
* Over 1,000,000 tokens the slowest head multiplies a write by
  **10^{1e6 * slowest.item() / math.log(10):.0f}**.
* A relay that hands a fact on through the slowest head of each of the {len(lightning)} lightning
  layers, losing a factor e in each, spans **{relay:,.0f}** tokens.
"""
)

# %%
distance = np.logspace(0, 22, 200, base=2)
figure, ax = plt.subplots(figsize=(7.5, 3.9))
for remaining, words, style in ((math.exp(-1), "1/e", "-"), (0.01, "1 %", "--")):
    reach = np.sort(attnlab.decay_horizon(lightning, remaining).numpy().ravel())
    holding = 100 * (1 - np.searchsorted(reach, distance) / len(reach))
    ax.plot(
        distance, holding, style, color=BLUE, label=f"lightning: at least {words} of a write left"
    )
ax.axhline(100, color=ORANGE, lw=2, label="softmax heads: no decay at any distance")
ax.set_xscale("log", base=2)
ticks = 2.0 ** np.arange(0, 23, 4)
ax.set_xticks([*ticks, 2.0**22], [format_len(n) for n in [*ticks, 2.0**22]])
ax.set(xlabel="distance in tokens", ylabel="share of the heads, %", ylim=(0, 108))
ax.legend(loc="center right", bbox_to_anchor=(1, 0.62))
ax.set_title("Share of MiniMax-01's heads that still hold a write")
plt.show()

# %% [markdown]
# ## What follows
#
# MiniMax-01 retrieves over a million tokens and more (arXiv 2501.08313 reports up to four million).
# Its lightning heads cannot carry a single write that far. The weight that is left is many powers
# of ten below one, and a larger key or value cannot buy that back, because it would have to be
# larger by the same powers of ten. So retrieval over such distances has to rest on its ten softmax
# layers, while the lightning layers do the work within some tens of thousands of tokens.
#
# **This is an inference from the slopes, not a statement of the paper.** It says how long a write
# lives in a state. It does not say how much of that reach training makes use of, nor how many
# writes a state of this size can keep apart, which for many facts is the tighter limit.
#
# The next notebook, `02_linear_versus_softmax`, looks at the other side of the trade: what the two
# kinds of attention cost on a real machine.
