"""Starting weights: a model of ours, or a ViT of another project."""
