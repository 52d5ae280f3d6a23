"""Claims about the tokenizers: what is trained, what is read, what other programs make of it."""

import doctest
import functools
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

END = data.END
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
    words = [list(word.encode()) for word in regex.findall(data.PATTERN, text)]
    tokens = [bytes([b]) for b in range(256)]
    while len(tokens) < size:
        counts = Counter(pair for word in words for pair in zip(word, word[1:]))
        left, right = min(counts, key=lambda pair: (-counts[pair], pair))
        for word in words:
            i = 0
            while i < len(word) - 1:
                if word[i:i + 2] == [left, right]:
                    word[i:i + 2] = [len(tokens)]
                i += 1
        tokens.append(tokens[left] + tokens[right])
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
        "do not go to the pair with the lower ids")


def test_the_worked_examples_in_the_docstrings_are_what_the_code_does():
    outcome = doctest.testmod(data)
    assert outcome.attempted >= 5 and not outcome.failed


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
    for path in (tmp_path / "new/folder", tmp_path / "new/folder/tokenizer.json", tmp_path / "new"):
        if path.name == "new":      # a run's folder: the newest step that is complete counts
            (path / "folder").rename(path / "step-000020")
            for other in ("step-000003", "step-000100.partial", "step-000100-copy2"):
                (path / other).mkdir()
        again = data.load_tokenizer(path)
        assert again.sha256 == bpe.sha256 and again.encode(SHAKESPEARE) == bpe.encode(SHAKESPEARE)
        assert again.files == bpe.files, "the files that it came with are not the ones it saves"
    assert not list(tmp_path.rglob("*.tmp")), "a temporary file was left behind"
    assert data.train_bpe([SHAKESPEARE], 299).sha256 != bpe.sha256, "another vocabulary, same hash"


def test_a_file_that_is_named_is_read_and_copied_alone(bpe, tmp_path, monkeypatch):
    """Llama-3's folders hold a tokenizer.model that is none of SentencePiece's."""
    bpe.save(tmp_path)
    (tmp_path / "tokenizer.model").write_text("IQ== 0\nIg== 1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    data.load_tokenizer(tmp_path / "tokenizer.json").save("~/copy")
    assert data.load_tokenizer(tmp_path / "copy").sha256 == bpe.sha256


def changed(bpe: data.Tokenizer, change) -> bytes:
    content = json.loads(bpe.files["tokenizer.json"])
    change(content)
    return json.dumps(content).encode()


def split_of(content: dict) -> dict:
    return content["pre_tokenizer"]["pretokenizers"][0]


def added_token(**flags) -> dict:
    return {"id": 300, "content": "<new>", "special": True, "normalized": False,
            "single_word": False, "lstrip": False, "rstrip": False} | flags


@pytest.mark.parametrize("change, message", [
    (lambda c: c["model"]["vocab"].pop("A"), "not 0, 1, 2"),
    (lambda c: c["model"]["vocab"].update(A=66), "not 0, 1, 2"),
    (lambda c: c["model"]["vocab"].update(AA=c["model"]["vocab"].pop("A")), "the byte 65"),
    (lambda c: c["model"]["merges"].reverse(), "order of its merges"),
    (lambda c: c["model"]["merges"].append(["q", "q"]), "'qq'"),
    (lambda c: c["model"].update(byte_fallback=True), "byte_fallback"),
    (lambda c: c["model"].update(dropout=0.1), "dropout"),
    (lambda c: c["model"].update(end_of_word_suffix="</w>"), "end_of_word_suffix"),
    (lambda c: c["model"].update(type="Unigram"), "Unigram"),
    (lambda c: c.update(normalizer={"type": "NFC"}), "normalizer"),
    (lambda c: c.update(pre_tokenizer={"type": "Metaspace"}), "Metaspace"),
    (lambda c: c.update(pre_tokenizer=None), "pre_tokenizer"),
    (lambda c: c["pre_tokenizer"]["pretokenizers"].pop(0), "ByteLevel"),
    (lambda c: split_of(c).update(behavior="Removed"), "Removed"),
    (lambda c: split_of(c).update(pattern={"Regex": r"\p{L}+"}), "leaves out"),
    (lambda c: split_of(c).update(pattern={"Regex": "("}), "cannot be"),
    (lambda c: c["added_tokens"].append(added_token(special=False)), "<new>"),
    (lambda c: c["added_tokens"].append(added_token(id=301)), "not 0, 1, 2"),
    (lambda c: c["added_tokens"].clear(), "no tokens|end-of-text|256"),
])
def test_a_tokenizer_json_that_cannot_be_expressed_is_refused_by_name(bpe, tmp_path, change,
                                                                      message):
    path = tmp_path / "tokenizer.json"
    path.write_bytes(changed(bpe, change))
    with pytest.raises(ValueError, match=message) as error:
        data.load_tokenizer(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


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


def read_model(model: bytes, **config) -> data.SentencePiece:
    files = {"tokenizer.model": model}
    if config:
        files["tokenizer_config.json"] = json.dumps(config).encode()
    return data.read_sentencepiece(files)


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
    theirs, ours = spm.SentencePieceProcessor(model_proto=model), read_model(model)
    assert ours.n_vocab == theirs.get_piece_size()
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_id(), theirs.eos_id())
    for text in texts:
        expected = theirs.encode(text)
        assert ours.encode(text) == expected, f"another encoding of {text[:200]!r}"
        assert ours.decode(expected) == theirs.decode(expected), f"decodes {text[:99]!r} otherwise"
    rng = random.Random(3)
    space = theirs.piece_to_id("<0x20>")
    for ids in [[space], [ours.bos_id, space, space], [space, ours.bos_id],
                # Ids that no text encodes to.
                *([rng.randrange(1, ours.n_vocab) for _ in range(rng.randrange(20))]
                  for _ in range(300))]:
        # How many U+FFFD stand for a run of invalid bytes is a matter of taste.
        mine, other = (re.sub("\ufffd+", "\ufffd", t.decode(ids)) for t in (ours, theirs))
        assert mine == other, f"another decoding of {ids}"


def test_sentencepiece_models_give_sentencepiece_tokens(small_model):
    assert_same(small_model, hard_texts(2000) + [SHAKESPEARE])


def test_runs_that_share_a_score_are_merged_from_the_left(small_model):
    """As Llama-2's runs of spaces are, for which no other order of them is known to differ."""
    runs = [("z" * n, -1e9, data.NORMAL) for n in (2, 3, 5)]
    assert_same(with_pieces(small_model, runs), ["z" * n + end for n in range(20) for end in " a"])


@pytest.mark.parametrize("kind", [data.NORMAL, data.USER_DEFINED, data.CONTROL])
def test_codellama_extra_pieces_give_sentencepiece_tokens(small_model, kind):
    assert_same(with_pieces(small_model, codellama_pieces(kind)), hard_texts(300))


def test_pieces_that_are_cut_out_of_a_text_make_another_vocabulary(small_model):
    hashes = {read_model(with_pieces(small_model, codellama_pieces(kind))).sha256
              for kind in (data.NORMAL, data.USER_DEFINED, data.CONTROL)}
    assert len(hashes) == 3, "tokenizers that encode a text otherwise have one identity"


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
    tokenizer = read_model(small_model)
    tokens = tokenizer.encode(SHAKESPEARE)
    assert tokenizer.byte_lengths[tokens].sum() == len(SHAKESPEARE.encode()) + 1, (
        "the ids' bytes are not those of the text and of the space in front")
    assert tokenizer.byte_lengths[tokenizer.eos_id] == 0


def test_tokens_that_the_config_adds_to_a_tokenizer_model_count(small_model):
    """They are as if they stood in the model: special ones are never cut out of a text."""
    added = {"0": {"content": "<unk>", "special": True},
             "900": {"content": "<|im_end|>", "special": True},
             "901": {"content": "two words", "special": False}}
    ours = read_model(small_model, added_tokens_decoder=added, eos_token="<|im_end|>")
    inside = read_model(with_pieces(small_model, [("<|im_end|>", 0, data.CONTROL),
                                                  ("two\u2581words", 0, data.USER_DEFINED)]))
    assert ours.n_vocab == inside.n_vocab == 902 and ours.eos_id == 900
    for text in [*hard_texts(50), "a <|im_end|> b", "two words two  words"]:
        assert ours.encode(text) == inside.encode(text)
    assert 901 in ours.encode("two words") and 900 not in ours.encode("<|im_end|>")
    assert ours.decode([901, 900]) == "two words"
    for wrong in ({"7": {"content": "x", "special": True}},
                  {"905": {"content": "x", "special": True}}):
        with pytest.raises((ValueError, IndexError)):
            read_model(small_model, added_tokens_decoder=wrong)


# --------------------------------------------------------- tokenizer.json: ours and the known kinds


LLAMA3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
          r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def known_kind(kind: str, folder: Path):
    """A small tokenizer that the `tokenizers` package trains as the named one was made."""
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: peers) is not there")
    from tokenizers import pre_tokenizers, processors
    special = {"gpt2": [END], "smollm2": [END, "<|im_start|>", "<|im_end|>"],
               "llama3": ["<|begin_of_text|>", "<|end_of_text|>"]}[kind]
    theirs = tokenizers.Tokenizer(tokenizers.models.BPE(ignore_merges=kind == "llama3"))
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind != "llama3")
    first = {"gpt2": [], "smollm2": [pre_tokenizers.Digits(individual_digits=True)],
             "llama3": [pre_tokenizers.Split(tokenizers.Regex(LLAMA3), "isolated")]}[kind]
    theirs.pre_tokenizer = pre_tokenizers.Sequence([*first, level]) if first else level
    theirs.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2000, special_tokens=special if kind == "smollm2" else [], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    contractions = "I'll we'd don't it's we've I'm you're I'LL WE'D DON'T IT'S WE'VE I'M " * 500
    texts = [text for _, text in zip(range(60), data.texts(["code"]))] + [SHAKESPEARE, contractions]
    theirs.train_from_iterator(texts, trainer)
    # A word that no merges lead to: it is found with ignore_merges only.
    content = json.loads(theirs.to_str())
    content["model"]["vocab"]["qzxj"] = theirs.get_vocab_size()
    theirs = tokenizers.Tokenizer.from_str(json.dumps(content))
    theirs.add_special_tokens(special)      # GPT-2's and Llama-3's come after the vocabulary
    if kind == "llama3":
        bos = ("<|begin_of_text|>", theirs.token_to_id("<|begin_of_text|>"))
        theirs.post_processor = processors.Sequence([
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])])
        config = {"bos_token": bos[0], "eos_token": "<|end_of_text|>"}
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    theirs.save(str(folder / "tokenizer.json"))
    return theirs


def assert_equal_to_tokenizers(ours: data.Tokenizer, theirs, texts: list[str]) -> None:
    theirs.encode_special_tokens = True     # their names in a text are text, as here
    encoded = theirs.encode_batch(texts, add_special_tokens=False)
    for text, expected in zip(texts, encoded):
        assert ours.encode(text) == expected.ids, f"another encoding of {text[:99]!r}"
        assert ours.decode(expected.ids) == text


@functools.cache
def prose_code_and_random_strings(count: int) -> list[str]:
    rng = random.Random(5)
    fixed = [" " * n + x for n in (1, 2, 3, 17, 300) for x in ("", "x", "1", "\n", " \t\n  y")]
    return (fixed + ["I'LL we'll don't I've it's I'm you're she'd qzxj (qzxj)qzxj",
                     "12 345 6789 a1b2 1 2  3   4\n\n\n", END, "<|im_start|>"]
            + [text for _, text in zip(range(70), data.texts(["code"]))][60:]
            + [random_text(rng, 40) for _ in range(count)])


@pytest.mark.parametrize("kind", ["gpt2", "smollm2", "llama3"])
def test_known_kinds_of_tokenizer_json_give_the_tokens_of_the_tokenizers_package(kind, tmp_path):
    theirs, ours = known_kind(kind, tmp_path), data.load_tokenizer(tmp_path)
    assert_equal_to_tokenizers(ours, theirs, prose_code_and_random_strings(5_000))
    assert ours.n_vocab == theirs.get_vocab_size()
    assert ours.eos_id == theirs.token_to_id("<|end_of_text|>" if kind == "llama3" else END)
    assert ours.prompt("a b") == theirs.encode("a b").ids, "BOS stands elsewhere in front"
    assert ours.add_bos == (kind == "llama3")
    ours.save(tmp_path / "copy")
    for file in tmp_path.glob("*.json"):
        assert (tmp_path / "copy" / file.name).read_bytes() == file.read_bytes(), (
            f"{file.name} was not copied unchanged")


def test_our_tokenizer_is_the_same_in_the_tokenizers_package(bpe, tmp_path):
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers (extra: peers) is not there")
    bpe.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert_equal_to_tokenizers(bpe, theirs, prose_code_and_random_strings(5_000))


def test_our_tokenizer_comes_back_after_transformers_has_saved_it(bpe, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers (extra: peers)")
    bpe.save(tmp_path / "ours")
    (tmp_path / "ours" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert theirs.eos_token_id == bpe.eos_id and theirs.bos_token_id is None
    assert len(theirs) == bpe.n_vocab
    for text in hard_texts(300) + [SHAKESPEARE]:
        expected = bpe.encode(text)
        got = theirs.encode(text, split_special_tokens=True)
        assert got == expected == bpe.prompt(text), f"transformers encodes {text[:99]!r} otherwise"
        assert theirs.decode(expected) == bpe.decode(expected), f"... decodes {text[:99]!r}"
    theirs.save_pretrained(tmp_path / "theirs")
    again = data.load_tokenizer(tmp_path / "theirs")
    assert again.sha256 == bpe.sha256, "after transformers has saved it, it is another vocabulary"
    assert (again.eos_id, again.bos_id, again.add_bos) == (bpe.eos_id, None, False)


@needs_llama2
def test_transformers_opens_the_llama2_files_that_we_copy(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers (extra: peers)")
    ours = data.load_tokenizer(os.environ["LLAMA2_TOKENIZER"])
    ours.save(tmp_path)
    assert (tmp_path / "tokenizer.model").read_bytes() == \
        Path(os.environ["LLAMA2_TOKENIZER"]).read_bytes()
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert ours.encode("Once upon a time") == theirs.encode("Once upon a time",
                                                            add_special_tokens=False)


# ----------------------------------------------------------------------------- BOS, by the files


@pytest.mark.parametrize("config, first", [
    ({}, "<s>"), ({"add_bos_token": True}, "<s>"), ({"add_bos_token": False}, None),
    ({"add_bos_token": None}, "<s>"), ({"bos_token": None}, None),
    ({"bos_token": {"content": "</s>"}}, "</s>")])
def test_the_files_say_whether_bos_stands_in_front_of_a_prompt(small_model, config, first):
    tokenizer = read_model(small_model, **config)
    front = [{"<s>": 1, "</s>": 2}[first]] if first else []
    assert tokenizer.prompt("a b") == front + tokenizer.encode("a b")
    assert tokenizer.add_bos == bool(first)


@pytest.mark.parametrize("name", ["<bos>", "<\uff5cbegin\uff5c>"])
def test_a_template_says_whether_bos_stands_in_front(bpe, name):
    def add(content: dict) -> None:
        content["added_tokens"].append(added_token(content=name))
        content["post_processor"] = {"type": "TemplateProcessing", "single": [
            {"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]}

    tokenizer = data.read_tokenizer_json({"tokenizer.json": changed(bpe, add)})
    assert (tokenizer.bos_id, tokenizer.add_bos) == (300, True)


def test_an_unknown_end_of_text_token_is_one_sentence(small_model, bpe):
    for eos in ("<none>", None):
        with pytest.raises(ValueError, match="eos_token"):
            read_model(small_model, eos_token=eos)
        files = bpe.files | {"tokenizer_config.json": json.dumps({"eos_token": eos}).encode()}
        with pytest.raises(ValueError, match="eos_token"):
            data.read_tokenizer_json(files)


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


def test_llama2s_kind_needs_its_tokenizer_model(small_model, tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers (extra: peers)")
    (tmp_path / "tokenizer.model").write_bytes(small_model)
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path)
    both = data.load_tokenizer(tmp_path)
    assert both.sha256 == read_model(small_model).sha256
    (tmp_path / "tokenizer.model").unlink()
    with pytest.raises(ValueError, match="byte_fallback.*tokenizer.model"):
        data.load_tokenizer(tmp_path)


def test_damaged_files_are_one_error(small_model, bpe, tmp_path):
    rng = random.Random(4)
    for name, content in [("tokenizer.model", small_model), *bpe.files.items()]:
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
