"""What is imported when, and in which direction."""

import ast
import functools
import graphlib
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
SERVICES = ("lkarray.cluster", "lkarray.workflow")
#: What only users and the command line call.
FRONT = tuple(
    f"lkarray.{name}"
    for name in ("accessor", "cli", "devinterp", "embedding", "inspect", "planning", "saving")
)
_NOT_IN_ANALYSIS = (
    "torch",
    *TORCH_HALF,
    *SERVICES,
    "lkarray.store",
    "lkarray.plots",
    "lkarray.analysis.hierarchy",
)
#: What modules of a package do not import, however late.
FORBIDDEN = {
    "store": ("torch", *TORCH_HALF, *ANALYSIS, *SERVICES, "lkarray.engine"),
    "engine": ("torch", *TORCH_HALF, *ANALYSIS, *SERVICES, "lkarray.store"),
    "kernels": ("torch", *TORCH_HALF, *ANALYSIS[1:], *SERVICES, "lkarray.store"),
    "analysis.losses": (*_NOT_IN_ANALYSIS, "lkarray.analysis.gradients", "lkarray.analysis.audits"),
    "analysis.gradients": (*_NOT_IN_ANALYSIS, "lkarray.analysis.losses", "lkarray.analysis.audits"),
    "analysis.audits": (*_NOT_IN_ANALYSIS, "lkarray.analysis.losses"),
    "analysis.hierarchy": ("torch", *TORCH_HALF, *SERVICES, "lkarray.plots"),
    "plots": ("torch", *TORCH_HALF, *SERVICES, "lkarray.store"),
    "cluster": ("torch", *TORCH_HALF, "lkarray.plots", "lkarray.workflow"),
    "workflow": ("torch", *TORCH_HALF, *ANALYSIS, "lkarray.engine", "lkarray.cluster"),
    "nn": (
        *TORCH_HALF[1:],
        "dask",
        "xarray",
        "zarr",
        *ANALYSIS,
        *SERVICES,
        "lkarray.store",
        "lkarray.engine",
    ),
    "sampling": ("dask", "lkarray.engine", *ANALYSIS, *TORCH_HALF[2:], "lkarray.workflow"),
    "training": ("lkarray.sampling", *TORCH_HALF[3:], *ANALYSIS, *SERVICES),
    "auditing": ("lkarray.attribution", "lkarray.plots", "lkarray.workflow"),
    "attribution": ("lkarray.plots", *SERVICES),
}
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


def imported(tree: ast.Module) -> list[tuple[str, str]]:
    """Modules that a file imports, wherever in it, each with a name taken from it or none."""
    names = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [(str(node.module), alias.name) for alias in node.names]
    return names


@functools.cache
def modules() -> dict[str, ast.Module]:
    """The package's modules by name; packages, by theirs, are their ``__init__``."""
    paths = {p: p.relative_to(ROOT.parent).with_suffix("").parts for p in ROOT.rglob("*.py")}
    return {
        ".".join(parts).removesuffix(".__init__"): ast.parse(path.read_text())
        for path, parts in paths.items()
    }


@functools.cache
def defining(module: str, name: str) -> str:
    """The module that a name is from which is imported from a module or package."""
    if name and f"{module}.{name}" in modules():
        return f"{module}.{name}"
    if module in packages():
        for source, taken in imported(modules()[module]):
            if taken == name:
                return defining(source, name)
    return module


@functools.cache
def packages() -> set[str]:
    """The names that are packages: their ``__init__`` only hands on what modules define."""
    return {name for name in modules() if any(m.startswith(f"{name}.") for m in modules())}


@functools.cache
def imports_of(module: str) -> set[str]:
    """Modules that a module imports: late ones and those for types too, and through packages.

    ``from lkarray import store`` counts as an import of the modules whose names are then taken.
    """
    tree, direct = modules()[module], set()
    packed = {}  # packages, by what they are called in the module
    for source, name in imported(tree):
        origin = defining(source, name)
        if origin in packages():
            packed[name or source] = origin
        direct.add(origin)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            package = packed.get(node.value.id)
            if package is not None:
                direct.add(defining(package, node.attr))
    return direct


def test_imports__make_no_circle():
    """Late imports and those for types count: each module can be read after those it uses."""
    graph = {
        module: (imports_of(module) & set(modules())) - packages()
        for module in set(modules()) - packages()
    }
    graphlib.TopologicalSorter(graph).prepare()  # raises CycleError, which names the modules


@pytest.mark.parametrize("package", FORBIDDEN)
def test_direction__of_imports(package):
    for module in modules():
        if not module.startswith(f"lkarray.{package}."):
            continue
        if module.endswith((".lowprecision", ".devices", ".device_tiles")):
            continue  # load torch within functions, once low precision or a device was asked for
        wrong = {m for m in imports_of(module) if m.startswith((*FORBIDDEN[package], *FRONT))}
        if package == "cluster":  # checks a cluster by what a user calls there
            wrong -= {"lkarray.saving"}
        assert not wrong, f"{module} imports {wrong}"


def test_direction__is_told_of_each_package():
    assert packages() - {"lkarray", "lkarray.analysis"} == {f"lkarray.{name}" for name in FORBIDDEN}


def test_modules__stay_short_enough_to_read():
    long = {p.name: n for p in ROOT.rglob("*.py") if (n := len(p.read_text().splitlines())) > 400}
    assert not long


def test_packages__are_all_installed():
    """Every folder of modules is named in pyproject.toml: an installed lkarray has them all."""
    project = tomllib.loads((ROOT.parent / "pyproject.toml").read_text())
    named = set(project["tool"]["setuptools"]["packages"])
    folders = {".".join(p.parent.relative_to(ROOT.parent).parts) for p in ROOT.rglob("__init__.py")}
    studies = {f"lkarray_workflows{inner}" for inner in ("", ".shared", ".studies")}
    assert named == folders | studies


def test_public_names__are_all_there_and_documented():
    for name in lkarray.__all__:
        value = getattr(lkarray, name)
        assert value is not None
        if callable(value):
            assert value.__doc__, name
    assert set(lkarray.__all__) <= set(dir(lkarray))
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        lkarray.nothing  # noqa: B018


def test_test_files__have_names_of_their_own():
    """pytest imports them by base name: of two alike the second cannot be collected."""
    names = [path.name for path in (ROOT.parent / "tests").rglob("test_*.py")]
    assert sorted(set(names)) == sorted(names)
