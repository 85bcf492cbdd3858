"""A `GenerationRequest` and held models become a verified `Generation`.

The modules, the public one first:

    generation      one request to the WebUI, watched until its answer begins, then verified
    resolution      the names of a job, each as the WebUI spells it and only if it is there
    composition     the body of that request: models as tags and words in the prompts
    samplers        sampler and scheduler as people write them, and the WebUI's own names for them
    verification    what `info` in an answer must show before the answer is believed
    extras          pictures enlarged: names as the WebUI spells them, what its answer must show
    infotext        what A1111 writes into each picture
    readiness       makes the WebUI ready, and ready again: it answers, has the defaults, and has loaded the checkpoint
    checkpoint      the switch to a checkpoint, verified by its hash
    faces           whether the files are there that restore faces
    extensions      what ControlNet and ADetailer have, and whether a job's units can be used
    upscalers       whether an upscaler's model works, shown by a tiny picture
    options         the options that a job may override, set to their defaults
    owner           what the options of somebody else's WebUI were, in a file until they are put back
    progress        how far a generation is, as its caller can believe it
    running         a long request while it runs: its progress, interrupt and end
    supervisor      the WebUI's process: what start.sh has written about it, and signals to it
    client          the WebUI's HTTP API, one method an endpoint
    responses       what the endpoints answer, as checked values
    timings         the periods of all this
"""
