"""`config.json` of a TensorRT-LLM engine directory, read as strictly as the C++ runtime reads it.

What the runtime needs and the file lacks is refused here in one line; what the runtime gives a default gets
the same one. It also says where TensorRT-LLM resolved a field otherwise than the build plan asked. It knows
nothing of how an engine is built, nor of the bytes in `rank{N}.engine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from minitron_build.errors import CheckpointError
from minitron_build.source.model_config import read_json_object

if TYPE_CHECKING:
    from minitron_build.planning.plan import BuildPlan

FILE_NAME = "config.json"
COPY_OR_BUILD = "copy the whole engine directory, or build it again with --force"
"""What helps with a broken file of an engine directory."""
DTYPES = ("float32", "float16", "bfloat16")
LOGITS_DTYPES = ("float32", "float16")
KV_CACHE_TYPES = ("continuous", "paged", "disabled")
QUANT_ALGO_OF = {"bf16": None, "fp8": "FP8"}
"""The plan's word for a precision or a KV cache dtype, in TensorRT-LLM's."""
KV_ITEM_BYTES = {"FP8": 1, "INT8": 1}
"""Bytes of one key or value by KV cache quantisation; without it, those of the engine's dtype."""
DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

NOT_IN_CONFIG = (
    *("checkpoint_dir", "output_dir", "model_config", "build_config", "model_cls_file", "model_cls_name"),
    *("workers", "log_level", "dry_run", "visualize_network"),
)
"""Flags of trtllm-build that say where and how to work, and leave nothing in the engine's config.json."""
PLACES = ("input_timing_cache", "output_timing_cache")
"""Paths on the machine that built it, another inside a container."""

_T = TypeVar("_T", int, bool, str)
_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Difference:
    """A field of an engine that is not what the plan asked for."""

    name: str
    planned: object
    resolved: object

    def __str__(self) -> str:
        return f"{self.name}: the plan asked for {self.planned}, TensorRT-LLM resolved {self.resolved}"


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """What an engine is, in TensorRT-LLM's words.

    Attributes:
        version: of the TensorRT-LLM that built it.
        logits_dtype: what the runtime returns logits in, float32 or float16.
        head_size: of one attention head; this family's is not hidden_size / heads.
        max_num_tokens: tokens in one step of the engine, None without a bound of its own.
        kv_cache_type: paged, continuous or disabled.
        gpt_attention_plugin: whether attention is TensorRT-LLM's own plugin, which in-flight batching needs.
        build_config: the whole block as written, for `differences` and reports.
    """

    version: str
    architecture: str
    dtype: str
    logits_dtype: str
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_size: int
    hidden_size: int
    tp_size: int
    pp_size: int
    cp_size: int
    quant_algo: str | None
    kv_cache_quant_algo: str | None
    max_batch_size: int
    max_input_len: int
    max_seq_len: int
    max_num_tokens: int | None
    max_beam_width: int
    kv_cache_type: str
    tokens_per_block: int
    gpt_attention_plugin: bool
    remove_input_padding: bool
    context_fmha: bool
    use_paged_context_fmha: bool
    gather_context_logits: bool
    gather_generation_logits: bool
    weight_streaming: bool
    manage_weights: bool
    build_config: Mapping[str, Any] = field(repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("dtype", self.dtype, DTYPES),
            ("logits_dtype", self.logits_dtype, LOGITS_DTYPES),
            ("kv_cache_type", self.kv_cache_type, KV_CACHE_TYPES),
        ):
            if value not in known:
                raise CheckpointError(f"{name} is {value!r}", expected=" or ".join(known))
        for name in _POSITIVE:
            if getattr(self, name) < 1:
                raise CheckpointError(f"{name} is {getattr(self, name)}", expected="1 or more")
        if self.remove_input_padding and self.max_num_tokens is None:
            raise CheckpointError(
                "remove_input_padding without max_num_tokens", expected="max_num_tokens, the tokens of a step"
            )

    @classmethod
    def read(cls, engine_dir: Path) -> EngineConfig:
        """Read the engine directory's `config.json`.

        Raises:
            CheckpointError: no such folder or file, a field that the C++ runtime needs is missing or of
                another type, or a value it does not support.
        """
        path = engine_dir / FILE_NAME
        if not path.is_file():
            found = f"{FILE_NAME} is missing" if engine_dir.is_dir() else "no such folder"
            raise CheckpointError(found, expected="a TensorRT-LLM engine directory", where=str(engine_dir))
        return cls.from_dict(read_json_object(path, todo=COPY_OR_BUILD), where=str(path))

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], *, where: str = FILE_NAME) -> EngineConfig:
        """The same from parsed JSON; see `read`."""
        try:
            return cls(**dict(_fields(_Block(raw, ""))))
        except CheckpointError as error:
            raise CheckpointError(
                error.found,
                expected=error.expected,
                where=where,
                todo=error.todo or "build the engine again with TensorRT-LLM 1.2.1",
            ) from None

    @property
    def world_size(self) -> int:
        """Ranks, each of them one GPU."""
        return self.tp_size * self.pp_size * self.cp_size

    @property
    def rank_files(self) -> tuple[str, ...]:
        """Files that must lie beside `config.json`, in rank order."""
        ranks = range(self.world_size)
        weights = [f"rank{rank}_managed_weights.safetensors" for rank in ranks if self.manage_weights]
        return (*(f"rank{rank}.engine" for rank in ranks), *weights)

    @property
    def kv_cache_bytes_per_token(self) -> int:
        """KV cache of one token on the rank that holds most layers, in bytes."""
        layers = ceil(self.num_hidden_layers / self.pp_size)
        heads = max(1, self.num_key_value_heads // (self.tp_size * self.cp_size))
        item_bytes = KV_ITEM_BYTES.get(self.kv_cache_quant_algo or "", DTYPE_BYTES[self.dtype])
        return 2 * layers * heads * self.head_size * item_bytes

    def check_rank_files(self, engine_dir: Path) -> None:
        """Refuse a directory that has not exactly one file for each rank.

        Raises:
            CheckpointError: names the file that is missing, empty, or of a rank beyond the world size.
        """
        for name in self.rank_files:
            path = engine_dir / name
            if not path.is_file() or not path.stat().st_size:
                raise self._wrong_ranks(engine_dir, f"{name} is {'empty' if path.is_file() else 'missing'}")
        extra = {path.name for path in engine_dir.glob("rank*.engine")} - set(self.rank_files)
        if extra:
            raise self._wrong_ranks(engine_dir, f"{min(extra)} is of no rank")

    def _wrong_ranks(self, engine_dir: Path, found: str) -> CheckpointError:
        return CheckpointError(
            found,
            expected=f"{self.world_size} rank file{'s'[: self.world_size > 1]} "
            f"(tp {self.tp_size} x pp {self.pp_size}{f' x cp {self.cp_size}' if self.cp_size > 1 else ''})",
            where=str(engine_dir),
            todo="copy the whole engine directory, or build it again",
        )

    def differences(self, plan: BuildPlan) -> tuple[Difference, ...]:
        """Fields that TensorRT-LLM resolved otherwise than the plan asked.

        Args:
            plan: of a GPU target; its `trtllm_build_argv` is what was asked.
        """
        asked = {
            "tp_size": plan.mapping.tp_size,
            "pp_size": plan.mapping.pp_size,
            "quant_algo": QUANT_ALGO_OF[plan.precision],
            "kv_cache_quant_algo": QUANT_ALGO_OF[plan.kv_cache_dtype],
        }
        found = [
            Difference(name, value, getattr(self, name))
            for name, value in asked.items()
            if getattr(self, name) != value
        ]
        return (*found, *self.differences_of_argv(plan.trtllm_build_argv))

    def differences_of_argv(self, argv: tuple[str, ...]) -> Iterator[Difference]:
        """The same for a command line of trtllm-build alone, in its order."""
        for name, text in _flags(argv):
            if name in NOT_IN_CONFIG or name in PLACES:
                continue
            resolved = self._resolved(name)
            if not _means(text, resolved):
                yield Difference(name, text, resolved)

    def _resolved(self, name: str) -> object:
        """The engine's value of a flag: a limit, an option, or a plugin's."""
        if name in _OTHER_NAMES:
            name = _OTHER_NAMES[name]
        if name == "logits_dtype":
            return self.logits_dtype
        plugins = self.build_config["plugin_config"]
        return plugins[name] if name in plugins else self.build_config.get(name, "nothing of that name")


_POSITIVE = (
    *("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_size", "hidden_size"),
    *("tp_size", "pp_size", "cp_size", "tokens_per_block"),
    *("max_batch_size", "max_input_len", "max_seq_len", "max_beam_width"),
)
_OTHER_NAMES = {"strip_plan": "use_strip_plan", "fast_build": "manage_weights"}


class _Block:
    """A JSON object of the file, read field by field; errors name the field by its path."""

    def __init__(self, raw: Mapping[str, Any], path: str) -> None:
        self._raw, self._path = raw, path

    def block(self, name: str) -> _Block:
        """A nested object, which must be there."""
        value = self._raw.get(name)
        if not isinstance(value, Mapping):
            raise self._wrong(name, "an object")
        return _Block(value, f"{self._path}{name}.")

    def get(self, name: str, kind: type[_T], default: Any = _REQUIRED) -> Any:
        """A value of that type; missing and null give the default, if there is one."""
        value = self._raw.get(name)
        if value is None and default is not _REQUIRED:
            return default
        if type(value) is not kind:  # a bool is no int here
            raise self._wrong(name, _KINDS[kind])
        return value

    def is_set(self, name: str) -> bool:
        """Whether a plugin is on: its key must be there, null is off."""
        if name not in self._raw:
            raise self._wrong(name, "null or a plugin's dtype")
        return self._raw[name] is not None

    def raw(self) -> Mapping[str, Any]:
        """The object as written."""
        return self._raw

    def _wrong(self, name: str, expected: str) -> CheckpointError:
        found = f"is {self._raw[name]!r}" if name in self._raw else "is missing"
        return CheckpointError(f"{self._path}{name} {found}", expected=expected)


_KINDS: dict[type, str] = {int: "a whole number", bool: "true or false", str: "a string"}


def _fields(engine: _Block) -> Iterator[tuple[str, Any]]:
    """Every field of `EngineConfig`, as gptJsonConfig.cpp reads it (required there, required here)."""
    version = engine.get("version", str, "none")
    if version == "none":
        raise CheckpointError("version is missing", expected="an engine of trtllm-build")
    yield "version", version
    model, build = engine.block("pretrained_config"), engine.block("build_config")
    yield from _model_fields(model)
    yield from _limit_fields(build)
    yield from _plugin_fields(build.block("plugin_config"))
    _check_lora(model, build)
    yield "build_config", build.raw()


def _model_fields(model: _Block) -> Iterator[tuple[str, Any]]:
    for name in ("architecture", "dtype"):
        yield name, model.get(name, str)
    yield "logits_dtype", model.get("logits_dtype", str, "float32")
    for name in ("num_hidden_layers", "num_attention_heads", "hidden_size"):
        yield name, model.get(name, int)
    heads, hidden_size = model.get("num_attention_heads", int), model.get("hidden_size", int)
    yield "num_key_value_heads", model.get("num_key_value_heads", int, heads)
    yield "head_size", model.get("head_size", int, hidden_size // max(1, heads))
    mapping = model.block("mapping")
    yield "tp_size", mapping.get("tp_size", int)
    yield "pp_size", mapping.get("pp_size", int, 1)
    yield "cp_size", mapping.get("cp_size", int, 1)
    quantization = model.block("quantization")
    yield "quant_algo", quantization.get("quant_algo", str, None)
    yield "kv_cache_quant_algo", quantization.get("kv_cache_quant_algo", str, None)


def _limit_fields(build: _Block) -> Iterator[tuple[str, Any]]:
    for name in ("max_batch_size", "max_input_len", "max_seq_len", "max_beam_width"):
        yield name, build.get(name, int, 0)
    yield "max_num_tokens", build.get("max_num_tokens", int, None)
    for name in ("gather_context_logits", "gather_generation_logits", "weight_streaming"):
        yield name, build.get(name, bool, False)
    # Older releases wrote it in upper case; paged_kv_cache wins, as in the runtime.
    paged = build.block("plugin_config").get("paged_kv_cache", bool)
    yield "kv_cache_type", "paged" if paged else build.get("kv_cache_type", str, "continuous").lower()


def _plugin_fields(plugins: _Block) -> Iterator[tuple[str, Any]]:
    yield "gpt_attention_plugin", plugins.is_set("gpt_attention_plugin")
    yield "tokens_per_block", plugins.get("tokens_per_block", int)
    for name in ("remove_input_padding", "context_fmha", "use_paged_context_fmha"):
        yield name, plugins.get(name, bool)
    yield "manage_weights", plugins.get("manage_weights", bool, False)


def _check_lora(model: _Block, build: _Block) -> None:
    """Keys of LoRA and MoE that the runtime wants although neither is used."""
    build.block("plugin_config").is_set("lora_plugin")
    build.block("lora_config")
    if "moe" in model.raw():
        model.block("moe").get("num_experts", int)


def _flags(argv: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """Flag and value of a command line; a flag without a value is "enable"."""
    for at, word in enumerate(argv):
        if not word.startswith("--"):
            continue
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            after = argv[at + 1 : at + 2]
            value = after[0] if after and not after[0].startswith("--") else "enable"
        yield name, value


def _means(text: str, resolved: object) -> bool:
    """Whether a flag's value and what stands in config.json are the same."""
    if isinstance(resolved, bool):
        return text == ("enable" if resolved else "disable")
    if resolved is None:
        return text == "disable"
    return text.lower() == str(resolved).lower()
