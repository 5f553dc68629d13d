# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import pytest
from slide_files import stained_image, write_pyramid


@pytest.fixture(scope="session")
def embedded(model_folder, tmp_path_factory):
    """A slide, and its embeddings as two rows of overlapping regions, with the attention of each head."""
    from sparsepath_vit.slides import EmbedSettings, embed_slides

    folder = tmp_path_factory.mktemp("embedded")
    write_pyramid(folder / "slide.tiff", stained_image(640, 512, [(64, 96, 384, 256)]))
    settings = EmbedSettings(region_size=320, overlap=64, dense=True, attention="heads")
    embed_slides([folder / "slide.tiff"], model_folder, folder / "out", settings, device="cpu")
    return folder / "slide.tiff", folder / "out/slide.h5"
