"""Reading WARC, WET, JSON lines and rows. Oracles: files made by hand; of damage, the records that it did not touch."""

import gzip
import io
import json
import sys
import tracemalloc
import types
import zlib
from functools import reduce

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate.document import Document, Raw
from purelm.curate.read import records
from purelm.curate.skipped import Read, Skipped, merged_reads, tally
from tests.curate.warc_files import PAGE, http, packed, pages, record

pytest.importorskip("fastwarc")


def read(tmp_path, content, name="a.warc.gz", **options):
    (tmp_path / name).write_bytes(content)
    return list(records(tmp_path / name, **options))


def ids(items):
    return [item.id.rpartition(":")[2] for item in items if not isinstance(item, Skipped)]


def reasons(items):
    return [item.reason for item in items if isinstance(item, Skipped)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("read")  # for hypothesis, whose examples share a test's tmp_path


def test_a_response(tmp_path):
    found = read(tmp_path, packed([record(http(b"<p>x", content_type='Text/HTML; charset="EUC-JP"'))]))
    meta = {"date": "2024-01-02T03:04:05Z"}
    assert found == [Raw("urn:uuid:1", b"<p>x", "http://example.org/", "text/html", "euc-jp", meta)]
    assert json.loads(json.dumps(dict(found[0].meta))) == meta


def test_wet(tmp_path):
    extra = "WARC-Identified-Content-Language: zho,eng\r\nWARC-Truncated: length\r\n"
    content = packed([record("n\xe9\ufeff\xa0".encode() + b"\xff", "conversion", extra=extra)])
    (found,) = read(tmp_path, content, "a.warc.wet.gz")
    assert found[:3] == ("urn:uuid:1", "n\xe9\ufeff\xa0\ufffd", "http://example.org/")
    assert found.meta == {"date": "2024-01-02T03:04:05Z", "languages": "zho,eng", "cut": "length"}


@pytest.mark.parametrize("pack", ["member", "stream", "plain", "zst"])
def test_every_packing_gives_the_same(tmp_path, pack):
    whole = b"".join(pages(5))
    if pack == "zst":
        whole = pytest.importorskip("zstandard").ZstdCompressor().compress(whole)
    content = {"member": packed(pages(5)), "stream": gzip.compress(whole)}.get(pack, whole)
    found = read(tmp_path, content, {"plain": "a.warc", "zst": "a.warc.zst"}.get(pack, "a.warc.gz"))
    assert [item.content for item in found] == [PAGE % i for i in range(5)]


def test_what_is_not_asked_for_is_counted(tmp_path):
    content = packed([
        record(b"software: x", "warcinfo"), record(b"GET / HTTP/1.1\r\n\r\n", "request"),
        record(http(b"x", 404), id="2"), record(http(b"y"), id="3"), record(b"a.example. IN A 10.0.0.1", id="4"),
        record(b""), record(http(b"")), record(http(b"z" * 3000)), record(http(b"z" * 900)),
    ])  # fmt: skip
    skipped = ["type: warcinfo", "type: request", "status: 404", "type: response that is not HTTP", *["empty"] * 2]
    found = read(tmp_path, content, most_bytes=1000)
    assert ids(found) == ["3", "1"] and reasons(found) == [*skipped, "too large"]
    assert ids(read(tmp_path, content, most_bytes=1000, statuses=None)) == ["2", "3", "1"]
    assert ids(read(tmp_path, content, statuses=(404,))) == ["2"]
    counts = reduce(tally, found, Read())
    assert counts == Read(2, 901, {reason: skipped.count(reason) for reason in skipped} | {"too large": 1})


def encodings():
    brotli = pytest.importorskip("brotli")
    return {"gzip": gzip.compress, "deflate": zlib.compress, "br": brotli.compress, "x-gzip": gzip.compress}


def test_http_encodings(tmp_path):
    """Oracles: the standard library's and brotli's compressors; chunks by hand."""
    page = b"<p>" + b"text " * 300
    for name, pack in encodings().items():
        body = pack(page)
        extra = f"Content-Encoding: {name}\r\n"
        chunked = b"%x\r\n%b\r\n%X;x=y\r\n%b\r\n0\r\n\r\n" % (10, body[:10], len(body) - 10, body[10:])
        for content in (http(body, extra=extra), http(chunked, extra=extra + "Transfer-Encoding: chunked\r\n"),
                        http(page, extra=extra)):  # fmt: skip
            (found,) = read(tmp_path, packed([record(content)]))
            assert found.content == page, name
        (found,) = read(tmp_path, packed([record(http(body[:-5][:3] + b"\xff" * 9, extra=extra))]))
        assert isinstance(found, Skipped) or name == "deflate"  # its first two bytes are its only mark
        bomb = pack(bytes(3_000_000))
        assert reasons(read(tmp_path, packed([record(http(bomb, extra=extra))]), most_bytes=100_000)) == ["too large"]


def test_a_bomb_of_one_member_is_passed_over(tmp_path):
    """Of 16 MB as 16 kB; peak memory by tracemalloc does not see FastWARC's, so of the items alone."""
    bomb = record(http(bytes((1 << 24) + 1)), id="bomb")
    found = read(tmp_path, packed([*pages(1), bomb, *pages(2)[1:]]))
    assert ids(found) == ["0", "1"] and reasons(found) == ["too large"]


@settings(max_examples=60)
@given(st.data())
def test_a_cut_file_gives_a_prefix(folder, data):
    """Of a file packed by record, as one stream, and not packed; at any byte."""
    content, name = data.draw(st.sampled_from([
        (packed(pages(4)), "a.warc.gz"), (gzip.compress(b"".join(pages(4)), mtime=0), "a.warc.gz"),
        (b"".join(pages(4)), "a.warc"),
        (b"".join(b'{"id": "%d", "text": "x%d"}\n' % (i, i) for i in range(4)), "a.jsonl"),
        (gzip.compress(b"".join(b'{"id": "%d", "text": "x%d"}\n' % (i, i) for i in range(4)), mtime=0), "a.jsonl.gz"),
    ]))  # fmt: skip
    whole = read(folder, content, name)
    assert ids(whole) == ["0", "1", "2", "3"] and not reasons(whole)
    part = read(folder, content[: data.draw(st.integers(0, len(content)))], name)
    good = [item for item in part if not isinstance(item, Skipped)]
    assert good == whole[: len(good)] and part[: len(good)] == good and len(part) <= len(good) + 1


@pytest.mark.parametrize("at", [0, 1, 3])
def test_empty_members_hide_nothing(folder, at):
    """As programs leave them at the end of a file that is then joined to others; FastWARC stops there."""
    parts = [gzip.compress(r, mtime=0) for r in pages(3)]
    content = b"".join([*parts[:at], *[gzip.compress(b"", mtime=0)] * 2, *parts[at:]])
    assert ids(read(folder, content)) == ["0", "1", "2"] and not reasons(read(folder, content))
    assert reasons(read(folder, content + parts[0][:60])) == ["truncated"]


def test_every_cut_of_members(folder):
    """All cuts: records before it are all there, and what is cut is said unless it is cut between two."""
    parts = [gzip.compress(r, mtime=0) for r in pages(3)]
    content, ends = b"".join(parts), [sum(map(len, parts[:i])) for i in range(4)]
    for cut in range(0, len(content), 3):
        found = read(folder, content[:cut])
        whole = sum(end <= cut for end in ends[1:])
        assert ids(found)[:whole] == [str(i) for i in range(whole)] and len(ids(found)) <= whole + 1
        assert cut in ends or len(ids(found)) > whole or reasons(found) or cut - ends[whole] < 3


@settings(max_examples=60)
@given(st.integers(0, 4), st.data())
def test_damage_costs_what_it_touches(folder, at, data):
    """One member's bytes overwritten: every other record is there, in order, and the damage is one stretch."""
    parts = [gzip.compress(r, mtime=0) for r in pages(5)]
    noise = data.draw(st.binary(min_size=1, max_size=60))
    start = data.draw(st.integers(0 if at else 3, len(parts[at]) - 1))
    damaged = bytearray(parts[at])
    damaged[start : start + len(noise)] = noise[: len(damaged) - start]
    parts[at] = bytes(damaged)
    found = read(folder, b"".join(parts))
    others = [str(i) for i in range(5) if i != at]
    assert [i for i in ids(found) if i != str(at)] == others
    if str(at) not in ids(found):
        assert len(reasons(found)) == 1
    else:
        assert found[at].content == PAGE % at  # the noise fell on what does not matter


def test_damage_in_a_row_is_one_stretch(tmp_path):
    parts = packed(pages(2)), b"\x1f\x8b\x08" + b"junk" * 100, b"\x1f\x8b\x08\xff", packed(pages(4)[2:])
    found = read(tmp_path, b"".join(parts))
    assert ids(found) == ["0", "1", "2", "3"] and reasons(found) == ["damaged"]
    plain = b"".join(pages(2)) + b"junk\r\n" * 9 + b"\r\n\r\n" + b"".join(pages(4)[2:])
    found = read(tmp_path, plain, "a.warc")
    assert ids(found) == ["0", "1", "2", "3"]


def test_lengths_that_are_not_true(tmp_path):
    """Too long: truncated, and the next member is read. Not a number: as good as none."""
    good = packed(pages(2))
    for length in (100, 300, 420, 5000):
        found = read(tmp_path, packed([record(http(b"abc"), id="bad", length=length)]) + good)
        assert ids(found) == ["0", "1"] and {*reasons(found)} <= {"truncated", "damaged"} and reasons(found), length
    for length in ("-5", "x", "9" * 30):
        assert ids(read(tmp_path, packed([record(http(b"abc"), length=length)]) + good))[-1] == "1"


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n" + bytes(99), b"hello\n" * 99, b"\0", b"%PDF-1.4 ..."])
def test_a_file_that_is_no_warc(tmp_path, content):
    assert reasons(read(tmp_path, content)) == ["not a WARC file"]


def test_gzip_of_something_else(tmp_path):
    assert reasons(read(tmp_path, gzip.compress(b"hello\r\n" * 99))) == ["damaged"]
    assert read(tmp_path, b"") == [] == read(tmp_path, gzip.compress(b""))


NAMES = ["a.warc.gz", "a.warc", "a.warc.zst", "a.jsonl", "a.jsonl.gz", "a.wet"]
STARTS = [b"", b"\x1f\x8b\x08", b"WARC/1.0\r\n", b"\x28\xb5\x2f\xfd", b'{"text": "']


@settings(max_examples=80)
@given(st.binary(max_size=300), st.sampled_from(NAMES), st.sampled_from(STARTS))
def test_noise_never_raises(folder, content, name, start):
    for item in read(folder, start + content, name):
        assert isinstance(item, Raw | Document | Skipped)


@settings(max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 10_000), st.integers(0, 255)), max_size=4))
def test_changed_bytes_of_headers_never_raise(folder, changes):
    content = bytearray(b"".join(pages(3)))
    for at, value in changes:
        content[at % len(content)] = value
    read(folder, bytes(content), "a.warc")
    read(folder, gzip.compress(bytes(content)))


def test_json_lines(tmp_path):
    lines = [
        '{"id": 7, "text": "a", "url": "u", "n": [1]}', "", "{", "[1]", '{"text": 5}', '{"text": ""}', '{"x": 1}',
        '{"text": "\\ud800"}', '{"text": "' + "b" * 200 + '"}', '{"text": "c", "metadata": {"url": "v"}}',
    ]  # fmt: skip
    content = "\n".join(lines).encode() + b'\n{"text": "\xff"}\n{"text": "d"}'
    for name, data in (("a.jsonl", content), ("a.JSONL.gz", gzip.compress(content[:90]) + gzip.compress(content[90:]))):
        found = read(tmp_path, data, name, most_bytes=100)
        assert [d for d in found if isinstance(d, Document)] == [
            Document("7", "a", "u", {"n": [1]}),
            Document(f"{tmp_path / name}, line 10", "c", "v", {"metadata": {"url": "v"}}),
            Document(f"{tmp_path / name}, line 12", "d"),
        ]  # fmt: skip
        damaged = ["damaged", "damaged", "no text", "empty", "no text", "damaged", "too large", "damaged"]
        assert reasons(found) == damaged
        assert found[1].where == f"{tmp_path / name}, line 3"
    assert read(tmp_path, b'{"body": "x", "text": 1}', "a.json", field="body")[0].text == "x"


def test_json_ids_and_marks(tmp_path):
    """A byte order mark is no damage, 0 is an id, and half a surrogate pair is none in a text, an id or an address."""
    half = [f'{{"text": "a", "{name}": "x\\ud800"}}' for name in ("id", "url", "n")]
    content = b'\xef\xbb\xbf{"text": "a", "id": 0}\n' + "\n".join([*half, '{"text": "b", "id": ""}']).encode()
    found = read(tmp_path, content, "a.jsonl")
    assert reasons(found) == ["damaged", "damaged"] and found[3].meta == {"n": "x\ud800"}
    assert found[0] == Document("0", "a") and found[4].id == f"{tmp_path / 'a.jsonl'}, line 5"


def test_a_line_without_end_is_not_held(tmp_path):
    """64 MB of one line in a .gz: Python's peak stays near the blocks it is read in."""
    content = gzip.compress(b'{"text": "' + bytes(1 << 26) + b'\n{"text": "x"}\n', 1)
    tracemalloc.start()
    found = read(tmp_path, content, "a.jsonl.gz", most_bytes=1 << 20)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert reasons(found) == ["too large"] and found[1].text == "x" and peak < 16 << 20


def test_rows(tmp_path, monkeypatch):
    """A stand-in for datasets; a damaged file costs itself."""
    rows = [{"text": "x", "id": "1"}, {"text": None}, OSError("bad")]
    tables = {"a.parquet": rows, "b.parquet": [{"text": "y" * 30}]}
    module = types.ModuleType("datasets")

    def load_dataset(*_, data_files="", **__):
        for row in tables[data_files.rpartition("/")[2]]:
            if isinstance(row, Exception):
                raise row
            yield row

    module.load_dataset = load_dataset
    monkeypatch.setitem(sys.modules, "datasets", module)
    for name in tables:
        (tmp_path / name).touch()
    found = list(records(tmp_path, most_bytes=20))
    assert found[0] == Document("1", "x") and reasons(found) == ["no text", "damaged", "too large"]


def test_arguments(tmp_path):
    for path in ("a.txt", "a.jsonl.lz4"):
        with pytest.raises(ValueError, match=r"path=.*: names end in \.warc"):
            records(path)
    for options in ({"most_bytes": 0}, {"statuses": "200"}, {"field": ""}):
        with pytest.raises(ValueError, match=next(iter(options))):
            records("a.warc", **options)
    with pytest.raises(FileNotFoundError, match="no such file"):
        records(tmp_path / "a.warc.gz")
    (tmp_path / "b.warc").mkdir()
    with pytest.raises(ValueError, match=r"no \.parquet file"):
        list(records(tmp_path / "b.warc"))


def test_the_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.warc").write_bytes(b"WARC/1.0")
    monkeypatch.delitem(sys.modules, "fastwarc.warc", raising=False)
    monkeypatch.setitem(sys.modules, "fastwarc", None)
    with pytest.raises(ModuleNotFoundError, match=r"fastwarc: pip install 'purelm\[curate\]'"):
        list(records(tmp_path / "a.warc"))


counts = st.dictionaries(st.sampled_from("abc"), st.integers(1, 9))
reads = st.builds(Read, st.integers(0, 99), st.integers(0, 99), counts)


@given(reads, reads, reads)
def test_counts_merge_in_any_order(a, b, c):
    assert merged_reads(merged_reads(a, b), c) == merged_reads(a, merged_reads(b, c))
    assert merged_reads(a, b) == merged_reads(b, a) and merged_reads(a, Read()) == a


ITEMS = [Raw("1", b"ab"), Document("2", "xyz"), Skipped("a", ""), Skipped("b", "")]


@given(st.lists(st.sampled_from(ITEMS)), st.integers(0, 9))
def test_counts_of_parts_are_those_of_the_whole(items, cut):
    whole = reduce(tally, items, Read())
    assert merged_reads(reduce(tally, items[:cut], Read()), reduce(tally, items[cut:], Read())) == whole
    assert whole.records + sum(whole.skipped.values()) == len(items)


def test_real_crawls(shared_data):
    """Oracle: FastWARC's own walk of healthy files."""
    from fastwarc.warc import ArchiveIterator

    files = sorted((shared_data / "warc").glob("*.warc.gz"))
    if not files:
        pytest.skip(f"no crawls in {shared_data / 'warc'}")
    for path in files:
        theirs = [str(r.record_type) for r in ArchiveIterator(io.BytesIO(path.read_bytes()), parse_http=False)]
        ours = list(records(path, statuses=None))
        assert len(ours) == len(theirs) and not {"damaged", "truncated"} & {*reasons(ours)}, path
