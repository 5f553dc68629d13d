# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest

from sparsepath_vit.slides import resolution

OME = """<?xml version="1.0" encoding="UTF-8"?>
<OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06">
  <Image ID="Image:0"><Pixels SizeX="200" SizeY="100" PhysicalSizeX="8" PhysicalSizeY="8"/></Image>
  <Image ID="Image:1"><Pixels SizeX="4000" SizeY="2000" PhysicalSizeX="{x}" PhysicalSizeY="{y}" {units}/></Image>
</OME>"""
NANOMETRES = 'PhysicalSizeXUnit="nm" PhysicalSizeYUnit="nm"'
PIXELS = 'PhysicalSizeXUnit="pixel" PhysicalSizeYUnit="pixel"'


@pytest.mark.parametrize(
    ("pixels", "unit", "expected"),
    [
        (20000.0, "cm", 0.5),
        (50800.0, "inch", 0.5),
        (72.0, "inch", None),
        (300.0, "inch", None),
        (28.35, "cm", None),
        (1.0, "none", None),
        (20000.0, "none", None),
        (0.0, "cm", None),
        (None, "cm", None),
    ],
)
def test_resolution_tags_count_only_where_a_microscope_could_have_written_them(pixels, unit, expected):
    found = resolution.from_resolution_tags(pixels, pixels, unit)
    assert found is None if expected is None else found == pytest.approx((expected, expected))


@pytest.mark.parametrize(
    ("x", "y", "units", "expected"),
    [
        ("0.25", "0.26", "", (0.25, 0.26)),
        ("250", "260", NANOMETRES, (0.25, 0.26)),
        ("1", "1", PIXELS, None),
        ("0.25", "", "", None),
        ("nan", "0.25", "", None),
    ],
)
def test_ome_size_is_taken_from_the_image_of_the_slides_size_in_its_unit(x, y, units, expected):
    found = resolution.from_ome(OME.format(x=x, y=y, units=units), (4000, 2000))
    assert found is None if expected is None else found == pytest.approx(expected)


def test_damaged_ome_xml_states_nothing():
    assert resolution.from_ome("<OME><Image>", (4000, 2000)) is None


@pytest.mark.parametrize(
    ("description", "expected"),
    [
        ("Aperio Image Library\r\n46000x32914|AppMag = 20|MPP = 0.4990|Left = 25.69", (0.499, 0.499)),
        ("Aperio Image Library|MPP = 0,2520|Left = 25,69", (0.252, 0.252)),
        ("Aperio Image Library|AppMag = 20|Filtered MPPs = 3", None),
    ],
)
def test_aperio_description(description, expected):
    assert resolution.from_aperio(description) == expected
