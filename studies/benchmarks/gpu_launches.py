# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Steps of the acceptance about launches: a forward captured in a CUDA graph, and how often kernels are compiled."""

import time
from collections.abc import Callable, Iterator

import torch

from sparsepath_vit.conversion import architecture
from sparsepath_vit.model import attention_triton_context, attention_triton_launch
from sparsepath_vit.model.attention_triton_launch import launch_block_attention, launch_block_attention_backward
from sparsepath_vit.model.attention_triton_tables import attention_tiles
from sparsepath_vit.model.modeling_sparsepath_vit import SparsePathViTModel

from .acceptance import Finding, Scale, wait
from .attention import AttentionCase
from .gpu_stratified import layer_context
from .model import random_weights


@torch.no_grad()
def cuda_graph(scale: Scale) -> Iterator[Finding]:
    """A whole forward with pruning, captured once and replayed on new pixels; without and with context tokens."""
    for context_tokens in (0, scale.context_tokens):
        yield _cuda_graph(scale, context_tokens)


def _cuda_graph(scale: Scale, context_tokens: int) -> Finding:
    config = architecture(scale.architectures[0]).build_config(
        num_hidden_layers=4,
        prune_after_layer=2,
        prune_ratio=0.6,
        window_size=scale.windows[0],
        num_context_tokens=context_tokens,
    )
    model = random_weights(SparsePathViTModel, config, scale.dtype, scale.device)
    size = min(scale.sizes[-1], 3430)
    first, second = torch.randn(2, 1, 3, size, size, device=scale.device).to(scale.dtype)
    expected = model(second)
    replay, outputs = captured(model, first.clone(), scale)
    replay(second)
    actual = outputs()
    seconds = seconds_of(lambda: replay(second), scale)
    eager_seconds = seconds_of(lambda: model(second), scale)
    is_equal = torch.equal(actual.last_hidden_state, expected.last_hidden_state)
    kept_alike = (actual.patch_positions == expected.patch_positions).all(dim=-1).float().mean().item()
    difference = (actual.pooler_output.double() - expected.pooler_output.double()).norm().item()
    difference /= expected.pooler_output.double().norm().item()
    beside = f", {context_tokens:,} context tokens" if context_tokens else ""
    return Finding(
        f"4 layers, {size} px, pruned{beside}, replayed on new pixels",
        f"{'bitwise equal' if is_equal else 'not bitwise equal'}, CLS differs by {difference:.1e}, places kept alike "
        f"{kept_alike:.2%}; {1000 * seconds:.2f} ms against {1000 * eager_seconds:.2f} ms eager",
        "CLS differs by 1e-2 at most",
        difference <= 1e-2,
        (
            {
                "size": size,
                "context_tokens": context_tokens,
                "is_equal": is_equal,
                "cls_difference": difference,
                "seconds": seconds,
                "eager_seconds": eager_seconds,
            },
        ),
    )


def seconds_of(call: Callable[[], object], scale: Scale) -> float:
    """Mean seconds of a call among `scale.repeats` of them in a row."""
    wait(scale)
    start = time.perf_counter()
    for _ in range(scale.repeats):
        call()
    wait(scale)
    return (time.perf_counter() - start) / scale.repeats


def captured(
    model: SparsePathViTModel, pixel_values: torch.Tensor, scale: Scale
) -> tuple[Callable[[torch.Tensor], None], Callable[[], object]]:
    """A function that runs the model's graph on other pixels, and one that gives what it wrote."""
    if scale.is_rehearsal:
        results = [model(pixel_values)]
        return lambda pixels: results.__setitem__(0, model(pixels)), lambda: results[0]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            model(pixel_values)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(pixel_values)

    def replay(pixels: torch.Tensor) -> None:
        pixel_values.copy_(pixels)
        graph.replay()

    return replay, lambda: outputs


def num_compiled() -> dict[str, int]:
    """How many forms of each kernel this process has compiled or loaded; none where they are interpreted."""
    counts = {}
    for module in (attention_triton_launch, attention_triton_context):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            caches = getattr(getattr(module, name), "device_caches", {})
            counts[name] = sum(len(cache[0]) for cache in caches.values())
    return counts


def compilations(scale: Scale) -> Iterator[Finding]:
    """Forms of each kernel over ten image sizes and two numbers of heads; one of each would do."""
    for context_tokens in (0, scale.context_tokens):
        yield _compilations(scale, context_tokens)


def _compilations(scale: Scale, context_tokens: int) -> Finding:
    """With or without context tokens, of which there are some to see from three blocks a side on."""
    sides = [9 + 2 * index for index in range(10)] if scale.is_rehearsal else [33 + 27 * index for index in range(10)]
    before, seconds = num_compiled(), []
    for heads in (scale.heads, scale.heads // 4 or 1):
        for side in sides[:2] if scale.is_rehearsal else sides:
            problem = (side * side, scale.windows[0], 1.0, heads, scale.head_dim, scale.dtype, scale.device, 3)
            grid = (case := AttentionCase(*problem, context_tokens=context_tokens)).grid()
            states = [tensor[0].transpose(0, 1) for tensor in case.states(grid)]
            settings = (attention_tiles(grid), 0.125, layer_context(states[0], grid))
            wait(scale)
            start = time.perf_counter()
            output, logsumexp = launch_block_attention(*states, *settings)
            launch_block_attention_backward(output, *states, output, logsumexp, *settings)
            wait(scale)
            seconds.append(time.perf_counter() - start)
    forms = {name: count - before[name] for name, count in num_compiled().items()}
    listed = ", ".join(f"{name.removesuffix('_kernel')} {count}" for name, count in forms.items())
    beside = f", {context_tokens:,} context tokens" if context_tokens else ""
    return Finding(
        f"{len(seconds)} problems of {len(seconds) // 2} sizes, 2 numbers of heads{beside}",
        f"forms: {listed}; first call {seconds[0]:.1f} s, longest later {max(seconds[1:]):.2f} s",
        "1 form of each",
        max(forms.values()) <= 1,
        tuple({"kernel": name, "context_tokens": context_tokens, "forms": count} for name, count in forms.items()),
    )
