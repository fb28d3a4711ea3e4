"""lorahub: find, merge and generate LoRA adapters, exactly, on files, on a CPU, offline."""
