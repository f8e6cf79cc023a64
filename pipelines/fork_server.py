"""Runs the tasks of a local run as forks of one process that has already imported torch and transformers.

kfp.local starts a new interpreter for each task, and the imports of seven interpreters take longer than a small round.
Each task is still a process of its own, with its own memory, environment and exit code. `preloaded_python` starts a
server that only imports, and provides an executable that replaces `python`: it asks the server for a fork with its
arguments, environment, working folder and output.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clincot.processes import end_with_parent

_FD_COUNT = 3  # stdin, stdout, stderr
# The client uses only the standard library, without site-packages, so that it starts in a few hundredths of a second.
_CLIENT_SCRIPT = """\
#!{python} -IS
import array, json, os, socket, sys
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect({address!r})
    about = json.dumps([sys.argv[1:], dict(os.environ), os.getcwd()]).encode()
    fds = array.array("i", [0, 1, 2])
    connection.sendmsg([len(about).to_bytes(8, "big")], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])
    connection.sendall(about)
    sys.exit(int(connection.recv(16) or b"1"))
"""


@contextmanager
def preloaded_python() -> Iterator[Path]:
    """Yield an executable that runs `-m MODULE ARGUMENTS` in a fork of a server, which ends with the block."""
    folder = Path(tempfile.mkdtemp(prefix="clincot-"))  # the address of a socket is limited to about 100 characters
    address, executable = folder / "server.sock", folder / "python3"
    executable.write_text(_CLIENT_SCRIPT.format(python=sys.executable, address=str(address)), encoding="utf-8")
    executable.chmod(0o755)
    with subprocess.Popen(
        [sys.executable, "-m", "clincot.pipelines.fork_server", str(address), str(os.getpid())],
        stdout=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
    ) as server:
        try:
            if server.stdout is None or server.stdout.readline() != b"ready\n":
                raise RuntimeError("the server of preloaded interpreters did not start; see its error above")
            yield executable
        finally:
            server.terminate()
            shutil.rmtree(folder, ignore_errors=True)


def serve_forks(address: str, parent: int) -> None:
    """Import the libraries, then fork for each request until the process `parent` ends, however it ends."""
    end_with_parent(parent=parent)
    import trl  # noqa: F401

    import clincot.evaluation.evaluator
    import clincot.models.load
    import clincot.models.vlm
    import clincot.pipelines.tasks
    import clincot.storage.s3
    import clincot.training.margin_dpo

    clincot.storage.s3.get_model_loader()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        sys.stdout.write("ready\n")
        sys.stdout.flush()
        while True:
            connection, _ = listening.accept()
            child = os.fork()
            if child == 0:
                listening.close()
                _handle_fork(connection)
            connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG)[0]:
                    pass


def _handle_fork(connection: socket.socket) -> None:
    """Serve one request in the fork: a second fork does the work; this one reports its exit code.

    If the client dies, the second fork is killed.
    """
    arguments, environment, folder, fds = _receive_request(connection)
    worker = os.fork()
    if worker == 0:
        connection.close()
        for number, fd in enumerate(fds):
            os.dup2(fd, number)
        os._exit(_run_module(arguments, environment, folder))
    for fd in fds:
        os.close(fd)

    def kill_with_client() -> None:
        if connection.recv(1) == b"":
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker, signal.SIGKILL)

    threading.Thread(target=kill_with_client, daemon=True).start()
    _, status = os.waitpid(worker, 0)
    code = os.waitstatus_to_exitcode(status)
    with contextlib.suppress(OSError):
        connection.sendall(str(code if code >= 0 else 128 - code).encode())
    os._exit(0)


def _receive_request(connection: socket.socket) -> tuple[list[str], dict[str, str], str, list[int]]:
    length, ancillary, _, _ = connection.recvmsg(8, socket.CMSG_LEN(_FD_COUNT * 4))
    fds = array.array("i")
    fds.frombytes(ancillary[0][2][: _FD_COUNT * 4])
    content = b""
    while len(content) < int.from_bytes(length, "big"):
        content += connection.recv(1 << 16)
    arguments, environment, folder = json.loads(content)
    return arguments, environment, folder, list(fds)


def _run_module(arguments: list[str], environment: dict[str, str], folder: str) -> int:
    """Do what `python -m MODULE …` does; return the exit code."""
    flag, module, *rest = arguments
    if flag != "-m":
        raise ValueError(f"a preloaded interpreter only runs modules (-m), got {flag}")
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [module, *rest]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code: Any = 0
    except SystemExit as ended:
        code = ended.code
        if isinstance(code, str):
            print(code, file=sys.stderr)
            code = 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(code or 0)


if __name__ == "__main__":
    serve_forks(sys.argv[1], int(sys.argv[2]))
