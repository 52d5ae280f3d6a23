"""From text to batches of tokens.

    text --Tokenizer--> tokens --prepare--> a folder of tokens --Loader--> batches of (B, T + 1)

1.  `train_bpe` learns a vocabulary by byte-pair encoding; a `Tokenizer` splits text with it.
2.  A *source* is a named set of files with documents. A hash of each document decides whether it is
    trained on or held out.
3.  `prepare` writes the tokens of all documents, one after another, into one file for each source
    and split, with an end-of-text token after each document.
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
import re
import shutil
import signal
import sys
import sysconfig
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import filelock  # torch depends on it
import numpy as np
import regex  # tiktoken depends on it: the same syntax of patterns, \p{L} included
import tiktoken

# ------------------------------------------------------------------------------ tokenizer

END = "<|endoftext|>"
ALL_BYTES = [bytes([b]) for b in range(256)]                # the first tokens of a vocabulary

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
    ranks: dict[bytes, int]         # a token's bytes -> its rank: the lowest is merged first
    pattern: str
    files: dict[str, bytes]         # what it was read from, by name, for saving it again
    eos_id: int                     # ends a text
    bos_id: int | None = None       # begins a text, if there is such a token
    add_bos: bool = False           # whether it stands in front of a prompt
    fixed = {}     # no field: what SentencePiece cuts out before all else, text -> id

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
        return b"".join([self.pieces[token] for token in tokens if token < self.n_vocab])

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
            write_whole(Path(folder).expanduser() / name, [content])


def merge_pair(word: list[int], pair: tuple[int, int], new: int) -> list[int]:
    """Replace a pair of neighbours by a new token, from left to right.

    >>> merge_pair([5, 7, 7, 7], (7, 7), 256)
    [5, 256, 7]
    """
    merged, i = [], 0
    while i < len(word):
        if tuple(word[i:i + 2]) == pair:
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
    times, tokens, merges = [*frequency.values()], [*ALL_BYTES], []
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
        if n != -counts[pair]:                              # other merges have made it rarer
            heapq.heappush(heap, (-counts[pair], pair))
            continue
        new, changed = len(tokens), where.pop(pair)
        merges.append((tokens[pair[0]], tokens[pair[1]]))
        tokens.append(b"".join(merges[-1]))
        for i in changed:           # a word that has lost the pair meanwhile stays as it is
            add(i, -1)
            words[i] = merge_pair(words[i], pair, new)
            add(i, 1)
        for pair in {p for i in changed for p in zip(words[i], words[i][1:]) if new in p}:
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
    return read_tokenizer_json(write_tokenizer_json(merges))    # as it will be read again


# ------------------------------------------------------------------------------ documents
#
# The way of a document, and the functions that it passes:
#
#     files --cut_parts--> parts --read--> records --text_of--> texts --encode_part--> tokens
#
# A part is what one process does at a time: spans of files of one source, about 4 MiB together.

LIBRARY = Path(sysconfig.get_paths()["stdlib"])

# Sources that need no path: text that is there with any Python (docstrings, and source code), and
# AMD's three corpora on the Hugging Face Hub.
READY = {"general": str(LIBRARY), "code": str(LIBRARY),
         "slimpajama": "hub:cerebras/SlimPajama-627B", "gutenberg": "hub:manu/project_gutenberg",
         "starcoder-python": "hub:bigcode/starcoderdata"}

KIB, PART = 1 << 10, 4 << 20        # bytes of a part; a shard on the Hub counts as so many
PLAIN = (".txt", ".md", ".rst", ".py")
SPANNED = (*PLAIN, ".jsonl")                                # can be read from the middle
KINDS = (*SPANNED, ".jsonl.gz", ".jsonl.zst", ".parquet")
BOM = b"\xef\xbb\xbf"                                       # the byte order mark of UTF-8


class Span(NamedTuple):
    """Documents of a source: those that begin at one of these bytes of a file."""

    source: str
    file: str
    start: int
    stop: int


def is_validation(key: str, fraction: float) -> bool:
    """Whether a document is held out: its hash decides, so no run and no order changes it.

    >>> is_validation("abc", 0.72), is_validation("abc", 0.73)      # the hash of abc is at 0.728
    (False, True)
    """
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") < fraction * 2**64


def cut_parts(listing: dict[str, dict[str, list[int]]]) -> list[list[Span]]:
    """Group small files, and cut large ones, into parts of about PART bytes.

    listing: {source: {file: [bytes, time of the last change]}}.
    """
    parts, position = defaultdict(list), 0
    for source, files in listing.items():
        for file, (size, _) in files.items():
            step = PART if file.endswith(SPANNED) or file.startswith("hub:") else size or 1
            for start in range(0, size, step):
                stop = min(start + step, size)
                parts[source, position // PART].append(Span(source, file, start, stop))
                position += stop - start
    return [*parts.values()]


def read(span: Span, field: str | None = None) -> Iterator[tuple[int, Any]]:
    """The records of a span, one after another: no more than a few are in memory.

    Yields (line, row): the line's number in the span, from 1, and a table's row as a dict, or UTF-8
    of a line of JSON or of a text.
    """
    with one_sentence(f"source {span.source}: cannot read {span.file}"):
        if span.file.startswith("hub:"):
            data, shard = hub_shards(span.file, span.source)[span.start // PART]
            yield from enumerate(data.shard(data.num_shards, shard), 1)
        elif span.file.endswith(".parquet"):
            yield from enumerate(parquet_rows(span.file, field), 1)
        elif span.source == "general" and library_module(span.file):
            if span.start == 0:
                yield 1, docstrings(span.file)
        else:
            yield from lines(span)


def lines(span: Span) -> Iterator[tuple[int, bytes]]:
    """The lines of a .jsonl file. A text file's documents are the lines that begin in one stretch
    of 32 KiB, so that a single book gives both splits; code is better whole: 1 MiB. A part's border
    in a file is always one between stretches."""
    stretch = 32 * KIB if span.file.endswith(PLAIN) else 1      # of 1 byte: each line by itself
    if span.file.endswith(".py"):
        stretch = KIB * KIB
    at, line, stop = span.start, 1, span.stop if span.file.endswith(SPANNED) else sys.maxsize
    with open_lines(span.file) as stream:
        if at:                      # the line that the byte before is in belongs to another span
            stream.seek(at - 1)
            at += len(stream.readline(stop - at + 1)) - 1
        while at < stop:
            # Up to the stretch's last byte, and then to the end of the line that this byte is in.
            row = stream.read(stretch - at % stretch - 1) + stream.readline()
            if row.strip():
                yield line, row if at else row.removeprefix(BOM)
            at, line = at + len(row) if row else stop, line + row.count(b"\n")


def text_of(line: int, row: Any, span: Span, field: str | None) -> str:
    """The text of a record, "" if its source leaves it out; ValueError says why there is none."""
    fields = [field] if field else ["text", "content"]
    try:
        if isinstance(row, bytes):
            row = row.decode()
            row = {fields[0]: row} if span.file.endswith(PLAIN) else json.loads(row)
        if span.source == "slimpajama" and row["meta"]["redpajama_set_name"] == "RedPajamaBook":
            return ""               # AMD took SlimPajama without its books
        text = next(row[name] for name in fields if name in row)
        text.encode()               # fails for half of a surrogate pair, which JSON can spell
        return text
    except UnicodeDecodeError as error:
        line += error.object.count(b"\n", 0, error.start)
        reason = f"not UTF-8 (byte 0x{error.object[error.start]:02x})"
    except Exception as error:
        reason = f"no text in {' or '.join(fields)} ({error!r:.99})"
    raise ValueError(f"{span.file}, line {line + lines_before(span)}: {reason}")


def documents(part: list[Span], field: str | None, max_bad: int) -> Iterator[tuple[str, str]]:
    """The texts of a part, each with the key whose hash decides its split. Records without text
    are skipped, each with a message, and more than `max_bad` of them are an error.

    The key is the text. For a module of Python's library it is the module's path: what is held out
    is then so in both of the sources made of it, and its docstrings are in no training text.
    """
    bad = 0
    for span in part:
        module = library_module(span.file)
        for line, row in read(span, field):
            try:
                if text := text_of(line, row, span, field):
                    yield text, module or text
            except ValueError as error:
                bad += 1
                if bad > max_bad:
                    raise ValueError(f"{error}: mend it, since no more than {max_bad} such "
                                     "records are skipped in a part of a source") from None
                print(f"skipped {error}", file=sys.stderr)


def texts(sources: Iterable[str], field: str | None = None) -> Iterator[str]:
    """All texts of the sources, one after another, for train_bpe. A record without text is an
    error: a vocabulary is made once, and of what was meant to be in it."""
    for part in cut_parts(find_all(sources, Counter())):
        for text, _ in documents(part, field, max_bad=0):
            yield text


# ------------------------------------------------------------------------------ preparing

SPLITS = ("train", "val")
MAX_BAD = 100                       # records without text that a part may have


def part_file(folder: Path, number: int, split: str) -> Path:
    return folder / "parts" / f"{number:06}.{split}"


@functools.lru_cache(1)             # each worker reads it once: quicker than to send it each time
def worker_tokenizer(folder: Path) -> Tokenizer:
    return load_tokenizer(folder)


def encode_part(folder: Path, val_fraction: float, field: str | None, number: int,
                part: list[Span]) -> int:
    """Write the tokens of a part and return how many: the work of one process.

    The file of the train split gets its name last, since `with` closes its files in reverse order:
    a part that has it is complete.
    """
    tokenizer, size = worker_tokenizer(folder), 0
    with (whole_file(part_file(folder, number, "train")) as train,
          whole_file(part_file(folder, number, "val")) as val):
        for text, key in documents(part, field, MAX_BAD):
            tokens = [*tokenizer.encode(text), tokenizer.eos_id]
            file = val if is_validation(key, val_fraction) else train
            file.write(np.array(tokens, tokenizer.dtype).tobytes())
            size += len(tokens)
    return size


def prepare(sources: Iterable[str], tokenizer: Tokenizer, out: str | Path,
            val_fraction: float = 0.05, field: str | None = None) -> None:
    """Tokenize sources into the folder `out`. After an interruption, the same call goes on.

    sources: as on the command line, NAME=PATH or NAME. val_fraction: the share of documents that
    is held out. field: where a row has its text, if not in "text" or "content".

    The sources are cut into parts. The tokens of each part are written to files of their own, on
    all cores; in the end these are joined to SOURCE.SPLIT.bin, and manifest.json is written. So a
    kill costs the parts that were being made, and the bytes are the same whenever it came. Until
    the end, it takes the space of the tokens twice.
    """
    out, skipped = Path(out).expanduser(), Counter()
    listing = find_all(sources, skipped)
    if not 0 <= val_fraction < 1:
        raise ValueError(f"the validation share must be at least 0 and below 1, not {val_fraction}")
    plan = {"tokenizer": tokenizer.sha256, "val_fraction": val_fraction, "field": field}
    for name, files in listing.items():
        plan |= {f"{name}: {file}": facts for file, facts in files.items()}
    with claim(out):
        out.mkdir(exist_ok=True)
        check_plan(out / "plan.json", plan)
        if not (out / "manifest.json").exists():
            tokenizer.save(out)
            parts = cut_parts(listing)
            encode_parts(out, parts, functools.partial(encode_part, out, val_fraction, field))
            join_parts(out, parts, listing, tokenizer)
        shutil.rmtree(out / "parts", ignore_errors=True)
    if skipped:
        print("skipped", in_words(skipped), file=sys.stderr)


# ------------------------------------------------------------------------------ loading

class Corpus:
    """One split of a prepared folder: tokens[source] is an array that stays on the disk.

    sources: the names to take, by default all.
    """

    def __init__(self, folder: str | Path, split: str = "train",
                 sources: Iterable[str] | None = None):
        self.folder, self.split = Path(folder), split
        path = self.folder / "manifest.json"
        if not path.exists():
            raise ValueError(f"{folder} holds no finished data set (no manifest.json): make or "
                             "finish it with python data.py prepare")
        manifest = json.loads(path.read_bytes())
        self.tokenizer, counts = load_tokenizer(folder), manifest["sources"]
        if self.tokenizer.sha256 != manifest["tokenizer"]:
            raise ValueError(f"{folder} was prepared with another tokenizer than the one that lies "
                             "in it now: put the old one back or prepare the data again")
        self.sources = list(sources or counts)
        if unknown := ", ".join(set(self.sources) - set(counts)):
            raise ValueError(f"{folder} has no source {unknown}, but {', '.join(counts)}")
        self.tokens, dtype = {}, np.dtype(self.tokenizer.dtype)
        for name in self.sources:
            path, n = self.folder / f"{name}.{split}.bin", counts[name][split]
            if not path.exists() or path.stat().st_size != n * dtype.itemsize:
                raise ValueError(f"{path} is missing or does not hold the {n} tokens that the "
                                 "manifest says: delete the folder and prepare it again")
            # An empty file cannot be mapped.
            self.tokens[name] = np.memmap(path, dtype, mode="r") if n else np.empty(0, dtype)

    def blocks(self, source: str, block: int) -> np.ndarray:
        """A source cut into blocks of block + 1 tokens, (N, T + 1): a model reads all but the last
        and predicts all but the first. The tokens that are left over at the end are in none."""
        tokens = self.tokens[source]
        return tokens[:len(tokens) // (block + 1) * (block + 1)].reshape(-1, block + 1)


class Loader:
    """Batches as a pure function of (step, rank, world): to resume is to ask for the next step.

    The blocks of all sources are numbered. Each epoch is a permutation of these numbers, and the
    epochs form one endless sequence, of which each step takes the next `batch`, and each rank its
    share. So every block comes once an epoch, sources mix by their sizes, and the number of
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
        for i in range(first, first + share):
            epoch, place = divmod(i, n)
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

PAUSE = 10                          # seconds between two lines of progress


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
    if not path.exists():
        write_whole(path, [json.dumps(plan, indent=1).encode()])
    old = json.loads(path.read_bytes())
    for fact in old | plan:
        if old.get(fact) != plan.get(fact):
            raise ValueError(f"{fact} has changed since {path.parent} was prepared: delete that "
                             "folder or choose another one")


def start_worker() -> None:
    """End without a word at Ctrl-C, and when the parent ends, even if it is killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    parent = multiprocessing.parent_process()
    threading.Thread(target=lambda: (parent.join(), os._exit(1)), daemon=True).start()


def encode_parts(folder: Path, parts: list[list[Span]], work: functools.partial) -> None:
    """Make the parts that are missing, on all cores, and show how far it is."""
    missing = [i for i in range(len(parts)) if not part_file(folder, i, "train").exists()]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    tokens, start, last_report = 0, time.monotonic(), time.monotonic()
    pool = ProcessPoolExecutor(cores, initializer=start_worker)
    try:
        futures = [pool.submit(work, i, parts[i]) for i in missing]
        for n, future in enumerate(as_completed(futures), 1):
            tokens, now = tokens + future.result(), time.monotonic()
            if now - last_report > PAUSE:
                last_report, seconds = now, now - start
                print(f"{n} of {len(missing)} parts, {tokens / seconds / 1e3:.0f}k tokens/s, "
                      f"{(len(missing) - n) * seconds / n / 60:.1f} min left", file=sys.stderr)
    except BrokenProcessPool:
        raise ValueError("a worker process was killed, probably because the memory was full: free "
                         "some or use fewer cores (taskset -c 0,1 python data.py ...) and run the "
                         "same command again; what was finished is kept") from None
    finally:
        pool.shutdown(cancel_futures=True)


def join_parts(folder: Path, parts: list[list[Span]], sources: Iterable[str],
               tokenizer: Tokenizer) -> None:
    """Join the parts to one file for each source and split, and list these in the manifest."""
    counts: dict[str, dict] = {name: {} for name in sources}
    for name, split in itertools.product(counts, SPLITS):
        with whole_file(folder / f"{name}.{split}.bin") as whole:
            for i, part in enumerate(parts):
                if part[0].source == name:
                    with open(part_file(folder, i, split), "rb") as file:
                        shutil.copyfileobj(file, whole)
            counts[name][split] = whole.tell() // np.dtype(tokenizer.dtype).itemsize
        if not counts[name]["train"]:
            raise ValueError(f"source {name} has no text to train on")
    manifest = {"tokenizer": tokenizer.sha256, "sources": counts}
    write_whole(folder / "manifest.json", [json.dumps(manifest, indent=1).encode()])


# ------------------------------------------------------------------------------ sources in files

NOT_CODE = {"site-packages", "dist-packages",               # folders left out: other people's,
            "test", "tests", "idle_test",                   # tests, with broken examples,
            "encodings", "pydoc_data"}                      # tables
LFS = b"version https://git-lfs.github.com/spec/"


def find_all(sources: Iterable[str], skipped: Counter) -> dict[str, dict[str, list[int]]]:
    """{source: {file: [bytes, time of the last change]}}; `skipped` counts what is not read."""
    pairs = [find(source, skipped) for source in sources]
    if not pairs or len(dict(pairs)) < len(pairs):
        raise ValueError("expected one or more sources, each with a name of its own")
    return dict(pairs)


def find(source: str, skipped: Counter) -> tuple[str, dict[str, list[int]]]:
    """The name of a source, NAME=PATH or NAME, and its files."""
    name, _, place = source.partition("=")
    place = place or READY.get(name, "")
    if not re.fullmatch(r"\w[\w.-]*", name) or not place:
        raise ValueError(f"source {source!r} is neither NAME=PATH nor one of {', '.join(READY)}")
    if place.startswith("hub:"):
        return name, {place: [len(hub_shards(place, name)) * PART, 0]}
    root, files = Path(place).expanduser(), {}
    for path in library() if root == LIBRARY else walk(root) if root.is_dir() else [str(root)]:
        if reason := unfit(path):
            skipped[reason] += 1
        else:
            stat = os.stat(path)
            files[path] = [stat.st_size, stat.st_mtime_ns]
    if not files:
        raise ValueError(f"source {name}: {root} neither is nor holds a file of the kinds "
                         f"{', '.join(KINDS)} (skipped: {in_words(skipped) or 'none'})")
    # Sorted, so that the order of the documents depends on nothing but the names.
    return name, dict(sorted(files.items()))


def library_module(path: str) -> str:
    """A module's path in the library of the running Python, "" for any other file."""
    if LIBRARY not in Path(path).parents:
        return ""
    name = Path(path).relative_to(LIBRARY)
    return "" if NOT_CODE.intersection(name.parts) else str(name)


def library() -> list[str]:
    """The library's modules, about 10 MB; their docstrings are 2 MB."""
    return [path for path in map(str, LIBRARY.rglob("*.py"))
            if library_module(path) and "_sysconfigdata" not in path]


def docstrings(path: str) -> bytes:
    """The docstrings of a module. It is not imported."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    nodes = [node for node in ast.walk(ast.parse(Path(path).read_bytes()))
             if isinstance(node, kinds)]
    return "\n\n".join(filter(None, map(ast.get_docstring, nodes))).encode()


def walk(root: Path) -> Iterator[str]:
    """The files in a folder. Folders that are linked are followed, each folder once."""
    seen, unreadable = set(), []
    for folder, folders, names in os.walk(root, onerror=unreadable.append, followlinks=True):
        place = os.path.realpath(folder)
        folders.sort()
        if place in seen:
            folders.clear()
        else:
            yield from (os.path.join(folder, name) for name in names)
        seen.add(place)
    yield from (error.filename for error in unreadable)


def unfit(path: str) -> str:
    """Why a file is not read, "" if it is."""
    folder, name = os.path.split(path)
    if name.startswith("._"):
        return "AppleDouble files"
    if folder.endswith(".ipynb_checkpoints"):
        return "files in .ipynb_checkpoints"
    if not os.path.exists(path):
        return "dangling links or wrong paths"
    if not os.path.isdir(path) and not (os.path.isfile(path) and path.endswith(KINDS)):
        return "files of other kinds"
    try:
        with open(path, "rb") as file:
            return "git-lfs pointers" if file.read(len(LFS)) == LFS else ""
    except OSError:
        return "unreadable files or folders"


def parquet_rows(path: str, field: str | None) -> Iterator[dict]:
    import pyarrow.parquet
    file = pyarrow.parquet.ParquetFile(path, buffer_size=KIB * KIB)
    columns = [name for name in file.schema_arrow.names
               if name in (field, "text", "content", "meta")]
    for batch in file.iter_batches(256, columns=columns, use_threads=False):
        yield from batch.to_pylist()


def open_lines(path: str) -> BinaryIO:
    """A file of lines to read, decompressed if its name says so."""
    if path.endswith(".gz"):
        return gzip.open(path)
    stream = open(path, "rb")
    if path.endswith(".zst"):
        import zstandard
        unpack = zstandard.ZstdDecompressor().stream_reader
        stream = io.BufferedReader(unpack(stream, read_across_frames=True))
    return stream


def lines_before(span: Span) -> int:
    """How many lines of a file come before its span: counted only for an error message."""
    count = 0
    if span.start and not span.file.startswith("hub:"):
        with open(span.file, "rb") as file:
            while file.tell() < span.start:
                file.readline()
                count += 1
    return count


@functools.lru_cache
def hub_shards(place: str, source: str) -> list[tuple[Any, int]]:
    """The shards of a data set on the Hub: (its split, number of the shard in it)."""
    with one_sentence(f"source {source}: cannot read {place}"):
        import datasets
        # Of The Stack, AMD took Python alone.
        part = "python" if source == "starcoder-python" else None
        splits = datasets.load_dataset(place.removeprefix("hub:"), streaming=True, data_dir=part)
    # Other splits are for other purposes; where none is called train, each may be a language.
    chosen = ["train"] if "train" in splits else sorted(splits)
    return [(splits[name], i) for name in chosen for i in range(splits[name].num_shards)]


# ------------------------------------------------------------------------------ tokenizer files

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
# JSON has no bytes: GPT-2 writes them as Latin-1, and from U+0100 on those that have no glyph.
GLYPHS = dict(zip([*range(33), *range(127, 161), 173], itertools.count(256)))
BYTES = {glyph: byte for byte, glyph in GLYPHS.items()}
# Our own: the id of the end-of-text token, its name, the pattern, the vocabulary, the merges.
TOKENIZER_JSON = """{"version": "1.0",
    "added_tokens": [{"id": %s, "content": %s, "special": true, "normalized": false,
                      "single_word": false, "lstrip": false, "rstrip": false}],
    "pre_tokenizer": {"type": "Sequence", "pretokenizers": [
        {"type": "Split", "pattern": {"Regex": %s}, "behavior": "Isolated", "invert": false},
        {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
         "use_regex": false}]},
    "decoder": {"type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false,
                "use_regex": false},
    "model": {"type": "BPE", "vocab": %s, "merges": %s}}"""
TOKENIZER_CONFIG = """{"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|endoftext|>",
    "add_bos_token": false, "clean_up_tokenization_spaces": false}"""
FILES_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                "chat_template.jinja", "vocab.json", "merges.txt")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """Read a tokenizer.model or tokenizer.json, or the one in a folder or in a run's checkpoint."""
    path = checkpoint_folder(path)
    folder, names = (path, [*READERS]) if path.is_dir() else (path.parent, [path.name])
    for name in names:
        if name in READERS and (folder / name).is_file():
            files = {file: (folder / file).read_bytes() for file in (name, *FILES_BESIDE)
                     if (folder / file).is_file()}
            with one_sentence(f"{folder / name} cannot be used as a tokenizer"):
                return READERS[name](files)
    raise ValueError(f"{path} is no tokenizer: expected {' or '.join(READERS)}, or a folder with "
                     "one of them (python data.py train-tokenizer makes one)")


def refuse(unsupported: Iterable[str]) -> None:
    if names := ", ".join(unsupported):
        raise ValueError(f"not supported: {names}")


def read_roles(files: dict, ids: dict[str, int], eos: str | None, bos: str | None,
               add_bos: bool) -> tuple[int, int | None, bool]:
    """EOS, BOS and whether BOS stands in front: as tokenizer_config.json says, or by default."""
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    names = config.get("eos_token", eos), config.get("bos_token", bos)
    eos_id, bos_id = (ids.get(name["content"] if isinstance(name, dict) else name)
                      for name in names)
    if eos_id is None:
        raise ValueError("its end-of-text token is not known: tokenizer_config.json must name one "
                         "of its tokens as eos_token")
    if config.get("add_bos_token") is not None:
        add_bos = config["add_bos_token"]
    return eos_id, bos_id, bos_id is not None and add_bos


def write_tokenizer_json(merges: list[tuple[bytes, bytes]]) -> dict[str, bytes]:
    """The files of a byte-level tokenizer, as transformers and `read_tokenizer_json` read them."""
    tokens = [*ALL_BYTES, *map(b"".join, merges)]
    name = {token: token.decode("latin-1").translate(GLYPHS) for token in tokens}
    vocabulary = {name[token]: i for i, token in enumerate(tokens)}
    pairs = [[name[left], name[right]] for left, right in merges]
    values = map(json.dumps, (len(tokens), END, PATTERN, vocabulary, pairs))
    return {"tokenizer.json": (TOKENIZER_JSON % tuple(values)).encode(),
            "tokenizer_config.json": TOKENIZER_CONFIG.encode()}


def word_pattern(pre_tokenizer: dict) -> str:
    """The pattern with which tiktoken cuts a text into the same words."""
    steps = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    match [{"use_regex": True} | step for step in steps]:
        case [{"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            return GPT2
        case [{"type": "Digits", "individual_digits": True},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}]:
            # Each digit is a word, and is the end of the text before it.
            return GPT2.replace(r" ?\p{N}+", r"\p{N}").replace(r"\S", r"[^\s\p{N}]")
        case [{"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
               "invert": False},
              {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}]:
            return pattern
    raise ValueError(f"not supported: the pre_tokenizer {json.dumps(pre_tokenizer)}")


def read_tokenizer_json(files: dict[str, bytes]) -> Tokenizer:
    """Read a byte-level tokenizer.json, such as GPT-2's, Llama-3's, SmolLM2's and our own.

    It lists pairs to merge; tiktoken merges any pair that makes a token. For lists that training
    made, that is the same: only the listed pair ever comes about.
    """
    content = json.loads(files["tokenizer.json"])
    model, added = content["model"], {t["content"]: t for t in content["added_tokens"]}
    features = ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback")
    refuse([key + " (without a tokenizer.model)" * (key == "byte_fallback")
            for key in features if model.get(key)]
           + ["normalizer"] * bool(content.get("normalizer"))
           + [model["type"]] * (model["type"] != "BPE")
           + [text for text, token in added.items() if not token["special"]])
    ids = model["vocab"] | {text: token["id"] for text, token in added.items()}
    names = sorted(ids, key=ids.get)
    pieces = [b"" if name in added else name.translate(BYTES).encode("latin-1") for name in names]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [ids[left + right] for left, right in merges]
    if merged != sorted(merged) or sorted(ids.values()) != list(range(len(ids))):
        raise ValueError("its ids are not 0, 1, 2, ... in the order of its merges")
    # tiktoken looks a word up before it merges; a tokenizer.json only with ignore_merges.
    known = range(len(ids)) if model.get("ignore_merges") else set(merged)
    ranks = {token: i for i, token in enumerate(pieces) if len(token) == 1 or token and i in known}
    refuse(f"a vocabulary without the byte {b[0]}" for b in ALL_BYTES if b not in ranks)
    # What it puts around a text.
    template = json.dumps(content.get("post_processor"), ensure_ascii=False)
    first = re.search(r'"single": \[{"SpecialToken": {"id": "([^"]*)"', template)
    roles = read_roles(files, ids, END, first and first[1], bool(first))
    pattern = word_pattern(content["pre_tokenizer"] or {})
    tokenizer = Tokenizer(pieces, ranks, pattern, files, *roles)
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


# Words for SentencePiece: no piece has SPACE after another character, so no merge crosses the
# border before it.
SPACED = f"{SPACE}+[^{SPACE}]*|[^{SPACE}]+"


def sentencepiece_ranks(score: dict[str, float]) -> dict[bytes, int]:
    """The ranks with which tiktoken makes the merges of SentencePiece. score: of each piece.

    SentencePiece merges characters, the best score first, and spells what it does not know in
    bytes; tiktoken merges bytes, the lowest rank first. They agree when the ranks are, in order:
    the 256 bytes; the first bytes of the vocabulary's multi-byte characters; those characters; the
    other pieces by score. Runs of SPACE share one score in Llama-2, and SentencePiece then merges
    leftmost first, which is the same as longest first.

    >>> [*sentencepiece_ranks({"a": 0, "b": 0, "\u20ac": 0, "ab": -2, "ba": -1})][256:]
    [b'\\xe2\\x82', b'\\xe2\\x82\\xac', b'ba', b'ab']
    """
    characters = sorted(text.encode() for text in score if len(text) == 1)
    starts = sorted({c[:n] for c in characters for n in range(2, len(c))})
    longer = sorted((text for text in score if len(text) > 1),
                    key=lambda text: (-score[text], -len(text)))
    tokens = [*ALL_BYTES, *starts, *(c for c in characters if c[1:]), *map(str.encode, longer)]
    # tiktoken looks a whole word up before it merges, and so finds even a piece that no merges lead
    # to. Such pieces, which fall apart when a NUL follows, get no rank.
    trial = Tokenizer([], {token: i for i, token in enumerate(tokens)}, SPACED, {}, 0)
    unreachable = {text.encode() for text in longer if len(trial.encode(text + "\0")) > 2}
    return {token: i for i, token in enumerate(t for t in tokens if t not in unreachable)}


class SentencePiece(Tokenizer):
    """Llama-2's kind of vocabulary, SentencePiece BPE with byte fallback, exactly, in tiktoken."""

    def __init__(self, vocabulary: list[tuple[str, float, int]], files: dict, *roles: Any):
        """vocabulary: (text, score, type) by id. roles: EOS, BOS, and whether BOS is put first."""
        normal, fixed, spelled = ({text: i for i, (text, _, kind) in enumerate(vocabulary)
                                   if kind == wanted} for wanted in (NORMAL, USER_DEFINED, BYTE))
        refuse({"a space after another character" for text in normal
                if SPACE in text.lstrip(SPACE)})
        ranks = sentencepiece_ranks({text: vocabulary[i][1] for text, i in normal.items()})
        pieces = [bytes.fromhex(text[3:5]) if kind == BYTE else
                  text.replace(SPACE, " ").encode() if kind in (NORMAL, USER_DEFINED) else b""
                  for text, _, kind in vocabulary]
        super().__init__(pieces, ranks, SPACED, files, *roles)
        # What merging gives, rank by rank, as ids: a piece's, or those of its bytes.
        byte_ids = [spelled[text] for text in sorted(spelled)]
        ids = {text.encode(): [i] for text, i in normal.items()}
        self.ids = [ids.get(token) or [byte_ids[b] for b in token] for token in ranks]
        self.fixed = fixed
        longest_first = sorted(map(re.escape, fixed), key=len, reverse=True)
        self.cut = re.compile(f"({'|'.join(longest_first) or '(?!)'})")     # (?!) matches nothing

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.cut.split(SPACE + text.replace(" ", SPACE) if text else ""):
            if part in self.fixed:
                ids.append(self.fixed[part])
            else:
                for rank in self.encoding.encode_ordinary(part):
                    ids += self.ids[rank]
        return ids

    def decode(self, tokens: Iterable[int]) -> str:
        """A whole text, without the space that encode puts in front (and not as a byte)."""
        tokens = [token for token in tokens if self.decode_bytes([token])]
        text = super().decode(tokens)
        return text[1:] if text.startswith(" ") and tokens[:1] != self.ids[0x20] else text


def protobuf_fields(message: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (number, value) of a protobuf message: an integer, or the bytes of anything else."""
    stream = io.BytesIO(message)

    def varint() -> int:                                    # 7 bits a byte, the lowest first
        byte = stream.read(1)[0]
        return byte if byte < 128 else byte - 128 + (varint() << 7)

    while stream.tell() < len(message):
        number, kind = divmod(varint(), 8)
        value = size = varint() if kind in (0, 2) else {1: 8, 5: 4}[kind]
        if kind:
            value = stream.read(size)
            if len(value) < size:
                raise ValueError("damaged protobuf")
        yield number, value


def read_sentencepiece(files: dict[str, bytes]) -> SentencePiece:
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
    config = json.loads(files.get("tokenizer_config.json", b"{}"))
    for i, token in config.get("added_tokens_decoder", {}).items():
        text = token["content"].replace(" ", SPACE)
        if int(i) == len(pieces):
            pieces.append((text, 0, CONTROL if token["special"] else USER_DEFINED))
        if pieces[int(i)][0] != text:
            raise ValueError(f"tokenizer_config.json says that {text!r} is {i}; it is not")
    ids = {text: i for i, (text, _, _) in enumerate(pieces)}
    bos, eos = (pieces[parts[2].get(41, 1)][0], pieces[parts[2].get(42, 2)][0])
    return SentencePiece(pieces, files, *read_roles(files, ids, eos, bos, True))


READERS = {"tokenizer.model": read_sentencepiece,           # the first that a folder has is taken
           "tokenizer.json": read_tokenizer_json}


# ------------------------------------------------------------------------------ benchmarks

# evaluate.py's tasks on the Hub: data set, configuration, the split that is scored.
BENCHMARKS = {name: facts for name, *facts in map(str.split, """
sciq            allenai/sciq                default         test
winogrande      allenai/winogrande          winogrande_xl   validation
piqa            baber/piqa                  default         validation
wsc             aps/super_glue              wsc.fixed       validation
mmlu            cais/mmlu                   all             test
lambada_openai  EleutherAI/lambada_openai   default         test
arc_easy        allenai/ai2_arc             ARC-Easy        test
arc_challenge   allenai/ai2_arc             ARC-Challenge   test
logiqa          EleutherAI/logiqa           logiqa          test
hellaswag       Rowan/hellaswag             default         validation
humaneval       openai/openai_humaneval     default         test
""".strip().splitlines())}


def fetch(task: str, out: str | Path) -> None:
    """Download a task's rows, or those of "all", into OUT/TASK/SPLIT.jsonl, as evaluate.py reads
    them; HumanEval's go where its authors have them, HumanEval.jsonl.gz."""
    if task not in [*BENCHMARKS, "all"]:
        raise ValueError(f"unknown task {task!r}: expected all or one of {', '.join(BENCHMARKS)}")
    for name in BENCHMARKS if task == "all" else [task]:
        path, config, split = BENCHMARKS[name]
        place = {"name": None if config == "default" else config}
        if name == "logiqa":        # a program, which datasets no longer runs: the Hub's conversion
            place = {"data_dir": config, "revision": "refs/convert/parquet"}
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
    path = Path(path)
    place = path if path.exists() else path.parent
    if path.exists() and not path.is_file() or not os.access(place, os.W_OK):
        raise ValueError(f"{str(path)!r} cannot be written: expected the name of a file, in a "
                         "folder that exists")
    return path


@contextmanager
def whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which takes its name only when it is complete and on the disk.

    A crash at any moment leaves the old file or the new one, never a part of one. ValueError if
    the disk is full, say.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"could not write {path} ({error.strerror}): free some space and run the "
                         "same command again, or choose another folder; what was there before is "
                         "unchanged") from None
    finally:
        with suppress(OSError):
            temporary.unlink()


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
    """Within it, this process alone writes in a folder: ValueError if another one does.

    The file FOLDER.lock names the owner, since not every file system has locks. If the owner was
    killed, the next process on its computer takes over.
    """
    Path(folder).parent.mkdir(parents=True, exist_ok=True)
    lock = filelock.SoftFileLock(f"{folder}.lock", timeout=0)
    try:
        held = lock.acquire()
    except filelock.Timeout:
        raise ValueError(f"another run writes in {folder}: wait for it, or choose another name; if "
                         f"it is gone, delete {lock.lock_file}") from None
    with held:
        yield


# ------------------------------------------------------------------------------ command line

def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    learn = commands.add_parser("train-tokenizer", help="learn a byte-level BPE vocabulary")
    learn.add_argument("--vocab-size", type=int, default=4096)
    tokenize = commands.add_parser("prepare", help="tokenize sources into a data set folder")
    tokenize.add_argument("--tokenizer", required=True, help="a tokenizer's file or folder")
    tokenize.add_argument("--val-fraction", type=float, default=0.05, help="documents held out")
    for command in (learn, tokenize):
        command.add_argument("--source", action="append", required=True, metavar="NAME[=PATH]",
                             help=f"NAME=file or folder ({', '.join(KINDS)}), or "
                                  f"NAME=hub:DATASET, or {', '.join(READY)}")
        command.add_argument("--field", help="where a row has its text, if not in text or content")
    rows = commands.add_parser("fetch", help="download the rows of evaluate.py's tasks")
    rows.add_argument("task", help=f"all, or one of {', '.join(BENCHMARKS)}")
    for command in (learn, tokenize, rows):
        command.add_argument("--out", required=True, help="folder to write")
    args = parser.parse_args(argv)
    try:
        if args.command == "train-tokenizer":
            train_bpe(texts(args.source, args.field), args.vocab_size).save(args.out)
        elif args.command == "prepare":
            prepare(args.source, load_tokenizer(args.tokenizer), args.out, args.val_fraction,
                    args.field)
        else:
            fetch(args.task, args.out)
    except (ValueError, OSError) as error:
        parser.exit(2, f"data.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\ndata.py: interrupted; prepare goes on with the same command\n")


if __name__ == "__main__":
    main()
