"""Running a study: its folder, its lock, its stages, and what of them is reused."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, Self

from lkarray._version import __version__
from lkarray.errors import LockedError, SettingsError, StoreError
from lkarray.store import file_lock, refuse_changes
from lkarray.store.files import write_text
from lkarray.workflow.config import Config

logger = logging.getLogger("lkarray")

_GROUP = "lkarray.workflows"
_RECORD = "run.json"
#: What a record holds, and of which kind.
_FORM = {"workflow": str, "lkarray": str, "config": dict, "stages": dict}


class Workflow(Protocol):
    """What a study's module offers."""

    Config: type[Config]

    def run(self, config: Any, folder: Path, *, progress: bool) -> str:
        """Run or resume the study; return what to tell the user at the end."""


def workflow_names() -> list[str]:
    """Return the names of the installed studies."""
    return sorted(entry.name for entry in importlib.metadata.entry_points(group=_GROUP))


def find_workflow(name: str) -> Workflow:
    """Return the module of an installed study.

    Raises
    ------
    SettingsError
        No study has that name; the message lists those there are.
    """
    return find_entry(name).load()


def find_entry(name: str) -> importlib.metadata.EntryPoint:
    """Return where an installed study is, importing nothing of it; raise as `find_workflow`."""
    for entry in importlib.metadata.entry_points(group=_GROUP):
        if entry.name == name:
            return entry
    raise SettingsError(f"there is no workflow {name!r}; there are {workflow_names()}")


@contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of a run's folder, made if missing; raise as `Run` does."""
    with ExitStack() as stack:
        try:
            stack.enter_context(file_lock(folder))
        except (FileExistsError, NotADirectoryError):
            raise StoreError(f"{folder} is a file; choose another --out") from None
        except OSError as error:
            if isinstance(error, StoreError):
                raise
            raise StoreError(f"cannot write to {folder}: {error.strerror}") from error
        yield


def read_record(folder: Path) -> dict[str, Any]:
    """Return the record of the run in a folder; empty where there is none that can be read."""
    try:
        return _parsed((folder / _RECORD).read_text(encoding="utf8"))
    except (OSError, ValueError):
        return {}


def _parsed(text: str) -> dict[str, Any]:
    """Return a record from its JSON; raise ``ValueError`` unless it is of the form written here."""
    try:
        record = json.loads(text)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(record, dict):
        raise ValueError("it is no object")
    for key, kind in _FORM.items():
        if not isinstance(record.get(key), kind):
            raise ValueError(f"{key!r} is missing, or no {kind.__name__}")
    for name, entry in record["stages"].items():
        outputs = entry.get("outputs") if isinstance(entry, dict) else None
        if not isinstance(outputs, list) or not all(isinstance(path, str) for path in outputs):
            raise ValueError(f"stage {name!r} has no list of outputs")
        if not isinstance(entry.get("seconds"), int | float):
            raise ValueError(f"stage {name!r} has no seconds")
    inputs = record.get("inputs", {})
    if not isinstance(inputs, dict) or not set(inputs) <= set(record["config"]):
        raise ValueError("'inputs' are not among the settings")
    return record


def is_complete(folder: Path) -> bool:
    """Say whether the run in a folder came to its end and its files are still there."""
    record = read_record(folder)
    stages = record.get("stages", {})
    outputs = [out for entry in stages.values() for out in entry.get("outputs", ())]
    return "finished" in record and all((folder / out).exists() for out in outputs)


def finish(folder: Path, facts: Mapping[str, Any]) -> None:
    """Record that the whole study in a folder is done, and what it was made from."""
    if not (folder / _RECORD).exists():
        return  # a study that records nothing is never taken for complete
    before = read_record(folder)
    if {"finished": "", **before, **facts} == before:
        return  # nothing to write, on a read-only disk perhaps
    with run_lock(folder):
        before = read_record(folder)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        after = {"finished": now, **before, **facts}
        if after != before:
            _write(folder, after)


def _write(folder: Path, record: Mapping[str, Any]) -> None:
    write_text(folder / _RECORD, json.dumps(record, indent=2))


@dataclass
class Run:
    """One run of a study in a folder: locked, recorded, continued where it stopped.

    A stage counts when the run's record says so, which is written after the stage's files,
    in one move; a kill in between repeats the stage. A stage that runs again makes all
    later ones run again. The run is complete when the record says ``finished``: `finish`.

    Parameters
    ----------
    name, config
        The study and its settings.
    folder
        Where its files go; made if missing.

    Raises
    ------
    FingerprintError
        On entering: the folder holds a run with other settings, which are named.
    LockedError
        On entering: another process is running in the folder.
    StoreError
        On entering: the folder cannot be made.
    """

    name: str
    config: Config
    folder: Path
    reused: list[str] = field(default_factory=list)

    def __enter__(self) -> Self:
        self._stack = ExitStack()
        try:
            self._stack.enter_context(run_lock(self.folder))
        except LockedError:
            raise
        except StoreError:
            if not is_complete(self.folder):
                raise  # else nothing is to be written: on a read-only disk, it opens as it is
        try:
            self._record = self._load()
        except BaseException:
            self._stack.close()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        self._stack.close()

    def stage(self, name: str, work: Callable[[], object], outputs: Sequence[Path]) -> bool:
        """Do ``work`` unless it is recorded and its ``outputs`` are there; say whether it ran."""
        stages: dict[str, Any] = self._record["stages"]
        if name in stages and all(path.exists() for path in outputs):
            logger.info("%s: %s is done, reused", self.name, name)
            self.reused.append(name)
            return False
        for later in list(stages)[list(stages).index(name) if name in stages else len(stages) :]:
            del stages[later]
        self._record.pop("finished", None)
        self._save()  # from here on until it is finished, the stage counts as not done
        logger.info("%s: %s", self.name, name)
        began = time.perf_counter()
        work()
        missing = [path.name for path in outputs if not path.exists()]
        assert not missing, f"stage {name} left out {missing}"
        stages[name] = {
            "seconds": round(time.perf_counter() - began, 3),
            "ended": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "outputs": [os.path.relpath(path, self.folder) for path in outputs],
        }
        self._save()
        return True

    def seconds(self) -> dict[str, float]:
        """Return how long each finished stage took when it ran."""
        return {name: entry["seconds"] for name, entry in self._record["stages"].items()}

    def _load(self) -> dict[str, Any]:
        path = self.folder / _RECORD
        now: dict[str, Any] = {
            "workflow": self.name,
            "lkarray": __version__,
            "config": self.config.model_dump(mode="json"),
        }
        if not path.exists():
            _refuse_others(self.folder)
            return {**now, "stages": {}}
        try:
            record = _parsed(path.read_text(encoding="utf8"))
            before = {**record["config"], **{k: record[k] for k in ("workflow", "lkarray")}}
        except (OSError, ValueError) as error:
            raise StoreError(
                f"{path} cannot be read ({error}); nothing was touched. Restore it from a copy, or "
                "choose another --out"
            ) from None
        after = {**now["config"], **{k: now[k] for k in ("workflow", "lkarray")}}
        remedy = "choose another --out, or the same settings"
        refuse_changes(before, after, str(self.folder), remedy=remedy)
        return record

    def _save(self) -> None:
        _write(self.folder, self._record)


def _refuse_others(folder: Path) -> None:
    """Raise if a folder without a record holds what a run would write over."""
    others = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if others:
        raise StoreError(
            f"{folder} holds {others[:3]} and no run of a study; nothing was touched. Choose an "
            "empty or a new --out"
        )
