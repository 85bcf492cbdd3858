"""The pictures that a job brings become plain PNGs, which is all that A1111 gets to decode.

The modules, the public one first:

    prepare         the pictures of a job: fetched, measured against the limits, decoded
    texts           the texts in a picture's file
    decode          the bytes of a picture become 8-bit RGB, those of a mask 8-bit grey
    fetch           the bytes behind an https URL
    source          a picture as a job writes it: base64, a data: URL, an https URL
"""
