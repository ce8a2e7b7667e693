"""Adapters of Hugging Face PEFT, both ways, without torch.

  writing.py    an adapter folder of ours -> one of PEFT
  reading.py    the inverse
  as_lora.py    any foldable adapter -> the nearest LoRA
  source.py     what all three start from: a base, its sites, its names
  factors.py    which methods are a LoRA once trained, and of which factors
  part.py       one method's numbers, between the two sides
  files.py      adapter_config.json and adapter_model.safetensors
  names.py      torch modules <-> sites
  types/        one file for each kind of adapter, named as its peft_type
  probe.py      the measured table of docs/peft.md

A file of types/ holds

  METHODS                       names of the methods that it writes
  SUFFIXES                      what follows a module's name in a tensor's
  CONFIG                        {key of adapter_config.json: default} that is
                                read or written
  write(part, names, sites)     Part -> (config, {module: {suffix: array}})
  read(config, modules, names, sites)   the inverse -> Part
  COMMON                        names of tensors of the whole adapter, if it has
                                any; they are those of the module ''
  takes(part)                   whether the settings of a method of METHODS are
                                for this kind; without it, all are

and nothing is registered: a new file is found by its name.
"""
