# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from panda_files import write_levels
from PIL import Image

from sparsepath_vit.slides import SlideError
from sparsepath_vit.tasks.classification.roi_files import load_roi_dataset, save_roi_dataset
from sparsepath_vit.tasks.classification.rois import Roi, RoiDataset


def roi(name="a", slide="s", label=0, split="train", **fields):
    place = {"x": 16, "y": 32, "width": 128, "height": 64, "mpp": 0.5}
    described = {"roi_id": name, "slide_id": slide, "file": f"{slide}.tiff", "label": label, "split": split}
    return Roi(**{**described, **place, **fields})


def dataset_of(*rois, root=Path(), names=("first", "second"), **fields):
    return RoiDataset(rois, names, "task", root, **fields)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (160, 208, 3), dtype=np.uint8)


@pytest.fixture(params=["slide", "slide at another resolution", "image"])
def readable(request, tmp_path, pixels):
    """One ROI, and the 128 x 64 pixels it shows."""
    shown = pixels[32:96, 16:144]
    if request.param == "image":
        Image.fromarray(shown).save(tmp_path / "s.png")
        return dataset_of(roi(file="s.png", x=0, y=0, mpp=None), root=tmp_path), shown
    mpp = 0.5 if request.param == "slide" else 0.25
    write_levels(tmp_path / "s.tiff", pixels, mpp, factors=(), compression="deflate")
    return dataset_of(roi(mpp=mpp), root=tmp_path), shown


class TestReading:
    def test_as_it_is(self, readable):
        assert np.array_equal(readable[0].read(0), readable[1])

    def test_the_whole_field_of_view_in_fewer_pixels(self, readable):
        dataset, shown = readable
        found = dataset.read(0, 32).astype(int)
        blocks = shown.reshape(16, 4, 32, 4, 3).mean((1, 3))
        assert found.shape == (16, 32, 3)
        assert (
            np.abs(found - blocks).mean() < 12
        )  # noise of standard deviation 74; another place differs by 20 and more

    def test_the_middle_in_its_own_pixels(self, readable):
        dataset, shown = readable
        assert np.array_equal(dataset.read(0, 40, "pixels"), shown[12:52, 44:84])
        assert np.array_equal(dataset.read(0, 100, "pixels"), shown[:, 14:114])

    def test_enlarging_is_refused(self, readable):
        with pytest.raises(ValueError, match="size=129 is not possible for a, which has 128 x 64 pixels"):
            readable[0].read(0, 129)

    def test_an_unknown_view_is_refused(self, readable):
        with pytest.raises(ValueError, match=r"view='zoom' is unknown: choose one of field_of_view, pixels"):
            readable[0].read(0, 32, "zoom")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(SlideError, match=r"gone\.tiff does not exist"):
            dataset_of(roi(slide="gone"), root=tmp_path).read(0)


class TestContentKey:
    def test_it_follows_the_pixels_and_not_the_names(self, readable):
        dataset, _ = readable
        original = dataset.rois[0]
        renamed = replace(dataset, rois=(replace(original, roi_id="b", slide_id="t", label=1, split="test"),))
        assert renamed.content_key(0) == dataset.content_key(0)
        for other in (replace(original, x=17), replace(original, width=127), replace(original, mpp=0.6)):
            assert replace(dataset, rois=(other,)).content_key(0) != dataset.content_key(0)

    def test_other_pixels_in_the_same_file_have_another(self, tmp_path, pixels):
        path = tmp_path / "s.png"
        dataset = dataset_of(roi(file="s.png", mpp=None), root=tmp_path)
        keys = set()
        for value in (0, 1):
            pixels[40, 40] = value
            Image.fromarray(pixels).save(path)
            keys.add(dataset.content_key(0))
        assert len(keys) == 2

    def test_a_change_anywhere_in_a_file_of_some_megabytes_has_another(self, tmp_path):
        """Only the first and the last MiB counted."""
        pixels = np.random.default_rng(0).integers(0, 256, (1100, 1000, 3), dtype=np.uint8)
        dataset = dataset_of(roi(file="s.bmp", mpp=None), root=tmp_path)
        keys = set()
        for value in (0, 1):
            pixels[550, 500] = value
            Image.fromarray(pixels).save(tmp_path / "s.bmp")
            keys.add(dataset.content_key(0))
        assert len(keys) == 2 and (tmp_path / "s.bmp").stat().st_size > 3 * 2**20

    def test_pixels_are_those_of_the_file_as_it_is_now(self, tmp_path, pixels):
        """A file that was written anew gave the pixels of the old one, under the key of the new one."""
        dataset = dataset_of(roi(), root=tmp_path)
        for shift in (0, 40):
            shown = np.roll(pixels, shift, axis=1)
            write_levels(tmp_path / "s.tiff", shown, 0.5, factors=(), compression="deflate")
            assert np.array_equal(dataset.read(0), shown[32:96, 16:144])

    def test_stored_images_are_told_apart(self, tmp_path, pixels):
        Image.fromarray(pixels).save(tmp_path / "s.png")
        rois = (roi("a", file="s.png", mpp=None), roi("b", file="s.png", x=0, mpp=None))
        save_roi_dataset(dataset_of(*rois, root=tmp_path), tmp_path / "out", store_images=True)
        stored = load_roi_dataset(tmp_path / "out")
        assert stored.content_key(0) != stored.content_key(1)


class TestSplits:
    def test_fixed_splits_are_one_partition(self):
        rois = [roi(str(n), str(n), split=split) for n, split in enumerate(["test", "train", "validation", "train"])]
        (partition,) = dataset_of(*rois).partitions()
        assert [part.tolist() for part in partition] == [[1, 3], [2], [0]]
        (partition,) = dataset_of(*rois).partitions("validation")
        assert partition.evaluation.tolist() == [2]

    def test_folds_are_each_held_out_once(self):
        rois = [roi(str(n), str(n), split=f"fold{1 + n % 3}") for n in range(7)]
        partitions = dataset_of(*rois).partitions()
        assert [part.evaluation.tolist() for part in partitions] == [[0, 3, 6], [1, 4], [2, 5]]
        for part in partitions:
            assert sorted([*part.train, *part.evaluation]) == list(range(7))

    def test_an_empty_split_is_named(self):
        with pytest.raises(ValueError, match=r"the split 'test' holds no ROIs \(\{'train': 1\}"):
            dataset_of(roi()).partitions()
        with pytest.raises(ValueError, match="eval_split='train' is unknown"):
            dataset_of(roi()).partitions("train")

    def test_a_slide_in_two_splits_is_refused_when_written(self, tmp_path):
        leaking = dataset_of(roi("a", "s"), roi("b", "s", split="test"), root=tmp_path)
        with pytest.raises(ValueError, match="the slide s is in the splits 'train' and 'test'"):
            save_roi_dataset(leaking, tmp_path / "out")
        assert not (tmp_path / "out").exists()

    def test_every_class_that_a_split_lacks_is_named(self):
        rois = [roi("a", "a"), roi("b", "b", 1), roi("c", "c", 1, "test"), roi("d", "d", 0, "validation")]
        assert [problem.item for problem in dataset_of(*rois).empty_classes()] == ["validation/second", "test/first"]


class TestShuffledLabels:
    def test_they_are_the_same_labels_at_other_places(self):
        dataset = dataset_of(*(roi(str(n), str(n), n % 2) for n in range(40)))
        shuffled = dataset.with_shuffled_labels(0)
        assert sorted(shuffled.labels) == sorted(dataset.labels)
        assert 10 <= np.sum(shuffled.labels == dataset.labels) <= 30
        assert shuffled.with_shuffled_labels(0).rois != shuffled.rois
        assert dataset.with_shuffled_labels(0) == shuffled

    def test_a_slide_keeps_one_label(self):
        rois = [roi(f"{slide}{n}", str(slide), slide % 2) for slide in range(20) for n in range(3)]
        shuffled = dataset_of(*rois, slide_level=True).with_shuffled_labels(1)
        assert len({(roi.slide_id, roi.label) for roi in shuffled.rois}) == 20
        assert shuffled.rois != tuple(rois)


class TestPreparedFolders:
    @pytest.fixture
    def prepared(self, tmp_path, pixels):
        for name in "st":
            write_levels(tmp_path / f"{name}.tiff", pixels, 0.5, factors=(), compression="deflate")
        dataset = dataset_of(roi("b", "t", 1, "test"), roi("a", "s"), root=tmp_path)
        save_roi_dataset(dataset, tmp_path / "out")
        return dataset, tmp_path / "out"

    def test_a_slide_that_changed_is_refused_by_name(self, prepared, tmp_path, pixels):
        dataset, folder = prepared
        loaded = load_roi_dataset(folder)
        assert loaded == dataset and np.array_equal(loaded.read(0), dataset.read(0))
        assert loaded.content_key(0) == dataset.content_key(0)
        write_levels(tmp_path / "t.tiff", pixels[:, ::-1], 0.5, factors=(), compression="deflate")
        for use in (loaded.read, loaded.content_key):
            use(1)
            with pytest.raises(ValueError, match=r"t\.tiff has changed since b was chosen from it"):
                use(0)

    def test_a_list_that_was_edited_is_refused(self, prepared):
        """It is a copy: who corrects a label in it would be ignored."""
        folder = prepared[1]
        text = (folder / "rois.csv").read_text()
        (folder / "rois.csv").write_text("\ufeff" + text.replace(",", ";"), encoding="utf-8")
        load_roi_dataset(folder)  # only saved again by a spreadsheet
        for edited in (text.replace("second", "first"), "\n".join(text.splitlines()[::2])):
            (folder / "rois.csv").write_text(edited)
            with pytest.raises(ValueError, match=r"rois\.csv was edited: of b it says .*says \('second', 'test'\)"):
                load_roi_dataset(folder)

    def test_a_folder_of_an_earlier_version_is_taken_as_it_is(self, prepared, tmp_path, pixels):
        folder = prepared[1]
        description = json.loads((folder / "description.json").read_text())
        assert sorted(description.pop("contents")) == ["s.tiff", "t.tiff"]
        (folder / "description.json").write_text(json.dumps(description))
        write_levels(tmp_path / "t.tiff", pixels[:, ::-1], 0.5, factors=(), compression="deflate")
        load_roi_dataset(folder).read(0)


def test_an_unprepared_folder_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"holds no prepared data set .*scripts/prepare_panda\.py.*--image_folder"):
        load_roi_dataset(tmp_path)


class TestAttributes:
    def save(self, tmp_path, *attributes):
        rois = [roi(f"r{index}", f"s{index}", attributes=given) for index, given in enumerate(attributes)]
        save_roi_dataset(dataset_of(*rois), tmp_path / "out", store_images=False)
        return rois

    def test_they_are_columns_and_come_back_with_their_types(self, tmp_path):
        (tmp_path / "s0.tiff").touch()
        rois = self.save(tmp_path, {"centre": "A", "age": 61, "share": 0.5}, {"centre": "B", "age": 7, "share": 1.5})
        header, first, _ = (tmp_path / "out" / "rois.csv").read_text().splitlines()
        assert header.endswith("label,split,centre,age,share") and first.endswith("first,train,A,61,0.5")
        loaded = load_roi_dataset(tmp_path / "out", tmp_path).rois
        assert loaded == tuple(rois)
        assert [type(value) for value in loaded[0].attributes.values()] == [str, int, float]

    @pytest.mark.parametrize(
        ("attributes", "message"),
        [
            (({"centre": "A"}, {}), r"r1 has the attributes \[\], r0 has \['centre'\]"),
            (({"mpp": 0.5}, {"mpp": 0.5}), "attributes=mpp of r0: every ROI has these"),
        ],
    )
    def test_they_are_the_same_for_all_and_hide_no_field(self, tmp_path, attributes, message):
        with pytest.raises(ValueError, match=message):
            self.save(tmp_path, *attributes)
        assert not (tmp_path / "out").exists()
