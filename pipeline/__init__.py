"""manyheads: embed every image once, then train, tune and honestly compare many heads on the cached features."""
