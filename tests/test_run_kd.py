"""The main job, really run by papermill: its record, its cache, a kill in the middle, a user's own images."""

import json
import time

import psutil
import pytest
import torch
from conftest import Papermill

from condexp.data import ImageSet
from condexp.models import load_classifier
from condexp.training import accuracy

TINY = {"dataset": "digits", "student": "wrn_10_1", "ipc": 1, "condenser": "random", "epochs": 4, "steps": 3}
TINY |= {"batch_size": 32, "inversion_steps": 3}


def record(folder):
    (path,) = folder.glob("records/run_kd-*.json")
    return json.loads(path.read_text())


def files(cache):
    return {p: p.stat().st_mtime_ns for p in cache.rglob("*.safetensors")}


@pytest.fixture(scope="module")
def finished(teacher_file, tmp_path_factory):
    "A run of two arms from beginning to end."
    papermill = Papermill(tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cache"))
    out = papermill.as_a_user("run_kd", **TINY, teacher=teacher_file, arms="mixed,expanded", output="made")
    assert out.returncode == 0, out.stdout
    return papermill


def test_the_record_says_what_was_done(finished, trained):
    r = record(finished.folder)
    assert r["config"]["ipc"] == 1 and r["config"]["arms"] == "mixed,expanded" and r["seed"] == 0
    assert abs(r["teacher_accuracy"] - trained[1]["accuracy"]) < 1e-6
    assert r["accuracy"].keys() == r["images"].keys() == r["steps"].keys() == {"mixed", "expanded"}
    assert r["steps"]["expanded"] == 4 * 3 and r["images"]["expanded"] > 10
    assert all(s >= 0 for s in r["seconds"].values()) and {"torch", "device", "commit"} <= r["environment"].keys()
    assert {"class_frechet", "class_mmd"} <= r["distances"]["expanded"].keys()


def test_the_record_names_no_folder_of_this_machine(finished):
    assert str(finished.folder.parent) not in json.dumps(record(finished.folder))


def test_the_executed_notebook_shows_pictures_and_the_record_numbers(finished):
    text = (finished.folder / "out.ipynb").read_text()
    assert text.count("image/png") >= 5
    assert all(f"{a:.1f} %" in text for a in record(finished.folder)["accuracy"].values())


def test_what_was_made_is_in_the_output_folder_to_go_on_with(finished, digits, fabric):
    r, made = record(finished.folder), finished.folder / "made"
    student, meta = load_classifier(made / "expanded.student.safetensors")
    assert accuracy(student, digits.test, fabric) == pytest.approx(r["accuracy"]["expanded"], abs=0.3)
    pool, few = (ImageSet.load(made / name) for name in ("expanded.images.safetensors", "condensed.images.safetensors"))
    assert len(pool) == r["images"]["expanded"] - len(few) and len(few) == 10 * TINY["ipc"]


def test_run_again_it_loads_everything(finished, tmp_path, teacher_file):
    before = files(finished.cache)
    again = Papermill(tmp_path, finished.cache)
    assert again("run_kd", **TINY, teacher=teacher_file, arms="mixed,expanded").returncode == 0
    assert record(tmp_path)["accuracy"] == record(finished.folder)["accuracy"]
    assert files(finished.cache) == before


def test_alignments_are_compared_with_no_guidance_in_one_record(finished, tmp_path, teacher_file):
    papermill = Papermill(tmp_path, finished.cache)
    out = papermill("run_alignment", **TINY, teacher=teacher_file, alignments="conditional_few,mmd", evaluate="validation")
    assert out.returncode == 0, out.stdout
    (path,) = tmp_path.glob("records/run_alignment-*.json")
    r = json.loads(path.read_text())
    assert (
        list(r["accuracy"]) == ["condensed", "mixed", "conditional_few", "mmd"] and r["config"]["evaluate"] == "validation"
    )
    assert "d_real" in r["histories"]["conditional_few"][-1] and "d_real" not in r["histories"]["mmd"][-1]


def kill_with_children(process):
    for p in (*psutil.Process(process.pid).children(recursive=True), process):
        p.kill()
    process.communicate()


def wait_for(found, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not found():
        assert process.poll() is None and time.monotonic() < deadline, "it ended, or hangs, before it could be killed"
        time.sleep(0.005)


def test_killed_in_the_middle_it_goes_on_to_the_same_numbers(finished, tmp_path, teacher_file):
    papermill = Papermill(tmp_path, tmp_path / "cache")
    asked = {**TINY, "teacher": teacher_file, "arms": "expanded"}
    process = papermill.start("run_kd", **asked)
    wait_for(lambda: list(papermill.cache.glob("method/*.checkpoint")), process)
    kill_with_children(process)
    assert list(papermill.cache.glob("method/*.checkpoint")) and not list(tmp_path.rglob("*.json"))

    assert papermill("run_kd", **asked).returncode == 0
    resumed, whole = record(tmp_path), record(finished.folder)
    same = dict(abs=10) if torch.cuda.is_available() else dict(rel=0, abs=0)  # a GPU adds in whatever order threads arrive
    for what in ("accuracy", "distances"):
        assert resumed[what]["expanded"] == pytest.approx(whole[what]["expanded"], **same)
    assert not list(papermill.cache.rglob("*.checkpoint"))


def test_a_folder_of_photographs_gets_a_teacher_a_condensed_set_and_a_student(folder, papermill, tmp_path):
    photos = folder(each=20, size=40)
    common = {"dataset": photos, "size": 16, "epochs": 2, "steps": 4, "batch_size": 16}
    weights, few = tmp_path / "weights.safetensors", tmp_path / "few.safetensors"

    out = papermill("run_teacher", **common, model="wrn_10_2", output=weights)
    assert out.returncode == 0 and load_classifier(weights)[0].spec.classes == ("china", "flower"), out.stdout
    out = papermill("run_condense", **common, condenser="herding", ipc=2, output=few, labels="soft", teacher=weights)
    assert out.returncode == 0 and ImageSet.load(few).labels.shape == (4, 2), out.stdout
    again = tmp_path / "again.json"
    out = papermill("run_condense", dataset=photos, size=16, verify=few, record=again)  # by the file's own schedule
    assert out.returncode == 0, out.stdout
    scores = json.loads(again.read_text())["scores"]
    assert scores["herding"] == scores["said"] and len(scores["said"]) == 3
    out = papermill(
        "run_kd",
        **common,
        teacher=weights,
        student="wrn_10_1",
        condenser=few,
        ipc=2,
        arms="condensed,expanded",
        inversion_steps=3,
    )
    assert out.returncode == 0, out.stdout
    assert record(tmp_path)["accuracy"].keys() == {"condensed", "expanded"}
