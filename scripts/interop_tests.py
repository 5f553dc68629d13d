# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Tries each adapter against the toolkit itself, in an environment of its own: `make interop`.

    python scripts/interop_tests.py                                # LazySlide, torchao, slide2vec, eva
    python scripts/interop_tests.py --only lazyslide
    python scripts/interop_tests.py --trident ../TRIDENT           # and TRIDENT, from a checkout: no index has it
    python scripts/interop_tests.py --trident ../TRIDENT --patho-bench ../Patho-Bench    # and Patho-Bench, likewise

The environments lie in .interop/, which git ignores, and are made again when what they hold is changed here.
"""

import hashlib
import logging
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sparsepath_vit.runtime.extras import ScriptParser, run_script

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
OVERRIDES = ROOT / "tests/interop/overrides.txt"


@dataclass(frozen=True)
class Peer:
    """A toolkit: what to install of it, and whether its pins on transformers must be overruled."""

    requirements: tuple[str, ...]
    is_overruled: bool = False


PEERS = {
    "lazyslide": Peer(("lazyslide>=0.13,<0.14", "lazyslide-models>=0.1,<0.2")),
    "torchao": Peer(("torchao>=0.15",)),
    "slide2vec": Peer(("slide2vec>=7.1.4,<8",), is_overruled=True),
    # Last, since its own evaluation takes longest. Its command line fails with newer jsonargparse.
    "eva": Peer(("kaiko-eva[vision]>=0.4.5,<0.5", "jsonargparse[omegaconf,signatures]==4.41.*")),
}


class NotTriedError(RuntimeError):
    """An adapter could not be tried: no network, no such version, or no time."""


def make_environment(folder: Path, peer: Peer, seconds: float) -> Path:
    """Installs this checkout and a toolkit beside it, unless that is done already.

    Args:
        folder: of the environment.
        peer: the toolkit.
        seconds: how long it may take.

    Returns:
        Its Python.

    Raises:
        NotTriedError: it did not work in that time.
    """
    python, done = folder / "bin/python", folder / "installed"
    content = " ".join([*peer.requirements, str(peer.is_overruled), (ROOT / "pyproject.toml").read_text()])
    digest = hashlib.sha256(content.encode()).hexdigest()
    if done.exists() and done.read_text() == digest:
        return python
    uv = [sys.executable, "-m", "uv"]
    install = [*uv, "pip", "install", "--quiet", "--python", str(python), "--editable", f"{ROOT}[interop-tests]"]
    overrides = ["--override", str(OVERRIDES)] if peer.is_overruled else []
    end = time.monotonic() + seconds
    for command in (
        [*uv, "venv", "--quiet", "--allow-existing", "--python", sys.executable, str(folder)],
        [*install, *peer.requirements, *overrides],
    ):
        try:
            subprocess.run(command, check=True, timeout=max(1, end - time.monotonic()))
        except (subprocess.SubprocessError, OSError) as error:
            raise NotTriedError(f"{' '.join(command)}: {error}") from error
    done.write_text(digest)
    return python


def run_tests(python: Path, name: str, seconds: float) -> bool:
    """Whether the tests of an adapter pass in an environment.

    Raises:
        NotTriedError: they did not end in so many seconds.
    """
    command = [str(python), "-m", "pytest", f"tests/interop/test_{name}.py", "-p", "no:cacheprovider"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    try:
        return subprocess.run(command, cwd=ROOT, env=environment, timeout=max(1, seconds)).returncode == 0
    except subprocess.TimeoutExpired as error:
        raise NotTriedError(f"its tests did not end in {seconds:.0f} seconds") from error


def try_adapters(folder: Path, peers: dict[str, Peer], seconds: float, may_be_missing: bool) -> None:
    """Makes the environments and runs the tests, one toolkit after the other.

    Args:
        folder: where the environments lie.
        peers: by name.
        seconds: how long all of it may take.
        may_be_missing: whether a toolkit that cannot be installed, or for which there is no time, is passed over.

    Raises:
        ValueError: tests failed, or a toolkit that may not be missing is; the message names them.
    """
    end = time.monotonic() + seconds
    failed = []
    for name, peer in peers.items():
        try:
            if time.monotonic() > end:
                raise NotTriedError("no time is left")
            python = make_environment(folder / name, peer, end - time.monotonic())
            logger.info("%s: %s", name, python)
            if not run_tests(python, name, end - time.monotonic()):
                failed.append(name)
        except NotTriedError as error:
            logger.warning("%s: its adapter was NOT tried to the end (%s).", name, error)
            if not may_be_missing:
                failed.append(f"{name} (not tried)")
    if failed:
        raise ValueError(f"these adapters failed: {', '.join(failed)}.")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = ScriptParser(__doc__)
    parser.add_argument("--folder", type=Path, default=ROOT / ".interop", help="where the environments lie")
    parser.add_argument(
        "--only", nargs="*", choices=sorted(PEERS), help="these toolkits alone; without a name only the checkouts"
    )
    parser.add_argument("--trident", type=Path, help="folder of a TRIDENT checkout, to try it as well")
    parser.add_argument("--patho-bench", type=Path, help="folder of a Patho-Bench checkout, with --trident")
    parser.add_argument("--seconds", type=float, default=3600, help="how long all of it may take")
    parser.add_argument(
        "--may-be-missing",
        action="store_true",
        help="pass over what cannot be installed or tried in time; tests that fail still count",
    )
    options = parser.parse_args(arguments)
    for flag, folder in (("--trident", options.trident), ("--patho-bench", options.patho_bench)):
        if folder is not None and not folder.is_dir():
            parser.error(f"{flag} {folder} is no folder: pass that of a checkout")
    peers = {name: peer for name, peer in PEERS.items() if options.only is None or name in options.only}
    if options.trident is not None:
        peers["trident"] = Peer((str(options.trident.resolve()),), is_overruled=True)
    if options.patho_bench is not None:
        if options.trident is None:
            parser.error("--patho-bench needs TRIDENT beside it: pass --trident FOLDER, too")
        checkouts = (str(options.trident.resolve()), str(options.patho_bench.resolve()))
        peers["patho_bench"] = Peer(checkouts, is_overruled=True)
    run_script(try_adapters, options.folder, peers, options.seconds, options.may_be_missing)


if __name__ == "__main__":
    main()
