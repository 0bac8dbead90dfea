"""What holds for every condenser; one that is added to CONDENSERS is covered on that day. And what a published file means."""

from dataclasses import replace

import pytest
import torch

from condexp.cache import Checkpoint
from condexp.condensation import (
    CONDENSERS, CondensationTask, DistributionMatching, LearnedImages, Normalisation, condense, label_agreement,
    load_condensed, train_from_scratch,
)
from condexp.data import ImageSet, load_splits, random_per_class
from condexp.training import Schedule

STEPS = 3  # enough to see shapes and seeds


def softened(images: ImageSet) -> ImageSet:
    "The same images with a tenth of each label spread over all classes."
    k = images.num_classes
    return replace(images, labels=0.9 * torch.eye(k)[images.hard_labels] + 0.1 / k)


@pytest.fixture(params=["grey, unequal classes", "colour, soft labels"])
def small(request, digits, folder):
    if request.param.startswith("grey"):
        few = random_per_class(digits.train, 20, seed=0)
        return few.subset([i for i in range(200) if i % 20 < 5 + few.labels[i]])  # of class c there are 5 + c
    return softened(load_splits(str(folder(each=8)), 16).train)


@pytest.fixture(params=CONDENSERS)
def name(request, monkeypatch):
    "Each method, with few images and steps inside; MTT with a single expert that hardly learns."
    mtt = replace(CONDENSERS["mtt"], experts=1, intervals=3, interval=2, batch_size=32, syn_steps=3)
    monkeypatch.setitem(CONDENSERS, "mtt", mtt)
    monkeypatch.setitem(CONDENSERS, "dsa", replace(CONDENSERS["dsa"], batch_real=16, inner_loop=2))
    return request.param


def test_each_class_gets_its_images(name, small, digits, fabric):
    copy = replace(small, images=small.images.clone(), labels=small.labels.clone())
    few = condense(name, small, 2, 0, STEPS, fabric)
    assert few.counts == [2] * small.num_classes and not few.labels.is_floating_point()
    assert few.images.shape[1:] == small.images.shape[1:]
    x = few.batch()
    assert torch.isfinite(x).all() and x.min() >= 0 and x.max() <= 1
    if small.channels == 1:  # digits: labels are those of the images
        assert label_agreement(few, digits.train, 600)[0] > 60
    assert copy.fingerprint == replace(small).fingerprint  # the training images stay as they were


def test_the_same_seed_gives_the_same_set(name, small, fabric, tmp_path, monkeypatch):
    first = condense(name, small, 1, 4, STEPS, fabric)
    assert (first.classes, first.mean, first.std) == (small.classes, small.mean, small.std)
    assert first.provenance["method"] == name and first.provenance["seed"] == 4
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path / "elsewhere"))
    assert condense(name, small, 1, 4, STEPS, fabric).fingerprint == first.fingerprint


def test_dm_shows_real_and_synthetic_images_under_the_same_augmentation(digits, fabric):
    two = random_per_class(digits.train, 2, seed=0)
    first, second = two.subset(range(0, 20, 2)), two.subset(range(1, 20, 2))
    task = CondensationTask(second, 1, 0, 1, fabric, Checkpoint())
    torch.manual_seed(0)
    same, other = (
        DistributionMatching(task, LearnedImages(x, Normalisation(x.mean, x.std)), CONDENSERS["dm"])
        for x in (second, first)
    )
    other.network = same.network
    every = torch.arange(10)
    draws = [same.augment.draw(10) for _ in range(2)]
    assert all(same.match(every, every, draw) < 1e-6 for draw in draws)  # siamese: equal images stay equal
    a, b = (float(other.match(every, every, draw)) for draw in draws)
    assert abs(a - b) > 0.01 * a  # and what is compared depends on the draw


def test_soft_labels_and_unequal_classes_are_learned_from(digits, fabric):
    ten = random_per_class(digits.train, 10, seed=0)
    given = softened(ten.subset([i for i in range(100) if i % 10 <= ten.labels[i]]))
    schedule = Schedule(1, 40, 64, lr=0.03)
    assert train_from_scratch(given, digits.test, [0], schedule=schedule, fabric=fabric)[0] > 60


@pytest.fixture
def twelve(digits):
    "Twelve classes with numbers for names, which sort as 0, 1, 10, 11, 2, ...; the last two are negatives."
    train, names = random_per_class(digits.train, 20, seed=0), sorted(map(str, range(12)))
    images = torch.cat([train.images, 255 - train.images[:40]])
    number = torch.arange(12).repeat_interleave(20)
    place = torch.tensor([names.index(str(n)) for n in range(12)])
    return ImageSet(images, place[number], tuple(names), train.mean, train.std), number


@pytest.mark.parametrize("soft", [False, True])
def test_number_2_of_a_published_file_is_the_class_called_2(soft, twelve, tmp_path, recwarn):
    train, number = twelve
    labels = torch.eye(12)[number] if soft else number
    torch.save([train.batch()[::5], labels[::5]], tmp_path / "data.pt")
    few = load_condensed(tmp_path / "data.pt", train)
    assert few.hard_labels.tolist() == train.labels[::5].tolist()
    assert not [w for w in recwarn if "numbered" in str(w.message)]


def test_other_numbers_for_classes_with_names_are_noticed(digits, tmp_path):
    train = replace(digits.train, classes=tuple("abcdefghij"))
    few = random_per_class(train, 2, seed=0)
    torch.save([few.batch(), (few.labels + 1) % 10], tmp_path / "data.pt")
    with pytest.warns(UserWarning, match="data.pt: .* are its classes numbered in the order a, b, c, d, ..."):
        load_condensed(tmp_path / "data.pt", train)
