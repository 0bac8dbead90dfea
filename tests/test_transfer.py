"""Transfer sets: one contract for all sources, the teacher-balanced filter, the attack's precision."""

import functools
import warnings
import weakref
from dataclasses import replace

import pytest
import torch
from conftest import Killed

from condexp.boundary import AttackSettings, attack_batches, attacked_set, target_classes
from condexp.cache import Checkpoint
from condexp.kd import Distillation, distil, estimate_statistics
from condexp.models import ModelSpec, fingerprint, freeze, from_spec
from condexp.quality import normalised_entropy, vendi_score
from condexp.shaders import evaluate, gl_context, render, write_program
from condexp.sources import SOURCES, StreamSpec, to_channels
from condexp.training import accuracy, make_fabric, predict, seeded
from condexp.transfer import EXAMINED, TransferSettings, filtered, overlap, source_settings, take, transfer_set

try:
    gl_context()
    NO_GL = ""
except RuntimeError as error:
    NO_GL = str(error)

SMALL = {"backend": "torch", "programs": 4, "shapes": 30, "batch": 30, "warmup": 0, "inversion_steps": 2}


@functools.cache
def untrained(size, channels):
    "A teacher that has learned nothing."
    spec = ModelSpec("wrn_10_1", tuple("abcdefghij"), channels, size, (0.5,) * channels, (0.25,) * channels)
    with seeded(0):
        return freeze(from_spec(spec))


def first(name, n, size=16, seed=0, channels=3, **settings):
    "The first images of a stream."
    asked = untrained(size, channels)
    spec = StreamSpec(size, seed, asked.spec.mean, asked.spec.std, asked, make_fabric("cpu", "32"))
    stream = SOURCES[name](spec, **source_settings(name, SMALL | settings))
    return to_channels(torch.cat(take(stream, n))[:n], channels)


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 8), (1, 28), (3, 64)])
@pytest.mark.parametrize("name", SOURCES)
def test_any_size_in_grey_and_colour(name, channels, size):
    images = first(name, 20, size, channels=channels)
    assert images.shape == (20, channels, size, size) and images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) > 15 and images.float().std() > 10


@pytest.mark.parametrize("name", SOURCES)
def test_a_seed_is_a_stream_whatever_was_drawn_before(name):
    one = first(name, 30)
    torch.manual_seed(7)
    assert torch.equal(one, first(name, 30)) and not torch.equal(one, first(name, 30, seed=1))


@pytest.mark.parametrize("name", SOURCES)
def test_a_stream_leaves_the_global_random_state_alone(name):
    before = torch.get_rng_state()
    first(name, 20)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_shaders_are_more_diverse_than_leaves_and_leaves_than_noise(grey):
    "Paper B's order, in the features of a network that has learned nothing."
    def diversity(name):
        x = first(name, 300, programs=64, shapes=100, batch=300)
        x = to_channels(to_channels(x, 1), 3) if grey else x
        with torch.no_grad():
            return vendi_score(untrained(16, 3).features_logits(x.float() / 255)[0])

    assert diversity("shaders") > diversity("leaves") > diversity("noise")


@pytest.mark.skipif(bool(NO_GL), reason=NO_GL)
def test_opengl_and_torch_draw_the_same():
    times = torch.tensor([0.5, 4.0, 9.0])
    for seed in range(200, 206):
        program = write_program(seed)
        apart = (render(program, times, 32).float() - evaluate(program, times, 32).float()).abs()
        assert (apart <= 2).float().mean() > 0.9, f"program {seed}"


@pytest.mark.skipif(bool(NO_GL), reason=NO_GL)
def test_what_cannot_be_read_in_a_folder_of_shaders_is_listed_and_the_rest_is_used(tmp_path):
    (tmp_path / "broken.json").write_text("{not json")
    (tmp_path / "empty.json").write_text('{"renderpass": [{"type": "image"}]}')
    bands = "void main() { gl_FragColor = vec4(fract(gl_FragCoord.xy * time / 9.), 0., 1.); }"
    (tmp_path / "good.frag").write_text(f"uniform float time; {bands}")
    (tmp_path / "still.frag").write_text("void main() { gl_FragColor = vec4(fract(gl_FragCoord.xy / 9.), 0., 1.); }")
    still = pytest.warns(UserWarning, match="nothing that changes, are left out: still.frag")
    with still, pytest.warns(UserWarning, match=r"(?s)2 of 4 programs cannot be used.*broken.json.*empty.json"):
        assert first("shaders", 40, 32, shader_folder=str(tmp_path), backend="opengl").shape == (40, 3, 32, 32)


def test_the_filter_fills_the_classes_evenly(teacher, digits, fabric):
    made = transfer_set(digits.train, teacher, 300, 0, fabric)
    assert made.counts == [30] * 10 and normalised_entropy(torch.tensor(made.counts)) > 0.999
    assert (predict(teacher, made, fabric)[1].argmax(1) == made.labels).all()


def test_the_filter_takes_the_first_candidates_that_have_room_however_they_are_batched(teacher, digits, fabric):
    settings, images = TransferSettings(100, budget=20.0), digits.train.images
    one, two = (filtered(iter(images.split(n)), teacher, settings, fabric) for n in (7, 250))
    seen, kept = predict(teacher, digits.train, fabric)[1].argmax(1), []
    for c in range(10):
        kept += (seen == c).nonzero().flatten()[:10].tolist()
    assert torch.equal(one.images, images[sorted(kept)]) and one.fingerprint == two.fingerprint


def test_the_filter_asks_about_many_candidates_at_a_time(teacher, digits, fabric, monkeypatch):
    asked = []
    monkeypatch.setattr("condexp.transfer.ASKED", {})  # as on a GPU
    hook = teacher.register_forward_hook(lambda _, x, __: asked.append(len(x[0])))
    filtered(iter(digits.train.images.split(16)), teacher, TransferSettings(1000, sampling="none"), fabric)
    hook.remove()
    assert asked == [EXAMINED, EXAMINED]


def test_the_filter_stops_at_its_budget_and_says_so(teacher, fabric):
    with pytest.warns(UserWarning, match="are not full"):
        made = transfer_set("noise", teacher, 100, 0, fabric, budget=5.0)
    assert len(made) < 100 and made.provenance["examined"] == 500 and made.counts == made.provenance["counts"]
    assert sum(made.provenance["predicted"]) == 500


def test_the_filter_holds_no_more_than_it_keeps(teacher, fabric):
    "Of an endless stream of one image nothing but a tenth of what is wanted is kept, and no batch is held on to."
    batch, given, alive = first("leaves", 1, channels=1).expand(50, -1, -1, -1), [], []

    def stream():
        while True:
            given.append(weakref.ref(fresh := batch.clone()))
            yield fresh
            del fresh
            alive.append(sum(ref() is not None for ref in given))

    made = filtered(stream(), teacher, TransferSettings(100), fabric)
    assert len(made) == 10 and made.provenance["examined"] == 2000 and len(given) == 40
    assert max(alive) <= 4  # two are as many as are wanted


def test_killed_after_a_batch_the_filter_goes_on_to_the_same_set(teacher, fabric, tmp_path):
    spec, settings, path = StreamSpec(16, 0, (0.5,), (0.25,)), TransferSettings(100, budget=5.0), tmp_path / "filter"
    leaves = lambda: SOURCES["leaves"](spec, shapes=20, batch=50)
    with pytest.raises(KeyboardInterrupt):
        filtered(leaves(), teacher, settings, fabric, Killed(path))
    assert Checkpoint(path).load()["batches"] == {"given": 2}  # of fifty images each: as many as are wanted
    resumed, uninterrupted = (filtered(leaves(), teacher, settings, fabric, c) for c in (Checkpoint(path), Checkpoint()))
    assert resumed.fingerprint == uninterrupted.fingerprint and len(resumed) < 100
    assert resumed.provenance["examined"] == uninterrupted.provenance["examined"] == 500


def test_killed_after_a_batch_the_attack_goes_on_to_the_same_images(teacher, digits, fabric, tmp_path):
    few, path = digits.test.subset(range(8)), tmp_path / "attacks"
    asked = few, target_classes(few.labels, 10, 3), teacher, fabric, AttackSettings(), 8
    with pytest.raises(KeyboardInterrupt):
        attack_batches(*asked, Killed(path))
    assert Checkpoint(path).load()["done"] == 8 < 8 * 3
    resumed, uninterrupted = (attack_batches(*asked, c) for c in (Checkpoint(path), Checkpoint()))
    assert torch.equal(torch.cat(resumed.kept), torch.cat(uninterrupted.kept)) and resumed.done == 24
    assert torch.equal(resumed.crossed, uninterrupted.crossed)


def never(*_, **__):
    raise AssertionError("it was made again")


def test_from_the_cache_it_is_the_same_and_nothing_is_made(teacher, fabric, monkeypatch):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = transfer_set("leaves", teacher, 60, 3, fabric, budget=2.0, batch=30)
        monkeypatch.setattr("condexp.transfer.filtered", never)
        two = transfer_set("leaves", teacher, 60, 3, fabric, budget=2.0, batch=30)
    assert one.fingerprint == two.fingerprint and one.provenance == two.provenance


def test_settings_of_other_sources_do_not_make_a_set_anew(teacher, fabric, monkeypatch):
    one = transfer_set("leaves", teacher, 60, 4, fabric, sampling="none", batch=60, programs=5)
    monkeypatch.setattr("condexp.transfer.filtered", never)
    two = transfer_set("leaves", teacher, 60, 4, fabric, sampling="none", batch=60, programs=6, photo="flower")
    assert one.fingerprint == two.fingerprint


def two_greys(spec, low=0):
    "A source of somebody's own."
    while True:
        yield torch.tensor([low, 250], dtype=torch.uint8).view(1, 1, 1, 2).repeat(8, 1, spec.size, spec.size // 2)


def two_other_greys(spec, low=0):
    "Another one."
    while True:
        yield torch.tensor([low, 99], dtype=torch.uint8).view(1, 1, 1, 2).repeat(8, 1, spec.size, spec.size // 2)


def test_a_source_written_anew_or_set_otherwise_is_another_set(teacher, fabric, monkeypatch):
    monkeypatch.setitem(SOURCES, "greys", two_greys)
    make = lambda **own: transfer_set("greys", teacher, 8, 0, fabric, sampling="none", **own).images.unique().tolist()
    assert make() == [0, 250] and make(low=9) == [9, 250]
    monkeypatch.setitem(SOURCES, "greys", two_other_greys)
    assert make() == [0, 99]


def test_a_setting_without_a_plain_default_is_refused(teacher, fabric, monkeypatch):
    monkeypatch.setitem(SOURCES, "stripes", lambda spec, palette=(), width=3: iter(()))
    with pytest.raises(ValueError, match="surrogate is 'stripes', but each of its settings .* default: palette"):
        transfer_set("stripes", teacher, 8, 0, fabric)


def test_a_setting_that_no_source_has_is_refused(teacher, digits, fabric):
    for source in ("leaves", digits.train):
        with pytest.raises(ValueError, match="^shape is 30, but no source has such a setting; there are backend, batch,"):
            transfer_set(source, teacher, 8, 0, fabric, shape=30)


def test_the_old_name_of_no_sampling_is_accepted_and_says_the_new_one(teacher, digits, fabric):
    with pytest.warns(UserWarning, match="sampling 'asis' is now called 'none'"):
        old = transfer_set(digits.test, teacher, 20, 0, fabric, sampling="asis")
    new = transfer_set(digits.test, teacher, 20, 0, fabric, sampling="none")
    assert old.provenance == new.provenance and new.provenance["sampling"] == "none"


def test_a_set_says_where_it_comes_from_whoever_had_its_pixels_first(teacher, digits, fabric):
    sets = [replace(digits.test, provenance={"method": method}) for method in ("random", "dm")]
    one, two = (transfer_set(s, teacher, 20, 0, fabric, sampling="none") for s in sets)
    assert one.fingerprint == two.fingerprint and (one.provenance["method"], two.provenance["method"]) == ("random", "dm")


def test_real_images_of_another_size_than_the_teachers_are_refused(teacher, digits, fabric):
    small = replace(digits.test, images=digits.test.images[..., :8, :8])
    with pytest.raises(ValueError, match="surrogate is '8 px', but the teacher takes 16 px"):
        transfer_set(small, teacher, 4, 0, fabric)


def test_classes_overlap_by_whole_words():
    assert overlap({"a": "moving van", "b": "savannah"}) == {"a": "truck"}


def test_the_attack_runs_in_the_precision_of_the_run(teacher, digits):
    few, seen = digits.test.subset(range(4)), []
    hook = teacher.register_forward_hook(lambda _, __, z: seen.append(z.dtype))
    attacked_set(few, teacher, 0, make_fabric("cpu", "bf16"), targets=1)
    hook.remove()
    assert len(seen) > 5 and set(seen) == {torch.bfloat16}


def test_noise_teaches_by_the_statistics_of_its_batches_and_the_teacher_forgets_nothing(
    teacher, digits, condensed, fabric
):
    noise, before = transfer_set("noise", teacher, 400, 0, fabric, sampling="none"), fingerprint(teacher)
    running = Distillation(epochs=1, steps=80, batch_size=64)
    one, two = (
        distil("transfer set", teacher, "wrn_10_1", {"transfer set": noise}, digits, settings, 0, fabric)
        for settings in (running, replace(running, batch_statistics=True))
    )
    assert fingerprint(teacher) == before  # weights and buffers
    assert two.accuracy > max(45, one.accuracy + 25)
    estimate_statistics(two.student, condensed, fabric)
    assert accuracy(two.student, digits.test, fabric) > two.accuracy - 15  # now one image at a time
