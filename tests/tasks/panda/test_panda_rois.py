# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv
import json
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import tifffile
from panda_files import PandaFolder, small_panda
from places import SHARED_DATA

from sparsepath_vit.slides import Slide
from sparsepath_vit.tasks.classification.roi_files import load_roi_dataset
from sparsepath_vit.tasks.panda.dataset import TASKS, PandaSlide
from sparsepath_vit.tasks.panda.rois import PandaSettings, choose_rois, prepare_panda, split_slides

BLANK_MASK = "4a2ca53f240932e46eaf8959cb3f490a"
PATTERN = PandaSettings("radboud_pattern", roi_size=128)


def slides_of(counts):
    """Slides without files; `counts` by (provider, grade)."""
    return [
        PandaSlide(f"{provider}-{grade}-{number}", provider, grade, True, Path("slide"), None)
        for (provider, grade), count in counts.items()
        for number in range(count)
    ]


class TestSplits:
    COUNTS = {("radboud", 0): 100, ("radboud", 5): 20, ("karolinska", 0): 60, ("karolinska", 3): 7}

    def test_every_stratum_is_shared_out_alike(self):
        slides = slides_of(self.COUNTS)
        split_of = split_slides(slides, (0.7, 0.15, 0.15), seed=0)
        for stratum, total in self.COUNTS.items():
            found = Counter(split_of[s.image_id] for s in slides if (s.provider, s.isup_grade) == stratum)
            assert found["train"] == pytest.approx(0.7 * total, abs=1)
            assert found["test"] == pytest.approx(0.15 * total, abs=1)

    def test_strata_of_one_slide_do_not_all_end_in_the_same_split(self):
        slides = slides_of({("radboud", 0): 1, **{(f"centre{number}", 0): 1 for number in range(19)}})
        found = Counter(split_slides(slides, (0.5, 0.25, 0.25), seed=0).values())
        assert found == {"train": 10, "validation": 5, "test": 5}

    def test_they_depend_on_the_seed_and_not_on_the_order(self):
        slides = slides_of(self.COUNTS)
        first, again, other = (
            split_slides(order, (0.7, 0.15, 0.15), seed)
            for order, seed in ((slides, 0), (slides[::-1], 0), (slides, 1))
        )
        assert first == again != other


class TestPreparing:
    @pytest.fixture(scope="class")
    def prepared(self, panda_folder, tmp_path_factory):
        folder = tmp_path_factory.mktemp("prepared")
        return folder, prepare_panda(panda_folder, folder, PATTERN, allow_subset=True)

    def test_every_square_gets_the_label_it_was_painted_with(self, prepared, panda_folder):
        dataset = load_roi_dataset(prepared[0])
        assert len(dataset) == 48
        for index, roi in enumerate(dataset.rois):
            mask = tifffile.imread(panda_folder / f"train_label_masks/{roi.slide_id}_mask.tiff")[..., 0]
            assert set(np.unique(mask[roi.y : roi.y + 128, roi.x : roi.x + 128])) == {roi.label + 1}
            with Slide(panda_folder / roi.file) as slide:
                assert np.array_equal(dataset.read(index), slide.read_region(roi.x, roi.y, 128, 128))

    def test_the_folder_holds_a_datasets_folder_lists_and_a_summary(self, prepared):
        folder, summary = prepared
        rows = datasets.load_from_disk(folder / "dataset")
        assert set(rows) == {"train", "validation", "test"}
        assert rows["train"].features["label"].names == ["stroma", "benign", "G3", "G4", "G5"]
        with (folder / "rois.csv").open() as file:
            assert Counter(row["split"] for row in csv.DictReader(file)) == {s: len(part) for s, part in rows.items()}
        with (folder / "splits.csv").open() as file:
            split_of = {row["image_id"]: row["split"] for row in csv.DictReader(file)}
        assert len(split_of) == 18
        for split, part in rows.items():
            assert {split_of[name] for name in part["slide_id"]} == {split}
        assert json.loads((folder / "summary.json").read_text()) == json.loads(json.dumps(summary))
        assert summary["places"] == {"taken": 48}
        assert sum(sum(counts.values()) for counts in summary["rois_by_split"].values()) == 48

    def test_the_same_seed_gives_the_same_files(self, prepared, panda_folder, tmp_path):
        for seed in (0, 1):
            settings = PandaSettings("radboud_pattern", roi_size=128, seed=seed)
            prepare_panda(panda_folder, tmp_path / str(seed), settings, allow_subset=True)
        first, again, other = (folder / "rois.csv" for folder in (prepared[0], tmp_path / "0", tmp_path / "1"))
        assert first.read_bytes() == again.read_bytes() != other.read_bytes()

    def test_cancer_takes_both_centres_and_only_what_is_clear(self, panda_folder, tmp_path):
        settings = PandaSettings("cancer", roi_size=128, max_rois_per_slide=2)
        summary = prepare_panda(panda_folder, tmp_path, settings, allow_subset=True)
        dataset = load_roi_dataset(tmp_path)
        assert summary["slides_with_rois"] == 18
        assert Counter(dataset.slide_ids).most_common(1)[0][1] == 2
        assert summary["places"]["beyond_max_rois_per_slide"] == 36
        for roi in dataset.rois:
            mask = tifffile.imread(panda_folder / f"train_label_masks/{roi.slide_id}_mask.tiff")[..., 0]
            assert roi.label == (mask[roi.y, roi.x] >= (3 if roi.attributes["provider"] == "radboud" else 2))

    def test_isup_needs_no_masks(self, tmp_path):
        panda = PandaFolder(tmp_path / "panda")
        for number in range(6):
            panda.add(f"s{number}", [1] * 4, "karolinska", isup=number, mask=False)
        prepare_panda(panda.write_csv(), tmp_path / "out", PandaSettings("isup", roi_size=64), allow_subset=True)
        dataset = load_roi_dataset(tmp_path / "out")
        assert dataset.slide_level
        assert {(roi.slide_id, roi.label) for roi in dataset.rois} == {(f"s{number}", number) for number in range(6)}

    def test_images_can_be_stored_and_need_the_slides_no_more(self, tmp_path):
        folder = small_panda(tmp_path / "panda", slides=4)
        prepare_panda(folder, tmp_path / "stored", PATTERN, allow_subset=True, store_images=True)
        prepare_panda(folder, tmp_path / "referred", PATTERN, allow_subset=True)
        referred = load_roi_dataset(tmp_path / "referred")
        expected = [referred.read(index) for index in range(len(referred))]
        (tmp_path / "panda").rename(tmp_path / "moved")
        stored = load_roi_dataset(tmp_path / "stored")
        assert stored.rois == referred.rois
        for index, pixels in enumerate(expected):
            assert np.array_equal(stored.read(index), pixels)
        with pytest.raises(ValueError, match=r"is missing: pass the folder .*--data_root"):
            load_roi_dataset(tmp_path / "referred")
        assert load_roi_dataset(tmp_path / "referred", tmp_path / "moved").rois == referred.rois


class TestProblems:
    @pytest.fixture
    def panda(self, tmp_path):
        panda = PandaFolder(tmp_path / "panda")
        panda.add("fine", [1, 2, 3, 4])
        return panda

    def problems_of(self, panda, tmp_path, settings=PATTERN):
        summary = prepare_panda(panda.write_csv(), tmp_path / "out", settings, allow_subset=True)
        with (tmp_path / "out" / "problems.csv").open() as file:
            rows = [row for row in csv.DictReader(file) if row["kind"] != "empty_class_in_split"]
        assert Counter(row["kind"] for row in rows) == {
            kind: count for kind, count in summary["problems"].items() if kind != "empty_class_in_split"
        }
        assert {roi.slide_id for roi in load_roi_dataset(tmp_path / "out").rois} == {"fine"}
        return {row["item"]: (row["kind"], row["reason"]) for row in rows}

    def test_each_fault_of_a_slide_is_named_and_the_others_go_on(self, panda, tmp_path):
        for name in ("unmasked", "cut", "maskcut", "speaks6", "unsized", "tiny", "mixed", "shifted", "white"):
            panda.add(name, [1, 2, 3, 4], mask=name != "unmasked")
        panda.slide_path("cut").write_bytes(panda.slide_path("cut").read_bytes()[:3000])
        panda.mask_path("maskcut").write_bytes(panda.mask_path("maskcut").read_bytes()[:300])
        panda.write_mask("speaks6", np.full((256, 256), 6, np.uint8))
        panda.rows = [row for row in panda.rows if row[0] not in ("tiny", "white", "unsized")]
        panda.add("tiny", [1], size=64, side=64)
        panda.add("unsized", [1, 2, 3, 4], mpp=0)
        panda.add("white", [0, 0, 0, 0])
        panda.add(BLANK_MASK, [1, 2, 3, 4])
        panda.write_mask(BLANK_MASK, np.zeros((256, 256), np.uint8))
        panda.write_mask("mixed", np.tile(np.repeat(np.uint8([1, 2, 3, 4, 5]), 8), (256, 7))[:, :256])
        panda.write_mask("shifted", np.full((256, 240), 1, np.uint8))
        problems = self.problems_of(panda, tmp_path)
        assert {name: kind for name, (kind, _) in problems.items()} == {
            "unmasked": "missing_mask",
            "cut": "corrupt_slide",
            "maskcut": "corrupt_mask",
            "speaks6": "label_outside_table",
            "unsized": "unknown_mpp",
            "tiny": "roi_larger_than_slide",
            "white": "blank_slide",
            BLANK_MASK: "blank_mask",
            "mixed": "no_roi",
            "shifted": "mask_of_other_size",
        }
        assert "4 ambiguous_label" in problems["mixed"][1]
        assert "128 x 128 level-0 pixels, the slide has 64 x 64" in problems["tiny"][1]
        assert "(a known blank mask)" in problems[BLANK_MASK][1]
        assert "labels [6]" in problems["speaks6"][1]

    def test_too_little_tissue_is_counted(self, panda, tmp_path):
        panda.add("sparse", [0, 0, 0, 3])
        summary = prepare_panda(panda.write_csv(), tmp_path / "out", PATTERN, allow_subset=True)
        assert summary["places"] == {"taken": 5, "too_little_tissue": 3}

    def test_an_empty_class_in_a_split_is_named(self, panda, tmp_path):
        summary = prepare_panda(panda.write_csv(), tmp_path / "out", PATTERN, allow_subset=True)
        assert summary["problems"] == {"empty_class_in_split": 11}  # one slide: two splits of 5, and G5 in train
        assert "train/G5" in (tmp_path / "out" / "problems.csv").read_text()

    def test_without_any_roi_the_reasons_are_given(self, tmp_path):
        panda = PandaFolder(tmp_path / "panda")
        panda.add("a", [1, 2, 3, 4])
        with pytest.raises(ValueError, match=r"no ROI of 512 px at 0.5 mpp .*'roi_larger_than_slide': 1"):
            prepare_panda(panda.write_csv(), tmp_path / "o", PandaSettings("cancer", roi_size=512), allow_subset=True)
        assert "roi_larger_than_slide" in (tmp_path / "o" / "problems.csv").read_text()

    def test_pixels_that_cannot_be_decoded_are_found_before_training(self, panda, tmp_path):
        panda.add("holed", [1, 2, 3, 4])
        path = panda.slide_path("holed")
        with tifffile.TiffFile(path) as tiff:
            offset, size = (values[5] for values in (tiff.pages[0].dataoffsets, tiff.pages[0].databytecounts))
        content = bytearray(path.read_bytes())
        content[offset : offset + size] = bytes(size)
        path.write_bytes(content)
        assert self.problems_of(panda, tmp_path)["holed"][0] == "corrupt_slide"


def test_a_mask_decides_at_full_resolution(tmp_path):
    """A pattern that falls between the pixels of the mask's coarse levels counts as much as any other."""
    panda = PandaFolder(tmp_path)
    panda.add("a", [1], size=128)
    labels = np.full((128, 128), 5, np.uint8)
    labels[::4, ::4] = 1
    panda.write_mask("a", labels)
    panda.write_csv()
    slide = PandaSlide("a", "radboud", 0, True, panda.slide_path("a"), panda.mask_path("a"))
    assert choose_rois(slide, TASKS["radboud_pattern"], PATTERN).rois == [(0, 0, 4)]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"task": "grade"}, "task='grade' is unknown: choose one of radboud_pattern, cancer, isup"),
        ({"roi_size": 0}, "roi_size=0"),
        ({"mpp": -1}, "mpp=-1"),
        ({"min_tissue": 2}, "min_tissue=2"),
        ({"split_shares": (0.5, 0.1, 0.1)}, "sum to 1"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        PandaSettings(**{"task": "cancer", **settings})


def test_an_roi_lies_where_the_tissue_is(tmp_path):
    panda = PandaFolder(tmp_path)
    panda.add("a", [0, 3, 0, 0])
    panda.write_csv()
    slide = PandaSlide("a", "radboud", 0, True, panda.slide_path("a"), panda.mask_path("a"))
    assert choose_rois(slide, TASKS["radboud_pattern"], PATTERN).rois == [(128, 0, 2)]


REAL_SLIDE = SHARED_DATA / "slides/CMU-1_panda_layout.tiff"


@pytest.mark.skipif(not REAL_SLIDE.exists(), reason="needs the shared data")
def test_a_real_slide_in_the_layout_of_panda(tmp_path):
    """2220 x 2967 pixels at 0.499 mpp, taken as 0.5; three levels of JPEG tiles."""
    panda = PandaFolder(tmp_path / "panda")
    panda.slide_path("real").symlink_to(REAL_SLIDE.resolve())
    panda.add_row("real", "karolinska", 1)
    settings = PandaSettings("isup", roi_size=512, min_tissue=0.5, max_rois_per_slide=3)
    summary = prepare_panda(panda.write_csv(), tmp_path / "out", settings, allow_subset=True)
    assert summary["places"]["taken"] == 3
    assert sum(summary["places"].values()) == 4 * 5
    dataset = load_roi_dataset(tmp_path / "out")
    with Slide(REAL_SLIDE) as slide:
        for index, roi in enumerate(dataset.rois):
            assert np.array_equal(dataset.read(index), slide.read_region(roi.x, roi.y, 512, 512))
            assert dataset.read(index, 128).shape == (128, 128, 3)
