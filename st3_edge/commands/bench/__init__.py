"""`st3-edge bench`: stock llama.cpp and ST³ side by side. docs/bench.md says what is measured, and how."""
