"""The files of `cluster/` as a whole: scripts, and the README that names each."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

from tests.helpers.deployment import CLUSTER, ROOT, SLURM, TLS, command_is_known, said

pytestmark = pytest.mark.services
FILES = sorted(path for path in CLUSTER.rglob("*") if path.is_file())
SCRIPTS = sorted([*SLURM.glob("*.sbatch"), *TLS.glob("*.sh")])
README = CLUSTER / "README.md"

# --- Shell ---------------------------------------------------------------------------------


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts__are_bash_and_stop_at_the_first_error(path: Path) -> None:
    said("bash", "-n", path)
    text = path.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text
    if shellcheck := shutil.which("shellcheck"):
        said(shellcheck, path)


# --- README --------------------------------------------------------------------------------


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), flags=re.M | re.S)


def test_readme__names_each_file_and_no_other() -> None:
    text = README.read_text()
    linked = set(re.findall(r"\]\((?!https?:)([^)#]+)\)", text))
    assert [name for name in linked if not (CLUSTER / name).exists()] == []
    here = {str(path.relative_to(CLUSTER)) for path in FILES if path != README}
    assert here <= linked
    named = re.findall(r"\bcluster/[\w@./-]+", "\n".join(blocks("bash") + blocks("python")))
    assert named
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_readme__has_commands_that_are_understood() -> None:
    for block in blocks("bash"):
        said("bash", "-n", "-c", block)
        for line in block.replace("\\\n", " ").splitlines():
            words = line.partition("#")[0].split()
            if words[:1] == ["lkarray"]:
                command_is_known(words[1:])
    for block in blocks("python"):
        compile(block, str(README), "exec")


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files__name_no_index_and_no_address_of_one_machine(path: Path) -> None:
    text = path.read_text()
    assert not re.search(r"https?://(?!127\.0\.0\.1|localhost)", text)
    assert str(ROOT) not in text
