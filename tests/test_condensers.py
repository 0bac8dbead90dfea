"""What holds for every condenser; one that is added to CONDENSERS is covered on that day."""

from dataclasses import replace

import pytest
import torch

from condexp.condensation import CONDENSERS, condense
from condexp.data import load_splits, random_per_class

STEPS = 3  # enough to see shapes and seeds


@pytest.fixture(params=["grey", "colour"])
def small(request, digits, folder):
    if request.param == "grey":
        return random_per_class(digits.train, 20, seed=0)
    return load_splits(str(folder(each=8)), 16).train


@pytest.fixture(params=CONDENSERS)
def name(request, monkeypatch):
    "Each method; MTT with a single expert that hardly learns."
    monkeypatch.setitem(CONDENSERS, "mtt", replace(CONDENSERS["mtt"], experts=1, stretches=3, stretch=2))
    return request.param


def test_each_class_gets_its_images(name, small, fabric):
    few = condense(name, small, 2, 0, STEPS, fabric)
    assert few.counts == [2] * small.num_classes
    assert few.images.shape[1:] == small.images.shape[1:]
    x = few.batch()
    assert torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1


def test_a_set_can_be_used_without_what_it_was_made_of(name, small, fabric):
    few = condense(name, small, 1, 0, STEPS, fabric)
    assert (few.classes, few.mean, few.std) == (small.classes, small.mean, small.std)
    assert few.provenance["method"] == name and few.provenance["seed"] == 0


def test_the_same_seed_gives_the_same_set(name, small, fabric, tmp_path, monkeypatch):
    first = condense(name, small, 1, 4, STEPS, fabric)
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path / "elsewhere"))
    assert condense(name, small, 1, 4, STEPS, fabric).fingerprint == first.fingerprint


def test_the_training_images_stay_as_they_were(name, small, fabric):
    copy = replace(small, images=small.images.clone(), labels=small.labels.clone())
    condense(name, small, 1, 5, STEPS, fabric)
    assert copy.fingerprint == replace(small).fingerprint
