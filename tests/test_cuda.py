"""The CUDA backend: its matrix, planned modes, layouts, planted defects, what it lacks and why.

Kernels run on a GPU or, without one, as C++ on the CPU (`tests/cuda_on_host`).
"""

import ctypes
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import attnlab
from attnlab import cli, registry, schedules, segments, testing
from attnlab.problem import Problem
from attnlab.testing import assert_as_accurate
from kernels_cuda import lightning, module, tensor_map, tiles
from tests.cuda_on_host import HostLoader
from tests.lightning_cases import MODES, assert_right, inputs_of

ROOT = Path(__file__).resolve().parent.parent
HAS_GPU = torch.cuda.is_available()
on_host = pytest.mark.skipif(HAS_GPU, reason="kernels run on the GPU here")
pytestmark = pytest.mark.usefixtures("one_thread")
on_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a GPU")


def forget():
    """Drop all that is remembered of kernels, tiles and plans."""
    for remembered in (module.kernel, lightning._tile_of, lightning.instance_of):
        remembered.cache_clear()
    module._failures.clear()
    schedules._schedules.clear()


def use_loader(monkeypatch, loader):
    forget()
    monkeypatch.setattr(module, "loader", loader)


@pytest.fixture(autouse=True)
def loader(monkeypatch):
    """Kernels for this machine: through CuPy on a GPU, else built for the CPU."""
    if not HAS_GPU:
        use_loader(monkeypatch, HostLoader())
    elif (reason := module.loader.why_not("cuda")) is not None:
        pytest.skip(reason)
    forget()
    yield
    forget()


@pytest.fixture(params=["portable", "hopper"])
def kernels(request):
    """Each of the two scan kernels where it can run."""
    if request.param == "portable":
        with lightning.hopper_kernels(False):
            yield request.param
        return
    if HAS_GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    request.getfixturevalue("many_tokens")
    with lightning.hopper_kernels():
        yield request.param


@pytest.fixture
def portable():
    """The portable scan kernel on every architecture."""
    with lightning.hopper_kernels(False):
        yield


@pytest.fixture
def many_tokens(monkeypatch):
    """Tiles as for many tokens, however few there are."""
    monkeypatch.setattr(tiles, "SHORT", 0)


@on_host
@pytest.mark.parametrize(
    "flags", [["-k", "cuda"], ["-k", "cuda and accurate", "--hopper"]], ids=str
)
def test_the_registrys_matrix_passes_on_the_host(flags):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "tests.cuda_on_host"]
    command += [*flags, "tests/test_backends.py"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stdout[-4000:]
    assert " passed" in result.stdout
    kernels = next(x for x in result.stdout.splitlines() if x.startswith("kernels: "))
    assert ("hopper_scan" in kernels) == ("--hopper" in flags)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (128, 64)], ids=str)
@pytest.mark.parametrize(("mode", "segments"), MODES)
def test_every_mode_is_right(kernels, mode, segments, dims, device):
    inputs = inputs_of(device, B=2, T=333, dims=dims)
    with schedules.forced_plan(mode, segments):
        assert_right("cuda", inputs)
    made = list(schedules._schedules.values())
    assert len(made) == 2  # forward and backward
    for schedule in made:
        per_head = schedule.units.shape[0] * schedule.heads_per_row / (2 * 3)
        assert per_head == (segments or 1)
        assert (schedule.chains is not None) == (mode == "two-pass")


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
def test_a_single_token_is_not_rounded_on_its_way_into_the_state(kernels, dims, device):
    _, _, found = assert_right("cuda", inputs_of(device, B=2, T=1, dims=dims))
    for name in ("final_state", "grad_initial_state"):
        assert found[name].rms < 1e-6


@pytest.mark.parametrize(
    ("num_tokens", "few"), [(1, True), (16 << 20, True), ((16 << 20) + 1, False), (0, False)]
)
def test_few_tokens_have_tiles_of_their_own(num_tokens, few):
    tile = tiles.hopper_tile(128, 128, "forward", num_tokens)
    assert (tile.consumers == 1) == few


@pytest.mark.parametrize(("mode", "segments"), MODES[:3])
def test_tiles_of_few_tokens_are_right(mode, segments, device):
    if HAS_GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    with lightning.hopper_kernels(), schedules.forced_plan(mode, segments):
        assert_right("cuda", inputs_of(device, T=333, dims=(128, 128)))


@pytest.fixture
def clusters(monkeypatch, many_tokens):
    """Forwards at D = 128 by clusters of two blocks."""
    if HAS_GPU and torch.cuda.get_device_capability()[0] != 9:
        pytest.skip("needs a Hopper GPU")
    monkeypatch.setitem(tiles.HOPPER_SCAN, (128, "wide"), tiles.HOPPER_SCAN[128, "cluster"])
    with lightning.hopper_kernels():
        yield


@pytest.mark.parametrize(("mode", "segments"), MODES[:3])
def test_clusters_share_their_copies(clusters, mode, segments, device):
    with schedules.forced_plan(mode, segments):
        assert_right("cuda", inputs_of(device, T=513, dims=(128, 128)))


CLUSTER_DEFECTS = {
    "a_stage_that_the_other_block_still_reads": (  # which falls behind
        "arrive_in(lane);",
        "arrive(); for (int i = 0; i < 40 * cluster_rank(); ++i) host::pass_on();",
    ),
    "half_of_the_columns_left_out": (
        "panel % 2 == cluster_rank()",
        "panel == 0 && !cluster_rank()",
    ),
    "no_barrier_before_the_others_copies": ("cluster_sync();  // protects", "{}  // "),
}


@on_host
@pytest.mark.parametrize("defect", CLUSTER_DEFECTS)
def test_a_defect_of_clusters_is_caught(clusters, defect, monkeypatch, device):
    inputs = inputs_of(device, T=513, dims=(128, 128))
    with schedules.forced_plan("single"):
        use_loader(monkeypatch, HostLoader(change=CLUSTER_DEFECTS[defect]))
        with pytest.raises(
            (AssertionError, module.KernelError), match=r"its budget|all threads|more"
        ):
            assert_right("cuda", inputs)


@on_host
@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("capability", [(8, 0), (8, 6), (9, 0)], ids=str)
@pytest.mark.parametrize("eager", [False, True], ids=["late", "eager"])
def test_rings_of_every_architecture_are_right_whenever_copies_land(
    capability, eager, monkeypatch, device
):
    use_loader(monkeypatch, HostLoader(capability, copies_are_eager=eager))
    for dim in tiles.DIMS:
        assert_right("cuda", inputs_of(device, H=2, T=333, dims=(dim, dim), dtype=torch.float16))


@pytest.mark.parametrize("mode", ["halo", "two-pass"])
def test_long_documents_are_cut_between_short_ones(kernels, mode, device):
    bounds = torch.tensor([0, 30, 31, 331, 331, 400], device=device)
    whole = inputs_of(device, T=400, documents=5)
    with schedules.forced_plan(mode, 3):
        cut = testing.run_lightning(whole, cu_seqlens=bounds, backend="cuda")
    oracle = testing.run_lightning(whole.to(torch.float64), cu_seqlens=bounds)
    baseline = testing.lightning_baseline(whole, cu_seqlens=bounds)
    for name in oracle:
        assert_as_accurate(cut[name], oracle[name], baseline[name], name)


@pytest.mark.parametrize("poisoned", [0, 2])
def test_a_document_does_not_see_what_its_neighbours_hold(kernels, poisoned, device):
    bounds = torch.tensor([0, 70, 150, 300], device=device)
    clean = inputs_of(device, T=300, documents=3)
    start, stop = bounds[poisoned : poisoned + 2].tolist()
    poison = {}
    for name in ("query", "key", "value", "grad_output"):
        poison[name] = getattr(clean, name).clone()
        poison[name][:, :, start:stop] = float("nan")
    expected = testing.run_lightning(clean, cu_seqlens=bounds, backend="cuda")
    found = testing.run_lightning(replace(clean, **poison), cu_seqlens=bounds, backend="cuda")
    for name, result in found.items():
        own = (slice(1, 2),) if "state" in name else (slice(None), slice(None), slice(70, 150))
        assert torch.equal(result[own], expected[name][own]), name


def state_and_gradients(inputs, backend):
    key, value, state = (
        x.detach().requires_grad_() for x in (inputs.key, inputs.value, inputs.initial_state)
    )
    result = attnlab.lightning_state(
        key, value, inputs.log_decay, initial_state=state, backend=backend
    )
    return result, *torch.autograd.grad(result, (key, value, state), inputs.grad_state)


@pytest.mark.parametrize(("mode", "segments"), MODES)
def test_states_alone_and_their_gradients_are_right(kernels, mode, segments, device):
    inputs = inputs_of(device, B=2, T=333, dims=(64, 128))
    with schedules.forced_plan(mode, segments):
        actual = state_and_gradients(inputs, "cuda")
    oracle = state_and_gradients(inputs.to(torch.float64), "reference")
    nothing = torch.zeros_like(inputs.grad_output)
    baseline = testing.lightning_baseline(replace(inputs, grad_output=nothing))
    names = ("final_state", "grad_key", "grad_value", "grad_initial_state")
    for a, o, name in zip(actual, oracle, names, strict=True):
        assert_as_accurate(a, o, baseline[name], name)


@pytest.mark.parametrize("dims", [(64, 64), (128, 128)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_high_precision_leaves_the_rounding_of_the_results(kernels, dtype, dims, device):
    inputs = inputs_of(device, T=333, dims=dims, dtype=dtype)
    actual, oracle, high = assert_right("cuda", inputs, precision="high")
    _, _, default = assert_right("cuda", inputs)
    for name, wide in oracle.items():
        if "state" in name:
            assert high[name].rms < min(2e-6, default[name].rms)
            continue
        rounding = testing.accuracy(wide.to(dtype), wide, wide + actual[name].double().std() / 100)
        assert high[name].rms < 1.01 * rounding.rms < 0.9 * default[name].rms


@pytest.mark.parametrize("cuts", [(64,), (1, 70), (33, 34, 128)], ids=str)
def test_a_carried_state_gives_what_the_whole_gives(kernels, cuts, device):
    inputs = inputs_of(device, T=200, dims=(128, 128))
    state, outputs = inputs.initial_state, []
    for start, stop in zip((0, *cuts), (*cuts, 200), strict=True):
        qkv = (x[:, :, start:stop] for x in (inputs.query, inputs.key, inputs.value))
        output, state = attnlab.lightning_attention(
            *qkv, inputs.log_decay, initial_state=state, return_final_state=True, backend="cuda"
        )
        outputs.append(output)
    no_grad = replace(inputs, grad_output=None, grad_state=None)
    oracle, baseline = testing.lightning_oracle(inputs), testing.lightning_baseline(no_grad)
    assert_as_accurate(torch.cat(outputs, 2), oracle["output"], baseline["output"])
    assert_as_accurate(state, oracle["final_state"], baseline["final_state"])


def test_a_member_of_a_batch_gets_the_bits_that_it_gets_alone(kernels, device):
    inputs = inputs_of(device, B=3, T=130)
    names = ("query", "key", "value", "initial_state", "grad_output", "grad_state")
    alone = replace(inputs, **{n: getattr(inputs, n)[1:2] for n in names})
    with schedules.forced_plan("single"):
        whole = testing.run_lightning(inputs, backend="cuda")
        member = testing.run_lightning(alone, backend="cuda")
    for name, result in member.items():
        assert torch.equal(whole[name][1:2], result), name


def test_heads_of_interleaved_projections_come_out_as_they_went_in(kernels, device):
    qkv = torch.randn(2, 70, 3, 3, 64, device=device).bfloat16()  # [B, T, H, 3, K]
    q, k, v = (x.transpose(1, 2) for x in qkv.unbind(3))
    g = torch.linspace(-0.5, -0.1, 3)
    output = attnlab.lightning_attention(q, k, v, g, backend="cuda").output
    assert output.transpose(1, 2).is_contiguous()
    packed = (x.contiguous() for x in (q, k, v))
    assert torch.equal(output, attnlab.lightning_attention(*packed, g, backend="cuda").output)


def test_rows_at_odd_addresses_and_broadcast_gradients_are_taken(kernels, device):
    inputs = inputs_of(device, T=70)
    names = ("query", "key", "value", "grad_output")
    odd = {}
    for name in names:
        x = getattr(inputs, name)
        wide = x.new_full((*x.shape[:3], 67), float("nan"))
        odd[name] = wide[..., 1:65].copy_(x)
    flat = replace(inputs, **{n: x.clone() for n, x in odd.items()})
    actual = testing.run_lightning(replace(inputs, **odd), backend="cuda")
    expected = testing.run_lightning(flat, backend="cuda")
    assert all(torch.equal(actual[n], expected[n]) for n in expected)
    q, k, v = (x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    output = attnlab.lightning_attention(q, k, v, inputs.log_decay, backend="cuda").output
    of_sum = torch.autograd.grad(output.sum(), (q, k, v), retain_graph=True)
    of_ones = torch.autograd.grad(output, (q, k, v), torch.ones_like(output))
    assert all(torch.equal(a, b) for a, b in zip(of_sum, of_ones, strict=True))


def test_a_repeated_call_plans_and_compiles_nothing(monkeypatch, device):
    inputs = inputs_of(device)
    first = testing.run_lightning(inputs, backend="cuda")

    def fail(*arguments, **flags):
        raise AssertionError("made again")

    monkeypatch.setattr(schedules, "plan", fail)
    monkeypatch.setattr(type(module.loader), "load", fail)
    second = testing.run_lightning(inputs, backend="cuda")
    assert all(torch.equal(first[n], second[n]) for n in first)


STEP_CASES = [
    ((64, 64), "contiguous", None),
    ((128, 128), "transposed", torch.int32),
    ((64, 128), "odd", torch.int64),
    ((128, 64), "odd", None),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dims", "layout", "slots"), STEP_CASES, ids=str)
def test_steps_update_states_of_any_strides_in_place(dims, layout, slots, dtype, device):
    steps, rows = 5, 6
    inputs = inputs_of(device, B=3, H=5, T=steps, dims=dims, dtype=dtype)
    own = torch.tensor([4, 0, 2]) if slots else torch.arange(3)
    shape = {"contiguous": (rows, 5, *dims), "transposed": (5, rows, *dims)}
    shape = shape.get(layout, (rows, 5, dims[0], dims[1] + 3))
    storage = torch.full(shape, 7.0, device=device)
    pool = storage.transpose(0, 1) if layout == "transposed" else storage[..., : dims[1]]
    pool[own] = inputs.initial_state
    state = pool if slots else pool[:3]
    kept = storage.clone()
    outputs = [
        attnlab.lightning_decode_(
            *(x[:, :, t : t + 1] for x in (inputs.query, inputs.key, inputs.value)),
            inputs.log_decay,
            state,
            slots=own.to(device, slots) if slots else None,
            scale=0.5,
            backend="cuda",
        )
        for t in range(steps)
    ]
    no_grad = replace(inputs, grad_output=None, grad_state=None)
    baseline = testing.lightning_baseline(no_grad, scale=0.5)
    oracle = testing.lightning_oracle(inputs, scale=0.5)
    assert_as_accurate(torch.cat(outputs, 2), oracle["output"], baseline["output"])
    assert_as_accurate(pool[own], oracle["final_state"], baseline["final_state"])
    pool[own] = inputs.initial_state
    assert torch.equal(storage, kept)  # nothing else was written to


def test_the_ops_pass_opcheck(device):
    inputs = inputs_of(device, T=70)
    q, k, v = (x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    g, state = inputs.log_decay, inputs.initial_state.requires_grad_()
    bounds = torch.tensor([0, 70], device=device)
    attnlab.lightning_attention(q, k, v, g, backend="cuda")  # registers the ops
    ops = torch.ops.attnlab
    for initial, cu in ((state, None), (None, bounds)):
        args = q, k, v, g, initial, cu, 0.5, True, "default", True
        torch.library.opcheck(ops.lightning_cuda.default, args)
    torch.library.opcheck(ops.lightning_state_cuda.default, (k, v, g, state, True))
    step = [x.detach()[:, :, :1] for x in (q, k, v)]
    args = *step, g, state.detach().clone(), torch.tensor([0], device=device), 0.5
    torch.library.opcheck(ops.lightning_decode_cuda_.default, args)


def test_calls_compile_without_a_graph_break(kernels, device):
    inputs = inputs_of(device, T=130)
    bounds = torch.tensor([0, 40, 130], device=device)
    tensors = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]

    def call(q, k, v, g, cu, state):
        with attnlab.use_backend("cuda"):
            dense = attnlab.lightning_attention(q, k, v, g, return_final_state=True)
            packed = attnlab.lightning_attention_varlen(q, k, v, g, cu)
            step = (x[:, :, :1].detach() for x in (q, k, v))
            return dense.output, packed.output, attnlab.lightning_decode_(*step, g, state)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    states = [torch.zeros_like(inputs.initial_state) for _ in range(2)]
    given = inputs.log_decay, bounds
    results = [f(*tensors, *given, s) for f, s in zip((call, compiled), states, strict=True)]
    grads = [torch.autograd.grad(r[0].sum() + r[1].sum(), tensors) for r in results]
    for eager, traced in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        assert torch.equal(traced, eager)
    assert torch.equal(*states)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("decay_device", ["cuda", "cpu"])
def test_a_captured_graph_replays_calls(decay_device):
    inputs = inputs_of("cuda", T=1000)
    tensors = inputs.query, inputs.key, inputs.value, inputs.log_decay.to(decay_device)
    step, state = [x[:, :, :1].contiguous() for x in tensors[:3]], inputs.initial_state.clone()

    def call():
        output, last = attnlab.lightning_attention(
            *tensors, return_final_state=True, backend="cuda"
        )
        decoded = attnlab.lightning_decode_(*step, tensors[3], state, backend="cuda")
        return output, last, decoded

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


@on_gpu
@pytest.mark.gpu
def test_a_side_streams_calls_wait_for_that_streams_inputs():
    inputs = inputs_of("cuda", T=1000)
    expected = testing.run_lightning(inputs, backend="cuda")["output"]
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        query = inputs.query.clone()  # late: a launch elsewhere would read something else
        output = attnlab.lightning_attention(
            query, inputs.key, inputs.value, inputs.log_decay, scale=1.0, backend="cuda",
            initial_state=inputs.initial_state,
        ).output  # fmt: skip
    stream.synchronize()
    assert torch.equal(output, expected)


# A piece of the kernels' text and what stands in its place; all are found by the ordinary checks.
DEFECTS = {
    "decay_of_the_next_head": (
        "params.log_decay[unit.head]",
        "params.log_decay[(unit.head + 1) % params.heads_per_row]",
    ),
    "slope_one_percent_off": ("params.log_decay[unit.head]", "params.log_decay[unit.head] * 1.01f"),
    "backward_reads_one_step_too_late": (
        "back ? expf(g * max(num_rows - 1 - row, 0))",
        "back ? expf(g * max(num_rows - row, 0))",
    ),
    "backward_scores_not_transposed": ("decay.back ? CHUNK - n : n - CHUNK", "n - CHUNK"),
    "rest_of_the_sequence_left_out": (
        "(unit.num_tokens + chunk - 1) / chunk",
        "unit.num_tokens / chunk",
    ),
}
PORTABLE_DEFECTS = {
    "one_decay_step_missing_across_chunks": (
        "write(stage, expf(decay.g * num_rows));",
        "write(stage, expf(decay.g * (num_rows - 1)));",
    ),
    "state_dropped_at_a_chunks_edge": ("element * past + sums", "element * 0.0f + sums"),
    "last_row_unwritten": ("if (r < num_rows) *", "if (r + 1 < num_rows) *"),
    "no_barrier_before_scores_are_read": ("__syncthreads();  // protects the scores", "// "),
    "no_barrier_after_copies": ("__syncthreads();  // shows chunk n", "// "),
}
HOPPER_DEFECTS = {
    "one_decay_step_missing_across_chunks": (
        "const float past = expf(shared.common.walk.decay.g * CHUNK);",
        "const float past = expf(shared.common.walk.decay.g * (CHUNK - 1));",
    ),
    "other_tokens_rows_not_cleared": ("i < Shared::STAGE_PANELS * granules", "i < 0"),
    "a_short_chunk_weighted_as_a_whole_one": (
        "if constexpr (!SPLIT) load_edge_weights();\n        if (all.scan",
        "if (all.scan",
    ),
    "no_barrier_before_scores_are_read": ("sync();  // protects the scores", "// "),
    "outputs_not_waited_for": (
        "score(next);\n            products_wait<1>();",
        "score(next); products_wait<2>();",
    ),
    "no_barrier_before_outputs_are_stored": ("sync();  // protects both", "// "),
    "copies_into_a_stage_that_is_still_read": (
        "if (round > 0) shared.empty",
        "if (false) shared.empty",
    ),
}
TWO_CONSUMERS_DEFECTS = {
    "scores_of_the_same_tokens_twice": ("[Shared::A] + first_to * 128", "[Shared::A]"),
    "a_barrier_of_one_consumer_alone": ("sync();  // protects both", "consumers_sync(128);  // "),
    "masks_of_the_other_tokens": ("mask.at(first_to +", "mask.at("),
    "no_barrier_after_rows_are_cleared": ("sync();  // protects cleared rows", "// "),
}
SPLIT_DEFECTS = {
    "no_barrier_before_scores_are_read": HOPPER_DEFECTS["no_barrier_before_scores_are_read"],
    "no_barrier_before_outputs_leave": ("sync();  // protects `out`: all of it", "// "),
    "scores_in_the_others_place": ("(first_to + to) / GRANULE", "to / GRANULE"),
}
PLACES = [  # kernels, head dim, precision, what is planted there
    ("portable", 64, "default", DEFECTS | PORTABLE_DEFECTS),
    ("hopper", 64, "default", DEFECTS | HOPPER_DEFECTS),
    ("hopper", 128, "default", HOPPER_DEFECTS | TWO_CONSUMERS_DEFECTS),
    ("hopper", 128, "high", SPLIT_DEFECTS),
]
ALL_DEFECTS = [
    pytest.param(kernels, dim, precision, change, id=f"{kernels}-{dim}-{precision}-{name}")
    for kernels, dim, precision, defects in PLACES
    for name, change in defects.items()
]


@on_host
@pytest.mark.parametrize(
    ("kernels", "dim", "precision", "change"), ALL_DEFECTS, indirect=["kernels"]
)
def test_a_defect_planted_in_the_kernel_is_caught(
    kernels, dim, precision, change, monkeypatch, device
):
    inputs = inputs_of(device, T=513, dims=(dim, dim))
    inputs = replace(inputs, log_decay=torch.tensor([-0.03, -0.02, -0.01]))
    with schedules.forced_plan("single"):
        assert_right("cuda", inputs, precision=precision)
        use_loader(monkeypatch, HostLoader(change=change))
        with pytest.raises((AssertionError, module.KernelError), match=r"its budget|all threads"):
            assert_right("cuda", inputs, precision=precision)


@on_host
@pytest.mark.usefixtures("portable")
def test_copies_into_a_stage_that_is_still_read_are_caught(monkeypatch, device):
    change = "fetch(chunks, n + STAGES - 1);", "fetch(chunks, n + STAGES);"
    inputs = inputs_of(device, T=333)
    use_loader(monkeypatch, HostLoader(copies_are_eager=True, change=change))
    with pytest.raises(AssertionError, match="its budget"):
        assert_right("cuda", inputs)


def halo_too_short(monkeypatch):
    monkeypatch.setattr(segments, "HALO_EXPONENT", 1.0)


def state_dropped_between_segments(monkeypatch):
    change_rows(monkeypatch, lambda s: s.units[:, 7].fill_(-1))


def segments_a_decay_step_apart(monkeypatch):
    change_rows(monkeypatch, lambda s: s.chains[:, 4].sub_(1))


def change_rows(monkeypatch, change):
    original = schedules.on_device

    def changed(*arguments):
        schedule = original(*arguments)
        change(schedule)
        return schedule

    monkeypatch.setattr(schedules, "on_device", changed)


PLANS = [
    ("halo", halo_too_short),
    ("two-pass", state_dropped_between_segments),
    ("two-pass", segments_a_decay_step_apart),
]


@pytest.mark.parametrize(("mode", "defect"), PLANS, ids=[d.__name__ for _, d in PLANS])
def test_a_defect_planted_in_the_plan_is_caught(mode, defect, monkeypatch, device):
    inputs = inputs_of(device, T=333)
    inputs = replace(inputs, log_decay=torch.tensor([-0.03, -0.02, -0.01], device=device))
    defect(monkeypatch)
    with schedules.forced_plan(mode, 3), pytest.raises(AssertionError, match="its budget"):
        assert_right("cuda", inputs)


@on_host
@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("planted", [False, True], ids=["right", "planted"])
def test_offsets_beyond_32_bits_are_right(planted, monkeypatch, device):
    change = ("token * token_stride", "(unsigned)(token * token_stride)") if planted else None
    use_loader(monkeypatch, HostLoader(change=change))
    tokens, stride, dim = 65, 1 << 26, 64  # an offset of 32 bits wraps after 64 tokens
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    storage = torch.empty((tokens - 1) * stride + dim, dtype=torch.bfloat16)
    x = storage.as_strided((1, 1, tokens, dim), (storage.numel() + 7 & -8, 1 << 40, stride, 1))
    near = torch.randn(1, 1, tokens, dim).bfloat16()
    x.copy_(near)
    decay = torch.tensor([-0.1])
    expected = attnlab.lightning_attention(near, near, near, decay, backend="cuda").output
    actual = attnlab.lightning_attention(x, x, x, decay, backend="cuda").output
    assert torch.equal(actual, expected) != planted


PROBLEM = Problem(
    op="lightning_attention", batch=1, heads=1, kv_heads=1, q_len=8, kv_len=8, key_dim=64,
    value_dim=64, dtype=torch.bfloat16, device="cuda" if HAS_GPU else "cpu",
)  # fmt: skip


def test_why_not_says_which_calls_it_does_not_take():
    assert attnlab.why_not("lightning_attention", "cuda", PROBLEM) is None
    for change, word in (
        ({"dtype": torch.float32}, "float32"),
        ({"key_dim": 80}, "80"),
        ({"value_dim": 256}, "256"),
        ({"decay_requires_grad": True}, "log_decay"),
    ):
        assert word in attnlab.why_not("lightning_attention", "cuda", replace(PROBLEM, **change))


def test_why_not_says_what_the_machine_lacks(monkeypatch):
    monkeypatch.setattr(module, "loader", module.Driver())
    on_gpu, on_cpu = (replace(PROBLEM, device=d) for d in ("cuda", "cpu"))

    def reason(problem):
        return attnlab.why_not("lightning_attention", "cuda", problem)

    assert "needs a CUDA device, got cpu" in reason(on_cpu)
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert "cupy" in reason(on_gpu)
    monkeypatch.setattr(module, "find_spec", lambda name: "found")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "driver" in reason(on_gpu)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert "needs compute capability 8.0, got 7.5" in reason(on_gpu)


@on_host
def test_a_kernel_that_does_not_fit_is_refused(monkeypatch):
    use_loader(monkeypatch, HostLoader((8, 6)))
    wide = replace(PROBLEM, key_dim=128, value_dim=128)
    assert attnlab.why_not("lightning_attention", "cuda", wide) is None
    high = replace(wide, precision="high")
    assert "shared memory" in attnlab.why_not("lightning_attention", "cuda", high)


@on_host
def test_a_tile_of_few_tokens_that_cannot_be_compiled_is_refused_before_a_call(monkeypatch):
    loader = HostLoader((9, 0))
    load = loader.load

    def fail_for_one_consumer(instance, device):
        if instance.name == "hopper_scan" and "128, 1, 4" in instance.arguments:
            raise module.KernelError("kernel narrow could not be compiled")
        return load(instance, device)

    monkeypatch.setattr(loader, "load", fail_for_one_consumer)
    use_loader(monkeypatch, loader)
    wide = replace(PROBLEM, key_dim=128, value_dim=128)
    assert "narrow" in attnlab.why_not("lightning_attention", "cuda", wide)
    assert attnlab.why_not("lightning_attention", "cuda", PROBLEM) is None


@on_host
def test_a_failed_compilation_leaves_the_other_backends(monkeypatch, capsys, device):
    use_loader(monkeypatch, HostLoader(change=("float state[", "floot state[")))
    inputs = inputs_of(device)
    qkvg = inputs.query, inputs.key, inputs.value, inputs.log_decay
    with pytest.raises(attnlab.BackendUnavailable, match="floot"):
        attnlab.lightning_attention(*qkvg, backend="cuda")
    assert attnlab.lightning_attention(*qkvg).output.shape == inputs.value.shape
    assert registry.choose("lightning_attention", None, PROBLEM) == "torch"


def test_the_table_of_backends_lists_it(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(module, "loader", module.Driver())
    assert cli.main(["backends"]) == 0
    lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
    listed = {op: words for op, backend, words in lines if backend == "cuda"}
    ops = (
        "lightning_attention",
        "lightning_attention_varlen",
        "lightning_decode_",
        "lightning_state",
    )
    assert listed == dict.fromkeys(ops, "no: needs a CUDA device, got cpu")


MISUSES = {
    "all threads wait": (
        "__syncthreads();  // protects the scores",
        "if (lane) __syncthreads(); //",
    ),
    "ends before its copies": ("copy_wait<STAGES - 2>();", "//"),
    "lanes of a warp do different things": (
        "a_tile(stage).left(left, warp * 16, k);",
        "if (lane) a_tile(stage).left(left, warp * 16, k); else __syncwarp();",
    ),
}


@on_host
@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("message", MISUSES)
def test_the_host_build_says_what_is_undefined_on_a_gpu(message, monkeypatch, device):
    use_loader(monkeypatch, HostLoader(change=MISUSES[message]))
    inputs = inputs_of(device)
    with pytest.raises(module.KernelError, match=message):
        testing.run_lightning(inputs, backend="cuda")


def test_a_tensor_map_tells_the_driver_where_rows_are(monkeypatch):
    told = {}

    class Driver:
        def cuTensorMapEncodeTiled(self, target, kind, rank, address, sizes, strides, box, *rest):
            told.update(kind=kind, address=address.value, sizes=list(sizes), strides=list(strides))
            told.update(box=list(box), aligned=target.value % 64 == 0)
            ctypes.memset(target, 7, tensor_map.MAP_BYTES)
            return 0

    monkeypatch.setattr(tensor_map, "_driver", Driver)
    x = torch.empty(1, 50, 3, 128, dtype=torch.bfloat16).transpose(1, 2)[..., :64]
    assert tensor_map.tensor_map(x) == bytes([7]) * 128
    expected = {"kind": 1, "address": x.data_ptr(), "sizes": [64, 50, 3, 1], "box": [64, 64, 1, 1]}
    expected |= {"strides": [3 * 128 * 2, 128 * 2, 64 * 2], "aligned": True}
    assert told == expected
