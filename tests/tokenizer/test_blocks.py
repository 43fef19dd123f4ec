"""A corpus as blocks. Oracles: the corpus itself, and the place of the bad byte."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.tokenizer import blocks
from purelm.tokenizer.blocks import (
    block_texts,
    chunk_spans,
    decode_chunk,
    file_blocks,
    look_ahead,
    read_span,
    text_blocks,
)


@given(texts=st.lists(st.text(max_size=20), max_size=30), n_bytes=st.integers(0, 300), block_bytes=st.integers(1, 50))
def test_looking_ahead_loses_nothing(texts, n_bytes, block_bytes):
    """Law: all texts come, in order; what is known is the size of a beginning that reaches n_bytes, or of all."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "BLOCK_BYTES", block_bytes)
        known, after = look_ahead(text_blocks(iter(texts)), n_bytes)
        found = list(after)
    encoded = [text.encode() for text in texts]
    assert [text for block in found for text in block_texts(block)] == encoded
    size = sum(map(len, encoded))
    assert known == size if size < n_bytes else n_bytes <= known <= size
    assert [block.start for block in found[1:]] == [block.end for block in found[:-1]]


def test_blocks_of_a_file_are_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "BLOCK_BYTES", 20)
    path, data = tmp_path / "a.txt", "caf\u00e9 \u4e2d\u6587 and more\r\n".encode() * 20
    path.write_bytes(data)
    found = list(file_blocks(path, "gpt2", ()))
    assert len(found) > 5 and b"".join(text for block in found for text in block_texts(block)) == data


def test_bad_utf8_is_named_by_file_byte_and_line(tmp_path):
    path = tmp_path / "bad.txt"
    data = b"one two\nthree\n" * 100 + b"caf\xe9 bar\n" + b"tail " * 100
    path.write_bytes(data)
    at = data.index(b"\xe9")
    for n_bytes in (10, 10_000):
        with pytest.raises(ValueError, match=rf"{re.escape(str(path))}: not UTF-8 at byte {at}, line 201: .*\\xe9"):
            for start, end in chunk_spans(path, n_bytes, "gpt2"):
                decode_chunk(read_span(path, start, end), str(path), start)
    assert decode_chunk("\ufeffa\r\n".encode(), "x") == "\ufeffa\r\n"
