"""The HTTP side: the routes of CS336's third assignment, and rules, final runs and two pages beside them.

    app = create_app(store, rules, "surrogate", reveal=surrogate.backend(cfg).reveal)

It trains nothing: it writes into the store what workers take from there.
"""

import asyncio
import json
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from fastapi.security import APIKeyHeader

from experiments.scaling.service import ledger, pages
from experiments.scaling.service.access import Access, Denied, Throttle, TooMany
from experiments.scaling.service.guard import LOOPBACK, MAX_BODY, Guard
from experiments.scaling.service.keys import Key
from experiments.scaling.service.room import reason
from experiments.scaling.service.schemas import (
    BudgetSummary,
    Experiment,
    FinalSubmission,
    FinalSubmissionRequest,
    Rules,
    ServedRules,
    SubmitResponse,
    TrainingConfig,
    problem,
)
from experiments.scaling.service.store import Commits, Store

__all__ = ["FINAL", "Reveal", "create_app"]

T = TypeVar("T")
Reveal = Callable[[TrainingConfig, Rules, int, float], dict[str, object]]

FINAL = 4.0  # a final run may take so many budgets: the course asks to predict for 4 x what may be spent
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
}


def create_app(
    store: Store,
    rules: Rules,
    backend_name: str,
    *,
    reveal: Reveal | None = None,
    final: float = FINAL,
    hosts: Collection[str] | None = LOOPBACK,
    max_body: int = MAX_BODY,
    throttle: Throttle | None = None,
) -> Guard:
    """The ASGI app over a store. It must be closed by its lifespan, as servers do.

    Args:
        reveal: Backend.reveal, told with a final run.
        final: budgets of a key that its final run may take.
        hosts: names in the Host header that are answered for; None: all.
    """
    commits = Commits(store)
    access = Access(store, throttle or Throttle())

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(commits.close)
        store.close()

    app = FastAPI(title="Scaling laws: a training service", docs_url=None, redoc_url=None, lifespan=lifespan)
    header = APIKeyHeader(name="X-API-Key", auto_error=False)

    async def key_of(request: Request, given: Annotated[str | None, Security(header)]) -> Key:
        return await access.key(given, request.client.host if request.client else "")

    WithKey = Annotated[Key, Depends(key_of)]

    def change(f: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        return asyncio.wrap_future(commits.submit(f))

    def read(f: Callable[[sqlite3.Connection], T]) -> T:
        with store.read() as db:
            return f(db)

    def check(cfg: TrainingConfig, *where: str) -> None:
        if text := problem(cfg, rules):
            error = {"type": "value_error", "loc": ("body", *where), "msg": f"Value error, {text}", "input": None}
            raise RequestValidationError([error])

    @app.post("/submit")
    async def submit(cfg: TrainingConfig, key: WithKey) -> SubmitResponse:
        """Queue an experiment. 400: insufficient budget; 409: it was submitted before; 422: no such run can be."""
        check(cfg)
        return await change(lambda db: ledger.submit(db, key, cfg, time.time()))

    @app.get("/budget")
    async def budget(key: WithKey) -> BudgetSummary:
        """Device-seconds used, with those reserved for what is queued or running, and remaining."""
        return read(lambda db: ledger.budget(db, key))

    @app.get("/experiments")
    def experiments(key: WithKey) -> list[Experiment]:
        """All of your experiments, oldest first."""
        return read(lambda db: ledger.experiments(db, key))

    @app.get("/experiment/{experiment_id}")
    async def experiment(experiment_id: int, key: WithKey) -> Experiment:
        """One of your experiments. 404: it is none of yours."""
        return read(lambda db: ledger.experiment(db, key, experiment_id))

    @app.post("/final_submission")
    async def submit_final(request: FinalSubmissionRequest, key: WithKey) -> FinalSubmission:
        """What you would train with the final budget, and the loss you predict; a later one replaces it."""
        cfg, predicted = request.training_config, request.predicted_final_loss
        check(cfg, "training_config")
        return await change(lambda db: ledger.set_final_submission(db, key, cfg, predicted, time.time()))

    @app.get("/final_submission")
    async def final_submission(key: WithKey) -> FinalSubmission | None:
        """The last one, or null."""
        return read(lambda db: ledger.final_submission(db, key))

    told: dict[int, dict[str, object]] = {}  # by key: what is locked does not change

    def with_hidden(found: dict[str, Any] | None, key: Key) -> dict[str, Any] | None:
        """What a surrogate hid: told once the final submission is locked, which a final run says it is."""
        if found is None or reveal is None:
            return found
        if key.id not in told:
            seconds = found["max_runtime_seconds"]
            cfg = TrainingConfig.model_validate(found["training_config"])
            told[key.id] = reveal(cfg.model_copy(update={"max_runtime_seconds": seconds}), rules, key.seed, seconds)
        return {**found, "revealed": told[key.id]}

    @app.post("/final_run")
    async def start_final_run(key: WithKey) -> dict[str, Any] | None:
        """Lock the final submission and train it, outside of the budget. 404: there is none; 409: asked for already."""
        seconds = max(1.0, final * key.budget)

        def start(db: sqlite3.Connection) -> dict[str, Any] | None:
            ledger.start_final_run(db, key, seconds, time.time())
            return ledger.final_run(db, key)

        found = await change(start)
        return await asyncio.to_thread(with_hidden, found, key)

    @app.get("/final_run")
    def final_run(key: WithKey) -> dict[str, Any] | None:
        """Its status, the loss predicted, the loss measured; null if it was not asked for."""
        return with_hidden(read(lambda db: ledger.final_run(db, key)), key)

    @app.get("/rules")
    async def get_rules() -> ServedRules:
        """What this server fixes for all runs, and the budgets that a final run may take."""
        return ServedRules(**rules.model_dump(), final_budgets=final)

    page = pages.dashboard()

    @app.get("/dashboard", response_class=HTMLResponse)
    async def dashboard() -> Response:
        """A page to look at budget, experiments and losses."""
        return HTMLResponse(page, headers={"Content-Security-Policy": pages.policy(page)})

    @app.get("/docs", response_class=HTMLResponse, include_in_schema=False)
    async def docs() -> Response:
        text = pages.describe(app.openapi(), backend_name)
        return HTMLResponse(text, headers={"Content-Security-Policy": pages.policy(text)})

    @app.get("/", include_in_schema=False)
    async def root() -> Response:
        return RedirectResponse("/dashboard")

    _errors(app, store.path.parent)
    return Guard(app, {"X-Backend": backend_name, **HEADERS}, hosts, max_body)


def _errors(app: FastAPI, folder: Path) -> None:
    """Which status each exception has; the folder is the store's."""

    def on(kind: type[Exception]) -> Callable:
        return app.exception_handler(kind)

    def detail(status: int, value: Any, headers: dict[str, str] | None = None) -> Response:
        return JSONResponse({"detail": value}, status, headers)

    @on(Denied)
    async def denied(request: Request, error: Denied) -> Response:
        return detail(401, "invalid API key")

    @on(TooMany)
    async def too_many(request: Request, error: TooMany) -> Response:
        return detail(429, str(error), {"Retry-After": str(int(error.seconds) + 1)})

    @on(ledger.InsufficientBudget)
    async def insufficient(request: Request, error: ledger.InsufficientBudget) -> Response:
        body = {"message": str(error), "budget_summary": error.summary.model_dump(mode="json")}
        return detail(400, body, None if error.known is None else {"X-Experiment-Id": str(error.known)})

    @on(ledger.Duplicate)
    async def duplicate(request: Request, error: ledger.Duplicate) -> Response:
        # The body is the course's; the header is for a client whose connection broke before it had the number.
        return detail(409, str(error), {"X-Experiment-Id": str(error.id)})

    @on(ledger.Locked)
    async def locked(request: Request, error: ledger.Locked) -> Response:
        return detail(409, str(error))

    @on(ledger.Missing)
    async def missing(request: Request, error: ledger.Missing) -> Response:
        return detail(404, str(error))

    @on(sqlite3.OperationalError)
    async def database(request: Request, error: sqlite3.OperationalError) -> Response:
        text = reason(error, folder)
        full = text != str(error)
        text = text if full else f"the database cannot be used now ({text})"
        return detail(507 if full else 503, f"{text}; nothing was changed", {"Retry-After": "5"})

    @on(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return detail(422, [_told(x) for x in error.errors()])


def _told(error: Any) -> dict[str, Any]:
    """One error of validation as JSON: what was given may be nan, which JSON has not, nested without end, or half of a
    pair of UTF-16, which UTF-8 has not and which a field's name may be, too."""
    loc = [x.encode(errors="backslashreplace").decode() if isinstance(x, str) else x for x in error["loc"]]
    told = {"type": error["type"], "loc": loc, "msg": error["msg"].encode(errors="backslashreplace").decode()}
    try:
        json.dumps(error.get("input"), allow_nan=False, ensure_ascii=False).encode()
        told["input"] = error.get("input")
    except (ValueError, TypeError, RecursionError):
        told["input"] = None
    return told
