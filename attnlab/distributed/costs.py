"""What a layer of MiniMax-01 costs on many GPUs: products, collectives, and what of them is seen.

Legend: W ranks, n tokens of a context-parallel rank, d hidden size, H heads, K head dim, F expert
width, k experts a token; tp, cp, ep, etp as in `attnlab.distributed.mesh`.

A collective takes a base time, a latency a step, and its bytes at the bandwidth of the slowest link
on its way; base and latencies are those of NCCL's own tuner (src/graph/tuning.cc of NVIDIA/nccl).
Products run at a flat rate. What is assumed stands with the fields of `Hardware`; nothing here was
measured on such a machine.
"""

from dataclasses import dataclass

from attnlab.checks import expect
from attnlab.distributed.streams import makespan
from attnlab.distributed.volumes import (
    dispatch_bytes,
    expert_gather_bytes,
    gather_bytes,
    key_value_bytes,
    state_bytes,
)
from attnlab.model.config import HybridConfig
from attnlab.model.config_json import FULL

_BLOCK = 256  # tokens of a block of lightning attention, MiniMax-01's
_GATHER_BASE, _GATHER_RATE = 0.34e-3, 65e9  # fit to ZeCO's measured all-gathers, arXiv 2507.01004


@dataclass(frozen=True)
class Protocol:
    """One of NCCL's: seconds to begin, a step inside a node, a step between nodes; bandwidth share."""

    base: float
    near_step: float
    far_step: float
    share: float


PROTOCOLS = {
    "LL": Protocol(6.6e-6, 0.6e-6, 2.7e-6, 0.5),
    "LL128": Protocol(14e-6, 1.9e-6, 4.0e-6, 0.92),
    "Simple": Protocol(8.4e-6, 3.4e-6, 14e-6, 1.0),
}
"""Ring algorithm; seconds."""


@dataclass(frozen=True, kw_only=True)
class Hardware:
    """A GPU and its links, bytes and operations a second.

    nvlink_rate: of a ring inside a node, one way.
    nic_rate: of a GPU's own adapter, usable.
    flops_rate: of dense 16-bit products, assumed; the same for attention.
    """

    name: str
    nvlink_rate: float
    nic_rate: float
    flops_rate: float
    node_size: int = 8


H800 = Hardware(name="H800", nvlink_rate=160e9, nic_rate=45e9, flops_rate=400e12)
"""NVLink and adapter as DeepEP measures them (github.com/deepseek-ai/DeepEP); 400 TFLOPS assumed."""
H100 = Hardware(name="H100", nvlink_rate=360e9, nic_rate=45e9, flops_rate=400e12)
"""The ring rate and 400 TFLOPS are assumed."""
HARDWARE = {"H800": H800, "H100": H100}


def ring_time(hardware: Hardware, ranks: int, received: float, stride: int = 1) -> float:
    """Seconds of an all-gather or reduce-scatter in which each rank receives so many bytes.

    `stride` is the distance of neighbouring ranks in the world: with 8, and 8 GPUs a node, every
    step leaves the node. Of NCCL's protocols the fastest counts.
    """
    if ranks == 1:
        return 0.0
    near = max(1, hardware.node_size // stride)  # ranks of the group in a node
    nodes = -(-ranks // near)
    far_steps = nodes - 1 if nodes > 1 else 0
    near_steps = ranks - 1 - far_steps
    rate = hardware.nvlink_rate
    if nodes > 1:
        rate = min(rate, hardware.nic_rate * min(near, ranks)) if near > 1 else hardware.nic_rate
    return min(
        p.base + near_steps * p.near_step + far_steps * p.far_step + received / (rate * p.share)
        for p in PROTOCOLS.values()
    )


def measured_gather_time(received: float) -> float:
    """Seconds of an all-gather by the line through what ZeCO measured on 8 to 256 H100.

    It begins later than NCCL's model, and its rate is above `Hardware.nic_rate`: it takes longer where
    ranks are few, and less where they are many.
    """
    return _GATHER_BASE + received / _GATHER_RATE


def exchange_time(hardware: Hardware, ranks: int, moved: float, stride: int = 1) -> float:
    """Seconds of an all-to-all: the slower of the share inside the node and that between nodes."""
    if ranks == 1:
        return 0.0
    near = min(ranks, max(1, hardware.node_size // stride))
    inside, others = near - 1, ranks - near
    near_time = moved * inside / (ranks - 1) / hardware.nvlink_rate
    far_time = moved * others / (ranks - 1) / hardware.nic_rate
    base = PROTOCOLS["Simple"]
    return base.base + (base.far_step if others else base.near_step) + max(near_time, far_time)


@dataclass(frozen=True, kw_only=True)
class Job:
    """A model on GPUs: one pack of `seq_len` tokens for each of dp = gpus / (tp cp) replicas.

    Raises:
        ValueError: where the numbers don't divide each other.
    """

    config: HybridConfig
    hardware: Hardware
    gpus: int
    seq_len: int
    tp: int
    cp: int
    ep: int
    etp: int
    groups: int = 4
    imbalance: float = 1.0  # of causal attention over ranks; see `PackPlan.num_pairs`

    def __post_init__(self) -> None:
        """Check that the ranks factor."""
        expect(self.gpus % (self.tp * self.cp) == 0, f"tp x cp that divides {self.gpus}", self.cp)
        expect(self.gpus % (self.ep * self.etp) == 0, f"ep x etp that divides {self.gpus}", self.ep)
        heads, experts = self.config.num_key_value_heads, self.config.num_local_experts
        expect(heads % self.tp == 0, f"tp that divides the {heads} key heads", self.tp)
        expect(experts % self.ep == 0, f"ep that divides the {experts} experts", self.ep)
        expect(self.seq_len % self.cp == 0, f"cp that divides {self.seq_len} tokens", self.cp)

    @property
    def tokens(self) -> int:
        """n, of a context-parallel rank; a GPU of its tp group takes n / tp to the experts."""
        return self.seq_len // self.cp


@dataclass(frozen=True, kw_only=True)
class Forward:
    """Milliseconds of one layer's parts in a forward pass, and of the mean layer.

    gather: LASP+'s all-gather by NCCL's model, and `gather_measured` by the line through measured ones;
    lightning, softmax: a mixer's products; ring: what of the ring's messages is seen; tensor: what
    tp gathers and scatters of activations, both mixers alike; dispatch, expert_gather: one way;
    experts: their products; moe_exposed: what of their communication is seen; layer: all that a
    mean layer takes; communication: share of it that is no product.
    """

    gather: float
    gather_measured: float
    lightning: float
    softmax: float
    ring: float
    tensor: float
    dispatch: float
    expert_gather: float
    experts: float
    moe_exposed: float
    layer: float
    communication: float


def forward(job: Job) -> Forward:
    """The parts of a layer's forward pass; optimizer, FSDP and stages of layers are left out."""
    gather, measured = gather_times(job)
    lightning, softmax = lightning_time(job), softmax_time(job)
    ring, tensor, stages = exposed_ring_time(job), tensor_time(job), expert_times(job)
    moe_exposed = makespan(stages, job.groups) - stages["X"]
    full = job.config.layer_types.count(FULL) / len(job.config.layer_types)
    products = (1 - full) * lightning + full * softmax + stages["X"]
    seen = (1 - full) * gather + full * ring + tensor + moe_exposed
    parts = {
        "gather": gather,
        "gather_measured": measured,
        "lightning": lightning,
        "softmax": softmax,
        "ring": ring,
        "tensor": tensor,
        "dispatch": stages["D"],
        "expert_gather": stages["A"],
        "experts": stages["X"],
        "moe_exposed": moe_exposed,
        "layer": products + seen,
    }
    times = {name: 1e3 * seconds for name, seconds in parts.items()}
    return Forward(**times, communication=seen / (products + seen))


def gather_times(job: Job) -> tuple[float, float]:
    """LASP+'s all-gather of float32 states, by NCCL's model and by the fit."""
    if job.cp == 1:
        return 0.0, 0.0
    heads, dim = job.config.num_attention_heads // job.tp, job.config.head_dim
    received = gather_bytes(job.cp, 1, state_bytes(heads, dim, dim))
    return ring_time(job.hardware, job.cp, received, job.tp), measured_gather_time(received)


def lightning_time(job: Job) -> float:
    """Products of a lightning mixer: five projections, and blocks of 256 tokens with a state."""
    config, n = job.config, job.tokens
    inner = config.num_attention_heads * config.head_dim
    matrices = 5 * config.hidden_size * inner
    attention = inner * (4 * config.head_dim + 2 * _BLOCK)  # of a token: state, and scores twice
    return n * (2 * matrices + attention) / job.tp / job.hardware.flops_rate


def softmax_time(job: Job) -> float:
    """Products of a softmax mixer over one document of the whole length."""
    return _softmax_projections(job) + _attention_time(job)


def _softmax_projections(job: Job) -> float:
    config = job.config
    inner = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    matrices = 2 * config.hidden_size * (inner + kv)
    return 2 * job.tokens * matrices / job.tp / job.hardware.flops_rate


def _attention_time(job: Job) -> float:
    config = job.config
    pairs = job.imbalance * job.seq_len**2 / 2 / job.cp
    heads = config.num_attention_heads / job.tp
    return 4 * pairs * heads * config.head_dim / job.hardware.flops_rate


def exposed_ring_time(job: Job) -> float:
    """What the ring's steps take longer than the attention that they run beside."""
    if job.cp == 1:
        return 0.0
    config = job.config
    sizes = config.num_key_value_heads // job.tp, config.head_dim, config.head_dim
    message = key_value_bytes(job.tokens, *sizes, 2)
    leaves = job.cp * job.tp > job.hardware.node_size
    rate = job.hardware.nic_rate if leaves else job.hardware.nvlink_rate
    step = PROTOCOLS["Simple"].far_step if leaves else PROTOCOLS["Simple"].near_step
    hop, hidden = step + message / rate, _attention_time(job) / job.cp
    return (job.cp - 1) * max(0.0, hop - hidden)


def tensor_time(job: Job) -> float:
    """Activations gathered before a mixer and scattered behind it, over tp; not hidden."""
    received = (job.tp - 1) / job.tp * job.tokens * job.config.hidden_size * 2
    return 2 * ring_time(job.hardware, job.tp, received)


def expert_times(job: Job) -> dict[str, float]:
    """Seconds of the stages D, A, X, R, Y for all tokens of a GPU, experts chosen alike."""
    config, hardware = job.config, job.hardware
    chosen, hidden = config.num_experts_per_tok, config.hidden_size
    tokens = job.tokens // job.tp
    moved = dispatch_bytes(tokens, chosen, hidden, 2, job.ep)
    sent = exchange_time(hardware, job.ep, moved, job.etp)
    gathered = expert_gather_bytes(tokens * chosen, hidden, 2, job.etp)
    shared = ring_time(hardware, job.etp, gathered)
    products = 6 * tokens * chosen * hidden * config.intermediate_size / hardware.flops_rate
    return {"D": sent, "A": shared, "X": products, "R": shared, "Y": sent}
