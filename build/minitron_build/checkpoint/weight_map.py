"""Which Hugging Face tensor becomes which TensorRT-LLM tensor, and which rank holds which part of it.

The one place that knows both vocabularies. TensorRT-LLM's own order is a trap that the table spells out:
its `mlp.fc` is HF's gate_proj and its `mlp.gate` is up_proj. Rules: TensorRT-LLM 1.2.1's unified Llama
converter. It knows nothing of files or bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum

from minitron_build.errors import PlanError
from minitron_build.source.model_config import ModelConfig

LAYER = "model.layers.{}."
HF_SHAPES: dict[str, tuple[str, ...]] = {
    "model.embed_tokens.weight": ("vocab_size", "hidden_size"),
    LAYER + "input_layernorm.weight": ("hidden_size",),
    LAYER + "self_attn.q_proj.weight": ("q_size", "hidden_size"),
    LAYER + "self_attn.k_proj.weight": ("kv_size", "hidden_size"),
    LAYER + "self_attn.v_proj.weight": ("kv_size", "hidden_size"),
    LAYER + "self_attn.o_proj.weight": ("hidden_size", "q_size"),
    LAYER + "post_attention_layernorm.weight": ("hidden_size",),
    LAYER + "mlp.gate_proj.weight": ("intermediate_size", "hidden_size"),
    LAYER + "mlp.up_proj.weight": ("intermediate_size", "hidden_size"),
    LAYER + "mlp.down_proj.weight": ("hidden_size", "intermediate_size"),
    "model.norm.weight": ("hidden_size",),
    "lm_head.weight": ("vocab_size", "hidden_size"),
}
"""Every tensor of an HF checkpoint with its shape in attributes of ModelConfig; {} is the layer."""

GPUS_PER_NODE = 8
"""What a checkpoint's mapping says of a machine, TensorRT-LLM's default."""

HF_DROPPED = (LAYER + "self_attn.rotary_emb.inv_freq",)
"""Tensors of old checkpoints that transformers ignores too: buffers that the config determines."""


class Split(Enum):
    """How a tensor is divided over the tp ranks."""

    WHOLE = "every rank holds it all"
    ROWS = "dim 0 in equal parts"
    COLUMNS = "dim 1 in equal parts"
    KV_HEADS = "dim 0 by key/value head; heads are repeated when there are fewer than ranks"
    VOCAB = "dim 0 in equal parts of the vocabulary, zero-padded to a multiple of tp"


class Stage(Enum):
    """Which pp ranks hold a tensor."""

    FIRST = "the first pp rank"
    LAYER = "the pp rank of the layer"
    LAST = "the last pp rank"


@dataclass(frozen=True, slots=True)
class WeightRule:
    """One TensorRT-LLM tensor: its HF sources stacked by rows, each with its split."""

    name: str
    sources: tuple[tuple[str, Split], ...]
    stage: Stage


_TRT_LAYER = "transformer.layers.{}."
WEIGHT_MAP: tuple[WeightRule, ...] = (
    WeightRule(
        "transformer.vocab_embedding.weight", (("model.embed_tokens.weight", Split.WHOLE),), Stage.FIRST
    ),
    WeightRule(
        _TRT_LAYER + "input_layernorm.weight", ((LAYER + "input_layernorm.weight", Split.WHOLE),), Stage.LAYER
    ),
    WeightRule(
        _TRT_LAYER + "attention.qkv.weight",
        (
            (LAYER + "self_attn.q_proj.weight", Split.ROWS),
            (LAYER + "self_attn.k_proj.weight", Split.KV_HEADS),
            (LAYER + "self_attn.v_proj.weight", Split.KV_HEADS),
        ),
        Stage.LAYER,
    ),
    WeightRule(
        _TRT_LAYER + "attention.dense.weight",
        ((LAYER + "self_attn.o_proj.weight", Split.COLUMNS),),
        Stage.LAYER,
    ),
    WeightRule(
        _TRT_LAYER + "post_layernorm.weight",
        ((LAYER + "post_attention_layernorm.weight", Split.WHOLE),),
        Stage.LAYER,
    ),
    WeightRule(_TRT_LAYER + "mlp.fc.weight", ((LAYER + "mlp.gate_proj.weight", Split.ROWS),), Stage.LAYER),
    WeightRule(_TRT_LAYER + "mlp.gate.weight", ((LAYER + "mlp.up_proj.weight", Split.ROWS),), Stage.LAYER),
    WeightRule(
        _TRT_LAYER + "mlp.proj.weight", ((LAYER + "mlp.down_proj.weight", Split.COLUMNS),), Stage.LAYER
    ),
    WeightRule("transformer.ln_f.weight", (("model.norm.weight", Split.WHOLE),), Stage.LAST),
    WeightRule("lm_head.weight", (("lm_head.weight", Split.VOCAB),), Stage.LAST),
)


@dataclass(frozen=True, slots=True)
class Mapping:
    """TensorRT-LLM's Mapping: rank = pp_rank * tp_size + tp_rank."""

    tp_size: int = 1
    pp_size: int = 1

    def __post_init__(self) -> None:
        for name in ("tp_size", "pp_size"):
            if getattr(self, name) < 1:
                raise PlanError(f"{name} is {getattr(self, name)}", expected="1 or more")

    @property
    def world_size(self) -> int:
        """Ranks, each of them one GPU."""
        return self.tp_size * self.pp_size

    def layers_of(self, pp_rank: int, num_layers: int) -> range:
        """Global layer indices of a pp rank; earlier ranks take the remainder."""
        each, extra = divmod(num_layers, self.pp_size)
        start = pp_rank * each + min(pp_rank, extra)
        return range(start, start + each + (pp_rank < extra))


@dataclass(frozen=True, slots=True)
class Part:
    """A rectangle of an HF tensor: rows [start, stop) and, for matrices, columns [start, stop)."""

    source: str
    rows: tuple[int, int]
    columns: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class RankTensor:
    """A tensor of one rank file: parts stacked by rows, then `pad_rows` rows of zeros."""

    rank: int
    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    pad_rows: int = 0


def check_mapping(config: ModelConfig, mapping: Mapping) -> None:
    """Refuse a tp or pp that this model cannot be divided by.

    Raises:
        PlanError: names the dimension that does not divide and the sizes that do.
    """
    tp_size, kv_heads = mapping.tp_size, config.num_key_value_heads
    sizes = {"num_attention_heads": config.num_attention_heads, "intermediate_size": config.intermediate_size}
    for name, size in sizes.items():
        if size % tp_size:
            raise PlanError(
                f"--tp-size {tp_size} does not divide {name} {size}", todo=_legal_tp_sizes(config)
            )
    if max(tp_size, kv_heads) % min(tp_size, kv_heads):
        raise PlanError(
            f"--tp-size {tp_size} and num_key_value_heads {kv_heads} do not divide each other",
            todo=_legal_tp_sizes(config),
        )
    if mapping.pp_size > config.num_hidden_layers:
        raise PlanError(
            f"--pp-size {mapping.pp_size} for {config.num_hidden_layers} layers",
            expected="at least one layer a rank",
        )


def hf_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the HF checkpoint must hold, with its shape."""
    shapes: dict[str, tuple[int, ...]] = {}
    for template, dims in HF_SHAPES.items():
        if template == "lm_head.weight" and config.tie_word_embeddings:
            continue
        shape = tuple(int(getattr(config, dim)) for dim in dims)
        shapes.update(dict.fromkeys(_expand(template, range(config.num_hidden_layers)), shape))
    return shapes


def hf_ignored(config: ModelConfig) -> set[str]:
    """Tensors that may stand in the HF checkpoint and are not read."""
    tied = ("lm_head.weight",) if config.tie_word_embeddings else ()
    templates = (*HF_DROPPED, *tied)
    return {name for template in templates for name in _expand(template, range(config.num_hidden_layers))}


def split_layer_name(name: str) -> tuple[int | None, str]:
    """(layer, name within it) of an HF tensor or module; (None, name) of what is outside the layers."""
    prefix, _ = LAYER.split("{}")
    if not name.startswith(prefix):
        return None, name
    layer, _, rest = name[len(prefix) :].partition(".")
    return int(layer), rest


def rank_tensors(
    config: ModelConfig, mapping: Mapping, *, shard_embedding: bool = False
) -> Iterator[RankTensor]:
    """Every tensor of every rank file, with the parts of HF tensors that make it.

    Args:
        shard_embedding: divide the embedding over tp by vocabulary (`use_parallel_embedding`), as NVIDIA
            ModelOpt lays it out; the bf16 converter leaves it whole on every rank.
    """
    check_mapping(config, mapping)
    for rank in range(mapping.world_size):
        pp_rank, tp_rank = divmod(rank, mapping.tp_size)
        layers = mapping.layers_of(pp_rank, config.num_hidden_layers)
        for rule in WEIGHT_MAP:
            if not _held_by(rule.stage, pp_rank, mapping):
                continue
            indices = enumerate(layers) if rule.stage is Stage.LAYER else [(0, 0)]
            for local, layer in indices:
                yield _rank_tensor(
                    config, rule, rank, (local, layer), (tp_rank, mapping.tp_size), shard_embedding
                )


def _expand(template: str, layers: range) -> Iterator[str]:
    return (template.format(layer) for layer in layers) if "{}" in template else iter([template])


def _held_by(stage: Stage, pp_rank: int, mapping: Mapping) -> bool:
    return stage is Stage.LAYER or pp_rank == {Stage.FIRST: 0, Stage.LAST: mapping.pp_size - 1}[stage]


def _rank_tensor(
    config: ModelConfig,
    rule: WeightRule,
    rank: int,
    layer: tuple[int, int],
    tp: tuple[int, int],
    shard_embedding: bool,
) -> RankTensor:
    """One tensor of one rank. `layer` is (index in the rank, index in the model), `tp` (rank, size)."""
    parts, pad_rows = [], 0
    for template, split in rule.sources:
        if shard_embedding and rule.stage is Stage.FIRST:
            split = Split.VOCAB  # noqa: PLW2901 - the table holds the converter's layout, this is ModelOpt's
        part, pad_rows = _part(config, template, layer[1], split, tp)
        parts.append(part)
    columns = parts[0].columns
    num_rows = sum(part.rows[1] - part.rows[0] for part in parts) + pad_rows
    shape = (num_rows,) if columns is None else (num_rows, columns[1] - columns[0])
    return RankTensor(rank, rule.name.format(layer[0]), shape, tuple(parts), pad_rows)


def _part(
    config: ModelConfig, template: str, layer: int, split: Split, tp: tuple[int, int]
) -> tuple[Part, int]:
    """The rectangle of one HF tensor that a tp rank holds, and the zero rows that follow it."""
    tp_rank, tp_size = tp
    dims = [int(getattr(config, dim)) for dim in HF_SHAPES[template]]
    rows, columns, pad_rows = (0, dims[0]), (0, dims[1]) if len(dims) == 2 else None, 0
    if split is Split.ROWS:
        rows = _equal_part(dims[0], tp_rank, tp_size)
    elif split is Split.COLUMNS:
        columns = _equal_part(dims[1], tp_rank, tp_size)
    elif split is Split.KV_HEADS:
        rows = _kv_rows(config, tp_rank, tp_size)
    elif split is Split.VOCAB:
        each = -(-dims[0] // tp_size)
        rows = (min(tp_rank * each, dims[0]), min((tp_rank + 1) * each, dims[0]))
        pad_rows = each - (rows[1] - rows[0])
    source = (
        "model.embed_tokens.weight"
        if config.tie_word_embeddings and template == "lm_head.weight"
        else template
    )
    return Part(source.format(layer), rows, columns), pad_rows


def _equal_part(size: int, index: int, count: int) -> tuple[int, int]:
    return size // count * index, size // count * (index + 1)


def _kv_rows(config: ModelConfig, tp_rank: int, tp_size: int) -> tuple[int, int]:
    """Rows of k_proj or v_proj of a tp rank; with fewer heads than ranks, neighbours share a head."""
    if config.num_key_value_heads >= tp_size:
        return _equal_part(config.kv_size, tp_rank, tp_size)
    head = tp_rank * config.num_key_value_heads // tp_size
    return head * config.head_dim, (head + 1) * config.head_dim


def _legal_tp_sizes(config: ModelConfig) -> str:
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    legal = [
        size
        for size in range(1, heads + 1)
        if not heads % size
        and not config.intermediate_size % size
        and not max(size, kv_heads) % min(size, kv_heads)
    ]
    return f"use one of {', '.join(map(str, legal))}"
