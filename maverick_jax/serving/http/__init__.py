"""The server: dialects over HTTP, with keys, limits, metrics and a page."""
