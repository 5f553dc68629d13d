# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Many slides -> one HDF5 file each: resumable, sharded over processes, with every failure on record."""

import os
from collections.abc import Sequence
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, parse_flag_from_env
from transformers.utils import logging

from ..runtime.compute import torch_device, weight_dtype
from ..runtime.extras import require
from ..runtime.load_model import load_model
from ..runtime.model_identity import model_identity
from .embedder import DEFAULT_MPP, EmbedSettings, SlideEmbedder, default_workers
from .folders import LeftOut, report_left_out
from .global_attention import checked_kind
from .reader import Slide
from .reading_process import reading_process
from .regions import SlideInput, find_inputs
from .report import EmbedReport
from .resolution import is_credible
from .scverse import TABLE_SUFFIXES
from .split_embedder import SplitSlideEmbedder
from .store import EmbeddingStore

if TYPE_CHECKING:
    from ..model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
    from ..model.modeling_sparsepath_vit import SparsePathViTModel

# The processes wait for each other at the end, and one may have hours of slides more.
_LONGEST_WAIT = timedelta(days=30)
# Where they share each slide they wait for each other in each layer. Reading may be slow, a layer on a CPU too.
_LONGEST_SILENCE = timedelta(hours=1)


def embed_slides(
    paths: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    model_source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    settings: EmbedSettings | None = None,
    *,
    slide_mpp: float | None = None,
    tissue_mask: str | os.PathLike[str] | None = None,
    regions: str | os.PathLike[str] | None = None,
    table_format: str | None = None,
    split_slide: bool = False,
    batch_size: int = 1,
    workers: int | None = None,
    device: str | None = None,
    dtype: str | None = None,
) -> EmbedReport:
    """Embeds slides into `out`, one HDF5 file each; what is done there with the same settings is skipped.

    Under `accelerate launch` or `torchrun` the slides are shared out over the processes, or each slide is
    (`split_slide`). A slide that fails gets a row
    in `failures.csv` and the others go on; what the folders hold beside slides is listed in `left_out.csv`.

    Args:
        paths: slide files, folders and CSV manifests, or one of them; see `slides.regions.read_inputs`.
        model_source: folder or Hub id of a converted checkpoint.
        out: folder for the results; it holds those of one model and one set of settings only.
        settings: what is taken of every slide.
        slide_mpp: full resolution of all slides, where the files do not state it or state it wrongly.
        tissue_mask: instead of finding the tissue: "all", a file for the one slide, or a folder with a file of each
            slide's name.
        regions: that another tool chose, instead of a grid: coordinates (.h5 of TRIDENT, HEST and CLAM,
            .coordinates.npz of slide2vec) or annotations (GeoJSON of QuPath: each polygon, its class as label). A file
            for the one slide, or a folder with a file of each slide's name.
        table_format: also write the features beside each file as AnnData: "anndata" (.h5ad) or "zarr" (.zarr).
        split_slide: under a launcher, with whole slides: all processes work on the same slide, each on its own rows,
            and the first one writes. For slides that are too large or too slow for one.
        batch_size: regions per forward.
        workers: threads that read ahead; by default one per core, at most 8.
        device: "cpu", "cuda", ...; chosen by Accelerate where None.
        dtype: of the weights: "float32", "bfloat16", "float16"; by default the one that
            the device is faster in; `sparsepath doctor` says which.

    Raises:
        StoreError: `out` holds other settings.
        ValueError: inputs that cannot be understood.
        OSError: no checkpoint at `model_source`, or a full disk.
        ImportError: a library of the `slides` extra is missing.
    """
    settings = settings or EmbedSettings()
    inputs, left_out = find_inputs([paths] if isinstance(paths, str | os.PathLike) else paths)
    slides = _by_name(inputs)
    _check_arguments(slides, settings, slide_mpp, tissue_mask)
    _check_regions(slides, settings, regions, tissue_mask)
    _check_table_format(table_format)
    state = _process_state(device, split_slide)
    _check_split(settings, state, split_slide)
    reading_process()  # starts while the model is loaded
    model, processor = _load(model_source, device, dtype, state)
    embedder = (SplitSlideEmbedder if split_slide else SlideEmbedder)(
        model,
        processor,
        settings,
        mpp=processor.target_mpp or DEFAULT_MPP if settings.mpp is None else settings.mpp,
        slide_mpp=slide_mpp,
        tissue_mask=tissue_mask,
        batch_size=batch_size,
        workers=workers or default_workers(),
        show_progress=state.is_local_main_process,
        regions=None if regions is None else Path(regions),
        table_format=table_format,
    )
    return _run(state, embedder, slides, left_out, out)


def _run(
    state: PartialState,
    embedder: SlideEmbedder,
    slides: dict[str, SlideInput],
    left_out: Sequence[LeftOut],
    out: str | os.PathLike[str],
) -> EmbedReport:
    """Shares the slides out over the processes, and returns the report of all."""
    model, processor, settings = embedder.model, embedder.processor, embedder.settings
    with state.main_process_first():
        store = EmbeddingStore(out, {**model_identity(model, processor), **asdict(settings), "mpp": embedder.mpp})
        if state.is_main_process:
            store.forget_failures(item.path for item in slides.values())
            embedder.report.left_out = _record_left_out(left_out, store)
    if isinstance(embedder, SplitSlideEmbedder):
        embedder.run(slides, store)
        return _joint_report(state, embedder.report)
    with state.split_between_processes(list(slides)) as names:
        embedder.run({name: slides[name] for name in names}, store)
    return _joint_report(state, embedder.report)


def _load(
    model_source: str | os.PathLike[str], device: str | None, dtype: str | None, state: PartialState
) -> tuple["SparsePathViTModel", "SparsePathViTImageProcessor"]:
    """The model and its processor; one process of a machine shows how far loading is."""
    chosen = torch_device(device) if device is not None and state.num_processes == 1 else state.device
    is_silenced = not state.is_local_main_process and logging.is_progress_bar_enabled()
    if is_silenced:
        logging.disable_progress_bar()
    try:
        return load_model(model_source, chosen, weight_dtype(dtype, chosen))
    finally:
        if is_silenced:
            logging.enable_progress_bar()


def _joint_report(state: PartialState, report: EmbedReport) -> EmbedReport:
    """The report of all processes, once the last of them is done."""
    state.wait_for_everyone()
    return EmbedReport.of_processes(gather_object([report]))


def _record_left_out(left_out: Sequence[LeftOut], store: EmbeddingStore) -> list[tuple[str, str]]:
    """Logs and lists what is left out, and returns it as the report holds it."""
    report_left_out(left_out)
    entries = [(str(path), reason) for path, reason in left_out]
    store.record_left_out(entries)
    return entries


def _check_arguments(
    slides: dict[str, SlideInput],
    settings: EmbedSettings,
    slide_mpp: float | None,
    tissue_mask: str | os.PathLike[str] | None,
) -> None:
    """Raises ValueError for what no slide could be embedded with, before the model is loaded."""
    for name, given in (("mpp", settings.mpp), ("slide_mpp", slide_mpp)):
        if given is not None and not is_credible(given):
            raise ValueError(f"{name}={given} is not a resolution in micrometres per pixel (0.25 at 40x, 0.5 at 20x).")
    if settings.tile_size is not None and settings.overlap:
        raise ValueError(
            f"tile_size={settings.tile_size} with overlap={settings.overlap} would give the same tile several times: "
            "pass overlap=0."
        )
    if settings.whole_slide and any(item.boxes for item in slides.values()):
        raise ValueError("whole_slide embeds all tissue at once, but the manifest gives regions: use one of them.")
    if settings.attention is not None:
        checked_kind(settings.attention)
        if not settings.dense:
            raise ValueError("attention is stored beside the patch tokens: ask for them too (dense=True, --dense).")
    if tissue_mask not in (None, "all") and not Path(tissue_mask).exists():
        raise ValueError(
            f"tissue_mask={str(tissue_mask)!r} does not exist: give an image, GeoJSON, a folder, or 'all'."
        )
    if tissue_mask not in (None, "all") and len(slides) > 1 and not Path(tissue_mask).is_dir():
        raise ValueError(
            f"tissue_mask={str(tissue_mask)!r} is one file for {len(slides)} slides: give a folder of masks."
        )


def _check_regions(
    slides: dict[str, SlideInput],
    settings: EmbedSettings,
    regions: str | os.PathLike[str] | None,
    tissue_mask: str | os.PathLike[str] | None,
) -> None:
    """Raises ValueError for regions that no slide could have, and for classes of annotations where there are none."""
    if regions is None:
        has_mask = tissue_mask not in (None, "all") or any(item.tissue_mask for item in slides.values())
        if settings.annotation_classes and not has_mask:
            raise ValueError(
                f"annotation_classes={settings.annotation_classes!r} choose among the polygons of GeoJSON: give it as "
                "tissue_mask (--tissue-mask) or regions (--regions)."
            )
        return
    if not Path(regions).exists():
        raise ValueError(f"regions={str(regions)!r} does not exist: give coordinates, GeoJSON, or a folder of them.")
    if settings.whole_slide or any(item.boxes for item in slides.values()):
        other = "whole_slide embeds all tissue at once" if settings.whole_slide else "the manifest gives regions, too"
        raise ValueError(f"regions={str(regions)!r} says what to embed, but {other}: use one of them.")
    if len(slides) > 1 and not Path(regions).is_dir():
        raise ValueError(f"regions={str(regions)!r} is one file for {len(slides)} slides: give a folder of them.")


def _check_table_format(table_format: str | None) -> None:
    """Raises ValueError for an unknown format, ImportError where its library is missing."""
    if table_format is None:
        return
    if table_format not in TABLE_SUFFIXES:
        raise ValueError(f"table_format={table_format!r} is unknown: choose one of {', '.join(TABLE_SUFFIXES)}.")
    for module in ("anndata", *(("zarr",) if table_format == "zarr" else ())):
        require(module, "scverse")


def _check_split(settings: EmbedSettings, state: PartialState, split_slide: bool) -> None:
    """Raises ValueError for what several processes cannot do with one slide."""
    if not split_slide:
        return
    if state.num_processes == 1:
        raise ValueError(
            "split_slide shares each slide out over several processes, and this is the only one: start it with "
            "`torchrun --nproc_per_node 2 -m sparsepath embed ...`, or leave it out."
        )
    if not settings.whole_slide:
        raise ValueError("split_slide is for whole slides (--whole-slide): regions are shared out without it.")
    if settings.tile_size is not None or settings.attention is not None:
        raise ValueError(
            f"split_slide goes neither with tile_size={settings.tile_size} nor with attention={settings.attention!r}, "
            "which need the tokens of all processes: leave one of them out."
        )


def _process_state(device: str | None, split_slide: bool) -> PartialState:
    """This process among those of `accelerate launch` or `torchrun`.

    Accelerate joins processes without an accelerator only when it is told that they run on the CPU; otherwise each
    would take itself for the only one and embed every slide.
    """
    on_cpu = device == "cpu" or parse_flag_from_env("ACCELERATE_USE_CPU") or not torch.accelerator.is_available()
    return PartialState(cpu=on_cpu, timeout=_LONGEST_SILENCE if split_slide else _LONGEST_WAIT)


def _by_name(inputs: list[SlideInput]) -> dict[str, SlideInput]:
    """Each input under the name of its result.

    Raises:
        ValueError: two would be written to the same file.
    """
    slides: dict[str, SlideInput] = {}
    for item in inputs:
        name = item.name or Slide.name_of(item.path)
        if name in slides:
            raise ValueError(
                f"{slides[name].path} and {item.path} would both be written to {name}.h5: embed them into different "
                "folders."
            )
        slides[name] = item
    return slides
