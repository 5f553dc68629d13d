# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from sparsepath_vit.conversion import architecture
from studies.benchmarks.model import (
    ModelBenchmark,
    Peer,
    check_against_timm,
    converted,
    number_of_tiles,
    of_tiles,
    random_timm_network,
)


def test_a_region_is_as_many_tiles_as_hold_its_pixels():
    """In full batches and a rest, whichever batch is the fastest."""
    assert [number_of_tiles(size) for size in (56, 224, 448, 1400, 3430)] == [1, 1, 4, 39, 234]
    seen = []
    peer = Peer("tiles_timm", lambda pixel_values: seen.append(tuple(pixel_values.shape)), None)
    settings = ModelBenchmark("", (), (), torch.float32, "cpu", 8, 0.0, 1, 0, False)
    tiles = of_tiles(peer, settings)
    seen.clear()
    tiles.run(torch.zeros(1, 3, 1400, 1400))
    assert sum(shape[0] for shape in seen) == 39 and {shape[1:] for shape in seen} == {(3, 224, 224)}
    assert {shape[0] for shape in seen[:-1]} == {tiles.tiles_per_batch}


def test_a_model_that_computes_something_else_is_not_timed():
    config = architecture("vit-tiny-14-reg4").build_config(num_hidden_layers=2)
    network = random_timm_network(config, torch.float32)
    ours = converted(network, config)
    dense = architecture("vit-tiny-14-reg4").build_config(window_size=None)
    check_against_timm(ours, network, dense)
    with torch.no_grad():
        ours.encoder.layers[1].attention.qkv.weight[0] += 0.1
    with pytest.raises(ValueError, match=r"differs from timm.*not timed"):
        check_against_timm(ours, network, dense)
