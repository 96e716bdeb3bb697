"""Papers on spending test-time compute: more samples, search, tools and retrieval, and when they stop paying."""
