"""Entry point of `python -m benchmarks`; the commands are in `benchmarks.cli`."""

from benchmarks.cli import main

if __name__ == "__main__":
    main()
