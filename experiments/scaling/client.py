"""A client of the training service, on the standard library alone.

    client = Client("http://127.0.0.1:8000", "12345678")
    id_ = client.submit(config)["experiment_id"]              # config: a dict, as in README.md
    (done,) = client.wait([id_])
    done["status"]["val_losses"][-1]

All answers are the JSON of the service, as dicts. What goes wrong is an exception of this file.
"""

import http.client
import json
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

__all__ = [
    "Client",
    "Conflict",
    "Duplicate",
    "Failure",
    "InsufficientBudget",
    "Invalid",
    "InvalidKey",
    "NotFound",
    "Unavailable",
]

URL = "http://127.0.0.1:8000"
TRIES = 5  # of a request whose connection broke, or that found the service busy
LONGEST = 300.0  # seconds that a server may ask to wait


class Failure(Exception):
    """An answer that is none of the expected; `status` is HTTP's, None without an answer."""

    def __init__(self, text: str, status: int | None = None):
        super().__init__(text)
        self.status = status


class InvalidKey(Failure):
    """401; 429 after too many of them."""


class InsufficientBudget(Failure):
    """400; `budget` has used_seconds, remaining_seconds, total_budget_seconds.

    experiment_id: of this configuration if it was submitted before, which the service says second.
    """

    def __init__(self, text: str, budget: dict[str, float], experiment_id: int | None = None):
        super().__init__(text, 400)
        self.budget, self.experiment_id = budget, experiment_id


class NotFound(Failure):
    """404."""


class Conflict(Failure):
    """409."""


class Duplicate(Conflict):
    """This configuration was submitted before, as `experiment_id` (None where the server does not say)."""

    def __init__(self, text: str, experiment_id: int | None):
        super().__init__(text, 409)
        self.experiment_id = experiment_id


class Invalid(Failure):
    """422; the text names the fields, `errors` has them one by one."""

    def __init__(self, text: str, errors: list[dict[str, Any]]):
        super().__init__(text, 422)
        self.errors = errors


class Unavailable(Failure):
    """No connection, or 503 and 507: the same request may do later."""


class Client:
    """Requests of one key. A request that found nobody is tried again for some seconds."""

    def __init__(self, url: str = URL, key: str = "", *, tries: int = TRIES, timeout: float = 30.0):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://, got {url!r}")
        self.url, self._key, self._tries, self._timeout = url.rstrip("/"), key, tries, timeout
        # A proxy of the environment is not asked about this machine.
        local = urllib.parse.urlsplit(self.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._opener = urllib.request.build_opener(_Stay, *([urllib.request.ProxyHandler({})] if local else []))
        self.backend: str | None = None  # of the last answer: "real", or "surrogate" for simulated losses

    def submit(self, config: Mapping[str, Any], *, known: bool = False) -> dict[str, Any]:
        """{experiment_id, budget_summary}.

        known: a configuration that was submitted before gives its experiment_id, however little of the budget is left;
            without it Duplicate is raised, or InsufficientBudget.
        """
        try:
            return self._ask("POST", "/submit", config)
        except (Duplicate, InsufficientBudget) as error:
            if not known or error.experiment_id is None:
                raise
            return {"experiment_id": error.experiment_id, "budget_summary": self.budget()}

    def budget(self) -> dict[str, float]:
        """Device-seconds: used_seconds, remaining_seconds, total_budget_seconds."""
        return self._ask("GET", "/budget")

    def rules(self) -> dict[str, Any]:
        """What the server fixes: seq_len, n_val_tokens, min_vocab_size, ..."""
        return self._ask("GET", "/rules")

    def experiments(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return self._ask("GET", "/experiments")

    def experiment(self, id_: int) -> dict[str, Any]:
        """{experiment_id, training_config, status}."""
        return self._ask("GET", f"/experiment/{int(id_)}")

    def wait(
        self,
        ids: Iterable[int],
        progress: Callable[[Sequence[dict[str, Any]]], None] = lambda found: None,
        *,
        every: float = 1.0,
        timeout: float | None = None,
    ) -> list[dict[str, Any]]:
        """The experiments of `ids`, in their order, once all have completed or failed.

        progress: is given all of them after each look.
        TimeoutError after `timeout` seconds.
        """
        wanted, until = list(ids), None if timeout is None else time.monotonic() + timeout
        while True:
            by_id = {found["experiment_id"]: found for found in (self.experiments() if wanted else ())}
            if missing := [id_ for id_ in wanted if id_ not in by_id]:
                raise NotFound(f"no experiments {missing}", 404)
            found = [by_id[id_] for id_ in wanted]
            progress(found)
            open_ = [x["experiment_id"] for x in found if x["status"]["status_type"] in ("queued", "running")]
            if not open_:
                return found
            if until is not None and time.monotonic() > until:
                raise TimeoutError(f"experiments {open_} had not ended after {timeout:g} s")
            time.sleep(every)

    def submit_final(self, config: Mapping[str, Any], predicted_loss: float) -> dict[str, Any]:
        """Enter the configuration for the final budget and the loss that it will have; replaces the last one."""
        body = {"training_config": config, "predicted_final_loss": predicted_loss}
        return self._ask("POST", "/final_submission", body)

    def final_submission(self) -> dict[str, Any] | None:
        """The last one."""
        return self._ask("GET", "/final_submission")

    def start_final_run(self) -> dict[str, Any]:
        """Lock the final submission and have it trained."""
        return self._ask("POST", "/final_run", {})

    def final_run(self) -> dict[str, Any] | None:
        """status, predicted_final_loss, measured_final_loss, error; of a surrogate, what it hid, as revealed."""
        return self._ask("GET", "/final_run")

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        data = None if body is None else json.dumps(body, allow_nan=False).encode()
        headers = {"X-API-Key": self._key, "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        for left in reversed(range(self._tries)):
            try:
                with self._opener.open(request, timeout=self._timeout) as answer:
                    self.backend = answer.headers.get("X-Backend")
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                with error:
                    failure = _failure(error)
                if not (left and isinstance(failure, Unavailable)):
                    raise failure from None
                time.sleep(min(float(error.headers.get("Retry-After") or 1.0), LONGEST))
            # An answer that breaks off is an HTTPException or no JSON. A submission that was accepted nevertheless is a
            # duplicate the next time, which submit(known=True) knows.
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not left:
                    raise Unavailable(f"{self.url}: {getattr(error, 'reason', error)}") from None
                time.sleep(0.2 * 2 ** (self._tries - left))
        raise AssertionError


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _failure(error: urllib.error.HTTPError) -> Failure:
    """The exception for an answer of status 300 and above."""
    try:
        detail = json.load(error)["detail"]
    except (ValueError, KeyError, TypeError, OSError):
        detail = error.reason
    code, text = error.code, str(detail)
    given = error.headers.get("X-Experiment-Id")
    id_ = None if given is None else int(given)
    if code == 400 and isinstance(detail, dict):
        return InsufficientBudget(f"insufficient budget: {detail['budget_summary']}", detail["budget_summary"], id_)
    if code == 409 and "already exists" in text:
        return Duplicate(text, id_)
    if code == 422 and isinstance(detail, list):
        lines = [f"{'.'.join(map(str, x.get('loc', ())[1:]))}: {x.get('msg')}".removeprefix(": ") for x in detail]
        return Invalid("; ".join(lines), detail)
    kinds = {401: InvalidKey, 429: InvalidKey, 404: NotFound, 409: Conflict, 503: Unavailable, 507: Unavailable}
    return kinds[code](text, code) if code in kinds else Failure(f"{code}: {text}", code)
