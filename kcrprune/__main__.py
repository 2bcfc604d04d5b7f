"""`python -m kcrprune`, also under torchrun and accelerate launch."""

from kcrprune.cli import main

if __name__ == "__main__":
    main()
