"""The demo: two rounds on rendered radiographs, a page to look at, and an endpoint to ask."""
