# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
import builtins
import hashlib

import numpy as np
import pytest

from sparsepath_vit.runtime.file_content import WHOLE_BYTES, content_sample


def test_every_byte_of_a_small_file_counts(tmp_path):
    content = bytearray(range(256)) * 20
    (tmp_path / "a").write_bytes(content)
    first = content_sample(tmp_path / "a")
    assert first == hashlib.sha256(b"5120" + content).hexdigest()
    (tmp_path / "b").write_bytes(content)
    assert content_sample(tmp_path / "b") == first
    content[1234] ^= 1
    (tmp_path / "b").write_bytes(content)
    assert content_sample(tmp_path / "b") != first


@pytest.mark.parametrize("size", [WHOLE_BYTES + 1, 3 * WHOLE_BYTES])
def test_size_ends_and_what_is_spread_over_a_large_file_count(tmp_path, size):
    content = np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8)
    content.tofile(tmp_path / "a")
    samples = {content_sample(tmp_path / "a")}
    longest_gap = size // 60
    changes = [np.s_[:1], np.s_[-1:], *(np.s_[at : at + longest_gap] for at in range(0, size, longest_gap))]
    for part in changes:
        changed = content.copy()
        changed[part] ^= 1
        changed.tofile(tmp_path / "a")
        samples.add(content_sample(tmp_path / "a"))
    content[:-1].tofile(tmp_path / "a")
    samples.add(content_sample(tmp_path / "a"))
    assert len(samples) == len(changes) + 2


def test_a_large_file_is_not_read_whole(tmp_path, monkeypatch):
    with open(tmp_path / "a", "wb") as file:
        file.truncate(2**33)
    read = []

    class Counted:
        def __init__(self, *arguments):
            self.file = open_file(*arguments)

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def read(self, *size):
            content = self.file.read(*size)
            read.append(len(content))
            return content

    open_file = builtins.open
    monkeypatch.setattr(builtins, "open", Counted)
    content_sample(tmp_path / "a")
    assert 2**20 < sum(read) < 2 * 2**20
