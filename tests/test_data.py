"""Claims about documents, prepared folders and batches.

    pytest tests/test_data.py
"""

import errno
import functools
import gzip
import itertools
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import data

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
    tokens, texts = corpus.tokens[source][:].tolist(), []
    while corpus.tokenizer.eos_id in tokens:
        end = tokens.index(corpus.tokenizer.eos_id)
        texts.append(corpus.tokenizer.decode(tokens[:end]))
        tokens = tokens[end + 1:]
    assert not tokens, "the stream does not end with the end-of-text token"
    return texts


@pytest.fixture
def small_parts(monkeypatch):
    """Parts of 1024 bytes, and documents of as many: many borders in little text."""
    monkeypatch.setattr(data, "PART", 1024)
    monkeypatch.setattr(data, "KIB", 32)


def manifest_of(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_bytes())


# ------------------------------------------------------------------------------- documents


def embedded(source: str) -> dict[str, str]:
    """The built-in sources, by key."""
    parts = data.cut_parts(dict([data.find(source, Counter())]))
    return {key: text for part in parts for text, key in data.documents(part, None, 0)}


@pytest.fixture(scope="module")
def code() -> dict[str, str]:
    return embedded("code")


@pytest.fixture(scope="module")
def general() -> dict[str, str]:
    return embedded("general")


@pytest.mark.slow
def test_the_embedded_corpus_is_the_standard_library_and_nothing_else(code):
    files = list(data.find("code", Counter())[1])
    assert files == sorted(files) and len(code) > 300, "the order is not that of the names"
    for name in ("argparse.py", "asyncio/tasks.py"):
        assert code[name] == (data.LIBRARY / name).read_text(), f"{name} is not one document"
    bad = [n for n in code if {"site-packages", "test", "tests"} & set(n.split("/"))]
    assert not bad, f"{bad[:3]} are not sources of the standard library"
    assert sum(map(len, code.values())) > 5_000_000
    assert code == embedded("code"), "a second look finds another corpus"


@pytest.mark.slow
def test_the_general_corpus_is_docstrings_without_importing(general):
    assert not {"antigravity", "turtledemo", "this"} & set(sys.modules), "modules were imported"
    assert "Command-line parsing library" in general["argparse.py"]
    assert sum(map(len, general.values())) > 1_000_000


@pytest.mark.slow
def test_a_held_out_module_is_held_out_of_both_embedded_sources(code, general):
    assert set(general) < set(code) and len(general) > 300, (
        "the same module has another key in the other source, so that docstrings of held-out "
        "sources can be in the training text")


@pytest.mark.slow
def test_what_is_held_out_of_one_embedded_source_is_held_out_of_the_other(bpe, tmp_path,
                                                                            monkeypatch, general):
    names = ["argparse.py", "ast.py", "bisect.py", "heapq.py", "shutil.py", "uuid.py"]
    monkeypatch.setattr(data, "library", lambda: [str(data.LIBRARY / n) for n in names])
    data.prepare(["general", "code"], bpe, tmp_path / "out", val_fraction=0.5)
    modules = {n: data.is_validation(n, 0.5) for n in names}
    assert len(set(modules.values())) == 2
    for name, held_out in modules.items():
        split, other = ("val", "train") if held_out else ("train", "val")
        source = (data.LIBRARY / name).read_text()
        assert source in documents(tmp_path / "out", split, "code")
        assert general[name] in documents(tmp_path / "out", split, "general")
        assert general[name] not in documents(tmp_path / "out", other, "general")


@pytest.mark.slow
def test_the_docstrings_of_a_module_that_is_larger_than_a_part_are_one_document(general,
                                                                                small_parts):
    parts = data.cut_parts(dict([data.find("general", Counter())]))
    assert sum(map(len, parts)) > 2 * len(general), "no module was cut"
    found = [document for part in parts for document in data.documents(part, None, 0)]
    assert sorted(found) == sorted((text, key) for key, text in general.items())


def test_only_the_librarys_own_modules_are_held_out_by_name():
    library = data.LIBRARY
    assert data.library_module(str(library / "json" / "tool.py")) == "json/tool.py"
    for other in (library / "site-packages" / "x.py", library / "test" / "x.py",
                  library.parent / "x.py", Path("argparse.py")):
        assert not data.library_module(str(other)), f"{other} would be one document with others"


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
    (folder / "g.md").write_text("# a title\n")
    (folder / "h.rst").write_text("a title\n=======")
    data.prepare([f"a={tmp_path / 'in'}"], bpe, tmp_path / "out", val_fraction=0)
    expected = [story(10 * k + i) for k in range(4) for i in range(3)]
    assert documents(tmp_path / "out", "train") == expected + [
        "def f():\r\n    return 'é'\n", "a short text", "# a title\n", "a title\n======="]


def test_a_long_text_becomes_documents_of_whole_lines(bpe, tmp_path):
    text = "".join(f"{story(i)}" for i in range(3000))
    (tmp_path / "book.txt").write_text(text)
    data.prepare([f"a={tmp_path / 'book.txt'}"], bpe, tmp_path / "out", val_fraction=0.2)
    parts = documents(tmp_path / "out", "train"), documents(tmp_path / "out", "val")
    assert all(parts), "one book gives no validation split"
    assert sum(map(len, itertools.chain(*parts))) == len(text)
    assert all(part in text and part.endswith("\n") for part in itertools.chain(*parts))


def test_where_a_file_is_cut_into_parts_changes_no_document(bpe, tmp_path, monkeypatch):
    """Lines of all lengths, also empty ones and some that are longer than a part."""
    rng = random.Random(0)
    lines = ["word " * rng.choice((0, 0, 1, 5, 50, 500)) + "é" * rng.randrange(3)
             for _ in range(2000)]
    aligned = [f"{i:63}" for i in range(4000)]      # some begin just where a stretch does
    (tmp_path / "book.txt").write_text("\n".join(aligned + lines))
    write_jsonl(tmp_path / "rows.jsonl", range(300))
    expected = None
    for size in (1 << 20, 1 << 15, 5 << 15):
        monkeypatch.setattr(data, "cut_parts", functools.partial(cut, size=size))
        out = tmp_path / f"out{size}"
        data.prepare([f"a={tmp_path / 'book.txt'}", f"b={tmp_path / 'rows.jsonl'}"], bpe, out, 0)
        found = documents(out, "train"), documents(out, "train", "b")
        expected = expected or found
        assert found == expected, f"parts of {size} bytes give other documents"
    assert "".join(expected[0]) == (tmp_path / "book.txt").read_text() and len(expected[0]) > 10
    assert expected[1] == [story(i) for i in range(300)]
    for size in range(90, 130):     # rows may be cut anywhere
        spans = [data.Span("b", str(tmp_path / "rows.jsonl"), i, i + size)
                 for i in range(0, (tmp_path / "rows.jsonl").stat().st_size, size)]
        rows = [row for span in spans for _, row in data.read(span)]
        assert b"".join(rows) == (tmp_path / "rows.jsonl").read_bytes()


def cut(found: dict, size: int) -> list:
    return [[data.Span(source, file, start, min(start + size, length))]
            for source, files in found.items() for file, (length, _) in files.items()
            for start in range(0, length, size)]


def test_parts_have_about_one_size_and_hold_everything_once():
    files = {f"{i}.py": [size, 0] for i, size in enumerate([100, 0, 9 << 20, 5] + [9000] * 999)}
    files |= {"z.jsonl.gz": [9 << 20, 0], "hub:x/y": [3 * data.PART, 0]}
    parts = data.cut_parts({"a": files, "b": {"1.py": [7, 0]}})
    assert {span.source for part in parts[:-1] for span in part} == {"a"}
    assert [span.source for span in parts[-1]] == ["b"], "a part has files of two sources"
    spans = [span for part in parts[:-1] for span in part]
    for file, (size, _) in files.items():
        own = [(span.start, span.stop) for span in spans if span.file == file]
        assert sum(stop - start for start, stop in own) == size
        assert [start for start, _ in own] == [0, *(stop for _, stop in own)][:len(own)]
    sizes = [sum(span.stop - span.start for span in part) for part in parts]
    assert max(sizes[:-5]) <= 2 * data.PART and len(parts) < 12
    assert sizes[-4:] == [data.PART] * 3 + [7], "a shard on the Hub is not a part of its own"


def test_a_byte_order_mark_is_no_text(bpe, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbftext")
    (tmp_path / "b.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "row"}\n')
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out", val_fraction=0)
    assert documents(tmp_path / "out", "train") == ["text", "row"]


def test_a_line_of_any_length_is_read_and_the_next_ones_keep_their_numbers(bpe, tmp_path, capfd):
    long = "word " * 1_000_000      # 5 MB, in parts of 1 MiB
    (tmp_path / "x.jsonl").write_text("\n".join(
        [json.dumps({"text": "a"}), json.dumps({"text": long}), "{", *["{}" + " " * 200_000] * 20]))
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out", val_fraction=0)
    assert documents(tmp_path / "out", "train") == ["a", long]
    error = capfd.readouterr().err
    assert all(f"x.jsonl, line {n}: " in error for n in range(3, 24)) and "line 24" not in error
    assert "line 1:" not in error and "line 2:" not in error


def test_lines_that_begin_just_where_a_part_does_keep_their_numbers(bpe, tmp_path, small_parts):
    (tmp_path / "x.jsonl").write_text((" " * 1022 + "{\n") * 4)
    for number, span in enumerate(itertools.chain(*data.cut_parts(
            data.find_all([f"a={tmp_path}"], Counter()))), 1):
        with pytest.raises(ValueError, match=f"x.jsonl, line {number}: "):
            list(data.documents([span], None, max_bad=0))
    assert number == 4


def test_only_the_text_column_of_a_parquet_file_is_read(bpe, tmp_path):
    pytest.importorskip("pyarrow", reason="pyarrow (extra: hub) is not there")
    import pyarrow
    import pyarrow.parquet
    dates = pyarrow.array([2**62, 5], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    pyarrow.parquet.write_table(
        pyarrow.table({"text": ["one", "two"], "date": dates, "body": ["x", "y"]}),
        tmp_path / "x.parquet")
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out", val_fraction=0)
    assert documents(tmp_path / "out", "train") == ["one", "two"]
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out2", 0, field="body")
    assert documents(tmp_path / "out2", "train") == ["x", "y"]


def test_links_are_followed_once_and_what_is_left_out_is_counted(bpe, tmp_path, capfd):
    folder, other = tmp_path / "in", tmp_path / "elsewhere"
    for path, content in [
            (folder / "a.txt", "a"), (other / "b.txt", "b"), (other / "deep" / "c.txt", "c"),
            (folder / "._a.txt", "resource fork"), (folder / "picture.png", "png"),
            (folder / ".ipynb_checkpoints" / "a-checkpoint.txt", "a, earlier"),
            (folder / "lfs.txt", "version https://git-lfs.github.com/spec/v1\noid sha256:0")]:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    (folder / "link").symlink_to(other)
    (folder / "link2").symlink_to(other / "deep")
    (other / "loop").symlink_to(folder)
    (folder / "file.txt").symlink_to(other / "b.txt")
    (folder / "gone.txt").symlink_to(tmp_path / "nothing.txt")
    (folder / "gone").symlink_to(tmp_path / "nothing")
    (folder / "locked.txt").write_text("x")
    (folder / "locked").mkdir()
    os.mkfifo(folder / "pipe.txt")              # to open it would be to wait

    def unreadable(path, *args, real=open, **kwargs):
        if str(path).endswith("locked.txt"):        # root may read everything
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path, *args, **kwargs)

    def scandir(path, real=os.scandir):
        if str(path).endswith("locked"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return real(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", unreadable)
        patch.setattr(os, "scandir", scandir)
        data.prepare([f"a={folder}"], bpe, tmp_path / "out", val_fraction=0)
    assert sorted(documents(tmp_path / "out", "train")) == ["a", "b", "b", "c"]
    [line] = capfd.readouterr().err.splitlines()
    assert line == ("skipped 1 AppleDouble files, 2 dangling links or wrong paths, 1 files in "
                    ".ipynb_checkpoints, 2 files of other kinds, 1 git-lfs pointers, "
                    "2 unreadable files or folders")


def test_the_field_can_be_named(bpe, tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "one", "text": "two"}\n\n{"body": "three"}\n \n')    # blank lines
    data.prepare([f"a={path}"], bpe, tmp_path / "out", val_fraction=0, field="body")
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
    with pytest.raises(ValueError, match="line 1: no text .*'meta'"):
        list(data.texts([f"slimpajama={tmp_path}"]))


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


def test_ready_made_sources_name_amds_data_sets(hub, tmp_path, monkeypatch):
    assert data.READY["slimpajama"] == "hub:cerebras/SlimPajama-627B"
    assert data.READY["gutenberg"] == "hub:manu/project_gutenberg"
    assert data.READY["starcoder-python"] == "hub:bigcode/starcoderdata"


def test_a_data_set_that_is_not_there_is_one_sentence(hub, bpe, tmp_path):
    with pytest.raises(ValueError, match="source x: cannot read hub:.*nothing") as error:
        data.prepare([f"x=hub:{tmp_path / 'nothing'}"], bpe, tmp_path / "out")
    assert "\n" not in str(error.value)


def test_a_missing_extra_is_one_sentence(bpe, tmp_path, monkeypatch):
    (tmp_path / "x.jsonl.zst").write_bytes(b"some")
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(ValueError, match=r"needs zstandard: pip install -e '\.\[hub\]'"):
        data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out")


# ----------------------------------------------------------------------------- prepare


def test_a_folder_holds_what_its_manifest_says(bpe, tmp_path, small_parts):
    write_jsonl(tmp_path / "in.jsonl", range(200))
    data.prepare([f"a={tmp_path / 'in.jsonl'}", "b=" + str(tmp_path / "in.jsonl")], bpe,
                 tmp_path / "out", val_fraction=0.1)
    manifest = manifest_of(tmp_path / "out")
    assert manifest["tokenizer"] == bpe.sha256
    for split in data.SPLITS:
        texts, entry = documents(tmp_path / "out", split), manifest["sources"]["a"][split]
        assert len(texts) > 5
        assert entry == len(data.Corpus(tmp_path / "out", split).tokens["a"])
        assert all(data.is_validation(text, 0.1) == (split == "val") for text in texts)
        assert manifest["sources"]["b"][split] == entry
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == \
        sorted(map(story, range(200)))
    assert not (tmp_path / "out" / "parts").exists(), "the parts take up the disk"


def test_without_held_out_documents_the_validation_split_has_no_rows(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(20))
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out", val_fraction=0)
    corpus = data.Corpus(tmp_path / "out", "val")
    assert corpus.blocks("a", 8).shape == (0, 9) and len(corpus.tokens["a"]) == 0
    with pytest.raises(ValueError, match="too little text in its val split"):
        data.Loader(corpus, 8, 4, 0)


def test_large_vocabularies_are_stored_in_32_bits(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(5))
    pairs = [(bytes([a]), bytes([b])) for a in range(256) for b in range(128, 256)]
    more = [(b"".join(pairs[-1]), b"".join(pair)) for pair in pairs]     # no text needs these
    files = data.write_tokenizer_json([*pairs, *more])
    data.prepare([f"a={tmp_path / 'in.jsonl'}"], data.read_tokenizer_json(files),
                 tmp_path / "out", 0)
    assert documents(tmp_path / "out", "train") == [story(i) for i in range(5)]


@pytest.mark.slow
def test_a_killed_preparation_continues_to_the_same_bytes(bpe, tmp_path, monkeypatch):
    """Stopped at each file that takes its name or goes, in the parent process or in a worker."""
    monkeypatch.setattr(data, "PART", 3000)
    monkeypatch.setattr(data, "ProcessPoolExecutor", InThisProcess)
    for i in range(3):
        write_jsonl(tmp_path / "in" / f"{i}.jsonl", range(100 * i, 100 * i + 30 + i))
    sources = [f"a={tmp_path / 'in'}", f"b={tmp_path / 'in' / '0.jsonl'}"]
    data.prepare(sources, bpe, tmp_path / "whole")
    expected = contents(tmp_path / "whole")
    for function in ("replace", "unlink"):
        for written in itertools.count(1, 2):
            out, count = tmp_path / f"killed at {function} {written}", itertools.count(1)

            def stop(*args, real=getattr(os, function), **kwargs):
                if next(count) == written:
                    raise KeyboardInterrupt
                return real(*args, **kwargs)

            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(os, function, stop)
                try:
                    data.prepare(sources, bpe, out)
                    break                       # there are no more files
                except KeyboardInterrupt:
                    pass
            data.prepare(sources, bpe, out)
            assert contents(out) == expected, f"stopped at {function} {written}, it differs"
        assert written > 15 or function == "unlink", "the test has no borders to stop at"


class InThisProcess:
    """As a ProcessPoolExecutor, but a KeyboardInterrupt can be raised anywhere."""

    def __init__(self, *arguments, **options):
        pass

    def submit(self, function, *arguments) -> Future:
        future = Future()
        future.set_result(function(*arguments))
        return future

    def shutdown(self, **options) -> None:
        pass


def command(tmp_path: Path, out: str, source: str, setup: str = "") -> list[str]:
    script = f"import data, sys\n{setup}\ndata.main(sys.argv[1:])"
    return [sys.executable, "-c", script, "prepare", "--source", f"a={tmp_path / source}",
            "--tokenizer", str(tmp_path / "bpe"), "--out", str(tmp_path / out)]


ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
SLOW_PARTS = """
data.PART, encode = 20_000, data.encode_part
def slow(*arguments):
    data.time.sleep(0.05)
    return encode(*arguments)
data.encode_part = slow
"""


def finished_parts(out: Path) -> list[str]:
    return sorted(path.name for path in out.glob("parts/*.train"))


def stop_when(process: subprocess.Popen, out: Path, parts: int, number: signal.Signals,
              group: bool = False) -> list[str]:
    """Send a signal when so many parts are finished; returns the ids of the workers there were."""
    while len(finished_parts(out)) < parts and process.poll() is None:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    workers = children.read_text().split() if children.exists() else []
    assert workers or not parts, "found no worker process to watch"
    (os.killpg if group else os.kill)(process.pid, number)
    return workers


def assert_gone(workers: list[str]) -> None:
    deadline = time.monotonic() + 20
    while any(Path(f"/proc/{worker}").exists() for worker in workers):
        assert time.monotonic() < deadline, "worker processes outlive their parent"
        time.sleep(0.02)


@pytest.mark.slow
def test_kill_9_leaves_no_process_and_costs_no_finished_part(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(700), words=300)
    bpe.save(tmp_path / "bpe")
    killed, whole = (command(tmp_path, out, "in.jsonl", SLOW_PARTS) for out in ("killed", "whole"))
    subprocess.run(whole, env=ENVIRONMENT, check=True)
    for parts in (0, 5, 20):
        before = {path: path.stat().st_mtime_ns
                  for path in (tmp_path / "killed").glob("parts/*.train")}
        process = subprocess.Popen(killed, env=ENVIRONMENT)
        workers = stop_when(process, tmp_path / "killed", parts, signal.SIGKILL)
        process.wait()
        assert_gone(workers)
        assert all(path.stat().st_mtime_ns == time for path, time in before.items()), (
            "a part that was finished was made again")
    assert (tmp_path / "killed.lock").exists(), "the test did not kill a run at work"
    subprocess.run(killed, env=ENVIRONMENT, check=True)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole"), "the folders differ"


def test_ctrl_c_is_one_sentence_and_the_same_command_goes_on(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(700), words=300)
    bpe.save(tmp_path / "bpe")
    arguments = command(tmp_path, "out", "in.jsonl", SLOW_PARTS)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True,
                               start_new_session=True)
    workers = stop_when(process, tmp_path / "out", 3, signal.SIGINT, group=True)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 130 and error.strip().count("\n") == 0, error
    assert "goes on with the same command" in error
    assert_gone(workers)
    kept = finished_parts(tmp_path / "out")
    assert len(kept) >= 3 and not (tmp_path / "out.lock").exists()
    subprocess.run(arguments, env=ENVIRONMENT, check=True)


@pytest.mark.slow
def test_a_worker_that_is_killed_for_memory_is_one_sentence(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(700), words=300)
    bpe.save(tmp_path / "bpe")
    arguments = command(tmp_path, "out", "in.jsonl", SLOW_PARTS)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
    while len(finished_parts(tmp_path / "out")) < 3:
        time.sleep(0.002)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    os.kill(int(children[0]), signal.SIGKILL)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 2 and error.count("\n") == 1, error
    assert "a worker process was killed" in error and "same command" in error
    subprocess.run(arguments, env=ENVIRONMENT, check=True)
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == \
        sorted(story(i, 300) for i in range(700))


def test_progress_shows_a_rate_and_the_time_left(bpe, tmp_path, small_parts, monkeypatch, capfd):
    monkeypatch.setattr(data, "PAUSE", 0)
    write_jsonl(tmp_path / "in.jsonl", range(100))
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out")
    lines = capfd.readouterr().err.splitlines()
    pattern = r"\d+ of (\d+) parts, \d+k tokens/s, \d+\.\d min left"
    assert len(lines) > 5 and all(re.fullmatch(pattern, line) for line in lines), lines


def test_what_is_finished_is_not_read_again(bpe, tmp_path, monkeypatch):
    write_jsonl(tmp_path / "in.jsonl", range(20))
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out")
    before = contents(tmp_path / "out")
    monkeypatch.setattr(data, "encode_part", None)
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out")
    assert contents(tmp_path / "out") == before


@pytest.mark.slow
def test_a_second_preparation_of_a_folder_is_refused(bpe, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", range(30))
    bpe.save(tmp_path / "bpe")
    with data.claim(tmp_path / "out"):
        second = subprocess.run(command(tmp_path, "out", "in.jsonl"), env=ENVIRONMENT,
                                capture_output=True, text=True)
    assert re.search("another run .*out: .*delete .*out.lock", second.stderr)
    assert second.returncode == 2 and not (tmp_path / "out").exists()
    processes = [subprocess.Popen(command(tmp_path, "out", "in.jsonl", SLOW_PARTS),
                                  env=ENVIRONMENT, stderr=subprocess.PIPE, text=True)
                 for _ in range(3)]
    errors = [process.communicate()[1] for process in processes]
    codes = [process.returncode for process in processes]
    assert 0 in codes and set(codes) <= {0, 2}, errors
    assert all("another run writes in" in error and error.count("\n") == 1
               for error, code in zip(errors, codes) if code == 2), errors
    assert sorted(documents(tmp_path / "out", "train") + documents(tmp_path / "out", "val")) == \
        sorted(map(story, range(30)))


@pytest.mark.slow
def test_a_lock_is_taken_over_only_from_a_process_that_is_known_to_be_gone(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(30))
    out, lock = tmp_path / "out", tmp_path / "out.lock"
    killed = "import data, os; c = data.claim('out'); c.__enter__(); os.kill(os.getpid(), 9)"
    for owner in ("this computer", "another computer"):
        subprocess.run([sys.executable, "-c", killed], env=ENVIRONMENT, cwd=tmp_path)
        assert lock.exists(), "the process took its lock along"
        if owner == "this computer":
            data.prepare([f"a={tmp_path / 'in.jsonl'}"], bpe, out)
            assert not lock.exists()
    pid, computer, *rest = lock.read_text().splitlines()
    lock.write_text("\n".join([pid, "another-computer", *rest, ""]))
    before = lock.read_bytes()
    with pytest.raises(ValueError, match="another run") as error:
        data.prepare([f"a={tmp_path / 'in.jsonl'}"], bpe, out)
    assert str(lock) in str(error.value) and lock.read_bytes() == before


@pytest.mark.parametrize("name, content", [("two", "of the same size"), ("two", None),
                                           ("new", "")], ids=["changed", "gone", "new"])
def test_a_changed_source_is_named(bpe, tmp_path, name, content):
    for known in ("one", "two"):
        write_jsonl(tmp_path / "in" / f"{known}.jsonl", range(20))
    data.prepare([f"a={tmp_path / 'in'}"], bpe, tmp_path / "out")
    before, path = contents(tmp_path / "out"), tmp_path / "in" / f"{name}.jsonl"
    if content is None:
        path.unlink()
    else:
        path.write_text(content and path.read_text().replace("the", "mat"))
    with pytest.raises(ValueError, match=f"in/{name}.jsonl has changed since .*out"):
        data.prepare([f"a={tmp_path / 'in'}"], bpe, tmp_path / "out")
    assert contents(tmp_path / "out") == before, "the refused preparation changed the folder"


def test_another_preparation_is_not_written_over(bpe, tmp_path):
    path = write_jsonl(tmp_path / "in.jsonl", range(20))
    data.prepare([f"a={path}"], bpe, tmp_path / "out")
    before = contents(tmp_path / "out")
    other = data.train_bpe(["other words, other merges"] * 2, 262)
    for arguments in ((other,), (bpe, 0.5)):
        tokenizer, *rest = arguments
        with pytest.raises(ValueError, match="has changed since .* choose another one"):
            data.prepare([f"a={path}"], tokenizer, tmp_path / "out", *rest)
    assert contents(tmp_path / "out") == before, "the refused preparation changed the folder"


BAD = ['{"text": "cut', "[1, 2]", "7", '{"body": "x"}', '{"text": 5}', '{"text": "\\ud800"}',
       '{"text": null}', "\x00", "[" * 100_000, '"text"', '{"text": "\xff"}']


def test_bad_rows_are_counted_reported_and_skipped(bpe, tmp_path, capfd):
    path = tmp_path / "in.jsonl"
    lines = [json.dumps({"text": story(0)})] + BAD + [json.dumps({"text": story(1)})]
    path.write_bytes("\n".join(lines).encode("latin-1"))
    data.prepare([f"a={path}"], bpe, tmp_path / "out", val_fraction=0)
    assert documents(tmp_path / "out", "train") == [story(0), story(1)]
    reported = capfd.readouterr().err
    assert all(f"{path}, line {2 + i}: " in reported for i in range(len(BAD)))
    path.write_text("\n".join(["{"] * (data.MAX_BAD + 1)))
    with pytest.raises(ValueError, match=rf"{path}, line {data.MAX_BAD + 1}: .*no more than"):
        data.prepare([f"a={path}"], bpe, tmp_path / "out2")


def test_an_error_stops_the_work_that_was_not_begun(bpe, tmp_path, small_parts):
    path = write_jsonl(tmp_path / "in.jsonl", range(3000))
    path.write_text("{\n" * (data.MAX_BAD + 1) + path.read_text())
    with pytest.raises(ValueError, match="no more than"):
        data.prepare([f"a={path}"], bpe, tmp_path / "out")
    assert path.stat().st_size > 300 * 1024 and len(finished_parts(tmp_path / "out")) < 100


def test_a_text_that_is_not_utf8_is_a_bad_record(bpe, tmp_path, capfd):
    (tmp_path / "a.txt").write_bytes(b"good\n")
    (tmp_path / "b.txt").write_bytes(b"a\ncaf\xe9\n")
    data.prepare([f"a={tmp_path}"], bpe, tmp_path / "out", val_fraction=0)
    assert documents(tmp_path / "out", "train") == ["good\n"]
    assert f"{tmp_path / 'b.txt'}, line 2: not UTF-8 (byte 0xe9)" in capfd.readouterr().err


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


def test_a_full_disk_is_one_sentence_and_keeps_what_was_finished(bpe, tmp_path, small_parts):
    path = write_jsonl(tmp_path / "in.jsonl", range(300))
    data.prepare([f"a={path}"], bpe, tmp_path / "whole")
    real, written = os.fsync, itertools.count()

    def fsync(file: int) -> None:
        if next(written) > 12:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(file)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", fsync)       # each worker has a counter of its own
        with pytest.raises(ValueError, match="could not write .*free some space and run the same"):
            data.prepare([f"a={path}"], bpe, tmp_path / "out")
    kept = finished_parts(tmp_path / "out")
    assert len(kept) > 1, "nothing was kept"
    assert not list((tmp_path / "out").rglob("*.tmp")), "a temporary file fills the disk"
    data.prepare([f"a={path}"], bpe, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_real_limit_on_file_size_is_one_sentence(bpe, tmp_path):
    write_jsonl(tmp_path / "in.jsonl", range(500))
    bpe.save(tmp_path / "bpe")
    result = subprocess.run(
        [sys.executable, ROOT / "data.py", "prepare", "--source", f"a={tmp_path / 'in.jsonl'}",
         "--tokenizer", tmp_path / "bpe", "--out", tmp_path / "out"],
        capture_output=True, text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)))
    assert result.returncode == 2 and result.stderr.count("\n") == 1, result.stderr
    assert "could not write" in result.stderr


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
    return [corpus.tokens[name][i:i + size].astype(np.int64).tobytes() for name in names
            for i in range(0, len(corpus.tokens[name]) - size + 1, size)]


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
    steps = [9, 0, 123456, 9, 3]
    assert np.array_equal([one.batch(s) for s in steps], [two.batch(s) for s in steps])
    assert not np.array_equal(one.batch(0), data.Loader(data.Corpus(folder), 8, 6, 6).batch(0)), (
        "the seed has no effect")


def test_the_worked_example_of_an_epoch_is_what_the_loader_does():
    corpus = SimpleNamespace(sources=["a", "b"], blocks=lambda name, block: np.arange(
        {"a": 4, "b": 3}[name] * (block + 1)).reshape(-1, block + 1))
    loader = data.Loader(corpus, 1, 4, seed=0)
    for step in range(3):
        ranks = ["blocks " + " ".join(map(str, loader.numbers(step, rank, 2))) for rank in (0, 1)]
        assert f"step {step}   " + "   ".join(ranks) in data.Loader.__doc__
    assert sorted(n for step in range(7) for n in loader.numbers(step)) == sorted([*range(7)] * 4)


def test_orders_look_random():
    n = 4000
    corpus = SimpleNamespace(sources=["a"], blocks=lambda name, block: np.zeros((n, 2)))
    loader = data.Loader(corpus, 1, n, 0)
    x = np.arange(n)
    for epoch in range(5):
        y = np.array(loader.numbers(epoch))
        assert abs(np.corrcoef(x, y)[0, 1]) < 0.08, "the order follows the data"
        assert abs(np.corrcoef(y[1:], y[:-1])[0, 1]) < 0.08, "neighbours stay neighbours"
        assert (y[1:] - y[:-1] == 1).sum() < 12


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
    with pytest.raises(ValueError, match="choose a shorter block"):
        data.Loader(data.Corpus(folder), 100_000, 4, 0)


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
    import evaluate
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
        path, _, scored = data.BENCHMARKS[name]
        assert rows == [{"path": path, "split": scored, "text": "a\u2028b\n\u00e9"} | problem], name
        assert (scored == "test") == task.split.startswith("test"), f"{name}: the wrong split"
    assert evaluate.read_problems(tmp_path) == [("x", "x", "x", "x")]
    assert set(data.BENCHMARKS) == {*evaluate.TASKS, "humaneval"}
    assert ("cais/mmlu", "all", "test") in asked
    assert ("EleutherAI/logiqa", "logiqa", "test") in asked and len(asked) == len(data.BENCHMARKS)


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
    (["train-tokenizer", "--source", "a=x.txt", "--source", "a=x.txt", "--out", "o"],
     "name of its own"),
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
