"""Bad input is refused in one sentence that names the parameter, before any work, and leaves nothing behind."""

import ast
import functools
import json
import os
import re
import tarfile
import tempfile
import warnings
from pathlib import Path
from unittest.mock import patch

import numpy as np
import papermill as pm
import pytest
import torch
from conftest import ROOT, Papermill
from dataclasses import replace
from PIL import Image

from condexp.cache import cache_dir, load_tensors, save_tensors
from condexp.data import load_splits
from condexp.models import make_classifier, save_classifier
from condexp.parameters import RunAlignment, RunBoundary, RunCondense, RunDatafree, RunImport, RunKD, RunQuality
from condexp.parameters import RunPredict, RunSurrogate, RunTeacher, parameters
from condexp.runs import open_run, open_teacher

KINDS = {
    "run_kd": RunKD,
    "run_condense": RunCondense,
    "run_teacher": RunTeacher,
    "run_alignment": RunAlignment,
    "run_quality": RunQuality,
    "run_surrogate": RunSurrogate,
    "run_boundary": RunBoundary,
    "run_import": RunImport,
    "run_datafree": RunDatafree,
    "run_predict": RunPredict,
}
SHARED = os.environ["CONDEXP_CACHE"]  # of all tests; a folder that is removed at the end
NEEDED = {"run_import": "weights", "run_datafree": "teacher"}  # parameters without a default that works: a file
WITHOUT_GL = {"run_surrogate": {"backend": "torch"}, "run_quality": {"backend": "torch"}}  # OpenGL may not be there


def defaults(notebook):
    "The parameters cell, as papermill reads it."
    return {
        name: ast.literal_eval(p["default"])
        for name, p in pm.inspect_notebook(str(ROOT / f"nbs/{notebook}.ipynb")).items()
    }


@functools.cache
def untrained():
    "The file of a classifier that has learned nothing."
    model = make_classifier("wrn_10_1", load_splits("digits", 16).train)
    return str(save_classifier(Path(tempfile.mkdtemp(dir=SHARED)) / "untrained.safetensors", model, {"accuracy": None}))


OPENS = re.compile(r"\b(open_run|open_transfer|open_job|import_teacher)\(run")  # refuses what it cannot use


@functools.cache
def opening(notebook):
    "The code cells of a run notebook after its parameters, up to the one that opens what it is given."
    cells = json.loads((ROOT / f"nbs/{notebook}.ipynb").read_text())["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][1:]
    last = next(i for i, source in enumerate(sources) if OPENS.search(source))
    return [source.replace("%matplotlib inline", "") for source in sources[: last + 1]]


def begin(notebook, **given):
    "What a run notebook does before it computes anything."
    given = ({NEEDED[notebook]: untrained()} if notebook in NEEDED else {}) | given
    scope = defaults(notebook) | WITHOUT_GL.get(notebook, {}) | given
    with patch("warnings.formatwarning", warnings.formatwarning), warnings.catch_warnings():
        for source in opening(notebook):
            exec(source, scope)
    if str(given.get("teacher", "")).endswith(".safetensors") and "splits" in scope:
        open_teacher(scope["run"], scope.get("data", scope["splits"]), scope["fabric"])


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(autouse=True)
def cache_of_its_own(own, monkeypatch):
    "In which no other test writes."
    monkeypatch.setenv("CONDEXP_CACHE", own)


def entries():
    "The cache, less decoded images and locks."
    return {p for p in cache_dir().rglob("*") if p.is_file() and not {"images", "locks"} & set(p.parts)}


def refused(notebook, name, value, **others):
    "The sentence with which a parameter is refused."
    before = entries()
    with pytest.raises(ValueError) as error:
        begin(notebook, **others, **{name: value})
    sentence = str(error.value)
    assert sentence.startswith(f"{name} is ") and "\n" not in sentence and ", but" in sentence, sentence
    assert entries() == before
    return sentence


@pytest.mark.parametrize("notebook", KINDS)
def test_the_defaults_are_accepted(notebook):
    begin(notebook)


@pytest.mark.parametrize("value", [0, -1, 1.5, "ten", True, None])
def test_ipc_is_a_whole_number_of_at_least_one(value):
    assert repr(value) in refused("run_kd", "ipc", value)


def test_values_come_as_papermill_gives_them(folder, tmp_path, monkeypatch):
    "A name made of digits is a name, 2.0 is 2, a YAML list is a list."
    monkeypatch.chdir(tmp_path)
    folder(name="2024")
    run = parameters(defaults("run_kd") | dict(dataset=2024, ipc=2.0, arms=["full", "random"], size=16), RunKD)
    assert (run.dataset, run.ipc, run.arms) == ("2024", 2, ["random", "full"])
    assert len(open_run(run)[1].train) == 12


@pytest.mark.parametrize("name", ["record", "output"])
def test_where_results_go_is_looked_at_first(name, tmp_path):
    (tmp_path / "taken").write_text("")
    (tmp_path / "folder.json").mkdir()
    assert "taken is a file" in refused("run_kd", name, str(tmp_path / "taken/r.json"))
    if name == "record":
        assert "it is a folder" in refused("run_kd", name, str(tmp_path / "folder.json"))


def test_run_all_twice_in_one_kernel():
    "What a notebook's own first run leaves behind is not taken for a mistyped parameter."
    scope = defaults("run_kd")
    assert parameters(scope, RunKD).ipc == 10
    assert parameters(scope | dict(splits=(1, 2), path="r.json", ipc=3), RunKD).ipc == 3


@pytest.mark.parametrize("others", [{"condenser": "random"}, {"condenser": "herding"}, {"arms": "random"}], ids=str)
def test_no_more_images_are_chosen_than_the_smallest_class_holds(others):
    assert "smallest class" in refused("run_kd", "ipc", 500, **others)


NAMES = "dataset teacher student condenser normalisation inversion alignment layer evaluate device arms precision"


@pytest.mark.parametrize("name", NAMES.split())
def test_unknown_names_are_refused_with_what_is_known(name):
    assert "'nonesuch'" in refused("run_kd", name, "nonesuch")


@pytest.mark.parametrize("alignment", ["gan", "mmd:0.5", "", None])
def test_an_alignment_is_a_name(alignment):
    refused("run_kd", "alignment", alignment)
    refused("run_alignment", "alignments", alignment)


@pytest.mark.parametrize("name, value", [("alignment_weight", -1), ("term_weights", "bn:0"), ("term_weights", {"bn": -1})])
def test_weights_are_numbers_of_at_least_zero(name, value):
    refused("run_kd", name, value)


@pytest.mark.parametrize("value, weight", [(0, None), (-1, None), ("large", None), (0.5, 0.3)])
def test_a_ratio_is_positive_and_in_the_place_of_a_weight(value, weight):
    refused("run_alignment", "alignment_ratio", value, alignment_weight=weight)


def test_old_spellings_of_weights_say_how_it_is_written_now():
    assert "term_weights: {bn: 0}" in refused("run_kd", "inversion", "fast,bn:0")
    assert "one of bn, one_hot, adversarial" in refused("run_kd", "term_weights", {"gan": 1})


def test_names_without_commas_are_shown_with_them():
    assert "random,full" in refused("run_kd", "arms", "random full")


@pytest.mark.parametrize("arms", ["", "condensed,best", 3])
def test_arms_are_a_list_of_arms(arms):
    refused("run_kd", "arms", arms)


def test_an_unknown_model_is_answered_with_close_ones():
    assert "wrn_16_2" in refused("run_teacher", "model", "wrn_16_3")


@pytest.mark.parametrize("notebook", KINDS)
def test_a_parameter_that_the_notebook_does_not_have_is_refused(notebook):
    assert "no such parameter" in refused(notebook, "icp", 10)


@pytest.mark.parametrize("value", [-1, 1.5, "many"])
@pytest.mark.parametrize("name", ["epochs", "steps", "seed", "size"])
@pytest.mark.parametrize("notebook", KINDS)
def test_counts_are_not_negative_and_whole(notebook, name, value):
    if name in defaults(notebook):
        refused(notebook, name, value)


def test_a_seed_of_more_than_32_bits_is_refused():
    with pytest.raises(ValueError, match="seed is 4294967296, but it must be a whole number from 0"):
        begin("run_kd", seed=2**32)


@pytest.mark.parametrize("name", ["sources", "photographs"])
def test_what_is_not_read_beside_a_few_labelled_images_is_refused(name, tmp_path):
    given = {"sources": "nayer", "photographs": str(tmp_path)}[name]
    with pytest.raises(ValueError, match=f"{name} is .*, but with a few labelled images"):
        begin("run_datafree", few=str(tmp_path), output=str(tmp_path), **{name: given})


@pytest.mark.parametrize("notebook", ["run_predict", "run_datafree"])
def test_a_source_that_there_is_not_is_refused(notebook):
    refused(notebook, "sources", "shaderz")


@pytest.mark.parametrize("value", [0, -4, "hot", float("nan")])
def test_temperature_is_a_positive_number(value):
    refused("run_kd", "temperature", value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("notebook", sorted({*KINDS} - {"run_import"}))
def test_cuda_is_refused_where_there_is_none(notebook):
    refused(notebook, "device", "cuda")


def test_a_path_must_exist(tmp_path):
    refused("run_kd", "dataset", str(tmp_path / "nowhere"))
    refused("run_kd", "teacher", str(tmp_path / "nowhere.safetensors"))
    refused("run_kd", "condenser", str(tmp_path / "nowhere.safetensors"))


def test_a_folder_must_hold_images(tmp_path):
    refused("run_kd", "dataset", str(tmp_path))


def test_a_set_needs_two_classes(folder):
    assert "two classes" in refused("run_kd", "dataset", str(folder(classes=("china",))))


def test_train_and_test_hold_the_same_classes(folder):
    root = folder()
    (root / "test/flower").rename(root / "test/tree")
    refused("run_kd", "dataset", str(root))


def test_a_corrupt_image_is_named(folder):
    root = folder()
    (root / "train/china/3.png").write_bytes(b"this is not a picture")
    assert "train/china/3.png" in refused("run_kd", "dataset", str(root))


def test_an_archive_must_stay_inside_itself(folder, tmp_path):
    with tarfile.open(tmp_path / "bad.tar", "w") as archive:
        archive.add(folder(), arcname="..")
    assert ".." in refused("run_kd", "dataset", str(tmp_path / "bad.tar"))


def test_a_file_that_is_no_archive_is_refused(tmp_path):
    (tmp_path / "set.tar.gz").write_bytes(b"not an archive")
    refused("run_kd", "dataset", str(tmp_path / "set.tar.gz"))


def test_a_model_that_needs_larger_images_says_how_large():
    sentence = refused("run_teacher", "model", "vit_tiny_patch16_224", size=8)
    assert "at least 16 x 16" in sentence


@pytest.fixture
def saved(digits, tmp_path):
    "Writes an untrained classifier to a file, changed in one respect."

    def make(change=lambda images: images):
        path = tmp_path / "weights.safetensors"
        return str(
            save_classifier(path, make_classifier("wrn_10_1", change(digits.train)), {"accuracy": 10.0, "seconds": 1.0})
            or path
        )

    return make


def test_a_teacher_file_of_the_right_kind_is_accepted(saved):
    begin("run_kd", teacher=saved())


def test_a_teacher_of_other_classes_is_refused(saved):
    sentence = refused("run_kd", "teacher", saved(lambda d: replace(d, classes=tuple("abcdefghij"))))
    assert "classes" in sentence and "without data" in sentence


def test_the_teacher_fixes_the_order_of_classes_and_the_channels(saved, digits):
    three = lambda d: replace(d, images=d.images.expand(-1, 3, -1, -1), mean=d.mean * 3, std=d.std * 3)
    backwards = lambda d: replace(three(d), classes=d.classes[::-1], labels=9 - d.labels)
    run = parameters(defaults("run_kd") | dict(dataset="digits", teacher=saved(backwards)), RunKD)
    _, splits = open_run(run)
    assert splits.train.channels == 3 and splits.train.classes == digits.train.classes[::-1]
    assert torch.equal(splits.train.labels.cpu(), 9 - digits.train.labels)
    assert "3 equal channels" in splits.note and "the teacher's order" in splits.note


def test_a_teacher_of_another_size_is_refused(saved):
    refused("run_kd", "teacher", saved(lambda d: replace(d, images=d.images[..., :12, :12])), size=16)


def test_a_teacher_file_whose_weights_are_of_another_architecture_is_refused(saved, tmp_path):
    tensors, meta = load_tensors(saved())
    text = repr(meta).replace("wrn_10_1", "wrn_16_2")
    save_tensors(tmp_path / "weights.safetensors", tensors, ast.literal_eval(text))
    refused("run_kd", "teacher", str(tmp_path / "weights.safetensors"))


def test_a_teacher_file_with_the_mean_of_bytes_is_refused(saved, tmp_path):
    tensors, meta = load_tensors(saved())
    meta["classifier"]["mean"] = [33.3]
    path = save_tensors(tmp_path / "bytes.safetensors", tensors, meta)
    assert "divide one of bytes by 255" in refused("run_kd", "teacher", str(path))


@pytest.mark.parametrize("content", [b"", b"not safetensors"], ids=["empty", "text"])
def test_a_file_that_is_no_teacher_is_refused(content, tmp_path):
    (tmp_path / "weights.safetensors").write_bytes(content)
    refused("run_kd", "teacher", str(tmp_path / "weights.safetensors"))


def test_a_set_of_images_is_not_a_teacher(condensed, tmp_path):
    refused("run_kd", "teacher", str(condensed.save(tmp_path / "set.safetensors")))


def test_papermill_ends_with_the_sentence_and_leaves_no_record(tmp_path):
    papermill = Papermill(tmp_path, cache=tmp_path / "cache")
    out = papermill("run_kd", icp="10")
    last = out.stdout.strip().splitlines()[-1]
    assert out.returncode != 0 and last.startswith("ValueError: icp is "), out.stdout
    assert not list(tmp_path.rglob("*.json")) and not [p for p in papermill.cache.rglob("*") if p.is_file()]


NAMES_B = "dataset teacher student surrogate sampling margin part backend labels augmentation evaluate device precision mixup"
NAMES_B += " batch_statistics"


@pytest.mark.parametrize("name", NAMES_B.split())
def test_unknown_names_of_a_transfer_set_are_refused_with_what_is_known(name):
    assert "'nonesuch'" in refused("run_surrogate", name, "nonesuch")


@pytest.mark.parametrize(
    "name, value",
    [("images", 0), ("programs", 0), ("budget", 0), ("temperature", -1), ("attack_steps", 0), ("targets", -1), ("targets", 10)],
)
def test_numbers_of_a_transfer_set_are_refused(name, value):
    refused("run_boundary", name, value, surrogate="noise")


@pytest.mark.parametrize("notebook", ["run_kd", "run_surrogate"])
@pytest.mark.parametrize("value, why", [(0, "at least 1"), (3, "this machine has 2"), (2, "wrn_10_1, has BatchNorm")])
def test_devices_that_are_not_there_or_cannot_share_a_step_are_refused(notebook, value, why, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert why in refused(notebook, "devices", value, device="cpu")


def test_an_attack_is_one_of_two():
    assert "normalised, paper" in refused("run_boundary", "attack", "pgd")


def test_a_teacher_without_batchnorm_has_no_statistics_of_batches():
    assert "convnet3_w64, has no" in refused("run_surrogate", "batch_statistics", True, teacher="convnet3_w64")


def test_a_photo_that_cannot_be_read_is_refused(tmp_path, monkeypatch):
    Image.fromarray(np.eye(8, dtype="f4")).save(tmp_path / "depths.tif")
    assert "32-bit values" in refused("run_surrogate", "photo", str(tmp_path / "depths.tif"), surrogate="single_image")
    Image.new("L", (8, 8)).save(tmp_path / "large.png")
    monkeypatch.setattr("condexp.files.MAX_PIXELS", 63)
    assert "at most 63 are" in refused("run_surrogate", "photo", str(tmp_path / "large.png"), surrogate="single_image")


def test_a_real_set_has_the_part_that_is_asked_for(folder):
    assert "no class" in refused("run_surrogate", "part", "in", surrogate=str(folder(size=16)), size=16)


def test_a_saved_transfer_set_has_the_size_of_the_data(condensed, tmp_path):
    small = replace(condensed, images=condensed.images[..., :8, :8])
    path = small.save(tmp_path / "small.safetensors")
    with pytest.raises(ValueError, match="surrogate is .small.safetensors., but its size, 8"):
        begin("run_surrogate", surrogate=str(path))


def test_a_file_that_is_no_set_is_refused(teacher_file, condensed, tmp_path):
    assert "not a set of images" in refused("run_quality", "surrogate", str(teacher_file))
    tensors, meta = load_tensors(condensed.save(tmp_path / "set.safetensors"))
    bytes_ = save_tensors(tmp_path / "bytes.safetensors", tensors | {"images": tensors["images"].float()}, meta)
    for name, notebook in (("surrogate", "run_surrogate"), ("condenser", "run_kd")):
        assert "neither 0 to 255 nor normalised" in refused(notebook, name, str(bytes_))


def test_without_opengl_one_line_says_what_to_install(monkeypatch):
    from condexp import runs, shaders

    def missing(**_):
        raise Exception("libGL.so not loaded")

    monkeypatch.setattr("moderngl.create_context", missing)
    shaders.gl_context.cache_clear()
    with pytest.raises(RuntimeError, match="libegl1.*backend=torch") as error:
        begin("run_surrogate", backend="opengl")
    assert "\n" not in str(error.value) and runs.gl_context is shaders.gl_context
    shaders.gl_context.cache_clear()
