"""`attnlab generate`: from a folder to text that comes as soon as its characters are whole."""

import io
import json
import sys

import pytest
import torch
from test_generate import cut_after
from test_model import small_config

from attnlab import cli
from attnlab.inference.generate import generate
from attnlab.inference.text import TextStream
from attnlab.model import HybridLM
from attnlab.training.tokenizer import ByteTokenizer

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        "naïve – 東京 🙂🙂 é",
        "e\u0301 \U0001f469\u200d\U0001f680",
        "\ufffd is a character too",
    ],
)
def test_text_comes_as_soon_as_its_characters_are_whole(text):
    tokenizer = ByteTokenizer()
    shown = TextStream(tokenizer.decode, tokenizer.encode("before: ü"))
    pieces = []
    for byte in tokenizer.encode(text):
        pieces.append(shown.push(byte))
        if "\ufffd" not in text:
            whole = len(b"".join(p.encode() for p in pieces))
            assert text.startswith("".join(pieces)) and "\ufffd" not in pieces[-1]
            assert len(pieces) - whole < 4
    assert "".join(pieces) + shown.close() == text


def test_bytes_that_are_no_text_come_as_replacement_characters():
    tokenizer = ByteTokenizer()
    generator = torch.Generator().manual_seed(0)
    for high in (256, 160):
        ids = torch.randint(high - 96, high, (600,), generator=generator).tolist()
        ids[300:300] = [tokenizer.eos_token_id] * 20
        shown = TextStream(tokenizer.decode)
        pieces = [shown.push(i) for i in ids]
        assert "".join(pieces) + shown.close() == tokenizer.decode(ids)
        assert len("".join(pieces[:500])) > 300  # it doesn't wait for the end


def test_decoders_that_replace_single_bytes_are_waited_for():
    """Byte fallback gives up a whole run of bytes while its last character isn't whole."""
    decoders = pytest.importorskip("tokenizers").decoders
    fallback = decoders.ByteFallback()

    def decode(ids):
        return fallback.decode([f"<0x{i:02X}>" for i in ids])

    shown = TextStream(decode, list("東京".encode()))
    pieces = [shown.push(i) for i in "€🙂é".encode()]
    assert pieces == ["", "", "€", "", "", "", "🙂", "", "é"]
    assert shown.close() == ""


def test_a_space_between_words_is_not_taken_for_one_at_the_start():
    """Metaspace drops the space that begins a text."""
    decoder = pytest.importorskip("tokenizers").decoders.Metaspace()
    words = ["▁we", "▁see", "ing", "▁", "▁it"]
    shown = TextStream(lambda ids: decoder.decode([words[i] for i in ids]), [0])
    pieces = [shown.push(i) for i in (1, 2, 1, 3, 4, 0)]
    assert "".join(pieces) == decoder.decode([words[i] for i in (0, 1, 2, 1, 3, 4, 0)])[2:]
    assert pieces[:2] == [" see", "ing"]


@pytest.fixture
def folder(tmp_path):
    """A small untrained model with the byte tokenizer, as training leaves one."""
    torch.manual_seed(0)
    config = small_config(vocab_size=259, eos_token_id=257)
    path = tmp_path / "model"
    HybridLM(config).save_pretrained(path, layout="transformers")
    ByteTokenizer().save(path)
    return path


def test_the_command_prints_the_prompt_and_how_the_model_goes_on(folder, capsys):
    model, tokenizer = HybridLM.from_pretrained(folder), ByteTokenizer()
    prompt = tokenizer.encode("naïve")
    args = ["generate", str(folder), "--prompt", "naïve", "--max-new-tokens", "30"]
    ids = generate(model, [prompt], max_new_tokens=30)[0]
    for more in ([], ["--chunk-size", "2"], ["--backend", "reference"], ["--device", "cpu"]):
        assert cli.main([*args, "--temperature", "0", *more]) == 0
        assert capsys.readouterr().out == "naïve" + tokenizer.decode(ids) + "\n"
    draws = {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "seed": 7}
    options = [x for name, v in draws.items() for x in (f"--{name.replace('_', '-')}", str(v))]
    ids = generate(model, [prompt], max_new_tokens=30, **draws)[0]
    assert cli.main([*args, *options]) == 0
    assert capsys.readouterr().out == "naïve" + tokenizer.decode(ids) + "\n"
    outs = set()
    for _ in range(2):
        assert cli.main([*args, "--temperature", "1.5"]) == 0
        outs.add(capsys.readouterr().out)
    assert len(outs) == 2


class Terminal(io.StringIO):
    """Shows what was flushed alone."""

    shown = ""

    def flush(self):
        self.shown = self.getvalue()


def test_the_command_prints_tokens_as_they_come_and_can_be_interrupted(folder, monkeypatch):
    seen = []

    def slow_stream(*_, **__):
        for byte in "aé!".encode():
            seen.append(sys.stdout.shown)
            yield torch.tensor([byte])
        seen.append(sys.stdout.shown)
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "stream", slow_stream)
    monkeypatch.setattr(sys, "stdout", Terminal())
    assert cli.main(["generate", str(folder), "--prompt", ">"]) == 130
    assert seen == [">", ">a", ">a", ">aé", ">aé!"]
    assert sys.stdout.getvalue() == ">aé!\n"


def test_the_command_reads_a_checkpoint_with_a_tokenizer_file_and_ends_at_its_end_of_text(
    tmp_path, capsys
):
    tokenizers = pytest.importorskip("tokenizers")
    words = {"</s>": 0, "a": 1, "b": 2, "c": 3, "d": 4}
    engine = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a"))
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    engine.add_special_tokens(["</s>"])
    config = small_config(vocab_size=5, rotary_dim=16)
    torch.manual_seed(3)
    model = HybridLM(config).eval()
    model.save_pretrained(tmp_path, layout="released")
    engine.save(str(tmp_path / "tokenizer.json"))
    plain = generate(model, [[1, 2, 1]], max_new_tokens=40, temperature=2.0, seed=0)[0]
    expected = cut_after(plain, [0])
    assert 2 < len(expected) < 40
    args = ["generate", str(tmp_path), "--prompt", "a b a", "--max-new-tokens", "40"]
    assert cli.main([*args, "--temperature", "2", "--seed", "0"]) == 0
    text = engine.decode([1, 2, 1, *expected])
    assert capsys.readouterr().out == text + "\n"


def test_what_attnlab_train_leaves_is_continued(tmp_path, capsys):
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("ab" * 4000)
    other = tmp_path / "other.txt"
    other.write_text("ab" * 1000)
    train = ["train", "--size", "tiny", "--steps", "12", "--out", str(tmp_path / "run")]
    sizes = ["--batch-tokens", "256", "--pack-len", "256", "--seq-len", "64", "--warmup-steps", "2"]
    files = ["--corpus", str(corpus), str(other), "--validation-share", "0.5"]
    assert cli.main([*train, *sizes, *files, "--validation-tokens", "256"]) == 0
    capsys.readouterr()
    path = str(tmp_path / "run" / "model")
    args = ["--prompt", "abab", "--max-new-tokens", "6", "--temperature", "0"]
    assert cli.main(["generate", path, *args]) == 0
    assert capsys.readouterr().out == "ababababab\n"


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--temperature", "-1"], 2, "a temperature of at least 0, got -1.0"),
        (["--top-k", "0"], 2, "top_k of at least 1"),
        (["--top-p", "2"], 2, "at most 1, got 2.0"),
        (["--prompt", ""], 2, "a prompt, got an empty one"),
        (["--max-new-tokens", "0"], 2, "max_new_tokens of at least 1"),
        (["--chunk-size", "0"], 2, "chunk_size of at least 1"),
        (["--backend", "tritn"], 2, "a backend among"),
        (["--device", "tpu"], 2, "a device that this machine has, got tpu"),
        (["--backend", "flash"], 1, "needs a CUDA device"),
    ],
)
def test_the_command_refuses_bad_input_in_a_sentence(folder, capsys, change, code, message):
    assert cli.main(["generate", str(folder), "--prompt", "xy", "--device", "cpu", *change]) == code
    error = capsys.readouterr().err
    assert error.startswith("attnlab generate: error: ") and message in error


def test_the_command_says_what_is_missing_in_a_folder(folder, tmp_path, capsys):
    def run(path):
        code = cli.main(["generate", str(path), "--prompt", "x"])
        return code, capsys.readouterr().err

    assert run(tmp_path / "nothing")[0] == 1
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"vocab_size": 200, "eos_token_id": None})
    )
    code, error = run(folder)
    assert code == 2 and "a tokenizer with at most the 200 ids" in error
    (folder / "tokenizer_config.json").unlink()
    code, error = run(folder)
    assert code == 2 and "expected a folder with tokenizer.json" in error
