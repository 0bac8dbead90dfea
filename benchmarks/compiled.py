"""What `torch.compile` gains for the networks of an inversion that stay the same: `python benchmarks/compiled.py RECORD`.

Seconds are CPU seconds of one thread, those of the C++ compiler included.
"""

import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch._inductor.config
from condexp.cache import write_atomic
from condexp.models import Generator
from condexp.records import environment

import common
from common import Shapes, seconds
from ours import Setting


def compiled(shapes: Shapes, rounds: int) -> dict[str, dict]:
    "What `torch.compile` gains for the frozen teacher and for a generator: seconds to compile, and a pass."
    s = Setting(shapes, "auto")
    generator = Generator(shapes.size, 3).to(s.device, memory_format=torch.channels_last).train()
    z = torch.randn(shapes.batch, 256, device=s.device)

    def passes(model: torch.nn.Module, x: torch.Tensor) -> None:
        x = x.detach().requires_grad_()
        with s.fabric.autocast():
            loss = model(x).float().square().mean()
        loss.backward()

    found = {}
    for name, model, x in (("frozen teacher", s.teacher, s.x), ("generator", generator, z)):
        quick = torch.compile(model)
        passes(model, x)
        first = seconds(partial(passes, quick, x))
        passes(quick, x)
        pairs = [(seconds(partial(passes, model, x)), seconds(partial(passes, quick, x))) for _ in range(rounds)]
        eager, fast = map(list, zip(*pairs, strict=True))
        found[name] = {"compiling": first, "eager": eager, "compiled": fast}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch._inductor.config.compile_threads = 1  # in this process, whose seconds are counted
    common.CLOCK = common.cpu_time
    found = compiled(Shapes(), rounds=5)
    record = dict(compile=found, environment=environment(Setting(Shapes(), "auto").fabric))
    write_atomic(Path(sys.argv[1]), lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))
