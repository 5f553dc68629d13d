# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What each of several processes of `test_process_split.py` does: images that they share, case after case.

Processes take seconds to start and to meet, so all cases run in one set of them. Each writes what it found to a file.
"""

import os
import time
from datetime import timedelta

import torch
from small_models import random_mask, random_pixels, small_model
from torch import distributed

from sparsepath_vit import SparsePathViTForImageClassification, SparsePathViTModel
from sparsepath_vit.model.processes import LostProcessError

ROWS, COLUMNS = 29, 9
TIMEOUT_SECONDS = 120
LOST_AFTER_SECONDS = 2
KILLED = 3


def uneven_model():
    """Keeps patch tokens that differ from each other only: those of the image `top`."""
    model = small_model(SparsePathViTModel, prune_ratio=0.93, tokens_per_strip=40)
    with torch.no_grad():
        model.embeddings.position_embeddings.zero_()
    return model.double()


def top_pixels():
    """Blank below the first 8 of 29 token rows."""
    pixels = random_pixels(1, ROWS, COLUMNS)
    pixels[:, :, 8 * 4 :] = 0
    return pixels.double()


def masked():
    """A mask with empty rows of blocks, one of them the last."""
    patch_mask = random_mask(1, ROWS, COLUMNS, 0.4)
    patch_mask[:, 4:8], patch_mask[:, 28:] = False, False
    return patch_mask


# Name -> what changes of the model, and what else it is called with. Float64 unless the model says otherwise.
EQUAL = {
    "radius 0": ({"neighbor_radius": 0, "prune_ratio": 0.6}, {}),
    "radius 1": ({"neighbor_radius": 1, "prune_ratio": 0.6}, {}),
    "radius 2": ({"neighbor_radius": 2, "prune_ratio": 0.6}, {}),
    "radius 5, beyond the next process": ({"neighbor_radius": 5}, {}),
    "whole shares": ({"tokens_per_strip": 0, "prune_ratio": 0.3}, {}),
    "mask": ({"prune_ratio": 0.5, "pooling": "cls_mean"}, {"patch_mask": masked()}),
    "smaller than its canvas": ({}, {"image_sizes": [(99, 30)]}),
    "representatives": ({"prune_ratio": 0.6, "num_representatives": 12, "pooling": "cls_mean"}, {}),
    "cls_attention": ({"prune_ratio": 0.4, "prune_score": "cls_attention", "num_register_tokens": 0}, {}),
    "attention_value": ({"prune_ratio": 0.4, "prune_score": "attention_value"}, {}),
    "pruned after the last layer": ({"prune_ratio": 0.4, "prune_after_layer": 4}, {}),
    "gelu": ({"mlp_type": "gelu", "use_layerscale": False}, {}),
}


def equal_models():
    """(name, model, pixels, arguments) of each case in which processes are to give the numbers of one."""
    for name, (settings, arguments) in EQUAL.items():
        model = small_model(SparsePathViTModel, **{"tokens_per_strip": 40, **settings})
        yield name, model.double(), random_pixels(1, ROWS, COLUMNS).double(), arguments
    yield "uneven", uneven_model(), top_pixels(), {}
    normalisation = {"image_mean": [0.6, 0.5, 0.7], "image_std": [0.2, 0.3, 0.2]}
    float32 = small_model(SparsePathViTModel, tokens_per_strip=40, prune_ratio=0.6, **normalisation)
    yield "float32", float32, random_pixels(1, ROWS, COLUMNS), {}
    yield "uint8", float32, (40 * random_pixels(1, ROWS, COLUMNS) + 100).clamp(0, 255).to(torch.uint8), {}
    classifier = small_model(SparsePathViTForImageClassification, num_labels=3, pooling="cls_mean").double()
    yield "classifier", classifier, random_pixels(1, ROWS, COLUMNS).double(), {}


@torch.no_grad()
def outputs_of(model, pixels, **arguments):
    return {name: value for name, value in model(pixels, **arguments).items() if isinstance(value, torch.Tensor)}


def in_processes(found):
    for name, model, pixels, arguments in equal_models():
        with model.split_over_processes():
            found[name] = outputs_of(model, pixels, **arguments)


def in_groups_of_one(rank, number, found):
    groups = [distributed.new_group([member]) for member in range(number)]
    model = small_model(SparsePathViTModel, prune_ratio=0.6, tokens_per_strip=40)
    with model.split_over_processes(groups[rank]):
        found["a group of one"] = outputs_of(model, random_pixels(1, ROWS, COLUMNS))


def counted(found):
    """Bytes that this process sends to each other one amid rows, and bytes of what all gather, call by call."""
    sent, gathered, transfer, gather = [], [], distributed.batch_isend_irecv, distributed.all_gather

    def spied_transfer(operations):
        sent.append(sum(each.tensor.nbytes for each in operations if each.op is distributed.isend))
        return transfer(operations)

    def spied_gather(everything, own, group):
        gathered.append(own.nbytes)
        return gather(everything, own, group)

    model = small_model(SparsePathViTModel, tokens_per_strip=40)
    pixels = random_pixels(1, ROWS, COLUMNS)
    with torch.no_grad(), model.split_over_processes():
        grid = model.token_grid(pixels)
        # Objects are gathered before the layers, as bytes: what the cases compare begins with the layers.
        embed_strips = model.embeddings.embed_strips
        model.embeddings.embed_strips = lambda *arguments: (sent.clear(), gathered.clear(), embed_strips(*arguments))[2]
        distributed.batch_isend_irecv, distributed.all_gather = spied_transfer, spied_gather
        try:
            model.encode(pixels, grid)
        finally:
            distributed.batch_isend_irecv, distributed.all_gather = transfer, gather
    found["bytes sent"], found["bytes gathered"] = sent, gathered


def progress(found):
    model, calls = small_model(SparsePathViTModel, prune_ratio=0.5, tokens_per_strip=40), []
    pixels = random_pixels(1, ROWS, COLUMNS)
    with torch.no_grad(), model.split_over_processes():
        model.encode(pixels, model.token_grid(pixels), on_tokens=calls.append)
    found["progress"] = calls


def refused(rank, found):
    """Each wrong use, then right use, in the same processes."""
    pixels = random_pixels(1, ROWS, COLUMNS)

    def attempt(name, settings=None, pixels=pixels, change=None, enters=torch.no_grad, **arguments):
        model = small_model(SparsePathViTModel, **(settings or {}))
        if change is not None:
            change(model)
        try:
            with enters(), model.split_over_processes():
                model(pixels, **arguments)
        except ValueError as error:
            found[name] = f"{type(error).__name__}: {error}"

    mine = pixels.clone()
    mine[0, 0, 50, 5] += rank
    attempt("other pixels", pixels=mine)
    attempt("another size", pixels=pixels[:, :, : (ROWS - rank) * 4])
    patch_mask = torch.ones(1, ROWS, COLUMNS, dtype=torch.bool)
    patch_mask[0, 20, rank] = False
    attempt("another mask", patch_mask=patch_mask)
    attempt("another configuration", {"neighbor_radius": 1 + rank % 2})
    attempt("other weights", change=lambda model: model.norm.bias.data[3:4].add_(rank))
    attempt("NaN in one process", pixels=torch.where(torch.tensor(rank == 1), torch.nan, pixels))
    attempt("fewer block rows than processes", pixels=pixels[:, :, : 4 * 4])
    attempt("two images", pixels=pixels.expand(2, -1, -1, -1))
    attempt("context tokens", {"num_context_tokens": 9})
    attempt("unprune", {"prune_ratio": 0.5, "unprune": "scatter"})
    attempt("hidden states", output_hidden_states=True)
    attempt("gradients", enters=torch.enable_grad)
    attempt("training", change=lambda model: model.train())
    attempt("dense", change=lambda model: model.set_attn_implementation("sdpa"))
    attempt("a hook", change=lambda model: model.encoder.layers[1].mlp.register_forward_hook(lambda *states: None))
    attempt("right use")


def slow(rank, found):
    """A process that takes longer is waited for."""
    model, pixels = small_model(SparsePathViTModel), random_pixels(1, ROWS, COLUMNS)
    seconds = 0.1 * rank
    with torch.no_grad(), model.split_over_processes():
        encoded = model.encode(pixels, model.token_grid(pixels), on_tokens=lambda tokens: time.sleep(seconds))
        found["slow"] = model.finish(encoded).pooler_output


def lost(name, found, group, happens):
    """What this process hears when another is lost amid the layers, and when it goes on nevertheless."""
    model, pixels = small_model(SparsePathViTModel), random_pixels(1, ROWS, COLUMNS)
    start, calls = time.monotonic(), []

    def on_tokens(tokens):
        calls.append(tokens)
        if len(calls) == 3:
            happens()

    with torch.no_grad(), model.split_over_processes(group):
        for attempt in (name, f"{name}, next"):
            try:
                model.encode(pixels, model.token_grid(pixels), on_tokens=on_tokens)
            except LostProcessError as error:
                found[attempt] = f"{type(error).__name__}: {error}"
    found[f"{name}, seconds"] = time.monotonic() - start


def run_cases(rank, number, folder):
    """The process `rank` of `number`; the last one ends with the exit code `KILLED`."""
    torch.set_num_threads(1)
    found, meeting = {}, f"file://{folder / 'meeting'}"
    timeout = timedelta(seconds=TIMEOUT_SECONDS)
    distributed.init_process_group("gloo", init_method=meeting, rank=rank, world_size=number, timeout=timeout)
    in_processes(found)
    in_groups_of_one(rank, number, found)
    counted(found)
    progress(found)
    refused(rank, found)
    slow(rank, found)
    impatient = distributed.new_group(timeout=timedelta(seconds=LOST_AFTER_SECONDS))
    is_last = rank == number - 1
    lost("no answer", found, impatient, lambda: time.sleep(2 * LOST_AFTER_SECONDS) if is_last else None)
    torch.save(found, folder / f"{rank}.pt")
    lost("killed", found, None, lambda: os._exit(KILLED) if is_last else None)
    torch.save(found, folder / f"{rank}.pt")
