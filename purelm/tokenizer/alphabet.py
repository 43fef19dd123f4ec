"""GPT-2's printable alphabet for bytes, and reading and writing of text files, as the tokenizer's formats need them."""

import os
import re
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

from purelm.files import hold, remove_leftovers


@lru_cache(maxsize=1)
def byte_characters() -> tuple[str, ...]:
    """The character that stands for each byte: itself where it is printable in Latin-1, else U+0100 and up in order.

    Source: Radford et al. 2019, bytes_to_unicode of the released encoder.
    """
    printable = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
    others = iter(range(0x100, 0x200))
    return tuple(chr(value) if value in printable else chr(next(others)) for value in range(256))


@lru_cache(maxsize=1)
def _values() -> dict[int, str]:
    """For str.translate: from the alphabet to Latin-1, whose characters are bytes; None for the rest is not there."""
    return {ord(character): chr(value) for value, character in enumerate(byte_characters())}


@lru_cache(maxsize=1)
def _characters() -> dict[int, str]:
    return dict(enumerate(byte_characters()))


def to_unicode(token: bytes) -> str:
    """The token in the printable alphabet.

    >>> len(to_unicode(b" the"))
    4
    """
    return token.decode("latin-1").translate(_characters())


def from_unicode(text: str, where: str) -> bytes:
    """The token that `text` stands for; ValueError, beginning with `where`, for a character outside the alphabet."""
    values = _values()
    for character in text:
        if ord(character) not in values:
            raise ValueError(
                f"{where}: {text!r} holds {character!r}, which stands for no byte: not a byte-level vocabulary"
            )
    return text.translate(values).encode("latin-1")


def read_text(path: str | os.PathLike) -> str:
    """The UTF-8 text of a file; ValueError names the file and the place of a byte that is no UTF-8."""
    data = Path(path).read_bytes()
    try:
        return data.decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise ValueError(f"{os.fspath(path)}, line {line}: byte {error.start} is not UTF-8") from None


def write_atomic(texts: Mapping[str | os.PathLike, str]) -> None:
    """Write each text beside its path, flush all to the disk, then rename: a file is always the old or the new one.

    What a killed process left beside these paths is removed.
    """
    written: list[tuple[str, str | os.PathLike]] = []
    handles: list[int] = []  # open until all is renamed: so another process sees that these are no leftovers
    try:
        for path, text in texts.items():
            folder, name = Path(path).parent, Path(path).name
            remove_leftovers(folder, re.compile(rf"\.{re.escape(name)}\.(?P<id>\w{{8}})\.tmp"))
            handle, temporary = tempfile.mkstemp(dir=folder, prefix=f".{name}.", suffix=".tmp")
            handles.append(handle)
            written.append((temporary, path))
            hold(handle)
            with open(handle, "wb", closefd=False) as file:
                file.write(text.encode("utf-8"))
                file.flush()
                os.fsync(handle)
            os.chmod(temporary, 0o666 & ~_umask())
        for temporary, path in written:
            os.replace(temporary, path)
    except BaseException:
        for temporary, _ in written:
            Path(temporary).unlink(missing_ok=True)
        raise
    finally:
        for handle in handles:
            os.close(handle)


def _umask() -> int:
    """The process's file mode mask; Linux tells it without setting it, which other threads would see."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("Umask:"):
            return int(line.split()[1], 8)
    return 0o022
