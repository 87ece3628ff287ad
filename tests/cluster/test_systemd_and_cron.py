"""`cluster/systemd`: units and a crontab, judged by systemd and cron."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.helpers.deployment import SYSTEMD, command_is_known, needs, said

pytestmark = pytest.mark.services


@pytest.fixture
def units(tmp_path: Path) -> Path:
    """The units, whose program is one that exists."""
    for path in SYSTEMD.glob("lkarray@.*"):
        text = path.read_text().replace("/opt/lkarray/bin/lkarray", "/bin/true")
        (tmp_path / path.name).write_text(text)
    return tmp_path


def test_units__are_what_systemd_takes(units: Path) -> None:
    analyze = needs("systemd-analyze", "systemd")
    for unit in ("lkarray@.service", "lkarray@.timer", "lkarray@digits.service"):
        assert said(analyze, "verify", "--man=no", f"./{unit}", cwd=units) == ""


def test_units__with_a_setting_nobody_knows_would_be_noticed(units: Path) -> None:
    analyze = needs("systemd-analyze", "systemd")
    path = units / "lkarray@.service"
    path.write_text(path.read_text().replace("MemoryMax=", "MemoryMost="))
    assert "MemoryMost" in said(analyze, "verify", "--man=no", path, code=None)


def test_service__is_hardened_and_knows_the_exit_codes(units: Path) -> None:
    text = (SYSTEMD / "lkarray@.service").read_text()
    for line in ("Type=oneshot", "SuccessExitStatus=3 143", "TimeoutStartSec=infinity"):
        assert line in text.splitlines()
    (command,) = re.findall(r"^ExecStart=\S+ (.+)$", text, flags=re.M)
    command_is_known([word for word in command.split() if word != "$LKARRAY_ARGS"])
    analyze = needs("systemd-analyze", "systemd")
    said(analyze, "security", "--offline=yes", "--threshold=25", "./lkarray@.service", cwd=units)


def test_timer__comes_every_night_and_catches_up(units: Path) -> None:
    text = (SYSTEMD / "lkarray@.timer").read_text()
    assert "Persistent=true" in text.splitlines()
    (when,) = re.findall(r"^OnCalendar=(.+)$", text, flags=re.M)
    analyze = needs("systemd-analyze", "systemd")
    days = re.findall(
        r"(?:Next elapse|Iter\. #\d+): \w+ (\S+) 02:30:00",
        said(analyze, "calendar", "--iterations=3", when),
    )
    assert len(set(days)) == 3


def test_crontab__has_five_fields_and_a_command() -> None:
    text = (SYSTEMD / "crontab").read_text()
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert text.endswith("\n")  # or cron drops the last line
    assert lines.pop(0) == "SHELL=/bin/sh"
    (line,) = lines
    *fields, command = line.split(maxsplit=5)
    for field, (least, most) in zip(
        fields, [(0, 59), (0, 23), (1, 31), (1, 12), (0, 7)], strict=True
    ):
        assert re.fullmatch(r"\*|\d+", field)
        assert field == "*" or least <= int(field) <= most
    assert "%" not in command
    said("sh", "-n", "-c", command)
    program, *words = command.partition(" >>")[0].split()
    assert program.endswith("/lkarray")
    command_is_known(words)


def test_crontab__is_what_cron_takes(tmp_path: Path) -> None:
    crontab = needs("crontab", "cron")
    if "dry run" not in said(crontab, "-h", code=None):  # Debian's has it, elsewhere -n is a host
        pytest.skip("this crontab checks no file without installing it")
    said(crontab, "-n", SYSTEMD / "crontab")
    wrong = tmp_path / "crontab"
    wrong.write_text((SYSTEMD / "crontab").read_text().replace("30 2 *", "30 25 *"))
    assert "bad hour" in said(crontab, "-n", wrong, code=1)
