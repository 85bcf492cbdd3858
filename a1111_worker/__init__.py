"""What `handler.py` and `model_manager.py` are made of. Importing this package does nothing, unless Python is too old.

Modules that several packages need, in reading order:

    domain          the nouns: what a job asks for, what is on disk, what was made, where a job is
    errors          everything that can go wrong, as a tree, with codes
    config          every setting, read from the environment
    environment     how a setting is declared, read and parsed
    arguments       the arguments of handler.py, checked before the boot
    context         what travels with a job: deadline and cancellation, progress, priority, timings
    catalog         the models that the worker knows by name
    webui_names     what the WebUI calls a model: a name for each content
    prompt          `<lora:name:0.8>` in a prompt, as A1111 reads it
    text            other people's text, made fit to be shown
    images          A1111's base64 PNGs in other formats, and whether an image shows anything
    origins         scheme, host and port; CivitAI, Hugging Face and their storage
    similar         what a complaint suggests instead of an unknown name
    retry           growing pauses, and Retry-After
    files           atomic writes, and the errors of a full disk
    background      a blocking call that can be abandoned
    heartbeat       a thread that calls its listeners every few seconds
    logs            the worker's log lines, with the job's id
    relay           the log lines of other processes; start.sh runs it as a program

Packages, each for one subject:

    transfer        one URL becomes bytes on disk
    models          a reference to a model becomes a verified file in the cache
    pictures        the pictures that a job brings become plain PNGs
    request         a job's raw input becomes a request, or every complaint about it
    webui           a request becomes a verified generation
    delivery        a generation becomes the job's answer
    job             what the worker does around a job: order, cancellation, status, health, shutdown
    queries         the answers to the tasks that generate nothing

Imports go one way:
root modules ← transfer ← models ← pictures ← request ← webui ← delivery ← job ← queries ← model_manager ← handler
"""

import sys

if sys.version_info < (3, 10):  # noqa: UP036 - one line instead of a traceback from deep inside a module
    sys.exit(f"a1111-worker needs Python 3.10 or newer, and this is Python {sys.version_info[0]}.{sys.version_info[1]}")

__version__ = "0.1.0"
