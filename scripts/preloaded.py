"""Fresh processes without the four to eight seconds that loading torch, transformers and trl takes in each.

A server loads those libraries once, never weftlora, and then forks itself for every request: a program with its arguments,
folder, environment and open files. What importing weftlora does, or needs, is seen in each process as in a new one.

    preloaded.py serve ADDRESS LIBRARY ...          (the server; ADDRESS is a socket to be made)
    preloaded.py ask ADDRESS PROGRAM ARGUMENT ...   run PROGRAM there, with the folder and files of this process

PROGRAM is `module:function`, as in an entry point. Its process, and what it started, is killed when the caller goes.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import importlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

LIBRARIES = ("torch", "peft", "transformers.trainer", "datasets", "trl.trainer.sft_trainer")
DIED = 70
"""The exit code of a request whose process left no exit code."""


def ask(
    address: str,
    program: str,
    arguments: Sequence[str],
    *,
    files: Sequence[int] = (0, 1, 2),
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
    seconds: float | None = None,
) -> int:
    """The exit code of `program` in a process forked from the server at `address`.

    `files` become its stdin, stdout and stderr. Raises TimeoutError after `seconds`; the process is then killed.
    """
    request = {
        "program": program,
        "arguments": list(arguments),
        "folder": str(folder or Path.cwd()),
        "environment": dict(os.environ if environment is None else environment),
    }
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(address)
        socket.send_fds(line, [b"\n"], list(files))
        line.sendall(json.dumps(request).encode() + b"\n")
        line.settimeout(seconds)
        return int(line.recv(16) or DIED)


@contextlib.contextmanager
def server(libraries: Sequence[str] = LIBRARIES) -> Iterator[str]:
    """The address of a server that has loaded `libraries`, for as long as the context lasts."""
    with tempfile.TemporaryDirectory(prefix="weft-preloaded-") as folder:
        address = f"{folder}/socket"
        command = [sys.executable, __file__, "serve", address, *libraries]
        with subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE) as process:
            try:
                if b"ready\n" not in iter(process.stdout.readline, b""):
                    raise RuntimeError(f"this server did not start: {shlex.join(command)}")
                yield address
            finally:
                process.terminate()


def serve(address: str, libraries: Sequence[str]) -> Callable[[], object]:
    """Answer requests until killed. Returns in the forked processes only: what to run there."""
    for library in libraries:
        importlib.import_module(library)
    gc.collect()
    gc.freeze()  # no child walks, and so copies, what it shares with the server
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(address)
        listener.listen()
        print("ready", flush=True)
        while True:
            line, _ = listener.accept()
            if os.fork() == 0:
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                listener.close()
                return _answer(line)
            line.close()


def _answer(line: socket.socket) -> Callable[[], object]:
    """Prepare the request on `line` in a process of its own, and return there; this one waits for it, and ends."""
    _, files, _, _ = socket.recv_fds(line, 1, 3)
    with line.makefile("rb") as reader:
        request = json.loads(reader.readline())
    started = os.fork()
    if started:
        for file in files:
            os.close(file)
        threading.Thread(target=_kill_on_hanging_up, args=(line, started), daemon=True).start()
        code = os.waitstatus_to_exitcode(os.waitpid(started, 0)[1])
        with contextlib.suppress(OSError):  # nobody is left to be told
            line.sendall(str(code if code >= 0 else 128 - code).encode())
        os._exit(0)
    os.setsid()
    line.close()
    for file, standard in zip(files, (0, 1, 2), strict=True):
        os.dup2(file, standard)
        os.close(file)
    os.chdir(request["folder"])
    os.environ.clear()
    os.environ.update(request["environment"])
    module, function = request["program"].split(":")
    sys.argv = [module, *request["arguments"]]
    return lambda: getattr(importlib.import_module(module), function)()


def _kill_on_hanging_up(line: socket.socket, started: int) -> None:
    with contextlib.suppress(OSError):
        line.recv(1)
        os.killpg(started, signal.SIGKILL)


def _end_with(program: Callable[[], object]) -> NoReturn:
    """Run `program` and end as an interpreter does, but without taking apart, object by object, what the server loaded."""
    try:
        code = program()
    except SystemExit as end:
        code = end.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        code = 1
    if isinstance(code, str):
        print(code, file=sys.stderr)
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code or 0)


def main() -> None:
    match sys.argv[1:]:
        case ["serve", address, *libraries]:
            _end_with(serve(address, libraries))
        case ["ask", address, program, *arguments]:
            sys.exit(ask(address, program, arguments))
    sys.exit(__doc__)


if __name__ == "__main__":
    main()
