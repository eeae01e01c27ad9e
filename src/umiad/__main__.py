"""`python -m umiad` is the command line."""

from umiad.cli import main

main()
