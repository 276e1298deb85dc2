"""`st3-edge inspect`: which patches of a picture each layer held, as a PNG picture and an HTML page."""
