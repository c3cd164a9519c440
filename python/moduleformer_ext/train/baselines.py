"""The n-gram models that a trained model has to beat."""

from collections.abc import Mapping

from moduleformer_ext.data import ALL, Bigram, Dataset, NGram, Unigram, stream_bits
from moduleformer_ext.display import table

BitsPerByte = dict[str, dict[str, float]]
"""Held-out bits per byte, by model and then by domain; `ALL` is all domains together."""
BIGRAM = "bigram (Kneser-Ney)"


def measure_baselines(dataset: Dataset) -> BitsPerByte:
    """Fit the n-gram models on the whole training split and measure them on the held-out one."""
    streams = [stream.tokens for stream in dataset.train.values()]
    vocab_size = dataset.tokenizer.get_vocab_size()
    models: dict[str, NGram] = {
        "unigram": Unigram(streams, vocab_size),
        BIGRAM: Bigram(streams, vocab_size),
    }
    sizes = {domain: stream.num_bytes for domain, stream in dataset.held_out.items()}
    return {
        name: per_byte({domain: stream_bits(model, s.tokens) for domain, s in dataset.held_out.items()}, sizes)
        for name, model in models.items()
    }


def per_byte(bits: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, float]:
    """Bits over bytes, by domain and over all."""
    return {
        **{domain: bits[domain] / sizes[domain] for domain in sizes},
        ALL: sum(bits.values()) / sum(sizes.values()),
    }


def format_table(results: BitsPerByte) -> str:
    """Lay out bits per byte as a table, one model a line."""
    domains = list(next(iter(results.values())))
    return table(["", *domains], [[name, *(f"{row[d]:.3f}" for d in domains)] for name, row in results.items()])
