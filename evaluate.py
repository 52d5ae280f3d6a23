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
import json
import math
import os
import re
import secrets
import subprocess
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
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
    return Question([(context, f" {choice}") for choice in choices], choices, int(gold))


def sciq(row: dict) -> Question:
    r"""A choice. The support "Light is fast." and the question "What is fast?" become

        ("Light is fast.\nQuestion: What is fast?\nAnswer:", " sound")

    and three more requests with the same context: " snow", " sand" and " light", the right one.
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
    return Question([(f"{start}{option}", f" {rest.strip()}") for option in options], options,
                    int(row["answer"]) - 1)


def lambada_openai(row: dict) -> Question:
    """A last word. ("He said hello, my old", " friend") is right if each token of the word is the
    likeliest of the whole vocabulary; there is no other choice to compare it with.
    """
    context, word = row["text"].rsplit(" ", 1)
    return choose(context, [word], 0)


# ------------------------------------------------------ requests become tokens, tokens become log p

class Request(NamedTuple):
    tokens: tuple[int, ...]
    start: int              # tokens[start:] are scored
    lost: int = 0           # tokens at the beginning that the model's context has no room for


Score = tuple[float, bool]  # log p of the scored tokens together, and whether each is the likeliest


def start_of_text(tokenizer: Tokenizer) -> int:
    """The token that stands before the first one of a text: BOS, or EOS where there is no BOS."""
    return tokenizer.eos_id if tokenizer.bos_id is None else tokenizer.bos_id


def encode(question: Question, tokenizer: Tokenizer, bos: bool, max_len: int) -> Iterator[Request]:
    """Context and continuation are tokenized as one text, because a token may span the join.

    The tokens that the context alone does not account for are scored: if "A context" has 2 tokens
    and "A context of words" has 4, the last 2.
    """
    for context, continuation in question.requests:
        # White space at the end of a context belongs to the token that follows it.
        prefix, whole = tokenizer.encode(context.rstrip()), tokenizer.encode(context + continuation)
        count = len(whole) - len(prefix)
        if count < 1:
            raise ValueError(f"{question.place}: the last token of the context reaches to the end "
                             f"of {continuation[:40]!r}: nothing is left to score, leave it out")
        whole = [start_of_text(tokenizer)] * (bos or not prefix) + whole
        tokens = tuple(whole[-max_len - 1:])        # the last token is predicted, but not read
        yield Request(tokens, max(1, len(tokens) - count), len(whole) - len(tokens))


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

def grade(questions: list[Question], scores: list[Score]) -> tuple:
    """(a task's scores and the figures to compare them with, one record a row).

    acc takes the likeliest choice. A longer choice is less likely, so acc_norm divides log p by the
    number of characters: "ice" with -9.0 / 3 loses to "a big fire" with -12.0 / 10.
    """
    rows, picks, n, scores = [], set(), len(questions), iter(scores)
    for requests, answers, gold, place, _ in questions:
        logp, greedy = np.array([next(scores) for _ in requests]).T
        per_character = logp / [len(continuation) - 1 for _, continuation in requests]
        valid = len(answers) > 1 or greedy[0]           # a last word has nothing to win against
        picks.add(answers[logp.argmax()])               # the first of equals
        rows.append({"row": place, "gold": gold, "log_likelihoods": logp.tolist(),
                     "acc": int(valid and logp.argmax() == gold),
                     "acc_norm": int(valid and per_character.argmax() == gold)})
    right = Counter(question.answers[question.gold] for question in questions)
    result = {"n": n, "chance": sum(1 / len(x.answers) for x in questions if x.answers[1:]) / n,
              # What one text as the answer to every row would score; and the text that the model
              # did give as its answer to every row, if it is only one.
              "best_constant": max(right.values()) / n,
              "always": picks.pop() if len(picks) == 1 < n else ""}
    for metric in ("acc", "acc_norm"):
        result[metric], result[f"{metric}_stderr"] = mean_and_error(
            [row[metric] for row in rows], [question.subject for question in questions])
    return result, rows


def mean_and_error(values: list[float], groups: list | None = None) -> tuple[float, float]:
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


def windows(tokens: list[int], first: int, max_len: int) -> Iterator[Request]:
    """A long text as rolling windows of at most max_len inputs; each token is scored once.

    Ten tokens and max_len 4: `first` 0 1 2 3 scores 0 to 3, 3 4 5 6 7 scores 4 to 7. The last
    window is filled up to the left: 5 6 7 8 9 scores 8 and 9.
    """
    tokens = (first, *tokens)
    for start in range(1, len(tokens), max_len):
        end = min(start + max_len, len(tokens))
        left = max(0, end - max_len - 1)
        yield Request(tokens[left:end], start - left)


def measure(model: Transformer, tokenizer: Tokenizer, source: str, texts: list[str]) -> dict:
    """Bits per byte of documents, and their perplexity per word."""
    first, max_len = start_of_text(tokenizer), model.config.max_position_embeddings
    requests = [x for text in texts for x in windows(tokenizer.encode(text), first, max_len)]
    nats = -sum(logp for logp, _ in score(model, requests, source))
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    size = len("".join(texts).encode())
    return {"documents": len(texts), "nats": nats, "bytes": size, "words": words,
            "bits_per_byte": bits_per_byte(nats, size), "word_ppl": perplexity(nats, words)}


def perplexity(nats: float, count: int) -> float:
    return math.exp(min(700.0, nats / count))       # beyond e^700 a float overflows


# ------------------------------------------------------------------------------ programs: HumanEval

ONE_SHOT = ("# python code to complete some task. # Create a function to calculate the sum of a "
            "sequence of integers. [PYTHON]\ndef sum_sequence(sequence):\n  sum = 0\n  for num in "
            "sequence:\n    sum += num\n  return sum \n[/PYTHON]\n#")  # AMD's, before each prompt
STOP = re.compile(r"\n(class|def|#|if|print)")                          # human-eval's
SAMPLING = {"greedy": {}, "sampled": {"temperature": 0.1, "top_k": 10, "top_p": 0.95}}      # AMD's


def amd_cut(text: str) -> str:
    """AMD's program: indentation padded to multiples of 2, up to the first blank line.

    A right program that holds a blank line is lost: 34 of HumanEval's own 164 solutions fail.
    """
    # The pattern matches an odd number of spaces at the beginning of a line.
    return re.sub(r"(?m)^((?:  )* )(?! )", r"\1 ", text).lstrip("\n").split("\n\n")[0]


def completion(tokens: list[int], tokenizer: Tokenizer, amd: bool) -> str:
    """The program in what a model wrote. AMD decodes EOS as well: a syntax error if not cut."""
    if amd:
        return amd_cut(tokenizer.decode(tokens) + "</s>" * (tokens[-1] == tokenizer.eos_id))
    # As bytes: decode() would drop the space that a text of SentencePiece begins with.
    return STOP.split(tokenizer.decode_bytes(tokens).decode("utf-8", "replace"))[0]


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


def arc(row: dict) -> Question:
    choices = row["choices"]
    return choose(f"Question: {row['question']}\nAnswer:", choices["text"],
                  choices["label"].index(row["answerKey"]))


def mmlu(row: dict) -> Question:
    context = ("The following are multiple choice questions (with answers) about "
               f"{row['subject'].replace('_', ' ')}.\n\n{row['question'].strip()}\n")
    question = choose(context + lettered(row["choices"]), list("ABCD"), row["answer"])
    return question._replace(subject=row["subject"])


def lettered(choices: list[str]) -> str:
    return "A. {}\nB. {}\nC. {}\nD. {}\nAnswer:".format(*choices)


def logiqa(row: dict) -> Question:
    context = f"Passage: {row['context']}\nQuestion: {row['question']}\nChoices:\n"
    return choose(context + lettered(row["options"]), row["options"], "abcd".index(row["label"]))


def hellaswag(row: dict) -> Question:
    def clean(text: str) -> str:
        return re.sub(r"\[.*?\]", "", text.strip().replace(" [title]", ". ")).replace("  ", " ")

    context = f"{row['activity_label']}: {row['ctx_a']} {row['ctx_b'].capitalize()}"
    return choose(clean(context), list(map(clean, row["endings"])), row["label"])


def wsc(row: dict) -> Question:
    """Yes or no: does the pronoun, between stars in the passage, refer to the noun?"""
    text, words = row["text"], row["text"].split()

    def as_in_text(number: int) -> str:
        """Some spans of the data set are not substrings of their text: case, a stop, a newline."""
        span, index = row[f"span{number}_text"], row[f"span{number}_index"]
        if span in text or span in ("Kamenev and Zinoviev", "Kamenev, Zinoviev, and Stalin"):
            return span
        first = span[0].lower() if words[index][0].islower() else span[0].upper()
        return f"{first}{span[1:]}".rstrip(".").replace("\n", " ")

    noun, pronoun = as_in_text(1), as_in_text(2)
    before = " ".join(words[:row["span2_index"]])
    passage = f"{before} *{pronoun}*{text[len(before) + len(pronoun) + 1:]}"
    for spaced in (" n't", " )", "( ", '" ', ' "'):     # undo the spaces of the tokenized text
        passage = passage.replace(spaced, spaced.strip())
    passage = re.sub(r" (['.,])", r"\1", passage)
    return choose(f'Passage: {passage}\nQuestion: In the passage above, does the pronoun '
                  f'"*{pronoun}*" refer to "*{noun}*"?\nAnswer:', ["no", "yes"], row["label"])


class Task(NamedTuple):
    prompt: Callable            # row -> Question
    amd: float                  # AMD-Llama-135m's published accuracy, without BOS
    split: str = "test"         # a word in the name of the file with the rows


VALID = "val|valid|validation"
TASKS = {
    "sciq": Task(sciq, 0.7610, "test|" + VALID),
    "winogrande": Task(winogrande, 0.5012, VALID),
    "piqa": Task(piqa, 0.6420, VALID),
    "wsc": Task(wsc, 0.3654, VALID),
    "mmlu": Task(mmlu, 0.2302),
    "lambada_openai": Task(lambada_openai, 0.3330),
    "arc_easy": Task(arc, 0.4364),
    "arc_challenge": Task(arc, 0.1911),
    "logiqa": Task(logiqa, 0.2120),
    "hellaswag": Task(hellaswag, 0.3048, VALID),
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


def find_rows(folder: Path, split: str) -> Path:
    """The one file with the split as a word in its name: test.jsonl, hellaswag_val.jsonl.gz."""
    pattern = rf"(?!\.)(.*[^a-z])?({split})([^a-z].*)?\.jsonl(\.gz)?$"
    files = [file for file in folder.glob("*") if re.match(pattern, file.name.lower())]
    if len(files) != 1:
        raise ValueError(f"{folder} holds {len(files)} files named *{split}*.jsonl, expected one: "
                         "put the task's rows there and no others, or fetch them with "
                         f"`python data.py fetch {folder.name}`")
    return files[0]


def read_questions(data: str, name: str) -> list[Question]:
    """The questions of DATA/NAME."""
    if name not in TASKS:
        raise ValueError(f"unknown task {name!r}: expected all, or some of {','.join(TASKS)}")

    def parse(row: dict) -> Question:
        question = TASKS[name].prompt(row)._replace(place=row["place"])
        if not all(question.answers) or question.gold not in range(len(question.answers)):
            raise ValueError(f"choice {question.gold} of {question.answers} is right")
        return question

    return read_rows(find_rows(Path(data, name), TASKS[name].split), parse, f"a row of {name}, "
                     "with the Hub's fields and choices that are not empty, one of them right")


def fingerprint(requests: list) -> str:
    """The same hash is the same protocol on the same rows, whoever wrote the program."""
    return hashlib.sha256(json.dumps(requests).encode()).hexdigest()


class Report:
    """A table, with a line for each task, and --json's file, rewritten with all there is so far."""

    def __init__(self, args, model: Transformer, tokenizer: Tokenizer, columns: str):
        self.path, self.columns = args.json and check_writable(args.json), columns.split()
        self.content = {"tasks": {}, "rows": [], "settings": vars(args) | {
            "max_len": model.config.max_position_embeddings, "tokenizer": tokenizer.sha256}}
        self.line("", dict(zip(self.columns, self.columns)))

    def line(self, name: str, result: dict) -> None:
        cells = [result.get(column, "") for column in self.columns]
        print(f"{name:20}", *(f"{x:>14.4g}" if isinstance(x, float) else f"{x!s:>14}"
                              for x in cells), sep="", flush=True)

    def add(self, name: str, result: dict, rows: list) -> None:
        self.line(name, result)
        self.content["tasks"][name] = result
        self.content["rows"] += [{"task": name} | row for row in rows]
        if self.path:
            write_whole(self.path, [json.dumps(self.content).encode()])


# ------------------------------------------------------------------------- bits per byte and tasks

def held_out(folder: str) -> dict:
    """The validation documents of prepared data by source, as text, which any tokenizer reads."""
    corpus, texts = Corpus(folder, "val"), {}
    for source in corpus.sources:
        tokens = corpus.tokens[source]
        documents = np.split(tokens, np.flatnonzero(tokens == corpus.tokenizer.eos_id) + 1)[:-1]
        texts[source] = list(map(corpus.tokenizer.decode, documents))       # EOS itself is no text
    return texts


# amd is AMD's acc; cut counts the requests that lost their beginning; ppl is a perplexity.
TEXT_COLUMNS = "documents bytes bits_per_byte word_ppl"
TASK_COLUMNS = "acc acc_stderr amd acc_norm ppl chance best_constant n cut always"


def run_scores(args, *place) -> None:
    names = list(TASKS) if args.tasks == ["all"] else args.tasks
    tasks = {name: read_questions(args.data, name)[:args.limit] for name in names}
    texts = {} if tasks else (
        {args.text: [read_text(args.text)]} if args.text else held_out(args.data))
    texts = {source: documents for source, documents in texts.items() if any(documents)}
    if not tasks and not texts:
        raise ValueError(f"{args.text or args.data} holds no text: expected at least one token to "
                         "score (prepare data with a --val-fraction above 0)")
    model, tokenizer = load(args.checkpoint, *place)
    if args.bos and tokenizer.bos_id is None:
        raise ValueError("--bos: the checkpoint's tokenizer has no BOS token; leave --bos out")
    report = Report(args, model, tokenizer, TASK_COLUMNS if tasks else TEXT_COLUMNS)
    for source, documents in texts.items():
        report.add(source, measure(model, tokenizer, source, documents[:args.limit]), [])
    for name, questions in tasks.items():
        max_len = model.config.max_position_embeddings
        requests = [x for question in questions
                    for x in encode(question, tokenizer, args.bos, max_len)]
        scores = score(model, requests, name)
        result, rows = grade(questions, scores)
        if name == "lambada_openai":
            result["ppl"] = perplexity(-sum(logp for logp, _ in scores), len(scores))
        result |= {"amd": TASKS[name].amd, "cut": sum(x.lost > 0 for x in requests),
                   "sha256": fingerprint([pair for x in questions for pair in x.requests])}
        report.add(name, result, rows)


# -------------------------------------------------------------------------------------- HumanEval

# AMD's figures: CodeLlama-7b, alone and drafted for by AMD-Llama-135m-code, on an MI250.
AMD_COLUMNS = "AMD's-pass@1", "AMD's-accept.", "AMD's-speedup"
AMD = {"greedy alone float32": (.3110,), "greedy speculative float32": (.3110, .658, 2.80),
       "sampled alone float32": (.3231,), "sampled speculative float32": (.2927, .650, 2.58),
       "greedy alone bfloat16": (.3415,), "greedy speculative bfloat16": (.3354, .665, 1.75),
       "sampled alone bfloat16": (.3110,), "sampled speculative bfloat16": (.3110, .669, 1.67)}


def read_problems(data: str) -> list:
    return read_rows(Path(data, "humaneval", "HumanEval.jsonl.gz"),
                     itemgetter("prompt", "test", "entry_point", "task_id"), "a problem with "
                     "task_id, prompt, test and entry_point: put the authors' file there, or fetch "
                     "it with `python data.py fetch humaneval`")


def write_programs(decoder: Decoder, prompts: list, tokenizer: Tokenizer, args) -> tuple:
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


def judge(problems: list, programs: list, samples: int, caged: bool) -> tuple:
    """Whether each program passes its problem's tests, and the rates pass@1 and pass@samples."""
    with ThreadPoolExecutor() as pool:
        passed = list(pool.map(lambda problem, text: run_program(
            problem[0] + text, *problem[1:3], caged), problems, programs))
    rates, right = {}, np.reshape(passed, (samples, -1)).sum(0).tolist()
    for k in {1, samples}:
        rates[f"pass@{k}"], rates[f"pass@{k}_stderr"] = mean_and_error(
            [pass_at_k(samples, c, k) for c in right])
    return passed, rates


# acceptance is accepted / drafted over all programs, speedup the ratio of tokens_per_s, in which
# the time to read the prompt counts.
COLUMNS = {"amd": "pass@1 pass@1_stderr AMD's-pass@1 acceptance AMD's-accept. tokens_per_s speedup "
                  "AMD's-speedup",
           "openai": "pass@1 pass@1_stderr acceptance tokens_per_s speedup"}


def run_humaneval(args, *place) -> None:
    """AMD's second table: pass@k of the target alone and helped by the draft, and the speed."""
    amd, drafts = args.protocol == "amd", {"alone": None}
    args.max_new_tokens = args.max_new_tokens or (512 if amd else 1024)
    problems = read_problems(args.data)[:args.limit]
    if args.allow_code_execution:
        check_cage(not args.uncaged)
    if args.draft:
        target, drafts["speculative"], tokenizer = load_pair(args.target, args.draft, *place)
    else:
        target, tokenizer = load(args.target, *place)
    report = Report(args, target, tokenizer, COLUMNS[args.protocol])
    for mode, sampling in SAMPLING.items():
        samples = args.samples if sampling else 1
        jobs = problems * samples
        texts = [ONE_SHOT * amd + prompt for prompt, *_ in jobs]
        prompts = [tokenizer.prompt(text) for text in texts]
        # Both before the first program is written: they refuse settings that cannot be.
        decoders = [Decoder(target, draft, args.gamma, graphs=args.graphs, **sampling,
                            length=max(map(len, prompts)) + args.max_new_tokens)
                    for draft in drafts.values()]
        for way, decoder in zip(drafts, decoders):
            programs, stats = write_programs(decoder, prompts, tokenizer, args)
            plain = stats if way == "alone" else plain
            result = {"n": len(jobs), "sha256": fingerprint(texts),
                      "tokens_per_s": stats.tokens_per_s, "acceptance": stats.accepted_per_drafted,
                      "speedup": stats.tokens_per_s / plain.tokens_per_s}
            rows = [{"row": job[3], "completion": text} for job, text in zip(jobs, programs)]
            if args.allow_code_execution:
                passed, rates = judge(jobs, programs, samples, not args.uncaged)
                rows = [row | {"acc": int(right)} for row, right in zip(rows, passed)]
                result |= rates
            if amd:     # with another draft length than AMD's, the last two are other figures
                result |= zip(AMD_COLUMNS[:3 if args.gamma == "auto" else 1],
                              AMD.get(f"{mode} {way} {args.dtype}", ()))
            report.add(f"{mode} {way}", result, rows)


# ---------------------------------------------------------- the sandbox: running what a model wrote

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
# No network, no other process, and 64 MB of memory as the only place for files. The limit on
# processes does not bind root, so root becomes nobody.
CAGE = ("env bwrap --unshare-ipc --unshare-net --unshare-pid --unshare-uts --die-with-parent "
        "--new-session --size 67108864 --perms 1777 --tmpfs /tmp --chdir /tmp")
NOBODY = "setpriv --reuid=65534 --regid=65534 --clear-groups"


def run_program(program: str, tests: str, entry_point: str, caged: bool = True, seconds: int = 10,
                errors=subprocess.DEVNULL) -> bool:
    """Whether the program passes its tests. Uncaged, a program that sets out to can escape.

    Even the cage cannot stop a program that sets out to fool its tests, with which it shares
    a process: by an object that equals everything, or by the word read from the pipe, for instance.
    Models under test don't do that.
    """
    libraries = os.environ.get("LD_LIBRARY_PATH", "/usr/lib")
    command = (f"env -i LD_LIBRARY_PATH={libraries} {LIMITS}{seconds} "
               f"{os.path.realpath(sys.executable)} -I -S -B -c")
    if caged:
        folders = {"/usr", "/lib", "/lib64", sys.base_prefix, *re.findall("[^:]+", libraries)}
        # --dir lets everybody enter the folders above, too: Python may be in /root.
        mounts = " ".join(f"--dir {x} --ro-bind-try {x} {x}" for x in sorted(folders))
        command = f"{CAGE} {mounts} --remount-ro / {NOBODY * (os.geteuid() == 0)} {command}"
    word = secrets.token_hex().encode()
    request = json.dumps([program, tests, entry_point]).encode() + b"\n" + word
    with (tempfile.TemporaryFile() as answer,
          tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder):
        try:
            subprocess.run([*command.split(), RUN_TESTS], input=request, stdout=answer,
                           stderr=errors, timeout=seconds, cwd=folder, start_new_session=True)
        except subprocess.TimeoutExpired:
            return False
        answer.seek(0)
        return answer.read() == word


def check_cage(caged: bool) -> None:
    """Raise ValueError if a right program does not pass here."""
    with tempfile.TemporaryFile() as errors:
        if not run_program("def f(): pass", "def check(f): f()", "f", caged, errors=errors):
            errors.seek(0)
            reason = errors.read().decode(errors="replace").strip().split("\n")[-1]
            raise ValueError(
                f"the sandbox for what a model wrote does not work here: {reason or 'no reason'} "
                "(if bwrap is missing, apt-get install bubblewrap; if namespaces are refused, have "
                "the container or kernel allow them; --uncaged runs programs with limits alone, "
                "with your files and network within their reach)")


# ------------------------------------------------------------------------------------ command line

def positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise ValueError
    return number


def main(argv: list | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    human = argv[:1] == ["humaneval"]
    parser = argparse.ArgumentParser(description="Measure a checkpoint. (`evaluate.py humaneval "
                                     "--help` for programs, with and without a draft.)")
    parser.error = lambda message: parser.exit(2, f"evaluate.py: error: {message}\n")
    add = parser.add_argument
    if human:
        add("--target", required=True, help="folder of a run or of a checkpoint")
        add("--draft", help="the same of a smaller model, with the same tokenizer")
        add("--data", required=True, help="folder with humaneval/HumanEval.jsonl.gz")
        add("--protocol", default="amd", choices=["amd", "openai"])
        add("--samples", type=positive, default=1, help="programs for a problem, when sampling")
        add("--max-new-tokens", type=positive)
        add("--gamma", default="auto", help="drafted tokens a round (default: AMD's, auto)",
            type=lambda text: positive(text) if text != "auto" else text)
        add("--graphs", action="store_true")
        add("--allow-code-execution", action="store_true", help="run what the model wrote")
        add("--uncaged", action="store_true", help="run it without bwrap, with limits alone")
    else:
        add("checkpoint", help="folder of a run or of a checkpoint")
        add("--data", default="out/data-demo", help="prepared data, or with --tasks their rows")
        add("--text", help="a text file instead of prepared data")
        add("--tasks", default=[], type=lambda text: text.split(","),
            help=f"all, or some of {','.join(TASKS)}")
        add("--bos", action="store_true", help="put BOS before every context; AMD did not")
    add("--limit", type=positive)
    add("--json", help="file to write the results and each row's to")
    add("--device")
    add("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    try:
        args = parser.parse_args(argv[human:])
        (run_humaneval if human else run_scores)(
            args, resolve_device(args.device), getattr(torch, args.dtype))
    except (ValueError, OSError) as error:
        parser.exit(2, f"evaluate.py: error: {error}\n")
    except KeyboardInterrupt:
        parser.exit(130, "\nevaluate.py: interrupted\n")


if __name__ == "__main__":
    main()
