# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
from collections import Counter

import pytest

from sparsepath_vit.tasks.classification.image_folder import read_image_folder


def test_folder_names_are_labels_and_folds_are_stratified(image_folder):
    dataset, problems = read_image_folder(image_folder, num_folds=4)
    assert dataset.label_names == ("bright", "dark")
    assert Counter((roi.split, roi.label) for roi in dataset.rois) == {
        (f"fold{fold}", label): 2 for fold in range(1, 5) for label in (0, 1)
    }
    assert not problems
    for index, roi in enumerate(dataset.rois):
        assert (dataset.read(index).mean() > 128) == (roi.label == 0)
        assert roi.file.startswith(dataset.label_names[roi.label])


def test_images_of_a_patient_stay_in_one_fold(image_folder):
    dataset, _ = read_image_folder(image_folder, num_folds=4, group_pattern=r"^([bd]\d)_")
    assert set(dataset.slide_ids) == {f"{letter}{number}" for letter in "bd" for number in range(4)}
    dataset.check_no_slide_in_two_splits()
    apart, _ = read_image_folder(image_folder, num_folds=4)
    patients = {(roi.file[:-6], roi.split) for roi in apart.rois}
    assert len(patients) > 8  # without the pattern they are torn apart


def test_folds_depend_on_the_seed(image_folder):
    first, again, other = (read_image_folder(image_folder, 4, seed=seed)[0].rois for seed in (0, 0, 1))
    assert first == again != other


def test_what_is_no_image_is_named_and_left_out(image_folder):
    broken = image_folder / "dark" / "d0_0.png"
    broken.write_bytes(broken.read_bytes()[:200])
    (image_folder / "bright" / "notes.txt").touch()
    dataset, problems = read_image_folder(image_folder, 4)
    assert len(dataset) == 15
    assert {(problem.kind, problem.item) for problem in problems} == {
        ("corrupt_image", "dark/d0_0.png"),
        ("no_image", "bright/notes.txt"),
    }


def test_everything_in_the_folders_is_taken_or_named(image_folder):
    (image_folder / "list.csv").touch()
    (image_folder / ".ipynb_checkpoints").mkdir()
    (image_folder / "dark/more").mkdir()
    (image_folder / "dark/._d0_0.png").write_bytes(b"notes")
    (image_folder / "dark/gone.png").symlink_to("/nowhere/gone.png")
    (image_folder / "dark/other_name.png").symlink_to(image_folder / "bright/b0_0.png")
    dataset, problems = read_image_folder(image_folder, 4)
    assert len(dataset) == 16 and dataset.label_names == ("bright", "dark")
    assert {tuple(problem) for problem in problems} == {
        ("no_class", "list.csv", "it is no class folder"),
        ("no_class", ".ipynb_checkpoints", "it is no class folder"),
        ("no_image", "dark/more", "it is a folder: images lie in the class folders themselves"),
        ("no_image", "dark/._d0_0.png", "it is hidden"),
        ("dead_link", "dark/gone.png", "it is a dead link to /nowhere/gone.png"),
        ("second_name", "dark/other_name.png", "it is bright/b0_0.png under another name"),
    }


def test_a_fold_without_a_class_is_named(image_folder):
    _, problems = read_image_folder(image_folder, 2, group_pattern="[bd]")
    assert {problem.kind for problem in problems} == {"empty_class_in_split"}


@pytest.mark.parametrize("folds, pattern, message", [
    (1, None, "folds=1 is not possible"),
    (9, None, r"folds=9 is not possible with \{'bright': 8, 'dark': 8\} images in 16 groups"),
    (4, "^x", r"group_pattern='\^x' finds nothing in 'b0_0.png'"),
])  # fmt: skip
def test_impossible_folds_are_refused(image_folder, folds, pattern, message):
    with pytest.raises(ValueError, match=message):
        read_image_folder(image_folder, folds, pattern)


def test_a_folder_without_classes_is_refused(image_folder, tmp_path):
    with pytest.raises(ValueError, match="holds 0 class folders: expected one folder per class"):
        read_image_folder(image_folder / "dark")
    (image_folder / "empty").mkdir()
    with pytest.raises(ValueError, match="the class folders empty hold no readable image"):
        read_image_folder(image_folder)
    with pytest.raises(ValueError, match="holds 0 class folders"):
        read_image_folder(tmp_path / "nowhere")
