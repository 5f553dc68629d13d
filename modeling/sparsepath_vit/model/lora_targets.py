# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What PEFT's users read who name the layers of other models."""

from typing import Any

# What query, key and value are called elsewhere; here they are one layer.
_NAMES_OF_OTHERS = {"query", "key", "value", "q_proj", "k_proj", "v_proj", "query_key_value", "to_q", "to_k", "to_v"}


class LoraTargetsMixin:
    """Says which layers an adapter of PEFT can be added to."""

    def add_adapter(self, adapter_config: Any, *args: Any, **kwargs: Any) -> None:
        """As every model's.

        Raises:
            ValueError: no layer has one of `target_modules`.
        """
        named = getattr(adapter_config, "target_modules", None) or ()
        others = sorted(_NAMES_OF_OTHERS & set(named)) if not isinstance(named, str) else []
        if others:
            raise ValueError(
                f"target_modules names {', '.join(map(repr, others))}: query, key and value are one layer here, 'qkv'. "
                "Pass target_modules=['qkv'], and 'projection', 'fc1' and 'fc2' for the other linear layers."
            )
        super().add_adapter(adapter_config, *args, **kwargs)
