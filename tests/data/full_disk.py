"""A disk without room."""

import errno
import io


class Full(io.RawIOBase):
    """A file on a disk without room."""

    def writable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        return offset

    def truncate(self, size: int | None = None) -> int:
        return 0

    def write(self, content: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    def readable(self) -> bool:
        return True

    def buffered(self) -> io.BufferedRandom:
        return io.BufferedRandom(self)
