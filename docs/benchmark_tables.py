# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tables of times and memory."""

from collections.abc import Callable

from measured import NOT_RUN, SHORT_DTYPES, Row, markdown, read, seconds

TITLES = {"vit-small-14-reg8": "ViT-S/14", "uni2-h": "UNI2-h's shape"}
BESIDE_TILES = {"tiles": "224 px tiles", "sparse": "w = 8", "pruned": "w = 8, 60 % pruned", "timm": "dense (timm)"}


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
        if row.get("num_context_tokens") not in (None, "", "0"):  # earlier rows are of none, and have no such column
            whole += f", {row['num_context_tokens']} context tokens"
        return [
            f"{title}{whole}, {row['size']} px",
            *(f"{gibibytes[name]:.2f}" for name in gibibytes),
            row["times_hidden_states"],
        ]

    titles = ["GiB", "hidden states", "peak above weights and pixels", "whole process", "peak / hidden states"]
    return markdown(titles, map(row_of, read("benchmark_memory")))


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
    "gpu_models": gpu_models,
    "gpu_attention": gpu_attention,
    "attention": attention,
    "memory": memory,
    "quantised": quantised,
    "viewer": viewer,
}
