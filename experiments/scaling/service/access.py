"""Who may come in: keys by their hash, and patience with wrong ones, since 8 digits can be guessed."""

import asyncio
import hashlib
import ipaddress
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable

from experiments.scaling.service.keys import LONGEST, Key, find_key, hashed, key_of
from experiments.scaling.service.store import Store

__all__ = ["Access", "Denied", "Throttle", "TooMany"]

BURST = 10  # wrong keys from one address at once
REFILL = 10.0  # seconds until it has one more: 8,640 a day, a ten-thousandth of the keys
MOST_ADDRESSES = 4096


class Denied(Exception):
    """A missing or a wrong key."""


class TooMany(Exception):
    """Too many wrong keys from this address."""

    def __init__(self, seconds: float):
        super().__init__("too many invalid API keys")
        self.seconds = seconds  # until the next try


class Throttle:
    """A bucket of tries for each address, filled again by one every `refill` seconds."""

    def __init__(self, burst: int = BURST, refill: float = REFILL, now: Callable[[], float] = time.monotonic):
        self._burst, self._refill, self._now = burst, refill, now
        self._empty_at: OrderedDict[str, float] = OrderedDict()  # address -> when its bucket would be full again

    def wait(self, address: str) -> float:
        """Seconds until this address may try; 0: now."""
        left = self._empty_at.get(address, 0.0) - self._now()
        return max(0.0, left - (self._burst - 1) * self._refill)

    def failed(self, address: str) -> None:
        """A try was in vain."""
        full_at = max(self._empty_at.pop(address, 0.0), self._now()) + self._refill
        self._empty_at[address] = full_at
        while len(self._empty_at) > MOST_ADDRESSES:
            self._empty_at.popitem(last=False)


class Access:
    """The keys of a store. Right keys are remembered by a fast hash under a secret of this process."""

    def __init__(self, store: Store, throttle: Throttle):
        self._store, self._throttle = store, throttle
        self._salt = store.meta()["salt"]
        self._secret = secrets.token_bytes(32)
        self._known: dict[bytes, int] = {}
        self._one = asyncio.Lock()  # one slow hash at a time

    async def key(self, given: str | None, address: str) -> Key:
        """The key whose text this is. Denied, or TooMany without a look at it."""
        if not given or len(given) > LONGEST or not given.isascii():
            raise Denied
        fast = hashlib.blake2b(given.encode(), key=self._secret).digest()
        if fast not in self._known:
            async with self._one:
                if fast not in self._known:  # no one else found it meanwhile
                    await self._find(given, fast, network(address))
        with self._store.read() as db:
            key = key_of(db, self._known[fast])
        if key is None:  # removed
            del self._known[fast]
            raise Denied
        return key

    async def _find(self, given: str, fast: bytes, address: str) -> None:
        if wait := self._throttle.wait(address):
            raise TooMany(wait)
        slow = await asyncio.to_thread(hashed, given, self._salt)
        with self._store.read() as db:
            key = find_key(db, slow)
        if key is None:
            self._throttle.failed(address)
            raise Denied
        self._known[fast] = key.id


def network(address: str) -> str:
    """An IPv4 address, or the /64 of an IPv6 address, which is one household's.

    >>> network("2001:db8::1:2:3:4"), network("127.0.0.1"), network("testclient")
    ('2001:db8::', '127.0.0.1', 'testclient')
    """
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        return address
    if ip.version == 4:
        return address
    return str(ipaddress.ip_network((int(ip), 64), strict=False).network_address)
