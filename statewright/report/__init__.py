"""Pages: one self-contained HTML file each, with vector figures and no network."""
