"""GGUF metadata. Oracle: the tokenizer.json of the same tokenizer; the package gguf's own writer for files."""

import sys

import numpy as np
import pytest

from purelm.tokenizer import encode, load, train
from purelm.tokenizer.formats import from_gguf
from purelm.tokenizer.formats.alphabet import to_unicode
from purelm.tokenizer.formats.gguf import PRE
from purelm.tokenizer.patterns import SMOLLM, family, resolve


def metadata(bpe, pre="gpt-2", **changes):
    """What a GGUF file says of `bpe`, every id of which must be in use."""
    special = {name.encode() for name in bpe.special_tokens}
    tokens = [token.decode() if token in special else to_unicode(token) for _, token in sorted(bpe.vocab.items())]
    keys = {
        "model": "gpt2",
        "pre": pre,
        "tokens": tokens,
        "token_type": [3 if token in special else 1 for _, token in sorted(bpe.vocab.items())],
        "merges": [f"{to_unicode(left)} {to_unicode(right)}" for left, right in bpe.merges],
    }
    return {f"tokenizer.ggml.{key}": value for key, value in (keys | changes).items() if value is not None}


@pytest.fixture(scope="module")
def bpe():
    return train(["the cat sat on 12 mats, the cat's hat"] * 3, 270, ["<|endoftext|>", "<x>"])


def test_metadata_give_the_tokenizer(bpe):
    """Law: from_gguf inverts what describes a BPE; the name alone decides pattern, normalizer and ignore_merges."""
    assert from_gguf(metadata(bpe)) == bpe
    smollm = from_gguf(metadata(bpe, "smollm"))
    assert smollm.pattern == SMOLLM and smollm.vocab == bpe.vocab
    assert from_gguf(metadata(bpe, "qwen2")).normalizer == "NFC"
    assert from_gguf(metadata(bpe, "llama-bpe")).ignore_merges
    for name, found in PRE.items():
        assert resolve(found.pattern) == found.pattern, name
        assert family(found.pattern) or name in ("tekken", "deepseek-v3", "deepseek-coder")


def test_token_types(bpe):
    """Unused tokens that nothing makes are holes, user-defined ones are special, missing bytes are dropped."""
    given = metadata(bpe)
    tokens, types = given["tokenizer.ggml.tokens"], given["tokenizer.ggml.token_type"]
    more = from_gguf(given | {
        "tokenizer.ggml.tokens": [*tokens, "[PAD1]", "<user>"], "tokenizer.ggml.token_type": [*types, 5, 4],
    })  # fmt: skip
    assert (
        len(tokens) not in more.vocab and more.vocab[len(tokens) + 1] == b"<user>" and "<user>" in more.special_tokens
    )
    lacking = list(types)
    lacking[tokens.index(to_unicode(b"\x04"))] = 5
    found = from_gguf(given | {"tokenizer.ggml.token_type": lacking})
    assert encode(found, "a\x04b").tolist() == encode(bpe, "a").tolist() + encode(bpe, "b").tolist()


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model": "llama"}, r"file: tokenizer.ggml.model is 'llama'; supported is 'gpt2'"),
        ({"pre": "new-one"}, "tokenizer.ggml.pre is 'new-one', no pre-tokenizer that is known: gpt-2, smollm"),
        ({"pre": None, "merges": None}, "pre is None.*; tokenizer.ggml.merges is NoneType; a list of str"),
        ({"tokens": "abc"}, "tokens is str; a list of str"),
        ({"token_type": ["1"]}, "token_type is list; a list of int"),
        ({"token_type": [1]}, "token_type has 1 entries for 270 tokens"),
        ({"token_type": [6] * 270}, r"tokens\[0\] has token_type 6"),
        ({"merges": ["abc"]}, r"merges\[0\] is 'abc', not two tokens"),
        ({"merges": ["a b c"]}, r"merges\[0\]"),
        ({"merges": ["q z"]}, "the result of merge 0"),
        ({"tokens": ["\u4e2d"] * 270}, r"tokens\[0\].*stands for no byte"),
    ],
)
def test_what_is_refused(bpe, changes, message):
    """One line names every key that is wrong."""
    with pytest.raises(ValueError, match=message) as caught:
        from_gguf(metadata(bpe, **changes), "file")
    assert "\n" not in str(caught.value)


def test_files(bpe, tmp_path):
    """Oracle: the file that the package gguf writes."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "t.gguf"
    writer = gguf.GGUFWriter(str(path), "llama")
    given = metadata(bpe, "smollm")
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(given["tokenizer.ggml.tokens"])
    writer.add_token_types(given["tokenizer.ggml.token_type"])
    writer.add_token_merges(given["tokenizer.ggml.merges"])
    writer.add_tensor("x", np.zeros(32, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert load(path) == from_gguf(given)
    with pytest.raises(ValueError, match="has its own pattern"):
        load(path, pattern="gpt2")
    (tmp_path / "cut.gguf").write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"cut.gguf: not a GGUF file, or cut short"):
        load(tmp_path / "cut.gguf")
    with pytest.raises(FileNotFoundError, match=r"none\.gguf"):
        load(tmp_path / "none.gguf")


def test_without_the_package(tmp_path, monkeypatch):
    """The error names the extra."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install 'purelm\[gguf\]'"):
        load(tmp_path / "t.gguf")
