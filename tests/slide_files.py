# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tiny slides with real structure (tiled, pyramidal TIFFs) and tissue-like pixels, written by the tests themselves."""

import numpy as np
import tifffile


def stained_image(width, height, tissue, seed=0):
    """(height, width, 3) uint8: pink tissue with dark nuclei in the boxes (x, y, width, height), else white."""
    generator = np.random.default_rng(seed)
    repeats = (-(-height // 256), -(-width // 256))
    nuclei = np.tile(generator.random((256, 256)) < 0.15, repeats)[:height, :width, None]
    noise = np.tile(generator.integers(-4, 5, (256, 256, 3), dtype=np.int8), (*repeats, 1))[:height, :width]
    image = np.full((height, width, 3), 243, dtype=np.uint8)
    stained = np.where(nuclei, np.uint8([96, 60, 140]), np.uint8([214, 150, 190]))
    for x, y, box_width, box_height in tissue:
        box = np.s_[y : y + box_height, x : x + box_width]
        image[box] = stained[box]
    return image + noise.view(np.uint8)  # no value is near 0 or 255: the sum wraps to the right one


def write_leica(path, image, corner, collection=(1500, 1400), nanometres=500):
    """A Leica SCN that was scanned at the level-0 pixel `corner` of `collection` (width, height), without a pyramid."""
    height, width = image.shape[:2]
    macro = np.full((64, 64, 3), 230, dtype=np.uint8)
    scans = [(macro, (0, 0), collection, 0.6), (image, corner, (width, height), 20)]
    entries = [
        f'''<image name="scan {number}"><creationDate>2020-01-01T00:00:00Z</creationDate>
        <device model="Leica SCN400" version="1.0"/><pixels sizeX="{pixels.shape[1]}" sizeY="{pixels.shape[0]}">
        <dimension sizeX="{pixels.shape[1]}" sizeY="{pixels.shape[0]}" r="0" ifd="{number}"/></pixels>
        <view sizeX="{size[0] * nanometres}" sizeY="{size[1] * nanometres}" offsetX="{place[0] * nanometres}"
        offsetY="{place[1] * nanometres}"/><scanSettings><objectiveSettings><objective>{power}</objective>
        </objectiveSettings><illuminationSettings><numericalAperture>0.4</numericalAperture>
        <illuminationSource>brightfield</illuminationSource></illuminationSettings></scanSettings></image>'''
        for number, (pixels, place, size, power) in enumerate(scans)
    ]
    description = f'''<?xml version="1.0"?><scn xmlns="http://www.leica-microsystems.com/scn/2010/10/01">
        <collection name="slide" sizeX="{collection[0] * nanometres}" sizeY="{collection[1] * nanometres}">
        {"".join(entries)}</collection></scn>'''
    with tifffile.TiffWriter(path, bigtiff=True) as tiff:
        for number, (pixels, *_) in enumerate(scans):
            tiff.write(
                pixels, tile=(64, 64), photometric="rgb", metadata=None, description=None if number else description,
                resolution=(1e7 / nanometres, 1e7 / nanometres), resolutionunit="CENTIMETER",
            )  # fmt: skip
    return path


def write_ome_parts(folder, image, names=("a_R.ome.tif", "a_G.ome.tif", "a_B.ome.tif")):
    """An OME-TIFF whose red, green and blue planes are a file each; every file holds the description of all."""
    height, width = image.shape[:2]
    identities = [f"urn:uuid:{number:032x}" for number in range(len(names))]
    planes = "".join(
        f'<TiffData FirstC="{number}" FirstT="0" FirstZ="0" IFD="0" PlaneCount="1"><UUID FileName="{name}">{identity}'
        "</UUID></TiffData>"
        for number, (name, identity) in enumerate(zip(names, identities, strict=True))
    )
    channels = "".join(f'<Channel ID="Channel:0:{colour}" Name="{colour}"/>' for colour in ("Red", "Green", "Blue"))
    for number, (name, identity) in enumerate(zip(names, identities, strict=True)):
        description = f'''<?xml version="1.0" encoding="UTF-8"?>
            <OME xmlns="http://www.openmicroscopy.org/Schemas/OME/2016-06" UUID="{identity}"><Image ID="Image:0">
            <Pixels ID="Pixels:0" DimensionOrder="XYCZT" Type="uint8" SizeX="{width}" SizeY="{height}" SizeC="3"
            SizeZ="1" SizeT="1" PhysicalSizeX="0.5" PhysicalSizeY="0.5">{channels}{planes}</Pixels></Image></OME>'''
        options = {"tile": (64, 64), "photometric": "minisblack", "metadata": None}
        tifffile.imwrite(folder / name, image[..., number], description=description.encode(), **options)
    return [folder / name for name in names]


def write_pyramid(path, image, mpp=0.5, factors=(4,), tile=64, compression="deflate", description=None):
    """A tiled TIFF that OpenSlide reads as generic-tiff; `mpp` goes into the resolution tags (None: none)."""
    tags = {"resolution": (1e4 / mpp, 1e4 / mpp), "resolutionunit": "CENTIMETER"} if mpp else {"resolutionunit": "NONE"}
    options = {"tile": (tile, tile), "compression": compression, "photometric": "rgb", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(image, description=description, **tags, **options)
        for factor in factors:
            height, width = (side // factor for side in image.shape[:2])
            blocks = image[: height * factor, : width * factor].reshape(height, factor, width, factor, 3)
            tiff.write(blocks.mean((1, 3)).astype(np.uint8), subfiletype=1, **options)
    return path
