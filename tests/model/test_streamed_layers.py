# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Layers strip by strip give the numbers of whole layers, and of a plain ViT that shares no code with them."""

import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import random_mask, random_pixels, small_config, small_model
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.model import encoder_sparsepath_vit, streamed_layers, token_strips
from sparsepath_vit.model.streamed_layers import streams, tokens_per_strip

ROW_OF_BLOCKS = 4 * 9  # tokens, on a grid of 9 columns


@pytest.fixture
def streamed(monkeypatch):
    """Counts the layers that run strip by strip."""
    calls, run_in_strips = [], encoder_sparsepath_vit.run_in_strips
    monkeypatch.setattr(
        encoder_sparsepath_vit,
        "run_in_strips",
        lambda layer, *arguments, **settings: calls.append(layer) or run_in_strips(layer, *arguments, **settings),
    )
    return calls


def outputs_of(model, most_tokens, pixels, **arguments):
    model.config.tokens_per_strip = most_tokens
    with torch.no_grad():
        return model(pixels, **arguments)


def assert_same(found, expected, tolerance=1e-12):
    for name, wanted in expected.items():
        if name == "prune_scores":  # float32
            assert (found[name] - wanted).abs().max() <= 1e-6 * wanted.abs().max()
        elif wanted.is_floating_point():
            assert (found[name] - wanted).abs().max() <= tolerance * wanted.abs().max(), name
        else:
            assert torch.equal(found[name], wanted), name


@given(
    most_tokens=st.sampled_from([1, ROW_OF_BLOCKS, 2 * ROW_OF_BLOCKS, 3 * ROW_OF_BLOCKS]),
    radius=st.integers(0, 2),
    prune_ratio=st.sampled_from([0.0, 0.3, 0.8]),
    prune_score=st.sampled_from(["attention", "cls_attention", "attention_value"]),
    images=st.sampled_from([None, [(76, 36), (36, 20)], [(76, 36), (40, 36), (12, 4)]]),
    share=st.sampled_from([None, 0.4]),
    mlp_type=st.sampled_from(["swiglu", "gelu"]),
    num_context_tokens=st.sampled_from([0, 1, 40]),
)
def test_strips_equal_whole_layers(
    most_tokens, radius, prune_ratio, prune_score, images, share, mlp_type, num_context_tokens
):
    settings = {"neighbor_radius": radius, "prune_ratio": prune_ratio, "prune_score": prune_score}
    settings["num_context_tokens"] = num_context_tokens
    model = small_model(SparsePathViTModel, mlp_type=mlp_type, **settings).double()
    batch = 1 if images is None else len(images)
    pixels = random_pixels(batch, 19, 9).double()
    patch_mask = None if share is None else random_mask(batch, 19, 9, share)
    if patch_mask is not None:
        patch_mask[:, 4:8], patch_mask[:, 0, 0] = False, True  # an empty row of blocks
    arguments = {"patch_mask": patch_mask, "image_sizes": images}
    expected = outputs_of(model, 0, pixels, **arguments)
    found = outputs_of(model, most_tokens, pixels, **arguments)
    assert_same(found, expected)
    again = outputs_of(model, most_tokens, pixels, **arguments)
    assert all(torch.equal(again[name], found[name]) for name in found)


@pytest.mark.parametrize("cut", ["block rows", "anywhere"])
@pytest.mark.parametrize(
    "settings",
    [
        {"window_size": None},
        {"window_size": 1},
        {"window_size": 16},
        {"use_layerscale": False, "qkv_bias": False},
        {"num_register_tokens": 0, "pooling": "cls_mean"},
        {"prune_ratio": 0.4, "unprune": "scatter"},
        {"prune_ratio": 0.6, "num_representatives": 12, "pooling": "cls_mean"},
        {"prune_ratio": 0.6, "prune_after_layer": 4},
        {"num_context_tokens": 20, "window_size": 16},
        {"num_context_tokens": 30, "prune_ratio": 0.6, "num_representatives": 12, "pooling": "cls_mean"},
        {"num_context_tokens": 20, "qkv_bias": False, "num_register_tokens": 0},
        {"num_context_tokens": 400},
    ],
    ids=lambda settings: " ".join(f"{name}={value}" for name, value in settings.items()),
)
def test_whatever_the_model(settings, cut, streamed, monkeypatch):
    if cut == "anywhere":
        monkeypatch.setattr(token_strips, "block_row_ends", lambda *arguments: None)
    model, pixels = small_model(SparsePathViTModel, **settings).double(), random_pixels(2, 19, 9).double()
    expected = outputs_of(model, 0, pixels, image_sizes=[(76, 36), (60, 28)])
    assert not streamed
    assert_same(outputs_of(model, 30, pixels, image_sizes=[(76, 36), (60, 28)]), expected)
    assert len(streamed) == 4


def test_an_image_narrower_than_a_block(streamed):
    model, pixels = small_model(SparsePathViTModel).double(), random_pixels(1, 30, 2).double()
    expected = outputs_of(model, 0, pixels)
    assert_same(outputs_of(model, 1, pixels), expected)
    assert len(streamed) == 4


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 6e-2)])
def test_narrow_dtypes(dtype, tolerance, streamed):
    model, pixels = small_model(SparsePathViTModel).to(dtype), random_pixels(1, 30, 9)
    expected = outputs_of(model, 0, pixels)
    assert_same(outputs_of(model, 60, pixels), expected, tolerance)
    assert len(streamed) == 4


class TestWholeLayers:
    """Where somebody wants to see the whole layer at work it runs as a whole."""

    @pytest.fixture
    def model(self):
        return small_model(SparsePathViTModel, tokens_per_strip=30)

    def test_images_that_are_smaller_than_a_strip(self, model, streamed):
        outputs_of(model, 171, random_pixels(1, 19, 9))
        outputs_of(model, 0, random_pixels(1, 19, 9))
        outputs_of(model, None, random_pixels(1, 19, 9))
        assert not streamed
        outputs_of(model, 170, random_pixels(1, 19, 9))
        assert len(streamed) == 4

    def test_gradients(self, model, streamed):
        pixels = random_pixels(1, 19, 9)
        gradients = []
        for most_tokens in (0, 30):
            model.config.tokens_per_strip = most_tokens
            model.zero_grad()
            model(pixels).last_hidden_state.square().mean().backward()
            gradients.append([parameter.grad.clone() for parameter in model.parameters()])
        assert not streamed
        assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))

    def test_training(self, model, streamed):
        outputs_of(model.train(), 30, random_pixels(1, 19, 9))
        assert not streamed

    def test_dense_implementations(self, model, streamed):
        for implementation in ("sdpa", "eager"):
            model.set_attn_implementation(implementation)
            outputs_of(model, 30, random_pixels(1, 19, 9))
        assert not streamed

    def test_hooks(self, model, streamed):
        seen = []
        model.encoder.layers[1].register_forward_hook(lambda module, arguments, output: seen.append(output[0]))
        model.encoder.layers[2].mlp.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
        found = outputs_of(model, 30, random_pixels(1, 19, 9))
        assert [tuple(states.shape) for states in seen] == [(1, 174, 32)] * 2
        assert streamed == [model.encoder.layers[0], model.encoder.layers[3]]
        assert_same(outputs_of(model, 0, random_pixels(1, 19, 9)), found, 1e-5)

    def test_a_hook_that_collects_what_the_mlp_computes(self):
        """GELU works in place where nobody else has its input."""
        model, seen = small_model(SparsePathViTModel, mlp_type="gelu"), []
        outputs = outputs_of(model, 0, random_pixels(1, 19, 9))["pooler_output"]
        model.encoder.layers[0].mlp.fc1.register_forward_hook(lambda module, arguments, output: seen.append(output))
        assert torch.equal(outputs_of(model, 0, random_pixels(1, 19, 9))["pooler_output"], outputs)
        assert seen[0].min() < -1  # GELU gives at least -0.17

    def test_weights_of_another_dtype(self, model, streamed):
        model.encoder.layers[2].to(torch.float64)
        with torch.no_grad():
            tokens = torch.zeros(1, 174, 32)
            grid = model.token_grid(random_pixels(1, 19, 9))
            assert [streams(layer, tokens, grid) for layer in model.encoder.layers] == [True, True, False, True]

    def test_a_compiled_model(self, model, streamed):
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert_same(
            outputs_of(compiled, 30, random_pixels(1, 19, 9)), outputs_of(model, 0, random_pixels(1, 19, 9)), 1e-5
        )
        assert not streamed


class TestMemory:
    def test_every_state_is_kept_where_it_is_asked_for(self, streamed):
        model, pixels = small_model(SparsePathViTModel, prune_ratio=0.4).double(), random_pixels(1, 19, 9).double()
        expected = outputs_of(model, 0, pixels, output_hidden_states=True)
        found = outputs_of(model, 30, pixels, output_hidden_states=True)
        for state, wanted in zip(found.hidden_states, expected.hidden_states, strict=True):
            assert (state - wanted).abs().max() <= 1e-12 * wanted.abs().max()
        assert len(streamed) == 4

    def test_whoever_reads_between_layers_keeps_what_it_read(self):
        model, pixels, read = small_model(SparsePathViTModel, tokens_per_strip=30), random_pixels(1, 19, 9), []

        def after_layer(number, tokens):
            read.append((tokens.hidden_states, tokens.hidden_states.clone()))
            return tokens

        with torch.no_grad():
            model.encode(pixels, model.token_grid(pixels), after_layer=after_layer)
        assert len(read) == 5 and all(torch.equal(*pair) for pair in read)

    def test_nothing_but_the_hidden_states_is_as_large_as_the_image(self):
        """Every linear layer sees the tokens of one strip at a time: keys with values, queries, and three others."""
        model, pixels = small_model(SparsePathViTModel, tokens_per_strip=36), random_pixels(1, 60, 9)
        grid = model.token_grid(pixels)

        class Products(TorchDispatchMode):
            def __init__(self):
                super().__init__()
                self.tokens = []

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                if function.overloadpacket == torch.ops.aten.addmm:
                    self.tokens.append(len(args[1]))
                return function(*args, **(kwargs or {}))

        with torch.no_grad():
            tokens = model.embeddings(pixels, grid)
            with Products() as products:
                encoder_sparsepath_vit.run_in_strips(model.encoder.layers[0], tokens, grid, overwrites=True)
        assert max(products.tokens) == 36 and sum(products.tokens) == 5 * (3 + 540)

    def test_prune_scores_need_no_more_than_their_own_number_a_token(self):
        """Regression: the logits of all global queries waited for the last strip, heads x G numbers a token."""
        model, pixels = small_model(SparsePathViTModel, prune_ratio=0.5, tokens_per_strip=36), random_pixels(1, 600, 9)
        grid = model.token_grid(pixels)

        class Largest(TorchDispatchMode):
            numbers = 0

            def __torch_dispatch__(self, function, types, args=(), kwargs=None):
                made = function(*args, **(kwargs or {}))
                if isinstance(made, torch.Tensor) and made.untyped_storage().data_ptr() != states.data_ptr():
                    self.numbers = max(self.numbers, made.numel())
                return made

        with torch.no_grad():
            states, settings = model.embeddings(pixels, grid), {"overwrites": True, "score_tokens": True}
            encoder_sparsepath_vit.run_in_strips(model.encoder.layers[1], states, grid, **settings)  # cuts the strips
            with Largest() as largest:
                _, scores = encoder_sparsepath_vit.run_in_strips(model.encoder.layers[1], states, grid, **settings)
        # Keys and values of a strip and its surroundings are more than one number a token here, the logits were six.
        assert len(scores) == 600 * 9 and largest.numbers <= 2 * len(scores)

    def test_products_have_few_numbers_of_rows_where_strips_have_many(self, monkeypatch):
        """Regression: oneDNN keeps 0.6 MB for each number, 100 MB for the ragged strips of a pruned image."""
        monkeypatch.setitem(streamed_layers.TOKENS_AT_ONCE, "cpu", 16)
        model, pixels, rows = small_model(SparsePathViTModel, tokens_per_strip=36), random_pixels(1, 60, 9), []
        grid = model.token_grid(pixels, random_mask(1, 60, 9, share=0.6))
        layer, add_product = model.encoder.layers[0], torch.addmm
        monkeypatch.setattr(
            torch, "addmm", lambda *states, **out: rows.append(len(states[1])) or add_product(*states, **out)
        )
        with torch.no_grad():
            encoder_sparsepath_vit.run_in_strips(layer, model.embeddings(pixels, grid), grid, overwrites=True)
        strips = token_strips.strips_of(grid, 36)[0]
        assert len({strip.num_queries for strip in strips}) > 5
        # The global tokens, all others of the first part, every other part, the last one.
        assert set(rows) == {3, 13, 16, grid.num_tokens % 16} and rows.count(16) > 2 * len(strips)

    def test_a_row_of_blocks_larger_than_a_strip_goes_through_the_mlp_in_parts(self):
        model, pixels, parts = small_model(SparsePathViTModel, tokens_per_strip=10), random_pixels(1, 60, 9), []
        layer, multiplied = model.encoder.layers[0], nn.functional.linear
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            grid = model.token_grid(pixels)
            tokens = model.embeddings(pixels, grid)
            expected = layer(tokens.clone(), grid)[0]

            def linear(states, weight, bias=None):
                parts.append(len(states) if weight is layer.mlp.fc1.weight else 0)
                return multiplied(states, weight, bias)

            patch.setattr(nn.functional, "linear", linear)
            found, _ = encoder_sparsepath_vit.run_in_strips(layer, tokens, grid, overwrites=True)
        assert max(parts) == 10 and sum(parts) == 540 + 3
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()

    def test_removed_tokens_leave_memory(self, monkeypatch):
        """Regression: the tokens before pruning were kept until the end, beside those that were left."""
        model, alive = small_model(SparsePathViTModel, prune_ratio=0.5, tokens_per_strip=30), []
        run = encoder_sparsepath_vit.run_in_strips

        def spied(layer, hidden_states, *arguments, **settings):
            alive.append(hidden_states.shape[1])
            if len(alive) == 3:
                alive.append(first[0]() is None)
            first.append(weakref.ref(hidden_states))
            return run(layer, hidden_states, *arguments, **settings)

        first = []
        monkeypatch.setattr(encoder_sparsepath_vit, "run_in_strips", spied)
        with torch.no_grad():
            model(random_pixels(1, 19, 9))
        assert alive == [174, 174, 3 + 86, True, 3 + 86]


def test_progress_counts_every_patch_token_of_every_layer():
    model, pixels, counted = small_model(SparsePathViTModel, prune_ratio=0.5), random_pixels(1, 19, 9), []
    with torch.no_grad():
        for most_tokens, least_calls in ((0, 5), (36, 1 + 2 * 5 + 2 * 3)):
            model.config.tokens_per_strip = most_tokens
            counted.clear()
            model.encode(pixels, model.token_grid(pixels), on_tokens=counted.append)
            assert sum(counted) == 3 * 171 + 2 * 86 and len(counted) >= least_calls


def test_a_strip_is_larger_on_cuda():
    config = small_config()
    assert tokens_per_strip(config, torch.device("cpu")) == 4096
    assert tokens_per_strip(config, torch.device("cuda", 1)) >= 16384
    assert tokens_per_strip(config, torch.device("cpu"), is_shared=True) == 2048
    config.tokens_per_strip = 100
    assert tokens_per_strip(config, torch.device("cuda")) == tokens_per_strip(config, torch.device("cpu")) == 100


@pytest.mark.parametrize("kind", ["attention", "cls_attention", "attention_value"])
def test_values_of_zero_have_no_score(kind):
    """The logarithm of their norm is -inf."""
    model, pixels = small_model(SparsePathViTModel, prune_ratio=0.5, prune_score=kind), random_pixels(1, 19, 9)
    for layer in model.encoder.layers:
        of_value = slice(2 * model.config.hidden_size, None)
        layer.attention.qkv.weight.data[of_value] = layer.attention.qkv.bias.data[of_value] = 0
    scores = outputs_of(model, 30, pixels).prune_scores
    assert torch.isfinite(scores).all() and bool((scores == 0).all()) == (kind == "attention_value")
