"""`minitron deploy`: a Helm chart or a Compose file that serves one bundle, bound to it.

It knows which paths may be written and that nothing half-written is left. What is written is deploy_helm.py's
and deploy_compose.py's, the numbers deployment.py's.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from minitron_build.errors import CheckpointError, PlanError, UsageError

if TYPE_CHECKING:
    from minitron_build.bundle.bundle import Bundle
    from minitron_build.deploy.deploy_compose import ComposeAccess
    from minitron_build.deploy.deployment import Deployment

TODO_FORCE = "give another path, or --force to replace it"


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `minitron deploy`."""
    parser.add_argument("bundle", type=Path, metavar="BUNDLE", help="GPU bundle made by minitron build")
    form = parser.add_mutually_exclusive_group(required=True)
    form.add_argument("--kubernetes", type=Path, metavar="DIR", help="write a Helm chart to DIR")
    form.add_argument("--compose", type=Path, metavar="FILE", help="write a Compose file to FILE")
    parser.add_argument(
        "--api-key",
        action="store_true",
        help="Compose: callers must send the key that MINITRON_API_KEY holds when the service is started",
    )
    parser.add_argument(
        "--tls",
        type=Path,
        metavar="DIR",
        help="Compose: gRPC speaks TLS, with tls.crt and tls.key of DIR; with its ca.crt mutual TLS",
    )
    parser.add_argument("--force", action="store_true", help="replace a chart or Compose file that is there")
    parser.add_argument("--skip-hashes", action="store_true", help="do not compare files with the manifest")


def run(args: argparse.Namespace) -> int:
    """Refuse what cannot be, compare the bundle with its manifest, write, print where and what next."""
    from minitron_build.bundle.agreement import check_plan
    from minitron_build.bundle.bundle import Bundle
    from minitron_build.deploy.deploy_compose import ComposeAccess
    from minitron_build.deploy.deployment import Deployment

    check_access(args)
    bundle = Bundle.load(args.bundle)
    deployment = Deployment.of(bundle)
    check_plan(bundle)
    output = args.kubernetes or args.compose
    check_output(output, bundle.path, is_chart=args.kubernetes is not None, force=args.force)
    if not args.skip_hashes:
        print(f"minitron: checking the files of {args.bundle}", file=sys.stderr, flush=True)
        bundle.check_files()
    if args.kubernetes is not None:
        write_chart_dir(deployment, output)
    else:
        write_compose_file(deployment, bundle, output, ComposeAccess(args.api_key, args.tls))
    _announce(deployment, output, is_chart=args.kubernetes is not None)
    return 0


def check_access(args: argparse.Namespace) -> None:
    """Refuse what the form that is written does not take.

    Raises:
        UsageError: a flag of Compose beside --kubernetes.
        PlanError: a folder without certificate and key.
    """
    if args.kubernetes is not None and (args.api_key or args.tls is not None):
        raise UsageError(
            "--api-key and --tls are for --compose",
            expected="the chart's values",
            todo="helm upgrade --set auth.apiKeySecret=NAME --set tls.secretName=NAME",
        )
    for name in ("tls.crt", "tls.key") if args.tls is not None else ():
        if not (args.tls / name).is_file():
            raise PlanError(f"no {name} in {args.tls}", expected="tls.crt and tls.key", where="--tls")


def check_output(output: Path, bundle_dir: Path, *, is_chart: bool, force: bool) -> None:
    """Refuse to write into the bundle, or over what is there.

    Args:
        is_chart: the output is a chart's folder, else a Compose file.
        force: a chart may replace a chart, a file a file; nothing else is ever removed.

    Raises:
        CheckpointError: names what is in the way.
    """
    if output.resolve().is_relative_to(bundle_dir.resolve()):
        raise CheckpointError(
            "lies in the bundle", expected="a path beside it: the manifest names its files", where=str(output)
        )
    if not output.exists():
        return
    if output.is_dir() != is_chart:
        found, wanted = ("a file", "a folder") if is_chart else ("a folder", "a file")
        raise CheckpointError(found, expected=f"{wanted} to write to", where=str(output))
    if is_chart and not any(output.iterdir()):
        return
    if is_chart and not (output / "Chart.yaml").is_file():
        raise CheckpointError(
            "a folder that holds no chart", expected="a new or empty folder", where=str(output)
        )
    if not force:
        raise CheckpointError("is there already", where=str(output), todo=TODO_FORCE)


def write_chart_dir(deployment: Deployment, output_dir: Path) -> None:
    """Write a chart beside its place and give it its name when it is whole."""
    from minitron_build.deploy.deploy_helm import write_chart

    parent = output_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{output_dir.name}-", dir=parent) as work:
        new, old = Path(work) / "new", Path(work) / "old"
        write_chart(deployment, new)
        if output_dir.exists():
            output_dir.rename(old)
        new.rename(output_dir)


def write_compose_file(
    deployment: Deployment, bundle: Bundle, output: Path, access: ComposeAccess | None = None
) -> None:
    """Write a Compose file and, beside it, the dashboard: each there whole or not at all."""
    from minitron_build.checkpoint.work_folder import write_durably
    from minitron_build.deploy.deploy_compose import compose_text
    from minitron_build.deploy.deploy_helm import DASHBOARD_FILE

    text = compose_text(deployment, bundle.path, output.parent, access)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_durably(dashboard_of(output), DASHBOARD_FILE.read_text(encoding="utf-8"))
    write_durably(output, text)


def dashboard_of(compose_file: Path) -> Path:
    """Where the Grafana dashboard goes that belongs to a Compose file."""
    return compose_file.with_name(f"{compose_file.stem}-grafana.json")


def _announce(deployment: Deployment, output: Path, *, is_chart: bool) -> None:
    """What was written, for a person and, on the last line, for a program."""
    ranks = f"{deployment.world_size} GPU{'s' if deployment.world_size > 1 else ''} a replica"
    print(f"{'chart' if is_chart else 'compose'}  {output}")
    print(f"engine   {deployment.arch} (SM {deployment.sm}), {deployment.precision}, {ranks}")
    print(f"built on {deployment.gpu or 'a GPU that the manifest does not name'}")
    print(f"image    {deployment.image}")
    print(f"start    at most {deployment.start_s} s until the first token")
    dashboard = output / "files" / "grafana-dashboard.json" if is_chart else dashboard_of(output)
    print(f"grafana  {dashboard}")
    print(f"try      {_next_command(output, is_chart=is_chart)}")
    document = {
        "kubernetes" if is_chart else "compose": str(output),
        "image": deployment.image,
        "sm": deployment.sm,
        "world_size": deployment.world_size,
        "start_s": deployment.start_s,
        "manifest_sha256": deployment.manifest_sha256,
        "dashboard": str(dashboard),
    }
    print(json.dumps(document), flush=True)


def _next_command(output: Path, *, is_chart: bool) -> str:
    place = shlex.quote(str(output))
    if is_chart:
        return f"helm upgrade --install minitron {place}"
    return f"docker compose -f {place} up -d --wait"
