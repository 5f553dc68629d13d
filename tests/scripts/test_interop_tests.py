# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import subprocess

import pytest

from scripts import interop_tests
from scripts.interop_tests import Peer, make_environment, try_adapters


@pytest.fixture
def no_processes(monkeypatch):
    """Records commands instead of running them; those with a word of the list fail."""
    commands, failing = [], []

    def run(command, check=False, **options):
        commands.append(command)
        code = int(any(word in " ".join(command) for word in failing))
        if code and check:
            raise subprocess.CalledProcessError(code, command)
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(interop_tests.subprocess, "run", run)
    return commands, failing


def test_an_environment_is_made_once_for_what_it_holds(no_processes, tmp_path):
    commands, _ = no_processes
    (tmp_path / "peer").mkdir()
    make_environment(tmp_path / "peer", Peer(("peer>=1",)), 60)
    make_environment(tmp_path / "peer", Peer(("peer>=1",)), 60)
    assert len(commands) == 2 and "peer>=1" in commands[1] and "--override" not in commands[1]
    make_environment(tmp_path / "peer", Peer(("peer>=2",), is_overruled=True), 60)
    assert len(commands) == 4 and commands[3][-1].endswith("tests/interop/overrides.txt")


def test_what_cannot_be_installed_counts_only_where_it_must_be_there(no_processes, tmp_path, caplog):
    _, failing = no_processes
    failing.append("absent")
    (tmp_path / "there").mkdir()
    peers = {"absent": Peer(("absent",)), "there": Peer(("there",))}
    try_adapters(tmp_path, peers, 60, may_be_missing=True)
    assert "absent: its adapter was NOT tried to the end" in caplog.text
    with pytest.raises(ValueError, match=r"these adapters failed: absent \(not tried\)\."):
        try_adapters(tmp_path, peers, 60, may_be_missing=False)


def test_tests_that_fail_always_count(no_processes, tmp_path):
    _, failing = no_processes
    failing.append("test_there")
    (tmp_path / "there").mkdir()
    with pytest.raises(ValueError, match="these adapters failed: there"):
        try_adapters(tmp_path, {"there": Peer(("there",))}, 60, may_be_missing=True)


def test_patho_bench_needs_trident_beside_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        interop_tests.main(["--patho-bench", str(tmp_path)])
    assert "--patho-bench needs TRIDENT beside it" in capsys.readouterr().err


def test_a_checkout_that_is_not_there_is_named_before_anything_is_installed(no_processes, tmp_path, capsys):
    commands, _ = no_processes
    with pytest.raises(SystemExit):
        interop_tests.main(["--trident", str(tmp_path / "TRIDENT")])
    assert commands == [] and "TRIDENT is no folder: pass that of a checkout" in capsys.readouterr().err


def test_without_time_nothing_is_started(no_processes, tmp_path, caplog):
    commands, _ = no_processes
    try_adapters(tmp_path, {"there": Peer(("there",))}, -1, may_be_missing=True)
    assert commands == [] and "no time is left" in caplog.text


def test_tests_that_do_not_end_in_time_are_no_failure_where_they_may_be_missing(
    no_processes, tmp_path, monkeypatch, caplog
):
    """On a busy machine the adapters would have failed a submission that has nothing to do with them."""
    (tmp_path / "there").mkdir()

    def slow(command, timeout=None, **options):
        if "pytest" in command:
            raise subprocess.TimeoutExpired(command, timeout)
        return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(interop_tests.subprocess, "run", slow)
    try_adapters(tmp_path, {"there": Peer(("there",))}, 60, may_be_missing=True)
    assert "did not end in" in caplog.text
    with pytest.raises(ValueError, match=r"there \(not tried\)"):
        try_adapters(tmp_path, {"there": Peer(("there",))}, 60, may_be_missing=False)
