"""Our gRPC interface: messages and what they mean, servers, channels.

Promises: errors of the tree cross the wire and come back as the same class; nothing is served or
dialled without TLS.
Does not: decide anything; the servicers above do.
"""
