# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How `make docs` builds the pages: Markdown through MyST, the API reference from the docstrings, strictly."""

import re
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "modeling"))

from sparsepath_vit.version import __version__  # noqa: E402

project = "SparsePathViT"
author = "The SparsePathViT authors"
copyright = "2026, The SparsePathViT authors"
version = release = __version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 3
suppress_warnings = ["myst.header"]  # pages may begin with a picture

# Strict: with `-W` a broken link, an unknown page or a name in the API page that is not there stops the build.
nitpicky = True
# Types are written for the reader (`(batch, K, 2) int64`), not as references; other projects' names are not resolved.
nitpick_ignore_regex = [(r"py:.*", r".*")]
autodoc_typehints = "none"
autodoc_member_order = "bysource"
autodoc_default_options = {"members": True, "show-inheritance": False}
napoleon_use_ivar = True

html_theme = "furo"
html_title = f"SparsePathViT {release}"
html_show_sphinx = False
html_copy_source = False
html_static_path = []
html_theme_options = {"navigation_with_keys": True}

_CODE = re.compile(r"``?([^`]+)``?")
_FENCE = re.compile(r"^\s*```")


def _fences_to_blocks(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Docstrings are Markdown, as in Transformers: single backticks and fences -> what docutils reads."""
    written, in_fence = [], False
    for line in lines:
        if _FENCE.match(line):
            in_fence = not in_fence
            written += ["", line[: len(line) - len(line.lstrip())] + "::", ""] if in_fence else [""]
        elif in_fence:
            written.append(f"    {line}" if line.strip() else "")
        else:
            written.append(_CODE.sub(r"``\1``", line).replace("(*", r"(\*"))  # a shape, not the start of an emphasis
    lines[:] = written


def setup(app: Any) -> None:
    """Registers what is ours; called by Sphinx."""
    app.connect("autodoc-process-docstring", _fences_to_blocks, priority=400)  # before napoleon reads the sections
