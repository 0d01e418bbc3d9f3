"""How long the page of `koi demo` waits for an answer: one example each of three shapes, one new.

python benchmarks/demo.py [--checkpoint RUN] starts `koi demo` and asks it as the page does. Prints
the median and the 95th percentile of the wall time, from the question to the last byte.
"""

import argparse
import http.client
import json
import math
import statistics
import subprocess
import sys
import time
from urllib.parse import urlsplit

from harness import environment, load_average

NUM_QUESTIONS = 100


def spiral(turns: float, number: int = 120) -> list[list[list[float]]]:
    """A drawing of one long stroke, as a mouse leaves it."""
    parts = [k / number for k in range(number + 1)]
    angles = [2 * math.pi * turns * part for part in parts]
    return [
        [
            [0.5 + 0.4 * part * math.cos(angle), 0.5 + 0.4 * part * math.sin(angle)]
            for part, angle in zip(parts, angles, strict=True)
        ]
    ]


def waits(host: str, port: int, num_steps: int) -> list[float]:
    """Ask, and return the seconds until each answer was there."""
    drawings = [spiral(turns) for turns in (0.5, 1.5, 3, 3.2)]
    question = {"examples": drawings[:3], "query": drawings[3], "num_steps": num_steps}
    body, seconds = json.dumps(question), []
    connection = http.client.HTTPConnection(host, port)
    for _ in range(NUM_QUESTIONS):
        began = time.perf_counter()
        connection.request("POST", "/answer", body, {"Content-Type": "application/json"})
        answer = json.loads(connection.getresponse().read())
        seconds.append(time.perf_counter() - began)
        assert len(answer["losses"]) == num_steps + 1
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="as of koi demo")
    given, facts = parser.parse_args(), environment()
    command = [sys.executable, "-c", "from koi.cli import main; main()", "demo"]
    command += ["--no-open", "--port", "0"]
    command += ["--checkpoint", given.checkpoint] if given.checkpoint else []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        try:
            address = urlsplit(server.stdout.readline().split()[2])
            for num_steps in (1, 5, 10):
                seconds = waits(address.hostname, address.port, num_steps)
                middle, slow = statistics.median(seconds), statistics.quantiles(seconds, n=20)[-1]
                print(f"{num_steps:3} steps: {1e3 * middle:.0f} ms, 95 % within {1e3 * slow:.0f}")
        finally:
            server.terminate()
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    print(f"load average after: {load_average()}")


if __name__ == "__main__":
    main()
