"""From text to batches of tokens: tokenizer, corpus, data set folder, loader.

The pipeline, in the order of this file:

    texts --train_bpe--> Tokenizer --prepare--> folder of tokens --Loader--> (B, T + 1)

1.  `train_bpe` learns a `Tokenizer` by byte-pair encoding. It runs in tiktoken.
2.  A *source* is a named stream of documents: files of your own, a Hub data set, or the Python that
    runs this script: its docstrings ("general") and sources ("code") need no download.
3.  `prepare` appends each document's tokens and one end-of-text token to a file, on all cores. A
    hash of the document decides whether it trains or validates.
4.  `Loader.batch(step, rank, world)` is a pure function: resuming is asking for the next step.
5.  Beside the pipeline: `load_tokenizer` reads what was saved and Llama-2's SentencePiece model,
    which runs in tiktoken too; `fetch` gets the rows of evaluate.py's benchmarks.

Letters: B rows of a batch, T tokens of a row, V entries of the vocabulary.

    python data.py train-tokenizer --source general --source code --vocab-size 4096 --out out/bpe
    python data.py prepare --source code --source mine=~/texts --tokenizer out/bpe --out out/data

References: Sennrich et al. 2016 (byte-pair encoding, arXiv:1508.07909); Radford et al. 2019 (GPT-2:
over bytes); Kudo and Richardson 2018 (SentencePiece, arXiv:1808.06226); Luby and Rackoff 1988 (a
Feistel network is a permutation); Liu and Layland 1973 (earliest deadline first).
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
import math
import multiprocessing
import os
import re
import signal
import socket
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import regex  # tiktoken depends on it: the same syntax of patterns, \p{L} included
import tiktoken


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say which file a full disk (or a limit on sizes) stopped, and what to do."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise OSError(f"no room to write {path} ({error.strerror}): free some space and run "
                          "the same command again; what was finished before is kept") from None
        raise


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file that takes its name only when it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with room_for(path), open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


# ---------------------------------------------------------------------------------- tokenizer

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

    encoding: the tiktoken.Encoding; n_vocab: V; eos_id and bos_id: special tokens (bos_id is None
    if there is none); pieces: the bytes that each id stands for, none for special tokens.
    """

    def __init__(self, ranks: list[bytes], pattern: str = PATTERN):
        """ranks: all byte strings that merging makes, in its order; the 256 single bytes first."""
        self.ranks = {token: rank for rank, token in enumerate(ranks)}
        self.pieces = [*ranks, b""]                         # the last is END
        self.eos_id, self.bos_id = len(ranks), None
        # Built by hand: tiktoken.get_encoding would ask the network for its own vocabularies.
        self.encoding = tiktoken.Encoding("bpe", pat_str=pattern, mergeable_ranks=self.ranks,
                                          special_tokens={END: len(ranks)})

    @property
    def n_vocab(self) -> int:
        return len(self.pieces)

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id, in which tokens are stored."""
        return "uint16" if self.n_vocab <= 1 << 16 else "uint32"

    def encode(self, text: str) -> list[int]:
        """Special tokens that stand in the text are text; nothing is added before or after."""
        return self.encoding.encode_ordinary(text)

    def prompt(self, text: str) -> list[int]:
        """Encode the start of a text that a model is to go on with: BOS first, if there is one."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    @property
    def add_bos(self) -> bool:
        return self.bos_id is not None

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """What the tokens add to a text; nothing for ids with which a model's table was padded."""
        return b"".join([self.pieces[token] for token in tokens if token < len(self.pieces)])

    def decode(self, tokens: Iterable[int]) -> str:
        """A whole text; bytes that are not UTF-8 (half a character, say) become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (V,): bits per token -> bits per byte."""
        return np.array([len(piece) for piece in self.pieces])

    @functools.cached_property
    def sha256(self) -> str:
        """The vocabulary's identity: with equal hashes, every text has equal ids."""
        facts = [self.encoding._pat_str, *map(bytes.hex, [*self.ranks, b"", *self.pieces])]
        return hashlib.sha256("\n".join(facts).encode()).hexdigest()

    def files(self) -> dict[str, bytes]:
        """The files, by name, that bring this tokenizer back: here and, the .json, elsewhere."""
        lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in self.ranks.items()]
        return {"tokenizer.tiktoken": b"".join(lines)} | byte_level_json(self)

    def save(self, folder: str | Path) -> None:
        """Write the tokenizer's files into a folder, each one whole or not at all."""
        for name, content in self.files().items():
            write_atomically(Path(folder) / name, content)


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Byte-pair encoding: join the most frequent pair of neighbours, over and over.

    vocab_size counts the 256 bytes, the merges and END. Of equally frequent pairs, the one with the
    lexicographically greater byte strings is joined. A merge recounts only the pre-tokens that hold
    the pair: 4096 entries from 12 MB of text take seconds, where the naive loop would take hours.
    """
    if vocab_size < 257:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold the 256 bytes and {END}")
    frequency = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    words = [list(word.encode()) for word in frequency]     # each pre-token once, as token ids
    times = list(frequency.values())
    tokens = [bytes([b]) for b in range(256)]

    counts = defaultdict(int)                               # pair -> how often
    where = defaultdict(set)                                # pair -> words that hold (or held) it

    def count(i: int, sign: int) -> None:
        for pair in zip(words[i], words[i][1:]):
            counts[pair] += sign * times[i]
            where[pair].add(i)

    # A heap pops its least entry: counts and bytes are negated, and a mark above all bytes makes a
    # prefix come last.
    def entry(pair: tuple[int, int]) -> tuple:
        left, right = ([*(-byte for byte in tokens[t]), 1] for t in pair)
        return -counts[pair], left, right, pair

    for i in range(len(words)):
        count(i, 1)
    heap = [entry(pair) for pair in counts]
    heapq.heapify(heap)
    while len(tokens) < vocab_size - 1:
        if not heap or heap[0][0] == 0:
            raise ValueError(f"the text yields a vocabulary of {len(tokens) + 1} entries, not the "
                             f"{vocab_size} asked for: add text or ask for fewer")
        times_seen, _, _, pair = heap[0]
        if times_seen != -counts[pair]:                     # merges only make older pairs rarer
            heapq.heapreplace(heap, entry(pair))
            continue
        new, changed = len(tokens), where.pop(pair)
        tokens.append(tokens[pair[0]] + tokens[pair[1]])
        for i in changed:
            count(i, -1)
            old, words[i] = words[i], []
            for token in old:
                if words[i] and (words[i][-1], token) == pair:
                    words[i][-1] = new
                else:
                    words[i].append(token)
            count(i, 1)
        for fresh in {p for i in changed for p in zip(words[i], words[i][1:]) if new in p}:
            heapq.heappush(heap, entry(fresh))
    return Tokenizer(tokens)


# --------------------------------------------------------------------------------- documents

PLAIN, ROWS = (".txt", ".py"), (".jsonl", ".jsonl.gz", ".jsonl.zst", ".parquet")
NOT_CODE = {"site-packages", "dist-packages",               # folders left out: other people's,
            "test", "tests", "idle_test",                   # tests, with broken examples,
            "encodings", "pydoc_data"}                      # tables; the topics are read below
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

# Sources that need no path. AMD's corpora come from the Hub: the folder that AMD took, without the
# rows that AMD left out. With NAME=hub:FOLDER they come from a copy of the whole data set, with
# NAME=PATH from files alone.
READY = {"general": f"python:{sys.version}", "code": f"python:{sys.version}",
         "slimpajama": "hub:cerebras/SlimPajama-627B", "gutenberg": "hub:manu/project_gutenberg",
         "starcoder-python": "hub:bigcode/starcoderdata"}
FOLDER = {"starcoder-python": "python"}
LEFT_OUT = {"slimpajama": lambda row: row["meta"]["redpajama_set_name"] == "RedPajamaBook"}


class Record(NamedTuple):
    """One document, before anything costly has been done to it."""

    file: str                       # where it is from, for messages
    line: int
    row: dict[str, Any] | bytes     # fields, or a line of JSON still to be parsed
    key: str = ""                   # what decides its split, if not its text
    read: int = 0                   # bytes of the file that are read by now


def code() -> Iterator[Record]:
    """The built-in corpus of code: the running Python's standard library, about 10 MB."""
    for path in sorted(LIBRARY.rglob("*.py"), key=Path.as_posix):
        name = path.relative_to(LIBRARY)
        if not NOT_CODE.intersection(name.parts) and not name.name.startswith("_sysconfigdata"):
            source = path.read_text("utf-8", errors="replace")
            yield Record(name.as_posix(), 1, {"text": source}, key=name.as_posix())


def general() -> Iterator[Record]:
    """The built-in corpus of English, about 2 MB: a module's docstrings make one document.

    Its key is the module's name, as in `code`: a module that is held out is so in both, so that no
    held-out source has its docstrings in the training text. Nothing is imported.
    """
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for module in code():
        tree = ast.walk(ast.parse(module.row["text"]))
        docstrings = [ast.get_docstring(node) for node in tree if isinstance(node, documented)]
        yield module._replace(row={"text": "\n\n".join(filter(None, docstrings))})
    topics = LIBRARY / "pydoc_data" / "topics.py"
    if topics.exists():             # what help("assert") shows: one dict, {topic: text}
        for topic, text in ast.literal_eval(ast.parse(topics.read_bytes()).body[0].value).items():
            yield Record(f"topic {topic}", 1, {"text": text}, key=f"topic {topic}")


def optional(module: str) -> Any:
    """Import what only some sources need."""
    try:
        return importlib.import_module(module)
    except ImportError:
        raise ValueError(f"it needs {module.partition('.')[0]}: pip install -e '.[hub]'") from None


def find(source: str) -> tuple[str, dict[str, int]]:
    """The name and the files, with their sizes, of NAME=PATH, NAME=hub:DATASET or a ready NAME."""
    name, _, place = source.partition("=")
    place = place or READY.get(name, "")
    if not re.fullmatch(r"\w[\w.-]*", name) or not place:
        raise ValueError(f"source {source!r} is neither NAME=PATH nor one of {', '.join(READY)}")
    if place.startswith(("hub:", "python:")):
        return name, {place: 0}
    root = Path(place).expanduser()
    paths = root.rglob("*") if root.is_dir() else [root]
    # Sorted, so that the order of the documents depends on nothing but the names.
    found = sorted(p.as_posix() for p in paths if p.name.endswith(PLAIN + ROWS) and p.is_file())
    if not found:
        raise ValueError(f"source {name}: {root} neither is nor holds a file of the kinds "
                         f"{', '.join(PLAIN + ROWS)}")
    return name, {path: os.path.getsize(path) for path in found}


def read(source: str, file: str) -> Iterator[Record]:
    """The documents of one of a source's files, one after another, in bounded memory."""
    try:
        if file.startswith("python:"):
            yield from {"general": general, "code": code}[source]()
        elif file.startswith("hub:"):
            splits = optional("datasets").load_dataset(
                file.removeprefix("hub:"), data_dir=FOLDER.get(source), streaming=True)
            # Other splits are for other purposes; without a train split, all are languages, say.
            chosen = ["train"] if "train" in splits else sorted(splits)
            rows = itertools.chain.from_iterable(splits[split] for split in chosen)
            yield from (Record(file, line, row) for line, row in enumerate(rows, 1))
        else:
            with open(file, "rb") as raw:
                for line, row in file_rows(file, raw):
                    yield Record(file, line, row, read=raw.tell())
    except Exception as error:      # each library has its own for a damaged file
        raise ValueError(f"source {source}: cannot read {file}: {error}") from error


def file_rows(name: str, raw: BinaryIO) -> Iterator[tuple[int, dict | bytes]]:
    """The (line, row) of a file. A .txt or .py file is cut, at the next line's end, into documents
    of 32 KiB or 1 MiB: a single book must be able to give both splits, a source is better whole."""
    if name.endswith(PLAIN):
        size, line = 1 << (20 if name.endswith(".py") else 15), 1
        # An invalid byte becomes a lone surrogate, which makes this document a bad record.
        text = io.TextIOWrapper(raw, "utf-8", "surrogateescape", newline="")
        while part := text.read(size):
            part += text.readline(size)
            yield line, {"text": part}
            line += part.count("\n")
    elif name.endswith(".parquet"):
        file = optional("pyarrow.parquet").ParquetFile(raw, buffer_size=1 << 20)
        rows = (row for batch in file.iter_batches(256) for row in batch.to_pylist())
        yield from enumerate(rows, 1)
    else:
        stream: Any = raw
        if name.endswith(".gz"):
            stream = gzip.open(raw)
        elif name.endswith(".zst"):
            decompressor = optional("zstandard").ZstdDecompressor()
            stream = io.BufferedReader(decompressor.stream_reader(raw, read_across_frames=True))
        # A line of more than 16 MiB is cut, and so makes bad records instead of filling the memory.
        for line, content in enumerate(iter(lambda: stream.readline(1 << 24), b""), 1):
            if not content.isspace():
                yield line, content


def text_of(record: Record, source: str, field: str | None) -> str:
    """The record's text, "" if its source leaves it out; ValueError says why there is none."""
    fields = [field] if field else ["text", "content"]
    try:
        row = json.loads(record.row) if isinstance(record.row, bytes) else record.row
        if source in LEFT_OUT and LEFT_OUT[source](row):
            return ""
        text = next(row[name] for name in fields if name in row)
        text.encode()               # a lone surrogate is no text: UnicodeEncodeError
        return text
    except KeyError as error:
        reason = f"no field {error}, which says what {source} leaves out"
    except (TypeError, AttributeError, StopIteration):
        reason = f"no text in {' or '.join(fields)}"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ValueError(f"{record.file}, line {record.line}: {reason}")


def texts(sources: Iterable[str], field: str | None = None) -> Iterator[str]:
    """All texts of the sources, for train_bpe."""
    return (text_of(record, source, field) for source, files in map(find, sources)
            for file in files for record in read(source, file))


# --------------------------------------------------------------------------------- prepare

SPLITS = ("train", "val")
BATCH = 1 << 20                     # bytes of records that a worker gets at a time
PAUSE = 10                          # seconds between progress lines; a killed run loses as much


class Batch(NamedTuple):
    """Work for one process."""

    source: str
    records: list[Record]
    end: list[int]                  # what follows begins in this file, behind so many records
    read: int                       # bytes of all sources that are read by now


def is_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: its hash decides, so no run and no order changes it."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def batches(found: dict[str, dict[str, int]], state: dict) -> Iterator[Batch]:
    """Group what `state` has not noted yet to about BATCH bytes, one source after another."""
    before = 0
    for source, files in found.items():
        begin, records, size = state["sources"][source]["end"], [], 0
        for i, (file, length) in enumerate(files.items()):
            for done, record in enumerate(read(source, file) if i >= begin[0] else (), 1):
                if [i, done] <= begin:
                    continue
                records.append(record)
                size += len(record.row if isinstance(record.row, bytes) else str(record.row))
                if size >= BATCH:
                    yield Batch(source, records, [i, done], before + record.read)
                    records, size = [], 0
            before += length
        yield Batch(source, records, [len(files), 0], before)


@functools.lru_cache(1)             # a worker reads it once; sending it along would take longer
def worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def encode_batch(folder: Path, field: str | None, val_fraction: float,
                 batch: Batch) -> tuple[dict[str, tuple[bytes, Counter]], list[str]]:
    """What the worker processes do: for each split the batch's tokens, as they are stored, and how
    many documents, tokens and UTF-8 bytes (without END); a message for each record without text."""
    tokenizer, bad = worker_tokenizer(folder), []
    ids, counts = {split: [] for split in SPLITS}, {split: Counter() for split in SPLITS}
    for record in batch.records:
        try:
            text = text_of(record, batch.source, field)
        except ValueError as error:
            bad.append(str(error))
            continue
        if text:
            split = "val" if is_validation(record.key or text, val_fraction) else "train"
            tokens = [*tokenizer.encode(text), tokenizer.eos_id]
            ids[split] += tokens
            counts[split].update(documents=1, tokens=len(tokens), bytes=len(text.encode()))
    return {split: (np.array(ids[split], tokenizer.dtype).tobytes(), counts[split])
            for split in SPLITS}, bad


def start_worker() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def in_order(pool: ProcessPoolExecutor, work: Callable, items: Iterable, ahead: int) -> Iterator:
    """Each item with its result, made in parallel, with at most `ahead` of them in memory."""
    pending: deque = deque()
    for item in items:
        pending.append((item, pool.submit(work, item)))
        if len(pending) == ahead:
            item, result = pending.popleft()
            yield item, result.result()
    yield from ((item, result.result()) for item, result in pending)


def tokenize(found: dict[str, dict[str, int]], state: dict, out: Path, work: Callable,
             max_bad: int) -> None:
    """Append to each SOURCE.SPLIT.bin what `state` says is missing, and keep the state on disk."""
    workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    total, first = sum(sum(files.values()) for files in found.values()), None
    start = shown = time.monotonic()
    done: Counter = Counter()                               # tokens and bytes, by this run
    with room_for(out), ExitStack() as stack:
        bins = {(source, split): stack.enter_context(open(out / f"{source}.{split}.bin", "ab"))
                for source in found for split in SPLITS}
        for (source, split), file in bins.items():          # cut what came after the last note
            size = state["sources"][source][split]["tokens"] * np.dtype(state["dtype"]).itemsize
            if file.tell() < size:
                raise ValueError(f"{file.name} has lost tokens that progress.json counts: delete "
                                 f"{out} and prepare it again")
            file.truncate(size)
        pool = stack.enter_context(ProcessPoolExecutor(workers, initializer=start_worker))
        for batch, (parts, bad) in in_order(pool, work, batches(found, state), 3 * workers):
            entry = state["sources"][batch.source]
            for message in bad:
                entry["bad"] += 1
                if sum(other["bad"] for other in state["sources"].values()) > max_bad:
                    raise ValueError(f"{message}; that makes more than {max_bad} bad records")
                print(f"skipped {message}", file=sys.stderr)
            for split, (tokens, counts) in parts.items():
                bins[batch.source, split].write(tokens)
                done.update(counts)
                for unit, n in counts.items():
                    entry[split][unit] += n
            entry["end"], now = batch.end, time.monotonic()
            first = batch.read if first is None else first
            due = now - shown >= PAUSE
            if not due and batch.end[0] < len(found[batch.source]):
                continue
            for split in SPLITS:                            # the tokens, then the note of them
                bins[batch.source, split].flush()
                os.fsync(bins[batch.source, split])
            write_atomically(out / "progress.json", json.dumps(state, indent=1).encode())
            if due:
                took, shown = now - start, now
                left = (total - batch.read) * took / max(batch.read - first, 1) / 60
                print(f"{batch.source}: {done['bytes'] / took / 1e6:.1f} MB/s, "
                      f"{done['tokens'] / took / 1e3:.0f}k tokens/s, "
                      f"{f'{left:.1f} min' if total else '?'} left", file=sys.stderr)


def prepare(sources: Iterable[str], tokenizer: Tokenizer, out: str | Path,
            val_fraction: float = 0.05, field: str | None = None, max_bad: int = 100) -> None:
    """Tokenize sources into the folder `out`; the same call continues what was interrupted.

    sources: as on the command line, NAME=PATH or NAME. val_fraction: the share of documents that
    is held out. field: where a row has its text, if not in "text" or "content". max_bad: how many
    records without text are skipped, each with a message, before one is an error.

    The folder gets the tokenizer's files, SOURCE.SPLIT.bin and, last, manifest.json. Until then,
    progress.json says how much of each .bin is valid and which record comes next; what lies behind
    that is cut off, so the bytes are the same wherever a run was killed.
    """
    import fcntl                    # here, so that without POSIX the rest of this file works
    sources = list(sources)
    out, found = Path(out).expanduser(), dict(map(find, sources))
    if not found or len(found) < len(sources):
        raise ValueError("expected one or more sources, each with a name of its own")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the validation share must be at least 0 and below 1, not {val_fraction}")
    # What the tokens depend on. A folder that was made of anything else is not touched.
    sizes = [(source, [(Path(file).name, size) for file, size in files.items()])
             for source, files in found.items()]
    facts = json.dumps([tokenizer.sha256, val_fraction, field, sizes])
    state = {"fingerprint": hashlib.sha256(facts.encode()).hexdigest(),
             "tokenizer": tokenizer.sha256, "dtype": tokenizer.dtype,
             "sources": {source: {"end": [0, 0], "bad": 0} | {
                 split: {"documents": 0, "tokens": 0, "bytes": 0} for split in SPLITS}
                 for source in found}}
    out.mkdir(parents=True, exist_ok=True)
    with open(out / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)    # a second run waits for the first, and finds it done
        for note in (out / "manifest.json", out / "progress.json"):
            if note.exists():
                old = json.loads(note.read_bytes())
                if old.get("fingerprint") != state["fingerprint"]:
                    raise ValueError(f"{out} was prepared from other sources or with other "
                                     "options: delete it or choose another folder")
                if note.name == "manifest.json":
                    return
                state = old
        for left in out.glob("*.tmp"):                      # by a run that was killed
            left.unlink()
        tokenizer.save(out)
        work = functools.partial(encode_batch, out, field, val_fraction)
        tokenize(found, state, out, work, max_bad)
        if empty := [s for s, entry in state["sources"].items() if not entry["train"]["tokens"]]:
            raise ValueError(f"source {empty[0]} has no text to train on")
        os.replace(out / "progress.json", out / "manifest.json")


# ------------------------------------------------------------------------ corpus and loader

class Corpus:
    """One split of a prepared folder: a memory-mapped array of tokens for each source.

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
            raise ValueError(f"{folder} has no source {', '.join(unknown)}, but "
                             f"{', '.join(manifest['sources'])}")
        self._tokens = {}
        for name in self.sources:
            path, dtype = folder / f"{name}.{split}.bin", np.dtype(manifest["dtype"])
            n = manifest["sources"][name][split]["tokens"]
            if not path.exists() or path.stat().st_size != n * dtype.itemsize:
                raise ValueError(f"{path} is missing or does not hold the {n} tokens that the "
                                 "manifest says: delete the folder and prepare it again")
            # An empty file cannot be mapped.
            self._tokens[name] = np.memmap(path, dtype, mode="r") if n else np.empty(0, dtype)

    def tokens(self, source: str) -> np.ndarray:
        return self._tokens[source]

    def blocks(self, source: str, block: int) -> np.ndarray:
        """A source cut into blocks of block + 1 tokens (inputs, and the same shifted by one), which
        are the rows of batches: (N, T + 1). What is left over at its end is in none."""
        tokens = self._tokens[source]
        return tokens[:len(tokens) // (block + 1) * (block + 1)].reshape(-1, block + 1)


def scramble(x: int) -> int:
    """A hash of 64-bit integers (the end of splitmix64): each bit depends on all of them."""
    x %= 1 << 64
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % (1 << 64)
    x = (x ^ x >> 27) * 0x94D049BB133111EB % (1 << 64)
    return x ^ x >> 31


def permute(index: int, n: int, seed: int, epoch: int) -> int:
    """Where the random permutation of range(n) for this seed and epoch sends `index`.

    A Feistel network halves the bits and, round by round, XORs a hash of one half onto the other:
    a step that can be undone, whatever the hash, so the whole is a permutation, of range(4**h).
    What lands at n or above is sent on until it lands below (its cycle began there, so it ends).
    Computed when asked for, it needs no table of what may be billions of blocks.
    """
    half = max(1, ((n - 1).bit_length() + 1) // 2)
    key = scramble(scramble(seed) + epoch)
    while True:
        left, right = divmod(index, 1 << half)
        for round_ in range(6):
            noise = scramble(scramble(key + round_) + right) % (1 << half)
            left, right = right, left ^ noise
        index = left << half | right
        if index < n:
            return index


def timetable(weights: list[float]) -> list[tuple[int, int]]:
    """For each turn of a period, whose it is, and how many that source has had: [(source, had)].

    Over any number of turns, in any number of periods, each source has had its weight's share,
    turns[s] / period, to within less than one turn. Its turn number n + 1 comes at n * period /
    turns[s] at the earliest and, at the latest, one such interval later. Serving the earliest
    deadline first keeps all deadlines, as the shares add up to one (Liu and Layland).
    """
    fractions = [Fraction(str(weight)) for weight in weights]
    if not fractions or min(fractions) <= 0:
        raise ValueError(f"mixing weights must be positive, got {weights}")
    scale = math.lcm(*(fraction.denominator for fraction in fractions))
    turns = [int(fraction * scale) for fraction in fractions]
    period = sum(turns)
    if period > 100_000:
        raise ValueError(f"mixing weights {weights} have too many digits: use two or three")
    had, table = [0] * len(turns), []
    for now in range(period):
        ready = [s for s, n in enumerate(had) if n * period // turns[s] <= now]
        turn = min(ready, key=lambda s: -(-(had[s] + 1) * period // turns[s]))
        table.append((turn, had[turn]))
        had[turn] += 1
    return table


class Loader:
    """Batches as a pure function of (step, rank, world).

    Row i of a step is number g = step * batch + i of an endless sequence. It runs through the
    blocks of all sources in a random order, then in another one, and so on; an epoch may end inside
    a batch. So every block comes once an epoch, sources mix by their sizes, and the number of ranks
    does not change a step.

    With corpus.mix, each source is such a sequence, and a timetable says whose turn it is.
    """

    def __init__(self, corpus: Corpus, block: int, batch: int, seed: int):
        self.block, self.rows, self.seed = block, batch, seed
        mix = corpus.mix or {"data": 1}
        groups = [[name] for name in mix] if corpus.mix else [corpus.sources]
        self.sequences = [[corpus.blocks(name, block) for name in group] for group in groups]
        self.lengths = [sum(map(len, sequence)) for sequence in self.sequences]
        self.blocks_per_epoch = sum(self.lengths)
        for name, length in zip(mix, self.lengths):
            if not length:
                raise ValueError(f"{corpus.folder} has too little {name} in its {corpus.split} "
                                 f"split for one block of {block + 1} tokens: add text, or choose "
                                 "a shorter block")
        self.table = timetable(list(mix.values()))
        self.turns = Counter(sequence for sequence, _ in self.table)

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows of `rank` in a step, int64, (B / world, T + 1)."""
        if self.rows % world:
            raise ValueError(f"a batch of {self.rows} rows cannot be split between {world} ranks")
        share = self.rows // world
        result = np.empty((share, self.block + 1), np.int64)
        for i in range(share):
            period, now = divmod(step * self.rows + rank * share + i, len(self.table))
            s, had = self.table[now]
            epoch, index = divmod(period * self.turns[s] + had, self.lengths[s])
            index = permute(index, self.lengths[s], self.seed, epoch)
            for blocks in self.sequences[s]:
                if index < len(blocks):
                    break
                index -= len(blocks)
            result[i] = blocks[index]
        return result


# --------------------------------------------------------- tokenizers in files, and Llama-2's

def read_tiktoken(content: bytes) -> Tokenizer:
    """Read a .tiktoken file: lines of a token in base64 and its rank."""
    lines = [line.split() for line in content.splitlines()]
    tokens = [base64.b64decode(token, validate=True) for token, _ in lines]
    if [int(rank) for _, rank in lines] != list(range(len(lines))):
        raise ValueError("its ranks are not 0, 1, 2, ...")
    if tokens[:256] != [bytes([b]) for b in range(256)] or len(set(tokens)) < len(tokens):
        raise ValueError("it does not list the 256 bytes first and every token once")
    return Tokenizer(tokens)


def byte_level_json(tokenizer: Tokenizer) -> dict[str, bytes]:
    """Our tokenizer's files for transformers."""
    # JSON has no bytes. GPT-2 writes them as Latin-1, and from U+0100 on those without a glyph.
    glyphs = dict(zip([*range(33), *range(127, 161), 173], itertools.count(256)))
    names = {token.decode("latin-1").translate(glyphs): rank
             for token, rank in tokenizer.ranks.items()}
    split = {"type": "Split", "pattern": {"Regex": PATTERN}, "behavior": "Isolated",
             "invert": False}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
                  "use_regex": False}
    pre_tokenizer = {"type": "Sequence", "pretokenizers": [split, byte_level]}
    return hugging_face_files(names | {END: tokenizer.eos_id}, names, {END: True},
                              {"pre_tokenizer": pre_tokenizer, "decoder": byte_level},
                              eos_token=END)


def hugging_face_files(vocab: dict[str, int], ranks: Iterable[str], added: dict[str, bool],
                       parts: dict[str, Any], **roles: str) -> dict[str, bytes]:
    """tokenizer.json and its config, for transformers' AutoTokenizer.

    ranks: the tokens that merging makes, in its order; added: the others -> are they special?

    It wants the pairs that were merged, in order. They are found again by merging each token's own
    characters with the ranks below its own: the last two parts are the pair.
    """
    ranks, merges = {name: rank for rank, name in enumerate(ranks)}, []
    for name, rank in ranks.items():
        pair = list(name)
        while len(pair) > 2:
            i = min(range(len(pair) - 1), key=lambda i: ranks.get(pair[i] + pair[i + 1], rank))
            pair[i:i + 2] = [pair[i] + pair[i + 1]]
        if len(pair) == 2:
            merges.append(pair)
    model = {"type": "BPE", "byte_fallback": "<0x00>" in vocab, "vocab": vocab, "merges": merges}
    flags = dict.fromkeys(("normalized", "single_word", "lstrip", "rstrip"), False)
    tokens = [{"id": vocab[text], "content": text, "special": special, **flags}
              for text, special in added.items()]
    config = {"tokenizer_class": "PreTrainedTokenizerFast", **roles,
              "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps({"version": "1.0", "added_tokens": tokens, "model": model,
                                          **parts}, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config, indent=1).encode()}


SPACE = "\u2581"                                            # SentencePiece's visible space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)    # its types of pieces


class SentencePiece(Tokenizer):
    """Llama-2's kind of vocabulary, SentencePiece BPE with byte fallback, exactly, in tiktoken.

    SentencePiece merges characters, the best score first, and spells what it does not know in
    bytes; tiktoken merges bytes, the lowest rank first. They agree when the ranks are, in order:
    the 256 bytes; the first bytes of the vocabulary's multi-byte characters; those characters; the
    other pieces by score. Runs of SPACE share one score in Llama-2, and SentencePiece then merges
    leftmost first, which is what longest first gives. Last, ranks become ids.
    """

    def __init__(self, pieces: list[tuple[str, float, int]], bos: int | None, eos: int,
                 model: bytes | None = None):
        """pieces: (text, score, type) by id; model: the tokenizer.model file, to save it again."""
        self.vocabulary, self.model = pieces, model
        ids = {kind: {text: i for i, (text, _, k) in enumerate(pieces) if k == kind}
               for kind in (NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE)}
        normal, spelled = ids[NORMAL], {int(text[3:5], 16): i for text, i in ids[BYTE].items()}
        if len(spelled) < 256 or not 0 <= eos < len(pieces):
            raise ValueError("the vocabulary has no 256 byte pieces (byte fallback), or no EOS")
        if crossing := [text for text in normal if SPACE in text.lstrip(SPACE)]:
            raise ValueError(f"pieces with a space after another character, as {crossing[0]!r}, "
                             "are not supported")
        characters = sorted(text.encode() for text in normal if len(text) == 1)
        starts = sorted({c[:n] for c in characters for n in range(2, len(c))})
        ranks = [*(bytes([b]) for b in range(256)), *starts, *(c for c in characters if c[1:])]
        merged = sorted((text for text in normal if len(text) > 1),
                        key=lambda text: (-pieces[normal[text]][1], -len(text)))
        # No piece has SPACE after another character, so no merge crosses the border before it.
        pattern = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
        # tiktoken looks a whole pre-token up before it merges, and so finds even a piece that no
        # merges lead to. Such pieces (with a NUL behind them they fall apart) get no rank.
        trial = Tokenizer(ranks + [text.encode() for text in merged], pattern)
        self.merged = [text for i, text in enumerate(merged, len(ranks))
                       if trial.encode(text + "\0") == [i, 0]]
        super().__init__(ranks + [text.encode() for text in self.merged], pattern)

        self.bos_id, self.eos_id = bos, eos
        self.pieces = [b"" if kind in (UNKNOWN, CONTROL) else bytes([int(text[3:5], 16)])
                       if kind == BYTE else text.replace(SPACE, " ").encode()
                       for text, _, kind in pieces]
        of_piece = {text.encode(): (i,) for text, i in normal.items()}
        self.ids = [of_piece.get(token) or tuple(spelled[b] for b in token) for token in self.ranks]
        # User-defined pieces are cut out of the text before merging, the longest first.
        self.fixed = ids[USER_DEFINED]
        longest_first = sorted(self.fixed, key=len, reverse=True)
        self.cut = re.compile("(%s)" % "|".join(map(re.escape, longest_first)))
        self.added = {text: kind != USER_DEFINED
                      for kind in (UNKNOWN, CONTROL, USER_DEFINED) for text in ids[kind]}

    def encode(self, text: str) -> list[int]:
        if not text:
            return []
        text = SPACE + text.replace(" ", SPACE)
        ids: list[int] = []
        for part in self.cut.split(text) if self.fixed else [text]:
            if part in self.fixed:
                ids.append(self.fixed[part])
            else:
                ranks = self.encoding.encode_ordinary(part)
                ids += itertools.chain.from_iterable(map(self.ids.__getitem__, ranks))
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """A whole text, without the space that encode puts in front."""
        tokens = [token for token in tokens if self.decode_bytes([token])]
        text = super().decode(tokens)
        return text[1:] if tokens and self.vocabulary[tokens[0]][0].startswith(SPACE) else text

    def files(self) -> dict[str, bytes]:
        vocab = {text: i for i, (text, _, _) in enumerate(self.vocabulary)}
        decoders = [{"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
                    {"type": "ByteFallback"}, {"type": "Fuse"},
                    {"type": "Strip", "content": " ", "start": 1, "stop": 0}]
        normalizers = [{"type": "Prepend", "prepend": SPACE},
                       {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}]
        roles = {"bos_token": self.bos_id, "eos_token": self.eos_id}
        return ({"tokenizer.model": self.model} if self.model else {}) | hugging_face_files(
            vocab, self.merged, self.added,
            {"decoder": {"type": "Sequence", "decoders": decoders},
             "normalizer": {"type": "Sequence", "normalizers": normalizers}},
            **{role: self.vocabulary[i][0] for role, i in roles.items() if i is not None})


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message: an integer, or the bytes of anything else."""
    stream = io.BytesIO(message)

    def varint() -> int:                                    # 7 bits a byte, the lowest first
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        number, wire_type = divmod(varint(), 8)
        if wire_type == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire_type) or varint()
        if wire_type not in (1, 2, 5) or stream.tell() + size > len(message):
            raise ValueError("damaged protobuf")
        yield number, stream.read(size)


def read_sentencepiece(model: bytes) -> SentencePiece:
    """Read a tokenizer.model: sentencepiece_model.proto's ModelProto, as far as it matters here."""
    pieces, parts = [], {2: {}, 3: {}}
    for number, value in protobuf_fields(model):
        if number == 1:                                     # pieces: 1 text, 2 score, 3 type
            piece = dict(protobuf_fields(value))
            score = np.frombuffer(piece.get(2, bytes(4)), "<f4").item()
            pieces.append((piece[1].decode(), score, piece.get(3, NORMAL)))
        elif number in parts:
            parts[number] = dict(protobuf_fields(value))
    trainer, normalizer = parts.values()
    unsupported = {
        "a model other than BPE": trainer.get(3, 1) != 2,
        "no byte fallback": not trainer.get(35),
        "spaces as suffixes": trainer.get(24),
        "normalization rules": normalizer.get(2),
        "no space put in front": not normalizer.get(3, 1),
        "removal of extra spaces": normalizer.get(4, 1),
        "spaces that are not escaped": not normalizer.get(5, 1),
        "unused pieces": any(kind == UNUSED for _, _, kind in pieces),
    }
    if found := [name for name, present in unsupported.items() if present]:
        raise ValueError(f"not supported: {', '.join(found)}")
    bos, eos = trainer.get(41, 1), trainer.get(42, 2)
    return SentencePiece(pieces, bos if bos < len(pieces) else None, eos, model)


def read_tokenizer_json(content: bytes) -> SentencePiece:
    """Read a tokenizer.json of Llama-2's family, where merges have an order instead of scores."""
    tokenizer = json.loads(content)
    model = tokenizer["model"]
    before = json.dumps([tokenizer.get("normalizer"), tokenizer.get("pre_tokenizer")])
    if not model.get("byte_fallback") or not re.search('"(Prepend|first|always)"', before):
        raise ValueError("not of Llama-2's family: no byte fallback, or no space put in front")
    # In Llama-2 itself, runs of SPACE have the lowest score. transformers 5 forgets that when it
    # converts a tokenizer.model, and splits "a  b" otherwise than the models have learnt.
    llama2 = {2 * SPACE: 259, 16 * SPACE: 462}.items() <= model["vocab"].items()
    scores: dict[str, float] = {}
    for i, merge in enumerate(model["merges"]):             # "a b" in old files, ["a", "b"] in new
        text = "".join(merge.split(" ") if isinstance(merge, str) else merge)
        scores.setdefault(text, -math.inf if llama2 and not text.strip(SPACE) else -i)
    added = {token["content"]: token for token in tokenizer["added_tokens"]}
    vocab = model["vocab"] | {text: token["id"] for text, token in added.items()}
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise ValueError("its ids are not 0, 1, 2, ...")

    def kind(text: str) -> int:
        if text in added:
            return CONTROL if added[text]["special"] else USER_DEFINED
        if re.fullmatch("<0x[0-9A-F]{2}>", text):
            return BYTE
        return NORMAL if len(text) == 1 or text in scores else UNUSED

    pieces = [(text, scores.get(text, 0), kind(text)) for text in sorted(vocab, key=vocab.get)]
    return SentencePiece(pieces, vocab.get("<s>"), vocab["</s>"])


READERS = {"tokenizer.tiktoken": read_tiktoken, "tokenizer.model": read_sentencepiece,
           "tokenizer.json": read_tokenizer_json}           # the first that a folder has is taken


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer's file, or the one in a folder."""
    path = checkpoint_folder(path)
    if path.is_dir():
        path = next((path / name for name in READERS if (path / name).exists()), path)
    read = READERS.get(f"tokenizer{path.suffix}")
    if not path.is_file() or not read:
        raise ValueError(f"{path} is no tokenizer: expected {', '.join(READERS)}, or a folder with "
                         "one of them (python data.py train-tokenizer makes one)")
    try:
        return read(path.read_bytes())
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else repr(error)
        raise ValueError(f"{path} cannot be used as a tokenizer: {reason}") from None


# --------------------------------------------------------------------------------- benchmarks

# evaluate.py's tasks on the Hub: data set, configuration, the split that is scored, and the one
# that examples are drawn from.
BENCHMARKS = {
    "sciq": ("allenai/sciq", None, "test", "train"),
    "winogrande": ("allenai/winogrande", "winogrande_xl", "validation", "train"),
    "piqa": ("baber/piqa", None, "validation", "train"),
    "wsc": ("aps/super_glue", "wsc.fixed", "validation", "train"),
    "mmlu": ("cais/mmlu", "all", "test", "dev"),
    "lambada_openai": ("EleutherAI/lambada_openai", "default", "test"),
    "arc_easy": ("allenai/ai2_arc", "ARC-Easy", "test", "train"),
    "arc_challenge": ("allenai/ai2_arc", "ARC-Challenge", "test", "train"),
    "logiqa": ("EleutherAI/logiqa", "logiqa", "test", "train"),
    "hellaswag": ("Rowan/hellaswag", None, "validation", "train"),
    "humaneval": ("openai/openai_humaneval", None, "test"),
}


def fetch(task: str, out: str | Path) -> None:
    """Download a task's rows, or those of "all", into OUT/TASK/SPLIT.jsonl, as evaluate.py reads
    them; HumanEval's go where its authors have them, HumanEval.jsonl.gz."""
    if task not in [*BENCHMARKS, "all"]:
        raise ValueError(f"unknown task {task!r}: expected all or one of {', '.join(BENCHMARKS)}")
    for name in BENCHMARKS if task == "all" else [task]:
        path, config, *splits = BENCHMARKS[name]
        place = {"name": config}
        if name == "logiqa":        # a program, which datasets no longer runs: the Hub's conversion
            place = {"data_dir": config, "revision": "refs/convert/parquet"}
        for split in splits:
            file = "HumanEval.jsonl.gz" if name == "humaneval" else f"{split}.jsonl"
            try:                    # streamed: no split is downloaded that is not asked for
                rows = optional("datasets").load_dataset(path, split=split, streaming=True, **place)
                content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            except Exception as error:                      # each layer below has its own
                reason = " ".join(str(error).split())       # in one line
                raise ValueError(f"cannot fetch {name} from {path}: {reason}") from error
            write_atomically(Path(out).expanduser() / name / file,
                             gzip.compress(content) if file.endswith(".gz") else content)


# --------------------------------------------------------------------------- files of all scripts

def check_writable(path: str | Path) -> Path:
    """The path of a file that is to be written later: ValueError now rather than after hours."""
    path = Path(path)
    try:
        if not path.name or path.exists() and not path.is_file():
            raise ValueError("it is a folder or a device")
        trial = path.with_name(path.name + ".tmp")          # write_whole's temporary file
        trial.touch()
        trial.unlink()
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)!r} cannot be written ({reason}): expected the name of a "
                         "file, in a folder that exists") from None
    return path


def write_whole(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Write a file under a temporary name, sync it to the disk, then rename it.

    A crash at any moment leaves the old file or the new one, never a part of one.
    """
    path = Path(path)
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for chunk in chunks:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(f"could not write {path} ({error.strerror}): free some space or choose "
                         "another folder; what was there before is unchanged") from None


def checkpoint_folder(path: str | Path) -> Path:
    """The newest checkpoint of a run's folder: NAME -> NAME/step-000320.

    A folder that is a checkpoint itself (it has a config.json), or that has no steps, is returned
    as it is. A step that is still being written has another name, step-000320.partial.
    """
    path = Path(path).expanduser()
    steps = [step for step in path.glob("step-*") if step.name[5:].isdecimal() and step.is_dir()]
    if not steps or (path / "config.json").exists():
        return path
    return max(steps, key=lambda step: int(step.name[5:]))


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Within it this process alone writes in a folder: a file beside it, FOLDER.lock, names the
    owner. ValueError if that is another one; one that died on this machine owns nothing more."""
    lock, here = Path(f"{folder}.lock"), [socket.gethostname(), str(os.getpid())]
    lock.parent.mkdir(parents=True, exist_ok=True)
    for attempt in range(2):
        try:
            with open(lock, "x") as file:       # made here, or FileExistsError: on any file system
                file.write(" ".join(here))
            break
        except FileExistsError:
            host, pid = (lock.read_text().split() + ["?", "?"])[:2]
            if attempt or host != here[0] or pid.isdecimal() and pid != here[1] and alive(int(pid)):
                raise ValueError(f"{folder} is in use by process {pid} on {host}: wait for it, or "
                                 f"choose another name; if it is gone, remove {lock}") from None
            lock.unlink(missing_ok=True)
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:             # another user's
        pass
    return True


# --------------------------------------------------------------------------------- command line

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train-tokenizer", help="learn a byte-level BPE vocabulary")
    train.add_argument("--vocab-size", type=int, default=4096)
    tokenize = commands.add_parser("prepare", help="tokenize sources into a data set folder")
    tokenize.add_argument("--tokenizer", required=True, help="a tokenizer's file or folder")
    tokenize.add_argument("--val-fraction", type=float, default=0.05, help="documents held out")
    tokenize.add_argument("--max-bad", type=int, default=100, help="bad records to skip")
    for command in (train, tokenize):
        command.add_argument("--source", action="append", required=True, metavar="NAME[=PATH]",
                             help=f"NAME=file or folder ({', '.join(PLAIN + ROWS)}), or "
                                  f"NAME=hub:DATASET, or {', '.join(READY)}")
        command.add_argument("--field", help="where a row has its text, if not in text or content")
    rows = commands.add_parser("fetch", help="download the rows of evaluate.py's tasks")
    rows.add_argument("task", help=f"all, or one of {', '.join(BENCHMARKS)}")
    for command in (train, tokenize, rows):
        command.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        if args.command == "train-tokenizer":
            train_bpe(texts(args.source, args.field), args.vocab_size).save(args.out)
        elif args.command == "prepare":
            prepare(args.source, load_tokenizer(args.tokenizer), args.out, args.val_fraction,
                    args.field, args.max_bad)
        else:
            fetch(args.task, args.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ndata.py: interrupted; the same command continues\n")


if __name__ == "__main__":
    main()
