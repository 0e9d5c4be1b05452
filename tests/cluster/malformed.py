"""Requests as nobody should make them, from a seed: bytes for a socket."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from typing import Any

ROUTES = {
    "/recommend": {"user": "u1", "k": 3},
    "/similar": {"item": "i1", "k": 3},
    "/score": {"user": "u1", "items": ["i1", "i2"]},
    "/rate": {"history": ["i3"], "items": ["i1"]},
    "/embed": {"items": ["i1"]},
}
FIELDS = ("user", "history", "k", "exclude_seen", "filter", "diversity", "explain", "item", "items")
FIELDS += ("task", "users", "histories", "zzz", "\ud800", "__proto__", "")
PATHS = ("/", "/health", "/metrics", "/openapi.json", "/docs", "/items", "/users", "/history")
PATHS += ("/items?query=%ff%00", "/items?query=a&query=b", "/users?query=" + "x" * 3000)
PATHS += ("/history", "/history?user=", "/history?user=%ed%a0%80", "/history?zzz=1", "/%ff/../..")
PATHS += ("//", "/-/routes", "/recommend/", "/RECOMMEND", "/a%0d%0ab", "/" + "a" * 5000, "*")
METHODS = ("GET", "PUT", "DELETE", "PATCH", "HEAD", "OPTIONS", "TRACE", "POST", "BREW")
TYPES = (
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data",
    "",
    "json",
    "\xff",
)


def malformed(seed: int) -> bytes:
    """One request of its own for each seed, that asks to close the connection."""
    draw = random.Random(seed)
    kind: Callable[[random.Random], bytes] = draw.choice(
        (_wrong_value, _wrong_value, _wrong_value, _broken_json, _wrong_type, _wrong_path)
    )
    return kind(draw)


def _value(draw: random.Random, depth: int = 0) -> Any:
    plain: tuple[Any, ...] = (None, True, False, 0, -1, 1, 2**31, 2**63, -(2**64), 10**400, 0.5)
    plain += (float("nan"), float("inf"), -1e308, "", "u1", "i1", "i999", "0", "\x00", "a" * 5000)
    plain += (
        "\ud800",
        "\u202e\n\r",
        "🙂",
        "ctr",
        "rating",
        [],
        {},
        [[]],
        {"where": {"zzz": ["a"]}},
    )
    plain += ({"where": {"colour": "red"}}, {"only": ["i999"]}, {"only": []}, ["i1"] * 1500)
    plain += ({"where": {"colour": [None]}}, {"without": None}, ["i1", None], ["i1", "i1"])
    if depth > 3 or draw.random() < 0.8:
        return draw.choice(plain)
    if draw.random() < 0.5:
        return [_value(draw, depth + 1) for _ in range(draw.randrange(4))]
    return {draw.choice(FIELDS): _value(draw, depth + 1) for _ in range(draw.randrange(4))}


def _wrong_value(draw: random.Random) -> bytes:
    path, right = draw.choice(list(ROUTES.items()))
    body: dict[str, Any] = dict(right)
    for _ in range(draw.randint(1, 3)):
        if body and draw.random() < 0.2:
            del body[draw.choice(list(body))]
        else:
            body[draw.choice((*body, *FIELDS))] = _value(draw)
    given = body if draw.random() < 0.9 else _value(draw)
    return _request("POST", path, json.dumps(given).encode())


def _broken_json(draw: random.Random) -> bytes:
    path, right = draw.choice(list(ROUTES.items()))
    whole = json.dumps(right).encode()
    cut = draw.randrange(len(whole))
    body = draw.choice(
        (
            whole[:cut],
            whole[:cut] + bytes([draw.randrange(256)]) + whole[cut + 1 :],
            whole + whole,
            b"\xff\xfe" + whole,
            b"[" * draw.choice((10, 1000, 100_000)),
            b'{"a":' * draw.choice((10, 1000, 100_000)),
            b'{"k":' + b"9" * 6000 + b"}",
            b'{"k":1e999999}',
            b"",
            b"\x00" * 100,
            draw.randbytes(200),
            b" " * (2 << 20),
        )
    )
    return _request("POST", path, body)


def _wrong_type(draw: random.Random) -> bytes:
    path, right = draw.choice(list(ROUTES.items()))
    return _request("POST", path, json.dumps(right).encode(), draw.choice(TYPES))


def _wrong_path(draw: random.Random) -> bytes:
    path = draw.choice((*PATHS, *ROUTES))
    method = draw.choice(METHODS)
    return _request(method, path, draw.choice((b"", b"{}", b"[1,2")), draw.choice(TYPES))


def _request(method: str, path: str, body: bytes, kind: str = "application/json") -> bytes:
    head = f"{method} {path} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    if kind:
        head += f"Content-Type: {kind}\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode("latin-1") + body
