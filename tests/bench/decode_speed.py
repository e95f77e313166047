"""How fast texts are decoded: the engine with 64 requests, one request at a time, and `generate` of transformers.

    python tests/bench/decode_speed.py [--model lstm|transformer] [--rounds 5] [--precision bf16|fp32|auto] [--profile]
                                       [--http-seconds 8]

With `--http-seconds` above 0 the service is measured, too (http_speed.py), in the precision that it chooses itself.

All write the same number of tokens a row, by sampling at temperature 1 from random weights: the end of the sequence
is banned, so that no contender gains by ending early. Contenders take turns; the table has medians; the last line is
JSON. The loop that decodes one at a time is the best that could be written: the model's own step on one row, weights
cast once, no log-probabilities, one softmax and one inverse CDF a token. Transformers' model is a GPT-2 of the same
width, depth, heads and vocabulary, batched by hand at 64 (for the LSTM: one of about as many parameters).
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from http_speed import measure

from vae_dist.config.model_schema import LstmConfig, ModelConfig, TransformerConfig
from vae_dist.data.text.special_ids import BOS_ID, EOS_ID
from vae_dist.decode.choose import at_uniform
from vae_dist.decode.engine import DecodeEngine, cast_for_decoding, requests_of
from vae_dist.decode.request import Decoding
from vae_dist.model.precision import autocast_dtype
from vae_dist.model.vae import TextVAE, count_parameters

VOCAB, SLOTS = 10_002, 64


def build(kind: str) -> TextVAE:
    """configs/ptb.yaml's LSTM, or six layers of width 512."""
    lstm = LstmConfig(hidden_dim=256), LstmConfig(hidden_dim=512)
    part = TransformerConfig(hidden_dim=512, num_layers=6, num_heads=8)
    encoder, decoder = lstm if kind == "lstm" else (LstmConfig(hidden_dim=256), part)
    width = 256 if kind == "lstm" else 512
    torch.manual_seed(0)
    vae = TextVAE(ModelConfig(embedding_dim=width, encoder=encoder, decoder=decoder, latent_dim=32), VOCAB).eval()
    vae.output_bias.data[EOS_ID] = -1e4
    return vae


def engine_of(vae: TextVAE, length: int, dtype: torch.dtype | None) -> Callable[[], int]:
    """64 requests at all times: one that has ended is followed by another."""
    engine = DecodeEngine(vae, length, slots=SLOTS, dtype=dtype)
    print(f"  shapes: rows {engine.row_shapes}, spans {engine.span_shapes}")
    generator = torch.Generator().manual_seed(0)

    def ask() -> None:
        # Limits differ, as lengths of sentences do, so that requests join and leave at different times.
        limit = int(torch.randint(length // 2, length + 1, (), generator=generator))
        z_1D = torch.randn(1, vae.latent_dim, generator=generator)
        engine.submit(requests_of(z_1D, [limit], Decoding(max_tokens=limit))[0])

    for _ in range(SLOTS):
        ask()

    def run() -> int:
        tokens = 0
        for _ in range(2 * length):
            emitted = engine.step()
            tokens += len(emitted)
            for one in emitted:
                if one.finish is not None:
                    ask()
        return tokens

    return run


@torch.inference_mode()
def one_at_a_time(vae: TextVAE, length: int, dtype: torch.dtype | None) -> Callable[[], int]:
    """Three texts, one after the other."""
    model = cast_for_decoding(vae, dtype)

    @torch.inference_mode()
    def run() -> int:
        for _ in range(3):
            z_1D = torch.randn(1, vae.latent_dim).to(model.output_bias.dtype)
            state, token_1 = model.decoder.new_state(1, length), torch.tensor([BOS_ID])
            position_1 = torch.full((1,), model.decoder.first_position)
            uniform_T1 = torch.rand(length + 1, 1)
            for time_ in range(model.decoder.first_position, length):
                logits_1V = model.step(token_1, z_1D, state, position_1, max(1, time_ + 1))
                position_1 = position_1 + 1
                if time_ >= 0:
                    token_1 = at_uniform(torch.softmax(logits_1V, -1), uniform_T1[time_])
                    if int(token_1) == EOS_ID:
                        break
        return 3 * length

    return run


def transformers_of(kind: str, length: int, dtype: torch.dtype | None) -> tuple[Any, Callable[[], int]]:
    """A GPT-2 that writes 64 rows at once."""
    import transformers

    layers, width, heads = (6, 512, 8) if kind == "transformer" else (2, 256, 4)
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=width, n_layer=layers, n_head=heads, n_positions=max(128, length + 1),
        bos_token_id=BOS_ID, eos_token_id=EOS_ID, pad_token_id=0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).eval().to(dtype or torch.float32)
    start = torch.full((SLOTS, 1), BOS_ID)

    @torch.inference_mode()
    def run() -> int:
        with torch.inference_mode():
            rows = model.generate(
                start, attention_mask=torch.ones_like(start), do_sample=True, top_k=0, top_p=1.0,
                max_new_tokens=length, min_new_tokens=length,
            )  # fmt: skip
        return int((rows.shape[1] - 1) * SLOTS)

    return model, run


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", choices=("lstm", "transformer"), nargs="+", default=["lstm", "transformer"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--length", type=int, default=40)
    parser.add_argument("--precision", choices=("auto", "bf16", "fp32"), default="auto")
    parser.add_argument("--profile", action="store_true")
    parser.add_argument("--http-seconds", type=float, default=8.0, help="of each round of the service; 0: without it")
    args = parser.parse_args()
    dtype = autocast_dtype(args.precision, torch.device("cpu"))
    results: dict[str, Any] = {"precision": "bf16" if dtype else "fp32", "threads": torch.get_num_threads()}
    for kind in args.model:
        vae = build(kind)
        print(f"{kind}: {count_parameters(vae.decoder):,} parameters in the decoder")
        contenders = {
            "engine": engine_of(vae, args.length, dtype),
            "one at a time": one_at_a_time(vae, args.length, dtype),
        }
        if args.profile:
            with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
                contenders["engine"]()
            print(profile.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=40))
            continue
        theirs, contenders["transformers"] = transformers_of(kind, args.length, dtype)
        print(f"  GPT-2 of transformers: {sum(p.numel() for p in theirs.parameters()):,} parameters")
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for round_ in range(args.rounds + 1):
            for name, run in contenders.items():
                started = time.perf_counter()
                tokens = run()
                if round_:
                    speeds[name].append(tokens / (time.perf_counter() - started))
        median = {name: statistics.median(values) for name, values in speeds.items()}
        for name, values in speeds.items():
            print(f"  {name:14} {median[name]:9.0f} tokens/s   ({min(values):.0f} to {max(values):.0f})")
        results[kind] = {
            "engine_tokens_per_second": round(median["engine"]),
            "engine_vs_sequential": round(median["engine"] / median["one at a time"], 2),
            "engine_vs_hf_generate": round(median["engine"] / median["transformers"], 2),
        }
        if args.http_seconds:
            engine = engine_of(vae, args.length, autocast_dtype("auto", torch.device("cpu")))
            results[kind] |= measure(
                vae, engine, args.length, SLOTS, args.rounds, args.http_seconds, torch.get_num_threads()
            )
    print(json.dumps(results))


if __name__ == "__main__":
    main()
