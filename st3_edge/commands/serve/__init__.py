"""`st3-edge serve`: llama-server with ST3 on."""
