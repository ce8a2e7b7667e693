"""Adapters of Hugging Face PEFT, both ways, without torch.

  adapters.py   an adapter folder of ours <-> one of PEFT
  files.py      adapter_config.json and adapter_model.safetensors
  names.py      torch modules <-> sites
  types/        one file for each kind of adapter, named as its peft_type

A file of types/ holds

  METHODS                       names of the methods that it writes
  SUFFIXES                      what follows a module's name in a tensor's
  CONFIG                        {key of adapter_config.json: default} that is
                                read or written
  write(part, names, sites)     Part -> (config, {module: {suffix: array}})
  read(config, modules, names, sites)   the inverse -> Part

and nothing is registered: a new file is found by its name.
"""
