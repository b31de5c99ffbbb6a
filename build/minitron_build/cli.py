"""The `minitron` command: a table of verbs, exit codes, and one line per error.

It knows each verb's module and nothing of what the verb does. A verb's module offers
`configure_parser(parser)` and `run(args) -> int`, and imports what is heavy inside `run`.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple, TextIO, cast

from minitron_build import __version__

PURPOSE = "Build, package, serve and call Llama-3.1-Minitron with TensorRT-LLM on Triton."
EXIT_DONE, EXIT_REFUSED, EXIT_USAGE, EXIT_INTERRUPTED = 0, 1, 2, 130
GRPC_LOG_VARIABLE = "GRPC_VERBOSITY"
"""Read by grpc when it is imported, which no verb's module does before it runs."""


class Verb(NamedTuple):
    """Where a verb lives and the line `--help` shows for it."""

    module: str
    summary: str


VERBS: dict[str, Verb] = {
    "build": Verb("minitron_build.build", "HF checkpoint -> TensorRT-LLM checkpoint -> engine -> bundle"),
    "plan": Verb(
        "minitron_build.planning.plan_command",
        "memory and ceilings of a build on each GPU model; no work done",
    ),
    "inspect": Verb(
        "minitron_build.bundle.inspect_command", "what a checkpoint, engine or bundle is, verified"
    ),
    "verify": Verb(
        "minitron_build.verify.verify_command",
        "is a checkpoint or a bundle as good as its source; exit 1 if not",
    ),
    "lint": Verb("minitron_build.lint.lint_command", "check a TensorRT-LLM model repository for Triton"),
    "deploy": Verb(
        "minitron_build.deploy.deploy_command", "a Helm chart or Compose file that serves a bundle"
    ),
    "serve": Verb("minitron_build.serving.serve", "serve a bundle with Triton until SIGTERM"),
    "demo": Verb("minitron_build.serving.demo", "build, serve and stream the demo model on this CPU"),
    "logits": Verb(
        "minitron_build.checkpoint.logits_command", "next-token logits of a TensorRT-LLM checkpoint, as JSON"
    ),
    "export-hf": Verb(
        "minitron_build.checkpoint.export_hf_command", "an FP8 checkpoint in Hugging Face's format"
    ),
    "generate": Verb(
        "minitron_client.generate_command", "completions from a server: one, streamed, or a file of prompts"
    ),
    "repl": Verb("minitron_client.repl_command", "write a text together with the model, line by line"),
    "bench": Verb("minitron_client.bench.bench_command", "load a server and measure it; compare two results"),
    "health": Verb("minitron_client.health_command", "is a server ready, and with which models"),
    "models": Verb("minitron_client.models_command", "a server's models, and how each can be asked"),
    "openai": Verb(
        "minitron_client.openai.openai_command", "an OpenAI-compatible HTTP server in front of a gRPC server"
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb.

    Returns:
        0 done, 1 refused or failed (one line on stderr), 2 bad usage, 130 interrupted.
    """
    if not _check_streams():
        return EXIT_REFUSED
    return _flushed(_run(list(sys.argv[1:] if argv is None else argv)))


def _run(argv: list[str]) -> int:
    try:
        args = _parse(argv)
    except SystemExit as stop:  # argparse has already printed
        return stop.code if isinstance(stop.code, int) else EXIT_USAGE
    except KeyboardInterrupt:
        return _interrupted()
    if VERBS[args.verb].module.startswith("minitron_client."):
        # An error is one line of ours. Not for `serve`: what it starts has a log of its own.
        os.environ.setdefault(GRPC_LOG_VARIABLE, "NONE")
    return _run_verb(args)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="minitron", description=PURPOSE)
    parser.add_argument("--version", action="version", version=f"minitron-trtllm {__version__}")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    asked = next((word for word in argv if not word.startswith("-")), None)
    for name, verb in VERBS.items():
        sub = verbs.add_parser(name, help=verb.summary, description=verb.summary)
        sub.add_argument("--debug", action="store_true", help="show the traceback of an error")
        if name == asked:  # only the verb asked for is imported
            module = importlib.import_module(verb.module)
            module.configure_parser(sub)
            sub.set_defaults(run=module.run)
    args, unknown = parser.parse_known_args(argv)
    if unknown:
        _owner_of(unknown, argv, parser, verbs.choices[args.verb]).error(
            f"unrecognized arguments: {' '.join(unknown)}"
        )
    return args


def _owner_of(
    unknown: list[str],
    argv: list[str],
    parser: argparse.ArgumentParser,
    sub: argparse.ArgumentParser,
) -> argparse.ArgumentParser:
    """Whose usage helps: the verb's, unless what is unknown stands before the verb."""
    before = argv[: argv.index(sub.prog.rpartition(" ")[2])]
    return parser if any(word in before for word in unknown) else sub


def _run_verb(args: argparse.Namespace) -> int:
    try:
        return int(args.run(args))
    except KeyboardInterrupt:
        return _interrupted()
    except BrokenPipeError:  # the reader of stdout has gone: nothing is left to say
        _discard_stdout()
        return EXIT_REFUSED
    except Exception as error:
        if args.debug:
            raise
        print(f"minitron: {_one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if getattr(error, "is_bad_usage", False) else EXIT_REFUSED


def _check_streams() -> bool:
    """A closed stdout is refused: the result would be lost, or go into the next file that is opened.

    Closed stdin and stderr are made empty: None in their place breaks whoever uses them, and `print` takes it
    for stdout.
    """
    if cast("TextIO | None", sys.stdin) is None:
        sys.stdin = open(os.devnull, encoding="utf-8")  # noqa: SIM115  # for as long as we run
    is_open = cast("TextIO | None", sys.stdout) is not None
    if cast("TextIO | None", sys.stderr) is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if not is_open:
        print(
            "minitron: stdout is closed, and the result would be lost; open it, or give >/dev/null",
            file=sys.stderr,
        )
    return is_open


def _flushed(code: int) -> int:
    """The exit code, once all that was printed has arrived."""
    try:
        sys.stdout.flush()
    except OSError as error:
        if not code and not isinstance(error, BrokenPipeError):
            print(
                f"minitron: stdout: {error.strerror}; the result is not whole: check the space behind it",
                file=sys.stderr,
            )
        _discard_stdout()
        return code or EXIT_REFUSED
    return code


def _discard_stdout() -> None:
    """What is left to print goes nowhere, or Python would fail on it once more at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _interrupted() -> int:
    print("minitron: interrupted", file=sys.stderr)
    return EXIT_INTERRUPTED


def _one_line(error: Exception) -> str:
    """The error as a user should read it; an unexpected one names its type and the way to see more."""
    from minitron_build.errors import MinitronError

    text = " ".join(str(error).split())
    if isinstance(error, MinitronError) or getattr(error, "is_minitron_client_error", False):
        return text
    if isinstance(error, ModuleNotFoundError):
        extra = _extra_of(error.name or "")
        return f"package {error.name} is not installed; install it: pip install 'minitron-trtllm[{extra}]'"
    if isinstance(error, OSError) and error.strerror:
        what = f"{error.filename}: " if error.filename else ""
        return f"{what}{error.strerror}; check the path, its permissions and the space behind it"
    return f"unexpected {type(error).__name__}: {text}; run again with --debug and report it"


def _extra_of(package: str) -> str:
    """Which extra of pyproject.toml brings a missing package."""
    top = package.split(".", maxsplit=1)[0]
    if top in {"fastapi", "uvicorn", "jinja2", "prometheus_client", "starlette"}:
        return "openai"
    return "local" if top in {"torch", "pytriton", "numpy", "transformers"} else "build"
