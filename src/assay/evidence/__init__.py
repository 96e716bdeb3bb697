"""What was measured: evidence records, the verdicts on them, the store that keeps them, and the report.

`record` (Evidence), `verdict` (the written rule), `hashes` (is a record older than its code), `store` (SQLite or PostgreSQL), `shipped`
(the authors' own records), `runner` (measures the claims of papers), `report` (table and HTML). This package imports nothing by
itself, so that using one part does not load the others.
"""
