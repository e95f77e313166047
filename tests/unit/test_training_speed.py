"""The benchmark of the training step: its gate, what it counts as matrix products, its memory, its check."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from support import ROOT

from vae_dist.config.model_schema import LstmConfig, ModelConfig, TransformerConfig
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import Batch, collate
from vae_dist.model.vae import TextVAE

# Last, so that its modules shadow nothing.
sys.path.append(str(ROOT / "tests" / "bench"))

import picture
from steps import products
from steps.gate import WrongModelError, give_weights, require_same_loss
from steps.plain import PAD, PlainLoop, plain_model
from steps.report import check

VOCAB = 50
PARTS = {"lstm": LstmConfig(hidden_dim=12), "transformer": TransformerConfig(hidden_dim=16, num_layers=2, num_heads=2)}


def pair(kind: str) -> tuple[TextVAE, torch.nn.Module]:
    torch.manual_seed(0)
    config = ModelConfig(embedding_dim=10, encoder=PARTS[kind], decoder=PARTS[kind], latent_dim=4)
    ours = TextVAE(config, VOCAB).eval()
    plain = plain_model(config, VOCAB)
    give_weights(plain, ours)
    return ours, plain


def texts() -> list[np.ndarray]:
    draw = np.random.default_rng(0)
    return [draw.integers(4, VOCAB, length) for length in (3, 9, 5, 1, 7)]


def batch() -> Batch:
    return collate(Sequences.from_list(texts()), np.arange(5))


@pytest.mark.parametrize("kind", list(PARTS))
def test_the_plain_loop_has_our_model(kind: str) -> None:
    ours, plain = pair(kind)
    require_same_loss(plain, ours, batch())


@pytest.mark.parametrize("kind", list(PARTS))
@pytest.mark.parametrize("name", ["to_posterior.bias", "to_input.weight", "output_bias"])
def test_another_model_gets_no_speed(kind: str, name: str) -> None:
    ours, plain = pair(kind)
    with torch.no_grad():
        plain.get_parameter(name)[0] += 0.1
    with pytest.raises(WrongModelError, match="nats per sequence"):
        require_same_loss(plain, ours, batch())


def test_the_plain_loop_reads_every_sequence_once_an_epoch() -> None:
    _, plain = pair("lstm")
    loop = PlainLoop(plain, texts(), 2, None, learning_rate=1e-3)
    # Five sequences make two whole batches; another epoch follows.
    read = [next(loop._batches) for _ in range(4)]
    for first in (0, 2):
        rows = [tuple(row[row != PAD].tolist()) for tokens, _ in read[first : first + 2] for row in tokens]
        assert len(set(rows)) == 4
        assert set(rows) <= {tuple(text.tolist()) for text in texts()}
    assert all(bool(((tokens != PAD).sum(1) == lengths).all()) for tokens, lengths in read)


def test_the_products_of_an_operator_have_its_arithmetic() -> None:
    found = dict(products._products("aten::mkldnn_rnn_layer_backward", [[7, 3, 5], [16, 5], [16, 4], [16]]))
    # Twice the forward pass: to the inputs and the state, and to both weights.
    assert sum(times * m * k * n for (m, k, n), times in found.items()) == 2 * 7 * 3 * (5 + 4) * 16
    assert list(products._products("aten::bmm", [[6, 2, 3], [6, 3, 5]])) == [((2, 3, 5), 6)]
    assert list(products._products("aten::addmm", [[5], [2, 3], [3, 5], [], []])) == [((2, 3, 5), 1)]
    assert list(products._products("aten::mul", [[2, 3], [2, 3]])) == []


def test_matrix_products_are_told_from_the_rest_of_a_step() -> None:
    torch.set_num_threads(1)
    left, right = torch.randn(800, 800), torch.randn(800, 800)

    def step() -> None:
        start = time.perf_counter()
        torch.mm(left, right)
        spent = time.perf_counter() - start
        time.sleep(spent)

    found = products.measure_products(step, torch.float32)
    assert 0.3 < found.fraction < 0.7
    assert found.rate_fraction > 0.3


def test_peak_memory_is_what_was_touched_and_given_back() -> None:
    # In a process of its own, as the benchmark does it: this one's freed memory would serve the allocation.
    code = """
import numpy as np
from steps.memory import peak_mebibytes

class Contender:
    def step(self):
        return int(np.ones(64 * 2**20, dtype=np.uint8)[0])

print(peak_mebibytes(Contender))
"""
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT / "tests" / "bench", check=True, stdout=subprocess.PIPE, text=True
    )
    assert 60 < float(run.stdout) < 90


def test_the_check_names_the_ratio_that_fell(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry = {"model": "lstm_256", "batch_sequences": 32, "ratio_loop_bf16": 2.0, "tokens_per_second": {"ours": 9.0}}
    committed = tmp_path / "committed.json"
    committed.write_text(json.dumps({"results": [entry]}), encoding="utf-8")
    # Speeds are another machine's; ratios are held.
    assert check({"results": [entry | {"tokens_per_second": {"ours": 1.0}, "ratio_loop_bf16": 1.71}]}, committed) == 0
    assert check({"results": [entry | {"ratio_loop_bf16": 1.69}]}, committed) == 1
    assert "lstm_256/32 ratio_loop_bf16 is 1.69 and was 2.00" in capsys.readouterr().err
    assert check({"results": [entry | {"model": "lstm_1024"}]}, committed) == 1


def test_the_picture_is_that_of_the_results() -> None:
    results = (
        json.loads((picture.RESULTS / f"{name}.json").read_text()) for name in ("training-speed", "step-scaling")
    )
    assert picture.PICTURE.read_text() == picture.draw(*results)
