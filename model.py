"""The transformer of AMD-135M: Llama-2's architecture, its key/value cache and its checkpoints.

A Llama turns tokens into logits in three moves: look up an embedding, pass it through a stack of
identical layers, project the result back to the vocabulary. A layer adds two things to what passes
through it, the residual stream: attention, which mixes positions, and SwiGLU, which mixes channels.
The logits at position t score the token at position t + 1. This file builds a Llama from the bottom
up, in the order in which a reader needs the parts. train.py trains it, evaluate.py measures it, and
speculative.py generates with two of them: a small draft guesses tokens that a large target checks.

Dimension letters, the same in every script:
    B batch    T query length S key length        C width (hidden_size)    V vocabulary
    H heads    K key/value heads D head size (C / H) F hidden width of the SwiGLU

Try it:  python -c "import model; print(model.Transformer(model.PRESETS['amd-135m']))"

References: Touvron et al. 2023, "Llama 2"; Zhang & Sennrich 2019 (RMSNorm); Su et al. 2021 (RoPE);
Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (grouped key/value heads).
"""
import json
import math
import os
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import checkpoint_folder, write_whole


# ---------------------------------------------------------------------------------- configuration

@dataclass(frozen=True)
class ModelConfig:
    """The shape of a Llama, in the field names of a Hugging Face config.json. Default: AMD-135M."""
    vocab_size: int = 32000                 # V
    hidden_size: int = 768                  # C
    intermediate_size: int = 2048           # F
    num_hidden_layers: int = 12
    num_attention_heads: int = 12           # H
    num_key_value_heads: int = 12           # K; fewer than H: grouped-query attention
    max_position_embeddings: int = 2048     # the context the model is trained for
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False       # the output head shares the embedding's matrix
    bos_token_id: int | None = 1
    eos_token_id: int | None = 2

    def __post_init__(self):
        C, H, K = self.hidden_size, self.num_attention_heads, self.num_key_value_heads
        # RoPE pairs the channels of a head. A damaged file could ask for any number of layers.
        if C % (2 * H) or H % K or self.num_hidden_layers > 999:
            raise ValueError(f"hidden_size {C} must be an even multiple of num_attention_heads {H}"
                             f", and that a multiple of num_key_value_heads {K}, in < 1000 layers")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


# The demo's pair, small enough for two CPU cores. Its draft has one layer. Its target starts as
# that trained draft with layers added (`grow` in train.py), so the two agree on many tokens.
DEMO = ModelConfig(
    vocab_size=2048, hidden_size=192, intermediate_size=576, num_hidden_layers=1,
    num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
    bos_token_id=None, eos_token_id=2047)

PRESETS = {
    "amd-135m": ModelConfig(),
    "codellama-7b": ModelConfig(
        vocab_size=32016, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=16384,
        rope_theta=1e6),
    "demo-draft": DEMO,
    "demo-target": replace(DEMO, num_hidden_layers=12),
}


# ------------------------------------------------------------------------- norm, linear, positions

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight  (Zhang & Sennrich 2019, eq. 4), in float32 or wider.

    It is LayerNorm without subtracting the mean and without a bias, which turn out not to matter.
    """

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # bf16 has 8 bits of mantissa: a mean of 768 squares needs more.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Linear(nn.Linear):
    """y = x W^T with W stored (out, in), as in every Llama: no bias. W is left empty, for
    init_weights or a checkpoint to fill."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__(size_in, size_out, bias=False)

    def reset_parameters(self):
        pass


def rope(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of RoPE's angles (Su et al. 2021, eq. 15), for rotate().

    RoPE tells attention where tokens stand. It turns q and k by angles that grow with their
    positions; the product of a q at position s and a k at position t then depends on s - t alone.
    It replaces the position vectors that Vaswani et al. 2017 add to the embeddings.

    positions (B or 1, T) -> two tensors (B or 1, T, 1, D) of type dtype. Channels i and i + D/2
    form a pair (the layout of Hugging Face's checkpoints; the paper pairs 2i and 2i + 1). At
    position t the pair turns by the angle t * theta^(-2i/D).

    Example with D = 4, theta = 10000, at position 1: the pair of channels 0 and 2 turns by
    1 * 10000^0 = 1 radian, the pair of channels 1 and 3 by 1 * 10000^(-2/4) = 0.01 radians:

        x             (1,              0,               0,             1)
        cos           (cos 1,          cos 0.01,        cos 1,         cos 0.01)
        signed sin    (-sin 1,        -sin 0.01,        sin 1,         sin 0.01)
        rotate(x)     (cos 1 = 0.540, -sin 0.01 = -0.010, sin 1 = 0.841, cos 0.01 = 1.000)

    The angles are computed in float32, as the checkpoints were trained, or in float64 for a float64
    model.
    """
    wide = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide)     # 2i
    angles = positions[..., None] * (1.0 / config.rope_theta ** (even / config.head_dim))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)           # (B, T, D/2)
    cos, sin = torch.cat((cos, cos), -1), torch.cat((-sin, sin), -1)    # (B, T, D)
    return cos[:, :, None], sin[:, :, None]                             # (B, T, 1, D)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair of x (B, T, heads, D) by its angle: a pair (a, b) becomes
    (a cos - b sin, b cos + a sin). Rolling by D/2 puts each channel's partner in its place, and the
    minus is already in the first half of the signed sines that rope() returns."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


# -------------------------------------------------------------------------------------- one layer

def attention_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), written out for the reader.

    q (B, H, T, D); k, v (B, K, S, D); mask (B or 1, 1, T, S): 0 where a query may look, else -inf.
    The model calls PyTorch's kernel instead, which never stores the (T, S) scores; a test holds the
    two equal.
    """
    group = q.shape[1] // k.shape[1]        # query heads that share one key/value head
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)     # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])               # (B, H, T, S)
    return (scores + mask).softmax(-1) @ v                                  # (B, H, T, D)


class Past(NamedTuple):
    """What attention needs to read T new tokens after older ones: one layer's share of a Cache.

    The keys and values of a token depend on the tokens before it alone, so they are computed once
    and kept. A row of the cache has S places, most of them still empty, and the new tokens take the
    next ones: keys[where] is the part (B, T, K, D) of keys that is theirs.
    """
    keys: Tensor                        # (B, S, K, D)
    values: Tensor                      # (B, S, K, D)
    where: tuple[Tensor, Tensor]        # rows (B, 1) and places (B, T), which broadcast to (B, T)
    mask: Tensor                        # (B, 1, T, S): 0 where a new token may look, else -inf


class Attention(nn.Module):
    """Causal self-attention of x (B, T, C), over x alone or over what `past` holds as well.

    Without `past` PyTorch's kernel applies the usual triangular mask; with it, the mask is past's.
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.D = config.head_dim
        C, KV = config.hidden_size, config.num_key_value_heads * self.D
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, KV)
        self.v_proj = Linear(C, KV)
        self.o_proj = Linear(C, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None = None) -> Tensor:
        B, T, _ = x.shape
        q = self.q_proj(x).view(B, T, -1, self.D)                           # (B, T, H, D)
        k = self.k_proj(x).view(B, T, -1, self.D)                           # (B, T, K, D)
        v = self.v_proj(x).view(B, T, -1, self.D)                           # (B, T, K, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        if past is not None:
            past.keys[past.where], past.values[past.where] = k, v           # writes into the Cache
            k, v = past.keys, past.values                                   # (B, S, K, D)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))                    # (B, heads, T or S, D)
        mask = past.mask if past else None
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                           enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).flatten(2))                    # (B, T, C)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))  (Shazeer 2020, eq. 6): each hidden channel of `up` is let
    through as far as `gate` says."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        y = F.silu(self.gate_proj(x)) * self.up_proj(x)                     # (B, T, F)
        return self.down_proj(y)                                            # (B, T, C)


class Layer(nn.Module):
    """x + attention(norm(x)), then x + swiglu(norm(x)). The norms stand before the parts, not
    after them as in Vaswani et al. 2017: x itself passes through all layers unchanged."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: Past | None = None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)     # (B, T, C)
        return x + self.mlp(self.post_attention_layernorm(x))               # (B, T, C)


# ---------------------------------------------------------------------------------- cache and model

class Cache:
    """The keys and values of every layer, with `length` places for each row, allocated once.

    `position` (B,) says how many tokens of each row are held, and so where its next ones go. The
    model reads it and never moves it: after feeding T tokens the caller says advance(T), and with
    rollback(n) it takes the last n back. Each row has a position of its own, because speculative
    decoding accepts another number of tokens in each. What lies at or beyond a row's position is
    masked until it is overwritten. The caller keeps position + T <= length.

        logits = model(prompt, cache)                   # prompt (B, T), an empty cache
        cache.advance(prompt.shape[1])
        token = logits[:, -1:].argmax(-1)               # (B, 1): the likeliest next token
        logits = model(token, cache)                    # and so on
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device=None, dtype=None):
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (          # each a tensor (B, S, K, D) for every layer
            [torch.zeros(shape, device=device, dtype=dtype)
             for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.places = torch.arange(length, device=device)                   # (S,)
        # RoPE's table covers the places there are, so no generation can run off its end.
        self.cos, self.sin = (table[0] for table in rope(                   # (S, 1, D)
            self.places[None], config, self.keys[0].dtype))

    def advance(self, n: int | Tensor) -> None:
        """n more tokens of each row count as held; n is one number, or (B,)."""
        self.position += n

    def rollback(self, n: int | Tensor) -> None:
        """The last n tokens of each row are forgotten; n is one number, or (B,)."""
        self.position -= n

    def lookup(self, T: int) -> tuple[Tensor, Tensor, list[Past]]:
        """What the T next tokens of each row need: cosines and sines, each (B, T, 1, D), and a Past
        for each layer.

        A position may be -1. speculative.py's draft reads the last two tokens at a time, so after a
        prompt of a single token x it reads x twice, from position -1 on. Both copies land in place
        0 (-1 counts as 0) and see place 0 alone; advance(2) then leaves position 1, as if x had
        been read once.
        """
        places = self.position[:, None] + torch.arange(T, device=self.position.device)
        places = places.clamp(min=0)                                        # (B, T)
        rows = torch.arange(len(places), device=places.device)[:, None]     # (B, 1)
        seen = (self.places <= places[..., None])[:, None]                  # (B, 1, T, S)
        # A zero of the cache's type where a place is seen, else -inf.
        mask = self.cos.new_zeros(()).where(seen, float("-inf"))            # (B, 1, T, S)
        pasts = [Past(keys, values, (rows, places), mask)
                 for keys, values in zip(self.keys, self.values)]
        return self.cos[places], self.sin[places], pasts


class Transformer(nn.Module):
    """Module names are Hugging Face's, so state_dict() keys are those of a Llama checkpoint."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.model = nn.ModuleDict({
            # Left empty as in Linear: init_weights, or a checkpoint, fills all matrices.
            "embed_tokens": nn.Embedding(V, C, _weight=torch.empty(V, C)),
            "layers": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(C, config.rms_norm_eps),
        })
        self.lm_head = Linear(C, V)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:     # meta: shapes alone, see load_checkpoint
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """The initialisation of AMD's published code: normal numbers of standard deviation
        sqrt(2/5/C), but 1/sqrt(C)/layers in the two projections of a layer that write into the
        residual stream, so that what all layers together add to it does not grow with their number.

        It makes the first loss ln V + 0.2. The last norm gives the head inputs of mean square 1, so
        a logit is a sum of C products, normal with variance C * (2/5/C) = 0.4. The loss is the log
        of the sum of V terms exp(logit), less the right token's logit, which is 0 on average. The
        mean of exp(z) over a normal z of variance 0.4 is exp(0.4/2): ln(V exp(0.2)) = ln V + 0.2.
        """
        C, layers = self.config.hidden_size, self.config.num_hidden_layers
        generator = torch.Generator(self.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 1 / math.sqrt(C) / layers if output else math.sqrt(2 / 5 / C)
            if parameter.ndim == 2:         # norms stay at 1
                parameter.normal_(0, std, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T). With a cache, the tokens follow those it holds."""
        return self.lm_head(self.hidden(tokens, cache))

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The states (B, T, C) that the head turns into logits, for tokens (B, T)."""
        x, T = self.model.embed_tokens(tokens), tokens.shape[1]             # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # A bf16 residual stream: half the traffic of every addition and norm in training.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if cache is not None:
            return self.run_layers(x, *cache.lookup(T))
        positions = torch.arange(T, device=x.device)[None]                  # (1, T)
        cos, sin = rope(positions, self.config, x.dtype)                    # (1, T, 1, D)
        return self.run_layers(x, cos, sin, [None] * len(self.model.layers))

    def run_layers(self, x: Tensor, cos: Tensor, sin: Tensor, pasts: list[Past | None]) -> Tensor:
        """All layers and the last norm: x (B, T, C) -> (B, T, C).

        It is apart from hidden() for training, which compiles it. The compiler would fuse the
        cosines into rotate() and compute them again in every head of every layer, which costs 4 to
        6% of a step; so they are computed outside.
        """
        for layer, past in zip(self.model.layers, pasts):
            x = layer(x, cos, sin, past)
        return self.model.norm(x)                                           # (B, T, C)


# =============== From here on: what makes it practical. You can stop reading. ====================

def resolve_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is. ROCm's devices are called cuda."""
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError):
        raise ValueError(f"device {name!r} is not there: expected cpu or cuda") from None


# ------------------------------------------------------------------------- a checkpoint's folder

# What Git LFS and Git-annex leave in a file's place until it is fetched.
POINTERS = (b"version https://git-lfs", b"/annex/objects/")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Make one sentence of whatever a missing, damaged or unsupported file raises."""
    try:
        yield
    except Exception as error:              # each library has its own for a damaged file
        reason = " ".join(str(error).split())
        dangling = os.path.islink(path) and not os.path.exists(path)
        if isinstance(error, KeyError):
            reason = f"it lacks {reason}"
        elif dangling or os.path.isfile(path) and path.read_bytes()[:99].startswith(POINTERS):
            reason = "it is a Git LFS or Git-annex pointer: run `git lfs pull` or `git annex get`"
        raise ValueError(f"{path} cannot be used ({reason:.400}): expected what the checkpoint "
                         "folder of a Llama has; fetch it again, or train one") from None


def load_checkpoint(folder: str | Path, device="cpu",
                    dtype: torch.dtype | None = None) -> Transformer:
    """Load a checkpoint of train.py (a run's folder, or one step's), or any folder in the Hugging
    Face layout of a Llama. dtype None keeps the checkpoint's own. ValueError says what is wrong."""
    folder = checkpoint_folder(folder)
    with reading(folder / "config.json"):
        config = read_config(json.loads((folder / "config.json").read_bytes()))
    tensors = {name: tensor.to(device, dtype or tensor.dtype)
               for name, tensor in read_tensors(folder)
               if not name.endswith("rotary_emb.inv_freq")}     # old files have RoPE's angles
    with reading(folder):
        if config.tie_word_embeddings:
            # A file with a head of its own keeps it, as in transformers 5.
            embedding = tensors["model.embed_tokens.weight"]
            head = tensors.setdefault("lm_head.weight", embedding)
            config = replace(config, tie_word_embeddings=torch.equal(head, embedding))
        with torch.device("meta"):          # shapes without memory: the checkpoint has the data
            model = Transformer(config)
        model.load_state_dict(tensors, assign=True)     # names what is missing or misshaped
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.to(model.dtype)        # a checkpoint of mixed types gets the embedding's


def save_checkpoint(model: Transformer, folder: str | Path) -> None:
    """Write model.safetensors and config.json, each whole or not at all."""
    config = asdict(model.config) | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "torch_dtype": str(model.dtype).removeprefix("torch.")}
    write_safetensors(Path(folder) / "model.safetensors", dict(model.named_parameters()))
    write_whole(Path(folder) / "config.json", [json.dumps(config, indent=2).encode()])


# What a Llama's config may say besides our fields: the values that this model computes.
SUPPORTED = {"model_type": ["llama"], "hidden_act": ["silu", "swish"], "attention_bias": [False],
             "mlp_bias": [False], "partial_rotary_factor": [1.0], "sliding_window": [],
             "quantization_config": [], "rope_type": ["default", "linear"],
             "type": ["default", "linear"], "factor": [1.0]}    # linear by 1: changes nothing


def read_config(raw: dict) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; what this model cannot compute is refused."""
    for place in ("rope_scaling", "rope_parameters"):           # transformers 4's and 5's
        raw |= raw.get(place) or {}
    C, H, eos = raw["hidden_size"], raw["num_attention_heads"], raw.get("eos_token_id", 2)
    for name, values in (SUPPORTED | {"head_dim": [C // H]}).items():
        if raw.get(name) not in [None, *values]:
            raise ValueError(f"{name} {raw[name]!r} is not supported: expected "
                             f"{' or '.join(map(repr, values)) or 'none'}")
    # What a config leaves out has transformers' defaults; those that are not ModelConfig's too:
    raw = asdict(ModelConfig()) | {"num_key_value_heads": H, "rms_norm_eps": 1e-6} | raw
    raw["eos_token_id"] = eos[0] if isinstance(eos, list) else eos      # Llama-3 has several
    return ModelConfig(**{field.name: raw[field.name] for field in fields(ModelConfig)})


# ------------------------------------------------------------------------- a checkpoint's tensors

# A folder's weights lie in one file or in shards; safetensors come first.
WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors",
           "pytorch_model.bin", "pytorch_model-*-of-*.bin")


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) from a folder's weights, each file read once."""
    for pattern in WEIGHTS:
        paths = sorted(path for path in folder.iterdir() if path.match(pattern))
        for path in paths:
            with reading(path):
                yield from read_pickle(path) if path.suffix == ".bin" else read_safetensors(path)
        if paths:
            return
    raise ValueError(f"{folder} has none of {', '.join(WEIGHTS)}: expected a checkpoint folder")


def read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a file that torch.save wrote; weights_only: it can run no code."""
    tensors = torch.load(path, map_location="cpu", weights_only=True,
                         mmap=zipfile.is_zipfile(path))         # PyTorch before 1.6 wrote no zip
    for name, tensor in tensors.items():
        yield name, tensor.detach()


# safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, raw
# little-endian data (the safetensors format's documentation).
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a safetensors file; each tensor is its own private mapping.

    Nothing is read until it is used, and a tensor that is converted frees its pages with it, so
    loading takes the memory of the result. Every offset is checked before it is mapped.
    """
    whole = np.memmap(path, mode="r")
    data = end = 8 + int.from_bytes(whole[:8].tobytes(), "little")
    header = json.loads(whole[8:data].tobytes())
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        shape, (start, stop) = entry["shape"], entry["data_offsets"]
        dtype = DTYPES.get(entry["dtype"])                  # None: of a quantised model, say
        # In order, the entries must cover the data without overlaps or holes.
        if (dtype is None or data + start != end
                or stop - start != math.prod(shape) * dtype.itemsize):
            raise ValueError(f"{name!r:.99} is {entry!r:.199}, expected a dtype of "
                             f"{', '.join(DTYPES)} and its bytes from {end - data} on")
        raw = torch.from_numpy(np.memmap(path, np.uint8, "c", end, stop - start))
        raw = raw.clone() if end % dtype.itemsize else raw      # out of alignment
        yield name, raw.view(dtype).view(shape)
        end = data + stop
    if end != len(whole):
        raise ValueError(f"it has {len(whole)} bytes, of which its header describes {end}")


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, data, end = {"__metadata__": {"format": "pt"}}, [], 0   # transformers reads this mark
    for name, tensor in tensors.items():
        data.append(tensor.detach().cpu().flatten().view(torch.uint8).numpy())
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)                         # so that the data start aligned
    write_whole(path, [len(text).to_bytes(8, "little"), text, *data])
