"""One request to a cluster that is tried out: what is asked, and what came of it."""

from __future__ import annotations

import json
from dataclasses import dataclass

import httpx2

MAX_TOKENS = 8
PROMPTS = ("The return statement", "A list is a mutable sequence", "To be, or not to be")


@dataclass(frozen=True, slots=True)
class Asked:
    """One request: whether it was streamed, and its text or what went wrong."""

    prompt: str
    is_stream: bool
    text: str = ""
    problem: str = ""


def answer_of(http: httpx2.Client, door: str, model: str, asked: Asked) -> Asked:
    """Send it and read it to its end. Raises httpx2.HTTPError, ValueError, KeyError."""
    body = {"model": model, "prompt": asked.prompt, "max_tokens": MAX_TOKENS, "temperature": 0}
    body |= {"ignore_eos": True, "stream": asked.is_stream}
    answer = http.post(f"{door}/v1/completions", json=body)
    if answer.status_code != 200:
        problem = f"status {answer.status_code}: {answer.text[:300]}"
        return Asked(asked.prompt, asked.is_stream, problem=problem)
    if not asked.is_stream:
        text = answer.json()["choices"][0]["text"]
        return Asked(asked.prompt, asked.is_stream, text)
    events = [line.removeprefix("data: ") for line in answer.text.split("\n\n") if line]
    if events[-1] != "[DONE]":
        problem = f"the stream ended with {events[-1][:300]}"
        return Asked(asked.prompt, asked.is_stream, problem=problem)
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1])
    return Asked(asked.prompt, asked.is_stream, text)
