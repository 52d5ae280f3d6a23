"""Speculative decoding proved: the rule, the round, the loop around it, the corners, the speed."""
import copy
import io
import itertools
import json
import os
import re
import statistics
import sys
from dataclasses import replace
from types import SimpleNamespace

import data
import numpy as np
import oracle
import pytest
import torch

import speculative
from model import Cache, ModelConfig, Transformer, save_checkpoint
from speculative import (MAX_GAMMA, Compiled, Decoder, FewRowsLinear, Round, Stats, can_pack,
                         complete, held_out_prompts, main, next_gamma, prepare_for_decoding,
                         residual, sample, to_host, verify, warp)

SMALL = ModelConfig(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
                    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
                    bos_token_id=None, eos_token_id=None)


def random_model(config: ModelConfig, seed: int, like: Transformer | None = None,
                 noise: float = 1.0) -> Transformer:
    """Float64, with weights large enough that its tokens vary; or a neighbour of another model."""
    model = Transformer(config).double().requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        if weight.dim() > 1:
            weight.copy_(0.35 * torch.randn(weight.shape, generator=generator) * noise)
            if like is not None:
                weight += like.get_parameter(name)
    return model


@pytest.fixture(scope="module")
def target():
    return random_model(SMALL, 1)


@pytest.fixture(scope="module")
def draft(target):
    return random_model(SMALL, 2, like=target, noise=0.08)


# ------------------------------------------------------------------- distributions and the rule

@pytest.mark.parametrize("temperature, top_k, top_p", [
    (0, 0, 1.0), (1, 0, 1.0), (0.1, 10, 0.95), (0.8, 3, 1.0), (1.7, 0, 0.6), (2, 5, 0.01),
    (1, 1, 0.5), (1, 99, 0.999)])
def test_warp_equals_the_oracle(temperature, top_k, top_p):
    logits = 3 * torch.randn(50, 30, generator=torch.Generator().manual_seed(0)).double()
    logits[::2] = logits[::2].round()       # many ties
    got = warp(logits, temperature, top_k, top_p)
    want = np.array([oracle.warp(row, temperature, top_k, top_p) for row in logits.numpy()])
    assert np.abs(got.numpy() - want).max() < 1e-14, "warp() makes another distribution"


def test_warp_is_float32_at_least_and_survives_extremes():
    assert warp(torch.zeros(4, dtype=torch.bfloat16), 1.0).dtype == torch.float32
    for settings in ((1e-30,), (1e-320,), (1.0, 0, 1e-320)):
        p = warp(torch.tensor([1e30, -1e30, 0.0]), *settings)
        assert p.tolist() == [1, 0, 0], f"a tiny temperature or top_p {settings} overflowed: {p}"


def test_sample_equals_the_oracle_and_never_draws_the_impossible():
    generator = torch.Generator().manual_seed(0)
    p = torch.rand(400, 9, generator=generator, dtype=torch.float64)
    p[p < 0.6] = 0
    p[:, 4] += 0.1
    edges = torch.tensor([0.0, 1 - 2**-53] * 100, dtype=torch.float64)
    u = torch.cat((edges, torch.rand(200, generator=generator, dtype=torch.float64)))
    tokens = sample(p, u)
    assert (p.gather(1, tokens[:, None]) > 0).all(), "a token of probability 0 was drawn"
    want = [oracle.sample(row, x) for row, x in zip(p.numpy(), u.tolist())]
    assert tokens.tolist() == want, "sample() is not the inverse CDF"


@pytest.mark.parametrize("draft_vocabulary", [6, 4])
@pytest.mark.parametrize("G", [1, 2, 5])
def test_verify_equals_the_oracle_on_the_same_uniforms(G, draft_vocabulary):
    generator = torch.Generator().manual_seed(G)
    B, V = 500, 6
    logits = 2 * torch.randn(2, B, G + 1, V, generator=generator).double()
    p = warp(logits[0], 1.0, 4)
    q = warp(logits[1, :, :G, :draft_vocabulary], 1.0, 3)
    p[:50, :G, :draft_vocabulary] = q[:50]                      # agreement: no residual is left
    u = torch.rand(B, 2 * G + 1, generator=generator, dtype=torch.float64)
    drafted = torch.stack([sample(q[:, i], u[:, i]) for i in range(G)], 1)
    tokens, n = verify(p, q, drafted, u[:, G:])
    seen = set()
    padded = torch.nn.functional.pad(q, (0, V - draft_vocabulary))
    for b in range(B):
        want, accepted = oracle.verify(p[b].numpy(), padded[b].numpy(), drafted[b].tolist(),
                                       u[b, G:2 * G].numpy(), u[b, -1].item())
        got = tokens[b, :n[b] + 1].tolist()
        assert (got, n[b].item()) == (want, accepted), f"row {b} differs from the oracle"
        seen.add(accepted)
    assert seen == set(range(G + 1)), f"only {seen} drafts were ever accepted: a weak test"


class Markov:
    """A model whose next token depends on the last one alone: row t of P is what follows t."""

    def __init__(self, P):
        self.config = replace(SMALL, vocab_size=len(P))
        self.logits, self.device, self.dtype = torch.tensor(P).log(), "cpu", torch.float64

    def hidden(self, tokens, cache):
        return self.logits[tokens]

    def lm_head(self, hidden):
        return hidden

    __call__ = hidden


def toy(V: int, seed: int, zeros: bool):
    P = np.random.default_rng(seed).dirichlet(np.ones(V), V)
    if zeros:                                   # tokens that only one of the two can emit
        P[np.arange(V), (np.arange(V) + seed) % V] = 0
    return P / P.sum(-1, keepdims=True)


def intervals(breakpoints):
    """Midpoints and lengths of the intervals of [0, 1) between the places where an outcome may
    change: a sum over them is the exact integral over a uniform u, if there are no others."""
    edges = np.unique(np.clip(np.concatenate([[0, 1], *breakpoints]), 0, 1))
    edges = edges[np.diff(edges, prepend=-1) > 1e-13]
    return (edges[1:] + edges[:-1]) / 2, np.diff(edges)


@pytest.mark.parametrize("V, Vq, G, sampling, zeros", [
    (2, 2, 1, (1.0,), False), (2, 2, 3, (1.0,), False), (3, 3, 2, (1.0,), True),
    (4, 4, 1, (1.0,), True), (3, 2, 2, (1.0,), False), (2, 3, 2, (1.0,), False),
    (4, 4, 1, (0.7, 3), False), (4, 3, 1, (1.3, 0, 0.8), False)])
def test_a_round_has_exactly_the_targets_joint_distribution(V, Vq, G, sampling, zeros):
    """Every draft path times every acceptance times every residual, through the decoder's own
    code: rows of one batch are all the combinations of what the uniforms can decide."""
    P, Q = toy(V, 1, zeros), toy(Vq, 2, zeros)
    temperature, top_k, top_p = (*sampling, 0, 1.0)[:3] if len(sampling) < 3 else sampling
    with np.errstate(divide="ignore"):
        warped_P = np.array([oracle.warp(row, temperature, top_k, top_p) for row in np.log(P)])
        warped_Q = np.array([oracle.warp(np.log(Q)[min(t, Vq - 1), :V], temperature, top_k, top_p)
                             for t in range(V)])
    q = np.zeros((V, V))
    q[:, :warped_Q.shape[1]] = warped_Q
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = np.nan_to_num(warped_P / q, posinf=1)
    left = np.array([oracle.residual(a, b) for a, b in zip(warped_P, q)])
    points = ([intervals([q.cumsum(-1).ravel()])] * G + [intervals([ratios.ravel()])] * G
              + [intervals([warped_P.cumsum(-1).ravel(), left.cumsum(-1).ravel()])])
    u = torch.tensor(list(itertools.product(*(middles for middles, _ in points))))
    weight = np.prod(list(itertools.product(*(lengths for _, lengths in points))), axis=1)
    decoder = Decoder(Markov(P), Markov(Q), G, *sampling, batch=len(u), length=4)
    joint = {}
    for start in range(V):
        decoder.last_two.fill_(start)
        decoder.u.copy_(u)
        outcome = to_host(decoder.run_decide(decoder.run_propose(G)))
        emitted = joint[start] = {}
        for path, w in zip(map(tuple, outcome.tokens), weight):
            emitted[path] = emitted.get(path, 0.0) + w
    # Rounds follow one another until n tokens stand: their joint must be the target's.
    n = G + 2
    for start in range(V):
        paths = {(): 1.0}
        for _ in range(n):
            longer = {}
            for tokens, probability in paths.items():
                more = joint[(start, *tokens)[-1]] if len(tokens) < n else {(): 1.0}
                for emitted, rest in more.items():
                    key = (tokens + emitted)[:n]
                    longer[key] = longer.get(key, 0.0) + probability * rest
            paths = longer
        want = oracle.target_joint(warped_P, start, n)
        worst = max(abs(paths.get(key, 0.0) - want.get(key, 0.0)) for key in paths | want)
        assert worst < 1e-12, f"after token {start} the joint is wrong by {worst}"


# ---------------------------------------------------------------- what the docstring works through

def numbers(label: str) -> list[float]:
    line, = (line for line in speculative.__doc__.splitlines() if label in line)
    return [float(x) for x in re.findall(r"\b\d\.\d\d\b", line)]


def test_the_three_probabilities_of_the_docstring_are_what_the_rule_gives():
    *p, total_p = numbers("the target's probabilities, p")
    *q, total_q = numbers("the draft's, q")
    *both, alpha = numbers("guessed and accepted: min(p, q)")
    *left, rejected = numbers("residual, what p still lacks")
    *drawn, total_drawn = numbers("after a rejection, x: residual / its sum")
    _, *replaced, total_replaced = numbers("rejected and replaced")     # the first is 0.40
    *found, total = numbers("guessed and accepted, or replaced")
    p, q = (torch.tensor([row], dtype=torch.float64) for row in (p, q))
    near = {"abs": 1e-12}
    assert (total_p, total_q, total_drawn, total) == (1, 1, 1, 1) and rejected == total_replaced
    assert numbers("the guess is accepted with") == pytest.approx((p / q).clamp(max=1)[0].tolist())
    assert both == pytest.approx(torch.minimum(p, q)[0].tolist(), **near)
    assert alpha == pytest.approx(sum(both), **near) and rejected == pytest.approx(1 - alpha)
    assert left == pytest.approx(residual(p, q)[0].tolist(), **near)
    assert drawn == pytest.approx((residual(p, q) / residual(p, q).sum())[0].tolist(), **near)
    assert replaced == pytest.approx([rejected * x for x in drawn], **near)
    assert found == pytest.approx(p[0].tolist(), **near), "the sum is not p"
    # The same by verify(), over a fine grid of both uniforms.
    grid = (torch.arange(200, dtype=torch.float64) + 0.5) / 200
    u = torch.cartesian_prod(grid, grid)                                        # (40000, 2)
    share = torch.zeros(3, dtype=torch.float64)
    for guess in range(3):
        tokens, n = verify(torch.stack((p, p), 1).expand(len(u), -1, -1),
                           q[:, None].expand(len(u), -1, -1), torch.full((len(u), 1), guess), u)
        share += q[0, guess] * torch.bincount(tokens[:, 0], minlength=3) / len(u)
    assert (share - p[0]).abs().max() < 1e-12, f"verify() emits {share.tolist()}"


@pytest.mark.parametrize("n", [0, 2, 4])
def test_a_round_reads_and_forgets_what_the_docstrings_picture_shows(n):
    """Text 1 .. 5; the draft always guesses the next number, the target agrees n times."""
    chain = np.eye(11)[[*range(1, 11), 10]] + 1e-9
    other = chain.copy()
    other[5 + n] = np.eye(11)[0] + 1e-9
    reads = []

    class Spy(Markov):
        def hidden(self, tokens, cache):
            reads.append((self.name, int(cache.position), tokens[0].tolist()))
            return super().hidden(tokens, cache)

        def __call__(self, tokens, cache):
            return self.hidden(tokens, cache)

    target, draft = Spy(other), Spy(chain)
    target.name, draft.name = "target", "draft"
    decoder = Decoder(target, draft, 4, length=20)
    decoder.read([[1, 2, 3, 4, 5]])
    assert [int(cache.position) for cache in decoder.caches] == [4, 3]
    reads.clear()
    outcome = to_host(decoder.run_decide(decoder.run_propose(4)))
    assert reads == [("draft", 3, [4, 5]), ("draft", 5, [6]), ("draft", 6, [7]), ("draft", 7, [8]),
                     ("target", 4, [5, 6, 7, 8, 9])]
    assert outcome.gamma == 4 and outcome.accepted == [n]
    assert outcome.tokens == [[*range(6, 6 + n), 0]]
    assert [int(cache.position) for cache in decoder.caches] == [5 + n, 4 + n], (
        "after the round the target's cache holds all tokens but the last, the draft's all but two")
    assert decoder.last_two.tolist() == [[5 + n, 0]]


# ------------------------------------------------------------------------ beside the NumPy oracle

@pytest.mark.parametrize("sampling", [(0.0,), (1.0,), (0.7, 8, 0.9)])
@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 5])
def test_the_decoder_gives_the_oracles_tokens_from_the_same_uniforms(target, draft, gamma,
                                                                     sampling):
    """The oracle has a forward pass, sampling, rule and loop of its own, and no cache."""
    def forward(model):
        weights = {name: weight.numpy() for name, weight in model.named_parameters()}
        return lambda tokens: oracle.forward(weights, model.config, tokens)

    prompts, new = [[5, 6, 7, 8], [0], [9, 0, 3]], 9
    got = complete(target, prompts, new, seed=gamma, draft=draft, gamma=gamma, **dict(
        zip(("temperature", "top_k", "top_p"), sampling)))
    for b, prompt in enumerate(prompts):
        generator = torch.Generator().manual_seed(gamma + b)
        want = oracle.speculative_decoding(
            forward(target), forward(draft), prompt, new, gamma,
            lambda n: torch.rand(n, generator=generator, dtype=torch.float64).numpy(), *sampling)
        assert got[b] == want, f"prompt {prompt}: the Decoder's tokens are not the oracle's"


# ---------------------------------------------------------------------------------- the decoder

PROMPTS = [[5, 6, 7, 8], [0], [9, 0, 3], [1] * 20]


@pytest.mark.parametrize("gamma", [1, 3, 5])
def test_greedy_speculative_equals_greedy_plain_at_every_acceptance_length(target, draft, gamma):
    stats = Stats()
    for prompt in PROMPTS:
        plain = complete(target, [prompt], 40)
        fast = complete(target, [prompt], 40, draft=draft, gamma=gamma, stats=stats)
        assert fast == plain, f"prompt {prompt}: speculative greedy text differs from plain greedy"
    # accepted[i] < tested[i]: there was a rejection at i; and full acceptance happened.
    rejected = [stats.tested[i] > stats.accepted[i] for i in range(gamma)]
    assert all(rejected) and stats.accepted[gamma - 1], f"not every length occurred: {stats}"


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_draft_equal_to_the_target_is_always_accepted(target, temperature):
    stats = Stats()
    complete(target, [PROMPTS[0]], 40, draft=target, gamma=4, temperature=temperature, stats=stats)
    assert stats.accepted.total() == stats.drafted > 0, (
        f"{stats.accepted} of {stats.drafted} accepted: the draft's cache lags, or q is not the "
        "distribution that was sampled")
    assert stats.alpha == 1 and stats.tokens_per_round == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_rows_of_a_batch_are_what_they_would_have_been_alone(target, draft, temperature):
    settings = dict(draft=draft, gamma=3, temperature=temperature)
    together = complete(target, PROMPTS, 30, seed=7, **settings)
    alone = [complete(target, [prompt], 30, seed=7 + b, **settings)[0]
             for b, prompt in enumerate(PROMPTS)]
    assert together == alone, "a row of a batch depends on its neighbours"


def test_eos_anywhere_in_a_round_ends_its_row_alone(target, draft):
    free = complete(target, PROMPTS, 30)
    for eos, gamma in zip(sorted(set(free[0])), itertools.cycle((2, 4))):
        want = [row[:row.index(eos) + 1] if eos in row else row for row in free]
        got = complete(target, PROMPTS, 30, draft=draft, gamma=gamma, eos_id=eos)
        assert got == want, f"EOS {eos} with gamma {gamma} did not end the right rows"


def test_a_stop_function_ends_its_row_alone_with_the_first_token_that_it_is_true_of(target, draft):
    free = complete(target, PROMPTS, 30)
    for last, gamma in zip(range(1, 9), itertools.cycle((2, 5))):
        pair = free[0][last - 1:last + 1]
        want = [next((row[:i] for i in range(2, 31) if row[i - 2:i] == pair), row) for row in free]
        got = complete(target, PROMPTS, 30, draft=draft, gamma=gamma,
                       stop=lambda tokens: tokens[-2:] == pair)
        assert got == want, f"with gamma {gamma}, rows do not end behind the tokens {pair}"


@pytest.mark.parametrize("max_new_tokens", [1, 2, 3, 7])
def test_exactly_max_new_tokens_are_emitted(target, draft, max_new_tokens):
    plain = complete(target, PROMPTS, max_new_tokens)
    assert complete(target, PROMPTS, max_new_tokens, draft=draft, gamma=5) == plain
    assert all(len(row) == max_new_tokens for row in plain)


def test_a_prompt_that_nearly_fills_the_context_gets_what_fits(target, draft):
    prompt = [3] * (SMALL.max_position_embeddings - 2)
    plain = complete(target, [prompt], 50)
    assert len(plain[0]) == 2, "generation must end with the context"
    assert complete(target, [prompt], 50, draft=draft, gamma=5) == plain


@pytest.mark.parametrize("draft_vocabulary", [20, 64])
def test_a_draft_with_another_vocabulary_size_changes_nothing(target, draft_vocabulary):
    other = random_model(replace(SMALL, vocab_size=draft_vocabulary), 3)
    plain = complete(target, PROMPTS, 30)
    assert max(map(max, plain)) >= 20, "the target must emit what the draft does not know"
    assert complete(target, PROMPTS, 30, draft=other, gamma=3) == plain


def test_a_draft_of_shorter_context_changes_nothing(target):
    other = random_model(replace(SMALL, max_position_embeddings=8), 3)
    assert complete(target, PROMPTS, 30, draft=other) == complete(target, PROMPTS, 30)


@pytest.mark.parametrize("prompts, settings, words", [
    ([[]], {}, "prompts of"), ([[1] * 64], {}, "room for a new token"),
    ([[1] * 9, []], {}, "prompts of"), ([[1]], dict(max_new_tokens=-99), "max_new_tokens"),
    ([[1]], dict(max_new_tokens=0), "max_new_tokens"), ([[1]], dict(gamma=0), "gamma"),
    ([[1]], dict(temperature=-1.0), "temperature"), ([[1]], dict(top_p=0.0), "top_p"),
    ([[1]], dict(top_k=-1), "top_k"), ([[1]], dict(gamma=65), "gamma is 65"),
    ([[1]], dict(gamma="many"), "gamma is 'many'"), ([[1]], dict(graphs=True), "not for cpu"),
    ([[1]], dict(graphs=True, gamma="auto"), "one draft length, not for")])
def test_impossible_settings_get_a_sentence(target, draft, prompts, settings, words):
    with pytest.raises(ValueError, match=words):
        complete(target, prompts, **(dict(max_new_tokens=5, draft=draft) | settings))


def test_a_decoder_takes_as_many_prompts_as_it_has_rows(target):
    for prompts in ([], [[1]], [[1]] * 3):
        with pytest.raises(ValueError, match="expected 2 prompts"):
            next(Decoder(target, batch=2).generate(prompts, 5))


def test_a_model_that_was_prepared_for_decoding_does_not_save_a_part_of_itself(target, tmp_path):
    prepared = prepare_for_decoding(copy.deepcopy(target))
    with pytest.raises(TypeError):
        save_checkpoint(prepared, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_a_prompt_may_be_an_array(target):
    assert complete(target, [np.array([5, 6])], 9) == complete(target, [[5, 6]], 9)


def test_generate_yields_each_round_as_it_is_known(target, draft):
    rounds = list(Decoder(target, draft, 3).generate([PROMPTS[0]], 20))
    assert [t for r in rounds for t in r.tokens[0]] == complete(target, [PROMPTS[0]], 20)[0]
    assert all(len(r.tokens[0]) == r.accepted[0] + 1 for r in rounds[:-1])
    assert {r.gamma for r in rounds} == {3}


def test_statistics_follow_their_definitions():
    stats = Stats()
    for n, emitted in ((2, 3), (4, 5), (0, 1)):     # two accepted and the third rejected; all; none
        stats.count(Round([[7] * emitted, []], [n, 4], 4))
    assert (stats.rounds, stats.emitted) == (3, 9) and stats.tokens_per_round == 3, (
        "a row that has ended does not count")
    assert stats.accepted_per_drafted == 6 / 12     # drafts after a rejection count
    assert stats.alpha == 6 / 8                     # but they were never tested
    assert stats.tested == {0: 3, 1: 2, 2: 2, 3: 1} and [*stats.tested] == [0, 1, 2, 3]
    assert stats.accepted == {0: 2, 1: 2, 2: 1, 3: 1}
    stats.count(Round([[7] * 6], [5], 6))
    assert stats.tested == {0: 4, 1: 3, 2: 3, 3: 2, 4: 1, 5: 1}, "a longer draft adds positions"
    stats.count(Round([[7]], [0], 0))
    assert stats.tested[0] == 4 and stats.rounds == 5, "a plain step tests no guess"


def test_gamma_auto_is_the_schedule_of_transformers():
    """Start at 5, +2 after full acceptance, else -1, at least 1; a cache sets a maximum."""
    lengths = [5]
    for share in (1, 1, 0.5, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1):
        lengths.append(next_gamma(lengths[-1], int(share * lengths[-1])))
    assert lengths == [5, 7, 9, 8, 7, 9, 8, 7, 6, 5, 4, 3, 2, 1, 1, 1, 3]
    assert next_gamma(MAX_GAMMA, MAX_GAMMA) == MAX_GAMMA


def test_auto_gamma_starts_at_5_with_every_prompt_and_follows_its_schedule(target, draft):
    decoder = Decoder(target, draft, "auto")
    for prompt in PROMPTS:
        G = 5
        for outcome in decoder.generate([prompt], 30):
            assert outcome.gamma == G, "another draft length than the schedule's"
            G = next_gamma(G, outcome.accepted[0])


def test_auto_gamma_reaches_its_maximum_and_still_fits(target):
    model = random_model(replace(SMALL, max_position_embeddings=2048), 1)
    decoder = Decoder(model, model, "auto", length=1200)
    rounds = list(decoder.generate([[5, 6]], 1198))
    assert max(outcome.gamma for outcome in rounds) == MAX_GAMMA
    text = torch.tensor([[5, 6] + [t for r in rounds for t in r.tokens[0]]])
    assert text.shape == (1, 1200)
    assert torch.equal(model(text[:, :-1]).argmax(-1)[:, 1:], text[:, 2:])


def test_a_batch_takes_the_draft_length_from_its_median_row(target, draft):
    G = 5
    for outcome in Decoder(target, draft, "auto", batch=4).generate(PROMPTS, 30):
        assert outcome.gamma == G
        running = [n for n, tokens in zip(outcome.accepted, outcome.tokens) if tokens]
        G = next_gamma(G, statistics.median_low(running))


# ------------------------------------------------------------------------------ the fast path

CAN = [True, False] if can_pack(torch.float32) else [False]


@pytest.mark.parametrize("pack", CAN, ids=lambda pack: "packed" if pack else "plain")
@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_a_prepared_model_computes_what_it_computed(monkeypatch, dtype, bound, pack):
    """With and without a cache, with fewer key/value heads, and on a machine that cannot pack."""
    monkeypatch.setattr(speculative, "can_pack", lambda dtype: pack and can_pack(dtype))
    model = random_model(SMALL, 1).to(dtype)
    fast = prepare_for_decoding(copy.deepcopy(model))
    assert fast.lm_head.packed == (pack and dtype == torch.float32)
    tokens = torch.randint(40, (3, 9), generator=torch.Generator().manual_seed(0))
    caches = [Cache(SMALL, 3, 16, dtype=dtype) for _ in range(2)]
    scale = model(tokens).abs().max()
    for part in (None, tokens[:, :5], tokens[:, 5:]):
        want, got = (m(tokens) if part is None else m(part, cache)
                     for m, cache in zip((model, fast), caches))
        assert (want - got).abs().max() < bound * scale, "the fast form computes something else"
        for cache in caches:
            cache.advance(0 if part is None else part.shape[1])
    for want, got in zip(*(cache.keys + cache.values for cache in caches)):
        assert (want - got).abs().max() < bound * want.abs().max(), "other keys or values"


@pytest.mark.parametrize("rows", [1, 2])
def test_products_as_sums_equal_products(rows):
    model = random_model(SMALL, 1)
    layer, x = model.model.layers[0], torch.randn(rows, 32, dtype=torch.float64)
    layer.input_layernorm.weight.data.uniform_(0.5, 2)
    for norm in (None, layer.input_layernorm):
        product = FewRowsLinear(layer.self_attn.q_proj, layer.self_attn.k_proj, norm=norm)
        assert (product.sums(x) - product(x)).abs().max() < 1e-12


def unpackable(*args):
    raise RuntimeError("could not create a primitive descriptor")       # no AVX-512, in bfloat16


@pytest.mark.parametrize("mkldnn", [
    SimpleNamespace(),                                                  # a build without oneDNN
    SimpleNamespace(_reorder_linear_weight=unpackable),
    SimpleNamespace(_reorder_linear_weight=lambda weight, rows: weight,
                    _linear_pointwise=lambda x, *rest: torch.zeros_like(x))])    # wrong sums
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_machine_that_cannot_pack_takes_the_plain_product(folders, capsys, tmp_path, monkeypatch,
                                                            mkldnn, dtype):
    monkeypatch.setattr(torch, "ops", SimpleNamespace(mkldnn=mkldnn))
    can_pack.cache_clear()
    try:
        assert not can_pack(getattr(torch, dtype))
        code, out, err = run_main(folders, capsys, "--prompt", "def f", "--max-new-tokens", 6,
                                  "--dtype", dtype, "--json", tmp_path / "figures.json")
    finally:
        can_pack.cache_clear()
    assert code == 0 and "speed-up" in out, err


def test_bfloat16_decodes_on_this_machine_whatever_it_can_do(folders, capsys):
    code, out, err = run_main(folders, capsys, "--prompt", "def f", "--max-new-tokens", 6,
                              "--dtype", "bfloat16")
    assert code == 0 and "speed-up" in out, err


def fast_and_eager(device: str, dtype: torch.dtype, graphs: bool) -> None:
    plain = random_model(SMALL, 1)
    near = random_model(SMALL, 2, like=plain, noise=0.08)
    target, draft = (prepare_for_decoding(model.to(device, dtype)) for model in (plain, near))
    for temperature, (helper, gamma) in itertools.product((0.0, 1.0), ((None, 5), (draft, 3))):
        texts = []
        for fast in (False, True):
            decoder = Decoder(target, helper, gamma, temperature, length=50, graphs=fast and graphs)
            assert decoder.graphs == (fast and graphs), "fell back"
            if fast and not graphs:
                decoder.forms = [Compiled(model) for model in decoder.models]
            rounds = decoder.generate([PROMPTS[0]], 20, seed=3)
            texts.append([token for outcome in rounds for token in outcome.tokens[0]])
        assert texts[0] == texts[1], (
            f"the fast path gives other tokens at temperature {temperature}, gamma {gamma}")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_give_the_tokens_of_the_eager_path_from_the_same_uniforms():
    fast_and_eager("cuda", torch.float32, graphs=True)


@pytest.mark.slow
def test_compiled_steps_give_the_tokens_of_the_eager_path_on_a_cpu():
    fast_and_eager("cpu", torch.float64, graphs=False)     # float32 is packed, and not compiled


def test_graphs_that_fail_are_one_sentence_and_decoding_goes_on(target, draft, monkeypatch, capsys):
    """A machine with a GPU and no compiler, in the place of which any error will do."""
    def no_compiler(model):
        raise RuntimeError("Failed to find C compiler.\nPlease specify via CC environment variable")

    monkeypatch.setattr(speculative, "Compiled", no_compiler)
    decoder = Decoder(target, draft, 3)
    steps = decoder.run_propose, decoder.run_decide
    assert speculative.record(decoder) is False
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "graphs are off" in err and "C compiler. Please" in err, err
    assert (decoder.run_propose, decoder.run_decide) == steps and decoder.forms == decoder.models
    text = [t for r in decoder.generate([PROMPTS[0]], 20) for t in r.tokens[0]]
    assert text == complete(target, [PROMPTS[0]], 20)[0]


# ------------------------------------------------------------------------------ the command line

@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A pair with its tokenizer, a draft of another vocabulary, a model too small for its own."""
    root = tmp_path_factory.mktemp("checkpoints")
    text = ["def f(x):\n    return x + 1\n" * 9]
    for name, words, entries in (("target", text, 270), ("draft", text, 270),
                                 ("stranger", ["zebra quagga okapi " * 9], 270),
                                 ("small", text, 260)):
        tokenizer = data.train_bpe(words, 270)
        save_checkpoint(Transformer(replace(SMALL, vocab_size=entries)), root / name)
        tokenizer.save(root / name)
    return root


def run_main(folders, capsys, *flags) -> tuple[int, str, str]:
    try:
        main(["--target", str(folders / "target"), "--draft", str(folders / "draft"),
              "--device", "cpu", *map(str, flags)])
        code = 0
    except SystemExit as stop:
        code = stop.code
    return code, *capsys.readouterr()


def test_a_terminal_that_cannot_print_the_text_loses_no_figures(folders, monkeypatch):
    terminal = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", terminal)
    main(["--target", str(folders / "target"), "--draft", str(folders / "draft"),
          "--device", "cpu", "--prompt", "caf\u00e9", "--max-new-tokens", "3"])
    terminal.flush()
    printed = terminal.buffer.getvalue()
    assert printed.startswith(b"caf?") and b"speed-up" in printed


def test_the_command_prints_and_writes_its_figures(folders, capsys, tmp_path):
    path = tmp_path / "figures.json"
    code, out, err = run_main(folders, capsys, "--prompt", "def f", "--max-new-tokens", 12,
                              "--gamma", 4, "--json", path)
    figures = json.loads(path.read_text())
    assert code == 0 and out.startswith("def f"), err
    assert figures["greedy_match"] is True and figures["gamma"] == 4
    for name, words in (("plain_tokens_per_s", "plain decoding"), ("alpha", "alpha"),
                        ("speculative_tokens_per_s", "speculative decoding"),
                        ("speedup", "speed-up"), ("accepted_per_drafted", "accepted / drafted"),
                        ("tokens_per_round", "tokens a round")):
        shown = re.search(rf"^  {words}[^\d\n]*([\d.]+)", out, re.M)[1]
        assert shown == format(figures[name], f".{len(shown.partition('.')[2])}f"), name
    assert figures["speedup"] * figures["plain_tokens_per_s"] == pytest.approx(
        figures["speculative_tokens_per_s"])
    assert len(re.search(r"by position (.*)", out)[1].split(",")) <= 4
    assert run_main(folders, capsys, "--prompt", "def f", "--max-new-tokens", 12, "--gamma",
                    "auto", "--temperature", 0.7)[0] == 0


def test_a_stop_string_ends_both_texts_behind_the_same_token(folders, capsys, tmp_path):
    def printed(*more) -> str:
        code, out, err = run_main(folders, capsys, "--prompt", "def f", "--max-new-tokens", 40,
                                  "--json", tmp_path / "figures.json", *more)
        assert code == 0, err
        assert f", 1 prompts, " in out
        return out.partition("\n\ntemperature 0")[0].removeprefix("def f")

    free = printed()
    string = next(character for character in free[1:] if character.isascii())
    text = printed("--stop", string)
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert figures["accepted_per_drafted"] > 0, "no round had more than one token to stop at"
    assert string in text and free.startswith(text) and len(text) < len(free)
    assert figures["greedy_match"] is True, "a round went on behind the stop string"


def test_the_prompt_can_stand_in_a_file(folders, capsys, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text("def f", encoding="utf-8-sig")          # as some editors save it
    outputs = [run_main(folders, capsys, *prompt, "--max-new-tokens", 12)[1].partition("\n\n")[0]
               for prompt in (("--prompt", "def f"), ("--prompt-file", path))]
    assert outputs[0] == outputs[1]


def test_held_out_prompts_are_passages_from_the_whole_of_the_held_out_code(tmp_path):
    for i in range(40):
        (tmp_path / f"{i:02}.py").write_text("".join(f"x = {100 * i + j}\n" for j in range(40)))
    tokenizer = data.train_bpe(["x = 1\n"], 258)
    data.prepare([f"code={tmp_path}"], tokenizer, tmp_path / "out", val_fraction=0.5)
    held_out = data.Corpus(tmp_path / "out", "val", ["code"]).tokens["code"].tolist()
    prompts = held_out_prompts(tmp_path / "out", tokenizer, 5, 16)
    starts = [next(i for i in range(len(held_out)) if held_out[i:i + 16] == prompt)
              for prompt in prompts]
    assert len(prompts) == 5 and prompts[0] == held_out[:16]
    assert max(starts) > len(held_out) / 2, "all prompts are of the beginning"
    with pytest.raises(ValueError, match="another tokenizer"):
        held_out_prompts(tmp_path / "out", data.train_bpe(["zebra"], 260), 5, 16)
    with pytest.raises(ValueError, match="expected 5: prepare more code"):
        held_out_prompts(tmp_path / "out", tokenizer, 5, 4000)


@pytest.mark.parametrize("flags, words", [
    (("--target", "nowhere"), "nowhere"), (("--draft", "stranger"), "another vocabulary"),
    (("--target", "small"), "270 entries"), (("--device", "quantum"), "quantum"),
    (("--gamma", "0"), "gamma"), (("--gamma", "many"), "expected auto, or 1 to 64"),
    (("--prompt", "x" * 99), "room for a new token"), (("--max-new-tokens", "0"), "max_new_tokens 0"),
    (("--max-new-tokens", "-999"), "max_new_tokens"), (("--dtype", "int8"), "--dtype"),
    (("--top-p", "2"), "top_p"), (("--temperature", "nan"), "temperature nan"),
    (("--device", "meta"), "meta"), (("--bogus",), "--bogus"), (("--seed", "one"), "--seed"),
    (("--prompt-file", "nowhere"), "nowhere"), (("--prompt-file", os.devnull), "prompts of [0]"), (("--gamma", "65"), "gamma is 65"),
    (("--graphs",), "graphs are for a GPU"), (("--json", "."), "file")])
def test_a_mistake_is_one_sentence_and_exit_code_2(folders, capsys, flags, words):
    flags = [str(folders / f) if f.isalpha() and (folders / f).is_dir() else f
             for f in flags]
    code, out, err = run_main(folders, capsys, "--prompt", "def f", *flags)
    assert code == 2 and words in err and err.count("\n") == 1, f"{code}: {err}"
