"""Model files: GGUF headers and copies, which two belong together, and where they come from."""
