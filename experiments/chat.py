"""Talk with a model in the terminal.

    python -m experiments.chat SmolLM2-135M-Instruct
    python -m experiments.chat model.gguf --system "Answer in one sentence." --temperature 0
    python -m experiments.chat runs/quickstart                 # no chat template: it continues what you write
    printf 'What is 2 + 2?\nAnd 3 + 3?\n' | python -m experiments.chat model.gguf --temperature 0

The answer appears as it is sampled. Ctrl-C stops it, and what was said of it is kept; Ctrl-C at the prompt after that,
Ctrl-D or /exit ends the program. From a pipe each line is a message, answers go to standard output and everything else
to standard error, and the first error ends the program.

A special token is one only where the template writes it, in no message of yours and in no answer. A conversation longer
than --context loses its oldest turns, which is said; the system text and the newest message stay. The same seed,
settings and lines give the same answers.
"""

import json
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from experiments.console import USER_ERRORS, pick_device, program, safe, say
from experiments.limits import Count, Place, Range, Seed, Share, Text
from experiments.open_model import open_model
from experiments.ops import ops_for_generation
from experiments.talk import Said, Talk, Voice, fitted, messages_of, speak, undone
from purelm import tree
from purelm.generate import Sampling
from purelm.generate.continued import shared_prefix
from purelm.generate.stops import LENGTH
from purelm.models import transformer
from purelm.tokenizer import token_to_id
from purelm.tokenizer.chat import find_chat

HELP = """\
/help         this list
/reset        begin anew; the system text stays
/system TEXT  set the system text; without TEXT, none
/undo         take back your last message and its answer
/retry        another answer to your last message
/save FILE    write the conversation as a line of JSON, {"messages": [...]}; FILE must not exist
/exit         end; so do Ctrl-D, and Ctrl-C at the prompt, twice or after it stopped an answer
//...         a message that begins with /"""


NOT_UTF8 = "the message is not UTF-8"


@dataclass(frozen=True)
class Args:
    """Talk with a model in the terminal."""

    model: Annotated[Place, tyro.conf.Positional]
    """folder of open weights, .gguf file, or folder of a run"""
    tokenizer: Place | None = None
    """tokenizer.json; default that of the model's folder"""
    system: Text = ""
    """system text"""
    temperature: Annotated[float, Range(1e-6, 1e6, or_zero=True)] = 0.8
    """0: greedy"""
    top_k: Count | None = None
    top_p: Annotated[float, Range(0, 1, open_low=True)] | None = 0.95
    min_p: Share | None = None
    max_new_tokens: Count = 512
    """most tokens of an answer"""
    context: Annotated[int, Range(2)] = 4096
    """most tokens of a conversation, at most the model's own context; memory of the cache is taken for as many"""
    end: tuple[Text, ...] = ("<|endoftext|>", "<|im_end|>")
    """special tokens that end an answer, where the tokenizer has them; the model's own eos always does"""
    begin: Text = "<|endoftext|>"
    """without a chat template: special token before the text, where the tokenizer has it"""
    plain: bool = False
    """leave the chat template aside and continue what you write"""
    timings: bool = False
    """print tokens per second after each answer"""
    seed: Seed = 0
    device: str = "auto"


@program
def main(args: Args) -> None:
    voice = _voice(args)
    talk = Talk(system=args.system)
    terminal = sys.stdin.isatty()
    read = _reader(terminal)
    if terminal:
        say(f"{tree.n_params(voice.params):,} parameters; /help lists the commands")
    pressed = False  # Ctrl-C was the last thing that came
    while True:
        try:
            line = read()
        except KeyboardInterrupt:
            if pressed or not terminal:
                raise
            pressed = True
            say("\nCtrl-C once more, Ctrl-D or /exit ends the conversation")
            continue
        except UnicodeDecodeError as error:
            if not terminal:
                raise ValueError(f"{NOT_UTF8}: {error.reason}") from None
            say(f"error: {NOT_UTF8}: {error.reason}")
            continue
        if line is None or line.strip() == "/exit":
            return
        pressed = False
        try:
            talk, pressed = _act(args, voice, talk, line)
        except USER_ERRORS as error:
            if not terminal:
                raise
            say(f"error: {error}")


def _voice(args: Args) -> Voice:
    device = pick_device(args.device)
    params, cfg, bpe = open_model(args.model, args.tokenizer, device)
    chat = None if args.plain else find_chat(args.model)
    own = [chat.eos_token] if chat is not None and chat.eos_token else []
    ends = tuple(dict.fromkeys(token_to_id(bpe, name) for name in (*args.end, *own) if name in bpe.special_tokens))
    begin = (token_to_id(bpe, args.begin),) if args.begin in bpe.special_tokens else ()
    if chat is None:
        why = "the chat template is left aside" if args.plain else f"{args.model} has no chat template"
        say(f"{why}: the model continues the text that you write")
    if not ends:
        say(f"the tokenizer has none of {', '.join(args.end) or 'no tokens'}: answers end after {args.max_new_tokens}")
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.min_p)
    context = min(args.context, cfg.context_length)
    return Voice(
        transformer.make(cfg, ops_for_generation(cfg, device)), params, bpe, chat, begin, ends, sampling,
        args.max_new_tokens,
        context, args.seed,
    )  # fmt: skip


def _reader(terminal: bool) -> Callable[[], str | None]:
    """The next line, without its end; None after the last."""
    if not terminal:
        return lambda: line.rstrip("\r\n") if (line := sys.stdin.readline()) else None
    with suppress(ImportError):
        import readline  # noqa: F401  input() edits lines with it

    def read() -> str | None:
        try:
            return input("> " if sys.stdout.isatty() else "")
        except EOFError:
            print(flush=True)
            return None

    return read


def _act(args: Args, voice: Voice, talk: Talk, line: str) -> tuple[Talk, bool]:
    """(the conversation after a line, whether Ctrl-C stopped the answer)."""
    if not line.strip():
        return talk, False
    if any("\ud800" <= x <= "\udfff" for x in line):  # how some locales bring bytes that are not UTF-8
        raise ValueError(NOT_UTF8)
    if not line.startswith("/") or line.startswith("//"):
        return _answer(args, voice, talk, line.removeprefix("/"))
    name, _, rest = line.partition(" ")
    rest = rest.strip()
    if rest and name not in ("/system", "/save"):
        raise ValueError(f"{name} takes nothing after it, got {rest!r}; // begins a message that starts with /")
    if name == "/help":
        say(HELP)
    elif name == "/reset":
        return Talk(system=talk.system, past=talk.past), False
    elif name == "/system":
        return replace(talk, system=rest), False
    elif name == "/undo":
        talk, text = undone(talk)
        say(f"taken back: {text}")
    elif name == "/retry":
        before, text = undone(talk)
        after, stopped = _answer(args, voice, replace(before, attempt=talk.attempt + 1), text)
        # The number of the attempt, for the next one; without an answer all stays as it was.
        return (replace(after, attempt=talk.attempt + 1) if len(after.turns) > len(before.turns) else talk), stopped
    elif name == "/save":
        _save(rest, talk)
    else:
        raise ValueError(f"{name} is no command; /help lists them, and // begins a message that starts with /")
    return talk, False


def _answer(args: Args, voice: Voice, talk: Talk, text: str) -> tuple[Talk, bool]:
    """The conversation after the answer, as far as it came, and whether Ctrl-C stopped it."""
    said: Said | None = None
    stopped = False
    try:
        begin = time.perf_counter()
        kept, ids = fitted(voice, talk, text)
        if n := len(talk.turns) - len(kept.turns):
            say(f"the oldest {n} of {len(talk.turns)} turns are dropped: with them there are more than "
                f"{voice.room:,} tokens before the answer")  # fmt: skip
        n_known = shared_prefix(kept.past.ids, ids[:-1]) if kept.past else 0
        n_new, first = 0, begin
        for said in speak(voice, kept, text, ids):
            n_new += 1
            first = first if n_new > 1 else time.perf_counter()
            sys.stdout.write(safe(said.piece))
            sys.stdout.flush()
        end = time.perf_counter()
        print(flush=True)
        if said is not None and said.finish_reason == LENGTH:
            say(f"(cut after {n_new:,} tokens)")
        if args.timings:
            rate = f", {(n_new - 1) / (end - first):.1f} tokens/s after the first" if n_new > 1 else ""
            say(f"prompt: {len(ids):,} tokens, {n_known:,} of them known, {first - begin:.2f} s; "
                f"answer: {n_new:,} tokens{rate}")  # fmt: skip
    except KeyboardInterrupt:
        stopped = True
        print(flush=True)
        say("stopped" if said is not None else "stopped before the answer began; the message is taken back")
    return (talk if said is None else said.talk), stopped


def _save(name: str, talk: Talk) -> None:
    if not name:
        raise ValueError("/save needs the name of a file")
    if not talk.turns:
        raise ValueError("nothing was said yet: nothing is saved")
    text = json.dumps({"messages": messages_of(talk)}) + "\n"
    path = Path(name).expanduser()
    try:
        with open(path, "x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise ValueError(f"{path}: exists; give another name") from None
    say(f"{path}: {len(talk.turns)} turns")


if __name__ == "__main__":
    main(tyro.cli(Args))
