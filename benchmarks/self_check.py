"""What the self-check costs: a meta-iteration with it against the same one without, by turns.

    python benchmarks/self_check.py --threads 2 --write

A check is due at the first meta-iteration only. Here one is made due every second time, on learners
that have compiled already, so that what is timed is the check and not the compiler.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from harness import by_turns, environment, markdown_table, refresh, write
from workloads import FORMS, OMNIGLOT, RandomImages

from koi import Koi
from koi.models import sine_mlp
from koi.problems import Sines

ROOT = Path(__file__).resolve().parent.parent
COMMAND = "python benchmarks/self_check.py --threads {threads} --write"


def sine_koi(form: str) -> Koi:
    """A learner of 25 waves at a time."""
    vectorize, compile = FORMS[form]
    return Koi(
        *(sine_mlp(), 0.02, 5, 0), meta_batch_size=25, vectorize=vectorize, compile=compile, seed=0
    )


def one_iteration(koi: Koi, tasks: object, checked: bool) -> Callable[[], object]:
    """Return a function that does a meta-iteration, with a check before it or without."""

    def run() -> None:
        koi.num_iterations = koi.iteration + 1
        for ready in koi._engines._kept if checked else ():
            ready.engines._checked.clear()
        koi.train(tasks, progress=False)

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repetitions", type=int, default=10)
    parser.add_argument("--write", action="store_true", help="into results/ and docs/engines.md")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    facts = {**environment(), "threads": options.threads}
    rows, timings = [], {}
    for form in ("eager", "vectorized", "vectorized+compiled"):
        for name, make, tasks in (
            ("sine net, 25 tasks", sine_koi, Sines()),
            (
                "Omniglot net, 5 tasks",
                lambda form: OMNIGLOT.koi(form, "cpu", seed=0),
                RandomImages(),
            ),
        ):
            koi = make(form)
            found = by_turns(
                {
                    "checked": one_iteration(koi, tasks, True),
                    "unchecked": one_iteration(koi, tasks, False),
                },
                options.repetitions,
                warmups=2,
            )
            with_it, without = (1e3 * found[key].median for key in ("checked", "unchecked"))
            rows.append([f"{name}, {form}", f"{without:.3g} ms", f"{with_it - without:.3g} ms"])
            timings[rows[-1][0]] = found
    table = markdown_table(["work", "a meta-iteration", "the check, once"], rows)
    made = (
        f"{facts['processor']} ({facts['instructions']}), threads: {options.threads}, torch "
        f"{facts['torch']}, {facts['date']}. Made by `{COMMAND.format(threads=options.threads)}`."
    )
    print(f"{table}\n\n{made}")
    if options.write:
        write("self-check", "What the self-check costs", table, facts, timings)
        refresh(ROOT / "docs" / "engines.md", "check-cost", f"{table}\n\n{made}")


if __name__ == "__main__":
    main()
