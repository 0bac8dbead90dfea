"""Images of any kind come in as one set, by name or by path; what cannot be used is refused."""

import io
import tarfile

import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from condexp.data import ImageSet, load_splits, validation_split, random_per_class


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


@pytest.mark.parametrize("ending, mode", [("tar", "w"), ("tar.gz", "w:gz"), ("tar.xz", "w:xz")])
def test_an_archive_holds_what_its_folder_holds(folder, tmp_path, ending, mode):
    root = folder()
    assert same(load_splits(str(pack(root, tmp_path / f"photos.{ending}", mode))), load_splits(str(root)))


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


def test_an_archive_cut_short_is_refused(folder, tmp_path):
    path = pack(folder(), tmp_path / "short.tar.gz")
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"^dataset is .*short\.tar\.gz', but"):
        load_splits(str(path))


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


def test_minival_is_part_of_train_and_always_the_same(digits):
    rest, held = validation_split(digits.train, 0.1)
    assert len(rest) + len(held) == len(digits.train) and min(held.counts) > 0
    assert validation_split(digits.train, 0.1)[1].fingerprint == held.fingerprint


def test_random_images_are_a_choice_of_each_class(digits):
    few = random_per_class(digits.train, 3, seed=1)
    assert few.counts == [3] * 10
    assert few.fingerprint == random_per_class(digits.train, 3, seed=1).fingerprint
    assert few.fingerprint != random_per_class(digits.train, 3, seed=2).fingerprint
