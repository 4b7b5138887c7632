"""The stages: each reads the files of the previous one, writes its own, skips finished work, and returns what it wrote."""
