# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`SparsePathViTConfig`: everything that decides what the network computes, typed and checked."""

import dataclasses
import difflib
from collections.abc import Callable, Iterable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging

from .remote_code import ConfigRemoteCodeMixin

logger = logging.get_logger(__name__)

MLP_TYPES = ("gelu", "swiglu")
POOLINGS = ("cls", "cls_mean")
PRUNE_SCORES = ("attention", "cls_attention", "attention_value")
UNPRUNE_METHODS = ("scatter",)

# Remote code needs every Auto class spelled out: saving one class would record only that class.
AUTO_MAP = {
    "AutoConfig": "configuration_sparsepath_vit.SparsePathViTConfig",
    "AutoModel": "modeling_sparsepath_vit.SparsePathViTModel",
    "AutoModelForImageClassification": "modeling_sparsepath_vit.SparsePathViTForImageClassification",
    "AutoBackbone": "modeling_sparsepath_vit.SparsePathViTBackbone",
}


def _at_least(minimum: int, remedy: str) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value < minimum:
            raise ValueError(f"{name}={value!r} is not possible: it must be at least {minimum}. {remedy}")

    return check


def _one_of(choices: tuple[str, ...]) -> Callable[[str, Any], None]:
    def check(name: str, value: Any) -> None:
        if value not in choices:
            raise ValueError(f"{name}={value!r} is unknown: choose one of {', '.join(map(repr, choices))}.")

    return check


def _probability(name: str, value: Any) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value!r} is not possible: it must lie in [0, 1).")


def _check_interpolation_offset(name: str, value: Any) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} is not possible: it is a part of one patch and lies in [0, 1). Use 0.1 for what DINOv2 "
            "itself does with models without registers, 0.0 (the default) for all others."
        )


def _check_unprune(name: str, value: Any) -> None:
    if value is not None and value not in UNPRUNE_METHODS:
        raise ValueError(f"{name}={value!r} is unknown: use 'scatter', or None (the default) to leave tokens removed.")


def _check_window_size(name: str, value: Any) -> None:
    if value is not None and value < 1:
        raise ValueError(
            f"{name}={value!r} is not possible: a block is at least 1 patch token wide. "
            f"Use 8 (the default), any larger integer, or None for dense attention."
        )


def _check_tokens_per_strip(name: str, value: Any) -> None:
    if value is not None and value < 0:
        raise ValueError(
            f"{name}={value!r} is not possible: it is at least 1. 0 runs all tokens at once, and None (the default) is "
            "what is fastest on the device."
        )


def _check_image_std(name: str, value: Any) -> None:
    if value is not None and min(value, default=0) <= 0:
        raise ValueError(f"{name}={value!r} is not possible: pixels are divided by it, so every number is above 0.")


def _check_prune_ratio(name: str, value: Any) -> None:
    if not 0 <= value < 1:
        raise ValueError(
            f"{name}={value!r} is not possible: it is the share of patch tokens removed and lies in [0, 1). "
            "Use 0.6 for classification, 0.0 to keep every token."
        )


_FIELD_CHECKS: dict[str, Callable[[str, Any], None]] = {
    "hidden_size": _at_least(1, "It is the width of a token."),
    "num_hidden_layers": _at_least(1, "It is the depth of the network."),
    "num_attention_heads": _at_least(1, "It must divide hidden_size."),
    "intermediate_size": _at_least(1, "For SwiGLU it is the width after the gate split."),
    "num_register_tokens": _at_least(0, "Use 0 for a model without registers."),
    "num_prefix_position_embeddings": _at_least(0, "Use 0 where only patches carry position embeddings."),
    "patch_size": _at_least(1, "Pathology foundation models use 8, 14 or 16."),
    "image_size": _at_least(1, "It is the pretraining image size; 224 for nearly all models."),
    "num_channels": _at_least(1, "RGB images have 3."),
    "image_std": _check_image_std,
    "neighbor_radius": _at_least(0, "0 is the own block only, 1 (the default) is 3 x 3 blocks."),
    "num_context_tokens": _at_least(0, "0 (the default) is the pattern of the paper, 1024 comes close to dense."),
    "num_representatives": _at_least(0, "0 (the default) is the pruning of the paper, 1024 comes close to none."),
    "prune_after_layer": _at_least(1, "Layers count from 1; the method prunes after layer 4."),
    "tokens_per_strip": _check_tokens_per_strip,
    "mlp_type": _one_of(MLP_TYPES),
    "pooling": _one_of(POOLINGS),
    "prune_score": _one_of(PRUNE_SCORES),
    "unprune": _check_unprune,
    "window_size": _check_window_size,
    "prune_ratio": _check_prune_ratio,
    "position_interpolation_offset": _check_interpolation_offset,
    "hidden_dropout": _probability,
    "attention_dropout": _probability,
    "drop_path_rate": _probability,
}


@strict
class SparsePathViTConfig(ConfigRemoteCodeMixin, BackboneConfigMixin, PreTrainedConfig):
    """Configuration of a SparsePathViT. The defaults are UNI2-h's shape with block-local attention.

    Every value is checked when it is set, at construction and later; a wrong one raises a `ValueError` that names the
    field, the value and the remedy (a wrong *type* raises huggingface_hub's `StrictDataclassFieldValidationError`).

    Args:
        hidden_size (`int`): width D of a token.
        num_hidden_layers (`int`): depth.
        num_attention_heads (`int`): heads; must divide `hidden_size`.
        intermediate_size (`int`): width of the MLP's hidden layer; for `swiglu` *after* the gate split (timm's packed
            `fc1` is twice as wide).
        mlp_type (`str`): `"gelu"` or `"swiglu"`.
        qkv_bias (`bool`): bias on the fused query-key-value projection.
        use_layerscale (`bool`): whether each residual branch is scaled by a learned vector.
        layerscale_value (`float`): its initial value.
        layer_norm_eps (`float`): epsilon of every LayerNorm.
        num_register_tokens (`int`): register tokens R; the model has G = 1 + R global tokens.
        patch_size (`int`): pixels per patch side.
        image_size (`int`): pretraining image size in pixels; the stored position grid is `image_size // patch_size`.
        num_channels (`int`): image channels.
        image_mean, image_std (`list[float]`, *optional*): of the channels, of pixels in 0..1, by which the model
            normalises `pixel_values` of uint8; the image processor's. `None` (the default) for a model that takes
            normalised pixels only.
        num_prefix_position_embeddings (`int`): how many global tokens carry a position embedding: 0 (patches only),
            1 (CLS) or 1 + R (CLS and registers).
        position_antialias (`bool`): whether position embeddings are resampled bicubically with antialiasing, as in timm
            and Dinov2WithRegisters, or without, as in Transformers' ViT and Dinov2. Makes a difference on grids other
            than the stored one.
        position_interpolation_offset (`float`): on grids other than the stored one position embeddings are resampled as
            if there were that many more token rows and columns. 0.1 in DINOv2's own code for models without registers
            (its `interpolate_offset`), hence in GPFM; 0 everywhere else.
        pooling (`str`): `"cls"`, or `"cls_mean"` for CLS concatenated with the mean of the kept patch tokens, each
            counted as often as the patch tokens it stands for (`num_representatives`).
        window_size (`int` or `None`): tokens per block side; `None` is dense attention.
        neighbor_radius (`int`): a token sees blocks up to this many block rows and columns away.
        num_context_tokens (`int`): stratified attention. In each layer every token sees at most this many patch tokens
            beyond its neighbourhood: up to 63 that CLS and the mean query attend to most, each for itself, and of each
            square cell of the grid one that is drawn, the same for an image in every run, in place of the cell's
            others. The mean query of the image corrects what all queries of a block have in common. This estimates
            dense attention at any image size, for that many more keys a query. 0 (the default) is block-local attention
            alone, 1024 comes close to the dense model. The weights are the same; the features are not, so choose it
            before training a head on them.
        prune_after_layer (`int`): tokens are removed after this layer, counted from 1.
        prune_ratio (`float`): share of the present patch tokens removed, per image. 0.6 is recommended for
            classification, 0.0 (the default) removes none.
        prune_score (`str`): `"attention"` (mean over global queries and heads), `"cls_attention"` (CLS query only) or
            `"attention_value"` (probability times the norm of the value).
        num_representatives (`int`): of each of at most this many cells from which pruning removes patch tokens, the one
            in the middle of these is kept after all and counts from then on, in attention and in the mean, for all that
            were removed there. They come on top of the share that `prune_ratio` keeps. 0 (the default) keeps none. On
            CUDA their number has to be read from the device, once a forward.
        unprune (`str` or `None`): `"scatter"` brings removed patch tokens back at the end, with the features they were
            removed with, so that `last_hidden_state` holds all patches; `None` (the default) leaves them out. Caution:
            the removed tokens are those of layer `prune_after_layer`, the others of the last layer, and a dense head
            sees the seam between them. It lets pruned models make dense outputs; it does not make them as good as
            with pruning off. Pooled features do not change.
        hidden_dropout, attention_dropout, drop_path_rate (`float`): regularisation in training.
        initializer_range (`float`): standard deviation of the weight initialisation.
        tokens_per_strip (`int` or `None`): patch tokens that a layer works on at once at inference, or one row of
            blocks where that has more. It bounds the peak memory by the hidden states: queries, keys, values and the
            wide MLP activation exist for one strip at a time. `None` (the default) is what is fastest on the device,
            4,096 on a CPU and 16,384 on CUDA; 0 runs all tokens at once. The numbers are the same.
        apply_layernorm (`bool`): whether the backbone normalises its feature maps.
        reshape_hidden_states (`bool`): whether the backbone's feature maps are maps; else they are sequences of the CLS
            token and all patch tokens, (batch, 1 + rows * columns, hidden_size), as DPT takes them.

    Example:
    ```python
    >>> from sparsepath_vit import SparsePathViTConfig, SparsePathViTModel

    >>> config = SparsePathViTConfig(prune_ratio=0.6)
    >>> model = SparsePathViTModel(config)
    ```
    """

    model_type = "sparsepath_vit"
    own_auto_map = AUTO_MAP
    # A Trainer gathers the other outputs of all batches: without these, which differ in size from image to image, it
    # hands a classifier's logits alone to `compute_metrics`.
    keys_to_ignore_at_inference = [
        *("hidden_states", "attentions", "patch_positions", "patch_weights", "grid_sizes", "prune_scores")
    ]

    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 4096
    mlp_type: str = "swiglu"
    qkv_bias: bool = True
    use_layerscale: bool = True
    layerscale_value: float | int = 1e-5
    layer_norm_eps: float = 1e-6
    num_register_tokens: int = 8
    patch_size: int = 14
    image_size: int = 224
    num_channels: int = 3
    image_mean: list[float | int] | None = None
    image_std: list[float | int] | None = None
    num_prefix_position_embeddings: int = 0
    position_antialias: bool = True
    position_interpolation_offset: float | int = 0.0
    pooling: str = "cls"
    window_size: int | None = 8
    neighbor_radius: int = 1
    num_context_tokens: int = 0
    prune_after_layer: int = 4
    prune_ratio: float | int = 0.0
    prune_score: str = "attention"
    num_representatives: int = 0
    unprune: str | None = None
    hidden_dropout: float | int = 0.0
    attention_dropout: float | int = 0.0
    drop_path_rate: float | int = 0.0
    initializer_range: float = 0.02
    tokens_per_strip: int | None = None
    apply_layernorm: bool = True
    reshape_hidden_states: bool = True
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Like every config's, but overrides are checked together, and the stages follow an overridden depth."""
        overrides = {name: kwargs.pop(name) for name in tuple(kwargs) if name in _FIELD_CHECKS}
        depth = overrides.get("num_hidden_layers")
        if depth is not None and max(config_dict.get("out_indices") or [0]) > depth:
            config_dict = {**config_dict, "out_indices": None, "out_features": None}
        return super().from_dict({**config_dict, **overrides}, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        kwargs.pop("stage_names", None)  # stored, but it follows from the depth
        self.stage_names = self._make_stage_names()
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        kwargs.setdefault("auto_map", dict(self.own_auto_map))
        self._warn_of_misspelt_fields(kwargs)
        super().__post_init__(**kwargs)
        self._check_consistency()
        self._is_consistent = True

    def __setattr__(self, name: str, value: Any) -> None:
        previous = self.__dict__.get(name)
        if name in _FIELD_CHECKS:
            _FIELD_CHECKS[name](name, value)
        super().__setattr__(name, value)
        if name in _FIELD_CHECKS and self.__dict__.get("_is_consistent", False):
            try:
                self._check_consistency()
            except ValueError:
                super().__setattr__(name, previous)
                raise

    def _warn_of_misspelt_fields(self, names: Iterable[str]) -> None:
        """Says where a name that Transformers would keep as an attribute is almost one of the fields."""
        fields = [field.name for field in dataclasses.fields(self)]
        for name in names:
            for field in difflib.get_close_matches(name, fields, n=1, cutoff=0.85):
                logger.warning_once(f"{name} is no field of {type(self).__name__} and does nothing: is {field} meant?")

    def _make_stage_names(self) -> list[str]:
        """What `out_features` chooses from: here the embeddings and each layer."""
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_hidden_layers + 1)]

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain values, as they are written to config.json."""
        output = super().to_dict()
        output.pop("_is_consistent", None)
        return output

    def _check_consistency(self) -> None:
        """Checks that involve two fields.

        Raises:
            ValueError: names both fields, their values and the remedy.
        """
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} is not divisible by num_attention_heads={self.num_attention_heads}: "
                "every head needs the same width."
            )
        if self.image_size < self.patch_size:
            raise ValueError(
                f"image_size={self.image_size} is smaller than patch_size={self.patch_size}: "
                "the pretraining image must hold at least one patch."
            )
        if self.prune_ratio > 0 and self.prune_after_layer > self.num_hidden_layers:
            raise ValueError(
                f"prune_after_layer={self.prune_after_layer} lies outside the network: it has "
                f"num_hidden_layers={self.num_hidden_layers} layers, counted from 1. "
                f"Choose 1..{self.num_hidden_layers}, or prune_ratio=0.0 to prune nothing."
            )
        for name in ("image_mean", "image_std"):
            value = getattr(self, name)
            if value is not None and len(value) != self.num_channels:
                raise ValueError(
                    f"{name}={value!r} does not fit num_channels={self.num_channels}: it takes one number a channel."
                )
        possible = (0, 1, self.num_global_tokens)
        if self.num_prefix_position_embeddings not in possible:
            raise ValueError(
                f"num_prefix_position_embeddings={self.num_prefix_position_embeddings} does not fit "
                f"num_register_tokens={self.num_register_tokens}: it is 0 (patches only), 1 (CLS) or "
                f"{self.num_global_tokens} (CLS and registers)."
            )

    @property
    def num_global_tokens(self) -> int:
        """G: the CLS token and the registers."""
        return 1 + self.num_register_tokens

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def pooled_size(self) -> int:
        """Width of `pooler_output`."""
        return self.hidden_size * (2 if self.pooling == "cls_mean" else 1)

    @property
    def prunes(self) -> bool:
        """Whether any token is removed."""
        return self.prune_ratio > 0

    @property
    def leaves_representatives(self) -> bool:
        """Whether some of the removed tokens stay for the others."""
        return self.prunes and self.num_representatives > 0


def failure_signatures(config: SparsePathViTConfig) -> list[str]:
    """Settings the method is known to fail with, each as a sentence that says what was observed."""
    observed = []
    if config.prune_ratio > 0.8:
        observed.append(
            f"prune_ratio={config.prune_ratio}: beyond 0.8 too few tokens are left and accuracy was observed to "
            "collapse. 0.6 is recommended for classification."
        )
    if config.prunes and config.prune_after_layer < 2:
        observed.append(
            f"prune_after_layer={config.prune_after_layer}: after the first layer the global tokens do not yet attend "
            "to tissue, and accuracy was observed to collapse. 4 is recommended."
        )
    if config.window_size is not None and config.window_size < 4:
        observed.append(
            f"window_size={config.window_size}: blocks narrower than 4 tokens were observed to fragment the spatial "
            "context. 8 is recommended, 64 for segmentation."
        )
    return observed


__all__ = ["SparsePathViTConfig"]
