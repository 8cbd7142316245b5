"""From run folders to plots and a page."""
