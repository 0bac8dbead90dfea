"""condexp's own side, and the floor: the bare forward and backward passes of all networks that take part."""

import os
import tempfile
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from condexp import boundary, transfer
from condexp.cache import Checkpoint
from condexp.condensation import DM, DSA, MTT, CondensationTask, DistributionMatching, GradientMatching
from condexp.condensation import LearnedImages, Normalisation, TrajectoryMatching, Whitening, embedding_batch
from condexp.condensation import first_images, optimise, random_network
from condexp.data import ImageSet, load_splits
from condexp.inversion import CMI_PUBLISHED, FAST_PUBLISHED, Contrastive, Inverter, instance_dim
from condexp.kd import Distillation, StudentTraining, SyntheticSet
from condexp.models import Generator, freeze, make_classifier
from condexp.training import make_fabric
from PIL import Image
from torch import nn
from torch.nn.utils import parameters_to_vector

from common import Measure, Shapes, Ticks, images_like, iteration_and_batch, seconds, seconds_to_import


class Setting:
    "Networks, images and precision that our side and the floor share."

    def __init__(self, shapes: Shapes, precision: str):
        self.shapes, self.fabric = shapes, make_fabric(precision=precision)
        self.device, self.images = self.fabric.device, images_like(shapes).to(self.fabric.device)
        self.teacher = freeze(self.network(shapes.teacher))
        self.student = self.network(shapes.student)
        self.targets = torch.arange(shapes.batch, device=self.device) % shapes.classes
        self.x = self.first(shapes.batch).contiguous(memory_format=torch.channels_last)

    def first(self, count: int) -> torch.Tensor:
        "So many of the images, in [0, 1]; from the beginning again when all were there."
        return self.images.batch(torch.arange(count, device=self.device) % len(self.images))

    def network(self, name: str) -> nn.Module:
        "A network with random weights, in the layout that our runs use."
        return make_classifier(name, self.images).to(self.device, memory_format=torch.channels_last)

    def task(self, iterations: int) -> CondensationTask:
        "What a condenser is asked."
        return CondensationTask(self.images, self.shapes.ipc, 0, iterations, self.fabric, Checkpoint())


def inversion(s: Setting, recipe, steps: int, row: str, negatives: int = 0) -> Measure:
    "Batches of an inversion; with `negatives`, of one whose bank is full enough."
    inverter = Inverter(recipe, s.teacher, s.student, s.fabric, batch_size=s.shapes.batch, steps=steps)
    plain = inverter.teacher_pass

    def measure() -> dict[str, float]:
        if negatives:
            bank = torch.randn(negatives, 2, instance_dim(s.teacher), device=s.device)
            inverter.terms.losses["contrastive"].bank = bank.half()
        elif "contrastive" in inverter.terms.losses:
            bank = inverter.terms.losses["contrastive"].bank
            inverter.terms.losses["contrastive"].bank = bank[:0]
        ticks = Ticks()
        inverter.teacher_pass = ticks.on(plain)
        whole = seconds(lambda: inverter.synthesize(s.targets))
        return iteration_and_batch(row, ticks.mean(), whole)

    return measure


def inversion_floor(s: Setting, steps: int, row: str, views: int = 1, negatives: int = 0) -> Measure:
    "Generator, teacher (all views), student, and CMI's head, forward and backward; nothing else."
    generator = Generator(s.shapes.size, 3, ngf=min(64, 2 * s.shapes.size)).to(s.device)
    generator = generator.to(memory_format=torch.channels_last).train()
    student, z = freeze(s.network(s.shapes.student)), torch.randn(s.shapes.batch, 256, device=s.device)
    z, leaves = z.requires_grad_(), [*generator.parameters()]
    head = Contrastive(s.teacher, dim=256).head.to(s.device) if views == 2 else None
    leaves += [z, *(head.parameters() if head else ())]

    def step() -> None:
        with s.fabric.autocast():
            x = generator(z)
            teacher = s.teacher(torch.cat([x] * views) if views > 1 else x).float()
            loss = F.cross_entropy(teacher, s.targets.repeat(views)) + student(x).float().square().mean()
            if head:
                means = torch.randn(2 * s.shapes.batch, head[0].in_features, device=s.device).requires_grad_()
                loss = loss + head(means).float().square().mean()
            if negatives:
                loss = loss + head(means.detach()[:1].repeat(2 * negatives, 1)).float().square().mean()
        loss.backward(inputs=leaves)

    def measure() -> dict[str, float]:
        each = seconds(step)
        return iteration_and_batch(row, each, steps * each)

    return measure


def distillation(s: Setting) -> Measure:
    "Student steps on a set of synthetic images."
    settings = Distillation(epochs=1000, steps=s.shapes.student_steps, batch_size=s.shapes.batch)
    training = StudentTraining(s.network(s.shapes.student), s.teacher, settings, s.fabric, seed=0)
    pool = SyntheticSet(s.images, s.images, room=0)
    return lambda: {"distillation step": seconds(lambda: training.epoch(pool)) / settings.steps}


def distillation_floor(s: Setting) -> Measure:
    "The teacher's forward pass, and the student's forward and backward."
    student = s.network(s.shapes.student).train()

    def step() -> None:
        with s.fabric.autocast():
            with torch.no_grad():
                s.teacher(s.x)
            loss = student(s.x).float().square().mean()
        loss.backward()

    steps = s.shapes.student_steps
    return lambda: {"distillation step": seconds(lambda: [step() for _ in range(steps)]) / steps}


def no_whitening(images: ImageSet) -> Whitening:
    "A whitening that changes nothing, for as many operations as any other: to find the right one takes a while."
    d = images.images[0].numel()
    return Whitening(torch.ones(d), torch.eye(d), torch.zeros(d)).to(images.images.device)


def condensation(s: Setting, row: str) -> Measure:
    "Iterations of a condenser, as its run does them."
    shapes, count = s.shapes, 1
    task = s.task(count)
    if row == "MTT":
        settings = MTT(network="convnet3", batch_syn=shapes.mtt_syn, syn_steps=shapes.mtt_steps)
        learned = LearnedImages(first_images(task), no_whitening(s.images), settings.step_size)
        start = parameters_to_vector(random_network("convnet3", s.images, s.fabric).parameters())
        experts = start + 0.01 * torch.randn(2, settings.expert_intervals + 2, len(start), device=s.device)
        matching = TrajectoryMatching(task, learned, settings, experts)
    else:
        settings = DM(network="convnet3", batch_real=shapes.dm_real) if row == "DM" else None
        settings = settings or DSA(network="convnet3", batch_real=shapes.dsa_real, inner_loop=shapes.dsa_inner)
        learned = LearnedImages(first_images(task), Normalisation(s.images.mean, s.images.std))
        matching = {"DM": DistributionMatching, "DSA": GradientMatching}[row](task, learned, settings)
        if row == "DSA":
            matching.backward(1)  # which draws the network
    optimizer = torch.optim.SGD([p for p in learned.parameters()], lr=1e-3, momentum=0.5)
    forward = lambda iteration: matching.backward(iteration + 1)  # DSA's network of the moment is kept
    work = lambda: optimise(task, learned, optimizer, forward, row)
    return lambda: {f"{row} iteration": seconds(work)}


def dm_floor(s: Setting) -> Measure:
    "A forward pass of all images, and the backward pass of the synthetic ones, to the pixels."
    network, each = random_network("convnet3", s.images, s.fabric), embedding_batch(s.shapes.size, s.device)
    real = s.first(s.shapes.classes * s.shapes.dm_real).split(each)
    synthetic = s.first(s.shapes.classes * s.shapes.ipc).split(each)

    def step() -> None:
        for part in real:
            with torch.no_grad(), s.fabric.autocast():
                network.features_logits(part)
        for part in synthetic:
            x = part.requires_grad_()
            with s.fabric.autocast():
                loss = network.features_logits(x)[0].float().square().sum()
            loss.backward(inputs=[x])

    return lambda: {"DM iteration": seconds(step)}


def dsa_floor(s: Setting) -> Measure:
    "By class: the gradient of real images; that of synthetic ones, and its own; then the network's steps."
    network = random_network("convnet3", s.images, s.fabric).requires_grad_()
    weights, shapes = tuple(network.parameters()), s.shapes
    real, own = (s.first(n) for n in (shapes.dsa_real, shapes.ipc))
    every, y = s.first(shapes.classes * shapes.ipc), s.images.labels

    def loss(x: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(network(x), y[: len(x)])

    def step() -> None:
        for _ in range(shapes.classes):
            torch.autograd.grad(loss(real), weights)
            x = own.requires_grad_()
            slopes = torch.autograd.grad(loss(x), weights, create_graph=True)
            sum(slope.square().sum() for slope in slopes).backward(inputs=[x])
        for _ in range(shapes.dsa_inner):
            torch.autograd.grad(loss(every), weights)

    return lambda: {"DSA iteration": seconds(step)}


def mtt_floor(s: Setting) -> Measure:
    "The student's steps, and the gradient of where they end."
    network, shapes = random_network("convnet3", s.images, s.fabric).requires_grad_(), s.shapes
    x, y = s.first(shapes.mtt_syn).requires_grad_(), s.images.labels[: shapes.mtt_syn]
    first = {name: p for name, p in network.named_parameters()}

    def step() -> None:
        weights = first
        for _ in range(shapes.mtt_steps):
            loss = F.cross_entropy(torch.func.functional_call(network, weights, (x,)), y)
            slopes = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
            weights = {name: w - 0.01 * g for (name, w), g in zip(weights.items(), slopes, strict=True)}
        sum(w.square().sum() for w in weights.values()).backward(inputs=[x])

    return lambda: {"MTT iteration": seconds(step)}


def attack(s: Setting) -> Measure:
    "A step of the boundary attack."
    settings, logits = boundary.AttackSettings(), boundary.autocast_logits(s.teacher, s.fabric)
    state = boundary.AttackState.begin(logits, s.x, s.targets, settings.first)
    return lambda: {"attack step": seconds(lambda: boundary.bold_driver_step(state, logits, s.targets, settings))}


def attack_floor(s: Setting) -> Measure:
    "The teacher's forward and backward, to the pixels."

    def step() -> None:
        x = s.x.detach().requires_grad_()
        with s.fabric.autocast():
            loss = F.cross_entropy(s.teacher(x).float(), s.targets)
        torch.autograd.grad(loss, x)

    return lambda: {"attack step": seconds(step)}


def teacher_filter(s: Setting) -> Measure:
    "128 candidates, spread evenly over the classes that the teacher sees."
    frames = s.images.images[torch.randperm(len(s.images))[:128]].cpu()
    settings = transfer.TransferSettings(count=128, budget=1)
    work = lambda: transfer.filtered(iter(frames.split(64)), s.teacher, settings, s.fabric)
    return lambda: {"filter, 128 images": seconds(work)}


def teacher_filter_floor(s: Setting) -> Measure:
    "The teacher's forward pass, 64 images at a time."
    parts = s.first(128).contiguous(memory_format=torch.channels_last).split(64)

    def work() -> None:
        with torch.no_grad(), s.fabric.autocast():
            for part in parts:
                s.teacher(part)

    return lambda: {"filter, 128 images": seconds(work)}


def loading(pictures: Path) -> dict[str, float]:
    "A folder of pictures, decoded; and found in the cache."
    kept = os.environ.get("CONDEXP_CACHE")
    try:
        with tempfile.TemporaryDirectory() as cache:
            os.environ["CONDEXP_CACHE"] = cache
            load = lambda: load_splits(str(pictures))
            return {"loading a set": seconds(load), "loading it again": seconds(load)}
    finally:
        os.environ.pop("CONDEXP_CACHE") if kept is None else os.environ.update(CONDEXP_CACHE=kept)


def loading_floor(pictures: Path) -> dict[str, float]:
    "Every picture, decoded and nothing else."
    return {"loading a set": seconds(lambda: [np.asarray(Image.open(p)) for p in pictures.rglob("*.png")])}


def measures(shapes: Shapes, precision: str, name: str) -> dict[str, dict[str, Measure]]:
    "By case, our side and the floor; `name` is that of the precision."
    s = Setting(shapes, precision)
    fast = (FAST_PUBLISHED, shapes.fast_steps, "Fast")
    cmi, full = (CMI_PUBLISHED, shapes.cmi_steps, "CMI"), "CMI, 4,096 negatives:"
    cases = {
        "cmi": (inversion(s, *cmi), inversion_floor(s, *cmi[1:], views=2)),
        "cmi_full": (
            inversion(s, *cmi[:2], full, shapes.negatives),
            inversion_floor(s, cmi[1], full, 2, shapes.negatives),
        ),
        "fast": (inversion(s, *fast), inversion_floor(s, *fast[1:])),
        "distillation": (distillation(s), distillation_floor(s)),
        "dm": (condensation(s, "DM"), dm_floor(s)),
        "attack": (attack(s), attack_floor(s)),
        "filter": (teacher_filter(s), teacher_filter_floor(s)),
    }
    if precision == "32":  # which these always compute in
        cases |= {"dsa": (condensation(s, "DSA"), dsa_floor(s)), "mtt": (condensation(s, "MTT"), mtt_floor(s))}
    return {case: {f"ours {name}": ours, f"floor {name}": floor} for case, (ours, floor) in cases.items()}


def without_precision(pictures: Path) -> dict[str, dict[str, Measure]]:
    "The cases in which nothing is computed."
    imports = lambda what: lambda: {"import": seconds_to_import(what)}
    return {
        "import": {
            "ours": imports("condexp.kd"),
            "floor": imports("torch, torchvision, timm, lightning_fabric"),
        },
        "loading": {"ours": partial(loading, pictures), "floor": partial(loading_floor, pictures)},
    }
