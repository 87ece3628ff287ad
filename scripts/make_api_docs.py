"""Write docs/api.md, the reference of every public name, from the docstrings.

Run: ``python scripts/make_api_docs.py`` (``--check`` compares, and exits with 1 if the file is
not what the docstrings say). The same docstrings give the same bytes.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
import textwrap
from math import inf
from pathlib import Path
from typing import Any

import lkarray as lk

PAGE = Path(__file__).parents[1] / "docs" / "api.md"

#: Every name of ``lkarray.__all__`` once, by what it is for; and, with a dot, what they return.
_NAMES = {
    "Sampling": """LocalPosterior sample observe Outcome suggest SGLD RMSpropSGLD SGHMC
        InformedLangevin Laplace laplace schedules preset PRESETS diagnostics""",
    "Losses": """loss_gain loss_variance llc singular_fluctuation mcse residualize log_odds
        reliability at_equal_reliability extrapolated judge""",
    "Kernels": """correlation covariance influence gram neighbors plan planning.KernelPlan save
        group_mean histogram frobenius linear_operator ledoit_wolf cka cka_curve svd eigh
        participation_ratio energy_rank embed similarity_by_distance""",
    "Training": """record training.Recorder open_trace training.Trace snapshot discard_trace
        gradient_features gradient_factors gradient_plan discard_gradients activations params
        mean_gradient""",
    "Kernels of gradients": """plgk ips lgk chord_distance angle_distance pntk lntk unfold
        temporal_kernel temporal_modes parameter_modes modes mode_coefficients cancellation_ratio
        mode_sensitivity mode_shifts shift_modes online_modes feature_overlap subspace_overlap
        activation_overlap influence_over_time ips_scores hidden_similarity difficulty_table""",
    "Audits": """audit reconstruction completeness net_influence gross_influence most_influential
        concentration audit_modes extend_audit tracin tracin_in_run gradient_similarity trak
        influence_functions""",
    "Hierarchies": """Taxonomy taxonomic_lift taxonomy_distance correlation_by_distance
        attribute_lift color_groups""",
    "The store": "open verify repair to_arviz from_devinterp",
    "Figures": "plots",
    "Clusters": "cluster",
    "Errors": "errors __version__",
}
GROUPS = {title: names.split() for title, names in _NAMES.items()}

KEPT = ("Parameters", "Attributes", "Returns", "Raises", "Notes", "References", "Examples")
LISTS = ("Parameters", "Attributes", "Raises")
_TITLE = re.compile(r"^([A-Z][A-Za-z ]+)\n-{3,}\n", flags=re.MULTILINE)
_VALUES = {"__version__": "The version of the library, a string."}

INTRODUCTION = """\
# API

Every public name of `import lkarray as lk`, from its docstring (`help(lk.sample)` says the same).
This page is made by `python scripts/make_api_docs.py`; what belongs together, and when to use
what, is in [the guide](guide.md).

Wherever *losses* are taken, `tree["losses"]`, a Dataset or a DataArray with the dims `chain`,
`draw` and one more will do; most functions of losses, gradients and audits are methods too:
`losses.lk.correlation()`. A result is lazy where it says so: nothing is computed before
`.compute()`, `.values` or `lk.save`.
"""


def page() -> str:
    """Return the text of docs/api.md."""
    parts = [INTRODUCTION, "\n".join(contents()) + "\n"]
    for title, names in GROUPS.items():
        parts.append(f"## {title}\n")
        parts += [entry(name, resolve(name)) for name in names if known(name)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(parts)).rstrip() + "\n"


def contents() -> list[str]:
    """Return the groups and their names, as links."""
    return [
        f"- **{title}**: "
        + ", ".join(f"[`{shown(name)}`](#{anchor(name)})" for name in names if name in lk.__all__)
        for title, names in GROUPS.items()
    ]


def known(name: str) -> bool:
    """Say whether there is such a name: one that is listed here may not be public yet."""
    return "." in name or name in lk.__all__


def resolve(name: str) -> Any:
    """Return a public object, or one of a module that is named before a dot."""
    module, _, last = name.rpartition(".")
    return getattr(importlib.import_module(f"lkarray.{module}") if module else lk, last)


def shown(name: str) -> str:
    """Return a name as it is written by users."""
    return name.rpartition(".")[2]


def anchor(name: str) -> str:
    """Return the anchor of a name on the page."""
    taken = shown(name) == "Laplace"  # the function has the name in small letters
    return f"lk-{shown(name).lower().strip('_')}{'-draws' * taken}"


def entry(name: str, value: Any) -> str:
    """Return the Markdown of one name."""
    head = f'<a id="{anchor(name)}"></a>\n'
    if inspect.ismodule(value):
        return head + f"\n### `lk.{name}`\n\n" + of_module(name, value)
    title = f"### `{'' if '.' in name else 'lk.'}{shown(name)}`\n\n"
    if isinstance(value, dict):
        rows = "\n".join(f"- `{key!r}`: {settings(one)}" for key, one in sorted(value.items()))
        return f"{head}\n{title}Settings of the papers' experiments, by name:\n\n{rows}\n"
    if not callable(value):
        return f"{head}\n{title}{_VALUES[name]}\n"
    prefix = "" if "." in name else "lk."
    call = "" if "." in name else f"```python\n{signature(prefix + shown(name), value)}\n```\n\n"
    text = head + "\n" + title + call + markdown(inspect.getdoc(value) or "")
    return text + (of_class(value) if inspect.isclass(value) else "")


def settings(preset: Any) -> str:
    """Return the settings of a preset in a line."""
    gamma = "gamma varied" if preset.gamma is None else f"gamma {preset.gamma:g}"
    return (
        f"nbeta {preset.nbeta:g}, {gamma}, step size {preset.step_size:g}, {preset.chains} chains "
        f"of {preset.draws} draws after {preset.burn_in} steps, batches of {preset.batch_size}"
    )


def signature(name: str, value: Any, most: float = 96) -> str:
    """Return a call with its defaults, without types, broken where it is longer than ``most``."""
    given = [
        one.replace(annotation=inspect.Parameter.empty)
        for one in inspect.signature(value).parameters.values()
        if one.name != "self"
    ]
    parts, keyword = [], False
    for one in given:
        if one.kind is one.KEYWORD_ONLY and not keyword:
            parts, keyword = [*parts, "*"], True
        keyword |= one.kind is one.VAR_POSITIONAL
        parts.append(str(one))
    line = f"{name}({', '.join(parts)})"
    if len(line) <= most:
        return line
    lines, row = [f"{name}("], "   "
    for part in parts:
        if len(row) + len(part) > 94:
            lines, row = [*lines, row], "   "
        row += f" {part},"
    return "\n".join([*lines, row, ")"])


def of_class(value: type) -> str:
    """Return a class's public methods and properties, with their first paragraphs."""
    rows = []
    ours = [
        base
        for base in reversed(value.__mro__)
        if base.__module__.startswith("lkarray") and not inspect.isabstract(base)
    ]
    members = {name: member for base in ours for name, member in vars(base).items()}
    for name, member in sorted(members.items()):
        function = getattr(member, "__func__", member)
        if name.startswith("_") or not inspect.getdoc(member):
            continue
        if isinstance(member, property):
            rows.append(f"- `.{name}`: {inline(first(member))}")
        elif inspect.isfunction(function):
            call = signature(
                f".{name}", getattr(value, name) if function is not member else member, inf
            )
            rows.append(f"- `{call}`: {inline(first(function))}")
    return "\n**Methods and properties**\n\n" + "\n".join(rows) + "\n" if rows else ""


def of_module(name: str, module: Any) -> str:
    """Return a module's functions or classes: whole for clusters, otherwise in a line each."""
    names = getattr(module, "__all__", None) or [
        one
        for one, value in vars(module).items()
        if inspect.isclass(value) and value.__module__ == module.__name__
    ]
    members = [(one, getattr(module, one)) for one in names]
    members = [pair for pair in members if callable(pair[1])]
    text = markdown(inspect.getdoc(module) or "") + "\n"
    if name == "cluster":
        for one, value in members:
            text += f"#### `lk.{name}.{one}`\n\n"
            text += f"```python\n{signature(f'lk.{name}.{one}', value)}\n```\n\n"
            text += markdown(inspect.getdoc(value) or "") + "\n"
        return text
    for one, value in members:
        bases = ""
        if inspect.isclass(value) and issubclass(value, Exception):
            call, bases = one, f" ({', '.join(base.__name__ for base in value.__bases__)})"
        else:
            call = signature(one, value, inf)
        text += f"- `{call}`{bases}: {inline(first(value))}\n"
    return text


def first(value: Any) -> str:
    """Return the first paragraph of a docstring."""
    return (inspect.getdoc(value) or "").split("\n\n")[0]


def markdown(doc: str) -> str:
    """Return a numpydoc docstring as Markdown, its sections in the order they stand in."""
    pieces = _TITLE.split(doc)
    text = prose(pieces[0])
    for title, body in zip(pieces[1::2], pieces[2::2], strict=True):
        if title in KEPT:
            shape = items if title in LISTS or title == "Returns" else prose
            body = linked(body) if title == "References" else body
            text += f"\n**{title}**\n\n" + shape(body.strip("\n"))
    return text


def linked(body: str) -> str:
    """Return references with their identifiers, authors and pages as links."""
    text = inspect.cleandoc(body.strip("\n"))
    text = re.sub(r"arXiv:(\d{4}\.\d{4,5})", r"[arXiv:\1](https://arxiv.org/abs/\1)", text)
    text = re.sub(r"doi:(10\.\S+\w)", r"[doi:\1](https://doi.org/\1)", text)
    text = re.sub(r"docs/(methods/\w+\.md)", r"[\1](\1)", text)
    return re.sub(r"^- (\w+)(.*? )(\d{4})([ab]?)(?=[,:])", in_list, text, flags=re.MULTILINE)


def in_list(match: re.Match[str]) -> str:
    """Return the author and year of a reference as a link into the list of them."""
    first, others, year, letter = match.groups()
    key = f"{first.lower()}-{year}{letter}"
    return f"- [{first}{others}{year}{letter}](references.md#{key})"


def items(body: str) -> str:
    """Return a section of names and indented descriptions as a list."""
    text = ""
    for part in re.split(r"\n(?=\S)", body):
        head, _, rest = part.partition("\n")
        lines = inspect.cleandoc(rest)
        shown = ", ".join(f"`{name}`" for name in head.split(" : ")[0].split(", "))
        described = prose(lines).strip("\n")
        # What is more than one paragraph stays in its item by its indent.
        described = re.sub(r"\n(?=.)", "\n  ", described)
        text += f"- {shown}: {described}\n" if described else f"- {shown}\n"
    return text


def prose(text: str) -> str:
    """Return paragraphs, formulas, lists and code of a docstring as Markdown."""
    out = []
    for block in blocks(text):
        if block.startswith(">>> "):
            out.append(f"```pycon\n{block}\n```")
        elif block.startswith(".. math::"):
            formula = inspect.cleandoc(block.removeprefix(".. math::").lstrip(" "))
            out.append(f"```math\n{formula.strip()}\n```")
        elif block.startswith("\0"):
            out.append(f"```python\n{textwrap.dedent(block[1:])}\n```")
        else:
            out.append(inline(block))
    return "\n\n".join(out) + "\n"


def blocks(text: str) -> list[str]:
    """Return the paragraphs of a text; code after ``::`` begins with a zero byte."""
    parts = [part.strip("\n") for part in re.split(r"\n\s*\n", text) if part.strip()]
    out: list[str] = []
    code = False
    for part in parts:
        indented = all(line.startswith("    ") for line in part.splitlines())
        if out and indented and (code or out[-1].startswith((".. math::", "\0"))):
            out[-1] += "\n\n" + part if out[-1].strip("\0") else part
            continue
        code = part.endswith("::") and not part.startswith(".. math::")
        if code:
            words = part[:-1].rstrip(":").strip()
            out += [words + ":"] if words else []
            out.append("\0")
        else:
            out.append(part)
    return [part for part in out if part.strip("\0")]


def inline(text: str) -> str:
    """Return text with its literals, formulas and references as Markdown, in long lines."""
    formulas: list[str] = []

    def keep(match: re.Match[str]) -> str:
        formulas.append(match.group(1).replace("\n", " "))
        return f"\0{len(formulas) - 1}\0"

    text = re.sub(r":math:`([^`]*)`", keep, text)
    text = re.sub(r"``(.+?)``", lambda m: f"\1{m.group(1)}\1", text, flags=re.DOTALL)
    text = re.sub(r"`([^`\n]+)`", reference, text)
    text = text.replace("\1", "`")
    text = re.sub(r"\n(?!\s*- )\s*", " ", text)
    return re.sub(r"\0(\d+)\0", lambda m: f"$`{formulas[int(m.group(1))]}`$", text)


def reference(match: re.Match[str]) -> str:
    """Return a name in backticks, linked if it is on this page."""
    name = match.group(1)
    short = name.removeprefix("lkarray.")
    here = {shown(one) for names in GROUPS.values() for one in names}
    return f"[`{short}`](#{anchor(short)})" if short in here else f"`{name}`"


def main() -> None:
    """Write the page, or compare it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if stale")
    asked = parser.parse_args()
    text = page()
    if asked.check:
        if not PAGE.exists() or PAGE.read_text() != text:
            sys.exit(f"{PAGE} is not what the docstrings say; run: python {sys.argv[0]}")
        return
    PAGE.write_text(text)
    print(f"{PAGE}: {len(text.splitlines())} lines, {len(text) // 1024} KiB")


if __name__ == "__main__":
    main()
