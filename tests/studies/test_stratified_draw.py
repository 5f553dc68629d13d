# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import dataclasses
import logging

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import random_pixels, small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.runtime.configured import configured
from studies import regions
from studies.results import ResultsTable
from studies.stratified_draw import __main__ as study
from studies.stratified_draw.draws import (
    DrawRule,
    LayerState,
    Tokens,
    cell_side,
    draw,
    draw_representatives,
    num_cells,
    region_side,
    wide_cell,
)
from studies.stratified_draw.forward import Settings, attend, block_attention, run
from studies.stratified_draw.layers import layer_errors
from studies.stratified_draw.measure import distance_to_dense, estimated_cls_error

GRID = (13, 22)
UNBIASED = {"random": DrawRule(), "exact": DrawRule(exact=12), "by mass": DrawRule(importance=0.7)}


@pytest.fixture(scope="module")
def model():
    return small_model(SparsePathViTModel, num_register_tokens=0, window_size=None)


@pytest.fixture(scope="module")
def pixels():
    return random_pixels(1, *GRID)


def state_of(num_tokens, layer=1):
    generator = torch.Generator().manual_seed(3)
    mass, before, of_mean = torch.rand(3, num_tokens, generator=generator) ** 4
    key, value = torch.randn(2, 2, num_tokens, 8, generator=generator)
    return LayerState(layer, mass, before, key, value, of_mean)


@pytest.mark.parametrize("prune_ratio", [0.0, 0.6])
def test_without_samples_it_is_the_library(model, pixels, prune_ratio):
    for window in (None, 4):
        found = run(model, pixels, Settings(window=window, prune_ratio=prune_ratio, prune_after_layer=2))
        with configured(model, window_size=window, prune_ratio=prune_ratio):
            expected = model(pixels)
        states = torch.cat([found.cls[None], found.patches])
        torch.testing.assert_close(states, expected.last_hidden_state[0], atol=2e-5, rtol=2e-5)
        places = expected.patch_positions[0] @ torch.tensor([GRID[1], 1])
        assert torch.equal(found.tokens.places, places)


@pytest.mark.parametrize("rule", [*UNBIASED.values(), DrawRule(references=3), DrawRule(layers="anew", references=99)])
def test_a_sample_of_every_token_is_dense(model, pixels, rule):
    dense = run(model, pixels, Settings(window=None))
    found = run(model, pixels, Settings(rule, GRID[0] * GRID[1] + rule.exact, window=4))
    torch.testing.assert_close(found.patches, dense.patches, atol=1e-4, rtol=1e-4)
    paper = run(model, pixels, Settings(window=4))
    assert (paper.patches - dense.patches).abs().max() > 0.1


@pytest.mark.parametrize("name", UNBIASED)
def test_sums_over_tokens_are_estimated_without_bias(name):
    tokens = Tokens.full(GRID)
    tokens = tokens.select(torch.arange(0, len(tokens.rows), 2), torch.rand(143, dtype=torch.float64) * 3 + 0.5)
    state, values = state_of(143), torch.randn(143, generator=torch.Generator().manual_seed(1)).exp()
    estimates = []
    for seed in range(2000):
        drawn = draw(tokens, state, UNBIASED[name], 40, 4, seed)
        estimates.append((values[drawn.tokens] * drawn.log_weights.exp()).sum().item())
    standard_error = np.std(estimates) / len(estimates) ** 0.5
    assert abs(np.mean(estimates) - (values * tokens.weights).sum().item()) < 4 * standard_error


@pytest.mark.parametrize("rule", study.RULES.values(), ids=study.RULES)
def test_a_rule_draws_each_token_once_and_no_more_than_were_asked_for(rule):
    tokens, state = Tokens.full((32, 32)), state_of(1024)
    drawn = draw(tokens, state, rule, 256 + rule.exact, 8, seed=5)
    assert len(drawn.tokens) == len(drawn.tokens.unique())
    assert 200 <= len(drawn.tokens) <= 256 + rule.exact
    assert drawn.log_weights.isfinite().all()
    if not rule.importance:  # what the tokens stand for is the whole image
        assert drawn.log_weights.exp().sum() == pytest.approx(1024, rel=1e-4)
    again = draw(tokens, state, rule, 256 + rule.exact, 8, seed=5)
    assert torch.equal(drawn.tokens, again.tokens)
    layer = dataclasses.replace(state, layer=2)
    in_next_layer = draw(tokens, layer, rule, 256 + rule.exact, 8, seed=5)
    assert torch.equal(drawn.tokens, in_next_layer.tokens) == (rule.layers == "same")


def test_exact_tokens_are_those_of_the_largest_mass_and_stand_for_themselves():
    tokens, state = Tokens.full((32, 32)), state_of(1024)
    both = state.mass + state.mass_of_mean
    for mass_of, mass in (("own", state.mass), ("previous", state.mass_before), ("with mean query", both)):
        drawn = draw(tokens, state, DrawRule(exact=20, mass_of=mass_of), 276, 8, seed=0)
        chosen = torch.isin(drawn.tokens, mass.topk(20).indices)
        assert chosen.sum() == 20
        assert (drawn.log_weights[chosen] == 0).all()


def test_finer_cells_lie_where_keys_vary():
    tokens, state = Tokens.full((32, 32)), state_of(1024)
    busy = tokens.columns < 8
    state.key[:, ~busy] = 1.0
    drawn = draw(tokens, state, DrawRule(busy=True), 64, 8, seed=0)
    assert busy[drawn.tokens].float().mean() > 0.6


def test_equal_queries_get_the_dense_output_from_the_mean_query():
    """What the queries of a region have in common is corrected exactly, whatever was drawn."""
    tokens, state = Tokens.full(GRID), state_of(GRID[0] * GRID[1])
    key, value = (torch.cat([states[:, :1], states], dim=1) for states in (state.key, state.value))
    query = torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(2)).expand(-1, key.shape[1], -1)
    added = torch.zeros(key.shape[1])
    dense = attend(query, key, value, added)[:, 1:]
    for references, is_dense in ((1, True), (6, True), (0, False)):
        settings = Settings(DrawRule(references=references), 20, window=4)
        drawn = draw(tokens, state, settings.rule, 20, 4, seed=0)
        found, _ = block_attention(query, key, value, added, tokens, drawn, settings)
        assert torch.allclose(found, dense, atol=1e-5) == is_dense


def test_errors_of_layers_vanish_where_every_token_is_a_sample(model, pixels):
    rows = list(layer_errors(model, pixels, {"random": DrawRule(), "all": DrawRule(references=2)}, 40))
    assert [(row["layer"], row["rule"]) for row in rows] == [
        (n, rule) for n in range(1, 5) for rule in ("random", "all")
    ]
    # With a sample of every token nothing is wrong.
    exact = list(layer_errors(model, pixels, {"random": DrawRule()}, GRID[0] * GRID[1]))
    assert max(row["error"] for row in exact) < 1e-5
    assert 0 < rows[0]["common_error"] < rows[0]["error"] < 3
    assert 1 / (GRID[0] * GRID[1]) < rows[0]["largest_share"] < 1
    assert rows[0]["largest_norm"] > 1


def test_representatives_carry_the_weight_of_all_that_was_removed(model, pixels):
    found = run(
        model, pixels, Settings(None, 60, window=4, prune_ratio=0.6, prune_after_layer=2, has_representatives=True)
    )
    assert found.tokens.weights.sum().item() == pytest.approx(GRID[0] * GRID[1])
    num_kept = GRID[0] * GRID[1] - int(0.6 * GRID[0] * GRID[1])
    assert num_kept < len(found.patches) <= num_kept + 60
    removed = torch.tensor([0, 1, GRID[1], GRID[1] + 1, 20])
    drawn = draw_representatives(Tokens.full(GRID), removed, num_cells(GRID, 2), 4, seed=0)
    assert sorted(drawn.log_weights.exp().round().tolist()) == [1.0, 4.0]


@pytest.mark.parametrize(
    ("samples", "window", "side"), [(1024, 8, 2), (256, 8, 4), (168, 8, 8), (9, 8, 24), (2500, 8, 1), (700, 6, 2)]
)
def test_cells_nest_with_blocks(samples, window, side):
    assert cell_side((50, 50), samples, window) == side


def test_wide_cells_use_what_square_ones_leave():
    assert wide_cell((73, 73), 1024, 8) == (2, 4)  # 37 x 19 = 703, where 4 x 4 would give 361
    assert wide_cell((50, 50), 1024, 8) == (2, 2)  # 1 x 2 would give 1250
    assert wide_cell((8, 8), 64, 8) == (1, 1)
    assert wide_cell((200, 200), 330, 8) == (8, 16)


def test_regions_are_whole_blocks():
    assert region_side((50, 50), 64, 8) == 8
    assert region_side((100, 100), 64, 8) == 16
    assert region_side((100, 100), 1, 8) == 104


def test_an_unrelated_token_is_far_from_dense_and_two_draws_tell_the_error(model, pixels):
    dense = run(model, pixels, Settings(window=None))
    same = distance_to_dense(dense, dense)
    assert same == {name: pytest.approx(1.0) for name in ("cls_cosine", "patch_cosine", "patch_cosine_p5")}
    far = distance_to_dense(run(model, random_pixels(1, *GRID, seed=9), Settings(window=None)), dense)
    assert far["patch_cosine"] < 0.7
    runs = [run(model, pixels, Settings(DrawRule(), 80, window=4, seed=seed)) for seed in range(8)]
    true_error = np.mean([1 - distance_to_dense(one, dense)["cls_cosine"] for one in runs])
    estimates = [estimated_cls_error(runs[i], runs[i + 1]) for i in range(0, 8, 2)]
    assert 0.3 < np.mean(estimates) / true_error < 3


def test_a_model_with_registers_or_a_window_is_refused(pixels):
    for settings in ({"window_size": 4, "num_register_tokens": 0}, {"window_size": None}):
        with pytest.raises(ValueError, match="window_size=None"):
            run(small_model(SparsePathViTModel, **settings), pixels, Settings())


def test_the_tables_go_on_where_they_were_stopped(model, tmp_path, monkeypatch, caplog):
    data = tmp_path / "data"
    names = [f"rois/{name}" for name in regions.SLIDES]
    names += [f"classification/osteosarcoma_roi/{label}/{i}.jpg" for label in regions.CLASSES for i in range(3)]
    for number, name in enumerate(names):
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        noise = np.random.default_rng(number).integers(0, 255, (160, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(data / name)
    model.save_pretrained(tmp_path / "model")
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(tmp_path / "model")
    jobs = [study.Job("random", 200), study.Job("random", 200, seed=1)]
    monkeypatch.setattr(study, "passes_of", lambda part: [(tuple(range(12)), (700,), jobs)])
    monkeypatch.setattr(study, "square", lambda path, size: np.asarray(Image.open(path))[:160, :160])
    arguments = ["--model-name-or-path", str(tmp_path / "model"), "--data-dir", str(data), "--parts", "draws"]
    arguments += ["--out", str(tmp_path / "out")]

    def call(*more):
        monkeypatch.setattr("sys.argv", ["stratified_draw", *arguments, *more])
        with caplog.at_level(logging.INFO):
            study.main()

    call("--images", "1")
    call("--images", "2")
    table = ResultsTable(tmp_path / "out" / "stratified_draws.csv", study.KEYS, study.VALUES)
    assert [(row["image"], row["seed"]) for row in table.rows] == [
        (regions.SLIDES[0], "0"),
        (regions.SLIDES[0], "1"),
        ("0.jpg", "0"),
        ("0.jpg", "1"),
    ]
    assert [bool(row["estimated_cls_error"]) for row in table.rows] == [False, True, False, True]
    assert "random" in caplog.text


def test_missing_regions_are_named(tmp_path):
    with pytest.raises(ValueError, match="expected 3 regions of non_tumor, found 0"):
        list(regions.twelve_regions(tmp_path))
