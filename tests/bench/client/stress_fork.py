"""What a fork costs a program that talks to a server: how children and the parent's own requests end.

    python tests/bench/client/stress_fork.py                    # between requests: children are served
    python tests/bench/client/stress_fork.py --streams 2        # while streams run: they are refused
    python tests/bench/client/stress_fork.py --streams 2 --raw  # the same, where nobody refuses

The server is `null_server.py` in a process of its own. The last line is JSON: how the children ended, as
[what they said, signal], with how many of them; and the errors of the parent's own streams.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from minitron_client import MinitronClient, MinitronClientError, _fork

SERVER = Path(__file__).with_name("null_server.py")
CHILD_LIMIT_S = 8


def in_child(client: MinitronClient) -> tuple[str, int]:
    """How a child that asks the server ends: what it says, and its exit code (-11 for signal 11)."""
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        signal.alarm(CHILD_LIMIT_S)
        os.write(writing, ask(client).encode())
        os._exit(0)
    os.close(writing)
    _, status = os.waitpid(pid, 0)
    with os.fdopen(reading) as said:
        return said.read(), os.waitstatus_to_exitcode(status)


def ask(client: MinitronClient) -> str:
    try:
        return "served" if client.generate("hi", max_tokens=5).text else "nothing"
    except MinitronClientError as error:
        return type(error).__name__


@contextmanager
def streaming(client: MinitronClient, num_streams: int, errors: Counter[str]) -> Iterator[None]:
    """So many threads that read one stream after the other until the block is left."""
    is_over = threading.Event()

    def read() -> None:
        while not is_over.is_set():
            try:
                with client.stream("hi", max_tokens=200) as stream:
                    stream.final()
            except MinitronClientError as error:
                errors[str(error)[:120]] += 1

    threads = [threading.Thread(target=read) for _ in range(num_streams)]
    for thread in threads:
        thread.start()
    yield
    is_over.set()
    for thread in threads:
        thread.join()


def forks(url: str, num_forks: int, num_streams: int) -> dict[str, object]:
    children: Counter[tuple[str, int]] = Counter()
    errors: Counter[str] = Counter()
    with (
        MinitronClient(url, timeout_s=CHILD_LIMIT_S - 3) as client,
        streaming(client, num_streams, errors),
    ):
        for _ in range(num_forks):
            if not num_streams:
                client.generate("hi", max_tokens=8)
            children[in_child(client)] += 1
    return {"children": [[*how, count] for how, count in children.items()], "parent_errors": dict(errors)}


def _unguarded(mark: _fork.CallMark) -> None:
    mark._process = _fork._Process.number


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--forks", type=int, default=2500)
    parser.add_argument("--streams", type=int, default=0, help="streams of the parent at any time (0)")
    parser.add_argument("--raw", action="store_true", help="without the client's own guard")
    args = parser.parse_args()
    logging.getLogger("minitron_client").setLevel(logging.ERROR)  # a warning at each fork
    if args.raw:
        _fork.CallMark.__init__ = _unguarded  # type: ignore[method-assign]
    with subprocess.Popen(
        [sys.executable, str(SERVER)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        assert server.stdin is not None
        assert server.stdout is not None
        found = forks(f"127.0.0.1:{int(server.stdout.readline())}", args.forks, args.streams)
        server.stdin.close()
    print(json.dumps({"forks": args.forks, "streams": args.streams, "is_guarded": not args.raw, **found}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
