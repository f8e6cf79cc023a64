"""Writing of dataset folders: checks every row, stores every image once and reports the refused rows.

Every reader in clincot.datasets uses it; clincot.datasets.folder reads such a folder back.
"""
