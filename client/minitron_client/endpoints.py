"""Which of several servers is asked next: round robin, without those that failed a moment ago.

It knows addresses and times. It opens no connection, and may be shared between threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from minitron_client._fork import new_lock

FIRST_EJECTION_S, LONGEST_EJECTION_S = 1.0, 30.0


@dataclass(slots=True)
class _Endpoint:
    url: str
    num_failures: int = 0
    """Failures since the last success."""
    out_until_s: float = 0.0


class EndpointPool:
    """The servers of one client.

    A server that fails is left out for a second, twice as long after each further failure, half a
    minute at most. When all are out, the one that is back first is asked: nothing is refused here.

    Args:
        urls: at least one address.
        clock: seconds that only grow.
    """

    def __init__(self, urls: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoints = {url: _Endpoint(url) for url in urls}
        self._order = list(urls)
        self._clock = clock
        self._next = 0
        self._lock = new_lock()

    def pick(self) -> str:
        """The address for the next attempt."""
        with self._lock:
            now_s, count = self._clock(), len(self._order)
            turns = [self._order[(self._next + step) % count] for step in range(count)]
            fit = [url for url in turns if self._endpoints[url].out_until_s <= now_s]
            url = fit[0] if fit else min(turns, key=lambda one: self._endpoints[one].out_until_s)
            self._next = (self._order.index(url) + 1) % count
            return url

    def has_other(self, url: str) -> bool:
        """Whether a server other than this one is fit to be asked."""
        with self._lock:
            now_s = self._clock()
            return any(one.url != url and one.out_until_s <= now_s for one in self._endpoints.values())

    def succeeded(self, url: str) -> None:
        """A request was answered: whatever failed before is forgotten."""
        endpoint = self._endpoints[url]
        if endpoint.num_failures:
            with self._lock:
                endpoint.num_failures, endpoint.out_until_s = 0, 0.0

    def failed(self, url: str) -> None:
        """The server was not there, or not ready."""
        with self._lock:
            endpoint = self._endpoints[url]
            out_s = min(FIRST_EJECTION_S * 2.0 ** min(endpoint.num_failures, 10), LONGEST_EJECTION_S)
            endpoint.num_failures += 1
            endpoint.out_until_s = self._clock() + out_s
