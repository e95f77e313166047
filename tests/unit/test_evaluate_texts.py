"""The evaluation of texts on models whose quality is known: one that copies, one that babbles, one without a latent."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.text.special_ids import EOS_ID, UNK_ID
from vae_dist.data.text.tokenizer import Tokenizer, build_tokenizer
from vae_dist.decode.request import Decoding, Generated
from vae_dist.errors import DataError
from vae_dist.evaluate.ngram import KneserNey
from vae_dist.evaluate.texts import TextOptions, evaluate_texts
from vae_dist.observe.evaluation_page import render_evaluation

NOUNS, VERBS = ["cat", "dog", "horse", "bird", "fish"], ["sees", "likes", "fears", "eats"]


def sentences(count: int, seed: int) -> list[str]:
    rng = np.random.default_rng(seed)
    return [
        f"the {rng.choice(NOUNS)} {rng.choice(VERBS)} the {rng.choice(NOUNS)}" + " today" * int(rng.integers(2))
        for _ in range(count)
    ]


TRAINING_TEXTS, HELD_OUT_TEXTS = sentences(400, 0), sentences(120, 1)
WORDS = build_tokenizer(TRAINING_TEXTS, PrepareConfig(tokenizer="word"))
PIECES = build_tokenizer(TRAINING_TEXTS, PrepareConfig(tokenizer="bpe", vocab_size=270))


def flat(tokenizer: Tokenizer, texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    joined = Sequences.from_list(tokenizer.encode_batch(texts))
    return joined.tokens, joined.offsets


@dataclass
class Model:
    """Stands in for a TextModel: samples and reconstructions are made of given texts."""

    tokenizer: Tokenizer
    babbles: bool = False
    latent: str = "sequence"
    max_tokens: int = 40
    calls: list[tuple[Any, ...]] = field(default_factory=list)

    @property
    def vae(self) -> Any:
        return SimpleNamespace(config=SimpleNamespace(latent=self.latent))

    def encode(self, texts: list[str]) -> list[Any]:
        return [SimpleNamespace(ids=ids) for ids in self.tokenizer.encode_batch(texts)]

    def sample(self, count: int, seed: int, decoding: Decoding) -> tuple[list[str], list[Generated], torch.Tensor]:
        self.calls.append(("sample", count, seed, decoding))
        texts = [sentences(1, 1000 + seed + i)[0] for i in range(count)]
        if self.babbles:
            texts = [" ".join(np.random.default_rng(len(text)).permutation(text.split())) for text in texts]
        return texts, self._rows(texts), torch.zeros(count, 2)

    def reconstruct(self, texts: list[str], seed: int, decoding: Decoding) -> tuple[list[str], list[Generated]]:
        self.calls.append(("reconstruct", len(texts), seed, decoding))
        outputs = ["the cat" for _ in texts] if self.babbles else list(texts)
        return outputs, self._rows(outputs)

    def interpolate(
        self, a: str, b: str, points: int, path: str, seed: int, decoding: Decoding
    ) -> tuple[list[float], list[str], list[Generated]]:
        """Jumps from a to b in the middle."""
        self.calls.append(("interpolate", points, path, decoding))
        texts = [a if 2 * i < points else b for i in range(points)]
        return [i / (points - 1) for i in range(points)], texts, self._rows(texts)

    def _rows(self, texts: list[str]) -> list[Generated]:
        ids = [row.tolist() for row in self.tokenizer.encode_batch(texts)]
        return [Generated(row, -2.0 * len(row), True) for row in ids]


def evaluate(model: Model, **options: Any) -> dict[str, Any]:
    tokenizer = model.tokenizer
    chosen = TextOptions(**{"sequences": 100, "pairs": 5, "steps": 4, "shown": 20, "batch_sequences": 32, **options})
    return evaluate_texts(model, flat(tokenizer, HELD_OUT_TEXTS), flat(tokenizer, TRAINING_TEXTS), chosen)  # type: ignore[arg-type]


def test_a_model_that_copies_scores_full_marks() -> None:
    found = evaluate(Model(WORDS))
    assert {name: found["reconstruction"][name] for name in ("bleu", "token_accuracy", "exact_match")} == {
        "bleu": pytest.approx(100),
        "token_accuracy": 1.0,
        "exact_match": 1.0,
    }
    assert "tok:none" in found["reconstruction"]["bleu_signature"]
    path = found["interpolation"]
    assert (path["pairs"], path["steps"], path["nll_bump"]) == (5, 4, pytest.approx(0.0))
    assert path["changed_fraction"] == pytest.approx(1 / 4)
    assert path["path_length_ratio"] == pytest.approx(1.0)
    for row in found["reconstruction"]["examples"]:
        assert row["input"] == row["output"] and row["input"] in HELD_OUT_TEXTS


def test_good_samples_look_like_real_text_and_bad_ones_do_not() -> None:
    good, real, bigram, trained = evaluate(Model(WORDS), ngram_order=3)["sample_quality"]["rows"]
    bad = evaluate(Model(WORDS, babbles=True), ngram_order=3)["sample_quality"]["rows"][0]
    names = ["This model", "Real text", "Kneser-Ney bigram", "Kneser-Ney 3-gram"]
    assert [row["name"] for row in (good, real, bigram, trained)] == names
    assert all(row["sequences"] == 100 for row in (good, real, bigram, trained))
    for name in ("forward_ppl_per_token", "reverse_ppl_per_token"):
        assert good[name] == pytest.approx(real[name], rel=0.15)
        assert bad[name] > 1.5 * real[name]
    # The same words in another order.
    assert bad["distinct_1"] == pytest.approx(good["distinct_1"], rel=0.2)


def test_the_baselines_are_the_ngram_models_of_the_training_text() -> None:
    found = evaluate(Model(WORDS))["ngram_baselines"]
    assert (found["training_sequences"], found["held_out_sequences"]) == (400, 120)
    held_out, training = flat(WORDS, HELD_OUT_TEXTS), flat(WORDS, TRAINING_TEXTS)
    for row, (order, modified) in zip(found["rows"], ((1, False), (2, False), (5, True)), strict=True):
        model = KneserNey(training, WORDS.vocab_size, order=order, modified=modified, bos_id=1, excluded_ids=(0,))
        assert row["ppl_per_token"] == pytest.approx(model.perplexity(held_out), rel=1e-12)
        assert row["ppl_per_word"] == row["ppl_per_token"], "the words are the tokens"


def test_pieces_are_scored_per_word_as_well_and_bleu_reads_decoded_text() -> None:
    assert any(
        len(row) > len(text.split()) + 1
        for row, text in zip(PIECES.encode_batch(HELD_OUT_TEXTS), HELD_OUT_TEXTS, strict=True)
    )
    found = evaluate(Model(PIECES))
    assert "tok:13a" in found["reconstruction"]["bleu_signature"]
    words = sum(len(text.split()) + 1 for text in HELD_OUT_TEXTS)
    for row in found["ngram_baselines"]["rows"]:
        assert row["ppl_per_word"] == pytest.approx(np.exp(row["nll_per_seq"] * 120 / words), rel=1e-12)
        assert row["ppl_per_word"] > row["ppl_per_token"]


def test_seeds_choose_the_texts_and_the_samples() -> None:
    model = Model(WORDS)
    one, again, other = (evaluate(model, seed=seed) for seed in (1, 1, 2))
    assert one == again
    assert one["samples"]["seed_first"] == 100 and other["samples"]["seed_first"] == 200
    assert one["reconstruction"]["examples"] != other["reconstruction"]["examples"]
    drawn = [call[1:3] for call in model.calls if call[0] == "sample"][:4]
    assert drawn == [(32, 100), (32, 132), (32, 164), (4, 196)], "no seed twice, none left out"
    assert {call[3] for call in model.calls if call[0] == "sample"} == {
        Decoding(1.0, max_tokens=40, allow_unknown=True)
    }
    assert {call[3] for call in model.calls if call[0] != "sample"} == {
        Decoding(0.0, max_tokens=40, allow_unknown=True)
    }


def test_a_language_model_has_samples_only() -> None:
    assert set(evaluate(Model(WORDS, latent="none"))) == {"ngram_baselines", "samples", "sample_quality"}


def test_another_language_model_can_judge_fluency() -> None:
    held_out, training = flat(WORDS, HELD_OUT_TEXTS), flat(WORDS, TRAINING_TEXTS)
    options = TextOptions(sequences=20, pairs=1, steps=2)
    half = ("a coin", lambda sequences: -len(sequences[0]) * float(np.log(2)))
    quality = evaluate_texts(Model(WORDS), held_out, training, options, half)["sample_quality"]  # type: ignore[arg-type]
    assert quality["forward_model"] == "a coin" and quality["reverse_model"] == "Kneser-Ney 5-gram"
    assert all(row["forward_ppl_per_token"] == pytest.approx(2) for row in quality["rows"])


def test_small_and_odd_data_leave_sections_out() -> None:
    training = flat(WORDS, TRAINING_TEXTS)
    options = TextOptions(sequences=20, pairs=3, steps=2, shown=4)
    one = flat(WORDS, ["the cat sees the dog"])
    alone = evaluate_texts(Model(WORDS), one, training, options)  # type: ignore[arg-type]
    assert set(alone) == {"ngram_baselines", "samples", "reconstruction"}
    assert len(alone["samples"]["texts"]) == 4
    # A text without a word cannot be encoded; it counts where likelihoods are taken.
    ids = [np.array([EOS_ID]), *WORDS.encode_batch(["the cat", "the dog"]), np.array([UNK_ID, EOS_ID])]
    joined = Sequences.from_list(ids)
    odd = evaluate_texts(Model(WORDS), (joined.tokens, joined.offsets), training, options)  # type: ignore[arg-type]
    assert odd["ngram_baselines"]["held_out_sequences"] == 4
    assert sorted(e["input"] for e in odd["reconstruction"]["examples"]) == ["<unk>", "the cat", "the dog"]
    with pytest.raises(DataError, match="needs held-out and training sequences"):
        evaluate_texts(Model(WORDS), flat(WORDS, []), training, options)  # type: ignore[arg-type]


def test_what_is_found_is_json_and_every_number_has_a_definition_on_the_page() -> None:
    found = evaluate(Model(WORDS))
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    html = render_evaluation({"title": "x", "scores": {}, **found})
    for section, extra in (
        ("reconstruction", {"seed", "examples", "sequences"}),
        ("interpolation", {"seed", "examples"}),
    ):
        assert set(found[section]) - extra <= shown_keys(), section
    for row in (*found["sample_quality"]["rows"], *found["ngram_baselines"]["rows"]):
        assert set(row) - {"name"} <= shown_keys()
    assert html.count("<tr>") > 60


def shown_keys() -> set[str]:
    from vae_dist.observe import definitions

    tables = (definitions.RECONSTRUCTION, definitions.SMOOTHNESS, definitions.SAMPLE_QUALITY, definitions.BASELINES)
    return {key for table in tables for key in table}
