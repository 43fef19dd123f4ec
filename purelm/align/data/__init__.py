"""Data for post-training: rows of prompts and responses, and steps that clean them and count what they remove.

    rows = read(path, alpaca)                                  # or chat, pairs, gsm8k, openr1
    kept, counts = clean(rows, [unique(), decontaminated(index(tests)), length_window(n_tokens, 1, 512)])
    print(table(counts))

    examples        files of Alpaca's, ChatGPT's and ShareGPT's form, of pairs, of GSM8K -> rows
    openr1          rows of OpenR1-Math-220k: generations, verdicts, pass rates
    preferences     chosen and rejected answers: HH-RLHF, UltraFeedback, one's own
    cleaning        Step, clean, Counts; duplicates, lengths, difficulty, answers that can be graded
    contamination   which rows contain examples of a test set
    countdown       problems without end, each with a solution
    tasks           sorting, arithmetic modulo m, addition: training and held-out sets that are disjoint
    word_problems   arithmetic in everyday English, of one or two steps; word_templates are its sentences

A row is a dict with the texts "prompt" and "response"; what else it holds is kept. Prompts have no special tokens of a
model: `experiments.sft` puts its templates around them.
"""

from purelm.align.data.cleaning import (
    Counts,
    Removed,
    Row,
    Step,
    asked,
    both,
    clean,
    difficulty,
    exact,
    filtered,
    length_window,
    normalised,
    prompt_of,
    table,
    unique,
    verifiable,
)
from purelm.align.data.contamination import Index, Match, decontaminated, index, match
from purelm.align.data.examples import (
    ALPACA_INPUT,
    ALPACA_PLAIN,
    alpaca,
    alpaca_prompt,
    chat,
    dialogue,
    gsm8k,
    pairs,
    read,
    without_calculator,
)
from purelm.align.data.preferences import last_answers, transcripts

__all__ = [
    "ALPACA_INPUT",
    "ALPACA_PLAIN",
    "Counts",
    "Index",
    "Match",
    "Removed",
    "Row",
    "Step",
    "alpaca",
    "alpaca_prompt",
    "asked",
    "both",
    "chat",
    "clean",
    "decontaminated",
    "dialogue",
    "difficulty",
    "exact",
    "filtered",
    "gsm8k",
    "index",
    "last_answers",
    "length_window",
    "match",
    "normalised",
    "pairs",
    "prompt_of",
    "read",
    "table",
    "transcripts",
    "unique",
    "verifiable",
    "without_calculator",
]
