#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of measured numbers into README and pages, from model_card/results (`make figures`).

A table stands between `<!-- table: NAME -->` and `<!-- end of table -->`; what is between them is replaced. So a number
in a table is one that a command wrote into a CSV, never one that somebody typed.
"""

import csv
import os
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "model_card" / "results"
PAGES = ("README.md", "docs/benchmarks.md", "docs/evidence.md", "docs/view.md")
TITLES = {"vit-small-14-reg8": "ViT-S/14", "uni2-h": "UNI2-h's shape"}
SHORT_DTYPES = {"bfloat16": "bf16", "float32": "fp32"}
BESIDE_TILES = {"tiles": "224 px tiles", "sparse": "w = 8", "pruned": "w = 8, 60 % pruned", "timm": "dense (timm)"}
NOT_RUN = "not run"
_TABLE = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end of table -->)", re.DOTALL)

Row = dict[str, str]


def read(name: str) -> list[Row]:
    """The rows of `model_card/results/NAME.csv`."""
    with (RESULTS / f"{name}.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def markdown(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table that ends with a line break."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def seconds(row: Row | None) -> str:
    """The median time of a row with three digits."""
    if row is None:
        return NOT_RUN
    value = float(row["seconds_median"])
    return f"{value * 1000:.0f} ms" if value < 1 else f"{value:.3g} s"


def interval(row: Row, name: str) -> str:
    """A number with its 95 % interval."""
    return f"{float(row[name]):.2f} ({float(row[f'{name}_low']):.2f} to {float(row[f'{name}_high']):.2f})"


def models() -> str:
    """Seconds of a whole forward pass on a CPU, beside averaged 224 px tiles of the same pixels."""
    rows = [row for row in read("benchmark_model") if row["threads"] == "2"]
    cases = sorted({(row["architecture"], int(row["size"]), row["dtype"]) for row in rows}, key=_order_of_cases)
    table = []
    for architecture, size, dtype in cases:
        key = (architecture, str(size), dtype)
        of = {row["model"]: row for row in rows if (row["architecture"], row["size"], row["dtype"]) == key}
        tiles = [of[name] for name in ("tiles_timm", "tiles_transformers") if name in of]
        if tiles:
            of["tiles"] = min(tiles, key=lambda row: float(row["seconds_median"]))
        (tokens,) = {row["tokens"] for name, row in of.items() if not name.startswith("tiles")}
        title = f"{TITLES[architecture]}, {size:,} px ({int(tokens):,} tokens), {SHORT_DTYPES[dtype]}"
        table.append([title, *_beside_tiles(of)])
    return markdown(["two CPU cores", *BESIDE_TILES.values()], table)


def _order_of_cases(case: tuple[str, int, str]) -> tuple[bool, int, str]:
    architecture, size, dtype = case
    return architecture != "vit-small-14-reg8", size, dtype


def gpu_models() -> str:
    """Seconds of a whole forward pass on a GPU, beside averaged 224 px tiles of the same pixels."""
    rows = read("gpu_model")
    table = []
    for size in sorted({int(row["size"]) for row in rows}):
        of = {row["model"]: row for row in rows if row["size"] == str(size)}
        table.append([f"{size:,} px ({int(of['sparse']['tokens']):,} tokens)", *_beside_tiles(of)])
    machine = rows[0]["machine"].split(" 80GB")[0]
    return markdown([f"UNI2-h's shape, bf16, one {machine}", *BESIDE_TILES.values()], table)


def _beside_tiles(of: dict[str, Row]) -> list[str]:
    """A cell for each of `BESIDE_TILES`: the seconds, and in brackets times those of tiles."""
    cells = [seconds(of.get(name)) for name in BESIDE_TILES]
    for place, name in enumerate(BESIDE_TILES):
        if name in of and name != "tiles" and of[name].get("times_tiles"):
            cells[place] += f" ({float(of[name]['times_tiles']):.2f} x)"
    return cells


def gpu_attention() -> str:
    """Milliseconds of attention alone on a GPU, and the share of the rate of matrix products."""
    rows = read("gpu_attention_speed")
    cases = sorted({(int(row["tokens"]), float(row["kept_share"]), int(row["window_size"])) for row in rows})
    table = []
    for tokens, kept_share, window in cases:
        cells = []
        for backend in ("block_sparse", "sdpa_dense"):
            for direction in ("forward", "forward+backward"):
                found = [
                    row
                    for row in rows
                    if (row["attention"], row["direction"], int(row["tokens"])) == (backend, direction, tokens)
                    and (float(row["kept_share"]), int(row["window_size"])) == (kept_share, window)
                ]
                cells.append(f"{1000 * float(found[0]['seconds_median']):.3g} ms" if found else NOT_RUN)
        table.append([f"{tokens:,}", f"{kept_share:.0%}", str(window), *cells])
    titles = ["tokens", "kept", "w", "forward", "with gradients", "dense (SDPA)", "with gradients"]
    return markdown(titles, table)


def attention() -> str:
    """Seconds of attention alone over unpruned tokens, ours against dense and compiled FlexAttention."""
    chosen = {"kept_share": "1", "dtype": "bfloat16", "threads": "1"}
    rows = [row for row in read("benchmark_attention") if chosen.items() <= row.items()]
    cases = sorted({(int(row["tokens"]), int(row["window_size"]), row["direction"]) for row in rows})
    table = []
    for tokens, window, direction in cases:
        of = {
            row["attention"]: row
            for row in rows
            if (int(row["tokens"]), int(row["window_size"]), row["direction"]) == (tokens, window, direction)
        }
        peers = [seconds(of.get(name)) for name in ("block_sparse", "sdpa_dense", "flex_attention")]
        table.append([f"{tokens:,}", str(window), direction.replace("+", " + "), *peers])
    titles = ["tokens", "w", "what", "block_sparse", "dense (SDPA)", "FlexAttention, compiled"]
    return markdown(titles, table)


def fidelity() -> str:
    """Cosines of sparse to dense features of the tiny checkpoint, the mean over images."""
    rows = read("tiny_fidelity")
    windows = sorted({int(row["window_size"]) for row in rows})
    table = []
    for size in sorted({int(row["size"]) for row in rows}):
        cells = []
        for window in windows:
            of = [row for row in rows if (int(row["size"]), int(row["window_size"])) == (size, window)]
            means = [sum(float(row[name]) for row in of) / len(of) for name in ("cls_cosine", "patch_cosine")]
            cells.append(f"{means[0]:.3f} / {means[1]:.3f}")
        table.append([f"{size} px", *cells])
    return markdown(["CLS / patches", *(f"w = {window}" for window in windows)], table)


def fidelity_real() -> str:
    """Variants against the dense model on pretrained weights, by size: mean and worst over images."""
    rows, table = read("fidelity"), []
    for size, variant in dict.fromkeys((row["size"], row["variant"]) for row in rows):
        of = [row for row in rows if (row["size"], row["variant"]) == (size, variant)]
        if variant == "dense":
            continue
        cls, patches, plain, keys = (
            [float(row[name]) for row in of]
            for name in ("cls_cosine", "centred_patch_cosine", "patch_cosine", "keys_per_query")
        )
        cells = [f"{sum(cls) / len(of):.4f} ({min(cls):.4f})", f"{sum(patches) / len(of):.3f} ({min(patches):.3f})"]
        cells += [f"{sum(plain) / len(of):.3f}", f"{sum(keys) / len(of):,.0f}", str(len(of))]
        table.append([f"{size} px", variant, *cells])
    titles = ["size", "variant", "CLS mean (worst)", "patches, centred (worst)", "plain", "keys a query", "images"]
    return markdown(titles, table)


def probe() -> str:
    """Balanced accuracy of linear probes on osteosarcoma regions."""
    rows = read("tiny_probe")
    sizes = sorted({int(row["size"]) for row in rows})
    names = dict.fromkeys((row["features"], row["variant"]) for row in rows)
    table = []
    for features, variant in sorted(names, key=lambda name: (name[0] != "trained", name[0] != "random", name[1])):
        cells = [
            interval(row, "balanced_accuracy")
            for size in sizes
            for row in rows
            if (row["features"], row["variant"], int(row["size"])) == (features, variant, size)
        ]
        table.append([f"{features} weights, {variant}" if variant else features, *cells])
    return markdown(["balanced accuracy (95 %)", *(f"{size} px" for size in sizes)], table)


def nuclei() -> str:
    """Dice of the segmentation heads on TNBC, and of thresholds."""
    titles = ["nuclei of TNBC, 80 crops of 5 images (95 %)", "pooled Dice", "mean Dice", "mean IoU"]
    table = [
        [row["method"].replace("_", " "), *(interval(row, name) for name in ("dice_pooled", "dice_mean", "iou_mean"))]
        for row in read("segpath_tnbc")
    ]
    return markdown(titles, table)


def draws() -> str:
    """Stratified attention by the rule that draws context tokens: cosines to dense, over images and draws."""
    title = ["700 px, w = 8", "samples", "keys a query", "CLS mean (worst)", "patches mean (worst)", "runs"]
    return markdown(title, _by_rule(read("stratified_draws"), ("rule", "num_samples")))


def representatives() -> str:
    """60 % pruned after layer 4, with and without representatives: cosines to dense."""
    title = ["60 % pruned", "representatives", "keys a query", "CLS mean (worst)", "kept patches mean (worst)", "runs"]
    return markdown(title, _by_rule(read("stratified_pruning"), ("rule", "num_samples")))


def draw_definition() -> str:
    """What was chosen between for the library, 1,024 samples: cosines to dense."""
    title = ["size in px", "rule", "keys a query", "CLS mean (worst)", "patches mean (worst)", "runs"]
    return markdown(title, _by_rule(read("stratified_definition"), ("size", "rule")))


def draw_layers() -> str:
    """Error of the attention branch in each layer, and its part that all queries share: means over images."""
    rows = read("stratified_layers")
    rules = list(dict.fromkeys(row["rule"] for row in rows))
    table = []
    for layer in dict.fromkeys(row["layer"] for row in rows):
        cells = [layer]
        for rule in rules:
            of = [row for row in rows if (row["layer"], row["rule"]) == (layer, rule)]
            error, common = (sum(float(row[name]) for row in of) / len(of) for name in ("error", "common_error"))
            cells.append(f"{error:.2f} ({common:.2f})")
        here = [row for row in rows if row["layer"] == layer]
        shares, norms = ([float(row[name]) for row in here] for name in ("largest_share", "largest_norm"))
        table.append([*cells, f"{min(shares):.2f} to {max(shares):.2f}", f"{max(norms):.1f}"])
    return markdown(["layer", *rules, "largest share of one token", "largest norm"], table)


def _by_rule(rows: list[Row], names: Sequence[str]) -> list[list[str]]:
    table = []
    for group in dict.fromkeys(tuple(row[name] for name in names) for row in rows):
        of = [row for row in rows if tuple(row[name] for name in names) == group]
        keys, cls, patches = ([float(row[name]) for row in of] for name in ("keys", "cls_cosine", "patch_cosine"))
        cells = [f"{sum(cls) / len(of):.4f} ({min(cls):.4f})", f"{sum(patches) / len(of):.3f} ({min(patches):.3f})"]
        table.append([*group, f"{sum(keys) / len(of):.0f}", *cells, str(len(of))])
    return table


def against_tiles() -> str:
    """Balanced accuracy of regions, and its paired difference to averaged tiles of the same pixels."""
    return _against_tiles("against_tiles_regions")


def _against_tiles(name: str) -> str:
    rows = read(name)
    sizes, variants = (list(dict.fromkeys(row[name] for row in rows)) for name in ("size", "variant"))
    of = {(row["size"], row["variant"]): row for row in rows}
    table = [[variant, *(_accuracy_beside_tiles(of[size, variant]) for size in sizes)] for variant in variants]
    return markdown(["accuracy, difference to tiles (95 %)", *(f"{size} px" for size in sizes)], table)


def _accuracy_beside_tiles(row: Row) -> str:
    names = [f"balanced_accuracy{ending}_minus_tiles" for ending in ("", "_low", "_high")]
    accuracy, (difference, low, high) = float(row["balanced_accuracy"]), (float(row[name]) for name in names)
    return f"{accuracy:.2f}" if low == high == 0 else f"{accuracy:.2f}, {difference:+.2f} ({low:+.2f} to {high:+.2f})"


def positions() -> str:
    """The same of regions whose positions repeat in each window of the model's training."""
    return _against_tiles("against_tiles_positions")


def border_tokens() -> str:
    """The same of labelled tokens, of all and of those near the border of two tiles."""
    rows = read("against_tiles_tokens")
    keys = list(dict.fromkeys((row["dataset"], row["scope"]) for row in rows))
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    of = {(row["dataset"], row["scope"], row["variant"]): row for row in rows}
    table = [
        [f"{dataset}: {scope} ({of[dataset, scope, variants[0]]['items']})"]
        + [_accuracy_beside_tiles(of[dataset, scope, variant]) for variant in variants]
        for dataset, scope in keys
    ]
    return markdown(["accuracy, difference to tiles (95 %)", *variants], table)


def prune_layers() -> str:
    """Areas under the ROC of the prune score, layer by layer, and of saturation."""
    rows = read("prune_layers")
    targets = list(dict.fromkeys(row["target"] for row in rows))
    of = {(row["target"], row["layer"], row["score"]): row for row in rows}
    layers = list(dict.fromkeys(row["layer"] for row in rows if row["layer"] != "0"))
    scores = ("attention", "attention_value", "attention_value, centred")
    table = [["saturation", *(interval(of[target, "0", "saturation"], "auroc") for target in targets)]]
    for layer in layers:
        areas = [" / ".join(f"{float(of[target, layer, name]['auroc']):.2f}" for name in scores) for target in targets]
        table.append([f"layer {layer}", *areas])
    return markdown(
        ["AUROC", *(f"{target} ({of[target, '0', 'saturation']['images']} images)" for target in targets)], table
    )


def memory() -> str:
    """Peaks of memory of one forward on a CPU."""

    def row_of(row: Row) -> list[str]:
        gibibytes = {
            name: int(row[f"{name}_bytes"]) / 2**30 for name in ("hidden_states", "peak_growth", "process_peak")
        }
        name = TITLES.get(row["architecture"], row["architecture"])
        title = f"{name}, {row['layers']} layers, {SHORT_DTYPES[row['dtype']]}, p = {row['prune_ratio']}"
        whole = "" if row["tokens_per_strip"] == "default" else ", whole layers"
        whole += f", {row['processes']} processes, the larger" if row["processes"] != "1" else ""
        return [
            f"{title}{whole}, {row['size']} px",
            *(f"{gibibytes[name]:.2f}" for name in gibibytes),
            row["times_hidden_states"],
        ]

    titles = ["GiB", "hidden states", "peak above weights and pixels", "whole process", "peak / hidden states"]
    return markdown(titles, map(row_of, read("benchmark_memory")))


def long_range() -> str:
    """Accuracy against the distance of two structures, by what patch tokens see."""
    names = ("window_size", "num_context_tokens", "has_globals")
    of: dict[tuple[str, ...], list[Row]] = {}
    for row in read("long_range"):
        of.setdefault(tuple(row[name] for name in names), []).append(row)
    table = [
        [
            f"w = {window}, {context} context tokens, global tokens: {has_globals}",
            *(f"{float(row['accuracy']):.2f}" for row in rows),
        ]
        for (window, context, has_globals), rows in of.items()
    ]
    distances = [row["distance"] for row in next(iter(of.values()))]
    return markdown(["tokens between the structures", *distances], table)


def quantised() -> str:
    """Fidelity and time of quantised weights on a CPU."""
    table = [
        [
            f"{row['quantised'].replace('none', 'as they are')}, {SHORT_DTYPES[row['dtype']]}",
            f"{float(row['pooled_cosine']):.4f}",
            f"{float(row['centred_patch_cosine']):.4f} ({float(row['centred_patch_cosine_p5']):.3f})",
            seconds(row),
        ]
        for row in read("benchmark_quantised")
    ]
    return markdown(["weights", "pooled features", "patch tokens, centred", "time"], table)


def viewer() -> str:
    """How fast the page of `sparsepath view` answers: the last row that was measured."""
    row = read("benchmark_viewer")[-1]

    def number(name: str) -> float:
        return float(row[name])

    mebibytes = (number("peak_bytes") - number("features_bytes")) / 2**20
    return markdown(
        ["", f"{int(row['tokens']):,} tokens x {row['channels']} channels, {row['threads']} cores"],
        [
            ["opening the slide, until it is seen", f"{number('first_picture_in_browser_seconds'):.1f} s"],
            ["a tile, median", f"{1000 * number('tile_median_seconds'):.0f} ms"],
            ["a tile, 95th percentile", f"{1000 * number('tile_95th_seconds'):.0f} ms"],
            ["a click, until the similar places are seen", f"{number('click_in_browser_seconds'):.2f} s"],
            ["of that computed", f"{number('click_median_seconds'):.2f} s"],
            ["the process at its peak, without the features", f"{mebibytes:,.0f} MiB"],
        ],
    )  # fmt: skip


TABLES: dict[str, Callable[[], str]] = {
    "models": models,
    "attention": attention,
    "gpu_models": gpu_models,
    "gpu_attention": gpu_attention,
    "fidelity": fidelity,
    "fidelity_real": fidelity_real,
    "probe": probe,
    "nuclei": nuclei,
    "draws": draws,
    "draw_definition": draw_definition,
    "against_tiles": against_tiles,
    "positions": positions,
    "border_tokens": border_tokens,
    "prune_layers": prune_layers,
    "memory": memory,
    "long_range": long_range,
    "quantised": quantised,
    "viewer": viewer,
    "draw_layers": draw_layers,
    "representatives": representatives,
}


def with_tables(text: str) -> str:
    """A page with the tables of the present CSVs.

    Raises:
        KeyError: it asks for a table that is not in `TABLES`.
    """
    return _TABLE.sub(lambda found: found[1] + TABLES[found[2]]() + found[3], text)


def main() -> None:
    """Rewrites the tables of all pages."""
    for name in PAGES:
        path = ROOT / name
        before = path.read_text(encoding="utf-8")
        after = with_tables(before)
        if after != before:
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_text(after, encoding="utf-8")
            os.replace(temporary, path)
            print(f"wrote the tables of {name}")


if __name__ == "__main__":
    main()
