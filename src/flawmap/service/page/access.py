"""Who looks at the page, and what they may do there. It is asked at each action, on the server."""

from __future__ import annotations

from nicegui import app as pages
from nicegui import ui

from flawmap.service.keys import ANYONE, Caller, Role
from flawmap.service.service import Service

_KEY = "key"  # in the browser's signed storage: the hash of the key, never the key
_NEEDED = {"inspect": "be signed in", "operate": "have a key that may operate", "administer": "administer"}


def caller(service: Service) -> Caller | None:
    """Whose browser it is; None where a key is asked for and it has none, or has one that is gone."""
    if service.options.keys is None:
        return ANYONE
    found = pages.storage.user.get(_KEY)
    return service.options.keys.by_hash.get(found) if isinstance(found, str) else None


def may(service: Service, role: Role) -> bool:
    """Whether whoever acts now has a role, or a higher one."""
    found = caller(service)
    return found is not None and found.may(role)


def allowed(service: Service, role: Role) -> Caller | None:
    """Whoever acts now, if they may; else says on the page why nothing happens."""
    found = caller(service)
    if found is not None and found.may(role):
        return found
    ui.notify(f"for this you have to {_NEEDED[role]}", type="warning")
    return None


def sign_in(service: Service, key: str) -> bool:
    """Keeps whose browser it is; whether the key is known."""
    keys = service.options.keys
    found = None if keys is None else keys.caller(key)
    if keys is None or found is None:
        return False
    pages.storage.user[_KEY] = next(known for known, one in keys.by_hash.items() if one is found)
    return True


def sign_out() -> None:
    """Forgets it."""
    pages.storage.user.pop(_KEY, None)
