"""The engine's answers in the formats that clients speak: over HTTP, and in files."""
