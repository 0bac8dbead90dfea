"""What holds for every way of inverting a teacher; one that is added to INVERSIONS is covered on that day."""

import copy
from dataclasses import replace

import pytest
import torch

from condexp.data import ImageSet
from condexp.inversion import INVERSIONS, Inverter, Term
from condexp.models import fingerprint, freeze, make_classifier
from condexp.training import seeded

SHAPES = [(1, 8), (3, 28), (3, 32), (1, 28), (3, 64)]  # channels, pixels


@pytest.fixture(params=INVERSIONS)
def recipe(request):
    "Each method, with few steps a batch."
    return replace(INVERSIONS[request.param], steps=2)


def untrained(channels, size, classes=3, name="wrn_10_1", seed=0):
    images = torch.zeros(1, channels, size, size, dtype=torch.uint8)
    like = ImageSet(
        images, torch.zeros(1, dtype=torch.long), tuple("abcdefghij"[:classes]), (0.4,) * channels, (0.3,) * channels
    )
    with seeded(seed):
        return make_classifier(name, like)


def pool(recipe, teacher, student, fabric, n=6, batches=2, warm=True, seed=0):
    targets = torch.arange(n) % len(teacher.spec.classes)
    with seeded(seed), Inverter(recipe, teacher, student, fabric, batch_size=n) as inverter:
        return torch.cat([inverter.synthesize(targets, warm=warm) for _ in range(batches)]), inverter


@pytest.mark.parametrize("channels, size", SHAPES)
def test_images_have_the_shape_and_range_that_were_asked_for(recipe, channels, size, fabric):
    images, inverter = pool(recipe, freeze(untrained(channels, size)), untrained(channels, size, seed=1), fabric)
    assert images.shape == (12, channels, size, size) and not images.requires_grad
    assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    assert len(inverter.losses) == 2 and all(isinstance(v, float) for v in inverter.losses[-1].values())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_teacher_without_batchnorm_is_inverted_by_what_is_left(recipe, name, fabric):
    teacher, seen = freeze(untrained(3, 32, name=name)), Seen()
    with Inverter(recipe, teacher, untrained(3, 32, seed=1), fabric, seen, batch_size=4) as inverter:
        images = inverter.synthesize(torch.arange(4) % 3)
    assert torch.isfinite(images).all() and seen.updates == 2 and seen.features[0].grad.abs().sum() > 0
    left_out = {t.name for t in recipe.terms if t.watches}
    assert {note.split()[0] for note in inverter.notes} == left_out and not left_out & inverter.losses[0].keys()
    assert all(f"does not apply: {name} has no BatchNorm layers" in note for note in inverter.notes)


def test_a_loss_that_is_no_number_is_named_with_what_to_lower(recipe, teacher, fabric):
    broken = Term("broken", 2.0, lambda view: view.images.sum() * float("nan"))
    with Inverter(replace(recipe, terms=(*recipe.terms, broken)), teacher, teacher, fabric, batch_size=4) as inverter:
        with pytest.raises(FloatingPointError, match=f"the term 'broken' of {recipe.name} is nan: lower its weight"):
            inverter.synthesize(torch.arange(4))
    assert hooks(teacher) == 0


def test_the_same_seed_gives_the_same_images(recipe, teacher, fabric):
    student = untrained(1, 16, classes=10)
    first, second, other = (pool(recipe, teacher, student, fabric, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)


def test_neither_teacher_nor_student_is_changed(recipe, teacher, fabric):
    student = untrained(1, 16, classes=10).train()
    before = fingerprint(teacher), fingerprint(student)
    pool(recipe, teacher, student, fabric)
    assert (fingerprint(teacher), fingerprint(student)) == before and student.training and not teacher.training
    assert all(p.grad is None for model in (teacher, student) for p in model.parameters())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_no_hook_is_left_behind_even_after_an_error(recipe, teacher, fabric):
    student = untrained(1, 16, classes=10)
    before = hooks(teacher), hooks(student)
    with pytest.raises(KeyboardInterrupt), Inverter(recipe, teacher, student, fabric, batch_size=4):
        raise KeyboardInterrupt
    pool(recipe, teacher, student, fabric)
    assert (hooks(teacher), hooks(student)) == before


def test_a_saved_state_goes_on_with_the_same_images(recipe, teacher, fabric, tmp_path):
    student, targets = untrained(1, 16, classes=10), torch.arange(6)
    with (
        Inverter(recipe, teacher, student, fabric, batch_size=6) as one,
        Inverter(recipe, teacher, student, fabric, batch_size=6) as two,
    ):
        one.synthesize(targets, warm=True)
        torch.save(one.state_dict(), tmp_path / "state")
        two.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
        with seeded(1):
            wanted = one.synthesize(targets, warm=True)
        with seeded(1):
            assert torch.equal(two.synthesize(targets, warm=True), wanted)


def milder(teacher, share):
    "A student that names the same classes as the teacher, with less conviction."
    student = copy.deepcopy(teacher)
    for p in student.last_layer.parameters():
        p.data *= share
    return student


def adversarial_terms(recipe):
    return [term.name for term in recipe.terms if term.warm] or pytest.skip("this recipe has no adversarial term")


def test_the_adversarial_term_reads_the_student(recipe, teacher, fabric):
    adversarial_terms(recipe)
    students = [milder(teacher, share) for share in (0.5, 0.1)]
    cold = [pool(recipe, teacher, student, fabric, warm=False)[0] for student in students]
    warm = [pool(recipe, teacher, student, fabric, warm=True)[0] for student in students]
    assert torch.equal(*cold) and not torch.equal(*warm)


def test_a_student_that_disagrees_earns_more_than_the_teacher_itself(recipe, teacher, fabric):
    "A public code base hands in the teacher as the student: nothing fails, the term is just constant."
    (name,) = adversarial_terms(recipe)
    student, twin = (pool(recipe, teacher, milder(teacher, s), fabric)[1].losses[0][name] for s in (0.1, 1))
    assert student < twin - 1e-3


class Seen:
    "An alignment that only watches whether gradients pass through the features."

    def __init__(self):
        self.features, self.updates = [], 0

    def loss(self, features, targets):
        self.features.append(features)
        features.retain_grad()
        return features.square().mean()

    def update(self, features, targets):
        assert not features.requires_grad
        self.updates += 1


def test_an_alignment_joins_every_method(recipe, teacher, fabric):
    seen = Seen()
    with Inverter(recipe, teacher, untrained(1, 16, classes=10), fabric, seen, batch_size=6) as inverter:
        inverter.synthesize(torch.arange(6), warm=False)
    assert seen.updates == len(seen.features) == 2
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in seen.features)
