# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""A clock that only the test moves: a busy machine sleeps longer than it was asked to."""


class SetClock:
    """Stands in for the module `time`: sleeping takes exactly as long as it says, and no time."""

    def __init__(self):
        self.now = 1000.0

    def perf_counter(self):
        return self.now

    def sleep(self, seconds):
        self.now += seconds
