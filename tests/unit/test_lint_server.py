"""What `minitron lint --command` says of a tritonserver command line, NVIDIA's habits and this toolkit's own.

Run with: pytest tests/unit/test_lint_server.py
"""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path

import pytest

from minitron_build.deploy.deployment import Access, server_argv
from minitron_build.errors import PlanError
from minitron_build.lint import lint_command
from minitron_build.lint.lint_server import ServerCommand, lint_server
from minitron_build.serving.triton_security import ServerSecurity
from minitron_build.serving.triton_server import LOAD_ALL_FLAGS, ServerOptions, _server_flags

CHECKOUT = Path(__file__).parents[2]
KEY = "a-key-of-enough-chars"
GUARDED = (
    "--grpc-restricted-protocol=shared-memory,model-repository,logging,trace:k=v "
    "--http-restricted-api=shared-memory,model-repository,logging,trace:k=v"
)


def found(text: str) -> list[str]:
    return [f"{one.key}: {one.found}" for one in lint_server(ServerCommand.parse(text))]


def test_the_usual_command_is_open_to_everybody() -> None:
    words = "\n".join(found("mpirun -n 1 /opt/tritonserver/bin/tritonserver --model-repository=repo"))
    for opening in (
        "grpc-address: whoever reaches 0.0.0.0 may have text generated",
        "http-address: whoever reaches 0.0.0.0 may have text generated",
        "grpc-use-ssl: gRPC is open without TLS",
        "http-address: HTTP is open, and has no TLS",
        "may have the server read and write shared memory",
        "may change the server's logging settings",
    ):
        assert opening in words
    assert "load models" not in words, "model control is off by default"


@pytest.mark.parametrize(
    ("flags", "opening"),
    [
        (
            "--grpc-address=127.0.0.1 --http-address 127.0.0.1 --grpc-restricted-protocol=inference:k=v",
            "shared",
        ),
        (f"{GUARDED} --http-address=127.0.0.1 --grpc-use-ssl=1", "grpc-address: whoever reaches 0.0.0.0"),
        (f"{GUARDED} --http-address=127.0.0.1 --grpc-use-ssl-mutual=1", None),
        (f"{GUARDED} --http-address=10.0.0.7 --allow-grpc=false", "http-address: whoever reaches 10.0.0.7"),
        (f"{GUARDED} --allow-http=false --grpc-address=127.0.0.1", None),
        (f"{GUARDED} --allow-http=0 --grpc-address=127.0.0.1 --model-control-mode=poll", "poll: whoever may"),
        ("--model-control-mode=explicit --allow-http=0 --grpc-address=127.0.0.1", "may load models"),
    ],
)
def test_each_opening(flags: str, opening: str | None) -> None:
    words = "\n".join(found(f"tritonserver {flags}"))
    assert (opening in words) if opening else words == ""


def test_what_serve_starts_is_closed() -> None:
    security = ServerSecurity()
    flags = _server_flags(ServerOptions(Path("r"), security=security), Path("r"), "p_")
    assert found(shlex.join(["tritonserver", *flags, *LOAD_ALL_FLAGS])) == []


def test_what_deploy_writes_is_closed_but_for_what_it_is_asked_for() -> None:
    closed = Access("admin", api_key="key", tls=True, http_address="127.0.0.1")
    for world_size in (1, 2):
        assert found(shlex.join(server_argv(world_size, closed))) == []
    assert found(shlex.join(server_argv(1, Access("admin", http_address="127.0.0.1")))) == [
        "grpc-address: whoever reaches 0.0.0.0 may have text generated",
        "grpc-use-ssl: gRPC is open without TLS: prompts, texts and keys can be read",
    ]


@pytest.mark.parametrize(
    ("text", "words"), [("trtllm-serve x", "no tritonserver in"), ("tritonserver 'x", "No closing quotation")]
)
def test_what_is_no_command_is_refused(text: str, words: str) -> None:
    with pytest.raises(PlanError, match=f"--command: {words}"):
        ServerCommand.parse(text)


def test_findings_join_those_of_the_repository(capsys: pytest.CaptureFixture[str]) -> None:
    parser = argparse.ArgumentParser()
    lint_command.configure_parser(parser)
    repo = str(CHECKOUT / "model_repo")
    assert lint_command.run(parser.parse_args([repo, "--json", "--command", "tritonserver --x"])) == 0
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert document["warnings"] == len(document["findings"]) > 5
    assert {one["file"] for one in document["findings"]} == {"tritonserver"}
