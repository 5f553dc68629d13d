# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Configurations of the segmentation models: the adapter backbone, and the model with either head."""

import dataclasses
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import Mask2FormerConfig

from .configuration_sparsepath_vit import SparsePathViTConfig
from .remote_code import ConfigRemoteCodeMixin

HEADS = ("mask2former", "queries")
ADAPTER_NORMS = ("batch", "group")
STRIDES = (4, 8, 16, 32)
# Mask2Former's pixel decoder normalises 32 groups of channels.
NORM_GROUPS = 32

ADAPTER_AUTO_MAP = {
    "AutoConfig": "configuration_segmentation_sparsepath_vit.SparsePathViTAdapterConfig",
    "AutoBackbone": "adapter_sparsepath_vit.SparsePathViTAdapterBackbone",
}
SEGMENTATION_AUTO_MAP = {
    "AutoConfig": "configuration_segmentation_sparsepath_vit.SparsePathViTUniversalSegmentationConfig",
    "AutoModelForUniversalSegmentation": "segmentation_sparsepath_vit.SparsePathViTForUniversalSegmentation",
}


@strict
class SparsePathViTAdapterConfig(SparsePathViTConfig):
    """Configuration of a SparsePathViT with a ViT-Adapter (arXiv 2205.08534): a pyramid of strides 4, 8, 16 and 32.

    Args:
        adapter_dim (`int`): channels of the feature maps, 256 to 384 so that the stride-4 map of a region of thousands
            of pixels fits in memory.
        adapter_layers (`list[int]` or `None`): the adapter reads the tokens after these layers, counted from 1,
            ascending; by default after each quarter of the network.
        adapter_num_heads (`int`): heads of its deformable attention; must divide `adapter_dim`.
        adapter_num_points (`int`): points that a head samples per map.
        adapter_stem_dim (`int`): channels of the first convolutions.
        adapter_feedforward_ratio (`float`): width of its feed-forward layers as a share of `adapter_dim`.
        adapter_norm (`str`): `"batch"`, or `"group"` where a GPU holds only one or two images of a batch.
        adapter_injector (`bool`): whether the pyramid is also written back into the tokens (the paper's two-way form).
            The default only reads, which leaves the pretrained features as they are.
        freeze_vit (`bool`): whether the ViT's own weights stay as they are.
        **kwargs: the fields of `SparsePathViTConfig`.
    """

    model_type = "sparsepath_vit_adapter"
    own_auto_map = ADAPTER_AUTO_MAP

    adapter_dim: int = 256
    adapter_layers: list[int] | None = None
    adapter_num_heads: int = 8
    adapter_num_points: int = 4
    adapter_stem_dim: int = 64
    adapter_feedforward_ratio: float | int = 0.25
    adapter_norm: str = "batch"
    adapter_injector: bool = False
    freeze_vit: bool = True

    @classmethod
    def from_vit_config(cls, config: SparsePathViTConfig, **kwargs: Any) -> "SparsePathViTAdapterConfig":
        """The adapter for a ViT of this shape.

        Args:
            config: of the ViT; its `out_features` are not taken over.
            **kwargs: fields to set or to change.
        """
        return cls(**{**_vit_fields(config), **kwargs})

    def __post_init__(self, **kwargs: Any) -> None:
        if kwargs.get("out_features") is None and kwargs.get("out_indices") is None:
            kwargs["out_indices"] = list(range(1, len(STRIDES) + 1))
        if self.adapter_layers is None:
            depth, parts = self.num_hidden_layers, len(STRIDES)
            self.adapter_layers = sorted({depth * part // parts for part in range(1, parts + 1)} - {0})
        super().__post_init__(**kwargs)

    def _make_stage_names(self) -> list[str]:
        """`stage1` to `stage4` are the maps of strides 4 to 32; `stem` is there because Transformers counts from it."""
        return ["stem"] + [f"stage{index}" for index in range(1, len(STRIDES) + 1)]

    def _check_consistency(self) -> None:
        super()._check_consistency()
        layers = self.adapter_layers
        if not layers or layers != sorted(set(layers)) or layers[0] < 1 or layers[-1] > self.num_hidden_layers:
            raise ValueError(
                f"adapter_layers={layers} does not fit num_hidden_layers={self.num_hidden_layers}: it takes layers "
                f"from 1 to {self.num_hidden_layers} in ascending order, or None for four of them."
            )
        for name in ("adapter_dim", "adapter_num_heads", "adapter_num_points", "adapter_stem_dim"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} is not possible: it must be at least 1.")
        if self.adapter_dim % self.adapter_num_heads:
            raise ValueError(
                f"adapter_dim={self.adapter_dim} is not divisible by adapter_num_heads={self.adapter_num_heads}: "
                "every head needs the same width."
            )
        if self.adapter_feedforward_ratio <= 0:
            raise ValueError(
                f"adapter_feedforward_ratio={self.adapter_feedforward_ratio} is not possible: it must be above 0."
            )
        if self.adapter_norm not in ADAPTER_NORMS:
            raise ValueError(f"adapter_norm={self.adapter_norm!r} is unknown: choose one of {ADAPTER_NORMS}.")


@strict
class SparsePathViTUniversalSegmentationConfig(ConfigRemoteCodeMixin, Mask2FormerConfig):
    """Configuration of `SparsePathViTForUniversalSegmentation`: Mask2Former's fields and the choice of the head.

    Args:
        head (`str`): `"mask2former"` (adapter backbone, pixel decoder and masked-attention decoder, arXiv 2112.01527)
            or `"queries"` (mask queries join the last layers of the ViT, EoMT, arXiv 2503.19108; lighter, recommended
            for large regions).
        backbone_config (`SparsePathViTAdapterConfig` or `SparsePathViTConfig`): of the adapter backbone for
            `"mask2former"`, of the plain ViT for `"queries"`.
        num_query_layers (`int`): how many last layers the queries take part in (`"queries"` only).
        query_feature_dim (`int`): channels of the stride-4 mask features (`"queries"` only).
        freeze_lower_layers (`bool`): whether the layers before the queries' stay as they are (`"queries"` only; the
            adapter has `freeze_vit`).
        **kwargs: the fields of `Mask2FormerConfig`; `num_queries`, the weights and the points of the loss hold for
            both heads.
    """

    model_type = "sparsepath_vit_segmentation"
    own_auto_map = SEGMENTATION_AUTO_MAP
    backbones_supported = ["sparsepath_vit_adapter", "sparsepath_vit"]

    head: str = "mask2former"
    num_query_layers: int = 4
    query_feature_dim: int = 64
    freeze_lower_layers: bool = True

    @classmethod
    def from_vit_config(
        cls,
        config: SparsePathViTConfig,
        head: str = "mask2former",
        freeze_vit: bool = True,
        backbone_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "SparsePathViTUniversalSegmentationConfig":
        """A segmentation model on a ViT of this shape.

        Args:
            config: of the ViT.
            head: "mask2former" or "queries".
            freeze_vit: whether its weights (with "queries": of the layers before the queries') stay as they are.
            backbone_kwargs: fields of the ViT or adapter to set, such as `window_size=64` or `adapter_dim=384`.
            **kwargs: fields of this configuration, such as `id2label` or `num_queries`.

        Raises:
            ValueError: an unknown head or field.
        """
        backbone_class = _backbone_config_class(head)
        backbone_kwargs = dict(backbone_kwargs or {})
        known = {field.name for field in dataclasses.fields(backbone_class)} | {"out_features", "out_indices"}
        unknown = sorted(backbone_kwargs.keys() - known)
        if unknown:
            raise ValueError(f"backbone_kwargs names {unknown}, which {backbone_class.__name__} does not have.")
        if head == "mask2former":
            backbone_kwargs.setdefault("freeze_vit", freeze_vit)
        else:
            kwargs.setdefault("freeze_lower_layers", freeze_vit)
            kwargs.setdefault("num_query_layers", min(cls.num_query_layers, config.num_hidden_layers))
        backbone_config = backbone_class(**{**_vit_fields(config), **backbone_kwargs})
        return cls(head=head, backbone_config=backbone_config, **kwargs)

    def __post_init__(self, **kwargs: Any) -> None:
        # A fresh process knows no model type of ours, so the dictionary of a saved model is converted here.
        backbone_class = _backbone_config_class(self.head)
        if self.backbone_config is None:
            self.backbone_config = backbone_class()
        if isinstance(self.backbone_config, dict):
            given_type = self.backbone_config.get("model_type", backbone_class.model_type)
            if given_type != backbone_class.model_type:
                raise ValueError(
                    f"backbone_config is of the model type {given_type!r}: head={self.head!r} takes "
                    f"{backbone_class.model_type!r}, which {type(self).__name__}.from_vit_config makes."
                )
            self.backbone_config = backbone_class.from_dict(self.backbone_config)
        kwargs.setdefault("auto_map", dict(self.own_auto_map))
        super().__post_init__(**kwargs)
        self._check_consistency()

    def _check_consistency(self) -> None:
        backbone_type = getattr(self.backbone_config, "model_type", None)
        expected = _backbone_config_class(self.head)
        if backbone_type != expected.model_type:
            raise ValueError(
                f"backbone_config is a {type(self.backbone_config).__name__}: head={self.head!r} takes a "
                f"{expected.__name__}. SparsePathViTUniversalSegmentationConfig.from_vit_config makes it."
            )
        if self.head == "mask2former":
            for name in ("feature_size", "hidden_dim"):
                if getattr(self, name) % NORM_GROUPS:
                    raise ValueError(
                        f"{name}={getattr(self, name)} is not divisible by {NORM_GROUPS}, the groups of Mask2Former's "
                        "norms: use 256, or another multiple."
                    )
            return
        depth = self.backbone_config.num_hidden_layers
        if not 1 <= self.num_query_layers <= depth:
            raise ValueError(
                f"num_query_layers={self.num_query_layers} does not fit the backbone: it has {depth} layers."
            )
        if self.query_feature_dim < 1:
            raise ValueError(f"query_feature_dim={self.query_feature_dim} is not possible: it must be at least 1.")


def _backbone_config_class(head: str) -> type[SparsePathViTConfig]:
    if head not in HEADS:
        raise ValueError(f"head={head!r} is unknown: choose one of {', '.join(map(repr, HEADS))}.")
    return SparsePathViTAdapterConfig if head == "mask2former" else SparsePathViTConfig


def _vit_fields(config: SparsePathViTConfig) -> dict[str, Any]:
    """What a configuration says of the ViT itself, not of the checkpoint it comes from or its labels."""
    names = {field.name for field in dataclasses.fields(SparsePathViTConfig) if not field.name.startswith("_")}
    own = names & set(SparsePathViTConfig.__annotations__)
    return {name: getattr(config, name) for name in own}


__all__ = ["SparsePathViTAdapterConfig", "SparsePathViTUniversalSegmentationConfig"]
