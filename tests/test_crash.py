"""Claims about training in real processes: killed, interrupted, out of disk, and several at once.

    pytest -m slow tests/test_crash.py
"""
import json
import os
import random
import re
import resource
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from forks import Fork
from test_train import flags, losses, metrics, place, state, straight, weights  # noqa: F401

import data
import train
from model import load_checkpoint

pytestmark = pytest.mark.slow
SCRIPT = str(Path(train.__file__))
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1",
               "PYTHONPATH": str(Path(SCRIPT).parent)}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def launch(arguments: list[str], script: str = SCRIPT, environment: dict = {}, **how) -> Fork:
    """train.py in a process of its own."""
    return Fork([script, *arguments], ENVIRONMENT | environment, **how)


def launch_side_by_side(arguments: list[str], world: int, script: str = SCRIPT) -> list[Fork]:
    """train.py in `world` processes that know of each other what torchrun would tell them."""
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
              "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    return [launch(arguments, script, common | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)]


def torchrun(arguments: list[str], *options: str) -> subprocess.Popen:
    """torchrun itself, with two processes unless the options are others."""
    options = options or ("--nproc-per-node", "2", "--master-port", str(free_port()))
    return subprocess.Popen(
        [sys.executable, "-m", "torch.distributed.run", *options, SCRIPT, *arguments], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=os.environ | ENVIRONMENT)


def finish(process: Fork | subprocess.Popen, code: int = 0) -> str:
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, f"exit code {process.returncode}, expected {code}:\n{output}"
    return output


def interrupt(process: Fork, number: int) -> None:
    """Send a signal once the run makes steps."""
    for line in process.stdout:
        if line.startswith("step"):
            break
    process.send_signal(number)


def checkpoint_step(out: Path) -> int:
    """The step of a run's newest checkpoint, after checking that its files load and are of one."""
    saved, folder = state(out), data.checkpoint_folder(out / "m")
    load_checkpoint(folder)
    data.load_tokenizer(folder)
    counted = {int(entry["step"]) for entry in saved["optimizer"]["state"].values()}
    assert counted == {saved["step"]}, f"AdamW has counted {counted}, the state {saved['step']}"
    assert folder.name == f"step-{saved['step']:06}", f"{folder} holds step {saved['step']}"
    return saved["step"]


def test_fifty_kills_at_random_moments_lose_nothing_that_was_reported(place, tmp_path):
    random.seed(0)
    reported = 0
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
        found = checkpoint_step(tmp_path)
        assert found >= reported, f"attempt {attempt}: step {found}, but {reported} was reported"
    # A killed run leaves its claim, m.lock: the next one sees that its owner is dead.
    others = {path.name for path in tmp_path.iterdir()} - {"m", "m.lock"}
    assert not others, f"{others}: a resumed run must not set its folder aside"


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT, signal.SIGHUP))
def test_a_signal_finishes_the_step_saves_and_prints_how_to_resume(place, tmp_path, number):
    process = launch(flags(place, tmp_path, steps=10**6))
    interrupt(process, number)
    command = finish(process, 128 + number).splitlines()[-1]        # so `train.py && next` stops
    assert command.startswith("interrupted; to go on: python ") and "--resume" in command, command
    step = checkpoint_step(tmp_path)
    lines = (tmp_path / "m" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == step, "the last logged step is not the saved one"


def test_nohup_keeps_a_run_alive(place, tmp_path):
    process = launch(flags(place, tmp_path, steps=100),
                     ignored=(signal.SIGHUP,))
    interrupt(process, signal.SIGHUP)
    finish(process)
    assert checkpoint_step(tmp_path) == 100


def test_a_second_ctrl_c_ends_at_once(place, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("""if True:
        import sys, time, train
        real = train.adamw
        def slow(model, config):
            optimizer = real(model, config)
            optimizer.register_step_post_hook(lambda *_: (print("step", flush=True),
                                                          time.sleep(60)))
            return optimizer
        train.adamw = slow
        train.main(sys.argv[1:])""")
    process = launch(flags(place, tmp_path), script=str(script))
    interrupt(process, signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the first Ctrl-C must let the step finish"
    process.send_signal(signal.SIGINT)
    assert process.wait(10) == -signal.SIGINT


def test_an_interrupt_before_the_first_step_is_one_line(place, tmp_path):
    script = tmp_path / "slow.py"
    script.write_text("""if True:
        import sys, time, train
        def slow(*_):
            print("step", flush=True)
            time.sleep(60)
        train.build = slow
        train.main(sys.argv[1:])""")
    process = launch(flags(place, tmp_path), script=str(script))
    interrupt(process, signal.SIGINT)
    output = finish(process, 130)
    assert output == "train.py: interrupted before the first step\n", output


def test_a_closed_pipe_does_not_lose_the_run(place, tmp_path):
    process = launch(flags(place, tmp_path))
    process.stdout.readline()
    process.stdout.close()              # as `| head -1` does
    assert process.wait(300) == 0, f"exit code {process.returncode}, expected 0"
    assert checkpoint_step(tmp_path) == 20
    assert len((tmp_path / "m" / "metrics.jsonl").read_text().splitlines()) == 20


def test_a_terminal_that_cannot_print_a_sample_does_not_lose_the_run(place, tmp_path):
    output = finish(launch(flags(place, tmp_path, sample="caf\u00e9"),
                           environment={"PYTHONIOENCODING": "ascii"}))
    assert "  | caf?" in output and checkpoint_step(tmp_path) == 20, output


def test_a_second_run_on_one_name_is_refused(place, tmp_path):
    first = launch(flags(place, tmp_path, steps=10**6))
    for line in first.stdout:
        if line.startswith("step"):
            break
    for more in ([], ["--resume"]) if data.checkpoint_folder(tmp_path / "m").name != "m" else ([],):
        output = finish(launch([*flags(place, tmp_path, steps=10**6), *more]), 2)
        assert f"another run writes in {tmp_path / 'm'}: " in output, output
    first.kill()                        # it leaves its claim behind
    first.communicate()
    train.main(flags(place, tmp_path, steps=5))
    assert checkpoint_step(tmp_path) == 5


def test_compiling_without_a_compiler_is_one_sentence(place, tmp_path):
    output = finish(launch([*flags(place, tmp_path), "--compile"],
                           environment={"PATH": "/nowhere", "CXX": "g++-is-not-here"}), 2)
    assert "install g++" in output.splitlines()[-1], output
    assert "Traceback" not in output, output


def test_a_full_disk_keeps_the_checkpoint_before_and_says_so(place, tmp_path):
    finish(launch(flags(place, tmp_path, steps=20, save_every=5)))
    size = (data.checkpoint_folder(tmp_path / "m") / "training_state.pt").stat().st_size

    # No file may grow beyond half the optimizer's state.
    output = finish(launch(flags(place, tmp_path / "fresh"), file_size=size // 2), 2)
    assert "could not write" in output and "step-000020.partial" in output, output
    process = launch(flags(place, tmp_path / "later", steps=10**6, save_every=5))
    for line in process.stdout:
        if line.startswith("saved step"):
            saved = int(line.split()[2])
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (size // 2, size // 2))
            break
    output = finish(process, 2)
    found = checkpoint_step(tmp_path / "later")
    assert "what was there before is unchanged" in output and found >= saved, output


@pytest.mark.parametrize("world, micro_batch", [(2, 4), (2, 2), (4, 1)])
def test_more_processes_give_the_same_losses(place, straight, tmp_path, world, micro_batch):
    for process in launch_side_by_side(flags(place, tmp_path, micro_batch=micro_batch), world):
        finish(process)
    pairs = zip(losses(straight), losses(tmp_path), strict=True)
    error = max(abs(b / a - 1) for a, b in pairs)
    assert error < 1e-6, f"{world} processes are {error:.1e} off the losses of one"
    ours, theirs = (metrics(out)[-1]["val_bits_per_byte"] for out in (straight, tmp_path))
    assert abs(theirs / ours - 1) < 1e-6, f"validation: {theirs} on {world} processes, {ours} on 1"


def test_two_processes_start_from_the_folder_that_they_set_aside(place, tmp_path):
    """The slow one must have read it before the other renames it."""
    train.main(flags(place, tmp_path, steps=2, warmup=0))
    script = tmp_path / "slow.py"
    script.write_text("""if True:
        import os, sys, time, train
        real = train.load_checkpoint
        train.load_checkpoint = lambda *a, **k: (
            time.sleep(2 * int(os.environ["RANK"])), real(*a, **k))[1]
        train.main(sys.argv[1:])""")
    again = flags(place, tmp_path, steps=2, warmup=0, micro_batch=2, init=tmp_path / "m")
    for process in launch_side_by_side(again, 2, str(script)):
        finish(process)
    assert list(tmp_path.glob("m.20*")) and checkpoint_step(tmp_path) == 2


def test_two_processes_resume_bitwise(place, tmp_path):
    for process in launch_side_by_side(flags(place, tmp_path / "straight", micro_batch=2), 2):
        finish(process)
    process = torchrun(flags(place, tmp_path / "cut", micro_batch=2, log_every=1))
    children = None
    for line in process.stdout:
        if line.startswith("step 8 "):
            children = subprocess.run(["pgrep", "-P", str(process.pid)], text=True,
                                      stdout=subprocess.PIPE).stdout.split()
            os.kill(int(children[0]), signal.SIGTERM)   # one hears it, both have to stop
            break
    output = process.communicate(timeout=300)[0]
    assert children and 8 <= checkpoint_step(tmp_path / "cut") < 20, "it was not cut short"
    command, = re.findall("interrupted; to go on, with the same torchrun options: (.*)", output)
    finish(torchrun(shlex.split(command)[1:]))
    a, b = weights(tmp_path / "straight"), weights(tmp_path / "cut")
    assert all(torch.equal(a[name], b[name]) for name in a), "two processes resumed differently"
    assert losses(tmp_path / "straight") == losses(tmp_path / "cut")


def test_two_nodes_that_share_no_launcher_train_together(place, straight, tmp_path):
    """The README's `torchrun --nnodes 2`, on two launchers of this machine."""
    common = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-id", "7",
              "--rdzv-endpoint", f"127.0.0.1:{free_port()}"]
    nodes = [torchrun(flags(place, tmp_path, micro_batch=2), *common) for _ in range(2)]
    for node in nodes:
        finish(node)
    pairs = zip(losses(straight), losses(tmp_path), strict=True)
    error = max(abs(b / a - 1) for a, b in pairs)
    assert error < 1e-6, f"two nodes are {error:.1e} off the losses of one process"
