"""A classifier is trained once; killed and started again it comes out the same."""

import pytest
import torch

from condexp.augment import standard
from condexp.cache import Checkpoint
from condexp.models import fingerprint, load_classifier, make_classifier, save_classifier
from condexp.training import Schedule, accuracy, fit, make_fabric, seeded, train_classifier

SCHEDULE = Schedule(epochs=4, steps=6, batch_size=32)


class Killed(Checkpoint):
    "A checkpoint after which the process dies."

    def save(self, state, every=0.0):
        super().save(state, every)
        raise KeyboardInterrupt


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


def test_seeded_leaves_the_outer_random_numbers_alone():
    torch.manual_seed(0)
    wanted = torch.rand(2)
    torch.manual_seed(0)
    first = torch.rand(1)
    with seeded(1):
        torch.rand(5)
    assert torch.equal(torch.cat([first, torch.rand(1)]), wanted)
