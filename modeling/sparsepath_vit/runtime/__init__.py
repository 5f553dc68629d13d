# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""What everything above the model shares: files, memory, time, devices, optional libraries, pictures."""
