"""The gallery of the front page: one card for each kind of transfer set, with what its student reached.

    python tools/gallery.py                      # draws reports/gallery.png from reports/thumbnails.safetensors and records
    python tools/gallery.py NAME=FILE ...        # first takes a few images of files that hold `images`

Images of the archives that a user brings are left out: they are not ours to hand on.
"""

import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from condexp.records import read_records

REPORTS = Path(__file__).parent.parent / "reports"
THUMBNAILS, SHOWN = REPORTS / "thumbnails.safetensors", 10
CARDS = {  # thumbnails: what they are called, the records of their students, the set in them
    "mnist, full": ("real images, all 4,000", "first-run-*", "full"),
    "mnist, random": ("10 real images a class", "first-run-*", "random"),
    "mnist, condensed": ("10 condensed a class (DM)", "first-run-*", "condensed"),
    "mnist, inversion": ("inverted (Fast)", "first-run-*", "inversion"),
    "mnist, mixed": ("condensed and inverted", "first-run-*", "mixed"),
    "mnist, expanded": ("expanded: aligned, too", "first-run-*", "expanded"),
    "mnist, nayer": ("inverted (NAYER)", "gallery-nayer-*", None),
    "mnist, single_image": ("crops of one photograph", "gallery-single_image-*", None),
    "mnist, noise": ("noise", "gallery-noise-*", None),
    "mnist, shaders": ("shaders", "gallery-shaders-*", None),
    "mnist, leaves": ("dead leaves", "gallery-leaves-*", "leaves"),
    "mnist, attacked": ("dead leaves, attacked", "gallery-leaves-*", "leaves, attacked"),
}


def take(files: dict[str, str]) -> None:
    "Keep a few images of each file, from its first to its last."
    kept = load_file(THUMBNAILS) if THUMBNAILS.exists() else {}
    if unknown := files.keys() - kept.keys() - CARDS.keys():
        raise ValueError(f"no card is called {', '.join(sorted(unknown))}")
    for name, file in files.items():
        with safe_open(file, "pt") as found:
            images = found.get_tensor("images")
        images = images if images.dtype == torch.uint8 else (255 * images).round().byte()
        kept[name] = images[torch.linspace(0, len(images) - 1, SHOWN).long()].contiguous()
    save_file(dict(sorted(kept.items())), THUMBNAILS)


def sheet(images: torch.Tensor) -> torch.Tensor:
    "Two rows of images as one picture of height, width and three channels."
    framed = F.pad(images.expand(-1, 3, -1, -1), (0, 1, 0, 1), value=255)
    rows = [torch.cat(list(row), dim=2) for row in framed.split(SHOWN // 2)]
    return torch.cat(rows, dim=1).permute(1, 2, 0)


def draw() -> None:
    "One card for each kind."
    pictures, steps = load_file(THUMBNAILS), set()
    figure, axes = plt.subplots(3, 4, figsize=(10, 4.6), layout="constrained")
    for ax, (name, (words, files, kind)) in zip(axes.flat, CARDS.items(), strict=True):
        runs = read_records(REPORTS / "records", f"{files}.json")
        runs = runs if kind is None else runs[runs.set == kind]
        steps.update(runs.steps)
        ax.imshow(sheet(pictures[name]))
        ax.set_axis_off()
        reached = f"{runs.images.mean():,.0f} images: {runs.accuracy.mean():.1f} %, {runs.seed.nunique()} seeds"
        ax.set_title(f"{words}\n{reached}", fontsize=10)
    teacher = read_records(REPORTS / "records", "first-run-*.json").teacher_accuracy.mean()
    (each,) = steps  # as many for all
    said = f"Accuracy of the student that saw only these, after {each:,} steps (its teacher: {teacher:.1f} %)"
    figure.suptitle(said, fontsize=10)
    figure.savefig(REPORTS / "gallery.png", dpi=100)


if __name__ == "__main__":
    take(dict(pair.split("=", 1) for pair in sys.argv[1:]))
    draw()
