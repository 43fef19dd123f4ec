"""The packaging layout: kernels/ and dist/ beside purelm/, importable only as purelm.kernels and purelm.dist.

Oracle: what pip and Python's own import system say about a wheel built from a copy of the project to which one
probe module was added in each folder; of the extras, pyproject.toml.
"""

import ast
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PROBE = "def answer():\n    return 42\n"


def names_of(requirements):
    return {re.split(r"[<>=!~ ]", requirement)[0] for requirement in requirements}


EXTRAS = {extra: names_of(packages) for extra, packages in PROJECT["project"]["optional-dependencies"].items()}


def run(*args, cwd, **kw):
    done = subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, **kw)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """A copy of the tracked files with a probe in kernels/ and in dist/."""
    copy = tmp_path_factory.mktemp("layout") / "project"
    ignore = shutil.ignore_patterns(
        ".git", ".venv*", "runs", "artifacts", "*.egg-info", "__pycache__", ".*_cache", ".hypothesis"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignore)
    for folder in ("kernels", "dist"):
        (copy / folder / "probe.py").write_text(PROBE)
    return copy


def test_links_are_relative_and_no_init_shadows():
    for name in ("kernels", "dist"):
        link = ROOT / "purelm" / name
        assert link.is_symlink() and str(link.readlink()) == f"../{name}"
        assert not (ROOT / name / "__init__.py").exists()


def test_gitignore_does_not_hide_source():
    lines = [line.strip() for line in (ROOT / ".gitignore").read_text().splitlines() if not line.startswith("#")]
    assert not {"dist", "dist/", "/dist/", "/dist", "build", "build/"} & {*lines}


def test_import_from_the_checkout(project):
    out = run(
        sys.executable,
        "-c",
        "import purelm.kernels.probe as k, purelm.dist.probe as d; print(k.answer() + d.answer())",
        cwd=project,
    )
    assert out.strip() == "84"


def test_wheel_maps_both_folders(project, tmp_path):
    run(
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        tmp_path,
        ".",
        cwd=project,
    )
    (wheel,) = tmp_path.glob("purelm-*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    expected = {"purelm/kernels/probe.py", "purelm/dist/probe.py", "purelm/py.typed", "purelm/tree/__init__.py"}
    assert expected <= set(names)
    assert {n.split("/")[0] for n in names if not n.startswith("purelm-")} == {"purelm"}
    # Every module of the checkout is in the wheel: `packages` is listed by hand and could fall behind.
    here = {str(p.relative_to(project)) for p in (project / "purelm").rglob("*.py")}
    assert here <= set(names)
    # Its extras are the library's: what programs and developers need is in no wheel.
    metadata = zipfile.ZipFile(wheel).read(next(n for n in names if n.endswith("/METADATA"))).decode()
    assert {*re.findall(r"^Provides-Extra: (.*)$", metadata, re.MULTILINE)} == {*EXTRAS}
    assert not {"run", "dev"} & {*EXTRAS} and {*PROJECT["dependency-groups"]} == {"run", "dev"}
    assert "tyro" not in metadata.split("\n\n")[0] and "pytest" not in metadata.split("\n\n")[0]
    # Installed by unpacking, it imports without the checkout, and nothing is importable under a bare name.
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import importlib.util as u, sys; sys.path.insert(0, sys.argv[1]);"
        "import purelm, purelm.kernels.probe as k, purelm.dist.probe as d;"
        "assert purelm.__file__.startswith(sys.argv[1]), purelm.__file__;"
        "assert u.find_spec('kernels') is None; print(k.answer() + d.answer())"
    )
    assert run(sys.executable, "-c", code, site, cwd=tmp_path).strip() == "84"


def test_ruff_lints_dist_and_bans_bare_imports(project):
    (project / "purelm" / "bad.py").write_text("import kernels.probe\n")
    (project / "dist" / "bad.py").write_text("import os\n")
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "."], cwd=project, capture_output=True, text=True)
    (project / "purelm" / "bad.py").unlink()
    (project / "dist" / "bad.py").unlink()
    assert "TID251" in done.stdout and "dist/bad.py" in done.stdout, done.stdout


def test_pytest_finds_the_tests_of_dist(request):
    """Its default is to walk past any folder of that name."""
    assert not {"dist", "build"} & {*request.config.getini("norecursedirs")}


def library_sources():
    """Text of each file of the wheel, by name."""
    folders = (ROOT / "purelm", ROOT / "kernels", ROOT / "dist")
    return {str(p.relative_to(ROOT)): p.read_text() for folder in folders for p in folder.rglob("*.py")}


def test_errors_name_extras_that_bring_the_package():
    """Oracle: pyproject.toml. What follows "needs" in such a message is the package."""
    found = set()
    for name, text in library_sources().items():
        messages = re.findall(r"needs (\w+)[^\n]*pip install 'purelm\[(\w+)\]'", text)
        assert len(messages) == len(re.findall(r"pip install ['\"]purelm", text)), f"{name}: not of that form"
        found |= {*messages}
    assert {package for package, _ in found} >= {"numba", "zstandard", "datasets", "matplotlib"}
    for package, extra in found:
        assert package in EXTRAS[extra], f"[{extra}] brings {EXTRAS.get(extra)}, not {package}"


def test_what_the_library_imports_is_in_an_extra():
    """Oracle: the syntax trees of its sources."""
    brought = names_of(PROJECT["project"]["dependencies"]).union(*EXTRAS.values())
    sinks = {"wandb"}  # services' own libraries: whoever asks for the sink has them
    for name, text in library_sources().items():
        nodes = list(ast.walk(ast.parse(text)))
        names = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        others = {x.split(".")[0] for x in names} - {*sys.stdlib_module_names, "purelm"}
        assert others <= brought | sinks, f"{name} imports {others - brought - sinks}"
