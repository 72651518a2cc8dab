"""Goal: every status, header and shape that a client can meet over HTTP, with a real engine behind.

Method: uvicorn and the mini model's engine in this process; the official client for what goes well,
raw HTTP for what does not. A gate holds the engine's steps where a test needs a busy worker.
"""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from local_endpoint import (
    MAX_CONTEXT,
    MAX_SEQUENCES,
    MAX_WAITING,
    Endpoint,
    running_endpoint,
    wait_until,
)

from gpu_worker.messages import Failed, GenerateRequest, Piece
from gpu_worker.sequence import SamplingParams

BODY = {"model": "mini", "prompt": "The return statement", "max_tokens": 8, "temperature": 0}


@pytest.fixture(scope="module")
def endpoint() -> Iterator[Endpoint]:
    with running_endpoint() as running:
        yield running


@pytest.fixture
def http(endpoint: Endpoint) -> Iterator[httpx2.Client]:
    with httpx2.Client(base_url=endpoint.url, timeout=60) as client:
        yield client
    wait_until(lambda: endpoint.service.load().running_sequences == 0, "all slots free again")


@pytest.fixture
def client(endpoint: Endpoint) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0)


def check_error(response: httpx2.Response, status: int, **expected: Any) -> dict[str, Any]:
    """The response is this error, in OpenAI's shape; returns the error."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    for name, value in expected.items():
        assert error[name] == value, error
    return error


def test_whole_and_streamed_answers_agree(client: openai.OpenAI) -> None:
    whole = client.completions.create(**BODY)
    assert whole.choices[0].finish_reason in ("length", "stop")
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 8
    chunks = list(client.completions.create(**BODY, stream=True))
    assert len(chunks) > 2
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


def test_chat_whole_and_streamed(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "mini",
        "messages": [{"role": "user", "content": "What is a module?"}],
        "max_tokens": 6,
        "seed": 3,
    }
    whole = client.chat.completions.create(**asked)
    stream = client.chat.completions.create(
        **asked, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[-1].usage == whole.usage


def test_stop_strings_end_the_text(client: openai.OpenAI) -> None:
    full = client.completions.create(**BODY).choices[0].text
    stop = full[3:6]
    stopped = client.completions.create(**BODY, stop=[stop]).choices[0]
    assert stopped.text == full[: full.index(stop)]
    assert stopped.finish_reason == "stop"


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mini"]
    assert client.models.retrieve("mini").owned_by == "moetier"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("other/model")
    assert caught.value.code == "model_not_found"


BAD: dict[str, tuple[str, str, Any, int, dict[str, Any]]] = {
    "invalid JSON": ("POST", "/v1/completions", b"{", 400, {"code": "invalid_json"}),
    "wrong type": ("POST", "/v1/completions", {**BODY, "prompt": 3}, 400, {"param": "prompt"}),
    "negative": (
        "POST",
        "/v1/completions",
        {**BODY, "max_tokens": -1},
        400,
        {"param": "max_tokens"},
    ),
    "huge max_tokens": (
        "POST",
        "/v1/completions",
        {**BODY, "max_tokens": 10**9},
        400,
        {"code": "context_length_exceeded", "param": "prompt"},
    ),
    "long prompt": (
        "POST",
        "/v1/completions",
        {**BODY, "prompt": "word " * 2 * MAX_CONTEXT},
        400,
        {"code": "context_length_exceeded"},
    ),
    "prompt that no tokenizer need see": (
        "POST",
        "/v1/completions",
        {**BODY, "prompt": "word " * 40 * MAX_CONTEXT},
        400,
        {"code": "context_length_exceeded", "param": "prompt"},
    ),
    "long chat": (
        "POST",
        "/v1/chat/completions",
        {"model": "mini", "messages": [{"role": "user", "content": "word " * 2 * MAX_CONTEXT}]},
        400,
        {"code": "context_length_exceeded", "param": "messages"},
    ),
    "empty prompt": ("POST", "/v1/completions", {**BODY, "prompt": ""}, 400, {"param": "prompt"}),
    "token id": ("POST", "/v1/completions", {**BODY, "prompt": [10**6]}, 400, {"param": "prompt"}),
    "chat that no tokenizer need see": (
        "POST",
        "/v1/chat/completions",
        {"model": "mini", "messages": [{"role": "user", "content": "word " * 40 * MAX_CONTEXT}]},
        400,
        {"code": "context_length_exceeded", "param": "messages"},
    ),
    "stop token id": (
        "POST",
        "/v1/completions",
        {**BODY, "stop_token_ids": [5, 10**6]},
        400,
        {"param": "stop_token_ids"},
    ),
    "bad, streamed": (
        "POST",
        "/v1/completions",
        {**BODY, "stream": True, "max_tokens": 10**9},
        400,
        {"code": "context_length_exceeded"},
    ),
    "unknown model": (
        "POST",
        "/v1/completions",
        {**BODY, "model": "gpt-5"},
        404,
        {"code": "model_not_found", "param": "model"},
    ),
    "unsupported": ("POST", "/v1/completions", {**BODY, "n": 2}, 400, {"param": "n"}),
    "too large": (
        "POST",
        "/v1/completions",
        {**BODY, "prompt": "x" * 70_000},
        413,
        {"code": "request_too_large", "type": "invalid_request_error"},
    ),
    "no route": ("GET", "/v2/nothing", None, 404, {}),
    "wrong method": ("GET", "/v1/completions", None, 405, {}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_its_status_and_shape(case: str, http: httpx2.Client) -> None:
    method, path, body, status, expected = BAD[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = http.request(method, path, content=content)
    check_error(response, status, **expected)
    assert response.headers["x-request-id"]


def test_a_body_without_a_length_is_bounded_too(http: httpx2.Client) -> None:
    chunks = (b"x" * 1000 for _ in range(100))
    check_error(http.post("/v1/completions", content=chunks), 413, code="request_too_large")


def test_the_request_id_is_the_clients_own_when_tame(http: httpx2.Client) -> None:
    answer = http.post("/v1/completions", json=BODY, headers={"x-request-id": "abc-1"})
    assert answer.headers.get_list("x-request-id") == ["abc-1"]
    answer = http.get("/v1/models", headers={"x-request-id": "a b"})
    assert answer.headers["x-request-id"].startswith("req-")


def test_a_degraded_answer_says_so(endpoint: Endpoint, http: httpx2.Client) -> None:
    assert "x-moetier-degraded" not in http.post("/v1/completions", json=BODY).headers
    endpoint.experts.degraded = True
    try:
        whole = http.post("/v1/completions", json=BODY)
        stream = http.post("/v1/completions", json={**BODY, "stream": True})
    finally:
        endpoint.experts.degraded = False
    assert whole.headers["x-moetier-degraded"] == "true"
    assert stream.headers["x-moetier-degraded"] == "true", "known at the first token"
    assert '"moetier":{"degraded":true,"quality":null}' in stream.text


def test_a_lost_expert_is_503(endpoint: Endpoint, http: httpx2.Client) -> None:
    for body in (BODY, {**BODY, "stream": True}):
        endpoint.experts.fail_after = 0
        answer = http.post("/v1/completions", json=body)
        error = check_error(answer, 503, type="overloaded_error", code="unavailable")
        assert "layer 1" in error["message"]
        assert answer.headers["retry-after"] == "1"
    assert http.post("/v1/completions", json=BODY).status_code == 200


def test_a_stream_that_fails_ends_with_an_error_event(
    endpoint: Endpoint, http: httpx2.Client
) -> None:
    endpoint.experts.fail_after = 4
    answer = http.post("/v1/completions", json={**BODY, "stream": True})
    assert answer.status_code == 200
    *pieces, last = answer.text.strip().split("\n\n")
    assert len(pieces) >= 2
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "unavailable"
    assert "[DONE]" not in answer.text


def test_the_official_client_sees_a_failing_stream_as_an_error(
    endpoint: Endpoint, client: openai.OpenAI
) -> None:
    endpoint.experts.fail_after = 4
    with pytest.raises(openai.APIError, match="layer 1"):
        list(client.completions.create(**BODY, stream=True))


def test_a_full_queue_is_429_and_the_others_are_served(
    endpoint: Endpoint, http: httpx2.Client
) -> None:
    answers: list[httpx2.Response] = []
    threads = [
        threading.Thread(target=lambda: answers.append(http.post("/v1/completions", json=BODY)))
        for _ in range(MAX_SEQUENCES + MAX_WAITING + 2)
    ]
    with endpoint.experts.held() as at_gate:
        threads[0].start()
        assert at_gate.wait(20)
        for thread in threads[1:]:
            thread.start()
        wait_until(lambda: endpoint.service.num_arriving == len(threads) - 1, "all are there")
    for thread in threads:
        thread.join()
    refused = [answer for answer in answers if answer.status_code != 200]
    assert len(refused) == 2
    for answer in refused:
        check_error(answer, 429, type="rate_limit_error", code="queue_full")
        assert answer.headers["retry-after"] == "1"


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_slot_within_a_step(
    endpoint: Endpoint, stream: bool
) -> None:
    body = {**BODY, "max_tokens": 200, "ignore_eos": True, "stream": stream}
    before = endpoint.service.load()
    with httpx2.Client(base_url=endpoint.url, timeout=60) as leaving:
        if stream:
            with leaving.stream("POST", "/v1/completions", json=body) as answer:
                next(answer.iter_lines())
        else:
            with pytest.raises(httpx2.ReadTimeout):
                leaving.post("/v1/completions", json=body, timeout=0.3)
    wait_until(lambda: endpoint.service.load().running_sequences == 0, "the slot is free")
    after = endpoint.service.load()
    assert after.finished["cancelled"] == before.finished.get("cancelled", 0) + 1
    assert after.output_tokens - before.output_tokens < 200


def test_leaving_is_noticed_before_the_next_step(endpoint: Endpoint) -> None:
    """Exactly: steps are counted while the reader leaves inside one of them."""

    async def leave_after_first_piece() -> tuple[int, int]:
        params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
        events = endpoint.service.generate(GenerateRequest("r", params, prompt="The"))
        assert isinstance(await anext(events), Piece)
        with endpoint.experts.held() as at_gate:
            assert await asyncio.to_thread(at_gate.wait, 20)
            steps = endpoint.service.load().steps
            await events.aclose()
        for _ in range(2000):
            if endpoint.service.load().running_sequences == 0:
                break
            await asyncio.sleep(0.005)
        return steps, endpoint.service.load().steps

    before, after = asyncio.run(leave_after_first_piece())
    assert after - before == 1, "only the step that was under way"


def test_a_request_that_takes_too_long_is_408() -> None:
    with (
        running_endpoint(request_timeout_s=0.2) as endpoint,
        httpx2.Client(base_url=endpoint.url, timeout=60) as http,
    ):
        with endpoint.experts.held():
            check_error(http.post("/v1/completions", json=BODY), 408, code="timeout")
        long = {**BODY, "max_tokens": 240, "ignore_eos": True, "stream": True}
        last = http.post("/v1/completions", json=long).text.strip().split("\n\n")[-1]
        assert json.loads(last.removeprefix("data: "))["error"]["code"] == "timeout"


def test_health_needs_the_tiers(endpoint: Endpoint, http: httpx2.Client) -> None:
    healthy = http.get("/health")
    assert (healthy.status_code, healthy.json()["status"]) == (200, "ok")
    well = endpoint.tiers.tiers
    endpoint.tiers.tiers = (replace(well[0], problem="does not answer"),)
    try:
        error = check_error(http.get("/health"), 503, code="unavailable")
    finally:
        endpoint.tiers.tiers = well
    assert error["message"] == "store-0: does not answer"


def test_health_says_which_tier_others_stand_in_for(
    endpoint: Endpoint, http: httpx2.Client
) -> None:
    well = endpoint.tiers.tiers
    lost = (
        replace(well[0], name="store-1", problem="does not answer"),
        replace(well[0], name="ndp-0", role="ndp", problem="starting"),
    )
    endpoint.tiers.tiers = (*well, *lost)
    try:
        health = http.get("/health")
        assert (health.status_code, health.json()["status"]) == (200, "degraded")
        assert health.json()["problems"] == ["store-1: does not answer", "ndp-0: starting"]
        endpoint.tiers.tiers = lost
        check_error(http.get("/health"), 503, code="unavailable")
    finally:
        endpoint.tiers.tiers = well


def test_metrics_are_prometheus_and_count(endpoint: Endpoint, http: httpx2.Client) -> None:
    def read() -> dict[str, float]:
        response = http.get("/metrics")
        assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in response.text.splitlines() if not line.startswith("#")]
        return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}

    answered = 'moetier_http_requests_total{replica="local",route="/v1/completions",status="200"}'
    moved = 'moetier_moved_bytes_total{replica="local",tier="disk",kind="codes"}'
    http.post("/v1/completions", json=BODY)
    before = read()
    http.post("/v1/completions", json=BODY)
    after = read()
    assert after[answered] == before[answered] + 1
    assert after[moved] > before[moved]
    store = '{actor="store-0",role="store",node="here"}'
    assert after[f"moetier_tier_up{store}"] == 1
    assert after[f"moetier_quarantined_records{store}"] == 3
    assert after[f"moetier_repaired_records{store}"] == 2
    assert after['moetier_running_sequences{replica="local"}'] == 0


def test_a_mistake_of_ours_is_a_plain_500(
    endpoint: Endpoint, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def broken(*_: Any) -> None:
        raise KeyError("inside")

    monkeypatch.setattr(endpoint.tiers, "snapshot", broken)
    error = check_error(http.get("/metrics"), 500, type="server_error", code="internal_error")
    assert "inside" not in error["message"]
    assert "req-" in error["message"]


def test_an_engine_that_dies_fails_its_requests_and_its_health() -> None:
    with (
        running_endpoint() as endpoint,
        httpx2.Client(base_url=endpoint.url, timeout=60) as http,
    ):
        endpoint.service.check_health()
        endpoint.experts.end = lambda: None  # type: ignore[method-assign,assignment,return-value]
        for _ in range(2):
            check_error(http.post("/v1/completions", json=BODY), 503, code="unavailable")
        with pytest.raises(RuntimeError, match="has died"):
            endpoint.service.check_health()


def test_closing_ends_live_requests() -> None:
    async def close_under_way() -> list[Any]:
        with running_endpoint() as endpoint:
            params = SamplingParams(max_tokens=200, temperature=0.0, ignore_eos=True)
            events = endpoint.service.generate(GenerateRequest("r", params, prompt="The"))
            seen: list[Any] = [await anext(events)]
            endpoint.service.close()
            seen += [event async for event in events]
            again = endpoint.service.generate(GenerateRequest("r", params, prompt="The"))
            return seen + [event async for event in again]

    *pieces, last, refused = asyncio.run(close_under_way())
    assert all(isinstance(piece, Piece) for piece in pieces)
    assert isinstance(last, Failed)
    assert isinstance(refused, Failed)
    assert last.kind == refused.kind == "stopped", "another worker may be asked"
