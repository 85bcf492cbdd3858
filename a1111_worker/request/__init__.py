"""A job's raw input becomes the request of its task, or one error with every complaint about it.

The modules, the public one first:

    parse            the way in: `parse_request`, and the tasks
    json_schema      the JSON Schema of the inputs and of the answers
    reader           a raw input, read against the table of its task
    txt2img          the table of txt2img
    img2img          the table of img2img, and what follows from the sizes of its pictures
    upscale          the table of upscale, its request, and the sizes of enlarged pictures
    generating       the request of a task that generates pictures: its fields, read as a whole
    queries          the tables of the tasks that generate nothing
    picture_fields   the types of fields that hold pictures
    references       the type of a field that holds a reference to a model
    fields           what a field is; fields, output options and WebUI settings that several tasks share
    extensions       whether the units of ControlNet and ADetailer ask for anything
    unknown          the complaint about an unknown name, with the known one that was meant
    embeddings       the embeddings and the VAE of a job, and its texts
    loras            the LoRAs of a job: those of its list, and those of the tags in its prompts
    scripts          what the arguments of A1111's own scripts ask for, and whether that is within the limits
    prompt_scripts   the arguments of "Prompts from file or textbox" and "Prompt matrix"
    plot             the arguments of "X/Y/Z plot"
    picture_scripts  the arguments of "Loopback" and "SD upscale"
    script_tags      LoRA tags in the arguments of scripts, under the WebUI's names
    script_plan      what a script will do: its pictures with their fields, and its texts
    size             the size of a job's final image
    values           the types and ranges of JSON values, and their complaints
"""
