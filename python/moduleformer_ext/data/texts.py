"""Texts that wait on disk until they are tokenised: what they take of memory does not grow with them."""

from __future__ import annotations

import hashlib
import mmap
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moduleformer_ext.files import writing

PIECE = 1 << 18
"""Bytes of a text that are read at a time, up to the next end of a line."""

_END_OF_LINE = re.compile(rb"(?<=[!-~])\n(?=[!-~])")
"""A single one between letters, digits and signs: tokenizers that part words there treat it alike with and without
what follows, unlike the first of two or one before a space.
"""


class TextStore:
    """Texts end to end, as UTF-8, in a nameless file that is gone when they are.

    Args:
        folder: on the disk that shall hold it; None: where Python has its temporary files (`TMPDIR`).
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder or Path(tempfile.gettempdir())
        self._file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (as long as there is a text)
        self._size = 0
        self._mapped: bytes | mmap.mmap = b""

    def add(self, pieces: Iterable[str]) -> StoredText | None:
        """Write a text that comes in pieces; None for a blank one. It is not kept if they end in an error."""
        start, blank = self._size, True
        try:
            for piece in pieces:
                blank = blank and not piece.strip()
                with writing(self._folder):
                    self._size += self._file.write(piece.encode())
        except BaseException:
            blank = True
            raise
        finally:
            if blank:
                self._size = start
                with writing(self._folder):  # seeking writes what is left in the buffer
                    self._file.seek(start)
                    self._file.truncate()
        return None if blank else StoredText(self, start, self._size)

    @property
    def content(self) -> bytes | mmap.mmap:
        """All of it, mapped into memory."""
        if len(self._mapped) != self._size:
            with writing(self._folder):
                self._file.flush()
            self._mapped = mmap.mmap(self._file.fileno(), self._size, access=mmap.ACCESS_READ)
        return self._mapped


@dataclass(frozen=True, slots=True)
class StoredText:
    """A text as UTF-8, from byte `start` to `stop` of what a store or some bytes hold."""

    store: TextStore | bytes
    start: int
    stop: int

    @classmethod
    def of(cls, text: str) -> StoredText:
        """A text that is in memory."""
        content = text.encode()
        return cls(content, 0, len(content))

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return self._content[self.start : self.stop].decode()

    @property
    def _content(self) -> bytes | mmap.mmap:
        return self.store if isinstance(self.store, bytes) else self.store.content

    def pieces(self, size: int | None = PIECE) -> Iterator[str]:
        """The text in pieces, at least one, that end with a line some `size` bytes on; None: in one piece."""
        content, start = self._content, self.start
        while True:
            end = None if size is None else _END_OF_LINE.search(content, start + size, self.stop)
            stop = self.stop if end is None else end.end()
            yield content[start:stop].decode()
            if (start := stop) == self.stop:
                return

    def is_blank(self) -> bool:
        """Whether there is nothing to read in it."""
        return not any(piece.strip() for piece in self.pieces())

    def digest(self) -> bytes:
        """Alike for texts that are alike."""
        digest = hashlib.blake2b(digest_size=16)
        for start in range(self.start, self.stop, PIECE):
            digest.update(self._content[start : min(start + PIECE, self.stop)])
        return digest.digest()

    def cut(self, fraction: float) -> tuple[StoredText, StoredText]:
        """In two, of which the first has about that part: at the end of a line before, else at a space, else there."""
        content, aim = self._content, self.start + round(len(self) * fraction)
        while self.start < aim < self.stop and content[aim] & 0xC0 == 0x80:  # within a character
            aim -= 1
        ends = (content.rfind(mark, self.start, aim) + 1 for mark in (b"\n", b" "))
        at = next((end for end in ends if end), aim)
        return StoredText(self.store, self.start, at), StoredText(self.store, at, self.stop)
