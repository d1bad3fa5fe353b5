"""What every command has in common: its parser, its page of help, how it prints its results."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from pythia_fast.errors import InputError


class Parser(argparse.ArgumentParser):
    """Bad flags are bad input: one line, and `cli.main` ends with its code."""

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def add_command(
    commands: Any, name: str, run: Callable[..., Any], what: str, example: str,
    takes_config: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
    """Adds `name` to the commands of a parser; returns its own parser, for its flags.

    run(options) prints its results and returns the exit code, None for 0. what: one line of help.
    takes_config: it takes a TOML page, and every key of the page is a flag.
    """
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=what, description=what[0].upper() + what[1:] + ".", allow_abbrev=False,
        epilog=_keys_page(example) if takes_config else f"example: {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.set_defaults(run_command=run, takes_config=takes_config)
    if takes_config:
        parser.add_argument("config", type=Path, help="a TOML page, e.g. configs/quickstart.toml")
    parser.add_argument("--json", action="store_true", help="results as JSON lines on stdout")
    return parser


def _keys_page(example: str) -> str:
    from pythia_fast.config import describe_keys

    lines = [f"example: {example}", "", "every key of the page is a flag, --section.key value:"]
    lines += [f"  {name:27} {doc} ({default})" for name, default, doc in describe_keys()]
    return "\n".join(lines)


def some_path(text: str) -> Path:
    """A flag's path; an empty one is no folder of its own but the one a shell variable forgot."""
    if not text:
        raise argparse.ArgumentTypeError("expected a path")
    return Path(text)


def several() -> bool:
    """Whether this process is one of several of a launch."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def speaks() -> bool:
    """Whether this is the process of a launch that prints what all have found."""
    return os.environ.get("RANK", "0") == "0"


def print_rows(options: argparse.Namespace, rows: list[dict[str, Any]], text: str) -> None:
    """A command's results on stdout: the rows as JSON lines with --json, else the text."""
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print(text)
