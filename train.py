"""The training loop: pretrain, fine-tune, grow, resume, on one process or on many.

Where it stands: data.py has made a folder of tokens; this script turns it into a checkpoint folder
that evaluate.py scores and speculative.py decodes with. A *recipe* is a list of stages, a *stage*
is one run of the loop with one `TrainConfig`. Without a flag, `python train.py` trains the demo's
pair on the Python that runs it, first on general text, then on code, as AMD-135M was.

One step: the loader names the rows of the global batch, each process takes its share in
micro-batches and adds up gradients, one all-reduce sums them over the processes, the sum is clipped
and AdamW applies it. The host reads nothing from the device until the next log: between logs a
GPU never waits.

Letters: B rows of a micro-batch, T tokens of a row, C width, V vocabulary, L layers.

    python train.py                                             # the demo, 3 minutes on two cores
    python train.py amd-135m --data out/pretrain --compile      # AMD-135M's recipe, on one GPU
    torchrun --nproc-per-node 8 train.py amd-135m --data out/pretrain --compile

References: Loshchilov & Hutter 2019 (AdamW); 2017 (cosine); Pascanu et al. 2013 (clipping); Gong et
al. 2019 (progressive stacking); Chowdhery et al. 2022, appendix B (MFU); AMD-135M's published code.
"""
import argparse
import ctypes
import dataclasses
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import data
import speculative
from model import PRESETS, ModelConfig, Transformer, resolve_device, write_atomically


# ---------------------------------------------------------------------------------- configuration

def option(default, help: str, fixed: bool = True):
    """A field of TrainConfig. fixed: a resumed run must have the same value."""
    return field(default=default, metadata={"help": help, "fixed": fixed})


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. Each field is a flag of the command line: --micro-batch and so on."""
    name: str = option("model", "the checkpoint's folder is OUT/NAME")
    out: str = option("out", "folder for everything that is written", fixed=False)
    data: str = option("", "data set folder made by data.py prepare", fixed=False)
    mix: str = option("", "sources to train on, by size (a,b) or by weight (a=0.98,b=0.02); "
                          "default: all by size")
    preset: str = option("", f"the model's shape: {', '.join(PRESETS)}; default: that of --init")
    init: str = option("", "checkpoint folder whose weights to start from, grown to --preset's "
                           "depth; default: random weights", fixed=False)
    block: int = option(2048, "tokens T of a row")
    batch_tokens: int = option(2048 * 1024, "tokens of a step, over all processes")
    micro_batch: int = option(32, "rows B that a process handles at once", fixed=False)
    steps: int = option(1000, "optimizer steps")
    lr: float = option(6e-4, "highest learning rate")
    min_lr: float = option(6e-5, "learning rate at the end of the cosine")
    warmup: int = option(2000, "steps until the highest learning rate")
    weight_decay: float = option(0.1, "AdamW's, on every parameter as AMD has it")
    beta1: float = option(0.9, "AdamW's memory of the gradient")
    beta2: float = option(0.95, "AdamW's memory of the squared gradient")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the weights and of the order of the data")
    precision: str = option("auto", "bf16 (autocast), fp32, or auto: bf16 where the device has it")
    compile: bool = option(False, "torch.compile the forward and backward pass", fixed=False)
    loss_chunk: int = option(0, "tokens whose logits exist at a time; 0: all of them", fixed=False)
    device: str = option("", "cuda or cpu; default: the best there is", fixed=False)
    log_every: int = option(10, "steps between log lines", fixed=False)
    val_every: int = option(500, "steps between validations", fixed=False)
    val_tokens: int = option(2**19, "held-out tokens of a validation", fixed=False)
    save_every: int = option(500, "steps between checkpoints", fixed=False)
    sample: str = option("", "prompt to complete at each validation", fixed=False)

    def __post_init__(self):
        for f in dataclasses.fields(self):
            value, zero = getattr(self, f.name), f.name in (
                "lr", "min_lr", "warmup", "weight_decay", "beta1", "beta2", "seed", "loss_chunk")
            if f.type in (int, float) and not (0 < value < math.inf or zero and value == 0):
                raise ValueError(f"--{f.name.replace('_', '-')} is {value}: expected "
                                 f"{'zero or ' * zero}a positive number")
        if self.preset and self.preset not in PRESETS:
            raise ValueError(f"there is no preset {self.preset!r}: expected one of "
                             f"{', '.join(PRESETS)}")
        if not (self.preset or self.init):
            raise ValueError("neither --preset nor --init: choose a shape or a checkpoint")
        if self.precision not in ("auto", "bf16", "fp32"):
            raise ValueError(f"--precision is {self.precision!r}: expected auto, bf16 or fp32")
        if self.batch_tokens % self.block:
            raise ValueError(f"--batch-tokens {self.batch_tokens} is no multiple of --block "
                             f"{self.block}: a step takes whole rows")

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        return self.batch_tokens // self.block

    @property
    def folder(self) -> Path:
        return Path(self.out) / self.name

    def check_split(self, world: int) -> None:
        if self.rows % (self.micro_batch * world):
            raise ValueError(
                f"{self.rows} rows a step (--batch-tokens {self.batch_tokens} / --block "
                f"{self.block}) do not divide into {world} process(es) x --micro-batch "
                f"{self.micro_batch}: choose numbers that do; nothing is rounded")


AMD = TrainConfig(              # TrainConfig's defaults are AMD-135M's; what is left is its length
    name="amd-135m", preset="amd-135m", steps=670_000_000_000 // (1024 * 2048))
AMD_CODE = TrainConfig(         # 320 rows, as AMD asked for (its own division made them 256)
    name="amd-135m-code", init="{out}/amd-135m", lr=3e-4, min_lr=3e-5, batch_tokens=320 * 2048,
    micro_batch=20, steps=21_000_000_000 // (320 * 2048))
# The demo's numbers were found by sweeps. What mattered: rows of 128 tokens rather than 256 (more
# different text in a batch; the longer context still works); a target grown from the draft that
# already knows code, not from the general one (better, and agreeing more); and the target's
# learning rate, which trades what it gains over the draft against how often the two agree.
DEMO = TrainConfig(
    data="{out}/data-demo", preset="demo-draft", block=128, batch_tokens=2048, micro_batch=16,
    warmup=20, lr=3e-3, min_lr=3e-4, log_every=25, val_every=100, val_tokens=2**14, save_every=100)
GROWN = replace(DEMO, preset="demo-target", lr=4e-4, min_lr=4e-5)

RECIPES = {
    "demo": (
        replace(DEMO, name="demo-draft-base", mix="general", steps=200),
        replace(DEMO, name="demo-draft", mix="code", steps=800, sample="def ",
                init="{out}/demo-draft-base"),
        replace(GROWN, name="demo-target-base", mix="general", steps=40, lr=3e-4,
                init="{out}/demo-draft"),
        replace(GROWN, name="demo-target", mix="code", steps=320, sample="def ",
                init="{out}/demo-target-base")),
    "amd-135m": (AMD,),
    "amd-135m-code": (AMD_CODE,),
}


# ------------------------------------------------------------------------------ pieces of the step

def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear from 0, then half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts)."""
    if step < config.warmup:
        return config.lr * step / config.warmup
    done = (step - config.warmup) / max(config.steps - config.warmup, 1)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * min(done, 1))) / 2


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    """Cross-entropy of the logits that `head` makes of hidden (N, C), against targets (N,).
    Flattened: on transposed logits (B, V, T) it is sixty times slower."""
    return F.cross_entropy(head(hidden).float(), targets, reduction=reduction)


def loss_of(model: Transformer, rows: Tensor, chunk: int = 0,
            part: Callable = head_loss) -> Tensor:
    """Mean cross-entropy of rows (B, T + 1): each token is predicted from those before it.

    The logits are the largest tensor of a step (V = 32000 floats a token, C = 768). With `chunk`
    only that many tokens have theirs at a time: the backward pass makes them again.
    """
    hidden, targets = model.hidden(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()   # (B T, C)
    if not chunk:
        return part(model.lm_head, hidden, targets) / len(targets)
    parts = zip(hidden.split(chunk), targets.split(chunk))
    return sum(checkpoint(part, model.lm_head, h, t, use_reentrant=False)
               for h, t in parts) / len(targets)


def arithmetic(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 matrix products over float32 weights. On a CPU they are up to four times faster where
    there are instructions for it, and slower without."""
    cuda = device.type == "cuda"
    has_bf16 = (torch.cuda.is_bf16_supported(including_emulation=False) if cuda
                else torch.cpu._is_avx512_bf16_supported())
    wanted = config.precision == "bf16" or config.precision == "auto" and has_bf16
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted)


# Dense bf16 peaks in TFLOP/s, by a part of the device's name; the first that fits counts. MI250:
# of one device, which is half a package. A device that is not here gets no MFU rather than a wrong
# one.
PEAKS = {"MI250": 181, "MI300X": 1307, "MI325X": 1307, "A100": 312, "H100 PCIe": 756,
         "H100 NVL": 835, "H100": 989, "H200": 989, "L40S": 362, "L4": 121}


def peak_flops(device: torch.device) -> float | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((1e12 * peak for part, peak in PEAKS.items() if part in name), None)


def flops_per_token(config: ModelConfig, block: int) -> int:
    """PaLM's count: 6 for each parameter in a matrix product, 12 L C T for attention."""
    return 6 * config.matmul_parameters + 12 * config.num_hidden_layers * config.hidden_size * block


# ---------------------------------------------------------------------------------- the processes

class Processes:
    """This process among those that torchrun started (or alone), and its device.

    There is no DistributedDataParallel: it would hide the one line that matters, and it has a
    flag to clear before each micro-batch but the last, which is easily set too late.
    """

    def __init__(self, device: str):
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.device = resolve_device(device or None)
        if self.device.type == "cuda":
            if self.device.index is None:
                self.device = resolve_device(f"cuda:{os.environ.get('LOCAL_RANK', 0)}")
            torch.cuda.set_device(self.device)
        if self.world > 1 and not dist.is_initialized():
            # gloo carries what lies on the host, even between GPUs.
            dist.init_process_group("cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo")

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.world > 1:
            dist.all_reduce(tensor)
        return tensor

    def any(self, flag: bool) -> bool:
        return bool(self.sum(torch.tensor(float(flag))))

    def say(self, text: str) -> None:
        if self.rank == 0:
            print(text, flush=True)


@contextmanager
def interruptions() -> Iterator[list]:
    """A list that SIGTERM and Ctrl-C append to, so that the loop can finish its step and save."""
    received = []
    old = {number: signal.signal(number, lambda *_: received.append(1))
           for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


# -------------------------------------------------------------------------------- checkpoints

def save(config: TrainConfig, step: int, model: Transformer, optimizer: torch.optim.Optimizer,
         tokenizer: data.Tokenizer) -> None:
    """Write a checkpoint so that a crash at any moment leaves the old one or the new, whole.

    Renaming makes one file atomic; a checkpoint is several, and weights of one step with the
    optimizer of another would be worse than none. So there are two slots, folders a and b. The
    new checkpoint fills the one not in use, is synced to the disk, and is then switched to by
    renaming one symbolic link, `current`. The names that users read, such as model.safetensors,
    are links through `current` and never change. (Folders themselves can't be exchanged portably.)
    """
    folder, current = config.folder, config.folder / "current"
    slot = folder / ("b" if points_to(current, "a") else "a")
    try:
        shutil.rmtree(slot, ignore_errors=True)
        slot.mkdir(parents=True)
        model.save_pretrained(slot)
        tokenizer.save(slot)
        cuda = model.device.type == "cuda"
        with open(slot / "training_state.pt", "wb") as file:
            torch.save({"step": step, "config": dataclasses.asdict(config),
                        "optimizer": optimizer.state_dict(),
                        # Nothing draws random numbers after the start today; dropout would.
                        "rng": torch.get_rng_state(),
                        "cuda_rng": torch.cuda.get_rng_state() if cuda else None}, file)
            file.flush()
            os.fsync(file.fileno())
        sync_folder(slot)
        for path in slot.iterdir():
            switch(folder / path.name, f"current/{path.name}")
        switch(current, slot.name)
    except (OSError, RuntimeError, ValueError) as error:    # torch.save makes some a RuntimeError
        if not points_to(current, slot.name):               # else it is the checkpoint already
            shutil.rmtree(slot, ignore_errors=True)
        kept = (f"the checkpoint of step {read_state(folder)['step']} is kept"
                if current.exists() else "there is none before it")
        raise ValueError(f"could not save step {step} in {folder} ({error}): {kept}; free some "
                         "space and --resume") from None


def points_to(link: Path, target: str) -> bool:
    return link.is_symlink() and os.readlink(link) == target


def switch(link: Path, target: str) -> None:
    """Point a symbolic link to target, in one rename."""
    if not points_to(link, target):
        temporary = link.with_name(link.name + ".tmp")
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
        sync_folder(link.parent)


def sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def read_state(folder: Path) -> dict:
    """training_state.pt of a checkpoint: what training alone needs."""
    path = folder / "current" / "training_state.pt"
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path} is missing: there is no run to resume; leave --resume out") \
            from None
    except Exception as error:
        raise ValueError(f"{path} is damaged ({str(error).splitlines()[0]}): start anew") from None


def set_aside(folder: Path) -> None:
    """A new run never overwrites a checkpoint: the old folder gets another name."""
    if (folder / "current").exists():
        number = next(i for i in range(1, 10**6) if not Path(f"{folder}.{i}").exists())
        folder.rename(f"{folder}.{number}")
        print(f"{folder} held a checkpoint: it is {folder}.{number} now (--resume would continue)")


# ------------------------------------------------------------------------------ model and data

def build(config: TrainConfig, tokenizer: data.Tokenizer) -> Transformer:
    """The model to start from: of random weights, or of --init's, grown to the preset's depth."""
    if config.init:
        source = Transformer.from_pretrained(config.init, dtype=torch.float32)
        if data.load_tokenizer(config.init).sha256 != tokenizer.sha256:
            raise ValueError(f"{config.data} was made with another tokenizer than {config.init}: "
                             "prepare the data with the checkpoint's")
    shape = PRESETS[config.preset] if config.preset else source.config
    if tokenizer.n_vocab > shape.vocab_size:
        raise ValueError(f"the tokenizer of {config.data} has {tokenizer.n_vocab} entries, the "
                         f"model {shape.vocab_size}: choose a tokenizer or a preset that fits")
    shape = replace(shape, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    if config.block > shape.max_position_embeddings:
        raise ValueError(f"--block {config.block} is longer than the model's context of "
                         f"{shape.max_position_embeddings}: shorten it")
    model = Transformer(shape, config.seed)
    if config.init:
        grow(source, model)
    return model


@torch.no_grad()
def grow(small: Transformer, large: Transformer) -> None:
    """Start `large` as the same function as `small`, in more blocks (progressive stacking).

    A block whose two output projections are zero adds nothing to the residual stream. It learns
    from there, much faster than a deep model does from scratch, and what it learns is a
    correction: the two models go on agreeing about most tokens, which makes `small` a good draft.
    """
    layers = small.config.num_hidden_layers
    have = replace(small.config, num_hidden_layers=large.config.num_hidden_layers,
                   bos_token_id=large.config.bos_token_id, eos_token_id=large.config.eos_token_id)
    if have != large.config or layers > large.config.num_hidden_layers:
        raise ValueError(f"--init is a {small.config} and cannot grow to a {large.config}: they "
                         "may differ only in the number of layers, which cannot shrink")
    large.load_state_dict(small.state_dict(), strict=False)
    for block in large.model["layers"][layers:]:
        block.self_attn.o_proj.weight.zero_()
        block.mlp.down_proj.weight.zero_()


def open_corpus(config: TrainConfig, split: str) -> data.Corpus:
    """--mix "a,b" takes sources by their sizes, "a=0.9,b=0.1" by weights."""
    if not config.data:
        raise ValueError("--data is missing: name a folder made by python data.py prepare")
    if "=" not in config.mix:
        return data.Corpus(config.data, split, config.mix.split(",") if config.mix else None)
    try:
        mix = {name: float(weight) for name, weight in
               (part.split("=") for part in config.mix.split(","))}
    except ValueError:
        raise ValueError(f"--mix is {config.mix!r}: expected a,b or a=0.9,b=0.1") from None
    return data.Corpus(config.data, split, mix=mix)


class Validation:
    """Bits per byte over a fixed set of held-out rows, the same for any batch or world size."""

    def __init__(self, config: TrainConfig, processes: Processes):
        corpus = open_corpus(config, "val")
        # An equal part from each source, from its beginning.
        count = max(1, config.val_tokens // config.block // len(corpus.sources))
        rows = np.concatenate([corpus.blocks(name, config.block)[:count]
                               for name in corpus.sources]).astype(np.int64)        # (N, T + 1)
        if not len(rows):
            raise ValueError(f"the held-out part of {config.data} has no row of {config.block + 1} "
                             "tokens: add text, or choose a shorter --block")
        self.bytes = int(corpus.tokenizer.byte_lengths[rows[:, 1:]].sum())
        self.rows = torch.from_numpy(rows[processes.rank::processes.world])
        self.processes = processes

    @torch.no_grad()
    def __call__(self, model: Transformer) -> float:
        nats = torch.zeros((), dtype=torch.float64, device=model.device)
        size = max(1, 4096 // self.rows.shape[1])
        for i in range(0, len(self.rows), size):        # no rows: more processes than rows
            rows = self.rows[i:i + size].to(model.device)
            hidden, targets = model.hidden(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()
            nats += head_loss(model.lm_head, hidden, targets, "none").double().sum()
        return self.processes.sum(nats).item() / math.log(2) / self.bytes


# ------------------------------------------------------------------------------------ the loop

class Trainer:
    """A model with its optimizer, and the step that moves it."""

    def __init__(self, model: Transformer, config: TrainConfig, processes: Processes):
        self.model, self.config, self.processes = model, config, processes
        # AMD decays every parameter, norms and embeddings too.
        self.optimizer = torch.optim.AdamW(
            model.parameters(), betas=(config.beta1, config.beta2),
            weight_decay=config.weight_decay, fused=True)
        # All gradients lie in one vector, with the loss as its last element: one all-reduce
        # carries them, one norm measures them, one product clips them.
        parameters = list(model.parameters())
        sizes = [p.numel() for p in parameters]
        self.flat = torch.zeros(sum(sizes) + 1, device=model.device)
        for p, view in zip(parameters, self.flat[:-1].split(sizes)):
            p.grad = view.view_as(p)
        # A loss or gradient that is not finite sets `bad` for good. AdamW leaves weights and
        # moments alone where `found_inf` is 1 (so GradScaler skips a step): from the first bad
        # step on nothing changes, and `good` has counted the steps before. The host need not look.
        self.bad, self.good, self.total = torch.zeros(3, device=model.device).unbind()
        self.optimizer.found_inf = self.bad
        self.head_loss = head_loss
        if config.compile:
            # Three parts. As one with the blocks, `enter`'s cosines would be computed anew for each
            # element that they turn, which takes 6% of a step on an H100.
            model.enter, model.blocks = torch.compile(model.enter), torch.compile(model.blocks)
            self.head_loss = torch.compile(head_loss)

    def step(self, batch: Tensor, lr: float) -> None:
        """One update from this process's rows (its share of the batch, T + 1)."""
        config, processes, flat = self.config, self.processes, self.flat
        parts = len(batch) // config.micro_batch * processes.world
        flat.zero_()
        for rows in batch.split(config.micro_batch):
            with arithmetic(config, batch.device):
                loss = loss_of(self.model, rows, config.loss_chunk, self.head_loss) / parts
            loss.backward()
            flat[-1] += loss.detach()
        processes.sum(flat)             # once, after the last micro-batch
        self.norm = flat[:-1].norm()
        flat[:-1] *= (config.clip / (self.norm + 1e-6)).clamp(max=1)
        self.bad.copy_(self.bad.maximum((~(self.norm + flat[-1]).isfinite()).float()))
        self.optimizer.param_groups[0]["lr"] = lr
        self.optimizer.step()
        self.good += 1 - self.bad
        self.total += flat[-1]

    def read(self) -> tuple[int, float, float]:
        """Good steps so far, sum of the losses since the last call, norm of the last gradient.
        This is where the host waits for the device."""
        good, total, norm = torch.stack((self.good, self.total, self.norm)).tolist()
        self.total.zero_()
        return int(good), total, norm


def start(config: TrainConfig, processes: Processes, corpus: data.Corpus,
          resume: bool) -> tuple[Trainer, int]:
    """A Trainer and the number of its steps already done."""
    folder = config.folder
    if resume:
        state = read_state(folder)
        for f in dataclasses.fields(config):
            old, new = state["config"][f.name], getattr(config, f.name)
            if f.metadata["fixed"] and old != new:
                raise ValueError(f"{folder} was trained with {f.name} {old!r}, not {new!r}: "
                                 "resume with the flags that it was started with")
        model = Transformer.from_pretrained(folder / "current")
    else:
        state, model = {"step": 0}, build(config, corpus.tokenizer)
    trainer = Trainer(model.to(processes.device), config, processes)
    if resume:
        trainer.optimizer.load_state_dict(state["optimizer"])
        torch.set_rng_state(state["rng"])
        if processes.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"])
    processes.any(False)                # --init may be this folder: by now all have read it
    if processes.rank == 0:
        if not resume:
            set_aside(folder)
        folder.mkdir(parents=True, exist_ok=True)
        truncate_metrics(folder / "metrics.jsonl", state["step"])
    return trainer, state["step"]


def train(config: TrainConfig, processes: Processes, resume: bool, command: str) -> bool:
    """One stage, to its end (True) or to an interruption (False); its checkpoint is saved."""
    device, world, folder = processes.device, processes.world, config.folder
    config.check_split(world)
    corpus = open_corpus(config, "train")
    loader = data.Loader(corpus, config.block, config.rows, config.seed)
    validation = Validation(config, processes)
    trainer, first = start(config, processes, corpus, resume)
    model = trainer.model
    per_token, peak = flops_per_token(model.config, config.block), peak_flops(device)
    processes.say(f"{folder}: {(len(trainer.flat) - 1) / 1e6:.1f} M parameters, step {first} to "
                  f"{config.steps} of {config.batch_tokens} tokens, on {world} x {device}")

    def save_at(step: int) -> None:
        if processes.rank == 0:
            save(config, step, model, trainer.optimizer, corpus.tokenizer)
            processes.say(f"saved step {step} in {folder}")
        processes.any(False)            # no process goes on, or leaves, before it is there

    logged, since = first, time.perf_counter()
    with interruptions() as received:
        for step in range(first, config.steps):
            batch = torch.from_numpy(loader.batch(step, processes.rank, world))
            if device.type == "cuda":
                batch = batch.pin_memory().to(device, non_blocking=True)
            trainer.step(batch, learning_rate(step, config))

            done = step + 1
            finished, interrupted = done == config.steps, processes.any(bool(received))
            validate = finished or done % config.val_every == 0
            saving = finished or interrupted or done % config.save_every == 0
            if not (validate or saving or done % config.log_every == 0):
                continue
            good, total, norm = trainer.read()
            if good < done - first:
                save_at(first + good)
                raise ValueError(f"the loss or the gradient of step {first + good + 1} is not "
                                 f"finite: {folder} holds the step before; look at the data, or "
                                 "start anew with a lower --lr")
            rate = (done - logged) * config.batch_tokens / (time.perf_counter() - since)
            line = {"step": done, "tokens": done * config.batch_tokens,
                    "loss": total / (done - logged), "lr": learning_rate(step, config),
                    "grad_norm": norm, "tokens_per_s": rate,
                    "tflops": rate * per_token / world / 1e12}
            if peak:
                line["mfu"] = rate * per_token / world / peak
            if validate:
                with arithmetic(config, device), model.uncompiled():
                    line["val_bits_per_byte"] = validation(model)
            if processes.rank == 0:
                report(line, config)
            if saving:
                save_at(done)
            if validate and config.sample and processes.rank == 0:
                show_sample(model, corpus.tokenizer, config)
            if interrupted:
                processes.say(f"interrupted; to go on: {command}")
                return False
            logged, since = done, time.perf_counter()
    return True


def report(line: dict, config: TrainConfig) -> None:
    """A line for the reader, with the time that is left, and one for metrics.jsonl."""
    left = (config.steps - line["step"]) * config.batch_tokens / line["tokens_per_s"]
    speed = f"MFU {line['mfu']:.1%}" if "mfu" in line else f"{line['tflops']:.3g} TFLOP/s"
    text = (f"step {line['step']:>6}/{config.steps}  loss {line['loss']:.4f}  "
            f"norm {line['grad_norm']:.2f}  {line['tokens_per_s']:,.0f} tokens/s  {speed}  "
            f"{int(left) // 60}:{int(left) % 60:02} left")
    if "val_bits_per_byte" in line:
        text += f"  held out: {line['val_bits_per_byte']:.4f} bits/byte"
    print(text, flush=True)
    with open(config.folder / "metrics.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`: a resumed run writes them again (a kill may have cut one)."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    write_atomically(path, [line for line in lines
                            if line.endswith(b"\n") and json.loads(line)["step"] <= step])


def show_sample(model: Transformer, tokenizer: data.Tokenizer, config: TrainConfig) -> None:
    prompt = tokenizer.encode(config.sample)[-(config.block // 2):]         # leaves room to go on
    with model.uncompiled():
        new = speculative.complete(model, [prompt], min(48, config.block - len(prompt)),
                                   temperature=0.8, seed=config.seed)[0]
    print("  | " + tokenizer.decode(prompt + new).replace("\n", "\n  | "), flush=True)


# --------------------------------------------------------------------------------- command line

def prepare_demo(folder: Path) -> None:
    """The Python that runs this script, as general text and code, by a tokenizer of its own."""
    if not (folder / "manifest.json").exists():
        print(f"{folder}: learning a tokenizer of 4096 entries from this Python's library",
              flush=True)
        if not (folder / "tokenizer.tiktoken").exists():
            data.train_bpe(data.texts(["general", "code"]), 4096).save(folder)
        data.prepare(["general", "code"], data.load_tokenizer(folder), folder)


def keep_freed_memory() -> None:
    """Have glibc keep what is freed. It returns large tensors to the system at once, and the pages
    it then asks for again, zeroed one by one, were a third of a step on a CPU."""
    try:
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**30)
        ctypes.CDLL(None).mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    except (OSError, AttributeError, TypeError):        # another C library: no harm
        pass


def run(recipe: str, overrides: dict, resume: bool, command: str) -> None:
    if recipe not in RECIPES:
        raise ValueError(f"there is no recipe {recipe!r}: expected {', '.join(RECIPES)}")
    stages = [replace(stage, **overrides) for stage in RECIPES[recipe]]
    stages = [replace(s, data=s.data.replace("{out}", s.out),
                      init=s.init.replace("{out}", s.out)) for s in stages]
    if len({stage.folder for stage in stages}) < len(stages):
        raise ValueError(f"--name would put the {len(stages)} stages of {recipe} into one folder: "
                         "choose another --out instead")
    processes = Processes(stages[0].device)
    if processes.device.type == "cpu":
        keep_freed_memory()
    if recipe == "demo" and "data" not in overrides:
        if processes.rank == 0:
            prepare_demo(Path(stages[0].data))
        processes.any(False)                # the others wait for it
    for number, stage in enumerate(stages, 1):
        if len(stages) > 1:
            processes.say(f"\nstage {number} of {len(stages)}: {stage.name}, on {stage.mix} text")
        begun = resume and (stage.folder / "current").exists()
        if begun and len(stages) > 1 and read_state(stage.folder)["step"] == stage.steps:
            processes.say(f"{stage.folder} is finished")
        elif not train(stage, processes, begun or resume and len(stages) == 1, command):
            return


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(
        description="Train a model by a recipe; flags override each of its stages.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")
    parser.add_argument("recipe", nargs="?", default="demo", help=", ".join(RECIPES))
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    for f in dataclasses.fields(TrainConfig):
        how = {"action": argparse.BooleanOptionalAction} if f.type is bool else {"type": f.type}
        parser.add_argument("--" + f.name.replace("_", "-"), default=argparse.SUPPRESS,
                            help=f.metadata["help"] + f" ({f.default})" * (f.default != ""), **how)
    given = vars(parser.parse_args(argv))
    recipe, resume = given.pop("recipe"), given.pop("resume")
    launcher = (f"torchrun --nproc-per-node {os.environ['LOCAL_WORLD_SIZE']}"
                if "LOCAL_WORLD_SIZE" in os.environ else "python")
    command = f"{launcher} {shlex.join([sys.argv[0], *(a for a in argv if a != '--resume')])}"
    try:
        run(recipe, given, resume, command + " --resume")
    except (ValueError, OSError) as error:
        parser.exit(2, f"train.py: error: {error}\n")
    except RuntimeError as error:           # a GPU's own class is one; a CPU has none
        if not (isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error)):
            raise
        parser.exit(2, "train.py: error: the device is out of memory: lower --micro-batch (the "
                       "batch of a step stays the same), or set --loss-chunk 4096\n")
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
