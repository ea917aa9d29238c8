"""The exceptions, one class per decision a caller can take, and the kinds of failure an image can have.

    LabelBucketError            one line for the operator; `exit_code` is the process's
    ├── ConfigError        2    the request cannot work as given: change the command
    ├── SourceError        3    the source or the output cannot be read or written: change permissions or paths
    │   ├── AbsentError         no such object, folder or bucket
    │   ├── ForbiddenError      this identity may not do that
    │   ├── ChangedError        the object is not the one that was listed
    │   ├── UnstableError       bytes or listings contradict themselves, also when read again
    │   └── UnavailableError    no usable answer until the deadline: run the same command again, it resumes
    ├── BudgetError        4    too many images failed: look at them, or raise --max-failed-fraction and run again
    └── ConflictError      5    another run, another schema, or sums that do not add up: nothing was published
    ImageError                  one image's outcome: becomes a row in failures/, never ends a job

A module of its own because every other one imports it, and because the policy (who stops, who retries, who gets a row)
should be readable in one place.
"""

from enum import StrEnum

STOPPED = 143
"""Exit code of a run that was interrupted or terminated (128 + SIGTERM, as a shell says it); it can be resumed."""


class LabelBucketError(Exception):
    """An end of the run that the operator can act on; `str(error)` is one line: expected, found, where, what to do."""

    exit_code = 1


class ConfigError(LabelBucketError):
    """The request cannot work as given."""

    exit_code = 2


class SourceError(LabelBucketError):
    """The source or the output cannot be listed, read or written as this identity."""

    exit_code = 3


class AbsentError(SourceError):
    """No such object, folder or bucket."""


class ForbiddenError(SourceError):
    """This identity may not do that, or there are no credentials."""


class ChangedError(SourceError):
    """The object is not the one that was listed: another etag, or another size, time or inode of a local file."""


class UnstableError(SourceError):
    """What arrives contradicts itself, also when read again: bytes their listed length or the MD5 in the etag, a
    listing its order or a second look at it.
    """


class UnavailableError(SourceError):
    """Storage gave no usable answer until the deadline. What was done is kept; the same command resumes."""


class BudgetError(LabelBucketError):
    """More images failed than the failure budget allows. Parts are kept, so a larger budget continues."""

    exit_code = 4


class ConflictError(LabelBucketError):
    """The output is in a state this run must not write into, or the sums do not add up. Nothing was published."""

    exit_code = 5


class FailureKind(StrEnum):
    """Why an object has no label. `TRANSIENT` ones are tried again the next night."""

    BAD_URI = "bad_uri"
    EMPTY = "empty"
    TOO_LARGE = "too_large"
    MISSING = "missing"
    CHANGED = "changed"
    FORBIDDEN = "forbidden"
    ARCHIVED = "archived"
    NOT_AN_IMAGE = "not_an_image"
    UNSUPPORTED_FORMAT = "unsupported_format"
    TRUNCATED = "truncated"
    CORRUPT = "corrupt"
    BOMB_PIXELS = "bomb_pixels"
    BOMB_SCANS = "bomb_scans"
    BOMB_METADATA = "bomb_metadata"
    DECODE_TIMEOUT = "decode_timeout"
    DECODE_OOM = "decode_oom"
    DECODE_KILLED = "decode_killed"
    DECODE_CRASH = "decode_crash"
    UNSTABLE_BYTES = "unstable_bytes"
    UNAVAILABLE = "unavailable"
    MODEL_NONFINITE = "model_nonfinite"


TRANSIENT = frozenset(
    {
        FailureKind.MISSING,
        FailureKind.CHANGED,
        FailureKind.FORBIDDEN,
        FailureKind.DECODE_KILLED,
        FailureKind.UNSTABLE_BYTES,
        FailureKind.UNAVAILABLE,
    }
)


class ImageError(Exception):
    """One object's outcome other than a label.

    `kind` is what readers of failures/ group by, `stage` is `fetch`, `decode` or `label`, `str(error)` one line.
    """

    def __init__(self, kind: FailureKind, message: str, *, stage: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.stage = stage

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions pickle as class(*args); the keyword-only stage needs a function that passes it.
        return _image_error, (self.kind, str(self), self.stage)


def _image_error(kind: FailureKind, message: str, stage: str) -> ImageError:
    return ImageError(kind, message, stage=stage)
