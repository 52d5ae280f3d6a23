"""From text to batches of tokens.

    text --Tokenizer--> tokens --prepare--> a folder of tokens --Loader--> batches of (B, T + 1)

1.  `train_bpe` learns a vocabulary by byte-pair encoding; a `Tokenizer` splits text with it.
2.  A *source* is a named set of files with documents. A hash of each document decides whether it is
    trained on or held out.
3.  `prepare` writes the tokens of all documents, one after another, into one file for each source
    and split, with an end-of-text token behind each document.
4.  `Loader` cuts these files into blocks of T + 1 tokens and deals them out in a random order.

    two documents           "the cat sat"    "a mat"
    their tokens, and 0     17 52 60 0       9 41 0          here, 0 is the end-of-text token
    blocks for T = 3        17 52 60 0       9 41 0 ...      a model reads 17 52 60: it should
                                                             predict 52 60 0

Letters: B rows of a batch, T tokens of a row, V entries of the vocabulary, N blocks.

    python data.py train-tokenizer --source general --source code --vocab-size 4096 --out out/bpe
    python data.py prepare --source code --source mine=~/texts --tokenizer out/bpe --out out/data

References: Sennrich et al. 2016 (byte-pair encoding, arXiv:1508.07909); Radford et al. 2019 (GPT-2:
over bytes); Kudo and Richardson 2018 (SentencePiece, arXiv:1808.06226).
"""

import argparse
import ast
import functools
import gzip
import hashlib
import heapq
import io
import itertools
import json
import multiprocessing
import os
import platform
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import regex  # tiktoken depends on it: the same syntax of patterns, \p{L} included
import tiktoken

# ------------------------------------------------------------------------------ tokenizer

END = "<|endoftext|>"
Files = dict[str, bytes]                                   # name -> content

# The pattern that cuts a text into words before anything is merged: no token reaches from one word
# into the next. As in GPT-4, a word takes the one character before it along (mostly a space) and
# digits go in threes. Unlike there, a punctuation mark takes the line's end and the indentation
# that follows, so that "):\n        " can be one token: 7% fewer tokens for Python.
PATTERN = "|".join((
    r"[^\r\n\p{L}\p{N}]?\p{L}+",                            # " word", "_name", "'t"
    r"\p{N}{1,3}",                                          # "1", "984"
    r" ?[^\s\p{L}\p{N}]+(?:\r?\n[ \t]*)*",                  # " +=", "):\n    "
    r"\s+",                                                 # blank lines, indentation
))


@dataclass(eq=False, repr=False)
class Tokenizer:
    """A vocabulary, and the splitting of texts into its entries (by tiktoken, which is fast).

    A text is cut into words by a pattern. Each word is split into its bytes; then the pair of
    neighbours that make the token of the lowest rank are merged, again and again.
    """

    pieces: list[bytes]             # the bytes that each id stands for, none for special tokens
    ranks: dict[bytes, int]         # what merging makes -> the order in which it does
    pattern: str
    files: Files                    # what it was read from, for saving it again
    eos_id: int                     # ends a text
    bos_id: int | None = None       # begins a text, if there is such a token
    add_bos: bool = False           # whether it stands in front of a prompt
    fixed = {}                      # text that is cut out before all else -> its id

    @functools.cached_property
    def encoding(self) -> tiktoken.Encoding:
        # Made by hand: tiktoken.get_encoding would ask the network for a vocabulary.
        return tiktoken.Encoding("bpe", pat_str=self.pattern, mergeable_ranks=self.ranks,
                                 special_tokens={})

    @property
    def n_vocab(self) -> int:
        return len(self.pieces)

    @property
    def dtype(self) -> str:
        """The smallest type that holds every id: tokens are stored in it."""
        return "uint16" if self.n_vocab <= 1 << 16 else "uint32"

    def encode(self, text: str) -> list[int]:
        """The ids of a text. A special token's name in it is text like any other."""
        return self.encoding.encode_ordinary(text)

    def prompt(self, text: str) -> list[int]:
        """The ids of a text that a model is to continue: BOS first, if the tokenizer's files say
        that it was trained so."""
        return [self.bos_id] * self.add_bos + self.encode(text)

    def decode_bytes(self, tokens: Iterable[int]) -> bytes:
        """The bytes of some tokens; none for ids with which a model's table was padded."""
        return b"".join([self.pieces[token] for token in tokens if token < len(self.pieces)])

    def decode(self, tokens: Iterable[int]) -> str:
        """A whole text. Bytes that are not UTF-8, such as half a character, become U+FFFD."""
        return self.decode_bytes(tokens).decode("utf-8", errors="replace")

    @functools.cached_property
    def byte_lengths(self) -> np.ndarray:
        """Bytes of text that each id stands for, (V,): bits per token -> bits per byte."""
        return np.array([len(piece) for piece in self.pieces])

    @functools.cached_property
    def sha256(self) -> str:
        """The vocabulary's identity: with equal hashes, every text has equal ids."""
        facts = [self.pattern, self.eos_id, self.pieces, sorted(self.ranks.items()), self.fixed]
        return hashlib.sha256(repr(facts).encode()).hexdigest()

    def save(self, folder: str | Path) -> None:
        """Write the files that the tokenizer came with, unchanged."""
        for name, content in self.files.items():
            write_whole(Path(folder) / name, [content])


def merge_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace a pair of neighbours by a new token, from left to right.

    >>> merge_pair([5, 7, 7, 7], (7, 7), 256)
    [5, 256, 7]
    """
    merged, i = [], 0
    while i < len(word):
        if (*word[i:i + 2],) == pair:
            merged.append(new)
            i += 2
        else:
            merged.append(word[i])
            i += 1
    return merged


def learn_merges(frequency: dict[str, int], count: int) -> list[tuple[bytes, bytes]]:
    """Byte-pair encoding: merge the most frequent pair of neighbours, `count` times.

    frequency: how often each word occurs. Sennrich's example, four words and three merges:

    >>> learn_merges({"low": 5, "lower": 2, "newest": 6, "widest": 3}, 3)
    [(b'e', b's'), (b'es', b't'), (b'l', b'o')]

    "e s" occurs 6 + 3 = 9 times, as does "s t"; of equals, the pair with the lower ids is merged.
    Then "newest" is n e w es t, and "es t" occurs 9 times; then "l o" occurs 5 + 2 = 7 times.
    Only the words that hold the merged pair are counted again: seconds instead of hours.
    """
    words = [list(word.encode()) for word in frequency]     # as ids; the first 256 are the bytes
    times, tokens, merges = [*frequency.values()], [bytes([b]) for b in range(256)], []
    counts, where = Counter(), defaultdict(set)             # pair -> how often, in which words

    def add(i: int, sign: int) -> None:
        for pair in zip(words[i], words[i][1:]):
            counts[pair] += sign * times[i]
            where[pair].add(i)

    for i in range(len(words)):
        add(i, 1)
    heap = [(-n, pair) for pair, n in counts.items()]       # the most frequent pair comes first
    heapq.heapify(heap)
    while heap and heap[0][0] < 0 and len(merges) < count:
        n, pair = heapq.heappop(heap)
        fresh = {pair}                                      # pairs that go on the heap
        if n == -counts[pair]:                              # if not, other merges made it rarer
            new, changed = len(tokens), where.pop(pair)
            merges.append((tokens[pair[0]], tokens[pair[1]]))
            tokens.append(b"".join(merges[-1]))
            for i in changed:
                add(i, -1)
                words[i] = merge_pair(words[i], pair, new)
                add(i, 1)
            fresh = {p for i in changed for p in zip(words[i], words[i][1:]) if new in p}
        for pair in fresh:
            heapq.heappush(heap, (-counts[pair], pair))
    return merges


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Learn a tokenizer: the 256 bytes, merges, and the end-of-text token.

    >>> tokenizer = train_bpe(["the cat sat on the mat"], 260)
    >>> tokenizer.pieces[256:]
    [b'at', b'he', b'the', b'']
    >>> tokenizer.encode("heat the")
    [257, 256, 32, 258]
    """
    if vocab_size < 257:
        raise ValueError(f"a vocabulary of {vocab_size} cannot hold the 256 bytes and {END}")
    frequency = Counter(word for text in texts for word in regex.findall(PATTERN, text))
    merges = learn_merges(frequency, vocab_size - 257)
    if len(merges) < vocab_size - 257:
        raise ValueError(f"the text yields a vocabulary of {257 + len(merges)} entries, not the "
                         f"{vocab_size} asked for: add text or ask for fewer")
    return read_tokenizer_json(write_tokenizer_json(merges))


# ------------------------------------------------------------------------------ documents

SPLITS = ("train", "val")
LIBRARY = Path(sysconfig.get_paths()["stdlib"])

# Sources that need no path: text that is there with any Python (docstrings, and source code), and
# AMD's three corpora on the Hugging Face Hub.
READY = {"general": str(LIBRARY), "code": str(LIBRARY),
         "slimpajama": "hub:cerebras/SlimPajama-627B", "gutenberg": "hub:manu/project_gutenberg",
         "starcoder-python": "hub:bigcode/starcoderdata"}
HUB_FOLDER = {"starcoder-python": "python"}                 # the part of a data set that AMD took
LEFT_OUT = {"slimpajama": lambda row: row["meta"]["redpajama_set_name"] == "RedPajamaBook"}


class Record(NamedTuple):
    """One document as it lies in its file."""

    line: int                       # in the span that it was read from, for messages
    row: dict | bytes     # fields, or UTF-8: a line of JSON, or the text itself
    key: str = ""                   # what decides its split, if not its text


class Span(NamedTuple):
    """Documents of a source: those that begin at one of these bytes of a file."""

    file: str
    start: int
    stop: int


Part = tuple[str, list[Span]]                               # of a source
Found = dict[str, dict[str, list[int]]]                     # source: {file: [size, last change]}


def is_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: its hash decides, so no run and no order changes it.

    >>> is_validation("abc", 0.72), is_validation("abc", 0.73)      # the hash of abc is at 0.728
    (False, True)
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def text_of(record: Record, source: str, span: Span, field: str | None) -> str:
    """The record's text, "" if its source leaves it out; ValueError says why there is none."""
    fields, row, line = [field] if field else ["text", "content"], record.row, record.line
    try:
        if isinstance(row, bytes):
            row = row.decode()
            row = {fields[0]: row} if span.file.endswith(PLAIN) else json.loads(row)
        if source in LEFT_OUT and LEFT_OUT[source](row):
            return ""
        text = next(row[name] for name in fields if name in row)
        text.encode()               # fails for half of a surrogate pair, which JSON can spell
        return text
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        reason = f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    except Exception as error:
        reason = f"no text in {' or '.join(fields)} ({error!r:.99})"
    raise ValueError(f"{span.file}, line {line + lines_before(span)}: {reason}")


def texts(sources: Iterable[str], field: str | None = None) -> Iterator[str]:
    """All texts of the sources, one after another, for train_bpe."""
    for name, spans in cut_parts(dict(find(source, Counter()) for source in sources)):
        for span in spans:
            for record in read(name, span, field):
                yield text_of(record, name, span, field)


# ------------------------------------------------------------------------------ preparing

def part_file(folder: Path, part: int, kind: str) -> Path:
    return folder / "parts" / f"{part:06}.{kind}"


@functools.lru_cache(1)             # each worker reads it once
def worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def encode_part(folder: Path, val_fraction: float, field: str | None, max_bad: int, part: int,
                source: str, spans: list[Span]) -> int:
    """Write the tokens of a part of a source and return their number: the work of one process.

    Messages about records without text are written last: a part that has them is complete.
    """
    tokenizer, size, bad = worker_tokenizer(folder), 0, []
    records = ((span, record) for span in spans for record in read(source, span, field))
    with (whole_file(part_file(folder, part, "train")) as train,
          whole_file(part_file(folder, part, "val")) as val):
        for span, record in records:
            try:
                text = text_of(record, source, span, field)
            except ValueError as error:
                print(f"skipped {error}", file=sys.stderr)
                bad.append(f"{error}\n")
                check_bad(bad, max_bad)
                continue
            if text:
                tokens = [*tokenizer.encode(text), tokenizer.eos_id]
                file = val if is_validation(record.key or text, val_fraction) else train
                file.write(np.array(tokens, tokenizer.dtype).tobytes())
                size += len(tokens)
    write_whole(part_file(folder, part, "bad"), map(str.encode, bad))
    return size


def prepare(sources: Iterable[str], tokenizer: Tokenizer, out: str | Path,
            val_fraction: float = 0.05, field: str | None = None, max_bad: int = 100) -> None:
    """Tokenize sources into the folder `out`. After an interruption, the same call goes on.

    sources: as on the command line, NAME=PATH or NAME. val_fraction: the share of documents that
    is held out. field: where a row has its text, if not in "text" or "content". max_bad: how many
    records without text are skipped, each with a message, before one is an error.

    The sources are cut into parts. The tokens of each part are written to files of their own, on
    all cores; in the end these are joined to SOURCE.SPLIT.bin, and manifest.json is written. So a
    kill costs the parts that were being made, and the bytes are the same wherever it came. Until
    the end, it takes the space of the tokens twice.
    """
    sources, out, skipped = list(sources), Path(out).expanduser(), Counter()
    found = dict(find(source, skipped) for source in sources)
    if not found or len(found) < len(sources):
        raise ValueError("expected one or more sources, each with a name of its own")
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the validation share must be at least 0 and below 1, not {val_fraction}")
    plan = {"tokenizer": tokenizer.sha256, "val_fraction": val_fraction, "field": field}
    for name, files in found.items():
        plan |= {f"{name}: {file}": facts for file, facts in files.items()}
    with claim(out):
        out.mkdir(exist_ok=True)
        check_plan(out / "plan.json", plan)
        if not (out / "manifest.json").exists():
            tokenizer.save(out)
            parts = cut_parts(found)
            work = functools.partial(encode_part, out, val_fraction, field, max_bad)
            encode_parts(out, work, parts, max_bad)
            join_parts(out, tokenizer, [source for source, _ in parts], found)
        shutil.rmtree(out / "parts", ignore_errors=True)
    if skipped:
        print(f"skipped {in_words(skipped)}", file=sys.stderr)


# ------------------------------------------------------------------------------ loading

class Corpus:
    """One split of a prepared folder: for each source, an array of tokens that stays on the disk.

    sources: the names to take, by default all.
    """

    def __init__(self, folder: str | Path, split: str = "train",
                 sources: Iterable[str] | None = None):
        folder = Path(folder)
        if not (folder / "manifest.json").exists():
            raise ValueError(f"{folder} holds no finished data set (no manifest.json): make or "
                             "finish it with python data.py prepare")
        manifest = json.loads((folder / "manifest.json").read_bytes())
        self.folder, self.split, self.tokenizer = folder, split, load_tokenizer(folder)
        if self.tokenizer.sha256 != manifest["tokenizer"]:
            raise ValueError(f"{folder} was prepared with another tokenizer than the one that lies "
                             "in it now: put the old one back or prepare the data again")
        self.sources = list(sources or manifest["sources"])
        if unknown := ", ".join(set(self.sources) - set(manifest["sources"])):
            raise ValueError(f"{folder} has no source {unknown}, but "
                             f"{', '.join(manifest['sources'])}")
        self._tokens, dtype = {}, np.dtype(manifest["dtype"])
        for name in self.sources:
            path, n = folder / f"{name}.{split}.bin", manifest["sources"][name][split]
            if not path.exists() or path.stat().st_size != n * dtype.itemsize:
                raise ValueError(f"{path} is missing or does not hold the {n} tokens that the "
                                 "manifest says: delete the folder and prepare it again")
            # An empty file cannot be mapped.
            self._tokens[name] = np.memmap(path, dtype, mode="r") if n else np.empty(0, dtype)

    def tokens(self, source: str) -> np.ndarray:
        return self._tokens[source]

    def blocks(self, source: str, block: int) -> np.ndarray:
        """A source cut into blocks of block + 1 tokens, (N, T + 1): a model reads all but the last
        and predicts all but the first. The tokens that are left over at the end are in none."""
        tokens = self._tokens[source]
        return tokens[:len(tokens) // (block + 1) * (block + 1)].reshape(-1, block + 1)


class Loader:
    """Batches as a pure function of (step, rank, world): to resume is to ask for the next step.

    The blocks of all sources are numbered. Each epoch is a permutation of these numbers, and the
    epochs form one endless row of them, of which each step takes the next `batch`, and each rank
    its share. So every block comes once an epoch, sources mix by their sizes, and the number of
    ranks does not change a step. An epoch may end inside a batch.

    Seven blocks in batches of four rows, on two ranks (seed 0):

                 rank 0       rank 1
        step 0   blocks 2 4   blocks 3 6
        step 1   blocks 5 0   blocks 1 1
        step 2   blocks 3 6   blocks 0 4

    The second epoch begins with the last row of step 1.
    """

    def __init__(self, corpus: Corpus, block: int, batch: int, seed: int):
        self.block, self.rows, self.seed = block, batch, seed
        self.sources = [corpus.blocks(name, block) for name in corpus.sources]
        self.ends = np.cumsum([len(blocks) for blocks in self.sources])
        self.blocks_per_epoch = int(self.ends[-1])
        self.epoch, self.order = -1, np.empty(0)
        if not self.blocks_per_epoch:
            raise ValueError(f"{corpus.folder} has too little text in its {corpus.split} split for "
                             f"one block of {block + 1} tokens: add text, or choose a shorter "
                             "block")

    def numbers(self, step: int, rank: int = 0, world: int = 1) -> list[int]:
        """The numbers of the blocks that `rank` reads in a step."""
        if self.rows % world:
            raise ValueError(f"a batch of {self.rows} rows cannot be split between {world} ranks")
        share, n, numbers = self.rows // world, self.blocks_per_epoch, []
        first = step * self.rows + rank * share
        for epoch, place in (divmod(i, n) for i in range(first, first + share)):
            if epoch != self.epoch:             # only one epoch's order is kept: 4 N bytes
                rng = np.random.default_rng([self.seed, epoch])
                self.epoch, self.order = epoch, rng.permutation(np.arange(n, dtype=np.uint32))
            numbers.append(int(self.order[place]))
        return numbers

    def batch(self, step: int, rank: int = 0, world: int = 1) -> np.ndarray:
        """The rows of `rank` in a step, int64, (B / world, T + 1)."""
        rows = []
        for number in self.numbers(step, rank, world):
            source = np.searchsorted(self.ends, number, side="right")
            # Counted from the end of the source: the last of its blocks is -1.
            rows.append(self.sources[source][number - self.ends[source]])
        return np.stack(rows).astype(np.int64)


# ======================= From here on: what makes it practical. You can stop reading. =============

MIB, SHARD = 1 << 20, 64 << 20      # a shard on the Hub counts as 64 MiB
PAUSE = 10                          # seconds between two lines of progress


def check_bad(messages: list[str], limit: int) -> None:
    if len(messages) > limit:
        raise ValueError(f"{messages[-1].strip()}; that makes more than {limit} bad records")


def in_words(counts: Counter) -> str:
    return ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()))


@contextmanager
def one_sentence(problem: str) -> Iterator[None]:
    """Turn any error into one sentence: each library has its own for a damaged file."""
    try:
        yield
    except Exception as error:
        reason = str(error) if isinstance(error, (ValueError, OSError)) else repr(error)
        if isinstance(error, ImportError):
            reason = f"it needs {error.name}: pip install -e '.[hub]'"
        raise ValueError(f"{problem}: {' '.join(reason.split())}") from error


def check_plan(path: Path, plan: dict) -> None:
    """Note what a folder is made of, or refuse to go on if it is made of something else."""
    if not path.exists() and not path.with_name("manifest.json").exists():
        write_whole(path, [json.dumps(plan, indent=1).encode()])
    old = json.loads(path.read_bytes() if path.exists() else b"{}")
    if changed := [fact for fact in old | plan if old.get(fact) != plan.get(fact)]:
        raise ValueError(f"{changed[0]} has changed since {path.parent} was prepared: delete that "
                         "folder or choose another one")


def start_worker() -> None:
    """End without a word at Ctrl-C, and when the parent ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_parts(folder: Path, work: Callable, parts: list[Part], max_bad: int) -> None:
    """Make the parts that are missing, on all cores, and show how far it is."""
    reports = [part_file(folder, i, "bad") for i in range(len(parts))]
    missing = [i for i, path in enumerate(reports) if not path.exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tokens, start, shown = 0, time.monotonic(), time.monotonic()
    pool = ProcessPoolExecutor(cores, initializer=start_worker)
    try:
        futures = [pool.submit(work, i, *parts[i]) for i in missing]
        for n, future in enumerate(as_completed(futures), 1):
            tokens, now = tokens + future.result(), time.monotonic()
            if now - shown > PAUSE:
                shown, took = now, now - start
                print(f"{n} of {len(missing)} parts, {tokens / took / 1e3:.0f}k tokens/s, "
                      f"{(len(missing) - n) * took / n / 60:.1f} min left", file=sys.stderr)
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, probably because the memory was full: free "
                         "some or use fewer cores (taskset -c 0,1 python data.py ...) and run the "
                         "same command again; what was finished is kept") from None
    finally:
        pool.shutdown(cancel_futures=True)
    check_bad([line for path in reports for line in path.read_text().splitlines()], max_bad)


def chunks(paths: Iterable[Path]) -> Iterator[bytes]:
    """What some files hold together, in pieces that fit into memory."""
    for path in paths:
        with open(path, "rb") as file:
            yield from iter(functools.partial(file.read, MIB), b"")


def join_parts(folder: Path, tokenizer: Tokenizer, owners: list[str],
               sources: Iterable[str]) -> None:
    """Join the parts to one file for each source and split. owners: the source of each part."""
    counts: dict[str, dict] = {name: {} for name in sources}
    for name, split in itertools.product(counts, SPLITS):
        paths = [part_file(folder, i, split) for i, owner in enumerate(owners) if owner == name]
        whole = folder / f"{name}.{split}.bin"
        write_whole(whole, chunks(paths))
        counts[name][split] = whole.stat().st_size // np.dtype(tokenizer.dtype).itemsize
        if not counts[name]["train"]:
            raise ValueError(f"source {name} has no text to train on")
    manifest = {"tokenizer": tokenizer.sha256, "dtype": tokenizer.dtype, "sources": counts}
    write_whole(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])


# ------------------------------------------------------------------------------ sources in files

PLAIN = (".txt", ".md", ".rst", ".py")
SPANNED = (*PLAIN, ".jsonl")                                # can be read from the middle
KINDS = (*SPANNED, ".jsonl.gz", ".jsonl.zst", ".parquet")
COLUMNS = ("text", "content", "meta")
NOT_CODE = {"site-packages", "dist-packages",               # folders left out: other people's,
            "test", "tests", "idle_test",                   # tests, with broken examples,
            "encodings", "pydoc_data"}                      # tables
TOPICS = LIBRARY / "pydoc_data" / "topics.py"               # what help("assert") shows
BOM, LFS = b"\xef\xbb\xbf", b"version https://git-lfs.github.com/spec/"


def find(source: str, skipped: Counter) -> tuple[str, dict[str, list[int]]]:
    """The name of a source and its files: {file: [bytes, time of the last change]}."""
    name, _, place = source.partition("=")
    place = place or READY.get(name, "")
    if not re.fullmatch(r"\w[\w.-]*", name) or not place:
        raise ValueError(f"source {source!r} is neither NAME=PATH nor one of {', '.join(READY)}")
    if place.startswith("hub:"):
        return name, {place: [len(hub_shards(place, name)) * SHARD, 0]}
    root = Path(place).expanduser()
    if root == LIBRARY:
        files = python_files(name)
    else:
        reasons = {path: unfit(path) for path in (walk(root) if root.is_dir() else [str(root)])}
        skipped.update(filter(None, reasons.values()))
        # Sorted, so that the order of the documents depends on nothing but the names.
        files = sorted(path for path, reason in reasons.items() if not reason)
    if not files:
        raise ValueError(f"source {name}: {root} neither is nor holds a file of the kinds "
                         f"{', '.join(KINDS)} (skipped: {in_words(skipped) or 'none'})")
    return name, {file: [os.stat(file).st_size, os.stat(file).st_mtime_ns] for file in files}


def walk(root: Path) -> Iterator[str]:
    """The files in a folder. Folders that are linked are followed, each folder once."""
    seen, unreadable = set(), []
    for folder, folders, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        folders.sort()
        if os.path.realpath(folder) in seen:
            folders.clear()
        else:
            yield from (os.path.join(folder, name) for name in names)
        seen.add(os.path.realpath(folder))
    yield from (error.filename for error in unreadable)


def unfit(path: str) -> str:
    """Why a file is not read, "" if it is."""
    folder, name = os.path.split(path)
    if name.startswith("._"):
        return "AppleDouble files"
    if folder.endswith(".ipynb_checkpoints"):
        return "files in .ipynb_checkpoints"
    if not os.path.exists(path):
        return "dangling links"
    if os.path.isfile(path) and not path.endswith(KINDS):
        return "files of other kinds"
    try:
        with open(path, "rb") as file:
            return "git-lfs pointers" if file.read(len(LFS)) == LFS else ""
    except OSError:
        return "unreadable files or folders"


def cut_parts(found: Found) -> list[Part]:
    """Group small files, and cut large ones, into parts of about one size: 1 MiB to 64 MiB."""
    total = sum(size for files in found.values() for size, _ in files.values())
    part_size = min(max(total // 1000 // MIB, 1) * MIB, SHARD)
    parts, position = defaultdict(list), 0
    for source, files in found.items():
        for file, (size, _) in files.items():
            step = SHARD if file.startswith("hub:") else max(size, 1)
            step = part_size if file.endswith(SPANNED) else step
            for start in range(0, size, step):
                span = Span(file, start, min(start + step, size))
                parts[source, position // part_size].append(span)
                position += span.stop - span.start
    return [(source, spans) for (source, _), spans in parts.items()]


def read(source: str, span: Span, field: str | None = None) -> Iterator[Record]:
    """The documents of a span, one after another: no more than one is in memory."""
    with one_sentence(f"source {source}: cannot read {span.file}"):
        if span.file.startswith("hub:"):
            data, shard = hub_shards(span.file, source)[span.start // SHARD]
            rows = data.shard(data.num_shards, shard)
            yield from (Record(i, row) for i, row in enumerate(rows, 1))
        elif source in ("general", "code") and LIBRARY in Path(span.file).parents:
            yield from python_records(source, Path(span.file)) if not span.start else ()
        else:
            with open(span.file, "rb") as raw:
                yield from (parquet_records(raw, field) if span.file.endswith(".parquet")
                            else line_records(span, raw))


def parquet_records(raw: Any, field: str | None) -> Iterator[Record]:
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(raw, buffer_size=MIB)
    columns = [name for name in file.schema_arrow.names if name in (field, *COLUMNS)]
    batches = file.iter_batches(256, columns=columns, use_threads=False)
    rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
    yield from (Record(i, row) for i, row in enumerate(rows, 1))


def line_records(span: Span, stream: Any) -> Iterator[Record]:
    """The lines of a .jsonl file. A text file's documents are the lines that begin in one stretch
    of 32 KiB, so that a single book gives both splits; code is better whole: 1 MiB."""
    at, line, stop = span.start, 1, span.stop if span.file.endswith(SPANNED) else sys.maxsize
    if span.file.endswith(".gz"):
        stream = gzip.open(stream)
    elif span.file.endswith(".zst"):
        import zstandard
        reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
        stream = io.BufferedReader(reader)
    stretch = MIB if span.file.endswith(".py") else MIB // 32 if span.file.endswith(PLAIN) else 1
    if at:                          # the line before belongs to the span before
        stream.seek(at - 1)
        at += len(stream.readline(stop - at + 1)) - 1
    while at < stop:
        # Up to the stretch's last byte, and then to the end of the line that this byte is in.
        row = stream.read(stretch - at % stretch - 1) + stream.readline()
        if row.strip():
            yield Record(line, row if at else row.removeprefix(BOM))
        at, line = at + len(row) if row else stop, line + row.count(b"\n")


def lines_before(span: Span) -> int:
    """How many lines of a file come before its span: counted only for an error message."""
    at = count = 0
    if span.start and not span.file.startswith("hub:"):
        with open(span.file, "rb") as file:
            while at < span.start:
                at, count = at + len(file.readline()), count + 1
    return count


@functools.lru_cache
def hub_shards(place: str, source: str) -> list[tuple[Any, int]]:
    """The shards of a data set on the Hub: (its split, number of the shard in it)."""
    with one_sentence(f"source {source}: cannot read {place}"):
        import datasets
        splits = datasets.load_dataset(place.removeprefix("hub:"), streaming=True,
                                       data_dir=HUB_FOLDER.get(source))
    # Other splits are for other purposes; without a train split, all are languages, say.
    chosen = ["train"] if "train" in splits else sorted(splits)
    return [(splits[name], i) for name in chosen for i in range(splits[name].num_shards)]


def python_files(source: str) -> list[str]:
    """The running Python's standard library, about 10 MB of code; its docstrings are 2 MB."""
    files = [path for path in LIBRARY.rglob("*.py")
             if not NOT_CODE.intersection(path.relative_to(LIBRARY).parts)
             and not path.name.startswith("_sysconfigdata")]
    return sorted(map(str, files + [TOPICS] * (source == "general" and TOPICS.exists())))


def python_records(source: str, path: Path) -> Iterator[Record]:
    """One document: a module's source for "code", its docstrings for "general".

    The split goes by the module's name: a module that is held out is so in both, so that no
    held-out source has its docstrings in the training text. Nothing is imported.
    """
    text, key = path.read_text("utf-8", errors="replace"), str(path.relative_to(LIBRARY))
    documents = {key: text}
    if path == TOPICS:
        documents = ast.literal_eval(ast.parse(text).body[0].value)     # {topic: text}
    elif source == "general":
        kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
        nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, kinds)]
        documents[key] = "\n\n".join(filter(None, map(ast.get_docstring, nodes)))
    yield from (Record(1, text.encode(), key) for key, text in documents.items())


# ------------------------------------------------------------------------------ tokenizer files

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# JSON has no bytes: GPT-2 writes them as Latin-1, and from U+0100 on those that have no glyph.
GLYPHS = dict(zip([*range(33), *range(127, 161), 173], itertools.count(256)))
BYTES = {glyph: byte for byte, glyph in GLYPHS.items()}
TOKENIZER_JSON = """{
    "version": "1.0",
    "added_tokens": [{"special": true, "normalized": false, "single_word": false,
                      "lstrip": false, "rstrip": false}],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
         "use_regex": false}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                "use_regex": false},
    "model": {"type": "BPE"}}"""
TOKENIZER_FILES = ("tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
                   "vocab.json", "merges.txt")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.model or tokenizer.json, or the one in a folder or in a run's checkpoint."""
    path = checkpoint_folder(path)
    if path.is_dir():
        path = next((path / name for name in READERS if (path / name).exists()), path)
    kind = f"tokenizer{path.suffix}"
    if not path.is_file() or kind not in READERS:
        raise ValueError(f"{path} is no tokenizer: expected {' or '.join(READERS)}, or a folder "
                         "with one of them (python data.py train-tokenizer makes one)")
    with one_sentence(f"{path} cannot be used as a tokenizer"):
        paths = {name: path.with_name(name) for name in TOKENIZER_FILES} | {kind: path}
        return READERS[kind]({name: p.read_bytes() for name, p in paths.items() if p.exists()})


def refuse(unsupported: Iterable[str]) -> None:
    if names := ", ".join(unsupported):
        raise ValueError(f"not supported: {names}")


def read_roles(files: Files, ids: dict[str, int], *defaults: Any) -> tuple[int, int | None, bool]:
    """EOS, BOS and whether BOS stands in front: as tokenizer_config.json says, or the defaults."""
    names, config = ("eos_token", "bos_token", "add_bos_token"), config_of(files)
    eos, bos, add_bos = (config.get(name, value) for name, value in zip(names, defaults))
    eos, bos = (ids.get(name["content"] if isinstance(name, dict) else name) for name in (eos, bos))
    if eos is None:
        raise ValueError("its end-of-text token is not known: tokenizer_config.json must name one "
                         "of its tokens as eos_token")
    return eos, bos, bos is not None and (defaults[2] if add_bos is None else add_bos)


def config_of(files: Files) -> dict:
    return json.loads(files.get("tokenizer_config.json", b"{}"))


def write_tokenizer_json(merges: list[tuple[bytes, bytes]]) -> Files:
    """The files of a byte-level tokenizer, as transformers and `read_tokenizer_json` read them."""
    tokens = [bytes([b]) for b in range(256)] + [left + right for left, right in merges]
    name = {token: token.decode("latin-1").translate(GLYPHS) for token in tokens}
    content = json.loads(TOKENIZER_JSON)
    content["added_tokens"][0] |= {"id": len(tokens), "content": END}
    content["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = PATTERN
    content["model"] |= {"vocab": {name[token]: i for i, token in enumerate(tokens)},
                         "merges": [[name[left], name[right]] for left, right in merges]}
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END,
              "add_bos_token": False, "clean_up_tokenization_spaces": False}
    return {"tokenizer.json": json.dumps(content, ensure_ascii=False).encode(),
            "tokenizer_config.json": json.dumps(config).encode()}


def word_pattern(pre_tokenizer: dict) -> str:
    """The pattern with which tiktoken cuts a text into the same words."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    *first, last = [{"use_regex": True} | step for step in steps]
    match first, (last.get("type"), last.get("add_prefix_space"), last["use_regex"]):
        case [], ("ByteLevel", False, True):
            return GPT2
        case [{"type": "Digits", "individual_digits": True}], ("ByteLevel", False, True):
            # Each digit is a word, and is the end of the text before it.
            return GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\S", r"[^\s\p{N}]")
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False}], ("ByteLevel", False, False):
            return pattern
    raise ValueError(f"not supported: the pre_tokenizer {json.dumps(pre_tokenizer)}")


def read_tokenizer_json(files: Files) -> Tokenizer:
    """Read a byte-level tokenizer.json, such as GPT-2's, Llama-3's, SmolLM2's and our own.

    It lists pairs to merge; tiktoken merges any pair that makes a token. For lists that training
    made, that is the same: only the listed pair ever comes about.
    """
    content = json.loads(files["tokenizer.json"])
    model, added = content["model"], {t["content"]: t["id"] for t in content["added_tokens"]}
    if model["type"] != "BPE" or model.get("byte_fallback"):
        raise ValueError(f"its model is {model['type']} and not byte-level (if byte_fallback: it "
                         "needs the tokenizer.model that it was made from beside it)")
    refuse([key for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
            if model.get(key)] + ["normalizer"] * bool(content.get("normalizer"))
           + [token["content"] for token in content["added_tokens"] if not token["special"]])
    ids = model["vocab"] | added
    token_of = {name: b"" if name in added else name.translate(BYTES).encode("latin-1")
                for name in sorted(ids, key=ids.get)}
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [ids[left + right] for left, right in merges]
    if merged != sorted(merged) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ... in the order of its merges")
    # tiktoken looks a word up before it merges; a tokenizer.json only with ignore_merges.
    known = set(range(len(ids))) if model.get("ignore_merges") else set(merged)
    ranks = {token: i for i, token in enumerate(token_of.values())
             if len(token) == 1 or token and i in known}
    refuse(f"a vocabulary without the byte {b}" for b in range(256) if bytes([b]) not in ranks)
    template = json.dumps(content.get("post_processor"))    # what it puts around a text
    first = re.search(r'"single": \[{"SpecialToken": {"id": "([^"]*)"', template)
    roles = read_roles(files, ids, END, first and first[1], bool(first))
    tokenizer = Tokenizer([*token_of.values()], ranks, word_pattern(content["pre_tokenizer"] or {}),
                          files, *roles)
    sample = "".join(map(chr, range(0x3000)))
    if tokenizer.decode(tokenizer.encode(sample)) != sample:
        raise ValueError("its pattern leaves out characters")
    return tokenizer


# ------------------------------------------------------------------------------ SentencePiece

SPACE = "\u2581"                                            # SentencePiece's visible space
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)    # its types of pieces
SUPPORTED = ((2, 3, 1, 2, "a model other than BPE"),        # part, field, default, needed, or else
             (2, 35, 0, 1, "no byte fallback"),
             (2, 24, 0, 0, "spaces as suffixes"),
             (3, 2, b"", b"", "normalization rules"),
             (3, 3, 1, 1, "no space put in front"),
             (3, 4, 1, 0, "removal of extra spaces"),
             (3, 5, 1, 1, "spaces that are not escaped"))


class SentencePiece(Tokenizer):
    """Llama-2's kind of vocabulary, SentencePiece BPE with byte fallback, exactly, in tiktoken.

    SentencePiece merges characters, the best score first, and spells what it does not know in
    bytes; tiktoken merges bytes, the lowest rank first. They agree when the ranks are, in order:
    the 256 bytes; the first bytes of the vocabulary's multi-byte characters; those characters; the
    other pieces by score. Runs of SPACE share one score in Llama-2, and SentencePiece then merges
    leftmost first, which is the same as longest first. At the end, ranks become ids.
    """

    def __init__(self, vocabulary: list[tuple[str, float, int]], files: Files, *roles: Any):
        """vocabulary: (text, score, type) by id."""
        normal, fixed, spelled = ({text: i for i, (text, _, kind) in enumerate(vocabulary)
                                   if kind == wanted} for wanted in (NORMAL, USER_DEFINED, BYTE))
        refuse({"a space after another character" for text in normal
                if SPACE in text.lstrip(SPACE)})
        characters = sorted(text.encode() for text in normal if len(text) == 1)
        starts = sorted({c[:n] for c in characters for n in range(2, len(c))})
        merged = sorted((text for text in normal if len(text) > 1),
                        key=lambda text: (-vocabulary[normal[text]][1], -len(text)))
        tokens = [*(bytes([b]) for b in range(256)), *starts, *(c for c in characters if c[1:]),
                  *map(str.encode, merged)]
        # No piece has SPACE after another character, so no merge crosses the border before it.
        pattern = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"
        # tiktoken looks a whole word up before it merges, and so finds even a piece that no merges
        # lead to. Such pieces, which fall apart when a NUL follows, get no rank.
        trial = Tokenizer([], {token: i for i, token in enumerate(tokens)}, pattern, {}, 0)
        lost = {text.encode() for text in merged if len(trial.encode(text + "\0")) > 2}
        ranks = {token: i for i, token in enumerate(token for token in tokens if token not in lost)}
        pieces = [text.replace(SPACE, " ").encode() if kind in (NORMAL, USER_DEFINED)
                  else bytes.fromhex(text[3:5]) if kind == BYTE else b""
                  for text, _, kind in vocabulary]
        super().__init__(pieces, ranks, pattern, files, *roles)
        byte_ids = [i for _, i in sorted(spelled.items())]
        ids = {text.encode(): (i,) for text, i in normal.items()}
        self.ids = [ids.get(token) or tuple(byte_ids[b] for b in token) for token in ranks]
        self.fixed = fixed
        longest_first = sorted(map(re.escape, fixed), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(longest_first) or '(?!)'})")     # (?!) matches nothing

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        parts = self.cut.split(SPACE + text.replace(" ", SPACE) if text else "")
        for i, part in enumerate(parts):                    # text, fixed, text, fixed, ..., text
            ranks = [] if i % 2 else self.encoding.encode_ordinary(part)
            ids += [self.fixed[part]] if i % 2 else itertools.chain.from_iterable(
                map(self.ids.__getitem__, ranks))
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """A whole text, without the space that encode puts in front (and not as a byte)."""
        tokens = [token for token in tokens if self.decode_bytes([token])]
        text = super().decode(tokens)
        return text[1:] if text.startswith(" ") and (tokens[0],) != self.ids[0x20] else text


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message: an integer, or the bytes of anything else."""
    stream = io.BytesIO(message)

    def varint() -> int:                                    # 7 bits a byte, the lowest first
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        number, kind = divmod(varint(), 8)
        value = size = varint() if kind in (0, 2) else {1: 8, 5: 4}.get(kind, len(message))
        if kind:
            value = stream.read(size)
            if len(value) < size:
                raise ValueError("damaged protobuf")
        yield number, value


def read_sentencepiece(files: Files) -> SentencePiece:
    """Read a tokenizer.model (sentencepiece_model.proto's ModelProto, as far as it matters here)
    and the tokens that tokenizer_config.json adds to it."""
    pieces, parts = [], {2: {}, 3: {}}                      # 2 trainer, 3 normalizer
    for number, value in protobuf_fields(files["tokenizer.model"]):
        parts[number] = fields = dict(protobuf_fields(value))
        if number == 1:                                     # pieces: 1 text, 2 score, 3 type
            score = np.frombuffer(fields.get(2, bytes(4)), "<f4")[0]
            pieces.append((fields[1].decode(), score, fields.get(3, NORMAL)))
    refuse([name for part, number, default, needed, name in SUPPORTED
            if parts[part].get(number, default) != needed]
           + ["unused pieces"] * any(kind == UNUSED for _, _, kind in pieces))
    for i, token in config_of(files).get("added_tokens_decoder", {}).items():
        text = token["content"].replace(" ", SPACE)
        if int(i) == len(pieces):
            pieces.append((text, 0, CONTROL if token["special"] else USER_DEFINED))
        if pieces[int(i)][0] != text:
            raise ValueError(f"tokenizer_config.json says that {text!r} is {i}; it is not")
    names = {i: text for i, (text, _, _) in enumerate(pieces)}
    ids = {text: i for i, text in names.items()}
    eos, bos = (names.get(parts[2].get(number, number - 40)) for number in (42, 41))
    return SentencePiece(pieces, files, *read_roles(files, ids, eos, bos, True))


READERS = {"tokenizer.model": read_sentencepiece,           # the first that a folder has is taken
           "tokenizer.json": read_tokenizer_json}


# ------------------------------------------------------------------------------ benchmarks

# evaluate.py's tasks on the Hub: data set, configuration, the split that is scored, and the one
# that examples are drawn from.
BENCHMARKS = {name: facts for name, *facts in map(str.split, """
sciq            allenai/sciq                default         test        train
winogrande      allenai/winogrande          winogrande_xl   validation  train
piqa            baber/piqa                  default         validation  train
wsc             aps/super_glue              wsc.fixed       validation  train
mmlu            cais/mmlu                   all             test        dev
lambada_openai  EleutherAI/lambada_openai   default         test
arc_easy        allenai/ai2_arc             ARC-Easy        test        train
arc_challenge   allenai/ai2_arc             ARC-Challenge   test        train
logiqa          EleutherAI/logiqa           logiqa          test        train
hellaswag       Rowan/hellaswag             default         validation  train
humaneval       openai/openai_humaneval     default         test
""".strip().splitlines())}


def fetch(task: str, out: str | Path) -> None:
    """Download a task's rows, or those of "all", into OUT/TASK/SPLIT.jsonl, as evaluate.py reads
    them; HumanEval's go where its authors have them, HumanEval.jsonl.gz."""
    if task not in [*BENCHMARKS, "all"]:
        raise ValueError(f"unknown task {task!r}: expected all or one of {', '.join(BENCHMARKS)}")
    for name in BENCHMARKS if task == "all" else [task]:
        path, config, *splits = BENCHMARKS[name]
        place: dict = {"name": None if config == "default" else config}
        if name == "logiqa":        # a program, which datasets no longer runs: the Hub's conversion
            place = {"data_dir": config, "revision": "refs/convert/parquet"}
        for split in splits:
            with one_sentence(f"cannot fetch {name} from {path}"):
                import datasets
                # Streamed, so that no other split is downloaded.
                rows = datasets.load_dataset(path, split=split, streaming=True, **place)
                content = "".join(json.dumps(row) + "\n" for row in rows).encode()
            file = f"{split}.jsonl"
            if name == "humaneval":
                file, content = "HumanEval.jsonl.gz", gzip.compress(content)
            write_whole(Path(out).expanduser() / name / file, [content])


# ------------------------------------------------------------------------------ files

def check_writable(path: str | Path) -> Path:
    """The path of a file that is to be written later: ValueError now rather than after hours."""
    path, existed = Path(path), Path(path).exists()
    try:
        if existed and not path.is_file():
            raise OSError(0, "it is a folder or a device")
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as error:
        raise ValueError(f"{str(path)!r} cannot be written ({error.strerror}): expected the name "
                         "of a file, in a folder that exists") from None
    return path


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Say which file a full disk (or a limit on sizes) stopped, and what to do."""
    try:
        yield
    except OSError as error:
        raise ValueError(f"could not write {path} ({error.strerror}): free some space and run the "
                         "same command again, or choose another folder; what was there before is "
                         "unchanged") from None


@contextmanager
def whole_file(path: Path) -> Iterator[Any]:
    """A file to write, which takes its name only when it is complete and on the disk.

    A crash at any moment leaves the old file or the new one, never a part of one.
    """
    temporary = path.with_name(path.name + ".tmp")
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)


def write_whole(path: str | Path, chunks: Iterable[bytes]) -> None:
    """Write a file that is there whole or not at all."""
    with whole_file(Path(path)) as file:
        file.writelines(chunks)


def checkpoint_folder(path: str | Path) -> Path:
    """The newest checkpoint of a run's folder: NAME -> NAME/step-000320.

    A folder that is a checkpoint itself (it has a config.json), or that has no steps, is returned
    as it is. A step that is still being written has another name, step-000320.partial.
    """
    path = Path(path).expanduser()
    steps = [step for step in path.glob("step-*") if step.name[5:].isdecimal()]
    if not steps or (path / "config.json").exists():
        return path
    return max(steps, key=lambda step: int(step.name[5:]))


@contextmanager
def claim(folder: str | Path) -> Iterator[None]:
    """Within it, this process alone writes in a folder: a file beside it, FOLDER.lock, names the
    owner, since not every file system has locks. ValueError if there is another owner."""
    lock = Path(f"{folder}.lock")
    lock.parent.mkdir(parents=True, exist_ok=True)
    if is_stale(lock):
        lock.unlink(missing_ok=True)
    try:
        with open(lock, "x") as file:                       # fails if it exists
            file.write(f"{platform.node()} {os.getpid()}")
    except FileExistsError:
        raise ValueError(f"another run writes in {folder} (computer and process: "
                         f"{lock.read_text()}): wait for it, or choose another name; if it is "
                         f"gone, delete {lock}") from None
    try:
        yield
    finally:
        lock.unlink(missing_ok=True)


def is_stale(lock: Path) -> bool:
    """Whether a lock's owner has died, as far as this computer knows."""
    try:
        computer, process = lock.read_text().split()
        if computer != platform.node():
            return False
        if int(process) != os.getpid():
            os.kill(int(process), 0)                        # sends nothing, but looks for it
            return False
        return True
    except ProcessLookupError:
        return True
    except (OSError, ValueError):   # no lock; another user's process; it is being written
        return False


# ------------------------------------------------------------------------------ command line

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    train = commands.add_parser("train-tokenizer", help="learn a byte-level BPE vocabulary")
    train.add_argument("--vocab-size", type=int, default=4096)
    tokenize = commands.add_parser("prepare", help="tokenize sources into a data set folder")
    tokenize.add_argument("--tokenizer", required=True, help="a tokenizer's file or folder")
    tokenize.add_argument("--val-fraction", type=float, default=0.05, help="documents held out")
    tokenize.add_argument("--max-bad", type=int, default=100, help="bad records to skip")
    for command in (train, tokenize):
        command.add_argument("--source", action="append", required=True, metavar="NAME[=PATH]",
                             help=f"NAME=file or folder ({', '.join(KINDS)}), or "
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
        parser.exit(130, "\ndata.py: interrupted; the same command goes on\n")


if __name__ == "__main__":
    main()
