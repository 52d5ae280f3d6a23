"""Claims about running what a model wrote (evaluate.py): right programs pass, no attack does.

Each attack defines f so that f() == 1 only if the attack got through; check() asserts that. None
would do harm if it did get through: what kills only asks whether it could, what floods is bounded.
"""
import array
import fcntl
import inspect
import os
import socket
import subprocess
import sys
import termios
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import evaluate

CHECK = "def check(candidate):\n    assert candidate() == 1\n"
RIGHT = "def f():\n    return 1\n"
CAGED = evaluate.run_program(RIGHT, CHECK, "f") == (True, True)
needs_cage = pytest.mark.skipif(not CAGED, reason="this kernel gives no namespaces to us")
needs_data = pytest.mark.skipif("EVAL_DATA" not in os.environ, reason="EVAL_DATA is not set: the "
                                "folder with humaneval/HumanEval.jsonl.gz")

# What fails with limits alone, too.
ATTACKS = {
    "exit(0) while it is defined": "import sys\nsys.exit(0)",
    "exit(0) when it is called": "def f():\n    raise SystemExit(0)",
    "os._exit(0)": "import os\ndef f():\n    os._exit(0)",
    "os._exit(0) at once": "import os\nos._exit(0)",
    "an infinite loop": "def f():\n    while True: pass",
    "a long sleep": "import time\ndef f():\n    time.sleep(60)\n    return 1",
    "endless recursion": "def f():\n    return f()",
    "KeyboardInterrupt": "def f():\n    raise KeyboardInterrupt",
    "8 GB of memory": "import mmap\ndef f():\n    mmap.mmap(-1, 8 << 30)\n    return 1",
    "a printed 'passed'": "import os\nprint('passed', flush=True)\ndef f():\n"
                          "    for fd in range(20):\n"
                          "        try: os.write(fd, b'caged passed')\n"
                          "        except OSError: pass",
    "input() as the word": "def f():\n    print(input())",
    "a file of 100 MB": "def f():\n    with open('big', 'wb') as file:\n"
                        "        for _ in range(100): file.write(bytes(1 << 20))\n    return 1",
    "a replaced check": "def f(): pass\ndef check(candidate): pass",
    "a check replaced by a tracer": "import sys\ndef f(): pass\ndef trace(frame, event, arg):\n"
                                    "    frame.f_globals['check'] = lambda f: None\n"
                                    "    return trace\nsys._getframe().f_trace = trace\n"
                                    "sys.settrace(trace)\nsys.setprofile(trace)",
    "a check replaced as it is deleted": "class Swap:\n    def __del__(self):\n"
                                         "        globals()['check'] = lambda f: None\n"
                                         "check = Swap()\ndef f(): pass",
    "tests swallowed by a string": "def f(): pass\ncheck = '''",
    "the word looked for in memory": """
import gc, os, re, sys
def f():
    frame, seen = sys._getframe(), []
    while frame:
        seen += [*frame.f_locals.values(), *frame.f_globals.values()]
        frame = frame.f_back
    for x in gc.get_objects():
        if isinstance(x, (list, tuple)):
            seen += x
        elif isinstance(x, dict):
            seen += x.values()
    for word in {x for x in seen if isinstance(x, str) and re.fullmatch('[0-9a-f]{32}', x)}:
        for fd in range(20):
            try: os.write(fd, word.encode())
            except OSError: pass
""",
}
ATTACKS["everything open written to, without an end"] = """
import os
def f():
    for fd in range(3, 64):
        try:
            for _ in range(100): os.write(fd, bytes(1 << 20))
        except OSError: pass
    return 1
"""
ATTACKS["its guard killed through their group"] = """
import ctypes, os, posix, time
ctypes.CDLL(None).prctl(1, 0)
posix.kill(0, 9)
os.closerange(0, 99)
time.sleep(60)
"""
ATTACKS["its own guard killed"] = """
import os, posix, time
if os.getppid() > 1:
    os.closerange(3, 99)
    posix.kill(os.getppid(), 9)
    time.sleep(60)
"""
# What needs the kernel's namespaces.
CAGE_ATTACKS = {
    "a fork bomb": "import os\ndef f():\n    for _ in range(9): os.fork()\n    return 1",
    "a process that outlives it": "import os, time\nif os.fork() == 0:\n    os.setsid()\n"
                                  "    time.sleep(60)\ndef f(): return 1",
    "a program started": "import subprocess\ndef f():\n"
                         "    return 1 + subprocess.run(['/usr/bin/true']).returncode",
    "many files": "def f():\n    for i in range(100):\n"
                  "        with open(str(i), 'wb') as file: file.write(bytes(1 << 20))\n"
                  "    return 1",
    "many empty files": "def f():\n    for i in range(5000): open(str(i), 'w').close()\n"
                        "    return 1",
    "a file elsewhere": "import os\ndef f():\n"
                        "    for place in ('/tmp/', '/var/tmp/', '/dev/shm/', HERE):\n"
                        "        try: open(place + 'MARKER', 'w'); return 1\n"
                        "        except OSError: pass",
    "the mounts made writable again": "import ctypes, os\ndef f():\n"
                                      "    attr = (ctypes.c_uint64 * 4)(0, 1, 0, 0)\n"
                                      "    libc = ctypes.CDLL(None)\n"
                                      "    libc.syscall(442, -100, b'/', 0x8000, attr, 32)\n"
                                      "    open(os.__file__, 'r+')\n    return 1",
    "the parent's environment": "import os, glob\ndef f():\n    found = set(os.environ) - "
                                "{'LC_CTYPE'}\n    for path in glob.glob('/proc/*/environ'):\n"
                                "        try: found |= set(open(path, 'rb').read())\n"
                                "        except OSError: pass\n    return int(bool(found))",
    "every process killed": "import posix\ndef f():\n    posix.kill(-1, 0)\n    return 1",
    "the parent killed": "import os\ndef f():\n    return int(os.getppid() > 1)",
    "a thread": "import threading\ndef f():\n    threading.Thread(target=int).start()\n"
                "    return 1",
    "shared memory": "import ctypes\ndef f():\n"
                     "    return int(ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0)",
    "the mode of what is open": "import os\ndef f():\n    os.fchmod(0, 0o666)\n    return 1",
    "room on the disk taken": "import os\ndef f():\n    for fd in range(3, 64):\n"
                              "        try: os.posix_fallocate(fd, 0, 1 << 20); return 1\n"
                              "        except OSError: pass",
    "a namespace of its own": "import ctypes\ndef f():\n"
                              "    return 1 + ctypes.CDLL(None).unshare(0x20000)",
    "a look at the user's files": "import os\ndef f():\n    return int(any(map(os.path.exists, "
                                  "('/etc', '/proc', '/dev', '/tmp', HERE))))",
    "a file of Python's own": "import os\ndef f():\n    open(os.__file__, 'r+')\n    return 1",
    "the root left by chroot": """
import ctypes, os
def f():
    libc, root = ctypes.CDLL(None), os.open('/', os.O_RDONLY)
    for flag in (0x10000000, 0x20000):
        libc.unshare(flag)
    libc.umount2(b'/', 2)
    os.mkdir('/inner')
    os.chroot('/inner')
    os.fchdir(root)
    for _ in range(30): os.chdir('..')
    os.chroot('.')
    return int(os.path.exists('/etc'))
""",
    "real root again": "import os\ndef f():\n    os.setresuid(0, 0, 0)\n    return 1",
}


@pytest.fixture
def survivors(monkeypatch):
    """A function that lists the processes still there that this test has started."""
    marker = uuid.uuid4().hex
    source = inspect.getsource(evaluate.cage)
    monkeypatch.setattr(evaluate, "CAGE", f"{source}\n# {marker}\ncage()")

    def look(times: int = 20) -> list[str]:
        for _ in range(times):          # what was killed may take a moment to be gone
            found = []
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if marker.encode() + b"\ncage()" in path.read_bytes():
                        found.append(path.parent.name)
                except OSError:
                    pass
            if not found:
                break
            time.sleep(0.05)
        return found
    return look


def attack(program: str, survivors) -> None:
    began = time.monotonic()
    passed, _ = evaluate.run_program(program, CHECK, "f", seconds=2)
    assert time.monotonic() - began < 6, "the cage's own clock, of 2 seconds, did not end it"
    assert not passed, "the attack was counted as a right answer: look at evaluate.cage()"
    assert not survivors(), "a process of the attack is still running: look at evaluate.cage()"
    assert evaluate.run_program(RIGHT, CHECK, "f")[0], "after the attack a right program fails"


@pytest.mark.parametrize("name", ATTACKS)
def test_no_attack_passes(name, survivors):
    attack(ATTACKS[name], survivors)


@pytest.mark.parametrize("name", ["exit(0) when it is called", "os._exit(0)", "an infinite loop",
                                  "8 GB of memory", "a printed 'passed'", "a file of 100 MB",
                                  "its own guard killed", "a fork bomb", "a thread"])
def test_no_attack_passes_where_the_kernel_gives_no_namespaces(name, survivors, monkeypatch):
    monkeypatch.setattr(evaluate, "NAMESPACES", -1)
    assert evaluate.run_program(RIGHT, CHECK, "f") == (True, False), \
        "a run without namespaces must work and must say that it was not caged"
    attack(ATTACKS[name] if name in ATTACKS else CAGE_ATTACKS[name], survivors)


@needs_cage
@pytest.mark.parametrize("name", CAGE_ATTACKS)
def test_no_attack_leaves_the_cage(name, survivors):
    marker = Path(f"/tmp/{uuid.uuid4().hex}")
    program = CAGE_ATTACKS[name].replace("MARKER", marker.name)
    attack(program.replace("HERE", repr(__file__)), survivors)
    assert not marker.exists(), "the attack wrote outside its folder"


@needs_cage
def test_nothing_goes_on_when_the_evaluation_is_killed(survivors):
    sleeper = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0)\ntime.sleep(60)"
    script = (f"import evaluate; evaluate.CAGE = {evaluate.CAGE!r}\n"
              f"evaluate.run_program({sleeper!r}, {CHECK!r}, 'f', 60)")
    evaluation = subprocess.Popen([sys.executable, "-c", script],
                                  cwd=Path(evaluate.__file__).parent)
    while len(survivors(1)) < 3:        # the guard, the first process of its namespace, the program
        assert evaluation.poll() is None, "the evaluation ended by itself"
        time.sleep(0.1)
    evaluation.kill()
    evaluation.wait()
    assert not survivors(), "the program outlives the evaluation that started it"


@needs_cage
def test_no_attack_reaches_the_network(survivors):
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0.5)
    port = server.getsockname()[1]
    attack("import socket\ndef f():\n"
           f"    socket.create_connection(('127.0.0.1', {port}), 1)\n    return 1", survivors)
    with server, pytest.raises(TimeoutError):
        server.accept()


@needs_cage
def test_no_attack_reaches_a_socket_of_this_machine(survivors):
    path = f"/tmp/{uuid.uuid4().hex}"
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        attack("import socket\ndef f():\n    socket.socket(socket.AF_UNIX).connect("
               f"{path!r})\n    return 1", survivors)
    os.unlink(path)


def test_a_program_that_could_not_be_started_is_not_counted_as_wrong(monkeypatch):
    def start(command, *args, **settings):
        if "rm" in command:
            return popen(command, *args, **settings)
        raise BlockingIOError("no more processes")
    popen = subprocess.Popen
    monkeypatch.setattr(evaluate.subprocess, "Popen", start)
    with pytest.raises(BlockingIOError):
        evaluate.run_program(RIGHT, CHECK, "f")


def test_attacks_side_by_side_leave_no_files_behind(tmp_path, monkeypatch, survivors):
    monkeypatch.setattr(evaluate.tempfile, "tempdir", str(tmp_path))
    programs = [ATTACKS["a file of 100 MB"], ATTACKS["an infinite loop"], RIGHT, RIGHT]
    with ThreadPoolExecutor(4) as pool:
        verdicts = list(pool.map(lambda p: evaluate.run_program(p, CHECK, "f", 2)[0], programs))
    assert verdicts == [False, False, True, True], "neighbours changed each other's verdicts"
    assert not survivors() and not list(tmp_path.iterdir()), "something was left behind"


def test_what_a_program_prints_does_not_reach_the_parent(monkeypatch):
    class Recorder(subprocess.Popen):
        def __init__(self, *args, stdout=None, **settings):
            if stdout is not None:
                answers.append(os.dup(stdout))
            super().__init__(*args, stdout=stdout, **settings)

        def communicate(self, *args, **settings):
            said = super().communicate(*args, **settings)
            sizes.append(array.array("i", [0]))
            fcntl.ioctl(answers[0], termios.FIONREAD, sizes[-1])
            return said

    answers, sizes = [], []
    monkeypatch.setattr(evaluate.subprocess, "Popen", Recorder)
    loud = "import sys\ndef f():\n    print('x' * 10**7, flush=True)\n    return 1"
    assert evaluate.run_program(loud, CHECK, "f") == (True, CAGED)
    os.close(answers[0])
    assert 0 < sizes[0][0] < 100, "a program's print reaches the evaluation"


@pytest.mark.parametrize("program", [
    "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P:\n    x: int\ndef f():\n    return P(1).x",
    "import asyncio, collections, decimal, hashlib, heapq, itertools, json, math, random, re, "
    "tempfile, typing\ndef f():\n    tempfile.TemporaryFile().write(b'x')\n    return 1",
    "def f():\n    return 1 \\",
])
def test_what_right_programs_need_is_there(program):
    assert evaluate.run_program(program, CHECK, "f")[0]


def test_a_folder_of_any_depth_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(evaluate, "NAMESPACES", -1)
    deep = "import os\nfor _ in range(2000):\n    os.mkdir('a')\n    os.chdir('a')\n" + RIGHT
    assert evaluate.run_program(deep, CHECK, "f") == (True, False)
    assert not list(tmp_path.iterdir())


@needs_data
def test_every_canonical_solution_passes_and_every_empty_body_fails():
    problems = evaluate.read_problems(os.environ["EVAL_DATA"])

    def run(body: str) -> list[str]:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            verdicts = pool.map(lambda p: evaluate.run_program(
                p["prompt"] + p.get(body, body), p["test"], p["entry_point"])[0], problems)
            return [p["task_id"] for p, passed in zip(problems, verdicts) if passed]

    assert len(problems) == 164
    assert len(run("canonical_solution")) == 164, "a right solution failed in the cage"
    assert run("    pass\n") == [], "an empty body was counted as right"


@needs_data
def test_no_stop_string_cuts_a_canonical_solution():
    for problem in evaluate.read_problems(os.environ["EVAL_DATA"]):
        solution = problem["canonical_solution"]
        assert evaluate.cut_at_stop(solution) == solution, problem["task_id"]


def test_a_completion_ends_at_the_first_stop_string():
    assert evaluate.cut_at_stop("    return 1\n\nprint(f())\ndef g(): pass") == "    return 1\n"
    assert evaluate.cut_at_stop("    if x:\n        return 1") == "    if x:\n        return 1"
