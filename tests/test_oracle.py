"""Claims about the oracle itself: everything else is held against it, so it is held against proofs.

Speculative decoding is enumerated, not sampled; AdamW, clipping and the parts of the model are
compared with PyTorch's own float64. The proof is also shown to catch bugs seen in the wild.

    pytest tests/test_oracle.py
"""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle

EXACT = 1e-12  # float64 sums of at most a few thousand terms below 1 stay well under this


def toy_chain(rng: np.random.Generator, vocab: int, zeros: bool = False) -> np.ndarray:
    """A random transition matrix (V, V); with `zeros`, some tokens impossible, as after top-k."""
    rows = rng.dirichlet(np.full(vocab, 0.7), size=vocab)
    if zeros:
        rows = rows * (rng.random(rows.shape) < 0.6) + np.eye(vocab) * 1e-3
    return rows / rows.sum(axis=1, keepdims=True)


def assert_near(found, wanted, message: str) -> None:
    error = np.abs(np.asarray(found) - np.asarray(wanted)).max()
    assert error < EXACT, f"{message} (off by {error:.1e})"


def farthest(found: dict, wanted: dict) -> float:
    """The greatest difference between two distributions over token sequences."""
    return max(abs(found.get(k, 0) - wanted.get(k, 0)) for k in found.keys() | wanted.keys())


CHAINS = [(V, G, zeros) for V in (2, 3, 4) for G in (1, 2, 3) for zeros in (False, True)]


@pytest.mark.parametrize("vocab, gamma, zeros", CHAINS)
def test_speculative_rounds_have_the_targets_joint_distribution(vocab, gamma, zeros):
    rng = np.random.default_rng([vocab, gamma, zeros])
    P, Q = toy_chain(rng, vocab, zeros), toy_chain(rng, vocab, zeros)
    n = gamma + 2  # more than a round can emit, so that rounds are chained
    for start in range(vocab):
        joint = oracle.exact_joint(P, Q, start, gamma, n)
        error = farthest(joint, oracle.target_joint(P, start, n))
        assert error < EXACT, f"the first {n} tokens after {start} are {error:.1e} off the target's"


def broken_residual_softmax(p, q):
    return oracle.softmax(np.maximum(p - q, 0))


def broken_residual_p(p, q):
    return p


def broken_accept_always(p, q):
    return 1.0


BUGS = [("residual", broken_residual_softmax), ("residual", broken_residual_p),
        ("accept_probability", broken_accept_always)]


@pytest.mark.parametrize("name, broken", BUGS)
def test_the_enumeration_sees_a_broken_rule(monkeypatch, name, broken):
    rng = np.random.default_rng(0)
    P, Q = toy_chain(rng, 3), toy_chain(rng, 3)
    monkeypatch.setattr(oracle, name, broken)
    error = farthest(oracle.exact_joint(P, Q, 0, 2, 3), oracle.target_joint(P, 0, 3))
    assert error > 1e-3, f"{broken.__name__} went unseen: the proof proves nothing"


def test_verify_does_what_the_enumeration_assumes():
    """All uniforms are tried: where p/q and the residuals are twelfths, 12 midpoints are exact."""
    P = np.array([[2, 1, 1], [0, 3, 1], [1, 1, 2]]) / 4
    Q = np.array([[1, 2, 1], [2, 2, 0], [2, 1, 1]]) / 4
    gamma, uniforms = 2, (np.arange(12) + 0.5) / 12
    for start in range(3):
        emitted = defaultdict(float)
        for drafted in itertools.product(range(3), repeat=gamma):
            context = [start, *drafted]
            p, q = P[context], Q[context[:-1]]
            drawn = q[0, drafted[0]] * q[1, drafted[1]]
            for u in itertools.product(uniforms, repeat=gamma + 1):
                tokens, n = oracle.verify(p, q, drafted, u[:gamma], u[gamma])
                assert len(tokens) == n + 1, "a round emits the accepted drafts and one token more"
                emitted[tuple(tokens)] += drawn / 12 ** (gamma + 1)
        error = farthest(emitted, oracle.exact_round(P, Q, start, gamma))
        assert error < EXACT, f"verify is {error:.1e} off the enumeration from start {start}"


def test_a_perfect_draft_is_always_accepted_and_an_impossible_token_never():
    rng = np.random.default_rng(1)
    p = toy_chain(rng, 4)
    almost_one = np.full(3, np.nextafter(1, 0))
    for drafted in itertools.product(range(4), repeat=3):
        assert oracle.verify(p, p[:3], drafted, almost_one, 0.5)[1] == 3, "draft == target rejected"
    p[0] = [0, 0.5, 0.5, 0]
    tokens, n = oracle.verify(p, np.full((3, 4), 0.25), [0, 1, 2], np.zeros(3), 0.0)
    assert (tokens, n) == ([1], 0), "a token of target probability 0 came through at u = 0"


@pytest.mark.parametrize("gamma", [1, 2, 4])
def test_the_whole_routine_is_rounds_that_follow_one_another(gamma):
    """With Markov chains as models: greedy text is the target's own, and sampled text comes from
    the same uniforms as rounds of verify() by hand."""
    rng = np.random.default_rng(gamma)
    P, Q = toy_chain(rng, 5), toy_chain(rng, 5)

    def target(tokens):
        return np.log(P[tokens])

    def draft(tokens):
        return np.log(Q[tokens])

    text = [3]
    for _ in range(12):
        text.append(int(P[text[-1]].argmax()))
    greedy = oracle.speculative_decoding(target, draft, [3], 12, gamma, rng.random)
    assert greedy == text[1:], "greedy speculative text is not the target's greedy text"
    u = rng.random((99, 2 * gamma + 1))
    want = [3]
    for row in u:
        drafted = []
        for i in range(gamma):
            drafted.append(oracle.sample(Q[(want + drafted)[-1]], row[i]))
        context = [want[-1], *drafted]
        want += oracle.verify(P[context], Q[context[:-1]], drafted, row[gamma:-1], row[-1])[0]
    rows = iter(u)
    got = oracle.speculative_decoding(target, draft, [3], 20, gamma, lambda n: next(rows), 1.0)
    assert got == want[1:21], "a round does not go on where the one before it ended"


def test_expected_tokens_is_the_mean_length_of_a_round():
    P, Q = np.tile([0.5, 0.3, 0.2], (3, 1)), np.tile([0.2, 0.2, 0.6], (3, 1))  # alpha is constant
    alpha = np.minimum(P[0], Q[0]).sum()
    for gamma in (1, 2, 3):
        mean = sum(len(s) * prob for s, prob in oracle.exact_round(P, Q, 0, gamma).items())
        assert abs(mean - oracle.expected_tokens(alpha, gamma)) < EXACT, "Leviathan's eq. 1 fails"
    assert oracle.expected_tokens(1.0, 3) == 4 and oracle.expected_tokens(0.0, 3) == 1


LOGITS = np.log([0.1, 0.4, 0.05, 0.2, 0.25])


@pytest.mark.parametrize("temperature, top_k, top_p, kept", [
    (1.0, 0, 1.0, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.2, 4: 0.25}),
    (0.5, 2, 1.0, {1: 0.16, 4: 0.0625}),  # temperature 1/2 squares the probabilities
    (1.0, 0, 0.64, {1: 0.4, 4: 0.25}),
    (1.0, 0, 0.66, {1: 0.4, 4: 0.25, 3: 0.2}),
    (1.0, 3, 0.74, {1: 0.4, 4: 0.25}),  # 0.65 of the 0.85 that top-k leaves is 0.76: top-k first
    (0.5, 0, 0.58, {1: 1}),  # 0.16 of 0.275 is 0.582 at temperature 1/2: temperature before top-p
    (1.0, 0, 0.0, {1: 1}),  # one token is kept at least
    (1.0, 99, 1.0, {0: 0.1, 1: 0.4, 2: 0.05, 3: 0.2, 4: 0.25}),
    (0.0, 3, 0.5, {1: 1}),
    (1e-3, 0, 1.0, {1: 1}),
])
def test_warp_keeps_the_right_tokens_in_proportion(temperature, top_k, top_p, kept):
    wanted = np.array([kept.get(token, 0.0) for token in range(5)])
    p = oracle.warp(LOGITS, temperature, top_k, top_p)
    assert abs(p.sum() - 1) < EXACT, "a warped distribution does not sum to one"
    assert_near(p, wanted / wanted.sum(), "other tokens are kept")


def test_warp_breaks_ties_as_it_says():
    tied = np.array([1.0, 2.0, 2.0, 2.0])
    assert oracle.warp(tied, 0.0, 0, 1.0).tolist() == [0, 1, 0, 0], "greedy takes the first argmax"
    assert (oracle.warp(tied, 1.0, 1, 1.0) > 0).tolist() == [False, True, True, True], "top-k ties"
    assert (oracle.warp(tied, 1.0, 0, 0.5) > 0).tolist() == [False, True, True, False], "top-p ties"
    assert oracle.warp(tied[1:3], 1.0, 0, 0.5).tolist() == [1, 0], "a mass of just top_p is enough"


def test_sample_inverts_the_running_sum():
    p = np.array([0.0, 0.25, 0.0, 0.25, 0.0])  # sums to 0.5: the mass is not assumed to be one
    draws = [oracle.sample(p, u) for u in (0.0, 0.49, 0.5, np.nextafter(1, 0))]
    assert draws == [1, 1, 3, 3], "a token of probability 0, or one beyond its share, was drawn"


# ---- The model and the optimizer against PyTorch -----------------------------------------------


def tensor(x) -> torch.Tensor:
    return torch.tensor(np.asarray(x), dtype=torch.float64)


def test_the_parts_of_the_model_equal_pytorchs():
    rng = np.random.default_rng(2)
    x, weight = rng.normal(size=(5, 6)), rng.normal(size=6)
    wanted = F.rms_norm(tensor(x), (6,), tensor(weight), 1e-5)
    assert_near(oracle.rms_norm(x, weight, 1e-5), wanted, "rms_norm differs from PyTorch's")

    q, k, v = (rng.normal(size=(5, heads, 4)) for heads in (6, 2, 2))
    by_head = (tensor(a).transpose(0, 1) for a in (q, k, v))
    wanted = F.scaled_dot_product_attention(*by_head, is_causal=True, enable_gqa=True)
    assert_near(oracle.attention(q, k, v), wanted.transpose(0, 1), "attention differs from SDPA")

    gate, up, down = rng.normal(size=(7, 6)), rng.normal(size=(7, 6)), rng.normal(size=(6, 7))
    hidden = F.silu(tensor(x) @ tensor(gate).T) * (tensor(x) @ tensor(up).T)
    wanted = hidden @ tensor(down).T
    assert_near(oracle.swiglu(x, gate, up, down), wanted, "swiglu differs from PyTorch's")

    targets = rng.integers(0, 6, size=5)
    wanted = F.cross_entropy(tensor(x), torch.tensor(targets)).item()
    assert abs(oracle.loss(x, targets) - wanted) < EXACT, "the loss differs from cross_entropy"


def test_rope_depends_on_distance_alone_and_turns_halves():
    rng = np.random.default_rng(3)
    q, k = rng.normal(size=(2, 1, 1, 8))
    scores = [(oracle.rope(q, [t + 3], 1e4) * oracle.rope(k, [t], 1e4)).sum() for t in (0, 1, 2000)]
    assert np.ptp(scores) < 1e-10, "q.k changes when both positions move together"
    # Half rotation, as complex numbers: component i is the real part, i + D/2 the imaginary one.
    angle = 5 * 1e4 ** (-np.arange(4) / 4)
    turned = (q[..., :4] + 1j * q[..., 4:]) * np.exp(1j * angle)
    wanted = np.concatenate([turned.real, turned.imag], axis=-1)
    assert_near(oracle.rope(q, [5], 1e4), wanted, "rope pairs or turns otherwise")


@pytest.mark.parametrize("tied", [False, True])
def test_forward_is_causal_and_reads_each_weight(tied):
    rng = np.random.default_rng(4)
    config = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                             rms_norm_eps=1e-5, rope_theta=1e4, tie_word_embeddings=tied)
    C, KD, hidden, V = 16, 8, 24, 11
    shapes = {"model.embed_tokens.weight": (V, C), "model.norm.weight": (C,)}
    if not tied:
        shapes["lm_head.weight"] = (V, C)
    layer = {"input_layernorm": (C,), "post_attention_layernorm": (C,),
             "self_attn.q_proj": (C, C), "self_attn.k_proj": (KD, C), "self_attn.v_proj": (KD, C),
             "self_attn.o_proj": (C, C), "mlp.gate_proj": (hidden, C), "mlp.up_proj": (hidden, C),
             "mlp.down_proj": (C, hidden)}
    shapes |= {f"model.layers.{i}.{name}.weight": s for i in range(2) for name, s in layer.items()}
    weights = {name: rng.normal(size=shape) * 0.3 for name, shape in shapes.items()}
    tokens = [1, 2, 3, 4, 5]
    logits = oracle.forward(weights, config, tokens)
    assert logits.shape == (5, V) and logits.dtype == np.float64
    early = oracle.forward(weights, config, tokens[:3])
    assert_near(logits[:3], early, "a later token changed earlier logits")
    for name in weights:
        changed = oracle.forward(weights | {name: weights[name] * 1.1}, config, tokens)
        assert np.abs(changed - logits).max() > 1e-6, f"{name} has no effect on the logits"


def test_adamw_and_clipping_equal_pytorchs():
    rng = np.random.default_rng(5)
    params = [torch.nn.Parameter(tensor(rng.normal(size=shape))) for shape in ((3, 4), (5,))]
    ours = [(p.detach().numpy().copy(), np.zeros(p.shape), np.zeros(p.shape)) for p in params]
    optimizer = torch.optim.AdamW(params, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    for step in range(1, 21):
        lr = oracle.lr_at(step, 1e-2, 1e-3, 5, 20)
        size = 2 * rng.random()  # some steps are clipped, some are not
        grads = [size * rng.normal(size=p.shape) for p in params]
        for p, g in zip(params, grads):
            p.grad = tensor(g)
        optimizer.param_groups[0]["lr"] = lr
        norm = torch.nn.utils.clip_grad_norm_(params, 2.0).item()
        optimizer.step()
        clipped, our_norm = oracle.clip_by_global_norm(grads, 2.0)
        assert abs(norm - our_norm) < EXACT, f"step {step}: the norm is not that of all gradients"
        for p, g in zip(params, clipped):
            assert_near(g, p.grad, f"step {step}: clipping differs from PyTorch's")
        ours = [oracle.adamw_step(p, g, m, v, step, lr, 0.9, 0.95, 1e-8, 0.1)
                for (p, m, v), g in zip(ours, clipped)]
        for p, (our_p, _, _) in zip(params, ours):
            assert_near(our_p, p.detach(), f"step {step}: AdamW differs from PyTorch's")


def test_the_schedule_rises_to_max_and_ends_at_min():
    rates = [oracle.lr_at(step, 6e-4, 6e-5, 10, 110) for step in range(121)]
    assert rates[0] == 0 and rates[5] == 3e-4 and rates[10] == 6e-4, "the warm-up is not linear"
    assert abs(rates[60] - 3.3e-4) < EXACT, "halfway through the cosine is the mean of both rates"
    assert all(a > b for a, b in zip(rates[10:110], rates[11:111])), "the cosine does not fall"
    assert rates[110:] == [6e-5] * 11, "min_lr holds from the last step on"
