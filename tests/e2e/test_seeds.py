"""The two tutorials this project grew from, on real text: the linear text VAE and the recurrent one on captions."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from support import Finished, run_command, shared_corpus

from vae_dist.data.store.dataset import Dataset
from vae_dist.export.model_dir import load_model
from vae_dist.observe.metrics import read_metrics

SETTINGS = ("cluster.workers=1", "cluster.cpus_per_worker=1", "evaluate.num_samples=10", "run.log_every_steps=20")


def validations(run: Path) -> list[dict]:
    return [record for record in read_metrics(run) if record["kind"] == "valid"]


@pytest.mark.long
def test_the_linear_vae_on_wikitext_beats_word_frequencies_and_its_latents_get_a_mixture(
    train: Callable[..., Finished], tmp_path: Path
) -> None:
    source = shared_corpus("wikitext-2") / "test.txt"
    config = ("configs/linear_wikitext.yaml", f"data.source={source}", f"run.storage={tmp_path}")
    done = train(*config, *SETTINGS, "run.name=linear", "train.epochs=6", "data.prepare.vocab_size=3000", timeout=600)
    assert done.status == 0, done.err
    # Words as a bag: better than their frequencies, worse than what reads the word before.
    assert done.json["valid"]["ppl"] < done.json["baselines"]["unigram_ppl"]
    assert done.json["valid"]["mutual_information_nats"] > 1.0
    (fit,) = (record for record in read_metrics(tmp_path / "linear") if record["kind"] == "fit")
    assert fit["mixture_nats"] > fit["gaussian_nats"] > fit["standard_normal_nats"]
    # Another latent variable model over the same decoder: samples come from the mixture.
    loaded = load_model(tmp_path / "linear")
    assert loaded.vae.prior_name == "fitted mixture"
    weights = loaded.vae.state_dict()
    assert torch.allclose(weights["sampling_prior.log_weight_C"].exp().sum(), torch.tensor(1.0), atol=1e-5)
    sampled = run_command([sys.executable, "-m", "vae_dist", "sample", str(tmp_path / "linear"), "--num", "5"])
    assert sampled.status == 0 and len(set(sampled.json["texts"])) == 5
    # The decoder is linear: the logits of all positions are W z + b.
    dataset = Dataset.open(done.json["data_dir"])
    z = torch.randn(3, loaded.vae.latent_dim)
    hidden = loaded.vae.decoder(torch.zeros(3, 4, 128), z, torch.tensor([4, 4, 4]))
    assert torch.equal(hidden[:, 0], hidden[:, 3])
    assert torch.allclose(
        hidden[:2, 0].sum(0), loaded.vae.decoder(torch.zeros(1, 1, 128), z[:2].sum(0)[None], None)[0, 0], atol=1e-5
    )
    assert dataset.tokenizer.vocab_size == loaded.vae.vocab_size


@pytest.mark.long
def test_the_recurrent_vae_on_one_words_captions(train: Callable[..., Finished], tmp_path: Path) -> None:
    captions = shared_corpus("coco_captions") / "train.txt"
    glove = shared_corpus("glove") / "glove.6B.50d.subset.txt.gz"
    config = ("configs/bilstm_coco.yaml", f"data.source={captions}", "data.prepare.keyword=bathroom", *SETTINGS)
    vectors = (f"model.embedding_vectors={glove}", "model.freeze_embeddings=true", "model.tie_embeddings=false")
    done = train(*config, *vectors, f"run.storage={tmp_path}", "run.name=words", "train.epochs=25", timeout=600)
    assert done.status == 0, done.err
    dataset = Dataset.open(done.json["data_dir"])
    counts = [dataset.split(name).sequences for name in ("train", "valid")]
    assert sum(counts) == 1555 and abs(counts[1] / 1555 - 0.2) < 0.04
    # Coverage is said, the vectors are the file's, and stayed as they were.
    assert "glove.6B.50d.subset.txt.gz: " in done.err
    loaded = load_model(tmp_path / "words")
    word = loaded.tokenizer.encode_batch(["bathroom"])[0][0]
    line = next(text for text in _lines(glove) if text.startswith("bathroom "))
    expected = np.array(line.split()[1:], dtype=np.float32)
    np.testing.assert_allclose(loaded.vae.embedding.weight[word].detach().numpy(), expected, rtol=1e-6)
    # A latent for every word, decoded at once: captions come back far better than by their words' frequencies.
    first, last = validations(tmp_path / "words")[0], validations(tmp_path / "words")[-1]
    assert last["rec_per_seq"] < 0.65 * first["rec_per_seq"]
    assert last["mutual_information_latents"] == last["tokens"]
    page = (tmp_path / "words" / "report.html").read_text(encoding="utf-8")
    assert "Reconstruction" in page and "<svg" in page
    text = "a bathroom with a toilet and a sink"
    again = run_command([sys.executable, "-m", "vae_dist", "reconstruct", str(tmp_path / "words"), text])
    assert again.status == 0
    assert again.json["reconstructions"][0]["token_accuracy"] > 0.5, json.dumps(again.json)
    sampled = run_command([sys.executable, "-m", "vae_dist", "sample", str(tmp_path / "words"), "--num", "5"])
    assert sampled.status == 0 and len(set(sampled.json["texts"])) == 5


@pytest.mark.long
def test_the_recurrent_vae_with_one_latent_a_caption_and_the_wrong_vectors(
    train: Callable[..., Finished], tmp_path: Path
) -> None:
    captions = shared_corpus("coco_captions") / "train.txt"
    glove = shared_corpus("glove") / "glove.6B.50d.subset.txt.gz"
    config = ("configs/bilstm_coco.yaml", f"data.source={captions}", "data.prepare.keyword=bathroom", *SETTINGS)
    places = (f"run.storage={tmp_path}", "run.name=pooled", "train.steps=300", "optimizer.warmup_steps=30")
    wrong = train(*config, *places, f"model.embedding_vectors={glove}", "model.embedding_dim=64")
    assert wrong.status == 2 and "model.embedding_dim=50" in wrong.err
    absent = train(*config, *places, f"model.embedding_vectors={tmp_path}/none.txt")
    assert absent.status == 2 and f"there is no file {tmp_path}/none.txt" in absent.err
    pooled = train(*config, *places, "model.latent=sequence", "model.teacher_forcing=true", "run.name=teacher")
    assert pooled.status == 0, pooled.err
    repeated = train(*config, *places, "model.latent=sequence", "run.name=repeated", "objective.entropy_weight=0.01")
    assert repeated.status == 0, repeated.err
    # Reading the words before helps; so does any training.
    assert pooled.json["valid"]["rec_per_seq"] < repeated.json["valid"]["rec_per_seq"]
    assert repeated.json["valid"]["ppl"] < repeated.json["baselines"]["unigram_ppl"]


def _lines(path: Path) -> list[str]:
    import gzip

    with gzip.open(path, "rt", encoding="utf-8") as file:
        return file.read().splitlines()
