"""A `Generation` becomes the answer that a job's caller gets.

The modules, the public one first:

    deliver         images converted as the job asks, in the answer or as links into a bucket
    answer          A1111's own answer, the `worker` block beside it, and its size against the platform's limit
    formats         A1111's base64 PNGs in the format that the job asks for
    bucket          an S3-compatible bucket: all images of a job, or none
"""
