# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Real tissue through processor and model; skipped where the shared data folder is absent."""

import pytest
import torch
from PIL import Image
from places import SHARED_DATA
from small_models import small_model

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTImageProcessor, SparsePathViTModel

DATA = SHARED_DATA
ROIS = sorted((DATA / "rois").glob("*.*"))
OSTEOSARCOMA = sorted((DATA / "classification" / "osteosarcoma_roi").rglob("*.*"))

pytestmark = pytest.mark.skipif(not ROIS, reason="../shared/data is not here")
PATCH_SIZE = 14


@pytest.fixture(scope="module")
def processor():
    return SparsePathViTImageProcessor(patch_size=PATCH_SIZE)


@pytest.mark.parametrize("path", ROIS, ids=lambda path: path.stem)
def test_a_region_keeps_the_stated_share_of_its_tokens_and_stays_itself(path, processor):
    model = small_model(SparsePathViTModel, patch_size=PATCH_SIZE, image_size=224, window_size=8, prune_ratio=0.6)
    inputs = processor(path, return_tensors="pt")
    with torch.inference_mode():
        outputs = model(**inputs)
        model.config.prune_ratio = 0.0
        unpruned = model(**inputs)
    with Image.open(path) as image:
        rows, columns = (-(-side // PATCH_SIZE) for side in (image.height, image.width))
    present = int(inputs["patch_mask"].sum())
    assert outputs.grid_sizes.tolist() == [[rows, columns]]
    assert outputs.patch_positions.shape[1] == present - int(0.6 * present)
    assert torch.isfinite(outputs.last_hidden_state).all()
    assert unpruned.last_hidden_state.shape[1] == model.config.num_global_tokens + present
    # Kept are the highest scores, and only they.
    kept = torch.zeros(rows, columns, dtype=torch.bool)
    kept[outputs.patch_positions[0, :, 0], outputs.patch_positions[0, :, 1]] = True
    scores = outputs.prune_scores[0].view(rows, columns)
    assert scores[kept].min() >= scores[~kept & inputs["patch_mask"][0]].max()


def test_the_two_block_sparse_and_the_dense_mask_agree_on_a_real_region(processor):
    model = small_model(SparsePathViTModel, patch_size=PATCH_SIZE, image_size=224, window_size=8, prune_ratio=0.6)
    with Image.open(DATA / "rois" / "cmu1_1120x1120.png") as image:
        inputs = processor(image.crop((0, 0, 560, 620)), return_tensors="pt")
    with torch.inference_mode():
        sparse = model(**inputs)
        model.set_attn_implementation("eager")
        eager = model(**inputs)
    assert torch.equal(sparse.patch_positions, eager.patch_positions)
    difference = (sparse.last_hidden_state - eager.last_hidden_state).abs().max()
    assert difference <= 2e-5 * eager.last_hidden_state.abs().max()


def test_labelled_regions_of_three_classes_can_be_told_apart_by_training_on_them(processor):
    """Smoke test of the whole path, not of quality: six images are learned by heart."""
    paths = [path for folder in sorted({path.parent for path in OSTEOSARCOMA}) for path in sorted(folder.iterdir())[:2]]
    labels = torch.tensor([index // 2 for index in range(len(paths))])
    images = [Image.open(path).convert("RGB").resize((140, 140)) for path in paths]
    inputs = processor(images, return_tensors="pt")
    model = small_model(
        SparsePathViTForImageClassification, patch_size=PATCH_SIZE, image_size=56, num_labels=3, prune_ratio=0.3
    ).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(60):
        loss = model(**inputs, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    assert (model.eval()(**inputs).logits.argmax(dim=-1) == labels).all()
