# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tables of what features and maps are worth: fidelity, probes, draws, positions, prune scores."""

from collections.abc import Callable, Sequence

from measured import Row, interval, markdown, read


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
    difference, low, high = (round(number, 2) + 0.0 for number in (difference, low, high))  # no "-0.00"
    return f"{accuracy:.2f}" if low == high == 0 else f"{accuracy:.2f}, {difference:+.2f} ({low:+.2f} to {high:+.2f})"


def positions() -> str:
    """The same of regions whose positions repeat in each window of the model's training."""
    return _against_tiles("against_tiles_positions")


def finetuning() -> str:
    """The same after training low-rank adapters, beside the frozen probe on the same folds."""
    return _against_tiles("against_tiles_finetuning")


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


def long_range() -> str:
    """Accuracy against the distance of two structures, by what patch tokens see, seed by seed."""
    names = ("has_globals", "trained", "window_size", "num_context_tokens")
    of: dict[tuple[str, ...], dict[str, list[Row]]] = {}
    for row in read("long_range"):
        of.setdefault(tuple(row[name] for name in names), {}).setdefault(row["distance"], []).append(row)
    table = []
    for (has_globals, trained, window, context), by_distance in of.items():
        tested = f"w = {window}" if window else "dense"
        tested += f", {context} context tokens" if context != "0" else ""
        weights = "of the dense one" if window and trained.startswith("dense") else "its own"
        keys = next(iter(by_distance.values()))[0]["keys_per_query"]
        cells = [" / ".join(f"{float(row['accuracy']):.2f}" for row in rows) for rows in by_distance.values()]
        table.append([tested, "seen" if has_globals == "True" else "not seen", weights, f"{float(keys):.0f}", *cells])
    distances = [f"{distance} apart" for distance in next(iter(of.values()))]
    return markdown(["accuracy, seed by seed", "global tokens", "weights", "keys a query", *distances], table)


TABLES: dict[str, Callable[[], str]] = {
    "fidelity": fidelity,
    "fidelity_real": fidelity_real,
    "probe": probe,
    "nuclei": nuclei,
    "draws": draws,
    "representatives": representatives,
    "draw_definition": draw_definition,
    "draw_layers": draw_layers,
    "against_tiles": against_tiles,
    "positions": positions,
    "finetuning": finetuning,
    "border_tokens": border_tokens,
    "prune_layers": prune_layers,
    "long_range": long_range,
}
