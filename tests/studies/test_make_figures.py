# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from PIL import Image, ImageChops
from places import ROOT

from studies import make_figures


def test_the_committed_pattern_is_what_the_script_draws(tmp_path, run_script):
    run_script(make_figures, "--output_dir", str(tmp_path))
    drawn = Image.open(tmp_path / "block_pattern.png")
    committed = Image.open(ROOT / "model_card" / "figures" / "block_pattern.png")
    assert drawn.size == committed.size
    # Text may be rendered a little differently by another version of Pillow; the cells may not.
    differing = ImageChops.difference(drawn, committed).convert("L").point(lambda value: 255 * (value > 40))
    assert differing.histogram()[255] < 0.01 * drawn.width * drawn.height
