"""Files, archives and folders as streams of decompressed bytes.

In a folder or an archive these files are read, sorted by path: names that end in .txt or .jsonl, optionally followed by
.gz or .zst; in a folder also .zip. Left out are hidden files, `__MACOSX`, all other endings, and files called readme,
license, licence, copying or cats (nltk's list of categories). A file that the caller names itself is read whatever it
is called, if its ending is one of these. A pipe, a device or a broken link with the name of a text is an error. Links
to folders are not followed.

Archives are unpacked a block at a time, so memory is bounded whatever they unpack to.
"""

import gzip
import io
import os
import stat
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

__all__ = ["Stream", "allowed_endings", "bare_name", "file_blocks", "streams"]

TEXT_ENDINGS = (".txt", ".jsonl")
PACKED_ENDINGS = (".gz", ".zst")
NOT_TEXT_STEMS = ("readme", "license", "licence", "copying", "cats")
BLOCK_BYTES = 1 << 20
# Bytes given to zstandard in one call, which returns all that they unpack to: up to 32,768 times as many, since a block
# of 128 KiB of one repeated byte is stored in 4 bytes.
ZSTD_FEED_BYTES = 1 << 11
ZSTD_WINDOW_BYTES = 1 << 27  # as much as the command zstd takes without --long=31
ZIP_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA)
# APPNOTE.TXT of PKWARE, 4.4.5
ZIP_NAMES = {1: "shrink", 6: "implode", 9: "deflate64", 93: "zstandard", 95: "xz", 98: "ppmd", 99: "AES encryption"}


class Stream(NamedTuple):
    """One text file as it is read."""

    label: str  # for messages: the file, and the member after "!"
    name: str  # lower case, without .gz and .zst
    blocks: Iterator[bytes]  # decompressed


def allowed_endings() -> str:
    """The endings that are read, for error messages."""
    return f"{', '.join(TEXT_ENDINGS)} (also with {' or '.join(PACKED_ENDINGS)}) and .zip"


def _is_listed(name: str) -> bool:
    """Whether a path inside a folder or archive counts as text, by the rule at the head of this file."""
    parts = bare_name(name.lower()).split("/")
    if any(part.startswith(".") or part == "__macosx" for part in parts):
        return False
    return parts[-1].endswith(TEXT_ENDINGS) and parts[-1].rsplit(".", 1)[0] not in NOT_TEXT_STEMS


def streams(path: Path, label: str) -> Iterator[Stream]:
    """The text files of a file, an archive or a folder, by the rule at the head of this file; label: for messages."""
    if path.is_dir():
        names = sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if not file.is_dir())
        for name in names:
            is_zip = name.lower().endswith(".zip") and _is_listed(name[:-4] + ".txt")
            if is_zip or _is_listed(name):
                yield from streams(path / name, f"{label.rstrip('/')}/{name}")
        return
    check_is_file(path, label)
    if path.name.lower().endswith(".zip"):
        yield from _zip_streams(path, label)
        return
    name = bare_name(path.name.lower())
    # A name such as x.gz does not say what is inside: it is read as text.
    if name.endswith(TEXT_ENDINGS) or (name != path.name.lower() and "." not in name):
        with open(path, "rb") as file:
            yield _stream(file, path.name, label)
        return
    raise ValueError(f"{label}: unknown kind of file; files that end in {allowed_endings()} are read")


def file_blocks(path: Path, label: str) -> Iterator[bytes]:
    """One file, whatever it is called; unpacked where its name ends in .gz or .zst."""
    check_is_file(path, label)
    with open(path, "rb") as file:
        yield from _stream(file, path.name, label).blocks


def bare_name(name: str) -> str:
    """A name without its endings .gz and .zst."""
    while name.endswith(PACKED_ENDINGS):
        name = name[: name.rindex(".")]
    return name


def check_is_file(path: Path, label: str) -> None:
    """Raise where `path` does not exist, or is a pipe or a device, from which reading may never end."""
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        what = "a link to nothing" if path.is_symlink() else "no such file or folder"
        raise FileNotFoundError(f"{label}: {what}") from None
    if not stat.S_ISREG(mode):
        kinds = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}
        kind = kinds.get(stat.S_IFMT(mode), "a device")
        raise ValueError(f"{label}: is {kind}; a file is expected")


def _zip_streams(path: Path, label: str) -> Iterator[Stream]:
    with _damage(label):
        archive = zipfile.ZipFile(path)
    with archive:
        # Read by entry, not by name: two entries may have the same name. Names of folders end in "/", so that they are
        # not listed.
        for entry in sorted(archive.infolist(), key=lambda entry: entry.filename):
            if not _is_listed(entry.filename):
                continue
            inner = f"{label}!{entry.filename}"
            if entry.flag_bits & 1:
                raise ValueError(f"{inner}: is encrypted; unpack the archive and give the folder")
            if entry.compress_type not in ZIP_METHODS:
                method = ZIP_NAMES.get(entry.compress_type, f"method {entry.compress_type}")
                raise ValueError(
                    f"{inner}: is compressed with {method}, which is not read here (deflate, bzip2 and lzma are); "
                    "unpack the archive and give the folder"
                )
            with _damage(inner):
                file = archive.open(entry)
            with file:
                yield _stream(file, entry.filename, inner)


def _stream(file: IO[bytes], name: str, label: str) -> Stream:
    name = name.lower()
    blocks = _read(file)
    while name.endswith(PACKED_ENDINGS):
        blocks = _gunzip(blocks) if name.endswith(".gz") else _unzstd(blocks, label)
        name = name[: name.rindex(".")]
    return Stream(label, name, _guarded(blocks, label))


def _read(file: IO[bytes] | gzip.GzipFile) -> Iterator[bytes]:
    while block := file.read(BLOCK_BYTES):
        yield block


class _Blocks(io.RawIOBase):
    """A stream of blocks as a file object, which gzip needs."""

    def __init__(self, blocks: Iterator[bytes]):
        self.blocks, self.rest = blocks, memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        if not self.rest:
            self.rest = memoryview(next(self.blocks, b""))
        size = min(len(buffer), len(self.rest))
        buffer[:size] = self.rest[:size]
        self.rest = self.rest[size:]
        return size


def _gunzip(blocks: Iterator[bytes]) -> Iterator[bytes]:
    with io.BufferedReader(_Blocks(blocks)) as packed, gzip.GzipFile(fileobj=packed, mode="rb") as file:
        yield from _read(file)


def _unzstd(blocks: Iterator[bytes], label: str) -> Iterator[bytes]:
    try:
        import zstandard
    except ModuleNotFoundError:
        raise ModuleNotFoundError(f"{label}: reading .zst needs zstandard: pip install 'purelm[zstd]'") from None
    # decompressobj rather than stream_reader, which does not report a truncated file.
    context = zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW_BYTES)
    frame = context.decompressobj()
    begun = False
    for block in blocks:
        for start in range(0, len(block), ZSTD_FEED_BYTES):
            feed = block[start : start + ZSTD_FEED_BYTES]
            while feed:
                if frame.eof:
                    frame = context.decompressobj()
                begun = True
                try:
                    data = frame.decompress(feed)
                except zstandard.ZstdError as error:
                    if "too much memory" in str(error):
                        raise ValueError(
                            f"{label}: was compressed with a window above {ZSTD_WINDOW_BYTES >> 20} MiB (zstd --long, "
                            "--ultra); unpack it first: zstd -d --long=31"
                        ) from None
                    raise ValueError(f"{label}: damaged archive: {error}") from None
                yield from (data[i : i + BLOCK_BYTES] for i in range(0, len(data), BLOCK_BYTES))
                feed = frame.unused_data if frame.eof else b""
    if begun and not frame.eof:
        raise ValueError(f"{label}: truncated archive: the last zstandard frame is not complete")


@contextmanager
def _damage(label: str) -> Iterator[None]:
    """Turns the archive readers' exceptions into a ValueError of one line that names the file."""
    try:
        yield
    except EOFError as error:
        raise ValueError(f"{label}: truncated archive: {error}") from None
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, NotImplementedError, RuntimeError) as error:
        raise ValueError(f"{label}: damaged archive: {error}") from None


def _guarded(blocks: Iterator[bytes], label: str) -> Iterator[bytes]:
    while True:
        with _damage(label):
            block = next(blocks, None)
        if block is None:
            return
        yield block
