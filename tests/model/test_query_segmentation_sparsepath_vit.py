# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Mask queries as extra global tokens: where they go, what they see, and what they predict, against plain attention."""

import dataclasses

import pytest
import torch
from small_models import random_mask
from small_segmentation import random_images, random_labels, segmentation_model

from sparsepath_vit import TokenGrid
from sparsepath_vit.model.query_segmentation_sparsepath_vit import join_global_tokens

SIZES = [(5, 7), (3, 2), (5, 7)]


def token_grid(num_global_tokens, present=None, sizes=SIZES):
    return TokenGrid.create(sizes, num_global_tokens=num_global_tokens, window_size=2, present=present)


class TestJoining:
    @pytest.mark.parametrize("share", [1.0, 0.5])
    def test_the_grid_is_that_of_a_model_with_more_global_tokens(self, share):
        present = random_mask(3, 5, 7, share)
        joined, expected = token_grid(3, present).with_global_tokens(8), token_grid(8, present)
        for field in dataclasses.fields(TokenGrid):
            one, other = getattr(joined, field.name), getattr(expected, field.name)
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, field.name

    @pytest.mark.parametrize("sizes", [SIZES, [(4, 4), (4, 4)]], ids=["ragged", "uniform"])
    def test_queries_lie_behind_the_global_tokens_of_each_image(self, sizes):
        grid = token_grid(2, sizes=sizes)
        tokens = torch.arange(grid.num_tokens, dtype=torch.float32).view(*grid.batch_shape, 1)
        states, joined = join_global_tokens(tokens, grid, torch.tensor([[-1.0], [-2.0], [-3.0]]))
        assert states.shape == (*joined.batch_shape, 1)
        images, start = states.flatten().split([5 + count for count in joined.counts]), 0
        for image, count in zip(images, grid.counts, strict=True):
            own = torch.arange(start, start + 2 + count, dtype=torch.float32)
            assert torch.equal(image, torch.cat([own[:2], torch.tensor([-1.0, -2.0, -3.0]), own[2:]]))
            start += 2 + count


def dense_layer(layer, states):
    """One layer of the ViT with plain attention over (batch, tokens, features)."""
    batch, tokens, features = states.shape
    qkv = layer.attention.qkv(layer.norm1(states)).view(batch, tokens, 3, layer.attention.num_heads, -1)
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    weights = (query @ key.transpose(-1, -2) * layer.attention.scaling).softmax(dim=-1)
    attended = (weights @ value).transpose(1, 2).reshape(batch, tokens, features)
    states = states + layer.layer_scale1(layer.attention.projection(attended))
    return states + layer.layer_scale2(layer.mlp(layer.norm2(states)))


class TestPredictions:
    @torch.no_grad()
    def test_equal_plain_attention_written_out(self):
        """Window of the whole image, so that every token sees every other; the queries join the last two layers."""
        model = segmentation_model("queries", vit={"window_size": None}).double()
        segmenter, backbone = model.model, model.backbone
        images = random_images(2, 40, 52).double()
        patches = backbone.embeddings.patch_embeddings(images)
        positions = backbone.embeddings._position_map((10, 13), 0, 10)
        embeddings = backbone.embeddings
        prefix = torch.cat([embeddings.cls_token, embeddings.register_tokens], dim=1).expand(2, -1, -1)
        states = torch.cat([prefix, (patches + positions).flatten(1, 2)], dim=1)
        for layer in backbone.encoder.layers[:2]:
            states = dense_layer(layer, states)
        queries = segmenter.queries.weight.expand(2, -1, -1)
        states = torch.cat([queries, states], dim=1)
        for layer in backbone.encoder.layers[2:]:
            states = dense_layer(layer, states)
        states = backbone.norm(states)
        token_map = states[:, 5 + 3 :].transpose(1, 2).reshape(2, 32, 10, 13)

        features = segmenter.mask_features
        assert features.patch_size == 4  # so that the token map already has stride 4
        mask_features = features.fusion(features.token_projection(token_map) + features.stem(images))
        masks = torch.einsum("bqc,bchw->bqhw", segmenter.mask_head(states[:, :5]), mask_features)
        outputs = model(images)
        torch.testing.assert_close(outputs.masks_queries_logits, masks, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(outputs.class_queries_logits, model.class_predictor(states[:, :5]))

    @torch.no_grad()
    @pytest.mark.parametrize("window_size", [1, 4])
    def test_queries_see_the_whole_image_through_small_windows(self, window_size):
        model = segmentation_model("queries", vit={"window_size": window_size}, num_query_layers=1)
        images = random_images(1, 48, 48)
        changed = images.clone()
        changed[:, :, 40:, 40:] += 3.0
        before, after = (model(one).class_queries_logits for one in (images, changed))
        assert (before - after).abs().amax(dim=(0, 2)).min() > 1e-3

    @torch.no_grad()
    def test_absent_patches_are_not_seen_and_images_of_several_sizes_share_a_batch(self):
        model = segmentation_model("queries")
        images = random_images(2, 48, 40)
        both = model(images, image_sizes=[(48, 40), (21, 30)])
        first = model(images[:1])
        torch.testing.assert_close(both.class_queries_logits[0], first.class_queries_logits[0], rtol=1e-3, atol=1e-3)
        second = model(images[1:, :, :24, :32], image_sizes=[(21, 30)])
        torch.testing.assert_close(both.class_queries_logits[1], second.class_queries_logits[0], rtol=1e-3, atol=1e-3)

    def test_training_predicts_after_each_layer_the_queries_took_part_in(self):
        model = segmentation_model("queries", num_query_layers=3, output_auxiliary_logits=True).train()
        outputs = model(random_images(1, 48, 48), **random_labels(48, 48, [(0, 2)]))
        assert len(outputs.auxiliary_logits) == 2
        model.config.use_auxiliary_loss = False
        assert not model(random_images(1, 48, 48)).auxiliary_logits
        assert model.eval()(random_images(1, 48, 48)).auxiliary_logits is None

    def test_queries_may_take_part_in_all_layers(self):
        model = segmentation_model("queries", num_query_layers=4, freeze_vit=True).train()
        model(random_images(1, 48, 48), **random_labels(48, 48, [(1,)])).loss.backward()
        assert model.backbone.encoder.layers[0].attention.qkv.weight.grad.abs().max() > 0


class TestPruning:
    @torch.no_grad()
    @pytest.mark.parametrize("num_query_layers", [1, 2, 3])
    def test_removed_tokens_come_back_under_the_masks(self, num_query_layers):
        """Pruning after layer 2, with queries that join before, at and after it."""
        model = segmentation_model(
            "queries", vit={"prune_ratio": 0.5, "unprune": "scatter"}, num_query_layers=num_query_layers
        )
        seen = []
        model.model.mask_features.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        model(random_images(1, 48, 48))
        counts = []
        model.backbone.encoder.layers[3].register_forward_pre_hook(lambda _, inputs: counts.append(inputs[1]))
        model(random_images(1, 48, 48))
        assert counts[0].counts == (72,) and counts[0].num_global_tokens == 3 + 5
        assert seen[0].shape == (1, 32, 12, 12) and (seen[0].abs().amax(dim=1) > 0).all()
