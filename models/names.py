"""What weights are called: here, in files, in transformers' model and in peft's adapters."""


def module_name(name: str) -> str:
    """A part's name here -> in transformers' model, whatever the files call it."""
    if name.startswith("visual."):
        return f"model.{name}"
    return "model.language_model." + name.removeprefix("model.")


# What wrappers put into names: DataParallel and DeepSpeed, torch.compile, FSDP, peft.
WRAPPERS = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")


def parameter_name(key: str) -> str:
    """A weight's name in a file -> here: `model.visual.x` -> `visual.x` and so on; and of peft's
    adapters, `base_model.model.model.visual.x.lora_A.weight` -> `visual.x.lora_A`. What wrappers
    put before a name goes."""
    while wrapper := next((one for one in WRAPPERS if key.startswith(one)), None):
        key = key.removeprefix(wrapper)
    if ".lora_" in key:
        key = key.removesuffix(".weight")
    for newer, ours in (("model.visual.", "visual."), ("model.language_model.", "model.")):
        if key.startswith(newer):
            return ours + key.removeprefix(newer)
    return key
