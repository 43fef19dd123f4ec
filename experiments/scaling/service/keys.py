"""API keys: made once, stored as salted scrypt hashes, and the budget and seed that each has."""

import hashlib
import math
import secrets
import sqlite3
from typing import NamedTuple

__all__ = ["Key", "add_key", "all_keys", "find_key", "hashed", "key_of", "new_key", "remove_key"]

DIGITS = 8  # the course's client takes keys of 8 digits alone
# Some 20 ms and 8 MiB for a try: all keys of 8 digits take a month of a core, with the file at hand.
SCRYPT = {"n": 2**13, "r": 8, "p": 1, "dklen": 32}
LONGEST = 200


class Key(NamedTuple):
    id: int
    name: str
    budget: float  # device-seconds
    seed: int


def new_key(long: bool) -> str:
    """A random key: 8 digits, or 43 letters and digits (256 bits)."""
    return secrets.token_urlsafe(32) if long else f"{secrets.randbelow(10**DIGITS):0{DIGITS}}"


def hashed(key: str, salt: str) -> str:
    """The hash of a key, the same for all keys of one file so that it can be looked up."""
    return hashlib.scrypt(key.encode(), salt=bytes.fromhex(salt), **SCRYPT).hex()


def add_key(db: sqlite3.Connection, name: str, hash_: str, budget: float, seed: int, now: float) -> Key:
    """Store a key by its hash; ValueError for a name in use, a hash in use, or a budget that is none."""
    if not name or len(name) > LONGEST or not name.isprintable():
        raise ValueError(f"the name of a key must be 1 to {LONGEST} printable characters, got {name!r}")
    if not (math.isfinite(budget) and budget > 0):
        raise ValueError(f"the budget of a key must be above 0 seconds, got {budget}")
    if db.execute("SELECT 1 FROM keys WHERE name = ? AND removed_at IS NULL", (name,)).fetchone():
        raise ValueError(f"there is a key for {name!r} already")
    if db.execute("SELECT 1 FROM keys WHERE hash = ?", (hash_,)).fetchone():
        raise ValueError("this key is in use, or was")
    row = db.execute(
        "INSERT INTO keys (name, hash, budget, seed, created_at) VALUES (?, ?, ?, ?, ?) RETURNING id",
        (name, hash_, budget, seed, now),
    ).fetchone()
    return Key(row["id"], name, budget, seed)


def remove_key(db: sqlite3.Connection, name: str, now: float) -> None:
    """The key opens nothing any more, and what it has queued is not begun; its runs stay in the file."""
    done = db.execute("UPDATE keys SET removed_at = ? WHERE name = ? AND removed_at IS NULL", (now, name))
    if not done.rowcount:
        raise ValueError(f"there is no key for {name!r}")


def find_key(db: sqlite3.Connection, hash_: str) -> Key | None:
    """The key with this hash."""
    row = db.execute("SELECT * FROM keys WHERE hash = ? AND removed_at IS NULL", (hash_,)).fetchone()
    return None if row is None else _key(row)


def key_of(db: sqlite3.Connection, id_: int) -> Key | None:
    """The key with this number, unless it was removed."""
    row = db.execute("SELECT * FROM keys WHERE id = ? AND removed_at IS NULL", (id_,)).fetchone()
    return None if row is None else _key(row)


def all_keys(db: sqlite3.Connection) -> list[Key]:
    """Those that were not removed, oldest first."""
    return [_key(row) for row in db.execute("SELECT * FROM keys WHERE removed_at IS NULL ORDER BY id")]


def _key(row: sqlite3.Row) -> Key:
    return Key(row["id"], row["name"], row["budget"], row["seed"])
