"""Files on disk and in buckets: run folders, locks, manifests, job journals."""
