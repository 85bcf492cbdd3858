"""A job's raw input becomes a `GenerationRequest`, or one error with every complaint about it.

The modules, the public one first:

    parse           the way in: `parse_request`
    schema          the table of fields, of output options, and of the WebUI's settings that a job may override
    loras           the LoRAs of a job: those of its list, and those of the tags in its prompts
    scripts         what the arguments of A1111's own scripts ask for, and whether that is within the limits
    prompt_scripts  the arguments of "Prompts from file or textbox" and "Prompt matrix"
    plot            the arguments of "X/Y/Z plot"
    script_plan     what a script will do: its pictures with their fields, and its texts
    size            the size of a job's final image
    values          the types and ranges of JSON values, and their complaints
"""
