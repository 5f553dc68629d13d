# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import csv
import logging

import pytest
from PIL import Image
from small_models import small_model

from sparsepath_vit import SparsePathViTImageProcessor, SparsePathViTModel
from studies.fidelity import __main__ as study


@pytest.fixture
def call(tmp_path, monkeypatch):
    small_model(SparsePathViTModel).save_pretrained(tmp_path / "model")
    SparsePathViTImageProcessor(patch_size=4).save_pretrained(tmp_path / "model")
    for name in ("a.png", "b.png"):
        Image.effect_noise((120, 90), 60).convert("RGB").save(tmp_path / name)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["fidelity", "--out", str(tmp_path / "out"), *map(str, arguments)])
        study.main()
        with (tmp_path / "out" / "fidelity.csv").open(newline="") as file:
            return list(csv.DictReader(file))

    return run


def test_the_table_has_all_variants_and_goes_on_where_it_was_stopped(call, tmp_path, caplog, monkeypatch):
    arguments = ["--model-name-or-path", tmp_path / "model", "--sizes", "60,80", "--context-tokens", "0,40"]
    arguments += ["--windows", "2", "--device", "cpu", "--images"]
    first = call(*arguments, tmp_path / "a.png", "--figure", tmp_path / "fidelity.png")
    assert [row["size"] for row in first] == ["60"] * 5 + ["80"] * 5
    assert [row["variant"] for row in first[:5]] == [
        "dense",
        "w = 2",
        "w = 2, 40 context tokens",
        "w = 2, 60% pruned",
        "w = 2, 40 context tokens, 60% pruned, 40 representatives",
    ]
    local, stratified = first[1], first[2]
    assert stratified["cls_cosine"] != local["cls_cosine"]  # which is nearer, so few samples do not settle
    assert float(stratified["estimated_cls_error"]) > 0 and local["estimated_cls_error"] == ""
    assert (tmp_path / "fidelity.png").stat().st_size > 10_000
    compared = []
    monkeypatch.setattr(study, "region", lambda path, *rest: compared.append(path.name) or region(path, *rest))
    with caplog.at_level(logging.INFO):
        every = call(*arguments, tmp_path / "a.png", tmp_path / "b.png")
    assert every[:10] == first and len(every) == 20 and compared == ["b.png"] * 2
    assert "w = 2, 40 context tokens" in caplog.text
    table = tmp_path / "out" / "fidelity.csv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join(lines[:-3] + lines[-2:]))  # a row that somebody took out is made again, and no other
    compare, lacking = study.compare_to_dense, []
    monkeypatch.setattr(
        study, "compare_to_dense", lambda *given, **more: lacking.append(given[2]) or compare(*given, **more)
    )
    again = call(*arguments, tmp_path / "a.png", tmp_path / "b.png")
    assert [row["variant"] for row in again[-3:]] == [every[index]["variant"] for index in (-2, -1, -3)]
    assert [len(variants) for variants in lacking] == [1]


region = study.region


def test_what_is_missing_is_named(call, tmp_path):
    with pytest.raises(SystemExit, match="pass --images, or --data-dir and --sizes"):
        call("--model-name-or-path", tmp_path / "model", "--device", "cpu", "--sizes", "60")
