"""How fast `prepare` is beside the tokenizer alone, on the same texts and cores: `python tests/bench/prepare_speed.py`.

`tokenizers` encodes the texts from memory with threads of its own, in batches of a thousand, and throws the ids away;
`prepare` reads the same texts from files, splits, encodes, and writes shards and manifest. They take turns. Prints
one JSON object with medians over the turns; the ratio is the median of the turns' ratios.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import tokenizers

from vae_dist.config.schema import PrepareConfig
from vae_dist.data.prepare.prepare import prepare
from vae_dist.launch.prepare import executor

DATA = Path(os.environ.get("VAE_DIST_DATA", Path(__file__).resolve().parents[2] / "../shared/data"))
BATCH_TEXTS = 1000


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokenizer", choices=("bpe", "word", "unigram"), default="bpe")
    parser.add_argument("--repeats", type=int, default=8, help="how often multi30k is repeated")
    parser.add_argument("--turns", type=int, default=3)
    args = parser.parse_args()
    texts = _texts()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "once.txt").write_text("\n".join(texts) + "\n", encoding="utf-8")
        (folder / "corpus.txt").write_text(("\n".join(texts) + "\n") * args.repeats, encoding="utf-8")
        trained = prepare(str(folder / "once.txt"), folder / "once", PrepareConfig(tokenizer=args.tokenizer))
        trained.tokenizer.save(folder / "tokenizer.json")
        turns = [_turn(folder, texts, args.repeats) for _ in range(args.turns)]
    count = len(texts) * args.repeats
    print(
        json.dumps(
            {
                "texts": count,
                "cores": len(os.sched_getaffinity(0)),
                "tokenizer": args.tokenizer,
                "tokenizers_texts_per_second": round(count / statistics.median(alone for alone, _ in turns)),
                "prepare_texts_per_second": round(count / statistics.median(ours for _, ours in turns)),
                "ratio": round(statistics.median(alone / ours for alone, ours in turns), 3),
                "ratios": [round(alone / ours, 3) for alone, ours in turns],
            }
        )
    )


def _turn(folder: Path, texts: list[str], repeats: int) -> tuple[float, float]:
    """Seconds of the tokenizer alone and of prepare."""
    inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    start = time.perf_counter()
    for _ in range(repeats):
        for first in range(0, len(texts), BATCH_TEXTS):
            inner.encode_batch_fast(texts[first : first + BATCH_TEXTS], add_special_tokens=False)
    alone = time.perf_counter() - start
    options = PrepareConfig(tokenizer=str(folder / "tokenizer.json"))
    start = time.perf_counter()
    prepare(str(folder / "corpus.txt"), folder / "out", options, run=executor())
    ours = time.perf_counter() - start
    shutil.rmtree(folder / "out")
    return alone, ours


def _texts() -> list[str]:
    with gzip.open(DATA / "multi30k_en" / "train.txt.gz", "rt", encoding="utf-8") as file:
        return [line.strip() for line in file if line.strip()]


if __name__ == "__main__":
    main()
