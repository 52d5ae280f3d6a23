"""How fast is a training step? train.py's, beside two others, and beside things that might help.

Each row trains the same shape on the same random tokens, in bf16 over float32 weights, with fused
AdamW and clipping, and is measured alone: tokens/s, MFU, peak memory. `transformers` is
LlamaForCausalLM with its own loss (extra `peers`); `plain` is a step of llama2.c's shape: float32
residual stream, interleaved RoPE, one optimizer call on gradients that autograd allocates. The rows
after them change one thing of train.py's step; the prediction, written before the measurement,
stands in the table.

    python benchmarks/training.py                                   # amd-135m on one GPU
    python benchmarks/training.py --variants ours,transformers --preset demo-target --block 128 \\
        --micro-batch 16 --steps 5 --eager                          # the demo's shape on a CPU
    torchrun --nproc-per-node 2 benchmarks/training.py --variants ours
    python benchmarks/training.py --agree out/data --micro-batch 8  # fp32 beside bf16, 200 steps
"""
import argparse
import gc
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
from model import PRESETS, ModelConfig, Transformer
from train import (RECIPES, Processes, TrainConfig, Trainer, arithmetic,
                   flops_per_token, head_loss, keep_freed_memory, loss_of, peak_flops)


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


def usual_step(module: nn.Module, loss: Callable, config: TrainConfig) -> Callable:
    """The step that most scripts have: gradients of autograd's own, clip_grad_norm_, zero_grad."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4, betas=(0.9, 0.95),
                                  weight_decay=0.1, fused=True)
    loss = torch.compile(loss) if config.compile else loss

    def step(batch: Tensor) -> None:
        with arithmetic(config, batch.device):
            value = loss(module, batch)
        value.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return step


def plain(config: TrainConfig, processes: Processes) -> Callable:
    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        logits = module(batch[:, :-1])
        return F.cross_entropy(logits.view(-1, logits.size(-1)), batch[:, 1:].reshape(-1))
    return usual_step(Plain(PRESETS[config.preset]).to(processes.device), loss, config)


def transformers(config: TrainConfig, processes: Processes, own_loss: bool = True) -> Callable:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError:
        raise ValueError("transformers is not installed: pip install -e '.[peers]', or leave it "
                         "out with --variants") from None
    module = LlamaForCausalLM(LlamaConfig(
        **asdict(PRESETS[config.preset]), use_cache=False,
        attn_implementation="sdpa")).to(processes.device)

    def loss(module: nn.Module, batch: Tensor) -> Tensor:
        if own_loss:                    # as its documentation has it: it shifts the labels itself
            return module(input_ids=batch[:, :-1], labels=batch[:, :-1]).loss
        logits = module(input_ids=batch[:, :-1]).logits.float()
        return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
    return usual_step(module, loss, config)


# -------------------------------------------------------------------- train.py's step, and variants

def ours(config: TrainConfig, processes: Processes, head_loss: Callable | None = None) -> Callable:
    model = Transformer(PRESETS[config.preset]).to(processes.device)
    trainer = Trainer(model, config, processes)
    trainer.head_loss = head_loss or trainer.head_loss
    return lambda batch: trainer.step(batch, 1e-4)


def compiled(config: TrainConfig, processes: Processes, *methods: str, **options) -> Callable:
    """Our step with other parts compiled: the named methods, or with "layer" each layer alone."""
    model = Transformer(PRESETS[config.preset]).to(processes.device)
    trainer = Trainer(model, replace(config, compile=False), processes)
    if config.compile:
        for name in methods:
            if name == "layer":
                for module in (*model.model.layers, model.model.norm):
                    module.compile(**options)
            else:
                setattr(model, name, torch.compile(getattr(model, name), **options))
        trainer.head_loss = torch.compile(head_loss, **options)
    return lambda batch: trainer.step(batch, 1e-4)


def autograd_gradients(config: TrainConfig, processes: Processes) -> Callable:
    model = Transformer(PRESETS[config.preset]).to(processes.device)
    part = Trainer(model, config, processes).head_loss      # it compiles; its optimizer stays idle
    model.zero_grad()
    return usual_step(model, lambda module, batch: loss_of(module, batch, 0, part),
                      replace(config, compile=False))


class HeadLoss(torch.autograd.Function):
    """head_loss() of hidden (N, C), whose forward pass already makes the gradients, chunk by chunk:
    no logits are kept and none are made twice."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, part: Callable):
        half, total = weight.to(hidden.dtype), torch.zeros((), device=hidden.device)
        d_hidden, d_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for h, t, d in zip(*(x.split(8192) for x in (hidden, targets, d_hidden))):
            loss, slope = part(h, half, t)
            total += loss
            torch.mm(slope, half, out=d)
            d_weight += slope.T @ h
        ctx.save_for_backward(d_hidden, d_weight)
        return total

    @staticmethod
    def backward(ctx, slope: Tensor):
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * slope.to(d_hidden.dtype), d_weight * slope, None, None


def head_gradients(config: TrainConfig, processes: Processes) -> Callable:
    def part(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p = F.linear(hidden, weight).float().log_softmax(-1)            # (N, V)
        hit = torch.arange(weight.shape[0], device=targets.device) == targets[:, None]
        return -(log_p * hit).sum(), (log_p.exp() - hit.float()).to(hidden.dtype)
    part = torch.compile(part) if config.compile else part

    def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
        with torch.autocast(hidden.device.type, enabled=False):
            return HeadLoss.apply(hidden, head.weight, targets, part)
    return ours(config, processes, head_loss)


# name: (how to build the step, what was predicted of it beside `ours`, before it was measured)
VARIANTS = {
    "ours": (ours, ""),
    "transformers": (transformers, "0.6x: float32 residual stream and logits"),
    "transformers-flat": (lambda c, p: transformers(c, p, own_loss=False),
                          "0.7x: our flattened loss on its logits"),
    "plain": (plain, "0.94x: float32 residual stream"),
    "whole-model": (lambda c, p: compiled(c, p, "hidden"),
                    "0.94x: RoPE's cosines in each kernel, 0.23 ms for 0.07"),
    "block-by-block": (lambda c, p: compiled(c, p, "enter", "layer"),
                       "0.985x: no fusion across blocks, but half the start"),
    "autograd-gradients": (autograd_gradients, "1.005x: no zeroing and adding of 0.5 GB"),
    "head-gradients": (head_gradients, "1.00x, 6 GiB less: no logits kept, none made twice"),
    "chunked-loss": (lambda c, p: ours(replace(c, loss_chunk=8192), p),
                     "0.90x, 6 GiB less: the head's product is made twice"),
    "half-rows": (lambda c, p: ours(replace(c, micro_batch=c.micro_batch // 2), p),
                  "0.98x, half the memory: --micro-batch halved, in the same batch"),
    "chunked-half-rows": (lambda c, p: ours(replace(
        c, loss_chunk=8192, micro_batch=c.micro_batch // 2), p), "0.89x, half the memory"),
    "quarter-rows": (lambda c, p: ours(replace(c, micro_batch=c.micro_batch // 4), p),
                     "0.94x, a third of the memory"),
    "coordinate-descent": (lambda c, p: compiled(c, p, "enter", "blocks", options={
        "coordinate_descent_tuning": True}), "1.01x: better block sizes of pointwise kernels"),
    "max-autotune": (lambda c, p: compiled(
        c, p, "enter", "blocks", mode="max-autotune-no-cudagraphs"),
                     "1.01x after minutes of compiling"),
}
STANDARD = "ours,transformers,plain"


# ----------------------------------------------------------------------------------- measuring

def measure(name: str, config: TrainConfig, processes: Processes, steps: int) -> dict:
    """Tokens/s over all processes and peak memory of one variant, or why there is none."""
    device, cuda = processes.device, processes.device.type == "cuda"

    def wait() -> None:
        if cuda:
            torch.cuda.synchronize(device)
    torch._dynamo.reset()
    gc.collect()
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    generator = torch.Generator().manual_seed(processes.rank)
    batch = torch.randint(PRESETS[config.preset].vocab_size,
                          (config.rows // processes.world, config.block + 1), generator=generator)
    batch = batch.to(device)
    try:
        began = time.perf_counter()
        step = VARIANTS[name][0](config, processes)
        for _ in range(3):
            step(batch)
        wait()
        ready, times = time.perf_counter() - began, []
        for _ in range(4):              # the median of four groups: one slow moment does not count
            began = time.perf_counter()
            for _ in range(math.ceil(steps / 4)):
                step(batch)
            wait()
            times.append((time.perf_counter() - began) / math.ceil(steps / 4))
    except Exception as error:          # a variant that fails is a row of the table too
        return {"name": name, "error": (str(error) or repr(error)).splitlines()[0][:90]}
    seconds = statistics.median(times)
    memory = torch.cuda.max_memory_allocated(device) / 2**30 if cuda else None
    return {"name": name, "rate": config.batch_tokens / seconds, "memory": memory, "start": ready}


def table(config: TrainConfig, processes: Processes, names: list[str], steps: int) -> None:
    shape, peak = PRESETS[config.preset], peak_flops(processes.device)
    per_token = flops_per_token(shape, config.block)
    device = (torch.cuda.get_device_name(processes.device) if peak or
              processes.device.type == "cuda" else f"CPU, {torch.get_num_threads()} threads")
    processes.say(
        f"{config.preset}, {config.micro_batch} x {config.block} tokens on each of "
        f"{processes.world} x {device}, torch {torch.__version__}, "
        f"{'compiled' if config.compile else 'eager'}\n"
        f"| step | tokens/s | beside {names[0]} | {'MFU' if peak else 'TFLOP/s'} | peak GiB | "
        "start s | predicted |\n|---|---:|---:|---:|---:|---:|---|")
    base = None
    for name in names:
        row = measure(name, config, processes, steps)
        if "error" in row:
            processes.say(f"| {name} | failed: {row['error']} | | | | | {VARIANTS[name][1]} |")
            continue
        base = base or (row["rate"] if name == names[0] else math.nan)
        flops = row["rate"] / processes.world * per_token
        processes.say(
            f"| {name} | {row['rate']:,.0f} | {row['rate'] / base:.3f} | "
            + (f"{flops / peak:.1%}" if peak else f"{flops / 1e12:.3f}")
            + f" | {row['memory'] or 0:.1f} | {row['start']:.0f} | {VARIANTS[name][1]} |")


def agree(folder: str, config: TrainConfig, processes: Processes, steps: int = 200) -> None:
    """The same steps on real text in float32, eager, and in bf16, compiled: both losses."""
    corpus, curves = data.Corpus(folder), {}
    loader = data.Loader(corpus, config.block, config.rows, seed=0)
    for precision in ("fp32", "bf16"):
        run = replace(config, precision=precision, compile=config.compile and precision == "bf16")
        shape = PRESETS[config.preset]
        if corpus.tokenizer.n_vocab > shape.vocab_size:
            raise ValueError(f"{folder}: a tokenizer of {corpus.tokenizer.n_vocab} entries is too "
                             f"large for {config.preset}")
        trainer = Trainer(Transformer(shape).to(processes.device), run, processes)
        losses = []
        for step in range(steps):
            batch = torch.from_numpy(loader.batch(step, processes.rank, processes.world))
            trainer.step(batch.to(processes.device), 6e-4 * min(1, (step + 1) / 20))
            losses.append(trainer.total.clone())            # the sum so far
        curves[precision] = torch.stack(losses).diff(prepend=torch.zeros(
            1, device=processes.device)).double().cpu()
        del trainer
    a, b = curves["fp32"], curves["bf16"]
    processes.say("| steps | fp32 | bf16 | relative |\n|---|---:|---:|---:|")
    for i in range(0, steps, 20):
        x, y = a[i:i + 20].mean().item(), b[i:i + 20].mean().item()
        processes.say(f"| {i + 1}-{i + 20} | {x:.4f} | {y:.4f} | {y / x - 1:+.2e} |")
    processes.say(f"largest difference of one step: {(b / a - 1).abs().max():.2e}")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="amd-135m", choices=PRESETS)
    parser.add_argument("--micro-batch", type=int, default=32)
    parser.add_argument("--block", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--device", default="")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--variants", default=STANDARD, metavar="A,B",
                        help=f"default {STANDARD}; all; of {', '.join(VARIANTS)}")
    parser.add_argument("--agree", metavar="DATA", help="compare the losses of fp32 and bf16 over "
                                                        "200 steps on a data set folder instead")
    args = parser.parse_args(argv)
    try:
        names = list(VARIANTS) if args.variants == "all" else args.variants.split(",")
        if args.steps < 1:
            raise ValueError(f"--steps is {args.steps}: expected at least 1")
        if unknown := [name for name in names if name not in VARIANTS]:
            raise ValueError(f"there is no variant {', '.join(unknown)}: expected some of "
                             f"{', '.join(VARIANTS)}")
        processes = Processes(args.device)
        if processes.device.type == "cpu":
            keep_freed_memory()                 # as train.py does; every row profits from it
        config = replace(
            RECIPES["amd-135m"][0], preset=args.preset, block=args.block,
            micro_batch=args.micro_batch, compile=not args.eager,
            batch_tokens=args.micro_batch * args.block * processes.world)
        if args.agree:
            agree(args.agree, config, processes)
        else:
            table(config, processes, names, args.steps)
    except (ValueError, OSError) as error:
        parser.exit(2, f"training.py: error: {error}\n")
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
