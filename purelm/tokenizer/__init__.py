"""Byte-level BPE: train, encode, decode, and the file formats of the neighbours.

A tokenizer is a value, `BPE(vocab, merges, special_tokens, pattern, ...)`; all else is functions of it:

    bpe = train("corpus.txt", 10_000, ["<|endoftext|>"])       # or load("tokenizer.json"), or make(vocab, merges, ...)
    ids = encode(bpe, "Once upon a time")                       # numpy, uint16 or uint32
    text = decode(bpe, ids)
    save(bpe, "tokenizer.json")                                 # Hugging Face's format
    encode_file(bpe, "corpus.txt", "corpus.bin")                # in parallel, to a token file of purelm.data
    encode_chat(bpe, load_chat("model/"), messages)             # by the chat template of a model

The course's class, function by function:

    train_bpe(path, vocab_size, special_tokens)                 bpe = train(...); bpe.vocab, list(bpe.merges)
    Tokenizer(vocab, merges, special_tokens)                    bpe = make(vocab, merges, special_tokens or ())
    Tokenizer.from_files(vocab_path, merges_path, specials)     with_special_tokens(load_gpt2(...), specials)
    tokenizer.encode(text)                                      encode(bpe, text).tolist()
    tokenizer.encode_iterable(texts)                            encode_iterable(bpe, texts)
    tokenizer.decode(ids)                                       decode(bpe, ids); decode_iterable(bpe, ids) of a stream
"""

from purelm.tokenizer.bpe import BPE, make, token_dtype, vocab_size, with_special_tokens
from purelm.tokenizer.chat import Chat, encode_chat, find_chat, load_chat, render
from purelm.tokenizer.decoding import decode, decode_bytes, decode_iterable, decode_next, decode_with_offsets
from purelm.tokenizer.encoding import encode
from purelm.tokenizer.files import encode_documents, encode_file
from purelm.tokenizer.formats import (
    added_around,
    from_gguf,
    load,
    load_gguf,
    load_gpt2,
    load_tiktoken,
    save,
    save_gpt2,
    save_tiktoken,
)
from purelm.tokenizer.patterns import Removed, resolve
from purelm.tokenizer.splitting import split
from purelm.tokenizer.streams import encode_iterable
from purelm.tokenizer.tables import fingerprint, token_to_id
from purelm.tokenizer.training import train, train_from_counts

__all__ = [
    "BPE",
    "Chat",
    "Removed",
    "added_around",
    "decode",
    "decode_bytes",
    "decode_iterable",
    "decode_next",
    "decode_with_offsets",
    "encode",
    "encode_chat",
    "encode_documents",
    "encode_file",
    "encode_iterable",
    "find_chat",
    "fingerprint",
    "from_gguf",
    "load",
    "load_chat",
    "load_gguf",
    "load_gpt2",
    "load_tiktoken",
    "make",
    "render",
    "resolve",
    "save",
    "save_gpt2",
    "save_tiktoken",
    "split",
    "token_dtype",
    "token_to_id",
    "train",
    "train_from_counts",
    "vocab_size",
    "with_special_tokens",
]
