"""Processes that start at once: forks of one that has PyTorch in it already.

Importing PyTorch takes three seconds of a core, and the tests that kill, interrupt and mutate start
a hundred and fifty processes. `Fork` stands for subprocess.Popen there. The process that is forked
is a server that has run nothing: a fork of pytest itself would inherit threads and locks. Each fork
imports the project's scripts for itself.

    process = Fork(["train.py", "--steps", "10"], {"PYTHONPATH": "."})
"""
import atexit
import functools
import json
import os
import resource
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import threading
import traceback
from pathlib import Path


class Fork:
    """A running `python *arguments`, with the part of subprocess.Popen's interface that is needed.
    Standard output and error are one stream of text."""

    def __init__(self, arguments: list, environment: dict = {}, cwd=".", ignored: tuple = (),
                 file_size: int = resource.RLIM_INFINITY):
        request = [list(map(str, arguments)), environment, str(Path(cwd).resolve()), ignored,
                   file_size]
        ours, theirs = os.pipe()
        self.status, status = os.pipe()
        socket.send_fds(server(), [json.dumps(request).encode()], [theirs, status])
        os.close(theirs)
        os.close(status)
        self.stdout, self.returncode = open(ours), None
        self.pid = self.number()

    def number(self) -> int:
        return struct.unpack("q", os.read(self.status, 8))[0]

    def poll(self, timeout: float | None = 0) -> int | None:
        if self.returncode is None and select.select([self.status], [], [], timeout)[0]:
            self.returncode = self.number()
            os.close(self.status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.poll(timeout) is None:
            raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
        return self.returncode

    def communicate(self, timeout: float = 300) -> tuple[str, None]:
        """The rest of its output, once it has ended; a process that takes too long is killed."""
        late = threading.Timer(timeout, self.kill)
        late.start()
        with self.stdout:
            output = self.stdout.read()
        self.wait()
        late.cancel()
        return output, None

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


@functools.cache
def server() -> socket.socket:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        process = subprocess.Popen(
            [sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": ""}, start_new_session=True)

    def end() -> None:
        ours.close()
        process.wait()
    atexit.register(end)
    return ours


# ----------------------------------------------------------------------- what runs in the server

def serve(connection: socket.socket) -> None:
    import pytest, tiktoken, torch, torch._dynamo, torch.distributed    # noqa: E401, F401
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)       # no one waits for the keepers
    while True:
        request, handles, _, _ = socket.recv_fds(connection, 1 << 20, 2)
        if not request:                 # the tests have ended, if only by a kill
            os.killpg(0, signal.SIGKILL)
        if os.fork() == 0:
            connection.close()
            keep(json.loads(request), *handles)
        for handle in handles:
            os.close(handle)


def keep(request: list, output: int, status: int) -> None:
    """Fork the process, tell its number, and when it has ended, its exit code."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    pid = os.fork()
    if pid == 0:
        os.close(status)
        os.dup2(output, 1)
        os.dup2(output, 2)
        os.close(output)
        become(*request)
    os.close(output)
    os.write(status, struct.pack("q", pid))
    os.write(status, struct.pack("q", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])))
    os._exit(0)


def become(arguments: list, environment: dict, cwd: str, ignored: list, file_size: int) -> None:
    """Do what `python *arguments` does, and end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (file_size, file_size))
    os.chdir(cwd)
    os.environ.update(environment)
    encoding = os.environ.get("PYTHONIOENCODING", "utf-8")
    sys.stdout, sys.stderr = (open(n, "w", encoding=encoding, errors=errors, closefd=False)
                              for n, errors in ((1, "strict"), (2, "backslashreplace")))
    sys.argv = arguments
    sys.path[:1] = [str(Path(arguments[0]).resolve().parent),
                    *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    code = 0
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
