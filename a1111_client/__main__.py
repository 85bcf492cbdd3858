"""`python -m a1111_client` is the command `a1111`."""

from a1111_client.cli import app

app(prog_name="a1111")
