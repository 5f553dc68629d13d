# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What everything above the model shares: files, memory, time, devices, optional libraries, pictures."""

from typing import TYPE_CHECKING

from .lazy_loading import lazy_names

if TYPE_CHECKING:
    from .atomic_files import append_row, write_atomically
    from .checkpoint_paths import checkpoint_config, existing_source
    from .compute import torch_device, weight_dtype
    from .cost import forward_flops, mean_keys_per_query
    from .doctor import Finding, examine
    from .extras import imports_of_extra, install_command
    from .figures import block_pattern_figure, prune_map_figure, save_image
    from .measure import Measurement, measured
    from .memory import forward_bytes, free_bytes, is_out_of_memory

__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "atomic_files": ("append_row", "write_atomically"),
        "checkpoint_paths": ("checkpoint_config", "existing_source"),
        "compute": ("torch_device", "weight_dtype"),
        "cost": ("forward_flops", "mean_keys_per_query"),
        "doctor": ("Finding", "examine"),
        "extras": ("imports_of_extra", "install_command"),
        "figures": ("block_pattern_figure", "prune_map_figure", "save_image"),
        "measure": ("Measurement", "measured"),
        "memory": ("forward_bytes", "free_bytes", "is_out_of_memory"),
    },
)

__all__ = [
    "Finding",
    "Measurement",
    "append_row",
    "block_pattern_figure",
    "checkpoint_config",
    "examine",
    "existing_source",
    "forward_bytes",
    "forward_flops",
    "free_bytes",
    "imports_of_extra",
    "install_command",
    "is_out_of_memory",
    "mean_keys_per_query",
    "measured",
    "prune_map_figure",
    "save_image",
    "torch_device",
    "weight_dtype",
    "write_atomically",
]
