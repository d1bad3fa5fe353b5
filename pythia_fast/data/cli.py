"""The command line of ``pythia-fast data``: flags and what is printed; the work is in `commands`.

As in `pythia_fast.cli` a command imports what it needs when it runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pythia_fast.command import Parser, add_command, print_rows
from pythia_fast.errors import CheckError, InputError


def _build(options: argparse.Namespace) -> None:
    from pythia_fast.data.build import build

    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers {options.workers}: at least 1 is needed")
    built = build(
        options.inputs,
        options.tokenizer,
        options.out,
        key=options.text_key,
        append_eod=not options.no_eod,
        workers=options.workers,
    )
    row = {"prefix": str(options.out), **asdict(built)}
    text = f"{built.documents:,} documents, {built.tokens:,} tokens in {options.out}.bin and .idx"
    print_rows(options, [row], text)


def _quickstart(options: argparse.Namespace) -> None:
    from pythia_fast.data.build import prepare_quickstart

    prepare_quickstart(options.out, options.vocab_size)
    print_rows(options, [{"directory": str(options.out)}], f"corpus and tokenizer in {options.out}")


def _join(options: argparse.Namespace) -> None:
    from pythia_fast.data.commands import join

    result = join(options.source, options.out)
    print_rows(options, [result], "{shards} shards, {bytes:,} bytes in {bin}".format(**result))


def _view(options: argparse.Namespace) -> None:
    from pythia_fast.config import load
    from pythia_fast.data import commands

    config = load(options.config, options.overrides)
    start, stop = _steps(options.step)
    decode = _decoder(config.data.tokenizer) if not options.json else None
    for row in commands.view(config, start, stop):
        if decode is None:
            print(json.dumps(row))
        else:
            print(f"step {row['step']} row {row['row']}: {decode(row['tokens'])}")


def _digest(options: argparse.Namespace) -> None:
    from pythia_fast.config import load
    from pythia_fast.data import commands

    config = load(options.config, options.overrides)
    ledger = _ledger(options.against) if options.against else {}
    first = min(ledger, default=0)  # that of the checkpoint an imported run began with
    start, stop = _steps(options.step) if options.step else (first, config.train.steps)
    for row in commands.digest(config, start, min(stop, max(ledger, default=stop) + 1)):
        step = row["step"]
        if start > 0:
            del row["running"]  # the chain begins at step 0
        if options.against and step not in ledger:
            raise CheckError(f"{options.against}: its ledger has no step {step}")
        if options.against and any(ledger[step].get(key) != row[key] for key in row):
            raise CheckError(f"{options.against}: the data of step {step} differs from its ledger")
        running = f"  running {row['running']}" if "running" in row else ""
        print_rows(options, [row], f"step {step}  {row['digest']}{running}")


def _ledger(run: Path) -> dict[int, dict[str, Any]]:
    from pythia_fast.metrics import read_steps

    rows = {row["step"]: row for row in read_steps(run / "ledger.jsonl")}
    if not rows:
        raise InputError(f"{run / 'ledger.jsonl'}: no ledger there")
    return rows


def _verify(options: argparse.Namespace) -> None:
    from pythia_fast.data.commands import verify

    for row in verify(options.paths, options.checksums):
        found = row.get("error") or row.get("sha256")
        if found is None:
            found = f"{row['documents']:,} documents" if "documents" in row else "missing"
        print_rows(options, [row], f"{row['path']}: {'ok' if row['ok'] else 'wrong'}: {found}")


def _steps(text: str) -> tuple[int, int]:
    """ "A" -> (A, A + 1); "A:B" -> (A, B), B exclusive."""
    start, _, stop = text.partition(":")
    try:
        first = int(start)
        last = int(stop) if stop else first + 1
    except ValueError:
        raise InputError(f"--step {text}: expected A or A:B, two step numbers") from None
    if not 0 <= first < last:
        raise InputError(f"--step {text}: expected 0 <= A < B")
    return first, last


def _decoder(tokenizer: str) -> Callable[[list[int]], str]:
    if not tokenizer:
        return lambda ids: " ".join(map(str, ids))
    from pythia_fast.data.build import load_tokenizer

    loaded = load_tokenizer(tokenizer)
    return lambda ids: json.dumps(loaded.decode(ids, skip_special_tokens=False), ensure_ascii=False)


def add_data_commands(commands: Any) -> None:
    """Adds ``data`` and its commands to those of the whole command line."""
    data = commands.add_parser(
        "data", help="build, see and check token files", allow_abbrev=False
    ).add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    build = add_command(
        data, "build", _build, "raw text or JSONL to .bin/.idx",
        "pythia-fast data build corpus.jsonl.zst --tokenizer tokenizer.json --out data/document",
    )  # fmt: skip
    build.add_argument("inputs", nargs="+", type=Path, help=".txt, .jsonl, .jsonl.zst or folders")
    build.add_argument("--tokenizer", type=Path, required=True, help="a tokenizers JSON file")
    build.add_argument("--out", type=Path, required=True, help="prefix of the files to write")
    build.add_argument("--text-key", default="text", help="key of the text in JSONL (text)")
    build.add_argument("--no-eod", action="store_true", help="no end-of-document token")
    build.add_argument("--workers", type=int, help="processes (default: one a core)")
    quick = add_command(
        data, "quickstart", _quickstart, "the standard library's text as a small corpus",
        "pythia-fast data quickstart --out data/quickstart",
    )  # fmt: skip
    quick.add_argument("--out", type=Path, required=True, help="folder to write")
    quick.add_argument("--vocab-size", type=int, default=4096, help="ids of its tokenizer (4096)")
    join = add_command(
        data, "join", _join, "concatenate shards into one .bin",
        "pythia-fast data join shards/document --out joined/document",
    )  # fmt: skip
    join.add_argument("source", type=Path, help="prefix of the shards PREFIX-000NN-of-000LL.bin")
    join.add_argument("--out", type=Path, required=True, help="prefix of the files to write")
    view = add_command(
        data, "view", _view, "the exact batch of any step",
        "pythia-fast data view configs/quickstart.toml --step 10:12 --json", takes_config=True,
    )  # fmt: skip
    view.add_argument("--step", required=True, metavar="A[:B]", help="steps A to B, B exclusive")
    digest = add_command(
        data, "digest", _digest, "digests of batches, as the ledger has them",
        "pythia-fast data digest configs/quickstart.toml --step 0:100 --against runs/quickstart",
        takes_config=True,
    )  # fmt: skip
    digest.add_argument("--step", metavar="A[:B]", help="steps A to B, B exclusive (default: all)")
    digest.add_argument("--against", type=Path, metavar="RUN", help="compare with a run's ledger")
    verify = add_command(
        data, "verify", _verify, "check token files against checksums or their index",
        "pythia-fast data verify data/document.bin --checksums SHA256SUMS",
    )  # fmt: skip
    verify.add_argument("paths", nargs="*", type=Path, help="prefixes, files or folders")
    verify.add_argument("--checksums", type=Path, help="sha256sum or JSON file")
