"""FP8 checkpoints in the reference engine: mappings, batches, exclusions, memory, and what is refused.

Run: pytest tests/unit/test_reference_engine_fp8.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
import torch
from safetensors.torch import load_file, save_file

from fp8_model import write_fp8_checkpoint
from minitron_build.checkpoint import contract
from minitron_build.runtime.reference_engine import (
    EngineLimits,
    EngineOutput,
    GenerationRequest,
    LlamaModel,
    ReferenceEngine,
    SamplingConfig,
    UnsupportedCheckpointError,
    open_checkpoint,
)
from minitron_build.runtime.reference_engine.quantization import Quantization

IDS = [508, *range(1, 60)]
LAYER = "transformer.layers.0."
ONE = torch.ones(1)


@pytest.fixture
def fp8(tiny_minitron: Path, tmp_path: Path) -> Path:
    return write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8")


def edit_rank(checkpoint: Path, change: Callable[[dict[str, torch.Tensor]], None], rank: int = 0) -> None:
    path = checkpoint / f"rank{rank}.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors)
    path.unlink()
    save_file(tensors, path)


def rename(old: str, new: str) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


@pytest.mark.parametrize(("tp_size", "pp_size"), [(2, 1), (1, 2), (2, 2), (4, 1)])
def test_every_mapping_gives_the_same_bits(
    tiny_minitron: Path, fp8: Path, tmp_path: Path, tp_size: int, pp_size: int
) -> None:
    cut = write_fp8_checkpoint(tiny_minitron, tmp_path / "cut", tp_size=tp_size, pp_size=pp_size)
    expected = LlamaModel(fp8, max_seq_len=64).last_logits(IDS)
    assert torch.equal(LlamaModel(cut, max_seq_len=64).last_logits(IDS), expected)


@pytest.mark.parametrize(
    ("kv_scale", "compute_dtype", "keeps_fp8_bytes"),
    [(None, "float32", False), (1.0, "float32", False), (1.0, "bfloat16", False), (1.0, "bfloat16", True)],
)
def test_a_request_has_the_same_bits_alone_and_in_any_company(
    tiny_minitron: Path, tmp_path: Path, kv_scale: float | None, compute_dtype: str, keeps_fp8_bytes: bool
) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=kv_scale)
    limits = EngineLimits(max_batch_size=32, max_input_len=400, max_seq_len=600, max_num_tokens=512)
    engine = ReferenceEngine(checkpoint, limits, compute_dtype=compute_dtype, keeps_fp8_bytes=keeps_fp8_bytes)

    def run(numbers: list[int]) -> dict[str, list[tuple[int, bytes]]]:
        found: dict[str, list[tuple[int, bytes]]] = {str(number): [] for number in numbers}
        ended = {key: Event() for key in found}

        def on_output(output: EngineOutput) -> None:
            assert output.generation_logits is not None
            found[output.key].append((output.token_ids[0], output.generation_logits.tobytes()))
            if output.finish_reason:
                ended[output.key].set()

        for number in numbers:
            prompt = tuple((number * n + 3) % 500 for n in range(1 + 53 * number % 390))
            sampling = SamplingConfig(top_k=20, seed=number)
            request = GenerationRequest(str(number), prompt, 6, None, sampling, return_generation_logits=True)
            engine.submit(request, on_output)
        assert all(event.wait(60) for event in ended.values())
        return found

    try:
        together = run(list(range(24)))
        for number in (0, 7, 8, 23):
            assert run([number])[str(number)] == together[str(number)]
    finally:
        engine.close()


def test_the_kv_cache_takes_one_byte_a_number(tiny_minitron: Path, tmp_path: Path) -> None:
    numbers = 2 * 4 * 2 * 16
    for kv_scale, compute_dtype, num_bytes in (
        (1.0, "float32", 1),
        (1.0, "bfloat16", 1),
        (None, "float32", 4),
        (None, "bfloat16", 2),
    ):
        checkpoint = write_fp8_checkpoint(
            tiny_minitron, tmp_path / f"{kv_scale}{compute_dtype}", kv_scale=kv_scale
        )
        model = LlamaModel(checkpoint, max_seq_len=64, compute_dtype=compute_dtype)
        assert model.kv_bytes_per_token == numbers * num_bytes


def test_bfloat16_stays_close_to_float32(fp8: Path) -> None:
    wide, narrow = (
        LlamaModel(fp8, max_seq_len=64, compute_dtype=dtype).last_logits(IDS)
        for dtype in ("float32", "bfloat16")
    )
    # Some numbers fall on the other side of a border between two E4M3 numbers.
    assert (wide - narrow).norm() < 0.1 * wide.norm()


def test_fp8_bytes_called_int8_are_read(fp8: Path) -> None:
    expected = LlamaModel(fp8, max_seq_len=64).last_logits(IDS)

    def as_int8(tensors: dict[str, torch.Tensor]) -> None:
        fp8_only = {name: one for name, one in tensors.items() if one.dtype == torch.float8_e4m3fn}
        tensors.update({name: one.view(torch.int8) for name, one in fp8_only.items()})

    edit_rank(fp8, as_int8)
    assert torch.equal(LlamaModel(fp8, max_seq_len=64).last_logits(IDS), expected)


@pytest.mark.parametrize("kept", [("kv",), ("k", "v"), ("kv", "k"), ("kv", "kv_cache_rcp")])
def test_kv_scales_are_read_in_each_form_tensorrt_llm_reads(fp8: Path, kept: tuple[str, ...]) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            prefix = f"transformer.layers.{layer}.attention."
            for which, value in (("kv", 0.5), ("k", 0.25), ("v", 0.5)):
                del tensors[f"{prefix}{which}_cache_scaling_factor"]
                if which in kept:
                    tensors[f"{prefix}{which}_cache_scaling_factor"] = ONE * value
            if "kv_cache_rcp" in kept:
                tensors[f"{prefix}kv_cache_rcp_scaling_factor"] = ONE * 2

    edit_rank(fp8, change)
    assert open_checkpoint(fp8).layer(0).kv_cache_scale == 0.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda tensors: tensors.pop(LAYER + "attention.qkv.activation_scaling_factor"),
            "lacks transformer.layers.0.attention.qkv.activation_scaling_factor",
        ),
        (
            lambda tensors: tensors.pop(LAYER + "mlp.fc.weights_scaling_factor"),
            "lacks transformer.layers.0.mlp.fc",
        ),
        (
            lambda tensors: [
                tensors.pop(f"{LAYER}attention.{which}_cache_scaling_factor") for which in ("kv", "k")
            ],
            "lacks transformer.layers.0.attention.kv_cache_scaling_factor",
        ),
        (
            lambda tensors: tensors.update({"lm_head.weights_scaling_factor": ONE}),
            "has unknown lm_head.weights_scaling_factor",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.weights_scaling_factor": torch.ones(2)}),
            "weights_scaling_factor is F32 [2]; expected F32 [1]",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.weights_scaling_factor": ONE.bfloat16()}),
            "weights_scaling_factor is BF16 [1]; expected F32 [1]",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.weights_scaling_factor": ONE * 0}),
            "mlp.fc.weights_scaling_factor is 0; expected a positive number",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.activation_scaling_factor": -ONE}),
            "activation_scaling_factor is -1; expected a positive number",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.activation_scaling_factor": ONE * float("nan")}),
            "activation_scaling_factor is nan; expected a positive number",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.activation_scaling_factor": ONE * float("inf")}),
            "activation_scaling_factor is inf; expected a positive number",
        ),
        (
            lambda tensors: tensors.update({LAYER + "attention.kv_cache_scaling_factor": ONE * 3}),
            "kv_cache_scaling_factor is 3; expected 1, the larger of those of keys and values",
        ),
        (
            lambda tensors: tensors.update({LAYER + "attention.kv_cache_rcp_scaling_factor": ONE * 3}),
            "kv_cache_rcp_scaling_factor is 3; expected 1, 1 / attention.kv_cache_scaling_factor",
        ),
        (
            lambda tensors: tensors.update({LAYER + "mlp.fc.weight": torch.zeros(288, 96).bfloat16()}),
            "mlp.fc.weight is BF16 [288, 96]; expected F8_E4M3 [288, 96]",
        ),
        (
            lambda tensors: tensors.update(
                {LAYER + "mlp.fc.weight": torch.zeros(288, 96).to(torch.float8_e5m2)}
            ),
            "mlp.fc.weight is F8_E5M2 [288, 96]; expected F8_E4M3",
        ),
        (
            lambda tensors: tensors[LAYER + "mlp.fc.weight"].view(torch.uint8)[0, 0].fill_(0x7F),
            "mlp.fc.weight holds NaN; calibrate the checkpoint again",
        ),
    ],
)
def test_wrong_scales_and_weights_are_refused(
    fp8: Path, change: Callable[[dict[str, torch.Tensor]], None], message: str
) -> None:
    edit_rank(fp8, change)
    with pytest.raises(UnsupportedCheckpointError) as caught:
        LlamaModel(fp8, max_seq_len=64)
    assert message in str(caught.value)
    assert "rank0.safetensors" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_scales_that_differ_between_ranks_are_refused(tiny_minitron: Path, tmp_path: Path) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", tp_size=2)
    edit_rank(
        checkpoint, lambda tensors: tensors[LAYER + "mlp.proj.weights_scaling_factor"].fill_(9.0), rank=1
    )
    with pytest.raises(
        UnsupportedCheckpointError, match=r"rank1.*mlp.proj.weights_scaling_factor is 9; expected"
    ):
        LlamaModel(checkpoint, max_seq_len=64)


def test_kv_scales_without_an_fp8_cache_are_refused(tiny_minitron: Path, tmp_path: Path) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", kv_scale=None)
    edit_rank(checkpoint, lambda tensors: tensors.update({LAYER + "attention.kv_cache_scaling_factor": ONE}))
    with pytest.raises(UnsupportedCheckpointError, match="has unknown .*kv_cache_scaling_factor"):
        LlamaModel(checkpoint, max_seq_len=64)


def test_fc_and_gate_are_excluded_together(tiny_minitron: Path, tmp_path: Path) -> None:
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", excluded=("0.mlp.fc",))
    with pytest.raises(
        UnsupportedCheckpointError, match="one of .*mlp.fc and mlp.gate is FP8; expected both"
    ):
        LlamaModel(checkpoint, max_seq_len=64)


def edit_quantization(checkpoint: Path, **changes: object) -> None:
    path = checkpoint / "config.json"
    raw = json.loads(path.read_text())
    raw["quantization"].update(changes)
    path.write_text(json.dumps(raw))


def test_an_fp8_cache_with_bf16_weights(tiny_minitron: Path, tmp_path: Path) -> None:
    modules = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
    everything = tuple(f"{layer}.{name}" for layer in range(4) for name in modules)
    checkpoint = write_fp8_checkpoint(tiny_minitron, tmp_path / "fp8", excluded=everything)
    expected = LlamaModel(checkpoint, max_seq_len=64).last_logits(IDS)
    edit_quantization(checkpoint, quant_algo=None)
    model = LlamaModel(checkpoint, max_seq_len=64)
    assert model.kv_bytes_per_token == 2 * 4 * 2 * 16
    assert torch.equal(model.last_logits(IDS), expected)


def test_an_fp8_head_is_executed_when_nothing_excludes_it(fp8: Path) -> None:
    expected = LlamaModel(fp8, max_seq_len=64).last_logits(IDS)

    def quantize_head(tensors: dict[str, torch.Tensor]) -> None:
        head = tensors["lm_head.weight"]
        scale = head.abs().max().float().reshape(1) / 448
        tensors["lm_head.weight"] = (head / scale).to(torch.float8_e4m3fn)
        tensors["lm_head.weights_scaling_factor"] = scale
        tensors["lm_head.activation_scaling_factor"] = ONE * 0.02

    edit_rank(fp8, quantize_head)
    edit_quantization(fp8, exclude_modules=[])
    found = LlamaModel(fp8, max_seq_len=64).last_logits(IDS)
    assert not torch.equal(found, expected)
    assert (found - expected).abs().max() < 0.1 * expected.abs().max()


@pytest.mark.parametrize(
    ("patterns", "module", "is_fp8"),
    [
        (None, "lm_head", False),
        (None, "transformer.layers.3.mlp.fc", True),
        ([], "lm_head", True),
        (["lm_head"], "lm_head", False),
        (["head"], "lm_head", True),
        (["*lm_head"], "lm_head", False),
        (["LM_HEAD"], "lm_head", True),
        (["*.mlp.proj"], "transformer.layers.3.mlp.proj", False),
        (["*.mlp.proj"], "transformer.layers.3.mlp.fc", True),
        (["transformer.layers.1.*"], "transformer.layers.1.mlp.fc", False),
        (["transformer.layers.1.*"], "transformer.layers.11.mlp.fc", True),
        (["transformer.layers.1"], "transformer.layers.1.mlp.fc", True),
        (["transformer.layers.[01].attention.*"], "transformer.layers.0.attention.qkv", False),
        (["transformer.layers.?.attention.qkv"], "transformer.layers.10.attention.qkv", True),
    ],
)
def test_patterns_match_as_in_tensorrt_llm(patterns: list[str] | None, module: str, is_fp8: bool) -> None:
    quantization = Quantization("FP8", None, None if patterns is None else tuple(patterns))
    assert quantization.is_fp8(module) is is_fp8
    assert not Quantization(None, "FP8", quantization.exclude_modules).is_fp8(module)
    # The check before a build reads patterns by the same rule.
    block = {"quant_algo": "FP8", "exclude_modules": patterns}
    assert contract._is_quantized(module, block) is is_fp8
