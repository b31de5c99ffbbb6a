"""`minitron lint`: what is wrong with a TensorRT-LLM model repository, before Triton is started on it.

Works on any repository of that layout, NVIDIA's templates included, filled or not. It knows how findings are
shown and what they do to the exit code; the checks are in lint_checks.py and lint_pipeline.py, those of the
server's command line in lint_server.py.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from minitron_build.lint.finding import ERROR, Finding
from minitron_build.lint.lint_checks import lint_model
from minitron_build.lint.lint_pipeline import lint_pipeline
from minitron_build.lint.lint_server import ServerCommand, lint_server
from minitron_build.lint.triton_repository import TritonRepository

EXIT_CLEAN, EXIT_ERRORS = 0, 1


def configure_parser(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of `minitron lint`."""
    parser.add_argument(
        "model_repo", type=Path, metavar="MODEL_REPO", help="what tritonserver --model-repository takes"
    )
    parser.add_argument(
        "--working-dir",
        type=Path,
        metavar="DIR",
        help="where tritonserver is started, for relative paths (default: the folder that holds MODEL_REPO)",
    )
    parser.add_argument(
        "--skip-paths", action="store_true", help="the paths are of another machine: follow none of them"
    )
    parser.add_argument(
        "--command",
        metavar="TEXT",
        help="the tritonserver command line that serves it: warns of what it leaves open",
    )
    parser.add_argument("--json", action="store_true", help="end with the findings as one JSON document")


def run(args: argparse.Namespace) -> int:
    """Print one line for each finding; 1 when any is an error."""
    repository = TritonRepository.read(
        args.model_repo, working_dir=args.working_dir, has_paths=not args.skip_paths
    )
    findings = lint(repository)
    if args.command is not None:
        findings += lint_server(ServerCommand.parse(args.command))
    for finding in findings:
        print(finding)
    num_errors = sum(finding.severity == ERROR for finding in findings)
    num_warnings = len(findings) - num_errors
    counts = {"model": len(repository.models), "error": num_errors, "warning": num_warnings}
    words = (f"{count} {word}{'s'[: count != 1]}" for word, count in counts.items())
    print(f"{args.model_repo}: {', '.join(words)}")
    if args.json:
        document = {
            "model_repo": str(args.model_repo),
            "models": list(repository.models),
            "errors": num_errors,
            "warnings": num_warnings,
            "findings": [finding.as_dict() for finding in findings],
        }
        print(json.dumps(document))
    return EXIT_ERRORS if num_errors else EXIT_CLEAN


def lint(repository: TritonRepository) -> tuple[Finding, ...]:
    """Every finding: model by model, then what is wrong between them."""
    found = [one for model in repository.models.values() for one in lint_model(repository, model)]
    return tuple(dict.fromkeys([*found, *lint_pipeline(repository)]))
