"""README.md from nbs/index.ipynb: what the project's first page says is written, and run, in one place.

Cells marked `#| hide` are left out, code stands in `python` fences (or `sh`, where a cell is shell), printed results
follow as text, and pictures are left to the notebook.
"""
import re
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
DIRECTIVE = re.compile(r"^#\| *(\S+).*\n?", re.M)


def read_text(output) -> str:
    "What a cell printed or returned, as text; nothing for pictures."
    if output.output_type == "stream":
        return output.text if output.name == "stdout" else ""
    data = output.get("data", {})
    return "" if "image/png" in data or "image/svg+xml" in data else data.get("text/plain", "")


def read_cell(cell) -> str:
    "One cell as Markdown."
    directives = DIRECTIVE.findall(cell.source)
    if cell.cell_type == "raw" or "hide" in directives or "default_exp" in directives:
        return ""
    source = DIRECTIVE.sub("", cell.source).strip()
    if cell.cell_type == "markdown":
        return source
    shell = source.startswith(("!", "%%sh", "%%bash"))
    code = re.sub(r"^(!|%%\w+\n)", "", source, flags=re.M) if shell else source
    printed = "".join(read_text(output) for output in cell.outputs).rstrip()
    return f"```{'sh' if shell else 'python'}\n{code}\n```" + (f"\n\n```text\n{printed}\n```" if printed else "")


def make_readme(notebook: Path = ROOT / "nbs" / "index.ipynb") -> str:
    "The whole README."
    cells = nbformat.read(notebook, as_version=4).cells
    note = "<!-- Made from nbs/index.ipynb by tests/make_readme.py: edit the notebook. -->"
    return "\n\n".join([note, *filter(None, map(read_cell, cells))]) + "\n"


if __name__ == "__main__":
    (ROOT / "README.md").write_text(make_readme(), encoding="utf-8")
