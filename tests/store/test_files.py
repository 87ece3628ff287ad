"""Locks and files that are being written are private, and never somebody else's file."""

import os
import socket
import stat

import pytest

import lkarray as lk
import lkarray.workflow
from lkarray import errors
from lkarray import store as stores
from lkarray.store.files import replacing, write_bytes, write_text
from lkarray.workflow import running, scheduling


@pytest.fixture
def precious(tmp_path):
    file = tmp_path / "thesis.tex"
    file.write_text("years of work")
    return file


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


def occupy(path, kind, precious):
    """Put something that is no lock at a path."""
    if kind == "link":
        path.symlink_to(precious)
    elif kind == "dangling link":
        path.symlink_to(precious.with_name("missing"))
    elif kind == "hard link":
        os.link(precious, path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    else:
        with socket.socket(socket.AF_UNIX) as made:
            before = os.getcwd()
            os.chdir(path.parent)  # the names of sockets are short
            try:
                made.bind(path.name)
            finally:
                os.chdir(before)


KINDS = ["link", "dangling link", "hard link", "folder", "pipe", "socket"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", [".lkarray.lock", ".lkarray.region-0.lock"])
def test_lock__at_something_else_is_refused_by_name(tmp_path, precious, kind, name):
    folder = tmp_path / "run"
    folder.mkdir()
    occupy(folder / name, kind, precious)
    taking = [
        lambda: stores.file_lock(folder, name),
        lambda: stores.region_lock(stores.as_store(folder), "0"),
        lambda: stores.writer_lock(stores.as_store(folder)),
        lambda: running.run_lock(folder),
    ]
    for take in taking[:1] + (taking[1:2] if "region" in name else taking[2:]):
        said = f"{name} is a.*where lkarray keeps a lock"
        with pytest.raises(errors.StoreError, match=said), take():
            pass
    assert precious.read_text() == "years of work"
    assert not precious.with_name("missing").exists()


def test_lock__is_private_and_told_apart(tmp_path):
    with stores.file_lock(tmp_path / "a" / "b"):
        assert mode(tmp_path / "a/b/.lkarray.lock") == 0o600
        with (
            pytest.raises(errors.LockedError, match=f"process {os.getpid()}"),
            stores.file_lock(tmp_path / "a" / "b"),
        ):
            pass
    with stores.file_lock(tmp_path / "a" / "b"):
        pass


def test_lock__of_another_user_names_them(tmp_path, monkeypatch):
    with stores.file_lock(tmp_path):
        pass
    opened = os.open

    def denied(path, *args, **options):
        if str(path).endswith(".lkarray.lock"):
            raise PermissionError(13, "Permission denied", str(path))
        return opened(path, *args, **options)

    monkeypatch.setattr(os, "open", denied)
    monkeypatch.setattr(os, "geteuid", lambda: 54321)
    owner = f"user {os.stat(tmp_path).st_uid}" if os.getuid() else "user root"
    for take in (stores.file_lock(tmp_path), running.run_lock(tmp_path)):
        with pytest.raises(errors.StoreError, match=f"belongs to {owner}"), take:
            pass


@pytest.mark.parametrize("suffix", [".json", ".npy", ""])
@pytest.mark.parametrize("kind", ["link", "dangling link", "hard link"])
def test_replacing__follows_no_link(tmp_path, precious, kind, suffix):
    folder = tmp_path / "run"
    folder.mkdir()
    path = folder / f"made{suffix}"
    for place in (path, folder / f".made.part{suffix}"):
        occupy(place, kind, precious)
        write_text(path, "new")
        assert (path.read_text(), path.is_symlink()) == ("new", False)
        assert precious.read_text() == "years of work"
        assert not precious.with_name("missing").exists()
    assert [p.name for p in folder.iterdir()] == [path.name]


@pytest.mark.parametrize("kind", ["folder", "pipe", "socket"])
@pytest.mark.parametrize("place", ["made.json", ".made.part.json"])
def test_replacing__refuses_what_is_no_file(tmp_path, precious, kind, place):
    occupy(tmp_path / place, kind, precious)
    with pytest.raises(errors.StoreError, match=f"{place} is a .*nothing was touched"):
        write_text(tmp_path / "made.json", "new")
    assert os.path.lexists(tmp_path / place)


def test_replacing__is_private_meanwhile_and_keeps_what_was_there_on_failure(tmp_path):
    path = tmp_path / "made.txt"
    with replacing(path) as new:
        assert mode(new) == 0o600
        new.write_text("first")
    mask = os.umask(0o077)
    os.umask(mask)
    assert mode(path) == 0o666 & ~mask
    os.chmod(path, 0o640)
    write_bytes(path, b"second")
    assert mode(path) == 0o640
    with pytest.raises(AttributeError), replacing(path) as new:
        new.write_text("half").upper()
    assert path.read_text() == "second"
    assert os.listdir(tmp_path) == ["made.txt"]


def test_run__record_and_report_follow_no_link(tmp_path, precious):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in ("run.part", ".run.part.json"):
        (folder / name).symlink_to(precious)
    (folder / "run.part").unlink()
    with lk.workflow.Run("study", lk.workflow.Config(), folder) as run:
        run.stage("one", lambda: None, [])
        assert mode(folder / "run.json") & 0o400
    report = lk.workflow.Report("t", [], {}, [], [], {}, "")
    (folder / "report").mkdir()
    for name in ("index.html", "metrics.json"):
        (folder / "report" / name).symlink_to(precious)
    lk.workflow.write_report(report, folder / "report")
    assert precious.read_text() == "years of work"
    assert "<html" in (folder / "report/index.html").read_text()


def test_run__is_not_begun_in_a_folder_of_something_else(tmp_path, precious):
    with (
        pytest.raises(errors.StoreError, match=r"holds \['thesis.tex'\] and no run"),
        lk.workflow.Run("study", lk.workflow.Config(), tmp_path),
    ):
        pass
    assert precious.read_text() == "years of work"


def test_latest__is_not_put_over_something_else(tmp_path, caplog):
    latest = tmp_path / "latest"
    latest.write_text("mine")
    scheduling._link(latest, "abc")
    assert latest.read_text() == "mine"
    assert "something else" in caplog.text


def test_taxonomy__is_written_in_one_move(tmp_path, precious):
    taxonomy = lk.Taxonomy.from_edges([("animal", "dog"), ("animal", "cat")])
    link = tmp_path / "link.json"
    link.symlink_to(tmp_path / "real.json")  # the user's own, and followed
    taxonomy.to_json(link)
    assert link.is_symlink()
    assert (tmp_path / "real.json").read_text().startswith('{"format": "lkarray.taxonomy"')
    (tmp_path / ".real.part.json").symlink_to(precious)
    taxonomy.to_json(link)
    assert precious.read_text() == "years of work"
