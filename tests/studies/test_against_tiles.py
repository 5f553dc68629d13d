# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv

import numpy as np
import pytest
import torch
from PIL import Image

from sparsepath_vit import SparsePathViTConfig, SparsePathViTImageProcessor, SparsePathViTModel
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.pixels import prepare
from sparsepath_vit.tasks.classification.linear_probe import LinearHead
from studies.against_tiles import __main__ as against_tiles
from studies.against_tiles import features, finetuning
from studies.against_tiles.datasets import cells_of_three_kinds, nuclei
from studies.against_tiles.probes import (
    PENALTIES,
    balanced_head,
    chosen_penalty,
    cross_validated,
    difference_with_interval,
    score_with_interval,
    softmax,
)


@pytest.fixture
def encoder():
    config = SparsePathViTConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, prune_after_layer=1,
        image_size=56, initializer_range=0.3, layerscale_value=1.0,
    )  # fmt: skip
    return features.Encoder(SparsePathViTModel(config).eval(), SparsePathViTImageProcessor())


@pytest.fixture
def image():
    return np.random.default_rng(0).integers(0, 256, (140, 106, 3), dtype=np.uint8)


def test_tiles_are_averaged_by_their_area(encoder, image, monkeypatch):
    monkeypatch.setattr(features, "TILE_SIZE", 56)
    with configured(encoder.model, **features.PATTERNS[features.DENSE]):
        parts = {(top, left): image[top : top + 56, left : left + 56] for top in (0, 56, 112) for left in (0, 56)}
        expected = sum(encoder.pooled(part) * part[..., 0].size for part in parts.values()) / (140 * 106)
    np.testing.assert_allclose(features.region_features(encoder, image, features.TILES), expected, rtol=1e-5)


def test_tokens_of_tiles_lie_where_those_of_the_region_do(encoder, image, monkeypatch):
    monkeypatch.setattr(features, "TILE_SIZE", 56)
    dense = features.token_features(encoder, image, features.DENSE)
    tiled = features.token_features(encoder, image, features.TILES)
    assert dense.shape == tiled.shape == (10, 8, 32)
    assert (np.isnan(dense) == np.isnan(tiled)).all() and not np.isnan(dense[:, :7]).any()
    with configured(encoder.model, **features.PATTERNS[features.DENSE]):
        np.testing.assert_array_equal(tiled[4:8, :4], encoder.tokens(image[56:112, :56]))
    assert np.nanmax(np.abs(tiled - dense)) > 0.01


def test_tokens_to_the_border_of_two_tiles(monkeypatch):
    monkeypatch.setattr(features, "TILE_SIZE", 56)
    along = [3, 2, 1, 0, 0, 1, 1, 0, 0, 1]  # two borders, before the tokens 4 and 8
    distances = features.tokens_to_border((10, 5), 14)
    assert distances[:, 0].tolist() == [min(3, distance) for distance in along]
    assert (distances[:, 3:] == 0).all()
    assert (features.tokens_to_border((3, 4), 14) > 2).all()  # within one tile


@pytest.mark.parametrize("offset", [0.0, 0.1])
@pytest.mark.parametrize("kind, order", [("periodic", [0, 1, 2, 3, 0, 1]), ("mirrored", [0, 1, 2, 3, 3, 2])])
def test_positions_repeat_in_each_window(encoder, kind, order, offset):
    encoder.model.config.position_interpolation_offset = offset
    changed = features.with_positions(encoder, kind, 84)
    blank = np.full((84, 84, 3), 200, dtype=np.uint8)

    def embedded(model, side):  # of one colour: only positions tell tokens apart
        pixels = prepare(encoder.processor, [blank[:side, :side]])["pixel_values"]
        grid = model.token_grid(pixels)
        tokens = grid.to_raster(model.embeddings(pixels, grid))[0, model.config.num_global_tokens :]
        return tokens.unflatten(0, grid.grid_sizes[0])

    with torch.no_grad():
        window, found = embedded(encoder.model, 56), embedded(changed.model, 84)
    torch.testing.assert_close(found, window[order][:, order], rtol=0, atol=1e-5)
    assert (window - window.mean(dim=(0, 1))).abs().max() > 0.1
    assert features.with_positions(encoder, "stretched", 84) is encoder


def test_groups_are_never_on_both_sides():
    """Features that tell the group and nothing of the label: a head that saw the group would be right."""
    generator = np.random.default_rng(0)
    groups = np.repeat(np.arange(24), 4)
    labels = np.repeat(generator.permutation(np.arange(24) % 2), 4)
    telling = np.eye(24)[groups] + 0.01 * generator.standard_normal((96, 24))
    assert score_with_interval(cross_validated(telling, labels, groups, num_seeds=2))["balanced_accuracy"] < 0.7
    separable = labels[:, None] + 0.01 * generator.standard_normal((96, 3))
    found = score_with_interval(cross_validated(separable, labels, groups, num_seeds=2))
    assert found["balanced_accuracy"] == found["balanced_accuracy_low"] == 1.0 and found["log_loss"] < 0.1


def test_the_penalty_is_strong_where_features_say_nothing():
    generator = np.random.default_rng(0)
    labels, groups = np.arange(60) % 2, np.repeat(np.arange(12), 5)
    assert chosen_penalty(generator.standard_normal((60, 40)), labels, groups, 2) == max(PENALTIES)
    assert chosen_penalty(labels[:, None] + 0.01 * generator.standard_normal((60, 1)), labels, groups, 2) == 1.0


def test_differences_are_paired():
    """The same mistakes cancel, however uncertain each score is."""
    generator = np.random.default_rng(0)
    labels, groups = np.arange(60) % 2, np.repeat(np.arange(12), 5)
    noisy = labels[:, None] + generator.standard_normal((60, 1))
    probe = cross_validated(noisy, labels, groups, num_seeds=1)
    score = score_with_interval(probe)
    assert score["balanced_accuracy_high"] - score["balanced_accuracy_low"] > 0.1
    assert set(difference_with_interval(probe, probe).values()) == {0.0}
    better = cross_validated(labels[:, None] + 0.01 * noisy, labels, groups, num_seeds=1)
    difference = difference_with_interval(better, probe)
    assert difference["balanced_accuracy"] == pytest.approx(1 - score["balanced_accuracy"], abs=1e-4)
    assert difference["balanced_accuracy_low"] > 0 > difference["log_loss_high"]


def small_data(folder):
    """Ten regions, and six images of each of the other data sets, 70 px."""
    generator = np.random.default_rng(0)

    def write(path, pixels):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path)

    for number in range(10):
        pixels = generator.integers(0, 256, (70, 70, 3), dtype=np.uint8)
        label = ("non_tumor", "viable_tumor")[number % 2]
        write(folder / f"classification/osteosarcoma_roi/{label}/Case-3-A{number // 2}-1-2_{number}.jpg", pixels)
        if number >= 6:
            continue
        write(folder / f"segmentation/brca_m2c_points/images/a{number}.png", pixels)
        points = "".join(f"{9 * index + 3} {9 * index + 2} {(1, 2, 3, 3)[index % 4]}\n" for index in range(8))
        (folder / "segmentation/brca_m2c_points/labels").mkdir(parents=True, exist_ok=True)
        (folder / f"segmentation/brca_m2c_points/labels/a{number}_gt.txt").write_text(points + "3 3 1\n0 69 1\n")
        mask = np.zeros((70, 70), np.uint8)
        mask[:, :28] = 1
        for ending, content in (("HE", pixels), ("mask", mask)):
            write(folder / f"segmentation/tnbc_nuclei/{number}_{ending}.png", content)
            write(folder / f"segmentation/tnbc_nuclei/{number}_warped_{ending}.png", content)
    return folder


def test_labels_of_tokens(tmp_path):
    points = next(cells_of_three_kinds(small_data(tmp_path), 14))
    of_token = dict(zip(zip(points.rows.tolist(), points.columns.tolist(), strict=True), points.labels, strict=True))
    assert of_token == {(0, 4): 0, (1, 1): 2, (3, 3): 1, (4, 4): 2}  # (0, 0) and (2, 2) hold two kinds
    images = list(nuclei(tmp_path, 14))
    assert len(images) == 6  # none of the warped ones
    assert (images[0].labels == (images[0].columns < 2)).all() and len(images[0].labels) == 25


@pytest.mark.parametrize("part", against_tiles.PARTS)
def test_each_variant_has_its_row(part, encoder, tmp_path, run_script, monkeypatch):
    monkeypatch.setattr(features, "TILE_SIZE", 28)
    monkeypatch.setattr("studies.against_tiles.probes.BOOTSTRAP_SAMPLES", 20)
    monkeypatch.setattr(against_tiles, "VARIANTS", against_tiles.VARIANTS[:2])
    encoder.model.save_pretrained(tmp_path / "model")
    encoder.processor.save_pretrained(tmp_path / "model")
    given = {"--data-dir": small_data(tmp_path / "data"), "--model-name-or-path": tmp_path / "model", "--parts": part}
    given |= {
        "--sizes": "56,84" if part == "positions" else "56",
        "--seeds": "1",
        "--epochs": "1",
        "--out": tmp_path / "out",
    }
    run_script(against_tiles, *(str(text) for option in given.items() for text in option))
    with (tmp_path / f"out/against_tiles_{part}.csv").open() as file:
        rows = list(csv.DictReader(file))
    # Two data sets of tokens, none of which lies away from such small tiles' borders; tiles and two patterns with three
    # kinds of positions each, at the size that is larger than the window; two frozen and two trained.
    assert len(rows) == {"regions": 8, "tokens": 2 * 2 * 4, "positions": 1 + 2 * 3, "finetuning": 2 * 2}[part]
    for row in rows:
        if row["variant"] == features.TILES:
            assert float(row["balanced_accuracy_minus_tiles"]) == float(row["log_loss_high_minus_tiles"]) == 0
        assert 0 <= float(row["balanced_accuracy"]) <= 1 and row["commit"]


def test_without_weights_the_way_to_them_is_named(tmp_path, run_script, monkeypatch):
    monkeypatch.setenv("SPARSEPATH_REAL_WEIGHTS", str(tmp_path))
    with pytest.raises(SystemExit, match=r"python -m studies\.real_weights"):
        run_script(against_tiles, "--data-dir", str(tmp_path))
    with pytest.raises(SystemExit, match="--parts slides unknown"):
        run_script(against_tiles, "--data-dir", str(tmp_path), "--parts", "slides")


def test_shares_of_the_training_labels_say_nothing():
    """Heads of features that say nothing were worse than chance: the held-out class is rare where it is held out."""
    generator = np.random.default_rng(0)
    labels, groups = np.repeat([0, 1, 2], 11), np.repeat(np.arange(11), 3)
    head = balanced_head(generator.standard_normal((30, 5)), labels[:30], 3, 1e6)
    probabilities = softmax(head, generator.standard_normal((4, 5)))
    np.testing.assert_allclose(probabilities, 1 / 3, atol=1e-3)
    accuracies = []
    for seed in range(8):
        features = np.random.default_rng(seed).standard_normal((33, 8))
        accuracies.append(score_with_interval(cross_validated(features, labels, groups, num_seeds=1)))
    assert np.mean([found["balanced_accuracy"] for found in accuracies]) > 0.27


def colours(encoder, variant):
    """Twelve regions of three colours."""
    generator = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 4)
    images = [generator.integers(0, 90, (56, 56, 3), dtype=np.uint8) for _ in labels]
    for image, label in zip(images, labels, strict=True):
        image[..., label] += 100
    frozen = np.stack([features.region_features(encoder, image, variant) for image in images])
    return finetuning.Regions(images, frozen, labels, np.arange(12), 3)


WEAK = 1e2  # a penalty that leaves training much to gain on colours


@pytest.mark.parametrize("variant", [features.TILES, "w = 8, 60 % pruned"])
def test_fine_tuning_starts_from_the_probe_and_learns(encoder, variant, monkeypatch):
    monkeypatch.setattr(features, "TILE_SIZE", 28)
    regions = colours(encoder, variant)
    train, indices = regions.folds(3, seed=0)[0]
    held_out, training = regions.part(indices), finetuning.Training(learning_rate=3e-3)
    before = {name: state.clone() for name, state in encoder.model.state_dict().items()}
    said = finetuning.said_after_each_epoch(encoder, train, held_out, WEAK, variant, training, {0, 3})
    np.testing.assert_array_equal(said[0], softmax(train.head(WEAK), held_out.features))
    of_label = [probabilities[range(4), held_out.labels] for probabilities in (said[0], said[3])]
    assert np.log(of_label[1]).mean() > np.log(of_label[0]).mean() + 0.01
    for name, state in encoder.model.state_dict().items():
        torch.testing.assert_close(state, before[name], rtol=0, atol=0)


def test_a_training_that_harms_is_not_chosen(encoder):
    """Steps so large that the features are lost: the frozen probe is what remains, to the last bit."""
    regions = colours(encoder, "w = 8")
    train, indices = regions.folds(3, seed=0)[0]
    held_out, harmful = regions.part(indices), finetuning.Training(learning_rate=30.0, most_epochs=1)
    said, epochs = finetuning.fine_tuned(encoder, train, held_out, "w = 8", harmful)
    assert epochs == 0
    np.testing.assert_array_equal(said, softmax(train.head(train.penalty()), held_out.features))
    useful = finetuning.Training(learning_rate=3e-3, most_epochs=1)
    assert finetuning.chosen_epochs(encoder, train, WEAK, "w = 8", useful) == 1


def test_logits_of_tiles_are_those_of_their_mean_by_area(encoder, image, monkeypatch):
    monkeypatch.setattr(features, "TILE_SIZE", 56)
    classifier = finetuning._classifier(encoder, LinearHead(np.ones((3, 32)), np.zeros(3))).eval()
    with configured(classifier, **features.PATTERNS[features.DENSE]), torch.no_grad():
        pooled = torch.as_tensor(features.region_features(encoder, image, features.TILES), dtype=torch.float32)
        expected = classifier.classifier(pooled)
        torch.testing.assert_close(finetuning.region_logits(classifier, encoder, image, features.TILES), expected)
