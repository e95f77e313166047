"""`vae-dist`: one thin function a command. Results on standard output (one JSON object last), the rest on stderr."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vae_dist.arguments import add_command, at_least, new_file, show
from vae_dist.data_command import add_data_commands
from vae_dist.errors import ConfigError, VaeDistError
from vae_dist.observe.console import INTERRUPTED, fail, say, show_log
from vae_dist.plan_command import add_plan_command
from vae_dist.table.command import add_table_command


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status: 0, 1 (it failed), 2 (the input is wrong) or 130 (interrupted)."""
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
        show(result)
    return 0


def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """`eval`: likelihood and latents of a split and, with --page, texts."""
    from vae_dist.data.store.dataset import Dataset
    from vae_dist.evaluate.whole import Evaluation, evaluate_model
    from vae_dist.export.model_dir import load_model
    from vae_dist.model.precision import autocast_dtype
    from vae_dist.observe.evaluation_page import write_evaluation

    page = new_file(args.page) if args.page else None
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
    """`sample`: texts from the prior."""
    model = _text_model(args.model)
    texts, rows, _ = model.sample(args.num, args.seed, _decoding(args, model), args.prior_scale)
    for text in texts:
        print(text)
    return {"seed": args.seed, "texts": texts, "log_probs": [row.log_prob for row in rows]}


def reconstruct(args: argparse.Namespace) -> dict[str, Any]:
    """`reconstruct`: texts through their latents."""
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
    """`interpolate`: texts between two."""
    model = _text_model(args.model)
    t, texts, _ = model.interpolate(args.a, args.b, args.steps, args.path, args.seed, _decoding(args, model))
    for at, text in zip(t, texts, strict=True):
        print(f"{at:.2f}  {text}")
    points = [{"t": at, "text": text} for at, text in zip(t, texts, strict=True)]
    return {"a": args.a, "b": args.b, "path": args.path, "points": points}


def export(args: argparse.Namespace) -> dict[str, Any]:
    """`export`: the model directory of a run's newest checkpoint."""
    from vae_dist.engine.export_run import export_run

    return export_run(Path(args.run), Path(args.out))


def serve(args: argparse.Namespace) -> None:
    """`serve`: the endpoint, until a signal; prints no result."""
    from vae_dist.config.load import load_section
    from vae_dist.serve.run import serve_models
    from vae_dist.serve.settings import ServeConfig, named_models

    flags = ("host", "port", "keys", "requests_per_minute", "texts")
    given = {name: getattr(args, name) for name in flags if getattr(args, name) is not None}
    if args.models:
        given["models"] = named_models(args.models)
    serve_models(load_section(ServeConfig, args.config, given))


def doctor(args: argparse.Namespace) -> dict[str, Any]:
    """`doctor`: what is installed, and what is wrong."""
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
    add_data_commands(commands)
    _add_model_commands(commands)
    add_plan_command(commands)
    add_table_command(commands)
    add_command(commands, "doctor", doctor, "what is installed, and what is wrong")
    return parser


def _add_model_commands(commands: Any) -> None:
    one = add_command(commands, "eval", evaluate, "likelihood and latent diagnostics on a split")
    one.add_argument("model")
    one.add_argument("data")
    one.add_argument("--split", default="test")
    one.add_argument("--importance-samples", type=at_least(0), default=0, metavar="K")
    one.add_argument("--batch-sequences", type=at_least(1), default=64)
    one.add_argument("--max-sequences", type=at_least(1))
    one.add_argument("--prior", choices=("own", "fitted"), default="own", help="fitted: the mixture fitted by EM")
    one.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="fp32")
    one.add_argument("--page", metavar="FILE.html", help="also measure what it writes, and write all as a page")
    one.add_argument("--language-model", metavar="MODEL", help="with --page: judges the samples in place of n-grams")
    one.add_argument("--seed", type=at_least(0), default=0)
    one = add_command(commands, "sample", sample, "texts from the prior")
    one.add_argument("model")
    one.add_argument("--num", type=at_least(1), default=5)
    one.add_argument("--prior-scale", type=at_least(0.0), default=1.0)
    _add_decoding(one, temperature=1.0)
    one = add_command(commands, "reconstruct", reconstruct, "texts through the latent and back")
    one.add_argument("model")
    one.add_argument("texts", nargs="*", help="default: standard input, one a line")
    _add_decoding(one, temperature=0.0)
    one = add_command(commands, "interpolate", interpolate, "texts between two texts")
    one.add_argument("model")
    one.add_argument("a")
    one.add_argument("b")
    one.add_argument("--steps", type=at_least(2), default=7)
    one.add_argument("--path", choices=("linear", "slerp"), default="linear")
    _add_decoding(one, temperature=0.0)
    one = add_command(commands, "export", export, "a run's model, or its newest checkpoint's, as a model directory")
    one.add_argument("run")
    one.add_argument("out")
    one = add_command(commands, "serve", serve, "an HTTP endpoint through Ray Serve")
    one.add_argument("models", nargs="*", metavar="[NAME=]DIR", help="a name is for requests that choose a model")
    one.add_argument("--config", type=Path, metavar="YAML", help="these and more settings; flags win over it")
    one.add_argument("--host", help="default: 127.0.0.1")
    one.add_argument("--port", type=at_least(1), help="default: 8000")
    keys = "a file of NAME:KEY lines that only you can read; default: $VAE_DIST_API_KEYS"
    one.add_argument("--keys", metavar="FILE", help=keys)
    one.add_argument("--requests-per-minute", type=at_least(1), metavar="N", help="of each key; default: no limit")
    texts = "a data set whose validation texts the page's map shows to whoever may ask; may be given several times"
    one.add_argument("--texts", metavar="DATA", action="append", help=texts)


def _add_decoding(parser: argparse.ArgumentParser, temperature: float) -> None:
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--temperature", type=at_least(0.0), default=temperature, help="0 is greedy")
    parser.add_argument("--top-k", type=at_least(0), default=0)
    parser.add_argument("--top-p", type=at_least(0.0), default=1.0)
    parser.add_argument("--max-tokens", type=at_least(1))
    parser.add_argument("--repetition-penalty", type=at_least(0.01), default=1.0, help="1 is off")
    parser.add_argument("--allow-unknown", action="store_true", help="let the model write <unk>")


if __name__ == "__main__":
    raise SystemExit(main())
