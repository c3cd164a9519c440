import itertools
import math
from collections import Counter

import numpy as np
import numpy.typing as npt
import pytest

from moduleformer_ext.data import Bigram, Unigram, stream_bits

VOCAB = 13


def _streams() -> list[npt.NDArray[np.uint16]]:
    generator = np.random.default_rng(0)
    skewed = [np.minimum(generator.geometric(0.3, size) - 1, VOCAB - 2) for size in (200, 75)]
    return [stream.astype(np.uint16) for stream in skewed]  # token VOCAB - 1 is never seen


def _brute_unigram(streams: list[npt.NDArray[np.uint16]], token: int) -> float:
    counts = Counter(int(w) for stream in streams for w in stream[1:])
    total, seen = sum(counts.values()), len(counts)
    return (counts[token] + seen / VOCAB) / (total + seen)


def _brute_bigram(streams: list[npt.NDArray[np.uint16]], history: int, token: int) -> float:
    pairs = Counter((int(h), int(w)) for stream in streams for h, w in itertools.pairwise(stream))
    once = sum(1 for count in pairs.values() if count == 1)
    twice = sum(1 for count in pairs.values() if count == 2)
    discount = once / (once + 2 * twice)
    endings = {w for _, w in pairs}
    before = sum(1 for _, w in pairs if w == token)
    q = (before + len(endings) / VOCAB) / (len(pairs) + len(endings))
    total = sum(count for (h, _), count in pairs.items() if h == history)
    if total == 0:
        return q
    followers = sum(1 for h, _ in pairs if h == history)
    return (max(pairs[history, token] - discount, 0.0) + discount * followers * q) / total


def test_models_match_brute_force_and_sum_to_one() -> None:
    streams = _streams()
    unigram, bigram = Unigram(streams, VOCAB), Bigram(streams, VOCAB)
    tokens = np.arange(VOCAB)
    for history in range(VOCAB):
        context = np.full(VOCAB, history)
        for model, brute in (
            (unigram, [_brute_unigram(streams, token) for token in range(VOCAB)]),
            (bigram, [_brute_bigram(streams, history, token) for token in range(VOCAB)]),
        ):
            probability = model.probability(context, tokens)
            np.testing.assert_allclose(probability, brute, rtol=1e-12)
            assert probability.min() > 0
            assert probability.sum() == pytest.approx(1.0, abs=1e-12)


def test_no_bigram_crosses_streams() -> None:
    ones, twos = np.full(5, 1, dtype=np.uint16), np.full(5, 2, dtype=np.uint16)
    bigram = Bigram([ones, twos], 3)
    crossing = bigram.probability(np.array([1]), np.array([2]))[0]
    assert crossing == pytest.approx(0.5 * 1 / 4 * (1 + 2 / 3) / 4)  # only through q


def test_very_short_streams_stay_proper() -> None:
    bigram = Bigram([np.array([0, 1], dtype=np.uint16)], 2)
    assert bigram.probability(np.array([0, 0]), np.array([0, 1])).sum() == pytest.approx(1.0)


def test_stream_bits() -> None:
    streams = _streams()
    bigram = Bigram(streams, VOCAB)
    held_out = np.array([0, 1, 12, 3, 3], dtype=np.uint16)
    expected = -sum(math.log2(_brute_bigram(streams, int(h), int(w))) for h, w in itertools.pairwise(held_out))
    assert stream_bits(bigram, held_out) == pytest.approx(expected, rel=1e-12)
