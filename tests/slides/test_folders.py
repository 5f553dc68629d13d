# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import os

import pytest
from dicom_files import EXPLICIT, IMPLICIT, write_dicom
from slide_files import stained_image, write_ome_parts, write_pyramid

from sparsepath_vit.slides import read_inputs
from sparsepath_vit.slides.dicom_series import read_dicom_header
from sparsepath_vit.slides.folders import files_of_slide, same_slide_key, search_folder
from sparsepath_vit.slides.records import slide_content


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "slides").mkdir()
    return tmp_path / "slides"


def fill(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())


def search(folder):
    """Names of the slides, and the reason for each other entry by its path in the folder; together all there is."""
    content = search_folder(folder)
    left_out = {path.relative_to(folder).as_posix(): reason for path, reason in content.left_out}
    assert len(left_out) == len(content.left_out)
    return [path.relative_to(folder).as_posix() for path, _ in content.slides], left_out


def test_endings_of_slides_in_any_case_and_depth(folder):
    names = ["a.svs", "b.NDPI", "c.qptiff", "d.OME.TIF", "deep/er/e.Mrxs", "f.btf", "g.PTIF", "h.PNG", "i.scn"]
    fill(folder, *names)
    assert search(folder) == (names, {})


def test_everything_else_has_its_reason(folder):
    fill(
        folder,
        "a.svs",
        "notes.txt",
        "README",
        ".hidden/b.svs",
        "._a.svs",
        ".DS_Store",
        "b.vsi",
        "_b_/stack1/frame_t.ets",
    )
    fill(folder, "c.isyntax", "d.ome.zarr/0/.zarray", "done/settings.json", "done/a.h5", "e.jp2")
    fill(folder, "f.dzi", "f_files/9/0_0.jpeg", "zoom/ImageProperties.xml", "zoom/TileGroup0/0-0-0.jpg")
    (folder / "gone.svs").symlink_to("/nowhere/gone.svs")
    (folder / "loop.svs").symlink_to(folder / "loop.svs")
    os.mkfifo(folder / "pipe.svs")
    slides, left_out = search(folder)
    assert slides == ["a.svs"]
    assert left_out == {
        "notes.txt": ".txt is no ending of a slide",
        "README": "it has no ending, and is no DICOM file",
        ".hidden": "it is a hidden folder",
        "._a.svs": "macOS keeps notes on another file in it",
        ".DS_Store": "it is a hidden file",
        "b.vsi": "Olympus VSI is not supported: export it as OME-TIFF or SVS",
        "_b_": "it holds the data of b.vsi",
        "c.isyntax": "Philips iSyntax is not supported: export it as OME-TIFF or SVS",
        "f.dzi": "Deep Zoom (a folder of tiles) is not supported: export it as OME-TIFF or SVS",
        "f_files": "it holds the tiles of f.dzi",
        "zoom": "it holds Zoomify tiles, which are not supported: export the slide as OME-TIFF or SVS",
        "d.ome.zarr": "OME-Zarr is not supported: export it as OME-TIFF",
        "done": "it holds embeddings",
        "e.jp2": "JPEG 2000 is not supported: export it as OME-TIFF or SVS",
        "gone.svs": "it is a dead link to /nowhere/gone.svs",
        "loop.svs": f"it is a dead link to {folder / 'loop.svs'}",
        "pipe.svs": "it is no regular file",
    }


def test_linked_files_and_folders_are_taken_once(folder, tmp_path):
    fill(tmp_path, "store/a.svs", "store/b.svs")
    fill(folder, "own.svs")
    (folder / "by_name.svs").symlink_to(tmp_path / "store/a.svs")
    (folder / "linked").symlink_to(tmp_path / "store")
    (folder / "linked_again").symlink_to(tmp_path / "store")
    (folder / "up").symlink_to(folder)
    (folder / "own_too.svs").hardlink_to(folder / "own.svs")
    slides, left_out = search(folder)
    assert slides == ["by_name.svs", "linked/b.svs", "own.svs"]
    assert left_out == {
        "linked/a.svs": f"it is {folder / 'by_name.svs'} under another name",
        "linked_again": f"it is {folder / 'linked'} under another name",
        "own_too.svs": f"it is {folder / 'own.svs'} under another name",
        "up": f"it is {folder} under another name",
    }


def test_parts_of_slides_of_many_files_are_no_slides(folder):
    fill(folder, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat", "a/preview.jpg", "lost/Slidedat.ini", "b(0,1).jpg")
    fill(folder, "b.jpg", "b_map2.jpg", "c.jpg")
    (folder / "b.vms").write_text(
        "[Virtual Microscope Specimen]\nImageFile=b.jpg\nImageFile(0,1)=b(0,1).jpg\nMapFile=b_map2.jpg\n"
    )
    slides, left_out = search(folder)
    assert slides == ["a.mrxs", "b.vms", "c.jpg"]
    assert left_out == {
        "a": "it holds the data of a.mrxs",
        "lost": "it holds the data of a MIRAX slide: its .mrxs file lies beside the folder and has the folder's name",
        **dict.fromkeys(("b.jpg", "b(0,1).jpg", "b_map2.jpg"), "it is a part of b.vms"),
    }
    assert [path.name for path in files_of_slide(folder / "a.mrxs")] == [
        "a.mrxs",
        "Data0000.dat",
        "Slidedat.ini",
        "preview.jpg",
    ]
    assert [path.name for path in files_of_slide(folder / "b.vms")] == ["b.vms", "b.jpg", "b(0,1).jpg", "b_map2.jpg"]


def test_parts_of_an_ome_tiff_are_one_slide(folder):
    parts = write_ome_parts(folder, stained_image(128, 64, []))
    write_pyramid(folder / "alone.ome.tif", stained_image(128, 64, []))
    fill(folder, "b.ome.tif")
    slides, left_out = search(folder)
    assert slides == ["a_R.ome.tif", "alone.ome.tif", "b.ome.tif"]
    assert left_out == dict.fromkeys(("a_G.ome.tif", "a_B.ome.tif"), "it is a part of a_R.ome.tif")
    assert set(files_of_slide(parts[1])) == set(parts) and files_of_slide(parts[1])[0] == parts[1]
    assert len({same_slide_key(path) for path in parts}) == 1
    assert same_slide_key(parts[0]) != same_slide_key(folder / "alone.ome.tif")


def test_any_file_of_a_slide_is_its_content(folder):
    fill(folder, "a.mrxs", "a/Slidedat.ini", "a/Data0000.dat")
    before = slide_content(folder / "a.mrxs")
    assert slide_content(folder / "a.mrxs") == before
    (folder / "a/Data0000.dat").write_bytes(b"other")
    assert slide_content(folder / "a.mrxs") != before


def test_pictures_of_a_slide_are_told_by_their_names(folder):
    pictures = [
        "a.jpg",
        "a.svs.png",
        "a_thumbnail.png",
        "A-Macro.jpg",
        "a.label.jpeg",
        "a_tissue_mask.tif",
        "b_mask.png",
    ]
    slides = ["a.svs", "a_2.png", "a_kept.svs", "b.png", "c.tif", "c.svs", "mask.png", "unmasked_a.svs"]
    fill(folder, *pictures, *slides, "thumbnails/c.jpg", "other/c.jpg")
    found, left_out = search(folder)
    assert found == sorted([*slides, "other/c.jpg"])
    assert sorted(left_out) == sorted([*pictures, "thumbnails/c.jpg"])
    assert left_out["a.jpg"] == "its name is that of a picture of a.svs: give the file itself to have it"
    assert [item.path.name for item in read_inputs([folder / "a.jpg"])] == ["a.jpg"]


class TestDicom:
    def test_a_series_is_one_slide_by_its_largest_file(self, folder):
        for number, size in enumerate((10, 5000, 300)):
            write_dicom(folder / f"{number}.dcm", "1.2.3", size=size)
        write_dicom(folder / "IM0001", "1.2.4", size=10)
        write_dicom(folder / "IM0002", "1.2.4", syntax=IMPLICIT)
        write_dicom(folder / "ct.DCM", "1.2.5", sop_class="1.2.840.10008.5.1.4.1.1.2")
        write_dicom(folder / "DICOMDIR", "1.2.3", sop_class="1.2.840.10008.1.3.10")
        fill(folder, "broken.dcm")
        slides, left_out = search(folder)
        assert slides == ["1.dcm", "IM0001", "broken.dcm"]  # the reader says what is wrong with the last
        assert left_out == {
            "0.dcm": "it belongs to the DICOM series of 1.dcm",
            "2.dcm": "it belongs to the DICOM series of 1.dcm",
            "IM0002": "it belongs to the DICOM series of IM0001",
            "ct.DCM": "it is DICOM, but no whole slide (SOP class 1.2.840.10008.5.1.4.1.1.2)",
            "DICOMDIR": "it is DICOM, but no whole slide (SOP class 1.2.840.10008.1.3.10)",
        }

    def test_the_only_series_of_a_folder_is_called_like_it(self, folder):
        for case in ("one", "two"):
            (folder / case).mkdir()
            for number in range(2):
                write_dicom(folder / case / f"{number}.dcm", f"1.2.{case}", size=number)
        (folder / "list.csv").write_text("slide,label\none,tumour\ntwo/1.dcm,benign\n")
        assert [(item.path.name, item.name) for item in read_inputs([folder])] == [("1.dcm", "one"), ("1.dcm", "two")]
        assert [item.name for item in read_inputs([folder / "one"])] == ["one"]
        items = read_inputs([folder / "list.csv"])
        assert [(item.path.name, item.name, item.label) for item in items] == [
            ("1.dcm", "one", "tumour"), ("1.dcm", None, "benign")
        ]  # fmt: skip

    def test_files_of_a_series_that_are_all_given_are_one_slide(self, folder, caplog):
        paths = [write_dicom(folder / f"{number}.dcm", "1.2.3") for number in range(3)]
        assert [item.path.name for item in read_inputs(paths)] == ["0.dcm"]
        assert "2.dcm is left out" in caplog.text
        assert len({same_slide_key(path) for path in paths}) == 1
        assert len(files_of_slide(paths[1])) == 3

    @pytest.mark.parametrize("syntax", [EXPLICIT, IMPLICIT])
    def test_a_header_that_is_cut_short_anywhere_is_no_error(self, folder, syntax):
        whole = write_dicom(folder / "a.dcm", "1.2.3", syntax=syntax).read_bytes()
        found = set()
        for length in range(len(whole)):
            (folder / "a.dcm").write_bytes(whole[:length])
            header = read_dicom_header(folder / "a.dcm")
            found.add(None if header is None else header.series)
        assert {None, "1.2.3"} <= found <= {None, "1.2.3", "1.2.", "1.2", "1.", "1", ""}


def test_many_files_of_one_reason_share_a_line(folder, caplog):
    fill(folder, "a.svs", *(f"{number:03}.xml" for number in range(50)), "b.txt")
    read_inputs([folder])
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "50 files are left out", f"{folder / 'b.txt'} is left out"
    ]  # fmt: skip


def test_a_folder_of_something_else_says_what_it_holds(folder):
    fill(folder, "notes.txt", "b.vsi")
    with pytest.raises(ValueError, match=r"holds no slides: .*It holds 2 other entries \(b\.vsi: Olympus VSI is not"):
        read_inputs([folder])
    fill(folder, "c.zarr/.zattrs")
    with pytest.raises(ValueError, match="OME-Zarr is not supported"):
        read_inputs([folder / "c.zarr"])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_folder_that_may_not_be_read_is_named(folder):
    fill(folder, "a.svs", "locked/b.svs")
    (folder / "locked").chmod(0)
    try:
        assert search(folder)[1] == {"locked": "the folder cannot be read (Permission denied)"}
    finally:
        (folder / "locked").chmod(0o700)
