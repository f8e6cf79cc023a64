"""Writing a data set folder: rows checked one by one, images stored once, a report of what was refused.

Used by every reader in clincot.datasets. Reading such a folder back is clincot.datasets.folder.
"""
