"""Claims about the training loop: the same losses however the work is split, and no way to lose it.

    pytest tests/test_train.py        (tests/test_crash.py kills real processes)
"""
import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

import data
import model
import train
from model import ModelConfig, Transformer

ROWS, BLOCK = 8, 16


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small data set `data` and a small untrained checkpoint `init` to train."""
    place = tmp_path_factory.mktemp("train")
    words = "the of model token draft target accept reject cache step loss".split()
    numbers = np.random.default_rng(0).zipf(1.5, 2800) % len(words)
    lines = [" ".join(words[n] for n in row) for row in numbers.reshape(28, 100)]
    (place / "text").mkdir()
    for i, line in enumerate(lines):
        (place / "text" / f"{i}.txt").write_text(line)
    tokenizer = data.train_bpe(lines, 300)
    data.prepare([f"text={place / 'text'}"], tokenizer, place / "data", val_fraction=0.2)
    shape = ModelConfig(vocab_size=tokenizer.n_vocab, hidden_size=16, intermediate_size=32,
                        num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
                        max_position_embeddings=64, bos_token_id=None, eos_token_id=None)
    Transformer(shape).save_pretrained(place / "init")
    tokenizer.save(place / "init")
    return place


def flags(place: Path, out: Path, **changes) -> list[str]:
    """The command line of a small run; `amd-135m-code` is the recipe that starts from --init."""
    values = {"out": out, "name": "m", "data": place / "data", "init": place / "init",
              "block": BLOCK, "batch_tokens": ROWS * BLOCK, "micro_batch": ROWS, "steps": 20,
              "lr": 1e-2, "warmup": 5, "precision": "fp32", "device": "cpu", "log_every": 1,
              "val_every": 10, "val_tokens": 320, "save_every": 100} | changes
    return ["amd-135m-code", *(f"--{name.replace('_', '-')}={value}"
                               for name, value in values.items())]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "m" / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(Transformer.from_pretrained(out / "m").named_parameters())


def assert_same(a: dict, b: dict, claim: str) -> None:
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert a.keys() == b.keys() and not different, f"{claim}: {different} differ"


def refuse(arguments: list, capsys) -> str:
    """The one sentence with which train.py exits 2."""
    with pytest.raises(SystemExit) as stop:
        train.main([str(a) for a in arguments])
    message = capsys.readouterr().err
    assert stop.value.code == 2, f"exit code {stop.value.code}, expected 2: {message}"
    assert message.startswith("train.py: error: ") and message.count("\n") == 1, message
    return message


@pytest.fixture(scope="module")
def straight(place, tmp_path_factory) -> Path:
    """Where an undisturbed run of 20 steps lies."""
    out = tmp_path_factory.mktemp("straight")
    train.main(flags(place, out))
    return out


# ----------------------------------------------------------------------------------- arithmetic

def test_learning_rate_is_the_oracles():
    config = replace(train.AMD, steps=5000)
    for step in (0, 1, 1999, 2000, 2001, 3500, 4999, 5000, 6000):
        ours, theirs = train.learning_rate(step, config), oracle.lr_at(step, 6e-4, 6e-5, 2000, 5000)
        assert math.isclose(ours, theirs, rel_tol=1e-12), f"step {step}: {ours}, oracle {theirs}"


@pytest.mark.parametrize("clip", (0.05, 50.0))
def test_a_step_is_the_oracles_clipping_and_adamw(place, clip):
    config = replace(train.AMD, block=BLOCK, batch_tokens=ROWS * BLOCK, micro_batch=2, clip=clip,
                     precision="fp32")
    net = Transformer.from_pretrained(place / "init")
    batch = torch.from_numpy(data.Loader(data.Corpus(place / "data"), BLOCK, ROWS, 0).batch(0))
    values = [p.detach().double().numpy().copy() for p in net.parameters()]
    moments = [(np.zeros_like(v), np.zeros_like(v)) for v in values]
    trainer = train.Trainer(net, config, train.Processes("cpu"))
    for step in (1, 2, 3):
        twin = Transformer(net.config).double()
        twin.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
        logits = twin(batch[:, :-1])
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten()).backward()
        slopes, norm = oracle.clip_by_global_norm([p.grad.numpy() for p in twin.parameters()], clip)
        assert 0.05 < norm < 50, f"norm {norm}: one clip must be below it, the other above"
        for i, slope in enumerate(slopes):
            values[i], *moments[i] = oracle.adamw_step(
                values[i], slope, *moments[i], step, 1e-3, 0.9, 0.95, 1e-8, 0.1)
        trainer.step(batch, 1e-3)
        clipped = np.concatenate([slope.flatten() for slope in slopes])     # Adam hides its scale
        error = np.linalg.norm(trainer.flat[:-1].numpy() - clipped) / np.linalg.norm(clipped)
        assert error < 1e-4, f"the clipped gradient of step {step} is {error:.1e} off the oracle's"
        for value, (name, p) in zip(values, net.named_parameters()):
            # Adam divides by the gradient's size, so float32's noise in tiny ones shows: 1e-5.
            error = np.abs(value - p.detach().numpy()).max()
            assert error < 1e-5, f"after step {step} {name} is {error:.1e} off the oracle's AdamW"


@pytest.mark.parametrize("chunk", (1, 7, 128, 1000))
def test_chunked_loss_has_the_same_value_and_gradient(place, chunk):
    net = Transformer.from_pretrained(place / "init")
    rows = torch.randint(0, 300, (ROWS, BLOCK + 1), generator=torch.Generator().manual_seed(0))
    found = []
    for size in (0, chunk):
        net.zero_grad()
        loss = train.loss_of(net, rows, size)
        loss.backward()
        found.append((loss.item(), torch.cat([p.grad.flatten() for p in net.parameters()])))
    (plain, slope), (ours, our_slope) = found
    assert math.isclose(plain, ours, rel_tol=1e-6), f"chunked loss {ours}, whole {plain}"
    error = ((slope - our_slope).norm() / slope.norm()).item()
    assert error < 1e-5, f"the chunked loss's gradient is {error:.1e} off"


def test_a_sample_longer_than_a_row_costs_no_checkpoint(place, tmp_path, capsys):
    train.main(flags(place, tmp_path, steps=10, sample="token loss " * BLOCK))
    assert train.read_state(tmp_path / "m")["step"] == 10
    assert "  | " in capsys.readouterr().out, "no sample was shown"


@pytest.mark.slow
def test_compiled_steps_give_the_losses_of_eager_ones(place, tmp_path):
    """Through validations and samples too, whose shapes are others and stay uncompiled."""
    for name in ("eager", "compiled"):
        train.main([*flags(place, tmp_path / name, loss_chunk=40, sample="the", steps=12),
                    "--compile" if name == "compiled" else "--no-compile"])
    for a, b in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert math.isclose(a, b, rel_tol=1e-5), f"compiled {b}, eager {a}"


def test_a_grown_model_is_the_same_function_and_every_block_learns(place):
    small = Transformer.from_pretrained(place / "init")
    large = Transformer(replace(small.config, num_hidden_layers=3))
    train.grow(small, large)
    tokens = torch.arange(30).view(2, 15)
    assert torch.equal(small(tokens), large(tokens)), "growing changed what the model computes"
    train.loss_of(large, tokens).backward()
    still = [i for i, block in enumerate(large.model["layers"])
             if not block.mlp.down_proj.weight.grad.any()]
    assert not still, f"blocks {still} get no gradient: they would never learn"


def test_flops_are_palms_count_and_an_unknown_device_has_no_peak():
    count = train.flops_per_token(model.PRESETS["amd-135m"], 2048)
    assert count == 883_550_208 or round(count / 1e6, 1) == 883.6, f"{count} FLOPs a token"
    assert train.peak_flops(torch.device("cpu")) is None, "a CPU has no peak in the table"


def test_amds_recipe_sees_670_billion_tokens():
    for config, tokens in ((train.AMD, 670e9), (train.AMD_CODE, 21e9)):
        seen = config.steps * config.batch_tokens
        assert 0 <= tokens - seen < config.batch_tokens, f"{config.name} sees {seen} tokens"
    assert train.AMD_CODE.rows == 320, f"{train.AMD_CODE.rows} rows a step: AMD asked for 320"
    for world in (1, 8, 32):
        train.AMD.check_split(world)
    for world in (1, 8, 16):
        train.AMD_CODE.check_split(world)


# ------------------------------------------------------------------------- logs and validation

def test_accumulation_changes_neither_losses_nor_weights(place, straight, tmp_path):
    train.main(flags(place, tmp_path, micro_batch=2))
    error = max(abs(a / b - 1) for a, b in zip(losses(tmp_path), losses(straight), strict=True))
    assert error < 1e-6, f"losses with micro-batches of 2 are {error:.1e} off those of 8"


def test_the_logged_loss_is_the_mean_since_the_last_log(place, straight, tmp_path):
    train.main(flags(place, tmp_path, log_every=4, micro_batch=2))
    means = np.reshape(losses(straight), (-1, 4)).mean(1)
    wanted = [means[line["step"] // 4 - 1] for line in metrics(tmp_path) if line["step"] % 4 == 0
              and line["step"] not in (12,)]       # the validation at 10 logs too: 12 is of 2 steps
    found = [line["loss"] for line in metrics(tmp_path) if line["step"] % 4 == 0
             and line["step"] not in (12,)]
    assert np.allclose(found, wanted, rtol=1e-6), f"logged {found}, means of the steps {wanted}"


def test_validation_is_the_same_for_any_world_size(place):
    net, config = Transformer.from_pretrained(place / "init"), train.TrainConfig(
        data=str(place / "data"), init="x", block=BLOCK, batch_tokens=BLOCK, val_tokens=320)

    class Part:
        device = torch.device("cpu")

        def __init__(self, rank, world, others=0.0):
            self.rank, self.world, self.others = rank, world, others

        def sum(self, tensor):
            self.found = tensor.item()
            return tensor + self.others

    alone = train.Validation(config, Part(0, 1))(net)
    first, second = Part(0, 2), Part(1, 2)
    train.Validation(config, first)(net)
    second.others = first.found
    together = train.Validation(config, second)(net)
    assert math.isclose(alone, together, rel_tol=1e-6), f"{alone} alone, {together} on two"
    idle = train.Validation(config, Part(20, 21))(net)      # there are 20 rows
    assert idle == 0, f"a process without a row adds {idle}"


def test_validation_is_nats_over_the_bytes_of_the_targets(place):
    config = train.TrainConfig(data=str(place / "data"), init="x", block=BLOCK,
                               batch_tokens=BLOCK, val_tokens=320)
    net = Transformer.from_pretrained(place / "init")
    tokens = data.Corpus(place / "data", "val").tokens("text")[:20 * (BLOCK + 1)]
    rows = torch.from_numpy(np.asarray(tokens, np.int64)).view(20, BLOCK + 1)
    log_p = net(rows[:, :-1]).double().log_softmax(-1).gather(2, rows[:, 1:, None]).sum().item()
    tokenizer = data.load_tokenizer(place / "data")
    size = len(tokenizer.decode_bytes([t for t in rows[:, 1:].flatten().tolist()
                                       if t != tokenizer.eos_id]))
    found = train.Validation(config, train.Processes("cpu"))(net)
    assert math.isclose(found, -log_p / math.log(2) / size, rel_tol=1e-6), \
        f"{found} bits per byte, {-log_p / math.log(2) / size} by hand"


# ------------------------------------------------------------------ stopping and going on again

def interrupt_after(monkeypatch, step: int) -> None:
    """This process gets SIGTERM while it works on a step."""
    batch = data.Loader.batch

    def interrupted(self, number, *rest):
        if number == step - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, number, *rest)
    monkeypatch.setattr(data.Loader, "batch", interrupted)


def test_ten_steps_resumed_for_ten_are_bitwise_twenty(place, straight, tmp_path, monkeypatch,
                                                      capsys):
    blocks = data.Loader(data.Corpus(place / "data"), BLOCK, ROWS, 0).blocks_per_epoch
    assert 10 * ROWS < blocks < 20 * ROWS, "the second half must cross an epoch's border"
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        train.main(flags(place, tmp_path))
    printed = capsys.readouterr().out
    assert "--resume" in printed.splitlines()[-1], "SIGTERM must print the command that resumes"
    assert train.read_state(tmp_path / "m")["step"] == 10, "SIGTERM must finish its step and save"
    with open(tmp_path / "m" / "metrics.jsonl", "a") as file:     # as if killed after the save
        file.write('{"step": 11, "loss": 99}\n{"step": 12, "lo')
    train.main([*flags(place, tmp_path), "--resume"])
    assert_same(weights(straight), weights(tmp_path), "10 + resume + 10 steps are not 20 steps")
    assert losses(straight) == losses(tmp_path), "metrics.jsonl is not that of an undisturbed run"
    old, new = (train.read_state(out / "m")["optimizer"]["state"] for out in (straight, tmp_path))
    for i in old:
        assert_same(old[i], new[i], f"AdamW's state of parameter {i} after a resume")


def test_resume_refuses_other_hyper_parameters_but_not_another_micro_batch(place, tmp_path, capsys,
                                                                           monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        train.main(flags(place, tmp_path))
    message = refuse([*flags(place, tmp_path, lr=0.5), "--resume"], capsys)
    assert "lr 0.01" in message and "0.5" in message, message
    train.main([*flags(place, tmp_path, micro_batch=4), "--resume"])
    assert train.read_state(tmp_path / "m")["step"] == 20


def test_a_new_run_sets_an_old_checkpoint_aside(place, tmp_path):
    for _ in range(2):
        train.main(flags(place, tmp_path, steps=1))
    assert_same(weights(tmp_path), dict(Transformer.from_pretrained(
        tmp_path / "m.1").named_parameters()), "the run's two folders")


def test_after_a_bad_gradient_nothing_is_updated_and_the_step_is_named(place, tmp_path, capsys,
                                                                       monkeypatch):
    with monkeypatch.context() as patch:
        interrupt_after(patch, 6)
        train.main(flags(place, tmp_path / "good"))
    plain, calls = train.loss_of, []

    def poisoned(*step):
        calls.append(1)
        return plain(*step) * (math.nan if len(calls) == 7 else 1)
    monkeypatch.setattr(train, "loss_of", poisoned)
    message = refuse(flags(place, tmp_path, log_every=10), capsys)
    assert "step 7 " in message, f"the bad step is 7: {message}"
    assert len(calls) == 10, f"found after {len(calls)} steps: the host must look at logs only"
    assert train.read_state(tmp_path / "m")["step"] == 6, "the checkpoint is not the last good step"
    assert_same(weights(tmp_path / "good"), weights(tmp_path), "weights after a bad step")


class Crash(BaseException):
    """Stands for kill -9: nothing in the code may catch it."""


def test_a_crash_at_any_system_call_of_a_save_leaves_one_whole_checkpoint(place, tmp_path,
                                                                          monkeypatch):
    config = replace(train.AMD, name="m", out=str(tmp_path))
    tokenizer = data.load_tokenizer(place / "data")
    net = Transformer.from_pretrained(place / "init")
    optimizer = torch.optim.AdamW(net.parameters())

    def save(step: int) -> None:
        with torch.no_grad():
            for p in net.parameters():
                p.fill_(step)
                optimizer.state[p] = {"step": torch.tensor(float(step))}
        train.save(config, step, net, optimizer, tokenizer)

    def crash_in_call(number: int):
        """The number-th call that touches the disk never returns."""
        calls = iter(range(10**6))
        patch = pytest.MonkeyPatch()
        for owner, name in ((os, "replace"), (os, "fsync"), (os, "symlink"), (os, "mkdir"),
                            (os, "unlink"), (os, "rmdir"), (torch, "save")):
            def counted(*args, real=getattr(owner, name), **kwargs):
                if next(calls) == number:
                    raise Crash
                return real(*args, **kwargs)
            patch.setattr(owner, name, counted)
        return patch

    save(1)
    reported, number = 1, 0
    while True:
        patch = crash_in_call(number)
        try:
            save(reported + 1)
            break
        except Crash:
            pass
        finally:
            patch.undo()
        state = train.read_state(tmp_path / "m")
        found = {p.flatten()[0].item() for p in weights(tmp_path).values()}
        data.load_tokenizer(tmp_path / "m")
        assert found == {state["step"]}, \
            f"crash at call {number}: weights of {found}, optimizer of {state['step']}"
        assert state["step"] >= reported, f"crash at call {number}: step {state['step']} is older"
        save(reported + 2)              # and saving goes on from whatever was left
        reported, number = reported + 2, number + 1
        assert train.read_state(tmp_path / "m")["step"] == reported
    assert number > 10, f"a save touched the disk only {number} times: does it sync at all?"


def test_a_full_disk_keeps_the_checkpoint_before(place, tmp_path, monkeypatch, capsys):
    real = torch.save

    def full(content, file, *rest):
        if content["step"] == 10:
            raise OSError(28, "No space left on device")
        real(content, file, *rest)
    monkeypatch.setattr(torch, "save", full)
    message = refuse(flags(place, tmp_path, save_every=5), capsys)
    assert "step 10" in message and "step 5 is kept" in message and "space" in message, message
    assert train.read_state(tmp_path / "m")["step"] == 5
    assert weights(tmp_path), "the kept checkpoint must load"


# -------------------------------------------------------------------------------- user's mistakes

@pytest.mark.parametrize("arguments, part", [
    (["--leraning-rate", "1"], "unrecognized arguments"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "0"], "--steps is 0"),
    (["--lr", "nan"], "--lr is nan"),
    (["--clip", "0"], "--clip is 0.0: expected a positive number"),
    (["amd-135m", "--data", "{here}"], "{here} holds no finished data set"),
    (["llama-9"], "no recipe 'llama-9'"),
    (["amd-135m", "--preset", "gpt-5"], "no preset 'gpt-5'"),
    (["amd-135m"], "--data is missing"),
    (["amd-135m", "--data", "nowhere"], "nowhere holds no finished data set"),
    (["amd-135m", "--device", "abacus"], "device 'abacus' is not there"),
    (["amd-135m", "--batch-tokens", "100"], "100 is no multiple of --block 2048"),
    (["amd-135m", "--precision", "int3"], "--precision is 'int3'"),
    (["demo", "--name", "one"], "into one folder"),
])
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, part, tmp_path, capsys):
    message = refuse([*arguments, "--out", tmp_path / "out"], capsys)
    assert part in message, message
    assert not (tmp_path / "out").exists(), "a refused run wrote something"


@pytest.mark.parametrize("changes, part", [
    ({"micro_batch": 3}, "8 rows a step"),
    ({"init": "/nowhere"}, "/nowhere/config.json is missing"),
    ({"block": 4096, "batch_tokens": 4096, "micro_batch": 1}, "one block of 4097"),
    ({"block": 128, "batch_tokens": 1024}, "longer than the model's context"),
    ({"mix": "poems"}, "no source poems"),
    ({"mix": "text=much"}, "--mix is 'text=much'"),
    ({"preset": "amd-135m"}, "cannot grow"),
])
def test_a_mistake_in_a_run_is_one_sentence(place, changes, part, tmp_path, capsys):
    message = refuse(flags(place, tmp_path / "out", **changes), capsys)
    assert part in message, message
    assert not (tmp_path / "out").exists(), "a refused run wrote something"


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(place, tmp_path, capsys):
    Transformer(replace(model.read_config(place / "init" / "config.json"), vocab_size=280)
                ).save_pretrained(tmp_path / "small")
    data.load_tokenizer(place / "init").save(tmp_path / "small")
    message = refuse(flags(place, tmp_path / "out", init=tmp_path / "small"), capsys)
    assert "300 entries" in message and "280" in message, message


def test_resume_without_a_checkpoint_is_refused(place, tmp_path, capsys):
    assert "no run to resume" in refuse([*flags(place, tmp_path / "out"), "--resume"], capsys)


def test_out_of_memory_names_the_flag_to_lower(place, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(train, "loss_of", full)
    assert "lower --micro-batch" in refuse(flags(place, tmp_path), capsys)
