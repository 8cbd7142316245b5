"""Draws docs/images/architecture.png: the package's layers, and a row's way from text to loss.

    python docs/draw_architecture.py

The arrows between the layers are the imports that the source has, from each layer to the next.
"""

import ast
import itertools
import pathlib
from collections import Counter

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

DOCS = pathlib.Path(__file__).parent
PACKAGE = DOCS.parent / "salt_jax"

# From the command down; each layer imports those below it.
LAYERS = (
    ("main.py",),
    ("commands",),
    ("cli", "evaluation", "reporting"),
    ("inference", "planning", "t5x"),
    ("training", "preparation"),
    ("huggingface",),
    ("distill", "models", "data"),
    ("storage",),
    ("runtime",),
)
WAY = (
    ("text", "JSON lines, Parquet, files,\na SeqIO task"),
    ("salt prepare", "tokenize, pack, shuffle once:\nrows with stable ids"),
    ("packed cache", "targets, loss weights,\nsegments, positions"),
    ("input pipeline", "which row at which step;\nobjectives (UL2)"),
    ("decoder", "hidden states of student\nand teacher"),
    ("chunked loss", "logits of a chunk of tokens;\nloss and its gradient"),
    ("optimizer", "update, checkpoint,\nthe next step"),
)
ASIDE = (
    ("salt score", "an early checkpoint of the SLM:\none number a row"),
    ("salt select", "the rows of stage 1"),
)
INK, LINE, FILL, ACCENT = "#222222", "#8a8a8a", "#f5f7f9", "#0072b2"


def imports() -> Counter[tuple[str, str]]:
    """How many files of one part import another."""
    found: Counter[tuple[str, str]] = Counter()
    for file in PACKAGE.rglob("*.py"):
        part = file.relative_to(PACKAGE).parts[0]
        named = {
            node.module.split(".")[1]
            for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("salt_jax.")
        }
        found.update((part, name) for name in named if name != part)
    return found


def draw() -> Figure:
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    layers, way = figure.subplots(1, 2, width_ratios=[5, 6])
    for panel, title in ((layers, "imports point down"), (way, "a row, from text to loss")):
        panel.set_axis_off()
        panel.set_xlim(0, 10)
        panel.set_ylim(0, 10)
        panel.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)

    places = {}
    for level, parts in enumerate(LAYERS):
        for index, part in enumerate(parts):
            places[part] = (10 * (index + 0.5) / len(parts), 9.4 - 1.12 * level)
    level = {part: number for number, parts in enumerate(LAYERS) for part in parts}
    # main finds the verbs by their files' names.
    found = imports() + Counter({("main.py", "commands"): 5})
    for (start, end), count in found.items():
        # Imports of what a part below imports too are left out.
        below = (part for part in level if (start, part) in found and (part, end) in found)
        if start in level and level.get(end, 0) > level[start] and not any(below):
            (x0, y0), (x1, y1) = places[start], places[end]
            arrow = FancyArrowPatch(
                (x0, y0 - 0.3),
                (x1, y1 + 0.3),
                arrowstyle="-|>",
                mutation_scale=9,
                color=LINE,
                linewidth=0.6 + 0.15 * min(count, 10),
                alpha=0.7,
            )
            layers.add_patch(arrow)
    for part, (x, y) in places.items():
        _box(layers, x, y, 2.4, 0.56, part, "")

    heights = [9.3 - 1.42 * number for number in range(len(WAY))]
    for (name, words), y in zip(WAY, heights, strict=True):
        _box(way, 2.6, y, 4.4, 1.08, name, words)
    for above, below in itertools.pairwise(heights):
        _arrow(way, (2.6, above - 0.54), (2.6, below + 0.54))
    for (name, words), y in zip(ASIDE, heights[2:4], strict=True):
        _box(way, 7.6, y, 4.4, 1.08, name, words)
    _arrow(way, (4.8, heights[2]), (5.4, heights[2]))
    _arrow(way, (7.6, heights[2] - 0.54), (7.6, heights[3] + 0.54))
    _arrow(way, (5.4, heights[3]), (4.8, heights[3]))
    return figure


def _box(panel, x, y, width, height, name, words) -> None:
    corner = (x - width / 2, y - height / 2)
    style = "round,pad=0.02,rounding_size=0.12"
    panel.add_patch(FancyBboxPatch(corner, width, height, boxstyle=style, fc=FILL, ec=LINE))
    if not words:
        panel.text(x, y, name, ha="center", va="center", fontsize=10, color=INK)
        return
    place = (corner[0] + 0.12, y + height / 2 - 0.1)
    panel.text(*place, name, va="top", fontsize=9.5, color=ACCENT, fontweight="bold")
    place = (corner[0] + 0.12, y + height / 2 - 0.42)
    panel.text(*place, words, va="top", fontsize=8, color=INK, linespacing=1.15)


def _arrow(panel, start, end) -> None:
    panel.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=11, color=INK))


if __name__ == "__main__":
    draw().savefig(
        DOCS / "images/architecture.png", dpi=110, facecolor="white", metadata={"Software": None}
    )
