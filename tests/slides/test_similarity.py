# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import h5py
import numpy as np
import pytest

from sparsepath_vit.slides import EmbeddedSlide, Slide, SlideError, similar_places, token_similarity
from sparsepath_vit.slides.feature_colors import fit_feature_colors
from sparsepath_vit.slides.mapped_rows import MappedRows
from sparsepath_vit.slides.store import SlideWriter
from sparsepath_vit.slides.token_values import read_token_values


def stored_features(file):
    with h5py.File(file) as stored:
        return stored["patch_features"][:].astype(np.float64), stored["patch_coords"][:]


def cosines(features, query):
    return features @ query / np.linalg.norm(features, axis=1) / np.linalg.norm(query)


@pytest.mark.parametrize("parts", [[5], [700, 3, 900], [4096, 4097]])
def test_rows_in_a_file_are_mapped_as_they_are(tmp_path, parts):
    generator = np.random.default_rng(0)
    rows = [generator.normal(size=(count, 96)).astype(np.float16) for count in parts]
    with SlideWriter(tmp_path / "rows.h5", {}) as writer:
        for part in rows:
            writer.append(patch_features=part, features=part[:1].astype(np.float32))
    whole = np.concatenate(rows).astype(np.float64)
    with h5py.File(tmp_path / "rows.h5") as file:
        mapped = MappedRows(tmp_path / "rows.h5", file["patch_features"])
    assert isinstance(mapped._runs[0][1].base, np.memmap) or isinstance(mapped._runs[0][1], np.memmap)
    indices = generator.permutation(len(whole))[:50]
    assert (mapped.rows(indices) == whole[indices]).all()
    assert np.allclose(mapped.norms(), np.linalg.norm(whole, axis=1), rtol=1e-5)
    query = generator.normal(size=96)
    assert np.allclose(mapped.product(query), whole @ query, atol=2e-3 * np.linalg.norm(query) * mapped.norms().max())


@pytest.mark.parametrize("layout", [{"compression": "gzip"}, {"chunks": (16, 8)}, {"dtype": ">f2"}, {"chunks": None}])
def test_rows_of_another_layout_give_the_same_numbers(tmp_path, layout):
    rows = np.random.default_rng(0).normal(size=(70, 24)).astype(np.float16)
    with h5py.File(tmp_path / "rows.h5", "w") as file:
        file.create_dataset("patch_features", data=rows, **layout)
    with h5py.File(tmp_path / "rows.h5") as file:
        mapped = MappedRows(tmp_path / "rows.h5", file["patch_features"])
    assert (mapped.rows(np.arange(70)) == rows).all()
    query = rows[3].astype(float)
    assert np.allclose(mapped.product(query), rows.astype(float) @ query, rtol=2e-3, atol=0.05)


def test_similarity_is_the_cosine_of_the_stored_features(embedded):
    features, _ = stored_features(embedded[1])
    slide = EmbeddedSlide(embedded[1])
    found = token_similarity(slide, features[11])
    assert np.abs(found - cosines(features, features[11])).max() < 2e-3
    assert found.std() > 0.1  # the slide is not one colour


def test_similarity_to_a_place_is_that_to_the_token_there(embedded):
    features, corners = stored_features(embedded[1])
    x, y = corners[20] + [3, 12]
    values = read_token_values(embedded[1], f"similarity:{x},{y}")
    assert np.abs(values.values - cosines(features, features[20])).max() < 2e-3
    assert values.limits[1] == 1 and (values.corners == corners).all()


def test_a_place_without_tokens_is_refused(embedded):
    with pytest.raises(SlideError, match="no token was kept within two tokens of x=600, y=500"):
        read_token_values(embedded[1], "similarity:600,500")


def test_similar_places_are_the_best_that_are_apart(embedded):
    features, corners = stored_features(embedded[1])
    slide = EmbeddedSlide(embedded[1])
    places = similar_places([slide, slide], features[4], count=6, distance=3)
    assert places[0].similarity == pytest.approx(1, abs=1e-6) and (slide.kept[places[0].token] == corners[4]).all()
    expected = cosines(features, features[4])
    for place in places:
        assert place.similarity == pytest.approx(expected[place.token], abs=1e-6)
        assert np.allclose(place.center, corners[place.token] + 8)
    assert [place.similarity for place in places] == sorted((place.similarity for place in places), reverse=True)
    of_first = [corners[place.token] for place in places if place.slide == 0]
    for number, corner in enumerate(of_first):
        for other in of_first[:number]:
            assert np.abs(corner - other).max() >= 3 * 16
    assert {place.slide for place in places} == {0, 1}


def test_colours_are_the_principal_components(embedded):
    features, _ = stored_features(embedded[1])
    colors = fit_feature_colors([EmbeddedSlide(embedded[1])])
    centred = features - features.mean(axis=0)
    _, _, directions = np.linalg.svd(centred, full_matrices=False)
    for component, direction in zip(colors.components, directions, strict=False):
        assert abs(component @ direction) == pytest.approx(1, abs=1e-3)
        assert component[np.abs(component).argmax()] > 0
    shares = colors.of(EmbeddedSlide(embedded[1]))
    assert shares.shape == (len(features), 3) and shares.min() >= 0 and shares.max() <= 1
    assert abs(np.corrcoef(shares[:, 0], centred @ directions[0])[0, 1]) > 0.97
    again = read_token_values(embedded[1], "pca")
    assert again.is_colored and np.allclose(again.values, shares)


def test_tokens_of_another_slide_and_of_a_changed_one(embedded, small_slide, tmp_path, caplog):
    from slide_files import stained_image, write_pyramid

    slide = EmbeddedSlide(embedded[1])
    slide.check(Slide(embedded[0]))
    assert not caplog.records
    slide.check(Slide(write_pyramid(tmp_path / "slide.tiff", stained_image(640, 512, [(0, 96, 384, 256)]))))
    assert "has changed since it was embedded" in caplog.text
    other = write_pyramid(tmp_path / "other.tiff", stained_image(320, 320, []))
    with pytest.raises(SlideError, match=r"tokens of a slide of 640 x 512 pixels; .*other.tiff has 320 x 320"):
        slide.check(Slide(other))
