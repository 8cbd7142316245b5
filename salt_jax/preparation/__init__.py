"""Prepares text into a packed cache, on this machine or through Apache Beam."""
