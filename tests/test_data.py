"""Images of any kind come in as one set, by name or by path; what cannot be used is refused, what is left out is said."""

import hashlib
import io
import os
import shutil
import tarfile
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from condexp import files
from condexp.cache import cache_dir
from condexp.data import ImageSet, load_images, load_splits, random_per_class, validation_split
from condexp.transfer import class_words


def pack(folder, path, mode="w:gz"):
    with tarfile.open(path, mode) as archive:
        archive.add(folder, arcname=folder.name)
    return path


def add_member(path, name, kind=tarfile.REGTYPE, target=""):
    "Append a member to an uncompressed archive."
    picture = io.BytesIO()
    Image.new("RGB", (24, 24)).save(picture, "png")
    member = tarfile.TarInfo(name)
    member.type, member.linkname, member.size = kind, target, len(picture.getvalue()) if kind == tarfile.REGTYPE else 0
    with tarfile.open(path, "a") as archive:
        archive.addfile(member, io.BytesIO(picture.getvalue()))
    return path


def same(a, b):
    return all(x.fingerprint == y.fingerprint for x, y in zip(a[:2], b[:2], strict=True))


@pytest.mark.parametrize("ending, mode", [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz"), ("zip", None)])
def test_an_archive_holds_what_its_folder_holds(folder, tmp_path, ending, mode):
    root, path = folder(), tmp_path / f"photos.{ending}"
    if mode:
        pack(root, path, mode)
    else:
        with zipfile.ZipFile(path, "w") as archive:
            for file in root.rglob("*.png"):
                archive.write(file, file.relative_to(tmp_path))
    assert same(load_splits(str(path)), load_splits(str(root)))


@pytest.mark.parametrize("ending", ["", ".tar.gz", ".zip"])
@pytest.mark.parametrize("table", ["words.tsv", "words.txt"])
def test_the_names_of_classes_are_found_in_folder_and_archive(tmp_path, table, ending):
    root = tmp_path / "imagenet"
    (root / "deep").mkdir(parents=True)
    (root / "deep" / table).write_text("n1\ttabby, cat\n")
    if ending:
        shutil.make_archive(root, {".zip": "zip", ".tar.gz": "gztar"}[ending], tmp_path, root.name)
    assert class_words(f"{root}{ending}", ["n1", "n2"]) == {"n1": "tabby, cat", "n2": "n2"}


def test_hard_links_to_members_are_files(folder, tmp_path):
    root = folder()
    (root / "train/china/0.png").unlink()
    os.link(root / "train/china/1.png", root / "train/china/0.png")
    assert same(load_splits(str(pack(root, tmp_path / "linked.tar", "w"))), load_splits(str(root)))


def test_class_folders_may_lie_one_folder_further_down(folder):
    root = folder("outer/inner")
    assert same(load_splits(str(root.parent)), load_splits(str(root)))


def test_photographs_become_bytes_in_colour(folder):
    train, test, _ = load_splits(str(folder(each=5)), 20)
    assert train.images.shape == (10, 3, 20, 20) and train.images.dtype == torch.uint8
    assert train.classes == ("china", "flower") and train.counts == test.counts == [5, 5]
    assert torch.allclose(train.batch().mean((0, 2, 3)), torch.tensor(train.mean), atol=1e-4)


@pytest.mark.parametrize(
    "mode, suffix, channels", [("L", "png", 1), ("RGB", "jpg", 3), ("RGBA", "png", 3), ("P", "gif", 3)]
)
def test_every_mode_of_image_is_read(folder, mode, suffix, channels):
    assert load_splits(str(folder(mode=mode, suffix=suffix)), 16).train.channels == channels


def test_images_of_odd_sizes_become_one_square_size(folder):
    root = folder(size=37)
    Image.new("RGB", (301, 90), "red").save(root / "train/china/wide.png")
    train = load_splits(str(root), 18).train
    assert train.images.shape == (13, 3, 18, 18)


def test_small_grey_digits_written_as_pictures_read_as_they_were(tmp_path):
    data = load_digits()
    for i in range(40):
        path = tmp_path / "set" / "train" / str(data.target[i]) / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((data.images[i] * 15).astype("uint8")).save(path)
    train, test, _ = load_splits(str(tmp_path / "set"))
    assert train.channels == 1 and train.size == 8 and train.num_classes == 10
    assert {tuple(x.flatten().tolist()) for x in train.images} <= {
        tuple((x * 15).astype("uint8").flatten()) for x in data.images[:40]
    }


def test_without_a_test_part_a_fifth_is_held_out_and_said_so(folder):
    root = folder(parts=("train",), each=10)
    train, test, note = load_splits(str(root))
    assert train.counts == [8, 8] and test.counts == [2, 2] and "fifth" in note
    assert same(load_splits(str(root)), (train, test))


def test_an_image_that_changes_is_read_again(folder):
    root = folder()
    before = load_splits(str(root))
    Image.new("RGB", (24, 24), "red").save(root / "train/china/0.png")
    assert not same(before, load_splits(str(root)))


@pytest.mark.parametrize(
    "name, kind, target",
    [
        ("../outside.png", tarfile.REGTYPE, ""),
        ("/train/china/a.png", tarfile.REGTYPE, ""),
        ("train/china/a.png", tarfile.SYMTYPE, "/etc/passwd"),
        ("train/china/b.png", tarfile.LNKTYPE, "x"),
    ],
    ids=["parent", "absolute", "symbolic link", "hard link"],
)
def test_an_archive_that_reaches_outside_itself_is_refused(folder, tmp_path, name, kind, target):
    path = add_member(pack(folder(), tmp_path / "bad.tar", "w"), name, kind, target)
    with pytest.raises(ValueError, match=r"^dataset is .*bad\.tar', but its member"):
        load_splits(str(path))


@pytest.mark.parametrize("name", ["../outside.png", "/train/china/a.png"])
def test_a_zip_that_reaches_outside_itself_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.writestr(name, b"")
    with pytest.raises(ValueError, match=r"^dataset is .*bad\.zip', but its member .* leads outside"):
        load_splits(str(tmp_path / "bad.zip"))


def test_an_archive_cut_short_is_refused(folder, tmp_path):
    path = pack(folder(), tmp_path / "short.tar.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"^dataset is .*short\.tar\.gz', but"):
        load_splits(str(path))


PICTURE = io.BytesIO()
Image.new("RGB", (24, 24), "red").save(PICTURE, "png")
PICTURE = PICTURE.getvalue()


def fill(root, tree, data=PICTURE, each=3):
    "Some pictures (or other files) in every folder that is named; `*` stands for their number."
    for place in tree.split():
        for i in range(each):
            path = root / place.replace("*", str(i))
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def tiny_imagenet(root):
    fill(root, "train/n1/images/*.JPEG train/n2/images/*.JPEG val/images/*.JPEG test/images/*.JPEG")
    (root / "val/val_annotations.txt").write_text("0.JPEG\tn2\t0\t0\n1.JPEG\tn1\t0\t0\n2.JPEG\tn2\t0\t0\n")


def avif(root):
    fill(root, "train/a/*.png train/b/*.png test/a/*.png test/b/*.png")
    for part in ("train", "test"):
        (root / part / "c").mkdir()
        for i in range(3):
            Image.new("RGB", (24, 24)).save(root / part / "c" / f"{i}.avif")
    fill(root, "train/a/*.heix train/b/*.svg", b"")


def empty_folder(root):
    fill(root, "train/a/*.png train/b/*.png test/a/*.png test/b/*.png")
    (root / "train/cherry").mkdir()


def twelve_bits(root):
    for name, value in (("a", 4095), ("b", 2048)):
        (root / name).mkdir()
        for i in range(3):
            Image.fromarray(np.full((24, 24), value - i, np.uint16)).save(root / name / f"{i}.png")


def latin_1(root):
    fill(
        root,
        " ".join(f"{part}/{os.fsdecode(name)}/*.png" for part in ("train", "test") for name in (b"b\xe4r", b"hund")),
    )


def file_server(root):
    fill(root, "a/*.png b/*.png @eaDir/*.png a/@eaDir/x/*.png b/thumbnails/*.png __MACOSX/b/*.png b/._*.png")


def without_suffix(root):
    fill(root, "a/* b/* a/README* b/0001.*")
    fill(root, "a/LICENSE b/Makefile", b"text", 1)


ROBO = "train/a/*.png train/b/*.png test/a/*.png test/b/*.png valid/a/*.png valid/b/*.png"
IMAGENET = "x/train/a/*.png x/train/b/*.png x/val/a/*.png x/val/b/*.png"
BROUGHT = {  # what people bring: how it is made, the images of each part, a word of the note
    "tiny imagenet": (tiny_imagenet, 6, 3, "tested on val/. test/ is left out, as it has no class folders"),
    "avif": (avif, 9, 9, "cannot be read are left out (3 .svg)"),
    "an empty class folder": (empty_folder, 6, 6, "Folders without images are left out (cherry)"),
    "twelve bits": (twelve_bits, 4, 2, "use 12 bits"),
    "latin-1": (latin_1, 6, 6, "as the set has them"),
    "a file server": (file_server, 4, 2, "Hidden files and thumbnails are left out (7, such as @eaDir)"),
    "no suffix": (without_suffix, 10, 2, "a fifth"),
    "val": (lambda root: fill(root, IMAGENET), 6, 6, "tested on val/"),
    "valid and test": (lambda root: fill(root, ROBO), 6, 6, "valid/ is left out, as there is test/"),
    "Training": (lambda root: fill(root, "Training/a/* Training/b/* Testing/a/* Testing/b/*"), 6, 6, "as the set has"),
    "strays": (
        lambda root: fill(root, "train/a/* train/b/* cover.png"),
        4,
        2,
        "outside of class folders are left out (1)",
    ),
}


@pytest.mark.parametrize("name", BROUGHT)
def test_what_people_bring_is_read_and_the_rest_is_said(tmp_path, name):
    make, train, test, said = BROUGHT[name]
    make(tmp_path)
    splits = load_splits(str(tmp_path))
    assert (len(splits.train), len(splits.test)) == (train, test) and said in splits.note
    assert all(class_name.encode() for class_name in splits.train.classes)
    if name == "twelve bits":
        assert {int(x.max()) for x in splits.train.images} >= {127} and splits.train.images.max() == 255
    if name == "latin-1":
        assert splits.train.classes == ("bär", "hund")


REFUSED = {  # what is in the folder, and what the sentence says
    "a class of svg": ("a/*.png b/*.png", "c/*.svg", "the images in its c/ cannot be read"),
    "a class of svg beside folders": ("cat/x/*.png cat/y/*.png", "dog/*.svg", "the images in its dog/ cannot be read"),
    "a link to nowhere": ("a/*.png b/*.png", "link", "is a link that leads nowhere"),
    "parquet": ("", "data/*.parquet", "3 .parquet.: what is read are images in train/<class>/"),
    "csv": ("images/*.png", "labels.csv", "two classes or more.*not 1; labels.csv is not read"),
    "parts without classes": ("train/*.png test/*.png", "", "there are no class folders in test and train"),
    "a class that is in one part": ("train/a/*.png train/b/*.png val/a/*.png", "", "val/ lacks b"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_is_named(tmp_path, name):
    images, other, said = REFUSED[name]
    fill(tmp_path, images)
    if other == "link":
        (tmp_path / "a/9.png").symlink_to("nowhere.png")
    else:
        fill(tmp_path, other, b"?")
    with pytest.raises(ValueError, match=rf"^dataset is .*, but .*{said}"):
        load_splits(str(tmp_path))


@pytest.mark.parametrize(
    "name, begin, said",
    [
        ("set.npz", b"PK\3\4", "a single .npz file is not read"),
        ("set.tar.zst", b"\x28\xb5\x2f\xfd", "packed with Zstandard, which is not read: unpack it"),
        ("set.zip", b"PK\3\4 no more", "cannot be read as a zip archive"),
        ("set.bin", b"something", "cannot be read as a tar archive"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, begin, said):
    (tmp_path / name).write_bytes(begin)
    with pytest.raises(ValueError, match=rf"^dataset is .*, but .*{said}"):
        load_splits(str(tmp_path / name))


def sparse_tar(path, size):
    "A tar of a few kB whose member says that it has `size` bytes, all of them a hole."
    member = tarfile.TarInfo("train/a/hole.png")
    member.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": str(size)}
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        archive.addfile(member)
    assert tarfile.open(path).next().size == size


def large_zip(path, size):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train/a/zeros.png", bytes(size))


@pytest.mark.parametrize("make, name", [(sparse_tar, "hole.tar"), (large_zip, "zeros.zip")])
def test_a_member_larger_than_the_limit_is_refused_before_it_is_read(tmp_path, monkeypatch, make, name):
    monkeypatch.setattr(files, "MAX_FILE", 2**20)
    make(tmp_path / name, 2**21)
    with pytest.raises(
        ValueError, match=rf"{name}', but its image 'train/a/.*' has 2,097,152 bytes: at most 1,048,576"
    ):
        load_splits(str(tmp_path / name))


@pytest.mark.parametrize(
    "limit, value, said",
    [
        ("MAX_TOTAL", 10_000, "it unpacks to more than 10,000 bytes"),
        ("MAX_MEMBERS", 5, "one file too many: at most 5 are read"),
        ("MAX_PIXELS", 500, "'photos/t.*png' has 24 x 24 pixels: at most 500"),
        ("MAX_FILE", 50, "'photos/t.*png' has .* bytes: at most 50"),
    ],
)
def test_an_archive_has_limits(folder, tmp_path, monkeypatch, limit, value, said):
    path = pack(folder(), tmp_path / "photos.tar.xz", "w:xz")
    monkeypatch.setattr(files, limit, value)
    with pytest.raises(ValueError, match=rf"^dataset is .*, but .*{said}"):
        load_splits(str(path))


def test_a_picture_of_too_many_pixels_is_refused_by_its_header(tmp_path):
    fill(tmp_path, "a/*.png b/*.png")
    Image.new("1", (12_000, 12_000)).save(tmp_path / "a/poster.png")
    with pytest.raises(ValueError, match="its image 'a/poster.png' has 12,000 x 12,000 pixels"):
        load_splits(str(tmp_path))


def test_replaced_pictures_of_the_same_size_and_time_are_read_again(folder):
    root = folder(suffix="bmp")
    before = load_splits(str(root))
    for path in root.rglob("*.bmp"):
        times, picture = path.stat(), Image.open(path).copy()
        picture.rotate(180).save(path)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert not same(before, load_splits(str(root)))


def test_a_name_means_the_set_and_a_folder_of_that_name_is_mentioned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "./digits" not in load_splits("digits").note
    fill(tmp_path / "digits", "train/a/*.png train/b/*.png")
    splits = load_splits("digits")
    assert splits.train.num_classes == 10 and "write ./digits for that" in splits.note
    assert load_splits("./digits").train.num_classes == 2


@pytest.mark.parametrize("size", [0, 28])
def test_mnist5k_is_split_by_class_and_always_the_same(size):
    train, test, _ = load_splits("mnist5k", size)
    assert train.counts == [400] * 10 and test.counts == [100] * 10 and train.channels == 1
    assert train.size == (size or 12)
    if size == 28:  # as MNIST has them: what is a mean of all 70,000 is nearly that of these
        assert abs(train.mean[0] - 0.1307) < 0.005 and abs(train.std[0] - 0.3081) < 0.005
        assert hashlib.sha256(test.images.numpy()).hexdigest()[:16] == MNIST5K


MNIST5K = "c972a295a6b070d0"

GOOD = ImageSet(torch.rand(4, 3, 8, 8), torch.arange(4) % 2, ("a", "b"), (0.5,) * 3, (0.25,) * 3)
WRONG = {
    "bytes as floats": ({"images": GOOD.images * 255}, r"images is 'from .* to 2\d\d', but"),
    "normalised": ({"images": (GOOD.images - 0.5) / 0.25}, "images is 'from -.*in .0, 1."),
    "nan": ({"images": GOOD.images * float("nan")}, "images is 'from nan to nan'"),
    "channels last": ({"images": GOOD.images.permute(0, 2, 3, 1)}, "images is 'of shape .4, 8, 8, 3.'"),
    "oblong": ({"images": GOOD.images[..., :4]}, "and square"),
    "long pixels": ({"images": GOOD.images.long()}, "images is 'of torch.int64', but it must be bytes"),
    "labels from 1": ({"labels": GOOD.labels + 1}, "labels is 'from 1 to 2', but class numbers go from 0 to 1"),
    "negative labels": ({"labels": GOOD.labels - 1}, "labels is 'from -1 to 0'"),
    "one-hot integers": ({"labels": torch.eye(2).long()[GOOD.labels]}, "labels is 'of shape .4, 2.'"),
    "logits": ({"labels": torch.eye(2)[GOOD.labels] * 8 - 4}, "labels is 'from -4 to 4'"),
    "no sum of 1": ({"labels": torch.eye(2)[GOOD.labels] / 2}, "adds up to 1"),
    "too few labels": ({"labels": GOOD.labels[:3]}, "4 images of 2 classes need 4 class numbers"),
    "mean of bytes": ({"mean": (123.675, 116.28, 103.53)}, "mean is .123.675, .*divide one of bytes by 255"),
    "deviation of 0": ({"std": (0.0, 0.2, 0.2)}, "std is .0.0, .*above 0"),
    "deviation of bytes": ({"std": (58.4,) * 3}, "std is .58.4, .*at most 1"),
    "one mean": ({"mean": (0.5,)}, "mean is .0.5,., but images of 3 channels need 3"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_set_is_checked_where_it_is_made(name):
    wrong, said = WRONG[name]
    with pytest.raises(ValueError, match=said):
        replace(GOOD, **wrong)


@pytest.mark.parametrize("kind", ["numpy", "int32", "uint8 labels", "half", "double", "bytes", "meta", "empty"])
def test_arrays_of_any_usual_type_make_a_set(kind):
    x, y = GOOD.images, GOOD.labels
    images, labels = {
        "numpy": (x.numpy(), y.numpy().astype(np.int32)),
        "int32": (x, y.int()),
        "uint8 labels": (x, y.byte()),
        "half": (x.half(), torch.eye(2).half()[y]),
        "double": (x.double(), torch.eye(2).double()[y]),
        "bytes": ((x * 255).byte(), y),
        "meta": (x.to("meta"), y.to("meta")),
        "empty": (x[:0], y[:0]),
    }[kind]
    made = replace(GOOD, images=images, labels=labels)
    assert made.labels.dtype in (torch.long, images.dtype) and made.batch().dtype == torch.float32


def test_images_of_no_class_are_one_class_and_those_of_a_test_part_are_not_among_them(tmp_path):
    fill(tmp_path, "*.png deep/down/*.png")
    flat = load_images(str(tmp_path), 16)
    assert len(flat) == 6 and flat.classes == ("image",)
    fill(tmp_path, "train/a/*.png test/a/*.png")
    assert len(load_images(str(tmp_path), 16)) == 9


def test_nothing_half_made_is_left_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("CONDEXP_CACHE", str(tmp_path / "cache"))
    fill(tmp_path / "own", "train/a/*.png")
    with pytest.raises(ValueError):
        load_splits(str(tmp_path / "own"))
    assert not [p for p in (cache_dir() / "images").glob("*") if p.suffix in (".tmp", ".checkpoint")]


def test_a_set_comes_back_from_its_file_as_it_was(digits, tmp_path):
    soft = digits.train.subset(range(20))
    soft = ImageSet(
        soft.batch(), torch.rand(20, 10).softmax(1), soft.classes, soft.mean, soft.std, {"method": "test", "seed": 3}
    )
    again = ImageSet.load(soft.save(tmp_path / "set.safetensors"))
    assert torch.equal(again.images, soft.images) and torch.equal(again.labels, soft.labels)
    assert (again.classes, again.mean, again.std, again.provenance) == (
        soft.classes,
        soft.mean,
        soft.std,
        soft.provenance,
    )


def test_the_validation_split_is_part_of_train_and_always_the_same(digits):
    rest, held = validation_split(digits.train, 0.1)
    assert len(rest) + len(held) == len(digits.train) and min(held.counts) > 0
    assert validation_split(digits.train, 0.1)[1].fingerprint == held.fingerprint


def test_random_images_are_a_choice_of_each_class(digits):
    few = random_per_class(digits.train, 3, seed=1)
    assert few.counts == [3] * 10
    assert few.fingerprint == random_per_class(digits.train, 3, seed=1).fingerprint
    assert few.fingerprint != random_per_class(digits.train, 3, seed=2).fingerprint
