"""The table command: rows as they come, never trained twice, nothing of the machine in what is committed."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml

from vae_dist.cli import main
from vae_dist.config.load import dump_yaml, load_config
from vae_dist.errors import DataError
from vae_dist.table import work
from vae_dist.table.jobs import load_table
from vae_dist.table.results import Results

BASE = "data: {source: ../corpora/tiny.txt}\nmodel: {latent_dim: 4}\ntrain: {epochs: 2}\n"
TABLE: dict[str, Any] = {
    "base": "base.yaml",
    "overrides": ["evaluate.select=best"],
    "evaluation": {"split": "test", "importance_samples": 20, "batch_sequences": 8},
    "rows": [
        {"method": "LM", "overrides": ["model.latent=none"]},
        {"method": "beta 0.5", "note": "half", "overrides": ["objective.free_bits=none", "objective.beta=0.5"]},
        {"method": "Best | ours", "overrides": ["model.dropout=0.3"], "seeds": [0, 1, 2]},
    ],
    "peers": [
        {
            "method": "Theirs",
            "elbo_ppl": 110.5,
            "kl_per_seq": 0.0,
            "active_units": 2,
            "status": "M*",
            "source": "paper",
        },
        {"method": "Odd", "elbo_ppl": 9, "status": "V", "source": "repo", "not_comparable": "another unit"},
    ],
}
IW_PPL = {0: 97.5, 1: 96.25, 2: 99.0}
UNITS = {0: 32, 1: 32, 2: 31}


class FakeRuns:
    """In place of the two commands: what a run leaves, with numbers that follow from its seed."""

    def __init__(self) -> None:
        self.trained: list[str] = []
        self.evaluated: list[list[str]] = []

    def __call__(self, command: list[str], what: str) -> tuple[dict[str, Any], bool]:
        arguments = command[command.index("vae_dist") :] if "vae_dist" in command else command[3:]
        return (self._evaluate(arguments) if "eval" in command else self._train(arguments)), False

    def _train(self, arguments: list[str]) -> dict[str, Any]:
        config = load_config(arguments[0], arguments[1:])
        run = Path(config.run.storage).resolve() / str(config.run.name)
        self.trained.append(run.name)
        run.mkdir(parents=True, exist_ok=True)
        begin_run(run, arguments)
        result = {
            "run_dir": str(run),
            "data_dir": str(run.parent / "data" / "tiny"),
            "tokens_seen": 5000,
            "valid": {"ppl": 120.0 + config.train.seed},
        }
        (run / "result.json").write_text(json.dumps(result))
        return result

    def _evaluate(self, arguments: list[str]) -> dict[str, Any]:
        self.evaluated.append(arguments)
        config = load_config(Path(arguments[2]) / "resolved.yaml")
        seed = config.train.seed
        found = {"ppl": 105.0 + seed, "prior": "standard", "rec_per_seq": 95.0, "sequences": 50, "tokens": 600}
        latent = {"kl_per_seq": 6.5, "mutual_information_nats": 5.0, "active_units": UNITS[seed]}
        return {**found, **latent, **({} if "0" in arguments else {"iw_ppl": IW_PPL[seed]})}


def begin_run(run: Path, arguments: list[str], last_step: int = 25) -> None:
    """What training has written by `last_step`."""
    config = load_config(arguments[0], arguments[1:])
    (run / "resolved.yaml").write_text(dump_yaml(config))
    (run / "run.json").write_text(json.dumps({"git_sha": "abc", "manifest_hash": "def", "driver_host": "myhost"}))
    steps = {10: 0.5, 20: 0.25, 25: 1.0}
    records = [
        {"kind": "event", "step": 0, "message": f"begun in {run}", "parameters": 321, "precision": "fp32"},
        *({"kind": "train", "step": s, "epoch": s / 12.5, "step_seconds": t} for s, t in steps.items()),
        {"kind": "valid", "step": 25, "ppl": 123.456789, "kl_per_dim": [1 / 3, 2.0], "path": str(run), "sequences": 7},
    ]
    text = "".join(json.dumps(r) + "\n" for r in records if r["step"] <= last_step)
    (run / "metrics.jsonl").write_text(text)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeRuns:
    """In a project folder with a base configuration; both commands replaced."""
    fake = FakeRuns()
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")
    Path("base.yaml").write_text(BASE)
    monkeypatch.setattr(work, "_run", fake)
    return fake


def write_table(**changed: Any) -> Path:
    path = Path("tiny.table.yaml")
    path.write_text(yaml.safe_dump({**TABLE, **changed}, sort_keys=False))
    return path


def change_row(place: int, **changed: Any) -> list[dict[str, Any]]:
    return [{**row, **(changed if i == place else {})} for i, row in enumerate(TABLE["rows"])]


def make(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[dict[str, Any], str]:
    """The command's JSON line, and what it said."""
    capsys.readouterr()
    assert main(["table", "tiny.table.yaml", *arguments]) == 0
    captured = capsys.readouterr()
    return json.loads(captured.out.strip().splitlines()[-1]), captured.err


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str, status: int = 2) -> str:
    assert main(["table", "tiny.table.yaml", *arguments]) == status
    captured = capsys.readouterr()
    assert captured.err.count("error:") == 1 and "Traceback" not in captured.err
    return captured.err


def results() -> list[dict[str, Any]]:
    return json.loads(Path("tiny.json").read_text())


def test_every_row_is_trained_and_evaluated_and_written_in_the_order_of_the_table(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table()
    outcome, _ = make(capsys, "--rows", "best-ours")
    assert outcome["rows"] == outcome["done"] == 3 and [r["seed"] for r in results()] == [0, 1, 2]
    outcome, _ = make(capsys)
    assert outcome == {"results": "tiny.json", "rows": 5, "done": 5, "finished": True}
    assert [(r["method"], r["seed"]) for r in results()] == [
        ("LM", 0), ("beta 0.5", 0), ("Best | ours", 0), ("Best | ours", 1), ("Best | ours", 2),
    ]  # fmt: skip
    row = results()[3]
    assert (row["elbo_ppl"], row["iw_ppl"], row["importance_samples"]) == (106.0, 96.25, 20)
    assert (row["sequences"], row["tokens"], row["tokens_seen"], row["parameters"]) == (50, 600, 5000, 321)
    assert (row["valid"], row["precision"], row["git_sha"]) == ({"ppl": 121.0}, "fp32", "abc")
    # 25 steps of 12.5 an epoch; 10 steps of 0.5 s, 10 of 0.25 s, 5 of 1 s.
    assert (row["epochs"], row["seconds"]) == (2.0, 12.5)


def test_a_language_model_has_a_perplexity_and_empty_latent_columns(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table()
    make(capsys, "--rows", "lm")
    (row,) = results()
    assert row["elbo_ppl"] == 105.0 and row["rec_per_seq"] == 95.0 and row["importance_samples"] == 0
    assert [row[n] for n in ("iw_ppl", "kl_per_seq", "mutual_information_nats", "active_units")] == [None] * 4
    flags = runs.evaluated[0]
    assert flags[flags.index("--importance-samples") + 1] == "0" and flags[flags.index("--split") + 1] == "test"


def test_a_finished_row_is_never_trained_again(runs: FakeRuns, capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    make(capsys)
    first = (list(runs.trained), Path("tiny.json").read_bytes())
    assert len(first[0]) == 5
    # Also not where only the machine differs.
    make(capsys, "cluster.workers=1", "data.source=/elsewhere/corpus.txt", "run.storage=other", "train.kernels=torch")
    assert (runs.trained, Path("tiny.json").read_bytes()) == first


def test_what_is_committed_holds_no_place_or_name_of_the_machine(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    write_table()
    make(capsys, f"run.storage={tmp_path}/store", f"data.source={tmp_path}/x/tiny.txt", "--rows", "beta-0-5")
    folder = Path("tiny/beta-0-5-seed0")
    committed = {p.name: p.read_text() for p in [Path("tiny.json"), *folder.iterdir()]}
    assert sorted(committed) == ["resolved.yaml", "tiny.json", "valid.jsonl"]
    assert [n for n, text in committed.items() if str(tmp_path) in text or "myhost" in text or "../" in text] == []
    # The resolved configuration is the run's but for the places, and loads.
    run = load_config(tmp_path / "store" / runs.trained[0] / "resolved.yaml")
    ours = load_config(folder / "resolved.yaml")
    assert (ours.run.storage, ours.data.source) == ("runs", "$VAE_DIST_DATA/tiny.txt")
    assert ours.model == run.model and ours.objective == run.objective and ours.objective.beta == 0.5
    assert json.loads(committed["valid.jsonl"]) == {
        "step": 25, "ppl": 123.457, "kl_per_dim": [0.333333, 2.0], "sequences": 7,
    }  # fmt: skip
    assert results()[0]["command"] == (
        "python -m vae_dist.train base.yaml evaluate.select=best objective.free_bits=none objective.beta=0.5 "
        f"train.seed=0 run.name={runs.trained[0]} && vae-dist eval runs/{runs.trained[0]} runs/data/tiny "
        "--split test --importance-samples 20 --batch-sequences 8"
    )


def test_a_changed_row_is_refused_by_name_until_it_is_asked_to_be_done_again(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table()
    make(capsys)
    before, names = results(), list(runs.trained)
    write_table(rows=change_row(1, overrides=["objective.free_bits=none", "objective.beta=0.4"]))
    message = refusal(capsys)
    assert "beta 0.5, seed 0: objective.beta was 0.5 and is now 0.4" in message and "--redo beta-0-5" in message
    assert "LM" not in message and runs.trained == names and results() == before
    states = {(r["method"], r["seed"]): r["state"] for r in make(capsys, "--list")[0]["rows"]}
    assert states.pop(("beta 0.5", 0)) == "stale: objective.beta was 0.5 and is now 0.4"
    assert set(states.values()) == {"done"}
    # The others can be worked on meanwhile.
    make(capsys, "--rows", "lm,best-ours")
    make(capsys, "--redo", "beta-0-5")
    (again,) = runs.trained[len(names) :]
    assert again.startswith("tiny-beta-0-5-seed0-") and again not in names
    assert [(r["method"], r["seed"]) for r in results()] == [(r["method"], r["seed"]) for r in before]
    assert load_config("tiny/beta-0-5-seed0/resolved.yaml").objective.beta == 0.4
    # The same command again trains nothing.
    make(capsys, "--redo", "beta-0-5")
    assert len(runs.trained) == len(names) + 1


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"evaluation": {"importance_samples": 30}}, "importance_samples was 20 and is now 30"),
        ({"evaluation": {"importance_samples": 20, "split": "valid"}}, "split was 'test' and is now 'valid'"),
        ({"overrides": ["evaluate.select=last"]}, "evaluate.select was 'best' and is now 'last'"),
        (
            {"rows": change_row(1, overrides=["objective.free_bits=none", "objective.annealing={kind: cyclical}"])},
            "objective.annealing.kind was 'linear' and is now 'cyclical'",
        ),
        ({"rows": change_row(1, overrides=["objective.beta=0.5", "objective.aggressive={}"])}, "objective.aggressive."),
    ],
)
def test_whatever_a_number_depends_on_makes_its_row_stale(
    changed: dict[str, Any], named: str, runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table()
    make(capsys, "--rows", "beta-0-5")
    write_table(**changed)
    assert named in refusal(capsys, "--rows", "beta-0-5")


def test_a_new_key_of_the_schema_or_a_comment_makes_no_row_stale(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    """A committed configuration from before a key was there stands for the key's default."""
    write_table()
    make(capsys, "--rows", "lm")
    path = Path("tiny/lm-seed0/resolved.yaml")
    tree = yaml.safe_load(path.read_text())
    del tree["model"]["shared_dropout"], tree["optimizer"]["average_decay"]
    path.write_text(yaml.safe_dump(tree))
    Path("base.yaml").write_text(f"# {BASE.splitlines()[0]}\n{BASE}")
    outcome, _ = make(capsys, "--rows", "lm")
    assert outcome["done"] == 1 and len(runs.trained) == 1
    # A default written out is no change either.
    Path("base.yaml").write_text(BASE.replace("latent_dim: 4", "latent_dim: 4, shared_dropout: false"))
    assert make(capsys, "--rows", "lm")[0]["done"] == 1 and len(runs.trained) == 1


def test_a_result_whose_configuration_is_gone_is_stale(runs: FakeRuns, capsys: pytest.CaptureFixture[str]) -> None:
    write_table()
    make(capsys, "--rows", "lm")
    Path("tiny/lm-seed0/resolved.yaml").unlink()
    assert "There is no configuration file tiny/lm-seed0/resolved.yaml" in refusal(capsys, "--rows", "lm")


def test_the_list_says_how_far_each_row_is(runs: FakeRuns, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_table()
    make(capsys, "--rows", "lm")
    jobs = load_table(path).jobs
    for job, last_step in ((jobs[1], 20), (jobs[2], 25)):
        job.run_dir.mkdir(parents=True)
        begin_run(job.run_dir, job.arguments, last_step)
    (jobs[2].run_dir / "result.json").write_text("{}")
    outcome, said = make(capsys, "--list")
    # Two epochs of 12.5 steps; the plan rounds 12.5 to 12 steps an epoch.
    assert [r["state"] for r in outcome["rows"]] == [
        "done", "step 20 of 24", "trained, not evaluated", "not started", "not started",
    ]  # fmt: skip
    assert "beta 0.5, seed 0" in said and len(runs.trained) == 1


def test_markdown_shows_peers_as_published_and_ours_as_median_and_range(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str]
) -> None:
    write_table()
    make(capsys, "--rows", "lm,best-ours")
    capsys.readouterr()
    assert main(["table", "tiny.table.yaml", "--markdown"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:7] == [
        "| Method | -ELBO PPL | IW PPL | Rec | KL | MI | AU | Status |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
        "| Theirs | 110.5 |  |  | 0 |  | 2 | [M*] paper |",
        "| Odd | 9 |  |  |  |  |  | [V] repo; not comparable: another unit |",
        "| LM | 105.00 |  | 95.00 |  |  |  | ours, seed 0 |",
        "| beta 0.5 |  |  |  |  |  |  | ours, no result yet; half |",
        "| Best \\| ours | 106.00 (105.00 to 107.00) | 97.50 (96.25 to 99.00) | 95.00 | 6.50 | 5.00 | 32 (31 to 32) | "
        "ours, seeds 0, 1, 2 |",
    ]
    assert "20 samples" in lines[-2] and json.loads(lines[-1])["done"] == 4


def test_several_commands_write_into_one_table_without_losing_a_row(runs: FakeRuns) -> None:
    path = write_table(rows=[{"method": "m", "seeds": list(range(12))}])
    table = load_table(path)
    for job in table.jobs:
        job.run_dir.mkdir(parents=True)
        begin_run(job.run_dir, job.arguments)

    def record(job: Any) -> None:
        Results(table).record(job, {"method": "m", "seed": job.seed, "split": "test", "importance_samples": 20})

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(record, reversed(table.jobs)))
    assert [row["seed"] for row in results()] == list(range(12))
    assert all(Results(table).changes(job, results()[job.seed]) == [] for job in table.jobs)


@pytest.mark.parametrize(
    ("changed", "arguments", "named"),
    [
        ({"rows": []}, [], "rows = []: list should have at least 1 item"),
        ({"rowz": 1}, [], "rowz: unknown key. Known keys here: base, overrides, rows"),
        ({"rows": change_row(1, seed=[1])}, [], "rows.1.seed: unknown key. Known keys here: method, note"),
        ({"rows": change_row(1, overrides=[{"a={kind": "x}"}])}, [], "Put quotes around the whole override"),
        ({"rows": change_row(1, method="lm")}, [], "two rows called lm"),
        ({"rows": change_row(1, overrides=["train.seed=1"])}, [], "row 'beta 0.5': 'train.seed=1' is the table's own"),
        ({"rows": change_row(1, overrides=["objective.bta=1"])}, [], "Did you mean 'beta'?"),
        ({"rows": change_row(1, overrides=["objective.bta=1"])}, [], "row 'beta 0.5'"),
        ({"base": "bas.yaml"}, [], "looked for from the working directory"),
        ({"peers": [{"method": "x", "status": "W", "source": "y"}]}, [], "peers.0.status = 'W'"),
        ({}, ["--rows", "lm,bets"], "has no row bets. It has lm, beta-0-5, best-ours"),
        ({}, ["train.epochs=3"], "would change what the rows mean"),
        ({}, ["run.name=x"], "would change what the rows mean"),
        ({}, ["cluster.workers=3"], "cluster.workers=2"),
    ],
)
def test_a_wrong_table_is_refused_with_its_place_before_anything_is_trained(
    changed: dict[str, Any],
    arguments: list[str],
    named: str,
    runs: FakeRuns,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_table(**changed)
    assert named in refusal(capsys, *arguments) and runs.trained == []


def test_files_that_are_no_table_and_no_results_are_named(runs: FakeRuns, capsys: pytest.CaptureFixture[str]) -> None:
    assert "There is no table file tiny.table.yaml" in refusal(capsys)
    Path("tiny.table.yaml").write_text("- a list")
    assert "must hold a mapping" in refusal(capsys)
    Path("tiny.table.yaml").write_text("a: [")
    assert "not readable as YAML" in refusal(capsys)
    write_table()
    for text in ("<<<<<<< ours\n[]", '[{"method": "LM"}]', "3"):
        Path("tiny.json").write_text(text)
        assert "tiny.json is not readable as the rows of a table" in refusal(capsys)
    assert runs.trained == []
    with pytest.raises(DataError):
        Results(load_table(Path("tiny.table.yaml"))).find(load_table(Path("tiny.table.yaml")).jobs[0])


def test_a_stopped_row_leaves_no_result_and_the_same_command_goes_on(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table()
    stop_at: Callable[[list[str]], bool] = lambda command: "train.seed=1" in command  # noqa: E731

    def stopping(command: list[str], what: str) -> tuple[dict[str, Any], bool]:
        return ({"finished": False, "steps": 7}, True) if stop_at(command) else runs(command, what)

    monkeypatch.setattr(work, "_run", stopping)
    outcome, said = make(capsys)
    assert (outcome["finished"], outcome["done"], outcome["rows"]) == (False, 3, 5) and "same command goes on" in said
    assert [r["seed"] for r in results()] == [0, 0, 0]
    monkeypatch.setattr(work, "_run", runs)
    assert make(capsys)[0]["done"] == 5 and len(runs.trained) == 5


def test_an_interrupted_evaluation_ends_as_an_interruption_and_is_done_again(
    runs: FakeRuns, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write_table()
    monkeypatch.setattr(work, "_run", lambda command, what: (runs(command, what)[0], "eval" in command))
    assert main(["table", "tiny.table.yaml", "--rows", "lm"]) == 130
    assert not Path("tiny.json").exists()
    monkeypatch.setattr(work, "_run", runs)
    assert make(capsys, "--rows", "lm")[0]["done"] == 1
