"""The documentation site: pages assembled from the repository's documents, the API reference, and checks of both."""
