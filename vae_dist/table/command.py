"""`vae-dist table TABLE.yaml`: its arguments."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_table_command(commands: Any) -> None:
    """The command's arguments."""
    text = "train, evaluate and write every row of a table of results"
    one: argparse.ArgumentParser = commands.add_parser("table", help=text, description=text)
    one.set_defaults(command=table)
    one.add_argument("table", help="a table file, such as configs/results/ptb.table.yaml")
    here = "key=value of this machine, before any --option: run.storage, data.source, cluster.*"
    one.add_argument("overrides", nargs="*", help=here)
    one.add_argument("--rows", action="append", default=[], metavar="A,B", help="these methods only")
    again = "train these again where the table changed since their result was written"
    one.add_argument("--redo", action="append", default=[], metavar="A,B", help=again)
    shown = one.add_mutually_exclusive_group()
    shown.add_argument("--list", action="store_true", help="say how far each row is; train nothing")
    shown.add_argument("--markdown", action="store_true", help="print the table so far as Markdown; train nothing")


def table(args: argparse.Namespace) -> dict[str, Any]:
    """`table`: make it, list how far it is, or print it."""
    # Metrics bring TensorBoard, which takes seconds to import: not for another command.
    from vae_dist.table.jobs import load_table
    from vae_dist.table.make import list_states, make_table, print_markdown
    from vae_dist.table.results import Results

    loaded = load_table(Path(args.table), args.overrides)
    results, jobs = Results(loaded), loaded.jobs_of(args.rows)
    if args.list:
        return list_states(jobs, results)
    if args.markdown:
        return print_markdown(loaded, jobs, results)
    return make_table(loaded, jobs, loaded.jobs_of(args.redo) if args.redo else [], results)
