"""A classifier is trained once; killed and started again it comes out the same."""

import numpy as np
import pytest
import torch
from conftest import Killed

from condexp import training
from condexp.augment import standard
from condexp.cache import Checkpoint
from condexp.models import fingerprint, load_classifier, make_classifier, save_classifier
from condexp.training import (
    Schedule,
    Stream,
    accuracy,
    fit,
    make_fabric,
    precision_of,
    resume,
    seeded,
    snapshot,
    train_classifier,
)

SCHEDULE = Schedule(epochs=4, steps=6, batch_size=32)


def train(digits, fabric, checkpoint):
    with seeded(3):
        model = make_classifier("wrn_10_1", digits.train)
        history = fit(model, digits.train, SCHEDULE, standard(digits.train), fabric, checkpoint)
    return fingerprint(model), history


def losses(history):
    return [entry["loss"] for entry in history]


def test_killed_after_an_epoch_it_ends_with_the_same_weights(digits, fabric, tmp_path):
    wanted, history = train(digits, fabric, Checkpoint())
    path = tmp_path / "state.checkpoint"
    with pytest.raises(KeyboardInterrupt):
        train(digits, fabric, Killed(path))
    resumed, again = train(digits, fabric, Checkpoint(path))
    assert resumed == wanted and losses(again) == losses(history)


def test_a_teacher_is_trained_once_and_then_loaded(digits, fabric):
    first, meta = train_classifier("wrn_10_1", digits, SCHEDULE, seed=5, fabric=fabric)
    second, again = train_classifier("wrn_10_1", digits, SCHEDULE, seed=5, fabric=fabric)
    assert fingerprint(first) == fingerprint(second) and meta == again  # the seconds it took are in there


def test_another_seed_is_another_teacher(digits, fabric):
    models = [train_classifier("wrn_10_1", digits, SCHEDULE, seed=seed, fabric=fabric)[0] for seed in (5, 6)]
    assert fingerprint(models[0]) != fingerprint(models[1])


def test_a_teacher_file_gives_the_same_answers_and_says_what_it_is(trained, digits, fabric, tmp_path):
    teacher, meta = trained
    save_classifier(tmp_path / "weights.safetensors", teacher, meta)
    again, read = load_classifier(tmp_path / "weights.safetensors")
    assert read["accuracy"] == meta["accuracy"] and again.spec == teacher.spec
    assert accuracy(again, digits.test, fabric) == meta["accuracy"]


def test_training_reads_no_test_image(digits, fabric):
    blank = digits._replace(test=digits.test.subset(range(10)))
    models = [train_classifier("wrn_10_1", s, SCHEDULE, seed=7, fabric=fabric)[0] for s in (digits, blank)]
    assert fingerprint(models[0]) == fingerprint(models[1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ValueError, match="^device is 'cuda', but"):
        make_fabric("cuda")


@pytest.mark.parametrize("native, chosen", [(True, "bf16-mixed"), (False, "32-true")])
def test_a_cpu_computes_in_half_precision_where_it_has_the_instructions(native, chosen, monkeypatch):
    monkeypatch.setattr(training, "bf16_on_cpu", lambda: native)
    assert precision_of(make_fabric("cpu")) == chosen and precision_of(make_fabric("cpu", "32")) == "32-true"


@pytest.mark.parametrize("native, chosen", [(True, "bf16"), (False, "fp16")])
def test_a_gpu_computes_in_the_half_precision_that_it_has(native, chosen, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: native)
    assert training.automatic_precision(cuda=True) == chosen


@pytest.mark.parametrize("precision", ["fp16", "tf32"])
def test_what_only_a_gpu_computes_in_is_refused_on_a_cpu(precision):
    with pytest.raises(ValueError, match=f"^precision is '{precision}', but only a CUDA device"):
        make_fabric("cpu", precision)


def draw():
    "Of both global random states."
    return [*torch.rand(2).tolist(), np.random.rand()]


def test_a_stream_goes_on_where_it_was_whatever_others_draw():
    alone, disturbed, other = Stream(0, "student"), Stream(0, "student"), Stream(0, "discriminator")
    with alone:
        wanted = draw() + draw()
    with disturbed:
        got = draw()
    with other, seeded(4):
        draw()
    draw()
    with disturbed:
        got += draw()
    assert got == wanted


def test_a_stream_is_told_by_its_seed_and_by_its_name():
    numbers = []
    for seed, name in ((0, "student"), (1, "student"), (0, "weights")):
        with Stream(seed, name):
            numbers.append(tuple(draw()))
    assert len(set(numbers)) == 3


def test_a_stream_leaves_the_outer_random_numbers_alone_even_after_an_error():
    with seeded(0):
        wanted = draw()
    with seeded(0):
        with pytest.raises(KeyError), Stream(0, "student"):
            draw()
            raise KeyError
        assert draw() == wanted


def test_what_a_snapshot_kept_is_put_back(tmp_path):
    parts, checkpoint = {"layer": torch.nn.Linear(2, 2), "stream": Stream(0, "a")}, Checkpoint(tmp_path / "state")
    assert resume(checkpoint, parts) == {}
    with parts["stream"]:
        draw()
    checkpoint.save(snapshot(parts, history=[1, 2]))
    wanted = draw()
    with parts["stream"]:
        after = draw()
    other = {"layer": torch.nn.Linear(2, 2), "stream": Stream(1, "b")}
    assert resume(checkpoint, other)["history"] == [1, 2] and draw() == wanted
    with other["stream"]:
        assert draw() == after and torch.equal(other["layer"].weight, parts["layer"].weight)


def test_seeded_leaves_the_outer_random_numbers_alone():
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded(1):
        torch.rand(5)
    assert torch.equal(torch.cat([first, torch.rand(1)]), wanted)
