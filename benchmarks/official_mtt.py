"""The published code of trajectory matching: a function `main`, run as it is for a few iterations, without its evaluations."""

import sys
import tempfile
from argparse import Namespace
from contextlib import chdir, redirect_stdout
from io import StringIO
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock, patch

import old_names  # noqa: F401
import torch

from common import Measure, Shapes, Ticks, import_clone, replaced, without_cuda
from official_dc import STRATEGY, dataset


def no_wandb() -> MagicMock:
    "Stands for the service that the code reports to; it hands the settings back, as the code wants them."
    wandb = MagicMock()
    wandb.init = lambda config, **_: setattr(wandb, "config", SimpleNamespace(_items=vars(config)))
    wandb.run.name = "benchmark"
    return wandb


def arguments(shapes: Shapes, folder: str) -> Namespace:
    "The settings that its command line gives. It whitens before its loop (`zca`), which changes nothing in it."
    chosen = dict(dataset="CIFAR10", model="ConvNet", ipc=shapes.ipc, zca=False, zca_trans=None, dsa="True")
    chosen |= dict(batch_syn=shapes.mtt_syn, syn_steps=shapes.mtt_steps, expert_epochs=2, max_start_epoch=2)
    chosen |= dict(lr_img=1000.0, lr_lr=1e-5, lr_teacher=0.01, lr_init=0.01, pix_init="real", Iteration=1)
    chosen |= dict(eval_mode="S", num_eval=0, eval_it=100, dsa_strategy=STRATEGY, data_path=folder)
    chosen |= dict(buffer_path=folder, load_all=True, no_aug=False, texture=False, max_files=None)
    chosen |= dict(max_experts=None, force_save=False, subset="", res=32, batch_real=256, batch_train=256)
    return Namespace(**chosen, epoch_eval_train=1000, canvas_size=2, canvas_samples=1)


def mtt(path: Path, shapes: Shapes) -> dict[str, Measure]:
    "What the clone can be asked."
    with patch.dict(sys.modules, {"wandb": no_wandb()}):
        (script,) = import_clone(path, "distill")
    found, places = dataset(shapes), shapes.classes

    def measure() -> dict[str, float]:
        ticks = Ticks()  # at each new student
        with tempfile.TemporaryDirectory() as folder, chdir(folder):
            network = script.get_network("ConvNet", 3, shapes.classes, (shapes.size, shapes.size))
            start = [p.detach() for p in network.parameters()]
            trajectory = [[p + 0.01 * torch.randn_like(p) for p in start] for _ in range(5)]
            experts = Path(folder, "CIFAR10_NO_ZCA", "ConvNet")
            experts.mkdir(parents=True)
            torch.save([trajectory], experts / "replay_buffer_0.pt")
            names = {c: c for c in range(places)}
            given = lambda *_, **__: (*found, {}, names, names)
            new = dict(get_dataset=given, get_network=ticks.on(script.get_network), tqdm=lambda x: x)
            with without_cuda(), replaced(script, **new), redirect_stdout(StringIO()):
                script.main(arguments(shapes, folder))
        return {"MTT iteration": ticks.mean()}

    return {"mtt": measure}
