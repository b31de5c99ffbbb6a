"""Trains the demo checkpoint: a 4.3M-parameter Llama with the family's traits, on the standard library.

    python -m minitron_build.demo_model.train_demo --output-dir DIR

The corpus is the source, docstrings and help topics of the Python that runs this. It writes a Hugging Face
checkpoint and `training.json`, which says how it was made and how well it predicts files it never saw. It
knows nothing of TensorRT-LLM, engines or Triton.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import math
import os
import platform
import random
import shutil
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from minitron_build.errors import MachineError, MinitronError, RefusedError

BEGIN_OF_TEXT, END_OF_TEXT = "<|begin_of_text|>", "<|end_of_text|>"
SPECIAL_TOKENS = (BEGIN_OF_TEXT, END_OF_TEXT, "<|reserved_special_token_0|>", "<|reserved_special_token_1|>")

# Llama 3's own split, character for character: whatever streams this model's text meets the real one's seams.
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Tests repeat themselves, tables are not language, and `_sysconfigdata` names paths of one machine.
SKIPPED_DIRS = frozenset(
    {"test", "tests", "idle_test", "site-packages", "__pycache__", "encodings", "pydoc_data", "lib-dynload"}
)
SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "msilib/schema.py", "html/entities.py")
HELD_OUT_ONE_IN = 20
MIN_DOCSTRING_CHARS = 80
MIN_PIECE_CHARS = 60
LOG_EVERY_STEPS = 50
# Two workers of one thread each meet once per step; two threads inside every operator meet hundreds of times,
# and on a machine with other work each meeting waits for the slower one.
NUM_WORKERS = 2


@dataclass(frozen=True, slots=True)
class DemoShape:
    """The sizes of the demo model; heads x head_dim differs from hidden_size as in the real family."""

    vocab_size: int = 4096
    hidden_size: int = 192
    intermediate_size: int = 576
    num_hidden_layers: int = 6
    num_attention_heads: int = 8
    num_key_value_heads: int = 2
    head_dim: int = 32
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_factor: float = 8.0
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    rope_original_positions: int = 8192
    max_position_embeddings: int = 131072

    def __post_init__(self) -> None:
        """Refuse a shape that the forward pass cannot run or that loses the family's trait.

        Raises:
            ValueError: heads do not divide, head_dim is odd, or heads x head_dim equals hidden_size.
        """
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"{self.num_attention_heads} heads, {self.num_key_value_heads} KV heads: no ratio"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim {self.head_dim}: RoPE needs an even number")
        if self.num_attention_heads * self.head_dim == self.hidden_size:
            raise ValueError(
                f"heads x head_dim equals hidden_size {self.hidden_size}: not this family's shape"
            )

    @property
    def bos_token_id(self) -> int:
        """Id of the begin-of-text token: the specials fill the top of the vocabulary."""
        return self.vocab_size - len(SPECIAL_TOKENS)

    @property
    def eos_token_id(self) -> int:
        """Id of the end-of-text token."""
        return self.bos_token_id + 1


@dataclass(frozen=True, slots=True)
class Recipe:
    """How long and how hard to train; every number reaches `training.json`.

    Training ends, its learning rate decayed, when the steps are done or the time is up, whichever is first:
    a busy machine takes fewer steps, it does not stop in mid-schedule.
    """

    steps: int = 5000
    max_train_s: float = 2700.0
    warmup_steps: int = 100
    rows: int = 2
    seq_len: int = 512
    long_rows: int = 2
    long_seq_len: int = 2048
    long_fraction: float = 0.08
    peak_learning_rate: float = 2.5e-3
    final_learning_rate: float = 2.5e-5
    weight_decay: float = 0.1
    max_grad_norm: float = 1.0
    adam_betas: tuple[float, float] = (0.9, 0.98)
    seed: int = 20240814

    def __post_init__(self) -> None:
        """Refuse a schedule that does not add up.

        Raises:
            ValueError: warm-up outlasts training, or a batch cannot be shared evenly among the workers.
        """
        if not 0 < self.warmup_steps < self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps}: expected 1 to {self.steps - 1}")
        if self.rows % NUM_WORKERS or self.long_rows % NUM_WORKERS:
            raise ValueError(f"rows {self.rows} and {self.long_rows}: expected multiples of {NUM_WORKERS}")
        if self.max_train_s <= 0:
            raise ValueError(f"max_train_s {self.max_train_s}: expected more than 0")

    def progress(self, step: int, elapsed_s: float) -> float:
        """How much of the schedule is behind: 0 at the start, 1 or more when training is over."""
        return max(step / self.steps, elapsed_s / self.max_train_s)

    def learning_rate(self, step: int, progress: float) -> float:
        """A cosine over the schedule from the peak to the final rate, under a linear warm-up of steps."""
        span = self.peak_learning_rate - self.final_learning_rate
        cosine = self.final_learning_rate + span * 0.5 * (1 + math.cos(math.pi * progress))
        return cosine * min(1.0, (step + 1) / self.warmup_steps)


@dataclass(frozen=True, slots=True)
class StepReport:
    """Where training stands after a step; the loss is that step's, in nats per token."""

    step: int
    tokens_seen: int
    elapsed_s: float
    loss: float


@dataclass(frozen=True, slots=True)
class Article:
    """One unit of the corpus: a text, and the parts it may be cut into for training."""

    name: str
    text: str
    parts: tuple[str, ...] = ()

    @property
    def is_held_out(self) -> bool:
        """Decided by the name alone, so that no run can train on another run's held-out files."""
        digest = hashlib.sha256(self.name.encode()).digest()
        return int.from_bytes(digest[:8], "big") % HELD_OUT_ONE_IN == 0


@dataclass(frozen=True, slots=True)
class EncodedArticle:
    """Token ids of an article as a whole and of its parts, each `<bos> text <eos>`."""

    whole: tuple[int, ...]
    parts: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Corpus:
    """What is trained on and what is held out."""

    train: tuple[Article, ...]
    held_out: tuple[Article, ...]
    num_source_files: int


@dataclass(frozen=True, slots=True)
class HeldOutScore:
    """How well a model predicts the held-out articles."""

    perplexity: float
    bits_per_byte: float
    num_tokens: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Run:
    """What training starts from and what its record needs."""

    shape: DemoShape
    recipe: Recipe
    held_out: tuple[Article, ...]
    tokenizer: Tokenizer
    encoded: tuple[EncodedArticle, ...]
    corpus_facts: dict[str, object]
    unigram_perplexity: float


def main(argv: Sequence[str] | None = None) -> int:
    """Train and write the checkpoint; the last line on stdout is `training.json` on one line.

    Returns:
        0 done, 1 refused, 130 interrupted; bad usage leaves through argparse with 2.
    """
    args = _parse(argv)
    try:
        facts = train_demo(
            Path(args.output_dir), _recipe(args.steps, args.max_train_s), args.snapshot_every_s
        )
    except MinitronError as error:
        print(f"train_demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("train_demo: interrupted", file=sys.stderr)
        return 130
    print(json.dumps(facts))
    return 0


def train_demo(
    output_dir: Path,
    recipe: Recipe,
    snapshot_every_s: float,
    *,
    shape: DemoShape | None = None,
    stdlib_dir: Path | None = None,
) -> dict[str, object]:
    """Train the demo model and write it to `output_dir`.

    Args:
        output_dir: the checkpoint folder; must not exist, and is replaced whole at each snapshot.
        recipe: how to train.
        snapshot_every_s: seconds between snapshots of the checkpoint while training.
        shape: the model's sizes; None means the demo's.
        stdlib_dir: the source tree to train on; None means the running Python's standard library.

    Returns:
        The content of `training.json`.

    Raises:
        RefusedError: `output_dir` exists, or the text is too short for the shape or the recipe.
        MachineError: `stdlib_dir` holds no Python source.
    """
    if output_dir.exists():
        raise RefusedError(
            "the output folder exists", where=str(output_dir), todo="delete it or name another"
        )
    run = _prepare(shape or DemoShape(), recipe, stdlib_dir or Path(sysconfig.get_path("stdlib")))
    torch.manual_seed(recipe.seed)
    torch.set_num_threads(1)  # the workers are the parallelism: see NUM_WORKERS
    weights = initial_weights(run.shape)
    next_snapshot_s = snapshot_every_s
    for report in training_steps(weights, run.shape, recipe, run.encoded):
        if report.step % LOG_EVERY_STEPS == 0:
            _log(str(report))
        if report.elapsed_s > next_snapshot_s:
            write_checkpoint(output_dir, weights, run, report, is_finished=False)
            next_snapshot_s += snapshot_every_s
    return write_checkpoint(output_dir, weights, run, report, is_finished=True)


def _prepare(shape: DemoShape, recipe: Recipe, stdlib_dir: Path) -> Run:
    """Read the corpus, train the tokenizer, encode, and take the unigram baseline."""
    corpus = read_corpus(stdlib_dir)
    tokenizer = train_tokenizer([article.text for article in corpus.train], shape)
    encoded = tuple(encode_article(tokenizer, article, shape) for article in corpus.train)
    held_out = [encode_article(tokenizer, article, shape).whole for article in corpus.held_out]
    baseline = unigram_perplexity([article.whole for article in encoded], held_out, shape.vocab_size)
    facts = describe_corpus(corpus, encoded)
    _log(f"corpus: {facts}; unigram perplexity {baseline:.1f}")
    return Run(shape, recipe, corpus.held_out, tokenizer, encoded, facts, baseline)


# The corpus


def read_corpus(stdlib_dir: Path) -> Corpus:
    """Read sources, docstrings and help topics of a standard library.

    Raises:
        MachineError: `stdlib_dir` holds no Python source.
    """
    sources = [source for path in sorted(stdlib_dir.rglob("*.py")) if (source := _source(path, stdlib_dir))]
    if not sources:
        raise MachineError(
            "no Python source files", where=str(stdlib_dir), todo="run a Python with its library"
        )
    docs = [doc for article in sources for doc in docstrings_of(article)]
    articles = {article.text: article for article in [*_topics(), *docs, *sources]}.values()
    return Corpus(
        train=tuple(article for article in articles if not article.is_held_out),
        held_out=tuple(article for article in articles if article.is_held_out),
        num_source_files=len(sources),
    )


def _source(path: Path, stdlib_dir: Path) -> Article | None:
    """One source file as an article, or None if it is skipped, empty or not UTF-8."""
    name = path.relative_to(stdlib_dir).as_posix()
    if SKIPPED_DIRS & set(name.split("/")) or name.startswith(SKIPPED_PREFIXES):
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    return Article(name, text, parts_of(text)) if text.strip() else None


def parts_of(source: str) -> tuple[str, ...]:
    """Cut a module before each top-level class and function, decorators included."""
    cuts = [0]
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            cuts.append(min([node.lineno, *(line.lineno for line in node.decorator_list)]) - 1)
    lines = source.splitlines(keepends=True)
    parts = ["".join(lines[first:last]).strip("\n") + "\n" for first, last in pairwise([*cuts, len(lines)])]
    return tuple(part for part in parts if len(part) >= MIN_PIECE_CHARS)


def docstrings_of(article: Article) -> Iterator[Article]:
    """The longer docstrings of a module, as prose; they share its name, so they are held out with it."""
    for node in ast.walk(ast.parse(article.text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            doc = inspect.cleandoc(ast.get_docstring(node, clean=False) or "")
            if len(doc) >= MIN_DOCSTRING_CHARS:
                yield Article(article.name, doc + "\n")


def _topics() -> list[Article]:
    """The texts behind `help("...")`: the language reference, as prose."""
    from pydoc_data.topics import topics

    return [Article(f"pydoc_data/topics/{name}", text) for name, text in sorted(topics.items())]


def describe_corpus(corpus: Corpus, encoded: Sequence[EncodedArticle]) -> dict[str, object]:
    """Facts of the corpus for `training.json`."""
    return {
        "text": "standard library of the running Python: sources, docstrings, help topics",
        "python_version": platform.python_version(),
        "num_source_files": corpus.num_source_files,
        "num_train_articles": len(corpus.train),
        "num_train_tokens": sum(len(article.whole) for article in encoded),
        "num_train_bytes": sum(len(article.text.encode()) for article in corpus.train),
        "num_held_out_articles": len(corpus.held_out),
        "held_out_rule": f"sha256(path)[:8] mod {HELD_OUT_ONE_IN} == 0",
    }


def unigram_perplexity(
    train: Sequence[Sequence[int]], held_out: Sequence[Sequence[int]], vocab_size: int
) -> float:
    """Held-out perplexity of token frequencies alone, every count raised by one: the score to beat."""
    counts = Counter(token for ids in train for token in ids[1:])
    total = counts.total() + vocab_size
    nats = [-math.log((counts[token] + 1) / total) for ids in held_out for token in ids[1:]]
    return math.exp(sum(nats) / len(nats))


# The tokenizer


def train_tokenizer(texts: Sequence[str], shape: DemoShape) -> Tokenizer:
    """Train a byte-level BPE with Llama 3's split, post-processor and decoder.

    Raises:
        RefusedError: the texts are too short to fill the vocabulary, so the specials would lose their ids.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    split = pre_tokenizers.Split(Regex(LLAMA3_SPLIT), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=shape.bos_token_id,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=[],
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if (num_tokens := tokenizer.get_vocab_size()) != shape.bos_token_id:
        raise RefusedError(
            f"the text yields {num_tokens} tokens",
            expected=f"{shape.bos_token_id} to fill the vocabulary",
            where="tokenizer",
            todo="train on more text",
        )
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    template = processors.TemplateProcessing(
        single=f"{BEGIN_OF_TEXT} $A",
        pair=f"{BEGIN_OF_TEXT} $A {BEGIN_OF_TEXT}:1 $B:1",
        special_tokens=[(BEGIN_OF_TEXT, shape.bos_token_id)],
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def encode_article(tokenizer: Tokenizer, article: Article, shape: DemoShape) -> EncodedArticle:
    """Encode an article and its parts; an article without parts is its own single part."""
    encodings = tokenizer.encode_batch([article.text, *article.parts])
    rows = tuple((*encoding.ids, shape.eos_token_id) for encoding in encodings)
    return EncodedArticle(whole=rows[0], parts=rows[1:] or rows[:1])


# The model


def initial_weights(shape: DemoShape) -> dict[str, Tensor]:
    """Fresh float32 weights under their Hugging Face names; draws from torch's global generator."""
    weights = {name: torch.ones(size) for name, size in _weight_sizes(shape).items()}
    for name, weight in weights.items():
        if weight.dim() == 2:
            torch.nn.init.normal_(weight, std=_initial_std(name, shape))
        weight.requires_grad_(True)
    return weights


def _weight_sizes(shape: DemoShape) -> dict[str, tuple[int, ...]]:
    """Hugging Face tensor name -> size; a linear layer is [out_features, in_features]."""
    hidden, inner = shape.hidden_size, shape.intermediate_size
    query = shape.num_attention_heads * shape.head_dim
    key = shape.num_key_value_heads * shape.head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm": (hidden,),
        "self_attn.q_proj": (query, hidden),
        "self_attn.k_proj": (key, hidden),
        "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query),
        "post_attention_layernorm": (hidden,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    sizes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (shape.vocab_size, hidden)}
    for index in range(shape.num_hidden_layers):
        sizes |= {f"model.layers.{index}.{name}.weight": size for name, size in layer.items()}
    return sizes | {"model.norm.weight": (hidden,), "lm_head.weight": (shape.vocab_size, hidden)}


def _initial_std(name: str, shape: DemoShape) -> float:
    """Small for the two vocabulary tables; residual writers shrink with depth so that sums stay near 1."""
    if "proj" not in name:
        return 0.02
    fan_in = _weight_sizes(shape)[name][1]
    depth = 2 * shape.num_hidden_layers if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
    return 1 / math.sqrt(fan_in * depth)


def rope_table(shape: DemoShape, num_positions: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines of llama3-scaled RoPE.

    Returns:
        Two float32 tensors [num_positions, head_dim], the second half of the columns repeating the first.
    """
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float32) / shape.head_dim
    inv_freq = 1.0 / shape.rope_theta**exponents  # [head_dim / 2]
    turns = shape.rope_original_positions * inv_freq / (2 * math.pi)  # turns within the original context
    low, high = shape.rope_low_freq_factor, shape.rope_high_freq_factor
    # 1 keeps a frequency, 0 slows it by the factor: fast ones tell neighbours apart, slow ones span the text.
    keep = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    inv_freq = keep * inv_freq + (1 - keep) * inv_freq / shape.rope_factor
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), inv_freq).repeat(1, 2)
    return angles.cos(), angles.sin()


def forward(weights: Mapping[str, Tensor], shape: DemoShape, token_ids: Tensor) -> Tensor:
    """The Llama forward pass, float32, causal.

    Args:
        weights: tensors under their Hugging Face names.
        shape: the sizes they have.
        token_ids: int64 [batch, tokens].

    Returns:
        Logits, float32 [batch, tokens, vocab_size].
    """
    rope = rope_table(shape, token_ids.shape[1])
    hidden = F.embedding(token_ids, weights["model.embed_tokens.weight"])  # [batch, tokens, hidden_size]
    for index in range(shape.num_hidden_layers):
        layer = f"model.layers.{index}"
        normed = _rms_norm(hidden, weights[f"{layer}.input_layernorm.weight"], shape)
        hidden = hidden + _attention(normed, weights, f"{layer}.self_attn", shape, rope)
        normed = _rms_norm(hidden, weights[f"{layer}.post_attention_layernorm.weight"], shape)
        hidden = hidden + _mlp(normed, weights, f"{layer}.mlp")
    return F.linear(_rms_norm(hidden, weights["model.norm.weight"], shape), weights["lm_head.weight"])


def _rms_norm(hidden: Tensor, weight: Tensor, shape: DemoShape) -> Tensor:
    return F.rms_norm(hidden, (shape.hidden_size,), weight, shape.rms_norm_eps)


def _attention(
    normed: Tensor, weights: Mapping[str, Tensor], name: str, shape: DemoShape, rope: tuple[Tensor, Tensor]
) -> Tensor:
    batch, tokens, _ = normed.shape

    def heads(projection: str) -> Tensor:  # [batch, heads, tokens, head_dim]
        flat = F.linear(normed, weights[f"{name}.{projection}.weight"])
        return flat.view(batch, tokens, -1, shape.head_dim).transpose(1, 2)

    mixed = F.scaled_dot_product_attention(
        _rotate(heads("q_proj"), rope),
        _rotate(heads("k_proj"), rope),
        heads("v_proj"),
        is_causal=True,
        enable_gqa=True,
    )
    return F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), weights[f"{name}.o_proj.weight"])


def _rotate(heads: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = heads.chunk(2, dim=-1)
    return heads * cos + torch.cat((-second, first), dim=-1) * sin


def _mlp(normed: Tensor, weights: Mapping[str, Tensor], name: str) -> Tensor:
    gate = F.silu(F.linear(normed, weights[f"{name}.gate_proj.weight"]))
    up = F.linear(normed, weights[f"{name}.up_proj.weight"])
    return F.linear(gate * up, weights[f"{name}.down_proj.weight"])


# Training


def training_steps(
    weights: dict[str, Tensor], shape: DemoShape, recipe: Recipe, encoded: Sequence[EncodedArticle]
) -> Iterator[StepReport]:
    """Train `weights` in place.

    Yields:
        A report after each step; the time between steps that the caller takes counts as elapsed.
    """
    optimizer = _optimizer(weights, recipe)
    rng = random.Random(recipe.seed)
    short_batches = batches(encoded, recipe.rows, recipe.seq_len, rng)
    long_batches = batches(encoded, recipe.long_rows, recipe.long_seq_len, rng)
    step, tokens_seen, progress, start_s = 0, 0, 0.0, time.monotonic()
    with ThreadPoolExecutor(NUM_WORKERS, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        while progress < 1:
            rows = next(short_batches if progress < 1 - recipe.long_fraction else long_batches)
            shares = list(workers.map(partial(_gradients, weights, shape), rows.chunk(NUM_WORKERS)))
            for weight, *grads in zip(weights.values(), *(grads for _, grads in shares), strict=True):
                weight.grad = torch.stack(grads).mean(dim=0)
            torch.nn.utils.clip_grad_norm_(weights.values(), recipe.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = recipe.learning_rate(step, progress)
            optimizer.step()
            step, tokens_seen = step + 1, tokens_seen + rows[:, 1:].numel()
            yield StepReport(
                step, tokens_seen, time.monotonic() - start_s, sum(loss for loss, _ in shares) / NUM_WORKERS
            )
            progress = recipe.progress(step, time.monotonic() - start_s)


def _optimizer(weights: Mapping[str, Tensor], recipe: Recipe) -> torch.optim.AdamW:
    """AdamW that decays the matrices and leaves the norms alone."""
    decayed = [weight for weight in weights.values() if weight.dim() == 2]
    others = [weight for weight in weights.values() if weight.dim() != 2]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=recipe.adam_betas, weight_decay=recipe.weight_decay, fused=True)


def _gradients(
    weights: Mapping[str, Tensor], shape: DemoShape, rows: Tensor
) -> tuple[float, tuple[Tensor, ...]]:
    """Mean loss over rows [rows, seq_len + 1] and its gradient for each weight, in the order of `weights`."""
    logits = forward(weights, shape, rows[:, :-1])
    loss = F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
    return loss.item(), torch.autograd.grad(loss, list(weights.values()))


def batches(
    encoded: Sequence[EncodedArticle], num_rows: int, seq_len: int, rng: random.Random
) -> Iterator[Tensor]:
    """Batches without end, int64 [num_rows, seq_len + 1].

    Raises:
        RefusedError: the corpus holds no more than one row.
    """
    rows = _endless_rows(encoded, seq_len, rng)
    while True:
        yield torch.stack([next(rows) for _ in range(num_rows)])


def _endless_rows(encoded: Sequence[EncodedArticle], seq_len: int, rng: random.Random) -> Iterator[Tensor]:
    """Rows of seq_len + 1 tokens, epoch after epoch, neighbours overlapping by the one token they predict.

    Each epoch shuffles the documents and deals every article either whole or in parts: whole files teach
    how code goes on, parts teach how a `def` begins after <bos> and that texts end.
    """
    while True:
        documents = [
            part
            for article in encoded
            for part in (article.parts if rng.random() < 0.5 else (article.whole,))
        ]
        rng.shuffle(documents)
        stream = torch.tensor([token for document in documents for token in document], dtype=torch.int64)
        if len(stream) <= seq_len:
            raise RefusedError(
                f"{len(stream)} training tokens",
                expected=f"more than one row of {seq_len}",
                where="corpus",
                todo="train on more text",
            )
        starts = list(range(0, len(stream) - seq_len, seq_len))
        rng.shuffle(starts)
        yield from (stream[start : start + seq_len + 1] for start in starts)


# The score and the files


@torch.no_grad()
def score(
    weights: Mapping[str, Tensor],
    shape: DemoShape,
    tokenizer: Tokenizer,
    texts: Sequence[str],
    window: int = 512,
) -> HeldOutScore:
    """Perplexity of texts, each from <bos> to <eos>; a window of tokens sees nothing before itself."""
    nats, num_tokens = 0.0, 0
    for text in texts:
        ids = torch.tensor([*tokenizer.encode(text).ids, shape.eos_token_id])
        for start in range(0, len(ids) - 1, window):
            row = ids[start : start + window + 1]
            logits = forward(weights, shape, row[None, :-1])
            nats += F.cross_entropy(logits[0], row[1:], reduction="sum").item()
        num_tokens += len(ids) - 1
    num_bytes = sum(len(text.encode()) for text in texts)
    return HeldOutScore(
        perplexity=math.exp(nats / num_tokens),
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_tokens=num_tokens,
        num_bytes=num_bytes,
    )


def write_checkpoint(
    output_dir: Path, weights: Mapping[str, Tensor], run: Run, report: StepReport, *, is_finished: bool
) -> dict[str, object]:
    """Write the whole checkpoint under a temporary name, score what was written, then rename.

    Returns:
        The content of `training.json`.
    """
    partial_dir = output_dir.with_name(f".{output_dir.name}.partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    partial_dir.mkdir(parents=True)
    write_model(partial_dir, weights, run.shape)
    write_tokenizer(partial_dir, run.tokenizer, run.shape)
    facts = _training_facts(partial_dir, run, report) | {"is_finished": is_finished}
    _write_json(partial_dir / "training.json", facts)
    if output_dir.exists():
        shutil.rmtree(output_dir)
    os.replace(partial_dir, output_dir)
    _log(f"wrote {output_dir}: {facts['held_out']}")
    return facts


def write_model(checkpoint_dir: Path, weights: Mapping[str, Tensor], shape: DemoShape) -> None:
    """Write `config.json`, `generation_config.json` and `model.safetensors` (bf16)."""
    stored = {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in weights.items()}
    (checkpoint_dir / "model.safetensors").write_bytes(save(stored, metadata={"format": "pt"}))
    _write_json(checkpoint_dir / "config.json", hf_config(shape))
    generation = {
        "_from_model_config": True,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
        "transformers_version": "4.45.1",
    }
    _write_json(checkpoint_dir / "generation_config.json", generation)


def hf_config(shape: DemoShape) -> dict[str, object]:
    """`config.json` with the keys that transformers 4.45 writes for this family."""
    rope_scaling = {
        "factor": shape.rope_factor,
        "high_freq_factor": shape.rope_high_freq_factor,
        "low_freq_factor": shape.rope_low_freq_factor,
        "original_max_position_embeddings": shape.rope_original_positions,
        "rope_type": "llama3",
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": shape.bos_token_id,
        "eos_token_id": shape.eos_token_id,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": shape.intermediate_size,
        "max_position_embeddings": shape.max_position_embeddings,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.num_attention_heads,
        "num_hidden_layers": shape.num_hidden_layers,
        "num_key_value_heads": shape.num_key_value_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": shape.rms_norm_eps,
        "rope_scaling": rope_scaling,
        "rope_theta": shape.rope_theta,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.45.1",
        "use_cache": True,
        "vocab_size": shape.vocab_size,
    }


def write_tokenizer(checkpoint_dir: Path, tokenizer: Tokenizer, shape: DemoShape) -> None:
    """Write `tokenizer.json`, `tokenizer_config.json` and `special_tokens_map.json`."""
    tokenizer.save(str(checkpoint_dir / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    added = {
        str(shape.bos_token_id + index): {"content": token, **flags, "special": True}
        for index, token in enumerate(SPECIAL_TOKENS)
    }
    config = {
        "added_tokens_decoder": added,
        "bos_token": BEGIN_OF_TEXT,
        "clean_up_tokenization_spaces": False,  # true would eat the space before a comma in source code
        "eos_token": END_OF_TEXT,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": shape.max_position_embeddings,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    _write_json(checkpoint_dir / "tokenizer_config.json", config)
    named = {"bos_token": BEGIN_OF_TEXT, "eos_token": END_OF_TEXT}
    token_map = {role: {"content": token, **flags} for role, token in named.items()}
    _write_json(checkpoint_dir / "special_tokens_map.json", token_map)


def _training_facts(checkpoint_dir: Path, run: Run, report: StepReport) -> dict[str, object]:
    """The record of a run; the score is that of the bf16 file on disk, computed in float32."""
    stored = load_file(checkpoint_dir / "model.safetensors")
    weights = {name: weight.float() for name, weight in stored.items()}
    held_out = score(weights, run.shape, run.tokenizer, [article.text for article in run.held_out])
    return {
        "corpus": run.corpus_facts,
        "recipe": asdict(run.recipe),
        "steps": report.step,
        "tokens_seen": report.tokens_seen,
        "seconds": round(report.elapsed_s),
        "torch_version": torch.__version__,
        "num_parameters": sum(weight.numel() for weight in weights.values()),
        "unigram_perplexity": run.unigram_perplexity,
        "held_out": asdict(held_out),
        "model_sha256": hashlib.sha256((checkpoint_dir / "model.safetensors").read_bytes()).hexdigest(),
    }


def _write_json(path: Path, content: Mapping[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _log(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _recipe(steps: int, max_train_s: float) -> Recipe:
    """The recipe at another length, refused in the user's words."""
    try:
        return Recipe(steps=steps, max_train_s=max_train_s)
    except ValueError as error:
        raise RefusedError(str(error), where="--steps, --max-train-s", todo="train for longer") from error


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="train_demo", description="Train the demo checkpoint on this CPU.")
    parser.add_argument("--output-dir", required=True, help="checkpoint folder to write; must not exist")
    parser.add_argument(
        "--steps", type=int, default=Recipe().steps, help="most optimizer steps (%(default)s)"
    )
    parser.add_argument(
        "--max-train-s", type=float, default=Recipe().max_train_s, help="most seconds (%(default)s)"
    )
    parser.add_argument(
        "--snapshot-every-s", type=float, default=300.0, help="seconds between snapshots (%(default)s)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    sys.exit(main())
