"""Ray as every job uses it: how a driver connects and is stopped, functions over many arguments, errors as they were.

A module of its own because all jobs need the same connection, and because what checks files should run on a cluster
and, where there is little to do or a test looks on, in one process: both are a `Spread`.
"""

import contextlib
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from types import FrameType
from typing import Any

import ray
import ray.exceptions

from pipeline.errors import LabelBucketError
from pipeline.tasks import FILE_TASK, in_order

_log = logging.getLogger("label_bucket")
KEEP_IDLE_WORKERS_MS = "60000"
"""How long the engine keeps worker processes of which it has more than CPUs; its default is one second. Tasks that take
a fraction of a CPU are more than CPUs, and those that commit come every few seconds: on 2 cores each unit then paid for
new processes and their imports, 2 of 5.9 ms of processor time per image. A setting of nodes: here it reaches only a Ray
of this process's own; the image of `infra/` has it too."""
_FIRST_QUESTION = "/ray.rpc.NodeInfoGcsService/GetClusterId"  # of every client, whatever it wants
_KNOCK_TIMEOUT_S = 5.0
Spread = Callable[[Callable[..., Any], Iterable[tuple[Any, ...]]], Iterator[Any]]
"""`itertools.starmap`, or something that gives the same from elsewhere."""


def start() -> None:
    """Connect to the cluster of RAY_ADDRESS, else start a Ray of this process's own; SIGTERM becomes
    KeyboardInterrupt."""
    # The engine's core prints an error for every actor pool (ray-project/ray#53727) that means nothing here.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    os.environ.setdefault("RAY_idle_worker_killing_time_threshold_ms", KEEP_IDLE_WORKERS_MS)
    import ray.data

    if not ray.is_initialized():
        # A bare ray.init() would join whatever cluster runs on this machine.
        address = os.environ.get("RAY_ADDRESS", "local")
        is_own = address == "local"
        ray.init(
            address=address,
            logging_level=logging.ERROR,
            log_to_driver=False,
            include_dashboard=False if is_own else None,
        )
        if not is_own:
            _warn_of_an_open_cluster(ray.get_runtime_context().gcs_address)
    # What the engine says stays in its log folder; on the console only this job speaks. Also where a run ends with an
    # error of ours: the engine prints 100 lines of its own stack and asks to open an issue with its project.
    for handler in logging.getLogger("ray.data").handlers:
        if isinstance(handler, logging.StreamHandler):
            handler.setLevel(logging.CRITICAL)
    # After ray.init, which installs its own handler. `ray job stop` sends SIGTERM, and SIGKILL three seconds later.
    signal.signal(signal.SIGTERM, _stop)


def _warn_of_an_open_cluster(gcs_address: str) -> None:
    """One line about a cluster elsewhere that lets everybody in."""
    if not _is_on_this_machine_alone(gcs_address) and _lets_in_without_token(gcs_address, os.environ):
        _log.warning(
            "the Ray cluster at %s asks for no token: whoever reaches it runs code on it (CVE-2023-48022);"
            " set RAY_AUTH_MODE=token on all its nodes",
            gcs_address,
        )


def _is_on_this_machine_alone(gcs_address: str) -> bool:
    host = gcs_address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _lets_in_without_token(gcs_address: str, environment: Mapping[str, str]) -> bool:
    """Asked without one, because a cluster that wants none lets in a client that has one.

    Where the answer is neither yes nor no (TLS, another version), it is open if this process, which is in, has none.
    """
    import grpc  # comes with ray[default]

    with grpc.insecure_channel(gcs_address, [("grpc.enable_http_proxy", 0)]) as channel:
        try:
            channel.unary_unary(_FIRST_QUESTION)(b"", timeout=_KNOCK_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return False
            return environment.get("RAY_AUTH_MODE", "").lower() != "token"
    return True


def _stop(_signal: int, _frame: FrameType | None) -> None:
    # An exception that is raised while a destructor runs is swallowed, so it is raised again until it has arrived.
    signal.signal(signal.SIGALRM, _stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    handled = sys.exception()
    while handled is not None:
        if isinstance(handled, KeyboardInterrupt):
            return
        handled = handled.__context__
    raise KeyboardInterrupt


def quieten() -> None:
    """Let no library tell about every request it makes."""
    for name in ("botocore", "aiobotocore", "httpx", "huggingface_hub", "filelock", "fsspec", "s3fs", "gcsfs", "azure"):
        logging.getLogger(name).setLevel(logging.WARNING)


def on_cluster(function: Callable[..., Any], arguments: Iterable[tuple[Any, ...]]) -> Iterator[Any]:
    """`itertools.starmap` with a task for each tuple of arguments: results in order.

    `function` is one of a module, and is run again where a worker died.
    """
    remote = ray.remote(function).options(**FILE_TASK)
    return in_order(lambda each: remote.remote(*each), arguments)


@contextlib.contextmanager
def errors() -> Iterator[None]:
    """Our own errors as they were raised, out of the engine's wrapping."""
    try:
        yield
    except ray.exceptions.RayError as error:
        ours = _find_ours(error)
        if ours is None:
            raise
        raise ours from None


def _find_ours(error: BaseException | None) -> LabelBucketError | None:
    while error is not None:
        if isinstance(error, LabelBucketError) and not isinstance(error, ray.exceptions.RayError):
            return error
        error = getattr(error, "cause", None) or error.__cause__
    return None
