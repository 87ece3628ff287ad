"""A report folder: ``index.html``, figures, ``metrics.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lkarray._version import __version__
from lkarray.store.files import make_folder, replacing, write_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure as MplFigure


@dataclass(frozen=True)
class Figure:
    """A figure with its file name (without suffix), title and caption."""

    name: str
    title: str
    caption: str
    figure: MplFigure


@dataclass(frozen=True)
class Report:
    """What a report says.

    Attributes
    ----------
    title, summary
        Heading, and paragraphs under it.
    metrics
        Numbers for ``metrics.json``, nested at will; ``rows`` stand beside them.
    rows
        Rows of the table at the top: what, measured, and what to compare it with.
    settings
        The study's settings.
    next_steps
        Lines of code to try.
    """

    title: str
    summary: Sequence[str]
    metrics: Mapping[str, Any]
    rows: Sequence[tuple[str, str, str]]
    figures: Sequence[Figure]
    settings: Mapping[str, Any]
    next_steps: str


def write_report(report: Report, folder: Path) -> None:
    """Write the report to ``folder``, each file in one move; ``index.html`` comes last."""
    from jinja2 import Environment

    make_folder(folder)
    for figure in report.figures:
        with replacing(folder / f"{figure.name}.png") as new:
            figure.figure.savefig(new, dpi=130)
    rows = [dict(zip(("what", "measured", "compare"), row, strict=True)) for row in report.rows]
    text = json.dumps({**report.metrics, "rows": rows}, indent=2, allow_nan=False)
    write_text(folder / "metrics.json", text + "\n")
    template = files("lkarray.workflow").joinpath("report.html").read_text()
    page = Environment(autoescape=True).from_string(template)
    write_text(folder / "index.html", page.render(report=report, version=__version__))
