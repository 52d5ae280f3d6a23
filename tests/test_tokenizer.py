"""Claims about the tokenizers: what is trained, what is read, what other programs make of it."""

import io
import json
import os
import random
import re
import struct
from collections import Counter
from pathlib import Path

import pytest
import regex

import data

needs_llama2 = pytest.mark.skipif(
    "LLAMA2_TOKENIZER" not in os.environ,
    reason="LLAMA2_TOKENIZER, the path of Llama-2's tokenizer.model, is not set")

SHAKESPEARE = """From fairest creatures we desire increase,
That thereby beauty's rose might never die,
But as the riper should by time decease,
His tender heir might bear his memory: 1609, 154
    aaaaaaa aaaa abababab banana\n\n\n
"""


def random_text(rng: random.Random, length: int) -> str:
    """Characters of all planes, with runs of spaces and U+2581, which SentencePiece uses inside."""
    text = []
    for _ in range(rng.randrange(length)):
        kind = rng.random()
        if kind < 0.15:
            text.append(rng.choice(" \u2581\n") * rng.choice((1, 1, 2, 3, 16, 17, 60, 200)))
        elif kind < 0.6:
            text.append(chr(rng.randrange(0x80)))
        else:
            code = rng.randrange(rng.choice((0x250, 0x3000, 0x10000, 0x110000)))
            text.append("x" if 0xD800 <= code < 0xE000 else chr(code))
    return "".join(text)


def naive_bpe(text: str, size: int) -> list[bytes]:
    """Byte-pair encoding as its definition reads, over the whole text for every merge."""
    words = [[bytes([b]) for b in word.encode()] for word in regex.findall(data.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        best = max(counts, key=lambda pair: (counts[pair], pair))
        tokens.append(best[0] + best[1])
        for word in words:
            i = 0
            while i < len(word) - 1:
                if (word[i], word[i + 1]) == best:
                    word[i:i + 2] = [best[0] + best[1]]
                i += 1
    return tokens


@pytest.fixture(scope="module")
def bpe() -> data.Tokenizer:
    return data.train_bpe([SHAKESPEARE], 300)


@pytest.mark.parametrize("text, size", [
    (SHAKESPEARE, 330), ("ab ba abba baab é日本 é日 " * 3, 268), ("x" * 37 + " xxxx xx", 261)])
def test_bpe_learns_what_the_definition_says(text, size):
    learned = data.train_bpe([text], size + 1).pieces[:-1]
    assert learned == naive_bpe(text, size), (
        "the incremental trainer chose other pairs than the naive one: its counts drift, or ties "
        "do not go to the lexicographically greater pair")


def test_training_does_not_depend_on_how_the_text_is_cut_into_documents():
    lines = SHAKESPEARE.splitlines(keepends=True)
    # Cut where pre-tokens end anyway.
    parts = ["".join(lines[:1]), "".join(lines[1:])]
    assert (data.train_bpe(parts, 290).sha256 == data.train_bpe(["".join(parts)], 290).sha256)


def test_every_text_survives_encoding_and_decoding(bpe):
    rng = random.Random(0)
    for _ in range(500):
        text = random_text(rng, 60)
        tokens = bpe.encode(text)
        assert bpe.decode(tokens) == text, f"{text!r} came back as {bpe.decode(tokens)!r}"
        assert bpe.byte_lengths[tokens].sum() == len(text.encode()), "byte_lengths miscount"
        assert bpe.encoding.decode(tokens) == text, "pieces disagree with tiktoken's own decoder"


def test_every_byte_has_a_token_and_halves_of_characters_do_not_stop_decoding(bpe):
    assert bpe.decode_bytes(range(256)) == bytes(range(256))
    assert bpe.decode([0xC3]) == "\ufffd"


def test_patterns_cover_every_text_and_take_linear_time():
    rng = random.Random(1)
    for text in [random_text(rng, 80) for _ in range(300)] + [" " * 100_000 + "x", "a" * 100_000]:
        assert "".join(regex.findall(data.PATTERN, text)) == text, "a character is in no pre-token"


def test_special_tokens_in_text_are_text(bpe):
    tokens = bpe.encode(data.END)
    assert bpe.eos_id not in tokens and bpe.decode(tokens) == data.END
    assert bpe.eos_id == bpe.n_vocab - 1 == 299 and bpe.byte_lengths[bpe.eos_id] == 0
    assert bpe.bos_id is None and bpe.decode([bpe.eos_id]) == ""


def test_a_saved_tokenizer_comes_back(bpe, tmp_path):
    bpe.save(tmp_path / "new" / "folder")
    for path in (tmp_path / "new/folder", tmp_path / "new/folder/tokenizer.tiktoken"):
        again = data.load_tokenizer(path)
        assert again.sha256 == bpe.sha256 and again.encode(SHAKESPEARE) == bpe.encode(SHAKESPEARE)
    assert not list(tmp_path.rglob("*.tmp")), "a temporary file was left behind"
    assert data.train_bpe([SHAKESPEARE], 299).sha256 != bpe.sha256, "another vocabulary, same hash"


@pytest.mark.parametrize("change, message", [
    (lambda lines: lines[:7] + [b"!!!! 7"] + lines[8:], "cannot be used"),
    (lambda lines: lines[:7] + lines[8:], "ranks are not 0, 1, 2"),
    (lambda lines: lines[:255], "256 bytes"),
    (lambda lines: lines + [b"YQ== %d" % len(lines)], "every token once"),
    (lambda lines: [b"\xff\xfe\x00"], "cannot be used"),
])
def test_a_damaged_tokenizer_is_refused(bpe, tmp_path, change, message):
    path = tmp_path / "tokenizer.tiktoken"
    path.write_bytes(b"\n".join(change(bpe.files()["tokenizer.tiktoken"].splitlines())))
    with pytest.raises(ValueError, match=message):
        data.load_tokenizer(path)


def test_a_tokenizer_that_cannot_be_is_one_sentence(tmp_path):
    with pytest.raises(ValueError, match="no tokenizer"):
        data.load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match="no tokenizer"):
        data.load_tokenizer(tmp_path / "absent")
    with pytest.raises(ValueError, match="add text or ask for fewer"):
        data.train_bpe(["abc"], 4096)
    with pytest.raises(ValueError, match="256 bytes"):
        data.train_bpe(["abc"], 100)


# ------------------------------------------------------------------------- SentencePiece, Hub


def varint(value: int) -> bytes:
    low = bytes([value & 127 | (128 if value > 127 else 0)])
    return low + (varint(value >> 7) if value > 127 else b"")


def with_pieces(model: bytes, pieces: list[tuple[str, float, int]]) -> bytes:
    """A tokenizer.model with more pieces: protobuf messages can be extended by appending."""
    for text, score, kind in pieces:
        body = (b"\x0a" + varint(len(text.encode())) + text.encode()
                + b"\x15" + struct.pack("<f", score) + b"\x18" + varint(kind))
        model += b"\x0a" + varint(len(body)) + body
    return model


@pytest.fixture(scope="module")
def small_model() -> bytes:
    """A SentencePiece BPE model with byte fallback, trained here, with the options of Llama-2."""
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece (extra: peers) is not there")
    source = [line for _, text in zip(range(40), data.texts(["general"]))
              for line in text.splitlines() if line]
    trained = io.BytesIO()
    spm.SentencePieceTrainer.train(
        sentence_iterator=iter(source + ["\u00e9t\u00e9 \u65e5\u672c\u8a9e \u65e5\u672c"] * 50),
        model_writer=trained, vocab_size=900, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, split_digits=True,
        allow_whitespace_only_pieces=True, character_coverage=0.9999, num_threads=1,
        minloglevel=2)
    return trained.getvalue()


CODELLAMA = ["<SU", "<SUF", "<PRE", "<M", "<MID", "<E", "<EOT", "<PRE>", "<SUF>", "<MID>", "<EOT>",
             *("<EOT>" * n for n in range(2, 7))]


def codellama_pieces(kind: int) -> list[tuple[str, float, int]]:
    """CodeLlama-7b's 16 pieces beyond Llama-2's 32000."""
    return [(data.SPACE + text, -1e6 - i, kind) for i, text in enumerate(CODELLAMA)]


def hard_texts(count: int) -> list[str]:
    rng = random.Random(2)
    fixed = ["", " ", "  ", "a", " a", "a ", "\u2581", " \u2581 ", "\x00", "<s>", "</s>", "<0x41>",
             "<unk>", "\n\n", " " * 200, "def f(x):\n        return x\n", " <PRE> a <SUF>b <MID>",
             "<EOT>", " <EOT><EOT>", "x <EOT><EOT><EOT> <E <EO", "<PRE", "\ufeffa", "e\u0301"]
    return fixed + [random_text(rng, 40) for _ in range(count)]


def assert_same(model: bytes, texts: list[str]) -> None:
    spm = pytest.importorskip("sentencepiece", reason="sentencepiece (extra: peers) is not there")
    theirs, ours = spm.SentencePieceProcessor(model_proto=model), data.read_sentencepiece(model)
    assert ours.n_vocab == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    for text in texts:
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, f"another encoding of {text[:200]!r}"
        assert ours.decode(expected) == theirs.decode(expected), f"decodes {text[:99]!r} otherwise"
    rng = random.Random(3)
    for _ in range(300):                                    # ids that no text encodes to
        ids = [rng.randrange(1, ours.n_vocab) for _ in range(rng.randrange(20))]
        # How many U+FFFD stand for a run of invalid bytes is a matter of taste.
        mine, other = (re.sub("\ufffd+", "\ufffd", t.decode(ids)) for t in (ours, theirs))
        assert mine == other, f"another decoding of {ids}"


def test_sentencepiece_models_give_sentencepiece_tokens(small_model):
    assert_same(small_model, hard_texts(2000) + [SHAKESPEARE])


@pytest.mark.parametrize("kind", [data.NORMAL, data.USER_DEFINED, data.CONTROL])
def test_codellama_extra_pieces_give_sentencepiece_tokens(small_model, kind):
    assert_same(with_pieces(small_model, codellama_pieces(kind)), hard_texts(300))


@needs_llama2
@pytest.mark.parametrize("kind", [None, data.NORMAL, data.USER_DEFINED])
def test_llama2_gives_sentencepiece_tokens(kind):
    model = Path(os.environ["LLAMA2_TOKENIZER"]).read_bytes()
    extra = codellama_pieces(kind) if kind else []
    sources = [text for _, text in zip(range(25), data.texts(["code"]))]
    assert_same(with_pieces(model, extra), hard_texts(1000) + sources)


@pytest.mark.slow
@needs_llama2
def test_llama2_gives_sentencepiece_tokens_on_everything_there_is():
    texts = list(data.texts(["general", "code"]))
    if "TEXT_DATA" in os.environ:
        texts.append(Path(os.environ["TEXT_DATA"], "tinyshakespeare.txt").read_text())
    assert_same(Path(os.environ["LLAMA2_TOKENIZER"]).read_bytes(), hard_texts(20_000) + texts)


def test_byte_lengths_of_llama2s_family_add_up(small_model):
    tokenizer = data.read_sentencepiece(small_model)
    tokens = tokenizer.encode(SHAKESPEARE)
    assert tokenizer.byte_lengths[tokens].sum() == len(SHAKESPEARE.encode()) + 1, (
        "the ids' bytes are not those of the text and of the space in front")
    assert tokenizer.byte_lengths[tokenizer.eos_id] == 0


def test_transformers_opens_what_we_save(bpe, small_model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers (extra: peers)")
    llama = data.read_sentencepiece(with_pieces(small_model, codellama_pieces(data.NORMAL)))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    for ours in (bpe, llama):
        for file in tmp_path.glob("tokenizer*"):
            file.unlink()
        ours.save(tmp_path)
        theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
        assert theirs.eos_token_id == ours.eos_id and theirs.bos_token_id == ours.bos_id
        assert len(theirs) == ours.n_vocab
        for text in hard_texts(300) + [SHAKESPEARE]:
            expected = ours.encode(text)
            got = theirs.encode(text, add_special_tokens=False, split_special_tokens=True)
            assert got == expected, f"transformers encodes {text[:99]!r} otherwise"
            assert theirs.decode(expected) == ours.decode(expected), f"... decodes {text[:99]!r}"


def json_only(ours: data.Tokenizer, folder: Path, through: str) -> data.Tokenizer:
    """What is left of a tokenizer in the tokenizer.json that we or transformers write."""
    ours.save(folder)
    if through == "transformers":
        transformers = pytest.importorskip("transformers", reason="transformers (extra: peers)")
        (folder / "tokenizer.json").unlink()
        config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
        transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return data.load_tokenizer(folder)


@pytest.mark.parametrize("through", ["ours", "transformers"])
def test_a_tokenizer_json_is_the_same_tokenizer(small_model, tmp_path, through):
    ours = data.read_sentencepiece(small_model)
    again = json_only(ours, tmp_path, through)
    assert (again.eos_id, again.bos_id, again.n_vocab) == (ours.eos_id, ours.bos_id, ours.n_vocab)
    for text in hard_texts(500):
        assert again.encode(text) == ours.encode(text), f"{text[:99]!r} differs"


@needs_llama2
@pytest.mark.parametrize("through", ["ours", "transformers"])
def test_llama2s_tokenizer_json_is_the_same_tokenizer(tmp_path, through):
    """Although transformers 5 gets runs of spaces wrong when it converts a tokenizer.model."""
    ours = data.load_tokenizer(os.environ["LLAMA2_TOKENIZER"])
    again = json_only(ours, tmp_path, through)
    assert again.sha256 == ours.sha256, "the same vocabulary has another identity"
    for text in hard_texts(500):
        assert again.encode(text) == ours.encode(text), f"{text[:99]!r} differs"


def test_unsupported_sentencepiece_models_are_refused_by_name(small_model, tmp_path):
    path = tmp_path / "tokenizer.model"
    for extra, message in [(b"\x12\x02\x18\x01", "other than BPE"),
                           (b"\x12\x04\x18\x02\x98\x02", "cannot be used"),
                           (b"\x1a\x04\x18\x00\x20\x00", "space put in front"),
                           (b"\x1a\x02\x20\x01", "extra spaces")]:
        path.write_bytes(small_model + extra)               # the last trainer_spec counts
        with pytest.raises(ValueError, match=message):
            data.load_tokenizer(path)
    for kind, text, message in [(5, "zz", "unused"), (1, "a\u2581b", "another character")]:
        path.write_bytes(with_pieces(small_model, [(text, 0, kind)]))
        with pytest.raises(ValueError, match=message):
            data.load_tokenizer(path)


def test_a_tokenizer_json_of_another_family_is_refused(bpe, tmp_path):
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.tiktoken").unlink()
    with pytest.raises(ValueError, match="not of Llama-2's family"):
        data.load_tokenizer(tmp_path)


def test_damaged_files_are_one_error(small_model, bpe, tmp_path):
    rng = random.Random(4)
    for name, content in [("tokenizer.model", small_model), *bpe.files().items()]:
        for _ in range(60 if name != "tokenizer_config.json" else 0):
            broken = bytearray(content[:rng.randrange(len(content))])
            for _ in range(rng.randrange(3)):
                if broken:
                    broken[rng.randrange(len(broken))] = rng.randrange(256)
            (tmp_path / name).write_bytes(broken)
            try:
                data.load_tokenizer(tmp_path / name)        # a cut between two pieces may be valid
            except ValueError as error:
                assert name in str(error) and "\n" not in str(error), f"unclear: {error}"
