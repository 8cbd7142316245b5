"""Files on disk and in buckets: run folders, locks, manifests, shards that can be resumed."""
