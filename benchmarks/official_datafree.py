"""The published code of CMI and of Fast (both are a package `datafree` and a script), called as its scripts call it.

On a CPU `.cuda()` does nothing. Images are read by the process itself: four workers of a DataLoader, started anew for each
batch, would compute beside what is timed next.
"""

import tempfile
from argparse import Namespace
from functools import partial
from pathlib import Path

import old_names  # noqa: F401
import torch
from torchvision import transforms

from common import (
    MEAN,
    STD,
    Measure,
    Shapes,
    Ticks,
    import_clone,
    iteration_and_batch,
    replaced,
    seconds,
    seconds_to_import,
    without_cuda,
)


class Clone:
    "A clone's modules, networks and augmentation."

    def __init__(self, path: Path, shapes: Shapes, device: torch.device):
        self.path, self.shapes, self.device = path, shapes, device
        self.script, self.package = import_clone(path, "datafree_kd", "datafree")
        wrn = self.package.models.classifiers.wresnet
        make = lambda name: getattr(wrn, name)(num_classes=shapes.classes).to(device)
        self.teacher, self.student = make(shapes.teacher).eval(), make(shapes.student)
        self.transform = transforms.Compose(
            [
                transforms.RandomCrop(shapes.size, padding=4),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(MEAN, STD),
            ]
        )

    def synthesizer(self, name: str, **settings):
        "The synthesizer called `name`, with a pool of its own."
        shapes, nz = self.shapes, 256
        generator = self.package.models.generator.Generator(nz=nz, ngf=64, img_size=shapes.size, nc=3)
        return getattr(self.package.synthesis, name)(
            self.teacher,
            self.student,
            generator.to(self.device),
            nz=nz,
            num_classes=shapes.classes,
            img_size=(3, shapes.size, shapes.size),
            synthesis_batch_size=shapes.batch,
            sample_batch_size=shapes.batch,
            save_dir=tempfile.mkdtemp(),
            transform=self.transform,
            normalizer=self.package.utils.Normalizer(MEAN, STD),
            device=self.device,
            **settings,
        )

    def batch(self, synthesizer, row: str, prepare=lambda: None) -> Measure:
        "A batch of synthesis."
        plain = synthesizer.aug

        def measure() -> dict[str, float]:
            prepare()
            ticks = Ticks()
            synthesizer.aug = ticks.on(plain)
            with without_cuda(), own_reading():
                whole = seconds(synthesizer.synthesize)
            return iteration_and_batch(row, ticks.mean(), whole)

        return measure


def own_reading():
    "DataLoaders without workers, while the block runs."
    return replaced(torch.utils.data, DataLoader=partial(reader, torch.utils.data.DataLoader))


def reader(kind, dataset, num_workers, **settings):
    "A DataLoader of that kind, whatever number of workers was asked for."
    return kind(dataset, num_workers=0, **settings)


def fill(synthesizer, count: int) -> None:
    "Let CMI's bank hold `count` images, or none."
    synthesizer.mem_bank._ptr = synthesizer.mem_bank.n_updates = count


def distillation(clone: Clone, synthesizer) -> Measure:
    "Student steps by the script's own loop, on images of the pool."
    optimizer = torch.optim.SGD(clone.student.parameters(), 0.1, weight_decay=1e-4, momentum=0.9)
    criterion, steps = clone.package.criterions.KLDiv(T=20), clone.shapes.student_steps
    args = Namespace(kd_steps=steps, gpu=0, fp16=False, print_freq=0, method="cmi")
    args.autocast = clone.package.utils.dummy_ctx

    with without_cuda(), own_reading():
        synthesizer.synthesize()  # which makes what images are read from

    def measure() -> dict[str, float]:
        with without_cuda():
            train = lambda: clone.script.train(synthesizer, [clone.student, clone.teacher], criterion, optimizer, args)
            return {"distillation step": seconds(train) / steps}

    return measure


def cmi(path: Path, shapes: Shapes, pictures: Path, device: torch.device, also: str) -> dict[str, Measure]:
    "What CMI's clone can be asked."
    clone = Clone(path, shapes, device)
    terms = dict(bank_size=40960, n_neg=shapes.negatives, head_dim=256, adv=0.5, bn=1, oh=1, cr=0.8, cr_T=0.1)
    make = lambda steps: clone.synthesizer("CMISynthesizer", iterations=steps, lr_g=1e-3, **terms)
    empty, full, quick = make(shapes.cmi_steps), make(shapes.cmi_steps), make(1)
    read = clone.package.utils.UnlabeledImageDataset(str(pictures), transforms.ToTensor())
    load = lambda: seconds(lambda: [read[i] for i in range(len(read))])
    row = "CMI, 4,096 negatives:"
    return {
        "cmi": clone.batch(empty, "CMI", lambda: fill(empty, 0)),
        "cmi_full": clone.batch(full, row, lambda: fill(full, shapes.negatives)),
        "distillation": distillation(clone, quick),
        "import": lambda: {
            "import": seconds_to_import("old_names, datafree_kd", (str(path), str(Path(__file__).parent), also))
        },
        "loading": lambda: {"loading a set": load(), "loading it again": load()},
    }


def fast(path: Path, shapes: Shapes, device: torch.device) -> dict[str, Measure]:
    "What Fast's clone can be asked."
    clone = Clone(path, shapes, device)
    settings = dict(lr_g=3e-3, lr_z=0.01, adv=1.1, bn=10.0, oh=0.4, bn_mmt=0.9, is_maml=1, reset_l0=1, warmup=1)
    synthesizer = clone.synthesizer("FastMetaSynthesizer", iterations=shapes.fast_steps, **settings)
    return {"fast": clone.batch(synthesizer, "Fast")}
