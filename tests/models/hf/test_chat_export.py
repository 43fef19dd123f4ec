"""Chat templates in a written folder. Oracle: transformers' AutoTokenizer on it, apply_chat_template's text and ids."""

import dataclasses
import json

import pytest
import transformers

from purelm import random
from purelm.models import hf, transformer
from purelm.tokenizer import Chat, encode_chat, load_chat, render, token_to_id, train
from tests.tokenizer.test_chat import SPECIALS, TALK, TEMPLATES

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own
PLAIN = "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}\r\n{% endfor %}{{ pad_token }}\n"
CFG = transformer.Config(400, 64, 16, 1, 2, rope_layout="half")
ALL = {**TEMPLATES, "names": PLAIN}
CHATS = {
    **{name: Chat(text, "<|begin|>", "<|im_end|>", "<|endoftext|>") for name, text in ALL.items() if name != "phi"},
    "without bos": Chat(TEMPLATES["chatml"], None, "<|im_end|>"),
    "without any": Chat(TEMPLATES["qwen"]),
}


@pytest.fixture(scope="module")
def model():
    """(params, configuration, tokenizer)."""
    bpe = train(["user assistant system What is the answer? im_end think |>"] * 3, 290, SPECIALS)
    return transformer.init(random.key(0), CFG), CFG, bpe


@pytest.mark.parametrize("name", CHATS)
def test_texts_and_ids_are_ours_in_transformers(model, tmp_path, name):
    bpe, chat = model[2], CHATS[name]
    hf.save(tmp_path / "saved", *model, chat=chat)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert len(theirs) == len(bpe.vocab)  # no token was added
    for messages in (TALK, TALK[1:3], TALK[:2]):
        for prompt in (True, False):
            options = {"add_generation_prompt": prompt}
            assert theirs.apply_chat_template(messages, tokenize=False, **options) == render(chat, messages, prompt)
            ids = theirs.apply_chat_template(messages, **options)["input_ids"]
            assert ids == encode_chat(bpe, chat, messages, prompt, allow_special_in_messages=True).tolist()
    assert theirs.model_max_length == CFG.context_length
    for x in ("bos_token", "eos_token", "pad_token"):
        assert getattr(theirs, x) == getattr(chat, x)
        text = getattr(chat, x)
        found = json.loads((tmp_path / "saved/config.json").read_text()).get(f"{x}_id")
        assert found == (None if text is None else token_to_id(bpe, text))


@pytest.mark.parametrize("name", CHATS)
def test_load_chat_reads_it_back(model, tmp_path, name):
    """Equal, but for newlines, which jinja2 makes the same."""
    chat = CHATS[name]
    hf.save(tmp_path / "saved", *model, chat=chat)
    assert load_chat(tmp_path / "saved") == dataclasses.replace(chat, template=chat.template.replace("\r\n", "\n"))
    hf.save(tmp_path / "again", *hf.load(tmp_path / "saved"), chat=load_chat(tmp_path / "saved"))
    assert load_chat(tmp_path / "again") == load_chat(tmp_path / "saved")


def test_fields_go_first(model, tmp_path):
    hf.save(tmp_path / "saved", *model, chat=CHATS["chatml"], fields={"eos_token_id": 7})
    content = json.loads((tmp_path / "saved/config.json").read_text())
    assert content["eos_token_id"] == 7 and content["bos_token_id"] == token_to_id(model[2], "<|begin|>")


def test_what_is_refused(model, tmp_path):
    """Before anything is written. transformers would add a token that the tokenizer lacks, with an id of no row."""
    with pytest.raises(ValueError, match=r"chat names bos_token '<s>', pad_token 'user', no special token"):
        hf.save(tmp_path / "x", *model, chat=Chat("", "<s>", "<|im_end|>", "user"))
    with pytest.raises(ValueError, match="chat needs a tokenizer"):
        hf.save(tmp_path / "x", *model[:2], chat=Chat(""))
    with pytest.raises(ValueError, match="surrogates"):
        hf.save(tmp_path / "x", *model, chat=Chat("\ud800"))
    assert not list(tmp_path.iterdir())
