"""A small model with a tokenizer of its own, as a folder of open weights: what programs that train start from."""

import json

from purelm import random
from purelm.models import hf, transformer
from purelm.tokenizer import train

__all__ = ["END", "write_inputs"]

END = "<|endoftext|>"


def write_inputs(folder, lines, rows, *names):
    """weights/, of random parameters, whose tokenizer is trained on the lines, and NAME.jsonl of the rows."""
    text = folder / "text"
    text.write_text("\n".join(lines) * 4)
    bpe = train(text, 280, [END])
    cfg = transformer.Config(288, 32, 32, 2, 4, n_kv_heads=2, rope_layout="half")
    hf.save(folder / "weights", transformer.init(random.key(0), cfg), cfg, bpe)
    for name in names:
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    return folder
