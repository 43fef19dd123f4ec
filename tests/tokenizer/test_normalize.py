"""Normal forms, tokens that are looked for after them, and bytes without a token. Oracle: Hugging Face's library."""

import json
import pickle
import random
import unicodedata
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purelm.testing import strategies as plm
from purelm.tokenizer import (
    decode,
    decode_with_offsets,
    encode,
    encode_documents,
    encode_file,
    encode_iterable,
    fingerprint,
    load,
    make,
    save,
    save_gpt2,
    save_tiktoken,
)
from purelm.tokenizer.bpe import FORMS
from purelm.tokenizer.cuts import SAFE_SPACE, rules_for
from purelm.tokenizer.formats import huggingface
from purelm.tokenizer.normalize import normalize

BYTES = {value: bytes([value]) for value in range(256)}
SIGNS = [
    *"aeo<>n.,1 ", " ", "  ", "\n", "\u0301", "\u0323", "\u0338", "\u00e9", "e\u0301", "\u1e69", "\ufb01", "\u2126",
    "\uac00", "\u1100", "\u1161", "\u11a8", "\u00a8", "\u2003", "\u3000", "\ufdfa", "\u07fd", "\u0898", "\u32ff",
    "\U00011935\U00011930", "<n>", "<n>\u0338", "<e>", "<e\u0301>", "<\u00e9>", "<|end|>",
]  # fmt: skip
MIXED = st.lists(st.sampled_from(SIGNS) | st.characters(codec="utf-8"), max_size=30).map("".join)


def build(form, second=("<n>", "<\u00e9>"), pattern="gpt2", **options):
    merges = [(b"\xc3", b"\xa9"), (b"e", b"\xcc"), (b" ", b"\xc3\xa9"), (b"a", b"b"), (b"<", b"n")]
    tokens = [left + right for left, right in merges]
    vocab = BYTES | dict(enumerate(tokens, 256))
    names = ["<|end|>", "<n>", "<\u00e9>", "<e>"]
    return make(vocab, merges, names, pattern, normalizer=form, normalized_tokens=second, **options)


def library(bpe):
    tokenizers = pytest.importorskip("tokenizers")
    return tokenizers.Tokenizer.from_str(huggingface.to_json(bpe))


@pytest.mark.parametrize("form", FORMS)
def test_normal_forms_of_all_characters(form):
    """Oracle: the library's normalizer on every character alone, and on each among marks."""
    tokenizers = pytest.importorskip("tokenizers")
    peer = getattr(tokenizers.normalizers, form)()
    for code in (*range(0xD800), *range(0xE000, 0x110000)):
        character = chr(code)
        if unicodedata.category(character) in ("Lo", "Co", "Cn", "So") and not unicodedata.decomposition(character):
            continue  # nothing of theirs changes, but for the rare mark that is newer than Python: below
        text = f"a{character}\u0301\u0323{character}\u0334"
        assert normalize(text, form) == peer.normalize_str(text), hex(code)
    rng = random.Random(0)
    for n in range(3000):
        text = "".join(rng.choices(SIGNS, k=10)) + chr(rng.randrange(0xE000, 0x110000))
        text = text * 100 if n < 100 else text  # longer than what is normalized at a time
        assert normalize(text, form) == peer.normalize_str(text), ascii(text)


def test_space_is_a_border_of_every_normal_form():
    """What `cuts` relies on: a space combines with nothing before it, and only white space ends in white space."""
    for form in FORMS:
        for code in (*range(0x21, 0xD800), *range(0xE000, 0x110000)):
            text = chr(code)
            if unicodedata.is_normalized(form, text) and not unicodedata.combining(text):
                continue
            assert normalize(f"{text} ", form) == normalize(text, form) + " ", hex(code)
            assert normalize(f" {text}", form) == " " + normalize(text, form), hex(code)
            assert SAFE_SPACE.search(f"{text} ") is None or SAFE_SPACE.search(normalize(f"{text} ", form)), hex(code)


@pytest.mark.parametrize("form", [None, *FORMS])
@given(text=MIXED)
def test_ids_are_hugging_faces(form, text):
    """Oracle: the library on the file that `save` writes. Tokens of both passes, in every neighbourhood."""
    for second in ((), ("<n>", "<\u00e9>")):
        bpe = build(form, second)
        assert encode(bpe, text, engine="python").tolist() == library(bpe).encode(text).ids


@given(text=MIXED)
def test_engines_are_equal(text):
    """Oracle: the Python engine."""
    pytest.importorskip("numba")
    for form in ("NFC", "NFKD"):
        for second in ((), ("<n>", "<\u00e9>")):
            bpe = build(form, second)
            expected = encode(bpe, text, engine="python")
            assert encode(bpe, text, engine="numba").tolist() == expected.tolist()
            some = encode(bpe, text, ["<n>", "<|end|>"], engine="python").tolist()
            assert encode(bpe, text, ["<n>", "<|end|>"], engine="numba").tolist() == some


@given(text=MIXED, size=st.integers(1, 4))
def test_streams_are_exact(text, size):
    """Oracle: encode of the whole text. Marks may come in the part after their base."""
    for form in ("NFC", "NFKC", "NFD"):
        for second in ((), ("<n>", "<\u00e9>")):
            bpe = build(form, second)
            parts = [text[start : start + size] for start in range(0, len(text), size)]
            assert list(encode_iterable(bpe, parts)) == encode(bpe, text).tolist()


def test_long_streams_and_files_are_exact(tmp_path, monkeypatch):
    """Text that is cut many times. Oracle: encode of the whole text."""
    monkeypatch.setattr("purelm.tokenizer.blocks.BLOCK_BYTES", 32)
    monkeypatch.setattr("purelm.tokenizer.streams.BLOCK_CHARS", 16)
    monkeypatch.setattr("purelm.tokenizer.encoding._BLOCK", 32)
    rng = random.Random(2)
    text = "".join(rng.choices(SIGNS, k=3000))
    (tmp_path / "t.txt").write_bytes(text.encode())
    for form in ("NFC", "NFKD"):
        bpe = build(form)
        expected = encode(bpe, text).tolist()
        assert library(bpe).encode(text).ids == expected
        assert list(encode_iterable(bpe, [text[i : i + 7] for i in range(0, len(text), 7)])) == expected
        assert encode_file(bpe, tmp_path / "t.txt", tmp_path / f"{form}.bin").tokens.tolist() == expected
        documents = ["\u0338e", *(text[i : i + 5] for i in range(0, 500, 5)), "\u0338e"]
        monkeypatch.setattr("purelm.tokenizer.blocks.BLOCK_BYTES", 200)  # several documents in a block
        for eot in ("<|end|>", "<n>"):
            apart = [i for one in documents for i in (*encode(bpe, one).tolist(), *encode(bpe, eot).tolist())]
            tokens = encode_documents(bpe, documents, tmp_path / "d.bin", eot=eot)
            assert tokens.tokens.tolist() == apart


def test_no_cut_where_a_second_pass_token_may_lie():
    """A token of the second pass with a space in it: no cut at spaces; without one, cuts stay; oracle: by hand."""
    bpe = make(BYTES, [], ["<|end|>", "a b", "  "], normalizer="NFC", normalized_tokens=["a b", "  "])
    pattern, before = rules_for(bpe)
    assert pattern != bpe.pattern and before == ("<|end|>",)
    bpe = make(BYTES, [], ["<|end|>", "  "], normalizer="NFC", normalized_tokens=["  "])
    assert rules_for(bpe) == (bpe.pattern, ("<|end|>",))
    assert rules_for(build(None, ())) == (build(None, ()).pattern, build(None, ()).special_tokens)


def test_decoding_gives_normalized_text():
    """decode(encode(text)) is the normal form; offsets count its characters."""
    bpe = build("NFC", ())
    text = "ae\u0301o <|end|>e\u0301"
    assert decode(bpe, encode(bpe, text)) == unicodedata.normalize("NFC", text)
    found, offsets = decode_with_offsets(bpe, encode(bpe, text))
    assert found == unicodedata.normalize("NFC", text) and offsets.tolist() == [0, 1, 2, 3, 4, 11]


def test_normalizer_is_part_of_the_value(tmp_path):
    """Equality, hash, fingerprint, pickling and files see it; formats that cannot hold it refuse."""
    plain, nfc, second = build(None, ()), build("NFC", ()), build("NFC")
    assert len({fingerprint(bpe) for bpe in (plain, nfc, second, build("NFD", ()))}) == 4
    assert plain != nfc != second and pickle.loads(pickle.dumps(second)) == second
    assert build(None) == plain  # without a normalizer the second pass changes nothing here
    for bpe in (plain, nfc, second):
        save(bpe, tmp_path / "t.json")
        assert load(tmp_path / "t.json") == bpe and hash(load(tmp_path / "t.json")) == hash(bpe)
    with pytest.raises(ValueError, match="normalizer is NFC"):
        save_gpt2(nfc, tmp_path / "v.json", tmp_path / "m.txt")
    with pytest.raises(ValueError, match="normalizer is NFC"):
        save_tiktoken(nfc, tmp_path / "t.tiktoken")


def test_sequences_of_normalizers_are_one():
    """Oracle: the library's Sequence on the same text."""
    tokenizers = pytest.importorskip("tokenizers")
    text = "\ufb01 e\u0301 \u1e69 \uac00 \u2126"
    for first in FORMS:
        for last in FORMS:
            steps = {"type": "Sequence", "normalizers": [{"type": first}, {"type": last}]}
            content = json.loads(huggingface.to_json(build(None, ()))) | {"normalizer": steps}
            bpe = huggingface.from_json(json.dumps(content), "file")
            peer = tokenizers.Tokenizer.from_str(json.dumps(content))
            assert normalize(text, bpe.normalizer) == peer.normalizer.normalize_str(text)


def test_what_make_refuses():
    """Names that are no special tokens, other normalizers, names that are equal when normalized."""
    with pytest.raises(ValueError, match="normalizer is 'nfc'; allowed are None, NFC"):
        build("nfc", ())
    with pytest.raises(ValueError, match="normalized_tokens: '<x>' is not in special_tokens"):
        build("NFC", ["<x>"])
    with pytest.raises(ValueError, match="equal in NFC"):
        make(BYTES, [], ["\u00e9", "e\u0301"], normalizer="NFC", normalized_tokens=["\u00e9", "e\u0301"])


def test_lone_surrogates_are_named_by_their_place():
    """Also where the text has to be normalized."""
    with pytest.raises(ValueError, match="U\\+D800, at character 3"):
        encode(build("NFC"), "e\u0301o\ud800")


# ---- Bytes without a token ----


def lacking(missing, pattern="gpt2", ignore_merges=False):
    """A vocabulary of some merges without the bytes `missing`."""
    merges = [(b"a", b"b"), (b" ", b"ab"), (b"\xc3", b"\xa9"), (b"ab", b"ab"), (b"!", b"?")]
    tokens = [bytes([value]) for value in range(256) if value not in missing]
    tokens += [left + right for left, right in merges]
    vocab = dict(enumerate(tokens))
    options = {"ignore_merges": ignore_merges, "drop_missing_bytes": True}
    return make(vocab, merges, ["<|end|>"], pattern, **options)


@given(text=plm.texts(special_tokens=("<|end|>", "a\x04b", "ab\x04\x04ab", "!\x04?", "\x04" * 200, "!\x04?" * 60)))
def test_missing_bytes_are_dropped_as_the_library_does(text):
    """Oracle: the library; both engines. What is left of a piece becomes neighbours and merges."""
    pytest.importorskip("numba")
    for ignore_merges in (False, True):
        bpe = lacking({4, 0xC0, 0xF0, ord("x")}, "smollm", ignore_merges)
        expected = library(bpe).encode(text).ids
        assert encode(bpe, text, engine="python").tolist() == expected
        assert encode(bpe, text, engine="numba").tolist() == expected
        whole = replace(bpe, pattern=r"[\s\S]+")
        assert encode(whole, text).tolist() == library(whole).encode(text).ids


def test_the_rule_of_missing_bytes(tmp_path):
    """By hand: "!", a byte without a token, "?" is "!?". make wants the rule to be asked for, other formats refuse."""
    bpe = lacking({4})
    assert [bpe.vocab[i] for i in encode(bpe, "!\x04?").tolist()] == [b"!?"]
    assert encode(bpe, "\x04").tolist() == [] and encode(bpe, "\x04" * 300, engine="python").tolist() == []
    with pytest.raises(ValueError, match=r"1 of the 256 single bytes are missing.*drop_missing_bytes=True"):
        make(bpe.vocab, bpe.merges, bpe.special_tokens)
    with pytest.raises(ValueError, match="drops bytes"):
        save_gpt2(bpe, tmp_path / "v.json", tmp_path / "m.txt")
    with pytest.raises(ValueError, match="1 of the 256 single bytes have no token"):
        save_tiktoken(replace(bpe), tmp_path / "t.tiktoken")
    save(bpe, tmp_path / "t.json")
    assert load(tmp_path / "t.json") == bpe
    content = json.loads((tmp_path / "t.json").read_text())
    content["model"]["unk_token"] = "a"
    with pytest.raises(ValueError, match=r"model\.unk_token is 'a', and the vocab lacks 1 of the 256"):
        huggingface.from_json(json.dumps(content), "file")
