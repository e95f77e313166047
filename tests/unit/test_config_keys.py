"""The keys of the configuration: listed, and each documented."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, get_args

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from vae_dist.config.schema import RESULT_SECTIONS, Config

# Growing this list is a decision: every key is documented, reached by a test and kept working.
KEYS = """\
data.source
data.dir
data.mixture
data.prepare.recipe
data.prepare.format
data.prepare.record
data.prepare.text_field
data.prepare.keyword
data.prepare.unicode_form
data.prepare.lowercase
data.prepare.strip_punctuation
data.prepare.strip_digits
data.prepare.tokenizer
data.prepare.pre_tokenizer
data.prepare.vocab_size
data.prepare.min_frequency
data.prepare.max_tokens
data.prepare.too_long
data.prepare.valid_fraction
data.prepare.test_fraction
data.prepare.deduplicate
data.prepare.shard_bytes
data.prepare.member_sequences
data.streams
data.length_groups
data.shuffle_block_sequences
data.shuffle_window_sequences
data.damage
data.damage_budget_fraction
data.cache_dir
data.cache_bytes
model.embedding_dim
model.embedding_vectors
model.freeze_embeddings
model.encoder[lstm].kind
model.encoder[lstm].hidden_dim
model.encoder[lstm].num_layers
model.encoder[lstm].recurrent_dropout
model.encoder[transformer].kind
model.encoder[transformer].hidden_dim
model.encoder[transformer].num_layers
model.encoder[transformer].num_heads
model.encoder[transformer].mlp_ratio
model.encoder[bag_of_words].kind
model.encoder[huggingface].kind
model.encoder[huggingface].checkpoint
model.encoder[huggingface].architecture
model.decoder[lstm].kind
model.decoder[lstm].hidden_dim
model.decoder[lstm].num_layers
model.decoder[lstm].recurrent_dropout
model.decoder[transformer].kind
model.decoder[transformer].hidden_dim
model.decoder[transformer].num_layers
model.decoder[transformer].num_heads
model.decoder[transformer].mlp_ratio
model.decoder[bag_of_words].kind
model.decoder[huggingface].kind
model.decoder[huggingface].checkpoint
model.decoder[huggingface].architecture
model.bidirectional
model.teacher_forcing
model.latent
model.latent_dim
model.posterior[gaussian].kind
model.posterior[gaussian].batch_norm_gamma
model.posterior[delta].kind
model.posterior[delta].nats_per_dim
model.posterior[vmf].kind
model.posterior[vmf].kappa
model.prior[standard].kind
model.prior[mixture].kind
model.prior[mixture].components
model.prior[vamp].kind
model.prior[vamp].components
model.prior[vamp].pseudo_tokens
model.prior[flow].kind
model.prior[flow].layers
model.prior[flow].hidden_dim
model.sampling_components
model.injection
model.tie_embeddings
model.dropout
model.shared_dropout
model.word_dropout
objective.beta
objective.annealing[linear].kind
objective.annealing[linear].start
objective.annealing[linear].fraction
objective.annealing[logistic].kind
objective.annealing[logistic].midpoint
objective.annealing[logistic].steepness
objective.annealing[cyclical].kind
objective.annealing[cyclical].cycles
objective.annealing[cyclical].ramp
objective.annealing[zero_linear].kind
objective.annealing[zero_linear].cycles
objective.annealing[zero_linear].zero
objective.annealing[zero_linear].ramp
objective.free_bits
objective.free_bits_nats
objective.rate_control[capacity].kind
objective.rate_control[capacity].nats
objective.rate_control[capacity].ramp
objective.rate_control[control_vae].kind
objective.rate_control[control_vae].nats
objective.rate_control[control_vae].kp
objective.rate_control[control_vae].ki
objective.rate_control[control_vae].beta_min
objective.rate_control[mdr].kind
objective.rate_control[mdr].nats
objective.rate_control[mdr].learning_rate
objective.autoencoder_fraction
objective.reset_decoder
objective.aggressive.max_encoder_steps
objective.aggressive.check_steps
objective.aggressive.max_fraction
objective.importance_samples
objective.estimator
objective.entropy_weight
optimizer.kind
optimizer.learning_rate
optimizer.schedule
optimizer.plateau.patience
optimizer.plateau.first_validation
optimizer.plateau.factor
optimizer.plateau.max_reductions
optimizer.min_learning_rate_ratio
optimizer.warmup_steps
optimizer.beta1
optimizer.beta2
optimizer.epsilon
optimizer.weight_decay
optimizer.gradient_clip_norm
optimizer.skip_above_median
optimizer.skip_budget
optimizer.average_decay
train.seed
train.epochs
train.steps
train.batch_sequences
train.micro_batch_tokens
train.precision
train.kernels
train.activation_checkpointing
evaluate.every_steps
evaluate.max_sequences
evaluate.batch_sequences
evaluate.num_samples
evaluate.select
evaluate.importance_samples
run.storage
run.name
run.log_every_steps
run.checkpoint_every_steps
run.keep_checkpoints
run.checkpoint_url
run.ledger
run.unwritten_checkpoints
run.peak_flops
run.sinks
run.trace_steps
run.trace_profiler
run.straggler_factor
run.hang_seconds
cluster.workers
cluster.min_workers
cluster.max_restarts
cluster.wait_seconds
cluster.cpus_per_worker
cluster.zero_stage
cluster.overlap_communication
cluster.offload_optimizer
cluster.offload_parameters
cluster.hpz_ranks
cluster.quantized_weights
cluster.quantized_gradients
cluster.collective_timeout_seconds
""".splitlines()


def sections_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in sections_in(part)]


def leaves(section: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every key, as `section.key` or `section.key[variant].key`, and its field."""
    for name, field in section.model_fields.items():
        sections = sections_in(field.annotation)
        for one in sections:
            tag = f"[{one.model_fields['kind'].default}]" if len(sections) > 1 else ""
            yield from leaves(one, f"{prefix}{name}{tag}.")
        if not sections:
            yield prefix + name, field


def test_the_keys_are_these() -> None:
    assert [key for key, _ in leaves(Config)] == KEYS


def test_every_key_is_documented() -> None:
    self_explaining = {"optimizer.beta1", "optimizer.beta2", "optimizer.epsilon", "optimizer.plateau.factor"}
    bare = {key for key, field in leaves(Config) if not field.description and not key.endswith(".kind")}
    assert bare <= self_explaining


def test_the_result_sections_leave_out_what_does_not_change_the_weights() -> None:
    assert set(Config.model_fields) - set(RESULT_SECTIONS) == {"evaluate", "run", "cluster"}
