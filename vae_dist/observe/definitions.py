"""What every number of an evaluation is: its name on the page, its unit, how it is written, and a sentence."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Definition:
    """How the page shows the value of one key.

    Attributes:
        label: its name.
        form: `whole`, `decimal` (two digits), `fine` (three), `percent` or `text`.
        unit: after the value.
        sentence: what it is.
    """

    label: str
    form: str
    unit: str
    sentence: str


_NATS = "nats per sequence"
_BELOW = "lower is better"

LIKELIHOOD = {
    "elbo_per_seq": Definition(
        "ELBO",
        "decimal",
        _NATS,
        "Evidence lower bound, -(rec + KL), mean over sequences: log p(x) is at least this.",
    ),
    "rec_per_seq": Definition(
        "Reconstruction", "decimal", _NATS, "-log p(x | z) with z from the posterior of x, the end of sequence counted."
    ),
    "kl_per_seq": Definition(
        "KL",
        "decimal",
        _NATS,
        "KL(q(z | x) || p(z)), mean over sequences: what the latent says about the text, at most.",
    ),
    "nll_per_token": Definition(
        "Negative ELBO per token", "fine", "nats", "(rec + KL) over all tokens to be predicted."
    ),
    "ppl": Definition(
        "Perplexity per token, ELBO", "decimal", "", f"exp of the negative ELBO per token; an upper bound, {_BELOW}."
    ),
    "ppl_per_word": Definition(
        "Perplexity per word, ELBO",
        "decimal",
        "",
        "exp of the negative ELBO per word; words are what white space separates, and each end of sequence.",
    ),
    "iw_nll_per_seq": Definition(
        "Importance-weighted NLL",
        "decimal",
        _NATS,
        "-log of the mean over K samples of p(x, z) / q(z | x): a tighter bound, exact as K grows (Burda et al. 2016).",
    ),
    "importance_samples": Definition(
        "K", "whole", "samples", "Samples of the importance-weighted bound, per sequence."
    ),
    "iw_ppl": Definition(
        "Perplexity per token, IW", "decimal", "", f"exp of the importance-weighted NLL per token, {_BELOW}."
    ),
    "iw_ppl_per_word": Definition(
        "Perplexity per word, IW",
        "decimal",
        "",
        "exp of the importance-weighted NLL per word, ends of sequence counted.",
    ),
    "active_units": Definition(
        "Active units",
        "whole",
        "latent dimensions",
        "Dimensions whose posterior mean has a variance of at least 0.01 over the text (Burda et al. 2016).",
    ),
    "mutual_information_nats": Definition(
        "Mutual information",
        "decimal",
        "nats",
        "Of text and latent under q: E log q(z | x) - E log q(z), q(z) the mean of N posteriors; at most log N.",
    ),
    "mutual_information_latents": Definition(
        "N", "whole", "latents", "Posteriors in the estimate of mutual information."
    ),
    "mutual_information_ceiling_nats": Definition(
        "log N", "decimal", "nats", "What mutual information can reach at most."
    ),
    "sequences": Definition("Sequences", "whole", "", "Sequences scored."),
    "tokens": Definition(
        "Tokens", "whole", "", "Tokens predicted, the end of each sequence counted, its beginning not."
    ),
    "words": Definition("Words", "whole", "", "What white space separates, and the end of each sequence."),
}

RECONSTRUCTION = {
    "bleu": Definition(
        "BLEU",
        "decimal",
        "of 100",
        "BLEU-4 of all reconstructions together against their texts, by sacrebleu, higher is better.",
    ),
    "bleu_signature": Definition(
        "sacrebleu signature",
        "text",
        "",
        "How BLEU was computed; tok:none is tokenised text as it is, tok:13a decoded text.",
    ),
    "token_accuracy": Definition(
        "Token accuracy",
        "percent",
        "",
        "Share of positions with the right token, of those of the longer of both, end of sequence included.",
    ),
    "exact_match": Definition("Exact matches", "percent", "", "Share of texts that come back without any difference."),
}

SAMPLE_QUALITY = {
    "forward_ppl_per_token": Definition(
        "Forward perplexity per token",
        "decimal",
        "",
        "Of the samples under a language model of the training text: low is fluent.",
    ),
    "forward_ppl_per_word": Definition(
        "Forward perplexity per word", "decimal", "", "The same, shared over words and ends of sequence."
    ),
    "reverse_ppl_per_token": Definition(
        "Reverse perplexity per token",
        "decimal",
        "",
        "Of held-out text under a language model of the samples: low only where they cover the text. "
        "Real text: a model of as many training sequences.",
    ),
    "reverse_ppl_per_word": Definition(
        "Reverse perplexity per word", "decimal", "", "The same, shared over words and ends of sequence."
    ),
    "self_bleu": Definition(
        "Self-BLEU",
        "decimal",
        "of 100",
        "Mean BLEU-4 of each sample with the others (1,000 in all at most) as references: low is varied.",
    ),
    "distinct_1": Definition("Distinct words", "percent", "", "Different words over all words."),
    "distinct_2": Definition(
        "Distinct bigrams", "percent", "", "Different pairs of neighbouring words over all pairs."
    ),
    "distinct_3": Definition(
        "Distinct trigrams", "percent", "", "Different triples of neighbouring words over all triples."
    ),
    "verbatim_fraction": Definition("Copies", "percent", "", "Share of samples that are a whole training sequence."),
    "tokens_per_seq": Definition("Mean length", "decimal", "tokens", "The end of sequence counted."),
    "finished_fraction": Definition("Finished", "percent", "", "Share of samples that reach their end of sequence."),
    "sequences": Definition(
        "Sequences", "whole", "", "In each column as many: all of these values depend on the number."
    ),
}

SMOOTHNESS = {
    "neighbour_distance": Definition(
        "Step size",
        "fine",
        "",
        "Mean edit distance in tokens of neighbouring texts, over the length of the longer: 0 to 1.",
    ),
    "changed_fraction": Definition(
        "Steps that change the text", "percent", "", "Share of steps at which the text changes."
    ),
    "path_length_ratio": Definition(
        "Length of the path",
        "fine",
        "times the way",
        "Sum of the edit distances of neighbours over that of the two ends; 1 is without detours.",
    ),
    "order_correlation": Definition(
        "Order",
        "fine",
        "",
        "Mean rank correlation of position and edit distance from each end; 1 is always away from A, towards B.",
    ),
    "nll_bump": Definition(
        "Bump in the middle",
        "fine",
        "nats per token",
        "-log p(text | z) per token of the middle's text, less that of the ends'; above 0: less sure there.",
    ),
    "pairs": Definition("Pairs", "whole", "", "Paths between two held-out texts."),
    "steps": Definition("Steps", "whole", "", "Equal steps of each path."),
}

BASELINES = {
    "ppl_per_token": Definition("Per token", "decimal", "", "exp of the NLL over tokens, ends of sequence counted."),
    "ppl_per_word": Definition("Per word", "decimal", "", "exp of the NLL over words, ends of sequence counted."),
    "nll_per_seq": Definition("NLL", "decimal", _NATS, "-log p(x), mean over sequences."),
}
