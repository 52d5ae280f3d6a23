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
import struct
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
                             f"num_attention_heads {self.num_attention_heads} (RoPE pairs channels)")
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
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=1,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256,
        bos_token_id=None, eos_token_id=4095),
    "demo-target": ModelConfig(
        vocab_size=4096, hidden_size=256, intermediate_size=768, num_hidden_layers=8,
        num_attention_heads=8, num_key_value_heads=8, max_position_embeddings=256,
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

    positions (B, T) -> two tensors (B, 1, T, D) of type dtype. Computed when needed: there is no
    table that a long generation could run off. The arithmetic is float32, as checkpoints were
    trained with, unless the model is float64. Channel i turns with channel i + D/2 (the "half"
    layout of Hugging Face's checkpoints; the paper's pairs are 2i, 2i + 1).
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

    q (B, H, T, D); k, v (B, K, S, D); mask (B or 1, 1, T, S), true where a query may look.
    The model calls PyTorch's fused kernels, which never store the (T, S) scores; a test holds
    the two equal.
    """
    groups = q.shape[1] // k.shape[1]       # query heads that share one key/value head
    k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)   # (B, H, S, D)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])               # (B, H, T, S)
    return scores.masked_fill(~mask, float("-inf")).softmax(-1) @ v         # (B, H, T, D)


class Attention(nn.Module):
    def __init__(self, config: ModelConfig):
        super().__init__()
        self.D = config.head_dim
        C, KV = config.hidden_size, config.num_key_value_heads * self.D
        self.q_proj = Linear(C, C)
        self.k_proj = Linear(C, KV)
        self.v_proj = Linear(C, KV)
        self.o_proj = Linear(C, C)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, past=None) -> Tensor:
        B, T, C = x.shape
        q = self.q_proj(x).view(B, T, -1, self.D).transpose(1, 2)           # (B, H, T, D)
        k = self.k_proj(x).view(B, T, -1, self.D).transpose(1, 2)           # (B, K, T, D)
        v = self.v_proj(x).view(B, T, -1, self.D)                           # (B, T, K, D)
        q, k = rotate(q, cos, sin), rotate(k, cos, sin).transpose(1, 2)     # k: (B, T, K, D)
        mask = None
        if past is not None:
            keys, values, slots, mask = past
            keys[slots], values[slots] = k, v
            k, v = keys, values                                             # (B, S, K, D)
        k, v = k.transpose(1, 2), v.transpose(1, 2)                         # (B, K, S, D)
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

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))  # (B, T, F) -> (B, T, C)


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
    """Keys and values of every layer, allocated once, with a place for `length` tokens a row.

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


class Transformer(nn.Module):
    """Module names are Hugging Face's, so state_dict() keys are those of a Llama checkpoint."""

    def __init__(self, config: ModelConfig, seed: int = 0):
        super().__init__()
        self.config = config
        self.model = nn.ModuleDict({
            "embed_tokens": nn.Embedding(config.vocab_size, config.hidden_size),
            "layers": nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers)),
            "norm": RMSNorm(config.hidden_size, config.rms_norm_eps),
        })
        self.lm_head = Linear(config.hidden_size, config.vocab_size)
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

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """The last block's normalised output, (B, T, C), for tokens (B, T)."""
        T = tokens.shape[1]
        x = self.model.embed_tokens(tokens)                                 # (B, T, C)
        if torch.is_autocast_enabled(x.device.type):
            # A bf16 residual stream: half the traffic of every addition and norm in training.
            x = x.to(torch.get_autocast_dtype(x.device.type))
        positions = torch.arange(T, device=x.device)[None]                  # (1, T)
        if cache is not None:
            # A draft that is re-fed its last two tokens starts a one-token prompt at -1: the
            # clamp writes that token's key twice into slot 0.
            positions = (cache.position[:, None] + positions).clamp(min=0)  # (B, T)
            rows = torch.arange(len(tokens), device=x.device)[:, None]
            reach = torch.arange(cache.keys[0].shape[1], device=x.device)   # (S,)
            mask = (reach <= positions[..., None])[:, None]                 # (B, 1, T, S)
        cos, sin = rope(positions, self.config, x.dtype)
        for i, layer in enumerate(self.model.layers):
            past = cache and (cache.keys[i], cache.values[i], (rows, positions), mask)
            x = layer(x, cos, sin, past)
        if cache is not None:
            cache.position += T
        return self.model.norm(x)

    def forward(self, tokens: Tensor, cache: Cache | None = None) -> Tensor:
        """Logits (B, T, V) for tokens (B, T). With a cache, tokens follow those it holds."""
        return self.lm_head(self.hidden(tokens, cache))

    @classmethod
    def from_pretrained(cls, folder: str | Path, device="cpu", dtype: torch.dtype | None = None):
        """Load a checkpoint folder of this project or any Llama of the Hugging Face layout.

        dtype None keeps the checkpoint's own. Raises ValueError for what is missing or unsupported.
        """
        folder = Path(folder)
        config = read_config(folder)
        with torch.device("meta"):          # shapes without memory: the checkpoint brings the data
            model = cls(config)
        expected = model.state_dict()
        if config.tie_word_embeddings:
            del expected["lm_head.weight"]
        found, problems = {}, []
        for name, tensor in read_tensors(folder):
            if name.endswith("rotary_emb.inv_freq") or (
                    name == "lm_head.weight" and config.tie_word_embeddings):
                continue                    # old checkpoints store what the config already says
            if name not in expected:
                problems.append(f"unexpected {name}")
            elif tensor.shape != expected[name].shape:
                problems.append(f"{name} is {tuple(tensor.shape)}, "
                                f"expected {tuple(expected[name].shape)}")
            elif not tensor.is_floating_point():
                problems.append(f"{name} is {tensor.dtype}, expected a floating-point type")
            else:
                found[name] = tensor.to(device, dtype or tensor.dtype)
        problems += [f"missing {name}" for name in expected if name not in found
                     and not any(problem.startswith(name) for problem in problems)]
        if problems:
            more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
            raise ValueError(f"{folder} does not hold the model that its config.json describes: "
                             f"{'; '.join(problems[:8])}{more}")
        if config.tie_word_embeddings:
            found["lm_head.weight"] = found["model.embed_tokens.weight"]
        model.load_state_dict(found, assign=True)
        if config.tie_word_embeddings:      # assigning made two parameters of the shared one
            model.lm_head.weight = model.model.embed_tokens.weight
        return model

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors, each under a temporary name first."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = self.state_dict()
        if self.config.tie_word_embeddings:
            del tensors["lm_head.weight"]
        write_safetensors(folder / "model.safetensors", tensors)
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
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"device {name!r} is not there: expected cpu"
                         + (" or cuda" if torch.cuda.is_available() else "")
                         + "; leave --device out to take the best one") from None
    return device


# ---------------------------------------------------------------------- checkpoints: config.json

# What a Llama config may say besides our fields, and the one value of it that this model computes.
SUPPORTED = {"model_type": "llama", "hidden_act": "silu", "attention_bias": False,
             "mlp_bias": False, "rope_scaling": None, "sliding_window": None,
             "quantization_config": None, "partial_rotary_factor": 1.0}


def read_json(path: Path) -> dict:
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: expected a checkpoint folder with config.json and "
                         f"model.safetensors; train one with train.py or download one") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}): restore the file") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


def read_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a Hugging Face config.json; what this model cannot compute is refused."""
    raw = read_json(folder / "config.json")
    rope_parameters = raw.get("rope_parameters") or {}      # where transformers 5 keeps the base
    if not isinstance(rope_parameters, dict) or rope_parameters.get(
            "rope_type", "default") != "default":
        raise ValueError(f"{folder}: rope_parameters {rope_parameters!r} is not supported: this "
                         f"model computes plain RoPE (rope_type default) only")
    raw = {"num_key_value_heads": raw.get("num_attention_heads")} | raw | {
        key: value for key, value in rope_parameters.items() if key != "rope_type"}
    for name, value in SUPPORTED.items():
        if raw.get(name, value) != value:
            raise ValueError(f"{folder}: {name} {raw[name]!r} is not supported: this model "
                             f"computes {name} {value!r} only")
    required = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                "num_attention_heads")
    missing = [name for name in ("model_type", *required) if name not in raw]
    if missing:
        raise ValueError(f"{folder / 'config.json'} lacks {', '.join(missing)}")
    # A field that a config leaves out has transformers' default, which is not AMD-135M's.
    defaults = {"rms_norm_eps": 1e-6}
    for name in ("bos_token_id", "eos_token_id"):
        if isinstance(raw.get(name), list):                 # Llama-3 lists several: the first ends
            raw[name] = raw[name][0] if raw[name] else None
    known = {field.name: raw[field.name] for field in fields(ModelConfig) if field.name in raw}
    try:
        config = ModelConfig(**(defaults | known))
    except ValueError as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from None
    if raw.get("head_dim") not in (None, config.head_dim):
        raise ValueError(f"{folder}: head_dim {raw['head_dim']!r} is not supported: this model "
                         f"computes hidden_size / num_attention_heads = {config.head_dim} only")
    return config


# ---------------------------------------------------------------------- checkpoints: the tensors

# safetensors: 8 bytes of header length, a JSON header {name: {dtype, shape, data_offsets}}, raw
# little-endian data. https://huggingface.co/docs/safetensors
DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16,
          "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16,
          "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}
MAX_HEADER = 100_000_000        # bytes: the bound of the reference implementation


def read_safetensors(path: Path):
    """Yield (name, tensor) of a safetensors file; each tensor is its own private mapping.

    Nothing is read until it is used, and a tensor that is converted frees its pages with it, so
    loading takes the memory of the result. Every offset is checked before anything is mapped.
    """
    def check(condition, problem):
        if not condition:
            raise ValueError(f"{path} is not a valid safetensors file: {problem}; copy it anew")

    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        check(size >= 8, f"{size} bytes are too few for a header")
        length = struct.unpack("<Q", file.read(8))[0]
        check(length <= min(size - 8, MAX_HEADER), f"its header of {length} bytes is too long")
        try:
            header = json.loads(file.read(length))
        except (ValueError, RecursionError):
            header = None
        check(isinstance(header, dict), "its header is not a JSON object")
        header.pop("__metadata__", None)
        entries = []
        for name, entry in header.items():
            try:
                dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
                start, end = entry["data_offsets"]
                integers = all(type(n) is int and n >= 0 for n in (*shape, start, end))
            except (KeyError, TypeError, ValueError):
                integers = False
            check(integers, f"the entry of {name!r} is malformed or of an unknown dtype")
            check(len(shape) <= 8 and end - start == math.prod(shape) * dtype.itemsize,
                  f"{name!r} has {end - start} bytes, not those of {entry['dtype']} {shape}")
            entries.append((start, end, name, dtype, shape))
        covered = 0         # the data must be covered without overlaps or holes
        for start, end, name, *_ in sorted(entries, key=lambda entry: entry[:2]):
            check(start == covered, f"{name!r} starts at byte {start}, expected {covered}")
            covered = end
        check(8 + length + covered == size,
              f"it has {size} bytes, its header describes {8 + length + covered}")
        for start, end, name, dtype, shape in entries:
            if start == end:
                yield name, torch.empty(shape, dtype=dtype)
                continue
            first = 8 + length + start
            page = first - first % mmap.ALLOCATIONGRANULARITY
            data = mmap.mmap(file.fileno(), 8 + length + end - page, access=mmap.ACCESS_COPY,
                             offset=page)
            if first % dtype.itemsize:      # a header of odd length: move the data into alignment
                data, first, page = bytearray(data[first - page:]), 0, 0
            yield name, torch.frombuffer(data, dtype=dtype, count=math.prod(shape),
                                         offset=first - page).view(shape)


def read_tensors(folder: Path):
    """Yield (name, tensor) from a folder's weights, one file or its shards, each read once."""
    for file in ("model.safetensors", "pytorch_model.bin"):
        if (folder / file).exists():
            shards = [file]
        elif (folder / f"{file}.index.json").exists():
            weight_map = read_json(folder / f"{file}.index.json").get("weight_map")
            if not isinstance(weight_map, dict) or not all(
                    isinstance(shard, str) and Path(shard).name == shard
                    for shard in weight_map.values()):
                raise ValueError(f"{folder / file}.index.json has no weight_map of file names")
            shards = sorted(set(weight_map.values()))
        else:
            continue
        for shard in shards:
            path = folder / shard
            if not path.exists():
                raise ValueError(f"{path} is missing: {file}.index.json names it; fetch it again")
            if file.endswith(".safetensors"):
                yield from read_safetensors(path)
                continue
            try:
                tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                items = list(tensors.items())
            except Exception as error:
                raise ValueError(f"{path} is not a file of tensors "
                                 f"({str(error).splitlines()[0]}): fetch it again") from None
            yield from ((k, v) for k, v in items if isinstance(v, Tensor))
        return
    raise ValueError(f"{folder} has no model.safetensors and no pytorch_model.bin (nor the index "
                     f"of its shards): expected a checkpoint folder")


def write_atomically(path: Path, chunks) -> None:
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
        temporary.unlink(missing_ok=True)
        raise ValueError(f"could not write {path} ({error.strerror}): free some space or choose "
                         f"another folder; what was there before is unchanged") from None


def write_safetensors(path: Path, tensors: dict[str, Tensor]) -> None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, offset = {}, 0
    # Widest type first: every tensor then starts at a multiple of its item size.
    tensors = dict(sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.dtype.itemsize
        header[name] = {"dtype": names[tensor.dtype], "shape": list(tensor.shape),
                        "data_offsets": [offset, end]}
        offset = end
    # transformers looks for this mark of a PyTorch file.
    text = json.dumps({"__metadata__": {"format": "pt"}} | header).encode()
    text += b" " * (-len(text) % 8)
    chunks = (memoryview(t.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
              for t in tensors.values())
    write_atomically(path, (part for chunk in ([struct.pack("<Q", len(text)), text], chunks)
                            for part in chunk))


# -------------------------------------------------------------------- decoding on a CPU: few rows

class PackedLinear(nn.Module):
    """A Linear for decoding on a CPU, its weight laid out anew by oneDNN for a few rows of x.

    PyTorch's own product streams the matrix once for one row and falls off that path for two to
    eight, so that verifying six tokens cost three times one; packed, it costs 1.1 times.
    """

    def __init__(self, linear: Linear, rows: int):
        super().__init__()
        self.packed = torch.ops.mkldnn._reorder_linear_weight(linear.weight, rows)
        # A matrix that fits the caches is quickest unpacked when there is one row: keep both.
        self.weight = linear.weight if linear.weight.numel() < 2**19 else None

    def forward(self, x: Tensor) -> Tensor:
        if self.weight is not None and x.shape[:-1].numel() == 1:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


@torch.no_grad()
def pack_for_decoding(model: Transformer, rows: int = 6) -> Transformer:
    """Pack every matrix of a model on a CPU, in place. It then decodes faster, but neither trains
    nor saves. Where this build of PyTorch cannot (no oneDNN, float64), nothing changes."""
    if model.device.type == "cpu" and torch.backends.mkldnn.is_available() and (
            model.dtype in (torch.float32, torch.bfloat16)):
        for module in list(model.modules()):
            for name, child in module.named_children():
                if isinstance(child, Linear):
                    setattr(module, name, PackedLinear(child, rows))
    return model
