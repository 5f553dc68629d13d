# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The layers of SparsePathViT and the encoder that runs them, with the pruning step between two of them."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .attention_dense import dense_attention_mask, dense_stratified_attention, eager_attention_forward
from .attention_registration import ATTENTION_NAME
from .configuration_sparsepath_vit import SparsePathViTConfig
from .context_tokens import ContextTokens, draw_context_tokens, exact_tokens
from .embeddings import OnTokens
from .fused_elementwise import add_scaled_, add_scaled_and_normalise, fuses_layer, gated_silu
from .linear_products import add_product_, adds_product, scaled_weights
from .mean_query_correction import mean_queries
from .streamed_layers import run_in_strips, streams
from .token_grid import TokenGrid, per_image
from .token_pruning import EncodedTokens, attention_received, prune, prune_scores

# Called with the number of layers run so far, from 0, and the tokens; returns them, changed or not.
AfterLayer = Callable[[int, EncodedTokens], EncodedTokens]


class SparsePathViTLayerScale(nn.Module):
    """A learned factor per channel on a residual branch."""

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__()
        self.lambda1 = nn.Parameter(torch.full((config.hidden_size,), float(config.layerscale_value)))

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states * self.lambda1


class SparsePathViTDropPath(nn.Module):
    """Stochastic depth: drops a residual branch for whole images in training (arXiv 1603.09382)."""

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, hidden_states: torch.Tensor, grid: TokenGrid) -> torch.Tensor:
        if self.drop_prob == 0.0 or not self.training:
            return hidden_states
        keep_prob = 1.0 - self.drop_prob
        factors = torch.rand(grid.batch_size, device=hidden_states.device).lt(keep_prob).to(hidden_states) / keep_prob
        tokens = per_image([grid.num_global_tokens + count for count in grid.counts], hidden_states.device)
        factors = torch.repeat_interleave(factors, tokens, output_size=grid.num_tokens)
        return hidden_states * factors.view(*grid.batch_shape, 1)


class SparsePathViTAttention(nn.Module):
    """Multi-head attention over the pattern of a `TokenGrid`, by the implementation named in the config.

    Args:
        config: of the model.
        draw: number of the draw of context tokens; each layer has its own.
    """

    def __init__(self, config: SparsePathViTConfig, draw: int = 0) -> None:
        super().__init__()
        self.config = config
        self.draw = draw
        self.num_heads = config.num_attention_heads
        self.head_dim = config.head_dim
        self.scaling = config.head_dim**-0.5
        self.is_causal = False
        self.qkv = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=config.qkv_bias)
        self.projection = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(
        self,
        hidden_states: torch.Tensor,
        grid: TokenGrid,
        attention_mask: Any = None,
        score_tokens: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        batch, tokens, _ = hidden_states.shape
        query, key, value = self.query_key_value(hidden_states)
        implementation = self.config._attn_implementation
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(implementation, eager_attention_forward)
        settings = {"scaling": self.scaling, "dropout": self.config.attention_dropout if self.training else 0.0}
        context, states = self.context_tokens(query, key, value, grid), (query, key, value)
        if context is None or implementation == ATTENTION_NAME:
            settings |= {"token_grid": grid, "context_tokens": context, "with_logsumexp": score_tokens}
            attended, weights = attend(self, *states, attention_mask, **settings)
        else:
            attended, weights = dense_stratified_attention(
                implementation, attend, self, *states, grid, context, **settings
            )
        scores = logsumexp = None
        if implementation == ATTENTION_NAME:  # which has no weights
            weights, logsumexp = None, weights
        if score_tokens:
            kind = self.config.prune_score
            scores = prune_scores(query, key, value, grid, scale=self.scaling, kind=kind, logsumexp=logsumexp)
        # (batch, tokens, heads, head_dim) -> (batch, tokens, hidden_size)
        return self.projection(attended.reshape(batch, tokens, -1)), weights, scores

    def context_tokens(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, grid: TokenGrid
    ) -> ContextTokens | None:
        """The context tokens of this layer; `None` where the grid has none. No gradient passes through the choice."""
        if not grid.has_context:
            return None
        packed = query.detach().transpose(1, 2).flatten(0, 1)  # (M, heads, head_dim)
        of_cls = packed[grid.global_indices()[:: grid.num_global_tokens]]
        observers = torch.stack([of_cls, mean_queries(packed, grid)], dim=2)  # (images, heads, 2, head_dim)
        scores = attention_received(observers, key, value, grid, self.scaling)
        return draw_context_tokens(grid, exact_tokens(scores, grid), self.draw)

    def query_key_value(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(batch, tokens, hidden_size) normalised tokens -> three of (batch, heads, tokens, head_dim)."""
        batch, tokens, _ = hidden_states.shape
        qkv = self.qkv(hidden_states).view(batch, tokens, 3, self.num_heads, self.head_dim)
        return qkv.permute(2, 0, 3, 1, 4).unbind(0)


class SparsePathViTMLP(nn.Module):
    """Two linear layers with an exact GELU, or a SwiGLU whose gate and value share `fc1` (gate first, as in timm)."""

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__()
        self.is_gated = config.mlp_type == "swiglu"
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size * (2 if self.is_gated else 1))
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.activations(hidden_states))

    def activations(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """What `fc2` gets: (..., hidden_size) -> (..., intermediate_size)."""
        hidden_states = self.fc1(hidden_states)
        if self.is_gated:
            return gated_silu(hidden_states, may_fuse=not self.training)
        is_seen = torch.is_grad_enabled() or torch.compiler.is_compiling() or torch.jit.is_tracing()
        if is_seen or self.fc1._forward_hooks:
            return nn.functional.gelu(hidden_states)
        # In place: beside the keys this is the largest tensor of a strip, and nobody else has it.
        return torch.ops.aten.gelu_(hidden_states)


class SparsePathViTLayer(GradientCheckpointingLayer):
    """Pre-norm attention and MLP, each scaled by LayerScale and added to the residual stream."""

    def __init__(self, config: SparsePathViTConfig, drop_path: float, number: int = 0) -> None:
        super().__init__()
        self.config = config
        self.norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = SparsePathViTAttention(config, draw=number)
        self.norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = SparsePathViTMLP(config)
        if config.use_layerscale:
            self.layer_scale1 = SparsePathViTLayerScale(config)
            self.layer_scale2 = SparsePathViTLayerScale(config)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.drop_path = SparsePathViTDropPath(drop_path)

    def forward(
        self, hidden_states: torch.Tensor, grid: TokenGrid, attention_mask: Any = None, score_tokens: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Returns the tokens, the attention probabilities (eager only) and the prune scores (where asked for)."""
        branch, weights, scores = self.attention(self.norm1(hidden_states), grid, attention_mask, score_tokens)
        if not self.training and fuses_layer(hidden_states, branch, *self._between_products()):
            return self.add_branches(hidden_states, branch), weights, scores
        if self.config.use_layerscale:
            branch = self.layer_scale1(branch)
        hidden_states = hidden_states + self.drop_path(self.dropout(branch), grid)
        branch = self.mlp(self.norm2(hidden_states))
        if self.config.use_layerscale:
            branch = self.layer_scale2(branch)
        return hidden_states + self.drop_path(self.dropout(branch), grid), weights, scores

    def _between_products(self) -> tuple[nn.Module, ...]:
        """The modules whose work `add_branches` does without calling them."""
        scales = (self.layer_scale1, self.layer_scale2) if self.config.use_layerscale else ()
        return (*scales, self.norm2, self.dropout, self.drop_path)

    def add_branches(
        self, hidden_states: torch.Tensor, branch: torch.Tensor, output: torch.Tensor | None = None
    ) -> torch.Tensor:
        """At inference, the layer from its attention branch on, each elementwise step in one pass over the tokens.

        Args:
            hidden_states: (..., tokens, hidden_size), what the layer got.
            branch: (..., tokens, hidden_size), what its attention made of it.
            output: takes the result, and may be `hidden_states` itself; `None` for a new tensor.

        Returns:
            (..., tokens, hidden_size).
        """
        scale1 = self.layer_scale1.lambda1 if self.config.use_layerscale else None
        scale2 = self.layer_scale2.lambda1 if self.config.use_layerscale else None
        if not adds_product(hidden_states, self.mlp.fc2, self.mlp):
            hidden_states, normalised = add_scaled_and_normalise(hidden_states, branch, scale1, self.norm2, output)
            return add_scaled_(hidden_states, self.mlp(normalised), scale2)
        weight, bias = scaled_weights(self.mlp.fc2, scale2)
        hidden_states, normalised = add_scaled_and_normalise(hidden_states, branch, scale1, self.norm2, output, bias)
        return add_product_(hidden_states, self.mlp.activations(normalised), weight)


class EncoderOutput(NamedTuple):
    """What the encoder saw, in the grid's order.

    Attributes:
        states: the tokens before the first layer and after each; empty unless asked for. After the pruning layer they
            are those before pruning.
        last: the tokens after the last layer and pruning.
        attentions: probabilities of each layer and their grid; empty unless asked for.
    """

    states: list[EncodedTokens]
    last: EncodedTokens
    attentions: list[tuple[torch.Tensor, TokenGrid]]


class SparsePathViTEncoder(nn.Module):
    """The layers, and the one pruning step between two of them."""

    def __init__(self, config: SparsePathViTConfig) -> None:
        super().__init__()
        self.config = config
        depth = config.num_hidden_layers
        self.layers = nn.ModuleList(
            [
                SparsePathViTLayer(config, config.drop_path_rate * index / max(depth - 1, 1), index)
                for index in range(depth)
            ]
        )
        self.gradient_checkpointing = False

    def forward(
        self,
        embed: Callable[[], EncodedTokens],
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        after_layer: AfterLayer | None = None,
        may_prune: bool = True,
        on_tokens: OnTokens | None = None,
    ) -> EncoderOutput:
        """Runs all layers.

        Args:
            embed: makes the embedded tokens. A function, so that nobody else holds them: at inference layers write over
                them, strip by strip (unless `output_hidden_states` or `after_layer` keep them), and what pruning
                removes leaves the memory.
            output_hidden_states: whether to keep the tokens after each layer.
            output_attentions: whether to keep the attention probabilities.
            after_layer: reads or changes the tokens before the first layer and after each, before any pruning there;
                it may also bring global tokens in.
            may_prune: `False` keeps all tokens, whatever the config says.
            on_tokens: called as a layer proceeds, with the number of patch tokens that it has just finished.
        """
        tokens = embed()
        if after_layer is not None:
            tokens = after_layer(0, tokens)
        states, attentions = [tokens] if output_hidden_states else [], []
        # Where all states are kept anyway, those before pruning cost nothing.
        keeps_removed = output_hidden_states or self.config.unprune is not None
        overwrites = not output_hidden_states and after_layer is None
        mask = self._attention_mask(tokens)
        for number, layer in enumerate(self.layers, start=1):
            prunes_here = may_prune and self.config.prunes and number == self.config.prune_after_layer
            tokens, weights, scores = _run(layer, tokens, mask, prunes_here, overwrites, on_tokens)
            if output_attentions:
                attentions.append((weights, tokens.grid))
            if output_hidden_states:
                states.append(tokens)
            grid_before = tokens.grid
            if after_layer is not None:
                tokens = after_layer(number, tokens)
            if prunes_here:
                settings = (self.config.prune_ratio, keeps_removed, self.config.num_representatives)
                tokens = prune(tokens, scores, *settings)
            if tokens.grid is not grid_before:
                mask = self._attention_mask(tokens)
        return EncoderOutput(states, tokens, attentions)

    def _attention_mask(self, tokens: EncodedTokens) -> Any:
        implementation = self.config._attn_implementation
        if implementation == ATTENTION_NAME or tokens.grid.has_context:  # with context each layer makes its own
            return None
        heads = self.config.num_attention_heads
        return dense_attention_mask(tokens.grid, implementation, heads, tokens.hidden_states.dtype)


def _run(
    layer: SparsePathViTLayer,
    tokens: EncodedTokens,
    mask: Any,
    score_tokens: bool,
    overwrites: bool,
    on_tokens: OnTokens | None,
) -> tuple[EncodedTokens, torch.Tensor | None, torch.Tensor | None]:
    """One layer; a name for its bare output in the caller would keep removed tokens alive."""
    if streams(layer, tokens.hidden_states, tokens.grid):
        hidden_states, scores = run_in_strips(
            layer,
            tokens.hidden_states,
            tokens.grid,
            overwrites=overwrites,
            score_tokens=score_tokens,
            on_tokens=on_tokens,
        )
        return tokens._replace(hidden_states=hidden_states), None, scores
    hidden_states, weights, scores = layer(tokens.hidden_states, tokens.grid, mask, score_tokens)
    if on_tokens is not None:
        on_tokens(sum(tokens.grid.counts))
    grid = tokens.grid.to(hidden_states.device)  # the layers may lie on several devices
    return tokens._replace(hidden_states=hidden_states, grid=grid), weights, scores
