"""`vae-dist`: one thin function a command. Results on standard output (one JSON object last), the rest on stderr."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from vae_dist.config.schema import PrepareConfig
from vae_dist.errors import ConfigError, RunError, VaeDistError
from vae_dist.observe.console import INTERRUPTED, fail, say, show_log
from vae_dist.plan_command import add_plan_command
from vae_dist.table.command import add_table_command

# Seeds are added to row numbers and must stay inside 64 bits.
_LARGEST = 2**62
Command = Callable[[argparse.Namespace], dict[str, Any] | None]


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, 1 (it failed) or 2 (the input is wrong)."""
    show_log()
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:
        from vae_dist.train import main as train

        return train(given[1:])
    parsed = _parser().parse_args(given)
    try:
        result = parsed.command(parsed)
    except VaeDistError as error:
        return fail(error)
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    if result is not None:
        _show(result)
    return 0


def _show(result: dict[str, Any]) -> None:
    """The last line of standard output."""
    print(json.dumps(result, ensure_ascii=False))


def data_prepare(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.data.prepare.prepare import prepare
    from vae_dist.data.store.info import describe
    from vae_dist.launch.prepare import executor
    from vae_dist.observe.preparing import show_preparing

    run, progress = executor(args.workers), show_preparing()
    return describe(prepare(args.source, args.out, _prepare_options(args), run=run, progress=progress))


def data_info(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.data.store.dataset import Dataset
    from vae_dist.data.store.info import describe, render_info

    facts = describe(Dataset.open(args.dir))
    say(render_info(facts))
    return facts


def data_preview(args: argparse.Namespace) -> dict[str, Any]:
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
    from vae_dist.data.store.lint import lint

    report = lint(args.dir, lambda problem: say(f"problem: {problem}"))
    for note in report["notes"]:
        say(f"note: {note['what']}")
    _show(report)
    # What was found is the result of the command, and the status says that there is something.
    if count := len(report["problems"]):
        raise RunError(f"{args.dir} has {count} problem{'s' if count > 1 else ''}; see above.")


def data_merge(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.data.prepare.rewrite import merge
    from vae_dist.data.store.info import describe

    return describe(merge(args.dirs, args.out))


def data_split(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.data.prepare.rewrite import split
    from vae_dist.data.store.info import describe

    return describe(split(args.dir, args.out, args.valid_fraction, args.test_fraction, args.seed))


def tokenizer_train(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.data.prepare.prepare import train_tokenizer
    from vae_dist.launch.prepare import executor
    from vae_dist.observe.preparing import show_preparing

    out, run, progress = _new_file(args.out), executor(args.workers), show_preparing()
    tokenizer = train_tokenizer(args.source, _prepare_options(args), out.parent, run=run, progress=progress)
    tokenizer.save(out)
    return {"path": str(out), "vocab_size": tokenizer.vocab_size, "sha256": tokenizer.sha256}


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.data.store.dataset import Dataset
    from vae_dist.evaluate.whole import Evaluation, evaluate_model
    from vae_dist.export.model_dir import load_model
    from vae_dist.model.precision import autocast_dtype
    from vae_dist.observe.evaluation_page import write_evaluation

    page = _new_file(args.page) if args.page else None
    loaded = load_model(args.model)
    wanted = Evaluation(
        split=args.split,
        seed=args.seed,
        batch_sequences=args.batch_sequences,
        max_sequences=args.max_sequences,
        importance_samples=args.importance_samples,
        fitted_prior=args.prior == "fitted",
        autocast=autocast_dtype(args.precision, loaded.vae.output_bias.device),
        texts=page is not None,
        language_model=load_model(args.language_model) if args.language_model else None,
    )
    found = evaluate_model(loaded, Dataset.open(args.data), wanted)
    if page:
        write_evaluation(found, page)
        say(f"page: {page}")
    scores = found.pop("scores")
    return {**found, **scores}


def sample(args: argparse.Namespace) -> dict[str, Any]:
    model = _text_model(args.model)
    texts, rows, _ = model.sample(args.num, args.seed, _decoding(args, model), args.prior_scale)
    for text in texts:
        print(text)
    return {"seed": args.seed, "texts": texts, "log_probs": [row.log_prob for row in rows]}


def reconstruct(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.decode.encode import score

    texts = args.texts or [line.strip() for line in sys.stdin if line.strip()]
    if not texts:
        raise ConfigError("There is no text to reconstruct. Give texts as arguments, or one a line on standard input.")
    model = _text_model(args.model)
    encoded = model.encode(texts)
    rows = model.engine.run(model.reconstruct_requests(encoded, args.seed, _decoding(args, model)))
    outputs, scores = model.texts(rows), score(model.vae, list(zip(encoded, rows, strict=True)))
    for given, output in zip(texts, outputs, strict=True):
        print(f"{given}\n  -> {output}")
    found = [{"input": a, "text": b, **s} for a, b, s in zip(texts, outputs, scores, strict=True)]
    return {"seed": args.seed, "reconstructions": found}


def interpolate(args: argparse.Namespace) -> dict[str, Any]:
    model = _text_model(args.model)
    t, texts, _ = model.interpolate(args.a, args.b, args.steps, args.path, args.seed, _decoding(args, model))
    for at, text in zip(t, texts, strict=True):
        print(f"{at:.2f}  {text}")
    points = [{"t": at, "text": text} for at, text in zip(t, texts, strict=True)]
    return {"a": args.a, "b": args.b, "path": args.path, "points": points}


def export(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.engine.export_run import export_run

    return export_run(Path(args.run), Path(args.out))


def serve(args: argparse.Namespace) -> None:
    from vae_dist.config.load import load_section
    from vae_dist.serve.run import serve_models
    from vae_dist.serve.settings import ServeConfig, named_models

    flags = ("host", "port", "keys", "requests_per_minute", "texts")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    if args.models:
        given["models"] = named_models(args.models)
    serve_models(load_section(ServeConfig, args.config, given))


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    from vae_dist.doctor import examine, render

    facts = examine()
    say(render(facts))
    return facts


def _text_model(path: str) -> Any:
    from vae_dist.decode.latent_ops import TextModel
    from vae_dist.export.model_dir import load_model
    from vae_dist.model.precision import autocast_dtype

    loaded = load_model(path)
    # As the server has it, so that both give the same texts.
    dtype = autocast_dtype("auto", loaded.vae.output_bias.device)
    return TextModel(loaded.vae, loaded.tokenizer, loaded.max_tokens, dtype)


def _decoding(args: argparse.Namespace, model: Any) -> Any:
    from vae_dist.decode.request import Decoding

    longest = min(args.max_tokens or model.max_tokens, model.max_tokens)
    return Decoding(args.temperature, args.top_k, args.top_p, longest, args.allow_unknown, args.repetition_penalty)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="vae-dist", description="Pretrain text VAEs and sample from them.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    commands.add_parser("train", help="train; the same as python -m vae_dist.train")
    _add_data(commands)
    _add_model_commands(commands)
    add_plan_command(commands)
    add_table_command(commands)
    _command(commands, "doctor", doctor, "what is installed, and what is wrong")
    return parser


def _command(group: Any, name: str, command: Command, text: str) -> argparse.ArgumentParser:
    one: argparse.ArgumentParser = group.add_parser(name, help=text, description=text)
    one.set_defaults(command=command)
    return one


def _add_data(commands: Any) -> None:
    data = commands.add_parser("data", help="prepare and look at data sets").add_subparsers(required=True)
    one = _command(data, "prepare", data_prepare, "text to a data set directory")
    one.add_argument("source", help="docstrings, a file, a directory or a URL")
    one.add_argument("out")
    _add_prepare_options(one)
    one = _command(data, "info", data_info, "counts and lengths of a data set directory")
    one.add_argument("dir")
    one = _command(data, "preview", data_preview, "decoded text of some sequences")
    one.add_argument("dir")
    one.add_argument("--split", help="default: train")
    one.add_argument("--first", type=int, help="number in the split; default: 0")
    one.add_argument("--shard", metavar="NAME", help="instead of --split: the sequences of this shard")
    one.add_argument("--index", type=int, help="with --shard: number in the shard; default: 0")
    one.add_argument("--num", type=_at_least(1), default=10)
    one = _command(data, "lint", data_lint, "read every shard in full and say what is wrong; status 1 when anything is")
    one.add_argument("dir", help="a data set directory or its URL")
    one = _command(data, "merge", data_merge, "one data set from several of the same tokenizer")
    one.add_argument("out", help="a new directory")
    one.add_argument("dirs", nargs="+", metavar="DIR", help="data set directories or URLs, in this order")
    one = _command(data, "split", data_split, "move texts of the training split to validation and test")
    one.add_argument("dir", help="a data set directory or its URL")
    one.add_argument("out", help="a new directory")
    one.add_argument("--valid-fraction", type=_at_least(0.0), default=0.0, help="share of the training texts")
    one.add_argument("--test-fraction", type=_at_least(0.0), default=0.0, help="share of the training texts")
    one.add_argument("--seed", type=_at_least(0), default=0, help="of the choice")
    tokenizer = commands.add_parser("tokenizer", help="train tokenizers").add_subparsers(required=True)
    one = _command(tokenizer, "train", tokenizer_train, "text to a tokenizer.json")
    one.add_argument("source")
    one.add_argument("out")
    _add_prepare_options(one)


def _add_model_commands(commands: Any) -> None:
    one = _command(commands, "eval", evaluate, "likelihood and latent diagnostics on a split")
    one.add_argument("model")
    one.add_argument("data")
    one.add_argument("--split", default="test")
    one.add_argument("--importance-samples", type=_at_least(0), default=0, metavar="K")
    one.add_argument("--batch-sequences", type=_at_least(1), default=64)
    one.add_argument("--max-sequences", type=_at_least(1))
    one.add_argument("--prior", choices=("own", "fitted"), default="own", help="fitted: the mixture fitted by EM")
    one.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32")
    one.add_argument("--page", metavar="FILE.html", help="also measure what it writes, and write all as a page")
    one.add_argument("--language-model", metavar="MODEL", help="with --page: judges the samples in place of n-grams")
    one.add_argument("--seed", type=_at_least(0), default=0)
    one = _command(commands, "sample", sample, "texts from the prior")
    one.add_argument("model")
    one.add_argument("--num", type=_at_least(1), default=5)
    one.add_argument("--prior-scale", type=_at_least(0.0), default=1.0)
    _add_decoding(one, temperature=1.0)
    one = _command(commands, "reconstruct", reconstruct, "texts through the latent and back")
    one.add_argument("model")
    one.add_argument("texts", nargs="*", help="default: standard input, one a line")
    _add_decoding(one, temperature=0.0)
    one = _command(commands, "interpolate", interpolate, "texts between two texts")
    one.add_argument("model")
    one.add_argument("a")
    one.add_argument("b")
    one.add_argument("--steps", type=_at_least(2), default=7)
    one.add_argument("--path", choices=("linear", "slerp"), default="linear")
    _add_decoding(one, temperature=0.0)
    one = _command(commands, "export", export, "a run's model, or its newest checkpoint's, as a model directory")
    one.add_argument("run")
    one.add_argument("out")
    one = _command(commands, "serve", serve, "an HTTP endpoint through Ray Serve")
    one.add_argument("models", nargs="*", metavar="[NAME=]DIR", help="a name is for requests that choose a model")
    one.add_argument("--config", type=Path, metavar="YAML", help="these and more settings; flags come before it")
    one.add_argument("--host", help="default: 127.0.0.1")
    one.add_argument("--port", type=_at_least(1), help="default: 8000")
    keys = "a file of NAME:KEY lines that only you can read; default: $VAE_DIST_API_KEYS"
    one.add_argument("--keys", metavar="FILE", help=keys)
    one.add_argument("--requests-per-minute", type=_at_least(1), metavar="N", help="of each key; default: no limit")
    texts = "a data set whose validation texts the page's map shows to whoever may ask; may be given several times"
    one.add_argument("--texts", metavar="DATA", action="append", help=texts)


def _add_decoding(parser: argparse.ArgumentParser, temperature: float) -> None:
    parser.add_argument("--seed", type=_at_least(0), default=0)
    parser.add_argument("--temperature", type=_at_least(0.0), default=temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=_at_least(0), default=0)
    parser.add_argument("--top-p", type=_at_least(0.0), default=1.0)
    parser.add_argument("--max-tokens", type=_at_least(1))
    parser.add_argument("--repetition-penalty", type=_at_least(0.01), default=1.0, help="1 is off")
    parser.add_argument("--allow-unknown", action="store_true", help="let the model write <unk>")


def _at_least(minimum: float) -> Callable[[str], Any]:
    """A parser for numbers of the minimum's type that are not below it."""
    kind = type(minimum)

    def parse(text: str) -> Any:
        value = kind(text)
        if not minimum <= value <= _LARGEST:
            raise argparse.ArgumentTypeError(f"{text} is not between {minimum} and {_LARGEST}")
        return value

    parse.__name__ = "number" if kind is float else "whole number"
    return parse


def _add_prepare_options(parser: argparse.ArgumentParser) -> None:
    """--workers, and one flag per field of PrepareConfig, so that file and flags cannot differ."""
    workers = "local processes where there is no Ray cluster; default: one for each CPU"
    parser.add_argument("--workers", type=_at_least(1), metavar="N", help=workers)
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


def _new_file(text: str) -> Path:
    """A path that a file may be written to without replacing anything."""
    path = Path(text).expanduser().absolute()
    if not text or "://" in text:
        raise ConfigError(f"{text!r} is no local file. Give a path.")
    if path.exists():
        raise ConfigError(f"{path} exists. Choose another name, or delete it.")
    if not path.parent.is_dir():
        raise ConfigError(f"{path.parent} is no directory. Make it, or choose another one.")
    return path


if __name__ == "__main__":
    raise SystemExit(main())
