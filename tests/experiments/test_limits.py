"""Ranges of configurations. Oracles: Python's comparisons; what each program is asked, and that nothing is written."""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, get_args, get_origin, get_type_hints

import pytest
from hypothesis import given
from hypothesis import strategies as st

from experiments import accounting, dpo, evaluate, generate, overlap, profile, quickstart, remat_study, sft
from experiments.config import Optim, Pretrain
from experiments.curate.config import Curate
from experiments.limits import OTHERS, Count, Place, Range, Share, Text, check, rule_of
from purelm.models.config import Config
from tests.programs import run_here

CONFIGURATIONS = (
    Pretrain,
    quickstart.Quickstart,
    generate.Args,
    accounting.Args,
    profile.Args,
    remat_study.Args,
    overlap.Args,
    sft.Sft,
    dpo.Dpo,
    evaluate.Args,
    Curate,
)


def kinds(hint):
    """The types that a field's values may have, in tuples too."""
    if get_origin(hint) is Annotated:
        return kinds(get_args(hint)[0])
    parts = [kind for part in get_args(hint) if isinstance(part, type) or get_args(part) for kind in kinds(part)]
    return parts or [hint]


def numbers_without_range(cls):
    hints = get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        found = kinds(hints[field.name])
        for inner in filter(dataclasses.is_dataclass, found):
            yield from numbers_without_range(inner)
        if {int, float} & set(found) and rule_of(cls, field.name, hints[field.name]) is None:
            yield f"{cls.__module__}.{cls.__name__}.{field.name}"


@pytest.mark.parametrize("cls", CONFIGURATIONS, ids=lambda cls: f"{cls.__module__}")
def test_every_number_of_a_configuration_has_a_range(cls):
    assert list(numbers_without_range(cls)) == []
    assert set(OTHERS) == {Config, get_args(get_type_hints(Config)["rope_scaling"])[0]}


@given(st.floats(), st.floats(-5, 5), st.floats(-5, 5), st.booleans(), st.booleans(), st.booleans())
def test_a_range_holds_what_lies_in_it(x, low, high, open_low, open_high, or_zero):
    inside = (low < x if open_low else low <= x) and (x < high if open_high else x <= high)
    assert Range(low, high, open_low, open_high, or_zero).holds(x) == (inside or (or_zero and x == 0))
    assert not Range(low, high).holds(math.nan)


@dataclass(frozen=True)
class Inner:
    n: Count = 1


@dataclass(frozen=True)
class Outer:
    inner: Inner = Inner()
    many: tuple[Share, ...] = ()
    some: Share | None = None
    free: float = math.nan  # without a rule: the program's own
    prompt: Text | None = None
    flag: bool = False
    path: Path = Path("\udcff")  # a name that is not UTF-8 is a name
    place: Place = Path("a")


@pytest.mark.parametrize(
    "change,message",
    [
        ({"inner": Inner(0)}, "inner.n must be at least 1, got 0"),
        ({"many": (0.5, 2.0)}, "many must be at least 0 and at most 1, got 2.0"),
        ({"some": -0.1}, "some must be at least 0 and at most 1, got -0.1"),
        ({"some": math.nan}, "some must be a finite number, at least 0 and at most 1, got nan"),
        ({"place": Path("\udcff")}, r"place must be text that UTF-8 can hold, got '\udcff': surrogates not allowed"),
        ({"inner": Inner(10**16)}, "inner.n must be at least 1, and at most 1e+15, got 10000000000000000"),
        ({"prompt": "a\udcff"}, r"prompt must be text that UTF-8 can hold, got 'a\udcff': surrogates not allowed"),
    ],
)
def test_the_field_its_value_and_the_range_are_named(change, message):
    check(Outer())
    check(Outer(many=(0.0, 1.0), some=1.0, prompt="\u00e9", flag=True))
    with pytest.raises(ValueError) as error:
        check(dataclasses.replace(Outer(), **change))
    assert str(error.value) == message


def test_models_and_the_defaults_of_all_programs_are_in_their_ranges():
    for cls in CONFIGURATIONS:
        required = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        check(cls(**dict.fromkeys(required, Path("x"))))
    model = Config(vocab_size=8, context_length=4, d_model=8, n_layers=1, n_heads=2, window=(None, 3), norm_eps=1e-6)
    check(model)
    for name, value in (("norm_eps", 1e39), ("rope_theta", 1e300), ("attention_softcap", 1e39)):
        with pytest.raises(ValueError, match=f"{name} must be"):
            check(dataclasses.replace(model, **{name: value}))
    check(Optim(clip=0.0, lr=0.0))


PRETRAIN = ("pretrain", "--run", "RUN", "--train", "/nowhere/train.bin")
QUICKSTART = ("quickstart", "--run", "RUN")
GENERATE = ("generate", "RUN")


@pytest.mark.parametrize(
    "args,name",
    [
        ((*PRETRAIN, "--steps", "0"), "steps"),
        ((*PRETRAIN, "--batch-size", "0"), "batch_size"),
        ((*PRETRAIN, "--microbatches", "0"), "microbatches"),
        ((*PRETRAIN, "--log-every", "0"), "log_every"),
        ((*PRETRAIN, "--save-every", "-1"), "save_every"),
        ((*PRETRAIN, "--eval-every", "-1"), "eval_every"),
        ((*PRETRAIN, "--eval-tokens", "0"), "eval_tokens"),
        ((*PRETRAIN, "--last-eval-tokens", "0"), "last_eval_tokens"),
        ((*PRETRAIN, "--eval-stride", "0"), "eval_stride"),
        ((*PRETRAIN, "--keep-last", "0"), "keep_last"),
        ((*PRETRAIN, "--seed", str(2**63)), "seed"),
        ((*PRETRAIN, "--optim.lr", "-1"), "optim.lr"),
        ((*PRETRAIN, "--optim.clip", "nan"), "optim.clip"),
        ((*PRETRAIN, "--optim.beta2", "1"), "optim.beta2"),
        ((*PRETRAIN, "--optim.eps", "0"), "optim.eps"),
        ((*PRETRAIN, "--optim.warmup-steps", "-1"), "optim.warmup_steps"),
        ((*PRETRAIN, "--optim.weight-decay", "inf"), "optim.weight_decay"),
        ((*PRETRAIN, "--model.rope-theta", "1e300"), "model.rope_theta"),
        ((*PRETRAIN, "--parallel.timeout", "nan"), "parallel.timeout"),
        ((*PRETRAIN, "--parallel.bucket-mb", "0"), "parallel.bucket_mb"),
        ((*PRETRAIN, "--sample", "\udcff"), "sample"),
        ((*PRETRAIN, "--device", "tpu"), "device"),
        ((*PRETRAIN, "--device", "meta"), "device"),
        (("quickstart", "--run", "a\udcff"), "run must be text"),
        ((*QUICKSTART, "--stories", "1"), "stories"),
        ((*QUICKSTART, "--stories", str(10**12)), "stories"),
        ((*QUICKSTART, "--max-bytes", "0"), "max_bytes"),
        ((*QUICKSTART, "--vocab-size", "256"), "vocab_size"),
        ((*QUICKSTART, "--vocab-size", str(10**9)), "vocab_size"),
        ((*QUICKSTART, "--d-model", "1000000000002", "--n-heads", "1"), "d_model"),
        ((*QUICKSTART, "--batch-size", str(10**12)), "batch"),
        ((*QUICKSTART, "--n-heads", "5"), "n_heads"),
        ((*QUICKSTART, "--optim.lr", "nan"), "optim.lr"),
        ((*QUICKSTART, "--prompt", "\udcff"), "prompt"),
        ((*QUICKSTART, "--device", "meta"), "device"),
        ((*GENERATE, "--n", "0"), "n must"),
        ((*GENERATE, "--max-new-tokens", "0"), "max_new_tokens"),
        ((*GENERATE, "--temperature", "1e-300"), "temperature"),
        ((*GENERATE, "--temperature", "-1"), "temperature"),
        ((*GENERATE, "--top-p", "0"), "top_p"),
        ((*GENERATE, "--min-p", "nan"), "min_p"),
        ((*GENERATE, "--step", "-1"), "step"),
        ((*GENERATE, "--stop", "\udcff"), "stop"),
        (("accounting", "--mfu", "0"), "mfu"),
        (("accounting", "--memory", "nan"), "memory"),
        (("accounting", "--tokens", "-1"), "tokens"),
        (("accounting", "--batch-size", "0"), "batch_size"),
        (("accounting", "--bytes-per-element", "0"), "bytes_per_element"),
        (("profile", "--out", "RUN", "--warmup", "-1"), "warmup"),
        (("profile", "--out", "RUN", "--batch-size", str(10**12)), "batch"),
        (("profile", "--out", "RUN", "--device", "tpu"), "device"),
        (("remat_study", "--model.n-layers", str(10**12)), "n_layers"),
        (("overlap", "--bucket-mb", "nan"), "bucket_mb"),
    ],
    ids=lambda x: " ".join(x[-2:]).encode("ascii", "replace").decode() if isinstance(x, tuple) else "",
)
def test_bad_values_are_one_line_before_anything_is_written(tmp_path, args, name):
    done = run_here(f"experiments.{args[0]}", *(str(tmp_path / "run") if a == "RUN" else a for a in args[1:]))
    lines = done.stderr.splitlines()
    assert done.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: ") and name in lines[0], done.stderr
    assert not list(tmp_path.iterdir()) and not done.stdout
