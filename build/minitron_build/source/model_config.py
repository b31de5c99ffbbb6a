"""What a checkpoint's `config.json` says the model is.

Reads Hugging Face's file strictly, in both transformers styles (`rope_theta` + `rope_scaling` of 4.x,
`rope_parameters` of 5.x), and refuses what no later stage implements. It never derives what is written
(`head_dim` of this family is 128 although hidden_size / heads is 96) and knows nothing of tensors or files
other than `config.json` and `generation_config.json`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf
from pathlib import Path
from typing import Any

from minitron_build.errors import CheckpointError

ARCHITECTURE = "LlamaForCausalLM"
DTYPES = ("bfloat16", "float16", "float32")
ROPE_FIELDS = {
    "default": (),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
"""RoPE types that this toolkit converts and executes, with the numbers each needs."""


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A Llama-family model as its `config.json` describes it; words are Hugging Face's.

    Attributes:
        rope_scaling: the scaling block as written (key order kept, because TensorRT-LLM's converter keeps
            it), or None for unscaled RoPE.
        dtype: dtype of the source weights.
        eos_token_ids: one or more ids that end a text; the first is TensorRT-LLM's `end_id`.
        warnings: what a user of this family should know about this config, one sentence each.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope_theta: float
    rope_scaling: Mapping[str, Any] | None
    tie_word_embeddings: bool
    dtype: str
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    warnings: tuple[str, ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        for name in _COUNTS:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}", expected="a positive number")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads {self.num_key_value_heads}"
            )
        for name in ("rms_norm_eps", "rope_theta"):
            if not 0 < getattr(self, name) < inf:
                raise CheckpointError(f"{name} is {getattr(self, name)}", expected="a positive number")
        for token in self.eos_token_ids:
            if not 0 <= token < self.vocab_size:
                raise CheckpointError(f"eos_token_id {token} is outside the vocabulary of {self.vocab_size}")

    @property
    def q_size(self) -> int:
        """Rows of q_proj: heads x head_dim, which need not equal hidden_size."""
        return self.num_attention_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        """Rows of k_proj and of v_proj."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Parameters of the model; a tied lm_head counts once."""
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return self.num_hidden_layers * self.layer_parameters + embeddings + self.hidden_size

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        attention = self.hidden_size * 2 * (self.q_size + self.kv_size)
        return attention + 3 * self.hidden_size * self.intermediate_size + 2 * self.hidden_size

    @classmethod
    def read(cls, hf_dir: Path) -> ModelConfig:
        """Read `config.json` (and the end ids of `generation_config.json`) of a Hugging Face checkpoint.

        Raises:
            CheckpointError: a field is missing, has the wrong type, contradicts another, or describes
                something that this toolkit does not implement.
        """
        path = hf_dir / "config.json"
        generation_path = hf_dir / "generation_config.json"
        generation = read_json_object(generation_path) if generation_path.exists() else {}
        try:
            return cls.from_dict(read_json_object(path), generation)
        except CheckpointError as error:
            if error.where:
                raise
            raise CheckpointError(
                error.found, expected=error.expected, where=str(path), todo=error.todo
            ) from None

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], generation: Mapping[str, Any] | None = None) -> ModelConfig:
        """The config in a parsed `config.json`; see `read`."""
        _refuse_unsupported(raw)
        counts = {name: _required(raw, name, int) for name in _COUNTS if name != "head_dim"}
        theta, scaling = _read_rope(raw)
        return cls(
            **counts,
            head_dim=_read_head_dim(raw, counts),
            rms_norm_eps=float(_required(raw, "rms_norm_eps", float)),
            rope_theta=theta,
            rope_scaling=scaling,
            tie_word_embeddings=_optional(raw, "tie_word_embeddings", bool, False),
            dtype=_read_dtype(raw),
            bos_token_id=_optional(raw, "bos_token_id", int, None),
            eos_token_ids=_read_eos_ids(raw, generation or {}),
            warnings=_family_warnings(scaling, counts["max_position_embeddings"]),
        )


_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def read_json_object(path: Path, *, todo: str | None = None) -> dict[str, Any]:
    """A JSON object from a file.

    Args:
        todo: what helps when it is missing or broken; None for a file that was fetched from elsewhere.

    Raises:
        CheckpointError: no such file, not JSON, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(
            f"{path.name} is missing",
            where=str(path.parent),
            todo="is this a Hugging Face checkpoint folder?" if todo is None else todo,
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        todo = "fetch the file again" if todo is None else todo
        raise CheckpointError(f"not JSON: {error}", where=str(path), todo=todo) from None
    if not isinstance(value, dict):
        found = f"a JSON {type(value).__name__}"
        raise CheckpointError(found, expected="an object", where=str(path), todo=todo or "")
    return value


def _refuse_unsupported(raw: Mapping[str, Any]) -> None:
    """Whatever would change the forward pass and is not implemented here."""
    architectures = raw.get("architectures")
    if architectures != [ARCHITECTURE]:
        raise CheckpointError(
            f"architectures is {architectures!r}",
            expected=f"['{ARCHITECTURE}']",
            todo="this toolkit converts the Llama-3.1-Minitron family only",
        )
    for name, wanted in _FIXED.items():
        if name in raw and raw[name] not in wanted:
            raise CheckpointError(
                f"{name} is {raw[name]!r}",
                expected=repr(wanted[0]),
                todo="this variant of Llama is not implemented",
            )
    if raw.get("quantization_config") is not None:
        method = (raw["quantization_config"] or {}).get("quant_method", "unknown")
        raise CheckpointError(
            f"the weights are quantised already (quant_method {method!r})",
            expected="bfloat16, float16 or float32 weights",
            todo="give the checkpoint that this one was made from",
        )


_FIXED: dict[str, tuple[Any, ...]] = {
    "model_type": ("llama",),
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "bias": (False, None),
    "sliding_window": (None,),
    "partial_rotary_factor": (1.0, 1, None),
}
"""Fields with one meaning that is implemented; the first value is the one named to the user."""


def _read_head_dim(raw: Mapping[str, Any], counts: Mapping[str, int]) -> int:
    """`head_dim` as written; only configs older than the field leave it to hidden_size / heads."""
    written = raw.get("head_dim")
    if written is not None:
        return int(_required(raw, "head_dim", int))
    hidden, heads = counts["hidden_size"], counts["num_attention_heads"]
    if heads < 1 or hidden % heads:
        raise CheckpointError(f"head_dim is missing and hidden_size {hidden} is no multiple of {heads} heads")
    return hidden // heads


def _read_rope(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """(theta, scaling) from either style; a config that carries both must agree with itself."""
    styles = []
    if "rope_theta" in raw:
        theta = float(_required(raw, "rope_theta", float))
        styles.append((theta, _read_scaling(raw.get("rope_scaling"), "rope_scaling")))
    if raw.get("rope_parameters") is not None:
        parameters = dict(_required(raw, "rope_parameters", dict))
        theta = float(_required(parameters, "rope_theta", float, prefix="rope_parameters."))
        parameters.pop("rope_theta")
        styles.append((theta, _read_scaling(parameters, "rope_parameters")))
    if not styles:
        raise CheckpointError(
            "no RoPE base",
            expected="rope_theta, or rope_parameters with rope_theta",
            todo="a wrong base is silent until a long prompt, so none is assumed",
        )
    if any(style != styles[0] for style in styles):
        raise CheckpointError(
            "rope_theta/rope_scaling and rope_parameters disagree", todo="keep the right one of the two"
        )
    return styles[0]


def _read_scaling(block: object, name: str) -> dict[str, Any] | None:
    """The scaling block with `rope_type` spelt out; None for plain RoPE."""
    if block is None:
        return None
    if not isinstance(block, dict):
        raise CheckpointError(f"{name} is {block!r}", expected="an object or null")
    scaling = dict(block)
    old = scaling.pop("type", None)
    rope_type = scaling.setdefault("rope_type", old)
    if old is not None and rope_type != old:
        raise CheckpointError(
            f"{name} has type {old!r} and rope_type {rope_type!r}", todo="keep one of the two"
        )
    if rope_type not in ROPE_FIELDS:
        raise CheckpointError(
            f"{name} has the RoPE type {rope_type!r}",
            expected=" or ".join(repr(known) for known in ROPE_FIELDS),
            todo="other RoPE types are not implemented",
        )
    for key in ROPE_FIELDS[rope_type]:
        if not 0 < _required(scaling, key, float, prefix=f"{name}.") < inf:
            raise CheckpointError(f"{name}.{key} is {scaling[key]}", expected="a positive number")
    return None if rope_type == "default" else scaling


def _read_dtype(raw: Mapping[str, Any]) -> str:
    """`torch_dtype` (4.x) or `dtype` (5.x)."""
    values = {str(raw[name]) for name in ("torch_dtype", "dtype") if raw.get(name) is not None}
    if len(values) != 1 or not values <= set(DTYPES):
        found = " and ".join(sorted(values)) or "missing"
        raise CheckpointError(f"torch_dtype is {found}", expected=" or ".join(DTYPES))
    return values.pop()


def _read_eos_ids(raw: Mapping[str, Any], generation: Mapping[str, Any]) -> tuple[int, ...]:
    """End ids; `generation_config.json` wins, as it does in transformers' generate()."""
    for source in (raw, generation):  # also the one that does not win: another tool would believe it
        _check_eos_ids(_listed(source.get("eos_token_id")), raw.get("vocab_size"))
    value = generation.get("eos_token_id")
    if value is None:
        value = raw.get("eos_token_id")
    ids = _listed(value)
    if not ids or any(isinstance(token, bool) or not isinstance(token, int) for token in ids):
        raise CheckpointError(f"eos_token_id is {value!r}", expected="an id or a list of ids")
    return tuple(dict.fromkeys(ids))


def _listed(value: Any) -> list[Any]:
    return [] if value is None else value if isinstance(value, list) else [value]


def _check_eos_ids(ids: list[Any], vocab_size: object) -> None:
    for token in ids:
        if isinstance(token, int) and isinstance(vocab_size, int) and token >= vocab_size:
            raise CheckpointError(f"eos_token_id {token} is outside the vocabulary of {vocab_size}")


def _family_warnings(scaling: Mapping[str, Any] | None, max_positions: int) -> tuple[str, ...]:
    if scaling is not None:
        return ()
    return (
        "config.json has no RoPE scaling, which Llama 3.1 has (llama3, factor 8): right only if this model "
        f"was trained so (max_position_embeddings {max_positions})",
    )


def _required(raw: Mapping[str, Any], name: str, kind: type, *, prefix: str = "") -> Any:
    """A field that must be there with its type; an int passes for a float, a bool for neither."""
    if raw.get(name) is None:
        raise CheckpointError(f"{prefix}{name} is missing", expected=f"a value of type {kind.__name__}")
    return _typed(raw[name], prefix + name, kind)


def _optional(raw: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    return default if raw.get(name) is None else _typed(raw[name], name, kind)


def _typed(value: Any, name: str, kind: type) -> Any:
    allowed: tuple[type, ...] = (int, float) if kind is float else (kind,)
    if not isinstance(value, allowed) or (isinstance(value, bool) and kind is not bool):
        raise CheckpointError(f"{name} is {value!r}", expected=f"a value of type {kind.__name__}")
    return value
