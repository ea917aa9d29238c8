"""An object as a file that can be read anywhere, a range at a time: what readers of tar and Parquet ask for.

A module of its own because it is where a few bytes here and there become requests.
"""

import io
from typing import TYPE_CHECKING

from pipeline.store import ObjectInfo, Store

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer


class RangeFile(io.RawIOBase):
    """The object as it was listed; reading it raises ChangedError once it is another one. Holds nothing in memory."""

    def __init__(self, store: Store, listed: ObjectInfo, deadline_s: float) -> None:
        super().__init__()
        self._store, self._listed, self._deadline_s = store, listed, deadline_s
        self._place = 0

    def readable(self) -> bool:
        """See io."""
        return True

    def seekable(self) -> bool:
        """See io."""
        return True

    def tell(self) -> int:
        """See io."""
        return self._place

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """See io."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._place, io.SEEK_END: self._listed.size_bytes}[whence]
        self._place = max(0, base + offset)
        return self._place

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """See io. One request."""
        view = memoryview(buffer).cast("B")
        end = min(self._place + len(view), self._listed.size_bytes)
        if end <= self._place:
            return 0
        data = self._store.get_range(self._listed, self._place, end, deadline_s=self._deadline_s)
        view[: len(data)] = data
        self._place = end
        return len(data)
