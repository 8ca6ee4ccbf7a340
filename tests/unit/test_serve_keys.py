"""API keys: every route asks, in constant time; limits per key; fair order between keys; the file is checked."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
from typing import TYPE_CHECKING, Any

import httpx
import pytest
from click.testing import CliRunner

from septet.engine.messages import Update
from septet.errors import InvalidRequest, Overloaded
from septet.serve import keys as keys_module
from septet.serve.app import DIALECTS, Service, Settings, create_app
from septet.serve.keys import Key, Keys, digest_of, new_key
from septet.serve.limits import FairOrder, KeyLimits
from tests.fakes import FakeClient, session
from tests.unit.test_serve_openai import CHAT, HI, ask

if TYPE_CHECKING:
    from pathlib import Path

ALICE, BOB = new_key(), new_key()
BEARER = {"authorization": f"Bearer {ALICE}"}


def key(name: str, secret: str, **limits: Any) -> Key:
    return Key(name=name, digest=digest_of(secret), **limits)


def service(client: FakeClient | None = None, **limits: Any) -> Service:
    keys = Keys([key("alice", ALICE, **limits), key("bob", BOB)])
    return Service(session(client), Settings(), keys)


ROUTES = sorted({(method, path) for d in DIALECTS for method, path, _ in d.routes})
PUBLIC = {"/", "/static/{name}", "/health", "/live", "/ready", "/progressing", "/ping", "/v1/health"}


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("headers", [{}, {"authorization": "Bearer wrong"}, {"x-api-key": BOB + "x"}])
def test_every_route_asks_for_a_key_but_those_that_hold_nothing(
    method: str, path: str, headers: dict[str, str]
) -> None:
    concrete = path.replace("{name}", "page.css").replace("{", "").replace("}", "").replace(":path", "")
    response = ask(create_app(service()), method, concrete, headers=headers)
    if method == "GET" and path in PUBLIC:
        assert response.status_code == 200
    else:
        assert response.status_code == 401, response.text[:200]
        assert response.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "HEAD", "TRACE"])
@pytest.mark.parametrize(
    "path", ["/nope", "//v1/models", "/v1/models/", "/v1/%6dodels", "/metrics/", "/V1/models", CHAT]
)
def test_no_odd_path_or_verb_passes_without_a_key(method: str, path: str) -> None:
    response = ask(create_app(service()), method, path)
    assert response.status_code == 401, "an unknown route must not tell which routes there are"


@pytest.mark.parametrize(
    "headers", [BEARER, {"x-api-key": ALICE}, {"Authorization": f"bearer {ALICE}"}, BEARER | {"x-api-key": ALICE}]
)
def test_a_key_is_taken_as_bearer_and_as_x_api_key(headers: dict[str, str]) -> None:
    assert ask(create_app(service()), "POST", CHAT, json=HI, headers=headers).status_code == 200


@pytest.mark.parametrize(
    "headers",
    [
        BEARER | {"x-api-key": BOB}, {"authorization": ALICE}, {"authorization": f"Basic {ALICE}"},
        {"authorization": "Bearer"}, {"authorization": "Bearer " + "x" * 10_000}, {"x-api-key": ALICE[:-1]},
    ],
)  # fmt: skip
def test_two_keys_or_half_a_key_are_none(headers: dict[str, str]) -> None:
    response = ask(create_app(service()), "POST", CHAT, json=HI, headers=headers)
    assert response.status_code == 401
    assert ALICE not in response.text


def test_every_key_is_compared_whatever_matches(monkeypatch: pytest.MonkeyPatch) -> None:
    compared, compare = 0, hmac.compare_digest

    def counting(a: bytes, b: bytes) -> bool:
        nonlocal compared
        compared += 1
        return compare(a, b)

    monkeypatch.setattr(keys_module.hmac, "compare_digest", counting)
    keys = Keys([key(str(i), new_key()) for i in range(5)] + [key("alice", ALICE)])
    for presented in (ALICE, new_key()):
        compared = 0
        headers = [(b"x-api-key", presented.encode())]
        if presented == ALICE:
            assert keys.check(headers) is not None
        else:
            with pytest.raises(keys_module.Unauthorized):
                keys.check(headers)
        assert compared == 6


# -- the file ---------------------------------------------------------------------------------------------------------
def test_the_command_makes_a_key_whose_hash_the_server_takes(tmp_path: Path) -> None:
    from septet.cli.keys import key as command

    made = CliRunner().invoke(command, ["new", "carol", "--tokens-per-minute", "500", "--weight", "2"])
    assert made.exit_code == 0
    secret = made.stderr.rsplit(" ", 1)[1].strip()
    assert secret not in made.stdout
    path = tmp_path / "keys.toml"
    path.write_text(made.stdout)
    found = Keys.load(path).check([(b"authorization", b"Bearer " + secret.encode())])
    assert found == Key(name="carol", digest=digest_of(secret), tokens_per_minute=500, weight=2.0)


GOOD = f'[[key]]\nname = "a"\nsha256 = "{"ab" * 32}"\n'


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[[key]", "TOML"), ("", "tables"), ("key = 1", "tables"), ("x = 1\n" + GOOD, "tables"),
        (GOOD + GOOD, "same name"), (GOOD + GOOD.replace('"a"', '"b"'), "same hash"),
        (GOOD.replace("ab" * 32, "ab"), "64 hexadecimal"),
        (GOOD + "weight = 0\n", "weight"), (GOOD + "max_concurrent = -1\n", "max_concurrent"),
        (GOOD + "tokens_per_minute = 1.5\n", "tokens_per_minute"), (GOOD + "colour = 1\n", "'colour'"),
        ('[[key]]\nname = ""\n', "name"), (GOOD + "max_concurrent = true\n", "max_concurrent"),
    ],
)  # fmt: skip
def test_a_wrong_file_is_one_clear_line(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "keys.toml"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=words) as caught:
        Keys.load(path)
    assert "\n" not in str(caught.value)


def test_a_short_plain_key_or_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="16 to 512"):
        Keys.load(None, ["secret"])
    with pytest.raises(InvalidRequest, match="No such file"):
        Keys.load(tmp_path / "none.toml")
    assert len(Keys.load(None, ["a-long-enough-key"])) == 1


def test_beyond_loopback_a_key_is_asked_for_at_start() -> None:
    from septet.cli.main import main

    refused = CliRunner().invoke(main, ["serve", "no-such-model", "--host", "0.0.0.0", "--port", "0"])
    assert refused.exit_code == 1
    assert "--api-key-file" in refused.output
    allowed = CliRunner().invoke(main, ["serve", "no-such-model", "--host", "0.0.0.0", "--port", "0", "--allow-no-key"])
    assert "--api-key-file" not in allowed.output


# -- limits -----------------------------------------------------------------------------------------------------------
def post_many(app: Any, n: int, headers: dict[str, str], body: dict[str, Any] = HI) -> list[httpx.Response]:
    async def go() -> list[httpx.Response]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://localhost") as http:
            return await asyncio.gather(*(http.post(CHAT, json=body, headers=headers) for _ in range(n)))

    return asyncio.run(go())


def test_requests_under_way_are_limited_for_one_key_and_not_for_another() -> None:
    app = create_app(service(max_concurrent=2))
    codes = sorted(r.status_code for r in post_many(app, 5, BEARER))
    assert codes == [200, 200, 429, 429, 429]
    assert [r.status_code for r in post_many(app, 5, {"x-api-key": BOB})] == [200] * 5
    assert [r.status_code for r in post_many(app, 2, BEARER)] == [200] * 2, "places come back"


def test_requests_and_tokens_a_minute_with_the_time_to_come_back() -> None:
    refused = [r for r in post_many(create_app(service(requests_per_minute=3)), 5, BEARER) if r.status_code == 429]
    assert len(refused) == 2
    assert refused[0].json()["error"]["type"] == "rate_limit_error"
    assert 15_000 < int(refused[0].headers["retry-after-ms"]) <= 40_000
    assert 15 < int(refused[0].headers["retry-after"]) <= 40

    app = create_app(service(tokens_per_minute=30))  # a prompt has 19 tokens, an answer 5
    codes = [post_many(app, 1, BEARER)[0].status_code for _ in range(3)]
    assert codes[0] == 200
    assert codes[-1] == 429


def test_buckets_fill_again_and_a_prompt_larger_than_a_minute_may_run_once() -> None:
    now = 0.0
    limits, small = KeyLimits(lambda: now), key("a", ALICE, tokens_per_minute=60)
    limits.check_tokens(small, 1000)
    limits.charge(small, 1000)
    with pytest.raises(Overloaded) as caught:
        limits.check_tokens(small, 1)
    assert caught.value.retry_after_s == pytest.approx(941)
    now = 941.0
    limits.check_tokens(small, 1)


# -- fairness ---------------------------------------------------------------------------------------------------------
def served(order: FairOrder, queues: dict[Key, list[float]], n: int) -> dict[str, float]:
    """Tokens of each key among the first `n` tokens served, lowest place first."""
    got: dict[str, float] = {}
    waiting = [(order.place(k, cost), k, cost) for k, costs in queues.items() for cost in costs]
    total = 0.0
    for place, owner, cost in sorted(waiting, key=lambda one: one[0]):
        if total >= n:
            break
        order.began(place)
        got[owner.name] = got.get(owner.name, 0) + cost
        total += cost
    return got


def test_keys_share_by_tokens_and_weight_however_many_requests_each_sends() -> None:
    greedy, modest = key("greedy", ALICE), key("modest", BOB)
    got = served(FairOrder(), {greedy: [10] * 500, modest: [100] * 20}, 1000)
    assert got["greedy"] == pytest.approx(got["modest"], rel=0.3)
    heavy = key("heavy", ALICE, weight=3.0)
    got = served(FairOrder(), {heavy: [10] * 500, modest: [10] * 500}, 1000)
    assert got["heavy"] == pytest.approx(3 * got["modest"], rel=0.1)


def test_a_new_key_stands_before_the_backlog_of_a_greedy_one_and_idling_saves_nothing_up() -> None:
    order, greedy, late = FairOrder(), key("greedy", ALICE), key("late", BOB)
    places = [order.place(greedy, 100) for _ in range(100)]
    for place in places[:50]:
        order.began(place)
    assert places[49] <= order.place(late, 100) < places[51]
    assert order.place(late, 100) > places[49], "the second one of the late key is not free"


def test_the_engine_hears_of_the_fair_place() -> None:
    client = FakeClient()

    async def until_all_are_there() -> None:  # or one that has ended would give its place back
        while len(client.seen) < 6:
            await asyncio.sleep(0.001)

    client.pause = until_all_are_there
    app = create_app(service(client))
    post_many(app, 6, BEARER)
    post_many(app, 1, {"x-api-key": BOB})
    arrivals = [request.arrival for request in client.seen]
    assert arrivals[:6] == sorted(set(arrivals[:6])), "one key's requests stand in a line"
    assert arrivals[6] <= arrivals[5], "bob's first stands no further back than alice's last"


def test_a_refusal_of_the_engine_is_not_charged_as_output() -> None:
    client = FakeClient()
    client.failure = Update("x", error="broken", error_kind="internal_error")
    held = service(client, tokens_per_minute=10_000)
    post_many(create_app(held), 1, BEARER)
    assert held.admission.open == 0
    assert held.admission.waiting_tokens == 0


def test_digests_are_sha256() -> None:
    assert digest_of("abc") == hashlib.sha256(b"abc").digest()


def test_roles_come_from_the_file_and_a_plain_key_is_no_admin(tmp_path: Path) -> None:
    from septet.cli.keys import key as command

    made = CliRunner().invoke(command, ["new", "root", "--role", "admin"])
    file = tmp_path / "keys.toml"
    file.write_text(made.stdout + CliRunner().invoke(command, ["new", "alice"]).stdout)
    keys = Keys.load(file, ["a-plain-key-of-20-chars"])
    assert [(name, keys.named(name).manages) for name in ("root", "alice", "key-1")] == [  # type: ignore[union-attr]
        ("root", True),
        ("alice", False),
        ("key-1", False),
    ]
    file.write_text(made.stdout.replace('"admin"', '"owner"'))
    with pytest.raises(InvalidRequest, match="role must be user or admin"):
        Keys.load(file)
