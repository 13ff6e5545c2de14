"""`python -m smalti`, for `torchrun -m smalti`."""

from smalti.core.cli import main

if __name__ == "__main__":
    main()
