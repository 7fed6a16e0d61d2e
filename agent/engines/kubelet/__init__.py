"""The ``kubelet`` engine: the kubelet's checkpoint API, whose archive is taken into the store."""
