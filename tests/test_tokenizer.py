"""Tokenizers give text back, say what they can't read, and travel with a model."""

import json

import numpy as np
import pytest

from attnlab.training.tokenizer import ByteTokenizer, FileTokenizer, load_tokenizer

TEXT = "def f(x):\n\treturn x  # Größe, 長さ, 🙂\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A tokenizer.json of byte-level BPE with 280 ids and one special token."""
    tokenizers = pytest.importorskip("tokenizers")
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    engine.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    engine.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=280,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    engine.train_from_iterator([TEXT * 20], trainer)
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    engine.save(str(path))
    return path


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_text_comes_back_whole(kind, trained):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else trained)
    ids = tokenizer.encode(TEXT)
    assert tokenizer.decode(ids) == TEXT
    assert tokenizer.encode(TEXT.encode()) == ids
    assert tokenizer.decode([*ids, tokenizer.eos_token_id]) == TEXT
    array = tokenizer.encode_array(TEXT.encode())
    assert array.tolist() == ids and array.dtype == tokenizer.dtype
    assert max(ids) < tokenizer.vocab_size


def test_ids_of_the_byte_tokenizer_are_the_bytes_and_any_bytes_can_be_read():
    tokenizer = ByteTokenizer()
    everything = bytes(range(256))
    assert tokenizer.encode(everything) == list(range(256))
    assert tokenizer.dtype == np.uint8
    specials = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert specials == (256, 257, 258) and tokenizer.vocab_size == 259
    assert tokenizer.decode([0xC3]) == "\ufffd"


def test_a_trained_tokenizer_merges_and_stores_ids_in_16_bits(trained):
    tokenizer = load_tokenizer(trained)
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode())
    assert tokenizer.vocab_size == 280 and tokenizer.dtype == np.uint16
    assert tokenizer.eos_token_id == 0  # the special token comes first


@pytest.mark.parametrize("kind", ["bytes", "file"])
def test_a_saved_tokenizer_is_found_in_its_folder(kind, trained, tmp_path):
    tokenizer = load_tokenizer("bytes" if kind == "bytes" else trained)
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert type(again) is type(tokenizer)
    assert again.encode(TEXT) == tokenizer.encode(TEXT)
    assert again.eos_token_id == tokenizer.eos_token_id


def test_the_end_of_text_named_beside_the_file_is_the_one_used(trained, tmp_path):
    record = json.loads(trained.read_text())
    record["added_tokens"].append({**record["added_tokens"][0], "id": 280, "content": "[STOP]"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(record))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": {"content": "[STOP]"}}')
    assert FileTokenizer(tmp_path / "tokenizer.json").eos_token_id == 280
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "[NOWHERE]"}')
    with pytest.raises(ValueError, match=r"end-of-text token in .* got none of \[NOWHERE\]"):
        FileTokenizer(tmp_path / "tokenizer.json")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"model": {"type": "Wrong"}}'])
def test_a_file_that_is_no_tokenizer_is_refused(content, tmp_path):
    pytest.importorskip("tokenizers")
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"expected a tokenizer\.json, got .*tokenizer\.json"):
        load_tokenizer(path)


def test_a_path_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a folder with tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match='expected "bytes" or the path'):
        load_tokenizer(tmp_path / "nothing.json")
