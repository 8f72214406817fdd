"""A trained model on recordings: classes, features, and files to give away."""
