# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import numpy as np
import pytest
import torch
from PIL import Image
from places import SHARED_DATA
from run_script import load_study

from sparsepath_vit.runtime.configured import configured
from studies.long_range import experiment as long_range
from studies.long_range.experiment import LongRangeModel, LongRangePattern, LongRangeSettings, TissueStrips, reach

REAL_TISSUE = SHARED_DATA / "rois/cmu1_1120x1120.png"
SMALL = LongRangeSettings(columns=32, distances=(4, 20), windows=(4,), num_layers=2, steps=3, test_strips=8)

script = load_study("long_range")


@pytest.fixture(scope="module")
def tissue(tmp_path_factory):
    if REAL_TISSUE.exists():
        return REAL_TISSUE
    path = tmp_path_factory.mktemp("tissue") / "tissue.png"
    coarse = np.random.default_rng(0).integers(140, 230, size=(50, 100, 3)).astype(np.uint8)
    Image.fromarray(coarse).resize((800, 400), Image.Resampling.BICUBIC).save(path)
    return path


def changed_places(settings, window_size, has_globals, changed):
    """Columns whose tokens change when the pixels of one token do."""
    torch.manual_seed(0)
    model = LongRangeModel(settings, LongRangePattern(window_size, has_globals)).eval()
    pixels = torch.randn(1, 3, 4, 4 * settings.columns)
    other = pixels.clone()
    other[..., 4 * changed : 4 * changed + 4] += 1
    with torch.no_grad():
        before, after = (model.encoder(values).last_hidden_state[0, 4:] for values in (pixels, other))
    return (before - after).abs().amax(dim=1).nonzero().flatten().tolist()


def test_information_goes_as_far_as_the_blocks_and_no_further_without_global_tokens():
    # Token 9 is in the third block of four; two layers carry it two blocks to each side.
    assert changed_places(SMALL, 4, False, changed=9) == list(range(0, 20))
    assert changed_places(SMALL, 4, True, changed=9) == list(range(32))
    assert changed_places(SMALL, None, False, changed=9) == list(range(32))


def test_the_reach_is_the_largest_distance_that_can_be_learnt():
    # From the left structure's last token, at the left end of a block, to the right end of the block two further on.
    def of(*pattern):
        return reach(SMALL, LongRangePattern(*pattern))

    assert of(4, False) == 3 * 4 - 1 + 2
    assert of(4, True) == of(None, False) == of(4, True, 8) == 29
    assert 20 > of(4, False) >= 4


def test_context_tokens_go_with_a_window_and_dense_weights_are_tested_with_all_patterns():
    settings = LongRangeSettings(windows=(None, 8), contexts=(0, 48))
    patterns = long_range.patterns_of(settings)
    without = ["dense, no globals", "w = 8, no globals", "w = 8, 48 context tokens, no globals"]
    names = ["dense", without[0], "w = 8", "w = 8, 48 context tokens", *without[1:]]
    assert [str(pattern) for pattern in patterns] == names
    assert [str(pattern) for pattern in long_range.tests_of(settings, patterns[1])] == without
    assert long_range.tests_of(settings, patterns[3]) == [patterns[3]]
    model = LongRangeModel(settings, LongRangePattern(8, True, 48))
    assert model.encoder.config.num_context_tokens == 48


@pytest.mark.parametrize("num_context_tokens", [8, 32])
def test_without_global_tokens_context_tokens_are_right_where_they_are_exact(num_context_tokens):
    """With one for every token, and, as all queries equal the mean query, with fewer, they give what dense gives."""
    torch.manual_seed(0)
    model = LongRangeModel(SMALL, LongRangePattern(None, False)).eval()
    if num_context_tokens < SMALL.columns:
        for layer in model.encoder.encoder.layers:
            layer.attention.qkv.weight.data[: SMALL.hidden_size] = 0
            layer.attention.qkv.bias.data[: SMALL.hidden_size].normal_()
    pixels = torch.randn(2, 3, 4, 4 * SMALL.columns)
    first = model.encoder.config.num_global_tokens
    with torch.no_grad():
        dense = model.encoder(pixels).last_hidden_state[:, first:]
        with configured(model.encoder, window_size=4):
            local = model.encoder(pixels).last_hidden_state[:, first:]
        with configured(model.encoder, window_size=4, num_context_tokens=num_context_tokens):
            stratified = model.encoder(pixels).last_hidden_state[:, first:]
        model.encoder.embeddings.cls_token.data.normal_()  # seen by none, and there is nothing to choose
        with configured(model.encoder, window_size=4, num_context_tokens=32):
            torch.testing.assert_close(model.encoder(pixels).last_hidden_state[:, first:], dense)
    torch.testing.assert_close(stratified, dense)
    assert (local - dense).abs().max() > 0.01


def test_structures_lie_where_they_should_and_the_label_compares_them(tmp_path):
    Image.new("RGB", (300, 30), (200, 200, 200)).save(tmp_path / "plain.png")
    strips = TissueStrips([tmp_path / "plain.png"], SMALL)
    distances = torch.tensor([4, 20] * 200)
    pixels, starts, labels = strips.draw(distances, torch.Generator().manual_seed(0))
    assert pixels.shape == (400, 3, 4, 128)
    tokens = (pixels * 0.2 + 0.7).unflatten(3, (32, 4)).mean(dim=(2, 4))  # (strips, channels, columns)
    ratio = tokens[:, 1] / tokens[:, 0]  # green to red: eosin takes the green
    columns = starts[:, None] + torch.arange(3)
    is_blue = torch.stack(
        [ratio.gather(1, columns + shift[:, None]).mean(dim=1) for shift in (0 * distances, distances)]
    )
    is_blue = is_blue > 0.6
    assert (is_blue[0] == is_blue[1]).long().tolist() == labels.tolist()
    assert 160 < labels.sum() < 240
    assert 160 < is_blue[0].sum() < 240  # neither structure alone says anything of the label
    assert abs((is_blue[0] & (labels == 1)).sum() - (is_blue[0] & (labels == 0)).sum()) < 50
    assert starts.min() == 0
    assert (starts + distances + 3).max() == 32
    again = strips.draw(distances, torch.Generator().manual_seed(0))[0]
    assert torch.equal(again, pixels)


def test_strips_wider_than_the_image_and_impossible_distances_are_refused(tissue):
    with pytest.raises(ValueError, match="a strip is 4000 x 4"):
        TissueStrips([tissue], LongRangeSettings(columns=1000))
    with pytest.raises(ValueError, match="between 3, where the structures touch, and 29"):
        LongRangeSettings(columns=32, distances=(30,))


def test_a_far_structure_is_learnt_where_information_gets_there(tissue):
    """That it is not learnt where none gets there follows from the places that change."""
    settings = LongRangeSettings(
        columns=32, distances=(4, 26), num_layers=2, steps=160, test_strips=64, batch_size=32, learning_rate=5e-3
    )
    strips = TissueStrips([tissue], settings)
    pattern = LongRangePattern(None, False)
    dense = long_range.train(strips, settings, pattern)
    assert (
        long_range.tested(dense, strips, settings, pattern, 26).accuracy >= 0.75
    )  # chance is a half: four standard errors


def test_the_script_writes_table_and_figure_and_goes_on(run_script, tissue, tmp_path, monkeypatch):
    flags = ["--tissue_images", str(tissue), "--output_dir", str(tmp_path), "--columns", "32", "--distances", "4,20"]
    flags += ["--windows", "0,4", "--contexts", "0,8", "--steps", "2", "--test_strips", "8"]
    run_script(script, *flags)
    with (tmp_path / "long_range.csv").open() as file:
        rows = list(csv.DictReader(file))
    of_window = [("4", has_globals, context) for has_globals in ("True", "False") for context in ("0", "8")]
    of_dense = [
        [("", has_globals, "0"), *[row for row in of_window if row[1] == has_globals]]
        for has_globals in ("True", "False")
    ]
    expected = [(*row, distance) for row in (*of_dense[0], *of_dense[1], *of_window) for distance in ("4", "20")]
    columns = ("window_size", "has_globals", "num_context_tokens", "distance")
    assert [tuple(row[name] for name in columns) for row in rows] == expected
    assert [row["trained"] for row in rows[:14:2]] == ["dense"] * 3 + ["dense, no globals"] * 3 + ["w = 4"]
    assert (tmp_path / "long_range.png").stat().st_size > 10_000
    lines = (tmp_path / "long_range.csv").read_text().splitlines(keepends=True)
    (tmp_path / "long_range.csv").write_text("".join(lines[:-1]))  # as if stopped inside the last model
    trained, train = [], long_range.train
    monkeypatch.setattr(script, "train", lambda *arguments: trained.append(arguments[2]) or train(*arguments))
    run_script(script, *flags)
    assert trained == [LongRangePattern(4, False, 8)]
    assert (tmp_path / "long_range.csv").read_text().splitlines(keepends=True) == lines
