"""Byte-level BPE: train, encode, decode, and the file formats of the neighbours."""

from purelm.tokenizer.bpe import BPE, make, token_dtype, vocab_size, with_special_tokens
from purelm.tokenizer.decode import decode, decode_bytes, decode_with_offsets
from purelm.tokenizer.encode import encode
from purelm.tokenizer.formats import (
    fingerprint,
    load,
    load_gpt2,
    load_tiktoken,
    save,
    save_gpt2,
    save_tiktoken,
)
from purelm.tokenizer.patterns import resolve
from purelm.tokenizer.pretokenize import split
from purelm.tokenizer.train import train

__all__ = [
    "BPE",
    "decode",
    "decode_bytes",
    "decode_with_offsets",
    "encode",
    "fingerprint",
    "load",
    "load_gpt2",
    "load_tiktoken",
    "make",
    "resolve",
    "save",
    "save_gpt2",
    "save_tiktoken",
    "split",
    "token_dtype",
    "train",
    "vocab_size",
    "with_special_tokens",
]
