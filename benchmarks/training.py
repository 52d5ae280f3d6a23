"""How fast is a training step? train.py's own loop, beside two others, on one machine in one call.

Each row trains the same shape on the same random tokens, in bf16 over float32 weights, with fused
AdamW and clipping, and is measured alone: tokens/s, MFU, peak memory. `ours` is train.train(), with
its logs. `transformers` is LlamaForCausalLM with its own loss (extra `peers`); `plain` is a step of
llama2.c's shape: float32 residual stream, interleaved RoPE, one optimizer call on gradients that
autograd allocates. The rows after them change one thing of ours.

    python benchmarks/training.py                                   # amd-135m on one GPU
    python benchmarks/training.py --variants ours,transformers --preset demo-target --block 128 \\
        --micro-batch 16 --steps 8 --eager                          # the demo's shape on a CPU
    torchrun --nproc-per-node 2 benchmarks/training.py --variants ours
"""
import argparse
import gc
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import train
from model import PRESETS, ModelConfig, Transformer
from train import AMD, WORLD, TrainConfig, autocast, say


# ------------------------------------------------------------- llama2.c's shape, written plainly

class PlainBlock(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        C, width = c.hidden_size, c.intermediate_size
        self.heads = c.num_attention_heads
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(C, C, bias=False) for _ in range(4))
        self.w1, self.w3 = (nn.Linear(C, width, bias=False) for _ in range(2))
        self.w2 = nn.Linear(width, C, bias=False)
        self.norm1, self.norm2 = (nn.Parameter(torch.ones(C)) for _ in range(2))
        self.eps = c.rms_norm_eps

    def norm(self, x: Tensor, weight: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).type_as(x) \
            * weight

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        real, imaginary = x.float().reshape(*x.shape[:-1], -1, 2).unbind(-1)    # (B, T, H, D/2)
        turned = (real * cos - imaginary * sin, real * sin + imaginary * cos)
        return torch.stack(turned, -1).flatten(3).type_as(x)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        B, T, C = x.shape
        h = self.norm(x, self.norm1)
        q, k, v = (w(h).view(B, T, self.heads, -1) for w in (self.wq, self.wk, self.wv))
        q, k = self.turn(q, cos, sin), self.turn(k, cos, sin)
        y = F.scaled_dot_product_attention(*(z.transpose(1, 2) for z in (q, k, v)), is_causal=True)
        x = x + self.wo(y.transpose(1, 2).reshape(B, T, C))
        h = self.norm(x, self.norm2)
        return x + self.w2(F.silu(self.w1(h)) * self.w3(h))


class Plain(nn.Module):
    def __init__(self, c: ModelConfig):
        super().__init__()
        self.embedding = nn.Embedding(c.vocab_size, c.hidden_size)
        self.blocks = nn.ModuleList(PlainBlock(c) for _ in range(c.num_hidden_layers))
        self.weight = nn.Parameter(torch.ones(c.hidden_size))
        self.output = nn.Linear(c.hidden_size, c.vocab_size, bias=False)
        D = c.head_dim
        turns = torch.outer(torch.arange(c.max_position_embeddings),
                            1 / c.rope_theta ** (torch.arange(0, D, 2) / D))
        self.register_buffer("cos", turns.cos()[:, None], persistent=False)
        self.register_buffer("sin", turns.sin()[:, None], persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x, T = self.embedding(tokens), tokens.shape[1]
        for block in self.blocks:
            x = block(x, self.cos[:T], self.sin[:T])
        return self.output(self.blocks[0].norm(x, self.weight))


# ------------------------------------------------------------------- train.py's loop, and variants

class RandomTokens:
    """Stands for data.Corpus and data.Loader: the same random rows at each step."""
    sources, blocks_per_epoch = [], 1

    def __init__(self, config: TrainConfig):
        shape, generator = PRESETS[config.preset], torch.Generator().manual_seed(train.RANK)
        self.tokenizer = SimpleNamespace(n_vocab=shape.vocab_size, bos_id=shape.bos_token_id,
                                         eos_id=shape.eos_token_id)
        self.rows = torch.randint(shape.vocab_size, (config.rows // WORLD, config.block + 1),
                                  generator=generator)

    def batch(self, *_):
        return self.rows.numpy()


def ours(config: TrainConfig, device: torch.device, tokens: RandomTokens, whole: bool = False):
    """tokens/s of train.train() as it logs it, in each quarter of the steps."""
    train.data.Corpus = train.data.Loader = lambda *_: tokens
    train.bits_per_byte = train.say = lambda *_: None          # no log between the table's rows
    with tempfile.TemporaryDirectory() as folder:
        run = train.Run(replace(config, out=folder, compile=config.compile and not whole), device,
                        False)
        if whole and config.compile:            # RoPE's angles in the same graph as the layers
            run.model.hidden = torch.compile(run.model.hidden)
            run.head_loss = torch.compile(train.head_loss)
        run.save, metrics = lambda step: None, run.folder / "metrics.jsonl"
        run.folder.mkdir()
        train.train(run)
        lines = [json.loads(line) for line in metrics.open()] if train.RANK == 0 else []
    return [line["tokens_per_s"] for line in lines if "tokens_per_s" in line]


def usual(module: nn.Module, loss: Callable, config: TrainConfig, device: torch.device,
          tokens: RandomTokens) -> list[float]:
    """The step that most scripts have: gradients of autograd's own, clip_grad_norm_, zero_grad."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    loss = torch.compile(loss) if config.compile else loss
    batch, rates, since = tokens.rows.to(device), [], None
    for step in range(config.steps):
        with autocast(config, device):
            value = loss(module, batch)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step == 0 or (step + 1) % config.log_every == 0:
            value.item()                        # waits for the device
            if since:
                rates.append(config.log_every * config.batch_tokens / (time.perf_counter() - since))
            since = time.perf_counter()
    return rates


def plain(config: TrainConfig, device: torch.device, tokens: RandomTokens) -> list[float]:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        logits = module(batch[:, :-1])
        return F.cross_entropy(logits.view(-1, logits.size(-1)), batch[:, 1:].reshape(-1))
    return usual(Plain(PRESETS[config.preset]).to(device), loss, config, device, tokens)


def transformers(config: TrainConfig, device: torch.device, tokens: RandomTokens,
                 own_loss: bool = True) -> list[float]:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("transformers is not installed: pip install -e '.[peers]', or leave it "
                         "out with --variants") from None
    module = LlamaForCausalLM(LlamaConfig(**asdict(PRESETS[config.preset]), use_cache=False,
                                          attn_implementation="sdpa")).to(device)

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        if own_loss:                    # as its documentation has it: it shifts the labels itself
            return module(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
        logits = module(input_ids=batch[:, :-1]).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    return usual(module, loss, config, device, tokens)


VARIANTS = {
    "ours": ours,
    "transformers": transformers,
    "transformers-flat": lambda c, d, t: transformers(c, d, t, own_loss=False),    # our loss
    "plain": plain,
    "whole-model": lambda c, d, t: ours(c, d, t, whole=True),
    "half-rows": lambda c, d, t: ours(replace(c, micro_batch=c.micro_batch // 2), d, t),
}
STANDARD = "ours,transformers,plain"


# ----------------------------------------------------------------------------------- measuring

# Dense bf16 peaks in TFLOP/s, by a part of the device's name; the first that fits counts. MI250:
# of one device, which is half a package. A device that is not here gets no MFU rather than a wrong
# one.
PEAKS = {"MI250": 181, "MI300X": 1307, "MI325X": 1307, "A100": 312, "H100 PCIe": 756,
         "H100 NVL": 835, "H100": 989, "H200": 989, "L40S": 362, "L4": 121}


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(shape: ModelConfig, block: int) -> int:
    """PaLM's count (Chowdhery et al. 2022, appendix B): 6 for each parameter in a matrix product,
    12 L C T for attention."""
    with torch.device("meta"):
        model = Transformer(shape)
    size = sum(p.numel() for part in (model.model.layers, model.lm_head)
               for p in part.parameters() if p.ndim == 2)
    return 6 * size + 12 * shape.num_hidden_layers * shape.hidden_size * block


def measure(name: str, config: TrainConfig, device: torch.device) -> dict:
    """Tokens/s over all processes and peak memory of one variant, or why there is none."""
    cuda = device.type == "cuda"
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    began = time.perf_counter()
    try:
        rates = VARIANTS[name](config, device, RandomTokens(config))
    except Exception as error:          # a variant that fails is a row of the table too
        return {"error": (str(error) or repr(error)).splitlines()[0][:90]}
    # The median: one slow moment does not count.
    return {"rate": statistics.median(rates or [math.nan]), "seconds": time.perf_counter() - began,
            "memory": torch.cuda.max_memory_allocated(device) / 2**30 if cuda else 0.0}


def table(config: TrainConfig, device: torch.device, names: list[str]) -> None:
    peak, cuda = peak_flops(device), device.type == "cuda"
    per_token = flops_per_token(PRESETS[config.preset], config.block)
    name = (torch.cuda.get_device_name(device) if cuda else
            f"CPU, {torch.get_num_threads()} threads")
    say(f"{config.preset}, {config.micro_batch} x {config.block} tokens on each of {WORLD} x "
        f"{name}, torch {torch.__version__}, {'compiled' if config.compile else 'eager'}\n"
        f"| step | tokens/s | beside {names[0]} | {'MFU' if peak else 'TFLOP/s'} | peak GiB | "
        "seconds in all |\n|---|---:|---:|---:|---:|---:|")
    base = None
    for name in names:
        row = measure(name, config, device)
        if "error" in row:
            say(f"| {name} | failed: {row['error']} | | | | |")
            continue
        base, flops = base or row["rate"], row["rate"] / WORLD * per_token
        say(f"| {name} | {row['rate']:,.0f} | {row['rate'] / base:.3f} | "
            + (f"{flops / peak:.1%}" if peak else f"{flops / 1e12:.3f}")
            + f" | {row['memory']:.1f} | {row['seconds']:.0f} |")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="How fast is a training step?")
    parser.add_argument("--preset", default="amd-135m", choices=PRESETS)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=80, help="in four measured quarters")
    parser.add_argument("--device", default="")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--variants", default=STANDARD, metavar="A,B",
                        help=f"default {STANDARD}; of {', '.join(VARIANTS)}")
    args = parser.parse_args(argv)
    try:
        names = args.variants.split(",")
        if args.steps < 8:
            raise ValueError(f"--steps is {args.steps}: expected at least 8")
        if unknown := [name for name in names if name not in VARIANTS]:
            raise ValueError(f"there is no variant {', '.join(unknown)}: expected some of "
                             f"{', '.join(VARIANTS)}")
        quarter = args.steps // 4
        table(replace(AMD, preset=args.preset, block=args.block, micro_batch=args.micro_batch,
                      compile=not args.eager, steps=4 * quarter, log_every=quarter, warmup=0,
                      val_every=10**9, batch_tokens=args.micro_batch * args.block * WORLD),
              train.open_device(args.device), names)
    except (ValueError, OSError) as error:
        parser.exit(2, f"training.py: error: {error}\n")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
