# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`sparsepath models`: the known foundation models."""

from rich.box import SIMPLE_HEAD
from rich.table import Table

from .console import show

EXAMPLES = "Example:  `sparsepath models`"


def models() -> None:
    """List the known foundation models: name, Hub id, shape, licence."""
    from sparsepath_vit.conversion import known_architectures

    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("name", no_wrap=True)  # what --architecture takes: never cut off
    for title in ("Hub id", "width x depth", "heads", "patch", "registers", "pooling", "mpp", "licence"):
        table.add_column(title, overflow="fold")
    for known in known_architectures():
        config = known.build_config()
        table.add_row(
            known.name,
            known.hub_id or "(no checkpoint)",
            f"{config.hidden_size} x {config.num_hidden_layers}",
            str(config.num_attention_heads),
            str(config.patch_size),
            str(config.num_register_tokens),
            config.pooling,
            ", ".join(f"{mpp:g}" for mpp in known.mpp) or "-",
            (known.licence or "-") + (" (gated)" if known.gated else ""),
        )
    show(table)
