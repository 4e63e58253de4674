"""Training: schedule, optimiser, files, and packs through the real model."""

import json
import math
import os
import resource
import signal
import time
from dataclasses import replace

import pytest
import torch
from torch import nn

from attnlab.model.config import HybridConfig
from attnlab.model.hybrid import HybridLM
from attnlab.training import checkpoints
from attnlab.training.guard import StopSignal, first_non_finite
from attnlab.training.log import RunLog, read_log
from attnlab.training.objective import Validation, backward, sum_losses, token_losses
from attnlab.training.optimizer import MasterAdamW
from attnlab.training.packing import IGNORED, Pack
from attnlab.training.schedule import learning_rate_factor, linear_multiplier
from attnlab.training.trainer import Trainer

EPS = torch.finfo(torch.float32).eps
# One softmax layer between two lightning ones, with the options that could leak across documents.
SMALL = HybridConfig(
    vocab_size=320,
    hidden_size=32,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    layer_types=("linear_attention", "full_attention", "linear_attention"),
    num_local_experts=4,
    num_experts_per_tok=2,
    rotary_dim=8,
    conv_width=4,
    qk_norm=True,
    eos_token_id=257,
)


def small_model(**changes):
    torch.manual_seed(0)
    return HybridLM(replace(SMALL, **changes), dtype=torch.float32).train()


def pack_of(documents):
    """A pack of whole documents, each predicting its own next tokens and then the end."""
    bounds = torch.tensor([0, *(len(d) for d in documents)]).cumsum(0).int()
    ids = torch.cat([torch.tensor(d) for d in documents])
    targets = torch.cat([torch.tensor([*d[1:], 257]) for d in documents])
    return Pack(ids[None], targets, bounds, len(ids))


def random_documents(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(256, (n,), generator=generator).tolist() for n in lengths]


def losses_of(model, pack):
    """Token losses by document."""
    losses = token_losses(model(pack.input_ids, cu_seqlens=pack.cu_seqlens).logits, pack.targets)
    return losses.split(pack.cu_seqlens.diff().tolist())


# Schedule


def test_the_learning_rate_rises_stays_and_falls():
    shape = {"steps": 100, "warmup_steps": 10, "decay_share": 0.2}
    factors = [learning_rate_factor(step, **shape) for step in range(1, 101)]
    assert factors[:10] == pytest.approx([i / 10 for i in range(1, 11)])
    assert factors[9:80] == [1.0] * 71
    # 1 - sqrt(x) over 20 steps, at x = 1/21 to 20/21.
    assert factors[80:] == pytest.approx([1 - math.sqrt(i / 21) for i in range(1, 21)])
    assert min(factors) > 0


def test_a_ramp_holds_its_value_and_then_rises_to_one():
    steps = 50
    for step in range(1, steps + 1):
        expected = min(max((step / steps - 0.2) / 0.6, 0.0), 1.0)
        assert linear_multiplier(step, steps=steps, ramp=(0.0, 0.2, 0.8)) == pytest.approx(expected)
        assert linear_multiplier(step, steps=steps, ramp=None) == 1.0
    assert linear_multiplier(1, steps=steps, ramp=(0.5, 0.2, 0.8)) == 0.5
    assert linear_multiplier(25, steps=steps, ramp=(0.5, 0.5, 0.5)) == 0.5
    assert linear_multiplier(26, steps=steps, ramp=(0.5, 0.5, 0.5)) == 1.0


# Optimiser


def two_layers():
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4))


def test_a_float32_step_is_clipped_adamw_with_decay_on_matrices():
    model, plain = two_layers(), two_layers()
    optimizer = MasterAdamW(model, dtype=torch.float32, weight_decay=0.1)
    decayed = [p for p in plain.parameters() if p.ndim == 2]
    others = [p for p in plain.parameters() if p.ndim == 1]
    oracle = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}],
        lr=0.01,
        betas=(0.9, 0.95),
        foreach=False,
    )
    for step in range(5):
        x = torch.randn(32, 8) * (step + 1)
        for m in (model, plain):
            m.zero_grad()
            m(x).square().sum().backward()
        expected = nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.collect_gradients()
        norm = optimizer.step(learning_rate=0.01, clip_norm=1.0)
        oracle.step()
        assert norm.item() == pytest.approx(expected.item(), rel=1e-5) and norm > 1.0
    for a, b in zip(model.parameters(), plain.parameters(), strict=True):
        # clip_grad_norm_ adds 1e-6 to the norm; a few roundings of updates of 0.01 on top.
        torch.testing.assert_close(a, b, rtol=0, atol=5e-6)


def test_masters_keep_updates_that_bfloat16_would_lose():
    model = nn.Linear(4, 4)
    nn.init.ones_(model.weight)
    optimizer = MasterAdamW(model, dtype=torch.bfloat16, weight_decay=0.0)
    assert model.weight.dtype == torch.bfloat16
    assert optimizer.masters["weight"].dtype == torch.float32
    for _ in range(100):
        model(torch.ones(1, 4, dtype=torch.bfloat16)).sum().backward()
        optimizer.collect_gradients()
        optimizer.step(learning_rate=1e-4, clip_norm=1e9)
    # Equal gradients make each AdamW update one learning rate; bfloat16 steps by 2^-8 below 1.
    master = optimizer.masters["weight"]
    torch.testing.assert_close(master, torch.full((4, 4), 0.99), rtol=0, atol=1e-4)
    assert torch.equal(model.weight, master.bfloat16())


def test_gradients_of_packs_add_up_in_float32():
    model = nn.Linear(1, 1, bias=False)
    optimizer = MasterAdamW(model, dtype=torch.bfloat16, weight_decay=0.0)
    for value in [1.0] + [2.0**-9] * 64:
        model.weight.grad = torch.full((1, 1), value, dtype=torch.bfloat16)
        optimizer.collect_gradients()
    # Exact in float32; a bfloat16 sum stays at 1.
    assert optimizer.masters["weight"].grad.item() == 1.0 + 64 * 2.0**-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_changes_nothing(dtype, bad):
    model = two_layers()
    optimizer = MasterAdamW(model, dtype=dtype, weight_decay=0.1)

    def step(scale):
        for p in model.parameters():
            p.grad = torch.full_like(p, 0.1)
        model[0].bias.grad[3] *= scale
        optimizer.collect_gradients()
        return optimizer.step(learning_rate=0.1, clip_norm=1.0)

    step(1.0)
    before = json.dumps(optimizer.state_dict(), default=lambda x: x.tolist())
    assert not step(bad).isfinite()
    assert json.dumps(optimizer.state_dict(), default=lambda x: x.tolist()) == before
    step(1.0)
    assert json.dumps(optimizer.state_dict(), default=lambda x: x.tolist()) != before


# Files


def test_the_last_checkpoints_are_kept_and_the_latest_is_loaded(tmp_path):
    assert checkpoints.load_checkpoint(tmp_path) is None
    for step in (5, 10, 100, 15):
        checkpoints.save_checkpoint(tmp_path, step, {"step": step}, keep=2)
    assert [p.name for p in sorted(tmp_path.iterdir())] == ["step-00000015.pt", "step-00000100.pt"]
    assert checkpoints.load_checkpoint(tmp_path) == {"step": 100}


def test_a_write_that_the_disk_refuses_leaves_the_checkpoint_before(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 1, {"x": torch.ones(10)}, keep=1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"could not write .*step-00000002\.pt, what was there"):
            checkpoints.save_checkpoint(tmp_path, 2, {"x": torch.ones(10**6)}, keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001.pt"]
    assert torch.equal(checkpoints.load_checkpoint(tmp_path)["x"], torch.ones(10))


def test_a_damaged_checkpoint_is_named(tmp_path):
    checkpoints.save_checkpoint(tmp_path, 3, {"x": torch.ones(1000)}, keep=1)
    path = tmp_path / "step-00000003.pt"
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(ValueError, match=r"whole checkpoint, got .*step-00000003\.pt"):
        checkpoints.load_checkpoint(tmp_path)


def test_a_log_opened_again_loses_what_comes_after_the_step(tmp_path):
    path = tmp_path / "log.jsonl"
    log = RunLog(path, step=0)
    log.write([{"step": step, "loss": 0.1 * step} for step in range(1, 8)])
    with path.open("a") as file:
        file.write('{"step": 8, "lo')
    again = RunLog(path, step=5)
    again.write([{"step": 6, "loss": 0.25}])
    assert [line["step"] for line in read_log(path)] == [1, 2, 3, 4, 5, 6]
    assert read_log(path)[-1]["loss"] == 0.25
    log.close()
    again.close()


def test_the_first_signal_waits_and_the_second_interrupts():
    before = signal.default_int_handler  # a shell's background jobs start with it ignored
    signal.signal(signal.SIGINT, before)
    with pytest.raises(KeyboardInterrupt), StopSignal() as stop:
        assert not stop.caught
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.01)
        assert stop.caught
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert signal.getsignal(signal.SIGINT) is before


# Packs through the model


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_a_document_sees_nothing_of_its_neighbours_in_a_pack(mode):
    model = getattr(small_model(), mode)()
    documents = random_documents([70, 1, 33, 130])
    others = [*documents[:2], random_documents([33], seed=9)[0], documents[3]]
    base, changed = losses_of(model, pack_of(documents)), losses_of(model, pack_of(others))
    for i in (0, 1, 3):
        # The same rows of the same products; an expert's rows may be summed in another grouping.
        torch.testing.assert_close(changed[i], base[i], rtol=0, atol=16 * EPS * math.log(320))
    assert (changed[2] - base[2]).abs().max() > 0.01
    for document, packed in zip(documents, base, strict=True):
        (alone,) = losses_of(model, pack_of([document]))
        torch.testing.assert_close(packed, alone, rtol=0, atol=16 * EPS * math.log(320))


def test_no_gradient_of_a_document_reaches_its_neighbours():
    model = small_model(router_aux_loss_coef=0.0)
    pack = pack_of([[1] * 40, [2] * 50, [3] * 60])
    losses_of(model, pack)[1].sum().backward()
    rows = model.model.embed_tokens.weight.grad.abs().amax(dim=1)
    assert rows[2] > 0 and rows[1] == 0 and rows[3] == 0


def test_how_a_step_is_cut_into_packs_changes_nothing():
    documents = random_documents([60, 20, 50, 30])
    whole, first, second = (pack_of(d) for d in (documents, documents[:1], documents[1:]))
    ignored = second.targets.clone()
    ignored[10:40] = IGNORED  # packs of 60 and of 70 targets
    second = second._replace(targets=ignored, num_targets=second.num_targets - 30)
    joined = torch.cat([first.targets, ignored])
    whole = whole._replace(targets=joined, num_targets=whole.num_targets - 30)
    results = []
    for packs in ([whole], [first, second]):
        model = small_model(router_aux_loss_coef=0.0)
        trainer = Trainer(model, dtype=torch.float32, weight_decay=0.0, clip_norm=1.0)
        total = sum(backward(model, p, num_targets=130) for p in packs)
        gradients = [p.grad.clone() for p in model.parameters()]
        model.zero_grad()
        loss, norm = trainer.step(packs, learning_rate=0.0, multiplier=1.0)
        assert loss.item() == pytest.approx(total.item() / 130, rel=1e-6)
        assert norm.item() == pytest.approx(nn.utils.get_total_norm(gradients).item(), rel=1e-6)
        results.append((loss.item(), gradients))
    assert results[0][0] == pytest.approx(results[1][0], rel=1e-5)
    for a, b in zip(results[0][1], results[1][1], strict=True):
        # Sums of 130 terms in another order.
        torch.testing.assert_close(a, b, rtol=0, atol=64 * EPS * a.abs().max().item())


def test_the_routers_loss_counts_with_its_coefficient_and_the_packs_share():
    pack = pack_of(random_documents([50, 14]))

    def router_gradients(coefficient):
        model = small_model(router_aux_loss_coef=coefficient)
        backward(model, pack, num_targets=4 * 64)  # a quarter of a step
        return [layer.mlp.gate.weight.grad.double() for layer in model.model.layers]

    model = small_model()
    model(pack.input_ids, cu_seqlens=pack.cu_seqlens).aux_loss.backward()
    for layer, plain, more in zip(
        model.model.layers, router_gradients(0.0), router_gradients(8.0), strict=True
    ):
        expected = 8.0 / 4 * layer.mlp.gate.weight.grad.double()
        # Rounded at the size of the sum that they are the difference of.
        scale = max(plain.abs().max().item(), expected.abs().max().item())
        torch.testing.assert_close(more - plain, expected, rtol=0, atol=64 * EPS * scale)


def test_activation_checkpointing_gives_the_same_gradients():
    pack = pack_of(random_documents([100, 40]))
    gradients = []
    for on in (False, True):
        model = small_model()
        model.gradient_checkpointing = on
        backward(model, pack, num_targets=140)
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=8 * EPS * a.abs().max().item())


def test_the_ramp_reaches_the_linear_layers_in_training_alone():
    pack = pack_of(random_documents([64]))

    def loss_with(multiplier):
        trainer = Trainer(small_model(), dtype=torch.float32, weight_decay=0.1, clip_norm=1.0)
        loss, _ = trainer.step([pack], learning_rate=1e-9, multiplier=multiplier)
        with torch.no_grad():
            evaluated = losses_of(trainer.model.eval(), pack)[0].mean()
        return loss.item(), evaluated.item()

    (off, off_evaluated), (on, on_evaluated) = loss_with(0.0), loss_with(1.0)
    assert abs(off - on) > 1e-4
    assert off_evaluated == pytest.approx(on_evaluated, abs=1e-5)  # updates of 1e-9


def test_validation_gives_the_mean_loss_of_each_octave_of_positions():
    model = small_model()
    packs = [pack_of(random_documents([9, 1, 20], seed)) for seed in (1, 2)]
    result = Validation.of(sum_losses(model, packs), bits_per_byte_of_a_nat=2.0)
    assert model.training
    with torch.no_grad():
        by_document = [x for pack in packs for x in losses_of(model.eval(), pack)]
    for octave in result.by_position:
        inside = torch.cat([x[octave.start : octave.stop] for x in by_document])
        assert octave.targets == len(inside)
        assert octave.nats == pytest.approx(inside.double().mean().item(), rel=1e-6)
        assert octave.bits_per_byte == 2.0 * octave.nats
    bounds = [(octave.start, octave.stop) for octave in result.by_position]
    assert bounds == [(0, 1), (1, 2), (2, 4), (4, 8), (8, 16), (16, 32)]
    assert result.nats == pytest.approx(torch.cat(by_document).double().mean().item(), rel=1e-6)


@pytest.mark.parametrize("place", ["model.layers.1.self_attn.q_proj", "model.norm"])
def test_the_first_layer_that_is_not_finite_is_named(place):
    model, pack = small_model(), pack_of(random_documents([30]))

    def run():
        backward(model, pack, num_targets=30)

    assert first_non_finite(model, run) is None
    with torch.no_grad():
        model.get_submodule(place).weight.view(-1)[0] = math.nan
    assert first_non_finite(model, run).what == f"the output of {place}"
    assert all(p.grad is None for p in model.parameters())


def test_a_gradient_that_is_not_finite_is_named_where_all_outputs_are():
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.register_hook(lambda grad: grad * math.inf)
    run = lambda: model(torch.ones(2, 4)).sum().backward()  # noqa: E731
    assert first_non_finite(model, run).what == "the gradient of 0.weight"
