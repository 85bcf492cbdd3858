"""A1111's API, and OpenAI's Images API, in front of an endpoint.

From the port inwards:

    server          the process: port, signals
    app             A1111's routes
    openai          the routes of OpenAI's Images API
    page_jobs       the routes of the page
    requests        what is done with a request
    guard           who may ask: Host, Origin, users and keys
    bodies          A1111's bodies, read as its pydantic reads them
    translate       a body becomes a job's input
    options         the settings that clients post
    lists           A1111's lists, from the snapshot
    runner          a job is sent and followed, its pictures are fetched, the snapshot is kept true
    jobs            the open jobs of each client, and their progress
    sizes           RunPod's 10 MB: pictures made smaller
    errors          A1111's four kinds of error answers

Data: `fields.json` has the fields of A1111's bodies, `webui.json` its options and flags, `page/` the static files.
"""
