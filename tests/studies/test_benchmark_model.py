# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
import torch

from sparsepath_vit.conversion import architecture
from studies.benchmarks.model import check_against_timm, converted, random_timm_network


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
