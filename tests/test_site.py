"""The site: notebooks without machinery, links that lead to pages, and a build that refuses what is broken."""

import json
import re

import pytest
from conftest import ROOT

pytest.importorskip("myst_nb", reason="pip install -e '.[site]'")
pytest.importorskip("furo")
from sphinx.cmd.build import main as sphinx  # noqa: E402

FRONT = """# Front

See [the room](nbs/00_room.ipynb), [its end](nbs/00_room.ipynb#The-end), [the run](nbs/run_kd.ipynb), [all](reports/).

```{toctree}
nbs/00_room
reports/run_kd
reports/README
```
"""
MATTER = "---\nskip_exec: true\n---"


def cell(kind, source, *outputs):
    code = dict(outputs=list(outputs), execution_count=None) if kind == "code" else {}
    return dict(cell_type=kind, metadata={}, source=source, id=f"c{abs(hash(source))}", **code)


def printed(text):
    return dict(output_type="stream", name="stdout", text=text)


@pytest.fixture
def repository(tmp_path):
    "A front page, a room, and a run with its executed copy."
    files = {
        "nbs/00_room": [
            cell("markdown", "# Room\n\n> In one line."),
            cell("code", "#| export\nshown = 1", printed("an output")),
            cell("markdown", "## The end\n\nUsed by [the run](run_kd.ipynb)."),
        ],
        "nbs/run_kd": [cell("raw", MATTER), cell("markdown", "# Not executed")],
        "reports/run_kd": [
            cell("raw", MATTER),
            cell("markdown", "# Executed\n\nMade by [the room](00_room.ipynb)."),
            cell("code", "folded = 1", printed("a result"), printed("\n")),
        ],
    }
    for name, cells in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        notebook = dict(cells=cells, metadata=dict(language_info=dict(name="python")), nbformat=4, nbformat_minor=5)
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook))
    (tmp_path / "README.md").write_text(FRONT)
    (tmp_path / "reports/README.md").write_text("# Reports\n")
    return tmp_path


def build(repository):
    "The exit status of a strict build of `repository` with the site's own settings, and its pages."
    out = repository / "_docs"
    status = sphinx(["-M", "html", str(repository), str(out), "-c", str(ROOT / "docs"), "-W", "-q"])
    return status, {str(p.relative_to(out / "html")): p.read_text() for p in (out / "html").rglob("*.html")}


def change(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_notebooks_become_pages(repository):
    status, pages = build(repository)
    assert status == 0
    front, room, run = pages["index.html"], pages["nbs/00_room.html"], pages["reports/run_kd.html"]
    for target in ("nbs/00_room.html", "nbs/00_room.html#the-end", "reports/run_kd.html", "reports/README.html"):
        assert re.search(f'<a [^>]*href="{target}"', front[front.index("<article") :]), target
    assert 'href="../reports/run_kd.html"' in room[room.index("Used by") :]
    assert 'href="../nbs/00_room.html"' in run[run.index("Made by") :]
    assert "an output" in room and "a result" in run and "nbs/run_kd.html" not in pages
    assert not any(machinery in page for page in pages.values() for machinery in ("skip_exec", "#| export"))
    assert run.count('<div class="output ') == 1  # what a cleared progress bar left is not shown
    assert "<details" in run.partition("folded")[0] and "<details" not in room[room.index("<article") :]


FAULTS = {  # of a file, in which one text takes the place of another: what the build says
    "link": ("README.md", "(nbs/00_room.ipynb)", "(nbs/01_room.ipynb)", "'nbs/01_room.ipynb'"),
    "anchor": ("README.md", "#The-end", "#The-start", "'the-start'"),
    "contents": ("README.md", "nbs/00_room\n", "", "document isn't included in any toctree"),
    "picture": ("nbs/00_room.ipynb", "Used by", "![](nowhere.png)", "nowhere.png"),
    "html": ("reports/run_kd.ipynb", "Made by", "<a href='nowhere.html'>x</a>", "leads nowhere: nowhere.html"),
    "path": ("reports/run_kd.ipynb", "a result", "HERE/records", "tells HERE/"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_fault_fails_the_build(repository, fault, capfd):
    file, old, new, said = (text.replace("HERE", str(repository)) for text in FAULTS[fault])
    change(repository / file, old, new)
    assert build(repository)[0] != 0
    assert said in capfd.readouterr().err
