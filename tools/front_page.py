"""The front page: fills tables and findings of nbs/index.ipynb from the executed pages in reports/, and writes README.md from it.

    python tools/front_page.py
"""

import json
import os
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
INDEX, README = ROOT / "nbs/index.ipynb", ROOT / "README.md"
SHOWN = {  # the id of a cell: the page whose output it is, and how that begins
    "expected": ("paper_first_run", "| students of five seeds"),
    "guide": ("paper_datafree", "| you have"),
    "claims": ("paper_claims", "| | claim | paper | ours, by setting"),
    "found-a": ("paper_claims", "* **Paper A,"),
    "found-b": ("paper_claims", "* **Paper B,"),
}


def moved(text: str, old: str, new: str) -> str:
    "Markdown whose relative links were written in the folder `old`, for one in `new`."
    to = lambda link: os.path.relpath(os.path.join(old, link), new)
    return re.sub(r"\]\((?!https?:|#)([^)]+)\)", lambda m: f"]({to(m[1])})", text)


def part_of(page: str, beginning: str) -> str:
    "A table that an executed page shows, or all its paragraphs that begin so."
    cells = json.loads((ROOT / f"reports/{page}.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    texts = ["".join(output.get("data", {}).get("text/markdown", "")) for output in outputs]
    parts = (part.strip() for text in texts for part in text.split("\n\n"))
    found = dict.fromkeys(part for part in parts if part.startswith(beginning))
    if not found:
        raise ValueError(f"{page} shows nothing that begins with {beginning!r}")
    return moved("\n\n".join(found), "reports", "nbs")


def filled() -> dict:
    "The notebook of the front page, its tables and findings those of the pages."
    notebook = json.loads(INDEX.read_text())
    if missing := SHOWN.keys() - {cell["id"] for cell in notebook["cells"]}:
        raise ValueError(f"{INDEX.name} has no cell {', '.join(sorted(missing))}")
    for cell in notebook["cells"]:
        if cell["id"] in SHOWN:
            cell["source"] = part_of(*SHOWN[cell["id"]]).splitlines(keepends=True)
    return notebook


def readme(notebook: dict) -> str:
    "The text of README.md."
    texts = [("".join(cell["source"]), cell["cell_type"]) for cell in notebook["cells"]]
    shown = [moved(t, "nbs", ".") if kind == "markdown" else f"```python\n{t}\n```" for t, kind in texts]
    return "\n\n".join(shown).strip() + "\n"


if __name__ == "__main__":
    notebook = filled()
    INDEX.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    README.write_text(readme(notebook))
