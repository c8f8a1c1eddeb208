"""`python -m stabrun`."""

from stabrun.cli.main import main

main()
