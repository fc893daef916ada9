"""What fulfils the ports of `handlers/ports.py` against the world outside."""
