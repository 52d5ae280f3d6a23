"""Claims about documents, prepared folders and batches.

    pytest tests/test_data.py
"""

import errno
import gzip
import itertools
import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data
import evaluate

ROOT = Path(data.__file__).parent


@pytest.fixture(scope="module")
def bpe() -> data.Tokenizer:
    return data.train_bpe(["the cat sat on the mat, the cat sat still: return x"] * 3, 270)


def story(number: int, words: int = 30) -> str:
    rng = random.Random(number)
    return " ".join(rng.choice("the cat sat on a mat and then def return x".split())
                    for _ in range(words)) + f" {number}\n"


def write_jsonl(path: Path, numbers: range, words: int = 30) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": story(i, words)}) + "\n" for i in numbers))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def documents(folder: Path, split: str, source: str = "a") -> list[str]:
    """What a prepared folder says, document by document."""
    corpus = data.Corpus(folder, split)
    tokens, texts = corpus.tokens(source)[:].tolist(), []
    while corpus.tokenizer.eos_id in tokens:
        end = tokens.index(corpus.tokenizer.eos_id)
        texts.append(corpus.tokenizer.decode(tokens[:end]))
        tokens = tokens[end + 1:]
    assert not tokens, "the stream does not end with the end-of-text token"
    return texts


@pytest.fixture
def small_batches(monkeypatch):
    """Batches of 1000 bytes, and a note after each of them: many borders in little text."""
    monkeypatch.setattr(data, "BATCH", 1000)
    monkeypatch.setattr(data, "PAUSE", 0)


# ------------------------------------------------------------------------------- documents


def test_the_embedded_corpus_is_the_standard_library_and_nothing_else():
    code = list(data.code())
    names = [record.file for record in code]
    assert names == sorted(names) and len(names) > 300, "the order is not that of the names"
    assert "argparse.py" in names and "asyncio/tasks.py" in names
    bad = [n for n in names if {"site-packages", "test", "tests"} & set(n.split("/"))]
    assert not bad, f"{bad[:3]} are not sources of the standard library"
    assert sum(len(record.row["text"]) for record in code) > 5_000_000
    assert code == list(data.code()), "a second look finds another corpus"


@pytest.fixture(scope="module")
def general() -> dict[str, str]:
    return {record.key: record.row["text"] for record in data.general()}


def test_the_general_corpus_is_docstrings_and_help_topics_without_importing(general):
    assert not {"antigravity", "turtledemo", "this"} & set(sys.modules), "modules were imported"
    assert "Command-line parsing library" in general["argparse.py"]
    assert "raise AssertionError" in general["topic assert"], "pydoc's topics are missing"
    assert sum(map(len, general.values())) > 1_000_000


def test_a_held_out_module_is_held_out_of_both_embedded_sources(general):
    modules = {key for key in general if not key.startswith("topic")}
    assert modules == {record.key for record in data.code()}, (
        "the same module has another key in the other source, so that docstrings of held-out "
        "sources can be in the training text")


def test_the_split_depends_on_the_document_alone():
    keys = [story(i) for i in range(2000)]
    held_out = [key for key in keys if data.is_validation(key, 0.05)]
    assert 60 < len(held_out) < 140, "the validation share is far from 5%"
    assert set(held_out) <= {key for key in keys if data.is_validation(key, 0.06)}
    assert not any(data.is_validation(key, 0.0) for key in keys)
    # The first 8 bytes of sha256(b"abc") are ba7816bf8f01cfea: 0.728 of 2**64.
    assert data.is_validation("abc", 0.73) and not data.is_validation("abc", 0.72), (
        "the rule of the split changed: text that trained a model would now validate it")


def test_every_kind_of_file_gives_its_documents(bpe, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: hub) is not there")
    zstandard = pytest.importorskip("zstandard", reason="zstandard (extra: hub) is not there")
    import pyarrow
    import pyarrow.parquet
    folder = tmp_path / "in" / "deeper"
    folder.mkdir(parents=True)
    lines = [[json.dumps({"text": story(10 * k + i)}).encode() + b"\n" for i in range(3)]
             for k in range(4)]
    (folder / "a.jsonl").write_bytes(b"".join(lines[0]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress(b"".join(lines[1])))
    compress = zstandard.ZstdCompressor().compress              # two frames: both must be read
    (folder / "c.jsonl.zst").write_bytes(compress(lines[2][0]) + compress(b"".join(lines[2][1:])))
    rows = {"content": [story(30 + i) for i in range(3)], "stars": [1, 2, 3]}
    pyarrow.parquet.write_table(pyarrow.table(rows), folder / "d.parquet")
    (folder / "e.py").write_text("def f():\r\n    return 'é'\n", newline="")
    (folder / "f.txt").write_text("a short text")
    (folder / "g.md").write_text("of no known kind")
    data.prepare([f"a={tmp_path / 'in'}"], bpe, tmp_path / "out", val_fraction=0)
    expected = [story(10 * k + i) for k in range(4) for i in range(3)]
    assert documents(tmp_path / "out", "train") == expected + [
        "def f():\r\n    return 'é'\n", "a short text"]


def test_a_long_text_becomes_documents_of_whole_lines(bpe, tmp_path):
    text = "".join(f"{story(i)}" for i in range(3000))
    (tmp_path / "book.txt").write_text(text)
    data.prepare([f"a={tmp_path / 'book.txt'}"], bpe, tmp_path / "out", val_fraction=0.2)
    parts = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert all(parts), "one book gives no validation split"
    assert sum(map(len, itertools.chain(*parts))) == len(text)
    assert all(part in text and part.endswith("\n") for part in itertools.chain(*parts))


def test_the_field_can_be_named(bpe, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "one", "text": "two"}\n\n{"body": "three"}\n \n')    # blank lines
    data.prepare([f"a={path}"], bpe, tmp_path / "out", val_fraction=0, field="body", max_bad=0)
    assert documents(tmp_path / "out", "train") == ["one", "three"]


# ---------------------------------------------------------------------- AMD's data on the Hub


def hub_folder(path: Path, suffix: str, rows: list[dict], split: str = "train") -> Path:
    """A data set folder as it lies on the Hub, two files of it."""
    import pyarrow
    import pyarrow.parquet
    import zstandard
    for i, part in enumerate((rows[::2], rows[1::2])):
        name = path / (f"{split}/chunk1/example_{i}.jsonl.zst" if suffix == ".jsonl.zst"
                       else f"data/{split}-{i:05d}-of-00002.parquet")
        name.parent.mkdir(parents=True, exist_ok=True)
        if suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(part), name)
        else:
            lines = "".join(json.dumps(row) + "\n" for row in part).encode()
            name.write_bytes(zstandard.ZstdCompressor().compress(lines))
    return path


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """What the Hub path needs, with its cache in a folder of the test."""
    for module in ("datasets", "zstandard", "pyarrow"):
        pytest.importorskip(module, reason=f"{module} (extra: hub) is not there")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.mark.parametrize("place", ["hub:", ""], ids=["streamed", "from files"])
def test_slimpajama_comes_without_its_books(hub, bpe, tmp_path, place):
    sets = ["RedPajamaC4", "RedPajamaBook", "RedPajamaWikipedia", "RedPajamaBook"]
    rows = [{"text": story(i), "meta": {"redpajama_set_name": sets[i % 4]}} for i in range(40)]
    folder = hub_folder(tmp_path / "SlimPajama-627B", ".jsonl.zst", rows)
    if place:                       # its other splits are for other purposes: not to be taken
        hub_folder(folder, ".jsonl.zst", [{"text": "no", "meta": rows[0]["meta"]}] * 2, "test")
    data.prepare([f"slimpajama={place}{folder}"], bpe, tmp_path / "out", val_fraction=0)
    kept = documents(tmp_path / "out", "train", "slimpajama")
    assert sorted(kept) == sorted(story(i) for i in range(40) if i % 2 == 0), (
        "the Books part is in, or another part is out")


def test_a_row_that_does_not_say_whether_to_leave_it_out_is_bad(bpe, tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a book?"}\n')
    with pytest.raises(ValueError, match="line 1: no field 'meta', which says what slimpajama"):
        data.prepare([f"slimpajama={tmp_path}"], bpe, tmp_path / "out", max_bad=0)


def test_gutenberg_comes_in_all_its_languages(hub, bpe, tmp_path):
    folder = hub_folder(tmp_path / "g", ".parquet", [{"id": str(i), "text": story(i)}
                                                      for i in range(6)], "en")
    hub_folder(folder, ".parquet", [{"id": str(i), "text": story(i)} for i in range(6, 10)], "fr")
    data.prepare([f"gutenberg=hub:{folder}"], bpe, tmp_path / "out", val_fraction=0)
    kept = documents(tmp_path / "out", "train", "gutenberg")
    assert sorted(kept) == sorted(map(story, range(10)))


def test_starcoder_python_is_the_python_folder(hub, bpe, tmp_path):
    for language, first in (("python", 0), ("java", 50)):
        rows = [{"max_stars_count": i, "content": story(first + i)} for i in range(10)]
        hub_folder(tmp_path / "starcoderdata" / language, ".parquet", rows)
    data.prepare([f"starcoder-python=hub:{tmp_path / 'starcoderdata'}"], bpe, tmp_path / "out",
                 val_fraction=0)
    kept = documents(tmp_path / "out", "train", "starcoder-python")
    assert sorted(kept) == sorted(map(story, range(10)))


def test_ready_made_sources_name_amds_data_sets():
    assert data.find("slimpajama") == ("slimpajama", {"hub:cerebras/SlimPajama-627B": 0})
    assert data.find("gutenberg") == ("gutenberg", {"hub:manu/project_gutenberg": 0})
    name, files = data.find("starcoder-python")
    assert list(files) == ["hub:bigcode/starcoderdata"] and data.FOLDER[name] == "python"


def test_a_missing_extra_is_one_sentence(bpe, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"needs zstandard: pip install -e '\.\[hub\]'"):
        data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out")


# ----------------------------------------------------------------------------- prepare


def test_a_folder_holds_what_its_manifest_says(bpe, tmp_path, small_batches):
    write_jsonl(tmp_path / "in.jsonl", range(200))
    data.prepare([f"a={tmp_path / 'in.jsonl'}", "b=" + str(tmp_path / "in.jsonl")], bpe,
                 tmp_path / "out", val_fraction=0.1)
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["tokenizer"] == bpe.sha256 and manifest["dtype"] == "uint16"
    for split in data.SPLITS:
        texts, entry = documents(tmp_path / "out", split), manifest["sources"]["a"][split]
        assert entry["documents"] == len(texts) > 5
        assert entry["bytes"] == sum(len(text.encode()) for text in texts)
        assert entry["tokens"] == len(data.Corpus(tmp_path / "out", split).tokens("a"))
        assert all(data.is_validation(text, 0.1) == (split == "val") for text in texts)
        assert manifest["sources"]["b"][split] == entry
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == \
        sorted(map(story, range(200)))


def test_large_vocabularies_are_stored_in_32_bits(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(5))
    tokens = list(bpe.ranks) + [b"\xff%d" % i for i in range(70_000)]
    data.prepare([f"a={tmp_path / 'in.jsonl'}"], data.Tokenizer(tokens), tmp_path / "out", 0)
    assert documents(tmp_path / "out", "train") == [story(i) for i in range(5)]


def test_a_killed_preparation_continues_to_the_same_bytes(bpe, tmp_path, small_batches):
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", range(100 * i, 100 * i + 60 + i))
    sources = [f"a={tmp_path / 'in'}", f"b={tmp_path / 'in' / '0.jsonl'}"]
    data.prepare(sources, bpe, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for written in itertools.count(1, 3):       # stop at any file that takes its name
        out, count = tmp_path / f"killed{written}", itertools.count(1)

        def replace(old, new, real=os.replace):
            if next(count) == written:
                raise KeyboardInterrupt
            real(old, new)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(os, "replace", replace)
            try:
                data.prepare(sources, bpe, out)
                break                           # there are no more files
            except KeyboardInterrupt:
                assert not (out / "manifest.json").exists(), "an unfinished folder has a manifest"
        data.prepare(sources, bpe, out)
        assert contents(out) == expected, f"stopped at file {written}, the folder differs"
    assert written > 25, "the test has no borders to stop at"


def test_kill_9_leaves_no_process_and_loses_nothing_noted(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(3000), words=300)
    bpe.save(tmp_path / "bpe")
    script = "import data, sys; data.BATCH = 20_000; data.PAUSE = 0; data.main(sys.argv[1:])"
    progress = tmp_path / "killed" / "progress.json"

    def noted() -> int:
        if not progress.exists():
            return 0
        return json.loads(progress.read_bytes())["sources"]["a"]["train"]["documents"]

    def command(out: str) -> list[str]:
        return [sys.executable, "-c", script, "prepare", "--source", f"a={tmp_path / 'in.jsonl'}",
                "--tokenizer", str(tmp_path / "bpe"), "--out", str(tmp_path / out)]

    env = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run(command("whole"), env=env, check=True)
    for wanted in (0, 200, 1200):
        before = noted()
        process = subprocess.Popen(command("killed"), env=env)
        while noted() < wanted and process.poll() is None:
            time.sleep(0.002)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
        workers = children.read_text().split() if children.exists() else []
        assert workers or not wanted, "found no worker process to watch"
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert noted() >= before, "what was finished before is done again"
        deadline = time.monotonic() + 20
        while any(Path(f"/proc/{worker}").exists() for worker in workers):
            assert time.monotonic() < deadline, "worker processes outlive their killed parent"
            time.sleep(0.02)
    subprocess.run(command("killed"), env=env, check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), "the folders differ"


def test_what_is_finished_is_not_read_again(bpe, tmp_path, small_batches, monkeypatch):
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", range(20 * i, 20 * i + 20))
    (tmp_path / "in" / "2.jsonl").write_text(BAD[0])
    source = f"a={tmp_path / 'in'}"
    with pytest.raises(ValueError, match="bad records"):
        data.prepare([source], bpe, tmp_path / "out", max_bad=0)
    write_jsonl(tmp_path / "in" / "2.jsonl", [0])       # mended; it has to keep its size
    monkeypatch.setattr(os.path, "getsize", lambda path, real=os.path.getsize: (
        len(BAD[0]) if path.endswith("2.jsonl") else real(path)))
    opened, real = [], data.read
    monkeypatch.setattr(data, "read", lambda source, file: (
        opened.append(Path(file).name), real(source, file))[1])
    data.prepare([source], bpe, tmp_path / "out")
    assert opened and opened[0] != "0.jsonl" and opened[-1] == "2.jsonl", f"read {opened}"
    data.prepare([source], bpe, tmp_path / "out")
    assert len(opened) <= 2, "a finished folder was prepared again"


def test_tokens_that_went_missing_are_not_made_up(bpe, tmp_path, small_batches):
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": story(i)}) + "\n" for i in range(60)) + BAD[0])
    for message in ("bad records", "has lost tokens"):
        with pytest.raises(ValueError, match=message):
            data.prepare([f"a={path}"], bpe, tmp_path / "out", max_bad=0)
        (tmp_path / "out" / "a.train.bin").unlink()         # cutting it to a length would add zeros


def test_two_preparations_of_one_folder_take_turns(bpe, tmp_path, small_batches):
    path = write_jsonl(tmp_path / "in.jsonl", range(300))
    data.prepare([f"a={path}"], bpe, tmp_path / "alone")
    with ThreadPoolExecutor(3) as pool:
        list(pool.map(lambda _: data.prepare([f"a={path}"], bpe, tmp_path / "out"), range(3)))
    assert contents(tmp_path / "out") == contents(tmp_path / "alone"), "they wrote into each other"


def test_another_preparation_is_not_written_over(bpe, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", range(20))
    data.prepare([f"a={path}"], bpe, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = data.train_bpe(["other words, other merges"] * 2, 262)
    for arguments in ((other,), (bpe, 0.5)):
        tokenizer, *rest = arguments
        with pytest.raises(ValueError, match="choose another folder"):
            data.prepare([f"a={path}"], tokenizer, tmp_path / "out", *rest)
    assert contents(tmp_path / "out") == before, "the refused preparation changed the folder"


BAD = ['{"text": "cut', "[1, 2]", "7", '{"body": "x"}', '{"text": 5}', '{"text": "\\ud800"}',
       '{"text": null}', "\x00", "[" * 100_000, '"text"', '{"text": "\xff"}']


def test_bad_rows_are_counted_reported_and_skipped(bpe, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": story(0)})] + BAD + [json.dumps({"text": story(1)})]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    data.prepare([f"a={path}"], bpe, tmp_path / "out", val_fraction=0, max_bad=len(BAD))
    assert documents(tmp_path / "out", "train") == [story(0), story(1)]
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_bytes())
    assert manifest["sources"]["a"]["bad"] == len(BAD)
    reported = capfd.readouterr().err
    assert all(f"{path}, line {2 + i}: " in reported for i in range(len(BAD)))
    with pytest.raises(ValueError, match=rf"{path}, line {1 + len(BAD)}: .* {len(BAD) - 1} bad"):
        data.prepare([f"a={path}"], bpe, tmp_path / "out2", max_bad=len(BAD) - 1)


def test_a_text_that_is_not_utf8_is_a_bad_record(bpe, tmp_path, capfd):
    (tmp_path / "a.txt").write_bytes(b"good\n")
    (tmp_path / "b.txt").write_bytes(b"caf\xe9\n")
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out", val_fraction=0, max_bad=1)
    assert documents(tmp_path / "out", "train") == ["good\n"]
    assert f"{tmp_path / 'b.txt'}, line 1: " in capfd.readouterr().err


def test_bad_rows_of_earlier_runs_count(bpe, tmp_path, small_batches):
    path = tmp_path / "in.jsonl"
    good = [json.dumps({"text": story(i)}) for i in range(60)]
    path.write_text("\n".join([BAD[0], *good, BAD[0], *good, BAD[0]]))
    for _ in range(3):               # trying again must not get past the limit
        with pytest.raises(ValueError, match="line 123.* 2 bad"):
            data.prepare([f"a={path}"], bpe, tmp_path / "out", max_bad=2)


@pytest.mark.parametrize("name, content", [
    ("x.jsonl.gz", gzip.compress(json.dumps({"text": story(0, 9999)}).encode())[:-100]),
    ("x.jsonl.gz", b"no gzip at all"), ("x.jsonl.zst", b"no zstd at all"),
    ("x.parquet", b"PAR1 no parquet PAR1")])
def test_a_damaged_file_is_named(bpe, tmp_path, name, content):
    if name != "x.jsonl.gz":
        pytest.importorskip("pyarrow" if "parquet" in name else "zstandard", reason="extra: hub")
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read {tmp_path / name}"):
        data.prepare([f"a={tmp_path / name}"], bpe, tmp_path / "out")


def test_a_full_disk_is_one_sentence_and_keeps_what_was_finished(bpe, tmp_path, small_batches):
    path = write_jsonl(tmp_path / "in.jsonl", range(300))
    data.prepare([f"a={path}"], bpe, tmp_path / "whole")
    real, written = os.fsync, itertools.count()

    def fsync(file: int) -> None:
        if next(written) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        with pytest.raises(OSError, match="no room to write .*free some space and run the same"):
            data.prepare([f"a={path}"], bpe, tmp_path / "out")
    kept = contents(tmp_path / "out")
    done = json.loads(kept["progress.json"])["sources"]["a"]["train"]["tokens"]
    assert done, "nothing was kept"
    assert not any(name.endswith(".tmp") for name in kept), "a temporary file fills the disk"
    data.prepare([f"a={path}"], bpe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    whole = (tmp_path / "out" / "a.train.bin").read_bytes()
    assert whole[:2 * done] == kept["a.train.bin"][:2 * done], "finished tokens were changed"


def test_a_real_limit_on_file_size_is_one_sentence(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(500))
    bpe.save(tmp_path / "bpe")
    result = subprocess.run(
        [sys.executable, ROOT / "data.py", "prepare", "--source", f"a={tmp_path / 'in.jsonl'}",
         "--tokenizer", tmp_path / "bpe", "--out", tmp_path / "out"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "no room to write" in result.stderr


# ----------------------------------------------------------------------- corpus and loader


@pytest.fixture(scope="module")
def folder(bpe, tmp_path_factory) -> Path:
    """Two sources of different sizes."""
    path = tmp_path_factory.mktemp("corpus")
    write_jsonl(path / "large.jsonl", range(150))
    write_jsonl(path / "small.jsonl", range(150, 190))
    data.prepare([f"large={path / 'large.jsonl'}", f"small={path / 'small.jsonl'}"], bpe,
                 path / "out", val_fraction=0.1)
    return path / "out"


def blocks_of(corpus: data.Corpus, size: int, names: list[str]) -> list[bytes]:
    """Every block of the streams, as they lie there."""
    return [corpus.tokens(name)[i:i + size].astype(np.int64).tobytes() for name in names
            for i in range(0, len(corpus.tokens(name)) - size + 1, size)]


@pytest.mark.parametrize("block, batch", [(10, 7), (16, 64), (3, 1), (40, 1000)])
def test_every_block_comes_once_an_epoch(folder, block, batch):
    corpus = data.Corpus(folder)
    loader = data.Loader(corpus, block, batch, seed=1)
    expected = sorted(blocks_of(corpus, block + 1, corpus.sources))
    n = loader.blocks_per_epoch
    assert n == len(expected) and (batch == 1 or n % batch), "choose sizes that do not divide"
    rows = np.concatenate([loader.batch(step) for step in range(-(-3 * n // batch))])
    assert rows.dtype == np.int64 and rows.shape[1] == block + 1
    epochs = [[row.tobytes() for row in rows[e * n:(e + 1) * n]] for e in range(3)]
    for e, epoch in enumerate(epochs):
        assert sorted(epoch) == expected, f"epoch {e} misses blocks or repeats them"
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0], "epochs come in the same order"


def test_the_rows_of_a_step_do_not_depend_on_the_number_of_ranks(folder):
    loader = data.Loader(data.Corpus(folder), 8, 24, seed=3)
    for step in (0, 1, 50):
        whole = loader.batch(step)
        for world in (1, 2, 3, 4, 8, 24):
            ranks = [loader.batch(step, rank, world) for rank in range(world)]
            assert np.array_equal(np.concatenate(ranks), whole), f"{world} ranks see other rows"
    with pytest.raises(ValueError, match="24 rows cannot be split between 5"):
        loader.batch(0, 0, 5)


def test_batches_are_a_pure_function_of_the_step(folder):
    one, two = (data.Loader(data.Corpus(folder), 8, 6, seed=5) for _ in range(2))
    steps = [9, 0, 123456789, 9, 3]
    assert np.array_equal([one.batch(s) for s in steps], [two.batch(s) for s in steps])
    assert not np.array_equal(one.batch(0), data.Loader(data.Corpus(folder), 8, 6, 6).batch(0)), (
        "the seed has no effect")


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_the_order_of_an_epoch_is_a_permutation(n):
    index = np.arange(n)
    orders = [np.array([data.permute(i, n, seed, epoch) for i in range(n)])
              for seed in (0, 1, 2**63) for epoch in (0, 1, 10**6)]
    for order in orders:
        assert np.array_equal(np.sort(order), index), f"not a permutation of range({n})"
    if n >= 16:
        assert len({order.tobytes() for order in orders}) == len(orders), "two orders are equal"


def test_orders_look_random():
    n = 4000
    x = np.arange(n)
    for epoch in range(5):
        y = np.array([data.permute(i, n, 0, epoch) for i in range(n)])
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.08, "the order follows the data"
        assert abs(np.corrcoef(y[1:], y[:-1])[0, 1]) < 0.08, "neighbours stay neighbours"
        assert (y[1:] - y[:-1] == 1).sum() < 12


@pytest.mark.parametrize("weights", [
    [0.98, 0.02], [1, 1], [0.5, 0.3, 0.2], [7, 1, 1, 1], [0.9, 0.05, 0.03, 0.02], [1], [3, 3, 1, 2],
    [0.333, 0.333, 0.334], [0.1] * 10, [618, 382]])
def test_every_prefix_of_a_mixture_is_within_one_block_of_its_weights(weights):
    table = [source for source, _ in data.timetable(weights)]
    shares = [Fraction(str(w)) / sum(Fraction(str(w)) for w in weights) for w in weights]
    had = [0] * len(weights)
    for n, turn in enumerate(itertools.islice(itertools.cycle(table), 3 * len(table)), 1):
        had[turn] += 1
        assert all(abs(h - n * share) < 1 for h, share in zip(had, shares)), (
            f"after {n} turns, {had} is more than one block off")


def test_a_mixture_draws_each_source_once_an_epoch_of_its_own(folder):
    corpus = data.Corpus(folder, mix={"small": 0.75, "large": 0.25})
    loader = data.Loader(corpus, 30, 10, seed=0)
    small, large = (blocks_of(corpus, 31, [name]) for name in ("small", "large"))
    n, steps = len(small), len(small) // 3
    rows = [row.tobytes() for step in range(steps) for row in loader.batch(step)]
    drawn = [row for row in rows if row in set(small)]
    assert not set(small) & set(large) and abs(len(drawn) - 7.5 * steps) < 1
    assert sorted(drawn[:n]) == sorted(drawn[n:2 * n]) == sorted(small), (
        "a source is not used up before it repeats")
    assert np.array_equal(np.concatenate([loader.batch(7, r, 5) for r in range(5)]),
                          loader.batch(7))


def test_without_weights_sources_mix_by_their_sizes(folder):
    corpus = data.Corpus(folder)
    assert data.Loader(corpus, 8, 4, 0).blocks_per_epoch == len(
        blocks_of(corpus, 9, corpus.sources))
    alone = data.Corpus(folder, sources=["small"])
    assert data.Loader(alone, 8, 4, 0).blocks_per_epoch == len(blocks_of(alone, 9, ["small"]))


def test_what_cannot_be_loaded_is_one_sentence(bpe, folder, tmp_path):
    with pytest.raises(ValueError, match="no manifest.json"):
        data.Corpus(tmp_path)
    with pytest.raises(ValueError, match="no source other, but large, small"):
        data.Corpus(folder, sources=["other"])
    with pytest.raises(ValueError, match="positive"):
        data.Loader(data.Corpus(folder, mix={"large": 1, "small": 0}), 8, 4, 0)
    with pytest.raises(ValueError, match="too many digits"):
        data.Loader(data.Corpus(folder, mix={"large": 0.1234567, "small": 0.7}), 8, 4, 0)
    for mix in (None, {"large": 1, "small": 1}):
        with pytest.raises(ValueError, match="choose a shorter block"):
            data.Loader(data.Corpus(folder, mix=mix), 100_000, 4, 0)


def copied(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, content in contents(folder).items():
        (to / name).write_bytes(content)
    return to


def test_a_manifest_of_another_tokenizer_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy")
    data.train_bpe(["other words, other merges"] * 2, 262).save(copy)
    with pytest.raises(ValueError, match="another tokenizer"):
        data.Corpus(copy)


def test_a_cut_or_missing_file_of_tokens_is_refused(folder, tmp_path):
    copy = copied(folder, tmp_path / "copy")
    tokens = copy / "large.train.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(ValueError, match=f"{tokens.name} is missing or does not hold"):
        data.Corpus(copy)
    tokens.unlink()
    with pytest.raises(ValueError, match=f"{tokens.name} is missing or does not hold"):
        data.Corpus(copy)


# ------------------------------------------------------------------------------ benchmarks


def test_fetched_rows_are_where_evaluate_looks_for_them(tmp_path, monkeypatch):
    """The Hub is a function here: what it is asked for, and what becomes of the rows."""
    asked = []

    def load_dataset(path, name=None, *, split, streaming, **place):
        asked.append((path, name or place.get("data_dir"), split))
        return iter([{"path": path, "split": split, "text": "a\u2028b\n\u00e9"} | problem])

    problem = dict.fromkeys(("task_id", "prompt", "test", "entry_point"), "x")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    data.main(["fetch", "all", "--out", str(tmp_path)])
    for name, task in evaluate.TASKS.items():
        file = evaluate.find_rows(tmp_path / name, task.split)
        rows = [json.loads(row) for row in file.read_bytes().splitlines()]
        path, _, scored, *_ = data.BENCHMARKS[name]
        assert rows == [{"path": path, "split": scored, "text": "a\u2028b\n\u00e9"} | problem], name
        assert (scored == "test") == task.split.startswith("test"), f"{name}: the wrong split"
    assert evaluate.read_problems(tmp_path) == [("x", "x", "x", "x")]
    assert set(data.BENCHMARKS) == {*evaluate.TASKS, "humaneval"}
    assert ("cais/mmlu", "all", "dev") in asked and ("EleutherAI/logiqa", "logiqa", "test") in asked


def test_a_failed_fetch_is_one_sentence_and_leaves_no_file(tmp_path, monkeypatch, capfd):
    def load_dataset(*arguments, **options):
        yield {"question": "?"}
        raise ConnectionError("the line\nis cut")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    for task, message in [("sciq", "cannot fetch sciq from allenai/sciq: the line is cut"),
                          ("chess", "unknown task 'chess': expected all or one of sciq")]:
        with pytest.raises(SystemExit) as stop:
            data.main(["fetch", task, "--out", str(tmp_path / "eval")])
        error = capfd.readouterr().err
        assert stop.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert not list(tmp_path.rglob("*.*")), "a file that is not whole was left"


# --------------------------------------------------------------------------- command line


@pytest.mark.parametrize("arguments, message", [
    (["prepare", "--source", "a=nowhere", "--tokenizer", "bpe", "--out", "o"], "nowhere"),
    (["prepare", "--source", "unknown", "--tokenizer", "bpe", "--out", "o"], "neither NAME=PATH"),
    (["prepare", "--source", "a/b=x.txt", "--tokenizer", "bpe", "--out", "o"], "neither NAME=PATH"),
    (["prepare", "--source", "a=x.txt", "--tokenizer", "none", "--out", "o"], "no tokenizer"),
    (["prepare", "--source", "a=empty.txt", "--tokenizer", "bpe", "--out", "o"], "no text"),
    (["prepare", "--source", "a=picture.png", "--tokenizer", "bpe", "--out", "o"], "kinds"),
    (["prepare", "--source", "a=x.txt", "--source", "a=x.txt", "--tokenizer", "bpe", "--out", "o"],
     "name of its own"),
    (["prepare", "--source", "a=x.txt", "--tokenizer", "bpe", "--out", "o", "--val-fraction", "1"],
     "below 1"),
    (["prepare", "--source", "a=x.txt", "--tokenizer", "bpe", "--out", "x.txt"], "x.txt"),
    (["train-tokenizer", "--source", "a=x.txt", "--out", "o"], "add text or ask for fewer"),
    (["train-tokenizer", "--source", "a=x.txt", "--vocab-size", "9", "--out", "o"], "256 bytes"),
    (["train-tokenizer", "--source", "a=bad.jsonl", "--out", "o"], "bad.jsonl, line 1"),
])
def test_a_mistake_on_the_command_line_is_one_sentence(bpe, tmp_path, monkeypatch, capfd,
                                                       arguments, message):
    monkeypatch.chdir(tmp_path)
    bpe.save("bpe")
    Path("x.txt").write_text("some text\n")
    Path("empty.txt").touch()
    Path("picture.png").touch()
    Path("bad.jsonl").write_text("{\n")
    with pytest.raises(SystemExit) as stop:
        data.main(arguments)
    error = capfd.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error, error
    assert not Path("o", "manifest.json").exists()


def test_the_two_commands_work_together(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(100))
    source = f"mine={tmp_path / 'in.jsonl'}"
    data.main(["train-tokenizer", "--source", source, "--vocab-size", "270",
               "--out", str(tmp_path / "bpe")])
    data.main(["prepare", "--source", source, "--tokenizer", str(tmp_path / "bpe"),
               "--out", str(tmp_path / "out")])
    assert set(documents(tmp_path / "out", "train", "mine")) <= set(map(story, range(100)))
