"""Feature alignment does what it is for: it brings a pool nearer to real images, class by class."""

import pytest

from condexp.data import random_per_class
from condexp.kd import Distillation, distil

# The pool matters here, not the student.
SETTINGS = Distillation(epochs=3, steps=2, batch_size=32, rounds=2, synthesis_batch=60, warmup=4)


def distances(arm, seed, teacher, digits, fabric):
    sources = {"condensed": random_per_class(digits.train, 10, seed)}
    return distil(arm, teacher, "wrn_10_1", sources, digits, SETTINGS, seed, fabric)


@pytest.mark.parametrize("seed", range(3))
def test_alignment_lowers_the_distance_to_real_images_within_a_class(seed, teacher, digits, fabric):
    mixed = distances("mixed", seed, teacher, digits, fabric).distances
    expanded = distances("expanded", seed, teacher, digits, fabric).distances
    assert expanded["class_frechet"] < mixed["class_frechet"]
    assert expanded["agreement"] > 60


def test_what_the_discriminator_gets_right_is_recorded_each_epoch(teacher, digits, fabric):
    history = distances("expanded", 0, teacher, digits, fabric).history
    assert len(history) == SETTINGS.epochs
    assert all(0 <= entry[name] <= 1 for entry in history for name in ("d_real", "d_fake"))
