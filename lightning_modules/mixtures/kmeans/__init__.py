"""K-means by exact, streaming passes."""
