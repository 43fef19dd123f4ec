"""A model as judge of another's outputs: which of two is better, or whether they are safe.

    python -m experiments.judge Llama-3.3-70B-Instruct --chat --outputs evals/open/alpaca_eval-outputs.json \\
        --reference data/alpaca_eval.jsonl --out evals/judged
    python -m experiments.judge Llama-3.3-70B-Instruct --chat --outputs evals/open/simple_safety_tests-outputs.jsonl \\
        --out evals/safe

With --reference, each pair is judged in both orders. Writes OUT/answers.jsonl, the judge's words as they come,
judgements.jsonl, a row an output, and summary.json. An answer that cannot be read is counted and not guessed. The same
command again goes on where it was stopped. The prompts are `purelm.evals.judges`', not those of a leaderboard.
"""

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from experiments import limits
from experiments.answers import Answering, answer
from experiments.console import pick_device, program
from experiments.eval_sets import NO_SHOTS, Asked
from experiments.eval_settings import keep_settings
from experiments.limits import Count, Place, Text
from experiments.lock import locked
from experiments.open_model import open_model
from experiments.ops import generation_options, ops_for_generation, weights_for_generation
from purelm import generate, track
from purelm.data.json_lines import json_rows
from purelm.dist.agreement import fingerprint as tensors_of
from purelm.evals import judges
from purelm.evals.tasks import Example
from purelm.models import transformer
from purelm.tokenizer import fingerprint, token_to_id
from purelm.tokenizer.chat import load_chat

FREE = ("out", "model", "outputs", "reference", "tokenizer", "limit", "batch_size", "device")


@dataclass(frozen=True)
class Args:
    """Judge a model's outputs with another model."""

    model: Annotated[Place, tyro.conf.Positional]
    """the judge: folder of open weights, .gguf file, or folder of a run"""
    outputs: Place
    """what is judged, of experiments.evaluate: alpaca_eval-outputs.json or simple_safety_tests-outputs.jsonl"""
    out: Place
    """folder of the judgements"""
    reference: Place | None = None
    """outputs to the same instructions to compare with; without, each output is judged safe or unsafe"""
    tokenizer: Place | None = None
    limit: Count | None = None
    """first outputs"""
    chat: bool = False
    """put the question to the judge into its chat template"""
    end: tuple[Text, ...] = ("<|endoftext|>", "<|im_end|>")
    """special tokens that end an answer, where the tokenizer has them"""
    max_new_tokens: Count = 64
    batch_size: Count = 16
    device: str = "auto"


@program
def main(args: Args) -> None:
    limits.check(args)
    device = pick_device(args.device)
    asked, questions = _asked(args)
    written = [args.out / name for name in ("answers.jsonl", "judgements.jsonl", "settings.json", "summary.json")]
    for path in asked.files:
        if path.resolve() in {x.resolve() for x in written}:
            raise ValueError(f"out {args.out}: {path} would be written over: give another --out")
    params, cfg, bpe = open_model(args.model, args.tokenizer, device)
    params = weights_for_generation(params, device)
    ends = tuple(token_to_id(bpe, name) for name in args.end if name in bpe.special_tokens)
    model = transformer.make(cfg, ops_for_generation(cfg, device))
    chat = load_chat(args.model) if args.chat else None
    how = Answering(
        model, params, bpe, chat, "{prompt}", 1,
        generate.Sampling(temperature=0.0), generate.Stop(ends), args.max_new_tokens, args.batch_size, 0,
        generation_options(device),
    )  # fmt: skip
    with locked(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        kind = "safety" if args.reference is None else "pairs"
        keep_settings(args.out, args, FREE, model=tensors_of(params), tokenizer=fingerprint(bpe), kind=kind)
        rows = answer(how, asked, written[0], args.outputs)
        said = [row["responses"][0] for row in rows]
        summary, verdicts = _judged(said, pairs=args.reference is not None)
        lines = [{**x, "judgement": y} for x, y in zip(questions, verdicts, strict=True)]
        track.write_text(written[1], "".join(json.dumps(line) + "\n" for line in lines))
        track.write_json(written[3], {k: None if v != v else v for k, v in summary.items()})  # JSON has no nan
    print("  ".join(f"{k} {track.show(v)}" for k, v in summary.items()))
    print(f"{args.out}: summary.json, judgements.jsonl, answers.jsonl")


def _asked(args: Args) -> tuple[Asked, list[dict[str, str]]]:
    """(the questions to the judge, the rows that they are about)."""
    field = "prompts_final" if args.reference is None else "instruction"
    rows = _outputs(args.outputs, field)[: args.limit]
    files = [args.outputs]
    if args.reference is None:
        prompts = [(str(i), judges.safety_prompt(row[field], row["output"])) for i, row in enumerate(rows)]
    else:
        files.append(args.reference)
        theirs = {row[field]: row["output"] for row in _outputs(args.reference, field)}
        prompts = []
        for i, row in enumerate(rows):
            if row[field] not in theirs:
                raise ValueError(f"{args.reference}: has no output to the instruction {row[field][:60]!r}")
            both = judges.pairwise_prompts(row[field], theirs[row[field]], row["output"])
            prompts += [(f"{i}-{side}", prompt) for side, prompt in zip("mM", both, strict=True)]
    examples = [Example(name, prompt, "") for name, prompt in prompts]
    return Asked("judge", examples, lambda x: x.question, None, NO_SHOTS, files), rows


def _outputs(path: Path, field: str) -> list[dict[str, str]]:
    """{field, "output"} of each row of a JSON array or of JSON lines; ValueError for a field twice the same."""
    if not path.is_file():
        raise ValueError(f"{path}: no such file")
    if path.suffix == ".json":
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON ({error})") from None
        if not isinstance(found, list):
            raise ValueError(f"{path}: not a JSON array")
        rows = [(f"{path}, element {i}", row) for i, row in enumerate(found)]
    else:
        rows = list(json_rows(path))
    if not rows:
        raise ValueError(f"{path}: has no rows")
    for where, row in rows:
        if not isinstance(row, dict) or not all(isinstance(row.get(name), str) for name in (field, "output")):
            raise ValueError(f"{where}: needs the texts {field!r} and 'output'")
    text, times = Counter(row[field] for _, row in rows).most_common(1)[0]
    if times > 1:
        raise ValueError(f"{path}: has {times} outputs to {text[:60]!r}")
    return [{field: row[field], "output": row["output"]} for _, row in rows]


def _judged(said: list[str], *, pairs: bool) -> tuple[dict[str, Any], list[float | bool | None]]:
    """(summary, judgements) of the judge's words, for pairs two a judgement."""
    if not pairs:
        safe = [judges.parse_safety(text) for text in said]
        found: Any = judges.safety(safe) if any(x is not None for x in safe) else None
        return found._asdict() if found else {"n": 0, "unparsed": len(safe)}, [*safe]
    read = [judges.parse_preference(text) for text in said]
    preferences = [judges.both_orders(*two) for two in zip(read[::2], read[1::2], strict=True)]
    found = judges.win_rate(preferences) if any(x is not None for x in preferences) else None
    summary = found._asdict() if found else {"n": 0, "unparsed": len(preferences)}
    first = [x for x in read if x in (1.0, 2.0)]
    # A judge without a liking for a place says it in half of its answers, since every pair is shown in both orders.
    return summary | {"first preferred": first.count(1.0) / len(first) if first else None}, [*preferences]


if __name__ == "__main__":
    main(tyro.cli(Args))
