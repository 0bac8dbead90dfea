"""The published code of DM and DSA (one repository). Each is a function `main` that reads the command line: it is run as it is,
for a few iterations and without its evaluations, and heard at what it calls once in each."""

import sys
import tempfile
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from unittest.mock import patch

import old_names  # noqa: F401

from common import Measure, Shapes, Ticks, images_like, import_clone, replaced

STRATEGY = "color_crop_cutout_flip_scale_rotate"


def dataset(shapes: Shapes) -> tuple:
    "What the code's `get_dataset` gives, for the images that all sides use."
    images = images_like(shapes)
    mean, std = list(images.mean), list(images.std)
    normalised = (images.batch() - images.batch().mean()) / images.batch().std()
    train = list(zip(normalised, images.labels.tolist(), strict=True))
    return 3, (shapes.size, shapes.size), shapes.classes, list(images.classes), mean, std, train, train, None


def run(module, shapes: Shapes, words: list[str], **new) -> None:
    "Run the script with these words on its command line, quietly, in a folder of its own."
    with tempfile.TemporaryDirectory() as folder:
        words = [*words, "--save_path", folder, "--data_path", folder, "--ipc", str(shapes.ipc), "--init", "real"]
        words += ["--num_exp", "1", "--num_eval", "0", "--dsa_strategy", STRATEGY]
        found = dataset(shapes)
        with (
            patch.object(sys, "argv", ["main", *words]),
            replaced(module, get_dataset=lambda *_: found, **new),
            redirect_stdout(StringIO()),
        ):
            module.main()


def dc(path: Path, shapes: Shapes) -> dict[str, Measure]:
    "What the clone can be asked."
    dm_script, dsa_script = import_clone(path, "main_DM", "main")

    def dm() -> dict[str, float]:
        ticks = Ticks()  # at each new network: from one iteration to the next
        words = ["--Iteration", "1", "--batch_real", str(shapes.dm_real)]
        run(dm_script, shapes, words, get_network=ticks.on(dm_script.get_network))
        return {"DM iteration": ticks.mean()}

    def dsa() -> dict[str, float]:
        ticks = Ticks()  # before the network learns: from there, its steps and the next matching
        words = ["--method", "DSA", "--Iteration", "0", "--batch_real", str(shapes.dsa_real)]
        loops = lambda ipc: (3, shapes.dsa_inner)
        heard = ticks.on(dsa_script.TensorDataset)
        run(dsa_script, shapes, words, get_loops=loops, TensorDataset=heard)
        return {"DSA iteration": ticks.mean()}

    return {"dm": dm, "dsa": dsa}
