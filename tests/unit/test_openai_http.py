"""Keys, errors, limits, callers that leave, probes and metrics of the door."""

from __future__ import annotations

import asyncio
import json
import socket
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import trustme
from openai_door import MODEL, OpenDoor, PlayingClient, open_door, words

from minitron_client import Chunk, MinitronClientError, errors
from minitron_client.errors import InternalError, InvalidValueError
from minitron_client.openai.api_errors import TABLE, api_error
from minitron_client.openai.api_keys import KEYS_VARIABLE, ApiKeys, read_api_keys
from minitron_client.openai.http_server import LOOPBACK

KEY = "correct-horse-battery-staple"


@pytest.fixture
async def door() -> AsyncIterator[OpenDoor]:
    async with open_door(PlayingClient()) as opened:
        yield opened


# --- keys


async def test_without_the_key() -> None:
    refused = {
        None: None,
        "": None,
        "Bearer": None,
        f"Basic {KEY}": None,
        "Bearer wrong": "invalid_api_key",
        f"Bearer {KEY}x": "invalid_api_key",
    }
    async with open_door(PlayingClient(), keys=ApiKeys([KEY])) as door:
        for authorization, code in refused.items():
            headers = {} if authorization is None else {"authorization": authorization}
            for path in ("models", "models/x", "completions", "chat/completions"):
                method = "GET" if path.startswith("models") else "POST"
                answer = await door.http.request(method, f"{door.url}/v1/{path}", headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                error = answer.json()["error"]
                assert (error["type"], error["code"]) == ("authentication_error", code)
                assert KEY not in answer.text
        large = await door.http.post(f"{door.url}/v1/completions", content=b" " * 4_000_000)
        assert large.status_code == 401  # and not a broken connection
        for path in ("/", "/health", "/metrics"):
            assert (await door.http.get(f"{door.url}{path}")).status_code == 200


async def test_with_the_key() -> None:
    async with open_door(PlayingClient(), keys=ApiKeys(["another-long-key", KEY])) as door:
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key=KEY, max_retries=0) as sdk:
            assert (await sdk.completions.create(model=MODEL, prompt="x")).choices[0].text == "abc"
        async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="no", max_retries=0) as sdk:
            with pytest.raises(openai.AuthenticationError):
                await sdk.models.list()


def test_keys_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"# ours\n{KEY}  # alice\n\nanother-long-key\n")
    keys = read_api_keys(path)
    keys.check(f"bearer {KEY}")
    keys.check("Bearer another-long-key")


def test_keys_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert not read_api_keys(None)
    monkeypatch.setenv(KEYS_VARIABLE, f"{KEY}, another-long-key")
    read_api_keys(None).check("Bearer another-long-key")


@pytest.mark.parametrize("text", ["", "# none\n", "short\n", f"{KEY}é\n", f"{KEY} {KEY}\n"])
def test_keys_that_are_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "keys").write_text(text)
    with pytest.raises(InvalidValueError) as caught:
        read_api_keys(tmp_path / "keys")
    assert KEY not in str(caught.value)


# --- errors


def all_errors(kind: type[MinitronClientError] = MinitronClientError) -> Iterator[type[MinitronClientError]]:
    yield kind
    for sub in kind.__subclasses__():
        if sub.__module__ == errors.__name__:  # the commands have some of their own
            yield from all_errors(sub)


SDK_ERRORS: dict[int, type[openai.APIStatusError]] = {
    400: openai.BadRequestError,
    404: openai.NotFoundError,
    429: openai.RateLimitError,
    500: openai.InternalServerError,
    502: openai.InternalServerError,
    503: openai.InternalServerError,
    504: openai.InternalServerError,
}


def test_the_table_holds_the_whole_tree() -> None:
    """A new error must be given its answer on purpose; InvalidValueError is an InvalidRequestError."""
    assert set(all_errors()) - set(TABLE) == {errors.InvalidValueError}


@pytest.mark.parametrize("stream", [False, True])
async def test_errors_before_the_first_text(door: OpenDoor, stream: bool) -> None:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as sdk:
        for kind in all_errors():
            error = kind("the server said so")
            door.client.script = lambda call, error=error: [error]  # type: ignore[misc]
            expected = api_error(error)
            with pytest.raises(SDK_ERRORS[expected.status]) as caught:
                await sdk.completions.create(model=MODEL, prompt="x", stream=stream)
            assert caught.value.status_code == expected.status
            assert (caught.value.type, caught.value.code) == (expected.kind, expected.code)
            is_retryable = TABLE.get(kind, TABLE[errors.InvalidRequestError]).is_retryable
            assert ("retry-after" in caught.value.response.headers) == is_retryable
            assert door.client.calls[-1].request_id.startswith(str(caught.value.request_id))


async def test_an_error_after_the_first_text(door: OpenDoor) -> None:
    door.client.script = lambda call: [Chunk("be"), InternalError("the engine failed")]
    answer = await door.post(prompt="x", stream=True)
    assert answer.status_code == 200
    events = [event.removeprefix("data: ") for event in answer.text.split("\n\n")]
    assert json.loads(events[0])["choices"][0]["text"] == "be"
    assert json.loads(events[1])["error"]["message"] == "the engine failed"
    assert events[2:] == ["[DONE]", ""]
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as sdk:
        stream = await sdk.completions.create(model=MODEL, prompt="x", stream=True)
        with pytest.raises(openai.APIError, match="the engine failed"):
            [chunk async for chunk in stream]


@pytest.mark.parametrize("stream", [False, True])
async def test_a_generation_that_the_server_cancels(door: OpenDoor, stream: bool) -> None:
    door.client.script = lambda call: [Chunk("", finish_reason="cancelled")]
    if stream:
        door.client.script = lambda call: words("a", finish="cancelled")
    answer = await door.post(prompt="x", stream=stream)
    assert "the inference server cancelled" in answer.text
    assert stream or answer.status_code == 503


async def test_an_unforeseen_failure_tells_nothing_and_hangs_nobody(
    door: OpenDoor, caplog: pytest.LogCaptureFixture
) -> None:
    def script(call: Any) -> Any:
        raise RuntimeError("secret detail")

    door.client.script = script
    answer = await door.post(prompt="x")
    assert answer.status_code == 500
    assert "secret" not in answer.text
    assert "secret detail" in caplog.text


async def test_insides_are_not_told(door: OpenDoor) -> None:
    door.client.script = lambda call: [
        errors.ServerConnectionError("no connection to 10.0.0.7:8001: refused")
    ]
    answer = await door.post(prompt="x")
    assert answer.status_code == 503
    assert "10.0.0.7" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/v1/nothing", 404), ("GET", "/v1/completions", 405), ("POST", "/v1/embeddings", 404)],
)
async def test_a_path_that_is_not_there(door: OpenDoor, method: str, path: str, status: int) -> None:
    answer = await door.http.request(method, f"{door.url}{path}")
    assert answer.status_code == status
    assert answer.json()["error"]["message"].startswith(f"{method} {path}: ")


async def test_models(door: OpenDoor) -> None:
    async with openai.AsyncOpenAI(base_url=f"{door.url}/v1", api_key="none", max_retries=0) as sdk:
        assert [model.id async for model in await sdk.models.list()] == [MODEL]
        assert (await sdk.models.retrieve(MODEL)).id == MODEL
        with pytest.raises(openai.NotFoundError) as caught:
            await sdk.models.retrieve("gpt-9")
        assert caught.value.code == "model_not_found"
        with pytest.raises(openai.NotFoundError, match="this door serves tensorrt_llm_bls"):
            await sdk.completions.create(model="gpt-9", prompt="x")


async def test_served_names() -> None:
    async with open_door(PlayingClient(), served_names=("minitron", "nvidia/minitron")) as door:
        answers = [
            (await door.post(prompt="x", model=name)).json() for name in ("minitron", "nvidia/minitron")
        ]
        named = (await door.http.get(f"{door.url}/v1/models/nvidia/minitron")).json()
    assert [answer["model"] for answer in answers] == ["minitron", "minitron"]
    assert named["id"] == "nvidia/minitron"


# --- limits


async def test_a_body_that_is_too_large() -> None:
    async def parts() -> AsyncIterator[bytes]:
        for _ in range(40):
            yield b" " * 100

    async with open_door(PlayingClient(), max_body_bytes=1000) as door:
        url, headers = f"{door.url}/v1/completions", {"content-type": "application/json"}
        declared = await door.post(prompt="x" * 1000)
        undeclared = await door.http.post(url, content=parts(), headers=headers)
        fits = await door.post(prompt="x" * 900)
    for answer in (declared, undeclared):
        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "request_too_large"
    assert fits.status_code == 200


async def test_a_body_that_does_not_come(monkeypatch: pytest.MonkeyPatch, door: OpenDoor) -> None:
    monkeypatch.setattr("minitron_client.openai.http_body.BODY_TIMEOUT_S", 0.1)
    reader, writer = await ask(door, b"{", length=2)
    answer = await asyncio.wait_for(reader.read(), 5)  # to the end: the connection is closed
    assert answer.startswith(b"HTTP/1.1 408 ")
    writer.close()


async def test_a_body_far_too_large_is_not_even_read(door: OpenDoor) -> None:
    reader, writer = await ask(door, b"{", length=2**40)
    assert (await asyncio.wait_for(reader.read(), 5)).startswith(b"HTTP/1.1 413 ")
    writer.close()


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", None])
async def test_a_body_that_another_site_could_post(door: OpenDoor, kind: str | None) -> None:
    headers = {} if kind is None else {"content-type": kind}
    answer = await door.http.post(f"{door.url}/v1/completions", content=b'{"prompt":"x"}', headers=headers)
    assert answer.status_code == 415
    assert door.client.calls == []


# --- callers that leave


async def ask(
    door: OpenDoor, content: bytes, length: int
) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A question by hand."""
    host, port = door.url.removeprefix("http://").split(":")
    reader, writer = await asyncio.open_connection(host, int(port))
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        + f"content-length: {length}\r\n\r\n".encode()
        + content
    )
    return reader, writer


async def left_after(door: OpenDoor, body: dict[str, Any], seen: bytes) -> None:
    """Post, wait until `seen` came (or the client was asked), and hang up."""
    content = json.dumps(body).encode()
    reader, writer = await ask(door, content, len(content))
    if seen:
        await asyncio.wait_for(reader.readuntil(seen), 5)
    while not door.client.calls:
        await asyncio.sleep(0.005)
    writer.close()


@pytest.mark.parametrize(("stream", "seen"), [(False, b""), (True, b""), (True, b'"text":"a"')])
async def test_who_leaves_is_cancelled_on_the_server(door: OpenDoor, stream: bool, seen: bytes) -> None:
    never = asyncio.Event()
    door.client.script = lambda call: [Chunk("a"), never] if seen else [never]
    await left_after(door, {"prompt": "x", "stream": stream, "n": 2}, seen)
    until_s = time.monotonic() + 5
    while len(door.client.cancelled) < 2 and time.monotonic() < until_s:
        await asyncio.sleep(0.01)
    assert sorted(door.client.cancelled) == sorted(call.request_id for call in door.client.calls)
    assert "minitron_openai_disconnects_total 1.0" in (await door.http.get(f"{door.url}/metrics")).text
    assert "minitron_openai_requests_in_flight 0.0" in (await door.http.get(f"{door.url}/metrics")).text


async def test_open_answers_are_finished_while_draining(door: OpenDoor) -> None:
    more = asyncio.Event()
    door.client.script = lambda call: [Chunk("a"), more, Chunk("b", finish_reason="stop")]
    asking = asyncio.create_task(door.post(prompt="x", stream=True))
    while not door.client.calls:
        await asyncio.sleep(0.005)
    door.server.should_exit = True
    await asyncio.sleep(0.3)
    with pytest.raises(httpx.ConnectError):
        async with httpx.AsyncClient(trust_env=False) as other:
            await other.get(f"{door.url}/health")
    more.set()
    assert (await asking).text.endswith("data: [DONE]\n\n")
    assert door.client.cancelled == []


@pytest.mark.parametrize("stream", [False, True])
async def test_answers_that_must_end_say_why(door: OpenDoor, stream: bool) -> None:
    door.client.script = lambda call: [Chunk("a"), asyncio.Event()]
    asking = asyncio.create_task(door.post(prompt="x", stream=stream))
    while not door.client.calls:
        await asyncio.sleep(0.005)
    await asyncio.sleep(0.1)
    door.door.running.end_all()
    answer = await asking
    assert "the door is shutting down" in answer.text
    assert answer.status_code == (200 if stream else 503)
    await door.door.running.wait(1)
    assert len(door.client.cancelled) == 1
    door.door.running.end_all()  # nothing is left to end


async def test_the_first_text_does_not_wait_for_the_headers(door: OpenDoor) -> None:
    """Nagle's algorithm is off: it would hold the first text back for 40 ms."""
    await door.http.get(f"{door.url}/health")
    (connection,) = door.server.server_state.connections
    assert connection.transport is not None
    accepted = connection.transport.get_extra_info("socket")
    assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


# --- operators


async def test_health(door: OpenDoor) -> None:
    ready = await door.http.get(f"{door.url}/health")
    door.client.is_ready = False
    waiting = await door.http.get(f"{door.url}/health")
    door.client.is_ready, door.door.is_draining = True, True
    draining = await door.http.get(f"{door.url}/health")
    answers = [(answer.status_code, answer.json()["status"]) for answer in (ready, waiting, draining)]
    assert answers == [(200, "ready"), (503, "not ready"), (503, "draining")]


RESTRICTED = "This protocol is restricted, expecting header 'triton-grpc-protocol-{}-key'"


@pytest.mark.parametrize(
    ("error", "is_ready"),
    [
        (errors.AuthError(RESTRICTED.format("minitron")), False),
        (errors.AuthError("no access", code="PERMISSION_DENIED"), False),
        (errors.AuthError(RESTRICTED.format("admin")), True),
        (errors.UnsupportedError("no such call"), True),
    ],
)
async def test_health_is_not_ready_where_the_server_refuses_the_doors_key(
    door: OpenDoor, error: MinitronClientError, is_ready: bool
) -> None:
    door.client.parameters_error = error
    answer = await door.http.get(f"{door.url}/health")
    assert answer.status_code == (200 if is_ready else 503)
    assert answer.json()["status"] == ("ready" if is_ready else "not ready")
    assert answer.json()["server_live"] is True
    assert answer.json()["reason"] == ("" if is_ready else api_error(error).message)
    fault = await door.door.fault()
    assert fault == ("" if is_ready else f"{error.message}; {error.advice}")


async def test_health_says_why_it_is_not_ready(door: OpenDoor) -> None:
    door.client.is_ready = False
    assert (await door.http.get(f"{door.url}/health")).json()["reason"] == f"models not ready: {MODEL}"
    assert await door.door.fault() == f"models not ready: {MODEL}"
    for error in (errors.AuthError(RESTRICTED.format("probe")), errors.ProtocolError("what is this")):
        door.client.health_error = error
        answer = await door.http.get(f"{door.url}/health")
        assert (answer.status_code, answer.json()["server_live"]) == (503, False)
        assert answer.json()["reason"] == api_error(error).message
        assert await door.door.fault() == f"{error.message}; {error.advice}"


async def test_metrics(door: OpenDoor) -> None:
    await door.post(prompt="x")
    await door.post(prompt="x", stream=True)
    await door.post(prompt="x", temperature=9)
    await door.http.get(f"{door.url}/v1/models/x")
    await door.http.get(f"{door.url}/v1/whatever/{'a' * 40}")
    answer = await door.http.get(f"{door.url}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    for wanted in (
        'minitron_openai_requests_total{endpoint="/v1/completions",status="200"} 2.0',
        'minitron_openai_requests_total{endpoint="/v1/completions",status="400"} 1.0',
        'minitron_openai_requests_total{endpoint="/v1/models/{name:path}",status="404"} 1.0',
        'minitron_openai_requests_total{endpoint="other",status="404"} 1.0',
        "minitron_openai_prompt_tokens_total 10.0",
        "minitron_openai_completion_tokens_total 6.0",
        "minitron_openai_time_to_first_token_seconds_count 1.0",
        "minitron_openai_time_per_output_token_seconds_count 1.0",
        "minitron_openai_request_seconds_count 5.0",
        "minitron_openai_requests_in_flight 0.0",
        "minitron_openai_disconnects_total 0.0",
    ):
        assert wanted in lines


async def test_the_page_takes_nothing_from_elsewhere(door: OpenDoor) -> None:
    for path in ("/", "/page.css", "/page.js"):
        answer = await door.http.get(f"{door.url}{path}")
        assert answer.status_code == 200
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert "unsafe" not in answer.headers["content-security-policy"]
        assert "http://" not in answer.text.replace("http://www.w3.org", "")
        assert "https://" not in answer.text


async def test_no_other_door_stands_open(door: OpenDoor) -> None:
    for path in ("/docs", "/redoc", "/openapi.json", "/page.html", "/../api_keys.py"):
        assert (await door.http.get(f"{door.url}{path}")).status_code == 404


async def test_a_cross_origin_question_is_not_allowed(door: OpenDoor) -> None:
    headers = {"origin": "https://elsewhere.example", "access-control-request-method": "POST"}
    answer = await door.http.options(f"{door.url}/v1/completions", headers=headers)
    assert "access-control-allow-origin" not in answer.headers


async def test_a_named_origin_is_let_in() -> None:
    friend, stranger = "https://chat.example.org", "https://elsewhere.example"
    async with open_door(PlayingClient(), keys=ApiKeys([KEY]), origins=(friend,)) as door:
        url = f"{door.url}/v1/completions"
        for origin, status in ((friend, 200), (stranger, 400)):
            asks = {
                "access-control-request-method": "POST",
                "access-control-request-headers": "authorization",
            }
            preflight = await door.http.options(url, headers={"origin": origin} | asks)
            assert preflight.status_code == status
        headers = {"origin": friend, "authorization": f"Bearer {KEY}"}
        answer = await door.http.post(url, json={"prompt": "x"}, headers=headers)
        without_key = await door.http.post(url, json={"prompt": "x"}, headers={"origin": friend})
    assert (answer.status_code, without_key.status_code) == (200, 401)
    for told in (answer, without_key):
        assert told.headers["access-control-allow-origin"] == friend


async def test_an_address_that_is_taken(door: OpenDoor) -> None:
    from minitron_client.openai.http_server import HttpSettings, listen

    port = int(httpx.URL(door.url).port or 0)
    with pytest.raises(InvalidValueError, match=f"cannot listen on 127.0.0.1:{port}: "):
        listen(HttpSettings("127.0.0.1", port, 1))


async def test_https(tmp_path: Path) -> None:
    authority = trustme.CA()
    made = authority.issue_cert("127.0.0.1")
    cert, key, trusted = (tmp_path / name for name in ("cert.pem", "key.pem", "ca.pem"))
    made.cert_chain_pems[0].write_to_path(cert)
    made.private_key_pem.write_to_path(key)
    authority.cert_pem.write_to_path(trusted)
    async with open_door(PlayingClient(), tls=(cert, key, trusted)) as door:
        assert door.url.startswith("https://127.0.0.1:")
        assert (await door.post(prompt="x")).json()["choices"][0]["text"] == "abc"


async def test_another_name_is_turned_away() -> None:
    """A page elsewhere may make its name point here; a door without keys answers to its own names only."""
    async with open_door(PlayingClient(), host_names=LOOPBACK) as door:
        for path in ("/", "/metrics", "/health", "/v1/models"):
            for host in ("evil.example", "evil.example:9000", "127.0.0.1.evil.example", "", "[::2]:1"):
                answer = await door.http.get(f"{door.url}{path}", headers={"host": host})
                assert answer.status_code == 403
                assert answer.json()["error"]["code"] == "wrong_host"
            for host in ("127.0.0.1:1", "localhost", "LOCALHOST:9000", "[::1]:9000"):
                assert (await door.http.get(f"{door.url}{path}", headers={"host": host})).status_code == 200


@pytest.mark.skipif(not socket.has_ipv6, reason="this machine has no IPv6")
def test_an_ipv6_address_is_bracketed() -> None:
    from minitron_client.openai.http_server import HttpSettings, listen, url_of

    where = HttpSettings("::1", 0, 1)
    try:
        with listen(where) as listening:
            assert url_of(where, listening) == f"http://[::1]:{listening.getsockname()[1]}"
    except InvalidValueError as error:
        pytest.skip(str(error))
