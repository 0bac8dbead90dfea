"""Paper B's notebooks, really run by papermill: their records, and a set that the attack makes good."""

import json

from condexp.data import ImageSet, random_per_class
from condexp.models import load_classifier
from condexp.training import accuracy

SMALL = {"dataset": "digits", "student": "wrn_10_1", "backend": "torch", "epochs": 6, "steps": 25}


def record(folder):
    (path,) = folder.glob("records/*.json")
    return json.loads(path.read_text())


def test_a_bad_set_is_made_good_at_the_boundary(papermill, teacher_file):
    out = papermill("run_boundary", **SMALL | {"epochs": 8}, surrogate="single_image", images=40, teacher=teacher_file)
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    before, after = r["accuracy"]["single_image"], r["accuracy"]["single_image, attacked"]
    assert 10 < before < 45 and after > before + 20
    assert sum(r["crossed"]) >= 0.95 * sum(r["attempts"])
    assert 3 * sum(r["crossed"]) < r["images"]["single_image, attacked"] <= 4 * sum(r["crossed"])  # copies are left out
    assert r["quality"]["single_image, attacked"]["normalised entropy"] > r["quality"]["single_image"]["normalised entropy"]
    assert str(papermill.folder.parent) not in json.dumps(r)


def test_a_set_is_made_judged_and_learned_from(papermill, teacher_file):
    out = papermill("run_surrogate", **SMALL, surrogate="original", images=600, teacher=teacher_file)
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    assert r["accuracy"]["original"] > 60 and r["quality"]["original"]["normalised entropy"] > 0.99
    assert r["settings"]["temperature"] == 2 and r["settings"]["mixup"] and r["images"]["original"] == 600
    assert r["counts"]["original"] == [60] * 10


def test_a_teacher_without_any_data_gets_a_student(papermill, teacher_file, digits, fabric, tmp_path):
    some = random_per_class(digits.train, 60, seed=0).save(tmp_path / "some.safetensors")
    asked = {"dataset": "", "surrogate": some, "images": 0, "sampling": "none", "output": "made"}
    out = papermill("run_surrogate", **SMALL | asked, teacher=teacher_file)
    assert out.returncode == 0, out.stdout
    r, made = record(papermill.folder), papermill.folder / "made"
    student, meta = load_classifier(made / "some.student.safetensors")
    kept = ImageSet.load(made / "some.images.safetensors")
    assert r["agreement"]["some"] == meta["agreement"] > 50 and "accuracy" not in meta | r["accuracy"]
    assert len(kept) == r["images"]["some"] == 540
    assert accuracy(student, digits.test, fabric) > 50  # of the digits that nobody had at hand


def test_any_saved_set_can_be_judged(papermill, teacher_file, condensed, tmp_path):
    path = condensed.save(tmp_path / "few.safetensors")
    (tmp_path / "related.json").write_text("{}")
    asked = {"dataset": "digits", "surrogate": path, "images": 0, "related": tmp_path / "related.json"}
    out = papermill("run_quality", **asked, teacher=teacher_file)
    assert out.returncode == 0, out.stdout
    r = record(papermill.folder)
    assert str(tmp_path) not in json.dumps(r) and r["config"]["related"] == "related.json"
    assert r["images"] == {"few": 100} and r["quality"]["few"]["normalised entropy"] > 0.98 and r["accuracy"] == {}
