"""What the worker does around a job.

Nothing here looks into a job's input. The modules in reading order:

    run             jobs in threads under an event loop, and a clean end if a job is cancelled
    gpu_queue       one generation at a time, and which downloads go first
    status          what RunPod's /status shows of a running job
    health          the worker's state on disk, for the container's health check
    shutdown        the seconds that a job and the worker's shutdown have
    memory          memory that a large result left free is given back to the system
"""
