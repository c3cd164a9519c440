"""Baselines: unigram and interpolated bigram models of token ids.

With c the counts in the training streams, N their sum, V the vocabulary size, B(h,.) and B(.,w) the numbers
of distinct bigrams that begin with h and that end with w, B that of all of them, and U the number of distinct
tokens seen after another:

    unigram (Witten-Bell)  p(w)   = (c(w) + U / V) / (N + U)
    bigram (Kneser-Ney)    p(w|h) = (max(c(h,w) - d, 0) + d B(h,.) q(w)) / c(h)
                           q(w)   = (B(.,w) + U / V) / (B + U)
                           d      = n1 / (n1 + 2 n2),   n_i the number of bigrams seen i times

An unseen context h gives q. Every distribution sums to 1 and no probability is 0.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np
import numpy.typing as npt

from moduleformer_ext.data.stream import TokenArray

FloatArray = npt.NDArray[np.float64]
IndexArray = npt.NDArray[np.int64]


class NGram(Protocol):
    """Gives the probability of each token after the one before it."""

    def probability(self, history: TokenArray | IndexArray, tokens: TokenArray | IndexArray) -> FloatArray:
        """p(tokens | history), elementwise over equal shapes."""
        ...


def _witten_bell(counts: IndexArray) -> FloatArray:
    """Interpolate the relative frequencies of counts [V] with the uniform distribution."""
    seen = max(int(np.count_nonzero(counts)), 1)
    return np.asarray((counts + seen / len(counts)) / (counts.sum() + seen))


class Unigram:
    """Token frequencies, smoothed."""

    def __init__(self, streams: Iterable[TokenArray], vocab_size: int) -> None:
        counts = np.zeros(vocab_size, dtype=np.int64)
        for tokens in streams:
            counts += np.bincount(tokens[1:], minlength=vocab_size)
        self._probability = _witten_bell(counts)

    def probability(self, history: TokenArray | IndexArray, tokens: TokenArray | IndexArray) -> FloatArray:
        """p(tokens), whatever the history."""
        return self._probability[tokens]


class Bigram:
    """Interpolated Kneser-Ney bigrams; the seen ones are kept as sorted codes h * V + w."""

    def __init__(self, streams: Iterable[TokenArray], vocab_size: int) -> None:
        self._vocab_size = vocab_size
        codes = np.concatenate([self._code(tokens[:-1], tokens[1:]) for tokens in streams])
        self._codes, counts = np.unique(codes, return_counts=True)
        once, twice = int(np.sum(counts == 1)), int(np.sum(counts == 2))
        # The estimate is undefined or 0 on very little text; any discount in (0, 1) keeps the sums at 1.
        discount = once / (once + 2 * twice) if once and twice else 0.5
        self._discounted = counts - discount
        contexts, words = np.divmod(self._codes, vocab_size)
        self._context_count = np.bincount(contexts, weights=counts, minlength=vocab_size)
        self._reserved = discount * np.bincount(contexts, minlength=vocab_size)
        self._continuation = _witten_bell(np.bincount(words, minlength=vocab_size))

    def _code(self, history: TokenArray | IndexArray, tokens: TokenArray | IndexArray) -> IndexArray:
        return np.asarray(history, dtype=np.int64) * self._vocab_size + np.asarray(tokens, dtype=np.int64)

    def probability(self, history: TokenArray | IndexArray, tokens: TokenArray | IndexArray) -> FloatArray:
        """p(tokens | history), elementwise."""
        code = self._code(history, tokens)
        at = np.minimum(np.searchsorted(self._codes, code), len(self._codes) - 1)
        discounted = np.where(self._codes[at] == code, self._discounted[at], 0.0)
        total = self._context_count[history]
        q = self._continuation[tokens]
        seen = total > 0
        safe_total = np.where(seen, total, 1.0)
        return np.where(seen, (discounted + self._reserved[history] * q) / safe_total, q)


def stream_bits(model: NGram, tokens: TokenArray) -> float:
    """Return the bits that `model` needs for tokens[1:]."""
    return float(-np.log2(model.probability(tokens[:-1], tokens[1:])).sum())
