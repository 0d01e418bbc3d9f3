"""``python -m koi``: the command ``koi``."""

from koi.lab.cli import main

main()
