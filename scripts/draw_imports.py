"""Draw the package's folders and who imports whom: docs/images/imports.svg.

Run: ``python scripts/draw_imports.py`` (``--root CHECKOUT --out FILE.svg`` for another state of the
repository). The same source gives the same bytes.
"""

from __future__ import annotations

import argparse
import ast
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[1]

#: Columns in the way of the data, with the folders and modules that stand in each, from above.
COLUMNS = {
    "torch half": "nn sampling training auditing attribution presets",
    "store": "store inspect interop devinterp",
    "engine": "engine kernels saving planning",
    "analysis": "analysis.losses analysis.gradients analysis.audits analysis.hierarchy taxonomy",
    "pictures": "plots embedding",
}
#: What runs it all, below the columns.
LANE = ["cli", "accessor", "workflow", "cluster"]
#: What all others may import: a strip below, without lines.
SHARED = [
    *("arguments", "checking", "errors", "labels", "progress"),
    *("results", "schema", "stopping", "values", "waiting"),
]
#: No place of its own: the public names, which import everything, and the version.
LEFT_OUT = ("", "__init__", "__main__", "_version")

WIDTH, HEIGHT, GAP_X, GAP_Y, TOP, LEFT = 156, 46, 74, 26, 64, 24
INK, LINE, CIRCLE = "#1f2933", "#7b8794", "#c81e1e"
FILLS = ("#e3edf9", "#e6f4ea", "#fdf0d5", "#f3e8fd", "#fde7ea")
FONT = 'font-family="Helvetica, Arial, sans-serif"'


@dataclass
class Folder:
    """A package or a lone module."""

    modules: int = 0
    lines: int = 0
    imports: Counter[str] = field(default_factory=Counter)


def read(root: Path) -> dict[str, Folder]:
    """Return the folders of a checkout, by name, and how often each imports each other one."""
    paths = {}
    for path in sorted((root / "lkarray").rglob("*.py")):
        parts = path.relative_to(root / "lkarray").with_suffix("").parts
        paths[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    folders: dict[str, Folder] = {}
    for name, path in paths.items():
        text = path.read_text()
        own = folders.setdefault(folder_of(name), Folder())
        own.modules, own.lines = own.modules + 1, own.lines + text.count("\n")
        for target in targets(ast.parse(text), set(paths)):
            if folder_of(target) != folder_of(name):
                own.imports[folder_of(target)] += 1
    return folders


def folder_of(module: str) -> str:
    """Return the folder of a module of the package, one level deeper in ``analysis``."""
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "analysis" else 1])


def targets(tree: ast.Module, modules: set[str]) -> Iterator[str]:
    """Yield the package's modules that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lkarray"):
            base = (node.module or "").removeprefix("lkarray").lstrip(".")
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in modules else base
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.startswith("lkarray"):
                    yield alias.name.removeprefix("lkarray").lstrip(".")


def reachable(folders: dict[str, Folder], start: str) -> set[str]:
    """Return the folders that one leads to, shared ones left out."""
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for name in folders[waiting.pop()].imports:
            if name in folders and name not in (*SHARED, *LEFT_OUT) and name not in seen:
                seen.add(name)
                waiting.append(name)
    return seen


def draw(folders: dict[str, Folder]) -> str:
    """Return the picture."""
    columns = [[n for n in names.split() if n in folders] for names in COLUMNS.values()]
    lane = [name for name in LANE if name in folders]
    shared = [name for name in SHARED if name in folders]
    known = {*itertools.chain(*columns), *lane, *shared, *LEFT_OUT, "analysis"}
    columns[3] += sorted(set(folders) - known)
    places = {}
    for c, names in enumerate(columns):
        for r, name in enumerate(names):
            places[name] = (LEFT + c * (WIDTH + GAP_X), TOP + r * (HEIGHT + GAP_Y))
    below = TOP + max(map(len, columns)) * (HEIGHT + GAP_Y) + 34
    for i, name in enumerate(lane):
        places[name] = (LEFT + i * (WIDTH + GAP_X), below)
    bottom = below + HEIGHT + 30
    width = 2 * LEFT + len(columns) * WIDTH + (len(columns) - 1) * GAP_X
    height = bottom + 74
    leads = {name: reachable(folders, name) for name in places}
    edges = [
        (count, a, b, a in leads[b])
        for a in places
        for b, count in sorted(folders[a].imports.items())
        if b in places
    ]
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" '
        f'width="{width}" height="{height}" {FONT}>',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        *(marker(name, color) for name, color in (("plain", LINE), ("circle", CIRCLE))),
    ]
    for c, title in enumerate(COLUMNS):
        out.append(text(places_x(c) + WIDTH / 2, 30, title, 15, weight="bold"))
    out.append(text(LEFT, below - 12, "what runs it", 13, anchor="start", weight="bold"))
    out += [curve(places[a], places[b], n, circle) for n, a, b, circle in sorted(edges)]
    for c, names in enumerate(columns):
        out += [box(places[name], name, folders[name], FILLS[c]) for name in names]
    out += [box(places[name], name, folders[name], "#eef1f4") for name in lane]
    size = sum(folders[name].lines for name in shared)
    out.append(rectangle(LEFT, bottom, width - 2 * LEFT, 30, "#eef1f4"))
    words = f"imported by all: {', '.join(shared)} ({size:,} lines)"
    out.append(text(width / 2, bottom + 20, words, 12))
    count = sum(circle for *_, circle in edges)
    circles = f"{count} of them (red) in circles" if count else "none of them in a circle"
    words = f"An arrow points to what is imported, thicker: more often. {len(edges)}, {circles}."
    out.append(text(width / 2, height - 18, words, 12))
    return "\n".join([*out, "</svg>"]) + "\n"


def places_x(column: int) -> int:
    """Return the left end of a column."""
    return LEFT + column * (WIDTH + GAP_X)


def marker(name: str, color: str) -> str:
    """Return an arrow's head."""
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" '
        f'markerHeight="7" markerUnits="userSpaceOnUse" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{color}"/></marker>'
    )


def text(
    x: float, y: float, words: str, size: int, anchor: str = "middle", weight: str = "normal"
) -> str:
    """Return words at a place."""
    return (
        f'<text x="{x:g}" y="{y:g}" font-size="{size}" text-anchor="{anchor}" '
        f'font-weight="{weight}" fill="{INK}">{words}</text>'
    )


def rectangle(x: float, y: float, width: float, height: float, fill: str) -> str:
    """Return a box."""
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="6" fill="{fill}" '
        f'stroke="{INK}" stroke-width="0.8"/>'
    )


def box(place: tuple[float, float], name: str, folder: Folder, fill: str) -> str:
    """Return a folder's box, with its name and size."""
    x, y = place
    plural = "s" if folder.modules > 1 else ""
    size = f"{folder.modules} module{plural}, {folder.lines:,} lines"
    return "\n".join(
        [
            rectangle(x, y, WIDTH, HEIGHT, fill),
            text(x + WIDTH / 2, y + 20, name, 14, weight="bold"),
            text(x + WIDTH / 2, y + 37, size, 11),
        ]
    )


def curve(a: tuple[float, float], b: tuple[float, float], count: int, circle: bool) -> str:
    """Return the line from a folder to one that it imports."""
    (xa, ya), (xb, yb) = a, b
    middle = HEIGHT / 2
    if xa == xb:  # one column: an arc on the right
        bend = 20 + 0.12 * abs(ya - yb)
        start, end = (xa + WIDTH, ya + middle + 5), (xb + WIDTH, yb + middle - 5)
        path = f"C{start[0] + bend:g} {start[1]:g} {end[0] + bend:g} {end[1]:g}"
    else:
        left = xb < xa
        start = (xa if left else xa + WIDTH, ya + middle - (4 if left else -4))
        end = (xb + WIDTH if left else xb, yb + middle - (4 if left else -4))
        bend = (end[0] - start[0]) / 2
        path = f"C{start[0] + bend:g} {start[1]:g} {end[0] - bend:g} {end[1]:g}"
    color, head = (CIRCLE, "circle") if circle else (LINE, "plain")
    return (
        f'<path d="M{start[0]:g} {start[1]:g} {path} {end[0]:g} {end[1]:g}" fill="none" '
        f'stroke="{color}" stroke-width="{0.7 + 0.5 * math.log2(count):.1f}" '
        f'stroke-opacity="0.75" marker-end="url(#{head})"/>'
    )


def main() -> None:
    """Draw a checkout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout to draw; this one")
    parser.add_argument("--out", type=Path, help="file; docs/images/imports.svg, _before of others")
    asked = parser.parse_args()
    name = "imports.svg" if asked.root.resolve() == ROOT else "imports_before.svg"
    path = asked.out or ROOT / "docs" / "images" / name
    picture = draw(read(asked.root))
    path.write_text(picture)
    print(f"{path}: {len(picture) // 1024 + 1} KiB")


if __name__ == "__main__":
    main()
