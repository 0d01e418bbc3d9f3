"""A drill: two nodes train together, their link is cut in the middle, and the job recovers.

The nodes are network namespaces on this host, joined by a virtual cable; nothing leaves it. Each
has its own torchrun, started again when it gives up, as a cluster's scheduler does. Needs root and
iproute2; where that is missing it says so and ends with code 77.

    python benchmarks/two_machines.py

What it asserts: the job ends by itself, all meta-iterations are in the log once, and φ is that of
one process to 1e-10.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from koi import Koi, linear
from koi.models import sine_mlp
from koi.problems import Sines

ITERATIONS = 300
CUT_AT = 100
TIMEOUT = 10  # seconds until a node that hears nothing gives up
SECONDS = 400  # for everything
NOT_PERMITTED = 77


def learner() -> Koi:
    """Return a learner at its beginning, in float64 so that only mistakes show."""
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    settings: dict[str, Any] = {"num_iterations": ITERATIONS, "meta_batch_size": 4, "seed": 0}
    return Koi(sine_mlp(), 0.02, 5, meta_step_size=linear(1.0, 0.0), **settings)


def work(folder: str) -> None:
    """Be one of torchrun's processes; a pause makes the training last some seconds."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=TIMEOUT))
    pause = [lambda koi, record: time.sleep(0.03)]
    options: dict[str, Any] = {"checkpoint_every": 10, "resume": True, "log_dir": folder}
    learner().train(Sines(), callbacks=pause, checkpoint_dir=folder, **options)


class Nodes:
    """Two network namespaces joined by a cable, and a torchrun in each."""

    def __init__(self, folder: Path) -> None:
        self._names = [f"koi-{os.getpid()}-{node}" for node in "ab"]
        self._folder = folder
        self._running: list[subprocess.Popen[bytes] | None] = [None, None]
        self.starts = [0, 0]

    def __enter__(self) -> Nodes:
        first, second = self._names
        try:
            for name in self._names:
                ip("netns", "add", name)
            ip("link", "add", "koi0", "netns", first, "type", "veth",
               "peer", "name", "koi0", "netns", second)  # fmt: skip
            for number, name in enumerate(self._names, 1):
                ip("-n", name, "addr", "add", f"10.203.0.{number}/24", "dev", "koi0")
                for device in ("lo", "koi0"):
                    ip("-n", name, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._running:
            if process is not None and process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for name in self._names:
            end_all_in(name)
            subprocess.run(["ip", "netns", "del", name], check=False, stderr=subprocess.DEVNULL)

    def cable(self, state: str) -> None:
        """Plug the cable in ("up") or out ("down")."""
        ip("-n", self._names[0], "link", "set", "koi0", state)

    def look_after(self) -> bool:
        """Start what is not running and has not ended well; return whether all has."""
        done = True
        for node, process in enumerate(self._running):
            if process is None or process.poll() not in (None, 0):
                self._running[node] = self._start(node)
            running = self._running[node]
            done &= running is not None and running.poll() == 0
        return done

    def _start(self, node: int) -> subprocess.Popen[bytes]:
        self.starts[node] += 1
        host = f"is_host={'true' if node == 0 else 'false'}"
        command = [
            *("ip", "netns", "exec", self._names[node], sys.executable),
            *("-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"),
            *("--max-restarts=5", "--rdzv-backend=c10d", "--rdzv-endpoint=10.203.0.1:29400"),
            *(
                f"--rdzv-conf={host},timeout=120,read_timeout=20",
                f"--local-addr=10.203.0.{node + 1}",
            ),
            *(__file__, "work", str(self._folder)),
        ]
        quiet = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "koi0"}
        # without it a group made by hand finds the addresses of processes that have ended
        fresh = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with (self._folder / f"node-{node}.txt").open("ab") as output:
            return subprocess.Popen(
                command,
                env={**os.environ, **quiet, **fresh},
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def ip(*arguments: str) -> None:
    """Run iproute2."""
    subprocess.run(["ip", *arguments], check=True, capture_output=True)


def end_all_in(name: str) -> None:
    """End what still runs in a namespace of ours."""
    listed = subprocess.run(
        ["ip", "netns", "pids", name], check=False, capture_output=True, text=True
    )
    for pid in listed.stdout.split():
        os.kill(int(pid), signal.SIGKILL)


def iterations(folder: Path) -> list[int]:
    """Return what the log holds so far."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line)["iteration"] for line in lines]


def drill(folder: Path) -> str:
    """Run the job, cut its link, and return what happened."""
    began = time.monotonic()
    cut = mended = 0.0
    reached = recovered = 0
    with Nodes(folder) as nodes:
        while not nodes.look_after():
            done, now = len(iterations(folder)), time.monotonic()
            if not cut and done >= CUT_AT:
                nodes.cable("down")
                cut, reached = now, done
            elif cut and not mended and now > cut + 1.5 * TIMEOUT:
                nodes.cable("up")
                mended = now
            elif mended and not recovered and done > reached + 10:
                recovered = round(now - mended)
            if now > began + SECONDS:
                raise TimeoutError(f"not done after {SECONDS} s: see {folder}")
            time.sleep(0.2)
    assert iterations(folder) == list(range(ITERATIONS)), "the log has a seam"
    koi, alone = learner(), learner()
    koi.train(Sines(), checkpoint_dir=folder, resume=True)  # which only reads
    alone.train(Sines())
    pairs = zip(koi.model.parameters(), alone.model.parameters(), strict=True)
    apart = max((p - q).abs().max().item() for p, q in pairs)
    assert apart < 1e-10, f"φ is {apart} from that of one process"
    return (
        f"link cut at meta-iteration {reached} for {mended - cut:.0f} s, training again "
        f"{recovered} s after it was mended; torchrun was started {nodes.starts[0]} and "
        f"{nodes.starts[1]} times; all {ITERATIONS} meta-iterations are in the log once, and φ is "
        f"that of one process to {apart:.0e}"
    )


def main() -> None:
    try:
        with tempfile.TemporaryDirectory() as folder:
            print(drill(Path(folder)))
    except (FileNotFoundError, PermissionError, subprocess.CalledProcessError) as error:
        print(f"not possible here ({error}): network namespaces need Linux, root and iproute2")
        sys.exit(NOT_PERMITTED)


if __name__ == "__main__":
    if sys.argv[1:2] == ["work"]:
        work(sys.argv[2])
    else:
        main()
