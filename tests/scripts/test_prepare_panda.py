# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import json
import logging

import pytest
from panda_files import small_panda
from run_script import load_script

prepare_panda = load_script("prepare_panda")


@pytest.fixture(scope="module")
def panda_folder(tmp_path_factory):
    return small_panda(tmp_path_factory.mktemp("panda"), slides=4)


def test_one_command_makes_a_data_set_and_says_what_is_in_it(panda_folder, tmp_path, run_script, caplog):
    caplog.set_level(logging.INFO)
    (panda_folder / "train_images" / "stray.tiff").touch()
    arguments = ["--panda_dir", str(panda_folder), "--output_dir", str(tmp_path), "--task", "cancer"]
    arguments += ["--roi_size", "128", "--mpp", "0.5", "--seed", "0", "--allow_subset", "--max_rois_per_slide", "3"]
    run_script(prepare_panda, *arguments, "--split_shares", "0.5", "0.25", "0.25")
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["settings"]["split_shares"] == [0.5, 0.25, 0.25]
    assert summary["rois"] == 18
    assert summary["problems"]["slide_without_row"] == 1
    assert "slide_without_row: stray: stray.tiff has no row in train.csv" in caplog.text
    assert "18 ROIs from 6 slides" in caplog.text
    assert "1 slide_without_row" in caplog.text
    assert (tmp_path / "dataset" / "dataset_dict.json").is_file()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], r"^error: expected 10,616 slides, found 6 in .*--allow_subset"),
        (["--allow_subset", "--roi_size", "0"], "^error: roi_size=0"),
        (["--allow_subset"], "^error: .*no ROI of 3430 px at 0.5 mpp .*'roi_larger_than_slide': 6"),
    ],
)
def test_errors_are_one_line(panda_folder, tmp_path, run_script, arguments, message):
    with pytest.raises(SystemExit, match=message):
        run_script(
            prepare_panda,
            "--panda_dir",
            str(panda_folder),
            "--output_dir",
            str(tmp_path),
            "--task",
            "cancer",
            *arguments,
        )
