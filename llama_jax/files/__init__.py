"""Files and directories: written whole or not at all, JSON, what a directory holds."""
