# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The DINOv2 backbone inside an exported ONNX graph -> the tensors of Transformers' `Dinov2Model`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from onnx.reference import ReferenceEvaluator
from transformers import Dinov2Config, Dinov2Model

PREFIX = "backbone."
HEAD_DIM = 64  # of every DINOv2
# The order in which Dinov2Model joins them along the tokens: CLS, then the patches.
_POSITIONS = "embeddings.position_embeddings"


def read_backbone(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors by the names of `Dinov2Model`, in float32.

    The exporter keeps the names of biases and norms, and stores the weight of each linear layer transposed and under a
    number; which layer it belongs to is the name of the node that multiplies by it. Position embeddings come apart, as
    that of CLS and that of the patches. Exporting drops the mask token, which inference never uses: it is set to 0.

    Args:
        path: an ONNX file whose nodes and tensors of the backbone are named `backbone...`.

    Raises:
        ValueError: the graph has no such backbone, or a tensor of it has no place.
    """
    graph = onnx.load(path).graph
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    places = {name: name.removeprefix(PREFIX) for name in tensors if name.startswith(PREFIX)}
    positions: dict[str, np.ndarray] = {}
    state: dict[str, torch.Tensor] = {}
    for node in graph.node:
        for name in (name for name in node.input if name in tensors and name not in places):
            array = numpy_helper.to_array(tensors[name])
            if not node.name.startswith("/backbone/"):
                continue
            if node.op_type == "MatMul":
                place = f"{node.name.removeprefix('/backbone/').removesuffix('/MatMul').replace('/', '.')}.weight"
                state[place] = torch.from_numpy(array.T.copy())  # (inputs, outputs) -> (outputs, inputs)
            elif node.name.startswith("/backbone/embeddings/") and array.ndim == 3:
                positions[name] = array  # (1, 1 or rows * columns, width)
    for name, place in places.items():
        state[place] = torch.from_numpy(numpy_helper.to_array(tensors[name]).copy())
    if len(positions) != 2 or not any(array.shape[1] == 1 for array in positions.values()):
        found = [array.shape for array in positions.values()]
        raise ValueError(f"{path.name}: position embeddings of CLS and of the patches were expected, found {found}.")
    in_order = sorted(positions.values(), key=lambda array: array.shape[1])
    state[_POSITIONS] = torch.from_numpy(np.concatenate(in_order, axis=1))
    state["embeddings.mask_token"] = torch.zeros(1, state[_POSITIONS].shape[-1])
    return state


def dinov2_model(state: dict[str, torch.Tensor]) -> Dinov2Model:
    """The network in Transformers, in evaluation mode.

    Args:
        state: what `read_backbone` returned.

    Raises:
        ValueError: a tensor is missing or has no place.
    """
    kernel = state["embeddings.patch_embeddings.projection.weight"]  # (width, 3, patch size, patch size)
    width, patch_size = kernel.shape[0], kernel.shape[-1]
    grid = round((state[_POSITIONS].shape[1] - 1) ** 0.5)
    config = Dinov2Config(
        hidden_size=width,
        num_attention_heads=width // HEAD_DIM,
        num_hidden_layers=len({name.split(".")[2] for name in state if name.startswith("encoder.layer.")}),
        mlp_ratio=state["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        patch_size=patch_size,
        image_size=grid * patch_size,
        layer_norm_eps=1e-6,
    )
    model, loading = Dinov2Model.from_pretrained(
        None, config=config, state_dict=dict(state), output_loading_info=True, dtype=torch.float32
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"The graph's backbone is not a Dinov2Model of this form: {wrong}.")
    return model.eval()


def backbone_output(path: Path, pixel_values: np.ndarray) -> np.ndarray:
    """What the graph itself computes after the backbone's last norm, by the plain NumPy evaluator of `onnx`.

    Args:
        path: the ONNX file.
        pixel_values: (1, 3, height, width) float32, of the size that the graph was exported for.

    Returns:
        (1, 1 + patches, width).
    """
    model = onnx.load(path)
    last = next(node for node in reversed(model.graph.node) if node.name.startswith("/backbone/layernorm/"))
    needed = list(_nodes_before(model.graph, last.output[0]))
    del model.graph.node[:]
    model.graph.node.extend(needed)
    output = onnx.helper.make_tensor_value_info(last.output[0], onnx.TensorProto.FLOAT, None)
    del model.graph.output[:]
    model.graph.output.append(output)
    return ReferenceEvaluator(model).run(None, {model.graph.input[0].name: pixel_values})[0]


def _nodes_before(graph: onnx.GraphProto, name: str) -> Iterator[onnx.NodeProto]:
    """The nodes that a tensor depends on, in the graph's order."""
    wanted, chosen = {name}, []
    for node in reversed(graph.node):  # a graph is sorted, so what makes a tensor stands before what uses it
        if wanted & set(node.output):
            wanted |= set(node.input)
            chosen.append(node)
    return reversed(chosen)
