"""The `maverick` script and `python -m maverick_jax`: a process that is the command's own."""

import sys


def main() -> int:
    """Run the command line of this process. Returns the exit status."""
    from maverick_jax.cli import interrupt, streams

    streams.prepare()
    interrupt.watch()  # before anything that takes a while, and be it the imports of the next line
    from maverick_jax.cli.main import complete_words, main

    complete_words()
    return main()


if __name__ == "__main__":
    sys.exit(main())
