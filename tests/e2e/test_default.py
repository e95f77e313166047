"""The embedded default, trained in full on this machine's docstrings: the promises `make train` makes."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from support import RayCluster, run_command

from vae_dist.data.store.dataset import Dataset
from vae_dist.decode.latent_ops import TextModel
from vae_dist.decode.request import Decoding
from vae_dist.evaluate.likelihood import score_split, summarise, swapped_rec_per_seq
from vae_dist.evaluate.text_metrics import sequence_hashes, verbatim_fraction
from vae_dist.export.model_dir import load_model


@pytest.mark.long
@pytest.mark.timeout(1200)
def test_default_beats_the_bigram_with_a_live_latent(ray_cluster: RayCluster, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "vae_dist.train", f"run.storage={tmp_path}", "cluster.cpus_per_worker=1"]
    done = run_command(command, ray_cluster.environment, timeout=1000)
    assert done.status == 0, done.err
    result = done.json
    print(json.dumps(result))
    assert result["valid"]["ppl"] < result["baselines"]["bigram_ppl"]
    assert result["valid"]["kl_per_seq"] >= 2
    assert result["valid"]["active_units"] >= 4
    assert result["valid"]["mutual_information_nats"] >= 1

    loaded, dataset = load_model(result["run_dir"]), Dataset.open(result["data_dir"])
    valid, train = dataset.split("valid"), dataset.split("train")
    scores = score_split(loaded.vae, valid, seed=1, batch_sequences=64)
    assert scores is not None
    # Another seed draws other latents: the figures must hold for them, too.
    own = summarise(scores)["rec_per_seq"]
    assert own == pytest.approx(result["valid"]["rec_per_seq"], rel=0.02)
    assert swapped_rec_per_seq(loaded.vae, valid, scores, seed=1, batch_sequences=64) - own >= 1

    model = TextModel(loaded.vae, loaded.tokenizer, loaded.max_tokens)
    _, rows, _ = model.sample(20, 0, Decoding(max_tokens=loaded.max_tokens))
    everything = train.read(0, train.sequences)
    copied = verbatim_fraction([row.tokens for row in rows], sequence_hashes(everything.tokens, everything.offsets))
    assert copied <= 0.3
