"""Claims about evaluate.py: the protocol, the scoring, the statistics, comparing, drawing.

The protocol is held against golden.json (what lm-evaluation-harness did with the files in
EVAL_DATA) and, where the package lm_eval is there, against the harness itself.
"""
import argparse
import gzip
import hashlib
import itertools
import json
import math
import os
import random
import re
import statistics
from pathlib import Path

import pytest
import torch

import evaluate
from data import load_tokenizer, prepare, train_bpe
from evaluate import TASKS, Question, build, encode, grade, score, windows
from speculative import Round

needs_data = pytest.mark.skipif("EVAL_DATA" not in os.environ, reason="EVAL_DATA is not set: the "
                                "folder with the rows of five tasks and golden.json")
EVAL_DATA = Path(os.environ.get("EVAL_DATA", "."))


# Rows in the Hub's form, and the requests that the harness makes of them, written out.
MMLU_HEAD = "The following are multiple choice questions (with answers) about high school physics."
ROWS = {
    "sciq": ({"support": " \nLight is fast.", "question": "What is fast?", "distractor1": "sound",
              "distractor2": "snow", "distractor3": "sand", "correct_answer": "light"},
             [("Light is fast.\nQuestion: What is fast?\nAnswer:", " " + x)
              for x in ("sound", "snow", "sand", "light")], 3),
    "winogrande": ({"sentence": "Sarah beat Maria so _ won. ", "option1": "Sarah",
                    "option2": "Maria", "answer": "1"},
                   [("Sarah beat Maria so Sarah", " won."), ("Sarah beat Maria so Maria", " won.")],
                   0),
    "piqa": ({"goal": "Open a jar", "sol1": "Turn it", "sol2": "Eat it", "label": 1},
             [("Question: Open a jar\nAnswer:", " Turn it"),
              ("Question: Open a jar\nAnswer:", " Eat it")], 1),
    # The span "the dog." stands capitalised in the text and without its stop.
    "wsc": ({"text": "The dog did n't see the \" cat \" , because it ( was ) asleep .",
             "span1_text": "the dog.", "span1_index": 0, "span2_text": "it", "span2_index": 11,
             "label": 1},
            [('Passage: The dog didn\'t see the"cat", because *it* (was) asleep.\n'
              'Question: In the passage above, does the pronoun "*it*" refer to "*The dog*"?\n'
              "Answer:", " " + x) for x in ("no", "yes")], 1),
    "mmlu": ({"subject": "high_school_physics", "question": " What falls? ",
              "choices": ["a stone", "light", "time", "a law"], "answer": 0},
             [(f"{MMLU_HEAD}\n\nWhat falls?\nA. a stone\nB. light\nC. time\nD. a law\nAnswer:",
               " " + x) for x in "ABCD"], 0),
    "lambada_openai": ({"text": "He said\nhello, my old friend"},
                       [("He said\nhello, my old", " friend")], 0),
    "arc_challenge": ({"question": "Which is hot?", "answerKey": "3",
                       "choices": {"text": ["ice", "rain", "fire"], "label": ["1", "2", "3"]}},
                      [("Question: Which is hot?\nAnswer:", " " + x)
                       for x in ("ice", "rain", "fire")], 2),
    "logiqa": ({"label": "b", "context": "All A are B.", "question": "What follows?",
                "options": ["B is A.", "Some A is B.", "No A.", "No B."]},
               [("Passage: All A are B.\nQuestion: What follows?\nChoices:\nA. B is A.\n"
                 "B. Some A is B.\nC. No A.\nD. No B.\nAnswer:", " " + x)
                for x in ("B is A.", "Some A is B.", "No A.", "No B.")], 1),
    "hellaswag": ({"activity_label": "Baking", "ctx_a": "[header] A [title] cook",
                   "ctx_b": "the MAN", "label": "2",
                   "endings": ["eats  it [step]   now", " sleeps [title] so", "runs", "sits"]},
                  [("Baking: A. cook The man", " " + x)       # spaces are halved once only
                   for x in ("eats it  now", "sleeps. so", "runs", "sits")], 2),
}
ROWS["arc_easy"] = ROWS["arc_challenge"]


def write_rows(folder: Path, name: str, rows: list[dict], split: str | None = None) -> Path:
    split = split or TASKS[name].split.split("|")[0]
    (folder / name).mkdir(parents=True, exist_ok=True)
    (folder / name / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def pseudo_random(context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihoods behind golden.json's scores."""
    digest = hashlib.sha256((context + "\0" + continuation).encode()).hexdigest()
    value = -1 - 99 * int(digest[:13], 16) / 16**13
    return value, value > -50


# ---------------------------------------------------------------------------------- the protocol

@needs_data
@pytest.mark.parametrize("name", ["sciq", "winogrande", "piqa", "lambada_openai", "arc_easy"])
def test_requests_and_scores_equal_the_harness(name):
    golden = json.loads((EVAL_DATA / "golden.json").read_text())[f"{name}@0shot"]
    questions = build(EVAL_DATA, name)
    result, rows = grade(name, questions, [[pseudo_random(*pair) for pair in question.requests]
                                           for question in questions])
    assert sum(len(question.requests) for question in questions) == golden["requests"]
    assert result["sha256"] == golden["sha256_requests"], f"{name}: the prompts differ"
    assert len(rows) == result["n"] == golden["results"]["sample_len"]
    for key, value in golden["results"].items():
        key = key.removesuffix(",none").replace(",none", "")
        if key in ("acc", "acc_stderr", "acc_norm", "acc_norm_stderr", "perplexity") and (
                value != "N/A"):
            assert math.isclose(result[key], value, rel_tol=1e-12), f"{name}: {key} differs"


@pytest.mark.parametrize("name", TASKS)
def test_a_row_becomes_the_requests_of_its_form(name, tmp_path):
    row, requests, gold = ROWS[name]
    [question] = build(write_rows(tmp_path, name, [row]), name)
    assert question.requests == requests, f"the prompt of {name} differs from the protocol's"
    assert question.gold == gold


def test_logiqa_is_read_in_the_form_it_was_published_in(tmp_path):
    (tmp_path / "logiqa").mkdir()
    (tmp_path / "logiqa" / "Test.txt").write_text(
        2 * "\nb\nAll A are B.Why?\nWhat follows?\nA.B is A.\nB.Some A is B.\nC.No A.\nD.No B.\n")
    first, second = build(tmp_path, "logiqa")
    assert first.requests == second.requests
    assert first.requests[1] == (
        "Passage: All A are B. Why?\nQuestion: What follows?\nChoices:\nA. B is A.\n"
        "B. Some A is B.\nC. No A.\nD. No B.\nAnswer:", " Some A is B.")
    assert first.gold == 1


def test_a_row_of_logiqa_that_is_not_whole_is_named(tmp_path):
    (tmp_path / "logiqa").mkdir()
    row = "\nb\nAll A are B.Why?\nWhat follows?\nA.B is A.\nB.Some A is B.\nC.No A.\nD.No B.\n"
    for part in (row.removesuffix("D.No B.\n"), "\nb\n", row.replace("\nb\n", "\n\n")):
        (tmp_path / "logiqa" / "Test.txt").write_text(row + part)
        with pytest.raises(ValueError, match="Test.txt:9 is not a row of logiqa"):
            build(tmp_path, "logiqa")


def test_a_wsc_span_that_is_no_substring_and_cannot_be_mended_stays_as_it_is():
    row = ROWS["wsc"][0] | {"span1_text": "Kamenev and Zinoviev"}
    assert '"*Kamenev and Zinoviev*"' in TASKS["wsc"].prompt(row).requests[0][0]


def test_shots_are_solved_examples_before_the_question(tmp_path):
    row = ROWS["piqa"][0]
    train = [row | {"goal": f"Goal {i}"} for i in range(50)]
    write_rows(write_rows(tmp_path, "piqa", [row, row]), "piqa", train, "train")
    picked = random.Random(1234)        # the harness's seed; it draws anew for each row
    for question in build(tmp_path, "piqa", shots=2):
        solved = "".join(f"Question: {x['goal']}\nAnswer: Eat it\n\n"
                         for x in picked.sample(train, 3)[:2])
        assert question.requests == [(solved + "Question: Open a jar\nAnswer:", " Turn it"),
                                     (solved + "Question: Open a jar\nAnswer:", " Eat it")]


def test_the_shots_of_winogrande_hold_the_right_option(tmp_path):
    row = ROWS["winogrande"][0]
    other = row | {"sentence": "Ann met Sarah and _ sang.", "option2": "Ann", "answer": "2"}
    write_rows(write_rows(tmp_path, "winogrande", [row]), "winogrande", [other] * 2, "train")
    [question] = build(tmp_path, "winogrande", shots=1)
    assert question.requests[1] == (
        "Ann met Sarah and Ann sang.\n\nSarah beat Maria so Maria", " won.")


def test_the_shots_of_mmlu_are_the_first_of_the_subject(tmp_path):
    row = ROWS["mmlu"][0]
    dev = [row | {"question": f"{subject} {i}", "subject": subject}
           for i in range(3) for subject in ("virology", "high_school_physics")]
    write_rows(write_rows(tmp_path, "mmlu", [row]), "mmlu", dev, "dev")
    [question] = build(tmp_path, "mmlu", shots=2)
    choices = "A. a stone\nB. light\nC. time\nD. a law\nAnswer:"
    assert question.requests[3] == (
        f"{MMLU_HEAD}\n\nhigh_school_physics 0\n{choices} A\n\nhigh_school_physics 1\n{choices} A"
        f"\n\nWhat falls?\n{choices}", " D")


def test_too_few_rows_for_the_shots_are_refused(tmp_path):
    row = ROWS["piqa"][0]
    write_rows(write_rows(tmp_path, "piqa", [row]), "piqa", [row] * 3, "train")
    with pytest.raises(ValueError, match="3 train rows for .*too few for 3 shots"):
        build(tmp_path, "piqa", shots=3)
    with pytest.raises(ValueError, match="too few for 2 shots besides the row itself"):
        build(tmp_path, "piqa", shots=2)    # 2 + 1 are drawn, and all three are the question


# ------------------------------------------------------------------------------ tokens and windows

@pytest.fixture(scope="module")
def tokenizer():
    """512 entries, learnt from this file."""
    return train_bpe([Path(__file__).read_text()], 512)


def test_the_continuation_is_what_the_context_leaves_of_the_whole(tokenizer):
    question = Question([("A context ", "of words"), ("", "words")], ["of words", "words"], 0)
    [(tokens, count), (alone, all_of_it)], _ = encode(question, tokenizer, False, max_len=100)
    assert tokens == tokenizer.encode("A context of words")
    assert tokens[-count:] == tokenizer.encode(" of words"), "the space belongs to what follows it"
    assert alone == [tokenizer.eos_id] + tokenizer.encode("words"), "no context: one EOS"
    assert all_of_it == len(alone) - 1


def test_bos_is_prepended_only_when_asked_for(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "bos_id", 7)
    question = Question([("A context", " of words"), ("", "words")], ["of words", "words"], 0)
    plain, _ = encode(question, tokenizer, bos=False, max_len=100)
    with_bos, _ = encode(question, tokenizer, bos=True, max_len=100)
    assert with_bos[0] == ([7, *plain[0][0]], plain[0][1])
    assert with_bos[1] == plain[1] == ([7, *tokenizer.encode("words")], plain[1][1])


def test_what_is_too_long_loses_its_beginning_and_is_counted(tokenizer):
    question = Question([("A much too long context", " of words")], ["of words"], 0)
    whole = tokenizer.encode("A much too long context of words")
    ending = len(tokenizer.encode(" of words"))
    fits = len(whole) - 1               # the model reads all but the last token, which it foretells
    for max_len, cut in ((fits + 1, 0), (fits, 0), (fits - 1, 1), (ending, 1), (ending - 1, 1)):
        [(tokens, count)], found = encode(question, tokenizer, bos=False, max_len=max_len)
        assert (tokens, count) == (whole[-(max_len + 1):], min(ending, max_len)), max_len
        assert found == cut, f"{len(whole)} tokens in a context of {max_len}"


def test_a_token_that_spans_the_join_is_an_error_that_names_the_row(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", lambda text: [1, 2])
    with pytest.raises(ValueError, match="rows.jsonl:3: the last token of the context"):
        encode(Question([("a", " b")], ["b"], 0, "rows.jsonl:3"), tokenizer, False, 10)


def test_rolling_windows_are_those_of_the_protocol():
    x = "x"
    assert windows(list(range(10)), x, 4) == [
        ([x, 0, 1, 2, 3], 4), ([3, 4, 5, 6, 7], 4), ([5, 6, 7, 8, 9], 2)]


@pytest.mark.parametrize("max_len", [1, 3, 7])
def test_rolling_windows_score_each_token_once(max_len):
    for n in range(20):
        parts = windows(list(range(n)), -1, max_len)
        assert [t for tokens, count in parts for t in tokens[-count:]] == list(range(n))
        assert all(len(tokens) <= max_len + 1 and count < len(tokens) for tokens, count in parts)
        assert all(len(tokens) == max_len + 1 for tokens, _ in parts[1:]), "a context is not full"


# ------------------------------------------------------------------------------------ the scoring

def score_one_by_one(model, request) -> tuple[float, bool]:
    """The definition: one request, one forward pass without a cache, one sum."""
    tokens, count = request
    with torch.inference_mode():
        logits = model(torch.tensor([tokens[:-1]]))[0, -count:].float()
    targets = torch.tensor(tokens[-count:])
    logp = logits.log_softmax(-1)[range(count), targets]
    return float(logp.double().sum()), bool((logits.argmax(-1) == targets).all())


def random_questions(rng: random.Random, vocabulary: int, max_len: int) -> list:
    questions = []
    for _ in range(60):
        context = [rng.randrange(vocabulary) for _ in range(rng.randrange(1, max_len))]
        continuations = [[rng.randrange(vocabulary) for _ in range(rng.randrange(1, 9))]
                         for _ in range(rng.randrange(1, 6))]
        questions.append([((context + ending)[-(max_len + 1):], len(ending))
                          for ending in continuations])
    return questions


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_batched_scores_equal_one_request_at_a_time(tiny, kv_heads):
    model = tiny(num_key_value_heads=kv_heads)
    questions = random_questions(random.Random(0), 61, 40)
    # One whose requests end in their likeliest token, so that "greedy" is not always false.
    context = questions[0][0][0][:5]
    best = int(model(torch.tensor([context]))[0, -1].argmax())
    questions.append([([*context, best], 1), ([*context, (best + 1) % 61], 1)])
    found = score(model, questions)
    assert [hit for _, hit in found[-1]] == [True, False]
    for question, results in zip(questions, found):
        for request, (logp, greedy) in zip(question, results):
            expected, hit = score_one_by_one(model, request)
            # float64 up to the last step, whose log-softmax is float32: 1e-5 of about -100.
            assert math.isclose(logp, expected, abs_tol=1e-5), \
                "sharing prefixes or padding changed a likelihood: look at score_batch"
            assert greedy == hit


def test_no_batch_is_padded_beyond_the_budget(tiny, monkeypatch):
    """Rows of 1 to 300 tokens: a batch as wide as its longest row must count that width."""
    batches = []

    def read(model, groups):
        requests = [(shared, tokens) for shared, some in groups for tokens, _ in some]
        widest = max(len(shared) for shared, _ in groups)
        rest = max(len(tokens) - 1 - len(shared) for shared, tokens in requests)
        batches.append((len(groups), widest * len(groups) + rest * len(requests)))
        return {(tuple(tokens), n): (0.0, True) for _, some in groups for tokens, n in some}
    monkeypatch.setattr(evaluate, "score_batch", read)
    score(tiny(), random_questions(random.Random(1), 61, 300))
    assert len(batches) > 1
    assert all(tokens <= 512 or groups == 1 for groups, tokens in batches), batches


def test_requests_that_differ_in_the_last_token_share_one_row(tiny, monkeypatch):
    model, read = tiny(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens, cache=None: (
        read.append(tokens.numel()), hidden(tokens, cache))[1])
    context = list(range(30))
    score(model, [[(context + [letter], 1) for letter in (40, 41, 42, 43)]])
    assert read == [30], f"four letters behind one context read {read} tokens, not its 30 once"


def test_likelihoods_that_are_no_numbers_are_refused(tiny):
    model = tiny(torch.float32)
    model.lm_head.weight.data[7] = float("nan")     # a text may overflow where another does not
    with pytest.raises(ValueError, match="piqa: a log-likelihood is not a finite number"):
        score(model, [[([1, 2, 3], 1)]], "piqa")


def test_bits_per_byte_follow_from_the_likelihood_of_each_token(tiny, tokenizer):
    model = tiny(vocab_size=512, max_position_embeddings=16)
    texts = ["A first document, rather longer than\nthe context of 16.  " * 3, "Ünïcode", "x"]
    result, rows = evaluate.measure(model, tokenizer, "texts", texts)
    nats = 0.0
    for text in texts:
        tokens = [tokenizer.eos_id, *tokenizer.encode(text)]
        for start in range(1, len(tokens), 16):
            end = min(start + 16, len(tokens))
            nats -= score_one_by_one(model, (tokens[max(0, end - 17):end], end - start))[0]
    size = len("".join(texts).encode())
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert math.isclose(result["nats"], nats, rel_tol=1e-6)
    assert math.isclose(result["bits_per_byte"], nats / size / math.log(2), rel_tol=1e-6)
    assert math.isclose(result["byte_perplexity"], math.exp(nats / size), rel_tol=1e-6)
    assert math.isclose(result["word_perplexity"], math.exp(nats / words), rel_tol=1e-5)
    assert result["documents"] == len(rows) == 3 and result["bytes"] == size


# --------------------------------------------------------------------------------- the statistics

def test_the_standard_error_is_that_of_a_sample():
    values = [1, 0, 0, 1, 1, 0, 1, 1, 1]
    mean, error = evaluate.mean_and_error(values)
    assert math.isclose(mean, statistics.mean(values))
    assert math.isclose(error, statistics.stdev(values) / math.sqrt(len(values)))


def test_the_standard_error_over_subjects_pools_their_variances():
    groups = {"a": [1, 0, 0], "b": [1, 1, 0, 1, 0], "c": [0, 0, 1, 1]}
    values = [x for xs in groups.values() for x in xs]
    labels = [name for name, xs in groups.items() for _ in xs]
    n = len(values)
    pooled = sum((len(xs) - 1) * len(xs) * (statistics.stdev(xs) / math.sqrt(len(xs))) ** 2
                 for xs in groups.values()) / (n - len(groups)) / n
    assert math.isclose(evaluate.mean_and_error(values, labels)[1], math.sqrt(pooled))


def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert math.isclose(evaluate.pass_at_k(n, c, k), sum(map(any, draws)) / len(draws),
                                abs_tol=1e-12), (n, c, k)


def test_mcnemar_is_the_share_of_coin_tosses_at_least_as_uneven():
    for a, b in itertools.product(range(7), repeat=2):
        tosses = list(itertools.product((0, 1), repeat=a + b))
        uneven = sum(abs(2 * sum(toss) - a - b) >= abs(a - b) for toss in tosses)
        assert math.isclose(evaluate.mcnemar(a, b), uneven / len(tosses)), (a, b)


def test_ties_go_to_the_first_and_lengths_are_characters():
    question = Question([("c", " aaaa"), ("c", " b")], ["aaaa", "b"], 0)
    [row] = grade("piqa", [question], [[(-2.0, False), (-2.0, False)]])[1]
    assert (row["acc"], row["acc_norm"]) == (1, 1), "-2/4 beats -2/1, and the first of equals wins"
    [row] = grade("piqa", [question], [[(-2.0, False), (-1.0, False)]])[1]
    assert (row["acc"], row["acc_norm"]) == (0, 1)


def test_chance_the_best_constant_and_a_constant_answer_stand_beside_the_score():
    questions = [Question([("c", " no"), ("c", " yes")], ["no", "yes"], gold)
                 for gold in (1, 0, 0, 0)]
    always_yes = [[(-2.0, False), (-1.0, False)]] * 4
    result, _ = grade("wsc", questions, always_yes)
    assert (result["acc"], result["chance"], result["best_constant"]) == (0.25, 0.5, 0.75)
    assert result["always"] == "yes", "a model that says yes to everything must be reported"
    result, _ = grade("wsc", questions, always_yes[:3] + [[(-1.0, False), (-2.0, False)]])
    assert result["always"] is None


# ------------------------------------------------------------------------------- the command line

@pytest.fixture
def checkpoint(tiny, tokenizer, tmp_path):
    """A folder with a random model and its tokenizer."""
    def make(name: str, **changes) -> str:
        model = tiny(torch.float32, vocab_size=512, eos_token_id=511, **changes)
        model.save_pretrained(tmp_path / name)
        tokenizer.save(tmp_path / name)
        return str(tmp_path / name)
    return make


@pytest.fixture
def arc_data(tmp_path):
    words = "ice rain fire snow sand light sound stone time law".split()
    rng = random.Random(0)
    rows = [{"question": f"Question {i} of some words?", "answerKey": rng.choice("AB"),
             "choices": {"text": rng.sample(words, 2), "label": ["A", "B"]}} for i in range(30)]
    return str(write_rows(tmp_path / "rows", "arc_easy", rows))


def refuses(capsys, *argv: str) -> str:
    """What evaluate.py says when it refuses; one sentence, exit code 2."""
    with pytest.raises(SystemExit) as ended:
        evaluate.main(list(argv))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.startswith("evaluate.py: error: "), message
    assert message.count("\n") == 1, "a refusal is one line"
    return message


def test_a_run_writes_its_scores_settings_and_rows(checkpoint, arc_data, tmp_path, capsys):
    file = tmp_path / "run.json"
    evaluate.main([checkpoint("a", max_position_embeddings=8), "--tasks", "arc_easy",
                   "--data", arc_data, "--json", str(file), "--limit", "20"])
    run = json.loads(file.read_text())
    rows = [json.loads(row) for row in file.with_suffix(".jsonl").read_text().splitlines()]
    result = run["tasks"]["arc_easy"]
    assert result["n"] == len(rows) == 20 and result["amd"] == 0.4364
    assert result["acc"] == sum(row["acc"] for row in rows) / 20
    assert result["cut"] == 40, "contexts longer than the model's 8 tokens are counted"
    assert (run["settings"]["bos"], run["settings"]["max_len"]) == (False, 8)
    assert result["sha256"] == evaluate.fingerprint(
        [pair for question in build(Path(arc_data), "arc_easy", limit=20)
         for pair in question.requests])
    assert "0.4364" in capsys.readouterr().out


def test_runs_whose_names_hold_a_dot_keep_their_rows_apart(checkpoint, arc_data, tmp_path):
    for name in ("top-0.5", "top-0.7"):
        evaluate.main([checkpoint("a"), "--tasks", "arc_easy", "--data", arc_data,
                       "--json", str(tmp_path / name), "--limit", "3"])
    assert len((tmp_path / "top-0.5.jsonl").read_text().splitlines()) == 3
    assert (tmp_path / "top-0.7.jsonl").exists() and not (tmp_path / "top-0.jsonl").exists()


def test_what_no_task_can_score_is_found_before_any_is_scored(
        checkpoint, arc_data, tokenizer, monkeypatch, capsys):
    write_rows(Path(arc_data), "piqa", [ROWS["piqa"][0]])
    monkeypatch.setattr(evaluate, "score", lambda *_: pytest.fail("scored before all were read"))
    whole = evaluate.encode

    def encode(question, *rest):
        if "piqa" in question.place:
            raise ValueError("nothing is left to score")
        return whole(question, *rest)
    monkeypatch.setattr(evaluate, "encode", encode)
    assert "nothing is left to score" in refuses(
        capsys, checkpoint("a"), "--tasks", "arc_easy,piqa", "--data", arc_data)


def test_the_perplexity_of_a_hopeless_model_is_a_number():
    question = Question([("c", " word")], ["word"], 0)
    assert grade("lambada_openai", [question], [[(-1e6, False)]])[0]["perplexity"] > 1e300


def test_comparing_pairs_the_rows_and_refuses_what_was_measured_differently(
        checkpoint, arc_data, tmp_path, capsys):
    files = {name: str(tmp_path / f"{name}.json") for name in ("a", "b", "short", "fewer")}
    task = ["--tasks", "arc_easy", "--data", arc_data]
    a, b = checkpoint("a"), checkpoint("b", num_hidden_layers=1)
    evaluate.main([a, *task, "--json", files["a"]])
    evaluate.main([b, *task, "--json", files["b"]])
    evaluate.main([b, *task, "--json", files["fewer"], "--limit", "7"])
    evaluate.main([checkpoint("c", max_position_embeddings=32), *task, "--json", files["short"]])
    capsys.readouterr()
    evaluate.main(["compare", files["a"], files["b"]])
    name, *cells = capsys.readouterr().out.splitlines()[-1].split()
    x, y = ([json.loads(row)["acc"] for row in Path(files[key]).with_suffix(".jsonl").open()]
            for key in "ab")
    only_a, only_b = sum(p > q for p, q in zip(x, y)), sum(p < q for p, q in zip(x, y))
    change = [q - p for p, q in zip(x, y)]
    assert name == "arc_easy" and only_a + only_b > 0, "these two should differ somewhere"
    assert [float(cell) for cell in cells] == pytest.approx([
        sum(x) / 30, sum(y) / 30, sum(change) / 30, statistics.stdev(change) / math.sqrt(30),
        only_a, only_b, evaluate.mcnemar(only_a, only_b)], abs=1e-4)
    assert "max_len is 64" in refuses(capsys, "compare", files["a"], files["short"])
    assert "sha256" in refuses(capsys, "compare", files["a"], files["fewer"])
    run = json.loads(Path(files["b"]).read_text())
    run["settings"]["max_new_tokens"] = 4
    Path(files["fewer"]).write_text(json.dumps(run))
    Path(files["fewer"]).with_suffix(".jsonl").write_text(
        Path(files["b"]).with_suffix(".jsonl").read_text())
    assert "max_new_tokens is None" in refuses(capsys, "compare", files["a"], files["fewer"])
    rows = Path(files["b"]).with_suffix(".jsonl")
    rows.write_text("".join(rows.read_text().splitlines(keepends=True)[:7]))
    assert "7 rows of arc_easy" in refuses(capsys, "compare", files["a"], files["b"])


def test_held_out_documents_of_prepared_data_are_scored_by_source(
        checkpoint, tokenizer, tmp_path, capsys):
    for source in ("one", "two"):
        (tmp_path / f"{source}.jsonl").write_text("".join(
            json.dumps({"text": f"Document {i} of source {source}."}) + "\n" for i in range(40)))
    prepare([f"one={tmp_path}/one.jsonl", f"two={tmp_path}/two.jsonl"], tokenizer,
            tmp_path / "data", val_fraction=0.3)
    texts = evaluate.held_out(str(tmp_path / "data"))
    assert set(texts) == {"one", "two"}
    assert all(re.fullmatch(r"Document \d+ of source one\.", text) for text in texts["one"])
    file = tmp_path / "bits.json"
    evaluate.main([checkpoint("a"), "--data", str(tmp_path / "data"), "--json", str(file)])
    result = json.loads(file.read_text())["texts"]
    assert result["two"]["bytes"] == len("".join(texts["two"]).encode())
    assert result["two"]["documents"] == len(texts["two"]) > 0
    prepare([f"one={tmp_path}/one.jsonl"], tokenizer, tmp_path / "none", val_fraction=0)
    assert "holds no validation text" in refuses(
        capsys, checkpoint("a"), "--data", str(tmp_path / "none"))


def test_humaneval_measures_both_decoders_and_runs_nothing_unasked(
        checkpoint, tmp_path, capsys, monkeypatch):
    (tmp_path / "humaneval").mkdir()
    problems = [{"task_id": f"Test/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}",
                 "canonical_solution": "    return 1\n",
                 "test": f"def check(f):\n    assert f({i}) == 1\n"} for i in range(3)]
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, problems)).encode()))
    argv = ["humaneval", "--target", checkpoint("t"), "--draft", checkpoint("d"), "--data",
            str(tmp_path), "--max-new-tokens", "12", "--batch", "2",
            "--json", str(tmp_path / "run.json")]
    monkeypatch.setattr(evaluate, "run_program", lambda *_: pytest.fail("code was run unasked"))
    evaluate.main(argv)
    out, run = capsys.readouterr().out, json.loads((tmp_path / "run.json").read_text())
    assert "greedy completions equal with and without the draft: 3 of 3" in out
    # The draft is the target: only a draft cut off at the end of a text is not accepted.
    assert run["tasks"]["greedy speculative"]["accepted_per_drafted"] > 0.5
    assert "pass@1" not in run["tasks"]["greedy alone"] and "--allow-code-execution" in out

    monkeypatch.undo()
    write = evaluate.write_programs
    monkeypatch.setattr(evaluate, "write_programs", lambda prompts, tokenizer, *rest, **sampling: [
        (["    return 1\n" if "def f1" in tokenizer.decode(prompt) else "    return 2\n"
          for prompt in prompts], stats)
        for _, stats in write(prompts, tokenizer, *rest, **sampling)])
    evaluate.main([*argv, "--allow-code-execution", "--samples", "10"])
    run = json.loads((tmp_path / "run.json").read_text())
    alone, helped = run["tasks"]["sampled alone"], run["tasks"]["sampled speculative"]
    assert helped["speedup"] == helped["tokens_per_s"] / alone["tokens_per_s"]
    for name in ("greedy alone", "sampled speculative"):
        assert math.isclose(run["tasks"][name]["pass@1"], 1 / 3), f"{name}: one of three is right"
    assert math.isclose(run["tasks"]["sampled alone"]["pass@10"], 1 / 3)


def test_a_program_ends_before_its_stop_string_and_at_eos(tokenizer, tiny, monkeypatch):
    """What a Decoder is asked for and what becomes of it: here one that always writes this text."""
    text, asked, given = tokenizer.encode("    return 1\n\ndef g(): pass\n\nx"), [], []

    class Writer:
        def __init__(self, *args, **settings):
            pass

        def generate(self, prompts, max_new_tokens, eos_id=None, seed=0, stats=None, stop=None):
            if stats is None:           # to warm up
                return
            asked.append((prompts, max_new_tokens, eos_id, seed))
            for i in range(len(text)):
                given.append(text[i])
                yield Round([[text[i]] for _ in prompts], [], [])
                if stop(text[:i + 1]):
                    break

    monkeypatch.setattr(evaluate, "Decoder", Writer)
    settings = argparse.Namespace(batch=2, max_new_tokens=50, gamma=3, graphs=False, seed=7)
    [(programs, _)] = evaluate.write_programs(
        [[1, 2], [3], [4]], tokenizer, settings, tiny(), [None])
    assert programs == ["    return 1\n"] * 3
    assert asked == [([[1, 2], [3]], 50, tokenizer.eos_id, 7), ([[4]], 50, tokenizer.eos_id, 9)], \
        "each batch needs seeds of its own: row b of one draws from seed + b"
    assert len(given) < 2 * len(text), "what follows a stop string was written, for nothing"


def test_a_long_prompt_keeps_its_end_behind_bos_and_is_counted(
        checkpoint, tokenizer, tmp_path, capsys, monkeypatch):
    (tmp_path / "humaneval").mkdir()
    prompts = ["def short():\n", "# a long comment\n" * 40 + "def long():\n"]
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(gzip.compress("\n".join(
        json.dumps({"task_id": str(i), "prompt": prompt, "entry_point": "f", "test": ""})
        for i, prompt in enumerate(prompts)).encode()))
    asked = []
    monkeypatch.setattr(evaluate, "write_programs", lambda prompts, *_, **sampling: (
        asked.append(prompts), [(["    pass"] * len(prompts), evaluate.Stats())])[1])
    load = evaluate.load

    def load_with_bos(*args):
        model, tokenizer = load(*args)
        tokenizer.bos_id = 7
        return model, tokenizer
    monkeypatch.setattr(evaluate, "load", load_with_bos)
    evaluate.main(["humaneval", "--target", checkpoint("t"), "--data", str(tmp_path), "--bos",
                   "--json", str(tmp_path / "run.json")])
    short, long = map(tokenizer.encode, prompts)
    assert asked[0] == [[7, *short], [7, *long[-48:]]], "three quarters of a context of 64"
    assert "1 prompts have more than 48 tokens" in capsys.readouterr().out
    assert json.loads((tmp_path / "run.json").read_text())["tasks"]["greedy alone"]["cut"] == 1


def test_programs_count_as_caged_only_if_all_were(monkeypatch):
    monkeypatch.setattr(evaluate, "run_program", lambda program, *_: (True, program != "p2"))
    problems = [{"prompt": "p", "test": "", "entry_point": "f"}] * 3
    assert evaluate.judge(problems, ["0", "1", "2"]) == ([1, 1, 1], False)
    assert evaluate.judge(problems, ["0", "1", "3"]) == ([1, 1, 1], True)


def test_what_was_scored_before_a_failure_is_kept(checkpoint, arc_data, tmp_path, monkeypatch):
    write_rows(Path(arc_data), "piqa", [ROWS["piqa"][0]])
    whole = evaluate.score

    def score_arc(model, requests, title):
        if title == "piqa":
            raise KeyboardInterrupt
        return whole(model, requests, title)
    monkeypatch.setattr(evaluate, "score", score_arc)
    with pytest.raises(SystemExit) as ended:
        evaluate.main([checkpoint("a"), "--tasks", "arc_easy,piqa", "--data", arc_data,
                       "--json", str(tmp_path / "run.json")])
    assert ended.value.code == 130
    assert json.loads((tmp_path / "run.json").read_text())["tasks"]["arc_easy"]["n"] == 30
    assert len((tmp_path / "run.jsonl").read_text().splitlines()) == 30


def test_runs_are_drawn_as_svg(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="matplotlib (the extra `plot`) is not installed")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(
        json.dumps({"tokens": 100 * i, "loss": 9.0 / i} | (
            {"val_bits_per_byte": 3.0 / i} if i % 2 else {})) + "\n" for i in range(1, 9)))
    for gamma in (1, 3):
        (tmp_path / f"{gamma}.json").write_text(json.dumps({
            "gamma": gamma, "speedup": 1.0 + gamma, "temperature": 0.0,
            "sampled": {"gamma": gamma, "speedup": 1.5, "temperature": 0.8}}))
    argv = ["plot", *(str(tmp_path / name) for name in ("run", "1.json", "3.json"))]
    pictures = []
    for out in (str(tmp_path / "one.svg"), str(tmp_path / "two.svg")):
        evaluate.main([*argv, "--out", out])
        pictures.append(Path(out).read_bytes())
    assert pictures[0] == pictures[1], "the same runs must give the same file"
    for label in (b"training loss", b"held-out bits per byte", b"speed-up", b"gamma", b"sampled"):
        assert b"<!-- " + label in pictures[0], f"the picture lacks {label.decode()}"


@pytest.mark.parametrize("content, complaint", [
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n{"go',
     "valid.jsonl:2 is not a row of piqa"),
    ('{"goal": "g", "sol1": "a", "label": 0}\n', "valid.jsonl:1 is not a row of piqa"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}\n', "valid.jsonl:1 is not a row"),
    ('{"goal": "g", "sol1": "", "sol2": "b", "label": 0}\n', "valid.jsonl:1 is not a row"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 1.0}\n', "valid.jsonl:1 is not a row"),
    ("[1, 2]\n", "valid.jsonl:1 is not a row of piqa"),
    ("[" * 100000, "valid.jsonl:1 is not a row of piqa"),
    ("", "valid.jsonl:1 is not a row of piqa"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n"\xff"',
     "valid.jsonl:2 is not a row of piqa"),
])
def test_a_malformed_row_is_named(content, complaint, checkpoint, tmp_path, capsys):
    (tmp_path / "rows" / "piqa").mkdir(parents=True)
    (tmp_path / "rows" / "piqa" / "valid.jsonl").write_bytes(content.encode("latin-1"))
    assert complaint in refuses(capsys, checkpoint("a"), "--tasks", "piqa",
                                "--data", str(tmp_path / "rows"))


@pytest.mark.parametrize("argv, complaint", [
    (["CHECKPOINT", "--tasks", "sudoku", "--data", "ROWS"], "unknown task 'sudoku': expected all"),
    (["CHECKPOINT", "--tasks", "mmlu", "--data", "ROWS"], "python data.py fetch mmlu"),
    (["CHECKPOINT", "--tasks", "arc_easy"], "--tasks needs --data DIR"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--bos"], "has no BOS token"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--shots", "2"], "*train*.jsonl"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--shots", "-1"], "--shots is -1"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--json", "run.jsonl"], "in .jsonl"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--json", "nowhere/run.json"],
     "'nowhere/run.json' cannot be written (No such file or directory): expected the name of a"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--json", "/proc/run.json"],
     "'/proc/run.json' cannot be written"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--json", "ROWS"],
     "(it is a folder or a device)"),
    (["CHECKPOINT", "--text", "nothing.txt"], "nothing.txt"),
    (["nowhere", "--tasks", "arc_easy", "--data", "ROWS"], "nowhere"),
    (["CHECKPOINT", "--colour"], "unrecognized arguments: --colour"),
    (["CHECKPOINT", "--limit", "ten"], "invalid positive value: 'ten'"),
    (["CHECKPOINT", "--limit", "0"], "0 is less than 1"),
    (["humaneval", "--target", "CHECKPOINT", "--data", "ROWS"], "HumanEval.jsonl.gz is not"),
    (["compare", "a.json", "b.json"], "a.json"),
    (["plot", "nowhere"], "nowhere"),
    (["plot", "OTHER"], "(KeyError('temperature'))"),
    (["plot", "AUTO"], "(ValueError(\"could not convert string to float: 'auto'\"))"),
    (["plot", "EMPTY"], "no step is logged there yet"),
    (["plot", "AUTO", "--out", "nowhere/plot.svg"], "'nowhere/plot.svg' cannot be written"),
    (["plot", "BROKEN"], "broken.json is not a folder of train.py, or what"),
    (["compare", "OTHER", "BROKEN"], "broken.json with its .jsonl is not what"),
    (["compare", "OTHER", "AUTO"], "(KeyError('settings'))"),
    (["compare", "OTHER", "OTHER"], "no task in common"),
])
def test_a_mistake_gets_one_sentence(argv, complaint, checkpoint, arc_data, capsys):
    names = {"CHECKPOINT": checkpoint("a"), "ROWS": arc_data}
    settings = {"bos": False, "dtype": "float32", "max_len": 64}
    for name, content in (("other", json.dumps({"settings": settings})), ("broken", "{"),
                          ("auto", '{"gamma": "auto", "speedup": 2.0, "temperature": 0.0}')):
        names[name.upper()] = str(Path(arc_data) / f"{name}.json")
        Path(names[name.upper()]).write_text(content)
        Path(names[name.upper()]).with_suffix(".jsonl").write_text("")
    names["EMPTY"] = str(Path(arc_data) / "run")
    (Path(arc_data) / "run").mkdir(exist_ok=True)
    (Path(arc_data) / "run" / "metrics.jsonl").write_text("")
    assert complaint in refuses(capsys, *(names.get(word, word) for word in argv))


@pytest.mark.parametrize("content", [
    b"", b"no gzip", gzip.compress(b""), gzip.compress(b"{"), gzip.compress(b"[1]"),
    gzip.compress(b"[1]")[:10] + b"\xff" * 20,
    gzip.compress(b'{"prompt": "p", "test": "t", "entry_point": "e"}')])
def test_a_broken_file_of_problems_is_named(content, checkpoint, tmp_path, capsys):
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(content)
    assert "HumanEval.jsonl.gz is not gzipped JSONL of problems" in refuses(
        capsys, "humaneval", "--target", checkpoint("a"), "--data", str(tmp_path))


def test_a_model_that_knows_fewer_tokens_than_its_tokenizer_is_refused(
        tiny, tokenizer, arc_data, tmp_path, capsys):
    tiny(torch.float32, vocab_size=100).save_pretrained(tmp_path / "small")
    tokenizer.save(tmp_path / "small")
    assert "the model 100: use the tokenizer" in refuses(
        capsys, str(tmp_path / "small"), "--tasks", "arc_easy", "--data", arc_data)


# ---------------------------------------------------------------------------- against the harness

HARNESS_FILES = {
    "sciq": "sciq/sciq.yaml", "winogrande": "winogrande/default.yaml", "piqa": "piqa/piqa.yaml",
    "wsc": "super_glue/wsc/default.yaml", "mmlu": "mmlu/default/mmlu_high_school_physics.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml", "arc_easy": "arc/arc_easy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml", "logiqa": "logiqa/logiqa.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml"}


@pytest.fixture(scope="module")
def harness():
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    return pytest.importorskip("lm_eval", reason="lm_eval (the extra `peers`) is not installed")


@pytest.mark.slow
@pytest.mark.parametrize("shots", [0, 2])
@pytest.mark.parametrize("name", TASKS)
def test_the_harness_itself_makes_the_same_requests(name, shots, harness, tmp_path):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    config = load_yaml(Path(harness.__file__).parent / "tasks" / HARNESS_FILES[name])
    row = ROWS[name][0] | ({"span1_text": "The dog"} if name == "wsc" else {})  # mended by the Hub
    text = next(key for key in ("text", "sentence", "goal", "question", "ctx_a") if key in row)
    rows = [row | {text: f"{row[text]} {i}"} for i in range(8)]
    ours = {"mmlu": ["test", "dev"], "lambada_openai": ["test"]}.get(
        name, [TASKS[name].split.split("|")[0], "train"])
    theirs = [config.get("test_split") or config["validation_split"],
              config.get("fewshot_split") or config.get("training_split") or "test"]
    for split in ours:
        write_rows(tmp_path, name, rows, split)
    task = ConfigurableTask(config=config | {
        "num_fewshot": shots,
        "custom_dataset": lambda **_: {split: Dataset.from_list(rows) for split in theirs}})
    task.set_fewshot_seed(1234)
    task.build_all_requests()
    expected = [instance.args for instance in task.instances]
    found = [pair for question in build(tmp_path, name, shots) for pair in question.requests]
    assert found == expected, f"{name} with {shots} shots differs from the harness"


@pytest.mark.slow
@pytest.mark.parametrize("bos", [False, True])
def test_the_harness_finds_the_same_likelihoods_and_accuracies(bos, harness, tiny, tmp_path):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    if "LLAMA2_TOKENIZER" not in os.environ:
        pytest.skip("LLAMA2_TOKENIZER is not set: a tokenizer.model, which has a BOS token")
    tokenizer = load_tokenizer(os.environ["LLAMA2_TOKENIZER"])
    model = tiny(torch.float32, vocab_size=32000, max_position_embeddings=128, bos_token_id=1,
                 eos_token_id=2)
    model.lm_head.weight.data.mul_(0.1)     # likelihoods of a real model's size, not of noise's
    model.save_pretrained(tmp_path / "model")
    tokenizer.save(tmp_path / "model")

    class Harness(HFLM):
        def tok_encode(self, string, add_special_tokens=None, **_):
            tokens = self.tokenizer.encode(string, add_special_tokens=False)
            return [1] * (bos and add_special_tokens is not False) + tokens

    theirs = Harness(pretrained=str(tmp_path / "model"), device="cpu", dtype="float32",
                     batch_size=4)
    for name in TASKS:
        rows = [ROWS[name][0]] * 2
        if "EVAL_DATA" in os.environ and (EVAL_DATA / name).exists():
            questions = build(EVAL_DATA, name, limit=20)
        else:
            questions = build(write_rows(tmp_path, name, rows), name)
        ours = score(model, [encode(x, tokenizer, bos, 128)[0] for x in questions])
        pairs = [pair for question in questions for pair in question.requests]
        results = iter(theirs.loglikelihood(
            [Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True))
        results = [[next(results) for _ in question.requests] for question in questions]
        for (a, greedy), (b, is_greedy) in zip(itertools.chain(*ours), itertools.chain(*results)):
            assert abs(a - b) < 1e-4, f"{name}, BOS {bos}: {a} here, {b} in the harness"
            assert greedy == is_greedy
        assert grade(name, questions, ours)[0]["acc"] == grade(name, questions, results)[0]["acc"]

    if not bos:     # with BOS the harness scores BOS itself as a token of the text; we never do
        text = "A text that is longer than the context.  It has\ntwo lines, and words: " * 8
        [nats] = theirs.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
        result, _ = evaluate.measure(model, tokenizer, "text", [text])
        words, size = len(re.split(r"\s+", text)), len(text.encode())
        assert math.isclose(result["word_perplexity"], math.exp(-nats / words), rel_tol=1e-5)
        assert math.isclose(result["byte_perplexity"], math.exp(-nats / size), rel_tol=1e-5)
        assert math.isclose(result["bits_per_byte"], -nats / size / math.log(2), rel_tol=1e-5)
