# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
from importlib import resources

import pytest
from source_networks import DINOV2_MODELS, TIMM_MODELS, TRANSFORMERS_MODELS, timm_network, transformers_network

from sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.conversion import architecture, architectures, known_architectures
from sparsepath_vit.conversion.architectures import architecture_of_hub_id, parse_architecture
from sparsepath_vit.conversion.mapping import infer_structure, plan_mapping

PUBLISHED = {
    "uni", "uni2-h", "virchow", "virchow2", "h-optimus-0", "h-optimus-1", "h0-mini", "prov-gigapath", "phikon",
    "phikon-v2", "hibou-b", "hibou-l", "midnight-12k", "openmidnight", "gpfm",
    "kaiko-s16", "kaiko-s8", "kaiko-b16", "kaiko-b8", "kaiko-l14",
}  # fmt: skip
GENERIC = {"vit-tiny-14-reg4", "vit-small-14-reg8", "vit-base-14-reg4"}


def text_of(name):
    return (resources.files("sparsepath_vit.architectures") / f"{name}.json").read_text(encoding="utf-8")


def test_every_model_is_listed_published_ones_first():
    names = [entry.name for entry in known_architectures()]
    assert set(names) == PUBLISHED | GENERIC
    assert set(names[-len(GENERIC) :]) == GENERIC


def test_what_the_table_must_state():
    for entry in known_architectures():
        assert entry.has_checkpoint == (entry.name not in GENERIC)
        assert isinstance(entry.build_config(), SparsePathViTConfig)
        if entry.has_checkpoint:
            assert architecture_of_hub_id(entry.hub_id.upper()) == entry
            assert entry.licence == entry.licence.lower()
        else:
            assert "no checkpoint" in entry.note


@pytest.mark.parametrize("name", sorted(TIMM_MODELS))
def test_table_agrees_with_the_true_shapes_in_timm(name):
    network = timm_network(name, device="meta")
    found = infer_structure(plan_mapping({key: tuple(value.shape) for key, value in network.state_dict().items()}))
    table = architecture(name).config
    assert {key: found[key] for key in found if key in table} == {key: table[key] for key in found if key in table}
    assert network.blocks[0].attn.num_heads == table["num_attention_heads"]
    assert network.norm.eps == table["layer_norm_eps"]


@pytest.mark.parametrize("name", sorted(DINOV2_MODELS))
def test_table_agrees_with_the_true_shapes_of_dinov2(name):
    network = timm_network(name, device="meta")
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    if "reg_token" in shapes:  # DINOv2's own files keep a position embedding for CLS
        shapes["pos_embed"] = (1, 1 + shapes["pos_embed"][1], shapes["pos_embed"][2])
    found = infer_structure(plan_mapping(shapes))
    table = architecture(name).config
    assert {key: found[key] for key in found if key in table} == {key: table[key] for key in found if key in table}
    assert network.blocks[0].attn.num_heads == table["num_attention_heads"]


@pytest.mark.parametrize("name", sorted(TRANSFORMERS_MODELS))
def test_table_agrees_with_the_true_shapes_in_transformers(name):
    network = transformers_network(name, device="meta")
    found = infer_structure(plan_mapping({key: tuple(value.shape) for key, value in network.state_dict().items()}))
    table = architecture(name).config
    assert {key: found[key] for key in found if key in table} == {key: table[key] for key in found if key in table}
    assert network.config.num_attention_heads == table["num_attention_heads"]
    assert network.config.layer_norm_eps == table["layer_norm_eps"]


def test_unknown_name_lists_close_ones_first_and_then_all():
    with pytest.raises(ValueError, match=r"'virchow3' is unknown. Did you mean 'virchow' or 'virchow2'\?") as error:
        architecture("virchow3")
    assert all(entry.name in str(error.value) for entry in known_architectures())


def test_names_ignore_case():
    assert architecture("UNI2-h") is architecture("uni2-h")


def test_config_overrides_are_checked_like_any_config():
    assert architecture("uni2-h").build_config(prune_ratio=0.6).prune_ratio == 0.6
    with pytest.raises(ValueError, match=r"prune_ratio=1.5"):
        architecture("uni2-h").build_config(prune_ratio=1.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"source_style": "keras"}, "source_style='keras'"),
        ({"image_std": [0.2, 0.2, 0.0]}, "image_std"),
        ({"image_mean": [0.5]}, "three means"),
        ({"mpp": [0.5, -1.0]}, "mpp"),
        ({"licence": None}, "a licence"),
        ({"config": {"hidden_size": 8}}, "exactly the fields"),
        ({"colour": "red"}, "unknown fields \\['colour'\\]"),
    ],
)
def test_a_faulty_file_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        parse_architecture(json.dumps({**json.loads(text_of("uni")), **change}))


def test_a_config_that_the_model_refuses_is_refused_when_read():
    values = json.loads(text_of("uni"))
    values["config"]["num_attention_heads"] = 7
    with pytest.raises(ValueError, match="num_attention_heads=7"):
        parse_architecture(json.dumps(values))


def test_a_checkout_that_is_not_installed_has_them_too(monkeypatch):
    def missing(package):
        raise ModuleNotFoundError(f"No module named {package!r}")

    monkeypatch.setattr(architectures.resources, "files", missing)
    names = {entry.stem for entry in architectures._folder().glob("*.json")}
    assert names == {known.name for known in known_architectures()}
