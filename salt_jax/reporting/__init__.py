"""Reports: run folders are read, compared, and shown as tables and plots on one page."""
