"""From text to batches of tokens: tokenizer, corpus, data set folder, loader.

The pipeline, in the order of this file:

    documents --train_bpe--> Tokenizer --prepare--> folder of token shards --Loader--> (B, T + 1)

1.  A `Tokenizer` is a tiktoken `Encoding` with the bytes that each id stands for. `train_bpe` makes
    one from text by byte-pair encoding; `load_tokenizer` reads a file.
2.  A *source* is a named stream of documents: files and folders of your own, or the Python that runs
    this script, whose docstrings ("general") and sources ("code") are a corpus without a download.
3.  `prepare` writes each document's tokens and one end-of-text token into shards, on all cores.
    A hash of the document decides whether it trains or validates.
4.  `Loader.batch(step, rank, world)` is a pure function. Nothing is stored about the position in
    the data, so resuming is asking for the next step, and any number of ranks sees the same rows.

Letters: B rows of a batch, T tokens of a row, V entries of the vocabulary, N blocks of an epoch.

    python data.py train-tokenizer --source general --source code --vocab-size 4096 --out out/bpe
    python data.py prepare --source code --source mine=~/texts --tokenizer out/bpe --out out/data

References: Sennrich et al. 2016 (byte-pair encoding, arXiv:1508.07909); Radford et al. 2019 (on
bytes: GPT-2); Luby and Rackoff 1988 (a Feistel network of random functions is a permutation).
"""

import argparse
import ast
import base64
import errno
import functools
import gzip
import hashlib
import heapq
import importlib
import io
import itertools
import json
import multiprocessing
import os
import re
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import regex  # tiktoken depends on it: the same syntax of patterns, \p{L} included
import tiktoken

# ---------------------------------------------------------------------------------------------
# Files that are whole or not there
# ---------------------------------------------------------------------------------------------


@contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open a file for writing that takes its name only when it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"no room to write {path} ({error.strerror}); what was finished before "
                          "is kept: free some space and run the same command again") from error
        raise


# ---------------------------------------------------------------------------------------------
# Tokenizer
# ---------------------------------------------------------------------------------------------

END = "<|endoftext|>"

# Pre-tokens: merges never cross their borders. GPT-4's idea (a word takes the one character before
# it along, digits go in threes), with two changes. A punctuation mark takes the line's end and the
# indentation behind it along, so that "):\n        " can be one token: 7% fewer tokens on Python.
# And there is no look-ahead, so that matching is linear in the length of any text.
PATTERN = "|".join((
    r"[^\r\n\p{L}\p{N}]?\p{L}+",                            # " word", "_name", "'t"
    r"\p{N}{1,3}",                                          # "1", "984"
    r" ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)*",                  # " +=", "):\n    "
    r"\s+",                                                 # blank lines, indentation
))


class Tokenizer:
    """A byte-level BPE vocabulary in tiktoken.

    encoding: the tiktoken.Encoding; n_vocab: V; eos_id, bos_id: ids of the special tokens (bos_id
    is None if there is none); pieces: the bytes that each id stands for (special tokens: none).
    """

    bos_id: int | None = None

    def __init__(self, tokens: list[bytes]):
        """tokens: all but END, in the order of their ranks, the 256 single bytes first."""
        self.pieces = tokens + [b""]
        self.n_vocab = len(self.pieces)
        self.eos_id = self.n_vocab - 1
        # Built by hand: tiktoken.get_encoding would ask the network for its own vocabularies.
        self.encoding = tiktoken.Encoding(
            "bpe", pat_str=PATTERN, mergeable_ranks={t: i for i, t in enumerate(tokens)},
            special_tokens={END: self.eos_id})

    def encode(self, text: str) -> list[int]:
        """Special tokens that stand in the text are text; nothing is added before or after."""
        return self.encoding.encode_ordinary(text)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        return b"".join([self.pieces[token] for token in tokens])

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (V,): bits per token -> bits per byte."""
        return np.array([len(piece) for piece in self.pieces])

    @functools.cached_property
    def sha256(self) -> str:
        """The vocabulary's identity: equal hashes encode every text to equal ids."""
        lines = [PATTERN.encode(), *map(base64.b64encode, self.pieces)]
        return hashlib.sha256(b"\n".join(lines)).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The files, by name, that bring this tokenizer back."""
        lines = [base64.b64encode(t) + b" %d\n" % i for i, t in enumerate(self.pieces[:-1])]
        return {"tokenizer.tiktoken": b"".join(lines)}

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, each one whole or not at all."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        for name, content in self.files().items():
            with atomic(Path(folder) / name) as file:
                file.write(content)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer's file, or the one in a folder."""
    path = Path(path)
    if path.is_dir():
        names = ("tokenizer.tiktoken",)
        found = [path / name for name in names if (path / name).exists()]
        if not found:
            raise ValueError(f"{path} holds no tokenizer; expected {' or '.join(names)} in it")
        path = found[0]
    elif not path.exists():
        raise ValueError(f"there is no tokenizer {path}; make one: python data.py train-tokenizer")
    tokens = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            tokens.append(base64.b64decode(token, validate=True))
            if int(rank) != number - 1:
                raise ValueError("ranks are not 0, 1, 2, ...")
        except ValueError as error:
            raise ValueError(f"{path}, line {number} is not BASE64 RANK ({error})") from None
    if tokens[:256] != [bytes([b]) for b in range(256)] or len(set(tokens)) < len(tokens):
        raise ValueError(f"{path} does not list the 256 bytes first and every token once")
    return Tokenizer(tokens)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding: join the most frequent pair of neighbours, over and over.

    vocab_size counts the 256 bytes, the merges and END. Of pairs that are equally frequent, the
    one with the lexicographically greater byte strings is joined first. Every pre-token is kept
    once with its frequency, and a merge recounts only the words that hold the pair: 4096 entries
    from 11 MB take seconds, where the naive loop takes hours.
    """
    if vocab_size < 257:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold the 256 bytes and {END}")
    frequency = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [list(word.encode()) for word in frequency]     # each word as token ids
    times = list(frequency.values())
    tokens = [bytes([b]) for b in range(256)]

    counts: Counter = Counter()                             # pair -> how often
    where = defaultdict(set)                                # pair -> words that hold(held) it
    for i, word in enumerate(words):
        for pair in zip(word, word[1:]):
            counts[pair] += times[i]
            where[pair].add(i)

    # heapq pops the least entry. So counts are negated, and a byte string becomes characters that
    # sort the other way: 255 - byte, then an end mark above all of them (a prefix sorts last).
    flip = bytes(range(255, -1, -1))

    def entry(pair: tuple[int, int]) -> tuple:
        left, right = (tokens[t].translate(flip).decode("latin-1") + "\u0100" for t in pair)
        return -counts[pair], left, right, pair

    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    while len(tokens) < vocab_size - 1:
        if not heap:
            raise ValueError(f"the text yields a vocabulary of {len(tokens) + 1} entries, not the "
                             f"{vocab_size} asked for: add text or ask for fewer")
        count, _, _, pair = heapq.heappop(heap)
        if count != -counts[pair] or count == 0:
            continue                                        # an entry that a merge made stale
        new = len(tokens)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        change: Counter = Counter()
        for i in where.pop(pair):
            old, word, j = words[i], [], 0
            while j < len(old):
                joins = (old[j], *old[j + 1:j + 2]) == pair
                word.append(new if joins else old[j])
                j += 2 if joins else 1
            words[i] = word
            for gone in zip(old, old[1:]):
                change[gone] -= times[i]
            for come in zip(word, word[1:]):
                change[come] += times[i]
                where[come].add(i)
        for other, difference in change.items():
            if difference:
                counts[other] += difference
                heapq.heappush(heap, entry(other))
    return Tokenizer(tokens)


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------

SUFFIXES = (".txt", ".py", ".jsonl")
PIECE = 1 << 28                     # bytes of input files that are one piece of work
NOT_CODE = {                        # folders of the standard library's folder that are left out:
    "site-packages", "dist-packages",                       # not the standard library
    "test", "tests", "idle_test",                           # tests and their broken examples
    "encodings", "pydoc_data",                              # tables, and the topics: see below
}


class Record(NamedTuple):
    """One document, before anything costly has been done to it."""

    file: str                       # where it is from, for messages
    line: int
    row: dict | bytes               # fields, or a line of JSON still to be parsed
    read: int = 0                   # bytes of the file that it took, for the progress line
    key: str | None = None          # what decides its split; None: its text


def library_files() -> Iterator[tuple[str, str]]:
    """Yield (name, source) of the running Python's standard library; nothing is imported."""
    library = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(library.rglob("*.py"), key=lambda path: path.as_posix()):
        name = path.relative_to(library)
        if not NOT_CODE.intersection(name.parts) and not name.name.startswith("_sysconfigdata"):
            yield name.as_posix(), path.read_text("utf-8", errors="replace")


def code() -> Iterator[Record]:
    """The built-in corpus of code: the standard library's sources, about 10 MB."""
    for name, source in library_files():
        yield Record(name, 1, {"text": source}, key=name)


def general() -> Iterator[Record]:
    """The built-in corpus of English, about 2 MB: a module's docstrings make one document.

    Its key is the module's name, as in `code`: a module that validates does so in both, and no
    held-out source has its docstrings in the training text.
    """
    with_docstring = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for name, source in library_files():
        nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, with_docstring)]
        docstrings = [text for node in nodes if (text := ast.get_docstring(node))]
        yield Record(name, 1, {"text": "\n\n".join(docstrings)}, key=name)
    topics = Path(sysconfig.get_paths()["stdlib"], "pydoc_data", "topics.py")
    if topics.exists():             # what help("assert") shows: a dict {topic: text} in a source
        assignment = ast.parse(topics.read_bytes()).body[0]
        for topic, text in ast.literal_eval(assignment.value).items():
            yield Record(f"topic {topic}", 1, {"text": text}, key=f"topic {topic}")


BUILT_IN: dict[str, Callable[[], Iterator[Record]]] = {"general": general, "code": code}


class Source(NamedTuple):
    name: str
    place: str                      # a path, or "" for a built-in source

    @classmethod
    def parse(cls, text: str) -> "Source":
        """Read NAME=PATH, or the NAME of a built-in source."""
        name, _, place = text.partition("=")
        if not re.fullmatch(r"\w[\w.-]*", name) or not (place or name in BUILT_IN):
            raise ValueError(f"source {text!r} is neither NAME=PATH nor {' or '.join(BUILT_IN)}")
        return cls(name, place)

    def inputs(self) -> list[tuple[str, int]]:
        """The files of the source with their sizes, in an order that depends on nothing else."""
        if not self.place:
            return [(f"Python {sys.version}", 0)]
        root = Path(self.place).expanduser()
        if not root.exists():
            raise ValueError(f"source {self.name}: there is no {root}")
        paths = root.rglob("*") if root.is_dir() else [root]
        found = sorted(p.as_posix() for p in paths if p.name.endswith(SUFFIXES) and p.is_file())
        if not found:
            raise ValueError(f"source {self.name}: {root} is no file, and holds no file, of the "
                             f"kinds {', '.join(SUFFIXES)}")
        return [(path, os.path.getsize(path)) for path in found]

    def pieces(self) -> Iterator[list[tuple[str, int]]]:
        """The inputs in groups of up to PIECE bytes; a larger file is a group of its own."""
        group: list[tuple[str, int]] = []
        for file, size in self.inputs():
            if group and sum(size for _, size in group) + size > PIECE:
                yield group
                group = []
            group.append((file, size))
        yield group

    def records(self, file: str) -> Iterator[Record]:
        """The documents of one of the inputs."""
        return read_file(file) if self.place else BUILT_IN[self.name]()


def read_file(path: str) -> Iterator[Record]:
    """The documents of a file, in bounded memory.

    A line of .jsonl is one. A .txt or .py file is cut, at the next line's end, into documents of
    32 KiB or 1 MiB: a single book must be able to both train and validate, but a source file is
    better kept whole.
    """
    with open(path, "rb") as raw:
        if path.endswith((".txt", ".py")):
            size = 1 << (15 if path.endswith(".txt") else 20)
            # An invalid byte becomes a lone surrogate, which makes a bad record of this document.
            text, line = io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline=""), 1
            while part := text.read(size):
                part += text.readline(size)
                yield Record(path, line, {"text": part}, read=len(part))
                line += part.count("\n")
        else:                       # a longer line than 64 MiB is cut, and so two bad records
            for line, content in enumerate(iter(lambda: raw.readline(1 << 26), b""), 1):
                yield Record(path, line, content, read=len(content))


def text_of(record: Record) -> str:
    """The record's text; ValueError says why there is none."""
    row = json.loads(record.row) if isinstance(record.row, bytes) else record.row
    if not isinstance(row, dict):
        raise ValueError("not an object")
    text = next((row[name] for name in ("text", "content") if name in row), None)
    if not isinstance(text, str):
        raise ValueError("no text in a field 'text' or 'content'")
    text.encode()                   # a lone surrogate is no text either: UnicodeEncodeError
    return text


def texts(sources: Iterable[str]) -> Iterator[str]:
    """All texts of the sources, for train_bpe."""
    for source in map(Source.parse, sources):
        for file, _ in source.inputs():
            for record in source.records(file):
                try:
                    yield text_of(record)
                except ValueError as error:
                    raise ValueError(f"{record.file}, line {record.line}: {error}") from None


# ---------------------------------------------------------------------------------------------
# prepare: sources -> a folder of shards
# ---------------------------------------------------------------------------------------------

SPLITS = ("train", "val")
BATCH = 1 << 20                     # characters or bytes of text that a worker gets at a time
SHARD = 256                         # batches of a shard: what a killed run can lose


class Batch(NamedTuple):
    """Work for one process: some records, and the shard that they belong to."""

    source: str
    shard: str                      # SOURCE-PIECE-NUMBER, the stem of its files' names
    records: list[Record]
    position: int                   # bytes of all input read up to here, for the progress line


class Encoded(NamedTuple):
    """What became of a batch."""

    batch: Batch                    # without its records
    tokens: dict[str, np.ndarray]   # by split
    counts: dict[str, Counter]      # by split: documents, tokens, bytes (UTF-8, without END)
    bad: list[str]                  # a message for each record without text


def is_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: its hash decides, so no run and no order changes it."""
    digest = hashlib.sha256(key.encode()).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64


def cut(records: Iterable[Record]) -> Iterator[list[Record]]:
    """Group records to about BATCH bytes; the last group is shorter, maybe empty."""
    group, size = [], 0
    for record in records:
        group.append(record)
        size += len(record.row if isinstance(record.row, bytes) else record.row["text"])
        if size >= BATCH:
            yield group
            group, size = [], 0
    yield group


def plan(sources: list[Source], out: Path) -> Iterator[Batch]:
    """Cut the sources into batches, leaving out those of shards that are there already.

    Files are grouped to pieces of work, and a piece is cut into shards of SHARD batches, the last
    one shorter. All of it is a function of the input alone, so a run that was killed continues by
    skipping what exists; a piece that ends in a short shard is not even read again.
    """
    position = 0
    for source in sources:
        for number, files in enumerate(source.pieces()):
            stem = f"{source.name}-{number:05d}"
            done, batches = 0, SHARD
            while batches == SHARD and (note := out / f"{stem}-{done:05d}.json").exists():
                done, batches = done + 1, json.loads(note.read_bytes())["batches"]
            if batches < SHARD:
                position += sum(size for _, size in files)
                continue
            records = itertools.chain.from_iterable(source.records(file) for file, _ in files)
            for i, group in enumerate(cut(records)):
                position += sum(record.read for record in group)
                if i >= done * SHARD:
                    yield Batch(source.name, f"{stem}-{i // SHARD:05d}", group, position)


@functools.lru_cache
def _worker_tokenizer(folder: str) -> Tokenizer:
    return load_tokenizer(folder)   # once a process


def encode_batch(folder: str, fraction: float, dtype: str, batch: Batch) -> Encoded:
    """Tokenize a batch; this is what the worker processes do."""
    tokenizer = _worker_tokenizer(folder)
    tokens: dict[str, list[int]] = {split: [] for split in SPLITS}
    counts = {split: Counter(documents=0, tokens=0, bytes=0) for split in SPLITS}
    bad = []
    for record in batch.records:
        try:
            text = text_of(record)
        except (ValueError, RecursionError) as error:
            bad.append(f"{record.file}, line {record.line}: {error}")
            continue
        if text:
            split = SPLITS[is_validation(record.key or text, fraction)]
            ids = tokenizer.encode(text)
            tokens[split] += ids + [tokenizer.eos_id]
            counts[split].update(documents=1, tokens=len(ids) + 1, bytes=len(text.encode()))
    arrays = {split: np.array(ids, dtype) for split, ids in tokens.items()}
    return Encoded(batch._replace(records=[]), arrays, counts, bad)


def start_worker() -> None:
    """Let the parent alone answer Ctrl-C, and end with it, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(pool: ProcessPoolExecutor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """Map in parallel, results in order, with at most `ahead` items in memory."""
    pending: deque = deque()
    for item in items:
        pending.append(pool.submit(work, item))
        if len(pending) == ahead:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def watch(results: Iterable[Encoded], total: int, bad: int, max_bad: int) -> Iterator[Encoded]:
    """Pass results on; report and count bad records, and keep a line of progress on stderr."""
    start = shown = time.monotonic()
    first, bytes_, tokens, end = None, 0, 0, "\r" if sys.stderr.isatty() else "\n"
    for result in results:
        for message in result.bad:
            bad += 1
            if bad > max_bad:
                raise ValueError(f"{message}; with it, more than {max_bad} records are bad")
            print(f"skipped {message}", file=sys.stderr)
        yield result
        position, now = result.batch.position, time.monotonic()
        first = position if first is None else first
        bytes_ += sum(counts["bytes"] for counts in result.counts.values())
        tokens += sum(counts["tokens"] for counts in result.counts.values())
        if now - shown > (0.5 if end == "\r" else 10):
            shown, seconds = now, now - start
            left = (total - position) / max(position - first, 1) * seconds
            print(f"{result.batch.shard}: {bytes_ / 1e6:.0f} MB, "
                  f"{bytes_ / seconds / 1e6:.1f} MB/s, {tokens / seconds / 1e3:.0f}k tokens/s, "
                  + (f"{left / 60:.1f} min left" if total else "end unknown"),
                  end=f"   {end}", file=sys.stderr)


def write_shard(out: Path, shard: str, results: Iterable[Encoded], note: dict) -> None:
    """Write SHARD.train.bin and SHARD.val.bin, then SHARD.json, which makes them count."""
    note = note | {"shard": shard, "batches": 0, "bad": 0}
    note |= {split: dict(documents=0, tokens=0, bytes=0) for split in SPLITS}
    with atomic(out / f"{shard}.train.bin") as train, atomic(out / f"{shard}.val.bin") as val:
        for result in results:
            note["batches"] += 1
            note["bad"] += len(result.bad)
            for split, file in zip(SPLITS, (train, val)):
                file.write(result.tokens[split].tobytes())
                for unit, count in result.counts[split].items():
                    note[split][unit] += count
    with atomic(out / f"{shard}.json") as file:
        file.write(json.dumps(note).encode())


def prepare(sources: Iterable[str], tokenizer: Tokenizer, out: str | Path,
            val_fraction: float = 0.05, max_bad: int = 100) -> None:
    """Tokenize sources into the folder `out`; the same call continues what was interrupted.

    sources: as on the command line, NAME=PATH or the name of a built-in source.
    val_fraction: the share of the documents that is held out. max_bad: how many records without
    text are skipped, with a message each, before the next one is an error.

    The folder holds the tokenizer's files, the shards, and manifest.json, which is written last.
    """
    out, parsed = Path(out), [Source.parse(source) for source in sources]
    if not parsed or len({source.name for source in parsed}) < len(parsed):
        raise ValueError("expected one or more sources, each with a name of its own")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the validation share must be in [0, 1), got {val_fraction}")
    sizes = [(source.name, [(Path(file).name, size) for file, size in source.inputs()])
             for source in parsed]
    # Everything that the shards depend on. What is there with other facts is not touched.
    facts = json.dumps([tokenizer.sha256, val_fraction, BATCH, SHARD, PIECE, sizes])
    fingerprint = hashlib.sha256(facts.encode()).hexdigest()

    def notes() -> list[dict]:
        found = [json.loads(path.read_bytes()) for path in sorted(out.glob("*-*-*.json"))]
        if any(note["fingerprint"] != fingerprint for note in found):
            raise ValueError(f"{out} was prepared from other sources, or with another tokenizer, "
                             "share or Python: delete it or choose another folder")
        return found

    bad = sum(note["bad"] for note in notes())
    if (out / "manifest.json").exists():
        return
    tokenizer.save(out)
    dtype = "uint16" if tokenizer.n_vocab <= 1 << 16 else "uint32"
    work = functools.partial(encode_batch, str(out), val_fraction, dtype)
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(workers, initializer=start_worker) as pool:
        results = in_order(pool, work, plan(parsed, out), ahead=3 * workers)
        total = sum(size for _, files in sizes for _, size in files)
        results = watch(results, total, bad, max_bad)
        for shard, group in itertools.groupby(results, lambda result: result.batch.shard):
            write_shard(out, shard, group, {"fingerprint": fingerprint})

    manifest: dict[str, Any] = {"tokenizer": tokenizer.sha256, "n_vocab": tokenizer.n_vocab,
                                "dtype": dtype, "fingerprint": fingerprint, "sources": {}}
    for source in parsed:
        shards = [note for note in notes() if note["shard"].rsplit("-", 2)[0] == source.name]
        entry: dict[str, Any] = {"place": source.place, "bad": sum(n["bad"] for n in shards)}
        for split in SPLITS:
            entry[split] = {unit: sum(note[split][unit] for note in shards)
                            for unit in ("documents", "tokens", "bytes")}
            entry[split]["shards"] = [[n["shard"], n[split]["tokens"]] for n in shards]
        if not entry["train"]["tokens"]:
            raise ValueError(f"source {source.name} holds no text to train on")
        manifest["sources"][source.name] = entry
    with atomic(out / "manifest.json") as file:
        file.write(json.dumps(manifest, indent=1).encode())


# ---------------------------------------------------------------------------------------------
# Corpus and loader
# ---------------------------------------------------------------------------------------------


class Stream:
    """The tokens of memory-mapped shards as one array: len(stream), stream[start:stop]."""

    def __init__(self, shards: list[np.ndarray]):
        self.shards = shards
        self.ends = np.cumsum([len(shard) for shard in shards])

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, span: slice) -> np.ndarray:
        start, stop, _ = span.indices(len(self))
        first = int(np.searchsorted(self.ends, start, side="right"))
        last = int(np.searchsorted(self.ends, stop, side="left"))
        parts = []
        for shard, end in zip(self.shards[first:last + 1], self.ends[first:last + 1]):
            begin = end - len(shard)
            parts.append(shard[max(start - begin, 0):max(stop - begin, 0)])
        return parts[0] if len(parts) == 1 else np.concatenate(parts or [self.shards[0][:0]])


class Corpus:
    """One split of a prepared folder: a stream of tokens for each source.

    sources: the names to take, by default all. mix: {name: weight} instead, see Loader.
    """

    def __init__(self, folder: str | Path, split: str = "train",
                 sources: Iterable[str] | None = None, mix: dict[str, float] | None = None):
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            raise ValueError(f"{folder} holds no finished data set (no manifest.json): make or "
                             "finish it with python data.py prepare")
        manifest = json.loads((folder / "manifest.json").read_bytes())
        self.tokenizer = load_tokenizer(folder)
        if self.tokenizer.sha256 != manifest["tokenizer"]:
            raise ValueError(f"{folder} was prepared with another tokenizer than the one that lies "
                             "in it now: put the old one back or prepare the data again")
        self.folder, self.split, self.mix = folder, split, mix
        self.sources = list(mix or sources or manifest["sources"])
        if unknown := [name for name in self.sources if name not in manifest["sources"]]:
            raise ValueError(f"{folder} has no source {', '.join(unknown)}; it has "
                             f"{', '.join(manifest['sources'])}")
        self._streams = {}
        for name in self.sources:
            shards = []
            for shard, tokens in manifest["sources"][name][split]["shards"]:
                path, dtype = folder / f"{shard}.{split}.bin", np.dtype(manifest["dtype"])
                if not path.exists() or path.stat().st_size != tokens * dtype.itemsize:
                    raise ValueError(f"{path} is missing or does not hold the {tokens} tokens that "
                                     "the manifest says: delete the folder and prepare it again")
                if tokens:              # an empty file cannot be mapped
                    shards.append(np.memmap(path, dtype, mode="r"))
            self._streams[name] = Stream(shards or [np.empty(0, manifest["dtype"])])

    def tokens(self, source: str) -> Stream:
        return self._streams[source]


def scramble(x: np.ndarray) -> np.ndarray:
    """A hash of 64-bit integers (the end of splitmix64): each bit depends on all of them."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def permute(index: np.ndarray, n: int, seed: int, epoch: np.ndarray) -> np.ndarray:
    """Where random permutations of range(n), one for each seed and epoch, send `index`.

    A Feistel network halves the bits and, round by round, XORs a hash of one half onto the other:
    a step that can be undone, whatever the hash, so the whole is a permutation, of range(4**h).
    What lands at n or above is sent on until it lands below (its cycle began there, so it ends).
    Computed for the rows asked for, it needs no table of what may be billions of blocks.
    """
    half = np.uint64(max(1, ((n - 1).bit_length() + 1) // 2))
    mask = np.uint64((1 << int(half)) - 1)
    key = scramble(scramble(np.full(1, seed, np.uint64)) + epoch.astype(np.uint64))
    x, todo = index.astype(np.uint64), np.ones(len(index), bool)
    while todo.any():
        left, right = x[todo] >> half, x[todo] & mask
        for round_ in range(6):
            noise = scramble(scramble(key[todo] + np.uint64(round_)) + right)
            left, right = right, left ^ (noise & mask)
        x[todo] = left << half | right
        todo &= x >= n
    return x.astype(np.int64)


class Loader:
    """Batches as a pure function of (step, rank, world).

    Row i of step s is row g = s * batch + i of an endless sequence, which runs through all blocks
    of block + 1 tokens (inputs, and the same shifted by one) of all sources in a random order,
    then through another order, and so on; an epoch may end in the middle of a batch. So every
    block comes once an epoch, sources are mixed by their sizes, and no rank count changes a step.

    With corpus.mix, each source is a sequence of its own, and a timetable says whose turn g is.
    """

    def __init__(self, corpus: Corpus, block: int, batch: int, seed: int):
        self.corpus, self.block, self.rows, self.seed = corpus, block, batch, seed
        self.streams = [corpus.tokens(name) for name in corpus.sources]
        blocks = [len(stream) // (block + 1) for stream in self.streams]
        self.first = np.cumsum([0, *blocks])                # of each stream; last: of all
        if not self.first[-1]:
            raise ValueError(f"the {corpus.split} split of {corpus.folder} has "
                             f"{sum(map(len, self.streams))} tokens, less than one block of "
                             f"{block + 1}: add text, or choose a shorter block")

    @property
    def blocks_per_epoch(self) -> int:
        return int(self.first[-1])

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows of `rank` in a step, int64, (B / world, T + 1)."""
        if self.rows % world:
            raise ValueError(f"a batch of {self.rows} rows cannot be split between {world} ranks")
        share = self.rows // world
        rows = step * self.rows + rank * share + np.arange(share)
        epoch, index = np.divmod(rows, self.blocks_per_epoch)
        blocks = permute(index, self.blocks_per_epoch, self.seed, epoch)
        result = np.empty((share, self.block + 1), np.int64)
        for row, block in enumerate(blocks):
            source = int(np.searchsorted(self.first, block, side="right")) - 1
            start = int(block - self.first[source]) * (self.block + 1)
            result[row] = self.streams[source][start:start + self.block + 1]
        return result


# ---------------------------------------------------------------------------------------------
# Command line
# ---------------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train a tokenizer; prepare data sets.")
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train-tokenizer", help="learn a byte-level BPE vocabulary")
    train.add_argument("--vocab-size", type=int, default=4096)
    tokenize = commands.add_parser("prepare", help="tokenize sources into a data set folder")
    tokenize.add_argument("--tokenizer", required=True, help="a tokenizer's file or folder")
    tokenize.add_argument("--val-fraction", type=float, default=0.05, help="held out documents")
    tokenize.add_argument("--max-bad", type=int, default=100, help="bad records to skip")
    for command in (train, tokenize):
        command.add_argument("--source", action="append", required=True, metavar="NAME[=PATH]",
                             help=f"a file or folder ({', '.join(SUFFIXES)}), or a built-in "
                                  f"source: {', '.join(BUILT_IN)}; can be repeated")
        command.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        if args.command == "train-tokenizer":
            train_bpe(texts(args.source), args.vocab_size).save(args.out)
        else:
            prepare(args.source, load_tokenizer(args.tokenizer), args.out, args.val_fraction,
                    args.max_bad)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {error}\n")


if __name__ == "__main__":
    main()
