# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""One image over several processes: `model.split_over_processes`, what it refuses, the way in and out of the layers.

Each process embeds the pixels of its own block rows and runs the layers on them (`TokenShare`). All end with the same
global tokens and prune scores, and each with its own patch tokens.
"""

import functools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

import torch

from .embeddings import ROWS_PER_STRIP, OnTokens
from .processes import Processes
from .streamed_layers import close_gap, obstacle_to_strips
from .token_grid import TokenGrid
from .token_pruning import EncodedTokens
from .token_shares import TokenShare, deal_rows, in_proportion, share_of
from .token_strips import known_block_row_ends

if TYPE_CHECKING:
    from .encoder_sparsepath_vit import AfterLayer, EncoderOutput, SparsePathViTEncoder
    from .pretrained_model import SparsePathViTPreTrainedModel

_PIXEL_ROWS_AT_ONCE = 512  # read for the checksum

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class ProcessSplitMixin:
    """Lets several processes share the forward of one image."""

    process_split: "ProcessSplit | None" = None  # of the base model

    @contextmanager
    def split_over_processes(self, group: Any = None) -> Iterator["ProcessSplit"]:
        """In this context the processes of a group share each forward of this model.

        All of them enter it and make the same calls: the same weights, one and the same image, under `torch.no_grad()`.
        Of the outputs, the global tokens, `pooler_output`, logits, `grid_sizes` and `prune_scores` are those of the
        whole image, the same in every process. The patch tokens in `last_hidden_state`, `patch_positions` and
        `patch_weights` are those of the process's own rows; one process after the other they are all, in raster order.

        Args:
            group: of `torch.distributed` (NCCL or gloo); by default all processes that `torchrun` or
                `accelerate launch` started.

        Yields:
            Which rows are whose, see `ProcessSplit`.

        Raises:
            RuntimeError: there is no process group.
            LostProcessError: another process has ended, or does not answer within the group's timeout.
            ValueError: the processes have different weights or configurations; the context is entered already.

        Example:
        ```python
        >>> torch.distributed.init_process_group()
        >>> with torch.no_grad(), model.split_over_processes():
        ...     outputs = model(pixel_values)
        ```
        """
        model = self.base_model
        if model.process_split is not None:
            raise ValueError("The model is split over processes already: leave that context first.")
        split = ProcessSplit(Processes(group), model)
        model.process_split = split
        try:
            yield split
        finally:
            model.process_split = None


def do_together(model: "SparsePathViTPreTrainedModel", work: Callable[[], Result]) -> Result:
    """Does something that may fail: where several processes share the model, it fails in all or in none of them."""
    split = model.base_model.process_split
    return work() if split is None else split.processes.together(work)


def together(
    method: Callable[Concatenate["SparsePathViTPreTrainedModel", Arguments], Result],
) -> Callable[Concatenate["SparsePathViTPreTrainedModel", Arguments], Result]:
    """A method of a model for `do_together`."""

    @functools.wraps(method)
    def in_all(
        self: "SparsePathViTPreTrainedModel", *arguments: Arguments.args, **settings: Arguments.kwargs
    ) -> Result:
        return do_together(self, lambda: method(self, *arguments, **settings))

    return in_all


class ProcessSplit:
    """How the processes share an image.

    Args:
        processes: that share it.
        model: the base model.

    Attributes:
        processes: `rank` and `number` say which of how many this one is; `together` does something that may fail, and
            fails in all of them where it fails in one.
    """

    def __init__(self, processes: Processes, model: "SparsePathViTPreTrainedModel") -> None:
        self.processes, self._model = processes, model
        self._check_same("weights or configurations", lambda: _model_statement(model, processes))

    @property
    def is_first(self) -> bool:
        """Whether this is the process that writes and shows what there is to see."""
        return self.processes.rank == 0

    def token_rows(self, grid: TokenGrid) -> tuple[int, int]:
        """(start, end) of the token rows of one image whose pixels this process passes where it passes strips.

        Args:
            grid: what `token_grid_of_image` returned.

        Raises:
            ValueError: in every process, where the image cannot be split over them.
        """
        (rows,) = self.processes.together(lambda: self._share(grid)).token_rows
        return rows

    def encode(
        self,
        encoder: "SparsePathViTEncoder",
        pixel_values: torch.Tensor | Iterable[torch.Tensor],
        grid: TokenGrid,
        output_hidden_states: bool,
        output_attentions: bool,
        after_layer: "AfterLayer | None",
        may_prune: bool,
        on_tokens: OnTokens | None,
    ) -> "EncoderOutput":
        """`encode` of the model, of which this process returns its share.

        Args:
            encoder: the layers.
            pixel_values: of the whole image, (1, channels, height, width), or the strips of `token_rows`.
            grid: of the whole image.
            output_hidden_states, output_attentions, after_layer: not available here.
            may_prune: as there.
            on_tokens: as there; the numbers are those of the whole image.

        Raises:
            ValueError: in every process, where one cannot do its part, or they see different images.
        """
        asks = {"output_hidden_states": output_hidden_states, "output_attentions": output_attentions}
        asks |= {"after_layer": after_layer, "config.unprune": self._model.config.unprune}
        self.processes.together(lambda: self._check_possible(grid, asks))
        self._check_same("images", lambda: _image_statement(pixel_values, grid))
        share = self.processes.together(lambda: self._share(grid))
        if isinstance(pixel_values, torch.Tensor):
            pixel_values = _strips_of_rows(pixel_values, share, self._model.config.patch_size)

        def embed() -> EncodedTokens:
            of_image = in_proportion(on_tokens, share.counts[0], grid.counts[0])
            return EncodedTokens(self._model.embeddings.embed_strips(pixel_values, share, of_image), share)

        embedded = [self.processes.together(embed)]
        with self.processes.in_step():
            # Taken from the list, so that nobody else holds the tokens.
            encoded = encoder(embedded.pop, may_prune=may_prune, on_tokens=on_tokens)
        return encoded._replace(last=_without_surroundings(encoded.last))

    def _check_same(self, what: str, statement: Callable[[], dict[str, Any]]) -> None:
        """Raises ValueError in every process where they do not all make the same statement."""
        first, *others = self.processes.tell(self.processes.together(statement))
        for rank, other in enumerate(others, start=1):
            if differing := [name for name in first if first[name] != other.get(name)]:
                parts = "; ".join(f"{name} is {first[name]}, there {other.get(name)}" for name in differing)
                raise ValueError(
                    f"Process {rank} has other {what} than process 0 ({parts}). All pass the same ones: each then "
                    "works on its own rows of one image."
                )

    def _check_possible(self, grid: TokenGrid, asks: dict[str, Any]) -> None:
        """Raises ValueError for what several processes cannot share."""
        if grid.batch_size != 1:
            raise ValueError(f"The batch has {grid.batch_size} images: several processes share one, pass them singly.")
        for name, value in asks.items():
            if value:
                raise ValueError(f"{name} is set, which needs the tokens of all processes: it cannot be had here.")
        if grid.has_context:
            drawn = f"num_context_tokens={grid.num_context_tokens} are drawn from all over it"
            raise ValueError(f"The image cannot be split over processes: {drawn}.")
        for layer in self._model.encoder.layers:
            dtype = self._model.embeddings.cls_token.dtype
            if obstacle := obstacle_to_strips(layer, dtype, grid):
                raise ValueError(f"The image cannot be split over processes: {obstacle}.")

    def _share(self, grid: TokenGrid) -> TokenShare:
        row_ends = known_block_row_ends(grid, 0)
        if len(row_ends) - 1 < self.processes.number:
            raise ValueError(
                f"The image has {len(row_ends) - 1} rows of blocks for {self.processes.number} processes: each needs "
                f"at least one. Start at most {len(row_ends) - 1}, or take a larger region."
            )
        return share_of(grid, self.processes, row_ends, deal_rows(row_ends, self.processes.number))


def _strips_of_rows(pixel_values: torch.Tensor, share: TokenShare, patch_size: int) -> Iterable[torch.Tensor]:
    """The own rows of (1, channels, height, width) pixels, in strips."""
    (start, end), columns = share.token_rows[0], share.grid_sizes[0][1]
    own = pixel_values[:, :, start * patch_size : end * patch_size, : columns * patch_size]
    return own.split(ROWS_PER_STRIP * patch_size, dim=2)


def _without_surroundings(tokens: EncodedTokens) -> EncodedTokens:
    """The global tokens and the own patch tokens, moved together within the memory that they have."""
    share, packed = tokens.grid, tokens.hidden_states[0]
    num_globals, (start, end) = share.num_global_tokens, share.own
    close_gap(packed[:end], num_globals, start - num_globals)
    own = share_of(share.whole, share.processes, share.row_ends, share.first_rows, has_surroundings=False)
    return tokens._replace(hidden_states=packed[None, : own.num_tokens], grid=own)


def _model_statement(model: "SparsePathViTPreTrainedModel", processes: Processes) -> dict[str, Any]:
    """What has to be the same in all processes: the configuration, and a checksum of the weights."""
    processes.check_device(model.device)
    fields = json.loads(json.dumps(model.config.to_dict(), default=str))
    for name in ("_name_or_path", "transformers_version"):  # say where it comes from, not what it does
        fields.pop(name, None)
    # Quantised weights have no bytes of their own to read: their names and shapes have to do.
    plain = [weights for weights in model.parameters() if type(weights) in (torch.Tensor, torch.nn.Parameter)]
    shapes = [(name, tuple(weights.shape), str(weights.dtype)) for name, weights in model.named_parameters()]
    return {**fields, "shapes": zlib.crc32(repr(shapes).encode()), "weights": _checksum(plain)}


def _image_statement(pixel_values: torch.Tensor | Iterable[torch.Tensor], grid: TokenGrid) -> dict[str, Any]:
    """Likewise of an image; of strips, which are different ones in each process, the pixels are not compared."""
    statement = {"grid_sizes": grid.grid_sizes, "patch_mask": _checksum([grid.rows, grid.columns])}
    if isinstance(pixel_values, torch.Tensor):
        pieces = pixel_values.split(_PIXEL_ROWS_AT_ONCE, dim=2)
        statement["pixel_values"] = (tuple(pixel_values.shape), str(pixel_values.dtype), _checksum(pieces))
    return statement


def _checksum(tensors: Iterable[torch.Tensor]) -> int:
    """CRC-32 of the bytes of some tensors."""
    checksum = 0
    for tensor in tensors:
        checksum = zlib.crc32(tensor.detach().contiguous().cpu().reshape(-1).view(torch.uint8).numpy(), checksum)
    return checksum
