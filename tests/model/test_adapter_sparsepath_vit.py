# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The adapter: sizes of the pyramid, an independent slow extractor, alignment, freezing, pruning, loading."""

import math

import pytest
import torch
from small_models import SMALL, large_weights_, random_mask, small_config, small_model
from test_deformable_attention import by_definition
from transformers import AutoBackbone, AutoConfig, Mask2FormerConfig, Mask2FormerForUniversalSegmentation

from sparsepath_vit import (
    SparsePathViTAdapterBackbone,
    SparsePathViTAdapterConfig,
    SparsePathViTForImageClassification,
    SparsePathViTModel,
)
from sparsepath_vit.model.adapter_sparsepath_vit import flatten_maps, split_maps, token_map_at_stride

SMALL_ADAPTER = {"adapter_dim": 16, "adapter_num_heads": 2, "adapter_num_points": 2, "adapter_stem_dim": 8}


def adapter_config(**overrides):
    return SparsePathViTAdapterConfig(**{**SMALL, **SMALL_ADAPTER, **overrides})


def adapter_backbone(seed=0, **overrides):
    return large_weights_(SparsePathViTAdapterBackbone(adapter_config(**overrides)), seed).eval()


def pixels(batch, height, width, seed=0):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


def expected_sizes(height, width):
    return [(math.ceil(height / stride), math.ceil(width / stride)) for stride in (4, 8, 16, 32)]


class TestConfig:
    def test_reads_after_each_quarter_and_returns_four_maps(self):
        config = adapter_config(num_hidden_layers=24)
        assert config.adapter_layers == [6, 12, 18, 24]
        assert config.out_features == ["stage1", "stage2", "stage3", "stage4"]
        assert adapter_config(num_hidden_layers=2, prune_after_layer=1).adapter_layers == [1, 2]
        assert SparsePathViTAdapterConfig().adapter_dim == 256

    def test_saved_and_loaded_through_auto_config(self, tmp_path):
        config = adapter_config(adapter_layers=[1, 3], adapter_norm="group", out_features=["stage2", "stage4"])
        config.save_pretrained(tmp_path)
        loaded = AutoConfig.from_pretrained(tmp_path)
        assert type(loaded) is SparsePathViTAdapterConfig
        assert {**loaded.to_dict(), "_name_or_path": ""} == config.to_dict()
        assert loaded.auto_map["AutoBackbone"] == "adapter_sparsepath_vit.SparsePathViTAdapterBackbone"

    def test_takes_the_shape_of_a_vit_but_not_its_labels_or_stages(self):
        vit_config = small_config(window_size=7, out_features=["stage4"], id2label={0: "a", 1: "b", 2: "c"})
        config = SparsePathViTAdapterConfig.from_vit_config(vit_config, adapter_dim=32, neighbor_radius=2)
        assert (config.hidden_size, config.window_size, config.neighbor_radius, config.adapter_dim) == (32, 7, 2, 32)
        assert config.num_labels == 2 and len(config.out_features) == 4

    @pytest.mark.parametrize(
        "overrides, message",
        [
            ({"adapter_layers": [3, 2]}, r"adapter_layers=\[3, 2\] does not fit num_hidden_layers=4.*ascending"),
            ({"adapter_layers": [0, 2]}, r"adapter_layers=\[0, 2\]"),
            ({"adapter_layers": [5]}, r"adapter_layers=\[5\] does not fit num_hidden_layers=4"),
            ({"adapter_layers": []}, r"adapter_layers=\[\]"),
            ({"adapter_dim": 15}, "adapter_dim=15 is not divisible by adapter_num_heads=2"),
            ({"adapter_num_points": 0}, "adapter_num_points=0 is not possible"),
            ({"adapter_feedforward_ratio": 0}, "adapter_feedforward_ratio=0 is not possible"),
            ({"adapter_norm": "layer"}, "adapter_norm='layer' is unknown"),
        ],
    )
    def test_wrong_values_are_named(self, overrides, message):
        with pytest.raises(ValueError, match=message):
            adapter_config(**overrides)


class TestPyramid:
    @torch.no_grad()
    @pytest.mark.parametrize(
        "height, width, norm",
        [(196, 196, "batch"), (462, 462, "group"), (980, 980, "batch"), (984, 700, "group"), (33, 75, "group"),
         (14, 14, "batch")],
    )  # fmt: skip
    def test_sizes_are_rounded_up(self, height, width, norm):
        backbone = adapter_backbone(patch_size=14, image_size=84, num_hidden_layers=2, prune_after_layer=1,
                                    adapter_norm=norm, adapter_stem_dim=4, window_size=8)  # fmt: skip
        maps = backbone(pixels(1, height, width)).feature_maps
        assert [tuple(one.shape) for one in maps] == [(1, 16, *size) for size in expected_sizes(height, width)]
        assert all(one.isfinite().all() for one in maps)

    def test_an_image_too_small_is_named(self):
        backbone = adapter_backbone()
        with pytest.raises(ValueError, match=r"32 x 20 px.*more than 32 px"):
            adapter_backbone(adapter_norm="group")(pixels(1, 32, 20))
        with pytest.raises(ValueError, match="40 x 1 px, smaller than one patch of 4 px"):
            backbone(pixels(1, 40, 1))
        with pytest.raises(ValueError, match=r"shape \(3, 8, 8\).*batch"):
            backbone(pixels(1, 8, 8)[0])

    @torch.no_grad()
    def test_only_the_stages_asked_for(self):
        full, some = adapter_backbone(), adapter_backbone(out_features=["stage1", "stage3"])
        some.load_state_dict(full.state_dict())
        maps = full(pixels(1, 40, 52)).feature_maps
        assert some.channels == [16, 16]
        for one, other in zip(some(pixels(1, 40, 52)).feature_maps, (maps[0], maps[2]), strict=True):
            assert torch.equal(one, other)

    @torch.no_grad()
    @pytest.mark.parametrize("stride", [4, 8, 16, 32])
    def test_patches_stay_on_their_pixels(self, stride):
        """A map that holds each patch's centre pixel holds each cell's centre pixel afterwards, also at stride 4."""
        patch_size, patches, length = 14, 12, 165
        centers = (torch.arange(patches).double() + 0.5) * patch_size
        token_map = torch.stack([centers[None].expand(5, -1), torch.zeros(5, patches).double()])[None]
        cells = math.ceil(length / stride)
        resampled = token_map_at_stride(token_map, patch_size, stride, (3, cells))
        assert resampled.shape == (1, 2, 3, cells)
        expected = ((torch.arange(cells).double() + 0.5) * stride).clamp(centers[0], centers[-1])
        torch.testing.assert_close(resampled[0, 0, 1], expected)

    def test_maps_are_flattened_and_split_in_raster_order(self):
        shapes = [(2, 3), (1, 2)]
        maps = [torch.randn(2, 4, *shape) for shape in shapes]
        cells = flatten_maps(maps)
        assert torch.equal(cells[1, 4], maps[0][1, :, 1, 1]) and torch.equal(cells[0, 7], maps[1][0, :, 0, 1])
        for one, other in zip(split_maps(cells, shapes), maps, strict=True):
            assert torch.equal(one, other)


def slow_extractor(extract, cells, shapes, token_map):
    """One extractor in float64: token_map (1, hidden, rows, columns); the attention point by point."""
    rows, columns = token_map.shape[2:]
    tokens = extract.token_norm(token_map.flatten(2).transpose(1, 2))
    attention = extract.attention
    heads, _, points = attention.points_shape
    value = attention.value_projection(tokens).view(1, rows * columns, heads, -1)
    queries = extract.query_norm(cells)
    offsets = attention.sampling_offsets(queries).view(1, -1, heads, 1, points, 2)
    weights = attention.attention_weights(queries).view(1, -1, heads, points).softmax(-1)[:, :, :, None]
    locations = torch.empty_like(offsets)
    query = 0
    for (height, width), stride in zip(shapes, (8, 16, 32), strict=True):
        for row in range(height):
            for column in range(width):
                x, y = (column + 0.5) * stride / extract.patch_size, (row + 0.5) * stride / extract.patch_size
                locations[:, query, ..., 0] = (x + offsets[:, query, ..., 0]) / columns
                locations[:, query, ..., 1] = (y + offsets[:, query, ..., 1]) / rows
                query += 1
    cells = cells + attention.output_projection(by_definition(value, [(rows, columns)], locations, weights))
    feed_forward = extract.feed_forward
    hidden = feed_forward.fc1(extract.feed_forward_norm(cells))
    parts, start = [], 0
    for height, width in shapes:
        part = hidden[:, start : start + height * width].transpose(1, 2).reshape(1, -1, height, width)
        parts.append(feed_forward.convolution(part).flatten(2).transpose(1, 2))
        start += height * width
    return cells + feed_forward.fc2(torch.nn.functional.gelu(torch.cat(parts, dim=1)))


class TestAgainstASlowImplementation:
    @torch.no_grad()
    @pytest.mark.parametrize("height, width", [(30, 44), (20, 20)])
    def test_the_whole_pyramid(self, height, width):
        """Everything but the ViT and the convolutions written again, on a patch size that divides no stride."""
        backbone = adapter_backbone(patch_size=6, image_size=36, adapter_layers=[2, 4]).double()
        images = pixels(1, height, width).double()
        padded = torch.nn.functional.pad(images, (0, -width % 6, 0, -height % 6), mode="replicate")
        encoder = SparsePathViTModel(small_config(patch_size=6, image_size=36)).double().eval()
        encoder.load_state_dict({**backbone.state_dict(), **encoder.norm.state_dict(prefix="norm.")}, strict=False)
        states = encoder(padded, output_hidden_states=True).hidden_states
        rows, columns = padded.shape[2] // 6, padded.shape[3] // 6

        finest, *pyramid = backbone.spatial_prior(images)
        shapes = [tuple(one.shape[2:]) for one in pyramid]
        cells = torch.cat(
            [one.flatten(2).transpose(1, 2) + backbone.level_embeddings[level] for level, one in enumerate(pyramid)],
            dim=1,
        )
        token_maps = []
        for extract, layer in zip(backbone.extractors, (2, 4), strict=True):
            token_map = states[layer][:, 3:].transpose(1, 2).reshape(1, 32, rows, columns)
            cells = slow_extractor(extract, cells, shapes, token_map)
            projected = extract.token_projection(extract.token_norm(token_map.flatten(2).transpose(1, 2)))
            token_maps.append(projected.transpose(1, 2).reshape(1, 16, rows, columns))
        maps = split_maps(cells, shapes)
        maps = [finest + backbone.upsampling(maps[0])[:, :, : finest.shape[2], : finest.shape[3]], *maps]
        for level, (one, output) in enumerate(zip(maps, backbone(images).feature_maps, strict=True)):
            reading = token_maps[0 if level < 3 else 1]
            stride, size = (4, 8, 16, 32)[level], one.shape[2:]
            added = torch.zeros_like(one)
            for row in range(size[0]):
                for column in range(size[1]):
                    y = min(max((row + 0.5) * stride / 6 - 0.5, 0), rows - 1)
                    x = min(max((column + 0.5) * stride / 6 - 0.5, 0), columns - 1)
                    for r in {math.floor(y), math.ceil(y)}:
                        for c in {math.floor(x), math.ceil(x)}:
                            share = (1 - abs(y - r)) * (1 - abs(x - c))
                            added[:, :, row, column] += share * reading[:, :, r, c]
            torch.testing.assert_close(output, backbone.output_norms[level](one + added), rtol=1e-5, atol=1e-5)


class TestBatches:
    @torch.no_grad()
    @pytest.mark.parametrize("injector", [False, True])
    def test_an_image_on_a_larger_canvas_reads_only_its_own_tokens(self, injector):
        """Far from the canvas's edge the maps are those of the image alone, whatever lies beside it."""
        backbone = adapter_backbone(adapter_injector=injector, window_size=None)
        images = pixels(2, 64, 64)
        mask = random_mask(2, 16, 16, 0.7)
        maps = backbone(images, patch_mask=mask).feature_maps
        changed = images.clone()
        absent = (~mask[0]).repeat_interleave(4, 0).repeat_interleave(4, 1)
        token_inputs = backbone.embeddings(changed, backbone.embeddings.token_grid(changed, mask, None))
        changed[0, :, absent] = 5.0
        other_inputs = backbone.embeddings(changed, backbone.embeddings.token_grid(changed, mask, None))
        assert torch.equal(token_inputs, other_inputs)
        assert torch.equal(backbone(changed, patch_mask=mask).feature_maps[3][1], maps[3][1])
        alone = backbone(images[1:], patch_mask=mask[1:]).feature_maps
        for one, other in zip(alone, maps, strict=True):
            torch.testing.assert_close(one[0], other[1], rtol=1e-4, atol=1e-4)

    @torch.no_grad()
    def test_absent_patches_hold_nothing_to_read(self):
        backbone, mask = adapter_backbone(), random_mask(2, 16, 16, 0.7)
        values = []
        backbone.extractors[3].attention.register_forward_pre_hook(lambda _, arguments: values.append(arguments[2]))
        backbone(pixels(2, 64, 64), patch_mask=mask)
        assert torch.equal(values[0].abs().amax(dim=2) > 0, mask.flatten(1))

    @torch.no_grad()
    def test_images_of_different_sizes_in_one_batch(self):
        backbone = adapter_backbone()
        maps = backbone(pixels(2, 40, 48), image_sizes=[(40, 48), (21, 30)]).feature_maps
        assert [tuple(one.shape[2:]) for one in maps] == expected_sizes(40, 48)
        first = backbone(pixels(2, 40, 48)[:1]).feature_maps
        for one, other in zip(first, maps, strict=True):
            torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-4)


class TestInjector:
    @torch.no_grad()
    def test_starts_as_if_it_were_not_there(self):
        torch.manual_seed(0)
        with_injector = SparsePathViTAdapterBackbone(adapter_config(adapter_injector=True)).eval()
        without = SparsePathViTAdapterBackbone(adapter_config()).eval()
        without.load_state_dict(with_injector.state_dict(), strict=False)
        for one, other in zip(
            with_injector(pixels(1, 30, 40)).feature_maps, without(pixels(1, 30, 40)).feature_maps, strict=True
        ):
            assert torch.equal(one, other)

    @torch.no_grad()
    def test_writes_into_the_patch_tokens_and_not_into_the_global_ones(self):
        backbone = adapter_backbone(adapter_injector=True)
        grid = backbone.embeddings.token_grid(pixels(2, 24, 20), random_mask(2, 6, 5, 0.6), None)
        tokens = backbone.embeddings(pixels(2, 24, 20), grid)
        shapes = [(3, 3), (2, 2), (1, 1)]
        cells = torch.randn(2, 14, 16)
        injected = backbone.injectors[0](tokens, grid, cells, shapes)
        packed, before = injected.reshape(grid.num_tokens, -1), tokens.reshape(grid.num_tokens, -1)
        assert torch.equal(packed[grid.global_indices()], before[grid.global_indices()])
        assert ((packed - before)[grid.patch_indices()].abs().amax(dim=1) > 1e-3).all()


class TestTraining:
    def test_a_frozen_vit_gets_no_gradients_and_drops_nothing(self):
        backbone = SparsePathViTAdapterBackbone(adapter_config(hidden_dropout=0.5, drop_path_rate=0.5)).train()
        vit = [*backbone.embeddings.parameters(), *backbone.encoder.parameters()]
        assert not any(parameter.requires_grad for parameter in vit) and not backbone.encoder.training
        sum(one.square().mean() for one in backbone(pixels(2, 40, 40)).feature_maps).backward()
        without = [name for name, parameter in backbone.named_parameters() if parameter.grad is None]
        assert {name.split(".")[0] for name in without} == {"embeddings", "encoder"}

    def test_an_open_vit_is_trained_and_gradient_checkpointing_changes_nothing(self):
        gradients = []
        for checkpointing in (False, True):
            backbone = adapter_backbone(freeze_vit=False, adapter_injector=True).train()
            if checkpointing:
                backbone.gradient_checkpointing_enable()
            sum(one.square().mean() for one in backbone(pixels(2, 24, 40)).feature_maps).backward()
            gradients.append({name: parameter.grad for name, parameter in backbone.named_parameters()})
        assert all(gradient is not None for gradient in gradients[0].values())
        for name, gradient in gradients[0].items():
            torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-4, atol=1e-5, msg=name)

    @pytest.mark.parametrize("is_training", [False, True])
    def test_pruning_is_switched_off_with_a_warning_and_refused_in_training(self, is_training, caplog):
        backbone = adapter_backbone(prune_ratio=0.5)
        if is_training:
            with pytest.raises(ValueError, match=r"prune_ratio=0.5 removes patch tokens.*unprune"):
                backbone.train()(pixels(1, 24, 24))
            return
        unpruned = adapter_backbone()
        for one, other in zip(
            backbone(pixels(1, 24, 24)).feature_maps, unpruned(pixels(1, 24, 24)).feature_maps, strict=True
        ):
            assert torch.equal(one, other)

    @torch.no_grad()
    def test_with_unprune_removed_tokens_are_read_with_their_last_features(self):
        backbone = adapter_backbone(prune_ratio=0.5, unprune="scatter", adapter_layers=[4])
        seen = []
        backbone.extractors[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[2]))
        backbone(pixels(1, 32, 32))
        (before, before_grid), (_, kept_grid) = seen[0].with_removed()
        assert (sum(before_grid.counts), sum(kept_grid.counts)) == (64, 32)
        model = SparsePathViTModel(small_config()).eval()
        model.load_state_dict(backbone.state_dict(), strict=False)
        states = model(pixels(1, 32, 32), output_hidden_states=True).hidden_states
        torch.testing.assert_close(before_grid.to_raster(before), states[2])


class TestLoading:
    @pytest.mark.parametrize("vit_class", [SparsePathViTModel, SparsePathViTForImageClassification])
    def test_takes_the_weights_of_any_checkpoint_of_the_vit(self, tmp_path, vit_class):
        vit = small_model(vit_class)
        vit.save_pretrained(tmp_path)
        backbone = SparsePathViTAdapterBackbone.from_pretrained(tmp_path, config=adapter_config())
        own, expected = backbone.state_dict(), getattr(vit, "sparsepath_vit", vit).state_dict()
        taken = [name for name in expected if name.startswith(("embeddings", "encoder"))]
        assert len(taken) > 20 and all(torch.equal(own[name], expected[name]) for name in taken)
        assert not any(parameter.requires_grad for parameter in backbone.encoder.parameters())

    @torch.no_grad()
    def test_saved_and_loaded(self, tmp_path):
        backbone = adapter_backbone(adapter_injector=True)
        backbone.save_pretrained(tmp_path)
        loaded = SparsePathViTAdapterBackbone.from_pretrained(tmp_path)
        for one, other in zip(
            loaded(pixels(1, 30, 20)).feature_maps, backbone(pixels(1, 30, 20)).feature_maps, strict=True
        ):
            assert torch.equal(one, other)
        assert loaded.config._attn_implementation == "block_sparse"

    @torch.no_grad()
    def test_serves_the_stock_mask2former(self):
        config = Mask2FormerConfig(
            backbone_config=adapter_config(), feature_size=32, hidden_dim=32, mask_feature_size=32, num_queries=5,
            encoder_layers=1, decoder_layers=2, num_attention_heads=2, dim_feedforward=32, encoder_feedforward_dim=32,
        )  # fmt: skip
        model = Mask2FormerForUniversalSegmentation(config).eval()
        backbone = model.model.pixel_level_module.encoder
        assert type(backbone) is SparsePathViTAdapterBackbone
        assert backbone.config._attn_implementation == "block_sparse"
        assert model(pixels(1, 50, 70)).masks_queries_logits.shape == (1, 5, 13, 18)
        assert type(AutoBackbone.from_config(adapter_config())) is SparsePathViTAdapterBackbone
