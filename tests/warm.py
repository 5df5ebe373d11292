"""A `python` whose libraries are imported already: a script starts at once, and still in a process of its own.

A short training run takes 18 s of CPU; 13 of them import torch, trl and Unsloth. Here a server imports them once a
session and forks for each run. The fork takes over its caller's arguments, folder, environment and streams, and runs
the script as `python script.py` does. Signals reach it, and its exit code is the caller's.

`python()` is the path to use instead of `sys.executable`; the workers of pytest-xdist share it. Where a fresh
interpreter is what is tested (what libraries print when they are imported, that Unsloth comes first, processes that are
killed), tests use `sys.executable`.

There are two servers, since Unsloth patches the other libraries: a run that uses it is forked from the one that has it.
"""

import atexit
import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import shutil
import socket
import sys
import tempfile
import weakref
from pathlib import Path

LIBRARIES = [
    *("torch", "datasets", "trl", "trl.trainer.grpo_trainer", "peft", "bitsandbytes", "matplotlib.pyplot"),
    *("rich.console", "rich.table", "jinja2", "sentencex", "psutil", "pandas"),
]
# As cli.run sets them, before the libraries are imported.
QUIET = {
    "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_VERBOSITY": "error", "DATASETS_VERBOSITY": "critical",
}  # fmt: skip

SHARED = "PPL_TESTS_PYTHON"  # a worker of pytest-xdist inherits it from the process that starts the workers

CLIENT = """#!{python} -SE
import fcntl, json, os, signal, socket, sys

argv = sys.argv[1:]
text = " ".join(argv)
if argv[:1] == ["-u"]:  # as torchrun starts its processes
    os.environ["PYTHONUNBUFFERED"] = "1"
    del argv[0]
if not argv or argv[0].startswith("-") and argv[0] not in ("-c", "-m"):
    os.execv({python!r}, [{python!r}, *argv])
names = ("unsloth.py", "unsloth import", "import unsloth", "from unsloth", "GRPO 8B, Unsloth")
unsloth = "--load_in_4bit" in argv or any(name in text for name in names)
address = {folder!r} + ("/unsloth" if unsloth and "--no_unsloth" not in argv else "/plain")
with open(address + ".lock", "w") as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not os.path.exists(address):
        import subprocess, time
        with open(address + ".log", "w") as log:
            server = subprocess.Popen(
                [{python!r}, {server!r}, address, {owner!r}],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True,
            )
        while not os.path.exists(address):
            assert server.poll() is None, open(address + ".log").read()
            time.sleep(0.02)
with socket.socket(socket.AF_UNIX) as connection:
    connection.connect(address)
    request = json.dumps([argv, os.getcwd(), dict(os.environ)]).encode() + b"\\0"
    socket.send_fds(connection, [request], [0, 1, 2])
    answers = connection.makefile()
    pid = int(answers.readline())
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, _: os.kill(pid, number))
    code = int(answers.readline())
if code < 0:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


def python() -> str:
    """The path of the executable. Its servers start when they are first needed and end with the tests."""
    if SHARED in os.environ:
        return os.environ[SHARED]
    folder = tempfile.mkdtemp(prefix="warm-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    path = Path(folder, "python")
    path.write_text(
        CLIENT.format(python=sys.executable, folder=folder, server=str(Path(__file__)), owner=str(os.getpid()))
    )
    # For a shell whose PATH begins with this folder: TRL's command, which starts Python two times.
    trl = path.with_name("trl")
    trl.write_text(f"#!{path}\nfrom trl.cli import main\n\nmain()\n")
    for executable in (path, trl):
        executable.chmod(0o755)
    os.environ[SHARED] = str(path)
    return str(path)


# --- the server ------------------------------------------------------------------------------------------------------


def serve(address: str, owner: int) -> list:
    """Fork for each request until the owner has ended. Returns in the forks only: arguments, folder, environment."""
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(address + ".new")
        server.listen()
        server.settimeout(1)
        os.rename(address + ".new", address)  # from here on it answers
        while alive(owner):
            with contextlib.suppress(TimeoutError):
                connection, _ = server.accept()
                if os.fork() == 0:
                    server.close()
                    return accept(connection)
                connection.close()
            with contextlib.suppress(ChildProcessError):
                while os.waitpid(-1, os.WNOHANG) != (0, 0):
                    pass
    sys.exit()


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def accept(connection: socket.socket) -> list:
    """One more fork: its parent tells the caller its number and its exit code, itself becomes what was requested."""
    connection.settimeout(None)
    message, streams, *_ = socket.recv_fds(connection, 1 << 20, 3)
    while not message.endswith(b"\0"):
        message += connection.recv(1 << 20)
    if pid := os.fork():
        connection.sendall(f"{pid}\n".encode())
        _, status = os.waitpid(pid, 0)
        connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
        os._exit(0)
    connection.close()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    return json.loads(message[:-1])


def become(argv: list[str], folder: str, environment: dict[str, str]) -> None:
    """What the interpreter does between its start and the first line of a script."""
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    unbuffered = bool(environment.get("PYTHONUNBUFFERED"))
    sys.stdin = io.TextIOWrapper(io.FileIO(0))
    sys.stderr = io.TextIOWrapper(io.FileIO(2, "w"), errors="backslashreplace", line_buffering=True)
    sys.stdout = io.TextIOWrapper(io.FileIO(1, "w"), write_through=unbuffered, line_buffering=os.isatty(1))
    sys.argv = argv if argv[0] not in ("-c", "-m") else [argv[0], *argv[2:]]
    more = [folder for folder in environment.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = ["" if argv[0] in ("-c", "-m") else str(Path(argv[0]).resolve().parent), *more]


def without_unsloth() -> None:
    """At the end of a run: imported after the others, Unsloth would not have been what it is to a user."""
    if "unsloth" in sys.modules:
        print(f"tests/warm.py took {sys.argv} for a run without Unsloth, and it imported it", file=sys.stderr)
        os._exit(70)


def main(address: str, owner: str) -> None:
    os.environ.update(QUIET)
    unsloth = address.endswith("unsloth")
    tempfile.tempdir = str(Path(address).parent)
    for name in (["unsloth"] if unsloth else []) + LIBRARIES:
        importlib.import_module(name)
    tempfile.tempdir = None
    for finalizer in weakref.finalize._registry:
        finalizer.atexit = False  # the end of one fork does not remove the folders that libraries made on import
    atexit.unregister(importlib.import_module("wandb.sdk.data_types._private").MEDIA_TMP.cleanup)
    gc.freeze()  # a fork's collections do not touch, and so do not copy, what is here
    argv, *rest = serve(address, int(owner))
    become(argv, *rest)
    sys.executable = str(Path(address).with_name("python"))  # a script that starts another one
    if not unsloth:
        atexit.register(without_unsloth)
    if argv[0] == "-c":
        exec(compile(argv[1], "<string>", "exec"), {"__name__": "__main__"})
    elif argv[0] == "-m":
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(argv[0], run_name="__main__")


if __name__ == "__main__":
    main(*sys.argv[1:])
