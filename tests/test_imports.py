"""What is imported when, and in which direction."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import lkarray

ROOT = Path(lkarray.__file__).parent
#: Packages that load torch, each after those that it may use.
TORCH_HALF = tuple(
    f"lkarray.{name}" for name in ("nn", "sampling", "training", "auditing", "attribution")
)
ANALYSIS = ("lkarray.kernels", "lkarray.analysis", "lkarray.plots")
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
        ("store", ("torch", *TORCH_HALF, "lkarray.engine", *ANALYSIS)),
        ("engine", ("torch", *TORCH_HALF, *ANALYSIS, "lkarray.store")),
        ("kernels", ("torch", *TORCH_HALF, "lkarray.store", "lkarray.analysis", "lkarray.plots")),
        ("analysis/losses", ("torch", *TORCH_HALF, "lkarray.store", "lkarray.plots")),
        ("analysis/gradients", ("torch", *TORCH_HALF, "lkarray.store", "lkarray.plots")),
        ("analysis/audits", ("torch", *TORCH_HALF, "lkarray.store", "lkarray.plots")),
        ("analysis/hierarchy", ("torch", *TORCH_HALF, "lkarray.plots")),
        ("plots", ("torch", *TORCH_HALF, "lkarray.store")),
        ("nn", ("dask", "xarray", "zarr", "lkarray.store", "lkarray.engine", *TORCH_HALF[1:])),
        ("sampling", ("dask", "lkarray.engine", *ANALYSIS, *TORCH_HALF[2:])),
        ("training", ("lkarray.sampling", "lkarray.auditing", "lkarray.attribution")),
        ("auditing", ("lkarray.attribution", "lkarray.plots")),
        ("attribution", ("lkarray.plots",)),
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
    studies = {f"lkarray_workflows{part}" for part in ("", ".shared", ".studies")}
    assert named == found | studies


def test_public_names__are_all_there_and_documented():
    for name in lkarray.__all__:
        value = getattr(lkarray, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
    assert set(lkarray.__all__) <= set(dir(lkarray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lkarray.nothing  # noqa: B018
