"""Files. Oracles: the round trip, tiktoken and Hugging Face reading what was written; and files cut anywhere."""

import base64
import json
import os
import random
import stat
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from purelm.files import hold
from purelm.tokenizer import (
    encode,
    fingerprint,
    load,
    load_gpt2,
    load_tiktoken,
    make,
    save,
    save_gpt2,
    save_tiktoken,
)
from purelm.tokenizer.formats.alphabet import byte_characters, from_unicode, to_unicode
from purelm.tokenizer.formats.text import write_atomic
from purelm.tokenizer.formats.tiktoken import recover_merges
from purelm.tokenizer.patterns import CL100K, GPT2, O200K, QWEN

BYTES = {value: bytes([value]) for value in range(256)}
TEXTS = [
    "the cat's hat sat on the mat, the THAT'S  that\n\n at 12345 ",
    "caf\u00e9 \u4e2d\u6587 the\u0301 \U0001f600\U0001f600 <|endoftext|>then <|pad|> the\t the \u017f'\u017f end   ",
    "'ll we'LL  \r\n x//\n\n  y",
]


def same(a, b):
    """Equal in all that decides ids, by value and by fingerprint."""
    parts = [(x.vocab, x.merges, set(x.special_tokens), x.pattern, x.ignore_merges) for x in (a, b)]
    assert (parts[0] == parts[1]) == (fingerprint(a) == fingerprint(b))
    return parts[0] == parts[1]


# ---- Round trips ----


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k", "cl100k_v1", "qwen", r"\p{L}+|\P{L}+"])
def test_huggingface_reads_what_is_written(trained, tmp_path, pattern):
    """Oracles: the round trip, and Hugging Face's ids; its own writing of the file is read back equal too."""
    tokenizers = pytest.importorskip("tokenizers")
    bpe = trained(pattern)
    path = tmp_path / "tokenizer.json"
    save(bpe, path)
    assert same(load(path), bpe) and same(load(tmp_path), bpe)
    peer = tokenizers.Tokenizer.from_file(str(path))
    for text in TEXTS:
        ids = encode(bpe, text).tolist()
        assert peer.encode(text).ids == ids
        assert peer.decode(ids, skip_special_tokens=False) == text
    peer.save(str(tmp_path / "theirs.json"))
    assert same(load(tmp_path / "theirs.json"), bpe)


@pytest.mark.parametrize("pattern", ["gpt2", "cl100k", "o200k"])
def test_tiktoken_reads_what_is_written(trained, tmp_path, tiktoken_of, pattern):
    """Oracles: the round trip, and the ids of a tiktoken Encoding whose ranks are read from the file here."""
    tiktoken = pytest.importorskip("tiktoken")
    bpe = trained(pattern)
    path = tmp_path / "mine.tiktoken"
    save(bpe, path)
    special = {name: i for i, token in bpe.vocab.items() for name in bpe.special_tokens if token == name.encode()}
    assert same(load(path, pattern=pattern, special_tokens=special), bpe)
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(bytes.split, path.read_bytes().splitlines())}
    peer = tiktoken.Encoding("mine", pat_str=bpe.pattern, mergeable_ranks=ranks, special_tokens=special)
    for text in TEXTS:
        assert encode(bpe, text).tolist() == peer.encode(text, allowed_special="all")


def test_special_tokens_of_loaders(trained, tmp_path):
    """Oracle: the list. A generator is read once and kept; a string is refused and not taken letter by letter."""
    bpe = trained()
    save_gpt2(bpe, tmp_path / "vocab.json", tmp_path / "merges.txt")
    save(bpe, tmp_path / "t.tiktoken")
    for call in (
        lambda names: load_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", special_tokens=names),
        lambda names: load(tmp_path, special_tokens=names),
        lambda names: load(tmp_path / "t.tiktoken", special_tokens=names, pattern="gpt2"),
    ):
        names = ["<|endoftext|>", "<|pad|>"]
        assert same(call(name for name in names), call(names)) and call(names).special_tokens == tuple(names)
        with pytest.raises(ValueError, match=r"special_tokens is str '<.pad.>'; give a sequence of strings"):
            call("<|pad|>")


def test_gpt2_files(trained, tmp_path):
    """Oracles: the round trip, through a folder as well, and Hugging Face's reader of the pair of files."""
    bpe = trained()
    save_gpt2(bpe, tmp_path / "vocab.json", tmp_path / "merges.txt")
    names = ["<|pad|>", "<|endoftext|>"]
    assert same(load_gpt2(tmp_path / "vocab.json", tmp_path / "merges.txt", special_tokens=names), bpe)
    assert same(load(tmp_path, special_tokens=names), bpe)
    tokenizers = pytest.importorskip("tokenizers")
    model = tokenizers.models.BPE.from_file(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    peer = tokenizers.Tokenizer(model)
    peer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert peer.encode(TEXTS[0]).ids == encode(bpe, TEXTS[0]).tolist()


@pytest.mark.parametrize("name", ["r50k_base", "cl100k_base", "o200k_base"])
def test_published_files_come_back_byte_for_byte(published, shared_data, tmp_path, name):
    """Oracle: the published file; and the published numbers of tokens."""
    bpe = published(name)
    save(bpe, tmp_path / f"{name}.tiktoken")
    assert (tmp_path / f"{name}.tiktoken").read_bytes() == (
        shared_data / "tokenizers" / f"{name}.tiktoken"
    ).read_bytes()
    assert not bpe.ignore_merges and len(bpe.merges) == {"r": 50_000, "c": 100_000, "o": 199_742}[name[0]]
    assert bpe.pattern == {"r": GPT2, "c": CL100K, "o": O200K}[name[0]]


def test_gpt2_is_the_same_from_either_source(published, shared_data, tmp_path):
    """Oracle: merges recovered from the ranks of r50k_base are those of merges.txt; and the file byte for byte."""
    bpe = published("gpt2")
    assert same(bpe, published("r50k_base"))
    save_gpt2(bpe, tmp_path / "vocab.json", tmp_path / "merges.txt")
    folder = shared_data / "tokenizers"
    header = b"#version: 0.2\n"  # the reference file may be without it
    written, released = (tmp_path / "merges.txt").read_bytes(), (folder / "gpt2_merges.txt").read_bytes()
    assert written == header + released.removeprefix(header)
    assert json.loads((tmp_path / "vocab.json").read_text()) == json.loads((folder / "gpt2_vocab.json").read_text())


@given(data=st.data())
@settings(max_examples=40)
def test_any_tokenizer_survives_tokenizer_json(random_bpe, tmp_path_factory, data):
    """Law: load(save(bpe)) decides the same ids; random merges, ids, specials, patterns."""
    pattern = data.draw(st.sampled_from([GPT2, CL100K, O200K, QWEN, r"\p{L}+|\s+"]))
    names = data.draw(st.lists(st.text(st.characters(codec="utf-8"), min_size=2, max_size=6), unique=True, max_size=4))
    names = [f"<{name}>" for name in names]
    bpe = random_bpe(
        data.draw(st.integers(0, 3)), special_tokens=names, pattern=pattern, ignore_merges=data.draw(st.booleans())
    )
    path = tmp_path_factory.mktemp("law") / "t.json"
    save(bpe, path)
    assert same(load(path), bpe)


# ---- What the formats cannot say, and what is not supported ----


def test_inconsistent_ranks_follow_tiktoken(tiktoken_of, tmp_path):
    """Oracle: tiktoken, on a vocabulary whose tokens are not all what the merges make of their bytes."""
    ranks = {bytes([value]): value for value in range(256)}
    ranks |= {b"bc": 256, b"ab": 257, b"abc": 258, b"cdab": 259, b"abab": 300}
    assert recover_merges(ranks)[1]
    path = tmp_path / "odd.tiktoken"
    path.write_text("".join(f"{base64.b64encode(t).decode()} {r}\n" for t, r in ranks.items()))
    bpe = load(path, pattern="gpt2")
    assert bpe.ignore_merges
    encoding = tiktoken_of(bpe)
    rng = random.Random(0)
    for engine in ("python", "numba"):
        if engine == "numba":
            pytest.importorskip("numba")
        for n in [*range(1, 40), 70, 130, 200]:
            text = " ".join("".join(rng.choices("abcd", k=n)) for _ in range(3))
            assert encode(bpe, text, engine=engine).tolist() == encoding.encode_ordinary(text)
        assert encode(bpe, "cdab abab", engine=engine)[0] == 259
    save(bpe, tmp_path / "again.tiktoken")
    assert (tmp_path / "again.tiktoken").read_text() == path.read_text()
    save(bpe, tmp_path / "t.json")
    assert same(load(tmp_path / "t.json"), bpe)
    with pytest.raises(ValueError, match="ignore_merges is True"):
        save_gpt2(bpe, tmp_path / "v.json", tmp_path / "m.txt")


def test_tiktoken_cannot_hold_ids_against_the_merge_order(tmp_path):
    """Ranks are ids there: a BPE whose ids do not rise, or whose merges tiktoken would not choose, is refused."""
    path = tmp_path / "x.tiktoken"
    with pytest.raises(ValueError, match=r"b'cd', id 256, is made by a later merge than b'ab', id 257"):
        save(make(BYTES | {257: b"ab", 256: b"cd"}, [(b"a", b"b"), (b"c", b"d")]), path)
    with pytest.raises(ValueError, match="not those that tiktoken would make"):
        save(make(BYTES | {256: b"bc", 257: b"ab", 258: b"abc"}, [(b"b", b"c"), (b"a", b"b"), (b"ab", b"c")]), path)
    assert not path.exists()


def test_special_tokens_that_read_as_others_are_refused(tmp_path):
    """In these files the special token U+0120 "a" and the ordinary token " a" are one string."""
    bpe = make(BYTES | {256: b" a"}, [(b" ", b"a")], ["\u0120a"])
    with pytest.raises(ValueError, match="reads as the ordinary token 256"):
        save(bpe, tmp_path / "t.json")
    bpe = make(BYTES, [], ["\n"])
    with pytest.raises(ValueError, match="is an ordinary token too"):
        save(bpe, tmp_path / "t.json")


def test_paths_and_arguments(tmp_path, trained):
    """Other endings, patterns given twice or never, files that are not there."""
    bpe = trained()
    for function in (lambda path: save(bpe, path), load):
        with pytest.raises(ValueError, match=r"x.bin'; a tokenizer's file ends in .json(,| or) .tiktoken"):
            function(tmp_path / "x.bin")
    save(bpe, tmp_path / "t.json")
    with pytest.raises(ValueError, match="has its own pattern"):
        load(tmp_path / "t.json", pattern="gpt2")
    save(bpe, tmp_path / "t.tiktoken")
    with pytest.raises(ValueError, match="holds no pattern and is no published name"):
        load(tmp_path / "t.tiktoken")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "none.json")


# ---- Damaged files ----


def test_cut_tokenizer_json(trained, tmp_path):
    """Cut anywhere, the file gives one line with its name; JSON errors name line and column."""
    path = tmp_path / "t.json"
    save(trained(), path)
    whole = path.read_bytes()
    rng = random.Random(0)
    for n in [0, 1, len(whole) - 3, *rng.choices(range(len(whole) - 2), k=60)]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}, line ") and "\n" not in str(caught.value)
    path.write_bytes(whole[:500] + b"\xff" + whole[500:])
    with pytest.raises(ValueError, match="byte 500 is not UTF-8"):
        load(path)


def test_cut_gpt2_files(trained, tmp_path):
    """Merges cut at any byte but the last newline are noticed, in the middle of a line and between lines."""
    vocab, merges = tmp_path / "vocab.json", tmp_path / "merges.txt"
    save_gpt2(trained(), vocab, merges)
    names = ["<|endoftext|>", "<|pad|>"]
    whole = merges.read_bytes()
    for n in [*range(len(whole) - 40, len(whole) - 1), 0, 5, *range(100, 130)]:
        merges.write_bytes(whole[:n])
        with pytest.raises(ValueError, match=r"merges\.txt"):
            load_gpt2(vocab, merges, special_tokens=names)
    merges.write_bytes(whole.replace(b"\nt h", b"\nt", 1) if b"\nt h" in whole else whole.replace(b"\n", b"\nq\n", 1))
    with pytest.raises(ValueError, match=r"merges\.txt, line \d+: .*not two tokens"):
        load_gpt2(vocab, merges, special_tokens=names)
    merges.write_bytes(whole)
    with pytest.raises(ValueError, match="belong into special_tokens"):
        load_gpt2(vocab, merges)
    vocab.write_text("[1]")
    with pytest.raises(ValueError, match="not a mapping"):
        load_gpt2(vocab, merges)


def test_cut_tiktoken_file(shared_data, tmp_path):
    """A published file cut at any byte is noticed: within a line by the line, between lines by the count."""
    whole = (shared_data / "tokenizers" / "r50k_base.tiktoken").read_bytes()
    path = tmp_path / "r50k_base.tiktoken"
    for n in [0, 3, 7, 100, 500_000, *range(len(whole) - 22, len(whole) - 1, 2)]:
        path.write_bytes(whole[:n])
        with pytest.raises(ValueError) as caught:
            load(path)
        assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("IQ==", "line 257: 'IQ==' is not a base64 token and its rank"),
        ("IQ== x", "is not a base64 token"),
        ("I Q== 300", "is not a base64 token"),
        ("I!== 300", "is not a base64 token"),
        ("IQ== 300", "line 257: token b'!' is there twice"),
        ("YWI= 33", "line 257: rank 33 is there twice"),
        ("YWI= -1", "the id -1"),
    ],
)
def test_damaged_lines_of_tiktoken_files(tmp_path, line, message):
    """The file and the line are named."""
    path = tmp_path / "x.tiktoken"
    lines = [f"{base64.b64encode(bytes([value])).decode()} {value}" for value in range(256)]
    path.write_text("\n".join([*lines, line, ""]))
    with pytest.raises(ValueError, match=message) as caught:
        load_tiktoken(path, pattern="gpt2")
    assert str(caught.value).startswith(str(path))
    path.write_text("\n".join(lines[1:]))
    with pytest.raises(ValueError, match="1 of the 256 single bytes are missing"):
        load_tiktoken(path, pattern="gpt2")


# ---- Writing ----


def test_writing_is_all_or_nothing(trained, tmp_path, monkeypatch):
    """When a step of writing fails the old file stays whole and no other is left; the mode is that of any new file."""
    path = tmp_path / "tokenizer.json"
    save(trained(), path)
    before = path.read_bytes()
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(path.stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    for name in ("fsync", "replace", "chmod"):
        with monkeypatch.context() as patch:

            def fail(*arguments, **keywords):
                raise OSError("no space left")

            patch.setattr(os, name, fail)
            with pytest.raises(OSError, match="no space left"):
                save(trained("cl100k"), path)
        assert path.read_bytes() == before and sorted(os.listdir(tmp_path)) == ["plain", "tokenizer.json"]
    with pytest.raises(UnicodeEncodeError):
        write_atomic({path: "ok", tmp_path / "other": "\ud800"})
    assert path.read_bytes() == before and not (tmp_path / "other").exists()


def test_leftovers_of_a_killed_process_go(trained, tmp_path):
    """With the next writing of the same file; those that a living process holds, and other names, stay."""
    names = [".t.json.abcd_012.tmp", ".t.json.efgh3456.tmp", ".other.json.abcd_012.tmp"]
    for name in names:
        (tmp_path / name).touch()
    held = os.open(tmp_path / names[1], os.O_RDONLY)
    assert hold(held)
    save(trained(), tmp_path / "t.json")
    assert sorted(os.listdir(tmp_path)) == sorted([*names[1:], "t.json"])
    os.close(held)


def test_alphabet_is_gpt2s():
    """Oracle: the rule of the release (printable Latin-1 is itself, the rest U+0100 and up); both directions."""
    characters = byte_characters()
    assert len(set(characters)) == 256 and characters[ord("A")] == "A" and characters[ord(" ")] == "\u0120"
    assert characters[0x0A] == "\u010a" and characters[0xAD] == "\u0143" and characters[0xFF] == "\u00ff"
    every = bytes(range(256))
    assert from_unicode(to_unicode(every), "here") == every
    with pytest.raises(ValueError, match="here: 'a b' holds ' ', which stands for no byte"):
        from_unicode("a b", "here")


# ---- Fingerprints ----


def test_fingerprint_sees_what_decides_ids_and_nothing_else(trained):
    """Another id, merge order, special, pattern or rule changes it; the order of entries and of specials does not."""
    bpe = trained()
    first = fingerprint(bpe)
    assert len(first) == 64 and first == fingerprint(trained())
    vocab = dict(reversed(list(bpe.vocab.items())))
    assert fingerprint(replace(bpe, vocab=vocab, special_tokens=bpe.special_tokens[::-1])) == first
    a, b = [i for i, token in bpe.vocab.items() if len(token) > 1][:2]
    others = [
        replace(bpe, vocab=bpe.vocab | {a: bpe.vocab[b], b: bpe.vocab[a]}),
        replace(bpe, merges=(bpe.merges[1], bpe.merges[0], *bpe.merges[2:])),
        replace(bpe, merges=bpe.merges[:-1]),
        replace(bpe, special_tokens=bpe.special_tokens[:1]),
        replace(bpe, pattern=CL100K),
        replace(bpe, ignore_merges=True),
    ]
    prints = [fingerprint(other) for other in others]
    assert len({first, *prints}) == 1 + len(others)


def test_fingerprint_has_no_ambiguous_borders():
    """Lengths are part of what is hashed: parts of one merge cannot move into its other part."""
    one = make(BYTES | {256: b"ab", 257: b"bc", 258: b"abc"}, [(b"a", b"b"), (b"b", b"c"), (b"ab", b"c")])
    two = make(BYTES | {256: b"ab", 257: b"bc", 258: b"abc"}, [(b"a", b"b"), (b"b", b"c"), (b"a", b"bc")])
    assert fingerprint(one) != fingerprint(two)


def test_encoding_after_a_round_trip_is_the_same(trained, tmp_path):
    """Law: ids before and after are equal arrays of one dtype."""
    bpe = trained("o200k")
    save(bpe, tmp_path / "t.json")
    back = load(tmp_path / "t.json")
    for text in TEXTS:
        assert np.array_equal(encode(back, text), encode(bpe, text))
        assert encode(back, text).dtype == encode(bpe, text).dtype == np.uint16
    with pytest.raises(ValueError, match="is made by a later merge"):
        save_tiktoken(replace(bpe, merges=bpe.merges[::-1]), tmp_path / "x.tiktoken")
