"""`python -m kcrprune`."""

from kcrprune.cli import main

if __name__ == "__main__":
    main()
