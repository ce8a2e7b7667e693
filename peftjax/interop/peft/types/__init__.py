"""One file for each kind of PEFT adapter, named as its peft_type."""
