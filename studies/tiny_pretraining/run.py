# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The training run itself: recipe, loop, log, checkpoints that a run continues from, and the folder that ships."""

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import set_seed
from tqdm import tqdm
from transformers import get_cosine_schedule_with_warmup
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

from sparsepath_vit.model.configuration_sparsepath_vit import SparsePathViTConfig
from sparsepath_vit.model.image_processing_sparsepath_vit import SparsePathViTImageProcessor
from sparsepath_vit.runtime.atomic_files import atomic_folder, restore_folder, write_atomically

from .crops import CropSampler, find_images, read_held_out
from .objective import PretrainingLosses, SparsePathViTPretraining, visible_tokens

LOG_FILE = "log.jsonl"
CHECKPOINT_FOLDER = "checkpoint"
PROGRESS_FILE = "progress.json"


@dataclasses.dataclass(frozen=True)
class ViewSize:
    """One kind of batch.

    Attributes:
        side: patch tokens along a view's side.
        visible: patch tokens the encoder sees of each view.
        pairs: places shown, two views each.
    """

    side: int
    visible: int
    pairs: int


@dataclasses.dataclass(frozen=True)
class PretrainingRecipe:
    """What a run is, as written in `configuration/recipes/`.

    Attributes:
        seed: of weights, crops, and visible tokens.
        steps: optimiser steps.
        learning_rate: peak, after `warmup_steps`; cosine to zero at `steps`.
        warmup_steps: linear warm-up.
        weight_decay: of AdamW.
        max_grad_norm: gradients are clipped to this norm.
        save_every: steps between checkpoints.
        mixed_precision: "no" or "bf16".
        scales: smallest and largest source pixels per view pixel.
        glass_share: share of the views into which bare glass is painted.
        prune_ratios: the encoder prunes this share of its tokens, drawn anew for each batch.
        view_sizes: the kinds of batches, drawn anew for each step.
        images: globs relative to the data folder.
        held_out: list of images never trained on, beside the recipe.
        model: fields of `SparsePathViTConfig`.
    """

    seed: int
    steps: int
    learning_rate: float
    warmup_steps: int
    weight_decay: float
    max_grad_norm: float
    save_every: int
    mixed_precision: str
    scales: tuple[float, float]
    glass_share: float
    prune_ratios: tuple[float, ...]
    view_sizes: tuple[ViewSize, ...]
    images: tuple[str, ...]
    held_out: Path | None
    model: dict[str, Any]

    @classmethod
    def from_file(cls, path: Path, **overrides: Any) -> "PretrainingRecipe":
        """Reads a YAML recipe.

        Args:
            path: the file; `held_out` in it is relative to its folder.
            **overrides: fields that replace those of the file.

        Raises:
            ValueError: fields that are missing or unknown.
        """
        values = {**yaml.safe_load(path.read_text(encoding="utf-8")), **overrides}
        wanted = {field.name for field in dataclasses.fields(cls)}
        if set(values) != wanted:
            raise ValueError(
                f"{path}: missing fields {sorted(wanted - set(values))}, unknown fields {sorted(set(values) - wanted)}."
            )
        values["view_sizes"] = tuple(ViewSize(**size) for size in values["view_sizes"])
        values["held_out"] = path.parent / values["held_out"] if values["held_out"] else None
        for name in ("scales", "prune_ratios", "images"):
            values[name] = tuple(values[name])
        return cls(**values)


class PretrainingRun:
    """One training run in one folder, which it continues from where it stopped.

    Args:
        recipe: what to do. A run may go on with another number of `steps`; the learning rate then follows that one.
        data_dir: folder of the images.
        output_dir: takes the log, the checkpoint and the trained model.

    Raises:
        ValueError: images that are missing, or a folder that holds a run of another recipe.
    """

    def __init__(self, recipe: PretrainingRecipe, data_dir: Path, output_dir: Path) -> None:
        self.recipe = recipe
        self.output_dir = output_dir
        self.accelerator = Accelerator(mixed_precision=recipe.mixed_precision)
        held_out = read_held_out(recipe.held_out) if recipe.held_out else []
        self.files = find_images(data_dir, recipe.images, held_out)
        self.sampler = CropSampler(self.files, seed=recipe.seed, scales=recipe.scales, glass_share=recipe.glass_share)
        set_seed(recipe.seed)
        config = SparsePathViTConfig(**{**recipe.model, "window_size": None}, attn_implementation="sdpa")
        module = SparsePathViTPretraining(config, IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
        optimizer = torch.optim.AdamW(
            _parameter_groups(module, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.95)
        )
        schedule = get_cosine_schedule_with_warmup(optimizer, recipe.warmup_steps, recipe.steps)
        self.module, self.optimizer, self.schedule = self.accelerator.prepare(module, optimizer, schedule)
        self.step = self._resume()

    @property
    def encoder(self) -> torch.nn.Module:
        """The model that is trained, without the heads."""
        return self.accelerator.unwrap_model(self.module).encoder

    def train(self, stop_after: int | None = None) -> list[dict[str, float]]:
        """Trains until the recipe's last step, or for `stop_after` steps.

        Returns:
            `list[dict[str, float]]`: the losses of each step, as they were appended to the log.
        """
        last = self.recipe.steps if stop_after is None else min(self.recipe.steps, self.step + stop_after)
        entries = []
        self.output_dir.mkdir(parents=True, exist_ok=True)
        with (
            (self.output_dir / LOG_FILE).open("a", encoding="utf-8") as log,
            tqdm(total=self.recipe.steps, initial=self.step, desc="training", unit="step") as progress,
        ):
            while self.step < last:
                losses = self._train_step()
                self.step += 1
                entry = {"step": self.step, "loss": losses.total().item()}
                entry |= {name: value.item() for name, value in losses._asdict().items()}
                if not math.isfinite(entry["loss"]):
                    raise ValueError(f"the loss is {entry['loss']} at step {self.step}: lower learning_rate.")
                entries.append(entry)
                log.write(json.dumps(entry) + "\n")
                log.flush()
                progress.update()
                progress.set_postfix(loss=f"{entry['loss']:.3f}")
                if self.step % self.recipe.save_every == 0 or self.step == last:
                    self._save()
        return entries

    def _train_step(self) -> PretrainingLosses:
        # Everything random of a step follows from the seed and its number, so resuming needs no generator's state.
        generator = np.random.default_rng([self.recipe.seed, self.step, 1])
        size = self.recipe.view_sizes[generator.integers(len(self.recipe.view_sizes))]
        config = self.encoder.config
        config.prune_ratio = float(generator.choice(self.recipe.prune_ratios))
        views = self.sampler.views(self.step, size.pairs, size.side * config.patch_size)
        tokens = torch.Generator().manual_seed(int(generator.integers(2**62)))
        is_visible = visible_tokens(2 * size.pairs, size.side, size.visible, tokens)
        self.module.train()
        device = self.accelerator.device
        losses = self.module(views.to(device), is_visible.to(device))
        self.accelerator.backward(losses.total())
        self.accelerator.clip_grad_norm_(self.module.parameters(), self.recipe.max_grad_norm)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return losses

    def _save(self) -> None:
        """Writes the checkpoint under another name and swaps it in: a killed run always finds a complete one."""
        with atomic_folder(self.output_dir / CHECKPOINT_FOLDER) as temporary:
            self.accelerator.save_state(str(temporary))
            progress = {"step": self.step, "recipe": json.loads(_as_json(self.recipe))}
            (temporary / PROGRESS_FILE).write_text(json.dumps(progress, indent=2), encoding="utf-8")

    def _resume(self) -> int:
        """Loads the newest complete checkpoint, cuts the log there, and returns the steps done."""
        folder = self.output_dir / CHECKPOINT_FOLDER
        restore_folder(folder)
        step = 0
        if (folder / PROGRESS_FILE).is_file():
            progress = json.loads((folder / PROGRESS_FILE).read_text(encoding="utf-8"))
            if _comparable(progress["recipe"]) != _comparable(json.loads(_as_json(self.recipe))):
                raise ValueError(
                    f"output_dir={str(self.output_dir)!r} holds a run of another recipe: pass another folder, or "
                    "remove it."
                )
            self.accelerator.load_state(str(folder))
            step = progress["step"]
        log = self.output_dir / LOG_FILE
        if log.is_file():
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)[:step]
            write_atomically(log, "".join(lines))
        return step

    def export(self, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
        """Writes the model as it ships: weights, configuration and image processor.

        Args:
            folder: made where missing; files of the same name are replaced.
            dtype: of the weights.

        Returns:
            `Path`: the folder.
        """
        return export_encoder(self.encoder, self.recipe, folder, dtype)


def export_encoder(
    encoder: torch.nn.Module, recipe: PretrainingRecipe, folder: Path, dtype: torch.dtype = torch.bfloat16
) -> Path:
    """Writes a trained encoder with the attention and pruning settings of the recipe's `model`."""
    config = SparsePathViTConfig(**recipe.model)
    model = type(encoder)(config)
    model.load_state_dict(encoder.state_dict())
    model.to(dtype).save_pretrained(folder)
    for weights in folder.glob("*.safetensors"):
        weights.chmod(0o644)  # written for the owner alone, but installed for everybody
    SparsePathViTImageProcessor(
        patch_size=config.patch_size, image_mean=list(IMAGENET_DEFAULT_MEAN), image_std=list(IMAGENET_DEFAULT_STD)
    ).save_pretrained(folder)
    return folder


def _parameter_groups(module: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; not on biases, norms, LayerScale and tokens."""
    parameters = list(module.parameters())
    is_matrix = [parameter.ndim >= 2 and parameter.shape[0] > 1 for parameter in parameters]
    return [
        {
            "params": [p for p, matrix in zip(parameters, is_matrix, strict=True) if matrix],
            "weight_decay": weight_decay,
        },
        {"params": [p for p, matrix in zip(parameters, is_matrix, strict=True) if not matrix], "weight_decay": 0.0},
    ]


def _comparable(recipe: dict[str, Any]) -> dict[str, Any]:
    """What a run may not change when it goes on: all but its length, which the learning rate then follows."""
    fixed = {name: value for name, value in recipe.items() if name not in ("steps", "save_every")}
    return fixed | {"held_out": recipe["held_out"] and Path(recipe["held_out"]).name}


def _as_json(recipe: PretrainingRecipe) -> str:
    return json.dumps(dataclasses.asdict(recipe), default=str, sort_keys=True)
