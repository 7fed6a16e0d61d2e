"""The ``container`` engine: CRIU inside the namespaces of a container."""
