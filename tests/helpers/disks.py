"""A file system of its own for one process, small or read-only."""

import subprocess
import sys
from pathlib import Path

import pytest


def can_mount() -> bool:
    probe = ["unshare", "--mount", "--map-root-user", "true"]
    return subprocess.run(probe, capture_output=True, check=False).returncode == 0


own_disk = pytest.mark.skipif(
    sys.platform != "linux" or not can_mount(), reason="needs a private mount (Linux namespaces)"
)


def run_on(folder: Path, code: str, *mount: str) -> str:
    """Run code on a file system of its own: a private mount, gone with the process."""
    script = f"mount {' '.join(mount)} {folder} && exec {sys.executable} -c '{code}' {folder}"
    done = subprocess.run(
        ["unshare", "--mount", "--map-root-user", "sh", "-c", script],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    return done.stdout + done.stderr
