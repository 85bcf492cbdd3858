"""Automatic1111's API and a command line in front of a serverless endpoint. Importing this package does nothing.

It knows the worker only by the worker's jobs and answers: it imports nothing of it.

    cli             the command `a1111`
    infotext        the text that A1111 writes into its pictures
"""

__version__ = "0.1.0"
