"""`python -m pipeline` is the `manyheads` command."""

from pipeline.cli import main

if __name__ == "__main__":
    main()
