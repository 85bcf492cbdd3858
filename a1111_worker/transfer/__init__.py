"""One URL becomes bytes on disk.

Nothing here knows what a model is. The modules, the public one first:

    download        fetch a file over several connections; a download can be resumed at any byte
    ranges          which bytes are on disk, which are on their way, and how many connections there may be
    connection      one connection, in a thread of its own
    partial_file    the file that is being downloaded: its bytes, what is stored beside it, its SHA-256
    egress          which hosts may be reached, and sessions and connections that reach no others
"""
