"""What several servers' states come to, and how long a wait for readiness goes on.

It knows `Health` values and seconds. Asking and sleeping are the clients'.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from minitron_client.errors import DeadlineError, NotFoundError
from minitron_client.results import Health
from minitron_client.settings import checked_seconds

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.05, 0.5


KNOWN_MODELS = ("tensorrt_llm_bls", "ensemble", "tensorrt_llm", "preprocessing", "postprocessing")
"""Asked for one by one where the list of models is closed to callers."""


def merge_health(servers: Mapping[str, Health]) -> Health:
    """One state for servers that stand in for each other: what any of them can do.

    Args:
        servers: address -> its state.
    """
    states, models = servers.values(), dict[str, bool]()
    for state in states:
        for name, ready in state.models.items():
            models[name] = models.get(name, False) or ready
    live = any(state.live for state in states)
    return Health(
        live=live,
        ready=any(state.ready for state in states),
        models=models,
        reason="" if live else "; ".join(state.reason for state in states if state.reason),
        advice="" if live else "; ".join(dict.fromkeys(state.advice for state in states if state.advice)),
        servers=dict(servers),
    )


def is_model_ready(health: Health, model: str) -> bool:
    """Whether a request for the model can be answered."""
    return health.ready and bool(health.models.get(model))


def why_not_ready(health: Health, model: str) -> str:
    """What a request for the model waits for, in a few words; "" where it is ready."""
    if is_model_ready(health, model):
        return ""
    if not health.ready:
        return missing(health)
    if model in health.models:
        return f"models not ready: {model}"
    return f"no model {model}; it has {', '.join(sorted(health.models)) or 'none'}"


def servers_of(health: Health, model: str) -> list[str]:
    """Addresses of the servers that have the model ready."""
    return [url for url, state in health.servers.items() if state.models.get(model)]


class ReadyWait:
    """One wait until a server and a model are ready.

    Args:
        url: address, for the errors.
        model: the model that must be ready.
        timeout_s: how long to wait at most.

    Raises:
        InvalidValueError: timeout_s is not a positive finite number.
    """

    def __init__(self, url: str, model: str, timeout_s: float) -> None:
        self._url, self._model = url, model
        self._timeout_s = checked_seconds("timeout_s", timeout_s)
        self._until_s = time.monotonic() + self._timeout_s
        self._pause_s = _FIRST_PAUSE_S

    @property
    def left_s(self) -> float:
        """Seconds for the next question; never too few to ask it."""
        return max(self._until_s - time.monotonic(), _FIRST_PAUSE_S)

    def pause_s(self, health: Health) -> float | None:
        """Seconds to wait before asking again; None when all is ready.

        Raises:
            DeadlineError: time is up; says what was still missing.
            NotFoundError: the server is ready and does not have the model.
        """
        if is_model_ready(health, self._model):
            return None
        if health.ready and self._model not in health.models:
            raise NotFoundError(f"{self._url} has {why_not_ready(health, self._model)}")
        if time.monotonic() + self._pause_s > self._until_s:
            raise DeadlineError(
                f"{self._url} is not ready after {self._timeout_s:g} s: {missing(health)}; look at its log"
            )
        pause_s, self._pause_s = self._pause_s, min(2 * self._pause_s, _LONGEST_PAUSE_S)
        return pause_s


def missing(health: Health) -> str:
    """What a server that is not ready waits for."""
    if not health.live:
        return health.reason or "the server does not say it is live"
    waiting = sorted(name for name, ready in health.models.items() if not ready)
    return f"models not ready: {', '.join(waiting)}" if waiting else "the server does not say it is ready"
