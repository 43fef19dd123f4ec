"""What a run of `experiments.curate` is asked for, as frozen dataclasses; every field is a flag."""

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from experiments.limits import Count, Factor, Place, Range, Share, Text

__all__ = ["Classes", "Cost", "Curate", "Decontaminate", "Dedup", "Filter", "Final", "Slurm", "stage_settings"]

Megabytes = Annotated[float, Range(0.001, 10**6)]
Whole63 = Annotated[int, Range(0, 2**63, open_high=True)]


@dataclass(frozen=True)
class Classes:
    """A step by a classifier of texts; none without a model."""

    model: Place | None = None
    """.safetensors of experiments.train_classifier, .bin or .ftz of fastText"""
    label: Text | None = None
    """the class that is meant; None: the public models' own, hq, toxic or nsfw"""
    least: Share | None = None
    """score from which on a document is of the class; None, without a label of one's own: the public models' thresholds
    (purelm.curate.classes)"""


@dataclass(frozen=True)
class Decontaminate:
    """A step that looks for questions of evaluation sets; none without files."""

    files: tuple[Place, ...] = ()
    """test sets as experiments.prepare_sft reads them, text (.txt, .zip), or folders of test sets"""
    preset: Literal["gpt3", "datatrove", "palm", "llama2", "tulu3", "decon"] | None = None
    """of purelm.curate.decontaminate, or purelm.curate.decon; None: gpt3"""
    n: Annotated[int, Range(1, 1000)] | None = None
    """words of a run, in the place of the preset's"""
    share: Share | None = None
    """least share of a question that is found (decon: least score), in the place of the preset's"""
    action: Literal["drop", "cut", "note"] | None = None
    """in the place of the preset's; decon only drops"""


@dataclass(frozen=True)
class Filter:
    """Steps of one document, in this order: extract, url, language, rules, quality, toxicity, nsfw, decontaminate, pii,
    classifier."""

    most_megabytes: Megabytes = 12.0
    """a record or line that is longer is skipped and counted; with 12, a worker's memory stays below 1 GB, also for a
    text that is one word"""
    field: Text = "text"
    """of JSON lines and rows: the document's text"""
    main_content: bool = False
    """pages without navigation, headers and footers"""
    domains: Place | None = None
    """a file of domains to leave out, one a line"""
    words: Place | None = None
    """a file of words (a-z, 0-9), one a line: pages with one of them in their address are left out"""
    languages: tuple[Text, ...] = ("en",)
    """to keep; "all": no such step"""
    language_least: Share = 0.65
    """least score of the language"""
    language_model: Place | None = None
    """a fastText file such as lid.176.ftz; without it py3langid"""
    rules: Literal["english", "all", "course", "none"] = "english"
    """quality rules: lists of purelm.curate.rules"""
    quality: Classes = Classes()
    """keeps the class"""
    toxicity: Classes = Classes()
    """drops the class"""
    nsfw: Classes = Classes()
    """drops the class"""
    decontaminate: Decontaminate = Decontaminate()
    pii: bool = True
    """mask e-mails, telephone numbers and IPv4 addresses"""
    classifier: Text | None = None
    """MODULE:NAME of a step of one's own, a function Document -> Document | Drop; a change of that module's file is
    seen on going on, one of what it imports or reads, such as a model, is not: use --redo then"""


@dataclass(frozen=True)
class Dedup:
    """Duplicates over all inputs; the first of a cluster, by input and place, is kept."""

    kind: Literal["near", "exact", "none"] = "near"
    n_hashes: Annotated[int, Range(1, 1 << 12)] = 112
    n_bands: Annotated[int, Range(1, 1 << 12)] = 14
    ngram: Annotated[int, Range(1, 1 << 10)] = 5
    """words"""
    jaccard: Annotated[float, Range(0, 1, open_low=True)] = 0.8
    memory_megabytes: Annotated[float, Range(0.01, 10**6)] = 1024.0
    """for sorting and comparing; what does not fit is sorted in files. At most 18 bytes a document come to it"""


@dataclass(frozen=True)
class Final:
    """The shards that are written in the end, in a random order of all documents."""

    shard_megabytes: Megabytes = 128.0
    """characters of text in a shard, in millions: about; one is held in memory"""
    tokenizer: Place | None = None
    """tokenizer.json, .tiktoken or a folder with one: token files are written too"""


@dataclass(frozen=True)
class Slurm:
    """What sbatch is asked for (extra `slurm`)."""

    partition: Text | None = None
    minutes: Count = 600
    gigabytes: Count = 2
    """memory of a job, which has one core"""
    array: Annotated[int, Range(1, 10**5)] = 1000
    """most jobs in an array: each does several inputs one after the other"""


@dataclass(frozen=True)
class Cost:
    """Of the estimate in the report; changes nothing else."""

    dollars: Factor = 0.04
    """per core and hour"""
    file_megabytes: Megabytes = 75.0
    """of a WET file as it is stored: the mean in Common Crawl"""


@dataclass(frozen=True)
class Curate:
    """Web crawls to text and tokens for training."""

    input: tuple[Text, ...]
    """files, or patterns such as 'crawl/*.warc.wet.gz' in quotes"""
    output: Place
    """folder of the run"""
    filter: Filter = field(default_factory=Filter)
    dedup: Dedup = field(default_factory=Dedup)
    final: Final = field(default_factory=Final)
    seed: Whole63 = 0
    """of the order of documents, of MinHash and of the examples in the report"""
    examples: Annotated[int, Range(0, 1000)] = 5
    """random documents shown for each reason"""
    excerpt: Annotated[int, Range(0, 1500)] = 1500
    """characters of a document that report.html shows; a member of a cluster has 400 at most"""
    compression: Literal["auto", "zst", "gz"] = "auto"
    """auto: zst where zstandard is installed"""
    backend: Literal["local", "slurm", "ray"] = "local"
    workers: Annotated[int, Range(1, 100_000)] = 1
    """processes, or jobs that run at once"""
    redo: bool = False
    """make again what was made with other settings or from other inputs; without it that is refused"""
    ray_address: Text | None = None
    """of a cluster that runs; None: this machine"""
    slurm: Slurm = field(default_factory=Slurm)
    cost: Cost = field(default_factory=Cost)


def stage_settings(cfg: Curate) -> dict[str, dict[str, Any]]:
    """What each stage's output depends on, beside the outputs of stages before it."""
    return {
        "filter": {
            **_filter_settings(cfg.filter),
            # Signatures are made with the filter, where the text is at hand.
            **{f"dedup.{name}": getattr(cfg.dedup, name) for name in ("kind", "n_hashes", "ngram")},
            "seed": cfg.seed, "examples": cfg.examples, "compression": cfg.compression,
        },
        "duplicates": {
            f"dedup.{name}": getattr(cfg.dedup, name) for name in ("kind", "n_hashes", "n_bands", "ngram", "jaccard")
        },
        "scatter": {"final.shard_megabytes": cfg.final.shard_megabytes},
        "text": {},
        "tokens": {"final.tokenizer": _plain(cfg.final.tokenizer)},
    }  # fmt: skip


def _filter_settings(cfg: Filter) -> dict[str, Any]:
    """Of optional steps only those that are asked for, so that a new kind of step leaves what is done as it is."""
    found: dict[str, Any] = {}
    for item in dataclasses.fields(cfg):
        value = getattr(cfg, item.name)
        if not isinstance(value, Classes | Decontaminate):
            found[f"filter.{item.name}"] = _plain(value)
        elif value != type(value)():
            found |= {f"filter.{item.name}.{x.name}": _plain(getattr(value, x.name)) for x in dataclasses.fields(value)}
    return found


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return [_plain(x) for x in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
