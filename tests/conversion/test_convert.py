# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
import sys

import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from source_networks import SMALL_TRANSFORMERS, randomize, transformers_network

from sparsepath_vit import SparsePathViTConfig, SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.conversion import architecture, convert, convert_checkpoint, sources, weights
from sparsepath_vit.model import remote_code
from sparsepath_vit.model.configuration_sparsepath_vit import AUTO_MAP as MODEL_AUTO_MAP
from sparsepath_vit.model.image_processing_sparsepath_vit import AUTO_MAP as IMAGE_PROCESSOR_AUTO_MAP
from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.model.remote_code import remote_code_files

OUTPUT_FILES = {"config.json", "model.safetensors", "preprocessor_config.json", "README.md"}


def test_output_folder_is_complete(small_file, tmp_path):
    report = convert_checkpoint(
        small_file, tmp_path / "out", num_attention_heads=4, prune_ratio=0.6, prune_after_layer=2
    )
    files = {path.name for path in report.output_dir.iterdir()}
    assert files > OUTPUT_FILES
    assert {"configuration_sparsepath_vit.py", "modeling_sparsepath_vit.py", "token_grid.py"} < files
    auto_map = {**MODEL_AUTO_MAP, **IMAGE_PROCESSOR_AUTO_MAP}
    assert {name for name in files if name.endswith(".py")} == {file.name for file in remote_code_files(auto_map)}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]
    config = SparsePathViTConfig.from_pretrained(report.output_dir)
    assert (config.num_attention_heads, config.prune_ratio, config.num_register_tokens) == (4, 0.6, 8)
    assert config.auto_map["AutoModel"] == "modeling_sparsepath_vit.SparsePathViTModel"
    assert config.architectures == ["SparsePathViTModel"]
    assert report.num_parameters == sum(tensor.numel() for tensor in load_file(small_file).values())


def test_every_source_tensor_arrives_bit_for_bit_once(small_file, small_state, tmp_path):
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert len(converted) == len(small_state)
    left = dict(converted)
    for tensor in small_state.values():
        left.pop(next(name for name, found in left.items() if torch.equal(found, tensor)))
    assert left == {}


def test_query_key_and_value_are_stacked_in_this_order(tmp_path):
    network = randomize(transformers_network("phikon", **SMALL_TRANSFORMERS))
    network.save_pretrained(tmp_path / "source")
    source = load_file(tmp_path / "source" / "model.safetensors")
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    stacked = load_file(tmp_path / "out" / "model.safetensors")["encoder.layers.1.attention.qkv.weight"]
    for part, name in zip(stacked.chunk(3), ("query", "key", "value"), strict=True):
        assert torch.equal(part, source[f"encoder.layer.1.attention.attention.{name}.weight"])


def anonymous_memory():
    """Bytes of this process that are no file's mapping."""
    memory = psutil.Process().memory_info()
    return memory.rss - memory.shared


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads Linux's account of memory")
def test_stacking_needs_no_second_copy_of_the_weights(tmp_path, monkeypatch):
    """Regression: separate query, key and value took a quarter more memory than the file, separate gates 70 %."""
    fields = {"hidden_size": 768, "num_hidden_layers": 5, "num_attention_heads": 12, "intermediate_size": 1024}
    transformers_network("phikon", **fields).save_pretrained(tmp_path / "source", max_shard_size="20MB")
    size = sum(file.stat().st_size for file in (tmp_path / "source").glob("*.safetensors"))
    used = []

    def recording(names, **_):
        for name in names:
            yield name
            used.append(anonymous_memory())

    monkeypatch.setattr(weights, "tqdm", recording)
    before = anonymous_memory()
    convert_checkpoint(tmp_path / "source", tmp_path / "out")
    assert size > 60e6 and len(used) > 60
    assert max(used) - before < 0.15 * size


def test_separate_gate_and_value_give_the_packed_model(small_state, tmp_path):
    for name in [name for name in small_state if ".mlp.fc1." in name]:
        gate, value = small_state.pop(name).chunk(2)
        small_state |= {name.replace("fc1", "w1"): gate.clone(), name.replace("fc1", "w2"): value.clone()}
    for name in [name for name in small_state if ".mlp.fc2." in name]:
        small_state[name.replace("fc2", "w3")] = small_state.pop(name)
    save_file(small_state, tmp_path / "separate.safetensors")
    convert_checkpoint(tmp_path / "separate.safetensors", tmp_path / "out", num_attention_heads=4)
    converted = load_file(tmp_path / "out" / "model.safetensors")
    gate = small_state["blocks.0.mlp.w1.weight"]
    assert torch.equal(converted["encoder.layers.0.mlp.fc1.weight"][: len(gate)], gate)
    assert torch.equal(converted["encoder.layers.0.mlp.fc2.weight"], small_state["blocks.0.mlp.w3.weight"])


def test_converted_weights_load_into_a_classifier(small_file, tmp_path):
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4)
    classifier = SparsePathViTForImageClassification.from_pretrained(tmp_path / "out", num_labels=3)
    encoder = SparsePathViTModel.from_pretrained(tmp_path / "out")
    for name, parameter in encoder.named_parameters():
        assert torch.equal(classifier.get_parameter(f"sparsepath_vit.{name}"), parameter)


@pytest.mark.parametrize("dtype", ["bfloat16", torch.float16])
def test_dtype(small_file, small_state, tmp_path, dtype):
    wanted = torch.bfloat16 if dtype == "bfloat16" else dtype
    report = convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, dtype=dtype)
    assert report.dtype == wanted
    converted = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(converted["norm.weight"], small_state["norm.weight"].to(wanted))
    assert SparsePathViTModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == wanted


def test_of_mixed_types_the_config_states_the_widest(small_state, tmp_path):
    """Regression: the patch embedding's type was stated, and loading rounded the LayerNorms kept in float32."""
    mixed = {name: tensor if "norm" in name else tensor.bfloat16() for name, tensor in small_state.items()}
    save_file(mixed, tmp_path / "mixed.safetensors")
    report = convert_checkpoint(tmp_path / "mixed.safetensors", tmp_path / "out", num_attention_heads=4)
    assert report.dtype == torch.float32
    assert torch.equal(SparsePathViTModel.from_pretrained(tmp_path / "out").norm.weight, small_state["norm.weight"])


@pytest.mark.parametrize(("number", "dtype"), [(float("nan"), None), (float("-inf"), None), (1e6, "float16")])
def test_numbers_that_are_not_finite_are_refused(small_state, tmp_path, number, dtype):
    """Regression: they were converted in silence, and every feature became NaN."""
    small_state["norm.bias"] = torch.full((96,), number)
    save_file(small_state, tmp_path / "broken.safetensors")
    with pytest.raises(ValueError, match=f"norm.bias holds NaN or infinite numbers as {dtype or 'float32'}"):
        convert_checkpoint(tmp_path / "broken.safetensors", tmp_path / "out", num_attention_heads=4, dtype=dtype)
    assert [path.name for path in tmp_path.iterdir()] == ["broken.safetensors"]


@pytest.mark.parametrize("tensor", [torch.zeros(96).to_sparse(), torch.zeros(96, device="meta")])
def test_tensors_that_are_not_plain_are_refused(small_state, tmp_path, tensor):
    torch.save({**small_state, "norm.bias": tensor}, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"norm.bias: sparse or without content"):
        convert_checkpoint(tmp_path / "odd.pth", tmp_path / "out", num_attention_heads=4)


def test_fields_of_the_wrong_type_are_refused_by_name(small_file, tmp_path):
    """Regression: the configuration's own error ended in a traceback on the command line."""
    with pytest.raises(ValueError, match=r"(?s)configuration of model.safetensors.*'window_size'.*got str"):
        convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, window_size="eight")


def test_half_precision_source_stays_as_it_is(small_state, tmp_path):
    save_file({name: tensor.half() for name, tensor in small_state.items()}, tmp_path / "half.safetensors")
    report = convert_checkpoint(tmp_path / "half.safetensors", tmp_path / "out", num_attention_heads=4)
    assert report.dtype == torch.float16


def test_dtype_that_is_none(small_file, tmp_path):
    with pytest.raises(ValueError, match=r"dtype='int8' is not possible: choose float32, bfloat16, float16"):
        convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, dtype="int8")


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn])
def test_quantised_weights_are_refused(small_state, tmp_path, dtype):
    """Regression: 8-bit floats were taken for plain weights and written without their scales."""
    small_state["blocks.0.attn.proj.weight"] = torch.ones(96, 96, dtype=dtype)
    save_file(small_state, tmp_path / "quantised.safetensors")
    with pytest.raises(ValueError, match=rf"blocks.0.attn.proj.weight is {dtype}: quantised weights"):
        convert_checkpoint(tmp_path / "quantised.safetensors", tmp_path / "out", num_attention_heads=4)
    assert [path.name for path in tmp_path.iterdir()] == ["quantised.safetensors"]


def test_head_count_must_come_from_somewhere(small_file, tmp_path):
    with pytest.raises(ValueError, match=r"head count of model.safetensors is not known.*num_attention_heads=.*config"):
        convert_checkpoint(small_file, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_known_architecture_must_fit_the_tensors(small_file, tmp_path):
    with pytest.raises(ValueError, match=r"hidden_size: the tensors say 96, architecture='uni2-h' says 1536"):
        convert_checkpoint(small_file, tmp_path / "out", architecture="uni2-h")


def test_known_architecture_gives_heads_epsilon_pooling_and_normalisation(small_state, tmp_path, monkeypatch):
    """A small stand-in for the table's entry, since true sizes do not fit a quick test."""
    entry = architecture("virchow2")
    config = {**entry.config, "hidden_size": 96, "num_hidden_layers": 3, "intermediate_size": 256}
    config |= {"num_attention_heads": 8, "layer_norm_eps": 1e-5, "num_register_tokens": 8}
    config["num_prefix_position_embeddings"] = 0
    stand_in = type(entry)(**{**vars(entry), "config": config, "image_mean": (0.1, 0.2, 0.3)})
    monkeypatch.setattr(convert, "find_architecture", lambda name: stand_in)
    save_file(small_state, tmp_path / "model.safetensors")
    report = convert_checkpoint(tmp_path, tmp_path / "out", architecture="virchow2", num_attention_heads=4)
    assert report.config.num_attention_heads == 4  # an argument wins over the table
    assert (report.config.layer_norm_eps, report.config.pooling) == (1e-5, "cls_mean")
    assert SparsePathViTImageProcessor.from_pretrained(tmp_path / "out").image_mean == (0.1, 0.2, 0.3)


def test_unknown_architecture_lists_the_known_ones(small_file, tmp_path):
    with pytest.raises(ValueError, match=r"architecture='uni3' is unknown.*Known: gpfm.*virchow2"):
        convert_checkpoint(small_file, tmp_path / "out", architecture="uni3")


def test_architecture_must_agree_with_the_hub_id(small_file, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "hf_hub_download", lambda hub_id, name, local_files_only: str(small_file))
    with pytest.raises(ValueError, match=r"architecture='h-optimus-1' does not fit bioptimus/H-optimus-0"):
        convert_checkpoint("bioptimus/H-optimus-0", tmp_path / "out", architecture="h-optimus-1")


def test_overrides_must_not_contradict_the_tensors(small_file, tmp_path):
    with pytest.raises(ValueError, match=r"patch_size: the tensors say 14, the argument says 16. Leave it out"):
        convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, patch_size=16)


def test_unknown_fields_are_refused(small_file, tmp_path):
    with pytest.raises(ValueError, match=r"windowsize: no such field of SparsePathViTConfig"):
        convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4, windowsize=8)


def test_normalisation_of_an_unknown_model(small_file, tmp_path):
    (small_file.parent / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.5, 0.6, 0.7]}))
    (small_file.parent / "config.json").write_text(json.dumps({"pretrained_cfg": {"std": [0.2, 0.3, 0.4]}}))
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4)
    processor = SparsePathViTImageProcessor.from_pretrained(tmp_path / "out")
    assert (processor.image_mean, processor.image_std) == ((0.5, 0.6, 0.7), (0.2, 0.3, 0.4))
    assert processor.patch_size == 14
    convert_checkpoint(small_file, tmp_path / "given", num_attention_heads=4, image_std=(0.1, 0.1, 0.1))
    assert SparsePathViTImageProcessor.from_pretrained(tmp_path / "given").image_std == (0.1, 0.1, 0.1)


def test_output_that_is_in_use(small_file, tmp_path):
    output = tmp_path / "out"
    convert_checkpoint(small_file, output, num_attention_heads=4)
    with pytest.raises(ValueError, match=r"output_dir='out' exists and is not empty.*overwrite=True"):
        convert_checkpoint(small_file, output, num_attention_heads=4)
    convert_checkpoint(small_file, output, num_attention_heads=2, overwrite=True)
    assert SparsePathViTConfig.from_pretrained(output).num_attention_heads == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_converted_checkpoint_is_not_converted_again(small_file, tmp_path):
    convert_checkpoint(small_file, tmp_path / "once", num_attention_heads=4)
    with pytest.raises(ValueError, match=r"source='.*once' is a converted checkpoint already: load it"):
        convert_checkpoint(tmp_path / "once", tmp_path / "twice")


def test_overwrite_touches_only_an_earlier_conversion(small_file, tmp_path):
    """overwrite=True on a home directory must not empty it."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match=r"output_dir='home' is no earlier conversion"):
        convert_checkpoint(small_file, tmp_path / "home", num_attention_heads=4, overwrite=True)
    with pytest.raises(ValueError, match=r"output_dir='source' holds the source"):
        convert_checkpoint(small_file, small_file.parent, num_attention_heads=4, overwrite=True)
    with pytest.raises(ValueError, match=r"is a file: name a folder"):
        convert_checkpoint(small_file, tmp_path / "home" / "thesis.tex", num_attention_heads=4)
    assert (tmp_path / "home" / "thesis.tex").read_text() == "years of work"


def test_a_failure_while_writing_leaves_the_earlier_conversion(small_file, tmp_path, monkeypatch):
    output = tmp_path / "out"
    convert_checkpoint(small_file, output, num_attention_heads=4)
    before = (output / "config.json").read_bytes()

    def full_disk(*arguments):
        raise OSError("No space left on device")

    monkeypatch.setattr(remote_code.shutil, "copyfile", full_disk)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(small_file, output, num_attention_heads=2, overwrite=True)
    assert (output / "config.json").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_an_empty_folder_may_be_the_output(small_file, tmp_path):
    (tmp_path / "out").mkdir()
    convert_checkpoint(small_file, tmp_path / "out", num_attention_heads=4)
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_report_names_what_was_left_out(small_state, tmp_path):
    torch.save({"model": {**small_state, "head.weight": torch.ones(5, 96)}}, tmp_path / "with_head.pth")
    report = convert_checkpoint(tmp_path / "with_head.pth", tmp_path / "out", num_attention_heads=4)
    assert report.ignored == {"head.weight": "classification head"}
    assert "with_head.pth (unknown model) ->" in str(report)
    assert "not used: head.weight (classification head)" in str(report)
