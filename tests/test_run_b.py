"""Paper B's notebooks, really run by papermill: their records, and a set that the attack makes good."""

import json

import pytest
from PIL import Image

from condexp.data import ImageSet, load_splits, random_per_class
from condexp.models import load_classifier, save_classifier
from condexp.training import Schedule, accuracy, train_classifier

TINY = Schedule(epochs=6, steps=30, batch_size=64)
SMALL = {"dataset": "digits", "student": "wrn_10_1", "backend": "torch", "epochs": 6, "steps": 25}


@pytest.fixture(scope="module")
def small_teacher(fabric, tmp_path_factory):
    "The file of a teacher that is quick to invert, and the digits that it has not seen."
    digits = load_splits("digits", 8)
    teacher, meta = train_classifier("wrn_10_1", digits, TINY, 0, fabric)
    assert meta["accuracy"] > 85
    return save_classifier(tmp_path_factory.mktemp("small") / "digits.safetensors", teacher, meta), digits


def record(folder):
    (path,) = folder.glob("records/*.json")
    return json.loads(path.read_text())


def test_a_bad_set_is_made_good_at_the_boundary(papermill, small_teacher):
    out = papermill("run_boundary", **SMALL, surrogate="single_image", images=40, teacher=small_teacher[0])
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    before, after = r["accuracy"]["single_image"], r["accuracy"]["single_image, attacked"]
    assert 10 < before < 45 and after > before + 20
    assert sum(r["crossed"]) >= 0.95 * sum(r["attempts"])
    assert 3 * sum(r["crossed"]) < r["images"]["single_image, attacked"] <= 4 * sum(r["crossed"])  # copies are left out
    entropy = {name: row["normalised entropy"] for name, row in r["quality"].items()}
    assert min(entropy["single_image, attacked"], entropy["single_image, control"]) > entropy["single_image"]
    images, control = r["images"], r["counts"]["single_image, control"]
    assert images["single_image"] < images["single_image, control"] == sum(control) <= images["single_image, attacked"]
    assert max(control) <= -(-images["single_image, attacked"] // 10)  # no class has more than an even share
    assert str(papermill.folder.parent) not in json.dumps(r)


def test_a_set_is_made_judged_and_learned_from(papermill, small_teacher):
    out = papermill("run_surrogate", **SMALL, surrogate="original", images=600, teacher=small_teacher[0])
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    assert r["accuracy"]["original"] > 60 and r["quality"]["original"]["normalised entropy"] > 0.99
    assert r["settings"]["temperature"] == 2 and r["settings"]["mixup"] and r["images"]["original"] == 600
    assert r["counts"]["original"] == [60] * 10


def test_a_teacher_without_any_data_gets_a_student(papermill, small_teacher, fabric):
    asked = {"dataset": "", "surrogate": "inversion", "inversion_steps": 5, "images": 300, "output": "made"}
    out = papermill("run_surrogate", **SMALL | asked, teacher=small_teacher[0])
    assert out.returncode == 0, out.stdout
    r, made, name = record(papermill.folder), papermill.folder / "made", "inversion (fast)"
    student, meta = load_classifier(made / f"{name}.student.safetensors")
    assert r["agreement"][name] == meta["agreement"] > 50 and "accuracy" not in meta | r["accuracy"]
    assert r["probe"] == "probe images, inverted by cmi" and "accuracy" not in r["histories"][name][-1]
    assert len(ImageSet.load(made / f"{name}.images.safetensors")) == r["images"][name] == 300
    assert accuracy(student, small_teacher[1].test, fabric) > 50  # of the digits that nobody had at hand


def test_without_data_the_methods_that_need_none_run(papermill, small_teacher, tmp_path):
    few = random_per_class(small_teacher[1].train, 1, seed=0)
    for image, label in zip(few.images, few.hard_labels, strict=True):
        (tmp_path / "few" / few.classes[int(label)]).mkdir(parents=True)
        Image.fromarray(image[0].numpy()).save(tmp_path / "few" / few.classes[int(label)] / "0.png")
    asked = {"dataset": "", "condenser": tmp_path / "few", "student": "wrn_10_1", "epochs": 2, "steps": 3, "inversion_steps": 3}
    out = papermill("run_kd", **asked, teacher=small_teacher[0])
    assert out.returncode == 0 and "left out are random, full" in (papermill.folder / "out.ipynb").read_text(), out.stdout
    r = record(papermill.folder)
    assert list(r["agreement"]) == ["condensed", "inversion", "mixed", "expanded"] and r["accuracy"] == {}
    assert r["images"]["condensed"] == 10 and r["settings"]["alignment"] == "conditional_few"


def test_a_student_is_made_from_a_teacher_and_nothing_else(papermill, small_teacher, fabric):
    asked = {"sources": "fast,noise", "images": 300, "minutes": 0.15, "proxy_steps": 40, "student": "wrn_10_1", "dataset": "digits"}
    out = papermill("run_datafree", **asked, teacher=small_teacher[0], precision="32")
    assert out.returncode == 0, out.stdout
    r, made = record(papermill.folder), papermill.folder / "made"
    assert "fast" in r["chosen"] and r["predicted"]["fast"] > r["predicted"]["noise"]
    low, high = r["interval"]
    assert low < r["agreement"] < high and r["agreement"] > 50
    student, meta = load_classifier(made / "student.safetensors")
    assert accuracy(student, small_teacher[1].test, fabric) == pytest.approx(r["accuracy"][r["chosen"]]) and "accuracy" not in meta
    assert {"student.onnx", "student.pt2", "transfer.images.safetensors"} <= {p.name for p in made.iterdir()}
    assert "greement" in (made / "README.md").read_text() and str(papermill.folder) not in json.dumps(r)


def test_promises_are_compared_with_students(papermill, small_teacher):
    asked = {"dataset": "digits", "size": 8, "sources": "leaves,noise", "images": 40, "proxy_steps": 8, "epochs": 2, "steps": 3}
    out = papermill("run_predict", **asked, teacher=small_teacher[0], precision="32")
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    assert {"noise, even", "leaves, as it comes", "leaves + noise"} <= r["accuracy"].keys() == r["measures"].keys()
    promised = {"proxy agreement", "proxy agreement, 2 steps", "proxy agreement, batch statistics", "vendi", "T. stddev"}
    assert all(promised <= row.keys() for row in r["measures"].values())
    assert r["accuracy"].keys() == r["probe_agreement"].keys() == r["blend_agreement"].keys() == r["test_agreement"].keys()


def test_any_saved_set_can_be_judged(papermill, teacher_file, condensed, tmp_path):
    path = condensed.save(tmp_path / "few.safetensors")
    (tmp_path / "related.json").write_text("{}")
    asked = {"dataset": "digits", "surrogate": path, "images": 0, "related": tmp_path / "related.json"}
    out = papermill("run_quality", **asked, teacher=teacher_file)
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    assert str(tmp_path) not in json.dumps(r) and r["config"]["related"] == "related.json"
    assert r["images"] == {"few": 100} and r["quality"]["few"]["normalised entropy"] > 0.98 and r["accuracy"] == {}
