# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Several processes that share an image give the numbers of one: two and three real processes, gloo.

What the processes do stands in `split_cases.py`; each set of them runs once.
"""

import multiprocessing

import pytest
import torch
from small_models import random_pixels, small_model
from split_cases import (
    COLUMNS,
    EQUAL,
    KILLED,
    ROWS,
    TIMEOUT_SECONDS,
    equal_models,
    outputs_of,
    run_cases,
    top_pixels,
    uneven_model,
)

from sparsepath_vit import SparsePathViTModel

OF_THE_WHOLE_IMAGE = ("pooler_output", "grid_sizes", "prune_scores", "logits")
NAMES = [*EQUAL, "uneven", "float32", "uint8", "classifier"]


@pytest.fixture(scope="module")
def processes(request, tmp_path_factory):
    """What each of `request.param` processes found."""
    folder, number = tmp_path_factory.mktemp("processes"), request.param
    # Forked, so that they need not import everything again.
    context = multiprocessing.get_context("fork")
    started = [context.Process(target=run_cases, args=(rank, number, folder)) for rank in range(number)]
    for process in started:
        process.start()
    for process in started:
        process.join()
    assert [process.exitcode for process in started] == [0] * (number - 1) + [KILLED]
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(number)]


@pytest.fixture(scope="module")
def one_process():
    return {name: outputs_of(model, pixels, **arguments) for name, model, pixels, arguments in equal_models()}


two_and_three = pytest.mark.parametrize("processes", [2, 3], indirect=True, ids=["two", "three"])
pytestmark = two_and_three


def joined(parts):
    """The outputs of several processes as those of one."""
    whole = {name: parts[0][name] for name in OF_THE_WHOLE_IMAGE if name in parts[0]}
    for name in ("patch_positions", "patch_weights"):
        if name in parts[0]:
            whole[name] = torch.cat([part[name] for part in parts], dim=1)
    if "last_hidden_state" in parts[0]:
        num_globals = parts[0]["last_hidden_state"].shape[1] - parts[0]["patch_positions"].shape[1]
        states = [part["last_hidden_state"][:, num_globals if rank else 0 :] for rank, part in enumerate(parts)]
        whole["last_hidden_state"] = torch.cat(states, dim=1)
    return whole


@pytest.mark.parametrize("name", NAMES)
def test_processes_give_the_numbers_of_one(processes, one_process, name):
    parts, expected = [found[name] for found in processes], one_process[name]
    found = joined(parts)
    assert found.keys() == expected.keys()
    for key, wanted in expected.items():
        assert found[key].dtype == wanted.dtype and found[key].shape == wanted.shape, key
        if not wanted.is_floating_point():
            assert torch.equal(found[key], wanted), key
        else:
            is_float32 = key in ("prune_scores", "pooler_output", "logits")  # or pooled from float32 sums
            tolerance = 1e-5 if name in ("float32", "uint8") else 2e-6 if is_float32 else 1e-11
            assert (found[key] - wanted).abs().max() <= tolerance * wanted.abs().max(), key


@pytest.mark.parametrize("name", NAMES)
def test_what_all_processes_have_is_the_same_bit_for_bit(processes, name):
    first, *others = (found[name] for found in processes)
    for other in others:
        for key in OF_THE_WHOLE_IMAGE:
            assert key not in first or torch.equal(first[key], other[key]), key
        if "last_hidden_state" in first:
            num_globals = first["last_hidden_state"].shape[1] - first["patch_positions"].shape[1]
            assert torch.equal(first["last_hidden_state"][:, :num_globals], other["last_hidden_state"][:, :num_globals])


def test_a_group_of_one_process_has_the_whole_image(processes):
    model = small_model(SparsePathViTModel, prune_ratio=0.6, tokens_per_strip=40)
    expected = outputs_of(model, random_pixels(1, ROWS, COLUMNS))
    for found in processes:
        for key, wanted in expected.items():
            assert torch.equal(found["a group of one"][key], wanted), key


def test_rows_are_dealt_anew_where_pruning_left_them_uneven(processes):
    assert int(outputs_of(uneven_model(), top_pixels())["patch_positions"][0, :, 0].max()) < 8
    kept = [found["uneven"]["patch_positions"].shape[1] for found in processes]
    even = sum(kept) / 2  # two rows of blocks hold tokens: a third process has none
    assert kept[2:] == [0] * (len(kept) - 2) or min(kept) == 0
    assert max(kept) <= 1.2 * even, kept


def test_a_layer_exchanges_its_neighbours_rows_and_parts_of_the_global_tokens(processes):
    """Hidden states of one row of blocks to each neighbour: half of what keys and values of it would be."""
    width, heads, num_globals, layers = 32, 2, 3, 4
    for rank, found in enumerate(processes):
        neighbours = (rank > 0) + (rank < len(processes) - 1)
        row = 4 * COLUMNS * width * 4
        # The last row of blocks, of a single token row, is never a neighbour's neighbour.
        assert found["bytes sent"] == [neighbours * row] * layers
        assert found["bytes gathered"] == [heads * num_globals * (width // heads + 1) * 4] * layers


def test_progress_is_that_of_the_whole_image(processes):
    tokens = ROWS * COLUMNS
    for found in processes:
        assert sum(found["progress"]) == 3 * tokens + 2 * (tokens - tokens // 2)
        assert len(found["progress"]) > 5


REFUSED = {
    "other pixels": "other images than process 0 \\(pixel_values",
    "another size": "other images than process 0 \\(grid_sizes is \\(\\(29, 9\\),\\), there \\(\\(28, 9\\),\\)",
    "another mask": "other images than process 0 \\(patch_mask",
    "another configuration": "other weights or configurations .*neighbor_radius is 1, there 2",
    "other weights": "other weights or configurations than process 0 \\(weights",
    "NaN in one process": "NaN",
    "fewer block rows than processes": "1 rows of blocks for .* at most 1",
    "two images": "2 images",
    "context tokens": "num_context_tokens=9",
    "unprune": "config.unprune",
    "hidden states": "output_hidden_states",
    "gradients": "no_grad",
    "training": "training mode",
    "dense": "'sdpa'",
    "a hook": "SparsePathViTMLP has a hook",
}


@pytest.mark.parametrize("name", REFUSED)
def test_wrong_use_is_an_error_in_every_process(processes, name):
    for found in processes:
        assert pytest.raises(ValueError, match=REFUSED[name]).matches(ValueError(found[name])), found[name]


def test_right_use_follows_wrong_use(processes):
    assert not any("right use" in found for found in processes)


def test_what_one_process_refuses_the_others_name(processes):
    refusals = [found["NaN in one process"] for found in processes]
    assert refusals[1].startswith("ValueError: pixel_values holds NaN")
    assert refusals[0].startswith("OtherProcessError: Process 1 of ")


def test_a_slow_process_is_waited_for(processes):
    expected = outputs_of(small_model(SparsePathViTModel), random_pixels(1, ROWS, COLUMNS))["pooler_output"]
    for found in processes:
        assert (found["slow"] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_a_process_that_does_not_answer_ends_the_others_in_the_groups_timeout(processes):
    for found in processes[:-1]:
        assert found["no answer"].startswith("LostProcessError: Process ")
        assert "timeout: look for the first error" in found["no answer"]
        assert found["no answer, seconds"] < TIMEOUT_SECONDS / 2


def test_a_killed_process_ends_the_others(processes):
    assert "killed" not in processes[-1]
    for found in processes[:-1]:
        assert found["killed"].startswith("LostProcessError: Process ")


def test_processes_that_are_out_of_step_say_so_instead_of_waiting(processes):
    for found in processes[:-1]:
        for name in ("no answer, next", "killed, next"):
            assert "not in step any more" in found[name]
