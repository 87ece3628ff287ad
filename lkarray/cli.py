"""The command line: ``lkarray run``, ``info``, ``verify`` and ``cluster check``.

Exit codes: 0 done, or unchanged; 1 failed, or there are problems; 2 wrong usage or settings, or
a path that is missing under ``--if-changed``; 3 in use by another process, try again later; 130
and 143 stopped by Ctrl-C and by SIGTERM.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import click

from lkarray._version import __version__
from lkarray.errors import LkarrayError, SettingsError
from lkarray.workflow.ending import Ending, Stopped, ending_of, leave, reporting


class _Group(click.Group):
    """Turns the library's errors into one line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except (LkarrayError, MemoryError) as error:
            click.echo(f"lkarray: {error}", err=True)
            ctx.exit(ending_of(error)[1])
        except Stopped as error:
            click.echo(f"lkarray: {error}", err=True)
            leave(error)


class _Run(click.Command):
    """Has its line of JSON also where the command line itself is wrong."""

    def make_context(
        self,
        info_name: str | None,
        args: list[str],
        parent: click.Context | None = None,
        **extra: Any,
    ) -> click.Context:
        wanted = "--json" in args  # parsing empties the list
        try:
            return super().make_context(info_name, args, parent, **extra)
        except click.UsageError as error:
            if wanted:
                ending = Ending(None)
                ending.failed(error)
                click.echo(ending.line())
            raise


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lkarray")
def main() -> None:
    """Ask which inputs a trained network treats alike."""
    times = "" if sys.stderr.isatty() else "%(asctime)s %(levelname)s "
    logging.basicConfig(level=logging.WARNING, format=f"{times}%(message)s")
    logging.getLogger("lkarray").setLevel(logging.INFO)
    for handler in logging.getLogger().handlers:
        handler.addFilter(_worth_telling)


def _worth_telling(record: logging.LogRecord) -> bool:
    """Leave out what other libraries, Dask's servers above all, tell of their daily round."""
    return record.levelno >= logging.WARNING or record.name.split(".")[0] == "lkarray"


@main.command(cls=_Run, context_settings={"ignore_unknown_options": True})
@click.argument("name", required=False)
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
@click.option("--preset", default="default", show_default=True, help="Named set of settings.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one setting.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [runs/NAME]")
@click.option(
    "--if-changed",
    is_flag=True,
    help="Run in a folder of --out named by a hash of settings, study, version and input files, "
    "unless the run there is complete; --out/latest links to the last complete one.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON, whatever happens.")
@click.option("--progress/--no-progress", default=None, help="Show progress bars. [in terminals]")
def run(
    name: str | None,
    rest: tuple[str, ...],
    preset: str,
    settings: tuple[str, ...],
    out: Path | None,
    if_changed: bool,
    as_json: bool,
    progress: bool | None,
) -> None:
    """Run the workflow NAME, or continue it; without NAME, list them.

    Each setting of the workflow is an option too: --dataset mnist is --set dataset=mnist.

    Exit codes: 0 done or unchanged, 1 failed, 2 wrong settings, or under
    --if-changed a missing path, 3 in use by another process, 130 and 143 stopped; run again to
    continue.
    """
    from lkarray.workflow import Request, run_if_changed, run_in, workflow_names

    if name is None and not (as_json or if_changed):
        click.echo("\n".join(workflow_names()))
        return
    ending = Ending(name)
    with reporting(ending, as_json=as_json):
        if name is None:
            raise SettingsError("name the workflow to run; lkarray run lists them")
        request = Request(name, preset, (*settings, *_settings(rest)))
        call = run_if_changed if if_changed else run_in
        show = sys.stderr.isatty() if progress is None else progress
        text = call(request, out or Path("runs") / name, ending, progress=show)
    if not as_json:
        click.echo(text)


def _settings(words: tuple[str, ...]) -> list[str]:
    """Return ``key=value`` of options ``--key value``, ``--key=value`` and ``--key``."""
    out: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise SettingsError(f"unexpected {word!r}; settings are given as --key value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            value = left.pop(0) if left and not left[0].startswith("--") else "true"
        out.append(f"{key.replace('-', '_')}={value}")
    return out


@main.command()
@click.argument("path")
def info(path: str) -> None:
    """Say what the store at PATH holds, and with which settings it was made."""
    from lkarray.inspect import describe_store

    click.echo(describe_store(path))


@main.command()
@click.argument("path")
def verify(path: str) -> None:
    """Check every committed chunk of the store at PATH; exit with 1 if any is not whole."""
    from lkarray.store.objects import without_credentials
    from lkarray.store.verifying import check

    problems, notes = check(path)
    for note in notes:
        click.echo(without_credentials(note))
    for problem in problems:
        click.echo(str(problem))
    if problems:
        raise SystemExit(1)
    click.echo(f"{without_credentials(path)} is sound")


@main.group()
def cluster() -> None:
    """Work with Dask clusters."""


@cluster.command()
@click.argument("target", default="local")
@click.option("--shared", metavar="FOLDER", help="Folder or URL of the stores. [this folder]")
@click.option("--tls", type=click.Path(path_type=Path), help="Folder of the certificates.")
@click.option("--workers", type=int, help="How many to start, or to wait for.")
@click.option("--memory", help="Limit of each worker that is started, as '4 GiB'.")
@click.option("--timeout", default=60.0, show_default=True, help="Seconds to wait for workers.")
@click.option("--loss/--no-loss", default=True, help="End one worker, to see its tasks go on.")
def check(
    target: str,
    shared: str | None,
    tls: Path | None,
    workers: int | None,
    memory: str | None,
    timeout: float,
    loss: bool,
) -> None:
    """Try what a run needs on the cluster TARGET, within a minute; exit with 1 if any fails.

    TARGET is what lk.cluster.connect takes: local, tcp://host:8786, ssh://host1,host2, slurm,
    kubernetes, cuda.
    """
    from lkarray.cluster import check as try_out
    from lkarray.cluster import connect

    try:
        client = connect(target, tls=tls, workers=workers, memory=memory, timeout=timeout)
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    with client:
        findings = try_out(client, shared, loss=loss)
    for finding in findings:
        click.echo(str(finding))
    if any(finding.ok is False for finding in findings):
        raise SystemExit(1)
