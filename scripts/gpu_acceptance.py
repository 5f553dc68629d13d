#!/usr/bin/env python
# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
r"""Everything that only a GPU can show, in one run: is the kernel right, is it fast, is the whole model.

Steps run in a process of their own, those that matter most first; each leaves a JSON and a CSV file. What does not fit
into the ten minutes is named in the table, and the same command goes on there: with the steps that were not run, and in
one that was stopped with what it had not measured. A step that fails, hangs or ends its process does not keep the
others from running.

Examples:
    python scripts/gpu_acceptance.py --output_dir outputs/gpu
    python scripts/gpu_acceptance.py --output_dir outputs/gpu --steps environment,correctness,bitwise --budget 120
    python scripts/gpu_acceptance.py --output_dir outputs/gpu --steps model --sizes 3430 --architectures uni2-h
    python scripts/gpu_acceptance.py --output_dir outputs/gpu --record
    PYTHONPATH=modeling python3 scripts/gpu_acceptance.py --output_dir outputs/gpu
    python scripts/gpu_acceptance.py --output_dir outputs/rehearsal --rehearse
"""

import argparse
import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple, TextIO

sys.path.insert(0, str(Path(__file__).parents[1]))  # `studies` lies beside this folder and is not installed

from studies.benchmarks.acceptance_documents import (
    document_path,
    earlier_findings,
    earlier_path,
    lines,
    read_document,
    read_documents,
    record,
    rows_of,
    state_of,
    table,
    what_is_left,
    write_csv,
    write_document,
)

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "model_card" / "results"
POLL_SECONDS = 0.2
# A step may take this many times its declared cost, and so many seconds more, before it counts as hanging.
PATIENCE, PATIENCE_SECONDS = 2.5, 60
NO_DEVICE, BROKEN_DEVICE = 4, 3  # exit codes of a worker
START_SECONDS = 15  # of a process: importing torch and starting the GPU
ON_GPU = "not test_kernels_compile_for_gpus_that_are_not_there and not test_a_step_takes_few_instructions"


class Step(NamedTuple):
    """A step: a generator of findings in a module of `studies.benchmarks`.

    Attributes:
        module: where it is.
        seconds: its rough cost on an H100, from what it measured there (model_card/results/gpu_*.csv), the runs before
            that are not timed and the kernels that it compiles.
        least_seconds: with which it is worth starting, since it keeps each finding; 0 where it is all or nothing.
    """

    module: str
    seconds: int
    least_seconds: int = 0

    def fits(self, left: float) -> bool:
        return (self.least_seconds or self.seconds) <= left


# Up to the tests they fit into ten minutes; the other two are a second run's.
STEPS = {
    "environment": Step("gpu_timings", 5),
    "correctness": Step("gpu_checks", 115),
    "bitwise": Step("gpu_checks", 25),
    "model": Step("gpu_timings", 95, 45),
    "attention_speed": Step("gpu_attention", 40, 25),
    "attention_peers": Step("gpu_attention", 80, 45),
    "cuda_graph": Step("gpu_launches", 25),
    "stratified_speed": Step("gpu_stratified", 25, 10),
    "profile": Step("gpu_timings", 10),
    "compilations": Step("gpu_launches", 25),
    "tests": Step("", 120),
    "compiled_model": Step("gpu_timings", 120, 60),
    "other_models": Step("gpu_timings", 40, 20),
}


def main() -> None:
    arguments = parse_arguments()
    if arguments.worker:
        run_steps(arguments)
        return
    arguments.output_dir.mkdir(parents=True, exist_ok=True)
    supervise(arguments)
    documents = read_documents(arguments.output_dir, arguments.steps)
    print(table(documents, arguments.steps))
    print(what_is_left(documents, arguments.steps))
    if arguments.record:
        record(documents, RECORDS)
    if any(passed is False for *_, passed in lines(documents, arguments.steps)):
        raise SystemExit(1)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the results; a rerun goes on in it")
    parser.add_argument("--steps", default=",".join(STEPS), help="comma separated, in the order to run; all by default")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; the rest is left to the next run")
    parser.add_argument("--rehearse", action="store_true", help="small sizes on the CPU, kernels interpreted")
    parser.add_argument("--sizes", help="pixels of a square image for the steps of models, comma separated")
    parser.add_argument("--architectures", help="known models, comma separated: the first for `model`")
    parser.add_argument("--record", action="store_true", help="copy the CSV files to model_card/results/gpu_*.csv")
    parser.add_argument("--fresh", action="store_true", help="run the chosen steps even where they are done")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--fail", default="", help=argparse.SUPPRESS)  # a step that the tests make fail
    arguments = parser.parse_args()
    arguments.steps = [name for name in arguments.steps.split(",") if name]
    unknown = sorted(set(arguments.steps) - set(STEPS))
    if unknown:
        parser.error(f"--steps holds {', '.join(unknown)}: it takes {', '.join(STEPS)}.")
    if not all(size.isdecimal() for size in (arguments.sizes or "1").split(",")):
        parser.error(f"--sizes {arguments.sizes}: it takes pixels, comma separated, such as 224,1400.")
    if arguments.output_dir.is_file():
        parser.error(f"--output_dir {arguments.output_dir} is a file: name a folder.")
    return arguments


# The supervising process: starts workers, watches the clock, and imports nothing that a worker could break.


def supervise(arguments: argparse.Namespace) -> None:
    """Runs the steps in workers until all are done, failed or left to the next run."""
    deadline = time.monotonic() + arguments.budget
    waiting = [name for name in arguments.steps if arguments.fresh or state_of(arguments.output_dir, name) != "done"]
    for name in waiting:  # an earlier run's failure must not look like this run's
        with contextlib.suppress(FileNotFoundError):
            document_path(arguments.output_dir, name).rename(earlier_path(arguments.output_dir, name))
        if arguments.fresh:
            earlier_path(arguments.output_dir, name).unlink(missing_ok=True)
    while waiting:
        left = deadline - time.monotonic()
        while waiting and not STEPS[waiting[0]].fits(left - START_SECONDS) and not arguments.rehearse:
            skip(arguments.output_dir, waiting.pop(0), left)
        if not waiting:
            break
        process = subprocess.Popen(
            worker_command(arguments, waiting, left), env=worker_environment(arguments), start_new_session=True
        )
        try:
            ending = watch(process, arguments, waiting, deadline)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # and the processes it started
            process.wait()
        if process.returncode == NO_DEVICE:
            raise SystemExit("error: there is no CUDA device; --rehearse runs every step on the CPU with small sizes.")
        waiting = after_worker(arguments.output_dir, waiting, ending)


def worker_command(arguments: argparse.Namespace, steps: list[str], left: float) -> list[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--worker", "--output_dir", str(arguments.output_dir)]
    command += ["--steps", ",".join(steps), "--budget", f"{left:.0f}"]
    command += ["--fail", arguments.fail] if arguments.fail else []
    command += ["--rehearse"] if arguments.rehearse else []
    command += ["--sizes", arguments.sizes] if arguments.sizes else []
    command += ["--architectures", arguments.architectures] if arguments.architectures else []
    return command


def worker_environment(arguments: argparse.Namespace) -> dict[str, str]:
    """A checkout needs no installation; a rehearsal sees no GPU and interprets the kernels."""
    environment = dict(os.environ, PYTHONUNBUFFERED="1")
    paths = [str(ROOT / "modeling"), str(ROOT), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if arguments.rehearse:
        environment |= {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    return environment


def watch(process: subprocess.Popen, arguments: argparse.Namespace, steps: list[str], deadline: float) -> str:
    """Waits for a worker; says how it ended, or why it has to be ended: in a rehearsal only by the budget.

    The costs of steps are those on a GPU, and a CPU that rehearses may be busy with other things.
    """
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if time.monotonic() > deadline + 5:  # the worker itself stops between two findings
            return "not run to its end: the time was used up"
        for name in steps:
            document = read_document(arguments.output_dir, name)
            limit = PATIENCE * STEPS[name].seconds + PATIENCE_SECONDS
            is_running = document.get("state") == "running" and not arguments.rehearse
            if is_running and time.time() - document["started"] > limit:
                return f"no end after {limit:.0f} s"
    return f"the process ended with code {process.returncode}"


def after_worker(folder: Path, steps: list[str], ending: str) -> list[str]:
    """Marks the step a worker died in; returns the steps that are left."""
    begun = [name for name in steps if state_of(folder, name) != "missing"]
    for name in begun:
        document = read_document(folder, name)
        if document["state"] == "running":
            document["state"] = "stopped" if "time was used up" in ending else "failed"
            document["problem"] = ending
            write_document(folder, name, document)
    if not begun:  # it did not get to its first step
        write_document(folder, steps[0], {"state": "failed", "problem": ending, "findings": [], "seconds": 0.0})
        begun = steps[:1]
    return [name for name in steps if name not in begun]


def skip(folder: Path, name: str, left: float) -> None:
    """Leaves a step to the next run, with what it has measured so far."""
    seconds = STEPS[name].least_seconds or STEPS[name].seconds
    problem = f"not run yet: {seconds} s do not fit into the {max(0.0, left):.0f} s left"
    document = {"state": "skipped", "problem": problem, "findings": earlier_findings(folder, name), "seconds": 0.0}
    write_document(folder, name, document)


# The worker: runs steps one after another.


def run_steps(arguments: argparse.Namespace) -> None:
    """Runs steps until one breaks the device; the supervisor starts another worker for the others."""
    import torch

    if not arguments.rehearse and not torch.cuda.is_available():
        raise SystemExit(NO_DEVICE)
    deadline = time.monotonic() + arguments.budget
    for name in arguments.steps:
        left = deadline - time.monotonic()
        if not STEPS[name].fits(left) and not arguments.rehearse:
            skip(arguments.output_dir, name, left)
            continue
        if not run_step(name, arguments, deadline) and not arguments.rehearse and not is_device_well():
            raise SystemExit(BROKEN_DEVICE)


def run_step(name: str, arguments: argparse.Namespace, deadline: float) -> bool:
    """Runs one step, which is written after each finding; False where it failed."""
    document: dict[str, Any] = {"state": "running", "started": time.time(), "findings": [], "problem": ""}
    folder = arguments.output_dir
    write_document(folder, name, document)
    start = time.monotonic()
    print(f"== {name}", flush=True)
    with (folder / f"{name}.log").open("a") as log:
        try:
            for finding in findings_of(name, arguments, log):
                document["findings"].append(dataclasses.asdict(finding))
                write_document(folder, name, document)
                print(f"   {finding.name}: {finding.measured}", flush=True)
                if time.monotonic() > deadline:
                    document |= {"state": "stopped", "problem": "not run to its end: the time was used up"}
                    break
            else:
                document["state"] = "done"
        except Exception as error:
            traceback.print_exc(file=log)
            problem = f"{type(error).__name__}: {str(error).strip()[:300]} (see {name}.log)"
            document |= {"state": "failed", "problem": problem}
            print(f"   FAILED: {problem}", flush=True)
    document["seconds"] = round(time.monotonic() - start, 1)
    write_document(folder, name, document)
    write_csv(folder / f"{name}.csv", rows_of(document))
    return document["state"] != "failed"


def findings_of(name: str, arguments: argparse.Namespace, log: TextIO) -> Any:
    """The findings of a step; what it prints goes to its log."""
    import importlib

    if name == arguments.fail:
        raise RuntimeError("this step was told to fail")
    if name == "tests":
        yield kernel_tests(arguments, log)
        return
    scale = scale_of(arguments, name)
    step = getattr(importlib.import_module(f"studies.benchmarks.{STEPS[name].module}"), name)
    findings = step(scale)
    while True:
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            finding = next(findings, None)
        log.flush()
        if finding is None:
            return
        yield finding


def scale_of(arguments: argparse.Namespace, name: str) -> Any:
    """The sizes of a step, and what an earlier run has measured of it."""
    from studies.benchmarks.acceptance import REHEARSAL, Finding, Scale

    earlier = {
        finding["name"]: Finding(**finding | {"rows": tuple(finding["rows"])})
        for finding in earlier_findings(arguments.output_dir, name)
    }
    scale = dataclasses.replace(REHEARSAL if arguments.rehearse else Scale(), earlier=earlier)
    if arguments.sizes:
        scale = dataclasses.replace(scale, sizes=tuple(map(int, arguments.sizes.split(","))))
    if arguments.architectures:
        scale = dataclasses.replace(scale, architectures=tuple(arguments.architectures.split(",")))
    return scale


def kernel_tests(arguments: argparse.Namespace, log: TextIO) -> Any:
    """The kernel's tests, compiled on a GPU; not those that compile for GPUs that are not there."""
    from studies.benchmarks.acceptance import Finding

    names = ("attention_triton", "attention_triton_context", "prune_score_triton", "fused_elementwise")
    files = [f"tests/model/test_{name}.py" for name in names]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *files]
    command += ["-k", "TestBadInput"] if arguments.rehearse else ["-n", "8", "-x", "--dist", "worksteal", "-k", ON_GPU]
    limit = PATIENCE * STEPS["tests"].seconds
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=limit, check=False)
    log.write(result.stdout + result.stderr)
    last = (result.stdout.strip().splitlines() or ["no output"])[-1].strip("= ")
    return Finding(", ".join(names), last, "all pass", result.returncode == 0)


def is_device_well() -> bool:
    """Whether the GPU still computes: after an illegal access it does not, until the process ends."""
    import torch

    try:
        torch.zeros(1, device="cuda").add_(1.0).item()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True


if __name__ == "__main__":
    main()
