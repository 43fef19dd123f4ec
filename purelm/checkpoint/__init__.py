"""Checkpoints: a folder `step-00001000/` of safetensors files and a manifest, complete or not there at all.

    save(root, step, {"params": params, "opt_state": opt_state}, meta={"config": ...})
    trees, meta = load(root, like={"params": params})
    trees, meta = load(root, only=["params.layers.0"], dtype=torch.bfloat16)

A checkpoint is written beside its final place, flushed to disk and renamed, so a kill at any instant leaves the
previous one loadable. The manifest holds each file's size and SHA-256: a flipped byte is named, never trained on.
What `purelm.dist.checkpoint` wrote on many processes is listed and read here too (format 2, see `shards`).
One tree goes through a file object or a socket with `to_bytes` and `from_bytes`.
"""

from purelm.checkpoint.folder import latest, latest_finite, read_manifest, save, steps
from purelm.checkpoint.reading import load
from purelm.checkpoint.stream import from_bytes, to_bytes

__all__ = [
    "from_bytes",
    "latest",
    "latest_finite",
    "load",
    "read_manifest",
    "save",
    "steps",
    "to_bytes",
]
