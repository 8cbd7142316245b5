"""Files on disk and in buckets: run folders, locks, manifests, journals of finished work."""
