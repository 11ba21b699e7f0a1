"""Where the models of metrics that torch computes come from: a folder, a package or the hub."""

from __future__ import annotations

import os

from spt_jax.errors import UserError
from spt_jax.models.files.sources import Source, resolve_source


def local_model(what: str, model: str) -> Source | None:
    """The folder of a model that torch is to read; None of a hub id, which is looked up when it is loaded.

    Args:
        what: What the model is to the user, for the sentence.
        model: A folder in Hugging Face's format, package:NAME or a hub id.

    Raises:
        UserError: There is no such folder or package, or it is no folder.
    """
    local = model.startswith(("package:", ".", "/", "~", "shape:")) or model.endswith(".gguf")
    if not (local or os.path.exists(model)):
        return None
    source = resolve_source(model)
    if source.kind != "folder":
        raise UserError(
            f"{what} {model!r} is a {source.kind}; allowed: a folder in Hugging Face's format, package:NAME or a hub id"
        )
    return source
