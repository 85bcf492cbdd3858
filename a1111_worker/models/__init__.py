"""A reference to a model becomes a verified file in the cache, and the file stays there while a job uses it.

The modules, the public one first:

    manager             the models of one worker: `hold` and the checkpoint
    care                what the command line does: verify, remove, shrink
    references          the ways to name a model, each reduced to ids
    cache               the models that are on disk: found, held, shown to the WebUI, evicted
    fetcher             how a missing model gets into the cache: once in this process, once in the fleet, verified
    single_flight       one fetch of a file at a time in this process
    targets             what is fetched, and what its file is called
    sites               what CivitAI and Hugging Face have in common, as the cache sees it
    civitai             the client of CivitAI's API
    civitai_files       which file of a version is meant
    civitai_responses   what each response means: tried again, or which error
    huggingface         the client of Hugging Face
    hub_files           how a file of Hugging Face is named, and who may have it
    hub_cache           the files of Hugging Face that RunPod has put on the host
    safetensors         what a safetensors file says about itself: valid or not, its architecture, A1111's hash
    small_models        what an embedding and a VAE look like
    tensors             the format of a safetensors header, and its limits
    layers              which layers of a checkpoint a LoRA changes
    fit                 whether a LoRA fits the checkpoint
    sidecars            what is known of each model
    volume              the folders of models, and how a file gets there
    names               the names of model files
    webui_folder        the links that the WebUI sees
    leases              one worker of the fleet fetches a file
    read_ahead          files are read into the page cache
    holds               a model that a worker uses is not evicted
    liveness            which workers are alive
    space               room for what is downloaded
    eviction            which models are evicted: the decision
    progress            the progress of several files, as one
"""
