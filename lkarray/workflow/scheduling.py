"""Runs made by a clock: nothing where nothing changed, else a folder of its own.

A run depends on its settings, the study's source, lkarray's version, and the files and folders
that settings name. Twelve digits of the hash of these name its folder, in which it starts or
goes on; a link, ``latest``, names the folder of the last one that is complete.
"""

from __future__ import annotations

import ast
import errno
import hashlib
import importlib.util
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lkarray._version import __version__
from lkarray.errors import SettingsError
from lkarray.workflow.config import Config
from lkarray.workflow.ending import Ending
from lkarray.workflow.running import (
    Workflow,
    find_entry,
    find_workflow,
    finish,
    is_complete,
    read_record,
    run_lock,
)

logger = logging.getLogger("lkarray")


@dataclass(frozen=True)
class Request:
    """What was asked for: a study, a preset of it, and ``key=value`` on top."""

    workflow: str
    preset: str = "default"
    settings: tuple[str, ...] = ()

    def load(self) -> tuple[Workflow, Config]:
        """Import the study (torch takes seconds) and return it with its settings.

        Raises
        ------
        SettingsError
            There is no such study, preset or setting, or a value does not fit.
        """
        find_entry(self.workflow)
        logger.info("%s: loading (torch takes a few seconds)", self.workflow)
        study = find_workflow(self.workflow)
        return study, study.Config.build(self.preset, self.settings)

    def facts(self) -> dict[str, Any]:
        """Return what is known of the request without importing the study."""
        return {
            "workflow": self.workflow,
            "lkarray": __version__,
            "source": source_hash(find_entry(self.workflow).module),
            "request": [self.preset, *self.settings],
        }


def run_in(request: Request, out: Path, ending: Ending, *, progress: bool) -> str:
    """Run a study in a folder, or continue it; return what to tell the user."""
    study, config = request.load()
    ending.begin_in(out)
    text = study.run(config, out, progress=progress)
    finish(out, {})
    return text


def run_if_changed(request: Request, out: Path, ending: Ending, *, progress: bool) -> str:
    """Run a study in a folder of ``out`` unless it is complete there; link ``latest`` to it.

    Raises
    ------
    SettingsError
        As `Request.load`; or a file or folder that a setting names is missing or empty.
    LockedError
        Another process is running in ``out``.
    """
    loaded = None
    facts = _recorded(request.facts(), out)
    if facts is None:
        loaded = request.load()
        facts = _with_inputs(request.facts(), loaded[1], out)
    folder = out / _hash({key: facts[key] for key in facts if key != "request"})[:12]
    ending.begin_in(folder)
    with run_lock(out):
        if is_complete(folder):
            ending.status = "unchanged"
            text = f"Nothing has changed since {read_record(folder)['finished']}: {folder}"
        else:
            study, config = loaded or request.load()
            text = study.run(config, folder, progress=progress)
            finish(folder, facts)
        if is_complete(folder):
            _link(out / "latest", folder.name)
    return text


def source_hash(module: str) -> str:
    """Return a hash of a study's module and of what it imports of its own package.

    Modules are read, not imported; those of other packages do not count.
    """
    package = module.partition(".")[0]
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise SettingsError(f"the source of {module} is missing; install it again")
    root = Path(spec.origin)
    todo, seen = [module], dict[str, str]()
    while todo:
        name = todo.pop()
        stem = root.parent.joinpath(*name.split(".")[1:])
        paths = [root] if name == package else [stem.with_suffix(".py"), stem / "__init__.py"]
        path = next((path for path in paths if path.is_file()), None)
        if name in seen or path is None:
            continue
        text = path.read_text(encoding="utf8")
        seen[name] = hashlib.sha256(text.encode()).hexdigest()
        inside = name if path.name == "__init__.py" else name.rpartition(".")[0]
        todo += [each for each in _imports(text, inside) if f"{each}.".startswith(f"{package}.")]
    return _hash(seen)


def _imports(text: str, package: str) -> Iterator[str]:
    """Yield the dotted names that a module of a package imports, and may be modules."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = "." * node.level + (node.module or "")
            base = importlib.util.resolve_name(base, package) if node.level else base
            yield from (base, *(f"{base}.{alias.name}" for alias in node.names))


def input_hash(path: Path) -> str:
    """Return a hash of the name, size and time of change of a file, or of all in a folder.

    Names that begin with a dot do not count.

    Raises
    ------
    SettingsError
        It is missing, cannot be read, or is an empty folder.
    """
    try:
        real = path.resolve(strict=True)
        files = sorted(_files(real)) if real.is_dir() else [real]
        facts = [[str(file), s.st_size, s.st_mtime_ns] for file in files if (s := file.stat())]
    except OSError as error:
        raise SettingsError(f"cannot read {path}: {error.strerror}") from None
    if not facts:
        raise SettingsError(f"{path} is empty; is its disk mounted?")
    return _hash(facts)


def _files(folder: Path) -> Iterator[Path]:
    def fail(error: OSError) -> None:
        raise error

    for where, folders, names in os.walk(folder, onerror=fail, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(where, name) for name in names if not name.startswith("."))


def _recorded(facts: Mapping[str, Any], out: Path) -> dict[str, Any] | None:
    """Return what the same request depends on now, if a finished run says its settings."""
    for path in sorted(out.glob("*/run.json")):
        record = read_record(path.parent)
        if {"finished", "inputs"} <= set(record) and all(
            record.get(key) == facts[key] for key in facts
        ):
            config = record["config"]
            inputs = {name: _input(config[name], out) for name in record["inputs"]}
            return {**facts, "config": config, "inputs": inputs}
    return None


def _with_inputs(facts: Mapping[str, Any], config: Config, out: Path) -> dict[str, Any]:
    """Return what a run depends on; its inputs are the settings that are paths."""
    inputs = {name: _input(str(v), out) for name, v in config if isinstance(v, Path)}
    return {**facts, "config": config.model_dump(mode="json"), "inputs": inputs}


def _input(path: str, out: Path) -> str:
    if out.resolve().is_relative_to(Path(path).resolve()):
        raise SettingsError(f"--out {out} lies in {path}, which the run reads; choose another")
    return input_hash(Path(path))


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _link(link: Path, name: str) -> None:
    """Make a link to a folder beside it, in one move."""
    new = link.with_name(".latest.part")
    try:
        if link.is_symlink() and os.readlink(link) == name:
            return
        if os.path.lexists(link) and not link.is_symlink():
            raise FileExistsError(errno.EEXIST, "there is something else of that name", str(link))
        new.unlink(missing_ok=True)
        new.symlink_to(name, target_is_directory=True)
        new.replace(link)
    except OSError as error:
        logger.warning("cannot link %s to %s: %s", link, name, error.strerror)
