"""Several devices that share each step give the student that one gives; CPU processes stand in for cards."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from condexp.kd import Distillation, distil
from condexp.training import predict

SETTINGS = Distillation(epochs=2, steps=6, batch_size=32, synthesis_batch=20, warmup=1, inversion_steps=2, mixup=True)
SETTINGS = replace(SETTINGS, batches="two_terms", adversarial_after=1, lr=0.005)  # what rounding does grows with the rate


@pytest.fixture(autouse=True)
def loaded(monkeypatch):
    "Forked processes: torch and this library are loaded already. (A GPU needs spawned ones.)"
    start = partial(torch.multiprocessing.start_processes, start_method="fork")
    monkeypatch.setattr(torch.multiprocessing, "spawn", start)


def test_two_processes_teach_the_student_that_one_teaches(teacher, digits, condensed, fabric, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    run = partial(distil, "expanded", teacher, "convnet3_w64", {"condensed": condensed}, digits)
    one, two = (run(replace(SETTINGS, devices=n), 0, fabric) for n in (1, 2))
    losses, other = ([epoch["loss"] for epoch in r.history] for r in (one, two))
    assert other == pytest.approx(losses, rel=1e-5) and losses[1] < losses[0]
    logits, others = (predict(r.student, digits.test, fabric)[1] for r in (one, two))
    assert logits.std() > 0.5
    torch.testing.assert_close(others, logits, rtol=0, atol=1e-4)
    assert (one.pool.images.int() - two.pool.images.int()).abs().max() <= 1  # of 255
