"""Two nights of a bucket that exists only as arithmetic: object number n is computed from n, whatever their number.

    photos/2015/000/img_0000000000.jpg      250,000 objects a folder, in byte order of n; etags of 32 hex digits

Of every 10,000 numbers some are new in the second night, some gone, and some changed, spread evenly over all keys: so
every LIST page, every range and every file of the catalog has some of each, which is the worst that a churn can do.
"""

import bisect
import multiprocessing
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from multiprocessing.connection import Connection
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
import pyarrow as pa

from pipeline import schema, store
from pipeline.storage import ObjectInfo

BUCKET, PREFIX = "synthetic", "in/"
PERIOD = 10_000
_OBJECTS_PER_FOLDER = 250_000
_OBJECTS_PER_MINUTE = 64
_BEGIN_S = int(datetime(2015, 1, 1, tzinfo=UTC).timestamp())
_NIGHT_S = 10**8
"""A changed object is so much younger."""
_LAST = "\U0010ffff"


@dataclass(kw_only=True)
class Bucket:
    """The objects of one night, as a Source that can only be listed. Memory and time are those of the pages asked for.

    `changed`, `new` and `gone` are numbers out of each PERIOD; `night` is 1 or 2.
    """

    num_keys: int
    night: int
    changed: int = 40
    new: int = 40
    gone: int = 20
    root: str = f"s3://{BUCKET}/{PREFIX}".rstrip("/")
    url: str = root
    can_seek: bool = True
    num_requests: int = field(default=0, compare=False)
    """LIST requests that S3 would have answered."""

    def list_pages(self, prefix: str = "", start_after: str = "") -> Iterator[list[ObjectInfo]]:
        """See Store. Numbers are found by bisection, so that a listing starts anywhere at once."""
        begin = bisect.bisect_left(range(self.num_keys), prefix, key=key_of)
        if start_after:
            begin = max(begin, self.number_after(start_after))
        end = self.number_after(prefix + _LAST)
        self.num_requests += 1
        while begin < end:
            # At most a tenth of any thousand neighbours is absent.
            found = self.existing(begin, min(end, begin + 2 * store.PAGE_OBJECTS))[: store.PAGE_OBJECTS]
            begin = int(found[-1]) + 1 if len(found) == store.PAGE_OBJECTS else end
            if len(found):
                yield self.infos(found)
                self.num_requests += begin < end

    def number_after(self, key: str) -> int:
        """The first number whose key is greater than this one, by bisection."""
        return bisect.bisect_right(range(self.num_keys), key, key=key_of)

    def existing(self, begin: int, end: int) -> Any:
        """The numbers from `begin` up to `end` whose objects exist this night, as int64."""
        numbers = np.arange(begin, end, dtype=np.int64)
        place = _place(numbers) - self.changed
        absent = (place >= 0) & (place < self.new)
        if self.night == 2:
            absent = (place >= self.new) & (place < self.new + self.gone)
        return numbers[~absent]

    def infos(self, numbers: Any) -> list[ObjectInfo]:
        """These objects as a listing has them."""
        keys, etags, sizes, modified_s = self._columns(numbers)
        times = {second: datetime.fromtimestamp(second, UTC) for second in np.unique(modified_s).tolist()}
        return [
            ObjectInfo(key, size, etag, times[second], "STANDARD")
            for key, size, etag, second in zip(keys, sizes.tolist(), etags, modified_s.tolist(), strict=True)
        ]

    def catalog_rows(self, begin: int, end: int) -> pa.Table:
        """What the catalog knows after this night of the numbers from `begin` up to `end`: all have a label."""
        numbers = self.existing(begin, end)
        keys, etags, sizes, modified_s = self._columns(numbers)
        modified = pa.array(modified_s * 10**6, schema.CATALOG.field("last_modified").type)
        kinds, seqs = pa.nulls(len(numbers), pa.string()), pa.repeat(pa.scalar(1, pa.int64()), len(numbers))
        return pa.table([keys, etags, sizes, modified, kinds, seqs], schema=schema.CATALOG)

    def _columns(self, numbers: Any) -> tuple[list[str], list[str], Any, Any]:
        is_changed = (_place(numbers) < self.changed) & (self.night == 2)
        mixed = _mixed(numbers.astype(np.uint64) * np.uint64(2) + is_changed)
        digits = np.stack([mixed, _mixed(mixed)], axis=1).tobytes().hex()
        folders = {day: _folder(day) for day in np.unique(numbers // _OBJECTS_PER_FOLDER).tolist()}
        return (
            [f"{folders[number // _OBJECTS_PER_FOLDER]}{number:010d}.jpg" for number in numbers.tolist()],
            [digits[start : start + 32] for start in range(0, len(digits), 32)],
            (mixed % np.uint64(200_000)).astype(np.int64) + 20_000,
            _BEGIN_S + numbers // _OBJECTS_PER_MINUTE * 60 + is_changed * _NIGHT_S,
        )

    def count(self, first: int, last: int) -> int:
        """How many of all numbers have a place from `first` up to `last` in their period."""
        full, rest = divmod(self.num_keys, PERIOD)
        in_rest = _place(np.arange(rest, dtype=np.int64))
        return full * (last - first) + int(((in_rest >= first) & (in_rest < last)).sum())

    def expected_counts(self) -> dict[str, int]:
        """The counts that the plan of the second night must have, from the numbers alone."""
        changed = self.count(0, self.changed)
        new = self.count(self.changed, self.changed + self.new)
        gone = self.count(self.changed + self.new, self.changed + self.new + self.gone)
        return {
            "listed": self.num_keys - gone,
            "filtered": 0,
            "unchanged": self.num_keys - gone - changed - new,
            "planned": changed + new,
            "known": self.num_keys - gone - new,
            "kept": 0,
            "deleted": gone,
        }

    def get(self, key: str, **_: Any) -> bytes:
        """Nothing can be read."""
        raise NotImplementedError


def key_of(number: int) -> str:
    """The key of an object, whether it exists or not."""
    return f"{_folder(number // _OBJECTS_PER_FOLDER)}{number:010d}.jpg"


def _folder(day: int) -> str:
    return f"photos/{2015 + day // 365}/{day % 365:03d}/img_"


def _place(numbers: Any) -> Any:
    """A permutation of each PERIOD, so that those that change do not stand together."""
    return numbers * 7919 % PERIOD


def _mixed(values: Any) -> Any:
    """splitmix64 of uint64."""
    values = (values + np.uint64(0x9E3779B97F4A7C15)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


# --- the same bucket behind HTTP ----------------------------------------------------------------------------------


@contextmanager
def serve(bucket: Bucket) -> Iterator[str]:
    """The URL of a server, in a process of its own, that answers ListObjectsV2 for `bucket` as S3 does."""
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_serve, args=(bucket, theirs), daemon=True)
    process.start()
    try:
        yield f"http://127.0.0.1:{ours.recv()}"
    finally:
        process.terminate()
        process.join()


def _serve(bucket: Bucket, pipe: Connection) -> None:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def do_GET(self) -> None:
            asked = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(self.path).query))
            after = asked.get("continuation-token", asked.get("start-after", "")).removeprefix(PREFIX)
            data = page_xml(next(bucket.list_pages(asked["prefix"].removeprefix(PREFIX), after), [])).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/xml")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        pipe.send(server.server_port)
        server.serve_forever()


def page_xml(page: list[ObjectInfo]) -> str:
    """A page as S3 answers ListObjectsV2 with `encoding-type=url`; after a full one more may follow."""
    items = "".join(
        f"<Contents><Key>{urllib.parse.quote(PREFIX + info.key)}</Key>"
        f"<LastModified>{info.last_modified:%Y-%m-%dT%H:%M:%S.000Z}</LastModified>"
        f"<ETag>&quot;{info.etag}&quot;</ETag><Size>{info.size_bytes}</Size>"
        f"<StorageClass>{info.storage_class}</StorageClass></Contents>"
        for info in page
    )
    is_full = len(page) == store.PAGE_OBJECTS
    more = f"<NextContinuationToken>{escape(PREFIX + page[-1].key)}</NextContinuationToken>" if is_full else ""
    return (
        '<?xml version="1.0" encoding="UTF-8"?>\n<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
        f"<Name>{BUCKET}</Name><Prefix>{PREFIX}</Prefix><MaxKeys>{store.PAGE_OBJECTS}</MaxKeys>"
        f"<EncodingType>url</EncodingType><KeyCount>{len(page)}</KeyCount>"
        f"<IsTruncated>{str(is_full).lower()}</IsTruncated>{more}{items}</ListBucketResult>"
    )
