"""Many adapters into one."""
