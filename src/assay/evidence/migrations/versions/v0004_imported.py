"""Whether a row was imported: whose a record is follows from how it came in.

Nothing is known of the rows that are there; they stay what they were taken for, measured into this store.
"""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column; rows are not changed."""
    op.add_column("assay_evidence", sa.Column("imported", sa.Boolean(), nullable=False, server_default=sa.false()))


def downgrade() -> None:
    """Raises NotImplementedError."""
    raise NotImplementedError("evidence is append-only: there is no way back")
