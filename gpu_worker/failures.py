"""What a request that fails is told: from an error to a Failed. Pure functions."""

from __future__ import annotations

from expert_store.errors import StoreError
from gpu_worker.messages import Failed, FailureKind, GenerateRequest


def invalid(error: ValueError, kind: FailureKind = "invalid") -> Failed:
    """Our ValueErrors begin with the field's name."""
    field, colon, _ = str(error).partition(":")
    return Failed(kind, str(error), field if colon and field.isidentifier() else None)


def for_sender(failed: Failed, request: GenerateRequest) -> Failed:
    """The engine knows only prompts; who sent messages is told of those."""
    if failed.field != "prompt" or not request.messages:
        return failed
    message = "messages" + failed.message.removeprefix("prompt")
    return Failed(failed.kind, message, "messages")


def of_engine(error: Exception) -> Failed:
    """What ended a sequence inside a step."""
    if isinstance(error, StoreError):
        return Failed("unavailable", str(error))
    return Failed("internal", str(error))


def stopped() -> Failed:
    """The worker was told to end."""
    return Failed("stopped", "the worker stopped before the answer was whole; ask again")


DIED = Failed("internal", "the worker's engine died before the answer was whole")
"""The engine met a mistake of ours while the request ran."""


def died(attempt: int) -> Failed:
    """DIED as a request is told of it.

    Whether the request caused it is not known: it may try one other worker, not every one.
    """
    return Failed("stopped", DIED.message) if attempt == 1 else DIED
