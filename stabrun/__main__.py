"""`python -m stabrun`."""

from stabrun.cli import main

main()
