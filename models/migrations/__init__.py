"""The history of the schema, applied by `python -m server migrate`."""
