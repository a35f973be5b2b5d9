"""`python -m crossent` is the console command `crossent`."""

from crossent.cli import main

main()
