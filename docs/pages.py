"""What Sphinx does not know of this repository: how its notebooks are shown, its comments beside parameters, its gallery."""

import base64
import inspect
import json
import re
import shutil
import zlib
from dataclasses import is_dataclass
from html.parser import HTMLParser
from pathlib import Path
from posixpath import join, normpath, relpath
from urllib.parse import unquote, urlsplit

from docutils import nodes
from sphinx.errors import ExtensionError
from sphinx.util.docutils import SphinxDirective

LINK = re.compile(r"(?<!!)(\[[^\]]*\]\()([^)\s#:]*)(#[^)\s]*)?\)")


def choose(app, config) -> None:
    "A notebook that was executed has one page, in reports."
    config.exclude_patterns += [f"nbs/{executed.name}" for executed in app.srcdir.glob("reports/*.ipynb")]


def page_of(env, target: str) -> str:  # both relative to the top of the repository
    "The file whose page shows `target`: a folder's README, a notebook as it was executed."
    if target == "nbs/index.ipynb":
        return "README.md"
    if (env.srcdir / target / "README.md").is_file():
        return normpath(join(target, "README.md"))
    executed = re.sub(r"^nbs/(?=run_|paper_)", "reports/", target)
    written = re.sub(r"^reports/", "nbs/", target)  # papermill copies a notebook's links as they are
    return next((file for file in (executed, target, written) if (env.srcdir / file).exists()), target)


def with_pages(env, text: str, docname: str) -> str:
    "Markdown whose links lead to pages; anchors are written as GitHub does, in small letters."
    folder = docname.rpartition("/")[0]

    def lead(link: re.Match) -> str:
        words, path, anchor = link[1], link[2], (link[3] or "").lower()
        target = relpath(page_of(env, normpath(join(folder, path))), folder or ".") if path else ""
        return f"{words}{target}{anchor})"

    return LINK.sub(lead, text)


def blank(output: dict) -> bool:
    "Whether nothing is to be seen in an output: what a progress bar leaves behind."
    data = output.get("data", {"text/plain": output.get("text", output.get("ename", ""))})
    return data.keys() <= {"text/plain"} and not "".join(data.get("text/plain", "")).strip()


def shown(cell: dict, folded: bool) -> dict | None:
    "A cell as a reader sees it: no front matter, no nbdev directives, code perhaps folded; None where nothing remains."
    source = "".join(cell["source"])
    if cell["cell_type"] != "code":
        return cell if cell["cell_type"] == "markdown" else None
    if module := re.match(r"#\| *default_exp +(\w+)", source):
        link = f"[condexp.{module[1]}](../docs/api/condexp.{module[1]}.rst)"
        return dict(cell_type="markdown", metadata={}, source=f"What is written here becomes {link}.")
    outputs = [o for o in cell["outputs"] if not blank(o)]
    directives = set(re.findall(r"^#\| *(\w+)", source, re.M))
    source = re.sub(r"^#\|.*\n?", "", source, flags=re.M)
    if not source.strip() and not outputs:
        return None
    tags = [f"nbdev-{name}" for name in sorted(directives)]
    tags += ["hide-input"] if folded or "hide" in directives else []
    return cell | {"source": source, "outputs": outputs, "metadata": cell["metadata"] | {"tags": tags}}


def tidy(app, docname: str, source: list[str]) -> None:
    "Before a page is read: notebooks without machinery, links that lead to pages, and the contents behind README."
    if docname == app.config.root_doc and (contents := app.srcdir / "docs" / "contents.md").is_file():
        source[0] += "\n" + contents.read_text()
    if app.env.doc2path(docname).suffix != ".ipynb":
        source[0] = with_pages(app.env, source[0], docname)
        return
    notebook = json.loads(source[0])
    cells = [shown(cell, folded=docname.startswith("reports/")) for cell in notebook["cells"]]
    cells = [cell for cell in cells if cell]
    for cell in cells:
        texts = [o["data"] for o in cell.get("outputs", []) if "text/markdown" in o.get("data", {})]
        for holder, key in [(data, "text/markdown") for data in texts] or [(cell, "source")]:
            if key != "source" or cell["cell_type"] == "markdown":
                holder[key] = with_pages(app.env, "".join(holder[key]), docname)
    source[0] = json.dumps(notebook | {"cells": cells})


def as_rst(text: str) -> str:
    "A docstring's Markdown in the markup that Sphinx reads: code in backticks, every other sign as it is."
    parts = [f"``{p}``" if i % 2 else re.sub(r"([*_|\\])", r"\\\1", p) for i, p in enumerate(text.split("`"))]
    return "".join(parts)


def docstring(app, what: str, name: str, obj, options, lines: list[str]) -> None:
    "Docstrings as they are written here, and the comments beside parameters as their fields."
    from fastcore.docments import docments

    if what == "module" and (room := re.search(r"File to edit: \.\./(nbs/\w+)\.ipynb", inspect.getsource(obj))):
        lines += ["", f"Written in :doc:`{room[1][4:]} </{room[1]}>`, which shows it at work."]
        return
    parameters = obj.__init__ if inspect.isclass(obj) and not is_dataclass(obj) else obj
    told = docments(parameters) if inspect.isfunction(parameters) or is_dataclass(parameters) else {}
    told = {n: as_rst(" ".join(comment.split())) for n, comment in told.items() if comment and n != "self"}
    returned = told.pop("return", "")
    lines[:] = [*map(as_rst, lines), "", *(f":param {n}: {comment}" for n, comment in told.items())]
    lines += [f":returns: {returned}"] if returned else []


class Pictures(SphinxDirective):
    """Pictures of an executed notebook, and what students of these sets reached.

    The argument names the notebook. Each line of the content is a text of the cell that made pictures, or `records:` and a
    pattern of files in reports/records.
    """

    required_arguments, has_content = 1, True

    def run(self) -> list[nodes.Node]:
        notebook = self.env.srcdir / self.arguments[0]
        self.env.note_dependency(str(notebook))
        cells = json.loads(notebook.read_text())["cells"]
        made = []
        for line in filter(None, self.content):
            if line.startswith("records: "):
                made += self.parse_text_to_nodes(reached(self.env, line.removeprefix("records: ")))
                continue
            outputs = [o for c in cells if line in "".join(c["source"]) for o in c.get("outputs", [])]
            pictures = [o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})]
            if not pictures:
                raise self.error(f"{notebook.name} has no picture of a cell with {line!r}")
            made += [self.picture(notebook.stem, base64.b64decode("".join(p))) for p in pictures]
        return made

    def picture(self, name: str, png: bytes) -> nodes.image:
        file = Path(self.env.app.outdir.parent, "pictures", f"{name}-{zlib.crc32(png):08x}.png")
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(png)
        here = self.env.doc2path(self.env.docname).parent
        return nodes.image(uri=relpath(file, here), alt=f"Images shown in {name}")


def reached(env, pattern: str) -> str:
    "A table in Markdown: each set of the records, how many images, and the student's accuracy."
    from condexp.records import read_records

    folder = env.srcdir / "reports" / "records"
    for record in folder.glob(f"{pattern}.json"):
        env.note_dependency(str(record))
    table = read_records(folder, f"{pattern}.json")
    run = table.iloc[0].fillna("")
    told = f"Teacher: {run.network}, {run.teacher_accuracy:.1f} % of `{run.dataset}`." if run.teacher_accuracy else ""
    told += f" Student: {run.student}." if told and run.student else ""
    lines = [told or f"Of `{run.dataset}`.", ""]
    lines += ["| set | images | student's accuracy | runs |", "| --- | ---: | ---: | ---: |"]
    for name, rows in table.groupby("set", sort=False):
        mean, spread = rows.accuracy.mean(), f" ± {rows.accuracy.std():.1f}" if len(rows) > 1 else ""
        lines.append(f"| {name} | {rows.images.mean():,.0f} | {mean:.1f}{spread} % | {len(rows)} |")
    return "\n".join(lines)


class Links(HTMLParser):
    "What one page offers (`ids`) and what it asks for (`targets`)."

    def __init__(self, page: Path):
        super().__init__()
        self.ids, self.targets = set(), set()
        self.feed(page.read_text())

    def handle_starttag(self, tag, attributes):
        for name, value in attributes:
            if name in ("id", "name") and value:
                self.ids.add(value)
            if name in ("href", "src") and value:
                self.targets.add(value)


def faults(folder: Path, machine: list[str]) -> list[str]:  # `machine`: paths that no page may tell
    "Links and images of the built pages that lead nowhere, and paths of this machine."
    folder = folder.resolve()
    pages = {page: Links(page) for page in sorted(folder.rglob("*.html"))}
    found = [f"{page.relative_to(folder)} tells {p}" for page in pages for p in machine if p in page.read_text()]
    for page, links in pages.items():
        for target in sorted(links.targets):
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            goal = (page.parent / unquote(url.path)).resolve() if url.path else page
            anchor = unquote(url.fragment)
            if not goal.is_file() or (anchor and goal in pages and anchor not in pages[goal].ids):
                found.append(f"{page.relative_to(folder)} leads nowhere: {target}")
    return found


def finish(app, exception) -> None:
    "The front page is the index; a site with a fault is no site."
    if exception or app.builder.name != "html":
        return
    front = Path(app.outdir, f"{app.config.root_doc}.html")
    shutil.copy(front, front.with_name("index.html"))
    machine = [f"{path}/" for path in (app.srcdir, Path.home()) if path != Path("/")]
    if found := faults(Path(app.outdir), machine):
        raise ExtensionError("\n".join(["The site has faults:", *found]))


def setup(app) -> dict:
    app.connect("config-inited", choose)
    app.connect("source-read", tidy)
    app.connect("autodoc-process-docstring", docstring)
    app.connect("build-finished", finish)
    app.add_directive("pictures", Pictures)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
