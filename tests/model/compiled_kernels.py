# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Compiles the Triton kernels for GPUs that need not be there, and prints what the assembler says of each as JSON.

Run as a program, because Triton decides on import whether kernels are compiled or interpreted:

    python tests/model/compiled_kernels.py '[["forward", "bfloat16", 64, 64, 90]]'

takes (kernel, dtype, head_dim, tile size, compute capability) and prints a list of {"registers", "spilled_bytes",
"shared_bytes", "matrix_products", "asynchronous_copies"}. Of "add_scaled" and "gated_silu" it takes the width, of
"prune_score" the head_dim, and ignores the tile size. Attention kernels report "instructions", too: those of one step
of a tile's three loops, "whole", "rest" and "masked". "forward stratified" and the others of that kind are the same
kernels with context tokens, those that stream keys with a fourth loop, "context"; "forward weighted" has weights of
keys, too. "context_key_value", "mean_block", "mean_all", "mean_merge" and "mean_gradient" come beside them.
Another version of Triton is counted by putting its folder first on PYTHONPATH.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from sparsepath_vit.model import attention_triton_context, fused_elementwise_triton, prune_score_triton
from sparsepath_vit.model import attention_triton_launch as kernels
from sparsepath_vit.model.attention_triton_launch import launch_shape

TRITON_TYPES = {"bfloat16": "*bf16", "float16": "*fp16", "float32": "*fp32"}
INTEGER_TABLES = (
    "image_of_row_ptr",
    *("table_ptr", "image_ptr", "entry_ptr", "tile_entry_ptr", "entry_offset_ptr", "step_ptr", "step_bound_ptr"),
)
# What is listed of context tokens, and where each image's start.
LONG_TABLES = (
    *("image_offset_ptr", "context_start_ptr", "start_ptr", "token_ptr", "context_weight_ptr"),
    *("block_row_ptr", "block_column_ptr"),
)
FLOAT32_TENSORS = (
    *("partial", "logsumexp", "delta", "score", "context_bias", "bias", "weight", "grad_mean"),
    *("values", "sum"),
    *("mean_output", "mean_logsumexp", "mean_delta"),
)
LOOPS = ("whole", "rest", "masked")


def source(kernel, dtype, constants, form="weighted"):
    """The kernel with the arguments of a fused projection: aligned pointers, strides divisible by 16.

    Keys have weights where the form is "weighted" and there are context tokens where it is that or "stratified".
    """
    names = [parameter.name for parameter in kernel.params]
    absent = [] if form == "weighted" else ["weight_ptr"]
    if not form:
        absent += [name for name in names if name.startswith(("context_", "mean_", "grad_mean", "partial_mean"))]
        absent += ["entry_ptr", "tile_entry_ptr", "entry_offset_ptr"]
    constants = constants | dict.fromkeys(absent)
    signature, hints = {}, {}
    for index, parameter in enumerate(kernel.params):
        name = parameter.name
        if parameter.is_constexpr or name in absent:
            signature[name] = "constexpr"
            continue
        if name in INTEGER_TABLES:
            signature[name] = "*i32"
        elif name in LONG_TABLES:
            signature[name] = "*i64"
        elif name.startswith(FLOAT32_TENSORS):
            signature[name] = "*fp32"
        elif name.endswith("_ptr"):
            signature[name] = TRITON_TYPES[dtype]
        else:
            signature[name] = "fp32" if name.endswith("scale") or name == "eps" else "i32"
        if name.endswith(("_ptr", "stride")) or name == "context_size":
            hints[(index,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, {name: value for name, value in constants.items() if name in names}, hints)


def loop_lengths(binary):
    """Instructions of each loop, in the order of the program; those of a few only wait."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(binary)
        command = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm", "-c", path]
        listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    labels, lengths, count = {}, [], 0
    for line in listing.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = count
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            count += 1
            target = re.search(r"BRA.*?(\.L_x_\d+)", instruction[1])
            # A jump back to a label that was passed ends a loop.
            if target and target[1] in labels:
                lengths.append(count - labels[target[1]])
    return [length for length in lengths if length > 8]


def compile_attention_kernel(name, dtype, head_dim, tile_size, capability):
    name, _, form = name.partition(" ")
    shape = launch_shape(name, head_dim, getattr(torch, dtype), tile_size, capability // 10)
    constants = {
        "NUM_GLOBALS": 9,
        "NUM_RUNS": 3,
        "HEAD_DIM": head_dim,
        "PARTS": tile_size // shape.block_m,
        "BLOCK_G": 16,
        "BLOCK_M": shape.block_m,
        "BLOCK_N": shape.block_n,
        "BLOCK_R": 16,
    }
    options = {"num_warps": shape.num_warps, "num_stages": shape.num_stages}
    kernel = source(getattr(kernels, f"{name}_kernel"), dtype, constants, form)
    report, binary = report_of(kernel, options, capability)
    # Loops of the global queries' splits come first.
    loops = (*LOOPS, "context") if form and name != "backward_key_value" else LOOPS
    return report | {"instructions": dict(zip(loops, loop_lengths(binary)[-len(loops) :], strict=True))}


def compile_stratified_kernel(name, dtype, head_dim, capability):
    """Kernels that are launched with context tokens only."""
    options = {"num_warps": 4}
    constants = {"NUM_GLOBALS": 9, "RADIUS": 1, "HEAD_DIM": head_dim, "BLOCK_G": 16, "BLOCK_N": 32}
    constants |= {"BLOCK_E": 16, "BLOCK_S": 8}
    if name == "context_key_value":
        constants |= {"BLOCK_M": attention_triton_context.context_block(getattr(torch, dtype)), "BLOCK_R": 16}
        options = attention_triton_context.context_launch_options(getattr(torch, dtype), head_dim)
    kernel = source(getattr(attention_triton_context, f"{name}_kernel"), dtype, constants)
    report, binary = report_of(kernel, options, capability)
    return report | {"loops": loop_lengths(binary)}


def compile_fused_kernel(name, dtype, width, capability):
    block = {"add_scaled": "add_scaled_block", "gated_silu": "gated_silu_block"}[name]
    block = getattr(fused_elementwise_triton, block)(width)
    constants = dict.fromkeys(("SCALES", "NORMALISES", "SHIFTS"), True)
    constants |= {"WIDTH": width, "BLOCK_M": block, "BLOCK_N": block}
    kernel = getattr(fused_elementwise_triton, f"{name}_kernel")
    options = {"num_warps": fused_elementwise_triton.NUM_WARPS}
    return report_of(source(kernel, dtype, constants), options, capability)[0]


def compile_prune_score_kernel(dtype, head_dim, capability):
    constants = {
        "NUM_GLOBALS": 9,
        "NUM_QUERIES": 9,
        "WEIGHS_VALUES": True,
        "HEAD_DIM": head_dim,
        "BLOCK_G": 16,
        "BLOCK_N": prune_score_triton.score_block(getattr(torch, dtype)),
    }
    options = {"num_warps": prune_score_triton.NUM_WARPS}
    return report_of(source(prune_score_triton.prune_score_kernel, dtype, constants), options, capability)[0]


def compile_kernel(name, dtype, size, tile_size, capability):
    if name in ("add_scaled", "gated_silu"):
        return compile_fused_kernel(name, dtype, size, capability)
    if name == "prune_score":
        return compile_prune_score_kernel(dtype, size, capability)
    if name.startswith(("mean", "context", "sum_of_images")):
        return compile_stratified_kernel(name, dtype, size, capability)
    return compile_attention_kernel(name, dtype, size, tile_size, capability)


def report_of(source, options, capability):
    """What the assembler says of one kernel, and the machine code."""
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    ptx = compiled.asm["ptx"]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.ptx"
        path.write_text(ptx)
        architecture = f"sm_{capability}{'a' if capability >= 90 else ''}"
        command = [get_ptxas(capability).path, "-v", f"--gpu-name={architecture}", path, "-o", path.with_suffix(".o")]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return {
        "registers": int(re.search(r"Used (\d+) registers", report)[1]),
        "spilled_bytes": int(re.search(r"(\d+) bytes spill stores", report)[1]),
        "shared_bytes": compiled.metadata.shared,
        "matrix_products": ptx.count("wgmma.mma_async") + ptx.count("mma.sync"),
        "asynchronous_copies": ptx.count("cp.async.c"),
    }, compiled.asm["cubin"]


if __name__ == "__main__":
    print(json.dumps([compile_kernel(*case) for case in json.loads(sys.argv[1])]))
