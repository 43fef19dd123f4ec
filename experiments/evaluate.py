r"""Answer question sets with a model, grade the answers, and show them; measure its loss on texts.

    python -m experiments.evaluate SmolLM2-135M-Instruct --tasks gsm8k mmlu --data data --out evals/smol
    python -m experiments.evaluate SmolLM2-135M-Instruct --tasks gsm8k mmlu --data data --out evals/five --shots 5
    python -m experiments.evaluate runs/math/export --tasks svamp --data data --out evals/math --limit 200
    python -m experiments.evaluate runs/math/export --tasks alpaca_eval simple_safety_tests --data data --out evals/open
    python -m experiments.evaluate runs/math/export --text heldout.txt --out evals/text

Writes OUT/TASK.jsonl, a row an example as soon as its batch is done, TASK.html to browse the answers, and summary.json
with 95 % intervals. Answers of alpaca_eval and simple_safety_tests are not graded: TASK-outputs.json or .jsonl is what
the tools take that do, and OUT/TASK-answers.jsonl has the rows. The same command again goes on where it was stopped.
An answer depends on the example, the seed and the settings, not on the batch that it was in.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import limits
from experiments.answers import Answering, answer
from experiments.console import pick_device, program
from experiments.eval_page import write_page
from experiments.eval_sets import NO_SHOTS, Asked, read_set, read_shots
from experiments.eval_settings import keep_settings
from experiments.eval_summary import summary_of, summary_of_open
from experiments.eval_text import score_text
from experiments.limits import Count, Place, Range, Seed, Text, Whole
from experiments.lock import locked
from experiments.open_model import open_model
from experiments.ops import generation_options, ops_for_generation, weights_for_generation
from experiments.pairs import filled
from purelm import generate, track
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.evals.open_ended import OPEN
from purelm.models import transformer
from purelm.tokenizer import fingerprint, token_to_id
from purelm.tokenizer.chat import load_chat

# May differ where answers are there: what they hold is compared, or they change no answer.
FREE = (
    "out", "model", "data", "tokenizer", "tasks", "limit", "batch_size", "device", "shots_file", "generator", "text",
    "window", "stride", "begin",
)  # fmt: skip


@dataclass(frozen=True)
class Args:
    """Answer question sets with a model, and grade the answers."""

    model: Annotated[Place, tyro.conf.Positional]
    """folder of open weights, .gguf file, or folder of a run"""
    out: Place
    """folder of the results"""
    data: Place | None = None
    """folder with the question sets: gsm8k-test.jsonl, svamp.test.jsonl, mmlu/*_test.csv, ... anywhere in it"""
    tasks: tuple[Text, ...] = ()
    """of gsm8k, svamp, asdiv, mawps, mmlu, alpaca_eval, simple_safety_tests; without --text, gsm8k if none is given"""
    tokenizer: Place | None = None
    limit: Count | None = None
    """first examples of each set"""
    shots: Whole = 0
    """worked examples before each question, from the set's other split (gsm8k-train.jsonl, svamp.train.jsonl,
    mmlu/*_dev.csv, ... in data), of the question's subject, and never the question itself. Without --chat an answer
    then ends at an empty line, as those of the examples do"""
    shots_seed: Seed | None = None
    """choose them in an order of this seed; without, the first ones"""
    shots_file: Place | None = None
    """worked examples of one's own: JSON lines of {"question", "response"}; all of them, in their order"""
    template: Text = "{prompt}"
    r"""text around {prompt}, the question set's own, or around the bare {question}; \n is a new line"""
    chat: bool = False
    """put the text as a user's message into the chat template of the model's folder or .gguf file; worked examples are
    turns of user and assistant before it"""
    stop: tuple[Text, ...] = ()
    """strings that end an answer"""
    end: tuple[Text, ...] = ("<|endoftext|>", "<|im_end|>")
    """special tokens that end an answer, where the tokenizer has them"""
    n_samples: Count = 1
    """answers to each question: pass@1, 2, 4, ..., k and maj@k"""
    temperature: Annotated[float, Range(1e-6, 1e6, or_zero=True)] = 0.0
    """0: greedy"""
    max_new_tokens: Count = 256
    batch_size: Count = 16
    seed: Seed = 0
    generator: Text = ""
    """name of the model in the outputs of alpaca_eval; default that of its folder or file"""
    text: tuple[Place, ...] = ()
    """texts whose loss is measured: .txt, .jsonl (field "text"), also .gz and .zst"""
    window: Count = 1024
    """tokens that the model reads of a text at a time"""
    stride: Count | None = None
    """tokens from one window to the next; default half a window, so that a token has half a window before it"""
    begin: Text = "<|endoftext|>"
    """special token before each document of a text, where the tokenizer has it"""
    device: str = "auto"


@program
def main(args: Args) -> None:
    limits.check(args)
    device = pick_device(args.device)
    sets = _checked(args)
    params, cfg, bpe = open_model(args.model, args.tokenizer, device)
    params = weights_for_generation(params, device)
    if args.text and args.window > cfg.context_length:
        raise ValueError(f"window must be at most {cfg.context_length}, the model's context, got {args.window}")
    ends = tuple(token_to_id(bpe, name) for name in args.end if name in bpe.special_tokens)
    model = transformer.make(cfg, ops_for_generation(cfg, device))
    chat = load_chat(args.model) if args.chat else None
    how = Answering(
        model, params, bpe, chat, args.template,
        args.n_samples, generate.Sampling(temperature=args.temperature), generate.Stop(ends, args.stop),
        args.max_new_tokens, args.batch_size, args.seed, generation_options(device),
    )  # fmt: skip
    summary: dict[str, dict[str, Any]] = {}
    with locked(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        keep_settings(args.out, args, FREE, model=tensors_of(params), tokenizer=fingerprint(bpe))
        for asked in sets:
            summary[asked.name] = _evaluate(args, how, asked)
        for file in args.text:
            summary[f"text {file}"] = score_text(
                how.model, params, bpe, file, args.out / "text.jsonl", window=args.window,
                stride=args.stride or max(args.window // 2, 1), begin=args.begin,
            )  # fmt: skip
        track.write_json(args.out / "summary.json", summary)
    for name, found in summary.items():
        shown = (f"{k} {track.show(v)}" for k, v in found.items() if not isinstance(v, dict))
        print("  ".join([f"{name:8}", *shown]))
    files = [path.name for asked in sets for path in _places(args, asked.name)]
    print(f"{args.out}: summary.json, {', '.join(files + ['text.jsonl'] * bool(args.text))}")


def _checked(args: Args) -> list[Asked]:
    """The question sets; ValueError for what is wrong before a model is read and anything is written."""
    if args.n_samples > 1 and args.temperature == 0.0:
        raise ValueError("n_samples: several greedy answers are all the same; give a temperature")
    if args.shots and args.shots_file is not None:
        raise ValueError("shots and shots_file: give one of them")
    if args.stride is not None and args.stride > args.window:
        raise ValueError(f"stride must be at most window {args.window}, got {args.stride}: tokens would be left out")
    try:
        filled(args.template, {"prompt": "", "question": ""})
    except ValueError as error:
        raise ValueError(f"template: {error}") from None
    tasks = tuple(dict.fromkeys(args.tasks)) or (() if args.text else ("gsm8k",))
    if tasks and args.data is None:
        raise ValueError(f"data: give the folder with the question sets of {', '.join(tasks)}")
    given = NO_SHOTS if args.shots_file is None else read_shots(args.shots_file)
    data = args.data or Path()
    sets = [read_set(name, data, args.limit, args.shots, args.shots_seed, given) for name in tasks]
    missing = [file for file in args.text if not file.is_file()]
    if missing:
        raise ValueError(f"text {missing[0]}: no such file")
    inputs: Iterable[Path | None] = (*args.text, args.shots_file, *(file for asked in sets for file in asked.files))
    written = [place for name in tasks for place in _places(args, name)]
    written += [args.out / name for name in ("text.jsonl", "settings.json", "summary.json")]
    outputs = {path.resolve() for path in written}
    for path in inputs:
        if path is not None and path.resolve() in outputs:
            raise ValueError(f"out {args.out}: {path} would be written over: give another --out")
    return sets


def _places(args: Args, name: str) -> list[Path]:
    """The files of a set: rows, page, and the outputs that a judge takes."""
    if name not in OPEN:  # -answers: a file of questions is called alpaca_eval.jsonl
        return [args.out / f"{name}.jsonl", args.out / f"{name}.html"]
    names = (f"{name}-answers.jsonl", f"{name}.html", f"{name}-outputs{OPEN[name].suffix}")
    return [args.out / x for x in names]


def _evaluate(args: Args, how: Answering, asked: Asked) -> dict[str, Any]:
    """The summary of a set, after its answers, page and outputs are written."""
    rows_file, page, *outputs = _places(args, asked.name)
    rows = answer(how, asked, rows_file, args.data or Path())
    found = summary_of(asked.examples, rows) if asked.grade is not None else summary_of_open(rows)
    write_page(page, asked.name, asked.examples, rows, found)
    for path in outputs:
        texts = [row["responses"][0] for row in rows]
        generator = args.generator or args.model.resolve().name.removesuffix(".gguf")
        track.write_text(path, OPEN[asked.name].text(asked.examples, texts, generator))
    return found


if __name__ == "__main__":
    main(tyro.cli(Args))
