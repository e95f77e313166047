"""`vae-dist data` and `vae-dist tokenizer`: text to data sets, and a look at them."""

from __future__ import annotations

import argparse
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vae_dist.arguments import add_command, at_least, new_file, show
from vae_dist.config.schema import PrepareConfig
from vae_dist.errors import ConfigError, RunError
from vae_dist.observe.console import say


def add_data_commands(commands: Any) -> None:
    """The commands' arguments."""
    data = commands.add_parser("data", help="prepare and look at data sets").add_subparsers(required=True)
    one = add_command(data, "prepare", data_prepare, "text to a data set directory")
    one.add_argument("source", help="docstrings, a file, a directory or a URL")
    one.add_argument("out")
    _add_prepare_options(one)
    one = add_command(data, "info", data_info, "counts and lengths of a data set directory")
    one.add_argument("dir")
    one = add_command(data, "preview", data_preview, "decoded text of some sequences")
    one.add_argument("dir")
    one.add_argument("--split", help="default: train")
    one.add_argument("--first", type=int, help="number in the split; default: 0")
    one.add_argument("--shard", metavar="NAME", help="instead of --split: the sequences of this shard")
    one.add_argument("--index", type=int, help="with --shard: number in the shard; default: 0")
    one.add_argument("--num", type=at_least(1), default=10)
    one = add_command(
        data, "lint", data_lint, "read every shard in full and say what is wrong; status 1 when anything is"
    )
    one.add_argument("dir", help="a data set directory or its URL")
    one = add_command(data, "merge", data_merge, "one data set from several of the same tokenizer")
    one.add_argument("out", help="a new directory")
    one.add_argument("dirs", nargs="+", metavar="DIR", help="data set directories or URLs, in this order")
    one = add_command(data, "split", data_split, "move texts of the training split to validation and test")
    one.add_argument("dir", help="a data set directory or its URL")
    one.add_argument("out", help="a new directory")
    one.add_argument("--valid-fraction", type=at_least(0.0), default=0.0, help="share of the training texts")
    one.add_argument("--test-fraction", type=at_least(0.0), default=0.0, help="share of the training texts")
    one.add_argument("--seed", type=at_least(0), default=0, help="of the choice")
    tokenizer = commands.add_parser("tokenizer", help="train tokenizers").add_subparsers(required=True)
    one = add_command(tokenizer, "train", tokenizer_train, "text to a tokenizer.json")
    one.add_argument("source")
    one.add_argument("out")
    _add_prepare_options(one)


def data_prepare(args: argparse.Namespace) -> dict[str, Any]:
    """`data prepare`: text to a data set; what it has become."""
    from vae_dist.data.prepare.prepare import prepare
    from vae_dist.data.store.info import describe
    from vae_dist.launch.prepare import executor
    from vae_dist.observe.preparing import show_preparing

    run, progress = executor(args.workers), show_preparing()
    return describe(prepare(args.source, args.out, _prepare_options(args), run=run, progress=progress))


def data_info(args: argparse.Namespace) -> dict[str, Any]:
    """`data info`: counts and lengths."""
    from vae_dist.data.store.dataset import Dataset
    from vae_dist.data.store.info import describe, render_info

    facts = describe(Dataset.open(args.dir))
    say(render_info(facts))
    return facts


def data_preview(args: argparse.Namespace) -> dict[str, Any]:
    """`data preview`: sequences as text."""
    from vae_dist.data.store.dataset import Dataset
    from vae_dist.data.store.info import locate, preview

    dataset, num = Dataset.open(args.dir), args.num
    split, first = args.split or "train", args.first or 0
    if args.shard is not None:
        if (args.split, args.first) != (None, None):
            raise ConfigError("A sequence is known by --shard and --index or by --split and --first. Give one pair.")
        split, first, left = locate(dataset, args.shard, args.index or 0)
        num = min(num, left)
    elif args.index is not None:
        raise ConfigError("--index counts in a shard. Say in which with --shard, or give --first.")
    texts = preview(dataset, split, first, num)
    for number, text in enumerate(texts, first):
        print(f"{number:>8}  {text}")
    return {"split": split, "first": first, "texts": texts}


def data_lint(args: argparse.Namespace) -> None:
    """`data lint`: every byte checked; an error where something is wrong."""
    from vae_dist.data.store.lint import lint

    report = lint(args.dir, lambda problem: say(f"problem: {problem}"))
    for note in report["notes"]:
        say(f"note: {note['what']}")
    show(report)
    # What was found is the result of the command, and the status says that there is something.
    if count := len(report["problems"]):
        raise RunError(f"{args.dir} has {count} problem{'s' if count > 1 else ''}; see above.")


def data_merge(args: argparse.Namespace) -> dict[str, Any]:
    """`data merge`: one data set of several."""
    from vae_dist.data.prepare.rewrite import merge
    from vae_dist.data.store.info import describe

    return describe(merge(args.dirs, args.out))


def data_split(args: argparse.Namespace) -> dict[str, Any]:
    """`data split`: more training texts held out."""
    from vae_dist.data.prepare.rewrite import split
    from vae_dist.data.store.info import describe

    return describe(split(args.dir, args.out, args.valid_fraction, args.test_fraction, args.seed))


def tokenizer_train(args: argparse.Namespace) -> dict[str, Any]:
    """`tokenizer train`: a tokenizer.json without a data set."""
    from vae_dist.data.prepare.prepare import train_tokenizer
    from vae_dist.launch.prepare import executor
    from vae_dist.observe.preparing import show_preparing

    out, run, progress = new_file(args.out), executor(args.workers), show_preparing()
    tokenizer = train_tokenizer(args.source, _prepare_options(args), out.parent, run=run, progress=progress)
    tokenizer.save(out)
    return {"path": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}


def _add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """--workers, and one flag per field of PrepareConfig, so that file and flags cannot differ."""
    workers = "local processes where there is no Ray cluster; default: one for each CPU"
    parser.add_argument("--workers", type=at_least(1), metavar="N", help=workers)
    for name, field in PrepareConfig.model_fields.items():
        options: dict[str, Any] = {"help": f"{field.description} Default: {field.default}.", "dest": name}
        kind = _flag_type(field.annotation)
        if kind is bool:
            options["action"] = argparse.BooleanOptionalAction
        elif get_origin(kind) is Literal:
            options["choices"] = get_args(kind)
        else:
            options |= {"type": kind, "metavar": kind.__name__.upper()}
        options["help"] = options["help"].replace("%", "%%")
        parser.add_argument(f"--{name.replace('_', '-')}", default=argparse.SUPPRESS, **options)


def _flag_type(annotation: Any) -> Any:
    """The type of a flag's value: without None, which is the flag left out, and without bounds."""
    if get_origin(annotation) in (Union, UnionType):
        return _flag_type(next(kind for kind in get_args(annotation) if kind is not type(None)))
    return annotation.__origin__ if get_origin(annotation) is Annotated else annotation


def _prepare_options(args: argparse.Namespace) -> PrepareConfig:
    from vae_dist.config.checks import fraction_problem
    from vae_dist.config.load import validate_section

    given = {name: getattr(args, name) for name in PrepareConfig.model_fields if hasattr(args, name)}
    options = validate_section(PrepareConfig, given)
    if problem := fraction_problem(options):
        raise ConfigError(problem)
    return options
