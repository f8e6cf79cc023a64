"""Object stores (local folders and S3) behind one protocol, artifacts in them, and digests of files and folders."""
