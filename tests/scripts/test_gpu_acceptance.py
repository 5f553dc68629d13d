# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The acceptance on a GPU, rehearsed on the CPU: its first minute there must not be lost to a typing error."""

import csv
import json
import sys

import pytest
from run_script import load_script

from sparsepath_vit.model import attention_triton_launch
from studies.benchmarks.acceptance import Scale
from studies.benchmarks.acceptance_documents import earlier_findings, read_document, state_of
from studies.benchmarks.gpu_attention import attention_target, published_problem

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


@pytest.mark.skipif(not attention_triton_launch.IS_INTERPRETED, reason="kernels cannot be interpreted here")
def test_every_step_is_rehearsed(tmp_path, run, monkeypatch):
    monkeypatch.setattr(acceptance, "RECORDS", tmp_path)
    _, printed = run(tmp_path / "run", "--rehearse", "--record")
    states = {name: state_of(tmp_path / "run", name) for name in acceptance.STEPS}
    assert set(states.values()) == {"done"}, printed
    assert f"all {len(states)} steps were run" in printed
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
    assert state_of(tmp_path, "profile") == "done"
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
        assert "NOT YET  tests: not run yet: 120 s do not fit into the 60 s left" in printed
        assert "1 of 2 steps were run; the same command goes on with tests" in printed

    def test_what_a_stopped_step_has_measured_is_kept_while_others_go_first(self, tmp_path, run):
        write_stopped(tmp_path, "model", finding("tiles, 224 px"))
        for _ in range(2):
            _, printed = run(tmp_path, "--steps", "model", "--budget", "20")
            assert self.started == []
            assert "pass     model: tiles, 224 px: 1 ms" in printed
            assert "NOT YET  model: not run yet: 45 s do not fit into the 20 s left" in printed

    def test_a_machine_without_a_gpu_is_named(self, tmp_path, run_script):
        self.folder, self.program = tmp_path, f"raise SystemExit({acceptance.NO_DEVICE})"
        with pytest.raises(SystemExit, match="there is no CUDA device; --rehearse"):
            run_script(acceptance, "--output_dir", str(tmp_path))


def test_unknown_steps_are_named(tmp_path, run_script, capsys):
    with pytest.raises(SystemExit):
        run_script(acceptance, "--output_dir", str(tmp_path), "--steps", "speed")
    assert "--steps holds speed: it takes environment" in capsys.readouterr().err


def test_sizes_that_are_no_numbers_and_a_file_instead_of_a_folder_are_named(tmp_path, run_script, capsys):
    (tmp_path / "file").touch()
    for flags, said in (
        (("--output_dir", str(tmp_path / "out"), "--sizes", "224,big"), "--sizes 224,big: it takes pixels"),
        (("--output_dir", str(tmp_path / "file")), "file is a file: name a folder"),
    ):
        with pytest.raises(SystemExit):
            run_script(acceptance, *flags)
        assert said in capsys.readouterr().err


def test_what_fits_into_ten_minutes_is_everything_but_compiled_and_other_models():
    left = 600 - acceptance.START_SECONDS
    run = []
    for name, step in acceptance.STEPS.items():
        if not step.fits(left):
            break
        run.append(name)
        left -= step.seconds
    assert run == [name for name in acceptance.STEPS if name not in ("compiled_model", "other_models")]


def finding(name, **changes):
    return {"name": name, "measured": "1 ms", "target": "", "passed": True, "rows": []} | changes


def write_stopped(folder, name, *findings, state="stopped"):
    document = {"state": state, "problem": "stopped here", "findings": findings, "seconds": 9.0}
    (folder / f"{name}.json").write_text(json.dumps(document))


def test_a_stopped_step_goes_on_but_with_what_failed(tmp_path, run):
    titles = [f"sdpa_dense, 49 tokens, w = 4, 100% kept, {direction}" for direction in ("forward", "forward+backward")]
    kept, failed = finding(titles[0], rows=[{"seconds_median": 0.5}]), finding(titles[1], passed=False)
    write_stopped(tmp_path, "attention_peers", kept, failed)
    ended_well, printed = run(tmp_path, "--rehearse", "--steps", "attention_peers")
    measured = {finding["name"]: finding for finding in read_document(tmp_path, "attention_peers")["findings"]}
    assert ended_well and len(measured) == 7, printed
    assert measured[titles[0]] == kept
    assert measured[titles[1]]["rows"]


def test_a_step_that_failed_begins_anew(tmp_path):
    """Something was wrong there."""
    for state, kept in (("failed", []), ("stopped", [finding("tiles")])):
        write_stopped(tmp_path, "model.earlier", finding("tiles"), finding("timm", passed=False), state=state)
        assert earlier_findings(tmp_path, "model") == kept


def test_the_published_problem_is_asked_of_ours_only(monkeypatch):
    """NATTEN's windows of 80 x 80 on 256 x 256 tokens are 5 x 5 blocks of 16."""
    asked = []
    monkeypatch.setattr("studies.benchmarks.gpu_attention._finding", lambda *arguments: asked.append(arguments))
    assert len(list(published_problem(Scale()))) == 3
    names, cases = [name for name, *_ in asked], {case for _, case, *_ in asked}
    assert names == ["block_sparse", "natten", "natten_sliding"]
    (case,) = cases
    assert (case.tokens, case.window_size * 5, case.heads, case.head_dim) == (256 * 256, 80, 24, 128)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    row = {"share_of_matrix_rate": 0.1, "seconds_median": 0.0187}
    assert attention_target("block_sparse", case, row)[1] is False
    assert attention_target("block_sparse", case, row | {"seconds_median": 0.0185})[1] is True
    assert attention_target("natten", case, row) == ("", None)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA GeForce RTX 4090")
    assert attention_target("block_sparse", case, row)[1] is None
