"""Claims about the transformer: it computes what the oracle does, with a cache and without.

    pytest tests/test_model.py
"""
import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import oracle
from model import (PRESETS, Cache, ModelConfig, RMSNorm, Transformer, attention_formula, rope,
                   rotate)

HEADS = {"MHA": {}, "grouped": {"num_key_value_heads": 2}, "one-kv": {"num_key_value_heads": 1},
         "tied": {"tie_word_embeddings": True},
         "grouped-tied": {"num_key_value_heads": 2, "tie_word_embeddings": True}}
EXACT = 1e-12       # float64, logits of order 1: the same sums in another order


def random_tokens(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(61, shape, generator=torch.Generator().manual_seed(seed))


def off(found, wanted) -> float:
    """The largest difference."""
    return float((torch.as_tensor(found) - torch.as_tensor(wanted)).abs().max())


# ------------------------------------------------------------------------------------- the formula

@pytest.mark.parametrize("heads", HEADS)
def test_logits_equal_the_oracles(tiny, heads):
    model, tokens = tiny(rope_theta=100.0, **HEADS[heads]), random_tokens(2, 20)
    weights = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        logits = model(tokens)
    for row, row_tokens in zip(logits, tokens):
        error = off(row, oracle.forward(weights, model.config, row_tokens.numpy()))
        # 1e-10: the oracle's tanh form of the sigmoid and its loops round otherwise than PyTorch.
        assert error < 1e-10, f"{heads}: logits are {error:.1e} off the oracle's"


@pytest.mark.parametrize("heads", HEADS)
def test_the_fused_attention_equals_its_formula(tiny, heads, monkeypatch):
    def written_out(q, k, v, mask=None, is_causal=False, enable_gqa=False):
        if mask is None:
            assert is_causal, "attention without a mask must be causal"
            mask = torch.full((1, 1, q.shape[2], k.shape[2]), -torch.inf).triu(1)
        return attention_formula(q, k, v, mask)

    model, tokens = tiny(**HEADS[heads]), random_tokens(2, 11)

    @torch.no_grad()
    def logits():
        cache = Cache(model.config, 2, 11, dtype=torch.float64)
        return torch.stack((model(tokens), torch.cat((model(tokens[:, :6], cache),
                                                      model(tokens[:, 6:], cache)), 1)))

    fused = logits()
    monkeypatch.setattr(F, "scaled_dot_product_attention", written_out)
    error = off(fused, logits())
    assert error < EXACT, f"{heads}: SDPA and attention_formula differ by {error:.1e}"


def test_the_worked_example_of_rope_is_true():
    """rope's docstring turns (1, 0, 0, 1) at position 1 by 1 and 0.01 radians."""
    config = ModelConfig(hidden_size=4, num_attention_heads=1, num_key_value_heads=1)
    cos, sin = rope(torch.tensor([[1]]), config, torch.float64)
    turned = rotate(torch.tensor([[[[1.0, 0, 0, 1]]]], dtype=torch.float64), cos, sin).flatten()
    wanted = torch.tensor([math.cos(1), -math.sin(0.01), math.sin(1), math.cos(0.01)])
    assert off(turned, wanted) < 1e-6, f"(1, 0, 0, 1) turned to {turned.tolist()}"
    numbers = " ".join(f"{x:.3f}" for x in turned)
    assert numbers == "0.540 -0.010 0.841 1.000"
    if rope.__doc__:                                            # none under python -OO
        assert all(f"= {x}" in rope.__doc__ for x in numbers.split()), "the docstring says otherwise"


def test_norm_of_bf16_rounds_once():
    generator = torch.Generator().manual_seed(0)
    norm = RMSNorm(768, 1e-5).bfloat16()
    torch.nn.init.normal_(norm.weight, 1, 0.3, generator=generator)
    x = torch.randn(64, 768, generator=generator).bfloat16()
    wanted = oracle.rms_norm(x.double().numpy(), norm.weight.detach().double().numpy(), 1e-5)
    error = off(norm(x).detach().double() / torch.from_numpy(wanted), 1)
    # bf16 keeps 8 bits, so rounding once is at most 2^-8 = 0.0039 off (relative), plus float32's.
    assert norm(x).dtype == torch.bfloat16
    assert error < 2**-8 + 1e-6, f"a bf16 norm is {error:.5f} off: it rounds in between"


def test_residual_stream_under_autocast_is_bf16(tiny):
    model, seen = tiny(torch.float32), []
    for layer in model.model["layers"]:
        layer.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(random_tokens(1, 5))
    assert len(seen) == 4 and {x.dtype for x in seen} == {torch.bfloat16}, (
        f"the residual stream is {[x.dtype for x in seen]}: twice the memory traffic it needs")
    logits.float().sum().backward()
    assert {p.grad.dtype for p in model.parameters()} == {torch.float32}, (
        "the weights and their gradients stay float32 under autocast")


# --------------------------------------------------------------------------------------- the cache

def feed(model, tokens, cache):
    """Logits of tokens that follow what the cache holds, and hold them as well."""
    logits = model(tokens, cache)
    cache.advance(tokens.shape[1])
    return logits


def test_the_model_never_moves_the_cache(tiny):
    model, tokens = tiny(), random_tokens(2, 5)
    cache = Cache(model.config, 2, 8, dtype=torch.float64)
    with torch.no_grad():
        first, second = model(tokens, cache), model(tokens, cache)
    assert cache.position.tolist() == [0, 0], "only advance and rollback move a cache"
    assert torch.equal(first, second), "what was not advanced over must be overwritten"


@pytest.mark.parametrize("heads", HEADS)
def test_cached_logits_equal_uncached_in_any_split(tiny, heads):
    model, tokens, T = tiny(**HEADS[heads]), random_tokens(2, 7), 7
    with torch.no_grad():
        wanted = model(tokens)
        for cuts in itertools.product((False, True), repeat=T - 1):     # all 64 compositions of 7
            borders = [0, *(i + 1 for i, cut in enumerate(cuts) if cut), T]
            cache = Cache(model.config, 2, T, dtype=torch.float64)
            found = torch.cat([feed(model, tokens[:, a:b], cache)
                               for a, b in zip(borders, borders[1:])], 1)
            error = off(found, wanted)
            assert error < EXACT, f"{heads}, split at {borders}: {error:.1e} off the uncached pass"
            assert cache.position.tolist() == [T, T], "position counts the tokens held"


def test_rows_at_their_own_positions_see_only_themselves(tiny):
    """Rows of a batch advance and roll back by different lengths, as in speculative decoding."""
    model, B, rounds = tiny(num_key_value_heads=2), 4, 12
    rng = np.random.default_rng(0)
    tokens = random_tokens(B, 5 * rounds)
    cache = Cache(model.config, B, 5 * rounds, dtype=torch.float64)
    with torch.no_grad():
        wanted, held = model(tokens), [0] * B
        for _ in range(rounds):
            T = int(rng.integers(1, 6))
            fed = random_tokens(B, T, seed=int(rng.integers(1 << 30)))      # wrong drafts, but for
            right = rng.integers(T + 1, size=B).tolist()                    # each row's first n
            for b, (h, n) in enumerate(zip(held, right)):
                fed[b, :n] = tokens[b, h:h + n]
            logits = feed(model, fed, cache)
            for b, (h, n) in enumerate(zip(held, right)):
                error = off(logits[b, :n], wanted[b, h:h + n]) if n else 0
                assert error < EXACT, (
                    f"row {b} at position {h} is {error:.1e} off the same row alone: it sees stale "
                    "keys, or another row's")
            held = [h + n for h, n in zip(held, right)]
            cache.rollback(T - torch.tensor(right))
    assert len(set(held)) > 1, "the rows must have drifted apart for this to prove anything"


def test_cache_after_a_rollback_equals_a_fresh_one(tiny):
    model, tokens, junk = tiny(), random_tokens(2, 12), random_tokens(2, 6, seed=9)
    used, fresh = (Cache(model.config, 2, 12, dtype=torch.float64) for _ in range(2))
    with torch.no_grad():
        feed(model, tokens[:, :8], used)
        used.rollback(5)
        feed(model, junk, used)             # wrong drafts, written over what was held
        used.rollback(6)
        feed(model, tokens[:, 3:5], used)
        feed(model, tokens[:, :5], fresh)
        assert used.position.tolist() == fresh.position.tolist() == [5, 5]
        for mine, other in zip(used.keys + used.values, fresh.keys + fresh.values):
            assert off(mine[:, :5], other[:, :5]) < EXACT, "the held keys or values differ"
        error = off(model(tokens[:, 5:], used), model(tokens[:, 5:], fresh))
    assert error < EXACT, f"after a rollback logits are {error:.1e} off: stale keys are seen"


def test_one_token_fed_twice_from_minus_one_counts_once(tiny):
    """A draft is fed its last two tokens; of a prompt of one token it gets that one twice."""
    model, tokens = tiny(), random_tokens(2, 4)
    cache = Cache(model.config, 2, 8, dtype=torch.float64)
    cache.position += torch.tensor([-1, 0])         # the second row has two tokens
    with torch.no_grad():
        first = torch.stack((tokens[0, [0, 0]], tokens[1, :2]))
        logits = feed(model, first, cache)
        assert cache.position.tolist() == [1, 2]
        wanted = [model(tokens[:1, :1])[0, -1], model(tokens[1:, :2])[0, -1]]
        assert off(logits[:, -1], torch.stack(wanted)) < EXACT, "the doubled token was seen twice"
        assert off(logits[0, 0], wanted[0]) < EXACT, "its first copy saw what it should not"
        more = model(torch.stack((tokens[0, 1:3], tokens[1, 2:])), cache)
        assert off(more[0], model(tokens[:1, :3])[0, 1:]) < EXACT, "and it left a trace"
        assert off(more[1], model(tokens[1:])[0, 2:]) < EXACT, "and it disturbed its neighbour"


def test_positions_beyond_the_context_have_angles(tiny):
    """A last round drafts past the end: a table of angles would be too short there."""
    model, tokens = tiny(max_position_embeddings=8), random_tokens(1, 14)
    cache = Cache(model.config, 1, 14, dtype=torch.float64)
    with torch.no_grad():
        found = torch.cat([feed(model, tokens[:, i:i + 1], cache) for i in range(14)], 1)
        assert off(found, model(tokens)) < EXACT, "positions past the context are wrong"


# ------------------------------------------------------------------------------ AMD-135M's numbers

def test_presets_have_the_published_sizes():
    for name, parameters in {"amd-135m": 134_105_856, "codellama-7b": 6_738_546_688}.items():
        with torch.device("meta"):
            model = Transformer(PRESETS[name])
        assert sum(p.numel() for p in model.parameters()) == parameters, name


@pytest.fixture(scope="module")
def amd():
    return Transformer(PRESETS["amd-135m"], seed=0)


def test_init_has_amds_standard_deviations(amd):
    for name, parameter in amd.named_parameters():
        if name.endswith("norm.weight"):
            assert (parameter == 1).all(), f"{name} does not start at 1"
            continue
        small = "o_proj" in name or "down_proj" in name
        wanted = 1 / math.sqrt(768) / 12 if small else math.sqrt(2 / 5 / 768)   # 0.0030, 0.0228
        # The smallest matrix has 768^2 entries, whose std is known to 0.1%; its mean to std / 768.
        assert abs(parameter.std() / wanted - 1) < 0.006, f"{name}: {parameter.std()}, not {wanted}"
        assert abs(parameter.mean()) < 6 * wanted / 768, f"{name} is not centred"


def test_first_loss_is_ln_v_plus_a_fifth(amd):
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(32000, (2, 64), generator=generator)
    with torch.no_grad():
        logits = amd(tokens).double()
    # The mean over all 32000 possible next tokens, not one draw: 128 positions are then enough.
    loss = float((logits.logsumexp(-1) - logits.mean(-1)).mean())
    # Logits are N(0, 2/5), as the head's rows meet a vector of length sqrt(C); ln E[e^x] is half.
    assert abs(loss - (math.log(32000) + 0.2)) < 0.05, f"the first loss is {loss:.3f}, not 10.57"


def test_the_same_seed_gives_the_same_weights():
    one, same, other = (Transformer(PRESETS["demo-draft"], seed).state_dict() for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one), "a seed must repeat its weights"
    assert not torch.equal(one["lm_head.weight"], other["lm_head.weight"])


# ---------------------------------------------------------------------------------- configuration

@pytest.mark.parametrize("changes, message", [
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "hidden_size 768 must be"),
    ({"hidden_size": 780}, "hidden_size 780 must be"),      # heads of 65: no pairs for RoPE
    ({"num_key_value_heads": 5}, "num_attention_heads 12, and that a multiple of "
                                 "num_key_value_heads 5"),
    ({"num_hidden_layers": 2**63}, "in < 1000 layers"),
])
def test_impossible_shapes_are_refused_by_name(changes, message):
    with pytest.raises(ValueError, match=message) as refusal:
        ModelConfig(**changes)
    assert "\n" not in str(refusal.value), "a refusal is one sentence"
