"""The native libraries: finding and loading them, their C interface and log, and the thread that calls them."""
