"""One matrix over the registry: every backend of every op, forward and backward, against float64.

A backend is tested by being registered. Cases cover all pairs of the axes' values, not their
product. `ran` tells which function a call reached.
"""

import itertools
from dataclasses import replace

import pytest
import torch

import attnlab
from attnlab import registry, testing
from attnlab.problem import Problem
from attnlab.testing import assert_as_accurate

MODULES = {
    **{
        (op, backend): f"attnlab.{backend}_backend"
        for backend in ("triton", "cuda")
        for op in (
            "lightning_attention",
            "lightning_attention_varlen",
            "lightning_decode_",
            "lightning_state",
        )
    },
    ("lightning_attention", "torch"): "attnlab.chunked",
    ("lightning_attention_varlen", "torch"): "attnlab.chunked",
    ("softmax_decode", "triton"): "attnlab.triton_softmax",
    ("softmax_decode", "sdpa"): "attnlab.sdpa",
    **{(op, "fla"): "attnlab.fla" for op in ("lightning_attention", "lightning_attention_varlen")},
    **{
        (op, backend): "attnlab.sdpa"
        for op in ("softmax_attention", "softmax_attention_with_lse", "softmax_attention_varlen")
        for backend in ("sdpa", "flash", "cudnn")
    },
}


def pairwise(**axes):
    """Few cases in which every pair of values of two axes occurs, found greedily."""

    def pairs_of(case):
        ordered = [(name, case[name]) for name in axes if name in case]
        return set(itertools.combinations(ordered, 2))

    every = [[(name, value) for value in values] for name, values in axes.items()]
    missing = {
        pair for a, b in itertools.combinations(every, 2) for pair in itertools.product(a, b)
    }
    cases = []
    while missing:
        case = dict(min(missing, key=repr))
        for name, values in axes.items():
            if name not in case:
                gains = [len(missing & pairs_of(case | {name: value})) for value in values]
                case[name] = values[gains.index(max(gains))]
        missing -= pairs_of(case)
        cases.append({name: case[name] for name in axes})
    return cases


def case_id(case):
    parts = (str(v).removeprefix("torch.") for v in case.values())
    return "-".join(f"{n}{v}" for n, v in zip(case, parts, strict=True))


LIGHTNING_CASES = pairwise(
    T=[1, 63, 64, 65, 200, 700],
    dims=[(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (64, 128), (128, 32)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    H=[1, 3, 5],
    B=[1, 2],
    layout=["contiguous", "bthd", "sliced"],
    state=[True, False],
)
SOFTMAX_CASES = pairwise(
    T=[1, 63, 64, 200],
    S=[1, 64, 65, 200],
    dims=[(32, 32), (64, 64), (96, 96), (128, 128), (64, 128)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    heads=[(1, 1), (3, 3), (6, 2)],
    causal=[True, False],
    layout=["contiguous", "bthd"],
)

CACHE_CASES = pairwise(
    C=[1, 64, 65, 300, 700],
    dims=[(32, 32), (64, 64), (96, 96), (128, 128), (192, 192), (256, 256), (64, 128), (128, 32)],
    dtype=[torch.float32, torch.bfloat16, torch.float16],
    heads=[(1, 1), (6, 2), (16, 1), (17, 1)],
    lengths=["full", "unequal"],
    scale=[None, 0.3],
    layout=["contiguous", "bthd", "sliced"],
)


def laid_out(x, layout):
    """The same values with other strides; the last dimension stays contiguous."""
    if layout == "bthd":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "sliced":
        wide = x.new_full((*x.shape[:2], x.shape[2] + 3, x.shape[3] + 8), float("nan"))
        view = wide[:, :, 1:-2, :-8]
        return view.copy_(x)
    return x


def relayout(inputs, layout):
    names = ("query", "key", "value", "grad_output")
    return replace(inputs, **{n: laid_out(getattr(inputs, n), layout) for n in names})


def problem_of(
    op, device, *, B=1, H=1, Hk=None, T=1, S=None, dims=(64, 64), dtype=torch.float32, N=1
):
    return Problem(
        op=op,
        batch=B,
        heads=H,
        kv_heads=H if Hk is None else Hk,
        q_len=T,
        kv_len=T if S is None else S,
        key_dim=dims[0],
        value_dim=dims[1],
        dtype=dtype,
        device=device,
        requires_grad=True,
        num_documents=N,
    )


def skip_unless_it_can_run(op, backend, problem):
    reason = registry.why_not(op, backend, problem)
    if reason is not None:
        pytest.skip(f"{backend}: {reason}")


@pytest.fixture
def ran(monkeypatch):
    """Names (op, backend, module) of the implementations that calls reached."""
    reached = []
    original = registry.resolve

    def spy(op, backend, problem):
        function = original(op, backend, problem)
        inner = getattr(function, "func", function)
        reached.append((op, registry.choose(op, backend, problem), inner.__module__))
        return function

    monkeypatch.setattr("attnlab.functional.resolve", spy)
    return reached


def expect_ran(ran, op, backend):
    module = MODULES.get((op, backend), "attnlab.reference")
    assert ran[-1] == (op, backend, module)


def assert_all_as_accurate(actual, oracle, baseline):
    assert set(actual) == set(oracle) == set(baseline)
    for name, result in actual.items():
        assert_as_accurate(result, oracle[name], baseline[name], name)


@pytest.mark.parametrize("case", LIGHTNING_CASES, ids=case_id)
@pytest.mark.parametrize("backend", attnlab.list_backends("lightning_attention"))
def test_lightning_is_as_accurate_as_the_baseline(backend, case, device, ran):
    case = dict(case)
    layout, with_state = case.pop("layout"), case.pop("state")
    op = "lightning_attention"
    problem = problem_of(op, device, **case)
    skip_unless_it_can_run(op, backend, problem)
    inputs = testing.make_inputs(problem, with_state=with_state)
    oracle = testing.lightning_oracle(inputs, scale=0.5)
    baseline = testing.lightning_baseline(inputs, scale=0.5)
    ran.clear()
    actual = testing.run_lightning(relayout(inputs, layout), scale=0.5, backend=backend)
    expect_ran(ran, op, backend)
    assert actual["output"].dtype == problem.dtype
    assert actual["final_state"].dtype == torch.float32
    assert_all_as_accurate(actual, oracle, baseline)


DOCUMENTS = {
    "one": [0, 150],
    "with_empty_ones": [0, 0, 1, 65, 65, 129, 300, 300],
    "many_short": list(range(0, 140, 11)),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("with_state", [True, False], ids=["state", "nostate"])
@pytest.mark.parametrize("backend", attnlab.list_backends("lightning_attention_varlen"))
def test_packed_lightning_restarts_at_each_document(
    backend, documents, with_state, dtype, device, ran
):
    bounds = torch.tensor(DOCUMENTS[documents], dtype=torch.int32)
    op = "lightning_attention_varlen"
    num_documents = len(bounds) - 1
    problem = problem_of(op, device, H=3, T=int(bounds[-1]), dtype=dtype, N=num_documents)
    skip_unless_it_can_run(op, backend, problem)
    inputs = testing.make_inputs(problem, with_state=with_state)
    flags = {"cu_seqlens": bounds.to(device), "scale": 0.5}
    baseline = testing.lightning_baseline(inputs, **flags)
    pieces = [
        testing.lightning_oracle(
            replace(
                inputs,
                **{
                    n: getattr(inputs, n)[:, :, a:b]
                    for n in ("query", "key", "value", "grad_output")
                },
                initial_state=inputs.initial_state[n : n + 1] if with_state else None,
                grad_state=inputs.grad_state[n : n + 1],
            ),
            scale=0.5,
        )
        for n, (a, b) in enumerate(itertools.pairwise(bounds.tolist()))
    ]
    by_state = ("final_state", "grad_initial_state")
    oracle = {n: torch.cat([p[n] for p in pieces], 0 if n in by_state else 2) for n in pieces[0]}
    ran.clear()
    actual = testing.run_lightning(inputs, backend=backend, **flags)
    expect_ran(ran, op, backend)
    assert_all_as_accurate(actual, oracle, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pool", [False, True], ids=["own_state", "slots"])
@pytest.mark.parametrize("dims", [(64, 64), (128, 96)], ids=str)
@pytest.mark.parametrize("backend", attnlab.list_backends("lightning_decode_"))
def test_decode_steps_continue_the_recurrence(backend, dims, pool, dtype, device, ran):
    op = "lightning_decode_"
    problem = problem_of(op, device, B=3, H=5, T=1, dims=dims, dtype=dtype)
    skip_unless_it_can_run(op, backend, problem)
    steps = 10
    inputs = testing.make_inputs(
        replace(problem, op="lightning_attention", q_len=steps, kv_len=steps)
    )
    slots = torch.tensor([4, 0, 2], device=device) if pool else None
    state = inputs.initial_state
    if pool:
        state = torch.full((6, *state.shape[1:]), 7.0, device=device)
        state[slots] = inputs.initial_state
    else:
        state = state.clone()
    outputs = [
        attnlab.lightning_decode_(
            *(x[:, :, t : t + 1] for x in (inputs.query, inputs.key, inputs.value)),
            inputs.log_decay,
            state,
            slots=slots,
            scale=0.5,
            backend=backend,
        )
        for t in range(steps)
    ]
    expect_ran(ran, op, backend)
    no_grad = replace(inputs, grad_output=None, grad_state=None)
    baseline = testing.lightning_baseline(no_grad, scale=0.5)
    wide = inputs.to(torch.float64)
    qkvg = wide.query, wide.key, wide.value, wide.log_decay
    oracle, last = testing.reference.lightning_recurrence(
        *qkvg, scale=0.5, initial_state=wide.initial_state
    )
    assert_as_accurate(torch.cat(outputs, 2), oracle, baseline["output"], "output")
    own = state[slots] if pool else state
    assert_as_accurate(own, last, baseline["final_state"], "state")
    if pool:
        untouched = torch.tensor([1, 3, 5], device=device)
        assert (state[untouched] == 7.0).all()


@pytest.mark.parametrize("backend", attnlab.list_backends("lightning_state"))
def test_the_state_alone_is_the_final_state(backend, device, ran):
    op = "lightning_state"
    problem = problem_of(op, device, B=2, H=5, T=200, dims=(64, 96))
    skip_unless_it_can_run(op, backend, problem)
    inputs = testing.make_inputs(problem)
    baseline = testing.lightning_baseline(replace(inputs, grad_output=None, grad_state=None))
    wide = inputs.to(torch.float64)
    oracle = testing.reference.lightning_recurrence(
        wide.query, wide.key, wide.value, wide.log_decay, initial_state=wide.initial_state
    )[1]
    actual = attnlab.lightning_state(
        inputs.key,
        inputs.value,
        inputs.log_decay,
        initial_state=inputs.initial_state,
        backend=backend,
    )
    expect_ran(ran, op, backend)
    assert_as_accurate(actual, oracle, baseline["final_state"])


@pytest.mark.parametrize("with_lse", [False, True], ids=["output", "lse"])
@pytest.mark.parametrize("case", SOFTMAX_CASES, ids=case_id)
@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_attention"))
def test_softmax_is_as_accurate_as_the_baseline(backend, case, with_lse, device, ran):
    case = dict(case)
    layout, causal, (heads, kv_heads) = (case.pop(n) for n in ("layout", "causal", "heads"))
    op = "softmax_attention_with_lse" if with_lse else "softmax_attention"
    problem = problem_of(op, device, B=2, H=heads, Hk=kv_heads, **case)
    problem = replace(problem, is_causal=causal)
    skip_unless_it_can_run(op, backend, problem)
    inputs = testing.make_inputs(problem)
    flags = {"is_causal": causal, "with_lse": with_lse}
    oracle = testing.softmax_oracle(inputs, **flags)
    baseline = testing.softmax_baseline(inputs, **flags)
    ran.clear()
    actual = testing.run_softmax(relayout(inputs, layout), backend=backend, **flags)
    expect_ran(ran, op, backend)
    # With one key the weights are 1 whatever the query, and its gradient is exactly zero.
    if case["S"] == 1 or (causal and case["T"] == 1 and case["S"] == 1):
        for results in (actual, oracle, baseline):
            if not with_lse:
                results.pop("grad_query"), results.pop("grad_key")
    assert_all_as_accurate(actual, oracle, baseline)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("kind", ["bool", "additive"])
@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_attention"))
def test_softmax_takes_a_mask_beside_the_causal_one(backend, kind, causal, device):
    problem = problem_of("softmax_attention", device, B=2, H=4, Hk=2, T=33, S=70)
    problem = replace(problem, has_mask=True, is_causal=causal)
    skip_unless_it_can_run("softmax_attention", backend, problem)
    inputs = testing.make_inputs(problem)
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(33, 70, generator=generator) > 0.3
    if kind == "additive":
        mask = torch.randn(2, 1, 33, 70, generator=generator)
    mask = mask.to(device)
    flags = {"is_causal": causal, "attn_mask": mask}
    wide = flags if kind == "bool" else flags | {"attn_mask": mask.double()}
    actual = testing.run_softmax(inputs, backend=backend, **flags)
    oracle, baseline = (
        testing.softmax_oracle(inputs, **wide),
        testing.softmax_baseline(inputs, **flags),
    )
    assert_all_as_accurate(actual, oracle, baseline)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_attention_varlen"))
def test_packed_softmax_stays_inside_its_documents(backend, causal, dtype, device, ran):
    op = "softmax_attention_varlen"
    q_bounds, k_bounds = [0, 3, 3, 40, 110], [0, 5, 9, 30, 130]
    problem = problem_of(op, device, H=6, Hk=2, T=110, S=130, dtype=dtype, N=4)
    problem = replace(problem, is_causal=causal)
    skip_unless_it_can_run(op, backend, problem)
    inputs = testing.make_inputs(problem)
    q, k, v = (x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value))
    cu = [torch.tensor(b, dtype=torch.int32, device=device) for b in (q_bounds, k_bounds)]
    output = attnlab.softmax_attention_varlen(
        q, k, v, *cu, is_causal=causal, enable_gqa=True, backend=backend
    )
    expect_ran(ran, op, backend)
    grads = torch.autograd.grad(output, (q, k, v), inputs.grad_output)
    names = ("output", "grad_query", "grad_key", "grad_value")
    actual = dict(zip(names, (output.detach(), *grads), strict=True))
    pieces = {"oracle": [], "baseline": []}
    for (q0, q1), (k0, k1) in zip(
        itertools.pairwise(q_bounds), itertools.pairwise(k_bounds), strict=True
    ):
        part = replace(
            inputs,
            query=q.detach()[:, :, q0:q1],
            key=k.detach()[:, :, k0:k1],
            value=v.detach()[:, :, k0:k1],
            grad_output=inputs.grad_output[:, :, q0:q1],
        )
        pieces["oracle"].append(testing.softmax_oracle(part, is_causal=causal))
        pieces["baseline"].append(testing.softmax_baseline(part, is_causal=causal))
    whole = {n: {m: torch.cat([p[m] for p in ps], 2) for m in names} for n, ps in pieces.items()}
    assert_all_as_accurate(actual, whole["oracle"], whole["baseline"])


@pytest.mark.parametrize("case", CACHE_CASES, ids=case_id)
@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_decode"))
def test_a_step_over_a_cache_is_as_accurate_as_the_baseline(backend, case, device, ran):
    capacity, (heads, kv_heads) = case["C"], case["heads"]
    shape = {"B": 3, "H": heads, "Hk": kv_heads, "S": capacity}
    problem = problem_of("softmax_decode", device, dims=case["dims"], dtype=case["dtype"], **shape)
    skip_unless_it_can_run("softmax_decode", backend, problem)
    inputs = testing.make_inputs(problem)
    unequal = [capacity, 0, capacity // 2]
    lengths = torch.tensor(unequal if case["lengths"] == "unequal" else [capacity] * 3).to(device)
    seen = (torch.arange(capacity, device=device) < lengths[:, None])[:, None, None]
    flags = {"attn_mask": seen, "scale": case["scale"]}
    oracle = testing.softmax_oracle(inputs, **flags)["output"]
    baseline = testing.softmax_baseline(inputs, **flags)["output"]
    ran.clear()
    placed = relayout(inputs, case["layout"])
    tensors = placed.query, placed.key, placed.value, lengths
    flags = {"scale": case["scale"], "span": capacity, "backend": backend}
    actual = attnlab.softmax_decode(*tensors, **flags)
    expect_ran(ran, "softmax_decode", backend)
    assert actual.dtype == problem.dtype
    assert_as_accurate(actual, oracle, baseline)


LIGHTNING_BACKENDS = attnlab.list_backends("lightning_attention")


def lightning_inputs(backend, device, **shape):
    problem = problem_of("lightning_attention", device, **shape)
    skip_unless_it_can_run("lightning_attention", backend, problem)
    return testing.make_inputs(problem)


@pytest.mark.parametrize("cuts", [(64,), (1, 70), (33, 34, 128)], ids=str)
@pytest.mark.parametrize("backend", LIGHTNING_BACKENDS)
def test_segments_with_a_carried_state_equal_the_whole(backend, cuts, device):
    inputs = lightning_inputs(backend, device, H=3, T=200)
    state, outputs = inputs.initial_state, []
    for start, stop in itertools.pairwise([0, *cuts, 200]):
        qkv = (x[:, :, start:stop] for x in (inputs.query, inputs.key, inputs.value))
        output, state = attnlab.lightning_attention(
            *qkv, inputs.log_decay, initial_state=state, return_final_state=True, backend=backend
        )
        outputs.append(output)
    no_grad = replace(inputs, grad_output=None, grad_state=None)
    oracle, baseline = testing.lightning_oracle(inputs), testing.lightning_baseline(no_grad)
    assert_as_accurate(torch.cat(outputs, 2), oracle["output"], baseline["output"])
    assert_as_accurate(state, oracle["final_state"], baseline["final_state"])


@pytest.mark.parametrize("backend", LIGHTNING_BACKENDS)
def test_a_batch_equals_its_members_run_alone(backend, device):
    inputs = lightning_inputs(backend, device, B=3, H=3, T=130)
    whole = testing.run_lightning(inputs, backend=backend)
    names = ("query", "key", "value", "initial_state", "grad_output", "grad_state")
    alone = replace(inputs, **{n: getattr(inputs, n)[1:2] for n in names})
    member = testing.run_lightning(alone, backend=backend)
    baseline, oracle = testing.lightning_baseline(alone), testing.lightning_oracle(alone)
    for name, result in member.items():
        assert_as_accurate(result, oracle[name], baseline[name], name)
        assert_as_accurate(whole[name][1:2], oracle[name], baseline[name], name)


@pytest.mark.parametrize("backend", LIGHTNING_BACKENDS)
def test_the_same_inputs_give_the_same_bits(backend, device):
    inputs = lightning_inputs(backend, device, H=3, T=300, dtype=torch.bfloat16)
    first, second = (testing.run_lightning(inputs, backend=backend) for _ in range(2))
    for name in first:
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("empty", ["B", "T", "H"])
@pytest.mark.parametrize("backend", LIGHTNING_BACKENDS)
def test_empty_dimensions_give_empty_results(backend, empty, device):
    shape = {"B": 2, "H": 3, "T": 5} | {empty: 0}
    problem = problem_of("lightning_attention", device, **shape)
    skip_unless_it_can_run("lightning_attention", backend, problem)
    inputs = testing.make_inputs(problem)
    results = testing.run_lightning(inputs, backend=backend)
    assert results["output"].shape == (shape["B"], shape["H"], shape["T"], 64)
    assert torch.equal(results["final_state"], inputs.initial_state)
    assert torch.equal(results["grad_initial_state"], inputs.grad_state)


@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_attention"))
def test_softmax_of_nothing_is_empty_or_zero(backend, device):
    q, k = torch.randn(2, 3, 4, 64, device=device), torch.randn(2, 3, 0, 64, device=device)
    problem = Problem.of("softmax_attention", q, k, k, is_causal=False)
    skip_unless_it_can_run("softmax_attention", backend, problem)
    assert (attnlab.softmax_attention(q, k, k, backend=backend) == 0).all()
    assert attnlab.softmax_attention(k, q, q, backend=backend).shape == (2, 3, 0, 64)


@pytest.mark.parametrize("backend", LIGHTNING_BACKENDS)
def test_lightning_compiles_without_a_graph_break(backend, device):
    inputs = lightning_inputs(backend, device, H=3, T=130)
    bounds = torch.tensor([0, 40, 130], device=device)
    tensors = [x.requires_grad_() for x in (inputs.query, inputs.key, inputs.value)]

    def call(q, k, v, g, cu):
        dense = attnlab.lightning_attention(q, k, v, g, return_final_state=True, backend=backend)
        packed = attnlab.lightning_attention_varlen(q, k, v, g, cu, backend=backend)
        return dense.output + packed.output, dense.final_state

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    results = [f(*tensors, inputs.log_decay, bounds) for f in (call, compiled)]
    grads = [torch.autograd.grad(r[0].sum() + r[1].sum(), tensors) for r in results]
    for eager, traced in zip((*results[0], *grads[0]), (*results[1], *grads[1]), strict=True):
        torch.testing.assert_close(traced, eager, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_attention"))
def test_softmax_compiles_without_a_graph_break(backend, device):
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    problem = problem_of("softmax_attention", device, H=3, T=40, dtype=dtype)
    skip_unless_it_can_run("softmax_attention", backend, problem)
    inputs = testing.make_inputs(problem)
    cu = torch.tensor([0, 15, 40], device=device, dtype=torch.int32)

    def call(q, k, v, cu):
        flags = {"is_causal": True, "backend": backend}
        square = attnlab.softmax_attention(q, k, v, **flags)
        tail, lse = attnlab.softmax_attention_with_lse(q[:, :, -7:], k, v, **flags)
        return square, tail, lse, attnlab.softmax_attention_varlen(q, k, v, cu, cu, **flags)

    args = inputs.query, inputs.key, inputs.value, cu
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    for eager, traced in zip(call(*args), compiled(*args), strict=True):
        torch.testing.assert_close(traced, eager)


@pytest.mark.parametrize("backend", attnlab.list_backends("lightning_decode_"))
def test_decode_compiles_without_a_graph_break(backend, device):
    problem = problem_of("lightning_decode_", device, B=2, H=3)
    skip_unless_it_can_run("lightning_decode_", backend, problem)
    inputs = testing.make_inputs(problem)
    args = inputs.query, inputs.key, inputs.value, inputs.log_decay

    def call(q, k, v, g, state):
        return attnlab.lightning_decode_(q, k, v, g, state, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    states = inputs.initial_state.clone(), inputs.initial_state.clone()
    torch.testing.assert_close(compiled(*args, states[0]), call(*args, states[1]))
    torch.testing.assert_close(states[0], states[1])
    assert not torch.equal(states[0], inputs.initial_state)


@pytest.mark.parametrize("backend", attnlab.list_backends("softmax_decode"))
def test_a_step_over_a_cache_compiles_without_a_graph_break(backend, device):
    problem = problem_of("softmax_decode", device, B=2, H=4, Hk=2, S=300)
    skip_unless_it_can_run("softmax_decode", backend, problem)
    inputs = testing.make_inputs(problem)
    lengths = torch.tensor([300, 17], device=device)
    args = inputs.query, inputs.key, inputs.value, lengths

    def call(q, k, v, lengths):
        return attnlab.softmax_decode(q, k, v, lengths, backend=backend)

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*args), call(*args))
