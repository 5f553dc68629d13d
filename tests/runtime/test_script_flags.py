# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Flags in either spelling, and errors in one line."""

import pytest

from sparsepath_vit.runtime.extras import ScriptParser, comma_separated, run_script


@pytest.mark.parametrize("flags", [["--roi-size", "64"], ["--roi_size", "64"], ["--roi_size=64"]], ids=" ".join)
def test_flags_are_taken_with_dashes_and_underscores(flags):
    parser = ScriptParser("Reads.\n\n  --one line\n  --another")
    parser.add_argument("--roi-size", type=int)
    parser.add_argument("--name", default="")
    arguments = parser.parse_args([*flags, "--name=a_b"])
    assert (arguments.roi_size, arguments.name) == (64, "a_b")
    assert "  --one line\n  --another" in parser.format_help()


def test_flags_of_a_command_too():
    parser = ScriptParser("Does.")
    command = parser.add_subparsers().add_parser("model")
    command.add_argument("--window-size", type=int)
    assert isinstance(command, ScriptParser)
    assert parser.parse_args(["model", "--window_size", "8"]).window_size == 8


def test_several_numbers_are_one_flag_and_a_word_among_them_is_named(capsys):
    parser = ScriptParser("Measures.")
    parser.add_argument("--sizes", type=comma_separated(int, least=1), default="224,1400")
    parser.add_argument("--kept", type=comma_separated(float), default="1.0")
    arguments = parser.parse_args(["--kept", "0.4,1"])
    assert (arguments.sizes, arguments.kept) == ((224, 1400), (0.4, 1.0))
    for flags in (["--sizes", "224,big"], ["--sizes", ""], ["--sizes", "0"], ["--kept", "half"], ["--kept", "nan"]):
        with pytest.raises(SystemExit):
            parser.parse_args(flags)
        kind = "whole numbers of 1" if flags[0] == "--sizes" else "numbers of 0"
        assert f"argument {flags[0]}: {flags[1]!r} is not {kind} at least, with commas" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError, FileNotFoundError, ImportError])
def test_what_is_wrong_with_the_input_is_one_line(error):
    def run(reason):
        raise error(reason)

    with pytest.raises(SystemExit, match=r"^error: no slide here$") as caught:
        run_script(run, "no slide here")
    assert isinstance(caught.value.__cause__, error)


def test_a_fault_of_the_script_keeps_its_traceback():
    with pytest.raises(ZeroDivisionError):
        run_script(lambda: 1 / 0)
