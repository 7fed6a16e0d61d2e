"""The store: format, writer | reader, verification, retention. FORMAT.md is its contract."""
