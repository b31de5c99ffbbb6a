"""Ask Triton in this container how it is; the exit code is the answer.

`probe.py start` fails until one token comes.
`probe.py ready` fails when tokens have stopped coming: no counter of tokens has moved since the last call,
and one that it asks for does not come either.
`probe.py alive` fails when the models answer with a fault, as when a model process is dead, which Triton
neither restarts nor reports; and when no token comes and none has come to others since the last call. A
server that is only too busy to answer in time is alive.
`probe.py live` fails when Triton's own health does.
`probe.py drain SECONDS` returns when the engine has no request, or when the time is over.
Standard library only: it runs in the serving container.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
import urllib.error
import urllib.request

GENERATE_URL = "http://127.0.0.1:{port}/v2/models/{model}/generate"
LIVE_URL = "http://127.0.0.1:{port}/v2/health/live"
METRICS_URL = "http://127.0.0.1:{port}/metrics"
# What moves while tokens are made: the text models' counter, and the steps of either engine.
PROGRESS = (
    "minitron_output_tokens_total{",
    "minitron_engine_steps_total{",
    'nv_trt_llm_general_metrics{general_type="iteration_counter"',
)
SEEN_FILE = "minitron-probe-seen"
REQUESTS_METRIC = "nv_trt_llm_request_metrics{"
OPEN_REQUESTS = ('request_type="active"', 'request_type="waiting"')
PROMPT = "def add(a, b):"
TIMEOUT_S = 20.0
SCRAPE_TIMEOUT_S = 5.0
LEAVE_S = 5.0
BUSY = ("UNAVAILABLE", "CANCELLED", "DEADLINE_EXCEEDED")
# What Triton and the text model say of a model process that has died, under UNAVAILABLE too.
DEAD = ("is not healthy", "is gone", "cannot be reached")


def ask(url: str, timeout_s: float) -> tuple[bool, str]:
    """Whether a token came, and what came instead; TimeoutError when nothing did."""
    body = json.dumps({"text_input": PROMPT, "max_tokens": 1}).encode()
    headers = {"Content-Type": "application/json"}
    if "MINITRON_API_KEY" in os.environ:
        headers["minitron-key"] = os.environ["MINITRON_API_KEY"]
    request = urllib.request.Request(url, body, headers)
    try:
        with urllib.request.urlopen(request, timeout=timeout_s) as response:
            text = response.read().decode()
    except urllib.error.HTTPError as error:
        text = error.read().decode()
    except urllib.error.URLError as error:
        if isinstance(error.reason, TimeoutError):
            raise error.reason from None
        return False, str(error.reason)
    except OSError as error:
        if isinstance(error, TimeoutError):
            raise
        return False, str(error)
    # Triton sends some errors with status 200: only the text that was asked for is an answer.
    return '"text_output"' in text, text


def check(mode: str) -> int:
    """0 for a server that gives a token, or only has no place for one; 1 with the reason on stderr."""
    has_stalled = mode == "alive" and has_moved(mode) is False
    port = os.environ.get("PROBE_HTTP_PORT", "8000")
    model = os.environ.get("PROBE_MODEL", "tensorrt_llm_bls")
    is_busy = False
    try:
        is_token, text = ask(GENERATE_URL.format(port=port, model=model), TIMEOUT_S)
        is_busy = any(word in text for word in BUSY) and not any(word in text for word in DEAD)
    except TimeoutError:
        is_token, is_busy, text = False, True, f"no answer in {TIMEOUT_S:g} s"
    if is_token or (mode == "alive" and is_busy and not has_stalled):
        return 0
    print(f"probe {mode}: {text[:500]}{', and no token for others' if has_stalled else ''}", file=sys.stderr)
    return 1


def ready() -> int:
    """0 while tokens come: because someone gets them, or because one that is asked for comes."""
    return 0 if has_moved("ready") else check("ready")


def has_moved(mode: str) -> bool | None:
    """Whether any counter of tokens is another than at this mode's last call; None when there is none."""
    moving = [line for line in scrape().splitlines() if line.startswith(PROGRESS)]
    now, file = "\n".join(moving), os.path.join(tempfile.gettempdir(), f"{SEEN_FILE}-{mode}")
    before = None
    if os.path.exists(file):
        with open(file, encoding="utf-8") as seen:
            before = seen.read()
    with open(file, "w", encoding="utf-8") as seen:
        seen.write(now)
    return now != before if now and before is not None else None


def scrape() -> str:
    """Prometheus' text; empty when Triton does not answer."""
    url = METRICS_URL.format(port=os.environ.get("PROBE_METRICS_PORT", "8002"))
    try:
        with urllib.request.urlopen(url, timeout=SCRAPE_TIMEOUT_S) as response:
            return str(response.read().decode())
    except OSError as error:
        print(f"probe: {error}", file=sys.stderr)
        return ""


def live() -> int:
    """0 while Triton says that it lives."""
    try:
        url = LIVE_URL.format(port=os.environ.get("PROBE_HTTP_PORT", "8000"))
        with urllib.request.urlopen(url, timeout=TIMEOUT_S) as response:
            return 0 if response.status == 200 else 1
    except OSError as error:
        print(f"probe live: {error}", file=sys.stderr)
        return 1


def open_requests(metrics: str) -> float:
    """Requests that the engine runs or holds, by Prometheus' text."""
    lines = [line for line in metrics.splitlines() if line.startswith(REQUESTS_METRIC)]
    return sum(float(line.split()[-1]) for line in lines if any(kind in line for kind in OPEN_REQUESTS))


def drain(seconds: float) -> int:
    """Wait until the engine has nothing to do; first for clients to learn that this server is leaving."""
    deadline_s = time.monotonic() + seconds
    time.sleep(min(LEAVE_S, seconds))
    while time.monotonic() < deadline_s:
        metrics = scrape()
        if not metrics or open_requests(metrics) == 0:  # none: it has gone, and nothing is left to wait for
            break
        time.sleep(1.0)
    return 0


def main(argv: list[str]) -> int:
    """Exit code of one call."""
    modes = {"start": lambda: check("start"), "alive": lambda: check("alive"), "ready": ready, "live": live}
    if len(argv) == 2 and argv[1] in modes:
        return modes[argv[1]]()
    if len(argv) == 3 and argv[1] == "drain" and argv[2].isdigit():
        return drain(float(argv[2]))
    print("usage: probe.py start|ready|alive|live|drain SECONDS", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv))
