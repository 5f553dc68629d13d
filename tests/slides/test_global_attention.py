# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import h5py
import numpy as np
import pytest
import torch
from small_models import random_mask, random_pixels, small_model

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.slides import EmbedSettings, Slide, SlideError, embed_slides
from sparsepath_vit.slides.forward import embed_regions, embed_slide
from sparsepath_vit.slides.global_attention import GlobalAttention
from sparsepath_vit.slides.tissue import TissueMask
from sparsepath_vit.slides.token_values import read_token_values

SETTINGS = {
    "all tokens": {"prune_ratio": 0.0},
    "pruned": {"prune_ratio": 0.5},
    "pruned before the last layer": {"prune_ratio": 0.5, "prune_after_layer": 3},
    "representatives": {"prune_ratio": 0.6, "num_representatives": 9},
    "representatives before the last layer": {"prune_ratio": 0.6, "num_representatives": 9, "prune_after_layer": 3},
    "context tokens": {"prune_ratio": 0.3, "num_context_tokens": 16},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("share", [1.0, 0.6], ids=["equal images", "ragged images"])
def test_it_is_the_attention_that_the_reference_materialises(settings, share):
    model = small_model(SparsePathViTModel, **settings)
    pixels, mask = random_pixels(2, 11, 9), random_mask(2, 11, 9, share)
    listeners = [GlobalAttention(model, kind) for kind in ("heads", "mean")]
    with torch.no_grad():
        (of_heads, encoded), (mean, _) = (
            (listener, model.encode(pixels, model.token_grid(pixels, mask), after_layer=listener))
            for listener in listeners
        )
        model.set_attn_implementation("eager")
        reference = model(pixels, patch_mask=mask, output_attentions=True)
    num_global_tokens = encoded.last.grid.num_global_tokens
    for index in range(2):
        positions, probabilities = of_heads.of_image(encoded, index)
        count = len(positions)
        assert (positions == reference.patch_positions[index, :count]).all()
        rows = reference.attentions[-1][index, :, :num_global_tokens]  # (heads, global tokens, keys)
        expected = rows[..., num_global_tokens : num_global_tokens + count].permute(2, 1, 0)
        assert torch.allclose(probabilities, expected, atol=1e-6) and expected.std() > 1e-3
        assert torch.allclose(mean.of_image(encoded, index).probabilities, expected.mean(-1), atol=1e-6)


def test_a_region_and_a_whole_slide_give_the_same(small_slide, small_image, model_and_processor):
    model, processor = model_and_processor
    slide = Slide(small_slide)
    present = np.random.default_rng(0).random((32, 40)) < 0.7
    (region,) = embed_regions(model, processor, [small_image], [present], dense=True, attention="heads")
    whole = embed_slide(model, processor, slide, 0.5, TissueMask.of_mask(present, slide), attention="heads")
    assert region.attention.shape == (len(region.patch_positions), 3, 2)
    assert np.allclose(region.attention, whole.attention, atol=1e-6)
    assert embed_slide(model, processor, slide, 0.5, TissueMask.of_mask(present, slide)).attention is None


def test_tokens_that_come_back_have_none(small_image, model_and_processor):
    model, processor = model_and_processor
    present = np.ones((32, 40), dtype=bool)
    (pruned,) = embed_regions(model, processor, [small_image], [present], dense=True, attention="mean")
    model.config.unprune = "scatter"
    (all_tokens,) = embed_regions(model, processor, [small_image], [present], dense=True, attention="mean")
    has_some = ~np.isnan(all_tokens.attention).any(axis=1)
    assert (all_tokens.patch_positions[has_some] == pruned.patch_positions).all() and not has_some.all()
    assert (all_tokens.attention[has_some] == pruned.attention).all()


def test_stored_attention_is_shown_relative_to_equal_attention(embedded):
    with h5py.File(embedded[1]) as file:
        stored, counts = file["attention"][:], file["patch_counts"][:]
    assert stored.shape == (counts.sum(), 3, 2) and len(set(counts.tolist())) > 1
    factors = np.repeat(counts, counts)
    for value, expected in (
        ("attention", stored.mean((1, 2))),
        ("attention:0", stored[:, 0].mean(1)),
        ("attention:2:1", stored[:, 2, 1]),
    ):
        tokens = read_token_values(embedded[1], value)
        assert np.allclose(tokens.values, expected * factors), value
        assert tokens.name == value.replace(":2:1", "_token_2_head_1").replace(":0", "_token_0")
    for value in ("attention:3", "attention:0:2"):
        with pytest.raises(SlideError, match="counted from 0"):
            read_token_values(embedded[1], value)


def test_only_what_can_be_stored_is_asked_for(small_slide, model_folder, tmp_path):
    for settings, message in (
        (EmbedSettings(attention="mean"), "ask for them too"),
        (EmbedSettings(attention="all", dense=True), "attention='all' is unknown"),
    ):
        with pytest.raises(ValueError, match=message):
            embed_slides([small_slide], model_folder, tmp_path / "out", settings, device="cpu")
    settings = EmbedSettings(region_size=256, dense=True, attention="mean")
    embed_slides([small_slide], model_folder, tmp_path / "out", settings, device="cpu")
    with pytest.raises(SlideError, match="head 1 is not stored"):
        read_token_values(tmp_path / "out/small.h5", "attention:0:1")
