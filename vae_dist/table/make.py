"""A table made: every row without a result is trained and evaluated, and rows are written as they come.

The same call goes on after an interruption: a finished row is never trained again, a started one resumes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vae_dist.errors import ConfigError
from vae_dist.observe.console import say
from vae_dist.table.jobs import Job, Table
from vae_dist.table.render import markdown, texts_markdown
from vae_dist.table.results import Results
from vae_dist.table.work import evaluate, result_row, steps_so_far, texts_of, train


def make_table(table: Table, jobs: Sequence[Job], redo: Sequence[Job], results: Results) -> dict[str, Any]:
    """Bring `jobs` to a result; returns where the results are and how many of the jobs are done.

    Args:
        redo: jobs that are trained again if the table changed since their result was written.

    Raises:
        ConfigError: other jobs' results are of another configuration than the table's.
        RunError: a training or an evaluation failed.
        KeyboardInterrupt: a signal came where nothing could be saved.
    """
    found = [(job, results.changes(job, row)) for job in jobs if (row := results.find(job))]
    _refuse_stale(table, [(job, changes) for job, changes in found if changes and job not in redo])
    done = [job for job, changes in found if not changes]
    for job in [job for job in jobs if job not in done]:
        if not _complete(table, job, f"[{len(done) + 1}/{len(jobs)}] {job.label}", results):
            say("stopped; the same command goes on")
            break
        done.append(job)
    return {"results": str(results.path), "rows": len(jobs), "done": len(done), "finished": len(done) == len(jobs)}


def list_states(jobs: Sequence[Job], results: Results) -> dict[str, Any]:
    """Say how far each job is."""
    states = [(job, _state(job, results)) for job in jobs]
    for job, state in states:
        say(f"{job.label:<40} {state}")
    rows = [{"method": job.row.method, "seed": job.seed, "state": state} for job, state in states]
    return {"results": str(results.path), "rows": rows}


def print_markdown(table: Table, jobs: Sequence[Job], results: Results) -> dict[str, Any]:
    """Print the table with the results there are, and what the models wrote."""
    found = [(job, row) for job in jobs if (row := results.find(job))]
    for job, row in found:
        if changes := results.changes(job, row):
            say(f"warning: {job.label} is stale: {'; '.join(changes)}")
    print(page(table, found, results))
    return {"results": str(results.path), "rows": len(jobs), "done": len(found)}


def page(table: Table, found: Sequence[tuple[Job, dict[str, Any]]], results: Results) -> str:
    """The table as Markdown, and below it what the models wrote."""
    written = [(job.label, texts) for job, _ in found if (texts := results.texts(job))]
    parts = [markdown(table.definition, [row for _, row in found]), *(texts_markdown(*one) for one in written)]
    return "\n\n".join(parts)


def _complete(table: Table, job: Job, label: str, results: Results) -> bool:
    """See to it that a job has a result; False when it was stopped before."""
    # Looked up once more: another command may have done it meanwhile.
    if (row := results.find(job)) and not results.changes(job, row):
        return True
    say(f"{label}: training in {job.run_dir}")
    trained = train(job)
    if trained is None:
        return False
    evaluation = table.definition.evaluation
    say(f"{label}: evaluating on {evaluation.split}")
    evaluated = evaluate(job, evaluation, trained)
    row = result_row(job, evaluation, trained, evaluated)
    results.record(job, row, texts_of(evaluated))
    bound = f", IW PPL {row['iw_ppl']:.2f}" if row["iw_ppl"] else ""
    say(f"{label}: PPL {row['elbo_ppl']:.2f}{bound}, written to {results.path}")
    return True


def _refuse_stale(table: Table, stale: Sequence[tuple[Job, list[str]]]) -> None:
    """Results of another configuration are neither passed off as the table's nor thrown away unasked."""
    if stale:
        listing = "".join(f"\n  {job.label}: {'; '.join(changes)}" for job, changes in stale)
        names = ",".join(dict.fromkeys(job.row.slug for job, _ in stale))
        raise ConfigError(
            f"{table.path} changed since these results were written:{listing}\nRestore it, train them again with "
            f"--redo {names}, or leave them out with --rows."
        )


def _state(job: Job, results: Results) -> str:
    if row := results.find(job):
        changes = results.changes(job, row)
        return f"stale: {'; '.join(changes)}" if changes else "done"
    if (job.run_dir / "result.json").exists():
        return "trained, not evaluated"
    steps = steps_so_far(job)
    return f"step {steps[0]} of {steps[1]}" if steps else "not started"
