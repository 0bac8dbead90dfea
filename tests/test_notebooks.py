"""The notebooks are the source: their assertions hold, the modules are what they say, papermill can explain them."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from contextlib import redirect_stderr, redirect_stdout
from fnmatch import fnmatch
from pathlib import Path

import condexp
import pytest
from conftest import ROOT
from papermill import inspect_notebook
from preloaded import FRESH

sys.path.append(str(ROOT / "tools"))
import front_page

BIN = Path(sys.executable).parent
NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUNS = [p for p in NOTEBOOKS if p.stem.startswith("run_")]
ROOMS = [p for p in NOTEBOOKS if not p.stem.startswith(("run_", "paper_"))]


def call(*command, cwd=ROOT, **environment):
    "A command of this environment; its output, and an error if it fails."
    out = subprocess.run(
        [BIN / command[0], *command[1:]], cwd=cwd, env=os.environ | environment, capture_output=True, text=True
    )
    assert out.returncode == 0, out.stdout + out.stderr
    return out.stdout + out.stderr


@pytest.fixture
def clone(tmp_path):
    "The project's own files, in a folder that a test may change."
    for name in ("settings.ini", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    for name in ("nbs", "condexp"):
        shutil.copytree(
            ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints")
        )
    return tmp_path


def contents(folder, *patterns):
    return {p.relative_to(folder): p.read_bytes() for pattern in patterns for p in folder.glob(pattern) if p.is_file()}


def succeeds(work, path, log):
    "Do `work` on a notebook in a fresh process."
    process = FRESH.Process(target=work, args=(path, log))
    process.start()
    process.join()
    assert process.exitcode == 0, log.read_text()


def hold(path, log):
    "What `nbdev_test` does with one notebook; its complaint goes to the file `log`."
    from nbdev.test import test_nb

    with open(log, "w") as out, redirect_stdout(out), redirect_stderr(out):
        holds, _ = test_nb(path)
    sys.exit(not holds)


@pytest.mark.parametrize("path", ROOMS, ids=lambda p: p.stem)
def test_every_assertion_in_the_notebook_holds(path, tmp_path):
    succeeds(hold, path, tmp_path / "log")


TABLES = [p for p in NOTEBOOKS if p.stem.startswith("paper_") and (ROOT / "reports" / p.name).exists()]
TABLES = [p for p in TABLES if p.stem != "paper_a_images"]  # which needs the images, not only the records


FEWER = {"paper_b_features": "images, programs, size, teachers, dataset = 100, 4, 8, 2, 'digits'"}  # which computes what it draws


def draw(path, log):
    "Run every cell of a notebook that reads the committed records."
    from execnb.nbio import read_nb
    from execnb.shell import CaptureShell

    os.chdir(ROOT)
    notebook = read_nb(path)
    for cell in notebook.cells:
        if "parameters" in cell.metadata.get("tags", []):
            cell.source += "\n" + FEWER.get(path.stem, "")
    with open(log, "w") as out, redirect_stdout(out), redirect_stderr(out):
        CaptureShell().run_all(notebook, exc_stop=True)
    if path.stem not in FEWER:
        (log.parent / "said").write_text(json.dumps(told(notebook.cells)))


def told(cells):
    "What the cells of an executed notebook tell in Markdown."
    outputs = [output for cell in cells for output in cell.get("outputs") or ()]
    return ["".join(text) for output in outputs if (text := output.get("data", {}).get("text/markdown"))]


@pytest.mark.parametrize("path", TABLES, ids=lambda p: p.stem)
def test_tables_and_figures_are_drawn_from_the_committed_records_and_say_what_the_pages_say(path, tmp_path):
    succeeds(draw, path, tmp_path / "log")
    if path.stem not in FEWER:
        committed = json.loads((ROOT / "reports" / path.name).read_text())["cells"]
        assert json.loads((tmp_path / "said").read_text()) == told(committed), "draw it again"


def test_nbdev_test_alone_leaves_the_long_notebooks_out():
    from nbdev.frontmatter import FrontmatterProc
    from nbdev.process import NBProcessor

    for path in NOTEBOOKS:
        if path.stem.startswith(("run_", "paper_")):
            settings = NBProcessor(path, procs=FrontmatterProc, process=True).nb.frontmatter_
            assert settings.get("skip_exec"), f"{path.name} says nowhere '- skip_exec: true'"


def test_modules_are_what_the_notebooks_export(clone):
    patterns = "*.toml", "*.ini", "condexp/*"
    before = contents(clone, *patterns)
    call("nbdev_export", cwd=clone)
    assert contents(clone, *patterns) == before


def test_cleaning_a_notebook_keeps_its_parameters(clone):
    call("nbdev_clean", cwd=clone)
    for path in RUNS:
        tags = [c["metadata"].get("tags") for c in json.loads((clone / "nbs" / path.name).read_text())["cells"]]
        assert tags.count(["parameters"]) == 1


@pytest.mark.parametrize("path", RUNS, ids=lambda p: p.stem)
def test_papermill_explains_every_parameter(path):
    parameters = inspect_notebook(str(path))
    assert {"dataset", "record"} <= parameters.keys()
    assert path.stem == "run_import" or {"seed", "device", "precision"} <= parameters.keys()  # it computes nothing
    plans = path.stem in ("run_quality", "run_import", "run_datafree")  # no training, or as much as fits the time
    assert plans or {"size", "epochs", "steps", "batch_size"} <= parameters.keys()
    for name, what in parameters.items():
        assert len(what["help"]) > 8 and what["inferred_type_name"] != "None", f"{name} is not explained"


def test_help_on_the_command_line_shows_the_explanations():
    text = call("papermill", "--help-notebook", ROOT / "nbs/run_kd.ipynb")
    assert "ipc: int (default 10)" in text and "condensed images per class" in text


def test_notebooks_name_no_folder_of_somebodys_machine():
    for path in [*NOTEBOOKS, *(ROOT / "reports").glob("*.ipynb")]:
        assert not re.search(r"/(home|root|work|Users|tmp/venv)/", path.read_text()), path


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_where_a_figure_is_drawn_the_committed_notebook_has_its_picture(path):
    for cell in json.loads(path.read_text())["cells"]:
        shown = [output.get("data", {}) for output in cell.get("outputs", [])]
        pictures = sum("image/png" in data for data in shown)
        assert pictures >= sum("<Figure" in "".join(data.get("text/plain", "")) for data in shown), cell["id"]
        if path.stem[0] in "01" and "\nplt.show()" in "".join(cell["source"]):
            assert pictures, cell["id"]


@pytest.mark.parametrize("path", [p for p in NOTEBOOKS if (ROOT / "reports" / p.name).exists()], ids=lambda p: p.stem)
def test_an_executed_notebook_has_the_cells_of_its_source(path):
    sources, executed = (
        {c["id"]: "".join(c["source"]) for c in json.loads(p.read_text())["cells"]}
        for p in (path, ROOT / "reports" / path.name)
    )
    assert [name for name in sources if sources[name] != executed.get(name)] == [], "run it again, see reports/README.md"


def test_readme_and_front_page_say_what_the_executed_pages_say():
    notebook = front_page.filled()
    assert notebook == json.loads(front_page.INDEX.read_text()), "run python tools/front_page.py"
    assert front_page.readme(notebook) == front_page.README.read_text(), "run python tools/front_page.py"
    assert len(front_page.README.read_text().splitlines()) < 180


def test_the_files_of_settings_agree():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    settings = ConfigParser()
    settings.read(ROOT / "settings.ini")
    nbdev, conda = settings["DEFAULT"], (ROOT / "environment.yml").read_text()
    python = nbdev["min_python"]
    assert project["requires-python"] == f">={python}" and f"- python>={python}" in conda and "- -e .[dev]" in conda
    assert (project["name"], project["description"]) == (nbdev["lib_name"], nbdev["description"])
    assert nbdev["version"] == condexp.__version__ and "dev" in project["optional-dependencies"]
    assert project["license"].lower().startswith("apache") and nbdev["license"].startswith("apache")


DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "reports").glob("*.md")]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(path):
    for link in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        target = link.partition("#")[0]
        assert target.startswith("http") or (path.parent / target).exists(), link


def test_every_page_is_listed():
    text = "".join((ROOT / "docs" / name).read_text() for name in ("contents.md", "tables.md", "api.md"))
    listed = re.findall(r"(?:^|<|\.\./|^ +)((?:nbs/|reports/|docs/|condexp\.)[\w*]+|[A-Z]+)>?$", text, re.M)
    files = [p for pattern in ("*.md", "nbs/[0-9]*.ipynb", "reports/*.md", "reports/*.ipynb") for p in ROOT.glob(pattern)]
    pages = {str(p.relative_to(ROOT).with_suffix("")) for p in files} - {"README"}
    pages |= {f"condexp.{p.stem}" for p in (ROOT / "condexp").glob("[a-z]*.py")}
    assert not [page for page in sorted(pages) if not any(fnmatch(page, pattern) for pattern in listed)]
