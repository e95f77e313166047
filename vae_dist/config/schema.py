"""The configuration, typed to the leaves. The string under a field is its documentation.

Every value has a default: `Config()` is the embedded default run on the docstring corpus. Sections are
grouped by what they decide; `RESULT_SECTIONS` names the ones that change the trained weights and so
enter the default run name, while workers, ZeRO stage, storage and logging do not.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from vae_dist.config.model_schema import ModelConfig
from vae_dist.config.objective_schema import ObjectiveConfig, OptimizerConfig
from vae_dist.config.recipes import RECIPES
from vae_dist.config.section import Fraction, Name, NonNegative, Positive, PositiveFloat, Section


class PrepareConfig(Section):
    """How text becomes a data set directory."""

    recipe: Literal["wikitext", "coco_captions", "lines"] | None = None
    """Preset for a kind of corpus: defaults for the fields below, over which what is written wins
    (`config/recipes.py` says what each holds)."""
    format: Literal[
        "auto", "docstrings", "text", "wikitext", "jsonl", "parquet", "tar", "captions_json", "captions_tsv", "datasets"
    ] = "auto"
    """What the source holds; `auto` decides by the name: `docstrings`, .txt, .tokens (wikitext), .jsonl, .parquet,
    .tar (WebDataset), .json (COCO captions), .tsv (captions), all but Parquet also with .gz; or a folder that Hugging
    Face `datasets` saved."""
    record: Literal["line", "paragraph", "sentence", "document"] = "line"
    """In text files one sequence is a line, a paragraph (blank-line separated, lines joined), a sentence of tokenised
    text (it ends at the token . ? or !), or, in WikiText, a document (from title to title)."""
    text_field: str = "text"
    """The column (Parquet, `datasets`) or key (JSONL, .json members of a tar) that holds the text."""
    keyword: Annotated[str, Field(pattern=r"\S")] | None = None
    """Keep only texts that hold this word (or words), whole and in any case; the others are counted."""
    unicode_form: Literal["none", "nfc", "nfkc"] = "none"
    """Unicode normalisation of the text before all else."""
    lowercase: bool = False
    """Lower-case the text before tokenising."""
    strip_punctuation: bool = False
    """Put a space for punctuation and ASCII symbols, nothing for an apostrophe between letters; <unk> is kept."""
    strip_digits: bool = False
    """Put a space for decimal digits. After either, white space is collapsed."""
    tokenizer: Name = "bpe"
    """`bpe` or `unigram` (byte-level, any text), `word`, or the path of a Hugging Face tokenizer.json."""
    pre_tokenizer: Literal["whitespace", "words"] = "whitespace"
    """Word tokenizer: split at white space only (text that is tokenised already), or also around punctuation."""
    vocab_size: Annotated[int, Field(ge=8, le=2**31 - 1)] = 2048
    """Largest vocabulary, the special tokens (<pad> <s> </s> <unk>) included."""
    min_frequency: Positive = 1
    """Words, merges or (unigram) pieces rarer than this in the training split are left out of the vocabulary."""
    max_tokens: Annotated[int, Field(ge=2)] = 64
    """Longest sequence in tokens, the end-of-sequence token included."""
    too_long: Literal["truncate", "drop", "split"] = "truncate"
    """What happens to a longer sequence; the count is in the manifest and in the output."""
    valid_fraction: Fraction = 0.05
    """Share of sequences held out for validation, by a hash of the text (or image), when the source brings no split."""
    test_fraction: Fraction = 0.05
    """Share of sequences held out for testing, likewise."""
    deduplicate: Literal["none", "exact", "near"] = "none"
    """Drop a text that occurred before, in any split: the same text, or one that is nearly the same."""
    shard_bytes: Annotated[int, Field(ge=4096)] = 64 * 2**20
    """Target size of a tar shard in bytes."""
    member_sequences: Positive = 4096
    """Sequences in one tar member (one Arrow record batch)."""

    @model_validator(mode="before")
    @classmethod
    def _fill_in_recipe(cls, values: Any) -> Any:
        recipe = values.get("recipe") if isinstance(values, dict) else None
        # A recipe that is not known is refused where its field is checked.
        return {**RECIPES.get(recipe, {}), **values} if isinstance(recipe, str) else values


class DataConfig(Section):
    """Which data, and the order in which training reads it."""

    source: Name = "docstrings"
    """`docstrings`, or a file, directory or URL in any of the formats of `prepare`; prepared once and cached."""
    dir: Name | None = None
    """A data set directory made by `vae-dist data prepare`; when given, `source` is not read."""
    mixture: Annotated[dict[Name, Annotated[float, Field(gt=0.0)]], Field(min_length=1)] | None = None
    """Data set directories of one tokenizer and their weights, as shares of sequences: {a: 0.7, b: 0.3}. The first
    is the one that is validated on. When given, `source` is not read."""
    prepare: PrepareConfig = PrepareConfig()
    """How `source` is prepared."""
    streams: Positive = 8
    """Canonical streams S: the number of workers must divide it and it must divide the global batch."""
    length_groups: Positive | None = None
    """K: a stream sorts windows of about K batches by length, so that a batch is homogeneous in length; null: 1,024,
    fewer where a stream's window would hold more than 16 million tokens."""
    shuffle_block_sequences: Positive | None = None
    """Neighbouring sequences kept together by the first level of the shuffle, one sequential read; null: one tar
    member, less where the corpus is small, several where it is large (see `data/stream/training_data.py`)."""
    shuffle_window_sequences: Positive | None = None
    """Sequences over which the second level of the shuffle permutes within a stream; null: about 4 million tokens."""
    damage: Literal["fail", "skip"] = "fail"
    """A member that is damaged or cannot be read ends the run, or its sequences are left out and counted."""
    damage_budget_fraction: Fraction = 0.001
    """With `skip`: the share of the training sequences that may be left out before the run ends."""
    cache_dir: str | None = None
    """Directory on each host that keeps what is read from an object store; null: none is kept."""
    cache_bytes: Annotated[int, Field(ge=2**20)] = 100 * 2**30
    """Largest size of `cache_dir`; what was used longest ago goes first."""


class TrainConfig(Section):
    """Length, batch and numerics of the run."""

    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Seeds initialisation, order, noise and sampling."""
    epochs: Annotated[float, Field(gt=0.0)] = 2.5
    """Passes over the training split."""
    steps: Positive | None = None
    """Optimizer steps; when given, `epochs` is not used."""
    batch_sequences: Positive = 32
    """B, sequences in a global batch, whatever the number of workers."""
    micro_batch_tokens: Positive | None = None
    """Padded tokens a worker puts through the model at once; null: its whole share of the batch."""
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 on GPUs that have it and on processors with AMX or AVX512-BF16, else fp32."""
    kernels: Literal["auto", "triton", "torch"] = "auto"
    """Backend of the fused operations; `auto`: Triton on GPUs, torch on processors."""
    activation_checkpointing: bool = False
    """Recompute Transformer blocks in the backward pass instead of keeping their activations."""


class EvaluateConfig(Section):
    """Validation during the run and the evaluation at its end."""

    every_steps: Positive | None = None
    """Validate every so many steps; null: about ten times in the run."""
    max_sequences: Positive | None = 1000
    """Validation sequences used during the run; the evaluation at the end uses all of them."""
    batch_sequences: Positive = 64
    """Sequences in an evaluation batch, over all workers."""
    num_samples: Positive = 20
    """Samples drawn for the report, with seeds 0, 1, ..."""
    select: Literal["last", "best"] = "last"
    """Export the weights of the last step, or those of the best validation (by the ELBO)."""
    importance_samples: NonNegative = 0
    """K of the importance-weighted likelihood on validation at the end; 0 leaves it out."""


class RunConfig(Section):
    """Where the run lives and what it leaves behind."""

    storage: str = "runs"
    """Directory of runs and of cached data sets; shared by all nodes of a cluster."""
    name: Annotated[str, Field(pattern=r"^[\w-][\w.-]*$")] | None = None
    """Run directory under `storage`; null: a hash of everything that changes the result."""
    log_every_steps: Positive = 20
    """Steps between two log lines."""
    checkpoint_every_steps: Positive | None = None
    """Steps between checkpoints; null: about ten in the run."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints kept."""
    checkpoint_url: str | None = None
    """Keep checkpoints in an object store (s3://bucket/folder; a folder a run), for nodes that share no file system;
    null: in the run directory."""
    ledger: bool = False
    """Write which sequences each step was made with: position in the run's order and hash of the tokens, a file a rank
    in `ledger/`."""
    unwritten_checkpoints: Positive = 3
    """So many checkpoints in a row that the storage does not take end the run; fewer are told, and training goes on."""
    peak_flops: PositiveFloat | None = None
    """Peak FLOP/s of a worker's device, for the MFU; null: the data sheet's of a GPU that the estimates know, else the
    MFU is left out."""
    sinks: list[Literal["wandb", "mlflow"]] = Field(default_factory=list)
    """Where the numbers go, too: Weights & Biases, MLflow; each needs its package and its own settings."""
    trace_steps: Annotated[list[Positive], Field(min_length=2, max_length=2)] | None = None
    """First and last step of which every rank writes its spans into trace/, for Perfetto; null: none."""
    trace_profiler: bool = False
    """In those steps torch.profiler, too, and on GPUs a snapshot of the memory; they take longer then."""
    straggler_factor: Annotated[float, Field(gt=1.0)] = 1.5
    """A rank that takes so many times the median, by itself and between two log lines, is named."""
    hang_seconds: PositiveFloat | None = 300.0
    """A rank that spends longer in one part of a step writes its stacks into hang/ and fails the run; null: none."""


class ClusterConfig(Section):
    """Workers and how DeepSpeed shards the model over them."""

    workers: Positive | None = None
    """Training workers; null: one per GPU of the cluster, or two where there are none."""
    min_workers: Positive | None = None
    """Fewest workers to go on with where the cluster has no room for `workers` (any more); null: `workers` if that is
    given, else 1. When room comes back, the run takes it."""
    max_restarts: NonNegative = 3
    """How often in a row workers are started again that were lost before the run got further than before."""
    wait_seconds: NonNegative = 600
    """How long to wait for room when workers or nodes were lost."""
    cpus_per_worker: Positive | None = None
    """CPUs (and threads) of a worker; null: an equal share of a node."""
    zero_stage: Annotated[int, Field(ge=0, le=3)] = 0
    """DeepSpeed ZeRO stage: 0 nothing sharded (fastest for a model that fits), 1 the optimizer's state,
    2 the gradients too, 3 the parameters too."""
    overlap_communication: bool = False
    """Reduce gradients, and at ZeRO-3 gather weights, while the passes go on; takes memory for a second bucket."""
    offload_optimizer: bool = False
    """Keep the optimizer's state in host memory and update there; ZeRO 1 to 3."""
    offload_parameters: bool = False
    """Keep the shards of the parameters in host memory; ZeRO-3."""
    hpz_ranks: Positive = 1
    """ZeRO++ hpZ, ZeRO-3: backward gathers weights from a second copy, sharded over so many neighbouring ranks, such as
    those of a node; 1: there is none."""
    quantized_weights: bool = False
    """ZeRO++ qwZ, ZeRO-3 on GPUs: weights are gathered in 8 bits."""
    quantized_gradients: bool = False
    """ZeRO++ qgZ, ZeRO-3 on GPUs: gradients are reduced in 4 and 8 bits."""
    collective_timeout_seconds: Positive = 600
    """A collective that waits longer fails the run."""


class Config(Section):
    """Everything a run needs to know."""

    data: DataConfig = DataConfig()
    model: ModelConfig = ModelConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    run: RunConfig = RunConfig()
    cluster: ClusterConfig = ClusterConfig()


RESULT_SECTIONS = ("data", "model", "objective", "optimizer", "train")
