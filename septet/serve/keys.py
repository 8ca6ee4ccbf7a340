"""API keys: which there are, what each may use, and whose a presented one is.

Read at start (and again on SIGHUP) by `septet serve`; asked by `app.Endpoint` for every route that is not public. Keys
are kept as SHA-256 only, which is enough for keys with 128 bits of chance in them (`septet key new` makes those), and
compared in constant time with every key there is. Knows no route and no model.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import tomllib
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from septet.errors import InvalidRequest
from septet.serve.errors import HttpError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

__all__ = ["ROLES", "USER", "Key", "Keys", "Unauthorized", "digest_of", "new_key"]

MAX_KEYS = 4096
MAX_FILE_BYTES = 4 * 2**20
MAX_KEY_CHARS = 512
USER, ADMIN = ROLES = ("user", "admin")
MIN_PLAIN_CHARS = 16  # of a key given as plain text: fewer can be guessed


class Unauthorized(HttpError):
    kind = "authentication_error"

    def __init__(self, message: str) -> None:
        super().__init__(401, message, code="invalid_api_key")


@dataclass(frozen=True, slots=True, kw_only=True)
class Key:
    """One key and its limits; 0 = no limit."""

    name: str
    digest: bytes  # SHA-256 of the key
    weight: float = 1.0  # its share of a busy engine, beside the other keys'
    requests_per_minute: int = 0
    tokens_per_minute: int = 0  # prompt and output
    max_concurrent: int = 0  # requests under way
    role: str = USER

    @property
    def manages(self) -> bool:
        """May its requests change the server's models, and say which stay loaded?"""
        return self.role == ADMIN


_LIMITS = ("requests_per_minute", "tokens_per_minute", "max_concurrent")


def digest_of(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()


def new_key() -> str:
    return "sk-septet-" + secrets.token_urlsafe(32)


class Keys:
    """All keys of a server. Empty: no key is asked for."""

    def __init__(self, keys: Iterable[Key] = ()) -> None:
        self._keys = tuple(keys)
        if len(self._keys) > MAX_KEYS:
            raise InvalidRequest(f"{len(self._keys)} API keys: at most {MAX_KEYS} are kept", param="api_key_file")
        for what, values in (("name", [k.name for k in self._keys]), ("hash", [k.digest for k in self._keys])):
            if len(set(values)) != len(values):
                raise InvalidRequest(f"two API keys have the same {what}", param="api_key_file")

    @classmethod
    def load(cls, path: Path | None = None, plain: Sequence[str] = ()) -> Keys:
        """Keys of a file (TOML, see docs/operations.md) and some given as plain text. Raises InvalidRequest."""
        keys = _read(path) if path is not None else []
        for number, text in enumerate(plain, 1):
            if not MIN_PLAIN_CHARS <= len(text) <= MAX_KEY_CHARS or not text.isascii() or not text.isprintable():
                raise InvalidRequest(
                    f"an API key must have {MIN_PLAIN_CHARS} to {MAX_KEY_CHARS} printable ASCII characters; "
                    "`septet key new NAME` makes one",
                    param="api_key",
                )
            keys.append(Key(name=f"key-{number}", digest=digest_of(text)))
        return cls(keys)

    def __len__(self) -> int:
        return len(self._keys)

    def check(self, headers: Iterable[tuple[bytes, bytes]]) -> Key | None:
        """Whose request it is; None where no keys are asked for. Raises Unauthorized."""
        if not self._keys:
            return None
        presented = {value for name, value in _presented(headers)}
        if not presented:
            raise Unauthorized("this server asks for an API key: send 'Authorization: Bearer KEY' or 'x-api-key: KEY'")
        if len(presented) > 1:
            raise Unauthorized("Authorization and x-api-key hold two different API keys; send one of them")
        found = self._find(presented.pop())
        if found is None:
            raise Unauthorized("this API key is not known here")
        return found

    def named(self, name: str) -> Key | None:
        return next((key for key in self._keys if key.name == name), None)

    def _find(self, presented: bytes) -> Key | None:
        """Looks at every key whatever it finds, so that the time tells nothing."""
        digest = hashlib.sha256(presented[: MAX_KEY_CHARS + 1]).digest()
        found: Key | None = None
        for key in self._keys:
            if hmac.compare_digest(key.digest, digest):
                found = key
        return found


def _presented(headers: Iterable[tuple[bytes, bytes]]) -> Iterable[tuple[bytes, bytes]]:
    for name, value in headers:
        lower = name.lower()
        if lower == b"x-api-key":
            yield lower, value.strip()
        elif lower == b"authorization":
            scheme, _, rest = value.strip().partition(b" ")
            if scheme.lower() != b"bearer":
                raise Unauthorized("the Authorization header must be 'Bearer KEY'")
            yield lower, rest.strip()


# -- the file ---------------------------------------------------------------------------------------------------------
def _read(path: Path) -> list[Key]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) > MAX_FILE_BYTES:
            raise InvalidRequest(f"{path} is larger than {MAX_FILE_BYTES} bytes", param="api_key_file")
        rows = tomllib.loads(data.decode())
    except OSError as error:
        raise InvalidRequest(f"can't read the API keys in {path}: {error.strerror}", param="api_key_file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidRequest(f"{path} is no valid TOML: {str(error)[:200]}", param="api_key_file") from None
    tables = rows.get("key")
    if not isinstance(tables, list) or set(rows) != {"key"} or not all(isinstance(t, dict) for t in tables):
        raise InvalidRequest(f"{path} must hold [[key]] tables and nothing else", param="api_key_file")
    return [_key(path, number, table) for number, table in enumerate(tables, 1)]


def _key(path: Path, number: int, table: dict[str, Any]) -> Key:
    def wrong(words: str) -> InvalidRequest:
        return InvalidRequest(f"{path}: key {number} {words}", param="api_key_file")

    unknown = sorted(set(table) - ({f.name for f in fields(Key)} - {"digest"}) - {"sha256"})
    if unknown:
        raise wrong(f"has an unknown field {unknown[0]!r}")
    name, hexed = table.get("name"), table.get("sha256")
    if not isinstance(name, str) or not 0 < len(name) <= 64 or not name.isprintable():
        raise wrong("needs a name of 1 to 64 characters")
    if not isinstance(hexed, str) or len(hexed) != 64 or set(hexed.lower()) - set("0123456789abcdef"):
        raise wrong(f"({name}) needs sha256, 64 hexadecimal digits: `septet key new {name}` makes both")
    limits = {field: table.get(field, 0) for field in _LIMITS}
    for field, value in limits.items():
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 2**31:
            raise wrong(f"({name}): {field} must be a whole number, 0 for no limit")
    weight = table.get("weight", 1.0)
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not 0.01 <= weight <= 100:
        raise wrong(f"({name}): weight must be between 0.01 and 100")
    role = table.get("role", USER)
    if role not in ROLES:
        raise wrong(f"({name}): role must be {' or '.join(ROLES)}")
    return Key(name=name, digest=bytes.fromhex(hexed), weight=float(weight), role=role, **limits)
