"""Automatic1111's API and a command line in front of a serverless endpoint. Importing this package does nothing.

It knows the worker only by the worker's jobs and answers: it imports nothing of it.

    cli             the command `a1111`: info, login, serve
    commands        draw, upscale, batch, models, prefetch, health, cancel
    batch           many jobs from a file, resumable
    terminal        what the commands share: options, errors, progress bars
    pictures        pictures as files
    manage          its commands deploy, endpoint and volume
    deploy          an endpoint on RunPod: whether it can be, what it costs, creating and changing it
    volume          models onto a network volume, through RunPod's S3 API
    runpod_api      RunPod's management API
    credentials     which endpoint is meant, and its key
    endpoint        one endpoint: jobs, their states and answers, retries, cancellation
    errors          what can go wrong, with codes
    snapshot        what an endpoint has, kept on disk
    infotext        the text that A1111 writes into its pictures
    gateway         A1111's API and OpenAI's Images API in front of an endpoint
"""

__version__ = "0.1.0"
