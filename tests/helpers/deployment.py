"""What is in `cluster/`, and the tools that judge it."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from lkarray.cli import main

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
SLURM, KUBERNETES, SYSTEMD, TLS = (
    CLUSTER / name for name in ("slurm", "kubernetes", "systemd", "tls")
)


def said(*command: str | Path, code: int | None = 0, **options: Any) -> str:
    """Return what a command wrote on both channels, its exit code being as expected."""
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, check=False, **options
    )
    assert code is None or done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
    return done.stdout + done.stderr


def needs(program: str, package: str) -> str:
    """Return the path of a program, or skip."""
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"no {program} here: apt-get install --yes {package}")
    return path


def command_is_known(words: list[str]) -> None:
    """Fail unless the command line takes these words, every option being one of its own."""
    command: click.Command = main
    context = click.Context(main, info_name="lkarray")
    while isinstance(command, click.Group):
        name, words = words[0], words[1:]
        inner = command.get_command(context, name)
        assert inner is not None, f"lkarray has no command {name!r}"
        command = inner
    left = command.make_context(name, list(words), parent=context).params.get("rest", ())
    assert not left, f"lkarray {name} has no options {left}"


def keys_of(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the dotted keys of a configuration and their values."""
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from keys_of(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    folder = tmp_path / "tls"
    said(TLS / "make_certificates.sh", folder, "localhost", "127.0.0.1", "::1", "*.example.org")
    return folder
