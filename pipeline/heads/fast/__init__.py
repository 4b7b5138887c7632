"""The optimum that scikit-learn finds, sooner: many fits of one kind of head at once, on the same folds."""
