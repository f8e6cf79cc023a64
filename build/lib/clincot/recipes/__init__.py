"""The recipes that come with the package: complete parameters for a kind of model and data (data files only)."""
