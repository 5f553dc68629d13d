# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Data, metrics and the rule that what nobody marked is no negative."""

import copy

import numpy as np
import pytest
import torch
from segpath_files import BOTH, SIDE, small_pairs, small_segpath, two_tissues, write_fileinfo, write_pair
from small_models import small_config

from sparsepath_vit import (
    SparsePathViTForUniversalSegmentation,
    SparsePathViTImageProcessor,
    SparsePathViTUniversalSegmentationConfig,
)
from sparsepath_vit.tasks.segmentation.baselines import evaluate_baselines, fitted_threshold
from sparsepath_vit.tasks.segmentation.data import ITEMS, SegmentationCollator, SegmentationImages, augmentation
from sparsepath_vit.tasks.segmentation.metrics import dice_of, evaluate_segmentation, iou_of, overlap_counts
from sparsepath_vit.tasks.segmentation.pairs import read_pairs
from sparsepath_vit.tasks.segmentation.probabilities import INDEPENDENT_LABELS, label_probabilities
from sparsepath_vit.tasks.segpath.dataset import ANTIGENS, read_segpath


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_segpath(tmp_path_factory.mktemp("segpath"))


@pytest.fixture(scope="module")
def processor():
    return SparsePathViTImageProcessor(patch_size=4)


class TestSegPath:
    def test_reads_tables_splits_and_slides(self, folder):
        pairs = read_segpath(folder, BOTH[::-1])
        assert pairs.label_names == BOTH[::-1]
        assert [len(pairs.split(split)) for split in ("train", "validation", "test")] == [12, 2, 6]
        first = pairs.pairs[0]
        assert (first.label, first.group, first.split) == (0, "000", "train")
        image, mask = first.read()
        expected, masks = two_tissues(100)
        assert np.array_equal(image, expected) and np.array_equal(mask, masks["ERG_Endothelium"])
        pairs.check()

    def test_tables_may_name_images_or_masks_only(self, tmp_path):
        write_pair(tmp_path, "panCK_Epithelium_07_0_984", *pair_of_ones())
        for ending in ("HE", "mask"):
            rows = [(f"panCK_Epithelium_07_0_984_{ending}.png", "test")]
            write_fileinfo(tmp_path / "panCK_Epithelium_fileinfo.csv", "panCK", rows)
            (pair,) = read_segpath(tmp_path, ["panCK_Epithelium"]).pairs
            assert (pair.name, pair.group, pair.split) == ("panCK_Epithelium_07_0_984", "07", "test")

    def test_an_unknown_antigen_is_answered_with_the_known_ones(self, folder):
        with pytest.raises(ValueError, match=r"unknown: panCK_Epithelia. Known are .*" + ".*".join(ANTIGENS)):
            read_segpath(folder, ["panCK_Epithelia"])
        with pytest.raises(ValueError, match="none is named, or one twice"):
            read_segpath(folder, ["ERG_Endothelium"] * 2)

    def test_a_known_antigen_without_table_is_named(self, folder):
        with pytest.raises(ValueError, match=r"no table CD235a_RBC_fileinfo.csv.*ERG_Endothelium, panCK_Epithelium"):
            read_segpath(folder, ["CD235a_RBC"])
        with pytest.raises(ValueError, match="is no folder"):
            read_segpath(folder / "nowhere", ["CD235a_RBC"])

    def test_a_missing_file_is_named(self, tmp_path):
        folder = small_segpath(tmp_path, ("train", "test"))
        (folder / "ERG_Endothelium" / "ERG_Endothelium_001_1_984_mask.png").unlink()
        with pytest.raises(ValueError, match=r"1 of 4 files .* such as ERG_Endothelium_001_1_984_mask.png"):
            read_segpath(folder, BOTH)

    def test_an_empty_split_is_counted(self, tmp_path):
        pairs = read_segpath(small_segpath(tmp_path, ("train", "train", "test")), BOTH)
        with pytest.raises(ValueError, match=r"'validation' of panCK_Epithelium .*train 2, validation 0, test 1"):
            pairs.split("validation")

    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([("a_HE.png", "train"), ("a_mask.png", "test")], r"line 3: train_val_test='test' of a"),
            ([("a_HE.png", "holdout")], r"line 2: train_val_test='holdout'"),
        ],
    )
    def test_bad_splits_are_refused(self, tmp_path, rows, message):
        write_fileinfo(tmp_path / "panCK_Epithelium_fileinfo.csv", "panCK", rows)
        with pytest.raises(ValueError, match=message):
            read_segpath(tmp_path, ["panCK_Epithelium"])

    def test_bad_tables_are_refused(self, tmp_path):
        table = tmp_path / "panCK_Epithelium_fileinfo.csv"
        table.write_text("antigen,file\npanCK,a_HE.png\n")
        with pytest.raises(ValueError, match=r"columns \['antigen', 'file'\]: expected antigen, filename"):
            read_segpath(tmp_path, ["panCK_Epithelium"])
        table.rename(tmp_path / "panCK_Epithelium_fileinfo.csv.gz")
        with pytest.raises(ValueError, match="cannot be read"):
            read_segpath(tmp_path, ["panCK_Epithelium"])


def pair_of_ones(height=8, width=8):
    return np.zeros((height, width, 3), np.uint8), np.ones((height, width))


class TestPairs:
    def test_named_images_are_held_back(self, tmp_path):
        pairs = read_pairs(small_pairs(tmp_path), "gland", ["case1_*", "case0_0"])
        assert [pair.name for pair in pairs.split("train")] == ["case0_1"]
        assert [pair.name for pair in pairs.split("test")] == ["case0_0", "case1_2", "case1_3"]
        with pytest.raises(ValueError, match=r"no image is called 'case9'; there are case0_0, case0_1"):
            read_pairs(tmp_path, eval_images=["case9"])

    def test_other_files_are_named(self, tmp_path, caplog):
        small_pairs(tmp_path)
        read_pairs(tmp_path)
        assert not caplog.text
        (tmp_path / "case0_0_he.png").touch()
        (tmp_path / "notes").mkdir()
        read_pairs(tmp_path)
        assert "2 entries are left out" in caplog.text and "case0_0_he.png, notes" in caplog.text

    def test_groups_stay_together(self, tmp_path):
        small_pairs(tmp_path, 6)
        held_back = set()
        for seed in range(8):
            test = read_pairs(tmp_path, eval_fraction=0.3, group_pattern=r"case(\d)", seed=seed).split("test")
            assert len(test) == 2 and len({pair.group for pair in test}) == 1
            held_back.add(test[0].group)
        assert len(held_back) > 1
        with pytest.raises(ValueError, match="finds nothing in 'case0_0'"):
            read_pairs(tmp_path, group_pattern="slide")

    @pytest.mark.parametrize("ending", ["HE", "mask"])
    def test_a_file_without_partner_is_named(self, tmp_path, ending):
        small_pairs(tmp_path)
        (tmp_path / f"case0_1_{ending}.png").unlink()
        other = {"HE": "mask", "mask": "HE"}[ending]
        with pytest.raises(ValueError, match=f"case0_1_{other}.png has no case0_1_{ending}.png beside it"):
            read_pairs(tmp_path)

    def test_an_empty_folder_is_named(self, tmp_path):
        with pytest.raises(ValueError, match=r"holds 0 files X_HE.png and 0 files X_mask.png"):
            read_pairs(tmp_path)

    @pytest.mark.parametrize(
        ("shape", "mask", "message"),
        [
            ((8, 8), np.ones((8, 9)), r"x_mask.png is 9 x 8 px, its image x_HE.png 8 x 8"),
            ((8, 8), np.full((8, 8), 255), r"x_mask.png holds the values 255: it takes 0 .*mask > 127"),
            ((8, 8), np.arange(64).reshape(8, 8), r"holds the values 0, 1, 2, 3, 4, 5, \.\.\."),
            ((8, 8), np.ones((8, 8, 3)), r"x_mask.png has 3 channels"),
            ((8, 1), np.ones((8, 1)), r"x_HE.png is 1 x 8 px .*smaller than the 4 px"),
        ],
    )
    def test_what_does_not_fit_is_named(self, tmp_path, shape, mask, message):
        write_pair(tmp_path, "x", np.zeros((*shape, 3), np.uint8), mask)
        pairs = read_pairs(tmp_path)
        with pytest.raises(ValueError, match=message):
            pairs.check(4)
        if shape == (8, 8):
            with pytest.raises(ValueError, match=message):
                pairs.pairs[0].read()

    def test_a_damaged_file_is_named(self, tmp_path):
        small_pairs(tmp_path)
        path = tmp_path / "case0_0_mask.png"
        path.write_bytes(path.read_bytes()[:60])
        with pytest.raises(OSError, match=r"case0_0_mask.png cannot be read as an image"):
            read_pairs(tmp_path).check()


class TestImages:
    def test_image_and_mask_are_changed_alike(self, tmp_path):
        image, _ = two_tissues(0, 24)
        mask = image[..., 0] > 200
        image[..., 0] = np.where(mask, 255, 0)  # the red channel is the mask
        write_pair(tmp_path, "x", image, mask)
        dataset = SegmentationImages(read_pairs(tmp_path).pairs, 16, True, augmentation(color=0))
        seen = set()
        for _ in range(60):
            example = dataset[0]
            assert example["image"].shape == (3, 16, 16)
            assert torch.equal(example["image"][0] == 255, example["mask"].bool())
            seen.add(example["image"].numpy().tobytes())
        assert len(seen) > 30

    def test_colours_change_and_the_mask_does_not(self, tmp_path):
        small_pairs(tmp_path, 1)
        (pair,) = read_pairs(tmp_path).pairs
        _, mask = pair.read()
        example = SegmentationImages([pair], transform=augmentation(color=0.5))[0]
        assert example["mask"].sum() == mask.sum()
        assert sorted(example["image"].flatten().tolist()) != sorted(pair.read()[0].flatten().tolist())

    def test_crops_side_by_side_cover_the_image(self, tmp_path):
        image, masks = two_tissues(3, 40)
        write_pair(tmp_path, "x", image, masks[BOTH[0]])
        dataset = SegmentationImages(read_pairs(tmp_path).pairs, 16)
        assert len(dataset) == 9 and all(dataset.pair_of(number).name == "x" for number in range(9))
        covered = np.zeros((40, 40), bool)
        for number, (_, top, left, side) in enumerate(dataset.examples):
            covered[top : top + side, left : left + side] = True
            assert np.array_equal(dataset[number]["image"].permute(1, 2, 0), image[top : top + 16, left : left + 16])
        assert covered.all()

    @pytest.mark.parametrize("random_crops", [True, False])
    def test_an_image_smaller_than_a_crop_is_named(self, tmp_path, random_crops):
        pairs = read_pairs(small_pairs(tmp_path)).pairs
        with pytest.raises(ValueError, match=r"case0_0_HE.png is 36 x 36 px .*than a crop of 37 px.*at most 36"):
            SegmentationImages(pairs, 37, random_crops)[0]
        with pytest.raises(ValueError, match="crop_size=0"):
            SegmentationImages(pairs, 0)


class TestCollator:
    def test_every_image_says_what_it_is_annotated_for(self, folder, processor):
        images = SegmentationImages(read_segpath(folder, BOTH).split("test"))
        examples = [images[number] for number in (0, 5)]
        batch = SegmentationCollator(processor, 2)(examples)
        assert batch["annotated_classes"].tolist() == [[True, False], [False, True]]
        assert [labels.tolist() for labels in batch["class_labels"]] == [[0], [1]]
        assert batch[ITEMS].tolist() == [[0, 0, SIDE, SIDE], [5, 1, SIDE, SIDE]]
        assert torch.equal(batch["mask_labels"][1][0], examples[1]["mask"].float())
        assert "patch_mask" not in batch

    def test_an_empty_mask_is_no_segment(self, processor):
        example = {"image": torch.zeros(3, 10, 12, dtype=torch.uint8), "mask": torch.zeros(10, 12, dtype=torch.uint8)}
        batch = SegmentationCollator(processor, 1)([{**example, "label": 0, "number": 0}])
        assert batch["mask_labels"][0].shape == (0, 10, 12) and batch["class_labels"][0].shape == (0,)
        assert batch["pixel_values"].shape == (1, 3, 10, 12)
        assert "annotated_classes" not in batch

    def test_images_of_different_sizes_share_a_canvas(self, processor):
        sizes = [(10, 12), (13, 6)]
        examples = [
            {
                "image": torch.randint(256, (3, *size), dtype=torch.uint8),
                "mask": torch.ones(size, dtype=torch.uint8),
                "label": 0,
                "number": number,
            }
            for number, size in enumerate(sizes)
        ]
        batch = SegmentationCollator(processor, 1)(examples)
        assert batch["pixel_values"].shape == (2, 3, 13, 12)
        assert [masks.sum().item() for masks in batch["mask_labels"]] == [120, 78]
        assert batch["patch_mask"].sum(dim=(1, 2)).tolist() == [3 * 3, 4 * 2]
        alone = SegmentationCollator(processor, 1)(examples[:1])["pixel_values"]
        assert torch.equal(batch["pixel_values"][:1, :, :10, :12], alone)


class TestMetrics:
    def test_counts_against_a_loop(self):
        generator = np.random.default_rng(0)
        prediction, truth = generator.random((2, 9, 7)) < 0.4
        both = sum(bool(p and t) for p, t in zip(prediction.flat, truth.flat, strict=True))
        assert overlap_counts(prediction, truth).tolist() == [both, prediction.sum(), truth.sum()]
        with pytest.raises(ValueError, match="both take one size"):
            overlap_counts(prediction, truth[:5])

    def test_rule_for_empty_masks(self):
        counts = np.array([[0, 0, 0], [0, 5, 0], [0, 0, 5], [5, 5, 5], [2, 4, 6]])
        assert dice_of(counts).tolist() == [1, 0, 0, 1, 0.4]
        assert iou_of(counts).tolist() == [1, 0, 0, 1, 0.25]

    def test_pooled_adds_pixels_and_mean_adds_images(self):
        counts = np.array([[90, 100, 100], [0, 10, 10], [0, 0, 0]])
        results = evaluate_segmentation(counts, np.zeros(3, int), ["a", "b", "c"], ["nucleus"], samples=50)
        assert results["dice_pooled"] == results["dice_pooled_nucleus"] == pytest.approx(180 / 220)
        assert results["dice_mean"] == pytest.approx((0.9 + 0 + 1) / 3)
        assert results["iou_mean"] == pytest.approx((90 / 110 + 0 + 1) / 3)
        assert results["dice_mean_low"] < results["dice_mean"] < results["dice_mean_high"]
        assert (results["num_images"], results["num_groups"]) == (3, 3)

    def test_labels_are_kept_apart_and_weigh_the_same(self):
        counts = np.array([[10, 10, 10]] * 3 + [[0, 10, 10]])
        results = evaluate_segmentation(counts, np.array([0, 0, 0, 1]), list("aabc"), ["first", "second"], samples=0)
        assert (results["dice_pooled_first"], results["dice_pooled_second"], results["dice_pooled"]) == (1, 0, 0.5)
        assert (results["num_images_first"], results["num_groups_first"]) == (3, 2)
        assert "dice_pooled_low" not in results

    def test_the_bootstrap_draws_slides(self):
        # two slides of 40 equal images each: the interval is as wide as of two numbers, not of eighty
        counts = np.array([[10, 10, 10]] * 40 + [[0, 10, 10]] * 40)
        labels = np.zeros(80, int)
        slides = evaluate_segmentation(counts, labels, ["a"] * 40 + ["b"] * 40, ["nucleus"], samples=200)
        images = evaluate_segmentation(counts, labels, list(range(80)), ["nucleus"], samples=200)
        assert (slides["dice_mean_low"], slides["dice_mean_high"]) == (0, 1)
        assert images["dice_mean_high"] - images["dice_mean_low"] < 0.3

    def test_undefined_numbers_are_none(self):
        results = evaluate_segmentation(np.zeros((2, 3), int), np.zeros(2, int), ["a", "b"], ["first", "second"])
        assert results["dice_pooled"] is None and results["dice_mean_second"] is None
        assert results["dice_mean_first"] == results["dice_mean"] == 1
        assert "dice_mean_low" not in evaluate_segmentation(np.ones((1, 3), int), np.zeros(1, int), ["a"], ["first"])
        with pytest.raises(ValueError, match="nothing to evaluate"):
            evaluate_segmentation(np.zeros((0, 3)), np.zeros(0, int), [], ["first"])


class TestBaselines:
    def test_thresholds_find_what_is_blue(self, tmp_path):
        for index in range(4):
            image = np.full((24, 24, 3), (240, 180, 210), np.uint8)  # eosin
            mask = np.zeros((24, 24), bool)
            mask[4:12, 2 + 4 * index : 10 + 4 * index] = True
            image[mask] = (90, 60, 150)  # haematoxylin
            write_pair(tmp_path, f"x{index}", image, mask)
        pairs = read_pairs(tmp_path, eval_images=["x3"])
        train, test = (SegmentationImages(pairs.split(split)) for split in ("train", "test"))
        results = evaluate_baselines(train, test, ["nucleus"], samples=0)
        assert results["all_background"]["dice_pooled"] == 0
        assert results["haematoxylin_otsu"]["dice_pooled"] == results["haematoxylin_fitted"]["dice_pooled"] == 1
        assert results["haematoxylin_fitted"]["thresholds"]["nucleus"] == fitted_threshold(train)


@pytest.fixture(scope="module")
def knows_both():
    """A model that has learnt both tissues, each from its own images, in which the other one is there too."""
    torch.manual_seed(0)
    config = SparsePathViTUniversalSegmentationConfig.from_vit_config(
        small_config(prune_ratio=0.0),
        head="queries",
        freeze_vit=False,
        num_queries=4,
        num_query_layers=2,
        query_feature_dim=32,
        train_num_points=256,
        problem_type=INDEPENDENT_LABELS,
        id2label=dict(enumerate(BOTH)),
    )
    model = SparsePathViTForUniversalSegmentation(config)
    train(model, [0, 1], 80)
    return model.eval()


def batch_of(labels, seed, ignore_others=True):
    examples = []
    for number, label in enumerate(labels):
        image, masks = two_tissues(seed + number)
        image, mask = torch.from_numpy(image).permute(2, 0, 1), torch.from_numpy(masks[BOTH[label]]).to(torch.uint8)
        examples.append({"image": image, "mask": mask, "label": label, "number": number})
    batch = SegmentationCollator(SparsePathViTImageProcessor(patch_size=4), 2)(examples)
    batch.pop(ITEMS)
    if not ignore_others:
        batch.pop("annotated_classes")
    return batch


def train(model, labels, steps, ignore_others=True, learning_rate=3e-3, parts=""):
    """Trains the parameters whose names start with `parts`."""
    model.train()
    parameters = [parameter for name, parameter in model.named_parameters() if name.startswith(parts)]
    optimizer = torch.optim.Adam(parameters, learning_rate)
    for step in range(steps):
        model.zero_grad()
        model(**batch_of(labels * 2, 1000 + 4 * step, ignore_others)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return model.eval()


@torch.no_grad()
def dice_on_new_images(model, label):
    pixels = [two_tissues(seed) for seed in range(8)]
    batch = batch_of([0] * 8, 0)  # the images of seeds 0 to 7; their labels are not used
    outputs = model(batch["pixel_values"])
    maps = label_probabilities(outputs, [label] * 8, [(SIDE, SIDE)] * 8)
    counts = [
        overlap_counts((found >= 0.5).numpy(), masks[BOTH[label]])
        for found, (_, masks) in zip(maps, pixels, strict=True)
    ]
    return float(dice_of(np.sum(counts, axis=0)))


class TestOthersAreIgnored:
    def test_both_labels_are_found_in_the_same_images(self, knows_both):
        assert dice_on_new_images(knows_both, 0) > 0.85
        assert dice_on_new_images(knows_both, 1) > 0.85

    def test_images_of_one_label_leave_the_others_head_alone(self, knows_both):
        """No gradient reaches the other label, nor "no object", through which p(other) would fall as well."""
        model = copy.deepcopy(knows_both).train()
        model(**batch_of([0, 0], 50)).loss.backward()
        for parameter in (model.class_predictor.weight, model.class_predictor.bias):
            assert parameter.grad[0].abs().max() > 0
            assert parameter.grad[1:].abs().max() == 0
        model.zero_grad()
        model(**batch_of([0, 0], 50, ignore_others=False)).loss.backward()
        assert model.class_predictor.bias.grad[1].abs() > 0

    def test_training_on_one_label_does_not_push_the_other_down(self, knows_both):
        """Images of the first label hold the second's tissue, unmarked. Taken for negatives, it would be unlearnt."""
        before = dice_on_new_images(knows_both, 1)
        classes_only = {"parts": "class_predictor", "learning_rate": 1e-2}
        ignored = train(copy.deepcopy(knows_both), [0, 0], 20, **classes_only)
        assert dice_on_new_images(ignored, 1) == before
        as_negatives = train(copy.deepcopy(knows_both), [0, 0], 20, ignore_others=False, **classes_only)
        assert dice_on_new_images(as_negatives, 1) < before / 2

    def test_labels_do_not_compete(self, knows_both):
        with torch.no_grad():
            outputs = knows_both(batch_of([0], 3)["pixel_values"])
        before = label_probabilities(outputs, [0], [(SIDE, SIDE)])[0]
        outputs.class_queries_logits[..., 1] += 20
        assert torch.equal(label_probabilities(outputs, [0], [(SIDE, SIDE)])[0], before)
