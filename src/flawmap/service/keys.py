"""Who may do what: keys with roles, kept as hashes, and whoever tries too many wrong ones waits."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from flawmap.errors import FlawmapError
from flawmap.files import open_regular, replacing

Role = Literal["inspect", "operate", "administer"]
ROLES: tuple[Role, ...] = ("inspect", "operate", "administer")
"""Each may do what those before it may."""

_TRIES, _WINDOW = 10, 60.0  # wrong keys from one address, in seconds
_ADDRESSES = 10_000


@dataclass(frozen=True)
class Caller:
    """Whoever asks.

    Attributes:
        name: of the key; empty without keys.
        role: the highest that it has.
    """

    name: str
    role: Role

    def may(self, role: Role) -> bool:
        """Whether it has a role, or a higher one."""
        return ROLES.index(self.role) >= ROLES.index(role)


ANYONE = Caller("", "administer")
"""Whoever asks a service without keys, which listens to this machine alone."""


@dataclass(frozen=True)
class Keys:
    """The keys of a file, of which it holds the hashes: a line each, `NAME ROLE SHA-256`.

    A key is 256 random bits, so that its plain SHA-256 tells nothing of it.
    """

    by_hash: Mapping[str, Caller]

    @classmethod
    def read(cls, path: Path) -> Keys:
        """Raises FlawmapError where it cannot be read, a line is not of that form, or there is none."""
        with open_regular(path) as file:
            lines = file.read(1 << 20).decode("utf-8", "replace").splitlines()
        found: dict[str, Caller] = {}
        for number, line in enumerate(lines, start=1):
            if not line.strip() or line.lstrip().startswith("#"):
                continue
            parts = line.split()
            role = next((role for role in ROLES if len(parts) == 3 and parts[1] == role), None)
            if role is None or len(parts[2]) != 64 or set(parts[2]) - set("0123456789abcdef"):
                raise FlawmapError(f"{path}, line {number}: is not NAME ROLE HASH: make it with `flawmap key`")
            if any(caller.name == parts[0] for caller in found.values()):
                raise FlawmapError(f"{path}, line {number}: there are two keys named {parts[0]}: rename one")
            found[parts[2]] = Caller(parts[0], role)
        if not found:
            raise FlawmapError(f"{path} holds no keys: make one with `flawmap key`")
        return cls(found)

    def caller(self, key: str) -> Caller | None:
        """Whose key it is."""
        own = _hash(key)
        found = None
        for known, caller in self.by_hash.items():  # all of them, so that the time tells nothing
            if hmac.compare_digest(known, own):
                found = caller
        return found


def add_key(path: Path, name: str, role: Role) -> str:
    """Makes a key, adds its hash to a file, and gives it, which is kept nowhere.

    Raises:
        FlawmapError: the file cannot be read or written, or has a key of this name.
    """
    if not name or len(name) > 100 or any(letter.isspace() or letter == "#" for letter in name):
        raise FlawmapError(f"{name!r} is no name of a key: give a word")
    lines = ""
    if path.exists():
        known = Keys.read(path)
        if any(caller.name == name for caller in known.by_hash.values()):
            raise FlawmapError(f"{path} has a key named {name}: choose another name, or delete its line")
        lines = path.read_text("utf-8")
        lines += "" if lines.endswith("\n") else "\n"
    key = secrets.token_urlsafe(32)
    with replacing(path) as file:
        file.write(f"{lines}{name} {role} {_hash(key)}\n".encode())
    return key


class FailedKeys:
    """Counts wrong keys by address."""

    def __init__(self) -> None:
        self._failed: dict[str, list[float]] = {}
        self._counting = threading.Lock()

    def wait(self, address: str) -> int:
        """Seconds until an address may try again; 0 where it may now."""
        with self._counting:
            recent = self._recent(address)
            return 0 if len(recent) < _TRIES else max(1, round(recent[0] + _WINDOW - time.monotonic()))

    def failed(self, address: str) -> None:
        """Counts a wrong key."""
        with self._counting:
            if len(self._failed) >= _ADDRESSES:
                self._failed = {one: times for one in list(self._failed) if (times := self._recent(one))}
                while len(self._failed) >= _ADDRESSES:
                    del self._failed[next(iter(self._failed))]
            self._failed.setdefault(address, []).append(time.monotonic())

    def _recent(self, address: str) -> list[float]:
        since = time.monotonic() - _WINDOW
        recent = [at for at in self._failed.get(address, []) if at > since]
        if address in self._failed:
            self._failed[address] = recent
        return recent


def _hash(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
