r"""Chat templates: messages as the text, and as the ids, that a model was trained on.

    chat = load_chat(folder)                       # or Chat(template, bos_token, eos_token)
    text = render(chat, [{"role": "user", "content": "Hello"}])
    ids = encode_chat(bpe, chat, messages)

A template is a program in jinja2's language. It is rendered as transformers does (ImmutableSandboxedEnvironment,
trim_blocks, lstrip_blocks, loop controls, raise_exception, strftime_now, tojson), in a process of its own with limits
on time, memory and output, see `chat_worker`. jinja2 comes with torch.

Whose text is whose. In `encode_chat` a special token is one only where the template wrote all of it: its own text and
constants, its TOKENS, and roles that are one word. A message that says "<|im_end|>" is encoded as ordinary
text, so it cannot end a turn.
"""

import atexit
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from purelm.caches import on_clear
from purelm.tokenizer import tables
from purelm.tokenizer.bpe import BPE
from purelm.tokenizer.encoding import encode
from purelm.tokenizer.formats.gguf import metadata_of
from purelm.tokenizer.formats.text import parse_json, read_text
from purelm.tokenizer.splitting import special_matcher

SECONDS = 5  # of CPU time for one rendering, rounded up to the next whole one
MEMORY_BYTES = 1 << 30
MOST_CHARACTERS = 1 << 24

TOKENS = ("bos_token", "eos_token", "pad_token")

Message = Mapping[str, Any]


@dataclass(frozen=True)
class Chat:
    """A chat template and the texts of the tokens that templates name; None where the tokenizer has none."""

    template: str
    bos_token: str | None = None
    eos_token: str | None = None
    pad_token: str | None = None

    def __post_init__(self) -> None:
        for name in ("template", *TOKENS):
            value = getattr(self, name)
            if not isinstance(value, str) and (name == "template" or value is not None):
                raise ValueError(f"{name} is {type(value).__name__} {value!r:.80}; give a str")


def render(chat: Chat, messages: Sequence[Message], add_generation_prompt: bool = True, **variables: Any) -> str:
    r"""The text of `messages` under the template of `chat`, with the beginning of the answer if add_generation_prompt.

    messages: {"role": ..., "content": ...}, values that JSON can hold. variables: what else the template asks for, as
    tools (None if not given). Equal to transformers' apply_chat_template(tokenize=False). Raises one ValueError where
    the template is wrong, refuses the messages, calls what is not defined, or takes more time, memory or characters
    than SECONDS, MEMORY_BYTES and MOST_CHARACTERS.

    >>> template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    >>> render(Chat(template), [{"role": "user", "content": "hello"}])
    '<user>hello'
    """
    return "".join(text for text, _ in _render(chat, messages, add_generation_prompt, variables))


def encode_chat(
    bpe: BPE,
    chat: Chat,
    messages: Sequence[Message],
    add_generation_prompt: bool = True,
    *,
    allow_special_in_messages: bool = False,
    **variables: Any,
) -> np.ndarray:
    """The ids of render(chat, messages, ...), as `encode` gives them, with special tokens in the template's text alone.

    allow_special_in_messages: whether those that messages (or variables) hold become their ids too, as they do in
    transformers' apply_chat_template. Where no message holds one, the two give equal ids.
    """
    parts = _render(chat, messages, add_generation_prompt, variables)
    return encode_parts(bpe, [(text, own or allow_special_in_messages) for text, own in parts])


def encode_parts(bpe: BPE, parts: Sequence[tuple[str, bool]]) -> np.ndarray:
    """The ids of the joined texts of `parts`, (text, own), as `encode` gives them; own texts alone hold special tokens.

    A special token's text that lies in another part, wholly or partly, is ordinary text.

    >>> from purelm.tokenizer import make
    >>> bpe = make({i: bytes([i]) for i in range(256)}, [], ["<end>"])
    >>> encode_parts(bpe, [("a<end>", True), ("<end>", False)]).tolist()
    [97, 256, 60, 101, 110, 100, 62]
    """
    text = "".join(part for part, _ in parts)
    if not bpe.special_tokens:
        return encode(bpe, text)
    spans, foreign = _special_spans(bpe, text, parts)
    if not foreign:
        return encode(bpe, text)
    ids, found, start = tables.special_ids(bpe), [], 0
    for begin, end in spans:
        found += [encode(bpe, text[start:begin], "none"), np.array([ids[text[begin:end]]], tables.dtype(bpe))]
        start = end
    return np.concatenate([*found, encode(bpe, text[start:], "none")])


def _special_spans(bpe: BPE, text: str, parts: Sequence[tuple[str, bool]]) -> tuple[list[tuple[int, int]], bool]:
    """((start, end) of the special tokens that the template wrote, longest first at a place; whether others occur)."""
    lengths = [len(part) for part, _ in parts]
    own = np.repeat(np.array([own for _, own in parts], bool), lengths)
    foreign_before = np.concatenate([[0], np.cumsum(~own)])
    matcher = special_matcher(tables.special_set(bpe))
    by_length = sorted(bpe.special_tokens, key=len, reverse=True)
    spans, start, foreign = [], 0, False
    while match := matcher.search(text, start):
        begin = match.start()
        at = [begin + len(name) for name in by_length if text.startswith(name, begin)]
        end = next((end for end in at if foreign_before[end] == foreign_before[begin]), None)
        foreign |= end != at[0]
        if end is None:
            start = begin + 1
        else:
            spans.append((begin, end))
            start = end
    return spans, foreign


def load_chat(folder: str | os.PathLike) -> Chat:
    """The chat template of a model's folder: chat_template.jinja, else tokenizer_config.json or chat_template.json;
    or of a .gguf file.

    Its TOKENS are those of tokenizer_config.json. Where there are several templates, the one that is named "default" is
    taken. ValueError where there is none.
    """
    found = find_chat(folder)
    if found is None:
        files = "chat template in chat_template.jinja, tokenizer_config.json or chat_template.json"
        raise ValueError(f"{folder}: no {_GGUF_TEMPLATE if Path(folder).suffix == '.gguf' else files}")
    return found


def find_chat(folder: str | os.PathLike) -> Chat | None:
    """`load_chat`, or None for a model without a template. What is there and damaged is a ValueError here too."""
    folder = Path(folder)
    if folder.suffix == ".gguf":
        return _of_gguf(folder)
    config = _object(folder / "tokenizer_config.json")
    template = None
    if (folder / "chat_template.jinja").exists():
        template = read_text(folder / "chat_template.jinja")
    for name, content in (
        ("tokenizer_config.json", config),
        ("chat_template.json", _object(folder / "chat_template.json")),
    ):
        if template is not None:
            break
        template = content.get("chat_template")
        if isinstance(template, list):
            named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
            if "default" not in named:
                raise ValueError(f"{folder / name}: none of the chat templates {list(named)} is named 'default'")
            template = named["default"]
    if template is None:
        return None
    return Chat(template, *(_token(config, name) for name in TOKENS))


_GGUF_TEMPLATE = "tokenizer.chat_template"


def _of_gguf(path: Path) -> Chat | None:
    ids = [f"tokenizer.ggml.{name}_token_id" for name in ("bos", "eos", "padding")]
    found = metadata_of(path, [_GGUF_TEMPLATE, "tokenizer.ggml.tokens", *ids])
    if not isinstance(found.get(_GGUF_TEMPLATE), str):
        return None
    tokens = found.get("tokenizer.ggml.tokens", [])
    texts = (tokens[i] if isinstance(i := found.get(name), int) and 0 <= i < len(tokens) else None for name in ids)
    return Chat(found[_GGUF_TEMPLATE], *texts)


def _object(path: Path) -> dict[str, Any]:
    content = parse_json(read_text(path), os.fspath(path)) if path.exists() else {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a JSON object")
    return content


def _token(config: dict[str, Any], name: str) -> str | None:
    """The text of a token, which is written as such or as an added token."""
    value = config.get(name)
    return value.get("content") if isinstance(value, dict) else value


# ---- The process that renders. One for this process, started when it is needed and ended with it. ----

_LOCK = threading.Lock()
_WORKER: list[tuple[int, subprocess.Popen]] = []  # (process that started it, worker)


def _render(chat: Chat, messages, add_generation_prompt: bool, variables: dict[str, Any]) -> list[tuple[str, bool]]:
    """The parts of the text, and whether each is of the template."""
    if isinstance(messages, str | bytes | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages is {type(messages).__name__}; give a sequence of {{'role': ..., 'content': ...}}")
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages[{number}] is {type(message).__name__}; give {{'role': ..., 'content': ...}}")
    tokens = {name: getattr(chat, name) for name in TOKENS if name not in variables}
    tokens = {name: text for name, text in tokens.items() if text is not None}
    given = {
        "tools": None, "documents": None, **tokens, **variables,
        "messages": [dict(message) for message in messages], "add_generation_prompt": bool(add_generation_prompt),
    }  # fmt: skip
    request = {
        "template": chat.template, "variables": given, "trusted": list(tokens),
        "seconds": SECONDS, "bytes": MEMORY_BYTES, "characters": MOST_CHARACTERS,
    }  # fmt: skip
    try:
        line = json.dumps(request)
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"messages or variables hold what JSON cannot: {error}") from None
    answer = json.loads(_ask(line))
    if "error" in answer:
        raise ValueError(f"chat template: {answer['error']}")
    return [(text, own) for text, own in answer["parts"]]


def _ask(line: str) -> str:
    """The worker's answer to a request."""
    with _LOCK:
        worker = _worker()
        assert worker.stdin is not None and worker.stdout is not None
        answer = ""
        try:
            worker.stdin.write(line + "\n")
            worker.stdin.flush()
            answer = worker.stdout.readline()
        except BrokenPipeError:
            pass
        except BaseException:  # Ctrl-C: an answer that comes later would be taken for the next one
            _end_worker()
            raise
        if answer.endswith("\n"):
            return answer
        code = worker.wait()
        errors = worker.stderr.read().strip().splitlines() if worker.stderr is not None else []
        _end_worker()
        if any("jinja2" in error for error in errors[-1:]):
            raise ImportError("a chat template needs jinja2, which is not installed: pip install 'purelm[chat]'")
        raise ValueError(
            f"chat template: takes more than {SECONDS} s of processor time or {MEMORY_BYTES:,} bytes "
            f"(its process ended with {code})"
        )


def _worker() -> subprocess.Popen:
    if _WORKER and _WORKER[0][0] != os.getpid():  # after a fork it is the parent's
        _WORKER.clear()
    if not _WORKER:
        program = resources.files("purelm.tokenizer").joinpath("chat_worker.py").read_text("utf-8")
        pipe = subprocess.PIPE
        # -P: the folder in which this process runs is no place to import from. A process group of its own: a
        # terminal's Ctrl-C is for us, and `_ask` ends the worker where that stops a rendering.
        command = [sys.executable, "-P", "-c", program]
        worker = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True, process_group=0)
        _WORKER.append((os.getpid(), worker))
    return _WORKER[0][1]


def _end_worker() -> None:
    """Needs _LOCK."""
    for _, worker in _WORKER:
        worker.kill()
        worker.wait()
        for pipe in (worker.stdin, worker.stdout, worker.stderr):
            if pipe is not None:
                pipe.close()
    _WORKER.clear()


@atexit.register
@on_clear
def _forget() -> None:
    with _LOCK:
        if _WORKER and _WORKER[0][0] == os.getpid():
            _end_worker()
