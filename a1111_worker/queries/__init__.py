"""The answers to the tasks that generate nothing. None of them waits for the GPU.

The modules in reading order:

    models          what a client's menus show, and its fingerprint
    png_info        what a picture's file says about how it was made
    prefetch        models brought into the cache, for later jobs
    health          how the worker is: its GPU, its disk, its cache, its jobs so far
    gpu             what nvidia-smi says of the GPU
    answer          the `worker` block of these answers
"""
