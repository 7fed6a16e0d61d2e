"""The coordinator as a service: operations that are asked for, recorded, run, and taken over."""
