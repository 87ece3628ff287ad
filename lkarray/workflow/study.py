"""What a study is given to work with: its settings, its folder, its stages, its report."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, Self, TypeVar

import numpy as np

from lkarray.store.files import replacing, write_text
from lkarray.workflow.config import Config
from lkarray.workflow.report import Figure, Report, write_report
from lkarray.workflow.running import Run

#: A study of some settings is one of more general settings too.
C_co = TypeVar("C_co", bound=Config, covariant=True)


def save_arrays(path: Path, **arrays: Any) -> None:
    """Write arrays to an ``.npz`` file, in one move."""
    with replacing(path) as new:
        np.savez(new, **arrays)


@dataclass
class Study(Generic[C_co]):
    """A run of a study in a folder; what its stages are called with.

    Entering it takes the folder's lock and reads its record, as `Run` does. Every file that it
    writes replaces the old one in one move: a kill leaves either of them whole.

    Parameters
    ----------
    name, config
        The study and its settings.
    folder
        Where its files go; made if missing.
    show
        Whether to show progress.

    Raises
    ------
    FingerprintError, LockedError, StoreError
        On entering, as `Run`.
    """

    name: str
    config: C_co
    folder: Path
    show: bool = True
    _run: Run = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self._run = Run(self.name, self.config, self.folder)

    def __enter__(self) -> Self:
        self._run.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._run.__exit__(*exc)

    def within(self, name: str) -> Self:
        """Return the same study with its files in a folder of its folder, such as one a seed."""
        inner = replace(self, folder=self.folder / name)
        inner._run = self._run
        return inner

    @property
    def reused(self) -> list[str]:
        """Names of the stages that were done already."""
        return self._run.reused

    def path(self, name: str) -> Path:
        """Return where a file of the study is."""
        return self.folder / name

    @property
    def index(self) -> Path:
        """Page of the report, its last file."""
        return self.path("report/index.html")

    def stage(
        self, name: str, work: Callable[..., object], makes: str | Sequence[str], *given: Any
    ) -> bool:
        """Do a stage unless it is done: ``work(study, *given)``; say whether it ran.

        Parameters
        ----------
        name
            Of the stage, in the record.
        work
            What it does.
        makes
            Files and stores in the study's folder that it leaves, the last at its end.
        given
            What ``work`` needs beside the study.
        """
        names = [makes] if isinstance(makes, str) else makes
        outputs = [self.path(each) for each in names]
        return self._run.stage(name, lambda: work(self, *given), outputs)

    def writing(self, name: str) -> AbstractContextManager[Path]:
        """Yield a file to write, which takes the place of the study's file of that name."""
        return replacing(self._made(name))

    def save(self, name: str, **arrays: Any) -> None:
        """Write arrays to an ``.npz`` file of the study."""
        save_arrays(self._made(name), **arrays)

    def load(self, name: str) -> dict[str, np.ndarray]:
        """Return the arrays of an ``.npz`` file of the study."""
        with np.load(self.path(name)) as arrays:
            return dict(arrays)

    def write(self, name: str, numbers: Any, *, allow_nan: bool = False) -> None:
        """Write numbers, nested at will, to a file of JSON."""
        text = json.dumps(numbers, indent=2, allow_nan=allow_nan)
        write_text(self._made(name), text)

    def read(self, name: str) -> Any:
        """Return what a file of JSON holds."""
        return json.loads(self.path(name).read_text())

    def report(
        self,
        title: str,
        summary: str | Sequence[str],
        *,
        metrics: Mapping[str, Any],
        rows: Sequence[tuple[str, str, str]],
        figures: Sequence[Figure],
        next_steps: str,
    ) -> None:
        """Write the report folder; seconds of the stages and settings are added to what is given.

        Parameters are those of `Report`; ``summary`` may be one paragraph.
        """
        settings = self.config.model_dump(mode="json")
        report = Report(
            title=title,
            summary=[summary] if isinstance(summary, str) else summary,
            metrics={**metrics, "seconds": self._run.seconds(), "config": settings},
            rows=rows,
            figures=figures,
            settings=settings,
            next_steps=next_steps,
        )
        write_report(report, self.index.parent)

    def _made(self, name: str) -> Path:
        """Return where a file is to be, in a folder that exists."""
        path = self.path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
