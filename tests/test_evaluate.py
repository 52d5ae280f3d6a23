"""Claims about evaluate.py: the protocol, the scoring, the statistics, the command line.

The protocol is held against golden.json (what lm-evaluation-harness did with the files in
EVAL_DATA) and, where the package lm_eval is there, against the harness itself.
"""
import gzip
import hashlib
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
from model import save_checkpoint
from evaluate import TASKS, Question, Request, encode, grade, read_questions, score, windows

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


def write_rows(folder: Path, name: str, rows: list[dict], file: str | None = None) -> Path:
    file = file or f"{TASKS[name].split.split('|')[0]}.jsonl"
    (folder / name).mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / name / file).write_bytes(gzip.compress(content) if file.endswith(".gz") else content)
    return folder


def pseudo_random(context: str, continuation: str) -> tuple[float, bool]:
    """The log-likelihoods behind golden.json's scores."""
    digest = hashlib.sha256((context + "\0" + continuation).encode()).hexdigest()
    value = -1 - 99 * int(digest[:13], 16) / 16**13
    return value, value > -50


# ---------------------------------------------------------------------------------- the protocol

@needs_data
@pytest.mark.parametrize("name", ["sciq", "winogrande", "piqa", "lambada_openai", "arc_easy"])
def test_requests_and_scores_equal_the_harness(name, tiny, tokenizer, tmp_path, monkeypatch):
    golden = json.loads((EVAL_DATA / "golden.json").read_text())[f"{name}@0shot"]
    questions = read_questions(EVAL_DATA, name)
    pairs = [pair for question in questions for pair in question.requests]
    assert len(pairs) == golden["requests"]
    monkeypatch.setattr(evaluate, "load", lambda *_: (tiny(), tokenizer))
    monkeypatch.setattr(evaluate, "encode", lambda question, *_: [
        Request((1, 2), 1) for _ in question.requests])
    monkeypatch.setattr(evaluate, "score", lambda *_: [pseudo_random(*pair) for pair in pairs])
    evaluate.main(["-", "--tasks", name, "--data", str(EVAL_DATA), "--json", str(tmp_path / "r")])
    report = json.loads((tmp_path / "r").read_text())
    result, rows = report["tasks"][name], report["rows"]
    result["perplexity"] = result.get("ppl")
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
    [question] = read_questions(write_rows(tmp_path, name, [row]), name)
    assert question.requests == requests, f"the prompt of {name} differs from the protocol's"
    assert question.gold == gold


def test_a_wsc_span_that_is_no_substring_and_cannot_be_mended_stays_as_it_is():
    row = ROWS["wsc"][0] | {"span1_text": "Kamenev and Zinoviev"}
    assert '"*Kamenev and Zinoviev*"' in TASKS["wsc"].prompt(row).requests[0][0]


@pytest.mark.parametrize("name, file", [
    ("hellaswag", "hellaswag_val.jsonl"), ("piqa", "valid.jsonl"), ("piqa", "val.jsonl"),
    ("piqa", "validation.jsonl.gz"), ("winogrande", "winogrande_xl_validation.jsonl"),
    ("arc_easy", "ARC-Easy-Test.jsonl"), ("lambada_openai", "lambada_test.jsonl"),
    ("mmlu", "test.jsonl.gz"), ("sciq", "validation.jsonl"), ("sciq", "test.jsonl")])
def test_files_are_found_under_the_names_of_their_authors(name, file, tmp_path):
    write_rows(tmp_path, name, [ROWS[name][0]] * 2, file)
    for other in ("train.jsonl", "evaluation.jsonl", "latest.jsonl", "val-notes.txt", "test.json",
                  "._val.jsonl", "._test.jsonl", "test.jsonl.tmp", "val.jsonl.bak"):
        (tmp_path / name / other).write_text("no rows")
    assert len(read_questions(tmp_path, name)) == 2


def test_two_files_for_one_split_are_refused(tmp_path):
    write_rows(tmp_path, "piqa", [ROWS["piqa"][0]], "val.jsonl")
    write_rows(tmp_path, "piqa", [ROWS["piqa"][0]], "my_val.jsonl.gz")
    with pytest.raises(ValueError, match="piqa holds 2 files named .*val.*, expected one"):
        read_questions(tmp_path, "piqa")


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    row = json.dumps(ROWS["piqa"][0])
    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "val.jsonl").write_text(f"\n{row}\n\n  \n{row}\r\n\n")
    places = [question.place.rsplit(":", 1)[1] for question in read_questions(tmp_path, "piqa")]
    assert places == ["2", "5"]


# ------------------------------------------------------------------------------ tokens and windows

@pytest.fixture(scope="module")
def tokenizer():
    """512 entries, learnt from this file."""
    return train_bpe([Path(__file__).read_text()], 512)


def scored(request: Request) -> tuple:
    return request.tokens[request.start:]


def test_the_continuation_is_what_the_context_leaves_of_the_whole(tokenizer):
    question = Question([("A context ", "of words"), ("", "words")], ["of words", "words"], 0)
    request, alone = encode(question, tokenizer, False, max_len=100)
    assert list(request.tokens) == tokenizer.encode("A context of words")
    assert list(scored(request)) == tokenizer.encode(" of words"), \
        "the space belongs to what follows it"
    assert list(alone.tokens) == [tokenizer.eos_id, *tokenizer.encode("words")], \
        "no context: one EOS"
    assert alone.start == 1


def test_bos_is_prepended_only_when_asked_for(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "bos_id", 7)
    question = Question([("A context", " of words"), ("", "words")], ["of words", "words"], 0)
    plain = list(encode(question, tokenizer, False, 100))
    with_bos = list(encode(question, tokenizer, True, 100))
    assert with_bos[0].tokens == (7, *plain[0].tokens)
    assert scored(with_bos[0]) == scored(plain[0])
    assert with_bos[1] == plain[1] == Request((7, *tokenizer.encode("words")), 1)


def test_what_is_too_long_loses_its_beginning_and_is_counted(tokenizer):
    question = Question([("A much too long context", " of words")], ["of words"], 0)
    whole = tuple(tokenizer.encode("A much too long context of words"))
    ending = len(tokenizer.encode(" of words"))
    fits = len(whole) - 1               # the last token is predicted, but not read
    for max_len in (fits + 1, fits, fits - 1, ending, ending - 1):
        [request] = encode(question, tokenizer, False, max_len)
        assert request.tokens == whole[-(max_len + 1):]
        assert len(scored(request)) == min(ending, max_len)
        assert request.lost == max(0, fits - max_len), f"{len(whole)} tokens in {max_len}"


def test_a_token_that_spans_the_join_is_an_error_that_names_the_row(tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "encode", lambda text: [1, 2])
    with pytest.raises(ValueError, match="rows.jsonl:3: the last token of the context"):
        list(encode(Question([("a", " b")], ["b"], 0, "rows.jsonl:3"), tokenizer, False, 10))


def test_rolling_windows_are_those_of_the_protocol():
    x = "x"
    assert [(request.tokens, scored(request)) for request in windows(list(range(10)), x, 4)] == [
        ((x, 0, 1, 2, 3), (0, 1, 2, 3)), ((3, 4, 5, 6, 7), (4, 5, 6, 7)), ((5, 6, 7, 8, 9), (8, 9))]


@pytest.mark.parametrize("max_len", [1, 3, 7])
def test_rolling_windows_score_each_token_once(max_len):
    for n in range(20):
        requests = list(windows(list(range(n)), -1, max_len))
        assert [token for request in requests for token in scored(request)] == list(range(n))
        assert all(len(x.tokens) <= max_len + 1 and x.start > 0 for x in requests)
        assert all(len(x.tokens) == max_len + 1 for x in requests[1:]), "a context is not full"


# ------------------------------------------------------------------------------------ the scoring

def score_one_by_one(model, request: Request) -> tuple[float, bool]:
    """The definition: one request, one forward pass, one sum."""
    targets = torch.tensor(scored(request))
    with torch.inference_mode():
        logits = model(torch.tensor([request.tokens[:-1]]))[0, request.start - 1:].float()
    logp = logits.log_softmax(-1)[range(len(targets)), targets]
    return float(logp.double().sum()), bool((logits.argmax(-1) == targets).all())


def random_requests(rng: random.Random, vocabulary: int, max_len: int) -> list[Request]:
    requests = []
    for _ in range(60):
        context = [rng.randrange(vocabulary) for _ in range(rng.randrange(1, max_len))]
        for _ in range(rng.randrange(1, 6)):
            ending = [rng.randrange(vocabulary) for _ in range(rng.randrange(1, 9))]
            tokens = tuple((context + ending)[-(max_len + 1):])
            requests.append(Request(tokens, max(1, len(tokens) - len(ending))))
    return requests


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_batched_scores_equal_one_request_at_a_time(tiny, kv_heads):
    model = tiny(num_key_value_heads=kv_heads)
    requests = random_requests(random.Random(0), 61, 40)
    # Two that differ in their last token, one of which is the likeliest.
    context = requests[0].tokens[:5]
    best = int(model(torch.tensor([context]))[0, -1].argmax())
    requests += [Request((*context, best), 5), Request((*context, (best + 1) % 61), 5)]
    requests += requests[:9]                            # some stand there twice
    results = score(model, requests)
    assert [hit for _, hit in results[-11:-9]] == [True, False]
    for request, (logp, greedy) in zip(requests, results):
        expected, hit = score_one_by_one(model, request)
        # float64 up to the last step, whose log-softmax is float32: 1e-5 of about -100.
        assert math.isclose(logp, expected, abs_tol=1e-5), \
            "batching or padding changed a likelihood: look at score()"
        assert greedy == hit


def test_no_batch_is_padded_beyond_the_budget(tiny, monkeypatch):
    """Rows of 1 to 300 tokens: a batch as wide as its longest row must count that width."""
    model, shapes = tiny(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens: (shapes.append(tokens.shape),
                                                         hidden(tokens))[1])
    requests = random_requests(random.Random(1), 61, 300)
    score(model, requests)
    assert len(shapes) > 1
    assert all(rows * width <= 512 or rows == 1 for rows, width in shapes), shapes
    assert sum(rows * width for rows, width in shapes) < 1.3 * sum(
        len(request.tokens) for request in requests), "rows of unlike lengths share a batch"


def test_requests_that_differ_in_the_last_token_share_one_row(tiny, monkeypatch):
    model, read = tiny(), []
    hidden = model.hidden
    monkeypatch.setattr(model, "hidden", lambda tokens: (read.append(tokens.numel()),
                                                         hidden(tokens))[1])
    score(model, [Request((*range(30), letter), 30) for letter in (40, 41, 42, 43)])
    assert read == [30], f"four letters behind one context read {read} tokens, not its 30 once"


def test_likelihoods_that_are_no_numbers_are_refused(tiny):
    model = tiny(torch.float32)
    model.lm_head.weight.data[7] = float("nan")     # a text may overflow where another does not
    with pytest.raises(ValueError, match="piqa: a log-likelihood is not a finite number"):
        score(model, [Request((1, 2, 3), 2)], "piqa")


def test_bits_per_byte_follow_from_the_likelihood_of_each_token(tiny, tokenizer):
    model = tiny(vocab_size=512, max_position_embeddings=16)
    texts = ["A first document, rather longer than\nthe context of 16.  " * 3, "Ünïcode", "x"]
    result = evaluate.measure(model, tokenizer, "texts", texts)
    nats = 0.0
    for text in texts:
        tokens = (tokenizer.eos_id, *tokenizer.encode(text))
        for start in range(1, len(tokens), 16):
            end = min(start + 16, len(tokens))
            window = tokens[max(0, end - 17):end]
            nats -= score_one_by_one(model, Request(window, len(window) - end + start))[0]
    size = len("".join(texts).encode())
    words = sum(len(re.split(r"\s+", text)) for text in texts)
    assert math.isclose(result["nats"], nats, rel_tol=1e-6)
    assert math.isclose(result["bits_per_byte"], nats / size / math.log(2), rel_tol=1e-6)
    assert math.isclose(result["word_ppl"], math.exp(nats / words), rel_tol=1e-5)
    assert result["documents"] == 3 and result["bytes"] == size


def test_bits_per_byte_of_a_fair_coin_for_each_bit_are_eight():
    assert math.isclose(evaluate.bits_per_byte(100 * 8 * math.log(2), 100), 8.0)


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



def test_ties_go_to_the_first_and_lengths_are_characters():
    question = Question([("c", " aaaa"), ("c", " b")], ["aaaa", "b"], 0)
    [row] = grade([question], [(-2.0, False), (-2.0, False)])[1]
    assert (row["acc"], row["acc_norm"]) == (1, 1), "-2/4 beats -2/1, and the first of equals wins"
    [row] = grade([question], [(-2.0, False), (-1.0, False)])[1]
    assert (row["acc"], row["acc_norm"]) == (0, 1)


def test_chance_the_best_constant_and_a_constant_answer_stand_beside_the_score():
    questions = [Question([("c", " no"), ("c", " yes")], ["no", "yes"], gold)
                 for gold in (1, 0, 0, 0)]
    always_yes = [(-2.0, False), (-1.0, False)] * 4
    result, _ = grade(questions, always_yes)
    assert (result["acc"], result["chance"], result["best_constant"]) == (0.25, 0.5, 0.75)
    assert result["always"] == "yes", "a model that says yes to everything must be reported"
    result, _ = grade(questions, always_yes[:6] + [(-1.0, False), (-2.0, False)])
    assert result["always"] == ""


def test_a_last_word_is_right_if_it_is_the_likeliest_and_cannot_be_guessed():
    questions = [Question([("c", " " + word)], [word], 0) for word in "abcd"]
    result, rows = grade(questions, [(-1.0, True), (-1.0, False), (-9.0, True),
                                     (-1.0, False)])
    assert [row["acc"] for row in rows] == [1, 0, 1, 0]
    assert (result["acc"], result["chance"], result["best_constant"]) == (0.5, 0.0, 0.25)


# ------------------------------------------------------------------------------- the command line

@pytest.fixture
def checkpoint(tiny, tokenizer, tmp_path):
    """A folder with a random model and its tokenizer."""
    def make(name: str, **changes) -> str:
        model = tiny(torch.float32, vocab_size=512, eos_token_id=511, **changes)
        save_checkpoint(model, tmp_path / name)
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
    result, rows = run["tasks"]["arc_easy"], run["rows"]
    assert result["n"] == len(rows) == 20 and result["amd"] == 0.4364
    assert result["acc"] == sum(row["acc"] for row in rows) / 20
    assert result["cut"] == 40, "contexts longer than the model's 8 tokens are counted"
    assert (run["settings"]["bos"], run["settings"]["max_len"]) == (False, 8)
    assert result["sha256"] == evaluate.fingerprint(
        [pair for question in read_questions(Path(arc_data), "arc_easy")[:20]
         for pair in question.requests])
    head, line = capsys.readouterr().out.splitlines()
    assert len(head) == len(line), "the columns of the table are not aligned"
    assert dict(zip(head.split(), line.split()[1:]))["amd"] == "0.4364"


def test_a_new_task_is_a_function_and_a_line(checkpoint, tmp_path, monkeypatch, capsys):
    """What the README tells a forker: AMD's figure may be None."""
    task = evaluate.Task(lambda row: evaluate.choose(row["q"], row["choices"], 1), None, "mine")
    monkeypatch.setitem(TASKS, "quiz", task)
    write_rows(tmp_path, "quiz", [{"q": "1 + 1 =", "choices": ["3", "2"]}] * 3, "mine.jsonl")
    evaluate.main([checkpoint("a"), "--tasks", "quiz", "--data", str(tmp_path)])
    assert "None" in capsys.readouterr().out


def test_a_run_s_name_stands_for_its_newest_checkpoint(checkpoint, arc_data, tmp_path, capsys):
    outputs = []
    for step, changes in (("step-000009", {"num_hidden_layers": 1}), ("step-000010", {})):
        checkpoint(f"run/{step}", **changes)
    for folder in ("run", "run/step-000010", "run/step-000009"):
        evaluate.main([str(tmp_path / folder), "--tasks", "arc_easy", "--data", arc_data,
                       "--json", str(tmp_path / "run.json")])
        outputs.append(json.loads((tmp_path / "run.json").read_text())["rows"])
    assert outputs[0] == outputs[1] != outputs[2]


def test_the_perplexity_of_a_hopeless_model_is_a_number():
    assert evaluate.perplexity(1e6, 1) > 1e300


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
    result = json.loads(file.read_text())["tasks"]
    assert result["two"]["bytes"] == len("".join(texts["two"]).encode())
    assert result["two"]["documents"] == len(texts["two"]) > 0
    prepare([f"one={tmp_path}/one.jsonl"], tokenizer, tmp_path / "none", val_fraction=0)
    assert "none holds no text" in refuses(
        capsys, checkpoint("a"), "--data", str(tmp_path / "none"))


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
    run = json.loads((tmp_path / "run.json").read_text())
    assert run["tasks"]["arc_easy"]["n"] == len(run["rows"]) == 30


@pytest.mark.parametrize("content, complaint", [
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n{"go', "val.jsonl:2 is not a row of"),
    ('{"goal": "g", "sol1": "a", "label": 0}\n', "val.jsonl:1 is not a row of piqa"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": -1}\n', "val.jsonl:1 is not a row"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 2}\n', "val.jsonl:1 is not a row"),
    ('{"goal": "g", "sol1": "", "sol2": "b", "label": 0}\n', "val.jsonl:1 is not a row"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": "x"}\n', "val.jsonl:1 is not a row"),
    ("[1, 2]\n", "val.jsonl:1 is not a row of piqa"),
    ("[" * 100000, "val.jsonl:1 is not a row of piqa"),
    ("", "val.jsonl:0 is not a row of piqa"),
    ('{"goal": "g", "sol1": "a", "sol2": "b", "label": 0}\n"\xff"', "val.jsonl:2 is not a row"),
])
def test_a_malformed_row_is_named(content, complaint, checkpoint, tmp_path, capsys):
    (tmp_path / "rows" / "piqa").mkdir(parents=True)
    (tmp_path / "rows" / "piqa" / "val.jsonl").write_bytes(content.encode("latin-1"))
    assert complaint in refuses(capsys, checkpoint("a"), "--tasks", "piqa",
                                "--data", str(tmp_path / "rows"))


@pytest.mark.parametrize("argv, complaint", [
    (["CHECKPOINT", "--tasks", "sudoku", "--data", "ROWS"], "unknown task 'sudoku': expected all"),
    (["CHECKPOINT", "--tasks", "mmlu", "--data", "ROWS"], "python data.py fetch mmlu"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--bos"], "has no BOS token"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--json", "nowhere/run.json"],
     "'nowhere/run.json' cannot be written: expected the name of a"),
    (["CHECKPOINT", "--tasks", "arc_easy", "--data", "ROWS", "--json", "ROWS"],
     "/rows' cannot be written: expected the name of a"),
    (["CHECKPOINT", "--text", "nothing.txt"], "nothing.txt"),
    (["CHECKPOINT", "--text", "EMPTY"], "empty.txt holds no text"),
    (["nowhere", "--tasks", "arc_easy", "--data", "ROWS"], "nowhere"),
    (["CHECKPOINT", "--colour"], "unrecognized arguments: --colour"),
    (["CHECKPOINT", "--limit", "ten"], "invalid positive value: 'ten'"),
    (["CHECKPOINT", "--limit", "0"], "invalid positive value: '0'"),
    (["humaneval", "--target", "CHECKPOINT", "--data", "ROWS"], "HumanEval.jsonl.gz:0 is not"),
])
def test_a_mistake_gets_one_sentence(argv, complaint, checkpoint, arc_data, capsys):
    (Path(arc_data) / "empty.txt").write_text("")
    names = {"CHECKPOINT": checkpoint("a"), "ROWS": arc_data,
             "EMPTY": str(Path(arc_data) / "empty.txt")}
    assert complaint in refuses(capsys, *(names.get(word, word) for word in argv))


def test_a_model_that_knows_fewer_tokens_than_its_tokenizer_is_refused(
        tiny, tokenizer, arc_data, tmp_path, capsys):
    save_checkpoint(tiny(torch.float32, vocab_size=100), tmp_path / "small")
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
@pytest.mark.parametrize("name", TASKS)
def test_the_harness_itself_makes_the_same_requests(name, harness, tmp_path):
    from datasets import Dataset
    from lm_eval.api.task import ConfigurableTask
    from lm_eval.tasks._yaml_loader import load_yaml
    config = load_yaml(Path(harness.__file__).parent / "tasks" / HARNESS_FILES[name])
    row = ROWS[name][0] | ({"span1_text": "The dog"} if name == "wsc" else {})  # mended by the Hub
    text = next(key for key in ("text", "sentence", "goal", "question", "ctx_a") if key in row)
    rows = [row | {text: f"{row[text]} {i}"} for i in range(8)]
    splits = [config.get("test_split") or config["validation_split"],
              config.get("fewshot_split") or config.get("training_split") or "test"]
    write_rows(tmp_path, name, rows)
    task = ConfigurableTask(config=config | {
        "num_fewshot": 0,
        "custom_dataset": lambda **_: {split: Dataset.from_list(rows) for split in splits}})
    task.build_all_requests()
    expected = [instance.args for instance in task.instances]
    pairs = [pair for question in read_questions(tmp_path, name) for pair in question.requests]
    assert pairs == expected, f"{name} differs from the harness"


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
    save_checkpoint(model, tmp_path / "model")
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
            questions = read_questions(EVAL_DATA, name)[:20]
        else:
            questions = read_questions(write_rows(tmp_path, name, rows), name)
        ours = score(model, [x for question in questions
                             for x in encode(question, tokenizer, bos, 128)])
        pairs = [pair for question in questions for pair in question.requests]
        results = theirs.loglikelihood(
            [Instance("loglikelihood", {}, pair, 0) for pair in pairs], disable_tqdm=True)
        for (a, greedy), (b, is_greedy) in zip(ours, results):
            assert abs(a - b) < 1e-4, f"{name}, BOS {bos}: {a} here, {b} in the harness"
            assert greedy == is_greedy

    if not bos:     # with BOS the harness scores BOS itself as a token of the text; we never do
        text = "A text that is longer than the context.  It has\ntwo lines, and words: " * 8
        [nats] = theirs.loglikelihood_rolling(
            [Instance("loglikelihood_rolling", {}, (text,), 0)], disable_tqdm=True)
        result = evaluate.measure(model, tokenizer, "text", [text])
        words, size = len(re.split(r"\s+", text)), len(text.encode())
        assert math.isclose(result["word_ppl"], math.exp(-nats / words), rel_tol=1e-5)
        assert math.isclose(result["bits_per_byte"], -nats / size / math.log(2), rel_tol=1e-5)
