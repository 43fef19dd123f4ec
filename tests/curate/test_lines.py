"""Lines of files. Oracles: collections.Counter over the lines themselves; the same hashes in plain Python."""

import itertools
import os
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.curate import lines
from purelm.curate.lines import LEAST, exact_line_deduplication, line_hashes
from purelm.tokenizer.engine import has_numba

ENGINES = ["python", *(["numba"] if has_numba() else [])]
LONG = ["a line of many bytes", "a line of many byteS", "", "\r"]
LINE = st.one_of(st.sampled_from(LONG), st.text("ab é\0", max_size=18))
FILES = st.lists(st.lists(LINE.map(str.encode), max_size=9).map(b"\n".join), min_size=1, max_size=4)


def cut(data):
    *whole, rest = data.split(b"\n")
    return [*(line + b"\n" for line in whole), *([rest] if rest else [])]


@pytest.mark.parametrize("block", [1, 1 << 22])
@pytest.mark.parametrize("engine", ENGINES)
@given(files=FILES, keep=st.sampled_from(["none", "first"]))
@settings(max_examples=40, deadline=None)
def test_files(tmp_path_factory, block, engine, files, keep):
    """Oracle: a Counter. Room for sixteen lines; blocks of one line and of all of them."""
    folder = tmp_path_factory.mktemp("lines")
    paths = [folder / f"{i}.txt" for i in range(len(files))]
    for path, data in zip(paths, files, strict=True):
        path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lines, "BLOCK", block)
        exact_line_deduplication(paths, folder / "out", keep=keep, memory=LEAST, engine=engine)
    counts = Counter(line.removesuffix(b"\n") for data in files for line in cut(data))
    seen = set()
    for path, data in zip(paths, files, strict=True):
        wanted = []
        for line in cut(data):
            key = line.removesuffix(b"\n")
            if counts[key] == 1 or (keep == "first" and key not in seen):
                wanted.append(line)
            seen.add(key)
        assert (folder / "out" / path.name).read_bytes() == b"".join(wanted) and path.read_bytes() == data
    assert len(list((folder / "out").iterdir())) == len(files)


@given(st.lists(st.binary(max_size=20), max_size=6).map(b"\n".join))
@settings(deadline=None)
def test_hashes(data):
    """Equal for equal lines alone, and by both engines."""
    hashes, ends = line_hashes(data, "python")
    pieces = cut(data)
    assert np.diff(ends, prepend=0).tolist() == [len(piece) for piece in pieces]
    for column in hashes.T.tolist():
        assert len(set(column)) == len({piece.removesuffix(b"\n") for piece in pieces})
    for engine in ENGINES[1:]:
        again = line_hashes(data, engine)
        assert (again[0] == hashes).all() and (again[1] == ends).all()


@pytest.mark.parametrize("keep", ["none", "first"])
@given(groups=st.lists(st.integers(1, 20), max_size=12), memory=st.sampled_from([LEAST // 2, 2000, 1 << 20]))
@settings(max_examples=40, deadline=None)
def test_hashes_with_equal_halves(tmp_path_factory, keep, groups, memory):
    """Oracle: the groups' places. Hashes that differ in one half alone; groups that go over the ends of blocks."""
    rows = [(h // 2, h % 2, i) for i, h in enumerate(h for h, n in enumerate(groups) for _ in range(n))]
    place, wanted = 0, []
    for n in groups:
        wanted += [*range(place + (keep == "first"), place + n)] if n > 1 else []
        place += n
    blocks = [np.array(rows[::-1], np.uint64).reshape(-1, 3)]
    found = [x for part in lines._left_out(blocks, keep, tmp_path_factory.mktemp("x"), memory) for x in part[:, 0]]
    assert sorted(found) == wanted


def test_words_of_eight_bytes():
    """Lines of all lengths about a word's, with each byte changed once: all hashes differ, in both halves."""
    texts = {bytes(n) for n in range(20)}
    texts |= {bytes([*bytes(i), 1 + n % 7, *bytes(n - i - 1)]) for n in range(1, 20) for i in range(n)}
    for engine in ENGINES:
        hashes, _ = line_hashes(b"\n".join(sorted(texts)) + b"\n", engine)
        assert len(hashes) == len(texts) and all(len({*column}) == len(texts) for column in hashes.T.tolist())


@pytest.mark.parametrize("engine", ENGINES[1:])
def test_bytes_near_a_line_feed(engine):
    """Oracle: plain Python. Those from which a search eight bytes at a time might carry into the next one."""
    for n in (7, 8, 9, 16, 17):
        for i, a, b in itertools.product(range(n), (9, 10, 11, 138, 255), (0, 10, 11, 12, 128)):
            data = bytearray(b"x" * n)
            data[i], data[(i + 1) % n] = a, b
            found, wanted = line_hashes(bytes(data), engine), line_hashes(bytes(data), "python")
            assert found[1].tolist() == wanted[1].tolist() and found[0].tolist() == wanted[0].tolist()


def test_what_is_refused(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x\n")
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "a").write_bytes(b"x\n")
    os.link(path, tmp_path / "same")
    (tmp_path / "link").symlink_to(path)
    (tmp_path / "taken" / "a").mkdir(parents=True)
    for inputs, output, options, message in [
        ([path, tmp_path / "same"], tmp_path / "out", {}, "same: is the same file as"),
        ([tmp_path / "link", path], tmp_path / "out", {}, "is the same file as"),
        (str(path), tmp_path / "out", {}, "input_files=.*got one str"),
        ([path], tmp_path / "taken", {}, "a: is a folder"),
        ([path], tmp_path / "same", {}, "same: is no folder"),
        ([path], tmp_path, {}, "would replace it"),
        ([path, tmp_path / "b" / "a"], tmp_path / "out", {}, "another input is named a too"),
        ([tmp_path / "none"], tmp_path / "out", {}, "no such file"),
        ([path], tmp_path / "out", {"keep": "last"}, "keep='last'"),
        ([path], tmp_path / "out", {"memory": LEAST - 1}, "memory="),
        ([path], tmp_path / "out", {"engine": "c"}, "engine='c'"),
    ]:
        with pytest.raises(ValueError, match=message):
            exact_line_deduplication(inputs, output, **options)
    assert not (tmp_path / "out").exists() and path.read_bytes() == b"x\n"
