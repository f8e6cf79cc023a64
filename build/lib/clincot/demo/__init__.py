"""The demo: two rounds on rendered radiographs, a page to read, and an endpoint to ask."""
