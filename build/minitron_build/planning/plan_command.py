"""`minitron plan`: what a build would be on each GPU model, before a GPU hour is spent.

The verb's flags, table and JSON. It reads a checkpoint's config only and does no work.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from minitron_build.errors import PlanError
from minitron_build.planning.host_memory import available_memory_bytes
from minitron_build.planning.outlook import Outlook, gpu_outlooks
from minitron_build.planning.plan import BuildPlan, make_plan
from minitron_build.planning.plan_flags import add_plan_flags, plan_request
from minitron_build.planning.targets import find_gpus
from minitron_build.source.hf_checkpoint import check_folder
from minitron_build.source.hub import resolve_config
from minitron_build.source.model_config import ModelConfig

PLOT_FORMATS = (".png", ".svg", ".pdf")
HEADERS = (
    *("GPU", "arch", "memory GB", "precision", "fits", "weights GB", "activations GB", "KV KiB/token"),
    *("KV tokens", "full requests", "batch", "decode@1", "decode@batch", "decode@full cache", "prefill"),
)


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Flags of `minitron plan`."""
    add_plan_flags(parser, auto_arch="every GPU model of the table, and this machine's")
    parser.add_argument("--json", action="store_true", help="JSON on the last line")
    parser.add_argument(
        "--plot", type=_plot, metavar="FILE.png", help="throughput ceiling and KV capacity over batch size"
    )


def run(args: argparse.Namespace) -> int:
    """Print the table; the last line is JSON with --json.

    Raises:
        PlanError: nothing fits, or the plot's folder is not there; nothing was printed.
    """
    if args.plot is not None and not args.plot.parent.is_dir():
        raise PlanError(
            "no such folder", expected="a folder that exists", where=f"--plot {args.plot}", todo="make it"
        )
    source = resolve_config(args.checkpoint, args.revision)
    check_folder(source.hf_dir)
    config, request = ModelConfig.read(source.hf_dir), plan_request(args)
    if request.arch == "cpu":
        return _run_cpu(
            args, make_plan(source.name, config, request, gpus=(), available_bytes=available_memory_bytes())
        )
    rows = gpu_outlooks(
        source.name, config, request, gpus=find_gpus(), available_bytes=available_memory_bytes()
    )
    print(f"{source.name}, tp {request.tp_size}, pp {request.pp_size}, per GPU")
    print("\n".join(_table(rows)))
    print("\n".join(_notes(rows)))
    if args.plot is not None:
        from minitron_build.planning.plan_plot import write_plot

        write_plot(args.plot, source.name, config, rows)
    if args.json:
        print(json.dumps({"source": source.name, "gpus": [row.as_dict() for row in rows]}))
    return 0


def _plot(text: str) -> Path:
    path = Path(text)
    if path.suffix not in PLOT_FORMATS:
        raise argparse.ArgumentTypeError(
            f"expected a name that ends in {' or '.join(PLOT_FORMATS)}, got {text!r}"
        )
    return path


def _run_cpu(args: argparse.Namespace, plan: BuildPlan) -> int:
    if args.plot is not None:
        raise PlanError("--plot with --arch cpu", todo="the plot compares GPU models: leave one of them out")
    print("\n".join(plan.lines()))
    if args.json:
        print(json.dumps(plan.as_dict()))
    return 0


def _table(rows: tuple[Outlook, ...]) -> Iterator[str]:
    """Columns as wide as their widest cell, words to the left and numbers to the right."""
    cells = [HEADERS, *(tuple(_cells(row)) for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(HEADERS))]
    for line in cells:
        padded = (
            cell.ljust(width) if column in (0, 1, 3, 4) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        yield "  ".join(padded).rstrip()


def _cells(row: Outlook) -> Iterator[str]:
    plan, fit, ceilings = row.plan, row.fit, row.ceilings
    yield from (row.gpu.name, row.gpu.arch, f"{row.gpu.memory_bytes / 1e9:.1f}")
    yield plan.precision if plan else "-"
    yield "yes" if plan else "no"
    yield f"{fit.weights_bytes / 1e9:.2f}" if fit else "-"
    yield f"{fit.activation_bytes / 1e9:.2f}" if fit else "-"
    yield f"{fit.kv_cache_bytes_per_token / 1024:g}" if fit else "-"
    yield f"{fit.kv_cache_tokens:,}" if fit else "-"
    yield str(plan.memory.full_length_requests) if plan else "-"
    yield str(plan.limits.max_batch_size) if plan else "-"
    if ceilings is None:
        yield from ("-",) * 4
        return
    yield f"{ceilings.decode_batch_1:,.0f}"
    yield f"{ceilings.decode_max_batch:,.0f}"
    yield f"{ceilings.decode_memory_bound:,.0f} ({ceilings.memory_bound_batch})"
    yield f"{ceilings.prefill:,.0f}"


def _notes(rows: tuple[Outlook, ...]) -> Iterator[str]:
    """What the columns mean, why a GPU is out, and what the build machine needs."""
    plans = [row.plan for row in rows if row.plan is not None]
    limits = plans[0].limits
    yield "decode and prefill are ceilings in tokens/s, all requests together, not measurements:"
    yield (
        f"  one request; `batch` requests, and as many as fill the KV cache (in brackets), of "
        f"{limits.typical_len} tokens each; prompts of {limits.max_input_len} tokens"
    )
    yield f"a full request holds {limits.max_seq_len} tokens; activations are an estimate"
    for row in rows:
        if row.plan is None:
            yield f"no {row.gpu.name}: {row.reason}"
    for precision, plan in {plan.precision: plan for plan in plans}.items():
        for stage, need in plan.memory.stages.items():
            yield (
                f"{precision} stage {stage}: {need.ram_bytes / 1e9:.1f} GB of host RAM, "
                f"{need.disk_bytes / 1e9:.2f} GB of disk"
            )
    for warning in dict.fromkeys(warning for plan in plans for warning in plan.warnings):
        yield f"warning: {warning}"
