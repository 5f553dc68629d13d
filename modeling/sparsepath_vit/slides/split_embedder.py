# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Several processes embed each whole slide together: every one its own rows, and the first one writes."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from .dataset_rows import level0_coordinates
from .embedder import SlideEmbedder
from .forward import Embedding
from .opening import slide_to_see_at
from .reader import Slide
from .records import source_of
from .regions import Region, SlideInput
from .store import EmbeddingStore, SlideWriter
from .tissue import find_tissue

if TYPE_CHECKING:
    from ..model.process_split import ProcessSplit

# So many patch tokens go to the first process at once: beside its own it never holds more of them.
_TOKENS_AT_ONCE = 16_384


class SplitSlideEmbedder(SlideEmbedder):
    """`SlideEmbedder` whose processes all work on the same slide. What fails in one fails in all.

    The first process writes, shows and counts; the reports of the others hold their time and memory.
    """

    _split: "ProcessSplit"

    def run(self, slides: dict[str, SlideInput], store: EmbeddingStore) -> None:
        """Embeds the slides one after the other, each by all processes."""
        with self.model.split_over_processes() as self._split:
            self.show_progress = self.show_progress and self._split.is_first
            super().run(slides, store)

    def _record_failure(self, item: SlideInput, error: Exception, store: EmbeddingStore) -> None:
        if not self._split.processes.is_in_step:
            raise error  # the processes cannot go on with the next slide
        if self._split.is_first:
            super()._record_failure(item, error, store)

    def _run_one(self, name: str, item: SlideInput, store: EmbeddingStore) -> None:
        processes, is_first = self._split.processes, self._split.is_first
        mask_file = processes.together(lambda: item.tissue_mask or self._mask_file(name))
        source = processes.together(lambda: source_of(item, self.slide_mpp, mask_file))
        was_done = processes.tell(processes.together(lambda: is_first and store.is_done(name, source)))[0]
        if not was_done:
            self._make(name, item, mask_file, store.writer(name, source))
        processes.together(lambda: self._finish(name, item, store, was_done) if is_first else None)

    def _make(self, name: str, item: SlideInput, mask_file: str | Path | None, writer: SlideWriter) -> None:
        """Embeds one slide; into its file in the first process."""
        together = self._split.processes.together
        slide_mpp, mpp, origin = item.mpp or self.slide_mpp, self.settings.mpp, self.settings.origin
        with ExitStack() as opened:
            slide = together(lambda: opened.enter_context(slide_to_see_at(item.path, slide_mpp, mpp, origin)))
            tissue = together(lambda: find_tissue(slide, mask_file))
            regions, _, _ = self._regions(slide, tissue, item)
            ((region, embedding),) = self._embed(slide, tissue, regions, name)
            counts = self._split.processes.tell(len(embedding.patch_positions))
            if self._split.is_first:
                together(lambda: self._write_all(writer, slide, name, item, region, embedding, counts))
            else:
                together(lambda: self._send(embedding))

    def _write_all(
        self,
        writer: SlideWriter,
        slide: Slide,
        name: str,
        item: SlideInput,
        region: Region,
        embedding: Embedding,
        counts: list[int],
    ) -> None:
        """Writes the slide's file: the own patch tokens, then those of the other processes as they come.

        Args:
            writer: of the file.
            slide: the slide.
            name: of the result.
            item: what was asked for.
            region: the whole slide.
            embedding: of it, with the patch tokens of this process.
            counts: how many patch tokens each process has.
        """
        pieces = self._received(embedding, counts)
        try:
            with writer:
                self._write(writer, slide, region, embedding, num_patches=sum(counts))
                for piece in pieces:
                    coordinates = level0_coordinates(slide, piece["patch_positions"], self.mpp, self.patch_size)
                    writer.append(**piece, patch_coords=coordinates)
                self._describe(writer, slide, name, item)
        finally:
            for _ in pieces:  # who sends waits until it is taken, also after an error here
                pass

    def _received(self, embedding: Embedding, counts: list[int]) -> Iterator[dict[str, np.ndarray]]:
        """The datasets of patch tokens of the other processes, piece by piece, in their order."""
        own = _patch_datasets(embedding)
        for sender, count in enumerate(counts):
            for start in range(0, count if sender else 0, _TOKENS_AT_ONCE):
                tokens = min(_TOKENS_AT_ONCE, count - start)
                yield {name: self._receive((tokens, *rows.shape[1:]), rows, sender) for name, rows in own.items()}

    def _receive(self, shape: tuple[int, ...], like: np.ndarray, sender: int) -> np.ndarray:
        place = torch.empty(shape, dtype=torch.from_numpy(like).dtype, device=self.model.device)
        return self._split.processes.receive(place, sender).cpu().numpy()

    def _send(self, embedding: Embedding) -> None:
        """Hands the patch tokens to the first process, as `_received` takes them."""
        for start in range(0, len(embedding.patch_positions), _TOKENS_AT_ONCE):
            for rows in _patch_datasets(embedding).values():
                piece = torch.from_numpy(rows[start : start + _TOKENS_AT_ONCE])
                self._split.processes.send(piece.to(self.model.device), receiver=0)


def _patch_datasets(embedding: Embedding) -> dict[str, np.ndarray]:
    """What is stored of each patch token; nothing where no patch tokens were asked for."""
    if embedding.patch_features is None:
        return {}
    rows = {"patch_features": embedding.patch_features, "patch_positions": embedding.patch_positions}
    return rows if embedding.patch_weights is None else {**rows, "patch_weights": embedding.patch_weights}
