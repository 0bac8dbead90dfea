"""Feature alignment does what it is for: it brings a pool nearer to real images, class by class."""

import pytest

from condexp.data import random_per_class
from condexp.kd import Distillation, distil

SETTINGS = Distillation(epochs=3, steps=2, batch_size=32, rounds=2)  # the pool matters here, not the student


def distances(arm, alignment, seed, teacher, digits, fabric):
    sources = {"condensed": random_per_class(digits.train, 10, seed)}
    settings = Distillation(**{**vars(SETTINGS), "alignment": alignment})
    return distil(arm, teacher, "wrn_10_1", sources, digits, settings, seed, fabric)


@pytest.mark.parametrize("alignment", ["conditional", "mmd"])
def test_alignment_lowers_the_distance_to_real_images_within_a_class(alignment, teacher, digits, fabric):
    for seed in range(3):
        mixed = distances("mixed", alignment, seed, teacher, digits, fabric).distances
        expanded = distances("expanded", alignment, seed, teacher, digits, fabric).distances
        assert expanded["class_frechet"] < mixed["class_frechet"], f"seed {seed}"
        assert expanded["agreement"] > 60, f"seed {seed}"


def test_what_the_discriminator_gets_right_is_recorded_each_epoch(teacher, digits, fabric):
    history = distances("expanded", "conditional", 0, teacher, digits, fabric).history
    assert len(history) == SETTINGS.epochs
    assert all(0 <= entry[name] <= 1 for entry in history for name in ("d_real", "d_fake"))
