"""What people see: figures as JSON, one self-contained HTML page, tables and bars in the terminal."""
