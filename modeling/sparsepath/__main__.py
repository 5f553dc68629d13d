# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""`python -m sparsepath` is the sparsepath command, for launchers of several processes."""

from .app import main

if __name__ == "__main__":
    main()
