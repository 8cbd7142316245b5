"""Reports: run folders read, compared, and shown as tables and plots on one page."""
