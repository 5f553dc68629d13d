#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Trains a segmentation model on SegPath, or on a folder of images and masks.

The data are SegPath's own files (--segpath_dir, --antigens), or pairs X_HE.png and X_mask.png (--pairs_dir). Each
antigen is a question of its own: in an image stained for one, the other labels are ignored, not taken for negatives.
Writes OUTPUT_DIR/all_results.json (pooled Dice, mean Dice and mean IoU, per antigen and over all, with bootstrap 95 %
intervals), examples.png (some held-back images, their masks and what the model finds) and a checkpoint that
AutoModelForUniversalSegmentation and `sparsepath segment` load.

All flags of Transformers' TrainingArguments are taken, too. A YAML recipe can stand first; flags after it overrule it.

Examples:
    python scripts/train_segpath.py --segpath_dir SegPath --antigens panCK_Epithelium --model_name_or_path ./uni2-h \
        --head queries --output_dir outputs/epithelium --bf16 --learning_rate 1e-4 --num_train_epochs 3
    python scripts/train_segpath.py --pairs_dir pairs --label_name nucleus --eval_images "102[6-9]*" 1030 \
        --model_name_or_path ./uni2-h --head mask2former --output_dir outputs/nuclei --baselines
    accelerate launch scripts/train_segpath.py configuration/recipes/segpath_mask2former.yaml
"""

import argparse
import dataclasses
import json
import logging
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoImageProcessor, HfArgumentParser, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from sparsepath_vit import SparsePathViTForUniversalSegmentation
from sparsepath_vit.model.configuration_segmentation_sparsepath_vit import (
    HEADS,
    SparsePathViTUniversalSegmentationConfig,
)
from sparsepath_vit.runtime.atomic_files import write_atomically
from sparsepath_vit.runtime.checkpoint_paths import checkpoint_config
from sparsepath_vit.runtime.extras import imports_of_extra, run_script
from sparsepath_vit.runtime.figures import save_image

with imports_of_extra("train"):
    from sparsepath_vit.tasks.recipes import parse_recipe_and_flags
    from sparsepath_vit.tasks.segmentation.data import SegmentationCollator, SegmentationImages, augmentation
    from sparsepath_vit.tasks.segmentation.figures import evenly_spaced, example_figure
    from sparsepath_vit.tasks.segmentation.metrics import METRICS
    from sparsepath_vit.tasks.segmentation.pairs import SegmentationPairs, read_pairs
    from sparsepath_vit.tasks.segmentation.probabilities import INDEPENDENT_LABELS
    from sparsepath_vit.tasks.segmentation.regions import RegionSegmenter
    from sparsepath_vit.tasks.segmentation.training import SegmentationTrainer
    from sparsepath_vit.tasks.segpath.dataset import read_segpath

logger = logging.getLogger("train_segpath")

RESULTS_FILE = "all_results.json"
EXAMPLES = 4
# Below this many independent images an interval is wide, and says how well the script runs rather than the model.
_SMOKE_TEST_GROUPS = 100
_MACHINE_DEPENDENT = ("_runtime", "_per_second", "_flos")


@dataclasses.dataclass
class DataArguments:
    """What is segmented, and how it is shown to the model."""

    segpath_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "holds <antigen>_fileinfo.csv and the images of SegPath"}
    )
    antigens: str | None = dataclasses.field(
        default=None, metadata={"help": "of --segpath_dir, separated by commas, such as panCK_Epithelium"}
    )
    pairs_dir: str | None = dataclasses.field(
        default=None, metadata={"help": "holds X_HE.png and X_mask.png (0 and 1); in place of --segpath_dir"}
    )
    label_name: str = dataclasses.field(default="foreground", metadata={"help": "what the masks of --pairs_dir mark"})
    eval_images: list[str] = dataclasses.field(
        default_factory=list,
        metadata={"help": 'X of --pairs_dir that are held back: names or patterns such as "103*"', "nargs": "+"},
    )
    eval_fraction: float = dataclasses.field(
        default=0.25, metadata={"help": "of --pairs_dir: share held back at random where --eval_images names none"}
    )
    group_pattern: str | None = dataclasses.field(
        default=None, metadata={"help": "of --pairs_dir, regular expression: what X of one slide or patient share"}
    )
    eval_split: str = dataclasses.field(
        default="test", metadata={"help": "the split that is reported", "choices": ["test", "validation"]}
    )
    crop_size: int | None = dataclasses.field(
        default=None, metadata={"help": "pixels per side of the crops trained on; whole images by default"}
    )
    eval_crop_size: int | None = dataclasses.field(
        default=None, metadata={"help": "evaluate on crops side by side of this many pixels; whole images by default"}
    )
    augment: bool = dataclasses.field(default=True, metadata={"help": "random flips, quarter turns and colours"})
    color_jitter: float = dataclasses.field(default=0.2, metadata={"help": "how far --augment changes colours"})
    check_data: bool = dataclasses.field(default=True, metadata={"help": "read all masks before training"})
    max_train_images: int | None = dataclasses.field(default=None, metadata={"help": "the first so many of the split"})
    max_eval_images: int | None = dataclasses.field(default=None, metadata={"help": "the first so many of the split"})
    bootstrap_samples: int = dataclasses.field(default=1000, metadata={"help": "for the 95 %% intervals"})
    baselines: bool = dataclasses.field(
        default=False, metadata={"help": "also evaluate all-background and thresholds on haematoxylin"}
    )


@dataclasses.dataclass
class ModelArguments:
    """Which model, and with which head."""

    model_name_or_path: str | None = dataclasses.field(
        default=None,
        metadata={"help": "folder or Hub id: a converted ViT, which gets a new head, or a segmentation model"},
    )
    head: str = dataclasses.field(default="queries", metadata={"help": "of a new model", "choices": list(HEADS)})
    freeze_vit: bool = dataclasses.field(
        default=True, metadata={"help": "keep the ViT's weights (with queries: of the layers before them)"}
    )
    window_size: int | None = dataclasses.field(
        default=None, metadata={"help": "tokens per block side; 0 is dense; as the model's config by default"}
    )
    adapter_dim: int | None = dataclasses.field(default=None, metadata={"help": "mask2former: channels of the adapter"})
    num_queries: int = dataclasses.field(default=100, metadata={"help": "mask queries of a new model"})
    num_query_layers: int | None = dataclasses.field(
        default=None, metadata={"help": "queries: how many last layers they take part in"}
    )
    model_kwargs: str | None = dataclasses.field(
        default=None,
        metadata={"help": "further fields of a new model's config: in a recipe, or as JSON '{\"hidden_dim\": 128}'"},
    )
    backbone_kwargs: str | None = dataclasses.field(
        default=None, metadata={"help": "further fields of a new model's backbone config, likewise"}
    )

    def __post_init__(self) -> None:
        for name in ("model_kwargs", "backbone_kwargs"):
            self.fields_of(name)

    def fields_of(self, name: str) -> dict[str, Any]:
        """`model_kwargs` or `backbone_kwargs`, a mapping in a recipe and JSON on the command line.

        Raises:
            ValueError: it is neither.
        """
        value = getattr(self, name) or {}
        try:
            fields = json.loads(value) if isinstance(value, str) else value
        except json.JSONDecodeError as error:
            raise ValueError(f"--{name} {value!r} is not JSON: {error}.") from error
        if not isinstance(fields, dict):
            raise ValueError(f"--{name} {value!r} holds no fields: it takes a JSON object.")
        return dict(fields)


def parse(argv: list[str]) -> tuple[DataArguments, ModelArguments, TrainingArguments]:
    """Flags, or a YAML recipe and flags that overrule it.

    Raises:
        ValueError: a recipe that cannot be read, or with an unknown key; data or model are missing.
    """
    parser = HfArgumentParser(
        (DataArguments, ModelArguments, TrainingArguments),
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    defaults = {
        "remove_unused_columns": False,
        "report_to": "none",
        "label_names": ["mask_labels", "class_labels"],
        "seed": 0,
        "do_train": True,
        "ddp_find_unused_parameters": True,  # not every layer of a frozen ViT reaches the loss
        "use_cpu": not torch.accelerator.is_available(),  # else bf16 on a CPU is refused
    }
    data, model, training = parse_recipe_and_flags(parser, argv, defaults)
    if (data.segpath_dir is None) == (data.pairs_dir is None):
        raise ValueError("pass either --segpath_dir or --pairs_dir.")
    if data.segpath_dir is not None and not data.antigens:
        raise ValueError("--antigens is missing: what to segment, such as panCK_Epithelium, separated by commas.")
    if model.model_name_or_path is None:
        raise ValueError("--model_name_or_path is missing: the folder or Hub id of a converted checkpoint.")
    return data, model, training


def load_data(data: DataArguments, patch_size: int, seed: int) -> SegmentationPairs:
    """The pairs; what is wrong with them is said before anything is trained."""
    if data.segpath_dir is not None:
        pairs = read_segpath(data.segpath_dir, [name.strip() for name in data.antigens.split(",")])
    else:
        pairs = read_pairs(
            data.pairs_dir, data.label_name, data.eval_images, data.eval_fraction, data.group_pattern, seed
        )
    pairs.split("train")
    pairs.split(data.eval_split)
    if data.check_data:
        pairs.check(max(patch_size, data.crop_size or 0))
    return pairs


def load_model(arguments: ModelArguments, label_names: tuple[str, ...]) -> SparsePathViTForUniversalSegmentation:
    """A new head on a ViT, or a segmentation model that goes on learning.

    Raises:
        ValueError: a segmentation model with other labels, or with another head than asked for.
    """
    path, window = arguments.model_name_or_path, arguments.window_size
    backbone_kwargs = arguments.fields_of("backbone_kwargs")
    if window is not None:
        backbone_kwargs["window_size"] = window or None
    config = checkpoint_config(path, "model_name_or_path")
    if isinstance(config, SparsePathViTUniversalSegmentationConfig):
        own = tuple(config.id2label[index] for index in range(config.num_labels))
        if own != label_names:
            raise ValueError(f"{path} segments {', '.join(own)}, the data have {', '.join(label_names)}: start anew.")
        if window is not None:
            config.backbone_config.window_size = window or None
        return SparsePathViTForUniversalSegmentation.from_pretrained(path, config=config, dtype=torch.float32)
    if arguments.adapter_dim is not None:
        backbone_kwargs["adapter_dim"] = arguments.adapter_dim
    kwargs = {"num_queries": arguments.num_queries, **arguments.fields_of("model_kwargs")}
    if arguments.num_query_layers is not None:
        kwargs["num_query_layers"] = arguments.num_query_layers
    return SparsePathViTForUniversalSegmentation.from_pretrained_backbone(
        path,
        head=arguments.head,
        freeze_vit=arguments.freeze_vit,
        backbone_kwargs=backbone_kwargs,
        id2label=dict(enumerate(label_names)),
        label2id={name: label for label, name in enumerate(label_names)},
        problem_type=INDEPENDENT_LABELS,
        **kwargs,
    )


def make_trainer(
    pairs: SegmentationPairs, data: DataArguments, arguments: ModelArguments, training: TrainingArguments
) -> SegmentationTrainer:
    """Model, images and metrics. During training the validation split is evaluated, where there is one."""
    model = load_model(arguments, pairs.label_names)
    processor = AutoImageProcessor.from_pretrained(arguments.model_name_or_path)
    has_validation = any(pair.split == "validation" for pair in pairs.pairs)
    if training.load_best_model_at_end and not has_validation:
        raise ValueError(
            "--load_best_model_at_end would choose the checkpoint on the images that are reported: these data have no "
            "validation split. Leave it out."
        )
    watched = pairs.split("validation" if has_validation else data.eval_split)
    return SegmentationTrainer(
        model=model,
        args=training,
        data_collator=SegmentationCollator(processor, len(pairs.label_names)),
        train_dataset=SegmentationImages(
            pairs.split("train")[: data.max_train_images],
            data.crop_size,
            random_crops=True,
            transform=augmentation(data.color_jitter) if data.augment else None,
        ),
        eval_dataset=SegmentationImages(watched[: data.max_eval_images], data.eval_crop_size),
        processing_class=processor,
        label_names=pairs.label_names,
    )


def run(
    pairs: SegmentationPairs, data: DataArguments, arguments: ModelArguments, training: TrainingArguments
) -> tuple[SegmentationTrainer, SegmentationImages, dict[str, Any]]:
    """Trains and evaluates: the trainer with the final model, the images that were reported on, and the results."""
    trainer = make_trainer(pairs, data, arguments, training)
    reported = SegmentationImages(pairs.split(data.eval_split)[: data.max_eval_images], data.eval_crop_size)
    if training.do_train:
        trained = trainer.train(resume_from_checkpoint=_checkpoint_to_resume(training))
        trainer.save_metrics("train", trained.metrics, combined=False)
        trainer.save_state()
    trainer.bootstrap_samples = data.bootstrap_samples
    metrics = trainer.evaluate(reported)
    results = {name: value for name, value in metrics.items() if not name.endswith(_MACHINE_DEPENDENT)}
    results |= {"split": data.eval_split, "labels": list(pairs.label_names), "seed": training.seed}
    config = trainer.accelerator.unwrap_model(trainer.model).config
    results |= {"head": config.head, "window_size": config.backbone_config.window_size}
    results |= {"train_images": sorted({pair.name for pair in trainer.train_dataset.pairs})} if data.pairs_dir else {}
    results |= {"eval_images": sorted({pair.name for pair in reported.pairs})} if data.pairs_dir else {}
    if data.baselines and training.should_save:
        with imports_of_extra("train"):
            from sparsepath_vit.tasks.segmentation.baselines import evaluate_baselines

        results["baselines"] = evaluate_baselines(
            trainer.train_dataset, reported, pairs.label_names, data.bootstrap_samples, training.seed
        )
    return trainer, reported, results


def _checkpoint_to_resume(training: TrainingArguments) -> str | None:
    """`--resume_from_checkpoint DIR`, or `True` (or `last`) for the newest checkpoint in the output folder."""
    asked = training.resume_from_checkpoint
    if asked is None or str(asked).lower() == "false":
        return None
    if str(asked).lower() not in ("true", "last"):
        if not Path(asked).is_dir():
            raise ValueError(f"--resume_from_checkpoint {asked} is no folder: pass RUN/checkpoint-N, or True.")
        return str(asked)
    last = get_last_checkpoint(training.output_dir) if Path(training.output_dir).is_dir() else None
    if last is None:
        raise ValueError(f"--resume_from_checkpoint: {training.output_dir} holds no checkpoint-N to go on from.")
    return last


def save(trainer: SegmentationTrainer, results: dict[str, Any]) -> None:
    """Writes the results and the checkpoint."""
    if results["eval_num_groups"] < _SMOKE_TEST_GROUPS:
        results["note"] = (
            f"smoke test: {results['eval_num_groups']} independent images show that the steps work, not how good the "
            "model is"
        )
    output_dir = Path(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        output_dir.mkdir(parents=True, exist_ok=True)
        write_atomically(output_dir / RESULTS_FILE, json.dumps(results, indent=2) + "\n")
        logger.info("wrote %s", output_dir / RESULTS_FILE)
        say(results)
    trainer.save_model()


def save_examples(trainer: SegmentationTrainer, reported: SegmentationImages) -> None:
    """Writes a picture of some of the images that were reported on."""
    if trainer.is_world_process_zero():
        segmenter = RegionSegmenter(trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class)
        figure = example_figure(segmenter, reported, evenly_spaced(reported, EXAMPLES))
        save_image(figure, Path(trainer.args.output_dir) / "examples.png")


def say(results: dict[str, Any]) -> None:
    """The numbers, those of the baselines beside them."""
    rows = {"model": {name.removeprefix("eval_"): value for name, value in results.items()}}
    rows |= results.get("baselines", {})
    for label in results["labels"]:
        logger.info("%s:", label)
        for row, values in rows.items():
            cells = [_cell(values, f"{metric}_{label}") for metric in METRICS]
            logger.info(
                "  %-20s %s", row, "   ".join(f"{metric} {cell}" for metric, cell in zip(METRICS, cells, strict=True))
            )
    for name in ("train_images", "eval_images"):
        if name in results:
            logger.info("%s: %s", name, ", ".join(results[name]))
    if "note" in results:
        logger.info(results["note"])


def _cell(values: dict[str, Any], name: str) -> str:
    value, low, high = (values.get(name + ending) for ending in ("", "_low", "_high"))
    if value is None:
        return "undefined"
    return f"{value:.3f}" + (f" ({low:.3f} to {high:.3f})" if low is not None and high is not None else "")


def main() -> None:
    run_script(train_from_flags, sys.argv[1:])


def train_from_flags(argv: list[str]) -> None:
    """Reads the flags, trains, evaluates and writes."""
    data, arguments, training = parse(argv)
    set_seed(training.seed)
    config = checkpoint_config(arguments.model_name_or_path, "model_name_or_path")
    pairs = load_data(data, getattr(config, "backbone_config", config).patch_size, training.seed)
    trainer, reported, results = run(pairs, data, arguments, training)
    save(trainer, results)
    save_examples(trainer, reported)


if __name__ == "__main__":
    main()
