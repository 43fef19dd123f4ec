"""Rows of JSON-lines files and of JSON arrays. Oracle: the rows that were written."""

import gzip
import json

import pytest

from purelm.data.json_lines import json_rows, rows_of


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


def test_packed(tmp_path):
    """.gz and .zst are unpacked; a damaged one is named."""
    zstandard = pytest.importorskip("zstandard")
    text = b'{"a": 1}\n{"a": 2}\n'
    for name, data in (("x.jsonl.gz", gzip.compress(text)), ("x.jsonl.zst", zstandard.compress(text))):
        (tmp_path / name).write_bytes(data)
        assert [row for _, row in json_rows(tmp_path / name)] == [{"a": 1}, {"a": 2}]
        (tmp_path / name).write_bytes(data[:-9])
        with pytest.raises(ValueError, match=f"{name}: (truncated|damaged) archive"):
            list(json_rows(tmp_path / name))


def test_arrays(tmp_path):
    """A .json file may be one array, or lines as any other; an array in a .jsonl file is a bad line."""
    path = tmp_path / "x.json"
    path.write_text('\n [{"a": 1},\n {"a": [2]}]\n')
    assert list(rows_of(path)) == [(f"{path}, entry 1", {"a": 1}), (f"{path}, entry 2", {"a": [2]})]
    (tmp_path / "x.json.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [row for _, row in rows_of(tmp_path / "x.json.gz")] == [{"a": 1}, {"a": [2]}]
    path.write_text('{"a": 1}\n{"a": 2}\n')
    assert list(rows_of(path)) == list(json_rows(path)) and len(list(rows_of(path))) == 2
    for text, message in (('[{"a": 1}, 2]', "x.json, entry 2: not a JSON object"), ("[{", "x.json: not JSON")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(rows_of(path))
    (tmp_path / "y.jsonl").write_text('[{"a": 1}]')
    with pytest.raises(ValueError, match=r"y.jsonl, line 1: not a JSON object"):
        list(rows_of(tmp_path / "y.jsonl"))
    with pytest.raises(ValueError, match=r"none.json: no such file"):
        list(rows_of(tmp_path / "none.json"))
