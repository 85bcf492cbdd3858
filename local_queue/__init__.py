"""RunPod's job queue on one machine: callers send jobs over HTTP, and the worker's own SDK loop takes them.

    python -m local_queue --port 8000 -- python handler.py

Callers use the routes of a RunPod endpoint: /run, /runsync, /status, /stream, /cancel, /health. The worker's side has
a port of its own, on 127.0.0.1. This package imports nothing of the worker, and needs only the standard library.

`__main__` is the command line: the servers, the worker, what Ctrl-C does.

    jobs        the jobs, from queued to ended, and for how long results are kept
    routes      RunPod's routes, for callers and for the worker's SDK
    access      who may ask: the key, and what keeps a page on the internet out
    server      HTTP: a request in, an answer out
    worker      the worker's process and its environment
"""
