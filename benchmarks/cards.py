"""What CUDA graphs gain: `python benchmarks/cards.py RECORD` (seconds of a student step with them and without, on one card)."""

import json
import sys
import time
from pathlib import Path
from statistics import median

import torch
from condexp import kd
from condexp.cache import write_atomic
from condexp.data import ImageSet
from condexp.kd import Distillation, StudentTraining, SyntheticSet
from condexp.models import freeze, make_classifier
from condexp.records import environment
from condexp.training import captured, make_fabric

PAIRS = [  # teacher, student, pixels, images a step
    ("wrn_16_2", "wrn_10_1", 16, 64),
    ("wrn_40_2", "wrn_16_1", 32, 256),
    ("resnet34_cifar", "resnet18_cifar", 32, 256),
    ("resnet34_cifar", "mobilenetv2_cifar", 32, 128),
]


def step_seconds(
    graphs: bool, fabric, teacher: str, student: str, size: int, batch: int, steps: int = 100, turns: int = 5
) -> list[float]:
    "Seconds of a step, the mean of an epoch, in each of some epochs after a first."
    kd.captured = captured if graphs else (lambda *given: captured(*given[:3], False))
    pixels = torch.randint(0, 256, (2000, 3, size, size), dtype=torch.uint8, device=fabric.device)
    images = ImageSet(pixels, torch.arange(2000, device=fabric.device) % 10, tuple("abcdefghij"), (0.5,) * 3, (0.25,) * 3, {})
    networks = [make_classifier(name, images).to(fabric.device, memory_format=torch.channels_last) for name in (student, teacher)]
    settings = Distillation(epochs=100, steps=steps, batch_size=batch)
    training = StudentTraining(networks[0], freeze(networks[1]), settings, fabric, seed=0)
    found = []
    for _ in range(turns + 1):
        began = time.perf_counter()
        training.epoch(SyntheticSet(images, images, room=0))  # reads its loss, so it waits for the device
        found.append((time.perf_counter() - began) / steps)
    return found[1:]


if __name__ == "__main__":
    fabric, found = make_fabric(), []
    for pair in PAIRS:
        times = {name: step_seconds(graphs, fabric, *pair) for name, graphs in (("graphs", True), ("none", False))}
        found.append(dict(zip(("teacher", "student", "size", "batch"), pair, strict=True)) | dict(seconds=times))
        print(pair, {name: f"{1000 * median(values):.2f} ms" for name, values in times.items()}, flush=True)
    record = dict(steps=found, environment=environment(fabric))
    write_atomic(Path(sys.argv[1]), lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
