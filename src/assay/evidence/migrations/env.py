"""Alembic's entry point: runs the steps on the connection the store passes in, inside the store's transaction."""

from alembic import context

from assay.evidence.store import VERSION_TABLE, metadata

context.configure(
    connection=context.config.attributes["connection"], target_metadata=metadata, version_table=VERSION_TABLE
)
with context.begin_transaction():
    context.run_migrations()
