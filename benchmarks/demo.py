"""How long the page of `koi demo` waits for an answer: one example each of three shapes, one new.

python benchmarks/demo.py [CHECKPOINT] serves the demo from a thread and asks it as the page does.
Prints medians from the question to the last byte: wall time, and processor time of client and
server together, which other work on the machine does not lengthen.
"""

import contextlib
import http.client
import json
import math
import statistics
import sys
import threading
import time
from pathlib import Path

import torch
import uvicorn
from harness import environment, load_average

from koi.lab.demo.classifier import SHIPPED, Classifier
from koi.lab.demo.server import application, listen

NUM_QUESTIONS = 50


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


def ask(connection: http.client.HTTPConnection, num_steps: int) -> tuple[float, float]:
    """Return the seconds of wall time and of processor time that one answer took."""
    drawings = [spiral(turns) for turns in (0.5, 1.5, 3, 3.2)]
    question = {"examples": drawings[:3], "query": drawings[3], "num_steps": num_steps}
    began, worked = time.perf_counter(), time.process_time()
    body = json.dumps(question)
    connection.request("POST", "/answer", body, {"Content-Type": "application/json"})
    answer = json.loads(connection.getresponse().read())
    seconds = time.perf_counter() - began, time.process_time() - worked
    assert len(answer["losses"]) == num_steps + 1
    return seconds


def main() -> None:
    torch.set_num_threads(1)  # as koi demo does
    facts = environment()
    classifier = Classifier.load(Path(sys.argv[1]) if sys.argv[1:] else SHIPPED)
    server = uvicorn.Server(uvicorn.Config(application(classifier), log_level="warning"))
    with listen("127.0.0.1", 0) as listening:
        thread = threading.Thread(target=server.run, args=([listening],))
        thread.start()
        connection = http.client.HTTPConnection(*listening.getsockname())
        with contextlib.closing(connection):
            for num_steps in (1, 5, 10):
                ask(connection, num_steps)
                seconds = [ask(connection, num_steps) for _ in range(NUM_QUESTIONS)]
                pairs = zip(*seconds, strict=True)
                wall, cpu = (1e3 * statistics.median(each) for each in pairs)
                print(f"{num_steps:2} steps: {wall:.0f} ms, of processor time {cpu:.0f} ms")
        server.should_exit = True
        thread.join()
    print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n")
    print(f"load average after: {load_average()}")


if __name__ == "__main__":
    main()
