"""`python -m a1111_client` is the command `a1111`."""

from a1111_client.cli import main

main()
