"""When a server is given up, how often it is started again, and what is told about it. No server runs here.

Run with: pytest tests/unit/test_serving_health.py
"""

from __future__ import annotations

import json
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, cast

import pytest

from minitron_build.errors import MachineError, PlanError, StageError
from minitron_build.serving import watch as watching
from minitron_build.serving.health_endpoint import Phase, ServeState, telling
from minitron_build.serving.supervisor import FORGIVEN_AFTER_S, Care, RestartBudget
from minitron_build.serving.token_probe import PROGRESS, engine_is_down, parse_series
from minitron_build.serving.triton_server import ServerOptions, TritonServer, free_ports
from minitron_build.serving.watch import TokenWatch, WatchSettings

SERVER = cast(TritonServer, object())
METRICS = """\
# TYPE minitron_output_tokens_total counter
minitron_output_tokens_total{model="tensorrt_llm_bls"} 17
minitron_output_tokens_total{model="tensorrt_llm"} 1e+06
nv_trt_llm_general_metrics{general_type="iteration_counter",model="tensorrt_llm",version="1"} 5
nv_trt_llm_general_metrics{general_type="timestamp",model="tensorrt_llm",version="1"} 123
minitron_engine_up{model="tensorrt_llm"} 1
nv_inference_count{model="tensorrt_llm"} 3
"""


class TestSeries:
    def test_only_what_moves_with_tokens(self) -> None:
        assert list(parse_series(METRICS, PROGRESS).values()) == [17, 1e6, 5]

    def test_engine_that_says_it_has_ended(self) -> None:
        series = parse_series(METRICS, ("minitron_engine_up{",))
        assert not engine_is_down(series)
        assert engine_is_down(dict.fromkeys(series, 0.0))
        assert not engine_is_down({}), "TensorRT-LLM's says nothing"


class TestWatch:
    """Ten times as fast as in earnest."""

    @pytest.fixture(autouse=True)
    def fast(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watching, "CHECK_INTERVAL_S", 0.02)

    def _run(
        self, monkeypatch: pytest.MonkeyPatch, series: Any, token: Any, for_s: float = 1.0
    ) -> tuple[str | None, int]:
        """The trouble there was, and how many tokens were asked for."""
        asked = []

        def probe(server: TritonServer, timeout_s: float) -> None:
            asked.append(timeout_s)
            token()

        monkeypatch.setattr(watching, "read_progress", lambda server: series())
        watch = TokenWatch(SERVER, probe, WatchSettings(stall_timeout_s=0.4, probe_interval_s=0.1))
        watch.start()
        deadline_s = time.monotonic() + for_s
        while watch.trouble is None and time.monotonic() < deadline_s:
            time.sleep(0.01)
        watch.stop()
        return watch.trouble, len(asked)

    def test_moving_counters_are_enough(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trouble, asked = self._run(
            monkeypatch, lambda: {PROGRESS[0]: time.monotonic()}, lambda: pytest.fail("asked")
        )
        assert (trouble, asked) == (None, 0)

    def test_idle_server_is_asked_now_and_then(self, monkeypatch: pytest.MonkeyPatch) -> None:
        trouble, asked = self._run(monkeypatch, lambda: {PROGRESS[0]: 1.0}, lambda: None)
        assert trouble is None
        assert 3 <= asked <= 11

    @pytest.mark.parametrize("series", [{PROGRESS[0]: 1.0}, None])
    def test_no_token_is_trouble(
        self, monkeypatch: pytest.MonkeyPatch, series: dict[str, float] | None
    ) -> None:
        def none() -> None:
            raise StageError("UNAVAILABLE: full")

        trouble, asked = self._run(monkeypatch, lambda: series, none, for_s=5)
        assert trouble is not None
        assert trouble.startswith("no token came for")
        assert trouble.endswith("UNAVAILABLE: full")
        assert asked

    def test_engine_that_has_ended_is_trouble_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        series = {'minitron_engine_up{model="m"}': 0.0}
        assert self._run(monkeypatch, lambda: series, lambda: None, for_s=5)[0] == (
            "the engine's thread has ended"
        )

    def test_not_watched_unless_asked_for(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(watching, "read_progress", lambda server: pytest.fail("read"))
        TokenWatch(SERVER, lambda server, timeout_s: None, WatchSettings()).start()

    @pytest.mark.parametrize(("stall_s", "interval_s"), [(-1, 1), (10, 0), (5, 5)])
    def test_nonsense_is_refused(self, stall_s: float, interval_s: float) -> None:
        with pytest.raises(PlanError, match="-s "):
            WatchSettings(stall_s, interval_s)


class TestRestarts:
    def test_waits_grow_and_end(self) -> None:
        budget = RestartBudget(7)
        assert [budget.next_wait_s(0) for _ in range(8)] == [1, 2, 4, 8, 16, 30, 30, None]

    def test_long_service_is_rewarded(self) -> None:
        budget = RestartBudget(1)
        assert budget.next_wait_s(0) == 1
        assert budget.next_wait_s(FORGIVEN_AFTER_S) == 1
        assert budget.next_wait_s(FORGIVEN_AFTER_S - 1) is None

    @pytest.mark.parametrize("fields", [{"restarts": -1}, {"health_port": 0}])
    def test_nonsense_is_refused(self, fields: dict[str, int]) -> None:
        with pytest.raises(PlanError):
            Care(**fields)  # type: ignore[arg-type]


class TestEndpoint:
    def _get(self, port: int, path: str) -> tuple[int, dict[str, Any]]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())

    def test_ready_is_told_in_one_phase_only(self) -> None:
        (port,), state = free_ports(1), ServeState()
        with telling(state, "127.0.0.1", port):
            for phase in Phase:
                state.enter(phase, "why" if phase is Phase.RED else None)
                assert self._get(port, "/ready")[0] == (200 if phase is Phase.READY else 503)
                code, document = self._get(port, "/live")
                assert (code, document["state"]) == (200, phase.value)
                assert document["reason"] == ("why" if phase is Phase.RED else "")
                if phase is Phase.RED:
                    state.start_again("why")
                    state.enter(Phase.STARTING)
                    assert self._get(port, "/ready")[1]["reason"] == "why"
                    state.enter(Phase.READY)
                    document = self._get(port, "/ready")[1]
                    told = {name: document[name] for name in ("state", "reason", "restarts", "last_loss")}
                    assert told == {"state": "ready", "reason": "", "restarts": 1, "last_loss": "why"}
            assert self._get(port, "/else")[0] == 404
        with pytest.raises(urllib.error.URLError):
            self._get(port, "/live")

    def test_taken_port_is_refused(self) -> None:
        (port,) = free_ports(1)
        with (
            telling(ServeState(), "127.0.0.1", port),
            pytest.raises(MachineError, match="--health-port: cannot listen"),
            telling(ServeState(), "127.0.0.1", port),
        ):
            pass

    def test_no_port_tells_nobody(self) -> None:
        with telling(ServeState(), "127.0.0.1", None):
            pass


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1.0])
def test_seconds_that_are_no_seconds_are_refused(number: float, tmp_path: Path) -> None:
    with pytest.raises(PlanError, match="--stall-timeout-s"):
        WatchSettings(stall_timeout_s=number)
    with pytest.raises(PlanError, match="--probe-interval-s"):
        WatchSettings(probe_interval_s=number)
    with pytest.raises(PlanError, match="--drain-timeout-s"):
        ServerOptions(tmp_path, drain_timeout_s=number)
    with pytest.raises(PlanError, match="--start-timeout-s"):
        ServerOptions(tmp_path, start_timeout_s=number)
