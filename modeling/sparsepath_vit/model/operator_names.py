# Copyright 2026 The SparsePathViT authors. Licensed under the Apache License, Version 2.0.
"""Names of the operators that torch.library knows."""

import re


def operator_name(name: str) -> str:
    """The name under which torch.library knows an operator of this package, "sparsepath_vit::..." where installed.

    A process may hold these files more than once, in different versions: installed, as remote code of a checkpoint, in
    a kernel repository. Whoever registers a name last answers for it, also to those who registered it before, so the
    name tells the copies apart.
    """
    copy = re.sub(r"\W", "_", (__package__ or __name__).removesuffix(".model"))
    return f"{copy}::{name}"
