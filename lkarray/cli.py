"""The command line: ``lkarray run``, ``lkarray info``, ``lkarray verify``.

Exit codes: 0 done; 1 failed, or problems found; 2 wrong usage or settings; 3 in use by
another process, try again later.
"""

from __future__ import annotations

import logging
from pathlib import Path

import click

from lkarray._version import __version__
from lkarray.errors import LkarrayError, LockedError, SettingsError


class _Group(click.Group):
    """Turns the library's errors into one line on standard error and an exit code."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except LockedError as error:
            click.echo(f"lkarray: {error}", err=True)
            ctx.exit(3)
        except SettingsError as error:
            click.echo(f"lkarray: {error}", err=True)
            ctx.exit(2)
        except (LkarrayError, MemoryError) as error:
            click.echo(f"lkarray: {error}", err=True)
            ctx.exit(1)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="lkarray")
def main() -> None:
    """Ask which inputs a trained network treats alike."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("lkarray").setLevel(logging.INFO)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("name", required=False)
@click.argument("rest", nargs=-1, type=click.UNPROCESSED, metavar="[--KEY VALUE]...")
@click.option("--preset", default="default", show_default=True, help="Named set of settings.")
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="Change one setting.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the run. [runs/NAME]")
@click.option("--progress/--no-progress", default=True, help="Show progress bars.")
def run(
    name: str | None,
    rest: tuple[str, ...],
    preset: str,
    settings: tuple[str, ...],
    out: Path | None,
    progress: bool,
) -> None:
    """Run the workflow NAME, or continue it; without NAME, list them.

    Each setting of the workflow is an option too: --dataset mnist is --set dataset=mnist.
    """
    from lkarray.workflow import find_workflow, workflow_names

    if name is None:
        click.echo("\n".join(workflow_names()))
        return
    click.echo(f"{name}: loading (torch takes a few seconds)", err=True)
    try:
        study = find_workflow(name)
        config = study.Config.build(preset, [*settings, *_settings(rest)])
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    click.echo(study.run(config, out or Path("runs") / name, progress=progress))


def _settings(words: tuple[str, ...]) -> list[str]:
    """Return ``key=value`` of options ``--key value``, ``--key=value`` and ``--key``."""
    out: list[str] = []
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"unexpected {word!r}; settings are given as --key value")
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
    from lkarray.store import verify as check

    problems = check(path)
    for problem in problems:
        click.echo(str(problem))
    if problems:
        raise SystemExit(1)
    click.echo(f"{path} is sound")
