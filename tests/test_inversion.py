"""What holds for every way of inverting a teacher; one that is added to INVERSIONS is covered on that day."""

import copy
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from condexp.data import ImageSet
from condexp.inversion import INVERSIONS, BatchNormHooks, ChannelMoments, Inverter, MetaGenerator
from condexp.inversion import PerBatchGenerator, SynthesisBatch, Term, adversarial, batchnorm_layers, bn_distance
from condexp.inversion import inversion_recipe, js_adversarial, negative_kl
from condexp.models import fingerprint, freeze, make_classifier
from condexp.training import make_fabric, seeded

SHAPES = [(1, 28), (3, 17)]  # channels, pixels; elsewhere (1, 8) and (3, 32)
WITH_STUDENT = [name for name, recipe in INVERSIONS.items() if any(term.after_warmup for term in recipe.terms)]


def short(name, steps=2):
    "A method with few steps a batch."
    return replace(INVERSIONS[name], steps=steps)


@pytest.fixture(params=INVERSIONS)
def recipe(request):
    return short(request.param)


def untrained(channels, size, classes=3, name="wrn_10_1", seed=0):
    like = ImageSet(
        torch.zeros(1, channels, size, size, dtype=torch.uint8),
        torch.zeros(1, dtype=torch.long),
        tuple("abcdefghij"[:classes]),
        (0.4,) * channels,
        (0.3,) * channels,
    )
    with seeded(seed):
        return make_classifier(name, like)


@pytest.fixture(scope="module")
def small():
    "A teacher that has seen a batch, so that its BN layers know something; and a student. 8 pixels."
    teacher = untrained(1, 8)
    with seeded(0), torch.no_grad():
        teacher.train()(torch.rand(64, 1, 8, 8))
    return freeze(teacher), untrained(1, 8, seed=1)


def images_of(recipe, teacher, student, fabric, n=6, batches=1, after_warmup=True, seed=0, alignment=None):
    targets = torch.arange(n) % len(teacher.spec.classes)
    with seeded(seed):
        inverter = Inverter(recipe, teacher, student, fabric, alignment, batch_size=n)
        return torch.cat([inverter.synthesize(targets, after_warmup) for _ in range(batches)]), inverter


@pytest.mark.parametrize("channels, size", SHAPES)
def test_images_have_the_shape_and_range_that_were_asked_for(recipe, channels, size, fabric):
    images, inverter = images_of(recipe, freeze(untrained(channels, size)), untrained(channels, size), fabric, batches=2)
    assert images.shape == (12, channels, size, size) and not images.requires_grad
    assert torch.isfinite(images).all() and images.min() >= 0 and images.max() <= 1
    assert len(inverter.losses) == 2 and all(isinstance(v, float) for v in inverter.losses[-1].values())
    assert 0 <= inverter.losses[-1]["intended_accuracy"] <= 100


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_teacher_without_batchnorm_is_inverted_by_what_is_left(recipe, name, fabric):
    teacher, seen = freeze(untrained(3, 32, name=name)), Seen()
    inverter = Inverter(recipe, teacher, untrained(3, 32, seed=1), fabric, seen, batch_size=4)
    assert torch.isfinite(inverter.synthesize(torch.arange(4) % 3)).all()
    assert seen.updates == 2 and seen.features[0].grad.abs().sum() > 0
    left_out = {t.name for t in recipe.terms if t.needs_batchnorm}
    assert {note.split()[0] for note in inverter.notes} == left_out and not left_out & inverter.losses[0].keys()
    assert all(f"does not apply: {name} has no BatchNorm layers" in note for note in inverter.notes)


@pytest.mark.parametrize("recipe", [short(name) for name in ("cmi", "nayer")], ids=lambda recipe: recipe.name)
def test_a_residual_teacher_and_an_unbalanced_batch(recipe, fabric):
    teacher = freeze(untrained(3, 16, name="resnet8_cifar"))
    with seeded(0):
        inverter = Inverter(recipe, teacher, untrained(3, 16, seed=1), fabric, batch_size=6)
        images = inverter.synthesize(torch.zeros(6, dtype=torch.long))
    assert len({image.numpy().tobytes() for image in images}) == 6  # one class alone, and still six images
    if recipe.name == "cmi":
        bank = inverter.state_dict()["terms"]["contrastive"]["_extra_state"]["bank"]
        assert bank.shape == (6, 2, 16 + 32 + 64) and bank.dtype == torch.float16


@pytest.mark.parametrize("where", ["in the pass", "in a term"])
def test_no_hook_is_left_behind_after_an_error_in_a_step(recipe, where, small, fabric, monkeypatch):
    teacher, student = small
    calls = []

    def fails(*_):
        calls.append(sum(hooks(model) for model in small))
        raise KeyboardInterrupt

    if where == "in the pass":
        monkeypatch.setattr(teacher.last_layer, "forward", fails)
    else:
        recipe = replace(recipe, terms=(*recipe.terms, Term("fails", 1.0, fails)))
    with pytest.raises(KeyboardInterrupt):
        images_of(recipe, teacher, student, fabric)
    assert len(calls) == 1 and (calls[0] > 0) == (where == "in the pass")  # hooks were there when it failed
    assert hooks(teacher) == hooks(student) == 0
    assert student.training and all(p.requires_grad for p in student.parameters())


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules())


def test_a_loss_that_is_no_number_is_named_with_what_to_lower(recipe, small, fabric):
    broken = Term("broken", 2.0, lambda batch: batch.images.sum() * float("nan"))
    with pytest.raises(FloatingPointError, match=f"the term 'broken' of {recipe.name} is nan: lower its weight"):
        images_of(replace(recipe, terms=(*recipe.terms, broken)), *small, fabric)


def test_the_same_seed_gives_the_same_images_and_changes_neither_teacher_nor_student(recipe, small, fabric):
    before = [fingerprint(model) for model in small]
    first, second, other = (images_of(recipe, *small, fabric, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert [fingerprint(model) for model in small] == before and small[1].training and not small[0].training
    assert all(p.grad is None for model in small for p in model.parameters()) and not any(map(hooks, small))


def test_a_saved_state_goes_on_with_the_same_images(recipe, small, fabric, tmp_path):
    targets = torch.arange(6) % 3
    one, two = (Inverter(recipe, *small, fabric, batch_size=6) for _ in range(2))
    one.synthesize(targets)
    torch.save(one.state_dict(), tmp_path / "state")
    two.load_state_dict(torch.load(tmp_path / "state", weights_only=True))
    for _ in range(2):
        with seeded(1):
            wanted = one.synthesize(targets)
        with seeded(1):
            assert torch.equal(two.synthesize(targets), wanted)
    assert one.losses == two.losses


class Float16:
    "What is read of a Fabric that computes in float16, which Lightning leaves to GPUs."

    device, _precision = torch.device("cpu"), SimpleNamespace(precision="16-mixed")

    def autocast(self):
        return torch.autocast("cpu", torch.float16)


class Faint:
    "An alignment with a small loss, so that gradients are too small for float16."

    def loss(self, features, targets):
        return 1e-4 * features.square().mean()

    def update(self, features, targets):
        pass


@pytest.mark.parametrize("name", ["deepinversion", "fast_published", "cmi", "pre_dfkd"])
def test_fp16_keeps_gradients_that_are_too_small_for_it(name, small, fabric, monkeypatch):
    "Of pixels, generators, inputs, CMI's head, a VAE and its latents: they are those of single precision."
    contrastive = [replace(t, weight=1e-4) for t in INVERSIONS[name].terms if t.name == "contrastive"]
    terms = contrastive or [Term("nothing", 1.0, lambda batch: 0 * batch.logits.mean())]
    recipe, found = replace(INVERSIONS[name], terms=tuple(terms), steps=1), []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda self: found.append(gradients_of(self)))
    for precision in (fabric, Float16()):
        images_of(recipe, *small, precision, alignment=Faint(), batches=1 + (name == "pre_dfkd"))
    exact, half = found[: len(found) // 2], found[len(found) // 2 :]
    assert exact[0].abs().max() < 1e-4 and len(exact) == {"fast_published": 2, "cmi": 2, "pre_dfkd": 42}.get(name, 1)
    for a, b in zip(exact, half, strict=True):
        assert torch.cosine_similarity(a, b, dim=0) > 0.98 and 0.9 < b.norm() / a.norm() < 1.1


def gradients_of(optimizer):
    parameters = (p for group in optimizer.param_groups for p in group["params"])
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


def test_bf16_gives_nearly_the_images_of_single_precision(recipe, small, fabric):
    recipe = replace(recipe, steps=1)  # of several, the best one need not be the same
    (half, rough), (single, exact) = (images_of(recipe, *small, f) for f in (make_fabric("cpu", "bf16"), fabric))
    assert half.dtype == torch.float32 and torch.isfinite(half).all()
    if recipe.name not in ("dafl", "zskt", "dfq", "pre_dfkd"):  # these pick images by the teacher's answer
        assert (half - single).abs().mean() < 0.01
    for name in exact.trace:
        assert rough.trace[name] == pytest.approx(exact.trace[name], rel=0.03, abs=0.02), name
    for name in {"bn", "contrastive"} & rough.trace.keys():  # computed in float32, of what networks gave in bf16
        assert torch.tensor(rough.trace[name]).bfloat16().item() != rough.trace[name][0]


def milder(teacher, share):
    "A student that names the same classes as the teacher, with less conviction."
    student = copy.deepcopy(teacher)
    for p in student.last_layer.parameters():
        p.data *= share
    return student


@pytest.mark.parametrize("name", WITH_STUDENT)
def test_the_adversarial_term_reads_the_student(name, teacher, fabric):
    "Once warming up is over. A public code base hands in the teacher as the student: the term is then constant."
    students = [milder(teacher, share) for share in (0.1, 1)]
    early = [images_of(short(name), teacher, student, fabric, after_warmup=False)[0] for student in students]
    (mild, a), (twin, b) = (images_of(short(name), teacher, student, fabric) for student in students)
    assert torch.equal(*early) and not torch.equal(mild, twin)
    (term,) = (t for t in INVERSIONS[name].terms if t.after_warmup)
    assert a.losses[0][term.name] < b.losses[0][term.name] - 1e-3
    assert b.losses[0][term.name] == pytest.approx(1 if term.loss is js_adversarial else 0, abs=1e-5)


def batch_with(teacher_logits, student_logits):
    return SynthesisBatch(None, None, None, None, teacher_logits, lambda _: student_logits)


def test_only_images_on_which_both_name_one_class_count_in_the_adversarial_term():
    teacher, agrees, disagrees = torch.tensor([[3.0, 0, 0]]), torch.tensor([[1.0, 0, 0]]), torch.tensor([[0.0, 9, 0]])
    alone = adversarial(batch_with(teacher, agrees))
    both = batch_with(teacher.repeat(2, 1), torch.cat([agrees, disagrees]))
    assert alone < -0.1 and adversarial(batch_with(teacher, disagrees)) == 0
    torch.testing.assert_close(adversarial(both), alone / 2)
    assert negative_kl(both) < adversarial(both) - 1  # without the mask the other image would outweigh everything


def naive_bn(model, images, first_layer=1):
    "The equation of DeepInversion (eq. 4), layer by layer in the order of the pass."
    found = []

    def record(layer, inputs):
        var, mean = torch.var_mean(inputs[0], (0, 2, 3), correction=0)
        found.append((mean - layer.running_mean).norm() + (var - layer.running_var).norm())

    handles = [m.register_forward_pre_hook(record) for m in batchnorm_layers(model)]
    model(images)
    for handle in handles:
        handle.remove()
    return sum(found) + (first_layer - 1) * found[0]


@pytest.mark.parametrize("name", ["wrn_10_1", "repvgg_a0"])  # the second lists its layers in another order than it runs
@torch.no_grad()
def test_the_distance_of_statistics_is_that_of_the_equation(name):
    model, images = untrained(3, 32, name=name), torch.rand(8, 3, 32, 32)
    model(images)  # in training mode: now its statistics differ from layer to layer
    with (hooks := BatchNormHooks(model.eval())).record():
        model(images)
    for first_layer in (1, 10) if name == "wrn_10_1" else (1,):
        wanted = naive_bn(model, images, first_layer)
        torch.testing.assert_close(bn_distance(hooks.read(), first_layer), wanted, rtol=1e-3, atol=1e-3)


@torch.no_grad()
def test_statistics_are_those_of_the_global_view_alone(small):
    teacher, images = small[0], torch.rand(6, 1, 8, 8)
    hooks, found = BatchNormHooks(teacher), []
    for rows, batch in ((0, images), (6, torch.cat([images, torch.rand_like(images) ** 4]))):
        with hooks.record(rows):
            teacher(batch)
        found.append(bn_distance(hooks.read()))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-4)


def test_a_variance_in_bf16_is_not_rounded_to_it():
    with seeded(0):
        x = torch.randn(6, 5, 4, 4).bfloat16()
    _, means, var = ChannelMoments.apply(x, 4)
    torch.testing.assert_close(means, x.float().mean((2, 3)))
    torch.testing.assert_close(var, x[:4].float().var((0, 2, 3), correction=0))


def test_a_teacher_to_which_no_term_applies_is_refused(fabric):
    only_bn = replace(INVERSIONS["fast"], terms=INVERSIONS["fast"].terms[:1])
    with pytest.raises(ValueError, match="inversion is 'fast', but one of its terms must apply from the first step"):
        Inverter(only_bn, freeze(untrained(1, 16, name="convnet3_w64")), untrained(1, 16), fabric)


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


def test_an_alignment_joins_every_method(recipe, small, fabric):
    seen = Seen()
    Inverter(recipe, *small, fabric, seen, batch_size=6).synthesize(torch.arange(6) % 3, after_warmup=False)
    assert seen.updates == len(seen.features) == 2
    assert all(f.grad is not None and f.grad.abs().sum() > 0 for f in seen.features)


@pytest.mark.parametrize(
    "asked, said",
    [
        (("slow",), "inversion is 'slow', but it must be one of fast,"),
        (("fast", {"tv": 1}), "term_weights is 'tv', but it must be one of bn, one_hot, adversarial"),
        (("fast", {"bn": "10"}), "term_weights is {'bn': '10'}, but a weight must be a number of at least 0"),
        (("fast", {"bn": -1}), "term_weights is {'bn': -1}, but a weight must be a number of at least 0"),
        (("fast", {"bn": float("nan")}), "term_weights is {'bn': nan}, but a weight must be a number of at least 0"),
        (("fast", {"bn": True}), "term_weights is {'bn': True}, but a weight must be a number of at least 0"),
        (("fast", "bn:0"), "term_weights is 'bn:0', but it must give a number for each term"),
        (("zskt", {"balance": 0}), "inversion is 'zskt', but one of its terms must apply from the first step"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(asked, said):
    with pytest.raises(ValueError) as error:
        inversion_recipe(*asked)
    assert str(error.value).startswith(said)


@pytest.mark.parametrize(
    "name, steps, weights, synthesizer, settings, of_terms",
    [
        (
            "fast_published", 5, {"bn": 10, "one_hot": 0.4, "adversarial": 1.1}, MetaGenerator,
            {"rule": "fomaml", "lr": 3e-3, "lr_z": 1e-2, "reset_after": 139, "reset_batchnorm": True},
            {"bn": {"momentum": 0.9}},
        ),
        (
            "cmi_published", 200, {"bn": 1, "one_hot": 1, "adversarial": 0.5, "contrastive": 0.8}, PerBatchGenerator,
            {"lr": 1e-3, "lr_z": 1e-3, "dcgan": True}, {"contrastive": {"temperature": 0.1, "dim": 256}},
        ),
    ],
)  # fmt: skip
def test_published_recipes_have_the_published_numbers(name, steps, weights, synthesizer, settings, of_terms):
    recipe = inversion_recipe(name)
    assert recipe.steps == steps and {term.name: term.weight for term in recipe.terms} == weights
    assert recipe.synthesizer.func is synthesizer and recipe.synthesizer.keywords == settings
    found = {t.name: t.loss.keywords for t in recipe.terms if isinstance(t.loss, partial)}
    assert found == of_terms and all(t.after_warmup == (t.name == "adversarial") for t in recipe.terms)


def test_recipes_hold_no_state():
    "What makes a term's loss or a synthesizer is a function, a class, or a partial of one with plain settings."
    for recipe in INVERSIONS.values():
        for maker in (recipe.synthesizer, *(term.loss for term in recipe.terms)):
            settings = maker.keywords if isinstance(maker, partial) else {}
            assert callable(maker) and all(type(value) in (int, float, str, bool) for value in settings.values())
            assert not isinstance(maker, torch.nn.Module)
