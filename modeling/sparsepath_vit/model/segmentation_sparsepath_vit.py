# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Segmentation of regions of any size: SparsePathViT with Mask2Former's head or with mask queries of its own.

Both heads predict for each query a class and a mask of stride 4, and are trained with Mask2Former's matching and loss
(arXiv 2112.01527, section 3.2).
"""

from typing import Any

import torch
from torch import nn
from transformers import AutoBackbone, Mask2FormerModel
from transformers.models.mask2former.modeling_mask2former import (
    Mask2FormerForUniversalSegmentationOutput,
    Mask2FormerLoss,
    Mask2FormerPreTrainedModel,
)
from transformers.utils import is_scipy_available
from transformers.utils.generic import can_return_tuple

from .adapter_sparsepath_vit import SparsePathViTAdapterBackbone, reset_like_torch
from .configuration_segmentation_sparsepath_vit import SparsePathViTUniversalSegmentationConfig
from .configuration_sparsepath_vit import SparsePathViTConfig
from .mask2former_parts import lighten_mask2former
from .modeling_sparsepath_vit import SparsePathViTModel
from .query_segmentation_sparsepath_vit import SparsePathViTQuerySegmenter
from .remote_code import ModelRemoteCodeMixin
from .segmentation_inputs import check_group_norm
from .segmentation_labels import check_labels, ignore_unannotated
from .segmentation_postprocessing import post_process_semantic_segmentation, semantic_probabilities


class SparsePathViTForUniversalSegmentation(ModelRemoteCodeMixin, Mask2FormerPreTrainedModel):
    """Semantic, instance or panoptic segmentation; `config.head` says by which head.

    Example:
    ```python
    >>> model = SparsePathViTForUniversalSegmentation.from_pretrained_backbone(
    ...     directory, head="queries", id2label={0: "background", 1: "nucleus"}, backbone_kwargs={"window_size": 64}
    ... )
    >>> outputs = model(pixel_values)
    >>> label_maps = model.post_process_semantic_segmentation(outputs, target_sizes=[(984, 984)])
    ```
    """

    config: SparsePathViTUniversalSegmentationConfig
    config_class = SparsePathViTUniversalSegmentationConfig
    supports_gradient_checkpointing = True
    _no_split_modules = ["SparsePathViTEmbeddings", "SparsePathViTLayer", "SparsePathViTExtractor"]
    # Also here, where a model loaded from the Hub has them at hand.
    post_process_semantic_segmentation = staticmethod(post_process_semantic_segmentation)
    semantic_probabilities = staticmethod(semantic_probabilities)

    def __init__(self, config: SparsePathViTUniversalSegmentationConfig) -> None:
        if not is_scipy_available():
            raise ImportError("The segmentation loss matches masks with scipy: pip install scipy.")
        super().__init__(config)
        if config.head == "mask2former":
            # Mask2Former makes its backbone through AutoBackbone. The configuration of remote code may be of another
            # class of the same name than the one imported here, so it is registered when it is seen.
            AutoBackbone.register(type(config.backbone_config), SparsePathViTAdapterBackbone, exist_ok=True)
            self.model = Mask2FormerModel(config)
            lighten_mask2former(self.model, config)
            query_dim = config.hidden_dim
        else:
            self.model = SparsePathViTQuerySegmenter(config)
            query_dim = config.backbone_config.hidden_size
        self.class_predictor = nn.Linear(query_dim, config.num_labels + 1)
        self.criterion = Mask2FormerLoss(config, self._loss_weights())
        self.post_init()
        self.train(self.training)

    @classmethod
    def from_pretrained_backbone(
        cls,
        pretrained_model_name_or_path: str,
        head: str = "mask2former",
        freeze_vit: bool = True,
        backbone_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> "SparsePathViTForUniversalSegmentation":
        """A new head on a pretrained SparsePathViT.

        Args:
            pretrained_model_name_or_path: folder or Hub name of any SparsePathViT checkpoint.
            head: "mask2former" or "queries".
            freeze_vit: whether the ViT's weights stay as they are; with "queries" its last layers are always trained.
            backbone_kwargs: fields of the ViT or adapter to set, such as `window_size=64` or `adapter_dim=384`.
            **kwargs: fields of `SparsePathViTUniversalSegmentationConfig`, such as `id2label` or `num_queries`.

        Raises:
            ValueError: an unknown head or field, or a checkpoint of another kind of model.
        """
        vit_config = SparsePathViTConfig.from_pretrained(pretrained_model_name_or_path)
        config = cls.config_class.from_vit_config(vit_config, head, freeze_vit, backbone_kwargs, **kwargs)
        model = cls(config)
        pretrained = SparsePathViTModel.from_pretrained(pretrained_model_name_or_path)
        model.load_vit_weights(pretrained.state_dict())
        return model

    def load_vit_weights(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Takes over the weights of a `SparsePathViTModel`.

        Raises:
            ValueError: a weight of the ViT that is missing.
        """
        missing, _ = self.backbone.load_state_dict(state_dict, strict=False)
        missing_of_vit = [name for name in missing if name.split(".")[0] in {"embeddings", "encoder", "norm"}]
        if missing_of_vit:
            raise ValueError(f"state_dict lacks {missing_of_vit[:3]} ({len(missing_of_vit)} weights) of the ViT.")

    @property
    def backbone(self) -> nn.Module:
        """The ViT, with its adapter where the head takes one."""
        return self.model.pixel_level_module.encoder if self.config.head == "mask2former" else self.model.backbone

    def _loss_weights(self) -> dict[str, float]:
        return {
            "loss_cross_entropy": self.config.class_weight,
            "loss_mask": self.config.mask_weight,
            "loss_dice": self.config.dice_weight,
        }

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SparsePathViTQuerySegmenter):
            for part in (module.mask_features, module.mask_head):
                reset_like_torch(part)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        mask_labels: list[torch.Tensor] | None = None,
        class_labels: list[torch.Tensor] | None = None,
        annotated_classes: torch.Tensor | None = None,
        patch_mask: torch.Tensor | None = None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None = None,
        **kwargs: Any,
    ) -> Mask2FormerForUniversalSegmentationOutput:
        """Predicts a class and a mask for each query, and with labels the loss.

        In training the loss sums over all decoder layers (`use_auxiliary_loss`). In evaluation only the last layer's
        masks are kept, and the loss is the last layer's.

        Args:
            pixel_values: (batch, channels, height, width), normalised or of uint8, of any height and width of at least
                one patch.
            mask_labels: for each image (segments, height, width) with 0 and 1.
            class_labels: for each image (segments,) class indices.
            annotated_classes: (batch, num_labels) bool, False for classes an image's annotator did not look for; they
                take no part in that image's loss. All were looked for by default.
            patch_mask: (batch, rows, columns) bool, True where a patch token is present; all are by default.
            image_sizes: (height, width) in pixels of each image on a larger canvas.
            **kwargs: `return_dict`, and what a pipeline or Trainer hands to every model.

        Returns:
            `loss`, `class_queries_logits` (batch, num_queries, num_labels + 1), `masks_queries_logits` (batch,
            num_queries, ceil(height / 4), ceil(width / 4)), and in training `auxiliary_logits` where
            `config.output_auxiliary_logits` asks for them.

        Raises:
            ValueError: inputs or labels that do not fit, or pruning without `unprune` in training.
        """
        is_labelled = mask_labels is not None or class_labels is not None
        if is_labelled:
            check_labels(pixel_values, mask_labels, class_labels, annotated_classes, self.config)
        predict = self._mask2former if self.config.head == "mask2former" else self.model
        states, masks = predict(pixel_values, patch_mask, image_sizes)
        classes = [self.class_predictor(queries) for queries in states]
        loss = None
        if is_labelled:
            loss = self._loss(classes, masks, mask_labels, class_labels, annotated_classes)
        auxiliary = None
        if self.config.output_auxiliary_logits and self.training:
            auxiliary = _auxiliary_predictions(classes, masks)
        return Mask2FormerForUniversalSegmentationOutput(
            loss=loss,
            class_queries_logits=classes[-1],
            masks_queries_logits=masks[-1],
            auxiliary_logits=auxiliary,
        )

    def _mask2former(
        self,
        pixel_values: torch.Tensor,
        patch_mask: torch.Tensor | None,
        image_sizes: torch.Tensor | list[tuple[int, int]] | None,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """The queries' states (batch, queries, hidden_dim) and masks: of all layers in training, else of the last."""
        check_group_norm(pixel_values)  # those of the pixel decoder
        pixel_level, transformer = self.model.pixel_level_module, self.model.transformer_module
        features = pixel_level.encoder(pixel_values, patch_mask=patch_mask, image_sizes=image_sizes).feature_maps
        decoded = pixel_level.decoder(features)
        output = transformer(
            multi_scale_features=decoded.multi_scale_features,
            mask_features=decoded.mask_features,
            output_hidden_states=True,
        )
        states = [queries.transpose(0, 1) for queries in output.intermediate_hidden_states]
        if self.training:
            return states, list(output.masks_queries_logits)
        return states[-1:], [transformer.decoder.mask_predictor.masks(states[-1], decoded.mask_features)]

    def _loss(
        self,
        classes: list[torch.Tensor],
        masks: list[torch.Tensor],
        mask_labels: list[torch.Tensor],
        class_labels: list[torch.Tensor],
        annotated_classes: torch.Tensor | None,
    ) -> torch.Tensor:
        """Weighted sum of the losses of all layers there are predictions of."""
        if annotated_classes is not None:
            classes = [ignore_unannotated(logits, annotated_classes) for logits in classes]
        classes = [logits.float() for logits in classes]
        masks = [logits.float() for logits in masks]
        self.criterion.float()  # its class weights, which a model in bfloat16 has cast along
        use_auxiliary = self.config.use_auxiliary_loss and len(masks) > 1
        losses = self.criterion(
            masks_queries_logits=masks[-1],
            class_queries_logits=classes[-1],
            mask_labels=[labels.float() for labels in mask_labels],
            class_labels=class_labels,
            auxiliary_predictions=_auxiliary_predictions(classes, masks) if use_auxiliary else None,
        )
        weights = self._loss_weights()
        # The auxiliary losses are called like the main ones with the layer's number behind.
        return sum(
            weight * loss for kind, weight in weights.items() for name, loss in losses.items() if name.startswith(kind)
        )


def _auxiliary_predictions(classes: list[torch.Tensor], masks: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
    return [
        {"masks_queries_logits": layer_masks, "class_queries_logits": layer_classes}
        for layer_masks, layer_classes in zip(masks[:-1], classes[:-1], strict=True)
    ]


__all__ = ["SparsePathViTForUniversalSegmentation"]
