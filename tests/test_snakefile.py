"""The one command that makes everything: what it would do."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

SNAKEMAKE = Path(sys.executable).parent / "snakemake"
pytestmark = pytest.mark.skipif(not SNAKEMAKE.exists(), reason="the extra `reports` is not installed")


def planned(profile, *targets, **config):
    "What a profile would run, without running it."
    given = [f"{name}={value}" for name, value in config.items()]
    command = [SNAKEMAKE, "--profile", f"profiles/{profile}", "--nolock", "-n", *targets, *(["--config", *given] if given else [])]
    out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout + out.stderr


def test_smoke_runs_every_notebook_and_draws_every_page():
    text = planned("smoke", "--forceall")  # also what is there already
    drawn = {p.name for p in (ROOT / "nbs").glob("paper_*.ipynb")} - {"paper_a_images.ipynb", "paper_b_features.ipynb"}
    for name in drawn | {p.name for p in (ROOT / "nbs").glob("run_*.ipynb")}:
        assert f"runs/smoke/{name}" in text, name


def test_on_a_cluster_each_run_asks_for_a_card_memory_and_time():
    text = planned("slurm", "reports/records/gpu-trial-cifar-ipc10-seed4.json")
    assert text.count("gpu=1") == 2 and text.count("runtime=600") == 2 and text.count("mem_mb=8000") == 2
    assert "rule teacher" in text  # a file that its run needs


def test_no_committed_record_is_made_again_and_the_plan_counts_those_that_are_missing():
    text = planned("cpu", "--quiet", "rules", data="cifar10.tar.xz", other="imagenet.tar.xz")
    rows = [line.split("|") for line in (ROOT / "reports/plan.md").read_text().splitlines()]
    missing = sum(int(row[4]) for row in rows if len(row) > 4 and row[4].strip().isdecimal())
    assert re.search(rf"^record +{missing}$", text, re.M), text
