"""The tokens that every contender reads: multi30k and PTB, shuffled, repeated until they are enough.

    corpus/train.txt     one sequence a line
    ours/                the prepared data set, with tokenizer.json
    tokens.npy           every id end to end, end of sequence last in each; offsets.npy bounds them, int64[n + 1]
    content.json         what a full pass must yield; written last

Runs in the project's own environment; the contenders read what it made.
"""

from __future__ import annotations

import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
from peers.gate import Content, content_of

MAX_TOKENS = 128
_SHARD_BYTES = 8 * 2**20
_UNK_ID, _EOS_ID = 3, 2


def make_corpus(data: Path, cache: Path, tokens: int) -> Path:
    """The folder of a corpus of at least `tokens` tokens under `cache`, made if it is not there.

    Raises:
        FileNotFoundError: `data` lacks the two corpora.
    """
    from vae_dist.data.store.shards import FORMAT_VERSION

    lines = [line for line in map(str.strip, _lines(data)) if line]
    once = sum(len(line.split()) + 1 for line in lines)
    copies = max(1, -(-tokens // once))
    return made_once(cache / f"corpus-v{FORMAT_VERSION}-x{copies}", lambda folder: _write(folder, lines, copies))


def read_content(folder: Path) -> Content:
    """What a full pass over the corpus must yield."""
    return Content(**json.loads((folder / "content.json").read_text(encoding="utf-8")))


def packed_content(folder: Path, block_tokens: int) -> Content:
    """What a pass must yield for a loader that cuts all tokens, end to end, into blocks and drops the rest."""
    tokens = np.load(folder / "tokens.npy", mmap_mode="r")
    whole = len(tokens) // block_tokens * block_tokens
    return content_of(tokens[:whole], np.arange(0, whole + 1, block_tokens))


def made_once(path: Path, write: Callable[[Path], None]) -> Path:
    """`path`, a folder that `write` filled; one that was interrupted is begun again."""
    if not path.exists():
        temporary = path.with_name(f"{path.name}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        write(temporary)
        os.replace(temporary, path)
    return path


def _lines(data: Path) -> list[str]:
    with gzip.open(data / "multi30k_en" / "train.txt.gz", "rt", encoding="utf-8") as captions:
        return [*captions, *(data / "ptb" / "train.txt").read_text(encoding="utf-8").splitlines()]


def _write(folder: Path, lines: list[str], copies: int) -> None:
    from vae_dist.config.schema import PrepareConfig
    from vae_dist.data.prepare.prepare import prepare

    (folder / "corpus").mkdir()
    order = list(range(len(lines)))
    orders = []
    with open(folder / "corpus" / "train.txt", "w", encoding="utf-8") as out:
        for copy in range(copies):
            # The captions come sorted by length; no loader is meant to undo that.
            random.Random(copy).shuffle(order)
            orders.append(np.array(order))
            out.writelines(f"{lines[i]}\n" for i in order)
    options = PrepareConfig(
        tokenizer="word", vocab_size=2**15, max_tokens=MAX_TOKENS, shard_bytes=_SHARD_BYTES, too_long="drop"
    )
    prepare(str(folder / "corpus"), folder / "ours", options)
    encoded = _encode(lines, folder / "ours" / "tokenizer.json")
    rows = [encoded[i] for order_of_copy in orders for i in order_of_copy]
    np.save(folder / "tokens.npy", np.concatenate(rows))
    np.save(folder / "offsets.npy", np.cumsum([0, *map(len, rows)]))
    content = content_of(np.concatenate(encoded), np.cumsum([0, *map(len, encoded)])).times(copies)
    (folder / "content.json").write_text(json.dumps(asdict(content)), encoding="utf-8")


def _encode(lines: list[str], tokenizer: Path) -> list[np.ndarray]:
    """Ids of each line by dictionary look-up alone, so that the gate's reference shares no code with a contender."""
    vocabulary = json.loads(tokenizer.read_text(encoding="utf-8"))["model"]["vocab"]
    return [
        np.array([*(max(vocabulary.get(word, _UNK_ID), _UNK_ID) for word in line.split()), _EOS_ID], dtype=np.uint16)
        for line in lines
    ]
