"""The pages are true: their figures are computed again, their commands and links exist.

    pytest tests/test_docs.py
    python tests/test_docs.py           # writes the line numbers in the README's links anew
"""
import argparse
import ast
import importlib
import math
import re
import shlex
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from model import PRESETS, Cache, ModelConfig, Transformer
from oracle import expected_tokens
from speculative import (FIRST_GAMMA, MAX_GAMMA, Drafts, decide, next_gamma, propose, residual,
                         sample, settle, verify)
from train import RECIPES

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
EXPLAINED = (ROOT / "docs" / "explained.md").read_text()
FLOWING = " ".join(EXPLAINED.split())           # a sentence may go over the end of a line


def section(number: int) -> str:
    return EXPLAINED.split("\n## ")[number]


def table_rows(text: str) -> list[list[str]]:
    """The cells of all tables of a text, without their heads."""
    rows = [[cell.strip(" *") for cell in line.strip("|").split("|")]
            for line in text.splitlines() if line.startswith("|")]
    rules = [i for i, row in enumerate(rows) if set(row[0]) <= set("-:")]
    return [row for i, row in enumerate(rows) if i not in rules and i + 1 not in rules]


def expect(*claims: str) -> None:
    """The page says each of these, as it is computed from the code."""
    for claim in claims:
        assert claim in FLOWING, f"docs/explained.md does not say: {claim}"


# ---- docs/explained.md -------------------------------------------------------------------------

def test_one_layer_adds_up_to_the_model():
    config = PRESETS["amd-135m"]
    with torch.device("meta"):
        model = Transformer(config)
    parameters = dict(model.named_parameters())
    C, D, F, H = config.hidden_size, config.head_dim, config.intermediate_size, 12
    assert (config.num_attention_heads, config.num_key_value_heads) == (H, H)
    heads = f"(T, {H}, {D})"
    results = {"input_layernorm": f"(T, {C})", "q_proj": heads, "k_proj": heads, "v_proj": heads,
               "o_proj": f"(T, {C})", "gate_proj": f"(T, {F})",
               "post_attention_layernorm": f"(T, {C})", "up_proj": f"(T, {F})",
               "down_proj": f"(T, {C})"}
    layer = {name.split(".")[-2]: parameter for name, parameter in parameters.items()
             if name.startswith("model.layers.7.")}
    in_layer = sum(parameter.numel() for parameter in layer.values())
    rows = table_rows(section(1))
    weighted = [row for row in rows if row[0].startswith("`") and len(row) == 4]
    assert [row[0].split("`")[1] for row in weighted] == [
        "input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj", "post_attention_layernorm",
        "gate_proj", "up_proj", "down_proj"]
    for label, result, weight, count in weighted:
        name = label.split("`")[1]
        shape = ", ".join(map(str, layer[name].shape))
        assert (result, weight, count) == (results[name], f"({shape})", f"{layer[name].numel():,}")
    assert ["one layer", f"(T, {C})", "", f"{in_layer:,}"] in rows
    whole = sum(parameter.numel() for parameter in parameters.values())
    embedding, layers = config.vocab_size * C, config.num_hidden_layers
    assert rows[-5:] == [
        [f"`embed_tokens`, ({config.vocab_size}, {C})", f"{embedding:,}"],
        [f"{layers} layers of {in_layer:,}", f"{layers * in_layer:,}"],
        [f"`norm`, ({C})", f"{C}"],
        [f"`lm_head`, ({config.vocab_size}, {C})", f"{embedding:,}"],
        ["AMD-135M", f"{whole:,}"]]
    assert whole == 134_105_856
    in_matrices = sum(p.numel() for p in parameters.values() if p.ndim == 2) - embedding
    cached = 2 * 2 * C * layers                         # a key and a value, 2 bytes in bf16
    expect(f"the other {in_matrices:,} weights", f"the weights take {2 * whole / 1e6:.0f} MB",
           f"{cached:,} bytes of cache", f"{cached * 2048 / 1e6:.0f} MB for the whole context")
    assert config.max_position_embeddings == 2048
    assert round(3 * C * F / in_layer, 2) == 0.67 and 1 / 3 < 2 * embedding / whole < 0.4


def test_the_round_of_the_picture_moves_the_caches_as_it_says():
    """The target's own next tokens are d1 and d2, and d3 is another one, so n = 2."""
    config = ModelConfig(vocab_size=61, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    target, draft = Transformer(config, seed=0), Transformer(config, seed=1)
    G, greedy = 4, (0.0,)
    text, positions = torch.tensor([[5, 6, 7, 8, 9]]), {}
    caches = [Cache(config, 1, 32) for _ in range(2)]
    with torch.no_grad():
        for cache, model, length in zip(caches, (target, draft), (4, 3)):
            model(text[:, :length], cache)
            cache.advance(length)

        def note(name: str) -> None:
            positions[name] = [int(cache.position) for cache in caches]
        note("the round before")
        last_two, u = text[:, -2:].clone(), torch.full((1, G + 1), 0.5)
        drafts = propose(draft, caches[1], last_two, u[:, :G], greedy, config.vocab_size)
        note("`propose`")
        own = text
        for _ in range(G):
            own = torch.cat((own, target(own)[:, -1:].argmax(-1)), 1)
        guesses = own[:, 5:].clone()
        guesses[0, 2] = (guesses[0, 2] + 1) % 61
        q = torch.zeros_like(drafts.q).scatter_(-1, guesses[..., None], 1)
        verdict = decide(target, caches[0], last_two, Drafts(guesses, q), u, greedy)
        note("`decide`")
        settle(verdict, last_two, torch.ones(1, dtype=torch.int64), *caches)
        note("`settle`")
    assert verdict.n.item() == 2
    assert verdict.tokens[0, :3].tolist() == own[0, 5:8].tolist() and last_two[0, 1] == own[0, 7]
    rows = {row[0]: [int(row[2]), int(row[3])] for row in table_rows(section(2))}
    assert rows == positions
    drawn = {"target's cache": [], "draft's cache": []}
    for line in (ROOT / "docs" / "round.svg").read_text().splitlines():
        label, *cells = re.findall(r">([^<>]+)</text>", line) or [""]       # a row of the picture
        drawn.get(label, []).append(cells)
    places = ["t1", "t2", "t3", "t4", "t5", "d1", "d2", "d3", "d4"]
    held = {name: [places[:position] for position in both] for name, both in positions.items()}
    all_read = places[:positions["`decide`"][0] + G + 1]
    assert drawn["target's cache"] == [held["the round before"][0], all_read, held["`settle`"][0]]
    assert drawn["draft's cache"] == [held[name][1] for name in
                                      ("the round before", "`propose`", "`settle`")]


def test_the_three_guesses_are_judged_as_the_page_says():
    rows = table_rows(section(3))
    p, q = (torch.tensor([[float(x) for x in row[i:i + 3]] for row in rows], dtype=torch.float64)
            for i in (1, 4))
    guesses = torch.tensor([["abc".index(row[7]) for row in rows]])
    u = torch.tensor([[*(float(row[9]) for row in rows), 0.80]], dtype=torch.float64)
    # The rule never comes to the place after three guesses: any distribution does.
    tokens, n = verify(torch.cat((p, p[:1]))[None], q[None], guesses, u)
    assert [row[10] for row in rows] == ["yes"] * n + ["no"] * (3 - n)
    for i, row in enumerate(rows):
        assert row[8] == f"{p[i, guesses[0, i]] / q[i, guesses[0, i]] - 1e-9:.2f}"
    excess = residual(p[2:], q[2:])[0]
    share = excess / excess.sum()
    assert sample(excess[None], u[:, 3]) == 1
    alpha = torch.minimum(p[2], q[2]).sum()
    text = " ".join("abc"[token] for token in tokens[0, :n + 1])
    accept = torch.minimum(torch.ones(3), p[2] / q[2])
    assert torch.allclose(q[2] * accept + (1 - alpha) * share, p[2])
    expect(f"max(0, p - q) = ({', '.join(f'{x:.2f}' for x in excess)})",
           f"its sum of {excess.sum():.2f} it is ({', '.join(f'{x:.2f}' for x in share)})",
           f"returns `{text}`", f"{1 - alpha:.2f} x {share[0]:.2f} = {(1 - alpha) * share[0]:.2f}",
           f"{q[2, 1] * accept[1]:.2f} + {1 - alpha:.2f} x {share[1]:.2f} = {p[2, 1]:.2f}",
           f"{q[2, 2]:.2f} x {accept[2]:.2f} = {p[2, 2]:.2f}", f"sum of min(p, q) = {alpha:.2f}")


def fixed_length(alpha: float, G: int) -> tuple[float, float]:
    """accepted/drafted and tokens a round, if every guess is accepted with probability alpha."""
    tokens = expected_tokens(alpha, G)
    return (tokens - 1) / G, tokens


def amd_schedule(alpha: float) -> tuple[float, float]:
    """The same for next_gamma's lengths, in a text so long that its beginning does not matter."""
    lengths = np.arange(1, MAX_GAMMA + 1)
    step = np.zeros((MAX_GAMMA, MAX_GAMMA))             # from one length to the next
    for G in lengths:
        step[G - 1, next_gamma(G, G) - 1] += alpha**G
        step[G - 1, next_gamma(G, 0) - 1] += 1 - alpha**G
    share = np.eye(MAX_GAMMA)[FIRST_GAMMA - 1]
    # Half-steps: lengths that alternate would go on alternating.
    share = share @ np.linalg.matrix_power((step + np.eye(MAX_GAMMA)) / 2, 2**14)
    tokens = share @ [expected_tokens(alpha, G) for G in lengths]
    return (tokens - 1) / (share @ lengths), tokens


def test_the_two_acceptance_ratios():
    rows = table_rows(section(4))
    for alpha, *cells in rows:
        alpha = float(alpha)
        computed = [*(fixed_length(alpha, G) for G in (1, 3, 5, 8)), amd_schedule(alpha)]
        assert cells == [f"{ratio:.2f} ({tokens:.1f})" for ratio, tokens in computed], alpha
    ratio, tokens = fixed_length(0.8, 5)
    tested = expected_tokens(0.8, 4)
    expect(f"{tested:.3f} tested guesses", f"accepted, {0.8 * tested:.3f}.",
           f"{0.8 * tested:.3f} / 5 = {ratio:.3f}", f"a round gives {tokens:.3f} tokens",
           "the third with 0.64, then 0.512 and 0.4096")
    least, most = (amd_schedule(float(rows[i][0]))[0] for i in (0, -1))
    expect(f"between {least:.2f} and {most:.2f} over", "AMD measured 0.665")
    assert amd_schedule(0.97)[0] < 0.665
    # In the long run the length neither grows nor shrinks: 2 x accepted rounds = the others.
    assert next_gamma(5, 5) - 5 == 2 and next_gamma(5, 4) - 5 == -1


def test_bf16_rounds_as_the_page_says():
    one, large = torch.tensor(1, dtype=torch.bfloat16), torch.tensor(256, dtype=torch.bfloat16)
    assert (large + one) + one == 256 and large + (one + one) == 258
    neighbours = [float(torch.nextafter(large, torch.tensor(to).bfloat16())) for to in (0.0, 1e9)]
    assert neighbours == [255, 258]
    sixteen = [torch.tensor(16.0, dtype=dtype) for dtype in (torch.bfloat16, torch.float32)]
    steps = [float(torch.nextafter(x, 2 * x) - x) for x in sixteen]
    expect(f"bf16 numbers are {steps[0]} apart", f"numbers are {steps[1]:.7f} apart",
           f"ln(0.31 / 0.29) = {math.log(0.31 / 0.29):.3f} apart", "(256 + 1) + 1 is 256",
           "256 + (1 + 1) is 258", "255 and 258")
    assert [f"{100 * n / 164:.2f}" for n in (51, 56, 55)] == ["31.10", "34.15", "33.54"]
    expect("31.10%", "51 of 164", "34.15% without and 33.54% with a draft: 56 and 55 problems")


def test_the_recipe_in_three_versions():
    rows = {row[0]: row[1:] for row in table_rows(section(6))}
    for stage, recipe, says, nodes_in_code, nodes, accumulation in (
            ("pretraining", "amd-135m", (1024, 670), 8, 4, math.ceil),
            ("fine-tuning", "amd-135m-code", (320, 21), 1, 1, math.floor)):
        # The arithmetic of AMD's two scripts (AMD-AIG-AIMA/AMD-LLM at 1f4de24): micro-batches of 16
        # on 8 devices a node, the steps rounded up to the next 2000.
        of_a_device = 16 * accumulation(says[0] / nodes_in_code // 8 / 16)
        assumed, actual = (of_a_device * 8 * n for n in (nodes_in_code, nodes))
        steps = int(says[1] * 10**9 / (assumed * 2048) // 2000 + 1) * 2000
        ours, = RECIPES[recipe]
        assert ours.block == 2048
        assert rows[f"rows of a {stage} step"] == [str(says[0]), str(actual), str(ours.rows)]
        assert rows[f"{stage} steps"] == ["", f"{steps:,}", f"{ours.steps:,}"]
        assert rows[f"{stage} tokens"] == [f"{says[1]}B"] + [
            f"{tokens / 1e9:.1f}B"
            for tokens in (steps * actual * 2048, ours.steps * ours.batch_tokens)]
        assert ours.weight_decay == 0.1


# ---- All pages: commands -----------------------------------------------------------------------

def commands(page: Path) -> list[str]:
    """The lines of a page's code blocks that run something, with their continuations."""
    lines = []
    for block in re.findall(r"^```\n(.*?)^```", page.read_text(), re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            line = line.removeprefix("$ ")
            if re.match(r"(python|torchrun|pytest|pip|hf|cd) ", line):
                lines += [part.strip() for part in line.split("&&")]
    return lines


class Parsed(BaseException):
    """Ends a script when its command line has been read."""


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_of_a_page_is_one_that_the_script_takes(page, monkeypatch, capsys):
    """Each is parsed by its script's own parser, which then stops: flags, choices and types."""
    parse, count = argparse.ArgumentParser.parse_args, 0

    def parse_and_stop(self, argv=None, namespace=None):
        raise Parsed(parse(self, argv, namespace))
    for command in commands(page):
        words = shlex.split(command, comments=True)
        script = next((word for word in words if word.endswith(".py")), "")
        if words[0] in ("python", "torchrun") and script and words[:2] != ["python", "-c"]:
            assert (ROOT / script).exists(), f"{page.name} runs {script}, which is not there"
            monkeypatch.syspath_prepend(str((ROOT / script).parent))
            module = importlib.import_module(Path(script).stem)
            with monkeypatch.context() as patch:
                patch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
                try:
                    module.main(words[words.index(script) + 1:])
                except Parsed as parsed:
                    count += 1
                    for flag, table in (("tasks", "TASKS"), ("variants", "VARIANTS")):
                        names = getattr(parsed.args[0], flag, None) or []
                        names = names.split(",") if isinstance(names, str) else names
                        assert set(names) <= {"all", *getattr(module, table, names)}, command
                except SystemExit:
                    pytest.fail(f"{page.name} has a command that its script refuses:\n  {command}\n"
                                f"{capsys.readouterr().err}")
                else:
                    pytest.fail(f"{script} took no notice of: {command}")
    assert count >= {"README.md": 10, "measured.md": 10}.get(page.name, 0)


# ---- All pages: links --------------------------------------------------------------------------

def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)", page.read_text(), re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        path, _, place = target.partition("#")
        file = page.parent / path if path else page
        if "://" in target:
            continue
        assert file.exists(), f"{page.name} links to {target}: there is no such file"
        if place and not re.fullmatch(r"L\d+-L\d+", place):
            assert place in anchors(file), f"{page.name} links to {target}: no such heading"


def line_range(file: str, name: str) -> tuple[int, int]:
    """First and last line of a function or a method."""
    body, node = ast.parse((ROOT / file).read_text()).body, None
    for part in name.split("."):
        node = next((node for node in body if getattr(node, "name", "") == part), None)
        assert node, f"the README names {name}, which {file} does not have"
        body = node.body
    return node.lineno, node.end_lineno


RANGE = re.compile(r"\[`([\w.]+)`\]\((\w+\.py)#L(\d+)-L(\d+)\)")


def test_the_lines_to_read_first_are_where_the_readme_says():
    ranges = RANGE.findall(README.read_text())
    for name, file, first, last in ranges:
        start, end = line_range(file, name)
        assert (int(first), int(last)) == (start, end), (
            f"{name} is in lines {start} to {end} of {file}: run python tests/test_docs.py, which "
            "corrects the README")
    lines = sum(int(last) - int(first) + 1 for _, _, first, last in ranges)
    promised = int(re.search(r"The (\d+) lines to read first", README.read_text())[1])
    assert abs(lines - promised) <= 5, f"they are {lines} lines, and the README says {promised}"


def test_the_readme_is_short_and_names_what_exists():
    text = README.read_text()
    assert len(text.splitlines()) <= 150, "the README has more than 150 lines: move something out"
    for file, name in (("model", "PRESETS"), ("train", "RECIPES"), ("train", "TrainConfig"),
                       ("data", "READY"), ("evaluate", "Question"), ("evaluate", "TASKS")):
        assert f"`{name}`" in text and hasattr(importlib.import_module(file), name), name
    lost = re.search(r"(\d+) of HumanEval's own 164 solutions", text)[1]
    assert f"{100 * (164 - int(lost)) / 164:.1f}%" in text and lost in importlib.import_module(
        "evaluate").amd_cut.__doc__
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text().split(
        "[project.optional-dependencies]")[1].split("\n[")[0], re.M))
    assert {"test", *re.findall(r"extra `(\w+)`", text)} <= extras


@pytest.mark.slow
def test_no_page_waits_for_figures():
    waiting = [f"{page.name}: {line}" for page in PAGES for line in page.read_text().splitlines()
               if "TODO" in line]
    assert not waiting, "these lines wait for figures: measure them, or take the rows out:\n" + (
        "\n".join(waiting))


@pytest.mark.parametrize("script, arguments, flag", [
    ("data", ["prepare"], "--tokenizer"), ("train", [], "--micro-batch"),
    ("speculative", [], "--gamma"), ("evaluate", [], "--tasks"),
    ("evaluate", ["humaneval"], "--protocol")])
def test_help_works_without_docstrings(script, arguments, flag, monkeypatch, capsys):
    """As python -OO compiles the script."""
    path = ROOT / f"{script}.py"
    bare = ModuleType("script_without_docstrings")
    monkeypatch.setitem(sys.modules, bare.__name__, bare)           # dataclasses look there
    exec(compile(path.read_text(), str(path), "exec", optimize=2), bare.__dict__)
    assert bare.__doc__ is None and bare.main.__doc__ is None
    with pytest.raises(SystemExit) as end:
        bare.main([*arguments, "--help"])
    assert end.value.code == 0 and flag in capsys.readouterr().out


if __name__ == "__main__":
    def corrected(match: re.Match) -> str:
        start, end = line_range(match[2], match[1])
        return f"[`{match[1]}`]({match[2]}#L{start}-L{end})"
    README.write_text(RANGE.sub(corrected, README.read_text()))
