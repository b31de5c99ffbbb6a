"""`minitron serve` holds a bundle against the machine: what does not fit is refused before Triton starts.

The bundles are built with the stand-in for trtllm-build; nvidia-smi, packages and tritonserver are stand-ins.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gpu_machine import H100, GpuMachine, make_gpu_machine
from minitron_build.bundle.binding import check_backend
from minitron_build.bundle.bundle import MODEL_REPO_DIR, Bundle
from minitron_build.bundle.manifest import digest_file
from minitron_build.cli import main
from minitron_build.errors import MachineError
from minitron_build.serving import serve
from minitron_build.serving.triton_preflight import TRITONSERVER_VARIABLE, TritonInstall
from minitron_build.serving.triton_server import ServerOptions

DATA = Path(__file__).parents[1] / "golden" / "data"
A100 = ("NVIDIA A100-SXM4-80GB", "8.0", 81920, 80000)
L40S = ("NVIDIA L40S", "8.9", 46068, 45000)
ENGINE = f"{MODEL_REPO_DIR}/tensorrt_llm/1"

EditJson = Callable[[Path, dict[str, Any]], None]
Serve = Callable[..., str]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A shared root: hopper at one rank and at two, ada, and the CPU."""
    root = tmp_path_factory.mktemp("built")
    with pytest.MonkeyPatch.context() as monkeypatch:
        machine = make_gpu_machine(root / "machine", monkeypatch)
        machine.add_tool()
        for arch, gpu, tp_size in (("hopper", H100, 1), ("hopper", H100, 2), ("ada", L40S, 1)):
            machine.add_gpus(gpu)
            build(root / "root" / f"{arch}-tp{tp_size}", arch, "--tp-size", str(tp_size))
        build(root / "root" / "cpu", "cpu")
    return root / "root"


def build(bundle: Path, arch: str, *flags: str) -> None:
    wanted = ("--arch", arch, "--precision", "bf16", "--max-batch-size", "8", *flags)
    assert (
        main(["build", "--checkpoint", str(DATA / "tiny_minitron"), "--output-dir", str(bundle), *wanted])
        == 0
    )


@pytest.fixture
def copy(root: Path, tmp_path: Path) -> Path:
    """A copy of the root that a test may break."""
    return Path(shutil.copytree(root, tmp_path / "root"))


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> GpuMachine:
    """A machine with a tritonserver for both kinds of bundle and mpirun, but no GPU and no TensorRT-LLM."""
    machine = make_gpu_machine(tmp_path / "machine", monkeypatch)
    for name in ("python", "tensorrtllm"):
        (tmp_path / "triton" / "backends" / name).mkdir(parents=True)
    binary = tmp_path / "triton" / "bin" / "tritonserver"
    binary.parent.mkdir()
    for program in (binary, machine.bin_dir / "mpirun", machine.bin_dir / "bash"):
        program.write_text("#!/bin/false\n")
        program.chmod(0o755)
    monkeypatch.setenv(TRITONSERVER_VARIABLE, str(binary))
    return machine


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[ServerOptions]:
    """What Triton would have been started with."""
    seen: list[ServerOptions] = []
    monkeypatch.setattr(serve, "serve", lambda options, probe, announce, care: seen.append(options) or 0)
    return seen


@pytest.fixture
def refusal(started: list[ServerOptions], capsys: pytest.CaptureFixture[str]) -> Serve:
    """Serve what must be refused: the one line."""

    def run(path: Path, *flags: str) -> str:
        assert main(["serve", str(path), *flags]) == 1
        out, err = capsys.readouterr()
        assert (out, started) == ("", [])
        assert err.count("\n") == 1, err
        return err.strip()

    return run


def test_bundle_that_fits_is_started(
    root: Path, machine: GpuMachine, started: list[ServerOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    machine.add_gpus(H100, H100)
    machine.add_tool()
    for name, world_size in (("hopper-tp1", 1), ("hopper-tp2", 2)):
        assert main(["serve", str(root / name)]) == 0, capsys.readouterr().err
        assert started[-1].model_repo == root / name / MODEL_REPO_DIR
        assert started[-1].world_size == world_size
        assert started[-1].start_timeout_s >= 120


def test_start_timeout_that_is_given_counts(
    root: Path, machine: GpuMachine, started: list[ServerOptions]
) -> None:
    machine.add_gpus(H100)
    machine.add_tool()
    assert main(["serve", str(root / "hopper-tp1"), "--start-timeout-s", "7"]) == 0
    assert started[-1].start_timeout_s == 7


def test_cpu_bundle_needs_no_gpu(root: Path, machine: GpuMachine, started: list[ServerOptions]) -> None:
    assert main(["serve", str(root / "cpu")]) == 0
    assert started[-1].world_size == 1


def test_another_sm(root: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_gpus(A100)
    machine.add_tool()
    assert refusal(root / "hopper-tp1") == (
        "minitron: GPU 0 of this machine: NVIDIA A100-SXM4-80GB is SM 80, and rank 0 would run on it; "
        "expected SM 90 (hopper), which the engine was built for; "
        "serve a bundle built with --arch auto on this machine"
    )


def test_mixed_gpus_name_the_ones_to_leave(root: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_gpus(H100, A100, H100)
    machine.add_tool()
    line = refusal(root / "hopper-tp2")
    assert "GPU 1 of this machine: NVIDIA A100-SXM4-80GB is SM 80, and rank 1" in line
    assert line.endswith("set CUDA_VISIBLE_DEVICES=GPU-0a-b,GPU-2a-b")


def test_variable_it_names_is_enough(root: Path, machine: GpuMachine, started: list[ServerOptions]) -> None:
    machine.add_gpus(H100, A100, H100)
    machine.add_tool()
    machine.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "GPU-0a-b,GPU-2a-b")
    assert main(["serve", str(root / "hopper-tp2")]) == 0
    assert started[-1].world_size == 2


def test_no_gpu(root: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_tool()
    line = refusal(root / "hopper-tp1")
    assert "no NVIDIA GPU that a program can use; expected 1 of SM 90 (hopper)" in line
    assert line.endswith("serve a bundle built with --arch cpu")


def test_fewer_gpus_than_ranks(root: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_gpus(H100, H100)
    machine.add_tool()
    machine.monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    line = refusal(root / "hopper-tp2")
    assert (
        f"1 x {H100[0]} (SM 90) that a program can use; expected 2 of SM 90 (hopper) for tp 2 x pp 1" in line
    )
    assert line.endswith("build with a smaller --tp-size, or unset CUDA_VISIBLE_DEVICES=1")


def test_old_driver(root: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_gpus(H100, driver="550.54.15")
    machine.add_tool()
    assert "NVIDIA driver 550.54.15; expected 580 or later" in refusal(root / "hopper-tp1")


@pytest.mark.parametrize(
    ("versions", "words"),
    [
        (
            ("1.2.0", "10.14.1.48"),
            "TensorRT-LLM 1.2.0; expected 1.2.1; an engine runs only under the version",
        ),
        (("1.3.0", "10.14.1.48"), "TensorRT-LLM 1.3.0 has no TensorRT engine path"),
        (("1.2.1", "10.13.3.9"), "TensorRT 10.13.3.9; expected 10.14.1.48, which built the engine"),
    ],
)
def test_other_versions_here(
    root: Path, machine: GpuMachine, refusal: Serve, versions: tuple[str, str], words: str
) -> None:
    machine.add_gpus(H100)
    machine.add_tool(*versions)
    line = refusal(root / "hopper-tp1")
    assert f"{machine.bin_dir / 'trtllm-build'}: {words}" in line
    assert "nvcr.io/nvidia/tritonserver:" in line


def test_repackaged_versions_are_the_same(
    root: Path, machine: GpuMachine, started: list[ServerOptions]
) -> None:
    machine.add_gpus(H100)
    machine.add_tool("1.2.1+cu131", "10.14.1.48.post1")
    assert main(["serve", str(root / "hopper-tp1")]) == 0


def test_versions_that_nothing_tells(root: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_gpus(H100)
    assert "no TensorRT-LLM that tells its version; expected TensorRT-LLM 1.2.1" in refusal(
        root / "hopper-tp1"
    )


def test_versions_without_the_build_tool(
    copy: Path, machine: GpuMachine, started: list[ServerOptions]
) -> None:
    """A serving image need not hold trtllm-build: its Python tells."""
    machine.add_gpus(H100)
    machine.add_tool()
    (machine.bin_dir / "trtllm-build").unlink()
    assert main(["serve", str(copy / "hopper-tp1")]) == 0


def test_engine_of_an_older_toolkit_is_held_to_its_own_versions(
    copy: Path, machine: GpuMachine, refusal: Serve, edit_json: EditJson
) -> None:
    """What counts is what built the engine, not what this toolkit would build with."""
    engine = copy / "hopper-tp1" / ENGINE
    edit_json(engine / "config.json", {"version": "1.1.0"})
    record = json.loads((engine / "engine.json").read_text())
    record["versions"]["tensorrt_llm"] = "1.1.0"
    record["files"]["config.json"]["size_bytes"] = (engine / "config.json").stat().st_size
    (engine / "engine.json").write_text(json.dumps(record))
    machine.add_gpus(H100)
    machine.add_tool()
    assert "TensorRT-LLM 1.2.1; expected 1.1.0, which built the engine" in refusal(copy / "hopper-tp1")


def test_rank_of_another_tensorrt(copy: Path, machine: GpuMachine, refusal: Serve) -> None:
    """The first bytes of a plan file tell, before gigabytes are hashed."""
    rank = copy / "hopper-tp2" / ENGINE / "rank1.engine"
    content = bytearray(rank.read_bytes())
    content[25] -= 1
    rank.write_bytes(content)
    machine.add_gpus(H100, H100)
    machine.add_tool()
    line = refusal(copy / "hopper-tp2")
    assert "rank1.engine: TensorRT 10.13.1.48 wrote it; expected 10.14.1.48, as engine.json says" in line


def test_rank_that_is_missing(copy: Path, machine: GpuMachine, refusal: Serve) -> None:
    (copy / "hopper-tp2" / ENGINE / "rank1.engine").unlink()
    machine.add_gpus(H100, H100)
    machine.add_tool()
    assert "expected 2 rank files (tp 2 x pp 1)" in refusal(copy / "hopper-tp2")


def test_record_without_versions(
    copy: Path, machine: GpuMachine, refusal: Serve, edit_json: EditJson
) -> None:
    edit_json(copy / "hopper-tp1" / ENGINE / "engine.json", {"versions": {}})
    assert "engine.json does not tell the tensorrt_llm version" in refusal(copy / "hopper-tp1")


def test_changed_byte_is_found_last(
    copy: Path, machine: GpuMachine, started: list[ServerOptions], capsys: pytest.CaptureFixture[str]
) -> None:
    rank = copy / "hopper-tp1" / ENGINE / "rank0.engine"
    content = bytearray(rank.read_bytes())
    content[-1] ^= 1
    rank.write_bytes(content)
    machine.add_gpus(H100)
    machine.add_tool()
    assert main(["serve", str(copy / "hopper-tp1")]) == 1
    assert "rank0.engine: other bytes than when it was built" in capsys.readouterr().err.splitlines()[-1]
    assert started == []
    assert main(["serve", str(copy / "hopper-tp1"), "--skip-hashes"]) == 0


def test_ranks_without_mpirun(copy: Path, machine: GpuMachine, refusal: Serve) -> None:
    machine.add_gpus(H100, H100)
    machine.add_tool()
    (machine.bin_dir / "mpirun").unlink()
    assert (
        "this machine: no mpirun on PATH; expected Open MPI's, which starts the engine's 2 ranks"
        in refusal(copy / "hopper-tp2")
    )


def _install(root: Path, *backends: str) -> TritonInstall:
    for name in backends:
        (root / "backends" / name).mkdir(parents=True)
    return TritonInstall(root / "bin" / "tritonserver", "a test")


def test_gpu_bundle_without_its_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        MachineError, match=r"no tensorrtllm backend, and the bundle's engine is for hopper; .*container"
    ):
        check_backend("hopper", _install(tmp_path, "python"))


def test_cpu_bundle_without_the_python_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no python backend"):
        check_backend("cpu", _install(tmp_path, "tensorrtllm"))


def test_executor_bundle_without_the_python_backend_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineError, match="no python backend, and the bundle's engine is for hopper"):
        check_backend("hopper", _install(tmp_path, "tensorrtllm"), "executor")


@pytest.mark.parametrize(
    ("arch", "backend", "engine_backend"),
    [("cpu", "python", "cpp"), ("ada", "tensorrtllm", "cpp"), ("ada", "python", "executor")],
)
def test_bundle_with_its_backend_is_accepted(
    tmp_path: Path, arch: str, backend: str, engine_backend: str
) -> None:
    check_backend(arch, _install(tmp_path, backend), engine_backend)


def test_executor_bundle_needs_tensorrt_llm_in_tritons_python(
    machine: GpuMachine,
    tmp_path: Path,
    refusal: Serve,
    started: list[ServerOptions],
    capsys: pytest.CaptureFixture[str],
) -> None:
    machine.add_gpus(H100)
    machine.add_tool()
    bundle = tmp_path / "executor"
    build(bundle, "hopper", "--engine-backend", "executor")
    capsys.readouterr()
    (tmp_path / "triton" / "backends" / "tensorrtllm").rmdir()
    sentence = "no Python package tensorrt_llm, and the bundle's engine runs in Triton's Python backend"
    assert sentence in refusal(bundle)
    python = machine.bin_dir / "python3"
    python.write_text("#!/bin/sh\nexit 0\n")
    python.chmod(0o755)
    assert main(["serve", str(bundle)]) == 0, capsys.readouterr().err
    assert started[-1].model_repo == bundle / MODEL_REPO_DIR


def make_fp8(bundle: Path) -> None:
    """Whatever says of the bundle that it is bf16 says fp8."""
    raw = json.loads((bundle / "manifest.json").read_text())
    config = json.loads((bundle / ENGINE / "config.json").read_text())
    config["pretrained_config"]["quantization"]["quant_algo"] = "FP8"
    (bundle / ENGINE / "config.json").write_text(json.dumps(config))
    record = json.loads((bundle / ENGINE / "engine.json").read_text())
    record["files"]["config.json"] = digest_file(bundle / ENGINE / "config.json").as_dict()
    (bundle / ENGINE / "engine.json").write_text(json.dumps(record))
    for name in ("config.json", "engine.json"):
        raw["files"][f"{ENGINE}/{name}"] = digest_file(bundle / ENGINE / name).as_dict()
    (bundle / "manifest.json").write_text(json.dumps(raw | {"plan": raw["plan"] | {"precision": "fp8"}}))


PLANS = {
    "sm": ("hopper-tp1", {"sm": 100}, f"plan.sm is 100; expected 90, as {ENGINE}/engine.json says"),
    "no sm": ("hopper-tp1", {"sm": None}, f"plan.sm is None; expected 90, as {ENGINE}/engine.json says"),
    "sm of a cpu": (
        "cpu",
        {"sm": 90},
        f"plan.sm is 90; expected None, as {ENGINE}, which has no engine, says",
    ),
    "arch": ("hopper-tp1", {"arch": "ada"}, "plan.arch is ada; expected hopper, as the manifest's own arch"),
    "tp": ("hopper-tp2", {"tp_size": 1}, f"plan.tp_size is 1; expected 2, as {ENGINE}/config.json says"),
    "tp of a cpu": ("cpu", {"tp_size": 2}, "plan.tp_size is 2; expected 1, as checkpoint/config.json says"),
    "pp": ("hopper-tp1", {"pp_size": 2}, f"plan.pp_size is 2; expected 1, as {ENGINE}/config.json says"),
    "precision": ("ada-tp1", {"precision": "fp8"}, "plan.precision is fp8; expected bf16, as"),
    "kv": (
        "cpu",
        {"kv_cache_dtype": "fp8"},
        "plan.kv_cache_dtype is fp8; expected bf16, as checkpoint/config",
    ),
}


@pytest.mark.parametrize("name", PLANS)
def test_a_plan_that_is_not_of_the_bundles_files_is_refused(
    name: str, copy: Path, machine: GpuMachine, refusal: Serve, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, changes, said = PLANS[name]
    manifest = copy / folder / "manifest.json"
    raw = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(raw | {"plan": raw["plan"] | changes}))
    if folder != "cpu":
        machine.add_gpus(L40S if folder.startswith("ada") else H100, H100)
        machine.add_tool()
    assert f"{manifest}: {said}" in refusal(copy / folder)
    capsys.readouterr()
    assert main(["inspect", str(copy / folder), "--skip-hashes"]) == 1
    assert f"{manifest}: {said}" in capsys.readouterr().err


def test_deploy_refuses_a_plan_of_another_engine(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    manifest = copy / "hopper-tp2" / "manifest.json"
    manifest.write_text(manifest.read_text().replace('"tp_size": 2', '"tp_size": 1'))
    capsys.readouterr()
    assert main(["deploy", str(copy / "hopper-tp2"), "--compose", str(copy / "minitron.yaml")]) == 1
    assert "plan.tp_size is 1; expected 2, as" in capsys.readouterr().err
    assert not (copy / "minitron.yaml").exists()


LINKS = ("model_repo", "model_repo/preprocessing", "model_repo/preprocessing/1/tokenizer.json")


@pytest.mark.parametrize("flags", [(), ("--skip-hashes",)])
@pytest.mark.parametrize("name", LINKS)
def test_inspect_sees_a_link(
    name: str, flags: tuple[str, ...], copy: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (copy / "cpu" / name).rename(tmp_path / "elsewhere")
    (copy / "cpu" / name).symlink_to(tmp_path / "elsewhere")
    capsys.readouterr()
    assert main(["inspect", str(copy / "cpu"), *flags]) == 1
    assert capsys.readouterr().err == (
        f"minitron: {copy / 'cpu'}: {name}: a link to {tmp_path / 'elsewhere'}; expected the bundle "
        "as it was built; copy it with what its links lead to: cp -rL, rsync -L\n"
    )


def test_inspect_sees_another_model_that_is_a_link(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "cpu" / "model_repo" / "more").symlink_to(copy / "hopper-tp1")
    capsys.readouterr()
    assert main(["inspect", str(copy / "cpu")]) == 1
    assert "model_repo/more: a link to" in capsys.readouterr().err


def test_a_bundle_behind_a_link_is_a_bundle(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copy / "current").symlink_to(copy / "cpu", target_is_directory=True)
    assert main(["inspect", str(copy / "current")]) == 0
    assert "none missing, none extra" in capsys.readouterr().out


def test_inspect_compares_sizes_without_hashes(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with (copy / "cpu" / "model_repo" / "preprocessing" / "1" / "tokenizer.json").open("a") as file:
        file.write(" ")
    capsys.readouterr()
    assert main(["inspect", str(copy / "cpu"), "--skip-hashes"]) == 1
    assert "tokenizer.json: " in capsys.readouterr().err


class TestRoot:
    """Several bundles under one root."""

    @pytest.fixture
    def serve_root(
        self, machine: GpuMachine, started: list[ServerOptions], capsys: pytest.CaptureFixture[str]
    ) -> Callable[[Path], tuple[str, list[str]]]:
        """Serve a root: the name of the bundle that was started, and what was said."""

        def run(root: Path) -> tuple[str, list[str]]:
            assert main(["serve", str(root)]) == 0, capsys.readouterr().err
            return started[-1].model_repo.parent.name, capsys.readouterr().err.splitlines()

        return run

    def test_most_ranks_that_fit(
        self, root: Path, machine: GpuMachine, serve_root: Callable[[Path], tuple[str, list[str]]]
    ) -> None:
        machine.add_gpus(H100, H100)
        machine.add_tool()
        name, said = serve_root(root)
        assert name == "hopper-tp2"
        assert said[0].startswith("minitron: chosen hopper-tp2 (hopper, bf16, tp 2): fits 2 x NVIDIA H100")
        assert said[0].endswith("most ranks of those that do")
        assert [line.split(":")[1].strip() for line in said[1:4]] == [
            "not ada-tp1 (ada, bf16, tp 1)",
            "not cpu (cpu, bf16)",
            "not hopper-tp1 (hopper, bf16, tp 1)",
        ]
        assert "is SM 90, and rank 0 would run on it; expected SM 89 (ada)" in said[1]
        assert said[2].endswith(f"for the CPU, and this machine has 2 x {H100[0]} (SM 90)")
        assert "fits too, but hopper-tp2 comes first" in said[3]

    def test_fp8_comes_before_more_ranks(
        self, copy: Path, machine: GpuMachine, serve_root: Callable[[Path], tuple[str, list[str]]]
    ) -> None:
        make_fp8(copy / "hopper-tp1")
        machine.add_gpus(H100, H100)
        machine.add_tool()
        name, said = serve_root(copy)
        assert name == "hopper-tp1"
        assert said[0].endswith("and FP8 comes before bf16")

    @pytest.mark.parametrize(("gpu", "wanted"), [(H100, "hopper-tp1"), (L40S, "ada-tp1")])
    def test_the_gpu_at_hand(
        self,
        root: Path,
        machine: GpuMachine,
        serve_root: Callable[[Path], tuple[str, list[str]]],
        gpu: tuple[str, str, int, int],
        wanted: str,
    ) -> None:
        machine.add_gpus(gpu)
        machine.add_tool()
        name, said = serve_root(root)
        assert name == wanted
        assert f"the only one that fits 1 x {gpu[0]}" in said[0]

    def test_cpu_without_a_gpu(
        self, root: Path, machine: GpuMachine, serve_root: Callable[[Path], tuple[str, list[str]]]
    ) -> None:
        name, said = serve_root(root)
        assert name == "cpu"
        assert said[0] == "minitron: chosen cpu (cpu, bf16): there is no NVIDIA GPU here"

    def test_none_fits(self, root: Path, machine: GpuMachine, refusal: Serve) -> None:
        machine.add_gpus(A100)
        machine.add_tool()
        assert refusal(root).startswith(
            f"minitron: {root}: none of its bundles fits: ada-tp1 (ada, bf16, tp 1), cpu (cpu, bf16), "
            "hopper-tp1 (hopper, bf16, tp 1), hopper-tp2 (hopper, bf16, tp 2); "
            "expected one for 1 x NVIDIA A100-SXM4-80GB (SM 80)"
        )

    def test_two_that_fit_equally_well(self, copy: Path, machine: GpuMachine, refusal: Serve) -> None:
        shutil.copytree(copy / "hopper-tp1", copy / "other")
        machine.add_gpus(H100)
        machine.add_tool()
        line = refusal(copy)
        assert "hopper-tp1 and other fit this machine equally well" in line
        assert line.endswith(f"name one: minitron serve {copy / 'hopper-tp1'}")

    def test_unfinished_bundle_is_passed_over(
        self, copy: Path, machine: GpuMachine, serve_root: Callable[[Path], tuple[str, list[str]]]
    ) -> None:
        (copy / "hopper-tp2" / "manifest.json").unlink()
        (copy / "notes.txt").write_text("x")
        (copy / "logs").mkdir()
        machine.add_gpus(H100, H100)
        machine.add_tool()
        name, said = serve_root(copy)
        assert name == "hopper-tp1"
        assert any(
            line.startswith("minitron: not hopper-tp2 (unfinished): ")
            and line.endswith("expected a finished bundle; run the build command again: it resumes")
            for line in said
        )

    def test_broken_manifest_is_no_unfinished_bundle(
        self, copy: Path, machine: GpuMachine, serve_root: Callable[[Path], tuple[str, list[str]]]
    ) -> None:
        (copy / "hopper-tp2" / "manifest.json").write_text("{")
        machine.add_gpus(H100, H100)
        machine.add_tool()
        name, said = serve_root(copy)
        assert name == "hopper-tp1"
        (line,) = (line for line in said if "hopper-tp2" in line)
        assert line.startswith("minitron: not hopper-tp2 (unreadable): ")
        assert line.endswith("; copy the bundle again, or build it again")

    def test_only_unfinished_ones(self, copy: Path, machine: GpuMachine, refusal: Serve) -> None:
        for path in copy.iterdir():
            (path / "manifest.json").unlink()
        line = refusal(copy)
        assert "cpu (unfinished), hopper-tp1 (unfinished), hopper-tp2 (unfinished); expected one for" in line
        assert line.endswith(
            "finish ada-tp1 or cpu or hopper-tp1 or hopper-tp2: run its build command again, it resumes; "
            f"or build one here with --arch auto --output-dir {copy}/NAME"
        )

    def test_unfinished_beside_one_that_does_not_fit(
        self, copy: Path, machine: GpuMachine, refusal: Serve
    ) -> None:
        for name in ("ada-tp1", "cpu", "hopper-tp1"):
            shutil.rmtree(copy / name)
        shutil.copytree(copy / "hopper-tp2", copy / "another")
        (copy / "another" / "manifest.json").unlink()
        assert refusal(copy).endswith(
            f"finish another: run its build command again, it resumes; or build one here with --arch auto "
            f"--output-dir {copy}/NAME; minitron serve {copy / 'hopper-tp2'} tells why that one does not fit"
        )

    def test_folder_without_bundles(self, tmp_path: Path, refusal: Serve) -> None:
        (tmp_path / "empty").mkdir()
        assert "empty: neither a bundle nor a folder of bundles" in refusal(tmp_path / "empty")
        assert "nothing: no such folder; expected a bundle" in refusal(tmp_path / "nothing")

    def test_unfinished_bundle_by_name(self, copy: Path, refusal: Serve) -> None:
        (copy / "cpu" / "manifest.json").unlink()
        assert "manifest.json is missing; expected a finished bundle" in refusal(copy / "cpu")

    def test_nothing_is_built_into_a_root_or_a_bundle(
        self, root: Path, machine: GpuMachine, capsys: pytest.CaptureFixture[str]
    ) -> None:
        argv = ["build", "--arch", "cpu", "--checkpoint", str(DATA / "tiny_minitron"), "--output-dir"]
        capsys.readouterr()
        assert main([*argv, str(root)]) == 1
        assert capsys.readouterr().err.splitlines()[-1] == (
            f"minitron: {root}: a folder of bundles (ada-tp1, cpu, hopper-tp1, hopper-tp2); "
            f"expected a folder for one bundle; name it inside: --output-dir {root}/NAME"
        )
        assert main([*argv, str(root / "cpu" / "more")]) == 1
        assert f"inside the bundle {root / 'cpu'}; expected a folder of its own" in capsys.readouterr().err
        Bundle.load(root / "cpu").check_files()
