"""`st3-edge chat`: a conversation in the terminal."""
