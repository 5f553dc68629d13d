# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Block-local attention of every backend and every Transformers implementation against its definition.

The definition is DESIGN's, followed word for word by a loop over queries, keys and dimensions in float64.
"""

import math
import subprocess
import sys
from unittest import mock

import psutil
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_models import random_mask
from token_batches import Batch, batches, in_grid_order, in_raster_order, raster_tokens, sees, softmax
from torch import nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from sparsepath_vit import TokenGrid, block_attention, set_block_attention_backend
from sparsepath_vit.model import attention_sdpa_probabilities, attention_sdpa_tables, device_memory
from sparsepath_vit.model.attention_dense import dense_attention_mask, eager_attention_forward
from sparsepath_vit.model.attention_registration import block_sparse_attention_forward
from sparsepath_vit.model.attention_specification import attention_pattern

HEADS, HEAD_DIM = 2, 4
BACKENDS = ("sdpa_tiles", "reference")
# Largest error relative to the largest number of the output.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def automatic_backend():
    yield
    set_block_attention_backend("auto")


def random_states(batch, seed=0, dtype=torch.float64, heads=HEADS, head_dim=HEAD_DIM):
    """Query, key and value, each (heads, M, head_dim) in raster order, large enough for peaked attention."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(len(raster_tokens(batch, image)) for image in range(len(batch.sizes)))
    return [
        (2.0 * torch.randn(heads, tokens, head_dim, generator=generator, dtype=torch.float64)).to(dtype)
        for _ in range(3)
    ]


def attention_by_definition(query, key, value, batch, scale):
    """(heads, M, head_dim) in raster order, float64: one softmax over all keys that a query sees."""
    query, key, value = (states.double().tolist() for states in (query, key, value))
    output, start = [[] for _ in query], 0
    for image in range(len(batch.sizes)):
        tokens = raster_tokens(batch, image)
        for head, rows in enumerate(output):
            for position, token in enumerate(tokens, start=start):
                seen = [other for other, key_token in enumerate(tokens, start=start) if sees(batch, token, key_token)]
                row = query[head][position]
                logits = [scale * sum(a * b for a, b in zip(row, key[head][other], strict=True)) for other in seen]
                pairs = list(zip(softmax(logits), (value[head][other] for other in seen), strict=True))
                rows.append([sum(weight * row[dim] for weight, row in pairs) for dim in range(len(row))])
        start += len(tokens)
    return torch.tensor(output, dtype=torch.float64)


def masked_attention(query, key, value, batch, scale):
    """The same as differentiable torch operations; (heads, M, head_dim) in raster order."""
    outputs, start = [], 0
    for image in range(len(batch.sizes)):
        tokens = raster_tokens(batch, image)
        pattern = torch.tensor([[sees(batch, token, other) for other in tokens] for token in tokens])
        image_query, image_key, image_value = (
            states[:, start : start + len(tokens)].double() for states in (query, key, value)
        )
        logits = image_query @ image_key.transpose(1, 2) * scale
        outputs.append(logits.masked_fill(~pattern, -math.inf).softmax(dim=-1) @ image_value)
        start += len(tokens)
    return torch.cat(outputs, dim=1)


def assert_close(actual, expected, dtype=torch.float64, factor=1.0):
    error = (actual.double() - expected.double()).abs().max()
    assert error <= factor * TOLERANCES[dtype] * expected.abs().max(), f"error {error:.1e}"


# Wide enough for several block rows and columns beyond the neighbourhood, and for tiles of several blocks.
RAGGED = Batch([(11, 9), (6, 13)], random_mask(2, 11, 13, 0.7), 2, 1, 3)
UNIFORM = Batch([(12, 7), (12, 7)], None, 3, 1, 2)
FIXED = {"ragged": RAGGED, "uniform": UNIFORM}


@settings(max_examples=40)
@given(batches(), st.integers(0, 99), st.sampled_from([0.2, 0.5, 1.0]), st.sampled_from([1, 8, 32]))
def test_sdpa_tiles_and_reference_follow_the_definition(batch, seed, scale, queries_per_tile):
    """With few queries per tile most tiles are one block, whose keys need no mask; with many they join blocks."""
    states = random_states(batch, seed)
    expected = attention_by_definition(*states, batch, scale)
    assert_close(masked_attention(*states, batch, scale), expected)
    grid = batch.grid()
    for backend in BACKENDS:
        set_block_attention_backend(backend)
        with mock.patch.object(attention_sdpa_tables, "MIN_QUERIES_PER_TILE", queries_per_tile):
            output = block_attention(*(in_grid_order(state, batch, grid) for state in states), grid, scale=scale)
        assert_close(in_raster_order(output, batch, grid), expected)


@settings(max_examples=30)
@given(batches(), st.integers(0, 99), st.floats(0.05, 0.95))
def test_after_pruning_the_kept_tokens_follow_the_definition(batch, seed, share):
    grid = batch.grid()
    is_kept = random_mask(1, 1, sum(grid.counts), share, seed)[0, 0]
    for first_token in [sum(grid.counts[:image]) for image in range(len(grid.counts))]:
        is_kept[first_token] = True
    kept_grid = grid.select(is_kept.nonzero()[:, 0], [int(part.sum()) for part in is_kept.split(grid.counts)])
    present = torch.zeros(len(batch.sizes), *grid.canvas_size, dtype=torch.bool)
    present[grid.images()[is_kept], grid.rows[is_kept], grid.columns[is_kept]] = True
    kept_batch = batch._replace(present=present)
    states = random_states(kept_batch, seed)
    expected = masked_attention(*states, kept_batch, 0.5)
    for backend in BACKENDS:
        set_block_attention_backend(backend)
        grid_states = [in_grid_order(state, kept_batch, kept_grid) for state in states]
        output = block_attention(*grid_states, kept_grid, scale=0.5)
        assert_close(in_raster_order(output, kept_batch, kept_grid), expected)


@settings(max_examples=20)
@given(batches(max_side=6), st.integers(0, 99), st.sampled_from([3, 128]))
def test_gradients_are_those_of_the_definition(batch, seed, queries_at_once):
    """With few queries at once each tile is worked on in parts, with their rows of its mask."""
    states = [state.requires_grad_() for state in random_states(batch, seed)]
    weights = torch.randn_like(states[0])
    expected = torch.autograd.grad((masked_attention(*states, batch, 0.5) * weights).sum(), states)
    grid = batch.grid()
    for backend in BACKENDS:
        set_block_attention_backend(backend)
        output = block_attention(*(in_grid_order(state, batch, grid) for state in states), grid, scale=0.5)
        with mock.patch.object(attention_sdpa_probabilities, "MAX_QUERIES_AT_ONCE", queries_at_once):
            gradients = torch.autograd.grad((in_raster_order(output, batch, grid) * weights).sum(), states)
        scale = max(gradient.abs().max() for gradient in expected)
        for gradient, wanted in zip(gradients, expected, strict=True):
            assert (gradient - wanted).abs().max() <= 1e-12 * scale


@settings(max_examples=20)
@given(batches(), st.integers(0, 99))
def test_images_of_a_batch_do_not_see_each_other(batch, seed):
    states = random_states(batch, seed)
    grid = batch.grid()
    output = in_raster_order(
        block_attention(*(in_grid_order(state, batch, grid) for state in states), grid), batch, grid
    )
    start = 0
    for image, size in enumerate(batch.sizes):
        end = start + len(raster_tokens(batch, image))
        present = None if batch.present is None else batch.present[image : image + 1]
        alone = batch._replace(sizes=[size], present=present)
        alone_grid = alone.grid()
        alone_states = [in_grid_order(state[:, start:end], alone, alone_grid) for state in states]
        assert_close(
            output[:, start:end], in_raster_order(block_attention(*alone_states, alone_grid), alone, alone_grid)
        )
        start = end


@pytest.mark.parametrize("rows, columns, window, radius", [(16, 16, 8, 1), (9, 5, None, 0), (6, 6, 2, 2), (1, 1, 8, 1)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_neighbourhood_that_covers_the_grid_is_dense_attention(rows, columns, window, radius, backend):
    grid = TokenGrid.create([(rows, columns)] * 2, num_global_tokens=5, window_size=window, neighbor_radius=radius)
    assert grid.is_dense
    states = [torch.randn(2, 3, 5 + rows * columns, 8, dtype=torch.float64) for _ in range(3)]
    set_block_attention_backend(backend)
    assert_close(block_attention(*states, grid), nn.functional.scaled_dot_product_attention(*states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("batch", FIXED.values(), ids=FIXED)
def test_lower_precision_stays_close_forward_and_backward(batch, backend, dtype):
    states = [state.requires_grad_() for state in random_states(batch, dtype=dtype, head_dim=16)]
    weights = torch.randn(states[0].shape).to(dtype)
    expected = masked_attention(*states, batch, 0.25)
    expected_gradients = torch.autograd.grad((expected * weights).sum(), states)
    grid = batch.grid()
    set_block_attention_backend(backend)
    output = in_raster_order(
        block_attention(*(in_grid_order(state, batch, grid) for state in states), grid, scale=0.25), batch, grid
    )
    assert output.dtype == dtype
    assert_close(output, expected, dtype)
    gradients = torch.autograd.grad((output * weights).sum(), states)
    for gradient, wanted in zip(gradients, expected_gradients, strict=True):
        assert gradient.dtype == dtype
        assert_close(gradient, wanted.double(), dtype, factor=4)


def test_the_default_scale_is_that_of_the_head_dimension():
    grid = UNIFORM.grid()
    states = [in_grid_order(state, UNIFORM, grid) for state in random_states(UNIFORM)]
    assert torch.equal(block_attention(*states, grid), block_attention(*states, grid, scale=HEAD_DIM**-0.5))


def test_views_of_a_fused_projection_give_the_numbers_of_copies():
    grid = UNIFORM.grid()
    batch, tokens = grid.batch_shape
    fused = torch.randn(batch, tokens, 3, HEADS, HEAD_DIM, dtype=torch.float64)
    views = fused.permute(2, 0, 3, 1, 4).unbind(0)
    assert not views[0].is_contiguous()
    copies = [view.contiguous() for view in views]
    assert torch.equal(block_attention(*views, grid), block_attention(*copies, grid))


def test_a_second_run_is_bitwise_the_same():
    grid = RAGGED.grid()
    states = [in_grid_order(state, RAGGED, grid) for state in random_states(RAGGED, dtype=torch.float32)]
    assert torch.equal(block_attention(*states, grid), block_attention(*states, grid))


class TestDropout:
    def states(self, grid):
        return [torch.randn(1, HEADS, grid.num_tokens, HEAD_DIM, dtype=torch.float64) for _ in range(3)]

    def attend(self, states, grid, dropout, seed):
        states = [state.view(HEADS, *grid.batch_shape, HEAD_DIM).transpose(0, 1) for state in states]
        torch.manual_seed(seed)
        return block_attention(*states, grid, dropout=dropout)

    @pytest.mark.parametrize("backend", BACKENDS)
    def test_its_mean_is_the_attention_without(self, backend):
        set_block_attention_backend(backend)
        image = TokenGrid.create([(8, 6)], num_global_tokens=2, window_size=2)
        copies = TokenGrid.create([(8, 6)] * 100, num_global_tokens=2, window_size=2)
        states = self.states(image)
        expected = self.attend(states, image, 0.0, 0)
        drawn = self.attend([state.repeat(1, 1, 100, 1) for state in states], copies, 0.3, 0)
        assert (drawn.std(dim=0) > 0.01).float().mean() > 0.9
        deviation = (drawn.mean(dim=0) - expected[0]) / (drawn.std(dim=0) / 100**0.5)
        assert deviation.abs().max() < 6
        assert 0.8 < deviation.std() < 1.2

    def test_the_global_seed_decides_it(self):
        grid = RAGGED.grid()
        states = self.states(grid)
        assert torch.equal(self.attend(states, grid, 0.3, 1), self.attend(states, grid, 0.3, 1))
        assert not torch.equal(self.attend(states, grid, 0.3, 1), self.attend(states, grid, 0.3, 2))

    @pytest.mark.parametrize("batch", FIXED.values(), ids=FIXED)
    def test_the_backward_draws_what_the_forward_drew(self, batch):
        """With the same probabilities dropped the output is linear in the values, so <grad_v, v> = <out, grad>."""
        grid = batch.grid()
        states = [state.requires_grad_() for state in self.states(grid)]
        output = self.attend(states, grid, 0.4, 5)
        torch.manual_seed(6)
        weights = torch.randn_like(output)
        (grad_value,) = torch.autograd.grad((output * weights).sum(), states[2:], retain_graph=True)
        torch.testing.assert_close((grad_value * states[2]).sum(), (output * weights).sum(), rtol=1e-10, atol=0)

    @pytest.mark.parametrize("backend", BACKENDS)
    @pytest.mark.parametrize("dropout", [0.0, 0.3])
    def test_autocast_does_not_round_what_is_kept_in_float32(self, dropout, backend):
        """Regression: with dropout, and in the backward, probabilities were computed in bfloat16."""
        set_block_attention_backend(backend)
        grid, results = RAGGED.grid(), []
        states = [state.float() for state in self.states(grid)]
        for enabled in (False, True):
            states = [state.detach().requires_grad_() for state in states]
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                output = self.attend(states, grid, dropout, 5)
            # torch's own formulas, which the reference is made of, follow the autocast of the backward.
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled and backend != "reference"):
                results.append([output, *torch.autograd.grad(output.square().sum(), states)])
        for expected, actual in zip(*results, strict=True):
            assert torch.equal(actual, expected)

    def test_gradients_are_finite_differences(self):
        grid = TokenGrid.create([(7, 5)], num_global_tokens=2, window_size=2)
        states = [state.requires_grad_() for state in self.states(grid)]
        torch.autograd.gradcheck(
            lambda *states: self.attend(states, grid, 0.4, 5), states, fast_mode=True, atol=1e-6, rtol=1e-6
        )


def implementation_output(name, batch, states, dropout=0.0):
    """What the implementation `name` of Transformers' registry computes, (heads, M, head_dim) in raster order."""
    grid = batch.grid()
    states = [in_grid_order(state, batch, grid) for state in states]
    attend = ALL_ATTENTION_FUNCTIONS.get_interface(name, eager_attention_forward)
    mask = None if name == "block_sparse" else dense_attention_mask(grid, name, HEADS, states[0].dtype)
    module = nn.Module().eval()
    module.is_causal = False
    output, weights = attend(module, *states, mask, scaling=0.5, dropout=dropout, token_grid=grid)
    return in_raster_order(output.transpose(1, 2), batch, grid), weights


class TestTransformersInterface:
    @pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention", "block_sparse"])
    @settings(max_examples=5)
    @given(batch=batches(max_side=6, max_images=2), seed=st.integers(0, 99))
    def test_every_implementation_follows_the_definition(self, name, batch, seed):
        states = random_states(batch, seed, torch.float32)
        # Compiling flex_attention takes a minute and a half on a CPU; uncompiled it computes the same.
        with torch.compiler.set_stance("force_eager"), torch.no_grad():
            output, _ = implementation_output(name, batch, states)
        assert_close(output, masked_attention(*states, batch, 0.5), torch.float32)

    def test_eager_returns_the_probabilities(self):
        states = random_states(RAGGED)
        _, weights = implementation_output("eager", RAGGED, states)
        assert_close(weights.sum(dim=-1), torch.ones(1, HEADS, weights.shape[2]))
        pattern = attention_pattern(RAGGED.grid())
        assert torch.equal(weights > 0, pattern[:, None].expand_as(weights))

    def test_block_sparse_is_registered_with_a_mask_of_its_own(self):
        from transformers import AttentionMaskInterface

        assert AttentionInterface()["block_sparse"] is block_sparse_attention_forward
        assert "block_sparse" in AttentionMaskInterface()

    def test_no_model_is_built_without_the_registration(self):
        """The file alone, as remote code imports it."""
        program = (
            "import importlib, sys\n"
            "sys.modules['sparsepath_vit.model.attention_registration'] = None\n"
            "for name in ('encoder_sparsepath_vit', 'modeling_sparsepath_vit'):\n"
            "    try:\n        importlib.import_module(f'sparsepath_vit.model.{name}')\n"
            "    except ImportError as error:\n        print(error)"
        )
        result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert result.stdout.count("attention_registration") == 2, result.stderr

    def test_block_sparse_refuses_a_mask(self):
        grid = UNIFORM.grid()
        states = [in_grid_order(state, UNIFORM, grid) for state in random_states(UNIFORM)]
        with pytest.raises(ValueError, match=r"attention_mask of shape \(2, 1, 1, 4\).*patch_mask"):
            block_sparse_attention_forward(nn.Module(), *states, torch.ones(2, 1, 1, 4), token_grid=grid)

    def test_block_sparse_in_a_model_without_a_grid_says_so(self):
        states = [torch.randn(1, 2, 5, 4)] * 3
        with pytest.raises(ValueError, match=r"token_grid is missing.*attn_implementation=\"sdpa\""):
            block_sparse_attention_forward(nn.Module(), *states, None)

    def test_dense_masks_are_made_only_where_something_is_hidden(self):
        dense = UNIFORM._replace(window_size=None).grid()
        assert all(dense_attention_mask(dense, name, 2, torch.float32) is None for name in ("eager", "sdpa"))
        packed = Batch([(3, 3), (2, 2)], None, None, 1, 1).grid()  # images packed into one row must not see each other
        assert dense_attention_mask(packed, "sdpa", 2, torch.float32) is not None


class TestMemoryWarning:
    def masks(self, name, free_bytes, monkeypatch, batch=UNIFORM):
        monkeypatch.setattr(device_memory, "available_memory", lambda device: free_bytes)
        return lambda: [dense_attention_mask(batch.grid(), name, 24, torch.float32) for _ in range(2)]

    @pytest.mark.parametrize("name", ["eager", "sdpa", "flex_attention"])
    def test_names_bytes_and_remedy_once(self, name, monkeypatch, warnings_said):
        said = warnings_said(self.masks(name, 2**10, monkeypatch))
        assert len(said) == 1
        assert f"attn_implementation={name!r} needs about" in said[0]
        assert "GiB" in said[0] and "86 x 86" in said[0] and 'set_attn_implementation("block_sparse")' in said[0]

    def test_is_silent_where_memory_suffices_or_is_unknown(self, monkeypatch, warnings_said):
        assert not warnings_said(self.masks("eager", 2**40, monkeypatch))
        assert not warnings_said(self.masks("eager", None, monkeypatch))

    def test_counts_the_logits_of_eager_without_a_mask(self, monkeypatch, warnings_said):
        dense = UNIFORM._replace(window_size=None)
        needed = 2 * 86 * 86 * 24 * 8  # images, queries, keys, heads, bytes of the logits and their softmax
        assert not warnings_said(self.masks("eager", needed, monkeypatch, dense))
        assert warnings_said(self.masks("eager", needed - 1, monkeypatch, dense))
        assert not warnings_said(self.masks("sdpa", 0, monkeypatch, dense))

    def test_free_memory_counts_the_page_cache(self):
        """Regression: only unused pages counted, so that a machine with files in its cache was warned for nothing."""
        expected = psutil.virtual_memory().available
        assert device_memory.available_memory(torch.device("cpu")) == pytest.approx(expected, rel=0.2)


class TestBadInput:
    def states(self):
        grid = UNIFORM.grid()
        return grid, [in_grid_order(state, UNIFORM, grid) for state in random_states(UNIFORM)]

    def test_unknown_backend(self):
        with pytest.raises(ValueError, match=r"backend='cuda' is unknown: choose one of 'auto'"):
            set_block_attention_backend("cuda")

    @pytest.mark.parametrize("dropout", [-0.1, 1.0])
    def test_dropout_outside_its_range(self, dropout):
        grid, states = self.states()
        with pytest.raises(ValueError, match=f"dropout={dropout}"):
            block_attention(*states, grid, dropout=dropout)

    def test_query_without_heads(self):
        grid, (query, key, value) = self.states()
        with pytest.raises(
            ValueError, match=r"query has shape \(2, 86, 4\): it takes \(batch, heads, tokens, head_dim\)"
        ):
            block_attention(query[:, 0], key, value, grid)

    @pytest.mark.parametrize("name, index", [("key", 1), ("value", 2)])
    def test_key_or_value_unlike_the_query(self, name, index):
        grid, states = self.states()
        for other, what in ((states[index][:, :, 1:], "has shape"), (states[index].float(), "is torch.float32")):
            changed = [*states[:index], other, *states[index + 1 :]]
            with pytest.raises(ValueError, match=f"{name} {what}.*it takes the query's"):
                block_attention(*changed, grid)

    def test_integers(self):
        grid, states = self.states()
        with pytest.raises(ValueError, match=r"query is torch.int64: it takes a floating point dtype"):
            block_attention(*(state.long() for state in states), grid)

    def test_grid_of_other_tokens(self):
        _, states = self.states()
        with pytest.raises(ValueError, match=r"grid describes \(batch, tokens\) = .*pass the grid"):
            block_attention(*states, RAGGED.grid())

    def test_grid_on_another_device(self):
        grid, states = self.states()
        with pytest.raises(ValueError, match=r"grid is on meta: it takes the query's device, cpu"):
            block_attention(*states, grid.to("meta"))
