"""One URL becomes bytes on disk.

Nothing here knows what a model is. The modules, the public one first:

    download        fetch a file over several connections; a download can be resumed at any byte
    monitor         what the thread that waits for a file looks at: slow connections, its speed, its progress
    range_worker    the thread of one connection: range request after range request
    state           what the threads of a download share, and what follows from each fault
    concurrency     how many connections a file gets, and which of them are too slow
    connection      one HTTP connection: request a range, judge the answer, read it, abort it
    partial_file    the file that is being downloaded: its bytes, what is saved beside it, its SHA-256
    ranges          which byte ranges are missing, which are requested, and how large a request is
    egress          the egress policy: which origins may be reached, and sessions and connections that reach no others
    addresses       which IP addresses are public
"""
