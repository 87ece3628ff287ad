"""A report folder: ``index.html``, figures, ``metrics.json``."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lkarray._version import __version__

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
    """Write the report to ``folder``; ``index.html`` comes last."""
    from jinja2 import Environment

    folder.mkdir(parents=True, exist_ok=True)
    for figure in report.figures:
        figure.figure.savefig(folder / f"{figure.name}.png", dpi=130)
    rows = [dict(zip(("what", "measured", "compare"), row, strict=True)) for row in report.rows]
    text = json.dumps({**report.metrics, "rows": rows}, indent=2, allow_nan=False)
    (folder / "metrics.json").write_text(text + "\n")
    template = files("lkarray.workflow").joinpath("report.html").read_text()
    page = Environment(autoescape=True).from_string(template)
    (folder / "index.html").write_text(page.render(report=report, version=__version__))
