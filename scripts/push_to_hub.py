#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Prepares a checkpoint for the Hub: weights, config, processor, model card and the code that loads them anywhere.

Nothing leaves this machine unless --push is given: the default writes the folder as the Hub would hold it and loads it
back the way a user without this package would.

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

import yaml
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoImageProcessor

import sparsepath_vit
from sparsepath_vit.model.configuration_sparsepath_vit import AUTO_MAP
from sparsepath_vit.model.remote_code import export_remote_code

logger = logging.getLogger("push_to_hub")

TEMPLATE = Path(__file__).parents[1] / "model_card" / "README.md"
WANTED = ("config.json", "model*.safetensors*", "preprocessor_config.json", "README.md", "LICENSE*", "*.png")
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
    logger.info("prepared %s: %s", prepared, ", ".join(sorted(path.name for path in prepared.iterdir())))
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
    api.upload_folder(repo_id=arguments.repo_id, folder_path=prepared)
    logger.info("pushed to %s", arguments.repo_id)


def stated_licence(checkpoint: Path) -> str | None:
    """The licence in the front matter of the checkpoint's README.md."""
    card = checkpoint / "README.md"
    if not card.is_file():
        return None
    _, separator, rest = card.read_text(encoding="utf-8").partition("---\n")
    front_matter = yaml.safe_load(rest.partition("\n---")[0]) if separator else None
    return (front_matter or {}).get("license")


def prepare(checkpoint: Path, output_dir: Path, repo_id: str | None, licence: str | None) -> Path:
    """Copies the checkpoint, adds code and model card, and loads its config and processor back.

    Args:
        checkpoint: folder with config.json and safetensors weights.
        output_dir: replaced when everything is complete.
        repo_id: name on the Hub, for the card.
        licence: of the weights.

    Raises:
        ValueError: the folder is not a SparsePathViT checkpoint.
    """
    config_file = checkpoint / "config.json"
    if not config_file.is_file() or not list(checkpoint.glob("model*.safetensors")):
        raise ValueError(f"{checkpoint} holds no config.json with model*.safetensors: it is no saved checkpoint.")
    config = AutoConfig.from_pretrained(checkpoint)
    if not isinstance(config, sparsepath_vit.SparsePathViTConfig):
        raise ValueError(f"{checkpoint} holds a {config.model_type!r} model: convert it first (sparsepath convert).")
    output_dir.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output_dir.parent, prefix=f".{output_dir.name}.") as temporary:
        staged = Path(temporary) / "staged"
        staged.mkdir()
        for pattern in WANTED:
            for path in checkpoint.glob(pattern):
                shutil.copy2(path, staged / path.name)
        # Saving one class may have recorded only that class; a Hub user needs every Auto class.
        config.auto_map = dict(AUTO_MAP)
        config.save_pretrained(staged)
        AutoImageProcessor.from_pretrained(checkpoint).save_pretrained(staged)
        export_remote_code(staged)
        if not (staged / "README.md").exists():
            (staged / "README.md").write_text(model_card(config, repo_id or checkpoint.name, licence), encoding="utf-8")
        AutoConfig.from_pretrained(staged, trust_remote_code=True)
        if output_dir.exists():
            shutil.rmtree(output_dir)
        os.replace(staged, output_dir)
    return output_dir


def model_card(config: sparsepath_vit.SparsePathViTConfig, name: str, licence: str | None) -> str:
    """The Hub model card from the template in model_card/."""
    labels = ", ".join(config.id2label.values()) if config.id2label else "none"
    return string.Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        name=name,
        licence=licence or "unknown",
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        heads=config.num_attention_heads,
        patch_size=config.patch_size,
        registers=config.num_register_tokens,
        window_size=config.window_size or "dense",
        neighbor_radius=config.neighbor_radius,
        prune_ratio=config.prune_ratio,
        prune_after_layer=config.prune_after_layer,
        labels=labels,
        version=sparsepath_vit.__version__,
    )


if __name__ == "__main__":
    main()
