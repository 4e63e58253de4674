"""The Triton backend: its matrix under the interpreter, planned modes, planted defects, compilation.

Kernels run on a GPU, or under Triton's interpreter: `test_everything_here_passes_interpreted` runs
this file and the registry's matrix once more in a process that interprets. Compiling needs no GPU
but a process that doesn't interpret: `python -m tests.test_triton 9` compiles the tile table.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import attnlab
from attnlab import segments, testing
from attnlab.problem import Problem
from attnlab.testing import assert_as_accurate
from kernels_triton import lightning, tiles
from tests.lightning_cases import MODES, assert_right, inputs_of

ROOT = Path(__file__).resolve().parent.parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
CAN_RUN = INTERPRETED or torch.cuda.is_available()
runs_kernels = pytest.mark.skipif(not CAN_RUN, reason="needs a GPU or TRITON_INTERPRET=1")


def run_python(*arguments, interpret):
    environment = os.environ | {"TRITON_INTERPRET": "1" if interpret else "0"}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )


@pytest.mark.skipif(CAN_RUN, reason="the kernels run in this process")
def test_everything_here_passes_interpreted():
    """In two processes, since this is the longest test and an interpreter uses one core."""
    halves = ("triton", "slots", "distributed_lasp"), ("backends", "norm", "convolution", "heads")

    def interpreted(names):
        files = [f"tests/test_{name}.py" for name in names]
        return run_python("-m", "pytest", "-q", "-x", "-k", "triton", *files, interpret=True)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(interpreted, halves))
    for result in results:
        assert result.returncode == 0, result.stdout[-4000:]
        assert " passed" in result.stdout


@pytest.fixture
def schedules():
    from attnlab import schedules

    schedules._schedules.clear()
    yield schedules
    schedules._schedules.clear()


@pytest.fixture(params=[132], ids=["132mp"])
def multiprocessors(request, monkeypatch, schedules):
    """Plans as on a device with so many multiprocessors, whatever runs them."""
    monkeypatch.setattr(schedules, "num_multiprocessors", lambda device: request.param)


# A device of one multiprocessor has another plan of these calls in the third mode alone.
PLANS = [(132, *mode) for mode in MODES] + [(1, *MODES[2])]


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("multiprocessors", "mode", "segments"), PLANS, indirect=["multiprocessors"]
)
def test_every_mode_is_right(schedules, multiprocessors, mode, segments, dtype, device):
    inputs = inputs_of(device, B=2, T=333, dtype=dtype)
    with schedules.forced_plan(mode, segments):
        assert_right("triton", inputs)
    made = list(schedules._schedules.values())
    assert len(made) == 2  # forward and backward
    for schedule in made:
        per_head = schedule.units.shape[0] * schedule.heads_per_row / (2 * 3)
        assert per_head == (segments or 1)
        assert (schedule.chains is not None) == (mode == "two-pass")
        assert (schedule.heads_per_row == 1) == (mode != "single")


@runs_kernels
@pytest.mark.parametrize("mode", ["halo", "two-pass"])
def test_long_documents_are_cut_between_short_ones(schedules, mode, device):
    bounds = torch.tensor([0, 30, 31, 331, 331, 400])
    whole = inputs_of(device, T=400, documents=5, dtype=torch.float32)
    with schedules.forced_plan(mode, 3):
        cut = testing.run_lightning(whole, cu_seqlens=bounds, backend="triton")
    oracle = testing.run_lightning(whole.to(torch.float64), cu_seqlens=bounds)
    baseline = testing.lightning_baseline(whole, cu_seqlens=bounds)
    for name in oracle:
        assert_as_accurate(cut[name], oracle[name], baseline[name], name)


@runs_kernels
@pytest.mark.parametrize(("mode", "segments"), MODES)
def test_states_alone_and_their_gradients_are_right(schedules, mode, segments, device):
    inputs = inputs_of(device, B=2, T=333, dims=(64, 32), dtype=torch.float32)

    def run(inputs, name):
        key, value, state = (
            x.detach().requires_grad_() for x in (inputs.key, inputs.value, inputs.initial_state)
        )
        result = attnlab.lightning_state(
            key, value, inputs.log_decay, initial_state=state, backend=name
        )
        return result, *torch.autograd.grad(result, (key, value, state), inputs.grad_state)

    with schedules.forced_plan(mode, segments):
        actual = run(inputs, "triton")
    oracle, baseline = run(inputs.to(torch.float64), "reference"), run(inputs, "reference")
    for results in zip(actual, oracle, baseline, strict=True):
        assert_as_accurate(*results)


@runs_kernels
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_high_precision_leaves_the_rounding_of_the_results(dtype, device):
    inputs = inputs_of(device, T=333, dtype=dtype)
    actual, oracle, high = assert_right("triton", inputs, precision="high")
    _, _, default = assert_right("triton", inputs)
    for name, wide in oracle.items():
        if "state" in name:
            assert high[name].rms < 2e-6 < default[name].rms
            continue
        rounding = testing.accuracy(wide.to(dtype), wide, wide + actual[name].double().std() / 100)
        assert high[name].rms < 1.01 * rounding.rms < 0.9 * default[name].rms


@runs_kernels
def test_heads_of_interleaved_projections_come_out_as_they_went_in(device):
    """The output's heads lie side by side, so that flattening them copies nothing."""
    qkv = torch.randn(2, 70, 3, 3, 64, device=device).bfloat16()  # [B, T, H, 3, K]
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
    g = torch.linspace(-0.5, -0.1, 3)
    output = attnlab.lightning_attention(q, k, v, g, backend="triton").output
    assert output.transpose(1, 2).is_contiguous()
    packed = (x.contiguous() for x in (q, k, v))
    assert torch.equal(output, attnlab.lightning_attention(*packed, g, backend="triton").output)


@runs_kernels
def test_a_repeated_call_plans_nothing(schedules, monkeypatch, device):
    inputs = inputs_of(device)
    first = testing.run_lightning(inputs, backend="triton")

    def fail(*arguments, **flags):
        raise AssertionError("planned again")

    monkeypatch.setattr(schedules, "plan", fail)
    second = testing.run_lightning(inputs, backend="triton")
    assert all(torch.equal(first[n], second[n]) for n in first)


@runs_kernels
@pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
def test_values_that_are_unknown_give_the_same_units(schedules, packed, device):
    inputs = inputs_of(device, B=1 if packed else 3)
    bounds = torch.tensor([0, 90, 90, 200], device=device) if packed else None
    tile = lightning.tile_of(64, 64, inputs.key.dtype, inputs.key.device, "default")
    call = schedules.Call(inputs.key, inputs.value, inputs.log_decay, bounds, tile, True)
    with schedules.forced_plan("single"):
        known, unknown = schedules.schedule_of(call), schedules.whole_sequences(call)
    assert sorted(known.units.tolist()) == sorted(unknown.units.tolist())
    assert known.heads_per_row == unknown.heads_per_row == 3


@runs_kernels
def test_the_ops_pass_opcheck(device):
    inputs = inputs_of(device, T=70)
    q, k, v = (x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    g, state = inputs.log_decay, inputs.initial_state.requires_grad_()
    bounds = torch.tensor([0, 70], device=device)
    ops = torch.ops.attnlab
    for initial, cu in ((state, None), (None, bounds)):
        args = q, k, v, g, initial, cu, 0.5, True, "default", True
        torch.library.opcheck(ops.lightning_triton.default, args)
    torch.library.opcheck(ops.lightning_state_triton.default, (k, v, g, state, True))
    step = [x.detach()[:, :, :1] for x in (q, k, v)]
    args = *step, g, state.detach().clone(), torch.tensor([0], device=device), 0.5
    torch.library.opcheck(ops.lightning_decode_triton_.default, args)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("decay_device", ["cuda", "cpu"])
def test_a_captured_graph_replays_calls(decay_device):
    inputs = inputs_of("cuda", T=1000)
    tensors = inputs.query, inputs.key, inputs.value, inputs.log_decay.to(decay_device)
    step, state = [x[:, :, :1].contiguous() for x in tensors[:3]], inputs.initial_state.clone()

    def call():
        output, last = attnlab.lightning_attention(*tensors, return_final_state=True)
        return output, last, attnlab.lightning_decode_(*step, tensors[3], state)

    for _ in range(2):
        state.copy_(inputs.initial_state)
        eager = call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for x in captured:
        x.fill_(float("nan"))
    state.copy_(inputs.initial_state)
    graph.replay()
    for actual, expected in zip(captured, eager, strict=True):
        assert torch.equal(actual, expected)


def halo_too_short(monkeypatch, schedules):
    monkeypatch.setattr(segments, "HALO_EXPONENT", 1.0)


def state_dropped_between_segments(monkeypatch, schedules):
    change_rows(monkeypatch, schedules, lambda s: s.units[:, 7].fill_(-1))


def segments_a_decay_step_apart(monkeypatch, schedules):
    change_rows(monkeypatch, schedules, lambda s: s.chains[:, 4].sub_(1))


def first_pass_a_chunk_short(monkeypatch, schedules):
    change_rows(monkeypatch, schedules, lambda s: s.state_units[:, 5].sub_(64))


def last_tokens_unwritten(monkeypatch, schedules):
    change_rows(monkeypatch, schedules, lambda s: s.units[:, 5].sub_(s.units[:, 5] % 64))


def decays_of_other_heads(monkeypatch, schedules):
    change_rows(monkeypatch, schedules, lambda s: s.chains[:, 0].copy_(s.chains[:, 0].roll(1)))


def change_rows(monkeypatch, schedules, change):
    original = schedules.on_device

    def changed(*arguments):
        schedule = original(*arguments)
        change(schedule)
        return schedule

    monkeypatch.setattr(schedules, "on_device", changed)


DEFECTS = [
    ("halo", halo_too_short),
    ("two-pass", state_dropped_between_segments),
    ("two-pass", segments_a_decay_step_apart),
    ("two-pass", first_pass_a_chunk_short),
    ("two-pass", last_tokens_unwritten),
    ("two-pass", decays_of_other_heads),
]


@pytest.fixture
def defect_inputs(device):
    decay = torch.tensor([-0.03, -0.02, -0.01], device=device)
    return replace(inputs_of(device, T=333), log_decay=decay)


@runs_kernels
@pytest.mark.parametrize("mode", ["halo", "two-pass"])
def test_without_a_defect_nothing_is_caught(schedules, multiprocessors, mode, defect_inputs):
    with schedules.forced_plan(mode, 3):
        assert_right("triton", defect_inputs)


@runs_kernels
@pytest.mark.parametrize(("mode", "defect"), DEFECTS, ids=[d.__name__ for _, d in DEFECTS])
def test_a_planted_defect_is_caught(
    schedules, multiprocessors, monkeypatch, mode, defect, defect_inputs
):
    with schedules.forced_plan(mode, 3):
        defect(monkeypatch, schedules)
        with pytest.raises(AssertionError, match="its budget"):
            assert_right("triton", defect_inputs)


LONG_STRIDE = """
import sys, torch
from triton.runtime.interpreter import GridExecutor
from attnlab import reference, triton_backend
from kernels_triton.lightning import launch
GridExecutor._restore_args_dev = lambda *arguments: None  # it would touch all memory
tokens, stride, dim = 65, 1 << 26, 32
storage = torch.empty((tokens - 1) * stride + dim, dtype=torch.bfloat16)
x = storage.as_strided((1, 1, tokens, dim), (storage.numel(), storage.numel(), stride, 1))
near = torch.randn(1, 1, tokens, dim).bfloat16()
x.copy_(near)
if sys.argv[1] == "planted":  # an offset of 32 bits wraps after 32 tokens
    operand = launch._operand
    launch._operand = lambda y, *rest: operand(torch.cat([y[:, :, :32]] * 3, 2)[:, :, :65], *rest)
decay = torch.tensor([-0.1])
output, _ = triton_backend.lightning_attention(x, x, x, decay)
want, _ = reference.lightning_attention(near, near, near, decay)
print(float((output.float() - want.float()).norm() / want.float().norm()))
"""


@pytest.mark.skipif(CAN_RUN, reason="starts its own interpreter")
@pytest.mark.parametrize("planted", [False, True], ids=["right", "planted"])
def test_offsets_beyond_32_bits_are_right(planted):
    result = run_python("-c", LONG_STRIDE, "planted" if planted else "right", interpret=True)
    assert result.returncode == 0, result.stderr[-2000:]
    assert (float(result.stdout) > 0.1) if planted else (float(result.stdout) < 1e-2)


ASKED_LATE = """
import os, attnlab, torch
os.environ["TRITON_INTERPRET"] = "1"
x = torch.zeros(1, 1, 8, 64)
attnlab.lightning_attention(x, x, x, torch.zeros(1), backend="triton")
"""


@pytest.mark.skipif(CAN_RUN, reason="starts its own interpreter")
def test_triton_is_asked_at_the_first_call_whether_it_interprets():
    result = run_python("-c", ASKED_LATE, interpret=False)
    assert result.returncode == 0, result.stderr[-2000:]


def test_why_not_says_what_is_missing():
    problem = Problem(
        op="lightning_attention", batch=1, heads=1, kv_heads=1, q_len=8, kv_len=8, key_dim=64,
        value_dim=64, dtype=torch.bfloat16, device="cuda",
    )  # fmt: skip
    assert attnlab.why_not("lightning_attention", "triton", problem) is None
    for change, word in (
        ({"dtype": torch.float64}, "float64"),
        ({"key_dim": 80}, "80"),
        ({"value_dim": 512}, "512"),
        ({"decay_requires_grad": True}, "log_decay"),
    ):
        changed = replace(problem, **change)
        assert word in attnlab.why_not("lightning_attention", "triton", changed)
    x = torch.zeros(1, 1, 8, 80)
    with pytest.raises(attnlab.BackendUnavailable, match="triton"):
        attnlab.lightning_attention(x, x, x, torch.zeros(1), backend="triton")


# Local memory accesses that the loop of a kernel may make in each of its turns, beside none. Tiles
# of 256 columns hold more than the registers do, on Hopper and in float32 above all.
SPILLS_ALLOWED = {
    (9, "16-bit", 128): 20,
    (9, "16-bit", 256): 80,
    (9, "16-bit backward", 128): 20,
    (9, "16-bit backward", 256): 80,
    (9, "high", 32): 0,
    (9, "high", 128): 40,
    (9, "high", 256): 150,
    (8, "16-bit", 256): 8,
    (8, "high", 128): 16,
    (9, "float32", 128): 8,
    (9, "float32", 256): 350,
}
SHARED_BYTES = {9: 227 << 10, 8: 163 << 10}


@pytest.fixture(scope="module")
def compiled():
    """Rows that this file prints as a script, for both capabilities at the same time."""
    command = [sys.executable, "-m", "tests.test_triton"]
    flags = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "cwd": ROOT}
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    running = {
        c: subprocess.Popen([*command, str(c)], env=environment, **flags) for c in SHARED_BYTES
    }
    return {capability: process.communicate() for capability, process in running.items()}


@pytest.mark.skipif(CAN_RUN, reason="compiled where no kernel can run")
@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_the_tile_table_compiles_without_spills(compiled, capability):
    output, errors = compiled[capability]
    rows = [json.loads(line) for line in output.splitlines()]
    assert len(rows) > 30, errors[-4000:]
    kernels = {(row["kernel"], row["kind"], row["dim"]) for row in rows}
    for kind, dim in tiles.WARP_SPECIALIZED if capability == 9 else ():
        assert {("scan_kernel", kind, dim), ("warp_scan_kernel", kind, dim)} <= kernels
    for row in rows:
        allowed = SPILLS_ALLOWED.get((capability, row["kind"], row["dim"]), 0)
        if row["kernel"] == "warp_scan_kernel":
            allowed = 0
        assert row["shared"] <= SHARED_BYTES[capability], row
        assert all(spills <= allowed for spills in row["spills"]), row


class CompilingDriver:
    """Stands for a device, so that launches compile for it; nothing is run."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.capability * 10, 32)


def disassembled(kernel, tool, *flags):
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        path = Path(nvidia.__file__).parent / "bin" / tool
        command = [str(path), *flags, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def spills_of_loops(kernel):
    """Accesses to local memory in each loop that multiplies matrices."""
    lines = disassembled(kernel, "nvdisasm", "-c").splitlines()
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.L_x_\d+):", line))}
    counts = []
    for i, line in enumerate(lines):
        jump = re.search(r"@!?U?P\d+ BRA `\((\.L_x_\d+)\)", line)
        body = lines[labels[jump[1]] : i] if jump else []
        if any(re.search(r"\b(HGMMA|HMMA|FFMA)\b", x) for x in body):
            counts.append(sum(bool(re.search(r"\b(STL|LDL)\b", x)) for x in body))
    return counts


def compile_tables(capability):
    """Print a row for each kernel that the backend's launches compile for a capability."""
    import triton
    from triton.runtime.jit import JITFunction

    from attnlab import lightning_scans
    from attnlab.schedules import Schedule
    from kernels_triton import experts, lightning, lightning_decode, tiles
    from kernels_triton.lightning import launch

    triton.runtime.driver.set_active(CompilingDriver(capability))
    launch._capability = lambda device: capability
    run, kernels = JITFunction.run, []

    def compile_only(self, *arguments, grid, warmup, **flags):
        kernels.append((self.fn.__name__, run(self, *arguments, grid=grid, warmup=True, **flags)))

    JITFunction.run = compile_only
    table = tiles.HOPPER if capability >= 9 else tiles.AMPERE

    def compiled(kind, dim, num_tokens):
        kernels.clear()
        dtype = torch.float32 if kind == "float32" else torch.bfloat16
        q, k, v, do = (torch.empty(1, 2, num_tokens, dim, dtype=dtype) for _ in range(4))
        g, state = torch.zeros(2), torch.zeros(1, 2, dim, dim)
        units = torch.zeros(2, 9, dtype=torch.int32)
        chains = torch.zeros(1, 5, dtype=torch.int32)
        schedule = Schedule(units, 1, units, chains, 2)
        precision = "high" if kind == "high" else "default"
        flags = {"initial_state": state, "precision": precision}
        kind_of = dim, dim, dtype, q.device, precision
        prepared = q, k, v, g, schedule, lightning.tile_of(*kind_of)
        lightning_scans.forward(
            lightning, *prepared, torch.empty_like(v), final_state=state, **flags
        )
        prepared = *prepared[:-1], lightning.tile_of(*kind_of, backward=True)
        lightning_scans.backward(lightning, *prepared, do, state, grad_initial_state=state, **flags)
        step = [x[:, :, :1] for x in (q, k, v)]
        lightning_decode.decode_(*step, g, state, slots=units[:1, 0])
        rows, slots, weights = (
            q[0, 0],
            torch.zeros(num_tokens // 2, 2, dtype=torch.int64),
            k.float(),
        )
        experts.gated_silu_backward(experts.gated_silu(rows), rows)
        summed = experts.weighted_sum(rows, slots, None), experts.weighted_sum(rows, slots, weights)
        experts.weighted_sum_backward(summed[1], rows, slots, weights)
        matrices = torch.empty(3, 2 * dim, dim, dtype=dtype), torch.empty(3, dim, dim, dtype=dtype)
        experts.few_experts(rows[:2], slots[:2], weights, *matrices)
        return list(kernels)

    compile_all(table, compiled)
    # The plain kernel also takes what the copy engine can't, in the shapes of the other one.
    launch.warp_tile = lambda *call: None
    launch._tile_of.cache_clear()
    compile_all([shape for shape in tiles.WARP_SPECIALIZED if capability == 9], compiled)


def compile_all(table, compiled):
    for kind, dim in table:
        made = compiled(kind, dim, 256)
        assert made == compiled(kind, dim, 1000), "compiled anew for another length"
        for name, kernel in dict.fromkeys(made):
            print_row(name, kind, dim, kernel)


def print_row(name, kind, dim, kernel):
    row = {"kernel": name, "kind": kind, "dim": dim, "shared": kernel.metadata.shared}
    print(json.dumps(row | resources(kernel)), flush=True)


@cache
def resources(kernel):
    """Registers, stack and spills of a kernel, which serves several kinds of calls.

    Code without local memory can't access it, and to disassemble it takes longer than to compile.
    """
    usage = disassembled(kernel, "cuobjdump", "--dump-resource-usage")
    numbers = {n: int(re.search(rf"\b{n}:(\d+)", usage)[1]) for n in ("REG", "STACK", "LOCAL")}
    spills = spills_of_loops(kernel) if numbers["STACK"] or numbers["LOCAL"] else []
    return {"registers": numbers["REG"], "stack": numbers["STACK"], "spills": spills}


if __name__ == "__main__":
    compile_tables(int(sys.argv[1]))
