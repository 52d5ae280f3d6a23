"""Claims about training in real processes: killed, interrupted, out of disk, and several at once.

    pytest -m slow tests/test_crash.py
"""
import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_train import flags, losses, place, weights    # noqa: F401 (place is a fixture)

import train
from model import Transformer

pytestmark = pytest.mark.slow
SCRIPT = str(Path(train.__file__))
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
                            "PYTHONPATH": str(Path(SCRIPT).parent)}


def launch(arguments: list[str], world: int = 1, script: str = SCRIPT, **how) -> subprocess.Popen:
    """train.py in a process of its own, or in `world` of them as torchrun starts them."""
    if world > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(world),
                 "--master-port", str(port), script]
    else:
        start = [sys.executable, script]
    return subprocess.Popen(start + arguments, text=True, stdout=subprocess.PIPE,
                            stderr=subprocess.STDOUT, env=ENVIRONMENT, **how)


def finish(process: subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def checkpoint_step(folder: Path) -> int:
    """The step of a checkpoint, after checking that its files load and are of one step."""
    state = train.read_state(folder)
    Transformer.from_pretrained(folder)
    counted = {int(entry["step"]) for entry in state["optimizer"]["state"].values()}
    assert counted == {state["step"]}, f"AdamW has counted {counted}, the state {state['step']}"
    return state["step"]


def test_fifty_kills_at_random_moments_lose_nothing_that_was_reported(place, tmp_path):
    random.seed(0)
    folder, reported = tmp_path / "m", 0
    for attempt in range(50):
        # A save after each step: most kills fall into one.
        process = launch([*flags(place, tmp_path, steps=10**6, save_every=1, val_every=10**6),
                          *(["--resume"] if reported else [])])
        deadline = None
        for line in process.stdout:
            if line.startswith("saved step"):
                reported = int(line.split()[2])
                deadline = deadline or time.monotonic() + random.uniform(0, 0.3)
            if deadline and time.monotonic() > deadline:
                time.sleep(random.uniform(0, 0.01))
                break
        assert deadline, f"attempt {attempt} never saved"
        process.kill()
        rest = process.communicate()[0]
        for line in rest.splitlines(keepends=True):
            if line.startswith("saved step") and line.endswith("\n"):
                reported = int(line.split()[2])
        found = checkpoint_step(folder)
        assert found >= reported, f"attempt {attempt}: step {found}, but {reported} was reported"
    assert not list(tmp_path.glob("m.*")), "a resumed run must not set its folder aside"


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(place, tmp_path, number):
    process = launch(flags(place, tmp_path, steps=10**6))
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)
    output = finish(process)
    command = output.splitlines()[-1]
    assert "--resume" in command, f"the last line must be the command that resumes: {command}"
    step = checkpoint_step(tmp_path / "m")
    lines = (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step, "the last logged step is not the saved one"


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(place, tmp_path):
    finish(launch(flags(place, tmp_path, steps=20, save_every=5), preexec_fn=None))
    size = (tmp_path / "m" / "training_state.pt").stat().st_size

    def limit() -> None:                # no file may grow beyond half the optimizer's state
        resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2))
    output = finish(launch(flags(place, tmp_path / "fresh"), preexec_fn=limit), 2)
    assert "could not save step 20" in output and "none before it" in output, output
    process = launch(flags(place, tmp_path / "later", steps=10**6, save_every=5))
    for line in process.stdout:
        if line.startswith("saved step"):
            saved = int(line.split()[2])
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
            break
    output = finish(process, 2)
    found = checkpoint_step(tmp_path / "later" / "m")
    assert f"step {found} is kept" in output and found >= saved, output


@pytest.mark.parametrize("world, micro_batch", [(2, 4), (2, 2), (4, 1)])
def test_more_processes_give_the_same_losses(place, tmp_path, world, micro_batch):
    train.main(flags(place, tmp_path / "one"))
    finish(launch(flags(place, tmp_path / "more", micro_batch=micro_batch), world))
    pairs = zip(losses(tmp_path / "one"), losses(tmp_path / "more"), strict=True)
    error = max(abs(b / a - 1) for a, b in pairs)
    assert error < 1e-6, f"{world} processes are {error:.1e} off the losses of one"
    ours, theirs = (json.loads((tmp_path / name / "m" / "metrics.jsonl").read_text()
                               .splitlines()[-1])["val_bits_per_byte"] for name in ("one", "more"))
    assert abs(theirs / ours - 1) < 1e-6, f"validation: {theirs} on {world} processes, {ours} on 1"


def test_two_processes_start_from_the_folder_that_they_set_aside(place, tmp_path):
    """The slow one must have read it before the other renames it."""
    train.main(flags(place, tmp_path, steps=2))
    script = tmp_path / "slow.py"
    script.write_text("""if True:
        import os, sys, time, train
        real = train.Transformer.from_pretrained
        train.Transformer.from_pretrained = lambda *a, **k: (
            time.sleep(2 * int(os.environ["RANK"])), real(*a, **k))[1]
        train.main(sys.argv[1:])""")
    finish(launch(flags(place, tmp_path, steps=2, micro_batch=2, init=tmp_path / "m"), 2,
                  script=str(script)))
    assert (tmp_path / "m.1").exists() and checkpoint_step(tmp_path / "m") == 2


def test_two_processes_resume_bitwise(place, tmp_path):
    finish(launch(flags(place, tmp_path / "straight", micro_batch=2), 2))
    process = launch(flags(place, tmp_path / "cut", micro_batch=2, log_every=1), 2)
    children = None
    for line in process.stdout:
        if line.startswith("step      8/"):
            children = subprocess.run(["pgrep", "-P", str(process.pid)], text=True,
                                      stdout=subprocess.PIPE).stdout.split()
            os.kill(int(children[0]), signal.SIGTERM)   # one hears it, both have to stop
            break
    process.communicate(timeout=300)
    assert children and 8 <= checkpoint_step(tmp_path / "cut" / "m") < 20, "it was not cut short"
    finish(launch([*flags(place, tmp_path / "cut", micro_batch=2), "--resume"], 2))
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a), "two processes resumed differently"
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")
