# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""How far apart may two structures be for the model to relate them? A generated task on real tissue pixels.

A strip of tissue, one row of patch tokens as along a needle biopsy, holds two structures d tokens apart. Each is
stained like nuclei (blue) or like stroma (pink), at random. The label says whether both are of one kind, and is read by
a linear head from the tokens of the left structure alone: as for a tumour margin, what a place is depends on what lies
at a distance. Each kind alone says nothing about the label, so a model that does not bring the two together is at
chance.

Without global tokens means: no token sees them, in any layer, so that information goes between patch tokens only.
Everything else, weights at the start and data included, is the same.

What a model that was trained with dense attention keeps under another pattern is asked of the same weights.
"""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel
from sparsepath_vit.runtime.configured import configured
from sparsepath_vit.runtime.cost import mean_keys_per_query

WITHOUT_GLOBALS = "sdpa_without_global_tokens"
# Shares of red, green and blue that pass: haematoxylin and eosin, laid over the tissue's own pixels.
STAINS = ((0.35, 0.30, 0.70), (1.00, 0.35, 0.65))
_MEAN, _STD = 0.7, 0.2  # of stained tissue, about


@dataclass(frozen=True)
class LongRangeSettings:
    """The task, the model and its training.

    Attributes:
        columns: patch tokens of a strip. At first all tokens count alike to dense attention, so a structure of three is
            found among 48, but was not in strips of 96 in 2,000 steps.
        structure_columns: patch tokens of a structure.
        distances: tokens from the first token of one structure to the first of the other.
        windows: window sizes; None is dense.
        with_globals: whether global tokens take part.
        contexts: most context tokens of a window's pattern.
        patch_size: pixels per patch side, and the height of a strip.
        hidden_size: of the model.
        num_layers: of the model.
        num_register_tokens: of the model; there is one global token more.
        steps: of training; each strip is new.
        batch_size: strips per step.
        learning_rate: at its peak.
        test_strips: per distance.
        seed: of weights and data.
    """

    columns: int = 48
    structure_columns: int = 3
    distances: tuple[int, ...] = (4, 12, 24, 36, 44)
    windows: tuple[int | None, ...] = (None, 4)
    with_globals: tuple[bool, ...] = (True, False)
    contexts: tuple[int, ...] = (0, 12)
    patch_size: int = 4
    hidden_size: int = 32
    num_layers: int = 2
    num_register_tokens: int = 3
    steps: int = 1600
    batch_size: int = 32
    learning_rate: float = 5e-3
    test_strips: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        furthest = self.columns - self.structure_columns
        if not self.distances or not self.structure_columns <= min(self.distances) <= max(self.distances) <= furthest:
            raise ValueError(
                f"distances={self.distances} are not possible in a strip of {self.columns} tokens: they lie between "
                f"{self.structure_columns}, where the structures touch, and {furthest}."
            )


@dataclass(frozen=True)
class LongRangePattern:
    """What a model's patch tokens see.

    Attributes:
        window_size: None is dense.
        has_globals: whether global tokens take part.
        num_context_tokens: at most so many patch tokens beyond the neighbourhood.
    """

    window_size: int | None
    has_globals: bool
    num_context_tokens: int = 0

    def __str__(self) -> str:
        name = "dense" if self.window_size is None else f"w = {self.window_size}"
        context = f", {self.num_context_tokens} context tokens" if self.num_context_tokens else ""
        return f"{name}{context}{'' if self.has_globals else ', no globals'}"


def patterns_of(settings: LongRangeSettings) -> list[LongRangePattern]:
    """The models to train. Context tokens go with a window, since dense attention sees all tokens anyway."""
    return [
        LongRangePattern(window_size, has_globals, num_context_tokens)
        for window_size in settings.windows
        for has_globals in settings.with_globals
        for num_context_tokens in (settings.contexts if window_size is not None else (0,))
    ]


def tests_of(settings: LongRangeSettings, trained: LongRangePattern) -> list[LongRangePattern]:
    """The patterns that a trained model is tested with: its own, and after dense training all others, too."""
    if trained.window_size is not None:
        return [trained]
    return [pattern for pattern in patterns_of(settings) if pattern.has_globals == trained.has_globals]


@dataclass(frozen=True)
class LongRangeResult:
    """Of one model under one pattern.

    Attributes:
        window_size: None is dense.
        has_globals: whether global tokens took part.
        num_context_tokens: at most so many patch tokens were seen beyond the neighbourhood.
        distance: tokens between the structures.
        keys_per_query: on average, global tokens included whether or not they are seen.
        accuracy: on strips it did not see; chance is one half.
        strips: how many.
        reach: the largest distance that information can cross in the model's layers at best, wherever the block
            borders lie.
    """

    window_size: int | None
    has_globals: bool
    num_context_tokens: int
    distance: int
    keys_per_query: float
    accuracy: float
    strips: int
    reach: int


def patches_only_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, None]:
    """The pattern with all tokens blind to the global ones.

    What global tokens see is left to them, since nobody learns it: so the correction of context tokens, which is read
    at the place of CLS, is that of patch tokens alone.

    Args:
        module: the attention module.
        query, key, value: (batch, heads, tokens, head_dim).
        attention_mask: (batch, 1, tokens, tokens), added to the logits; `None` where every token sees all others.
        scaling: factor on the logits.
        dropout: share of probabilities set to zero.
        **kwargs: arguments of other implementations.

    Returns:
        (batch, tokens, heads, head_dim), and no probabilities.
    """
    of_key = query.new_zeros(key.shape[2])
    of_key[: module.config.num_global_tokens] = -torch.inf
    mask = of_key.expand(1, 1, query.shape[2], -1) if attention_mask is None else attention_mask + of_key
    attended = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, dropout_p=dropout, scale=scaling
    )
    return attended.transpose(1, 2).contiguous(), None


AttentionInterface.register(WITHOUT_GLOBALS, patches_only_attention)
AttentionMaskInterface.register(WITHOUT_GLOBALS, sdpa_mask)


class TissueStrips:
    """Draws strips of real tissue.

    Args:
        paths: images, each at least as wide as a strip.
        settings: of the task.

    Raises:
        ValueError: an image that is too small.
    """

    def __init__(self, paths: Sequence[Path], settings: LongRangeSettings) -> None:
        self.settings = settings
        self.images = []
        width = settings.columns * settings.patch_size
        for path in paths:
            with Image.open(path) as opened:
                pixels = np.asarray(opened.convert("RGB"))
            if pixels.shape[0] < settings.patch_size or pixels.shape[1] < width:
                raise ValueError(
                    f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels: a strip is {width} x "
                    f"{settings.patch_size}. Take larger images, or fewer columns."
                )
            self.images.append(torch.from_numpy(pixels.copy()).permute(2, 0, 1))
        if not self.images:
            raise ValueError("no tissue images were given: a strip is cut from real tissue.")

    def draw(
        self, distances: torch.Tensor, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """One strip for each distance.

        Args:
            distances: (strips,) int64.
            generator: of everything that is random.

        Returns:
            (strips, 3, patch_size, columns * patch_size) normalised pixels, (strips,) first column of the left
            structure, and (strips,) int64 labels: 1 where both structures are of one kind.
        """
        settings, count = self.settings, len(distances)
        width, height = settings.columns * settings.patch_size, settings.patch_size

        def below(limit: torch.Tensor | int) -> torch.Tensor:
            return (torch.rand(count, generator=generator) * limit).long()

        chosen = below(len(self.images)).tolist()
        tops = below(torch.tensor([self.images[index].shape[1] - height + 1 for index in chosen])).tolist()
        lefts = below(torch.tensor([self.images[index].shape[2] - width + 1 for index in chosen])).tolist()
        strips = torch.stack(
            [
                self.images[index][:, top : top + height, left : left + width]
                for index, top, left in zip(chosen, tops, lefts, strict=True)
            ]
        )
        strips = strips.float() / 255
        kinds = torch.randint(2, (count, 2), generator=generator)
        starts = below(settings.columns - settings.structure_columns - distances + 1)
        pixel_columns = torch.arange(width)
        for number, shift in enumerate((torch.zeros_like(distances), distances)):
            first = ((starts + shift) * settings.patch_size)[:, None]
            inside = (pixel_columns >= first) & (pixel_columns < first + settings.structure_columns * height)
            stain = torch.tensor(STAINS)[kinds[:, number]][:, :, None, None]
            strips = torch.where(inside[:, None, None, :], strips * stain, strips)
        return (strips - _MEAN) / _STD, starts, (kinds[:, 0] == kinds[:, 1]).long()


class LongRangeModel(torch.nn.Module):
    """A small SparsePathViT and a linear head on the tokens of the left structure."""

    def __init__(self, settings: LongRangeSettings, pattern: LongRangePattern) -> None:
        super().__init__()
        self.structure_columns = settings.structure_columns
        config = SparsePathViTConfig(
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=2,
            intermediate_size=2 * settings.hidden_size,
            num_register_tokens=settings.num_register_tokens,
            patch_size=settings.patch_size,
            image_size=16 * settings.patch_size,
            use_layerscale=False,
            initializer_range=0.1,
            window_size=pattern.window_size,
            num_context_tokens=pattern.num_context_tokens,
            prune_after_layer=1,
        )
        self.encoder = SparsePathViTModel(config)
        # The dense implementation of the same pattern: faster than tiles on strips as short as these.
        self.encoder.set_attn_implementation("sdpa" if pattern.has_globals else WITHOUT_GLOBALS)
        self.head = torch.nn.Linear(settings.hidden_size, 2)

    def forward(self, pixel_values: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
        """(strips, 2) logits."""
        tokens = self.encoder(pixel_values).last_hidden_state[:, self.encoder.config.num_global_tokens :]
        columns = starts[:, None] + torch.arange(self.structure_columns, device=starts.device)
        return self.head(tokens[torch.arange(len(tokens))[:, None], columns].mean(dim=1))


def reach(settings: LongRangeSettings, pattern: LongRangePattern) -> int:
    """The largest distance in the strip that information can cross, block by block in all layers together, at best.

    Args:
        settings: of the model.
        pattern: with global tokens a way leads through them, one layer up and one layer down.
    """
    furthest = settings.columns - settings.structure_columns
    sees_all = pattern.window_size is None or pattern.num_context_tokens > 0
    if sees_all or (pattern.has_globals and settings.num_layers >= 2):
        return furthest
    # From the last token of the left structure to the first of the right one, from one end of the blocks to the other.
    across_blocks = (settings.num_layers + 1) * pattern.window_size - 1
    return min(furthest, across_blocks + settings.structure_columns - 1)


def train(strips: TissueStrips, settings: LongRangeSettings, pattern: LongRangePattern) -> LongRangeModel:
    """One model, from the same random weights and on the same strips as every other, on all distances mixed."""
    torch.manual_seed(settings.seed)
    model = LongRangeModel(settings, pattern)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.learning_rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, settings.learning_rate, total_steps=settings.steps, pct_start=0.1
    )
    generator = torch.Generator().manual_seed(settings.seed)
    distances = torch.tensor(settings.distances)
    progress = tqdm(range(settings.steps), desc=str(pattern), unit="step")
    for step in progress:
        chosen = distances[torch.randint(len(distances), (settings.batch_size,), generator=generator)]
        pixel_values, starts, labels = strips.draw(chosen, generator)
        loss = torch.nn.functional.cross_entropy(model(pixel_values, starts), labels)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            progress.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval()


@torch.no_grad()
def tested(
    model: LongRangeModel, strips: TissueStrips, settings: LongRangeSettings, pattern: LongRangePattern, distance: int
) -> LongRangeResult:
    """Its accuracy by a pattern on strips of one distance, the same for every model of a seed."""
    generator = torch.Generator().manual_seed(settings.seed + 1 + distance)
    correct = 0
    by = {"window_size": pattern.window_size, "num_context_tokens": pattern.num_context_tokens}
    with configured(model.encoder, **by):
        for first in range(0, settings.test_strips, settings.batch_size):
            count = min(settings.batch_size, settings.test_strips - first)
            pixel_values, starts, labels = strips.draw(torch.full((count,), distance), generator)
            correct += int((model(pixel_values, starts).argmax(dim=1) == labels).sum())
        keys = mean_keys_per_query(model.encoder.token_grid(pixel_values))
    accuracy = correct / settings.test_strips
    return LongRangeResult(*astuple(pattern), distance, keys, accuracy, settings.test_strips, reach(settings, pattern))
