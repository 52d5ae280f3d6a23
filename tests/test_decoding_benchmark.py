"""benchmarks/decoding.py: a model in a larger shape, the prediction, the command line."""
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

import data
from model import Cache, ModelConfig, Transformer, save_checkpoint
from speculative import prepare_for_decoding

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "benchmarks"))
import decoding

LARGE = ModelConfig(vocab_size=7, hidden_size=48, intermediate_size=80, num_hidden_layers=5,
                    num_attention_heads=2, num_key_value_heads=2)


# ---------------------------------------------------------------------- a model in a larger shape

def shape_of(model: Transformer) -> list:
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()]


@pytest.mark.parametrize("changes", [{}, {"num_key_value_heads": 2}, {"tie_word_embeddings": True}])
@pytest.mark.parametrize("dtype, tolerance", [(torch.float64, 1e-12), (torch.float32, 2e-5)])
def test_a_model_in_a_larger_shape_has_the_same_logits(tiny, dtype, tolerance, changes):
    # An eps as large as the mean squares: to forget its C/W would show.
    small = tiny(dtype, rms_norm_eps=0.5, **changes)
    large = decoding.embed_in(small, LARGE)
    tokens = torch.randint(61, (3, 17), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, logits = small(tokens), large(tokens)
        cache = Cache(large.config, 3, 17, dtype=dtype)
        first = large(tokens[:, :9], cache)
        cache.advance(9)
        cached = torch.cat((first, large(tokens[:, 9:], cache)), 1)
        fast = prepare_for_decoding(large)(tokens)
    scale = expected.abs().max()
    for name, got in (("without a cache", logits), ("with a cache", cached), ("prepared", fast)):
        error = float((got - expected).abs().max() / scale)
        assert error < tolerance, f"{name}, the logits moved by {error:.1e} of the largest"


def test_a_model_in_a_larger_shape_costs_what_the_shape_costs(tiny):
    """All matrices have the large shape, and no arithmetic is on zeros alone: where the function
    permits it, new entries are random."""
    small = tiny()
    large = decoding.embed_in(small, LARGE)
    plain = Transformer(replace(LARGE, vocab_size=61, num_attention_heads=6,
                                num_key_value_heads=6))
    assert shape_of(large) == shape_of(plain)
    for name, parameter in large.named_parameters():
        zero = name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight"))
        share = float((parameter == 0).double().mean())
        assert zero or share == 0, f"{share:.0%} of {name} is zero"


def test_a_shape_that_is_too_small_is_refused(tiny):
    for shape in (replace(LARGE, hidden_size=24), replace(LARGE, hidden_size=44),
                  replace(LARGE, intermediate_size=40), replace(LARGE, num_hidden_layers=1)):
        with pytest.raises(ValueError, match="does not fit into"):
            decoding.embed_in(tiny(), shape)


# ---------------------------------------------------------------------------------- the prediction

def test_expected_tokens_and_speedup_are_the_papers_formulas():
    for alpha in (0.0, 0.3, 0.9, 1.0):
        want = oracle.expected_tokens(alpha, 5)
        assert decoding.expected_tokens(alpha, 5) == pytest.approx(want)
        predicted = decoding.predicted_speedup(alpha, 5, 0.1, 1.0)
        assert predicted == pytest.approx(want / (5 * 0.1 + 1)), (
            "Theorem 3.8: where verifying costs one step, the cost of a round is G c + 1")


def test_the_prompt_and_the_last_round_enter_the_prediction():
    # 10 plain steps after a prompt of 5; 2 tokens a round of 1.5 after 6, the last one cut by half.
    predicted = decoding.predicted_speedup(1.0, 1, 0.5, 1.0, 10, 5, 6)
    assert predicted == pytest.approx(15 / (6 + 5.25 * 1.5))


def test_the_prediction_is_what_independent_guesses_come_to():
    """A simulation in which each guess is accepted with probability alpha, and time is counted."""
    rng, alpha, gamma, new = np.random.default_rng(0), 0.8, 4, 64
    seconds, prompts = 0.0, 3000
    for _ in range(prompts):
        seconds, written = seconds + 3, 0                   # both models read the prompt: 3 steps
        while written < new:
            accepted = rng.random(gamma) < alpha
            written += 1 + int(accepted.cumprod().sum())
            seconds += gamma * 0.15 + 1.1
    measured = prompts * (2 + new) / seconds                # the target alone reads it in 2
    predicted = decoding.predicted_speedup(alpha, gamma, 0.15, 1.1, new, 2, 3)
    assert abs(predicted / measured - 1) < 0.01, f"predicted {predicted}, simulated {measured}"


# ------------------------------------------------------------------------------- the command line

@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Two checkpoints with their tokenizer, and data to take prompts from."""
    root = tmp_path_factory.mktemp("decoding")
    text = "import os\n\ndef read(path):\n    return open(path).read()\n"
    (root / "texts").mkdir()
    for i in range(40):
        (root / "texts" / f"{i}.py").write_text(f"# {i}\n" + text)
    tokenizer = data.train_bpe([text], 280)
    data.prepare([f"code={root / 'texts'}"], tokenizer, root / "data", val_fraction=0.5)
    shape = ModelConfig(vocab_size=280, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                        num_attention_heads=4, num_key_value_heads=4, bos_token_id=None,
                        max_position_embeddings=128, eos_token_id=279)
    for seed, name in enumerate(("target", "stranger")):
        save_checkpoint(Transformer(shape, seed), root / name)
        tokenizer.save(root / name)
    return root


def run_main(monkeypatch, capsys, work, *flags) -> tuple[int, str, str]:
    monkeypatch.setitem(decoding.PRESETS, "large", LARGE)
    try:
        decoding.main(["--target", f"{work / 'target'}", "--data", f"{work / 'data'}", "--device",
                       "cpu", "--prompts", "2", "--max-new-tokens", "12", *map(str, flags)])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


@pytest.mark.slow
def test_one_run_makes_the_whole_table(monkeypatch, capsys, work, tmp_path):
    path = tmp_path / "figures.json"
    code, out, err = run_main(
        monkeypatch, capsys, work, "--embed-in", "large", "--draft", work / "target", "--draft",
        work / "stranger", "--gamma", 2, 3, "auto", "--sampling", "greedy", "0.1,10,0.95",
        "--json", path)
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    ways = ["plain", "gamma 2", "gamma 3", "gamma auto", "gamma 2"]
    assert [row["way"] for row in rows] == 2 * ways
    assert [Path(row["draft"]).name for row in rows[1:5]] == ["target"] * 3 + ["stranger"]
    for row in rows:
        assert all(len(text) == 12 for text in row["tokens"]), "not --max-new-tokens tokens"
        assert row["texts_as_plain"] == (None if row["temperature"] else 2), (
            f"greedy, {row['way']}: speculative texts differ from plain ones")
        if row["gamma"] in (2, 3):
            costs = [row[f"{part}_s"] for part in ("drafts", "verify", "read_plain", "read")]
            drafts, verify, read_plain, read = (cost / row["token_s"] for cost in costs)
            assert row["predicted_speedup"] == pytest.approx(decoding.predicted_speedup(
                row["alpha"], row["gamma"], drafts / row["gamma"], verify, 12, read_plain, read))
        if row["gamma"] and "target" in row["draft"] and not row["temperature"]:
            assert row["accepted_per_drafted"] > 0.9, "a model refuses its own function's drafts"
    assert rows[4]["accepted_per_drafted"] < 0.9, "another model's drafts are all accepted"
    assert out.count("\n| greedy |") == 5 and out.count("| 0.1, 10, 0.95 |") == 5


@pytest.mark.slow
def test_transformers_decodes_beside_it(monkeypatch, capsys, work, tmp_path):
    pytest.importorskip("transformers")
    path = tmp_path / "figures.json"
    code, _, err = run_main(
        monkeypatch, capsys, work, "--embed-in", "large", "--draft", work / "target", "--gamma",
        3, "auto", "--sampling", "greedy", "0.1,10,0.95", "--peers", "--eager-prompts", 1,
        "--json", path)
    assert code == 0, err
    rows = json.loads(path.read_text())["rows"]
    assert [row["way"] for row in rows][3:6] == [
        "transformers' generate", "assisted generation, 3", "assisted generation, auto"]
    assert [row["texts_as_plain"] for row in rows[3:6]] == [1, 1, 1], (
        "transformers' greedy text of the same weights is another one")


@pytest.mark.parametrize("flags, words", [
    (("--gamma", "0"), "neither a number"), (("--sampling", "hot"), "neither greedy"),
    (("--prompts", "0"), "--prompts is 0"), (("--max-new-tokens", "200"), "context of 128"),
    (("--target", "demo-draft", "--embed-in", "large"), "is a preset"),
    (("--embed-in", "demo-draft"), "does not fit into"), (("--json", "no/folder"), "cannot be")])
def test_a_mistake_is_one_sentence_and_exit_code_2(monkeypatch, capsys, work, flags, words):
    code, _, err = run_main(monkeypatch, capsys, work, "--draft", work / "stranger", *flags)
    assert code == 2 and words in err and "Traceback" not in err, f"{code}: {err}"


def test_a_peer_that_fails_is_left_out_and_the_table_stays(capsys):
    def broken(*_):
        raise RuntimeError("no such argument")
    ways = [decoding.Way("theirs", broken, 1)]
    decoding.take_turns(ways, [[1, 2]], 4)
    assert ways == [] and "theirs is left out: no such argument" in capsys.readouterr().err
