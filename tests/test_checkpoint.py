"""Checkpoints: names and shapes, both layouts, streaming, damaged files, and crashes at any instant.

A loaded weight is a copy, so it is compared bit for bit; what `torch.empty` leaves unwritten is NaN
here (conftest.py), so a part that no tensor filled is seen.
"""

import dataclasses
import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from attnlab.decay import minimax_log_decay
from attnlab.model import HybridConfig, HybridLM, checkpoint, transaction

LAYOUTS = ("released", "transformers")
SMALL = dataclasses.replace(
    HybridConfig.tiny(),
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    head_dim=8,
    rotary_dim=4,
    num_hidden_layers=3,
    layer_types=("linear_attention", "full_attention", "linear_attention"),
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
SHARD_BYTES = 6000  # cuts SMALL into several shards, some tensors being larger


def small_model(seed=0, dtype=torch.float32, **changes):
    """A model whose weights are all different, norms too."""
    model = HybridLM(dataclasses.replace(SMALL, **changes), dtype=dtype).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator))
    return model


def weights(model):
    return {name: weight.detach().clone() for name, weight in model.named_parameters()}


def assert_same_weights(model, expected):
    got = weights(model)
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == weight.dtype and torch.equal(got[name], weight), name


def rewrite(file, change):
    """Change the dict of tensors of a safetensors file."""
    tensors = {name: values.clone() for name, values in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def minimax_01_shapes():
    """MiniMax-Text-01's released tensors, written out from its published config and listing."""
    hidden, inner, kv, expert, vocab = 6144, 64 * 128, 8 * 128, 9216, 200_064
    yield from (("model.embed_tokens.weight", (vocab, hidden)), ("lm_head.weight", (vocab, hidden)))
    yield "model.norm.weight", (hidden,)
    for i in range(80):
        layer = f"model.layers.{i}"
        yield f"{layer}.input_layernorm.weight", (hidden,)
        yield f"{layer}.post_attention_layernorm.weight", (hidden,)
        if i % 8 == 7:
            mixer = {"q_proj": (inner, hidden), "k_proj": (kv, hidden), "v_proj": (kv, hidden)}
            mixer["o_proj"] = (hidden, inner)
        else:
            mixer = {"qkv_proj": (24_576, hidden), "output_gate": (inner, hidden)}
            mixer |= {"norm": (inner,), "out_proj": (hidden, inner)}
        for name, shape in mixer.items():
            yield f"{layer}.self_attn.{name}.weight", shape
        yield f"{layer}.block_sparse_moe.gate.weight", (32, hidden)
        for e, (w, shape) in itertools.product(
            range(32),
            {"w1": (expert, hidden), "w2": (hidden, expert), "w3": (expert, hidden)}.items(),
        ):
            yield f"{layer}.block_sparse_moe.experts.{e}.{w}.weight", shape


@pytest.fixture(scope="module")
def minimax_01():
    return HybridLM(HybridConfig.minimax_01(), device="meta", dtype=torch.bfloat16)


def test_minimax_01_has_the_8243_released_tensors(minimax_01):
    names = list(checkpoint.released_names(minimax_01))
    assert len(names) == 8243
    assert dict(names) == dict(minimax_01_shapes())


def test_the_shards_of_minimax_01_can_be_listed_without_its_weights(minimax_01):
    shards = checkpoint.plan_shards(minimax_01)
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(count)]
    assert list(shards) == names
    sizes = {name: sum(p.num_bytes for p in shard) for name, shard in shards.items()}
    elements = sum(torch.Size(shape).numel() for _, shape in minimax_01_shapes())
    assert sum(sizes.values()) == 2 * elements  # 912 GB: 2 bytes each
    assert round(sum(sizes.values()) / 1e9) == 912
    assert all(sizes[name] <= 2**31 or len(shards[name]) == 1 for name in names)
    assert all(parameter.is_meta for parameter in minimax_01.parameters())


def test_fused_shards_of_minimax_01_are_numbered_from_one(minimax_01):
    shards = checkpoint.plan_shards(minimax_01, layout="transformers", max_shard_bytes=10**10)
    assert next(iter(shards)) == f"model-00001-of-{len(shards):05d}.safetensors"
    fused = {p.name: p.shape for shard in shards.values() for p in shard}
    assert fused["model.layers.3.mlp.experts.gate_up_proj"] == (32, 2 * 9216, 6144)
    assert fused["model.layers.3.mlp.experts.down_proj"] == (32, 6144, 9216)
    assert len(fused) == 8243 - 80 * (3 * 32 - 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("max_shard_bytes", [10**9, SHARD_BYTES, 1], ids=lambda n: f"{n}B")
def test_a_saved_model_is_loaded_bit_for_bit(tmp_path, layout, max_shard_bytes):
    model = small_model()
    checkpoint.save(model, tmp_path, layout=layout, max_shard_bytes=max_shard_bytes)
    loaded = HybridLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, weights(model))
    ids = torch.arange(12)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_the_released_layout_splits_experts_into_gate_down_and_up(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    file = load_file(tmp_path / "model.safetensors")
    assert list(file) == sorted(dict(checkpoint.released_names(model)))
    for i, layer in enumerate(model.model.layers):
        fused, down = layer.mlp.experts.gate_up_proj, layer.mlp.experts.down_proj
        for e in range(4):
            stem = f"model.layers.{i}.block_sparse_moe.experts.{e}"
            assert torch.equal(file[f"{stem}.w1.weight"], fused[e, :24])
            assert torch.equal(file[f"{stem}.w3.weight"], fused[e, 24:])
            assert torch.equal(file[f"{stem}.w2.weight"], down[e])


def test_an_index_says_where_each_tensor_is(tmp_path):
    model = small_model()
    checkpoint.save(model, tmp_path, max_shard_bytes=SHARD_BYTES)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 3 and files[0].name == f"model-00000-of-{len(files):05d}.safetensors"
    found, total = {}, 0
    for file in files:
        tensors = load_file(file)
        total += sum(x.numel() * x.element_size() for x in tensors.values())
        assert len(tensors) == 1 or sum(4 * x.numel() for x in tensors.values()) <= SHARD_BYTES
        found |= dict.fromkeys(tensors, file.name)
    assert index["weight_map"] == found
    assert index["metadata"]["total_size"] == total == 4 * model.num_parameters()


@pytest.mark.parametrize(
    "options",
    [
        {"conv_width": 3, "qk_norm": True, "log_length_scale": True, "rotary_float64": True},
        {"tie_word_embeddings": True},
        {"rotary_dim": 8},
    ],
    ids=["options", "tied", "whole-rotary"],
)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_options_and_tied_embeddings_survive_a_checkpoint(tmp_path, layout, options):
    model = small_model(**options)
    model.save_pretrained(tmp_path, layout=layout)
    loaded = HybridLM.from_pretrained(tmp_path)
    assert loaded.config == model.config
    assert_same_weights(loaded, weights(model))
    tied = loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert tied == options.get("tie_word_embeddings", False)


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("wanted", [None, torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_weights_take_the_dtype_of_the_model_and_decays_stay_float32(tmp_path, stored, wanted):
    model = small_model(dtype=stored)
    model.save_pretrained(tmp_path)
    loaded = HybridLM.from_pretrained(tmp_path, dtype=wanted)
    expected = {name: weight.to(wanted or stored) for name, weight in weights(model).items()}
    assert_same_weights(loaded, expected)
    for i in (0, 2):
        decay = loaded.model.layers[i].self_attn.log_decay
        assert decay.dtype == torch.float32
        assert torch.equal(decay, minimax_log_decay(4, layer=i, num_layers=3))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_decays_in_a_file_are_passed_over(tmp_path, layout):
    model = small_model(dtype=torch.bfloat16)
    model.save_pretrained(tmp_path, layout=layout)

    def add_decays(tensors):
        for name in ("slope_rate", "query_decay", "key_decay", "diagonal_decay"):
            tensors[f"model.layers.0.self_attn.{name}"] = torch.full((4, 1, 1), 7.0).bfloat16()
        tensors["model.rotary_emb.inv_freq"] = torch.full((2,), 7.0)

    rewrite(tmp_path / "model.safetensors", add_decays)
    loaded = HybridLM.from_pretrained(tmp_path)
    ids = torch.arange(20)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    expected = minimax_log_decay(4, layer=0, num_layers=3)
    assert torch.equal(loaded.model.layers[0].self_attn.log_decay, expected)


def test_a_config_without_rotary_dim_rotates_whole_heads(tmp_path):
    model = small_model(rotary_dim=8)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["rotary_dim"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert checkpoint.read_config(tmp_path).rotary_dim == 8


def test_loading_fills_a_model_that_has_weights_already(tmp_path):
    model, other = small_model(0), small_model(1)
    checkpoint.save(model, tmp_path, max_shard_bytes=SHARD_BYTES)
    places = {name: weight.data_ptr() for name, weight in other.named_parameters()}
    checkpoint.load(other, tmp_path)
    assert_same_weights(other, weights(model))
    assert places == {name: weight.data_ptr() for name, weight in other.named_parameters()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_is_saved_from_a_device_and_loaded_onto_it(tmp_path, layout, device):
    model = small_model().to(device)
    checkpoint.save(model, tmp_path, layout=layout, max_shard_bytes=SHARD_BYTES)
    loaded = HybridLM.from_pretrained(tmp_path, device=device)
    assert_same_weights(loaded, weights(model))
    for tensor in (*loaded.parameters(), *loaded.buffers()):
        assert tensor.device.type == device
    ids = torch.arange(12, device=device)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)


def test_one_error_lists_missing_unexpected_and_misshaped_tensors_and_changes_nothing(tmp_path):
    model = small_model()
    checkpoint.save(model, tmp_path, max_shard_bytes=SHARD_BYTES)
    files = sorted(tmp_path.glob("*.safetensors"))
    with safe_open(files[0], "pt") as first, safe_open(files[-1], "pt") as last:
        gone, wrong = sorted(first.keys())[0], sorted(last.keys())[0]
    rewrite(files[0], lambda tensors: tensors.pop(gone))
    rewrite(files[-1], lambda tensors: tensors.update({wrong: torch.zeros(3, 5)}))
    rewrite(files[1], lambda tensors: tensors.update({"model.surplus": torch.zeros(2)}))
    other = small_model(1)
    before = weights(other)
    with pytest.raises(ValueError) as caught:
        checkpoint.load(other, tmp_path)
    text = str(caught.value)
    assert f"1 missing: {gone} [" in text
    assert "1 unexpected: model.surplus [2]" in text
    assert f"1 of another shape or type: {wrong} F32 [3, 5] instead of [" in text
    assert_same_weights(other, before)

    empty = HybridLM(SMALL, device="meta")
    with pytest.raises(ValueError, match="1 missing"):
        checkpoint.load(empty, tmp_path)
    assert all(weight.is_meta for weight in empty.parameters())


def test_a_checkpoint_of_another_size_is_refused_with_a_short_list(tmp_path):
    small_model(num_local_experts=16).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="unexpected") as caught:
        checkpoint.load(small_model(), tmp_path)
    assert "and 88 more" in str(caught.value)  # 3 layers x 12 experts x 3 matrices, 20 named
    assert len(str(caught.value)) < 5000


def test_quantised_weights_are_refused(tmp_path):
    small_model().save_pretrained(tmp_path)

    def quantise(tensors):
        tensors["lm_head.weight"] = tensors["lm_head.weight"].to(torch.int8)

    rewrite(tmp_path / "model.safetensors", quantise)
    with pytest.raises(ValueError, match=r"lm_head.weight I8 \[40, 16\]"):
        HybridLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, -1], ids=["nothing", "4B", "100B", "all-but-1B"])
def test_a_truncated_shard_is_named_before_anything_changes(tmp_path, kept):
    checkpoint.save(small_model(), tmp_path, max_shard_bytes=SHARD_BYTES)
    file = sorted(tmp_path.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:kept])
    other = small_model(1)
    before = weights(other)
    with pytest.raises(ValueError, match=f"{file.name} is truncated or corrupt"):
        checkpoint.load(other, tmp_path)
    assert_same_weights(other, before)


def test_a_file_that_is_no_safetensors_is_named(tmp_path):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"version https://git-lfs.example\n" * 5)
    with pytest.raises(ValueError, match=r"model.safetensors is truncated or corrupt"):
        HybridLM.from_pretrained(tmp_path)


def test_missing_shards_are_listed(tmp_path):
    checkpoint.save(small_model(), tmp_path, max_shard_bytes=SHARD_BYTES)
    files = sorted(tmp_path.glob("*.safetensors"))
    files[0].unlink()
    files[2].unlink()
    message = f"lacks 2 of {len(files)} shards: {files[0].name}, {files[2].name}"
    with pytest.raises(ValueError, match=message):
        HybridLM.from_pretrained(tmp_path)


def test_an_index_may_not_lead_out_of_the_folder(tmp_path):
    small_model().save_pretrained(tmp_path / "other")
    checkpoint.save(small_model(), tmp_path / "own", max_shard_bytes=SHARD_BYTES)
    index = tmp_path / "own" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"x": "../other/model.safetensors"}}))
    with pytest.raises(ValueError, match=r"lacks 1 of 1 shards: \.\./other"):
        HybridLM.from_pretrained(tmp_path / "own")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"metadata": {}}', '{"weight_map": {}}'])
def test_a_damaged_index_is_named(tmp_path, text):
    checkpoint.save(small_model(), tmp_path, max_shard_bytes=SHARD_BYTES)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"model.safetensors.index.json"):
        HybridLM.from_pretrained(tmp_path)


def test_a_tensor_in_two_shards_is_refused(tmp_path):
    checkpoint.save(small_model(), tmp_path, max_shard_bytes=SHARD_BYTES)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    rewrite(last, lambda tensors: tensors.update({"model.embed_tokens.weight": torch.ones(40, 16)}))
    with pytest.raises(ValueError, match=r"model\.embed_tokens\.weight is in two shards"):
        HybridLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]"])
def test_a_damaged_config_is_named(tmp_path, text):
    small_model().save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=r"config.json"):
        HybridLM.from_pretrained(tmp_path)


def test_a_folder_without_a_checkpoint_says_what_is_expected(tmp_path):
    with pytest.raises(FileNotFoundError, match="a folder with a checkpoint"):
        HybridLM.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"expected config.json"):
        HybridLM.from_pretrained(tmp_path)
    small_model().save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"expected model.safetensors"):
        HybridLM.from_pretrained(tmp_path)


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="layout among released, transformers, got 'gguf'"):
        small_model().save_pretrained(tmp_path / "a", layout="gguf")
    with pytest.raises(ValueError, match=r"got model.embed_tokens.weight on the meta device"):
        HybridLM(SMALL, device="meta").save_pretrained(tmp_path / "a")
    assert not (tmp_path / "a").exists()
    (tmp_path / "file").write_text("kept")
    with pytest.raises(ValueError, match="expected a folder to save into"):
        small_model().save_pretrained(tmp_path / "file")
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.parametrize("second", [SHARD_BYTES, 3 * SHARD_BYTES, 10**9], ids=lambda n: f"{n}B")
def test_a_new_checkpoint_replaces_the_old_files_and_leaves_those_of_others(tmp_path, second):
    checkpoint.save(small_model(0), tmp_path, max_shard_bytes=SHARD_BYTES)
    (tmp_path / "tokenizer.json").write_text("{}")
    (tmp_path / "notes").mkdir()
    new = small_model(1)
    checkpoint.save(new, tmp_path, layout="transformers", max_shard_bytes=second)
    planned = checkpoint.plan_shards(new, layout="transformers", max_shard_bytes=second)
    names = {*planned, "config.json", "tokenizer.json", "notes"}
    names |= {"model.safetensors.index.json"} if len(planned) > 1 else set()
    assert {entry.name for entry in tmp_path.iterdir()} == names
    assert_same_weights(HybridLM.from_pretrained(tmp_path), weights(new))


def test_a_folder_behind_a_link_is_replaced_where_it_is(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for seed in (0, 1):
        small_model(seed).save_pretrained(tmp_path / "link")
    assert (tmp_path / "link").is_symlink()
    assert_same_weights(HybridLM.from_pretrained(tmp_path / "disk"), weights(small_model(1)))


def test_a_load_that_has_begun_reads_one_checkpoint_though_it_is_replaced(tmp_path, monkeypatch):
    old = small_model(0)
    checkpoint.save(old, tmp_path, max_shard_bytes=SHARD_BYTES)
    check = checkpoint._check

    def replace_meanwhile(*arguments):
        checkpoint.save(small_model(1), tmp_path, max_shard_bytes=SHARD_BYTES)
        return check(*arguments)

    monkeypatch.setattr(checkpoint, "_check", replace_meanwhile)
    model = small_model(2)
    checkpoint.load(model, tmp_path)
    assert_same_weights(model, weights(old))


def test_an_exception_while_saving_leaves_the_checkpoint_before(tmp_path, monkeypatch):
    old = small_model(0)
    checkpoint.save(old, tmp_path, max_shard_bytes=SHARD_BYTES)
    before = {entry.name: entry.stat().st_mtime_ns for entry in tmp_path.iterdir()}
    write, written = checkpoint._write_shard, []

    def interrupted(*arguments):
        written.append(arguments)
        if len(written) == 3:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(checkpoint, "_write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(small_model(1), tmp_path, max_shard_bytes=SHARD_BYTES)
    assert {entry.name: entry.stat().st_mtime_ns for entry in tmp_path.iterdir()} == before


# Run in a process of its own: each line of its output is one case, checked there.
SUBPROCESS = """
import os, resource, sys
sys.path.insert(0, {tests!r})
from pathlib import Path
import torch
torch.set_num_threads(1)
from test_checkpoint import *
torch.utils.deterministic.fill_uninitialized_memory = False
folder = Path({folder!r})
"""

FULL_DISK = """
old = small_model(0)
checkpoint.save(old, folder, max_shard_bytes=SHARD_BYTES)
before = {entry.name: entry.read_bytes() for entry in folder.iterdir()}
for limit in (0, 200, 2000):  # bytes a file may have: full in the config, in a header, in the data
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(small_model(1), folder, max_shard_bytes=SHARD_BYTES)
    except OSError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert "could not be written, its last complete checkpoint stays valid" in str(error)
        assert "File too large" in str(error), error
        assert {entry.name: entry.read_bytes() for entry in folder.iterdir()} == before
        os.write(1, b"full ")
"""

# A child is killed at its n-th call that changes the file system, for every n it comes to.
KILLED = """
CALLS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")
models = {name: small_model(seed) for seed, name in enumerate(("old", "new"))}
sizes = {"old": SHARD_BYTES, "new": 3 * SHARD_BYTES}
before = weights(models["old"])


def child(fatal):
    count = 0
    def counted(call):
        def run(*arguments, **flags):
            nonlocal count
            if count == fatal:
                os._exit(9)
            count += 1
            return call(*arguments, **flags)
        return run
    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))
    checkpoint.save(models["new"], path, max_shard_bytes=sizes["new"])
    os._exit(0)


for fatal in range(1000):
    path = folder / str(fatal)
    checkpoint.save(models["old"], path, max_shard_bytes=sizes["old"])
    (path / "tokenizer.json").write_text("kept")
    pid = os.fork()
    if pid == 0:
        child(fatal)
    killed = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 9
    loaded = weights(HybridLM.from_pretrained(path))
    held = [n for n, m in models.items() if all(map(torch.equal, weights(m).values(), loaded.values()))]
    assert len(held) == 1, (fatal, held)
    os.write(1, held[0].encode() + b" ")
    # Those who don't know of transactions find one checkpoint, or a part of one, but no mixture.
    seen = {p.name: p.read_bytes() for p in path.iterdir() if p.name.startswith(("model", "config"))}
    whole = {}
    for name, model in models.items():
        checkpoint.save(model, folder / name, max_shard_bytes=sizes[name])
        whole[name] = {p.name: p.read_bytes() for p in (folder / name).iterdir()}
    assert any(seen.items() <= files.items() for files in whole.values()), (fatal, list(seen))
    # What was left is no hindrance to the next save, and others' files are still there.
    checkpoint.save(models["new"], path, max_shard_bytes=sizes["new"])
    after = {p.name: p.read_bytes() for p in path.iterdir()}
    assert after == {**whole["new"], "tokenizer.json": b"kept"}, (fatal, list(after))
    if not killed:
        break
"""


def in_subprocess(code, folder):
    header = SUBPROCESS.format(tests=str(Path(__file__).parent), folder=str(folder))
    command = [sys.executable, "-c", header + code]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.split()


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path):
    assert in_subprocess(FULL_DISK, tmp_path / "model") == ["full"] * 3


def test_a_process_killed_at_any_instant_leaves_the_old_or_the_new_checkpoint(tmp_path):
    outcomes = in_subprocess(KILLED, tmp_path)
    first_new = outcomes.index("new")
    assert outcomes == ["old"] * first_new + ["new"] * (len(outcomes) - first_new)
    assert first_new > 8 and len(outcomes) - first_new > 20  # killed before and after the commit


def test_a_commit_that_was_cut_short_is_read_whole(tmp_path):
    (tmp_path / "a").write_text("old a")
    (tmp_path / "gone").write_text("old")
    (tmp_path / "other").write_text("of others")
    committed = tmp_path / transaction.COMMITTED
    committed.mkdir()
    (committed / "a").write_text("new a")
    (committed / "b").write_text("new b")
    (committed / transaction.MANIFEST).write_text('["gone"]')
    texts = {name: p.read_text() for name, p in transaction.current_files(tmp_path).items()}
    assert texts == {"a": "new a", "b": "new b", "other": "of others"}


MEMORY = """
def peak():
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")).split()[1]) / 1024
def reset():
    open("/proc/self/clear_refs", "w").write("5")
    return int(next(x for x in open("/proc/self/status") if x.startswith("VmRSS")).split()[1]) / 1024
wide = dict(hidden_size=256, intermediate_size=512, num_local_experts=16, num_hidden_layers=3)
model = HybridLM(dataclasses.replace(SMALL, **wide))
size = sum(4 * w.numel() for w in model.parameters()) / 2**20
for layout in LAYOUTS:
    start = reset()
    checkpoint.save(model, folder, layout=layout, max_shard_bytes=2**23)
    saving = peak() - start
    empty = HybridLM(model.config, device="meta", dtype=torch.bfloat16)
    start = reset()
    checkpoint.load(empty, folder)
    os.write(1, f"{size} {saving} {peak() - start} ".encode())
    del empty
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's /proc")
def test_beyond_the_model_at_most_about_one_shard_is_in_memory(tmp_path):
    shard = {"released": 8, "transformers": 16}  # MiB; the fused gate_up_proj is larger than 8
    numbers = [float(x) for x in in_subprocess(MEMORY, tmp_path)]
    assert len(numbers) == 6
    for layout, (size, saving, loading) in zip(LAYOUTS, (numbers[:3], numbers[3:]), strict=True):
        assert size > 70
        assert saving < 2 * shard[layout]
        assert loading < size / 2 + 2 * shard[layout]  # the model has 16 bits
