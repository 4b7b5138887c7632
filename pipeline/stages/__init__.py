"""The verbs: each reads the files of the one before it, writes its own, skips what is finished, and returns what it wrote."""
