"""Corpora keep their documents, and packs put them end to end without mixing them."""

import math

import numpy as np
import pytest
import torch

from attnlab.training.data import Corpus, read_corpus
from attnlab.training.packing import PackedCorpus
from attnlab.training.tokenizer import ByteTokenizer

END = ByteTokenizer.eos_token_id


def write_documents(folder, lengths):
    """Files of distinct bytes: document i counts up from i, so that every window is telling."""
    folder.mkdir(parents=True, exist_ok=True)
    texts = [bytes((i * 31 + j) % 255 + 1 for j in range(n)) for i, n in enumerate(lengths)]
    for i, text in enumerate(texts):
        (folder / f"{i:03}.txt").write_bytes(text)
    return texts


def corpus_of(texts):
    stops = np.cumsum([len(text) for text in texts])
    sizes = np.array([len(text) for text in texts])
    tokens = np.frombuffer(b"".join(texts), dtype=np.uint8)
    return Corpus(tokens=tokens, starts=stops - sizes, stops=stops, sizes=sizes, eos_token_id=END)


def random_texts(lengths, seed=0):
    generator = np.random.default_rng(seed)
    return [generator.integers(0, 256, n, dtype=np.uint8).tobytes() for n in lengths]


def pieces_of(pack):
    """Inputs and targets of each piece of a pack."""
    for start, stop in zip(pack.cu_seqlens[:-1], pack.cu_seqlens[1:], strict=True):
        yield pack.input_ids[0, start:stop].tolist(), pack.targets[start:stop].tolist()


def documents_of(corpus):
    return [bytes(corpus.tokens[a:b]) for a, b in zip(corpus.starts, corpus.stops, strict=True)]


def test_documents_of_a_folder_are_read_whole_and_each_lies_on_one_side(tmp_path):
    texts = write_documents(tmp_path / "a" / "b", range(1, 60))
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "module.pyc").write_bytes(b"binary\0file")
    training, validation = read_corpus([str(tmp_path)], ByteTokenizer(), validation_share=0.2)
    assert sorted(documents_of(training) + documents_of(validation)) == sorted(texts)
    assert 3 <= len(validation.starts) <= 25  # 12 of 59 expected, 3 standard deviations around it
    assert training.tokens.dtype == np.uint8
    assert training.num_targets + validation.num_targets == sum(map(len, texts))


def test_the_side_of_a_document_depends_on_its_content_alone(tmp_path):
    texts = write_documents(tmp_path / "a", range(10, 50))
    for i, text in enumerate(texts[::2]):
        (tmp_path / "b").mkdir(exist_ok=True)
        (tmp_path / "b" / f"other{i}").write_bytes(text)
    _, all_held_out = read_corpus([str(tmp_path / "a")], ByteTokenizer(), validation_share=0.3)
    _, half_held_out = read_corpus([str(tmp_path / "b")], ByteTokenizer(), validation_share=0.3)
    expected = set(documents_of(all_held_out)) & set(texts[::2])
    assert set(documents_of(half_held_out)) == expected and 0 < len(expected) < 20


@pytest.mark.parametrize("share", [0.0, 0.999])
def test_each_side_has_a_document_at_any_share(share, tmp_path):
    write_documents(tmp_path, [5, 6, 7])
    training, validation = read_corpus([str(tmp_path)], ByteTokenizer(), validation_share=share)
    assert len(training.starts) >= 1 and len(validation.starts) >= 1
    assert len(training.starts) + len(validation.starts) == 3


def test_of_a_single_document_the_tail_is_for_validation(tmp_path):
    path = tmp_path / "one.txt"
    path.write_bytes(bytes(range(200)))
    training, validation = read_corpus([str(path)], ByteTokenizer(), validation_share=0.1)
    assert documents_of(training) == [bytes(range(180))]
    assert documents_of(validation) == [bytes(range(180, 200))]
    assert training.sizes.tolist() == [180] and validation.sizes.tolist() == [20]


def test_the_default_corpus_is_pythons_library():
    training, validation = read_corpus([], ByteTokenizer(), validation_share=0.05)
    share = len(validation.starts) / (len(training.starts) + len(validation.starts))
    assert training.num_targets > 2**20 and 0.02 < share < 0.08
    assert any(
        b"def dataclass(" in text for text in documents_of(training) + documents_of(validation)
    )


def test_what_can_not_be_read_or_is_empty_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"readable corpus, got .*nowhere: No such file"):
        read_corpus([str(tmp_path / "nowhere")], ByteTokenizer(), validation_share=0.1)
    with pytest.raises(ValueError, match="a corpus with text in it"):
        read_corpus([str(tmp_path)], ByteTokenizer(), validation_share=0.1)
    (tmp_path / "one").write_bytes(b"x")
    with pytest.raises(ValueError, match="two tokens or more, got 1"):
        read_corpus([str(tmp_path)], ByteTokenizer(), validation_share=0.1)


def test_a_nat_a_byte_is_its_bits_and_fewer_tokens_make_fewer_bits():
    corpus = corpus_of(random_texts([10, 20]))
    assert corpus.bits_per_byte_of_a_nat == pytest.approx(1 / math.log(2), rel=1e-12)
    halved = Corpus(**{**vars(corpus), "sizes": 2 * corpus.sizes})
    assert halved.bits_per_byte_of_a_nat == pytest.approx(0.5 / math.log(2), rel=1e-12)


@pytest.mark.parametrize("pack_len, seq_len", [(64, 16), (64, 1000), (7, 3), (1, 1)])
def test_a_pass_holds_every_target_once_and_only_its_own_documents(pack_len, seq_len):
    texts = random_texts([1, 2, 3, 50, 16, 17, 200, 64, 5, 90])
    # Documents of 4 bytes or more have no run of them in common, so a piece names its document.
    packed = PackedCorpus(corpus_of(texts), pack_len=pack_len, seq_len=seq_len, seed=3)
    total = sum(map(len, texts))
    assert packed.packs_per_pass == total // pack_len
    whole = [[*text, END] for text in texts]
    seen = np.zeros((257 + 1, 257 + 1), dtype=int)
    for index in range(packed.packs_per_pass):
        pack = packed.pack(index)
        assert pack.cu_seqlens[0] == 0 and pack.cu_seqlens[-1] == pack_len == pack.num_targets
        assert pack.cu_seqlens.dtype == torch.int32 and pack.input_ids.shape == (1, pack_len)
        for inputs, targets in pieces_of(pack):
            assert 1 <= len(inputs) <= seq_len
            window = [*inputs, targets[-1]]
            assert window[1:] == targets
            assert any(
                window == ids[i : i + len(window)]
                for ids in whole
                for i in range(len(ids) - len(window) + 1)
            )
            np.add.at(seen, (inputs, targets), 1)
    expected = np.zeros_like(seen)
    for ids in whole:
        np.add.at(expected, (ids[:-1], ids[1:]), 1)
    missing = expected - seen  # the rest that fills no pack
    assert missing.min() >= 0 and missing.sum() == total % pack_len


def test_the_last_token_of_a_document_predicts_the_end_of_text_not_the_next_document():
    texts = [bytes([65] * 5), bytes([66] * 6), bytes([67] * 7)]
    packed = PackedCorpus(corpus_of(texts), pack_len=18, seq_len=100, seed=0)
    pieces = list(pieces_of(packed.pack(0)))
    assert sorted(inputs for inputs, _ in pieces) == sorted(list(text) for text in texts)
    for inputs, targets in pieces:
        assert targets == [*inputs[1:], END]


def test_a_pack_depends_on_seed_and_index_alone():
    corpus = corpus_of(random_texts([40] * 30))
    shape = {"pack_len": 100, "seq_len": 30}
    packed = PackedCorpus(corpus, **shape, seed=5)
    in_order = [packed.pack(i) for i in range(3 * packed.packs_per_pass)]
    other = PackedCorpus(corpus, **shape, seed=5)
    for index in (30, 2, 17, 5, 29):  # passes of 12 packs: forwards, backwards, across passes
        again = other.pack(index)
        for name in ("input_ids", "targets", "cu_seqlens"):
            assert torch.equal(getattr(again, name), getattr(in_order[index], name))
    first = packed.pack(0).input_ids
    assert not torch.equal(first, PackedCorpus(corpus, **shape, seed=6).pack(0).input_ids)
    assert not torch.equal(first, packed.pack(packed.packs_per_pass).input_ids)  # the next pass


def test_positions_count_from_the_start_of_each_piece():
    packed = PackedCorpus(corpus_of(random_texts([3, 9, 5])), pack_len=17, seq_len=4, seed=1)
    pack = packed.pack(0)
    lengths = pack.cu_seqlens.diff().tolist()
    assert pack.positions().tolist() == [p for length in lengths for p in range(length)]


def test_a_corpus_below_one_pack_is_refused():
    with pytest.raises(ValueError, match=r"at least 100 tokens \(a pack\), got 30"):
        PackedCorpus(corpus_of(random_texts([10, 20])), pack_len=100, seq_len=10, seed=0)


def test_a_fingerprint_tells_corpora_apart():
    texts = random_texts([10, 20])
    corpus = corpus_of(texts)
    assert corpus.fingerprint() == corpus_of(texts).fingerprint()
    assert corpus.fingerprint() != corpus.select(np.array([0])).fingerprint()
    joined = corpus_of([b"".join(texts)])
    assert corpus.fingerprint() != joined.fingerprint()
