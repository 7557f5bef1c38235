"""`python -m boostdiff`."""

from .cli import main

main()
