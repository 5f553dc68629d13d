# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import numpy as np
import pytest
from panda_files import PandaFolder

from sparsepath_vit.tasks.panda.dataset import GLEASON_TO_ISUP, TASKS, read_panda_folder

WRONG_ROW = "b0a92a74cb53899311acc30b7405e101"


@pytest.fixture
def panda(tmp_path):
    """A folder whose slides are there but empty: nothing opens them here."""

    class Folder(PandaFolder):
        def add(self, image_id, *arguments, **kwargs):
            self.slide_path(image_id).touch()
            self.add_row(image_id, *arguments, **kwargs)

        def read(self):
            slides, problems = read_panda_folder(self.write_csv(), allow_subset=True)
            return {slide.image_id: slide for slide in slides}, {(problem.kind, problem.item) for problem in problems}

    return Folder(tmp_path)


def test_the_table_of_grades_is_that_of_the_challenge():
    by_grade = {grade: {name for name, isup in GLEASON_TO_ISUP.items() if isup == grade} for grade in range(6)}
    expected = [{"0+0"}, {"3+3"}, {"3+4"}, {"4+3"}, {"4+4", "3+5", "5+3"}, {"4+5", "5+4", "5+5"}]
    assert by_grade == dict(enumerate(expected))


class TestFolder:
    def test_a_part_of_the_data_is_refused_unless_allowed(self, panda):
        panda.add("a")
        panda.add_row("b")
        folder = panda.write_csv()
        with pytest.raises(ValueError, match=r"expected 10,616 slides, found 1 in .*--allow_subset"):
            read_panda_folder(folder)

    def test_usable_slides_with_grades_and_masks(self, panda):
        panda.add("b", "radboud", 0, "negative")
        panda.add("a", "karolinska", 0, "0+0")
        panda.add("c", "karolinska", 4, "5+3")
        panda.mask_path("c").touch()
        slides, problems = panda.read()
        assert list(slides) == ["a", "b", "c"]
        assert [slide.isup_grade for slide in slides.values()] == [0, 0, 4]
        assert slides["c"].mask == panda.mask_path("c")
        assert slides["a"].mask is None
        assert not problems

    def test_everything_unusable_is_named(self, panda):
        panda.add("good")
        panda.add_row("gone")
        panda.add("elsewhere", "oslo")
        panda.add("odd", "radboud", 1, "2+3")
        panda.add("high", "radboud", 7, "3+3")
        panda.add("wordy", "radboud", "one", "3+3")
        panda.add_row("good", "karolinska", 2)
        panda.slide_path("stray").touch()
        panda.slide_path("stray").with_suffix(".tif").touch()
        slides, problems = panda.read()
        assert list(slides) == ["good"]
        assert slides["good"].provider == "radboud"
        assert problems == {
            ("row_without_slide", "gone"),
            ("unknown_provider", "elsewhere"),
            ("unknown_grade", "odd"),
            ("unknown_grade", "high"),
            ("unknown_grade", "wordy"),
            ("duplicate_row", "good"),
            ("slide_without_row", "stray"),
            ("no_slide", "stray.tif"),
        }

    def test_a_grade_that_contradicts_its_gleason_score_is_named_and_known(self, panda):
        panda.add(WRONG_ROW, "radboud", 2, "4+3")
        folder = panda.write_csv()
        slides, problems = read_panda_folder(folder, allow_subset=True)
        assert not slides[0].grade_is_consistent
        assert problems[0].kind == "grade_mismatch"
        assert (
            "Gleason 4+3 is grade 3, not isup_grade=2; task isup leaves it out (a known wrong row" in problems[0].reason
        )

    def test_what_is_no_panda_folder_is_refused(self, tmp_path, panda):
        with pytest.raises(ValueError, match=r"holds no train\.csv: --panda_dir is the folder as Kaggle ships it"):
            read_panda_folder(tmp_path, True)
        (tmp_path / "train.csv").write_text("image_id,label\na,1\n")
        with pytest.raises(ValueError, match="data_provider, isup_grade, gleason_score is missing"):
            read_panda_folder(tmp_path, True)
        panda.add_row("gone")
        with pytest.raises(ValueError, match=r"no usable slide: 1 rows.*row_without_slide"):
            panda.read()

    def test_the_table_is_read_as_people_write_it(self, panda):
        panda.add("a", "radboud", 1, "3+3")
        folder = panda.write_csv()
        text = (folder / "train.csv").read_text()
        (folder / "train.csv").write_text("\ufeff" + text.replace(",", "; "), encoding="utf-8")
        assert [slide.isup_grade for slide in read_panda_folder(folder, True)[0]] == [1]
        (folder / "train.csv").write_text(text.replace("gleason_score", "gleeson_score"))
        with pytest.raises(ValueError, match="Did you mean 'gleason_score' by 'gleeson_score'"):
            read_panda_folder(folder, True)


class TestLabels:
    @pytest.mark.parametrize(
        "areas, label",
        [
            ([900, 60, 10, 10, 10, 10], "stroma"),
            ([0, 20, 60, 20, 0, 0], "benign"),
            ([0, 0, 0, 10, 80, 10], "G4"),
            ([0, 0, 0, 0, 0, 1], "G5"),
            ([0, 30, 0, 30, 40, 0], None),  # dominant, but not half of the annotated tissue
            ([100, 0, 0, 0, 0, 0], None),
        ],
    )
    def test_a_pattern_is_the_dominant_one(self, areas, label):
        task = TASKS["radboud_pattern"]
        found = task.label_of("radboud", np.array(areas), 0.5)
        assert (None if found is None else task.label_names[found]) == label

    @pytest.mark.parametrize(
        "provider, areas, label",
        [
            ("radboud", [900, 50, 50, 0, 0, 0], "benign"),
            ("radboud", [0, 90, 0, 0, 0, 10], "cancer"),
            ("radboud", [0, 91, 0, 3, 3, 3], None),  # a little cancer is neither
            ("radboud", [100, 0, 0, 0, 0, 0], None),
            ("karolinska", [50, 50, 0], "benign"),
            ("karolinska", [0, 90, 10], "cancer"),
            ("karolinska", [0, 91, 9], None),
        ],
    )
    def test_cancer_in_the_labels_of_both_centres(self, provider, areas, label):
        task = TASKS["cancer"]
        found = task.label_of(provider, np.array(areas), 0.1)
        assert (None if found is None else task.label_names[found]) == label
