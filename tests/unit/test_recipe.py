"""CONTRIBUTING's recipe for a new part of the model, followed to the letter on a copy of the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from support import ROOT

PART = '''"""A toy encoder: the embedding of the longest-lived token, the last one before the end."""

from __future__ import annotations

import torch
from torch import nn

from vae_dist.config.model_schema import ModelConfig, ToyConfig


class ToyEncoder(nn.Module):
    """One linear map of the last word's embedding."""

    def __init__(self, part: ToyConfig, model: ModelConfig) -> None:
        super().__init__()
        self.map = nn.Linear(model.embedding_dim, part.width)
        self.output_dim = part.width

    def forward(self, x_BTE: torch.Tensor, lengths_B: torch.Tensor) -> torch.Tensor:
        last_B = (lengths_B - 2).clamp(min=0)
        return self.map(x_BTE[torch.arange(len(x_BTE)), last_B])
'''
SECTION = '''class ToyConfig(Section):
    """The toy."""

    kind: Literal["toy"] = "toy"
    width: Positive = 8
    """Size of its output."""


Backbone = Annotated['''
EDITS = {
    "config/model_schema.py": [
        ("Backbone = Annotated[", SECTION),
        (
            '    | Annotated[BagOfWordsConfig, Tag("bag_of_words")]',
            '    | Annotated[ToyConfig, Tag("toy")]\n    | Annotated[BagOfWordsConfig, Tag("bag_of_words")]',
        ),
        ('by_kind("lstm", "transformer", "bag_of_words"', 'by_kind("lstm", "transformer", "bag_of_words", "toy"'),
    ],
    "model/vae.py": [
        (
            "from vae_dist.model.latent import LatentSample\n",
            "from vae_dist.config.model_schema import ToyConfig\nfrom vae_dist.model.latent import LatentSample\n"
            "from vae_dist.model.toy import ToyEncoder\n",
        ),
        (
            "        return LstmEncoder(part, config)\n",
            "        return LstmEncoder(part, config)\n    if isinstance(part, ToyConfig):\n"
            "        return ToyEncoder(part, config)\n",
        ),
    ],
}
USE = """
import sys
import numpy as np, torch
from pathlib import Path
from vae_dist.config.load import load_config
from vae_dist.data.store.sequences import Sequences
from vae_dist.data.stream.batch import collate
from vae_dist.data.text.tokenizer import build_tokenizer
from vae_dist.export.model_dir import load_model, write_model
from vae_dist.model.toy import ToyEncoder
from vae_dist.model.vae import TextVAE
from vae_dist.objective.elbo import NegativeElbo

config = load_config(None, ["model.encoder={kind: toy, width: 5}", "model.decoder.hidden_dim=16"])
texts = [f"a{i % 7} b{i % 3} c{i % 5}" for i in range(70)]
tokenizer = build_tokenizer(texts, config.data.prepare.model_copy(update={"tokenizer": "word"}))
torch.manual_seed(0)
vae = TextVAE(config.model, tokenizer.vocab_size)
assert isinstance(vae.encoder, ToyEncoder)
batch = collate(Sequences.from_list(tokenizer.encode_batch(texts)), np.arange(70))
objective, losses = NegativeElbo(vae, config.objective, None), []
optimizer = torch.optim.Adam(vae.parameters(), lr=0.01)
for step in range(40):
    loss, _ = objective(batch, torch.tensor([0, step]), torch.tensor(0.1), torch.tensor(1 / 70))
    optimizer.zero_grad(); loss.backward(); optimizer.step(); losses.append(loss.item())
assert losses[-1] < 0.7 * losses[0], losses
assert vae.encoder.map.weight.grad.abs().max() > 0
out = Path(sys.argv[1])
write_model(out, vae.state_dict(), config.model, tokenizer, 8, {})
again = load_model(out).vae
assert torch.equal(again.encode(batch)[0], vae.eval().encode(batch)[0])
try:
    load_config(None, ["model.encoder={kind: toy, wide: 5}"])
except Exception as error:
    assert "'width'" in str(error), error
print("followed")
"""


def test_a_toy_encoder_is_one_file_one_section_and_one_branch(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "vae_dist", tmp_path / "vae_dist", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "vae_dist/model/toy.py").write_text(PART, encoding="utf-8")
    for name, edits in EDITS.items():
        path = tmp_path / "vae_dist" / name
        text = path.read_text(encoding="utf-8")
        for old, new in edits:
            assert text.count(old) == 1, f"{name} no longer reads as the recipe says: {old!r}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT / "kernels")])}
    command = [sys.executable, "-c", USE, str(tmp_path / "model")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
    assert done.returncode == 0 and done.stdout.strip() == "followed", done.stderr
