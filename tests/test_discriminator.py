"""Feature alignment does what it is for: it brings synthetic images nearer to real ones, class by class."""

from dataclasses import replace

import pytest
import torch

from condexp.augment import identity, standard
from condexp.discriminator import alignment_settings, class_frechet, feature_bank, make_alignment
from condexp.inversion import Inverter, WeightedTerms, inversion_recipe
from condexp.models import make_classifier
from condexp.training import predict, seeded

TARGETS = torch.arange(10).repeat(2)
GATED = {"min_fake_probability": 1.0}  # what the generator is told depends on the discriminator's past


@pytest.fixture
def align(teacher, condensed, fabric):
    "Makes an alignment with a small bank."

    def make(name, seed=0, **changes):
        settings = replace(alignment_settings(name), views=5, **changes)
        return make_alignment(settings, teacher, condensed, standard(condensed), fabric, seed)

    return make


@pytest.fixture
def features(teacher):
    "Of twenty images that a generator might make."
    with seeded(0), torch.no_grad():
        return teacher.features_logits(torch.rand(len(TARGETS), 1, 16, 16))[0]


def test_it_lowers_the_distance_to_real_images_within_a_class(align, teacher, digits, fabric):
    real, labels = predict(teacher, digits.train, fabric)[0], digits.train.hard_labels
    student, targets = make_classifier("wrn_10_1", digits.train), torch.arange(10).repeat(3)

    def distance(alignment):
        recipe = inversion_recipe("fast", {"bn": 0.0})  # BatchNorm's statistics would do a part of it
        with seeded(0):
            inverter = Inverter(recipe, teacher, student, fabric, alignment)
            batches = [inverter.synthesize(targets, after_warmup=False) for _ in range(6)]
        made, logits = teacher.features_logits(torch.cat(batches[2:]))
        assert (logits.argmax(1) == targets.repeat(4)).float().mean() > 0.8  # still of the classes asked for
        return class_frechet(made.detach(), targets.repeat(4), real, labels)

    assert distance(align("conditional")) < 0.8 * distance(None)


@pytest.mark.parametrize("name", ["conditional", "auxiliary", "two_k"])
def test_it_prefers_features_of_the_class_that_was_asked_for(name, align, features, teacher, digits, fabric):
    real, labels = predict(teacher, digits.test, fabric)[0][:200], digits.test.hard_labels[:200]
    alignment = align(name)
    for _ in range(20):
        alignment.update(features, TARGETS)
    assert alignment.loss(real, labels) < 0.9 * alignment.loss(real, (labels + 1) % 10)


@pytest.mark.parametrize("method", ["fast", "dafl"])
@pytest.mark.parametrize("name, gate", [("conditional", 1.0), ("conditional_few", 0.1)])
def test_a_ratio_sets_the_length_of_the_gradient_at_the_images(method, name, gate, align, teacher, fabric):
    recipe, alignment = inversion_recipe(method), align(name, ratio=0.3)
    alignment.fake_probability *= 0.03  # of 0.5, where fakes are not told from real ones
    loop = Inverter(recipe, teacher, teacher, fabric, alignment)
    loop.synthesizer.begin(TARGETS)
    batch = loop.teacher_pass(images := loop.synthesizer.images(), TARGETS if loop.synthesizer.asks else None)
    total = WeightedTerms(recipe, teacher).values(batch, False)["total"]
    (own,) = torch.autograd.grad(total, images, retain_graph=True)
    (both,) = torch.autograd.grad(loop.terms.values(batch, False)["total"], images)
    assert (both - own).norm() / own.norm() == pytest.approx(0.3 * gate, rel=1e-3)


def test_the_bank_holds_augmented_views(teacher, condensed, fabric):
    views, each = 4, lambda augment: feature_bank(teacher, condensed, augment(condensed), views, fabric).features
    assert len(each(identity).unique(dim=0)) == len(condensed)
    assert len(each(standard).unique(dim=0)) > 0.9 * views * len(condensed)


@pytest.mark.parametrize("name", ["conditional", "instance_noise", "mmd"])
def test_it_draws_from_a_stream_of_its_own(name, align, features):
    before = torch.get_rng_state()
    alignment = align(name)
    first = alignment.loss(features, TARGETS)
    alignment.update(features, TARGETS)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(1)  # what is drawn outside does not matter
    assert torch.equal(align(name).loss(features, TARGETS), first)


@pytest.mark.parametrize("name, changes", [("conditional", GATED), ("instance_noise", {}), ("mmd", {})])
def test_it_goes_on_where_it_stopped(name, changes, align, features):
    def go(alignment, steps=3):
        losses = []
        for _ in range(steps):
            losses.append(alignment.loss(features, TARGETS))
            alignment.update(features, TARGETS)
        return torch.stack(losses)

    alignment, other = align(name, **changes), align(name, seed=1, **changes)
    go(alignment)
    other.load_state_dict(alignment.state_dict())
    assert torch.equal(go(alignment), go(other))


@pytest.mark.parametrize("name", ["conditional", "gradient_penalty", "mmd"])
def test_it_computes_in_single_precision_inside_autocast(name, align, features):
    def go(alignment):
        alignment.update(features, TARGETS)
        return alignment.loss(features, TARGETS)

    one, other = align(name), align(name)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = go(one)
    assert mixed.dtype == torch.float32 and torch.equal(mixed, go(other))


def test_accuracies_of_the_discriminator_are_recorded(align, features):
    alignment = align("conditional")
    for _ in range(2):
        alignment.update(features, TARGETS)
        alignment.record()
    assert set(alignment.history) == {"real", "fake"}
    assert all(len(curve) == 2 and 0 <= min(curve) <= max(curve) <= 1 for curve in alignment.history.values())
