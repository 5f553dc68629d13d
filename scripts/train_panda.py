#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Classifies regions of interest: a linear probe on frozen features, or fine-tuning.

The data are what scripts/prepare_panda.py made (--dataset_dir), or a folder of class-named folders of images
(--image_folder), which is cross-validated. Writes OUTPUT_DIR/all_results.json (metrics with bootstrap 95 % intervals),
predictions.csv and a checkpoint that AutoModelForImageClassification loads.

All flags of Transformers' TrainingArguments are taken, too. A YAML recipe can stand first; flags after it overrule it.

Examples:
    python scripts/train_panda.py --dataset_dir outputs/radboud --model_name_or_path ./uni2-h --mode linear_probe \
        --output_dir outputs/probe --prune_ratio 0.6 --bf16
    python scripts/train_panda.py --dataset_dir outputs/radboud --model_name_or_path ./uni2-h --mode finetune \
        --output_dir outputs/lora --lora_rank 8 --gradient_checkpointing --bf16 --num_train_epochs 5
    python scripts/train_panda.py --image_folder images --model_name_or_path ./uni2-h --output_dir outputs/folder
    accelerate launch scripts/train_panda.py configuration/recipes/panda_finetune.yaml --output_dir outputs/finetune
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    HfArgumentParser,
    Trainer,
    TrainingArguments,
    set_seed,
)

import sparsepath_vit  # noqa: F401  registers the Auto classes
from sparsepath_vit.runtime.atomic_files import write_atomically
from sparsepath_vit.runtime.checkpoint_paths import checkpoint_config
from sparsepath_vit.runtime.extras import imports_of_extra, run_script
from sparsepath_vit.runtime.load_model import load_model

with imports_of_extra("train"):
    from sparsepath_vit.tasks.classification.features import FeatureSettings
    from sparsepath_vit.tasks.classification.finetune import RoiCollator, RoiImages, RoiTrainer, with_lora
    from sparsepath_vit.tasks.classification.linear_probe import ProbeSettings, merge_head, probe
    from sparsepath_vit.tasks.classification.metrics import METRICS
    from sparsepath_vit.tasks.classification.roi_files import load_labelled_rois, write_rows
    from sparsepath_vit.tasks.classification.rois import RoiDataset, count_problems
    from sparsepath_vit.tasks.recipes import parse_recipe_and_flags

logger = logging.getLogger("train_panda")

RESULTS_FILE = "all_results.json"
# Below this many independent images an interval is wide, and says how well the script runs rather than the model.
_SMOKE_TEST_GROUPS = 100
_MACHINE_DEPENDENT = ("_runtime", "_per_second", "total_flos")


@dataclasses.dataclass
class DataArguments:
    """What is classified, and how it is shown to the model."""

    dataset_dir: str | None = dataclasses.field(default=None, metadata={"help": "made by scripts/prepare_panda.py"})
    image_folder: str | None = dataclasses.field(
        default=None, metadata={"help": "holds one folder of images per class; in place of --dataset_dir"}
    )
    data_root: str | None = dataclasses.field(
        default=None, metadata={"help": "where the slides of --dataset_dir lie now, if they were moved"}
    )
    folds: int = dataclasses.field(default=5, metadata={"help": "of --image_folder; fine-tuning evaluates the first"})
    group_pattern: str | None = dataclasses.field(
        default=None,
        metadata={"help": "regular expression: what file names of one patient or block share; kept in one fold"},
    )
    image_size: int | None = dataclasses.field(
        default=None, metadata={"help": "pixels of an ROI's longer side; as prepared by default"}
    )
    view: str = dataclasses.field(
        default="field_of_view",
        metadata={
            "help": "a smaller image_size shows the whole ROI at lower resolution, or its middle at its own",
            "choices": ["field_of_view", "pixels"],
        },
    )
    tile_size: int | None = dataclasses.field(
        default=None, metadata={"help": "linear probe: cut into tiles of this many pixels, features averaged"}
    )
    mask_background: bool = dataclasses.field(default=False, metadata={"help": "leave out white patches"})
    eval_split: str = dataclasses.field(
        default="test", metadata={"help": "the split that is reported", "choices": ["test", "validation"]}
    )
    shuffle_labels: bool = dataclasses.field(
        default=False, metadata={"help": "control: labels dealt out at random; the result must be at chance"}
    )
    bootstrap_samples: int = dataclasses.field(default=1000, metadata={"help": "for the 95 %% intervals"})


@dataclasses.dataclass
class ModelArguments:
    """Which model, and what of its sparsity differs from its config."""

    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "folder or Hub id of a converted checkpoint"}
    )
    mode: str = dataclasses.field(
        default="linear_probe", metadata={"help": "what is trained", "choices": ["linear_probe", "finetune"]}
    )
    window_size: int | None = dataclasses.field(default=None, metadata={"help": "tokens per block side; 0 is dense"})
    prune_ratio: float | None = dataclasses.field(default=None, metadata={"help": "share of patch tokens removed"})
    prune_after_layer: int | None = dataclasses.field(default=None, metadata={"help": "counted from 1"})
    lora_rank: int = dataclasses.field(default=0, metadata={"help": "finetune: rank of LoRA adapters; 0 trains all"})
    lora_alpha: float | None = dataclasses.field(default=None, metadata={"help": "twice the rank by default"})
    lora_dropout: float = 0.0
    augment: bool = dataclasses.field(default=True, metadata={"help": "finetune: random flips and quarter turns"})
    solver: str = dataclasses.field(
        default="lbfgs", metadata={"help": "of the linear probe", "choices": ["lbfgs", "sgd"]}
    )
    l2: float | None = dataclasses.field(
        default=None, metadata={"help": "penalty of the linear probe; chosen on the validation split by default"}
    )
    sgd_epochs: int = 100
    sgd_learning_rate: float = 0.1
    cache_dir: str | None = dataclasses.field(
        default=None,
        metadata={"help": "of the features; by default `features` in --dataset_dir, or in --output_dir for images"},
    )

    def overrides(self) -> dict[str, Any]:
        """The config's fields that were given."""
        given = {"prune_ratio": self.prune_ratio, "prune_after_layer": self.prune_after_layer}
        given = {name: value for name, value in given.items() if value is not None}
        return given | ({} if self.window_size is None else {"window_size": self.window_size or None})


def parse(argv: list[str]) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """Flags, or a YAML recipe and flags that overrule it.

    Raises:
        ValueError: a recipe that cannot be read, or with an unknown key; data or model are missing.
    """
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, TrainingArguments),
        usage="%(prog)s [RECIPE] (--dataset_dir | --image_folder) DIR --model_name_or_path DIR --output_dir RUN ...",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {"remove_unused_columns": False, "report_to": "none", "label_names": ["labels"], "seed": 0}
    defaults["use_cpu"] = not torch.accelerator.is_available()  # else bf16 on a CPU is refused
    data, model, training = parse_recipe_and_flags(parser, argv, defaults)
    if (data.dataset_dir is None) == (data.image_folder is None):
        raise ValueError("pass either --dataset_dir or --image_folder.")
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the folder or Hub id of a converted checkpoint.")
    if model.lora_rank < 0 or (model.lora_rank and model.mode != "finetune"):
        raise ValueError(f"--lora_rank {model.lora_rank} needs --mode finetune, and is 0 or more.")
    if data.tile_size is not None and model.mode == "finetune":
        raise ValueError("--tile_size averages frozen features: use it with --mode linear_probe.")
    return data, model, training


@dataclasses.dataclass
class Outcome:
    """What a run made: the trainer that holds the final model, metrics, and what was predicted for which item."""

    trainer: Trainer
    metrics: dict[str, Any]
    items: Sequence[str]
    labels: np.ndarray
    predictions: np.ndarray


def run_linear_probe(
    dataset: RoiDataset, data: DataArguments, arguments: ModelArguments, training: TrainingArguments
) -> Outcome:
    """Embeds, fits and evaluates."""
    dtype = torch.bfloat16 if training.bf16 else torch.float16 if training.fp16 else torch.float32
    model, processor = load_model(arguments.model_name_or_path, training.device, dtype, **arguments.overrides())
    features = FeatureSettings(
        size=data.image_size,
        view=data.view,
        tile_size=data.tile_size,
        mask_background=data.mask_background,
        batch_size=training.per_device_eval_batch_size,
        workers=max(1, training.dataloader_num_workers),
    )
    settings = ProbeSettings(
        features=features,
        solver=arguments.solver,
        l2=arguments.l2,
        sgd_epochs=arguments.sgd_epochs,
        sgd_learning_rate=arguments.sgd_learning_rate,
        eval_split=data.eval_split,
        bootstrap_samples=data.bootstrap_samples,
        seed=training.seed,
    )
    # Beside the data that they belong to. A name with an underscore is not uploaded with the checkpoint.
    cache_dir = arguments.cache_dir or str(
        Path(data.dataset_dir) / "features" if data.dataset_dir else Path(training.output_dir) / "_features"
    )
    result = probe(dataset, model, processor, settings, cache_dir)
    trainer = Trainer(merge_head(model, result.head, dataset.label_names), training, processing_class=processor)
    metrics = {f"eval_{name}": value for name, value in result.metrics.items()}
    return Outcome(trainer, metrics, result.items, result.labels, result.predictions)


def run_finetuning(
    dataset: RoiDataset, data: DataArguments, arguments: ModelArguments, training: TrainingArguments
) -> Outcome:
    """Trains and evaluates."""
    model = AutoModelForImageClassification.from_pretrained(
        arguments.model_name_or_path,
        dtype=torch.float32,  # the weights that are trained; --bf16 computes with copies of them
        id2label=dict(enumerate(dataset.label_names)),
        label2id={name: index for index, name in enumerate(dataset.label_names)},
        ignore_mismatched_sizes=True,
        **arguments.overrides(),
    )
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)
    if arguments.lora_rank:
        model = with_lora(model, arguments.lora_rank, arguments.lora_alpha, arguments.lora_dropout)
    partition = dataset.partitions(data.eval_split)[0]
    if dataset.folds:
        logger.info("fine-tuning evaluates the first of %d folds; the linear probe all", len(dataset.folds))

    def images(indices: Any, **kwargs: Any) -> RoiImages:
        return RoiImages(dataset, indices, data.image_size, data.view, seed=training.seed, **kwargs)

    evaluated = images(partition.evaluation, bootstrap_samples=data.bootstrap_samples)
    trainer = RoiTrainer(
        model,
        training,
        data_collator=RoiCollator(processor, data.mask_background),
        train_dataset=images(partition.train, augment=arguments.augment),
        eval_dataset=images(partition.validation) if len(partition.validation) else evaluated,
        processing_class=processor,
    )
    resumed = training.resume_from_checkpoint
    trained = trainer.train(resume_from_checkpoint=resumed if resumed not in ("last", "true", "True") else True)
    trainer.save_metrics("train", trained.metrics, combined=False)
    trainer.save_state()
    prediction = trainer.predict(evaluated, metric_key_prefix="eval")
    if arguments.lora_rank:
        trainer.model = trainer.accelerator.unwrap_model(trainer.model).merge_and_unload()
    metrics = {name: value for name, value in prediction.metrics.items() if not name.endswith(_MACHINE_DEPENDENT)}
    items = evaluated.items(prediction.predictions)
    return Outcome(trainer, metrics, items.ids, items.labels, items.features.argmax(axis=1))


def save(outcome: Outcome, dataset: RoiDataset) -> None:
    """Writes predictions and checkpoint, and uploads the folder where that was asked for."""
    trainer, names = outcome.trainer, dataset.label_names
    output_dir = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        table = zip(outcome.items, outcome.labels, outcome.predictions, strict=True)
        rows = [[item, names[label], names[predicted]] for item, label, predicted in table]
        write_rows(output_dir / "predictions.csv", ["item", "label", "prediction"], rows)
    trainer.save_model()


def write_results(results: dict[str, Any], training: TrainingArguments) -> None:
    """Writes all_results.json and says the numbers."""
    if results["eval_num_groups"] < _SMOKE_TEST_GROUPS:
        results["note"] = (
            f"smoke test: {results['eval_num_groups']} independent slides or images show that the steps work, not how "
            "good the model is"
        )
    if training.should_save:
        Path(training.output_dir).mkdir(parents=True, exist_ok=True)
        path = Path(training.output_dir) / RESULTS_FILE
        write_atomically(path, json.dumps(results, indent=2) + "\n")
        logger.info("wrote %s", path)
    for name in METRICS:
        value, low, high = (results.get(f"eval_{name}{ending}") for ending in ("", "_low", "_high"))
        interval = "no interval" if low is None else f"95 % interval {low:.3f} to {high:.3f}"
        logger.info("%-18s %s (%s)", name, "undefined" if value is None else f"{value:.3f}", interval)
    if results["problems"]:
        logger.info("problems: %s", ", ".join(f"{count} {kind}" for kind, count in results["problems"].items()))
    if "note" in results:
        logger.info(results["note"])


def main() -> None:
    run_script(run, sys.argv[1:])


def run(argv: list[str]) -> None:
    """Reads the flags, trains, evaluates and writes."""
    data, arguments, training = parse(argv)
    if training.process_index:
        logging.getLogger().setLevel(logging.ERROR)  # the first process says it for all
    set_seed(training.seed)
    checkpoint_config(arguments.model_name_or_path, "model_name_or_path")  # said before the data are read
    dataset, problems = load_labelled_rois(
        data.dataset_dir,
        data.image_folder,
        data_root=data.data_root,
        num_folds=data.folds,
        group_pattern=data.group_pattern,
        shuffle_labels=data.shuffle_labels,
        seed=training.seed,
    )
    train = run_linear_probe if arguments.mode == "linear_probe" else run_finetuning
    outcome = train(dataset, data, arguments, training)
    described = {
        "task": dataset.task,
        "mode": arguments.mode,
        "seed": training.seed,
        "problems": count_problems(problems),
    }
    described["split"] = f"{len(dataset.folds)} folds" if dataset.folds else data.eval_split
    if dataset.folds and arguments.mode == "finetune":
        described["split"] = f"first of {described['split']}"
    write_results(outcome.metrics | described, training)
    save(outcome, dataset)


if __name__ == "__main__":
    main()
