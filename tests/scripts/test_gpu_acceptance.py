# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The acceptance on a GPU, rehearsed on the CPU: its first minute there must not be lost to a typing error."""

import csv
import json
import sys

import pytest
from run_script import load_script

from sparsepath_vit.model import attention_triton

acceptance = load_script("gpu_acceptance")


@pytest.fixture
def run(run_script, capfd):
    """Runs the script with arguments; returns whether it ended well, and what it printed."""

    def call(folder, *arguments):
        ended_well = True
        try:
            run_script(acceptance, "--output_dir", str(folder), *arguments)
        except SystemExit as ending:
            ended_well = not ending.code
        return ended_well, capfd.readouterr().out

    return call


@pytest.mark.skipif(not attention_triton.IS_INTERPRETED, reason="kernels cannot be interpreted here")
def test_every_step_is_rehearsed(tmp_path, run, monkeypatch):
    monkeypatch.setattr(acceptance, "RECORDS", tmp_path)
    _, printed = run(tmp_path / "run", "--rehearse", "--record")
    states = {name: acceptance.state_of(tmp_path / "run", name) for name in acceptance.STEPS}
    assert set(states.values()) == {"done"}, printed
    assert "FAILED" not in printed and "Error" not in printed
    with (tmp_path / "gpu_model.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["model"] for row in rows} == {"tiles", "pruned", "sparse", "large window", "dense", "timm"}
    with (tmp_path / "gpu_correctness.csv").open() as file:
        assert all(float(row["error_output"]) < 2e-3 for row in csv.DictReader(file) if row["layout"] == "full")


def test_a_failing_step_is_said_and_the_others_run(tmp_path, run):
    ended_well, printed = run(tmp_path, "--rehearse", "--steps", "environment,profile", "--fail", "environment")
    assert not ended_well
    assert "FAILED   environment: RuntimeError: this step was told to fail" in printed
    assert acceptance.state_of(tmp_path, "profile") == "done"
    assert "Traceback" in (tmp_path / "environment.log").read_text()


class TestWithoutWorkers:
    """The supervisor alone, with workers that are one line of Python."""

    @pytest.fixture(autouse=True)
    def workers(self, monkeypatch):
        self.started = []

        def command(arguments, steps, left):
            self.started.append(steps)
            return [sys.executable, "-c", self.program.replace("STEP", repr(str(self.folder / f"{steps[0]}.json")))]

        monkeypatch.setattr(acceptance, "worker_command", command)

    def test_a_step_that_ends_its_process_is_said_and_the_others_run(self, tmp_path, run):
        self.folder = tmp_path
        self.program = (
            "import json, os; json.dump(dict(state='running', started=9e9, findings=[]), open(STEP, 'w')); os.abort()"
        )
        ended_well, printed = run(tmp_path, "--steps", "environment,profile")
        assert not ended_well and self.started == [["environment", "profile"], ["profile"]]
        assert "FAILED   environment: the process ended with code -6" in printed
        assert "FAILED   profile: the process ended with code -6" in printed

    def test_a_step_that_hangs_is_ended(self, tmp_path, run):
        self.folder = tmp_path
        self.program = (
            "import json, time; json.dump(dict(state='running', started=0, findings=[]), open(STEP, 'w'));"
            "time.sleep(60)"
        )
        _, printed = run(tmp_path, "--steps", "environment")
        assert "FAILED   environment: no end after 72 s" in printed

    def test_steps_that_do_not_fit_or_are_done_are_not_started(self, tmp_path, run):
        done = {"state": "done", "seconds": 3.0, "findings": [], "problem": ""}
        (tmp_path / "environment.json").write_text(json.dumps(done))
        ended_well, printed = run(tmp_path, "--steps", "environment,tests", "--budget", "60")
        assert ended_well and self.started == []
        assert "SKIPPED  tests: 150 s do not fit into the 60 s left" in printed

    def test_a_machine_without_a_gpu_is_named(self, tmp_path, run_script):
        self.folder, self.program = tmp_path, f"raise SystemExit({acceptance.NO_DEVICE})"
        with pytest.raises(SystemExit, match="there is no CUDA device; --rehearse"):
            run_script(acceptance, "--output_dir", str(tmp_path))


def test_unknown_steps_are_named(tmp_path, run_script, capsys):
    with pytest.raises(SystemExit):
        run_script(acceptance, "--output_dir", str(tmp_path), "--steps", "speed")
    assert "--steps holds speed: it takes environment" in capsys.readouterr().err
