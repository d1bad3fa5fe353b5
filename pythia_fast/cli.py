"""The command line: `pythia-fast COMMAND ...`, the same as `python -m pythia_fast COMMAND ...`.

Each command is one function that imports what it needs when it runs, so that --help needs no torch.
Results go to stdout (with --json as JSON lines), everything else to stderr. Exit codes: 0 done,
1 the thing checked is wrong, 2 bad input, 130 and 143 stopped by a signal after saving.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

from pythia_fast import __version__
from pythia_fast.errors import CheckError, InputError

_OVERRIDE = re.compile(r"--([a-z_]+\.[a-z_]+|recipe)(=.*)?", re.DOTALL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns its exit code."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        given, overrides = _split_overrides(given)
        options, unknown = _parser().parse_known_args(given)
        if unknown:
            raise InputError(f"unexpected {' '.join(unknown)}{_suggestion(unknown[0])}")
        if overrides and not options.takes_config:
            raise InputError(f"{overrides[0]}: this command takes no configuration keys")
        options.overrides = overrides
        return options.run_command(options) or 0
    except InputError as error:
        return _fail(error, 2)
    except CheckError as error:
        return _fail(error, 1)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone; nothing more to say
        return 0
    except OSError as error:  # a full disk, a folder that may not be written
        return _fail(error, 2)


def _fail(error: Exception, code: int) -> int:
    print(f"pythia-fast: {' '.join(str(error).split())}", file=sys.stderr)
    return code


def _split_overrides(arguments: list[str]) -> tuple[list[str], list[str]]:
    """Separates `--section.key value` and `--section.key=value` from the command's own flags."""
    own, overrides = [], []
    rest = iter(arguments)
    for argument in rest:
        if not _OVERRIDE.fullmatch(argument):
            own.append(argument)
            continue
        overrides.append(argument)
        if "=" not in argument:
            overrides += [value for value in [next(rest, None)] if value is not None]
    return own, overrides


def _suggestion(flag: str) -> str:
    from pythia_fast.config import describe_keys

    keys: dict[str, str] = {}
    for name, _, _ in describe_keys():
        keys.setdefault(name.rpartition(".")[2], f"--{name}")
    close = difflib.get_close_matches(flag.lstrip("-").replace("-", "_"), keys, n=1)
    return f"; did you mean {keys[close[0]]}?" if close and flag.startswith("-") else ""


# --- commands -------------------------------------------------------------------------------------


def _train(options: argparse.Namespace) -> int:
    from pythia_fast.config import load

    config = load(options.config, options.overrides)
    if options.explain:
        from pythia_fast.explain import as_text, explain

        _print(options, list(explain(config)), as_text(config))
        return 0
    run = options.run or Path("runs") / options.config.stem
    from pythia_fast.train import Stopped, train  # torch: only once the page is known to be good

    try:
        last = train(config, run)
    except Stopped as stopped:
        print(f"pythia-fast: {stopped}; the same command continues", file=sys.stderr)
        return 128 + stopped.signum
    from pythia_fast.report.summary import summarise

    summary, text = summarise(config, run, last)
    _print(options, [summary], text)
    return 0


def _data_build(options: argparse.Namespace) -> None:
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
    _print(options, [row], text)


def _data_quickstart(options: argparse.Namespace) -> None:
    from pythia_fast.data.build import prepare_quickstart

    prepare_quickstart(options.out, options.vocab_size)
    _print(options, [{"directory": str(options.out)}], f"corpus and tokenizer in {options.out}")


def _data_join(options: argparse.Namespace) -> None:
    from pythia_fast.data.commands import join

    result = join(options.source, options.out)
    _print(options, [result], "{shards} shards, {bytes:,} bytes in {bin}".format(**result))


def _data_view(options: argparse.Namespace) -> None:
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


def _data_digest(options: argparse.Namespace) -> None:
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
        _print(options, [row], f"step {step}  {row['digest']}{running}")


def _ledger(run: Path) -> dict[int, dict[str, Any]]:
    from pythia_fast.metrics import read_steps

    rows = {row["step"]: row for row in read_steps(run / "ledger.jsonl")}
    if not rows:
        raise InputError(f"{run / 'ledger.jsonl'}: no ledger there")
    return rows


def _data_verify(options: argparse.Namespace) -> None:
    from pythia_fast.data.commands import verify

    for row in verify(options.paths, options.checksums):
        found = row.get("error") or row.get("sha256")
        if found is None:
            found = f"{row['documents']:,} documents" if "documents" in row else "missing"
        _print(options, [row], f"{row['path']}: {'ok' if row['ok'] else 'wrong'}: {found}")


def _import(options: argparse.Namespace) -> None:
    from pythia_fast import hf
    from pythia_fast.neox import reader

    found = reader.find(options.directory)
    if found is not None:
        path = reader.import_checkpoint(found, options.run, options.yaml)
    elif options.yaml is not None:
        raise InputError(f"{options.directory}: --yaml goes with a NeoX checkpoint, not with this")
    else:
        path = hf.import_checkpoint(options.directory, options.run)
    _print(options, [{"checkpoint": str(path)}], f"imported to {path}")


def _export(options: argparse.Namespace) -> None:
    from pythia_fast import hf
    from pythia_fast.neox import writer

    if options.format == "neox":
        writer.export(options.checkpoint, options.out, options.tensor, options.ranks)
        _print(options, [{"directory": str(options.out)}], f"exported to {options.out}")
        return
    hf.export(
        options.checkpoint,
        options.out,
        dtype=options.dtype,
        tokenizer=options.tokenizer,
        hidden_act=options.hidden_act,
    )
    _print(options, [{"directory": str(options.out)}], f"exported to {options.out}")


def _generate(options: argparse.Namespace) -> None:
    from pythia_fast.generate import continue_texts

    results = continue_texts(
        options.checkpoint,
        options.prompt,
        options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        tokenizer=options.tokenizer,
    )
    for result in results:
        _print(options, [result], result["prompt"] + result["text"])


def _doctor(options: argparse.Namespace) -> int:
    from pythia_fast.doctor import examine

    rows = examine()
    text = "\n".join(f"{'ok  ' if r['ok'] else 'no  '} {r['what']}: {r['found']}" for r in rows)
    _print(options, rows, text)
    return 0 if all(row["ok"] for row in rows if row["required"]) else 1


def _plan(options: argparse.Namespace) -> None:
    from pythia_fast import plan
    from pythia_fast.config import load

    row = plan.plan(load(options.config, options.overrides), options.gpus, options.gpu)
    _print(options, [row], plan.describe(row))


def _bench(options: argparse.Namespace) -> int:
    root = Path(__file__).resolve().parents[1]
    if not (root / "bench" / "suite.py").exists():
        raise InputError("bench needs the repository: `pip install -e .` in a checkout")
    sys.path.insert(0, str(root))
    from bench.suite import run

    return run(options.minutes, options.out, options.only, options.json, options.small)


# --- printing and parsing -------------------------------------------------------------------------


def _print(options: argparse.Namespace, rows: list[dict[str, Any]], text: str) -> None:
    if options.json:
        for row in rows:
            print(json.dumps(row))
    else:
        print(text)


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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="pythia-fast",
        description="Trains the Pythia suite from hand-written Triton kernels, and proves it.",
        epilog="example: pythia-fast train configs/quickstart.toml --train.steps 100",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"pythia-fast {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    train = _command(
        commands, "train", _train, "train one run; continues where it stands",
        "pythia-fast train configs/pythia-70m.toml --data.prefix /data/pile/document",
        takes_config=True,
    )  # fmt: skip
    train.add_argument("--run", type=Path, help="run directory (default: runs/<config's name>)")
    train.add_argument(
        "--explain", action="store_true",
        help="print every switch, its value in both recipes, and what differs; train nothing",
    )  # fmt: skip

    data = commands.add_parser(
        "data", help="build, see and check token files", allow_abbrev=False
    ).add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    build = _command(
        data, "build", _data_build, "raw text or JSONL to .bin/.idx",
        "pythia-fast data build corpus.jsonl.zst --tokenizer tokenizer.json --out data/document",
    )  # fmt: skip
    build.add_argument("inputs", nargs="+", type=Path, help=".txt, .jsonl, .jsonl.zst or folders")
    build.add_argument("--tokenizer", type=Path, required=True, help="a tokenizers JSON file")
    build.add_argument("--out", type=Path, required=True, help="prefix of the files to write")
    build.add_argument("--text-key", default="text", help="key of the text in JSONL (text)")
    build.add_argument("--no-eod", action="store_true", help="no end-of-document token")
    build.add_argument("--workers", type=int, help="processes (default: one a core)")
    quick = _command(
        data, "quickstart", _data_quickstart, "the standard library's text as a small corpus",
        "pythia-fast data quickstart --out data/quickstart",
    )  # fmt: skip
    quick.add_argument("--out", type=Path, required=True, help="folder to write")
    quick.add_argument("--vocab-size", type=int, default=4096, help="ids of its tokenizer (4096)")
    join = _command(
        data, "join", _data_join, "concatenate shards into one .bin",
        "pythia-fast data join shards/document --out joined/document",
    )  # fmt: skip
    join.add_argument("source", type=Path, help="prefix of the shards PREFIX-000NN-of-000LL.bin")
    join.add_argument("--out", type=Path, required=True, help="prefix of the files to write")
    view = _command(
        data, "view", _data_view, "the exact batch of any step",
        "pythia-fast data view configs/quickstart.toml --step 10:12 --json", takes_config=True,
    )  # fmt: skip
    view.add_argument("--step", required=True, metavar="A[:B]", help="steps A to B, B exclusive")
    digest = _command(
        data, "digest", _data_digest, "digests of batches, as the ledger has them",
        "pythia-fast data digest configs/quickstart.toml --step 0:100 --against runs/quickstart",
        takes_config=True,
    )  # fmt: skip
    digest.add_argument("--step", metavar="A[:B]", help="steps A to B, B exclusive (default: all)")
    digest.add_argument("--against", type=Path, metavar="RUN", help="compare with a run's ledger")
    verify = _command(
        data, "verify", _data_verify, "check token files against checksums or their index",
        "pythia-fast data verify data/document.bin --checksums SHA256SUMS",
    )  # fmt: skip
    verify.add_argument("paths", nargs="*", type=Path, help="prefixes, files or folders")
    verify.add_argument("--checksums", type=Path, help="sha256sum or JSON file")

    bring = _command(
        commands, "import", _import, "a Hugging Face GPTNeoX or NeoX directory to a new run",
        "pythia-fast import pythia-70m/ --run runs/from-hub",
    )  # fmt: skip
    bring.add_argument(
        "directory", type=Path, help="with config.json and weights, or global_step<N> of GPT-NeoX"
    )
    bring.add_argument("--run", type=Path, required=True, help="new run directory")
    bring.add_argument("--yaml", type=Path, help="the NeoX run's page, where no file names heads")
    export = _command(
        commands, "export", _export, "a checkpoint to a Hugging Face or NeoX directory",
        "pythia-fast export runs/quickstart/checkpoints/step600 --out hf/",
    )  # fmt: skip
    export.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    export.add_argument("--out", type=Path, required=True, help="new directory")
    export.add_argument("--format", choices=("hf", "neox"), default="hf")
    export.add_argument("--tensor", type=int, default=1, help="neox: tensor-parallel ranks (1)")
    export.add_argument("--ranks", type=int, default=1, help="neox: data-parallel ranks (1)")
    export.add_argument("--dtype", choices=("fp16", "bf16", "fp32"), default="fp16")
    export.add_argument("--tokenizer", type=Path, help="default: the run's own, if it named one")
    export.add_argument(
        "--hidden-act", default="gelu", choices=("gelu", "gelu_new", "gelu_pytorch_tanh"),
        help="GELU in config.json: gelu as the Hub's files say, or the tanh form trained with",
    )  # fmt: skip

    generate = _command(
        commands, "generate", _generate, "continue prompts",
        "pythia-fast generate runs/quickstart/checkpoints/step600 --prompt 'def main'",
    )  # fmt: skip
    generate.add_argument("checkpoint", type=Path, help="a checkpoint folder")
    generate.add_argument("--prompt", action="append", required=True, help="may be given again")
    generate.add_argument("--max-new-tokens", type=int, default=64, help="tokens (64)")
    generate.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    generate.add_argument("--seed", type=int, default=0, help="of sampling (0)")
    generate.add_argument("--tokenizer", type=Path, help="default: the run's own")

    plan = _command(
        commands, "plan", _plan, "memory, FLOPs and the bound of the speed, by arithmetic",
        "pythia-fast plan configs/pythia-1.4b.toml --gpu H200", takes_config=True,
    )  # fmt: skip
    plan.add_argument("--gpus", type=int, default=1, help="1; layouts over more are not there yet")
    plan.add_argument("--gpu", default="H200", help="H200 (default) or H100")
    bench = _command(
        commands, "bench", _bench, "kernels and training beside their peers, in one run",
        "pythia-fast bench --minutes 9 --out runs/bench --only train",
    )  # fmt: skip
    bench.add_argument("--minutes", type=float, default=9.0, help="of all together (9)")
    bench.add_argument("--out", type=Path, default=Path("runs/bench"), help="folder (runs/bench)")
    bench.add_argument("--only", nargs="+", metavar="PART", help="e.g. baselines train layer_norm")
    bench.add_argument("--small", action="store_true", help="a smoke test on the CPU, no timing")

    _command(
        commands, "doctor", _doctor, "what this machine can run, what is missing, how to get it",
        "pythia-fast doctor",
    )  # fmt: skip
    return parser


def _command(
    commands: Any, name: str, run: Callable[..., Any], what: str, example: str,
    takes_config: bool = False,
) -> argparse.ArgumentParser:  # fmt: skip
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
