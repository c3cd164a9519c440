"""Texts that wait on disk until they are tokenised, and the pieces, ending between words, in which they are read."""

from __future__ import annotations

import hashlib
import mmap
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from moduleformer_ext.files import writing

PIECE = 1 << 18
"""Bytes of a text that are read at a time, up to the next place where it may be cut."""

# What follows is surely no white space: neither what Unicode calls so nor what one program or another takes for it.
_INK = (
    rb"(?![\t-\r\x1c-\x20]|\xc2[\x85\xa0]|\xe1(?:\x9a\x80|\xa0\x8e)|\xe2(?:\x80[\x80-\x8f\xa8-\xaf]|\x81[\x9f\xa0])"
    rb"|\xe3\x80\x80|\xef\xbb\xbf)(?=[\x00-\xff])"
)
# A line ends here and did not begin or end with white space.
_AFTER_INK = (
    rb"(?<=\n)(?<![\t-\r\x1c-\x20]\n)(?<!\xc2[\x85\xa0]\n)(?<!\xe1\x9a\x80\n)(?<!\xe1\xa0\x8e\n)"
    rb"(?<!\xe2\x80[\x80-\x8f\xa8-\xaf]\n)(?<!\xe2\x81[\x9f\xa0]\n)(?<!\xe3\x80\x80\n)(?<!\xef\xbb\xbf\n)"
)
_KANA_OR_HAN = rb"(?<=\xe3\x81[\x81-\xbf]|\xe3\x82[\x80-\x8f]|[\xe5-\xe8][\x80-\xbf][\x80-\xbf])"

PLACES = {
    "before the last white space": rb"(?=(?:[\t\n\r ]|\xe3\x80\x80)" + _INK + rb")",
    "before the last white space, a blank": rb"(?= " + _INK + rb")",
    "before the last white space, a tab": rb"(?=\t" + _INK + rb")",
    "after the last white space, the end of a line": rb"(?<=\n)" + _INK,
    "between two lines": _AFTER_INK + _INK,
    "before a full stop or comma of Chinese or Japanese": _KANA_OR_HAN + rb"(?=\xe3\x80\x82|\xef\xbc\x8c)",
}
"""Where a text may be cut, as patterns in UTF-8, if its tokenizer parts words there (`tokenizer.where_to_cut`). That of
GPT-2 parts what is before a word from the last white space there, hence the first; those of Llama 3 and GPT-4 keep ends
of lines with what comes before, hence the others."""


def any_of(names: Iterable[str]) -> re.Pattern[bytes]:
    """The next of these `PLACES`."""
    return re.compile(rb"|".join(PLACES[name] for name in names))


BYTE_LEVEL = any_of(name for name in PLACES if not name.startswith("after"))
"""Where byte-level BPE as GPT-2 has it, and `train_tokenizer` makes it, parts words."""


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

    @contextmanager
    def copied(self, stream: BinaryIO) -> Iterator[BinaryIO]:
        """What a stream has, in a nameless file beside the texts, where it can be read from its end."""
        file = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115 (closing it may write, too)
        try:
            while chunk := stream.read(PIECE):
                with writing(self._folder):
                    file.write(chunk)
            with writing(self._folder):
                file.seek(0)
            yield file
        finally:
            with writing(self._folder):
                file.close()

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
    def of(cls, text: str | StoredText) -> StoredText:
        """A text that is in memory, or stored already."""
        if isinstance(text, StoredText):
            return text
        content = text.encode()
        return cls(content, 0, len(content))

    def __len__(self) -> int:
        return self.stop - self.start

    def __str__(self) -> str:
        return self._content[self.start : self.stop].decode()

    @property
    def _content(self) -> bytes | mmap.mmap:
        return self.store if isinstance(self.store, bytes) else self.store.content

    def pieces(self, places: re.Pattern[bytes] | None = BYTE_LEVEL, size: int = PIECE) -> Iterator[str]:
        """The text in pieces, at least one, each up to the first of `places` from `size` bytes on; None: in one."""
        content, start = self._content, self.start
        while True:
            place = places and places.search(content, start + size, self.stop)
            stop = place.start() if place else self.stop
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
