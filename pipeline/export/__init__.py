"""Export of an experiment's heads: bundles, scikit-learn estimators, and files for other programs."""
