"""The command line's commands, one file or folder each."""
