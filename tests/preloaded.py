"""Notebooks in processes that have torch and this library loaded already, which saves each of them seconds."""

import json
import multiprocessing
import os
import time
from functools import partial
from pathlib import Path

import psutil
from jupyter_client.provisioning import local_provisioner

FRESH = multiprocessing.get_context("forkserver")  # a process for each notebook, and one import of torch for all
FRESH.set_forkserver_preload(["condexp.runs", "condexp.records", "nbdev.test", "papermill.cli", "ipykernel.kernelapp"])


class Forked:
    "What Jupyter asks of a kernel's process."

    stdin = stdout = stderr = None

    def __init__(self, pid: int):
        self.pid, self.returncode = pid, None

    def poll(self) -> int | None:
        if self.returncode is None and (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            self.returncode = os.waitstatus_to_exitcode(ended[1])
        return self.returncode

    def wait(self) -> int:
        while self.poll() is None:
            time.sleep(0.01)
        return self.returncode

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)


def waiting_kernel():
    "A kernel that is forked now, and a function in the place of Jupyter's own that starts it."
    receive, send = os.pipe()
    if pid := os.fork():
        os.close(receive)
        os.setpgid(pid, pid)

        def launch(command: list[str], **_) -> Forked:
            with os.fdopen(send, "w") as pipe:
                json.dump(command[command.index("ipykernel_launcher") + 1 :], pipe)
            return Forked(pid)

        return launch
    os.close(send)
    asked = b"".join(iter(partial(os.read, receive, 4096), b""))
    if asked:
        from ipykernel.kernelapp import IPKernelApp

        IPKernelApp.launch_instance([*json.loads(asked), f"--IPKernelApp.parent_handle={os.getppid()}"])
    os._exit(0)


def papermill(arguments: list[str], folder: Path, environment: dict[str, str], log: Path) -> None:
    "What the command papermill does, its output in a file."
    from papermill.cli import papermill as command

    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(output, stream)
    local_provisioner.launch_kernel = waiting_kernel()
    command(arguments)


def run_papermill(arguments: list[str], folder: Path, environment: dict[str, str], log: Path, seconds: int) -> int:
    "Run a notebook by papermill; its exit status."
    process = FRESH.Process(target=papermill, args=(arguments, folder, environment, log))
    process.start()
    process.join(seconds)
    if process.is_alive():
        for one in (*psutil.Process(process.pid).children(recursive=True), process):
            one.kill()
        raise TimeoutError(f"papermill takes more than {seconds} s")
    return process.exitcode
