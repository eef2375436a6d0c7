"""Installing where nothing can be compiled: a pure wheel, an honest ``louver info``, and no silent change of a named backend."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Nothing but the installed copy may be found: neither an editable install of this tree nor PYTHONPATH.
ISOLATED = """
import sys
sys.meta_path[:] = [finder for finder in sys.meta_path if not type(finder).__name__.startswith("ScikitBuild")]
sys.path[:] = [{site!r}] + [entry for entry in sys.path if entry != {source!r}]
"""


def in_isolation(site: Path, code: str) -> str:
    script = ISOLATED.format(site=str(site), source=str(ROOT / "src")) + code
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, cwd=site)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The folder that `CC=/bin/false CXX=/bin/false pip install .` installed to."""
    site, source = (tmp_path_factory.mktemp(name) for name in ("site", "source"))
    for name in ("src", "csrc", "CMakeLists.txt", "pyproject.toml", "README.md", "LICENSE"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, source / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, source],
        env=os.environ | {"CC": "/bin/false", "CXX": "/bin/false"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return site


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure_and_complete(installed):
    files = {path.relative_to(installed).as_posix() for path in (installed / "louver").rglob("*") if path.is_file()}
    assert not [name for name in files if name.endswith(".so")]
    sources = {path.relative_to(ROOT / "src").as_posix() for path in (ROOT / "src/louver").rglob("*.py")}
    assert sources <= files
    assert {"louver/py.typed"} <= files


@pytest.mark.slow
def test_without_a_compiler_auto_is_the_reference_and_cpu_an_error(installed):
    code = """
import louver
from louver.errors import BackendError
from louver.kernels import resolve_backend
assert louver.__file__.startswith(sys.path[0]), louver.__file__
assert resolve_backend("auto") == "reference"
try:
    resolve_backend("cpu")
except BackendError as error:
    print(error)
"""
    assert "C++" in in_isolation(installed, code)


@pytest.mark.slow
def test_without_a_compiler_info_says_so_with_the_fix(installed):
    said = in_isolation(installed, "import sys; sys.argv = ['louver', 'info']\nfrom louver.cli import main\nmain()\n")
    assert "not built" in said
    assert "C++17" in " ".join(said.split())
