"""Utilities that every other package may import: files, digests, memory, progress bars, module look-up, remote files."""
