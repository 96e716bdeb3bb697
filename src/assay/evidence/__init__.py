"""What was seen: evidence records, the verdict on them, the store that keeps them and the report.

`record` (Evidence), `verdict` (the written rule), `store` (SQLite or PostgreSQL), `runner` (measure the claims of some papers),
`report` (table and HTML). Nothing is imported here, so that a reader of one part pays for no other.
"""
