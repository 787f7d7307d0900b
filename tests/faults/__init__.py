"""What the fault tests need: models to merge, the command line as a process, file systems that fail."""
