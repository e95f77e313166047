"""The plan: what names a run, what it will do, and whose run directory it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from vae_dist.config.load import load_config
from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.data.store.dataset import Dataset
from vae_dist.data.stream.training_data import open_training_data, order_spec
from vae_dist.engine.plan import RunPlan, _plateau_problem, _result_config, claim_run_dir, plan_run
from vae_dist.engine.plan_view import describe_plan, draw_schedule, schedule_lines
from vae_dist.errors import CheckpointError, DataError
from vae_dist.model.vae import TextVAE, count_parameters

BASE = ["train.batch_sequences=16", "data.streams=4", "train.epochs=3", "train.seed=1", "objective.beta=1.0"]
OPTIONS = PrepareConfig(tokenizer="word", vocab_size=64, valid_fraction=0.0, test_fraction=0.0, max_tokens=20)


def make_dataset(folder: Path, words: int = 6) -> Dataset:
    folder.mkdir(exist_ok=True)
    lines = [" ".join(f"w{(i * j) % 13}" for j in range(1, words)) + f" n{i}" for i in range(100)]
    (folder / "corpus.txt").write_text("\n".join(lines), encoding="utf-8")
    return prepare(str(folder / "corpus.txt"), folder / "data", OPTIONS)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return make_dataset(tmp_path_factory.mktemp("plan"))


def plan(dataset: Dataset, *overrides: str) -> RunPlan:
    config = load_config(None, [*BASE, *overrides])
    return plan_run(config, open_training_data([dataset.path], config), [dataset.path], 0.0)


@pytest.mark.parametrize(
    "override",
    [
        "cluster.workers=4", "cluster.zero_stage=3", "cluster.cpus_per_worker=2",
        "cluster.collective_timeout_seconds=9", "run.log_every_steps=1",
        "run.keep_checkpoints=9", "run.checkpoint_every_steps=2", "evaluate.every_steps=3",
        "evaluate.max_sequences=5", "evaluate.num_samples=1", "data.source=elsewhere.txt", "data.dir=/moved/here",
        "data.prepare.shard_bytes=8192", "data.damage=skip", "data.damage_budget_fraction=0.5",
    ],
)  # fmt: skip
def test_where_and_how_a_run_is_made_does_not_change_its_name(dataset: Dataset, override: str) -> None:
    assert plan(dataset, override).run_dir == plan(dataset).run_dir


def test_storage_moves_the_run_and_keeps_its_name(dataset: Dataset, tmp_path: Path) -> None:
    moved = plan(dataset, f"run.storage={tmp_path}").run_dir
    assert moved == tmp_path / plan(dataset).run_dir.name
    assert plan(dataset, f"run.storage={tmp_path}", "run.name=mine").run_dir == tmp_path / "mine"


@pytest.mark.parametrize(
    "override",
    [
        "train.seed=2", "train.batch_sequences=32", "train.epochs=4", "train.precision=fp32", "data.streams=8",
        "data.length_groups=3", "data.shuffle_block_sequences=3", "data.shuffle_window_sequences=3",
        "model.latent_dim=3", "model.encoder={num_layers: 2}", "model.decoder={kind: transformer}",
        "model.dropout=0.31", "objective.beta=0.9", "optimizer.learning_rate=0.123",
        "objective.annealing={kind: cyclical}", "objective.free_bits=sequence", "optimizer.average_decay=0.9",
    ],
)  # fmt: skip
def test_what_changes_the_weights_changes_the_name(dataset: Dataset, override: str) -> None:
    assert plan(dataset, override).run_dir != plan(dataset).run_dir


def test_planning_makes_no_cache_on_the_drivers_host(dataset: Dataset, tmp_path: Path) -> None:
    config = load_config(None, [*BASE, f"data.cache_dir={tmp_path / 'cache'}"])
    open_training_data([dataset.path], config)
    assert not (tmp_path / "cache").exists()
    open_training_data([dataset.path], config, workers=2)
    assert (tmp_path / "cache").is_dir()


def test_other_data_changes_the_name(dataset: Dataset, tmp_path: Path) -> None:
    assert plan(make_dataset(tmp_path / "other", words=7)).result_hash != plan(dataset).result_hash


def test_steps_follow_epochs_or_are_given(dataset: Dataset) -> None:
    assert dataset.split("train").sequences == 100
    assert (plan(dataset).steps_per_epoch, plan(dataset).total_steps) == (7, 21)
    assert plan(dataset, "train.epochs=0.5").total_steps == 4
    assert plan(dataset, "train.epochs=0.01").total_steps == 1
    assert plan(dataset, "train.steps=5").total_steps == 5
    assert (plan(dataset).evaluate_every, plan(dataset).checkpoint_every) == (3, 3)
    given = plan(dataset, "evaluate.every_steps=8", "run.checkpoint_every_steps=9")
    assert (given.evaluate_every, given.checkpoint_every) == (8, 9)


def test_the_order_is_made_of_configuration_and_data(dataset: Dataset) -> None:
    config = load_config(None, [*BASE, "data.length_groups=5", "data.shuffle_block_sequences=6"])
    spec = order_spec(config, dataset.split("train"), dataset.manifest_hash)
    assert (spec.sequences, spec.manifest_hash, spec.seed) == (100, dataset.manifest_hash, 1)
    assert (spec.streams, spec.batch_sequences, spec.length_groups, spec.block_sequences) == (4, 16, 5, 6)
    mean = dataset.split("train").tokens / 100
    assert spec.window_sequences == round(2**22 / mean)
    given = load_config(None, [*BASE, "data.shuffle_window_sequences=77"])
    assert order_spec(given, dataset.split("train"), dataset.manifest_hash).window_sequences == 77


def test_a_budget_below_the_longest_sequence_is_refused(dataset: Dataset) -> None:
    longest = dataset.split("train").max_tokens
    assert longest == 7
    assert plan(dataset, f"data.dir={dataset.path}", "train.micro_batch_tokens=7").total_steps == 21
    with pytest.raises(DataError, match=r"micro_batch_tokens = 6 cannot hold .* 7 tokens"):
        plan(dataset, f"data.dir={dataset.path}", "train.micro_batch_tokens=6")


def test_a_run_directory_is_claimed_once_and_found_again(dataset: Dataset, tmp_path: Path) -> None:
    mine = plan(dataset, f"run.storage={tmp_path}")
    claim_run_dir(mine, {"git_sha": "abc"})
    record = json.loads((mine.run_dir / "run.json").read_text(encoding="utf-8"))
    assert (record["git_sha"], record["manifest_hash"]) == ("abc", dataset.manifest_hash)
    assert load_config(mine.run_dir / "resolved.yaml") == mine.config
    claim_run_dir(plan(dataset, f"run.storage={tmp_path}", "cluster.workers=2"), {"git_sha": "def"})
    assert json.loads((mine.run_dir / "run.json").read_text(encoding="utf-8"))["git_sha"] == "abc"


def test_another_configuration_is_refused_and_its_differences_named(dataset: Dataset, tmp_path: Path) -> None:
    named = [f"run.storage={tmp_path}", "run.name=mine"]
    claim_run_dir(plan(dataset, *named), {})
    with pytest.raises(CheckpointError) as caught:
        claim_run_dir(plan(dataset, *named, "objective.beta=0.5", "model.encoder={hidden_dim: 9}", "train.seed=4"), {})
    message = caught.value.message
    assert "objective.beta was 1.0 and is now 0.5" in message
    assert "train.seed was 1 and is now 4" in message
    assert "model.encoder.hidden_dim was" in message
    assert "manifest" not in message
    assert str(tmp_path / "mine") in message


def test_a_run_does_not_begin_again_because_its_checkpoints_are_looked_for_elsewhere(
    dataset: Dataset, tmp_path: Path
) -> None:
    here = [f"run.storage={tmp_path}", "run.name=here"]
    there = [f"run.storage={tmp_path}", "run.name=there"]
    store = "run.checkpoint_url=s3://key:secret@bucket/ours"
    claim_run_dir(plan(dataset, *here), {})
    claim_run_dir(plan(dataset, *there, f"{store}?region=a"), {})
    claim_run_dir(plan(dataset, *there, "run.checkpoint_url=s3://other:user@bucket/ours/?region=b"), {})
    assert "secret" not in (tmp_path / "there/run.json").read_text(encoding="utf-8")
    for changed in ([*here, store], there, [*there, "run.checkpoint_url=s3://bucket/theirs"]):
        with pytest.raises(CheckpointError, match=r"keeps its checkpoints in (its directory|s3://bucket/ours), and"):
            claim_run_dir(plan(dataset, *changed), {})


def test_other_data_is_refused_and_named(dataset: Dataset, tmp_path: Path) -> None:
    named = [f"run.storage={tmp_path}", "run.name=mine"]
    claim_run_dir(plan(dataset, *named), {})
    other = make_dataset(tmp_path / "other", words=7)
    with pytest.raises(CheckpointError, match=f"manifest was '{dataset.manifest_hash[:12]}'"):
        claim_run_dir(plan(other, *named), {})


def test_a_directory_of_something_else_is_left_alone(dataset: Dataset, tmp_path: Path) -> None:
    mine = plan(dataset, f"run.storage={tmp_path}", "run.name=mine")
    mine.run_dir.mkdir()
    claim_run_dir(mine, {})
    other = plan(dataset, f"run.storage={tmp_path}", "run.name=notes")
    other.run_dir.mkdir()
    (other.run_dir / "notes.txt").touch()
    with pytest.raises(CheckpointError, match="is not empty and holds no run"):
        claim_run_dir(other, {})
    assert [p.name for p in other.run_dir.iterdir()] == ["notes.txt"]


def schedules(*overrides: str, steps: int = 600) -> dict[str, str]:
    lines = schedule_lines(load_config(None, [*BASE, "optimizer.warmup_steps=0", *overrides]), steps)
    return {line[:20].strip(): line[21:] for line in lines}


def test_a_schedule_is_drawn_from_its_first_step_to_its_last() -> None:
    assert draw_schedule(lambda step: step, 60) == "".join(" .:-=+*#%@"[round(step / 59 * 9)] for step in range(60))
    assert draw_schedule(lambda step: float(step == 599), 600) == " " * 59 + "@"
    assert draw_schedule(lambda step: float(step == 0), 600) == "@" + " " * 59
    assert draw_schedule(lambda step: 0.0, 1) == " " * 60


def test_the_plan_draws_beta_and_the_learning_rate() -> None:
    lines = schedules("objective.annealing={kind: cyclical, cycles: 3, ramp: 0.0}", "objective.beta=0.4")
    assert lines == {"beta": f"|{'@' * 60}| to 0.4", "learning rate": lines["learning rate"]}
    assert lines["learning rate"].startswith("|@@@") and lines["learning rate"].endswith(" | to 0.006")
    cycles = schedules("objective.annealing={kind: zero_linear, cycles: 3, zero: 0.5, ramp: 0.0}")["beta"]
    assert cycles == f"|{(' ' * 10 + '@' * 10) * 3}| to 1"


def test_the_plan_marks_the_phases() -> None:
    lines = schedules(
        "objective.autoencoder_fraction=0.25", "objective.annealing={fraction: 0}", "optimizer.schedule=constant"
    )
    assert lines["phases"] == f"|<autoencoder---<variational{'-' * 33}|"
    assert lines["beta"] == f"|{' ' * 15}{'@' * 45}| to 1"
    short = schedules("objective.autoencoder_fraction=0.05")["phases"]
    assert short == f"|<au<variational{'-' * 45}|"


@pytest.mark.parametrize(
    ("overrides", "name", "words"),
    [
        (
            ["objective.rate_control={kind: control_vae, nats: 3, beta_min: 0.1}", "objective.beta=0.8"],
            "beta",
            "held by ControlVAE between 0.1 and 0.8 so that the KL is 3 nats",
        ),
        (
            ["objective.rate_control={kind: control_vae, nats: 3}", "objective.autoencoder_fraction=0.5"],
            "beta",
            "0 in the autoencoder phase, then held by ControlVAE between 0 and 1 so that the KL is 3 nats",
        ),
        (
            ["objective.rate_control={kind: mdr, nats: 4.5}"],
            "weight of the KL",
            "beta less a multiplier (MDR) that draws the KL up to 4.5 nats where it is below",
        ),
        (
            ["objective.rate_control={kind: capacity, nats: 5, ramp: 0}"],
            "capacity",
            f"|{'@' * 60}| to 5 nats",
        ),
        (
            ["objective.aggressive={max_encoder_steps: 30, max_fraction: 0.25}"],
            "aggressive encoder",
            "up to 30 steps of its own before each of the decoder, while the mutual information grows, at most until "
            "step 150",
        ),
        (
            ["optimizer.schedule=plateau", "optimizer.learning_rate=1.0"],
            "learning rate",
            f"|{'@' * 60}| to 1, times 0.5 at each plateau of the validation, 5 times at most",
        ),
    ],
)
def test_the_plan_says_what_controllers_do(overrides: list[str], name: str, words: str) -> None:
    assert schedules("objective.free_bits=none", *overrides)[name] == words


def test_the_plan_of_a_language_model_has_no_beta() -> None:
    assert list(schedules("model.latent=none")) == ["learning rate"]


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["optimizer.schedule=plateau"], "optimizer.schedule = plateau follows the validation"),
        (["objective.aggressive={}", "objective.free_bits=none"], "objective.aggressive follows"),
        (["evaluate.select=best", "optimizer.schedule=plateau"], "plateau and evaluate.select = best follow the"),
    ],
)
def test_what_follows_the_validation_is_refused_without_a_validation_split(
    dataset: Dataset, overrides: list[str], named: str
) -> None:
    with pytest.raises(DataError, match=named):
        plan(dataset, *overrides)


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["model.sampling_components=99"], "99 Gaussians cannot be fitted to the latents of 100 training sequences"),
    ],
)
def test_what_the_data_is_too_small_for_is_refused_before_training(
    dataset: Dataset, overrides: list[str], named: str
) -> None:
    with pytest.raises(DataError, match=named):
        plan(dataset, *overrides)


def test_a_plateau_that_can_never_be_found_is_refused() -> None:
    config = load_config(None, ["optimizer.schedule=plateau"])
    message = _plateau_problem(config, 1000, 100)
    assert message is not None and "waits for validation 15" in message and "the run has 10" in message
    assert _plateau_problem(config, 1000, 50) is None
    assert _plateau_problem(load_config(None, []), 1000, 100) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["model.posterior={kind: vmf}", "objective.free_bits=none"],
        ["model.posterior={kind: delta}", "objective.free_bits=none"],
        *([f"model.prior={{kind: {kind}}}", "objective.free_bits=none"] for kind in ("mixture", "vamp", "flow")),
        ["model.sampling_components=3"],
        ["model.latent=none"],
    ],
    ids=str,
)
def test_every_posterior_and_prior_is_planned(dataset: Dataset, overrides: list[str]) -> None:
    config = load_config(None, [*BASE, *overrides])
    data = open_training_data([dataset.path], config)
    numbers = describe_plan(plan_run(config, data, [dataset.path], 0.0), data)
    torch.manual_seed(0)
    assert numbers["parameters"] == count_parameters(TextVAE(config.model, dataset.tokenizer.vocab_size))


def test_when_validation_steers_a_run_its_times_are_part_of_the_result() -> None:
    config = load_config(None, ["evaluate.every_steps=3"])
    assert "evaluate" not in _result_config(config)
    steered = _result_config(load_config(None, ["evaluate.every_steps=3", "evaluate.select=best"]))
    assert steered["evaluate"] == {"select": "best", "every_steps": 3, "max_sequences": 1000}
