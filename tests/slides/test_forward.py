# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import threading
import time

import numpy as np
import pytest
import torch
from set_clock import SetClock
from slide_files import stained_image, write_pyramid

from sparsepath_vit.slides import Slide, SlideError, forward
from sparsepath_vit.slides.forward import Stopwatch, embed_regions, embed_slide, read_ahead, slide_strips
from sparsepath_vit.slides.tissue import TissueMask

PATCH = 16
FIELDS = ("pooled", "patch_features", "patch_positions", "token_positions", "prune_scores")


def random_tissue(slide, share=0.5, seed=0):
    width, height = slide.dimensions
    mask = np.random.default_rng(seed).random((height // 32, width // 32)) < share
    return TissueMask.of_mask(mask, slide)


def assert_same(one, other, tolerance=1e-5):
    assert one.grid_size == other.grid_size
    for name in FIELDS:
        a, b = getattr(one, name), getattr(other, name)
        if a is None or b is None:
            assert a is b, name
        elif a.dtype == np.int32:
            assert (a == b).all(), name
        else:
            scale = np.abs(a.astype(float)).max()
            limit = (
                max(tolerance, 2e-3) if a.dtype == np.float16 else tolerance
            )  # half precision is how features are stored
            assert np.abs(a.astype(float) - b).max() <= limit * scale, name


@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
@pytest.mark.parametrize("mpp", [0.5, 0.8])
@pytest.mark.parametrize("strip_pixels", [1, 100_000, 10**9], ids=["one row", "many strips", "one strip"])
def test_whole_slide_equals_its_pixels_as_one_image(
    small_image, tmp_path, model_and_processor, prune_ratio, mpp, strip_pixels, monkeypatch
):
    monkeypatch.setattr("sparsepath_vit.slides.forward._STRIP_PIXELS", strip_pixels)
    model, processor = model_and_processor
    model.config.prune_ratio = prune_ratio
    slide = Slide(write_pyramid(tmp_path / "slide.tiff", small_image[:500, :630]))
    tissue = random_tissue(slide)
    present = tissue.token_grid(slide, PATCH, mpp)
    image = slide.read_region(0, 0, present.shape[1] * PATCH, present.shape[0] * PATCH, mpp, pad=True)
    (expected,) = embed_regions(model, processor, [image], [present], dense=True)
    embedding = embed_slide(model, processor, slide, mpp, tissue)
    assert len(embedding.token_positions) == present.sum() > 50
    assert len(embedding.patch_features) == present.sum() - int(prune_ratio * present.sum())
    # Where pixels are resampled, strips may differ in the last bit.
    assert_same(embedding, expected, tolerance=1e-5 if mpp == 0.5 else 0.02)


@pytest.mark.parametrize("pooling", ["cls", "cls_mean"])
def test_with_unprune_slides_and_regions_hold_all_positions_as_the_model_does(
    small_image, tmp_path, model_and_processor, pooling
):
    """Regression: `embed_slide` returned the kept positions alone."""
    model, processor = model_and_processor
    model.config.unprune, model.config.pooling = "scatter", pooling
    slide = Slide(write_pyramid(tmp_path / "slide.tiff", small_image))
    tissue = random_tissue(slide)
    present = tissue.token_grid(slide, PATCH, 0.5)
    with torch.no_grad():
        pixels = processor(small_image, mask_background=False, return_tensors="pt")["pixel_values"]
        outputs = model(pixels, patch_mask=torch.from_numpy(present)[None])
    features = outputs.last_hidden_state[0, model.config.num_global_tokens :].numpy()
    (of_region,) = embed_regions(model, processor, [small_image], [present], dense=True)
    for embedding in (embed_slide(model, processor, slide, 0.5, tissue), of_region):
        assert (embedding.patch_positions == np.argwhere(present)).all()
        assert (embedding.patch_positions == outputs.patch_positions[0].numpy()).all()
        assert np.abs(embedding.patch_features - features).max() < 2e-3 * np.abs(features).max()
        assert np.allclose(embedding.pooled, outputs.pooler_output[0], rtol=1e-4, atol=1e-5)
        scores = outputs.prune_scores[0].view(present.shape)[torch.from_numpy(present)]
        assert np.allclose(embedding.prune_scores, scores, rtol=1e-4)


def test_regions_equal_the_model_called_by_hand(small_image, model_and_processor):
    model, processor = model_and_processor
    present = np.zeros((32, 40), bool)
    present[5:20, 3:25] = True
    (embedding,) = embed_regions(model, processor, [small_image], [present], dense=True)
    inputs = processor(small_image, return_tensors="pt")
    outputs = model(inputs["pixel_values"], patch_mask=torch.from_numpy(present)[None])
    assert np.allclose(embedding.pooled, outputs.pooler_output[0].detach())
    first_patch = model.config.num_global_tokens
    features = outputs.last_hidden_state[0, first_patch:].detach().numpy()
    assert np.abs(embedding.patch_features - features).max() < 2e-3 * np.abs(features).max()
    assert (embedding.patch_positions == outputs.patch_positions[0].numpy()).all()
    assert present[tuple(embedding.token_positions.T)].all() and len(embedding.token_positions) == present.sum()
    scores = outputs.prune_scores[0].view(32, 40)[torch.from_numpy(present)].numpy()
    assert np.allclose(embedding.prune_scores, scores) and scores.std() > 0


def test_batch_of_different_sizes_and_masks_equals_each_alone(small_image, model_and_processor):
    model, processor = model_and_processor
    images = [small_image[:320, :480], small_image[64:192], small_image[:512, 100:260]]
    generator = np.random.default_rng(0)
    tokens = [generator.random((image.shape[0] // PATCH, image.shape[1] // PATCH)) < 0.6 for image in images]
    together = embed_regions(model, processor, images, tokens, dense=True)
    for image, present, embedding in zip(images, tokens, together, strict=True):
        (alone,) = embed_regions(model, processor, [image], [present], dense=True)
        assert_same(embedding, alone)


def test_background_never_enters_the_network(small_image, tmp_path, model_and_processor):
    model, processor = model_and_processor
    tissue_box = np.s_[96:352, 64:448]
    changed = np.random.default_rng(0).integers(0, 256, small_image.shape, dtype=np.uint8)
    changed[tissue_box] = small_image[tissue_box]
    embeddings = []
    for name, image in (("one", small_image), ("other", changed)):
        slide = Slide(write_pyramid(tmp_path / f"{name}.tiff", image))
        mask = np.zeros((512, 640), bool)
        mask[tissue_box] = True
        embeddings.append(embed_slide(model, processor, slide, 0.5, TissueMask.of_mask(mask, slide)))
    assert len(embeddings[0].token_positions) == 16 * 24
    for name in FIELDS:
        assert (getattr(embeddings[0], name) == getattr(embeddings[1], name)).all(), name


def test_prune_ratio_counts_tissue_tokens(small_slide, model_and_processor):
    model, processor = model_and_processor
    slide = Slide(small_slide)
    tissue = random_tissue(slide, 0.3)
    count = tissue.token_grid(slide, PATCH, 0.5).sum()
    embedding = embed_slide(model, processor, slide, 0.5, tissue)
    assert len(embedding.patch_positions) == count - count // 2


def test_representatives_of_a_slide_stand_for_its_tissue(small_image, tmp_path, model_and_processor):
    model, processor = model_and_processor
    model.config.num_context_tokens, model.config.num_representatives = 60, 20
    slide = Slide(write_pyramid(tmp_path / "slide.tiff", small_image[:500, :630]))
    tissue = random_tissue(slide)
    present = tissue.token_grid(slide, PATCH, 0.5)
    image = slide.read_region(0, 0, present.shape[1] * PATCH, present.shape[0] * PATCH, 0.5, pad=True)
    (expected,) = embed_regions(model, processor, [image], [present], dense=True)
    embedding = embed_slide(model, processor, slide, 0.5, tissue)
    assert_same(embedding, expected)
    assert (embedding.patch_weights == expected.patch_weights).all()
    assert embedding.patch_weights.dtype == np.int32 and embedding.patch_weights.sum() == present.sum()
    assert embedding.patch_weights.max() > 1 and len(embedding.patch_weights) == len(embedding.patch_features)
    model.config.unprune = "scatter"
    assert (embed_slide(model, processor, slide, 0.5, tissue).patch_weights == np.ones(present.sum())).all()
    model.config.num_representatives = 0
    assert embed_slide(model, processor, slide, 0.5, tissue).patch_weights is None


def test_tissue_is_found_where_none_is_given(small_slide, model_and_processor):
    model, processor = model_and_processor
    embedding = embed_slide(model, processor, Slide(small_slide), dense=False)
    assert embedding.patch_features is None and 16 * 24 <= len(embedding.token_positions) <= 24 * 32


def test_slide_without_a_tissue_token_is_refused(small_slide, model_and_processor):
    slide = Slide(small_slide)
    nothing = TissueMask.of_mask(np.zeros((10, 10), bool), slide)
    with pytest.raises(SlideError, match="smaller than half a patch token"):
        embed_slide(*model_and_processor, slide, 0.5, nothing)


def test_dense_implementations_are_refused_for_whole_slides(small_slide, model_and_processor):
    model, processor = model_and_processor
    model.set_attn_implementation("sdpa")
    with pytest.raises(ValueError, match=r'set_attn_implementation\("block_sparse"\)'):
        embed_slide(model, processor, Slide(small_slide))


def test_strips_are_read_only_where_there_is_tissue(tmp_path, monkeypatch):
    slide = Slide(write_pyramid(tmp_path / "wide.tiff", stained_image(4096, 256, [(0, 0, 4096, 256)]), factors=()))
    present = np.zeros((16, 256), bool)
    present[2, [0, 3, 200, 255]] = True
    present[9, 100] = True
    monkeypatch.setattr("sparsepath_vit.slides.forward._STRIP_ROWS", 4)
    read = []
    read_region = slide.read_region
    monkeypatch.setattr(
        slide, "read_region", lambda *args, **options: read.append(args) or read_region(*args, **options)
    )
    strips = list(slide_strips(slide, present, PATCH, 0.5))
    assert [strip.shape for strip in strips] == [(64, 4096, 3)] * 4
    assert [args[:4] for args in read] == [
        (0, 0, 64, 64),
        (3200, 0, 16, 64),
        (4080, 0, 16, 64),
        (1600, 128, 16, 64),
    ]
    assert (strips[0][:, 3200:3216] == read_region(3200, 0, 16, 64)).all()
    assert (strips[1] == 255).all()


def test_read_ahead_keeps_order_and_a_bounded_distance():
    started, taken, furthest = [], 0, 0

    def read(item):
        nonlocal furthest
        started.append(item)
        furthest = max(furthest, item - taken)
        time.sleep(0.001 * (item % 3))
        return item * 10

    for expected, result in enumerate(read_ahead(read, range(50), workers=4)):
        assert result == expected * 10
        taken = expected
    assert len(started) == 50 and 2 <= furthest <= 5


def test_read_ahead_passes_errors_on_and_ends_its_threads():
    def read(item):
        if item == 3:
            raise SlideError("tile 3")
        return item

    before = threading.active_count()
    results = []
    with pytest.raises(SlideError, match="tile 3"):
        results.extend(read_ahead(read, range(100), workers=4))
    for _ in read_ahead(lambda item: item, range(100), workers=4):
        break
    end = time.monotonic() + 30  # on a busy machine a thread that was told to end needs its turn
    while threading.active_count() > before:
        assert time.monotonic() < end
        time.sleep(0.01)


def test_stopwatch_counts_waiting_only(monkeypatch):
    clock = SetClock()
    monkeypatch.setattr(forward, "time", clock)

    def slow():
        for item in range(3):
            clock.sleep(0.02)
            yield item

    watch = Stopwatch()
    for _ in watch.watch(slow()):
        clock.sleep(0.05)
    assert watch.seconds == pytest.approx(0.06)


@pytest.mark.parametrize("tokens_per_strip", [0, 40])
@pytest.mark.parametrize("prune_ratio", [0.0, 0.5])
def test_one_progress_bar_counts_embeddings_layers_and_strips(
    small_slide, model_and_processor, prune_ratio, tokens_per_strip, monkeypatch
):
    model, processor = model_and_processor
    monkeypatch.setattr(model.config, "prune_ratio", prune_ratio)
    monkeypatch.setattr(model.config, "tokens_per_strip", tokens_per_strip)
    bars, bar_class = [], forward.tqdm
    monkeypatch.setattr(forward, "tqdm", lambda **settings: bars.append(bar_class(**settings)) or bars[-1])
    with Slide(small_slide) as slide:
        embed_slide(model, processor, slide, show_progress=True)
        embed_slide(model, processor, slide)
    shown, hidden = bars
    assert shown.n == shown.total > 0 and shown.desc == slide.name
    assert hidden.n == 0


def test_an_interrupt_ends_a_forward_between_strips(small_slide, model_and_processor, monkeypatch):
    model, processor = model_and_processor
    monkeypatch.setattr(model.config, "tokens_per_strip", 40)
    updates = []

    def update(bar, tokens):
        updates.append(tokens)
        if len(updates) == 7:
            raise KeyboardInterrupt

    monkeypatch.setattr(forward.tqdm, "update", update)
    with Slide(small_slide) as slide, pytest.raises(KeyboardInterrupt):
        embed_slide(model, processor, slide, show_progress=True)
    assert len(updates) == 7
