"""Any teacher: every wrapping gives the same logits, what cannot be one is refused in a sentence, the card sees what is wrong."""

import argparse
import copy
import io
import json
import os
import re
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F

from condexp.exports import describe_network, write_onnx
from condexp.foreign import ProgramError, from_onnx, from_torchscript, read_program, write_program
from condexp.inversion import BatchNormHooks
from condexp.models import ModelSpec, create_backbone, fingerprint, freeze, from_spec, load_classifier
from condexp.models import save_classifier
from condexp.teachers import CONVENTIONS, card_figure, card_markdown, clean_weights, convention, doubted, import_teacher
from condexp.teachers import likeliest, normalisation_distances, normalised_by, on_labels, our_names, teacher_card
from condexp.training import accuracy

NAMES = ("cat", "dog", "owl")


def randomised(net):
    "A network whose BatchNorm layers have seen something, in evaluation mode."
    generator = torch.Generator().manual_seed(0)
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_(0, 0.1, generator=generator)
            m.running_var.uniform_(0.5, 1.5, generator=generator)
    return net.eval()


@pytest.fixture(scope="module")
def x():
    return torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return randomised(create_backbone("resnet8_cifar", 3, 3, 32))


@pytest.fixture(scope="module")
def head_net():
    "A small torchvision network."
    torch.manual_seed(0)
    return randomised(torchvision.models.shufflenet_v2_x0_5(num_classes=3))


def normalised(x, name="imagenet"):
    mean, std = (torch.tensor(v).view(1, -1, 1, 1) for v in CONVENTIONS[name])
    return (x - mean) / std


def prefixed(weights, prefix):
    return {prefix + name: t for name, t in weights.items()}


def split_head(weights):
    "A backbone of one name and a head of another, as wrappers of a backbone save them."
    return {name if name.startswith("fc") else f"backbone.{name}": t for name, t in weights.items()}


def behind_dropout(weights):
    return {re.sub(r"^fc\.", "fc.1.", name): t for name, t in weights.items()}


WRAPPINGS = {
    "plain.pth": lambda w: w,
    "plain.safetensors": lambda w: w,
    "pytorch_model.bin": lambda w: w,
    "compiled.pt": lambda w: prefixed(w, "_orig_mod."),
    "parallel.safetensors": lambda w: prefixed(w, "module."),
    "script.pth.tar": lambda w: {"state_dict": prefixed(w, "module."), "args": argparse.Namespace(lr=0.1), "best": np.float64(0.9)},
    "lightning.ckpt": lambda w: {
        "state_dict": prefixed(w, "model.net.") | {"criterion.weight": torch.ones(3)},
        "hyper_parameters": {"classes": list(NAMES)}, "epoch": 3,
    },
    "ema.pth": lambda w: {"model": {n: torch.zeros_like(t) for n, t in w.items()}, "state_dict_ema": prefixed(w, "module.")},
    "nested.pt": lambda w: {"net": {"model_state_dict": w}, "class_to_idx": {"owl": 2, "cat": 0, "dog": 1}},
    "half.pt": lambda w: {"model": {n: t.half() if t.is_floating_point() else t for n, t in w.items()}},
    "optimizer.pt": lambda w: {"optimizer": {"state": {0: {"exp_avg": torch.ones(3, 3)}}}, "student": w},
    "backbone.pth": split_head,
    "encoder.pth": lambda w: prefixed(w, "encoder."),
    "dropout.pth": behind_dropout,
}


def write(path, content):
    if path.suffix == ".safetensors":
        save_file({n: t.contiguous() for n, t in content.items()}, path)
    else:
        torch.save(content, path)
    return path


@pytest.mark.parametrize("name", WRAPPINGS)
def test_every_wrapping_gives_the_same_logits(name, net, x, tmp_path):
    brought = import_teacher(write(tmp_path / name, WRAPPINGS[name](dict(net.state_dict()))), size=32)
    spec = brought.model.spec
    assert spec.name == "resnet8_cifar" and spec.size == 32 and spec.channels == 3
    assert torch.allclose(brought.model(x), net(normalised(x)), atol=2e-2 if name == "half.pt" else 1e-5)
    if name in ("lightning.ckpt", "nested.pt"):
        assert spec.classes == NAMES
    if name == "lightning.ckpt":
        assert "not used: criterion.weight" in brought.notes


BUILT = {
    "torchvision/shufflenet_v2_x0_5": lambda: torchvision.models.shufflenet_v2_x0_5(num_classes=3),
    "torchvision/mobilenet_v3_small": lambda: torchvision.models.mobilenet_v3_small(num_classes=3),
    "torchvision/squeezenet1_1": lambda: torchvision.models.squeezenet1_1(num_classes=3),
    "mobilenetv2_035": lambda: timm.create_model("mobilenetv2_035", num_classes=3),
    "resnet10t": lambda: timm.create_model("resnet10t", num_classes=3, in_chans=1),
    "vit_tiny_patch16_224": lambda: timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3),
}


@pytest.mark.parametrize("name", BUILT)
def test_the_architecture_is_found_by_its_weights(name, tmp_path):
    net = randomised(BUILT[name]())
    size = 0 if "vit" in name else 64  # a vision transformer's weights say it
    brought = import_teacher(write(tmp_path / "net.pth", net.state_dict()), classes=NAMES, mean="none", size=size)
    spec, last = brought.model.spec, brought.model.last_layer
    assert spec.name == name and spec.classes == NAMES and spec.channels == (1 if name == "resnet10t" else 3)
    assert spec.size == (32 if "vit" in name else 64)
    x = torch.rand(2, spec.channels, spec.size, spec.size)
    features, logits = brought.model.features_logits(x)
    assert torch.allclose(logits, net(x), atol=1e-4)
    assert torch.allclose(features @ last.weight.T + getattr(last, "bias", 0), logits, atol=1e-4)
    again, meta = load_classifier(brought.save(tmp_path / "teacher.safetensors"))
    assert fingerprint(again) == fingerprint(brought.model) and meta["accuracy"] is None
    assert torch.equal(again.eval()(x), brought.model(x)) and again.feature_dim == features.shape[1]


def test_a_name_that_both_libraries_have_means_the_one_that_fits(tmp_path):
    theirs, own = torchvision.models.efficientnet_b0(num_classes=3), timm.create_model("efficientnet_b0", num_classes=3)
    for net, name in ((theirs, "torchvision/efficientnet_b0"), (own, "efficientnet_b0")):
        brought = import_teacher(write(tmp_path / "net.pth", net.state_dict()), architecture="efficientnet_b0", size=32)
        assert brought.model.spec.name == name
    assert {f.name for f in likeliest(clean_weights(own.state_dict()), 32) if f.exact} >= {"efficientnet_b0", "tf_efficientnet_b0"}


def test_networks_for_small_images_under_other_names(x):
    resnet = create_backbone("resnet18_cifar", 3, 3, 32).eval()
    renamed = {}
    for name, t in resnet.state_dict().items():
        if match := re.match(r"body\.(\d+)\.(\w+\..*)", name):
            block = int(match[1]) - 3
            name = f"layer{block // 2 + 1}.{block % 2}.{match[2]}"
        for old, new in ((r"^body\.0", "conv1"), (r"^body\.1", "bn1"), ("downsample", "shortcut"), (r"^fc", "linear")):
            name = re.sub(old, new, name)
        renamed[name] = t
    assert likeliest(clean_weights(our_names(renamed)))[0].name == "resnet18_cifar"


def test_wide_resnets_under_other_names(x, tmp_path):
    wide = randomised(create_backbone("wrn_16_1", 3, 3, 32))
    renamed = {}
    for name, t in wide.state_dict().items():
        if match := re.match(r"body\.(\d+)\.(\w+\..*)", name):
            block = int(match[1]) - 1
            name = f"block{block // 2 + 1}.layer.{block % 2}.{match[2].replace('shortcut', 'convShortcut')}"
        renamed[re.sub(r"^body\.7", "bn1", re.sub(r"^body\.0", "conv1", name))] = t
    brought = import_teacher(write(tmp_path / "wrn.pt", renamed), mean="none")
    assert brought.model.spec.name == "wrn_16_1" and torch.allclose(brought.model(x), wide(x), atol=1e-5)


def exported(net, x, **options):
    file = io.BytesIO()
    torch.export.save(torch.export.export(net, (x,), **options), file)
    return file.getvalue()


def onnx_file(net, x, path, **options):
    pytest.importorskip("onnx2torch")
    torch.onnx.export(net, (x,), path, dynamo=False, input_names=["x"], dynamic_axes={"x": {0: "n"}}, **options)


def as_program(kind, net, x, path):
    "Write `net` as a program of a kind; where it is."
    if kind == "onnx":
        onnx_file(net, x, path / "net.onnx")
    elif kind == "torchscript":
        torch.jit.save(torch.jit.trace(net, x), path / "net.pt")
    else:
        (path / "net.pt2").write_bytes(exported(net, x[:1] if kind == "one image" else x))
    return next(p for p in path.iterdir() if p.stem == "net")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["one image", "export", "torchscript", "onnx", "callable"])
def test_programs(kind, net, x, tmp_path):
    source = (lambda x: net(x)) if kind == "callable" else as_program(kind, net, x, tmp_path)
    brought = import_teacher(source, classes=NAMES, size=32, mean="none")
    assert torch.allclose(brought.model(x), net(x), atol=1e-4)
    again, _ = load_classifier(brought.save(tmp_path / "teacher.safetensors"))
    again = freeze(again)
    features, logits = again.features_logits(x[:3].requires_grad_())
    assert features.shape == (3, 64) and again.feature_dim == 64 and fingerprint(again) == fingerprint(brought.model)
    assert torch.autograd.grad(logits.square().sum(), [features])[0].any()
    layers = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    found = BatchNormHooks(again).layers
    if kind == "onnx":  # its exporter folds them into convolutions
        assert not found and any("no BatchNorm layers survive" in note for note in brought.notes)
    else:
        assert len(found) == len(layers) and torch.equal(found[0].running_mean, layers[0].running_mean)


class Viewed(nn.Sequential):
    def forward(self, x):
        return super().forward(x).view(x.shape[0], -1)  # exported for one image, this is a view of one row


def test_a_program_with_the_batch_size_in_a_view_takes_any_number(net, x):
    graph = read_program(exported(Viewed(net), x[:1]))
    assert torch.allclose(graph(x), net(x), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_programs_that_end_in_a_softmax_have_logits(net, x):
    brought = import_teacher(nn.Sequential(net, nn.Softmax(1)), size=32, mean="none")
    assert torch.allclose(brought.model(x).softmax(1), net(x).softmax(1), atol=1e-5)
    assert brought.model.features_logits(x)[0].shape == (4, 64)


def test_a_program_without_a_last_linear_layer_has_its_logits_as_features(x):
    brought = import_teacher(nn.Sequential(nn.Conv2d(3, 3, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten()), size=32)
    features, logits = brought.model.features_logits(x)
    assert torch.equal(features, logits) and torch.equal(brought.model.last_layer.weight, torch.eye(3))
    assert any("features are its logits" in note for note in brought.notes)


def hub(folder, config, weights, preprocessor=None):
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    if preprocessor:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    save_file({n: t.contiguous() for n, t in weights.items()}, folder / "model.safetensors")
    return folder


def test_folders_of_the_hub(tmp_path):
    net = randomised(timm.create_model("mobilenetv2_035", num_classes=3)).eval()
    cfg = {"input_size": [3, 64, 64], "mean": [0.5] * 3, "std": [0.5] * 3}
    config = {"architecture": "mobilenetv2_035", "label_names": NAMES, "pretrained_cfg": cfg}
    spec = import_teacher(hub(tmp_path / "timm", config, net.state_dict())).model.spec
    assert spec == ModelSpec("mobilenetv2_035", NAMES, 3, 64, (0.5,) * 3, (0.5,) * 3)

    vit, renamed = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=3).eval(), {}
    rules = ((r"^blocks\.", "encoder.layer."), (r"attn\.proj", "attention.output.dense"), (r"mlp\.fc1", "intermediate.dense"),
             (r"mlp\.fc2", "output.dense"), (r"norm1", "layernorm_before"), (r"norm2", "layernorm_after"), (r"^norm", "layernorm"),
             (r"^cls_token", "embeddings.cls_token"), (r"^pos_embed", "embeddings.position_embeddings"),
             (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"))
    for name, t in vit.state_dict().items():
        for old, new in rules:
            name = re.sub(old, new, name)
        parts = zip(("query", "key", "value"), t.chunk(3), strict=True) if "attn.qkv" in name else [("", t)]
        for part, value in parts:
            full = name.replace("attn.qkv", f"attention.attention.{part}")
            renamed[full.replace("head.", "classifier.") if full.startswith("head.") else f"vit.{full}"] = value
    config = {"model_type": "vit", "id2label": dict(enumerate(NAMES)), "image_size": 32}
    path = hub(tmp_path / "vit", config, renamed, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "size": {"height": 32}})
    brought, x = import_teacher(path), torch.rand(2, 3, 32, 32)
    assert brought.model.spec.classes == NAMES and torch.allclose(brought.model(x), vit(2 * x - 1), atol=1e-4)


class Two(nn.Module):
    def forward(self, x):
        return x.mean((2, 3)), x


class Batchwise(nn.Module):
    def forward(self, x):
        return (x - x.mean(0)).mean((2, 3))


class Rounded(nn.Module):
    def forward(self, x):
        return x.round().mean((2, 3))


@pytest.fixture(scope="module")
def files(net, tmp_path_factory):
    "Files that cannot be brought as they are."
    folder = tmp_path_factory.mktemp("bad")
    torch.save(net, folder / "whole.pth")
    torch.save(net.state_dict(), folder / "net.pth")
    torch.save({"epoch": 3, "lr": 0.1}, folder / "empty.pth")
    (folder / "text.pth").write_text("no network")
    (folder / "bad.safetensors").write_bytes(b"\x08\0\0\0\0\0\0\0{}      rest")
    (folder / "two.txt").write_text("cat\ndog\n")
    (folder / "odd.json").write_text("{'cat': 0}")
    own = from_spec(ModelSpec("resnet8_cifar", NAMES, 3, 32, (0.5,) * 3, (0.5,) * 3))
    save_classifier(folder / "own.safetensors", own, {"accuracy": None})
    hub(folder / "bert", {"model_type": "bert"}, net.state_dict())
    (folder / "photos").mkdir()
    return folder


@pytest.mark.parametrize(
    "name, said, why",
    [
        ("nothing.pth", {}, r"^weights is .*there is no such file"),
        ("whole.pth", {}, r"^weights is 'whole.pth', but it needs Python code \(condexp.*torch.save\(model.state_dict\(\)"),
        ("empty.pth", {}, "^weights is 'empty.pth', but it holds no weights"),
        ("text.pth", {}, "^weights is 'text.pth', but it is no network"),
        ("bad.safetensors", {}, "^weights is 'bad.safetensors', but it (is damaged|holds no weights)"),
        ("photos", {}, "^weights is 'photos', but a folder must hold config.json"),
        ("bert", {}, "^weights is 'bert', but its model type is 'bert'; known are timm's own and resnet, vit, convnext"),
        ("net.pth", {"architecture": "resnet18"}, "^architecture is 'resnet18', but .*missing: conv1.weight, .* more; "
         "unexpected: body.*likeliest is resnet8_cifar, 100%"),
        ("net.pth", {"architecture": "resnet81"}, "^architecture is 'resnet81', but it must be a model of timm or torchvision"),
        ("net.pth", {"classes": "cat,dog"}, "^classes is 'cat,dog', but these are 2 names, and the last layer has 3 outputs"),
        ("net.pth", {"classes": "two.txt"}, "^classes is .*2 names"),
        ("net.pth", {"classes": "cat,cat,dog"}, "^classes is .*a name of its own"),
        ("net.pth", {"classes": ["cat", "cat", "dog"]}, "^classes is .*a name of its own"),
        ("net.pth", {"classes": ",".join(f"a class called {i}" for i in range(30))}, "^classes is .* these are 30 names"),
        ("net.pth", {"classes": "odd.json"}, "^classes is .*odd.json', but it must hold a name a line, or JSON"),
        ("own.safetensors", {"size": 64}, "^size is 64, but the teacher file says 32"),
        ("own.safetensors", {"architecture": "resnet18_cifar"}, "^architecture is .* says resnet8_cifar"),
        ("net.pth", {"channels": 1}, "^channels is 1, but the first convolution takes 3"),
        ("net.pth", {"mean": "0.5,0.5", "std": "1"}, "^mean is .*3 channels need 3"),
        ("net.pth", {"mean": "0.5", "std": ""}, "^std is '', but mean and std come together"),
        ("net.pth", {"mean": "imagenot"}, "^mean is 'imagenot', but it must be numbers"),
        ("net.pth", {"mean": "clip", "std": "0.2"}, "^std is '0.2', but the other is 'clip'"),
        ("net.pth", {"mean": "0", "std": "0"}, "^std is .*above 0"),
    ],
)
def test_refusals(name, said, why, files):
    said = said | ({"classes": str(files / said["classes"])} if said.get("classes") in ("two.txt", "odd.json") else {})
    with pytest.raises(ValueError, match=why) as refusal:
        import_teacher(files / name, **said)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "program, said, why",
    [
        (Two(), {}, r"^weights is 'Two', but it has several outputs \(2\)"),
        (Batchwise(), {}, "^weights is 'Batchwise', but its answer to an image depends on the batch"),
        (Rounded(), {}, "^weights is 'Rounded', but it has no gradient"),
        (nn.Conv2d(3, 3, 1), {}, r"^weights is 'Conv2d', but it answers 3 images by \(3, 3, 16, 16\)"),
        (nn.Linear(4, 2), {}, "^weights is 'Linear', but it does not take 3 images of 3 x 16 x 16"),
        (Two(), {"size": 0}, "^size is 0, but a program does not say"),
        (Two(), {"architecture": "resnet18"}, "^architecture is 'resnet18', but a whole program has none"),
    ],
)
def test_programs_that_are_no_teachers(program, said, why):
    with pytest.raises(ValueError, match=why):
        import_teacher(program, **({"size": 16} | said))


@pytest.mark.filterwarnings("ignore")
def test_a_quantised_program_is_refused(tmp_path):
    net = nn.Sequential(nn.Flatten(), nn.Linear(48, 3))
    quantised = torch.ao.quantization.quantize_dynamic(net, {nn.Linear}, dtype=torch.qint8)
    torch.jit.save(torch.jit.trace(quantised, torch.rand(2, 3, 4, 4)), tmp_path / "int8.pt")
    with pytest.raises(ValueError, match="^weights is 'int8.pt', but .*gradient.*quantized"):
        import_teacher(tmp_path / "int8.pt", size=4)


def test_reading_a_program_unpickles_nothing(net, x, monkeypatch):
    "Every torch.load inside is told weights_only, and pickled constants are refused."
    seen, load, name = [], torch.load, "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
    monkeypatch.setattr(torch, "load", lambda *a, **k: seen.append(os.environ.get(name)) or load(*a, **k))
    read_program(exported(net, x))
    assert set(seen) == {"1"} and name not in os.environ


WAYS = ("imagenet", "none", "bytes")


@pytest.fixture(scope="module")
def trained_ways(digits):
    "A small teacher of digits for each normalisation, trained with it."
    x, y, made = digits.train.batch(), digits.train.hard_labels, {}
    torch.manual_seed(0)
    for name in WAYS:
        model = from_spec(ModelSpec("resnet8_cifar", digits.train.classes, 1, 16, *convention(name, 1)))
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        for _ in range(50):
            index = torch.randint(len(x), (64,))
            loss = F.cross_entropy(model(x[index]), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        made[name] = freeze(model)
    return made


def stated(model, name):
    "The same network under another normalisation."
    return normalised_by(model, *convention(name, model.spec.channels))


@pytest.mark.parametrize("trained", WAYS)
def test_a_wrong_normalisation_is_seen_in_batch_norm(trained, trained_ways):
    model = trained_ways[trained]
    assert doubted(normalisation_distances(model)) == ""
    for name in WAYS:
        found = doubted(normalisation_distances(stated(model, name)))
        if "bytes" in (name, trained) and name != trained:  # off by 255
            assert found == trained
        if {name, trained} == {"none", "imagenet"}:  # normalisation forgotten, or done twice
            assert found == trained


def test_a_right_normalisation_is_not_doubted_for_a_trained_teacher(teacher):
    assert doubted(normalisation_distances(teacher)) == "" and not teacher_card(teacher).warnings


def test_the_card_explains_low_accuracy(digits, trained_ways):
    model, order = trained_ways["none"], [3, 1, 4, 0, 5, 9, 2, 6, 8, 7]
    shuffled = replace(digits.test, labels=torch.tensor(order)[digits.test.labels])
    seen = on_labels(model, shuffled)
    assert seen["order"] == order and seen["accuracy"] < 30 < seen["permuted"]
    card = teacher_card(model, shuffled)
    assert any("another order: 0 is 3, 2 is 4" in warning for warning in card.warnings)
    card = teacher_card(stated(trained_ways["bytes"], "imagenet"), digits.test)
    assert "values in [0, 255]" in card.warnings[0] and "-p mean bytes" in card_markdown(card) and card_figure(card)
    assert card.parameters == sum(p.numel() for p in model.parameters()) and card.batchnorm == 9
    with pytest.raises(ValueError, match="^dataset is .*its num_classes is 10, the teacher's 3"):
        teacher_card(stated_classes(model, 3), digits.test)


def stated_classes(model, n):
    return from_spec(replace(model.spec, classes=tuple("abc")[:n])).eval()


def test_a_card_without_batch_norm(x):
    model = from_spec(ModelSpec("vit_cifar", NAMES, 3, 32, (0.5,) * 3, (0.5,) * 3))
    card = teacher_card(model)
    assert card.distances == {} and card_figure(card) is None and "cannot be checked" in card_markdown(card)
    assert not card.warnings and card.multiply_adds > 1e6


def test_the_notebook_brings_a_teacher(papermill, net, x, tmp_path):
    write(tmp_path / "net.ckpt", {"state_dict": prefixed(net.state_dict(), "model."), "classes": list(NAMES)})
    done = papermill("run_import", weights="net.ckpt", mean="0.5", std="0.5", size=32)
    assert done.returncode == 0, done.stdout
    model, _ = load_classifier(tmp_path / "teacher.safetensors")
    assert model.spec.classes == NAMES and torch.allclose(model.eval()(x), net(2 * x - 1), atol=1e-5)
    record = json.loads(next((tmp_path / "records").iterdir()).read_text())
    assert record["config"]["weights"] == "net.ckpt" and record["card"]["batchnorm"] == 9


def test_the_notebook_measures_a_teacher_in_its_own_order_of_classes(papermill, teacher, digits, fabric, tmp_path):
    model = copy.deepcopy(teacher)
    model.spec = replace(model.spec, classes=model.spec.classes[::-1])
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.copy_(last.weight.flip(0)), last.bias.copy_(last.bias.flip(0))
    save_classifier(tmp_path / "mine.safetensors", model, {})
    done = papermill("run_import", weights="mine.safetensors", dataset="digits")
    assert done.returncode == 0, done.stdout
    record = json.loads(next((tmp_path / "records").iterdir()).read_text())
    assert record["card"]["labelled"]["accuracy"] == pytest.approx(accuracy(teacher, digits.test, fabric), abs=0.5)


def test_torchscript_keeps_its_layers(net, x):
    file = io.BytesIO()
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(784, 3)
    torch.jit.save(torch.jit.script(nn.Sequential(*layers)).eval(), file)
    graph = read_program(from_torchscript(file.getvalue(), 3, 16))
    assert {type(m) for m in graph.modules()} >= {nn.BatchNorm2d, nn.Linear}


@pytest.fixture(scope="module")
def grey():
    "A network of 122 parameters for one channel."
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.AvgPool2d(3), nn.Flatten(), nn.Linear(24, 2)
    return randomised(nn.Sequential(*layers))


@pytest.fixture(scope="module")
def spots():
    return torch.rand(3, 1, 8, 8, generator=torch.Generator().manual_seed(2))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["scripted", "frozen", "export"])
def test_the_weights_of_convolutions_are_parameters(kind, grey, spots, tmp_path):
    path = tmp_path / "net.pt"
    if kind == "export":
        path.write_bytes(exported(grey, spots))
    else:
        script = torch.jit.script(grey)
        torch.jit.save(torch.jit.freeze(script) if kind == "frozen" else script, path)
    model = import_teacher(path, size=8, channels=1, mean="none").model
    assert torch.allclose(model(spots), grey(spots), atol=1e-5)
    folded = 12 * (kind == "frozen")  # BatchNorm goes into the convolution
    assert describe_network(model)["parameters"] == sum(p.numel() for p in grey.parameters()) - folded
    assert not any(p.requires_grad for p in model.parameters())
    buffers = {name.rpartition(".")[2] for name, _ in model.backbone.network.named_buffers()}
    assert buffers == (set() if folded else {"running_mean", "running_var", "num_batches_tracked"})


class Product(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("matrix", torch.rand(64, 2))

    def forward(self, x):
        return x.flatten(1) @ self.matrix


def test_the_matrix_of_a_product_is_a_parameter():
    assert sum(p.numel() for p in read_program(write_program(Product(), 1, 8)).parameters()) == 128


def newest_onnx(kind, net, x, path):
    "Write `net` as the newer exporter of torch does, or with the batch size read from the images."
    if kind == "computed":
        return onnx_file(Viewed(net).eval(), x, path)
    pytest.importorskip("onnx2torch")
    pytest.importorskip("onnxscript")
    example, options = (x[:1], {}) if kind == "one image" else (x, {"dynamic_shapes": ({0: "n"},)})
    torch.onnx.export(net, (example,), path, verbose=False, **options)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["one image", "any number", "computed"])
def test_onnx_takes_any_number_of_images(kind, grey, spots, tmp_path):
    newest_onnx(kind, grey, spots, tmp_path / "net.onnx")
    model = import_teacher(tmp_path / "net.onnx", size=8, channels=1, mean="none").model
    for n in (1, 3):
        assert torch.allclose(model(spots[:n]), grey(spots[:n]), atol=1e-4)
    assert model.backbone.classifier and describe_network(model)["parameters"] > 100  # BatchNorm is folded


@pytest.mark.filterwarnings("ignore")
def test_our_own_onnx_comes_back(spots, tmp_path):
    pytest.importorskip("onnx2torch")
    student = randomised(from_spec(ModelSpec("resnet8_cifar", NAMES, 1, 8, (0.4,), (0.3,))))
    write_onnx(tmp_path / "student.onnx", write_program(student, 1, 8), student.spec)
    model = import_teacher(tmp_path / "student.onnx", size=8, channels=1, mean="none").model
    for n in (1, 3):
        assert torch.allclose(model(spots[:n]), student(spots[:n]), atol=1e-4)


@pytest.mark.filterwarnings("ignore")
def test_onnx_weights_beside_the_file(grey, spots, tmp_path, monkeypatch):
    onnx_file(grey, spots, tmp_path / "whole.onnx")
    onnx = pytest.importorskip("onnx")
    model, folder = onnx.load(tmp_path / "whole.onnx"), tmp_path / "apart"
    folder.mkdir()
    options = dict(save_as_external_data=True, location="net.onnx.data", size_threshold=0)
    onnx.save_model(model, folder / "net.onnx", **options)
    content = (folder / "net.onnx").read_bytes()
    monkeypatch.chdir(tmp_path)
    assert torch.allclose(from_onnx(content, folder)(spots), grey(spots), atol=1e-4)
    (folder / "net.onnx.data").rename(tmp_path / "net.onnx.data")
    with pytest.raises(ProgramError, match="^its weights are in net.onnx.data, and its folder has no such file$"):
        from_onnx(content, folder)
    for entry in [e for tensor in model.graph.initializer for e in tensor.external_data if e.key == "location"]:
        entry.value = "../net.onnx.data"
    with pytest.raises(ProgramError, match="cannot convert it .*TensorProto"):
        from_onnx(model.SerializeToString(), folder)


COMPUTED = """<ir_version: 8, opset_import: ["" : 17]>
odd (float[n, 3, 4, 4] x) => (float[a, b] y)
{
    first = Constant <value = int64[2] {0, 1}> ()
    whole = Cast <to = 7> (x)
    flat = Flatten (whole)
    row = Gather <axis = 1> (flat, first)
    target = ReduceMin <axes = [0], keepdims = 0> (row)
    y = Reshape (x, target)
}"""


def test_onnx_shapes_that_images_decide_are_refused():
    pytest.importorskip("onnx2torch")
    parser = pytest.importorskip("onnx.parser")
    with pytest.raises(ProgramError, match=r"a shape of unknown numbers: export it by .*dynamo=False.*save$"):
        from_onnx(parser.parse_model(COMPUTED).SerializeToString())


def test_a_parallel_network_is_unwrapped(net, x):
    brought = import_teacher(nn.DataParallel(net), size=32, mean="none")
    assert torch.allclose(brought.model(x), net(x), atol=1e-5)


def test_what_cannot_be_exported_is_refused_without_its_graph(capfd):
    with pytest.raises(ProgramError, match="^torch.export cannot write it"):
        write_program(lambda x: x.flatten(1) if x.sum() > 0 else x.flatten(1).neg(), 1, 8)
    assert capfd.readouterr() == ("", "")
