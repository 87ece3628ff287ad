"""`lkarray run` as a process of its own, and what it says."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

from lkarray._version import __version__

#: In their order, also of docs/scheduling.md.
FIELDS = [
    "workflow",
    "status",
    "exit_code",
    "folder",
    "lkarray",
    "seconds",
    "stages",
    "reused",
    "metrics",
    "report",
    "error",
]


def start(folder, *words, python=()):
    """Start the command in a folder; where ``site`` is there, with the studies in it."""
    site = {"PYTHONPATH": str(folder / "site")} if (folder / "site").exists() else {}
    return subprocess.Popen(
        [sys.executable, *python, "-m", "lkarray", "run", *map(str, words)],
        cwd=folder,
        env={**os.environ, **site},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def told(process):
    """Return what a process with ``--json`` said: its one line, and standard error."""
    out, err = process.communicate(timeout=120)
    assert out.endswith("\n"), err
    assert out.count("\n") == 1, out
    fields = json.loads(out)
    assert list(fields) == FIELDS
    assert fields["exit_code"] == process.returncode
    assert fields["lkarray"] == __version__
    return SimpleNamespace(**fields, err=err)


def run(folder, *words, python=()):
    return told(start(folder, *words, "--json", python=python))


def wait_for(process, text):
    """Read standard error up to a line that has ``text``."""
    for line in process.stderr:
        if text in line:
            return
    raise AssertionError(f"ended without {text!r}")


def stop(process, number=signal.SIGTERM):
    """Send a signal; return what was said, and seconds until the end."""
    began = time.monotonic()
    process.send_signal(number)
    said = told(process)
    return said, time.monotonic() - began
