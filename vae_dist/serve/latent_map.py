"""The map: validation texts at the two principal components of their posterior means.

Shapes: N texts, D latent dimensions. The texts come from data sets that whoever starts the service names: a model
directory holds none, because a corpus must not travel with every model.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from vae_dist.data.store.dataset import Dataset
from vae_dist.decode.encode import likelihood
from vae_dist.decode.latent_ops import TextModel
from vae_dist.serve.response_schemas import MapPoint, MapResponse

MAX_POINTS = 2000


def validation_texts(paths: Sequence[str]) -> list[tuple[str, str]]:
    """(name of the data set, text): evenly spaced over the validation splits, at most MAX_POINTS together.

    Raises:
        DataError: a path is no data set, or one without a validation split.
    """
    found = []
    for path in paths:
        dataset = Dataset.open(path)
        split = dataset.split("valid")
        count = min(split.sequences, MAX_POINTS // len(paths))
        numbers = np.arange(count) * split.sequences // max(count, 1)
        rows = split.read_runs((int(number), 1) for number in numbers)
        texts = filter(str.strip, map(dataset.tokenizer.decode, rows))
        found += [(Path(dataset.path).name, text) for text in texts]
    return found


def latent_map(model: TextModel, texts: Sequence[tuple[str, str]]) -> MapResponse:
    """Encode and score the texts, and lay them out; without texts, or one latent for each, there are no points."""
    if not texts or model.vae.encoder is None or model.vae.per_token:
        return MapResponse(on_sphere=False, centre=[], axes=[], shares=[], points=[])
    encoded = model.encode([text for _, text in texts])
    # As /v1/score has it, with one sample.
    scores = likelihood(model.vae, encoded, samples=1)
    mean_ND = torch.stack([one.mean for one in encoded]).double().cpu().numpy()
    centre_D, axes_2D, shares = principal_axes(mean_ND)
    points = [
        MapPoint(text=text, source=source, tokens=score["tokens"], kl=score["kl"], at=at, latent=_short(one.mean))
        for (source, text), one, score, at in zip(
            texts, encoded, scores, ((mean_ND - centre_D) @ axes_2D.T).tolist(), strict=True
        )
    ]
    return MapResponse(
        on_sphere=model.is_sphere,
        centre=centre_D.tolist(),
        axes=axes_2D.tolist(),
        shares=shares.tolist(),
        points=points,
    )


def principal_axes(x_ND: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The mean [D], the two directions of largest variance [2, D], and the share of the variance along each [2].

    A direction's largest entry is positive, so that a map is the same at every start. A direction that the points do
    not have (one point, one dimension) is zero.
    """
    centre_D = x_ND.mean(axis=0)
    _, singular, directions = np.linalg.svd(x_ND - centre_D, full_matrices=False)
    axes_2D, variance = np.zeros((2, x_ND.shape[1])), np.zeros(2)
    for k in range(min(2, len(singular))):
        axes_2D[k] = directions[k] * np.sign(directions[k][np.abs(directions[k]).argmax()])
        variance[k] = singular[k] ** 2
    return centre_D, axes_2D, variance / max(float((singular**2).sum()), 1e-12)


def _short(mean_D: torch.Tensor) -> list[float]:
    """The shortest numbers that are the same in float32: half the JSON."""
    return [float(str(value)) for value in mean_D.cpu().numpy()]
