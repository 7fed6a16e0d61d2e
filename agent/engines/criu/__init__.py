"""The engine for process trees on this host: CRIU, driven through its RPC."""
