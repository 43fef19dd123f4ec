"""Byte-level BPE: train, encode, decode, and the file formats of the neighbours."""

from purelm.tokenizer.bpe import BPE, make, token_dtype, vocab_size, with_special_tokens
from purelm.tokenizer.patterns import resolve
from purelm.tokenizer.pretokenize import split

__all__ = ["BPE", "make", "resolve", "split", "token_dtype", "vocab_size", "with_special_tokens"]
