# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.data import immunohistochemistry
from small_models import small_config, small_model

from sparsepath_vit import SparsePathViTModel
from studies.tiny_pretraining import objective as pretraining
from studies.tiny_pretraining.crops import CropSampler

MEAN, STD = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)


def test_descriptors_are_those_of_each_patch_alone():
    """Density and spread of a patch do not depend on where it lies or what lies around it."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.rand(2, 3, 12, 8, generator=generator)
    descriptors = pretraining.patch_descriptors(pixels, 4)
    assert descriptors.shape == (2, 6, pretraining.DESCRIPTOR_SIZE)
    patch = pixels[1, :, 8:12, 4:8]  # row 2, column 1
    density = -patch.clamp(min=1 / 255).log()
    spread = (density.flatten(1).std(dim=1, correction=0) + 1e-3).log()
    torch.testing.assert_close(descriptors[1, 5, -3:], spread, rtol=1e-4, atol=1e-4)
    cells = density.view(3, 2, 2, 2, 2).mean(dim=(2, 4)).flatten()  # channel, cell row, cell column
    torch.testing.assert_close(descriptors[1, 5, :12], cells)


def test_oriented_energy_tells_stripes_apart():
    rows = torch.arange(16) % 4 < 2
    horizontal = torch.where(rows[:, None], 0.9, 0.3).expand(16, 16).expand(1, 3, 16, 16)
    across, down = (
        pretraining.patch_descriptors(pixels, 8)[0, :, 12:20].exp().view(-1, 2, 4).mean(dim=(0, 2))
        for pixels in (horizontal, horizontal.transpose(2, 3))
    )
    assert across[1] > 50 * across[0]
    assert down[0] > 50 * down[1]


def test_glass_has_little_energy():
    pixels = torch.from_numpy(immunohistochemistry()[:112, :112] / 255).permute(2, 0, 1)[None].float()
    pixels[..., 56:] = 0.93
    energy = pretraining.stain_energy(pixels, 14).view(8, 8)
    assert energy[:, :3].min() > 2 * energy[:, 5:].max()


def test_the_attention_term_is_that_of_the_prune_score():
    """What training shapes is what pruning reads."""
    config = small_config(window_size=None)
    module = pretraining.SparsePathViTPretraining(config, MEAN, STD)
    module.encoder = small_model(SparsePathViTModel, window_size=None, prune_ratio=0.5)
    pixels = torch.randn(2, 3, 24, 24)
    with torch.no_grad():
        outputs = module.encoder(pixels, output_hidden_states=True)
        received = module._global_attention(outputs.hidden_states[config.prune_after_layer - 1])
    wanted = outputs.prune_scores / outputs.prune_scores.sum(dim=1, keepdim=True)
    torch.testing.assert_close(received, wanted, rtol=1e-4, atol=1e-6)


def test_missing_patches_are_judged_where_they_are():
    """Only the errors of tokens the encoder did not see count, each against its own place."""
    module = pretraining.SparsePathViTPretraining(small_config(window_size=None), MEAN, STD)
    descriptors = torch.randn(1, 4, pretraining.DESCRIPTOR_SIZE)
    is_visible = torch.tensor([[[True, False], [True, True]]])
    positions = torch.tensor([[[0, 0], [1, 0], [1, 1]]])
    tokens = torch.randn(1, 3 + 3, 32)
    before = module._patch_loss(tokens, positions, is_visible, descriptors)
    seen, missing = descriptors.clone(), descriptors.clone()
    seen[0, [0, 2, 3]] += 1.0
    missing[0, 1] += 1.0
    assert torch.equal(module._patch_loss(tokens, positions, is_visible, seen), before)
    assert not torch.equal(module._patch_loss(tokens, positions, is_visible, missing), before)


def test_views_of_one_place_attract_and_others_repel():
    places = torch.eye(4)
    together = pretraining._view_loss(torch.cat([places, places]))
    apart = pretraining._view_loss(torch.cat([places, places.roll(1, dims=0)]))
    assert together < 0.2 < 1.0 < apart


def test_every_weight_of_the_encoder_is_trained():
    config = small_config(window_size=None, layerscale_value=0.3)
    module = pretraining.SparsePathViTPretraining(config, MEAN, STD)
    is_visible = pretraining.visible_tokens(4, 6, 20, torch.Generator().manual_seed(0))
    assert is_visible.sum(dim=(1, 2)).tolist() == [20] * 4
    module(torch.rand(4, 3, 24, 24), is_visible).total().backward()
    untrained = [name for name, weight in module.named_parameters() if weight.grad is None or not weight.grad.any()]
    assert untrained == []


@pytest.fixture
def sampler(tmp_path):
    Image.fromarray(immunohistochemistry()[:300, :260]).save(tmp_path / "tissue.png")
    return lambda **settings: CropSampler([tmp_path / "tissue.png"], **{"seed": 3, **settings})


def test_views_follow_from_seed_and_step_alone(sampler):
    first, second = sampler(), sampler()
    second.views(0, 2, 28)  # a resumed run has not drawn the earlier steps
    assert torch.equal(first.views(5, 2, 28), second.views(5, 2, 28))
    assert not torch.equal(first.views(5, 2, 28), first.views(6, 2, 28))
    assert not torch.equal(first.views(5, 2, 28), sampler(seed=4).views(5, 2, 28))


def test_views_show_the_same_place_in_both_halves(sampler):
    views = sampler(glass_share=0.0, scales=(1.0, 2.0)).views(0, 24, 42)
    assert views.shape == (48, 3, 42, 42)
    assert 0 <= views.min() < views.max() <= 1
    darkness = (1 - views).mean(dim=(1, 2, 3))
    correlation = np.corrcoef(darkness[:24], darkness[24:])[0, 1]
    assert correlation > 0.5


def test_glass_is_painted_into_the_stated_share_of_views(sampler):
    def has_glass(views):
        return (views.amin(dim=1) > 0.8).float().mean(dim=(1, 2)) > 0.15

    without = has_glass(sampler(glass_share=0.0).views(0, 20, 42))
    always = has_glass(sampler(glass_share=1.0).views(0, 20, 42))
    assert without.float().mean() < 0.3
    assert always.all()


def test_no_image_is_refused():
    with pytest.raises(ValueError, match="no image to train on"):
        CropSampler([], seed=0)
