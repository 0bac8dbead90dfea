"""What every side of the comparison uses: shapes, images, clocks, and a way to import a clone."""

import importlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from condexp.data import ImageSet
from PIL import Image
from torch import Tensor

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # CIFAR-10's
Measure = Callable[[], dict[str, float]]  # does the work once; seconds by row of the table


@dataclass(frozen=True)
class Shapes:
    "How large everything is, the same for all sides."

    teacher: str = "wrn_40_2"
    student: str = "wrn_16_1"
    size: int = 32  # pixels
    classes: int = 10
    batch: int = 64  # images a synthesised batch, a student step, an attack (published: 128 to 256)
    cmi_steps: int = 2  # generator steps that are timed (published: 200 a batch)
    fast_steps: int = 2  # a batch (published: 2, 5 and 10)
    negatives: int = 4096  # of CMI's bank, when it is full enough
    ipc: int = 10  # condensed images per class, in a ConvNet of width 128
    dm_real: int = 32  # real images of each class (published: 256)
    dsa_real: int = 32  # likewise (published: 256)
    dsa_inner: int = 2  # steps of the network after a matching (published: 50)
    mtt_syn: int = 50  # synthetic images a step of the student (published: 100, all of them)
    mtt_steps: int = 3  # of the student (published: 30)
    student_steps: int = 2  # that are timed together
    pictures: int = 500  # of the set that is loaded


PUBLISHED = Shapes(
    batch=128, cmi_steps=20, fast_steps=5, dm_real=256, dsa_real=256, dsa_inner=50, mtt_syn=100, mtt_steps=30, student_steps=50
)  # for a GPU; CMI's batches are cut short all the same
TINY = Shapes("wrn_16_1", "wrn_16_1", 16, batch=4, negatives=64, ipc=10, dm_real=20, dsa_real=4, dsa_inner=1, mtt_syn=4)


def images_like(shapes: Shapes, per_class: int = 256) -> ImageSet:
    "Smooth random images, class by class: what they show does not change how long anything takes."
    count = shapes.classes * per_class
    small = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    images = (F.interpolate(small, size=shapes.size, mode="bilinear") * 255).to(torch.uint8)
    labels = torch.arange(shapes.classes).repeat_interleave(per_class)
    return ImageSet(images, labels, tuple(f"class{c}" for c in range(shapes.classes)), MEAN, STD)


def write_pictures(folder: Path, shapes: Shapes) -> Path:
    "A set of PNG files in folders of classes."
    images = images_like(shapes, shapes.pictures // shapes.classes)
    for i, (image, label) in enumerate(zip(images.images, images.labels.tolist(), strict=True)):
        path = folder / images.classes[label] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    return folder


def cpu_time() -> float:
    "Seconds that this process and those it has waited for have computed."
    return time.process_time() + sum(os.times()[2:4])


def wall_time() -> float:
    "Seconds by the clock on the wall, after a GPU has finished what it was given."
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCK = wall_time  # or `cpu_time`, on a machine that others use: set by `compare.py`


def seconds(work: Callable[[], object]) -> float:
    "How long `work` takes."
    began = CLOCK()
    work()
    return CLOCK() - began


def seconds_to_import(what: str, paths: tuple[str, ...] = ()) -> float:
    "How long a new Python takes to start and to import."
    code = f"import sys; sys.path[:0] = {list(paths)!r}; import {what}"
    return seconds(lambda: subprocess.run([sys.executable, "-c", code], check=True, capture_output=True))


class Ticks:
    "The moments at which functions were called: an iteration lasts from one to the next."

    def __init__(self):
        self.times: list[float] = []

    def on(self, function: Callable) -> Callable:
        "`function`, which is now heard."

        def heard(*args, **kwargs):
            self.times.append(CLOCK())
            return function(*args, **kwargs)

        return heard

    def mean(self) -> float:
        "Seconds an iteration."
        return (self.times[-1] - self.times[0]) / (len(self.times) - 1)


def iteration_and_batch(row: str, iteration: float, batch: float) -> dict[str, float]:
    "The rows of an inversion; CMI's batches are cut short here, so that a whole one is not timed."
    whole = {} if row.startswith("CMI") else {f"{row} batch": batch}
    return {f"{row} iteration": iteration} | whole


def import_clone(path: Path, *names: str) -> list:
    "Modules of a clone, which other clones may call by the same names: they are forgotten afterwards."
    sys.path.insert(0, str(path))
    try:
        return [importlib.import_module(name) for name in names]
    finally:
        sys.path.remove(str(path))
        for name, module in list(sys.modules.items()):
            file = getattr(module, "__file__", None)
            if file and Path(file).is_relative_to(path):
                del sys.modules[name]


@contextmanager
def without_cuda() -> Iterator[None]:
    "`.cuda()` leaves everything where it is while the block runs; nothing changes where there is a GPU."
    if torch.cuda.is_available():
        yield
        return
    kept = Tensor.cuda, torch.nn.Module.cuda
    Tensor.cuda = torch.nn.Module.cuda = lambda self, *args, **kwargs: self
    try:
        yield
    finally:
        Tensor.cuda, torch.nn.Module.cuda = kept


@contextmanager
def replaced(module, **new) -> Iterator[None]:
    "Names of a module or object mean something else while the block runs."
    kept = {name: getattr(module, name) for name in new}
    try:
        for name, value in new.items():
            setattr(module, name, value)
        yield
    finally:
        for name, value in kept.items():
            setattr(module, name, value)
