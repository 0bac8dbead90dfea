"""What the norm of a ConvNet costs, by the layer that computes it: `python benchmarks/norms.py RECORD` (CPU seconds, one thread).

`InstanceNorm2d`, which condexp's ConvNet had until November 2026, and `GroupNorm` with a group for each channel, which it
has now as the published code has, are the same function.
"""

import json
import sys
from pathlib import Path

import torch
from condexp.cache import write_atomic
from condexp.records import environment
from condexp.training import make_fabric
from torch import nn

import common
from common import seconds

NORMS = {
    "InstanceNorm2d": lambda width: nn.InstanceNorm2d(width, affine=True),
    "GroupNorm": lambda w: nn.GroupNorm(w, w),
}


def convnet(norm, width: int = 128) -> nn.Module:
    "A ConvNet for 32 pixels."
    block = lambda channels: (nn.Conv2d(channels, width, 3, padding=1), norm(width), nn.ReLU(), nn.AvgPool2d(2))
    return nn.Sequential(*block(3), *block(width), *block(width), nn.Flatten(), nn.Linear(16 * width, 10))


def passes(network: nn.Module, x: torch.Tensor) -> dict[str, float]:
    "Seconds of a forward pass, of a gradient for the weights, and of the gradient of that for the images."
    kept = []

    def gradient() -> None:
        loss = network(x).logsumexp(1).mean()
        kept.extend(torch.autograd.grad(loss, list(network.parameters()), create_graph=True))

    with torch.no_grad():
        forward = seconds(lambda: network(x))
    first = seconds(gradient)
    return dict(forward=forward, gradient=first, second=seconds(lambda: sum(g.square().sum() for g in kept).backward()))


if __name__ == "__main__":
    torch.set_num_threads(1)
    common.CLOCK = common.cpu_time
    networks, x = {name: convnet(norm) for name, norm in NORMS.items()}, torch.randn(50, 3, 32, 32, requires_grad=True)
    found = {name: [] for name in networks}
    for turn in range(6):
        for name, network in networks.items():
            times = passes(network, x)
            if turn:
                found[name].append(times)
    record = dict(norms=found, environment=environment(make_fabric(precision="32")))
    write_atomic(Path(sys.argv[1]), lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
