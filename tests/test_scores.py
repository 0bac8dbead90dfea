"""What a set promises before a student has seen it: the same row each time, real images before noise."""

from dataclasses import replace

import pytest
import torch

from condexp.data import random_per_class
from condexp.models import fingerprint
from condexp.scores import PROXY, probe_agreement, draw_answers, predict_measures, proxy_student, rank_sources, score
from condexp.scores import teacher_stddev
from condexp.transfer import transfer_set

SHORT = replace(PROXY, steps=40)


@pytest.fixture(scope="module")
def rows(trained, digits, fabric):
    "The rows of noise and of real images, the probe being others; noise twice."
    teacher, before = trained[0], torch.get_rng_state()
    noise = transfer_set("noise", teacher, 100, 0, fabric, sampling="none")
    sets = {"noise": noise, "again": noise, "real": random_per_class(digits.train, 20, seed=0)}
    found = {}
    for name, images in sets.items():
        torch.rand(len(found))  # what was drawn before does not matter
        found[name] = predict_measures(images, teacher, digits.test, fabric, 3, SHORT)
    torch.set_rng_state(before)
    return found


def test_a_row_is_the_same_whatever_was_drawn_before(rows):
    assert rows["again"] == rows["noise"]
    assert all(isinstance(value, (int, float)) for value in rows["noise"].values())


def test_real_images_come_before_noise(rows):
    assert rank_sources(rows)[0] == "real"
    assert rows["real"]["proxy low"] > rows["noise"]["proxy high"]
    assert rows["real"]["Frechet to probe"] < rows["noise"]["Frechet to probe"] / 5


def test_the_probe_and_the_teacher_stay_as_they_were(trained, digits, fabric):
    teacher, probe = trained[0], digits.test
    before = fingerprint(teacher), probe.fingerprint
    assert probe_agreement(teacher, teacher, replace(probe, labels=1 - probe.labels.clamp(max=1)), fabric)[0] == 100
    assert (fingerprint(teacher), probe.fingerprint) == before


def test_a_proxy_student_is_taught_as_the_student_will_be(trained, digits, fabric):
    few = digits.test.subset(range(64))
    settings = replace(PROXY, steps=2)
    ways = settings, settings, replace(settings, batch_statistics=True)
    one, two, other = (fingerprint(proxy_student(few, trained[0], fabric, 0, way)) for way in ways)
    assert one == two != other


def test_the_deviation_is_of_the_mean_over_each_draw(trained, digits, fabric):
    p = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[1.0, 0.0], [1.0, 0.0]]])  # means 1/2 and 1 of the first class
    assert teacher_stddev(p) == pytest.approx(0.5 / 2**0.5)
    small, large = (draw_answers(digits.test, trained[0], fabric, 0, draws=8, size=n) for n in (16, 256))
    assert teacher_stddev(large) < 0.6 * teacher_stddev(small)  # of a mean over sixteen times as many, a quarter


def test_ties_go_to_the_lower_deviation_and_nothing_else_does():
    row = lambda agreed, deviation: {"proxy agreement": agreed, "T. stddev": deviation}
    assert score(row(50.0, 0.01)) > score(row(50.0, 0.02)) and score(row(50.1, 0.9)) > score(row(50.0, 0.0))
