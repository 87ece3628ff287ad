"""What is imported when, and in which direction."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lkarray

ROOT = Path(lkarray.__file__).parent
HEAVY = ("torch", "torchvision", "distributed", "sklearn", "matplotlib", "umap", "nltk", "pydantic")


def test_import__loads_nothing_heavy():
    code = "import sys, lkarray; print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, *HEAVY], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_import__loads_little_beyond_its_libraries():
    """What takes long to import is imported on first use (benchmarks/import_time.py has times)."""
    code = (
        "import xarray, zarr, dask.array, sys; before = set(sys.modules); import lkarray;"
        "print(*{name.split('.')[0] for name in set(sys.modules) - before})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    late = {
        "torch",
        "distributed",
        "matplotlib",
        "sklearn",
        "umap",
        "nltk",
        "arviz_stats",
        "obstore",
    }
    assert not late & set(done.stdout.split())


def test_kernels__compute_without_torch(store):
    """A worker that only analyses needs no torch: with torch hidden, everything still runs."""
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "import lkarray as lk\n"
        "losses = lk.open(sys.argv[1])['losses']\n"
        "lk.correlation(losses).compute(); lk.neighbors(losses, 3, exclude='label').compute()\n"
        "lk.loss_gain(losses).compute(); assert lk.verify(sys.argv[1]) == []"
    )
    subprocess.run([sys.executable, "-c", code, str(store)], check=True)


def imports_of(path: Path) -> set[str]:
    """Modules that a file imports, wherever in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize(
    ("folder", "forbidden"),
    [
        ("store", ("torch", "lkarray.nn", "lkarray.sampling", "lkarray.engine", "lkarray.kernels")),
        ("engine", ("torch", "lkarray.nn", "lkarray.sampling", "lkarray.kernels", "lkarray.store")),
        ("kernels", ("torch", "lkarray.nn", "lkarray.sampling", "lkarray.store")),
        ("plots", ("torch", "lkarray.nn", "lkarray.sampling", "lkarray.store")),
        ("nn", ("dask", "xarray", "zarr", "lkarray.store", "lkarray.engine", "lkarray.sampling")),
        ("sampling", ("dask", "lkarray.engine", "lkarray.kernels")),
    ],
)
def test_direction__of_imports(folder, forbidden):
    for path in (ROOT / folder).glob("*.py"):
        if path.name == "lowprecision.py":
            continue  # loads torch within functions, only once low precision was asked for
        wrong = {m for m in imports_of(path) if m.startswith(forbidden)}
        assert not wrong, f"{path.name} imports {wrong}"


def test_modules__stay_short_enough_to_read():
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 420}
    assert not long


def test_packages__are_all_installed():
    """Every folder of modules is named in pyproject.toml: an installed lkarray has them all."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    named = set(project["tool"]["setuptools"]["packages"])
    found = {".".join(p.parent.relative_to(ROOT.parent).parts) for p in ROOT.rglob("__init__.py")}
    assert named == found | {"lkarray_workflows"}


def test_public_names__are_all_there_and_documented():
    for name in lkarray.__all__:
        value = getattr(lkarray, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
    assert set(lkarray.__all__) <= set(dir(lkarray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lkarray.nothing  # noqa: B018
