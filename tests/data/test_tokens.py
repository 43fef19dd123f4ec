"""Token files: round trips, shards against one array, atomic writing, and one clear error for each kind of damage."""

import copy
import hashlib
import json
import os
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.data import token_format
from purelm.data import tokens as tokens_module
from purelm.data.tokens import ShardedTokens, TokenFile, TokenWriter, check_ids, check_tokenizer, open_tokens


def write(path, ids, vocab_size=1000, pieces=3, **options):
    with TokenWriter(path, vocab_size, **options) as writer:
        for piece in np.array_split(np.asarray(ids), pieces):
            writer.append(piece)


@given(
    ids=st.lists(st.integers(0, 2**32 - 1), max_size=40),
    pieces=st.integers(1, 5),
    shard_tokens=st.sampled_from([None, 1, 3, 7, 100]),
    wide=st.booleans(),
)
def test_round_trip(tmp_path_factory, ids, pieces, shard_tokens, wide):
    """Oracle: the list written. Any appends, any shard size, both dtypes give it back, with length and slices."""
    vocab_size = 2**32 if wide else 2**16
    ids = [i % vocab_size for i in ids]
    path = tmp_path_factory.mktemp("round") / "t.bin"
    write(path, np.array(ids, np.int64), vocab_size, pieces, shard_tokens=shard_tokens, n_bytes=77)
    opened = open_tokens(path)
    assert opened.dtype == ("uint32" if wide else "uint16")
    assert (opened.n_tokens, opened.vocab_size, opened.n_bytes) == (len(ids), vocab_size, 77)
    assert opened[:].tolist() == ids and len(opened) == len(ids)
    for start, stop in [(0, 5), (2, 9), (-4, None), (3, 3), (30, 99)]:
        assert opened[start:stop].tolist() == ids[start:stop]
    if ids:
        assert [int(opened[i]) for i in (0, -1, len(ids) // 2)] == [ids[0], ids[-1], ids[len(ids) // 2]]


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=6), start=st.integers(-9, 20), stop=st.integers(-9, 20))
def test_sharded_view(sizes, start, stop):
    """Oracle: the concatenated array, with empty shards anywhere."""
    parts = [np.arange(size, dtype=np.uint16) + 10 * i for i, size in enumerate(sizes)]
    whole, view = np.concatenate(parts), ShardedTokens(parts)
    assert view[start:stop].tolist() == whole[start:stop].tolist()
    assert view[start:stop].dtype == whole.dtype
    assert len(view) == len(whole) and [int(view[i]) for i in range(len(view))] == whole.tolist()
    with pytest.raises(IndexError, match="outside a sequence"):
        view[len(whole)]
    with pytest.raises(ValueError, match="stride 1"):
        view[::2]


def test_bytes_on_disk(tmp_path):
    """Oracle: the bytes of the format, little-endian, written out by hand; and the sidecar's fields."""
    with TokenWriter(tmp_path / "a.bin", 50257, tokenizer_sha256="ab") as writer:
        writer.append([1, 258], n_bytes=5)
        writer.append(np.array([50256], np.uint32), n_bytes=6)
        writer.append([])
    assert (tmp_path / "a.bin").read_bytes() == b"\x01\x00\x02\x01\x50\xc4"
    sidecar = json.loads((tmp_path / "a.json").read_text())
    del sidecar["id"]
    sha256 = hashlib.sha256(b"\x01\x00\x02\x01\x50\xc4").hexdigest()
    assert sidecar == {
        "dtype": "uint16", "n_tokens": 3, "vocab_size": 50257, "tokenizer_sha256": "ab", "n_bytes": 11,
        "sha256": sha256, "sample_sha256": sha256,
    }  # fmt: skip
    write(tmp_path / "b.bin", [1], dtype="uint32")
    assert (tmp_path / "b.bin").read_bytes() == b"\x01\x00\x00\x00"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.json", "b.bin", "b.json"]


def test_mapped_not_read(tmp_path):
    """A file is opened as np.memmap, read-only; a slice of it is a view."""
    write(tmp_path / "a.bin", range(10))
    tokens = open_tokens(tmp_path / "a.bin").tokens
    assert isinstance(tokens, np.memmap) and not tokens.flags.writeable
    assert np.shares_memory(tokens[2:5], tokens)


def test_bare_file(tmp_path):
    """A .bin without sidecar is opened by who says its dtype or writes the sidecar that the error names."""
    path = tmp_path / "bare.bin"
    np.array([5, 70000, 9], "<u4").tofile(path)
    assert open_tokens(path, dtype="uint32")[:].tolist() == [5, 70000, 9]
    assert open_tokens(path, dtype="uint16")[:].tolist() == [5, 0, 4464, 1, 9, 0]
    assert open_tokens(path, dtype="uint16").vocab_size is None
    check_tokenizer(open_tokens(path, dtype="uint16"), "anything")
    with pytest.raises(ValueError, match=r"bare\.bin: its sidecar bare\.json is missing, .* dtype='uint16'") as caught:
        open_tokens(path)
    (tmp_path / "bare.json").write_text(str(caught.value).rsplit(" or ", 1)[1])
    assert open_tokens(path)[:].tolist() == [5, 70000, 9] and open_tokens(path).dtype == "uint32"
    (tmp_path / "bare.json").unlink()
    path.write_bytes(b"abc")
    with pytest.raises(ValueError, match=r"bare\.bin: 3 bytes is not a whole number of uint16 tokens"):
        open_tokens(path, dtype="uint16")


@pytest.mark.parametrize("n_tokens", [0, 1, 5000, 200_000])
def test_checksums(tmp_path, n_tokens):
    """Oracle: hashlib of the file. Changed bytes are seen by verify anywhere, by opening in the sampled blocks."""
    path = tmp_path / "a.bin"
    write(path, np.arange(n_tokens) % 1000)
    assert open_tokens(path, verify=True)[:].tolist() == (np.arange(n_tokens) % 1000).tolist()
    sidecar, data = json.loads((tmp_path / "a.json").read_text()), path.read_bytes()
    assert sidecar["sha256"] == hashlib.sha256(data).hexdigest()
    last = len(data) - token_format.SAMPLE_BYTES
    blocks = [last * k // 15 for k in range(16)]
    seen = b"".join(data[at : at + token_format.SAMPLE_BYTES] for at in blocks) if n_tokens > 100_000 else data
    assert sidecar["sample_sha256"] == hashlib.sha256(seen).hexdigest()
    for at in {0, len(data) // 2, last // 15 + 5000, len(data) - 1} if n_tokens else ():
        if not 0 <= at < len(data):
            continue
        path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(ValueError, match=r"a\.bin: damaged: its bytes are not those that were written"):
            open_tokens(path, verify=True)
        if n_tokens <= 5000 or at in (0, len(data) - 1):
            with pytest.raises(ValueError, match=r"a\.bin: damaged"):
                open_tokens(path)
        else:
            assert len(open_tokens(path)) == n_tokens  # between the blocks: what sampling cannot see


def test_sidecars_without_checksums_are_read(tmp_path):
    """As they were written before there were any; only verify asks for one."""
    write(tmp_path / "s" / "a.bin", range(10), shard_tokens=4)
    assert len(open_tokens(tmp_path / "s", verify=True)) == 10
    for path in (tmp_path / "s").glob("*.json"):
        sidecar = json.loads(path.read_text())
        del sidecar["sha256"], sidecar["sample_sha256"]
        path.write_text(json.dumps(sidecar))
    assert open_tokens(tmp_path / "s")[:].tolist() == list(range(10))
    with pytest.raises(ValueError, match=r"a-00000\.bin: cannot be verified, its sidecar has no checksum"):
        open_tokens(tmp_path / "s", verify=True)


@pytest.mark.parametrize("shard_tokens", [None, 3])
def test_copies_and_pickles(tmp_path, monkeypatch, shard_tokens):
    """A pickle names the files and is mapped anew: it is small, and refused where they are others meanwhile."""
    write(tmp_path / "a.bin", range(1000) if shard_tokens is None else range(10), shard_tokens=shard_tokens)
    monkeypatch.chdir(tmp_path)
    opened = open_tokens("a.bin", dtype="uint16")
    assert copy.copy(opened) is opened and copy.deepcopy(opened) is opened
    pickled = pickle.dumps(opened)
    assert len(pickled) < 500
    monkeypatch.chdir("/")
    again = pickle.loads(pickled)
    assert again[:].tolist() == opened[:].tolist() and again.path == "a.bin" and again.vocab_size == 1000
    assert isinstance(again.tokens, np.memmap if shard_tokens is None else ShardedTokens)
    write(tmp_path / "a.bin", range(10), shard_tokens=shard_tokens)
    with pytest.raises(ValueError, match="was written anew"):
        pickle.loads(pickled)
    by_hand = TokenFile("here", np.arange(3), "uint16", 3, None, None, None)
    assert pickle.loads(pickle.dumps(by_hand))[:].tolist() == [0, 1, 2]
    assert copy.deepcopy(ShardedTokens([np.arange(3), np.arange(2)]))[:].tolist() == [0, 1, 2, 0, 1]


def test_a_writer_is_neither_copied_nor_used_twice(tmp_path):
    """Two writers of one file would leave a mixture."""
    writer = TokenWriter(tmp_path / "a.bin", 10)
    for function in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            function(writer)
    with writer:
        writer.append([1, 2])
    with pytest.raises(ValueError, match="this writer was used"), writer:
        pass
    assert open_tokens(tmp_path / "a.bin")[:].tolist() == [1, 2]


def test_leftovers_go_with_the_next_writer(tmp_path):
    """What a killed writer left goes; what a living one writes, another name's and what a sidecar names stay."""
    dead = ["a.bin.00000000000000aa", "a.json.00000000000000aa", "a-00001.bin.00000000000000aa"]
    other = ["ab.bin.00000000000000aa", "a.bin.old", "b.bin.00000000000000aa"]
    for name in [*dead, *other]:
        (tmp_path / name).write_bytes(b"x")
    write(tmp_path / "a.bin", [1])
    os.rename(tmp_path / "a.bin", tmp_path / f"a.bin.{json.loads((tmp_path / 'a.json').read_text())['id']}")
    living = TokenWriter(tmp_path / "a.bin", 10, shard_tokens=1)
    with pytest.raises(RuntimeError), living:
        living.append([1, 2, 3])
        with pytest.raises(RuntimeError), TokenWriter(tmp_path / "a.bin", 10):
            names = sorted(os.listdir(tmp_path))
            assert len([name for name in names if living._id in name]) == 3
            assert not set(dead) & set(names) and set(other) <= set(names)
            raise RuntimeError
        raise RuntimeError
    assert open_tokens(tmp_path / "a.bin")[:].tolist() == [1]  # committed, and not yet renamed


class Kill(BaseException):
    """Stands for kill -9: no handler of the writer catches it, so what lies on disk stays as it is."""


def kill_at(monkeypatch, step, after):
    """Make the step-th call that changes the folder die, before or after it has taken effect; count the calls."""
    calls = []

    def wrap(function):
        def wrapped(*args, **kwargs):
            calls.append(function)
            if len(calls) - 1 == step:
                if after:
                    function(*args, **kwargs)
                raise Kill
            return function(*args, **kwargs)

        return wrapped

    for owner, name in [(os, "replace"), (os, "fsync"), (tokens_module.Path, "unlink")]:
        monkeypatch.setattr(owner, name, wrap(getattr(owner, name)))
    return calls


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("leftover", [False, True])
def test_kill_at_any_instant(tmp_path, monkeypatch, after, leftover):
    """At whatever call the writer dies, the old pair or the new one opens, whole; a later write still works."""
    old, new, later = [1, 2, 3], [4, 5], [6, 6, 6, 6]
    outcomes = []
    for step in range(100):
        path = tmp_path / f"{step}.bin"
        write(path, old)
        if leftover:  # the old pair itself is one whose writer died between its two renames
            sidecar = json.loads(path.with_suffix(".json").read_text())
            path.rename(f"{path}.{sidecar['id']}")
        with monkeypatch.context() as patch:
            calls = kill_at(patch, step, after)
            try:
                write(path, new)
                break
            except Kill:
                pass
        outcomes.append(open_tokens(path)[:].tolist())
        assert outcomes[-1] in (old, new)
        write(path, later)
        assert open_tokens(path)[:].tolist() == later
    assert len(calls) == step >= 6 and old in outcomes and new in outcomes
    assert sorted(f.name for f in tmp_path.glob(f"{step}.*")) == [f"{step}.bin", f"{step}.json"]


def test_kill_at_any_instant_shards(tmp_path, monkeypatch):
    """A shard set whose writer died is the old set, the new set, or refused in one line; never a mixture."""
    old, new = list(range(8)), list(range(10, 15))
    outcomes = []
    for step in range(200):
        path = tmp_path / str(step) / "s.bin"
        write(path, old, shard_tokens=2)
        with monkeypatch.context() as patch:
            kill_at(patch, step, after=False)
            try:
                write(path, new, shard_tokens=2)
                break
            except Kill:
                pass
        try:
            outcomes.append(open_tokens(path)[:].tolist())
        except ValueError as error:
            outcomes.append("refused")
            assert "come from different writes" in str(error)
        assert outcomes[-1] in (old, new, "refused")
        write(path, new, shard_tokens=2)
        assert open_tokens(path.parent)[:].tolist() == new
    assert len(list(path.parent.glob("*.bin"))) == 3 and outcomes[0] == old and new in outcomes


def test_exception_leaves_the_old_pair(tmp_path):
    """An error inside the block removes what was begun and leaves the old pair."""
    path = tmp_path / "a.bin"
    write(path, [1, 2])
    with pytest.raises(ValueError, match=r"a\.bin: id 1000 at index 4 is outside the vocabulary of 1000"):
        with TokenWriter(path, 1000, shard_tokens=2) as writer:
            writer.append([0, 1, 999])
            writer.append(np.array([3, 1000, -1]))
    assert open_tokens(path)[:].tolist() == [1, 2]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a.bin", "a.json"]


def test_full_disk_leaves_the_old_pair(tmp_path, monkeypatch):
    """When flushing fails, what was begun is removed and the old pair stays."""
    path = tmp_path / "a.bin"
    write(path, [1, 2])

    def full(descriptor):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
        patch.setattr(os, "fsync", full)
        write(path, [3])
    assert open_tokens(path)[:].tolist() == [1, 2] and len(list(tmp_path.iterdir())) == 2


def test_rewriting_in_another_cut(tmp_path):
    """What is opened under a path is what was written last under it, sharded or not."""
    path = tmp_path / "a.bin"
    other = tmp_path / "a-77777.bin"
    for ids, shard_tokens, files in [([1, 2, 3], 1, 3), ([4, 5], None, 1), ([6, 7], 1, 2), ([8], None, 1)]:
        write(path, ids, shard_tokens=shard_tokens)
        assert open_tokens(path)[:].tolist() == open_tokens(tmp_path)[:].tolist() == ids
        assert len(list(tmp_path.glob("*.bin"))) == len(list(tmp_path.glob("*.json"))) == files
    np.zeros(3, "<u2").tofile(other)  # not ours: no sidecar says so
    write(path, [1, 2])
    assert other.exists()


def test_shard_sets(tmp_path):
    """Folder, glob and name open the same set; a missing, foreign or mixed shard is refused, naming it."""
    write(tmp_path / "s" / "x.bin", range(10), shard_tokens=4, tokenizer_sha256="aa")
    for path in (tmp_path / "s" / "x.bin", tmp_path / "s", f"{tmp_path}/s/x-*.bin", f"{tmp_path}/s/*"):
        assert open_tokens(path)[:].tolist() == list(range(10))
        assert open_tokens(path).tokenizer_sha256 == "aa"
    one = open_tokens(tmp_path / "s" / "x-00001.bin")
    assert one[:].tolist() == [4, 5, 6, 7] and one.n_bytes is None
    (tmp_path / "s" / "x-00001.bin").unlink()
    (tmp_path / "s" / "x-00001.json").unlink()
    with pytest.raises(ValueError, match="shard 1 of 3 is missing"):
        open_tokens(tmp_path / "s")
    write(tmp_path / "t" / "x.bin", range(4), vocab_size=500, shard_tokens=4)
    for suffix in ("bin", "json"):
        os.rename(tmp_path / "t" / f"x-00000.{suffix}", tmp_path / "s" / f"x-00001.{suffix}")
    with pytest.raises(ValueError, match=r"x-00001\.bin: vocab_size is 500, but .*x-00000\.bin has 1000"):
        open_tokens(tmp_path / "s")
    write(tmp_path / "u" / "train.bin", [1, 2], n_bytes=3)
    write(tmp_path / "u" / "heldout.bin", [3], n_bytes=4)
    with pytest.raises(ValueError, match=r"several token files \(heldout\.bin, train\.bin\)"):
        open_tokens(tmp_path / "u")
    both = open_tokens(f"{tmp_path}/u/*.bin")
    assert both[:].tolist() == [3, 1, 2] and both.n_bytes == 7


def test_shards_of_others_in_number_order(tmp_path):
    """Bare shards numbered without padding come in the order of their numbers."""
    for i in (0, 2, 10):
        np.array([i], "<u2").tofile(tmp_path / f"part_{i}.bin")
    assert open_tokens(tmp_path, dtype="uint16")[:].tolist() == [0, 2, 10]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda b, j: b.write_bytes(b.read_bytes()[:-2]), r"a\.bin: .*expected 20 bytes \(10 uint16.*found 18"),
        (lambda b, j: b.write_bytes(b.read_bytes()[:-1]), r"a\.bin: 19 bytes is not a whole number of uint16"),
        (lambda b, j: b.write_bytes(b.read_bytes() * 2), r"a\.bin: .*expected 20 bytes .* found 40"),
        (lambda b, j: j.write_text('{"dtype": "uint16"'), r"a\.json: damaged sidecar"),
        (lambda b, j: j.write_bytes(b"\xff\xfe"), r"a\.json: damaged sidecar"),
        (lambda b, j: j.write_text("[1]"), r"a\.json: damaged sidecar"),
        (lambda b, j: j.write_text("[" * 100_000), r"a\.json: damaged sidecar"),
        (lambda b, j: j.write_text('{"id": "../b"}'), r"a\.json: damaged sidecar .*id is"),
        (lambda b, j: j.write_text('{"dtype": "uint16", "n_tokens": true}'), r"a\.json: n_tokens is True"),
        (lambda b, j: j.write_text('{"dtype": "uint16", "n_tokens": 10, "vocab_size": "9"}'), "vocab_size is '9'"),
        (lambda b, j: b.write_bytes(bytes(20)), r"a\.bin: damaged: its bytes are not those that were written"),
        (lambda b, j: j.write_text('{"dtype": "int64", "n_tokens": 10}'), r"a\.json: dtype is 'int64': allowed are"),
        (lambda b, j: j.write_text('{"dtype": "uint16"}'), r"a\.json: n_tokens is None"),
        (lambda b, j: j.write_text('{"dtype": "uint32", "n_tokens": 10}'), r"a\.bin: .*expected 40 bytes"),
    ],
)
def test_damaged_files(tmp_path, damage, message):
    """Each kind of damage is one ValueError that names the file."""
    write(tmp_path / "a.bin", range(10))
    damage(tmp_path / "a.bin", tmp_path / "a.json")
    with pytest.raises(ValueError, match=message) as caught:
        open_tokens(tmp_path / "a.bin")
    assert "\n" not in str(caught.value)


def test_writing_over_a_damaged_sidecar(tmp_path):
    """A damaged sidecar must not make a long encoding fail at its last line."""
    write(tmp_path / "a.bin", range(10))
    (tmp_path / "a.json").write_text("{")
    write(tmp_path / "a.bin", [7])
    assert open_tokens(tmp_path / "a.bin")[:].tolist() == [7]


def test_missing_files(tmp_path):
    """Nothing there is a FileNotFoundError that says what was looked for."""
    for path, message in [
        (tmp_path / "a.bin", "no such token file"),
        (tmp_path, "holds no token file"),
        (f"{tmp_path}/*.bin", "matches this pattern"),
    ]:
        with pytest.raises(FileNotFoundError, match=message):
            open_tokens(path)
    write(tmp_path / "a.bin", [1])
    (tmp_path / "a.bin").unlink()
    with pytest.raises(FileNotFoundError, match="the ids are missing"):
        open_tokens(tmp_path / "a.bin")


def test_wrong_dtype_and_tokenizer(tmp_path):
    """A request that the file does not meet is refused, naming file, found and wanted."""
    write(tmp_path / "a.bin", range(10), tokenizer_sha256="aa")
    with pytest.raises(ValueError, match=r"a\.bin: holds uint16, but dtype='uint32'"):
        open_tokens(tmp_path / "a.bin", dtype="uint32")
    with pytest.raises(ValueError, match=r"a\.bin: made with the tokenizer of sha256 aa, .* has bb"):
        open_tokens(tmp_path / "a.bin", tokenizer_sha256="bb")
    assert len(open_tokens(tmp_path / "a.bin", dtype="uint16", tokenizer_sha256="aa")) == 10
    with pytest.raises(ValueError, match="dtype='int8': allowed are uint16, uint32"):
        open_tokens(tmp_path / "a.bin", dtype="int8")


def test_ids_outside_the_vocabulary(tmp_path, monkeypatch):
    """Oracle: np.argmax over the whole. The first offender is named, wherever the scan's pieces lie."""
    monkeypatch.setattr(tokens_module, "SCAN_TOKENS", 4)
    for bad in range(11):
        ids = np.arange(11)
        ids[bad] = 400
        write(tmp_path / "a.bin", ids)
        with pytest.raises(ValueError, match=rf"a\.bin: id 400 at index {bad} is outside the vocabulary of 400"):
            check_ids(open_tokens(tmp_path / "a.bin"), 400)
        check_ids(open_tokens(tmp_path / "a.bin"), 401)
    with pytest.raises(ValueError, match="tokens: id -1 at index 1"):
        check_ids(np.array([0, -1]), 10)
    write(tmp_path / "s.bin", [1, 2, 9], shard_tokens=1)
    with pytest.raises(ValueError, match="id 9 at index 2"):
        check_ids(open_tokens(tmp_path / "s.bin"), 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path": "a.txt"}, "is named NAME.bin"),
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"vocab_size": 2**32 + 1}, "vocab_size=4294967297"),
        ({"vocab_size": 65537, "dtype": "uint16"}, "dtype='uint16' cannot hold the ids of vocab_size=65537"),
        ({"dtype": "int64"}, "dtype='int64'"),
        ({"shard_tokens": 0}, "shard_tokens=0"),
        ({"shard_tokens": 2.5}, "shard_tokens=2.5"),
        ({"vocab_size": 1e4}, "vocab_size=10000.0"),
        ({"n_bytes": -1}, "n_bytes=-1"),
        ({"tokenizer_sha256": 5}, "tokenizer_sha256=5"),
    ],
)
def test_writer_arguments(tmp_path, arguments, message):
    """Bad arguments raise before anything is written."""
    arguments = {"path": "a.bin", "vocab_size": 10} | arguments
    with pytest.raises(ValueError, match=message):
        TokenWriter(tmp_path / arguments.pop("path"), **arguments)
    assert not list(tmp_path.iterdir())


def test_append_refuses_other_things(tmp_path):
    """Floats, and an append outside of the block, are refused."""
    with TokenWriter(tmp_path / "a.bin", 10) as writer:
        with pytest.raises(ValueError, match="dtype float64: allowed are integers"):
            writer.append([1.0])
        for ids in ("12", 5):
            with pytest.raises(ValueError, match=r"are (str|int): allowed are integers"):
                writer.append(ids)
        with pytest.raises(ValueError, match="n_bytes=-3"):
            writer.append([], n_bytes=-3)
        writer.append(i for i in range(3))
    with pytest.raises(ValueError, match="outside of the writer's with-block"):
        writer.append([1])
    assert open_tokens(tmp_path / "a.bin")[:].tolist() == [0, 1, 2]
