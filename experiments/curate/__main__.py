"""Web crawls to text and tokens for training: read, extract, filter, mask, deduplicate, shuffle, tokenise.

    python -m experiments.curate --input 'crawl/*.warc.wet.gz' --output runs/web --workers 16
    python -m experiments.curate --input ... --output ... --final.tokenizer tokenizer.json
    python -m experiments.curate --input ... --output ... --filter.decontaminate.files data/math data/eval
    python -m experiments.curate --input ... --output ... --backend slurm --slurm.partition cpu --workers 500
    python -m experiments.curate --input ... --output ... --dedup.kind none --filter.rules none --filter.no-pii

Inputs are WARC, WET, JSON lines and Parquet. It leaves in OUT: text/NNNNN.jsonl.zst (id, url, text, meta; in a random
order of all documents), tokens/train-NNNNN.bin with a tokenizer, counts.json, report.html, timing/ and stages/, the
outputs of each stage, from which a run that was ended in any way goes on. The same inputs and settings give the same
bytes in all but timing/ and report.html, whatever the number of workers, the back end and the interruptions. (The time
of an input's last change is noted in stages/, so that a file that was written over is not taken for the old one.)
"""

import tyro

from experiments.console import program
from experiments.curate.config import Curate
from experiments.curate.run import curate

__all__ = ["main"]


@program
def main(cfg: Curate) -> None:
    curate(cfg)


if __name__ == "__main__":
    main(tyro.cli(Curate))
