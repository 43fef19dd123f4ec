"""Rows of JSON-lines files. Oracle: the rows that were written."""

import json

import pytest

from purelm.data.json_lines import json_rows


def test_rows_and_where_they_are(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"a": 1}\n\n  \n{"b": "\u00e9\u2028"}')  # a line separator of Unicode ends no line
    assert list(json_rows(path)) == [(f"{path}, line 1", {"a": 1}), (f"{path}, line 4", {"b": "\u00e9\u2028"})]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (b"{", "line 2: not JSON"),
        (b"[1]", "line 2: not a JSON object"),
        (b'{"a": "\xff"}', "line 2: not UTF-8"),
        (b"[" * 100_000, "line 2: not JSON"),
    ],
)
def test_a_bad_line_is_named(tmp_path, bad, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(json.dumps({"a": 1}).encode() + b"\n" + bad + b"\n")
    with pytest.raises(ValueError, match=rf"x.jsonl, {message}"):
        list(json_rows(path))


def test_no_file(tmp_path):
    with pytest.raises(ValueError, match=r"none.jsonl: no such file"):
        list(json_rows(tmp_path / "none.jsonl"))
