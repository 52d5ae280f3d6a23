r"""Measure a checkpoint: bits per byte, AMD's ten benchmarks, HumanEval with and without a draft.

A language model cannot be asked a question; it can only say how likely a text is. So a benchmark
turns each row into requests, pairs of a context and a continuation. The model computes the
log-likelihood of each continuation, and the likeliest one counts as its answer:

    row        {"question": "Which is hot?", "choices": ["ice", "fire"], "answer": 1}
    requests   ("Question: Which is hot?\nAnswer:", " ice") and (the same context, " fire")
    log p      -9.2 and -7.1, so the answer is "fire", which is right

A score says little by itself. Beside it stand chance and the score of the best constant answer: on
WSC a model that always says yes gets 0.3654, which is what AMD published. Prompts and roundings are
those of lm-evaluation-harness, which AMD used. Plain text needs no prompt, and its likelihood is
given in bits per byte. HumanEval is another kind: the model writes programs, and tests judge them.

    python evaluate.py out/demo-target                             # bits per byte, held-out text
    python evaluate.py CHECKPOINT --tasks all --data DIR           # AMD's first table
    python evaluate.py humaneval --target T --draft D --data DIR   # AMD's second table

References: Gao et al. 2021, lm-evaluation-harness; Chen et al. 2021, "Evaluating Large Language
Models Trained on Code" (HumanEval, pass@k). Letters: B, T, C, V as in model.py.
"""
import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from operator import itemgetter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from data import Corpus, Tokenizer, check_writable, write_whole
from model import Transformer, resolve_device
from speculative import Decoder, Stats, load, load_pair, read_text


# ------------------------------------------------------------------------- a row becomes requests

class Question(NamedTuple):
    requests: list[tuple[str, str]]     # a (context, continuation) for each choice
    answers: list[str]                  # the choices themselves
    gold: int                           # the index of the right one
    place: str = ""                     # file:line
    subject: str = ""                   # of MMLU's questions


def choose(context: str, choices: list[str], gold: int) -> Question:
    """One context for all choices. The space before an answer belongs to the continuation."""
    return Question([(context, " " + choice) for choice in choices], choices, int(gold))


def sciq(row: dict) -> Question:
    r"""A choice. The support "Light is fast." and the question "What is fast?" become

        ("Light is fast.\nQuestion: What is fast?\nAnswer:", " sound")      and with the same context
        " snow", " sand" and " light", the right one.
    """
    context = f"{row['support'].lstrip()}\nQuestion: {row['question']}\nAnswer:"
    return choose(context, [row["distractor1"], row["distractor2"], row["distractor3"],
                            row["correct_answer"]], 3)


def winogrande(row: dict) -> Question:
    """A scored ending. "Sarah beat Maria so _ won." asks after which name the rest is likelier:

        ("Sarah beat Maria so Sarah", " won.") or ("Sarah beat Maria so Maria", " won.")
    """
    start, rest = row["sentence"].split("_", 1)
    options = [row["option1"], row["option2"]]
    return Question([(start + option, " " + rest.strip()) for option in options], options,
                    int(row["answer"]) - 1)


def lambada_openai(row: dict) -> Question:
    """A last word. ("He said hello, my old", " friend") is right if each token of the word is the
    likeliest of the whole vocabulary; there is no other choice to compare it with.
    """
    context, word = row["text"].rsplit(" ", 1)
    return choose(context, [word], 0)


# -------------------------------------------------------- requests become tokens, tokens become log p

class Request(NamedTuple):
    tokens: tuple[int, ...]
    start: int              # tokens[start:] are scored
    lost: int = 0           # tokens at the beginning that the model's context has no room for


Score = tuple[float, bool]  # log p of the scored tokens together, and whether each is the likeliest


def start_of_text(tokenizer: Tokenizer) -> int:
    """The token that stands before the first one of a text: BOS, or EOS where there is no BOS."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode(question: Question, tokenizer: Tokenizer, bos: bool, max_len: int) -> list[Request]:
    """Context and continuation are tokenized as one text, because a token may span the join.

    The tokens that the context alone does not account for are scored: if "A context" has 2 tokens
    and "A context of words" has 4, the last 2.
    """
    requests = []
    for context, continuation in question.requests:
        # White space at the end of a context belongs to the token that follows it.
        prefix, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
        count = len(whole) - len(prefix)
        if count < 1:
            raise ValueError(f"{question.place}: the last token of the context reaches to the end "
                             f"of {continuation[:40]!r}: nothing is left to score, leave it out")
        whole = [start_of_text(tokenizer)] * (bos or not prefix) + whole
        tokens = tuple(whole[-max_len - 1:])        # the last token is predicted, but not read
        requests.append(Request(tokens, max(1, len(tokens) - count), len(whole) - len(tokens)))
    return requests


@torch.inference_mode()
def score(model: Transformer, requests: list[Request], title: str = "") -> list[Score]:
    """log p(scored tokens | tokens before them) of each request, in batches, the longest first.

    The last token only has to be predicted, so requests that differ in it alone (MMLU's four
    letters) share an input. Padding needs no mask: it stands at the end of a row, and attention
    looks back only. Of the states (B, T, C) only those that predict a scored token become logits:
    of 5 7 8 9, where 8 and 9 are scored, those of 7 and 8.
    """
    order, scores = sorted(set(requests), key=lambda x: (len(x.tokens), x), reverse=True), {}
    # Tokens of a batch: what the cache of a CPU core holds, or logits of at most 1 GiB on a GPU.
    budget = 512 if model.device.type == "cpu" else 2**28 // model.config.vocab_size
    while rest := order[len(scores):]:
        batch = rest[:max(1, budget // len(rest[0].tokens))]
        inputs = dict.fromkeys(x.tokens[:-1] for x in batch)
        padded = pad_sequence([torch.tensor(tokens) for tokens in inputs], batch_first=True)
        hidden = dict(zip(inputs, model.hidden(padded.to(model.device))))       # input -> (T, C)
        states = torch.cat([hidden[x.tokens[:-1]][x.start - 1:len(x.tokens) - 1] for x in batch])
        targets = torch.tensor([token for x in batch for token in x.tokens[x.start:]])
        logits, targets = model.lm_head(states).float(), targets.to(model.device)       # (N, V)
        logp = -F.cross_entropy(logits, targets, reduction="none")
        if not logp.isfinite().all():
            raise ValueError(f"{title}: a log-likelihood is not a finite number: the weights are "
                             "broken, or too large for --dtype float16")
        results = torch.stack((logp, logits.argmax(-1) == targets)).double().cpu()      # (2, N)
        lengths = [len(x.tokens) - x.start for x in batch]
        for request, (part, greedy) in zip(batch, results.split(lengths, 1)):
            scores[request] = float(part.sum()), bool(greedy.all())
    return [scores[request] for request in requests]


# -------------------------------------------------------------------------- log p becomes a score

def grade(questions: list[Question], scores: list[Score],
          metrics: tuple = ("acc",)) -> tuple[dict, list[dict]]:
    """A task's scores, the figures to compare them with, and one record a row.

    acc takes the likeliest choice. A longer choice is less likely, so acc_norm divides log p by the
    number of characters: "ice" with -9.0 / 3 loses to "a big fire" with -12.0 / 10.
    """
    rows, picks, n, scores = [], set(), len(questions), iter(scores)
    for _, answers, gold, place, _ in questions:
        logp, greedy = np.array([next(scores) for _ in answers]).T
        pick = logp.argmax() if len(answers) > 1 or greedy[0] else -1           # the first of equals
        per_character = logp / [len(answer) for answer in answers]
        picks.add(answers[pick])
        rows.append({"row": place, "gold": gold, "log_likelihoods": logp.tolist(),
                     "acc": int(pick == gold), "acc_norm": int(per_character.argmax() == gold)})
    right = Counter(question.answers[question.gold] for question in questions)
    result = {"n": n, "chance": sum(1 / len(x.answers) for x in questions if x.answers[1:]) / n,
              "best_constant": max(right.values()) / n,     # one text as the answer to every row
              "always": picks.pop() if len(picks) == 1 < n else None}
    for metric in metrics:
        result[metric], result[f"{metric}_stderr"] = mean_and_error(
            [row[metric] for row in rows], [question.subject for question in questions])
    return result, rows


def mean_and_error(values: list[float], groups: list[str] | None = None) -> tuple[float, float]:
    """A mean and its standard error, sqrt(sum (x - mean)^2 / (n - 1) / n).

    With groups (MMLU's subjects) each x is compared with the mean of its own group, and n - 1
    becomes n - (number of groups): the variance is pooled.
    """
    n, parts = len(values), defaultdict(list)
    for x, group in zip(values, groups or [""] * n):
        parts[group].append(x)
    squares = sum(len(part) * np.var(part) for part in parts.values())
    return sum(values) / n, math.sqrt(squares / max(1, n - len(parts)) / n)


# ----------------------------------------------------------------------- plain text: bits per byte

def bits_per_byte(nats: float, size: int) -> float:
    """bits per byte = nats / (bytes * ln 2), where nats = -sum of log p over all tokens.

    Unlike the loss a token it can be compared between tokenizers: longer tokens are fewer, but each
    is harder to predict. 1.39 nats a token of 2 bytes are 1.0 bits per byte.
    """
    return nats / (size * math.log(2))


def windows(tokens: list[int], first: int, max_len: int) -> list[Request]:
    """A long text as rolling windows of at most max_len inputs; each token is scored once.

    Ten tokens and max_len 4: `first` 0 1 2 3 scores 0 to 3, 3 4 5 6 7 scores 4 to 7. The last
    window is filled up to the left: 5 6 7 8 9 scores 8 and 9.
    """
    tokens, requests = (first, *tokens), []
    for start in range(1, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        left = max(0, end - max_len - 1)
        requests.append(Request(tokens[left:end], start - left))
    return requests


def measure(model: Transformer, tokenizer: Tokenizer, source: str, texts: list[str]) -> dict:
    """Bits per byte and the perplexities of documents."""
    first, max_len = start_of_text(tokenizer), model.config.max_position_embeddings
    requests = [x for text in texts for x in windows(tokenizer.encode(text), first, max_len)]
    nats = -sum(logp for logp, _ in score(model, requests, source))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = len("".join(texts).encode())
    return {"documents": len(texts), "nats": nats, "bytes": size, "words": words,
            "bits_per_byte": bits_per_byte(nats, size), "byte_perplexity": perplexity(nats, size),
            "word_perplexity": perplexity(nats, words)}


def perplexity(nats: float, count: int) -> float:
    return math.exp(min(700.0, nats / count))       # beyond e^700 a float overflows


# ------------------------------------------------------------------------------ programs: HumanEval

ONE_SHOT = ("# python code to complete some task. # Create a function to calculate the sum of a "
            "sequence of integers. [PYTHON]\ndef sum_sequence(sequence):\n  sum = 0\n  for num in "
            "sequence:\n    sum += num\n  return sum \n[/PYTHON]\n#")      # AMD's, before each prompt
STOP = re.compile(r"\n(class|def|#|if|print)")                              # human-eval's
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.1, "top_k": 10, "top_p": 0.95}}      # AMD's


def amd_cut(text: str) -> str:
    """AMD's program: indentation padded to multiples of 2, up to the first blank line.

    A right program that holds a blank line is lost: 34 of HumanEval's own 164 solutions fail.
    """
    padded = re.sub(r"(?m)^((?:  )* )(?! )", r"\1 ", text)      # an odd number of spaces
    return padded.lstrip("\n").split("\n\n")[0]


def openai_cut(text: str) -> str:
    """human-eval's program: up to the first line that can no longer belong to the function."""
    return STOP.split(text, maxsplit=1)[0]


def completion(tokens: list[int], tokenizer: Tokenizer, amd: bool) -> str:
    """The program in what a model wrote. AMD decodes EOS too, which is a syntax error if not cut.
    """
    if amd:
        return amd_cut(tokenizer.decode(tokens) + "</s>" * (tokens[-1] == tokenizer.eos_id))
    # As bytes: decode() would drop the space that a text of SentencePiece begins with.
    return openai_cut(tokenizer.decode_bytes(tokens).decode("utf-8", "replace"))


def pass_at_k(n: int, c: int, k: int) -> float:
    """The chance that k of n programs, c of them right, hold a right one (Chen et al., eq. 1).

    pass@k = 1 - C(n - c, k) / C(n, k) = 1 - prod over i = n - c + 1 .. n of (1 - k / i), and 1 if
    fewer than k are wrong. Of 5 programs 1 is right: pass@1 = 0.2, pass@3 = 1 - 4 / 10 = 0.6.
    """
    return 1.0 if n - c < k else 1.0 - math.prod(1.0 - k / i for i in range(n - c + 1, n + 1))


# =============== From here on: what makes it practical. You can stop reading. ====================


# ------------------------------------------------------------------------------- the other prompts

def piqa(row: dict) -> Question:
    return choose(f"Question: {row['goal']}\nAnswer:", [row["sol1"], row["sol2"]], row["label"])


def mmlu(row: dict) -> Question:
    a, b, c, d = row["choices"]
    context = ("The following are multiple choice questions (with answers) about "
               f"{row['subject'].replace('_', ' ')}.\n\n{row['question'].strip()}\n"
               f"A. {a}\nB. {b}\nC. {c}\nD. {d}\nAnswer:")
    return choose(context, list("ABCD"), row["answer"])._replace(subject=row["subject"])


def logiqa(row: dict) -> Question:
    a, b, c, d = row["options"]
    context = (f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\nA. {a}\n"
               f"B. {b}\nC. {c}\nD. {d}\nAnswer:")
    return choose(context, row["options"], "abcd".index(row["label"]))


def hellaswag(row: dict) -> Question:
    def clean(text: str) -> str:
        text = re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". "))
        return text.replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), [clean(ending) for ending in row["endings"]], row["label"])


def wsc(row: dict) -> Question:
    """Yes or no: does the pronoun, between stars in the passage, refer to the noun?"""
    text, words = row["text"], row["text"].split()

    def as_in_text(span: str, index: int) -> str:
        """Some spans of the data set are not substrings of their text: case, a stop, a newline."""
        if span in text or span in ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin"):
            return span
        case = str.lower if words[index][0].islower() else str.upper
        return (case(span[0]) + span[1:]).rstrip(".").replace("\n", " ")

    noun = as_in_text(row["span1_text"], row["span1_index"])
    pronoun = as_in_text(row["span2_text"], row["span2_index"])
    before = " ".join(words[:row["span2_index"]])
    passage = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1:]}"
    for spaced in (" n't", " )", "( ", '" ', ' "'):     # undo the spaces of the tokenized text
        passage = passage.replace(spaced, spaced.strip())
    passage = re.sub(r" (['.,])", r"\1", passage)
    return choose(f'Passage: {passage}\nQuestion: In the passage above, does the pronoun '
                  f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:', ["no", "yes"], row["label"])


def arc(row: dict) -> Question:
    choices = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", choices["text"],
                  choices["label"].index(row["answerKey"]))


class Task(NamedTuple):
    prompt: Callable[[dict], Question]
    amd: float                          # AMD-Llama-135m's published accuracy, without BOS
    split: str = "val valid validation" # the first of these that exists is scored
    metrics: tuple = ("acc", "acc_norm")


TASKS = {
    "sciq": Task(sciq, 0.7610, "test val valid validation"),
    "winogrande": Task(winogrande, 0.5012, metrics=("acc",)),
    "piqa": Task(piqa, 0.6420),
    "wsc": Task(wsc, 0.3654, metrics=("acc",)),
    "mmlu": Task(mmlu, 0.2302, "test", ("acc",)),
    "lambada_openai": Task(lambada_openai, 0.3330, "test", ("acc",)),
    "arc_easy": Task(arc, 0.4364, "test"),
    "arc_challenge": Task(arc, 0.1911, "test"),
    "logiqa": Task(logiqa, 0.2120, "test"),
    "hellaswag": Task(hellaswag, 0.3048),
}


# ------------------------------------------------------------------------------------------- files

def read_rows(path: Path, parse: Callable, expected: str) -> list:
    """parse(row) of each row of JSONL, gzipped or not; blank lines are skipped."""
    number, rows = 0, []
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    rows.append(parse(json.loads(text) | {"place": f"{path}:{number}"}))
        if not rows:
            raise ValueError("no rows")
    except Exception as error:      # whatever a broken file may raise
        raise ValueError(f"{path}:{number} is not {expected} ({error!r:.200})") from None
    return rows


def find_rows(folder: Path, splits: str) -> Path:
    """The file with a split as a word in its name: test.jsonl, hellaswag_val.jsonl.gz."""
    for split in splits.split():
        files = [file for file in folder.glob("*.jsonl*")
                 if split in re.split("[^a-z]", file.name.lower())]
        if files:
            break
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} files named *{split}*.jsonl, expected one: "
                         "put the task's rows there and no others, or fetch them with "
                         f"`python data.py fetch {folder.name}`")
    return files[0]


def read_questions(data: Path, name: str) -> list[Question]:
    """The questions of DATA/NAME."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected all, or some of {','.join(TASKS)}")

    def parse(row: dict) -> Question:
        question = TASKS[name].prompt(row)._replace(place=row["place"])
        if not all(question.answers) or question.gold not in range(len(question.answers)):
            raise ValueError(f"choice {question.gold} of {question.answers} is right")
        return question

    return read_rows(find_rows(data / name, TASKS[name].split), parse, f"a row of {name}, with the "
                     "Hub's fields and choices that are not empty, one of them right")


def fingerprint(requests: list) -> str:
    """The same hash is the same protocol on the same rows, whoever wrote the program."""
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()


class Report:
    """A table, with a line for each task, and --json's file, rewritten with all there is so far."""

    def __init__(self, args, model: Transformer, tokenizer: Tokenizer, columns: str):
        self.path, self.columns = args.json, columns.split()
        settings = {"max_len": model.config.max_position_embeddings, "torch": torch.__version__,
                    "tokenizer": tokenizer.sha256}
        self.content = {"settings": vars(args) | settings, "tasks": {}, "rows": []}
        self.line("", dict(zip(self.columns, self.columns)))

    def line(self, name: str, result: dict) -> None:
        text = f"{name[-20:]:20}"
        for column in self.columns:
            cell = result.get(column, "")
            cell = f"{cell:.4g}" if isinstance(cell, float) else cell
            text += f"{cell:>{max(9, len(column) + 1)}}"
        print(text, flush=True)

    def add(self, name: str, result: dict, rows: list[dict]) -> None:
        self.line(name, result)
        self.content["tasks"][name] = result
        self.content["rows"] += [{"task": name} | row for row in rows]
        if self.path:
            write_whole(self.path, [json.dumps(self.content).encode()])


# ------------------------------------------------------------------------- bits per byte and tasks

def held_out(folder: str) -> dict[str, list[str]]:
    """The validation documents of prepared data by source, as text, which any tokenizer reads."""
    corpus, texts = Corpus(folder, "val"), {}
    for source in corpus.sources:
        tokens = np.asarray(corpus.tokens(source))
        ends = np.flatnonzero(tokens == corpus.tokenizer.eos_id)        # EOS itself is no text
        texts[source] = list(map(corpus.tokenizer.decode, np.split(tokens, ends + 1)[:-1]))
    return {source: documents for source, documents in texts.items() if any(documents)}


TEXT_COLUMNS = "documents    bytes bits_per_byte byte_perplexity word_perplexity"
TASK_COLUMNS = "acc acc_stderr amd acc_norm perplexity chance best_constant n cut"


def run_scores(args) -> None:
    names = list(TASKS) if args.tasks == "all" else args.tasks.split(",") if args.tasks else []
    tasks = {name: read_questions(Path(args.data), name)[:args.limit] for name in names}
    texts = {} if tasks else (
        {args.text: [read_text(args.text)]} if args.text else held_out(args.data))
    if not tasks and not any(map(any, texts.values())):
        raise ValueError(f"{args.text or args.data} holds no text: expected at least one token to "
                         "score (prepare data with a --val-fraction above 0)")
    model, tokenizer = load(args.checkpoint, resolve_device(args.device),
                            getattr(torch, args.dtype))
    if args.bos and tokenizer.bos_id is None:
        raise ValueError("--bos: the checkpoint's tokenizer has no BOS token; leave --bos out")
    report = Report(args, model, tokenizer, TASK_COLUMNS if tasks else TEXT_COLUMNS)
    for source, documents in texts.items():
        report.add(source, measure(model, tokenizer, source, documents[:args.limit]), [])
    for name, questions in tasks.items():
        report.add(name, *run_task(model, tokenizer, name, questions, args.bos))


def run_task(model: Transformer, tokenizer: Tokenizer, name: str, questions: list[Question],
             bos: bool) -> tuple[dict, list[dict]]:
    """The figures of a task and its rows."""
    max_len = model.config.max_position_embeddings
    requests = [x for question in questions for x in encode(question, tokenizer, bos, max_len)]
    scores = score(model, requests, name)
    result, rows = grade(questions, scores, TASKS[name].metrics)
    if name == "lambada_openai":
        result["perplexity"] = perplexity(-sum(logp for logp, _ in scores), len(scores))
    if result["always"]:
        print(f"warning: {name}: every answer is {result['always']!r}, whatever was asked")
    return result | {"amd": TASKS[name].amd, "cut": sum(x.lost > 0 for x in requests),
                     "sha256": fingerprint([pair for x in questions for pair in x.requests])}, rows


# -------------------------------------------------------------------------------------- HumanEval

# AMD's published figures of CodeLlama-7b, alone and drafted for by AMD-Llama-135m-code, on an MI250:
# pass@1, acceptance, speed-up.
AMD = {"float32": {"greedy alone": (.3110,), "greedy speculative": (.3110, .658, 2.80),
                   "sampled alone": (.3231,), "sampled speculative": (.2927, .650, 2.58)},
       "bfloat16": {"greedy alone": (.3415,), "greedy speculative": (.3354, .665, 1.75),
                    "sampled alone": (.3110,), "sampled speculative": (.3110, .669, 1.67)}}
AMD_COLUMNS = "AMD's-pass@1", "AMD's-accepted", "AMD's-speedup"


def read_problems(data: str) -> list[tuple]:
    return read_rows(Path(data) / "humaneval" / "HumanEval.jsonl.gz",
                     itemgetter("task_id", "prompt", "test", "entry_point"), "a problem with "
                     "task_id, prompt, test and entry_point: put the authors' file there, or fetch "
                     "it with `python data.py fetch humaneval`")


def write_programs(decoder: Decoder, prompts: list[list[int]], tokenizer: Tokenizer,
                   args) -> tuple[list[str], Stats]:
    """A program for each prompt, and the counts of the run."""
    programs, stats, amd = [], Stats(), args.protocol == "amd"
    list(decoder.generate(prompts[:1], 8))              # warm up
    for i, prompt in enumerate(prompts):
        rounds = decoder.generate(
            [prompt], args.max_new_tokens, tokenizer.eos_id, i, stats,
            # Only the end of the text is new, and no stop string has more tokens than bytes.
            None if amd else lambda new: STOP.search(tokenizer.decode(new[-40:])))
        tokens = [token for outcome in rounds for token in outcome.tokens[0]]
        programs.append(completion(tokens, tokenizer, amd))
    return programs, stats


def judge(problems: list[tuple], programs: list[str], samples: int,
          caged: bool) -> tuple[list[bool], dict]:
    """Whether each program passes its problem's tests, and the rates pass@1 and pass@samples."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        passed = list(pool.map(lambda problem, text: run_program(
            problem[1] + text, *problem[2:], caged), problems, programs))
    rates, right = {}, np.reshape(passed, (samples, -1)).sum(0).tolist()
    for k in {1, samples}:
        rates[f"pass@{k}"], rates[f"pass@{k}_stderr"] = mean_and_error(
            [pass_at_k(samples, c, k) for c in right])
    return passed, rates


COLUMNS = {"amd": "pass@1 pass@1_stderr AMD's-pass@1 accepted_per_drafted AMD's-accepted "
                  "tokens_per_s speedup AMD's-speedup",
           "openai": "pass@1 pass@1_stderr accepted_per_drafted tokens_per_s speedup"}


def run_humaneval(args) -> None:
    """AMD's second table: pass@k of the target alone and helped by the draft, and the speed."""
    amd, drafts = args.protocol == "amd", {"alone": None}
    args.max_new_tokens = args.max_new_tokens or (512 if amd else 1024)
    problems = read_problems(args.data)[:args.limit]
    if args.allow_code_execution:
        check_cage(not args.uncaged)
    place = resolve_device(args.device), getattr(torch, args.dtype)
    if args.draft:
        target, drafts["speculative"], tokenizer = load_pair(args.target, args.draft, *place)
    else:
        target, tokenizer = load(args.target, *place)
    report = Report(args, target, tokenizer, COLUMNS[args.protocol])
    for mode, way in itertools.product(SAMPLING, drafts):
        name, samples = f"{mode} {way}", args.samples if SAMPLING[mode] else 1
        jobs = problems * samples
        texts = [ONE_SHOT * amd + prompt for _, prompt, *_ in jobs]
        prompts = [tokenizer.prompt(text) for text in texts]
        decoder = Decoder(target, drafts[way], args.gamma, graphs=args.graphs, **SAMPLING[mode],
                          length=max(map(len, prompts)) + args.max_new_tokens)
        programs, stats = write_programs(decoder, prompts, tokenizer, args)
        plain = stats if way == "alone" else plain
        result = {"n": len(jobs), "sha256": fingerprint(texts), "tokens_per_s": stats.tokens_per_s,
                  "accepted_per_drafted": stats.accepted_per_drafted,
                  "speedup": stats.tokens_per_s / plain.tokens_per_s}
        rows = [{"row": job[0], "completion": text} for job, text in zip(jobs, programs)]
        if args.allow_code_execution:
            passed, rates = judge(jobs, programs, samples, not args.uncaged)
            result |= rates
            rows = [row | {"acc": int(right)} for row, right in zip(rows, passed)]
        if amd:     # with another draft length than AMD's, acceptance and speed-up are other figures
            result |= zip(AMD_COLUMNS[:3 if args.gamma == "auto" else 1],
                          AMD.get(args.dtype, {}).get(name, ()))
        report.add(name, result, rows)


# ----------------------------------------------------------- the sandbox: running what a model wrote

# The script of an interpreter of its own. It writes the secret word only once check() has returned:
# an exit code or a print would prove nothing. Until then the word stays in the pipe behind the
# request, where no variable holds it. os.kill(-1, 9) would, uncaged, end all that the user runs.
RUN_TESTS = """
import json, os, sys
program, tests, entry_point = json.loads(open(0, "rb", buffering=0, closefd=False).readline())
word, answer = os.dup(0), os.dup(1)
os.dup2(2, 0)
os.dup2(2, 1)
os.kill = os.killpg = None
scope = {}
try:
    exec(compile(program + "\\n\\n", "program", "exec"), scope)
    sys.settrace(None)
    sys.setprofile(None)
    tests_scope = dict(scope)       # what the program left behind does not know this one
    exec(compile(tests, "tests", "exec"), tests_scope)
    tests_scope["check"](scope[entry_point])
except BaseException as error:
    print(repr(error), file=sys.stderr)
    os._exit(1)
os.write(answer, os.read(word, 99))
os._exit(0)
"""
LIMITS = "prlimit --as=1073741824 --fsize=16777216 --nofile=64 --nproc=1 --core=0 --cpu="
# No network, no other process, and 64 MB of memory as the only place for files. No limit on processes
# binds root, so root becomes nobody.
CAGE = ("bwrap --unshare-ipc --unshare-net --unshare-pid --unshare-uts --die-with-parent "
        "--new-session --size 67108864 --perms 1777 --tmpfs /tmp --chdir /tmp")
NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"


def command_line(caged: bool, seconds: int) -> list[str]:
    """Limits and an interpreter; in the cage it sees Python's folders and the system's libraries."""
    libraries = os.environ.get("LD_LIBRARY_PATH", "/usr/lib")
    command = (f"env -i LD_LIBRARY_PATH={libraries} {LIMITS}{seconds} "
               f"{os.path.realpath(sys.executable)} -I -S -B -c")
    if caged:
        folders = {"/usr", "/lib", "/lib64", sys.base_prefix, *re.findall("[^:]+", libraries)}
        # --dir lets everybody enter the folders above, too: Python may be in /root.
        mounts = [f"--dir {folder} --ro-bind-try {folder} {folder}" for folder in sorted(folders)]
        nobody = NOBODY * (os.geteuid() == 0)
        command = f"{CAGE} {' '.join(mounts)} --remount-ro / {nobody} {command}"
    return [*command.split(), RUN_TESTS]


def run_program(program: str, tests: str, entry_point: str, caged: bool = True, seconds: int = 10,
                errors=subprocess.DEVNULL) -> bool:
    """Whether the program passes its tests. Uncaged, a program that sets out to can escape.

    Even the cage cannot stop a program that sets out to fool its tests, with which it shares
    a process: by an object that equals everything, or by the word read from the pipe, for instance.
    Models under test don't do that.
    """
    word = secrets.token_hex(16).encode()
    request = json.dumps([program, tests, entry_point]).encode() + b"\n" + word
    with (tempfile.TemporaryFile() as answer,
          tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder):
        with suppress(subprocess.TimeoutExpired):
            subprocess.run(command_line(caged, seconds), input=request, stdout=answer,
                           stderr=errors, timeout=seconds, cwd=folder, start_new_session=True)
        answer.seek(0)
        return answer.read(99) == word


def check_cage(caged: bool) -> None:
    """Raise ValueError if a right program does not pass here."""
    if caged and not shutil.which("bwrap"):
        raise ValueError("what a model wrote runs in a sandbox made by bubblewrap, and there is no "
                         "bwrap here: install it (apt-get install bubblewrap), or add --uncaged "
                         "to run with limits alone, with your files and network within its reach")
    with tempfile.TemporaryFile() as errors:
        if not run_program("def f(): pass", "def check(f): f()", "f", caged, errors=errors):
            errors.seek(0)
            reason = errors.read().decode(errors="replace").strip().split("\n")[-1]
            raise ValueError(f"no program can run {'in bubblewrap' if caged else 'with limits'} "
                             f"here: {reason} (where a container or kernel refuses namespaces, have "
                             "it allow them, or add --uncaged to run with limits alone)")


# ------------------------------------------------------------------------------------ command line

def positive(text: str) -> int | str:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    human = argv[:1] == ["humaneval"]
    parser = argparse.ArgumentParser(description="Measure a checkpoint. (`evaluate.py humaneval "
                                     "--help` for programs, with and without a draft.)")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: error: {message}\n")
    add = parser.add_argument
    if human:
        add("--target", required=True, help="folder of a run or of a checkpoint")
        add("--draft", help="folder of a smaller one with the same tokenizer")
        add("--data", required=True, help="folder with humaneval/HumanEval.jsonl.gz")
        add("--protocol", default="amd", choices=["amd", "openai"], help="default: %(default)s")
        add("--samples", type=positive, default=1, help="programs for a problem, when sampling")
        add("--max-new-tokens", type=positive, help="default: the protocol's, 512 or 1024")
        add("--gamma", default="auto", help="drafted tokens a round (default: AMD's, auto)",
            type=lambda text: text if text == "auto" else positive(text))
        add("--graphs", action="store_true", help="compiled, as CUDA graphs; needs a --gamma")
        add("--allow-code-execution", action="store_true", help="run what the model wrote")
        add("--uncaged", action="store_true", help="run it without bwrap, with limits alone")
    else:
        add("checkpoint", help="folder of a run or of a checkpoint")
        add("--data", default="out/data-demo", help="prepared data, or with --tasks their rows")
        add("--text", help="a text file instead of prepared data")
        add("--tasks", help=f"all, or some of {','.join(TASKS)}")
        add("--bos", action="store_true", help="put BOS before every context; AMD did not")
    add("--limit", type=positive, help="only the first rows")
    add("--json", metavar="FILE", help="write the results, and each row's")
    add("--device", help="cpu or cuda (also ROCm); default: the best there is")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16", "float64"])
    try:
        args = parser.parse_args(argv[human:])
        if args.json:
            check_writable(args.json)
        (run_humaneval if human else run_scores)(args)
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nevaluate.py: interrupted\n")


if __name__ == "__main__":
    main()
