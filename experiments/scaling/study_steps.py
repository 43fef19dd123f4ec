"""The steps of a study that run experiments: they are submitted, awaited and remembered; speed, and learning rates."""

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from experiments.console import progress_bar, say
from experiments.scaling import decide
from experiments.scaling.client import Client, InsufficientBudget
from experiments.scaling.decide import RateLaw, Shape, Speed, counted, rate_of, work
from experiments.scaling.service.schemas import Completed, Experiment, Rules, TrainingConfig, total_steps
from purelm import track

__all__ = ["Server", "Sizes", "device_speed", "ended", "last", "learning_rates"]

RATES_SHARE = 0.3  # of the budget
LONGER = 4.0  # times that the third sweep's runs take of the first's
MOST_WIDER = 5  # runs that are added where the best learning rate is an end of those tried
SLACK = 3.0  # reserved for a run, over what the law of speed says


class Sizes(NamedTuple):
    """What all runs of a study have."""

    batch: int  # sequences
    evals: int
    least_steps: int  # updates
    dtype: str = "float32"  # of weights, activations and moments


class Server:
    """What was submitted, and what came of it.

    plan: JSON file with the configurations of each step, as they were planned the first time: a study that goes on asks
    for the same runs, whatever was measured since.
    """

    def __init__(self, client: Client, sizes: Sizes, plan: Path):
        self.client, self.sizes, self._plan = client, sizes, plan
        told = dict(client.rules())
        self.final_budgets: float | None = told.pop("final_budgets", None)  # None: a server that does not say
        self.rules = Rules.model_validate(told)
        self.total: float = client.budget()["total_budget_seconds"]
        self.done: dict[int, Experiment] = {}

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Write down what the plan is of; ValueError if it is of something else already."""
        plan, facts = self._read(), json.loads(json.dumps(facts))
        if plan and (kept := plan.get("study")) != facts:
            changed = [k for k, v in facts.items() if kept is None or kept.get(k) != v]
            raise ValueError(f"{self._plan}: was planned with other {', '.join(changed)}: take another --out")
        if len(plan) > 2 and not self.client.experiments():  # the second step is planned when the first has run
            raise ValueError(f"{self._plan}: was planned with another key: take another --out, or that key")
        track.write_text(self._plan, json.dumps({**plan, "study": facts}, indent=1) + "\n")

    def _read(self) -> dict[str, Any]:
        return json.loads(self._plan.read_text(encoding="utf-8")) if self._plan.is_file() else {}

    def config(self, shape: Shape, tokens: float, rate: float, seconds: float) -> TrainingConfig:
        """As many tokens as the data have at most; limits are whole numbers of seconds."""
        batch, evals, _, dtype = self.sizes
        chunk = self.rules.seq_len * batch * evals
        most = self.rules.max_train_tokens // chunk * chunk
        if not most:
            raise ValueError(f"the data hold {self.rules.max_train_tokens:,} tokens, fewer than {evals} updates take")
        limit = max(2.0, math.ceil(seconds))
        tokens = min(int(tokens), most)
        return decide.config(shape, tokens, rate, self.rules, batch=batch, evals=evals, seconds=limit, dtype=dtype)

    def planned(
        self, shape: Shape, seconds: float, rate: float | RateLaw, speed: Speed, most: float = math.inf
    ) -> TrainingConfig:
        """A run of about so many seconds; it may use `SLACK` times as many, or `most`."""
        n = counted(self.config(shape, 1, 1.0, 2.0).architecture_config)
        evaluated = self.sizes.evals * self.rules.n_val_tokens / 3
        pace = self._pace(n, speed)
        tokens = max(1.0, seconds / pace - evaluated)
        cfg = self.config(shape, tokens, rate if isinstance(rate, float) else rate_of(rate, n, tokens), 2.0)
        if (steps := total_steps(cfg, self.rules)) < self.sizes.least_steps:
            raise ValueError(
                f"width {shape.width}: {seconds:.1f} s are enough for {steps} updates, fewer than least_steps "
                f"{self.sizes.least_steps}: give the key more seconds, or smaller --widths, --evals or n_val_tokens"
            )
        limit = max(2.0, math.floor(min(SLACK * pace * work(cfg, self.rules) + 1, most)))
        return cfg.model_copy(update={"max_runtime_seconds": float(limit)})

    def _pace(self, n: int, speed: Speed) -> float:
        """Seconds a token with N parameters: of the longest run with as many, or else by the law of speed."""
        same = [x for x in self.done.values() if isinstance(x.status, Completed) and
                counted(x.training_config.architecture_config) == n]  # fmt: skip
        if not same:
            return speed.a_token + speed.a_parameter * n
        longest = max(same, key=lambda x: (work(x.training_config, self.rules), x.experiment_id))
        assert isinstance(longest.status, Completed)
        return longest.status.used_runtime_seconds / work(longest.training_config, self.rules)

    def plan(self, kind: str, make: Callable[[], Iterable[TrainingConfig]]) -> list[TrainingConfig]:
        """The configurations of this step: those of the first time, or what `make` gives, written down."""
        plan = self._read()
        if kind not in plan:
            plan[kind] = [x.model_dump(mode="json") for x in make()]
            track.write_text(self._plan, json.dumps(plan, indent=1) + "\n")
        return [TrainingConfig.model_validate(x) for x in plan[kind]]

    def run(self, what: str, configs: Sequence[TrainingConfig]) -> list[Experiment]:
        """Submit what is new, as far as the budget's reservations allow; wait for all; say which failed."""
        ids: list[int] = []
        with progress_bar(what, len(configs), "runs") as update:
            for i, cfg in enumerate(configs):
                number = self._submitted(cfg, ids)
                if number is None:
                    say(f"{what}: the budget is spent, {i} of {len(configs)} runs were submitted")
                    break
                ids.append(number)
            found = self.client.wait(ids, lambda rows: update(sum(map(ended, rows))))
        runs = [Experiment.model_validate(x) for x in found]
        self.done |= {x.experiment_id: x for x in runs}
        for x in runs:
            if not isinstance(x.status, Completed):
                say(f"experiment {x.experiment_id} failed: {json.dumps(x.status.model_dump(mode='json'))[:300]}")
        return runs

    def _submitted(self, cfg: TrainingConfig, before: Sequence[int]) -> int | None:
        """Its number. While the budget is short, runs before it are awaited: they reserve more than they use.

        None if it stays short.
        """
        while True:
            try:
                return self.client.submit(cfg.model_dump(mode="json"), known=True)["experiment_id"]
            except InsufficientBudget:
                if all(ended(self.client.experiment(x)) for x in before):
                    return None
                time.sleep(0.5)


def ended(row: dict[str, Any]) -> bool:
    """Of an experiment, or a final run, as the client gives it."""
    return row["status"]["status_type"] in ("completed", "failed")


def last(run: Experiment) -> float | None:
    """Its last validation loss, if it was completed."""
    return run.status.val_losses[-1] if isinstance(run.status, Completed) else None


def device_speed(server: Server, among: Sequence[Shape], rate: float) -> Speed:
    """From a short run of the smallest and of the largest model, at a learning rate that is low for both.

    Half as many updates as runs have at the least: with fewer, evaluations would be most of the time.
    """
    batch, evals, least, _ = server.sizes
    tokens = server.rules.seq_len * batch * evals * max(4, -(-least // (2 * evals)))
    limit = max(2.0, server.total / 5)  # reserved, not used
    shapes = (among[0], among[-1])
    found = server.run("speed", server.plan("speed", lambda: [server.config(x, tokens, rate, limit) for x in shapes]))
    if len(found) < len(shapes) or any(last(x) is None for x in found):
        raise ValueError(
            f"a model of --widths could not be trained on {tokens:,} tokens in {limit:.0f} s: give smaller --widths"
        )
    return decide.speed_of(found, server.rules)


def learning_rates(
    server: Server, among: Sequence[Shape], rates: Sequence[float], speed: Speed
) -> tuple[RateLaw, list[Experiment]]:
    """The law of the best learning rate, from three sweeps, and the best run of each.

    Sweeps are of the smallest model, of a middle one, and of the smallest for longer: the best rate depends on both N
    and D.
    """
    rates = sorted(rates)
    unit = RATES_SHARE * server.total / ((len(rates) + 1) * (2 + LONGER))
    sweeps = ((among[0], unit), (among[len(among) // 2], unit), (among[0], LONGER * unit))
    sizes, tokens, best, tuned = [], [], [], []
    for shape, seconds in sweeps:
        kind = f"learning rates, width {shape.width}, {'short' if seconds == unit else 'long'}"
        plan = server.plan(kind, partial(_sweep, server, shape, seconds, rates, speed))
        found = _widened(server, kind, server.run(kind, plan))
        cfg = plan[0]
        sizes.append(float(counted(cfg.architecture_config)))
        tokens.append(float(cfg.total_train_tokens))
        best.append(decide.best_rate(*zip(*_tried(found), strict=True)))
        tuned.append(min((x for x in found if last(x) is not None), key=lambda x: last(x) or 0.0))
    law = decide.rate_law(sizes, tokens, best)
    found_rates = ", ".join(f"{x:.3g}" for x in best)
    say(f"best learning rates {found_rates}: {law.coefficient:.3g} N^{-law.parameters:.2f} D^{law.tokens:.2f}")
    return law, tuned


def _sweep(
    server: Server, shape: Shape, seconds: float, rates: Sequence[float], speed: Speed
) -> list[TrainingConfig]:
    return [server.planned(shape, seconds, rate, speed) for rate in rates]


def _tried(found: Iterable[Experiment]) -> list[tuple[float, float]]:
    """(rate, loss) of the runs that were completed."""
    rows = [(x.training_config.optimizer_config.lr_scheduler.peak_value, last(x)) for x in found]
    return sorted((rate, value) for rate, value in rows if value is not None)


def _widened(server: Server, kind: str, found: list[Experiment]) -> list[Experiment]:
    """The runs, and more while the best rate is the least or the greatest: each time one twice as far out."""
    for i in range(MOST_WIDER):
        tried = _tried(found)
        if len(tried) < 2:
            raise ValueError(f"{kind}: {len(tried)} runs were completed: give other --rates")
        at = min(range(len(tried)), key=lambda i: tried[i][1])
        if 0 < at < len(tried) - 1:
            break
        rate = tried[at][0] * (2.0 if at else 0.5)
        cfg = found[0].training_config
        scheduler = cfg.optimizer_config.lr_scheduler.model_copy(update={"peak_value": rate})
        optimizer = cfg.optimizer_config.model_copy(update={"lr_scheduler": scheduler})
        wider = cfg.model_copy(update={"optimizer_config": optimizer})
        more = server.run(kind, server.plan(f"{kind}, wider {i + 1}", partial(list, [wider])))
        if not more:  # the budget is spent
            break
        found = [*found, *more]
    return found
