#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Prepares a checkpoint for the Hub: weights, config, processor, model card and the code that loads them anywhere.

Takes what `save_pretrained` or a Trainer wrote: encoder, classifier, backbone, adapter or segmentation model. Nothing
leaves this machine unless --push is given: the default writes the folder as the Hub would hold it, checks that all code
which its files name is there, and lists it. What else lies in the checkpoint (optimiser, logs) stays behind.

Examples:
    python scripts/push_to_hub.py runs/panda/checkpoint-800
    python scripts/push_to_hub.py runs/panda/checkpoint-800 --repo_id me/panda-uni2h --push --private
    python scripts/push_to_hub.py --kernel --output_dir outputs/kernel
"""

import argparse
import logging
import os
import shutil
import string
import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoImageProcessor

import sparsepath_vit
from sparsepath_vit.model.remote_code import remote_code_files

logger = logging.getLogger("push_to_hub")

TEMPLATE = Path(__file__).parents[1] / "model_card" / "README.md"
CONFIG, PROCESSOR, CARD = "config.json", "preprocessor_config.json", "README.md"
WEIGHTS = ("model.safetensors", "model-?????-of-?????.safetensors")
# Beside these the images that the card shows are copied; configuration, processor and code are saved anew.
COPIED = (*WEIGHTS, "model.safetensors.index.json", CARD, "LICENSE*")
# Auto class -> the Hub's name of the task, and what a user does with the outputs.
TASKS = {
    "AutoModel": ("image-feature-extraction", "features = outputs.pooler_output"),
    "AutoModelForImageClassification": ("image-classification", "probabilities = outputs.logits.softmax(dim=-1)"),
    "AutoBackbone": ("image-feature-extraction", "feature_maps = outputs.feature_maps"),
    "AutoModelForUniversalSegmentation": (
        "image-segmentation",
        "(label_map,) = model.post_process_semantic_segmentation(outputs, [(image.height, image.width)])",
    ),
}
PROCESSOR_LINE = 'processor = AutoImageProcessor.from_pretrained("{name}", trust_remote_code=True)\n'
# Licences under which anybody may pass the weights on. Those of most foundation models forbid it.
OPEN_LICENCES = ("apache-2.0", "mit", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?", help="folder that save_pretrained or a Trainer wrote")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/hub"), help="folder to prepare")
    parser.add_argument("--repo_id", help="user/name on the Hub")
    parser.add_argument("--push", action="store_true", help="upload the prepared folder")
    parser.add_argument("--private", action="store_true", help="create the repository as private")
    parser.add_argument("--licence", help="licence of these weights, where the checkpoint's card does not state it")
    parser.add_argument("--kernel", action="store_true", help="write the attention kernel for the `kernels` library")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        run(arguments)
    except (ValueError, OSError) as error:
        raise SystemExit(f"error: {error}") from error


def run(arguments: argparse.Namespace) -> None:
    """Prepares what was asked for, and uploads it with --push."""
    if arguments.kernel:
        from kernel_repository import export_kernel

        logger.info("wrote %s", export_kernel(arguments.output_dir))
        return
    if arguments.checkpoint is None:
        raise ValueError("checkpoint is missing: pass the folder that save_pretrained or a Trainer wrote.")
    licence = arguments.licence or stated_licence(arguments.checkpoint)
    prepared = prepare(arguments.checkpoint, arguments.output_dir, arguments.repo_id, licence)
    files = sorted(prepared.iterdir())
    sizes = {path.name: path.stat().st_size for path in files}
    listed = "\n".join(f"  {size:>15,} bytes  {name}" for name, size in sizes.items())
    logger.info("prepared %s, %d files of %.1f MB:\n%s", prepared, len(files), sum(sizes.values()) / 1e6, listed)
    if not arguments.push:
        logger.info("dry run: nothing was uploaded. Add --repo_id USER/NAME --push to upload this folder.")
        return
    if not arguments.repo_id:
        raise ValueError("--push needs --repo_id USER/NAME.")
    if licence not in OPEN_LICENCES and not arguments.private:
        raise ValueError(
            f"the licence of these weights is {licence or 'not stated'}: it may forbid passing them on, so they are "
            "not pushed to a public repository. Add --private, or state an open one with --licence."
        )
    api = HfApi()
    api.create_repo(arguments.repo_id, private=arguments.private, exist_ok=True)
    api.upload_folder(repo_id=arguments.repo_id, folder_path=prepared, allow_patterns=list(sizes))
    logger.info("pushed these %d files to %s", len(sizes), arguments.repo_id)


def stated_licence(checkpoint: Path) -> str | None:
    """The licence in the front matter of the checkpoint's README.md."""
    card = checkpoint / CARD
    if not card.is_file():
        return None
    _, separator, rest = card.read_text(encoding="utf-8").partition("---\n")
    front_matter = yaml.safe_load(rest.partition("\n---")[0]) if separator else None
    return (front_matter or {}).get("license")


def prepare(checkpoint: Path, output_dir: Path, repo_id: str | None, licence: str | None) -> Path:
    """Copies the weights, saves configuration and processor with their code, and adds a model card.

    Args:
        checkpoint: folder with config.json and safetensors weights of any SparsePathViT.
        output_dir: new, empty, or an earlier preparation, which is replaced when everything is complete.
        repo_id: name on the Hub, for the card.
        licence: of the weights.

    Raises:
        ValueError: the folder is not a SparsePathViT checkpoint, or `output_dir` holds something else.
    """
    if not (checkpoint / CONFIG).is_file() or not any(path for pattern in WEIGHTS for path in checkpoint.glob(pattern)):
        raise ValueError(
            f"{checkpoint} holds no config.json with model*.safetensors: it is no saved checkpoint. PEFT adapters are "
            "merged first: model.merge_and_unload().save_pretrained(DIR)."
        )
    config = AutoConfig.from_pretrained(checkpoint)
    if not config.model_type.startswith("sparsepath_vit"):
        raise ValueError(f"{checkpoint} holds a {config.model_type!r} model: convert it first (sparsepath convert).")
    refuse_to_replace(output_dir, checkpoint)
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as temporary:
        staged = Path(temporary) / "staged"
        staged.mkdir()
        copy_files(checkpoint, staged)
        config.save_pretrained(staged)
        if (checkpoint / PROCESSOR).is_file():
            AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(staged)
        else:
            logger.warning("%s holds no %s: users cannot know the normalisation.", checkpoint, PROCESSOR)
        if not (staged / CARD).exists():
            card = model_card(config, repo_id or checkpoint.name, licence, (staged / PROCESSOR).is_file())
            (staged / CARD).write_text(card, encoding="utf-8")
        check_code(staged, config)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(staged, output_dir)
    return output_dir


def refuse_to_replace(output_dir: Path, checkpoint: Path) -> None:
    """Refuses an output folder that holds anything but an earlier preparation.

    Raises:
        ValueError: names what it holds.
    """
    if not output_dir.exists():
        return
    if not output_dir.is_dir() or output_dir.resolve() in (checkpoint.resolve(), *checkpoint.resolve().parents):
        raise ValueError(f"--output_dir {output_dir} is a file or holds the checkpoint: name another folder.")
    code = {file.name for file in remote_code_files()}
    patterns = (*COPIED, CONFIG, PROCESSOR, "*.png")
    others = [
        path.name
        for path in sorted(output_dir.iterdir())
        if path.is_dir() or not (path.name in code or any(path.match(pattern) for pattern in patterns))
    ]
    if others:
        raise ValueError(
            f"--output_dir {output_dir} holds {', '.join(others[:3])}, so it is no earlier preparation and is not "
            "replaced: empty it yourself or name another folder."
        )


def copy_files(checkpoint: Path, staged: Path) -> None:
    """Copies weights, card and licence, and those images in the folder that the card shows."""
    files = {path for pattern in COPIED for path in checkpoint.glob(pattern)}
    if (checkpoint / CARD).is_file():
        card = (checkpoint / CARD).read_text(encoding="utf-8")
        files |= {path for path in checkpoint.glob("*.png") if path.name in card}
    for path in files:
        shutil.copy2(path, staged / path.name)


def check_code(staged: Path, config: Any) -> None:
    """Makes sure that nobody is sent to a file that is not there.

    Raises:
        ValueError: names the files.
    """
    wanted = {f"{reference.partition('.')[0]}.py" for reference in config.own_auto_map.values()}
    missing = sorted(name for name in wanted if not (staged / name).is_file())
    if missing:
        raise ValueError(f"config.json names {', '.join(missing)}, which saving did not write.")


def model_card(config: Any, name: str, licence: str | None, has_processor: bool) -> str:
    """The Hub model card from the template in model_card/."""
    architecture = (config.architectures or ["SparsePathViTModel"])[0]
    auto_classes = {reference.partition(".")[2]: name for name, reference in config.own_auto_map.items()}
    auto_class = auto_classes.get(architecture, "AutoModel")
    task, use = TASKS[auto_class]
    vit = getattr(config, "backbone_config", config)
    labels = ", ".join(config.id2label.values()) if task.endswith(("classification", "segmentation")) else "none"
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        licence=licence or "unknown",
        task=task,
        architecture=architecture,
        use=use,
        auto_class=auto_class,
        inputs='**processor(image, return_tensors="pt")' if has_processor else "pixel_values",
        imports=f"AutoImageProcessor, {auto_class}" if has_processor else auto_class,
        processor=PROCESSOR_LINE.format(name=name) if has_processor else "",
        layers=vit.num_hidden_layers,
        width=vit.hidden_size,
        heads=vit.num_attention_heads,
        patch_size=vit.patch_size,
        registers=vit.num_register_tokens,
        window_size=vit.window_size or "dense",
        neighbor_radius=vit.neighbor_radius,
        prune_ratio=vit.prune_ratio,
        prune_after_layer=vit.prune_after_layer,
        labels=labels,
        version=sparsepath_vit.__version__,
    )


if __name__ == "__main__":
    main()
