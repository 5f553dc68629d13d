# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
from huggingface_hub import ModelCard

from sparsepath_vit.conversion import architecture, known_architectures
from sparsepath_vit.conversion.model_card import add_section, write_model_card
from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor


def card_of(name, folder, source="weights.pth", ignored=None, **fields):
    known = None if name is None else architecture(name)
    config = architecture(name or "uni2-h").build_config(**fields)
    path = write_model_card(folder, source, known, config, SparsePathViTImageProcessor(), ignored or {})
    return ModelCard.load(path)


@pytest.mark.parametrize("entry", known_architectures(), ids=lambda entry: entry.name)
def test_card_states_source_and_licence(entry, tmp_path):
    card = card_of(entry.name, tmp_path)
    assert card.data.library_name == "transformers"
    if not entry.has_checkpoint:
        assert card.data.license == "unknown"
        return
    assert entry.licence in (card.data.license, card.data.to_dict().get("license_name"))
    assert card.data.base_model == entry.hub_id
    assert f"`weights.pth, published as {entry.hub_id}`" in card.text
    assert f"The licence of the source ({entry.licence}) governs these weights" in card.text
    assert "forbid redistribution" in card.text
    assert entry.reference in card.text


def test_card_of_an_unknown_model_says_so(tmp_path):
    card = card_of(None, tmp_path)
    assert card.data.license == "unknown"
    assert "| licence of the weights | not known; look it up where the weights come from |" in card.text
    assert "training resolution | not stated |" in card.text


def test_card_describes_the_model(tmp_path):
    card = card_of("virchow2", tmp_path, source="paige-ai/Virchow2", prune_ratio=0.6, ignored={"head.bias": "a head"})
    assert "(`paige-ai/Virchow2`)" in card.text
    assert "| training resolution | 0.25, 0.5, 1.0, 2.0 micrometres per pixel |" in card.text
    assert "| layers, width, heads | 32, 1280, 16 |" in card.text
    assert "| attention | blocks of 8 x 8 patch tokens, neighbour radius 1 |" in card.text
    assert "| position embeddings at other sizes | bicubic, with antialiasing |" in card.text
    assert "| pruning | 60% of the patch tokens after layer 4 |" in card.text
    assert "outputs.pooler_output  # (1, 2560)" in card.text
    assert "- `head.bias`: a head" in card.text
    other = card_of("virchow2", tmp_path, window_size=None, position_antialias=False)
    assert "| attention | dense |" in other.text
    assert "bicubic, without antialiasing |" in other.text
    shifted = card_of("gpfm", tmp_path, position_antialias=False, position_interpolation_offset=0.1)
    assert "bicubic, without antialiasing, with an offset of 0.1 patches |" in shifted.text


def test_card_leaves_no_placeholder(tmp_path):
    assert "{" not in card_of("phikon", tmp_path).content


def test_a_section_is_added_once_and_replaced_later(tmp_path):
    (tmp_path / "README.md").write_text("---\ntags: []\n---\n\n# Title\n\n## Model\n\ntext\n", encoding="utf-8")
    for text in ("first", "second"):
        add_section(tmp_path, "Measured", text)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert card == "---\ntags: []\n---\n\n# Title\n\n## Model\n\ntext\n\n## Measured\n\nsecond\n"
    add_section(tmp_path, "Model", "other")
    assert (tmp_path / "README.md").read_text(encoding="utf-8").split("## ")[1:] == [
        "Model\n\nother\n\n",
        "Measured\n\nsecond\n",
    ]
