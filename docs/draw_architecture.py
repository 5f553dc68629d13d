#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Draws docs/architecture.svg: who imports whom, and the way of the pixels through the model (`make figures`)."""

import os
from pathlib import Path

INK, MUTED, LINE = "#282c34", "#5c6370", "#8a8f98"
BLUE, PALE_BLUE, ORANGE, PALE_ORANGE, PALE = "#2c6fb0", "#e3eef8", "#e9a33b", "#fcf1dd", "#f3f4f6"
RED, PALE_RED = "#d64541", "#fbe6e5"
FONT = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"
WIDTH, HEIGHT = 1000, 720

# (title, what it is, left, top, width, fill, stroke)
FOLDERS = (
    ("sparsepath", "the command line", 40, 70, 180, PALE, LINE),
    ("scripts", "a file a job, from a checkout", 240, 70, 200, PALE, LINE),
    ("studies", "what was measured, and how", 460, 70, 220, PALE, LINE),
    ("tasks", "classification, segmentation, data sets", 40, 170, 260, PALE_ORANGE, ORANGE),
    ("conversion", "checkpoints in", 315, 170, 115, PALE_ORANGE, ORANGE),
    ("comparison", "the demo", 445, 170, 115, PALE_ORANGE, ORANGE),
    ("plugins", "for other tools", 575, 170, 105, PALE_ORANGE, ORANGE),
    ("slides", "reader, tissue, regions, store", 40, 265, 310, PALE_ORANGE, ORANGE),
    ("runtime", "files, memory, devices: nothing about pathology", 40, 360, 460, PALE_ORANGE, ORANGE),
    ("checkpoints", "the tiny model", 520, 360, 160, PALE_ORANGE, ORANGE),
    ("model", "one flat folder: exactly what travels to the Hub with a checkpoint", 40, 455, 640, PALE_BLUE, BLUE),
)
# (from x, from y, to x, to y): an arrow points at what is imported.
IMPORTS = (
    (130, 126, 130, 166),
    (340, 126, 340, 166),
    (510, 126, 510, 166),
    (195, 226, 195, 261),
    (195, 321, 195, 356),
    (380, 226, 380, 356),
    (470, 226, 470, 356),
    (540, 226, 540, 356),
    (640, 226, 640, 356),
    (270, 416, 270, 451),
    (600, 416, 600, 451),
)
# The way of the pixels: (title, what happens, fill, stroke)
STEPS = (
    ("image processor", "pixel_values, patch_mask", PALE, LINE),
    ("embeddings", "patches, positions, CLS, registers", PALE_BLUE, BLUE),
    ("TokenGrid", "tokens into block order, once", PALE_BLUE, BLUE),
    ("layers 1 .. n", "block attention, MLP", PALE_BLUE, BLUE),
    ("prune", "score, keep, a smaller grid", PALE_RED, RED),
    ("layers n+1 .. L", "on the tokens that are left", PALE_BLUE, BLUE),
    ("finish", "norm, raster order, pooling", PALE_BLUE, BLUE),
    ("outputs and heads", "classifier, backbone, masks", PALE, LINE),
)


def text(x: float, y: float, content: str, size: int = 13, fill: str = INK, weight: int = 400) -> str:
    """A line of text whose middle lies at x, and its baseline at y."""
    attributes = f'font-size="{size}" fill="{fill}" font-weight="{weight}" text-anchor="middle"'
    return f'<text x="{x:g}" y="{y:g}" {attributes}>{content}</text>'


def box(title: str, subtitle: str, left: float, top: float, width: float, fill: str, stroke: str) -> list[str]:
    """A box 56 high with a name and what it is for."""
    frame = f'<rect x="{left:g}" y="{top:g}" width="{width:g}" height="56" rx="6" fill="{fill}" stroke="{stroke}"/>'
    middle = left + width / 2
    return [frame, text(middle, top + 24, title, 15, INK, 600), text(middle, top + 43, subtitle, 12, MUTED)]


def arrow(x1: float, y1: float, x2: float, y2: float) -> str:
    """A line with a head at its end."""
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{MUTED}" stroke-width="1.5" {HEAD}/>'


HEAD = 'marker-end="url(#head)"'


def drawing() -> str:
    """The whole picture as SVG."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="{FONT}" role="img">',
        "<title>Who imports whom, and the way of the pixels through the model</title>",
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L10 5 L0 10 z" fill="{MUTED}"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
        text(360, 40, "Who imports whom: an arrow points at what is imported", 15, INK, 600),
        text(840, 40, "The way of the pixels", 15, INK, 600),
    ]
    for folder in FOLDERS:
        parts += box(*folder)
    parts += [arrow(*ends) for ends in IMPORTS]
    for line, content in enumerate(
        (
            "Every folder may also import what lies further below: all may import model.",
            "Nothing imports the grey boxes. There are no circles; tests/test_layering.py holds this.",
            "Orange and blue are the package sparsepath_vit; sparsepath is installed with it;",
            "scripts and studies are run from a checkout.",
        )
    ):
        parts.append(text(360, 552 + 22 * line, content, 13, MUTED))
    top = 70
    for number, (title, subtitle, fill, stroke) in enumerate(STEPS):
        parts += box(title, subtitle, 725, top, 230, fill, stroke)
        if number:
            parts.append(arrow(840, top - 22, 840, top - 3))
        top += 80
    return "\n".join([*parts, "</svg>"]) + "\n"


def main() -> None:
    """Writes the picture beside this file."""
    path = Path(__file__).with_name("architecture.svg")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(drawing(), encoding="utf-8")
    os.replace(temporary, path)
    print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
