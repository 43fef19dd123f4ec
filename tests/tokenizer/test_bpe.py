"""BPE, make, with_special_tokens, token_to_id. Oracles: the definition, and the text of each error."""

import copy
import dataclasses
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.tokenizer import (
    BPE,
    encode,
    fingerprint,
    load,
    make,
    save,
    tables,
    token_dtype,
    token_to_id,
    vocab_size,
    with_special_tokens,
)
from purelm.tokenizer.patterns import GPT2

BYTES = {value: bytes([value]) for value in range(256)}


def test_make_keeps_what_it_is_given_and_changes_nothing():
    """The parts come back as given; the argument's dict stays as it was (purity)."""
    vocab = BYTES | {1000: b"ab"}
    before = dict(vocab)
    bpe = make(vocab, [(b"a", b"b")], ["<x>"], "gpt2")
    assert vocab == before
    assert bpe.vocab == before | {1001: b"<x>"}
    assert bpe.merges == ((b"a", b"b"),) and bpe.special_tokens == ("<x>",) and bpe.pattern == GPT2
    assert vocab_size(bpe) == 1002
    with pytest.raises(dataclasses.FrozenInstanceError):
        bpe.pattern = "x"


def test_special_tokens_are_appended_in_order_or_found():
    """Absent names get the next ids in their order; a name that the vocab has keeps its id."""
    bpe = make(BYTES | {300: b"<b>"}, [], ["<a>", "<b>", "<c>"])
    assert [bpe.vocab[i] for i in (300, 301, 302)] == [b"<b>", b"<a>", b"<c>"]
    fixed = make(BYTES, [], {"<a>": 500, "<b>": 256})
    assert (fixed.vocab[500], fixed.vocab[256]) == (b"<a>", b"<b>")
    more = with_special_tokens(fixed, ["<b>", "<c>"])
    assert more.vocab[501] == b"<c>" and more.special_tokens == ("<a>", "<b>", "<c>")
    assert 501 not in fixed.vocab
    assert with_special_tokens(fixed, {"<c>": 400}).vocab[400] == b"<c>"


@pytest.mark.parametrize("n, dtype", [(2**16, np.uint16), (2**16 + 1, np.uint32)])
def test_dtype_holds_the_largest_id(n, dtype):
    """uint16 holds 65,536 ids, not one more."""
    assert token_dtype(make(BYTES | {n - 1: b"ab"}, [(b"a", b"b")])) == dtype


@pytest.mark.parametrize("copied", [lambda x: pickle.loads(pickle.dumps(x)), copy.copy, copy.deepcopy])
def test_bpe_goes_through_copies(copied):
    """Workers get it by pickle: the fields come back equal, and so do ids and fingerprint, also after it was used."""
    bpe = make(BYTES | {256: b"ab"}, [(b"a", b"b")], ["<x>"])
    ids, print_ = encode(bpe, "ab<x>b"), fingerprint(bpe)
    other = copied(bpe)
    assert isinstance(other, BPE) and dataclasses.astuple(other) == dataclasses.astuple(bpe)
    assert encode(other, "ab<x>b").tolist() == ids.tolist() and fingerprint(other) == print_
    changed = dataclasses.replace(bpe, special_tokens=())
    assert encode(changed, "<x>").tolist() == [60, 120, 62] and fingerprint(changed) != print_


# Few choices for each part, so that equal ones come up often.
BPES = st.builds(
    lambda merges, order, specials, pattern, ignore: make(
        dict(sorted((BYTES | {256 + i: a + b for i, (a, b) in enumerate(merges)}).items(), reverse=order)),
        merges,
        specials,
        pattern,
        ignore_merges=ignore,
    ),
    st.sampled_from([(), ((b"a", b"b"),), ((b"a", b"c"),), ((b"a", b"b"), (b"a", b"c"))]),
    st.booleans(),
    st.sampled_from([{}, {"<x>": 300, "<y>": 301}, {"<y>": 301, "<x>": 300}, {"<x>": 301, "<y>": 300}]),
    st.sampled_from(["gpt2", "o200k"]),
    st.booleans(),
)


@given(one=BPES, other=BPES)
def test_equal_by_value(one, other):
    """Oracle: the fingerprint, which is over all that decides ids. Equal ones have equal hashes, and are no other's."""
    assert (one == other) == (fingerprint(one) == fingerprint(other)) == (not one != other)
    assert one != other or hash(one) == hash(other)
    assert len({one, other, copy.deepcopy(one)}) == (1 if one == other else 2)
    assert one != fingerprint(one)


def test_a_saved_tokenizer_is_the_same(tmp_path):
    """Law: load(save(bpe)) == bpe, whatever the order of the special tokens."""
    bpe = make(BYTES | {256: b"ab"}, [(b"a", b"b")], {"<y>": 300, "<x>": 299})
    save(bpe, tmp_path / "tokenizer.json")
    assert load(tmp_path / "tokenizer.json") == bpe


def test_equal_ones_have_memos_of_their_own():
    """What is remembered goes with an object and not with its value: one that goes takes nothing from another."""
    one = make(BYTES | {256: b"ab"}, [(b"a", b"b")])
    other = copy.deepcopy(one)
    assert encode(one, "abab").tolist() == encode(other, "abab").tolist() == [256, 256]
    assert tables.once(one, "memo", None) is not tables.once(other, "memo", None)
    del one
    assert tables.once(other, "memo", None) and encode(other, "ab").tolist() == [256]


@given(token=st.sampled_from([b"a", b"\xff", b"ab", "\u00e9", "<x>", "a"]))
def test_ids_of_tokens(token):
    """Oracle: the vocab, read the other way round; str is UTF-8."""
    bpe = make(BYTES | {1000: b"ab", 1001: "\u00e9".encode()}, [(b"a", b"b")], ["<x>"])
    assert bpe.vocab[token_to_id(bpe, token)] == (token if isinstance(token, bytes) else token.encode())


@pytest.mark.parametrize(
    "token, message",
    [("abc", "token is 'abc', which is none of the 256"), ("\ud800", "none of the 256"), (97, "token is int 97; give")],
)
def test_what_is_no_token(token, message):
    with pytest.raises(ValueError, match=message):
        token_to_id(make(BYTES, []), token)


def test_generators_and_numpys_integers():
    """Oracle: the same parts as lists and ints; a vocab of numpy's integers can be saved as JSON."""
    vocab = {np.int64(i): token for i, token in BYTES.items()} | {np.uint16(256): b"ab"}
    bpe = make(vocab, iter([(b"a", b"b")]), iter(["<x>"]))
    assert bpe.merges == ((b"a", b"b"),) and bpe.vocab[257] == b"<x>" and {type(i) for i in bpe.vocab} == {int}
    assert with_special_tokens(bpe, (name for name in ["<y>"])).vocab[258] == b"<y>"
    with pytest.raises(ValueError, match="special_tokens is str '<y>'"):
        with_special_tokens(bpe, "<y>")


@pytest.mark.parametrize(
    "vocab, merges, special, pattern, message",
    [
        ({i: t for i, t in BYTES.items() if i not in (7, 9)}, [], [], "gpt2", r"2 of the 256 single bytes .*\\x07"),
        (BYTES | {256: b"a"}, [], [], "gpt2", "ids 97 and 256 are both b'a'"),
        (BYTES | {-1: b"ab"}, [], [], "gpt2", "the id -1 is not an int"),
        (BYTES | {2**24: b"ab"}, [], [], "gpt2", "is not an int in"),
        (BYTES | {"7": b"ab"}, [], [], "gpt2", "the id '7'"),
        (BYTES | {256: b""}, [], [], "gpt2", "not empty"),
        (BYTES | {256: "ab"}, [], [], "gpt2", "is 'ab'; a token is bytes"),
        (BYTES, [(b"a", b"b")], [], "gpt2", "the result of merge 0.*b'ab'"),
        (BYTES | {256: b"abc"}, [(b"ab", b"c")], [], "gpt2", "the left part of merge 0"),
        (BYTES | {256: b"abc"}, [(b"a", b"bc")], [], "gpt2", "the right part of merge 0"),
        (BYTES | {256: b"ab"}, [(b"a", b"b")] * 2, [], "gpt2", "listed twice, as merge 0 and merge 1"),
        (BYTES, [], ["<x>", "<x>"], "gpt2", "'<x>' is listed twice"),
        (BYTES, [], [""], "gpt2", "at least one character"),
        (BYTES, [], "<x>", "gpt2", "give a sequence of strings"),
        (BYTES, [], 5, "gpt2", "special_tokens is int 5; give a sequence of strings"),
        ([b"a"], [], [], "gpt2", "vocab is list; give a mapping"),
        (BYTES, "ab", [], "gpt2", "merges is str 'ab'; give a sequence of pairs"),
        (BYTES, ["ab"], [], "gpt2", "merge 0 is 'ab', not two bytes objects"),
        (BYTES, [("a", "b")], [], "gpt2", r"merge 0 is \('a', 'b'\), not two bytes objects"),
        (BYTES, [(1, 2)], [], "gpt2", "not two bytes objects"),
        (BYTES, [], [], 3, "pattern is 3"),
        (BYTES, [], [], "a{1000000000}", "repeats more than 10,000 times"),
        (BYTES, [], [], "\ud800+", "lone surrogate"),
        (BYTES, [], [], "(" * 5000, "not a regular expression"),
        (BYTES, [], ["\ud800"], "gpt2", "lone surrogate"),
        (BYTES, [], {"<x>": 5}, "gpt2", r"to have id 5, which is b'\\x05'"),
        (BYTES, [], {"a": 300}, "gpt2", "to have id 300, but the vocab has it as 97"),
        (BYTES, [], {"<x>": -3}, "gpt2", "the id -3"),
        (BYTES, [], [], "gtp2", "pattern is 'gtp2'.*gpt2, .*o200k"),
        (BYTES, [], [], "(", "not a regular expression"),
        (BYTES, [], [], "", "give a regular expression"),
    ],
)
def test_make_names_what_is_wrong(vocab, merges, special, pattern, message):
    """Each fault gives one ValueError that names it."""
    with pytest.raises(ValueError, match=message):
        make(vocab, merges, special, pattern)
