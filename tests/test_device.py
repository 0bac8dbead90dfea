"""A rehearsal for devices that are not here: every inner loop on torch's `meta` device, which has shapes but no numbers.

Tensors of two devices that meet are an error, and whatever waits for the device is counted: it must not grow with the
number of steps. What a GPU computes, how fast, and in which precision cannot be seen this way.
"""

from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from condexp import augment, boundary, condensation, discriminator, inversion, kd, training
from condexp.cache import Checkpoint
from condexp.data import ImageSet
from condexp.models import freeze, make_classifier

aten, META = torch.ops.aten, torch.device("meta")
COPIES = {aten._to_copy.default, aten.copy_.default}
OF_UNKNOWN_SIZE = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default, aten.bincount.default}
INDEXING = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._index_put_impl_.default}


class Rehearsal(TorchDispatchMode):
    "Counts reads of the device (each gives a zero or a one), and refuses what it cannot do or should not."

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not any(t.is_meta for t in tensors):
            return op(*args, **kwargs or {})
        assert op in COPIES or all(t.is_meta or t.ndim == 0 for t in tensors), f"{op} mixes devices"
        masks = op in INDEXING and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None)
        assert not masks and op not in OF_UNKNOWN_SIZE, f"{op} waits for the device to know the size of its result"
        if op is aten._local_scalar_dense.default:
            self.reads += 1
            return False if args[0].dtype == torch.bool else 0
        if op in COPIES and (kwargs or {}).get("device", META).type == "cpu":
            self.reads += 1
            return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        return op(*args, **kwargs or {})


def reads(function, *args, **settings) -> int:
    "How often `function` waits for the device."
    with Rehearsal() as rehearsal:
        function(*args, **settings)
    return rehearsal.reads


class MetaFabric:
    "What is used of Fabric, on the meta device."

    device, autocast, global_rank, world_size = META, nullcontext, 0, 1
    _precision = SimpleNamespace(state_dict=dict, load_state_dict=lambda state: None, precision="32-true")

    def setup(self, model, optimizer):
        return model, optimizer

    def backward(self, loss):
        loss.backward()

    def all_reduce(self, value):
        return value


def plain(optimizer):
    return lambda *args, fused=None, **settings: optimizer(*args, **settings)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    "The meta device has no autocast, no fused optimizers, and no kernel for BatchNorm's moments."
    monkeypatch.setattr(torch, "autocast", lambda *args, **settings: nullcontext())
    for name in ("SGD", "Adam", "AdamW"):
        monkeypatch.setattr(torch.optim, name, plain(getattr(torch.optim, name)))
    library = torch.library.Library("aten", "IMPL", "Meta")
    library.impl("batch_norm_update_stats", lambda x, mean, var, momentum: (x.new_empty(x.shape[1]),) * 2)
    yield
    library._destroy()


@pytest.fixture(scope="module")
def images():
    "Forty colour images of four classes, on the CPU."
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (40, 3, 16, 16), dtype=torch.uint8, generator=generator)
    names = tuple("abcd")
    return ImageSet(pixels, torch.arange(4).repeat(10), names, (0.5,) * 3, (0.25,) * 3, {})


@pytest.fixture
def teacher(images):
    return freeze(make_classifier("wrn_10_1", images)).to(META)


@pytest.fixture
def student(images):
    return make_classifier("wrn_10_1", images).to(META)


@pytest.fixture
def batch():
    return torch.rand(20, 3, 16, 16, device=META)


@pytest.fixture
def targets():
    return torch.arange(20, device=META) % 4


def test_places_from_the_cpu_select_images_on_the_device(images):
    "As where `run_kd` sorts the images of a pool by their labels."
    pool = images.to(META)
    order = images.labels.argsort(stable=True)
    assert reads(pool.batch, order) == 0 and reads(pool.subset, order) == 0


# ---- the rehearsal notices -------------------------------------------------------------------------------------

WAITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.sum()),
    "if": lambda x: 1 if (x > 0).all() else 0,
    "tolist": lambda x: x.tolist(),
    "cpu": lambda x: x.cpu(),
    "numpy": lambda x: x.cpu().numpy(),
}
MISTAKES = {
    "boolean mask": lambda x: x[x > 0],
    "assignment to a mask": lambda x: x.clone().index_put_((x > 0,), x[0, 0]),
    "nonzero": lambda x: (x > 0).nonzero(),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: x.long().unique(),
    "bincount": lambda x: x.long().flatten().bincount(),
    "sum with the CPU": lambda x: x + torch.zeros(4),
    "index on the CPU": lambda x: x[torch.zeros(2, dtype=torch.long)],
    "choice by the CPU": lambda x: torch.where(torch.ones(4, dtype=torch.bool), x, 0.0),
    "labels on the CPU": lambda x: F.cross_entropy(x, torch.zeros(4, dtype=torch.long)),
}


@pytest.mark.parametrize("name", WAITS)
def test_the_rehearsal_counts_what_waits(name):
    assert reads(WAITS[name], torch.rand(4, 4, device=META)) == 1


@pytest.mark.parametrize("name", MISTAKES)
def test_the_rehearsal_refuses(name):
    with pytest.raises((AssertionError, RuntimeError, NotImplementedError)):
        reads(MISTAKES[name], torch.rand(4, 4, device=META))


def test_the_rehearsal_lets_numbers_through():
    x = torch.rand(4, 4, device=META)
    assert reads(lambda: (x * torch.tensor(2.0)).to(META) + torch.arange(4).to(META)) == 0


# ---- single steps: nothing is read ------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*augment.AUGMENTATIONS.values(), augment.siamese, lambda _: augment.mixup])
def test_augmentation(make, images, batch):
    x = batch.requires_grad_()

    def step():
        total = make(images)(x).sum()
        assert total.requires_grad or make in (augment.paper, augment.paper_synthetic)  # which have no gradient
        return total.backward() if total.requires_grad else None

    assert reads(step) == 0


KINDS = "conditional", "conditional_few", "auxiliary", "two_k", "unconditional", "mmd", "hinge", "instance_noise"


@pytest.mark.parametrize("name", KINDS)
def test_alignment(name, teacher, images, targets):
    settings, whole = discriminator.alignment_settings(name), augment.standard(images)
    alignment = discriminator.make_alignment(settings, teacher, images, whole, MetaFabric(), seed=0)
    features = torch.randn(20, alignment.bank.features.shape[1], device=META, requires_grad=True)

    def step():
        alignment.loss(features, targets).backward()
        alignment.update(features, targets)

    assert reads(step) == 0


@pytest.mark.parametrize("name", boundary.ATTACKS)
def test_step_of_the_attack(name, teacher, batch, targets):
    state = boundary.AttackState.begin(teacher, batch, targets, 0.02)
    assert reads(boundary.bold_driver_step, state, teacher, targets, boundary.ATTACKS[name].settings) == 0


def matching(name: str, learned, task):
    "What computes the gradient of a condenser."
    settings = condensation.CONDENSERS[name]
    if name == "dm":
        return condensation.DistributionMatching(task, learned, settings)
    if name == "dsa":
        return condensation.GradientMatching(task, learned, replace(settings, inner_loop=2))
    settings = replace(settings, syn_steps=2)
    network = condensation.whitened_network(settings, task.train, learned.coordinates, task.fabric)
    weights = sum(p.numel() for p in network.parameters())
    experts = torch.randn(2, 5, weights, device=META)
    return condensation.TrajectoryMatching(task, learned, settings, experts)


@pytest.mark.parametrize("name", ["dm", "dsa", "mtt"])
def test_condenser(name, images):
    start = images.subset(torch.arange(8).view(2, 4).T.flatten())  # two of each class
    task = condensation.CondensationTask(images.to(META), 2, 0, 1, MetaFabric(), Checkpoint())
    coordinates = condensation.Normalisation(images.mean, images.std)
    learned = condensation.LearnedImages(start.to(META), coordinates, 0.02 if name == "mtt" else None)
    gradient = matching(name, learned, task)
    assert reads(lambda: (gradient.backward(1), learned.project())) == 0


# ---- loops: what is read does not grow with the steps -----------------------------------------------------------


def test_training(images, student):
    def fit(steps):
        training.fit(student, images, training.Schedule(1, steps, 10), augment.standard(images), MetaFabric())

    assert reads(fit, 1) == reads(fit, 3) == 1  # loss and accuracy together


@pytest.mark.parametrize("settings", [{}, {"labels": "hard", "augmentation": "extreme", "mixup": True}])
def test_student(settings, images, teacher, student):
    def learn(steps):
        chosen = kd.Distillation(1, steps, batch_size=8, **settings)
        transfer = kd.SyntheticSet(kd.teacher_set(teacher, MetaFabric()), images.to(META), room=10)
        kd.StudentTraining(student, teacher, chosen, MetaFabric(), seed=0).epoch(transfer)

    assert reads(learn, 1) == reads(learn, 3) == 1  # the loss


@pytest.mark.parametrize("name", inversion.INVERSIONS)
def test_inversion(name, teacher, student, images, targets):
    settings = discriminator.alignment_settings("mmd", ratio=0.3)
    alignment = discriminator.make_alignment(settings, teacher, images, augment.standard(images), MetaFabric(), seed=0)

    recipe, batch_size = inversion.inversion_recipe(name), 20
    if name == "pre_dfkd":  # it replays from the second batch on
        synthesizer = partial(recipe.synthesizer, vae_steps=2, tuning=2)
        recipe, batch_size = replace(recipe, synthesizer=synthesizer), 10

    def invert(steps):
        inverter = inversion.Inverter(recipe, teacher, student, MetaFabric(), alignment, batch_size, steps)
        inverter.synthesize(targets)

    assert reads(invert, 1) == reads(invert, 2) < 10  # the curves of the terms and what a batch ends with
