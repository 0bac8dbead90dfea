"""A student taken home: each file answers as the student does, what cannot be written is said, the card is honest."""

import copy
import json
import sys
import warnings

import pytest
import torch
from torch import nn

from condexp.exports import LIMITS, choose_student, compare_networks, describe_network, export_student, larger_than_teacher
from condexp.exports import model_card
from condexp.models import ModelSpec, freeze, from_spec

onnx = pytest.importorskip("onnx")
NAMES = ("cat", "dog", "owl")


def untrained(name, channels, size, classes=NAMES):
    "A network whose BatchNorm layers have seen something."
    torch.manual_seed(0)
    model = from_spec(ModelSpec(name, classes, channels, size, (0.4,) * channels, (0.2,) * channels))
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1)
            m.running_var.uniform_(0.5, 1.5)
    return model


def noise(model, n):
    return torch.rand(n, model.spec.channels, model.spec.size, model.spec.size)


@pytest.fixture(scope="module")
def student():
    return untrained("wrn_10_1", 1, 12).to(memory_format=torch.channels_last)  # as training leaves it


@pytest.fixture(scope="module")
def made(student, tmp_path_factory):
    "The files of the grey student, and their rows."
    folder = tmp_path_factory.mktemp("made")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="No complete tensor")  # torch.export, of channels_last weights
        return folder, export_student(student, folder, noise(student, 5), {"seed": 3})


def card_of(student, rows, **more):
    network = describe_network(student, "student.safetensors")
    measures = [{"measure": "parameters", "teacher": 1000, "student": 250, "ratio": 4.0}]
    record = {"teacher": network | {"name": "its_teacher", "file": "weights.pth"}, "student": network, "timings": measures}
    record |= {"sources": {"leaves": 60.0, "inversion": 91.5}, "chosen": "inversion", "images": 2000, "steps": 500}
    record |= {"agreement": 96.7, "interval": [94.0, 98.3], "probe": "300 images inverted by cmi", "accuracy": None}
    record |= {"files": rows, "seconds": {"inversion": 31.4}, "date": "2026-01-02", "seed": 3} | more
    return model_card(json.loads(json.dumps(record)))


def answers(card, folder, images):
    "What the lines of code of a card give, file by file."
    blocks = [part.split("```")[0] for part in card.split("```python\n")[1:]]
    found = []
    for block in blocks:
        assert len(block.strip().splitlines()) == 3
        scope = {"images": images}
        exec(block.replace('("student.', f'("{folder}/student.'), scope)
        found.append(torch.as_tensor(scope["logits"]))
    return found


def test_the_cards_three_lines_load_each_file_at_any_batch_size(student, made):
    folder, rows = made
    if "onnxruntime" not in rows[2]["note"]:
        pytest.skip("the card's lines for ONNX need onnxruntime")
    for n in (1, 3, 8):
        images = noise(student, n)
        found = answers(card_of(student, rows), folder, images)
        assert len(found) == 3
        for logits in found:
            assert torch.allclose(logits, freeze(copy.deepcopy(student))(images), atol=1e-4)


def test_files_know_their_classes_and_name_no_folder_of_this_machine(student, made):
    folder, rows = made
    assert [(r["file"], r["same"]) for r in rows] == [(f"student.{s}", 100) for s in ("safetensors", "pt2", "onnx")]
    assert all(r["bytes"] == (folder / r["file"]).stat().st_size and r["difference"] < 1e-4 for r in rows)
    model = onnx.load(folder / "student.onnx")
    said = {item.key: json.loads(item.value) for item in model.metadata_props}
    assert not any(node.metadata_props for node in model.graph.node)
    assert said["classes"] == list(NAMES) and said["size"] == 12 and said["mean"] == [0.4] and said["std"] == [0.2]
    for row in rows:
        assert b"site-packages" not in (folder / row["file"]).read_bytes(), row["file"]
    assert student.training and student.backbone.fc.weight.requires_grad  # as it was

def test_a_colour_student_of_timm_goes_through_onnx(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxruntime", None)  # and is read by onnx alone
    student = untrained("mobilenetv3_small_050", 3, 32)
    rows = export_student(student, tmp_path, noise(student, 4))
    assert [r["same"] for r in rows] == [100, 100, 100] and rows[2]["note"] == "read by onnx.reference"


def test_without_onnx_the_other_two_are_written(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    (tmp_path / "student.onnx").write_text("of an earlier student")
    student = untrained("mobilenetv2_035_cifar", 3, 32)
    rows = export_student(student, tmp_path, noise(student, 2))
    assert [r["same"] for r in rows] == [100, 100, None] and not (tmp_path / "student.onnx").exists()
    assert rows[2]["note"] == "not written: it needs packages that are not installed: pip install onnxscript"
    card = card_of(student, rows)
    assert "`student.onnx` was not written: it needs" in card and "InferenceSession" not in card


@torch.library.custom_op("condexp_tests::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


strange.register_fake(torch.empty_like)


class Layer(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def with_layer(student, function):
    "The student with one layer more, which has no weights."
    student = copy.deepcopy(student)
    student.backbone.pool = nn.Sequential(Layer(function), student.backbone.pool)
    return student


def test_an_operation_that_stops_the_export_is_named(student, tmp_path):
    rows = export_student(with_layer(student, lambda x: strange(x)), tmp_path, noise(student, 2))
    assert [bool(r["bytes"]) for r in rows] == [True, True, False]
    assert rows[2]["note"].endswith("cannot export wrn_10_1: there is no ONNX operation for condexp_tests.strange")
    branching = with_layer(student, lambda x: x if float(x.sum()) > -1e9 else -x)  # torch.export cannot follow it
    rows = export_student(branching, tmp_path, noise(student, 2))
    assert [bool(r["bytes"]) for r in rows] == [True, False, False]
    assert all("torch.export cannot write it (Could not guard on data" in r["note"] for r in rows[1:])
    assert all(len(r["note"]) < 300 and "\n" not in r["note"] for r in rows)
    assert [p.name for p in tmp_path.iterdir()] == ["student.safetensors"]


def test_a_file_that_answers_differently_is_an_error(student, tmp_path):
    (tmp_path / "student.pt2").write_text("of an earlier student")
    with pytest.raises(RuntimeError, match="student.safetensors is not the student: its logits differ"):
        export_student(with_layer(student, lambda x: 2 * x), tmp_path, noise(student, 2))
    assert not list(tmp_path.iterdir())


def test_a_folder_or_images_that_cannot_be_used_are_refused_first(student, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="^folder is .*, but file is a file: it must be a folder$"):
        export_student(student, tmp_path / "file" / "made", noise(student, 2))
    for shape in ((2, 3, 12, 12), (2, 1, 16, 16), (0, 1, 12, 12)):
        with pytest.raises(ValueError, match=f"^images is '{'x'.join(map(str, shape))}', but the student takes n x 1 x"):
            export_student(student, tmp_path / "made", torch.rand(shape))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name, channels, size", [("wrn_40_2", 3, 32), ("resnet50", 1, 96)])
def test_the_chosen_student_is_at_most_a_quarter(name, channels, size):
    teacher = untrained(name, channels, size)
    chosen, why = choose_student(teacher)
    own, student = describe_network(teacher), describe_network(untrained(chosen, channels, size))
    assert all(student[c] <= own[c] / 4 for c in ("parameters", "multiply_adds"))
    assert why.startswith(f"The student is {chosen}, with {student['parameters']:,} parameters") and "largest" in why
    assert chosen not in ("wrn_10_1", "mobilenetv3_small_050") and larger_than_teacher(own, student) == ""
    larger = f"{own['parameters']:,} parameters against {student['parameters']:,}"
    assert larger in larger_than_teacher(student, own)


def test_a_small_teacher_gets_the_smallest_student_and_the_sentence_says_so(student):
    chosen, why = choose_student(student)
    assert chosen == "wrn_10_1" and "the smallest of 9 networks, as none is at most a quarter" in why
    assert "(100.0 %)" in why


def test_sizes_and_times_of_both_networks(student, fabric):
    teacher = untrained("wrn_16_2", 1, 12)
    rows = {row["measure"]: row for row in compare_networks(teacher, student, fabric)}
    assert list(rows) == ["parameters", "multiply-adds", "MB of weights", "ms, 1 image", "ms, 64 images"]
    assert rows["parameters"]["student"] == sum(p.numel() for p in student.parameters())
    assert all(row["ratio"] == row["teacher"] / row["student"] > 0 for row in rows.values())
    assert all(rows[measure]["ratio"] > 1 for measure in ("parameters", "multiply-adds", "MB of weights"))
    assert student.training and teacher.training


def test_the_card_tells_agreement_and_accuracy_only_if_there_is_one(student, made):
    card = card_of(student, made[1])
    assert "**96.7 %** of the probe, 300 images inverted by cmi (95 % interval 94.0 to 98.3)" in card
    assert "accuracy" not in card.replace(LIMITS[0], "") and LIMITS[0].startswith("Agreement is not accuracy")
    for told in ("weights.pth", "2,000 images (source: inversion), in 500 steps", "inversion 31 s", "cat, dog, owl", "mean 0.4"):
        assert told in card
    assert "83.7 % of blends of two" in card_of(student, made[1], blend_agreement=83.7) and "blends" not in card
    assert card.index("| inversion | 91.5 |") < card.index("| leaves | 60 |")
    measured = card_of(student, made[1], accuracy=97.04, teacher_accuracy=99.4)
    assert "the student's accuracy is **97.0 %**, the teacher's 99.4 %." in measured
    many = untrained("wrn_10_1", 1, 12, tuple(f"class {i}" for i in range(120)))
    assert "class 19, ... (100 more, in the files)" in card_of(many, made[1])
