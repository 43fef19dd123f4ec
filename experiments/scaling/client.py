"""A client of the training service, on the standard library alone.

    client = Client("http://127.0.0.1:8000", "12345678")
    id_ = client.submit(config)["experiment_id"]              # config: a dict, as in README.md
    (done,) = client.wait([id_])
    done["status"]["val_losses"][-1]

All answers are the JSON of the service, as dicts. What goes wrong is an exception of this file.
"""

import http.client
import ipaddress
import json
import math
import numbers
import operator
import os
import re
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
    "given_key",
]

URL = "http://127.0.0.1:8000"
TRIES = 5  # of a request whose connection broke, or that found the service busy
LONGEST = 300.0  # seconds that a server may ask to wait
LARGEST = 2**28  # bytes of an answer: some 200,000 experiments


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
        host = _host(url)
        if tries < 1 or not timeout > 0:
            raise ValueError(f"tries must be at least 1 and timeout above 0, got {tries} and {timeout}")
        if bad := re.search(r"[^!-~]", key):  # the key itself is not told
            raise ValueError(f"key: has {bad[0]!r} at place {bad.start() + 1}, which no key has")
        self.url, self._key, self._tries, self._timeout = url.rstrip("/"), key, tries, timeout
        # A proxy of the environment is not asked about this machine.
        local = _is_local(host)
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
        """What the server fixes: seq_len, n_val_tokens, min_vocab_size, ..., final_budgets."""
        return self._ask("GET", "/rules")

    def experiments(self) -> list[dict[str, Any]]:
        """All of them, oldest first."""
        return self._ask("GET", "/experiments")

    def experiment(self, id_: int) -> dict[str, Any]:
        """{experiment_id, training_config, status}."""
        return self._ask("GET", f"/experiment/{operator.index(id_)}")

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
        data = None if body is None else json.dumps(_plain(body)).encode()
        headers = {"X-API-Key": self._key, "Content-Type": "application/json"}
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        for left in reversed(range(self._tries)):
            try:
                with self._opener.open(request, timeout=self._timeout) as answer:
                    self.backend = answer.headers.get("X-Backend")
                    text = answer.read(LARGEST + 1)
                if len(text) > LARGEST:
                    raise Failure(f"{self.url}{path}: an answer of more than {LARGEST:,} bytes")
                return json.loads(text)
            except urllib.error.HTTPError as error:
                with error:
                    failure = _failure(error)
                if not (left and isinstance(failure, Unavailable)):
                    raise failure from None
                time.sleep(_pause(error.headers.get("Retry-After")))
            # An answer that breaks off is an HTTPException or no JSON. A submission that was accepted nevertheless is a
            # duplicate the next time, which submit(known=True) knows.
            except (OSError, http.client.HTTPException, ValueError) as error:
                if not left:
                    what = f"{getattr(error, 'reason', error)}"
                    if isinstance(error, ValueError):
                        what = f"the answer broke off or is no JSON ({what}): is the training service there?"
                    raise Unavailable(f"{self.url}: {what}") from None
                time.sleep(0.2 * 2 ** (self._tries - left))
        raise AssertionError


def given_key(key: str) -> str:
    """The key, or that of the environment's PURELM_API_KEY; ValueError without either."""
    if not (found := key or os.environ.get("PURELM_API_KEY", "")):
        raise ValueError("key: give --key, or set PURELM_API_KEY")
    return found


class _Stay(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: the key would go along."""

    def redirect_request(self, *args: Any) -> None:
        return None


def _failure(error: urllib.error.HTTPError) -> Failure:
    """The exception for an answer of status 300 and above."""
    try:
        detail = json.loads(error.read(LARGEST))["detail"]
    except (ValueError, KeyError, TypeError, OSError, http.client.HTTPException):
        detail = error.reason
    code, text = error.code, str(detail)
    given = error.headers.get("X-Experiment-Id") or ""
    id_ = int(given) if given.isdecimal() else None
    if code == 400 and isinstance(detail, dict) and "budget_summary" in detail:
        return InsufficientBudget(f"insufficient budget: {detail['budget_summary']}", detail["budget_summary"], id_)
    if code == 409 and "already exists" in text:
        return Duplicate(text, id_)
    if code == 422 and isinstance(detail, list) and all(isinstance(x, dict) for x in detail):
        lines = [f"{'.'.join(map(str, x.get('loc', ())[1:]))}: {x.get('msg')}".removeprefix(": ") for x in detail]
        return Invalid("; ".join(lines), detail)
    kinds = {401: InvalidKey, 429: InvalidKey, 404: NotFound, 409: Conflict, 503: Unavailable, 507: Unavailable}
    return kinds[code](text, code) if code in kinds else Failure(f"{code}: {text}", code)


def _pause(retry_after: str | None) -> float:
    """Seconds to wait before the next try; 1 where the server names none, or a date.

    >>> _pause("5"), _pause(None), _pause("Wed, 21 Oct 2026 07:28:00 GMT"), _pause("1e9"), _pause("nan")
    (5.0, 1.0, 1.0, 300.0, 1.0)
    """
    try:
        seconds = float(retry_after or 1.0)
    except ValueError:
        return 1.0
    return min(seconds, LONGEST) if seconds >= 0 else 1.0


def _host(url: str) -> str:
    """The host of a service's address; ValueError where it is none."""
    if not url.startswith(("http://", "https://")):
        raise ValueError(f"url must begin with http:// or https://, got {url!r}")
    try:
        parts = urllib.parse.urlsplit(url)
        host, _ = parts.hostname, parts.port  # looking at the port checks it
    except ValueError as error:
        raise ValueError(f"url {url!r}: {error}") from None
    if not host or parts.query or parts.fragment or "@" in parts.netloc or re.search(r"[^!-~]", url):
        raise ValueError(f"url must be http://HOST:PORT, got {url!r}")
    return host


def _is_local(host: str) -> bool:
    """
    >>> _is_local("localhost"), _is_local("127.0.0.2"), _is_local("::1"), _is_local("example.org")
    (True, True, True, False)
    """
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _plain(value: Any, place: str = "") -> Any:
    """What JSON has, of numpy's numbers too; ValueError that names what it has not, such as nan."""
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, Mapping):
        if bad := [k for k in value if not isinstance(k, str)]:
            raise ValueError(f"{place or 'the request'}: names must be strings, got {bad[0]!r}")
        return {k: _plain(x, f"{place}.{k}".lstrip(".")) for k, x in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(x, f"{place}.{i}".lstrip(".")) for i, x in enumerate(value)]
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):  # of numpy or torch
        return _plain(value.item(), place)
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        if not math.isfinite(value):
            raise ValueError(f"{place}: must be a finite number, got {value}")
        return float(value)
    raise ValueError(f"{place or 'the request'}: JSON has no {type(value).__name__}: {value!r}")
