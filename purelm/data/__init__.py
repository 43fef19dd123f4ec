"""Text to batches: corpora, token files, batches as pure functions of (tokens, key, step), packing.

The synthetic source is purelm.data.synthetic.
"""

from purelm.data.batches import (
    eval_batch,
    eval_windows,
    n_eval_batches,
    random_windows,
    shuffled_indices,
    shuffled_rows,
    shuffled_windows,
    windows_per_epoch,
)
from purelm.data.corpora import DELIMITER, Prepared, documents, open_prepared, prepare
from purelm.data.packing import pack, packed_rows
from purelm.data.shuffle import permuted
from purelm.data.tokens import ShardedTokens, TokenFile, TokenWriter, check_ids, check_tokenizer, open_tokens

__all__ = [
    "DELIMITER",
    "Prepared",
    "ShardedTokens",
    "TokenFile",
    "TokenWriter",
    "check_ids",
    "check_tokenizer",
    "documents",
    "eval_batch",
    "eval_windows",
    "n_eval_batches",
    "open_prepared",
    "open_tokens",
    "pack",
    "packed_rows",
    "permuted",
    "prepare",
    "random_windows",
    "shuffled_indices",
    "shuffled_rows",
    "shuffled_windows",
    "windows_per_epoch",
]
