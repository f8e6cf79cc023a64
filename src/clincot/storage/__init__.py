"""Storage: folders and S3 behind one protocol, artifacts under their digest, and digests of files and folders."""
