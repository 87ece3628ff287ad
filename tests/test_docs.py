"""The guide runs, the reference is what docstrings say, the arithmetic and the links hold."""

import importlib.util
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import lkarray as lk

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
GUIDE = (DOCS / "guide.md").read_text()
SCALING = (DOCS / "scaling.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)


def load(path):
    """A script of the repository, as a module."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load(ROOT / "benchmarks" / "costs.py")


@pytest.fixture
def growth(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return load(ROOT / "benchmarks" / "growth.py")


@pytest.fixture
def one_thread():
    """Small products do not gain from threads, and wait for them where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def marked(text, name):
    """What stands between two marks of a page."""
    return text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- /{name} -->")[0]


@pytest.mark.minutes
def test_guide__its_blocks_run_in_order(tmp_path, monkeypatch, one_thread, capsys):
    monkeypatch.chdir(tmp_path)
    names = {}
    for number, block in enumerate(BLOCKS):
        exec(compile(block, f"guide.md, block {number}", "exec"), names)
    assert names["losses"]["loss"].sizes == {"chain": 4, "draw": 250, "sample": 597}
    assert set(names["near"]["neighbor"].dims) == {"sample", "rank"}
    assert names["audit"].attrs["lc"] > 0.999
    assert float(names["saved"].sel(sample=3, sample_2=17)) == pytest.approx(
        float(names["R"].sel(sample=3, sample_2=17)), abs=1e-6
    )
    said = capsys.readouterr().out
    assert "KiB can" in said
    assert float(names["d"]["kernel_ess"]) > 100


def test_guide__names_only_what_there_is():
    named = set(re.findall(r"\blk\.(\w+)", GUIDE))
    assert named <= set(lk.__all__)
    errors = re.findall(r"`(\w+Error)`", GUIDE.split("## Errors")[1])
    plain = {"ValueError", "TypeError"}
    assert all(hasattr(lk.errors, name) for name in set(errors) - plain)


def test_api__is_what_the_docstrings_say():
    script = load(ROOT / "scripts" / "make_api_docs.py")
    assert script.page() == (DOCS / "api.md").read_text(), "run scripts/make_api_docs.py"


def test_api__has_every_public_name_once():
    script = load(ROOT / "scripts" / "make_api_docs.py")
    listed = [name for names in script.GROUPS.values() for name in names if "." not in name]
    assert sorted(listed) == sorted(lk.__all__)
    page = (DOCS / "api.md").read_text()
    anchors = re.findall(r'<a id="([^"]+)"', page)
    assert len(anchors) == len(set(anchors))
    assert set(re.findall(r"\]\(#([^)]+)\)", page)) <= set(anchors)


def test_api__the_check_tells_a_stale_page(tmp_path, monkeypatch, capsys):
    script = load(ROOT / "scripts" / "make_api_docs.py")
    monkeypatch.setattr(script, "PAGE", tmp_path / "api.md")
    monkeypatch.setattr(sys, "argv", ["make_api_docs.py", "--check"])
    with pytest.raises(SystemExit, match="run: python"):
        script.main()
    monkeypatch.setattr(sys, "argv", ["make_api_docs.py"])
    script.main()
    monkeypatch.setattr(sys, "argv", ["make_api_docs.py", "--check"])
    script.main()


@pytest.mark.parametrize("name", [n for n in lk.__all__ if callable(getattr(lk, n))])
def test_docstring__says_what_is_taken_and_returned(name):
    value = getattr(lk, name)
    doc = inspect.getdoc(value)
    taken = inspect.signature(value)
    sections = re.findall(r"^(\w+)\n-{3,}$", doc, flags=re.MULTILINE)
    if taken.parameters:
        assert "Parameters" in sections
        body = re.split(r"\n\n\w+\n-{3,}\n", doc.split("Parameters\n----------\n")[1])[0]
        told = {
            word
            for line in body.splitlines()
            if line and not line[0].isspace()
            for word in line.split(" : ")[0].replace("*", "").split(", ")
        }
        assert told == set(taken.parameters)
    if not inspect.isclass(value) and taken.return_annotation not in (None, "None"):
        assert "Returns" in sections


@pytest.mark.skipif(
    not hasattr(os, "sched_getaffinity") or len(os.sched_getaffinity(0)) < 2,
    reason="plans are for two tasks at once",
)
def test_scaling__plans_are_what_the_planner_says():
    code = (
        "import sys; sys.path.insert(0, 'benchmarks'); import costs; costs.two_tasks()\n"
        "print(costs.markdown(costs.PLAN_HEAD, costs.plan_rows()))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == marked(SCALING, "plans")


def test_scaling__costs_are_what_the_code_says(costs):
    table = costs.markdown(costs.COST_HEAD, costs.storage_and_sampling())
    assert table == marked(SCALING, "costs")


def test_scaling__hours_follow_from_the_rate_that_is_given(costs):
    text = marked(SCALING, "hours")
    rate, low = map(int, re.search(r"at (\d+) GFLOP/s.*, at (\d+) in", text).groups())
    assert text == costs.hours_text(rate, low)


def test_growth__figure_and_table_are_drawn_again_without_measuring(growth, tmp_path):
    rows = {
        str(n): {way: {"seconds": n**2 / 1e7, "mib": 200.0} for way in growth.WAYS}
        for n in (5_000, 10_000, 20_000)
    }
    measured = {"draws": 7_500, "memory": "256 MiB", "rows": rows}
    growth.draw(measured, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text("a\n<!-- growth -->\nold\n<!-- /growth -->\nb\n")
    growth.fill(page, growth=growth.growth_text(measured, "growth.png"))
    assert "n^2.00, last step n^2.00" in page.read_text()
    assert page.read_text().startswith("a\n<!-- growth -->\n![")
    assert page.read_text().endswith("<!-- /growth -->\nb\n")
    assert "old" not in page.read_text()


PAGES = [ROOT / "README.md", *sorted(DOCS.rglob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs__relative_links_resolve(page):
    text = re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)
    missing = []
    for link, anchor in re.findall(r"\]\(([^)#:\s]*)(?:#([^)\s]*))?\)", text):
        target = page.parent / link if link else page
        if not target.exists():
            missing.append(link)
        elif anchor and target.suffix == ".md" and anchor not in anchors(target):
            missing.append(f"{link}#{anchor}")
    assert not missing


def anchors(page):
    """The anchors of a page: those it names, and GitHub's of its headings."""
    text = page.read_text()
    titles = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    plain = [re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles]
    return {*re.findall(r'<a id="([^"]+)"', text), *plain}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_docs__name_no_path_of_a_machine(page):
    assert not re.search(r"(?<![\w.])/(?:home|work|root|tmp)/", page.read_text())
