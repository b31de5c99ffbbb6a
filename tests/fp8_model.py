"""An independent Llama in float64 for FP8: calibrates a tiny checkpoint, writes it, and checks an engine.

Written from NVIDIA's rules alone (per-tensor E4M3, max calibration, one scale for q, k and v and one for gate
and up); no line of it is shared with the product.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

MODULES = ("attention.qkv", "attention.dense", "mlp.fc", "mlp.gate", "mlp.proj")
CALIBRATION_IDS = tuple((7 * n * n + 3 * n) % 500 for n in range(300))
# By dtype: how far beyond half a step a rounding may be off, as a part of the row's largest number, and the
# share of roundings that agree.
ROUNDING = {torch.float32: (1e-5, 0.999), torch.bfloat16: (2e-2, 0.8)}
ATTENTION_BLOCK_TOKENS = 32  # keeps a block of scores in the cache

Linear = Callable[[int, str, torch.Tensor], torch.Tensor]
KeysValues = Callable[[int, torch.Tensor], torch.Tensor]


def round_to_e4m3(x: torch.Tensor) -> torch.Tensor:
    """Nearest E4M3 number, ties to even, saturating; by arithmetic on float64 alone."""
    values = np.clip(x.double().numpy(), -448, 448)
    step = 2.0 ** (np.maximum(np.floor(np.log2(np.maximum(np.abs(values), 2.0**-20))), -6) - 3)
    return torch.from_numpy(np.rint(values / step) * step)


def e4m3_step(x: torch.Tensor) -> torch.Tensor:
    """Distance between the E4M3 numbers around `x`."""
    return 2.0 ** (x.abs().double().clamp_min(2.0**-20).log2().floor().clamp_min(-6) - 3)


@dataclass
class Float64Llama:
    """The family's forward pass over [tokens], its linear layers and its KV cache given from outside."""

    config: dict[str, Any]
    embedding: torch.Tensor
    norms: list[tuple[torch.Tensor, torch.Tensor]]
    final_norm: torch.Tensor
    head: torch.Tensor

    def logits(self, ids: list[int], linear: Linear, keys_values: KeysValues) -> torch.Tensor:
        """Logits of the last token, [vocab], and of nothing else."""
        x = self.embedding[ids].double()
        for layer, (input_norm, post_norm) in enumerate(self.norms):
            qkv = linear(layer, "attention.qkv", self._norm(x, input_norm))
            x = x + linear(layer, "attention.dense", self._attention(layer, qkv, keys_values))
            normed = self._norm(x, post_norm)
            fc, gate = linear(layer, "mlp.fc", normed), linear(layer, "mlp.gate", normed)
            x = x + linear(layer, "mlp.proj", fc * torch.sigmoid(fc) * gate)
        return self._norm(x[-1:], self.final_norm)[0] @ self.head.double().t()

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt() * weight.double()

    def _attention(self, layer: int, qkv: torch.Tensor, keys_values: KeysValues) -> torch.Tensor:
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        size, tokens = self.config["head_dim"], len(qkv)
        q, k, v = qkv.view(tokens, -1, size).split([heads, kv_heads, kv_heads], dim=1)
        q, k = self._rotate(q), self._rotate(k)
        k, v = keys_values(layer, torch.stack((k, v)))  # [tokens, kv_heads, size]
        k, v = (one.repeat_interleave(heads // kv_heads, dim=1).transpose(0, 1) for one in (k, v))
        out = []
        for start in range(0, tokens, ATTENTION_BLOCK_TOKENS):
            block = q[start : start + ATTENTION_BLOCK_TOKENS].transpose(0, 1)  # [heads, block, size]
            end = start + block.shape[1]
            scores = (block / size**0.5) @ k[:, :end].transpose(1, 2)
            scores[:, :, start:].masked_fill_(torch.ones(block.shape[1:2] * 2).triu(1).bool(), -torch.inf)
            out.append((scores.softmax(-1) @ v[:, :end]).transpose(0, 1).reshape(block.shape[1], -1))
        return torch.cat(out)

    def _rotate(self, x: torch.Tensor) -> torch.Tensor:
        """RoPE; frequencies and angles in float32, which is how the model is defined and matters at 8,192."""
        scaling, size = self.config["rope_scaling"], self.config["head_dim"]
        frequencies = 1.0 / self.config["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        turns = frequencies * scaling["original_max_position_embeddings"] / (2 * torch.pi)
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        smooth = ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = (1 - smooth) * frequencies / scaling["factor"] + smooth * frequencies
        angles = (torch.arange(len(x)).float()[:, None, None] * frequencies).double()
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


def read_hf(
    hf_dir: Path, num_layers: int | None = None
) -> tuple[Float64Llama, list[dict[str, torch.Tensor]]]:
    """The model, or its first layers, and each layer's bf16 weights by TensorRT-LLM's names."""
    config = json.loads((hf_dir / "config.json").read_text())
    config["num_hidden_layers"] = num_layers or config["num_hidden_layers"]
    tensors = load_file(hf_dir / "model.safetensors")
    weights, norms = [], []
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        part = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
        q, k, v, o = (part[f"self_attn.{name}_proj.weight"] for name in "qkvo")
        gate, up, down = (part[f"mlp.{name}_proj.weight"] for name in ("gate", "up", "down"))
        weights.append(dict(zip(MODULES, (torch.cat((q, k, v)), o, gate, up, down), strict=True)))
        norms.append((part["input_layernorm.weight"], part["post_attention_layernorm.weight"]))
    outer = (tensors[name] for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"))
    embedding, final_norm, head = outer
    return Float64Llama(config, embedding, norms, final_norm, head), weights


def calibrate(model: Float64Llama, weights: list[dict[str, torch.Tensor]]) -> dict[tuple[int, str], float]:
    """Activation amax of each linear layer's input over some ids, rounded to bf16."""
    amax: dict[tuple[int, str], float] = {}

    def linear(layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        amax[layer, name] = float(x.abs().max().bfloat16())
        return x @ weights[layer][name].double().t()

    model.logits(list(CALIBRATION_IDS), linear, lambda layer, keys_values: keys_values)
    return amax


@cache
def _calibrated(
    hf_dir: Path, num_layers: int | None
) -> tuple[Float64Llama, list[dict[str, torch.Tensor]], dict[tuple[int, str], float]]:
    model, weights = read_hf(hf_dir, num_layers)
    return model, weights, calibrate(model, weights)


def write_fp8_checkpoint(
    hf_dir: Path,
    out: Path,
    *,
    tp_size: int = 1,
    pp_size: int = 1,
    kv_scale: float | None = 1.0,
    excluded: tuple[str, ...] = (),
    num_layers: int | None = None,
) -> Path:
    """A TensorRT-LLM FP8 checkpoint as ModelOpt writes it.

    Args:
        excluded: modules that stay bf16, such as "0.attention.qkv".
        num_layers: how many of the model's layers; None: all.
    """
    model, weights, amax = _calibrated(hf_dir, num_layers)
    config = model.config
    out.mkdir(parents=True)
    per_stage = config["num_hidden_layers"] // pp_size
    for rank in range(tp_size * pp_size):
        stage, part = divmod(rank, tp_size)
        tensors: dict[str, torch.Tensor] = {}
        if stage == 0:
            tensors["transformer.vocab_embedding.weight"] = model.embedding.chunk(tp_size)[part]
        if stage == pp_size - 1:
            tensors["transformer.ln_f.weight"] = model.final_norm
            tensors["lm_head.weight"] = model.head.chunk(tp_size)[part]
        for local in range(per_stage):
            layer, prefix = stage * per_stage + local, f"transformer.layers.{local}."
            norms = zip(("input_layernorm", "post_layernorm"), model.norms[layer], strict=True)
            tensors.update({f"{prefix}{name}.weight": norm for name, norm in norms})
            scale_of = _weight_scales(weights[layer])
            for name in MODULES:
                weight = _part(config, name, weights[layer][name], part, tp_size)
                if f"{layer}.{name}" not in excluded:
                    tensors[f"{prefix}{name}.activation_scaling_factor"] = (
                        torch.tensor([amax[layer, name]]) / 448
                    )
                    tensors[f"{prefix}{name}.weights_scaling_factor"] = scale_of[name]
                    weight = (weight / scale_of[name]).to(torch.float8_e4m3fn)
                tensors[f"{prefix}{name}.weight"] = weight
            if kv_scale is not None:
                for which in ("kv", "k", "v"):
                    tensors[f"{prefix}attention.{which}_cache_scaling_factor"] = torch.tensor([kv_scale])
        save_file({name: one.clone() for name, one in tensors.items()}, out / f"rank{rank}.safetensors")
    _write_config(config, out, (tp_size, pp_size), kv_scale is not None, excluded)
    return out


def _weight_scales(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    scales = {name: weight.abs().max().float().reshape(1) / 448 for name, weight in weights.items()}
    merged = torch.maximum(scales["mlp.fc"], scales["mlp.gate"])
    return scales | {"mlp.fc": merged, "mlp.gate": merged}


def _part(config: dict[str, Any], name: str, weight: torch.Tensor, part: int, tp_size: int) -> torch.Tensor:
    if name in ("attention.dense", "mlp.proj"):
        return weight.chunk(tp_size, dim=1)[part]
    if name != "attention.qkv":
        return weight.chunk(tp_size)[part]
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    q, k, v = weight.split([config["num_attention_heads"] * size, kv_heads * size, kv_heads * size])
    copies = max(tp_size // kv_heads, 1)
    k, v = (one.view(kv_heads, size, -1).repeat_interleave(copies, dim=0).flatten(0, 1) for one in (k, v))
    return torch.cat([one.chunk(tp_size)[part] for one in (q, k, v)])


def _write_config(
    config: dict[str, Any], out: Path, mapping: tuple[int, int], fp8_kv: bool, excluded: tuple[str, ...]
) -> None:
    template = Path(__file__).parent / "golden" / "data" / "config_fp8_1x1.json"
    written = json.loads(template.read_text())
    assert written["hidden_size"] == config["hidden_size"]
    tp_size, pp_size = mapping
    written["num_hidden_layers"] = config["num_hidden_layers"]
    written["mapping"] = {"world_size": tp_size * pp_size, "tp_size": tp_size, "pp_size": pp_size}
    written["quantization"]["kv_cache_quant_algo"] = "FP8" if fp8_kv else None
    per_stage = config["num_hidden_layers"] // pp_size
    names = []
    for one in excluded:
        layer, name = one.split(".", 1)
        names.append(f"transformer.layers.{int(layer) % per_stage}.{name}")
    written["quantization"]["exclude_modules"] = ["lm_head", *names]
    (out / "config.json").write_text(json.dumps(written))


@dataclass
class Recorder:
    """Every rounding to E4M3 that an engine made, in order: what it stored."""

    codes: list[torch.Tensor] = field(default_factory=list)

    def wrap(self, quantize: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def recording(x: torch.Tensor, scaling_factor: float) -> torch.Tensor:
            rounded = quantize(x, scaling_factor)
            self.codes.append(rounded.cpu().double())
            return rounded

        return recording


def check_engine(
    hf_dir: Path,
    checkpoint_dir: Path,
    ids: list[int],
    recorder: Recorder,
    chunk_tokens: int,
    *,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Logits of the last token in float64, following the engine's own roundings after checking each of them.

    Two arithmetics may fall on different sides of a border between two E4M3 numbers. So each number the
    engine stored must be the nearest to what float64 gives, or as near as `dtype` can tell; then it is used.
    An engine casts the scaling factors of linear layers to its `dtype`.
    """
    slack_of_largest, share_equal = ROUNDING[dtype]
    num_layers = json.loads((checkpoint_dir / "config.json").read_text())["num_hidden_layers"]
    model, _ = read_hf(hf_dir, num_layers)
    stored = load_file(checkpoint_dir / "rank0.safetensors")
    has_fp8_kv = "transformer.layers.0.attention.kv_cache_scaling_factor" in stored
    per_chunk = _recorded_names(stored, num_layers, has_fp8_kv)
    chunks = -(-len(ids) // chunk_tokens)
    assert len(recorder.codes) == chunks * len(per_chunk)
    engine: dict[tuple[int, str], torch.Tensor] = {}
    for place, key in enumerate(per_chunk):
        dim = 2 if key[1] == "kv" else 0  # keys and values are [2, kv_heads, tokens, head_size]
        engine[key] = torch.cat(recorder.codes[place :: len(per_chunk)], dim=dim)

    def rounded(key: tuple[int, str], x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        exact = x / scale.double()
        limited = exact.clamp(-448, 448)
        slack = slack_of_largest * limited.abs().amax(-1, keepdim=True)
        assert ((engine[key] - limited).abs() <= e4m3_step(limited) / 2 + slack).all(), key
        assert (engine[key] == round_to_e4m3(exact)).double().mean() > share_equal, key
        return engine[key]

    def linear(layer: int, name: str, x: torch.Tensor) -> torch.Tensor:
        prefix = f"transformer.layers.{layer}.{name}."
        weight = stored[prefix + "weight"].double()
        if prefix + "weights_scaling_factor" not in stored:
            return x @ weight.t()
        names = ("activation_scaling_factor", "weights_scaling_factor")
        activation, weights = (stored[prefix + one].to(dtype).double() for one in names)
        return rounded((layer, name), x, activation) @ weight.t() * activation * weights

    def keys_values(layer: int, exact: torch.Tensor) -> torch.Tensor:
        if not has_fp8_kv:
            return exact
        scale = stored[f"transformer.layers.{layer}.attention.kv_cache_scaling_factor"]
        # [2, tokens, kv_heads, size] <-> [2, kv_heads, tokens, size]
        return rounded((layer, "kv"), exact.transpose(1, 2), scale).transpose(1, 2) * scale.double()

    return model.logits(ids, linear, keys_values)


def _recorded_names(
    stored: dict[str, torch.Tensor], num_layers: int, has_fp8_kv: bool
) -> list[tuple[int, str]]:
    """Layer and place of each rounding of one chunk, in the order in which any engine must make them."""
    names = []
    for layer in range(num_layers):
        order = ["attention.qkv", *(["kv"] if has_fp8_kv else []), *MODULES[1:]]
        names += [
            (layer, name)
            for name in order
            if name == "kv" or f"transformer.layers.{layer}.{name}.weights_scaling_factor" in stored
        ]
    return names
