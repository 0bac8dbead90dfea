"""Feature alignment does what it is for: it brings synthetic images nearer to real ones, class by class."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from condexp.augment import identity, standard
from condexp.discriminator import ALIGNMENTS, GAN_LOSSES, DiscriminatorSettings, FeatureDiscriminator
from condexp.discriminator import alignment_settings, class_frechet, class_mmd, class_mmd_loss, class_variance
from condexp.discriminator import feature_bank, frechet_distance, kernel_scales, make_alignment, mmd
from condexp.discriminator import resolve_alignment
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


ALL_KINDS = "conditional", "conditional_few", "auxiliary", "two_k", "unconditional", "mmd", "hinge", "instance_noise"


@pytest.mark.parametrize("name", ALL_KINDS)
def test_its_gradient_reaches_every_feature_and_learning_leaves_the_generator_alone(name, align, features):
    alignment, fakes = align(name), features.clone().requires_grad_(True)
    loss = alignment.loss(fakes, TARGETS)
    loss.backward()
    gradient = fakes.grad.clone()
    assert loss.shape == () and loss.isfinite() and (gradient != 0).any(1).all()
    if name != "mmd":  # the generator's loss is not the discriminator's
        assert all(p.grad is None for p in alignment.discriminator.parameters())
    alignment.update(fakes, TARGETS)
    assert torch.equal(fakes.grad, gradient) and torch.equal(fakes.detach(), features)


def test_every_class_needs_a_condensed_image(teacher, condensed, fabric):
    no_nines = condensed.subset(torch.where(condensed.hard_labels != 9)[0])
    with pytest.raises(ValueError, match="condensed is 'without images of 9', but every class"):
        make_alignment(alignment_settings("mmd"), teacher, no_nines, identity(condensed), fabric, 0)


@pytest.fixture
def clouds():
    "Gaussian features of ten classes that lie apart, and their labels."
    with seeded(0):
        return torch.randn(400, 6) + 4 * torch.randn(10, 6).repeat(40, 1), torch.arange(10).repeat(40)


def test_a_distance_within_the_classes_sees_wrong_labels_and_one_over_the_whole_set_does_not(clouds):
    x, y = clouds
    wrong = (y + 1) % 10
    for distance in (class_frechet, class_mmd):
        assert distance(x, y, x, y) < 1e-6 < 0.1 < distance(x, wrong, x, y)
    assert frechet_distance(x, x) < 1e-6 and mmd(x, x) < 1e-9
    assert frechet_distance(x, x + 2) == pytest.approx(6 * 4, rel=1e-3)
    with pytest.raises(ValueError, match="share a class"):
        class_frechet(x, y + 10, x, y)


def test_distances_of_one_or_two_samples_a_class_are_numbers(clouds):
    x, y = clouds
    assert 0 <= class_frechet(x[:20], y[:20], x, y) < class_frechet(x[:20] + 3, y[:20], x, y)
    assert math.isfinite(class_frechet(x[:1], y[:1], x, y))
    assert class_variance(x[:10], y[:10], x, y) == 0 and class_variance(x, y, x, y) == pytest.approx(100)


def test_the_discrepancy_that_is_minimised_is_that_within_the_classes(clouds):
    x, two = clouds[0], torch.arange(400) % 2
    a, b, apart = x[:200] * 0.1, x[200:] * 0.1, two[:200, None] * 4.0
    assert abs(class_mmd_loss(a + apart, b + apart, two[:200], kernel_scales(b + apart))) < 0.05
    assert class_mmd_loss(a + apart, b + 4 - apart, two[:200], kernel_scales(b + apart)) > 0.5


@pytest.mark.parametrize("name, judge, told", [
    ("non_saturating", 2 * math.log(2), math.log(2)), ("hinge", 2, 0), ("least_squares", 1, 0.5)])  # fmt: skip
def test_losses_have_their_known_values_and_reward_what_they_should(name, judge, told):
    loss, zeros, ones = GAN_LOSSES[name], torch.zeros(3), torch.ones(3)
    assert loss.discriminator(zeros, zeros) == pytest.approx(judge) and loss.generator(zeros) == pytest.approx(told)
    assert loss.discriminator(ones, -ones) < judge < loss.discriminator(-ones, ones)
    assert loss.generator(ones) < told < loss.generator(-ones)


def test_forms_of_a_discriminator_say_what_they_should():
    with seeded(0):
        x, y = torch.randn(40, 16), torch.arange(40) % 10
        told, plain, judges, softmax = (
            FeatureDiscriminator(16, 10, form) for form in ("projection", "none", "auxiliary", "two_k")
        )
        torch.nn.init.normal_(told.classes.weight)
    assert not torch.equal(told(x, y).real, told(x, y.roll(1)).real)
    assert torch.equal(plain(x, y).real, plain(x, y.roll(1)).real) and plain(x, y).class_loss(0, y) == 0
    verdict = judges(x, y)
    assert verdict.class_loss(0, y) == verdict.class_loss(1, y)
    first, second = verdict.halves()
    assert torch.equal(torch.cat([first.classes, second.classes]), verdict.classes)
    verdict, outputs = softmax(x, y), softmax.judge(F.leaky_relu(softmax.embed(x), 0.2))
    for side, sign in enumerate((-1, 1)):  # one softmax over 2 K classes is the GAN loss and the class's
        both = F.softplus(sign * verdict.real).mean() + verdict.class_loss(side, y)
        torch.testing.assert_close(F.cross_entropy(outputs, y + 10 * side), both)


def test_spectral_normalisation_keeps_a_discriminator_from_being_steep():
    with seeded(0):
        plain, told = (FeatureDiscriminator(16, 10, form, spectral=True).eval() for form in ("none", "projection"))
        x, y = torch.randn(200, 16), torch.arange(200) % 10
        moved = x + 0.1 * torch.randn_like(x)

    def slope(discriminator):
        return ((discriminator(moved, y).real - discriminator(x, y).real).abs() / (moved - x).norm(dim=1)).max()

    assert slope(plain) < 1.2 and slope(told) < 2.4  # 1, or 2 with the class's head; the norm is estimated


@pytest.mark.parametrize("setting, said", [
    ({"loss": "wgan"}, "alignment_loss is 'wgan', but it must be one of non_saturating, hinge, least_squares"),
    ({"r1": float("nan")}, "alignment_r1 is nan, but it must be a number of at least 0"),
    ({"views": 0}, "alignment_views is 0, but"),
    ({"ratio": 0.0}, "alignment_ratio is 0.0, but it must be a positive number, or None"),
    ({"conditioning": "acgan"}, "alignment_conditioning is 'acgan', but it must be one of projection, auxiliary,"),
])  # fmt: skip
def test_settings_that_make_no_sense_are_refused(setting, said):
    with pytest.raises(ValueError) as error:
        DiscriminatorSettings(**setting)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize("asked, said", [
    (("gan",), "alignment is 'gan', but it must be one of conditional,"),
    (("mmd", -1), "alignment_weight is -1, but it must be a number of at least 0"),
    (("mmd", 1.0, 0.5), "alignment_ratio is 0.5, but it is in the place of alignment_weight"),
])  # fmt: skip
def test_presets_that_cannot_be_are_refused(asked, said):
    with pytest.raises(ValueError) as error:
        alignment_settings(*asked)
    assert str(error.value).startswith(said)


def test_presets_differ_and_auto_chooses_by_the_number_of_images():
    assert len(set(ALIGNMENTS.values())) == len(ALIGNMENTS)
    assert alignment_settings("conditional", 1.0) == DiscriminatorSettings(weight=1.0)
    assert [resolve_alignment("auto", n) for n in (1, 4, 5)] == ["conditional_few", "conditional_few", "conditional"]
    assert resolve_alignment("mmd", 1) == "mmd"  # what is asked for by name stays
