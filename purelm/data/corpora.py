"""A corpus divided into a training and a held-out part, by hashes of the documents, whatever their order."""

import hashlib
import itertools
import json
import os
import re
import secrets
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from purelm.data.checks import check_int
from purelm.data.sources import DELIMITER, MOST_DOCUMENT_BYTES, cut_point, documents
from purelm.files import hold, refuse_overwrite, remove_leftovers

__all__ = ["DELIMITER", "Prepared", "documents", "limited", "open_prepared", "prepare"]

_TEMPORARY = re.compile(r"(train\.txt|heldout\.txt|prepared\.json)\.(?P<id>[0-9a-f]{8})")

FEW_DOCUMENTS = 20  # with fewer, the end of each document is held out
HEAD_DOCUMENTS = 1000  # read before the first is written, to see whether there are more
HEAD_BYTES = 1 << 26
LARGE_BYTES = 1 << 20  # of a document on average


@dataclass(frozen=True)
class Prepared:
    """What `prepare` wrote. Bytes count the documents' text in UTF-8, without the delimiters between them."""

    train_path: str
    heldout_path: str
    n_train_documents: int
    n_heldout_documents: int
    n_train_bytes: int
    n_heldout_bytes: int
    rule: str  # how the held-out part was chosen: "documents" | "tails"

    @property
    def n_documents(self) -> int:
        """Documents in both parts; under the rule "tails" a document counts in each part that has some of it."""
        return self.n_train_documents + self.n_heldout_documents

    @property
    def n_bytes(self) -> int:
        """Bytes of text in both parts."""
        return self.n_train_bytes + self.n_heldout_bytes


def prepare(
    source: str | os.PathLike | Iterable[str],
    out_dir: str | os.PathLike,
    *,
    heldout_fraction: float = 0.05,
    max_bytes: int | None = None,
    seed: int = 0,
    field: str = "text",
    encoding: str | tuple[str, ...] = "utf-8",
) -> Prepared:
    """Write `train.txt` and `heldout.txt` under out_dir: documents joined by "<|endoftext|>".

    A document is held out if a hash of (seed, its text without outer white space) is small. So the order does not
    matter, and copies of a document are in the same part. In a corpus of up to 1,000 documents, the heldout_fraction of
    the distinct ones with the smallest hashes is held out, so that neither part is empty; in a larger one, all whose
    hash, as a number in 0..1, is below heldout_fraction. With fewer than 20 distinct documents, or few of megabytes
    each, the last heldout_fraction of every document is held out instead, cut at a newline where there is one.

    Args:
        source: as in `documents`, or any iterable of strings.
        heldout_fraction: between 0 and 1.
        max_bytes: stop after so much text; the document that crosses the limit is cut as in `documents`.

    The files are written under temporary names and renamed. `prepared.json`, which `open_prepared` reads, is removed
    before that and written after it: a kill leaves the old corpus, the new one, or none that `open_prepared` accepts.
    Leftovers of killed processes are removed. An output must not be the source, nor lie in a source folder.
    Raises ValueError for an empty corpus, and what `documents` raises; the old files are unchanged then.
    """
    if isinstance(heldout_fraction, bool | str) or not 0 < heldout_fraction < 1:
        raise ValueError(f"heldout_fraction={heldout_fraction}: allowed is more than 0 and less than 1")
    if max_bytes is not None:
        check_int("max_bytes", max_bytes, 1)
    check_int("seed", seed, -(2**127), 2**127 - 1)
    folder = Path(out_dir)
    targets = (folder / "train.txt", folder / "heldout.txt")
    if isinstance(source, (str, os.PathLike)):
        name, texts = os.fspath(source), documents(source, field=field, encoding=encoding, **document_limit(max_bytes))
        check_outside(source, targets)
    elif isinstance(source, bytes) or not isinstance(source, Iterable):
        raise ValueError(f"source is {type(source).__name__}: give a path or an iterable of str")
    else:
        name, texts = "source", iter(source)
    encoded = _limited(_encoded(texts, name), max_bytes)

    head: list[bytes] = []
    n_head_bytes = 0
    for text in encoded:
        head.append(text)
        n_head_bytes += len(text)
        if len(head) >= HEAD_DOCUMENTS or (n_head_bytes >= HEAD_BYTES and len(head) >= FEW_DOCUMENTS):
            break
    if not head:
        raise ValueError(f"{name}: empty corpus: no document in it has any text")
    rest = next(encoded, None)
    rule, parts = _rule(head, rest is None, heldout_fraction, seed)
    if rest is not None:
        head.append(rest)

    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder, _TEMPORARY)
    identity = secrets.token_hex(4)
    temporaries = [target.with_name(f"{target.name}.{identity}") for target in targets]
    n_documents, n_bytes = [0, 0], [0, 0]
    delimiter = DELIMITER.encode()
    try:
        with open(temporaries[0], "wb") as train, open(temporaries[1], "wb") as heldout:
            files = (train, heldout)
            for file in files:
                hold(file.fileno())
            for text in itertools.chain(head, encoded):
                for part, piece in enumerate(parts(text)):
                    if piece:
                        files[part].write(delimiter + piece if n_documents[part] else piece)
                        n_documents[part] += 1
                        n_bytes[part] += len(piece)
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if not all(n_documents):
            part_name = "training" if not n_documents[0] else "held-out"
            raise ValueError(
                f"{name}: the {part_name} part would be empty with heldout_fraction={heldout_fraction} "
                f"and {sum(n_documents)} documents; change the fraction or the seed, or bring more text"
            )
    except BaseException:
        for temporary in temporaries:
            temporary.unlink(missing_ok=True)
        raise
    result = Prepared(
        str(targets[0]), str(targets[1]), n_documents[0], n_documents[1], n_bytes[0], n_bytes[1], rule
    )
    manifest = folder / "prepared.json"
    manifest.unlink(missing_ok=True)
    targets[1].unlink(missing_ok=True)  # never a new training part with an old held-out part
    for temporary, target in zip(temporaries, targets, strict=True):
        os.replace(temporary, target)
    fields = asdict(result) | {"train_path": targets[0].name, "heldout_path": targets[1].name}
    temporary = manifest.with_name(f"{manifest.name}.{identity}")
    temporary.write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, manifest)
    return result


def open_prepared(out_dir: str | os.PathLike) -> Prepared:
    """The `Prepared` that `prepare` left in out_dir; FileNotFoundError where there is none or it was cut short."""
    path = Path(out_dir) / "prepared.json"
    if not path.exists():
        raise FileNotFoundError(f"{path}: no prepared corpus here, or its writing was cut short; prepare it again")
    try:
        prepared = Prepared(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path}: damaged: {error}") from None
    fields = asdict(prepared)
    for name, value in fields.items():
        count = name.startswith("n_")
        if type(value) is not (int if count else str) or (count and int(value) < 0):
            raise ValueError(f"{path}: damaged: {name} is {value!r}")
    if prepared.rule not in ("documents", "tails"):
        raise ValueError(f"{path}: damaged: rule is {prepared.rule!r}")
    for part in ("train_path", "heldout_path"):
        if fields[part] in ("", ".", "..") or "/" in fields[part] or "\0" in fields[part]:
            raise ValueError(f"{path}: damaged: {part} is {fields[part]!r}, not the name of a file beside it")
        fields[part] = str(path.parent / fields[part])
    return Prepared(**fields)


def document_limit(max_bytes: int | None) -> dict[str, int]:
    """Arguments of `documents` that keep it from reading a document longer than max_bytes into memory."""
    return {} if max_bytes is None else {"max_document_bytes": max(4, min(MOST_DOCUMENT_BYTES, max_bytes))}


def check_outside(source: str | os.PathLike, targets: Iterable[Path]) -> None:
    """ValueError where a text that is to be written is the source, or would lie in the folder that is the source."""
    path = Path(source)
    for target in () if os.fspath(source).startswith("hub:") else targets:
        if path.is_dir() and path.resolve() in target.resolve().parents:
            raise ValueError(f"{os.fspath(source)}: the output {target} would become a part of it; write elsewhere")
        refuse_overwrite([target], [path])


def limited(texts: Iterable[str], max_bytes: int | None) -> Iterator[str]:
    """`texts` up to max_bytes in UTF-8; the one that crosses the limit is cut, as in `prepare`."""
    if max_bytes is None:
        yield from texts
        return
    check_int("max_bytes", max_bytes, 1)
    for text in _limited(_encoded(iter(texts), "texts"), max_bytes):
        yield text.decode()


def _encoded(texts: Iterator[str], name: str) -> Iterator[bytes]:
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise ValueError(f"{name}: document {index} is {type(text).__name__}; a str is expected")
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"{name}: document {index} is no valid Unicode: {error}") from None
        for piece in data.split(DELIMITER.encode()):
            if piece.strip():
                yield piece


def _limited(texts: Iterator[bytes], max_bytes: int | None) -> Iterator[bytes]:
    left = max_bytes
    for text in texts:
        if left is None or len(text) <= left:
            yield text
        else:
            text = text[: cut_point(text, left)]
            if text.strip():
                yield text
            return
        if left is not None:
            left -= len(text)
            if not left:
                return


def _hash(text: bytes, seed: int) -> int:
    key = seed.to_bytes(16, "little", signed=True)
    return int.from_bytes(hashlib.blake2b(text.strip(), digest_size=8, key=key).digest(), "little")


def _rule(
    head: list[bytes], complete: bool, fraction: float, seed: int
) -> tuple[str, Callable[[bytes], tuple[bytes, bytes]]]:
    """The rule's name, and the function that gives the (training, held-out) part of a document."""
    hashes = sorted({_hash(text, seed) for text in head})
    # Very large documents, such as a text without delimiters: there may be so few that none would be held out.
    large = sum(map(len, head)) >= LARGE_BYTES * len(head) and fraction * len(hashes) < 2
    if (large and not complete) or (complete and len(hashes) < FEW_DOCUMENTS):

        def tails(text: bytes) -> tuple[bytes, bytes]:
            keep = int(len(text) * (1 - fraction))
            cut = cut_point(text, keep) if keep else 0
            first, last = text[:cut], text[cut:]
            return (first if first.strip() else b""), (last if last.strip() else b"")

        return "tails", tails
    limit = hashes[max(1, round(fraction * len(hashes))) - 1] + 1 if complete else int(fraction * 2**64)
    return "documents", lambda text: (b"", text) if _hash(text, seed) < limit else (text, b"")
