# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Which backend runs `block_sparse`, and the operator that carries it through torch.compile."""

import dataclasses
import importlib.util

import pytest
import torch
from small_models import random_pixels, small_model
from torch._dynamo.testing import CompileCounterWithBackend

from sparsepath_vit import SparsePathViTModel, TokenGrid, block_attention
from sparsepath_vit.model import (
    attention_backends,
    attention_cpu,
    attention_operator,
    attention_sdpa_tables,
    attention_triton,
)
from sparsepath_vit.model.attention_backend import PreparedGrid, prepared_grid
from sparsepath_vit.model.attention_backends import BACKENDS


def without_cuda(monkeypatch):
    monkeypatch.setattr(attention_triton, "is_installed", lambda: True)
    monkeypatch.setattr(attention_triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def with_cuda(monkeypatch, capability=(9, 0)):
    monkeypatch.setattr(attention_triton, "is_installed", lambda: True)
    monkeypatch.setattr(attention_triton, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


def random_states(grid, head_dim=16):
    batch, tokens = grid.batch_shape
    return torch.randn(batch, tokens, 3, 2, head_dim)


class TestChoice:
    def test_automatic_is_the_kernel_for_the_device_and_else_the_tiles(self, monkeypatch):
        with_cuda(monkeypatch)
        assert attention_backends.block_attention_backend("cuda") == "triton"
        assert attention_backends.block_attention_backend("meta") == "sdpa_tiles"
        for reason, backend in ((None, "cpu_kernel"), ("there is no C compiler", "sdpa_tiles")):
            monkeypatch.setattr(attention_cpu, "_reason_against", lambda reason=reason: reason)
            assert attention_backends.block_attention_backend("cpu") == backend

    @pytest.mark.parametrize("capability, backend", [((8, 0), "triton"), ((7, 5), "sdpa_tiles")])
    def test_automatic_leaves_old_gpus_to_the_tiles(self, capability, backend, monkeypatch):
        with_cuda(monkeypatch, capability)
        assert attention_backends.block_attention_backend("cuda") == backend

    def test_automatic_works_without_triton_and_the_doctor_says_why(self, monkeypatch):
        with_cuda(monkeypatch)
        monkeypatch.setattr(attention_triton, "is_installed", lambda: False)
        assert attention_backends.block_attention_backend("cuda") == "sdpa_tiles"
        described = attention_backends.describe_block_attention_backend("cuda")
        assert described.startswith("sdpa_tiles") and "pip install triton" in described

    def test_forcing_the_kernel_without_a_gpu_names_it(self, monkeypatch, block_attention_backend):
        without_cuda(monkeypatch)
        with pytest.raises(ValueError, match=r"backend='triton' is unavailable: .*there is no CUDA device"):
            block_attention_backend("triton")
        assert attention_backends.block_attention_backend("cpu") != "triton"

    def test_forcing_the_kernel_without_triton_names_it(self, monkeypatch, block_attention_backend):
        with_cuda(monkeypatch)
        monkeypatch.setattr(attention_triton, "is_installed", lambda: False)
        with pytest.raises(ValueError, match=r"backend='triton' is unavailable: Triton is not installed"):
            block_attention_backend("triton")

    def test_the_forced_kernel_refuses_tensors_on_the_cpu(self, monkeypatch, block_attention_backend):
        with_cuda(monkeypatch)
        block_attention_backend("triton")
        grid = TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2)
        with pytest.raises(ValueError, match=r"'triton' was chosen and cannot run on cpu: .*the tensors are on cpu"):
            block_attention(*random_states(grid).permute(2, 0, 3, 1, 4), grid)

    def test_the_environment_variable_chooses(self, monkeypatch):
        """It is read when the file is executed, here once more."""
        monkeypatch.setenv(attention_backends.BACKEND_VARIABLE, "reference")
        specification = importlib.util.spec_from_file_location(
            f"{attention_backends.__name__}_again", attention_backends.__file__
        )
        again = importlib.util.module_from_spec(specification)
        specification.loader.exec_module(again)
        assert again.describe_block_attention_backend("cpu").startswith("reference (naive reference")

    def test_the_environment_variable_is_named_where_it_holds_no_backend(self, monkeypatch):
        monkeypatch.setattr(attention_backends, "_chosen_backend", "flash")
        with pytest.raises(ValueError, match=r"SPARSEPATH_ATTENTION_BACKEND='flash' is unknown: set it to one of auto"):
            attention_backends.block_attention_backend("cpu")


@pytest.fixture
def kernel(block_attention_backend):
    """The kernel's module, with the kernel chosen; interpreted where there is no GPU."""
    module = pytest.importorskip("sparsepath_vit.model.attention_triton_launch")
    if not (module.IS_INTERPRETED or torch.cuda.is_available()):
        pytest.skip("needs a GPU, or TRITON_INTERPRET=1 before Triton is imported")
    block_attention_backend("triton")
    return module


@pytest.fixture
def cpu_kernel(block_attention_backend):
    """The kernel for CPUs, chosen."""
    reason = BACKENDS["cpu_kernel"].missing(torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    block_attention_backend("cpu_kernel")


class TestKernelAsBackend:
    def test_it_gives_the_numbers_of_the_tiles(self, kernel, block_attention_backend):
        device = "cpu" if kernel.IS_INTERPRETED else "cuda"
        grid = TokenGrid.create([(5, 4)], num_global_tokens=2, window_size=2, device=device)
        fused = random_states(grid).to(device).requires_grad_()
        results = []
        for backend in ("triton", "sdpa_tiles"):
            block_attention_backend(backend)
            output = block_attention(*fused.permute(2, 0, 3, 1, 4), grid)
            results.append((output, *torch.autograd.grad(output.square().sum(), fused)))
        torch.testing.assert_close(results[0], results[1])

    def test_dropout_is_left_to_the_tiles_and_said(self, kernel, monkeypatch, warnings_said):
        device = "cpu" if kernel.IS_INTERPRETED else "cuda"
        grid = TokenGrid.create([(3, 3)], num_global_tokens=1, window_size=2, device=device)
        states = random_states(grid).to(device).permute(2, 0, 3, 1, 4)
        monkeypatch.setattr(kernel, "launch_block_attention", lambda *rest: pytest.fail("the kernel has no dropout"))
        attention_backends._log_once.cache_clear()
        said = warnings_said(lambda: block_attention(*states, grid, dropout=0.2))
        assert said == ["block_sparse: the Triton kernel has no dropout; left to the tiles of SDPA calls."]

    def test_a_head_dimension_it_lacks_is_refused_with_the_way_out(self, kernel):
        device = "cpu" if kernel.IS_INTERPRETED else "cuda"
        grid = TokenGrid.create([(2, 2)], num_global_tokens=1, window_size=2, device=device)
        states = random_states(grid, head_dim=24).to(device).permute(2, 0, 3, 1, 4)
        with pytest.raises(ValueError, match=r"query has head_dim 24: .*choose the backend 'sdpa_tiles'"):
            block_attention(*states, grid)


class TestPreparation:
    @pytest.mark.parametrize("name", BACKENDS)
    def test_every_backend_prepares_a_grid_once_and_a_pruned_one_anew(self, name):
        backend = BACKENDS[name]
        grid = TokenGrid.create([(9, 9)], num_global_tokens=1, window_size=4)
        prepared = prepared_grid(backend, grid)
        pruned = grid.select(torch.arange(0, 81, 2), [41])
        assert prepared_grid(backend, pruned) is not prepared
        assert prepared_grid(backend, grid) is prepared

    @pytest.mark.parametrize("name", ["triton", "sdpa_tiles"])  # whose first table has the end of each tile's queries
    def test_a_grid_is_prepared_once_and_the_grids_made_from_it_anew(self, name):
        backend = BACKENDS[name]
        grid = TokenGrid.create([(9, 9)], num_global_tokens=1, window_size=4)
        prepared = prepared_grid(backend, grid)
        assert prepared_grid(backend, grid) is prepared
        pruned = grid.select(torch.arange(0, 81, 2), [41])
        assert prepared_grid(backend, pruned).tensors[0][:, 1].max() == 42
        assert prepared_grid(backend, grid.with_global_tokens(3)).tensors[0][:, 1].max() == 84
        assert prepared_grid(backend, grid) is prepared

    @torch.no_grad()
    def test_all_layers_share_what_is_read_of_a_grid(self, monkeypatch, block_attention_backend):
        """Regression: the SDPA tiles read the block offsets, and on a GPU waited for it, in every layer."""
        block_attention_backend("sdpa_tiles")
        made = []
        make = attention_sdpa_tables._tile_table
        monkeypatch.setattr(attention_sdpa_tables, "_tile_table", lambda *rest: made.append(rest) or make(*rest))
        model = small_model(SparsePathViTModel, prune_ratio=0.5)
        assert model.config.num_hidden_layers == 4
        model(random_pixels(1, 9, 9))
        assert len(made) == 2  # before and after pruning

    def test_the_operator_takes_no_tensor_of_a_grid_on_a_gpu_that_a_backend_would_have_to_read(self):
        grid = TokenGrid.create([(9, 9)], num_global_tokens=1, window_size=4)
        own = {id(value) for value in vars(grid).values()}
        for backend in BACKENDS.values():
            assert not own & {id(tensor) for tensor in prepared_grid(backend, grid).tensors}


class TestRegistry:
    def test_a_backend_of_ones_own_is_one_entry(self, monkeypatch, block_attention_backend):
        """It is chosen by name, runs in the operator forward and backward, and is what the doctor names."""

        def forward(query, key, value, prepared, scale, dropout, generator):
            return value * prepared.numbers[0], None

        def backward(grad_output, query, key, value, output, logsumexp, prepared, scale, dropout, generator):
            return torch.zeros_like(query), torch.zeros_like(key), grad_output * prepared.numbers[0]

        own = dataclasses.replace(
            BACKENDS["sdpa_tiles"],
            name="own",
            description="backend of a test",
            prepare=lambda grid: PreparedGrid([grid.rows.clone()], [grid.num_global_tokens]),
            forward=forward,
            backward=backward,
        )
        monkeypatch.setitem(BACKENDS, "own", own)
        monkeypatch.setattr(attention_backends, "CHOICES", (*attention_backends.CHOICES, "own"))
        block_attention_backend("own")
        grid = TokenGrid.create([(3, 2)], num_global_tokens=5, window_size=2)
        query, key, value = (states.clone().requires_grad_() for states in random_states(grid).permute(2, 0, 3, 1, 4))
        output = block_attention(query, key, value, grid)
        assert torch.equal(output, 5 * value)
        output.sum().backward()
        assert torch.equal(value.grad, torch.full_like(value, 5.0)) and not query.grad.any()
        assert attention_backends.describe_block_attention_backend("cpu").startswith("own (backend of a test)")

    def test_where_nothing_runs_the_reason_is_said(self, monkeypatch):
        without_cuda(monkeypatch)
        monkeypatch.setattr(attention_backends, "BACKENDS", {"triton": BACKENDS["triton"]})
        with pytest.raises(ValueError, match=r"No attention backend runs on cpu: .*there is no CUDA device"):
            attention_backends.block_attention_backend("cpu")


def attend(fused, grid):
    """Attention of all patch tokens twice, then of every second one."""
    num_globals, count = grid.num_global_tokens, grid.counts[0]
    query, key, value = fused.permute(2, 0, 3, 1, 4)
    query = block_attention(block_attention(query, key, value, grid), key, value, grid)
    kept = torch.arange(0, count - count % 2, 2, device=grid.device)
    tokens = torch.cat([torch.arange(num_globals, device=grid.device), kept + num_globals])
    pruned = grid.select(kept, [count // 2])
    return block_attention(query[:, :, tokens], key[:, :, tokens], value[:, :, tokens], pruned)


class TestOperator:
    @pytest.mark.parametrize(
        "backend, dropout", [("sdpa_tiles", 0.0), ("sdpa_tiles", 0.3), ("cpu_kernel", 0.0), ("triton", 0.0)]
    )
    def test_torch_library_finds_no_fault(self, backend, dropout, request):
        if backend == "triton":
            request.getfixturevalue("kernel")
        if backend == "cpu_kernel":
            request.getfixturevalue("cpu_kernel")
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        grid = TokenGrid.create([(3, 2)], num_global_tokens=1, window_size=2, device=device)
        states = [torch.randn(grid.num_tokens, 1, 16, device=device).requires_grad_() for _ in range(3)]
        seed = torch.tensor(5) if dropout else None
        arguments = (*states, *prepared_grid(BACKENDS[backend], grid), [], None, None, 0.25, dropout, seed, backend)
        torch.library.opcheck(attention_operator._block_attention, arguments)

    @pytest.mark.parametrize("backend", ["sdpa_tiles", "cpu_kernel", "triton"])
    def test_one_graph_serves_every_image_size(self, backend, request, monkeypatch, block_attention_backend):
        """Two compilations: the first for its size, the second with sizes as variables."""
        if backend == "cpu_kernel":
            request.getfixturevalue("cpu_kernel")
        if backend == "sdpa_tiles":
            block_attention_backend("sdpa_tiles")
        if backend == "triton":
            # Tables and operator are traced; what the kernel computes is tested elsewhere, and slow to interpret.
            kernel = request.getfixturevalue("kernel")
            monkeypatch.setattr(
                kernel,
                "launch_block_attention",
                lambda query, key, *rest: (query + key, query.new_ones(query.shape[1::-1]).float()),
            )
            monkeypatch.setattr(
                kernel, "launch_block_attention_backward", lambda grad, *rest: (grad.clone(), grad.clone(), 2 * grad)
            )
        device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
        torch._dynamo.reset()
        counter = CompileCounterWithBackend("aot_eager")
        compiled = torch.compile(attend, fullgraph=True, backend=counter)
        for side in (12, 16, 9, 20, 17):
            grid = TokenGrid.create([(side, side + 1)], num_global_tokens=3, window_size=4, device=device)
            fused = random_states(grid).to(device).requires_grad_()
            output = compiled(fused, grid)
            expected = attend(fused, grid)
            torch.testing.assert_close(output, expected)
            gradients = [torch.autograd.grad(result.square().sum(), fused)[0] for result in (output, expected)]
            torch.testing.assert_close(*gradients)
        assert counter.frame_count <= 2
