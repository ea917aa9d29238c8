#!/usr/bin/env python
"""Runs that are killed at random moments on storage that fails at random, for some minutes: each must publish the rows
of an undisturbed run. The seed of each round is printed before it; after a finding, --seed begins with that round again
(processes are as fast as they are, so its kills meet other moments). See --help.
"""

import argparse
import os
import random
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.update(RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=secrets.token_hex(32))  # read when it is imported

import checkpoints  # noqa: E402
import verifier  # noqa: E402
from cluster import Head, running_head, wait_until  # noqa: E402
from kills import DECODING, LABELING, PREPARING, WAVE, Kills, fill_with_pictures, is_dead, label_undisturbed  # noqa: E402
from servers import S3Server, Storm, serve_s3  # noqa: E402
from test_faults import GET_KINDS, PUT_KINDS  # noqa: E402
from verifier import Place, Reader  # noqa: E402

TITLES = {"child": DECODING, "worker": PREPARING, "actor": LABELING, "wave": WAVE}
MAX_KILLS = 10
MAX_PAUSE_S = 8.0
"""Between two kills at most: a run without any takes about 20 s."""
MAX_COMMANDS = MAX_KILLS + 5
"""A command may end with a clean error where storage fails it once too often, and is given again."""


def main() -> int:
    """Rounds until the time is over, at least one; 1 with the first round that has findings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="no round begins later (default 30)")
    parser.add_argument("--seed", type=int, default=None, help="of the first round; unset: a random one")
    parser.add_argument("--images", type=int, default=1000, help="in the bucket, in hundreds (default 1000)")
    arguments = parser.parse_args()
    seed = random.randrange(2**32) if arguments.seed is None else arguments.seed
    ends_s = time.monotonic() + 60 * arguments.minutes
    with (
        tempfile.TemporaryDirectory() as folder,
        serve_s3() as s3,
        running_head({**os.environ, **s3.canary_environment()}) as head,
    ):
        source = fill_with_pictures(s3, "soak", arguments.images, seed=11)
        model = checkpoints.write_small(Path(folder) / "model")
        undisturbed = label_undisturbed(head, source, model)
        while True:
            print(f"seed {seed}", flush=True)
            findings = run_round(head, s3, source, undisturbed, model, seed)
            if findings:
                print("\n".join(findings))
                return 1
            if time.monotonic() >= ends_s:
                return 0
            seed += 1


def run_round(head: Head, s3: S3Server, source: Place, undisturbed: Place, model: Path, seed: int) -> list[str]:
    """One output, begun and killed and begun again until it is published; the verifier's findings."""
    rng = random.Random(seed)
    output = Place(f"s3://{source.bucket}/{seed}", s3.client)
    options = ("--input", source.url, "--output", output.url, "--model", str(model), "--gpu-actors=1")
    storm = Storm(
        seed,
        {"GET": GET_KINDS, "PUT": PUT_KINDS},
        {"GET": rng.uniform(0, 0.1), "PUT": rng.uniform(0, 0.4)},
        re.compile(f"/{source.bucket}/(in|{seed})/"),
    )
    kills, kills_left, started_s = Kills(s3, source, output, undisturbed), rng.randint(1, MAX_KILLS), time.monotonic()
    s3.storm = storm
    try:
        with Reader(output, head.rss_bytes) as reader:
            for _ in range(MAX_COMMANDS):
                with head.start_label_bucket(*options, "--object-deadline-s=6") as driver:
                    while kills_left and not _ends_within(driver, rng.uniform(0, MAX_PAUSE_S)):
                        alive = {"driver": [driver.pid], **{what: head.processes(TITLES[what]) for what in TITLES}}
                        what = rng.choice([each for each in alive if alive[each]])
                        kills_left -= _kill(kills, what, rng.choice(alive[what]))
                    if driver.poll() == -signal.SIGKILL:
                        continue
                    _, printed = driver.communicate(timeout=300)
                if driver.returncode == 0:
                    break
                if "Traceback" in printed:
                    return [f"8 exit code {driver.returncode}: {printed[-3000:]}"]
    finally:
        s3.storm = None
    took_s = time.monotonic() - started_s
    num_faults = dict.fromkeys(("GET", "PUT"), 0)
    for (operation, _), number in storm.num_hits.items():
        num_faults[operation] += number
    kills.num_faults = storm.num_met("GET", kills.source_prefix)
    print(f"  {took_s:.0f} s, kills {dict(kills.counts)}, faults {num_faults}, peak {reader.peak_bytes:,}", flush=True)
    return [
        *verifier.check(output, source, exit_code=driver.returncode, like=undisturbed, secrets=s3.secrets),
        *verifier.check_labels(output, source, model, 10),
        *reader.findings,
        *kills.check_redone(),
        *verifier.check_logs(head.log_files(), s3.secrets),
        *([] if kills.counts else ["nothing was killed"]),
        *verifier.check_bounds(reader.peak_bytes, took_s, max_bytes=2**30, max_s=1500),
    ]


def _ends_within(driver: "subprocess.Popen[str]", pause_s: float) -> bool:
    try:
        driver.wait(pause_s)
    except subprocess.TimeoutExpired:
        return False
    return True


def _kill(kills: Kills, what: str, pid: int) -> bool:
    """At whatever moment this is; what was in flight then may be done again. False if the process was gone."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return False
    wait_until(lambda: is_dead(pid), 10)
    kills.lose()
    kills.counts[what] += 1
    return True


if __name__ == "__main__":
    sys.exit(main())
