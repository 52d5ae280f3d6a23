"""Claims about the sandbox of evaluate.py: right programs pass, no attack does, nothing is left.

Each attack defines f so that f() == 1 only if the attack got through; check() asserts that. None
would do harm if it did get through: what kills only asks whether it could, what floods is bounded.
HARMLESS may return 1: what they do ends with the sandbox.
"""
import os
import shutil
import socket
import subprocess
import sys
import time
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import evaluate

CHECK = "def check(candidate):\n    assert candidate() == 1\n"
RIGHT = "def f():\n    return 1\n"
# Whether bubblewrap works at all here: if it does, evaluate.py's use of it has to work, too.
CAGED = bool(shutil.which("bwrap")) and subprocess.run(
    ["bwrap", "--unshare-pid", "--unshare-net", "--ro-bind", "/", "/", "true"],
    stderr=subprocess.DEVNULL).returncode == 0
needs_cage = pytest.mark.skipif(not CAGED, reason="bubblewrap is not installed or may not make "
                                "namespaces here: apt-get install bubblewrap")
needs_data = pytest.mark.skipif("EVAL_DATA" not in os.environ, reason="EVAL_DATA is not set: the "
                                "folder with humaneval/HumanEval.jsonl.gz")

# What fails, in the cage and with limits alone.
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
                          "        try: os.write(fd, b'passed')\n"
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
    for word in {x for x in seen if isinstance(x, str) and re.fullmatch('[0-9a-f]{64}', x)}:
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
    "a file elsewhere": "import os\ndef f():\n"
                        "    for place in ('/var/tmp/', '/dev/shm/', '/', HERE):\n"
                        "        try: open(place + 'MARKER', 'w'); return 1\n"
                        "        except OSError: pass",
    "the mounts made writable again": "import ctypes, os\ndef f():\n"
                                      "    attr = (ctypes.c_uint64 * 4)(0, 1, 0, 0)\n"
                                      "    libc = ctypes.CDLL(None)\n"
                                      "    libc.syscall(442, -100, b'/', 0x8000, attr, 32)\n"
                                      "    open(os.__file__, 'r+')\n    return 1",
    "the parent's environment": "import os, glob\ndef f():\n    found = set(os.environ) - "
                                "{'LC_CTYPE', 'LD_LIBRARY_PATH'}\n"
                                "    for path in glob.glob('/proc/*/environ'):\n"
                                "        try: found |= set(open(path, 'rb').read())\n"
                                "        except OSError: pass\n    return int(bool(found))",
    "a thread": "import threading\ndef f():\n    threading.Thread(target=int).start()\n"
                "    return 1",
    "the mode of what is open": "import os\ndef f():\n    os.fchmod(0, 0o666)\n    return 1",
    "room on the disk taken": "import os\ndef f():\n    for fd in range(3, 64):\n"
                              "        try: os.posix_fallocate(fd, 0, 1 << 20); return 1\n"
                              "        except OSError: pass",
    "a namespace of its own": "import ctypes\ndef f():\n"
                              "    return 1 + ctypes.CDLL(None).unshare(0x20000)",
    "a look at the user's files": "import os\ndef f():\n    return int(any(map(os.path.exists, "
                                  "('/etc', '/proc', '/dev', '/home', HERE)))"
                               "    or os.listdir('/tmp') != [])",
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
# What they do is allowed, and ends with the sandbox.
HARMLESS = {
    "every process killed": "import posix\ndef f():\n    posix.kill(-1, 0)\n    return 1",
    "shared memory": "import ctypes\ndef f():\n"
                     "    return int(ctypes.CDLL(None).shmget(0, 1 << 20, 0o1600) >= 0)",
    "many empty files": "def f():\n    for i in range(5000): open(str(i), 'w').close()\n"
                        "    return 1",
    "the parent killed": "import os\ndef f():\n    return int(os.getppid() > 1)",
    "a file in the memory": "def f():\n    open('/tmp/MARKER', 'w').close()\n    return 1",
    "its group killed": "import posix\nposix.kill(0, 9)\ndef f(): return 1",
}


@pytest.fixture
def survivors(monkeypatch):
    """A function that lists the processes still there that this test has started."""
    marker = uuid.uuid4().hex
    monkeypatch.setattr(evaluate, "RUN_TESTS", f"# {marker}\n{evaluate.RUN_TESTS}")

    def look(times: int = 40) -> list[str]:
        for _ in range(times):          # what was killed may take a moment to be gone
            found = []
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    if marker.encode() in path.read_bytes():
                        found.append(path.parent.name)
                except OSError:
                    pass
            if not found:
                break
            time.sleep(0.05)
        return found
    return look


def attack(program: str, survivors, caged: bool = True) -> bool:
    began = time.monotonic()
    passed = evaluate.run_program(program, CHECK, "f", caged, seconds=1)
    assert time.monotonic() - began < 5, "the clock of 1 second did not end it"
    assert not survivors(), "a process of the attack is still running: look at evaluate.CAGE"
    assert evaluate.run_program(RIGHT, CHECK, "f", caged), "after the attack a right program fails"
    return passed


@needs_cage
@pytest.mark.parametrize("name", [*ATTACKS, *CAGE_ATTACKS])
def test_no_attack_passes_or_leaves_the_cage(name, survivors):
    marker = Path(f"/tmp/{uuid.uuid4().hex}")
    program = (ATTACKS | CAGE_ATTACKS)[name].replace("MARKER", marker.name)
    passed = attack(program.replace("HERE", repr(__file__)), survivors)
    assert not passed, "the attack was counted as a right answer"
    assert not marker.exists(), "the attack wrote outside of the sandbox"


@needs_cage
@pytest.mark.parametrize("name", HARMLESS)
def test_what_is_allowed_in_the_cage_ends_with_it(name, survivors):
    marker = Path(f"/tmp/{uuid.uuid4().hex}")
    attack(HARMLESS[name].replace("MARKER", marker.name), survivors)
    assert not marker.exists(), "a file of the sandbox lies outside"


@pytest.mark.parametrize("name", ["exit(0) when it is called", "os._exit(0)", "an infinite loop",
                                  "8 GB of memory", "a printed 'passed'", "a file of 100 MB",
                                  "a long sleep", "the word looked for in memory"])
def test_no_attack_passes_with_limits_alone(name, survivors):
    assert evaluate.run_program(RIGHT, CHECK, "f", caged=False), "a right program fails uncaged"
    assert not attack(ATTACKS[name], survivors, caged=False)


@needs_cage
def test_nothing_goes_on_when_the_evaluation_is_killed(survivors):
    sleeper = "import ctypes, time\nctypes.CDLL(None).prctl(1, 0)\ntime.sleep(60)"
    script = (f"import evaluate; evaluate.RUN_TESTS = {evaluate.RUN_TESTS!r}\n"
              f"evaluate.run_program({sleeper!r}, {CHECK!r}, 'f', True, 60)")
    evaluation = subprocess.Popen([sys.executable, "-c", script],
                                  cwd=Path(evaluate.__file__).parent)
    while len(survivors(1)) < 3:        # bwrap, the first process of its namespace, the program
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
    assert not attack(
        "import socket\ndef f():\n"
        f"    socket.create_connection(('127.0.0.1', {port}), 1)\n    return 1", survivors)
    with server, pytest.raises(TimeoutError):
        server.accept()


@needs_cage
@pytest.mark.parametrize("path", ["/tmp/", "\0"])        # a file, and an abstract name
def test_no_attack_reaches_a_socket_of_this_machine(path, survivors):
    path += uuid.uuid4().hex
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(path)
        server.listen()
        assert not attack("import socket\ndef f():\n    socket.socket(socket.AF_UNIX).connect("
                          f"{path!r})\n    return 1", survivors)
    if not path.startswith("\0"):
        os.unlink(path)


@needs_cage
def test_no_shared_memory_outlives_the_cage(survivors):
    segments = Path("/proc/sysvipc/shm").read_text()
    attack(HARMLESS["shared memory"], survivors)
    assert Path("/proc/sysvipc/shm").read_text() == segments, "a segment was left on this machine"


@needs_cage
def test_a_program_in_the_cage_has_a_session_of_its_own():
    program = "import os\ndef f():\n    return int(os.getsid(0) > 0)"      # 0: one from outside
    assert evaluate.run_program(program, CHECK, "f"), "it could type into the user's terminal"


@needs_cage
def test_attacks_side_by_side_do_not_change_each_other(survivors):
    programs = [ATTACKS["a file of 100 MB"], ATTACKS["an infinite loop"], RIGHT, RIGHT]
    with ThreadPoolExecutor(4) as pool:
        passed = list(pool.map(lambda p: evaluate.run_program(p, CHECK, "f", seconds=2), programs))
    assert passed == [False, False, True, True]
    assert not survivors(), "something was left running"


def test_nothing_is_left_on_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(evaluate.tempfile, "tempdir", str(tmp_path))
    for caged in [False] + [True] * CAGED:
        for program in (ATTACKS["a file of 100 MB"], ATTACKS["everything open written to, without "
                                                             "an end"], RIGHT):
            evaluate.run_program(program, CHECK, "f", caged, seconds=1)
    assert not list(tmp_path.iterdir())


@needs_cage
@pytest.mark.parametrize("program", [
    "from __future__ import annotations\nfrom dataclasses import dataclass\n"
    "@dataclass\nclass P:\n    x: int\ndef f():\n    return P(1).x",
    "import asyncio, collections, decimal, hashlib, heapq, itertools, json, math, random, re, "
    "tempfile, typing\ndef f():\n    tempfile.TemporaryFile().write(b'x')\n    return 1",
    "def f():\n    return 1 \\",
    "def f():\n    print('x' * 10**7, flush=True)\n    return 1",
    "def f():\n    open('a', 'w').write('b')\n    return 1",
    "def f():\n    try:\n        input()\n    except EOFError:\n        return 1",
])
def test_what_right_programs_need_is_there(program):
    assert evaluate.run_program(program, CHECK, "f")


@pytest.mark.slow
@needs_data
@needs_cage
def test_every_canonical_solution_passes_and_every_empty_body_fails():
    path = Path(os.environ["EVAL_DATA"]) / "humaneval" / "HumanEval.jsonl.gz"
    bodies = evaluate.read_rows(path, lambda row: row["canonical_solution"], "")
    problems = evaluate.read_problems(os.environ["EVAL_DATA"])
    assert len(problems) == 164
    assert sum(evaluate.judge(problems, bodies, 1, True)[0]) == 164, \
        "a right solution failed in the cage"
    assert sum(evaluate.judge(problems, ["    pass\n"] * 164, 1, True)[0]) == 0, \
        "an empty body was counted as right"


# --------------------------------------------------------------------- where there is no sandbox

def fake_bwrap(folder: Path, script: str, monkeypatch) -> None:
    (folder / "bwrap").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "bwrap").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)


def test_a_missing_bubblewrap_is_named_with_its_remedy(tmp_path, monkeypatch):
    (tmp_path / "env").symlink_to(shutil.which("env"))
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ValueError, match="env: .bwrap.: No such file or directory .if bwrap is "
                       "missing, apt-get install bubblewrap; .*--uncaged"):
        evaluate.check_cage(True)


def test_refused_namespaces_are_named_as_the_cause(tmp_path, monkeypatch):
    fake_bwrap(tmp_path, "echo 'bwrap: No permissions to create a new namespace' >&2; exit 1",
               monkeypatch)
    with pytest.raises(ValueError, match="bwrap: No permissions to create a new namespace .*if "
                       "namespaces are refused, have the container or kernel allow them"):
        evaluate.check_cage(True)


def test_a_library_that_is_missing_in_the_sandbox_is_named(tmp_path, monkeypatch):
    fake_bwrap(tmp_path, "echo 'python3: error while loading shared libraries: libpython3.so.1: "
               "cannot open' >&2; exit 127", monkeypatch)
    with pytest.raises(ValueError, match="libpython3.so.1"):
        evaluate.check_cage(True)


@needs_cage
def test_a_python_that_needs_a_library_path_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path / "lib") + ":")
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "marker").write_text("")
    assert evaluate.run_program(
        f"import os\ndef f():\n    return int(os.path.exists({str(tmp_path / 'lib' / 'marker')!r})"
        f" and os.environ['LD_LIBRARY_PATH'] == {str(tmp_path / 'lib') + ':'!r})", CHECK, "f")
    evaluate.check_cage(True)


@needs_cage
def test_what_is_mounted_cannot_be_written_even_by_its_owner(tmp_path, monkeypatch):
    monkeypatch.setenv("LD_LIBRARY_PATH", str(tmp_path))
    tmp_path.chmod(0o777)
    assert not evaluate.run_program(
        f"def f():\n    open({str(tmp_path / 'new')!r}, 'w')\n    return 1", CHECK, "f")
    assert not list(tmp_path.iterdir())


def test_a_program_that_could_not_be_started_is_not_counted_as_wrong(monkeypatch):
    def start(*args, **settings):
        raise BlockingIOError("no more processes")
    monkeypatch.setattr(evaluate.subprocess, "run", start)
    with pytest.raises(BlockingIOError):
        evaluate.run_program(RIGHT, CHECK, "f")
