"""The checks of the exercises; exercises.py has their list and runs them.

A check gets the module with the student's function in it and calls that with small inputs, made so
that one property after the other can go wrong by itself. It raises Wrong with a sentence that names
the property and where to look, never the answer. Expected numbers come from oracle.py (NumPy,
float64) or are computed here; no other exercise of the student's is called.
"""
import itertools
import math
from collections.abc import Callable
from types import ModuleType, SimpleNamespace

import numpy as np
import torch
from torch import Tensor

import model
import oracle
import speculative


class Wrong(Exception):
    """A property that does not hold, in one sentence."""


# ------------------------------------------------------------------------- what the checks share

def expect(holds: bool, message: str) -> None:
    if not holds:
        raise Wrong(message)


def near(a, b, tolerance: float = 1e-5) -> bool:
    """Whether two arrays are equal up to rounding, in float32: a student may well compute in it."""
    a, b = (np.asarray(x.detach().double() if isinstance(x, Tensor) else x, np.float64)
            for x in (a, b))
    return a.shape == b.shape and bool((np.abs(a - b) <= tolerance * (1 + np.abs(b))).all())


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Normal random numbers in float64, the same ones every time."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@torch.no_grad()
def result_of(name: str, function: Callable, *inputs, shape=None):
    """function(*inputs), which has to leave its inputs alone and return a tensor of that shape."""
    before = [x.clone() if isinstance(x, Tensor) else x for x in inputs]
    result = function(*inputs)
    for was, x in zip(before, inputs):
        expect(not isinstance(x, Tensor) or torch.equal(was, x),
               f"{name} changes its input in place, which its caller still needs")
    if shape is not None:
        a_tensor(name, result, shape)
    return result


def a_tensor(name: str, x, shape) -> None:
    expect(isinstance(x, Tensor), f"{name} has to be a tensor and is {type(x).__name__}")
    expect(tuple(x.shape) == tuple(shape),
           f"{name} has to have the shape {tuple(shape)} and has {tuple(x.shape)}")


def a_tuple(name: str, x, length: int) -> None:
    expect(isinstance(x, tuple) and len(x) == length,
           f"{name} has to return {length} things: look at the return type in its signature")


def a_number(name: str, x) -> float:
    expect(isinstance(x, int | float | np.floating) and not isinstance(x, bool),
           f"{name} has to return a number and returned {type(x).__name__}")
    expect(math.isfinite(x), f"{name} returned {x}")
    return float(x)


def small_config(**changes) -> model.ModelConfig:
    """Two layers of four heads of four channels, with RoPE's theta at 100 and few tokens."""
    return model.ModelConfig(**{
        "vocab_size": 17, "hidden_size": 16, "intermediate_size": 20, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 4, "max_position_embeddings": 64,
        "rope_theta": 100.0, "bos_token_id": None, "eos_token_id": None} | changes)


def filled(module: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The module in float64, with weights that leave no term negligible."""
    generator = torch.Generator().manual_seed(seed)
    module = module.double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.4, generator=generator)
            if parameter.ndim == 1:         # of a norm: around 1
                parameter.add_(1)
    return module


def attention_oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """oracle.attention for a batch in the layout (B, heads, T, D)."""
    rows = [oracle.attention(*(x.transpose(0, 1).numpy() for x in row)) for row in zip(q, k, v)]
    return torch.from_numpy(np.stack(rows)).transpose(1, 2)


def causal_mask(T: int) -> Tensor:
    return torch.full((T, T), -math.inf, dtype=torch.float64).triu(1)[None, None]


# --------------------------------------------------------------------------------------- model.py

def rms_norm(m: ModuleType) -> None:
    def norm(x: Tensor, eps: float = 0.0, weight=1.0) -> Tensor:
        layer = m.RMSNorm(x.shape[-1], eps).to(x.dtype)
        layer.weight.data.mul_(torch.as_tensor(weight))
        return result_of("the result", layer, x, shape=x.shape)

    x, ones = numbers(2, 3, 4), torch.tensor([1.0, -1, 1, -1], dtype=torch.float64)
    expect(near(norm(3 * ones), ones),
           "divide by the root of the mean of the squares: (3, -3, 3, -3) has to become "
           "(1, -1, 1, -1)")
    expect(near(norm(ones + 2), (ones + 2) / math.sqrt(5)),
           "no mean is subtracted: RMSNorm is not LayerNorm, look at what is squared")
    expect(near(norm(x), torch.stack([torch.stack([norm(t) for t in row]) for row in x])),
           "each position is normed by itself: the mean runs over the last axis alone")
    expect(near(norm(x, weight=[2.0, 3, 4, 5]), norm(x) * torch.tensor([2, 3, 4, 5])),
           "the result is multiplied by the weight, one number for each channel")
    expect(near(norm(ones, eps=3.0), ones / 2),
           "eps belongs inside the root: look at the mean of the squares")
    long = numbers(50, 768).bfloat16()
    exact = torch.from_numpy(oracle.rms_norm(long.double().numpy(), 1.0, 1e-5)).bfloat16()
    got = norm(long, eps=1e-5)
    expect(got.dtype == torch.bfloat16 and norm(x).dtype == x.dtype,
           "the result has the type of x: bfloat16 for a bfloat16 x")
    expect(near(norm(x), oracle.rms_norm(x.numpy(), 1.0, 0.0), 1e-12),
           "a float64 x stays float64: only what is narrower than float32 is widened to it")
    # Rounded once, nearly all numbers are the exact ones'; in bf16 throughout, half of them are.
    expect((got == exact).double().mean() > 0.99,
           "a bfloat16 x has to be widened to float32 before it is squared: its 8 bits are too few")


def rope(m: ModuleType) -> None:
    config = small_config(hidden_size=16, num_attention_heads=2, num_key_value_heads=2)
    positions = torch.tensor([[0, 1, 2], [7, 8, 30]])
    tables = result_of("rope", m.rope, positions, config, torch.float64)
    a_tuple("rope", tables, 2)
    for table in tables:
        a_tensor("each of rope's two results", table, (2, 3, 1, 8))
    cos, sin = tables
    expect(near(cos[0, 0], torch.ones(1, 8)) and near(sin[0, 0], torch.zeros(1, 8)),
           "at position 0 nothing turns: every cosine is 1, every sine 0")
    # D = 8, so -2i/D is -i/4.
    speeds = torch.tensor([100.0 ** (-i / 4) for i in range(4)], dtype=torch.float64)
    angles = positions[..., None, None] * speeds
    expect(not near(cos, angles.repeat_interleave(2, -1).cos()),
           "channels i and i + D/2 turn together, not neighbouring channels: see the example in "
           "rope's docstring")
    expect(near(cos[0, ..., :4], angles[0].cos()),
           "pair i of the head turns by t theta^(-2i/D), theta from the config: look at the "
           "exponent and its sign")
    expect(near(cos[1, ..., :4], angles[1].cos()),
           "t is the position that was passed to rope: each row may begin anywhere")
    expect(near(cos[..., 4:], cos[..., :4]),
           "the second half of the cosines repeats the first: channels i and i + D/2 turn together")
    expect(near(sin.abs(), torch.cat((angles, angles), -1).sin().abs()),
           "the sines are those of the same angles as the cosines, in the same order")
    expect(near(sin, torch.cat((-angles.sin(), angles.sin()), -1)),
           "the sign of the sines is wrong: see the row of signed sines in rope's docstring")
    expect(near(cos[..., :4], angles.cos(), 1e-12),
           "the angles have to be computed in float64 for a float64 model: see the end of rope's "
           "docstring")
    cos, _ = m.rope(torch.tensor([[1001]]), config, torch.bfloat16)
    expect(cos.dtype == torch.bfloat16, "rope returns tables of the type that it was passed")
    expect(near(cos[0, 0, 0, :4], (1001 * speeds).cos(), 0.01),
           "the angles have to be computed in float32, also for a bfloat16 model: 1001 needs more "
           "than its 8 bits")
    rotation(m)


def rotation(m: ModuleType) -> None:
    """The second half of exercise 2: rotate(), with tables made by hand."""
    def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        return result_of("rotate's result", m.rotate, x, cos, sin, shape=x.shape)

    x, zero = numbers(2, 3, 5, 4), torch.zeros(2, 3, 1, 4, dtype=torch.float64)
    cos, sin = numbers(2, 3, 1, 4, seed=1), numbers(2, 3, 1, 4, seed=2)
    expect(near(rotate(x, cos, zero), x * cos),
           "rotate: where all sines are 0, each channel is multiplied by its cosine")
    partner = rotate(x, zero, zero + 1)
    expect(near(partner.abs(), x[..., [2, 3, 0, 1]].abs()),
           "rotate: the partner of channel i is channel i + D/2, and the reverse")
    expect(near(partner, x[..., [2, 3, 0, 1]]),
           "rotate: the sines that are passed to it are signed already, so it only adds")
    expect(near(rotate(x, cos, sin), x * cos + x[..., [2, 3, 0, 1]] * sin),
           "rotate: each channel takes the cosine and the sine of its own place")


def causal_attention(m: ModuleType) -> None:
    def attend(q, k, v, mask):
        return result_of("the result", m.attention_formula, q, k, v, mask, shape=q.shape)

    B, H, T, S, D = 2, 3, 2, 5, 4
    q, k, v = numbers(B, H, T, D), numbers(B, H, S, D, seed=1), numbers(B, H, S, D, seed=2)
    see_all = torch.zeros(1, 1, T, S, dtype=torch.float64)
    expect(bool(attend(q, k, v, see_all).isfinite().all()),
           "the mask is 0 where a query may look and -inf where it may not: with zeros everywhere "
           "all keys are seen, and no result can be infinite or NaN")
    mean = v.mean(2, keepdim=True).expand(q.shape)
    expect(near(attend(q, torch.zeros_like(k), v, see_all), mean),
           "where all scores are equal, each query gets the mean of the values: the weights come "
           "from a softmax over the keys, the last axis of the scores")
    masked = see_all.clone()
    masked[..., 3:] = -math.inf
    expect(near(attend(q, k, torch.ones_like(v), masked), torch.ones_like(q)),
           "the weights of a query sum to 1 over what it may see: add the mask to the scores, "
           "before the softmax")
    only = torch.full_like(see_all, -math.inf)
    only[..., 3] = 0
    expect(near(attend(q, k, v, only), v[:, :, 3:4].expand(q.shape)),
           "a key with -inf in the mask gets no weight")
    q, k, v = q[:1, :1], k[:1, :1], v[:1, :1]           # one row, one head
    scores = torch.einsum("bhtd,bhsd->bhts", q, k)
    expect(near(attend(q, k, v, see_all), torch.softmax(scores / 2, -1) @ v),
           "the scores are q k^T divided by the square root of D, the size of a head")
    q, k, v = (numbers(B, H, 6, D, seed=seed) for seed in (3, 4, 5))
    result, later = attend(q, k, v, causal_mask(6)), v.clone()
    later[:, :, 5] += 1
    expect(near(attend(q, k, later, causal_mask(6))[:, :, :5], result[:, :, :5]),
           "with a causal mask, changing the last token must not change the results before it")
    expect(near(result, attention_oracle(q, k, v)),
           "each row and each head attends by itself, with its own queries, keys and values")


def swiglu(m: ModuleType) -> None:
    config = small_config(hidden_size=6, intermediate_size=10, num_attention_heads=1,
                          num_key_value_heads=1)
    layer, x = filled(m.SwiGLU(config)), numbers(2, 3, 6)
    gate, up, down = (getattr(layer, f"{name}_proj").weight.detach().clone()
                      for name in ("gate", "up", "down"))

    def run() -> Tensor:
        return result_of("the result", layer, x, shape=x.shape)

    result = run()
    layer.up_proj.weight.data = 2 * up
    expect(near(run(), 2 * result),
           "the output is linear in what up_proj returns: only the gate goes through silu, and "
           "the two are multiplied")
    layer.up_proj.weight.data, layer.down_proj.weight.data = up, 2 * down
    expect(near(run(), 2 * result), "down_proj comes last, after the product")
    layer.down_proj.weight.data = down
    layer.gate_proj.weight.data = 1e4 * gate
    z = x @ gate.T
    expect(near(run(), (1e4 * z.clamp(min=0) * (x @ up.T)) @ down.T, 1e-6),
           "the gate passes large numbers as they are and stops negative ones: silu(z) is z times "
           "the sigmoid of z")
    expect(near(result, np.stack([oracle.swiglu(row.numpy(), gate.numpy(), up.numpy(),
                                                down.numpy()) for row in x])),
           "silu is z times the sigmoid of z: other curves look alike (gelu, relu, a factor in the "
           "sigmoid) and are not")


def grouped_heads(m: ModuleType) -> None:
    def attend(q, k, v):
        return result_of("the result", m.attention_formula, q, k, v, causal_mask(T), shape=q.shape)

    B, H, K, T, D = 2, 4, 2, 3, 4
    q, k, v = numbers(B, H, T, D), numbers(B, K, T, D, seed=1), numbers(B, K, T, D, seed=2)
    means = v.cumsum(2) / torch.arange(1, T + 1)[:, None]           # of all equal scores
    expect(near(attend(q, torch.zeros_like(k), v), means[:, [0, 0, 1, 1]]),
           "values: with H = 4 and K = 2, query heads 0 and 1 share key/value head 0, and 2 and 3 "
           "share head 1")
    expect(near(attend(q, k, v), attention_oracle(q, k, v)),
           "keys: query head h uses the key head and the value head of the same number, h // (H/K)")
    expect(near(attend(q, k[:, :1], v[:, :1]), attention_oracle(q, k[:, :1], v[:, :1])),
           "K = 1: all query heads share one key/value head (multi-query attention)")
    q, k, v = (numbers(B, 3, T, D, seed=seed) for seed in (3, 4, 5))
    expect(near(attend(q, k, v), attention_oracle(q, k, v)),
           "K = H: each query head has a key/value head of its own, as in exercise 3")


def attention_layer(m: ModuleType) -> None:
    for K in (4, 2):
        config = small_config(num_key_value_heads=K)
        layer, x = filled(m.Attention(config)), numbers(2, 5, 16)

        def run(x: Tensor, first: int = 0, apart: int = 1) -> Tensor:
            positions = first + apart * torch.arange(x.shape[1])[None]
            tables = model.rope(positions, config, torch.float64)
            return result_of("the result", layer, x, *tables, shape=x.shape)

        heads = [h * K // 4 for h in range(4)]          # the key/value head of each query head
        values = layer.v_proj(x).detach().view(2, 5, K, 4)[:, :, heads].flatten(2)      # (B, T, C)
        expect(near(run(x[:, :1], 9), layer.o_proj(values[:, :1])),
               "a token that stands alone sees itself alone: the result is o_proj of its values. "
               "RoPE turns queries and keys, never values; and with fewer key/value heads, "
               "neighbouring query heads share one")
        keys = layer.k_proj.weight.data.clone()
        layer.k_proj.weight.data.zero_()                # all scores are equal: means of values
        expect(near(run(x)[:, -1], layer.o_proj(values.mean(1))),
               "with equal scores the last token gets the mean of all values, each head's channels "
               "side by side: bring the heads of a token together again before you flatten them")
        means = values.cumsum(1) / torch.arange(1, 6)[:, None]
        expect(near(run(x), layer.o_proj(means)),
               "attention is causal: token t sees the tokens 0 to t, itself included")
        layer.k_proj.weight.data = keys
        expect(near(run(x, apart=0), layer_oracle(layer, x, config, apart=0)),
               "with all tokens at position 0, where nothing turns: each head has scores of its "
               "own, of its D channels and scaled for them")
        expect(near(run(x), layer_oracle(layer, x, config)),
               "queries and keys, both, are turned by rotate(), with the tables that were passed")
        attention_with_past(layer, x, config, run(x))


def layer_oracle(layer, x: Tensor, config: model.ModelConfig, apart: int = 1) -> Tensor:
    """What an attention layer returns for x (B, T, C), by the oracle."""
    q, k, v, o = (getattr(layer, f"{name}_proj").weight.detach().numpy() for name in "qkvo")
    rows, positions = [], apart * np.arange(x.shape[1])
    for row in x.numpy():
        heads = [(row @ w.T).reshape(len(row), -1, config.head_dim) for w in (q, k, v)]
        heads[:2] = (oracle.rope(y, positions, config.rope_theta) for y in heads[:2])
        rows.append(oracle.attention(*heads).reshape(len(row), -1) @ o.T)
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def attention_with_past(layer, x: Tensor, config: model.ModelConfig, whole: Tensor) -> None:
    """The second half of exercise 6: three tokens, then two, must give what all five give."""
    cache = model.Cache(config, 2, 8, dtype=torch.float64)
    cos, sin, pasts = cache.lookup(3)
    first = layer(x[:, :3], cos, sin, pasts[0])
    a_tensor("the result with a past", first, (2, 3, 16))
    keys, values = (projection(x[:, :3]).view(2, 3, -1, 4)
                    for projection in (layer.k_proj, layer.v_proj))
    expect(near(cache.values[0][:, :3], values) and near(cache.values[0][:, 3:].abs().sum(), 0.0),
           "with a past, the new values are written to past.values at past.where, in place, and "
           "nowhere else")
    expect(near(cache.keys[0][:, :3], model.rotate(keys, cos, sin)),
           "with a past, the new keys are written to past.keys at past.where, already turned")
    expect(near(first, whole[:, :3]),
           "with a past, attend to all of past.keys and past.values under past.mask, which hides "
           "the places that are still empty")
    cache.advance(3)
    cos, sin, pasts = cache.lookup(2)
    expect(near(layer(x[:, 3:], cos, sin, pasts[0]), whole[:, 3:]),
           "with a past, new tokens see the older ones too: the mask is past.mask, no triangle of "
           "the new tokens alone")


def cache_and_rollback(m: ModuleType) -> None:
    def fresh():
        return m.Cache(config, 2, 8, dtype=torch.float64)

    def at(cache, *positions: int) -> bool:
        return torch.equal(cache.position, torch.tensor(positions))

    config = small_config()
    cache = fresh()
    cache.advance(5)
    expect(at(cache, 5, 5), "advance(5): each row holds five tokens more")
    cache.advance(torch.tensor([0, 2]))
    expect(at(cache, 5, 7), "advance((0, 2)): rows move on their own")
    cache.rollback(torch.tensor([1, 3]))
    expect(at(cache, 4, 4), "rollback((1, 3)): the rows forget their last one and three tokens")
    cache.rollback(2)
    expect(at(cache, 2, 2), "rollback(2): each row forgets its last two tokens")
    cache.position = torch.tensor([0, 3])
    looked = cache.lookup(2)
    a_tuple("lookup", looked, 3)
    cos, sin, pasts = looked
    expect(at(cache, 0, 3), "lookup moves nothing: whoever feeds tokens calls advance")
    places = torch.tensor([[0, 1], [3, 4]])
    for got, table in zip((cos, sin), model.rope(places, config, torch.float64)):
        a_tensor("lookup's table", got, (2, 2, 1, 4))
        expect(near(got, table),
               "the cosines and sines are those of the new tokens' own places, which begin at each "
               "row's position")
    expect(len(pasts) == 2 and all(past.keys is keys and past.values is values for past, keys,
                                   values in zip(pasts, cache.keys, cache.values)),
           "lookup returns a Past for each layer, with that layer's own keys and values, no copies")
    for past in pasts:
        rows, where = past.where
        a_tensor("past.where[0], the rows", rows, (2, 1))
        a_tensor("past.where[1], the places", where, (2, 2))
        expect(torch.equal(where, places) and torch.equal(rows[:, 0], torch.arange(2)),
               "past.where: the new tokens of row b go to row b, at the places from its position")
    cache_masks(pasts[0].mask, places)
    cache_runs(fresh, filled(m.Transformer(config)))


def cache_masks(mask: Tensor, places: Tensor) -> None:
    a_tensor("past.mask", mask, (2, 1, 2, 8))
    expect(bool(((mask == 0) | (mask == -math.inf)).all()),
           "past.mask is 0 where a token may look and -inf elsewhere")
    for b, t, s in itertools.product(range(2), range(2), range(8)):
        if s > places[b, t]:
            expect(mask[b, 0, t, s] == -math.inf,
                   "past.mask lets a token look at places after its own, where stale keys lie")
        else:
            expect(mask[b, 0, t, s] == 0,
                   "past.mask hides a place that a token may see: its own, or one before it")


@torch.no_grad()
def cache_runs(fresh: Callable, transformer) -> None:
    """The last part of exercise 7: whole runs of a model, which need all three functions."""
    tokens = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    whole, cache = transformer(tokens), fresh()
    transformer(tokens[:, :2], cache)
    cache.advance(2)
    transformer(torch.tensor([[7, 8], [8, 7]]), cache)      # guesses that are rejected
    cache.advance(2)
    cache.rollback(2)
    expect(near(transformer(tokens[:, 2:], cache), whole[:, 2:]),
           "two tokens, then two more that are rolled back, then the rest: the logits have to be "
           "those of a run without a cache")
    cache = fresh()
    cache.position = torch.tensor([-1, -1])
    twice = transformer(tokens[:, [0, 0]], cache)           # a lone token, fed twice
    expect(near(twice, whole[:, [0, 0]]) and near(cache.keys[0][:, 1:].abs().sum(), 0.0),
           "position -1: a lone token that is fed twice lands in place 0 both times and sees place "
           "0 alone: see the end of Cache's docstring")


# ---------------------------------------------------------------------------------------- data.py

def bpe_merge(m: ModuleType) -> None:
    def merge(word: list[int], pair: tuple[int, int], new: int = 256) -> list[int]:
        before = list(word)
        result = m.merge_pair(word, pair, new)
        expect(isinstance(result, list),
               f"merge_pair has to return a list and returned {type(result).__name__}")
        expect(word == before, "merge_pair changes the word that it was passed: build a new list")
        return result

    expect(merge([1, 2, 3], (7, 8)) == [1, 2, 3], "a word without the pair stays as it is")
    expect(merge([1, 7, 8, 3], (7, 8)) == [1, 256, 3],
           "the two tokens of the pair become one, the new one; all others stay")
    expect(merge([8, 7, 1], (7, 8)) == [8, 7, 1], "the pair's order counts: (8, 7) is not (7, 8)")
    expect(merge([1, 2, 7, 8], (7, 8)) == [1, 2, 256], "a pair at the word's end is merged too")
    expect(merge([7, 8, 7], (7, 8)) == [256, 7], "a last token that begins no pair is kept")
    expect(merge([7, 8, 1, 7, 8], (7, 8)) == [256, 1, 256], "every occurrence is merged")
    expect(merge([7, 7, 7], (7, 7)) == [256, 7] and merge([7] * 5, (7, 7)) == [256, 256, 7],
           "merges go from left to right and do not overlap: the second of a merged pair begins "
           "no other")
    expect(merge([], (7, 7)) == [] and merge([7], (7, 7)) == [7],
           "a word of no token or of one has no pair")


# --------------------------------------------------------------------------------------- train.py

def schedule(m: ModuleType) -> None:
    config = SimpleNamespace(lr=2.0, min_lr=0.5, warmup=4, steps=20)

    def rate(step: int) -> float:
        return a_number("learning_rate", m.learning_rate(step, config))

    expect(near(rate(0), 0.0), "the first step, number 0, has a rate of 0")
    expect(near([rate(1), rate(2), rate(3)], [0.5, 1.0, 1.5]),
           "the warmup rises along a line, from 0 at step 0 to lr at step `warmup`")
    expect(near(rate(4), 2.0), "at step `warmup` the rate is lr, the highest: t is counted from "
                               "the end of the warmup")
    expect(near(rate(20), 0.5), "at the last step the rate is min_lr: look at what the cosine's "
                                "half-wave is scaled by and added to")
    expect(near(rate(12), 1.25), "half-way between `warmup` and `steps` the rate is half-way "
                                 "between lr and min_lr")
    expect(near([rate(step) for step in range(21)],
                [oracle.lr_at(step, 2.0, 0.5, 4, 20) for step in range(21)]),
           "after the warmup the rate falls along half a cosine, not along a line")
    config.warmup = 0
    expect(near(rate(0), 2.0), "without a warmup the first step has lr: do not divide by 0")


def clipping(m: ModuleType) -> None:
    def clip(*gradient: float, limit: float) -> tuple[Tensor, float]:
        gradient = torch.tensor(gradient, dtype=torch.float64)
        norm = m.clip(gradient, limit)
        expect(isinstance(norm, Tensor | float), "clip has to return the norm of the gradient")
        return gradient, float(norm)

    small, norm = clip(3.0, 4.0, limit=10.0)
    expect(near(norm, 5.0, 1e-5), "the norm is the root of the sum of the squares: of (3, 4), 5")
    expect(near(small, [3.0, 4.0], 1e-5),
           "a gradient shorter than the limit stays as it is: the factor is at most 1")
    large, norm = clip(3.0, 4.0, limit=1.0)
    expect(not near(large, [3.0, 4.0]), "the gradient is clipped in place: it was not changed")
    expect(near(large[0] / large[1], 0.75, 1e-5),
           "clipping keeps the direction: one factor for all elements, not a limit for each")
    expect(near(large, [0.6, 0.8], 1e-5),
           "a gradient longer than the limit becomes as long as the limit")
    expect(near(norm, 5.0, 1e-5), "clip returns the norm from before the clipping")
    zero, norm = clip(0.0, 0.0, limit=1.0)
    expect(near(zero, [0.0, 0.0]) and norm == 0, "a gradient of 0 stays 0: 0/0 is not a number")


def adamw(m: ModuleType) -> None:
    names = ("lr", "beta1", "beta2", "eps", "weight_decay")
    w, g = np.array([1.0, -2.0, 3.0]), np.array([0.5, -0.1, 2.0])

    def step(param, grad, first, second, number: int, **settings):
        values = dict.fromkeys(names, 0.0) | settings
        before = [x.copy() for x in (param, grad, first, second)]
        result = m.adamw_step(param, grad, first, second, number, *(values[n] for n in names))
        a_tuple("adamw_step", result, 3)
        expect(all(near(a, b) for a, b in zip(before, (param, grad, first, second))),
               "adamw_step returns new arrays: it must not change those that it was passed")
        return result

    with np.errstate(all="ignore"):         # a division by 0 shows in the numbers
        _, first, second = step(w, g, w, 3 + w, 1, lr=1.0, beta1=0.9, beta2=0.8, eps=1.0)
        expect(near(first, 0.9 * w + 0.1 * g),
               "m is the running mean of the gradient: beta1 of the old and 1 - beta1 of the new")
        expect(near(second, 0.8 * (3 + w) + 0.2 * g * g),
               "v is the running mean of the squared gradient: beta2 of the old and "
               "1 - beta2 of the new")
        param, first, _ = step(w, 0 * g, 0 * g, 0 * g, 1, lr=0.1, eps=1.0, weight_decay=0.5)
        expect(near(first, 0 * g),
               "the decay is no part of the gradient: it must not get into m and v")
        expect(near(param, w * 0.95),
               "the decay takes lr * weight_decay * param off, once, also where the gradient is 0")
        param, _, _ = step(w, g, 0 * g, 0 * g, 1, lr=0.1, beta1=0.9, beta2=0.99, eps=1e-30)
        expect(near(param, w - 0.1 * np.sign(g)),
               "the first step moves each weight by lr, whatever the size of its gradient: m and v "
               "start at 0, too small, and the bias correction makes up for that")
        param, _, _ = step(w, g, 0 * g, 0 * g, 1, lr=0.1, beta1=0.9, beta2=0.99, eps=1.0)
        expect(near(param, w - 0.1 * g / (np.abs(g) + 1)),
               "eps is added to the root of the corrected v, outside the root")
    expect(near(*adamw_runs(m.adamw_step)),
           "three steps in a row differ from torch.optim.AdamW's: the correction at step t has "
           "beta to the power of t")


def adamw_runs(function: Callable) -> tuple[np.ndarray, np.ndarray]:
    """Three steps by adamw_step and by PyTorch."""
    weight = torch.nn.Parameter(numbers(5))
    optimizer = torch.optim.AdamW([weight], 0.1, (0.8, 0.9), 1e-3, 0.3)
    param, first, second = weight.detach().numpy().copy(), np.zeros(5), np.zeros(5)
    for number in (1, 2, 3):
        weight.grad = numbers(5, seed=number)
        param, first, second = function(param, weight.grad.numpy(), first, second, number,
                                        0.1, 0.8, 0.9, 1e-3, 0.3)
        optimizer.step()
    return param, weight.detach().numpy()


# --------------------------------------------------------------------------------- speculative.py

def warp(m: ModuleType) -> None:
    def made(logits: Tensor, *settings) -> Tensor:
        return result_of("the result", m.warp, logits, *settings, shape=logits.shape)

    def of(*p: float) -> Tensor:
        return torch.tensor(p, dtype=torch.float64).log()

    x = numbers(2, 3, 7)
    expect(near(made(x, 1.0), x.softmax(-1)),
           "temperature 1, with top-k and top-p off, is the softmax over the vocabulary")
    expect(near(made(torch.tensor([[1.0, 5, 2, 5]]), 0.0), torch.tensor([[0.0, 1, 0, 0]])),
           "temperature 0: all mass on the greatest logit, the first of equals")
    expect(near(made(x, 0.5), (2 * x).softmax(-1)),
           "the logits are divided by the temperature, before the softmax")
    expect(near(made(x, 1.0, 99), x.softmax(-1)), "top-k keeps all if there are fewer than k")
    p = of(0.1, 0.4, 0.3, 0.2)
    expect(near(made(p, 1.0, 2), [0, 4 / 7, 3 / 7, 0]),
           "top-k keeps the k greatest logits and gives the others probability 0; what is kept "
           "sums to 1")
    expect(near(made(of(0.4, 0.2, 0.2, 0.2), 1.0, 2), [0.4, 0.2, 0.2, 0.2]),
           "top-k keeps all tokens that are equal to the k-th greatest")
    expect(near(made(p, 1.0, 0, 0.6), [0, 4 / 7, 3 / 7, 0]),
           "top-p keeps the fewest most likely tokens whose mass reaches top_p: the one that "
           "crosses it is kept too, and what is kept is divided by its sum")
    expect(near(made(p, 1.0, 0, 1e-9), [0, 1, 0, 0]), "top-p keeps one token at least")
    expect(near(made(of(0.25, 0.25, 0.25, 0.25), 1.0, 0, 0.4), [0.5, 0.5, 0, 0]),
           "top-p counts tokens: between equally likely ones the lower id goes first")
    expect(near(made(p, 1.0, 2, 0.5), [0, 1, 0, 0]),
           "top-p comes after top-k: its mass is that of the tokens which top-k has kept")
    expect(near(made(p, 0.5, 0, 0.5), [0, 1, 0, 0]),
           "top-p comes after the temperature, which makes the likely tokens likelier")
    for settings in ((0.7, 3, 1.0), (1.5, 0, 0.7), (0.9, 4, 0.8)):
        rows = [oracle.warp(row.numpy(), *settings) for row in x.flatten(0, 1)]
        expect(near(made(x, *settings).flatten(0, 1), np.stack(rows)),
               f"each row is cut by itself: (temperature, top_k, top_p) = {settings}")
    expect(made(x.bfloat16(), 1.0).dtype == torch.float32,
           "probabilities are float32 at least, also of bfloat16 logits")


def residual(m: ModuleType) -> None:
    def shares(p: list, q: list) -> Tensor:
        p, q = (torch.tensor(rows, dtype=torch.float64) for rows in (p, q))
        left = result_of("the result", m.residual, p, q, shape=p.shape)
        expect(bool((left >= 0).all()), "no token can have a negative share: look at where q > p")
        return left / left.sum(-1, keepdim=True)        # sample() needs no sum of 1

    p, q = [0.6, 0.3, 0.1], [0.3, 0.2, 0.5]
    got = shares([p], [q])[0]
    expect(not near(got, p), "the residual is not p: the guesses have given some of it already")
    expect(got[2] == 0, "a token that the draft guesses too often, q > p, gets nothing of the "
                        "residual")
    expect(near(got, [0.75, 0.25, 0.0]),
           "the residual is the part of p that q does not cover, token by token, and nothing else")
    expect(near(shares([p, [0.2, 0.2, 0.6]], [q, [0.4, 0.4, 0.2]])[1], [0, 0, 1]),
           "each row has a residual of its own")
    expect(near(shares([p, p], [p, q])[0], p),
           "p = q, up to rounding, leaves nothing to draw from: see the docstring for that case, "
           "which one row can be in and another not")


def verify(m: ModuleType) -> None:
    def judge(p, q, drafted, u) -> tuple[list[list[int]], list[int]]:
        p, q, u = (torch.as_tensor(x, dtype=torch.float64) for x in (p, q, u))
        drafted = torch.as_tensor(drafted)
        result = result_of("verify", m.verify, p, q, drafted, u)
        a_tuple("verify", result, 2)
        tokens, n = result
        a_tensor("tokens, the first result", tokens, (len(p), p.shape[1]))
        a_tensor("n, the second result", n, (len(p),))
        return [row[:k + 1] for row, k in zip(tokens.tolist(), n.tolist())], n.tolist()

    p, q = [[0.1, 0.9], [0.5, 0.5], [0.0, 1.0]], [[0.2, 0.8], [0.5, 0.5]]
    expect(judge([p], [q], [[1, 1]], [[0.99, 0.99, 0.5]])[1] == [2],
           "a guess that the target likes as well as the draft, p >= q, is always accepted")
    accepted, rejected = (judge([p[:2]], [q[:1]], [[0]], [[u, 0.5]])[1] for u in (0.49, 0.51))
    expect(accepted == [1] and rejected == [0],
           "a guess is accepted with probability p/q of that guess: here 0.1 / 0.2, so for u = "
           "0.49, but not for 0.51")
    expect(judge([[[0.0, 1.0], [0.5, 0.5]]], [[[0.5, 0.5]]], [[0]], [[0.0, 0.5]])[1] == [0],
           "a guess that the target gives probability 0 is never accepted, not even with u = 0")
    expect(judge([p], [q], [[0, 1]], [[0.9, 0.1, 0.5]])[1] == [0],
           "the first rejection ends the round: later guesses continue a text that is not written")
    expect(judge([p], [q], [[1, 0]], [[0.5, 0.5, 0.2]]) == ([[1, 0, 1]], [2]),
           "after full acceptance one more token is drawn from the target's last distribution")
    p = [[[0.6, 0.4, 0.0], [1.0, 0, 0]]]
    expect(judge(p, [[[0.0, 0.3, 0.7]]], [[2]], [[0.5, 0.8]])[0] == [[0]],
           "a rejected guess is replaced by a token drawn from residual(p, q) at its place, not "
           "from p")
    flat = [[[0.25] * 4, [0.25] * 4]]
    expect(judge(flat, [[[0.0, 0, 0, 1]]], [[3]], [[0.9, 0.1]])[0] == [[0]],
           "the last random number draws the target's own token: use one that has judged no guess")
    expect(judge(flat, [[[0.5, 0.5]]], [[0]], [[0.9, 0.9]])[0] == [[3]],
           "the draft may know fewer tokens than the target: q of the others is 0")
    verify_at_random(judge)


def verify_at_random(judge: Callable) -> None:
    """The last part of exercise 14: many rows at once, against the oracle."""
    B, G, V = 200, 3, 5
    p = numbers(B, G + 1, V).mul(1.5).softmax(-1)
    q = (p[:, :G].log() + numbers(B, G, V, seed=1)).softmax(-1)
    generator = torch.Generator().manual_seed(2)
    u = torch.rand(B, G + 1, generator=generator, dtype=torch.float64)
    drafted = torch.randint(V, (B, G), generator=generator)
    tokens, n = judge(p, q, drafted, u)
    rows = zip(p.numpy(), q.numpy(), drafted.numpy(), u.numpy())
    wanted = [oracle.verify(p, q, d, u[:G], u[G]) for p, q, d, u in rows]
    expect(n == [n for _, n in wanted],
           "n is the number of accepted guesses before the first rejection, for each row by itself")
    expect(tokens == [tokens for tokens, _ in wanted],
           "tokens are the n accepted guesses and then the target's own token, at place n, for "
           "each row by itself")


def draft_length(m: ModuleType) -> None:
    def after(gamma: int, accepted: int) -> float:
        return a_number("next_gamma", m.next_gamma(gamma, accepted))

    expect(after(5, 5) == 7, "full acceptance: the next draft is 2 longer")
    expect(after(5, 0) == 4 and after(5, 4) == 4,
           "one rejection or more: the next draft is 1 shorter, however many were accepted")
    expect(after(1, 0) == 1, "a draft has one token at least")
    expect(after(1, 1) == 3, "a draft of one token can be accepted in full as well")
    expect(after(speculative.MAX_GAMMA, speculative.MAX_GAMMA) == speculative.MAX_GAMMA
           == after(speculative.MAX_GAMMA - 1, speculative.MAX_GAMMA - 1),
           "no draft is longer than MAX_GAMMA, for which the cache has room")


# ------------------------------------------------------------------------------------ evaluate.py

def bits_per_byte(m: ModuleType) -> None:
    def bits(nats: float, size: int) -> float:
        return a_number("bits_per_byte", m.bits_per_byte(nats, size))

    expect(near(bits(6.0, 1) / bits(3.0, 1), 2.0),
           "bits grow in proportion to nats: no exponential, that would be a perplexity")
    expect(near(bits(6.0, 2) / bits(6.0, 1), 0.5),
           "the sum is shared out among the bytes: twice the bytes, half the bits of each")
    expect(near(bits(math.log(256), 1), 8.0),
           "a nat is not a bit: a uniform choice between the 256 bytes is ln 256 nats, and 8 bits")


def pass_at_k(m: ModuleType) -> None:
    def chance(n: int, c: int, k: int) -> float:
        return a_number("pass_at_k", m.pass_at_k(n, c, k))

    expect(chance(5, 0, 3) == 0.0, "without a right program the chance is 0")
    expect(near(chance(10, 3, 1), 0.3), "pass@1 is the share of right programs, c / n")
    expect(chance(5, 4, 2) == 1.0 and chance(3, 3, 3) == 1.0,
           "where fewer than k programs are wrong, any k of them hold a right one: 1")
    expect(not near(chance(5, 1, 3), 1 - 0.8**3),
           "k different programs are taken, none of them twice: the chance of a wrong one falls "
           "with each that was drawn")
    for n, c, k in itertools.product(range(1, 8), range(8), range(1, 8)):
        if c <= n and k <= n:
            hits = [min(subset) < c for subset in itertools.combinations(range(n), k)]
            expect(near(chance(n, c, k), sum(hits) / len(hits)),
                   "count the subsets of k programs that hold no right one, of all subsets of k: "
                   f"n = {n}, c = {c}, k = {k} differs")
    expect(near(chance(1000, 1, 500), 0.5), "1000 programs must neither overflow nor lose digits")


# -------------------------------------------------------------------------- speculative.py: a round

SAMPLING = (0.7, 6, 0.95)           # temperature, top_k, top_p of exercise 18
GUESSES = 3


def a_pair(vocab: int = 17, draft_vocab: int = 17) -> SimpleNamespace:
    """A target and a draft that have read two texts of five tokens, as a round finds them."""
    pair = SimpleNamespace()
    pair.texts = torch.tensor([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])
    pair.target = filled(model.Transformer(small_config(vocab_size=vocab)))
    pair.draft = filled(model.Transformer(
        small_config(vocab_size=draft_vocab, num_hidden_layers=1)), seed=1)
    pair.last_two = pair.texts[:, -2:].clone()
    pair.u = torch.rand(2, 2 * GUESSES + 1, dtype=torch.float64,
                        generator=torch.Generator().manual_seed(0))
    for name, unread in (("target", 1), ("draft", 2)):
        net = getattr(pair, name)
        cache = model.Cache(net.config, 2, 64, dtype=torch.float64)
        net.hidden(pair.texts[:, :-unread].clamp(max=net.config.vocab_size - 1), cache)
        cache.advance(5 - unread)
        setattr(pair, name + "_cache", cache)
    return pair


def distributions(net, text: Tensor, vocab: int = 17) -> Tensor:
    """What follows each token of a text (B, T), without a cache: (B, T, V)."""
    logits = net(text.clamp(max=net.config.vocab_size - 1))[..., :vocab]
    return speculative.warp(logits, *SAMPLING)


@torch.no_grad()
def one_round(m: ModuleType) -> None:
    pair, G = a_pair(), GUESSES
    drafts = proposal(m, pair)
    expect(torch.equal(pair.draft_cache.position, torch.tensor([4 + G] * 2)),
           "propose: in the end the draft has read the last two tokens and all guesses but the "
           "last one: its cache has advanced by G + 1")
    other = a_pair(vocab=13)
    tokens, q = m.propose(other.draft, other.draft_cache, other.last_two, other.u[:, :G],
                          SAMPLING, 13)
    a_tensor("propose: q of a draft that knows more tokens than the target", q, (2, G, 13))
    other = a_pair(draft_vocab=6)           # texts and target have the tokens 6 to 16 besides
    tokens, q = m.propose(other.draft, other.draft_cache, other.last_two, other.u[:, :G],
                          SAMPLING, 17)
    expect(near(q[:, 0], distributions(other.draft, other.texts)[:, -1]),
           "propose: a token that the draft does not know is read as the last one that it knows")
    decision(m, pair, drafts)
    moving(m)
    rounds(m)


def proposal(m: ModuleType, pair: SimpleNamespace):
    """propose(): the distributions and the guesses."""
    G = GUESSES
    drafts = m.propose(pair.draft, pair.draft_cache, pair.last_two, pair.u[:, :G],
                       SAMPLING, 17)
    a_tuple("propose", drafts, 2)
    tokens, q = drafts
    a_tensor("propose: the guesses", tokens, (2, G))
    a_tensor("propose: q", q, (2, G, 17))
    exact = distributions(pair.draft, torch.cat((pair.texts, tokens), 1))
    expect(near(q[:, 0], exact[:, 4]),
           "propose: the first q follows the whole text, of which the draft has yet to read the "
           "last two tokens; it is made with warp and the sampling that was passed")
    for i in range(1, G):
        expect(near(q[:, i], exact[:, 4 + i]),
               "propose: each later q follows the text and the guesses so far: the draft reads one "
               "guess at a time, and its cache advances by what it has read")
    expect(all(torch.equal(tokens[:, i], speculative.sample(q[:, i], pair.u[:, i]))
               for i in range(G)),
           "propose: guess i is sampled from the i-th q with column i of u")
    return speculative.Drafts(tokens, q)


def decision(m: ModuleType, pair: SimpleNamespace, drafts) -> None:
    """decide(): one pass of the target, and the rule, with many random numbers."""
    G = GUESSES
    p = distributions(pair.target, torch.cat((pair.texts, drafts.tokens), 1))[:, 4:]
    for u in torch.rand(40, 2, G + 1, generator=torch.Generator().manual_seed(4)).double():
        verdict = m.decide(pair.target, pair.target_cache, pair.last_two, drafts, u,
                           SAMPLING)
        a_tuple("decide", verdict, len(speculative.Verdict._fields))
        verdict = speculative.Verdict(*verdict)
        expect(torch.equal(pair.target_cache.position, torch.tensor([4, 4])),
               "decide: the target's cache stays where it is: how far it moves is known to "
               "settle() alone")
        tokens, n = speculative.verify(p, drafts.q, drafts.tokens, u)
        a_tensor("decide: n", verdict.n, (2,))
        a_tensor("decide: tokens", verdict.tokens, (2, G + 1))
        expect(torch.equal(verdict.n, n) and torch.equal(verdict.tokens, tokens),
               "decide: tokens and n are verify's, where p comes from one pass of the target over "
               "the last token of the text and all guesses, with the sampling that was passed")


def moving(m: ModuleType) -> None:
    """settle(): rows of 0, 1 and all 2 accepted guesses, and one that has ended."""
    tokens = torch.tensor([[10, 0, 0], [11, 12, 0], [13, 14, 15], [16, 16, 16]])
    n = torch.tensor([0, 1, 2, 1])
    verdict = speculative.Verdict(tokens, n)
    last_two, active = torch.tensor([[8, 9]]).repeat(4, 1), torch.tensor([1, 1, 1, 0])
    config = small_config()
    target, draft = (model.Cache(config, 4, 16) for _ in range(2))
    target.position, draft.position = torch.full((4,), 4), torch.full((4,), 3 + 3)
    m.settle(verdict, last_two, active, target, draft)
    expect(target.position.tolist()[:3] == [5, 6, 7],
           "settle: a row gains n + 1 tokens, and the target has then read all of them but the "
           "last one: as many more as the row has gained")
    expect(draft.position.tolist()[:3] == [4, 5, 6],
           "settle: the draft has to have read all but the last two tokens of each row; propose "
           "has moved its cache by G + 1")
    expect(last_two.tolist()[:3] == [[9, 10], [11, 12], [14, 15]],
           "settle: last_two becomes, in place, the last two tokens of each row's text: with n = "
           "0 one of the old ones is among them")
    expect((target.position[3], draft.position[3], last_two[3].tolist()) == (4, 3, [8, 9]),
           "settle: a row that has ended (active is 0) gains nothing: afterwards all is as it was "
           "before the round")
    m.settle(verdict, last_two, active, target)        # and it works without a draft's cache


@torch.no_grad()
def rounds(m: ModuleType) -> None:
    """Four rounds in a row, against the oracle, which has no cache."""
    pair, G = a_pair(), GUESSES
    u = torch.rand(4, 2, 2 * G + 1, dtype=torch.float64,
                   generator=torch.Generator().manual_seed(3))
    texts, active = [[], []], torch.ones(2, dtype=torch.int64)
    for v in u:
        drafts = speculative.Drafts(*m.propose(pair.draft, pair.draft_cache, pair.last_two,
                                               v[:, :G], SAMPLING, 17))
        verdict = speculative.Verdict(*m.decide(pair.target, pair.target_cache, pair.last_two,
                                                drafts, v[:, G:], SAMPLING))
        m.settle(verdict, pair.last_two, active, pair.target_cache, pair.draft_cache)
        for text, tokens, n in zip(texts, verdict.tokens.tolist(), verdict.n.tolist()):
            text += tokens[:n + 1]
    for b, text in enumerate(texts):
        stream = iter(u[:, b].numpy())
        wanted = oracle.speculative_decoding(
            *(lambda tokens, net=net: net(torch.tensor([tokens]))[0].numpy()
              for net in (pair.target, pair.draft)),
            pair.texts[b].tolist(), len(text), G, lambda n: next(stream), *SAMPLING)
        expect(text == wanted,
               "four rounds in a row have to write the same text as decoding without a cache: look "
               "at the state that settle() leaves for the next round")
