"""The transformer of AMD-135M: Llama-2's architecture, its key/value cache and its checkpoints.

A Llama turns tokens into logits in three moves: look up an embedding, pass it through a stack of
identical blocks (attention mixes positions, SwiGLU mixes channels, each added to the residual
stream), project back to the vocabulary. This file builds that from the bottom up: RMSNorm, RoPE,
attention, SwiGLU, block, model. It imports PyTorch alone and knows nothing of tokenizers.

Dimension letters, the same in every script:
    B batch    T query length    S key length        C width (hidden_size)    V vocabulary
    H heads    K key/value heads D head size (C / H) F hidden width of the SwiGLU

Try it:  python -c "import model; print(model.Transformer(model.PRESETS['amd-135m']))"

References: Touvron et al. 2023, "Llama 2"; Zhang & Sennrich 2019 (RMSNorm); Su et al. 2021 (RoPE);
Shazeer 2020 (SwiGLU); Ainslie et al. 2023 (grouped key/value heads).
"""
import json
import math
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
        for field in fields(self):
            value, kind = getattr(self, field.name), field.type
            if kind is float and type(value) is int:
                object.__setattr__(self, field.name, float(value))
            elif not isinstance(value, kind) or (kind is not bool and type(value) is bool):
                raise ValueError(f"config field {field.name} is {value!r}, expected {kind}")
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                     "num_attention_heads", "num_key_value_heads", "max_position_embeddings"):
            if not 1 <= getattr(self, name) <= 2**24:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 1 to {2**24}")
        if not (0 < self.rms_norm_eps < 1 and 1 <= self.rope_theta < float("inf")):
            raise ValueError(f"rms_norm_eps {self.rms_norm_eps} must lie in (0, 1) and rope_theta "
                             f"{self.rope_theta} be at least 1 and finite")
        if self.num_hidden_layers > 1024:
            raise ValueError(f"num_hidden_layers is {self.num_hidden_layers}, expected <= 1024")
        if self.hidden_size % (2 * self.num_attention_heads):
            raise ValueError(f"hidden_size {self.hidden_size} must be an even multiple of "
                             f"num_attention_heads {self.num_attention_heads}: RoPE pairs channels")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(f"num_attention_heads {self.num_attention_heads} must be a multiple "
                             f"of num_key_value_heads {self.num_key_value_heads}")

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def matmul_parameters(self) -> int:
        """Parameters in matrix products (no embedding look-up, no norms): what FLOPs count."""
        C, KV = self.hidden_size, self.num_key_value_heads * self.head_dim
        block = 2 * C * C + 2 * C * KV + 3 * C * self.intermediate_size
        return self.num_hidden_layers * block + self.vocab_size * C


PRESETS = {
    "amd-135m": ModelConfig(),
    "codellama-7b": ModelConfig(
        vocab_size=32016, hidden_size=4096, intermediate_size=11008, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=32, max_position_embeddings=16384,
        rope_theta=1e6),
    # The demo's pair, small enough for two CPU cores: the draft is one block, and the target is
    # grown from it (train.py), so that the two agree often enough to be worth drafting with.
    "demo-draft": ModelConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=576, num_hidden_layers=1,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=4095),
    "demo-target": ModelConfig(
        vocab_size=4096, hidden_size=192, intermediate_size=576, num_hidden_layers=12,
        num_attention_heads=6, num_key_value_heads=6, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=4095),
}


# ----------------------------------------------------------------------------------- the layers

class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight  (Zhang & Sennrich 2019, eq. 4), in float32 or wider."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # bf16 has 8 bits of mantissa: a mean of 768 squares needs more.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight).to(x.dtype)


class Linear(nn.Module):
    """y = x W^T with W stored (out, in), as in every Llama: no biases."""

    def __init__(self, size_in: int, size_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size_out, size_in))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


def rope(positions: Tensor, config: ModelConfig, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Cosines and signed sines of RoPE's angles position * theta^(-2i/D) (Su et al. 2021, eq. 15).

    positions (B, T) -> two tensors (B, 1, T, D) of type dtype. The only table of them is a cache's,
    with a row for each of its places: no generation can run off it. The arithmetic is float32, as
    checkpoints were trained with, unless the model is float64. Channel i turns with channel
    i + D/2 (the "half" layout of Hugging Face's checkpoints; the paper's pairs are 2i, 2i + 1).
    """
    wide = torch.promote_types(dtype, torch.float32)
    even = torch.arange(0, config.head_dim, 2, device=positions.device, dtype=wide)
    angles = positions[..., None] * (1.0 / config.rope_theta ** (even / config.head_dim))
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)           # (B, T, D/2)
    # x1' = x1 cos - x2 sin and x2' = x2 cos + x1 sin: swap the halves, give sin its two signs.
    return torch.cat((cos, cos), -1)[:, None], torch.cat((-sin, sin), -1)[:, None]


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn each channel pair of x (B, heads, T, D) by its angle."""
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def attention_formula(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(D)) v (Vaswani et al. 2017, eq. 1), written out.

    q (B, H, T, D); k, v (B, K, S, D); mask (B or 1, 1, T, S): 0 where a query may look, else -inf.
    The model calls PyTorch's fused kernels, which never store the (T, S) scores, except to train
    on short rows on a CPU; tests hold the two equal.
    """
    groups = q.shape[1] // k.shape[1]       # query heads that share one key/value head
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)   # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])               # (B, H, T, S)
    return (scores + mask).softmax(-1) @ v                                  # (B, H, T, D)


class Attention(nn.Module):
    """Causal self-attention of x (B, T, C). With a cache, `past` is its keys and values, each
    (B, S, K, D), where the new ones go (an index of rows, one of places) and the mask (B, 1, T, S).
    """

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.D = config.head_dim
        C, KV = config.hidden_size, config.num_key_value_heads * self.D
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, KV)
        self.v_proj = Linear(C, KV)
        self.o_proj = Linear(C, C)
        self.fused = None           # q, k and v in one product: see prepare_for_decoding

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past: tuple | None = None) -> Tensor:
        B, T, C = x.shape
        q, k, v = (self.fused(x).split(self.fused.sizes, -1) if self.fused else
                   (self.q_proj(x), self.k_proj(x), self.v_proj(x)))
        q = q.view(B, T, -1, self.D).transpose(1, 2)                        # (B, H, T, D)
        k = k.view(B, T, -1, self.D).transpose(1, 2)                        # (B, K, T, D)
        v = v.view(B, T, -1, self.D)                                        # (B, T, K, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin).transpose(1, 2)     # k: (B, T, K, D)
        mask = None
        if past is not None:
            keys, values, slots, mask = past
            keys[slots], values[slots] = k, v
            k, v = keys, values                                             # (B, S, K, D)
        k, v = k.transpose(1, 2), v.transpose(1, 2)                         # (B, K, S, D)
        if (mask is None and T <= 512 and x.device.type == "cpu" and q.dtype == torch.bfloat16
                and torch.is_grad_enabled()):
            # The backward pass of PyTorch's kernel for a CPU takes two to six times as long.
            unseen = torch.full((T, T), float("-inf"), dtype=q.dtype).triu(1)
            y = attention_formula(q, k, v, unseen)                          # (B, H, T, D)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None,
                                               enable_gqa=q.shape[1] != k.shape[1])
        return self.o_proj(y.transpose(1, 2).reshape(B, T, C))


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))  (Shazeer 2020, eq. 6)."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size)
        self.fused = None           # gate and up in one product: see prepare_for_decoding

    def forward(self, x: Tensor) -> Tensor:
        gate, up = (self.fused(x).chunk(2, -1) if self.fused else
                    (self.gate_proj(x), self.up_proj(x)))
        return self.down_proj(F.silu(gate) * up)                            # (B, T, F) -> (B, T, C)


class Block(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past=None) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, past)
        return x + self.mlp(self.post_attention_layernorm(x))               # (B, T, C)


# ------------------------------------------------------------------------------------ the model

class Cache:
    """Keys and values of every layer, allocated once, with a place for `length` tokens a row, and
    the cosines and sines of those places.

    `position` (B,) says how many tokens of each row are held. Rows advance on their own, and
    rolling back is setting `position`: what lies at or beyond it is masked until it is
    overwritten, so stale keys are never seen. The caller keeps position + T <= length.
    """

    def __init__(self, config: ModelConfig, batch: int, length: int, device=None, dtype=None):
        shape = (batch, length, config.num_key_value_heads, config.head_dim)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype)                 # (B, S, K, D)
             for _ in range(config.num_hidden_layers)] for _ in range(2))
        self.position = torch.zeros(batch, dtype=torch.int64, device=device)
        self.places = torch.arange(length, device=device)                   # (S,)
        self.cos, self.sin = (table[0, 0] for table in rope(                # (S, D)
            self.places[None], config, self.keys[0].dtype))


class Transformer(nn.Module):
    """Module names are Hugging Face's, so state_dict() keys are those of a Llama checkpoint."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.hidden_size
        self.model = nn.ModuleDict({
            # Left empty as in Linear: drawing it on the meta device would import sympy (1.2 s).
            "embed_tokens": nn.Embedding(V, C, _weight=torch.empty(V, C)),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(C, config.rms_norm_eps),
        })
        self.lm_head = Linear(C, V)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        if not self.lm_head.weight.is_meta:
            self.init_weights(seed)

    @torch.no_grad()
    def init_weights(self, seed: int) -> None:
        """AMD's initialisation: small enough that the first loss is ln V + 0.2."""
        C, layers = self.config.hidden_size, self.config.num_hidden_layers
        generator = torch.Generator(self.lm_head.weight.device).manual_seed(seed)
        for name, parameter in self.named_parameters():
            if name.endswith("norm.weight"):
                continue
            # The two projections that write into the residual stream start smaller, by depth.
            output = name.endswith(("o_proj.weight", "down_proj.weight"))
            std = 1 / math.sqrt(C) / layers if output else math.sqrt(2 / 5 / C)
            parameter.normal_(0, std, generator=generator)

    @property
    def device(self) -> torch.device:
        return self.model.embed_tokens.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def enter(self, tokens: Tensor, cache: Cache | None = None):
        """What all blocks share: the embedded tokens (B, T, C), RoPE's cosines and sines, and with
        a cache where its new entries go and which of them each query may see."""
        x = self.model.embed_tokens(tokens)                                 # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # A bf16 residual stream: half the traffic of every addition and norm in training.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        positions = torch.arange(tokens.shape[1], device=x.device)[None]    # (1, T)
        if cache is None:
            return x, *rope(positions, self.config, x.dtype), None, None
        # A position may be -1 (speculative.py, after a prompt of one token, which it feeds twice):
        # the token lands in place 0 both times.
        positions = (cache.position[:, None] + positions).clamp(min=0)      # (B, T)
        slots = torch.arange(len(tokens), device=x.device)[:, None], positions  # (B, 1) and (B, T)
        seen = (cache.places <= positions[..., None])[:, None]              # (B, 1, T, S)
        mask = x.new_zeros(()).where(seen, float("-inf"))
        return x, cache.cos[positions][:, None], cache.sin[positions][:, None], slots, mask

    def blocks(self, x: Tensor, cos: Tensor, sin: Tensor, slots, mask, cache) -> Tensor:
        """What is left of hidden() after enter(): training compiles the two apart."""
        for i, layer in enumerate(self.model.layers):
            past = cache and (cache.keys[i], cache.values[i], slots, mask)
            x = layer(x, cos, sin, past)
        return self.model.norm(x)                                           # (B, T, C)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last block's normalised output, (B, T, C), for tokens (B, T)."""
        x = self.blocks(*self.enter(tokens, cache), cache)
        if cache is not None:
            cache.position += tokens.shape[1]
        return x

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T). With a cache, tokens follow those it holds."""
        return self.lm_head(self.hidden(tokens, cache))

    @property
    def compiled(self) -> bool:
        return "enter" in vars(self)            # torch.compile's function hides the method

    def uncompiled(self) -> AbstractContextManager:
        """Within it compiled parts run eagerly: for shapes not worth a compilation of their own."""
        return torch.compiler.set_stance("force_eager") if self.compiled else nullcontext()

    @classmethod
    def from_pretrained(cls, folder: str | Path, device="cpu", dtype: torch.dtype | None = None):
        """Load a checkpoint folder of this project or any Llama of the Hugging Face layout.

        dtype None keeps the checkpoint's own. Raises ValueError for what is missing or unsupported.
        """
        folder = Path(folder)
        config = read_config(folder / "config.json")
        with torch.device("meta"):          # shapes without memory: the checkpoint brings the data
            model = cls(config)
        expected = dict(model.named_parameters())       # a tied head is not named twice
        found, problems = {}, []
        for name, tensor in read_tensors(folder):
            if name.endswith("rotary_emb.inv_freq") or (
                    name == "lm_head.weight" and config.tie_word_embeddings):
                continue                    # old checkpoints store what the config already says
            want = expected.pop(name, None)
            if want is None:
                problems.append(f"unexpected {name!r:.99}")
            elif tensor.shape != want.shape or not tensor.is_floating_point():
                problems.append(f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}, expected"
                                f" floating-point of shape {tuple(want.shape)}")
            else:
                found[name] = tensor.to(device, dtype or tensor.dtype)
        problems += [f"missing {name}" for name in expected]
        if problems:
            more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{folder} does not hold the model that its config.json describes: "
                             f"{'; '.join(problems[:8])}{more}")
        model.load_state_dict(found, strict=False, assign=True)     # strict: just checked
        if config.tie_word_embeddings:
            model.lm_head.weight = model.model.embed_tokens.weight
        return model.to(model.dtype)        # a checkpoint of mixed types gets the embedding's

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each under a temporary name first."""
        if self.model.layers[0].self_attn.fused is not None:
            raise ValueError("this model was prepared for decoding and no longer has its matrices "
                             "apart: save it before, or load it anew")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        write_safetensors(folder / "model.safetensors", dict(self.named_parameters()))
        config = asdict(self.config) | {
            "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
            "torch_dtype": str(self.dtype).removeprefix("torch.")}
        write_atomically(folder / "config.json", [json.dumps(config, indent=2).encode() + b"\n"])


def resolve_device(name: str | None = None) -> torch.device:
    """The device called `name`, or the best there is. ROCm's devices are called cuda."""
    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.empty(0, device=device).tolist()      # the meta device has no data to list
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not there: expected cpu"
                         + (" or cuda" if torch.cuda.is_available() else "")
                         + "; leave --device out to take the best one") from None
    return device


# ---------------------------------------------------------------------- checkpoints: config.json

# What a Llama config may say besides our fields, and the one value of it that this model computes.
SUPPORTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "rope_type": "default", "rope_scaling": None,
             "partial_rotary_factor": 1.0, "sliding_window": None, "quantization_config": None}


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError(f"a {type(value).__name__}, no object")
        return value
    except (FileNotFoundError, NotADirectoryError):
        raise ValueError(f"{path} is missing: expected a checkpoint folder with config.json and "
                         "model.safetensors; train one with train.py or download one") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a JSON object ({error}): restore the file") from None


def read_config(path: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; what this model cannot compute is refused."""
    raw = read_json(path)
    try:
        raw |= raw.get("rope_parameters") or {}     # where transformers 5 keeps the base of RoPE
        for name, value in SUPPORTED.items():
            if raw.get(name) not in (None, value):
                raise ValueError(f"{name} {raw[name]!r} is not supported: this model computes "
                                 f"{name} {value!r} only")
        missing = {"model_type", "vocab_size", "hidden_size", "intermediate_size",
                   "num_hidden_layers", "num_attention_heads"} - raw.keys()
        if missing:
            raise ValueError(f"it lacks {', '.join(sorted(missing))}")
        # transformers' defaults for what a config leaves out; the rest are ModelConfig's.
        raw = {"rms_norm_eps": 1e-6, "num_key_value_heads": raw["num_attention_heads"]} | raw
        config = ModelConfig(**{field.name: raw[field.name] for field in fields(ModelConfig)
                                if field.name in raw})
        if raw.get("head_dim") not in (None, config.head_dim):
            raise ValueError(f"head_dim {raw['head_dim']!r} is not supported: this model computes "
                             f"hidden_size / num_attention_heads = {config.head_dim} only")
        return config
    except (ValueError, TypeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{path}: {error!s:.300}") from None   # cut: a value can be a long one


# ---------------------------------------------------------------------- checkpoints: the tensors

# safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, raw
# little-endian data (the safetensors format's documentation).
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16,
          "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000        # bytes: the bound of the reference implementation


def read_safetensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a safetensors file; each tensor is its own private mapping.

    Nothing is read until it is used, and a tensor that is converted frees its pages with it, so
    loading takes the memory of the result. Every offset is checked before it is mapped.
    """
    with open(path, "rb") as file:
        try:
            size = os.fstat(file.fileno()).st_size
            data = first = 8 + int.from_bytes(file.read(8), "little")
            if data > min(size, MAX_HEADER):
                raise ValueError(f"{size} bytes, of which its header claims {data}")
            header = json.loads(file.read(data - 8))
            header.pop("__metadata__", None)
            for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
                dtype, shape, (start, end) = (
                    DTYPES.get(entry["dtype"]), entry["shape"], entry["data_offsets"])
                # In order, the entries must cover the data without overlaps or holes.
                if (dtype is None or len(shape) > 8 or min(shape, default=1) < 1
                        or data + start != first
                        or end - start != math.prod(shape) * dtype.itemsize):
                    raise ValueError(f"{name!r:.99} is {entry!r:.199}, expected a dtype of "
                                     f"{', '.join(DTYPES)} and its bytes from {first - data} on")
                inset = first % mmap.ALLOCATIONGRANULARITY      # a mapping starts at a page
                pages = mmap.mmap(file.fileno(), inset + end - start, access=mmap.ACCESS_COPY,
                                  offset=first - inset)
                if first % dtype.itemsize:                      # out of alignment: move the data
                    pages, inset = bytearray(pages[inset:]), 0
                yield name, torch.frombuffer(pages, dtype=dtype, count=math.prod(shape),
                                             offset=inset).view(shape)
                first = data + end
            if first != size:
                raise ValueError(f"{size} bytes, of which its header describes {first}")
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path} is not a valid safetensors file ({error}): copy it "
                             "anew") from None


def read_pickle(path: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) of a file that torch.save wrote; weights_only: it can run no code."""
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        good = all(isinstance(k, str) and isinstance(v, Tensor) for k, v in tensors.items())
    except Exception:       # whatever a broken pickle raises
        good = False
    if not good:
        raise ValueError(f"{path} is not a file of named tensors alone: fetch it again")
    yield from tensors.items()


def read_tensors(folder: Path) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, tensor) from a folder's weights, one file or its shards, each read once."""
    present = os.listdir(folder)
    for file, read in (("model.safetensors", read_safetensors), ("pytorch_model.bin", read_pickle)):
        index = f"{file}.index.json"
        if file in present:
            shards = {file}
        elif index in present:
            weight_map = read_json(folder / index).get("weight_map")
            for shard in weight_map.values() if isinstance(weight_map, dict) else [None]:
                if shard not in present:        # so it is also a plain name, in this folder
                    raise ValueError(f"{folder / index} names {shard!r:.99} as a file of weights, "
                                     "which is not there: fetch it again")
            shards = set(weight_map.values())
        else:
            continue
        for shard in sorted(shards):
            yield from read(folder / shard)
        return
    raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin (nor the index "
                     "of its shards): expected a checkpoint folder")


def writable(path: str | Path) -> Path:
    """The path of a file to be written later: ValueError now rather than after hours of work."""
    path = Path(path)
    try:
        if not path.name or path.exists() and not path.is_file():
            raise ValueError("it is a folder or a device")
        temporary = path.with_name(path.name + ".tmp")      # as write_atomically's
        temporary.touch()
        temporary.unlink()
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"{str(path)!r} cannot be written ({reason}): expected the name of a "
                         "file, in a folder that exists") from None
    return path


def write_atomically(path: Path, chunks: Iterable[bytes]) -> None:
    """Write byte chunks to a temporary neighbour, sync it to the disk, then rename it to path.

    A crash at any moment leaves the old file or the new one, never a part of one.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            for chunk in chunks:
                file.write(chunk)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise ValueError(f"could not write {path} ({error.strerror}): free some space or choose "
                         "another folder; what was there before is unchanged") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {"__metadata__": {"format": "pt"}}, 0     # transformers looks for this mark
    # Widest type first: every tensor then starts at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    for name, tensor in tensors.items():
        start, end = end, end + tensor.nbytes
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)

    def chunks():
        yield len(text).to_bytes(8, "little") + text
        for tensor in tensors.values():
            yield memoryview(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())

    write_atomically(path, chunks())


# ---------------------------------------------------------- decoding: products with a few rows of x

class FewRowsLinear(nn.Module):
    """norm(x) W^T for a few rows of x, where W is one matrix or several that read the same x: a
    product that should take no longer than reading W.

    On a CPU, PyTorch's own product has a fast path for one row and falls off it at two; with W laid
    out anew by oneDNN, six rows take 0.9 to 1.2 times as long as one (benchmarks/decoding.py prints
    it). On a GPU, compiled, one row or two (a draft's first step) take sums() instead.
    """

    def __init__(self, *linears: Linear, norm: RMSNorm | None = None):
        super().__init__()
        self.norm, self.sizes = norm, [len(linear.weight) for linear in linears]
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self.packed = (weight.device.type == "cpu" and torch.backends.mkldnn.is_available()
                       and weight.dtype in (torch.float32, torch.bfloat16))
        if self.packed:
            weight = torch.ops.mkldnn._reorder_linear_weight(weight, 6)     # laid out for six rows
        self.register_buffer("weight", weight)

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() and not self.packed and x.shape[:-1].numel() <= 2:
            return self.sums(x.flatten(0, -2)).view(*x.shape[:-1], -1)
        x = self.norm(x) if self.norm else x
        if self.packed:
            return torch.ops.mkldnn._linear_pointwise(x, self.weight, None, "none", [], "")
        return F.linear(x, self.weight)

    def sums(self, x: Tensor) -> Tensor:
        """(N, in) -> (N, out), each output a sum over `in`, as the mean in its norm is one. Sums
        over the same index compile into one kernel, which reads W at the memory's speed; that each
        output sums the squares anew takes less time than launching a kernel of their own."""
        if x.shape[1] > 4096:
            # Has the compiler store x, a SwiGLU's product say, instead of computing it for every
            # output. It pays for CodeLlama's 11008 inputs, and does not for AMD-135M's 2048.
            x = x.as_strided(x.shape, x.stride())
        wide, scale = x.to(torch.promote_types(x.dtype, torch.float32))[:, None], 1.0  # (N, 1, in)
        if self.norm:
            mean = wide.square().expand(-1, *self.weight.shape).mean(-1)    # (N, out)
            wide, scale = wide * self.norm.weight, torch.rsqrt(mean + self.norm.eps)
        return ((self.weight * wide).sum(-1) * scale).to(x.dtype)


@torch.no_grad()
def prepare_for_decoding(model: Transformer) -> Transformer:
    """Replace a model's matrices in place by forms that are fast for few rows: it computes the same
    but neither trains nor saves any more."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if attention.fused:
            return model                    # it was prepared before
        attention.fused = FewRowsLinear(attention.q_proj, attention.k_proj, attention.v_proj,
                                        norm=layer.input_layernorm)
        mlp.fused = FewRowsLinear(mlp.gate_proj, mlp.up_proj, norm=layer.post_attention_layernorm)
        del attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj
        layer.input_layernorm = layer.post_attention_layernorm = nn.Identity()     # now in fused
        attention.o_proj = FewRowsLinear(attention.o_proj)
        mlp.down_proj = FewRowsLinear(mlp.down_proj)
    model.lm_head = FewRowsLinear(model.lm_head)
    return model.requires_grad_(False)
