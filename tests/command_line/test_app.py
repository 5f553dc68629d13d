# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file
from small_models import small_model
from typer.testing import CliRunner

from sparsepath import app as cli
from sparsepath import console
from sparsepath.convert import parse_setting
from sparsepath_vit import SparsePathViTModel
from sparsepath_vit.conversion import known_architectures
from sparsepath_vit.runtime import doctor

runner = CliRunner()


def test_every_known_model_is_listed_by_its_whole_name(monkeypatch):
    """A terminal of 80 columns cut the names off that --architecture takes."""
    monkeypatch.setattr(console, "console", Console(width=80))
    result = runner.invoke(cli.app, ["models"])
    assert result.exit_code == 0
    assert all(known.name in result.output for known in known_architectures())
    assert "\u2026" not in result.output, "nothing is cut off"


COMMANDS = ("demo", "convert", "models", "doctor", "embed", "heatmap", "estimate", "fidelity", "segment")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples(command):
    result = runner.invoke(cli.app, [command, "--help"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "Example" in result.output


def timm_checkpoint(folder):
    from timm.models.vision_transformer import VisionTransformer

    network = VisionTransformer(img_size=56, patch_size=14, embed_dim=32, depth=2, num_heads=2, num_classes=0)
    save_file(network.state_dict(), folder / "model.safetensors")
    return folder / "model.safetensors"


def test_convert_sets_fields_and_prints_the_parity(tmp_path, monkeypatch):
    monkeypatch.setattr(console, "console", Console(width=200))
    out = tmp_path / "out"
    arguments = ["convert", str(timm_checkpoint(tmp_path)), str(out), "--set", "num_attention_heads=2"]
    arguments += ["--set", "prune_ratio=0.6", "--set", "prune_after_layer=2", "--verify"]
    result = runner.invoke(cli.app, arguments)
    assert result.exit_code == 0, result.output
    assert "56 x 56" in result.output
    card = (out / "README.md").read_text(encoding="utf-8")
    assert "## Variants against the dense model" in card and "w = 8, 1,024 context tokens" in card
    assert "1,024 context tokens" in result.output and f"wrote {out / 'README.md'}" in result.output
    assert f"-> {out}\n" in result.output, "the report is a sentence, not the fields of an object"
    model = SparsePathViTModel.from_pretrained(out)
    assert model.config.prune_ratio == 0.6


def test_an_expected_error_is_one_line_and_exit_code_1(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["sparsepath", "convert", str(tmp_path / "missing.bin"), str(tmp_path / "out")])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert "missing.bin" in message
    assert "Traceback" not in message


def test_install_commands_keep_their_brackets(monkeypatch, capsys):
    """Rich took the "[slides]" of an install command for a style and left it out."""
    command = 'pip install "sparsepath-vit[slides]"'

    def fails():
        raise ImportError(command)

    monkeypatch.setattr(cli, "app", fails)
    with pytest.raises(SystemExit):
        cli.main()
    assert command in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr(console, "console", Console(width=250))
    monkeypatch.setattr(doctor, "examine", lambda: [doctor.Finding("h5py", False, "not installed", command)])
    assert command in runner.invoke(cli.app, ["doctor"]).output


def test_a_setting_of_the_wrong_type_is_one_line(tmp_path, monkeypatch, capsys):
    arguments = ["sparsepath", "convert", str(timm_checkpoint(tmp_path)), str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", [*arguments, "--set", "num_attention_heads=2", "--set", "prune_ratio=much"])
    with pytest.raises(SystemExit) as exit_info:
        cli.main()
    assert exit_info.value.code == 1
    assert "Field 'prune_ratio' with value 'much'" in capsys.readouterr().err


def test_a_setting_without_value_names_the_form():
    with pytest.raises(ValueError, match="NAME=VALUE"):
        parse_setting("prune_ratio")


def test_settings_are_json_values_or_words():
    assert parse_setting("window_size=null") == ("window_size", None)
    assert parse_setting("prune_ratio=0.6") == ("prune_ratio", 0.6)
    assert parse_setting("pooling=cls_mean") == ("pooling", "cls_mean")


def test_the_converted_model_computes_what_the_demo_model_computes(tmp_path):
    """The CLI's model and the library's are one: nothing is configured on the side."""
    small_model(SparsePathViTModel).save_pretrained(tmp_path)
    pixel_values = torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        first = small_model(SparsePathViTModel)(pixel_values).pooler_output
        second = SparsePathViTModel.from_pretrained(tmp_path).eval()(pixel_values).pooler_output
    assert torch.equal(first, second)
