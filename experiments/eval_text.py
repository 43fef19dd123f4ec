"""Loss, perplexity and bits per byte of a model on texts: a row a batch, so that a killed measurement goes on.

A text is a stream of documents, each after the token `begin` where the tokenizer has it. Windows of `window` tokens
begin every `stride` tokens; each token is predicted once, after the first window with at least window - stride tokens
before it. Where no token begins the text, its first one is not predicted, and its bytes do not count.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from experiments.console import progress_bar, say
from purelm import track, tree
from purelm.data import documents
from purelm.data.batches import eval_batch, n_eval_batches
from purelm.evals import Score, score
from purelm.tokenizer import BPE, decode_bytes, token_to_id
from purelm.tokenizer.chat import encode_parts

__all__ = ["score_text"]

BATCH_TOKENS = 4096  # a number of its own: after a stop with another batch size the batches are still the same


def score_text(
    model: Any, params: Any, bpe: BPE, file: Path, rows: Path, *, window: int, stride: int, begin: str
) -> dict[str, Any]:
    """Figures of a text; rows is the file of the batches that are done, to which the others are added."""
    ids, n_bytes, n_documents = _read(bpe, file, begin)
    size = min(window, len(ids) - 1)
    stride = min(stride, size)
    batch = max(BATCH_TOKENS // size, 1)
    n = n_eval_batches(len(ids), batch, size, stride=stride)
    key = hashlib.sha256(ids.tobytes() + json.dumps([size, stride]).encode()).hexdigest()[:16]
    track.drop_rows(rows, lambda row: False)  # but for a last line that a kill cut short
    done = {row["batch"]: row for row in track.read_rows(rows) if row["text"] == key}
    if done:
        say(f"{file}: {len(done):,} of {n:,} batches are there")
    sink = track.jsonl_sink(rows)
    device = tree.leaves(params)[0].device
    with progress_bar(file.name, n, "batches") as update:
        for i in (i for i in range(n) if i not in done):
            data = eval_batch(ids, i, batch, size, device, stride=stride)
            one = score(model.loss, params, [data], n_bytes, device=device)
            done[i] = {"text": key, "batch": i, "nats": one.nats, "n_tokens": one.n_tokens}
            sink(done[i])
            update(i + 1, f"loss {one.nats_per_token:.3f}")
    total = Score(sum(row["nats"] for row in done.values()), sum(row["n_tokens"] for row in done.values()), n_bytes)
    return {
        "documents": n_documents, "bytes": n_bytes, "tokens": int(total.n_tokens), "loss": total.nats_per_token,
        "perplexity": total.perplexity, "bits per byte": total.bits_per_byte, "window": size, "stride": stride,
    }  # fmt: skip


def _read(bpe: BPE, file: Path, begin: str) -> tuple[np.ndarray, int, int]:
    """(ids, the UTF-8 bytes that are predicted, documents)."""
    before = [token_to_id(bpe, begin)] if begin in bpe.special_tokens else []
    n_bytes = n_documents = 0

    def pieces() -> Iterator[np.ndarray]:
        nonlocal n_bytes, n_documents
        for text in documents(file):
            n_bytes, n_documents = n_bytes + len(text.encode()), n_documents + 1
            yield np.concatenate([np.array(before, np.int64), encode_parts(bpe, [(text, False)]).astype(np.int64)])

    ids = np.concatenate([np.empty(0, np.int64), *pieces()])
    if len(ids) < 2:
        raise ValueError(f"text {file}: has {len(ids)} tokens, at least 2 are needed")
    if not before:
        n_bytes -= len(decode_bytes(bpe, ids[:1].tolist()))
    return ids, n_bytes, n_documents
