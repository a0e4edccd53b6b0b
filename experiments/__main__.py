"""Entry point of `python -m experiments`; the commands are in `experiments.cli`."""

from experiments.cli import main

if __name__ == "__main__":
    main()
