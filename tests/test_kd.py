"""Distillation from a fixed or growing set: every arm works, the pool teaches, the teacher stays as it was."""

from dataclasses import replace

import pytest
import torch

from condexp.data import ImageSet
from condexp.inversion import INVERSIONS
from condexp.kd import METHODS, Distillation, distil, kd_loss
from condexp.models import fingerprint

TINY = Distillation(epochs=2, steps=2, batch_size=16, synthesis_batch=20, warmup=1, inversion_steps=2)


@pytest.fixture
def sources(digits, condensed):
    return {"random": condensed, "condensed": condensed, "full": digits.train, "given": digits.test}


@pytest.mark.parametrize("arm", METHODS)
def test_every_arm_says_what_it_used(arm, sources, teacher, digits, fabric):
    result = distil(arm, teacher, "wrn_10_1", sources, digits, TINY, 0, fabric)
    given = len(sources[METHODS[arm].source]) if METHODS[arm].source else 0
    pool = 2 * 20 if METHODS[arm].pool else 0
    assert result.steps == 4 and result.images == given + pool and len(result.history) == 2
    assert 0 <= result.accuracy <= 100 and (result.pool is not None) == METHODS[arm].pool


def test_the_pool_asks_for_every_class_equally_often(sources, teacher, digits, fabric):
    assert distil("inversion", teacher, "wrn_10_1", sources, digits, TINY, 0, fabric).pool.counts == [4] * 10


def test_the_teacher_is_the_same_to_the_last_bit(sources, teacher, digits, fabric):
    before = fingerprint(teacher)
    distil("expanded", teacher, "wrn_10_1", sources, digits, TINY, 11, fabric)
    assert fingerprint(teacher) == before
    assert not teacher.training and all(p.grad is None for p in teacher.parameters())


def test_the_same_seed_gives_the_same_student(sources, teacher, digits, fabric, tmp_path, monkeypatch):
    first = distil("expanded", teacher, "wrn_10_1", sources, digits, TINY, 12, fabric)
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path / "elsewhere"))
    second = distil("expanded", teacher, "wrn_10_1", sources, digits, TINY, 12, fabric)
    assert fingerprint(first.student) == fingerprint(second.student)
    assert first.pool.fingerprint == second.pool.fingerprint and first.distances == second.distances


def test_a_setting_that_an_arm_does_not_read_does_not_compute_it_again(sources, teacher, digits, fabric):
    first = distil("condensed", teacher, "wrn_10_1", sources, digits, TINY, 0, fabric)
    again = distil(
        "condensed", teacher, "wrn_10_1", sources, digits, replace(TINY, inversion="cmi", alignment="mmd"), 0, fabric
    )
    assert again.seconds == first.seconds


@pytest.fixture(scope="module")
def budget():
    "Enough for a student to learn; for all methods the same."
    return Distillation(epochs=4, steps=50, batch_size=64, rounds=1, warmup=6, synthesis_batch=40)


@pytest.fixture(scope="module")
def taught_by_noise(trained, digits, budget, fabric):
    images = torch.rand(400, *digits.train.images.shape[1:], generator=torch.Generator().manual_seed(0))
    noise = ImageSet(
        images, torch.zeros(400, dtype=torch.long), digits.train.classes, digits.train.mean, digits.train.std
    )
    return distil("given", trained[0], "wrn_10_1", {"given": noise}, digits, budget, 0, fabric).accuracy


@pytest.mark.parametrize("inversion", INVERSIONS)
def test_a_pool_shows_its_classes_and_teaches_far_better_than_noise(inversion, taught_by_noise, teacher, digits, budget, fabric):
    settings = replace(budget, inversion=inversion, inversion_steps=min(60, INVERSIONS[inversion].steps))
    result = distil("inversion", teacher, "wrn_10_1", {}, digits, settings, 0, fabric)
    assert result.accuracy > taught_by_noise + 20
    assert result.distances["agreement"] >= 80


def test_both_directions_of_the_loss_vanish_only_where_the_answers_agree():
    a, b = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0))
    for direction in ("forward", "reverse"):
        assert kd_loss(a, a + 1, direction=direction).abs() < 1e-6 < kd_loss(a, b, direction=direction)


@pytest.mark.parametrize(
    "change", [{"labels": "hard"}, {"augmentation": "extreme"}, {"augmentation": "none"}, {"mixup": True}], ids=str
)
def test_what_is_learned_from_a_set_can_be_changed(change, sources, teacher, digits, fabric):
    usual = distil("given", teacher, "wrn_10_1", sources, digits, TINY, 0, fabric)
    other = distil("given", teacher, "wrn_10_1", sources, digits, replace(TINY, **change), 0, fabric)
    assert fingerprint(usual.student) != fingerprint(other.student)


def test_real_images_teach_better_than_noise_with_bare_choices_too(
    sources, taught_by_noise, teacher, digits, budget, fabric
):
    settings = replace(budget, labels="hard", mixup=True)
    assert distil("full", teacher, "wrn_10_1", sources, digits, settings, 0, fabric).accuracy > taught_by_noise + 30
