"""Names -> files on this disk (hub.py); files that are whole or absent (files.py)."""
