"""Claims about the training loop: the same losses however the work is split, and no way to lose it.

    pytest tests/test_train.py        (tests/test_crash.py kills real processes)
"""
import importlib.util
import json
import math
import os
import shlex
import shutil
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch

import data
import model
import train
from model import ModelConfig, Transformer, load_checkpoint, save_checkpoint

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
    save_checkpoint(Transformer(shape), place / "init")
    tokenizer.save(place / "init")
    return place


def flags(place: Path, out: Path, **changes) -> list[str]:
    """The command line of a small run; `amd-135m-code` is the recipe that starts from --init."""
    values = {"out": out, "name": "m", "data": place / "data", "init": place / "init",
              "block": BLOCK, "batch_tokens": ROWS * BLOCK, "micro_batch": ROWS, "steps": 20,
              "lr": 1e-2, "min_lr": 1e-3, "warmup": 5, "precision": "fp32", "device": "cpu",
              "log_every": 1, "val_every": 10, "val_tokens": 320, "save_every": 100} | changes
    return ["amd-135m-code", *(f"--{name.replace('_', '-')}={value}"
                               for name, value in values.items())]


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "m" / "metrics.jsonl").read_text().splitlines()]


def losses(out: Path) -> list[float]:
    return [line["loss"] for line in metrics(out)]


def weights(out: Path) -> dict[str, torch.Tensor]:
    return dict(load_checkpoint(out / "m").named_parameters())


def state(out: Path) -> dict:
    path = data.checkpoint_folder(out / "m") / "training_state.pt"
    return torch.load(path, weights_only=True)


def run(arguments: list[str] | None, code: int) -> None:
    with pytest.raises(SystemExit) as stop:
        train.main(arguments)
    assert stop.value.code == code, f"exit code {stop.value.code}, expected {code}"


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
    for step in (0, 1, 1999, 2000, 2001, 3500, 4999, 5000):
        ours, theirs = train.learning_rate(step, config), oracle.lr_at(step, 6e-4, 6e-5, 2000, 5000)
        assert math.isclose(ours, theirs, rel_tol=1e-12), f"step {step}: {ours}, oracle {theirs}"


@pytest.mark.parametrize("limit", (0.05, 50.0))
def test_clipping_is_the_oracles(limit):
    gradient = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (wanted,), norm = oracle.clip_by_global_norm([gradient.numpy().copy()], limit)
    found = train.clip(gradient, limit)
    assert math.isclose(found, norm, rel_tol=1e-12), f"norm {found}, oracle {norm}"
    error = np.abs(gradient.numpy() - wanted).max()
    assert error < 1e-12, f"the clipped gradient is {error:.1e} off the oracle's"


@pytest.mark.parametrize("limit", (0.05, 50.0))
def test_steps_are_the_oracles_clipping_and_adamw(place, tmp_path, limit):
    """The whole loop, in micro-batches of 2, beside NumPy in float64 that shares only gradients."""
    train.main(flags(place, tmp_path, steps=3, lr=1e-3, min_lr=1e-4, warmup=0, micro_batch=2,
                     clip=limit))
    twin = load_checkpoint(place / "init").double()
    loader = data.Loader(data.Corpus(place / "data"), BLOCK, ROWS, 0)
    moments = [(np.zeros(p.shape), np.zeros(p.shape)) for p in twin.parameters()]
    for step, line in enumerate(metrics(tmp_path), 1):
        batch = torch.from_numpy(loader.batch(step - 1))
        twin.zero_grad()
        logits = twin(batch[:, :-1]).flatten(0, 1)
        torch.nn.functional.cross_entropy(logits, batch[:, 1:].flatten()).backward()
        slopes = [p.grad.numpy() for p in twin.parameters()]
        slopes, norm = oracle.clip_by_global_norm(slopes, limit)
        assert 0.05 < norm < 50, f"norm {norm}: one limit must be below it, the other above"
        assert math.isclose(line["grad_norm"], norm, rel_tol=1e-4), \
            f"step {step}: norm {line['grad_norm']}, oracle {norm}"
        for i, (p, slope) in enumerate(zip(twin.parameters(), slopes)):
            value, *moments[i] = oracle.adamw_step(
                p.detach().numpy(), slope, *moments[i], step,
                oracle.lr_at(step - 1, 1e-3, 1e-4, 0, 3), 0.9, 0.95, 1e-8, 0.1)
            p.data = torch.from_numpy(value)
    for name, value in weights(tmp_path).items():
        # Adam divides by the gradient's size, so float32's noise in tiny ones shows: 1e-5.
        error = (value - twin.get_parameter(name)).abs().max().item()
        assert error < 1e-5, f"after three steps {name} is {error:.1e} off the oracle's AdamW"


def test_a_sample_longer_than_a_row_costs_no_checkpoint(place, tmp_path, capsys):
    train.main(flags(place, tmp_path, steps=10, sample="token loss " * BLOCK))
    assert state(tmp_path)["step"] == 10
    assert "  | " in capsys.readouterr().out, "no sample was shown"


@pytest.mark.slow
def test_compiled_steps_give_the_losses_of_eager_ones(place, tmp_path):
    """Through validations and samples too, whose shapes are others and stay uncompiled."""
    for name in ("eager", "compiled"):
        train.main([*flags(place, tmp_path / name, sample="the", steps=12),
                    *(["--compile"] if name == "compiled" else [])])
    for a, b in zip(losses(tmp_path / "eager"), losses(tmp_path / "compiled"), strict=True):
        assert math.isclose(a, b, rel_tol=1e-5), f"compiled {b}, eager {a}"


def test_a_grown_model_is_the_same_function_and_every_layer_learns(place):
    small = load_checkpoint(place / "init")
    large = Transformer(replace(small.config, num_hidden_layers=3))
    train.grow(small, large)
    tokens = torch.arange(30).view(2, 15)
    assert torch.equal(small(tokens), large(tokens)), "growing changed what the model computes"
    train.loss_of(large, tokens).backward()
    still = [i for i, layer in enumerate(large.model["layers"])
             if not layer.mlp.down_proj.weight.grad.any()]
    assert not still, f"layers {still} get no gradient: they would never learn"


def test_flops_are_palms_count_and_an_unknown_device_has_no_peak():
    path = Path(train.__file__).parent / "benchmarks" / "training.py"
    spec = importlib.util.spec_from_file_location("benchmark", path)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    count = benchmark.flops_per_token(model.PRESETS["amd-135m"], 2048)
    assert round(count / 1e6, 1) == 883.6, f"{count} FLOPs a token"
    assert benchmark.peak_flops(torch.device("cpu")) is None, "a CPU has no peak in the table"


def test_amds_recipe_sees_670_billion_tokens():
    for config, tokens in ((train.AMD, 670e9), (train.AMD_CODE, 21e9)):
        seen = config.steps * config.batch_tokens
        assert 0 <= tokens - seen < config.batch_tokens, f"{config.name} sees {seen} tokens"
    assert train.AMD_CODE.rows == 320, f"{train.AMD_CODE.rows} rows a step: AMD asked for 320"
    for config, worlds in ((train.AMD, (1, 8, 32)), (train.AMD_CODE, (1, 8, 16))):
        for world in worlds:
            assert config.rows % (config.micro_batch * world) == 0, f"{config.name} on {world}"


def test_frozen_layers_stay_and_the_others_learn_also_after_a_resume(place, tmp_path, monkeypatch):
    """A target that is grown from its draft: the draft's weights are in it bit by bit."""
    small = load_checkpoint(place / "init")
    monkeypatch.setitem(train.PRESETS, "deep", replace(small.config, num_hidden_layers=3))
    grown = {"preset": "deep", "freeze": 1}
    train.main(flags(place, tmp_path / "straight", **grown))
    with monkeypatch.context() as patch:
        interrupt_after(patch, 10)
        run(flags(place, tmp_path / "cut", **grown), 128 + signal.SIGTERM)
    train.main([*flags(place, tmp_path / "cut", **grown), "--resume"])
    trained = weights(tmp_path / "straight")
    assert_same(trained, weights(tmp_path / "cut"), "10 + resume + 10 steps are not 20 steps")
    for name, value in small.named_parameters():
        assert torch.equal(trained[name], value), f"{name} is frozen and has changed"
    still = [name for name in trained if name.startswith(("model.layers.1", "model.layers.2"))
             and (trained[name] == 0).all() or trained[name].isnan().any()]
    assert not still, f"{still} did not learn"


# ------------------------------------------------------------------------- logs and validation

def test_accumulation_changes_neither_losses_nor_weights(place, straight, tmp_path):
    train.main(flags(place, tmp_path, micro_batch=2))
    error = max(abs(a / b - 1) for a, b in zip(losses(tmp_path), losses(straight), strict=True))
    assert error < 1e-6, f"losses with micro-batches of 2 are {error:.1e} off those of 8"


def test_metrics_count_the_tokens_of_all_steps(straight):
    """benchmarks/plot.py draws the curves against them."""
    assert [row["tokens"] for row in metrics(straight)] == [
        row["step"] * ROWS * BLOCK for row in metrics(straight)]


def test_the_logged_loss_is_the_mean_since_the_last_log(place, straight, tmp_path):
    train.main(flags(place, tmp_path, log_every=4, micro_batch=2))
    each, before = losses(straight), 0
    for line in metrics(tmp_path):      # 1, 4, 8, 10 (a validation), 12, 16, 20
        wanted = np.mean(each[before:line["step"]])
        assert math.isclose(line["loss"], wanted, rel_tol=1e-6), \
            f"{line['loss']} at step {line['step']}, mean since step {before}: {wanted}"
        before = line["step"]


def test_the_first_steps_compilation_is_not_in_the_rate(place, tmp_path, monkeypatch):
    real, calls = train.loss_of, []

    def slow(*arguments):
        calls.append(1)
        time.sleep(1.0 if len(calls) == 1 else 0.02)
        return real(*arguments)
    monkeypatch.setattr(train, "loss_of", slow)
    train.main(flags(place, tmp_path, steps=4, warmup=0, log_every=100))
    first, last = metrics(tmp_path)
    assert first["step"] == 1 and "tokens_per_s" not in first, "the first step compiles"
    # Three steps follow: with the first one's second, they would be less than three a second.
    assert last["tokens_per_s"] > 4 * ROWS * BLOCK, "the rate counts the first step's time"


@pytest.fixture(scope="module")
def validation(place) -> train.Run:
    """A run whose 20 held-out rows are its validation."""
    config = train.TrainConfig(data=str(place / "data"), init=str(place / "init"), block=BLOCK,
                               batch_tokens=BLOCK, micro_batch=1, val_tokens=320, warmup=0)
    return train.Run(config, torch.device("cpu"), False)


def test_validation_is_the_same_for_any_world_size(place, validation, monkeypatch):
    alone, held_out = train.validate(validation), data.Corpus(place / "data", "val")
    monkeypatch.setattr(data, "Corpus", lambda *_: held_out)            # opened once, for speed
    monkeypatch.setattr(train, "all_reduce", lambda tensor: tensor)     # each sees its own share
    for world in (2, 8, 21):                # there are 20 rows
        monkeypatch.setattr(train, "WORLD", world)
        shares = []
        for rank in range(world):
            monkeypatch.setattr(train, "RANK", rank)
            shares.append(train.validate(validation))
        assert math.isclose(sum(shares), alone, rel_tol=1e-6), \
            f"{alone} alone, {sum(shares)} on {world} processes"
    assert shares[-1] == 0, "a process without a row adds nothing"


def test_validation_is_nats_over_the_bytes_of_the_targets(place, validation):
    net = load_checkpoint(place / "init")
    tokens = data.Corpus(place / "data", "val").tokens["text"][:20 * (BLOCK + 1)]
    rows = torch.from_numpy(np.asarray(tokens, np.int64)).view(20, BLOCK + 1)
    log_p = net(rows[:, :-1]).double().log_softmax(-1).gather(2, rows[:, 1:, None]).sum().item()
    tokenizer = data.load_tokenizer(place / "data")
    size = len(tokenizer.decode_bytes([t for t in rows[:, 1:].flatten().tolist()
                                       if t != tokenizer.eos_id]))
    found = train.validate(validation)
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
        patch.setattr(sys, "argv", ["train.py", *flags(place, tmp_path)])
        run(None, 128 + signal.SIGTERM)
    printed = capsys.readouterr().out.splitlines()[-1]
    words = shlex.split(printed.removeprefix("interrupted; to go on: "))
    assert (words[0], words[-1]) == ("python", "--resume"), f"no command that resumes: {printed}"
    assert state(tmp_path)["step"] == 10, "SIGTERM must finish its step and save"
    with open(tmp_path / "m" / "metrics.jsonl", "a") as file:     # as if killed after the save
        file.write('{"step": 11, "loss": 99}\n{"step": 12, "lo')
    train.main(words[2:])
    assert_same(weights(straight), weights(tmp_path), "10 + resume + 10 steps are not 20 steps")
    assert losses(straight) == losses(tmp_path), "metrics.jsonl is not that of an undisturbed run"
    old, new = (state(out)["optimizer"]["state"] for out in (straight, tmp_path))
    for i in old:
        assert_same(old[i], new[i], f"AdamW's state of parameter {i} after a resume")


@pytest.fixture
def cut_short(place, tmp_path, monkeypatch) -> Path:
    """Where a run was interrupted after two steps."""
    with monkeypatch.context() as patch:
        interrupt_after(patch, 2)
        run(flags(place, tmp_path), 128 + signal.SIGTERM)
    return tmp_path


def test_resume_refuses_other_hyper_parameters_but_not_another_micro_batch(place, cut_short,
                                                                           capsys):
    message = refuse([*flags(place, cut_short, lr=0.5), "--resume"], capsys)
    assert "lr is 0.5" in message and "0.01" in message, message
    train.main([*flags(place, cut_short, micro_batch=4), "--resume"])
    assert state(cut_short)["step"] == 20


def test_resume_refuses_another_tokenizer_and_other_data(place, cut_short, capsys):
    for vocabulary, change, part in ((280, str, "the tokenizer is"),
                                     (300, str.upper, "the text is")):
        texts = [change(path.read_text()) for path in sorted((place / "text").iterdir())]
        folder = cut_short / f"{part[4:8]}{vocabulary}"
        (folder / "text").mkdir(parents=True)
        for i, text in enumerate(texts):
            (folder / "text" / f"{i}.txt").write_text(text)
        tokenizer = (data.load_tokenizer(place / "data") if vocabulary == 300 else
                     data.train_bpe(texts, vocabulary))
        data.prepare([f"text={folder / 'text'}"], tokenizer, folder / "data", val_fraction=0.2)
        message = refuse([*flags(place, cut_short, data=folder / "data"), "--resume"], capsys)
        assert part in message, message
    assert state(cut_short)["step"] == 2, "a refused run saved something"
    shutil.copytree(place / "data", cut_short / "moved")        # the same data elsewhere will do
    train.main([*flags(place, cut_short, data=cut_short / "moved"), "--resume"])


def test_resume_goes_on_from_the_checkpoint_before_a_damaged_one(place, straight, tmp_path, capsys):
    train.main(flags(place, tmp_path, save_every=10))
    newest = data.checkpoint_folder(tmp_path / "m") / "training_state.pt"
    newest.write_bytes(newest.read_bytes()[:999])
    message = refuse([*flags(place, tmp_path), "--resume"], capsys)
    assert "step-000020/training_state.pt cannot be used" in message, message
    shutil.rmtree(newest.parent)
    train.main([*flags(place, tmp_path), "--resume"])
    assert_same(weights(straight), weights(tmp_path), "steps 11 to 20, made again")
    assert losses(straight) == losses(tmp_path), "metrics.jsonl is not that of an undisturbed run"


def test_a_damaged_line_of_metrics_is_named_and_stays(place, straight, tmp_path, capsys):
    shutil.copytree(straight / "m", tmp_path / "m")
    log, resume = tmp_path / "m" / "metrics.jsonl", [*flags(place, tmp_path), "--resume"]
    whole = log.read_text()
    for bad in ('{"step": 3, "lo', "\0" * 20, "[3]", '{"loss": 1}', '{"step": null}', ""):
        lines = whole.splitlines(keepends=True)
        lines[2] = bad + "\n"
        log.write_text("".join(lines))
        message = refuse(resume, capsys)
        assert f"line 3 of {log} is damaged: mend it, or move the file away" in message, message
        assert log.read_text() == "".join(lines), "a refused run changed the log"
    log.write_text(whole)                                       # mended
    train.main(resume)
    assert log.read_text() == whole, "a resumed run lost lines before its checkpoint"
    log.unlink()                                                # moved away
    train.main(resume)


def test_a_new_run_sets_an_old_checkpoint_aside(place, tmp_path):
    for _ in range(2):
        train.main(flags(place, tmp_path, steps=1, warmup=0))
    (aside,) = tmp_path.glob("m.*")
    assert_same(weights(tmp_path), dict(load_checkpoint(aside).named_parameters()),
                "the run's two folders")


def test_a_folder_that_holds_no_run_is_not_set_aside(place, tmp_path):
    shutil.copytree(place / "data", tmp_path / "m")             # --name of the data set's folder
    train.main(flags(place, tmp_path, data=tmp_path / "m", steps=1, warmup=0))
    assert (tmp_path / "m" / "manifest.json").exists() and state(tmp_path)["step"] == 1


def test_two_checkpoints_are_kept_without_links(place, tmp_path):
    train.main(flags(place, tmp_path, save_every=4))
    names = sorted(path.name for path in (tmp_path / "m").iterdir())
    assert names == ["metrics.jsonl", "step-000016", "step-000020"], f"{names} are there"
    assert not [path for path in tmp_path.rglob("*") if path.is_symlink()]
    assert not (tmp_path / "m.lock").exists(), "the run is over, its claim is not"


def test_a_folder_without_held_out_text_trains_without_validation(place, tmp_path):
    tokenizer = data.load_tokenizer(place / "data")
    data.prepare([f"text={place / 'text'}"], tokenizer, tmp_path / "data", val_fraction=0)
    train.main(flags(place, tmp_path, data=tmp_path / "data", steps=10))
    assert len(metrics(tmp_path)) == 10
    assert not [line for line in metrics(tmp_path) if "val_bits_per_byte" in line]


def test_a_bad_gradient_stops_at_the_next_log_and_names_the_good_checkpoint(place, tmp_path, capsys,
                                                                            monkeypatch):
    plain, calls = train.loss_of, []

    def poisoned(model, rows, *rest):
        calls.append(1)
        return plain(model, rows, *rest) * (math.nan if len(calls) == 9 else 1)
    monkeypatch.setattr(train, "loss_of", poisoned)
    message = refuse(flags(place, tmp_path, log_every=6, val_every=100, save_every=7), capsys)
    assert "a step from 8 to 12" in message and "m/step-000007" in message, message
    assert len(calls) == 12, f"found after {len(calls)} steps: the host must look at logs only"
    assert state(tmp_path)["step"] == 7, "something was saved after the bad step"


class Crash(BaseException):
    """Stands for kill -9: nothing in the code may catch it."""


def test_a_crash_at_any_system_call_of_a_save_leaves_one_whole_checkpoint(place, tmp_path,
                                                                          monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda handle: None)       # a process dies here, not the power
    config = train.TrainConfig(name="m", out=str(tmp_path), data=str(place / "data"), block=BLOCK,
                               batch_tokens=BLOCK, micro_batch=1, init=str(place / "init"),
                               warmup=0)
    training = train.Run(config, torch.device("cpu"), False)
    training.folder.mkdir()
    (training.folder / "metrics.jsonl").touch()

    def save(step: int) -> None:
        with torch.no_grad():
            for p in training.model.parameters():
                p.fill_(step)
                training.optimizer.state[p] = {"step": torch.tensor(float(step))}
        training.save(step)

    def crash_in_call(number: int):
        """The number-th call that touches the disk never returns."""
        calls = iter(range(10**6))
        patch = pytest.MonkeyPatch()
        for owner, name in ((os, "replace"), (os, "rename"), (os, "fsync"), (os, "mkdir"),
                            (os, "unlink"), (os, "rmdir"), (torch, "save")):
            def counted(*args, real=getattr(owner, name), **kwargs):
                if next(calls) == number:
                    raise Crash
                return real(*args, **kwargs)
            patch.setattr(owner, name, counted)
        return patch

    for step in (1, 2, 3):
        save(step)
    reported, number = 3, 0
    while True:
        patch = crash_in_call(number)
        try:
            save(reported + 1)
            break
        except Crash:
            pass
        finally:
            patch.undo()
        saved = state(tmp_path)
        found = {p.flatten()[0].item() for p in weights(tmp_path).values()}
        data.load_tokenizer(tmp_path / "m")
        assert found == {saved["step"]} == {saved["optimizer"]["state"][0]["step"].item()}, \
            f"crash at call {number}: weights of {found}, optimizer of {saved['step']}"
        assert saved["step"] >= reported, f"crash at call {number}: step {saved['step']} is older"
        save(reported + 2)              # and saving goes on from whatever was left
        reported, number = reported + 2, number + 1
        assert state(tmp_path)["step"] == reported
        assert len(list((tmp_path / "m").glob("step-*"))) == 2, "something was left over"
    assert number > 10, f"a save touched the disk only {number} times: does it sync at all?"


def test_every_file_is_on_the_disk_before_the_folder_gets_its_name(place, tmp_path, monkeypatch):
    synced, unsynced, fsync, rename = set(), [], os.fsync, Path.rename

    def record(handle):
        synced.add(os.fstat(handle).st_ino)
        fsync(handle)

    def check(path, target):
        unsynced.extend(f.name for f in path.iterdir() if f.stat().st_ino not in synced)
        return rename(path, target)
    monkeypatch.setattr(os, "fsync", record)
    monkeypatch.setattr(Path, "rename", check)
    train.main(flags(place, tmp_path))
    assert not unsynced, f"a power cut would empty {unsynced}"
    assert (tmp_path / "m").stat().st_ino in synced, "a power cut would undo the renaming"


def test_a_full_disk_keeps_the_checkpoint_before(place, tmp_path, monkeypatch, capsys):
    real = data.write_whole

    def full(path, chunks):
        real(path, no_space(chunks) if path.parent.name == "step-000010.partial" else chunks)

    def no_space(chunks):
        yield next(iter(chunks))
        raise OSError(28, "No space left on device")
    monkeypatch.setattr(data, "write_whole", full)
    message = refuse(flags(place, tmp_path, save_every=5), capsys)
    assert "No space left" in message and "step-000010" in message, message
    assert state(tmp_path)["step"] == 5 and weights(tmp_path), "the kept checkpoint must load"
    monkeypatch.undo()
    train.main([*flags(place, tmp_path), "--resume"])
    assert not list((tmp_path / "m").glob("*.partial")), "what was left over is still there"


def test_nothing_whole_is_deleted_because_something_after_it_failed(place, tmp_path, monkeypatch):
    """The old checkpoints cannot be removed, and the folder cannot be synced."""
    def fail(*_, **__):
        raise OSError(5, "Input/output error")
    monkeypatch.setattr(os, "rmdir", fail)
    monkeypatch.setattr(os, "open", lambda path, *rest, real=os.open, **how: (
        fail() if str(path) == str(tmp_path / "m") else real(path, *rest, **how)))
    train.main(flags(place, tmp_path, save_every=5))
    assert state(tmp_path)["step"] == 20 and weights(tmp_path)


# -------------------------------------------------------------------------------- user's mistakes

@pytest.mark.parametrize("arguments, part", [
    (["--leraning-rate=1"], "unrecognized arguments"),
    (["--steps", "many"], "--steps: invalid int value: 'many'"),
    (["--steps", "0"], "--steps is 0"),
    (["--lr", "nan"], "--lr is nan"),
    (["--micro-batch", "-1"], "--micro-batch is -1: expected > 0"),
    (["amd-135m", "--data", "{here}"], "{here} holds no finished data set"),
    (["llama-9"], "invalid choice: 'llama-9'"),
    (["amd-135m", "--preset", "gpt-5"], "--preset: invalid choice: 'gpt-5'"),
    (["amd-135m"], "out/data holds no finished data set"),
    (["amd-135m", "--data", "nowhere"], "nowhere holds no finished data set"),
    (["amd-135m", "--data", "nowhere", "--device", "abacus"], "device 'abacus' is not there"),
    (["amd-135m", "--batch-tokens", "100"], "100 is no multiple of --block 2048"),
    (["amd-135m", "--precision", "int3"], "--precision: invalid choice: 'int3'"),
    (["amd-135m", "--lr", "1e-5"], "--lr 1e-05 is below --min-lr 6e-05"),
    (["amd-135m", "--steps", "100"], "--warmup 2000 exceeds --steps 100"),
    (["demo", "--name", "mine"], "--name would name each stage"),
])
def test_a_mistake_on_the_command_line_is_one_sentence(arguments, part, tmp_path, capsys):
    message = refuse([*arguments, "--out", tmp_path / "out"], capsys)
    assert part in message, message
    assert not (tmp_path / "out").exists(), "a refused run wrote something"


@pytest.mark.parametrize("changes, part", [
    ({"micro_batch": 3}, "does not divide 8 rows"),
    ({"init": "/nowhere"}, "/nowhere/config.json"),
    ({"block": 4096, "batch_tokens": 4096, "micro_batch": 1}, "block"),
    ({"block": 128, "batch_tokens": 1024}, "--block 128 exceeds the model's context, 64"),
    ({"mix": "poems"}, "no source poems"),
    ({"preset": "amd-135m"}, "cannot grow"),
])
def test_a_mistake_in_a_run_is_one_sentence(place, changes, part, tmp_path, capsys):
    message = refuse(flags(place, tmp_path / "out", **changes), capsys)
    assert part in message, message
    assert not (tmp_path / "out").exists(), "a refused run wrote something"


def test_freezing_every_layer_is_one_sentence(place, tmp_path, capsys):
    message = refuse(flags(place, tmp_path / "out", freeze=99), capsys)
    assert "--freeze leaves no layer to train" in message, message
    assert not list(tmp_path.rglob("step-*")), "a checkpoint of a run that cannot train"


def test_a_tokenizer_that_does_not_fit_the_model_is_refused(place, tmp_path, capsys):
    shape = load_checkpoint(place / "init").config
    save_checkpoint(Transformer(replace(shape, vocab_size=280)), tmp_path / "small")
    data.load_tokenizer(place / "init").save(tmp_path / "small")
    message = refuse(flags(place, tmp_path / "out", init=tmp_path / "small"), capsys)
    assert "300 different tokens" in message and "280" in message, message


def test_resume_without_a_checkpoint_is_refused(place, tmp_path, capsys):
    assert "no run to resume" in refuse([*flags(place, tmp_path / "out"), "--resume"], capsys)


@pytest.mark.parametrize("error, part", [
    (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "--micro-batch"),
    (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"),
     "--micro-batch"),
    (RuntimeError("Failed to find C compiler. Please specify via CC"), "install g++"),
    (RuntimeError("[gloo/transport/tcp/pair.cc] Connection closed by peer"), "another process"),
])
def test_what_pytorch_cannot_do_is_one_sentence(place, tmp_path, capsys, monkeypatch, error, part):
    def fail(*_):
        raise error
    monkeypatch.setattr(train, "loss_of", fail)
    assert part in refuse(flags(place, tmp_path), capsys)
