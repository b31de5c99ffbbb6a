"""Keys, certificates and protocols before any server runs: what is refused, and which flags Triton gets.

Run with: pytest tests/unit/test_serving_security.py
"""

from __future__ import annotations

from pathlib import Path

import pytest
import trustme

from minitron_build.errors import MachineError, PlanError
from minitron_build.serving import serve
from minitron_build.serving.triton_preflight import TritonInstall
from minitron_build.serving.triton_security import ServerSecurity, read_key
from minitron_build.serving.triton_server import ServerOptions, _server_flags
from minitron_build.serving.watch import WatchSettings

KEY, OTHER_KEY = "a-key-of-enough-chars", "another-key-of-enough"


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture(scope="module")
def pem(authority: trustme.CA, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("tls")
    made = authority.issue_cert("127.0.0.1")
    paths = {name: folder / f"{name}.pem" for name in ("cert", "key", "ca", "other_key")}
    made.cert_chain_pems[0].write_to_path(paths["cert"])
    made.private_key_pem.write_to_path(paths["key"])
    authority.cert_pem.write_to_path(paths["ca"])
    authority.issue_cert("127.0.0.1").private_key_pem.write_to_path(paths["other_key"])
    return paths


class TestFlags:
    def test_nothing_asked_for_closes_what_changes_the_server(self) -> None:
        flags = ServerSecurity().flags()
        assert len(flags) == 2
        closed, _, secret = flags[0].partition(":minitron-admin-key=")
        assert closed == "--grpc-restricted-protocol=model-repository,trace,logging,shared-memory"
        assert (
            flags[1]
            == f"--http-restricted-api=model-repository,trace,logging,shared-memory:{_rest(flags[0])}"
        )
        assert len(secret) >= 32, "a key that nobody knows"
        assert secret not in ServerSecurity().flags()[0], "and is another each time"

    def test_keys_guard_text_and_control_apart(self) -> None:
        flags = ServerSecurity(api_key=KEY, admin_key=OTHER_KEY).flags()
        assert f"--grpc-restricted-protocol=inference,model-config,statistics:minitron-key={KEY}" in flags
        assert f"--http-restricted-api=inference,model-config,statistics:minitron-key={KEY}" in flags
        assert any(flag.endswith(f"minitron-admin-key={OTHER_KEY}") for flag in flags)

    def test_shared_memory_only_when_asked_for(self) -> None:
        flags = ServerSecurity(api_key=KEY, allow_shared_memory=True).flags()
        assert [flag for flag in flags if "shared-memory" in flag] == [
            f"--grpc-restricted-protocol=inference,model-config,statistics,shared-memory:minitron-key={KEY}",
            f"--http-restricted-api=inference,model-config,statistics,shared-memory:minitron-key={KEY}",
        ]

    def test_tls(self, pem: dict[str, Path]) -> None:
        one = ServerSecurity(tls_cert=pem["cert"], tls_key=pem["key"])
        assert f"--grpc-server-cert={pem['cert']}" in one.flags()
        assert not any("mutual" in flag for flag in one.flags())
        mutual = ServerSecurity(tls_cert=pem["cert"], tls_key=pem["key"], tls_ca=pem["ca"])
        assert {"--grpc-use-ssl-mutual=true", f"--grpc-root-cert={pem['ca']}"} <= set(mutual.flags())
        mutual.check_files()

    def test_http_stays_at_home_beside_tls(self, pem: dict[str, Path]) -> None:
        security = ServerSecurity(tls_cert=pem["cert"], tls_key=pem["key"])
        flags = _server_flags(ServerOptions(Path("r"), host="10.0.0.7", security=security), Path("r"), "p_")
        assert {"--grpc-address=10.0.0.7", "--http-address=127.0.0.1"} <= set(flags)

        flags = _server_flags(
            ServerOptions(Path("r"), host="10.0.0.7", http_host="127.0.0.1"), Path("r"), "p_"
        )
        assert {"--grpc-address=10.0.0.7", "--http-address=127.0.0.1"} <= set(flags)
        opened = ServerOptions(Path("r"), host="10.0.0.7", http_host="10.0.0.7", security=security)
        assert opened.http_address == "10.0.0.7", "asked for by name"

    def test_keys_are_not_in_the_words_of_an_error_or_a_log(self) -> None:
        assert KEY not in repr(ServerSecurity(api_key=KEY))

    @pytest.mark.parametrize(
        ("address", "is_open"),
        [("127.0.0.1", False), ("127.1.2.3", False), ("0.0.0.0", True), ("10.0.0.7", True)],
    )
    def test_openness(self, address: str, is_open: bool) -> None:
        assert ServerSecurity().is_open(address) is is_open
        assert not ServerSecurity(api_key=KEY).is_open(address)


def _rest(flag: str) -> str:
    return flag.partition(":")[2]


class TestRefusals:
    @pytest.mark.parametrize(
        ("fields", "words"),
        [
            ({"tls_cert": Path("c")}, "--tls-cert without --tls-key"),
            ({"tls_key": Path("k")}, "--tls-key without --tls-cert"),
            ({"tls_ca": Path("a")}, "--tls-ca without --tls-cert"),
            ({"api_key": "short"}, "a key of 5 characters; expected at least 16"),
            ({"admin_key": "sixteen chars,\n or more"}, "--admin-key-file: a key with other characters"),
            ({"api_key": KEY, "admin_key": KEY}, "the API key is also the admin key"),
        ],
    )
    def test_contradictions(self, fields: dict[str, Path | str], words: str) -> None:
        with pytest.raises(PlanError, match=words) as caught:
            ServerSecurity(**fields)  # type: ignore[arg-type]
        assert str(fields.get("api_key")) == KEY or str(fields.get("api_key")) not in str(caught.value)

    @pytest.mark.parametrize(
        ("cert", "key", "ca", "words"),
        [
            ("nowhere", "key", None, "--tls-cert: no file"),
            ("cert", "other_key", None, "no certificate and its key"),
            ("key", "cert", None, "no certificate and its key"),
            ("cert", "key", "key", "--tls-ca: .*holds no certificate"),
        ],
    )
    def test_files(
        self, pem: dict[str, Path], cert: str, key: str, ca: str | None, words: str, tmp_path: Path
    ) -> None:
        paths = {**pem, "nowhere": tmp_path / "none"}
        security = ServerSecurity(tls_cert=paths[cert], tls_key=paths[key], tls_ca=paths[ca] if ca else None)
        with pytest.raises(MachineError, match=words):
            security.check_files()


class TestKeys:
    def test_file_comes_before_the_environment(self, tmp_path: Path) -> None:
        file = tmp_path / "key"
        file.write_text(f"{KEY}\n")
        assert read_key(file, "V", {"V": OTHER_KEY}, "--f") == KEY
        assert read_key(None, "V", {"V": OTHER_KEY}, "--f") == OTHER_KEY
        assert read_key(None, "V", {}, "--f") is None

    def test_empty_or_missing_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "key").write_text("\n")
        with pytest.raises(PlanError, match="--f .*key: holds no key"):
            read_key(tmp_path / "key", "V", {}, "--f")
        with pytest.raises(PlanError, match="V: holds no key"):
            read_key(None, "V", {"V": ""}, "--f")
        with pytest.raises(MachineError, match="cannot be read .No such file"):
            read_key(tmp_path / "none", "V", {}, "--f")


def test_flags_reach_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    parser = argparse.ArgumentParser()
    serve.configure_parser(parser)
    (tmp_path / "key").write_text(KEY)
    monkeypatch.setenv("MINITRON_ADMIN_KEY", OTHER_KEY)
    words = "b --tls-cert c --tls-key k --tls-ca a --allow-shared-memory --log-prompts --restarts 5"
    words += " --stall-timeout-s 30 --probe-interval-s 3 --health-port 9"
    args = parser.parse_args([*words.split(), "--api-key-file", str(tmp_path / "key")])
    options = serve._options(args, tmp_path)
    assert options.security == ServerSecurity(Path("c"), Path("k"), Path("a"), KEY, OTHER_KEY, True)
    assert options.log_prompts
    care = serve._care(args)
    assert (care.restarts, care.watch, care.health_port) == (5, WatchSettings(30, 3), 9)


def test_http_of_the_wheels_triton_is_opened_by_its_own_flag_only(tmp_path: Path) -> None:
    (tmp_path / "python_backend_stubs").mkdir()
    wheel, container = (
        TritonInstall(tmp_path / name / "tritonserver", "a test") for name in ("bin", "x/bin")
    )
    assert [serve._http_host(None, install) for install in (wheel, container)] == ["127.0.0.1", None]
    assert [serve._http_host("0.0.0.0", install) for install in (wheel, container)] == ["0.0.0.0", "0.0.0.0"]


def test_open_server_is_warned_of(capsys: pytest.CaptureFixture[str]) -> None:
    serve._warn_if_open(ServerOptions(Path("r"), host="0.0.0.0"))
    assert "warning: whoever reaches 0.0.0.0" in capsys.readouterr().err
    serve._warn_if_open(ServerOptions(Path("r")))
    assert capsys.readouterr().err == ""
