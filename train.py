"""The training loop: pretrain, fine-tune, grow, resume, on one process or on many.

Where it stands: data.py has made a folder of tokens; this script turns it into a checkpoint folder
that evaluate.py scores and speculative.py decodes with. A *recipe* is a list of stages, a *stage*
is one run of the loop with one `TrainConfig`. Without a flag, `python train.py` trains the demo's
pair on the Python that runs it: a draft on general text and then on code, as AMD-135M was, and a
target that is grown from it.

Letters: R processes (WORLD in the code; RANK is this one's number), M micro-batches of each in a
step, B rows of a micro-batch, T tokens of a row, C width, V vocabulary. So a step has R M B rows.

    python train.py                                             # the demo
    python train.py amd-135m --data out/pretrain --compile      # AMD-135M's recipe, on one GPU
    torchrun --nproc-per-node 8 train.py amd-135m --data out/pretrain --compile

References: Loshchilov & Hutter 2019 (AdamW); 2017 (cosine); Pascanu et al. 2013 (clipping); Gong et
al. 2019 (progressive stacking); AMD-135M's published code.
"""
import argparse
import io
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, fields, replace
from hashlib import sha256
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

import data
import speculative
from model import PRESETS, Transformer, load_checkpoint, reading, resolve_device, save_checkpoint


# ---------------------------------------------------------------------------------- configuration

def require(condition, problem: str) -> None:
    if not condition:
        raise ValueError(problem)


def option(default, help: str):
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class TrainConfig:
    """One stage of training. Each field is a flag of the command line: --micro-batch and so on.

    The defaults are AMD-135M's pretraining: 670 billion tokens, in steps of 1024 rows.
    """
    name: str = option("model", "the checkpoints are OUT/NAME/step-000320 and so on")
    out: str = option("out", "folder for everything that is written")
    data: str = option("out/data", "data set folder made by data.py prepare")
    mix: str = option("", "sources to train on (a,b), mixed by their sizes; default: all")
    preset: str = option("", "the model's shape; default: that of --init")
    init: str = option("", "checkpoint whose weights to start from, grown to --preset's depth")
    freeze: int = option(0, "first layers that stay as they are, with the embedding and the head")
    block: int = option(2048, "tokens T of a row")
    batch_tokens: int = option(2048 * 1024, "tokens of a step, over all processes")
    micro_batch: int = option(32, "rows B that a process handles at once")
    steps: int = option(670_000_000_000 // (1024 * 2048), "optimizer steps")
    lr: float = option(6e-4, "highest learning rate")
    min_lr: float = option(6e-5, "learning rate at the end of the cosine")
    warmup: int = option(2000, "steps until the highest learning rate")
    weight_decay: float = option(0.1, "AdamW's, on every parameter as AMD has it")
    clip: float = option(1.0, "largest norm of the gradient")
    seed: int = option(0, "of the weights and of the order of the data")
    precision: str = option("auto", "bf16 (autocast), fp32, or auto: bf16 where the device has it")
    compile: bool = option(False, "torch.compile the forward and backward pass")
    device: str = option("", "cuda or cpu; default: the best there is")
    log_every: int = option(10, "steps between log lines")
    val_every: int = option(500, "steps between validations")
    val_tokens: int = option(2**19, "held-out tokens of a validation")
    save_every: int = option(500, "steps between checkpoints")
    sample: str = option("", "prompt to complete at each validation")

    def __post_init__(self):
        for f in fields(self):
            value, zero = getattr(self, f.name), f.type is float or f.name in "freeze warmup seed"
            require(f.type in (str, bool) or 0 < value < math.inf or zero and value == 0,
                    f"--{f.name.replace('_', '-')} is {value}: expected {'>=' if zero else '>'} 0")
        require(self.lr >= self.min_lr, f"--lr {self.lr} is below --min-lr {self.min_lr}: set both")
        require(self.warmup <= self.steps, f"--warmup {self.warmup} exceeds --steps {self.steps}")
        require(self.batch_tokens % self.block == 0,
                f"--batch-tokens {self.batch_tokens} is no multiple of --block {self.block}")

    @property
    def rows(self) -> int:
        """Rows of a step, over all processes."""
        return self.batch_tokens // self.block


# In the names of files, {out} becomes the value of --out when the recipe is run.
AMD = TrainConfig(name="amd-135m", preset="amd-135m")
# 320 rows a step, the number in AMD's script (which then divided it over GPUs and rounded it down
# to 256).
AMD_CODE = TrainConfig(name="amd-135m-code", init="{out}/amd-135m", batch_tokens=320 * 2048,
                       micro_batch=20, steps=21_000_000_000 // (320 * 2048), lr=3e-4, min_lr=3e-5)
# The demo's numbers were found by sweeps. What mattered: rows of 128 tokens rather than 256 (more
# different text in a batch; the longer context still works); a vocabulary of 2048, as the head is
# most of a small draft; and a target that keeps its draft's weights and trains only the layers that
# it adds. In 100 steps, it gained 2.5 times as much on its draft as one that trained all of its
# layers (0.0117 beside 0.0046 bits per byte), and it agrees with its draft more often.
DEMO = TrainConfig(name="demo-draft", init="{out}/demo-draft-base", data="{out}/data-demo",
                   mix="code", preset="demo-draft", block=128, batch_tokens=2048, micro_batch=16,
                   steps=600, warmup=20, lr=3e-3, min_lr=3e-4, log_every=25, val_every=100,
                   val_tokens=2**14, save_every=100, sample="def ")
RECIPES = {"demo": (        # general text, code, and a deeper model that starts from the draft
    replace(DEMO, name="demo-draft-base", init="", mix="general", sample="", steps=100), DEMO,
    replace(DEMO, name="demo-target", init="{out}/demo-draft", preset="demo-target", steps=100,
            freeze=1, lr=1e-3, min_lr=1e-4)),
    "amd-135m": (AMD,), "amd-135m-code": (AMD_CODE,)}


# --------------------------------------------------------------------------- the parts of a step

def learning_rate(step: int, config: TrainConfig) -> float:
    """Linear from 0, then half a cosine (Loshchilov & Hutter 2017, eq. 5, without restarts). `step`
    is the number of steps made before, so that the first one has a rate of 0, as AMD's has.

        min_lr + (lr - min_lr) (1 + cos(pi t)) / 2,    t = (step - warmup) / (steps - warmup)

    AMD-135M's: 0 at step 0, 3e-4 at 1000, 6e-4 at 2000, 3.3e-4 half-way to the end, 6e-5 there.
    """
    if step < config.warmup:
        return config.lr * step / config.warmup
    t = (step - config.warmup) / (config.steps - config.warmup)
    return config.min_lr + (config.lr - config.min_lr) * (1 + math.cos(math.pi * t)) / 2


def head_loss(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """sum -log softmax(W h)[target], the cross-entropy of hidden (N, C) against targets (N,)."""
    # N = B T. On logits with an axis for each, (B, V, T), it is sixty times slower.
    return nn.functional.cross_entropy(head(hidden).float(), targets, reduction="sum")


def loss_of(model: Transformer, rows: Tensor, head_loss=head_loss) -> Tensor:
    """Mean cross-entropy of rows (B, T + 1): each token is predicted from those before it.
    A compiled form of head_loss may be passed in its place."""
    hidden, targets = model.hidden(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten()   # (B T, C)
    return head_loss(model.lm_head, hidden, targets) / len(targets)


def flat_gradient(model: Transformer) -> Tensor:
    """One vector for the gradients of all parameters, and a last element for the loss.

    Each parameter's .grad is a view of its part, so that backward() adds to the vector. One
    all-reduce carries it, one norm measures it, and one product clips it. It is set to 0 as a
    whole: optimizer.zero_grad() would drop the views.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    sizes = [p.numel() for p in parameters]
    gradient = torch.zeros(sum(sizes) + 1, device=model.device)
    for p, view in zip(parameters, gradient[:-1].split(sizes)):
        p.grad = view.view_as(p)
    return gradient


def clip(gradient: Tensor, limit: float) -> Tensor:
    """g <- g min(1, limit / |g|), in place (Pascanu et al. 2013, algorithm 1). Returns |g|."""
    norm = gradient.norm()              # 1e-6, as in PyTorch, for a gradient of zeros
    gradient *= (limit / (norm + 1e-6)).clamp(max=1)
    return norm


def adamw(model: nn.Module, config: TrainConfig) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019, algorithm 2). At step t, for a weight w with gradient g:

        m = beta1 m + (1 - beta1) g            v = beta2 v + (1 - beta2) g^2
        w = w - lr ( m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + eps) + weight_decay w )

    with beta1 = 0.9, beta2 = 0.95 and eps = 1e-8. tests/oracle.py has it in NumPy. AMD decays every
    parameter, norms and embeddings too.
    """
    return torch.optim.AdamW(model.parameters(), betas=(0.9, 0.95), fused=True,
                             weight_decay=config.weight_decay)


# ------------------------------------------------------------------------------------ the loop

# The loop uses a few things that are written out in the second half of this file:
#   run                    one stage: its config, device, model, optimizer and loader of rows;
#                          run.first is the step of the checkpoint that it continues, or 0
#   run.batch(step)        this process's rows of a step, a pure function of its number
#   run.log, run.save      a line in metrics.jsonl; a checkpoint folder
#   autocast(...)          within it, matrix products are in bf16 where the device is fast at that
#   all_reduce(tensor)     the sum over all processes, in place; with one process, nothing
#   interruptions()        a list of the signals (Ctrl-C is number 2) that arrive from now on

def train(run: "Run") -> int:
    """Train to the last step, or to a signal: its number is returned, else 0.

    R processes make M micro-batches each. The batch's gradient is the mean of theirs,
    1 / (R M) sum_r sum_m g_rm: backward() makes the inner sum, the all-reduce the outer one.
    """
    config, model, optimizer = run.config, run.model, run.optimizer
    gradient = flat_gradient(model)
    with interruptions() as received:
        for step in range(run.first + 1, config.steps + 1):
            batch = run.batch(step)                                             # (M B, T + 1)
            gradient.zero_()
            for rows in batch.split(config.micro_batch):
                with autocast(config, run.device):
                    # B / (R M B) = 1 / (R M), so that the sum over all is the mean of the step.
                    loss = loss_of(model, rows, run.head_loss) * config.micro_batch / config.rows
                loss.backward()
                gradient[-1] += loss.detach()
            all_reduce(gradient)                        # once, after the last micro-batch
            norm = clip(gradient[:-1], config.clip)
            optimizer.param_groups[0]["lr"] = learning_rate(step - 1, config)
            optimizer.step()
            run.losses += gradient[-1]                  # on the device: read at the next log alone

            # A signal that any process has received stops all of them, after the same step.
            stop = int(all_reduce(torch.tensor(max(received, default=0)), dist.ReduceOp.MAX))
            validating = step % config.val_every == 0 or step == config.steps
            saving = step % config.save_every == 0 or step == config.steps or stop
            if validating or saving or step == run.first + 1 or step % config.log_every == 0:
                run.log(step, norm, validating)         # ValueError if the norm is not finite
                if saving:
                    run.save(step)
                if validating and config.sample:
                    run.show_sample()
                run.since = time.perf_counter()         # the rate is that of training alone
            if stop:
                return stop
    return 0


@torch.no_grad()
def validate(run: "Run") -> float:
    """Bits per byte of held-out text: sum -log2 p(token) / bytes of the tokens. 0: there is none.

    Unlike the loss, it can be compared between tokenizers. The rows are as many from each source,
    and the same ones for any batch and any number of processes.
    """
    config, corpus = run.config, data.Corpus(run.config.data, "val", run.corpus.sources)
    count = max(1, config.val_tokens // config.block // len(corpus.sources))
    rows = torch.cat([torch.from_numpy(corpus.blocks(source, config.block)[:count].astype("int64"))
                      for source in corpus.sources])                            # (N, T + 1)
    parts = rows[RANK::WORLD].split(4096 // config.block or 1)  # few tokens: logits take memory
    with autocast(config, run.device), eager(config):
        nats = sum(loss_of(run.model, part.to(run.device)).item() * part[:, 1:].numel()
                   for part in parts if len(part))      # with more processes than rows, some have 0
    size = int(corpus.tokenizer.byte_lengths[rows[:, 1:]].sum())
    return all_reduce(torch.tensor(nats, dtype=torch.double)).item() / math.log(2) / max(size, 1)


def grow(small: Transformer, large: Transformer) -> None:
    """Start `large` as the same function as `small`, in more layers (progressive stacking).

    A layer whose two output projections are zero adds nothing to the residual stream. It learns
    from there, much faster than a deep model does from scratch. With --freeze, what it learns is a
    correction alone: the models go on agreeing about most tokens, so that `small` drafts well.
    """
    shape, layers = vars(small.config), small.config.num_hidden_layers
    different = {name for name, value in vars(large.config).items() if shape[name] != value}
    require(different <= {"num_hidden_layers", "bos_token_id", "eos_token_id"}
            and layers <= large.config.num_hidden_layers,
            f"--init cannot grow to --preset: they differ in {', '.join(sorted(different))}")
    large.load_state_dict(small.state_dict(), strict=False)     # all but the layers that it adds
    for layer in large.model["layers"][layers:]:
        layer.self_attn.o_proj.weight.data.zero_()
        layer.mlp.down_proj.weight.data.zero_()


# ======================= From here on: what makes it practical. You can stop reading. =============

def build(config: TrainConfig, tokenizer: data.Tokenizer) -> Transformer:
    """The model to start from: of random weights, or of --init's, grown to the preset's depth."""
    small = config.init and load_checkpoint(config.init, dtype=torch.float32)
    shape = PRESETS[config.preset] if config.preset else small.config
    require(not small or data.load_tokenizer(config.init).sha256 == tokenizer.sha256,
            f"{config.data} was not made with the tokenizer of {config.init}: make it with that")
    require(tokenizer.n_vocab <= shape.vocab_size,
            f"{config.data} has {tokenizer.n_vocab} different tokens, the model {shape.vocab_size}")
    require(config.block <= shape.max_position_embeddings,
            f"--block {config.block} exceeds the model's context, {shape.max_position_embeddings}")
    shape = replace(shape, bos_token_id=tokenizer.bos_id, eos_token_id=tokenizer.eos_id)
    model = Transformer(shape, config.seed)
    if small:
        grow(small, model)
    return model


class Run:
    """One stage while it runs: its data, model and optimizer, its log and its checkpoints."""

    def __init__(self, config: TrainConfig, device: torch.device, resume: bool):
        """What can be refused is refused here, before anything is written."""
        self.config, self.device, self.head_loss = config, device, head_loss
        require(config.rows % (config.micro_batch * WORLD) == 0,
                f"{WORLD} x --micro-batch {config.micro_batch} does not divide {config.rows} rows")
        self.corpus = data.Corpus(config.data, "train", config.mix and config.mix.split(","))
        self.loader = data.Loader(self.corpus, config.block, config.rows, config.seed)
        self.folder = Path(config.out, config.name)
        state = self.read_state() if resume else {"step": 0}
        self.model = model = (load_checkpoint(self.folder) if resume else
                              build(config, self.corpus.tokenizer)).to(device)
        model.requires_grad_(not config.freeze)
        model.model.layers[config.freeze:].requires_grad_(True)
        self.optimizer = adamw(model, config)
        if resume:
            self.optimizer.load_state_dict(state["optimizer"])
        if config.compile:
            # RoPE's angles stay outside: in one graph with them, each kernel computes them again.
            model.run_layers, self.head_loss = map(torch.compile, (model.run_layers, head_loss))
        self.first = self.logged = state["step"]            # steps that were made, and logged
        self.losses = torch.zeros((), device=device)        # their sum since the last log

    def batch(self, step: int) -> Tensor:
        """This process's rows of a step (the first is 1), (B M, T + 1), on its device."""
        rows = torch.from_numpy(self.loader.batch(step - 1, RANK, WORLD))
        # From pinned memory the copy does not wait for the steps before.
        rows = rows.pin_memory() if self.device.type == "cuda" else rows
        return rows.to(self.device, non_blocking=True)

    def log(self, step: int, norm: Tensor, validating: bool) -> None:
        """A line for the reader and one in metrics.jsonl: means of the steps since the last one."""
        config, steps = self.config, step - self.logged
        loss, norm = torch.stack((self.losses, norm)).tolist()      # here the host waits
        require(math.isfinite(loss + norm), f"NaN or inf in a step from {self.logged + 1} to {step}"
                f": {data.checkpoint_folder(self.folder)} is good; look at the data, or lower --lr")
        entry = {"step": step, "tokens": step * config.batch_tokens, "loss": loss / steps,
                 "grad_norm": norm, "lr": learning_rate(step - 1, config)}
        if step > self.first + 1:                           # the first step of a run compiles
            seconds = (time.perf_counter() - self.since) / steps
            entry["tokens_per_s"] = round(config.batch_tokens / seconds)
            entry["minutes_left"] = round((config.steps - step) * seconds / 60, 1)
        if validating and (bits := validate(self)):
            entry["val_bits_per_byte"] = bits
        say("  ".join(f"{name} {value:.6g}" for name, value in entry.items()))
        if RANK == 0:
            with open(self.folder / "metrics.jsonl", "a") as file:
                file.write(json.dumps(entry) + "\n")
        self.losses, self.logged = torch.zeros_like(self.losses), step

    def cut_log(self) -> None:
        """End metrics.jsonl with the checkpoint's step: those after it will be made again."""
        number = step = 0
        with open(self.folder / "metrics.jsonl", "a+b") as file:
            file.seek(0)
            try:
                while step < self.first and (line := file.readline()):
                    number, step = number + 1, int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):
                raise ValueError(f"line {number + 1} of {file.name} is damaged: mend it, or move "
                                 "the file away, which nothing but plots needs") from None
            file.truncate()

    def show_sample(self) -> None:
        tokenizer, config = self.corpus.tokenizer, self.config
        prompt = tokenizer.prompt(config.sample)[-(config.block // 2):]         # leaves room
        with eager(config):
            new = speculative.complete(self.model, [prompt], 48, temperature=0.8)[0]
        say("  | " + tokenizer.decode(prompt + new).replace("\n", "\n  | "))

    def identity(self) -> dict:
        """What a resumed run must find as it was: the tokenizer, flags, the amount of data, and of
        each source a hash of its first million tokens."""
        may_change = ("out data init micro_batch compile device log_every val_every val_tokens "
                      "save_every sample").split()
        text = b"".join(self.corpus.tokens[name][:2**20] for name in self.corpus.sources)
        fixed = {name: x for name, x in vars(self.config).items() if name not in may_change}
        return fixed | {"the tokenizer": self.corpus.tokenizer.sha256[:12], "the text":
                        sha256(text).hexdigest()[:12], "the blocks": self.loader.blocks_per_epoch}

    def read_state(self) -> dict:
        """training_state.pt of the newest checkpoint, of a run with the same identity."""
        path = data.checkpoint_folder(self.folder) / "training_state.pt"
        require(path.exists(), f"{path} is missing: there is no run to resume; leave --resume out")
        with reading(path):
            state = torch.load(path, map_location="cpu", weights_only=True)
        for name, value in self.identity().items():
            old = state["identity"].get(name)
            require(value == old, f"{name} is {value}, not {old} as in {path.parent}: use that")
        return state

    def save(self, step: int) -> None:
        """Write OUT/NAME/step-000320 so that a crash at any moment leaves whole checkpoints alone.

        The folder is filled and synced to the disk as step-000320.partial and then renamed, which
        is one operation: a folder with a whole name is always complete. The newest two are kept.
        """
        if RANK == 0:
            folder = self.folder / f"step-{step:06}"
            partial, file = Path(f"{folder}.partial"), io.BytesIO()
            for leftover in folder.parent.glob("*.partial"):
                shutil.rmtree(leftover)
            save_checkpoint(self.model, partial)
            self.corpus.tokenizer.save(partial)
            # No random state: nothing draws random numbers after the start.
            torch.save({"step": step, "identity": self.identity(),
                        "optimizer": self.optimizer.state_dict()}, file)
            data.write_whole(partial / "training_state.pt", [file.getbuffer()])
            partial.rename(folder)
            with suppress(OSError):         # some file systems cannot sync a folder
                handle = os.open(folder.parent, os.O_RDONLY)
                os.fsync(handle)
                os.close(handle)
            complete = folder.parent.glob("step-*[0-9]")
            for path in sorted(complete, key=lambda path: (len(path.name), path.name))[:-2]:
                shutil.rmtree(path, ignore_errors=True)
            say(f"saved step {step} in {folder}")
        barrier()                           # none goes on, or leaves, before it is there


# ---------------------------------------------------------------------- devices and processes

def autocast(config: TrainConfig, device: torch.device) -> torch.autocast:
    """bf16 matrix products over float32 weights. On a CPU they are up to four times faster where
    there are instructions for it (AVX-512), and slower without."""
    has_bf16 = (torch.cpu._is_avx512_bf16_supported() if device.type == "cpu" else
                torch.cuda.is_bf16_supported(including_emulation=False))
    bf16 = config.precision == "bf16" or config.precision == "auto" and has_bf16
    return torch.autocast(device.type, torch.bfloat16, enabled=bf16)


def eager(config: TrainConfig):
    """Within it, compiled parts run as they are written: for shapes not worth compiling for."""
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


# This process among those that torchrun started; without it, it is alone.
RANK, WORLD = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def open_device(name: str) -> torch.device:
    """This process's device, connected with those of the others."""
    if torch.cuda.is_available():       # before anything lies on the first GPU
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    device = resolve_device(name or None)
    if WORLD > 1:
        # gloo carries what lies on the host, even between GPUs.
        dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    return device


def all_reduce(tensor: Tensor, operation=dist.ReduceOp.SUM) -> Tensor:
    """The sum (or another operation) over all processes, in place. There is no
    DistributedDataParallel: it would hide this one line, and it has a flag to clear before each
    micro-batch but the last, which is easily set too late."""
    if WORLD > 1:
        dist.all_reduce(tensor, operation)
    return tensor


def barrier() -> None:
    """No process goes on before all have come here."""
    all_reduce(torch.zeros(1))


@contextmanager
def interruptions():
    """A list of the signals that arrive, so that the loop can finish its step and save. The same
    one again ends the process at once."""
    received = []

    def note(number: int, _) -> None:
        received.append(number)
        if "LOCAL_WORLD_SIZE" not in os.environ:    # torchrun repeats what the terminal has sent
            signal.signal(number, signal.SIG_DFL)
    # SIGHUP, SIGINT (Ctrl-C) and SIGTERM; nohup has the first ignored, and so it stays.
    old = {number: signal.signal(number, note) for number in (1, 2, 15)
           if signal.getsignal(number) != signal.SIG_IGN}
    try:
        yield received
    finally:
        for item in old.items():
            signal.signal(*item)


# --------------------------------------------------------------------------------- command line

def say(text: str) -> None:
    """Print on the first process. When nobody reads any more (a closed pipe, a terminal that is
    gone), training goes on."""
    try:
        if RANK == 0:
            print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def prepare_demo(path: Path) -> None:
    """The Python that runs this script, as general text and code, by a tokenizer of its own."""
    if not (path / "manifest.json").exists():
        say(f"{path}: learning a tokenizer from this Python's library")
        data.train_bpe(data.texts(["general", "code"]), PRESETS[DEMO.preset].vocab_size).save(path)
        data.prepare(["general", "code"], data.load_tokenizer(path), path)


def run_stage(config: TrainConfig, device: torch.device, resume: bool) -> int:
    run = Run(config, device, resume)
    barrier()                               # --init may be this folder: by now all have read it
    with data.claim(run.folder) if RANK == 0 else nullcontext():
        if RANK == 0:
            if data.checkpoint_folder(run.folder) != run.folder and not resume:
                aside = run.folder.rename(f"{run.folder}.{time.strftime('%Y-%m-%d-%H-%M-%S')}")
                say(f"the run in {run.folder} is in {aside} now (--resume would have gone on)")
            run.folder.mkdir(exist_ok=True)
            run.cut_log()
        say(f"{run.folder}: {sum(p.numel() for p in run.model.parameters()) / 1e6:.1f} M "
            f"parameters, step {run.first} of {config.steps}, on {WORLD} x {device.type}")
        return train(run)


def run_recipe(recipe: str, resume: bool, **flags) -> int:
    """Each stage in turn; returns the number of the signal that stopped one, or 0."""
    stages = [replace(stage, **flags) for stage in RECIPES[recipe]]
    require(len(stages) == 1 or "name" not in flags, "--name would name each stage: use --out")
    stages = [replace(s, data=s.data.replace("{out}", s.out),
                      init=s.init.replace("{out}", s.out)) for s in stages]
    device = open_device(stages[0].device)
    if recipe == "demo" and "data" not in flags and RANK == 0:
        prepare_demo(Path(stages[0].data))
    barrier()
    for stage in stages:
        begun = len(stages) == 1 or any(Path(stage.out, stage.name).glob("step-*[0-9]"))
        if stop := run_stage(stage, device, resume and begun):
            return stop
    return 0


# For errors of PyTorch whose cause a user can change, by a part of their text.
ADVICE = {"ried to allocate": "out of memory: lower --micro-batch (the batch stays the same)",
          " compiler": "--compile needs a C++ compiler: install g++, or leave --compile out",
          "does not require grad": "--freeze leaves no layer to train: lower it",
          "onnection": "another process has ended: it has printed why"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Train by a recipe; flags override its stages'.")
    parser.error = lambda message: parser.exit(2, f"train.py: error: {message}\n")
    parser.add_argument("recipe", nargs="?", default="demo", choices=RECIPES)
    parser.add_argument("--resume", action="store_true", help="continue from the last checkpoint")
    choices = {"preset": PRESETS, "precision": ("auto", "bf16", "fp32")}
    for f in fields(TrainConfig):
        how = ({"action": "store_true"} if f.type is bool else
               {"type": f.type, "choices": choices.get(f.name)})
        parser.add_argument(f"--{f.name.replace('_', '-')}", default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} ({f.default})", **how)
    sys.stdout.reconfigure(errors="replace")        # what a terminal cannot print becomes "?"
    try:
        if stop := run_recipe(**vars(parser.parse_args(argv))):
            launcher = ", with the same torchrun options:" if WORLD > 1 else ": python"
            say(f"interrupted; to go on{launcher} {shlex.join(sys.argv)} --resume")
            sys.exit(128 + stop)                # as a shell reports a process that a signal ended
    except KeyboardInterrupt:
        parser.exit(130, "train.py: interrupted before the first step\n")
    except (ValueError, OSError) as error:
        parser.error(error)
    except RuntimeError as error:
        for part, advice in ADVICE.items():
            if part in str(error):
                parser.error(advice)
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    main()
