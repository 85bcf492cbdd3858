"""A job's raw input becomes a `GenerationRequest`, or one error with every complaint about it.

The modules, the public one first:

    parse           the way in: `parse_request`
    schema          the table of fields, of output options, and of the WebUI's settings that a job may override
    loras           the LoRAs of a job: those of its list, and those of the tags in its prompts
    size            the size of the final picture, by A1111's arithmetic
    values          the types and ranges of JSON values, and their complaints
"""
