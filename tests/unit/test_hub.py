"""A hub id is downloaded with the real huggingface_hub from a hub that runs in this process."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from minitron_build.errors import CheckpointError
from minitron_build.source.hub import resolve_checkpoint

COMMIT = "5205ef7" + "0" * 33
REPO = "owner/tiny"
DOWNLOAD = """
import sys
from minitron_build.errors import MinitronError
from minitron_build.source.hub import resolve_checkpoint
try:
    source = resolve_checkpoint(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
    print(source.hf_dir, source.revision)
except MinitronError as error:
    print(error)
"""


class FakeHub(ThreadingHTTPServer):
    """The two routes of the hub that a snapshot download uses: model info, and files with ranges."""

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {path.name: path.read_bytes() for path in folder.iterdir()}
        self.files["nemo/model.nemo"] = b"9 GB of nemo"
        self.asked: list[str] = []


class Handler(BaseHTTPRequestHandler):
    server: FakeHub

    def log_message(self, *_: object) -> None: ...

    def do_HEAD(self) -> None:
        self._answer(with_body=False)

    def do_GET(self) -> None:
        self._answer(with_body=True)

    def _answer(self, *, with_body: bool) -> None:
        path = self.path.split("?")[0]
        if path.startswith(f"/api/models/{REPO}"):
            known = "/revision/" not in path or path.endswith((COMMIT, "/main"))
            self._send(
                200 if known else 404, self._info() if known else b"{}", with_body, missing="RevisionNotFound"
            )
        elif path.startswith(f"/{REPO}/resolve/{COMMIT}/"):
            name = path.split(COMMIT + "/", 1)[1]
            self.server.asked.append(name)
            self._send(200, self.server.files[name], with_body)
        else:
            self._send(404, b"{}", with_body, missing="RepoNotFound")

    def _info(self) -> bytes:
        siblings = [{"rfilename": name} for name in self.server.files]
        return json.dumps({"id": REPO, "modelId": REPO, "sha": COMMIT, "siblings": siblings}).encode()

    def _send(self, status: int, body: bytes, with_body: bool, missing: str = "") -> None:
        self.send_response(status)
        if status == 404:
            self.send_header("X-Error-Code", missing)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{len(body)}-{sum(body) % 65521}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        if with_body:
            self.wfile.write(body)


@pytest.fixture
def hub(tiny_minitron: Path) -> Iterator[FakeHub]:
    with FakeHub(tiny_minitron) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def download(endpoint: str, cache: Path, *argv: str) -> str:
    """Run in a process of its own: huggingface_hub reads its environment at import."""
    environment = {
        "HF_ENDPOINT": endpoint,
        "HF_HOME": str(cache),
        "PATH": "/usr/bin",
        "HF_HUB_DISABLE_XET": "1",
    }
    command = [sys.executable, "-c", DOWNLOAD, *argv]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return answer.stdout.strip()


def endpoint_of(hub: FakeHub) -> str:
    return f"http://127.0.0.1:{hub.server_address[1]}"


def test_weights_and_tokenizer_at_one_commit(hub: FakeHub, tmp_path: Path, tiny_minitron: Path) -> None:
    folder, commit = download(endpoint_of(hub), tmp_path, REPO).split()
    assert commit == COMMIT
    assert {path.name for path in Path(folder).iterdir()} == {path.name for path in tiny_minitron.iterdir()}
    assert (Path(folder) / "model.safetensors").read_bytes() == (
        tiny_minitron / "model.safetensors"
    ).read_bytes()
    assert not any("nemo" in name for name in hub.asked)


def test_second_time_asks_for_no_file(hub: FakeHub, tmp_path: Path) -> None:
    download(endpoint_of(hub), tmp_path, REPO)
    hub.asked.clear()
    download(endpoint_of(hub), tmp_path, REPO)
    assert hub.asked == []


def test_offline_with_a_cache_uses_it(hub: FakeHub, tmp_path: Path) -> None:
    folder = download(endpoint_of(hub), tmp_path, REPO, COMMIT)
    assert download("http://127.0.0.1:9", tmp_path, REPO, COMMIT) == folder


def test_offline_without_a_cache_is_one_line(tmp_path: Path) -> None:
    line = download("http://127.0.0.1:9", tmp_path, REPO)
    assert "the Hugging Face hub cannot be reached" in line
    assert "no such folder" in line
    assert "--checkpoint DIR" in line
    assert "\n" not in line


def test_unknown_revision_and_repository(hub: FakeHub, tmp_path: Path) -> None:
    assert "no revision v9" in download(endpoint_of(hub), tmp_path, REPO, "v9")
    assert "no such repository" in download(endpoint_of(hub), tmp_path, "owner/other")


def test_folder_demo_and_neither(tiny_minitron: Path) -> None:
    assert resolve_checkpoint(str(tiny_minitron)).hf_dir == tiny_minitron
    assert (resolve_checkpoint("demo").name, resolve_checkpoint("demo").revision) == ("demo", None)
    with pytest.raises(CheckpointError, match="no such folder; expected a folder, OWNER/NAME"):
        resolve_checkpoint("./not/there")
    for empty in ("", " "):
        with pytest.raises(CheckpointError, match="no such folder"):
            resolve_checkpoint(empty)
    with pytest.raises(CheckpointError, match="--revision abc for the demo model"):
        resolve_checkpoint("demo", "abc")
    with pytest.raises(CheckpointError, match="--revision abc for a folder"):
        resolve_checkpoint(str(tiny_minitron), "abc")
