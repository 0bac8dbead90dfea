"""What several tests share: a cache of their own, a small teacher of digits, tiny sets of photographs, papermill."""

import atexit
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

THREADS = "1"  # a thread a process: what runs side by side does not fight for cores, and sums come out the same
if "PYTEST_XDIST_WORKER" not in os.environ:  # one cache for all processes: what one has made, the others load
    os.environ["CONDEXP_CACHE"] = tempfile.mkdtemp(prefix="condexp-tests-")
    atexit.register(shutil.rmtree, os.environ["CONDEXP_CACHE"], ignore_errors=True)
os.environ |= {"OMP_NUM_THREADS": THREADS, "MKL_NUM_THREADS": THREADS, "MPLBACKEND": "agg"}

if sys.dont_write_bytecode and "PYTHONPYCACHEPREFIX" not in os.environ:  # some machines keep no compiled modules,
    modules = tempfile.mkdtemp(prefix="condexp-modules-")  # and each process would compile torch for itself
    atexit.register(shutil.rmtree, modules, ignore_errors=True)
    sys.dont_write_bytecode, sys.pycache_prefix = False, modules
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    os.environ["PYTHONPYCACHEPREFIX"] = modules

import numpy as np
import pytest
import torch
from PIL import Image
from preloaded import run_papermill
from sklearn.datasets import load_sample_images
from xdist.scheduler import LoadScopeScheduling

from condexp.cache import Checkpoint
from condexp.data import load_splits, random_per_class
from condexp.models import freeze, save_classifier
from condexp.training import Schedule, make_fabric, train_classifier

ROOT = Path(__file__).parent.parent
torch.set_num_threads(int(THREADS))


class ByRun(LoadScopeScheduling):
    "Tests that look at one run of a notebook go to one process, which runs it once; all others go anywhere."

    def _split_scope(self, nodeid: str) -> str:
        module = nodeid.split("::")[0]
        return module if Path(module).name.startswith("test_run_") else nodeid


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    return ByRun(config, log)


def pytest_collection_modifyitems(items):
    "What takes long comes first, so that no process is left with it at the end."
    long = "test_run_kd", "test_every_assertion", "test_papermill_ends"
    items.sort(key=lambda item: not any(name in item.nodeid for name in long))


@pytest.fixture(scope="session")
def fabric():
    return make_fabric("cpu", "32")


@pytest.fixture(scope="session")
def digits():
    "Handwritten digits at 16 x 16."
    return load_splits("digits", 16)


@pytest.fixture(scope="session")
def trained(digits, fabric):
    "A small teacher of digits and its metadata."
    teacher, meta = train_classifier(
        "wrn_16_1", digits, Schedule(epochs=4, steps=40, batch_size=64, lr=0.2), seed=0, fabric=fabric
    )
    assert meta["accuracy"] > 94
    return freeze(teacher), meta


@pytest.fixture
def teacher(trained):
    return trained[0]


@pytest.fixture(scope="session")
def teacher_file(trained, tmp_path_factory):
    path = tmp_path_factory.mktemp("teacher") / "digits.safetensors"
    save_classifier(path, *trained)
    return path


@pytest.fixture(scope="session")
def condensed(digits):
    "Ten real images a class, in the place of condensed ones."
    return random_per_class(digits.train, 10, seed=0)


@pytest.fixture(scope="session")
def photographs():
    "The two photographs that come with scikit-learn."
    return dict(zip(("china", "flower"), load_sample_images().images, strict=True))


@pytest.fixture
def folder(photographs, tmp_path):
    "Makes a folder of class folders: crops of the photographs, of any size, mode and number."

    def make(
        name="photos", parts=("train", "test"), classes=("china", "flower"), each=6, size=24, mode="RGB", suffix="png"
    ):
        rng = np.random.default_rng(0)
        for part in parts:
            for kind in classes:
                target = tmp_path / name / part / kind
                target.mkdir(parents=True)
                for i in range(each):
                    top, left = rng.integers(0, 300, 2)
                    crop = photographs[kind][top : top + size, left : left + size + i % 3]
                    Image.fromarray(crop).convert(mode).save(target / f"{i}.{suffix}")
        return tmp_path / name

    return make


class Killed(Checkpoint):
    "A checkpoint after whose first save the process dies."

    def save(self, state, every=0.0):
        super().save(state, every)
        raise KeyboardInterrupt


class Papermill:
    "Runs a notebook by papermill in a process of its own."

    def __init__(self, folder: Path, cache: Path | None = None):
        self.folder, self.environment = folder, os.environ | ({"CONDEXP_CACHE": str(cache)} if cache else {})
        self.cache = Path(self.environment["CONDEXP_CACHE"])

    def arguments(self, notebook: str, **parameters) -> list[str]:
        asked = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
        return [str(ROOT / f"nbs/{notebook}.ipynb"), "out.ipynb", *asked]

    def start(self, notebook: str, **parameters) -> subprocess.Popen:
        "Begin a run, by the command that a user gives."
        command = [sys.executable, "-m", "papermill", *self.arguments(notebook, **parameters)]
        pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen(command, cwd=self.folder, env=self.environment, **pipes)

    def as_a_user(self, notebook: str, **parameters) -> subprocess.CompletedProcess:
        process = self.start(notebook, **parameters)
        output, _ = process.communicate(timeout=300)
        return subprocess.CompletedProcess(process.args, process.returncode, output)

    def __call__(self, notebook: str, **parameters) -> subprocess.CompletedProcess:
        "The same, by a Python and a kernel that have loaded torch already."
        arguments, log = self.arguments(notebook, **parameters), self.folder / "papermill.log"
        status = run_papermill(arguments, self.folder, self.environment, log, seconds=300)
        return subprocess.CompletedProcess(arguments, status, log.read_text())


@pytest.fixture
def papermill(tmp_path):
    return Papermill(tmp_path)
