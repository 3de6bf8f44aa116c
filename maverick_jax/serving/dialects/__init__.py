"""The dialects that clients speak: how each asks, and how it is answered. None knows another."""
