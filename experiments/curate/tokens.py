"""Stage 5: a final shard of text to a token file, each document followed by <|endoftext|>.

The names of special tokens are taken out of documents: a page that writes one would else become the token, and end
there. The file's id is made from its content, so that the same text gives the same bytes.
"""

from collections.abc import Sequence
from pathlib import Path

from experiments.curate.files import read_json, rows_in, write_json
from experiments.curate.shard import Tell
from purelm.data import DELIMITER
from purelm.tokenizer import BPE, load
from purelm.tokenizer.files import encode_documents

__all__ = ["load_tokenizer", "tokenize", "without"]


def load_tokenizer(path: Path) -> BPE:
    """ValueError where it has no <|endoftext|>."""
    bpe = load(path)
    if DELIMITER not in bpe.special_tokens:
        raise ValueError(f"final.tokenizer {path}: {DELIMITER} is no special token of it")
    return bpe


def without(text: str, names: Sequence[str]) -> str:
    """The text with no name in it, none that comes together when another is taken out either.

    Character by character, a name is taken out where its last one comes: linear in the text, also where names are
    nested a million times.
    """
    if not any(name in text for name in names):
        return text
    ends: dict[str, list[str]] = {}
    for name in sorted(names, key=len, reverse=True):
        ends.setdefault(name[-1], []).append(name)
    kept: list[str] = []
    for character in text:
        kept.append(character)
        for name in ends.get(character, ()):
            if kept[-len(name) :] == list(name):
                del kept[-len(name) :]
                break
    return "".join(kept)


def tokenize(bpe: BPE, text: Path, out: Path, tell: Tell) -> None:
    """tokens.bin and tokens.json of the documents of a .jsonl.zst."""
    names = tuple(bpe.special_tokens)
    texts = (without(row["text"], names) for row in rows_in(text))
    found = encode_documents(bpe, texts, out / "tokens.bin", eot=DELIMITER, n_workers=1)
    sidecar = read_json(out / "tokens.json")
    write_json(out / "tokens.json", {**sidecar, "id": sidecar["sha256"][:16]})
    tell(0, found.n_bytes or 0)
