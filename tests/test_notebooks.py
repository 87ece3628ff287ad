"""The notebooks run as committed, within two minutes each, and their outputs are fit to commit."""

import base64
import importlib.util
import re
import time
from pathlib import Path

import nbformat
import pytest

pytestmark = pytest.mark.services
FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
EACH = pytest.mark.parametrize("path", NOTEBOOKS, ids=[path.stem for path in NOTEBOOKS])
#: What would say where and by whom a notebook was run.
PRIVATE = re.compile(r"/(home|root|tmp|work|usr|var|Users|mnt)/|127\.0\.0\.1:\d+|\bpid\b", re.I)

spec = importlib.util.spec_from_file_location("execute_notebooks", FOLDER / "execute.py")
execute = importlib.util.module_from_spec(spec)
spec.loader.exec_module(execute)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell):
    """Of each output: its type, its stream, and what it can be shown as."""
    return [(out.output_type, out.get("name"), sorted(out.get("data", {}))) for out in cell.outputs]


def texts(cell):
    for out in cell.get("outputs", ()):
        yield out.get("text", "")
        yield from (text for kind, text in out.get("data", {}).items() if kind.startswith("text/"))


def test_notebooks__there_are_five_and_the_readme_names_each():
    readme = (FOLDER / "README.md").read_text()
    assert len(NOTEBOOKS) == 5
    assert all(path.name in readme for path in NOTEBOOKS)


@EACH
def test_notebooks__run_within_their_limit_and_give_the_outputs_that_are_committed(path, tmp_path):
    start = time.monotonic()
    executed = execute.execute(path, tmp_path)
    assert time.monotonic() - start < execute.LIMIT
    committed = nbformat.read(path, as_version=4)
    assert [kinds(c) for c in code_cells(executed)] == [kinds(c) for c in code_cells(committed)]


@EACH
def test_notebooks__committed_outputs_are_small_and_say_nothing_of_the_machine(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert path.stat().st_size < 200_000
    for cell in notebook.cells:
        assert not PRIVATE.search("\n".join([cell.source, *texts(cell)]))
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for number, cell in enumerate(code_cells(notebook), 1):
        assert cell.execution_count == number
        assert "execution" not in cell.metadata
        for kind, stream, _ in kinds(cell):
            assert (kind, stream) != ("stream", "stderr")
            assert kind != "error"
        assert not any("Warning" in text for text in texts(cell))


@EACH
def test_notebooks__every_print_and_figure_has_its_output(path):
    for cell in code_cells(nbformat.read(path, as_version=4)):
        plotted = re.search(r"^(lk\.plots\.|plt\.show)", cell.source, re.M)
        if re.search(r"^print\(", cell.source, re.M) or plotted:
            assert cell.outputs, cell.source
        if plotted:
            shown = [out["data"] for out in cell.outputs if "data" in out]
            (image,) = [data["image/png"] for data in shown if "image/png" in data]
            assert base64.b64decode(image).startswith(b"\x89PNG")
