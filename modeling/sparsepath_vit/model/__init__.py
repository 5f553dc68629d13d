# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""The network and all it needs: exactly the files that travel to the Hub, in one flat folder."""
