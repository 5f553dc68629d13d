# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Converted weights compute what timm and Transformers compute: every known model's form, at small width."""

import dataclasses
import gc
import math
import tempfile
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import save_file
from source_networks import (
    DINOV2_MODELS,
    SMALL_TIMM,
    SMALL_TRANSFORMERS,
    TIMM_MODELS,
    TRANSFORMERS_MODELS,
    dinov2_state,
    randomize,
    timm_network,
    transformers_network,
)
from torch.nn.functional import interpolate

from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.conversion import architecture, convert, convert_checkpoint

# At small width these have the form of another one, which is tested for them.
SAME_FORM = {
    "h-optimus-1": "h-optimus-0",
    "kaiko-b16": "kaiko-s16",
    "kaiko-b8": "kaiko-s8",
    "hibou-l": "hibou-b",
}
TOLERANCE = 2e-5  # largest absolute error, in units of the output's root mean square


def write_source(name, folder):
    """The small network of a known model and its checkpoint in the form its authors publish."""
    if name in TRANSFORMERS_MODELS:
        network = randomize(transformers_network(name, **SMALL_TRANSFORMERS))
        network.save_pretrained(folder)
    elif name in DINOV2_MODELS:
        network = randomize(timm_network(name, **SMALL_TIMM))
        torch.save(dinov2_state(network), folder / "checkpoint.pth")
    else:
        network = randomize(timm_network(name, **SMALL_TIMM))
        torch.save(network.state_dict(), folder / "pytorch_model.bin")
    return network


def convert_small(name, folder, **overrides):
    table = architecture(name).config
    fields = {key: table[key] for key in ("layer_norm_eps", "pooling")}
    convert_checkpoint(folder, folder / "converted", num_attention_heads=4, **fields, **overrides)
    return SparsePathViTModel.from_pretrained(folder / "converted").eval()


def relative_error(found, wanted):
    return ((found - wanted).abs().max() / wanted.square().mean().sqrt()).item()


def some_sizes(patch):
    """224 px, larger, and not square, in whole patches."""
    return [(224, 224), (448, 448), (196 // patch * patch, 350 // patch * patch)]


def random_image(height, width):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(height + width))


@pytest.mark.parametrize("name", sorted({**TIMM_MODELS, **DINOV2_MODELS}.keys() - SAME_FORM))
@torch.inference_mode()
def test_dense_mode_equals_timm_at_any_size(name, tmp_path):
    network = write_source(name, tmp_path)
    # timm resamples GPFM's position embeddings as all others, its authors' code does not.
    as_timm = {"position_antialias": True, "position_interpolation_offset": 0.0}
    model = convert_small(name, tmp_path, **(as_timm if name == "gpfm" else {}))
    model.config.window_size = None
    for height, width in some_sizes(model.config.patch_size):
        image = random_image(height, width)
        assert relative_error(model(image).last_hidden_state, network(image)) <= TOLERANCE


def dinov2_positions(stored, rows, columns):
    """DINOv2's own `interpolate_pos_encoding` for models without registers: (1, 1 + N, D) -> (1, 1 + N', D)."""
    side = math.isqrt(stored.shape[1] - 1)
    if (rows, columns) == (side, side):
        return stored
    grid = stored[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)
    scale = ((rows + 0.1) / side, (columns + 0.1) / side)
    grid = interpolate(grid, scale_factor=scale, mode="bicubic", antialias=False)
    return torch.cat([stored[:, :1], grid.flatten(2).mT], dim=1)


@torch.inference_mode()
def test_gpfm_resamples_positions_as_its_authors_do(tmp_path):
    """Regression: the offset of 0.1 in DINOv2's code was left out, so features differed at other sizes than 224 px."""
    network = write_source("gpfm", tmp_path)
    model = convert_small("gpfm", tmp_path)
    model.config.window_size = None
    stored = network.pos_embed.data
    for height, width in [*some_sizes(14), (1400, 224)]:
        rows, columns = height // 14, width // 14
        # A timm network whose stored grid is the image's own resamples nothing.
        network.set_input_size((height, width))
        network.pos_embed.data = dinov2_positions(stored, rows, columns)
        image = random_image(height, width)
        assert relative_error(model(image).last_hidden_state, network(image)) <= TOLERANCE


@pytest.mark.parametrize("name", sorted(TRANSFORMERS_MODELS.keys() - SAME_FORM))
@torch.inference_mode()
def test_dense_mode_equals_transformers_at_any_size(name, tmp_path):
    """Regression: position embeddings were antialiased, which Transformers' ViT and Dinov2 do not do."""
    network = write_source(name, tmp_path)
    model = convert_small(name, tmp_path)
    model.config.window_size = None
    arguments = {"interpolate_pos_encoding": True} if name == "phikon" else {}
    native = model.config.image_size
    for height, width in dict.fromkeys([(native, native), *some_sizes(model.config.patch_size)]):
        image = random_image(height, width)
        wanted = network(image, **arguments).last_hidden_state
        assert relative_error(model(image).last_hidden_state, wanted) <= TOLERANCE


@pytest.mark.parametrize("name", ["uni2-h", "virchow2", "uni", "hibou-b"])
@torch.inference_mode()
def test_blocks_of_8_equal_dense_at_224(name, tmp_path):
    write_source(name, tmp_path)
    model = convert_small(name, tmp_path)
    assert model.config.window_size == 8
    image = random_image(224, 224)
    sparse = model(image)
    model.config.window_size = None
    dense = model(image)
    assert relative_error(sparse.last_hidden_state, dense.last_hidden_state) <= TOLERANCE
    assert relative_error(sparse.pooler_output, dense.pooler_output) <= TOLERANCE


@torch.inference_mode()
def test_blocks_differ_from_dense_where_they_do_not_cover_the_image(tmp_path):
    """The other tests would pass if window_size were ignored."""
    write_source("uni2-h", tmp_path)
    model = convert_small("uni2-h", tmp_path)
    image = random_image(448, 448)
    sparse = model(image).last_hidden_state
    model.config.window_size = None
    assert relative_error(sparse, model(image).last_hidden_state) > 0.01


@torch.inference_mode()
def test_pooling_of_virchow_is_cls_and_mean_of_the_patches(tmp_path):
    network = write_source("virchow2", tmp_path)
    model = convert_small("virchow2", tmp_path)
    image = random_image(224, 224)
    tokens = network(image)
    wanted = torch.cat([tokens[:, 0], tokens[:, 5:].mean(dim=1)], dim=-1)
    assert relative_error(model(image).pooler_output, wanted) <= TOLERANCE


def record_outputs(modules, run):
    """What each module returned in one run, by our name for it."""
    outputs, hooks = {}, []
    for name, module in modules.items():

        def keep(_module, _inputs, output, name=name):
            outputs[name] = (output[0] if isinstance(output, tuple) else output).clone()

        hooks.append(module.register_forward_hook(keep))
    run()
    for hook in hooks:
        hook.remove()
    return outputs


@pytest.mark.parametrize("name", ["uni2-h", "virchow2", "uni", "kaiko-s16"])
@torch.inference_mode()
def test_networks_agree_module_by_module(name, tmp_path):
    """Walks both networks: nothing but the attention pattern and the pruning differs from the source."""
    network = write_source(name, tmp_path)
    model = convert_small(name, tmp_path)
    model.config.window_size = None
    image = random_image(224, 224)
    theirs = {"patch_embeddings": network.patch_embed, "embeddings": network.norm_pre, "norm": network.norm}
    ours = {
        "patch_embeddings": model.embeddings.patch_embeddings,
        "embeddings": model.embeddings,
        "norm": model.norm,
    }
    for index, (block, layer) in enumerate(zip(network.blocks, model.encoder.layers, strict=True)):
        pairs = {"": (block, layer), ".norm1": (block.norm1, layer.norm1), ".norm2": (block.norm2, layer.norm2)}
        pairs[".qkv"] = (block.attn.qkv, layer.attention.qkv)
        pairs[".attention"] = (block.attn, layer.attention)
        pairs[".mlp"] = (block.mlp, layer.mlp)
        if model.config.use_layerscale:
            pairs |= {".scale1": (block.ls1, layer.layer_scale1), ".scale2": (block.ls2, layer.layer_scale2)}
        theirs |= {f"layer {index}{part}": pair[0] for part, pair in pairs.items()}
        ours |= {f"layer {index}{part}": pair[1] for part, pair in pairs.items()}
    wanted = record_outputs(theirs, lambda: network(image))
    found = record_outputs(ours, lambda: model(image))
    assert wanted.keys() == found.keys() == theirs.keys()
    errors = {part: relative_error(found[part].view_as(wanted[part]), wanted[part]) for part in wanted}
    assert max(errors.values()) <= TOLERANCE, {part: error for part, error in errors.items() if error > TOLERANCE}


@torch.inference_mode()
def test_hidden_states_are_the_outputs_of_timms_blocks(tmp_path):
    network = write_source("h-optimus-0", tmp_path)
    model = convert_small("h-optimus-0", tmp_path)
    image = random_image(196, 350)
    model.config.window_size = None
    blocks = {f"{index}": block for index, block in enumerate(network.blocks)}
    wanted = record_outputs({"embeddings": network.norm_pre, **blocks}, lambda: network(image))
    found = model(image, output_hidden_states=True).hidden_states
    assert len(found) == len(wanted) == 4
    for ours, theirs in zip(found, wanted.values(), strict=True):
        assert relative_error(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize(("name", "same"), SAME_FORM.items())
def test_models_left_out_differ_in_size_only(name, same):
    sizes = {"hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"}
    configs = [architecture(each).config.items() for each in (name, same)]
    assert {field for field, _ in set(configs[0]) ^ set(configs[1])} <= sizes


def recording_memory(write, memory):
    """`write` that notes the process's memory before and after, when the whole source has been read."""

    def recorded(*arguments):
        memory.append(psutil.Process().memory_info().rss)
        write(*arguments)
        memory.append(psutil.Process().memory_info().rss)

    return recorded


@torch.inference_mode()
def test_true_shape_of_uni2_h(monkeypatch):
    """Four of its 24 layers, 113 million weights: converted from a file as published, compared at 224 px.

    That all 24 have the shapes of the table, test_architectures.py says.
    """
    full = architecture("uni2-h")
    known = dataclasses.replace(full, config={**full.config, "num_hidden_layers": 4})
    monkeypatch.setattr(convert, "find_architecture", lambda name: known)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        network = timm_network("uni2-h", device="meta", weight_init="skip", depth=4).to_empty(device="cpu")
        # Every tensor is another stretch of one random vector, as drawing 113 million numbers takes long.
        noise = torch.rand(2**24, generator=torch.Generator().manual_seed(0))
        for index, (name, parameter) in enumerate(network.named_parameters()):
            is_scale = name.endswith("gamma") or ("norm" in name and name.endswith("weight"))
            low, high = (0.7, 1.3) if is_scale else (-0.05, 0.05)
            stretch = noise[9973 * index :][: parameter.numel()].view_as(parameter)
            torch.lerp(torch.tensor(low), torch.tensor(high), stretch, out=parameter.data)
        image = random_image(224, 224)
        wanted = network(image)
        save_file(network.state_dict(), folder / "model.safetensors")
        del network
        gc.collect()
        memory = [psutil.Process().memory_info().rss]
        monkeypatch.setattr(convert, "write_safetensors", recording_memory(convert.write_safetensors, memory))
        report = convert_checkpoint(folder, folder / "converted", architecture="uni2-h")
        assert max(memory) - memory[0] <= 1.1 * (folder / "model.safetensors").stat().st_size
        table = known.build_config(architectures=["SparsePathViTModel"], dtype=torch.float32)
        assert report.config.to_dict() == table.to_dict()
        model = SparsePathViTModel.from_pretrained(folder / "converted").eval()
        assert report.num_parameters == sum(p.numel() for p in model.parameters()) > 110e6
        found = model(image).last_hidden_state  # blocks of 8 cover 224 px
        assert relative_error(found, wanted) <= TOLERANCE
