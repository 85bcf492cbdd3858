"""One URL becomes bytes on disk.

Nothing here knows what a model is. The modules, the public one first:

    download        fetch a file over several connections; a download can be resumed at any byte
    pool            the connections of one download, at work and idle
    range_fetch     the thread of one request: a range of the file, from a connection to the disk
    incoming_file   what is known of the file, which of its bytes are on disk, its SHA-256
    retries         which link is used, and when a download tries again
    budget          how many connections each file may have
    speed           whether something is too slow, and by which clock
    progress        what the log, and whoever waits for a file, are told while it comes
    connection      one HTTP connection: request a range, judge the answer, read it, abort it
    partial_file    the file on disk that is being downloaded: its bytes, and what is saved beside it
    ranges          which byte ranges are missing, which are requested, and how large a request is
    egress          the egress policy: which origins may be reached, and sessions and connections that reach no others
    addresses       which IP addresses are public
"""
