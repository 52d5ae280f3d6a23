"""The field's known bugs of speculative decoding: each one has a test that would notice it.

    bug, seen in public projects                test (those of test_speculative.py with an S)
    q is not what the draft was drawn from      drafts_are_drawn_from_the_q_that_judges_them,
                                                S a_round_has_exactly_the_targets_joint_distribution
    residual softmaxed, not normalised          S verify_equals_the_oracle_on_the_same_uniforms
    residual zero through rounding              a_residual_of_zero_falls_back_to_p
    acceptance uniforms in bf16                 bf16_models_are_judged_by_float64_uniforms
    a random number serves twice, reseeding     no_uniform_is_used_twice
    the draft lags after full acceptance        S a_draft_equal_to_the_target_is_always_accepted
    longer than the RoPE table or the cache     every_row_can_fill_its_context,
                                                S a_draft_of_shorter_context_changes_nothing
    temperature 0 divides, or q stays soft      greedy_text_does_not_depend_on_the_seed
    EOS inside a draft; max_new_tokens=1        S eos_anywhere_..., S exactly_max_new_tokens_...
    token id 0                                  token_0_is_a_token_and_can_be_eos
    prompt of one token, prompt that fills      every_row_can_fill_its_context
    stale keys: of other rows, the run before   every_p_and_q_is_the_one_without_a_cache,
                                                a_used_decoder_decodes_like_a_fresh_one
    an idle row runs out of its cache           a_row_that_has_ended_stands_still_while_...
    target's token unknown to the draft         S a_draft_with_another_vocabulary_size_...
    adaptive gamma drops a sampled token        auto_gamma_..., a_changing_gamma_keeps_...
    benchmark counts the prompt, or other time  the_benchmark_counts_new_tokens_alone,
                                                seconds_are_those_of_decoding_alone

What bends the distribution in any other way meets tokens_pass_the_chi_square_test. That the tests
notice what they should is shown by test_mutations.py, which puts the bugs back one at a time.
"""
import copy
import itertools
from dataclasses import replace
from statistics import NormalDist
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch

import speculative
from speculative import (Decoder, Stats, compare, complete, prepare_for_decoding, sample, verify,
                         warp)
from test_speculative import PROMPTS, SMALL, Markov, intervals, random_model, toy
from test_speculative import draft, target  # noqa: F401  (fixtures)


@pytest.fixture
def judged(monkeypatch):
    """What verify() gets, round by round: (p, q, drafted, u), while it does what it always does."""
    calls = []

    def spy(*args):
        calls.append([argument.clone() for argument in args])
        return verify(*args)

    monkeypatch.setattr(speculative, "verify", spy)
    return calls


# ------------------------------------------------------------------------------ the distributions

@pytest.mark.parametrize("sampling", [(0.0,), (1.0,), (0.7, 5), (1.3, 0, 0.8)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_drafts_are_drawn_from_the_q_that_judges_them(draft, dtype, sampling):
    """Token v owns the stretch of [0, 1) that ends at q_0 + .. + q_v: a row for the first and one
    for the last thousandth of it. Finer than the 2^-9 by which bf16 would move its ends."""
    V, G, model = SMALL.vocab_size, 3, copy.deepcopy(draft).to(dtype)
    decoder = Decoder(model, model, G, *sampling, batch=2 * V, length=8)

    def propose():
        decoder.read([[5, 6]] * 2 * V)
        return decoder.run_propose(G)

    for i in range(G):
        decoder.u.fill_(0.3)                            # before position i all rows draft alike
        q = propose()[1][:V, i].double()                                        # (V, V)
        end, width = q.cumsum(-1).diagonal(), q.diagonal()                      # (V,)
        decoder.u[:, i] = torch.cat((end - 0.999 * width, end - 0.001 * width))
        drawn = propose()[0][:, i].view(2, V)[:, width > 1e-3].tolist()
        want = torch.arange(V)[width > 1e-3].tolist()
        assert drawn == [want] * 2, f"draft {i} was not drawn from the q that is to judge it"


def test_a_residual_of_zero_falls_back_to_p():
    p = torch.full((4, 2, 4), 0.25)
    q = p[:, :1].clone()
    q[:, 0, 0] += 2**-25                                   # token 0 is rejected once in 2^23 times
    u = torch.tensor([[1 - 2**-53, x] for x in (0.1, 0.4, 0.6, 0.9)], dtype=torch.float64)
    tokens, n = verify(p, q, torch.zeros(4, 1, dtype=torch.int64), u)
    assert n.tolist() == [0] * 4, "the draft has to be rejected here: the test is void"
    assert tokens[:, 0].tolist() == [0, 1, 2, 3], "no residual is left: recovery must draw from p"


def test_every_p_and_q_is_the_one_without_a_cache(target, draft, judged):
    """Rows of other lengths accept other numbers of drafts, many rounds long: what each draft is
    judged by must be what the models say of that row's text, read afresh."""
    decoder = Decoder(target, draft, 3, 1.0, batch=len(PROMPTS), length=45)
    texts, lengths = copy.deepcopy(PROMPTS), set()
    for done in decoder.generate(PROMPTS, 24, seed=3):
        p, q, drafted, _ = judged[-1]
        for b, text in enumerate(texts):
            if done.tokens[b]:
                everything = torch.tensor([text + drafted[b].tolist()])
                for name, model, got in (("p", target, p[b]), ("q", draft, q[b])):
                    want = warp(model(everything)[0, len(text) - 1:], 1.0)[:len(got)]
                    worst = (got - want).abs().max()
                    assert worst < 1e-9, (
                        f"{name} of row {b} after {len(text)} tokens is off by {worst:.1e}: its "
                        "cache lacks a token or shows stale keys")
                lengths.add(done.accepted[b])
            text += done.tokens[b]
    assert lengths == {0, 1, 2, 3}, f"only {lengths} drafts were ever accepted: a weak test"


def test_a_used_decoder_decodes_like_a_fresh_one(target, draft):
    decoder = Decoder(target, draft, 3, 1.0, batch=2, length=50)
    list(decoder.generate([[1] * 20, [2]], 25))         # a run that ends, and one that is given up
    next(decoder.generate([[1] * 20, [2]], 25))
    prompts, used = [[3], [4] * 9], [[], []]
    for done in decoder.generate(prompts, 25, seed=5):
        used = [row + tokens for row, tokens in zip(used, done.tokens)]
    fresh = complete(target, prompts, 25, draft=draft, gamma=3, temperature=1.0, seed=5)
    assert used == fresh, "a decoder remembers something of the run before"


def test_a_row_that_has_ended_stands_still_while_others_go_on(target):
    """With the target as its own draft all guesses are accepted, so a row that went on would leave
    its cache soon. Rows that have ended stay where they are, whatever they are fed."""
    decoder = Decoder(target, target, 3, batch=2, length=60)
    answers = iter([True])                                  # to row 0's first token, then False
    rounds = list(decoder.generate([[5, 6], [1, 2, 3]], 50, stop=lambda new: next(answers, False)))
    assert [len(r.tokens[0]) for r in rounds] == [1] + [0] * 12, "a row that has ended went on"
    answers = iter([True])
    positions = [[int(cache.position[0]) for cache in decoder.caches] for _ in decoder.generate(
        [[5, 6], [1, 2, 3]], 50, stop=lambda new: next(answers, False))]
    assert all(position == positions[0] for position in positions), (
        f"the caches of a row that has ended move on: {positions}")


def test_a_row_that_ends_last_of_all_its_places_leaves_room_for_the_others(target):
    """It is computed from where it ended, up to G tokens beyond its length."""
    decoder = Decoder(target, target, 7, batch=2, length=56)
    whole, other = decoder.generate([[5, 6], [1] * 39], 60), complete(target, [[5, 6]], 54)
    assert sum((r.tokens[0] for r in whole), []) == other[0], "the longer row ran out of its cache"


# ------------------------------------------------------------------------------ the random numbers

def test_bf16_models_are_judged_by_float64_uniforms(target, draft, judged):
    pair = [copy.deepcopy(model).bfloat16() for model in (target, draft)]
    complete(pair[0], PROMPTS, 20, draft=pair[1], gamma=4, temperature=1.0)
    u = torch.cat([call[3].flatten() for call in judged])
    coarse = (u * 2**24 == (u * 2**24).round()).double().mean()
    assert u.dtype == torch.float64 and coarse < 0.01, (
        f"{u.dtype}, {coarse:.0%} of the uniforms are multiples of 2^-24: in bf16 a token that is "
        "to be accepted with probability 0.001 is accepted with 0.004")
    assert all(p.dtype == q.dtype == torch.float32 for p, q, _, _ in judged), "p, q below float32"


def test_no_uniform_is_used_twice(target, draft, judged, monkeypatch):
    drawn = []
    monkeypatch.setattr(speculative, "sample", lambda p, u: drawn.append(u.clone()) or sample(p, u))
    B, G = 2, 4
    complete(target, PROMPTS[:B], 20, draft=draft, gamma=G, temperature=1.0)
    accepting = torch.cat([u[:, :G].flatten() for _, _, _, u in judged])
    used = torch.cat([accepting, *drawn])
    assert len(used) == len(judged) * B * (2 * G + 1), "a draft, a verdict or a recovery is missing"
    assert used.unique().numel() == len(used), (
        "a uniform occurs twice: drafts, acceptance and recovery need numbers of their own, in "
        "every round and row, and nothing may reseed")


def test_greedy_text_does_not_depend_on_the_seed(target, draft):
    plain, = complete(target, [[5, 6]], 20)
    rows = complete(target, [[5, 6]] * 200, 20, draft=draft, gamma=4, seed=11)  # row b: seed 11 + b
    wrong = sum(row != plain for row in rows)
    assert not wrong, f"{wrong} of 200 greedy runs differ from plain greedy decoding"


# ------------------------------------------------------------------------------------- the corners

def test_every_row_can_fill_its_context(target, draft):
    lengths = [1, 2, 58, SMALL.max_position_embeddings - 1]
    prompts = [[3] * n for n in lengths]
    plain = complete(target, prompts, 99)
    room = [SMALL.max_position_embeddings - n for n in lengths]
    assert [len(row) for row in plain] == room, "prompt and new tokens must fill the context"
    for gamma in (1, 5, 12):
        assert complete(target, prompts, 99, draft=draft, gamma=gamma) == plain, (
            f"gamma {gamma}: drafting beyond the end of the context changed the text before it")


def test_token_0_is_a_token_and_can_be_eos():
    circle = Markov(np.eye(4)[[1, 2, 3, 0]] + 1e-9)         # 0 1 2 3 0 1 2 3 ...
    for gamma in (1, 2, 6):
        settings = dict(draft=circle, gamma=gamma)
        assert complete(circle, [[0], [2]], 5, **settings) == [[1, 2, 3, 0, 1], [3, 0, 1, 2, 3]]
        assert complete(circle, [[0], [2]], 9, eos_id=0, **settings) == [[1, 2, 3, 0], [3, 0]], (
            f"gamma {gamma}: EOS with id 0 must end its row, and be the last that is emitted")


# -------------------------------------------------------------------------------- gamma by itself

@pytest.mark.parametrize("B", [1, 2, 3, 4])
def test_auto_gamma_leaves_greedy_text_alone(target, draft, B):
    plain = complete(target, PROMPTS[:B], 40)
    got = complete(target, PROMPTS[:B], 40, draft=draft, gamma="auto")
    assert got == plain, f"gamma auto changed the greedy text of {B} rows"


def test_auto_gamma_is_chosen_before_drafting_and_all_drafts_are_judged(target, draft, judged,
                                                                        monkeypatch):
    events, schedule = [("chosen", 5)], speculative.next_gamma
    monkeypatch.setattr(speculative, "next_gamma",
                        lambda *args: events.append(("chosen", schedule(*args))) or events[-1][1])
    monkeypatch.setattr(speculative, "sample",
                        lambda p, u: events.append(("drew",)) or sample(p, u))
    rounds = list(Decoder(target, draft, "auto", 1.0, length=44).generate([PROMPTS[0]], 40))
    lengths = [call[2].shape[1] for call in judged]
    want = [event for G in lengths for event in [("chosen", G)] + [("drew",)] * (G + 1)]
    assert events[:len(want)] == want and len(events) <= len(want) + 1, (
        "a round is: choose G, draw G guesses, verify all G, draw one token")
    assert [done.gamma for done in rounds] == lengths and len(set(lengths)) > 1


@pytest.mark.parametrize("lengths", [(1, 2), (2, 1)])
def test_a_changing_gamma_keeps_the_exact_distribution_of_pairs(monkeypatch, lengths):
    """All of generate() with all that the uniforms of two rounds can decide, a row for each, while
    gamma "auto" chooses another length for the second round. No sampling error: 1e-12."""
    P, Q = toy(2, 1, False), toy(2, 2, False)
    left = [oracle.residual(p, q) for p, q in zip(P, Q)]
    points = [intervals([Q.cumsum(-1).ravel()]), intervals([(P / Q).ravel()]),
              intervals([P.cumsum(-1).ravel(), np.cumsum(left, -1).ravel()])]
    every = [[points[0]] * G + [points[1]] * G + [points[2]] for G in lengths]     # by round
    u = torch.tensor(list(itertools.product(*(middles for middles, _ in sum(every, [])))))
    weight = np.prod(list(itertools.product(*(widths for _, widths in sum(every, [])))), axis=1)
    scripts = list(zip(lengths, u.split([len(columns) for columns in every], dim=1)))
    monkeypatch.setattr(speculative, "FIRST_GAMMA", lengths[0])
    monkeypatch.setattr(speculative, "next_gamma", lambda *args: lengths[1])
    decoder = Decoder(Markov(P), Markov(Q), "auto", 1.0, batch=len(u), length=4)
    genuine = decoder.run_propose

    def scripted(G):
        length, uniforms = scripts.pop(0)
        assert length == G
        decoder.u[:, :2 * G + 1] = uniforms
        return genuine(G)

    decoder.run_propose = scripted
    rows = [[] for _ in u]
    for done in decoder.generate([[0]] * len(u), 2):
        rows = [row + tokens for row, tokens in zip(rows, done.tokens)]
    pairs = dict.fromkeys(itertools.product(range(2), repeat=2), 0.0)
    for row, w in zip(rows, weight):
        pairs[tuple(row)] += w
    want = oracle.target_joint(P, 0, 2)
    worst = max(abs(pairs[pair] - want[pair]) for pair in want)
    assert worst < 1e-12, f"pairs are off by {worst:.1e}: a token was dropped because of what it is"


# ------------------------------------------------------------------------------------ the benchmark

def test_the_benchmark_counts_new_tokens_alone(target, draft):
    decoders = [Decoder(target, helper, 4, length=50) for helper in (None, draft)]
    for stats, texts in compare(decoders, [[5] * 30, [7, 8]], 9):
        assert sum(map(len, texts)) == 18
        assert stats.emitted == 18, f"two prompts of 9 new tokens are 18: {stats.emitted} counted"
        assert stats.rounds <= 18, "the warm-up was counted"


def test_seconds_are_those_of_decoding_alone(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(speculative, "time", SimpleNamespace(perf_counter=lambda: now[0]))

    class Slow(Markov):
        def hidden(self, tokens, cache):
            now[0] += 1                                     # a pass takes a second
            return super().hidden(tokens, cache)

        def __call__(self, tokens, cache):
            return self.hidden(tokens, cache)

    stats, decoder = Stats(), Decoder(Slow(toy(4, 1, False)), Slow(toy(4, 2, False)), 2, length=8)
    for _ in decoder.generate([[0]], 7, stats=stats):
        now[0] += 1000                                      # what the caller does with a round
    assert stats.seconds == 2 + 3 * stats.rounds, (
        f"two prompts and {stats.rounds} rounds of three seconds were timed as {stats.seconds}")


# -------------------------------------------------------------------------- statistics and rounding

FALSE_ALARM = 1e-6


def chi_square(texts: np.ndarray, P: np.ndarray, k: int) -> tuple[float, float, float]:
    """Pearson's statistic of disjoint blocks of k tokens, each given the token before it, against
    the target's joint distribution: (statistic, its critical value, number of blocks).

    Blocks follow a Markov chain, so the statistic has V (V^k - 1) degrees of freedom. Its critical
    value is Wilson and Hilferty's (1931), at which a right decoder fails once in 10^6 seeds.
    """
    V = len(P)
    blocks = np.concatenate((texts[:, :-1].reshape(-1, k)[:, :1], texts[:, 1:].reshape(-1, k)), 1)
    seen = np.bincount(blocks @ V ** np.arange(k, -1, -1), minlength=V ** (k + 1)).reshape(V, -1)
    want = seen.sum(1, keepdims=True) * np.array(
        [list(oracle.target_joint(P, start, k).values()) for start in range(V)])
    assert want.min() > 5, f"{want.min():.1f} blocks expected in a cell: too few for the test"
    df, z = V * (V**k - 1), NormalDist().inv_cdf(1 - FALSE_ALARM)
    critical = df * (1 - 2 / (9 * df) + z * (2 / (9 * df)) ** 0.5) ** 3
    return float(((seen - want) ** 2 / want).sum()), critical, len(blocks)


def sampled_texts(P, Q, gamma, N=4000, T=12):
    rows = complete(Markov(P), [[0]] * N, T, draft=Markov(Q), gamma=gamma, temperature=1.0, seed=1)
    return np.array([[0, *row] for row in rows])            # (N, 1 + T)


@pytest.mark.parametrize("gamma", [1, 3, "auto"])
def test_tokens_pass_the_chi_square_test(gamma, monkeypatch):
    """Pairs and triples wherever rounds begin and end, drawn with the decoder's own generators."""
    P, Q = (0.75 * toy(3, seed, False) + 0.25 / 3 for seed in (1, 2))

    def recover_from_p(p, q, drafted, u):
        tokens, n = verify(p, q, drafted, u)
        other = sample(p[torch.arange(len(p)), n], u[:, -1])
        return speculative.Verdict(tokens.scatter(1, n[:, None], other[:, None]), n)

    right = sampled_texts(P, Q, gamma)
    if gamma == 3:
        monkeypatch.setattr(speculative, "verify", recover_from_p)
        wrong = sampled_texts(P, Q, gamma)
    for k in (2, 3):
        got, critical, blocks = chi_square(right, P, k)
        floor = ((critical - len(P) * (len(P) ** k - 1)) / blocks) ** 0.5
        assert got < critical, (
            f"blocks of {k} tokens are not the target's: chi-square {got:.0f}, critical "
            f"{critical:.0f}; probabilities are off by more than {floor:.1%} (root mean square)")
        if gamma == 3:
            bad = chi_square(wrong, P, k)[0]
            assert bad > 3 * critical, f"a wrong rule gives {bad:.0f} only, critical {critical:.0f}"


def test_bf16_greedy_differs_from_plain_only_at_near_ties():
    """One row and several go through other sums, so bf16 passes differ by their rounding.

    The bound: each of about 10 roundings a layer is off by up to 2^-8 of what it rounds;
    independent errors add up as the root of their number, which puts one logit off by
    2^-8 * sqrt(10 * layers) * rms(logits), and a comparison of two by twice that. Measured errors
    are 0.4 of it in root mean square. Exact logits are those of the same weights in float64. Where
    the texts part, one of them took a token that is not the best, so the two best are that near.
    """
    config = replace(SMALL, hidden_size=256, intermediate_size=384, num_hidden_layers=2,
                     num_attention_heads=8, num_key_value_heads=4, vocab_size=300)
    exact = random_model(config, 1, noise=0.12).bfloat16().double()     # weights that bf16 can hold
    draft = random_model(config, 2, like=exact, noise=0.012).bfloat16()
    target, draft = map(prepare_for_decoding, (copy.deepcopy(exact).bfloat16(), draft))
    prompts = torch.randint(300, (12, 4), generator=torch.Generator().manual_seed(0)).tolist()
    plain = [complete(target, [prompt], 40)[0] for prompt in prompts]
    stats = Stats()
    fast = complete(target, prompts, 40, draft=draft, gamma=4, stats=stats)
    assert 0.2 < stats.alpha < 0.8, f"alpha is {stats.alpha:.2f}: drafts must come both ways"
    for name, texts in (("plain", plain), ("speculative", fast)):
        whole = torch.tensor([a + b for a, b in zip(prompts, texts)])
        logits = exact(whole)[:, 3:-1]                                          # (B, T, V)
        bound = 2 * 2**-8 * (10 * config.num_hidden_layers) ** 0.5 * logits.square().mean().sqrt()
        best, second = logits.topk(2).values.unbind(-1)
        short = (best - logits.gather(-1, whole[:, 4:, None])[..., 0]).max()
        assert short < bound, (f"{name} decoding took a token {short:.3f} below the best logit: "
                               f"rounding explains {bound:.3f}")
        assert (best - second < bound).double().mean() < 0.25, "most tokens must not be near ties"
