"""Feature alignment does what it is for: it brings a pool nearer to real images, class by class."""

from condexp.data import random_per_class
from condexp.kd import Distillation, distil

# The pool matters here, not the student.
SETTINGS = Distillation(epochs=6, steps=2, batch_size=32, rounds=2, synthesis_batch=40, warmup=4)


def distances(arm, seed, teacher, digits, fabric):
    sources = {"condensed": random_per_class(digits.train, 10, seed)}
    return distil(arm, teacher, "wrn_10_1", sources, digits, SETTINGS, seed, fabric)


def test_alignment_lowers_the_distance_to_real_images_within_a_class(teacher, digits, fabric):
    mixed, expanded = (
        [distances(arm, seed, teacher, digits, fabric).distances for seed in range(2)] for arm in ("mixed", "expanded")
    )
    assert sum(e["class_frechet"] for e in expanded) < 0.8 * sum(m["class_frechet"] for m in mixed)
    assert all(e["agreement"] > 60 for e in expanded)


def test_what_the_discriminator_gets_right_is_recorded_each_epoch(teacher, digits, fabric):
    history = distances("expanded", 0, teacher, digits, fabric).history
    assert len(history) == SETTINGS.epochs
    assert all(0 <= entry[name] <= 1 for entry in history for name in ("d_real", "d_fake"))
