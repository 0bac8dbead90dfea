"""How fast condexp is beside the least that its networks cost and beside the published code, by clones that you name.

    python benchmarks/compare.py --record reports/records/speed.json \
        --cmi clones/CMI --fast clones/Fast-Datafree --dc clones/DatasetCondensation --mtt clones/mtt-distillation

The clones are github.com/zju-vipa/CMI, zju-vipa/Fast-Datafree, VICO-UoE/DatasetCondensation and
GeorgeCazenavette/mtt-distillation; those of inversion need kornia (`--also FOLDER`: where it is, if it is not installed). Without a
clone its columns are left out. All sides take turns, in rounds, in one process, so that what slows the machine down slows all of
them. `nbs/paper_speed.ipynb` draws the record.
"""

import argparse
import json
import os
import platform
import sys
import tempfile
import time
import warnings
from dataclasses import asdict
from pathlib import Path

os.environ["TQDM_DISABLE"] = "1"  # read when the bars are imported

import torch
from condexp.cache import write_atomic
from condexp.records import commit_of, environment
from condexp.training import automatic_precision, make_fabric

import common
import ours
from common import PUBLISHED, TINY, Measure, Shapes, write_pictures

Cases = dict[str, dict[str, Measure]]  # case -> side -> what to call


def all_cases(shapes: Shapes, pictures: Path, options: argparse.Namespace) -> Cases:
    "Everything that is timed."
    default = automatic_precision(torch.cuda.is_available())
    cases: Cases = {}
    for precision in dict.fromkeys(("32", default)):
        for case, sides in ours.measures(shapes, precision, "fp32" if precision == "32" else precision).items():
            cases.setdefault(case, {}).update(sides)
    cases |= ours.without_precision(pictures)
    device = make_fabric().device
    official: dict[str, Measure] = {}
    if options.cmi:
        from official_datafree import cmi

        official |= cmi(options.cmi, shapes, pictures, device, str(options.also or ""))
    if options.fast:
        from official_datafree import fast

        official |= fast(options.fast, shapes, device)
    if options.dc:
        from official_dc import dc

        official |= dc(options.dc, shapes)
    if options.mtt:
        from official_mtt import mtt

        official |= mtt(options.mtt, shapes)
    for case, measure in official.items():
        cases[case]["official"] = measure
    return cases


LONG = 5.0  # seconds: a round that takes longer needs no other to warm up, but on a GPU, where cuDNN first tries its ways


def timed(sides: dict[str, Measure], rounds: int, most: float) -> dict[str, dict[str, list[float]]]:
    "By row and side, the seconds of each round: two at least, more as long as `most` seconds are not over."
    began, turns, warm, found = time.perf_counter(), 0, False, {}
    while turns < 2 or (turns < rounds and time.perf_counter() - began < most):
        before, times = common.CLOCK(), [(side, measure()) for side, measure in sides.items()]
        if warm or (common.CLOCK() - before > LONG and not torch.cuda.is_available()):
            turns += 1
            for side, values in times:
                for row, value in values.items():
                    found.setdefault(row, {}).setdefault(side, []).append(value)
        warm = True
    return found


def profiled(sides: dict[str, Measure], most: int = 6) -> list[tuple[str, float]]:
    "The operations in which our side's default precision spends most, as shares of the time in all of them."
    measure = [measure for name, measure in sides.items() if name.startswith("ours ")]
    if not measure:
        return []
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        measure[-1]()
    times = {event.key: event.self_cpu_time_total for event in profile.key_averages()}
    top = sorted(times.items(), key=lambda item: -item[1])[:most]
    return [(name, value / sum(times.values())) for name, value in top]


def processor() -> str:
    "The name of the CPU, as the system tells it."
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.exists() else []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.processor())


def write(path: Path | None, record: dict) -> None:
    "The record so far, if there is a place for it."
    if path:
        write_atomic(path, lambda tmp: tmp.write_text(json.dumps(record, indent=1) + "\n"))


def main() -> None:
    "Time everything, and write the record."
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("cmi", "fast", "dc", "mtt"):
        parser.add_argument(f"--{name}", type=lambda p: Path(p).resolve(), help="a clone")
    parser.add_argument("--also", type=lambda p: Path(p).resolve(), help="a folder with packages that clones need")
    parser.add_argument("--record", type=Path, help="where to write the seconds")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--minutes", type=float, default=10.0, help="after which a case begins no third round, shared among cases"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="cases")
    parser.add_argument("--cpu-time", action="store_true", help="count CPU seconds: for a machine that others use")
    parser.add_argument("--tiny", action="store_true", help="tiny shapes: whether it runs")
    parser.add_argument("--published", action="store_true", help="the published shapes: for a GPU")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    common.CLOCK = common.cpu_time if options.cpu_time else common.wall_time
    warnings.filterwarnings("ignore")
    if options.also:
        sys.path.append(str(options.also))
    shapes = TINY if options.tiny else PUBLISHED if options.published else Shapes()
    clones = {name: getattr(options, name) for name in ("cmi", "fast", "dc", "mtt") if getattr(options, name)}
    scripts = dict(cmi="datafree_kd.py", fast="datafree_kd.py", dc="main.py", mtt="distill.py")
    official = {name: commit_of(path / scripts[name]) for name, path in clones.items()}
    record = dict(shapes=asdict(shapes), rounds=options.rounds, processor=processor(), official=official)
    record["environment"] = environment(make_fabric())
    record |= dict(clock="CPU" if options.cpu_time else "wall", load=os.getloadavg()[0])
    record |= dict(seconds={}, profile={})
    with tempfile.TemporaryDirectory() as folder:
        cases = all_cases(shapes, write_pictures(Path(folder), shapes), options)
        for case, sides in sorted(cases.items(), key=lambda item: item[0] == "cmi_full"):  # the longest comes last
            if not options.only or case in options.only:
                record["seconds"] |= timed(sides, options.rounds, 60 * options.minutes / len(cases))
                record["profile"][case] = profiled(sides)
                write(options.record, record)
                print(f"{case} is timed", flush=True)
    for row, sides in record["seconds"].items():
        print(f"{row:32}", *(f"{side} {sorted(v)[len(v) // 2]:.3f}" for side, v in sides.items()), sep="  ")


if __name__ == "__main__":
    main()
