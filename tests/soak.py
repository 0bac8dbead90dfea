"""Kills every stage at random moments and looks whether the records stay the same; not a test that pytest runs.

python tests/soak.py reports/soak.md --kills 30

Each trial runs a notebook by papermill from an empty cache, kills it with SIGKILL at a random moment after the first sign of
life in the cache, starts it again, kills it again, ten times in a row, lets it end, and compares its record with that of an
undisturbed run. Seconds and dates are not compared.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parent.parent
IN_A_ROW = 10  # kills of one run before it may end
SMALL = {"dataset": "digits", "size": 8, "student": "wrn_10_1", "epochs": 6, "steps": 8, "batch_size": 32}
KD = SMALL | {"ipc": 1, "condenser": "random"}
SET = {"dataset": "digits", "size": 8}
STUDENT = {"student": "wrn_10_1", "epochs": 4, "steps": 5, "batch_size": 32}
STAGES = {  # name -> notebook, parameters, whether it is given a teacher
    "teacher": ("run_teacher", SET | {"model": "wrn_10_1", "epochs": 30, "steps": 10, "batch_size": 32}, False),
    "condensed set (DM)": ("run_condense", SET | {"condenser": "dm", "ipc": 2, "iterations": 60}, False),
    "inversion (CMI)": ("run_kd", KD | {"arms": "inversion", "inversion": "cmi", "inversion_steps": 10}, True),
    "mixed": ("run_kd", KD | {"arms": "mixed"}, True),
    "expanded": ("run_kd", KD | {"arms": "expanded"}, True),
    "transfer set": ("run_surrogate", SET | STUDENT | {"surrogate": "noise", "images": 200}, True),
    "inverted set": (
        "run_surrogate", SET | STUDENT | {"surrogate": "inversion", "images": 200, "inversion_steps": 4}, True
    ),
    "attack": ("run_boundary", SET | STUDENT | {"surrogate": "noise", "images": 40, "attack_steps": 20}, True),
}
PASSING = {"seconds", "date", "time", "environment"}  # what may differ from run to run


@dataclass
class Stage:
    "One stage's undisturbed run, and what its trials gave."

    name: str
    first: float  # seconds until something was in the cache
    seconds: float  # until the end
    record: dict
    kills: int = 0
    early: int = 0  # runs that ended before the moment came
    resumed: int = 0  # killed when a checkpoint or an entry was there
    left: int = 0  # half-written files, or checkpoints of finished entries, at the end
    different: list[str] = field(default_factory=list)


def start(notebook: str, parameters: dict, folder: Path, cache: Path) -> subprocess.Popen:
    "papermill in a process group of its own."
    given = [word for name, value in parameters.items() for word in ("-p", name, str(value))]
    command = [sys.executable, "-m", "papermill", "--no-progress-bar", str(ROOT / f"nbs/{notebook}.ipynb"), "out.ipynb"]
    environment = os.environ | {"CONDEXP_CACHE": str(cache), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    log = (folder / "log").open("w")
    command += ["-p", "record", "record.json", *given]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True)


def finish(process: subprocess.Popen, folder: Path) -> dict:
    "What a run that must end well wrote down."
    if process.wait() != 0:
        raise RuntimeError(f"the run ended with {process.returncode}: {(folder / 'log').read_text()[-2000:]}")
    return comparable(json.loads((folder / "record.json").read_text()))


def comparable(value):
    "A record without what differs from run to run."
    if isinstance(value, dict):
        return {k: comparable(v) for k, v in value.items() if not PASSING & set(k.split("_"))}
    return [comparable(v) for v in value] if isinstance(value, list) else value


def kill(process: subprocess.Popen) -> None:
    "SIGKILL for papermill, its kernel, and whatever they started."
    import psutil

    for p in (*psutil.Process(process.pid).children(recursive=True), process):
        p.send_signal(signal.SIGKILL)
    process.wait()


def fresh(folder: Path) -> tuple[Path, Path]:
    "An empty folder to run in, and a cache in it."
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "cache").mkdir()
    return folder, folder / "cache"


def undisturbed(name: str, notebook: str, parameters: dict, folder: Path) -> Stage:
    "The run with which all others are compared."
    folder, cache = fresh(folder)
    began = time.perf_counter()
    process = start(notebook, parameters, folder, cache)
    while process.poll() is None and not any(cache.iterdir()):
        time.sleep(0.05)
    first = time.perf_counter() - began
    return Stage(name, record=finish(process, folder), first=first, seconds=time.perf_counter() - began)


def trial(stage: Stage, notebook: str, parameters: dict, folder: Path, moments: list[float]) -> None:
    "Kills at these moments, in seconds after each start, and the run that follows."
    folder, cache = fresh(folder)
    for moment in moments:
        process = start(notebook, parameters, folder, cache)
        try:
            process.wait(timeout=moment)
        except subprocess.TimeoutExpired:
            kill(process)
            stage.kills += 1
            kept = [p for p in cache.rglob("*") if p.suffix in (".checkpoint", ".safetensors")]
            stage.resumed += any(p.parent.name != "images" for p in kept)
        else:
            finish(process, folder)  # raises what the run ended with, if it did not end well
            stage.early += 1
    record = finish(start(notebook, parameters, folder, cache), folder)
    if record != stage.record:
        when = ", ".join(f"{moment:.1f}" for moment in moments)
        stage.different.append(f"after kills at {when} s: {difference(stage.record, record)}")
    stage.left += sum(p.suffix in (".tmp", ".checkpoint") for p in cache.rglob("*"))


def difference(a, b, where: str = "") -> str:
    "The first place in which two records differ."
    if isinstance(a, dict) and isinstance(b, dict):
        for key in sorted(a.keys() | b.keys()):
            if a.get(key) != b.get(key):
                return difference(a.get(key), b.get(key), f"{where}/{key}")
    return f"{where}: {str(a)[:60]} is now {str(b)[:60]}"


def soak(names: list[str], kills: int, seed: int, work: Path) -> list[Stage]:
    "All stages, each killed `kills` times."
    rng, stages, teacher = random.Random(seed), [], work / "teacher.safetensors"
    folder, cache = fresh(work / "first")
    made = STAGES["teacher"][1] | {"output": teacher}
    finish(start("run_teacher", made, folder, cache), folder)
    for name in names:
        notebook, parameters, needs_teacher = STAGES[name]
        parameters = parameters | ({"teacher": teacher} if needs_teacher else {})
        began = time.perf_counter()
        stage = undisturbed(name, notebook, parameters, work / "run")
        stages.append(stage)
        last = stage.first + 2 * (stage.seconds - stage.first) / IN_A_ROW  # so that ten kills spread over a run
        for done in range(0, kills, IN_A_ROW):
            moments = [rng.uniform(stage.first, last) for _ in range(min(IN_A_ROW, kills - done))]
            trial(stage, notebook, parameters, work / "run", moments)
            print(f"\r{name}: {stage.kills} kills, {len(stage.different)} different", end="", flush=True)
        print(f" ({time.perf_counter() - began:.0f} s)", flush=True)
    return stages


def report(stages: list[Stage], kills: int, seed: int) -> str:
    "The table, as Markdown."
    names = " ".join(sorted({STAGES[s.name][0] for s in stages}))
    rows = [
        f"| {s.name} | {s.seconds:.1f} | {s.kills} | {s.resumed} | {s.early} | {len(s.different)} | {s.left} |"
        for s in stages
    ]
    head = (
        "stage",
        "seconds undisturbed",
        "kills",
        "something to go on from",
        "ended first",
        "records that differ",
        "files left",
    )
    table = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1), *rows]
    text = f"""# Killed and started again

`python tests/soak.py reports/soak.md --kills {kills} --seed {seed}` ran each stage once undisturbed, and then killed it with
SIGKILL at random moments after the first file was in the cache, {IN_A_ROW} times in a row, with the same command given again
after each. Then it let the run end, and compared its record with the undisturbed one. Seconds and dates were left out. The
notebooks: {names}. "Ended first" counts runs that were done before their moment came. "Files left" counts
half-written files and checkpoints in the cache at the end.
"""
    differences = [f"* {s.name}, {d}" for s in stages for d in s.different]
    return "\n".join([text, *table, *([""] if differences else []), *differences]) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("report", type=Path, help="where the report goes, as Markdown")
    parser.add_argument("--kills", type=int, default=30, help="of each stage")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--stages", nargs="*", default=list(STAGES), choices=list(STAGES), metavar="STAGE")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="condexp-soak-") as work:
        stages = soak(asked.stages, asked.kills, asked.seed, Path(work))
    text = report(stages, asked.kills, asked.seed)
    asked.report.write_text(text)
    print(text)
    return int(any(s.different or s.left for s in stages))


if __name__ == "__main__":
    sys.exit(main())
