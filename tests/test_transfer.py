"""Surrogate sets: one contract for all of them, the teacher-balanced filter, and what Paper B says of their diversity."""

import warnings
import weakref
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from condexp.data import ImageSet, Splits, channel_statistics
from condexp.models import freeze
from condexp.quality import normalised_entropy, vendi_score
from condexp.shaders import evaluate, gl_context, render, write_program
from condexp.surrogates import SURROGATES, StreamSpec, filtered, overlap, own_settings, photograph, surrogate, to_channels
from condexp.training import Schedule, predict, train_classifier

try:
    gl_context()
    NO_GL = ""
except RuntimeError as error:
    NO_GL = str(error)


def first(name, n, size=32, seed=0, channels=3, **settings):
    "The first images of a stream."
    wanted = StreamSpec(size, seed, (0.5,) * channels, (0.25,) * channels)
    batches, found = [], 0
    for batch in SURROGATES[name](wanted, **own_settings(name, {"backend": "torch", "programs": 8} | settings)):
        batches.append(to_channels(batch, channels))
        found += len(batch)
        if found >= n:
            return torch.cat(batches)[:n]


@pytest.mark.parametrize("channels, size", [(1, 8), (3, 8), (1, 28), (3, 32), (3, 64)])
@pytest.mark.parametrize("name", SURROGATES)
def test_any_size_in_grey_and_colour(name, channels, size):
    images = first(name, 20, size, channels=channels)
    assert images.shape == (20, channels, size, size) and images.dtype == torch.uint8
    assert len(images.flatten(1).unique(dim=0)) > 15 and images.float().std() > 10


@pytest.mark.parametrize("name", SURROGATES)
def test_a_seed_is_a_set(name):
    assert torch.equal(first(name, 30), first(name, 30)) and not torch.equal(first(name, 30), first(name, 30, seed=1))


@pytest.fixture(scope="module")
def colour_teacher(fabric):
    "Tells ten regions of two photographs from one another."

    def regions(n, seed):
        g, crops = torch.Generator().manual_seed(seed), []
        for c in range(10):
            photo = photograph(("china", "flower")[c // 5])[:, :, 128 * (c % 5) : 128 * (c % 5) + 128]
            for _ in range(n):
                side = int(torch.randint(24, 96, (), generator=g))
                top, left = (int(torch.randint(m - side, (), generator=g)) for m in photo.shape[1:])
                crop = photo[None, :, top : top + side, left : left + side].float()
                crops.append(F.interpolate(crop, size=16, mode="bilinear", antialias=True))
        return torch.cat(crops).round().byte(), torch.arange(10).repeat_interleave(n)

    (x, y), (u, v) = regions(100, 0), regions(20, 1)
    about = tuple("abcdefghij"), *channel_statistics(x)
    splits = Splits(ImageSet(x, y, *about), ImageSet(u, v, *about), "")
    teacher, meta = train_classifier("wrn_10_1", splits, Schedule(6, 40, 64), 0, fabric)
    assert meta["accuracy"] > 60
    return freeze(teacher)


@pytest.mark.parametrize("grey", [False, True], ids=["colour", "grey"])
def test_shaders_are_more_diverse_than_leaves_and_leaves_than_noise(grey, colour_teacher, fabric):
    def diversity(name):
        x = first(name, 500, 16, programs=64)
        x = to_channels(to_channels(x, 1), 3) if grey else x
        like = colour_teacher.spec
        images = ImageSet(x, torch.zeros(500).long(), like.classes, like.mean, like.std)
        return vendi_score(predict(colour_teacher, images, fabric)[0])

    assert diversity("shaders") > diversity("leaves") > diversity("noise")


@pytest.mark.skipif(bool(NO_GL), reason=NO_GL)
def test_opengl_and_torch_paint_the_same():
    times = torch.tensor([0.5, 4.0, 9.0])
    for seed in range(200, 215):
        program = write_program(seed)
        apart = (render(program, times, 32).float() - evaluate(program, times, 32).float()).abs()
        assert (apart <= 2).float().mean() > 0.9, f"program {seed}"


def test_the_filter_fills_the_classes_evenly(teacher, digits, fabric):
    made = surrogate(digits.train, teacher, 300, 0, fabric)
    assert made.counts == [30] * 10 and normalised_entropy(torch.tensor(made.counts)) > 0.999
    assert (predict(teacher, made, fabric)[1].argmax(1) == made.labels).all()


def test_the_filter_stops_at_its_budget_and_says_so(teacher, fabric):
    with pytest.warns(UserWarning, match="are not full"):
        made = surrogate("noise", teacher, 100, 0, fabric, budget=5.0)
    assert len(made) < 100 and made.provenance["seen"] <= 5 * 100 + 250 and made.counts == made.provenance["counts"]


def test_the_filter_holds_no_more_than_it_keeps(teacher, fabric):
    "Of an endless stream of one image nothing but a tenth of what is wanted is kept, and no batch is held on to."
    batch, given, alive = first("leaves", 1, 16, channels=1).expand(50, -1, -1, -1), [], []

    def stream():
        while True:
            given.append(weakref.ref(fresh := batch.clone()))
            yield fresh
            del fresh
            alive.append(sum(ref() is not None for ref in given))

    made = filtered(stream(), teacher, 100, fabric, "uniform", budget=20.0)
    assert len(made) == 10 and made.provenance["seen"] == 2000 and len(given) == 40
    assert max(alive) <= 2


def test_from_the_cache_it_is_the_same_and_nothing_is_made(teacher, fabric, monkeypatch):
    def never(*_, **__):
        raise AssertionError("it was made again")

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one = surrogate("leaves", teacher, 60, 3, fabric, budget=2.0)
        monkeypatch.setattr("condexp.surrogates.filtered", never)
        two = surrogate("leaves", teacher, 60, 3, fabric, budget=2.0)
    assert one.fingerprint == two.fingerprint and one.provenance == two.provenance


def test_settings_of_other_surrogates_do_not_make_a_set_anew(teacher, fabric):
    one = surrogate("leaves", teacher, 60, 4, fabric, sampling="asis", programs=5)
    two = surrogate("leaves", teacher, 60, 4, fabric, sampling="asis", programs=6, photo="flower")
    assert one.provenance == two.provenance


def test_a_set_says_where_it_comes_from_whoever_had_its_pixels_first(teacher, digits, fabric):
    sets = [replace(digits.test, provenance={"method": method}) for method in ("random", "dm")]
    one, two = (surrogate(s, teacher, 20, 0, fabric, sampling="asis") for s in sets)
    assert one.fingerprint == two.fingerprint and (one.provenance["method"], two.provenance["method"]) == ("random", "dm")


def test_real_images_of_another_size_than_the_teachers_are_refused(teacher, digits, fabric):
    small = replace(digits.test, images=digits.test.images[..., :8, :8])
    with pytest.raises(ValueError, match="surrogate is '8 px', but the teacher takes 16 px"):
        surrogate(small, teacher, 4, 0, fabric)


@pytest.mark.skipif(bool(NO_GL), reason=NO_GL)
def test_what_cannot_be_read_in_a_folder_of_shaders_is_listed_and_the_rest_is_used(tmp_path):
    (tmp_path / "broken.json").write_text("{not json")
    (tmp_path / "empty.json").write_text('{"renderpass": [{"type": "image"}]}')
    bands = "void main() { gl_FragColor = vec4(fract(gl_FragCoord.xy * time / 9.), 0., 1.); }"
    (tmp_path / "good.frag").write_text(f"uniform float time; {bands}")
    (tmp_path / "still.frag").write_text("void main() { gl_FragColor = vec4(fract(gl_FragCoord.xy / 9.), 0., 1.); }")
    still = pytest.warns(UserWarning, match="nothing that changes, are left out: still.frag")
    with still, pytest.warns(UserWarning, match=r"(?s)2 of 4 programs cannot be used.*broken.json.*empty.json"):
        assert first("shaders", 40, shader_folder=str(tmp_path), backend="opengl").shape == (40, 3, 32, 32)


def test_images_that_are_no_numbers_are_refused(digits):
    with pytest.raises(ValueError, match="images is 'from nan to nan'"):
        replace(digits.test, images=torch.full((4, 1, 16, 16), float("nan")), labels=torch.zeros(4).long())


def test_classes_overlap_by_whole_words():
    assert overlap({"a": "moving van", "b": "savannah"}) == {"a": "truck"}
